"""AdamW for bfloat16 weights: arithmetic in float32, one pass over the memory, stochastic rounding of what is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from molmo_core.nn.host import to_device
from pipelines.training.rounding import first_position, local, random_bits, rounded


class AdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW (Loshchilov and Hutter, 2019), and with the same state names, for bfloat16 parameters.

    Args:
        params: bfloat16 parameters, or groups of them; plain tensors or DTensors sharded on rows.
        lr, betas, eps, weight_decay: as in torch.
        moments: dtype of both moments; bfloat16 ones are rounded stochastically, too.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments
        self._chunks: tuple[list[int], Any] | None = None
        self._parts: dict[torch.Tensor, torch.Tensor] = {}
        self._placed: tuple[list[torch.Tensor], torch.Tensor] | None = None
        self.register_load_state_dict_post_hook(lambda optimizer: self._parts.clear())
        self.gradient_scales: Mapping[str, torch.Tensor] = {}
        """Factors of the gradients (float32 scalars on the device) by the `group` of a parameter group; for clipping."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype != torch.bfloat16:
                    raise ValueError(f"AdamW with stochastic rounding updates bfloat16 parameters, got {p.dtype}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leaves everything as it is if the attribute `found_inf` (a scalar on the device, see torch.amp.GradScaler) is there and not 0."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None and self._part(p).numel()]
        if not parameters:
            return
        device = local(parameters[0]).device
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(p, dtype=self.moments),
                    "exp_avg_sq": torch.zeros_like(p, dtype=self.moments),
                }
        found_inf = getattr(self, "found_inf", None)
        taken = torch.ones((), device=device) if found_inf is None else (found_inf == 0).float()
        steps = torch.stack([self.state[p]["step"] for p in parameters]) + taken
        torch._foreach_copy_([self.state[p]["step"] for p in parameters], list(steps.unbind()))

        places = self._places(parameters, device)
        seeds = torch.stack((random_bits(places[:, 0], steps.int()), places[:, 1]), 1)
        numbers = self._numbers(parameters, steps, taken)
        tensors = [
            [self._part(p), local(p.grad), self._part(self.state[p]["exp_avg"]), self._part(self.state[p]["exp_avg_sq"])]
            for p in parameters
        ]
        if device.type != "cuda":
            for (weights, gradient, mean, square), row, seed in zip(tensors, numbers.unbind(), seeds.unbind()):
                update(weights, gradient, mean, square, row, seed)
            return
        from pipelines.training.optim_kernels import Chunks, adamw, table  # Triton is there with a GPU only

        sizes = [four[0].numel() for four in tensors]
        if self._chunks is None or self._chunks[0] != sizes:
            self._chunks = (sizes, Chunks(sizes, device))
        for four in tensors:
            four[1] = four[1].contiguous()
        addresses, aligned = table([[*(t.data_ptr() for t in four), size] for four, size in zip(tensors, sizes)], device)
        adamw(addresses, aligned, self._chunks[1], numbers, seeds, self.moments == torch.bfloat16)

    def _part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a weight or moment, changed in place only: to ask 2,000 of them in every step keeps the host."""
        if tensor not in self._parts:
            self._parts[tensor] = local(tensor)
        return self._parts[tensor]

    def _places(self, parameters: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        """int32 [n, 2]: a number of each parameter, the same in every step and process, and where this rank's part of it begins."""
        if self._placed is None or [*map(id, self._placed[0])] != [*map(id, parameters)]:
            numbers = {id(p): number for number, p in enumerate(p for group in self.param_groups for p in group["params"])}
            rows = [(0x9E3779B9 * numbers[id(p)] & 0x7FFFFFFF, first_position(p)) for p in parameters]
            self._placed = parameters, to_device(torch.tensor(rows).int(), device)
        return self._placed[1]

    def _numbers(self, parameters: list[torch.Tensor], steps: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        """What `update` has to know of each parameter, float32 [n, 8], given their steps [n]."""
        rows, scales, here = [], [], {id(p) for p in parameters}
        one = torch.ones_like(taken)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            count = sum(id(p) in here for p in group["params"])
            rows += [(group["lr"], 1 - group["lr"] * group["weight_decay"], beta1, beta2, group["eps"])] * count
            scales += [self.gradient_scales.get(group.get("group", ""), one).float()] * count
        lr, kept, beta1, beta2, eps = to_device(torch.tensor(rows), steps.device).unbind(1)
        columns = (lr / (1 - beta1**steps), (1 - beta2**steps).rsqrt(), kept, 1 - beta1, 1 - beta2, eps, torch.stack(scales))
        return torch.stack((*columns, taken.expand_as(lr)), 1)


def update(
    weights: torch.Tensor, gradient: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, numbers: torch.Tensor, seed: torch.Tensor
) -> None:
    """One step of one parameter, in place.

    Args:
        weights, gradient, mean, square: of one shape, the first bfloat16.
        numbers: float32 [8]: learning rate over bias correction, 1 / √ of the other, 1 - lr · weight decay, 1 - β₁, 1 - β₂, ε, the factor
            of the gradient, and whether the step is taken.
        seed: int32 [2]: of the random bits, and the position of the first number in the whole parameter.
    """
    rate, root, kept, new1, new2, eps, scale, taken = numbers.unbind()
    g, m, v = gradient.float() * scale, mean.float(), square.float()
    m, v = m + (g - m) * new1, v + (g * g - v) * new2
    w = weights.float() * kept - rate * m / (v.sqrt() * root + eps)
    positions = torch.arange(weights.numel(), dtype=torch.int32, device=weights.device).view_as(weights) + seed[1]
    bits = random_bits(seed[0], positions)
    for tensor, value, chance in ((weights, w, bits), (mean, m, bits >> 16), (square, v, (bits * 0x2C1B3C6D) >> 16)):
        new = rounded(value, chance) if tensor.dtype == torch.bfloat16 else value
        tensor.copy_(torch.where(taken > 0, new, tensor))
