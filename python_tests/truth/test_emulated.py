"""Every CUDA kernel, run in the emulator from the files nvcc compiles: the truth tests of the CPU kernels on it, its
rows that hurt a threshold, its shuffled schedules, and mistakes planted in its source.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import emulated
import opd_engine  # noqa: F401  (registers the ops compared with)
import oracles
from ranks import ROOT, TESTS, python_environment
from truth import shapes

# One dtype of each width of a pack; rows cut into pieces, misaligned, masked, padded, tied, empty, k = 1 and k = vocab.
SUITES = {
    "scores": ["truth/test_scores.py", "-k", "not float64 and not float16 or bfloat16 and not gradcheck"],
    "tails": ["truth/test_tail.py", "-k", "not float64 and (student or peaked or flat or mass)"],
    # The same sums in another order where rows start elsewhere in a 16-byte line: bits may differ, values not.
    "conventions": ["truth/test_conventions.py", "-k", "not threads and not (inplace and misaligned)"],
    "divergences": ["truth/test_divergences.py", "-k", "bfloat16 and (few_finite or padded) and mixed"],
    "full": ["truth/test_full.py", "-k", "not float64 and (masked or peaked or padded or widths or k_1)"],
    "ops": ["truth/test_ops.py", "ops/test_kernels.py", "-k", "(masked or ragged or gap or shards) and not dtype0"],
    "edges": ["functional/test_edges.py", "functional/test_edge_rows.py", "-k", "float32 or bfloat16"],
    # A chunk's or a tile's logits, as the functions of hidden states and a head hand them over.
    "linear": [
        *("truth/test_linear_losses.py", "truth/test_linear_scores.py"),
        "-k",
        "bfloat16 and (plain or softcap)",
    ],
}


def run(suite, library=emulated.LIBRARY, seed=0):
    environment = python_environment(OPD_EMULATOR_LIBRARY=library, OPD_EMULATOR_SEED=seed)
    arguments = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "emulated", "-p", "no:cacheprovider", *SUITES[suite]]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400, cwd=TESTS)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_truth_on_the_emulated_kernels(suite):
    done = run(suite)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def emulated_ops():
    return emulated.load()


def take_fallbacks():
    """Rows whose sampled floor missed since the last call."""
    kernels = ctypes.CDLL(str(emulated.LIBRARY.with_name("opd_emulated_kernels.so")))
    return kernels._ZN3opd4cuda19take_topk_fallbacksEv()


def topk(ops, logits, k):
    vocab_size = logits.shape[-1]
    packed = ops.topk_partials(logits, k, None, 0, vocab_size, 1.0, None)
    return ops.merge_topk(packed[None], k, None, vocab_size, 1.0, None)[:5]


PATTERNS = {
    "random": lambda z: z,
    "ascending": lambda z: z.sort(-1).values,
    "descending": lambda z: z.sort(-1, descending=True).values,
    "constant": lambda z: torch.full_like(z, 0.5),
    "periodic": lambda z: z[:, torch.arange(z.shape[-1]) % 997],
    "spiky": lambda z: torch.where(torch.arange(z.shape[-1]) % 4001 == 7, z + 40, z),
    "clustered": lambda z: torch.where(torch.arange(z.shape[-1]) // 500 == 11, z + 40, z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_that_hurt_a_threshold(emulated_ops, pattern, dtype):
    """Ids equal and values as close as the CPU's, one read or not: only constant rows may need another."""
    rows = shapes.quantised(9, 50_257, 3)  # nine rows: more than half the blocks, so none is cut
    logits = PATTERNS[pattern](rows).to(dtype)
    for k in (1, 64, 1024):
        take_fallbacks()
        ours = topk(emulated_ops, logits, k)
        missed = take_fallbacks()
        cpu = topk(torch.ops.opd_engine, logits, k)
        assert torch.equal(ours[0], cpu[0])
        for mine, other in zip(ours[1:], cpu[1:]):
            torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)
        assert missed == (9 if pattern == "constant" else 0) or pattern in ("periodic", "spiky", "clustered")


@pytest.mark.parametrize("rows, width", [(1, 151_936), (3, 50_257), (2, 8_192), (5, 4_097)])
def test_few_rows_are_cut_into_pieces(emulated_ops, rows, width):
    logits = shapes.quantised(rows, width, 5).to(torch.bfloat16)
    logits[0, width // 2] = -torch.inf
    ids = oracles.topk_ids(logits, 64)
    target = torch.full((rows,), width - 1)
    for ours, cpu in zip(topk(emulated_ops, logits, 64), topk(torch.ops.opd_engine, logits, 64)):
        torch.testing.assert_close(ours, cpu, rtol=2e-6, atol=2e-6)
    whole = [ops.topk_log_probs(logits, 64, target, width, 0.7, None) for ops in (emulated_ops, torch.ops.opd_engine)]
    for ours, cpu in zip(*whole):
        torch.testing.assert_close(ours, cpu, rtol=2e-6, atol=2e-6)
    arguments = (logits, ids, target, width, 0.7, None)
    gathered = [ops.gather_log_probs(*arguments) for ops in (emulated_ops, torch.ops.opd_engine)]
    for ours, cpu in zip(*gathered):
        torch.testing.assert_close(ours, cpu, rtol=2e-6, atol=2e-6)
    upstream = torch.randn(rows, 68)
    grads = [
        ops.scores_backward(logits, ids, target, scores[5], upstream, 0, width, 0.7, None)
        for ops, scores in zip((emulated_ops, torch.ops.opd_engine), gathered)
    ]
    torch.testing.assert_close(*grads, rtol=0.01, atol=1e-6)
    teacher, weights = (gathered[1][0] - 0.125, gathered[1][1]), torch.tensor([0.5, 0.0, 1.5, 1.0, 1.0])[:rows]
    options = ("reverse_kl", 0.5, 0.1, "bucket", None, width, 0.7, None)
    fused = []
    for ops in (emulated_ops, torch.ops.opd_engine):
        gradient = logits.clone()
        fused.append((ops.distill_loss_(gradient, ids, *teacher, weights, *options), gradient))
    for ours, cpu in zip(*fused):
        torch.testing.assert_close(ours, cpu, rtol=0.01 if ours.dtype == torch.bfloat16 else 2e-6, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("k", [64, 1_024])
def test_a_vocabulary_of_a_million(emulated_ops, rows, k):
    """2^20 columns, the last one the largest: one row is cut into many pieces, twelve into few."""
    width = 1 << 20
    logits = (torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) * 4).to(torch.bfloat16)
    logits[:, -1] = 40.0
    ids, *values = topk(emulated_ops, logits, k)
    cpu_ids, *cpu_values = topk(torch.ops.opd_engine, logits, k)
    assert torch.equal(ids, cpu_ids) and (ids[:, 0] == width - 1).all()
    gathered = emulated_ops.gather_log_probs(logits, ids, None, width, 1.0, None)
    for ours, again, cpu in zip(values, gathered, cpu_values):
        torch.testing.assert_close(ours, cpu, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(again, cpu, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_bit_depends_on_the_order_in_which_threads_run(emulated_ops, seed, monkeypatch):
    """A missing barrier shows here: threads of a block run in another order each time."""
    logits = PATTERNS["periodic"](shapes.quantised(3, 6_001, 9)).float()
    logits[1] = 0.25
    ids = oracles.topk_ids(logits, 40)

    def everything():
        scores = emulated_ops.gather_log_probs(logits, ids, None, 6_001, 1.0, None)
        fused = logits.clone()
        teacher, weights = scores[0] - 0.125, torch.ones(3)
        options = ("jsd", 0.5, 0.1, "bucket", None, 6_001, 1.0, None)
        loss = emulated_ops.distill_loss_(fused, ids, teacher, scores[1], weights, *options)
        return *topk(emulated_ops, logits, 40), *scores[:4], loss, fused

    plain = everything()
    monkeypatch.setenv("OPD_EMULATOR_SEED", str(seed))
    for one, other in zip(plain, everything()):
        assert torch.equal(one, other)


# file, what is changed, what it becomes, the suite that must see it
PLANTED = {
    "a removed barrier": (
        "statistics.cuh",
        "  if (lane == 0) shared[warp] = mine;\n  __syncthreads();\n  Statistics total",
        "  if (lane == 0) shared[warp] = mine;\n  Statistics total",
        "scores",
    ),
    "a removed merge term": (
        "statistics.cuh",
        "fmaf(factor, fmaf(y, other.sum, other.weighted), weighted)",
        "fmaf(factor, other.weighted, weighted)",
        "scores",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_seen(mistake, tmp_path):
    file, right, wrong, suite = PLANTED[mistake]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/kernels/cuda" / file
    text = source.read_text()
    assert text.count(right) == 1, f"{file} no longer holds what this test changes"
    source.write_text(text.replace(right, wrong))
    library = tmp_path / emulated.LIBRARY.name
    shutil.copy(emulated.LIBRARY, library)  # finds the kernels beside itself
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-pthread", f"-I{tmp_path / 'csrc'}"]
    command += [tmp_path / "csrc/emulator/kernels_emulated.cpp", "-o", tmp_path / "opd_emulated_kernels.so"]
    subprocess.run(command, check=True)
    done = run(suite, library, seed=7)
    assert done.returncode == 1, f"{mistake}: the suite stayed green\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
    assert re.search(r"\d+ failed", done.stdout)
