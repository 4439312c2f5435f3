"""What of Megatron is not supported, refused by name before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_engine.integrations.megatron.batches import BatchLayout
from opd_engine.integrations.megatron.groups import MegatronGroups
from opd_engine.integrations.megatron.head import unwrapped

_REFUSED = {
    "virtual_pipeline_model_parallel_size": "interleaved (virtual) pipelines are not supported",
    "num_moe_experts": "mixture of experts is not supported: expert gradients and router losses are not tested",
    "mtp_num_layers": "multi-token prediction is not supported: its losses have no teacher",
    "defer_embedding_wgrad_compute": "deferred embedding gradients are not supported: the head sees chosen rows",
    "overlap_moe_expert_parallel_comm": "this schedule is not supported",
    "hybrid_context_parallel": "hybrid context parallelism is not supported",
}


def check_model(
    model: torch.nn.Module | Sequence[torch.nn.Module], groups: MegatronGroups, layout: BatchLayout
) -> torch.nn.Module:
    """The one model chunk of this rank.

    Raises: ValueError naming the option that is not supported, what was wanted and what came.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    if len(chunks) != 1:
        raise ValueError(
            f"model: wanted one chunk a rank, got {len(chunks)}; interleaved (virtual) pipelines are not supported"
        )
    chunk = chunks[0]
    language_model = unwrapped(chunk)
    config = getattr(language_model, "config", None)
    if config is None or not hasattr(language_model, "post_process"):
        raise ValueError(
            "model: wanted a Megatron language model (config, post_process, output_layer), "
            f"got {type(language_model).__name__}"
        )
    for option, reason in _REFUSED.items():
        value = getattr(config, option, None)
        if value:
            raise ValueError(f"{option}={value}: {reason}")
    if "full_iteration" in str(getattr(config, "cuda_graph_scope", "")):
        raise ValueError("cuda_graph_scope=full_iteration: not supported, the loss reads its scores from the host")
    sizes = {
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "context_parallel_size": groups.cp_size,
    }
    for option, size in sizes.items():
        if getattr(config, option) != size:
            raise ValueError(f"groups: wanted {option} = {getattr(config, option)}, the model's, got {size}")
    if language_model.post_process != groups.is_last_stage:
        raise ValueError(
            f"model: wanted post_process = {groups.is_last_stage} on this pipeline stage, "
            f"got {language_model.post_process}"
        )
    if groups.is_last_stage and not hasattr(language_model, "output_layer"):
        raise ValueError(f"model: wanted an output_layer on the last stage, {type(language_model).__name__} has none")
    if groups.cp_size > 1 and layout.context == "allgather" and hasattr(language_model, "rotary_pos_emb"):
        raise ValueError(
            "context='allgather': the model's rotary embedding is cut for 'zigzag', positions would be wrong; wanted "
            "context='zigzag', or a model whose attention places its own positions (no rotary_pos_emb)"
        )
    return chunk


def check_trainable(model: torch.nn.Module, groups: MegatronGroups) -> None:
    """Refuses a model that cannot be trained through Megatron's DDP as it was built.

    Raises: ValueError naming what is wrong.
    """
    ddp_config = getattr(model, "ddp_config", None)
    if ddp_config is None:
        raise ValueError(
            f"model: wanted megatron.core.distributed.DistributedDataParallel, got {type(model).__name__}; "
            "a teacher that is not trained needs MegatronScorer only"
        )
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise ValueError("use_megatron_fsdp=True: Megatron FSDP is not supported")
    if getattr(ddp_config, "overlap_param_gather", False):
        raise ValueError(
            "overlap_param_gather=True: not supported, weights would be read (scored, published, switched) before "
            "they are gathered"
        )
    marked = any(getattr(parameter, "tensor_model_parallel", False) for parameter in model.parameters())
    if groups.tp_size > 1 and not marked:
        # perform_initialization=False leaves the marks out, and with them the other ranks' shards of the norm.
        raise ValueError(
            f"model: wanted weights marked tensor_model_parallel at {groups.tp_size} tensor-parallel ranks, got none "
            "(perform_initialization=False leaves them out); the gradient norm, and clipping, would see one rank's part"
        )
    ranks = groups.dp_cp.size()
    if ranks == 1 or ddp_config.average_in_collective:
        return
    per_token = bool(unwrapped(model).config.calculate_per_token_loss)
    # DDP fixes its scaling when it is built. Changed afterwards, the option scales gradients by the number of ranks
    # while the loss curve looks the same.
    built_per_token = all(buffer.gradient_scaling_factor == 1.0 for buffer in model.buffers)
    if built_per_token != per_token:
        raise ValueError(
            f"calculate_per_token_loss={per_token}: the DistributedDataParallel was built with {built_per_token}; set "
            "it before building, gradients would be wrong by the number of data-parallel ranks"
        )
