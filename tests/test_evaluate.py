"""Gold scores 100 %, failing gold is counted apart, and the numbers of a summary agree."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, generate
from ray_sql.config import Config
from ray_sql.data import Corpus, Example
from ray_sql.errors import DataError
from ray_sql.evaluate import scoring
from ray_sql.finetune import gold
from ray_sql.finetune.results import final_scores
from ray_sql.generate import Answer, Question
from ray_sql.metrics.judged import HARDNESS
from ray_sql.models import load_tokenizer
from ray_sql.store.run_folder import json_lines
from ray_sql.tasks import SCHEMA, SQL, TASKS
from tests.conftest import QUESTIONS, make_encoder


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def corpus(make_config: Any) -> Corpus:
    return data.load(make_config())


def said(text: str | None, language: str = "sql") -> Answer:
    return Answer("" if text is None else f"```{language}\n{text}\n```", 10, 5, 0.1)


def ask(
    gold: str, hardness: str | None = None, database: str | None = None, db_id: str = "mall"
) -> Question:
    return Question("0", "dev", db_id, "?", gold, hardness, database, [1])


def score(
    asked: list[Question], answers: list[Answer], config: Config, schemas: Any = None
) -> list[dict[str, Any]]:
    return scoring.score(asked, answers, TASKS[config.task_type], config.evaluate, schemas)


def summarise(rows: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    return scoring.summarise(rows, TASKS[config.task_type], config.evaluate)


@pytest.mark.parametrize("semantics", ["spider", "bird", "strict"])
def test_gold_as_answers_scores_all(
    corpus: Corpus, tokenizer: Any, make_config: Any, semantics: str
) -> None:
    config = make_config(**{"evaluate.semantics": semantics})
    asked = generate.make_questions(
        corpus.splits["dev"], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    judged = score(asked, [said(one.gold) for one in asked], config)
    scores = summarise(judged, config)
    assert (scores["execution_accuracy"], scores["n"], scores["correct"]) == (
        1.0,
        len(QUESTIONS),
        len(QUESTIONS),
    )
    assert (scores["valid_sql"], scores["gold_errors"], scores["errors"]) == (1.0, 0, {})
    assert scores["semantics"] == semantics
    assert [row["predicted"] for row in judged] == [one.gold for one in asked]


def test_gold_links_as_answers_score_all(corpus: Corpus, tokenizer: Any, make_config: Any) -> None:
    config = make_config(task_type="schema")
    asked = generate.make_questions(
        corpus.splits["dev"], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    judged = score(asked, [said(one.gold, "json") for one in asked], config, corpus.schemas)
    scores = summarise(judged, config)
    for name in (
        "strict_recall",
        "exact_match",
        "table_precision",
        "table_recall",
        "table_f1",
        "column_f1",
        "column_f1_macro",
    ):
        assert scores[name] == 1.0, name
    assert (scores["n"], scores["hallucinated_names"], scores["unparsable"], scores["errors"]) == (
        8,
        0,
        0,
        {},
    )


@pytest.fixture
def judged(corpus: Corpus, make_config: Any) -> list[dict[str, Any]]:
    """Five answers, two of them right, and two golds that fail, one for want of a database."""
    place = corpus.databases["mall"]
    cases = [
        ("SELECT COUNT(*) FROM customer", "SELECT 4", "easy", place),
        ("SELECT title FROM product", "SELECT title FROM product", "hard", place),
        ("SELECT MAX(price) FROM product", "SELECT MIN(price) FROM product", "easy", place),
        ("SELECT name FROM customer", "SELECT nom FROM customer", "hard", place),
        ("SELECT name FROM customer", None, "odd", place),
        ("SELECT x FROM nowhere", "SELECT 1", "easy", place),
        ("SELECT 1", "SELECT 1", "easy", None),
    ]
    asked = [ask(gold, hardness, database) for gold, _, hardness, database in cases]
    return score(asked, [said(answer) for _, answer, _, _ in cases], make_config())


def test_every_answer_has_its_verdict_and_reason(judged: list[dict[str, Any]]) -> None:
    verdicts = ["correct", "correct", "wrong", "error", "error", "gold_error", "gold_error"]
    assert [row["verdict"] for row in judged] == verdicts
    kinds = [
        "none",
        "none",
        "wrong rows",
        "no such column",
        "unparsable",
        "gold error",
        "gold error",
    ]
    assert [row["error_kind"] for row in judged] == kinds
    assert (
        "nom" in judged[3]["error"]
        and "nowhere" in judged[5]["error"]
        and "no database" in judged[6]["error"]
    )
    assert judged[4]["predicted"] is None and judged[0]["error"] is None


def test_failing_gold_is_counted_apart_and_all_numbers_agree(
    judged: list[dict[str, Any]], make_config: Any
) -> None:
    scores = summarise(judged, make_config())
    assert (scores["n"], scores["correct"], scores["gold_errors"]) == (5, 2, 2)
    assert (scores["execution_accuracy"], scores["valid_sql"]) == (2 / 5, 3 / 5)
    assert list(scores["by_hardness"]) == ["easy", "hard", "odd"]
    for groups in (scores["by_hardness"], scores["by_database"]):
        assert sum(group["n"] for group in groups.values()) == scores["n"]
        assert sum(group["correct"] for group in groups.values()) == scores["correct"]
    for group in (scores, *scores["by_hardness"].values(), *scores["by_database"].values()):
        low, high = group["interval"]
        assert 0 <= low <= group["execution_accuracy"] <= high <= 1
        assert group["execution_accuracy"] == group["correct"] / group["n"]
    assert scores["valid_sql_interval"][0] <= scores["valid_sql"] <= scores["valid_sql_interval"][1]
    assert scores["errors"] == {"wrong rows": 1, "no such column": 1, "unparsable": 1}


def test_an_interval_clustered_by_database_is_there_where_databases_differ(
    judged: list[dict[str, Any]], make_config: Any
) -> None:
    assert "clustered_interval" not in summarise(judged, make_config()), "one database"
    rows = [row | {"db_id": name} for name, share in (("a", 2), ("b", 3)) for row in judged[:share]]
    scores = summarise(rows, make_config())
    assert scores["clustered_interval"] == [2 / 3, 1.0] and scores["execution_accuracy"] == 4 / 5
    links = make_config(task_type="schema")
    answers = [("a", '{"customer": ["name", "city"]}'), ("b", '{"customer": ["name"]}')]
    asked = [ask(json.dumps(GOLD), db_id=db_id) for db_id, _ in answers]
    scores = summarise(score(asked, [said(one, "json") for _, one in answers], links), links)
    assert scores["clustered_interval"] == [0.0, 1.0] and scores["strict_recall"] == 0.5


def test_hardness_is_graded_where_the_dataset_has_none(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    for task in ("sql", "schema"):
        config = make_config(task_type=task)
        asked = generate.make_questions(
            corpus.splits["dev"], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
        )
        judged = score(asked, [said(one.gold) for one in asked], config, corpus.schemas)
        levels = {row["hardness"] for row in judged}
        assert levels <= set(HARDNESS) - {"unknown"} and len(levels) > 1
        scores = summarise(judged, config)
        assert set(scores["by_hardness"]) == levels and set(scores["by_database"]) == {"mall"}
        for group in (*scores["by_hardness"].values(), *scores["by_database"].values()):
            assert (
                group["interval"][0]
                <= group["strict_recall" if task == "schema" else "execution_accuracy"]
            )


def test_gold_that_does_not_run_is_found(corpus: Corpus, make_config: Any) -> None:
    place = corpus.databases["mall"]
    golds = [
        ("a", place, "SELECT 1"),
        ("b", place, "SELECT x FROM nowhere"),
        ("c", place, "DELETE FROM sale"),
    ]
    found = scoring.failing_gold(golds, make_config().evaluate)
    assert [row["id"] for row in found] == ["b", "c"]
    assert "nowhere" in found[0]["error"] and found[0]["gold"] == "SELECT x FROM nowhere"


def test_only_gold_that_timed_out_is_asked_again(corpus: Corpus, make_config: Any) -> None:
    config = make_config(**{"evaluate.timeout": 0.3})
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    golds = ["SELECT 1", endless, "SELECT x FROM nowhere"]
    examples = tuple(Example(str(place), "mall", "?", gold) for place, gold in enumerate(golds))
    asked: list[int] = []

    def failing(corpus: Corpus) -> list[tuple[str, str]]:
        asked.clear()
        rows = gold.failing(
            corpus, config.evaluate, config.cache, lambda _, total: asked.append(total)
        )
        return [(row["id"], row["error"].split(":")[0]) for row in rows]

    changed = replace(corpus, splits={"dev": examples})
    assert failing(changed) == [("1", "timeout"), ("2", "no such table")] and asked == [3, 3, 3]
    assert failing(changed) == [("1", "timeout"), ("2", "no such table")] and asked == [1]
    quick = replace(corpus, splits={"dev": examples[::2]})
    assert failing(quick) == [("2", "no such table")] and asked == [2, 2]
    assert failing(quick) == [("2", "no such table")] and asked == []


GOLD = {"customer": ["name", "city"]}


@pytest.mark.parametrize(
    ("answer", "verdict", "kind"),
    [
        ('{"customer": ["name", "city"]}', "correct", "none"),
        ('{"CUSTOMER": ["City", "NAME"]}', "correct", "none"),
        ('{"customer": ["name", "city"], "sale": []}', "wrong", "extra names"),
        ('{"customer": ["name"]}', "wrong", "missing names"),
        ("{'customer': ['name']}", "error", "unparsable"),
        (None, "error", "unparsable"),
    ],
)
def test_links_are_judged_by_name(
    corpus: Corpus, make_config: Any, answer: str | None, verdict: str, kind: str
) -> None:
    config = make_config(task_type="schema")
    (row,) = score([ask(json.dumps(GOLD))], [said(answer, "json")], config, corpus.schemas)
    assert (row["verdict"], row["error_kind"]) == (verdict, kind)


def test_linking_scores_count_names_over_all_questions(corpus: Corpus, make_config: Any) -> None:
    config = make_config(task_type="schema")
    answers = ['{"customer": ["name", "city"]}', '{"customer": ["name", "shoe"], "hat": []}', None]
    asked = [ask(json.dumps(GOLD)) for _ in answers] + [ask("")]
    judged = score(asked, [said(one, "json") for one in [*answers, "{}"]], config, corpus.schemas)
    scores = summarise(judged, config)
    assert (scores["n"], scores["gold_errors"], judged[-1]["verdict"]) == (3, 1, "gold_error")
    assert scores["strict_recall"] == scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["interval"][0] < scores["strict_recall"] < scores["interval"][1]
    for name in (
        "exact_match",
        "table_f1",
        "column_f1",
        "table_strict_recall",
        "questions_hallucinating",
        "unparsable",
    ):
        low, high = scores[f"{name}_interval"]
        assert 0 <= low <= scores[name] <= high <= 1 and low < high, name
    # gold 6 columns, predicted 4, shared 3; gold 3 tables, predicted 3, shared 2
    assert (scores["column_recall"], scores["column_precision"], scores["column_f1"]) == (
        3 / 6,
        3 / 4,
        6 / 10,
    )
    assert scores["table_recall"] == scores["table_precision"] == pytest.approx(2 / 3)
    assert (
        scores["hallucinated_names"],
        scores["questions_hallucinating"],
        scores["unparsable"],
    ) == (2, 1 / 3, 1 / 3)
    assert scores["errors"] == {"missing names": 1, "unparsable": 1}


@pytest.mark.parametrize("task", ["sql", "schema"])
def test_a_split_without_usable_gold_has_a_score_of_none(make_config: Any, task: str) -> None:
    config = make_config(task_type=task)
    judged = score([ask("")], [said("x")], config)
    scores = summarise(judged, config)
    assert (scores["n"], scores["gold_errors"], scores["interval"]) == (0, 1, [0.0, 1.0])
    assert TASKS[config.task_type].objective(scores) == (0.0, 0.0)


def test_databases_on_which_no_gold_runs_are_an_error(corpus: Corpus, make_config: Any) -> None:
    asked = [ask("SELECT x FROM nowhere", "easy", corpus.databases["mall"]), ask("SELECT 1")]
    with pytest.raises(
        DataError,
        match=r"nothing can be scored.* \(1 in all\), as that of 0 on mall: no such table",
    ):
        score(asked, [said("SELECT 1")] * 2, make_config())


def test_models_are_ordered_by_the_tasks_metric_then_by_the_tie_break() -> None:
    sql = [
        {"execution_accuracy": a, "valid_sql": v} for a, v in ((0.5, 0.7), (0.2, 0.9), (0.5, 0.6))
    ]
    assert sorted(sql, key=SQL.objective) == [sql[1], sql[2], sql[0]]
    links = [
        {"strict_recall": r, "column_f1": f, "column_precision": 1}
        for r, f in ((0.3, 0.4), (0.1, 0.9), (0.3, 0.2))
    ]
    assert sorted(links, key=SCHEMA.objective) == [links[1], links[2], links[0]]


def test_metric_names_are_legal_whatever_a_dataset_calls_its_levels(
    corpus: Corpus, tokenizer: Any, make_config: Any
) -> None:
    from mlflow.entities import Metric
    from mlflow.utils.validation import _validate_metric_name

    place = corpus.databases["mall"]
    asked = [ask("SELECT 1", level, place) for level in ("easy", "très dur!", "a+b", "x (y)")]
    scores = summarise(score(asked, [said("SELECT 1")] * 4, make_config()), make_config())
    metrics = {
        "tuned": {split: scores | {"pass@2": 0.5} for split in ("dev", "très dur #1!")},
        "base": dict.fromkeys(("dev", "très dur #1!"), scores),
        "objective": 0.5,
    }
    kept = final_scores(metrics, ["base", "tuned"], SQL)
    for name, value in kept.items():
        _validate_metric_name(name)
        assert isinstance(Metric(name, value, 0, 0).value, float)
    assert list(kept) == [
        *("score/execution_accuracy", "score/valid_sql", "score/pass_2"),
        *("score/execution_accuracy_base", "score/très dur _1_/execution_accuracy"),
        *("score/très dur _1_/execution_accuracy_base", "score/validation"),
    ], "the main score first; counts, levels and databases stay in the files"


def test_predictions_are_written_one_a_line(judged: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [judged[0] | {"question": "a\u2028b\nc — é"}, *judged[1:]]
    (tmp_path / "p.jsonl").write_text(json_lines(rows), encoding="utf-8")
    text = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.removesuffix("\n").split("\n")] == rows


def test_exact_set_match_is_a_second_score_where_the_schema_is_known(
    corpus: Corpus, make_config: Any
) -> None:
    place = corpus.databases["mall"]
    cases = [
        (
            "SELECT name FROM customer WHERE id = 1",
            "SELECT name FROM customer WHERE id = 2",
            "easy",
        ),  # values do not count
        ("SELECT COUNT(*) FROM customer", "SELECT 4", "easy"),  # right, but built otherwise
        ("SELECT title FROM product", "SELECT title FRM product", "hard"),
        ("SELECT title FROM product", None, "hard"),
        ("SELECT x FROM nowhere", "SELECT x FROM nowhere", "hard"),  # failing gold is not counted
    ]
    asked = [ask(gold, hardness, place) for gold, _, hardness in cases]
    judged = score(asked, [said(one) for _, one, _ in cases], make_config(), corpus.schemas)
    assert [row["exact_set_match"] for row in judged] == [True, False, False, False, False]
    assert [row["verdict"] for row in judged[:2]] == ["wrong", "correct"]
    scores = summarise(judged, make_config())
    assert (scores["exact_set_match"], scores["exact_set_match_n"], scores["exact_set_unread"]) == (
        1 / 4,
        4,
        3,
    )
    assert scores["exact_set_match_interval"][0] < 1 / 4 < scores["exact_set_match_interval"][1]
    assert [group["exact_set_match"] for group in scores["by_hardness"].values()] == [1 / 2, 0]
    assert scoring.headline(scores, SQL)["exact_set_match"] == 1 / 4
    without = summarise(
        score(asked, [said(one) for _, one, _ in cases], make_config()), make_config()
    )
    assert not [key for key in without if "exact_set" in key]


def test_soft_f1_is_measured_under_birds_rule(corpus: Corpus, make_config: Any) -> None:
    place = corpus.databases["mall"]
    cases = [
        (
            "SELECT name, city FROM customer ORDER BY id",
            "SELECT name FROM customer ORDER BY id",
            2 / 3,
        ),
        ("SELECT title FROM product", "SELECT title FROM product", 1),
        ("SELECT title FROM product", "SELECT nothing FROM product", 0),
    ]
    config = make_config(**{"evaluate.semantics": "bird"})
    judged = score(
        [ask(gold, "easy", place) for gold, _, _ in cases],
        [said(one) for _, one, _ in cases],
        config,
    )
    assert [row["soft_f1"] for row in judged] == pytest.approx(
        [share for *_, share in cases], abs=1e-4
    )
    assert summarise(judged, config)["soft_f1"] == pytest.approx(5 / 9, abs=1e-4)
    assert (
        "soft_f1"
        not in score([ask("SELECT 1", "easy", place)], [said("SELECT 1")], make_config())[0]
    )


def test_right_queries_are_timed_against_their_gold(corpus: Corpus, make_config: Any) -> None:
    place = corpus.databases["mall"]
    slow = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) "
        "SELECT MAX(i) FROM n"
    )
    cases = [
        (slow, "SELECT 100000"),
        ("SELECT 100000", slow),
        ("SELECT 1", "SELECT 2"),
        ("SELECT 1", "SELECT"),
    ]
    asked, answers = (
        [ask(gold, "easy", place) for gold, _ in cases],
        [said(one) for _, one in cases],
    )
    config = make_config(**{"evaluate.semantics": "bird", "evaluate.ves_iterations": 3})
    judged = score(asked, answers, config)
    assert [row["ves_reward"] for row in judged] == [
        1.25,
        0.25,
        0,
        0,
    ]  # faster, slower, wrong, not SQL
    # R-VES takes the mean of the rewards' roots
    assert summarise(judged, config)["r_ves"] == pytest.approx((1.25**0.5 + 0.25**0.5) / 4)
    untimed = make_config(**{"evaluate.semantics": "bird"})
    assert "r_ves" not in summarise(score(asked, answers, untimed), untimed)
