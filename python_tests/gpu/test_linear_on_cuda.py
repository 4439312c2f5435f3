"""The linear functions on a GPU: products into float32, values and gradients, streams, graphs, recompute, no wait of
the host.

What also makes sense on a CPU runs there as well, once as it is and once with the calls that only a GPU gets: half
precision into float32 by `out_dtype`, held to what torch declares and computed in float32.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import opd_engine
import oracles
from opd_engine import TokenScores, VocabShard
from opd_engine.functional import linear_chunks
from opd_engine.functional.linear_arguments import Head
from tolerances import INFINITE_LOSS, check
from truth.compare import check_scores, mixed_support
from truth.linear_cases import (
    CASES,
    LinearCase,
    check_gradients,
    distill_definition,
    eighths,
    full_definition,
    three_ways,
)
from truth.test_linear_losses import teacher_of
from truth.test_linear_scores import weighed

K = 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
WIDE = LinearCase(
    "wide",
    "96 rows, 1,000 columns, 128 wide: tensor cores, several tiles in rows and in columns",
    hidden=eighths(96, 128, seed=11, spread=0.25),
    weight=eighths(1_000, 128, seed=12, spread=0.25),
    bias=eighths(1_000, seed=13),
    vocab_size=990,
    teacher={
        "hidden": eighths(96, 64, seed=14, spread=0.25),
        "weight": eighths(1_000, 64, seed=15, spread=0.25),
        "bias": None,
        "softcap": None,
        "vocab_size": 990,
    },
)
ALL_CASES = {"bias": CASES["bias"], "softcap": CASES["softcap"], "wide": WIDE}
EACH_CASE = pytest.mark.parametrize("name", ALL_CASES)


def addmm_as_declared(real):
    """torch.addmm with out_dtype on a CPU, which has none: torch reads the call, float32 computes it."""

    def addmm(input, mat1, mat2, *, out_dtype=None, beta=1, out=None):
        if out_dtype is None:
            return real(input, mat1, mat2, beta=beta, out=out)
        shapes = [tensor.to("meta") for tensor in (mat1, mat2, out)]
        real(shapes[2], *shapes[:2], out_dtype=out_dtype, beta=beta, out=shapes[2])
        assert mat1.dtype == mat2.dtype and mat1.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == out.dtype == torch.float32 and input is out, "another tensor would be copied into out"
        out.copy_(torch.addmm(out, mat1.float(), mat2.float(), beta=beta))
        return out

    return addmm


@pytest.fixture(params=["cpu", "cpu_as_cuda", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """Where a test runs; half precision accumulates in float32 throughout, as the oracle's logits do."""
    if request.param == "cpu_as_cuda":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch, "addmm", addmm_as_declared(torch.addmm))
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    products.allow_bf16_reduced_precision_reduction = False
    yield torch.device("cpu" if request.param == "cpu_as_cuda" else request.param)
    products.allow_bf16_reduced_precision_reduction = before


def on(device, values):
    """Tensors of a dict, a TokenScores or a list, on the device; autograd follows."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if isinstance(values, dict):
        return {name: on(device, value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [on(device, value) for value in values]
    if dataclasses.is_dataclass(values):
        fields = {field.name: on(device, getattr(values, field.name)) for field in dataclasses.fields(values)}
        return type(values)(**fields)
    return values


def arguments(case):
    return {
        "bias": case.bias,
        "logit_softcap": case.softcap,
        "temperature": case.temperature,
        "shard": VocabShard(0, case.weight.size(0), case.vocab_size),
    }


def workspaces(case, dtype):
    """Bytes of a few rows, which makes several chunks, and of one, which makes many tiles both ways."""
    row = case.weight.size(0) * dtype.itemsize
    return (5 * row, row)


def compare_losses(where, dtype, ours, case, definitions, leaves):
    """ours(weights, workspace_bytes) -> LinearLoss of case's leaves; definitions, leaves: of oracle and eager torch."""
    true_losses, plain_losses = (definition() for definition in definitions)
    weights = torch.arange(len(true_losses)) % 5 / 4.0  # 0 among them
    weights = torch.where(true_losses.detach() < INFINITE_LOSS, weights, 0.0)
    wanted = []
    for losses, at in zip((true_losses, plain_losses), leaves, strict=True):
        total = torch.where(weights == 0, 0.0, losses * weights.to(losses.dtype)).sum()
        wanted.append(torch.autograd.grad(total * 0.5, at))
    for workspace_bytes in workspaces(case, dtype):
        got = ours(weights, workspace_bytes)
        check("loss", dtype, got.token_losses.cpu(), true_losses, plain_losses, where)
        check_gradients(where, dtype, torch.autograd.grad(got.loss * 0.5, case.leaves()), *wanted)


@EACH_CASE
@DTYPES
def test_distill_loss(name, dtype, device):
    true, eager = three_ways(ALL_CASES[name], dtype)
    case = ALL_CASES[name].cast(dtype).require_grad()
    ids = mixed_support(K, case.vocab_size, (len(case.hidden),))
    teacher, constant = teacher_of(case.cast(torch.float64), ids, dtype)
    for setting in ({"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.3, "tail": "renormalize"}):

        def ours(weights, workspace_bytes, setting=setting):
            return opd_engine.linear_distill_loss(
                *on(device, (case.hidden, case.weight, teacher)),
                token_weights=weights.to(device),
                workspace_bytes=workspace_bytes,
                **on(device, arguments(case)),
                **setting,
            )

        definitions = [
            distill_definition(at, ids, constant, model_dtype, **setting)
            for at, model_dtype in ((true, dtype), (eager, None))
        ]
        where = f"{device} distill {name} {setting}"
        compare_losses(where, dtype, ours, case, definitions, (true.leaves(), eager.leaves()))


@EACH_CASE
@DTYPES
def test_full_distill_loss(name, dtype, device):
    true, eager = three_ways(ALL_CASES[name], dtype)
    case = ALL_CASES[name].cast(dtype).require_grad()
    for divergence in ("reverse_kl", "jsd"):

        def ours(weights, workspace_bytes, divergence=divergence):
            teacher = on(device, case.teacher)
            return opd_engine.linear_full_distill_loss(
                *on(device, (case.hidden, case.weight)),
                *(teacher["hidden"], teacher["weight"]),
                teacher_bias=teacher["bias"],
                teacher_logit_softcap=teacher["softcap"],
                teacher_vocab_size=teacher["vocab_size"],
                token_weights=weights.to(device),
                workspace_bytes=2 * workspace_bytes,  # two heads share it
                divergence=divergence,
                **on(device, arguments(case)),
            )

        definitions = [
            full_definition(at, model_dtype, divergence=divergence)
            for at, model_dtype in ((true, dtype), (eager, None))
        ]
        where = f"{device} full {name} {divergence}"
        compare_losses(where, dtype, ours, case, definitions, (true.leaves(), eager.leaves()))


@EACH_CASE
@DTYPES
def test_scores(name, dtype, device):
    """Logits within one rounding of the oracle's (a soft-cap's tanh is the device's); scores exact of these logits."""
    true, eager = three_ways(ALL_CASES[name], dtype)
    case = ALL_CASES[name].cast(dtype).require_grad()
    on_device = on(device, (case.hidden, case.weight))
    head = Head(on_device[1].detach(), on(device, arguments(case))["bias"], case.softcap)
    with torch.no_grad():
        z = linear_chunks.ChunkLogits(head, len(case.hidden), with_gradient=False).compute(on_device[0])
    z = z.cpu().double()
    torch.testing.assert_close(z, true.logits(dtype).detach(), rtol=max(torch.finfo(dtype).eps, 5e-7), atol=1e-7)
    ids = mixed_support(K, case.vocab_size, (len(case.hidden),))
    target = torch.arange(len(case.hidden)) * 7 % 50
    rest = (target, case.vocab_size, case.temperature)
    compute = oracles.score_dtype(dtype)
    for workspace_bytes in workspaces(case, dtype):
        options = {**on(device, arguments(case)), "target": target.to(device), "workspace_bytes": workspace_bytes}
        top = opd_engine.linear_topk_log_probs(*on_device, K, **options)
        oracle, plain = oracles.topk_scores(z, K, *rest), oracles.topk_scores(z, K, *rest, compute)
        assert torch.equal(top.indices.cpu(), oracle.indices)
        check_scores(f"{device} topk {name}", dtype, on("cpu", top), oracle, plain)
        got = on("cpu", opd_engine.linear_gather_log_probs(*on_device, ids.to(device), **options))
        oracle, plain = oracles.gather_scores(z, ids, *rest), oracles.gather_scores(z, ids, *rest, compute)
        check_scores(f"{device} gather {name}", dtype, got, oracle, plain)
        graphs = (
            (got, case),
            (oracles.gather_scores(true.logits(dtype), ids, *rest), true),
            (oracles.gather_scores(eager.logits(None), ids, *rest, compute), eager),
        )
        grads = [torch.autograd.grad(weighed(scores), at.leaves(), retain_graph=True) for scores, at in graphs]
        check_gradients(f"{device} gather {name}", dtype, *grads)
        assert not grads[0][1][case.vocab_size :].any(), "a row of padding has a gradient"


PRODUCTS = [(96, 1_000, 128), (7, 61, 24), (1, 64, 1), (5, 0, 8), (0, 16, 8)]  # rows, columns of logits, hidden size


@pytest.mark.parametrize("rows, columns, size", PRODUCTS)
def test_products_add_to_float32_in_place(rows, columns, size, device):
    """Into a slice of an accumulator, whose other rows stay: exact, because all factors are small multiples of 1/8."""
    grad, weight, hidden = (
        part.to(device, torch.bfloat16)
        for part in (eighths(rows, columns, seed=1), eighths(columns, size, seed=2), eighths(rows, size, seed=3))
    )
    for accumulate in (False, True):
        whole = torch.full((rows + 2, size), 0.5, device=device)
        linear_chunks.multiply_wide(grad, weight, whole[1 : rows + 1], accumulate=accumulate)
        wanted = (grad.double() @ weight.double()).float() + 0.5 * accumulate
        assert torch.equal(whole[1 : rows + 1], wanted) and (whole[[0, -1]] == 0.5).all()
        whole = torch.full((columns + 2, size), 0.5, device=device)
        linear_chunks.multiply_transposed_wide(grad, hidden, whole[1 : columns + 1], accumulate=accumulate)
        wanted = (grad.double().t() @ hidden.double()).float() + 0.5 * accumulate
        assert torch.equal(whole[1 : columns + 1], wanted) and (whole[[0, -1]] == 0.5).all()


# ---- Calls of every function, on tensors of the device ---------------------------------------------------------------
ROWS, HIDDEN, VOCAB = 40, 32, 500


@dataclasses.dataclass
class Inputs:
    """One set of everything; eighths, so that logits are the same in any order of accumulation."""

    hidden: torch.Tensor
    weight: torch.Tensor
    ids: torch.Tensor
    teacher: TokenScores
    theirs: list[torch.Tensor]  # the other model's hidden states and head
    options: dict

    def leaves(self):
        return self.hidden, self.weight


def make_inputs(device, dtype=torch.bfloat16, seed=0):
    hidden = eighths(ROWS, HIDDEN, seed=seed + 1, spread=0.25).to(device, dtype).requires_grad_()
    weight = eighths(VOCAB, HIDDEN, seed=seed + 2, spread=0.25).to(device, dtype).requires_grad_()
    ids = mixed_support(K, VOCAB, (ROWS,), seed=seed + 3)
    scores = oracles.gather_scores(eighths(ROWS, VOCAB, seed=seed + 4), ids)
    teacher = TokenScores(indices=ids, log_probs=scores.log_probs.float(), tail_log_prob=scores.tail_log_prob.float())
    theirs = [part.to(dtype) for part in (eighths(ROWS, 16, seed=seed + 5), eighths(VOCAB, 16, seed=seed + 6))]
    kept = torch.tensor([30, 2, 3, 17, 11, 39, 0])
    options = {
        "token_weights": torch.linspace(0.25, 1.0, ROWS),
        "loss_rows": kept,
        "temperature": torch.linspace(0.5, 2.0, ROWS),
        "workspace_bytes": 6 * VOCAB * dtype.itemsize,
    }
    return Inputs(hidden, weight, *on(device, (ids, teacher, theirs, options)))


def distill(of, **more):
    return opd_engine.linear_distill_loss(of.hidden, of.weight, of.teacher, **of.options, **more).loss


def full(of, **more):
    return opd_engine.linear_full_distill_loss(of.hidden, of.weight, *of.theirs, **of.options, **more).loss


def gather(of):
    rest = {name: of.options[name] for name in ("temperature", "workspace_bytes")}
    scores = opd_engine.linear_gather_log_probs(of.hidden, of.weight, of.ids, **rest)
    return torch.where(of.ids >= 0, scores.log_probs, 0).sum() + scores.tail_log_prob.sum() - scores.lse.sum()


def topk(of):
    rest = {name: of.options[name] for name in ("temperature", "workspace_bytes")}
    scores = opd_engine.linear_topk_log_probs(of.hidden, of.weight, K, **rest)
    return [scores.indices, scores.log_probs, scores.tail_log_prob, scores.lse, scores.entropy]


LOSSES = {"distill": distill, "full": full, "gather": gather}


def everything(of):
    """Each function forward, and backward where it has one."""
    results = topk(of)
    for loss_of in LOSSES.values():
        loss = loss_of(of)
        results += [loss.detach(), *torch.autograd.grad(loss, of.leaves())]
    return results


def close(ours, wanted, tolerance=1e-5):
    """By the largest element; a GPU's products may round their last bit another way in another call."""
    for number, (got, want) in enumerate(zip(ours, wanted, strict=True)):
        if not want.is_floating_point():
            assert torch.equal(got, want), number
            continue
        allowed = 2.0**-7 if want.dtype == torch.bfloat16 else tolerance
        error = (got.float() - want.float()).abs().nan_to_num(0.0, posinf=0.0).max()
        assert torch.equal(got.isfinite(), want.isfinite()), number
        assert error <= allowed * want[want.isfinite()].float().abs().max(), (number, float(error))


@contextlib.contextmanager
def no_wait_of_the_host(device):
    """On a GPU, whatever torch makes the host wait for raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def with_main_grad(of):
    of.weight.main_grad = torch.ones(of.weight.shape, device=of.weight.device)
    of.weight.grad_added_to_main_grad = False
    return of


def test_the_host_waits_for_nothing(device):
    """loss_rows, weights, temperatures and grad_scale are on the device, and so is what they say."""
    wanted = everything(make_inputs(device))
    of = make_inputs(device)
    with no_wait_of_the_host(device):
        got = everything(of)
    close(got, wanted)
    for name in ("distill", "full"):
        of, scale = with_main_grad(make_inputs(device)), torch.tensor(0.5, device=device)
        plain = make_inputs(device)
        (LOSSES[name](plain) * 0.5).backward()
        with no_wait_of_the_host(device):
            (LOSSES[name](of, grad_scale=scale) * 0.5).backward()
        close([of.weight.main_grad - 1, of.hidden.grad], [plain.weight.grad.float(), plain.hidden.grad], 2.0**-8)
        assert of.weight.grad_added_to_main_grad is True and not of.weight.grad.any()


@pytest.mark.cuda
def test_the_watch_on_the_host_sees_a_wait():
    device = torch.device("cuda")
    value = torch.ones(3, device=device)
    with no_wait_of_the_host(device), pytest.raises(RuntimeError, match="synchroniz"):
        value.sum().item()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["distill", "distill grad_scale", "full", "full grad_scale", "gather"])
def test_recompute_counts_main_grad_once(name, reentrant, device):
    function, _, scaled = name.partition(" ")
    scale = {"grad_scale": torch.ones((), device=device)} if scaled else {}
    plain, of = make_inputs(device), with_main_grad(make_inputs(device))
    wanted = LOSSES[function](dataclasses.replace(plain, hidden=plain.hidden.square()))
    wanted.backward()

    def recomputed(hidden):  # the square saves its input, so that its backward asks for the forward again
        return LOSSES[function](dataclasses.replace(of, hidden=hidden.square()), **scale)

    loss = checkpoint(recomputed, of.hidden, use_reentrant=reentrant)
    assert scaled or (of.weight.main_grad == 1).all()
    loss.backward()
    close([loss.detach(), of.hidden.grad], [wanted.detach(), plain.hidden.grad])
    close([of.weight.main_grad - 1], [plain.weight.grad.float()], 2.0**-8)


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOSSES)
def test_inside_a_compiled_function(name):
    of = make_inputs(torch.device("cuda"))

    def loss(hidden, weight):
        return LOSSES[name](dataclasses.replace(of, hidden=hidden * 2, weight=weight * 0.5)) * 3

    torch._dynamo.reset()
    got, wanted = (function(*of.leaves()) for function in (torch.compile(loss), loss))
    close([got.detach()], [wanted.detach()])
    close(*(torch.autograd.grad(one, of.leaves()) for one in (got, wanted)))


@pytest.mark.cuda
def test_a_side_stream_sees_its_own_work():
    """Hidden states and head arrive on a side stream, behind a long wait: another stream would read zeros."""
    device = torch.device("cuda")
    expected, ready = everything(make_inputs(device)), make_inputs(device)
    late = dataclasses.replace(
        ready, hidden=torch.zeros_like(ready.hidden).detach(), weight=torch.zeros_like(ready.weight).detach()
    )
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for mine, theirs in zip(late.leaves(), ready.leaves(), strict=True):
            mine.copy_(theirs.detach())
            mine.requires_grad_()
        got = everything(late)
    stream.synchronize()
    close(got, expected)


@pytest.mark.cuda
def test_a_graph_replays_on_new_hidden_states():
    device = torch.device("cuda")
    static = make_inputs(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            everything(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(static)
    for seed in (0, 100):
        fresh = make_inputs(device, seed=seed)
        with torch.no_grad():
            static.hidden.copy_(fresh.hidden)
        graph.replay()
        torch.cuda.synchronize()
        close(captured, everything(dataclasses.replace(static, hidden=fresh.hidden)))
