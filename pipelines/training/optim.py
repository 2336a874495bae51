"""What is trained and how: frozen parameters, the optimisers with their groups, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from molmo_core.config import ConfigError
from molmo_core.models.base import ModelBase
from molmo_core.nn.configs import LlmConfig
from molmo_core.nn.lora import is_adapter
from pipelines.training.adamw import AdamW
from pipelines.training.config import GroupConfig, OptimConfig, ScheduleConfig, TrainConfig
from pipelines.training.muon import Muon

# Two-dimensional parameters that are tables of vectors or the output layer; Muon is for matrices between hidden layers.
NO_MATRIX = ("embedding", "pad_embed", "pos_embed", "transformer.ff_out.weight", "transformer.ff_out.new_weight", "subpatch_loc_k.weight")


def freeze(model: ModelBase, config: TrainConfig) -> None:
    """Sets `requires_grad` of all parameters from the `ft_*` settings; with `lora` adds adapters, and only they are trained.

    Raises:
        ConfigError: nothing would be left to train.
    """
    enabled = {"connector": config.ft_connector, "vit": config.ft_vit, "llm": config.ft_llm, "pointing": config.ft_pointing}
    if config.lora is not None:
        model.add_adapters([group for group, train in enabled.items() if train], config.lora.rank, config.lora.alpha)
    for group, parameters in model.parameter_groups().items():
        for name, parameter in parameters:
            if config.lora is not None:
                parameter.requires_grad_(is_adapter(name))
            else:
                parameter.requires_grad_(enabled[group] and (group != "llm" or _end_trains(name, config.ft_embedding)))
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "nothing to train: the parts that ft_connector, ft_vit, ft_llm and ft_pointing choose have no parameters in this model"
        )


def _end_trains(name: str, ft_embedding: str) -> bool:
    """Whether `ft_embedding` lets a parameter of the language model train (blocks always do)."""
    if name == "transformer.wte.embedding":
        return ft_embedding in ("wte", "all")
    if name.startswith("transformer.ff_out."):
        return ft_embedding in ("lm_head", "all")
    if name.startswith("transformer.ln_f."):
        return ft_embedding in ("lm_head", "ln_f", "all")
    return True


class Optimizer:
    """AdamW, and Muon where it is asked for, over the trainable parameters of each part of the model."""

    def __init__(self, model: ModelBase, config: OptimConfig):
        self.config = config
        self.parameters: dict[str, list[nn.Parameter]] = {}
        """Trainable parameters of each part that has any."""
        adamw: list[dict[str, Any]] = []
        rounding: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        fused: dict[int, list[int]] = {}
        for group, named in model.parameter_groups().items():
            settings = config.of(group)
            trainable = [(name, p) for name, p in named if p.requires_grad]
            if not trainable:
                continue
            self.parameters[group] = [p for _, p in trainable]
            matrices = [p for name, p in trainable if settings.muon_lr is not None and is_matrix(name, p)]
            chosen = {id(p) for p in matrices}
            fused |= {id(p): rows for name, p in trainable if id(p) in chosen and (rows := stacked_rows(name, model.config.llm))}
            rest = [p for p in self.parameters[group] if id(p) not in chosen]
            shared = {"group": group, "weight_decay": settings.weight_decay}
            if rest:
                rounds = rest[0].dtype == torch.bfloat16 and config.rounding == "stochastic"
                kind = rounding if rounds else adamw
                kind.append({"params": rest, "lr": settings.lr, "betas": settings.betas, "eps": settings.eps, **shared})
            if matrices:
                muon.append({"params": matrices, "lr": settings.muon_lr, "momentum": config.muon_momentum, **shared})
        self._chunks: tuple[list[int], Any] | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        if adamw:
            self.optimizers.append(torch.optim.AdamW(adamw, fused=True))
        if rounding:
            self.optimizers.append(AdamW(rounding, moments=getattr(torch, config.moments)))
        if muon:
            self.optimizers.append(Muon(muon, fused=fused, stochastic=config.rounding == "stochastic"))

    def set_learning_rates(self, step: int, steps: int) -> dict[str, float]:
        """Sets the rates of step `step` (from 1) of `steps`; returns them as `lr/<part>` and `lr/<part>_muon`."""
        rates = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                settings = self.config.of(group["group"])
                muon = isinstance(optimizer, Muon)
                peak = settings.muon_lr if muon else settings.lr
                assert peak is not None
                group["lr"] = learning_rate(peak, step, steps, settings, self.config.schedule)
                rates[f"lr/{group['group']}{'_muon' if muon else ''}"] = group["lr"]
        return rates

    def step(self, left_out: torch.Tensor) -> None:
        """Updates the parameters; not if `left_out`, a bool scalar on the device, is true: then they and all states stay as they are."""
        for optimizer in self.optimizers:
            optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells them
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def squared_norms(self) -> dict[str, torch.Tensor]:
        """Σ gradient² of each part over what this process holds, float32 scalars; what several hold counts once in the sum over all."""
        parts = {group: [g for g in _local_gradients(parameters) if g.numel()] for group, parameters in self.parameters.items()}
        gradients = [g for part in parts.values() for g in part]
        copies = {group: _copies(parameters[0]) for group, parameters in self.parameters.items()}
        zero = torch.zeros((), device=next(iter(self.parameters.values()))[0].device)
        if not gradients or not gradients[0].is_cuda or len({g.dtype for g in gradients}) > 1:
            norms = {group: torch._foreach_norm(part, dtype=torch.float32) for group, part in parts.items() if part}
            sums = {group: torch.stack(norms[group]).square().sum() if group in norms else zero for group in parts}
            return {group: square / copies[group] for group, square in sums.items()}
        from pipelines.training.optim_kernels import Chunks, squared_sums  # Triton is there with a GPU only

        sizes = [g.numel() for g in gradients]
        if self._chunks is None or self._chunks[0] != sizes:
            self._chunks = (sizes, Chunks(sizes, zero.device))
        chunks: Chunks = self._chunks[1]
        squares, counts = squared_sums([g.contiguous() for g in gradients], chunks), iter(chunks.counts)
        lengths = [sum(next(counts) for _ in part) for part in parts.values()]
        return {group: part.sum() / copies[group] for group, part in zip(parts, squares.split(lengths))}

    def clip(self, norms: dict[str, torch.Tensor]) -> None:
        """Scales every part's gradients down to `max_grad_norm`, given the norms over all processes."""
        limit = self.config.max_grad_norm
        if limit is None:
            return
        scales = {group: (limit / (norm + 1e-6)).clamp(max=1.0) for group, norm in norms.items()}
        for optimizer in self.optimizers:
            if isinstance(optimizer, AdamW):
                optimizer.gradient_scales = scales  # it reads the gradients anyway
                continue
            for parameters in optimizer.param_groups:
                torch._foreach_mul_(_local_gradients(parameters["params"]), scales[parameters["group"]])


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon may update a parameter: a matrix that maps one hidden vector to another."""
    return parameter.ndim == 2 and not name.endswith(NO_MATRIX)


def stacked_rows(name: str, llm: LlmConfig) -> list[int] | None:
    """Rows of the matrices that a fused parameter of the language model stacks; None for a parameter that is one matrix."""
    if name.endswith("att_proj.weight"):
        return [heads * llm.head_width for heads in (llm.n_heads, llm.kv_heads, llm.kv_heads)]
    if name.endswith("ff_proj.weight"):
        return [llm.intermediate_size] * 2
    if name.endswith(("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")):
        return [llm.intermediate_size] * llm.moe_num_experts
    return None


def learning_rate(peak: float, step: int, steps: int, group: GroupConfig, schedule: ScheduleConfig) -> float:
    """The learning rate of step `step` (from 1) of a run of `steps`."""
    warmup = group.warmup
    if step < warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / max(step, 1))
    start = max(warmup, schedule.hold * steps)
    done = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    final = schedule.alpha_f * peak
    if schedule.name == "linear":
        return peak + (final - peak) * done
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    gradients = (p.grad for p in parameters if p.grad is not None)
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _copies(parameter: nn.Parameter) -> int:
    """How many processes hold the same part of a parameter (hybrid sharding); a whole one that nobody shards counts as one."""
    if not isinstance(parameter, DTensor):
        return 1
    return math.prod(parameter.device_mesh.size(i) for i, placement in enumerate(parameter.placements) if placement.is_replicate())
