"""Half-precision models that learn: float32 weights, gradients and moments beside what computes in half precision.

AdamW on bfloat16 weights rounds most of its updates away, and its eps is 0 in float16. Bound: 16 bytes a trained
parameter (weight 4, gradient 4, moments 8) beside the 2 that compute, and one tensor's half gradient at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """Float32 weights that are trained, of a model in one process that computes in half precision.

    model: its parameters become `dtype`, from the values they have; buffers stay, as in FSDP2
    optimizer: before its first step; it steps on the float32 weights from now on

    Gradients go there as each is complete and add up in float32: a parameter's own is None afterwards. Parameters of
    another dtype, and those that are not trained, have no second copy.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
        self.of: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.requires_grad and dtype in HALF:
                self.of[parameter] = nn.Parameter(parameter.detach().float().clone())
                parameter.register_post_accumulate_grad_hook(self._take_gradient)
            parameter.data = parameter.data.to(dtype)
        replace_parameters(optimizer, self.of)

    @torch.no_grad()
    def write(self) -> None:
        """The computing weights become these, rounded once."""
        for parameter, master in self.of.items():
            parameter.copy_(master)

    def _take_gradient(self, parameter: Tensor) -> None:
        master = self.of[parameter]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None


def replace_parameters(optimizer: torch.optim.Optimizer, by: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Let the optimizer step on other parameters; those without a replacement stay.

    Raises: ValueError where it has stepped already.
    """
    if by and optimizer.state:
        raise ValueError("optimizer: wanted one that has not stepped yet, since it is to step on other tensors")
    for group in optimizer.param_groups:
        group["params"] = [by.get(parameter, parameter) for parameter in group["params"]]


class LossScale:
    """What the loss is multiplied by so that float16 gradients do not vanish; 1 for ever in any other dtype.

    value: halved by a gradient that is not finite, doubled after `growth_steps` steps without one
    """

    growth_steps = 2000

    def __init__(self, dtype: torch.dtype) -> None:
        self.moves = dtype == torch.float16
        self.value = 2.0**16 if self.moves else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """After a step that was taken, or left out."""
        if not self.moves:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 2.0**-14)
        elif self.good_steps == self.growth_steps:
            self.value, self.good_steps = self.value * 2, 0
