"""The pre-flight check: whatever would stop a run later, found in seconds and without a GPU.

Every check is a function that returns what it found, or raises a `RaySqlError` that says what to do; each becomes one line.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ray_sql import checkpoints, models, prepare, publish, rows, tracking
from ray_sql.config import CheckConfig, Config, without_password
from ray_sql.display import Display
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.prepare import Prepared
from ray_sql.tune import study

GIB = 2**30


def run(config: CheckConfig) -> None:
    """Print one line per check and task; raises `RaySqlError` at the end if any failed, so that the job exits with 2."""
    tasks = config.studies()
    with Display() as display:
        failed = sum(_failed(display, one, name_it=len(tasks) > 1) for one in tasks)
    if failed:
        raise ConfigError(f"{failed} of {len(tasks) * (len(CHECKS) + 1 + len(PREPARED_CHECKS))} checks failed")


def _failed(display: Display, config: Config, name_it: bool) -> int:
    """How many checks of one task failed."""
    if name_it:
        display.line(f"--- {config.output_name} ---")
    failed = sum(not _line(display, name, check, config) for name, check in CHECKS.items())
    prepared = _prepare(display, config)
    if prepared is None:
        return failed + 1
    checks = {name: partial(check, prepared=prepared) for name, check in PREPARED_CHECKS.items()}
    return failed + sum(not _line(display, name, check, config) for name, check in checks.items())


def output(config: Config) -> str:
    """The run's place can be written, and its name is free or continues the same run."""
    if "://" not in config.run_dir:
        existing = next(p for p in (Path(config.run_dir), *Path(config.run_dir).parents) if p.exists())
        if not os.access(existing, os.W_OK):
            raise StoreError(f"{existing}: cannot be written; choose another --output_dir or --scaling.storage_path")
    probe = f"{config.run_dir}-probe-{uuid.uuid4().hex[:8]}"
    checkpoints.write_text(f"{probe}/probe", "x" * 4096)
    checkpoints.remove(probe)
    if checkpoints.exists(f"{config.run_dir}/{study.FILE}"):
        there = None if config.overwrite else study.load(config)
        holds = "a study of these settings" if there else ""
    else:
        holds = "a finished run of these settings" if prepare.earlier_run(config) is not None else ""
    return f"{config.run_dir} can be written{f' and holds {holds}' if holds else ''}"


def mlflow(config: Config) -> str:
    """The tracking store answers."""
    if not config.tracking.enabled:
        return "tracking is off"
    return f"{without_password(tracking.check(config.tracking.uri))} answers"


def tokens(config: Config) -> str:
    """The Hub knows the tokens that were given."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    given = {name: token for name in ("read_token", "write_token") if (token := getattr(config, name))}
    if not given:
        return "none given; public models and datasets only, and no publishing"
    try:
        users = {name: HfApi().whoami(token=token.get_secret_value())["name"] for name, token in given.items()}
    except HfHubHTTPError as error:
        raise ConfigError(
            f"the Hub refuses the token ({str(error).splitlines()[0]}); make a new one and set HF_TOKEN"
        ) from None
    except (
        Exception
    ) as error:  # no route, a proxy, a timeout: huggingface_hub passes on whatever its HTTP client raises
        raise StoreError(
            f"the Hub does not answer ({type(error).__name__}); check the network, or leave the tokens out"
        ) from None
    return ", ".join(f"{name} belongs to {user}" for name, user in users.items())


def hub(config: Config) -> str:
    """What is to be published can be: the token may write, and the repository is free or of the same base model."""
    return publish.check(config) if config.publishes else "nothing will be published (--publish)"


def resources(config: Config) -> str:
    """There are as many workers' resources as will be asked for, on this machine; on a cluster Ray waits for them."""
    import torch

    if config.scaling.num_workers == 0:
        return "trains in this process, without Ray"
    workers = f"{config.fewest_workers} to {config.workers}" if config.elastic else str(config.workers)
    if os.environ.get("RAY_ADDRESS"):
        return f"{workers} workers on the cluster at {os.environ['RAY_ADDRESS']}"
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    available, kind = (
        (gpus, "GPUs") if (gpus if config.scaling.use_gpu is None else config.scaling.use_gpu) else (cores, "cores")
    )
    if config.fewest_workers > available:
        raise ConfigError(
            f"--scaling.num_workers {workers}, but this machine has {available} {kind}; use at most {available}"
        )
    return f"{workers} workers, {available} {kind} here"


def data(config: Config, prepared: Prepared) -> str:
    """The splits, and which of them can be scored by execution: without databases a run trains, but gets no such score."""
    splits = ", ".join(f"{len(examples)} {split}" for split, examples in prepared.corpus.splits.items())
    without = [s for s in config.split if not any(map(prepared.corpus.executable, _databases(prepared, s)))]
    scored = f"; nothing can be executed on {', '.join(without)}, so it gets no score: name its databases with --data.databases"
    unscored = scored if without and config.task_type == "sql" else ""
    return f"{splits}; {len(prepared.gold_errors)} gold queries do not run{unscored}"


def lengths(config: Config, prepared: Prepared) -> str:
    """The length audit."""
    return prepared.audit.line()


def memory(config: Config, prepared: Prepared) -> str:
    """Estimated memory of one worker against what its device has."""
    import psutil
    import torch

    need = memory_estimate(config, prepared.model_folder, rows.heaviest_pass(rows.read(prepared.rows_file), config))
    if torch.cuda.is_available():
        have, where = torch.cuda.get_device_properties(0).total_memory, "GPU"
    else:
        have, where = psutil.virtual_memory().available // config.workers, "worker's share of memory"
    text = f"about {need / GIB:.1f} GiB needed, {have / GIB:.1f} GiB on the {where}"
    if need > have:
        raise ConfigError(
            f"{text}; lower --train_batch_size, --rows.row_length or --rows.max_length, or use --train.gradient_checkpointing"
        )
    return text


def memory_estimate(config: Config, model_folder: str, tokens: int) -> float:
    """Bytes one worker needs: weights, adapter with gradient and two Adam moments, activations and logits of a pass of `tokens`.

    Activations follow Korthikanti et al., arXiv 2205.05198: about 34 bytes per token, layer and hidden unit in 16 bits, without the
    attention matrix, which SDPA does not keep. With checkpointing one layer's worth and every layer's input stay.
    """
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(model_folder).get_text_config()
    hidden, layers, vocabulary = shape.hidden_size, shape.num_hidden_layers, shape.vocab_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    each = models.compute_dtype(config).itemsize
    stored = 0.56 if config.quantization.load_in_4bit else 0.0  # 4 bits, and a 32-bit scale for every 64 weights
    expanded = 0 if config.quantization.load_in_4bit and _has_gpu() else each  # on a CPU they are expanded once,
    if config.quantization.load_in_4bit and not _has_gpu():
        expanded += each  # and stand there a second time, with the adapter added, while questions are answered
    weights = linear * (stored + expanded) + 2 * each * vocabulary * hidden
    adapter = layers * config.lora.r * (8 * hidden + 3 * (hidden + inner))
    checkpointed = (
        config.train.gradient_checkpointing if config.train.gradient_checkpointing is not None else _has_gpu()
    )
    per_token = hidden * (34 + 2 * layers if checkpointed else 34 * layers)
    # on a CPU the attention of shared rows keeps its matrix (rows/attention.py): at most every pair of a pass's tokens
    matrices = 0 if _has_gpu() or rows.together(config) == 1 else (1 if checkpointed else layers)
    attention = matrices * shape.num_attention_heads * tokens**2 * each
    return float(weights + 16 * adapter + tokens * per_token + attention + 0.2 * tokens * vocabulary * 6)


def _databases(prepared: Prepared, split: str) -> set[str]:
    return {example.db_id for example in prepared.corpus.splits[split]}


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _prepare(display: Display, config: Config) -> Prepared | None:
    try:
        return prepare.prepare(config, display.counter("reading data"))
    except RaySqlError as error:
        display.line(f"FAIL  data and model: {error}")
        return None


def _line(display: Display, name: str, check: Callable[[Config], str], config: Config) -> bool:
    try:
        display.line(f"ok    {name}: {check(config)}")
    except RaySqlError as error:
        display.line(f"FAIL  {name}: {error}")
        return False
    return True


CHECKS: dict[str, Callable[[Config], str]] = {
    "output": output,
    "mlflow": mlflow,
    "tokens": tokens,
    "hub": hub,
    "resources": resources,
}
PREPARED_CHECKS: dict[str, Callable[..., str]] = {"data": data, "lengths": lengths, "memory": memory}
