"""From raw pairs and their database to a dataset's folder: the door of `ray-sql prepare`."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray_sql.config import PrepareConfig, absolute, strip_password
from ray_sql.curate import near, overview
from ray_sql.curate.choices import as_flags, choose
from ray_sql.curate.divide import across, divide
from ray_sql.curate.flags import KINDS, MEANING, Flag
from ray_sql.curate.pairs import Judged, Pair, judge, read
from ray_sql.curate.translated import Translated, translate
from ray_sql.data import descriptions, layouts, schema_texts
from ray_sql.data.columns import Source
from ray_sql.data.corpus import Corpus, Example, counted
from ray_sql.data.splits import only_as_train
from ray_sql.database import Executor, Limits, Schema, reflect
from ray_sql.display import Display
from ray_sql.errors import ConfigError, DataError
from ray_sql.metrics import how_little_is_known
from ray_sql.store.dataset_folder import DatasetFolder

SHOWN = 5
"""Rejected pairs that are shown in the terminal."""
FEW = 50
"""Pairs from which on a trained model says something."""
AS_THEY_CAME = "as they came"
OTHER = "held-out"
"""A name that would do for a split."""


@dataclass(frozen=True)
class Dataset:
    """Pairs in their splits, judged, and how they were divided."""

    judged: Judged
    splits: dict[str, list[Pair]]
    how: str
    translated: tuple[Translated, ...] = ()
    """Queries that were written for other databases."""


def prepare(config: PrepareConfig, *, goes_on: bool = False) -> dict[str, Any]:
    """Make a dataset as `config` says, and return what `dataset.json` holds.

    Nothing is written with `dry_run`, or where no pair can be used. If the caller `goes_on` with
    it, no next command is shown.
    """
    unknown = set(config.reject) - set(KINDS)
    if unknown:
        raise ConfigError(
            f"--reject {', '.join(sorted(unknown))}: no such kind; kinds are {', '.join(KINDS)}"
        )
    folder = DatasetFolder(absolute(config.output_dir) / config.output_name)
    sources = {"pairs": str(absolute(config.pairs)), "url": strip_password(config.url)}
    if config.translate_from:
        sources["translate_from"] = strip_password(config.translate_from)
    folder.require_ours(sources, config.overwrite)
    limits = Limits(
        seconds=config.evaluate.timeout,
        rows=config.evaluate.max_rows,
        bytes=config.evaluate.max_bytes,
        sql_length=config.evaluate.max_sql_length,
    )
    public = frozenset[str]().union(*(near.read_hashes(absolute(file)) for file in config.hashes))
    with Display() as display, Executor(config.evaluate.processes, limits) as executor:
        corpus = only_as_train(read(_source(config)))
        for note in corpus.notes:
            display.line(note)
        if len(corpus.splits) > 1:
            _require_names(corpus, config.pairs)
        _require_folders(corpus, config.cache)
        translated: tuple[Translated, ...] = ()
        if config.translate_from:
            corpus, translated = translate(corpus, config.translate_from, executor)
        judged = judge(corpus, executor, display, config.reject, config.fix)
        if not judged.pairs:
            raise DataError(f"--pairs {config.pairs}: {_no_pair(judged)}")
        dataset = replace(_divided(judged, config, public), translated=translated)
        record = _record(dataset, config, sources)
        for line in _lines(dataset):
            display.line(line)
        if config.dry_run:
            display.line(f"would write {folder.path}")
            return record
        _write(folder, dataset, record, config.cache, display)
        display.line(f"\ndataset   {folder.path}\nlook at   {folder.report}")
        pairs = record["counts"].get("train", 0)
        if pairs and not goes_on:
            display.line(f"next      {next_command(folder.path, pairs, record['splits'])}")
            fit = f"its settings fit {counted(pairs, 'training pair')}"
            display.line(f"          {fit}; without --dry_run it trains")
    return record


def next_command(folder: Path, pairs: int, splits: Sequence[str]) -> str:
    """Return the command that shows what a training on the dataset would do.

    Its settings are those of `ray-sql finetune pairs.csv shop.db` for as many training pairs.
    """
    flags = as_flags(choose(pairs, splits, f"{folder.name}-sql", folder))
    return shlex.join(["ray-sql", "finetune", *flags, "--dry_run"])


def _source(config: PrepareConfig) -> Source:
    token = config.read_token.get_secret_value() if config.read_token else None
    section = config.data.model_copy(update={"databases": config.url})
    return Source(config.pairs, "sql", section, config.cache, token, setting="--pairs")


def _require_names(corpus: Corpus, pairs: str) -> None:
    """Raise `DataError` for a split that the dataset's folder, or --split, would not find again."""
    where, way_out = "the file's name gives split", "rename it"
    if absolute(pairs).is_file():
        where, way_out = "column split holds", "write another there"
    used = {split: examples for split, examples in corpus.splits.items() if examples}
    for number, (split, examples) in enumerate(used.items()):
        reason, name = _unfit(split, [*used][:number], "train" in used)
        if reason:
            raise DataError(
                f"{examples[0].place}: {where} {split[:60]!r}; {reason}; {way_out}, such as {name}"
            )


def _unfit(split: str, earlier: Sequence[str], is_trained: bool) -> tuple[str, str]:
    """Say what is wrong with a split's name, "" for nothing, and give one that would do."""
    if meant := layouts.alike(split, earlier):
        unlike = layouts.how_unlike(split, meant)
        return f"it differs from {meant!r} {unlike}, and on some systems both are one file", OTHER
    if not is_trained and layouts.alike(split, ["train"]):
        return "training looks for 'train', which differs in case alone", "train"
    if not layouts.is_file_name(split):
        return "no file can be called so on every system", OTHER
    if not layouts.is_found_again(split):
        return ("by that name these pairs would not be found again, as a file or by --split", OTHER)
    return "", ""


def _require_folders(corpus: Corpus, cache: Path) -> None:
    """Raise `DataError` for a database whose copy would lie elsewhere, or on some systems not."""
    copied = _copied(corpus, cache)
    for one in (one for examples in corpus.splits.values() for one in examples):
        if one.db_id in copied and not layouts.is_file_name(one.db_id):
            raise DataError(
                f"{one.place}: its database is called {one.db_id[:60]!r}, which cannot name the "
                "folder of its copy on every system; write another db_id there, or rename the file"
            )


def _copied(corpus: Corpus, cache: Path) -> dict[str, str]:
    """Return db_id → file of the databases that are copied: no server, and made of no text."""
    return {
        db_id: place
        for db_id, place in corpus.databases.items()
        if "://" not in place and not schema_texts.is_built(place, cache)
    }


def _no_pair(judged: Judged) -> str:
    shown = "; ".join(f"{row.place}: {row.reason}" for row in judged.rejected[:3])
    return f"none of {counted(len(judged.rejected), 'pair')} can be used: {shown}"


def _divided(judged: Judged, config: PrepareConfig, public: frozenset[str]) -> Dataset:
    """Return the pairs in `train` and `dev`, or in the splits that they came in."""
    pairs = judged.pairs
    groups = near.groups([pair.example for pair in pairs], judged.corpus.schemas)
    names = list(dict.fromkeys(pair.split for pair in pairs))
    if set(names) == {"train"}:
        examples = [replace(pair.example, id=str(n)) for n, pair in enumerate(pairs)]
        (train, dev), how = divide(examples, groups, config.data, config.seed)
        splits = {"train": [pairs[int(one.id)] for one in train]}
        if dev:
            splits["dev"] = [pairs[int(one.id)] for one in dev]
    else:
        splits = {name: [pair for pair in pairs if pair.split == name] for name in names}
        how = AS_THEY_CAME
    numbers = dict(zip(map(id, pairs), groups, strict=True))
    close = across([[numbers[id(pair)] for pair in rows] for rows in splits.values()])
    flagged = {
        split: [_with_flags(pair, numbers[id(pair)] in close, public) for pair in rows]
        for split, rows in splits.items()
    }
    return Dataset(judged, flagged, how)


def _with_flags(pair: Pair, is_close: bool, public: frozenset[str]) -> Pair:
    """Return a pair with what is known of it beside the others."""
    more = [Flag("near_duplicate", "a pair of another split is almost alike")] * is_close
    if public and any(one in public for one in near.hashes(pair.example)):
        more.append(Flag("public", "is in a file of --hashes"))
    return replace(pair, flags=(*pair.flags, *more))


def _record(dataset: Dataset, config: PrepareConfig, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `dataset.json` holds beside its mark."""
    corpus = dataset.judged.corpus
    places = list(corpus.databases.values())
    splits = {split: tuple(pair.example for pair in rows) for split, rows in dataset.splits.items()}
    used = {one.db_id for rows in splits.values() for one in rows}
    schemas = {db_id: schema for db_id, schema in corpus.schemas.items() if db_id in used}
    pairs = [pair for rows in dataset.splits.values() for pair in rows]
    server = config.url if any("://" in place for place in places) else None
    counts = {
        "rejected": len(dataset.judged.rejected),
        "fixed": sum(bool(pair.before) for pair in pairs),
        **({"translated": len(dataset.translated)} if config.translate_from else {}),
        "flagged": sum(bool(pair.flags) for pair in pairs),
        "databases": len(used),
    }
    sizes = {
        f"split {split}" if split in counts else split: len(rows)
        for split, rows in dataset.splits.items()
    }
    return {
        "finished": True,
        "sources": dict(sources),
        "server": strip_password(server),
        "counts": sizes | counts,
        "splits": list(dataset.splits),
        "divided": dataset.how,
        "fingerprint": replace(corpus, splits=splits, schemas=schemas).fingerprint(),
        "settings": {
            "columns": config.data.columns,
            "test_fraction": config.data.test_fraction,
            "split_by": config.data.split_by,
            "seed": config.seed,
            "fix": config.fix,
            "reject": list(config.reject),
        },
    }


def _lines(dataset: Dataset) -> Iterator[str]:
    """Yield what became of the pairs, for the terminal."""
    judged = dataset.judged
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in dataset.splits.items())
    pairs = [pair for rows in dataset.splits.values() for pair in rows]
    yield f"pairs     {len(pairs)} kept ({sizes}), {len(judged.rejected)} rejected"
    yield f"divided   {dataset.how}"
    if "dev" not in dataset.splits and len(dataset.splits) == 1:
        yield "          nothing is set aside for scoring; raise --data.test_fraction"
    elif dataset.how != AS_THEY_CAME and (few := how_little_is_known(len(dataset.splits["dev"]))):
        yield f"          {few}; raise --data.test_fraction, or write more"
    if len(pairs) < FEW:
        yield f"          {FEW} pairs are the least that a training learns from; write more"
    for row in judged.rejected[:SHOWN]:
        yield f"rejected  {Path(row.place).name}: {row.reason}"
        if row.fix is not None:
            yield f"          {row.fix.how}{': ' * bool(row.fix.sql)}{row.fix.sql}"
    if len(judged.rejected) > SHOWN:
        yield f"          … {len(judged.rejected) - SHOWN} more in rejected.jsonl"
    clear = sum(row.fix is not None and row.fix.is_clear for row in judged.rejected)
    if clear:
        yield f"          --fix would take the nearest query for {counted(clear, 'pair')}"
    if dataset.translated:
        yield (
            f"translated {counted(len(dataset.translated), 'pair')}: each query gives the rows "
            "that it gave; audit.json lists them as they were"
        )
    fixed = sum(bool(pair.before) for pair in pairs)
    if fixed:
        yield f"fixed     {counted(fixed, 'pair')}, listed in audit.json as they were before"
    counts = Counter(flag.kind for pair in pairs for flag in pair.flags)
    for kind, count in counts.most_common():
        yield f"flagged   {count:>4}  {kind}: {MEANING[kind]}"
    for reason in judged.unexamined:
        yield f"          not tried in another order: {reason}"


def _write(
    folder: DatasetFolder,
    dataset: Dataset,
    record: Mapping[str, Any],
    cache: Path,
    display: Display,
) -> None:
    """Write the folder; `dataset.json` says last that it is whole."""
    corpus = dataset.judged.corpus
    shown = [_described(corpus, db_id, record, display) for db_id in sorted(_used(dataset))]
    folder.begin(record["sources"], dataset.splits)
    used = _used(dataset)
    files = {db_id: file for db_id, file in _copied(corpus, cache).items() if db_id in used}
    progress = display.counter("writing databases")
    for number, (db_id, place) in enumerate(files.items(), 1):
        folder.copy_database(db_id, Path(place))
        progress(number, len(files))
    for split, rows in dataset.splits.items():
        folder.write_lines(folder.split(split), [_row(pair) for pair in rows])
    folder.write_lines(folder.rejected, [row.row() for row in dataset.judged.rejected])
    folder.write_audit(audit_of(dataset))
    folder.offer_descriptions(descriptions.template(shown))
    folder.write_report(
        overview.page(folder.path.name, record, corpus.schemas, dataset.splits, dataset.judged)
    )
    folder.write_record(record)


def _used(dataset: Dataset) -> set[str]:
    return {pair.example.db_id for rows in dataset.splits.values() for pair in rows}


def _described(corpus: Corpus, db_id: str, record: Mapping[str, Any], display: Display) -> Schema:
    """Return a schema with all that the files beside its origin, and its comments, say of it."""
    schema, place = corpus.schemas[db_id], corpus.databases.get(db_id)
    if place is not None and schema.dialect != "sqlite":
        schema = reflect(place, db_id, comments=True)
    sources = descriptions.Sources.of(place, record["sources"]["pairs"])
    described, notes = descriptions.describe(schema, sources, sys.maxsize)
    for note in notes:
        display.line(note)
    return described


def _row(pair: Pair) -> dict[str, Any]:
    """Return a pair as a line of a split's file."""
    one = pair.example
    status = "flagged" if pair.flags else "checked"
    if pair.before:
        status = "fixed"
    values = {
        "id": one.id,
        "db_id": one.db_id,
        "question": one.question,
        "query": one.gold,
        "queries": [one.gold, *one.other_golds] if one.other_golds else None,
        "evidence": one.evidence,
        "hardness": one.hardness,
        "schema": one.schema_text,
        "source": one.place,
        "status": status,
    }
    return {name: value for name, value in values.items() if value}


def audit_of(dataset: Dataset) -> dict[str, Any]:
    """Return what `audit.json` holds: counts by kind, and each pair that has a flag or a fix."""
    counts = Counter[str]()
    listed: list[dict[str, Any]] = []
    fixed: list[dict[str, str]] = []
    for split, rows in dataset.splits.items():
        for pair in rows:
            counts.update(flag.kind for flag in pair.flags)
            if pair.flags:
                listed.append(flagged_row(split, pair.example, pair.flags))
            if pair.before:
                one = pair.example
                fixed.append({"split": split, "id": one.id, "before": pair.before, "now": one.gold})
    return {
        "of": "gold",
        "n": sum(map(len, dataset.splits.values())),
        "flagged": len(listed),
        "counts": dict(counts.most_common()),
        "not_reordered": dataset.judged.unexamined,
        "questions": listed,
        "fixed": fixed,
        "translated": [asdict(one) for one in dataset.translated],
    }


def flagged_row(split: str, example: Example, flags: Sequence[Flag]) -> dict[str, Any]:
    """Return an entry of `audit.json` about one query."""
    return {
        "split": split,
        "id": example.id,
        "db_id": example.db_id,
        "question": example.question,
        "query": example.gold,
        "flags": [asdict(flag) for flag in flags],
    }
