"""Records of emoji scenes: pictures and clips in files, questions about them with exact answers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

from pipelines.data.config import ScenesConfig
from pipelines.data.preparation.emoji.drawings import KINDS, Drawings, plural
from pipelines.data.preparation.emoji.scenes import FPS, Clip, Painter, Scene, varied, varied_clip
from pipelines.files import write_bytes, write_text
from pipelines.progress import RecordProgress

Split = Literal["train", "test", "unseen"]
SPLITS: tuple[Split, ...] = ("train", "test", "unseen")
"""`test`: new scenes by the artists of `train`. `unseen`: by an artist of whom `train` shows nothing."""
_compose: Callable[[Split, int], dict[str, Any]]
"""The record of a number, in a process that `_start` began."""


def write(folder: Path, scenes: ScenesConfig, seed: int) -> None:
    """Writes `train.jsonl`, `test.jsonl` and `unseen.jsonl` with their media into the folder, unless they are there.

    A scene depends on the seed, its split and its number only.

    Raises:
        ConfigError: what draws them is not installed or cannot be fetched.
    """
    settings = json.dumps({key: value for key, value in dataclasses.asdict(scenes).items() if key != "drawings"} | {"seed": seed})
    note = folder / "scenes.json"
    if note.is_file() and note.read_text() == settings and all((folder / f"{split}.jsonl").is_file() for split in SPLITS):
        return
    Drawings(Path(scenes.drawings))  # fetched once, before several processes want them
    counts = {split: scenes.train if split == "train" else scenes.test for split in SPLITS}
    context = multiprocessing.get_context("spawn")  # Ray's threads are not to be forked
    done, workers = 0, len(os.sched_getaffinity(0))
    with (
        RecordProgress("compose", sum(counts.values())) as progress,
        concurrent.futures.ProcessPoolExecutor(workers, context, _start, (scenes, folder, seed)) as pool,
    ):
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
            lines = []
            for line in pool.map(_line, itertools.repeat(split), range(counts[split]), chunksize=50):
                lines.append(line)
                done += 1
                if done % 50 == 0:
                    progress.update(done, split)
            write_text(folder / f"{split}.jsonl", "".join(lines))
    write_text(note, settings)


def _start(scenes: ScenesConfig, folder: Path, seed: int) -> None:
    """Of a process that composes."""
    global _compose
    painter = Painter(Drawings(Path(scenes.drawings)), scenes.size)
    _compose = functools.partial(_record, painter, seed, folder, scenes.clips)


def _line(split: Split, number: int) -> str:
    return json.dumps(_compose(split, number)) + "\n"


def _record(painter: Painter, seed: int, folder: Path, clips: float, split: Split, number: int) -> dict[str, Any]:
    rng, unseen = np.random.default_rng([seed, SPLITS.index(split), number]), split == "unseen"
    if rng.random() < clips:
        clip, path = painter.clip(rng, unseen), f"{split}/{number:06d}.mp4"
        clip = varied_clip(clip, rng) if split == "train" else clip
        write_bytes(folder / path, _mp4(clip.frames))
        return {"video": path, "message_list": [_about_clip(clip)]}
    scene, path = painter.scene(rng, unseen), f"{split}/{number:06d}.png"
    scene = varied(scene, rng) if split == "train" else scene
    buffer = io.BytesIO()
    Image.fromarray(scene.pixels).save(buffer, "png")
    write_bytes(folder / path, buffer.getvalue())
    return {"image": path, "message_list": about_scene(scene, rng), "metadata": {"artist": scene.things[0].artist}}


def about_scene(scene: Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Naming, counting, pointing and whether something is there, as annotations of a message tree."""
    kind, size = scene.things[0].kind, len(scene.pixels)
    points = [[round(100 * thing.x / size, 1), round(100 * thing.y / size, 1)] for thing in scene.things]
    other = kind if rng.random() < 0.5 else str(rng.choice([name for name in KINDS if name != kind]))
    return [
        {"style": "demo", "question": "What does the picture show?", "answer": kind, "type": "naming"},
        {"style": "demo", "question": f"How many {plural(kind)} are there?", "answer": str(len(points)), "type": "counting"},
        {
            "style": "pointing",
            "question": f"Point to the {plural(kind)}.",
            "label": plural(kind),
            "points": points,
            "point_scale": 100,
            "type": "pointing",
        },
        {"style": "demo", "question": f"Are there any {plural(other)}?", "answer": "yes" if other == kind else "no", "type": "yes_no"},
    ]


def _about_clip(clip: Clip) -> dict[str, Any]:
    if clip.event == "appear":
        question, answer = f"After how many seconds does the {clip.kind} appear?", str(clip.truth)
    else:
        question, answer = f"How many {plural(clip.kind)} cross the line?", str(clip.truth)
    return {"style": "demo", "question": question, "answer": answer, "type": clip.event}


def _mp4(frames: np.ndarray) -> bytes:
    """MPEG-4 part 2 at `FPS`, the same bytes every time, which libx264 does not give; frames: [t, h, w, 3] uint8, h and w even."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"qmin": "2", "qmax": "2", "flags": "+bitexact", "threads": "1"}
        stream = container.add_stream("mpeg4", rate=Fraction(FPS), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
