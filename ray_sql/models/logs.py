"""Silence what the libraries say about themselves."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Silence the libraries; our own display says what matters to a user.

    It comes before the first use of transformers, because bitsandbytes writes its note on optional
    kernels while it is imported.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # transformers and peft still use the older name of activation checkpointing between themselves
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")


def import_bitsandbytes() -> None:
    """Import bitsandbytes without PyTorch's compiler, which takes it a second and a half.

    It compiles two functions that stand in for kernels it lacks. A CPU and a GPU have them. It
    comes before whatever else imports bitsandbytes, such as peft.
    """
    name = "TORCHDYNAMO_DISABLE"
    given = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import bitsandbytes  # noqa: F401
    finally:
        os.environ.pop(name)
        if given is not None:
            os.environ[name] = given
