import re

import numpy as np
import pytest

from molmo_core.preprocessing.prompts import TEMPLATES, fill, without_pointing

NEEDS = {
    "pointing": {"label"}, "point_count": {"label"}, "count_then_point": {"label"}, "count": {"label"}, "pointing_multi_image": {"label"},
    "pointing_one_of_images": {"label", "image"}, "video_pointing": {"label"}, "tracking": {"label"}, "tracking_a_point": {"point"},
    "explanation": {"question"}, "multiple_choice": {"question", "options"}, "no_pointing": {"question"},
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_hold_exactly_what_their_kind_needs(kind):
    for template in TEMPLATES[kind]:
        assert set(re.findall(r"\{(\w+)\}", template)) == NEEDS.get(kind, set()), template
    assert len(set(TEMPLATES[kind])) == len(TEMPLATES[kind])


def test_every_template_is_drawn_and_the_first_is_used_otherwise():
    rng = np.random.RandomState(0)
    drawn = {fill("pointing", rng, True, label="dogs") for _ in range(400)}
    assert drawn == {t.replace("{label}", "dogs") for t in TEMPLATES["pointing"]}
    assert {fill("pointing", rng, False, label="dogs") for _ in range(20)} == {"Point to dogs"}


def test_values_are_put_in_literally():
    assert fill("multiple_choice", np.random.RandomState(0), False, question="What is {options}?", options="A. x").startswith("What is ")
    assert fill("pointing", np.random.RandomState(0), False, label=r"\1 {x}") == r"Point to \1 {x}"


def test_how_many_questions_are_told_not_to_point():
    rng = np.random.RandomState(0)
    assert without_pointing("What is this?", rng) == "What is this?"
    asked = {without_pointing("How many cups?", rng) for _ in range(100)}
    assert len(asked) == len(TEMPLATES["no_pointing"])
    assert all("How many cups?" in a for a in asked)
