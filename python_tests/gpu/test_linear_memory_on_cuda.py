"""What the linear functions take of a GPU's memory where logits would be 1 GiB, by torch's allocator: the workspace,
the weight's gradient and O(T k)."""

import pytest
import torch

import opd_engine
from opd_engine import TokenScores
from opd_engine.functional.linear_chunks import multiply_transposed_wide

pytestmark = pytest.mark.cuda
MANY_ROWS, MANY_COLUMNS, SIZE, SUPPORT = 4_096, 131_072, 256, 64
LOGITS, WORKSPACE = MANY_ROWS * MANY_COLUMNS * 2, 64 << 20
RETURNED = MANY_COLUMNS * SIZE * 2  # the weight's gradient in bfloat16
ACCUMULATOR = 2 * RETURNED  # in float32
OF_ROWS = MANY_ROWS * (SIZE * 8 + SUPPORT * 48)  # hidden gradient and its rounding; scores, ids, upstream gradients
SLACK = 16 << 20

# Beside what the caller holds, main_grad with it. Without main_grad a loss rounds its accumulator last, when the
# workspace is free again.
PEAKS = {
    "topk": WORKSPACE,
    "gather": WORKSPACE + RETURNED,
    "gather main_grad": WORKSPACE,
    "distill": max(WORKSPACE, RETURNED) + ACCUMULATOR,
    "distill main_grad": WORKSPACE + ACCUMULATOR,
    "distill grad_scale": WORKSPACE,
    "full": max(WORKSPACE, RETURNED) + ACCUMULATOR,
    "full grad_scale": WORKSPACE,
}


def peak_of(call):
    """Bytes that torch's allocator hands out at most, above what it had before; called once before, for libraries."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module")
def large():
    """Hidden states, weight, ids, a teacher's scores, another model's hidden states and head; all on the GPU."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(MANY_ROWS, SIZE, **options).requires_grad_()
    weight = (torch.randn(MANY_COLUMNS, SIZE, **options) / 8).requires_grad_()
    ids = (
        torch.arange(SUPPORT, device="cuda") * 1_000 + torch.arange(MANY_ROWS, device="cuda")[:, None]
    ) % MANY_COLUMNS
    log_probs = torch.full((MANY_ROWS, SUPPORT), -5.0, device="cuda")
    tail = torch.full((MANY_ROWS,), -0.6, device="cuda")
    teacher = TokenScores(indices=ids, log_probs=log_probs, tail_log_prob=tail)
    theirs = torch.randn(MANY_ROWS, 16, **options), torch.randn(MANY_COLUMNS, 16, **options)
    return hidden, weight, teacher, theirs


@pytest.mark.parametrize("what", PEAKS)
def test_the_peak_is_the_workspace_and_the_weights_gradient(what, large):
    function, _, target = what.partition(" ")
    hidden, weight, teacher, theirs = large
    weight = weight.detach().requires_grad_()
    scale = {}
    if target:
        weight.main_grad = torch.zeros(weight.shape, device="cuda")
        weight.grad_added_to_main_grad = False
    if target == "grad_scale":
        scale = {"grad_scale": torch.ones((), device="cuda")}

    def call():
        if function == "topk":
            opd_engine.linear_topk_log_probs(hidden, weight, SUPPORT, workspace_bytes=WORKSPACE)
            return
        if function == "gather":
            scores = opd_engine.linear_gather_log_probs(hidden, weight, teacher.indices, workspace_bytes=WORKSPACE)
            loss = scores.log_probs.sum() + scores.tail_log_prob.sum()
        else:
            linear = opd_engine.linear_distill_loss if function == "distill" else opd_engine.linear_full_distill_loss
            constant = (teacher,) if function == "distill" else theirs
            loss = linear(hidden, weight, *constant, workspace_bytes=WORKSPACE, **scale).loss
        torch.autograd.grad(loss, (hidden, weight))

    grown, allowed = peak_of(call), PEAKS[what] + OF_ROWS + SLACK
    print(f"{what}: {grown / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f}")
    assert grown <= allowed, f"{grown / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
    assert WORKSPACE / 2 < grown < LOGITS / 2, "the test measures nothing"


def test_a_path_through_the_logits_is_seen(large):
    """The control: the same scores through logits."""
    hidden, weight, teacher, _ = large
    assert peak_of(lambda: opd_engine.gather_log_probs((hidden @ weight.t()).detach(), teacher.indices)) >= LOGITS


def test_products_take_no_memory(large):
    """An accumulator that is both `input` and `out` is not copied."""
    hidden, weight, *_ = large
    into = torch.zeros(weight.shape, device="cuda")
    grad = torch.randn(64, MANY_COLUMNS, device="cuda", dtype=torch.bfloat16)
    rows = hidden.detach()[:64]
    assert peak_of(lambda: multiply_transposed_wide(grad, rows, into, accumulate=True)) < SLACK
