"""Mixtures of teachers on k + 1 buckets against the full-vocabulary definition in float64, value and gradient."""

import math

import pytest
import torch

import opd_engine
import oracles
from opd_engine import TokenScores, distill_loss, gather_log_probs
from opd_engine.teachers import mix_teachers

VOCAB, ROWS, K = 23, 7, 5


def make(members=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    student = (torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    teachers = [
        (torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 2).to(dtype) for _ in range(members)
    ]
    indices = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(ROWS)])
    indices[1, 2:] = -1
    indices[2] = -1
    target = torch.randint(VOCAB, (ROWS,), generator=generator)
    target[3] = indices[3, 0]
    return student, teachers, indices, target


def full_mixture(teachers, weights, mode):
    """log of the mixed distribution over the whole vocabulary; weights [M, ROWS]."""
    log_p = torch.stack([t.double().log_softmax(-1) for t in teachers])
    share = (weights / weights.sum(0)).double()[..., None]
    if mode == "arithmetic":
        return (share * log_p.exp()).sum(0).log()
    return (share * log_p).sum(0).log_softmax(-1)


def row_weights(kind):
    generator = torch.Generator().manual_seed(5)
    table = torch.rand(3, ROWS, generator=generator, dtype=torch.float64) + 0.05
    if kind == "run":
        table = table[:, :1].expand(3, ROWS)
        return [float(w) for w in table[:, 0]], table
    table[0, 4] = 0.0
    return table, table


def bucket_error(got, log_p, indices, target):
    """Largest difference between bucket scores and the buckets of a full distribution."""
    truth = oracles.gather_scores(log_p, indices, target)
    pairs = [(got.log_probs, truth.log_probs), (got.tail_log_prob, truth.tail_log_prob)]
    pairs += [(got.target_log_prob, truth.target_log_prob)]
    worst = 0.0
    for ours, theirs in pairs:
        assert torch.equal(ours.isneginf(), theirs.isneginf())
        finite = theirs.isfinite()
        worst = max(worst, float((ours[finite] - theirs[finite]).abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["run", "token"])
def test_arithmetic_mixture_is_the_bucketed_full_mixture(kind):
    _, teachers, indices, target = make()
    given, table = row_weights(kind)
    mixed = mix_teachers([gather_log_probs(t, indices, target=target) for t in teachers], given)
    assert bucket_error(mixed, full_mixture(teachers, table, "arithmetic"), indices, target) < 1e-13
    assert mixed.lse is None and mixed.entropy is None
    # Controls: weights not divided by their sum differ, and so does the other mean.
    unnormalised = full_mixture(teachers, table, "arithmetic") + table.sum(0).log()[:, None]
    log_p = oracles.gather_scores(full_mixture(teachers, table, "arithmetic"), indices).log_probs
    assert float((log_p - unnormalised.gather(1, indices.clamp(min=0)))[0].abs().max()) > 1e-3
    assert bucket_error(mixed, full_mixture(teachers, table, "geometric"), indices, target) > 1e-2


@pytest.mark.parametrize("divergence", oracles.DIVERGENCES)
@pytest.mark.parametrize("mode", ["arithmetic", "geometric"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_loss_on_a_mixture_and_its_gradient(divergence, mode, tail):
    student, teachers, indices, _ = make()
    given, table = row_weights("token")
    mixed = mix_teachers([gather_log_probs(t, indices) for t in teachers], given, mode=mode)
    loss = distill_loss(gather_log_probs(student, indices), mixed, divergence=divergence, tail=tail)
    upstream = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)
    (grad,) = torch.autograd.grad((loss * upstream).sum(), student)
    if mode == "arithmetic":  # from the full vocabulary
        teacher = oracles.gather_scores(full_mixture(teachers, table, mode), indices)
    else:  # geometric is defined on the buckets
        teacher = oracles.mix([oracles.gather_scores(t, indices) for t in teachers], table, mode)
    truth = oracles.distill(oracles.gather_scores(student, indices), teacher, divergence, tail=tail)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, oracles.gradient(truth, student, upstream), rtol=1e-11, atol=1e-13)


def test_geometric_mixture_sums_to_one_over_its_buckets():
    _, teachers, indices, _ = make()
    mixed = mix_teachers([gather_log_probs(t, indices) for t in teachers], [1.0, 2.0, 0.5], mode="geometric")
    mass = mixed.log_probs.exp().sum(1) + mixed.tail_log_prob.exp()
    torch.testing.assert_close(mass, torch.ones(ROWS, dtype=torch.float64), rtol=1e-13, atol=0)
    assert mixed.target_log_prob is None
    unnormalised = sum(w * gather_log_probs(t, indices).tail_log_prob for w, t in zip([2 / 7, 4 / 7, 1 / 7], teachers))
    assert float((mixed.tail_log_prob - unnormalised)[0].abs()) > 1e-3


@pytest.mark.parametrize("mode", ["arithmetic", "geometric"])
@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
def test_zero_weight_drops_its_member_whatever_it_holds(mode, poison):
    _, teachers, indices, target = make()
    clean = [gather_log_probs(t, indices, target=target) for t in teachers]
    bad = [gather_log_probs(torch.full_like(t, poison), indices, target=target) for t in teachers[:1]] + clean[1:]
    bad[0].log_probs.fill_(poison)
    bad[0].tail_log_prob.fill_(poison)
    expected = mix_teachers(clean[1:], [0.3, 0.9], mode=mode)
    got = mix_teachers(bad, [0.0, 0.3, 0.9], mode=mode)
    assert torch.equal(got.log_probs, expected.log_probs) and torch.equal(got.tail_log_prob, expected.tail_log_prob)
    if mode == "arithmetic":
        assert torch.equal(got.target_log_prob, expected.target_log_prob)
    # Per row: dropped in row 0 alone, so that row alone is clean when the member is NaN.
    weights = torch.tensor([0.5, 0.3, 0.9], dtype=torch.float64)[:, None].repeat(1, ROWS)
    weights[0, 0] = 0
    got = mix_teachers(bad, weights, mode=mode)
    assert torch.equal(got.log_probs[0], expected.log_probs[0])
    if math.isnan(poison):
        assert got.tail_log_prob[1:].isnan().all()


def test_a_member_without_mass_on_an_id():
    indices = torch.tensor([[0, 1, -1]])
    one = TokenScores(
        indices=indices, log_probs=torch.tensor([[0.6, 0.4, 0.0]]).log(), tail_log_prob=torch.tensor([-math.inf])
    )
    two = TokenScores(
        indices=indices, log_probs=torch.tensor([[0.0, 0.5, 0.0]]).log(), tail_log_prob=torch.tensor([0.5]).log()
    )
    arithmetic = mix_teachers([one, two], [1, 1])
    torch.testing.assert_close(arithmetic.log_probs.exp(), torch.tensor([[0.3, 0.45, 0.0]]))
    torch.testing.assert_close(arithmetic.tail_log_prob.exp(), torch.tensor([0.25]))
    geometric = mix_teachers([one, two], [1, 1], mode="geometric")
    torch.testing.assert_close(geometric.log_probs.exp(), torch.tensor([[0.0, 1.0, 0.0]]))
    assert geometric.tail_log_prob.item() == -math.inf
    assert arithmetic.log_probs[0, 2] == -math.inf and geometric.log_probs[0, 2] == -math.inf


def test_float32_members_keep_far_tails():
    """Log-probs near -80 would vanish as probabilities in float32; they mix as logs."""
    indices = torch.tensor([[4]])
    members = [
        TokenScores(indices=indices, log_probs=torch.tensor([[-85.0 - m]]), tail_log_prob=torch.tensor([-120.0 - m]))
        for m in range(2)
    ]
    mixed = mix_teachers(members, [1.0, 1.0])
    expected = torch.logsumexp(torch.tensor([[-85.0, -86.0], [-120.0, -121.0]], dtype=torch.float64), 1) - math.log(2)
    assert mixed.log_probs.dtype == torch.float32
    assert abs(mixed.log_probs.item() - expected[0].item()) < 1e-5
    assert abs(mixed.tail_log_prob.item() - expected[1].item()) < 1e-5


def test_shapes_leading_and_empty():
    _, teachers, indices, _ = make()
    flat = mix_teachers([gather_log_probs(t, indices) for t in teachers], [1, 2, 3])
    shaped = mix_teachers(
        [gather_log_probs(t.view(1, ROWS, VOCAB), indices.view(1, ROWS, K)) for t in teachers], [1, 2, 3]
    )
    assert shaped.log_probs.shape == (1, ROWS, K) and torch.equal(shaped.log_probs[0], flat.log_probs)
    by_row = torch.tensor([1.0, 2, 3])[:, None].repeat(1, ROWS)
    again = mix_teachers([gather_log_probs(t.view(1, ROWS, VOCAB), indices.view(1, ROWS, K)) for t in teachers], by_row)
    assert torch.equal(again.log_probs[0], flat.log_probs)
    empty = mix_teachers([gather_log_probs(t[:0], indices[:0]) for t in teachers], [1, 2, 3])
    assert empty.log_probs.shape == (0, K)
    empty = mix_teachers([gather_log_probs(t[:0], indices[:0]) for t in teachers], torch.zeros(3, 0))
    assert empty.tail_log_prob.shape == (0,)


def test_a_row_without_any_weight_is_nan_alone():
    _, teachers, indices, _ = make()
    weights = torch.ones(3, ROWS)
    weights[:, 4] = 0
    for mode in ("arithmetic", "geometric"):
        mixed = mix_teachers([gather_log_probs(t, indices) for t in teachers], weights, mode=mode)
        assert mixed.tail_log_prob.isnan().tolist() == [row == 4 for row in range(ROWS)]


@pytest.mark.parametrize(
    ("weights", "mode", "words"),
    [
        ([1.0], "arithmetic", "weights: wanted \\[3\\]"),
        ([1.0, -1.0, 1.0], "arithmetic", "weights: wanted finite values >= 0"),
        ([1.0, math.nan, 1.0], "arithmetic", "weights: wanted finite"),
        ([0.0, 0.0, 0.0], "geometric", "weights: wanted at least one above zero"),
        (torch.ones(3, 2), "arithmetic", "weights: wanted \\[3\\] or \\[3, 7\\]"),
        ([1.0, 1.0, 1.0], "mean", "mode: wanted one of arithmetic, geometric, got 'mean'"),
    ],
)
def test_wrong_arguments_are_named(weights, mode, words):
    _, teachers, indices, _ = make()
    with pytest.raises(ValueError, match=words):
        mix_teachers([gather_log_probs(t, indices) for t in teachers], weights, mode=mode)


def test_wrong_members_are_named():
    student, teachers, indices, _ = make()
    scores = [gather_log_probs(t, indices) for t in teachers]
    with pytest.raises(ValueError, match="scores: wanted at least one"):
        mix_teachers([], [])
    with pytest.raises(ValueError, match=r"scores\[1\]: wanted log_probs"):
        mix_teachers([scores[0], gather_log_probs(teachers[1], indices[:, :3])], [1, 1])
    with pytest.raises(ValueError, match=r"scores\[0\]: a teacher must not require grad"):
        mix_teachers([gather_log_probs(student, indices)], [1])
    other = gather_log_probs(teachers[1], indices.flip(1))
    for debug in (False, True):
        with opd_engine.debug(debug), pytest.raises(ValueError, match=r"scores\[1\]: wanted the ids of scores\[0\]"):
            mix_teachers([scores[0], other], [1, 1])
