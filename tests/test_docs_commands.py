"""Every command and import that README and docs show exists and is accepted, so that no page rots."""

import ast
import importlib
import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from jobs.cli import VERBS
from molmo_core.config import BaseConfig
from pipelines.data.config import PrepareConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry.config import PromoteConfig, RegisterConfig
from pipelines.serving.config import ServeConfig
from pipelines.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKPOINT = ROOT / "tests/golden/molmo-qwen2-clip"
CONFIGS: dict[str, type[BaseConfig]] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
    "promote": PromoteConfig,
    "serve": ServeConfig,
}
ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/ready", "/metrics",
)  # fmt: skip
# Commands of others that the pages may show; what they do is not ours to check.
OTHERS = {"cp", "serve", "kubectl", "pip", "git", "cd", "export", "source", "kill", "mlflow", "nvidia-smi", "vllm"}


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every code block in a language."""
    found = []
    for page in PAGES:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found.append((page.relative_to(ROOT).as_posix(), match[1]))
    return found


def commands() -> list[tuple[str, str]]:
    """(page, command) of every shell command, continued lines joined and comments removed."""
    found = []
    for page, text in [*blocks("bash"), *blocks("sh"), *blocks("console")]:
        for command in split(text):
            found.append((page, command))
    return found


def split(text: str) -> list[str]:
    """The commands of a block: a quotation may span lines, a backslash continues one."""
    result, open_command = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        open_command += ("\n" if open_command else "") + line
        try:
            words = shlex.split(open_command, comments=True)
        except ValueError:
            continue  # inside a quotation
        if words:
            result.append(open_command.strip().removeprefix("$ "))
        open_command = ""
    assert not open_command, f"a quotation is not closed: {open_command!r}"
    return result


def check(words: list[str]) -> None:
    assert "submit" not in words or not words[0].startswith("MLFLOW_"), "a submitted job does not see the variables of the shell"
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables for the command
        words = words[1:]
    name, *rest = words
    if name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif name.endswith(("python", "python3")) and rest[0] == "-m" and rest[1].startswith("jobs."):
        job(rest[1].removeprefix("jobs."), rest[2:])
    elif name.endswith(("python", "python3")) and rest[0] == "-m" and rest[1].split(".")[0] in ("benchmarks", "pytest"):
        module = rest[1].replace(".", "/")
        assert rest[1] == "pytest" or (ROOT / f"{module}.py").is_file()
    elif name.endswith(("python", "python3")) and rest[:2] == ["-m", "lmms_eval"]:  # run by test_lmms_eval.py
        assert rest[rest.index("--model") + 1] in ("molmo", "async_openai")
    elif name.endswith(("python", "python3")):
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"
    elif name == "molmo":
        job(rest[0], rest[1:])
    elif name == "ray":
        assert rest[0] in ("job", "start", "stop", "status")
        if "--runtime-env-json" in rest:
            assert set(json.loads(rest[rest.index("--runtime-env-json") + 1])) <= {"env_vars", "excludes"}
        if "--" in rest:
            check(rest[rest.index("--") + 1 :])
    elif name == "docker":
        for option, path in itertools.pairwise(rest):
            assert option != "-f" or (ROOT / path).is_file(), f"{path} does not exist"
        if "python" in rest:
            check(rest[rest.index("python") :])
    elif name == "curl":
        url = next(word for word in rest if word.startswith("http"))
        assert url.endswith(ROUTES)
    else:
        assert name in OTHERS, f"no check for the command {name!r}"


def job(verb: str, arguments: list[str]) -> None:
    assert verb in VERBS, f"no job {verb!r}"
    positional = [word for word in arguments if not word.startswith("-") and "=" not in word]
    overrides = [word for word in arguments if not word.startswith("-") and "=" in word]
    overrides = [word.replace("CHECKPOINT", str(CHECKPOINT)) for word in overrides]
    if any(re.fullmatch(r"mine\.\w+", Path(word).name) for word in positional):  # the reader's own file
        return
    for path in (word for word in positional if word.startswith("configs/")):
        assert (ROOT / path).is_file(), f"{path} does not exist"
        if verb in CONFIGS:
            CONFIGS[verb].load(ROOT / path, overrides)


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_command(page, command):
    for part in re.split(r"\s(?:&&|\|)\s", command):
        check(shlex.split(part, comments=True))


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value[:30])
def test_python_imports(page, code):
    """The code parses, and what it imports from this project exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("molmo_core", "pipelines", "jobs"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), alias.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Relative links and pictures lead somewhere."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_check_notices_what_is_wrong():
    for wrong in (
        "make demonstrate",
        "python -m jobs.preprare configs/data/easy_vqa.yaml",
        "molmo train configs/train/nothing.yaml",
        "python -m jobs.serve configs/serve/demo.yaml prot=1",
        "ray job submit -- python -m jobs.nothing",
        "curl http://127.0.0.1:8000/v2",
        "MLFLOW_TRACKING_URI=http://tracking:5000 ray job submit -- python -m jobs.demo",
        "rm -rf /",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(shlex.split(wrong))
