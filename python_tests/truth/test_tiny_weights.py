"""A mixture in which one side weighs next to nothing: its other weight, 1 less it, rounds to 1."""

import pytest
import torch

import opd_engine as opd


def scores(log_probs: torch.Tensor, tail: torch.Tensor) -> opd.TokenScores:
    return opd.TokenScores(indices=torch.arange(log_probs.shape[1])[None], log_probs=log_probs, tail_log_prob=tail)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [0.0, 1e-300, 1e-30, 1e-17, 1e-9, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("kind", ["skew_reverse_kl", "skew_forward_kl"])
def test_value_and_gradient_follow_the_definition_down_to_no_weight_at_all(kind, alpha, dtype):
    """KL(q || alpha q + (1 - alpha) p) where p is 80 nats below q and the other way round, in 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    logits_q, logits_p = [80.0, 0.0, 3.0], [0.0, 80.0, 2.0]

    def value(z):
        def normalised(values):
            total = mpmath.fsum(mpmath.e**v for v in values)
            return [mpmath.e**v / total for v in values]

        q, p, a = normalised(z), normalised([mpmath.mpf(v) for v in logits_p]), mpmath.mpf(alpha)
        if kind == "skew_forward_kl":
            q, p = p, q
        return mpmath.fsum(x * mpmath.log(x / (a * x + (1 - a) * y)) for x, y in zip(q, p))

    exact = [mpmath.mpf(v) for v in logits_q]
    gradient = [
        float(mpmath.diff(lambda x, place=place: value([*exact[:place], x, *exact[place + 1 :]]), exact[place]))
        for place in range(3)
    ]
    z = torch.tensor([logits_q], dtype=dtype, requires_grad=True)
    p = torch.tensor([logits_p], dtype=dtype)
    no_tail = torch.full((1,), -torch.inf, dtype=dtype)
    student, teacher = (scores(logits.log_softmax(-1), no_tail) for logits in (z, p))
    loss = opd.distill_loss(student, teacher, divergence=kind, alpha=alpha)
    loss.sum().backward()
    eps = torch.finfo(dtype).eps
    assert float(loss) == pytest.approx(float(value(exact)), rel=64 * eps)
    scale = max(1.0, *map(abs, gradient))  # each is a difference of numbers of up to 1
    assert z.grad[0].tolist() == pytest.approx(gradient, rel=256 * eps, abs=64 * eps * scale)
