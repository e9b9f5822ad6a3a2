"""A predictions file is matched to its gold, and a line that cannot be matched is named."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from ray_sql import data, generate
from ray_sql.data.contract import make_contract
from ray_sql.display import Display
from ray_sql.errors import ContractError, DataError, ModelError
from ray_sql.evaluate import results
from ray_sql.evaluate.models import check_adapter, evaluate_models
from ray_sql.evaluate.predictions_file import evaluate_file
from ray_sql.metrics.paired import PairedTest
from ray_sql.models import load_tokenizer
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import SQL, TASKS
from tests.conftest import QUESTIONS, make_encoder, make_model

GOLD = [sql for _, sql in QUESTIONS]
DISPLAY = Display(Console(file=io.StringIO()))


@pytest.fixture
def of_file(make_config: Any, tmp_path: Path) -> Any:
    """`of_file(lines, **settings)`: the judged rows and the summary of a predictions file."""

    def run(
        lines: Sequence[str | dict[str, Any]], name: str = "predictions.jsonl", **settings: Any
    ) -> Any:
        file = tmp_path / name
        file.write_text(
            "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        )
        config = make_config(**{"evaluate.limit": None} | settings)
        measured = evaluate_file(file, config, DISPLAY)
        return measured["file"], results.summarise(
            measured, TASKS[config.task_type], config.evaluate
        )["file"]

    return run


def refusal(of_file: Any, lines: Sequence[str | dict[str, Any]], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        of_file(lines, **settings)
    assert "\n" not in str(caught.value) and "predictions" in str(caught.value)
    return str(caught.value)


def test_gold_by_id_in_any_order_scores_all(of_file: Any) -> None:
    lines = [{"id": str(n), "predicted": sql} for n, sql in enumerate(GOLD)]
    rows, scores = of_file(lines[::-1])
    assert (scores["dev"]["execution_accuracy"], scores["dev"]["n"]) == (1.0, 8)
    assert [row["id"] for row in rows] == list("76543210")
    assert [row["question"] for row in rows] == [q for q, _ in QUESTIONS[::-1]]


def test_ids_may_be_numbers_and_a_part_of_the_split(of_file: Any) -> None:
    rows, scores = of_file([{"id": 3, "predicted": GOLD[3]}, "", {"id": 5, "predicted": None}])
    assert [(row["gold"], row["verdict"]) for row in rows] == [
        (GOLD[3], "correct"),
        (GOLD[5], "error"),
    ]
    assert scores["dev"]["n"] == 2


def test_lines_without_ids_are_taken_in_order(of_file: Any) -> None:
    assert of_file([{"predicted": sql} for sql in GOLD])[1]["dev"]["execution_accuracy"] == 1.0
    assert of_file([{"predicted": sql} for sql in GOLD[::-1]])[1]["dev"]["execution_accuracy"] < 1.0


def test_plain_sql_is_taken_a_line_each_up_to_a_tab(of_file: Any) -> None:
    for name in ("predictions.sql", "predictions.txt"):
        assert (
            of_file([f"{sql}\tmall" for sql in GOLD], name)[1]["dev"]["execution_accuracy"] == 1.0
        )
    rows, scores = of_file(["", *GOLD[1:]], "predictions.sql")  # an empty line is an empty answer
    assert (scores["dev"]["correct"], rows[0]["error_kind"]) == (7, "unparsable")


def test_a_line_with_its_own_gold_needs_no_example(of_file: Any) -> None:
    own = {
        "db_id": "shop",
        "gold": "SELECT city FROM customer",
        "predicted": "SELECT city FROM customer",
    }
    rows, scores = of_file([own] * 11)  # more lines than the split has examples
    assert scores["file"]["execution_accuracy"] == 1.0 and scores["file"]["n"] == 11
    assert (
        rows[0]["db_id"] == "shop" and rows[0]["question"] == "" and rows[0]["hardness"] == "easy"
    )
    rows, _ = of_file(
        [own | {"id": "0"}, own | {"id": "elsewhere", "split": "mine", "hardness": "odd"}]
    )
    assert [(row["split"], row["gold"]) for row in rows] == [
        ("dev", own["gold"]),
        ("mine", own["gold"]),
    ]
    assert rows[1]["hardness"] == "odd"


def test_our_own_predictions_can_be_scored_again(of_file: Any, tmp_path: Path) -> None:
    rows, scores = of_file(
        [
            {"id": n, "predicted": sql}
            for n, sql in enumerate([*GOLD[:5], "SELECT", "x", "SELECT 1"])
        ]
    )
    results.write(RunFolder(str(tmp_path / "out")), {"file": rows}, scores)
    again, same = of_file((tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    assert same == scores and [row["verdict"] for row in again] == [row["verdict"] for row in rows]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == scores


def test_what_a_file_says_of_lengths_is_kept(of_file: Any) -> None:
    lines = [
        {"id": n, "predicted": sql, "prompt_tokens": 100 + n, "raw": [1]}
        for n, sql in enumerate(GOLD)
    ]
    rows, _ = of_file(lines)
    assert [row["prompt_tokens"] for row in rows] == [*range(100, 100 + len(GOLD))]
    rows, _ = of_file([line | {"prompt_tokens": "many"} for line in lines])
    assert not any("prompt_tokens" in row for row in rows)


def test_one_id_in_two_splits_is_told_apart_by_the_split(of_file: Any, make_config: Any) -> None:
    demo = {"dataset_id": "demo", "split": ["seen", "unseen"]}
    corpus = data.load_split(make_config(**demo), ["seen", "unseen"])
    lines = [
        {"id": e.id, "split": split, "predicted": e.gold}
        for split in ("unseen", "seen")
        for e in corpus.splits[split][:3]
    ]
    rows, scores = of_file(lines, **demo)
    assert {split: s["execution_accuracy"] for split, s in scores.items()} == {
        "seen": 1.0,
        "unseen": 1.0,
    }
    assert [row["split"] for row in rows] == ["unseen"] * 3 + ["seen"] * 3
    shared_id = {e.id for e in corpus.splits["seen"]} & {e.id for e in corpus.splits["unseen"]}
    if shared_id:
        message = refusal(of_file, [{"id": shared_id.pop(), "predicted": "SELECT 1"}], **demo)
        assert "is in 2 of --split seen,unseen; give the line its `split` too" in message


def test_links_in_a_file_are_scored_as_links(of_file: Any) -> None:
    lines: list[dict[str, Any]] = [
        {"id": 0, "predicted": '{"customer": []}'},
        {"id": 1, "predicted": {"customer": ["name"]}},
    ]
    lines += [
        {"id": 2, "predicted": "no JSON"},
        {"id": 3, "predicted": None},
        {"id": 4, "predicted": [1]},
    ]
    rows, scores = of_file(lines, task_type="schema")
    assert [row["verdict"] for row in rows] == ["correct", "wrong", "error", "error", "error"]
    assert json.loads(rows[1]["gold"]) == {"customer": ["name", "city"]}
    assert (scores["dev"]["n"], scores["dev"]["unparsable"]) == (5, 3 / 5)
    again, same = of_file([json.dumps(row) for row in rows], task_type="schema")
    assert same == scores and [row["verdict"] for row in again] == [row["verdict"] for row in rows]


def test_a_number_of_lines_that_cannot_be_in_order_is_refused(of_file: Any) -> None:
    message = refusal(of_file, GOLD[:3])
    assert "3 lines, but --split dev has 8 examples; without ids" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"id": "nine", "predicted": "SELECT 1"}, "id 'nine' is in none of --split dev"),
        ({"predicted": "SELECT 1"}, "id None is in none of --split dev"),
        ({"id": 1, "answer": "SELECT 1"}, "no field 'predicted'; found answer, id"),
        ("[1]", "no field 'predicted'; found list"),
        ("{", "not valid JSON"),
        ({"id": 1, "predicted": 5}, "predicted must be SQL as text, found int"),
        ({"db_id": "moon", "gold": "SELECT 1", "predicted": "SELECT 1"}, "unknown db_id 'moon'"),
    ],
)
@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions.txt"])
def test_a_line_that_cannot_be_used_is_named(
    of_file: Any, name: str, line: Any, reason: str
) -> None:
    message = refusal(of_file, [{"id": 0, "predicted": "SELECT 1"}, "", line], name=name)
    assert f"{name}, line 3: " in message and reason in message


def test_a_missing_an_empty_and_a_binary_file_are_named(
    of_file: Any, make_config: Any, tmp_path: Path
) -> None:
    assert "is empty; give one prediction a line" in refusal(of_file, [])
    (tmp_path / "predictions.bin").write_bytes(b"\xff\xfd\x00")
    for name, reason in (("predictions.no", "cannot be read"), ("predictions.bin", "not UTF-8")):
        with pytest.raises(DataError, match=rf"^--predictions_file .*{name}.*: {reason}"):
            evaluate_file(tmp_path / name, make_config(), DISPLAY)


# Models


def test_base_and_tuned_are_compared_question_by_question(make_config: Any, tmp_path: Path) -> None:
    def row(split: str, verdict: str) -> dict[str, Any]:
        return {
            "split": split,
            "verdict": verdict,
            "hardness": "easy",
            "db_id": "mall",
            "error_kind": "none",
        }

    # the last of split a: gold that failed for the base alone says nothing about the two
    base = ["correct", "wrong", "wrong", "error", "gold_error", "gold_error", "wrong"]
    tuned = ["wrong", "correct", "correct", "wrong", "gold_error", "correct", "correct"]
    splits = ["a"] * 6 + ["b"]
    measured = {
        name: [row(split, verdict) for split, verdict in zip(splits, verdicts, strict=True)]
        for name, verdicts in (("base", base), ("tuned", tuned))
    }
    summary = results.summarise(measured, SQL, make_config().evaluate)
    assert summary["compared"]["a"] == {"only_base": 1, "only_tuned": 2, "mcnemar_p": 1.0}
    assert summary["compared"]["b"]["only_tuned"] == 1
    assert (summary["base"]["a"]["n"], summary["tuned"]["a"]["correct"]) == (4, 3)
    results.write(RunFolder(str(tmp_path)), measured, summary)
    assert (tmp_path / "predictions.jsonl").read_text() != (
        tmp_path / "base_predictions.jsonl"
    ).read_text()
    results.write(RunFolder(str(tmp_path / "base")), {"base": measured["base"]}, summary)
    assert (tmp_path / "base" / "predictions.jsonl").is_file()


def test_links_are_compared_by_the_score_that_heads_their_table(make_config: Any) -> None:
    def row(kind: str) -> dict[str, Any]:
        return {
            "split": "dev",
            "verdict": "correct" if kind == "none" else "wrong",
            "error_kind": kind,
        }

    kinds = {
        "base": ["missing names", "none", "extra names"],
        "tuned": ["extra names", "extra names", "missing names"],
    }
    measured = {name: [row(kind) for kind in each] for name, each in kinds.items()}
    assert results.paired(measured, "base") == PairedTest(1, 1), (
        "strict recall: spare names do no harm"
    )


def test_a_base_model_is_asked_once_and_remembered(make_config: Any, tiny_model: Path) -> None:
    config = make_config(**{"quantization.load_in_4bit": False, "evaluate.max_new_tokens": 3})
    corpus, tokenizer = data.load(config), load_tokenizer(str(tiny_model))
    asked = generate.make_questions(
        corpus.splits["dev"][:3], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    points: list[Any] = []

    def ask() -> Any:
        return evaluate_models(
            config, asked, corpus.schemas, str(tiny_model), None, DISPLAY, points.append
        )

    first = ask()["base"]
    assert [(row["gold"], row["new_tokens"]) for row in first] == [
        (sql, 3) for sql in GOLD[:3]
    ] and points
    points.clear()
    again = ask()["base"]
    assert [row["raw"] for row in again] == [row["raw"] for row in first] and not points


def test_an_adapter_of_another_contract_is_refused(
    make_config: Any, tiny_model: Path, tmp_path: Path
) -> None:
    adapter, config = str(tmp_path / "run" / "adapter"), make_config()
    with pytest.raises(ContractError, match=r"holds no contract.json; give the adapter folder"):
        check_adapter(adapter, config, load_tokenizer(str(tiny_model)), None)
    trained = make_contract(make_config(), load_tokenizer(str(tiny_model)), None)
    storage.write_text(f"{adapter}/contract.json", json.dumps(trained))
    lora = {"r": 1, "lora_alpha": 1, "use_dora": False, "use_rslora": False, "target_modules": []}
    storage.write_text(f"{adapter}/adapter_config.json", json.dumps(lora))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: is missing"):
        check_adapter(adapter, config, load_tokenizer(str(tiny_model)), None)
    save_file({"lora_A": torch.zeros(1)}, f"{adapter}/adapter_model.safetensors")
    check_adapter(adapter, config, load_tokenizer(str(tiny_model)), None)
    other = make_model(tmp_path / "other")
    tokenizer = load_tokenizer(str(other))
    tokenizer.add_tokens(["SELECT DISTINCT"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ContractError, match="trained with tokenizer_hash"):
        check_adapter(adapter, config, load_tokenizer(str(other)), None)
