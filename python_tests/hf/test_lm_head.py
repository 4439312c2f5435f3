"""A head stands apart from its model only where nothing is lost: caps and scales kept, hooks and adapters seen."""

import pytest
import torch
import torch.nn.utils.prune
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.integrations.hf import HFBackend, ProjectingHFBackend, make_backend
from opd_engine.integrations.hf.lm_head import AfterHead, find_after_head
from opd_engine.parallel.tensors import whole_tensor
from opd_engine.parallel.vocab import VocabShard
from ranks import run_ranks
from tiny_models import wide_qwen3

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES = {
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 30.0}, AfterHead(softcap=30.0)),
    "gemma2 low": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 2.0}, AfterHead(softcap=2.0)),
    "granite": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 1.2}, AfterHead(divisor=1.2)),
    "granite near 1": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 1.01}, AfterHead(divisor=1.01)),
    "granite 8": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}, AfterHead(divisor=8.0)),
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.8}, AfterHead(factor=0.8)),
}
SEQUENCES = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
HALVES = (torch.float32, torch.bfloat16, torch.float16)


def model_of(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config, kind, more, _ = FAMILIES[family]
    torch.manual_seed(seed)
    return kind(config(**SHAPE, **more)).to(dtype).eval()


def batch():
    return pack_rollouts([row[:1] for row in SEQUENCES], [row[1:] for row in SEQUENCES])


@torch.no_grad()
def own_logits(model) -> torch.Tensor:
    rows = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in SEQUENCES]
    return torch.cat(rows).double()


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_after_its_head_is_computed(family, dtype):
    model = model_of(family, dtype)
    backend, theirs = make_backend(model), own_logits(model)
    assert isinstance(backend, ProjectingHFBackend) and backend.after == FAMILIES[family][3]
    # The same operations in the same order: a batch beside differs by its products' roundings alone.
    limit = 8 * torch.finfo(dtype).eps * float(theirs.abs().max())
    assert float((backend.logits(batch()).double() - theirs).abs().max()) <= limit
    # Control: without it the logits are others, by far.
    plain = torch.nn.functional.linear(backend.hidden(batch()), model.get_output_embeddings().weight).double()
    assert float((plain - theirs).abs().max()) > limit or family in ("gemma2", "granite near 1")


class Unknown(GraniteForCausalLM):
    """Does after its head, or before it, what no configuration speaks of."""

    after, before = staticmethod(lambda logits: logits), staticmethod(lambda hidden: hidden)

    def forward(self, input_ids, **options):
        hidden = self.before(self.model(input_ids=input_ids, **options).last_hidden_state)
        return CausalLMOutputWithPast(logits=self.after(self.lm_head(hidden)))


def capped(values, cap):
    return torch.tanh(values / cap) * cap


UNKNOWN = {
    "a scale of the logits": {"after": lambda logits: logits * 1.004},
    "a cap of large logits": {"after": lambda logits: capped(logits, 2000.0)},
    "one id that is never written": {"after": lambda logits: logits.index_fill(-1, torch.tensor([3]), -1e4)},
    "a scale of the hidden states": {"before": lambda hidden: hidden * 1.004},
    "a cap of large hidden states": {"before": lambda hidden: hidden.clamp(-50.0, 50.0)},
}


class Adapter(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) + 1.0


def adapted(model):
    head = Adapter(32, 32, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def replaced(model):
    forward = model.forward
    model.forward = lambda *arguments, **options: forward(*arguments, **options)
    return model


def cast(model):
    model.to(torch.bfloat16).lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return model


def untied():
    model = wide_qwen3()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@torch.no_grad()
@pytest.mark.parametrize("change", [adapted, hooked, replaced, cast])
def test_a_head_that_is_more_than_a_product_keeps_the_models_own_forward(change):
    model = change(untied())
    backend = make_backend(model)
    assert type(backend) is HFBackend
    limit = 8 * torch.finfo(next(model.parameters()).dtype).eps * float(own_logits(model).abs().max())
    assert float((backend.logits(batch()).double() - own_logits(model)).abs().max()) <= limit
    with pytest.raises(ValueError, match=r"shard: the head of Qwen3ForCausalLM cannot be split .* run.tp = 1"):
        make_backend(model, shard=VocabShard(0, 32, 32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("what", [None, *UNKNOWN])
def test_what_no_configuration_names_keeps_the_models_own_forward(what, dtype):
    torch.manual_seed(0)
    model = Unknown(GraniteConfig(**SHAPE)).to(dtype).eval()
    for name, function in UNKNOWN.get(what, {}).items():
        setattr(model, name, function)
    assert find_after_head(model) == (AfterHead() if what is None else None)
    assert (type(make_backend(model)) is HFBackend) == (what is not None)
    if what is not None:
        with pytest.raises(ValueError, match="module: the head of Unknown cannot stand apart, since it changes"):
            ProjectingHFBackend(model)


def compiled(model):
    model.model.compile(backend="eager")
    return model


def pruned(model):
    torch.nn.utils.prune.random_unstructured(model.lm_head, "weight", 0.5)
    return model


class Passing(torch.nn.Module):
    """A wrapper that gives out what it does not have of its own, as FSDP and torch.compile do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *arguments, **options):
        output = self.module(*arguments, **options)
        output.logits = output.logits * 2
        return output


def body_wrapped(model):
    model.model = Passing(model.model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("wrap", [compiled, pruned, Passing, body_wrapped, torch.compile])
def test_a_wrapped_model_is_asked_as_a_whole(wrap):
    model = wrap(untied())
    backend = make_backend(model)
    assert type(backend) is HFBackend
    if wrap is Passing:
        assert float((backend.logits(batch()).double() - own_logits(model)).abs().max()) < 1e-4
    with pytest.raises(ValueError, match=r"module: the head of \w+ cannot stand apart, since "):
        ProjectingHFBackend(model)


@pytest.mark.parametrize("change", [adapted, hooked, replaced, compiled, pruned, body_wrapped])
def test_what_is_done_to_a_model_after_its_backend_was_made_is_seen(change):
    model = untied()
    backend = make_backend(model)
    backend.logits(batch())
    change(model)
    with pytest.raises(ValueError, match=r"module: Qwen3ForCausalLM was changed after its backend was made: .* again"):
        backend.logits(batch())


def test_the_head_is_tried_in_eval_mode_and_modes_are_left_as_they_were():
    model = wide_qwen3().train()
    model.model.layers[0].eval()
    assert find_after_head(model) == AfterHead()
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


def test_a_float32_head_on_a_bfloat16_body_is_the_models_own_affair():
    model = untied().to(torch.bfloat16)
    model.lm_head.float()
    backend = make_backend(model)  # the model cannot run either: its own words come when it is used
    assert type(backend) is HFBackend
    with pytest.raises(RuntimeError, match="dtype"):
        backend.logits(batch())


def sharded_soft_cap() -> dict[str, float]:
    """In each rank: every parameter's worst difference between a sharded head's gradient and one process's."""
    from torch.distributed import group

    from opd_engine.integrations.hf.backend import even_shard

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gradients(shard):
        model = model_of("gemma2 low").double()
        logits = make_backend(model, shard=shard).logits(batch())
        weights = torch.randn(logits.shape[0], 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        columns = slice(0, 64) if shard is None else slice(shard.vocab_start_index, shard.vocab_end_index)
        (logits.sin() * weights[:, columns]).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole, sharded = gradients(None), gradients(even_shard(64, group.WORLD, size, rank))
    return {name: float((whole[name] - sharded[name]).abs().max() / whole[name].abs().max()) for name in whole}


@pytest.mark.ranks
def test_a_soft_capped_head_can_be_sharded():
    for errors in run_ranks(__file__, "sharded_soft_cap", 2):
        assert len(errors) > 5 and max(errors.values()) < 1e-12, errors


def two_steps(wrap) -> list[float]:
    """The whole weights' sum after each of two steps of a wrapped model, on each rank's own columns."""
    wrapped = wrap(wide_qwen3())
    backend, sums = make_backend(wrapped), []
    assert type(backend) is HFBackend and backend.vocab_size == 32
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backend.logits(batch())[:, torch.distributed.get_rank()].sum().backward()
        optimizer.step()
        sums.append(sum(float(whole_tensor(p.detach()).double().sum()) for p in wrapped.parameters()))
    return sums


def two_steps_when_wrapped() -> dict[str, list[float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def sharded(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return {"ddp": two_steps(DistributedDataParallel), "fsdp": two_steps(sharded)}


@pytest.mark.ranks
def test_a_model_inside_ddp_or_sharded_by_fsdp_takes_more_than_one_step():
    first, second = run_ranks(__file__, "two_steps_when_wrapped", 2)
    assert first == second and first["ddp"][0] != first["ddp"][1]
    assert first["fsdp"] == pytest.approx(first["ddp"], rel=1e-5)
