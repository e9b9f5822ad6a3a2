"""Push a finished run's adapter to the Hub, with its contract, settings, metrics and a model card made from them.

    python -m jobs.publish --output_name demo --hub.repo_id me/demo-sql

The token comes from HF_TOKEN. The run is the one that `--output_name` and `--output_dir` name; docs/publish.md says what is pushed and
what is refused.
"""

from ray_sql import cli
from ray_sql.config import PublishConfig


def publish(config: PublishConfig) -> None:
    """Publish, or with `--dry_run` only say what would be published as what."""
    from ray_sql import publish

    (publish.dry_run if config.dry_run else publish.publish)(config, config.run_dir)


if __name__ == "__main__":
    cli.main(publish, PublishConfig)
