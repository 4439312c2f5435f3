"""Other libraries, where they import. All of them are GPU libraries; on a CPU each is reported as absent, with why.

Calls as of liger-kernel 0.8.5, flashinfer-python 0.6.3, quack-kernels 0.6.5, cut-cross-entropy 25.1 and the main branch
of Megatron-LM: megatron-core 0.16.1 has no loss that starts from hidden states, and says so where it is asked for one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from opd_engine.bench.cases import eager
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl

# module to import -> distribution, by the name in records
_DISTRIBUTIONS = {
    "cut_cross_entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "megatron_linear_ce": ("megatron.core.fusions.fused_linear_cross_entropy", "megatron-core"),
    "liger_linear_ce": ("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel"),
    "liger_linear_jsd": ("liger_kernel.ops.fused_linear_jsd", "liger-kernel"),
    "flashinfer": ("flashinfer", "flashinfer-python"),
    "liger": ("liger_kernel.ops.jsd", "liger-kernel"),
    "quack": ("quack.cross_entropy", "quack-kernels"),
    "liger_cross_entropy": ("liger_kernel.ops.cross_entropy", "liger-kernel"),
    "quack_cross_entropy": ("quack.cross_entropy", "quack-kernels"),
}


def find(name: str, device: torch.device) -> tuple[Any, str]:
    """(module or None, its version or why there is none)."""
    module, distribution = _DISTRIBUTIONS[name]
    if device.type != "cuda":
        return None, f"{distribution} needs a CUDA device"
    try:
        return importlib.import_module(module), importlib.metadata.version(distribution)
    except Exception as error:  # a library that fails to import fails in its own way
        return None, f"{distribution} does not import here: {type(error).__name__}: {str(error)[:120]}"


def _present(
    calls: dict[str, Callable[..., Any]], device: torch.device, absent: dict[str, str]
) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """(name, call, module) of those that import; the others go into absent, with the reason."""
    for name, call in calls.items():
        module, why = find(name, device)
        if module is None:
            absent[name] = why
        else:
            yield name, call, module


def topk(
    shape: Shape, device: torch.device, copies: list[Tensor], support_error: Any
) -> tuple[list[Impl], dict[str, str]]:
    """FlashInfer's top_k, with torch for the statistics it does not give; and alone: values and ids, no statistics."""
    module, why = find("flashinfer", device)
    if module is None:
        return [], {"flashinfer": why}

    def alone(logits: Tensor) -> tuple[Tensor, Tensor]:
        return module.top_k(logits, shape.k, sorted=True)

    def forward(logits: Tensor) -> dict[str, Tensor]:
        values, indices = alone(logits)
        z = eager.widen(logits)
        lse = torch.logsumexp(z, -1)
        log_probs = eager.widen(values) - lse[:, None]
        entropy = lse - (torch.softmax(z, -1) * z).sum(-1)
        scores = {"log_probs": log_probs, "tail_log_prob": eager.log_tail(log_probs), "lse": lse, "entropy": entropy}
        return {"indices": indices.long(), **scores}

    # A comparison a logit, and the same values and ids written.
    work = shape.logits_bytes + shape.num_tokens * shape.k * (8 + shape.itemsize), shape.elements
    impls = [Impl("flashinfer", forward, prepare=copies.__getitem__)]
    impls.append(Impl("flashinfer_topk_alone", alone, prepare=copies.__getitem__, error=support_error, least_work=work))
    return impls, {}


def gather(
    shape: Shape, device: torch.device, copies: list[Tensor], indices: Tensor
) -> tuple[list[Impl], dict[str, str]]:
    """QuACK's cross-entropy forward for lse, torch's gather."""
    module, why = find("quack", device)
    if module is None:
        return [], {"quack": why}
    target = torch.zeros(shape.num_tokens, dtype=torch.int64, device=device)

    def forward(logits: Tensor) -> dict[str, Tensor]:
        _, lse = module.cross_entropy_fwd(logits, target, return_lse=True)
        log_probs = eager.widen(logits.gather(-1, indices)) - lse[:, None]
        return {"log_probs": log_probs, "tail_log_prob": eager.log_tail(log_probs), "lse": lse}

    return [Impl("quack", forward, prepare=copies.__getitem__)], {}


def cross_entropy(
    device: torch.device, prepare: Any, restore: Any, backward: Any, target: Tensor, error: Any
) -> tuple[list[Impl], dict[str, str]]:
    """Sum of -log q(target) and its gradient over the logits: Liger's, which knows it in its forward, and QuACK's."""
    calls = {
        "liger_cross_entropy": lambda module, logits: module.LigerCrossEntropyFunction.apply(
            *(logits, target, None, -100, 0.0, 0.0, "sum")
        )[0],
        "quack_cross_entropy": lambda module, logits: module.cross_entropy(
            logits, target, ignore_index=-100, reduction="sum", inplace_backward=True
        ),
    }
    impls, absent = [], {}
    for name, call, module in _present(calls, device, absent):

        def forward(logits: Tensor, module: Any = module, call: Any = call) -> tuple[Tensor, None, Tensor]:
            return call(module, logits), None, logits

        impls.append(Impl(name, forward, backward, prepare, restore, error=error))
    return impls, absent


def full_divergence(
    shape: Shape, device: torch.device, prepare: Any, backward: Any, teacher_logits: Tensor
) -> tuple[list[Impl], dict[str, str]]:
    """Liger's JSD at beta = 1 (its reverse KL); a mean over tokens, so scaled back to a sum."""
    module, why = find("liger", device)
    if module is None:
        return [], {"liger": why}

    def forward(logits: Tensor) -> tuple[Tensor, None, Tensor]:
        log_q = torch.log_softmax(eager.widen(logits), -1)
        log_p = torch.log_softmax(eager.widen(teacher_logits), -1)
        mean = module.LigerJSDFunction.apply(log_q, log_p, None, 1.0, -100)
        return mean * shape.num_tokens, None, logits

    return [Impl("liger", forward, backward, prepare)], {}


def linear_cross_entropy(
    device: torch.device, prepare: Any, backward: Any, target: Tensor, error: Any
) -> tuple[list[Impl], dict[str, str]]:
    """-log q(target) from hidden states and weight: cut cross-entropy, Megatron's and Liger's fused linear ones."""
    calls = {
        "cut_cross_entropy": lambda module, hidden, weight: module.linear_cross_entropy(
            hidden, weight, target, reduction="sum"
        ),
        "megatron_linear_ce": lambda module, hidden, weight: module.linear_cross_entropy(
            hidden, weight, target, reduction="sum"
        ),
        "liger_linear_ce": lambda module, hidden, weight: module.LigerFusedLinearCrossEntropyFunction.apply(
            *(hidden, weight, target, None, None, -100, 0.0, 0.0, "sum")
        ),
    }
    impls, absent = [], {}
    for name, call, module in _present(calls, device, absent):

        def forward(leaves: Any, module: Any = module, call: Any = call) -> tuple[Tensor, None, Any]:
            total = call(module, *leaves)
            return (total[0] if isinstance(total, tuple) else total), None, leaves

        impls.append(Impl(name, forward, backward, prepare, error=error))
    return impls, absent


def linear_jsd(
    shape: Shape, device: torch.device, prepare: Any, backward: Any, teacher_hidden: Tensor, teacher_weight: Tensor
) -> tuple[list[Impl], dict[str, str]]:
    """Liger's fused linear JSD at beta = 1 (its reverse KL); a mean over tokens, so scaled back to a sum."""
    module, why = find("liger_linear_jsd", device)
    if module is None:
        return [], {"liger_linear_jsd": why}

    def forward(leaves: Any) -> tuple[Tensor, None, Any]:
        mean = module.LigerFusedLinearJSDFunction.apply(*leaves, teacher_hidden, teacher_weight, None, 1.0, -100, 1.0)
        return mean * shape.num_tokens, None, leaves

    return [Impl("liger_linear_jsd", forward, backward, prepare)], {}
