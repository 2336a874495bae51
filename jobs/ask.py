"""Ask a model one question about pictures or a video, without a server."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.command import job


def main(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint folder (own or published), hub repository, or models:/name@alias.")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    media: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE...", help="Pictures, or one video; none: the question alone.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0: the most probable answer; higher: more varied ones.", min=0, max=2)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a varied answer reproducible.", min=0)] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Of the weights (default: bfloat16 on a GPU, else float32).")
    ] = None,
) -> None:
    """Ask a model one question about pictures or a video. The answer appears as it is generated, and then its points in pixels.

    molmo ask runs/demo/model "what is the color of the shape?" IMAGE.png
    """
    import torch

    from pipelines.ask import Asker, media_of, points_in

    found = media_of(media or [])
    asker = Asker(model, getattr(torch, dtype) if dtype else None)
    answer = ""
    for piece in asker.ask(question, found, max_tokens, temperature, seed):
        print(piece, end="", flush=True)
        answer += piece
    print(flush=True)
    for point, (width, height) in points_in(answer, found):
        where = "" if point.block is None else f" at {point.block:g} s" if "video" in found else f" in image {point.block:g}"
        print(f"point{where}: x={point.x:.1f} y={point.y:.1f} of {width} x {height} pixels")


app = job(main)

if __name__ == "__main__":
    app()
