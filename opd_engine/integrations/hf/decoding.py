"""The last row's logits of growing sequences, by the fastest way that a model is seen to keep its own distribution in.

Models remember in many ways: key-value caches, recurrent and convolutional states, windows, some inside the module.
Which way is right is tried once a model, against its own plain forward: a cache under a name that a model does not
know is lost without a sign, and padding cannot be masked from every kind of state.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd_engine.integrations.hf.models import max_positions


@dataclass(frozen=True)
class Way:
    """How sequences are fed.

    padded: prompts of any lengths together, padded on the left and masked; else those of one length together
    cached: one new token a step; else the whole sequence again
    """

    padded: bool
    cached: bool


WAYS = (Way(padded=True, cached=True), Way(padded=False, cached=True), Way(padded=False, cached=False))
"""From the fastest to the one that asks nothing of a model."""

_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names that transformers and its models have given the cache, the newest first: an argument and an output alike."""

_LENGTHS = (4, 11)
_STEPS = 4
_FOUND: weakref.WeakKeyDictionary[nn.Module, Way] = weakref.WeakKeyDictionary()


@torch.no_grad()
def counts_from_zero(model: nn.Module) -> bool:
    """Whether a sequence's positions are 0, 1, 2, ...: some families begin elsewhere, and take what they are told.

    Two forwards of four tokens, in eval mode; a sharded model's gathers.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        device = next(model.parameters()).device
        places = torch.arange(4, device=device)[None]
        # Not the lowest ids: some families take one of them for padding, and do not count it.
        ids = (places + 5) % model.get_input_embeddings().weight.shape[0]
        own, told = (model(input_ids=ids, use_cache=False, **more).logits for more in ({}, {"position_ids": places}))
    except Exception:  # takes no positions, or none that are written out
        return False
    finally:
        for module, training in modes:
            module.training = training
    return float((own - told).abs().max()) <= 64 * torch.finfo(own.dtype).eps * float(own.abs().max())


class Reader:
    """Sequences that grow token by token.

    prompts: of one length unless the way is padded; pad_id: never attended to
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, way: Way) -> None:
        self._model, self._way = model, way
        self._device = next(model.parameters()).device
        self._takes = set(inspect.signature(model.forward).parameters)
        self._cache_name = next((name for name in _CACHES if name in self._takes), _CACHES[0])
        self._cache: object = None
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
            mask[row, width - len(prompt) :] = 1
        self._ids, self._mask = ids.to(self._device), mask.to(self._device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)

    def logits(self) -> Tensor:
        """[sequences, vocab], after all that was appended."""
        options: dict[str, object] = {"input_ids": self._ids}
        if self._way.padded:
            options |= {"attention_mask": self._mask, "position_ids": self._positions}
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = 1
        if self._way.cached:
            output = self._model(**options, **{self._cache_name: self._cache}, use_cache=True)
            self._cache = output[self._cache_name]
        else:
            output = self._model(**options, use_cache=False)
        return output.logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        """One token a sequence: [sequences] int64."""
        tokens = tokens[:, None].to(self._device)
        self._ids = tokens if self._way.cached else torch.cat([self._ids, tokens], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], 1)
        self._positions = self._positions[:, -1:] + 1


def groups(prompts: Sequence[Sequence[int]], way: Way) -> list[list[int]]:
    """Which prompts are fed together."""
    if way.padded:
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    return list(by_length.values())


@torch.no_grad()
def find_way(model: nn.Module) -> Way:
    """The fastest way whose logits are the model's own, tried on two short sequences; eval mode.

    Raises: ValueError for a model whose sequences cannot be continued at all, with what it said.
    """
    if model in _FOUND:
        return _FOUND[model]
    vocab_size = model.get_input_embeddings().weight.shape[0]
    room = (max_positions(model) or sum(_LENGTHS) + _STEPS) - _STEPS
    lengths = [max(1, min(length, room)) for length in _LENGTHS]
    ids = [
        [(7 + 13 * place + 5 * row) % vocab_size for place in range(length + _STEPS)]
        for row, length in enumerate(lengths)
    ]
    plain: list[Tensor] = []
    for row, length in zip(ids, lengths):
        try:
            whole = model(input_ids=torch.tensor([row], device=next(model.parameters()).device), use_cache=False).logits
        except Exception as error:
            raise ValueError(
                f"rollouts: {type(model).__name__} cannot read a sequence: {_first_line(error)}"
            ) from error
        plain.append(whole[0, length - 1 : length + _STEPS - 1].double())
    said = []
    for way in WAYS:
        try:
            gap = max(float((own - theirs).abs().max()) for own, theirs in zip(_tried(model, ids, lengths, way), plain))
        except Exception as error:  # models fail in many ways where a cache is not theirs
            said.append(f"{way}: {_first_line(error)}")
            continue
        scale = max(float(theirs.abs().max()) for theirs in plain)
        if gap <= 256 * torch.finfo(next(model.parameters()).dtype).eps * max(scale, 1e-6):
            if not way.cached:
                warnings.warn(
                    f"{type(model).__name__} gives other logits with its cache than without: every token of its "
                    "rollouts is a whole forward",
                    stacklevel=3,
                )
            _FOUND[model] = way
            return way
        said.append(f"{way}: logits off by {gap:.3g}")
    raise ValueError(
        f"rollouts: {type(model).__name__} gives other logits, when a sequence is continued, than for the whole of it "
        f"({'; '.join(said)}); wanted a model that transformers can continue, or an engine that serves it"
    )


def _tried(model: nn.Module, ids: list[list[int]], lengths: list[int], way: Way) -> list[Tensor]:
    """Per sequence the logits after its prompt and each of the steps: [steps, vocab]."""
    found: list[list[Tensor]] = [[] for _ in ids]
    prompts = [row[:length] for row, length in zip(ids, lengths)]
    for group in groups(prompts, way):
        reader = Reader(model, [prompts[index] for index in group], ids[0][0], way)
        for step in range(_STEPS):
            for index, logits in zip(group, reader.logits()):
                found[index].append(logits.double())
            reader.append(torch.tensor([ids[index][lengths[index] + step] for index in group]))
    return [torch.stack(rows) for rows in found]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
