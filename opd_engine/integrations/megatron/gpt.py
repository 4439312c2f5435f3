"""A Qwen3 or Llama as a Megatron GPTModel with Megatron's own layers: this rank's part, weights undefined.

No TransformerEngine: padded batches, tensor and pipeline parallel. Other models are brought as modules; MegatronActor
and MegatronScorer take any.
"""

from __future__ import annotations

from typing import Any

import torch

from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.integrations.megatron.groups import MegatronGroups


def check_divides(shape: GPTShape, *, tp: int, pp: int) -> None:
    """Raises: ValueError where heads, groups, units or layers do not divide by the ranks."""
    for name, count, size in (
        ("attention heads", shape.num_heads, tp),
        ("query groups", shape.num_query_groups, tp),
        ("feed-forward units", shape.ffn_hidden_size, tp),
        ("layers", shape.num_layers, pp),
    ):
        if count % size:
            raise ValueError(f"run: wanted {name} that divide by {size} ranks, got {count}")


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""Options of build_gpt by what the backward computes again: nothing, attention's scores, all but each layer's input."""


def build_gpt(
    shape: GPTShape, groups: MegatronGroups, *, dtype: torch.dtype = torch.float32, **options: Any
) -> torch.nn.Module:
    """This rank's part of the model, weights undefined until they are loaded.

    options: of megatron.core's TransformerConfig, over those of the shape
    Raises: ValueError where heads, groups or layers do not divide by the ranks.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    check_divides(shape, tp=groups.tp_size, pp=groups.pp_size)
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
        "qk_layernorm": shape.qk_norm,
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
    config = TransformerConfig(**{**settings, **options})
    if shape.rope.yarn_factor is not None:
        # Read by the attention of every GPT, whatever its kind of positions.
        config.yarn_rotary_scaling_factor = shape.rope.yarn_factor
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm"),
        vocab_size=shape.padded_vocab_size(groups.tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope.theta,
    )
    # Megatron's own scaling takes a factor and fixes the rest; this is what the config says, for every kind.
    model.rotary_pos_emb.inv_freq = shape.rope.inverse_frequencies(shape.head_dim)
    _mark_shards(model)
    return model


def _mark_shards(model: torch.nn.Module) -> None:
    """Tell Megatron which weights are shards; it does so itself only where it initialises them.

    Unmarked, they count as copies: the gradient norm, and with it the clipping, would see one tensor-parallel rank's.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            weight = module.weight
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, int(isinstance(module, RowParallelLinear)), 1)
