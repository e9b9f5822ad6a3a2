r"""Ask a tuned model a question about a database, from the terminal.

    python -m jobs.ask --output_name demo --database bookshop --question "How many books are there?"
    ray-sql ask "How many books are there?" --output_name demo --database bookshop

Prints the SQL, its rows and the time; `--json` prints one JSON object. Without a question it reads
lines, and keeps a history. `\save` appends a corrected pair to a file (docs/ask.md).
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("ask")
