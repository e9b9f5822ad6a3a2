"""Turn answers into verdicts and scores.

`scoring` judges answers, of models (`models`) or of a predictions file (`predictions_file`);
`results` summarises and writes them; `compare` compares two scored files.
"""

from ray_sql.evaluate.run import run
