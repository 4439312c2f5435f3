"""The same gradients on four ranks: sharded over all of them, or over two with the head split over two."""

import pytest

from fsdp.dense import BOUND
from ranks import run_ranks


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("four"))
    return run_ranks("fsdp.gradient_ranks", "gradients", 4, timeout=500, folder=folder)


def test_every_way_holds_on_four_ranks(gradients):
    for rank in gradients:
        held = {name: value for name, value in rank.items() if not name.startswith("planted")}
        assert len(held) > 25
        assert {name: value for name, value in held.items() if max(value) > BOUND} == {}


def test_planted_errors_are_a_hundred_times_the_bound(gradients):
    for rank in gradients:
        planted = {name: value for name, value in rank.items() if name.startswith("planted")}
        assert planted and min(planted.values()) > 100 * BOUND, planted
