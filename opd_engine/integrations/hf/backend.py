"""A transformers causal LM as a model backend: packed rollouts in, row-aligned logits or hidden states out.

Sequences are right-padded into one batch, and only real rows reach the LM head. Under tensor parallelism the body is
replicated and the LM head is split over the vocabulary; a tied embedding then still gets its whole gradient everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.integrations.hf.decoding import counts_from_zero
from opd_engine.integrations.hf.lm_head import AfterHead, find_after_head, reason_to_keep_whole
from opd_engine.integrations.hf.models import language_model, max_positions, token_to_id
from opd_engine.parallel.collectives import copy_to_group
from opd_engine.parallel.linear import vocab_parallel_lm_head
from opd_engine.parallel.vocab import VocabShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from opd_engine.distillation.actor import Actor


def pad_packed(batch: RolloutBatch, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """The packed tokens as a right-padded batch.

    Returns: input_ids [num_seqs, longest] int64, attention_mask of the same shape (1 is real), and rows [num_tokens]
        int64: where packed row i lies in the flattened batch.
    """
    lengths = batch.cu_seqlens.diff().long()
    longest = int(lengths.max()) if lengths.numel() else 0
    rows = batch.row_sequence() * longest + batch.row_positions()
    input_ids = torch.zeros(batch.num_seqs * longest, dtype=torch.int64, device=batch.tokens.device)
    input_ids[rows] = batch.tokens
    attention_mask = torch.zeros_like(input_ids)
    attention_mask[rows] = 1
    shape = (batch.num_seqs, longest)
    return input_ids.view(shape).to(device), attention_mask.view(shape).to(device), rows.to(device)


class HFBackend:
    """Any causal LM: `logits` comes from the model's own forward, whatever it does after its LM head.

    module: the model.  tokenizer: for `token_to_id`; None where there is none to compare.
    """

    shard: VocabShard | None = None

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.vocab_size = int(language_model(module).config.get_text_config().vocab_size)
        self.max_positions = max_positions(language_model(module))
        self._token_map = None if tokenizer is None else token_to_id(tokenizer)
        self._counts_from_zero: bool | None = None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def token_to_id(self) -> Mapping[str, int] | None:
        """The tokenizer's map, added tokens included; None without a tokenizer."""
        return self._token_map

    def share_token_map(self, other: HFBackend | Actor) -> None:
        """Takes over the other's map where the two are equal: comparing an object with itself costs nothing later."""
        if self._token_map == (theirs := other.token_to_id()):
            self._token_map = theirs

    def _rows_of(self, batch: RolloutBatch, model: torch.nn.Module, output: str) -> Tensor:
        input_ids, attention_mask, rows = pad_packed(batch, self.device)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._counts_from_zero is None:
            self._counts_from_zero = counts_from_zero(self.module)
        if self._counts_from_zero:  # written out: some models would otherwise count the padding
            given["position_ids"] = torch.arange(input_ids.shape[1], device=self.device).expand(input_ids.shape)
        outputs = model(**given, use_cache=False)
        return getattr(outputs, output).flatten(0, 1)[rows]

    def logits(self, batch: RolloutBatch) -> Tensor:
        """Logits [num_tokens, vocab_size], in the model's dtype; row i predicts packed token i + 1.

        Grad: for the module's parameters, where grad mode is on. Communicates: nothing.
        """
        if batch.num_tokens == 0:
            dtype = next(self.module.parameters()).dtype
            return torch.zeros(0, self.vocab_size, dtype=dtype, device=self.device)
        return self._rows_of(batch, self.module, "logits")


class ProjectingHFBackend(HFBackend):
    """A causal LM whose logits are its LM head applied to its last hidden states, so that the head can be sharded.

    shard: this rank's columns, or None for all of them. Every rank holds the whole weights and sees the same batches.
    after: what the model does to its head's output, where find_after_head has found it already

    Every use looks whether the head still stands apart: an adapter or a wrapper that came later is refused by name.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        shard: VocabShard | None = None,
        after: AfterHead | None = None,
    ) -> None:
        super().__init__(module, tokenizer)
        if after is None and (after := find_after_head(module)) is None:
            raise ValueError(f"module: the head of {type(module).__name__} cannot stand apart, since {_reason(module)}")
        self.shard, self.after = shard, after
        if shard is not None and shard.vocab_size != self.vocab_size:
            raise ValueError(f"shard: wanted vocab_size {self.vocab_size}, the model's, got {shard.vocab_size}")

    def hidden(self, batch: RolloutBatch) -> Tensor:
        """Hidden states before the LM head [num_tokens, hidden_size]. Communicates: nothing."""
        head = self._head()
        if batch.num_tokens == 0:
            return torch.zeros(0, head.weight.shape[1], dtype=head.weight.dtype, device=self.device)
        return self._rows_of(batch, self.module.base_model, "last_hidden_state")

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab_shard_size] of those hidden states.

        Communicates: backward under a shard, one all-reduce of the hidden gradient and one of the head's gradient.
        Grad: the whole head's gradient, the same on every rank, also where it is tied to the embedding.
        """
        head = self._head()
        if self.shard is None:
            return self.after(torch.nn.functional.linear(hidden, head.weight, head.bias))
        shard, group = self.shard, self.shard.merge_group
        rows = slice(shard.vocab_start_index, shard.vocab_end_index)
        # The sum over ranks puts every rank's rows into the gradient of the whole, replicated weight.
        weight = copy_to_group(head.weight, group)[rows]
        bias = None if head.bias is None else copy_to_group(head.bias, group)[rows]
        return self.after(vocab_parallel_lm_head(hidden, weight, shard, bias))

    def logits(self, batch: RolloutBatch) -> Tensor:
        """Logits [num_tokens, vocab_shard_size], in the model's dtype; row i predicts packed token i + 1."""
        return self.project(self.hidden(batch))

    def _head(self) -> torch.nn.Linear:
        if (reason := reason_to_keep_whole(self.module)) is not None:
            raise ValueError(
                f"module: {type(self.module).__name__} was changed after its backend was made: {reason}; call "
                "make_backend again, after everything else was done to the model"
            )
        return self.module.get_output_embeddings()


def make_backend(
    module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, shard: VocabShard | None = None
) -> HFBackend:
    """The backend that fits the model: a projecting one where its head can stand apart, else the general one.

    module: a causal LM, bare or inside DistributedDataParallel, FSDP2, torch.compile or peft: those keep their forward

    Raises: ValueError where a shard is wanted of a model whose head cannot be sharded.
    """
    after = find_after_head(module)
    if after is not None:
        return ProjectingHFBackend(module, tokenizer, shard=shard, after=after)
    if shard is not None:
        raise ValueError(
            f"shard: the head of {type(module).__name__} cannot be split over ranks here, since {_reason(module)}; "
            "wanted run.tp = 1 for this model"
        )
    return HFBackend(module, tokenizer)


def _reason(module: torch.nn.Module) -> str:
    return reason_to_keep_whole(module) or "it changes its logits after the LM head in a way that is not known"


def even_shard(vocab_size: int, tp_group, tp_size: int, tp_rank: int) -> VocabShard | None:
    """Equal shares of the vocabulary, the last ranks' smaller by what is missing; None without a group."""
    if tp_group is None:
        return None
    width = -(-vocab_size // tp_size)
    start = min(tp_rank * width, vocab_size)
    return VocabShard(start, min(start + width, vocab_size), vocab_size, tp_group)
