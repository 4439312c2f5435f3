"""Host cache of frozen supports and teacher scores, from scoring until the last optimizer step that uses them.

Bound: host memory. Only rows that count are stored: k x 8 + 16 bytes a row for the first teacher (int32 ids, float32
log-probs, tail, lse, entropy, target), k x 4 + 16 for each further teacher of the same support. Pinned where
there is CUDA. Rows are found by sample id, so batches may be packed anew and split anew at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch
from opd_engine.functional.token_scores import TokenScores

ROW_FIELDS = ("tail_log_prob", "lse", "entropy", "target_log_prob")


@dataclasses.dataclass
class _Block:
    """Rows of one scored micro-batch, and where each of its samples lies in them."""

    tensors: dict[str, Tensor]
    spans: dict[int, tuple[int, int]]
    has: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class ScoreCache:
    """Supports and scores by sample.

    uses: optimizer steps that use each sample; `release` counts them and frees after the last
    """

    def __init__(self, uses: int = 1) -> None:
        if uses < 1:
            raise ValueError(f"uses: wanted at least 1, got {uses}")
        self._uses = uses
        self._uses_left: dict[int, int] = {}
        self._freed: set[int] = set()
        self._supports: dict[int, _Block] = {}
        self._scores: dict[tuple[str, int], _Block] = {}
        self._scored_by: dict[int, set[str]] = {}
        self._dropped: dict[int, int] = {}
        self._overlaps: dict[int, dict[str, tuple[float, int]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held now."""
        blocks = {id(block): block for block in (*self._supports.values(), *self._scores.values())}
        return sum(block.nbytes for block in blocks.values())

    def put_support(self, batch: RolloutBatch, indices: Tensor, dropped: Tensor | None = None) -> None:
        """Store the ids of the rows that count.

        indices: [num_tokens, k] int64; the vocabulary must fit int32
        dropped: [num_tokens] ids that a union cap left out, or None
        """
        rows = _loss_rows(batch)
        block = _Block({"indices": _to_host(indices, rows, torch.int32)}, _spans(batch))
        lost = [0] * batch.num_seqs
        if dropped is not None:
            counts = dropped.where(batch.loss_mask.to(dropped.device), 0).cpu()
            lost = torch.zeros(batch.num_seqs, dtype=counts.dtype).index_add_(0, batch.row_sequence().cpu(), counts)
            lost = lost.tolist()
        for sample, count in zip(batch.sample_ids.tolist(), lost):
            self._supports[sample] = block
            self._uses_left[sample] = self._uses
            self._dropped[sample] = count
            self._freed.discard(sample)

    def put_scores(self, teacher: str, batch: RolloutBatch, scores: TokenScores) -> None:
        """Store a teacher's scores, at the ids stored before, of the rows that count."""
        rows = _loss_rows(batch)
        columns = [getattr(scores, name) for name in ROW_FIELDS]
        like = scores.tail_log_prob
        stacked = torch.stack([torch.full_like(like, torch.nan) if c is None else c.to(like.dtype) for c in columns], 1)
        block = _Block(
            {"log_probs": _to_host(scores.log_probs, rows), "rows": _to_host(stacked, rows)},
            _spans(batch),
            frozenset(name for name, column in zip(ROW_FIELDS, columns) if column is not None),
        )
        for sample in batch.sample_ids.tolist():
            self._scores[teacher, sample] = block
            self._scored_by.setdefault(sample, set()).add(teacher)

    def put_hidden(self, teacher: str, batch: RolloutBatch, hidden: Tensor) -> None:
        """Store a teacher's hidden states instead of its scores: [rows that count, width]."""
        if hidden.shape[0] != int(batch.loss_mask.sum()):
            raise ValueError(
                f"hidden: wanted {int(batch.loss_mask.sum())} rows, those that count, got {hidden.shape[0]}"
            )
        block = _Block({"hidden": _to_host(hidden, torch.arange(hidden.shape[0]))}, _spans(batch))
        for sample in batch.sample_ids.tolist():
            self._scores[teacher, sample] = block
            self._scored_by.setdefault(sample, set()).add(teacher)

    def hidden(self, teacher: str, batch: RolloutBatch, rows: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """The stored hidden states of some rows of sequences that the teacher has: [n, width], on the device.

        rows: [n] int64, numbers among the batch's rows that count
        """
        blocks = [self._scores.get((teacher, sample)) for sample in batch.sample_ids.tolist()]
        return _assemble(batch, blocks, "hidden", device, 0.0)[rows.to(device)]

    def put_overlap(self, teacher: str, batch: RolloutBatch, shared: Tensor) -> None:
        """Store, a sample, how much of a teacher's top-k and the student's is shared.

        shared: [num_tokens], the fraction; read on rows that count
        """
        rows = shared.cpu().double().where(batch.loss_mask.cpu(), 0.0)
        totals = torch.zeros(batch.num_seqs, dtype=torch.float64).index_add_(0, batch.row_sequence().cpu(), rows)
        for sample, total, count in zip(batch.sample_ids.tolist(), totals.tolist(), batch.loss_row_counts().tolist()):
            self._overlaps.setdefault(sample, {})[teacher] = (total, count)

    def overlap(self, sample: int) -> dict[str, tuple[float, int]]:
        """Teacher -> (sum over the sample's rows that count, their number), where it was measured."""
        return self._overlaps.get(sample, {})

    def support(self, batch: RolloutBatch, device: torch.device | str = "cpu", missing_ok: bool = False) -> Tensor:
        """The stored ids: [num_tokens, k] int64, -1 on rows that do not count.

        missing_ok: sequences without a stored support are all -1 instead of an error
        """
        blocks = [self._supports.get(sample) for sample in batch.sample_ids.tolist()]
        if not missing_ok:
            self._require(batch, blocks, "a support")
        compact = _assemble(batch, blocks, "indices", device, fill=-1)
        return _expand(batch, compact, device, fill=-1).long()

    def scores(
        self,
        batch: RolloutBatch,
        teachers: Sequence[str | None],
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
    ) -> TokenScores:
        """The stored scores of one teacher a sequence.

        teachers: per sequence a name, or None for rows left harmless: no mass on the support, all of it in the tail
        indices: the support on `device`, if the caller has it already
        """
        keys = zip(teachers, batch.sample_ids.tolist())
        blocks = [None if name is None else self._scores.get((name, sample)) for name, sample in keys]
        wanted = [None if name is None else block for name, block in zip(teachers, blocks)]
        self._require(batch, wanted, "scores", teachers)
        if indices is None:
            indices = self.support(batch, device, missing_ok=True)
        log_probs = _expand(batch, _assemble(batch, blocks, "log_probs", device, -torch.inf), device, -torch.inf)
        if log_probs.shape[1] < indices.shape[1]:
            pad = (0, indices.shape[1] - log_probs.shape[1])
            log_probs = torch.nn.functional.pad(log_probs, pad, value=-torch.inf)
        compact = _assemble(batch, blocks, "rows", device, torch.nan)
        rows = _expand(batch, compact, device, torch.nan)
        filler = [block is None for block in blocks]
        harmless = ~batch.loss_mask | torch.tensor(filler, dtype=torch.bool)[batch.row_sequence().cpu()].to(
            batch.loss_mask.device
        )
        columns = {name: rows[:, position].contiguous() for position, name in enumerate(ROW_FIELDS)}
        columns["tail_log_prob"] = columns["tail_log_prob"].masked_fill(harmless.to(device), 0.0)
        present = [block.has for block in blocks if block is not None]
        for name in ROW_FIELDS[1:]:
            if not all(name in has for has in present):
                columns[name] = None
        return TokenScores(indices=indices, log_probs=log_probs, **columns)

    def forget_values(self) -> None:
        """Keep which samples were scored and how often they are used, not what was found: where no loss is computed."""
        for block in (*self._supports.values(), *self._scores.values()):
            block.tensors.clear()

    def require(self, batch: RolloutBatch, teachers: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Raise where a support or a score of these sequences is missing or freed; moves nothing.

        teachers: (name, the sequences that it scored)
        """
        samples = batch.sample_ids.tolist()
        self._require(batch, [self._supports.get(sample) for sample in samples], "a support")
        for name, sequences in teachers:
            own = [name if sequence in sequences else None for sequence in range(batch.num_seqs)]
            self._require(batch, [self._scores.get((name, sample)) for sample in samples], "scores", own)

    def dropped(self, batch: RolloutBatch) -> int:
        """Ids that the union cap left out of these sequences' supports."""
        return sum(self._dropped.get(sample, 0) for sample in batch.sample_ids.tolist())

    def release(self, batch: RolloutBatch) -> int:
        """Count one optimizer step that used these samples; free those whose last it was.

        Returns:
            bytes freed. A micro-batch's block is freed with the last of its samples.
        """
        before = self.nbytes
        samples = batch.sample_ids.tolist()
        self._require(batch, [self._supports.get(sample) for sample in samples], "a support")
        for sample in samples:
            self._uses_left[sample] -= 1
            if self._uses_left[sample] == 0:
                del self._uses_left[sample], self._supports[sample], self._dropped[sample]
                self._freed.add(sample)
                self._overlaps.pop(sample, None)
                for teacher in self._scored_by.pop(sample, ()):
                    del self._scores[teacher, sample]
        return before - self.nbytes

    def _require(
        self,
        batch: RolloutBatch,
        blocks: Sequence[_Block | None],
        what: str,
        teachers: Sequence[str | None] | None = None,
    ) -> None:
        for sequence, (sample, block) in enumerate(zip(batch.sample_ids.tolist(), blocks)):
            if teachers is not None and teachers[sequence] is None:
                continue
            by = "" if teachers is None else f" by teacher {teachers[sequence]!r}"
            if block is None and sample in self._freed:
                raise ValueError(
                    f"sample {sample}: {what}{by} freed after {self._uses} optimizer step(s); raise "
                    "optimizer_steps_per_rollout to use it again"
                )
            if block is None:
                raise ValueError(f"sample {sample}: wanted {what}{by} in the cache, got none; score the batch first")


def _loss_rows(batch: RolloutBatch) -> Tensor:
    return batch.loss_mask.nonzero().flatten()


def _spans(batch: RolloutBatch) -> dict[int, tuple[int, int]]:
    counts = batch.loss_row_counts().tolist()
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return {sample: (ends[s], counts[s]) for s, sample in enumerate(batch.sample_ids.tolist())}


def _to_host(values: Tensor, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    compact = values.detach()[rows.to(values.device)].to(dtype or values.dtype)
    if not torch.cuda.is_available():
        return compact.cpu()
    # Pinned also where the scores were on the host already: they are on their way to the device, every step again.
    host = torch.empty(compact.shape, dtype=compact.dtype, pin_memory=True)
    # Blocking: the block may be read by the host right after. Scoring is not the hot path.
    return host.copy_(compact)


def _assemble(
    batch: RolloutBatch, blocks: Sequence[_Block | None], name: str, device: torch.device | str, fill: float
) -> Tensor:
    """The stored rows of the batch's sequences, in order, on the device; `fill` for sequences without a block."""
    counts = batch.loss_row_counts().tolist()
    known = [block.tensors[name] for block in blocks if block is not None]
    width = max((tensor.shape[1] for tensor in known), default=len(ROW_FIELDS) if name == "rows" else 1)
    dtype = known[0].dtype if known else (torch.int32 if name == "indices" else torch.float32)
    # Neighbours in one block travel as one slice: [block, start, rows].
    slices: list[list] = []
    for sample, block, count in zip(batch.sample_ids.tolist(), blocks, counts):
        if block is None:
            slices.append([None, 0, count])
            continue
        start, stored = block.spans[sample]
        if stored != count:
            raise ValueError(f"loss_mask: sample {sample} was scored with {stored} rows that count, now has {count}")
        if slices and slices[-1][0] is block and slices[-1][1] + slices[-1][2] == start:
            slices[-1][2] += count
        else:
            slices.append([block, start, count])
    pieces = []
    for block, start, count in slices:
        if block is None:
            pieces.append(torch.full((count, width), fill, dtype=dtype, device=device))
            continue
        piece = block.tensors[name][start : start + count].to(device, non_blocking=True)
        if piece.shape[1] < width:
            piece = torch.nn.functional.pad(piece, (0, width - piece.shape[1]), value=fill)
        pieces.append(piece)
    return torch.cat(pieces) if pieces else torch.empty((0, width), dtype=dtype, device=device)


def _expand(batch: RolloutBatch, compact: Tensor, device: torch.device | str, fill: float) -> Tensor:
    """Rows that count, put where they stand in the batch: [num_tokens, width]."""
    full = compact.new_full((batch.num_tokens, compact.shape[1]), fill)
    full[_loss_rows(batch).to(device)] = compact
    return full
