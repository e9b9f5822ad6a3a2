"""Answers over a shared prefix are those of one-by-one greedy decoding, token for token."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ray_sql.generate import Answer, Question, decoder, hf_generate, probe
from ray_sql.generate.answers import (
    Decoding,
    Joining,
    answer_questions,
    answer_ready,
    ready,
    spread,
)
from ray_sql.generate.groups import group_prompts
from ray_sql.generate.sampling import Sampling
from ray_sql.models import decode_attention, load_tokenizer

WIDTH = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = WIDTH | {
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
SLIDES = {
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 24},
    "mistral": GROUPED,  # its window is longer than any prompt here
    "ministral": GROUPED | SLIDES,
    "phi3": GROUPED | {"sliding_window": 24},
    "gemma2": GROUPED | SLIDES | {"attn_logit_softcapping": 2.0},
    "gemma3_text": GROUPED | SLIDES,
    "gemma4_text": GROUPED
    | SLIDES
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 700,
    },
    "gpt_neox": WIDTH | {"max_position_embeddings": 2048, "eos_token_id": 2},
    "qwen3_5_text": GROUPED
    | {
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": GROUPED
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
    },
    "bloom": WIDTH | {"n_layer": 2, "n_head": 4, "eos_token_id": 2},
}
SHARES = set(FAMILIES) - {"bloom"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def build(family: str, vocabulary: int) -> Any:
    """A random model with large weights, so that its answers differ and end at different places."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)
    return model


def adapted(model: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    made = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    ).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    return made


def question(db_id: str, ids: list[int]) -> Question:
    return Question("0", "dev", db_id, "?", "SELECT 1", None, None, ids)


def several(vocabulary: int) -> list[Question]:
    """Return questions on databases with many, two and single ones.

    Some are equal, and one has a prompt of a single token.
    """
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    many, few = tokens(40), tokens(33)
    asked = [question("many", many + tokens(draw.randrange(1, 12))) for _ in range(9)]
    asked += [asked[3], asked[3]]
    asked += [question("few", few + tokens(length)) for length in (2, 7)]
    asked += [
        question("trimmed", few[:10] + tokens(30)),
        question("trimmed", tokens(5)),
        question("short", tokens(1)),
    ]
    asked += [question("same", few), question("same", few)]
    asked += [question(f"single {number}", tokens(20 + number)) for number in range(4)]
    draw.shuffle(asked)
    return asked


def told(answers: list[Answer]) -> list[tuple[str, int, int]]:
    return [(answer.raw, answer.prompt_tokens, answer.new_tokens) for answer in answers]


def one_by_one(
    model: Any, tokenizer: Any, asked: list[Question], limit: int
) -> list[tuple[str, int, int]]:
    return [
        told(hf_generate.answer_batch(model, tokenizer, [one.input_ids], limit))[0] for one in asked
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_by_one_decoding(tokenizer: Any, family: str, lora: bool) -> None:
    model = build(family, len(tokenizer))
    model = adapted(model) if lora else model
    asked = several(len(tokenizer))
    alone = one_by_one(model, tokenizer, asked, 24)
    assert len(set(alone)) > 10
    before = model.config._attn_implementation
    assert (probe.why_not_share(model, 80) is None) == (family in SHARES)
    reasons: list[str] = []
    for max_num_seqs in (None, 1, 3, 16):
        decoding = Decoding(24, batch_size=4, max_num_seqs=max_num_seqs)
        answers = answer_questions(model, tokenizer, asked, decoding, on_fallback=reasons.append)
        assert told(answers) == alone
    assert len(reasons) == (0 if family in SHARES else 4), (
        "a model that has to compute prompts whole says so"
    )
    assert model.config._attn_implementation == before


def test_answers_are_the_same_without_the_kernel_for_cpus(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = several(len(tokenizer))
    model = adapted(build("llama", len(tokenizer)))
    alone = one_by_one(model, tokenizer, asked, 24)
    monkeypatch.setattr(decode_attention, "attend_by_kernel", decode_attention.attend_by_products)
    for max_num_seqs in (None, 3):
        decoding = Decoding(24, max_num_seqs=max_num_seqs)
        assert told(answer_questions(model, tokenizer, asked, decoding)) == alone


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_answers_of_all_lengths_meet_and_leave(tokenizer: Any, family: str) -> None:
    model = build(family, len(tokenizer))
    model.generation_config.eos_token_id = list(
        range(0, len(tokenizer), 17)
    )  # one token in seventeen ends a turn
    asked = several(len(tokenizer)) * 2
    alone = one_by_one(model, tokenizer, asked, 60)
    assert len({length for _, _, length in alone}) > 6
    for max_num_seqs in (None, 5):
        decoding = Decoding(60, max_num_seqs=max_num_seqs)
        assert told(answer_questions(model, tokenizer, asked, decoding)) == alone


@pytest.mark.parametrize(("family", "looks"), [("llama", 4), ("qwen3_5_text", 4), ("bloom", 0)])
@pytest.mark.parametrize("sampling", [None, Sampling(3, 1.0, 1.0, 0)], ids=["greedy", "samples"])
def test_answers_that_nobody_needs_any_more_are_left_and_change_no_others(
    tokenizer: Any, family: str, looks: int, sampling: Sampling | None
) -> None:
    """Every third question is needed for so many looks, while it waits or is answered."""
    model = build(family, len(tokenizer))
    asked = several(len(tokenizer))
    prompts = [one.input_ids for one in asked]
    decoding = Decoding(24, batch_size=4, max_num_seqs=5, sampling=sampling)
    whole = answer_questions(model, tokenizer, asked, decoding)
    groups = group_prompts(prompts, [one.db_id for one in asked]) if family in SHARES else None
    seen: Counter[int] = Counter()
    answered: dict[int, Answer] = {}

    def needed(index: int) -> bool:
        seen[index] += 1
        return index % 3 > 0 or seen[index] <= looks

    with ready(model):
        answer_ready(
            model,
            tokenizer,
            asked,
            decoding,
            groups=groups,
            on_answer=answered.__setitem__,
            joining=Joining(lambda: (), 0, needed),
        )
    left = set(range(len(asked))) - set(answered)
    assert left and all(index % 3 == 0 for index in left)
    for index, answer in answered.items():
        assert answer.raw == whole[index].raw
        assert [one.raw for one in answer.candidates] == [
            one.raw for one in whole[index].candidates
        ]


@pytest.mark.parametrize("family", ["qwen2", "gemma4_text", "granitemoehybrid"])
def test_room_for_few_tokens_is_enough(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = build(family, len(tokenizer))
    asked = several(len(tokenizer))
    alone = one_by_one(model, tokenizer, asked, 12)
    for tokens in (0, 90, 300):
        monkeypatch.setattr(
            decoder,
            "free_memory",
            lambda model, tokens=tokens: tokens * decoder.bytes_per_token(model),
        )
        assert told(answer_questions(model, tokenizer, asked, Decoding(12))) == alone


def test_a_prefix_is_computed_once_for_all_its_questions(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", len(tokenizer))
    computed: list[int] = []
    prefill = decoder.Decoder.prefill
    monkeypatch.setattr(
        decoder.Decoder,
        "prefill",
        lambda self, tokens: computed.append(len(tokens)) or prefill(self, tokens),
    )
    schema = list(range(3, 60))
    asked = [question("one", [*schema, 70 + number, 71]) for number in range(20)]
    answer_questions(model, tokenizer, asked, Decoding(3, max_num_seqs=4))
    assert computed[probe.PROBES :] == [len(schema)]  # those before are the probe's


def test_groups_share_at_least_half_of_every_prompt() -> None:
    schema = list(range(100))
    prompts = [
        schema + [200, 1],
        schema + [201],
        schema[:30] + [300] * 20,
        schema[:30] + [301] * 5,
        schema[:20] + [9] * 200,
    ]
    groups = group_prompts(prompts, ["a"] * 5)
    found = {frozenset(one.members): one.prefix for one in groups}
    assert found == {frozenset({0, 1}): 100, frozenset({2, 3}): 30, frozenset({4}): 219}
    assert [one.prefix for one in group_prompts(prompts[:2], ["a", "b"])] == [101, 100]
    assert [one.prefix for one in group_prompts([schema, schema], ["a", "a"])] == [99]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention_chunk_size": 50}, "cut into chunks of 50 tokens"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "change with a sequence's length after 60",
        ),
    ],
)
def test_what_only_long_prompts_show_is_found_in_the_settings(
    tokenizer: Any, settings: Any, reason: str
) -> None:
    model = build("llama", len(tokenizer))
    model.config.max_position_embeddings = 60
    assert probe.why_not_share(model, 80) is None
    for name, value in settings.items():
        setattr(model.config, name, value)
    assert probe.why_not_share(model, 40) is None
    assert reason in (probe.why_not_share(model, 80) or "")


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_5_text", "lfm2", "granitemoehybrid"])
def test_bfloat16_answers_too(tokenizer: Any, family: str) -> None:
    import torch

    model = build(family, len(tokenizer)).to(torch.bfloat16)
    asked = several(len(tokenizer))
    assert probe.why_not_share(model, 80) is None
    answers = answer_questions(model, tokenizer, asked, Decoding(8))
    assert [answer.prompt_tokens for answer in answers] == [len(one.input_ids) for one in asked]


def test_workers_get_whole_databases_about_equal_in_tokens(tokenizer: Any) -> None:
    asked = several(len(tokenizer))
    for world in (1, 2, 3, 40):
        shares = spread(asked, world, 20)
        assert sorted(number for share in shares for number in share) == list(range(len(asked)))
    names = [{asked[number].db_id for number in share} for share in spread(asked, 2, 20)]
    assert names[0] & names[1] <= {"many"}  # it has half of the questions
    even = [question(name, list(range(3, 60)) + [70 + n]) for name in "abcd" for n in range(5)]
    names = [{even[number].db_id for number in share} for share in spread(even, 2, 20)]
    assert sorted(map(len, names)) == [2, 2] and not names[0] & names[1]


def test_beams_are_kept_best_first(tokenizer: Any) -> None:
    model = build("llama", len(tokenizer))
    asked = several(len(tokenizer))[:5]
    greedy = answer_questions(model, tokenizer, asked, Decoding(6))
    found = answer_questions(model, tokenizer, asked, Decoding(6, batch_size=2, num_beams=3))
    assert all(answer.candidates == [] for answer in greedy)
    assert all(
        len(answer.candidates) == 3 and answer.candidates[0].raw == answer.raw for answer in found
    )
    alone = answer_questions(model, tokenizer, asked, Decoding(6, num_beams=3))
    assert [one.candidates for one in alone] == [one.candidates for one in found]
    assert any(a.raw != b.raw for a, b in zip(greedy, found, strict=True))


@pytest.mark.parametrize("prefix", [0, 70], ids=["own tokens", "and a prefix"])
def test_the_kernel_for_cpus_gives_what_plain_arithmetic_gives(prefix: int) -> None:
    import torch

    draw = torch.Generator().manual_seed(3)

    def some(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw)

    query, key, value = some(4, 2, 6, 16), some(4, 2, 9, 16), some(4, 2, 9, 16)
    bias = torch.zeros(4, 1, 6, 9).masked_fill_(
        some(4, 1, 6, 9) > 1, torch.finfo(torch.float32).min
    )
    if prefix:  # seen whole, by all
        query, key, value, bias = query[:1], some(1, 2, prefix, 16), some(1, 2, prefix, 16), None
    for found, wanted in zip(
        decode_attention.attend_by_kernel(query, key, value, bias, 0.3),
        decode_attention.attend_by_products(query, key, value, bias, 0.3),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
