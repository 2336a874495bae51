"""Numbers that no model has are refused where the configuration is read, by key, not later by a shape or a division."""

import dataclasses
import re
from pathlib import Path

import pytest

from molmo_core.config import BaseConfig, ConfigError, Size
from molmo_core.models.base import BaseModelConfig

CASES = [
    ("molmo-qwen2-clip", "llm.n_heads=0", "llm.n_heads=0 must be at least 1"),
    ("molmo-qwen2-clip", "llm.mlp_hidden_size=-2", "llm.mlp_hidden_size=-2 must be at least 1"),
    ("molmo-qwen2-clip", "llm.additional_vocab_size=-1", "llm.additional_vocab_size=-1 must be at least 0"),
    ("molmo-qwen2-clip", "llm.residual_dropout=1", "llm.residual_dropout=1 must be below 1"),
    ("molmo-qwen2-clip", "vision_backbone.vit.image_num_key_value_heads=0", "vit.image_num_key_value_heads=0 must be at least 1"),
    ("molmo-qwen2-clip", "vision_backbone.vit.image_dropout_rate=-1", "vit.image_dropout_rate=-1 must be at least 0"),
    ("molmo-qwen2-clip", "vision_backbone.image_feature_dropout=7", "vision_backbone.image_feature_dropout=7 must be below 1"),
    ("molmo-qwen2-clip", "mm_preprocessor.max_crops=0", "mm_preprocessor.max_crops=0 must be at least 1"),
    ("molmo-qwen2-clip", "mm_preprocessor.p_high_res=2", "mm_preprocessor.p_high_res=2 must be at most 1"),
    ("molmo-qwen2-clip", "data_formatter.default_inference_len=-5", "data_formatter.default_inference_len=-5 must be at least 1"),
    ("video-olmo/mixed-res", "mm_preprocessor.periodic_high_res_frame=0", "mm_preprocessor.periodic_high_res_frame=0 must be at least 1"),
    ("video-olmo/mixed-res", "mm_preprocessor.max_frames=0", "mm_preprocessor.max_frames=0 must be at least 1"),
    ("he-molmo", "mm_preprocessor.num_high_res_features=0", "mm_preprocessor.num_high_res_features=0 must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "override", "message"), CASES, ids=[case[1] for case in CASES])
def test_wrong_numbers_are_named(golden: Path, name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.yaml: 1 invalid value\(s\)\n.*{re.escape(message)}"):
        BaseModelConfig.load(golden / name / "config.yaml", [override])


def test_no_token_has_more_experts_than_there_are(golden: Path) -> None:
    overrides = ["llm.block_type=moe", "llm.moe_num_experts=4", "llm.moe_top_k=5"]
    with pytest.raises(ConfigError, match=r"llm\.moe_top_k=5: there are 4 experts"):
        BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml", overrides)


def test_rates_of_frames_are_positive(golden: Path) -> None:
    with pytest.raises(ConfigError, match=r"candidate_sampling_fps\.0=0 must be more than 0"):
        BaseModelConfig.load(golden / "video-olmo/mixed-res/config.yaml", ["mm_preprocessor.candidate_sampling_fps=[0, 1]"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_frames=4", r"max_frames=4 and mm_preprocessor\.max_frames=6 contradict each other; set max_frames only"),
        ("vision_backbone.image_model_type=siglop", r"unknown vision encoder 'siglop'\. Did you mean 'siglip'"),
    ],
)
def test_errors_of_older_spellings_name_the_file(golden: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mixed-res/config\.yaml: {message}"):
        BaseModelConfig.load(golden / "video-olmo/mixed-res/config.yaml", [override])


@dataclasses.dataclass
class Sizes(BaseConfig):
    """Its annotations are types, not strings: this file does not postpone their evaluation."""

    rows: Size = 1
    columns: Size | None = None


@pytest.mark.parametrize("key", ["rows", "columns"])
def test_checks_do_not_depend_on_how_annotations_are_stored(key: str) -> None:
    assert not isinstance(Sizes.__annotations__["rows"], str)
    assert getattr(Sizes.new(**{key: 3}), key) == 3
    with pytest.raises(ConfigError, match=rf"{key}=0 must be at least 1"):
        Sizes.new(**{key: 0})
    with pytest.raises(ConfigError, match=rf"Sizes: {key}=0 must be at least 1"):
        Sizes(**{key: 0})
