"""A tiny random model of every causal architecture that transformers builds from a configuration alone."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator

import torch

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "embed_dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "hidden_dim": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_blocks": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "rotary_dim": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "sliding_window": 6,
    "attention_window_size": 6,
    "lru_width": 64,
    "attention_hidden_size": 64,
    "state_size": 8,
    "conv_kernel": 4,
    "chunk_size": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
PER_LAYER = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "block_types",
    "no_rope_layers",
    "attn_layer_indices",
)


def shrunk(config_class: type):
    """The class's own configuration at a tiny size, those inside it too."""
    accepted = set(inspect.signature(config_class.__init__).parameters) | set(vars(config_class()))
    options = {name: value for name, value in SMALL.items() if name in accepted or name == "attn_implementation"}
    if "qk_rope_head_dim" in accepted:
        options.pop("head_dim", None)  # means the rotary part there
    for name, value in vars(config_class()).items():
        if hasattr(value, "to_dict") and name.endswith("config"):
            options[name] = shrunk(type(value))
    config = config_class(**options)
    layers = getattr(config, "num_hidden_layers", 2)
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) > layers:
            kinds = list(dict.fromkeys(values))
            setattr(config, name, type(values)((kinds * layers)[:layers]))
    config.is_decoder = True
    return config


def every_causal_model() -> Iterator[tuple[str, torch.nn.Module | Exception]]:
    """(class name, a model or what building it said), each model dropped before the next is built."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    transformers.logging.set_verbosity_error()
    seen = set()
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        name = (kind[0] if isinstance(kind, tuple) else kind).__name__
        if name in seen:
            continue
        seen.add(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                config, kind = shrunk(config_class), kind[0] if isinstance(kind, tuple) else kind
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
                if size > 5_000_000:
                    raise ValueError(f"it has {size:,} parameters at these settings")
                model = kind(config).eval()
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():  # a flat model shows nothing
                if parameter.dim() >= 2 and float(parameter.detach().std()) < 0.1:
                    parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            yield name, model
        except Exception as error:
            yield name, error
