"""Push a finished run's adapter to the Hub, with its contract, settings, metrics and a model card.

    python -m jobs.publish --output_name demo --hub.repo_id me/demo-sql

The token comes from HF_TOKEN. `--output_name` and `--output_dir` name the run. docs/publish.md says
what is pushed and what is refused.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("publish")
