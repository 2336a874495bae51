"""Configurations of the network parts. Names and defaults are those of the published configurations.

Sources: the published Molmo and Molmo2 configuration files; docs/models.md lists every published model's values.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from molmo_core.config import BaseConfig, ConfigError, Count, Dropout, Positive, Size, Weight, nearest

BidirectionalAttention = Literal["image_tokens", "within_image", "image_to_question"]
"""`image_tokens`: all image tokens of an example see each other; `within_image`: those of one image (one view, one frame);
`image_to_question`: image tokens also see the tokens that are not part of an answer."""
Width = Annotated[int, Field(ge=1, le=1 << 20)]
"""Of a matrix."""
Layers = Annotated[int, Field(ge=1, le=10_000)]
Layer = Annotated[int, Field(ge=-10_000, le=10_000)]
"""A layer's number; negative ones count from the last."""


@dataclasses.dataclass
class TokenizerConfig(BaseConfig):
    """Where the text tokenizer comes from."""

    identifier: str = "Qwen/Qwen2-7B"
    """Folder with tokenizer.json (relative to the configuration file), or a hub name."""
    tokenizer_dir: str | None = None
    """Cache folder for hub tokenizers."""

    PATHS: ClassVar[tuple[str, ...]] = ("identifier", "tokenizer_dir")

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        name = data.get("identifier")
        if isinstance(name, str):  # spellings of the first release
            data["identifier"] = name.removeprefix("mm:").removeprefix("hf-")
        return data


@dataclasses.dataclass
class LlmConfig(BaseConfig):
    """The language model: Qwen2, Qwen3, OLMo, OLMoE and Llama styles are settings of one module."""

    d_model: Width = 3584
    n_heads: Width = 28
    n_kv_heads: Width | None = None
    """Key/value heads (grouped-query attention); None = n_heads."""
    head_dim: Width | None = None
    """Width of one head; None = d_model // n_heads."""
    qkv_bias: bool = False
    clip_qkv: Positive | None = None
    n_layers: Layers = 28
    mlp_ratio: Width = 4
    mlp_hidden_size: Size | None = None
    """Rows of the fused up+gate projection, i.e. twice the intermediate size; None = mlp_ratio * d_model."""
    block_type: Literal["sequential", "llama", "moe"] = "sequential"
    """`sequential`: fused q/k/v and up/gate; `llama`: separate projections; `moe`: experts instead of the MLP."""
    rope_theta: Positive = 1_000_000.0
    rope_type: Literal["default", "llama3", "yarn"] = "default"
    rope_factor: Positive | None = None
    rope_high_freq_factor: Positive | None = None
    rope_low_freq_factor: Positive | None = None
    rope_attention_factor: Positive | None = None
    rope_beta_fast: Positive | None = None
    rope_beta_slow: Positive | None = None
    rope_original_max_position_embeddings: Size | None = None
    rope_scaling_layers: list[Layer] | None = None
    """Layers that use the scaled frequencies (the others use the unscaled ones); None = all."""
    attention_layer_norm: bool = False
    """RMSNorm on queries and keys before the rotary embedding."""
    attention_layer_norm_type: Literal["olmo", "qwen3"] = "olmo"
    """`olmo`: over the full flat width; `qwen3`: over each head."""
    attention_dropout: Dropout = 0.0
    residual_dropout: Dropout = 0.0
    response_residual_dropout: Dropout = 0.0
    embedding_dropout: Dropout = 0.0
    layer_norm_eps: Positive = 1e-6
    norm_after: bool = False
    """OLMo2/3 style: the norm follows each branch instead of preceding it."""
    max_sequence_length: Size = 4096
    max_position_embeddings: Size | None = None
    moe_num_experts: Width = 64
    moe_top_k: Width = 8
    moe_loss_weight: Weight = 0.0
    moe_zloss_weight: Weight | None = None
    scale_logits: bool = False
    normalize_input_embeds: bool = False
    vocab_size: Size = 152064
    embedding_size: Size | None = None
    """Rows of the embedding table (padded vocabulary); the id of the first special token. None = vocab_size."""
    additional_vocab_size: Count = 128
    """Rows of `new_embedding`: room for the special tokens."""
    weight_tying: bool = False
    can_predict_extra_tokens: bool = False
    """The special tokens have logits, too (MolmoPoint)."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    init_path: str | None = None
    """Checkpoint that initialises the language model of a new model."""
    initializer_range: Weight = 0.02
    new_embedding_init_range: Weight = 0.02

    PATHS: ClassVar[tuple[str, ...]] = ("init_path",)
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "activation_type": ("swiglu", "silu"),
        "rope": (True,),
        "rope_full_precision": (True,),
        "rope_impl": ("llama",),
        "attention_type": ("sdpa", "direct", "flash"),
        "float32_attention": (True, False),  # scaled_dot_product_attention keeps the scores in float32 in any case
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "attention_layer_norm_with_affine": (True,),
        "include_bias": (False,),
        "bias_for_layer_norm": (None, False),
        "moe_mlp_impl": ("sparse", "grouped"),
        "moe_log_expert_assignment": (False,),
        "moe_shared_expert": (False,),
        "moe_lbl_in_fp32": (False, True),
        "moe_interleave": (False,),
        "moe_dropless": (True,),
        "moe_capacity_factor": (1.25,),  # has no effect on dropless routing
        "use_position_ids": (True,),
        "fix_pad_tokenizer": (True,),  # the special tokens begin after the rows of the embedding
        "init_incremental": (None,),
        **dict.fromkeys(("rope_mscale", "rope_mscale_all_dim", "rope_truncate"), (None,)),
        "full_attention_layers": (None,),
        "sliding_attention_rope_scaling": (False,),
        "init_std": (0.02,),
        "init_fn": ("normal",),
        "init_cutoff_factor": (None, 3.0),
        # How a run executes, not what the model is: set in the training configuration here.
        "activation_checkpoint": (None, "whole_layer", "one_in_two", "fine_grained", "none"),
        "compile": (None, "blocks", "none"),
    }

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("block_type", "sequential") != "moe":
            data.pop("moe_loss_weight", None)  # the reference writes a non-zero default into dense models' files
            data.pop("moe_zloss_weight", None)
        return data

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_type == "moe" and self.moe_top_k > self.moe_num_experts:
            raise ConfigError(f"llm.moe_top_k={self.moe_top_k}: there are {self.moe_num_experts} experts (llm.moe_num_experts)")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"llm.n_heads={self.n_heads} is not a multiple of llm.n_kv_heads={self.kv_heads}")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ConfigError(f"llm.d_model={self.d_model} is not a multiple of llm.n_heads={self.n_heads}; set llm.head_dim")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def intermediate_size(self) -> int:
        return (self.mlp_hidden_size or self.mlp_ratio * self.d_model) // 2

    @property
    def embedding_rows(self) -> int:
        """E: rows of `wte.embedding`, id of the first special token."""
        return self.embedding_size or self.vocab_size

    @property
    def logit_rows(self) -> int:
        """Width of the logits."""
        return self.embedding_rows + (self.additional_vocab_size if self.can_predict_extra_tokens else 0)


@dataclasses.dataclass
class VitConfig(BaseConfig):
    """The vision transformer: CLIP (`openai`), SigLIP, DINOv2 and MetaCLIP styles."""

    image_model_type: Literal["openai", "siglip", "dino", "metaclip"] = "openai"
    image_default_input_size: tuple[Width, Width] = (336, 336)
    """Height and width of one crop, pixels."""
    image_patch_size: Width = 14
    image_pos_patch_size: Width = 14
    image_emb_dim: Width = 1024
    image_num_heads: Width = 16
    image_num_key_value_heads: Width = 16
    image_num_layers: Layers = 23
    image_head_dim: Width = 64
    image_mlp_dim: Width = 4096
    image_mlp_activations: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "quick_gelu"
    image_dropout_rate: Dropout = 0.0
    image_num_pos: Size = 577
    """Rows of the positional embedding (one more than the patches where there is a class token)."""
    image_norm_eps: Positive = 1e-5
    attention_dropout: Dropout = 0.0
    residual_dropout: Dropout = 0.0
    initializer_range: Weight = 0.02
    init_path: str | None = None
    resize_mode: Literal["default", "siglip", "dino", "metaclip"] = "default"
    """`default`: keep the aspect ratio and pad; the others stretch (see preprocessing/images.py)."""
    pad_value: Annotated[float, Field(ge=-1e3, le=1e3)] = 0.0
    normalize: Literal["openai", "siglip", "dino"] = "openai"
    """Which mean and standard deviation: openai, siglip (x*2-1) or dino (ImageNet)."""

    PATHS: ClassVar[tuple[str, ...]] = ("init_path",)
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "attention_type": ("sdpa", "direct", "flash"),
        "float32_attention": (True, False),  # scaled_dot_product_attention keeps the scores in float32 in any case
        "activation_checkpointing": (True, False),
        "sdpa_backend": ("all",),
        "fsdp_wrap": (False, True),
    }

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        kind = data.get("image_model_type", "openai")
        if kind == "siglip2":
            kind = data["image_model_type"] = "siglip"
        if data.get("resize_mode") == "torch-bilinear":
            data["resize_mode"] = "default"
        data.setdefault("resize_mode", "default" if kind == "openai" else kind)
        data.setdefault("normalize", NORMALIZE_OF.get(str(kind), "openai"))
        return data

    @classmethod
    def preset(cls, name: str) -> VitConfig:
        """A published encoder: openai, siglip, siglip2, dinov2_large_336, metaclip_l14_336, metaclip_b16_224."""
        if name not in VIT_PRESETS:
            raise ConfigError(f"unknown vision encoder {name!r}.{nearest(name, VIT_PRESETS)}")
        return cls.from_dict(dict(VIT_PRESETS[name]))

    @property
    def has_class_token(self) -> bool:
        return self.image_model_type != "siglip"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of one crop: rows, columns."""
        height, width = self.image_default_input_size
        return height // self.image_patch_size, width // self.image_patch_size

    @property
    def patches_per_crop(self) -> int:
        return self.grid[0] * self.grid[1]


NORMALIZE_OF = {"openai": "openai", "metaclip": "openai", "siglip": "siglip", "dino": "dino"}
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of the channels, on the 0-1 scale."""

_SIGLIP: dict[str, Any] = {
    "image_model_type": "siglip", "image_default_input_size": (378, 378), "image_emb_dim": 1152, "image_num_layers": 27,
    "image_head_dim": 72, "image_mlp_dim": 4304, "image_mlp_activations": "gelu_pytorch_tanh", "image_num_pos": 729, "image_norm_eps": 1e-6,
}  # fmt: skip
VIT_PRESETS: dict[str, dict[str, Any]] = {
    "openai": {},
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP,
    "dinov2_large_336": {"image_model_type": "dino", "image_num_layers": 24, "image_mlp_activations": "gelu", "image_norm_eps": 1e-6},
    "metaclip_l14_336": {"image_model_type": "metaclip", "image_num_layers": 24},
    "metaclip_b16_224": {
        "image_model_type": "metaclip", "image_default_input_size": (224, 224), "image_patch_size": 16, "image_pos_patch_size": 16,
        "image_emb_dim": 768, "image_num_heads": 12, "image_num_key_value_heads": 12, "image_num_layers": 12, "image_mlp_dim": 3072,
        "image_num_pos": 197,
    },
}  # fmt: skip
VIT_PRESETS["dino"] = VIT_PRESETS["dinov2_large_336"]
VIT_PRESETS["metaclip"] = VIT_PRESETS["metaclip_l14_336"]


@dataclasses.dataclass(init=False)
class MolmoVisionBackboneConfig(BaseConfig):
    """Vision encoder plus connector: which layers are used, how patches are pooled and projected.

    `image_model_type` is a shorthand. On its own it means the published encoder of that name; beside an explicit `vit`
    it changes the kind of that encoder (activation, normalisation, resizing, positions, padding embedding) and keeps its sizes.
    """

    vit: VitConfig = dataclasses.field(default_factory=VitConfig)
    image_pooling_2d: Literal[
        "attention_meanq", "attention", "attention_2wide", "attention_meanq_2x", "attention_meanq_4x", "stack", "mean", "none"
    ] = "attention_meanq"
    pooling_attention_mask: bool = False
    """Leave absent patches out of the pooling query and attention (Molmo2)."""
    image_projector: Literal["mlp", "linear"] = "mlp"
    image_padding_embed: Literal["pad_and_partial_pad", "pad_embed", "regress"] | None = None
    vit_layers: list[Layer] = dataclasses.field(default_factory=lambda: [-2, -9])
    """Encoder blocks whose outputs are concatenated, in this order; negative counts from the last."""
    skip_unused_layers: bool = True
    """Build no encoder block above the last used one."""
    image_feature_dropout: Dropout = 0.0
    pooling_out_layer: bool = True
    """Pooling by attention ends with a projection."""
    positional_embeddings: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """A learned vector for each of so many places in a pooled token, added to the patch there; None: no such vectors."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "connector_activation_checkpointing": (True, False),
        "compile_vit": (None, "blocks", "none"),
        "compile_connector": (None, "none", "dynamic", "default"),
        "normalize_on_gpu": (True, False),  # uint8 pixels are always normalised on the device here
        "use_deepstack": (False,),
    }

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        kind = data.pop("image_model_type", None)
        if isinstance(data.get("image_pooling_2d"), str):
            data["image_pooling_2d"] = data["image_pooling_2d"].replace("-", "_")
        if kind is None:
            return data
        vit = data.get("vit")
        if vit is None:
            data["vit"] = VitConfig.preset(kind)
            data.setdefault("vit_layers", [-2, -9] if kind == "openai" else [-3, -9])
        else:
            vit = vit if isinstance(vit, VitConfig) else VitConfig.from_dict(vit)
            data["vit"] = _retyped(vit, kind)
            if data["vit"] is not vit:  # another kind of encoder: its padding embedding comes with it
                data.pop("image_padding_embed", None)
        data.setdefault("image_padding_embed", "pad_and_partial_pad" if data["vit"].image_model_type == "openai" else None)
        return data

    def __init__(self, image_model_type: str | None = None, **settings: Any) -> None:
        """As `new`; `image_model_type` is the shorthand."""
        vars(self).update(vars(self.new(**settings, image_model_type=image_model_type)))


def _retyped(vit: VitConfig, kind: str) -> VitConfig:
    """The same sizes as another kind of encoder."""
    preset = VitConfig.preset(kind)
    if preset.image_model_type == vit.image_model_type:
        return vit
    grid = (vit.image_default_input_size[0] // vit.image_pos_patch_size) * (vit.image_default_input_size[1] // vit.image_pos_patch_size)
    return dataclasses.replace(
        vit,
        image_model_type=preset.image_model_type,
        image_mlp_activations=preset.image_mlp_activations,
        image_norm_eps=preset.image_norm_eps,
        image_num_pos=grid + preset.has_class_token,
        resize_mode=preset.resize_mode,
        normalize=preset.normalize,
    )
