"""The order in which a run draws prompts: a few integers, so a resumed run draws what an undisturbed one would."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_engine.train.prompts import Prompt


class PromptCursor:
    """Draws prompts epoch by epoch, each epoch in its own order, from one pool or equally from one pool a teacher."""

    def __init__(self, prompts: Sequence[Prompt], mixing: str, seed: int) -> None:
        """prompts: at least one.  mixing: "proportional" (one pool) or "equal" (one a teacher).  seed: of the order."""
        if not prompts:
            raise ValueError("prompts: wanted at least one to train on, got none")
        names = sorted({prompt.teacher for prompt in prompts}) if mixing == "equal" else [""]
        self._pools = {name: [p for p in prompts if name in ("", p.teacher)] for name in names}
        self._seed = seed
        self._drawn = dict.fromkeys(names, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def _order(self, name: str, epoch: int) -> list[int]:
        if self._orders.get(name, (-1, []))[0] != epoch:
            seed = (self._seed * 1_000_003 + epoch * 97 + sorted(self._pools).index(name)) % (2**63)
            generator = torch.Generator().manual_seed(seed)
            self._orders[name] = (epoch, torch.randperm(len(self._pools[name]), generator=generator).tolist())
        return self._orders[name][1]

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts; shares between pools differ by at most one. Mutates: the cursor."""
        names = sorted(self._pools)
        drawn = []
        for place, name in enumerate(names):
            share = count // len(names) + (place < count % len(names))
            pool = self._pools[name]
            for position in range(self._drawn[name], self._drawn[name] + share):
                epoch, offset = divmod(position, len(pool))
                drawn.append(pool[self._order(name, epoch)[offset]])
            self._drawn[name] += share
        return drawn

    def state(self) -> dict[str, int]:
        """How many prompts each pool has given."""
        return dict(self._drawn)

    def restore(self, state: dict[str, int]) -> None:
        """Continues where state() was taken. Raises: ValueError where the pools are not the same."""
        if set(state) != set(self._drawn):
            raise ValueError(f"data cursor: wanted the pools {sorted(self._drawn)}, got {sorted(state)}")
        self._drawn = {name: int(count) for name, count in state.items()}
