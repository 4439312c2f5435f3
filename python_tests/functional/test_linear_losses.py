"""The linear functions around their mathematics: chunks, rows left out, main_grad, recompute, shapes."""

import itertools
import math
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import opd_engine
from opd_engine import TokenScores, distill_loss, gather_log_probs, linear_distill_loss, linear_full_distill_loss
from opd_engine.functional.linear_arguments import default_workspace_bytes
from opd_engine.functional.linear_chunks import ChunkLogits, rows_a_chunk, take_turns, tiles_of

ROWS, HIDDEN, VOCAB, K = 10, 6, 31, 4


def head(dtype=torch.float64, seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def teacher_scores(rows=ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(rows)])
    return gather_log_probs(logits, ids)


def by_logits(hidden, weight, weights=None):
    """(loss, gradients of hidden states and weight) through logits that exist."""
    scores = teacher_scores(len(hidden))
    losses = distill_loss(gather_log_probs(hidden @ weight.t(), scores.indices), scores)
    loss = losses.sum() if weights is None else torch.where(weights == 0, 0, losses * weights).sum()
    return loss, torch.autograd.grad(loss, (hidden, weight))


def close(ours, wanted, tolerance=1e-12):
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


class Chunks:
    """Records how many rows each chunk had."""

    def __init__(self):
        self.rows = []

    def __enter__(self):
        compute, rows = ChunkLogits.compute, self.rows

        def recorded(this, hidden):
            rows.append(len(hidden))
            return compute(this, hidden)

        self.patch = mock.patch.object(ChunkLogits, "compute", recorded)
        self.patch.__enter__()
        return self.rows

    def __exit__(self, *error):
        return self.patch.__exit__(*error)


def test_rows_a_chunk_follow_the_formula():
    """max(1, workspace // (vocab_size x itemsize)); with a soft-cap two tensors share the workspace."""
    hidden, weight = head()
    row = VOCAB * 8
    for workspace_bytes, rows in ((1, [1] * 10), (4 * row, [4, 4, 2]), (4 * row - 1, [3, 3, 3, 1]), (None, [10])):
        with Chunks() as seen:
            linear_distill_loss(hidden, weight, teacher_scores(), workspace_bytes=workspace_bytes)
        assert seen == rows
    with Chunks() as seen:
        linear_distill_loss(hidden, weight, teacher_scores(), workspace_bytes=4 * row, logit_softcap=2.0)
    assert seen == [2] * 5
    with Chunks() as seen:  # student and teacher, two a chunk
        linear_full_distill_loss(hidden, weight, hidden.detach(), weight.detach(), workspace_bytes=10 * row)
    assert seen == [5] * 4
    assert rows_a_chunk(64 << 20, 65_536 * 4) == 256


@pytest.mark.parametrize(
    "num_rows, width, num_logits, chunk",
    [(10, 44, 44, 1), (10, 44, 180, 4), (7, 999, 900, 1), (1, 5, 1, 1), (0, 44, 9, 1), (3, 0, 9, 1), (30, 9, 200, 22)],
)
def test_tiles_cover_every_logit_once_and_fit(num_rows, width, num_logits, chunk):
    seen = torch.zeros(num_rows, width, dtype=torch.int64)
    rows, columns = tiles_of(num_rows, width, num_logits, chunk)
    assert all(part.start % chunk == 0 for part in rows), "a tile has the rows of whole chunks"
    for part in rows:
        for block in columns:
            seen[part, block] += 1
            assert seen[part, block].numel() <= num_logits
    assert (seen == 1).all()


def test_tiles_are_tall_or_square():
    blocks = [slice(start, start + 8_192) for start in range(0, 65_536, 8_192)]
    assert tiles_of(2_048, 65_536, 1 << 24, 256) == ([slice(0, 2_048)], blocks)
    rows, columns = tiles_of(32_768, 151_936, 1 << 24, 110)
    assert len(rows) == 9 and rows[0] == slice(0, 37 * 110) and {block.start % 64 for block in columns} == {0}


def test_default_workspace():
    assert default_workspace_bytes(torch.device("cpu"), 8) == 64 << 20
    assert default_workspace_bytes(torch.device("cuda"), 1) == 1.25 * 2**30
    assert default_workspace_bytes(torch.device("cuda"), 8) == 160 * 2**20


@pytest.mark.parametrize("rows_each", [1, 3, 7, 10, 1000])
def test_the_size_of_chunks_changes_nothing(rows_each):
    """But the last bits, which depend on the shapes of the products."""
    hidden, weight = head()
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    whole = linear_distill_loss(hidden, weight, teacher_scores(), token_weights=weights)
    cut = linear_distill_loss(
        hidden, weight, teacher_scores(), token_weights=weights, workspace_bytes=rows_each * VOCAB * 8
    )
    close(cut, whole, 1e-14)
    loss, wanted = by_logits(hidden, weight, weights)
    close([cut.loss], [loss])
    grads = [torch.autograd.grad(one.loss, (hidden, weight)) for one in (cut, whole)]
    close(*grads, 1e-13)
    close(grads[0], wanted)


def test_a_second_backward_and_an_upstream_gradient():
    hidden, weight = head()
    got = linear_distill_loss(hidden, weight, teacher_scores(), workspace_bytes=3 * VOCAB * 8)
    _, wanted = by_logits(hidden, weight)
    for scale in (1.0, -2.5):
        grads = torch.autograd.grad(got.loss * scale, (hidden, weight), retain_graph=True)
        close(grads, [grad * scale for grad in wanted])
    scale = torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(got.loss * scale, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


def test_rows_left_out():
    """loss_rows against weights of 0: the same, but that what is left out may hold anything."""
    hidden, weight = head()
    kept = torch.tensor([7, 0, 4, 3])
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) + 0.5
    masked = torch.zeros(ROWS).index_copy(0, kept, weights[kept])
    temperature = torch.linspace(0.5, 2.0, ROWS)
    whole = linear_distill_loss(
        hidden, weight, teacher_scores(), token_weights=masked, temperature=temperature, workspace_bytes=VOCAB * 8
    )
    loss, wanted = whole.loss, torch.autograd.grad(whole.loss, (hidden, weight))
    with torch.no_grad():
        hidden[[1, 2, 5, 6, 8, 9]] = math.nan
    with Chunks() as rows:
        got = linear_distill_loss(
            *(hidden, weight, teacher_scores()),
            token_weights=weights,
            loss_rows=kept,
            temperature=temperature,
            workspace_bytes=3 * VOCAB * 8,
        )
    assert rows == [3, 1]
    close([got.loss], [loss])
    close(torch.autograd.grad(got.loss, (hidden, weight)), wanted)
    close([got.token_losses[kept]], [whole.token_losses[kept]])
    assert not got.token_losses[[1, 2, 5, 6, 8, 9]].any() and got.token_losses[kept].all()
    full = linear_full_distill_loss(
        *(hidden, weight, head(seed=3)[0].detach(), head(seed=3)[1].detach()), token_weights=weights, loss_rows=kept
    )
    assert full.loss.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(full.loss, weight))
    nothing = linear_distill_loss(hidden, weight, teacher_scores(), loss_rows=kept[:0])
    assert nothing.loss == 0 and not any(grad.any() for grad in torch.autograd.grad(nothing.loss, (hidden, weight)))


def test_a_row_of_weight_0_adds_exactly_nothing():
    """Its loss is infinite: the teacher excludes an id that the student allows."""
    hidden, weight = head()
    scores = teacher_scores()
    scores.log_probs[3, 1] = -math.inf
    weights = torch.ones(ROWS)
    weights[3] = 0
    got = linear_distill_loss(hidden, weight, scores, token_weights=weights)
    loss, wanted = by_logits(hidden, weight, weights)
    assert got.token_losses[3] == math.inf
    close([got.loss], [loss])
    grads = torch.autograd.grad(got.loss, (hidden, weight))
    close(grads, wanted)
    assert not grads[0][3].any()
    close(
        grads,
        torch.autograd.grad(
            linear_distill_loss(hidden, weight, scores, token_weights=weights > 0).loss, (hidden, weight)
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_soft_cap_of_a_row_of_weight_0_is_selected_away(dtype):
    """Its hidden state is NaN, so the slope is: 0 x NaN would reach the row's hidden gradient."""
    hidden, weight = head(dtype)
    with torch.no_grad():
        hidden[3] = math.nan
    weights = torch.ones(ROWS)
    weights[3] = 0
    got = linear_distill_loss(hidden, weight, teacher_scores(), token_weights=weights, logit_softcap=2.0)
    (grad,) = torch.autograd.grad(got.loss, hidden)
    assert got.loss.isfinite() and grad.isfinite().all() and not grad[3].any() and grad[2].all()


def test_shapes_and_strides():
    """[s, b, H] of Megatron, its transpose, one row without dimensions, no row at all."""
    hidden, weight = head(rows=12)
    scores = teacher_scores(12)
    wanted, grads = by_logits(hidden, weight)
    for shaped in (hidden.view(4, 3, HIDDEN), hidden.view(3, 4, HIDDEN).transpose(0, 1).contiguous().transpose(0, 1)):
        lead = shaped.shape[:-1]
        for teacher in (scores, scores.reshape(*lead)):
            got = linear_distill_loss(
                shaped, weight, teacher, token_weights=torch.ones(lead), temperature=torch.ones(12)
            )
            assert got.token_losses.shape == lead and got.loss.shape == ()
            close([got.loss], [wanted])
            close(torch.autograd.grad(got.loss, (hidden, weight), retain_graph=True), grads)
        scored = opd_engine.linear_gather_log_probs(shaped, weight, scores.indices, target=torch.zeros(lead).long())
        assert scored.log_probs.shape == (*lead, K) and scored.target_log_prob.shape == lead
    one = opd_engine.linear_topk_log_probs(hidden[0], weight, K)
    assert one.indices.shape == (K,) and one.lse.shape == ()
    for k in (0, K):
        none = TokenScores(indices=torch.zeros(0, k).long(), log_probs=torch.zeros(0, k), tail_log_prob=torch.zeros(0))
        got = linear_distill_loss(hidden[:0], weight, none)
        assert got.loss == 0 and not any(grad.any() for grad in torch.autograd.grad(got.loss, (hidden, weight)))
        scored = opd_engine.linear_gather_log_probs(hidden[:0], weight, none.indices)
        assert scored.log_probs.shape == (0, k)
        assert not torch.autograd.grad(scored.tail_log_prob.sum(), weight)[0].any()
    assert opd_engine.linear_topk_log_probs(hidden[:0], weight, K).indices.shape == (0, K)


def test_only_what_is_asked_for_is_computed():
    hidden, weight = head()
    for needs in ((True, False), (False, True)):
        leaves = [part.detach().requires_grad_(need) for part, need in zip((hidden, weight), needs, strict=True)]
        got = linear_distill_loss(*leaves, teacher_scores())
        (grad,) = torch.autograd.grad(got.loss, [leaf for leaf in leaves if leaf.requires_grad])
        close([grad], [wanted for wanted, need in zip(by_logits(hidden, weight)[1], needs, strict=True) if need])
    with torch.no_grad():
        quiet = linear_distill_loss(hidden, weight, teacher_scores())
    assert not quiet.loss.requires_grad
    close([quiet.loss], [linear_distill_loss(hidden, weight, teacher_scores()).loss], 1e-14)


def test_a_tied_head_adds_to_the_embedding():
    hidden, weight = head()
    ids = torch.arange(ROWS)
    got = linear_distill_loss(hidden + weight[ids], weight, teacher_scores())
    leaf = weight.detach().clone().requires_grad_()
    scores = teacher_scores()
    wanted = distill_loss(gather_log_probs((hidden + leaf[ids]) @ leaf.t(), scores.indices), scores).sum()
    close(torch.autograd.grad(got.loss, weight), torch.autograd.grad(wanted, leaf))


def with_main_grad(dtype=torch.float32, flag=True, main_dtype=torch.float32):
    hidden, weight = head(dtype)
    weight.main_grad = torch.ones_like(weight, dtype=main_dtype)
    if flag:
        weight.grad_added_to_main_grad = False
    return hidden, weight


def functions():
    """The losses, which take grad_scale."""
    scores = teacher_scores()
    theirs = head(torch.float32, seed=3)
    yield "bucket", lambda hidden, weight, **kw: linear_distill_loss(hidden, weight, scores, **kw).loss
    yield (
        "full",
        lambda hidden, weight, **kw: (
            linear_full_distill_loss(hidden, weight, *(part.detach() for part in theirs), **kw).loss
        ),
    )


def gathered(hidden, weight, **kw):
    scores = opd_engine.linear_gather_log_probs(hidden, weight, teacher_scores().indices, **kw)
    return scores.log_probs.sum() + scores.tail_log_prob.sum()


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids="main_{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_is_added_to_in_backward(dtype, main_dtype, flag):
    """By what weight.grad would have got; data-parallel hooks see zeros, a weight without the flag nothing."""
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8  # what weight.grad itself is rounded by
    for name, function in (*functions(), ("gather", gathered)):
        for workspace_bytes in (None, 3 * VOCAB * dtype.itemsize):
            hidden, weight = with_main_grad(dtype, flag, main_dtype)
            plain_hidden, plain = head(dtype)
            (function(plain_hidden, plain, workspace_bytes=workspace_bytes) * 0.5).backward()
            loss = function(hidden, weight, workspace_bytes=workspace_bytes) * 0.5
            assert (weight.main_grad == 1).all(), f"{name}: main_grad was touched in the forward"
            loss.backward()
            added = weight.main_grad.float() - 1
            if main_dtype == torch.float32:
                torch.testing.assert_close(added, plain.grad.float(), rtol=rounding, atol=1e-6)
                rounded_away = (added - added.bfloat16().float()).abs().max()
                assert rounded_away > 1e-4, f"{name}: what main_grad got was rounded to bfloat16 before"
            else:
                close([added], [plain.grad.float()], 2e-2)
            close([hidden.grad.float()], [plain_hidden.grad.float()], 0.1 * rounding)
            if flag:
                assert weight.grad_added_to_main_grad is True and weight.grad.shape == weight.shape
                assert not weight.grad.any()
            else:
                assert weight.grad is None and not hasattr(weight, "grad_added_to_main_grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_scale_fills_main_grad_in_the_forward(dtype):
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    for name, function in functions():
        hidden, weight = with_main_grad(dtype)
        plain_hidden, plain = head(dtype)
        (function(plain_hidden, plain) * 0.5).backward()
        loss = function(hidden, weight, grad_scale=torch.tensor(0.5), workspace_bytes=3 * VOCAB * dtype.itemsize)
        filled = weight.main_grad.clone()
        torch.testing.assert_close(filled - 1, plain.grad.float(), rtol=rounding, atol=1e-5)
        (loss * 0.5).backward(retain_graph=True)
        assert torch.equal(weight.main_grad, filled)
        close([hidden.grad.float()], [plain_hidden.grad.float()], rounding)
        assert weight.grad_added_to_main_grad is True and not weight.grad.any(), name
        with pytest.raises(RuntimeError, match="main_grad twice"):
            (loss * 0.5).backward()
        with opd_engine.debug():
            loss = function(*with_main_grad(), grad_scale=torch.tensor(0.5))
        with pytest.raises(ValueError, match="grad_scale: wanted the gradient that loss receives in backward"):
            loss.backward()


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 1024.0])
@pytest.mark.parametrize("with_grad_scale", [False, True])
@pytest.mark.parametrize("workspace_bytes", [3 * VOCAB * 2, None])
def test_small_token_weights_survive_float16(scale, with_grad_scale, workspace_bytes):
    """A mean over a million tokens: weights of 1e-6, whose product with a probability is 0 in float16."""
    hidden, weight = head(torch.float16)
    bias = torch.linspace(-1, 1, VOCAB).half().requires_grad_()
    token_weights = torch.linspace(0.5, 1.5, ROWS) * 1e-6
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].t() + exact[2]
    losses = distill_loss(gather_log_probs(logits, teacher_scores().indices), teacher_scores())
    wanted = torch.autograd.grad((losses * token_weights).sum() * scale, exact)
    weight.main_grad = torch.full(weight.shape, 0.5 * wanted[1].abs().max())
    before = weight.main_grad.clone()
    options = {"grad_scale": torch.tensor(scale)} if with_grad_scale else {}
    options |= {"token_weights": token_weights, "bias": bias, "workspace_bytes": workspace_bytes}
    loss = linear_distill_loss(hidden, weight, teacher_scores(), **options).loss
    largest = wanted[1].abs().max()
    if with_grad_scale:
        assert (weight.main_grad - before).abs().max() > 0.5 * largest, "main_grad is filled in the forward"
    (loss * scale).backward()
    assert (weight.main_grad - before - wanted[1]).abs().max() < 2e-3 * largest
    if scale > 1:  # the others are float16, whose own range is what a loss scale is for
        for gradient, expected in ((hidden.grad, wanted[0]), (bias.grad, wanted[2])):
            assert (gradient - expected).abs().max() < 2e-3 * expected.abs().max()


def test_main_grad_is_left_alone_without_grad():
    hidden, weight = with_main_grad()
    for _, function in functions():
        with torch.no_grad():
            function(hidden, weight, grad_scale=torch.ones(()))
        function(hidden, weight.detach())
        assert (weight.main_grad == 1).all() and weight.grad_added_to_main_grad is False
    with torch.no_grad():
        gathered(hidden, weight)
    gathered(hidden, weight.detach()).backward()
    assert (weight.main_grad == 1).all() and weight.grad_added_to_main_grad is False


@pytest.mark.parametrize("grad_scale", [None, 1.0])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_counts_main_grad_once(reentrant, grad_scale):
    """Checkpointing runs the forward twice, the second time inside the backward."""
    options = {} if grad_scale is None else {"grad_scale": torch.tensor(grad_scale)}
    for name, function in functions() if options else (*functions(), ("gather", gathered)):
        plain_hidden, plain = head(torch.float32)
        function(plain_hidden, plain).backward()
        hidden, weight = with_main_grad()
        loss = checkpoint(
            lambda h, w=weight, f=function: f(torch.tanh(torch.atanh(h / 8)) * 8, w, **options),
            hidden,
            use_reentrant=reentrant,
        )
        assert (weight.main_grad == 1).all() or options, f"{name}: main_grad was touched in the forward"
        loss.backward()
        close([weight.main_grad - 1], [plain.grad], 1e-4)
        assert weight.grad_added_to_main_grad is True, name
        close([hidden.grad], [plain_hidden.grad], 1e-4)


def test_inside_a_compiled_function():
    """A graph break, the same numbers."""
    hidden, weight = head(torch.float32)
    scores = teacher_scores()

    def loss(hidden, weight):
        return linear_distill_loss(torch.tanh(hidden), weight * 2, scores, workspace_bytes=3 * VOCAB * 4).loss * 3

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(loss(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_autocast_changes_nothing():
    hidden, weight = head(torch.float32)
    plain = linear_distill_loss(hidden, weight, teacher_scores())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_distill_loss(hidden, weight, teacher_scores())
        scores = opd_engine.linear_gather_log_probs(hidden, weight, teacher_scores().indices)
    close(cast, plain, 1e-6)
    close(*(torch.autograd.grad(one.loss, (hidden, weight)) for one in (cast, plain)), 1e-6)
    assert scores.log_probs.dtype == torch.float32


def test_chunks_take_turns_in_one_order():
    """Two in flight: the next one has started before the first one goes on; ends come in order."""
    steps = []

    def chunk(number, collectives):
        for step in range(collectives):
            steps.append((number, f"start {step}"))
            yield
        steps.append((number, "end"))

    take_turns((chunk(number, 1) for number in range(3)), 2)
    assert steps == [(0, "start 0"), (1, "start 0"), (0, "end"), (2, "start 0"), (1, "end"), (2, "end")]
    steps.clear()
    take_turns((chunk(number, 2) for number in range(4)), 2)
    assert [number for number, what in steps if what == "end"] == [0, 1, 2, 3]
    numbers = [number for number, _ in steps]
    assert not any(one == other for one, other in itertools.pairwise(numbers[:-1])), (
        "a chunk waited for its own message"
    )
    started, ended = set(), 0
    for number, what in steps:
        started.add(number)
        ended += what == "end"
        assert len(started) - ended <= 2, "a third chunk would overwrite the buffer of one that is not done"
    steps.clear()
    take_turns((chunk(number, 0) for number in range(2)), 1)
    assert steps == [(0, "end"), (1, "end")]
