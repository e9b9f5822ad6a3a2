"""Ask an endpoint that speaks OpenAI's protocol: ours, vLLM, llama.cpp's server and others."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NotRequired, Self

import requests
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ray_sql.config import mask_password
from ray_sql.config.sections import AnswersSection
from ray_sql.errors import ConfigError, StoreError
from ray_sql.generate import Answer
from ray_sql.store.retry import retry

Turns = list[dict[str, str]]
Progress = Callable[[int, int], None]
KEY = "OPENAI_API_KEY"
"""The environment variable with the endpoint's key."""
AT_A_TIME = 8
"""Questions that are sent at a time."""
PATIENCE, MOST_TRIES = 300.0, 8
"""Seconds that an answer may take, and tries while the endpoint says that it is busy."""
LONGEST_PAUSE = 30.0
BUSY = {429, 503, 504}
"""Statuses by which an endpoint has no room, or no time for the answer: both pass."""


class _Message(TypedDict):
    content: str | None


class _Choice(TypedDict):
    message: _Message
    finish_reason: str | None


class _Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int


class _Completion(TypedDict):
    choices: list[_Choice]
    usage: _Usage


class _Model(TypedDict):
    id: str
    ray_sql: NotRequired[dict[str, str]]  # of what our own service is made
    root: NotRequired[str | None]  # vLLM's words, for an adapter: its folder, and its base
    parent: NotRequired[str | None]


class _Models(TypedDict):
    data: list[_Model]


@dataclass(frozen=True)
class Endpoint:
    """An endpoint below an address, and one of its models, as the endpoint describes it."""

    url: str
    model: str
    described: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, settings: AnswersSection) -> Self:
        """Return the endpoint of the settings, with the model that is named, or its first one.

        Raises `StoreError` if it does not answer, and `ConfigError` if it has no such model.
        """
        assert settings.url is not None
        wanted = settings.served_model
        endpoint = cls(settings.url.rstrip("/"), wanted or "")
        try:
            listed = {model["id"]: model for model in endpoint._list()}
        except StoreError:
            if wanted is None or not endpoint._knows():
                raise
            listed = {wanted: {}}
        name = wanted or next(iter(listed), None)
        # transformers lists what the Hub's cache has, and not the folder that it serves
        if name is None or (name not in listed and not endpoint._knows()):
            place = mask_password(endpoint.url)
            raise ConfigError(
                f"--evaluate.served_model {wanted}: {place} has no such model; it has "
                f"{', '.join(listed) or 'none'}"
            )
        return cls(endpoint.url, name, listed.get(name, {}))

    def _list(self) -> list[Mapping[str, Any]]:
        """Return the models that the endpoint lists."""
        models: list[Mapping[str, Any]] = self._call(_Models, "GET", "models", None)["data"]
        return models

    def _knows(self) -> bool:
        """Tell whether the endpoint answers as the model, which it may not list."""
        try:
            self.answer([{"role": "user", "content": "SELECT"}], 1)
        except StoreError:
            return False
        return True

    def answer_all(
        self,
        conversations: Sequence[Turns],
        max_new_tokens: int,
        progress: Progress | None = None,
        at_a_time: int = AT_A_TIME,
    ) -> list[Answer]:
        """Return a greedy answer to each conversation, in their order.

        Threads that do not keep the process alive ask. So a signal ends a job at once, whatever
        the endpoint does.
        """
        coming = [Future[Answer]() for _ in conversations]
        left = deque(zip(coming, conversations, strict=True))

        def ask() -> None:
            with suppress(IndexError):  # none is left
                while True:
                    self._answer_to(*left.popleft(), max_new_tokens)

        for number in range(min(at_a_time, len(conversations))):
            threading.Thread(target=ask, name=f"ray_sql-ask-{number}", daemon=True).start()
        answers = []
        try:
            for answer in coming:
                answers.append(answer.result())
                if progress:
                    progress(len(answers), len(conversations))
        finally:
            left.clear()
        return answers

    def _answer_to(self, coming: Future[Answer], turns: Turns, max_new_tokens: int) -> None:
        """Answer a conversation, or say why not, to whoever waits for it."""
        try:
            coming.set_result(self.answer(turns, max_new_tokens))
        except Exception as error:  # of any kind: it is raised where the answer is waited for
            coming.set_exception(error)

    def answer(self, turns: Turns, max_new_tokens: int) -> Answer:
        """Return the greedy answer to a conversation."""
        body = {"model": self.model, "messages": turns, "temperature": 0}
        began = time.monotonic()
        limited = body | {"max_tokens": max_new_tokens}
        completion = self._call(_Completion, "POST", "chat/completions", limited)
        seconds = time.monotonic() - began
        usage = completion["usage"]
        text = completion["choices"][0]["message"]["content"] if completion["choices"] else ""
        return Answer(text or "", usage["prompt_tokens"], usage["completion_tokens"], seconds)

    def _call(self, shape: Any, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Return what a path answers. Raises `StoreError` where that is not what is expected."""
        key = os.environ.get(KEY, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = f"{self.url}/{path}"
        place = mask_password(address)  # what is said of it may reach whoever asks a service

        def ask() -> requests.Response:
            response = requests.request(
                method, address, json=body, headers=headers, timeout=PATIENCE, allow_redirects=False
            )
            if response.status_code in BUSY:
                raise _Busy(response.status_code, response.headers.get("Retry-After", ""))
            return response

        try:
            response = retry(ask, _pause)
            if response.status_code != 200:
                reason = f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
                raise StoreError(f"--evaluate.url {place}: {reason}; check address, model and key")
            return TypeAdapter(shape).validate_json(response.content)
        except _Busy as busy:
            raise StoreError(
                f"--evaluate.url {place}: stays busy (HTTP {busy.status}); try again later"
            ) from None
        except requests.RequestException as error:
            reason = (mask_password(" ".join(str(error).split())) or "")[:200]
            raise StoreError(
                f"--evaluate.url {place}: does not answer ({type(error).__name__}: {reason}); "
                "check the address, and that the endpoint runs"
            ) from None
        except ValidationError:
            raise StoreError(
                f"--evaluate.url {place}: does not speak OpenAI's protocol; give the address that "
                "ends before /models, as http://127.0.0.1:8000/v1"
            ) from None


class _Busy(Exception):
    """An endpoint that asks to come again, after the seconds it wishes if it says so."""

    def __init__(self, status: int, wished: str) -> None:
        super().__init__(status, wished)
        self.status, self.wished = status, wished


def _pause(error: Exception, failures: int) -> float:
    if not isinstance(error, _Busy) or failures >= MOST_TRIES:
        raise error
    seconds = float(error.wished) if error.wished.isdecimal() else 2.0**failures
    return min(seconds, LONGEST_PAUSE)
