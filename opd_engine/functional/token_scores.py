"""TokenScores: what one model says, in each row, about the k ids of a support and about everything off it.

k + 1 buckets a row instead of a vocabulary: this is all that crosses from a teacher to a student, or to the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine.parallel.tensors import refuse_distributed

# A row that nobody scored has no id and all of its mass in the tail: harmless in a loss that masks it.
_ABSENT = {
    "indices": -1,
    "log_probs": -torch.inf,
    "tail_log_prob": 0.0,
    "lse": torch.nan,
    "entropy": torch.nan,
    "target_log_prob": -torch.inf,
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(kw_only=True, eq=False)
class TokenScores:
    """One model's log-probabilities of k ids a row, under its whole vocabulary. `[T]` may be any leading shape `[*]`.

    indices: [T, k], integer, global ids, distinct in a row; -1 marks an absent one
    log_probs: [T, k], floating, of those ids; -inf where the id is absent
    tail_log_prob: [T], the log of the probability of everything else
    lse: [T] or None, log sum exp of logits / temperature over the whole vocabulary
    entropy: [T] or None, of the whole distribution, in nats
    target_log_prob: [T] or None, of one further id a row (the token that was sampled)
    Raises: ValueError where a field is no tensor, has the wrong kind of dtype, another device or a shape that does
        not match; values are not looked at.
    """

    indices: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    target_log_prob: Tensor | None = None

    def __post_init__(self) -> None:
        indices = self.indices
        if not isinstance(indices, Tensor) or indices.dtype not in _INTEGERS:
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(f"indices: wanted an integer tensor [T, k], got {got}")
        if indices.dim() < 1:
            raise ValueError(f"indices: wanted [T, k], got shape {tuple(indices.shape)}")
        refuse_distributed(indices, "indices")
        shape, device = indices.shape, indices.device
        self._check("log_probs", self.log_probs, shape, device)
        shape = shape[:-1]
        self._check("tail_log_prob", self.tail_log_prob, shape, device)
        for name in ("lse", "entropy", "target_log_prob"):
            value = getattr(self, name)
            if value is not None:
                self._check(name, value, shape, device)

    @staticmethod
    def _check(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: wanted a floating tensor, got {got}")
        refuse_distributed(value, name)
        if value.shape != shape:
            raise ValueError(f"{name}: wanted shape {tuple(shape)} to match indices, got {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name}: wanted the device of indices, {device}, got {value.device}")

    @classmethod
    def of_checked(cls, **fields: Tensor | None) -> TokenScores:
        """The scores that an op returned: all six fields, whose shapes match by construction, not checked again."""
        scores = cls.__new__(cls)
        scores.__dict__ = fields
        return scores

    @classmethod
    def absent(
        cls,
        num_rows: int,
        k: int,
        *,
        indices: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        has_target: bool = False,
    ) -> TokenScores:
        """Rows that nobody scored: log-probs of -inf, all mass in the tail, lse and entropy NaN.

        indices: [num_rows, k], ids that they hold all the same, whose device counts; None: -1 everywhere
        has_target: whether there is a target_log_prob, of -inf
        """
        if indices is None:
            indices = torch.full((num_rows, k), _ABSENT["indices"], dtype=torch.int64, device=device)
        one = {"dtype": dtype, "device": indices.device}
        names = [name for name in _ABSENT if name != "indices" and (has_target or name != "target_log_prob")]
        shapes = {"log_probs": (num_rows, k)}
        columns = {name: torch.full(shapes.get(name, (num_rows,)), _ABSENT[name], **one) for name in names}
        return cls(indices=indices, **columns)

    @classmethod
    def cat(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """One after the other, flat; narrower supports are widened, a field that a part lacks is None.

        Raises: ValueError where there is no part.
        """
        if not parts:
            raise ValueError("parts: wanted at least one, got none")
        if len(parts) == 1:
            return parts[0]
        widest = max(part.k for part in parts)
        wide = [part.widen(widest) for part in parts]
        columns = {name: [getattr(part, name) for part in wide] for name in _ABSENT}
        whole = {name: torch.cat(values) for name, values in columns.items() if all(one is not None for one in values)}
        return cls(**whole)

    @property
    def k(self) -> int:
        """Ids a row."""
        return self.indices.size(-1)

    @property
    def leading_shape(self) -> torch.Size:
        """The shape of the rows, [*]."""
        return self.indices.shape[:-1]

    @property
    def requires_grad(self) -> bool:
        """Whether any of the scores does."""
        return any(value.requires_grad for name, value in self._tensors() if name != "indices")

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> TokenScores:
        """The scores on another device, in another floating dtype; ids keep theirs."""

        def move(name: str, value: Tensor) -> Tensor:
            return value.to(device=device, dtype=None if name == "indices" else dtype, non_blocking=non_blocking)

        return self._map(move)

    def detach(self) -> TokenScores:
        """The same values outside any graph."""
        return self._map(lambda _, value: value.detach())

    def reshape(self, *leading_shape: int) -> TokenScores:
        """The same rows under another leading shape; reshape(-1) is the flat [T, k]."""

        def lay_out(name: str, value: Tensor) -> Tensor:
            return (
                value.reshape(*leading_shape, value.size(-1))
                if name in ("indices", "log_probs")
                else value.reshape(*leading_shape)
            )

        # A size of -1 cannot be inferred from nothing: with k = 0 the rows' number must be spelled out.
        if -1 in leading_shape and self.k == 0:
            leading_shape = tuple(torch.empty(self.leading_shape, device="meta").reshape(*leading_shape).shape)
        return self._map(lay_out)

    def widen(self, k: int) -> TokenScores:
        """The same with k ids a row: absent ones behind those that are there.

        Raises: ValueError where there are more already.
        """
        if k < self.k:
            raise ValueError(f"k: wanted at least the {self.k} ids that a row has, got {k}")
        if k == self.k:
            return self

        def fill(name: str, value: Tensor) -> Tensor:
            if name not in ("indices", "log_probs"):
                return value
            return torch.nn.functional.pad(value, (0, k - self.k), value=_ABSENT[name])

        return self._map(fill)

    def place(self, rows: Tensor, num_rows: int, *, indices: Tensor | None = None) -> TokenScores:
        """Flat scores put where they belong among num_rows rows; the others are absent.

        rows: [T] int64, each row's new place, -1 for one that has none; on the host, where it costs no synchronisation
        indices: [num_rows, k], the ids of all rows where they are known; None: those that are here
        Grad: for the scores.
        """
        real = (rows >= 0).nonzero().flatten()
        device = self.indices.device
        source, target = real.to(device), rows[real].to(device)

        def put(name: str, value: Tensor) -> Tensor:
            if name == "indices" and indices is not None:
                return indices
            whole = value.new_full((num_rows, *value.shape[1:]), _ABSENT[name])
            return whole.index_copy(0, target, value if source.numel() == value.size(0) else value[source])

        return self._map(put)

    def select(self, rows: Tensor) -> TokenScores:
        """The rows asked for: rows is [n] int64 or a [T] bool mask over the first leading dimension."""
        return self._map(lambda _, value: value[rows])

    def _tensors(self) -> list[tuple[str, Tensor]]:
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [(name, value) for name, value in fields if value is not None]

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> TokenScores:
        return TokenScores(**{name: change(name, value) for name, value in self._tensors()})
