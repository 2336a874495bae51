"""docs/models.md: every snippet runs, every name of its table exists."""

import importlib
import re
from pathlib import Path

import pytest

from molmo_core.config import BaseConfig
from molmo_core.models.base import BaseModelConfig, ModelBase

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"## (\w+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_model_has_a_snippet() -> None:
    assert [name for name, _ in SNIPPETS] == ["Molmo", "MolmoE", "VideoOlmo", "HeMolmo", "Molmo2"]


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
