"""Small models from nothing: a Qwen3 and supervised training on token sequences with cross entropy.

It makes the teachers and the weak student of the embedded examples. Distillation never comes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from opd_engine.train.examples.settings import ModelShape, Supervision
from opd_engine.train.learning_rate import learning_rate_factor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Positions are rotary, so that a longer bound costs nothing.
_MAX_POSITIONS = 4096


def make_model(shape: ModelShape, vocab_size: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A random Qwen3 of that shape, float32, embeddings tied; the same seed gives the same weights.

    Mutates: nothing; torch's global generator is restored.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.feed_forward_size,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()


def train_on_sequences(
    model: PreTrainedModel,
    draw_batch: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    supervision: Supervision,
    *,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Trains the model in place with AdamW and cross entropy; returns the mean loss of the last tenth of the steps.

    draw_batch: from a generator to (input_ids [batch, length], loss_mask [batch, length] bool, 1 where the id at that
        position is to be predicted from those before it).
    on_step: called with (step, loss) after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=supervision.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    model.train()
    for step in range(supervision.steps):
        factor = learning_rate_factor(step, supervision.steps, supervision.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = supervision.lr * factor
        input_ids, loss_mask = draw_batch(generator)
        rows = loss_mask[:, 1:]
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1][rows]
        loss = F.cross_entropy(logits.float(), input_ids[:, 1:][rows], label_smoothing=supervision.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else math.nan


def padded_batch(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, loss_mask), right-padded; the mask is true after the prompt and before the padding."""
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, (sequence, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        input_ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
        loss_mask[row, prompt_length : len(sequence)] = True
    return input_ids, loss_mask
