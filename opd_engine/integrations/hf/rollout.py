"""Batched sampling from a transformers causal LM with a KV cache, seeded by a generator.

Bound by latency: one forward of one token a sequence at each step. Samples come from the model's own distribution
at a temperature: top_k and top_p are off by default, since what they cut is no longer on policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout_engine import Completions
from opd_engine.distillation.sampling import check_sampling, draw, likeliest
from opd_engine.integrations.hf.decoding import Reader, find_way, groups
from opd_engine.integrations.hf.models import language_model, max_positions, vocabulary_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _check(
    model, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted >= 1, got {max_new_tokens}")
    check_sampling(temperature, top_k, top_p)
    rows, positions = vocabulary_rows(model), max_positions(model)
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts: wanted at least one token each, got an empty prompt at index {index}")
        outside = next((place for place, token in enumerate(prompt) if not 0 <= token < rows), None)
        if outside is not None:
            raise ValueError(
                f"prompts[{index}][{outside}]: wanted ids below the model's vocabulary of {rows}, got {prompt[outside]}"
            )
        if positions is not None and len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"max_new_tokens: prompts[{index}] has {len(prompt)} tokens and {max_new_tokens} may follow; wanted a "
                f"length of at most {positions} together, the positions that the model has learned"
            )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    top_logprobs: int = 0,
) -> Completions:
    """Samples one completion a prompt, by the fastest way that the model is seen to keep its own distribution in.

    prompts: per sequence, its ids, at least one.  max_new_tokens: >= 1.  end_ids: a sequence stops after one of these.
    pad_id: id that fills the padding; never attended to.
    temperature: finite, >= 0; 0 takes the most likely id (the lowest of equals).
    top_k, top_p: keep only the k likeliest ids, or the smallest set of that mass; 0 and 1 switch them off.
    uniforms: [prompts, max_new_tokens] float64 in [0, 1), what is drawn with: a sample depends on its own row and the
        model alone, not on what is written beside it.
    generator: of the CPU, draws them where none are given; None is torch's default.
    top_logprobs: how many of the likeliest ids to return with each token.
    Returns: Completions, in the order of the prompts.
    Raises: ValueError for an empty prompt, ids or lengths that the model has no row for, a setting out of range, or a
        model that cannot be continued token by token.
    Mutates: nothing; the model's train or eval mode is restored.
    """
    model = language_model(model)
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        return Completions(tokens=[], log_probs=[], finished=[])
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        way = find_way(model)
        written: list[_Written | None] = [None] * len(prompts)
        if uniforms is None and temperature > 0:
            uniforms = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64, generator=generator)
        for group in groups(prompts, way):
            reader = Reader(model, [prompts[index] for index in group], pad_id, way)
            drawn = None if uniforms is None else uniforms[group]
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "top_logprobs": top_logprobs}
            for index, one in zip(group, _decode(reader, len(group), max_new_tokens, end_ids, drawn, **options)):
                written[index] = one
    finally:
        for module, training in modes:
            module.training = training
    tokens, log_probs, finished, tops = zip(*written)
    return Completions(
        tokens=list(tokens),
        log_probs=list(log_probs),
        finished=list(finished),
        top_logprobs=list(tops) if top_logprobs else None,
    )


_Written = tuple[list[int], list[float], bool, list[list[tuple[float, int]]]]
"""Of one sequence: tokens, their log-probs, whether it ended, and each token's likeliest."""


def _decode(
    reader: Reader,
    count: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    uniforms: Tensor | None,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    top_logprobs: int,
) -> list[_Written]:
    """Sequences that are fed together, until all have ended; those that have are fed anything and not kept."""
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    tops: list[list[list[tuple[float, int]]]] = []
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64)
    finished, lengths = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    for step in range(max_new_tokens):
        logits = reader.logits().float()
        # Subtracted before dividing: the other order loses digits at small temperatures.
        centred = logits - logits.amax(-1, keepdim=True)
        row_log_probs = torch.log_softmax(centred / (temperature or 1.0), dim=-1)
        if temperature == 0.0:
            chosen = logits.argmax(-1)
        else:
            chosen = draw(row_log_probs, uniforms[:, step], top_k=top_k, top_p=top_p)
        log_probs.append(row_log_probs.gather(1, chosen[:, None])[:, 0].cpu())
        if top_logprobs:
            tops.append(likeliest(row_log_probs, top_logprobs))
        chosen = chosen.cpu()
        tokens.append(chosen)
        lengths += (~finished).long()
        finished = finished | torch.isin(chosen, ends)
        if bool(finished.all()) or step + 1 == max_new_tokens:
            break
        reader.append(chosen)
    ids, values = torch.stack(tokens, 1).tolist(), torch.stack(log_probs, 1).tolist()
    return [
        (ids[row][:length], values[row][:length], bool(finished[row]), [step[row] for step in tops[:length]])
        for row, length in enumerate(lengths.tolist())
    ]
