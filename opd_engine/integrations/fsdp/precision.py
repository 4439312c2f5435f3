"""Half-precision models that learn: float32 weights, gradients and moments beside what computes in half precision.

AdamW on bfloat16 weights rounds most of its updates away, and its eps is 0 in float16. Bound: 16 bytes a parameter
(master 4, gradient 4, moments 8) beside the 2 of the model, and one tensor's half gradient at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """Float32 copies of a model's half-precision parameters, for an optimizer to step on; nothing for other dtypes.

    parameters: those that are trained
    optimizer: before its first step; its half-precision parameters are replaced by their copies

    Gradients go to the copies as each is complete and add up there in float32: a parameter's own is None afterwards.
    Mutates: the optimizer's groups; hooks on the parameters.
    """

    def __init__(self, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.of: dict[Tensor, Tensor] = {}
        for parameter in parameters:
            if parameter.dtype in _HALF:
                self.of[parameter] = parameter.detach().float().requires_grad_()
                parameter.register_post_accumulate_grad_hook(self._take_gradient)
        if self.of and optimizer.state:
            raise ValueError("optimizer: wanted one before its first step, for a model in half precision")
        for group in optimizer.param_groups:
            group["params"] = [self.of.get(parameter, parameter) for parameter in group["params"]]

    @torch.no_grad()
    def write(self) -> None:
        """The model's weights become the copies, rounded once."""
        for parameter, master in self.of.items():
            parameter.copy_(master)

    @torch.no_grad()
    def take(self, masters: Iterable[Tensor]) -> None:
        """The copies' content, in their order, from a checkpoint."""
        for own, saved in zip(self.of.values(), masters, strict=True):
            own.copy_(saved)

    def _take_gradient(self, parameter: Tensor) -> None:
        master = self.of[parameter]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None
