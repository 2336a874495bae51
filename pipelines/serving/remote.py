"""An answer that a replica generates elsewhere. Ray's errors become the API's here: nothing that uses it knows Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from molmo_core.generation.engine.requests import SamplingParams
from pipelines.serving.errors import ApiError, timed_out, unavailable
from pipelines.serving.metrics import AnswerWatch
from pipelines.serving.pieces import Piece
from pipelines.serving.wire import ConnectionLost, Inbox

ATTEMPTS = 4
"""Replicas that may be lost during an answer, less one: a request that itself ends them must not end all of them."""
LOST = (ConnectionLost, RayError, OSError)
"""Errors of the way to a replica; what a replica itself raises comes as the cause of a `RayTaskError`."""

_Parts = asyncio.Queue[Piece | BaseException]


class RemotePieces:
    """`Pieces` of a Serve deployment. If a replica is lost, another one goes on where it stopped.

    Args:
        replicas: handle of the deployment (`Replica`).
        inbox: where its tokens arrive.
        timeout_s: longest time to the end of the answer.
        watch: is told of its parts.
    """

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        inbox: Inbox,
        example: Mapping[str, Any],
        params: SamplingParams,
        timeout_s: float,
        watch: AnswerWatch,
    ) -> None:
        self._replicas, self._inbox, self._example, self._params = replicas, inbox, example, params
        self._timeout_s, self._watch = timeout_s, watch
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._tokens: list[int] = []
        self._places: list[int] = []
        self._attempts = 0
        self._ended = False
        self._begin()

    def _begin(self) -> None:
        self._attempts += 1
        self._parts: _Parts = asyncio.Queue()
        self._number = self._inbox.expect(self._parts.put_nowait)
        where = self._inbox.address, self._number
        begun = self._tokens, self._places
        self._response = cast(DeploymentResponse[None], self._replicas.answer.remote(self._example, self._params, begun, *where))
        self._call = asyncio.ensure_future(_follow(self._response, self._parts))

    async def __anext__(self) -> Piece:
        """What has come since the last part."""
        try:
            async with asyncio.timeout_at(self._deadline):
                while not (piece := await self._next()):
                    pass
        except TimeoutError:
            self.cancel()
            raise timed_out(self._timeout_s) from None
        except BaseException:
            self.cancel()
            raise
        self._tokens += piece.tokens
        self._places += piece.places or [-1] * len(piece.tokens)
        self._watch.part(len(piece.tokens), piece.finish_reason is not None)
        if piece.finish_reason is not None:
            self._end()
        return piece

    async def _next(self) -> Piece | None:
        """The parts that are there, as one; None: there is no token yet, or the replica was lost and another one has been asked."""
        parts = [await self._parts.get()]
        while not self._parts.empty():
            parts.append(self._parts.get_nowait())
        pieces = [part for part in parts if isinstance(part, Piece)]
        if pieces:
            if len(pieces) < len(parts):  # looked at next time
                self._parts.put_nowait(parts[-1])
            piece = _joined(pieces)
            return piece if piece.tokens or piece.finish_reason else None
        error = parts[-1]
        assert isinstance(error, BaseException)
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, LOST):
            if self._attempts == ATTEMPTS:
                raise unavailable(f"{ATTEMPTS} replicas of the model were lost during this answer; try again.", "replica_lost") from error
            self._inbox.forget(self._number)
            self._watch.lost()
            self._begin()
            return None
        if isinstance(error, (BackPressureError, DeploymentUnavailableError)):
            raise unavailable("There is no replica of the model just now; try again in a moment.", "not_ready") from error
        raise cause if isinstance(cause, ApiError) else error

    def cancel(self) -> None:
        """Stops the replica's work on this answer."""
        if not self._ended:
            self._end()
            self._response.cancel()

    def _end(self) -> None:
        self._ended = True
        self._inbox.forget(self._number)
        self._call.cancel()

    def __del__(self) -> None:
        self.cancel()  # whoever wanted it is gone


def process_name() -> str:
    """Of the replica of a deployment that this process is."""
    replica = serve.get_replica_context().replica_id
    return f"{replica.deployment_id.name}-{replica.unique_id}"


async def _follow(response: DeploymentResponse[None], parts: _Parts) -> None:
    """Tells of a call that fails; one that succeeds has sent the end of its answer."""
    try:
        await response
    except asyncio.CancelledError:  # somebody else has ended the call, unless nobody looks at its parts any more
        parts.put_nowait(ConnectionLost())
        raise
    except Exception as error:  # of whatever the replica or the way to it raises: `_next` sorts them
        parts.put_nowait(error)


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    tokens, logprobs = [t for piece in pieces for t in piece.tokens], [p for piece in pieces for p in piece.logprobs or ()]
    times = next((piece.times for piece in pieces if piece.times is not None), None)
    places = None
    if any(piece.places for piece in pieces):
        places = [place for piece in pieces for place in piece.places or [-1] * len(piece.tokens)]
    return Piece(tokens, pieces[-1].finish_reason, logprobs or None, times, places)
