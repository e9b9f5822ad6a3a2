"""Answers kept as they come, so that a run that was cut off asks only what is left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ray_sql.errors import StoreError
from ray_sql.generate.questions import Answer
from ray_sql.store import storage

VERSION = 4
"""Raise when the code of this package makes other answers from the same questions."""


class AnswerCache:
    """A file of answers, one JSON object a line, with the index of the `question` in each.

    Its name must change with whatever the answers depend on. One process writes it, all may read.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def read(self) -> dict[int, Answer]:
        """Return all complete answers by index of their question; none where there is no file."""
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        answers = {}
        for line in lines:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the run was cut off
                continue
            index = values.pop("question")
            answers[index] = Answer(**values)
        return answers

    def add(self, index: int, answer: Answer) -> None:
        """Append one answer. Raises `StoreError` if it cannot be written."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(_line(index, answer))
        except OSError as error:
            raise StoreError(
                f"{self.file}: cannot be written ({error.strerror}); "
                "free space, or choose another --cache_dir"
            ) from None

    def write(self, answers: Mapping[int, Answer]) -> None:
        """Replace the file, complete or not at all."""
        lines = (_line(index, answer) for index, answer in sorted(answers.items()))
        storage.write_local_text(self.file, "".join(lines))


def _line(index: int, answer: Answer) -> str:
    return json.dumps({"question": index, **asdict(answer)}) + "\n"
