"""The page "Your database in ten minutes" is true: every command of it is run, in its order."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from ray_sql.cli import main
from tests.conftest import QUESTIONS, make_spider_folder
from tests.test_field_data import make_shop

PAGE = Path(__file__).parent.parent / "docs" / "your-database.md"
CITIES = ("Lisbon", "Porto", "Faro", "Braga", "Coimbra", "Evora", "Aveiro", "Beja")


def commands() -> list[list[str]]:
    """Return the commands of the page as words, without `ray-sql`."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("ray-sql ")]


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shop(tmp_path / "shop.db")
    make_spider_folder(tmp_path / "data" / "spider")
    rows = [
        *QUESTIONS,
        *((f"Who lives in {c}?", f"SELECT name FROM customer WHERE city = '{c}'") for c in CITIES),
        *(
            (f"Products over {n}?", f"SELECT title FROM product WHERE price > {n}")
            for n in range(22)
        ),
        *((f"Days with {n} sold?", f"SELECT day FROM sale WHERE amount = {n}") for n in range(22)),
    ]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "sql"), *rows])
    (tmp_path / "predictions.sql").write_text("".join(f"{sql}\n" for _, sql in QUESTIONS))
    found = commands()
    assert {words[0] for words in found} == {"prepare", "finetune", "audit", "evaluate", "ask"}
    quick = (
        "--scaling.num_workers 0 --tracking.enabled false --train.max_steps 2 --train.bf16 false"
    )
    quick += " --lora.r 4 --lora.lora_alpha 8 --evaluate.max_new_tokens 8 --evaluate.processes 1"
    for job, *words in found:
        words = [str(tiny_model) if "Qwen" in word else word for word in words]
        if job == "finetune":
            words += quick.split()
            words += [] if "--model_name" in words else ["--model_name", str(tiny_model)]
        main(job, words)
    gold = json.loads((tmp_path / "out" / "scores" / "metrics.json").read_text())["file"]["dev"]
    assert gold["execution_accuracy"] == 1.0 and gold["unflagged"]["n"] == gold["n"] == 8
    assert (tmp_path / "out" / "shop-sql-2" / "adapter").is_dir()
