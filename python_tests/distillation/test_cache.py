"""The host cache: bytes as promised, freed with the last use, and the same rows back in any packing."""

import pytest
import torch

from distillation_toys import toy_batch
from opd_engine import TokenScores
from opd_engine.distillation import ScoreCache

K = 5


def scores_for(batch, seed=0, dtype=torch.float32, k=K, optional=True):
    generator = torch.Generator().manual_seed(seed)
    rows = batch.num_tokens

    def draw(*shape):
        return -torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.stack([torch.randperm(200_000, generator=generator)[:k] for _ in range(rows)])
    extra = {"lse": draw(rows), "entropy": draw(rows), "target_log_prob": draw(rows)} if optional else {}
    return TokenScores(indices=ids, log_probs=draw(rows, k), tail_log_prob=draw(rows), **extra)


def filled(batch, teachers=("a",), uses=1, **options):
    cache = ScoreCache(uses)
    given = {name: scores_for(batch, seed, **options) for seed, name in enumerate(teachers)}
    cache.put_support(batch, given[teachers[0]].indices)
    for name, scores in given.items():
        cache.put_scores(name, batch, scores)
    return cache, given


def test_bytes_are_k_times_8_plus_16_a_row_for_the_first_teacher():
    batch = toy_batch(6)
    rows = int(batch.loss_mask.sum())
    assert rows < batch.num_tokens  # prompts cost nothing
    assert filled(batch)[0].nbytes == rows * (8 * K + 16)
    assert filled(batch, ("a", "b", "c"))[0].nbytes == rows * (8 * K + 16 + 2 * (4 * K + 16))
    held = filled(batch)[0]
    tensors = [t for block in {**held._supports, **held._scores}.values() for t in block.tensors.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == held.nbytes  # nothing larger hides behind a view
    assert {t.dtype for t in tensors} == {torch.int32, torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_come_back_in_any_packing(dtype):
    batch = toy_batch(6)
    cache, given = filled(batch, ("a", "b"), dtype=dtype)
    for order in ([0, 1, 2, 3, 4, 5], [5, 1, 3], [2], [4, 5, 0, 1]):
        part = batch.select(order)
        sequence, bounds = batch.row_sequence(), batch.cu_seqlens.tolist()
        rows = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in order])
        mask = part.loss_mask
        back = cache.scores(part, ["b"] * len(order))
        assert torch.equal(cache.support(part)[mask], given["a"].indices[rows][mask])
        assert bool((cache.support(part)[~mask] == -1).all())
        for name in ("log_probs", "tail_log_prob", "lse", "entropy", "target_log_prob"):
            assert torch.equal(getattr(back, name)[mask], getattr(given["b"], name)[rows][mask]), name
        assert back.log_probs.dtype == dtype
        # Rows that do not count: no mass on the support, all of it in the tail.
        assert bool((back.log_probs[~mask] == -torch.inf).all()) and not bool(back.tail_log_prob[~mask].any())
        assert sequence.numel() == batch.num_tokens


def test_one_teacher_a_sequence_and_none():
    batch = toy_batch(3)
    cache, given = filled(batch, ("a", "b"))
    back = cache.scores(batch, ["a", None, "b"])
    sequence = batch.row_sequence()
    for number, name in ((0, "a"), (2, "b")):
        rows = batch.loss_mask & (sequence == number)
        assert torch.equal(back.log_probs[rows], given[name].log_probs[rows])
    assert not bool(back.tail_log_prob[sequence == 1].any())
    assert bool((back.log_probs[sequence == 1] == -torch.inf).all())


def test_what_a_teacher_does_not_give_stays_none_and_widths_may_differ():
    one, two = toy_batch(2), toy_batch(2, seed=4, sample_ids=[7, 8])
    cache, _ = filled(one, optional=False)
    assert cache.scores(one, ["a"] * 2).lse is None
    wide = scores_for(two, k=K + 2)
    cache.put_support(two, wide.indices)
    cache.put_scores("a", two, wide)
    from opd_engine.distillation import concat_rollouts

    both = concat_rollouts([one, two])
    back = cache.scores(both, ["a"] * 4)
    assert back.indices.shape == back.log_probs.shape == (both.num_tokens, K + 2)
    narrow = both.row_sequence() < 2
    assert bool((back.indices[narrow][:, K:] == -1).all()) and bool((back.log_probs[narrow][:, K:] == -torch.inf).all())
    assert back.entropy is None
    assert cache.scores(two, ["a"] * 2).entropy is not None


def test_freed_after_the_last_use_and_not_before():
    batch = toy_batch(4)
    cache, _ = filled(batch, ("a", "b"), uses=2)
    full = cache.nbytes
    assert cache.release(batch.select([0, 1])) == 0 and cache.nbytes == full
    assert cache.release(batch.select([2, 3])) == 0
    assert cache.release(batch.select([1])) == 0
    with pytest.raises(ValueError, match=r"sample 1: a support freed after 2 optimizer step\(s\)"):
        cache.support(batch)
    with pytest.raises(ValueError, match=r"sample 1: scores by teacher 'a' freed after 2"):
        cache.scores(batch, ["a"] * 4)
    assert torch.equal(cache.support(batch.select([0])), filled(batch)[0].support(batch.select([0])))
    # One scored micro-batch is one block: it goes with the last of its samples.
    assert cache.release(batch.select([0, 2])) == 0
    assert cache.release(batch.select([3])) == full and cache.nbytes == 0
    with pytest.raises(ValueError, match="sample 3: a support freed after 2"):
        cache.release(batch.select([3]))


def test_blocks_of_separate_micro_batches_are_freed_separately():
    batch = toy_batch(4)
    cache = ScoreCache()
    for micro in batch.micro_batches(max_seqs=1):
        scores = scores_for(micro)
        cache.put_support(micro, scores.indices)
        cache.put_scores("a", micro, scores)
    for micro in batch.micro_batches(max_seqs=1):
        assert cache.release(micro) == int(micro.loss_mask.sum()) * (8 * K + 16)
    assert cache.nbytes == 0


def test_refusals():
    batch = toy_batch(3)
    cache, _ = filled(batch)
    with pytest.raises(ValueError, match="uses: wanted at least 1, got 0"):
        ScoreCache(0)
    with pytest.raises(ValueError, match="sample 0: wanted scores by teacher 'z' in the cache, got none"):
        cache.scores(batch, ["z"] * 3)
    with pytest.raises(ValueError, match="sample 50: wanted a support in the cache, got none"):
        cache.support(toy_batch(1, sample_ids=[50]))
    changed = batch.select([0, 1, 2])
    changed.loss_mask = changed.loss_mask & (torch.arange(batch.num_tokens) != int(batch.loss_mask.nonzero()[0]))
    with pytest.raises(ValueError, match=r"loss_mask: sample 0 was scored with \d+ rows that count, now has"):
        cache.support(changed)
