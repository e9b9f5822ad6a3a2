"""Try regular expressions of an adapter on a model's modules, where they can be stopped.

A short one may take longer than anybody lives, and PEFT tries each on every module's name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ray_sql.errors import ModelError

FIELDS = (
    *("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"),
    *("rank_pattern", "alpha_pattern"),
)
"""Settings of PEFT that are matched as regular expressions, or whose keys are."""
SECONDS = 10.0
PLAIN = re.compile(r"[\w.-]*")
"""A name, which matches at once."""
TRY = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    whole = re.compile(rf"(.*\.)?({pattern})(\..*)?$")
    for name in names:
        re.fullmatch(pattern, name), whole.match(name)
"""
"""Runs in a process of its own, with the forms in which PEFT uses a pattern."""


def check_patterns(settings: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    """Raise `ModelError` if a pattern in an adapter's settings is none, or takes too long.

    `names` are those of the model's modules; `place` is where the settings come from.
    """
    for field in FIELDS:
        _check(_texts(settings.get(field)), names, f"{place}: {field}")


def _texts(value: Any) -> list[str]:
    """Return the texts of a setting that is one, or a list or mapping of them."""
    given = [value] if isinstance(value, str) else list(value or ())
    return [text for text in given if isinstance(text, str) and not PLAIN.fullmatch(text)]


def _check(patterns: Sequence[str], names: Sequence[str], where: str) -> None:
    if not patterns:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRY],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{where} {patterns[0][:100]!r}: a regular expression that takes over {SECONDS:g} s on "
            "this model's modules; name them in a list"
        ) from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(
            f"{where} {patterns[0][:100]!r}: no regular expression ({reason[0][:200]}); correct it"
        )
