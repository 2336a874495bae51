"""config.json of published checkpoints: nothing that it says is ignored in silence, and what says nothing about the model is accepted."""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from molmo_core.checkpoint import CheckpointError, from_pretrained
from molmo_core.checkpoint.export import export_checkpoint
from molmo_core.checkpoint.folder import Published
from molmo_core.checkpoint.published_config import read_published_config
from molmo_core.config import ConfigError
from molmo_core.models.molmo2 import Molmo2Config
from molmo_core.registry import BaseModelConfig, config_class
from tests.molmo_core.checkpoint.tiny_molmo2 import native_config, our_config

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory) -> Path:
    """A tiny export of each layout: Molmo2, MolmoE (flat), Molmo (our structure)."""
    folder = tmp_path_factory.mktemp("published")
    moe = from_pretrained(golden / "hub-molmoe")
    moe.config.llm.tokenizer.identifier = str(golden / "tokenizer")
    export_checkpoint(moe, folder / "molmoe")
    export_checkpoint(BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml").build_model(), folder / "molmo")
    with pytest.warns(UserWarning, match="no place for some settings"):
        export_checkpoint(Molmo2Config.from_dict(our_config(str(golden / "tokenizer"), "olmo", True, [1])).build_model(), folder / "molmo2")
    return folder


def changed(source: Path, target: Path, file: str, key: str, value: Any) -> Path:
    """A copy of a checkpoint with one setting (dotted; `...` deletes it) changed."""
    shutil.copytree(source, target)
    data = json.loads((target / file).read_text())
    *parents, last = key.split(".")
    part = data
    for parent in parents:
        part = part[parent]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    (target / file).write_text(json.dumps(data))
    return target


REFUSED = {
    ("molmo2", "config.json"): [
        ("text_config.use_sliding_window", True, "text_config.use_sliding_window=True is not implemented; only False"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act='gelu' is not implemented; only 'silu'"),
        ("text_config.tie_word_embeddings", True, "text_config.tie_word_embeddings=True is not implemented; only False"),
        ("text_config.qk_norm_type", ..., "no key text_config.qk_norm_type"),
        ("text_config.rope_theta", ..., "no key text_config.rope_theta"),
        ("text_config.num_attention_heads", "4", "text_config.num_attention_heads='4' must be a whole number"),
        ("text_config.num_attention_heads", 0, "llm.n_heads=0 must be at least 1"),
        ("text_config.attention_dropout", 1.5, "llm.attention_dropout=1.5 must be below 1"),
        ("text_config.rope_scaling", "yarn", "rotary settings 'yarn' must be a JSON object"),
        ("text_config.rope_scaling.truncate", False, "rope_parameters.truncate=False is not implemented; only True"),
        ("vit_config.num_channels", 1, "vit_config.num_channels=1 is not implemented; only 3"),
        ("vit_config.hidden_act", "relu", "image_mlp_activations: Input should be"),
        ("adapter_config.residual_dropout", 0.1, "adapter_config.residual_dropout=0.1 is not implemented; only 0.0"),
        ("adapter_config.num_key_value_heads", 1, "adapter_config.num_key_value_heads=1 differs from 3"),
        ("adapter_config.text_hidden_size", 96, "adapter_config.text_hidden_size=96 differs from 64"),
        ("adapter_config.pooling_attention_mask", ..., "no key adapter_config.pooling_attention_mask"),
        ("adapter_config", [1], "no key 'adapter_config'"),
        ("quantization_config", {"bits": 4}, "quantization_config={'bits': 4} is not implemented; only None"),
        ("image_patch_id", 5, "image_patch_id=5, expected vocab_size + 2"),
    ],
    ("molmo2", "preprocessor_config.json"): [
        ("image_mean", [0.48, 0.45, 0.4], "image_mean=[0.48, 0.45, 0.4] is not implemented; only [0.5, 0.5, 0.5]"),
        ("patch_size", 16, "patch_size=16 is not implemented; only 14"),
        ("size", {"height": 224, "width": 224}, "only {'height': 56, 'width': 56}"),
        ("do_normalize", False, "do_normalize=False is not implemented; only True"),
        ("pooling_size", 2, "pooling_size=2 of the processor files must be [height, width]"),
    ],
    ("molmo2", "video_preprocessor_config.json"): [("resample", 3, "resample=3 is not implemented; only 2")],
    ("molmo2", "processor_config.json"): [("video_use_col_tokens", True, "video_use_col_tokens=True is not implemented; only False")],
    ("molmoe", "config.json"): [
        ("moe_shared_expert", True, "llm.moe_shared_expert=True is not implemented"),
        ("alibi", True, "alibi=True is not implemented; only False"),
        ("vision_backbone.registers", 4, "unknown key 'registers'"),
    ],
    ("molmoe", "preprocessor_config.json"): [("image_std", [0.5, 0.5, 0.5], "image_std=[0.5, 0.5, 0.5] is not implemented")],
    ("molmo", "config.json"): [
        ("llm.registers", 4, "unknown key 'llm.registers'"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "file", "key", "value", "message"),
    [(layout, file, *case) for (layout, file), cases in REFUSED.items() for case in cases],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_are_not_implemented_are_named(published, tmp_path, layout, file, key, value, message):
    folder = changed(published / layout, tmp_path / "changed", file, key, value)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        from_pretrained(folder)
    assert str(folder) in str(caught.value)


UNKNOWN = {
    "molmo2": [
        ("text_config.sliding_window", 4096), ("text_config.rope_scaling.long_factor", [1.0]), ("vit_config.num_registers", 4),
        ("adapter_config.pooling_mode", "max"), ("tool_version", "2.1"),
    ],
    "molmoe": [("router_bias", True)],
    "molmo": [("adapter", {"rank": 8})],
}  # fmt: skip


@pytest.mark.parametrize(("layout", "key", "value"), [(layout, *case) for layout, cases in UNKNOWN.items() for case in cases])
def test_names_that_nobody_knows_give_a_warning(published, tmp_path, layout, key, value):
    folder = changed(published / layout, tmp_path / "changed", "config.json", key, value)
    name = key.replace("text_config.rope_scaling", "rope_parameters")
    with pytest.warns(UserWarning, match=re.escape(f"not known here and ignored: {name}={value!r}")):
        from_pretrained(folder)


def test_several_settings_are_one_error(published, tmp_path):
    folder = changed(published / "molmo2", tmp_path / "a", "config.json", "text_config.hidden_act", "gelu")
    folder = changed(folder, tmp_path / "b", "config.json", "text_config.tie_word_embeddings", True)
    with pytest.raises(CheckpointError, match=r"(?s)text_config\.hidden_act='gelu' .*text_config\.tie_word_embeddings=True "):
        from_pretrained(folder)


def bookkeeping() -> Iterator[tuple[str, Any]]:
    """What every configuration of transformers says about itself, the releases' notes, and what is switched off."""
    yield from PretrainedConfig(architectures=["X"], dtype="bfloat16").to_dict().items()
    yield from {
        "_attn_implementation_autoset": True, "attn_implementation": "sdpa", "use_cache": True, "torch_dtype": "float32",
        "sliding_window": None, "use_sliding_window": False, "layer_types": [],
    }.items()  # fmt: skip


@pytest.mark.parametrize("part", ["text_config", "vit_config", "adapter_config", ""])
def test_bookkeeping_is_accepted(published, tmp_path, part):
    expected = from_pretrained(published / "molmo2").config.as_dict()
    folder = tmp_path / "noted"
    shutil.copytree(published / "molmo2", folder)
    data = json.loads((folder / "config.json").read_text())
    section = data[part] if part else data
    for key, value in bookkeeping():
        section.setdefault(key, value)
    (folder / "config.json").write_text(json.dumps(data))
    again = from_pretrained(folder).config.as_dict()
    again["llm"]["tokenizer"] = expected["llm"]["tokenizer"]
    assert again == expected


def test_everything_that_transformers_writes_is_accepted(published, golden, tmp_path):
    """`to_dict` of its own configuration, with every default spelt out in every part."""
    folder = tmp_path / "native"
    shutil.copytree(published / "molmo2", folder)
    data = native_config(our_config(str(golden / "tokenizer"), "olmo", True, [1])).to_dict()
    (folder / "config.json").write_text(json.dumps(data))
    config = from_pretrained(folder).config
    assert config.llm.rope_scaling_layers == [1]
    assert config.llm.attention_layer_norm_type == "olmo"


def test_processors_in_one_file_as_transformers_saves_them(published, tmp_path):
    """transformers 5 keeps all settings in processor_config.json."""
    folder = tmp_path / "joined"
    shutil.copytree(published / "molmo2", folder)
    expected = read_published_config(Published.read(folder))["mm_preprocessor"]
    joined = json.loads((folder / "processor_config.json").read_text())
    for part, file in (("image_processor", "preprocessor_config.json"), ("video_processor", "video_preprocessor_config.json")):
        joined[part] = json.loads((folder / file).read_text())
        (folder / file).unlink()
    (folder / "processor_config.json").write_text(json.dumps(joined))
    assert read_published_config(Published.read(folder))["mm_preprocessor"] == expected
    for part, value, message in (
        ("video_processor", joined["video_processor"] | {"resample": 3}, "resample=3 is not implemented; only 2"),
        ("image_processor", [1], r"image_processor=\[1\] must be a JSON object"),
    ):
        (folder / "processor_config.json").write_text(json.dumps(joined | {part: value}))
        with pytest.raises(CheckpointError, match=rf"joined/processor_config\.json: {message}"):
            read_published_config(Published.read(folder))


def test_dropout_survives(golden, tmp_path):
    data = our_config(str(golden / "tokenizer"), "qwen3", False)
    data["llm"] |= {"attention_dropout": 0.1, "residual_dropout": 0.2, "embedding_dropout": 0.3}
    data["vision_backbone"]["image_feature_dropout"] = 0.4
    data["vision_backbone"]["vit"] |= {"attention_dropout": 0.05, "residual_dropout": 0.06}
    data |= {"data_formatter": Molmo2Config().data_formatter.__dict__, "mm_preprocessor": {"overlap_margins": [1, 1]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = export_checkpoint(Molmo2Config.from_dict(data).build_model(), tmp_path / "out")
    config = from_pretrained(out).config
    assert (config.llm.attention_dropout, config.llm.residual_dropout, config.llm.embedding_dropout) == (0.1, 0.2, 0.3)
    assert config.vision_backbone.image_feature_dropout == 0.4
    assert (config.vision_backbone.vit.attention_dropout, config.vision_backbone.vit.residual_dropout) == (0.05, 0.06)


def test_settings_without_a_place_are_named(golden, tmp_path):
    data = our_config(str(golden / "tokenizer"), "qwen3", False)
    data["mm_preprocessor"] |= {"max_images": 3}
    with pytest.warns(UserWarning, match="the published layout has no place for some settings") as caught:
        export_checkpoint(Molmo2Config.from_dict(data).build_model(), tmp_path / "out")
    message = str(caught[0].message)
    assert "mm_preprocessor.max_images: 3 here, None there" in message
    assert "data_formatter.prompt_templates: 'none' here, 'uber_model_v2' there" in message
    assert "overlap_margins" not in message


@pytest.mark.parametrize("kind", ["molmo2", "molmoe", "molmo"])
@pytest.mark.parametrize("value", [None, "x", -1, 0, 1.5, [], {}, [1, 2, 3], True, ...], ids=str)
def test_any_wrong_value_gives_a_configuration_error(published, tmp_path, kind, value):
    """Every setting of every file, one at a time: it is read, or there is a configuration error and no other."""
    folder = tmp_path / "changed"
    shutil.copytree(published / kind, folder)
    for file in (f for f in ("config.json", *PROCESSORS) if (folder / f).is_file()):
        original = json.loads((folder / file).read_text())
        for path in paths(original):
            data = copy.deepcopy(original)
            part = data
            for parent in path[:-1]:
                part = part[parent]
            if value is ...:
                del part[path[-1]]
            else:
                part[path[-1]] = value
            (folder / file).write_text(json.dumps(data))
            try:
                read = read_published_config(Published.read(folder))
                config_class(read["model_name"]).from_dict(read)
            except ConfigError:
                pass
            except Exception as error:
                raise AssertionError(f"{file}: {'.'.join(path)}={value!r}") from error
        (folder / file).write_text(json.dumps(original))


def paths(data: dict[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in data.items():
        yield (*parents, key)
        if isinstance(value, dict):
            yield from paths(value, (*parents, key))
