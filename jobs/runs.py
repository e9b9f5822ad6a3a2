"""List runs, and remove old ones: their folders and their MLflow runs together.

    python -m jobs.runs --older_than 30d
    python -m jobs.runs --older_than 30d --delete

The first only shows what the second would remove. A run whose model has an alias in MLflow's
registry, such as a champion, stays.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("runs")
