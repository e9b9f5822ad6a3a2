"""The bodies of requests, as OpenAPI describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ray_sql.config.sections import MOST, Way
from ray_sql.database import MOST_SQL

MOST_ROWS = 1000
"""Rows that are sent where a request does not say how many."""


class Body(BaseModel):
    """A body of our own paths, which has nothing but what they know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SqlRequest(Body):
    """A question about a database. Without a database, it is about the only one."""

    question: str = Field(min_length=1, max_length=20_000)
    database: str | None = None
    evidence: str = Field("", max_length=20_000)
    execute: bool = True
    max_rows: int = Field(MOST_ROWS, ge=0, le=MOST)
    samples: int | None = Field(None, ge=1, le=64)
    temperature: float | None = Field(None, gt=0, le=10)
    choose: Way | None = None
    ground: Literal["none", "repair", "constrain"] | None = Field(
        None,
        description="`repair` mends the names of samples, and with `choose` `repaired` those of "
        "the greedy answer. `constrain` has samples, and the answer that `choose` `constrained` "
        "takes, written with names that exist.",
    )

    def settings(self) -> dict[str, Any]:
        """Return the settings of `evaluate` that the request gives, by their dotted names."""
        given = self.model_dump(include={"samples", "temperature", "choose", "ground"})
        return {f"evaluate.{name}": value for name, value in given.items() if value is not None}


class RunRequest(Body):
    """A query on a database."""

    database: str
    sql: str = Field(min_length=1, max_length=MOST_SQL)
    max_rows: int = Field(MOST_ROWS, ge=0, le=MOST)


class Correction(Body):
    """A question, asked with or without a hint, with the query that answers it."""

    database: str
    question: str = Field(min_length=1, max_length=20_000)
    evidence: str = Field("", max_length=20_000)
    sql: str = Field(min_length=1, max_length=MOST_SQL)


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant", "developer"]
    content: str | list[Part]

    def turn(self) -> dict[str, str]:
        """Return the turn as chat templates take it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": self.role, "content": text}


class ChatRequest(BaseModel):
    """A conversation in OpenAI's words. Answers are greedy, one at a time, and sent whole."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    messages: list[Message] = Field(min_length=1, max_length=100)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=100_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=100_000)
    temperature: Literal[0] | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Return the length of the answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens
