"""Where a cell's logits come from: given, or made by an LM head from hidden states; and what is differentiated then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine.check import reference
from opd_engine.check.inputs import VOCAB_SIZE, Inputs, Leaf

SOFTCAP = 10.0  # of the sums on the inputs' grid none comes to lie between two half-precision numbers under it
# What main_grad holds before, which is added to: seen where it is lost, and little enough for float32 to add to.
OLD_MAIN_GRAD = {torch.float64: 1.0, torch.float32: 2.0**-8, torch.bfloat16: 1.0, torch.float16: 1.0}

Written = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class FromLogits:
    """The student's logits, a shard's columns."""

    inplace: bool = False  # the backward writes the gradient over them
    edges: bool = False  # with rows of one id, of few, of equals
    prefix = ""

    def leaves(self, inputs: Inputs) -> dict[str, Leaf]:
        return {"logits": Leaf(inputs.edges if self.edges else inputs.student, "columns")}

    def gradients(self, inputs: Inputs) -> dict[str, str]:
        named = {"d logits": "logits"}
        return {**named, "d logits, written over them": "logits"} if self.inplace else named

    def options(self, inputs: Inputs) -> dict[str, object]:
        return {"inplace_backward": True} if self.inplace else {}

    def arguments(
        self, inputs: Inputs, leaves: dict[str, Tensor], options: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], Written]:
        """(what the function takes first, the gradients that autograd does not return)."""
        if not self.inplace:
            return (leaves["logits"],), {}
        logits = leaves["logits"] * 1  # a leaf is not to be overwritten
        return (logits,), {"d logits, written over them": lambda: logits.detach()}

    def logits(self, inputs: Inputs, leaves: dict[str, Tensor], compute: torch.dtype) -> Tensor:
        """By definition, [T, padded] or [T, vocab_size]."""
        return leaves["logits"]


@dataclass(frozen=True)
class FromHidden:
    """Hidden states and this rank's rows of an LM head."""

    bias: bool = False
    softcap: bool = False
    sequence_parallel: bool = False
    main_grad: bool = False
    grad_scale: bool = False  # main_grad is accumulated in the forward
    prefix = "linear_"

    def leaves(self, inputs: Inputs) -> dict[str, Leaf]:
        leaves = {
            "hidden": Leaf(inputs.hidden, "tokens" if self.sequence_parallel else "all"),
            "weight": Leaf(inputs.weight, "rows"),
        }
        return {**leaves, "bias": Leaf(inputs.bias, "rows")} if self.bias else leaves

    def gradients(self, inputs: Inputs) -> dict[str, str]:
        named = {f"d {leaf}": leaf for leaf in self.leaves(inputs)}
        if self.main_grad:
            del named["d weight"]
            named["d weight, in main_grad"] = "weight"
        return named

    def options(self, inputs: Inputs) -> dict[str, object]:
        # Two chunks or three: of a loss over several shards two are in flight, and a soft-cap needs the logits twice.
        row_bytes = -(-VOCAB_SIZE // inputs.world.world_size) * inputs.dtype.itemsize
        copies = (1 if inputs.world.group is None else 2) * (2 if self.softcap else 1)
        options: dict[str, object] = {"workspace_bytes": (inputs.num_rows // 2 + 1) * copies * row_bytes}
        if self.bias:
            options["bias"] = inputs.bias
        if self.softcap:
            options["logit_softcap"] = SOFTCAP
        if self.sequence_parallel:
            options["sequence_parallel"] = True
        if self.grad_scale:
            options["grad_scale"] = inputs.upstream("loss", torch.empty((), device=inputs.world.device))
        return options

    def arguments(
        self, inputs: Inputs, leaves: dict[str, Tensor], options: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], Written]:
        """(what the function takes first, the gradients that autograd does not return); options get the leaf's bias."""
        if "bias" in options:
            options["bias"] = leaves["bias"]
        if not self.main_grad:
            return (leaves["hidden"], leaves["weight"]), {}
        weight, old = leaves["weight"], OLD_MAIN_GRAD[inputs.dtype]
        weight.main_grad = torch.full_like(weight, old, dtype=inputs.score_dtype)
        return (leaves["hidden"], weight), {"d weight, in main_grad": lambda: weight.main_grad - old}

    def logits(self, inputs: Inputs, leaves: dict[str, Tensor], compute: torch.dtype) -> Tensor:
        """By definition, [T, padded]."""
        softcap = SOFTCAP if self.softcap else None
        return reference.head_logits(
            leaves["hidden"], leaves["weight"], leaves.get("bias"), softcap, inputs.dtype, compute
        )
