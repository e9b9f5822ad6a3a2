"""The notebook goes from data to an answer in a kernel, here with a tiny model and a few steps."""

from __future__ import annotations

import re
import shutil
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.waiting import HANGS

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
PLAN = """\
data      demo, fingerprint ..., 10 databases
          seen: 112 questions on 8 databases, 8 of them also in train; 0 questions also in train
          unseen: 72 questions on 2 databases, 0 of them also in train; 0 questions also in train
gold      every query runs
rows      670 rows, ... tokens (11 % carry the loss); length: ...
sharing   up to 4 questions in a row with their schema: ...
compute   ...
training  2 steps of 8 examples (1 x 8 x 1 workers), a checkpoint at the end
...
scoring   base and tuned model on 4 of seen, 4 of unseen, semantics spider
...
run       {place}/out/quickstart
"""
SAID = {
    "data": f"""\
reading data: 854/854
--- prompt ---
<|start|>system
You write SQL. ...
Schema:
...
--- answer (carries the loss) ---
```sql
SELECT ...
```<|end|>
--- plan ---
{PLAN}""",
    "training": f"""\
{PLAN}first step after ... s: ...
training: 1/2  loss ...
training: 2/2  loss ...
step 2: checkpoint saved
best      checkpoint-2 of 2 steps, the last one: no validation questions to choose by
answering with base: 8/8
answering with tuned: 8/8
executing base's SQL: 8/8
executing tuned's SQL: 8/8
quickstart: execution accuracy, spider semantics [95 % interval]
...
│ seen   │ execution accuracy │ 4 │ 0.0 % [0.0, 49.0] │ 0.0 % [0.0, 49.0] │
...
│ unseen │ execution accuracy │ 4 │ 0.0 % [0.0, 49.0] │ 0.0 % [0.0, 49.0] │
...
time         ... s, of them training ... s
adapter      {{place}}/out/quickstart/adapter
predictions  {{place}}/out/quickstart/predictions.jsonl
report       {{place}}/out/quickstart/report.html
MLflow run   ...
look         ray-sql ui
ask          ray-sql ask "YOUR QUESTION" --output_name quickstart --database bookshop
publish      ray-sql publish --output_name quickstart --hub.repo_id YOU/quickstart --dry_run
""",
    "scores": """\
seen: 0.0% [0.0%, 49.0%] of 4, base model 0.0%
unseen: 0.0% [0.0%, 49.0%] of 4, base model 0.0%
""",
    "asking": """\
...
note: the answer was cut off at max_new_tokens 8
... s
""",
}
"""Part of the notebook → what its cell says of a random model, which answers nothing rightly."""


def outputs(cell: Any, stream: str) -> str:
    """Return what a cell wrote to a stream, without waits, which depend on the machine."""
    written = "".join(out.text for out in cell.outputs if out.get("name") == stream)
    return re.sub(r"^starting: .*\n", "", written, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_cells_of_the_notebook_say_what_they_did(
    tiny_model: Path, empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))  # those of a user stay as they are
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    smaller = {
        'model_name="demo"': f'model_name="{tiny_model}", cache_dir="{tmp_path}/cache"',
        "num_epochs=2": "num_epochs=0.02",
        '"max_new_tokens": 96': '"max_new_tokens": 8, "limit": 4',
    }
    for whole, part in smaller.items():
        assert whole in cells[0].source
        cells[0].source = cells[0].source.replace(whole, part)
    place = tmp_path / "work"
    place.mkdir()
    shutil.copy(empty_mlflow, place / "mlflow.db")
    NotebookClient(notebook, timeout=HANGS, resources={"metadata": {"path": str(place)}}).execute()

    checker = OutputChecker()
    for (part, wanted), cell in zip(SAID.items(), cells, strict=True):
        assert {output.output_type for output in cell.outputs} == {"stream"}, part
        assert outputs(cell, "stderr") == "", part
        said, wanted = outputs(cell, "stdout"), wanted.format(place=place)
        assert checker.check_output(wanted, said, ELLIPSIS), f"{part}: {said}"
