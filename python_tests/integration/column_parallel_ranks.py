"""What each rank runs for test_column_parallel.py: Megatron's tied embedding and head around the engine's losses.

tokens -> VocabParallelEmbedding -> tanh -> ColumnParallelLinear with the embedding's own weight -> loss. The
embedding's gradient holds both uses of the weight and every hidden-state reduction, so that a loss whose backward
sums, divides or forgets something shows there. The reference is one dense matrix in one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import opd_engine
import oracles
import tolerances
from integration import megatron_cpu
from opd_engine import VocabShard
from tolerances import NAMES, Mismatch, check

# Megatron pads the vocabulary to a multiple; the padding rows hold weights like any others.
VOCAB_SIZE, PADDED_VOCAB_SIZE, HIDDEN, SEQUENCE, BATCH, K = 117, 128, 24, 8, 3, 9


@dataclass
class Problem:
    """What every rank knows: the whole weight, the tokens, the teacher and where the losses count."""

    weight: Tensor  # [padded vocab, hidden]
    tokens: Tensor  # [batch, sequence]
    teacher_logits: Tensor  # [batch, sequence, padded vocab]
    ids: Tensor  # [batch, sequence, k]
    target: Tensor  # [batch, sequence]
    row_weights: Tensor  # [batch, sequence]; 0 where no loss counts


def make_problem(dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(PADDED_VOCAB_SIZE, HIDDEN, generator=generator) * 0.7
    tokens = torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE), generator=generator)
    teacher = torch.randn(BATCH, SEQUENCE, PADDED_VOCAB_SIZE, generator=generator) * 2
    ids = oracles.topk_ids(teacher, K, VOCAB_SIZE)
    ids[..., 2] = -1
    target = torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE), generator=generator)
    row_weights = (torch.rand(BATCH, SEQUENCE, generator=generator) > 0.3) / 7.0
    row_weights[:, -1] = 0
    return Problem(weight.to(dtype), tokens, teacher.to(dtype), ids, target, row_weights)


# A path turns logits [batch, sequence, vocab] into the loss of every row.
Path = Callable[[Tensor, Problem, Tensor, VocabShard], Tensor]


def bucket(divergence: str, tail: str = "bucket", **options) -> Path:
    def path(logits, problem, teacher_logits, shard):
        teacher = opd_engine.gather_log_probs(teacher_logits, problem.ids, shard=shard)
        student = opd_engine.gather_log_probs(logits, problem.ids, shard=shard, **options)
        return opd_engine.distill_loss(student, teacher, divergence=divergence, tail=tail)

    return path


def every_score(**options) -> Path:
    def path(logits, problem, teacher_logits, shard):
        scores = opd_engine.gather_log_probs(logits, problem.ids, target=problem.target, shard=shard, **options)
        return combine(scores)

    return path


def combine(scores) -> Tensor:
    present = scores.indices >= 0
    support = torch.where(present, scores.log_probs, 0.0).sum(-1)
    return support - 0.5 * scores.tail_log_prob + 0.25 * scores.lse - scores.entropy + 2 * scores.target_log_prob


def full(divergence: str, **options) -> Path:
    def path(logits, problem, teacher_logits, shard):
        return opd_engine.full_distill_loss(logits, teacher_logits, divergence=divergence, shard=shard, **options)

    return path


def dense_bucket(divergence: str, tail: str = "bucket"):
    def definition(logits, problem, compute):
        student = oracles.gather_scores(logits, problem.ids, None, VOCAB_SIZE, dtype=compute)
        teacher = oracles.gather_scores(problem.teacher_logits, problem.ids, None, VOCAB_SIZE, dtype=compute)
        return oracles.distill(student, teacher, divergence, tail=tail)

    return definition


def dense_scores(logits, problem, compute):
    return combine(oracles.gather_scores(logits, problem.ids, problem.target, VOCAB_SIZE, dtype=compute))


def dense_full(divergence: str):
    def definition(logits, problem, compute):
        return oracles.full_distill(logits, problem.teacher_logits, divergence, vocab_size=VOCAB_SIZE, dtype=compute)

    return definition


# Every way a gradient leaves the engine: bucket_divergence, scores_backward, full_divergence_backward, the in-place
# twins of the last two; the partial reduction has its own loop.
PATHS: dict[str, tuple[Path, Callable]] = {
    **{name: (bucket(name), dense_bucket(name)) for name in oracles.DIVERGENCES},
    "truncate": (bucket("forward_kl", "truncate"), dense_bucket("forward_kl", "truncate")),
    "renormalize": (bucket("jsd", "renormalize"), dense_bucket("jsd", "renormalize")),
    "in place": (bucket("reverse_kl", inplace_backward=True), dense_bucket("reverse_kl")),
    "every score": (every_score(), dense_scores),
    "every score in place": (every_score(inplace_backward=True), dense_scores),
    **{f"full {name}": (full(name), dense_full(name)) for name in oracles.DIVERGENCES},
    "full in place": (full("jsd", inplace_backward=True), dense_full("jsd")),
}


class TiedModel(torch.nn.Module):
    """Megatron's embedding and head on one weight."""

    def __init__(self, dtype: torch.dtype, sequence_parallel: bool, *, reduce_hidden_gradient: bool = True):
        super().__init__()
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

        world = dist.get_world_size()
        config = ModelParallelConfig(
            tensor_model_parallel_size=world,
            sequence_parallel=sequence_parallel,
            params_dtype=dtype,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        init = torch.nn.init.zeros_
        self.embedding = VocabParallelEmbedding(
            PADDED_VOCAB_SIZE,
            HIDDEN,
            init_method=init,
            config=config,
            reduce_scatter_embeddings=sequence_parallel,
        )
        self.head = ColumnParallelLinear(
            HIDDEN,
            PADDED_VOCAB_SIZE,
            config=config,
            init_method=init,
            bias=False,
            skip_weight_param_allocation=True,
            disable_grad_reduce=not reduce_hidden_gradient,
        )
        self.sequence_parallel = sequence_parallel

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [batch, sequence] -> logits [batch, sequence, vocab shard], Megatron's [s, b, V] transposed."""
        hidden = self.embedding(tokens)  # [s / tp, b, h] under sequence parallel, else [b, s, h]
        hidden = hidden if self.sequence_parallel else hidden.transpose(0, 1).contiguous()
        logits, _ = self.head(torch.tanh(hidden), weight=self.embedding.weight)
        return logits.transpose(0, 1)


def dense_gradient(problem: Problem, definition, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """(loss [b, s], gradient of the whole weight) in one process."""
    leaf_dtype = torch.float64 if compute == torch.float64 else problem.weight.dtype
    weight = problem.weight.detach().to(leaf_dtype).requires_grad_()
    hidden = torch.tanh(weight[problem.tokens])
    loss = definition(hidden @ weight.t(), problem, compute)
    total = (loss * problem.row_weights.to(loss.dtype)).sum()
    return loss.detach(), torch.autograd.grad(total, weight)[0]


def model_gradient(
    problem: Problem, path: Path, sequence_parallel: bool, *, row_weights: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """(loss [b, s], gradient of the whole embedding, assembled from the ranks) through Megatron's layers."""
    model = TiedModel(problem.weight.dtype, sequence_parallel, **options)
    rank, width = dist.get_rank(), PADDED_VOCAB_SIZE // dist.get_world_size()
    columns = slice(rank * width, (rank + 1) * width)
    with torch.no_grad():
        model.embedding.weight.copy_(problem.weight[columns])
    shard = VocabShard(rank * width, (rank + 1) * width, VOCAB_SIZE, dist.group.WORLD)
    logits = model(problem.tokens)
    assert not logits.is_contiguous()
    loss = path(logits, problem, problem.teacher_logits[..., columns], shard)
    weights = problem.row_weights if row_weights is None else row_weights
    (loss * weights.to(loss.dtype)).sum().backward()
    parts = [torch.empty_like(model.embedding.weight.grad) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, model.embedding.weight.grad.contiguous())
    return loss.detach(), torch.cat(parts)


def own_rows(problem: Problem) -> Tensor:
    """The row weights of this rank's part of the sequence; the ranks' parts sum to the whole."""
    part = torch.zeros_like(problem.row_weights)
    size = SEQUENCE // dist.get_world_size()
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    part[:, rows] = problem.row_weights[:, rows]
    return part


def start() -> None:
    warnings.filterwarnings("ignore")
    from megatron.core import parallel_state

    megatron_cpu.install()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())


def everything() -> dict:
    """Every path x sequence parallel x dtype, then the controls. Returns the errors and which controls were red."""
    start()
    red: dict[str, bool] = {}
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(dtype)
        for name, (path, definition) in PATHS.items():
            true_loss, true_grad = dense_gradient(problem, definition, torch.float64)
            eager_loss, eager_grad = dense_gradient(problem, definition, torch.float32)
            for sequence_parallel in (False, True):
                where = f"ColumnParallelLinear sp={sequence_parallel} {name}"
                loss, grad = model_gradient(problem, path, sequence_parallel)
                check("loss", dtype, loss, true_loss, eager_loss, where)
                check("gradient", dtype, grad, true_grad, eager_grad, where)
        for name, (path, definition) in {
            "bucket": (bucket("reverse_kl", loss_reduction="partial"), dense_bucket("reverse_kl")),
            "every score": (every_score(loss_reduction="partial"), dense_scores),
        }.items():
            truths = [dense_gradient(problem, definition, compute) for compute in (torch.float64, torch.float32)]
            for sequence_parallel in (False, True):
                _, grad = model_gradient(problem, path, sequence_parallel, row_weights=own_rows(problem))
                check("gradient", dtype, grad, truths[0][1], truths[1][1], f"ColumnParallelLinear partial {name}")
        red |= controls(problem, dtype)
    return {"errors": tolerances.recorded(), "controls": red}


def controls(problem: Problem, dtype: torch.dtype) -> dict[str, bool]:
    """Planted errors; each must be seen in the embedding's gradient."""
    path, definition = PATHS["reverse_kl"]
    (_, true_grad), (_, eager_grad) = (dense_gradient(problem, definition, c) for c in (torch.float64, torch.float32))
    world, rank = dist.get_world_size(), dist.get_rank()
    first_only = problem.row_weights if rank == 0 else torch.zeros_like(problem.row_weights)
    planted = {
        "loss / tp": {"row_weights": problem.row_weights / world},
        "loss on rank 0 only": {"row_weights": first_only},
        "partial loss without its reduction": {"row_weights": own_rows(problem)},
        "hidden gradient not reduced": {"reduce_hidden_gradient": False},
        "off-by-one row": {"row_weights": problem.row_weights.roll(1, 1)},
    }
    found = {}
    for name, options in planted.items():
        _, grad = model_gradient(problem, path, False, **options)
        found[f"{name} {NAMES[dtype]}"] = is_red(dtype, grad, true_grad, eager_grad)
    _, honest = model_gradient(problem, path, False)
    found[f"1% gradient error {NAMES[dtype]}"] = is_red(
        dtype, (honest.double() * 1.01).to(dtype), true_grad, eager_grad
    )
    return found


def is_red(dtype: torch.dtype, grad: Tensor, true_grad: Tensor, eager_grad: Tensor) -> bool:
    try:
        check("gradient", dtype, grad, true_grad, eager_grad, "control")
    except Mismatch:
        return True
    return False
