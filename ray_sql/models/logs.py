"""Silence what the libraries say about themselves."""

from __future__ import annotations

import logging
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
