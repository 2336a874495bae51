"""Pointing by choosing and by spelling: tiny models learn easy-VQA's pointing tasks from nothing, on several seeds.

    python benchmarks/molmo_point.py prepare FOLDER          # 3 MB: pictures, records, tokenizers, configurations
    python benchmarks/molmo_point.py compare FOLDER          # trains and tests 3 variants on seeds 0, 1, 2: 9 processes at once
    python benchmarks/molmo_point.py run FOLDER --variant chosen --seed 0

| variant | network | answer to "Point to the circle." |
|---|---|---|
| `demo` | configs/models/demo.yaml, one look at the picture | `<point x="62" y="41" alt="circle">circle</point>` |
| `spelled` | Molmo2 with the network of `chosen` | `<points coords="1 1 618 406">circle</points>` |
| `chosen` | configs/models/demo-point.yaml (MolmoPoint) | `<points coords="[T][V][L]1[T]">circle</point>` |

All see the same records in the same order with the recipes configs/train/demo.yaml and demo-point.yaml, in one process without Ray. Of
the test's 1,000 pictures a point is right if it is the only one and within 1, 2 or 5 % of the width of the figure's centre. `possible` is
what the answers of the form can reach: the labels themselves, read back. Every line of output is one JSON object; `compare` ends with a
table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from molmo_core.config import read_yaml
from molmo_core.preprocessing.data_formatter import Formatter
from molmo_core.preprocessing.images import ImageFeatures, preprocess_image
from molmo_core.preprocessing.points import extract_points
from molmo_core.registry import BaseModelConfig, config_class
from pipelines.data.preparation import easy_vqa
from pipelines.training.build import build
from pipelines.training.config import TrainConfig
from pipelines.training.mesh import Mesh
from pipelines.training.optim import Optimizer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VARIANTS = {"demo": ("demo", False), "spelled": ("demo-point", True), "chosen": ("demo-point", True)}
"""Recipe, and whether records hold points as numbers."""
RADII = (0.01, 0.02, 0.05)
VOCABULARY = 512
ROWS = 250
"""Pictures that are asked about together."""
POINT_SETTINGS = ("model_name", "patch_embed_dim")


def prepare(folder: Path, limit: int | None) -> None:
    """Writes what the runs need, without paths of this machine."""
    from pipelines.data.preparation.train_tokenizer import train_tokenizer

    splits: tuple[easy_vqa.Split, ...] = ("train", "test")
    for split in splits:
        rows = easy_vqa.records(split, limit)
        (folder / split).mkdir(parents=True, exist_ok=True)
        for row in rows:
            source = Path(row["image"])
            row["image"] = f"{split}/{source.name}"
            shutil.copy(source, folder / row["image"])
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    for variant, (recipe, points) in VARIANTS.items():
        content = read_yaml(CONFIGS / "models" / f"{recipe}.yaml")
        if variant == "spelled":
            content = {k: v for k, v in content.items() if k not in POINT_SETTINGS} | {"model_name": "molmo2"}
            content["data_formatter"]["pointing_format"] = "html-v2"
        path = folder / variant / "model.yaml"
        path.parent.mkdir(exist_ok=True)
        config_class(content["model_name"], variant).from_dict(content).save(path)
        # The chosen variant has the tokenizer of the spelled one: the text around its points is the same.
        formatter = Formatter(BaseModelConfig.load(folder / "spelled/model.yaml" if variant == "chosen" else path).data_formatter)
        rng = np.random.RandomState(0)
        texts = [m for row in read(folder, "train", points) for a in formatter(row, rng) for m in a.messages]
        train_tokenizer(texts, VOCABULARY, folder / variant / "tokenizer")


def read(folder: Path, split: str, points: bool) -> list[dict[str, Any]]:
    """Pictures with their pointing tasks: `train` and `test` as published; for choices of settings `most`, nine of ten pictures of `train`,
    and `validation`, the others."""
    with gzip.open(folder / f"{'test' if split == 'test' else 'train'}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    if split in ("most", "validation"):
        rows = [row for row in rows if (int(Path(row["image"]).stem) % 10 == 0) == (split == "validation")]
    rows = list({row["image"]: row for row in rows}.values())
    for row in rows:
        row["message_list"] = [{key: value for key, value in row["message_list"][-1].items() if key != "weight"}]
    return [easy_vqa.with_points(row) for row in rows] if points else rows


class Examples:
    """Records as a model's inputs; every picture is cut once."""

    def __init__(self, folder: Path, split: str, points: bool, preprocessor: Any):
        self.records = read(folder, split, points)
        self.preprocessor = preprocessor
        settings = preprocessor.image_settings(1)
        names = {row["image"] for row in self.records}
        pictures = {name: np.asarray(Image.open(folder / name).convert("RGB")) for name in names}
        self.pictures: dict[str, ImageFeatures] = {name: preprocess_image(pixels, settings) for name, pixels in pictures.items()}

    def __call__(self, record: dict[str, Any], rng: np.random.RandomState | None = None) -> dict[str, Any]:
        return self.preprocessor({**record, "image": self.pictures[record["image"]]}, rng=rng)


def train(config: TrainConfig, examples: Examples, device: torch.device) -> Any:
    """The loop of `pipelines.training.loop`, bare: one process, no hooks."""
    model = build(config, device, Mesh())
    model.attention_implementation = "sdpa"  # tiny sequences: compiling FlexAttention would take longer than the run
    optimizer = Optimizer(model, config.optim)
    collate = config.model.build_collator(None, None, include_metadata=False)
    order: list[int] = []
    start = time.perf_counter()
    for step in range(1, config.steps + 1):
        rng = np.random.RandomState([config.seed, step])
        while len(order) < config.global_batch_size:
            order += np.random.RandomState([config.seed, 0, step]).permutation(len(examples.records)).tolist()
        chosen, order = order[: config.global_batch_size], order[config.global_batch_size :]
        batch = collate([examples(examples.records[i], rng) for i in chosen])
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        output = model(**batch, z_loss_weight=config.z_loss, return_logits=False)
        output.loss.backward()
        optimizer.set_learning_rates(step, config.steps)
        optimizer.step(torch.zeros((), dtype=torch.bool, device=device))
        optimizer.zero_grad()
        if step % 100 == 0 or step == config.steps:
            values = {name: round(float(value), 3) for name, value in output.metrics.items() if "loss" in name or "acc" in name}
            line = {
                "step": step,
                "seed": config.seed,
                "seconds": round(time.perf_counter() - start, 1),
                "loss": round(output.loss.item(), 3),
            }
            print(json.dumps(line | values), flush=True)
    return model.eval()


def pointing(model: Any, examples: Examples, limit: int | None) -> dict[str, float]:
    """Shares of the pictures on which the answer is one point within each radius, and its median distance, % of the width."""
    collate = model.config.build_collator(None, None)
    records = examples.records[:limit]
    distances = []
    tokens = 0
    for start in range(0, len(records), ROWS):
        part = records[start : start + ROWS]
        asked = [{k: v for k, v in row["message_list"][-1].items() if k not in ("answer", "points")} for row in part]
        batch = collate([examples({"image": row["image"], **task}) for row, task in zip(part, asked)])
        output = model.generate(**batch, max_new_tokens=40)
        tokens += int((output.token_ids >= 0).sum())
        distances += [distance(text, row["metadata"]["point"]) for text, row in zip(output.text, part, strict=True)]
    found = np.array(distances)
    shares = {f"within_{radius:.0%}": round(float((found <= radius).mean()), 4) for radius in RADII}
    return {
        "tested": len(records),
        **shares,
        "median_%": round(100 * float(np.median(found)), 2),
        "tokens": round(tokens / len(records), 1),
    }


def distance(text: str, truth: list[float]) -> float:
    """Of the only point of an answer to the truth (percent), shares of the width; infinite without one."""
    points = extract_points(text, 1, 1)
    if len(points) != 1:
        return float("inf")
    return float(np.hypot(points[0].x - truth[0] / 100, points[0].y - truth[1] / 100))


def possible(variant: str, examples: Examples, config: Any) -> dict[str, float]:
    """The same shares for the labels themselves."""
    found = []
    for row in examples.records:
        x, y = row["metadata"]["point"]
        if variant == "demo":
            text = row["message_list"][-1]["answer"]
        else:
            if variant == "chosen":
                places = config.point_places({"image_sizes": [(64, 64)]})
                _, x, y = places.point(*places.locate(0, x / 100, y / 100))
                x, y = 100 * x, 100 * y
            text = f'<points coords="1 1 {round(10 * x):03d} {round(10 * y):03d}">x</points>'
        found.append(distance(text, row["metadata"]["point"]))
    return {f"within_{radius:.0%}": round(float((np.array(found) <= radius).mean()), 4) for radius in RADII}


def run(folder: Path, variant: str, seed: int, overrides: list[str], device: torch.device, limit: int | None, tune: bool) -> None:
    recipe, points = VARIANTS[variant]
    home = folder / variant
    inner = [f"model={home / 'model.yaml'}", f"model.llm.tokenizer.identifier={home / 'tokenizer'}", f"seed={seed}", *overrides]
    config = TrainConfig.load(CONFIGS / "train" / f"{recipe}.yaml", inner)
    options = {"max_seq_len": config.sequence_length}
    splits = ("most", "validation") if tune else ("train", "test")
    examples = Examples(folder, splits[0], points, config.model.build_preprocessor(for_inference=False, is_training=True, **options))
    asked = Examples(folder, splits[1], points, config.model.build_preprocessor(for_inference=True))
    start = time.perf_counter()
    model = train(config, examples, device)
    trained = time.perf_counter()
    line = {
        "variant": variant, "seed": seed, "set": overrides, "steps": config.steps, "parameters": sum(p.numel() for p in model.parameters()),
        "train_s": round(trained - start, 1), **pointing(model, asked, limit), "test_s": round(time.perf_counter() - trained, 1),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    print(json.dumps({"variant": variant, "possible": possible(variant, asked, config.model)}), flush=True)


def compare(folder: Path, seeds: list[int], variants: list[str], options: list[str]) -> None:
    """One process a run, all at once; then a table of means and ranges."""
    command = [sys.executable, "-u", __file__, "run", str(folder), *options]
    running = [
        subprocess.Popen([*command, "--variant", variant, "--seed", str(seed)], stdout=subprocess.PIPE, text=True)
        for variant in variants
        for seed in seeds
    ]
    lines = []
    for process in running:
        output, _ = process.communicate()
        print(output, end="", flush=True)
        if process.returncode:
            raise SystemExit(process.returncode)
        lines += [json.loads(line) for line in output.splitlines()]
    names = [f"within_{radius:.0%}" for radius in RADII]
    print(f"| variant | parameters | {' | '.join(f'{name}, possible' for name in names)} | median distance | tokens of an answer |")
    print("|---" * (len(names) + 4) + "|")
    for variant in variants:
        rows = [line for line in lines if line.get("variant") == variant and "seed" in line]
        limits = next(line["possible"] for line in lines if line.get("variant") == variant and "possible" in line)
        cells = []
        for name in names:
            values = [row[name] for row in rows]
            cells.append(f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%}), {limits[name]:.1%}")
        medians = ", ".join(f"{row['median_%']:.1f}" for row in rows)
        print(f"| {variant} | {rows[0]['parameters']:,} | {' | '.join(cells)} | {medians} % | {rows[0]['tokens']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "compare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="chosen")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="so many pictures (prepare: of each split; otherwise: of the test)")
    parser.add_argument("--tune", action="store_true", help="keep off the test: train on nine of ten training pictures, test on the others")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe, such as steps=100")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.action == "prepare":
        prepare(args.folder, args.limit)
    elif args.action == "run":
        run(args.folder, args.variant, args.seed, args.set, torch.device(args.device), args.limit, args.tune)
    else:
        options = ["--device", args.device, "--threads", str(args.threads), *(["--limit", str(args.limit)] if args.limit else [])]
        compare(args.folder, args.seeds, args.variants, [*options, *(["--set", *args.set] if args.set else [])])


if __name__ == "__main__":
    main()
