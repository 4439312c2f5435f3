"""The transformers actor in one process: gradients against dense float64, precision, checkpoints, refusals."""

import copy
import json

import pytest
import torch

from fsdp.dense import BOUND, distance, make_batch, make_model, reference
from fsdp.steps import CONFIG, batch_of_step, local_pool, make_actor, teacher_models, train
from opd_engine.distillation import OPDConfig
from opd_engine.distillation.actor import Actor

FEW_ROWS = 4 * 61 * 3  # of workspace: logits of three rows
WAYS = {
    "padded": {},
    "packed": {"packed": True},
    "hidden states": {"workspace_bytes": FEW_ROWS},
    "packed hidden states": {"workspace_bytes": FEW_ROWS, "packed": True},
    "few tokens": {"max_tokens": 12},
    "a sequence at a time": {"max_seqs": 1},
    "recomputed": {"recompute": "full"},
}


@pytest.fixture(scope="module")
def teachers():
    return teacher_models()


@pytest.fixture(scope="module")
def pool(teachers):
    return local_pool(teachers)


@pytest.fixture(scope="module")
def truths(teachers):
    known = {}

    def truth(kind, tied, divergence):
        if (kind, tied, divergence) not in known:
            config = OPDConfig(**{**CONFIG, "divergence": divergence})
            known[kind, tied, divergence] = reference(make_model(kind, tied=tied), teachers, batch_of_step(3), config)
        return known[kind, tied, divergence]

    return truth


def accumulated(actor, pool, batch):
    metrics = actor.accumulate(batch, actor.score_rollouts(batch, pool))
    return metrics.means()["loss"], actor.gradients()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_gradient_of_every_parameter_is_the_dense_float64_models(pool, truths, way, tied):
    loss, truth = truths("qwen3", tied, "reverse_kl")
    actor = make_actor(make_model(tied=tied), config={"divergence": "reverse_kl"}, **WAYS[way])
    found, gradients = accumulated(actor, pool, batch_of_step(3))
    assert abs(found - loss) <= BOUND * abs(loss)
    assert distance(gradients, truth) <= BOUND


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_soft_caps_and_learned_positions_are_the_models_own(pool, truths, kind):
    """Gemma 2 caps its logits after the head at 2, which a loss from hidden states does too."""
    loss, truth = truths(kind, False, "forward_kl")
    for options in ({}, {"workspace_bytes": FEW_ROWS}):
        actor = make_actor(make_model(kind), **options)
        assert actor.forward.after.softcap == (2.0 if kind == "gemma2" else None)
        found, gradients = accumulated(actor, pool, batch_of_step(3))
        assert abs(found - loss) <= BOUND * abs(loss)
        assert distance(gradients, truth) <= BOUND


def test_a_head_with_hooks_keeps_the_models_own_forward(pool, truths):
    loss, truth = truths("qwen3", False, "forward_kl")
    model = make_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    actor = make_actor(model)
    assert actor.forward.after is None
    found, gradients = accumulated(actor, pool, batch_of_step(3))
    assert abs(found - loss) <= BOUND * abs(loss) and distance(gradients, truth) <= BOUND


def test_planted_errors_are_a_hundred_times_the_bound(pool, truths):
    _, truth = truths("qwen3", False, "forward_kl")
    _, right = accumulated(make_actor(make_model()), pool, batch_of_step(3))
    assert distance({name: g / 2 for name, g in right.items()}, truth) > 100 * BOUND
    batch = batch_of_step(3)
    batch.loss_mask = batch.loss_mask.roll(1) & (batch.next_tokens() >= 0)
    _, shifted = accumulated(make_actor(make_model()), pool, batch)
    assert distance(shifted, truth) > 100 * BOUND, "rows off by one"
    forgotten = make_actor(make_model(), max_seqs=1)
    forgotten.forward.packed = False
    batch = batch_of_step(3)
    _, part = accumulated(forgotten, pool, batch.select(range(batch.num_seqs - 1)))
    assert distance(part, truth) > 100 * BOUND, "a micro-batch left out"


def test_a_planted_attention_across_packed_sequences_is_seen(pool):
    """A model that ignores where sequences begin is padded, and refused where packing is demanded."""
    model = make_model("gpt2")
    plain = model.transformer.h[0].attn.forward
    model.transformer.h[0].attn.forward = lambda *args, **kw: plain(*args, **{**kw, "attention_mask": None})
    with pytest.raises(ValueError, match=r"packed: GPT2LMHeadModel .* change each other; wanted packed=False"):
        make_actor(model, packed=True)


# ---- precision -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def changes(pool):
    """dtype -> name -> what twenty steps at 1e-5 changed, in a model whose half forward is not all noise."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = make_model(std=0.05)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        actor = make_actor(model, lr=1e-5, dtype=dtype)
        train(actor, pool, range(20))
        found[dtype] = {name: p.detach().float() - before[name] for name, p in actor.trained.items()}
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_the_weights_as_float32_does(changes, dtype):
    """As far, within 10% of the norm in 95% of the tensors, and where to: Adam's signs leave no more to compare."""
    exact = changes[torch.float32]
    far = {name: abs(float(change.norm() / exact[name].norm()) - 1) for name, change in changes[dtype].items()}
    assert sum(distance <= 0.1 for distance in far.values()) >= 0.95 * len(far), far
    for name, change in changes[dtype].items():
        assert float((change * exact[name]).sum() / change.norm() / exact[name].norm()) > 0.95, name


def test_weights_kept_in_bfloat16_would_not_move(pool, changes):
    """The planted error: the same gradients stepped on bfloat16 weights; no tensor moves as far as it should."""
    model = make_model(std=0.05)
    actor = make_actor(model, dtype=torch.bfloat16)
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    direct = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    for step in range(20):
        batch = batch_of_step(step)
        actor.accumulate(batch, actor.score_rollouts(batch, pool))
        for parameter, master in actor.masters.of.items():
            parameter.grad = master.grad.to(parameter.dtype)
        direct.step()
        actor.weights.accept_live()
    exact = changes[torch.float32]
    moved = {name: float((p.detach().float() - before[name]).norm()) for name, p in model.named_parameters()}
    assert all(norm < 0.5 * float(exact[name].norm()) for name, norm in moved.items()), moved


def test_a_half_model_computes_in_half_and_trains_in_float32():
    model = make_model()
    actor = make_actor(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in actor.trained.values()} == {torch.float32}
    stepped = {id(p) for group in actor.optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in actor.trained.values()}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    given_half = make_actor(make_model().to(torch.bfloat16))
    assert {p.dtype for p in given_half.trained.values()} == {torch.float32}


def test_the_bytes_of_a_parameter_are_what_the_docs_say(pool):
    """docs/fsdp.md: 18 in half precision (2 + 4 + 4 + 8), 16 in float32."""
    for dtype, expected in ((torch.bfloat16, 18), (torch.float32, 16)):
        model = make_model()
        actor = make_actor(model, dtype=dtype)
        train(actor, pool, range(1))
        held = {id(p): p for p in (*model.parameters(), *actor.trained.values())}
        tensors = [*held.values(), *(p.grad for p in held.values() if p.grad is not None)]
        tensors += [s for state in actor.optimizer.state.values() for s in state.values() if s.dim()]
        total = sum(t.numel() * t.element_size() for t in tensors)
        assert total == expected * sum(p.numel() for p in model.parameters())


def test_float16_halves_its_scale_and_goes_on(pool):
    actor = make_actor(make_model(), lr=1e-4, dtype=torch.float16)
    actor.scale.value = 2.0**40
    reports = train(actor, pool, range(50))
    taken = [report.update_successful for report in reports]
    assert not taken[0] and actor.skipped_steps == taken.count(False) >= 1
    assert all(taken[-10:]) and all(p.isfinite().all() for p in actor.trained.values())
    assert actor.scale.value == 2.0 ** (40 - actor.skipped_steps)


def test_a_gradient_that_is_not_finite_leaves_the_weights(pool):
    actor = make_actor(make_model())
    before = {name: p.detach().clone() for name, p in actor.trained.items()}
    batch = batch_of_step(0)
    scored = actor.score_rollouts(batch, pool)
    hook = actor.model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    report = actor.train_step(batch, scored)
    hook.remove()
    assert not report.update_successful and actor.skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in actor.trained.items())


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resumed_actor_continues_bit_for_bit(pool, tmp_path, dtype):
    whole = make_actor(make_model(), dtype=dtype)
    train(whole, pool, range(2))
    pending = whole.save(tmp_path)
    train(whole, pool, range(2, 4))  # while it is being written
    pending.wait()
    assert pending.is_done()
    resumed = make_actor(make_model(seed=9), dtype=dtype)
    resumed.load(tmp_path)
    train(resumed, pool, range(2, 4))
    assert all(torch.equal(p, resumed.trained[name]) for name, p in whole.trained.items())
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert (resumed.steps, resumed.scale.value) == (4, whole.scale.value)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_the_weights_as_they_are_trained(pool, tmp_path, tied):
    from transformers import AutoModelForCausalLM

    actor = make_actor(make_model(tied=tied), dtype=torch.bfloat16)
    train(actor, pool, range(1))
    actor.save(tmp_path).wait()
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in actor.trained.items())


def test_weights_that_are_not_finite_are_never_written(pool, tmp_path):
    actor = make_actor(make_model())
    train(actor, pool, range(2))
    with torch.no_grad():
        actor.trained["model.norm.weight"][3] = float("inf")
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight are not finite \(NaN or infinite\) after 2 steps; nothing is written"
    ):
        actor.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused_by_name(pool, tmp_path):
    actor = make_actor(make_model())
    actor.save(tmp_path).wait()
    with pytest.raises(ValueError, match=r"of another model: model.embed_tokens.weight: wanted shape \[53, 32\]"):
        make_actor(make_model(vocab_size=53)).load(tmp_path)
    with pytest.raises(ValueError, match=r"of another model: it also has lm_head\.weight"):
        make_actor(make_model(tied=True)).load(tmp_path)
    values = json.loads((tmp_path / "actor.json").read_text())
    assert values["steps"] == 0
    (tmp_path / "actor.json").unlink()
    with pytest.raises(ValueError, match=r"wanted a checkpoint with actor\.json"):
        actor.load(tmp_path)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_it_is_an_actor_and_says_what_it_can_do():
    actor = make_actor(make_model())
    assert isinstance(actor, Actor)
    assert actor.capabilities.actor == "transformers" and actor.capabilities.chunked_head


def test_what_cannot_work_is_refused_by_name(pool):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    from opd_engine.integrations.fsdp import FSDPActor

    config = OPDConfig(**CONFIG)
    refused = {
        "k: wanted at most": {"config": OPDConfig(k=62)},
        "optimizer: wanted every parameter that requires grad, lacks lm_head.weight": {
            "optimizer": torch.optim.AdamW([p for n, p in model.named_parameters() if n != "lm_head.weight"])
        },
        "optimizer: wanted the model's parameters alone": {
            "optimizer": torch.optim.AdamW([*model.parameters(), torch.nn.Parameter(torch.ones(1))])
        },
        "recompute: wanted one of none, full": {"recompute": "selective"},
        "clip: wanted a number >= 0": {"clip": -1.0},
        "offload: wanted a mesh": {"offload": True},
    }
    for words, given in refused.items():
        options = {"optimizer": optimizer, "config": config, **given}
        with pytest.raises(ValueError, match=words):
            FSDPActor(model, options.pop("optimizer"), options.pop("config"), **options)
    hooked = make_model()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    told = "workspace_bytes: the LM head of Qwen3ForCausalLM cannot be used apart, since its head has hooks; wanted"
    with pytest.raises(ValueError, match=told):
        make_actor(hooked, workspace_bytes=FEW_ROWS)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="model: wanted a parameter that requires grad"):
        FSDPActor(frozen, optimizer, config)
    stepped = make_model()
    used = torch.optim.AdamW(stepped.parameters())
    stepped.lm_head.weight.grad = torch.ones_like(stepped.lm_head.weight)
    used.step()
    with pytest.raises(ValueError, match="optimizer: wanted one that has not stepped yet"):
        FSDPActor(stepped, used, config, dtype=torch.bfloat16)


def test_an_empty_share_makes_a_step_of_zero_gradients(pool):
    actor = make_actor(make_model())
    empty = make_batch(2).select([])
    report = actor.train_step(empty, actor.score_rollouts(empty, pool))
    assert report.update_successful and report.grad_norm == 0.0


def test_a_pickle_among_the_files_is_not_run(pool, tmp_path):
    import pickle

    actor = make_actor(make_model())
    actor.save(tmp_path).wait()
    (tmp_path / "training_state" / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match=r"wanted the contents of a checkpoint, got builtins\.print"):
        actor.load(tmp_path)
