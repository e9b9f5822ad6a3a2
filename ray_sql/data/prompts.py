"""Write prompts and completions, read answers, and state the contract that keeps both equal.

A prompt puts the schema first and the question last, so that questions on one database share a
prefix. Training, evaluation and serving all render through `render_prompt`. Its inputs are written
to `contract.json` beside the adapter and compared before the adapter is used. Prompt drift between
training and inference is the most frequent complaint in this field.
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
from ray_sql.config.sections import PromptSection
from ray_sql.data import Example, linking
from ray_sql.database import SERIALIZER_VERSION, Form, Links, Schema, render, restrict
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
"""The date for templates that write today's: Llama's own default."""
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

CONTRACT_PACKAGES = ("transformers", "trl", "peft", "bitsandbytes", "torch", "sqlglot")


def schema_text(example: Example, schemas: Mapping[str, Schema], prompt: PromptSection) -> str:
    """Return the schema as the prompt shows it: the dataset's own text, or else our rendering."""
    if example.schema_text:
        return example.schema_text
    return render(shown_schema(example, schemas, prompt.schema_form), prompt.serializer)


def shown_schema(example: Example, schemas: Mapping[str, Schema], form: Form) -> Schema:
    """Return the part of the example's schema that a prompt shows.

    Raises:
        LinkError: `form` needs the links of the gold SQL, which cannot be found.
    """
    schema = schemas[example.db_id]
    if form == "full":
        return schema
    return restrict(schema, linking.gold_links(example.gold, schema), form)


def messages(task: Task, schema: str, question: str, evidence: str = "") -> list[dict[str, str]]:
    """Return the system and the user turn of one question."""
    hint = EVIDENCE.format(evidence=evidence) if evidence else ""
    content = USER.format(schema=schema, evidence=hint, question=question)
    return [{"role": "system", "content": task.system}, {"role": "user", "content": content}]


def answer(task: Task, example: Example, schemas: Mapping[str, Schema]) -> str:
    """Return the expected answer: the gold SQL, or its links, in a fenced block.

    Raises:
        LinkError: the task needs links, and those of the gold SQL cannot be found.
    """
    body = one_line(example.gold)
    if not task.executes_sql:
        body = linking.format_links(gold_links(example, schemas))
    return f"```{task.fence}\n{body}\n```"


def gold_links(example: Example, schemas: Mapping[str, Schema]) -> Links:
    """Return the dataset's own links, or else those of the gold SQL.

    Raises:
        DataError: the schema is missing, or the dataset's links cannot be read.
        LinkError: the gold SQL cannot be linked.
    """
    text = example.links_text
    if text is None:
        if example.db_id not in schemas:
            raise DataError(
                f"example {example.id}: no schema of {example.db_id} to find links in; name the "
                "databases with --data.databases"
            )
        return linking.gold_links(example.gold, schemas[example.db_id])
    links = linking.parse_links(text) or linking.parse_python_literal(text)
    if links is None:
        raise DataError(
            f"example {example.id}: links are neither JSON nor a Python literal: {text[:80]!r}"
        )
    return links


def render_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """Return the text that a model reads, in its chat template, up to where its answer begins."""
    return _render(tokenizer, turns, add_generation_prompt=True)


def render_completion(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], text: str
) -> str:
    """Return the text to follow `render_prompt`: the answer and the template's end of turn."""
    prompt = render_prompt(tokenizer, turns)
    with_answer = [*turns, {"role": "assistant", "content": text}]
    conversation = _render(tokenizer, with_answer, add_generation_prompt=False)
    if tokenizer.chat_template and conversation.startswith(prompt + text):
        ending = conversation[len(prompt + text) :].rstrip()
        return text + (ending or tokenizer.eos_token)
    # Without a template, or with one that rewrites earlier turns.
    return text + str(tokenizer.eos_token)


def template_turns(
    tokenizer: PreTrainedTokenizerBase,
) -> Literal["system and user", "user", "plain"]:
    """Tell how a prompt reaches the model: as two turns, as one, or as plain paragraphs.

    It is plain without a chat template.
    """
    if not tokenizer.chat_template:
        return "plain"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    merged = [{"role": "user", "content": "s\n\nu"}]
    is_merged = render_prompt(tokenizer, turns) == render_prompt(tokenizer, merged)
    return "user" if is_merged else "system and user"


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    from jinja2.exceptions import TemplateError

    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    template = _dated(template_of(tokenizer))
    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, **options))
    except TemplateError:  # Some templates, Gemma's for one, know no system turn.
        system, user, *rest = turns
        merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        return str(
            tokenizer.apply_chat_template([merged, *rest], chat_template=template, **options)
        )


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template (the default one of several), or the plain one."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else PLAIN_TEMPLATE


def _dated(template: str) -> str:
    """Put `DATE` where the template writes today's: a prompt must read the same on every day."""
    return _TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)


def parse_sql(text: str) -> str | None:
    """Return the SQL in a model's answer: its fenced block, or else its first statement.

    None means that there is none.
    """
    block = re.search(
        r"```(?:(?!(?:select|with|values)\b)[a-z]*[ \t]*\n|sql(?:ite)?\b)?(.*?)(?:```|\Z)",
        text,
        re.DOTALL | re.IGNORECASE,
    )
    if block:
        return _first_statement(one_line(block[1])) or None
    # SQL's words in capitals first: in lower case they are English too.
    for pattern in (r"\b(?:SELECT|WITH|VALUES)\b", r"(?i)\bselect\b"):
        start = re.search(pattern, text)
        if start:
            text = text[start.start() :].split("\n\n")[0]
            break
    return _first_statement(one_line(text)) or None


_PIECE = re.compile(
    r"""('[^']*'?|"[^"]*"?|`[^`]*`?)|(?:--[^\n]*|/\*.*?(?:\*/|\Z)|\s)+|(;)""", re.DOTALL
)
"""A piece of SQL: quoted text (group 1), a run of comments and white space, or a semicolon (2)."""


def one_line(sql: str) -> str:
    """Return SQL without line breaks and comments outside quotes.

    On one line, a comment would hide the rest.
    """
    return _PIECE.sub(lambda piece: piece[1] or piece[2] or " ", sql).strip()


def _first_statement(sql: str) -> str:
    """Return the text before the first semicolon outside quotes."""
    for piece in _PIECE.finditer(sql):
        if piece[2]:
            return sql[: piece.start()].strip()
    return sql.strip()


def contract(
    config: Config, tokenizer: PreTrainedTokenizerBase, model_revision: str | None
) -> dict[str, Any]:
    """Return, as JSON values, all that an answer depends on besides the weights.

    It is written as `contract.json` beside the adapter. It records settings of six sections, so it
    takes the whole tree.
    """
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
"""Contract fields that must be equal where an adapter is used; the rest explain a difference."""


def check_contract(saved: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Raise `ContractError` at the first binding field that differs from the adapter at `where`."""
    for name in BINDING:
        if saved.get(name) != current.get(name):
            raise ContractError(
                f"{where}: the adapter was trained with {name} {saved.get(name)!r}, but this run "
                f"has {current.get(name)!r}; give it the settings it was trained with (--config "
                "and its config.json), or train it again"
            )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 12 hex digits of the vocabulary, the end token and the tokens of a probe text."""
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
