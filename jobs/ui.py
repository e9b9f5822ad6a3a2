"""Open MLflow's pages on this project's runs.

    python -m jobs.ui
    python -m jobs.ui --port 5001 --tracking.uri sqlite:////shared/mlflow.db

Prints the address, with the scores as columns. Of a server that runs already it prints the address
alone.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("ui")
