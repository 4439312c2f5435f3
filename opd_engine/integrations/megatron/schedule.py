"""Walks a micro-batched pass through all pipeline stages with Megatron's own schedules; the last stage does the work.

Every rank of a data-parallel index makes the same calls with the same micro-batches, in the same order. What a pass
computes is one function of (micro-batch, hidden states) on the last stage; other stages only pass activations on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.integrations.megatron.batches import BatchLayout, MicroInput, micro_inputs
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.head import OutputHead, hidden_states_out, unwrapped
from opd_engine.integrations.megatron.limits import check_model

OnLastStage = Callable[[MicroInput, Tensor], Any]
"""(micro-batch, hidden states [local length, sequences, hidden_size]) -> what the pass collects."""


class StageWalk:
    """One Megatron model in this process and how passes walk it.

    model: a model, or a list of one, bare or wrapped
    vocab_size: the real vocabulary

    Raises: ValueError for a model or layout that is not supported, naming the option.
    """

    def __init__(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        vocab_size: int,
        groups: MegatronGroups,
        layout: BatchLayout,
        output_layer: torch.nn.Module | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        self.model = check_model(model, groups, layout)
        self.language_model = unwrapped(self.model)
        self.config = self.language_model.config
        self.groups, self.layout = groups, layout
        self.vocab_size = vocab_size
        self.head: OutputHead | None = None
        self.computes_in_chunks = workspace_bytes is not None
        self.head_is_product = False  # until check_head_is_last has seen that it is
        if groups.is_last_stage:
            self.head = OutputHead(self.language_model, groups, vocab_size, output_layer, workspace_bytes)
        self._plain_output = {"fp32_output": False} if _up_casts(self.model) else {}

    @property
    def device(self) -> torch.device:
        return next(self.language_model.parameters()).device

    def micro_inputs(self, batch: RolloutBatch, wanted: Tensor | None = None) -> list[MicroInput]:
        """The batch split by the layout. wanted: [num_tokens] bool, the rows asked for; default its loss_mask."""
        layout, groups = self.layout, self.groups
        batches = batch.micro_batches(layout.max_tokens, layout.max_seqs)
        masks = None if wanted is None else list(wanted.split([micro.num_tokens for micro in batches]))
        return micro_inputs(
            batches,
            layout,
            groups,
            self.device,
            row_multiple=groups.tp_size if self.config.sequence_parallel else 1,
            same_shape=groups.pp_size > 1 and not self.config.variable_seq_lengths,
            wanted=masks,
        )

    def forward(self, inputs: Sequence[MicroInput], on_last_stage: OnLastStage, *, to_hidden: bool = True) -> list[Any]:
        """A pass without gradient. Returns: per micro-batch what `on_last_stage` gave; empty on the other stages.

        to_hidden: False for the model's own logits [sequences, local length, vocab_shard_size] instead
        """

        def collect(micro: MicroInput, hidden: Tensor, non_loss_data: bool = True) -> Any:
            return on_last_stage(micro, hidden)

        with torch.no_grad():
            return self._walk(inputs, collect, to_hidden, forward_only=True, collect_non_loss_data=True)

    def forward_backward(self, inputs: Sequence[MicroInput], loss_of: OnLastStage) -> list[Any]:
        """A pass with backward and Megatron's reduction of the gradients.

        loss_of: gives (loss, num_tokens, anything), as Megatron's loss functions do. Returns: the third of each.
        """
        return self._walk(inputs, loss_of, True, forward_only=False)

    def _walk(
        self, inputs: Sequence[MicroInput], on_last_stage: OnLastStage, to_hidden: bool, **options: bool
    ) -> list[Any]:
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        def forward_step(iterator, model):
            micro = next(iterator)
            packing = {} if micro.packed_seq_params is None else {"packed_seq_params": micro.packed_seq_params}
            with hidden_states_out(self.language_model, to_hidden and self.groups.is_last_stage):
                output = model(
                    input_ids=micro.input_ids,
                    position_ids=micro.position_ids,
                    attention_mask=None,
                    **packing,
                    **self._plain_output,
                )
            return output, partial(on_last_stage, micro)

        first = inputs[0]
        return get_forward_backward_func(self.groups.pp_size, None)(
            forward_step_func=forward_step,
            data_iterator=iter(inputs),
            model=[self.model],
            num_microbatches=len(inputs),
            # Read by pipelines that do not exchange shapes; all micro-batches then have one.
            seq_length=first.global_length,
            micro_batch_size=first.input_ids.shape[0],
            p2p_communicator=P2PCommunicator(self.groups.pp, self.config),
            pg_collection=self.groups.collection(),
            **options,
        )


def _up_casts(model: torch.nn.Module) -> bool:
    from megatron.core.transformer.module import Float16Module

    return any(isinstance(module, Float16Module) for module in model.modules())
