"""More than 2^31 elements: offsets and counts that 32 bits cannot hold. Pages that are never written cost no memory."""

import pytest
import torch

import opd_engine
import oracles
from tolerances import check
from truth import shapes

BEYOND = 2**31


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_rows_that_lie_beyond_2_to_the_31(dtype):
    """Three rows of a buffer of 2^31 elements and more, forward and backward, in place too."""
    width, stride = 1003, BEYOND // 2 + 77
    rows = shapes.quantised(3, width, 1).to(dtype)
    buffer = torch.empty(2 * stride + width, dtype=dtype)
    ids = oracles.topk_ids(rows, 7)
    grads = []
    for inplace in (False, True):
        far = buffer.as_strided((3, width), (stride, 1))
        far.copy_(rows)
        leaf = far.detach().requires_grad_()
        logits = _Owned.apply(leaf) if inplace else leaf
        scores = opd_engine.gather_log_probs(logits, ids, inplace_backward=inplace)
        loss = scores.log_probs.sum(-1) - scores.tail_log_prob + scores.entropy
        grads.append(torch.autograd.grad(loss.sum(), leaf)[0].clone())
        truths = []
        for at, compute in ((rows.double(), torch.float64), (rows.clone(), torch.float32)):
            at.requires_grad_()
            true = oracles.gather_scores(at, ids, dtype=compute)
            truths.append(
                (true, torch.autograd.grad((true.log_probs.sum(-1) - true.tail_log_prob + true.entropy).sum(), at)[0])
            )
        check("score", dtype, scores.log_probs, truths[0][0].log_probs, truths[1][0].log_probs, "far rows")
        check("gradient", dtype, grads[-1], truths[0][1], truths[1][1], "far rows")
        far.copy_(rows)
        top = opd_engine.topk_log_probs(far, 7)
        assert torch.equal(top.indices, ids)
    assert torch.equal(*grads)


class _Owned(torch.autograd.Function):
    """A non-leaf at the same address: what an output layer that owns its logits hands over."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_more_than_2_to_the_31_logits():
    """T x V > 2^31 in one call: one row of memory, repeated by a stride of 0. Where rows lie is the test above."""
    vocab_size, k = 151936, 5
    num_rows = BEYOND // vocab_size + 3
    row = shapes.quantised(1, vocab_size, 2).bfloat16()
    logits = row.expand(num_rows, vocab_size)
    assert logits.numel() > BEYOND
    ids = torch.tensor([[7, vocab_size - 1, 100, -1, -1]]).repeat(num_rows, 1)
    assert ids.shape[1] == k
    ids[-1, 0] = 8  # the last row is known by its own id
    scores = opd_engine.gather_log_probs(logits, ids)
    true, eager = (oracles.gather_scores(row.expand(2, -1), ids[-2:], dtype=d) for d in (torch.float64, torch.float32))
    for name, quantity in (("log_probs", "score"), ("tail_log_prob", "tail"), ("entropy", "score")):
        ours = getattr(scores, name)
        check(quantity, torch.bfloat16, ours[-2:], getattr(true, name), getattr(eager, name), f"2^31 logits {name}")
        assert (ours[:-1] == ours[0]).all(), f"{name}: equal rows differ"
