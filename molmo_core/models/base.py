"""What all models share: the configuration base with its registry, and the module base (training, saving, generating)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from molmo_core.config import BaseConfig, ConfigError, nearest, read_yaml
from molmo_core.generation.generate import generate
from molmo_core.nn.attention import AttentionImplementation
from molmo_core.nn.connector import MolmoVisionBackbone
from molmo_core.nn.llm import Block
from molmo_core.nn.vit import VitBlock
from molmo_core.outputs import OLMoOutput

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from molmo_core.preprocessing.tokenizer import Tokenizer

# model_name -> where its configuration class lives.
MODELS: dict[str, tuple[str, str]] = {
    "molmo": ("molmo_core.models.molmo", "MolmoConfig"),
    "video_olmo": ("molmo_core.models.video_olmo", "VideoOlmoConfig"),
    "he_molmo": ("molmo_core.models.he_molmo", "HeMolmoConfig"),
    "molmo2": ("molmo_core.models.molmo2", "Molmo2Config"),
}

PARAMETER_GROUPS = ("connector", "vit", "llm")


@dataclasses.dataclass
class BaseModelConfig(BaseConfig):
    """Base of the models' configurations. `model_name` in a file chooses the class."""

    model_name: str = ""

    MODEL: ClassVar[str] = ""
    """Name of the model class in the module of the configuration class."""

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None, key: str | None = None) -> Self:
        """Reads a model configuration, of the class that its `model_name` names.

        Args:
            path: a YAML file, or a checkpoint folder with a `config.yaml`.
            overrides: dotted assignments relative to the model, e.g. `["llm.n_layers=16"]`.
            key: where the model stands in the file. By default the whole file, or its part `model` if it is a training configuration.

        Raises:
            ConfigError: as `BaseConfig.load`; also if the file describes another model than the class asked for.
        """
        path = Path(path)
        path = path / "config.yaml" if path.is_dir() else path
        if key is None and isinstance(read_yaml(path).get("model"), dict):
            key = "model"
        data = read_yaml(path, overrides, key)
        name = data.get("model_name") or cls.model_name
        chosen = config_class(name, str(path))
        if not issubclass(chosen, cls):
            raise ConfigError(f"{path}: model_name={name!r} is a {chosen.__name__}, not a {cls.__name__}; load it with that class")
        return chosen.from_dict(data, source=str(path), base=path.parent)

    @property
    def model_class(self) -> type[ModelBase]:
        """The module class that this configuration describes."""
        return getattr(importlib.import_module(type(self).__module__), self.MODEL)

    def build_model(self) -> ModelBase:
        """A new model with random weights (under `torch.device("meta")`: without memory)."""
        return self.model_class(self)


def config_class(model_name: str, source: str = "configuration") -> type[BaseModelConfig]:
    """The configuration class of a `model_name`.

    Raises:
        ConfigError: no such model.
    """
    if model_name not in MODELS:
        raise ConfigError(f"{source}: unknown model_name {model_name!r}.{nearest(model_name, MODELS)}")
    module, name = MODELS[model_name]
    return getattr(importlib.import_module(module), name)


class ModelBase(nn.Module):
    """Base class of all models.

    Subclasses hold the language model as `transformer` and, if they see, `vision_backbone`; their parameter names are the published
    ones.
    """

    CONNECTOR: ClassVar[tuple[str, ...]] = (
        "vision_backbone.image_pooling_2d.",
        "vision_backbone.image_projector.",
        "vision_backbone.pad_embed",
        "transformer.wte.new_embedding",
    )
    """Prefixes of the parameters between vision encoder and language model."""

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

    # -- parameters ----------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Random weights for a new model (also after `to_empty`)."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters by group: `connector`, `vit`, `llm`.

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
                )
                if match
            ]
            if len(matches) != 1:
                raise ValueError(f"parameter {clean} belongs to {matches or 'no group'}; each must be in one of {PARAMETER_GROUPS}")
            groups[matches[0]].append((clean, parameter))
        return groups

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

    def save_checkpoint(self, path: str | Path, sharded: bool = False) -> None:
        """Writes a self-contained folder: safetensors (several files if `sharded`), configuration, tokenizer."""
        from molmo_core.checkpoint.native import save_checkpoint

        save_checkpoint(self, path, sharded=sharded)

    def load_checkpoint(self, path: str | Path, strict: bool = True) -> None:
        """Reads weights written by `save_checkpoint`.

        Raises:
            CheckpointError: with `strict`, tensors that are missing, unexpected or of another shape, all of them by name.
        """
        from molmo_core.checkpoint.native import load_checkpoint

        load_checkpoint(self, path, strict=strict)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """A published or own checkpoint, from a folder or the hub; see `molmo_core.checkpoint.from_pretrained`.

        Raises:
            TypeError: the checkpoint is of another model than this class.
        """
        from molmo_core.checkpoint import from_pretrained  # type: ignore[attr-defined]

        model = from_pretrained(path, **kwargs)
        if not isinstance(model, cls):
            raise TypeError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    # -- training ------------------------------------------------------------------------------------------------------

    def training_blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks: units of sharding and compilation."""
        return (m for m in self.modules() if isinstance(m, Block | VitBlock))

    def apply_activation_checkpointing(self, enabled: bool = True) -> None:
        """Recomputes every block and the connector in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Block | VitBlock | MolmoVisionBackbone):
                module.checkpointing = enabled

    def apply_compile(self, **kwargs: Any) -> None:
        """Compiles every block for itself (`torch.compile` arguments); parameter names stay as they are."""
        for block in self.training_blocks():
            block.compile(**kwargs)

    def get_fsdp_wrap_policy(self) -> ModuleWrapPolicy:
        """The `auto_wrap_policy` of FullyShardedDataParallel: every block of encoder and language model is a unit."""
        return ModuleWrapPolicy({type(block) for block in self.training_blocks()})

    def apply_fsdp2(
        self,
        mesh: DeviceMesh | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        reshard_after_forward: bool = True,
        **kwargs: Any,
    ) -> None:
        """Shards the parameters with `fully_shard`: every block is a unit, everything else the root.

        Inputs are never cast: the blocks take float32 rotary tables and the root float32 loss weights, whatever the parameters are.

        Args:
            mesh: one or two dimensions (hybrid sharding); None = all ranks.
            mp_policy: dtypes of the gathered parameters, of the reduction and of the output.
            reshard_after_forward: free the gathered parameters of a block between forward and backward.
            kwargs: further arguments of `fully_shard`.
        """
        policy = dataclasses.replace(mp_policy or MixedPrecisionPolicy(), cast_forward_inputs=False)
        for block in self.training_blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, **kwargs)
        fully_shard(self, mesh=mesh, mp_policy=policy, reshard_after_forward=False, **kwargs)


def clean_name(name: str) -> str:
    """A parameter's own name, without what wrappers add."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name
