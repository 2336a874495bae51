import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.preprocessing.points import (
    Point,
    answer_text,
    complete_tags,
    extract_points,
    format_html,
    format_tracks,
    format_v1,
    percent,
)

coordinates = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=12)


def test_v1_text():
    points = percent([[70.0, 5.25], [10.5, 20.1], [33.33, 66.6]], 100, None)
    assert format_v1(points, "dogs") == '<points x1="10.5" y1="20.1" x2="33.3" y2="66.6" x3="70.0" y3="5.2" alt="dogs">dogs</points>'
    assert format_v1(points[:1], "cat", alt="a cat") == '<point x="70.0" y="5.2" alt="a cat">cat</point>'
    assert format_v1(np.zeros((0, 2)), "dogs") == "There are none."


def test_html_text():
    first, second = np.array([[78.9, 1.2], [12.3, 45.6]]), np.array([[50.0, 50.0]])
    assert format_html([(1, first)], "dogs", "html-v2") == '<points coords="1 1 123 456 2 789 012">dogs</points>'
    assert format_html([(1, first), (2, second)], "dogs", "html-v2") == '<points coords="1 1 123 456 2 789 012;2 3 500 500">dogs</points>'
    assert (
        format_html([(2.5, second), (3.0, first)], "x", "html-v1") == '<points coords="2.5 1 500 500\t3.0 2 123 456 3 789 012">x</points>'
    )
    assert format_html([(1, np.zeros((0, 2))), (2, second)], "x", "html-v2") == '<points coords="2 1 500 500">x</points>'
    assert format_html([(1, second)], "x", "html-v2", alt="y") == '<points alt="y" coords="1 1 500 500">x</points>'
    assert format_html([(1, np.array([[100.0, 0.0]]))], "x", "html-v2") == '<points coords="1 1 1000 000">x</points>'
    assert format_html([(1, np.zeros((0, 2)))], "x", "html-v2") == "There are none."


def test_tracks_are_renumbered_by_appearance_and_skip_hidden_objects():
    frames = [
        (0.0, {"b": (60.0, 10.0), "a": (20.0, 10.0), "late": None}),
        (0.5, {"b": None, "late": (5.0, 5.0), "a": (21.0, 10.0)}),
        (1.0, {"a": None}),
        (1.5, {"late": (6.0, 5.0), "b": (61.0, 10.0)}),
    ]
    expected = '<tracks coords="0.0 1 200 100 2 600 100;0.5 1 210 100 3 050 050;1.5 2 610 100 3 060 050">dogs</tracks>'
    assert format_tracks(frames, "dogs", "html-v2") == expected
    assert format_tracks([(0.0, {"a": None})], "dogs", "html-v2") == "No tracks available."
    assert extract_points(expected, 1000, 1000)[3] == Point(50.0, 50.0, block=0.5, id=3)


@pytest.mark.parametrize(
    ("mode", "count", "expected"),
    [
        ("point", 2, "TAG"),
        ("point_then_count", 2, "Counting the TAG shows a total of 2."),
        ("count_then_point", 2, "There are 2 TAG."),
        ("count", 2, "2"),
        ("count", 0, "0"),
        ("point_then_count", 0, "TAG"),
    ],
)
def test_sentences(mode, count, expected):
    assert answer_text("TAG", count, mode) == expected


def test_scales():
    assert percent([[20, 30]], None, (80, 60)).tolist() == [[25.0, 50.0]]
    assert percent([[0.25, 0.5]], 1, None).tolist() == [[25.0, 50.0]]
    assert percent([], None, None).shape == (0, 2)


def test_points_outside_the_image():
    # Each axis and each side on its own: the published Molmo2 code tested only x properly.
    assert percent([[-3, 50], [103, 50], [50, -3], [50, 103]], 100, None).tolist() == [[0, 50], [100, 50], [50, 0], [50, 100]]
    for bad in ([-20, 50], [120, 50], [50, -20], [50, 120], [float("nan"), 1]):
        with pytest.raises(ValueError, match=r"outside the image.*check point_scale=100"):
            percent([[50, 50], bad], 100, None)
    with pytest.raises(ValueError, match="need an image"):
        percent([[1, 2]], None, None)
    with pytest.raises(ValueError, match="pairs"):
        percent([[1, 2, 3]], 100, None)


@given(coordinates)
def test_v1_survives_the_round_trip(points):
    array = np.array(points)
    found = [(p.x, p.y) for p in extract_points(format_v1(array, "thing"), 100, 100)]
    np.testing.assert_allclose(sorted(found), sorted((round(x, 1), round(y, 1)) for x, y in points), atol=1e-9)


@given(st.lists(coordinates, min_size=1, max_size=4), st.sampled_from(["html-v1", "html-v2"]), st.booleans())
def test_html_survives_the_round_trip(blocks, version, video):
    keyed = [((i * 0.5 if video else i), np.array(points)) for i, points in enumerate(blocks, 1)]
    found = extract_points(format_html(keyed, "a thing", version), 1000, 1000)
    expected = [(key, round(x * 10), round(y * 10)) for key, points in keyed for x, y in points]
    assert sorted((p.block, round(p.x), round(p.y)) for p in found) == sorted(expected)
    assert [p.id for p in found] == list(range(1, len(expected) + 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('They are <point x="10.5" y="20" alt="a">a</point> and <point x="30" y="40" alt="b">b</point>.', [(21, 20), (60, 40)]),
        ('<points x1="10" y1="20" x2="30" y2="4', [(20, 20), (60, 4)]),  # cut off by the token limit
        ('<points coords="1 1 123 456 2 789 01', [(24.6, 45.6)]),
        ("It is at (50.0, 25).", [(100, 25)]),
        ("click p=500,250", [(100, 25)]),
        ('<point x="120" y="20" alt="a">a</point>', []),
        ("There are none.", []),
        ("", []),
    ],
)
def test_extraction(text, expected):
    np.testing.assert_allclose([(p.x, p.y) for p in extract_points(text, 200, 100)], expected)


def test_complete_tags():
    """Closed ones alone, with their labels; those that are not opened rightly have no points."""
    text = (
        'A <point x="61.5" y="40.6" alt="a > b">cat</point>, <points x1="1" y1="2" x2="3" y2="4" alt="two"></points> '
        'and <points coords="2 1 123 456">dog</points><tracks coords="0.5 1 100 200;1.0 1 300 400">car</tracks> '
        '<point x="9" y="9" alt="x</point> <points coords="1 1 001 002">cut'
    )
    tags = list(complete_tags(text))
    assert [tag.label for tag in tags] == ["cat", "two", "dog", "car", None]
    assert [[(p.x, p.y, p.block) for p in tag.points] for tag in tags] == [
        [(0.615, 0.406, None)],
        [(0.01, 0.02, None), (0.03, 0.04, None)],
        [(0.123, 0.456, 2.0)],
        [(0.1, 0.2, 0.5), (0.3, 0.4, 1.0)],
        [],
    ]
    assert text[tags[0].end :].startswith(", <points")
