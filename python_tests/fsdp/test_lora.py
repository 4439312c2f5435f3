"""LoRA students: only adapters train and are saved, the base is a teacher without a copy, wrong folders are refused."""

import importlib.util
import json

import pytest
import torch

from fsdp.dense import BOUND, distance, make_model, reference
from fsdp.steps import CONFIG, batch_of_step, local_pool, make_actor, teacher_models, train
from opd_engine.distillation import OPDConfig
from opd_engine.integrations.fsdp import add_adapter, load_adapter, merged
from opd_engine.teachers import TeacherPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
TARGETS = ("q_proj", "v_proj", "down_proj")


def student(tied: bool = False, seed: int = 0):
    """An adapter that already says something: a fresh one is no change, and half of its gradients are none."""
    adapted = add_adapter(make_model(tied=tied, seed=seed), rank=4, alpha=8, targets=TARGETS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted.eval()


def double_scale(adapted):
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2 * value for name, value in module.scaling.items()}


@pytest.fixture(scope="module")
def pool():
    return local_pool(teacher_models())


def test_the_gradient_of_every_adapter_is_the_dense_float64_models(pool):
    loss, truth = reference(student().get_base_model(), teacher_models(), batch_of_step(3), OPDConfig(**CONFIG))
    assert len(truth) == 12 and all("lora_" in name for name in truth)
    for options in ({}, {"workspace_bytes": 732, "max_seqs": 2}):
        actor = make_actor(student(), **options)
        scored = actor.score_rollouts(batch_of_step(3), pool)
        assert abs(actor.accumulate(batch_of_step(3), scored).means()["loss"] / loss - 1) <= BOUND
        assert distance(actor.gradients(), truth) <= BOUND
    twice = student()
    double_scale(twice)
    actor = make_actor(twice)
    actor.accumulate(batch_of_step(3), actor.score_rollouts(batch_of_step(3), pool))
    assert distance(actor.gradients(), truth) > 100 * BOUND, "adapters counted twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_train_and_are_saved_and_resumed(pool, tmp_path, dtype):
    actor = make_actor(student(), dtype=dtype)
    frozen = {name: p.detach().clone() for name, p in actor.model.named_parameters() if "lora_" not in name}
    train(actor, pool, range(2))
    actor.save(tmp_path).wait()
    train(actor, pool, range(2, 4))
    assert all(torch.equal(p, frozen[n]) for n, p in actor.model.named_parameters() if "lora_" not in n)
    resumed = make_actor(student(), dtype=dtype)
    resumed.load(tmp_path)
    train(resumed, pool, range(2, 4))
    assert all(torch.equal(p, resumed.trained[name]) for name, p in actor.trained.items())
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="is of an adapter on another base: wanted content"):
        make_actor(student(seed=1), dtype=dtype).load(tmp_path)


def test_a_checkpoint_is_an_adapter_folder_that_can_teach(pool, tmp_path):
    actor = make_actor(student())
    train(actor, pool, range(1))
    actor.save(tmp_path).wait()
    model = merged(load_adapter(make_model(), tmp_path, trains=False))
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, actor.model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"folder: .* is of another base: wanted content"):
        load_adapter(make_model(seed=1), tmp_path, trains=False)


def test_the_base_teaches_without_a_second_copy():
    actor = make_actor(student())
    teachers = TeacherPool({"base": actor.base_teacher()})
    batch = batch_of_step(3)
    batch.teacher_names = ["base"] * batch.num_seqs
    scored = actor.score_rollouts(batch, teachers)
    plain = local_pool({"base": make_model()})["base"].score(batch, scored.support(batch), temperature=0.9)
    scored_ones = [s for s, rows in enumerate(batch.loss_row_counts().tolist()) if rows]
    part, rows = batch.select(scored_ones), batch.loss_mask
    found = scored.teacher("base", part).log_probs[part.loss_mask]
    torch.testing.assert_close(found, plain.log_probs[rows], rtol=1e-5, atol=1e-5)
    loss, truth = reference(student().get_base_model(), {"base": make_model()}, batch, OPDConfig(**CONFIG))
    assert abs(actor.accumulate(batch, scored).means()["loss"] / loss - 1) <= BOUND
    assert distance(actor.gradients(), truth) <= BOUND
    with pytest.raises(ValueError, match="base_teacher: wanted a student with an adapter"):
        make_actor(make_model()).base_teacher()


def test_what_peft_would_pass_over_is_refused_by_name(tmp_path, pool):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="targets: no module of Qwen3ForCausalLM is called 'w_proj'"):
        add_adapter(make_model(), rank=2, alpha=2, targets=["q_proj", "w_proj"])
    with pytest.raises(ValueError, match=r"targets: wanted none of model\.embed_tokens, lm_head, whose weight is one"):
        add_adapter(make_model(tied=True), rank=2, alpha=2, targets=["lm_head"])
    with pytest.warns(UserWarning):
        on_head = get_peft_model(make_model(tied=True), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="model: target_modules: wanted none of"):
        make_actor(on_head)
    with pytest.raises(ValueError, match="rank: wanted a whole number >= 1, got 0"):
        add_adapter(make_model(), rank=0, alpha=2, targets=TARGETS)
    student().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    wrong = {
        "folder: target_modules: no module of Qwen3ForCausalLM is called 'w_proj'": {"target_modules": ["w_proj"]},
        "is not of this base: it lacks base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": {
            "target_modules": [*TARGETS, "up_proj"]
        },
        "is not of this base: it has unknown base_model": {"target_modules": ["q_proj"]},
        r"lora_A.weight: wanted \[2, 32\], got \[4, 32\]": {"r": 2},
        "modules_to_save: wanted none": {"modules_to_save": ["lm_head"]},
    }
    for words, change in wrong.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=words):
            load_adapter(make_model(), tmp_path, trains=False)
    base = tmp_path / "base"
    make_model(vocab_size=53).save_pretrained(base)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match=r"is of another base, .*: vocab_size there 53, here 61"):
        load_adapter(make_model(), tmp_path, trains=False)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_adapter(make_model(), tmp_path, trains=False)


def test_a_run_takes_an_adapter_folder_as_a_teacher(tmp_path):
    from opd_engine.cli import main
    from tiny_models import wide_qwen3, write_model

    write_model(tmp_path / "student", seed=1)
    write_model(tmp_path / "base", seed=2)
    adapted = add_adapter(wide_qwen3(seed=2), rank=2, alpha=4, targets=TARGETS)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "teacher")
    lines = [json.dumps({"prompt": str(n)}) for n in range(10, 30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    options = {
        "student": tmp_path / "student",
        "teacher": f"t={tmp_path / 'teacher'}",
        "prompts": tmp_path / "prompts.jsonl",
        "run.output_dir": tmp_path / "run",
        "run.quiet": "true",
        "optimizer.steps": 1,
        "rollout.prompts": 4,
        "rollout.max_new_tokens": 3,
        "opd.k": 4,
        "eval.max_prompts": 2,
    }
    assert main(["train", *(str(x) for key, value in options.items() for x in (f"--{key}", value))]) == 0
