"""One micro-batch's part of the loss, from its rows at the LM head: logits, or hidden states in three or four products.

A framework says which packed rows are here, and how the whole micro-batch's scores come of them. Three products where
the loss is a sum over rows that needs nothing of other rows (`is_sum_over_rows`): its gradients are then computed with
it (linear_distill_loss). Otherwise the scores come first, and the backward computes the logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opd_engine.distillation.config import OPDConfig
from opd_engine.distillation.head import HiddenRows, LogitRows
from opd_engine.distillation.members import load_members, one_teacher, taught_rows
from opd_engine.distillation.metrics import MetricSums
from opd_engine.distillation.reductions import Denominators
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.distillation.row_losses import only_live, row_divergence
from opd_engine.distillation.step import ScoredRollouts, distillation_loss_of_scores, target_of_loss
from opd_engine.functional.token_scores import TokenScores
from opd_engine.parallel.sequences import take_rows


class RowExchange(Protocol):
    """Which rows of a micro-batch are here, and what the whole of it is."""

    def own_rows(self) -> Tensor:
        """[n] int64, the packed row of each row at the head, on its device; -1 for one that only fills."""
        ...

    def whole_scores(self, scores: TokenScores, indices: Tensor | None = None) -> TokenScores:
        """[num_tokens, k] from the own rows' [n, k]; rows nobody scored hold no id and all mass in the tail.

        indices: [num_tokens, k] where they are known already
        Grad: for the own rows.
        """
        ...


@dataclass(frozen=True)
class RowsHere:
    """Implements RowExchange where one process has all rows that count. Communicates: nothing.

    rows: [n] int64, on the host; num_tokens: of the micro-batch; device: of the scores
    """

    rows: Tensor
    num_tokens: int
    device: torch.device

    def own_rows(self) -> Tensor:
        return self.rows.to(self.device)

    def whole_scores(self, scores: TokenScores, indices: Tensor | None = None) -> TokenScores:
        return scores.place(self.rows, self.num_tokens, indices=indices)


def is_sum_over_rows(config: OPDConfig) -> bool:
    """Whether a row's loss is its weight times a divergence between the student and one teacher in that row."""
    divergence_alone = config.loss_type == "distill" and config.policy_coefficient == 0
    return divergence_alone and config.state_weight_cap is None and config.mixture != "loss_sum"


def micro_loss(
    batch: RolloutBatch,
    at_head: LogitRows | HiddenRows,
    exchange: RowExchange,
    scored: ScoredRollouts,
    config: OPDConfig,
    denominators: Denominators,
) -> tuple[Tensor, MetricSums]:
    """(the loss, differentiable, and the metrics of the whole micro-batch).

    batch: the whole micro-batch; at_head: this rank's wanted rows of it; exchange: which these are

    The loss may hold this rank's rows alone; its gradient is that of the whole.
    Communicates: as the scores, and as the exchange; with kept hidden states as ScoredRollouts.members_at, and one
        exchange of each teacher's scores.
    """
    device = at_head.device
    rows, members = exchange.own_rows(), None
    if config.keep_teacher_hidden:
        chosen = at_head.topk(config.k, temperature=config.temperature).indices
        own = scored.members_at(batch, chosen.masked_fill(rows.unsqueeze(1) < 0, -1), rows, config)
        first = exchange.whole_scores(own[0])
        indices = first.indices
        members = [first, *(exchange.whole_scores(member, indices) for member in own[1:])]
    else:
        indices = scored.support(batch, device)
    if isinstance(at_head, HiddenRows) and is_sum_over_rows(config):
        return _with_its_gradients(batch, at_head, exchange, scored, config, denominators, indices, members)
    target = target_of_loss(batch, config, denominators, device)
    student = at_head.gather(
        take_rows(indices, rows, fill=-1),
        target=None if target is None else take_rows(target, rows, fill=-1),
        temperature=config.temperature,
        inplace_backward=config.inplace_backward,
    )
    whole = exchange.whole_scores(student, indices)
    return distillation_loss_of_scores(whole, batch, scored, config, denominators, members)


def _with_its_gradients(
    batch: RolloutBatch,
    at_head: HiddenRows,
    exchange: RowExchange,
    scored: ScoredRollouts,
    config: OPDConfig,
    denominators: Denominators,
    indices: Tensor,
    members: list[TokenScores] | None,
) -> tuple[Tensor, MetricSums]:
    device, rows = at_head.device, exchange.own_rows()
    if members is None:
        members, weights = load_members(batch, scored.cache, scored.teachers, scored.mixture, indices)
    else:
        weights = scored.teachers.route(batch, scored.mixture).to(device)
    row_weights = denominators.of_rows(batch).to(device).where(taught_rows(weights), 0.0)
    teacher = one_teacher(members, weights, config.mixture)
    live = take_rows(row_weights > 0, rows, fill=False)
    divergence = _RecordedDivergence(config, live)
    loss = at_head.distill(
        TokenScores(
            indices=take_rows(indices, rows, fill=-1),
            log_probs=take_rows(teacher.log_probs, rows, fill=-torch.inf),
            tail_log_prob=take_rows(teacher.tail_log_prob, rows, fill=0.0),
        ),
        token_weights=config.coefficient * take_rows(row_weights, rows, fill=0.0),
        divergence=divergence,
        temperature=config.temperature,
    ).loss
    with torch.no_grad():
        whole = exchange.whole_scores(divergence.student(), indices)
        _, metrics = distillation_loss_of_scores(whole, batch, scored, config, denominators, members)
    return loss.double(), metrics


class _RecordedDivergence:
    """The config's divergence, called a chunk of rows at a time, in order; it keeps the student's scores for metrics.

    live: [n] bool; nothing flows back to other rows, whatever they hold
    """

    def __init__(self, config: OPDConfig, live: Tensor) -> None:
        self._config, self._live = config, live
        self._scores: list[TokenScores] = []
        self._rows = 0

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        if self._rows == self._live.numel():  # a second backward computes everything again
            self._scores, self._rows = [], 0
        live = self._live[self._rows : self._rows + student.tail_log_prob.numel()]
        self._rows += live.numel()
        self._scores.append(student.detach())
        student, teacher = (only_live(scores, scores.indices, live) for scores in (student, teacher))
        return row_divergence(student, teacher, self._config)

    def student(self) -> TokenScores:
        """The student's scores of all rows, without gradient."""
        return TokenScores.cat(self._scores)
