"""Sure students: logits that are computed twice have the same bits, so the chunked path loses nothing to the logits'.

Such a row's gradient is about 1 - q of what its logits move: a statistic of other roundings than the gradient's logits
adds q times their difference, which may be all there is to see.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from opd_engine import distill_loss, gather_log_probs, linear_gather_log_probs
from opd_engine.functional.linear_chunks import ChunkLogits
from opd_engine.integrations.megatron.head import OutputHead

ROWS, VOCAB, HIDDEN, K = 48, 61, 64, 4
THREE_ROWS = 3 * VOCAB * 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sure_student(least=6.0, most=40.0, dtype=torch.float32):
    """Each row points at one id, by a margin from `least` nats to `most`: top probabilities from 0.9 to 1 - 1e-15."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    weight = weight / weight.norm(dim=1, keepdim=True)
    tops = torch.randint(VOCAB, (ROWS,), generator=generator)
    hidden = torch.linspace(least, most, ROWS)[:, None] * weight[tops]
    ids = (hidden.double() @ weight.double().t()).topk(K).indices
    teacher = gather_log_probs(2 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64), ids)
    state_weights = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), teacher, state_weights


def through_gather(hidden, weight, ids):
    return linear_gather_log_probs(hidden, weight, ids, workspace_bytes=THREE_ROWS)


def through_output_head(hidden, weight, ids):
    """As Megatron's actor calls it at one process: the last stage's hidden states [length, sequences, hidden_size]."""
    layer = torch.nn.Module()
    layer.weight, layer.bias = weight, None
    head = OutputHead(
        SimpleNamespace(output_layer=layer),
        SimpleNamespace(tp_size=1, tp_rank=0, tp=None),
        VOCAB,
        workspace_bytes=THREE_ROWS,
    )
    return head.rows(hidden.unsqueeze(1), torch.arange(len(hidden))).gather(ids)


def through_logits(hidden, weight, ids):
    return gather_log_probs(hidden @ weight.t(), ids)


def loss_and_gradients(scores_of, divergence, dtype, student):
    hidden, weight, teacher, state_weights = student
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    losses = distill_loss(scores_of(hidden, weight, teacher.indices), teacher, divergence=divergence)
    loss = (losses * state_weights).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def error(scores_of, divergence, student):
    """Of loss and gradients, against float64 and of the largest gradient."""
    exact = loss_and_gradients(through_logits, divergence, torch.float64, student)
    got = loss_and_gradients(scores_of, divergence, torch.float32, student)
    largest = max(gradient.abs().max() for gradient in exact[1:])
    in_loss = (got[0] - exact[0]).abs() / exact[0].abs()
    return max(in_loss, *((one - other).abs().max() / largest for one, other in zip(got[1:], exact[1:], strict=True)))


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "skew_forward_kl"])
@pytest.mark.parametrize("scores_of", [through_gather, through_output_head])
def test_the_chunked_path_is_within_2e_6_of_the_largest_gradient(scores_of, divergence):
    student = sure_student()
    found = error(scores_of, divergence, student)
    print(f"{divergence}: {found:.2e}, through logits {error(through_logits, divergence, student):.2e}")
    assert found <= 2e-6


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl"])
def test_it_loses_no_more_than_the_logits_where_these_lose_much(divergence):
    """Margins from 20 nats: what is left of jsd's gradient is noise, the same noise."""
    student = sure_student(20.0, 100.0)
    found, logits = error(through_gather, divergence, student), error(through_logits, divergence, student)
    assert found <= 1.5 * logits, (found, logits)


def test_a_product_of_another_shape_is_seen():
    """The control: a chunk's logits as one product, a tile's as another."""
    compute = ChunkLogits.compute

    def whole(self, hidden, chunks=None, blocks=None):
        blocks = blocks and [slice(blocks[0].start, blocks[-1].stop)]
        return compute(self, hidden, blocks=blocks)

    with mock.patch.object(ChunkLogits, "compute", whole):
        assert error(through_gather, "jsd", sure_student()) > 1e-5


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"logit_softcap": 30.0}], ids=["plain", "bias", "soft-cap"])
@pytest.mark.parametrize("workspace_rows", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_the_backward_have_the_bits_of_the_forward(dtype, workspace_rows, options):
    """Row by row: the same multiset of logits, however they were cut."""
    hidden, weight, teacher, _ = sure_student(dtype=dtype)
    if "bias" in options:
        options = {"bias": torch.linspace(-1, 1, VOCAB).to(dtype)}
    seen = []
    compute = ChunkLogits.compute

    def recorded(self, *arguments, **more):
        logits = compute(self, *arguments, **more)
        seen.append(logits.clone().flatten())
        return logits

    workspace_bytes = workspace_rows * VOCAB * dtype.itemsize * (2 if "logit_softcap" in options else 1)
    with mock.patch.object(ChunkLogits, "compute", recorded):
        scores = linear_gather_log_probs(
            hidden.requires_grad_(), weight, teacher.indices, workspace_bytes=workspace_bytes, **options
        )
        forward = torch.cat(seen)
        seen.clear()
        scores.tail_log_prob.sum().backward()
    backward = torch.cat(seen)
    assert len(forward) == len(backward) == ROWS * VOCAB
    assert torch.equal(forward.sort().values, backward.sort().values)
