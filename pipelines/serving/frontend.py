"""The HTTP side: routes, bodies and errors. Everything that the routes use is imported: Serve ships this class by value."""

import json
import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from molmo_core.registry import BaseModelConfig
from pipelines.model_folder import model_folder
from pipelines.serving.chat import ChatService
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError, as_api_error, bad_request

api = FastAPI(title="Molmo", docs_url=None, redoc_url=None)


@api.exception_handler(ApiError)
@api.exception_handler(BackPressureError)
@api.exception_handler(RayActorError)
@api.exception_handler(Exception)
async def _error(request: Request, error: Exception) -> JSONResponse:
    answer = as_api_error(error)
    if answer.status == 500:
        logging.getLogger("ray.serve").error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(answer.body(), answer.status, headers={"Retry-After": "1"} if answer.status == 503 else None)


@api.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}. There are: POST /v1/chat/completions, GET /v1/models, GET /health."
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)


@serve.ingress(api)
class Frontend:
    """The API of one served model."""

    def __init__(self, config: ServeConfig, model: str, engine: DeploymentHandle) -> None:
        self._limit = config.max_body_bytes
        self._engine = engine
        self._created = int(time.time())
        model_config = BaseModelConfig.load(model_folder(model))
        self._service = ChatService(config, model_config, engine.options(stream=True).generate.remote)

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Answers once the model is loaded and working."""
        await self._engine.load.remote()
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        entry = {"id": self._service.name, "object": "model", "created": self._created, "owned_by": "molmo-pipelines"}
        return {"object": "list", "data": [{**entry, "max_model_len": self._service.context}]}

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        """OpenAI's chat completions; `pipelines.serving.schema` says which part of it."""
        answer = await self._service.start(await self._read_json(request))
        if not answer.streamed:
            return JSONResponse(await answer.whole())
        first = await answer.next()  # what fails before the first token still gets an HTTP status
        return StreamingResponse(answer.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _read_json(self, request: Request) -> Any:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._limit:
                message = f"The request is larger than the {self._limit:,} bytes that this server takes."
                raise ApiError(413, message, None, "request_too_large")
        try:
            return json.loads(body)
        except ValueError as error:
            raise bad_request(f"The body is not valid JSON: {error}.") from error
