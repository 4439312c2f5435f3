"""The rollouts and losses of test_gradients.py: ragged, with tool tokens, samples that count nowhere, two teachers."""

from __future__ import annotations

import dataclasses

import torch

from megatron_actor import dense
from megatron_actor.dense import Loss, Sample, Shape
from opd_engine.distillation import RolloutBatch

LENGTHS = (9, 5, 14, 1, 12, 7, 16, 6)
TEACHERS = ("math", "code")
ROUTED = Loss()
MIXED = Loss("forward_kl", "union", "arithmetic", "sample_mean", k=6, temperature=0.8, state_cap=1.5, policy=0.7)


def make_samples() -> list[Sample]:
    """Ragged rollouts; prompts, tool tokens and two whole samples do not count."""
    generator = torch.Generator().manual_seed(11)
    samples = []
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(0, 61, (length,), generator=generator)
        mask = torch.rand(length, generator=generator) < 0.8
        mask[: length // 3] = False
        mask[-1] = False
        if number == 5:
            mask[:] = False
        noise = 0.3 * torch.randn(length, generator=generator)
        samples.append(
            Sample(number, tokens, mask, (TEACHERS[number % 2],), noise, (-1) ** number * (0.5 + number / 8))
        )
    return samples


def with_teachers(samples: list[Sample], loss: Loss) -> list[Sample]:
    """Under a mixture two of three samples have both teachers."""
    if loss.mixture == "route":
        return samples
    return [dataclasses.replace(s, teachers=TEACHERS) if s.number % 3 else s for s in samples]


def rolled_out(samples: list[Sample], shape: Shape, loss: Loss) -> list[Sample]:
    """With log-probs of a rollout engine near the student's own: those, and the noise that stands in their place."""
    weights = dense.double_leaves(dense.make_weights(shape, 7))
    found = []
    for sample in samples:
        with torch.no_grad():
            log_probs = (dense.forward(weights, shape, sample.tokens) / loss.temperature).log_softmax(1)
        sampled = log_probs.gather(1, sample.tokens.roll(-1)[:, None])[:, 0]
        found.append(dataclasses.replace(sample, log_probs=(sampled + sample.log_probs).clamp(max=0.0).float()))
    return found


def as_batch(samples: list[Sample]) -> RolloutBatch:
    lengths = torch.tensor([0, *(sample.tokens.numel() for sample in samples)])
    numbers = torch.tensor([sample.number for sample in samples], dtype=torch.int64)
    none = torch.zeros(0)
    return RolloutBatch(
        tokens=torch.cat([none.long(), *(s.tokens for s in samples)]),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        loss_mask=torch.cat([none.bool(), *(s.mask for s in samples)]),
        sample_ids=numbers,
        rollout_ids=numbers,
        teacher_names=[s.teachers for s in samples],
        rollout_topk_ids=torch.cat([none.long().view(0, 5), *(dense.engine_topk(s) for s in samples)]),
        rollout_topk_log_probs=-1.0 - torch.arange(5.0).repeat(int(lengths.sum()), 1),
        rollout_log_probs=torch.cat([none, *(s.log_probs for s in samples)]).clamp(max=0.0),
        teacher_prompts=[s.teacher_prompt for s in samples],
        advantages=torch.tensor([s.advantage for s in samples], dtype=torch.float64),
    )
