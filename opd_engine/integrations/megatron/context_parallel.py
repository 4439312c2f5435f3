"""[rows, k] scores over context-parallel ranks: each scores the rows it holds, and all get the whole micro-batch's.

Bound: one all-gather of (k + 4) floats a row that counts. Every rank then computes the same loss from the same scores,
so the backward communicates nothing: each rank takes the gradient of its own rows, as under tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine.functional.token_scores import TokenScores
from opd_engine.integrations.megatron.batches import MicroInput
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.parallel.collectives import all_gather_replicated, all_gather_stacked


@dataclass(frozen=True)
class ContextExchange:
    """Implements RowExchange for a micro-batch over its context-parallel ranks."""

    micro: MicroInput
    groups: MegatronGroups
    device: torch.device

    def own_rows(self) -> Tensor:
        return own_rows(self.micro, self.groups, self.device)

    def whole_scores(self, scores: TokenScores, indices: Tensor | None = None) -> TokenScores:
        return whole_scores(scores, self.micro, self.groups, indices)


def own_rows(micro: MicroInput, groups: MegatronGroups, device: torch.device | str) -> Tensor:
    """The packed rows that this rank scores, in the order of its logits; -1 for a row that only fills."""
    return micro.packed_rows[groups.cp_rank].to(device)


def whole_scores(
    scores: TokenScores, micro: MicroInput, groups: MegatronGroups, indices: Tensor | None = None
) -> TokenScores:
    """The whole micro-batch's scores from every context rank's own.

    scores: [n, k] of `own_rows`
    indices: [num_tokens, k], where every rank knows the ids already; None: they are gathered too

    Returns: [num_tokens, k]; rows nobody scored hold no id and all mass in the tail.
    Communicates: one all-gather over the context-parallel group, (k + 3 or 4) floats a row of the rank with most rows;
        without `indices` another of k int64.
    Grad: for the scores, each rank's own rows.
    """
    names = ("tail_log_prob", "lse", "entropy", "target_log_prob")
    names = [name for name in names if getattr(scores, name) is not None]
    k = scores.log_probs.shape[1]
    values = torch.cat([scores.log_probs, torch.stack([getattr(scores, name) for name in names], 1)], 1)
    group = groups.cp if groups.cp_size > 1 else None
    longest = max(rows.numel() for rows in micro.packed_rows)
    values, target = _valid(all_gather_replicated(_lengthened(values, longest), group), micro)
    if indices is None:
        ids, _ = _valid(all_gather_stacked(_lengthened(scores.indices, longest), group), micro)
    else:
        ids = indices.index_select(0, target.to(indices.device))
    columns = {name: values[:, k + position] for position, name in enumerate(names)}
    found = TokenScores(indices=ids, log_probs=values[:, :k], **columns)
    return found.place(target, micro.batch.num_tokens, indices=indices)


def _lengthened(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, length - values.shape[0]))


def wanted_rows(values: Tensor, micro: MicroInput, groups: MegatronGroups) -> Tensor:
    """The values of all wanted rows, in the order of the packed batch: [wanted, width]. Communicates one all-gather."""
    group = groups.cp if groups.cp_size > 1 else None
    longest = max(rows.numel() for rows in micro.packed_rows)
    source, target = _valid(all_gather_stacked(_lengthened(values, longest), group), micro)
    return source[target.argsort().to(source.device)]


def _valid(gathered: Tensor, micro: MicroInput) -> tuple[Tensor, Tensor]:
    """(the wanted rows of all ranks, the packed row of each, on the host); rows that only fill are left out."""
    counts = micro.num_wanted
    source = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
    target = torch.cat([rows[:count] for rows, count in zip(micro.packed_rows, counts, strict=True)])
    return source, target
