"""The application: routes over a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, Response

from w2s_fast.engine import AsyncEngine, Engine
from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams
from w2s_fast.serve import chat, completions, live, refusals, scores, tokens
from w2s_fast.serve.chat import ChatBody
from w2s_fast.serve.completions import CompletionBody
from w2s_fast.serve.live import LiveBody
from w2s_fast.serve.middleware import Guard
from w2s_fast.serve.page import live_page
from w2s_fast.serve.refusals import JSON, Refusal, respond
from w2s_fast.serve.scores import ScoreBody
from w2s_fast.serve.service import Service
from w2s_fast.serve.settings import ServerSettings
from w2s_fast.serve.streams import ClientLeft, EventStream, unless_left
from w2s_fast.serve.tokens import DetokenizeBody, TokenizeBody

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "What is wrong with the request, as OpenAI's API says it."},
    "5XX": {"description": "What failed here, likewise."},
}


def build_app(
    engine: Engine, settings: ServerSettings, defaults: SearchParams | None = None
) -> FastAPI:
    """The server as an ASGI application; its engine's thread runs from its start to its end.

    Args:
        engine: serves whoever else uses it, too.
        defaults: of searches, where a body says nothing; None: ``SearchParams()``, and where
            nothing steers, plain samples.

    Raises:
        InvalidRequest: defaults that this engine cannot serve.
    """
    if defaults is None:
        defaults = SearchParams() if engine.guides else SearchParams(method="sample")
    if defaults.max_new_tokens > settings.limits.tokens:
        raise InvalidRequest(
            f"max_new_tokens is {defaults.max_new_tokens} by default; allowed: "
            f"{settings.limits.tokens}"
        )
    if defaults.rows > settings.limits.candidates:
        raise InvalidRequest(
            f"a round has {defaults.rows} candidates by default; allowed: "
            f"{settings.limits.candidates}"
        )
    engine.make_request("a" if engine.tokenizer or engine.server else [0], defaults)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncEngine(engine) as shared:
            app.state.service = Service(shared, settings, defaults)
            yield
            await app.state.service.gate.drain(settings.limits.drain_seconds)

    app = FastAPI(
        title="w2s-fast",
        summary="Weak-to-strong search, as OpenAI's clients ask for text.",
        lifespan=lifespan,
        default_response_class=JSON,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    refusals.install(app)
    app.add_middleware(Guard, settings=settings)
    _add_routes(app)
    return app


def _add_routes(app: FastAPI) -> None:
    def service_of(request: Request) -> Service:
        found: Service = request.app.state.service
        return found

    async def whole(request: Request, work: Any, entries: int) -> Response:
        """The answer of one coroutine, unless the client leaves before."""
        service = service_of(request)
        try:
            with service.gate.enter(entries):
                found = await unless_left(request, service.within_time(work))
        except ClientLeft:
            return Response(status_code=499)
        finally:
            work.close()
        return JSON(found)

    def streamed(service: Service, pieces: AsyncIterator[bytes], entries: int) -> Response:
        async def counted() -> AsyncIterator[bytes]:
            # Closed with this one, and not whenever nobody refers to it.
            async with aclosing(pieces) as own:  # type: ignore[type-var]
                with service.gate.enter(entries):
                    async for piece in own:
                        yield piece

        return EventStream(counted())

    @app.post("/v1/completions", tags=["OpenAI"])
    async def completion(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        service = service_of(request)
        job = completions.job_of(service, body)
        entries = len(job.prompts)
        if body.stream:
            return streamed(service, completions.stream(service, job), entries)
        return await whole(request, completions.complete(service, job), entries)

    @app.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer messages."""
        service = service_of(request)
        job = chat.job_of(service, body)
        if body.stream:
            return streamed(service, chat.stream(service, job), 1)
        return await whole(request, chat.answer(service, job), 1)

    @app.get("/v1/models", tags=["OpenAI"])
    async def models(request: Request) -> Response:
        """Which model is served."""
        return JSON({"object": "list", "data": [_model(service_of(request))]})

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str, request: Request) -> Response:
        """One of them."""
        service = service_of(request)
        service.check_model(name)
        return JSON(_model(service))

    @app.post("/v1/score", tags=["scores"])
    async def score(body: ScoreBody, request: Request) -> Response:
        """What the guides, or one model, say of given texts."""
        return JSON(await scores.scores(service_of(request), body))

    @app.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """Text to token ids."""
        service = service_of(request)
        return JSON(await service.beside(lambda: tokens.tokenize(service, body)))

    @app.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """Token ids to text."""
        service = service_of(request)
        return JSON(await service.beside(lambda: tokens.detokenize(service, body)))

    @app.get("/tokenizer_info", tags=["tokens"])
    async def tokenizer_info(request: Request) -> Response:
        """What clients that tokenise by themselves need to know."""
        return JSON(tokens.tokenizer_info(service_of(request)))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(live_page())

    @app.get("/live", include_in_schema=False)
    async def live_about(request: Request) -> Response:
        return JSON(live.about(service_of(request)))

    @app.post("/live", tags=["page"])
    async def live_search(body: LiveBody, request: Request) -> Response:
        """A search told round by round."""
        service = service_of(request)
        service.check_model(body.model)
        params = service.params(body)
        return streamed(service, live.live(service, body, params), 1)

    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """Whether the process answers."""
        return JSON({"status": "ok"})

    @app.get("/ready", tags=["operation"])
    async def ready(request: Request) -> Response:
        """Whether requests are taken on: 503 once the engine has failed, or while stopping."""
        service = service_of(request)
        if not service.alive:
            return respond(Refusal(503, "the engine has failed", code="engine_unavailable"))
        if service.gate.draining:
            return respond(Refusal(503, "the server is stopping", code="stopping"))
        return JSON({"status": "ready"})

    @app.get("/metrics", tags=["operation"])
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        body = service_of(request).metrics.render()
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service) -> dict[str, Any]:
    engine = service.engine.engine
    found = {
        "id": service.settings.name,
        "object": "model",
        "created": service.started,
        "owned_by": "w2s-fast",
    }
    return found if engine.server else {**found, "max_model_len": engine.max_tokens}
