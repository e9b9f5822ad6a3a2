"""Candidates: the same whatever is computed together, and drawn from the model's distribution."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from ray_sql.generate import Question
from ray_sql.generate.answers import Decoding, answer_questions
from ray_sql.generate.ends import Ends
from ray_sql.generate.sampling import Sampling
from ray_sql.generate.wanted import LIKELIEST, Wanted
from ray_sql.models import load_tokenizer
from tests.test_shared_generation import adapted, build, question, several, told

LIMIT = 16


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def sharpened(family: str, vocabulary: int) -> Any:
    """Return a random model with likely tokens, so that some candidates agree for a while."""
    model = adapted(build(family, vocabulary))
    model.generation_config.eos_token_id = list(range(0, vocabulary, 23))
    return model


def drawn_one_by_one(
    model: Any, tokenizer: Any, asked: Question, sampling: Sampling
) -> list[tuple[str, float]]:
    """Return each candidate's text and log-probability, a whole forward pass for each token."""
    ends = Ends(model, tokenizer, asked.input_ids)
    numbers = sampling.numbers(asked.input_ids, LIMIT)
    candidates = []
    for candidate in range(sampling.samples):
        tokens: list[int] = []
        logprob = 0.0
        while len(tokens) < LIMIT and not (tokens and ends(tokens)):
            with torch.no_grad():
                logits = model(torch.tensor([asked.input_ids + tokens])).logits[:, -1]
            number = numbers[len(tokens), candidate].view(1, 1)
            token = int(sampling.draw(logits, number))
            logprob += float(logits[0].log_softmax(-1)[token])
            tokens.append(token)
        candidates.append((ends.text(ends.cut(tokens)), logprob))
    return candidates


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt_neox", "gemma4_text", "qwen3_5_text", "bloom"],  # the last cannot share
)
def test_candidates_are_those_of_drawing_one_by_one(tokenizer: Any, family: str) -> None:
    model = sharpened(family, len(tokenizer))
    asked = several(len(tokenizer))[:8]
    greedy = told(answer_questions(model, tokenizer, asked, Decoding(LIMIT, batch_size=3)))
    for sampling in (Sampling(5, 0.7, seed=3), Sampling(3, 1.3, top_p=0.8)):
        alone = [drawn_one_by_one(model, tokenizer, each, sampling) for each in asked]
        assert len({text for candidates in alone for text, _ in candidates}) > 8
        for max_num_seqs in (None, 1, 3):
            decoding = Decoding(LIMIT, 3, max_num_seqs, sampling=sampling)
            answers = answer_questions(model, tokenizer, asked, decoding)
            assert told(answers) == greedy
            for answer, candidates in zip(answers, alone, strict=True):
                assert [one.raw for one in answer.candidates] == [text for text, _ in candidates]
                logprobs = [one.logprob for one in answer.candidates]
                assert logprobs == pytest.approx([logprob for _, logprob in candidates], abs=1e-3)


def test_more_candidates_begin_with_those_of_fewer_and_the_order_changes_none(
    tokenizer: Any,
) -> None:
    model = sharpened("llama", len(tokenizer))
    asked = several(len(tokenizer))[:6]

    def candidates(questions: list[Question], samples: int, seed: int = 1) -> list[list[str]]:
        decoding = Decoding(LIMIT, sampling=Sampling(samples, seed=seed))
        answers = answer_questions(model, tokenizer, questions, decoding)
        return [[one.raw for one in answer.candidates] for answer in answers]

    eight = candidates(asked, 8)
    assert [texts[:4] for texts in eight] == candidates(asked, 4)
    assert candidates(asked[::-1], 8)[::-1] == eight
    assert candidates(asked[2:3], 8) == eight[2:3]
    assert candidates(asked, 8, seed=2) != eight


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.9)])
def test_candidates_have_the_distribution_of_the_model(
    tokenizer: Any, temperature: float, top_p: float
) -> None:
    from transformers import TopPLogitsWarper

    model = sharpened("llama", len(tokenizer))
    prompt = list(range(5, 25))
    draws = 2_000
    decoding = Decoding(1, sampling=Sampling(draws, temperature, top_p, seed=4))
    (answer,) = answer_questions(model, tokenizer, [question("a", prompt)], decoding)
    counts = Counter(one.raw for one in answer.candidates)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[:, -1] / temperature
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(torch.tensor([prompt]), logits)
    ends = Ends(model, tokenizer, prompt)
    expected: Counter[str] = Counter()
    for token, probability in enumerate(logits.softmax(-1)[0].tolist()):
        expected[ends.text(ends.cut([token]))] += probability * draws
    assert not counts.keys() - {text for text, count in expected.items() if count}
    common = [text for text, count in expected.items() if count >= 5]
    seen = [counts[text] for text in common]
    wanted = [expected[text] for text in common]
    seen.append(draws - sum(seen))
    wanted.append(draws - sum(wanted))
    if wanted[-1] < 5:
        wanted[-2] += wanted.pop()
        seen[-2] += seen.pop()
    assert len(common) > 3
    assert chisquare(seen, wanted).pvalue > 0.001


def test_candidates_that_agree_are_computed_once(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_sql.generate import decoder

    model = sharpened("llama", len(tokenizer))
    asked = several(len(tokenizer))[:6]
    rows: list[int] = []
    forward = decoder.Decoder.forward
    monkeypatch.setattr(
        decoder.Decoder,
        "forward",
        lambda self, slots, *args, **options: (
            rows.append(len(slots)) or forward(self, slots, *args, **options)
        ),
    )
    decoding = Decoding(LIMIT, sampling=Sampling(16, temperature=1e-3))  # all as the greedy one
    answers = answer_questions(model, tokenizer, asked, decoding)
    for answer in answers:
        assert {one.raw for one in answer.candidates} == {answer.raw}
    assert max(rows[1:]) == len(asked), "the first pass is the probe's"


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_where_no_likely_token_is_allowed_a_letter_is(device: str) -> None:
    size = LIKELIEST + 100
    logits = torch.linspace(1, 0, size, device=device)  # the first token is the likeliest
    first, second = size - 2, size - 1
    wanted = Wanted(allows=lambda _, tokens: tokens[-1] in (first, second), letters=(second, first))
    assert wanted.allowed(0, 1, [], 0, logits, []) == first
    assert Wanted(allows=wanted.allows).allowed(0, 1, [], 0, logits, []) == 0
