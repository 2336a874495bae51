"""How many actors decode for a rank: the machine's cores are used, and there is always one."""

from __future__ import annotations

import pytest

from pipelines.data.batches.stream import actor_share


@pytest.mark.parametrize(
    ("cpus", "ranks", "actors", "expected"),
    [
        (2, 1, None, 1),
        (3, 2, None, 1),
        (16, 1, None, 15),
        (16, 4, None, 3),
        (128, 1, None, 127),
        (128, 8, None, 15),
        (16, 16, None, 1),
        (16, 1, 4, 4),
        (2, 1, 6, 6),
    ],
)
def test_actors_of_a_rank(cpus, ranks, actors, expected):
    count, each = actor_share(cpus, ranks, actors)
    assert count == expected
    assert 2 * ranks * count * each <= cpus - ranks, "the pipelines of training and validation fit beside the ranks"
    assert each == 0.5 or cpus - ranks < ranks * count or cpus == ranks
