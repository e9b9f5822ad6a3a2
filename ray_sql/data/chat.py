"""Write turns as a model reads them, in its own chat template."""

from __future__ import annotations

import re
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)
"""For base models that come without a chat template."""

DATE = date(2024, 7, 26)
"""The date for templates that write today's: Llama's own default."""
TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def render_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """Return the text that a model reads, in its chat template, up to where its answer begins."""
    return _render(tokenizer, turns, add_generation_prompt=True)


def render_completion(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], text: str
) -> str:
    """Return the text to follow `render_prompt`: the answer and the template's end of turn."""
    prompt = render_prompt(tokenizer, turns)
    with_answer = [*turns, {"role": "assistant", "content": text}]
    conversation = _render(tokenizer, with_answer, add_generation_prompt=False)
    if tokenizer.chat_template and conversation.startswith(prompt + text):
        ending = conversation[len(prompt + text) :].rstrip()
        return text + (ending or tokenizer.eos_token)
    # Without a template, or with one that rewrites earlier turns.
    return text + str(tokenizer.eos_token)


def template_turns(
    tokenizer: PreTrainedTokenizerBase,
) -> Literal["system and user", "user", "plain"]:
    """Tell how a prompt reaches the model: as two turns, as one, or as plain paragraphs.

    It is plain without a chat template.
    """
    if not tokenizer.chat_template:
        return "plain"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    merged = [{"role": "user", "content": "s\n\nu"}]
    is_merged = render_prompt(tokenizer, turns) == render_prompt(tokenizer, merged)
    return "user" if is_merged else "system and user"


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    from jinja2.exceptions import TemplateError

    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    template = _dated(template_of(tokenizer))
    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, **options))
    except TemplateError:  # Some templates, Gemma's for one, know no system turn.
        system, user, *rest = turns
        merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        return str(
            tokenizer.apply_chat_template([merged, *rest], chat_template=template, **options)
        )


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template (the default one of several), or the plain one."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else PLAIN_TEMPLATE


def _dated(template: str) -> str:
    """Put `DATE` where the template writes today's: a prompt must read the same on every day."""
    return TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)
