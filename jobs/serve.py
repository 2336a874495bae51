"""Serves a model behind an OpenAI-style HTTP API until it is stopped."""

from __future__ import annotations

import contextlib
import signal
import threading
import webbrowser
from collections.abc import Iterator
from typing import Annotated

import typer

from jobs.command import OptionalConfig, Overrides, file_and_changes, job
from molmo_core.config import overridden
from pipelines.serving.config import ServeConfig

EXAMPLE = """\
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "{name}", "messages": [{{"role": "user", "content": [
    {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,'$(base64 -w0 IMAGE.png)'"}}}},
    {{"type": "text", "text": "what is the color of the shape?"}}]}}]}}'"""


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination signal sets, in place of an exception in the middle of something."""
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def serve(config: ServeConfig, show: bool = False) -> None:
    """Serves until Ctrl-C or SIGTERM; answers in work are finished first. `show`: opens the page in the default browser."""
    from pipelines.model_folder import fixed_model
    from pipelines.serving.keys import key_digests
    from pipelines.serving.port import check_port

    check_port(config.host, config.port)  # before a cluster starts for nothing
    key_digests(config)
    for one in config.each:
        fixed_model(one.model)
    # Only now what takes seconds to import: mistakes are shown at once.
    from pipelines import cluster
    from pipelines.serving.app import serving

    print(f"Loading {', '.join(one.model for one in config.each)} ...", flush=True)
    with cluster.connect(num_cpus=cluster.cpus_for(config.cpus)), serving(config) as url:
        with stop_requested() as stop:
            names = ", ".join(one.served_name for one in config.each)
            print(f"Ready: {names} at {url}/v1 (Ctrl-C stops it), and a page to try it on at {url}/. For example:\n")
            print(EXAMPLE.format(url=url, name=config.each[0].served_name) + "\n", flush=True)
            if show and not webbrowser.open(f"{url}/"):
                print(f"There is no browser to open here; the page is {url}/", flush=True)
            while not stop.wait(1.0):
                pass
        print("Stopping ...", flush=True)
    print("Stopped.", flush=True)


def read_settings(config: str | None, overrides: list[str] | None) -> ServeConfig:
    """The settings of a command line: of a file, or of overrides alone."""
    file, changes = file_and_changes(config, overrides)
    return ServeConfig.load(file, changes) if file is not None else ServeConfig.from_dict(overridden({}, changes), source="command line")


def main(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page to try the model on in the default browser.")] = False,
) -> None:
    """Serves a registered model or a checkpoint folder behind an OpenAI-style API, until Ctrl-C.

    One setting is enough: `molmo serve model=CHECKPOINT`.
    """
    serve(read_settings(config, overrides), show)


app = job(main, ServeConfig)

if __name__ == "__main__":
    app()
