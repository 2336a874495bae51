"""What the loop carries beside the step itself: one list of hooks, called in order and by all ranks alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass
class Step:
    """A step, as hooks see it. Its tensors are on the device, the same on all ranks, and nothing has waited for them."""

    number: int
    last: bool
    """Whether the run ends with it."""
    loss: torch.Tensor
    """Mean cross entropy of the global batch, a scalar."""
    norms: dict[str, torch.Tensor]
    """Of each part's gradients, before clipping."""
    batch: dict[Any, Any]
    """This rank's state of the loader before its batch (`TrainLoader.state_dict`): which examples it has."""
    left_out: torch.Tensor = dataclasses.field(init=False)
    """Bool scalar: the optimiser does not take the step. Hooks may set it after the backward pass."""

    def __post_init__(self) -> None:
        self.left_out = torch.zeros((), dtype=torch.bool, device=self.loss.device)


class Hook:
    """Does nothing; hooks do some of it."""

    def after_backward(self, step: Step) -> None:
        """The gradients are there, not yet clipped."""

    def after_step(self, step: Step) -> None:
        """The optimiser's work has been given to the device, and the step is logged if it was its turn."""

    def at_interval(self) -> dict[str, float]:
        """Numbers for the log, every `log_interval` steps. Here the host may wait for the device."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs (JSON); called before every save. What is still to be said of earlier steps is said here."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that a resumed run needs, sharded as the model's are: saved as they are, and filled in place before `load_state`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave; empty if the run was saved without this hook."""

    def close(self) -> None:
        """The run ends, with an error or without."""


class Later:
    """A small tensor on its way to the host: nobody waits for it before it is read."""

    def __init__(self, values: torch.Tensor):
        """`values` [n]."""
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values.detach().clone()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
