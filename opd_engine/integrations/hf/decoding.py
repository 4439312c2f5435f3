"""The last row's logits of growing sequences, by the fastest way that a model is seen to keep its own distribution in.

Models remember in many ways: key-value caches, recurrent and convolutional states, windows, some inside the module.
Which way is right is tried once a model, against its own plain forward: a cache under a name that a model does not
know is lost without a sign, and padding cannot be masked from every kind of state.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd_engine.integrations.hf.models import language_model, max_positions, vocabulary_rows


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
_STEPS = 6
_LONGEST_SPAN = 512
"""Windows, chunks and compressed blocks up to so many tokens are filled when a way is tried."""
_SPANS = ("window", "chunk", "block", "compress", "kernel")
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[torch.dtype, Way]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def counts_from_zero(model: nn.Module) -> bool:
    """Whether a sequence's positions are 0, 1, 2, ...: some families begin elsewhere, and take what they are told.

    Two forwards of four tokens, in eval mode; a sharded model's gathers.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        padding = getattr(language_model(model).config.get_text_config(), "pad_token_id", None)
        places = torch.arange(4, device=next(model.parameters()).device)[None]
        ids = places.where(places != padding, 4)  # some count padding as no position
        own, told = (model(input_ids=ids, use_cache=False, **more).logits for more in ({}, {"position_ids": places}))
    except Exception:  # takes no positions, or none that are written out
        return False
    finally:
        for module, training in modes:
            module.training = training
    return _typical_gap(own[0].double(), told[0].double()) <= _rounding(own.dtype)


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
        if not self._way.cached:  # a whole mask beside one token confuses some recurrent layers
            options |= _all_real(self._takes, self._mask)
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
    """The fastest way whose logits are the model's own, tried on two short sequences once a dtype; eval mode.

    Raises: ValueError for a model whose sequences cannot be continued at all, with what it said.
    """
    dtype = next(model.parameters()).dtype
    known, way = _FOUND.get(model, (None, None))
    if known == dtype:
        return way
    prompts, answers = _sequences(model)
    try:
        plain = _plain(model, prompts, answers)
    except Exception as error:
        raise ValueError(f"rollouts: {type(model).__name__} cannot read a sequence: {_first_line(error)}") from error
    said = []
    for way in WAYS:
        try:
            gap = max(_typical_gap(ours, theirs) for ours, theirs in zip(_tried(model, prompts, answers, way), plain))
        except Exception as error:  # models fail in many ways where a cache is not theirs
            said.append(f"{way}: {_first_line(error)}")
            continue
        if gap <= _rounding(dtype):
            if not way.cached:
                warnings.warn(
                    f"{type(model).__name__} does not give the same logits with its cache as without: every token of "
                    f"its rollouts is a whole forward ({'; '.join(said)})",
                    stacklevel=3,
                )
            _FOUND[model] = dtype, way
            return way
        said.append(f"{way}: logits off by {gap:.1%}")
    raise ValueError(
        f"rollouts: {type(model).__name__} gives other logits, when a sequence is continued, than for the whole of it "
        f"({'; '.join(said)}); wanted a model that transformers can continue, or an engine that serves it"
    )


def _sequences(model: nn.Module) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of two lengths and their continuations; the longer goes past the model's windows, where those are short.

    What lies beyond a window, or in a block that is not full yet, is kept by other code than the first tokens.
    """
    vocab_size = vocabulary_rows(model)
    (short, long), steps = _LENGTHS, _STEPS
    long += max((span for span in _spans(model.config.get_text_config()) if span <= _LONGEST_SPAN), default=0)
    if (limit := max_positions(model)) is not None:
        steps = max(1, min(steps, limit // 3))
        long = max(1, min(long, limit - steps))
        short = max(1, min(short, long - 1))
    rows = [
        [(7 + 13 * place + 5 * row + place * place) % vocab_size for place in range(length + steps)]
        for row, length in enumerate((short, long))
    ]
    return [row[:-steps] for row in rows], [row[-steps:] for row in rows]


def _spans(config) -> Iterator[int]:
    """Every number of tokens that a configuration calls a window, a chunk, a block or the like."""
    for name, value in vars(config).items():
        if any(word in name for word in _SPANS):
            values = value.values() if isinstance(value, dict) else value
            for span in values if isinstance(values, Iterable) and not isinstance(values, str) else [values]:
                if isinstance(span, int) and not isinstance(span, bool):
                    yield span


def _all_real(takes: Container[str], mask: Tensor) -> dict[str, Tensor]:
    """Says that padding's id is a word like others where no place is masked: some models look for it themselves."""
    return {"attention_mask": mask} if "attention_mask" in takes else {}


def _plain(model: nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> list[Tensor]:
    """As `_tried`, by one forward of each whole sequence."""
    device = next(model.parameters()).device
    found = []
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt + answer], device=device)
        mask = _all_real(inspect.signature(model.forward).parameters, torch.ones_like(ids))
        logits = model(input_ids=ids, use_cache=False, **mask).logits[0]
        found.append(logits[len(prompt) - 1 : -1].double())
    return found


def _tried(model: nn.Module, prompts: list[list[int]], answers: list[list[int]], way: Way) -> list[Tensor]:
    """Per sequence the logits after its prompt and each token of its answer but the last: [steps, vocab]."""
    found: list[list[Tensor]] = [[] for _ in prompts]
    for group in groups(prompts, way):
        # Padding that an answer holds too: what is masked must be masked by place, not by id.
        reader = Reader(model, [prompts[index] for index in group], answers[0][0], way)
        for step in range(len(answers[0])):
            for index, logits in zip(group, reader.logits()):
                found[index].append(logits.double())
            reader.append(torch.tensor([answers[index][step] for index in group]))
    return [torch.stack(rows) for rows in found]


def _rounding(dtype: torch.dtype) -> float:
    """The typical gap that rounding alone may leave."""
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = 2.0**-10  # products of TF32 numbers
    return max(16 * eps, 2e-5)


def _typical_gap(ours: Tensor, theirs: Tensor) -> float:
    """The middle one of the rows' differences, each as a share of that row's own spread: [steps, vocab] both.

    Of 170 tiny models rounding leaves up to 0.6% in bfloat16, memory that is lost or padding that is read 20% and more,
    in most rows. In a few a router may send a token elsewhere for a rounding: hence the middle one.
    """
    spread = (theirs - theirs.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    off = ours - theirs
    gap = (off - off.mean(-1, keepdim=True)).square().mean(-1).sqrt() / spread.clamp(min=1e-30)
    return float("inf") if bool(gap.isnan().any()) else float(gap.median())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
