"""RolloutBatch: what the student generated, packed without padding, with everything that travels with a sequence.

Row i of every row-aligned tensor belongs to the distribution that predicts packed token i + 1; the last row of a
sequence predicts nothing and never counts. The batch lives on the host: a trainer moves what it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_engine.distillation.batch_fields import (
    BOUNDS,
    DTYPES,
    EITHER,
    ROWS,
    SEQUENCES,
    along,
    check_shape,
    digest,
    moved,
    require_declared,
)
from opd_engine.distillation.batch_fields import chosen as entries
from opd_engine.distillation.engine_numbers import check_ids, check_log_probs, given_log_prob, numbers
from opd_engine.distillation.rollout_topk import TopLogProbs, check_topk, check_topk_shapes, pack_top_logprobs

TeacherNames = str | tuple[str, ...]
"""The teacher of a sequence: one name, several names, or "" for the pool's default."""


@require_declared
@dataclasses.dataclass
class RolloutBatch:
    """Packed rollouts.

    tokens: [num_tokens], int64, sequences one after the other
    cu_seqlens: [num_seqs + 1], int32, where each sequence begins, and the end
    loss_mask: [num_tokens], bool, row-aligned: row i is True when the model generated token i + 1 and it counts
    sample_ids: [num_seqs], int64, unique over the global batch
    rollout_ids: [num_seqs], int64, the rollout a sample is part of (one rollout may give several samples)
    teacher_names: per sequence a name, a tuple of names, or "" for the pool's default
    rewards: [num_seqs], float, or None
    rollout_log_probs: [num_tokens], float, row-aligned: the rollout engine's log-prob of token i + 1, or None
    rollout_topk_ids: [num_tokens, k], int64, row-aligned: the ids the rollout engine found likeliest in the place of
        token i + 1, -1 where it gave fewer, or None
    rollout_topk_log_probs: [num_tokens, k], float, their log-probs there; read to choose among more ids than wanted
    teacher_weights: teacher name -> [num_seqs] or [num_tokens] weights that replace the spec's; several teachers only
    teacher_prompts: per sequence the prompt that teachers with `teacher_tokens` see instead (int64 [length]), or None
    sample_weights: [num_seqs], float64, weights already normalised over the global batch, or None
    advantages: [num_seqs], float, for the policy gradient, or None
    task_names: per sequence the task it belongs to, for metrics, or None
    """

    tokens: Tensor = along(ROWS, "int64")
    cu_seqlens: Tensor = along(BOUNDS, "int32")
    loss_mask: Tensor = along(ROWS, "bool")
    sample_ids: Tensor = along(SEQUENCES, "int64")
    rollout_ids: Tensor = along(SEQUENCES, "int64")
    teacher_names: list[TeacherNames] = along(SEQUENCES)
    rewards: Tensor | None = along(SEQUENCES, "float", finite=True, default=None)
    rollout_log_probs: Tensor | None = along(ROWS, "float", default=None)
    rollout_topk_ids: Tensor | None = along(ROWS, "int64", width=True, fill=-1, default=None)
    rollout_topk_log_probs: Tensor | None = along(ROWS, "float", width=True, fill=-torch.inf, default=None)
    teacher_weights: Mapping[str, Tensor] | None = along(EITHER, "float", default=None)
    teacher_prompts: list[Tensor | None] | None = along(SEQUENCES, default=None)
    sample_weights: Tensor | None = along(SEQUENCES, "float", finite=True, default=None)
    advantages: Tensor | None = along(SEQUENCES, "float", finite=True, default=None)
    task_names: list[str] | None = along(SEQUENCES, default=None)

    def __post_init__(self) -> None:
        # Shapes and dtypes only: no values are read, so a batch on a device costs no synchronisation here.
        for name in ("tokens", "cu_seqlens"):
            value, dtype = getattr(self, name), "int64" if name == "tokens" else "int32"
            if not isinstance(value, Tensor) or value.dim() != 1 or not DTYPES[dtype](value.dtype):
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: wanted a one-dimensional torch.{dtype} tensor, got {got}")
        if self.cu_seqlens.numel() == 0:
            raise ValueError("cu_seqlens: wanted num_seqs + 1 entries beginning with 0, got none")
        for field in dataclasses.fields(self):
            check_shape(field, getattr(self, field.name), self.num_tokens, self.num_seqs)
        check_topk_shapes(self.rollout_topk_ids, self.rollout_topk_log_probs, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def lengths(self) -> list[int]:
        """Tokens in each sequence."""
        return self.cu_seqlens.diff().tolist()

    def validate(self) -> None:
        """Check the values.

        Raises:
            ValueError: with the field, the sequence and what is wrong with it.
        """
        bounds = self.cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != self.num_tokens:
            raise ValueError(
                f"cu_seqlens: wanted to begin with 0 and end with num_tokens={self.num_tokens}, "
                f"got {bounds[0]} and {bounds[-1]}"
            )
        for sequence, length in enumerate(self.lengths()):
            if length < 1:
                raise ValueError(f"cu_seqlens: sequence {sequence} has {length} tokens, wanted at least 1")
        last_rows = self.cu_seqlens[1:].long() - 1
        counted = self.loss_mask[last_rows].nonzero().flatten().tolist()
        if counted:
            raise ValueError(
                f"loss_mask: the last row of sequence {counted[0]} (row {int(last_rows[counted[0]])}) counts, but it "
                "predicts no token of that sequence; row i predicts token i + 1"
            )
        if self.num_tokens and int(self.tokens.min()) < 0:
            row = int((self.tokens < 0).nonzero()[0])
            sequence = int(self.row_sequence()[row])
            raise ValueError(
                f"tokens: wanted ids >= 0, got {int(self.tokens[row])} in sample {int(self.sample_ids[sequence])}, "
                f"position {row - bounds[sequence]}"
            )
        unique, counts = self.sample_ids.unique(return_counts=True)
        if unique.numel() != self.num_seqs:
            raise ValueError(f"sample_ids: wanted unique ids, {int(unique[counts > 1][0])} occurs more than once")
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if field.metadata["finite"] and values is not None and not bool(values.isfinite().all()):
                bad = int((~values.isfinite()).nonzero()[0])
                raise ValueError(f"{field.name}: wanted finite values, got {float(values[bad])} for sequence {bad}")
        if self.sample_weights is not None and bool((self.sample_weights < 0).any()):
            bad = int((self.sample_weights < 0).nonzero()[0])
            raise ValueError(f"sample_weights: wanted >= 0, got {float(self.sample_weights[bad])} for sequence {bad}")
        if self.rollout_log_probs is not None:
            check_log_probs(self.rollout_log_probs, self.loss_mask, self.sample_ids, self.cu_seqlens)
        check_topk_shapes(self.rollout_topk_ids, self.rollout_topk_log_probs, self.num_tokens)
        if self.rollout_topk_ids is not None:
            rows = self.loss_mask.nonzero().flatten()
            check_topk(self.rollout_topk_ids, self.rollout_topk_log_probs, rows)
        for sequence, prompt in enumerate(self.teacher_prompts or []):
            if prompt is not None and (prompt.dim() != 1 or prompt.dtype != torch.int64 or prompt.numel() == 0):
                raise ValueError(
                    f"teacher_prompts[{sequence}]: wanted a non-empty int64 [length], got {prompt.dtype} "
                    f"{list(prompt.shape)}"
                )

    def next_tokens(self) -> Tensor:
        """The token each row predicts: [num_tokens] int64, -1 on the last row of a sequence."""
        following = torch.full_like(self.tokens, -1)
        following[:-1] = self.tokens[1:]
        following[self.cu_seqlens[1:].long() - 1] = -1
        return following

    def row_sequence(self) -> Tensor:
        """The sequence each row lies in: [num_tokens] int64."""
        order = torch.arange(self.num_seqs, device=self.tokens.device)
        return order.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.num_tokens)

    def row_positions(self) -> Tensor:
        """The position of each row in its sequence: [num_tokens] int64."""
        rows = torch.arange(self.num_tokens, device=self.tokens.device)
        return rows - self.cu_seqlens[:-1].long()[self.row_sequence()]

    def loss_row_counts(self) -> Tensor:
        """Rows that count in each sequence: [num_seqs] int64."""
        counts = torch.zeros(self.num_seqs, dtype=torch.int64, device=self.tokens.device)
        return counts.index_add_(0, self.row_sequence(), self.loss_mask.long())

    def task_rows(self, tasks: Sequence[str]) -> Tensor:
        """Which rows belong to each task: [tasks, num_tokens] bool. Raises: ValueError for a task not among them."""
        names = self.task_names or [""] * self.num_seqs
        if unknown := sorted(set(names) - set(tasks) - {""}):
            raise ValueError(f"task_names: wanted tasks among {', '.join(tasks)}, got {unknown[0]!r}")
        of_sequence = torch.tensor([[name == task for name in names] for task in tasks], dtype=torch.bool)
        return of_sequence.view(len(tasks), self.num_seqs).to(self.tokens.device)[:, self.row_sequence()]

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same batch on another device."""

        return RolloutBatch(**{f.name: moved(getattr(self, f.name), device) for f in dataclasses.fields(self)})

    def digests(self) -> dict[str, int]:
        """A number of each field's content, by name: what two processes compare that must hold the same batch."""
        return {field.name: digest(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def select(self, sequences: Sequence[int]) -> RolloutBatch:
        """The given sequences, in the given order, packed anew."""
        for sequence in sequences:
            if not 0 <= sequence < self.num_seqs:
                raise ValueError(f"sequences: wanted indices in [0, {self.num_seqs}), got {sequence}")
        bounds = self.cu_seqlens.tolist()
        device = self.tokens.device
        chosen = torch.tensor(list(sequences), dtype=torch.int64, device=device)
        spans = [torch.arange(bounds[s], bounds[s + 1], device=device) for s in sequences]
        rows = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64, device=device)
        lengths = torch.tensor([0, *(bounds[s + 1] - bounds[s] for s in sequences)], device=device)
        return RolloutBatch(
            **{
                field.name: lengths.cumsum(0).to(torch.int32)
                if field.metadata["axis"] == BOUNDS
                else entries(field, getattr(self, field.name), rows, chosen, self.num_tokens)
                for field in dataclasses.fields(self)
            }
        )

    def micro_batches(self, max_tokens: int | None = None, max_seqs: int | None = None) -> list[RolloutBatch]:
        """Split between sequences, in order, at most `max_tokens` and `max_seqs` each.

        A sequence longer than `max_tokens` stands alone: it is never cut.
        """
        for name, limit in (("max_tokens", max_tokens), ("max_seqs", max_seqs)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}: wanted at least 1, got {limit}")
        groups: list[list[int]] = []
        tokens_in_last = 0
        for sequence, length in enumerate(self.lengths()):
            full = not groups
            full |= max_tokens is not None and tokens_in_last + length > max_tokens
            full |= max_seqs is not None and bool(groups) and len(groups[-1]) >= max_seqs
            if full:
                groups.append([])
                tokens_in_last = 0
            groups[-1].append(sequence)
            tokens_in_last += length
        if len(groups) == 1:
            return [self]
        return [self.select(group) for group in groups]

    def teacher_view(self) -> tuple[RolloutBatch, Tensor]:
        """The batch as a teacher with its own prompts sees it: teacher prompt, then the same generated tokens.

        Returns:
            the other batch, and for each row here the row there that predicts the same token ([num_tokens] int64,
            -1 for rows before the first that counts).
        """
        prompts = self.teacher_prompts or [None] * self.num_seqs
        bounds = self.cu_seqlens.tolist()
        tokens, masks, lengths = [], [], [0]
        row_map = torch.full_like(self.tokens, -1)
        there = 0
        for sequence, prompt in enumerate(prompts):
            start, end = bounds[sequence], bounds[sequence + 1]
            counted = self.loss_mask[start:end].nonzero().flatten()
            first = start + int(counted[0]) if counted.numel() else end - 1
            head = self.tokens[start : first + 1] if prompt is None else prompt.to(self.tokens.device)
            own = torch.cat([head, self.tokens[first + 1 : end]])
            mask = torch.zeros_like(own, dtype=torch.bool)
            mask[head.numel() - 1 :] = self.loss_mask[first:end]
            row_map[first:end] = there + torch.arange(head.numel() - 1, own.numel(), device=self.tokens.device)
            tokens.append(own)
            masks.append(mask)
            lengths.append(own.numel())
            there += own.numel()
        view = dataclasses.replace(
            self,
            tokens=torch.cat(tokens) if tokens else self.tokens,
            cu_seqlens=torch.tensor(lengths, device=self.tokens.device).cumsum(0).to(torch.int32),
            loss_mask=torch.cat(masks) if masks else self.loss_mask,
            rollout_log_probs=None,
            rollout_topk_ids=None,
            rollout_topk_log_probs=None,
            teacher_weights=None,
            teacher_prompts=None,
        )
        return view, row_map


def pack_rollouts(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    response_masks: Sequence[Sequence[bool]] | None = None,
    response_log_probs: Sequence[Sequence[float]] | None = None,
    response_top_logprobs: Sequence[TopLogProbs] | None = None,
    teacher_names: Sequence[TeacherNames] | None = None,
    sample_ids: Sequence[int] | None = None,
    rollout_ids: Sequence[int] | None = None,
    rewards: Sequence[float] | None = None,
    advantages: Sequence[float] | None = None,
    task_names: Sequence[str] | None = None,
    teacher_prompts: Sequence[Sequence[int] | None] | None = None,
) -> RolloutBatch:
    """Pack prompts and responses, given per token, into row-aligned tensors.

    prompts: per sequence the prompt's token ids, at least one
    responses: per sequence the token ids that follow; may be empty
    response_masks: per response token, True when the model generated it (False: a tool's output, padding); default all
    response_log_probs: per response token, the rollout engine's log-prob
    response_top_logprobs: per response token the engine's likeliest ids as (log-prob, id, ...), or None where it gave
        none: SGLang's `output_top_logprobs` as it is
    teacher_names: default "", the pool's default teacher
    sample_ids: default 0, 1, ...; rollout_ids: default the sample's own id

    Raises:
        ValueError: naming the argument and the sequence.
    """
    count = len(prompts)
    ids = list(range(count)) if sample_ids is None else list(sample_ids)
    lists = {
        "responses": responses,
        "response_masks": response_masks,
        "response_log_probs": response_log_probs,
        "response_top_logprobs": response_top_logprobs,
        "teacher_names": teacher_names,
        "sample_ids": ids,
        "rollout_ids": rollout_ids,
        "rewards": rewards,
        "advantages": advantages,
        "task_names": task_names,
        "teacher_prompts": teacher_prompts,
    }
    for name, values in lists.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: wanted {count} entries, one a prompt, got {len(values)}")
    tokens: list[int] = []
    mask: list[bool] = []
    log_probs: list[float] = []
    lengths = [0]
    for sequence, (prompt, response) in enumerate(zip(prompts, responses)):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{sequence}]: wanted at least one token, got none")
        own_mask = [True] * len(response) if response_masks is None else [bool(m) for m in response_masks[sequence]]
        own_log_probs = [0.0] * len(response) if response_log_probs is None else response_log_probs[sequence]
        own_tops = response if response_top_logprobs is None else response_top_logprobs[sequence]
        for name, values in (
            ("response_masks", own_mask),
            ("response_log_probs", own_log_probs),
            ("response_top_logprobs", own_tops),
        ):
            if len(values) != len(response):
                raise ValueError(
                    f"{name}[{sequence}]: wanted {len(response)} entries, one a response token, got {len(values)}"
                )
        check_ids(f"prompts[{sequence}]", prompt)
        check_ids(f"responses[{sequence}]", response)
        tokens += [*prompt, *response]
        # Response token j is predicted by row len(prompt) - 1 + j; the sequence's last row predicts nothing.
        mask += [False] * (len(prompt) - 1) + own_mask + [False]
        given = [
            given_log_prob(value, counts, ids[sequence], place)
            for place, (value, counts) in enumerate(zip(own_log_probs, own_mask))
        ]
        log_probs += [0.0] * (len(prompt) - 1) + given + [0.0]
        lengths.append(len(prompt) + len(response))
    topk: tuple[Tensor | None, Tensor | None] = (None, None)
    if response_top_logprobs is not None:
        starts = torch.tensor(lengths).cumsum(0).tolist()
        first_rows = [start + len(prompt) - 1 for start, prompt in zip(starts, prompts)]
        topk = pack_top_logprobs(response_top_logprobs, first_rows, len(tokens))
    batch = RolloutBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        cu_seqlens=torch.tensor(lengths).cumsum(0).to(torch.int32),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        sample_ids=torch.tensor(ids, dtype=torch.int64),
        rollout_ids=torch.tensor(ids if rollout_ids is None else list(rollout_ids), dtype=torch.int64),
        teacher_names=[""] * count if teacher_names is None else list(teacher_names),
        rewards=None if rewards is None else numbers("rewards", rewards),
        advantages=None if advantages is None else numbers("advantages", advantages),
        task_names=None if task_names is None else list(task_names),
        rollout_log_probs=None if response_log_probs is None else torch.tensor(log_probs, dtype=torch.float32),
        rollout_topk_ids=topk[0],
        rollout_topk_log_probs=topk[1],
        teacher_prompts=None
        if teacher_prompts is None
        else [None if p is None else torch.tensor(list(p), dtype=torch.int64) for p in teacher_prompts],
    )
    batch.validate()
    return batch
