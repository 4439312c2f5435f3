"""Debug mode under tensor parallelism: what one rank finds wrong, or what differs between ranks, every rank raises.

Without it a rank that raises alone leaves the others waiting in a collective. It reads values on the host and
communicates, so nothing of it runs outside debug mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from opd_engine.functional.arguments import LogitRows, debugging
from opd_engine.parallel.collectives import all_gather_json, all_gather_stacked
from opd_engine.parallel.vocab import VocabShard, find_tiling_fault

_Result = TypeVar("_Result")


def check_together(
    shard: VocabShard | None,
    device: torch.device,
    check: Callable[[], _Result],
    describe: Callable[[_Result], dict[str, object]],
) -> _Result:
    """Run a rank's checks; under debug and tensor parallelism, so that every rank raises what any of them found.

    describe: what must be the same on every rank, as JSON values by argument name
    Raises: ValueError, the same on every rank: a rank's own error, shards that do not tile, or arguments that differ.
    Communicates: under debug alone, two small all-gathers over shard.tp_group.
    """
    group = shard.merge_group if isinstance(shard, VocabShard) else None
    if group is None or not debugging():
        return check()
    result, fault = None, None
    try:
        result = check()
    except ValueError as error:
        fault = str(error)
    mine = {
        "fault": fault,
        "bounds": (shard.vocab_start_index, shard.vocab_end_index, shard.vocab_size),
        "same": None if result is None else describe(result),
    }
    everybody = all_gather_json(mine, group, device, op="debug_all_gather")
    faults = [f"{one['fault']} (on rank {rank} of tp_group)" for rank, one in enumerate(everybody) if one["fault"]]
    if faults:
        raise ValueError("; ".join(faults))
    if (tiling := find_tiling_fault([one["bounds"] for one in everybody])) is not None:
        raise ValueError(tiling)
    for argument in everybody[0]["same"]:
        values = [one["same"].get(argument) for one in everybody]
        if any(value != values[0] for value in values):
            raise ValueError(f"{argument}: wanted the same on every rank of tp_group, got {values} in rank order")
    return result


def fingerprint(tensor: Tensor | None) -> int | None:
    """A number that differs where the bits differ, in all likelihood; None for None."""
    if tensor is None:
        return None
    values = tensor.detach().reshape(-1).contiguous()
    if values.is_floating_point():
        values = values.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[values.element_size()])
    places = torch.arange(values.numel(), device=values.device)
    return int(((values.to(torch.int64) + 1) * (places * 2654435761 + 1)).sum())


def describe_rows(rows: LogitRows, **tensors: Tensor | None) -> dict[str, object]:
    """What check_together compares for every function on logits."""
    temperature = rows.temperature if rows.row_temperature is None else f"hash {fingerprint(rows.row_temperature)}"
    described: dict[str, object] = {
        "logits": f"{rows.num_rows} rows of {rows.score_dtype} scores",
        "temperature": temperature,
    }
    for name, tensor in tensors.items():
        described[name] = None if tensor is None else f"shape {tuple(tensor.shape)}, hash {fingerprint(tensor)}"
    return described


def check_upstream(upstream: Tensor, shard: VocabShard, what: str) -> None:
    """Raise ValueError, on every rank, where the ranks of a group bring different gradients of the same loss.

    upstream: [T, n], packed; equal up to the noise of another order of summation
    Communicates: debug only, one all-gather of the upstream gradients. Every rank of the group must call backward.
    """
    if shard.merge_group is None or upstream.numel() == 0:
        return
    everybody = all_gather_stacked(upstream, shard.merge_group, op="debug_all_gather")
    scale = torch.nan_to_num(everybody[0], posinf=0.0, neginf=0.0).abs().max()
    close = torch.isclose(everybody, everybody[:1], rtol=1e-4, atol=float(scale) * 1e-6, equal_nan=True)
    if not bool(close.all()):
        rank, row = (~close).nonzero()[0][:2].tolist()
        raise ValueError(
            f"{what}: wanted equal upstream gradients on every rank of tp_group (each computes the same loss; "
            f'loss_reduction="partial" is for parts of a sum), got a difference between ranks 0 and {rank} in row {row}'
        )
