r"""Serve a tuned model over HTTP, as an application of Ray Serve.

    python -m jobs.serve --output_name demo
    curl localhost:8000/v1/sql -H 'Content-Type: application/json' \
        -d '{"question": "How many books are there?", "database": "bookshop"}'

Databases are the run's own, or those of `--serve.databases "{shop: shop.db}"` (docs/serving.md).
Needs the extra `serve`. On a cluster: `serve deploy jobs/serve.yaml`.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("serve")
