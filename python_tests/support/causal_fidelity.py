"""How far what the package makes of a transformers model is from the model itself, by one plain forward a sequence."""

import inspect

import torch

from opd_engine.distillation import pack_rollouts
from opd_engine.integrations.hf import generate, make_backend
from tiny_causal_models import VOCAB

PROMPTS = [[5, 9, 13, 4, 17, 21, 8], [7, 3], [11, 12, 13, 14, 15]]


@torch.no_grad()
def plain_logits(model, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocab] float64 of one forward, all of whose ids are words, padding's too."""
    ids = torch.tensor([tokens])
    takes = inspect.signature(model.forward).parameters
    mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in takes else {}
    return model(input_ids=ids, use_cache=False, **mask).logits[0].double()


@torch.no_grad()
def rollout_gap(model) -> float:
    """Largest |log-prob that came with a token - that of one plain forward|, nats."""
    generator = torch.Generator().manual_seed(0)
    out = generate(model, PROMPTS, max_new_tokens=8, end_ids=[VOCAB + 1], pad_id=0, generator=generator)
    gap = 0.0
    for prompt, tokens, given in zip(PROMPTS, out.tokens, out.log_probs):
        own = (
            plain_logits(model, prompt + tokens)
            .log_softmax(-1)[len(prompt) - 1 : -1]
            .gather(1, torch.tensor(tokens)[:, None])[:, 0]
        )
        gap = max(gap, float((own - torch.tensor(given, dtype=torch.float64)).abs().max()))
    return gap


@torch.no_grad()
def logits_off(model) -> list[float]:
    """Per sequence the largest difference of the backend's packed logits from the model's own, in roundings of its
    largest logit: each sequence alone, as nothing else changes the order of the sums then."""
    backend, found = make_backend(model), []
    for row in PROMPTS:
        theirs = plain_logits(model, row)
        ours = backend.logits(pack_rollouts([row[:1]], [row[1:]])).double()
        eps = torch.finfo(next(model.parameters()).dtype).eps
        found.append(float((ours - theirs).abs().max()) / (eps * float(theirs.abs().max())))
    return found


@torch.no_grad()
def padding_off(model) -> float:
    """The same for sequences of several lengths in one batch, as a share of the largest logit."""
    theirs = torch.cat([plain_logits(model, row) for row in PROMPTS])
    ours = make_backend(model).logits(pack_rollouts([row[:1] for row in PROMPTS], [row[1:] for row in PROMPTS]))
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())
