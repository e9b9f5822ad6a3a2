"""Answers kept as they come, so that a run that was cut off asks only what is left."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from typing_extensions import TypedDict

from ray_sql.config.files import parse_json, read_text
from ray_sql.errors import DamagedFile, StoreError
from ray_sql.generate.questions import Answer
from ray_sql.store import storage


class _Kept(TypedDict):
    question: int


VERSION = 5
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
            lines = read_text(self.file, "").splitlines()
        except DamagedFile:  # none yet, or one that is made again
            return {}
        answers = {}
        for line in lines:
            # a damaged line is that which was being written when the run was cut off
            with suppress(DamagedFile):
                index = parse_json(_Kept, line, str(self.file), "")["question"]
                answers[index] = parse_json(Answer, line, str(self.file), "")
        return answers

    def add(self, index: int, answer: Answer) -> None:
        """Append one answer. Raises `StoreError` if it cannot be written."""
        size = self.file.stat().st_size if self.file.is_file() else 0
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self.file.is_file():  # a pipe, say: nobody reads from it
                self.file.unlink(missing_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(_line(index, answer))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.file, size)
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
