"""Rows that hold a whole prompt or a dialogue: Alpaca, chat messages, prompt and completion, SParC.

Each is taken apart into the columns that the rest reads: `question`, `query` and `schema`. The
schema is the text with CREATE TABLE, verbatim. The columns taken are said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_sql.data.formats import Record
from ray_sql.data.schema_texts import CREATES, statement_spans

_LABEL = re.compile(r"(?im)^[ \t#*-]*(?:the\s+|user\s+)*(?:question|request)\b[^\n:]{0,20}:[ \t*]*")
_ANSWER = re.compile(
    r"(?im)^[ \t#*-]*"
    r"(?:response|answer|output|sql(?:\s*query)?|(?:database\s+)?schema|tables|context)"
    r"\s*:|^[ \t]*#"
)
_DIVIDED = "; the part with CREATE TABLE is the schema"

Values = Mapping[str, Any]


def unfold(records: Sequence[Record]) -> tuple[list[Record], str]:
    """Return the records with plain columns, and what was done in words; "" for plain records."""
    names = {name for record in records for name in record.values}
    if names & {"query", "SQL", "sql"} or {"question", "answer"} <= names:
        return list(records), ""
    for needed, take, words in SHAPES:
        if needed <= names:
            return [_taken(record, take) for record in records], words
    return list(records), ""


def _taken(record: Record, take: Callable[[Values], Values]) -> Record:
    """Return a record with the plain columns beside its own; its fault is why there are none."""
    try:
        taken = {name: value for name, value in take(record.values).items() if value}
    except ValueError as error:
        return replace(record, fault=str(error))
    return replace(record, values={**record.values, **taken})


def _interaction(values: Values) -> Values:
    """Take the final question of a dialogue, which stands alone."""
    final = values.get("final")
    if not isinstance(final, dict):
        raise ValueError("has no final question")
    return {"question": final.get("utterance"), "query": final.get("query")}


def _alpaca(values: Values) -> Values:
    """Take the text with CREATE TABLE for the schema, and the other for the question."""
    if _has_turns(values.get("history")):
        raise ValueError("has a history, and a later question needs what was said before")
    system, instruction, given = (
        _plain(values.get(name)) for name in ("system", "instruction", "input")
    )
    if CREATES.search(system):
        return _prompt(system, f"{instruction}\n{given}".strip()) | {"query": values.get("output")}
    return _prompt(instruction, given) | {"query": values.get("output")}


def _completion(values: Values) -> Values:
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        return _turns([*_as_list(prompt), *_as_list(completion)], values)
    return _prompt(_plain(values.get("system")), _plain(prompt)) | {"query": completion}


def _messages(values: Values) -> Values:
    return _turns(values.get("messages"), values)


def _conversations(values: Values) -> Values:
    return _turns(values.get("conversations"), values)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _turns(turns: Any, values: Values) -> Values:
    """Take the last answer of a chat, its question, and what the system says in it or beside."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("holds no list of turns")
    said = [_turn(turn) for turn in turns]
    answers = [index for index, (who, _) in enumerate(said) if who == "assistant"]
    if not answers or not answers[-1] or said[answers[-1] - 1][0] != "user":
        raise ValueError("has no answer of the assistant to a question of the user")
    if len(answers) > 1:
        raise ValueError("has several answers, and a later question needs what was said before")
    query = said[answers[-1]][1]
    if not query.strip():
        raise ValueError("has an answer without text, such as a call of a tool")
    beside = [_plain(values.get("system"))]
    system = "\n".join(beside + [text for who, text in said if who in ("system", "developer")])
    return _prompt(system.strip(), said[answers[-1] - 1][1]) | {"query": query}


def _turn(turn: Mapping[str, Any]) -> tuple[str, str]:
    """Return who speaks and the text, in OpenAI's words or in ShareGPT's."""
    who = str(turn.get("role", turn.get("from", "")))
    names = {"human": "user", "gpt": "assistant", "model": "assistant"}
    return names.get(who, who), _plain(turn.get("content", turn.get("value")))


def _has_turns(history: Any) -> bool:
    """Tell whether a history holds anything that was said."""
    return any(map(_has_turns, history)) if isinstance(history, list) else bool(history)


def _plain(value: Any) -> str:
    """Return a text, or the texts of a message in parts; "" for anything else."""
    if isinstance(value, list):
        return "".join(_plain(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""


def _prompt(first: str, second: str) -> dict[str, Any]:
    """Return question and schema of a prompt in one or two parts.

    A part with CREATE TABLE is the schema and the other one the question. Where the last part holds
    both, the schema reaches from its first statement to the question. Without CREATE TABLE it is
    all before the question's label, or a first part that speaks of tables.
    """
    parts = [text for text in (first, second) if text.strip()]
    if not parts:
        return {}
    text = parts[-1]
    if len(parts) == 2 and CREATES.search(first) and not CREATES.search(text):
        return {"question": _question(text), "schema": first}
    spans = statement_spans(text)
    labels = list(_LABEL.finditer(text))
    if spans:
        start, end = spans[0][0], spans[-1][1]
        asked = _question(text[end:])
        if asked:
            last = labels[-1].start() if labels else 0
            return {"question": asked, "schema": text[start : max(end, last)].strip()}
        asked = _question(text[:start])
        if len(parts) == 2 and not labels and "?" not in asked:
            return {"question": first, "schema": text}
        return {"question": asked, "schema": text[start:end]}
    before = text[: labels[-1].start()].strip() if labels else ""
    if not before and len(parts) == 2 and "table" in first.lower():
        before = first
    return {"question": _question(text), "schema": before}


def _question(text: str) -> str:
    """Return the question in the text around a schema: behind its label, before the next one."""
    labels = list(_LABEL.finditer(text))
    if labels:
        text = text[labels[-1].end() :]
    return _ANSWER.split(text)[0].strip(" \t\r\n;")


SHAPES: Sequence[tuple[set[str], Callable[[Values], Values], str]] = (
    (
        {"interaction", "final"},
        _interaction,
        "dialogues: the final question of each, which stands alone; the turns before it do not",
    ),
    ({"instruction", "output"}, _alpaca, f"question and schema ← instruction, input{_DIVIDED}"),
    ({"messages"}, _messages, f"question and schema ← messages{_DIVIDED}"),
    ({"conversations"}, _conversations, f"question and schema ← conversations{_DIVIDED}"),
    ({"prompt", "completion"}, _completion, f"question and schema ← prompt{_DIVIDED}"),
)
"""Columns that tell a shape → how it is taken apart, and what is said of it."""
