"""A row is the prompt that generation sees and the answer, with loss on the answer only.

Nothing is cut silently, and no row is stale.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, generate, rows
from ray_sql.config import Config
from ray_sql.data import Corpus, Example, prompts
from ray_sql.database import Schema
from ray_sql.errors import DataError
from ray_sql.finetune.prepare import Prepared
from ray_sql.models import load_tokenizer
from ray_sql.rows import Audit
from ray_sql.tasks import SQL, TASKS
from tests.conftest import QUESTIONS, make_encoder

UNLINKABLE = Example("broken", "shop", "Who?", "SELECT name FROM nowhere")


def build(examples: Any, schemas: Any, tokenizer: Any, config: Any) -> Any:
    return rows.build(examples, make_encoder(tokenizer, config, schemas), config.rows)


def prepare(examples: Any, schemas: Any, tokenizer: Any, config: Any) -> Any:
    encoder = make_encoder(tokenizer, config, schemas)
    return rows.prepare(examples, encoder, config.rows, config.cache)


def cache_key(examples: Any, schemas: Any, tokenizer: Any, config: Any) -> str:
    return rows.cache_key(examples, make_encoder(tokenizer, config, schemas), config.rows)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def corpus(make_config: Any) -> Corpus:
    return data.load(make_config())


def lengths_of(corpus: Corpus, tokenizer: Any, config: Config) -> list[int]:
    made, _ = build(corpus.splits["train"], corpus.schemas, tokenizer, config)
    return [len(row.input_ids) for row in made]


@pytest.mark.parametrize("task", ["sql", "schema"])
def test_the_loss_is_on_exactly_the_completion(
    corpus: Corpus, tokenizer: Any, make_config: Any, tmp_path: Path, task: str
) -> None:
    config, examples = make_config(task_type=task), corpus.splits["train"]
    made, _ = build(examples, corpus.schemas, tokenizer, config)
    rows.write(made, tmp_path / "rows.parquet")
    read = rows.read(tmp_path / "rows.parquet")
    assert len(read) == len(examples)
    for row, example in zip(read, examples, strict=True):
        learned = [label for label in row.labels if label != -100]
        assert len(row.labels) == len(row.input_ids) and row.labels[-len(learned) :] == learned
        assert (
            tokenizer.decode(learned)
            == prompts.answer(TASKS[config.task_type], example, corpus.schemas) + "<|end|>"
        )


@pytest.mark.parametrize("task", ["sql", "schema"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_rows_prompt_is_what_generation_reads(
    corpus: Corpus, tokenizer: Any, make_config: Any, task: str, chat: bool
) -> None:
    config = make_config(task_type=task)
    if not chat:
        tokenizer.chat_template = None
    asked = generate.make_questions(
        corpus.splits["train"], "train", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    for example, question in zip(corpus.splits["train"], asked, strict=True):
        row = make_encoder(tokenizer, config, corpus.schemas).encode(example)
        assert row.input_ids[: row.prompt_length] == question.input_ids


def test_rows_keep_the_order_and_the_audit_counts_their_tokens(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    examples = corpus.splits["train"]
    made, audit = build(examples, corpus.schemas, tokenizer, make_config())
    lengths = sorted(len(row.input_ids) for row in made)
    assert [row.id for row in made] == [example.id for example in examples]
    assert (audit.examples, audit.rows, audit.tokens, audit.longest) == (
        22,
        22,
        sum(lengths),
        lengths[-1],
    )
    assert audit.completion_tokens == sum(len(row.input_ids) - row.prompt_length for row in made)
    assert lengths[9] <= audit.p50 <= lengths[12] and audit.p50 <= audit.p90 <= audit.longest
    assert audit.too_long == audit.trimmed == audit.dropped == 0 and not audit.unlinkable


def test_a_row_that_is_too_long_is_refused_with_the_numbers_and_the_way_out(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    longest = max(lengths_of(corpus, tokenizer, make_config()))
    examples, schemas = corpus.splits["train"], corpus.schemas
    with pytest.raises(DataError) as caught:
        prepare(examples, schemas, tokenizer, make_config(**{"rows.max_length": longest - 3}))
    message = str(caught.value)
    assert (
        f"are over --rows.max_length {longest - 3}, the longest has {longest} tokens" in message
        and "\n" not in message
    )
    assert "--rows.too_long trim_schema or drop" in message
    assert (
        max(lengths_of(corpus, tokenizer, make_config(**{"rows.max_length": longest}))) == longest
    )


def test_rows_that_are_too_long_can_be_dropped_and_are_counted(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    lengths = lengths_of(corpus, tokenizer, make_config())
    limit = sorted(lengths)[len(lengths) // 2]
    config = make_config(**{"rows.max_length": limit, "rows.too_long": "drop"})
    made, audit = build(corpus.splits["train"], corpus.schemas, tokenizer, config)
    fitting = [length for length in lengths if length <= limit]
    assert [len(row.input_ids) for row in made] == fitting
    assert audit.too_long == audit.dropped == len(lengths) - len(fitting) > 0 and audit.trimmed == 0
    assert audit.longest == max(lengths)
    assert f"{audit.dropped} dropped" in audit.line()


def test_trimming_leaves_out_only_tables_that_the_sql_does_not_use(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    whole = {
        row.id: row
        for row in build(corpus.splits["train"], corpus.schemas, tokenizer, make_config())[0]
    }
    limit = min(len(row.input_ids) for row in whole.values()) - 1  # every row must lose a table
    example = Example("two tables", "shop", *QUESTIONS[-1])
    config = make_config(**{"rows.max_length": limit + 30, "rows.too_long": "trim_schema"})
    examples = [*corpus.splits["train"], example]
    made, audit = build(examples, corpus.schemas, tokenizer, config)
    assert audit.trimmed == audit.too_long > 0 == audit.dropped
    for row, one in zip(made, examples, strict=True):
        prompt, said = (
            tokenizer.decode(ids)
            for ids in (row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :])
        )
        assert len(row.input_ids) <= limit + 30
        assert f"Question: {one.question}<|end|>" in prompt
        assert said == prompts.answer(SQL, one, corpus.schemas) + "<|end|>"
        schema = prompt.partition("Schema:\n")[2].partition("\n\nQuestion")[0]
        shown = {line.partition("(")[0] for line in schema.splitlines()}
        assert {
            table for table in ("customer", "product", "sale") if f" {table}" in one.gold
        } <= shown


def test_trimming_that_cannot_help_is_refused(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    config = make_config(**{"rows.max_length": 20, "rows.too_long": "trim_schema"})
    with pytest.raises(
        DataError, match=r"even with only the tables its SQL uses .*--rows.too_long drop"
    ):
        lengths_of(corpus, tokenizer, config)
    own = [replace(corpus.splits["train"][0], schema_text="customer(id, name)" * 9)]
    with pytest.raises(DataError, match="its schema is a text of the dataset"):
        build(own, corpus.schemas, tokenizer, config)


def test_trimming_never_brings_back_what_the_schema_form_left_out(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    example = Example("0", "shop", "Who?", "SELECT name FROM customer")
    form = {"prompt.schema_form": "reduced", "rows.too_long": "trim_schema"}
    length = len(
        make_encoder(tokenizer, make_config(**form), corpus.schemas).encode(example).input_ids
    )
    with pytest.raises(DataError, match="even with only the tables its SQL uses"):
        build(
            [example],
            corpus.schemas,
            tokenizer,
            make_config(**form, **{"rows.max_length": length - 1}),
        )


@pytest.mark.parametrize(
    "settings", [{"task_type": "schema"}, {"rows.max_length": 30, "rows.too_long": "trim_schema"}]
)
def test_an_example_without_links_is_left_out_and_named(
    corpus: Corpus, tokenizer: Any, make_config: Any, settings: dict[str, Any]
) -> None:
    fits = Example("fits", "shop", "?", "SELECT 1 FROM sale", schema_text="")
    config = make_config(**settings)
    if config.task_type == "sql":
        config = make_config(
            **settings | {"rows.max_length": len(_only_sale(fits, corpus, tokenizer, config))}
        )
    made, audit = build([UNLINKABLE, fits], corpus.schemas, tokenizer, config)
    assert [row.id for row in made] == ["fits"] and audit.unlinkable == ["broken"]
    assert (audit.examples, audit.rows) == (2, 1) and "1 left out because" in audit.line()


def _only_sale(example: Example, corpus: Corpus, tokenizer: Any, config: Config) -> list[int]:
    schema = corpus.schemas["shop"]
    sale = Schema("shop", tuple(one for one in schema.tables if one.name == "sale"), unshown=2)
    return make_encoder(tokenizer, config, {"shop": sale}).encode(example).input_ids


def test_no_rows_at_all_are_refused(corpus: Corpus, tokenizer: Any, make_config: Any) -> None:
    with pytest.raises(DataError, match=r"none of 1 examples could be used \(1 cannot be linked\)"):
        prepare([UNLINKABLE], corpus.schemas, tokenizer, make_config(task_type="schema"))


def test_validation_examples_that_could_not_be_trained_on_have_no_part_in_the_loss(
    corpus: Corpus, tokenizer: Any, make_config: Any, tmp_path: Path
) -> None:
    config = make_config(**{"prompt.schema_form": "reduced"})
    fitting = corpus.splits["validation"]
    splits = {**corpus.splits, "validation": [UNLINKABLE, *fitting]}
    audit = Audit(*[0] * 9, "error")
    prepared = Prepared(
        config,
        replace(corpus, splits=splits),
        config.model_name,
        tokenizer,
        tmp_path,
        audit,
        {},
        [],
    )
    assert {question.id for question in prepared.validation()} == {
        "broken",
        *(e.id for e in fitting),
    }
    assert {row.id for row in prepared.validation_rows()} == {example.id for example in fitting}
    assert not replace(prepared, config=config.changed({"rows.max_length": 16})).validation_rows()


# The cache


def test_the_same_content_is_made_once(corpus: Corpus, tokenizer: Any, make_config: Any) -> None:
    examples, config = corpus.splits["train"], make_config()
    first, audit = prepare(examples, corpus.schemas, tokenizer, config)
    stamp = first.stat().st_mtime_ns
    again = make_config(
        seed=9, **{"lora.r": 8, "learning_rate": 1, "train_batch_size": 4, "output_name": "other"}
    )
    second, same = prepare(examples, corpus.schemas, load_tokenizer(again.model_name), again)
    assert (first, stamp, audit) == (second, second.stat().st_mtime_ns, same)
    assert [
        file.suffix for file in first.parent.iterdir() if file.suffix not in (".json", ".parquet")
    ] == []


def changed_question(corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    return {
        "examples": [
            replace(corpus.splits["train"][0], question="Another?"),
            *corpus.splits["train"][1:],
        ]
    }


def changed_schema(corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    return {
        "schemas": {
            k: Schema(k, s.tables[:-1] if k == "shop" else s.tables)
            for k, s in corpus.schemas.items()
        }
    }


def changed_tokenizer(corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    tokenizer.add_tokens(["SELECT COUNT"])
    return {}


def changed_chat_template(corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    return {}


@pytest.mark.parametrize(
    "change", [changed_question, changed_schema, changed_tokenizer, changed_chat_template]
)
def test_changed_content_makes_other_rows(
    corpus: Corpus,
    tokenizer: Any,
    make_config: Any,
    change: Callable[[Corpus, Any], dict[str, Any]],
) -> None:
    given: dict[str, Any] = {"examples": corpus.splits["train"], "schemas": corpus.schemas}
    first = cache_key(**given, tokenizer=tokenizer, config=make_config())
    assert cache_key(**given, tokenizer=tokenizer, config=make_config()) == first
    given |= change(corpus, tokenizer)
    assert cache_key(**given, tokenizer=tokenizer, config=make_config()) != first


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt.serializer": "ddl"},
        {"rows.max_length": 999},
        {"rows.too_long": "drop"},
        {"prompt.schema_form": "tables"},
    ],
)
def test_changed_settings_make_other_rows(
    corpus: Corpus, tokenizer: Any, make_config: Any, settings: dict[str, Any]
) -> None:
    keys = {
        cache_key(corpus.splits["train"], corpus.schemas, tokenizer, make_config(**changes))
        for changes in ({}, settings, {"task_type": "schema"})
    }
    assert len(keys) == 3


@pytest.mark.parametrize("text", ["USER", "EVIDENCE", "system"])
def test_an_edited_template_makes_other_rows(
    corpus: Corpus, tokenizer: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    examples, config = corpus.splits["train"], make_config()
    before, _ = prepare(examples, corpus.schemas, tokenizer, config)
    if text == "system":
        monkeypatch.setitem(TASKS, "sql", replace(SQL, system="Write SQL."))  # type: ignore[misc]
    else:
        monkeypatch.setattr(prompts, text, f"{getattr(prompts, text)} ")
    after, _ = prepare(examples, corpus.schemas, tokenizer, config)
    assert before != after
    if text != "EVIDENCE":  # no example has a hint
        assert rows.read(before)[0].input_ids != rows.read(after)[0].input_ids
