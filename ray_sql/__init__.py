"""Fine-tune small language models to answer questions in SQL, and measure them by executing it.

from ray_sql import Config, finetune

finetune.run(Config(model_name="demo", output_name="mine", task_type="sql", dataset_id="demo"))
"""

from ray_sql.config import Config

__version__ = "0.2.0"
