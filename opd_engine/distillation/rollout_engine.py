"""What writes rollouts, as the loop sees it: weights go in by version, prompts go in, completions come out.

Structural types only. An engine in the trainer's process shares its weights; a server is sent them. Either way it is
asked what it holds before it writes, and says of every sample which version wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    max_new_tokens: a completion ends here at the latest
    end_ids: it ends after one of these
    temperature: 0 takes the likeliest id, the lowest of equals
    top_k, top_p: keep only the k likeliest ids, or the smallest set of that mass; 0 and 1 switch them off
    top_logprobs: how many of the likeliest ids come back with each token
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    top_logprobs: int = 0

    def greedy(self) -> Sampling:
        """The likeliest ids instead of samples, without their log-probs' neighbours."""
        return dataclasses.replace(self, temperature=0.0, top_k=0, top_p=1.0, top_logprobs=0)


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What was written after each prompt, in the prompts' order.

    tokens: per sequence, the ids, the end token included where one was drawn
    log_probs: per sequence, log q of each at the sampling temperature over the whole vocabulary (before top_k and
        top_p), float32
    finished: per sequence, whether it stopped by itself rather than at max_new_tokens
    top_logprobs: per sequence and token the likeliest (log-prob, id), or None where none were asked for
    response_mask: per sequence and token, False for what a tool wrote; None: the model wrote all of it
    weight_version: per sequence the version that wrote it; None of an engine that was never published to
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    finished: list[bool]
    top_logprobs: list[list[list[tuple[float, int]]]] | None = None
    response_mask: list[list[bool]] | None = None
    weight_version: list[int] | None = None


@dataclass(frozen=True)
class EngineState:
    """What an engine serves: nothing that is known, whole weights, or an untouched base beside an adapter.

    version: of the publication that it holds
    base: fingerprint of the base, of a split state
    """

    kind: Literal["none", "full", "split"] = "none"
    version: int | None = None
    base: str | None = None

    NONE: ClassVar[EngineState]

    @classmethod
    def FULL(cls, version: int) -> EngineState:
        return cls("full", version)

    @classmethod
    def SPLIT(cls, base_fingerprint: str, version: int) -> EngineState:
        return cls("split", version, base_fingerprint)


EngineState.NONE = EngineState()


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Whole weights on their way to an engine.

    version: counts a run's publications, also over a resume
    tensors: the live weights by name; read them before `publish` returns
    """

    version: int
    tensors: Mapping[str, Tensor]


@runtime_checkable
class RolloutEngine(Protocol):
    """Writes completions. Every rank of a data-parallel index makes the same calls and gets the same answers."""

    @property
    def state(self) -> EngineState:
        """What it serves now."""
        ...

    def publish(self, publication: Publication) -> None:
        """Serve these weights from now on."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: Sequence[int]) -> Completions:
        """One completion a prompt.

        seed: one number a prompt: what is drawn after it depends on that number and the weights alone, not on what is
            written beside it
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Be able to write again; `state` says whether the weights are still there."""
        ...
