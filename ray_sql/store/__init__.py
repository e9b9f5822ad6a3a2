"""What a run keeps, and where: plain storage (`storage`), checkpoints (`checkpoints`), and a run's folder (`run_folder`)."""
