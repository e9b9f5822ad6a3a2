"""The service over HTTP: `/v1/sql`, what the page and OpenAI's clients need, health and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest

from ray_sql import __version__
from ray_sql.config import absolute
from ray_sql.config.sections import ServeSection
from ray_sql.errors import DataError, RaySqlError, StoreError
from ray_sql.generate.decoder import AUTO_NUM_SEQS
from ray_sql.serve import wire
from ray_sql.serve.access import Door, error
from ray_sql.serve.batcher import Batcher, Full
from ray_sql.serve.corrections import append
from ray_sql.serve.counts import Counted, Counts
from ray_sql.serve.engine import Engine
from ray_sql.serve.page import add_page
from ray_sql.serve.queries import Queries
from ray_sql.serve.requests import ChatRequest, Correction, RunRequest, SqlRequest

T = TypeVar("T")
log = logging.getLogger(__name__)
LOOK_SECONDS = 0.2
"""Seconds between two looks whether who asked is still there."""
RETRY_SECONDS = 2
"""Seconds after which a request that was refused may come again."""
MOST_REASONS = 1000
"""Characters that say what is wrong with a body."""
GONE = 499
"""The status of a request whose sender did not wait for the answer."""
LATE_ANSWER = "not answered in time; ask again later"
LATE_SAMPLES = f"{LATE_ANSWER}, or ask for fewer samples"
LATE_QUERY = "the query did not end in time; run it again later, or one that reads less"
LATE_ANSWERS_QUERY = (
    'the SQL was written, but did not end in time; send "execute": false to get it without its rows'
)
"""The texts of 504, by what was slow."""


class Service:
    """The answers to all requests, by one engine."""

    def __init__(self, engine: Engine, section: ServeSection) -> None:
        self._engine, self._section = engine, section
        most = engine.config.evaluate.max_num_seqs
        self.batcher = Batcher(
            engine.answer_joinable,
            AUTO_NUM_SEQS if most == "auto" else most,
            section.max_waiting,
            lambda together: self.counts.together.observe(together),
        )
        self.queries = Queries(engine, section.max_waiting, section.max_result_bytes)
        self.counts = Counts(lambda: self.batcher.waiting)

    async def sql(self, body: SqlRequest, request: Request) -> Response:
        """Answer a question about a database, with the rows of its SQL."""
        prompter = self._engine.prompter
        settings = self._engine.config.changed(body.settings()).evaluate
        database = body.database or self._only_database()
        asked = prompter.ask(body.question, database, body.evidence, settings)
        runs = body.execute and prompter.task.executes_sql
        if runs:
            self.queries.require_room()  # a busy service refuses before the model works
        result, links, end = None, {}, self._deadline()
        late = LATE_SAMPLES if settings.samples > 1 else LATE_ANSWER
        reply = await self._wait(self.batcher.submit(asked), request, end, late)
        if self._section.log_questions:
            log.warning("%s: %s: %s", database, body.question, reply.predicted)
        if runs and reply.predicted:
            query = self.queries.submit(database, reply.predicted)
            done = await self._wait(query, request, end, LATE_ANSWERS_QUERY)
            result, links = done.result, done.named_links()
        return await _written(
            lambda: wire.reply(reply, result, prompter.task, prompter.name, body.max_rows) | links
        )

    async def chat(self, body: ChatRequest, request: Request) -> dict[str, Any]:
        """Answer a conversation, written in the chat template of the base model."""
        name = self._engine.prompter.name
        if body.model not in (None, name):
            raise Unknown(f"model {body.model!r} is not served; {name} is")
        settings = self._engine.config.evaluate.greedy()
        if body.most_tokens and body.most_tokens < settings.max_new_tokens:
            settings = settings.model_copy(update={"max_new_tokens": body.most_tokens})
        turns = [message.turn() for message in body.messages]
        asked = self._engine.prompter.ask_turns(turns, settings)
        reply = await self._wait(self.batcher.submit(asked), request, self._deadline(), LATE_ANSWER)
        cut = reply.new_tokens >= settings.max_new_tokens
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": reply.raw},
                    "finish_reason": "length" if cut else "stop",
                }
            ],
            "usage": {
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.new_tokens,
                "total_tokens": reply.prompt_tokens + reply.new_tokens,
            },
        }

    async def run(self, body: RunRequest, request: Request) -> Response:
        """Run a query on a registered database, as those of answers are run."""
        self._engine.prompter.database(body.database)
        self.queries.require_room()
        query = self.queries.submit(body.database, body.sql)
        done = await self._wait(query, request, self._deadline(), LATE_QUERY)
        if self._section.log_questions:
            log.warning("%s: %s", body.database, body.sql)
        return await _written(
            lambda: {
                "database": body.database,
                **wire.rows(done.result, body.max_rows),
                **done.named_links(),
                "timings": {"query_seconds": round(done.result.seconds, 3)},
            }
        )

    async def correct(self, body: Correction) -> dict[str, bool]:
        """Keep a corrected pair in the file of corrections."""
        self._engine.prompter.database(body.database)
        if self._section.corrections is None:
            raise DataError("corrections are not kept; start with --serve.corrections FILE")
        file = absolute(self._section.corrections)
        pair = body.database, body.question, body.sql, body.evidence
        await asyncio.to_thread(append, file, *pair)
        return {"saved": True}

    async def databases(self) -> dict[str, Any]:
        """List the databases by name, with what is asked about them."""
        prompter = self._engine.prompter
        return {
            "model": prompter.name,
            "task": prompter.task.name,
            "saves": self._section.corrections is not None and prompter.task.executes_sql,
            "databases": sorted(prompter.databases),
        }

    async def database(self, name: str) -> dict[str, Any]:
        """Return the schema of a database."""
        return wire.schema(self._engine.prompter.database(name))

    async def models(self) -> dict[str, Any]:
        """List the model, in OpenAI's words, with its databases, and of what it is made."""
        prompter = self._engine.prompter
        model = {"id": prompter.name, "object": "model", "created": 0, "owned_by": "ray_sql"}
        own = {"databases": sorted(prompter.databases), "ray_sql": self._engine.described}
        return {"object": "list", "data": [model | own]}

    async def healthz(self) -> dict[str, str]:
        """Say that the service is ready."""
        return {"status": "ok"}

    async def metrics(self) -> PlainTextResponse:
        """Return counts and times for Prometheus."""
        return PlainTextResponse(generate_latest(self.counts.registry))

    def _deadline(self) -> float:
        """Return when a request that comes now has taken too long."""
        return time.monotonic() + self._section.request_timeout_s

    async def _wait(self, coming: asyncio.Future[T], request: Request, end: float, late: str) -> T:
        """Return what is coming, unless nobody waits for it any more.

        Raises `Late` with the words `late` at the time `end`.
        """
        gone = asyncio.create_task(_until_gone(request))
        try:
            either: set[asyncio.Future[Any]] = {coming, gone}
            left = end - time.monotonic()
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
            raise Gone if gone.done() else Late(late)
        finally:
            gone.cancel()
            coming.cancel()

    def _only_database(self) -> str:
        names = sorted(self._engine.prompter.databases)
        if len(names) != 1:
            raise DataError(f"database is missing; give one of {', '.join(names)}")
        return names[0]


class Gone(Exception):
    """Nobody waits for the answer."""


class Late(TimeoutError):
    """A request has taken too long. Its text says what was slow, and what would be faster."""


class Unknown(Exception):
    """A model that is not served."""


def make_app(engine: Engine, section: ServeSection, token: str | None) -> FastAPI:
    """Return the service as an ASGI application; without a token, for this machine only."""
    service = Service(engine, section)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        answering = asyncio.create_task(service.batcher.run())
        yield
        answering.cancel()

    # no pages of documentation: they fetch scripts from elsewhere
    app = FastAPI(
        title="ray_sql", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_api_route("/v1/sql", service.sql, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/run", service.run, methods=["POST"])
    app.add_api_route("/v1/corrections", service.correct, methods=["POST"], status_code=201)
    app.add_api_route("/v1/databases", service.databases, methods=["GET"])
    app.add_api_route("/v1/databases/{name:path}", service.database, methods=["GET"])
    app.add_api_route("/healthz", service.healthz, methods=["GET"])
    app.add_api_route("/metrics", service.metrics, methods=["GET"])
    add_page(app)
    app.add_exception_handler(RequestValidationError, _unreadable)
    app.add_exception_handler(RaySqlError, _bad_request)
    app.add_exception_handler(StoreError, _elsewhere)
    app.add_exception_handler(Full, _full)
    app.add_exception_handler(TimeoutError, _late)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(Unknown, _unknown)
    app.add_middleware(Door, token=token, most_bytes=section.max_request_bytes)
    app.add_middleware(Counted, counts=service.counts)  # the outermost: it counts refusals too
    return app


async def _written(make: Callable[[], dict[str, Any]]) -> Response:
    """Return JSON that is made in a thread: it may have many rows, and others ask meanwhile."""
    return await asyncio.to_thread(lambda: JSONResponse(make()))


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(LOOK_SECONDS)


async def _unreadable(_: Request, mistake: Any) -> JSONResponse:
    """Say what is wrong with a body, without what it holds: JSON cannot write all that it reads."""
    reasons = (f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in mistake.errors())
    return error(422, "; ".join(reasons)[:MOST_REASONS])


async def _bad_request(_: Request, mistake: Exception) -> JSONResponse:
    return error(400, str(mistake))


async def _elsewhere(_: Request, mistake: Exception) -> JSONResponse:
    return error(502, str(mistake))


async def _full(_: Request, __: Exception) -> JSONResponse:
    wait = {"Retry-After": str(RETRY_SECONDS)}
    return error(503, "as many questions wait as may; ask again later", **wait)


async def _late(_: Request, mistake: Exception) -> JSONResponse:
    return error(504, str(mistake) if isinstance(mistake, Late) else LATE_ANSWER)


async def _gone(_: Request, __: Exception) -> JSONResponse:
    return error(GONE, "nobody waits for the answer")


async def _unknown(_: Request, mistake: Exception) -> JSONResponse:
    return error(404, str(mistake))
