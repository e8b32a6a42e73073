# SPDX-License-Identifier: Apache-2.0
"""The routes: OpenAI's `/v1/models` and `/v1/chat/completions`, and `/health`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moellava.errors import UserError
from moellava.serve.api.growing import Piece
from moellava.serve.api.guard import Guard
from moellava.serve.api.limits import ServerLimits, Slots
from moellava.serve.api.refusals import UNEXPECTED, Refusal, error_json, refusal_json
from moellava.serve.api.replies import DONE, Reply, event
from moellava.serve.api.scheduler import Finished, Job, Scheduler
from moellava.serve.api.schema import ChatBody, Question, parsed, question_of

BODY_SECONDS = 60.0
"""How long a client may take to send its body."""

GONE = 499
"""Status, in the log alone, of a request whose client has left."""

Event = Piece | Finished
"""What an answer is made of."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What the routes are told.

    Attributes:
        name: of the model, as clients have to spell it.
        api_key: what clients have to bring; None: nothing.
        is_local: whether the server listens to this machine alone.
    """

    name: str
    api_key: str | None = None
    is_local: bool = True


class Service:
    """What the routes and the page ask: a model, behind the server's limits.

    Args:
        scheduler: answers.
        settings: names and keys.
    """

    def __init__(self, scheduler: Scheduler, settings: Settings):
        self.scheduler, self.settings = scheduler, settings
        self.limits: ServerLimits = scheduler.limits
        self.slots = Slots(self.limits.requests)
        self.began = int(time.time())

    async def events(self, question: Question) -> AsyncGenerator[Event, None]:
        """The answer as it grows, without a slot. Raises UserError if it cannot be given."""
        job = Job(question, await run_in_threadpool(self.scheduler.example, question))
        self.scheduler.put(job)
        async with aclosing(job.events()) as events:
            async for one in events:
                yield one


def create_app(service: Service) -> FastAPI:
    """The API of a model."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.scheduler.close)

    settings, limits = service.settings, service.limits
    app = FastAPI(title="moellava", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=settings.api_key, body_bytes=limits.body_bytes, is_local=settings.is_local)
    card = {"id": settings.name, "object": "model", "created": service.began, "owned_by": "moellava"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": service.slots.taken, "waiting": service.scheduler.waiting()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        require_model(name, settings.name)
        return card

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        async with AsyncExitStack() as stack:
            stack.enter_context(service.slots.one())
            body = await run_in_threadpool(parsed, await body_of(request))
            require_model(body.model, settings.name)
            reply = Reply(settings.name, bool(body.logprobs))
            events = await stack.enter_async_context(aclosing(events_of(service, body)))
            if not body.stream:
                pieces, end = await unless_gone(request, collected(events))
                return JSONResponse(reply.whole(pieces, end))
            first = await unless_gone(request, anext(events))  # what is refused has a status of its own
            return Stream(sent(reply, body, first, events), stack.pop_all())

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        status, content = refusal_json(error)
        return JSONResponse(content, status)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_json(error.detail, error.status_code), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:  # the server logs it
        return JSONResponse(error_json(UNEXPECTED, 500), 500)

    return app


def require_model(name: str, ours: str) -> None:
    """Raises Refusal for another model than the one that is served."""
    if name != ours:
        raise Refusal(f"There is no model {name[:80]!r} here; this server has {ours!r}.", 404, "model")


async def body_of(request: Request) -> bytes:
    """A body, whose size has been looked at. Raises Refusal for another type than JSON, which a page of another site
    could have a browser send, or one that does not come."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal("The body has to be JSON: Content-Type: application/json", 415)
    try:
        return await asyncio.wait_for(request.body(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise Refusal(f"The body has not come within {BODY_SECONDS:g} seconds.", 408) from error
    except ClientDisconnect as error:
        raise Refusal("The client has left.", GONE) from error


async def events_of(service: Service, body: ChatBody) -> AsyncGenerator[Event, None]:
    """The answer to a body as it grows. Raises UserError if it cannot be given."""
    question = await run_in_threadpool(question_of, body, service.limits)
    async with aclosing(service.events(question)) as events:
        async for one in events:
            yield one


async def collected(events: AsyncGenerator[Event, None]) -> tuple[list[Piece], Finished]:
    """All of an answer."""
    pieces = list[Piece]()
    async for one in events:
        if isinstance(one, Finished):
            return pieces, one
        pieces.append(one)
    raise RuntimeError("an answer has no end")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What some work gives. Ends it, and raises Refusal, if the client leaves before."""
    running, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait([running, leaving], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise Refusal("The client has left.", GONE)
    finally:
        for task in (running, leaving):
            task.cancel()
        await asyncio.wait([running, leaving])


async def left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def sent(reply: Reply, body: ChatBody, first: Event, events: AsyncGenerator[Event, None]) -> AsyncIterator[str]:
    """A stream of server-sent events."""
    yield reply.chunk({"role": "assistant", "content": ""})
    one = first
    try:
        while isinstance(one, Piece):
            yield reply.chunk({"content": one.text}, one.tokens)
            one = await anext(events)
    except UserError as error:
        yield event(refusal_json(error)[1])
        return
    yield reply.chunk({}, reason=one.reason)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield reply.last_chunk(one)
    yield DONE


class Stream(StreamingResponse):
    """Server-sent events that hold something until they are sent, or their client has left.

    Args:
        content: the events.
        held: is closed then, also where not one was sent.
    """

    def __init__(self, content: AsyncIterator[str], held: AsyncExitStack):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        async with self.held:
            await super().__call__(scope, receive, send)
