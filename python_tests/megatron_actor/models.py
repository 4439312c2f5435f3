"""The dense reference's models built in Megatron, with the same weights, and gradients put together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_actor import on_cpu
from megatron_actor.dense import Shape


def transformer_config(shape: Shape, groups, **options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_size,
        "ffn_hidden_size": shape.ffn,
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
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "batch_p2p_comm": False,
    }
    return TransformerConfig(**{**settings, **options})


def build(shape: Shape, weights: dict[str, Tensor], groups, *, context: str | None, **options):
    """A GPTModel that holds this rank's part of the weights. context: of the plain attention; None: Megatron's own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    if context is not None:
        spec.submodules.self_attention.submodules.core_attention = on_cpu.plain_attention(context)
    model = GPTModel(
        config=transformer_config(shape, groups, **options),
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_length,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope" if shape.rotary else "learned_absolute",
    )
    load(model, weights, groups)
    return model


def load(model, weights: dict[str, Tensor], groups) -> None:
    """Put this rank's part of the whole weights in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights[whole_name(model, name)]
            parameter.copy_(split(name, whole, groups.tp_size)[groups.tp_rank])


def whole_name(model, name: str) -> str:
    """The parameter's name in the whole model: layers are numbered through all stages, a tied head is the embedding."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return ".".join(parts)


def split(name: str, whole: Tensor, tp_size: int) -> list[Tensor]:
    """The tensor-parallel ranks' parts of a parameter."""
    if tp_size == 1 or "layernorm" in name or "position_embeddings" in name:
        return [whole] * tp_size
    if "linear_fc1" in name:  # each rank holds its part of the gate, then its part of the rest
        gate, up = whole.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp_size), up.chunk(tp_size))]
    return list(whole.chunk(tp_size, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0))


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """The inverse of split."""
    if len(parts) == 1 or "layernorm" in name or "position_embeddings" in name:
        return parts[0]
    if "linear_fc1" in name:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half for side in (0, 1) for half in (pair[side] for pair in halves)])
    return torch.cat(parts, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)


def data_parallel(model, **options):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, **options), model
    )


def gradients(ddp) -> dict[str, Tensor]:
    """This rank's reduced gradients by whole name; a distributed optimizer's shards are gathered first."""
    for buffer in ddp.buffers:
        if ddp.ddp_config.use_distributed_optimizer:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel() // group.size()
                own = bucket.grad_data[group.rank() * size : (group.rank() + 1) * size].clone()
                parts = [torch.empty_like(own) for _ in range(group.size())]
                dist.all_gather(parts, own, group=group)
                bucket.grad_data.copy_(torch.cat(parts))
    named = ddp.module.named_parameters()
    return {whole_name(ddp.module, name): p.main_grad.detach().clone() for name, p in named}


def parameters(ddp) -> dict[str, Tensor]:
    return {whole_name(ddp.module, name): p.detach().clone() for name, p in ddp.module.named_parameters()}


def assemble(own: dict[str, Tensor], groups) -> tuple[dict[str, Tensor], float]:
    """(whole tensors on every rank, the worst difference between ranks that should hold the same, over the largest).

    A missing reduction shows in the second number: context, data and norm replicas must agree.
    """
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (groups.tp_rank, own))
    held: dict[str, dict[int, list[Tensor]]] = {}
    for tp_rank, values in everybody:
        for name, value in values.items():
            held.setdefault(name, {}).setdefault(tp_rank, []).append(value)
    largest = max(float(v.abs().max()) for parts in held.values() for copies in parts.values() for v in copies)
    worst, whole = 0.0, {}
    for name, parts in held.items():
        firsts = [parts[rank][0] for rank in sorted(parts)]
        assert len(firsts) == groups.tp_size, name
        replicated = "layernorm" in name or "position_embeddings" in name
        for rank, first in zip(sorted(parts), firsts):
            for copy in parts[rank]:
                worst = max(worst, float((copy - (firsts[0] if replicated else first)).abs().max()))
        whole[name] = joined(name, firsts)
    return whole, worst / max(largest, 1e-30)
