"""The last stage's output layer, asked for the rows that are wanted and for no others.

Hidden states leave the model before its own output layer does, so that prompt and padding rows are never projected and
no fp32 up-cast copies the logits. The layer itself is Megatron's: tied weights, fused weight gradients and the
hidden-state reduction stay its business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from opd_engine.distillation.head import HiddenRows, LogitRows
from opd_engine.functional.linear_scores import linear_gather_log_probs
from opd_engine.functional.token_scores import TokenScores
from opd_engine.parallel.collectives import all_gather_replicated, all_gather_stacked
from opd_engine.parallel.vocab import VocabShard

if TYPE_CHECKING:
    from opd_engine.integrations.megatron.groups import MegatronGroups


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The language model inside DistributedDataParallel and Float16Module."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model


@dataclass(frozen=True)
class KeptHead:
    """An LM head apart from its model, for hidden states that were kept.

    weight: [vocab_shard_size, hidden_size]; bias: [vocab_shard_size] or None; device: where its model ran
    """

    weight: Tensor
    bias: Tensor | None
    shard: VocabShard
    workspace_bytes: int | None
    device: torch.device

    def to(self, device: torch.device | None) -> KeptHead:
        """On another device; None is `device`."""
        device = self.device if device is None else device
        bias = None if self.bias is None else self.bias.to(device, non_blocking=True)
        return replace(self, weight=self.weight.to(device, non_blocking=True), bias=bias)

    @torch.no_grad()
    def score(self, hidden: Tensor, indices: Tensor, *, temperature: float = 1.0) -> TokenScores:
        """Log-probs at `indices` [n, k]; hidden: [n, this rank's columns of hidden_size, or all].

        Communicates: one all-gather of the hidden states' columns, then as linear_gather_log_probs.
        """
        hidden = self._whole(hidden)
        options = {"bias": self.bias, "shard": self.shard, "workspace_bytes": self.workspace_bytes}
        return linear_gather_log_probs(
            hidden, self.weight, indices.to(hidden.device), temperature=temperature, **options
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab_shard_size] of hidden states as `score` takes them. Communicates: the same all-gather."""
        return torch.nn.functional.linear(self._whole(hidden), self.weight, self.bias)

    def _whole(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.weight.device)
        if hidden.shape[1] < self.weight.shape[1]:
            hidden = torch.cat(list(all_gather_stacked(hidden.contiguous(), self.shard.tp_group)), 1)
        return hidden


@dataclass(frozen=True)
class HeadRows:
    """Implements FullRows: hidden states and the head that makes their logits; no head off the last stage."""

    hidden: Tensor
    head: KeptHead | None

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def shard(self) -> VocabShard | None:
        return None if self.head is None else self.head.shard

    def logits(self, rows: slice) -> Tensor:
        return self.head.logits(self.hidden[rows])


class OutputHead:
    """Hidden states of the last stage -> what gives scores of some rows.

    language_model: the unwrapped model; with `share_embeddings_and_output_weights` its embedding is the weight
    vocab_size: real vocabulary; what the layer has beyond it is padding
    output_layer: a ColumnParallelLinear or the like; default `language_model.output_layer`
    workspace_bytes: of logits at a time; None: the layer itself makes the logits of all wanted rows
    """

    def __init__(
        self,
        language_model: torch.nn.Module,
        groups: MegatronGroups,
        vocab_size: int,
        output_layer: torch.nn.Module | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        self.language_model = language_model
        self.groups = groups
        self.output_layer = language_model.output_layer if output_layer is None else output_layer
        self.workspace_bytes = workspace_bytes
        width = self.weight.shape[0]
        padded = width * groups.tp_size
        if not 1 <= vocab_size <= padded:
            raise ValueError(
                f"vocab_size: wanted the real vocabulary, at most the output layer's {padded} columns, got {vocab_size}"
            )
        start = groups.tp_rank * width
        group = groups.tp if groups.tp_size > 1 else None
        self.shard = VocabShard(start, start + width, vocab_size, group)

    def _tied_weight(self) -> Tensor | None:
        if getattr(self.language_model, "share_embeddings_and_output_weights", False):
            return self.language_model.shared_embedding_or_output_weight()
        return None

    @property
    def weight(self) -> Tensor:
        """[vocab_shard_size, hidden_size]: the layer's own, or the embedding's."""
        tied = self._tied_weight()
        return self.output_layer.weight if tied is None else tied

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.output_layer, "bias", None)

    def rows(self, hidden: Tensor, rows: Tensor) -> LogitRows | HiddenRows:
        """The wanted rows, ready to be scored; otherwise as `chosen`."""
        chosen = self.chosen(hidden, rows)
        # What came to the layer after it was looked at, an adapter's hook say, keeps its logits whole.
        if self.workspace_bytes is not None and not self.has_more_than_its_weight:
            return HiddenRows(chosen, self.weight, self.bias, self.shard, self.workspace_bytes)
        return LogitRows(self.project(chosen), self.shard)

    def chosen(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Hidden states of the wanted rows: [n, hidden_size], whole on every tensor-parallel rank.

        hidden: [local length, sequences, hidden_size], split over the tensor-parallel ranks on dim 0 under sequence
            parallel; rows: [n] int64 of the whole, flattened

        Communicates: backward, one all-reduce of the n rows' hidden gradient; under sequence parallel also one
            all-gather of the hidden states, forward.
        """
        split = self._splits_sequence
        if split:
            # Rows are chosen from the whole sequence, so the gather stands before the layer instead of inside it. The
            # chosen rows' gradient is then summed over the ranks, and each takes its part of that.
            hidden = all_gather_replicated(hidden, self.groups.tp).flatten(0, 1)
        return hidden.flatten(0, 1).index_select(0, rows)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, vocab_shard_size] of the wanted rows, by the layer itself; otherwise as `chosen`."""
        return self.project(self.chosen(hidden, rows))

    def products(self, chosen: Tensor) -> Tensor:
        """Logits of chosen rows by the layer's weight and bias alone: all that a loss without logits knows of it."""
        return torch.nn.functional.linear(chosen, self.weight, self.bias)

    @property
    def has_more_than_its_weight(self) -> bool:
        """Whether the layer does what its weight and bias do not show: hooks, parametrizations, another forward."""
        layer = self.output_layer
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        replaced = "forward" in layer.__dict__ or getattr(layer, "_compiled_call_impl", None) is not None
        return replaced or any(hooks) or parametrize.is_parametrized(layer)

    @property
    def _splits_sequence(self) -> bool:
        return bool(getattr(self.output_layer, "sequence_parallel", False))

    def project(self, chosen: Tensor) -> Tensor:
        """Logits of chosen rows [n, vocab_shard_size], by the layer itself."""
        with _whole_input(self.output_layer, self._splits_sequence):
            logits, _ = self.output_layer(chosen.unsqueeze(1), weight=self._tied_weight(), runtime_gather_output=False)
        return logits.squeeze(1)


@contextlib.contextmanager
def _whole_input(output_layer: torch.nn.Module, split: bool) -> Iterator[None]:
    """The layer without its own sequence-parallel gather, for one call, as Megatron does it for inference."""
    if not split:
        yield
        return
    output_layer.sequence_parallel = False
    try:
        yield
    finally:
        output_layer.sequence_parallel = True


@contextlib.contextmanager
def hidden_states_out(language_model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """The model ends after its final norm, as on a stage that has no output layer, for one forward."""
    if not wanted:
        yield
        return
    language_model.post_process = False
    try:
        yield
    finally:
        language_model.post_process = True
