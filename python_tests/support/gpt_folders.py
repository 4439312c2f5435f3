"""Small Qwen3 and Llama folders with wide random weights, norms included: narrow ones hide every mistake."""

import torch
from safetensors.torch import load_file

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
}
MODELS = {
    "qwen3 tied": ("qwen3", True, "default"),
    "qwen3 untied": ("qwen3", False, "yarn"),
    "llama tied": ("llama", True, "llama3"),
    "llama untied": ("llama", False, "linear"),
}
"""Name -> (family, tied, rope)."""
SIZES = {
    "vocab_size": 300,  # not a multiple of what Megatron pads to
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,  # heads x head_dim is not the hidden size
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}


def write_folder(folder, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes):
    """One of MODELS as transformers writes it. Returns: the model."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    family, tied, rope = MODELS[name]
    kind, config = {"qwen3": (Qwen3ForCausalLM, Qwen3Config), "llama": (LlamaForCausalLM, LlamaConfig)}[family]
    model = kind(config(**{**SIZES, **sizes}, tie_word_embeddings=tied, rope_parameters=dict(ROPES[rope])))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * 0.3 if parameter.dim() > 1 else 1 + drawn * 0.5)
    model.to(dtype).eval().save_pretrained(folder)
    return model


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(3))


def logits(model) -> torch.Tensor:
    """[tokens, vocab_size] of the fixed sequence."""
    with torch.no_grad():
        return model(input_ids=tokens()[None]).logits[0].float()


def folder_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype
        and first[n].shape == second[n].shape
        and first[n].view(torch.uint8).equal(second[n].view(torch.uint8))
        for n in first
    )
