"""docs/models.md: every snippet runs, every name of its table exists."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

from molmo_core.config import BaseConfig
from molmo_core.models.base import BaseModelConfig, ModelBase

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"## (\w+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_model_has_a_snippet() -> None:
    assert [name for name, _ in SNIPPETS] == ["Molmo", "MolmoE", "VideoOlmo", "HeMolmo", "Molmo2", "MolmoPoint"]


@pytest.mark.parametrize(("name", "code"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_snippets_run(name: str, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, f"docs/models.md: {name}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_names_of_the_table_exist() -> None:
    for name in re.findall(r"`(molmo_core(?:\.\w+)+)`", PAGE):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            parent, _, owner = module.rpartition(".")
            if owner[0].isupper():
                assert hasattr(getattr(importlib.import_module(parent), owner), attribute), name
            else:
                assert hasattr(importlib.import_module(module), attribute), name
    for owner, names in {
        ModelBase: ("forward", "generate", "load_checkpoint", "save_checkpoint", "from_pretrained", "get_fsdp_wrap_policy", "apply_fsdp2"),
        BaseConfig: ("load", "new"),
        BaseModelConfig: ("load", "build_model"),
    }.items():
        assert all(hasattr(owner, name) for name in names)


def test_files_of_the_page_exist() -> None:
    for path in re.findall(r"`(configs/[\w./-]+|[\w-]+\.yaml)`", PAGE):
        assert (ROOT / path).exists() or (ROOT / "configs" / "models" / path).exists(), path


# What the API document shows: owner (as in the table) and parameters or fields, in its order.
API = {
    "molmo_core.models.base.ModelBase.forward": "input_ids images image_masks image_input_idx labels",
    "molmo_core.models.molmo.Molmo.forward": "input_ids images image_masks image_input_idx labels attention_mask",
    "molmo_core.models.video_olmo.VideoOlmo.forward": "input_ids images",
    "molmo_core.models.he_molmo.HeMolmo.forward": "input_ids images",
    "molmo_core.models.molmo.Molmo.generate": "input_ids images max_new_tokens min_new_tokens do_sample temperature top_p top_k num_beams "
    "eos_token_id pad_token_id",
    "molmo_core.models.base.ModelBase.save_checkpoint": "path sharded",
    "molmo_core.models.base.ModelBase.load_checkpoint": "path strict",
    "molmo_core.models.molmo.Molmo.from_pretrained": "path",
    "molmo_core.from_pretrained": "path trust_remote_code",
    "molmo_core.models.molmo.MolmoConfig": "llm vision_backbone data_formatter mm_preprocessor bi_directional_attn",
    "molmo_core.models.molmo.MolmoConfig.load": "path overrides",
    "molmo_core.models.molmo.MolmoConfig.build_tokenizer": "",
    "molmo_core.models.molmo.MolmoConfig.build_preprocessor": "for_inference is_training include_image max_seq_len",
    "molmo_core.models.molmo.MolmoConfig.build_collator": "sequence_length pad_mode include_metadata",
    "molmo_core.models.video_olmo.VideoOlmoConfig": "max_frames frame_sampling",
    "molmo_core.models.he_molmo.HeMolmoConfig": "llm vision_backbone token_scorer selection_ratio",
    "molmo_core.outputs.OLMoOutput": "logits loss past_key_values hidden_states attentions",
    "molmo_core.outputs.OLMoGenerateOutput": "token_ids text scores",
    "molmo_core.nn.configs.LlmConfig": "d_model n_heads n_layers",
    "molmo_core.nn.configs.MolmoVisionBackboneConfig": "image_model_type",
    "molmo_core.models.base.ModelBase.get_fsdp_wrap_policy": "",
}
DEFAULTS = {"max_new_tokens": 200, "min_new_tokens": 0, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": None, "num_beams": 1,
            "eos_token_id": None, "pad_token_id": None, "is_training": True, "include_image": False, "max_seq_len": None,
            "include_metadata": True, "selection_ratio": 0.25}  # fmt: skip


@pytest.mark.parametrize("owner", API)
def test_names_of_the_api_document(owner: str) -> None:
    table = PAGE[PAGE.index("## Where the names of the models API are") :]
    names = API[owner].split()
    for name in (owner.rpartition(".")[2], *names):
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`", table), f"{name} is not in the table"
    parameters = inspect.signature(pkgutil.resolve_name(owner)).parameters
    assert [name for name in parameters if name in names] == names, "all of them, in this order"
    for name in names:
        if name in DEFAULTS:
            assert parameters[name].default == DEFAULTS[name], name
