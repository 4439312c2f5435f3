"""A head stands apart from its model only where nothing is lost: caps and scales kept, hooks and adapters seen."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.integrations.hf import HFBackend, ProjectingHFBackend, make_backend
from opd_engine.integrations.hf.lm_head import AfterHead, find_after_head
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
    assert float((plain - theirs).abs().max()) > limit or family == "gemma2"


class Unknown(Gemma2ForCausalLM):
    """Does after its head what no configuration speaks of."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 1.01
        return output


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


def test_a_post_processing_that_no_configuration_names_keeps_the_models_own_forward():
    torch.manual_seed(0)
    model = Unknown(Gemma2Config(**SHAPE)).eval()
    assert find_after_head(model) is None and type(make_backend(model)) is HFBackend


@pytest.mark.parametrize("change", [adapted, hooked, replaced])
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


def two_steps_under_ddp() -> list[float]:
    """The weights' sum after each of two steps of a model inside DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(wide_qwen3())
    backend, sums = make_backend(wrapped), []
    assert type(backend) is HFBackend and backend.vocab_size == 32
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backend.logits(batch())[:, torch.distributed.get_rank()].sum().backward()
        optimizer.step()
        sums.append(sum(float(parameter.detach().double().sum()) for parameter in wrapped.parameters()))
    return sums


@pytest.mark.ranks
def test_a_model_inside_ddp_takes_more_than_one_step():
    first, second = run_ranks(__file__, "two_steps_under_ddp", 2)
    assert first == second and first[0] != first[1]
