"""A cell of the conformance table: one call of something exported, and the definition of what it is to give.

Every rank calls the engine; one of them, in turn, evaluates the definition and judges. The cells themselves are in
score_cells.py, loss_cells.py, linear_cells.py, op_cells.py; table.py lists them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

import opd_engine
from opd_engine.check.inputs import Inputs, Leaf
from opd_engine.check.judge import FLOOR, Answer, Limit, Verdict, judge, plants
from opd_engine.parallel.collectives import all_gather_stacked

Options = dict[str, object]
# Options that change how, and not what, is computed; without sequence_parallel the shapes would not fit.
LAYOUT_OPTIONS = ("workspace_bytes", "grad_scale", "sequence_parallel")


@dataclass
class Called:
    """What a call gave. outputs: the same on every rank; those that require grad are differentiated.

    written: by the name of a gradient, how to read it after the backward where autograd does not return it
    """

    outputs: dict[str, Tensor]
    written: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One call. Subclasses say what is differentiated, what is called, and what is right."""

    function: str  # as it is exported
    line: str  # of the table: what of the function is looked at
    setting: str = ""  # which of the line's cells
    communicates: ClassVar[bool] = True  # else the rank that judges calls alone

    @property
    def name(self) -> str:
        """As a failure names it."""
        return ": ".join(filter(None, (self.function, self.line, self.setting)))

    def leaves(self, inputs: Inputs) -> dict[str, Leaf]:
        """What gradients are compared of."""
        raise NotImplementedError

    def options(self, inputs: Inputs) -> Options:
        """The call's keyword arguments. A control leaves one out and has to be seen."""
        return {}

    def gradients(self, inputs: Inputs) -> dict[str, str]:
        """By the name of a gradient that the call is to give, the leaf it belongs to."""
        return {f"d {leaf}": leaf for leaf in self.leaves(inputs)}

    def call(self, inputs: Inputs, leaves: dict[str, Tensor], options: Options) -> Called:
        """The engine, on this rank's part of the leaves."""
        raise NotImplementedError

    def define(self, inputs: Inputs, leaves: dict[str, Tensor], compute: torch.dtype) -> dict[str, Tensor]:
        """The outputs by definition, on whole leaves, in `compute`."""
        raise NotImplementedError

    def upstream(self, inputs: Inputs, name: str, output: Tensor) -> Tensor:
        """What this rank's output receives in backward; the whole is inputs.upstream."""
        return inputs.upstream(name, output)

    def least_allowed(self, inputs: Inputs, *, is_gradient: bool) -> float:
        """The error that is allowed where plain torch has none."""
        return FLOOR[inputs.dtype if is_gradient else inputs.score_dtype]


@dataclass
class Judged:
    """A cell at one dtype. where: the measure and the element at which it is worst."""

    dtype: str
    function: str
    line: str
    setting: str
    error: float
    allowed: float
    passed: bool
    where: str


@dataclass
class Control:
    """A planted error, and whether the cell saw it."""

    dtype: str
    name: str
    cell: str
    seen: bool


def ask(cell: Cell, inputs: Inputs, options: Options) -> tuple[Answer, bool]:
    """(the engine's answer, assembled from all ranks; whether they hold the same outputs).

    Communicates: what the call does, and one all-gather.
    """
    leaves = cell.leaves(inputs)
    own = {name: inputs.own(leaf.whole, leaf.split).requires_grad_() for name, leaf in leaves.items()}
    called = cell.call(inputs, own, options)
    found = _backward(cell, inputs, called, own)
    parts = {name: found[name].detach() for name in cell.gradients(inputs) if name in found}
    outputs = {name: output.detach() for name, output in called.outputs.items() if output is not None}
    if inputs.world.group is None or not cell.communicates:
        return {**outputs, **parts}, True
    named = cell.gradients(inputs)
    return _gather(inputs, outputs, {name: (leaves[leaf], parts.get(name)) for name, leaf in named.items()})


def _backward(cell: Cell, inputs: Inputs, called: Called, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name, what autograd gives and what was written elsewhere."""
    outputs = {name: output for name, output in called.outputs.items() if output is not None and output.requires_grad}
    gradients: dict[str, Tensor] = {}
    if outputs and own:
        upstream = [cell.upstream(inputs, name, output).to(output.dtype) for name, output in outputs.items()]
        found = torch.autograd.grad(list(outputs.values()), list(own.values()), upstream, allow_unused=True)
        gradients = {f"d {name}": grad for name, grad in zip(own, found, strict=True) if grad is not None}
    return {**gradients, **{name: read() for name, read in called.written.items()}}


def _gather(
    inputs: Inputs, outputs: dict[str, Tensor], parts: dict[str, tuple[Leaf, Tensor | None]]
) -> tuple[Answer, bool]:
    """One message: outputs, which are compared, then this rank's parts, padded to one length."""
    ranks = range(inputs.world.world_size)
    sizes = [sum(torch.Size(inputs.part_shape(leaf, rank)).numel() for leaf, _ in parts.values()) for rank in ranks]
    message = [output.double().flatten() for output in outputs.values()]
    num_shared = sum(piece.numel() for piece in message)
    for leaf, part in parts.values():
        shape = inputs.part_shape(leaf, inputs.world.rank)
        part = torch.full(shape, torch.nan, device=inputs.world.device) if part is None else part.expand(shape)
        message.append(part.double().flatten())
    flat = torch.cat(message)
    stacked = all_gather_stacked(
        torch.nn.functional.pad(flat, (0, num_shared + max(sizes) - flat.numel())), inputs.world.group
    )
    shared = stacked[:, :num_shared]
    same = bool(((shared == shared[0]) | (shared.isnan() & shared[0].isnan())).all())
    answer, offsets = dict(outputs), [num_shared for _ in ranks]
    for name, (leaf, _) in parts.items():
        pieces = []
        for rank in ranks:
            shape = torch.Size(inputs.part_shape(leaf, rank))
            pieces.append(stacked[rank, offsets[rank] : offsets[rank] + shape.numel()].view(shape))
            offsets[rank] += shape.numel()
        same = same and (leaf.split != "all" or all(torch.equal(piece, pieces[0]) for piece in pieces))
        answer[name] = inputs.assemble(pieces, leaf.split)
    return answer, same


def limits_of(cell: Cell, inputs: Inputs) -> dict[str, Limit]:
    """By measure, from the float64 reference and the same text at the dtype that users compute in."""
    true = _evaluate(cell, inputs, torch.float64, torch.float64)
    eager = true
    if inputs.dtype != torch.float64:
        eager = _evaluate(cell, inputs, inputs.dtype, inputs.score_dtype)
    limits = {}
    for name, values in true.items():
        limits[name] = Limit(name, values, eager[name], cell.least_allowed(inputs, is_gradient=name.startswith("d ")))
    return limits


def _evaluate(cell: Cell, inputs: Inputs, leaf_dtype: torch.dtype, compute: torch.dtype) -> Answer:
    leaves = cell.leaves(inputs)
    at = {name: leaf.whole.detach().to(leaf_dtype).requires_grad_() for name, leaf in leaves.items()}
    outputs = cell.define(inputs, at, compute)
    gradients = cell.gradients(inputs)
    found: dict[str, Tensor] = {}
    differentiable = {name: output for name, output in outputs.items() if output.requires_grad}
    if differentiable and gradients:
        upstream = [inputs.upstream(name, output).to(output.dtype) for name, output in differentiable.items()]
        grads = torch.autograd.grad(list(differentiable.values()), list(at.values()), upstream)
        found = dict(zip(at, grads, strict=True))
    values = {name: output.detach() for name, output in outputs.items()}
    return {**values, **{name: found[leaf] for name, leaf in gradients.items()}}


def run_cells(
    cells: Sequence[Cell], inputs: Inputs, dtype: str, turn: int = 0, turns: int = 1
) -> Iterator[Judged | Control]:
    """Every cell, then its controls; what this rank judged. All ranks must walk it.

    turn, turns: of the options that are left out, this call has every turns-th, from the turn-th on
    """
    lines: set[tuple[str, str]] = set()
    left_out: list[tuple[str, str]] = []
    for number, cell in enumerate(cells):
        judges = number % inputs.world.world_size == inputs.world.rank
        options = cell.options(inputs)
        with_plants = (cell.function, cell.line) not in lines
        lines.add((cell.function, cell.line))
        without = []
        for name in _that_matter(cell, options, inputs):
            if (cell.function, name) not in left_out:
                left_out.append((cell.function, name))
                if len(left_out) % turns == turn:
                    without.append(name)
        if not (judges or cell.communicates):
            continue
        try:
            answer, same = ask(cell, inputs, options)
        except (ValueError, RuntimeError) as error:
            if inputs.world.group is not None:  # another rank may be waiting for this one
                error.add_note(f"in the cell {dtype} {cell.name}")
                raise
            said = f"raised {type(error).__name__}: {error}"
            yield Judged(dtype, cell.function, cell.line, cell.setting, float("inf"), 1.0, False, said)
            continue
        limits = limits_of(cell, inputs) if judges else None
        if limits is not None:
            yield _judged(cell, dtype, judge(answer, limits), same)
            for name, measure, spoiled in plants(answer, limits, inputs.dtype, inputs.bounds) if with_plants else ():
                seen = not limits[measure].judge(spoiled, with_place=False).holds
                yield Control(dtype, name, f"{cell.name}: {measure}", seen)
        for name in without:
            spoiled, same = ask(cell, inputs, {key: value for key, value in options.items() if key != name})
            if limits is not None:
                yield Control(dtype, f"{name} ignored", cell.name, not (same and judge(spoiled, limits).holds))


def _judged(cell: Cell, dtype: str, verdict: Verdict, same: bool) -> Judged:
    where = verdict.where if same else f"ranks hold different values; {verdict.where}"
    passed = verdict.holds and same
    return Judged(dtype, cell.function, cell.line, cell.setting, verdict.error, verdict.allowed, passed, where)


def _that_matter(cell: Cell, options: Options, inputs: Inputs) -> list[str]:
    """The options whose absence changes what is right: those that are not at their default."""
    function = getattr(opd_engine, cell.function, None)
    parameters = inspect.signature(function).parameters if callable(function) else {}
    found = []
    for name, value in options.items():
        default = parameters[name].default if name in parameters else None
        is_default = not isinstance(value, Tensor) and value == default
        is_partial_alone = name == "loss_reduction" and inputs.world.group is None
        if name not in LAYOUT_OPTIONS and not is_default and not is_partial_alone:
            found.append(name)
    return found
