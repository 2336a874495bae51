"""MolmoPoint's inputs against the published ones: sequences, labels of points, packs, and points at real sizes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molmo_core.model_configs.molmo_point import MolmoPointConfig
from molmo_core.preprocessing.images import preprocess_image
from molmo_core.preprocessing.packing import pack, unpack
from molmo_core.preprocessing.point_places import PointPlaces, points_of
from molmo_core.preprocessing.tiling import ImageSettings
from molmo_core.preprocessing.videos import VideoFeatures
from molmo_core.tokens import NO_MORE_POINTS

SETS = ("a", "c")
TIMES = np.array([0.0, 0.5, 1.0])
ASK = "Point to {}\nPlease say 'There are none.' if it is not in the image."


def load(golden: Path, name: str) -> MolmoPointConfig:
    return MolmoPointConfig.load(golden / "molmo-point" / name / "config.yaml", ["data_formatter.debug=false"])


def frames(config: MolmoPointConfig, pixels: np.ndarray) -> VideoFeatures:
    """A video as its stored frames."""
    patches = [preprocess_image(frame, config.image_settings()).images[:1] for frame in pixels]
    return VideoFeatures(np.concatenate(patches), None, TIMES, None, (pixels.shape[2], pixels.shape[1]))


def shares(rows: np.ndarray, places: PointPlaces) -> list[list[tuple[float, float]]]:
    """Points of each image or frame that are chosen as `rows` say."""
    blocks: list[list[tuple[float, float]]] = [[] for _ in places.grids]
    for block, x, y in filter(None, points_of(rows, places)):
        blocks[block].insert(0, (x, y))  # against the order in which they will be
    return blocks


def examples(folder: Path, config: MolmoPointConfig) -> dict[str, list[dict[str, Any]]]:
    """The examples of the golden batches; their points are read back from the published labels."""
    images, preprocessor = np.load(folder / "images.npz"), config.build_preprocessor(for_inference=False, is_training=False)
    targets = {k.split("/")[0]: v for k, v in load_file(folder / "batch.safetensors").items() if k.endswith("point_target_ids")}
    single, several = preprocessor._settings_of(1, np.random), preprocessor._settings_of(2, np.random)  # type: ignore[arg-type]

    def size(i: int) -> tuple[int, int]:
        return images[f"image{i}"].shape[1], images[f"image{i}"].shape[0]

    def of_image(rows: torch.Tensor, i: int) -> list[tuple[float, float]]:
        return shares(rows.numpy(), preprocessor.image_places([size(i)], single))[0]  # type: ignore[arg-type]

    def record(label: str, points: list[tuple[float, float]], question: str | None = None, **fields: Any) -> dict[str, Any]:
        asked = {"style": "pointing", "label": label, "question": question or ASK.format(label)}
        return {**asked, "points": points, "point_scale": 1, **fields}

    image = targets["image"]
    ends = int(config.no_more_points_class)
    cups = {"image": images["image0"], **record("cups", of_image(image[0, : 5 + ends], 0))}
    cats, dogs = of_image(image[1, : 1 + ends], 1), of_image(image[1, 1 + ends : 3 + 2 * ends], 1)
    tree = {
        "image": images["image1"],
        "message_list": [record("dogs", dogs, "How many dogs are there?", style="point_count"), record("cats", cats), record("bus", [])],
    }
    video, places = targets["video"], preprocessor.frame_places(TIMES)
    assert places is not None
    birds = shares(video[0].numpy(), places)
    rows = [r for r in video[1].tolist() if 0 <= r[0] < NO_MORE_POINTS]
    ids = [1, 2, 2, 2, 1]
    tracks: list[dict[str, Any]] = [{"b": None, "a": None} for _ in TIMES]
    for row, number in zip(rows, ids):
        block, x, y = places.point(*row)  # type: ignore[misc]
        tracks[block]["ab"[number - 1]] = (x, y)
    counted = {
        "video": frames(config, images["video"]),
        "label": "birds",
        "question": "How many birds are there?",
        "style": "video_point_count",
        "point_scale": 1,
        "timestamps": TIMES.tolist(),
        "points": birds,
    }
    tracked = {
        "video": frames(config, images["video"]),
        "style": "video_point_track_per_frame",
        "label": "bird",
        "question": "Track bird.",
        "point_scale": 1,
        "timestamps": TIMES.tolist(),
        "tracks": tracks,
    }
    cars = shares(targets["multi"][0].numpy(), preprocessor.image_places([size(2), size(3)], several))  # type: ignore[arg-type]
    both = {
        "images": [images["image2"], images["image3"]],
        "style": "multi_image_pointing",
        "label": "cars",
        "question": ASK.format("cars"),
        "image_points": cars,
        "point_scale": 1,
    }
    plain = {"image": images["image2"], "style": "user_qa", "question": "How many cups are on the table?", "answer": "3"}
    hi = {"style": "text_sft", "question": "Say hi.", "answer": "hi there"}
    every = {
        "image": [cups, tree],
        "mixed": [cups, plain],
        "video": [counted, tracked],
        "multi": [both],
        "packed": [cups, hi, counted, tree],
    }
    return {case: [preprocessor(e, np.random.RandomState(7)) for e in records] for case, records in every.items()}


@pytest.mark.parametrize("name", SETS)
def test_training_sequences_and_labels_of_points(golden: Path, name: str) -> None:
    folder, config = golden / "molmo-point" / name, load(golden, name)
    reference = load_file(folder / "batch.safetensors")
    collate = config.build_collator(None, None, include_metadata=False)
    for case, rows in examples(folder, config).items():
        batch = collate([pack(rows)] if case == "packed" else rows)
        published = {k.split("/")[1]: v for k, v in reference.items() if k.startswith(f"{case}/")}
        published["pooled_patches_idx"] = published.pop("token_pooling")
        published.pop("image_pos_ids")  # made by the model here
        assert published.keys() == batch.keys(), case
        for key, value in published.items():
            if key == "images":
                assert (batch[key].int() - value.int()).abs().max() <= 1, case
            elif key == "loss_masks":  # padding weighs -1 there
                torch.testing.assert_close(batch[key], value.clamp(min=0), rtol=1e-6, atol=0)
            elif key == "subsegment_ids" and case == "image":  # the row without a tree is all 1 there, all 0 here
                assert torch.equal(batch[key][1], value[1]), case
            else:
                assert torch.equal(batch[key], value), (case, key)


@pytest.mark.parametrize("name", SETS)
def test_prompts(golden: Path, name: str) -> None:
    folder, config = golden / "molmo-point" / name, load(golden, name)
    images, reference = np.load(folder / "images.npz"), load_file(folder / "prompt.safetensors")
    preprocessor = config.build_preprocessor(for_inference=True)
    prompts = {
        "image_prompt": {"image": images["image0"], "style": "pointing", "question": ASK.format("cups"), "label": "Cups"},
        "video_prompt": {"video": frames(config, images["video"]), "style": "video_point", "question": "birds"},
        # Its style is "demo", which has a prefix there and none here.
        "multi_prompt": {"images": [images["image2"], images["image3"]], "style": "demo", "question": "demo: cars"},
    }
    for case, record in prompts.items():
        prompt = preprocessor(record)
        assert prompt["input_ids"].tolist() == reference[f"{case}/input_ids"][0].tolist(), case
        assert prompt["pooled_patches_idx"].tolist() == reference[f"{case}/token_pooling"][0].tolist(), case
        assert "point_target_ids" not in prompt


@pytest.mark.parametrize("name", SETS)
def test_a_pack_gives_its_examples_back(golden: Path, name: str) -> None:
    config = load(golden, name)
    rows = examples(golden / "molmo-point" / name, config)["packed"]
    for before, after in zip(rows, unpack(pack(rows)), strict=True):
        assert before.keys() == after.keys()
        for key in before.keys() - {"metadata"}:
            np.testing.assert_array_equal(before[key], after[key])


def test_points_at_real_sizes(golden: Path) -> None:
    """Points to tokens, patches and cells, and back to pixels; 378-pixel crops, images and videos of many sizes."""
    cases = json.loads((golden / "molmo-point" / "a" / "point_mapping.json").read_text())
    settings = ImageSettings(
        crop_size=(378, 378),
        resize_mode="siglip",
        max_crops=8,
        low_tokens_global_crop=True,
        use_single_crop_col_tokens=False,
        use_single_crop_start_token=True,
    )

    def check(places: PointPlaces, case: Any, blocks: list[int], sizes: list[tuple[int, int]]) -> None:
        points = [p[-2:] for p in case["points"]]
        for i, (block, (x, y), triple) in enumerate(zip(blocks, points, case["ids"], strict=True)):
            width, height = sizes[block]
            assert list(places.locate(block, x / width, y / height)) == triple
            for name, cell in (("back", triple[2]), ("back_no_location", None)):
                found = places.point(*triple[:2], cell)
                assert found is not None
                if name in case:
                    np.testing.assert_allclose([found[1] * width, found[2] * height], case[name][i][-2:], rtol=1e-9)

    for case in cases["image"]:
        size = (case["w"], case["h"])
        places = PointPlaces.of_images([size], dataclasses.replace(settings, max_crops=case["max_crops"]))
        assert len(places.pooled_idx) == case["n_pool"]
        assert list(places.grids[0].shape) == case["mapping_shape"]
        check(places, case, [0] * len(case["points"]), [size])
    for case in cases["video"]:
        frames = PointPlaces.of_frames(case["timestamps"], settings, (3, 3))
        blocks = [frames.frame_at(t) for t in case["times"]]
        assert [case["timestamps"][b] for b in blocks] == [b[0] for b in case["back"]]
        check(frames, case, blocks, [(case["w"], case["h"])] * len(case["timestamps"]))
    for case in cases["multi"]:
        sizes = [(w, h) for h, w in case["sizes"]]
        places = PointPlaces.of_images(sizes, dataclasses.replace(settings, max_crops=case["max_crops"]))
        assert len(places.pooled_idx) == sum(case["n_pool"])
        check(places, case, [int(p[0]) for p in case["points"]], sizes)
        assert sorted(case["ids"]) == case["sorted_ids"]
