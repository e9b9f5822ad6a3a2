"""Keep what a run leaves: files (`storage`), checkpoints, and the run's folder (`run_folder`)."""
