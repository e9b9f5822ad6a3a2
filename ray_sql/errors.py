"""Errors that a user can fix: one family, shown as one line without a traceback, exit code 2.

Everything else keeps its traceback, because everything else is our bug.
"""

FULL_MEMORY = ("out of memory", "can't allocate memory", "outofmemory", "memoryerror")
"""Words in which CUDA, torch's CPU allocator and Python say that memory is full."""


def last_line(error: BaseException) -> str:
    """Return the last line of another library's error, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class RaySqlError(Exception):
    """Something the user can fix. The message says what, where and the way out."""


class ConfigError(RaySqlError):
    """A setting that is unknown, malformed, or that contradicts another one."""


class DataError(RaySqlError):
    """A dataset, database or predictions file that is missing or malformed.

    The message names the file and the field.
    """


class DamagedFile(DataError):
    """A file that cannot be read as what it should be: `files` raises it."""


class NotUtf8(DamagedFile):
    """A file whose bytes are no text in UTF-8."""


class ModelError(RaySqlError):
    """A model, adapter or checkpoint that cannot be loaded or does not fit the run."""


class ContractError(RaySqlError):
    """An adapter used with another prompt, schema, tokenizer or base model than in training."""


class TrainingError(RaySqlError):
    """A training run that cannot go on: a diverging loss, a worker lost for good."""


class TakenOver(TrainingError):
    """A run that another driver, of the same command, goes on with."""


class OutOfMemory(TrainingError):
    """A forward pass for which a worker has no memory."""


class StoreError(RaySqlError):
    """A folder, a server, the Hub or Ray, that cannot be reached, written or started."""


def out_of_memory(error: BaseException | None) -> bool:
    """Tell whether memory was full, on a GPU or a machine, in this process or in a worker.

    The error may say so itself, or come from one that does.
    """
    while error is not None:
        if isinstance(error, RaySqlError):
            return isinstance(error, OutOfMemory)
        if isinstance(error, MemoryError) or says_full(f"{type(error).__name__} {error}"):
            return True
        error = error.__cause__
    return False


def says_full(text: str) -> bool:
    """Tell whether a message is about full memory."""
    return any(sign in text.lower() for sign in FULL_MEMORY)
