"""API keys: where they come from, and that nothing but what is open is answered without one."""

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI

from molmo_core.config import ConfigError
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.keys import VARIABLE, KeyGuard, check_key, key_digests

KEY, OTHER = "k" * 32, "sk-" + "Ab1_" * 8


@pytest.fixture
def key_file(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "keys"
        path.write_text(text)
        path.chmod(mode)
        return ServeConfig(model="m", host="0.0.0.0", api_keys_file=str(path))

    return write


def refused(config, environment=None) -> str:
    with pytest.raises(ConfigError) as caught:
        key_digests(config, environment or {})
    return str(caught.value)


def test_keys_of_a_file_and_of_the_environment(key_file):
    digests = key_digests(key_file(f"{KEY}\n{OTHER}\n"), {})
    assert len(digests) == 2
    assert key_digests(ServeConfig(model="m", host="0.0.0.0"), {VARIABLE: f"{KEY}, {OTHER}"}) == digests
    assert key_digests(key_file(KEY, 0o440), {VARIABLE: OTHER}) == digests[:1], "the file goes before"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_none_are_needed_on_this_machine_alone(host):
    assert key_digests(ServeConfig(model="m", host=host), {}) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.3", "example.com", "192.168.1.1", "localhost.example.com"])
def test_without_keys_nobody_else_is_served(host):
    message = refused(ServeConfig(model="m", host=host))
    assert f"host={host}" in message
    assert "api_keys_file=" in message
    assert VARIABLE in message


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("", 0o600, "holds no API key"),
        (" \n\n", 0o600, "holds no API key"),
        (KEY, 0o644, "chmod 600"),
        (KEY, 0o602, "chmod 600"),
        (KEY, 0o660, "chmod 600"),
        (f"{KEY}\nsecret", 0o600, "key 2 of"),
        (f"{KEY}ü", 0o600, "key 1 of"),
    ],
)
def test_files_that_are_refused(key_file, text, mode, words):
    message = refused(key_file(text, mode))
    assert words in message
    assert KEY not in message
    assert "secret" not in message


def test_other_files(tmp_path):
    assert "No such file" in refused(ServeConfig(model="m", api_keys_file=str(tmp_path / "none")))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "binary").chmod(0o600)
    assert "not text" in refused(ServeConfig(model="m", api_keys_file=str(tmp_path / "binary")))
    assert "holds no API key" in refused(ServeConfig(model="m"), {VARIABLE: ""})


PATHS = ["/v1/models", "/metrics", "/ready", "/openapi.json", "/nothing", "/health/", "/health/x", "/page", "/pages/x"]


@pytest.fixture
def get():
    app = FastAPI()
    app.get("/{path:path}")(lambda path: {"path": path})
    digests = []
    app.add_middleware(KeyGuard, digests=lambda: digests)

    def get(path, *authorizations, keys=(KEY, OTHER)):
        digests[:] = key_digests(ServeConfig(model="m"), {VARIABLE: " ".join(keys)}) if keys else []

        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
                return await client.get(path, headers=[("Authorization", value.encode("latin-1")) for value in authorizations])

        return asyncio.run(ask())

    return get


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_answered_without_a_key(get, path):
    answer = get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["code"] == "missing_api_key"
    assert get(path, keys=()).status_code == 200, "a server without keys"
    for key in (KEY, OTHER):
        assert get(path, f"Bearer {key}").status_code == 200
        assert get(path, f"bearer  {key} ").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/", "/page/app.js"])
def test_what_is_open(get, path):
    assert get(path).status_code == 200


@pytest.mark.parametrize(
    "values", [["Bearer"], ["Bearer "], [KEY], [f"Basic {KEY}"], [f"Bearer {KEY[:-1]}"], [f"Bearer {KEY}x"], [f"Bearer {KEY.upper()}"],
               [f"Bearer {KEY}, {KEY}"], ["Bearer \xff"], ["Bearer " + "x" * 8000]],
)  # fmt: skip
def test_wrong_keys(get, values):
    answer = get("/v1/models", *values)
    assert answer.status_code == 401
    assert KEY not in answer.text
    assert len(json.dumps(answer.json())) < 300


def test_two_headers():
    digests = key_digests(ServeConfig(model="m"), {VARIABLE: KEY})
    check_key([f"Bearer {KEY}".encode()], digests)
    with pytest.raises(ApiError, match="asks for an API key"):
        check_key([f"Bearer {KEY}".encode()] * 2, digests)
