"""Which parts of a transformers model are a group of FSDP2: each layer, the LM head, the embedding, and what is left.

A tied head lies with its embedding in the last group, the root's, which is whole from the first layer to the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from opd_engine.integrations.fsdp.precision import replace_parameters
from opd_engine.integrations.hf.lm_head import AfterHead, find_after_head
from opd_engine.parallel.sharded_modules import is_sharded, shard_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from opd_engine.parallel.meshes import DeviceMesh


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    offload: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> PreTrainedModel:
    """Spread a causal LM over the ranks of a mesh.

    mesh: of one dimension
    dtype: in which it computes; None is the model's own. What trains is float32 for half precision, also in the shards
    offload: the shards, their gradients and the optimizer's states lie on the host
    optimizer: of the model's parameters as they were, to be handed the sharded ones; before its first step

    Returns: the model, whose gradients are sums over the ranks. Mutates: the model.
    Raises: ValueError for a mesh of several dimensions, or an optimizer that has stepped.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: wanted one dimension, got {mesh.ndim} ({mesh.mesh_dim_names}); give a slice of it")
    if is_sharded(model):
        raise ValueError("model: wanted one that is not sharded yet")
    model._opd_after_head = find_after_head(model)  # while it can still be tried: sharded, it is wrapped
    before = dict(model.named_parameters())
    computes = model.dtype if dtype is None else dtype
    if computes in (torch.bfloat16, torch.float16):
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.data = parameter.data.float()
    options = {"dtype": computes, "offload": offload}
    for group in (*layers_of(model), *_ends_of(model), model):
        shard_group(group, mesh, **options)
    if optimizer is not None:
        after = dict(model.named_parameters())
        replace_parameters(optimizer, {parameter: after[name] for name, parameter in before.items()})
    return model


def after_head(model: PreTrainedModel) -> AfterHead | None:
    """What the model does after its LM head, where that can stand apart; of a sharded one as it was before."""
    return getattr(model, "_opd_after_head", None) if is_sharded(model) else find_after_head(model)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers, from the first to the last: what the model itself never splits, or its longest list of modules."""
    unsplit = set(model._no_split_modules or ())
    named = [module for module in model.modules() if type(module).__name__ in unsplit]
    inner = {id(child) for module in named for child in module.modules() if child is not module}
    layers = [module for module in named if id(module) not in inner]
    if layers:
        return layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def _ends_of(model: PreTrainedModel) -> list[nn.Module]:
    """Embedding and LM head, where they are two weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return []
    return [embedding, head]
