"""The `step` case with the models: one OPD step of a student of Qwen3-0.6B's shape, its head's logits made or not.

The student's top-k (one pass), the teacher's scores at those ids (one pass), loss, and the gradient of every parameter
(a pass with recomputed layers and its backward). Ours never has logits; beside it the engine on logits that exist,
eager torch, and the passes of the models alone, which say what share of a step the head and the loss take.

The longest sequence that fits is counted, not run: the same step on tensors without values, its peak of storages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_engine import (
    TokenScores,
    distill_loss,
    gather_log_probs,
    linear_distill_loss,
    linear_gather_log_probs,
    linear_topk_log_probs,
    topk_log_probs,
)
from opd_engine.bench import reference
from opd_engine.bench.cases import eager
from opd_engine.bench.cases.workload import Workload
from opd_engine.bench.logits import checked_rows
from opd_engine.bench.memory import CountedStorages, device_bytes
from opd_engine.bench.shapes import Shape
from opd_engine.bench.timing import Impl
from opd_engine.integrations.hf.models import random_qwen3


@dataclasses.dataclass
class _Step:
    """What one step gave: its ids and teacher, and the gradient of the mean loss where the head begins."""

    hidden: Tensor  # [T, hidden_size]
    teacher: TokenScores | None = None
    losses: Tensor | None = None  # [T]
    loss: Tensor | None = None
    grad_hidden: Tensor | None = None


def build(shape: Shape, device: torch.device) -> Workload:
    """Ours, the engine on logits, eager torch, and the models' passes alone."""
    student, teacher = (random_qwen3(shape.hidden_size, shape.vocab_size, seed=seed) for seed in (0, 1))
    student, teacher = (model.to(device, shape.torch_dtype) for model in (student, teacher))
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(shape.vocab_size, (1, shape.num_tokens), generator=generator).to(device)
    body = _Passes(student, teacher, tokens)
    body.spread_logits()
    impls = _impls(body, shape.k, baselines=shape.baselines)
    for impl in impls:
        impl.extra = functools.partial(_longest, dataclasses.replace(shape, num_tokens=1), impl.name, device)
    return Workload(impls, _error(shape, body, student), *_least_work(shape, student), 1)


@functools.lru_cache
def _longest(shape: Shape, impl_name: str, device: torch.device) -> dict[str, int]:
    budget = device_bytes(device)
    longest = longest_sequence(shape, impl_name, device, budget)
    return {"longest_sequence": longest, "longest_sequence_bytes": budget}


def longest_sequence(shape: Shape, impl_name: str, device: torch.device, budget_bytes: int) -> int:
    """Tokens of the longest sequence whose step stays within the budget, both models' weights included, to 1%."""

    @functools.cache
    def peak(num_tokens: int) -> int:
        return step_peak(dataclasses.replace(shape, num_tokens=num_tokens), impl_name, device)

    low, high = 1, 1_024
    if peak(low) > budget_bytes:
        return 0
    while peak(high) <= budget_bytes:
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        # The peak bends upwards with the length: the chord meets the budget at a length that fits, soon the last.
        guess = low + int((high - low) * (budget_bytes - peak(low)) / (peak(high) - peak(low)))
        for tried in (guess, guess + max(1, guess // 100), (low + high) // 2):
            if low < tried < high:
                low, high = (tried, high) if peak(tried) <= budget_bytes else (low, tried)
    return low


def step_peak(shape: Shape, impl_name: str, device: torch.device) -> int:
    """Bytes that one step holds at most, both models' weights included, counted on tensors without values."""
    with CountedStorages() as counted:
        with torch.device("meta"):
            models = [random_qwen3(shape.hidden_size, shape.vocab_size, seed=seed) for seed in (0, 1)]
        student, teacher = (_without_values(model, device, shape.torch_dtype) for model in models)
        body = _Passes(student, teacher, torch.zeros((1, shape.num_tokens), dtype=torch.int64, device=device))
        impl = next(impl for impl in _impls(body, shape.k, baselines=True) if impl.name == impl_name)
        impl.run(impl.prepare(0))
        return counted.peak_bytes


def _without_values(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.tie_weights()
    return model


def _impls(body: _Passes, k: int, *, baselines: bool) -> list[Impl]:
    student, teacher, num_tokens = body.student, body.teacher, body.tokens.size(1)
    weight = torch.full((num_tokens,), 1 / num_tokens, device=body.tokens.device)

    def without_gradients(number: int) -> int:
        student.zero_grad(set_to_none=True)  # as an optimizer's step leaves them; untimed
        return number

    def ours(_: int) -> _Step:
        with torch.no_grad():
            indices = linear_topk_log_probs(body.frozen(student), body.head(student), k).indices
            scores = linear_gather_log_probs(body.frozen(teacher), body.head(teacher), indices)
        hidden = body.live()
        got = linear_distill_loss(hidden, body.head(student), scores, token_weights=weight)
        return _Step(hidden, scores, got.token_losses, got.loss)

    def on_logits(_: int) -> _Step:
        with torch.no_grad():
            indices = topk_log_probs(body.frozen(student) @ body.head(student).t(), k).indices
            scores = gather_log_probs(body.frozen(teacher) @ body.head(teacher).t(), indices)
        hidden = body.live()
        logits = hidden @ body.head(student).t()
        losses = distill_loss(gather_log_probs(logits, indices, inplace_backward=True), scores)
        return _Step(hidden, scores, losses, (losses * weight).sum())

    def by_torch(_: int) -> _Step:
        with torch.no_grad():
            indices = torch.topk(body.frozen(student) @ body.head(student).t(), k, dim=-1).indices
            scores = eager.gather_scores(body.frozen(teacher) @ body.head(teacher).t(), indices)
        hidden = body.live()
        buckets = torch.cat([scores["log_probs"], scores["tail_log_prob"][:, None]], -1)
        losses = eager.bucket_losses(hidden @ body.head(student).t(), indices, buckets)
        fixed = TokenScores(indices=indices, log_probs=scores["log_probs"], tail_log_prob=scores["tail_log_prob"])
        return _Step(hidden, fixed, losses, (losses * weight).sum())

    def models_alone(_: int) -> _Step:
        with torch.no_grad():
            body.frozen(student), body.frozen(teacher)
        hidden = body.live()
        return _Step(hidden, loss=hidden.sum())

    def backward(step: _Step) -> _Step:
        step.hidden.retain_grad()
        step.loss.backward()
        return dataclasses.replace(
            step, hidden=step.hidden.detach(), loss=step.loss.detach(), grad_hidden=step.hidden.grad
        )

    def impl(name: str, forward: Callable[[int], _Step], **more: Any) -> Impl:
        return Impl(name, forward, backward, prepare=without_gradients, **more)

    impls = [
        impl("opd_engine", ours),
        impl("opd_ablation_through_logits", on_logits),
        impl("opd_ablation_models_alone", models_alone, error=lambda step: _same(step, body)),
    ]
    return [*impls, impl("torch_eager", by_torch)] if baselines else impls


class _Passes:
    """The models without their heads; the student's layers are recomputed in its backward."""

    def __init__(self, student: Any, teacher: Any, tokens: Tensor) -> None:
        student.activation_checkpointing_enable({"use_reentrant": False})
        self.student, self.teacher, self.tokens = student, teacher, tokens
        self.scales = {id(model): 1.0 for model in (student, teacher)}

    def spread_logits(self) -> None:
        """Scale hidden states so that logits have a standard deviation of 3."""
        with torch.no_grad():
            for model in (self.student, self.teacher):
                logits = self.frozen(model)[:4] @ self.head(model).t()
                self.scales[id(model)] = 3 / float(logits.float().std())

    def head(self, model: Any) -> Tensor:
        return model.get_output_embeddings().weight

    def frozen(self, model: Any) -> Tensor:
        model.eval()
        return self._hidden(model)

    def live(self) -> Tensor:
        self.student.train()  # there is no dropout; recomputation of layers is for training alone
        return self._hidden(self.student)

    def _hidden(self, model: Any) -> Tensor:
        causal = {"full_attention": None}  # no [T, T] mask, not even while shapes are traced
        states = model.base_model(input_ids=self.tokens, use_cache=False, attention_mask=causal).last_hidden_state[0]
        return states * self.scales[id(model)]


def _same(step: _Step, body: _Passes) -> float:
    return reference.max_abs_err(step.hidden, body.frozen(body.student).detach())


def _least_work(shape: Shape, student: Any) -> tuple[int, int]:
    """(bytes, flops): both score, the student trains, its backward is two products; nothing is recomputed."""
    parameters, products = sum(parameter.numel() for parameter in student.parameters()), 5
    return products * parameters * shape.itemsize, 2 * products * parameters * shape.num_tokens


def _error(shape: Shape, body: _Passes, student: Any) -> Callable[[_Step], float]:
    """Losses and the gradient of the hidden states, on checked rows, from float64 logits; ids by their logits."""
    rows = checked_rows(shape, shape.hidden_size)

    def error(step: _Step) -> float:
        weight = body.head(student).detach().double().cpu()
        hidden = step.hidden[rows.to(step.hidden.device)].double().cpu()
        z = (hidden @ weight.t()).to(shape.torch_dtype).double().requires_grad_()
        indices = step.teacher.indices[rows.to(step.hidden.device)].cpu()
        fixed = {name: getattr(step.teacher, name).cpu()[rows].double() for name in ("log_probs", "tail_log_prob")}
        losses = reference.bucket_loss(reference.scores(z, indices), fixed)
        (grad,) = torch.autograd.grad(losses.sum(), z)
        worst = reference.max_abs_err(z.detach().gather(-1, indices), z.detach().topk(shape.k, dim=-1).values)
        worst = max(worst, reference.max_abs_err(step.losses.detach().cpu()[rows], losses.detach()))
        truth, got = grad @ weight, step.grad_hidden.cpu()[rows].double() * shape.num_tokens
        return max(worst, reference.max_abs_err(got, truth) / max(1.0, float(truth.abs().max())))

    return error
