"""A Megatron run continues from its checkpoints: killed ten times in a row, on other ranks, or told why it cannot."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from opd_engine.train.checkpoint import list_checkpoints
from opd_engine.train.journal import read_metrics, without_measurements
from ranks import ROOT, free_port

pytest.importorskip("megatron.core", reason="megatron-core is not installed (the [megatron] extra)")
from megatron_actor.forked_ranks import EXAMPLE, Nursery

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
STEPS = 24
FLAGS = [
    *("--data.task", "arithmetic", "--data.mixing", "equal", "--run.threads", "1", "--run.quiet"),
    *("--arithmetic.teacher.steps", "6", "--arithmetic.student.steps", "3", "--arithmetic.operand_end", "12"),
    *("--arithmetic.model.hidden_size", "32", "--arithmetic.model.feed_forward_size", "64"),
    *("--opd.divergence", "jsd", "--opd.k", "4", "--opd.optimizer_steps_per_rollout", "2", "--optimizer.lr", "2e-3"),
    *("--rollout.prompts", "8", "--rollout.max_new_tokens", "3", "--optimizer.steps", str(STEPS)),
    *("--eval.every", "8", "--eval.max_prompts", "4", "--checkpoint.every", "2", "--checkpoint.keep", "2"),
    *("--run.timeout_s", "60"),
]


def flags(folder, name, *more) -> list[str]:
    places = ["--run.output_dir", str(folder / name), "--arithmetic.cache_dir", str(folder / "cache")]
    return [*FLAGS, *places, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def nursery(folder):
    nursery = Nursery(folder)
    yield nursery
    nursery.close()


def finished(nursery, ranks, *arguments) -> None:
    started = nursery.start(ranks, free_port(), *arguments)
    try:
        assert started.wait() == [0] * ranks, started.said()
    finally:
        started.end()


@pytest.fixture(scope="module")
def undisturbed(folder, nursery):
    finished(nursery, 2, *flags(folder, "whole", "--tp", "2", "--checkpoint.keep", "100"))
    return folder / "whole"


def comparable(run) -> list[dict]:
    """The records as they are written ("nan" is equal to "nan"), without times and memory."""
    return [without_measurements(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_tensors(run, folder) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint, by name, of whatever layout: weights and the optimizer's."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(list_checkpoints(run / "checkpoints")[-1][1], folder / "whole.pt")
    found = torch.load(folder / "whole.pt", weights_only=False)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def check_same_run(run, whole, folder) -> None:
    assert comparable(run) == comparable(whole)
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    ours, theirs = (last_tensors(one, folder) for one in (run, whole))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    samples = [(one / "samples.jsonl").read_text() for one in (run, whole)]
    assert samples[0] == samples[1]


def lines(run) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def more_lines(run, count: int):
    goal = lines(run) + count
    return lambda: lines(run) >= goal


def half_written(run) -> list:
    return list(run.glob("checkpoints/.writing-*"))


def until(condition, started, what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert started.running(), f"ended before {what}: {started.said()}"
        assert time.monotonic() < deadline, f"no {what}: {started.said()}"
        time.sleep(0.005)


def test_a_run_killed_ten_times_ends_as_one_undisturbed(undisturbed, nursery, folder, capsys):
    """Every rank, one rank, or either while a checkpoint is being written; the next start follows at once."""
    chance, run, left = random.Random(7), folder / "killed", []
    kinds = ["every rank", "one rank", "every rank, saving", "one rank, saving", "every rank"] * 2
    chance.shuffle(kinds)
    told = []
    try:
        for kind in kinds:
            started = nursery.start(2, free_port(), *flags(folder, "killed", "--tp", "2"))
            left.append(started)
            newest = max([step for step, _ in list_checkpoints(run / "checkpoints")], default=0)
            until(lambda: (run / "metrics.jsonl").is_file() and not half_written(run), started, "start")
            if "saving" in kind:
                until(lambda: half_written(run), started, "checkpoint")
            else:
                until(more_lines(run, chance.randint(1, 5)), started, "step")
            time.sleep(chance.uniform(0.0, 0.15))
            victims = (0, 1) if "every" in kind else (chance.randint(0, 1),)
            unfinished = len(half_written(run))
            started.kill(*victims)
            codes = started.wait()
            assert 0 not in codes and all(codes[victim] == -signal.SIGKILL for victim in victims)
            told.append(f"{kind}: from step {newest}, at line {lines(run)}, {unfinished} unfinished")
            for earlier in left[:-1]:
                earlier.end()
        finished(nursery, 2, *flags(folder, "killed", "--tp", "2"))
    finally:
        for started in left:
            started.end()
    with capsys.disabled():
        print("", *told, sep="\n")
    assert sum("1 unfinished" in line for line in told) >= 4
    check_same_run(run, undisturbed, folder)
    assert not half_written(run)


def copied(undisturbed, folder, name, steps_left: int = 2):
    """The undisturbed run as it was when that many steps were left to do."""
    run = shutil.copytree(undisturbed, folder / name)
    for step, path in list_checkpoints(run / "checkpoints"):
        if step > STEPS - steps_left:
            shutil.rmtree(path)
    return run


OTHER_RANKS = {
    "tp1": (1, "--tp", "1"),
    "pp2": (2, "--tp", "1", "--run.pp", "2"),
    "dp2": (2, "--tp", "1"),
    "tp2 dp2": (4, "--tp", "2"),
    "tp2 pp2": (4, "--tp", "2", "--run.pp", "2"),
}


@pytest.mark.parametrize("layout", OTHER_RANKS)
def test_a_run_continued_on_other_ranks_takes_the_same_steps(undisturbed, nursery, folder, layout):
    ranks, *more = OTHER_RANKS[layout]
    run = copied(undisturbed, folder, layout)
    finished(nursery, ranks, *flags(folder, layout, *more))
    ours, theirs = comparable(run), comparable(undisturbed)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for key in one.keys() - {"kind"}:
            bound = {"rel": 1e-5, "abs": 1e-7, "nan_ok": True}
            assert float(one[key]) == pytest.approx(float(other[key]), **bound), (one["step"], key)
    ours, theirs = (last_tensors(one, folder) for one in (run, undisturbed))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        rows = min(len(tensor), len(ours[name]))  # the vocabulary's padding depends on the ranks
        torch.testing.assert_close(ours[name][:rows], tensor[:rows], rtol=1e-4, atol=1e-6, msg=name)


def refused(nursery, folder, name, *more) -> str:
    started = nursery.start(1, free_port(), *flags(folder, name, "--tp", "1", *more))
    assert started.wait() != [0]
    started.end()
    return started.said()


def test_what_cannot_be_continued_is_refused_by_name(undisturbed, nursery, folder):
    run = copied(undisturbed, folder, "refused")
    said = refused(nursery, folder, "refused", "--opd.k", "5")
    assert "already holds a run of other settings (opd.k: saved 4, given 5)" in said
    assert "run.resume: wanted a run in" in refused(nursery, folder, "nothing here", "--resume")
    checkpoint = list_checkpoints(run / "checkpoints")[-1][1]
    part = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    assert re.search(rf"checkpoint: .*{part.name} is cut short", refused(nursery, folder, "refused"))
    part.write_bytes(whole)
    values = json.loads((checkpoint / "trainer.json").read_text())
    changed = values | {"teachers": values["teachers"] | {"add": "0123456789abcdef"}}
    (checkpoint / "trainer.json").write_text(json.dumps(changed))
    assert re.search(
        r"teachers.add: .* is not what the run .* wanted 0123456789abcdef", refused(nursery, folder, "refused")
    )
    assert comparable(run) == comparable(undisturbed), "a start that is refused changes nothing"


def test_a_full_disk_ends_the_run_and_says_which_checkpoint_is_whole(undisturbed, nursery, folder):
    run = copied(undisturbed, folder, "full")
    largest = max(path.stat().st_size for path in run.glob("checkpoints/*/*.distcp"))
    started = nursery.start(1, free_port(), *flags(folder, "full", "--tp", "1"), file_limit=largest)
    assert started.wait() == [1]
    started.end()
    assert re.search(rf"cannot write the checkpoint of step {STEPS} .*step_000000{STEPS - 2}, is whole", started.said())
    assert [step for step, _ in list_checkpoints(run / "checkpoints")][-1] == STEPS - 2


def test_a_killed_launcher_and_a_killed_rank_under_it(undisturbed, folder):
    """torchrun itself: ranks end when it is gone, the same command continues, and it restarts a rank that died."""
    import psutil

    def launched():
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
        where = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        command = [*launcher, *where, str(EXAMPLE / "train.py"), *flags(folder, "launched", "--tp", "2")]
        with open(folder / "launched.log", "ab") as log:
            return subprocess.Popen(command, env=settings, cwd=ROOT, stdout=log, stderr=log)

    def ranks(launcher):
        children = psutil.Process(launcher.pid).children()
        return [child for child in children if any("train.py" in word for word in child.cmdline())]

    def said():
        return (folder / "launched.log").read_text()[-4000:]

    def past(step, launcher):
        deadline = time.monotonic() + 90
        while max([step for step, _ in list_checkpoints(folder / "launched" / "checkpoints")], default=0) < step:
            assert launcher.poll() is None and time.monotonic() < deadline, (folder / "launched.log").read_text()[
                -3000:
            ]
            time.sleep(0.02)

    first = launched()
    try:
        past(4, first)
        orphans = ranks(first)
        assert len(orphans) == 2
    finally:
        first.kill()
        first.wait()
    second = launched()
    try:
        past(8, second)
        assert not [orphan for orphan in orphans if orphan.is_running()], "one of them could have written on"
        ranks(second)[1].kill()
        assert second.wait(timeout=150) == 0, said()
    finally:
        second.kill()
    check_same_run(folder / "launched", undisturbed, folder)
