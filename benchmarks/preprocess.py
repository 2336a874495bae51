"""Image preprocessing on one core, beside transformers' Molmo2ImageProcessor in the same run.

    .venv/bin/pip install --no-deps --target .venv-peers -r benchmarks/requirements-peers.txt     # once
    .venv/bin/python benchmarks/preprocess.py

Both get the same decoded image (random pixels, the hardest case for agreement) and make the same crops and pooling indices;
that the pixels agree within 1/255 is checked first. Runs alternate, on one core, one thread; medians are printed. transformers
returns normalised float32; this project returns uint8, because normalisation is left to the device. The column `+float32`
adds that normalisation on the host, for a comparison of like with like.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from peers import torchvision  # noqa: E402

from molmo_core.preprocessing.images import ImageSettings, preprocess_image  # noqa: E402

SIZES = ((480, 640), (768, 1024), (1080, 1920))
MOLMO2 = ImageSettings(
    crop_size=(378, 378), resize_mode="siglip", max_crops=8, use_single_crop_col_tokens=False, use_single_crop_start_token=True
)
OTHERS = {"CLIP, 12 crops": ImageSettings(), "DINOv2, 12 crops": ImageSettings(resize_mode="dino")}
MUST = 4.0


def peer() -> tuple[Callable[[np.ndarray], Any], str]:
    """transformers' processor and its version; it needs torchvision."""
    library = torchvision()
    import torch

    torch.set_num_threads(1)
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

    processor = Molmo2ImageProcessor()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "torch", "torchvision"))

    def run(image: np.ndarray, keep: Any = library) -> Any:
        return processor(image, return_tensors="np")

    return run, versions


def as_float(image: np.ndarray) -> np.ndarray:
    """This project's pixels, normalised on the host."""
    pixels = preprocess_image(image, MOLMO2).images.astype(np.float32)
    pixels *= np.float32(1 / 127.5)
    pixels -= 1
    return pixels


def medians(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each function, alternating: medians of wall and of CPU time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            measured = (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3
            if repeat >= 2:
                times[name].append(measured)
    return {name: (statistics.median(w for w, _ in t), statistics.median(c for _, c in t)) for name, t in times.items()}


def check(image: np.ndarray, theirs: Any) -> float:
    """Largest difference of the pixels, in 1/255; everything else must be equal."""
    ours = preprocess_image(image, MOLMO2)
    np.testing.assert_array_equal(ours.pooled_patches_idx, theirs["image_token_pooling"])
    np.testing.assert_array_equal(np.ravel(ours.grids), theirs["image_grids"][0])
    return float(np.abs(theirs["pixel_values"] * 127.5 + 127.5 - ours.images).max())


def machine() -> str:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("numpy", "opencv-python-headless", "pillow"))
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}; load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="measured runs of each function and size")
    repeats = parser.parse_args().repeats
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run, versions = peer()
    print(f"{machine()}; {versions}; one core; medians of {repeats}\n")
    rng = np.random.default_rng(0)
    print("| image | crops | transformers ms (CPU) | ours ms (CPU) | ratio (CPU) | +float32 ms | ratio | largest difference |")
    print("|---|---|---|---|---|---|---|---|")
    ratios = []
    for height, width in SIZES:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        difference = check(image, run(image))
        times = medians(
            {
                "theirs": partial(run, image),
                "ours": partial(preprocess_image, image, MOLMO2),
                "float": partial(as_float, image),
            },
            repeats,
        )
        (theirs, theirs_cpu), (ours, ours_cpu), (floats, _) = times["theirs"], times["ours"], times["float"]
        ratios.append(theirs / ours)
        crops = len(preprocess_image(image, MOLMO2).images)
        print(
            f"| {height} x {width} | {crops} | {theirs:.1f} ({theirs_cpu:.1f}) | {ours:.2f} ({ours_cpu:.2f}) | "
            f"**{theirs / ours:.1f}** ({theirs_cpu / ours_cpu:.1f}) | {floats:.2f} | {theirs / floats:.1f} | {difference:.2f}/255 |"
        )
        if difference > 1 + 1e-3:
            raise SystemExit(f"the pixels differ by {difference}/255")
    print(f"\nslowest ratio {min(ratios):.1f}, wanted at least {MUST:.0f}\n")
    print("| other encoders, CPU ms | " + " | ".join(f"{h} x {w}" for h, w in SIZES) + " |\n|---|" + "---|" * len(SIZES))
    for name, settings in OTHERS.items():
        row = []
        for height, width in SIZES:
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            row.append(medians({"": partial(preprocess_image, image, settings)}, max(repeats // 3, 3))[""][1])
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in row) + " |")
    if min(ratios) < MUST:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
