"""The settings of jobs that make a dataset of one's own, and judge its queries."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ray_sql.config.base import JobConfig
from ray_sql.config.sections import AnswersSection, DataSection

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LIMITS = {
    f"evaluate.{name}"
    for name in ("timeout", "max_rows", "max_bytes", "max_sql_length", "processes")
}
"""Settings of `evaluate` by which a single query is executed."""


class _CurationConfig(JobConfig):
    """Settings of jobs that execute gold queries without a model."""

    hashes: tuple[str, ...] = ()
    """Name questions that are in public test sets, by these files of hashes. `ray-sql audit` makes
    one (`write_hashes`)."""
    data: DataSection = DataSection()
    evaluate: AnswersSection = AnswersSection()

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out the settings of models, trainings and remote stores."""
        left_out = {"scaling.storage_path", "write_token"}
        left_out |= {"data.validation_fraction", "data.limit"}
        return {
            name
            for name in super().shown() - left_out
            if name in LIMITS or not name.startswith("evaluate.")
        }


class PrepareConfig(_CurationConfig):
    """Settings of a dataset that is made of raw pairs and their databases."""

    output_name: str = Field(
        "dataset", pattern=NAME, description="Name the dataset, and its folder under output_dir."
    )
    pairs: str
    """Read questions and their SQL from this file or folder: CSV, TSV, Excel, JSON, JSON lines,
    Parquet, or a published dataset's folder."""
    url: str | None = None
    """Find their databases here: a SQLite or DuckDB file, a folder of such files, or an SQLAlchemy
    URL. By default they lie beside the pairs."""
    translate_from: str | None = None
    """Translate queries that are written for the databases here (as `url`) into the SQL of those of
    `url`. A pair is kept where both give the same rows."""
    fix: bool = False
    """Take the nearest query that runs for one that does not, where only one is near."""
    reject: tuple[str, ...] = ("does_not_run",)
    """Reject pairs of which the audit says this, e.g. `limit_tie`. All others are kept and
    flagged."""
    seed: int = Field(14, ge=0, lt=2**32)
    """Draw what is set aside for scoring with this seed."""
    overwrite: bool = False
    """Replace a dataset of other sources that has the same name."""

    @model_validator(mode="after")
    def _check_databases(self) -> Self:
        if self.data.databases:
            raise ValueError("data.databases: a dataset takes its databases from url; give --url")
        return self

    @classmethod
    def shown(cls) -> set[str]:
        """Leave out what has a name of its own here."""
        return super().shown() - {"data.databases", "data.bad_rows"}


class AuditConfig(_CurationConfig):
    """Settings of an audit of gold queries, or of predictions."""

    output_name: str = Field(
        "audit", pattern=NAME, description="Name the audit, and its folder under output_dir."
    )
    dataset_id: str
    """Read questions from this file, folder or Hub dataset, or `demo`."""
    split: tuple[str, ...] = ()
    """Judge the queries of these splits. By default of all."""
    predictions_file: str | None = None
    """Judge the predictions in this file instead of the gold queries."""
    write_hashes: str | None = None
    """Judge nothing. Write the hashes of the questions and their SQL into this file, for
    `hashes`."""
