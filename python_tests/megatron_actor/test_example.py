"""The example of examples/megatron as a user starts it: it learns on 2 and 4 ranks alike, and what is wrong ends it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest

from opd_engine.report.figures import make_figures
from opd_engine.report.page import render
from opd_engine.report.runs import read_runs
from opd_engine.train.journal import read_metrics
from ranks import ROOT, free_port

pytest.importorskip("megatron.core", reason="megatron-core is not installed (the [megatron] extra)")
pytestmark = [pytest.mark.ranks, pytest.mark.slow]
SETTINGS = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}


def command(folder, name, *arguments) -> list[str]:
    example = ROOT / "examples" / "megatron"
    places = ["--run.output_dir", str(folder / name), "--arithmetic.cache_dir", str(folder / "cache")]
    return [str(example / "train.py"), str(example / "arithmetic.toml"), *places, *arguments]


def launched(folder, name, ranks, *arguments, timeout=400) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    where = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return subprocess.run(
        [*launcher, *where, *command(folder, name, *arguments)],
        env=SETTINGS,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("example")


LAYOUTS = {
    "tp2, teachers switched": (2, "--tp", "2"),
    "tp2 pp2, teachers staged": (4, "--tp", "2", "--run.pp", "2", "--run.teacher_weights", "staged"),
}


@pytest.fixture(scope="module")
def summaries(folder):
    found = {}
    for name, (ranks, *arguments) in LAYOUTS.items():
        ran = launched(folder, name, ranks, *arguments)
        assert ran.returncode == 0, ran.stderr[-4000:]
        found[name] = json.loads((folder / name / "summary.json").read_text())
    return found


def test_it_learns_towards_both_teachers_on_2_and_4_ranks_alike(summaries, capsys):
    with capsys.disabled():
        for name, summary in summaries.items():
            tasks = {t: (v["accuracy_before"], v["accuracy_after"]) for t, v in summary["tasks"].items()}
            print(f"\n{name}: {summary['seconds']:.0f} s, accuracy before and after {tasks}")
    first, second = summaries.values()
    for task in ("add", "subtract"):
        for summary in (first, second):
            values = summary["tasks"][task]
            assert values["accuracy_teacher"] > 0.9 and values["accuracy_before"] < 0.5, task
            assert values["gap_closed"] > 0.4, task
        apart = first["tasks"][task]["accuracy_after"] - second["tasks"][task]["accuracy_after"]
        assert abs(apart) <= 0.2, task
    assert first["tasks"]["add"]["accuracy_before"] == second["tasks"]["add"]["accuracy_before"]


def test_the_journal_says_what_each_teacher_and_task_did(summaries, folder):
    for name in LAYOUTS:
        records = [r for r in read_metrics(folder / name / "metrics.jsonl") if r["kind"] == "train"]
        for record in records:
            for group in ("add", "subtract", "task:add", "task:subtract"):
                for kind in (
                    "divergence",
                    "student_support_mass",
                    "teacher_tail_mass",
                    "topk_overlap",
                    "student_entropy",
                ):
                    assert record[f"{kind}/{group}"] == record[f"{kind}/{group}"], (kind, group)
                assert record[f"rows/{group}"] > 0 and f"infinite_rows/{group}" in record
            for key in ("grad_norm", "tokens_per_second", "peak_memory_bytes", "seconds/rollout", "seconds/update"):
                assert record[key] > 0, key
        # The first step's rollouts and gradient do not know how the ranks are laid out.
        assert records[0]["rows"] == read_metrics(folder / next(iter(LAYOUTS)) / "metrics.jsonl")[1]["rows"]
        assert (folder / name / "checkpoints" / "step_00000110" / ".metadata").is_file()


def test_the_report_of_these_runs_overlays_them(summaries, folder):
    runs = read_runs([folder / name for name in LAYOUTS])
    figures, absent = make_figures(runs)
    assert absent == ["Perplexity of held-out text"]
    root = ElementTree.fromstring(render(runs))
    assert len(root.findall(".//{*}figure")) == len(figures) == 20
    # The first step's samples do not know how the ranks are laid out, the last stage's divergences included.
    first, second = ([sample for sample in run.samples if sample["step"] == 0] for run in runs)
    for one, two in zip(first, second, strict=True):
        assert one["tokens"] == two["tokens"] and one["divergence"] == pytest.approx(two["divergence"], rel=1e-4)


def broken(folder, what):
    """The models that the runs made, as somebody's own folders, one of the teachers broken."""
    copy = folder / what
    found = {}
    for kind in ("teacher_add", "teacher_subtract", "student"):
        source = next((folder / "cache").glob(f"{kind}-*"))
        found[kind] = shutil.copytree(source, copy / kind)
    weights = found["teacher_subtract"] / "model.safetensors"
    if what == "truncated":
        os.truncate(weights, weights.stat().st_size - 7)
    elif what == "missing":
        weights.unlink()
    else:
        tokens = found["teacher_subtract"] / "tokenizer.json"
        swapped = json.loads(tokens.read_text())
        swapped["model"]["vocab"] |= {"1": swapped["model"]["vocab"]["2"], "2": swapped["model"]["vocab"]["1"]}
        tokens.write_text(json.dumps(swapped))
    (copy / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"1{i}+2{i}=", "teacher": "sub"}) + "\n" for i in range(8))
    )
    return copy


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "teacher 'sub': .*model.safetensors is cut short"),
        ("missing", "teacher 'sub': wanted model.safetensors or model.safetensors.index.json"),
        ("tokens", "token -> id maps of student and teacher 'sub' disagree on 2 entries"),
    ],
)
def test_a_broken_teacher_is_refused_before_training(summaries, folder, what, words):
    copy = broken(folder, what)
    models = ["--student.path", str(copy / "student"), "--teacher", f"add={copy / 'teacher_add'}"]
    models += ["--teacher", f"sub={copy / 'teacher_subtract'}", "--data.task", "prompts"]
    ran = launched(folder, f"run {what}", 2, "--tp", "2", *models, "--data.prompts", str(copy / "prompts.jsonl"))
    assert ran.returncode != 0 and re.search(words, ran.stderr), ran.stderr[-3000:]
    assert not (folder / f"run {what}" / "metrics.jsonl").exists()


def test_options_of_the_head_change_nothing_and_rewards_weigh(summaries, folder):
    """Two steps on labelled prompts, rollouts cut to the likeliest tokens; then without a pass before training."""
    models = {kind: next((folder / "cache").glob(f"{kind}-*")) for kind in ("student", "teacher_add")}
    lines = [{"prompt": f"{a:02d}+{b:02d}=", "label": f"{a + b:03d}"[::-1]} for a in range(8) for b in range(20, 25)]
    prompts = folder / "labelled.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["--tp", "2", "--student.path", str(models["student"]), "--teacher", f"add={models['teacher_add']}"]
    common += ["--data.task", "prompts", "--data.prompts", str(prompts), "--optimizer.steps", "2", "--eval.every", "2"]
    common += ["--opd.reward_beta", "0.5", "--rollout.top_k", "3", "--rollout.top_p", "0.95"]
    common += ["--opd.measure_overlap", "false", "--rollout.prompts", "32"]
    options = {
        "plain": [],
        "kept": ["--opd.keep_teacher_hidden", "true", "--run.workspace_bytes", "4096"],
        "engine": ["--opd.support", "rollout", "--rollout.top_logprobs", "8"],
    }
    found = {}
    for name, more in options.items():
        ran = launched(folder, f"options {name}", 2, *common, *more)
        assert ran.returncode == 0, ran.stderr[-4000:]
        records = read_metrics(folder / f"options {name}" / "metrics.jsonl")
        found[name] = [record for record in records if record["kind"] == "train"]
    for plain, kept, engine in zip(found["plain"], found["kept"], found["engine"], strict=True):
        for key in ("loss", "divergence", "grad_norm", "student_support_mass", "teacher_tail_mass"):
            assert kept[key] == pytest.approx(plain[key], rel=1e-4), key
            assert engine[key] == pytest.approx(plain[key], rel=1e-4), key
        assert abs(plain["loss"] / plain["divergence"] - 1) > 1e-3  # unweighted, the two are one number


def test_a_killed_rank_ends_the_job_with_a_message(folder):
    """Without a launcher that would end the others: they notice by themselves."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks, timeout_s = [], 100.0  # one rank may be making the models while the other waits
    for rank in range(2):
        with open(folder / f"killed-{rank}.log", "wb") as log:
            environment = {**SETTINGS, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = command(folder, "killed", "--tp", "2", "--run.timeout_s", str(timeout_s))
            ranks.append(
                subprocess.Popen([sys.executable, *arguments], env=environment, cwd=ROOT, stdout=log, stderr=log)
            )
    try:
        journal = folder / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (journal.is_file() and len(read_metrics(journal)) > 3) and time.monotonic() < deadline:
            assert ranks[0].poll() is None, (folder / "killed-0.log").read_text()[-3000:]
            time.sleep(0.2)
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        code = ranks[0].wait(timeout=2 * timeout_s)
    finally:
        for rank in ranks:
            rank.kill()
    text = (folder / "killed-0.log").read_text()
    assert code != 0 and time.monotonic() - killed < timeout_s
    assert "rank 1 failed: it ended without a word" in text, text[-3000:]
