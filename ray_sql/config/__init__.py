"""Every setting of every job, each defined once, and the one road that leads to them.

Defaults < YAML files (`--config a.yaml`, repeatable) < environment (`HF_TOKEN`,
`MLFLOW_TRACKING_URI`) < flags (`--learning_rate 2e-4 --lora.r 32`). A change made in code
(`Config.changed`) goes down the same road, so nothing reaches a stage unvalidated. Importing this
package loads no torch, ray or mlflow.
"""

from ray_sql.config.base import JobConfig
from ray_sql.config.batching import AUTO_EXAMPLES_PER_ROW, Batching
from ray_sql.config.curation import AuditConfig, PrepareConfig
from ray_sql.config.help import groups, help_text
from ray_sql.config.jobs import (
    AskConfig,
    AskingConfig,
    CheckConfig,
    CompareConfig,
    EvaluateConfig,
    McpConfig,
    OneDatabaseConfig,
    PipelineConfig,
    PublishConfig,
    ResultsConfig,
    RunsConfig,
    ServeConfig,
    SweepConfig,
    TunedConfig,
    UiConfig,
    VerifyConfig,
)
from ray_sql.config.load import C, load
from ray_sql.config.settings import Config, ModelConfig
from ray_sql.config.urls import absolute, mask_password, mask_secrets, strip_password
from ray_sql.config.validate import build, differences, flatten, merge, names, nested
