"""A Megatron model as something that scores: the old policy, or a teacher of any architecture, with any pipeline depth.

One call walks all micro-batches through all stages at once, in eval mode and without gradient. Scores are real on the
last stage; the others get placeholders of the same shapes, so that every rank runs the same code above.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from opd_engine.distillation.head import HiddenRows, LogitRows
from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.functional.token_scores import TokenScores
from opd_engine.integrations.megatron.batches import BatchLayout, MicroInput
from opd_engine.integrations.megatron.context_parallel import own_rows, wanted_rows, whole_scores
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.head import HeadRows, KeptHead
from opd_engine.integrations.megatron.head_check import check_head_is_last
from opd_engine.integrations.megatron.schedule import StageWalk
from opd_engine.parallel.collectives import all_gather_stacked, broadcast_
from opd_engine.parallel.sequences import take_rows
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers.local import scoring_mode
from opd_engine.teachers.protocols import ChooseIds

_ScoreMicro = Callable[[MicroInput, LogitRows | HiddenRows, slice], TokenScores]
"""(micro-batch, the rows this rank scores, where the micro-batch lies in the batch) -> its whole scores."""


class MegatronScorer:
    """Implements Teacher, ChoosingTeacher and HiddenTeacher for a Megatron model.

    model: bare, or inside Float16Module and DistributedDataParallel; a list of one is fine. A teacher needs neither DDP
        nor an optimizer
    vocab_size: the model's real vocabulary; columns beyond it are padding
    groups: default those of megatron.core.parallel_state
    token_map: token -> id, to compare with others; None where there is no tokenizer
    output_layer: default the language model's own
    workspace_bytes: of logits that exist at a time, computed in chunks; None: those of all rows that count
    scoring: entered around every pass, on every rank: where weights are switched or brought to the device
    keep_eval: leave the model in eval mode instead of as it was found (a teacher that is never trained)

    Every tensor, pipeline and context rank of a data-parallel index makes the same calls with the same batches.

    Raises: ValueError for what is not supported, by name, and, at the first pass, for a model whose logits are not its
        output layer of its last hidden states.
    """

    splits_itself = True

    def __init__(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        *,
        vocab_size: int,
        groups: MegatronGroups | None = None,
        layout: BatchLayout | None = None,
        token_map: Mapping[str, int] | None = None,
        output_layer: torch.nn.Module | None = None,
        workspace_bytes: int | None = None,
        scoring: Callable[[], AbstractContextManager] | None = None,
        keep_eval: bool = False,
    ) -> None:
        self.groups = MegatronGroups.from_parallel_state() if groups is None else groups
        self.layout = BatchLayout() if layout is None else layout
        self.walk = StageWalk(model, vocab_size, self.groups, self.layout, output_layer, workspace_bytes)
        self.vocab_size = vocab_size
        self.keep_eval = keep_eval
        self._scoring = contextlib.nullcontext if scoring is None else scoring
        self._token_map = token_map
        self._head_is_checked = False
        self._head_of_hidden: KeptHead | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The language model."""
        return self.walk.language_model

    @property
    def shard(self) -> VocabShard | None:
        """The output layer's columns on this rank; None where this stage has no output layer."""
        return None if self.walk.head is None else self.walk.head.shard

    @property
    def holds_scores(self) -> bool:
        """Whether this rank's scores are real: it is on the last pipeline stage."""
        return self.groups.is_last_stage

    def token_to_id(self) -> Mapping[str, int] | None:
        return self._token_map

    def score(
        self, batch: RolloutBatch, indices: Tensor, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """Log-probs at given ids; on the host, for the whole batch, real where `holds_scores`.

        indices: [num_tokens, k] int64, -1 absent; target: [num_tokens] int64 or None
        Communicates: the forward's own, then as gather_log_probs and whole_scores a micro-batch.
        """
        if indices.dim() != 2 or indices.shape[0] != batch.num_tokens:
            raise ValueError(f"indices: wanted [num_tokens={batch.num_tokens}, k], got {list(indices.shape)}")

        def score_micro(micro: MicroInput, at_head: LogitRows | HiddenRows, place: slice) -> TokenScores:
            return self._gathered(micro, at_head, indices[place], target, place, temperature)

        return self._scored(batch, indices.shape[1], score_micro, indices, target is not None)

    def topk(
        self, batch: RolloutBatch, k: int, *, target: Tensor | None = None, temperature: float = 1.0
    ) -> TokenScores:
        """The model's own top-k; otherwise as `score`."""

        def score_micro(micro: MicroInput, at_head: LogitRows | HiddenRows, place: slice) -> TokenScores:
            return self._own_topk(micro, at_head, k, target, place, temperature)

        return self._scored(batch, k, score_micro, None, target is not None)

    def score_chosen(
        self,
        batch: RolloutBatch,
        k: int,
        choose: ChooseIds,
        *,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TokenScores:
        """Own top-k, then the scores at the ids `choose` makes of it, from one forward; otherwise as `score`."""
        rows = batch.loss_mask.nonzero().flatten()
        if not self.holds_scores:
            # The caller learns its ids through `choose`, so it is asked on every stage.
            own = placeholder(batch, k, None, False)
            chosen = choose(own.select(rows), rows)
            self._scored(batch, k, None, None, False)
            ids = torch.full((batch.num_tokens, chosen.shape[1]), -1, dtype=torch.int64)
            ids[rows] = chosen.cpu()
            return placeholder(batch, ids.shape[1], ids, target is not None)
        made: list[Tensor] = []

        def score_micro(micro: MicroInput, at_head: LogitRows | HiddenRows, place: slice) -> TokenScores:
            own = self._own_topk(micro, at_head, k, None, place, temperature)
            here = micro.batch.loss_mask.nonzero().flatten()
            chosen = choose(own.select(here.to(own.indices.device)), here + place.start)
            ids = chosen.new_full((micro.batch.num_tokens, chosen.shape[1]), -1)
            ids[here.to(ids.device)] = chosen
            made.append(ids)
            return self._gathered(micro, at_head, ids, target, place, temperature)

        return self._scored(batch, k, score_micro, None, target is not None)

    def hidden(self, batch: RolloutBatch) -> Tensor:
        """This rank's columns of the hidden states of the rows that count: [rows, hidden_size / tp_size], on the host.

        Nothing off the last stage. The LM head as it is now is kept for `head_on`: a copy on the host, where the
        scoring context takes the weights away again.

        Raises: ValueError for a model whose output layer is more than a product with its weight.
        Communicates: the forward's own, a number over the pipeline's group, and an all-gather of the hidden states over
            the context-parallel group.
        """
        groups = self.groups

        def on_last_stage(micro: MicroInput, hidden: Tensor) -> Tensor:
            whole = wanted_rows(self.walk.head.chosen(hidden, micro.output_rows), micro, groups)
            own = whole.chunk(groups.tp_size, 1)[groups.tp_rank] if _divides(whole, groups) else whole
            return own.to("cpu")

        with self._scoring_pass():
            if not self.walk.head_is_product or self._head_has_changed():
                raise ValueError("hidden: wanted an output layer that is a product with its weight (and bias)")
            parts = self.walk.forward(self.walk.micro_inputs(batch), on_last_stage)
            if self.holds_scores:
                self._head_of_hidden = self._kept_head()
        return torch.cat(parts) if parts else torch.empty(int(batch.loss_mask.sum()), 0)

    def _head_has_changed(self) -> bool:
        """Whether the output layer got more than its weight since it was looked at; the same on every stage."""
        head, groups = self.walk.head, self.groups
        more = torch.tensor(head is not None and head.has_more_than_its_weight, device=self.walk.device).int()
        return bool(broadcast_(more, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1))

    def _kept_head(self) -> KeptHead:
        head, copied = self.walk.head, self._scoring is not contextlib.nullcontext

        def kept(value: Tensor | None) -> Tensor | None:
            if value is None or not copied:
                return None if value is None else value.detach()
            host = value.detach().to("cpu", copy=True)
            return host.pin_memory() if value.is_cuda else host

        options = {"shard": head.shard, "workspace_bytes": head.workspace_bytes, "device": head.weight.device}
        return KeptHead(kept(head.weight), kept(head.bias), **options)

    def head_on(self, device: torch.device | None) -> KeptHead:
        """The LM head as it was when `hidden` was asked last; None: on the device where that ran."""
        return self._head_of_hidden.to(device)

    def full_rows(self, batch: RolloutBatch) -> HeadRows:
        """Logits of the rows that count, made in parts from their hidden states. Communicates: as `hidden`."""
        hidden = self.hidden(batch)
        return HeadRows(hidden, self.head_on(None)) if self.holds_scores else HeadRows(hidden[:0], None)

    def next_token_logits(self, batch: RolloutBatch) -> Tensor:
        """The full vocabulary's logits after each sequence: [num_seqs, vocab_size] float32, the same on every rank.

        A whole forward without a cache: for evaluation and for rollouts of small models.
        Communicates: all-gathers over the tensor- and context-parallel groups, a broadcast over the pipeline's.
        """
        last = torch.zeros(batch.num_tokens, dtype=torch.bool)
        last[batch.cu_seqlens[1:].long() - 1] = True
        groups = self.groups

        def last_rows(micro: MicroInput, hidden: Tensor) -> Tensor:
            logits = self.walk.head.logits(hidden, micro.output_rows).float()
            group = groups.tp if groups.tp_size > 1 else None
            full = torch.cat(list(all_gather_stacked(logits, group)), 1)[:, : self.vocab_size]
            return wanted_rows(full, micro, groups)

        with self._scoring_pass():
            parts = self.walk.forward(self.walk.micro_inputs(batch, last), last_rows)
            result = torch.zeros(batch.num_seqs, self.vocab_size, device=self.walk.device)
            if parts:
                result = torch.cat(parts).contiguous()
            return broadcast_(result, groups.pp if groups.pp_size > 1 else None, source=groups.pp_size - 1)

    @contextlib.contextmanager
    def _scoring_pass(self) -> Iterator[None]:
        """Eval mode and the caller's own context around a pass; before the first, the head is looked at."""
        with scoring_mode(self), self._scoring():
            if not self._head_is_checked:
                check_head_is_last(self.walk)
                self._head_is_checked = True
            yield
        if self.keep_eval:
            self.module.eval()

    def _gathered(
        self,
        micro: MicroInput,
        at_head: LogitRows | HiddenRows,
        indices: Tensor,
        target: Tensor | None,
        place: slice,
        temperature: float,
    ) -> TokenScores:
        device = self.walk.device
        rows = own_rows(micro, self.groups, device)
        indices = indices.to(device)
        scores = at_head.gather(
            take_rows(indices, rows, fill=-1),
            target=None if target is None else take_rows(target[place].to(device), rows, fill=-1),
            temperature=temperature,
        )
        return whole_scores(scores, micro, self.groups, indices)

    def _own_topk(
        self,
        micro: MicroInput,
        at_head: LogitRows | HiddenRows,
        k: int,
        target: Tensor | None,
        place: slice,
        temperature: float,
    ) -> TokenScores:
        device = self.walk.device
        rows = own_rows(micro, self.groups, device)
        target = None if target is None else take_rows(target[place].to(device), rows, fill=-1)
        return whole_scores(at_head.topk(k, target=target, temperature=temperature), micro, self.groups)

    def _scored(
        self,
        batch: RolloutBatch,
        width: int,
        score_micro: _ScoreMicro | None,
        indices: Tensor | None,
        with_target: bool,
    ) -> TokenScores:
        """Every micro-batch's scores, one after the other, on the host; placeholders where this stage has none."""
        if batch.num_seqs == 0:
            return placeholder(batch, width, indices, with_target)
        places: dict[int, slice] = {}

        def on_last_stage(micro: MicroInput, hidden: Tensor) -> TokenScores:
            at_head = self.walk.head.rows(hidden, micro.output_rows)
            return score_micro(micro, at_head, places[id(micro)]).to("cpu")

        with self._scoring_pass():
            # Inside: a staged teacher is on the device only now, and its inputs go where it is.
            inputs = self.walk.micro_inputs(batch)
            end = 0
            for micro in inputs:
                places[id(micro)] = slice(end, end + micro.batch.num_tokens)
                end += micro.batch.num_tokens
            parts = self.walk.forward(inputs, on_last_stage)
        return TokenScores.cat(parts) if parts else placeholder(batch, width, indices, with_target)


def _divides(values: Tensor, groups: MegatronGroups) -> bool:
    return values.shape[1] % groups.tp_size == 0


def placeholder(batch: RolloutBatch, width: int, indices: Tensor | None, with_target: bool) -> TokenScores:
    """Scores without content, of the shapes the last stage has: no ids unless given, and all mass in the tail."""
    ids = None if indices is None else indices.cpu()
    return TokenScores.absent(batch.num_tokens, width, indices=ids, has_target=with_target)
