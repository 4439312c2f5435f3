"""The reference: transformers' own model in float64, a sequence at a time, and the loss's definition on its logits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import oracles
from opd_engine.distillation import RolloutBatch, pack_rollouts

BOUND = 1e-5
"""Of the largest gradient, in float32."""


def make_model(kind: str = "qwen3", *, tied: bool = False, seed: int = 0, std: float = 0.3, vocab_size: int = 61):
    """A small causal LM of wide weights: near-uniform logits would pass any test of a loss."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": std,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if kind == "gemma2":
        config = transformers.Gemma2Config(**sizes, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
        model = transformers.Gemma2ForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        config.initializer_range, config.tie_word_embeddings = std, tied
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_batch(num_seqs: int = 7, vocab_size: int = 61, seed: int = 3, **fields) -> RolloutBatch:
    """Rollouts of unequal length; a tool's tokens, a sample without a row that counts, a prompt of one token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    prompts = [[draw(2, vocab_size) for _ in range(1 if s == 0 else draw(1, 6))] for s in range(num_seqs)]
    responses = [[draw(2, vocab_size) for _ in range(draw(2, 9))] for _ in range(num_seqs)]
    masks = [[s != 2 and draw(0, 4) > 0 for _ in response] for s, response in enumerate(responses)]
    return pack_rollouts(prompts, responses, response_masks=masks, **fields)


def logits_of(model, batch: RolloutBatch) -> Tensor:
    """[num_tokens, vocab_size] float64, each sequence alone."""
    parts = [model(sequence[None], use_cache=False).logits[0] for sequence in batch.tokens.split(batch.lengths())]
    return torch.cat(parts)


def reference(model, teachers: dict, batch: RolloutBatch, config) -> tuple[float, dict[str, Tensor]]:
    """(loss, name -> gradient) of a token mean over the support of the student's top-k, one teacher a sample."""
    student = copy.deepcopy(model).double().eval()
    student.zero_grad(set_to_none=True)
    logits = logits_of(student, batch)
    names = list(teachers)
    owner = [names.index(name or names[0]) for name in batch.teacher_names]
    with torch.no_grad():
        theirs = torch.stack([logits_of(copy.deepcopy(teachers[name]).double(), batch) for name in names])
        of_row = torch.tensor(owner)[batch.row_sequence()]
        teacher_logits = theirs[of_row, torch.arange(batch.num_tokens)]
        ids = oracles.topk_ids(logits.detach(), config.k)
    t = config.temperature
    ours = oracles.gather_scores(logits, ids, temperature=t)
    fixed = oracles.gather_scores(teacher_logits, ids, temperature=t)
    losses = oracles.distill(ours, fixed, divergence=config.divergence, tail=config.tail)
    loss = losses[batch.loss_mask].mean() * config.coefficient
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.item(), gradients


def distance(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest difference of any parameter, over the largest gradient of that parameter."""
    assert set(gradients) == set(truth), set(gradients) ^ set(truth)
    worst = 0.0
    for name, expected in truth.items():
        largest = float(expected.abs().max()) or 1.0
        worst = max(worst, float((gradients[name].double() - expected).abs().max()) / largest)
    return worst
