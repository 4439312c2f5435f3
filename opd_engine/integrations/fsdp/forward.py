"""A causal LM's wanted rows at its LM head: the one forward behind scoring and training, whole or sharded.

Prompt and padding rows are never projected. Where a model's head can stand apart it can be split over a tensor-parallel
mesh, or its logits made a chunk at a time; any other model makes them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from opd_engine.distillation.head import HiddenRows, LogitRows
from opd_engine.distillation.micro_loss import RowsHere
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.integrations.fsdp.layout import keeps_sequences_apart, model_input, reads_unequal_lengths
from opd_engine.integrations.fsdp.sharding import after_head
from opd_engine.integrations.hf.backend import even_shard
from opd_engine.integrations.hf.decoding import counts_from_zero
from opd_engine.integrations.hf.lm_head import reason_to_keep_whole
from opd_engine.parallel.collectives import copy_to_group, group_rank, group_size
from opd_engine.parallel.linear import vocab_parallel_lm_head
from opd_engine.parallel.sharded_modules import reshard, within
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
        self.after = after_head(model)
        group = tp_group if group_size(tp_group) > 1 else None
        if group is not None and self.after is None:
            raise ValueError(f"tp_mesh: the LM head of {_whole(model)}; wanted tp_mesh=None for this model")
        if workspace_bytes is not None and (self.after is None or self.after.is_scale):
            reason = _whole(model) if self.after is None else f"{type(model).__name__} scales its logits afterwards"
            raise ValueError(f"workspace_bytes: the LM head of {reason}; wanted workspace_bytes=None for this model")
        width = self.vocab_size if self.after is None else model.get_output_embeddings().weight.shape[0]
        own = even_shard(self.vocab_size, group, group_size(group), group_rank(group))
        self.shard = own or VocabShard(0, width, self.vocab_size)
        self._counts_from_zero = counts_from_zero(model)
        self.reshard()
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
        if not (self.packed or self._counts_from_zero):
            del given.arguments["position_ids"]
        exchange = RowsHere(given.packed_rows, batch.num_tokens, self.device)

        def project(hidden: Tensor) -> _Returned:
            return then(self._rows(hidden), exchange)

        def forward() -> _Returned:
            if self.after is None:
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
            return HiddenRows(hidden, weight, bias, self.shard, self.workspace_bytes, self.after.softcap)
        return LogitRows(self.after(vocab_parallel_lm_head(hidden, weight, self.shard, bias)), self.shard)


def _whole(model: PreTrainedModel) -> str:
    reason = reason_to_keep_whole(model) or "it changes its logits after the LM head in a way that is not known"
    return f"{type(model).__name__} cannot be used apart, since {reason}"
