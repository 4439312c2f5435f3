"""Whether a model's logits are its output layer of its last hidden states, tried once on a few tokens.

Soft-caps, logit scales and heads of another kind are found this way whatever a model calls them; the head's scores
would otherwise be of another distribution than the model's, without a sign. In half precision a cap or a scale near 1
hides below the rounding of a few small logits: wide values, into the layer and in the place of its output, show it.
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
    from opd_engine.integrations.megatron.head import OutputHead
    from opd_engine.integrations.megatron.schedule import StageWalk


def check_head_is_last(walk: StageWalk) -> None:
    """Passes of one short sequence: through the model's own end, and through the head; then through the model's end
    with known values as the layer's output, which must come out as they are. The layer against its weight.

    Raises: ValueError on every rank where the first two differ by more than rounding, where what goes into the layer or
        comes out of it is changed, or, where logits are computed from the weight alone, where that differs.
    Communicates: three passes; four numbers over the tensor, context and pipeline ranks.
    Mutates: walk.head_is_product, whether the layer is a product with its weight (and bias).
    """
    vocab_size = walk.vocab_size
    batch = pack_rollouts([[0, 1 % vocab_size]], [[2 % vocab_size, 3 % vocab_size]])
    inputs = walk.micro_inputs(batch)
    states: list[Tensor] = []

    def of_model(micro: MicroInput, logits: Tensor) -> Tensor:
        return logits.transpose(0, 1).flatten(0, 1)[micro.output_rows]

    def of_head(micro: MicroInput, hidden: Tensor) -> Tensor:
        states.append(hidden)
        return walk.head.logits(hidden, micro.output_rows)

    with _watched(walk) as seen:
        whole = walk.forward(inputs, of_model, to_hidden=False)
    heads = walk.forward(inputs, of_head)
    with _watched(walk, known=True) as put:
        shown = walk.forward(inputs, of_model, to_hidden=False)
    distance = torch.zeros(4, device=walk.device)
    # NaN says nothing of the head; a teacher of NaN is named by what looks at its scores.
    if walk.head is not None and not bool(whole[0].isnan().any()):
        distance[0] = _distance(whole[0], heads[0], walk.head.shard.vocab_start_index)
        distance[1] = _off_product(walk.head, states[0])
        if len(put) == 1:  # an output layer that the model itself does not call shows nothing here
            distance[2] = _changed(shown[0], of_model(inputs[0], put[0][1].transpose(0, 1)))
            distance[3] = _scaled(seen[0][0], states[0])
    groups = walk.groups
    for group in (groups.tp, groups.cp):
        all_reduce_max_(distance, group if group.size() > 1 else None)
    broadcast_(distance, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1)
    head, product, after, before = distance.tolist()
    walk.head_is_product = product <= 1
    if not max(head, after, before) <= 1:
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
def _watched(walk: StageWalk, known: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gives what goes into the output layer and comes out of it in the block.

    known: values of both signs and of every magnitude come out in place of its own
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_, inputs, output):
        logits, *rest = output if isinstance(output, tuple) else (output,)
        logits = _wide(logits, -8, 12) if known else logits
        seen.append((inputs[0], logits))
        return ((logits, *rest) if isinstance(output, tuple) else logits) if known else None

    handle = None if walk.head is None else walk.head.output_layer.register_forward_hook(watch)
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def _wide(like: Tensor, low: float, high: float) -> Tensor:
    values = torch.linspace(low, high, like.numel(), dtype=torch.float64, device=like.device).exp2()
    signs = torch.arange(like.numel(), device=like.device) % 2 * 2 - 1
    return (values * signs).view(like.shape).to(like)


@torch.no_grad()
def _off_product(head: OutputHead, hidden: Tensor) -> float:
    """The layer against its weight and bias, on rows of rising magnitude; above 1, or NaN, is more than a product."""
    if head.has_more_than_its_weight:
        return float("inf")
    width = head.weight.shape[1]
    rows = torch.randn(16, width, generator=torch.Generator().manual_seed(0)).to(hidden)
    rows = rows * torch.linspace(-4, 8, 16, device=rows.device).exp2()[:, None].to(rows)
    layer, product = head.project(rows).double(), head.products(rows).double()
    # Products of the same numbers may be added up in another order, which no rounding to the dtype hides.
    eps = torch.finfo(hidden.dtype).eps
    added = min(eps, torch.finfo(torch.float32).eps)
    off = (layer - product).abs().amax(1) / ((4 * eps + 64 * added) * layer.abs().amax(1)).clamp(min=1e-30)
    return float(torch.maximum(off.max(), _slope(layer, product) / (eps / 4 + 16 * added)))


def _slope(ours: Tensor, theirs: Tensor) -> Tensor:
    """How far one is the other times a number that is not 1: far below a rounding, since roundings cancel.

    Nothing where the other is 0 throughout, as on a rank whose part of the vocabulary is padding.
    """
    return ((ours - theirs) * theirs).sum().abs() / (theirs * theirs).sum().clamp(min=1e-30)


@torch.no_grad()
def _scaled(ours: Tensor, theirs: Tensor) -> float:
    """What goes into the layer against the hidden states, over what rounding may cost."""
    if ours.shape != theirs.shape:
        return float("inf")
    eps, ours, theirs = torch.finfo(theirs.dtype).eps, ours.double(), theirs.double()
    off = (ours - theirs).abs().max() / (64 * eps * theirs.abs().max()).clamp(min=1e-30)
    return float(torch.maximum(off, 2 * _slope(ours, theirs) / eps))


def _changed(ours: Tensor, theirs: Tensor) -> float:
    """Infinite unless both are the same numbers."""
    same = ours.shape == theirs.shape and torch.equal(ours.double(), theirs.double())
    return 0.0 if same else float("inf")


def _distance(whole: Tensor, ours: Tensor, start: int) -> float:
    """The largest difference over what rounding may cost; above 1 is another distribution."""
    if whole.shape[1] > ours.shape[1]:  # a model that gathers its logits
        whole = whole[:, start : start + ours.shape[1]]
    if whole.shape != ours.shape:
        return float("inf")
    tolerance = max(4 * torch.finfo(ours.dtype).eps, 1e-4) * float(whole.float().abs().max())
    return float((whole.float() - ours.float()).abs().max()) / max(tolerance, 1e-30)
