"""The direction of imports: jobs → pipelines → molmo_core, and inside molmo_core as docs/architecture.md says."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("molmo_core", "pipelines", "jobs")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Where an import may not stand (longest match counts) and what it may not name.
FORBIDDEN = {
    "molmo_core": ("pipelines", "jobs", "ray", "mlflow"),
    "molmo_core/nn": ("pipelines", "jobs", "ray", "mlflow", "molmo_core.preprocessing", "molmo_core.models", "molmo_core.checkpoint"),
    "molmo_core/preprocessing": (
        "pipelines", "jobs", "ray", "mlflow", "torch", "molmo_core.nn", "molmo_core.models", "molmo_core.checkpoint",
        "molmo_core.generation", "molmo_core.outputs",
    ),
    "molmo_core/metrics": ("pipelines", "jobs", "ray", "mlflow", "torch", "molmo_core.nn", "molmo_core.models"),
    "molmo_core/generation": ("pipelines", "jobs", "ray", "mlflow", "molmo_core.models", "molmo_core.checkpoint"),
    "pipelines": ("jobs",),
    "pipelines/data": ("jobs", "mlflow", "pipelines.training", "pipelines.serving", "pipelines.evaluation", "pipelines.tracking"),
    "pipelines/serving": ("jobs", "pipelines.training", "pipelines.evaluation"),
    "jobs": (),
}  # fmt: skip


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that is imported anywhere in a file, but for type checking only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def rules(path: Path) -> tuple[str, ...]:
    name = path.relative_to(ROOT).as_posix()
    return FORBIDDEN[max((place for place in FORBIDDEN if name.startswith(f"{place}/")), key=len)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_direction(path):
    lazy_torch = path.match("molmo_core/preprocessing/collator.py")
    tree = ast.parse(path.read_text())
    for node, name in imported(tree):
        for banned in rules(path):
            if f"{name}.".startswith(f"{banned}."):
                assert lazy_torch, f"line {node.lineno}: {name}"
                assert node not in tree.body, "collator.py imports torch inside functions only"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_circle_among_files():
    """No file imports itself by way of others, inside functions and for type checking included.

    Names given as text (`molmo_core.registry.MODELS`, lazy `__getattr__` of packages) are not imports of the file that holds them.
    """
    names = {module_name(path) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {full if (full := f"{node.module}.{alias.name}") in names else str(node.module) for alias in node.names}
        graph[module_name(path)] = found & names
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" → ".join(reversed(error.args[1]))) from None


HEAVY = ("torch", "ray", "mlflow", "transformers", "cv2", "pyarrow")
CONFIGURATIONS = sorted(module_name(path) for path in MODULES if re.search(r"(config|configs)\.py$|/model_configs/", path.as_posix()))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (", ".join(("molmo_core", "molmo_core.tokens", "molmo_core.registry", *CONFIGURATIONS)), HEAVY),
        ("molmo_core.preprocessing.preprocessor", ("torch", "ray", "mlflow")),
        ("molmo_core.preprocessing.collator", ("torch", "ray", "mlflow")),
        ("molmo_core.metrics", ("torch", "ray", "mlflow")),
        ("pipelines.serving.chat", ("torch", "ray", "mlflow")),
        ("molmo_core.models.molmo", ("ray", "mlflow", "decord")),
        ("jobs.cli", ("torch", "ray", "mlflow")),
    ],
)
def test_light_imports(module, absent):
    """What importing a module really loads, in a fresh process."""
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("verb", "config"), [("train", "configs/train/demo.yaml"), ("prepare", "configs/data/records.yaml")])
def test_a_typo_is_shown_without_heavy_imports(verb, config):
    code = (
        f"import sys; sys.argv = ['job', {config!r}, 'no.such.key=1']\n"
        f"from jobs.{verb} import app\ntry: app()\nfinally: print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout.strip()) == (2, "[]")
    assert f"error: {config}: unknown key 'no'" in run.stderr


def test_length_of_files():
    """A file does one job; 400 lines are the limit."""
    long = {path.relative_to(ROOT).as_posix(): n for path in MODULES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
