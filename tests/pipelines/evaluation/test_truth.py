"""From the fields of a record to what its answer is compared with, and the metric that fits."""

import pytest

from molmo_core.metrics import Target, TruthMissing, metric, metric_for
from pipelines.evaluation.truth import complete, truth_of

SIZES = [(200, 100), (50, 50)]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ({"question": "q", "answers": ["a"] * 10}, "vqa_score"),
        ({"question": "q", "options": ["a", "b"], "answer_idx": 1}, "multiple_choice"),
        ({"label": "a", "count": 3}, "count"),
        ({"label": "a", "points": []}, "pointing"),
        ({"label": "a", "timestamps": [0], "tracks": [{"a": [1, 1]}]}, "tracking"),
        ({"style": "long_caption", "text": "A dog."}, "caption"),
    ],
)
def test_metric_of_a_record(task, name):
    assert metric_for(truth_of(task, task.get("answers", ["a"]), SIZES)) == name


def test_options_and_their_names():
    truth = truth_of({"options": ["x", 7], "answer_idx": 1, "truth": {"category": 3}}, ["7"], SIZES)
    assert (truth.options, truth.option, truth.option_names, truth.category) == (("x", "7"), 1, ("A", "B"), "3")
    assert truth_of({"options": ["x", "y"], "answer_idx": 0, "option_names": [1, 2]}, ["x"], SIZES).option_names == ("1", "2")
    assert truth_of({"unlabelled_options": ["x", "y"], "answer_idx": 0}, ["x"], SIZES).option_names == ()


def test_points_of_images_and_videos_in_pixels():
    image = truth_of({"points": [[0.5, 0.5]], "point_scale": 1}, ["1"], SIZES)
    assert (image.targets, image.count) == ([Target(100, 50)], 1)
    images = truth_of({"image_points": [[[50, 50]], [[50, 50], [0, 100]]], "point_scale": 100}, ["3"], SIZES)
    assert images.targets == [Target(100, 50, 1), Target(25, 25, 2), Target(0, 50, 2)]
    video = truth_of({"timestamps": [0.5, 2], "points": [[[20, 10]], []]}, ["1"], SIZES)
    assert video.targets == [Target(20, 10, 0.5)]
    tracks = truth_of({"timestamps": [0, 1], "tracks": [{"a": [20, 10], "b": None}, {"b": [40, 50]}]}, ["1"], SIZES).tracks
    assert tracks == [Target(20, 10, 0, object="a"), Target(40, 50, 1, object="b")]
    given = {"style": "video_single_point_track_per_frame", "timestamps": [0, 1], "tracks": [{"a": [20, 10]}, {"a": [40, 50]}]}
    assert truth_of(given, ["1"], SIZES).tracks == [Target(40, 50, 1, object="a")], "the question gives the first"


def test_boxes_masks_and_moments():
    boxes = truth_of({"truth": {"boxes": [[10, 20, 30, 40]]}}, [], SIZES).targets
    assert boxes == [Target(20, 30, box=(10, 20, 30, 40))]
    mask = [[0, 0], [0, 1]]
    (masked,) = truth_of({"points": [[5, 5]], "truth": {"masks": [mask]}}, ["1"], SIZES).targets
    assert (masked.x, masked.y, masked.mask.tolist()) == (5, 5, [[False, False], [False, True]])
    (middle,) = truth_of({"truth": {"masks": [mask]}}, [], SIZES).targets
    assert (middle.x, middle.y) == (1.5, 1.5)
    assert truth_of({"truth": {"spans": [[1, 2]]}}, [], SIZES).spans == [(1, 2)]
    with pytest.raises(ValueError, match=r"as many as each other, found \[1, 2\]"):
        truth_of({"points": [[1, 1], [2, 2]], "truth": {"boxes": [[0, 0, 1, 1]]}}, ["2"], SIZES)


def test_what_a_record_says_in_words():
    counted = complete(truth_of({}, ["a total of 3"], SIZES), metric("count"))
    assert counted.count == 3
    pointed = complete(truth_of({}, ['<point x="50.0" y="50.0" alt="a">a</point>'], SIZES), metric("pointing"))
    assert [(point.x, point.y) for point in pointed.targets] == [(100, 50)]
    assert complete(truth_of({}, ["some"], SIZES), metric("count")).count is None
    assert complete(truth_of({}, ["a dog", "a cat"], SIZES), metric("caption")).captions == ("a dog", "a cat")
    assert complete(truth_of({}, ["from 2 to 5 seconds"], SIZES), metric("temporal_iou")).spans == [(2, 5)]
    with pytest.raises(TruthMissing, match="spans"):
        metric("temporal_iou")("2 - 5", complete(truth_of({}, ["later"], SIZES), metric("temporal_iou")))
