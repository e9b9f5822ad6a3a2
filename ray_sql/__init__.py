"""Fine-tune small language models to answer questions in SQL, and measure them by executing it.

from ray_sql import Config, finetune

finetune.run(Config(model_name="demo", output_name="mine", task_type="sql", dataset_id="demo"))
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it, without the time that `typing` takes
if TYPE_CHECKING:
    from ray_sql.config import Config

__all__ = ["Config"]
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """Load the settings when they are first asked for: `ray_sql.__main__` has something to do."""
    if name != "Config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("ray_sql.config").Config
