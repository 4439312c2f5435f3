"""What only a GPU shows: streams, graphs, compilation, recompute, memory, 2^31 elements, two ranks on one device."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import opd_engine
import oracles
from opd_engine import ops as opd_ops
from opd_engine.bench import machine
from opd_engine.bench.timing import Impl, interleave
from ranks import run_ranks
from truth import shapes
from truth.test_ops import REGISTERED, sample_arguments

pytestmark = pytest.mark.cuda
OPS = torch.ops.opd_engine
ROWS, VOCAB, K = 64, 50_257, 64


@pytest.fixture(scope="module")
def logits():
    return shapes.quantised(ROWS, VOCAB, 3).to("cuda", torch.bfloat16)


def on_device(values):
    return tuple(value.cuda() if isinstance(value, torch.Tensor) else value for value in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, dtype):
    arguments = on_device(sample_arguments(dtype)[name])
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def loss_and_gradient(logits, ids, teacher):
    """Forward and backward through the functional API."""
    leaf = logits.detach().requires_grad_()
    student = opd_engine.gather_log_probs(leaf, ids)
    loss = opd_engine.distill_loss(student, teacher, divergence="jsd")
    return loss, torch.autograd.grad(loss.sum(), leaf)[0]


def test_a_side_stream_sees_its_own_work(logits):
    """Logits made on a side stream, behind a long wait: a launch on another stream would read the old ones."""
    expected = opd_engine.topk_log_probs(logits, K)
    late, stream = torch.zeros_like(logits), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(logits)
        got = opd_engine.topk_log_probs(late, K)
    stream.synchronize()
    assert torch.equal(got.indices, expected.indices) and torch.equal(got.tail_log_prob, expected.tail_log_prob)


def test_a_graph_replays_on_new_logits(logits):
    teacher = opd_engine.topk_log_probs(logits.flip(0), K)
    ids = teacher.indices
    static = torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            loss_and_gradient(static * 1, ids, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        top = opd_engine.topk_log_probs(static, K)
        loss, gradient = loss_and_gradient(static * 1, ids, teacher)
    for shift in (0, 7):
        static.copy_(logits.roll(shift, 0))
        graph.replay()
        torch.cuda.synchronize()
        expected_loss, expected_gradient = loss_and_gradient(logits.roll(shift, 0), ids, teacher)
        assert torch.equal(top.indices, opd_engine.topk_log_probs(logits.roll(shift, 0), K).indices)
        assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient)


def test_a_benchmark_times_the_replay_of_a_graph(logits):
    buffers = [logits.roll(shift, 0) for shift in range(3)]
    impl = Impl("opd_engine", lambda z: opd_engine.topk_log_probs(z, K), prepare=buffers.__getitem__, graph=True)
    ((first, *_),) = interleave([impl], num_buffers=3, device=logits.device, seconds=0, min_rounds=2)
    assert first > 0
    assert machine.clocks_mhz(logits.device)["sm"] > 0


def test_compiled_and_recomputed_equal_eager(logits):
    teacher = opd_engine.topk_log_probs(logits.flip(0), K)
    loss, gradient = loss_and_gradient(logits, teacher.indices, teacher)
    compiled = torch.compile(lambda z: OPS.gather_log_probs(z, teacher.indices, None, VOCAB, 1.0, None)[1])
    assert torch.equal(compiled(logits), opd_engine.gather_log_probs(logits, teacher.indices).tail_log_prob)
    leaf = logits.detach().requires_grad_()

    def per_token(z):
        student = opd_engine.gather_log_probs(z, teacher.indices)
        return opd_engine.distill_loss(student, teacher, divergence="jsd")

    again = checkpoint(per_token, leaf, use_reentrant=False)
    again.sum().backward()
    assert torch.equal(again, loss) and torch.equal(leaf.grad, gradient)


def test_nothing_of_the_logits_size_is_allocated(logits):
    teacher = opd_engine.topk_log_probs(logits, K)
    size = logits.numel() * logits.element_size()

    def peak(run):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / size

    def inplace():
        mine = opd_engine.gather_log_probs(held * 1, teacher.indices, inplace_backward=True)
        opd_engine.distill_loss(mine, teacher).sum().backward()

    held = logits.detach().clone().requires_grad_()
    assert peak(lambda: opd_engine.topk_log_probs(logits, K)) < 0.1
    assert peak(lambda: opd_engine.gather_log_probs(logits, teacher.indices)) < 0.1
    assert peak(lambda: loss_and_gradient(logits, teacher.indices, teacher)) < 1.1
    assert peak(inplace) < 2.1  # the product it overwrites, and the leaf's own gradient


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    rows, width = 17_000, 131_072  # 2.2e9 elements: a 32-bit offset wraps
    logits = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    logits[-1, 5], logits[-1, -1], logits[0, 7] = 3, 4, 2
    scores = opd_engine.topk_log_probs(logits, 2)
    assert scores.indices[-1].tolist() == [width - 1, 5] and scores.indices[0].tolist() == [7, 0]
    upstream = torch.zeros(rows, 6, device="cuda")
    upstream[-1, 0] = 1
    gathered = OPS.gather_log_probs(logits, scores.indices, None, width, 1.0, None)
    OPS.scores_backward_(logits, scores.indices, None, gathered[5], upstream, 0, width, 1.0, None)
    assert logits[-1, -1] > 0 and logits[-1, 5] < 0 and not logits[:-1].any()


def test_random_rows_need_one_read(logits):
    """The sampled floor misses next to never; constant rows are what the counter is for."""
    many = shapes.quantised(512, VOCAB, 9).to("cuda", torch.bfloat16)
    opd_ops.take_topk_fallbacks()
    opd_engine.topk_log_probs(many, K)
    assert opd_ops.take_topk_fallbacks() <= 5
    opd_engine.topk_log_probs(torch.zeros(512, VOCAB, device="cuda"), K)
    assert opd_ops.take_topk_fallbacks() == 512


def two_ranks_on_one_gpu():
    """Loss and gradient of this rank's shard against the whole, both on the device."""
    import torch.distributed as dist

    rank = dist.get_rank()
    whole = shapes.quantised(8, 1_000, 1).cuda()
    teacher = opd_engine.topk_log_probs(shapes.quantised(8, 1_000, 2).cuda().float(), 16)
    expected, full_gradient = loss_and_gradient(whole.float(), teacher.indices, teacher)
    start, end = ((0, 600), (600, 1_000))[rank]
    leaf = whole[:, start:end].float().contiguous().requires_grad_()
    shard = opd_engine.VocabShard(start, end, 1_000, dist.group.WORLD)
    student = opd_engine.gather_log_probs(leaf, teacher.indices, shard=shard)
    loss = opd_engine.distill_loss(student, teacher, divergence="jsd")
    loss.sum().backward()
    top = opd_engine.topk_log_probs(leaf.detach(), 16, shard=shard)
    assert torch.equal(top.indices, opd_engine.topk_log_probs(whole.float(), 16).indices)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, full_gradient[:, start:end], rtol=1e-5, atol=1e-7)
    return True


def test_two_processes_share_the_gpu():
    assert run_ranks(__file__, "two_ranks_on_one_gpu", 2) == [True, True]


SMALL = """
import torch, opd_engine
for dtype in (torch.float32, torch.bfloat16):
    z = torch.randn(3, 5003, device="cuda", dtype=dtype).requires_grad_()
    teacher = opd_engine.topk_log_probs(z.detach().flip(0), 8)
    s = opd_engine.gather_log_probs(z, teacher.indices)
    opd_engine.distill_loss(s, teacher).sum().backward()
    opd_engine.full_distill_loss(z, z.detach().flip(0)).sum().backward()
    w = torch.ones(3, device="cuda")
    args = (z.detach().clone(), teacher.indices, teacher.log_probs, teacher.tail_log_prob, w)
    torch.ops.opd_engine.distill_loss_(*args, "reverse_kl", 0.5, 0.1, "bucket", None, 5003, 1.0, None)
    hidden = torch.randn(7, 16, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(301, 16, device="cuda", dtype=dtype).requires_grad_()
    rest = {"logit_softcap": 5.0, "workspace_bytes": 5 * 301 * dtype.itemsize}
    teacher = opd_engine.linear_topk_log_probs(hidden, weight, 8, **rest)
    opd_engine.linear_gather_log_probs(hidden, weight, teacher.indices, **rest).log_probs.sum().backward()
    opd_engine.linear_distill_loss(hidden, weight, teacher, **rest).loss.backward()
    opd_engine.linear_full_distill_loss(hidden, weight, hidden.detach(), weight.detach(), **rest).loss.backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool, at_most):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    # Fewer launches to watch: ours alone.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=opd", sys.executable, "-c"]
    with at_most(120) as seconds:
        done = subprocess.run([*command, SMALL], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_oracle_agrees_at_full_width():
    """151,936 columns, eight shards: ids, tails and gradients of one merged result."""
    whole = shapes.quantised(4, 151_936, 11).to("cuda", torch.bfloat16)
    oracle = oracles.topk_scores(whole.cpu(), K, None, 151_936, 1.0)
    width = 151_936 // 8
    packed = [
        OPS.topk_partials(whole[:, i * width : (i + 1) * width], K, None, i * width, 151_936, 1.0, None)
        for i in range(8)
    ]
    ids, log_probs, tail, *_ = OPS.merge_topk(torch.stack(packed), K, None, 151_936, 1.0, None)
    assert torch.equal(ids.cpu(), oracle.indices)
    torch.testing.assert_close(log_probs.cpu().double(), oracle.log_probs.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tail.cpu().double(), oracle.tail_log_prob.double(), rtol=1e-6, atol=5e-7)
