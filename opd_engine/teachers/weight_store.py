"""WeightStore: several sets of weights for one live model, of which one is trained and all others are only looked at.

Bound by the host-device link: a switch copies every tensor once each way. Other sets live on the host, pinned where the
model is on a CUDA device. Whoever trains, publishes, saves or copies says so, and is refused unless the live weights
are the trainable ones, by their tag and by their content.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opd_engine.parallel.tensors import local_tensor, part_of, spread_like
from opd_engine.teachers.fingerprint import fingerprint

EXTRA_STATE = "_extra_state"
_SHOWN = 4


class WrongWeightsError(RuntimeError):
    """The live weights are not the ones that may be trained, published, saved or copied."""


@dataclasses.dataclass
class _WeightSet:
    """Weights on the host. tensors: by live name; extra: extra state by module; origin: loaded, or made of the live."""

    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    origin: str


class WeightStore:
    """The sets of weights that one live model can wear.

    modules: a module, or a list of model chunks (names are then prefixed "0.", "1.", ...)
    trainable: the tag of the weights that are live now, the only ones that are ever trained, published or saved

    A set covers parameters, buffers (persistent or not, such as a router's expert_bias) and modules' extra state. The
    live tensors are written in place, never replaced: flat parameter buffers and optimizers keep their views. Of what
    ranks share each store holds its rank's part; checkpoints are given whole, or spread alike.
    """

    def __init__(self, modules: nn.Module | Sequence[nn.Module], *, trainable: str = "student") -> None:
        self._chunks = [modules] if isinstance(modules, nn.Module) else list(modules)
        if not self._chunks or not all(isinstance(chunk, nn.Module) for chunk in self._chunks):
            raise ValueError(f"modules: wanted a module or a list of model chunks, got {modules!r}")
        self.trainable = _checked_tag("trainable", trainable)
        self._active = self.trainable
        self._busy: str | None = None
        self._sets: dict[str, _WeightSet] = {}
        self._own: dict[str, Tensor] = {}
        self._lent: dict[int, Tensor] = {}
        self.publications = 0
        """How often the trainable weights were published: the version that a rollout engine holds."""
        self._trained = self._live_fingerprint()

    # ---- what there is -----------------------------------------------------------------------------------------------
    @property
    def active_tag(self) -> str:
        """The tag of the weights that are live now."""
        return self._active

    @property
    def tags(self) -> tuple[str, ...]:
        """The trainable tag, then the others in the order in which they came."""
        return (self.trainable, *self._sets)

    @property
    def nbytes(self) -> int:
        """Host memory of all sets, and of the place that the trainable weights wait in."""
        held = [tensor for one in self._sets.values() for tensor in one.tensors.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*held, *self._own.values()))

    def live_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they are in the model now; a tied one once, by its first name."""
        return {name: tensor for name, tensor, first in self._named() if name == first}

    def host_buffers(self) -> dict[str, Tensor]:
        """Fresh host tensors like the live ones, for a checkpoint reader to fill; `load` takes them over uncopied.

        Returns: name -> tensor of the live shape and dtype, content undefined.
        """
        buffers = {name: _host_like(tensor) for name, tensor in self.live_tensors().items()}
        self._lent = {id(tensor): tensor for tensor in buffers.values()}
        return buffers

    # ---- sets --------------------------------------------------------------------------------------------------------
    def load(self, tag: str, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's weights under a tag, on the host: the live model is neither written nor needed.

        state: by the model's names, on any device, in any dtype. Parameters and persistent buffers must all be there;
            other buffers and extra state may be missing and are then the live model's own.

        Raises:
            ValueError: names missing or unknown, shapes that differ, a tied weight given with two values, the
                trainable tag, or the tag that is active.
        """
        self._check_other(tag, "load")
        live, aliases, extra = self.live_tensors(), self._aliases(), self._extra_modules()
        given: dict[str, Tensor] = {}
        extra_given: dict[str, Any] = {}
        unknown = []
        for name, value in state.items():
            if name in extra:
                extra_given[name] = copy.deepcopy(value)
            elif name not in aliases:
                unknown.append(name)
            elif (first := aliases[name]) not in given:
                given[first] = value
            elif not torch.equal(given[first].cpu(), value.cpu()):
                raise ValueError(
                    f"{tag}: {name} and {first} are one tied weight in this model, but the checkpoint has two values"
                )
        missing = sorted((set(live) - set(given)) - self._optional())
        for what, names in (("lacks", missing), ("has unknown", sorted(unknown))):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                raise ValueError(f"{tag}: the checkpoint {what} {', '.join(names[:_SHOWN])}{more}")
        for name, value in given.items():
            if value.shape != live[name].shape and self._lent.get(id(value)) is not value:
                raise ValueError(f"{tag}: {name}: wanted shape {list(live[name].shape)}, got {list(value.shape)}")
        self._settle()
        tensors = {}
        for name, tensor in live.items():
            value = given.get(name, tensor)
            # Anything but our own buffers may be somebody's live memory.
            ours = self._lent.get(id(value)) is value
            tensors[name] = value if ours else _host_like(tensor).copy_(part_of(value.detach(), tensor))
        self._lent = {}
        self._sets[tag] = _WeightSet(tensors, self._extra_state() | extra_given, "loaded")

    def back_up(self, tag: str) -> None:
        """Keep a copy of the trainable weights as they are now: an earlier student to distil from.

        Raises: WrongWeightsError where other weights are live; ValueError as `load`.
        """
        self._check_other(tag, "back up to")
        self.check_trainable(f"back-up to {tag!r}")
        self._settle()
        tensors = {name: _copied(_host_like(tensor), tensor) for name, tensor in self.live_tensors().items()}
        self._sets[tag] = _WeightSet(tensors, self._extra_state(), "copied")

    def blend(self, tag: str, decay: float) -> None:
        """Move a set towards the trainable weights: held = decay x held + (1 - decay) x live, a running mean.

        decay: in [0, 1). Held in float32, whatever the model's dtype: in bf16 a small step would round to none.
        Integer buffers and extra state are copied. A tag that is not there yet begins as a copy.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: wanted 0 <= decay < 1, got {decay!r}")
        if tag not in self._sets:
            self.back_up(tag)
        self._check_other(tag, "blend into")
        self.check_trainable(f"blending into {tag!r}")
        self._settle()
        one = self._sets[tag]
        for name, tensor in self._live_parts().items():
            if not tensor.is_floating_point():
                one.tensors[name].copy_(tensor)
                continue
            wide = torch.promote_types(tensor.dtype, torch.float32)
            held = one.tensors[name]
            mean = torch.lerp(tensor.to(wide), held.to(device=tensor.device, dtype=wide), decay)
            one.tensors[name] = _copied(held if held.dtype == wide else _host_like(mean), mean)
        one.extra, one.origin = self._extra_state(), "copied"

    def drop(self, tag: str) -> None:
        """Forget a set and free its host memory."""
        self._check_other(tag, "drop")
        del self._sets[self._known(tag)]

    def copies(self) -> dict[str, dict[str, Tensor]]:
        """Tag -> tensors of the sets that came of the live weights (`back_up`, `blend`): they belong into a checkpoint.

        Names are those of live_tensors(); a running mean is float32.
        """
        self._settle()
        live = self.live_tensors()
        return {
            tag: {name: spread_like(part, live[name]) for name, part in one.tensors.items()}
            for tag, one in self._sets.items()
            if one.origin == "copied"
        }

    def restore_copy(self, tag: str, tensors: Mapping[str, Tensor]) -> None:
        """Take a set back that `copies` gave, from the run's own checkpoint; buffers not in it are the live model's.

        Raises: ValueError as `load`.
        """
        self.load(tag, tensors)
        one = self._sets[tag]
        for name, tensor in tensors.items():
            if tensor.dtype != one.tensors[name].dtype:  # a mean in float32 of a model in bf16
                one.tensors[name] = _host_like(tensor.detach()).copy_(local_tensor(tensor.detach()))
        one.origin = "copied"

    # ---- switching ---------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def active(self, tag: str) -> Iterator[None]:
        """Wear a set for the length of the block, without gradient and in eval mode.

        On every way out (the end, an exception, an interrupt, a generator that is closed) the trainable weights, their
        extra state and every module's mode are what they were. Blocks do not nest: a teacher inside a teacher is a
        mistake. Nothing is copied for the trainable tag.

        Raises: ValueError for an unknown tag; WrongWeightsError inside another block, or while weights are trained,
            published or saved.
        """
        if tag == self.trainable:
            self.check_trainable(f"active({tag!r})")
            with torch.no_grad(), _eval_mode(self._chunks):
                yield
            return
        chosen = self._sets[self._known(tag)]
        if self._active != self.trainable:
            raise WrongWeightsError(f"active({tag!r}): {self._active!r} is active already; leave its block first")
        if self._busy is not None:
            raise WrongWeightsError(f"active({tag!r}): refused while {self.trainable!r} is in {self._busy}")
        live, extra = self._live_parts(), self._extra_state()
        for name, tensor in live.items():
            if name not in self._own or self._own[name].shape != tensor.shape:
                self._own[name] = _host_like(tensor)
            _copied(self._own[name], tensor)
        with torch.no_grad(), _eval_mode(self._chunks):
            try:
                self._active = tag
                self._write(chosen.tensors, chosen.extra)
                yield
            finally:
                self._write(self._own, extra)
                # Last: if writing failed, the tag stays, and everything that asks for the trainable weights refuses.
                self._active = self.trainable

    # ---- what only the trainable weights may go through --------------------------------------------------------------
    def check_trainable(self, what: str) -> None:
        """Refuse `what` unless the tag of the live weights is the trainable one. Reads no weight."""
        if self._active != self.trainable:
            raise WrongWeightsError(
                f"{what}: wanted the trainable weights {self.trainable!r} live, got {self._active!r}"
            )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around an optimizer step, forward and backward included: the one place where the live weights may change."""
        with self._guarded("a train step"):
            try:
                yield
            finally:
                self._trained = self._live_fingerprint()

    @contextlib.contextmanager
    def publishing(self) -> Iterator[dict[str, Tensor]]:
        """Around sending the weights to a rollout engine; gives the live tensors by name."""
        with self._guarded("a publish"):
            yield self.live_tensors()
            self.publications += 1

    @contextlib.contextmanager
    def saving(self) -> Iterator[dict[str, Tensor]]:
        """Around writing a checkpoint; gives the live tensors by name.

        Raises: WrongWeightsError also for weights that are not finite: an earlier checkpoint is worth more.
        """
        with self._guarded("a save"):
            tensors = self.live_tensors()
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(local_tensor(tensor).isfinite().all()):
                    raise WrongWeightsError(f"a save: the weights {name} are not finite (NaN or infinite)")
            yield tensors

    def accept_live(self) -> None:
        """Say that the live weights, just read from the student's own checkpoint, are the trainable ones.

        Raises: WrongWeightsError where they are a loaded set's instead.
        """
        self.check_trainable("accept_live")
        now = self._live_fingerprint()
        if (owner := self._owner(now)) is not None and self._sets[owner].origin == "loaded":
            raise WrongWeightsError(f"accept_live: the live weights are those of {owner!r}")
        self._trained = now

    def check_content(self, what: str) -> None:
        """Refuse `what` where the live weights changed since the last train step, whoever wrote them.

        Reads every weight once and synchronises with the device.
        """
        self.check_trainable(what)
        now = self._live_fingerprint()
        if torch.equal(now, self._trained.to(now.device)):
            return
        changed = (now != self._trained.to(now.device)).nonzero().flatten().tolist()
        names = list(self.live_tensors())
        shown = ", ".join(names[index] for index in changed[:_SHOWN])
        owner = self._owner(now)
        found = f"they are those of {owner!r}" if owner else f"{len(changed)} tensors changed ({shown})"
        raise WrongWeightsError(
            f"{what}: the live weights are tagged {self._active!r}, but were written outside a train step: {found}"
        )

    # ---- inside ------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        if self._busy is not None:
            raise WrongWeightsError(f"{what}: refused while {self.trainable!r} is in {self._busy}")
        self.check_content(what)
        self._busy = what
        try:
            yield
        finally:
            self._busy = None

    def _named(self) -> Iterator[tuple[str, Tensor, str]]:
        """(name, live tensor, the first name that tensor has): one entry a name, tied ones repeated."""
        first: dict[int, str] = {}
        for prefix, chunk in self._prefixed():
            for listed in (chunk.named_parameters, chunk.named_buffers):
                for name, tensor in listed(remove_duplicate=False):
                    yield prefix + name, tensor.detach(), first.setdefault(id(tensor), prefix + name)

    def _prefixed(self) -> Iterator[tuple[str, nn.Module]]:
        for index, chunk in enumerate(self._chunks):
            yield ("" if len(self._chunks) == 1 else f"{index}."), chunk

    def _live_parts(self) -> dict[str, Tensor]:
        return {name: local_tensor(tensor) for name, tensor in self.live_tensors().items()}

    def _aliases(self) -> dict[str, str]:
        return {name: first for name, _, first in self._named()}

    def _optional(self) -> set[str]:
        """Buffers that no checkpoint holds."""
        return {
            prefix + (f"{path}." if path else "") + name
            for prefix, chunk in self._prefixed()
            for path, module in chunk.named_modules()
            for name in module._non_persistent_buffers_set
        }

    def _extra_modules(self) -> dict[str, nn.Module]:
        return {
            prefix + (f"{path}." if path else "") + EXTRA_STATE: module
            for prefix, chunk in self._prefixed()
            for path, module in chunk.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def _extra_state(self) -> dict[str, Any]:
        return {name: copy.deepcopy(module.get_extra_state()) for name, module in self._extra_modules().items()}

    def _write(self, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        # copy_ and not .data: a graph built before must not run backward through weights that it has not seen.
        with torch.no_grad():
            for name, tensor in self._live_parts().items():
                tensor.copy_(tensors[name], non_blocking=True)
        for name, module in self._extra_modules().items():
            module.set_extra_state(copy.deepcopy(extra[name]))

    def _live_fingerprint(self) -> Tensor:
        """[tensors] int64, without waiting for the device."""
        return fingerprint(self.live_tensors().values())

    def _owner(self, now: Tensor) -> str | None:
        """The set whose content that is."""
        self._settle()
        live = self.live_tensors()
        for tag, one in self._sets.items():
            held = fingerprint(one.tensors[name].to(tensor.dtype) for name, tensor in live.items())
            if torch.equal(held, now.cpu()):
                return tag
        return None

    def _settle(self) -> None:
        """Wait for copies under way before the host reads or writes their memory."""
        if any(tensor.is_cuda for tensor in self.live_tensors().values()):
            torch.cuda.synchronize()

    def _known(self, tag: str) -> str:
        if tag not in self._sets:
            raise ValueError(f"tag: {tag!r} is not known; known: {', '.join(self.tags)}")
        return tag

    def _check_other(self, tag: str, verb: str) -> None:
        _checked_tag("tag", tag)
        if tag == self.trainable:
            raise ValueError(f"tag: wanted another than the trainable {tag!r} to {verb}")
        if tag == self._active:
            raise WrongWeightsError(f"tag: {tag!r} is active; leave its block before you {verb} it")


def _checked_tag(argument: str, tag: str) -> str:
    if not isinstance(tag, str) or not tag.strip():
        raise ValueError(f"{argument}: wanted a non-empty tag, got {tag!r}")
    return tag


def _host_like(tensor: Tensor) -> Tensor:
    """Of this rank's part."""
    return torch.empty(local_tensor(tensor).shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _copied(host: Tensor, source: Tensor) -> Tensor:
    """Fill a host tensor; asynchronous where it is pinned. The stream orders it before what comes next there."""
    return host.copy_(local_tensor(source.detach()), non_blocking=host.is_pinned() if source.is_cuda else False)


@contextlib.contextmanager
def _eval_mode(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode; every submodule's own mode is put back, also where the block itself changed it."""
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
