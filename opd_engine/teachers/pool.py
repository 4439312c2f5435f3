"""TeacherPool: named teachers in a fixed order, which of them score which sample, and scores in the student's ids.

It knows nothing of how a teacher runs. Order is the order of insertion, the same on every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from opd_engine.functional.token_scores import TokenScores
from opd_engine.teachers.limits import check_given, max_positions, readable, unread_rows
from opd_engine.teachers.protocols import ChoosingTeacher, ScoringBatch, Teacher, TeacherHead
from opd_engine.teachers.spec import TeacherSpec
from opd_engine.teachers.union import shared_fraction, union_support
from opd_engine.teachers.vocabularies import askable, check_token_maps, rebucket


class TeacherPool:
    """Named teachers.

    teachers: pairs of (TeacherSpec or name, teacher), or a mapping from name to teacher

    Raises:
        ValueError: no teachers, a name given twice, or an object that is no teacher.
    """

    def __init__(self, teachers: Iterable[tuple[TeacherSpec | str, Teacher]] | Mapping[str, Teacher]) -> None:
        self._specs: dict[str, TeacherSpec] = {}
        self._teachers: dict[str, Teacher] = {}
        self._agreed: Mapping[str, int] | None = None
        pairs = teachers.items() if isinstance(teachers, Mapping) else teachers
        for given, teacher in pairs:
            spec = TeacherSpec(name=given) if isinstance(given, str) else given
            if spec.name in self._specs:
                raise ValueError(f"teachers: the name {spec.name!r} is given twice; known: {self._known()}")
            if not isinstance(teacher, Teacher):
                raise ValueError(
                    f"teacher {spec.name!r}: wanted an object with vocab_size, score, topk and token_to_id, "
                    f"got {type(teacher).__name__}"
                )
            self._specs[spec.name] = spec
            self._teachers[spec.name] = teacher
        if not self._specs:
            raise ValueError("teachers: wanted at least one, got none")

    def __len__(self) -> int:
        return len(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __getitem__(self, name: str) -> Teacher:
        self.spec(name)
        return self._teachers[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def spec(self, name: str) -> TeacherSpec:
        """The spec of a teacher.

        Raises:
            ValueError: for an unknown name, listing the known ones.
        """
        if name not in self._specs:
            raise ValueError(f"teacher: {name!r} is not known; known: {self._known()}")
        return self._specs[name]

    def turns(self, names: Iterable[str]) -> Iterator[str]:
        """The names in order; before each, the teacher after it starts to bring its weights, one ahead and no more."""
        order = list(names)
        for name, following in zip(order, [*order[1:], None]):
            for needed in (name, following):
                prefetch = None if needed is None else getattr(self[needed], "prefetch", None)
                if prefetch is not None:
                    prefetch()
            yield name

    def temperature(self, name: str, default: float) -> float:
        """The temperature a teacher scores at: its own, or the student's."""
        own = self.spec(name).temperature
        return default if own is None else own

    def route(self, batch: ScoringBatch, mixture: str = "route") -> Tensor:
        """Who scores what, with what weight.

        mixture: "route" gives every sample exactly one teacher; any other mode may give it several

        A sample names one teacher, several, or "": then it is the pool's only teacher under "route", and all of them
        otherwise. Weights are the specs', or the batch's `teacher_weights` (a sequence or a row each) where they name
        the teacher; only their proportions within a row count. After an id of the rollout that a teacher lacks it has
        no weight.

        Returns:
            weights [teachers in pool order, num_tokens] float64, on the batch's device; 0: does not score that row.
        Raises:
            ValueError: an unknown name; under "route", more than one teacher for a sample; a weight below zero; a row
                that counts and has no weight above zero.
        """
        given = batch.teacher_weights or {}
        for name in given:
            self.spec(name)
        if mixture == "route" and given:
            raise ValueError("teacher_weights: mixture 'route' takes one teacher a sample and no weights")
        order = {name: position for position, name in enumerate(self._specs)}
        member = torch.zeros(len(self), batch.num_seqs, dtype=torch.bool)
        for sequence, wanted in enumerate(batch.teacher_names):
            names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
            if names in ((), ("",)):
                names = self.names
                if mixture == "route" and len(self) > 1:
                    raise ValueError(
                        f"teacher_names[{sequence}]: names no teacher and there are {len(self)}; known: {self._known()}"
                    )
            if mixture == "route" and len(names) != 1:
                raise ValueError(
                    f"teacher_names[{sequence}]: mixture 'route' takes one teacher a sample, got {list(names)}"
                )
            for name in names:
                self.spec(name)
                member[order[name], sequence] = True
        device = batch.tokens.device
        row_sequence = batch.row_sequence()
        weights = torch.zeros(len(self), batch.num_tokens, dtype=torch.float64, device=device)
        for name, position in order.items():
            own: Tensor | float = 1.0 if mixture == "route" else self._specs[name].weight
            if name in given:
                own = given[name].to(device=device, dtype=torch.float64)
                own = own if own.shape[0] == batch.num_tokens else own[row_sequence]
                if not bool((own.isfinite() & (own >= 0)).all()):
                    raise ValueError(f"teacher_weights[{name!r}]: wanted finite weights >= 0, got {own.min().item()}")
            weights[position] = member[position].to(device)[row_sequence] * own
        alone = (batch.loss_mask & ~(weights > 0).any(0)).nonzero().flatten()
        if alone.numel():
            sequence = int(row_sequence[alone[0]])
            raise ValueError(
                f"teacher_names[{sequence}] = {batch.teacher_names[sequence]!r}: row {int(alone[0])} counts, but no "
                "teacher has a weight above zero there"
            )
        for name, position in order.items():
            weights[position].masked_fill_(unread_rows(batch, self._teachers[name].vocab_size), 0.0)
        return weights

    def check_given(self, name: str, batch: ScoringBatch) -> None:
        """Refuse sequences that a teacher cannot be given, under the prompts it sees. Reads the batch on its device.

        Raises: ValueError naming the teacher, the sample, the position and the limit.
        """
        view, teacher = self._prompted(name, batch)[0], self[name]
        check_given(
            view,
            model=f"teacher {name!r}",
            vocab_size=teacher.vocab_size,
            max_positions=max_positions(teacher),
            prompts_only=True,
        )

    def _prompted(self, name: str, batch: ScoringBatch) -> tuple[ScoringBatch, Tensor | None]:
        """The batch under the teacher's prompts, and where its rows lie there; None where they are the same."""
        return batch.teacher_view() if self.spec(name).teacher_tokens else (batch, None)

    def _view(self, name: str, batch: ScoringBatch) -> tuple[ScoringBatch, Tensor | None]:
        """What the teacher reads: `_prompted`, without the ids it lacks."""
        view, rows = self._prompted(name, batch)
        return readable(view, self[name].vocab_size), rows

    def check_vocabulary(self, token_to_id: Mapping[str, int] | None) -> None:
        """Compare every teacher's token -> id map with the student's, once; a side without a map is not compared.

        Raises:
            ValueError: naming the teacher and the first disagreements.
        """
        # Asked at every rollout, and a map has 150,000 entries: the same object was compared before.
        if token_to_id is None or token_to_id is self._agreed:
            return
        for name, teacher in self._teachers.items():
            other = teacher.token_to_id()
            if other is not None:
                check_token_maps(token_to_id, other, teacher_name=f"teacher {name!r}")
        self._agreed = token_to_id

    def score(
        self,
        name: str,
        batch: ScoringBatch,
        indices: Tensor,
        *,
        vocab_size: int,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TokenScores:
        """A teacher's log-probs at the student's ids, whatever prompt and vocabulary the teacher has.

        indices: [num_tokens, k] int64 in the student's vocabulary, -1 absent
        vocab_size: the student's real vocabulary
        temperature: used where the spec has none

        Returns:
            TokenScores with `indices` as given; ids the teacher lacks have log-prob -inf.
        """
        teacher, (view, rows) = self[name], self._view(name, batch)
        asked = askable(indices, teacher.vocab_size)
        asked_target = None if target is None else askable(target, teacher.vocab_size)
        if rows is not None:
            asked = _scatter(asked, rows, view.num_tokens)
            asked_target = None if asked_target is None else _scatter(asked_target, rows, view.num_tokens)
        scores = teacher.score(view, asked, target=asked_target, temperature=self.temperature(name, temperature))
        if rows is not None:
            scores = _gather(scores, rows)
        return rebucket(scores, vocab_size=vocab_size, asked=indices.to(scores.indices.device))

    def score_and_overlap(
        self,
        name: str,
        batch: ScoringBatch,
        indices: Tensor,
        k: int,
        *,
        vocab_size: int,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[TokenScores, Tensor] | None:
        """`score`, and the fraction of `indices` that lies in the teacher's own top-k, from one forward.

        Returns: the scores and [num_tokens] float64; or None where this teacher cannot, as for `score_union`.
        """
        teacher, spec = self[name], self.spec(name)
        if spec.teacher_tokens or not isinstance(teacher, ChoosingTeacher):
            return None
        shared = torch.zeros(batch.num_tokens, dtype=torch.float64)

        def choose(own: TokenScores, rows: Tensor) -> Tensor:
            asked = indices[rows.to(indices.device)].to(own.indices.device)
            shared[rows.cpu()] = shared_fraction(asked, own.indices).cpu()
            return askable(asked, teacher.vocab_size)

        scores = teacher.score_chosen(
            readable(batch, teacher.vocab_size),
            min(k, teacher.vocab_size),
            choose,
            target=None if target is None else askable(target, teacher.vocab_size),
            temperature=self.temperature(name, temperature),
        )
        return rebucket(scores, vocab_size=vocab_size, asked=indices.to(scores.indices.device)), shared

    def topk(
        self,
        name: str,
        batch: ScoringBatch,
        k: int,
        *,
        vocab_size: int,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TokenScores:
        """A teacher's own top-k in the student's vocabulary: ids the student lacks are absent, their mass in the tail.

        A teacher with fewer than k tokens gives all of them, then -1.
        """
        teacher, (view, rows) = self[name], self._view(name, batch)
        asked_target = None if target is None else askable(target, teacher.vocab_size)
        if rows is not None and asked_target is not None:
            asked_target = _scatter(asked_target, rows, view.num_tokens)
        width = min(k, teacher.vocab_size)
        scores = teacher.topk(view, width, target=asked_target, temperature=self.temperature(name, temperature))
        if rows is not None:
            scores = _gather(scores, rows)
        if width < k:
            pad = (0, k - width)
            scores = dataclasses.replace(
                scores,
                indices=torch.nn.functional.pad(scores.indices, pad, value=-1),
                log_probs=torch.nn.functional.pad(scores.log_probs, pad, value=-torch.inf),
            )
        return rebucket(scores, vocab_size=vocab_size)

    def hidden(self, name: str, batch: ScoringBatch) -> Tensor:
        """A teacher's hidden states of the batch's rows that count, in order, under the prompt it sees."""
        return self[name].hidden(self._view(name, batch)[0])  # the same rows count, in order

    def score_hidden(
        self,
        name: str,
        head: TeacherHead,
        hidden: Tensor,
        indices: Tensor,
        *,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> TokenScores:
        """`score` from rows of `hidden` [n, width] at the student's ids [n, k]. Communicates: as the head's score."""
        asked = askable(indices, self[name].vocab_size)
        scores = head.score(hidden, asked, temperature=self.temperature(name, temperature))
        return rebucket(scores, vocab_size=vocab_size, asked=indices)

    def score_union(
        self,
        name: str,
        batch: ScoringBatch,
        k: int,
        student: TokenScores,
        *,
        cap: int | None,
        vocab_size: int,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[TokenScores, Tensor, Tensor] | None:
        """The union of the student's top-k with the teacher's, scored by the teacher, in one forward.

        student: the student's top-k, [num_tokens, k]
        cap: widest union, as in `union_support`

        Returns:
            scores at the union's ids, the ids dropped [num_tokens] and the fraction of the student's top-k that is in
            the teacher's [num_tokens]; or None where this teacher cannot: it does not choose ids by itself
            (ChoosingTeacher), or sees another prompt, so that its rows are not the batch's.
        """
        teacher, spec = self[name], self.spec(name)
        if spec.teacher_tokens or not isinstance(teacher, ChoosingTeacher):
            return None
        width = student.indices.shape[1] + min(k, teacher.vocab_size)
        width = width if cap is None else min(cap, width)
        ids = torch.full((batch.num_tokens, width), -1, dtype=torch.int64, device=student.indices.device)
        dropped = ids.new_zeros(batch.num_tokens)
        shared = torch.zeros(batch.num_tokens, dtype=torch.float64, device=ids.device)

        def choose(own: TokenScores, rows: Tensor) -> Tensor:
            here = rows.to(ids.device)
            own = rebucket(own, vocab_size=vocab_size)
            union = union_support([student.select(here), own.to(ids.device)], cap)
            ids[here], dropped[here] = union.indices, union.dropped
            shared[here] = shared_fraction(student.indices[here], own.indices.to(ids.device))
            return askable(union.indices, teacher.vocab_size).to(own.indices.device)

        scores = teacher.score_chosen(
            readable(batch, teacher.vocab_size),
            min(k, teacher.vocab_size),
            choose,
            target=None if target is None else askable(target, teacher.vocab_size),
            temperature=self.temperature(name, temperature),
        )
        return rebucket(scores, vocab_size=vocab_size, asked=ids.to(scores.indices.device)), dropped, shared

    def _known(self) -> str:
        return ", ".join(self._specs)


def _scatter(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Put row i of `values` at row rows[i] of a fresh tensor of absent ids."""
    here = (rows >= 0).nonzero().flatten()
    placed = values.new_full((num_rows, *values.shape[1:]), -1)
    placed[rows[here].to(values.device)] = values[here.to(values.device)]
    return placed


def _gather(scores: TokenScores, rows: Tensor) -> TokenScores:
    """Scores of the teacher's own rows, brought back to the batch's; rows it does not have are absent, harmless."""
    known = (rows >= 0).nonzero().flatten()
    return scores.select(rows[known].to(scores.indices.device)).place(known.cpu(), rows.numel())
