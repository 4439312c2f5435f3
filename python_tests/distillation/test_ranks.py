"""One step on two real processes: the vocabulary split between them, then the samples, against one process.

Tensor parallel: losses bitwise equal on both ranks, each rank's gradient its columns of the one-process gradient.
Data parallel: gradients and metrics that SUM to the one-process ones, with unequal shares.
"""

import functools

import pytest
import torch

from distillation.step_reference import SPECS, VOCAB, WIDTHS, world
from distillation_toys import ToyBackend
from opd_engine.distillation import Denominators, OPDConfig, add_metrics, distillation_loss, score_rollouts
from opd_engine.parallel.collectives import all_gather_stacked, all_reduce_sum_
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers import LocalTeacher, TeacherPool
from ranks import run_ranks

PADDED = {29: 32, 33: 40, 24: 26}
CASES = [
    {"support": "student"},
    {"support": "teacher"},
    {"support": "union", "union_cap": 6, "mixture": "arithmetic"},
    {"support": "rollout", "mixture": "loss_sum"},
    {"support": "student", "mixture": "geometric", "reduction": "rollout_mean", "state_weight_cap": 1.5},
    {"support": "student", "reduction": "sample_mean", "reward_beta": 0.7},
    {"support": "student", "policy_coefficient": 0.5, "measure_overlap": True, "tasks": ("x", "y")},
    {"support": "union", "mixture": "arithmetic", "tasks": ("x", "y")},
]
REWARDS = [0.3, -1.0, 2.0, 0.0, 0.5, 1.0]


class ShardedToy(ToyBackend):
    """The same model, of which this rank holds uneven columns."""

    def __init__(self, vocab_size: int, seed: int, rank: int, group) -> None:
        super().__init__(vocab_size, seed, padding=PADDED[vocab_size] - vocab_size)
        cut = 7
        bounds = (0, cut) if rank == 0 else (cut, PADDED[vocab_size])
        self.shard = VocabShard(*bounds, vocab_size, group)
        self.last: torch.Tensor | None = None

    def logits(self, batch):
        columns = slice(self.shard.vocab_start_index, self.shard.vocab_end_index)
        self.last = super().logits(batch)[:, columns].detach().contiguous().requires_grad_()
        return self.last


def case_world(options):
    batch, student, pool = world(mixture=options.get("mixture", "route"), rewards=REWARDS)
    generator = torch.Generator().manual_seed(8)
    batch.advantages = torch.tensor(REWARDS, dtype=torch.float64)
    batch.task_names = ["x", "y", "", "y", "x", "x"]
    batch.rollout_log_probs = -torch.rand(batch.num_tokens, generator=generator, dtype=torch.float64) * 4
    return batch, student, pool, OPDConfig(k=4, divergence="forward_kl", **options)


def one_process(options):
    """(loss, gradient of the logits, metrics) of the whole batch in this process."""
    batch, student, pool, config = case_world(options)
    logits = student.logits(batch).detach().requires_grad_()
    scored = score_rollouts(batch, student, pool, config)
    loss, sums = distillation_loss(logits, batch, scored, config, None, Denominators.of(batch, config))
    loss.backward()
    return loss.item(), logits.grad, sums.values


def split_vocabulary(rank: int, group) -> list:
    import opd_engine

    found = []
    for options in CASES:
        batch, _, _, config = case_world(options)
        student = ShardedToy(VOCAB, 1, rank, group)
        pool = TeacherPool(
            [(s, LocalTeacher(ShardedToy(WIDTHS[s.name], 5 + i, rank, group))) for i, s in enumerate(SPECS)]
        )
        with opd_engine.debug():  # also compares what both ranks pass in
            scored = score_rollouts(batch, student, pool, config)
            denominators = Denominators.of(batch, config)
            logits = student.logits(batch)
            loss, sums = distillation_loss(logits, batch, scored, config, student.shard, denominators)
            loss.backward()
        true_loss, true_grad, true_sums = one_process(options)
        columns = true_grad[:, student.shard.vocab_start_index : student.shard.vocab_end_index]
        found.append(
            {
                "loss": loss.item().hex(),
                "loss_error": abs(loss.item() - true_loss),
                "grad_error": float((logits.grad - columns).abs().max()),
                "grad_size": float(columns.abs().max()),
                "metrics_error": float((sums.values - true_sums).abs().max()),
            }
        )
    return found


def split_samples(rank: int, group) -> list:
    found = []
    for options in CASES:
        batch, student, pool, config = case_world(options)
        share = [[0, 3, 4, 5], [2, 1]][rank]
        own = batch.select(share)
        scored = score_rollouts(own, student, pool, config)
        denominators = Denominators.of(own, config, functools.partial(all_gather_stacked, group=group))
        logits = student.logits(own).detach().requires_grad_()
        loss, sums = distillation_loss(logits, own, scored, config, None, denominators)
        loss.backward()
        total = all_reduce_sum_(loss.detach().clone(), group)
        summed = add_metrics([sums]).summed(functools.partial(all_reduce_sum_, group=group))
        true_loss, true_grad, true_sums = one_process(options)
        sequence = batch.row_sequence()
        rows = torch.cat([(sequence == s).nonzero().flatten() for s in share])
        found.append(
            {
                "loss_error": abs(total.item() - true_loss),
                "own_share": loss.item() / true_loss,
                "grad_error": float((logits.grad - true_grad[rows]).abs().max()),
                "metrics_error": float((summed.values - true_sums).abs().max()),
            }
        )
    return found


def both_layouts() -> dict:
    import torch.distributed as dist

    rank = dist.get_rank()
    return {"vocabulary": split_vocabulary(rank, dist.group.WORLD), "samples": split_samples(rank, dist.group.WORLD)}


@pytest.mark.ranks
def test_two_ranks_give_the_one_process_step():
    first, second = run_ranks(__file__, "both_layouts", 2)
    for case, one, two in zip(CASES, first["vocabulary"], second["vocabulary"]):
        assert one["loss"] == two["loss"], case
        for rank in (one, two):
            assert rank["loss_error"] < 1e-12 and rank["grad_error"] < 1e-13 and rank["metrics_error"] < 1e-11, case
            assert rank["grad_size"] > 1e-4, case
    for case, one, two in zip(CASES, first["samples"], second["samples"]):
        for rank in (one, two):
            assert rank["loss_error"] < 1e-12 and rank["grad_error"] < 1e-13 and rank["metrics_error"] < 1e-11, case
            assert 0.05 < rank["own_share"] < 0.95, case  # control: one rank's part is not the whole
