"""Where a causal LM ends in a linear head, and what it does to the logits after: found by trying, not by its name.

A head may be used apart from its model only where nothing of the model is lost by it: no hook, adapter or wrapper, the
hidden states' own dtype, and the model's own logits on values that would show a cap or a scale, on either side of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from opd_engine.parallel.tensors import is_distributed

# As model families name them in their configurations.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "final_logit_soft_cap", "logit_softcap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier_scale", "logits_multiplier")
_DIVISORS = ("logits_scaling", "logit_scaling", "lm_head_divisor")
_PROBE_OCTAVES = (-8.0, 12.0)
"""Powers of two of the values put in the place of hidden states and logits: a cap of any size in use shows on them."""


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
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):  # DDP, FSDP, torch.compile and peft pass on what they do not have
        return f"it is wrapped ({type(module).__name__})"
    head, body = module.get_output_embeddings(), module.base_model
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a plain Linear"
    if body is module:
        return "it has no body apart from its head"
    for name, part in (("the model", module), ("its body", body), ("its head", head)):
        # FSDP2 derives a class of its own; hooks, replaced forwards and compiled calls lie on the instance.
        if type(part).__name__.startswith("FSDP") or (part is body and not isinstance(part, PreTrainedModel)):
            return f"{name} is wrapped ({type(part).__name__})"
        if "forward" in part.__dict__ or getattr(part, "_hf_hook", None) is not None:
            return f"{name} has a forward of its own"
        if getattr(part, "_compiled_call_impl", None) is not None:
            return f"{name} is compiled"
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if part is not body and any(hooks):
            return f"{name} has hooks"
    if parametrize.is_parametrized(head) or is_distributed(head.weight):
        return "its head's weight is parametrized or spread over ranks"
    return None


@torch.no_grad()
def find_after_head(module: nn.Module) -> AfterHead | None:
    """What comes after the head; None where the head must not be used apart from the model, or that is not known.

    Forwards of four tokens: the body's, the model's, and the model's with known values in the place of the body's and
    the head's output, in the head's dtype and, since a scale near 1 hides in half precision, in float32.
    """
    if reason_to_keep_whole(module) is not None:
        return None
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        return _found(module, module.get_output_embeddings())
    except Exception:  # a model of a kind that cannot even be tried so keeps its own forward, and says so itself
        return None
    finally:
        for part, training in modes:
            part.training = training


def _found(module: nn.Module, head: nn.Linear) -> AfterHead | None:
    apart = module.base_model(input_ids=_probe_ids(head), use_cache=False).last_hidden_state
    plain = _Seen(module, head)
    if len(plain.heads) != 1 or plain.hidden.dtype != head.weight.dtype or apart.shape != plain.hidden.shape:
        return None
    # Inside one forward nothing may happen to the hidden states; alone, the body may add up in another order.
    if not torch.equal(apart if plain.body is None else plain.body, plain.hidden):
        return None
    if float((apart - plain.hidden).abs().max()) > 64 * torch.finfo(apart.dtype).eps * float(apart.abs().max()):
        return None
    shown = [plain]
    for dtype in dict.fromkeys((head.weight.dtype, torch.float32)):
        hidden, logits = _wide(plain.hidden, head.weight.dtype), _wide(plain.output, dtype)
        shown.append(_Seen(module, head, hidden if plain.body is not None else None, logits))
        if plain.body is not None and not torch.equal(shown[-1].hidden, hidden):
            return None
    for after in _candidates(module.config.get_text_config()):
        if all(_agree(after, seen.output, seen.logits) for seen in shown):
            return after
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


def _wide(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of both signs and of every magnitude, each of its own, none of them 0."""
    low, high = _PROBE_OCTAVES
    values = torch.linspace(low, high, like.numel(), dtype=torch.float64, device=like.device).exp2()
    return (values * (torch.arange(like.numel(), device=like.device) % 2 * 2 - 1)).to(dtype).view(like.shape)


class _Seen:
    """What one forward of a model shows; hidden, logits take the place of the body's and the head's output.

    body: the body's last hidden states, None where the model does not call its body as a whole
    hidden: the head's input; output: the head's; logits: the model's
    """

    def __init__(
        self, module: nn.Module, head: nn.Linear, hidden: Tensor | None = None, logits: Tensor | None = None
    ) -> None:
        self.body: Tensor | None = None
        self.heads: list[tuple[Tensor, Tensor]] = []

        def at_body(_, inputs, output):
            if hidden is not None:
                output.last_hidden_state = hidden
            self.body = output.last_hidden_state
            return output

        def at_head(_, inputs, output):
            self.heads.append((inputs[0], output if logits is None else logits))
            return logits

        handles = [module.base_model.register_forward_hook(at_body), head.register_forward_hook(at_head)]
        try:
            self.logits = module(input_ids=_probe_ids(head), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        self.hidden, self.output = self.heads[0]


def _agree(after: Callable[[Tensor], Tensor], output: Tensor, theirs: Tensor) -> bool:
    """Value by value: the same bits where nothing comes after the head, else to two roundings of the coarser dtype."""
    ours = after(output)
    if ours.shape != theirs.shape:
        return False
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (ours, theirs))
    if after == AfterHead():
        return torch.equal(ours.to(theirs.dtype), theirs)
    ours, theirs = ours.double(), theirs.double()
    return bool(((ours == theirs) | ((ours - theirs).abs() <= 2 * eps * theirs.abs() + 1e-30)).all())
