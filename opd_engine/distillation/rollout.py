"""RolloutBatch: what the student generated, packed without padding, with everything that travels with a sequence.

Row i of every row-aligned tensor belongs to the distribution that predicts packed token i + 1; the last row of a
sequence predicts nothing and never counts. The batch lives on the host: a trainer moves what it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_engine.distillation.rollout_topk import TopLogProbs, check_topk, check_topk_shapes, pack_top_logprobs

TeacherNames = str | tuple[str, ...]
"""The teacher of a sequence: one name, several names, or "" for the pool's default."""


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

    tokens: Tensor
    cu_seqlens: Tensor
    loss_mask: Tensor
    sample_ids: Tensor
    rollout_ids: Tensor
    teacher_names: list[TeacherNames]
    rewards: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    rollout_topk_ids: Tensor | None = None
    rollout_topk_log_probs: Tensor | None = None
    teacher_weights: Mapping[str, Tensor] | None = None
    teacher_prompts: list[Tensor | None] | None = None
    sample_weights: Tensor | None = None
    advantages: Tensor | None = None
    task_names: list[str] | None = None

    def __post_init__(self) -> None:
        # Shapes and dtypes only: no values are read, so a batch on a device costs no synchronisation here.
        _check_vector("tokens", self.tokens, torch.int64)
        _check_vector("cu_seqlens", self.cu_seqlens, torch.int32)
        if self.cu_seqlens.numel() == 0:
            raise ValueError("cu_seqlens: wanted num_seqs + 1 entries beginning with 0, got none")
        _check_vector("loss_mask", self.loss_mask, torch.bool, self.num_tokens, "num_tokens")
        _check_vector("sample_ids", self.sample_ids, torch.int64, self.num_seqs, "num_seqs")
        _check_vector("rollout_ids", self.rollout_ids, torch.int64, self.num_seqs, "num_seqs")
        for name in ("teacher_names", "teacher_prompts", "task_names"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_seqs:
                raise ValueError(f"{name}: wanted {self.num_seqs} entries, one a sequence, got {len(values)}")
        _check_float("rewards", self.rewards, self.num_seqs, "num_seqs")
        _check_float("sample_weights", self.sample_weights, self.num_seqs, "num_seqs")
        _check_float("advantages", self.advantages, self.num_seqs, "num_seqs")
        _check_float("rollout_log_probs", self.rollout_log_probs, self.num_tokens, "num_tokens")
        check_topk_shapes(self.rollout_topk_ids, self.rollout_topk_log_probs, self.num_tokens)
        for name, weights in (self.teacher_weights or {}).items():
            if weights.dim() != 1 or weights.shape[0] not in (self.num_seqs, self.num_tokens):
                raise ValueError(
                    f"teacher_weights[{name!r}]: wanted shape [{self.num_seqs}] (a weight a sequence) or "
                    f"[{self.num_tokens}] (a weight a row), got {list(weights.shape)}"
                )

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
            raise ValueError(f"tokens: wanted ids >= 0, got {int(self.tokens.min())}")
        unique, counts = self.sample_ids.unique(return_counts=True)
        if unique.numel() != self.num_seqs:
            raise ValueError(f"sample_ids: wanted unique ids, {int(unique[counts > 1][0])} occurs more than once")
        for name in ("rewards", "sample_weights", "advantages"):
            values = getattr(self, name)
            if values is not None and not bool(values.isfinite().all()):
                bad = int((~values.isfinite()).nonzero()[0])
                raise ValueError(f"{name}: wanted finite values, got {float(values[bad])} for sequence {bad}")
        if self.rollout_log_probs is not None:
            wrong = (self.loss_mask & ~(self.rollout_log_probs <= 0)).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(
                    "rollout_log_probs: wanted log-probs <= 0 on the rows that count, "
                    f"got {float(self.rollout_log_probs[wrong[0]])} at row {wrong[0]}"
                )
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

        def move(value: object) -> object:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        changes = {field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if self.teacher_weights is not None:
            changes["teacher_weights"] = {name: move(weights) for name, weights in self.teacher_weights.items()}
        if self.teacher_prompts is not None:
            changes["teacher_prompts"] = [move(prompt) for prompt in self.teacher_prompts]
        return RolloutBatch(**changes)

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

        def by_sequence(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[chosen]

        def by_row(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        weights = None
        if self.teacher_weights is not None:
            weights = {
                # A batch whose sequences all have one token reads either way; both give the same rows.
                name: values[rows] if values.shape[0] == self.num_tokens else values[chosen]
                for name, values in self.teacher_weights.items()
            }
        return RolloutBatch(
            tokens=self.tokens[rows],
            cu_seqlens=lengths.cumsum(0).to(torch.int32),
            loss_mask=self.loss_mask[rows],
            sample_ids=self.sample_ids[chosen],
            rollout_ids=self.rollout_ids[chosen],
            teacher_names=[self.teacher_names[s] for s in sequences],
            rewards=by_sequence(self.rewards),
            rollout_log_probs=by_row(self.rollout_log_probs),
            rollout_topk_ids=by_row(self.rollout_topk_ids),
            rollout_topk_log_probs=by_row(self.rollout_topk_log_probs),
            teacher_weights=weights,
            teacher_prompts=None if self.teacher_prompts is None else [self.teacher_prompts[s] for s in sequences],
            sample_weights=by_sequence(self.sample_weights),
            advantages=by_sequence(self.advantages),
            task_names=None if self.task_names is None else [self.task_names[s] for s in sequences],
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
        own_log_probs = [0.0] * len(response) if response_log_probs is None else list(response_log_probs[sequence])
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
        tokens += [*prompt, *response]
        # Response token j is predicted by row len(prompt) - 1 + j; the sequence's last row predicts nothing.
        mask += [False] * (len(prompt) - 1) + own_mask + [False]
        log_probs += [0.0] * (len(prompt) - 1) + own_log_probs + [0.0]
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
        rewards=None if rewards is None else torch.tensor(list(rewards), dtype=torch.float64),
        advantages=None if advantages is None else torch.tensor(list(advantages), dtype=torch.float64),
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


def _check_vector(name: str, value: Tensor, dtype: torch.dtype, size: int | None = None, unit: str = "") -> None:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != dtype:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: wanted a one-dimensional {dtype} tensor, got {got}")
    if size is not None and value.shape[0] != size:
        raise ValueError(f"{name}: wanted {unit}={size} entries, got {value.shape[0]}")


def _check_float(name: str, value: Tensor | None, size: int, unit: str) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: wanted a one-dimensional floating-point tensor, got {got}")
    if value.shape[0] != size:
        raise ValueError(f"{name}: wanted {unit}={size} entries, got {value.shape[0]}")
