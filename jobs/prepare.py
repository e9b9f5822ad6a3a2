"""Make a checked dataset of raw pairs (a spreadsheet, say) and the database they are about.

    python -m jobs.prepare --pairs pairs.csv --url sqlite:///shop.db --output_name shop-data
    ray-sql prepare pairs.csv --url shop.db --output_name shop-data --dry_run

Each pair is parsed and executed. Those that do not run are in `rejected.jsonl`, with the reason and
the nearest fix. The folder `out/shop-data` is a dataset for every other job (`--dataset_id`).
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("prepare")
