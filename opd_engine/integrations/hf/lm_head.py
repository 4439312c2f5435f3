"""Where a causal LM ends in a linear head, and what it does to the logits after: found by trying, not by its name.

A head may be used apart from its model only where nothing of the model is lost by it: no hook, adapter or wrapper, the
hidden states' own dtype, and logits that are the model's to a few roundings on values that would show a cap or a scale.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from opd_engine.parallel.tensors import is_distributed

# As model families name them in their configurations.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "final_logit_soft_cap", "logit_softcap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier_scale", "logits_multiplier")
_DIVISORS = ("logits_scaling", "logit_scaling", "lm_head_divisor")
_PROBE_RANGE = 120.0
"""Values that are put in the place of the head's output: a cap of any size in use, or a scale, shows on them."""


@dataclass(frozen=True)
class AfterHead:
    """What a model does to its head's output, in this order and in its dtype.

    factor, divisor: the logits times or over it; None: not
    softcap: c of c tanh(logits / c); None: not
    """

    factor: float | None = None
    divisor: float | None = None
    softcap: float | None = None

    @property
    def is_scale(self) -> bool:
        """Whether it scales, which a loss from hidden states does not do for it."""
        return self.factor is not None or self.divisor is not None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def reason_to_keep_whole(module: nn.Module) -> str | None:
    """Why the head must not be used apart from the model, as it is now; None where nothing speaks against it.

    Reads no weight: cheap enough for every use.
    """
    find = getattr(module, "get_output_embeddings", None)
    head, body = None if find is None else find(), getattr(module, "base_model", None)
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a plain Linear"
    if not isinstance(body, nn.Module) or body is module:
        return "it has no body apart from its head"
    for name, part in (("the model", module), ("its body", body), ("its head", head)):
        # FSDP2 and torch.compile derive a class of their own; hooks and replaced forwards lie on the instance.
        if type(part).__name__.startswith(("FSDP", "OptimizedModule")):
            return f"{name} is wrapped ({type(part).__name__})"
        if "forward" in part.__dict__ or getattr(part, "_hf_hook", None) is not None:
            return f"{name} has a forward of its own"
        if part is not body and (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks):
            return f"{name} has hooks"
    if parametrize.is_parametrized(head) or is_distributed(head.weight):
        return "its head's weight is parametrized or spread over ranks"
    return None


@torch.no_grad()
def find_after_head(module: nn.Module) -> AfterHead | None:
    """What comes after the head; None where the head must not be used apart from the model, or that is not known.

    Three forwards of four tokens: the model's, the body's, and the model's with known values as its head's output.
    """
    if reason_to_keep_whole(module) is not None:
        return None
    head, was_training = module.get_output_embeddings(), module.training
    modes = [(part, part.training) for part in module.modules()] if was_training else []
    module.eval()
    try:
        seen, whole = _watched(module, head, None)
        body = module.base_model(input_ids=_probe_ids(head), use_cache=False)
        states = getattr(body, "last_hidden_state", None)
        if seen is None or states is None or states.shape != seen[0].shape or states.dtype != head.weight.dtype:
            return None
        if not _agree(states, seen[0]) or whole.shape != seen[1].shape:
            return None
        ramp = torch.linspace(-_PROBE_RANGE, _PROBE_RANGE, whole.numel(), device=whole.device).to(seen[1].dtype)
        ramp = ramp.view(whole.shape)
        _, shown = _watched(module, head, ramp)
        for after in _candidates(module.config.get_text_config()):
            if _agree(after(ramp), shown) and _agree(after(seen[1]), whole):
                return after
    except Exception:  # a model of a kind that cannot even be tried so keeps its own forward, and says so itself
        return None
    finally:
        for part, training in modes:
            part.training = training
    return None


def _candidates(config):
    """What the configuration speaks of, the plainest first."""

    def values(names):
        found = [getattr(config, name, None) for name in names]
        return [None, *(float(v) for v in found if isinstance(v, (int, float)) and not isinstance(v, bool) and v != 0)]

    tried = itertools.product(values(_SOFT_CAPS), values(_FACTORS), values(_DIVISORS))
    for softcap, factor, divisor in sorted(tried, key=lambda three: sum(value is not None for value in three)):
        yield AfterHead(factor, divisor, softcap)


def _probe_ids(head: nn.Linear) -> Tensor:
    return torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]


def _watched(module: nn.Module, head: nn.Linear, put: Tensor | None) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
    """((the head's input, its output), the model's logits); `put` takes the place of the output."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_, inputs, output):
        seen.append((inputs[0], output))
        return put

    handle = head.register_forward_hook(watch)
    try:
        logits = module(input_ids=_probe_ids(head), use_cache=False).logits
    finally:
        handle.remove()
    return (seen[0] if len(seen) == 1 else None), logits


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """To four roundings of the coarser dtype, value by value."""
    if ours.shape != theirs.shape:
        return False
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (ours, theirs))
    ours, theirs = ours.double(), theirs.double()
    return bool(((ours - theirs).abs() <= 4 * eps * theirs.abs() + 1e-30).all())
