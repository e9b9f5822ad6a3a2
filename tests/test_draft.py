"""Guesses repeat tokens that followed before, and make fewer passes for the same answers."""

from pathlib import Path
from typing import Any

import pytest

from ray_sql.generate import decoder
from ray_sql.generate.answers import Decoding, answer_questions
from ray_sql.generate.draft import Draft
from ray_sql.models import load_tokenizer
from tests.test_shared_generation import build, one_by_one, several, told


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([], []),
        ([1, 2, 3], []),  # nothing was alike
        ([1, 2, 3, 1], [2, 3, 1, 2]),  # what followed the last 1, and then the same again
        ([1, 2, 3, 9, 2, 3], [9, 2, 3, 9]),
        (
            [5, 2, 3, 7, 2, 3, 8, 5, 2, 3],
            [7, 2, 3, 8],
        ),  # three tokens alike tell more than the two seen last
        ([4, 4], [4, 4, 4, 4]),
    ],
)
def test_a_guess_is_what_came_last_time(tokens: list[int], guess: list[int]) -> None:
    assert Draft(tokens).guess(4) == guess
    assert Draft(tokens).guess(0) == []


def test_what_repeats_itself_is_answered_in_fewer_passes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    tokenizer = load_tokenizer(str(tiny_model))
    model = build("llama", len(tokenizer))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(
                    0.02
                )  # hardly changes what it is given, and so says the same again and again
    asked = several(len(tokenizer))[:6]
    alone = one_by_one(model, tokenizer, asked, 40)
    assert max(length for _, _, length in alone) == 40
    passes: list[Any] = []
    forward = decoder.Decoder.forward
    monkeypatch.setattr(
        decoder.Decoder,
        "forward",
        lambda *args, **given: (passes.append(1), forward(*args, **given))[1],
    )
    assert told(answer_questions(model, tokenizer, asked, Decoding(40))) == alone
    guessed = len(passes)
    monkeypatch.setattr(decoder, "MAX_GUESSES", 0)
    assert told(answer_questions(model, tokenizer, asked, Decoding(40))) == alone
    assert 3 * guessed < 2 * (len(passes) - guessed)
