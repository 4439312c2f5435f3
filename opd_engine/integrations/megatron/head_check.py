"""Whether a model's logits are its output layer of its last hidden states, tried once on a few tokens.

Soft-caps, logit scales and heads of another kind are found this way whatever a model calls them; the head's scores
would otherwise be of another distribution than the model's, without a sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.integrations.megatron.batches import MicroInput
from opd_engine.parallel.collectives import all_reduce_max_, broadcast_

if TYPE_CHECKING:
    from opd_engine.integrations.megatron.schedule import StageWalk


def check_head_is_last(walk: StageWalk) -> None:
    """Two passes of one short sequence: through the model's own end, and through the head.

    Raises: ValueError on every rank where the two differ by more than rounding.
    Communicates: two passes; one number over the tensor, context and pipeline ranks.
    """
    vocab_size = walk.vocab_size
    batch = pack_rollouts([[0, 1 % vocab_size]], [[2 % vocab_size, 3 % vocab_size]])
    inputs = walk.micro_inputs(batch)

    def of_model(micro: MicroInput, logits: Tensor) -> Tensor:
        return logits.transpose(0, 1).flatten(0, 1)[micro.output_rows]

    def of_head(micro: MicroInput, hidden: Tensor) -> Tensor:
        return walk.head.logits(hidden, micro.output_rows)

    whole = walk.forward(inputs, of_model, to_hidden=False)
    ours = walk.forward(inputs, of_head)
    distance = torch.zeros(1, device=walk.device)
    if walk.head is not None:
        distance += _distance(whole[0], ours[0], walk.head.shard.vocab_start_index)
    groups = walk.groups
    for group in (groups.tp, groups.cp):
        all_reduce_max_(distance, group if group.size() > 1 else None)
    broadcast_(distance, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1)
    if not float(distance) <= 1:
        raise ValueError(
            f"model: {type(walk.language_model).__name__}'s logits are not its output_layer of its last hidden states; "
            "give an output_layer that does all that comes after the final norm"
        )


def _distance(whole: Tensor, ours: Tensor, start: int) -> float:
    """The largest difference over what rounding may cost; above 1 is another distribution."""
    if whole.shape[1] > ours.shape[1]:  # a model that gathers its logits
        whole = whole[:, start : start + ours.shape[1]]
    if whole.shape != ours.shape:
        return float("inf")
    tolerance = max(4 * torch.finfo(ours.dtype).eps, 1e-4) * float(whole.float().abs().max())
    return float((whole.float() - ours.float()).abs().max()) / max(tolerance, 1e-30)
