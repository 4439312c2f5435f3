"""A causal LM's wanted rows at its LM head: the one forward behind scoring and training, whole or sharded.

Prompt and padding rows are never projected. Where the logits are nothing but the head's product the head can be split
over a tensor-parallel mesh, or its logits made a chunk at a time; any other model makes them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from opd_engine.distillation.head import HiddenRows, LogitRows
from opd_engine.distillation.micro_loss import RowsHere
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.integrations.fsdp.layout import keeps_sequences_apart, model_input, reads_unequal_lengths
from opd_engine.integrations.hf.backend import even_shard
from opd_engine.parallel.collectives import copy_to_group, group_rank, group_size
from opd_engine.parallel.linear import vocab_parallel_lm_head
from opd_engine.parallel.sharded_modules import is_sharded, reshard, within
from opd_engine.parallel.vocab import VocabShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from opd_engine.parallel.collectives import ProcessGroup

AtHead = LogitRows | HiddenRows
_Returned = TypeVar("_Returned")


class CausalForward:
    """One model's way to its rows.

    model: in the dtype it computes in, or sharded
    device: where it computes
    tp_group: ranks that split the LM head; they hold the same weights and see the same batches
    workspace_bytes: of logits at a time; None: those of all wanted rows
    packed: True and False are obeyed, None packs where the attention reads unequal lengths

    Raises: ValueError for a head that cannot be split or taken apart where it has to be, and where packed sequences
        would see each other.
    Communicates: passes of a few tokens, the same on every rank.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        *,
        tp_group: ProcessGroup | None = None,
        workspace_bytes: int | None = None,
        packed: bool | None = None,
    ) -> None:
        self.model, self.device, self.workspace_bytes = model, device, workspace_bytes
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.head_is_product = head_is_product(model, device)
        group = tp_group if group_size(tp_group) > 1 else None
        wanted = [("tp_mesh", group is not None), ("workspace_bytes", workspace_bytes is not None)]
        for argument, asked in wanted:
            if asked and not self.head_is_product:
                raise ValueError(
                    f"{argument}: {type(model).__name__}'s logits are more than the product with its LM head, which is "
                    f"what would be split; wanted {argument}=None for this model"
                )
        width = model.get_output_embeddings().weight.shape[0] if self.head_is_product else self.vocab_size
        own = even_shard(self.vocab_size, group, group_size(group), group_rank(group))
        self.shard = own or VocabShard(0, width, self.vocab_size)
        self.packed = reads_unequal_lengths(model) if packed is None else packed
        if self.packed and not keeps_sequences_apart(model, device):
            if packed:
                raise ValueError(
                    f"packed: {type(model).__name__} with attention {model.config._attn_implementation!r} lets packed "
                    "sequences change each other; wanted packed=False for this model"
                )
            self.packed = False

    def at_head(self, batch: RolloutBatch, then: Callable[[AtHead, RowsHere], _Returned]) -> _Returned:
        """`then` with the batch's wanted rows at the head, and which these are.

        Communicates: a sharded model's gathers, the same whatever the batch.
        """
        given = model_input(batch, self.device, packed=self.packed)
        exchange = RowsHere(given.packed_rows, batch.num_tokens, self.device)

        def project(hidden: Tensor) -> _Returned:
            return then(self._rows(hidden), exchange)

        def forward() -> _Returned:
            if not self.head_is_product:
                logits = self.model.forward(**given.arguments, use_cache=False).logits
                shard = VocabShard(0, logits.shape[-1], self.vocab_size)
                return then(LogitRows(logits.flatten(0, 1)[given.output_rows], shard), exchange)
            hidden = self.model.base_model(**given.arguments, use_cache=False).last_hidden_state
            return within(self.model.get_output_embeddings(), project, hidden.flatten(0, 1)[given.output_rows])

        return within(self.model, forward)

    def reshard(self) -> None:
        """After a pass without backward."""
        reshard(self.model)

    def _rows(self, hidden: Tensor) -> AtHead:
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if (group := self.shard.merge_group) is not None:
            # The sum over ranks puts every rank's rows into the gradient of the whole, replicated weight.
            own = slice(self.shard.vocab_start_index, self.shard.vocab_end_index)
            weight = copy_to_group(weight, group)[own]
            bias = None if bias is None else copy_to_group(bias, group)[own]
        if self.workspace_bytes is not None:
            return HiddenRows(hidden, weight, bias, self.shard, self.workspace_bytes)
        return LogitRows(vocab_parallel_lm_head(hidden, weight, self.shard, bias), self.shard)


@torch.no_grad()
def head_is_product(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the logits are the LM head's product with the last hidden states and nothing else, tried on a few tokens.

    The head must be exactly a Linear without hooks. Its input is blown up in the trial until a soft-cap or a scale
    would show in any dtype.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    kind = type(head).__bases__[-1] if is_sharded(head) else type(head)
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks)
    if kind is not nn.Linear or (not is_sharded(head) and any(hooks)):
        return False
    ids = torch.arange(4, device=device)[None] % int(model.config.get_text_config().vocab_size)
    seen: list[Tensor] = []

    def enlarge(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        seen.append(inputs[0])
        largest = float(inputs[0].float().abs().max()) or 1.0
        return inputs[0] * 2.0 ** round(7 - torch.tensor(largest).log2().item())

    def outcome() -> bool:
        states = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        hook = head.register_forward_pre_hook(enlarge)
        try:
            logits = model.forward(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        if states is None or len(seen) != 1 or not _close(seen[0], states):
            return False
        return _product_of(head, enlarge(head, (seen[0],)), logits)

    was_training = model.training
    model.eval()
    try:
        return within(model, outcome)
    finally:
        model.train(was_training)
        reshard(model)


def _product_of(head: nn.Linear, hidden: Tensor, logits: Tensor) -> bool:
    """Whether these are the head's own; the head is called as itself, so that a group of its own is whole."""
    ours = within(head, lambda states: nn.functional.linear(states, head.weight, head.bias), hidden)
    return ours.shape == logits.shape and ours.dtype == logits.dtype and _close(ours, logits)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    tolerance = 8 * torch.finfo(ours.dtype).eps * float(theirs.float().abs().max())
    return float((ours.float() - theirs.float()).abs().max()) <= tolerance
