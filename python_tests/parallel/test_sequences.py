"""Packed sequences under context parallelism: every row has one owner, and predicts the token after it.

The reference is written per sequence with Python lists; lengths are chosen so that chunks end inside, at and beyond
the sequences (1, exactly 2 x cp, one more, an empty one).
"""

import itertools

import pytest
import torch

from opd_engine.parallel.sequences import (
    ContextLayout,
    local_loss_mask,
    local_targets,
    next_token_rows,
    reassemble,
    sequence_of_rows,
    take_rows,
)

LENGTHS = [(5, 1, 8, 9), (4,), (3, 0, 7), (1,), (16, 2), ()]
LAYOUTS = [("zigzag", 1), ("zigzag", 2), ("zigzag", 3), ("allgather", 1), ("allgather", 2), ("allgather", 4)]


def packed(lengths):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tokens = torch.arange(100, 100 + sum(lengths))
    return cu_seqlens, tokens


def predictions(lengths):
    """(token, its next token or -1) per row, from lists."""
    cu_seqlens, tokens = packed(lengths)
    wanted = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        sequence = tokens[start:end].tolist()
        wanted += [*sequence[1:], -1][: len(sequence)]
    return wanted


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_row_predicts_the_next_token_of_its_own_sequence(lengths):
    cu_seqlens, tokens = packed(lengths)
    rows = next_token_rows(cu_seqlens)
    assert [int(tokens[row]) if row >= 0 else -1 for row in rows.tolist()] == predictions(lengths)
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert sequence_of_rows(cu_seqlens).tolist() == owners


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("layout", "cp_size"), LAYOUTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_row_has_one_owner_and_keeps_its_target(lengths, layout, cp_size, multiple):
    cu_seqlens, tokens = packed(lengths)
    rows = [ContextLayout(layout, cp_size, rank, multiple).owned_rows(cu_seqlens) for rank in range(cp_size)]
    assert len({len(owned) for owned in rows}) == 1, "collectives need equal lengths"
    assert len(rows[0]) % multiple == 0
    owned = torch.cat(rows)
    assert sorted(owned[owned >= 0].tolist()) == list(range(len(tokens)))

    targets = [local_targets(tokens, cu_seqlens, rank_rows) for rank_rows in rows]
    assert reassemble(targets, rows, len(tokens)).tolist() == predictions(lengths)
    for rank_rows, rank_targets in zip(rows, targets, strict=True):
        assert (rank_targets[rank_rows < 0] == -1).all()

    mask = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)) < 0.7
    counted = [local_loss_mask(mask, cu_seqlens, rank_rows) for rank_rows in rows]
    wanted = [bool(keep) and token >= 0 for keep, token in zip(mask, predictions(lengths), strict=True)]
    assert sum(int(part.sum()) for part in counted) == sum(wanted)
    assert reassemble(counted, rows, len(tokens)).tolist() == wanted


def test_zigzag_gives_a_rank_an_early_and_a_late_chunk():
    cu_seqlens = torch.tensor([0, 7, 15])  # 7 is padded to 8: chunks of 2 under cp_size 2
    assert ContextLayout("zigzag", 2, 0).owned_rows(cu_seqlens).tolist() == [0, 1, 6, -1, 7, 8, 13, 14]
    assert ContextLayout("zigzag", 2, 1).owned_rows(cu_seqlens).tolist() == [2, 3, 4, 5, 9, 10, 11, 12]


def test_allgather_cuts_the_packed_stream_where_it_likes():
    cu_seqlens = torch.tensor([0, 7, 15])
    assert ContextLayout("allgather", 2, 1).owned_rows(cu_seqlens).tolist() == [8, 9, 10, 11, 12, 13, 14, -1]


def test_the_target_at_a_chunk_edge_lives_on_another_rank():
    tokens, cu_seqlens = torch.arange(100, 108), torch.tensor([0, 8])
    rows = ContextLayout("zigzag", 2, 0).owned_rows(cu_seqlens)
    assert rows.tolist() == [0, 1, 6, 7]
    assert local_targets(tokens, cu_seqlens, rows).tolist() == [101, 102, 107, -1]
    shifted_locally = [*tokens[rows][1:].tolist(), -1]  # the planted mistake
    assert local_targets(tokens, cu_seqlens, rows).tolist() != shifted_locally


def test_gradients_return_to_the_packed_rows():
    cu_seqlens, tokens = packed((5, 8))
    values = torch.randn(len(tokens), 3, dtype=torch.float64, requires_grad=True)
    rows = [ContextLayout("zigzag", 2, rank).owned_rows(cu_seqlens) for rank in range(2)]
    whole = reassemble([take_rows(values, owned, fill=float("nan")) for owned in rows], rows, len(tokens))
    torch.testing.assert_close(whole, values, rtol=0, atol=0)
    weights = torch.randn(len(tokens), 3, dtype=torch.float64)
    (whole * weights).sum().backward()
    torch.testing.assert_close(values.grad, weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([1, 4]), "wanted a first entry of 0, got 1"),
        (torch.tensor([0, 4, 3]), "never fall, got 4 then 3 at 2"),
        (torch.tensor([0.0, 4.0]), "wanted int32 or int64, got torch.float32"),
        (torch.tensor([[0, 4]]), r"wanted a tensor \[num_seqs \+ 1\], got \(1, 2\)"),
        ([0, 4], "got list"),
        (torch.tensor([], dtype=torch.int32), r"got \(0,\)"),
    ],
)
def test_boundaries_that_are_none(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        next_token_rows(cu_seqlens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ring", 2, 0), "layout: wanted one of zigzag, allgather, got 'ring'"),
        (("zigzag", 0, 0), "cp_size: wanted >= 1, got 0"),
        (("zigzag", 2, 2), "cp_rank: wanted 0 <= cp_rank < cp_size = 2, got 2"),
        (("zigzag", 2, 0, 0), "pad_multiple: wanted >= 1, got 0"),
    ],
)
def test_layouts_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContextLayout(*arguments)


def test_tokens_that_do_not_fit_the_boundaries():
    rows = ContextLayout("zigzag", 2, 0).owned_rows(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="wanted a last entry of num_tokens = 5, got 4"):
        local_targets(torch.arange(5), torch.tensor([0, 4]), rows)


def test_a_row_without_owner_is_named():
    rows = [torch.tensor([0, 1]), torch.tensor([1, 3])]
    with pytest.raises(ValueError, match="exactly one rank, got row 1 otherwise"):
        reassemble([torch.zeros(2), torch.zeros(2)], rows, 4)
