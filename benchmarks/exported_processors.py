"""transformers' processor, read from an export of Molmo2, beside this project's preprocessor: the same ids and pixels.

    .venv/bin/pip install --no-deps --target .venv-peers -r benchmarks/requirements-peers.txt     # once
    .venv/bin/python benchmarks/exported_processors.py [EXPORT]

Without an argument it writes the files of an export (no weights; they are not needed) of Molmo2-4B, with the tokenizer of the tests,
to a temporary folder. AutoProcessor, AutoImageProcessor, AutoVideoProcessor, AutoTokenizer and the chat template come from
the folder alone, offline and without remote code. One JSON line a prompt; the script fails if ids or pooling indices differ
at all, or pixels by more than 1/255.

A video is given to transformers as the frames that this project samples: its own processor samples others than the released one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import decord
import numpy as np
from peers import torchvision
from PIL import Image

from molmo_core.checkpoint.folder import Published
from molmo_core.checkpoint.published_config import read_published_config
from molmo_core.checkpoint.published_export import write_published_files
from molmo_core.models.molmo2 import Molmo2Config

ROOT = Path(__file__).resolve().parents[1]
VIDEO = ROOT / "tests/golden/video-olmo/video.mp4"
SIZES = {"small": (90, 140), "page": (1200, 850), "strip": (130, 1600), "photo": (1080, 1920)}


def written(folder: Path) -> Path:
    """The files of an export, without weights."""
    llm = [f"llm.tokenizer.identifier={ROOT / 'tests/golden/tokenizer'}", "llm.vocab_size=406", "llm.embedding_size=448"]
    config = Molmo2Config.load(ROOT / "configs/models/molmo2-4b.yaml", llm)
    write_published_files(folder, config, "molmo2", config.build_tokenizer(), "bfloat16")
    return folder


def chat(texts: list[str], media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation for `apply_chat_template`; the media belong to the first turn."""
    turns = [{"role": "assistant" if i % 2 else "user", "content": [{"type": "text", "text": text}]} for i, text in enumerate(texts)]
    turns[0]["content"] = [*media, *turns[0]["content"]]
    return turns


def frames_of(times: list[float]) -> tuple[np.ndarray, dict[str, Any]]:
    """The frames uint8 [T, H, W, 3] of the test video at these times, and what transformers wants to know of them."""
    reader = decord.VideoReader(str(VIDEO))
    fps = reader.get_avg_fps()
    indices = [round(time * fps) for time in times]
    metadata = {"total_num_frames": len(reader), "fps": fps, "duration": len(reader) / fps, "frames_indices": indices}
    return reader.get_batch(indices).asnumpy(), metadata


def compared(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """One line of the result."""
    result: dict[str, Any] = {"prompt": name, "tokens": len(ours["input_ids"])}
    result["ids_equal"] = theirs["input_ids"][0].tolist() == ours["input_ids"].tolist()
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in theirs:
            result["crops"] = len(ours["images"])
            result["pooling_equal"] = np.array_equal(theirs[f"{kind}_token_pooling"].numpy(), ours["pooled_patches_idx"])
            difference = np.abs(theirs[pixels].numpy() - (ours["images"].astype(np.float32) / 127.5 - 1))
            result["largest_difference_in_255ths"] = round(float(difference.max()) * 127.5, 3)
    result["agrees"] = result["ids_equal"] and result.get("pooling_equal", True) and result.get("largest_difference_in_255ths", 0) < 1.001
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, nargs="?", help="A folder that jobs.export wrote.")
    arguments = parser.parse_args()
    keep = torchvision()
    import torch
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, AutoVideoProcessor

    torch.set_num_threads(1)
    random = np.random.RandomState(0)
    pictures = {name: Image.fromarray(random.randint(0, 256, (*size, 3), np.uint8)) for name, size in SIZES.items()}
    texts = ["How many dogs are there?", "Three.", "And cats?"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.export or written(Path(temporary))
        preprocessor = Molmo2Config.from_dict(read_published_config(Published.read(folder))).build_preprocessor(for_inference=True)
        processor = AutoProcessor.from_pretrained(folder)
        parts = [auto.from_pretrained(folder) for auto in (AutoImageProcessor, AutoVideoProcessor, AutoTokenizer)]
        print(
            json.dumps({"folder": str(arguments.export or "files of molmo2-4b"), "read": [type(p).__name__ for p in (processor, *parts)]})
        )
        results = []
        cases: dict[str, tuple[list[str], list[Image.Image]]] = {"text": (texts[:1], []), "text, three turns": (texts, [])}
        cases |= {f"image, {name}": (texts[:1], [picture]) for name, picture in pictures.items()}
        cases |= {"image, three turns": (texts, [pictures["small"]]), "four images": (texts[:1], list(pictures.values()))}
        for name, (turns, images) in cases.items():
            messages = chat(turns, [{"type": "image", "image": image} for image in images])
            theirs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            results.append(compared(name, preprocessor({"messages": turns, **({"images": images} if images else {})}), theirs))
        ours = preprocessor({"video": VIDEO, "messages": texts[:1]})
        frames, metadata = frames_of(list(ours["metadata"]["frame_times"]))
        prompt = processor.apply_chat_template(chat(texts[:1], [{"type": "video"}]), add_generation_prompt=True, tokenize=False)
        theirs = processor(text=prompt, videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
        results.append(compared("video", ours, theirs))
    del keep
    for result in results:
        print(json.dumps(result))
    if not all(result["agrees"] for result in results):
        raise SystemExit("transformers' processor and ours differ")


if __name__ == "__main__":
    main()
