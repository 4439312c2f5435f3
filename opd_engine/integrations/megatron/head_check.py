"""Whether a model's logits are its output layer of its last hidden states, tried once on a few tokens.

Soft-caps, logit scales and heads of another kind are found this way whatever a model calls them; the head's scores
would otherwise be of another distribution than the model's, without a sign. In half precision a cap or a scale near 1
hides below the rounding of a few small logits: known, wide values in the place of the layer's output show it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.integrations.megatron.batches import MicroInput
from opd_engine.parallel.collectives import all_reduce_max_, broadcast_

if TYPE_CHECKING:
    from opd_engine.integrations.megatron.schedule import StageWalk


def check_head_is_last(walk: StageWalk) -> None:
    """Passes of one short sequence: through the model's own end, through the head, and through its weight alone; and
    once more through the model's end with known values as the layer's output.

    Raises: ValueError on every rank where the first two differ by more than rounding, where the known values come out
        changed, or, where logits are computed in chunks from the weight alone, where the third differs.
    Communicates: four passes; three numbers over the tensor, context and pipeline ranks.
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
    distance = torch.zeros(3, device=walk.device)
    with _known_output(walk) as put:
        shown = walk.forward(inputs, of_model, to_hidden=False)
    if walk.head is not None:
        for position, way in enumerate(ways):
            distance[position] = _distance(whole[0], way[0], walk.head.shard.vocab_start_index)
        if len(put) == 1:  # an output layer that the model itself does not call shows nothing here
            distance[2] = _distance(shown[0], of_model(inputs[0], put[0].transpose(0, 1)), 0, roundings=4)
    groups = walk.groups
    for group in (groups.tp, groups.cp):
        all_reduce_max_(distance, group if group.size() > 1 else None)
    broadcast_(distance, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1)
    head, product, after = distance.tolist()
    head = max(head, after)
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


@contextlib.contextmanager
def _known_output(walk: StageWalk) -> Iterator[list[Tensor]]:
    """For the block the output layer answers with values from -120 to 120; gives what it answered."""
    put: list[Tensor] = []

    def answer(_, inputs, output):
        logits, *rest = output if isinstance(output, tuple) else (output,)
        put.append(torch.linspace(-120.0, 120.0, logits.numel(), device=logits.device).view_as(logits).to(logits))
        return (put[-1], *rest) if isinstance(output, tuple) else put[-1]

    handle = None if walk.head is None else walk.head.output_layer.register_forward_hook(answer)
    try:
        yield put
    finally:
        if handle is not None:
            handle.remove()


def _distance(whole: Tensor, ours: Tensor, start: int, roundings: int | None = None) -> float:
    """The largest difference over what rounding may cost; above 1 is another distribution.

    roundings: value by value, where both went through nothing but the model's end
    """
    if whole.shape[1] > ours.shape[1]:  # a model that gathers its logits
        whole = whole[:, start : start + ours.shape[1]]
    if whole.shape != ours.shape:
        return float("inf")
    if bool(whole.isnan().any()):
        return 0.0  # says nothing of the head; a teacher of NaN is named by what looks at its scores
    if roundings is not None:
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (whole, ours))
        whole, ours = whole.double(), ours.double()
        return float(((whole - ours).abs() / (roundings * eps * whole.abs() + 1e-30)).max())
    tolerance = max(4 * torch.finfo(ours.dtype).eps, 1e-4) * float(whole.float().abs().max())
    return float((whole.float() - ours.float()).abs().max()) / max(tolerance, 1e-30)
