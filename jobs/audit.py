"""Find gold queries, or predictions, whose result is empty, open, or right by chance.

    python -m jobs.audit --dataset_id data/spider --split dev --output_name spider-audit
    ray-sql audit --dataset_id out/shop-data --output_name shop-audit

Each query is executed, also on copies of its database with rows and indexes in another order.
Writes `out/spider-audit/audit.json`. With it, `evaluate` scores without flagged golds (`--audit`).
`--predictions_file` judges predictions instead. `--write_hashes` makes the file by which `--hashes`
knows public tests.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("audit")
