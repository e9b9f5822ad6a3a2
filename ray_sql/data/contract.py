"""State what an adapter was trained for, and refuse it for anything else.

All that a prompt depends on is written to `contract.json` beside the adapter and compared before
the adapter is used. Prompt drift between training and inference is the most frequent complaint in
this field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ray_sql import __version__
from ray_sql.config import Config
from ray_sql.config.sections import NO_VALUES
from ray_sql.data import chat, prompts
from ray_sql.data.value_index import VALUES_VERSION
from ray_sql.database import SERIALIZER_VERSION, Schema
from ray_sql.errors import ContractError
from ray_sql.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTRACT_PACKAGES = ("transformers", "trl", "peft", "bitsandbytes", "torch", "sqlglot")


def make_contract(
    config: Config, tokenizer: PreTrainedTokenizerBase, model_revision: str | None
) -> dict[str, Any]:
    """Return, as JSON values, all that an answer depends on besides the weights.

    It is written as `contract.json` beside the adapter. It records settings of six sections, so it
    takes the whole tree.
    """
    template = chat.template_of(tokenizer)
    writer = chat.Chat(tokenizer, config.prompt.thinking)
    dated = {"date": chat.DATE.isoformat()} if chat.TODAY.search(template) else {}
    task = TASKS[config.task_type]
    told: dict[str, str] = {}
    if writer.way.mends:  # before it was found, the same template wrote another prompt
        told |= {"way": writer.way.name}
    text = json.dumps(
        [task.system, prompts.USER, prompts.EVIDENCE, template, *dated.values(), *told.values()]
    )
    more: dict[str, Any] = {}
    if config.prompt.description_chars:
        more["description_chars"] = config.prompt.description_chars
    if config.prompt.values != NO_VALUES:
        more["values"] = {
            "text": prompts.VALUES,
            "top": config.prompt.values_top,
            "without": sorted(config.prompt.values_without),
            "version": VALUES_VERSION,
        }
    thinking: dict[str, str] = {}
    if writer.can_think:
        thinking = {"thinking": config.prompt.thinking}
        told |= {"thinking_default": writer.default, "prompt_end": writer.prompt_end}
    return {
        "task_type": config.task_type,
        "model_name": config.model_name,
        "model_revision": model_revision,
        "quantization": config.quantization.model_dump(),
        "template": {
            "system": task.system,
            "user": prompts.USER,
            "evidence": prompts.EVIDENCE,
            "turns": writer.turns,
            **dated,
            **told,
        },
        "template_hash": _hash(text),
        **thinking,
        "serializer": {"name": config.prompt.serializer, "version": SERIALIZER_VERSION},
        "schema_form": config.prompt.schema_form,
        "example_values": config.prompt.example_values,
        **more,
        "columns": config.data.columns,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "max_length": config.rows.max_length,
        "answer_format": f"fenced {task.fence}",
        "semantics": config.evaluate.semantics,
        "answers": config.evaluate.model_dump(include=ANSWERS),
        "packages": {"ray_sql": __version__}
        | {package: version(package) for package in CONTRACT_PACKAGES},
    }


ANSWERS = {"num_beams", "samples", "temperature", "top_p", "ground", "choose", "first_executable"}
"""Settings that say how the scored answers were got."""
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
"""Contract fields that must be equal where an adapter is used; the rest explain a difference.

`thinking` is one more for models that think, `values` for prompts with cells, and
`description_chars` for those with descriptions.
"""


def check_contract(saved: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Raise `ContractError` at the first binding field that differs from the adapter at `where`.

    An adapter of a version that knew no thinking was trained for what its template does untold.
    """
    untold = current.get("template", {}).get("thinking_default")
    unsaid = {"values": NO_VALUES, "description_chars": 0}
    saved, current = {"thinking": untold, **unsaid, **saved}, {**unsaid, **current}
    for name in (*BINDING, "thinking", *unsaid):
        if saved.get(name) != current.get(name):
            raise ContractError(
                f"{where}: the adapter was trained with {name} {saved.get(name)!r}, but this run "
                f"has {current.get(name)!r}; give it the settings it was trained with (--config "
                "and its ray_sql_config.json), or train it again"
            )


def described(schemas: Mapping[str, Schema]) -> dict[str, str]:
    """Return 12 hex digits of each database's descriptions, for `described` of a contract."""
    return {db_id: _hash(json.dumps(_described(schema))) for db_id, schema in schemas.items()}


def _described(schema: Schema) -> list[Any]:
    return [
        [table.name, table.description, [[one.name, one.description] for one in table.columns]]
        for table in schema.tables
        if table.is_described
    ]


def check_described(saved: Mapping[str, Any], schemas: Mapping[str, Schema], where: str) -> None:
    """Raise `ContractError` for a database that was described otherwise to the adapter at `where`.

    Databases that it does not know may be described in any way.
    """
    known = saved.get("described", {})
    for db_id, digest in described(schemas).items():
        if known.get(db_id, digest) != digest:
            raise ContractError(
                f"{where}: the adapter was trained with other descriptions of {db_id}; restore "
                "them (descriptions.yaml, CSV files or the server's comments), or train it again"
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
