"""Row alignment (docs/math.md (1)) in packed batches under context parallelism 1 and 2, and what an off-by-one does.

The truth walks each sequence by itself, token by token, and knows nothing of packing, rows or ranks.
"""

from itertools import pairwise

import pytest
import torch

import opd_engine
import oracles
from opd_engine.parallel import sequences
from opd_engine.parallel.sequences import ContextLayout, take_rows
from tolerances import DTYPES, NAMES, Mismatch, check

VOCAB, K, LENGTHS, PROMPTS = 29, 5, (7, 1, 12, 2, 9), (3, 1, 2, 1, 8)
LAYOUTS = [("zigzag", 1), ("zigzag", 2), ("allgather", 1), ("allgather", 2)]


class Batch:
    """Packed sequences; prompts are not generated. The model of row i is a table row of token i and its position."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(9)
        total = sum(LENGTHS)
        self.tokens = torch.randint(0, VOCAB, (total,), generator=generator)
        self.cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
        self.logits = ((torch.randn(total, VOCAB, generator=generator) * 32).round() / 16).to(dtype)
        self.teacher_logits = ((torch.randn(total, VOCAB, generator=generator) * 32).round() / 16).to(dtype)
        self.ids = oracles.topk_ids(self.teacher_logits, K)
        self.loss_mask = torch.zeros(total, dtype=torch.bool)
        for start, length, prompt in zip(self.cu_seqlens.tolist(), LENGTHS, PROMPTS):
            self.loss_mask[start + prompt - 1 : start + length - 1] = True  # rows whose next token was generated

    def truth(self, dtype):
        """(loss, gradient of the packed logits): sequence by sequence, each generated token from its prefix."""
        at = self.logits.to(dtype if dtype == torch.float64 else self.logits.dtype).requires_grad_()
        total = 0.0
        for (start, end), prompt in zip(pairwise(self.cu_seqlens.tolist()), PROMPTS):
            for position in range(start + prompt, end):  # tokens that the model generated
                row = slice(position - 1, position)  # their distribution comes from the token before
                token = self.tokens[position : position + 1]
                student = oracles.gather_scores(at[row], self.ids[row], token, dtype=dtype)
                teacher = oracles.gather_scores(self.teacher_logits[row], self.ids[row], dtype=dtype)
                total = total + oracles.distill(student, teacher, "jsd").sum() - student.target_log_prob.sum()
        return total.detach().reshape(1), torch.autograd.grad(total, at)[0]


def through_the_engine(batch, layout, cp_size, plant=None):
    """(loss, gradient of the packed logits), every rank's share computed by itself and added up."""
    at = batch.logits.clone().requires_grad_()
    total = 0.0
    for rank in range(cp_size):
        rows = ContextLayout(layout, cp_size, rank).owned_rows(batch.cu_seqlens)
        targets = sequences.local_targets(batch.tokens, batch.cu_seqlens, rows)
        mask = sequences.local_loss_mask(batch.loss_mask, batch.cu_seqlens, rows)
        teacher_rows = batch.teacher_logits
        if plant == "targets from the local neighbour":  # wrong only where a chunk or a sequence ends
            own = take_rows(batch.tokens, rows, fill=-1)
            targets = torch.cat([own[1:], own[:1]]).masked_fill(rows < 0, -1)
        elif plant == "mask one row late":
            mask = take_rows(batch.loss_mask.roll(1, 0), rows, fill=False)
        elif plant == "last rows of samples count":
            ends = torch.zeros_like(batch.loss_mask)
            ends[(batch.cu_seqlens[1:] - 1).long()] = True
            mask = mask | take_rows(ends, rows, fill=False)
        elif plant == "teacher one row late":  # a server's log-prob of token i taken for row i
            teacher_rows = teacher_rows.roll(1, 0)
        elif plant == "rows of the other rank":
            rows = ContextLayout(layout, cp_size, (rank + 1) % cp_size).owned_rows(batch.cu_seqlens)
        local, ids = take_rows(at, rows), take_rows(batch.ids, rows, fill=-1)
        student = opd_engine.gather_log_probs(local, ids, target=targets)
        teacher = opd_engine.gather_log_probs(take_rows(teacher_rows, rows), ids)
        loss = opd_engine.distill_loss(student, teacher, divergence="jsd") - student.target_log_prob
        total = total + torch.where(mask, loss, 0.0).sum()
    return total.detach().reshape(1), torch.autograd.grad(total, at)[0]


def compare(batch, layout, cp_size, plant=None):
    dtype = batch.logits.dtype
    ours = through_the_engine(batch, layout, cp_size, plant)
    true, eager = batch.truth(torch.float64), batch.truth(oracles.score_dtype(dtype))
    where = f"cp={cp_size} {layout}"
    check("loss", dtype, ours[0] / 10, true[0] / 10, eager[0] / 10, where)
    check("gradient", dtype, ours[1], true[1], eager[1], where)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("layout, cp_size", LAYOUTS)
def test_rows_predict_the_next_token(layout, cp_size, dtype):
    compare(Batch(dtype), layout, cp_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "plant, layout, cp_size",
    [
        ("targets from the local neighbour", "zigzag", 2),
        ("targets from the local neighbour", "allgather", 2),
        ("mask one row late", "zigzag", 1),
        ("mask one row late", "allgather", 2),
        ("last rows of samples count", "zigzag", 1),
        ("last rows of samples count", "zigzag", 2),
        ("teacher one row late", "zigzag", 1),
        ("teacher one row late", "allgather", 2),
        ("rows of the other rank", "zigzag", 2),
        ("rows of the other rank", "allgather", 2),
    ],
)
def test_an_off_by_one_is_red(plant, layout, cp_size, dtype):
    """At sample boundaries (the masks) and at chunk edges, where the next token lives on another rank."""
    with pytest.raises(Mismatch):
        compare(Batch(dtype), layout, cp_size, plant)
