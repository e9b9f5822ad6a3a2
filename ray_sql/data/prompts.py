"""Example → prompt and completion, model answer → SQL or links, and the contract that keeps the two sides equal.

A prompt puts the schema first and the question last, so that the questions on one database share a prefix. Training,
evaluation and serving all render through `render_prompt`; what it depends on is written down in `contract.json` beside the adapter and
compared before the adapter is used (prompt drift between training and inference is this field's most frequent complaint).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from ray_sql import __version__
from ray_sql.config import Config
from ray_sql.data import Example, linking
from ray_sql.database import SERIALIZER_VERSION, Links, Schema, render, restrict
from ray_sql.errors import ContractError, DataError
from ray_sql.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER = "Schema:\n{schema}\n\n{evidence}Question: {question}"
EVIDENCE = "Hint: {evidence}\n"

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)
"""For base models that come without a chat template."""

DATE = date(2024, 7, 26)
"""Today, for templates that write it into the prompt: what Llama's says where it is told none."""
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

CONTRACT_PACKAGES = ("transformers", "trl", "peft", "bitsandbytes", "torch", "sqlglot")


def schema_text(example: Example, schemas: Mapping[str, Schema], config: Config) -> str:
    """The schema as the prompt shows it: the dataset's own text where it brings one, else rendered as `config.prompt` says."""
    if example.schema_text:
        return example.schema_text
    return render(shown_schema(example, schemas, config), config.prompt.serializer)


def shown_schema(example: Example, schemas: Mapping[str, Schema], config: Config) -> Schema:
    """The part of the example's schema that `prompt.schema_form` shows. Raises `LinkError` if its SQL cannot be linked."""
    schema = schemas[example.db_id]
    if config.prompt.schema_form == "full":
        return schema
    return restrict(schema, linking.gold_links(example.gold, schema), config.prompt.schema_form)


def messages(task: Task, schema: str, question: str, evidence: str = "") -> list[dict[str, str]]:
    """The system and user turn of one question."""
    hint = EVIDENCE.format(evidence=evidence) if evidence else ""
    content = USER.format(schema=schema, evidence=hint, question=question)
    return [{"role": "system", "content": task.system}, {"role": "user", "content": content}]


def answer(task: Task, example: Example, schemas: Mapping[str, Schema]) -> str:
    """What the model should say: the gold SQL, or its links, in a fenced block. Raises `LinkError` if SQL cannot be linked."""
    body = (
        one_line(example.gold)
        if task.executes_sql
        else linking.format_links(gold_links(example, schemas))
    )
    return f"```{task.fence}\n{body}\n```"


def gold_links(example: Example, schemas: Mapping[str, Schema]) -> Links:
    """The dataset's own links where it brings them, else those of the gold SQL."""
    if example.links_text is None:
        if example.db_id not in schemas:
            raise DataError(
                f"example {example.id}: no schema of {example.db_id} to find links in; name the databases with --data.databases"
            )
        return linking.gold_links(example.gold, schemas[example.db_id])
    links = linking.parse_links(example.links_text) or linking.parse_python_literal(
        example.links_text
    )
    if links is None:
        raise DataError(
            f"example {example.id}: links are neither JSON nor a Python literal: {example.links_text[:80]!r}"
        )
    return links


def render_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """The text a model reads, ending where its answer begins, in the model's own chat template."""
    return _render(tokenizer, turns, add_generation_prompt=True)


def render_completion(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], text: str
) -> str:
    """The text a model should add to `render_prompt`: the answer and whatever its template ends a turn with."""
    prompt = render_prompt(tokenizer, turns)
    whole = _render(
        tokenizer, [*turns, {"role": "assistant", "content": text}], add_generation_prompt=False
    )
    if tokenizer.chat_template and whole.startswith(prompt + text):
        ending = whole[len(prompt + text) :].rstrip()
        return text + (ending or tokenizer.eos_token)
    return text + str(
        tokenizer.eos_token
    )  # templates that rewrite earlier turns, and models without a template


def template_turns(
    tokenizer: PreTrainedTokenizerBase,
) -> Literal["system and user", "user", "plain"]:
    """How the system and user text reach the model: as two turns of its chat template, as one, or as plain paragraphs without one."""
    if not tokenizer.chat_template:
        return "plain"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    merged = [{"role": "user", "content": "s\n\nu"}]
    return (
        "user"
        if render_prompt(tokenizer, turns) == render_prompt(tokenizer, merged)
        else "system and user"
    )


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    from jinja2.exceptions import TemplateError

    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    template = _dated(template_of(tokenizer))
    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, **options))
    except TemplateError:  # Gemma's and others' templates know no system turn
        system, user, *rest = turns
        merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        return str(
            tokenizer.apply_chat_template([merged, *rest], chat_template=template, **options)
        )


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template (the default one of several), or the plain one."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else PLAIN_TEMPLATE


def _dated(template: str) -> str:
    """A template that writes `DATE` where it would write today's: a prompt must read the same whenever it is trained on or asked."""
    return _TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)


def parse_sql(text: str) -> str | None:
    """The SQL in a model's answer: its fenced block if it has one, else its first statement; None if there is none."""
    block = re.search(
        r"```(?:(?!(?:select|with|values)\b)[a-z]*[ \t]*\n|sql(?:ite)?\b)?(.*?)(?:```|\Z)",
        text,
        re.DOTALL | re.IGNORECASE,
    )
    body = block.group(1) if block else text
    if not block and (
        start := re.search(r"\b(?:SELECT|WITH|VALUES)\b", body)
        or re.search(r"(?i)\bselect\b", body)
    ):
        body = body[start.start() :].split("\n\n")[0]
    return _first_statement(one_line(body)) or None


_PIECE = re.compile(
    r"""('[^']*'?|"[^"]*"?|`[^`]*`?)|(?:--[^\n]*|/\*.*?(?:\*/|\Z)|\s)+|(;)""", re.DOTALL
)
"""Of SQL: what is in quotes (1), a run of comments and white space, or a semicolon (2)."""


def one_line(sql: str) -> str:
    """SQL without line breaks and comments, which would hide the rest of the line; what is in quotes stays as it is."""
    return _PIECE.sub(lambda piece: piece[1] or piece[2] or " ", sql).strip()


def _first_statement(sql: str) -> str:
    """Up to the first semicolon that is outside quotes."""
    end = next((piece.start() for piece in _PIECE.finditer(sql) if piece[2]), len(sql))
    return sql[:end].strip()


def contract(
    config: Config, tokenizer: PreTrainedTokenizerBase, model_revision: str | None
) -> dict[str, Any]:
    """Everything an answer depends on besides the weights; JSON, written as `contract.json` beside the adapter."""
    template = template_of(tokenizer)
    dated = {"date": DATE.isoformat()} if _TODAY.search(template) else {}
    task = TASKS[config.task_type]
    text = json.dumps([task.system, USER, EVIDENCE, template, *dated.values()])
    return {
        "task_type": config.task_type,
        "model_name": config.model_name,
        "model_revision": model_revision,
        "quantization": config.quantization.model_dump(),
        "template": {
            "system": task.system,
            "user": USER,
            "evidence": EVIDENCE,
            "turns": template_turns(tokenizer),
            **dated,
        },
        "template_hash": _hash(text),
        "serializer": {"name": config.prompt.serializer, "version": SERIALIZER_VERSION},
        "schema_form": config.prompt.schema_form,
        "example_values": config.prompt.example_values,
        "columns": config.data.columns,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "max_length": config.rows.max_length,
        "answer_format": f"fenced {task.fence}",
        "semantics": config.evaluate.semantics,
        "packages": {"ray_sql": __version__}
        | {package: version(package) for package in CONTRACT_PACKAGES},
    }


BINDING = (
    "task_type",
    "model_name",
    "quantization",
    "template_hash",
    "serializer",
    "schema_form",
    "example_values",
    "tokenizer_hash",
)
"""Contract fields that must be equal where an adapter is used; the rest is recorded so that a difference can be explained."""


def check_contract(saved: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Raise `ContractError` naming the first binding field in which the adapter at `where` differs from the current settings."""
    for name in BINDING:
        if saved.get(name) != current.get(name):
            raise ContractError(
                f"{where}: the adapter was trained with {name} {saved.get(name)!r}, but this run has {current.get(name)!r}; "
                "give it the settings it was trained with (--config and its config.json), or train it again"
            )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """12 hex digits of the vocabulary, the special tokens and the way a probe text is cut."""
    probe = tokenizer(
        "SELECT name, count(*) FROM singer WHERE año >= 1.5;\n", add_special_tokens=False
    )["input_ids"]
    return _hash(
        json.dumps(
            [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, probe], ensure_ascii=False
        )
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
