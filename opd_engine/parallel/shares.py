"""How a step's rollouts are dealt to ranks, and what is known of them brought back to all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.parallel.collectives import all_reduce_sum_, broadcast_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Shares:
    """One rank's place among the shares of a batch. Ranks of one share hold parts of one model and the same rollouts.

    rank, size: the share's index, and how many there are
    group: ranks of the same place in the other shares; None where there is one share
    stages: ranks of the same place in the share's pipeline stages; None without a pipeline
    last_stage: the rank in `stages` that knows losses and scores
    device: what the groups communicate with
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    stages: ProcessGroup | None = None
    last_stage: int = 0
    device: torch.device | str = "cpu"

    def deal(self, count: int) -> list[int]:
        """Which of `count` things are this share's: every size-th, so that shares differ by one at most."""
        return list(range(self.rank, count, self.size))

    def known(self, values: Tensor) -> Tensor:
        """What the last stage has, on every stage; on the host. Communicates: one broadcast, with a pipeline."""
        return broadcast_(values.to(self.device), self.stages, source=self.last_stage).cpu()

    def sum(self, values: Tensor) -> list[float]:
        """Added up over the shares. Communicates: one all-reduce, with several."""
        return all_reduce_sum_(values.to(self.device), self.group).tolist()
