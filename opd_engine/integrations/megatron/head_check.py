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
    """Passes of one short sequence: through the model's own end, through the head, and through its weight alone.

    Raises: ValueError on every rank where the first two differ by more than rounding, or, where logits are computed
        in chunks from the weight alone, the third.
    Communicates: three passes; two numbers over the tensor, context and pipeline ranks.
    Mutates: walk.head_is_product, whether the third agrees.
    """
    vocab_size = walk.vocab_size
    batch = pack_rollouts([[0, 1 % vocab_size]], [[2 % vocab_size, 3 % vocab_size]])
    inputs = walk.micro_inputs(batch)

    def of_model(micro: MicroInput, logits: Tensor) -> Tensor:
        return logits.transpose(0, 1).flatten(0, 1)[micro.output_rows]

    def of_head(micro: MicroInput, hidden: Tensor) -> Tensor:
        return walk.head.logits(hidden, micro.output_rows)

    def of_weight(micro: MicroInput, hidden: Tensor) -> Tensor:
        return walk.head.products(hidden, micro.output_rows)

    whole = walk.forward(inputs, of_model, to_hidden=False)
    ways = [walk.forward(inputs, way) for way in (of_head, of_weight)]
    distance = torch.zeros(2, device=walk.device)
    if walk.head is not None:
        for position, way in enumerate(ways):
            distance[position] = _distance(whole[0], way[0], walk.head.shard.vocab_start_index)
    groups = walk.groups
    for group in (groups.tp, groups.cp):
        all_reduce_max_(distance, group if group.size() > 1 else None)
    broadcast_(distance, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1)
    head, product = distance.tolist()
    walk.head_is_product = product <= 1
    if not head <= 1:
        raise ValueError(
            f"model: {type(walk.language_model).__name__}'s logits are not its output_layer of its last hidden states; "
            "give an output_layer that does all that comes after the final norm"
        )
    if walk.computes_in_chunks and not walk.head_is_product:
        raise ValueError(
            "workspace_bytes: the output layer is more than a product with its weight (and bias), which is what would "
            "be computed in chunks; wanted workspace_bytes=None for this model"
        )


def _distance(whole: Tensor, ours: Tensor, start: int) -> float:
    """The largest difference over what rounding may cost; above 1 is another distribution."""
    if whole.shape[1] > ours.shape[1]:  # a model that gathers its logits
        whole = whole[:, start : start + ours.shape[1]]
    if whole.shape != ours.shape:
        return float("inf")
    tolerance = max(4 * torch.finfo(ours.dtype).eps, 1e-4) * float(whole.float().abs().max())
    return float((whole.float() - ours.float()).abs().max()) / max(tolerance, 1e-30)
