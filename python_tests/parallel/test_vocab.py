"""VocabShard: bounds come from the caller, nothing is derived from a rank, and shards that do not tile are named."""

import dataclasses

import pytest

from opd_engine import VocabShard
from opd_engine.parallel.vocab import find_tiling_fault


class FakeGroup:
    """Construction looks at the size alone."""

    def __init__(self, size, rank=0):
        self._size, self._rank = size, rank

    def size(self):
        return self._size

    def rank(self):
        return self._rank


def test_the_signature_is_positional_and_the_shard_is_a_constant():
    shard = VocabShard(0, 12, 10)
    assert (shard.vocab_start_index, shard.vocab_end_index, shard.vocab_size, shard.tp_group) == (0, 12, 10, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shard.vocab_size = 11


@pytest.mark.parametrize(
    ("bounds", "local", "valid"),
    [
        ((0, 4, 10), 4, 4),
        ((4, 12, 10), 8, 6),  # the end is padding
        ((10, 12, 10), 2, 0),  # all padding
        ((12, 12, 10), 0, 0),  # nothing, behind the end
        ((4, 4, 10), 0, 0),  # nothing, in the middle
    ],
)
def test_widths_of_a_shard(bounds, local, valid):
    shard = VocabShard(*bounds, FakeGroup(3, 2))
    assert (shard.local_vocab_size, shard.valid_local_size) == (local, valid)
    assert (shard.tp_size, shard.tp_rank) == (3, 2)
    assert shard.merge_group is shard.tp_group


def test_alone_there_is_nobody_to_merge_with():
    assert VocabShard(0, 10, 10).merge_group is None
    assert VocabShard(0, 10, 10, FakeGroup(1)).merge_group is None
    VocabShard(0, 10, 10).check_tiling()


@pytest.mark.parametrize(
    ("bounds", "group", "message"),
    [
        ((-1, 4, 10), 2, "vocab_start_index: wanted >= 0, got -1"),
        ((4, 3, 10), 2, "vocab_end_index: wanted >= vocab_start_index = 4"),
        ((0, 4, 0), 2, "vocab_size: wanted >= 1, got 0"),
        ((0, 4.0, 10), 2, "vocab_end_index: wanted an int, got 4.0"),
        ((False, 4, 10), 2, "vocab_start_index: wanted an int, got False"),
        ((0, 9, 10), None, r"tp_group=None wanted one that covers \[0, vocab_size = 10\), got \[0, 9\)"),
        ((1, 10, 10), None, r"got \[1, 10\)"),
        ((0, 9, 10), 1, "a tp_group of one rank wanted one that covers"),
    ],
)
def test_impossible_bounds_are_named(bounds, group, message):
    with pytest.raises(ValueError, match=message):
        VocabShard(*bounds, None if group is None else FakeGroup(group))


@pytest.mark.parametrize(
    "bounds",
    [
        [(0, 10, 10)],
        [(0, 3, 10), (3, 12, 10)],  # uneven, padded
        [(3, 12, 10), (0, 3, 10)],  # any rank may hold any shard
        [(0, 3, 10), (3, 3, 10), (3, 10, 10)],  # zero width between
        [(7, 7, 10), (0, 10, 10)],  # zero width anywhere
        [(0, 10, 10), (10, 16, 10), (16, 20, 10)],  # two shards of padding
    ],
)
def test_what_tiles(bounds):
    assert find_tiling_fault(bounds) is None


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([(0, 3, 10), (4, 10, 10)], "a gap at id 3"),
        ([(0, 5, 10), (4, 10, 10)], "an overlap at id 4"),
        ([(0, 10, 10), (0, 10, 10)], "an overlap at id 0"),
        ([(1, 5, 10), (5, 10, 10)], "a gap at id 0"),
        ([(0, 5, 10), (5, 9, 10)], "got an end at 9"),
        ([(0, 0, 10), (0, 0, 10)], "got an end at 0"),
        ([(0, 5, 10), (5, 10, 9)], r"vocab_size: wanted the same .* got \[10, 9\]"),
    ],
)
def test_what_does_not_tile_is_named_with_every_rank(bounds, message):
    import re

    fault = find_tiling_fault(bounds)
    assert fault is not None
    assert re.search(message, fault), fault
    assert "vocab_size:" in fault or all(f"rank {rank}" in fault for rank in range(len(bounds)))
