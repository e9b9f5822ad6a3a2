r"""Check that an endpoint is the model of a run: it answers the run's scored questions again.

    python -m jobs.verify --output_name demo --evaluate.url http://127.0.0.1:8000/v1

Works with any endpoint that speaks OpenAI's protocol. Names what it found: equal, within rounding,
no adapter, another template, truncated prompt, sampling is on, or other weights. Ends with exit
code 3 where the endpoint is another model (docs/serving.md).
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("verify")
