"""Scores on one process: layouts, in-place backward and its refusals, recompute, compilation, second derivatives.

Values and gradients are compared with eager autograd in float64; accuracy itself is the business of truth/.
"""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from opd_engine import TokenScores, VocabShard, distill_loss, full_distill_loss, gather_log_probs, topk_log_probs

BATCH, SEQUENCE, VOCAB, K = 2, 3, 19, 4
ROWS = BATCH * SEQUENCE


def rows(seed=0, width=VOCAB, dtype=torch.float64):
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


INDICES = torch.stack([torch.randperm(VOCAB, generator=torch.Generator().manual_seed(row))[:K] for row in range(ROWS)])
TARGET = torch.arange(ROWS) % VOCAB


def eager(logits, temperature=1.0, indices=INDICES, target=TARGET):
    log_probs = torch.log_softmax(logits / temperature, -1)
    outside = torch.ones_like(log_probs, dtype=torch.bool).scatter(-1, indices, False)
    return TokenScores(
        indices=indices,
        log_probs=log_probs.gather(-1, indices),
        tail_log_prob=torch.logsumexp(log_probs.masked_fill(~outside, -torch.inf), -1),
        lse=torch.logsumexp(logits / temperature, -1),
        entropy=-(log_probs.exp() * log_probs).sum(-1),
        target_log_prob=log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1),
    )


def fields(scores):
    return (scores.log_probs, scores.tail_log_prob, scores.lse, scores.entropy, scores.target_log_prob)


def weigh(scores, seed=5):
    generator = torch.Generator().manual_seed(seed)
    parts = [value for value in fields(scores) if value is not None]
    return sum((value * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum() for value in parts)


def assert_equal_scores(got, wanted):
    for mine, theirs in zip(fields(got), fields(wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


LAYOUTS = {
    "flat": lambda x: x,
    "[b, s, V]": lambda x: x.view(BATCH, SEQUENCE, VOCAB),
    "Megatron's [s, b, V] transposed": lambda x: x.view(SEQUENCE, BATCH, VOCAB).transpose(0, 1),
    "columns of a wider buffer": lambda x: torch.nn.functional.pad(x, (3, 5))[:, 3:-5],
    "every other row": lambda x: torch.stack((x, x * 0), 1).flatten(0, 1)[::2],
    "one row, rank 1": lambda x: x[0],
    "rank 5": lambda x: x.view(1, BATCH, 1, SEQUENCE, VOCAB),
    "rows expanded": lambda x: x[:1].expand(4, VOCAB),
}


@pytest.mark.parametrize("shaped_arguments", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_leading_layout_flat_or_shaped_arguments(layout, shaped_arguments):
    leaf = rows().requires_grad_()
    logits = LAYOUTS[layout](leaf)
    leading = logits.shape[:-1]
    count = leading.numel()
    indices, target = INDICES[:count].view(*leading, K), TARGET[:count].view(leading)
    temperature = torch.linspace(0.5, 1.5, count, dtype=torch.float64).view(leading)
    wanted = eager(logits, temperature.unsqueeze(-1), indices, target)
    arguments = {"indices": indices, "target": target, "temperature": temperature}
    if not shaped_arguments:
        arguments = {
            "indices": indices.reshape(count, K),
            "target": target.reshape(count),
            "temperature": temperature.reshape(count),
        }
    scores = gather_log_probs(logits, **arguments)
    assert scores.indices.equal(indices)
    assert scores.leading_shape == leading
    assert_equal_scores(scores, wanted)
    grad, expected = (torch.autograd.grad(weigh(each), leaf, retain_graph=True)[0] for each in (scores, wanted))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)

    top = topk_log_probs(logits, K, target=arguments["target"], temperature=arguments["temperature"])
    assert not top.requires_grad
    assert_equal_scores(top, eager(logits, temperature.unsqueeze(-1), top.indices, target).detach())
    assert top.indices.equal(torch.topk(logits.detach(), K).indices)


def test_logits_are_never_copied():
    """The transposed logits themselves are what the graph keeps: nothing of their size is made in forward."""
    logits = rows().view(SEQUENCE, BATCH, VOCAB).requires_grad_().mul(1.0).transpose(0, 1)
    scores = gather_log_probs(logits, INDICES)
    kept = [saved for saved in scores.log_probs.grad_fn.next_functions[0][0].saved_tensors if saved is not None]
    big = [saved for saved in kept if saved.numel() >= logits.numel()]
    assert [saved.data_ptr() for saved in big] == [logits.data_ptr()]
    assert big[0].stride() == logits.stride()


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_dtype(kind):
    scores = gather_log_probs(rows(), INDICES.to(kind), target=TARGET.to(kind))
    assert scores.indices.dtype == torch.int64
    assert_equal_scores(scores, eager(rows()))


@pytest.mark.parametrize(
    ("logits_dtype", "score_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes_of_scores_and_gradients(logits_dtype, score_dtype):
    leaf = rows(dtype=logits_dtype).requires_grad_()
    scores = gather_log_probs(leaf, INDICES, target=TARGET)
    top = topk_log_probs(leaf, K, target=TARGET)
    assert {value.dtype for value in (*fields(scores), *fields(top))} == {score_dtype}
    scores.log_probs.sum().backward()
    assert leaf.grad.dtype == logits_dtype
    loss = full_distill_loss(leaf, rows(1, dtype=torch.float32))
    assert loss.dtype == score_dtype
    assert full_distill_loss(leaf, rows(1)).dtype == score_dtype, "a float64 teacher is cast to the student's"


@pytest.mark.parametrize("temperature", [0.7, 1, torch.tensor(0.7), torch.full((ROWS,), 0.7).half()])
def test_temperatures_of_any_kind(temperature):
    number = float(temperature.flatten()[0]) if isinstance(temperature, torch.Tensor) else temperature
    scores = gather_log_probs(rows(), INDICES, target=TARGET, temperature=temperature)
    assert_equal_scores(scores, eager(rows(), number))


def test_a_target_is_optional():
    assert gather_log_probs(rows(), INDICES).target_log_prob is None
    assert topk_log_probs(rows(), K).target_log_prob is None


@pytest.mark.parametrize("field", ["log_probs", "tail_log_prob", "lse", "entropy", "target_log_prob"])
def test_each_score_differentiates_alone_and_through_expanded_gradients(field):
    """Only one output has an upstream gradient, and .sum() hands it over with stride 0."""
    ours, theirs = rows().requires_grad_(), rows().requires_grad_()
    getattr(gather_log_probs(ours, INDICES, target=TARGET), field).sum().backward()
    getattr(eager(theirs), field).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_a_row_masked_with_where_stays_clean_of_its_nan():
    logits = rows()
    logits[1, 3] = torch.nan
    logits.requires_grad_()
    scores = gather_log_probs(logits, INDICES)
    assert scores.log_probs[1].isnan().all()
    mask = torch.arange(ROWS) != 1
    torch.where(mask, scores.log_probs.sum(-1), 0).sum().backward()
    assert logits.grad[1].eq(0).all()
    assert logits.grad.isfinite().all()


# --- in-place backward ---


def inplace_scores(logits):
    return gather_log_probs(logits, INDICES, target=TARGET, inplace_backward=True)


def inplace_full(logits):
    return full_distill_loss(logits, rows(1), inplace_backward=True)


def scalar(outcome):
    return weigh(outcome) if isinstance(outcome, TokenScores) else outcome.sum()


BOTH = pytest.mark.parametrize("function", [inplace_scores, inplace_full])


@BOTH
@pytest.mark.parametrize("layout", ["flat", "Megatron's [s, b, V] transposed", "every other row"])
def test_the_gradient_takes_the_logits_memory(function, layout):
    leaf = rows().requires_grad_()
    logits = LAYOUTS[layout](leaf * 1.5)
    seen = []
    logits.register_hook(lambda grad: seen.append((grad.data_ptr(), grad.stride())))
    address, strides, version = logits.data_ptr(), logits.stride(), logits._version
    if function is inplace_full:
        outcome = full_distill_loss(logits, LAYOUTS[layout](rows(1)), inplace_backward=True)
        plain = full_distill_loss(LAYOUTS[layout](leaf * 1.5), LAYOUTS[layout](rows(1)))
    else:
        outcome, plain = inplace_scores(logits), gather_log_probs(LAYOUTS[layout](leaf * 1.5), INDICES, target=TARGET)
    expected = torch.autograd.grad(scalar(plain), leaf)[0]
    grad = torch.autograd.grad(scalar(outcome), leaf)[0]
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)
    assert seen == [(address, strides)]
    assert logits._version > version


@BOTH
def test_a_second_backward_raises(function):
    logits = rows().requires_grad_() * 1.5
    loss = scalar(function(logits))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through logits that inplace_backward has overwritten"):
        loss.backward()


@BOTH
def test_whoever_saved_the_logits_raises_instead_of_reading_the_gradient(function):
    leaf = rows().requires_grad_()
    logits = leaf * 1.5
    saved_by_another = logits.square().sum()
    scalar(function(logits)).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved_by_another.backward()

    logits = leaf.exp()  # exp saves its result: it is the logits themselves
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scalar(function(logits)).backward()

    logits = leaf * 1.5
    other = weigh(gather_log_probs(logits, INDICES))
    scalar(function(logits)).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@BOTH
def test_logits_changed_after_forward_raise(function):
    logits = rows().requires_grad_() * 1.5
    loss = scalar(function(logits))
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Alias(torch.autograd.Function):
    """A view that a custom Function gives out."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad


def leaf_rows():
    return rows().requires_grad_()


REFUSED = {
    "a leaf": (leaf_rows, "a leaf"),
    "a view of a leaf": (lambda: leaf_rows()[:ROWS], "a view of a leaf"),
    "a view of a view": (lambda: leaf_rows().view(-1).view(ROWS, VOCAB).t().t(), "a view of a leaf"),
    "a custom view": (lambda: Alias.apply(leaf_rows()), "a view of a leaf"),
    "a detached alias": (lambda: (leaf_rows() * 1.5).detach().requires_grad_(), "a leaf"),
    "one row for all": (lambda: (leaf_rows() * 1.5)[:1].expand(ROWS, VOCAB), "address of its own.*strides \\(0, 1\\)"),
    "overlapping rows": (
        lambda: (leaf_rows() * 1.5).flatten().as_strided((ROWS, VOCAB), (VOCAB - 1, 1)),
        "address of its own.*strides \\(18, 1\\)",
    ),
}


@BOTH
@pytest.mark.parametrize("case", REFUSED)
def test_refused(function, case):
    make, message = REFUSED[case]
    logits = make()
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=f"inplace_backward: .*{message}"):
        function(logits)
    assert logits.equal(before)


def test_interleaved_strides_without_a_shared_address_are_accepted():
    """[2, 3, 1] with strides (3, 2, 1) touches 0 2 4 3 5 7: no order of its strides nests, yet nothing meets."""
    buffer = torch.randn(16, dtype=torch.float64, requires_grad=True) * 1.5
    logits = buffer.as_strided((2, 3, 1), (3, 2, 1))
    gather_log_probs(logits, torch.zeros(2, 3, 1, dtype=torch.int64), inplace_backward=True).lse.sum().backward()


@BOTH
def test_ignored_where_nothing_requires_grad(function):
    logits = rows()
    before = logits.clone()
    function(logits)
    function(logits[:1].expand(ROWS, VOCAB))
    with torch.no_grad():
        function(rows().requires_grad_())
    assert logits.equal(before)


@BOTH
def test_without_it_the_logits_are_left_alone(function):
    leaf = rows().requires_grad_()
    logits = leaf * 1.5
    before = logits.detach().clone()
    version = logits._version
    loss = weigh(gather_log_probs(logits, INDICES)) + full_distill_loss(logits, rows(1)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert logits.equal(before)
    assert logits._version == version


# --- recompute, compilation, second derivatives ---


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_recompute(inplace, reentrant):
    weight = rows(3, VOCAB)[:5].requires_grad_()
    hidden = torch.randn(ROWS, 5, dtype=torch.float64, requires_grad=True)

    def head(hidden):
        scores = gather_log_probs(hidden @ weight, INDICES, inplace_backward=inplace)
        return scores.log_probs, full_distill_loss(hidden @ weight, rows(1), inplace_backward=inplace)

    def gradients(run):
        hidden.grad = weight.grad = None
        log_probs, loss = run(hidden)
        (log_probs.sum() + loss.sum()).backward()
        return hidden.grad, weight.grad

    for got, wanted in zip(
        gradients(lambda h: checkpoint(head, h, use_reentrant=reentrant)), gradients(head), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def compiled_cases():
    row_temperature = torch.linspace(0.5, 2, ROWS)
    teacher = gather_log_probs(rows(1), INDICES)
    shard = VocabShard(0, VOCAB, VOCAB - 2)
    ids = INDICES.clamp(max=VOCAB - 3)

    def gather(logits):
        scores = gather_log_probs(logits * 1.5, INDICES, target=TARGET, temperature=0.7)
        return sum((number * value).sum() for number, value in enumerate(fields(scores), start=1))

    def padded_gather(logits):
        return gather_log_probs(logits * 1.5, ids, shard=shard, temperature=row_temperature).tail_log_prob.sum()

    def inplace(logits):
        return gather_log_probs(logits * 1.5, INDICES, inplace_backward=True).log_probs.sum()

    def bucket(logits):
        return distill_loss(gather_log_probs(logits * 1.5, INDICES), teacher, divergence="jsd").sum()

    def full(logits):
        return full_distill_loss(logits * 1.5, rows_1, divergence="skew_reverse_kl", inplace_backward=True).sum()

    rows_1 = rows(1)
    return {function.__name__: function for function in (gather, padded_gather, inplace, bucket, full)}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["gather", "padded_gather", "inplace", "bucket", "full"])
def test_compiled_as_one_graph(name, backend):
    torch._dynamo.reset()
    function = compiled_cases()[name]
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    logits = rows().requires_grad_()
    wanted, got = function(logits), compiled(logits)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    for mine, theirs in zip(torch.autograd.grad(got, logits), torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_topk_compiles_as_one_graph():
    torch._dynamo.reset()

    def topk(logits):
        return fields(topk_log_probs(logits, K, target=TARGET))

    compiled = torch.compile(topk, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(rows()), topk(rows()), strict=True):
        assert got.equal(wanted)


def test_the_graph_lets_go_of_the_logits():
    logits = rows().requires_grad_() * 1.5
    alive = weakref.ref(logits)
    scores = gather_log_probs(logits, INDICES)
    del logits
    assert alive() is not None
    scores.log_probs.sum().backward()
    del scores
    gc.collect()
    assert alive() is None


# --- TokenScores ---


def test_scores_move_detach_reshape_and_select():
    logits = rows().view(BATCH, SEQUENCE, VOCAB).requires_grad_()
    scores = gather_log_probs(logits, INDICES, target=TARGET)
    assert scores.requires_grad and not scores.detach().requires_grad
    assert (scores.k, scores.leading_shape) == (K, (BATCH, SEQUENCE))
    half = scores.to(dtype=torch.float16)
    assert half.indices.dtype == torch.int64
    assert {value.dtype for value in fields(half)} == {torch.float16}
    flat = scores.reshape(-1)
    assert flat.leading_shape == (ROWS,)
    assert flat.indices.equal(INDICES)
    picked = flat.select(torch.tensor([4, 0]))
    assert picked.log_probs.equal(flat.log_probs[[4, 0]])
    assert picked.target_log_prob.equal(flat.target_log_prob[[4, 0]])
    masked = flat.select(torch.arange(ROWS) < 2)
    assert masked.leading_shape == (2,)
    none = gather_log_probs(logits, torch.empty(ROWS, 0, dtype=torch.int64))
    assert none.reshape(-1).indices.shape == (ROWS, 0)
    assert none.reshape(-1).lse.shape == (ROWS,)
    assert none.target_log_prob is None
