"""Small transformers models for tests of the trainer: wide initial weights, since a flat model shows no error."""

import torch

from opd_engine.train.examples.arithmetic import make_tokenizer
from opd_engine.train.examples.pretrain import make_model
from opd_engine.train.examples.settings import ModelShape

SHAPE = ModelShape(hidden_size=32, num_layers=2, num_heads=2, head_dim=16, feed_forward_size=64)


def widen(model, std: float = 0.3, seed: int = 1):
    """Redraws every matrix with a wide std: at the usual 0.02 all logits are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def wide_qwen3(vocab_size: int = 32, seed: int = 1):
    return widen(make_model(SHAPE, vocab_size, make_tokenizer(), seed), seed=seed)


def write_model(folder, *, tokenizer=None, seed: int = 1, vocab_size: int = 32):
    """A model folder that --student or --teacher takes."""
    wide_qwen3(vocab_size, seed).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder
