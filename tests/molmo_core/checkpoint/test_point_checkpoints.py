"""MolmoPoint in its published layout, in and out, and begun from Molmo2."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molmo_core.checkpoint import CheckpointError, load_model
from molmo_core.checkpoint.backbones import initialise_backbones
from molmo_core.checkpoint.export import export_and_verify, export_checkpoint
from molmo_core.checkpoint.layouts import published_links
from molmo_core.checkpoint.links import export_specs, model_tensors
from molmo_core.checkpoint.loading import begin_from
from molmo_core.model_configs.molmo2 import Molmo2Config
from molmo_core.model_configs.molmo_point import MolmoPointConfig
from molmo_core.models.molmo_point import MolmoPoint
from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.registry import BaseModelConfig
from tests.molmo_core.checkpoint.tiny_molmo2 import our_config
from tests.molmo_core.models.golden_point import cases, inputs_here, load_point_model

CONFIGS = Path(__file__).parents[3] / "configs/models"


def golden_model(golden: Path, *overrides: str) -> MolmoPoint:
    torch.manual_seed(0)
    path = golden / "molmo-point" / "a" / "config.yaml"
    return MolmoPointConfig.load(path, ["data_formatter.debug=false", *overrides]).build_model().eval()


@pytest.fixture(scope="module")
def layout(golden: Path) -> dict:
    return json.loads((golden / "molmo-point" / "a" / "hf_layout.json").read_text())


def test_names_and_shapes_are_the_published_ones(golden: Path, layout: dict, tmp_path: Path) -> None:
    export_checkpoint(golden_model(golden), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == layout["keys"]


def test_settings_are_the_published_ones(golden: Path, layout: dict, tmp_path: Path) -> None:
    export_checkpoint(golden_model(golden), tmp_path / "out")
    ours, theirs = json.loads((tmp_path / "out" / "config.json").read_text()), layout["config"]
    running = {"attn_implementation", "use_cache", "transformers_version", "model_type"}
    for part in ("", "text_config", "vit_config", "adapter_config"):
        a, b = (ours, theirs) if not part else (ours[part], theirs[part])
        flat = {k: v for k, v in b.items() if not isinstance(v, dict) and k not in running}
        assert {k: a.get(k, v if v in (0, 0.0, 0.02) else None) for k, v in flat.items()} == flat, part


def test_a_published_folder_is_read(golden: Path, layout: dict, tmp_path: Path) -> None:
    """The published config.json as it is, weights under the published names."""
    model = golden_model(golden)
    export_checkpoint(model, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(layout["config"]))
    again = load_model(tmp_path / "out")
    assert type(again) is MolmoPoint
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert again.tokenizer.point_token_ids == model.tokenizer.point_token_ids
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_read_back_and_computes_the_same(golden: Path, tied: bool, tmp_path: Path) -> None:
    model = golden_model(golden, f"llm.weight_tying={str(tied).lower()}")
    with torch.no_grad():
        (model.transformer.wte.new_embedding if tied else model.transformer.ff_out.new_weight).normal_(std=0.1)
    model.save_checkpoint(tmp_path / "own")
    results = export_and_verify(tmp_path / "own", tmp_path / "out", "huggingface", log=lambda line: None)
    assert [r.passed for r in results] == [True]
    names = load_file(tmp_path / "out" / "model.safetensors")
    head = model.transformer.wte.new_embedding if tied else model.transformer.ff_out.new_weight
    assert torch.equal(names["lm_head.new_output_embeddings"], head)


def test_the_published_tokenizer_has_names_for_points(golden: Path, tmp_path: Path) -> None:
    model = golden_model(golden)
    export_checkpoint(model, tmp_path / "out")
    added = {t["content"]: t["id"] for t in json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]}
    assert added["<POINT_0>"] == 448 + 128
    assert added["<|token_index|>"] == 459
    tokenizer = Tokenizer.load(tmp_path / "out", first_special_id=448, layout="molmo2")
    assert tokenizer.encode("<POINT_3>") == model.tokenizer.encode("<POINT_3>")  # text, as in every tokenizer here


@pytest.mark.parametrize("name", ["molmo-point-8b", "molmo-point-4b"])
def test_full_size_names(name: str) -> None:
    """MolmoPoint-8B and Vid-4B without memory: every tensor has a place, in the shape that the sizes say."""
    config = BaseModelConfig.load(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        tensors = model_tensors(config.build_model())
    specs = {k: s.shape for k, s in export_specs(tensors, published_links("molmo_point", tensors, config.llm)).items()}
    d = config.llm.d_model
    assert {k: specs[k] for k in specs if "lm_head" in k} == {
        "lm_head.output_embeddings": (151936, d), "lm_head.new_output_embeddings": (128, d)
    }  # fmt: skip
    assert specs["model.point_predictor.subpatch_k.weight"] == (512, 2304)
    assert specs["model.build_vit_embedding.weight"] == (d, 2304)
    assert specs["model.connector.image_projector.w1.weight"] == (config.llm.intermediate_size, 1152)
    assert "model.connector.image_pooling_2d.wo.weight" not in specs
    blocks = {int(found[1]) for k in specs if (found := re.match(r"model\.vit\.transformer\.resblocks\.(\d+)", k))}
    assert blocks == set(range(25))
    heads = 4 * 512 + 9 + 512 * (3 * d + 2304) + 9 * d + d + 512
    assert sum(torch.Size(s).numel() for k, s in specs.items() if "point_predictor" in k) == heads


def test_what_the_layout_cannot_say(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="embed_location=True"):
        export_checkpoint(golden_model(golden, "embed_location=true"), tmp_path / "out")


def test_missing_tensors_are_named(golden: Path, tmp_path: Path) -> None:
    export_checkpoint(golden_model(golden), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.point_predictor.patch_k.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"point_predictor\.patch_k\.bias"):
        load_model(tmp_path / "out")


def test_the_published_class_gives_the_same_logits(golden: Path) -> None:
    """Of a video, as transformers computed them from the published export (of images it embeds the tokens of global crops otherwise)."""
    folder = golden / "molmo-point" / "a"
    model, published = load_point_model(folder), load_file(folder / "hf_generated.safetensors")["video_prompt/hf_prefill_last_logits"]
    prompt = inputs_here(cases(load_file(folder / "prompt.safetensors"))["video_prompt"])
    with torch.no_grad():
        logits = model(**prompt, last_logits_only=True).logits.flatten()
    texts = torch.ones(448 + 128, dtype=torch.bool)
    texts[list(model.tokenizer.point_token_ids)] = False  # there they are the columns behind these
    torch.testing.assert_close(logits[texts], published.flatten()[: len(texts)][texts], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["own", "published"])
def test_a_molmo2_becomes_a_molmo_point(golden: Path, format: str, tmp_path: Path) -> None:
    """`init_from` of a training: everything of Molmo2 is there, the heads are new; the same for the same seed."""
    data = our_config(str(golden / "tokenizer"), "qwen3", False)
    torch.manual_seed(1)
    base = Molmo2Config.from_dict(data).build_model()
    export_checkpoint(base, tmp_path / "base", "native" if format == "own" else "huggingface")

    data["vision_backbone"]["pooling_out_layer"] = True
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        with torch.device("meta"):
            model = MolmoPointConfig.from_dict(data).build_model()
        model.to_empty(device="cpu")
        begin_from(model, tmp_path / "base")
        models.append(model.state_dict())
    theirs = base.state_dict()
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name
        if name in theirs:
            assert torch.equal(tensor, theirs[name]), name
    new = models[0].keys() - theirs.keys()
    assert {name.split(".")[0] for name in new} == {"point_predictor", "point_embedding", "transformer"}
    assert 0.015 < models[0]["point_predictor.patch_q.weight"].std() < 0.025
    assert (models[0]["point_predictor.x_norm.weight"] == 1).all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_checkpoint_begins_one(golden: Path, tied: bool, tmp_path: Path) -> None:
    """The published code cannot do it for an untied model: the logits of special tokens are not in a text checkpoint."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3}
    text = transformers.Qwen3Config(**sizes, intermediate_size=96, vocab_size=448, tie_word_embeddings=tied, rope_theta=1e6)
    theirs = transformers.Qwen3ForCausalLM(text).eval()
    theirs.save_pretrained(tmp_path)
    settings = {"weight_tying": str(tied).lower(), "init_path": tmp_path, "mlp_hidden_size": 192, "rope_theta": 1e6, "layer_norm_eps": 1e-6}
    model = golden_model(golden, *(f"llm.{name}={value}" for name, value in settings.items()))
    special = {name: t.clone() for name, t in model.state_dict().items() if name.endswith((".new_weight", ".new_embedding"))}
    initialise_backbones(model)
    ids = torch.randint(0, 448, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :448], theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in special.items())


def test_a_molmo2_of_another_shape_is_refused(golden: Path, tmp_path: Path) -> None:
    data = our_config(str(golden / "tokenizer"), "qwen3", False)
    export_checkpoint(Molmo2Config.from_dict(data).build_model(), tmp_path / "base", "native")
    data["vision_backbone"]["pooling_out_layer"] = False
    with pytest.raises(CheckpointError, match=r"has no place here: vision_backbone\.image_pooling_2d\.wo\.bias"):
        begin_from(MolmoPointConfig.from_dict(data).build_model(), tmp_path / "base")
