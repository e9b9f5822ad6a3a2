"""Corrected pairs, appended to a file that is a dataset: the terminal and the page share it."""

from __future__ import annotations

import json
from pathlib import Path

from ray_sql.data.answers import one_line
from ray_sql.errors import ConfigError


def append(file: Path, database: str, question: str, sql: str, evidence: str = "") -> None:
    """Append a question, and its hint if it had one, with its query, as one line of JSON.

    Raises `ConfigError` where the file cannot be written.
    """
    pair = {"db_id": database, "question": question, "query": one_line(sql)}
    if evidence:
        pair["evidence"] = evidence
    line = json.dumps(pair, ensure_ascii=False) + "\n"
    try:
        with file.open("ab", buffering=0) as stream:  # one write a line, whoever else appends
            stream.write(line.encode())
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written ({error.strerror}); give another file for corrections"
        ) from None
