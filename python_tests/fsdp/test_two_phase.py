"""Student and teachers in turns: the same gradients and steps, never two of them in memory, measured on the host."""

import json
import subprocess
import sys

import pytest
import torch

from fsdp.steps import TEACHERS, batch_of_step, local_pool, make_actor, make_model, teacher_models, train
from opd_engine.teachers import TeacherPool
from ranks import ROOT, python_environment


def in_turns(actor, dtype=None) -> TeacherPool:
    return TeacherPool({name: actor.teacher(make_model(seed=seed), dtype=dtype) for name, seed in TEACHERS.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_steps_in_turns_are_the_same_bits(dtype, tied):
    plain, turned = (make_actor(make_model(tied=tied), dtype=dtype, two_phase=flag) for flag in (False, True))
    pools = [in_turns(actor) for actor in (plain, turned)]
    for actor, pool in zip((plain, turned), pools, strict=True):
        train(actor, pool, range(3))
    turned.weights.check_content("a look")
    assert all(torch.equal(p, turned.trained[name]) for name, p in plain.trained.items())


def test_only_one_model_is_there_while_any_runs():
    actor = make_actor(make_model(), two_phase=True)
    pool, seen = in_turns(actor), []
    models = {"student": actor.model} | {name: pool[name].module for name in pool}

    def here(running):
        def look(*_):
            sizes = {name: sum(p.untyped_storage().nbytes() for p in m.parameters()) for name, m in models.items()}
            seen.append((running, [name for name, size in sizes.items() if size]))

        return look

    for name, model in models.items():
        model.model.register_forward_hook(here(name))
    train(actor, pool, range(2))
    assert {running for running, _ in seen} == set(models)
    assert all(there == [running] for running, there in seen), seen


def test_an_exception_in_a_teachers_turn_leaves_the_student_whole():
    actor = make_actor(make_model(), two_phase=True)
    pool = in_turns(actor)
    train(actor, pool, range(1))
    before = {name: p.detach().clone() for name, p in actor.trained.items()}
    pool["b"].module.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        actor.score_rollouts(batch_of_step(1), pool)
    assert pool["b"].module.lm_head.weight.untyped_storage().nbytes() == 0
    actor.weights.check_content("a look")
    assert all(torch.equal(p, before[name]) for name, p in actor.trained.items())


def test_checkpoints_go_on(tmp_path):
    actor = make_actor(make_model(), two_phase=True)
    pool = in_turns(actor)
    train(actor, pool, range(1))
    actor.score_rollouts(batch_of_step(1), pool)  # the student is away now
    actor.save(tmp_path).wait()
    resumed = make_actor(make_model(seed=9), two_phase=True)
    resumed.load(tmp_path)
    assert all(torch.equal(p, resumed.trained[name]) for name, p in actor.trained.items())


def test_a_teacher_that_stays_is_refused_by_name():
    actor = make_actor(make_model(), two_phase=True)
    with pytest.raises(ValueError, match="two_phase: teacher 'a' stays on the device, a LocalTeacher"):
        actor.score_rollouts(batch_of_step(0), local_pool(teacher_models()))


def test_resident_memory_holds_one_model_at_a_time():
    """In a process of its own: three models of 46 MB; the student has its moments and gradients beside its weights."""
    found, steady = {}, python_environment(MALLOC_MMAP_THRESHOLD_=65536)  # what is freed goes back at once
    for way in ("all", "two_phase"):
        command = [sys.executable, "-m", "fsdp.phase_memory", way]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=steady, timeout=120)
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout.splitlines()[-1])
    weights = found["all"]["weights"]
    saved = {name: (found["all"][name] - found["two_phase"][name]) / weights for name in ("student", "teacher")}
    # Training: two teachers are away. Scoring: a teacher, the student and its two moments are.
    assert saved["student"] > 1.5 and saved["teacher"] > 3, (saved, found)
