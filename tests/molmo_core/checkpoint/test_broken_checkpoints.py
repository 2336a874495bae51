"""Checkpoints broken on purpose: each gives one error that names the file or tensor and says what to do."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from molmo_core.checkpoint import CheckpointError, from_pretrained
from molmo_core.checkpoint.backbones import load_llm, load_vit
from molmo_core.checkpoint.export import export_checkpoint
from molmo_core.config import ConfigError
from molmo_core.models.base import BaseModelConfig
from molmo_core.models.molmo2 import Molmo2Config
from tests.molmo_core.checkpoint.tiny_molmo2 import our_config

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoints(golden, tmp_path_factory) -> Path:
    """The same tiny model as `own` and as `published`, in several shards."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = Molmo2Config.from_dict(our_config(str(golden / "tokenizer"), "qwen3", False)).build_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("molmo_core.checkpoint.export.SHARD_BYTES", 200_000)
        patch.setattr("molmo_core.checkpoint.native.SHARD_BYTES", 200_000)
        export_checkpoint(model, folder / "published")
        model.save_checkpoint(folder / "own", sharded=True)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: shards(folder)[0].write_bytes(change(shards(folder)[0].read_bytes()))


def change_header(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """`change` gets the entry of the first tensor."""

    def changed(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        change(header[next(name for name in header if name != "__metadata__")])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return change_bytes(changed)


def change_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def run(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return run


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def only_a_pickle(folder: Path) -> None:
    for shard in shards(folder):
        shard.unlink()
    (folder / INDEX).unlink()
    torch.save({}, folder / "pytorch_model.bin")


WEIGHTS = {
    "cut off": (change_bytes(lambda b: b[:-1000]), r"model-00001-of-\d+\.safetensors: tensor .* is cut off .*download it again"),
    "empty": (change_bytes(lambda b: b""), r"00001.*not a safetensors file, or cut off; .*download it again"),
    "header cut off": (change_bytes(lambda b: b[:50]), r"00001.*not a safetensors file, or cut off"),
    "no header": (change_bytes(lambda b: b[:8] + b"\xff" * 32 + b[40:]), r"00001.*not a safetensors file, or damaged"),
    "header is a list": (change_bytes(lambda b: struct.pack("<Q", 3) + b"[3]"), r"00001.*not a safetensors file, or damaged"),
    "no type": (change_header(lambda entry: entry.pop("dtype")), r"00001.*damaged \(KeyError\('dtype'\)\)"),
    "unknown type": (change_header(lambda entry: entry.update(dtype="F4")), r"00001.*tensor .* has the unsupported type F4"),
    "offset before the data": (change_header(lambda entry: entry.update(data_offsets=[-4, 4])), r"00001.*tensor .* is cut off"),
    "another shape": (
        change_header(lambda entry: entry.update(shape=[*entry["shape"], 1])),
        r"1 tensor\(s\) do not fit the model\s+mis-shaped: transformer\.\S+: the model has \[\d+, 64\], the checkpoint \[\d+, 64, 1\]",
    ),
    "8 bits": (
        change_header(lambda entry: entry.update(dtype="F8_E4M3", shape=[4 * entry["shape"][0], *entry["shape"][1:]])),
        r"the checkpoint torch\.float8_e4m3fn .*quantised weights are",
    ),
    "quantised": (change_header(lambda entry: entry.update(dtype="I32")), r"the checkpoint torch\.int32 .*quantised weights are not read"),
    "no shard": (lambda folder: shards(folder)[0].unlink(), r"named by model.*index\.json are missing: model-00001.*download it again"),
    "no index": (lambda folder: (folder / INDEX).unlink(), r"neither model\.safetensors nor .*, though shards are: .*not complete"),
    "index is no JSON": (write(INDEX, "{"), r"index\.json: no index of shards .*download it again"),
    "index without map": (write(INDEX, "{}"), r"index\.json: no index of shards"),
    "index leads elsewhere": (
        change_json(INDEX, lambda d: d["weight_map"].update({k: "../" + v for k, v in d["weight_map"].items()})),
        r"index\.json: '\.\./model-\S+' is not a file of this folder",
    ),
    "index lacks tensors": (
        change_json(INDEX, lambda d: [d["weight_map"].pop(k) for k in list(d["weight_map"])[:2]]),
        r"2 tensor\(s\) do not fit the model\s+missing: transformer\S+.*\s+missing: transformer",
    ),
    "pickle": (only_a_pickle, r"pytorch_model\.bin: weights in a pickle file are not loaded.*safetensors\.torch\.save_file"),
}


@pytest.mark.parametrize("kind", ["own", "published"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(checkpoints, tmp_path, kind, name):
    change, message = WEIGHTS[name]
    shutil.copytree(checkpoints / kind, tmp_path / "broken")
    change(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'broken'))}[\\s\\S]*{message}"):
        from_pretrained(tmp_path / "broken")


SETTINGS = {
    "own: unknown key": ("own", write("config.yaml", "model_name: molmo2\nfoo: 1\n"), r"config\.yaml: unknown key 'foo'\. Valid: "),
    "own: unknown model": ("own", write("config.yaml", "model_name: llava\n"), r"config\.yaml: unknown model_name 'llava'\. Valid: "),
    "own: no YAML": ("own", write("config.yaml", "a: [1"), r"config\.yaml: not valid YAML"),
    "unsupported model": ("published", write("config.json", '{"model_type": "llava"}'), r"'llava' is not a Molmo model .*init_path"),
    "no JSON": ("published", write("config.json", "{"), r"config\.json: not readable as a JSON object"),
    "a JSON list": ("published", write("config.json", "[1]"), r"config\.json: not readable as a JSON object"),
    "no text_config": ("published", change_json("config.json", lambda d: d.pop("text_config")), r"config\.json: no key 'text_config'"),
    "no vit_config": ("published", change_json("config.json", lambda d: d.pop("vit_config")), r"config\.json: no key 'vit_config'"),
    "another activation": (
        "published",
        change_json("config.json", lambda d: d["text_config"].update(hidden_act="gelu")),
        r"text_config\.hidden_act='gelu' is not implemented; only 'silu'",
    ),
    "another rotary scaling": (
        "published",
        change_json("config.json", lambda d: d["text_config"].update(rope_scaling={"rope_type": "longrope", "factor": 2})),
        r"llm\.rope_type: Input should be .*got 'longrope'",
    ),
    "no processor": ("published", write("preprocessor_config.json", "{"), r"preprocessor_config\.json: not readable as a JSON object"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(checkpoints, tmp_path, name):
    kind, change, message = SETTINGS[name]
    shutil.copytree(checkpoints / kind, tmp_path / "broken")
    change(tmp_path / "broken")
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path / "broken")


def test_no_checkpoint_there(checkpoints, tmp_path):
    for path, message in {
        tmp_path: r"neither config\.yaml \(own checkpoints\) nor config\.json \(published ones\) there",
        tmp_path / "nowhere": r"nowhere: no such file or folder",
        shards(checkpoints / "own")[0]: r"is a file; a checkpoint is a folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(path)
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: weights in a pickle file are not loaded"):
        from_pretrained(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"allenai/Molmo-7B-D-0924: no such folder here, .*Offline, give the path of a folder with"):
        from_pretrained("allenai/Molmo-7B-D-0924")


def test_no_tokenizer(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "own", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/tokenizer")
    with pytest.raises(ConfigError, match=r"no such tokenizer folder \(llm\.tokenizer\.identifier; a checkpoint folder has its own"):
        _ = from_pretrained(tmp_path / "broken").tokenizer


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: .*copy or download it again"),
        ("tokenizer.json", '{"model": {}}', r"tokenizer\.json: no tokenizer file, or damaged .*copy or download it again"),
        ("tokenizer.json", '["<im_patch>"]', r"tokenizer\.json: not readable as a JSON object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not readable as a JSON object"),
    ],
)
def test_broken_tokenizer(checkpoints, tmp_path, name, content, message):
    shutil.copytree(checkpoints / "published", tmp_path / "broken")
    (tmp_path / "broken" / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        _ = from_pretrained(tmp_path / "broken").tokenizer


@pytest.mark.parametrize("dtype", ["fp16", "int8", "nn", "float8_e4m3fn", torch.int8, torch.float8_e4m3fn, 16])
def test_types_that_no_model_computes_in(checkpoints, tmp_path, dtype):
    """Converted to them the weights would be lost without a word."""
    message = re.escape(f"dtype={dtype!r} is not a type that a model computes in (float32, bfloat16,")
    model = from_pretrained(checkpoints / "own")
    for wrong in (
        lambda: from_pretrained(checkpoints / "own", dtype=dtype),
        lambda: from_pretrained(checkpoints / "published", dtype=dtype),
        lambda: export_checkpoint(model, tmp_path / "out", "huggingface", dtype),
        lambda: export_checkpoint(model, tmp_path / "out", "native", dtype),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_unknown_export_format(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="format='gguf': one of huggingface, native"):
        export_checkpoint(from_pretrained(checkpoints / "own"), tmp_path / "out", "gguf")


@pytest.mark.parametrize("load", [load_llm, load_vit])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json; a backbone is a folder that transformers' save_pretrained wrote"),
        ("{", "config.json: not readable as a JSON object"),
        ('{"model_type": "qwen2"}', r"no key 'num_attention_heads'|neither model\.safetensors nor"),
        ('{"model_type": "bert"}', r"'bert' is not a text model known here|neither model\.safetensors nor"),
    ],
)
def test_backbones(golden, tmp_path, load, content, message):
    model = BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml").build_model()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(model, tmp_path)
