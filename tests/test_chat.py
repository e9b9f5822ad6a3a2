"""Every chat template keeps the prompt whole; thinking is off or on, and never holds the answer."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from ray_sql import data
from ray_sql.config.sections import PromptSection
from ray_sql.data import prompts
from ray_sql.data.answers import is_complete, parse_sql, thoughts_begun
from ray_sql.data.chat import Chat
from ray_sql.data.contract import check_contract, make_contract
from ray_sql.errors import ContractError, ModelError
from ray_sql.models import load_tokenizer
from ray_sql.rows import Encoder
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import SQL
from tests.conftest import CHAT_TEMPLATE

CHATS = pytest.mark.kind("chat templates")
THINKING = pytest.mark.kind("thinking models")
NO_END = pytest.mark.kind("tokenizers without an end of text")

(TRL,) = importlib.util.find_spec("trl").submodule_search_locations or ()  # type: ignore[union-attr]
TEMPLATES = {file.stem: file.read_text() for file in Path(TRL).glob("chat_templates/*.jinja")}
THINK = {
    *("deepseek_r1_distill", "deepseekv3", "diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3"),
    *("gemma4_v4", "gemma4_v5", "glm4moe", "gptoss", "muse_glimmer", "nemotron_3_5_lightning"),
    *("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_5_nothink"),
    *("qwen3_5_think", "qwen3_6", "qwen3_8"),
}
"""TRL's templates of models that think; those for training are called `NAME_training`."""
MERGED = {"gemma", "gemma3"}
ANSWER = "```sql\nSELECT name FROM t\n```"
TURNS = prompts.messages(SQL, "CREATE TABLE t (name TEXT)", "Who is it?", "a name")

QWEN = (  # as Qwen3's
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
DISTILL = (  # as DeepSeek-R1's distills: the block is open, and there is no switch
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
ALTERNATING = (  # as the first Phi-3's: a system turn is not written
    "{% for m in messages %}{% if m['role'] == 'user' %}<|start|>user\n{{ m['content'] }}<|end|>\n"
    "<|start|>assistant\n{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|end|>\n"
    "{% endif %}{% endfor %}"
)
IN_PARTS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    loaded = load_tokenizer(str(tiny_model))
    loaded.bos_token = "<|start|>"
    return loaded


def read_back(tokenizer: Any, thinking: str) -> tuple[str, str]:
    """Return prompt and completion, each checked for what it must have."""
    chat = Chat(tokenizer, thinking)  # type: ignore[arg-type]
    prompt, completion = chat.prompt(TURNS), chat.completion(TURNS, ANSWER)
    assert SQL.system in prompt and TURNS[1]["content"] in prompt
    answer = thoughts_begun(prompt) + completion
    assert parse_sql(answer) == "SELECT name FROM t" and is_complete(answer)
    assert completion.count(ANSWER) == 1 and not completion.endswith(("```", "None"))
    return prompt, completion


@CHATS
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_of_trl_writes_all_of_a_prompt(
    tokenizer: Any, make_config: Any, tmp_path: Path, name: str
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    model = name.removesuffix("_training")
    chat = Chat(tokenizer)
    assert chat.turns == ("user" if model in MERGED else "system and user")
    assert chat.can_think == (model in THINK)
    settings = ("off", "on") if chat.can_think else ("off",)
    saved = {}
    for thinking in settings:
        prompt, completion = read_back(tokenizer, thinking)
        section = PromptSection(thinking=thinking)
        corpus = data.load(make_config())
        encoder = Encoder(tokenizer, SQL, section, corpus.schemas)
        example = corpus.splits["train"][0]
        trained, asked = encoder.encode(example), encoder.encode_question(example)
        assert trained.input_ids[: trained.prompt_length] == asked
        assert bool(thoughts_begun(prompt)) <= (thinking == "on")
        assert tokenizer.decode(trained.input_ids[trained.prompt_length :]) == completion.replace(
            ANSWER, prompts.answer(SQL, example, corpus.schemas)
        )
        config = make_config(**{"prompt.thinking": thinking})
        RunFolder(str(tmp_path)).write_contract(make_contract(config, tokenizer, None))
        saved[thinking] = RunFolder(str(tmp_path)).read_contract() or {}
        check_contract(saved[thinking], make_contract(config, tokenizer, None), "out/run/adapter")
        # an adapter of a version without the setting is taken where its prompt is the same
        earlier = {key: value for key, value in saved[thinking].items() if key != "thinking"}
        if not chat.can_think or thinking == chat.default:
            check_contract(earlier, saved[thinking], "out/run/adapter")
        else:
            with pytest.raises(ContractError, match="trained with thinking"):
                check_contract(earlier, saved[thinking], "out/run/adapter")
    if chat.can_think:
        with pytest.raises(ContractError, match=r"trained with thinking 'on', .* has 'off'"):
            check_contract(saved["on"], saved["off"], "out/run/adapter")
    else:
        with pytest.raises(ModelError, match=r"^--prompt.thinking on: .* has no thinking"):
            Chat(tokenizer, "on").prompt(TURNS)


@THINKING
@pytest.mark.parametrize("name", sorted(THINK))
def test_prompt_and_answer_are_what_trls_template_writes_without_thoughts(
    tokenizer: Any, name: str
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    prompt, completion = read_back(tokenizer, "off")
    with_answer = [*TURNS, {"role": "assistant", "content": ANSWER}]
    conversation = tokenizer.apply_chat_template(
        with_answer, tokenize=False, enable_thinking=False, thinking=False
    )
    if name.startswith("deepseek"):  # keeps no thoughts of an earlier turn, and no empty block
        mark = "<｜Assistant｜>"
        conversation = conversation.replace(mark, f"{mark}<think>\n\n</think>\n\n")
    end = conversation.rpartition(ANSWER)[2].rstrip() or tokenizer.eos_token
    today = conversation.partition("Current date: ")[2][:10]
    written = f"{conversation.rpartition(ANSWER)[0]}{ANSWER}"
    assert prompt + ANSWER == (written.replace(today, "2024-07-26") if today else written)
    assert completion == ANSWER + (end if not name.startswith("deepseek") else "<|end|>")


@THINKING
@pytest.mark.parametrize(
    ("template", "thinking", "prompt_end", "lead"),
    [
        (QWEN, "off", "assistant\n<think>\n\n</think>\n\n", ""),
        (QWEN, "on", "assistant\n", "<think>\n\n</think>\n\n"),
        (DISTILL, "off", "assistant\n<think>\n\n</think>\n\n", ""),
        (DISTILL, "on", "assistant\n<think>\n", "\n</think>\n\n"),
        (CHAT_TEMPLATE, "off", "assistant\n", ""),
    ],
    ids=["Qwen3 off", "Qwen3 on", "distill off", "distill on", "no thinking"],
)
def test_the_answer_never_stands_in_open_thoughts(
    tokenizer: Any, template: str, thinking: str, prompt_end: str, lead: str
) -> None:
    tokenizer.chat_template = template
    prompt, completion = read_back(tokenizer, thinking)
    assert prompt.endswith(f"<|end|>\n<|start|>{prompt_end}") or template == DISTILL
    assert prompt.endswith(prompt_end)
    assert completion == f"{lead}{ANSWER}<|end|>"


@CHATS
@pytest.mark.parametrize(
    ("template", "way"),
    [(ALTERNATING, "merged"), (IN_PARTS, "in parts"), (CHAT_TEMPLATE, "")],
    ids=["user and assistant alone", "contents in parts", "text"],
)
def test_no_part_of_a_prompt_is_lost(
    tokenizer: Any, make_config: Any, tmp_path: Path, template: str, way: str
) -> None:
    tokenizer.chat_template = template
    prompt, completion = read_back(tokenizer, "off")
    assert prompt.endswith("<|start|>assistant\n") and completion == f"{ANSWER}<|end|>"
    assert "'type'" not in prompt
    contract = make_contract(make_config(), tokenizer, None)
    assert contract["template"]["turns"] == ("user" if way == "merged" else "system and user")
    assert contract["template"].get("way", "") == way
    folder = RunFolder(str(tmp_path))
    folder.write_contract(contract)
    assert folder.read_contract() == contract


@CHATS
def test_an_adapter_trained_without_its_system_text_is_refused(
    tokenizer: Any, make_config: Any
) -> None:
    tokenizer.chat_template = ALTERNATING
    current = make_contract(make_config(), tokenizer, None)
    template = [SQL.system, prompts.USER, prompts.EVIDENCE, ALTERNATING]
    text = json.dumps(template).encode()
    saved = current | {"template_hash": hashlib.sha256(text).hexdigest()[:12]}
    with pytest.raises(ContractError, match="trained with template_hash"):
        check_contract(saved, current, "out/run/adapter")


@CHATS
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m['content']['text'].strip() }}{% endfor %}", "UndefinedError"),
        ("{% for m in messages %}{{ m['content'] }}", "TemplateSyntaxError"),
        ("{{ messages[0]['content'] + nothing_such }}", "UndefinedError: 'nothing_such'"),
        ("{{ messages[0]['content'] / 2 }}", "TypeError"),
        ("{{ raise_exception('Give tools\nalways') }}", "TemplateError: Give tools always"),
        ("<|start|>assistant\n", "it leaves out the task, the schema or the question"),
        ("{% for m in messages if m['role'] == 'x' %}{{ m['content'] }}{% endfor %}", "leaves out"),
    ],
)
def test_a_template_that_writes_no_prompt_is_named_in_one_line(
    tokenizer: Any, tiny_model: Path, template: str, reason: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as caught:
        Chat(tokenizer).prompt(TURNS)
    message = str(caught.value)
    assert message.startswith(f"--model_name {tiny_model}: its chat template writes no prompt (")
    assert reason in message and "chat_template in the model's folder" in message
    assert "\n" not in message


@CHATS
def test_several_templates_without_a_default_are_named(tokenizer: Any, make_config: Any) -> None:
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    with pytest.raises(ModelError, match="several chat templates, and none is called `default`"):
        make_contract(make_config(), tokenizer, None)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": ALTERNATING}
    assert read_back(tokenizer, "off")[0].endswith("assistant\n")


def without_end(folder: Path, tiny_model: Path, **ids: dict[str, Any]) -> Path:
    """Copy the tokenizer of a model without its end of text; `ids` go into its JSON files."""
    for file in tiny_model.glob("*token*.json"):
        settings = json.loads(file.read_text())
        settings.pop("eos_token", None)
        (folder / file.name).write_text(json.dumps(settings))
    for name, content in ids.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@NO_END
@pytest.mark.parametrize(
    "ids",
    [
        {"generation_config": {"eos_token_id": 2}},
        {"generation_config": {"eos_token_id": [2, 1]}, "config": {"eos_token_id": 1}},
        {"config": {"eos_token_id": 2, "model_type": "llama"}},
        {"generation_config": {}, "config": {"eos_token_id": 2, "model_type": "llama"}},
    ],
)
def test_a_tokenizer_without_an_end_of_text_takes_the_models(
    tiny_model: Path, tmp_path: Path, ids: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(str(without_end(tmp_path, tiny_model, **ids)))
    assert tokenizer.eos_token == "<|end|>" and tokenizer.eos_token_id == 2
    tokenizer.chat_template = None
    assert read_back(tokenizer, "off")[1] == f"{ANSWER}<|end|>"


@NO_END
@pytest.mark.parametrize(
    "ids",
    [
        {},
        {"config": {"model_type": "llama"}},
        {"config": {"eos_token_id": None, "model_type": "llama"}},
        {"generation_config": {"eos_token_id": 99_999}},
        {"generation_config": {"eos_token_id": []}},
    ],
)
def test_a_model_without_any_end_of_text_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, ids: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"no token for the end of a text") as caught:
        load_tokenizer(str(without_end(tmp_path, tiny_model, **ids)))
    assert f"--model_name {tmp_path}: " in str(caught.value) and "\n" not in str(caught.value)
