"""Denominators of the global batch: any reduction, reward weights, ranks with unequal shares, or none at all."""

import math

import pytest
import torch

import oracles
from distillation_toys import toy_batch
from opd_engine.distillation import Denominators, MetricSums, OPDConfig, add_metrics
from opd_engine.distillation.config import REDUCTIONS

ROLLOUTS = [3, 3, 8, 9, 8, 3]


def weighted(batch, config, losses, stack=None):
    denominators = Denominators.of(batch, config, stack)
    return (denominators.of_rows(batch) * losses).sum(), denominators


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_means_are_the_definitions(reduction):
    batch = toy_batch(6, rollout_ids=ROLLOUTS)
    losses = torch.rand(batch.num_tokens, dtype=torch.float64)
    unit = {
        "token_mean": None,
        "sample_mean": batch.row_sequence(),
        "rollout_mean": batch.rollout_ids[batch.row_sequence()],
    }[reduction]
    truth = oracles.reduce_rows(losses, batch.loss_mask, unit)
    got, denominators = weighted(batch, OPDConfig(reduction=reduction), losses)
    assert got.item() == pytest.approx(truth.item(), rel=1e-14)
    assert (denominators.num_rows, denominators.num_samples) == (int(batch.loss_mask.sum()), 6)
    assert denominators.num_rollouts == 3
    assert not bool(denominators.of_rows(batch)[~batch.loss_mask].any())


def in_shares(batch, shares):
    """Each rank's share, and for each rank a stack function that acts out the collective with all of them."""
    parts = [batch.select(share) for share in shares]
    tables = []

    def build(rank):
        calls = iter(range(2))

        def stack(tensor):
            call = next(calls)
            tables[call][rank] = tensor
            return torch.stack([tables[call][r] for r in range(len(parts))])

        return stack

    tables.extend([[None] * len(parts), [None] * len(parts)])
    sizes = [part.num_seqs for part in parts]
    # What each rank would send is a function of its share alone; the first pass records it.
    for rank in range(len(parts)):
        sent = []

        def record(tensor, sent=sent):
            sent.append(tensor)
            if len(sent) == 1:
                return torch.tensor([[size] for size in sizes])
            raise StopIteration

        with pytest.raises(StopIteration):
            Denominators.of(parts[rank], in_shares.config, record)
        tables[0][rank], tables[1][rank] = sent
    return parts, [build(rank) for rank in range(len(parts))]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reward_beta", [None, 0.5])
def test_shares_of_ranks_add_up_to_the_whole(reduction, reward_beta):
    rewards = [0.1, -2.0, 0.7, 3.0, 0.0, 0.2]
    # Ids beyond 2**53 would collide if they travelled as floats.
    ids = [2**60 + i for i in range(6)]
    batch = toy_batch(6, rollout_ids=ROLLOUTS, rewards=rewards, sample_ids=ids)
    config = OPDConfig(reduction=reduction, reward_beta=reward_beta)
    losses = torch.rand(batch.num_tokens, dtype=torch.float64)
    truth, whole = weighted(batch, config, losses)
    in_shares.config = config
    sequence = batch.row_sequence()
    for shares in ([[0, 1, 2], [3, 4, 5]], [[4], [], [0, 5, 3, 1, 2]]):
        parts, stacks = in_shares(batch, shares)
        total = 0.0
        for part, stack, share in zip(parts, stacks, shares):
            own = torch.cat([losses[sequence == s] for s in share]) if share else losses[:0]
            value, denominators = weighted(part, config, own, stack)
            total += value.item()
            assert denominators.row_weights.keys() == whole.row_weights.keys()
            for sample, weight in whole.row_weights.items():
                assert denominators.row_weights[sample] == pytest.approx(weight, rel=1e-14)
        assert total == pytest.approx(truth.item(), rel=1e-13)


def test_reward_weights_are_a_softmax_over_the_global_batch():
    rewards = [0.1, -2.0, 0.7, 3.0, 0.0, 0.2]
    batch = toy_batch(6, rewards=rewards)
    config = OPDConfig(reduction="sample_mean", reward_beta=0.5)
    expected = torch.softmax(torch.tensor(rewards, dtype=torch.float64) / 0.5, 0) * 6
    denominators = Denominators.of(batch, config)
    counts = batch.loss_row_counts()
    for sample in range(6):
        weight = denominators.row_weights[sample] * int(counts[sample]) * 6
        assert weight == pytest.approx(expected[sample].item(), rel=1e-13)
    assert denominators.reward_weight_max == pytest.approx(expected.max().item())
    # A micro-batch of one keeps its weight; normalised inside it, the reward would cancel.
    alone = batch.select([1])
    assert denominators.of_rows(alone).sum().item() == pytest.approx(expected[1].item() / 6)
    assert Denominators.of(alone, config).of_rows(alone).sum().item() == pytest.approx(1.0)
    given = batch.select(range(6))
    given.sample_weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    assert Denominators.of(given, config).row_weights[1] == 0.0
    batch.rewards = None
    with pytest.raises(ValueError, match=r"reward_beta=0\.5: wanted rewards in the batch, got None"):
        Denominators.of(batch, config)


def test_samples_without_a_loss_row_change_nothing():
    batch = toy_batch(6, rollout_ids=ROLLOUTS, rewards=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    masked = batch.select(range(6))
    masked.loss_mask = batch.loss_mask & (batch.row_sequence() < 4)
    for reduction in REDUCTIONS:
        config = OPDConfig(reduction=reduction, reward_beta=2.0)
        kept = Denominators.of(batch.select(range(4)), config)
        assert Denominators.of(masked, config).row_weights == pytest.approx(kept.row_weights)
    nothing = batch.select(range(6))
    nothing.loss_mask = torch.zeros_like(batch.loss_mask)
    empty = Denominators.of(nothing, OPDConfig())
    assert empty.row_weights == {} and not bool(empty.of_rows(nothing).any())


def test_one_id_on_two_ranks_is_refused():
    batch = toy_batch(2)

    def stack(tensor):
        return torch.stack([tensor, tensor])

    with pytest.raises(ValueError, match="sample_ids: 0 occurs more than once in the global batch"):
        Denominators.of(batch, OPDConfig(), stack)


def test_metric_sums_add_up_and_divide_once():
    device = torch.device("cpu")
    one = MetricSums.of(
        {"rows": 3, "divergence": 6.0, "rows/a": 3, "finite_rows/a": 2, "divergence/a": 5.0}, ["a"], device
    )
    two = MetricSums.of({"rows": 5, "nan_rows": 1, "divergence": 2.0, "support_size": 8.0}, ["a"], device)
    both = add_metrics([one, two])
    means = both.means()
    assert means["rows"] == 8 and means["divergence"] == pytest.approx(8.0 / 7)
    assert means["support_size"] == pytest.approx(8.0 / 7) and means["divergence/a"] == 2.5
    assert both.summed(lambda values: values * 2).means()["divergence"] == pytest.approx(8.0 / 7)
    assert math.isnan(MetricSums.of({}, ["a"], device).means()["divergence"])
    with pytest.raises(ValueError, match="metrics: wanted the names"):
        one + MetricSums.of({}, ["b"], device)
    with pytest.raises(ValueError, match="parts: wanted the metrics of at least one"):
        add_metrics([])
    with pytest.raises(AssertionError, match="metrics without a place"):
        MetricSums.of({"new": 1.0}, [], device)
