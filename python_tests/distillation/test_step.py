"""One step against a slow float64 definition, value and gradient; and everything that must not change it, or must.

The reference builds supports with Python lists, distributions with log_softmax, and loops over the rows that count.
"""

import math

import pytest
import torch

from distillation.step_reference import SPECS, VOCAB, WIDTHS, agree, ours, parameters_grad, reference, world
from distillation_toys import ToyBackend, pad_sequences, toy_batch
from opd_engine import gather_log_probs
from opd_engine.distillation import (
    Denominators,
    OPDConfig,
    distillation_loss,
    pack_rollouts,
    score_rollouts,
)
from opd_engine.distillation.config import MIXTURES, REDUCTIONS, SUPPORTS
from opd_engine.teachers import LocalTeacher, TeacherPool


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_value_and_gradient_are_the_definitions(support, mixture):
    batch, student, pool = world(mixture=mixture)
    cap = {"union": 6, "teacher": 5 if mixture != "route" else None}.get(support)
    # forward_kl stays finite where the narrow teacher has no mass.
    config = OPDConfig(
        k=4, support=support, mixture=mixture, divergence="forward_kl", union_cap=cap, temperature=1.2, coefficient=0.7
    )
    truth = reference(batch, student, pool, config)
    got = ours(batch, student, pool, config)
    assert agree(got, truth)
    if cap:
        assert got[2]["union_dropped"] > 0
    assert got[2]["rows"] == int(batch.loss_mask.sum()) and got[2]["nan_rows"] == got[2]["infinite_rows"] == 0
    # Controls: another coefficient and another mixture are seen.
    config.coefficient = 0.707
    assert not agree(ours(batch, student, pool, config), truth)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_forward_kl"])
def test_every_reduction_of_every_kind_of_divergence(reduction, divergence):
    batch, student, pool = world()
    batch.teacher_names = ["a", "b", "a", "b", "b", "a"]  # reverse_kl is infinite where teacher c has no mass
    config = OPDConfig(k=4, reduction=reduction, divergence=divergence, beta=0.3)
    truth = reference(batch, student, pool, config)
    assert agree(ours(batch, student, pool, config), truth)
    other = REDUCTIONS[(REDUCTIONS.index(reduction) + 1) % 3]
    config.reduction = other
    assert not agree(ours(batch, student, pool, config), truth)


def splits(batch):
    yield "one sequence each", batch.micro_batches(max_seqs=1)
    yield "two sequences each", batch.micro_batches(max_seqs=2)
    yield "by tokens", batch.micro_batches(max_tokens=17)
    yield "another order", batch.select([4, 2, 0, 5, 1, 3]).micro_batches(max_seqs=4)
    yield "with a micro-batch that has no loss row", [batch, batch.select([])]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mixture", ["route", "arithmetic"])
def test_nothing_changes_with_the_split(reduction, mixture):
    rewards = [0.3, -1.0, 2.0, 0.0, 0.5, 1.0]
    batch, student, pool = world(mixture=mixture, rewards=rewards)
    config = OPDConfig(k=4, reduction=reduction, mixture=mixture, divergence="forward_kl", reward_beta=0.8)
    loss, grad, means = ours(batch, student, pool, config)
    for name, parts in splits(batch):
        again = ours(batch, student, pool, config, parts)
        assert agree(again, (loss, grad), 1e-13), name
        for key, value in means.items():
            assert again[2][key] == pytest.approx(value, rel=1e-12, nan_ok=True), (name, key)
    # Control: denominators of each micro-batch instead of the global batch do change it.
    scored = score_rollouts(batch, student, pool, config)
    planted = 0.0
    parts = batch.micro_batches(max_seqs=2)
    for micro in parts:
        own = Denominators.of(micro, config)
        planted += distillation_loss(student.logits(micro), micro, scored, config, None, own)[0].item() / len(parts)
    assert abs(planted - loss) > 1e-3


class TwoPasses:
    """A teacher that cannot score ids which depend on its own top-k in one forward."""

    def __init__(self, inner):
        self.backend, self.vocab_size = inner.backend, inner.vocab_size
        self.score, self.topk, self.token_to_id = inner.score, inner.topk, inner.token_to_id


def test_union_with_one_teacher_takes_one_forward_of_it():
    batch, student, pool = world()
    config = OPDConfig(k=4, support="union", union_cap=6, divergence="forward_kl")
    truth = ours(batch, student, pool, config)
    lengths = dict(zip(batch.teacher_names, [0] * 6))
    for name, length in zip(batch.teacher_names, batch.lengths()):
        lengths[name] += length
    assert {name: sum(pool[name].backend.forward_rows) for name in pool.names} == lengths
    plain = TeacherPool([(spec, TwoPasses(pool[spec.name])) for spec in SPECS])
    assert agree(ours(batch, student, plain, config), truth[:2], 1e-15)
    assert {name: sum(pool[name].backend.forward_rows) for name in pool.names} == {n: 3 * v for n, v in lengths.items()}


def test_nothing_changes_with_padding_or_scoring_size():
    batch, student, pool = world()
    config = OPDConfig(k=4, support="union", divergence="forward_kl")
    truth = ours(batch, student, pool, config)
    assert agree(ours(pad_sequences(batch, 16), student, pool, config), truth[:2], 1e-13)
    for tokens in (1, 20):
        config.score_batch_tokens = tokens
        assert agree(ours(batch, student, pool, config), truth[:2], 1e-13)


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("what", ["student", "teacher", "support"])
def test_one_row_off_is_seen_at_every_boundary(what, shift):
    """Shifted by one, every sequence but the first row's neighbours reads another sequence's row somewhere."""
    batch, student, pool = world()
    config = OPDConfig(k=4, divergence="forward_kl", support="rollout" if what == "support" else "student")
    truth = reference(batch, student, pool, config)
    planted_student, planted_batch = student, batch
    if what == "student":
        planted_student = ToyBackend(VOCAB, seed=1, padding=3)
        model = planted_student.module
        planted_student.logits = lambda micro: model(micro).roll(shift, 0)
        got = ours(batch, planted_student, pool, config, old=student)
    elif what == "teacher":
        for name in pool.names:
            model = pool[name].backend.module
            pool[name].backend.logits = lambda micro, model=model: model(micro).roll(shift, 0)
        got = ours(batch, student, pool, config)
    else:
        original = type(batch).next_tokens
        planted_batch.next_tokens = lambda: original(planted_batch).roll(shift).clamp(min=0)
        got = ours(planted_batch, student, pool, config)
    assert not agree(got, truth, 1e-4)


def test_one_row_off_at_a_sample_boundary_alone_is_seen():
    """Only the first row that counts of the last sequence is wrong: it reads the row before it."""
    batch, student, pool = world()
    config = OPDConfig(k=4, divergence="forward_kl")
    truth = reference(batch, student, pool, config)
    start = int(batch.cu_seqlens[-2])
    row = start + int(batch.loss_mask[start:].nonzero()[0])
    broken = ToyBackend(VOCAB, seed=1, padding=3)

    def logits(micro):
        rows = torch.arange(micro.num_tokens)
        rows[row] = row - 1
        return broken.module(micro)[rows]

    broken.logits = logits
    assert not agree(ours(batch, broken, pool, config, old=student), truth, 1e-4)


def test_swapped_routing_changes_the_loss():
    batch, student, pool = world()
    config = OPDConfig(k=4, divergence="forward_kl")
    loss = ours(batch, student, pool, config)[0]
    swap = {"a": "b", "b": "a", "c": "c"}
    batch.teacher_names = [swap[name] for name in batch.teacher_names]
    swapped = ours(batch, student, pool, config)
    assert abs(swapped[0] - loss) > 1e-2
    assert agree(swapped, reference(batch, student, pool, config))


def with_nan(logits, rows):
    """NaN added in these rows: a masked_fill would hide a NaN gradient from the model's parameters."""
    return logits + torch.zeros(logits.shape[0], 1).masked_fill(rows[:, None], math.nan)


def poisoned(pool, name, rows, value=math.nan):
    """The pool's teacher gives `value` in these rows of the whole batch (scored in one forward)."""
    model = pool[name].backend.module

    def logits(micro):
        out = model(micro).clone()
        return out.masked_fill(rows(micro)[:, None], value)

    pool[name].backend.logits = logits


@pytest.mark.parametrize("mixture", MIXTURES)
def test_nan_in_rows_that_do_not_count_poisons_nothing(mixture):
    batch, student, pool = world(mixture=mixture)
    config = OPDConfig(k=4, mixture=mixture, divergence="forward_kl")
    truth = reference(batch, student, pool, config)
    broken = ToyBackend(VOCAB, seed=1, padding=3)
    broken.logits = lambda micro: with_nan(broken.module(micro), ~micro.loss_mask)
    for name in pool.names:
        poisoned(pool, name, lambda micro: ~micro.loss_mask)
    got = ours(batch, broken, pool, config)
    assert agree(got, truth) and got[2]["nan_rows"] == 0


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "loss_sum"])
def test_nan_of_a_teacher_without_weight_poisons_nothing(mixture):
    batch, student, pool = world(mixture=mixture)
    batch.teacher_names = [""] * 6
    kept = torch.ones(batch.num_tokens)
    kept[3::2] = 0
    batch.teacher_weights = {"a": kept}
    config = OPDConfig(k=4, mixture=mixture, divergence="forward_kl", check_teachers=False)
    clean = ours(batch, student, pool, config)
    poisoned(pool, "a", lambda micro: micro.teacher_weights["a"] == 0)
    assert agree(ours(batch, student, pool, config), clean[:2], 1e-15)
    poisoned(pool, "a", lambda micro: micro.teacher_weights["a"] == 1)
    assert math.isnan(ours(batch, student, pool, config)[0])


def plain_forward_kl(student, teacher):
    """A user's own divergence, written without any care for rows that do not count."""
    support = teacher.log_probs.exp() * (teacher.log_probs - student.log_probs)
    support = support.masked_fill(student.indices == -1, 0.0)
    return support.sum(-1) + teacher.tail_log_prob.exp() * (teacher.tail_log_prob - student.tail_log_prob)


def plain_reverse_kl(student, teacher):
    support = student.log_probs.exp() * (student.log_probs - teacher.log_probs)
    return support.sum(-1) + student.tail_log_prob.exp() * (student.tail_log_prob - teacher.tail_log_prob)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_own_divergence_is_safe_from_rows_that_do_not_count(mixture):
    """Masked after the fact, 0 x NaN would reach the gradient: what enters the divergence must be harmless already."""
    batch, student, pool = world(mixture=mixture)
    batch.teacher_names = ["a", "b"] * 3 if mixture == "route" else [("a", "b")] * 6
    config = OPDConfig(k=4, mixture=mixture, divergence="reverse_kl")
    batch.sample_weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    if mixture != "route":  # and no teacher has any weight in rows that do not count
        batch.teacher_weights = {name: batch.loss_mask * weight for name, weight in (("a", 1.0), ("b", 2.0))}
    truth = ours(batch, student, pool, config)
    assert bool(truth[1].isfinite().all())
    config.divergence = plain_reverse_kl
    idle = batch.sample_weights[batch.row_sequence()] == 0
    broken = ToyBackend(VOCAB, seed=1, padding=3)
    broken.logits = lambda micro: with_nan(broken.module(micro), ~micro.loss_mask | idle)
    for name in ("a", "b"):
        model = pool[name].backend.module

        def logits(micro, model=model):
            zero = (micro.sample_weights == 0)[micro.row_sequence()]
            return model(micro).masked_fill((~micro.loss_mask | zero)[:, None], math.nan)

        pool[name].backend.logits = logits
    got = ours(batch, broken, pool, config, old=student)
    assert agree(got, truth[:2], 1e-11)
    # Control: the same function on scores that are not made harmless first has NaN gradients in masked rows.
    scores = gather_log_probs(broken.logits(batch), torch.zeros(batch.num_tokens, 1, dtype=torch.int64))
    loss = plain_reverse_kl(scores, scores.detach())
    assert bool(parameters_grad(loss.where(batch.loss_mask & ~idle, 0.0).sum(), broken).isnan().any())


def test_a_micro_batch_in_which_no_row_counts():
    """Its teachers may have no weight anywhere; it adds nothing, to the loss or to the gradient."""
    batch, student, pool = world(mixture="arithmetic")
    batch.loss_mask = batch.loss_mask & (batch.row_sequence() < 4)
    batch.teacher_weights = {name: batch.loss_mask.double() for name in pool.names}
    config = OPDConfig(k=4, mixture="arithmetic", divergence="forward_kl")
    truth = ours(batch, student, pool, config)
    parts = [batch.select([0, 1, 2, 3]), batch.select([4, 5])]
    assert agree(ours(batch, student, pool, config, parts), truth[:2], 1e-13)


def test_own_divergence_is_safe_from_a_teacher_without_weight():
    batch, student, pool = world(mixture="loss_sum")
    batch.teacher_names = [("a", "b")] * 6
    kept = torch.ones(batch.num_tokens)
    kept[3::2] = 0
    batch.teacher_weights = {"a": kept}
    config = OPDConfig(k=4, mixture="loss_sum", divergence="forward_kl")
    truth = ours(batch, student, pool, config)
    config.divergence = plain_forward_kl
    poisoned(pool, "a", lambda micro: micro.teacher_weights["a"] == 0)
    assert agree(ours(batch, student, pool, config), truth[:2], 1e-11)


def test_a_state_that_is_never_visited_weighs_nothing_whatever_is_there():
    """The student now gives the first sampled token no mass: later rows have weight 0, even where a teacher is NaN."""
    batch = pack_rollouts([[1]], [[3, 4, 5]], response_log_probs=[[-1.0, -1.0, -1.0]])
    student, pool = ToyBackend(VOCAB, seed=1), TeacherPool({"a": LocalTeacher(ToyBackend(VOCAB, seed=5))})
    forgot = ToyBackend(VOCAB, seed=1)
    only = torch.zeros(batch.num_tokens, VOCAB, dtype=torch.bool)
    only[0, 3] = True
    forgot.logits = lambda micro: forgot.module(micro).masked_fill(only, -math.inf)
    poisoned(pool, "a", lambda micro: torch.arange(micro.num_tokens) > 0)
    config = OPDConfig(k=4, divergence="jsd", state_weight_cap=2.0, check_teachers=False)
    loss, _, means = ours(batch, forgot, pool, config, old=student)
    assert math.isfinite(loss) and loss > 0 and means["nan_rows"] == 2


def test_nan_and_infinite_rows_that_count_are_counted():
    batch, student, pool = world()
    config = OPDConfig(k=8, divergence="reverse_kl", check_teachers=False)
    got = ours(batch, student, pool, config)
    assert got[2]["infinite_rows"] > 0 and got[0] == math.inf  # teacher c lacks ids the student has
    finite = ours(batch, student, pool, OPDConfig(k=8, divergence="reverse_kl", teacher_log_prob_min=-1e4))[2]
    # The mean is over finite rows: the teachers that are finite everywhere keep theirs.
    assert got[2]["divergence/a"] == pytest.approx(finite["divergence/a"]) and finite["infinite_rows"] == 0
    total = sum(got[2][f"divergence/{n}"] * got[2][f"rows/{n}"] for n in "ab")
    rest = got[2]["rows/c"] - got[2]["infinite_rows"]
    total += got[2]["divergence/c"] * rest if rest else 0.0
    assert got[2]["divergence"] == pytest.approx(total / (got[2]["rows"] - got[2]["infinite_rows"]))
    config.teacher_log_prob_min = -30.0
    floored = ours(batch, student, pool, config)
    assert floored[2]["infinite_rows"] == 0 and math.isfinite(floored[0]) and bool(floored[1].isfinite().all())
    first = int(batch.loss_mask.nonzero()[0])
    poisoned(pool, "a", lambda micro: torch.arange(micro.num_tokens) == first)
    nan = ours(batch, student, pool, config)
    assert nan[2]["nan_rows"] == 1 and math.isnan(nan[0]) and math.isfinite(nan[2]["student_entropy"])


def test_coefficient_zero_trains_nothing_and_still_measures():
    batch, student, pool = world()
    config = OPDConfig(k=4, divergence="forward_kl", coefficient=0.0)
    loss, grad, means = ours(batch, student, pool, config)
    assert loss == 0.0 and not bool(grad.any()) and means["divergence"] > 0.1


def test_metrics_are_what_they_say():
    batch, student, pool = world()
    config = OPDConfig(k=4, divergence="forward_kl")
    means = ours(batch, student, pool, config)[2]
    rows = batch.loss_mask
    log_q = student.module(batch)[rows, :VOCAB].detach().log_softmax(-1)
    top = log_q.topk(4).indices
    support = log_q.gather(1, top).exp().sum(1).mean().item()
    assert means["student_support_mass"] == pytest.approx(support, rel=1e-12)
    assert means["student_tail_mass"] == pytest.approx(1 - support, rel=1e-10)
    assert means["student_entropy"] == pytest.approx(-(log_q.exp() * log_q).sum(1).mean().item(), rel=1e-12)
    assert means["support_size"] == 4.0 and means["state_weight"] == 1.0
    sampled = batch.next_tokens()[rows]
    assert means["coverage"] == pytest.approx((top == sampled[:, None]).any(1).double().mean().item())
    assert sum(means[f"rows/{name}"] for name in pool.names) == means["rows"]
    blend = sum(means[f"divergence/{name}"] * means[f"rows/{name}"] for name in pool.names) / means["rows"]
    assert means["divergence"] == pytest.approx(blend, rel=1e-12)
    assert means["loss"] == pytest.approx(means["divergence"], rel=1e-12)
    teacher = [pool[n].backend.module(batch).detach() / (pool.temperature(n, 1.0)) for n in pool.names]
    entropy = torch.stack([-(t.log_softmax(-1).exp() * t.log_softmax(-1)).sum(1) for t in teacher])
    weights = pool.route(batch)
    assert means["teacher_entropy"] == pytest.approx((entropy * weights).sum(0)[rows].mean().item(), rel=1e-12)


def test_scores_are_frozen_while_the_student_moves():
    """The support is the old policy's; the divergence is the new one's."""
    batch, old, pool = world()
    new = ToyBackend(VOCAB, seed=77, padding=3)
    config = OPDConfig(k=4, divergence="forward_kl", optimizer_steps_per_rollout=2)
    assert agree(ours(batch, new, pool, config, old=old), reference(batch, new, pool, config, old=old))
    assert not agree(ours(batch, new, pool, config), reference(batch, new, pool, config, old=old))


def test_state_weight_is_the_truncated_product_over_earlier_tokens():
    batch, old, pool = world()
    new = ToyBackend(VOCAB, seed=77, padding=3, scale=0.4)
    log_mu = torch.randn(batch.num_tokens, dtype=torch.float64).abs().neg() * 2
    batch.rollout_log_probs = log_mu
    config = OPDConfig(k=4, divergence="forward_kl", state_weight_cap=1.5, reduction="token_mean")
    log_q = new.module(batch)[:, :VOCAB].detach().log_softmax(-1)
    weights = torch.ones(batch.num_tokens, dtype=torch.float64)
    bounds = batch.cu_seqlens.tolist()
    for s in range(batch.num_seqs):
        running = 0.0
        for i in range(bounds[s], bounds[s + 1]):
            weights[i] = min(1.5, math.exp(running))
            if batch.loss_mask[i]:
                running += (log_q[i, batch.tokens[i + 1]] - log_mu[i]).item()
    assert len(weights[batch.loss_mask].unique()) > 5 and bool((weights == 1.5).any())
    plain = OPDConfig(k=4, divergence="forward_kl")
    scored = score_rollouts(batch, old, pool, plain)
    expected = 0.0
    for row in batch.loss_mask.nonzero().flatten().tolist():
        single = batch.select(range(batch.num_seqs))
        single.loss_mask = torch.arange(batch.num_tokens) == row
        rescored = score_rollouts(single, old, pool, plain)
        own = Denominators.of(single, plain)
        value = distillation_loss(new.logits(single), single, rescored, plain, None, own)[0]
        expected = expected + weights[row] * value / int(batch.loss_mask.sum())
    got = ours(batch, new, pool, config, old=old)
    assert agree(got, (expected.item(), parameters_grad(expected, new)), 1e-11)
    assert got[2]["state_weight"] == pytest.approx(weights[batch.loss_mask].mean().item())
    assert scored.nbytes > 0
    batch.rollout_log_probs = None
    with pytest.raises(ValueError, match="rollout_log_probs: the visited-state weight needs them"):
        ours(batch, new, pool, config, old=old)


def test_an_infinite_ratio_stays_in_its_own_sequence():
    batch = pack_rollouts([[1], [2]], [[3, 4, 5], [6, 7]], response_log_probs=[[-1.0] * 3, [-1.0] * 2])
    from opd_engine.distillation import state_weights

    log_probs = torch.full((batch.num_tokens,), -1.0)
    log_probs[0] = -math.inf
    weights = state_weights(batch, log_probs, cap=5.0)
    assert weights[batch.loss_mask].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_sampled_token_advantage_is_the_gradient_of_full_reverse_kl():
    """Summed over every possible token with its probability, the estimator's gradient is exact."""
    student, pool = ToyBackend(7, seed=1), TeacherPool({"a": LocalTeacher(ToyBackend(7, seed=2))})
    prompt = [3]
    log_q = student.module(pack_rollouts([prompt], [[0]]))[0].log_softmax(-1)
    log_p = pool["a"].backend.module(pack_rollouts([prompt], [[0]]))[0].detach().log_softmax(-1)
    exact = parameters_grad((log_q.exp() * (log_q - log_p)).sum(), student)
    config = OPDConfig(loss_type="advantage", support="rollout")
    expected = 0.0
    for token in range(7):
        own = log_q[token].item()
        batch = pack_rollouts([prompt], [[token]], response_log_probs=[[own]])
        batch.rollout_log_probs = batch.rollout_log_probs.double().where(~batch.loss_mask, own)
        expected = expected + math.exp(own) * ours(batch, student, pool, config)[1]
    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-11)
    batch.rollout_log_probs = None
    with pytest.raises(ValueError, match="rollout_log_probs: loss_type 'advantage' needs them"):
        ours(batch, student, pool, config)


def test_own_divergence_and_leading_shape_and_in_place():
    batch, student, pool = world()
    config = OPDConfig(k=4, divergence="forward_kl")
    truth = reference(batch, student, pool, config)
    config.divergence = lambda q, p: (
        torch.where(q.indices == -1, 0.0, (p.log_probs.exp() * (p.log_probs - q.log_probs)).nan_to_num(0.0)).sum(-1)
        + p.tail_log_prob.exp() * (p.tail_log_prob - q.tail_log_prob)
    )
    assert abs(ours(batch, student, pool, config)[0] - truth[0]) < 1e-10
    config.divergence, config.inplace_backward = "forward_kl", True
    shaped = ToyBackend(VOCAB, seed=1, padding=3)
    shaped.logits = lambda micro: shaped.module(micro).unsqueeze(0) * 1.0
    assert agree(ours(batch, shaped, pool, config, old=student), truth)


def test_refusals_of_a_step():
    batch, student, pool = world()
    config = OPDConfig(k=4, divergence="forward_kl")
    scored = score_rollouts(batch, student, pool, config)
    denominators = Denominators.of(batch, config)
    logits = student.logits(batch)
    with pytest.raises(ValueError, match=f"logits: wanted {batch.num_tokens} rows"):
        distillation_loss(logits[1:], batch, scored, config, None, denominators)
    stranger = toy_batch(1, sample_ids=[99], teacher_names=["a"])
    with pytest.raises(ValueError, match="denominators: sample 99 was not in the global batch"):
        distillation_loss(student.logits(stranger), stranger, scored, config, None, denominators)
    with pytest.raises(ValueError, match="sample 99: wanted a support in the cache, got none"):
        own = Denominators.of(stranger, config)
        distillation_loss(student.logits(stranger), stranger, scored, config, None, own)
    scored.release(batch)
    with pytest.raises(ValueError, match=r"sample 0: a support freed after 1 optimizer step\(s\)"):
        distillation_loss(logits, batch, scored, config, None, denominators)
    with pytest.raises(ValueError, match="k: wanted at most the student's vocabulary of 29, got 30"):
        score_rollouts(batch, student, pool, OPDConfig(k=30))
    student.tokens = {f"t{i}": i for i in range(VOCAB)}
    pool["b"].backend.tokens = {**student.tokens, "t1": 2, "t2": 1}
    with pytest.raises(ValueError, match="student and teacher 'b' disagree on 2 entries"):
        score_rollouts(batch, student, pool, config)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_float32_models_stay_close_to_float64_ones(mixture):
    """Scores are float32, sums float64: what is lost is what float32 logits lose."""
    batch, _, _ = world(mixture=mixture)
    config = OPDConfig(k=4, support="union", mixture=mixture, divergence="forward_kl")

    def models(dtype):
        student = ToyBackend(VOCAB, seed=1, padding=3, dtype=torch.float32)
        backends = [ToyBackend(WIDTHS[spec.name], seed=5 + i, dtype=torch.float32) for i, spec in enumerate(SPECS)]
        for backend in (student, *backends):
            backend.module.to(dtype)
        return student, TeacherPool([(spec, LocalTeacher(b)) for spec, b in zip(SPECS, backends)])

    truth = reference(batch, *models(torch.float64), config)
    student, pool = models(torch.float32)
    loss, grad, _ = ours(batch, student, pool, config)
    assert grad.dtype == torch.float32
    assert agree((loss, grad.double()), truth, 3e-6)
    assert not agree((loss, grad.double()), truth, 1e-12)
