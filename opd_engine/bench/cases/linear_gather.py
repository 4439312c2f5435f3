"""Log-probs and tail at given ids from hidden states and the LM head, forward + backward: three products at least.

Ours computes the logits twice, four products, because its upstream gradient is known only after the whole forward.
What is differentiated is each row's mean of its log-probs and tail. Cut cross-entropy, Megatron's and Liger's fused
linear ones give one log-prob a row and no tail: less work, checked against a definition of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_engine import gather_log_probs, linear_gather_log_probs, linear_topk_log_probs
from opd_engine.bench import reference
from opd_engine.bench.cases import competitors, eager
from opd_engine.bench.cases.linear_inputs import gradients, least_work, loss_truth, make_inputs, workspace_ablations
from opd_engine.bench.cases.workload import Workload
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours at several workspaces, the engine on logits that exist, eager torch, torch.compile, cross-entropies."""
    inputs = make_inputs(shape, device)
    ids = linear_topk_log_probs(inputs.hidden, inputs.weight, shape.k).indices

    def ours(workspace_bytes: int) -> Impl:
        def forward(leaves):
            scores = linear_gather_log_probs(*leaves, ids, workspace_bytes=workspace_bytes)
            losses = (scores.log_probs.sum(-1) + scores.tail_log_prob) / (shape.k + 1)
            return losses.sum(), losses, leaves

        return Impl("opd_engine", forward, gradients, inputs.leaves)

    def through_logits(leaves):
        scores = gather_log_probs(leaves[0] @ leaves[1].t(), ids, inplace_backward=True)
        losses = (scores.log_probs.sum(-1) + scores.tail_log_prob) / (shape.k + 1)
        return losses.sum(), losses, leaves

    def by_torch(formula):
        def forward(leaves):
            losses = formula(leaves[0] @ leaves[1].t(), ids)
            return losses.sum(), losses, leaves

        return forward

    impls = [ours(inputs.workspace_bytes)]
    impls.append(Impl("opd_ablation_through_logits", through_logits, gradients, inputs.leaves))
    absent: dict[str, str] = {}
    if shape.baselines:
        impls += workspace_ablations(shape, device, ours)
        compiled = torch.compile(_means, dynamic=False)
        impls.append(Impl("torch_eager", by_torch(_means), gradients, inputs.leaves))
        impls.append(Impl("torch_compile", by_torch(compiled), gradients, inputs.leaves))
        target = ids[:, 0].contiguous()
        negative = loss_truth(inputs, lambda z, part: -z.log_softmax(-1).gather(-1, target[part, None])[:, 0])
        more, absent = competitors.linear_cross_entropy(device, inputs.leaves, gradients, target, negative.error)
        impls += more

    def definition(z: Tensor, part: slice) -> Tensor:
        scores = reference.scores(z, ids[part])
        return (scores["log_probs"].sum(-1) + scores["tail_log_prob"]) / (shape.k + 1)

    return Workload(impls, loss_truth(inputs, definition).error, *least_work(shape, 3), 1, absent)


def _means(logits: Tensor, ids: Tensor) -> Tensor:
    z = eager.widen(logits)
    lse = torch.logsumexp(z, -1)
    tail = torch.logsumexp(z.scatter(-1, ids, -torch.inf), -1) - lse
    return ((z.gather(-1, ids) - lse.unsqueeze(-1)).sum(-1) + tail) / (ids.size(-1) + 1)
