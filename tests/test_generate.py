"""Answers do not depend on their batch, and end at the closing fence or the end of the turn."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data, generate
from ray_sql.data import Corpus
from ray_sql.data.answers import parse_sql
from ray_sql.generate import Answer, Question
from ray_sql.generate.answers import Decoding, answer_questions
from ray_sql.generate.ends import Ends
from ray_sql.models import load_tokenizer
from tests.conftest import make_encoder, make_model


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """Make models whose next token follows from the last one, along the chains of texts given."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path_factory.mktemp("parrot"))

    def make(*chains: list[str]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for layer in model.model.layers:  # only the last token's embedding is left to decide
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            vectors = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
            head = torch.zeros_like(model.lm_head.weight)
            for chain in chains:
                ids = [one_token(tokenizer, text) for text in chain]
                for last, following in pairwise(ids):
                    head[following] += vectors[last]
            model.lm_head.weight = torch.nn.Parameter(head)
        return model

    return make


def one_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1, text
    return int(ids[0])


def question(tokenizer: Any, text: str) -> Question:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Question("0", "dev", "mall", "?", "SELECT 1", None, None, ids)


def told(answers: list[Answer]) -> list[tuple[str, int, int]]:
    return [(answer.raw, answer.prompt_tokens, answer.new_tokens) for answer in answers]


def ask(
    model: Any, tokenizer: Any, asked: list[Question], batch_size: int, limit: int = 12
) -> list[Answer]:
    return answer_questions(model, tokenizer, asked, Decoding(limit, max_num_seqs=batch_size))


def test_a_batch_answers_as_one_by_one(make_config: Any, model: Any, tokenizer: Any) -> None:
    config = make_config()
    corpus: Corpus = data.load(config)
    asked = generate.make_questions(
        corpus.splits["dev"], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    asked += [
        question(tokenizer, text)
        for text in ("S", "SELECT name FROM customer WHERE city = ", "customer product")
    ]
    assert len({len(one.input_ids) for one in asked}) > 5
    alone = ask(model, tokenizer, asked, batch_size=1)
    for batch_size in (4, len(asked)):
        assert told(ask(model, tokenizer, asked, batch_size)) == told(alone)
    assert len({answer.raw for answer in alone}) > 1
    assert [answer.prompt_tokens for answer in alone] == [len(one.input_ids) for one in asked]
    assert {answer.new_tokens for answer in alone} <= set(range(1, 13)) and all(
        answer.seconds > 0 for answer in alone
    )


def test_an_answer_ends_at_its_closing_fence(parrot: Any, tokenizer: Any) -> None:
    model = parrot([" customer", "```", "sql", "```"])
    (answer,) = ask(model, tokenizer, [question(tokenizer, " customer")], 1)
    assert (answer.raw, answer.new_tokens) == ("```sql```", 3)


def test_a_fence_in_the_prompt_opens_no_answer(parrot: Any, tokenizer: Any) -> None:
    model = parrot([" customer", "```", "sql", "```"])
    (answer,) = ask(model, tokenizer, [question(tokenizer, "``` ``` ``` customer")], 1)
    assert answer.raw == "```sql```"


def test_an_answer_ends_with_its_turn_and_without_its_mark(parrot: Any, tokenizer: Any) -> None:
    model = parrot([" customer", " name", " FROM", "<|end|>", " city"])
    (answer,) = ask(model, tokenizer, [question(tokenizer, "the customer")], 1)
    assert (answer.raw, answer.new_tokens) == (" name FROM", 2)


def test_an_answer_without_an_end_is_cut_at_the_limit(parrot: Any, tokenizer: Any) -> None:
    model = parrot([" customer", " name", " FROM", " name"])
    (answer,) = ask(model, tokenizer, [question(tokenizer, "a customer")], 1, limit=5)
    assert (answer.raw, answer.new_tokens) == (" name FROM name FROM name", 5)


def test_each_answer_of_a_batch_has_its_own_end(parrot: Any, tokenizer: Any) -> None:
    model = parrot(
        [" customer", "```", "sql", "```"],
        [" product", " name", "<|end|>"],
        [" sale", " FROM", " city", " FROM"],
    )
    asked = [
        question(tokenizer, text)
        for text in ("a longer question on a customer", " product", "the sale")
    ]
    assert told(ask(model, tokenizer, asked, 3, limit=6)) == told(
        ask(model, tokenizer, asked, 1, limit=6)
    )
    assert [answer.new_tokens for answer in ask(model, tokenizer, asked, 3, limit=6)] == [3, 1, 6]


def test_asking_leaves_the_model_as_it_was(model: Any, tokenizer: Any) -> None:
    model.train()
    model.config.use_cache = False
    ask(model, tokenizer, [question(tokenizer, "a customer")], 1, limit=2)
    assert model.training and model.config.use_cache is False
    model.eval()


def test_every_answer_is_told_once(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, Answer]] = []
    asked = [question(tokenizer, "a customer")] * 5
    decoding = Decoding(1, max_num_seqs=2)
    answers = answer_questions(
        model, tokenizer, asked, decoding, on_answer=lambda *one: seen.append(one)
    )
    assert sorted(seen, key=lambda one: one[0]) == list(enumerate(answers)) and len(answers) == 5
    assert ask(model, tokenizer, [], 2) == []


@pytest.mark.parametrize("task", ["sql", "schema"])
def test_questions_survive_their_journey_as_text(
    make_config: Any, tokenizer: Any, task: str
) -> None:
    config = make_config(task_type=task)
    corpus = data.load(config)
    odd = [e.__class__(**{**vars(e), "question": "a\u2028b\nc"}) for e in corpus.splits["dev"]]
    asked = generate.make_questions(
        odd, "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    assert generate.parse(generate.dump(asked)) == asked
    assert asked[0].database == corpus.databases["mall"]
    assert asked[0].gold == (
        "SELECT COUNT(*) FROM customer" if task == "sql" else '{"customer": []}'
    )


def test_gold_that_cannot_be_linked_is_asked_all_the_same(make_config: Any, tokenizer: Any) -> None:
    config = make_config(task_type="schema")
    corpus = data.load(config)
    broken = data.Example("0", "mall", "Who?", "SELECT x FROM nowhere")
    assert [
        one.gold
        for one in generate.make_questions(
            [broken], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
        )
    ] == [""]


@pytest.mark.kind("thinking models")
@pytest.mark.parametrize("begun", [True, False], ids=["by the prompt", "by the model"])
def test_no_block_in_the_thoughts_ends_an_answer(model: Any, tokenizer: Any, begun: bool) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    mark = "<think>"
    ends = Ends(model, tokenizer, ids(f"a question\n{mark}\n" if begun else "a question\n"))
    thoughts = ids(("" if begun else mark) + "Maybe\n```sql\nSELECT 1\n```\nNo.\n")
    assert not any(ends(thoughts[: end + 1]) for end in range(len(thoughts)))
    answer = thoughts + ids("</think>\n```sql\nSELECT 2\n```")
    assert [ends(answer[: end + 1]) for end in range(len(answer))].index(True) == len(answer) - 1
    assert parse_sql(ends.text(answer)) == "SELECT 2"
    assert parse_sql(ends.text(thoughts)) is None


@pytest.mark.kind("thinking models")
def test_marks_of_thoughts_that_are_special_tokens_stay_in_the_text(
    model: Any, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    text = "[THINK]SELECT 1[/THINK]SELECT 2"
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert Ends(model, tokenizer, [5]).text(answer) == text and parse_sql(text) == "SELECT 2"


@pytest.mark.kind("answers that are not one plain fence")
@pytest.mark.parametrize("fence", ["```", "````", "~~~", "~~~~"])
def test_generation_ends_at_the_fence_that_closes_the_block(
    model: Any, tokenizer: Any, fence: str
) -> None:
    answer = tokenizer(f"{fence}sql\nSELECT 1\n{fence}\n", add_special_tokens=False)["input_ids"]
    ends = Ends(model, tokenizer, [5])
    told = [ends(answer[: end + 1]) for end in range(len(answer))]
    written = answer[: told.index(True) + 1]
    assert len(written) in (len(answer) - 1, len(answer))
    assert parse_sql(ends.text(written)) == "SELECT 1"
