"""Which parameters weight decay pulls to zero: matrices and embeddings, not the gains of norms and not biases.

As Megatron and the trainer of transformers group them: a gain decayed towards 0 scales its layer down.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Groups for a torch optimizer: what decays, then what does not; an empty one is left out.

    named_parameters: of a model; those that do not train are left out
    """
    decayed, free = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (free if parameter.dim() < 2 or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
