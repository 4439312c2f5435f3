"""Top-k, lse, entropy and tail from hidden states and the LM head: one product, the logits a chunk at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from opd_engine import linear_topk_log_probs, topk_log_probs
from opd_engine.bench.cases import eager
from opd_engine.bench.cases.linear_inputs import float64_logits, least_work, make_inputs, workspace_ablations
from opd_engine.bench.cases.workload import Workload, topk_error
from opd_engine.bench.logits import checked_rows
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours at several workspaces, the engine on logits that exist, eager torch, torch.compile."""
    inputs = make_inputs(shape, device)
    hidden, weight = inputs.hidden, inputs.weight

    def ours(workspace_bytes: int) -> Impl:
        call = partial(linear_topk_log_probs, hidden, weight, shape.k, workspace_bytes=workspace_bytes)
        return Impl("opd_engine", lambda _: call())

    def through_logits(_: int) -> dict[str, Tensor]:
        return topk_log_probs(hidden @ weight.t(), shape.k)

    impls = [ours(inputs.workspace_bytes), Impl("opd_ablation_through_logits", through_logits)]
    if shape.baselines:
        impls += workspace_ablations(shape, device, ours)
        compiled = torch.compile(eager.topk_scores, dynamic=False)
        for name, formula in (("torch_eager", eager.topk_scores), ("torch_compile", compiled)):
            impls.append(Impl(name, lambda _, formula=formula: formula(hidden @ weight.t(), shape.k)))
    truth = float64_logits(inputs, checked_rows(shape).to(device)).cpu()
    return Workload(impls, topk_error(shape, truth), *least_work(shape, 1), 1)
