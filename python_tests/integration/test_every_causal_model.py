"""Every causal architecture that transformers builds: rollouts and projected logits are the model's own, or refused."""

import warnings

import pytest
import torch

from causal_fidelity import logits_off, padding_off, rollout_gap
from tiny_causal_models import every_causal_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AT_LEAST = 170
NOT_CAUSAL = ("CpmAntForCausalLM", "ProphetNetForCausalLM", "XLNetLMHeadModel")
"""Their logits depend on what follows: no rollout is of their distribution."""


def faults(model) -> list[str]:
    found = []
    gap = rollout_gap(model)
    if not gap < 1e-3:
        found.append(f"rollouts off by {gap:.3g} nats")
    off = padding_off(model)
    if not off < 1e-4:
        found.append(f"a batch of several lengths off by {off:.2g} of the largest logit")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            off = max(logits_off(model.to(dtype)))
        except RuntimeError as error:  # some cannot compute in half precision
            print(f"{type(model).__name__} in {dtype}: {str(error).splitlines()[0]}")
            continue
        if not off <= 8:
            found.append(f"logits off by {off:.1f} roundings of {dtype}")
    return found


def test_rollouts_and_logits_of_every_model_are_its_own_or_refused_by_name():
    torch.set_num_threads(1)
    whole, refused, unbuilt, wrong = [], {}, {}, {}
    for name, model in every_causal_model():
        if isinstance(model, Exception):
            unbuilt[name] = str(model)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if found := faults(model):
                    wrong[name] = found
                else:
                    whole.append(name)
        except ValueError as error:
            assert str(error).startswith(f"rollouts: {name}"), error
            refused[name] = str(error)
    print(f"{len(whole)} whole, refused {refused}, not built here {unbuilt}")
    assert wrong == {}
    assert set(NOT_CAUSAL) <= set(refused)
    assert len(whole) >= AT_LEAST and len(refused) < 10, (len(whole), sorted(refused), sorted(unbuilt))
