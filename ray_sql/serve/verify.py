"""Check that an endpoint answers as the run that was measured: the door of `ray-sql verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_sql import data, generate
from ray_sql.config import Config, VerifyConfig, mask_password
from ray_sql.data import Example
from ray_sql.display import Display
from ray_sql.errors import DataError
from ray_sql.evaluate import scoring
from ray_sql.evaluate.endpoint import Endpoint, Turns
from ray_sql.evaluate.linker import asked_links
from ray_sql.evaluate.scored import load_scored
from ray_sql.generate import Answer, make_questions
from ray_sql.metrics.judged import JudgedRow, is_right
from ray_sql.serve import recipe
from ray_sql.serve.diagnosis import MOST_UNSTEADY, Compared, Diagnosis, Said, diagnose
from ray_sql.serve.identity import Identity
from ray_sql.serve.prompter import Prompter
from ray_sql.store.run_folder import CONFIG, RunFolder
from ray_sql.tasks import TASKS

REPEATED = 16
"""Questions that are asked a second time, to see whether answers are drawn."""
ALONE = 8
"""Questions with two answers that are asked twice more, each with nothing beside it."""
DIFFERS = 3
"""The exit code for an endpoint that is another model."""
SHOWN = 5
"""Answers that differ, of which the log shows both."""


def run(config: VerifyConfig) -> Diagnosis:
    """Compare an endpoint's answers with those of a run; end with exit code 3 where it differs."""
    with Display() as display:
        checked = _Checked(config, display)
        endpoint = Endpoint.find(config.evaluate)
        compared = checked.ask(endpoint, display)
        found = diagnose(compared, checked.said(endpoint.described), checked.compute_type)
        for one in [one for one in compared if not one.is_same][:SHOWN]:
            display.line(f"{one.id}: {one.question}")
            display.line(f"    measured {one.measured}")
            display.line(f"    served   {one.served}")
        for line in found.evidence + _over(endpoint):
            display.line(line)
        display.line(f"{endpoint.model} at {mask_password(endpoint.url)}: {found.verdict}")
    print(json.dumps({"verdict": found.verdict, **found.numbers}))
    if not found.is_fine:
        raise SystemExit(DIFFERS)
    return found


def dry_run(config: VerifyConfig) -> None:
    """Show the first prompt, and how many questions would be sent where."""
    display = Display()
    checked = _Checked(config, display)
    for turn in checked.turns(*checked.examples[0]):
        display.line(f"--- {turn['role']} ---\n{turn['content']}")
    count, place = len(checked.examples), mask_password(config.evaluate.url)
    display.line(f"--- plan ---\nwould send {count} questions to {place}")


class _Checked:
    """The scored questions of a run, with its measured answers."""

    def __init__(self, config: VerifyConfig, display: Display) -> None:
        found = recipe.find(config)
        prompter = Prompter(found, {})  # the contract is compared
        self._identity = Identity.of(
            prompter.model_folder, found.config.quantization, found.adapter
        )
        self._config: Config = found.config
        self.compute_type = (found.adapter.read_contract() or {}).get("compute_type", "bfloat16")
        """The type that the run computed in; where it is not known, the one that rounds more."""
        folder = RunFolder(config.run_dir)
        _refuse_beams(folder)
        self._measured = _by_key(folder.read_predictions())
        self._base = _by_key(folder.read_predictions("base"))
        self._corpus = load_scored(self._config, found.adapter.uri)
        self._links = asked_links(self._config, self._corpus, display)
        self._encoder = generate.question_encoder(
            prompter.tokenizer, self._config, self._corpus.schemas
        )
        known = [
            (split, example)
            for split in self._config.split
            for example in self._corpus.splits[split]
            if (self._links.split_name(split), example.id) in self._measured
        ]
        if not known:
            raise DataError(
                f"{folder}: none of its scored questions is among the answers in "
                "predictions.jsonl; give a run that was measured"
            )
        self.examples = data.sample(known, config.questions, self._config.seed)
        """The questions to send, with their splits."""

    def turns(self, split: str, example: Example) -> list[dict[str, str]]:
        """Return the turns of the prompt that was measured."""
        shown = self._links.show(split, example, self._corpus.schemas)
        return self._encoder.question_turns(example, shown.schema)

    def ask(self, endpoint: Endpoint, display: Display) -> list[Compared]:
        """Return what an endpoint answers, beside what was measured."""
        conversations = [self.turns(*scored) for scored in self.examples]
        most = self._config.evaluate.max_new_tokens
        asking = display.counter(f"asking {endpoint.model}")
        repeated = conversations[:REPEATED]
        answers = endpoint.answer_all([*conversations, *repeated], most, asking)
        first, again = answers[: len(conversations)], answers[len(conversations) :]
        seconds = [self._read(answer.raw) for answer in again]
        unasked = [None] * (len(first) - len(again))
        pairs = zip(self._judged(first), [*seconds, *unasked], strict=True)
        compared = [self._compared(row, second) for row, second in pairs]
        unsteady = [index for index, one in enumerate(compared) if one.is_unsteady]
        if len(unsteady) > MOST_UNSTEADY:
            asked = unsteady[:ALONE]
            alone = self._ask_alone(endpoint, [conversations[index] for index in asked], display)
            for index, two in zip(asked, alone, strict=True):
                compared[index] = replace(compared[index], alone=two)
        return compared

    def _ask_alone(
        self, endpoint: Endpoint, conversations: Sequence[Turns], display: Display
    ) -> list[tuple[str, str]]:
        """Return two answers to each conversation, asked with nothing beside it."""
        asking = display.counter("asking again, one at a time")
        twice = [*conversations, *conversations]
        most = self._config.evaluate.max_new_tokens
        texts = [self._read(one.raw) for one in endpoint.answer_all(twice, most, asking, 1)]
        half = len(conversations)
        return list(zip(texts[:half], texts[half:], strict=True))

    def said(self, described: Mapping[str, Any]) -> Said:
        """Return the first part that an endpoint says to have otherwise than the run."""
        return self._identity.difference(described.get("ray_sql", {}))

    def _read(self, raw: str) -> str:
        """Return the SQL or links of an answer; "" where there are none."""
        return scoring.JUDGES[self._config.task_type].parse(raw) or ""

    def _judged(self, answers: Sequence[Answer]) -> list[JudgedRow]:
        questions = [
            question
            for split, example in self.examples
            for question in make_questions(
                [example], split, self._corpus, self._encoder, self._links
            )
        ]
        task = TASKS[self._config.task_type]
        greedy = self._config.evaluate.model_copy(update={"ground": "none"})
        schemas = self._corpus.judged_schemas(task)
        return scoring.score(questions, answers, task, greedy, schemas)

    def _compared(self, row: JudgedRow, again: str | None) -> Compared:
        key = row["split"], row["id"]
        measured, base = self._measured[key], self._base.get(key)
        return Compared(
            id=row["id"],
            question=row["question"],
            measured=self._read(measured["raw"]),
            base=None if base is None else self._read(base["raw"]),
            served=row["predicted"] or "",
            again=again,
            alone=None,
            measured_right=_greedy_is_right(measured),
            served_right=is_right(row),
            measured_prompt=measured["prompt_tokens"],
            served_prompt=row["prompt_tokens"],
        )


def _refuse_beams(folder: RunFolder) -> None:
    """Raise `DataError` for a run whose answers were found with beams."""
    settings = folder.read_settings() or {}
    beams = settings.get("evaluate", {}).get("num_beams", 1)
    if beams > 1:
        raise DataError(
            f"{folder}: the run was measured with {beams} beams, and endpoints answer greedily; "
            f"evaluate it once more with --config {folder.place(CONFIG)} --adapter "
            f"{folder.adapter} --evaluate.num_beams 1 and another --output_name, and verify that "
            "name with the same --adapter"
        )


def _over(endpoint: Endpoint) -> list[str]:
    """Return what vLLM says of its adapters, in a line."""
    root, parent = endpoint.described.get("root"), endpoint.described.get("parent")
    return [f"the endpoint says that it serves {root} over {parent}"] if root and parent else []


def _by_key(rows: Sequence[JudgedRow]) -> dict[tuple[str, str], JudgedRow]:
    return {(row["split"], row["id"]): row for row in rows}


def _greedy_is_right(row: JudgedRow) -> bool:
    """Tell whether a row's greedy answer is right, whichever answer was chosen."""
    greedy = row.get("ways", {}).get("greedy")
    return is_right(row) if greedy is None else bool(greedy["right"])
