"""Follows an alias of the registry: when it moves, the application is deployed anew with the version that it names then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from molmo_core.registry import BaseModelConfig
from pipelines.model_folder import fixed_model, model_folder

logger = logging.getLogger("ray.serve")

CHECK_S = 10.0


class AliasWatcher:
    """Looks at the registry every few seconds. A deployment of its own, so that it is there however the application was deployed.

    Only versions that read the same inputs are followed (configuration and tokenizer are equal): while replicas are replaced, a prompt
    that was prepared for one version may be answered by the other.

    Args:
        models: addresses in the registry.
        versions: what they stood for when the application was deployed.
        deploy: deploys it anew, with what they stand for now; this watcher is replaced with it.
    """

    def __init__(self, models: Sequence[str], versions: Sequence[str], deploy: Callable[[], Any]) -> None:
        self._models, self._versions, self._deploy = list(models), list(versions), deploy
        self._refused: list[str] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="alias", daemon=True).start()

    def _work(self) -> None:
        while not self._closed.wait(CHECK_S):
            try:
                if self._moved():
                    logger.info("%s: deploying it anew", ", ".join(self._models))
                    self._deploy()
                    return
            except Exception as error:  # of the registry or of Serve: what is served goes on, the next look is in a few seconds
                logger.warning("%s cannot be followed just now: %s: %s", ", ".join(self._models), type(error).__name__, error)

    def _moved(self) -> bool:
        """Whether there is something else to serve that can be followed."""
        now = [fixed_model(model) for model in self._models]
        if now in (self._versions, self._refused):
            return False
        for old, new in zip(self._versions, now):
            if old != new and _inputs(old) != _inputs(new):
                logger.error(
                    "%s is not followed from %s: its configuration or tokenizer differs. Start the server anew to serve it.", new, old
                )
                self._refused = now
                return False
        return True

    def __del__(self) -> None:
        self._closed.set()


def _inputs(model: str) -> tuple[Any, ...]:
    """What decides how a prompt for a model is prepared."""
    config: Any = BaseModelConfig.load(model_folder(model))
    tokenizer = config.build_tokenizer()
    config.llm.tokenizer.identifier = ""  # a place, different for each version
    return config.as_dict(), tokenizer.fingerprint
