"""Teachers with settings of their own, mixed and routed, from the command line to the first step's loss."""

import json
import shutil

import pytest
import torch

from opd_engine.cli import main
from opd_engine.train import loop
from opd_engine.train.examples.arithmetic import make_tokenizer
from opd_engine.train.journal import read_metrics
from tiny_models import write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teachers")
    for name, seed in (("student", 1), ("a", 2), ("b", 3)):
        write_model(folder / name, seed=seed)
    return folder


def first_step(folder, run, *more, tables="", teacher="all"):
    """The first step's record, the first evaluation's, and what was packed."""
    run = f"run_{run}"
    lines = [{"prompt": f"{i}+{i}=", "teacher": teacher} for i in range(8)]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.toml").write_text(tables)
    shutil.rmtree(folder / run, ignore_errors=True)
    arguments = ["train", str(folder / "run.toml"), "--student", str(folder / "student"), "--run.quiet"]
    for name in "ab":
        arguments += ["--teacher", f"{name}={folder / name}"]
    arguments += ["--prompts", str(folder / "p.jsonl"), "--data.held_out", "0.25", "--output-dir", str(folder / run)]
    arguments += ["--optimizer.steps", "1", "--rollout.prompts", "4", "--rollout.max_new_tokens", "4", "--opd.k", "8"]
    packed, pack = [], loop.pack_rollouts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "pack_rollouts", lambda *a, **k: packed.append(pack(*a, **k)) or packed[-1])
        assert main([*arguments, *more]) == 0
    records = read_metrics(folder / run / "metrics.jsonl")
    train = next(record for record in records if record["kind"] == "train")
    return train, next(record for record in records if record["kind"] == "eval"), packed[0]


def test_each_mixture_gives_another_loss_than_routing_and_weights_count(models):
    losses = {}
    for mixture in ("arithmetic", "geometric", "loss_sum"):
        record, _, packed = first_step(models, mixture, "--opd.mixture", mixture)
        assert packed.teacher_names == [("a", "b")] * 4
        losses[mixture] = record["loss"]
    weights = "[teachers.a]\npath = 'x'\nweight = 0\n"
    losses["b alone"] = first_step(models, "weights", "--opd.mixture", "loss_sum", tables=weights)[0]["loss"]
    routed = {name: first_step(models, name, teacher=name)[0]["loss"] for name in "ab"}
    assert len({round(value, 6) for value in [*losses.values(), *routed.values()]}) == 5
    assert losses["b alone"] == pytest.approx(routed["b"], rel=1e-5)
    # The same rollouts, divergences of each teacher: their sum by equal weights is the mean of the two.
    assert losses["loss_sum"] == pytest.approx((routed["a"] + routed["b"]) / 2, rel=1e-5)


def test_a_prefix_is_seen_by_its_teacher_alone_and_a_dtype_is_its_own(models):
    plain, before, packed = first_step(models, "plain", teacher="a")
    assert packed.teacher_prompts is None
    prefixed, after, packed = first_step(
        models, "prefixed", teacher="a", tables="[teachers.a]\npath = 'x'\nprompt_prefix = '7-'\n"
    )
    tokenizer = make_tokenizer()
    own, seen = packed.tokens[: int(packed.cu_seqlens[1])].tolist(), packed.teacher_prompts[0].tolist()
    assert tokenizer.decode(seen).startswith("7-") and own[: len(seen) - 2] == seen[2:]
    assert abs(prefixed["loss"] - plain["loss"]) > 1e-3
    assert abs(after["forward_kl/a"] - before["forward_kl/a"]) > 1e-3
    half, _, _ = first_step(models, "half", teacher="a", tables="[teachers.a]\npath = 'x'\ndtype = 'bfloat16'\n")
    assert 1e-7 < abs(half["loss"] / plain["loss"] - 1) < 0.1
