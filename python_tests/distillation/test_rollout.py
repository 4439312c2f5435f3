"""RolloutBatch: rows aligned with the tokens they predict, at every boundary and through every repacking."""

import pytest
import torch

from distillation_toys import toy_batch
from opd_engine.distillation import RolloutBatch, concat_rollouts, pack_rollouts


def packed(**fields):
    return pack_rollouts(
        [[1, 2, 3], [4]],
        [[5, 6], [7, 8, 9]],
        response_masks=[[True, True], [True, False, True]],
        response_log_probs=[[-0.5, -0.6], [-0.7, -0.8, -0.9]],
        **fields,
    )


def test_pack_aligns_rows_with_the_tokens_they_predict():
    batch = packed(rewards=[1.0, 2.0], teacher_names=["a", "b"])
    assert batch.tokens.tolist() == [1, 2, 3, 5, 6, 4, 7, 8, 9]
    assert batch.cu_seqlens.tolist() == [0, 5, 9] and batch.cu_seqlens.dtype == torch.int32
    assert batch.next_tokens().tolist() == [2, 3, 5, 6, -1, 7, 8, 9, -1]
    assert batch.next_tokens()[batch.loss_mask].tolist() == [5, 6, 7, 9]
    assert batch.rollout_log_probs[batch.loss_mask].tolist() == pytest.approx([-0.5, -0.6, -0.7, -0.9])
    assert batch.row_sequence().tolist() == [0] * 5 + [1] * 4
    assert batch.row_positions().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.loss_row_counts().tolist() == [2, 2]
    assert batch.sample_ids.tolist() == [0, 1] and batch.rollout_ids.tolist() == [0, 1]


def test_a_mask_shifted_by_one_is_refused():
    """Token-aligned masks (a common convention elsewhere) count the last row of every sequence."""
    batch = packed()
    batch.loss_mask = batch.loss_mask.roll(1)
    with pytest.raises(ValueError, match=r"the last row of sequence 0 \(row 4\) counts"):
        batch.validate()


def test_select_and_micro_batches_keep_every_sequence_whole():
    batch = toy_batch(7, rewards=[float(i) for i in range(7)], teacher_names=[str(i) for i in range(7)])
    picked = batch.select([5, 0, 3])
    bounds = batch.cu_seqlens.tolist()
    for position, sequence in enumerate([5, 0, 3]):
        mine = slice(*picked.cu_seqlens[position : position + 2].tolist())
        theirs = slice(bounds[sequence], bounds[sequence + 1])
        for name in ("tokens", "loss_mask"):
            assert torch.equal(getattr(picked, name)[mine], getattr(batch, name)[theirs])
    assert picked.sample_ids.tolist() == [5, 0, 3] and picked.rewards.tolist() == [5.0, 0.0, 3.0]
    assert picked.teacher_names == ["5", "0", "3"]
    for limits in ({"max_tokens": 20}, {"max_seqs": 2}, {"max_tokens": 1}, {"max_tokens": 12, "max_seqs": 1}, {}):
        parts = batch.micro_batches(**limits)
        assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
        assert [s for part in parts for s in part.sample_ids.tolist()] == list(range(7))
        for part in parts:
            assert part.num_tokens <= limits.get("max_tokens", 10**6) or part.num_seqs == 1
            assert part.num_seqs <= limits.get("max_seqs", 10**6)
            part.validate()
    lengths, parts, room = batch.lengths(), 0, 0
    for length in lengths:  # filled up in order before the next one is begun
        parts, room = (parts, room - length) if length <= room else (parts + 1, 20 - length)
    assert len(batch.micro_batches(max_tokens=20)) == parts > 2
    assert batch.select([]).num_seqs == 0 and batch.select([]).micro_batches(max_tokens=4) == []
    with pytest.raises(ValueError, match=r"sequences: wanted indices in \[0, 7\), got 7"):
        batch.select([7])
    with pytest.raises(ValueError, match="max_tokens: wanted at least 1, got 0"):
        batch.micro_batches(max_tokens=0)


def test_concat_is_the_inverse_of_splitting():
    batch = toy_batch(5, rewards=[1.0] * 5)
    batch.teacher_weights = {"a": torch.rand(batch.num_tokens)}
    whole = concat_rollouts(batch.micro_batches(max_seqs=2))
    for name in ("tokens", "cu_seqlens", "loss_mask", "sample_ids", "rollout_ids", "rewards"):
        assert torch.equal(getattr(whole, name), getattr(batch, name)), name
    assert torch.equal(whole.teacher_weights["a"], batch.teacher_weights["a"])
    with pytest.raises(ValueError, match="sample_ids: wanted unique ids, 0 occurs more than once"):
        concat_rollouts([batch, batch])
    with pytest.raises(ValueError, match="rewards: present in 1 of 2 batches, wanted all or none"):
        concat_rollouts([batch, toy_batch(2)])
    with pytest.raises(ValueError, match=r"teacher_weights: wanted \['a'\] in every batch"):
        concat_rollouts([batch.select([0]), toy_batch(1, sample_ids=[9], rewards=[1.0])])
    batch.teacher_weights = None
    with pytest.raises(ValueError, match="rewards: present in 1 of 2 batches"):
        concat_rollouts([batch.select([0]), toy_batch(1, sample_ids=[9])])


def test_teacher_view_maps_rows_that_predict_the_same_token():
    batch = pack_rollouts(
        [[1, 2, 3], [4], [5]],
        [[6, 7, 8], [9, 10], []],
        response_masks=[[True, False, True], [True, True], []],
        teacher_prompts=[[30, 31], None, [40, 41, 42]],
    )
    view, rows = batch.teacher_view()
    view.validate()
    assert view.tokens.tolist() == [30, 31, 6, 7, 8, 4, 9, 10, 40, 41, 42]
    mapped = rows >= 0
    assert torch.equal(batch.loss_mask & mapped, batch.loss_mask)
    assert torch.equal(view.next_tokens()[rows[mapped]], batch.next_tokens()[mapped])
    assert int(view.loss_mask.sum()) == int(batch.loss_mask.sum())
    assert torch.equal(view.loss_mask[rows[batch.loss_mask]], torch.ones(4, dtype=torch.bool))


def test_wrong_fields_are_named():
    good = packed()

    def broken(**changes):
        fields = {name: getattr(good, name) for name in RolloutBatch.__dataclass_fields__}
        batch = RolloutBatch(**{**fields, **changes})
        batch.validate()

    cases = [
        ({"tokens": good.tokens.int()}, "tokens: wanted a one-dimensional torch.int64"),
        ({"tokens": good.tokens - 3}, "tokens: wanted ids >= 0, got -2"),
        ({"cu_seqlens": good.cu_seqlens.long()}, "cu_seqlens: wanted a one-dimensional torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 5, 8], dtype=torch.int32)}, "end with num_tokens=9, got 0 and 8"),
        ({"loss_mask": good.loss_mask.long()}, "loss_mask: wanted a one-dimensional torch.bool"),
        ({"loss_mask": good.loss_mask[:-1]}, "loss_mask: wanted num_tokens=9 entries, got 8"),
        ({"sample_ids": torch.tensor([3, 3])}, "sample_ids: wanted unique ids, 3 occurs"),
        ({"teacher_names": ["a"]}, "teacher_names: wanted 2 entries"),
        ({"rewards": torch.tensor([1.0, float("nan")])}, "rewards: wanted finite values, got nan for sequence 1"),
        ({"rewards": torch.tensor([1, 2])}, "rewards: wanted a one-dimensional floating-point"),
        ({"rollout_log_probs": torch.full((9,), 0.1)}, "rollout_log_probs: wanted log-probs <= 0"),
        ({"rollout_log_probs": torch.full((9,), float("nan"))}, "rollout_log_probs: wanted log-probs <= 0"),
        ({"teacher_weights": {"a": torch.ones(3)}}, r"teacher_weights\['a'\]: wanted shape \[2\]"),
        ({"teacher_prompts": [None, torch.tensor([])]}, r"teacher_prompts\[1\]: wanted a non-empty int64"),
        ({"cu_seqlens": torch.tensor([0, 0, 9], dtype=torch.int32)}, "sequence 0 has 0 tokens"),
    ]
    for changes, words in cases:
        with pytest.raises(ValueError, match=words):
            broken(**changes)
    broken()
    for arguments, words in [
        (([[]], [[1]]), r"prompts\[0\]: wanted at least one token"),
        (([[1]], [[1], [2]]), "responses: wanted 1 entries"),
    ]:
        with pytest.raises(ValueError, match=words):
            pack_rollouts(*arguments)
    with pytest.raises(ValueError, match=r"response_masks\[0\]: wanted 2 entries, one a response token, got 1"):
        pack_rollouts([[1]], [[1, 2]], response_masks=[[True]])


def test_moving_keeps_everything():
    batch = packed(rewards=[1.0, 2.0], teacher_prompts=[[1], None])
    batch.teacher_weights = {"a": torch.ones(2)}
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.rewards.is_meta and moved.teacher_weights["a"].is_meta
    assert moved.teacher_prompts[0].is_meta and moved.teacher_prompts[1] is None
