"""A Qwen3 folder as a Megatron GPT: its shape, the model, and which part of which tensor this rank's weights are.

Dense Qwen3 only, with Megatron's own layers (no TransformerEngine): padded batches, tensor and pipeline parallel. Other
models are brought as modules; MegatronActor and MegatronScorer take any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd_engine.integrations.megatron.groups import MegatronGroups

Source = tuple[tuple[str, ...], str]
"""(the folder's tensors that make one of Megatron's, how: "whole", "rows", "columns", "qkv" or "gate")."""

_LAYER = {
    "input_layernorm.weight": (("input_layernorm.weight",), "whole"),
    "self_attention.linear_qkv.weight": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), "whole"),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), "whole"),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), "columns"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), "whole"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate"),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), "columns"),
}


@dataclass(frozen=True)
class Qwen3Shape:
    """What config.json says of the architecture."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    max_position_embeddings: int

    @classmethod
    def read(cls, folder: str | Path, *, argument: str) -> Qwen3Shape:
        """From a folder's config.json.

        Raises: ValueError for another kind of model, or one with what is not built here.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{argument}: wanted a folder with a config.json, got {str(folder)!r} without one")
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config.get("model_type") != "qwen3":
            raise ValueError(f"{argument}: wanted model_type qwen3, got {config.get('model_type')!r} in {path}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        for name, value, wanted in (
            ("rope_type", rope.get("rope_type", "default"), "default"),
            ("attention_bias", config.get("attention_bias", False), False),
            ("use_sliding_window", config.get("use_sliding_window", False), False),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ):
            if value != wanted:
                raise ValueError(f"{argument}: {name}: wanted {wanted!r}, got {value!r} in {path}")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            ffn_hidden_size=config["intermediate_size"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            tied=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=config["max_position_embeddings"],
        )

    def padded_vocab_size(self, tp_size: int, multiple: int = 128) -> int:
        """Megatron's width of the embedding: a multiple of 128 x tp_size."""
        step = multiple * tp_size
        return -(-self.vocab_size // step) * step


def build_qwen3(
    shape: Qwen3Shape, groups: MegatronGroups, *, dtype: torch.dtype = torch.float32, **options: Any
) -> torch.nn.Module:
    """This rank's part of the model, weights undefined until they are loaded.

    options: of megatron.core's TransformerConfig, over those of the shape
    Raises: ValueError where heads, groups or layers do not divide by the ranks.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    for name, count, size in (
        ("attention heads", shape.num_heads, groups.tp_size),
        ("query groups", shape.num_query_groups, groups.tp_size),
        ("feed-forward units", shape.ffn_hidden_size, groups.tp_size),
        ("layers", shape.num_layers, groups.pp_size),
    ):
        if count % size:
            raise ValueError(f"run: wanted {name} that divide by {size} ranks, got {count}")
    settings = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "layernorm_epsilon": shape.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "context_parallel_size": groups.cp_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "calculate_per_token_loss": True,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "batch_p2p_comm": False,
    }
    return GPTModel(
        config=TransformerConfig(**{**settings, **options}),
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=shape.padded_vocab_size(groups.tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )


def sources(module: torch.nn.Module, shape: Qwen3Shape) -> Iterator[tuple[str, Source]]:
    """(name of a parameter of this rank's module, what it is made of)."""
    for name, _ in module.named_parameters():
        if name.startswith("decoder.layers."):
            index, rest = name.removeprefix("decoder.layers.").split(".", 1)
            names, how = _LAYER[rest]
            # Megatron numbers layers through all stages, from 1.
            layer = module.decoder.layers[int(index)].layer_number - 1
            yield name, (tuple(f"model.layers.{layer}.{part}" for part in names), how)
        elif name == "decoder.final_layernorm.weight":
            yield name, (("model.norm.weight",), "whole")
        elif name == "output_layer.weight" and not shape.tied:
            yield name, (("lm_head.weight",), "rows")
        else:
            yield name, (("model.embed_tokens.weight",), "rows")


def fill(buffer: torch.Tensor, parts: list[Any], how: str, shape: Qwen3Shape, tp_rank: int, tp_size: int) -> None:
    """Write this rank's part of the folder's tensors.

    parts: anything that gives a tensor when sliced; only the rows or columns of this rank are read
    Mutates: buffer; rows beyond the folder's vocabulary become 0.
    """
    if how == "whole":
        buffer.copy_(parts[0][:])
    elif how == "columns":
        width = buffer.shape[1]
        buffer.copy_(parts[0][:, tp_rank * width : (tp_rank + 1) * width])
    elif how == "rows":
        start = tp_rank * buffer.shape[0]
        end = min(start + buffer.shape[0], shape.vocab_size)
        buffer.zero_()
        if end > start:
            buffer[: end - start].copy_(parts[0][start:end])
    elif how == "gate":
        half = buffer.shape[0] // 2
        for side, part in enumerate(parts):
            buffer[side * half : (side + 1) * half].copy_(part[tp_rank * half : (tp_rank + 1) * half])
    else:
        # Per query group: its queries, one key, one value.
        d, groups = shape.head_dim, shape.num_query_groups // tp_size
        queries = shape.num_heads // shape.num_query_groups * d
        rows = buffer.view(groups, queries + 2 * d, -1)
        for part, begin, size in zip(parts, (0, queries, queries + d), (queries, d, d)):
            own = part[tp_rank * groups * size : (tp_rank + 1) * groups * size]
            rows[:, begin : begin + size].copy_(own.view(groups, size, -1))
