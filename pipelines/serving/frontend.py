"""The HTTP side: routes, bodies and errors. Everything that the routes use is imported: Serve ships this class by value."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import ray
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from molmo_core.generation.engine.requests import SamplingParams
from molmo_core.registry import BaseModelConfig
from pipelines.model_folder import REGISTRY, model_folder
from pipelines.serving.answer import Answer
from pipelines.serving.api.chat import ChatRequest
from pipelines.serving.api.completions import CompletionRequest
from pipelines.serving.api.openapi import Api, refusals, takes
from pipelines.serving.api.responses import ResponsesRequest
from pipelines.serving.api.tokenise import DetokenizeRequest, TokenizeRequest
from pipelines.serving.chat import ChatService
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError, as_api_error, clipped, queue_full, unavailable
from pipelines.serving.heap import freeze_heap
from pipelines.serving.json_body import parse_body
from pipelines.serving.keys import KeyGuard
from pipelines.serving.media.pool import MediaPool
from pipelines.serving.metrics import Counted, FrontendMetrics, Reporter
from pipelines.serving.pieces import Pieces
from pipelines.serving.playground import HEADERS, PageFile
from pipelines.serving.remote import RemotePieces, process_name
from pipelines.serving.traces.middleware import Traced, tracer
from pipelines.serving.traces.spans import asked
from pipelines.serving.wire import Inbox

PREPARING = 256
"""Requests that a frontend reads, decodes and tokenises at a time; it refuses the next one."""
HELD_BYTES = 512 << 20
"""Bodies of these requests together, as they came; whoever sends more is refused."""
READY_S = 1.0
"""How long a replica may take to say that it is there."""

Result = TypeVar("Result")

api = Api(title="Molmo", docs_url=None, redoc_url=None)
api.add_middleware(Traced, tracer=lambda: _this().tracer)
api.add_middleware(KeyGuard, digests=lambda: _this().keys)
api.add_middleware(Counted, metrics=lambda: _this().metrics)


@api.exception_handler(ApiError)
@api.exception_handler(Exception)
async def _error(request: Request, error: Exception) -> JSONResponse:
    answer = as_api_error(error)
    if answer.status == 500:
        logging.getLogger("ray.serve").error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(answer.body(), answer.status, headers=answer.headers)


@api.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    routes = [route for route in request.app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    there = ", ".join(f"{method} {route.path}" for route in routes for method in sorted(route.methods or ()))
    message = f"{clipped(f'{request.method} {request.url.path}')}: {error.detail}. There are: {there}."
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)


def _this() -> "Frontend":
    return serve.get_replica_context().servable_object  # type: ignore[return-value]


@serve.ingress(api)
class Frontend:
    """The API of the served models."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: ServeConfig,
        served: list[tuple[ServeConfig, str, DeploymentHandle]],
        collector: DeploymentHandle,
        page: dict[str, PageFile],
        keys: list[bytes],
        beside: list[DeploymentHandle],
    ) -> None:
        """
        Args:
            config: of the server.
            served: of each model its configuration, its place (with its version fixed) and its replicas.
            collector: of the metrics.
            page: files of the page.
            keys: digests of the API keys.
            beside: deployments that only have to be there.
        """
        self._limit = config.max_body_bytes
        self._replicas = [replicas for _, _, replicas in served]
        self._inbox = Inbox()
        self._timeout_s = config.timeout_s
        self._created = int(time.time())
        self._preparing = self._held = 0
        self._page = page
        self.keys: list[bytes] = keys
        self.tracer: Any = tracer(config)
        self._media = MediaPool(config.media_workers, config.max_queued_media, config.media_timeout_s)
        self.metrics: FrontendMetrics = FrontendMetrics()
        self._reporter = Reporter(collector, process_name(), self.metrics.registry)
        prepare = self.metrics.timed(self._media)
        self._services: dict[str, ChatService] = {}
        self._places = {one.served_name: place for one, place, _ in served}
        names = list(self._places)
        for one, place, replicas in served:
            generate = partial(self._generate, one.served_name, replicas)
            self._services[one.served_name] = ChatService(one, BaseModelConfig.load(model_folder(place)), generate, prepare, names)
        await self._inbox.open(ray.util.get_node_ip_address())
        freeze_heap()

    @api.get("/", include_in_schema=False)
    async def index(self) -> Response:
        """The page to try the model on."""
        return self._page_file("index.html")

    @api.get("/page/{name}", include_in_schema=False)
    async def page(self, name: str) -> Response:
        """A part of that page."""
        return self._page_file(name)

    def _page_file(self, name: str) -> Response:
        if name not in self._page:
            raise HTTPException(404)
        file = self._page[name]
        return Response(file.content, media_type=file.media_type, headers=HEADERS)

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """This process answers, however busy the model is (`/ready` says whether there is a model)."""
        return {"status": "ok"}

    @api.get("/ready")
    async def ready(self) -> dict[str, str]:
        """A replica of each model has it loaded and answers. This does not pass the queue of the requests."""
        try:
            async with asyncio.timeout(READY_S):
                for replicas in self._replicas:
                    await replicas.load.remote()
        except Exception as error:  # of whatever keeps a replica from answering
            raise unavailable("No replica of the model answers.", "not_ready") from error
        return {"status": "ready"}

    @api.get("/metrics", response_class=Response)
    async def metrics_of_all(self) -> Response:
        """Numbers of all processes for Prometheus. Nobody is asked for them, so they are there however busy the model is."""
        return Response(self._reporter.exposition(), media_type=CONTENT_TYPE)

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The models that are served."""
        return {"object": "list", "data": [self._entry(service) for service in self._services.values()]}

    @api.get("/v1/models/{name:path}", responses=refusals(404))
    async def model(self, name: str) -> dict[str, Any]:
        """One of them, by its name."""
        service = self._of(name)
        service.check_model(name)
        return self._entry(service)

    @api.post("/v1/chat/completions", **takes(ChatRequest, streams=True))
    async def chat_completions(self, request: Request) -> Response:
        """Continues a conversation. With `stream`: server-sent events."""
        return await self._answered(request, ChatService.start)

    @api.post("/v1/completions", **takes(CompletionRequest, streams=True))
    async def completions(self, request: Request) -> Response:
        """Continues texts. With `stream`: server-sent events."""
        return await self._answered(request, ChatService.complete)

    @api.post("/v1/responses", **takes(ResponsesRequest, streams=True))
    async def responses(self, request: Request) -> Response:
        """Continues a conversation, in the form of OpenAI's responses. With `stream`: server-sent events."""
        return await self._answered(request, ChatService.respond)

    @api.post("/tokenize", **takes(TokenizeRequest))
    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text or a conversation."""
        return JSONResponse(await self._prepared(request, ChatService.tokenize))

    @api.post("/detokenize", **takes(DetokenizeRequest))
    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        return JSONResponse(await self._prepared(request, ChatService.detokenize))

    async def _answered(self, request: Request, start: Callable[[ChatService, Any], Awaitable[Answer]]) -> Response:
        answer = await self._prepared(request, start)
        if not answer.streamed:
            return JSONResponse(await answer.whole())
        await answer.begin()
        return StreamingResponse(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _prepared(self, request: Request, start: Callable[[ChatService, Any], Awaitable[Result]]) -> Result:
        """What becomes of a body: read, checked, decoded and tokenised, among not too many at a time."""
        if self._preparing >= PREPARING:
            raise queue_full()
        self._preparing += 1
        body = bytearray()
        try:
            await self._read(request, body)
            asked(parsed := await parse_body(body))
            return await start(self._of(parsed.get("model") if isinstance(parsed, dict) else None), parsed)
        finally:
            self._preparing -= 1
            self._held -= len(body)

    def _of(self, name: Any) -> ChatService:
        """The service of a model. If there is none of that name it is the first one, which says what is wrong with a request."""
        first = next(iter(self._services.values()))
        return self._services.get(name, first) if isinstance(name, str) else first

    def _entry(self, service: ChatService) -> dict[str, Any]:
        entry = {"id": service.name, "object": "model", "created": self._created, "owned_by": "molmo-pipelines"}
        place = self._places[service.name]
        version = {"root": place} if place.startswith(REGISTRY) else {}  # a path of this machine is nobody's business
        return {**entry, "max_model_len": service.context, **version}

    async def _read(self, request: Request, body: bytearray) -> None:
        async for part in request.stream():
            body += part
            self._held += len(part)
            if len(body) > self._limit:
                message = f"The request is larger than the {self._limit:,} bytes that this server takes."
                raise ApiError(413, message, None, "request_too_large")
            if self._held > HELD_BYTES and self._preparing > 1:
                raise queue_full()

    def __del__(self) -> None:
        self._media.close()
        self._reporter.close()
        if self.tracer is not None:
            self.tracer.close()

    def _generate(self, name: str, replicas: DeploymentHandle, example: Mapping[str, Any], params: SamplingParams) -> Pieces:
        watch = self.metrics.begin(name, len(example["input_ids"]))
        return RemotePieces(replicas, self._inbox, example, params, self._timeout_s, watch)
