"""What a training run takes of a device's memory and time, computed from its configuration: nothing is built, nothing runs.

Activations are counted from what the backward pass of a compiled block keeps, in units of the model's widths (`kept_by_block`,
`kept_by_vision_block`; a test compares them with what autograd keeps). What is not counted: fragmentation, NCCL's buffers, kernels'
workspaces; leave a tenth of the memory to them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, get_args

import torch

from molmo_core.models.base import ModelBase
from molmo_core.nn.configs import LlmConfig, VitConfig
from molmo_core.nn.connector import MolmoVisionBackbone
from molmo_core.nn.llm import Block
from molmo_core.nn.recompute import Recompute
from pipelines.training.config import TrainConfig
from pipelines.training.flops import PEAK, StepFlops
from pipelines.training.memory import memory_needed
from pipelines.training.parallelize import unit_blocks

LOGITS_CHUNK = 2048
"""Positions whose logits exist at a time (`molmo_core.nn.loss.chunked_loss_sums`)."""
LOGIT_BYTES = 2
"""Of one logit in half precision; its gradient takes its place."""
REACHED = 0.40
"""Share of the data sheet's FLOP/s that one GPU reaches in a step (docs/experiments.md)."""
USABLE = 0.9


class Plan(NamedTuple):
    """Bytes of one device at their most, and the speed of a step."""

    parameters: int
    """Number of the whole model's."""
    weights: int
    gradients: int
    optimizer: int
    """These three: this device's shard."""
    gathered: int
    """Parameters of others that are there for a pass."""
    language: int
    """What the backward pass needs of the language model."""
    vision: int
    """... of vision encoder and connector."""
    logits: int
    batch: int
    """Pixels and token-level arrays, twice: the next batch comes while this one is in work."""
    peak: int
    """Of all of it together, at the end of the forward pass or in the backward pass, whichever is more."""
    seconds: float
    """That a step computes, at `REACHED` of an H100, and ..."""
    tokens_per_second: float
    """... what that makes of one device, if nothing has to be waited for."""


def kept_by_block(llm: LlmConfig) -> int:
    """Numbers a token that a compiled block of the language model keeps for its backward pass.

    Input and normed input of both branches; queries, keys and values as projected, queries and keys as rotated, what attention gives;
    both halves of the gated projection and their product.
    """
    queries, keys = llm.n_heads * llm.head_width, llm.kv_heads * llm.head_width
    inner = llm.intermediate_size * (llm.moe_top_k if llm.block_type == "moe" else 1)
    return 4 * llm.d_model + 3 * (queries + keys) + 3 * inner


def kept_of_products(llm: LlmConfig) -> int:
    """Of them, what `selective` recomputation keeps: the input, and the results of products and attention that it needs."""
    queries, keys = llm.n_heads * llm.head_width, llm.kv_heads * llm.head_width
    inner = llm.intermediate_size * (llm.moe_top_k if llm.block_type == "moe" else 1)
    return 2 * llm.d_model + 2 * (queries + keys) + 2 * inner


def kept_by_vision_block(vit: VitConfig) -> int:
    """Numbers a patch that a block of the vision encoder keeps."""
    return 4 * vit.image_emb_dim + 4 * vit.image_num_heads * vit.image_head_dim + 2 * vit.image_mlp_dim


def plan(config: TrainConfig, rows: int | None = None, crops: int | None = None) -> Plan:
    """Memory and speed of one device of a run.

    Args:
        config: the run; `num_workers` is the number of devices.
        rows: sequences of a forward pass (default: `device_batch_size`, or a worker's share).
        crops: of a sequence (default: the most that the configuration allows).
    """
    with torch.device("meta"):
        model = config.model.build_model()
    llm, parallel, workers = model.config.llm, config.parallel, config.num_workers
    sharded = workers // parallel.replicate
    share = config.global_batch_size * parallel.context // workers
    rows = rows or config.device_batch_size or share
    accumulates = share > rows
    need = memory_needed(config)
    used = 4 if config.precision == "fp32" else 2
    reshard = parallel.reshard_after_forward
    units = gathered_units(model, config)
    gathered = 0
    if sharded > 1:
        # A unit is gathered while the one before is in work, and its gradients are whole until they are reduced.
        gathered = (units.root + 3 * units.largest if reshard else need.parameters) * used
    weights, gradients, optimizer = (count // sharded for count in (need.weights, need.gradients, need.optimizer))
    if parallel.whole_gradients and accumulates and sharded > 1:
        gradients += need.trained * used

    crops = most_crops(model, config) if crops is None else crops
    tokens = rows * config.sequence_length // parallel.context
    numbers = llm.n_layers * kept_by_block(llm)
    if config.activation_checkpointing == "selective":
        numbers = llm.n_layers * kept_of_products(llm)
    elif config.activation_checkpointing == "full":
        numbers = llm.n_layers * llm.d_model + kept_by_block(llm)
    language = numbers * tokens * used
    vision, pixels = vision_bytes(model, config, rows, crops, used)
    vision //= parallel.context
    logits = min(LOGITS_CHUNK, tokens) * llm.embedding_rows * LOGIT_BYTES
    batch = 2 * (pixels + 5 * 8 * rows * config.sequence_length)
    after_forward = language + vision + logits + (gradients if accumulates else 0)
    after_backward = gradients + (units.root * used if sharded > 1 else 0)
    peak = weights + optimizer + gathered + batch + max(after_forward, after_backward)
    computing = seconds(model, config, rows, crops)
    speed, step = tokens / computing, computing * max(1, share // rows)
    return Plan(need.parameters, weights, gradients, optimizer, gathered, language, vision, logits, batch, peak, step, speed)


class Units(NamedTuple):
    """Parameters that are gathered together."""

    root: int
    """At the beginning of a step, for all of it."""
    largest: int


def gathered_units(model: ModelBase, config: TrainConfig) -> Units:
    """The sizes of a model's units."""
    blocks = config.parallel.unit_blocks or unit_blocks(model)
    if blocks is None:
        return Units(model.num_params(), 0)
    sizes = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block)]
    return Units(model.num_params() - sum(sizes), max(sizes) * blocks)


def most_crops(model: ModelBase, config: TrainConfig) -> int:
    """The most crops that a sequence of a run can have."""
    if model.vision_backbone is None:
        return 0
    packing = config.data.packing
    return packing.max_crops if packing is not None else 1 + model.config.mm_preprocessor.max_crops


def vision_bytes(model: ModelBase, config: TrainConfig, rows: int, crops: int, used: int) -> tuple[int, int]:
    """What the backward pass needs of vision encoder and connector, and the pixels, for rows of so many crops."""
    vision = model.vision_backbone
    if not isinstance(vision, MolmoVisionBackbone) or not crops:
        return 0, 0
    vit, layers = vision.config.vit, len(vision.image_vit.transformer.resblocks)
    patches = rows * crops * vit.patches_per_crop
    pixels = patches * vit.image_patch_size**2 * 3
    width = vit.image_emb_dim * len(vision.layers)
    block = kept_by_vision_block(vit)
    full = config.activation_checkpointing == "full"
    if config.activation_checkpointing == "selective":
        block -= 2 * vit.image_emb_dim + vit.image_mlp_dim  # normed inputs, what the activation gives
    kept = layers * vit.image_emb_dim + block if full else layers * block
    pooled = patches // 4
    connector = patches * width + (0 if full else pooled * (4 * (width + 2 * vit.image_emb_dim)))
    llm = model.config.llm
    connector += pooled * (llm.d_model + 3 * llm.intermediate_size * (not full))
    return (patches * kept + connector) * used + 4 * pixels, pixels


def seconds(model: ModelBase, config: TrainConfig, rows: int, crops: int) -> float:
    """Of one forward and backward pass of a device, at `REACHED` of an H100; recomputation counts."""
    ids = torch.empty(rows, config.sequence_length, device="meta")
    batch = {"input_ids": ids}
    if crops and isinstance(model.vision_backbone, MolmoVisionBackbone):
        vit = model.vision_backbone.config.vit
        batch["images"] = torch.empty(rows, crops, vit.patches_per_crop, 3, device="meta")
        batch["pooled_patches_idx"] = torch.empty(rows, crops * vit.patches_per_crop // 4, 4, device="meta")
    flops = StepFlops(model)(batch) / config.parallel.context
    return flops * (4 / 3 if config.activation_checkpointing == "full" else 1) / (REACHED * PEAK["H100"])


def suggestions(config: TrainConfig, memory: int) -> list[tuple[TrainConfig, Plan]]:
    """Variants of a run that fit into `memory` bytes of a device, the fastest first: rows of a pass, recomputation, resharding."""
    share = config.global_batch_size * config.parallel.context // config.num_workers
    found = []
    for rows in (rows for rows in (1, 2, 4, 8, 16) if share % rows == 0):
        for recompute in get_args(Recompute):
            for reshard in (False, True) if config.num_workers > config.parallel.replicate else (None,):
                parallel = dataclasses.replace(config.parallel, reshard_after_forward=reshard)
                variant = dataclasses.replace(config, device_batch_size=rows, activation_checkpointing=recompute, parallel=parallel)
                found.append((variant, plan(variant)))
    fitting = [(variant, made) for variant, made in found if made.peak <= USABLE * memory]
    return sorted(fitting, key=_worse)


def _worse(candidate: tuple[TrainConfig, Plan]) -> tuple[int, bool, int]:
    """Slower; of equally fast ones: gathers parameters twice, has fewer rows at once."""
    variant, made = candidate
    return -round(made.tokens_per_second), bool(variant.parallel.reshard_after_forward), -(variant.device_batch_size or 0)
