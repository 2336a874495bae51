"""An export sees every damage: each tensor of what was written is compared with the source's."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from molmo_core.checkpoint import CheckpointError, load_model
from molmo_core.checkpoint.export import export_and_verify, export_checkpoint
from molmo_core.checkpoint.safetensors_stream import SafetensorsReader, TensorSpec, write_safetensors
from molmo_core.checkpoint.tensor_comparison import compare_tensors
from molmo_core.models.base import ModelBase
from molmo_core.models.molmo2 import Molmo2Config
from molmo_core.registry import BaseModelConfig
from tests.molmo_core.checkpoint.tiny_molmo2 import our_config

EMBEDDING = "transformer.wte.embedding"
BIAS = "vision_backbone.image_vit.transformer.resblocks.0.attention.wq.bias"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def molmo(golden: Path) -> ModelBase:
    torch.manual_seed(0)
    return BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml").build_model().eval()


def saved(golden: Path, folder: Path, **changes: torch.Tensor | float) -> Path:
    """A tiny Molmo on disk, with some values of some of its tensors changed."""
    model = molmo(golden)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in changes.items():
            tensors[name].view(-1)[3:5] = value
    model.save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def exports(golden, tmp_path_factory):
    """A checkpoint and its exports, to be damaged in copies."""
    base = tmp_path_factory.mktemp("exports")
    molmo(golden).save_checkpoint(base / "molmo")
    torch.manual_seed(1)
    Molmo2Config.from_dict(our_config(str(golden / "tokenizer"), "olmo", False, tied=True)).build_model().save_checkpoint(base / "tied")
    for name in ("molmo", "tied"):
        export_checkpoint(load_model(base / name), base / f"{name}-out")
    return base


CASES = {
    "one value too large for float16": ({EMBEDDING: 1e6}, torch.float16, {EMBEDDING: r"2 of 28,672 values are infinite in float16"}),
    "negative": ({EMBEDDING: -7e4}, torch.float16, {EMBEDDING: "infinite in float16"}),
    "just over the end": ({BIAS: 65_520.0}, torch.float16, {BIAS: "infinite in float16"}),
    "too large for bfloat16": ({BIAS: 3.4e38}, torch.bfloat16, {BIAS: "infinite in bfloat16"}),
    "several tensors": ({EMBEDDING: 1e6, BIAS: 1e6}, torch.float16, {EMBEDDING: "infinite", BIAS: "infinite"}),
    "not a number in the source": ({BIAS: math.nan}, torch.bfloat16, {BIAS: "2 of .* not finite in the source itself"}),
    "infinite in the source": ({BIAS: math.inf}, None, {BIAS: "not finite in the source itself"}),
    # The bias is 0 elsewhere: these two values are all it has.
    "flushed to zero": ({BIAS: 1e-9}, torch.float16, {BIAS: r"float16 cannot hold its small numbers \(relative error 1\)"}),
    "denormal": ({BIAS: 1.3e-7}, torch.float16, {BIAS: "float16 cannot hold its small numbers"}),
}


@pytest.mark.parametrize("format", ["huggingface", "native"])
@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_and_nothing_is_left(case, format, golden, tmp_path):
    changes, dtype, expected = CASES[case]
    checkpoint = saved(golden, tmp_path / "checkpoint", **changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as error:
        export_and_verify(str(checkpoint), tmp_path / "out", format, dtype, log=lambda line: None)
    assert str(error.value).startswith(f"{tmp_path / 'out'}: not written, {len(expected)} tensor(s) are not what {checkpoint} holds")
    for name, problem in expected.items():
        assert re.search(rf"\n  {re.escape(name)}: .*{problem}", str(error.value)), error.value
    if "source itself" not in str(error.value):
        assert "export with bfloat16" in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_types_that_no_model_computes_in(dtype, golden, tmp_path):
    checkpoint = saved(golden, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="a model computes in"):
        export_and_verify(str(checkpoint), tmp_path / "out", "huggingface", dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_whole_passes(dtype, golden, tmp_path, capsys):
    model = molmo(golden)
    with torch.no_grad():
        model.get_parameter(BIAS)[3:5] = torch.tensor([65_504.0, -65_504.0])  # the ends of float16
        model.get_parameter(EMBEDDING)[:50, 0] = 1e-9  # lost in float16, but nothing beside the others
    model.save_checkpoint(tmp_path / "checkpoint")
    results = export_and_verify(str(tmp_path / "checkpoint"), tmp_path / "out", "huggingface", dtype)
    assert all(result.passed for result in results)
    shown = capsys.readouterr().out
    assert (f"all {len(model.state_dict())} tensors are the source's, bit for bit" in shown) == (
        dtype in (None, torch.float32, torch.float64)
    )


@pytest.mark.parametrize("name", ["molmo", "tied"])
def test_published_source_and_types_as_stored(name, exports, tmp_path):
    """From one published layout to our own and back."""
    export_and_verify(exports / f"{name}-out", tmp_path / "own", "native", log=lambda line: None)
    export_and_verify(tmp_path / "own", tmp_path / "out", "huggingface", log=lambda line: None)
    comparison = compare_tensors(exports / f"{name}-out", tmp_path / "out")
    assert (comparison.error, comparison.tensors) == (0, len(load_model(tmp_path / "out").state_dict()))
    assert compare_tensors(exports / name, exports / f"{name}-out").tensors == comparison.tensors, "a tied head counts, too"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["molmo", "tied"]))
def test_one_flipped_bit_anywhere_is_found(data, name, exports, tmp_path):
    source, out = exports / name, tmp_path / "damaged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(exports / f"{name}-out", out)
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    bit = data.draw(st.integers(0, 8 * (len(content) - start) - 1))
    content[start + bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) are not what .*\n.*: 1 of [\d,]+ values are not the source's"):
        compare_tensors(source, out)


def changed(exports: Path, tmp_path: Path, name: str, change) -> Path:
    shutil.copytree(exports / f"{name}-out", tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "out/model.safetensors")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("molmo", lambda t: t.pop("model.transformer.ln_f.weight"), r"missing: transformer\.ln_f\.weight"),
        ("molmo", lambda t: t.update(extra=torch.zeros(2)), "unexpected: extra"),
        ("molmo", lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(3)}), r"mis-shaped: transformer\.ln_f\.weight"),
        (
            "tied",
            lambda t: t["lm_head.weight"].mul_(2),
            r"wte\.embedding \(stored a second time as lm_head\.weight\): .*damaged",
        ),
        ("tied", lambda t: t.pop("lm_head.weight"), r"\(stored a second time as lm_head\.weight\): missing"),
        ("tied", lambda t: t.update({"lm_head.weight": torch.ones(3, 64)}), r"mis-shaped: transformer\.wte\.embedding"),
        ("tied", lambda t: t["lm_head.weight"].zero_(), r"stored a second time as lm_head\.weight\): "),
    ],
)
def test_missing_tensors_and_tied_copies(name, change, message, exports, tmp_path):
    out = changed(exports, tmp_path, name, change)
    with pytest.raises(CheckpointError, match=message):
        compare_tensors(exports / name, out)


def test_writing_refuses_what_a_type_cannot_hold(tmp_path):
    """The writer itself, without a verification."""
    tensors = {"small": torch.ones(3), "large": torch.tensor([1.0, 7e4])}
    specs = {name: TensorSpec(torch.float16, tuple(t.shape)) for name, t in tensors.items()}
    with pytest.raises(CheckpointError, match=r"large: values up to 7e\+04 are infinite in float16; store it as bfloat16"):
        write_safetensors(tmp_path, specs, tensors.get)
    specs = {name: TensorSpec(torch.bfloat16, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(tmp_path, specs, tensors.get)
    assert SafetensorsReader(tmp_path).read("large").tolist() == [1.0, 70144.0]
