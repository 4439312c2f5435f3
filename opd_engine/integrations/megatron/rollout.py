"""Completions by a Megatron model as it is now: every token a forward of all sequences, without a cache.

For evaluation and small models; a large one writes through a rollout engine. Which token is drawn depends on the sample
and the step alone, so that the same rollouts come out however samples and weights are split over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.distillation.rollout_engine import Completions, EngineState, Publication, Sampling
from opd_engine.distillation.sampling import check_sampling, draw, likeliest, uniform_rows
from opd_engine.integrations.megatron.scorer import MegatronScorer


def generate(
    scorer: MegatronScorer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniforms: Tensor | None = None,
    top_logprobs: int = 0,
) -> Completions:
    """One completion a prompt. Every tensor, context and pipeline rank of a data-parallel index calls alike.

    scorer: the student's, or a teacher's
    temperature: 0 takes the likeliest token (the lowest id among equals)
    top_k, top_p: sample among the k likeliest ids only, or within the smallest set of that mass; 0 and 1 are off
    uniforms: [prompts, max_new_tokens] float64 in [0, 1), what is drawn with; not read at temperature 0
    top_logprobs: how many of the likeliest ids to return with each token

    Raises: ValueError for a setting out of range, and for sampling without a number a token.
    Communicates: as MegatronScorer.next_token_logits, max_new_tokens times.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature > 0 and (uniforms is None or list(uniforms.shape) != [len(prompts), max_new_tokens]):
        got = None if uniforms is None else list(uniforms.shape)
        raise ValueError(f"uniforms: wanted [{len(prompts)}, {max_new_tokens}] to sample, got {got}")
    tokens: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    tops: list[list[list[tuple[float, int]]]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for place in range(max_new_tokens):
        going = [index for index, done in enumerate(finished) if not done]
        if not going:
            break
        batch = pack_rollouts([prompts[index] for index in going], [tokens[index] for index in going])
        logits = scorer.next_token_logits(batch).double().cpu()
        log_q = (logits / (temperature or 1.0)).log_softmax(1)
        if temperature == 0:
            drawn = logits.argmax(1)
        else:
            drawn = draw(log_q, uniforms[going, place], top_k=top_k, top_p=top_p)
        for index, top in zip(going, likeliest(log_q, top_logprobs) if top_logprobs else ()):
            tops[index].append(top)
        chosen = log_q.gather(1, drawn[:, None]).squeeze(1).tolist()
        for index, token, log_prob in zip(going, drawn.tolist(), chosen):
            tokens[index].append(token)
            log_probs[index].append(min(log_prob, 0.0))
            finished[index] = token in end_ids
    return Completions(
        tokens=tokens, log_probs=log_probs, finished=finished, top_logprobs=tops if top_logprobs else None
    )


class MegatronEngine:
    """Implements RolloutEngine with a live Megatron model: what it serves is that model as it is.

    scorer: the student's, or a teacher's
    """

    def __init__(self, scorer: MegatronScorer) -> None:
        self.scorer = scorer
        self._state = EngineState.NONE

    @property
    def state(self) -> EngineState:
        return self._state

    def publish(self, publication: Publication) -> None:
        """The weights are here already; takes note of their version."""
        self._state = EngineState.FULL(publication.version)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: Sequence[int]) -> Completions:
        """As `generate`, drawn with each prompt's own seed."""
        drawn = uniform_rows(seed, sampling.max_new_tokens) if sampling.temperature > 0 else None
        options = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "top_logprobs")}
        limits = {"max_new_tokens": sampling.max_new_tokens, "end_ids": sampling.end_ids}
        written = generate(self.scorer, prompts, uniforms=drawn, **limits, **options)
        version = self._state.version
        return replace(written, weight_version=None if version is None else [version] * len(prompts))

    def sleep(self) -> None:
        """Has nothing of its own to give back."""

    def wake(self) -> None:
        """Is always there."""
