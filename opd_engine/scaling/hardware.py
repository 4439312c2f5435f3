"""Data-sheet figures of one kind of GPU machine, and how long a step's bytes and products would take at them.

Nothing here was measured: no link and no multiprocessor reaches its data sheet. What the figures give is an order,
which resource comes first, and a bound that no implementation beats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_engine.scaling.model import Layout, Pass, flops, moved_bytes, step_traffic, switch_bytes


@dataclass(frozen=True)
class Machine:
    """Per GPU. Bytes a second are of one direction."""

    name: str
    gpus: int
    flops_per_s: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    host_bytes_per_s: float


H100 = Machine("H100 SXM, 8 a node, NVLink 4, one 400 Gb/s port a GPU, PCIe 5", 8, 989e12, 3.35e12, 450e9, 50e9, 64e9)


@dataclass(frozen=True)
class Times:
    """Seconds of each resource in one step of one rank, were it alone and at its data sheet."""

    products: float
    memory: float
    nvlink: float
    network: float
    host: float

    def named(self) -> dict[str, float]:
        return {
            "products": self.products,
            "logits in memory": self.memory,
            "NVLink": self.nvlink,
            "network": self.network,
            "host link": self.host,
        }

    def next_bottleneck(self) -> tuple[str, float]:
        """What comes first after the products, and its time over theirs."""
        name, seconds = max(list(self.named().items())[1:], key=lambda pair: pair[1])
        return name, seconds / self.products


def step_times(
    passes: Sequence[Pass], layout: Layout, machine: Machine, *, k: int, scored_by: int, switched: int
) -> Times:
    """A step on a rank of the last stage.

    switched: teachers whose weights are copied from the host each step; 0: they stay on the device
    """
    nvlink = network = 0.0
    for traffic in step_traffic(passes, layout, k=k):
        # Tensor ranks lie closest together, then context ranks; stages and replicas are on other nodes.
        inside = {"tp": layout.tp, "cp": layout.tp * layout.cp}.get(traffic.over, machine.gpus + 1)
        if inside <= machine.gpus:
            nvlink += traffic.wire
        else:
            network += traffic.wire
    update = next(one for one in passes if one.kind == "update")
    rows = update.rows / layout.cp
    logits = sum(moved_bytes(update.shape.vocab_size, layout.tp, scored_by=scored_by).values()) * rows
    teachers = [one.shape for one in passes if one.kind == "score"]
    copied = switch_bytes(teachers[0], layout, switched) if switched and teachers else 0.0
    return Times(
        products=flops(passes, layout) / machine.flops_per_s,
        memory=logits / machine.memory_bytes_per_s,
        nvlink=nvlink / machine.nvlink_bytes_per_s,
        network=network / machine.network_bytes_per_s,
        host=copied / machine.host_bytes_per_s,
    )
