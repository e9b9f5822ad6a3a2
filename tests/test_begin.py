"""One line to begin: pairs and a database become a dataset, and a run with settings to fit."""

from __future__ import annotations

import csv
import shlex
from itertools import cycle
from pathlib import Path

import pytest
import yaml

from ray_sql import data
from ray_sql.cli import main
from ray_sql.config import Config, PrepareConfig, load
from ray_sql.curate import prepare
from ray_sql.curate.choices import as_yaml, choose
from ray_sql.curate.prepare import next_command
from ray_sql.errors import ConfigError, DataError
from ray_sql.finetune.begin import begin
from tests.conftest import QUESTIONS
from tests.test_field_data import make_shop


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a spreadsheet and a database, in which people work."""
    make_shop(tmp_path / "shop.db")
    with (tmp_path / "my pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "sql"), *QUESTIONS])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pairs_and_a_database_become_settings_of_a_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = begin(["my pairs.csv", "shop.db", "--lora.r", "8", "--num_epochs", "2"])
    config = load(Config, words)
    assert config.output_name == "my-pairs"
    assert config.dataset_id == str(place / "out" / "my-pairs-data")
    assert (config.num_epochs, config.lora.r, config.learning_rate) == (2, 8, 2e-4)
    said = capsys.readouterr().out
    assert "chosen    learning_rate 0.0002: " in said and "chosen    num_epochs" not in said
    assert "next " not in said
    assert (place / "out" / "my-pairs-data" / "finetune.yaml").is_file()


def test_flags_about_the_raw_pairs_are_not_the_runs(
    place: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("odd.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Frage / question", "sql"), *QUESTIONS])
    words = ["odd.csv", "shop.db", "--model_name", str(tiny_model), "--dry_run"]
    words += ["--cache_dir", str(place / "cache"), "--tracking.enabled", "false"]
    with pytest.raises(DataError, match=r"found 'Frage / question', sql\. Map it with"):
        begin(words)
    mapped = ["--data.columns", "question=Frage / question", "--fix", "--reject", "constant"]
    for _ in range(2):  # what a dry run leaves behind is not in the way of the next
        main("finetune", [*words, *mapped, "--scaling.num_workers", "0"])
        assert "--- plan ---" in capsys.readouterr().out
    (place / "odd.csv").rename("other.csv")
    words[0] = "other.csv"
    begin([*words, "--output_name", "odd", *mapped])


def test_a_dry_run_shows_the_plan_and_leaves_no_run(
    place: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shop.db", "my pairs.csv", "--model_name", str(tiny_model), "--dry_run"]
    words += ["--cache_dir", str(place / "cache"), "--scaling.num_workers", "0"]
    main("finetune", [*words, "--tracking.enabled", "false"])
    said = capsys.readouterr().out
    assert "--- plan ---" in said and "chosen    data.validation_fraction 0" in said
    assert not (place / "out").exists()


@pytest.mark.parametrize("pairs", [10, 100, 1_000, 100_000])
def test_what_is_chosen_is_a_file_of_settings(pairs: int, tmp_path: Path) -> None:
    choices = list(choose(pairs, ["train", "dev"], "x-sql", tmp_path / "x"))
    file = tmp_path / "f.yaml"
    file.write_text(as_yaml(choices))
    config = load(Config, ["--config", str(file)])
    assert all(config.setting(name) == value for name, value, _ in choices)
    assert len(yaml.safe_load(file.read_text())) == len(choices)
    words = shlex.split(next_command(tmp_path / "x", pairs, ["train", "dev"]))
    same = load(Config, words[2:-1]).model_dump(exclude={"config"})
    assert same == config.model_dump(exclude={"config"})


@pytest.mark.parametrize("words", [["shop.db"], ["a.csv", "b.csv"], ["a.csv", "a.db", "b.db"]])
def test_other_words_are_refused(place: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="give one file of pairs, and the database"):
        begin(words)


def test_a_database_beside_the_pairs_needs_no_name(place: Path) -> None:
    assert load(Config, begin(["my pairs.csv", "--output_name", "named"])).output_name == "named"
    assert (place / "out" / "named-data" / "databases" / "shop" / "shop.sqlite").is_file()


def test_prepares_next_command_trains_as_one_line_does(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(load(PrepareConfig, ["--pairs", "my pairs.csv", "--url", "shop.db"]))
    said = capsys.readouterr().out
    (words,) = [
        shlex.split(line)[1:] for line in said.splitlines() if line.startswith("next      ")
    ]
    assert words[:2] == ["ray-sql", "finetune"] and words[-1] == "--dry_run"
    assert "without --dry_run it trains" in said
    config = load(Config, words[2:-1])
    one_line = load(Config, begin(["my pairs.csv", "shop.db"]))
    names = {"config", "dataset_id", "output_name"}
    assert config.model_dump(exclude=names) == one_line.model_dump(exclude=names)
    assert config.num_epochs > 1 and config.evaluate.select_examples == 0


def test_pairs_to_score_only_have_no_training_next(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "asked").mkdir()
    (place / "my pairs.csv").rename(place / "asked" / "dev.csv")
    record = prepare(load(PrepareConfig, ["--pairs", "asked", "--url", "shop.db"]))
    assert "train" not in record["counts"] and "next " not in capsys.readouterr().out
    words = begin(["asked", "shop.db"])
    with pytest.raises(DataError, match="no training examples; found splits dev"):
        data.load(load(Config, words))


@pytest.mark.parametrize(
    ("named", "scored"),
    [
        ("train|test", "test"),
        ("train|dev|test", "dev"),
        ("train|test|validation", "dev"),
        ("train|hold-out", "hold-out"),
        ("train|held  out (b)", "held  out (b)"),
        ("train|Prüfung", "prüfung"),
        ("train|परीक्षण", "परीक्षण"),
        ("train|1e5|2024-01-31", "1e5"),
        ("train|no", "no"),
        ("train|$x;'`y`~", "$x;'`y`~"),
        ("train|flagged|fixed|databases|report", "flagged"),
        ("train|test|", "test"),
        ("train", "dev"),
    ],
)
def test_the_next_command_scores_a_split_that_is_there(
    place: Path, named: str, scored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (place / "my pairs.csv").open("w", newline="") as file:
        rows = [(*pair, split) for pair, split in zip(QUESTIONS, cycle(named.split("|")))]
        csv.writer(file).writerows([("question", "sql", "split"), *rows])
    flags = ["--data.test_fraction", "0.3"]
    record = prepare(load(PrepareConfig, ["--pairs", "my pairs.csv", "--url", "shop.db", *flags]))
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("next ")]
    for words in (shlex.split(line)[3:-1], begin(["my pairs.csv", "shop.db", *flags])):
        config = load(Config, words)
        assert config.split == (scored,)
        corpus = data.load(config)
        assert corpus.splits["train"] and corpus.splits[scored]
        again = data.load_split(config, record["splits"]).splits.values()
        assert sum(map(len, again)) + record["counts"]["rejected"] == len(QUESTIONS)
