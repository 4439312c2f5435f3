"""The reference: Megatron's GPT and the distillation loss as plain float64 torch in one process, nothing of either.

A model is a dict of whole weights under Megatron's names; `forward` is one sequence at a time, without padding, caches
or masks other than the causal one. Gradients come from autograd on these definitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. rotary: rotary positions, else learned ones."""

    hidden: int = 48
    layers: int = 2
    heads: int = 12
    groups: int = 6
    ffn: int = 96
    vocab_size: int = 61
    padded_vocab_size: int = 64
    max_length: int = 64
    tied: bool = True
    rotary: bool = True

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model by Megatron's name, layers numbered through all pipeline stages."""
    h, d = shape.hidden, shape.head_size
    names: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (shape.padded_vocab_size, h)}
    if not shape.rotary:
        names["embedding.position_embeddings.weight"] = (shape.max_length, h)
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}."
        names |= {
            prefix + "input_layernorm.weight": (h,),
            prefix + "self_attention.linear_qkv.weight": ((shape.heads + 2 * shape.groups) * d, h),
            prefix + "self_attention.q_layernorm.weight": (d,),
            prefix + "self_attention.k_layernorm.weight": (d,),
            prefix + "self_attention.linear_proj.weight": (h, shape.heads * d),
            prefix + "pre_mlp_layernorm.weight": (h,),
            prefix + "mlp.linear_fc1.weight": (2 * shape.ffn, h),
            prefix + "mlp.linear_fc2.weight": (h, shape.ffn),
        }
    names["decoder.final_layernorm.weight"] = (h,)
    if not shape.tied:
        names["output_layer.weight"] = (shape.padded_vocab_size, h)
    return names


def make_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Wide random weights, float32: near-uniform logits would pass any test of a loss."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in weight_shapes(shape).items():
        noise = torch.randn(size, generator=generator)
        weights[name] = 1 + 0.1 * noise if "layernorm" in name else 0.25 * noise
    return weights


def double_leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.double().requires_grad_() for name, weight in weights.items()}


def forward(weights: dict[str, Tensor], shape: Shape, tokens: Tensor) -> Tensor:
    """Logits [length, vocab_size] of one sequence over the real vocabulary. tokens: [length] int64."""
    length, d = tokens.numel(), shape.head_size
    table = weights["embedding.word_embeddings.weight"]
    x = table[tokens]
    if not shape.rotary:
        x = x + weights["embedding.position_embeddings.weight"][:length]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    per_group = shape.heads // shape.groups
    for layer in range(shape.layers):
        w = {n.removeprefix(f"decoder.layers.{layer}."): v for n, v in weights.items() if f"layers.{layer}." in n}
        qkv = _norm(x, w["input_layernorm.weight"]) @ w["self_attention.linear_qkv.weight"].t()
        # Per query group: its queries, one key, one value.
        q, k, v = qkv.view(length, shape.groups, (per_group + 2) * d).split([per_group * d, d, d], dim=2)
        q = _norm(q.reshape(length, shape.heads, d), w["self_attention.q_layernorm.weight"])
        k = _norm(k, w["self_attention.k_layernorm.weight"])
        if shape.rotary:
            q, k = _rotate(q), _rotate(k)
        k, v = (part.repeat_interleave(per_group, dim=1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)
        x = x + mixed.reshape(length, -1) @ w["self_attention.linear_proj.weight"].t()
        gate, up = (_norm(x, w["pre_mlp_layernorm.weight"]) @ w["mlp.linear_fc1.weight"].t()).chunk(2, dim=1)
        x = x + (gate * gate.sigmoid() * up) @ w["mlp.linear_fc2.weight"].t()
    head = table if shape.tied else weights["output_layer.weight"]
    return _norm(x, weights["decoder.final_layernorm.weight"]) @ head[: shape.vocab_size].t()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions, half-split, base 10000. x: [length, heads, head_size]."""
    length, _, d = x.shape
    frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angle = torch.outer(torch.arange(length, dtype=x.dtype), frequency)
    angle = torch.cat([angle, angle], 1).unsqueeze(1)
    left, right = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


@dataclass(frozen=True)
class Loss:
    """What the reference computes of a batch.

    support: whose top-k: "student", "teacher" (every teacher of the sample), "union" (all of them) or "rollout"
    mixture: "route" or "arithmetic"
    state_cap: cut of the visited-state weight, or None
    policy: coefficient of the clipped policy gradient
    """

    divergence: str = "reverse_kl"
    support: str = "student"
    mixture: str = "route"
    reduction: str = "token_mean"
    k: int = 8
    temperature: float = 1.0
    state_cap: float | None = None
    policy: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One rollout. mask[i] counts the row that predicts tokens[i + 1]; log_probs[i] is the engine's of that token.

    teacher_prompt: what teachers see in place of the tokens up to the first row that counts
    """

    number: int
    tokens: Tensor
    mask: Tensor
    teachers: tuple[str, ...]
    log_probs: Tensor
    advantage: float
    teacher_prompt: Tensor | None = None


def engine_topk(sample: Sample, width: int = 5) -> Tensor:
    """What the rollout engine says is likeliest, [length, width]: any ids, in some rows fewer, then -1."""
    generator = torch.Generator().manual_seed(1000 + sample.number)
    length = sample.tokens.numel()
    ids = torch.rand(length, 61, generator=generator).argsort(1)[:, :width]
    counts = torch.randint(1, width + 1, (length, 1), generator=generator)
    return ids.where(torch.arange(width) < counts, -1)


def frozen_parts(
    sample: Sample, student: Tensor, teachers: dict[str, Tensor], loss: Loss
) -> tuple[Tensor, list[Tensor]]:
    """(membership of the support [length, vocab] bool, each teacher's log-probs [length, vocab]), before any step."""
    lists = [student] if loss.support in ("student", "union") else []
    if loss.support in ("teacher", "union"):
        lists += [teachers[name] for name in sample.teachers]
    inside = torch.zeros_like(student, dtype=torch.bool)
    if loss.support == "rollout":
        ids = engine_topk(sample)
        inside.scatter_(1, ids.where(ids >= 0, ids[:, :1]), True)  # the first is always there
    for logits in lists:
        inside.scatter_(1, logits.topk(loss.k, dim=1).indices, True)
    return inside, [(teachers[name] / loss.temperature).log_softmax(1) for name in sample.teachers]


def teacher_logits(weights: dict[str, Tensor], shape: Shape, sample: Sample) -> Tensor:
    """A teacher's logits in the sample's rows, from its own prompt where there is one: other positions, same tokens."""
    if sample.teacher_prompt is None or not sample.mask.any():
        return forward(weights, shape, sample.tokens)
    first = int(sample.mask.nonzero()[0])
    seen = forward(weights, shape, torch.cat([sample.teacher_prompt, sample.tokens[first + 1 :]]))
    before = torch.zeros(first, shape.vocab_size, dtype=torch.float64)
    return torch.cat([before, seen[sample.teacher_prompt.numel() - 1 :]])


def row_losses(logits: Tensor, sample: Sample, inside: Tensor, teachers: list[Tensor], loss: Loss) -> Tensor:
    """The loss of every row [length], with the visited-state weight and the policy gradient."""
    q = (logits / loss.temperature).log_softmax(1)
    student = _buckets(q, inside)
    stacked = torch.stack([_buckets(p, inside) for p in teachers])
    teacher = stacked.logsumexp(0) - torch.log(torch.tensor(float(len(teachers)), dtype=torch.float64))
    there = torch.cat([inside, torch.ones_like(inside[:, :1])], 1)
    if loss.divergence == "reverse_kl":
        terms = student.exp() * (student - teacher)
    else:
        terms = teacher.exp() * (teacher - student)
    losses = torch.where(there, terms, 0.0).sum(1)
    following = torch.cat([sample.tokens[1:], sample.tokens[:1]])
    log_ratio = (q.gather(1, following[:, None])[:, 0] - sample.log_probs.double()).where(sample.mask, 0.0)
    if loss.state_cap is not None:
        before = torch.cat([log_ratio.new_zeros(1), log_ratio.detach()[:-1]]).cumsum(0)
        losses = losses * before.exp().clamp(max=loss.state_cap)
    if loss.policy > 0:
        ratio = log_ratio.exp()
        cut = torch.minimum(ratio * sample.advantage, ratio.clamp(0.8, 1.2) * sample.advantage)
        losses = losses - loss.policy * cut
    return losses


def _buckets(log_probs: Tensor, inside: Tensor) -> Tensor:
    """[length, vocab + 1]: log-probs inside the support (0 outside, to be masked), then the log of the rest's mass."""
    tail = log_probs.masked_fill(inside, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.masked_fill(~inside, 0.0), tail], 1)


def row_weights(samples: list[Sample], loss: Loss) -> list[float]:
    """The weight of each sample's rows under the reduction, over the global batch."""
    counts = [int(sample.mask.sum()) for sample in samples]
    with_rows = sum(count > 0 for count in counts)
    if loss.reduction == "token_mean":
        return [1.0 / max(sum(counts), 1)] * len(samples)
    return [1.0 / (count * with_rows) if count else 0.0 for count in counts]


class Reference:
    """The student in float64 and the frozen parts of every sample; `loss` is differentiable in `weights`."""

    def __init__(self, shape, weights, teacher_shape, teacher_weights, samples: list[Sample], loss: Loss):
        self.shape, self.samples, self.definition = shape, samples, loss
        self.weights = double_leaves(weights)
        self.frozen = []
        with torch.no_grad():
            for sample in samples:
                teachers = {
                    name: teacher_logits(double_leaves(teacher_weights[name]), teacher_shape, sample)
                    for name in sample.teachers
                }
                student = forward(self.weights, shape, sample.tokens)
                self.frozen.append(frozen_parts(sample, student, teachers, loss))

    def loss(self, samples: list[Sample] | None = None) -> Tensor:
        """The global batch's loss; samples: of one optimizer step, default all."""
        chosen = self.samples if samples is None else samples
        total = torch.zeros((), dtype=torch.float64)
        for sample, weight in zip(chosen, row_weights(chosen, self.definition)):
            inside, teachers = self.frozen[sample.number]
            logits = forward(self.weights, self.shape, sample.tokens)
            losses = row_losses(logits, sample, inside, teachers, self.definition)
            total = total + weight * losses[sample.mask].sum()
        return total

    def gradients(self, samples: list[Sample] | None = None) -> tuple[float, dict[str, Tensor]]:
        loss = self.loss(samples)
        gradients = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        found = zip(self.weights.items(), gradients)
        return float(loss), {name: torch.zeros_like(w) if g is None else g for (name, w), g in found}

    def sgd(self, lr: float, samples: list[Sample] | None = None) -> None:
        _, gradients = self.gradients(samples)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight -= lr * gradients[name]
