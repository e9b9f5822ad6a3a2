"""Write turns as a model reads them, in its own chat template.

Templates differ in what they know. A `Chat` finds out with a short conversation. It learns how to
give turns to the template so that none is lost. It also learns what the template writes between a
prompt and an answer that comes without thoughts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ray_sql.data.answers import THOUGHTS, thoughts_begun
from ray_sql.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Thinking = Literal["off", "on"]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)
"""For base models that come without a chat template."""

DATE = date(2024, 7, 26)
"""The date for templates that write today's: Llama's own default."""
TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

PROBE = [
    {"role": "system", "content": "the words of a quince"},
    {"role": "user", "content": "the question of a quince"},
]
PROBE_ANSWER = "the answer of a quince"


@dataclass(frozen=True)
class Way:
    """A way of giving turns to a template."""

    merged: bool = False
    """The system text begins the user's turn."""
    parts: bool = False
    """Contents are lists of parts, as templates of models that see images read them."""
    mends: bool = False
    """A template writes turns that are given plainly, and leaves out some of the text."""

    @property
    def name(self) -> str:
        """The way as a contract calls it."""
        return f"{'merged ' * self.merged}{'in parts' * self.parts}".strip()

    def arrange(self, turns: list[dict[str, str]]) -> list[dict[str, Any]]:
        """Return the turns as the template takes them."""
        arranged: list[dict[str, Any]] = list(turns)
        if self.merged:
            system, user, *rest = turns
            text = f"{system['content']}\n\n{user['content']}"
            arranged = [{"role": "user", "content": text}, *rest]
        if self.parts:
            arranged = [
                turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in arranged
            ]
        return arranged


WAYS = (Way(), Way(merged=True), Way(parts=True), Way(merged=True, parts=True))


@dataclass(frozen=True)
class Chat:
    """A model's prompts and completions, with its thinking off or on.

    Off, a prompt ends where an answer without thoughts begins. On, it ends where thoughts may
    begin, and a completion has first what a template writes in place of thoughts.
    """

    tokenizer: PreTrainedTokenizerBase
    thinking: Thinking = "off"

    def prompt(self, turns: list[dict[str, str]]) -> str:
        """Return the text that a model reads, up to where it begins to write.

        Raises:
            ModelError: no way of writing the turns keeps all of their text, or there is no
                thinking to switch on.
        """
        if self.thinking == "on" and not self.can_think:
            raise ModelError(
                f"--prompt.thinking on: the chat template of {self._name} has no thinking to "
                "switch on; leave it off"
            )
        return self._prompt(turns)

    def completion(self, turns: list[dict[str, str]], answer: str) -> str:
        """Return the text to follow `prompt`: the answer and the template's end of turn."""
        lead = self._head if self.thinking == "on" else ""
        before = self.prompt(turns) + lead + answer
        conversation = self._conversation(turns, answer)
        ending = ""
        # some templates rewrite earlier turns once there is an answer
        if self.tokenizer.chat_template and conversation.startswith(before):
            ending = conversation[len(before) :].rstrip()
        return lead + answer + (ending or str(self.tokenizer.eos_token))

    @property
    def turns(self) -> Literal["system and user", "user", "plain"]:
        """Tell how a prompt reaches the model: as two turns, as one, or as plain paragraphs."""
        if not self.tokenizer.chat_template:
            return "plain"
        system, user = PROBE
        text = f"{system['content']}\n\n{user['content']}"
        one = self._render(Way(parts=self.way.parts), [{"role": "user", "content": text}])
        return "user" if self._render(self.way, PROBE) == one else "system and user"

    @cached_property
    def way(self) -> Way:
        """Find the first way in which the template keeps all text.

        Raises:
            ModelError: there is none, or the template cannot be read.
        """
        reasons = []
        mends = False
        for way in WAYS:
            try:
                text = self._render(way, PROBE)
            except ModelError as error:
                reasons.append(str(error))
                continue
            kept = all(turn["content"] in text for turn in PROBE)
            # a template that expects text writes a list of parts as Python does
            if kept and not (way.parts and "'type'" in text):
                return Way(way.merged, way.parts, mends or way.parts)
            mends = True
            reasons.append(self._refusal("it leaves out the task, the schema or the question"))
        raise ModelError(reasons[0])

    @cached_property
    def can_think(self) -> bool:
        """Tell whether prompts differ with thinking off and on."""
        off, on = Chat(self.tokenizer, "off"), Chat(self.tokenizer, "on")
        return off._prompt(PROBE) != on._prompt(PROBE)

    @cached_property
    def default(self) -> Thinking:
        """The setting that gives the prompt of a template which is told nothing of thinking."""
        untold = self._render(self.way, PROBE, told=False)
        return "off" if Chat(self.tokenizer, "off")._prompt(PROBE) == untold else "on"

    @property
    def prompt_end(self) -> str:
        """The text that ends a prompt, behind what the template writes there."""
        return self._head if self.thinking == "off" else ""

    def _prompt(self, turns: list[dict[str, str]]) -> str:
        return self._render(self.way, turns) + self.prompt_end

    @cached_property
    def _head(self) -> str:
        """The text between the template's prompt and an answer without thoughts.

        An empty block of thoughts is one, and the mark of an answer's channel. White space alone
        counts with thinking models only: others were always trained without.
        """
        prompt = self._render(self.way, PROBE)
        conversation = self._conversation(PROBE, PROBE_ANSWER)
        if conversation.startswith(prompt) and PROBE_ANSWER in conversation:
            head = conversation[len(prompt) :].partition(PROBE_ANSWER)[0]
            if head.strip() or self._has_switch:
                return head
        mark = thoughts_begun(prompt)
        return f"\n{THOUGHTS[mark]}\n\n" if mark else ""

    def _conversation(self, turns: list[dict[str, str]], answer: str) -> str:
        """Return the turns with their answer; empty if the template takes questions alone."""
        with_answer = [*turns, {"role": "assistant", "content": answer}]
        try:
            return self._render(self.way, with_answer, add_generation_prompt=False)
        except ModelError:
            return ""

    @cached_property
    def _has_switch(self) -> bool:
        off, on = Chat(self.tokenizer, "off"), Chat(self.tokenizer, "on")
        return off._render(self.way, PROBE) != on._render(self.way, PROBE)

    def _render(
        self,
        way: Way,
        turns: list[dict[str, str]],
        add_generation_prompt: bool = True,
        told: bool = True,
    ) -> str:
        thinks = self.thinking == "on"
        switches = {"enable_thinking": thinks, "thinking": thinks} if told else {}
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **switches}
        template = _dated(template_of(self.tokenizer))
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    way.arrange(turns), chat_template=template, tokenize=False, **options
                )
            )
        except Exception as error:  # a template is somebody's program: it may raise anything
            reason = " ".join(str(error).split())[:200]
            raise ModelError(self._refusal(f"{type(error).__name__}: {reason}")) from None

    def _refusal(self, reason: str) -> str:
        return (
            f"--model_name {self._name}: its chat template writes no prompt ({reason}); correct "
            "chat_template in the model's folder, or remove it there for prompts of plain text"
        )

    @property
    def _name(self) -> str:
        return str(self.tokenizer.name_or_path)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template (the default one of several), or the plain one."""
    if not tokenizer.chat_template:
        return PLAIN_TEMPLATE
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise ModelError(
            f"--model_name {tokenizer.name_or_path}: it has several chat templates, and none is "
            "called `default`; keep one in its folder, as chat_template.jinja"
        ) from None


def _dated(template: str) -> str:
    """Put `DATE` where the template writes today's: a prompt must read the same on every day."""
    return TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)
