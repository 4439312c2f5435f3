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
)
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
OWN = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BailingHybridConfig": {"layer_group_size": 2},
    "CohereCompassTextConfig": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROTARY)},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV4Config": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "qk_rope_head_dim": 8,
        "head_dim": 16,
        "rope_parameters": None,
    },
    "Dots1Config": {"n_shared_experts": 1},
    "FalconH1Config": {"mamba_d_ssm": 128},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LongcatFlashConfig": {"zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32, "head_dim": 8},
    "Mamba2Config": {"num_heads": 8, "n_groups": 1},
    "ReformerConfig": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 8], "is_decoder": True},
    "RoCBertConfig": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "concat_input": False},
    "XLMConfig": {"emb_dim": 64, "n_layers": 2, "causal": True},
    "XmodConfig": {"default_language": "en_XX"},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
    },
    "Zamba2Config": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
}
"""What the families need that the sizes alone do not give: one layer of each kind, sizes that fit each other."""


def shrunk(config_class: type):
    """The class's own configuration at a tiny size with a layer of each of its kinds, those inside it too."""
    default = config_class()
    accepted = set(inspect.signature(config_class.__init__).parameters) | set(vars(default))
    options = {name: value for name, value in SMALL.items() if name in accepted or name == "attn_implementation"}
    if "qk_rope_head_dim" in accepted:  # latent attention: every head has its keys, and head_dim is the rotary part
        options.pop("head_dim", None)
        options["num_key_value_heads"] = options.get("num_attention_heads", 4)
    own = OWN.get(config_class.__name__, {})
    kinds = {name: list(dict.fromkeys(vars(default).get(name) or [])) for name in PER_LAYER}
    layers = own.get("num_hidden_layers", max(2, *map(len, kinds.values())))
    if "num_hidden_layers" in options:
        options["num_hidden_layers"] = layers
    for name, value in vars(default).items():
        if hasattr(value, "to_dict") and name.endswith("config"):
            options[name] = shrunk(type(value))
    per_layer = {name: (found * layers)[:layers] for name, found in kinds.items() if found}
    try:
        config = config_class(**(options | per_layer | own))
    except (TypeError, ValueError):
        config = config_class(**(options | own))
        for name, found in per_layer.items():
            if name not in own and isinstance(getattr(config, name, None), (list, tuple)):
                setattr(config, name, found)
    config.is_decoder = True
    return config


def every_causal_class() -> list[type]:
    """Every class that AutoModelForCausalLM may give."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds = [MODEL_FOR_CAUSAL_LM_MAPPING[config_class] for config_class in MODEL_FOR_CAUSAL_LM_MAPPING]
    return list({(kind[0] if isinstance(kind, tuple) else kind).__name__: kind for kind in kinds}.values())


def tiny_model(kind: type) -> torch.nn.Module:
    """A random model of a class of transformers, wide enough to show what is wrong; eval mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = shrunk(kind.config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if size > 8_000_000:
        raise ValueError(f"it has {size:,} parameters at these settings")
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # a flat model shows nothing
        if parameter.dim() >= 2 and float(parameter.detach().std()) < 0.1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def every_causal_model() -> Iterator[tuple[str, torch.nn.Module | Exception]]:
    """(class name, a model or what building it said), each model dropped before the next is built."""
    for kind in every_causal_class():
        kind = kind[0] if isinstance(kind, tuple) else kind
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield kind.__name__, tiny_model(kind)
        except Exception as error:
            yield kind.__name__, error
