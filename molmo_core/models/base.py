"""What all models share: training, saving, generating."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from molmo_core.checkpoint.links import clean_name
from molmo_core.checkpoint.loading import from_pretrained, load_checkpoint
from molmo_core.checkpoint.native import save_checkpoint
from molmo_core.generation.generate import generate
from molmo_core.nn.attention import AttentionImplementation
from molmo_core.nn.connector import MolmoVisionBackbone
from molmo_core.nn.float8_training import MULTIPLE
from molmo_core.nn.linear import Linear
from molmo_core.nn.llm import Block
from molmo_core.nn.lora import adapted_layers, add_adapters
from molmo_core.nn.recompute import Recompute
from molmo_core.nn.vit import VisionTransformer, VitBlock
from molmo_core.outputs import OLMoOutput
from molmo_core.registry import BaseModelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from molmo_core.preprocessing.tokenizer import Tokenizer

__all__ = ["PARAMETER_GROUPS", "BaseModelConfig", "ModelBase"]

PARAMETER_GROUPS = ("connector", "vit", "llm", "pointing")


class ModelBase(nn.Module):
    """Base class of all models.

    Subclasses hold the language model as `transformer` and, if they see, `vision_backbone`; their parameter names are the published
    ones.
    """

    CONNECTOR: ClassVar[tuple[str, ...]] = (
        "vision_backbone.image_pooling_2d.",
        "vision_backbone.image_projector.",
        "vision_backbone.pad_embed",
        "vision_backbone.positional_embeddings",
        "transformer.wte.new_embedding",
        "transformer.ff_out.new_weight",
    )
    """Prefixes of the parameters between vision encoder and language model."""
    POINTING: ClassVar[tuple[str, ...]] = ("point_predictor.", "point_embedding.")
    """Prefixes of the parameters that choose points."""

    ADAPTED: ClassVar[dict[str, tuple[str, ...]]] = {
        "connector": ("vision_backbone.image_pooling_2d.", "vision_backbone.image_projector"),
        "vit": ("vision_backbone.image_vit.transformer.resblocks.",),
        "llm": ("transformer.blocks.",),
    }
    """Prefixes of the layers that adapters are for, by parameter group."""

    EXTENDS: ClassVar[str] = ""
    """`model_name` of a model whose checkpoints hold everything but `own_parts`."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.attention_implementation: AttentionImplementation = "auto"
        """`auto`: FlexAttention in training on a GPU, otherwise scaled_dot_product_attention with a dense mask."""

    # -- what models do ------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OLMoOutput:
        """One pass over a batch; see the models."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    generate = generate  # as a method: its arguments are written down once

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the configuration, built at first use."""
        return self.config.build_tokenizer()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def further_losses(self) -> tuple[str, ...]:
        """Losses beside that of the text: `metrics` has `<name>_loss` and `<name>_acc`, means over `<name>_count` choices."""
        return ()

    # -- parameters ----------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Random weights for a new model (also after `to_empty`)."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters by group: `connector`, `vit`, `llm`, `pointing` (of MolmoPoint; of other models empty).

        Raises:
            ValueError: a parameter belongs to no group or to several.
        """
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in PARAMETER_GROUPS}
        for name, parameter in self.named_parameters():
            clean = clean_name(name)
            connector = clean.startswith(self.CONNECTOR)
            matches = [
                group
                for group, match in (
                    ("connector", connector),
                    ("vit", clean.startswith("vision_backbone.image_vit.")),
                    ("llm", clean.startswith("transformer.") and not connector),
                    ("pointing", clean.startswith(self.POINTING)),
                )
                if match
            ]
            if len(matches) != 1:
                raise ValueError(f"parameter {clean} belongs to {matches or 'no group'}; each must be in one of {PARAMETER_GROUPS}")
            groups[matches[0]].append((clean, parameter))
        return groups

    def own_parts(self) -> dict[str, torch.Tensor]:
        """New weights, on the CPU, of the parameters that the model that this one extends does not have."""
        return {}

    def get_connector_params(self) -> list[nn.Parameter]:
        """Pooling, projector, padding embedding and the embeddings of the special tokens."""
        return [p for _, p in self.parameter_groups()["connector"]]

    def get_vit_params(self) -> list[nn.Parameter]:
        """The vision encoder."""
        return [p for _, p in self.parameter_groups()["vit"]]

    def get_llm_params(self) -> list[nn.Parameter]:
        """The language model without the embeddings of the special tokens."""
        return [p for _, p in self.parameter_groups()["llm"]]

    def num_params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def add_adapters(self, groups: Collection[str], rank: int, alpha: float) -> None:
        """Gives the linear layers of attention and feed-forward parts adapters (`molmo_core.nn.lora`), in these of `ADAPTED`."""
        add_adapters(self, tuple(prefix for group in groups for prefix in self.ADAPTED.get(group, ())), rank, alpha)

    def merge_adapters(self) -> None:
        """Makes adapters part of the weights, for good: the model computes the same, and can be saved. All ranks call it."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass without a backward pass weights may be gathered, as copies
        for layer in adapted_layers(self):
            layer.merge()

    def save_checkpoint(self, path: str | Path, sharded: bool = False) -> None:
        """Writes a self-contained folder: safetensors (several files if `sharded`), configuration, tokenizer.

        Raises:
            ValueError: the model has adapters that are not merged: they would be missing.
        """
        if not all(layer.merged for layer in adapted_layers(self)):
            raise ValueError("the model has adapters beside its weights: merge_adapters() first")
        save_checkpoint(self, path, sharded=sharded)

    def load_checkpoint(self, path: str | Path, strict: bool = True) -> None:
        """Reads weights written by `save_checkpoint`.

        Raises:
            CheckpointError: with `strict`, tensors that are missing, unexpected or of another shape, all of them by name.
        """
        load_checkpoint(self, path, strict=strict)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """A published or own checkpoint, from a folder or the hub; see `molmo_core.checkpoint.from_pretrained`.

        Raises:
            TypeError: the checkpoint is of another model than this class.
        """
        model = from_pretrained(path, **kwargs)
        if not isinstance(model, cls):
            raise TypeError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    # -- training ------------------------------------------------------------------------------------------------------

    def training_blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks: units of compilation."""
        return (m for m in self.modules() if isinstance(m, Block | VitBlock))

    def apply_activation_checkpointing(self, policy: Recompute = "full") -> None:
        """What every block and the connector compute again in the backward pass instead of keeping it."""
        for module in self.modules():
            if isinstance(module, Block | VitBlock | MolmoVisionBackbone):
                module.recompute = policy

    def apply_float8(self) -> None:
        """The linear layers of the language model's blocks compute in float8 where gradients are wanted (`molmo_core.nn.float8_training`).
        Experts of a mixture, adapters, embeddings, the head and the vision encoder stay as they are.

        Raises:
            ValueError: a layer's size is no multiple of 16.
        """
        for name, block in self.named_modules():
            for inner, layer in block.named_modules() if isinstance(block, Block) else ():
                if isinstance(layer, Linear):
                    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                        shape = f"[{layer.out_features}, {layer.in_features}]"
                        raise ValueError(f"{clean_name(f'{name}.{inner}')} is {shape}: products need multiples of {MULTIPLE}")
                    layer.float8 = True

    def apply_compile(self, **kwargs: Any) -> None:
        """Compiles every block for itself, and the connector (`torch.compile` arguments); parameter names stay as they are.

        One size is compiled first; when sequences or numbers of crops vary, once more for any (`dynamic=None`).
        """
        for block in self.training_blocks():
            block.compile(**kwargs)
        for module in self.modules():
            if isinstance(module, MolmoVisionBackbone):
                module.compile_connector(**kwargs)

    def get_fsdp_wrap_policy(self) -> ModuleWrapPolicy:
        """The `auto_wrap_policy` of FullyShardedDataParallel: every block of encoder and language model is a unit."""
        return ModuleWrapPolicy({type(block) for block in self.training_blocks()})

    def apply_fsdp2(
        self,
        mesh: DeviceMesh | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        reshard_after_forward: bool = True,
        unit_blocks: int = 1,
        vision_unit: bool = False,
        **kwargs: Any,
    ) -> None:
        """Shards the parameters with `fully_shard`: blocks of the language model make units, everything else is the root.

        Inputs are never cast: the blocks take float32 rotary tables and the root float32 loss weights, whatever the parameters are.

        Args:
            mesh: one or two dimensions (hybrid sharding); None = all ranks.
            mp_policy: dtypes of the gathered parameters, of the reduction and of the output.
            reshard_after_forward: free the gathered parameters of a unit between forward and backward.
            unit_blocks: so many blocks that follow one another are a unit.
            vision_unit: the vision encoder is a unit of its own.
            kwargs: further arguments of `fully_shard`.
        """
        policy = dataclasses.replace(mp_policy or MixedPrecisionPolicy(), cast_forward_inputs=False)
        blocks = [m for m in self.modules() if isinstance(m, Block)]
        units: list[Any] = [blocks[i : i + unit_blocks] for i in range(0, len(blocks), unit_blocks)]
        if vision_unit:
            units += [m for m in self.modules() if isinstance(m, VisionTransformer)]
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, **kwargs)
        fully_shard(self, mesh=mesh, mp_policy=policy, reshard_after_forward=False, **kwargs)
