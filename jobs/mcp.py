"""Offer a tuned model to an assistant as the tool `ask_database`, by the Model Context Protocol.

    python -m jobs.mcp --output_name demo --database bookshop

The assistant starts this command, and speaks with it over standard input and output
(docs/ways-out.md). Needs the extra `mcp`.
"""

from ray_sql.__main__ import main

if __name__ == "__main__":
    main("mcp")
