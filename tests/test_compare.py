"""Two judged files are paired by split and id, and the verdict claims no more than n allows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_sql.config import CompareConfig, load
from ray_sql.errors import ConfigError, DataError, RaySqlError
from ray_sql.evaluate import compare
from ray_sql.evaluate.predictions_file import evaluate_file
from ray_sql.metrics import mcnemar, resolvable_difference
from ray_sql.store.run_folder import json_lines

Row = dict[str, Any]


def row(number: int, verdict: str, **changes: Any) -> Row:
    common = {"split": "dev", "db_id": f"db{number % 4}", "hardness": ("easy", "hard")[number % 2]}
    return {
        "id": str(number),
        **common,
        "question": f"Question {number}?",
        "gold": f"SELECT {number}",
        "predicted": None if verdict == "error" else f"SELECT {verdict}",
        "verdict": verdict,
        "error": None if verdict == "correct" else "other rows",
        **changes,
    }


def rows(verdicts: str) -> list[Row]:
    """`c` correct, `w` wrong, `e` error, `g` gold error."""
    names = {"c": "correct", "w": "wrong", "e": "error", "g": "gold_error"}
    return [row(number, names[letter]) for number, letter in enumerate(verdicts)]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to(name: str, lines: Sequence[Row | str]) -> str:
        text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return to


@pytest.fixture
def run(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`run(rows of A, rows of B)` → (compare.json, compare.txt, what was printed)."""

    def call(a: Sequence[Row | str], b: Sequence[Row | str]) -> tuple[dict[str, Any], str, str]:
        files = [write("a.jsonl", a), write("b.jsonl", b)]
        compare.run(load(CompareConfig, ["--files", *files, "--output_dir", str(tmp_path)]))
        folder = tmp_path / "comparison"
        assert sorted(path.name for path in folder.iterdir()) == ["compare.json", "compare.txt"]
        return (
            json.loads((folder / "compare.json").read_text()),
            (folder / "compare.txt").read_text(),
            capsys.readouterr().out,
        )

    return call


def test_every_number_agrees_with_the_rows(run: Any) -> None:
    result, text, out = run(rows("ccccwwwwee"), rows("cccwccccce")[::-1])
    assert (result["n"], result["accuracy_a"], result["accuracy_b"]) == (10, 0.4, 0.8)
    assert (result["only_a"], result["only_b"], result["difference"]) == (1, 5, 0.4)
    assert result["mcnemar_p"] == mcnemar(1, 5) and result[
        "resolvable_difference"
    ] == resolvable_difference(10, 6)
    for side in ("a", "b"):
        low, high = result[f"interval_{side}"]
        assert low < result[f"accuracy_{side}"] < high
    low, high = result["difference_clustered_interval"]
    assert low <= 0.4 <= high
    for name in ("by_split", "by_hardness", "by_database"):
        for field in ("n", "only_a", "only_b"):
            assert sum(group[field] for group in result[name].values()) == result[field], (
                name,
                field,
            )
    assert list(result["by_hardness"]) == ["easy", "hard"]
    assert [(one["id"], one["right"]) for one in result["discordant"]] == [
        ("3", "a"), *((str(n), "b") for n in range(4, 9)),
    ]  # fmt: skip
    assert result["metric"] == "execution_accuracy"
    assert (
        "no significant difference at this size: 10 questions resolve about " in result["verdict"]
    )
    assert result["verdict"] in text and result["verdict"] in out
    assert "Question 3?" in text and "Question 0?" not in text, "only where they differ"
    assert "SELECT wrong    ◄ other rows" in text and "(none)    ◄ other rows" in text
    assert "Question 3?" not in out and "compare.txt" in out


def test_failing_gold_and_questions_of_one_file_are_left_out_and_counted(run: Any) -> None:
    a, b = rows("gccww"), rows("cgcwc")
    result, text, _ = run([*a, row(7, "correct"), row(8, "correct")], [*b, row(9, "wrong")])
    assert (result["n"], result["gold_errors"], result["only_in_a"], result["only_in_b"]) == (
        3,
        2,
        2,
        1,
    )
    assert "left out: 2 only in A\nleft out: 1 only in B\nleft out: 2 whose gold fails" in text


def test_the_same_id_in_two_splits_is_two_questions(run: Any) -> None:
    a = [row(1, "correct"), row(1, "wrong", split="unseen")]
    b = [row(1, "wrong", split="unseen"), row(1, "wrong")]
    result, text, _ = run(a, b)
    assert (result["only_a"], result["only_b"]) == (1, 0)
    assert list(result["by_split"]) == ["dev", "unseen"] and "\nsplit " in text


def test_a_clear_difference_is_called_one_and_one_database_is_not_enough_for_it(run: Any) -> None:
    result, _, _ = run(rows("w" * 40), rows("c" * 20 + "w" * 20))
    assert result["verdict"].startswith(
        "B is significantly better, by 50.0 points (McNemar p = 1.9e-06)"
    )
    assert "not on every choice" not in result["verdict"]
    result, _, _ = run(rows("c" * 20 + "w" * 20), rows("w" * 40))
    assert result["verdict"].startswith("A is significantly better, by 50.0 points")
    one = [row(n, "correct", db_id="alone" if n < 10 else f"db{n}") for n in range(40)]
    other = [
        one_row | {"verdict": "wrong" if n < 10 else "correct"} for n, one_row in enumerate(one)
    ]
    result, _, _ = run(one, other)
    assert (
        "A is significantly better" in result["verdict"]
        and "but not on every choice of databases" in result["verdict"]
    )


def test_two_files_that_agree_resolve_what_their_size_allows(run: Any) -> None:
    result, text, _ = run(rows("cw" * 20), rows("cw" * 20))
    assert (
        result["mcnemar_p"] == 1.0
        and result["discordant"] == []
        and "difference_clustered_interval" not in result
    )
    assert "40 questions resolve about 19.6 points" in text
    assert "4 questions are too few to resolve any difference" in run(rows("cwcw"), rows("wwcw"))[1]


def test_links_are_compared_by_exact_match_and_by_strict_recall(run: Any) -> None:
    def links(number: int, verdict: str, kind: str) -> Row:
        return row(number, verdict, hardness=None, error_kind=kind, linking={"hallucinated": 0})

    kinds = {"correct": "none", "wrong": "missing names"}
    a = [
        links(n, verdict, kinds[verdict]) for n, verdict in enumerate(["correct", "wrong", "wrong"])
    ]
    b = [
        links(0, "wrong", "extra names"),
        links(1, "wrong", "extra names"),
        links(2, "wrong", "missing names"),
    ]
    result, text, _ = run(a, b)
    assert result["metric"] == "exact_match" and (result["only_a"], result["only_b"]) == (1, 0)
    assert (result["strict_recall"]["only_a"], result["strict_recall"]["only_b"]) == (0, 1)
    assert "exact match, 95 % intervals" in text and "strict recall, 95 % intervals" in text
    assert list(result["by_hardness"]) == ["unknown"]


def test_what_measure_writes_can_be_compared(
    run: Any, make_config: Any, spider_folder: Path, tmp_path: Path
) -> None:
    from ray_sql.display import Display

    config = make_config(**{"evaluate.limit": None})
    files = {}
    for name, sql in (
        ("a", "SELECT COUNT(*) FROM customer"),
        ("b", "SELECT MAX(price) FROM product"),
    ):
        (tmp_path / f"{name}.sql").write_text(f"{sql}\n" * 8)
        judged = evaluate_file(tmp_path / f"{name}.sql", config, Display())["file"]
        files[name] = json_lines(judged).splitlines()
    result, _, _ = run(files["a"], files["b"])
    assert (result["n"], result["only_a"], result["only_b"]) == (8, 1, 1)


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ([row(0, "correct"), "", "{oops"], "b.jsonl, line 3: not valid JSON"),
        ([row(0, "correct"), "[1]"], "b.jsonl, line 2: no field 'id'"),
        ([{"id": "0", "predicted": "x"}], "no field 'verdict'; --files takes judged predictions"),
        ([row(0, "perfect")], "b.jsonl, line 1: verdict 'perfect' is none of correct, wrong"),
        (
            [row(0, "correct"), row(0, "wrong")],
            "b.jsonl, line 2: id '0' of split 'dev' was on line 1 before",
        ),
        (
            [row(0, "correct", split="test")],
            "b.jsonl (1 questions, e.g. split 'test' id '0') have no split and id in common",
        ),
        ([], "b.jsonl (0 questions) have no split and id in common"),
        ([row(0, "correct", gold="SELECT 5")], "id '0' has gold 'SELECT 0' in"),
        ([row(0, "correct", question="Else?")], "id '0' has question 'Question 0?' in"),
        ([row(0, "gold_error")], "the gold of all 1 questions in common fails"),
        ([row(0, "correct", linking={})], "a.jsonl holds answers of task sql, "),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line_that_says_why(
    run: Any, b: list[Row | str], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        run([row(0, "correct")], b)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_scored_under_two_semantics_are_refused(run: Any, write: Any, tmp_path: Path) -> None:
    write("metrics.json", [{"file": {"dev": {"semantics": "spider"}}}])
    assert run(rows("c"), rows("w"))[0]["n"] == 1
    (tmp_path / "other").mkdir()
    write("other/metrics.json", [{"tuned": {"dev": {"semantics": "bird"}}}])
    files = [write("a.jsonl", rows("c")), write("other/b.jsonl", rows("w"))]
    config = load(CompareConfig, ["--files", *files, "--output_dir", str(tmp_path)])
    with pytest.raises(
        DataError,
        match=r"a\.jsonl was scored under semantics spider, .*b\.jsonl under bird; score one",
    ):
        compare.run(config)
    write(
        "other/metrics.json", [{"tuned": {"dev": {"semantics": "spider", "keep_distinct": True}}}]
    )
    with pytest.raises(
        DataError, match=r"b\.jsonl under spider --evaluate\.keep_distinct; score one"
    ):
        compare.run(config)
    write("other/metrics.json", ["{half"])
    assert compare.run(config)["n"] == 1


def test_a_missing_and_a_binary_file_are_named(write: Any, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("nowhere.jsonl", "no such file"),
        ("binary", "not UTF-8 text"),
        ("", "cannot be read"),
    ):
        with pytest.raises(RaySqlError, match=rf"^--files {tmp_path / name}.*: {message}"):
            compare.read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--files", "a"], "--files: .*give two files of judged predictions"),
        (["--files", "a", "b", "c"], "--files: .*give two files of judged predictions"),
        (["--output_name", "o"], "--files is required"),
    ],
)
def test_a_comparison_takes_two_files(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(CompareConfig, flags)


def test_a_dry_run_writes_nothing(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write("a.jsonl", rows("c")), write("b.jsonl", rows("w"))]
    config = load(
        CompareConfig, ["--files", *files, "--output_dir", str(tmp_path / "out"), "--dry_run"]
    )
    assert (
        compare.run(config) == {}
        and "would compare" in capsys.readouterr().out
        and not (tmp_path / "out").exists()
    )


@pytest.mark.kind("runs named by their folder")
@pytest.mark.parametrize("form", ["{}", "{}/", "{}/predictions.jsonl"])
def test_the_folder_of_a_run_stands_for_its_answers(tmp_path: Path, form: str) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder, verdicts in zip(folders, ("cccw", "cwww"), strict=True):
        folder.mkdir()
        (folder / "predictions.jsonl").write_text(json_lines(rows(verdicts)))
    files = [form.format(folder) for folder in folders]
    result = compare.run(load(CompareConfig, ["--files", *files, "--output_dir", str(tmp_path)]))
    assert (result["accuracy_a"], result["accuracy_b"]) == (0.75, 0.25)
