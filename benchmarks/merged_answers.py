"""Ask a run's questions of its adapter over the base, and of the model that merges both.

    python -m benchmarks.merged_answers --output_name demo       (--bfloat16: as it is published)

The merged model is written as `ray-sql publish --hub.merge` does, into a folder that is removed
afterwards. Both answer the same questions on this machine, computed together in the same way. In
float32 nothing but the order of sums is between them, so the answers must be equal. In bfloat16 the
merged weights are rounded, and so is every product. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from ray_sql import data, models, tracking
from ray_sql.config import ServeConfig, load
from ray_sql.display import Display
from ray_sql.evaluate.linker import asked_links
from ray_sql.evaluate.models import evaluate_models, scored_questions
from ray_sql.metrics.judged import is_right
from ray_sql.publish import merge
from ray_sql.report.progress import Progress
from ray_sql.serve.recipe import find
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_name", default="demo", help="a finished run")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--bfloat16", action="store_true", help="merge and compute in bfloat16")
    given = parser.parse_args(argv)
    run = Path(given.output_dir).absolute() / given.output_name
    dtype = "bfloat16" if given.bfloat16 else "float32"
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch, Display() as display:
        copy = Path(scratch) / run.name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-*", "merged"))
        found = find(load(ServeConfig, [], output_name=run.name, output_dir=scratch))
        config = found.config.changed(
            {"hub.merged_dtype": dtype, "train.bf16": given.bfloat16, "evaluate.max_num_seqs": 32}
            | {"evaluate.baseline": False}
        )
        folder = RunFolder(str(copy))
        merge.merged(config, folder, display)
        base, _ = models.resolve(config.model_name, config.cache, None, None)
        corpus = data.load_split(config, config.split)
        links = asked_links(config, corpus, display)
        asked = scored_questions(corpus, models.load_tokenizer(base), config, links)
        asked = random.Random(14).sample(asked, k=min(given.questions, len(asked)))
        schemas = corpus.judged_schemas(TASKS[config.task_type])
        progress = Progress(folder, tracking.null_run(), display)
        plain = config.changed({"quantization.load_in_4bit": False})
        whole = folder.place("merged")
        by = {
            "adapter": evaluate_models(
                config, asked, schemas, base, folder.adapter.uri, display, progress
            )["tuned"],
            "merged": evaluate_models(plain, asked, schemas, whole, None, display, progress)[
                "base"
            ],
        }
    answers = {name: [row["predicted"] for row in rows] for name, rows in by.items()}
    print(
        json.dumps(
            {
                "n": len(asked),
                "dtype": dtype,
                "same": sum(map(str.__eq__, answers["adapter"], answers["merged"])),
                **{f"right_{name}": sum(map(is_right, rows)) for name, rows in by.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
