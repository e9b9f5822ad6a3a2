"""A prompt has schema first and question last; answers are read strictly; drift is refused."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.config import Config
from ray_sql.config.sections import PromptSection
from ray_sql.data import Corpus, Example, chat, contract, prompts
from ray_sql.data.answers import parse_sql
from ray_sql.data.contract import BINDING, CONTRACT_PACKAGES, check_contract, make_contract
from ray_sql.errors import ContractError, DataError
from ray_sql.models import load_tokenizer
from ray_sql.tasks import SCHEMA, SQL, TASKS
from tests.conftest import CHAT_TEMPLATE
from tests.waiting import HANGS

TURNS = prompts.messages(SQL, "customer(id, name)", "How many?", "count the rows")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n"
        "{{ m['content'] | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
)
REWRITING = (  # shows the earlier turns in another way once there is an answer
    "{% for m in messages %}{% if loop.last or messages[-1]['role'] == 'user' %}"
    "<|start|>{{ m['content'] }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def use_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(template: str | None) -> Any:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return use


@pytest.fixture
def corpus(make_config: Any) -> Corpus:
    return data.load(make_config())


def prompt_of(example: Example, corpus: Corpus, tokenizer: Any, config: Config) -> str:
    schema = prompts.schema_text(example, corpus.schemas, config.prompt)
    turns = prompts.messages(TASKS[config.task_type], schema, example.question)
    return chat.Chat(tokenizer).prompt(turns)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM, None])
@pytest.mark.parametrize("task", ["sql", "schema"])
def test_the_schema_comes_first_and_the_question_last(
    corpus: Corpus, use_template: Any, make_config: Any, task: str, template: str | None
) -> None:
    config, tokenizer = make_config(task_type=task), use_template(template)
    example = corpus.splits["dev"][0]
    text = prompt_of(example, corpus, tokenizer, config)
    for table in ("customer", "product", "sale"):
        assert text.index(table) < text.index(f"Question: {example.question}")
    after = text.partition(example.question)[2]
    empty = prompts.messages(TASKS[config.task_type], "", "")
    assert chat.Chat(tokenizer).prompt(empty).endswith(after)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM, None])
def test_questions_on_one_database_share_all_that_stands_before_the_question(
    corpus: Corpus, use_template: Any, make_config: Any, template: str | None
) -> None:
    first, second = corpus.splits["dev"][:2]
    texts = [
        prompt_of(example, corpus, use_template(template), make_config())
        for example in (first, second)
    ]
    heads = [
        text.partition(example.question)[0]
        for text, example in zip(texts, (first, second), strict=True)
    ]
    assert heads[0] == heads[1] and heads[0].endswith("Question: ")


def test_a_hint_stands_between_schema_and_question_and_leaves_no_trace_where_there_is_none() -> (
    None
):
    content = TURNS[1]["content"]
    assert content == "Schema:\ncustomer(id, name)\n\nHint: count the rows\nQuestion: How many?"
    assert prompts.messages(SQL, "s", "q")[1]["content"] == "Schema:\ns\n\nQuestion: q"


def test_braces_in_a_schema_or_question_are_left_alone() -> None:
    content = prompts.messages(SQL, "t({x})", "What is {question}?", "{schema}")[1]["content"]
    assert "t({x})" in content and "What is {question}?" in content and "Hint: {schema}" in content


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM, REWRITING, None])
def test_a_completion_is_the_answer_and_one_end_of_turn(
    use_template: Any, template: str | None
) -> None:
    completion = chat.Chat(use_template(template)).completion(TURNS, "```sql\nSELECT 1\n```")
    assert completion == "```sql\nSELECT 1\n```<|end|>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM])
def test_prompt_and_completion_are_together_what_the_template_writes(
    use_template: Any, template: str
) -> None:
    tokenizer, answer = use_template(template), "```sql\nSELECT 'é—ü'\n```"
    parts = (chat.Chat(tokenizer).prompt(TURNS), chat.Chat(tokenizer).completion(TURNS, answer))
    ids = [
        token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]
    ]
    system, user = TURNS
    merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
    turns = [
        *([merged] if template == NO_SYSTEM else TURNS),
        {"role": "assistant", "content": answer},
    ]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False).rstrip(
        "\n"
    )


def test_a_template_without_a_system_role_keeps_the_task(use_template: Any) -> None:
    text = chat.Chat(use_template(NO_SYSTEM)).prompt(TURNS)
    assert (
        text.count("<|start|>") == 2
        and SQL.system in text
        and text.endswith("<|start|>assistant\n")
    )


def test_a_model_without_a_template_gets_a_plain_one(use_template: Any) -> None:
    text = chat.Chat(use_template(None)).prompt(TURNS)
    assert text == f"{SQL.system}\n\n{TURNS[1]['content']}\n\nAnswer:\n"


def test_the_answer_of_each_task_is_a_fenced_block(corpus: Corpus) -> None:
    example = Example("0", "mall", "?", "SELECT name\nFROM customer -- all\nWHERE city = 'a  b'")
    assert prompts.answer(SQL, example, corpus.schemas) == (
        "```sql\nSELECT name FROM customer WHERE city = 'a  b'\n```"
    )
    assert (
        prompts.answer(SCHEMA, example, corpus.schemas)
        == '```json\n{"customer": ["name", "city"]}\n```'
    )
    assert parse_sql(prompts.answer(SQL, example, corpus.schemas)) == (
        "SELECT name FROM customer WHERE city = 'a  b'"
    )


def test_the_schema_form_shows_only_what_the_gold_needs(corpus: Corpus, make_config: Any) -> None:
    example = Example("0", "mall", "?", "SELECT name FROM customer")
    full, tables, reduced = (
        prompts.schema_text(
            example, corpus.schemas, PromptSection(schema_form=form, serializer="compact")
        )
        for form in ("full", "tables", "reduced")
    )
    assert "product" in full and "product" not in tables + reduced
    assert "city" in tables and "city" not in reduced and "name" in reduced
    own = Example("0", "mall", "?", "SELECT 1", schema_text="its own words")
    assert prompts.schema_text(own, {}, PromptSection()) == "its own words"


def test_links_that_cannot_be_had_are_named_by_their_example() -> None:
    with pytest.raises(DataError, match=r"^example 7: no schema of shop .*--data.databases"):
        prompts.gold_links(Example("7", "shop", "?", "SELECT 1"), {})
    with pytest.raises(
        DataError, match=r"^example 7: links are neither JSON nor a Python literal: 'oops"
    ):
        prompts.gold_links(Example("7", "shop", "?", "SELECT 1", links_text="oops"), {})


@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        ("```sql\nSELECT 1\n```", "SELECT 1"),
        ("Here you are:\n```sql\nSELECT 1\n```\nIt counts ```x```.", "SELECT 1"),
        ("```\nSELECT a,\n  b\nFROM t\n```", "SELECT a, b FROM t"),
        ("```SQL SELECT 1```", "SELECT 1"),
        ("```SELECT name FROM t```", "SELECT name FROM t"),
        ("```sqlite\nSELECT 1\n```", "SELECT 1"),
        # cut off
        ("```sql\nSELECT 1 FROM", "SELECT 1 FROM"),
        ("```sql\nSELECT 'it", "SELECT 'it"),
        # no fence
        ("SELECT 1", "SELECT 1"),
        ("The query is: select 1;\n\nIt counts.", "select 1"),
        ("SELECT 1\nFROM t\n\nThis selects.", "SELECT 1 FROM t"),
        ("WITH a AS (SELECT 1) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a"),
        # statements
        ("```sql\nSELECT 1; DROP TABLE t;\n```", "SELECT 1"),
        ("```sql\nSELECT 'a;b', \"c;d\", `e;f` ; SELECT 2\n```", "SELECT 'a;b', \"c;d\", `e;f`"),
        ("```sql\nSELECT 'it''s; fine'; SELECT 2\n```", "SELECT 'it''s; fine'"),
        # what is in quotes stays; what is in comments goes, and hides nothing
        ("```sql\nSELECT 'a  b',\n   'c -- d'\n```", "SELECT 'a  b', 'c -- d'"),
        ("```sql\n-- it's; all\nSELECT 1 -- one\nFROM t /* not; u */ ;\n```", "SELECT 1 FROM t"),
        # nothing
        ("", None),
        ("```sql\n```", None),
        ("```sql\n ; \n```", None),
        ("```sql", None),
    ],
)
def test_sql_is_read_from_an_answer(answer: str, sql: str | None) -> None:
    assert parse_sql(answer) == sql


def test_a_long_answer_without_an_end_is_read_in_no_time() -> None:
    started = time.perf_counter()
    for piece in ("'", "/* ", "-- ", "`", "``` ", "( ", "SELECT "):
        parse_sql(piece * 100_000)
    assert time.perf_counter() - started < HANGS, "a step back at every character takes minutes"


# The contract


PINNED = {
    "model_revision": "abc",
    "quantization": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
    },
    "serializer": {"name": "compact", "version": 2},
    "schema_form": "full",
    "example_values": 0,
    "columns": {"question": "pergunta"},
    "tokenizer_hash": "6bbafd4e924e",
    "max_length": 2048,
    "semantics": "spider",
    "answers": {
        "num_beams": 1,
        "samples": 1,
        "temperature": 0.4,
        "top_p": 1.0,
        "ground": "none",
        "choose": "greedy",
        "first_executable": False,
    },
}
PINNED_BY_TASK = {
    "sql": (
        "You write SQL. Given a database schema and a question, answer with one SQL query in a "
        "sql code block.",
        "0483c5bbe695",
        "fenced sql",
    ),
    "schema": (
        "You find what a query needs. Given a database schema and a question, answer with the "
        "tables and columns needed, as JSON in a json code block.",
        "a62401539024",
        "fenced json",
    ),
}


@pytest.mark.parametrize("task", ["sql", "schema"])
def test_the_contract_stays_so_that_adapters_stay_usable(
    make_config: Any, tokenizer: Any, tiny_model: Path, task: str
) -> None:
    config = make_config(task_type=task, **{"data.columns": {"question": "pergunta"}})
    contract = make_contract(config, tokenizer, "abc")
    packages = contract.pop("packages")
    assert set(packages) == {"ray_sql", *CONTRACT_PACKAGES}
    system, template_hash, answer_format = PINNED_BY_TASK[task]
    assert contract == PINNED | {
        "task_type": task,
        "model_name": str(tiny_model),
        "template": {
            "system": system,
            "user": "Schema:\n{schema}\n\n{evidence}Question: {question}",
            "evidence": "Hint: {evidence}\n",
            "turns": "system and user",
        },
        "template_hash": template_hash,
        "answer_format": answer_format,
    }


def test_the_contract_of_the_same_settings_is_equal_after_a_round_trip(
    make_config: Any, tokenizer: Any
) -> None:
    saved = json.loads(json.dumps(make_contract(make_config(), tokenizer, "abc")))
    check_contract(saved, make_contract(make_config(), tokenizer, "abc"), "out/run/adapter")
    assert saved["packages"]["transformers"] and saved["answer_format"] == "fenced sql"


def test_what_binds_no_answer_may_differ(make_config: Any, tokenizer: Any) -> None:
    saved = make_contract(make_config(), tokenizer, "abc")
    other = make_config(**{"rows.max_length": 99, "evaluate.semantics": "strict", "seed": 3})
    check_contract(saved, make_contract(other, tokenizer, "abc"), "out/run/adapter")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("task_type", {"task_type": "schema"}),
        ("model_name", {"model_name": "other/model"}),
        ("serializer", {"prompt.serializer": "ddl"}),
        ("schema_form", {"prompt.schema_form": "tables"}),
        ("example_values", {"prompt.serializer": "m_schema", "prompt.example_values": 2}),
    ],
)
def test_a_setting_that_changes_the_prompt_is_refused_by_name(
    make_config: Any, tokenizer: Any, field: str, changes: dict[str, Any]
) -> None:
    base = {"prompt.serializer": "m_schema"} if field == "example_values" else {}
    saved = make_contract(make_config(**base), tokenizer, None)
    current = make_contract(make_config(**base | changes), tokenizer, None)
    with pytest.raises(ContractError) as caught:
        check_contract(saved, current, "out/run/adapter")
    message = str(caught.value)
    assert message.startswith(
        f"out/run/adapter: the adapter was trained with {field} {saved[field]!r}, "
    )
    assert (
        repr(current[field]) in message
        and "--config and its ray_sql_config.json" in message
        and "\n" not in message
    )


@pytest.mark.parametrize("what", ["template", "template text", "tokenizer", "serializer version"])
def test_code_and_files_that_change_the_prompt_are_refused(
    make_config: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    saved = make_contract(make_config(), tokenizer, None)
    if what == "template":
        tokenizer.chat_template = NO_SYSTEM
    elif what == "template text":
        monkeypatch.setattr(prompts, "USER", "{schema}\n{evidence}{question}")
    elif what == "tokenizer":
        tokenizer.add_tokens(["SELECT DISTINCT"])
    else:
        monkeypatch.setattr(contract, "SERIALIZER_VERSION", 99)
    field = {"tokenizer": "tokenizer_hash", "serializer version": "serializer"}.get(
        what, "template_hash"
    )
    with pytest.raises(ContractError, match=f"trained with {field} "):
        check_contract(saved, make_contract(make_config(), tokenizer, None), "a/adapter")


def test_every_binding_field_is_in_the_contract(make_config: Any, tokenizer: Any) -> None:
    contract = make_contract(make_config(), tokenizer, None)
    assert "date" not in contract["template"]
    assert set(BINDING) <= set(contract)
    for field in BINDING:
        with pytest.raises(ContractError, match=f"trained with {field} None"):
            check_contract({k: v for k, v in contract.items() if k != field}, contract, "a/adapter")


def test_a_template_that_writes_todays_date_writes_the_same_one_every_day(
    tokenizer: Any, use_template: Any, make_config: Any
) -> None:
    plain = make_contract(make_config(), tokenizer, None)
    use_template("{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE)
    turns = prompts.messages(SQL, "CREATE TABLE t (a)", "How many?")
    assert chat.Chat(tokenizer).prompt(turns).startswith("26 Jul 2024\n")
    dated = make_contract(make_config(), tokenizer, None)
    assert (
        dated["template"]["date"] == "2024-07-26"
        and dated["template_hash"] != plain["template_hash"]
    )


def test_of_several_chat_templates_it_is_the_default_one(
    tokenizer: Any, use_template: Any, make_config: Any
) -> None:
    turns = prompts.messages(SQL, "CREATE TABLE t (a)", "How many?")
    prompt, contract = (
        chat.Chat(tokenizer).prompt(turns),
        make_contract(make_config(), tokenizer, None),
    )
    use_template({"default": CHAT_TEMPLATE, "tool_use": NO_SYSTEM})
    assert chat.Chat(tokenizer).prompt(turns) == prompt
    assert (
        make_contract(make_config(), tokenizer, None)["template_hash"] == contract["template_hash"]
    )


@pytest.mark.parametrize(
    "start", ["SELECT\nname", "select name", "WITH x AS (SELECT 1)\nSELECT name"]
)
def test_a_block_without_a_language_may_begin_with_its_query(start: str) -> None:
    assert parse_sql(f"```{start} FROM t\n```") == f"{start} FROM t".replace("\n", " ")
