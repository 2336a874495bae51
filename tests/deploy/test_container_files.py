"""The Dockerfile and the compose files: whole, consistent with the project, and without secrets."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

from pipelines import environment
from pipelines.serving.config import ServeConfig

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = [DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml"]


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of a name, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def test_the_dockerfile_has_no_lint():
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_what_is_copied_is_there_and_reaches_the_build():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split("\n")
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert "*" in ignored
    copied = [word for words in instructions("COPY") if "--from" not in words for word in words.split()[:-1]]
    assert set(copied) == set(allowed)
    for name in copied:
        assert (ROOT / name).exists(), name


def test_all_that_pip_installs_is_pinned():
    """Every line uses the constraints, and every package that an extra of the image asks for has a version there."""
    lines = [part for words in instructions("RUN") for part in words.split("&&") if "pip install" in part]
    assert len(lines) == 3
    for line in lines:
        assert "-c constraints.txt" in line
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in (ROOT / "constraints.txt").read_text().split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"\.\[([\w,]+)\]", DOCKERFILE)[1].split(",")
    wanted = [package for extra in {*extras, "data", "train", "serve"} for package in project["optional-dependencies"][extra]]
    for package in [*project["dependencies"], *wanted]:
        name = re.match(r"[\w.-]+", package)[0]
        assert name == "molmo-pipelines" or re.sub(r"[-_.]+", "-", name).lower() in pinned, package


def test_the_image_has_the_environment_of_workers():
    """Kubernetes starts Ray itself, so what `pipelines.cluster` would have set is in the image."""
    (words,) = instructions("ENV")[1:]
    variables = dict(word.split("=", 1) for word in words.split())
    expected = {**environment.IMPORT, **environment.WORKER}
    assert {name: variables.get(name) for name in expected} == expected


def test_the_image_is_not_root():
    assert instructions("USER") == ["1000"]


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_takes_it(path):
    content = {key: value for key, value in yaml.safe_load(with_defaults(path.read_text())).items() if not key.startswith("x-")}
    assert PyCompose.from_json(json.dumps(content)).service_names()


def test_the_check_notices_what_is_wrong():
    for wrong in ({"imag": "a"}, {"image": "a", "depends_on": {"b": {"condition": "service_health"}}}, {"image": "a", "ports": ["x:y:z"]}):
        with pytest.raises(ValueError):
            PyCompose.from_json(json.dumps({"services": {"a": wrong}}))


@pytest.mark.parametrize("files", [COMPOSE[:1], COMPOSE], ids=["cpu", "gpu"])
def test_docker_compose_takes_it(files):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no `docker compose` on this machine")
    options = [option for path in files for option in ("-f", str(path))]
    variables = {**os.environ, "POSTGRES_PASSWORD": "a", "MOLMO_API_KEYS": "b"}
    result = subprocess.run([docker, "compose", *options, "config", "--quiet"], capture_output=True, text=True, env=variables)
    assert (result.returncode, result.stderr) == (0, "")


def with_defaults(text: str) -> str:
    """A compose file as it is when its variables are not set, or have any value where they must be."""
    return re.sub(r"\$\{\w+:\?[^}]*\}", "given", re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


def services() -> dict:
    services = yaml.safe_load(with_defaults(COMPOSE[0].read_text()))["services"]
    services["server on a GPU"] = yaml.safe_load(with_defaults(COMPOSE[1].read_text()))["services"]["server"]
    return services


@pytest.mark.parametrize("name", ["server", "server on a GPU"])
def test_the_server_starts(name):
    """The module is there and takes the configuration file and the settings."""
    python, flag, module, recipe, *overrides = services()[name]["command"]
    assert (python, flag) == ("python", "-m")
    assert hasattr(importlib.import_module(module), "main")
    config = ServeConfig.load(ROOT / recipe, overrides)
    assert config.host == "0.0.0.0"
    assert config.model.startswith("models:/")
    assert services()["server"]["ports"] == [f"127.0.0.1:{config.port}:{config.port}"], "what is encrypted before it goes further listens"


def test_every_variable_is_in_the_example_and_secrets_have_no_default():
    used = {name: default for name, _, default in re.findall(r"\$\{(\w+)(:[-?])?([^}]*)\}", COMPOSE[0].read_text())}
    example = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    assert used.keys() == example.keys()
    for name, value in example.items():
        assert bool(re.search("KEY|PASSWORD", name)) == (value == ""), name
    ignored = (ROOT / ".gitignore").read_text().split()
    assert any(fnmatch("deploy/.env", pattern.lstrip("/")) for pattern in ignored)


def test_services_wait_for_those_that_they_need():
    for name, service in services().items():
        for other in service.get("depends_on", {}):
            assert "healthcheck" in services()[other], f"{name} waits for {other}"
