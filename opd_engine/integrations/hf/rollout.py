"""Batched sampling from a transformers causal LM with a KV cache, seeded by a generator.

Bound by latency: one forward of one token a sequence at each step. Samples come from the model's own distribution
at a temperature: top_k and top_p are off by default, since what they cut is no longer on policy.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout_engine import Completions
from opd_engine.distillation.sampling import check_sampling, draw, likeliest
from opd_engine.integrations.hf.models import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _check(
    model, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted >= 1, got {max_new_tokens}")
    check_sampling(temperature, top_k, top_p)
    rows, positions = model.get_input_embeddings().weight.shape[0], max_positions(model)
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
    """Samples one completion a prompt; prompts of any lengths are left-padded and masked.

    prompts: per sequence, its ids, at least one.  max_new_tokens: >= 1.  end_ids: a sequence stops after one of these.
    pad_id: id that fills the padding; never attended to.
    temperature: finite, >= 0; 0 takes the most likely id (the lowest of equals).
    top_k, top_p: keep only the k likeliest ids, or the smallest set of that mass; 0 and 1 switch them off.
    generator: of the CPU; the same state gives the same samples at a fixed thread count. None is torch's default.
    uniforms: [prompts, max_new_tokens] float64 in [0, 1) to draw with instead: a sample then depends on its own row and
        the model alone, not on what is written beside it.
    top_logprobs: how many of the likeliest ids to return with each token.
    Returns: Completions, in the order of the prompts.
    Raises: ValueError for an empty prompt, ids or lengths that the model has no row for, or a setting out of range.
    Mutates: nothing; the model's train or eval mode is restored.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        return Completions(tokens=[], log_probs=[], finished=[])
    was_training = model.training
    model.eval()
    try:
        tokens, log_probs, lengths, finished, tops = _decode(
            model,
            prompts,
            max_new_tokens,
            end_ids,
            pad_id,
            temperature,
            top_k,
            top_p,
            generator,
            uniforms,
            top_logprobs,
        )
    finally:
        model.train(was_training)
    return Completions(
        tokens=[row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)],
        log_probs=[row[:length] for row, length in zip(log_probs.tolist(), lengths, strict=True)],
        finished=finished.tolist(),
        # Written step by step, wanted sequence by sequence.
        top_log_probs=[[step[row] for step in tops[:n]] for row, n in enumerate(lengths)] if top_logprobs else None,
    )


def _decode(
    model, prompts, max_new_tokens, end_ids, pad_id, temperature, top_k, top_p, generator, uniforms, top_logprobs
):
    device = next(model.parameters()).device
    keep_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    input_ids, attention_mask = _left_pad(prompts, pad_id, device)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_(min=0)
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    tokens, log_probs, tops, cache = [], [], [], None
    for step in range(max_new_tokens):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **keep_last,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        # Subtracted before dividing: the other order loses digits at small temperatures.
        centred = logits - logits.amax(-1, keepdim=True)
        row_log_probs = torch.log_softmax(centred / (temperature or 1.0), dim=-1)
        if temperature == 0.0:
            chosen = logits.argmax(-1)
        else:
            if uniforms is None:
                drawn = torch.rand(len(prompts), dtype=torch.float64, generator=generator)
            else:
                drawn = uniforms[:, step]
            chosen = draw(row_log_probs, drawn, top_k=top_k, top_p=top_p)
        log_probs.append(row_log_probs.gather(1, chosen[:, None])[:, 0])
        tokens.append(chosen)
        if top_logprobs:
            tops.append(likeliest(row_log_probs, top_logprobs))
        lengths += (~finished).long()
        finished = finished | torch.isin(chosen, ends)
        if bool(finished.all()) or step + 1 == max_new_tokens:
            break
        input_ids = chosen.where(~finished, torch.full_like(chosen, pad_id))[:, None]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return torch.stack(tokens, 1).cpu(), torch.stack(log_probs, 1).cpu(), lengths.tolist(), finished.cpu(), tops
