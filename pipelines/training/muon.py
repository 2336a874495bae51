"""Muon: momentum whose update is replaced by the nearest semi-orthogonal matrix (Jordan et al., 2024), for whole or sharded matrices.

Under FSDP2 a rank holds some rows of every matrix, but orthogonalising needs all of them. Each matrix therefore has an owner: one
exchange brings the rows of every matrix to its owner, who orthogonalises it, and one brings the rows of the result back. A step costs
two collectives whatever the number of matrices, and every matrix is worked on once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pipelines.training.rounding import first_position, local, random_bits, rounded

# Coefficients of the quintic iteration: steep at 0, so that five steps bring all singular values to about 1.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalised updates, for two-dimensional parameters.

    Args:
        params: matrices, or groups of them; plain tensors or DTensors whose rows are sharded over the last mesh dimension.
        lr: the update of a matrix has this spectral norm, times sqrt(rows / columns) where there are more rows.
        momentum: of the gradient's moving average.
        weight_decay: decoupled, as in AdamW.
        fused: rows of the matrices that a fused parameter stacks (queries, keys and values, say), by `id` of the parameter;
            each is orthogonalised by itself.
        stochastic: round the updates of bfloat16 parameters stochastically (see `rounding`).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        fused: dict[int, list[int]] | None = None,
        stochastic: bool = False,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.fused = fused or {}
        self.stochastic = stochastic
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon updates matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leaves everything as it is if the attribute `found_inf` (a scalar on the device, see torch.amp.GradScaler) is there and not 0."""
        found_inf = getattr(self, "found_inf", None)
        left_out = None if found_inf is None else found_inf > 0
        parameters: list[torch.Tensor] = []
        updates: list[torch.Tensor] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                    if self.stochastic and p.dtype == torch.bfloat16:
                        state["step"] = torch.zeros((), device=local(p).device)
                gradient, buffer = local(p.grad), local(state["momentum_buffer"])
                _set(buffer, buffer.lerp(gradient, 1 - group["momentum"]), left_out)
                updates.append(gradient.lerp(buffer, group["momentum"]))
                parameters.append(p)
        stacks = [self.fused.get(id(p), [p.shape[0]]) for p in parameters]
        results = dict(zip(map(id, parameters), orthogonalise_sharded(updates, parameters, stacks)))
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if id(p) not in results:
                    continue
                weights = local(p)
                step = self.state[p].get("step")
                decayed = (weights if step is None else weights.float()) * (1 - group["lr"] * group["weight_decay"])
                new = decayed.add_(results[id(p)], alpha=-group["lr"])
                if step is not None:
                    step += 1
                    positions = torch.arange(weights.numel(), dtype=torch.int32, device=weights.device).view_as(weights)
                    new = rounded(new, random_bits(step.int() * 65537 + number, positions + first_position(p)))
                _set(weights, new, left_out)


def _set(tensor: torch.Tensor, value: torch.Tensor, left_out: torch.Tensor | None) -> None:
    tensor.copy_(value if left_out is None else torch.where(left_out, tensor, value))


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, approximately (singular values between about 0.7 and 1.2).

    Args:
        matrices: [..., rows, columns]. Works in bfloat16 on a GPU and in float32 on a CPU, where bfloat16 is slow.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return (x.mT if wide else x).to(matrices.dtype)


def orthogonalise_all(parameters: list[torch.Tensor], stacks: list[list[int]]) -> list[torch.Tensor]:
    """The scaled update of each parameter: its matrices orthogonalised, times sqrt(rows / columns) where there are more rows.

    Args:
        parameters: [rows, columns] each.
        stacks: the rows of the matrices that each parameter stacks.
    """
    matrices = [piece for parameter, rows in zip(parameters, stacks) for piece in parameter.split(rows)]
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_shape[tuple(matrix.shape)].append(i)
    results: list[torch.Tensor] = list(matrices)
    for (height, width), indices in by_shape.items():
        scale = max(1.0, height / width) ** 0.5
        for i, result in zip(indices, orthogonalise(torch.stack([matrices[i] for i in indices]))):  # one shape together
            results[i] = result * scale
    pieces = iter(results)
    return [torch.cat([next(pieces) for _ in rows]) for rows in stacks]


def orthogonalise_sharded(shards: list[torch.Tensor], parameters: list[torch.Tensor], stacks: list[list[int]]) -> list[torch.Tensor]:
    """The rows of the updates (`orthogonalise_all`) that this rank holds, given its rows of the parameters' gradients.

    Args:
        shards: [rows here, columns] each.
        parameters: what they belong to: shapes and, for DTensors, how rows lie over the ranks.
        stacks: the rows of the matrices that each parameter stacks.
    """
    if not parameters or not isinstance(parameters[0], DTensor) or parameters[0].device_mesh.size(parameters[0].device_mesh.ndim - 1) == 1:
        return orthogonalise_all(shards, stacks)
    mesh = parameters[0].device_mesh  # replicas, if there are any, come first, and each does the same
    group, rank, world = mesh.get_group(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    owners = assign([tuple(p.shape) for p in parameters], world)
    owned = [[i for i, owner in enumerate(owners) if owner == r] for r in range(world)]
    rows = [[rows_of(p.shape[0], r, world) for r in range(world)] for p in parameters]
    widths = [p.shape[1] for p in parameters]

    sizes = [sum(shards[i].numel() for i in owned[r]) for r in range(world)]
    parts = [sum(rows[i][r] * widths[i] for i in owned[rank]) for r in range(world)]
    order = [i for r in range(world) for i in owned[r]]
    send = torch.cat([shards[i].flatten() for i in order])
    received = send.new_empty(sum(parts))
    dist.all_to_all_single(received, send, parts, sizes, group=group)

    pieces = [[rows[i][r] * widths[i] for i in owned[rank]] for r in range(world)]
    split = [part.split(sizes_) for part, sizes_ in zip(received.split(parts), pieces)]
    whole = [torch.cat([split[r][k].view(-1, widths[i]) for r in range(world)]) for k, i in enumerate(owned[rank])]
    done = orthogonalise_all(whole, [stacks[i] for i in owned[rank]])

    back = [m.split(rows[i]) for m, i in zip(done, owned[rank])]
    dist.all_to_all_single(send, torch.cat([b[r].flatten() for r in range(world) for b in back] or [received]), sizes, parts, group=group)
    results = list(shards)
    for i, piece in zip(order, send.split([shards[i].numel() for i in order])):
        results[i] = piece.view_as(shards[i])
    return results


def assign(shapes: list[tuple[int, ...]], world: int) -> list[int]:
    """The owner of each matrix, so that the ranks have about the same work; large ones are given away first."""
    work = [rows * columns * min(rows, columns) for rows, columns in shapes]
    load, owners = [0] * world, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-work[i], i)):
        owners[i] = min(range(world), key=lambda r: (load[r], r))
        load[owners[i]] += work[i]
    return owners


def rows_of(rows: int, rank: int, world: int) -> int:
    """Rows of a matrix that a rank holds: FSDP2 gives equal chunks from the top, so the last ranks may have fewer or none."""
    chunk = -(-rows // world)
    return max(0, min(chunk, rows - rank * chunk))
