"""An answer that a replica generates elsewhere. Ray's errors become the API's here: nothing that uses it knows Ray."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from pipelines.serving.errors import ApiError, unavailable
from pipelines.serving.pieces import Piece


class RemotePieces:
    """`Pieces` of a Serve deployment."""

    def __init__(self, pieces: DeploymentResponseGenerator[Piece]) -> None:
        self._pieces = pieces

    async def __anext__(self) -> Piece:
        try:
            return await self._pieces.__anext__()
        except RayActorError as error:
            raise unavailable("A replica of the model was lost during this answer; try again.", "replica_lost") from error
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise unavailable("There is no replica of the model just now; try again in a moment.", "not_ready") from error
        except RayTaskError as error:
            if isinstance(error.cause, ApiError):
                raise error.cause from None
            raise

    def cancel(self) -> None:
        """Closes the replica's generator."""
        self._pieces.cancel()
