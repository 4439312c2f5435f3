"""The command line, resuming, comparing, and documents that say what the records say."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench_records import make_record
from opd_engine.bench import machine, main, plots, report, runner
from opd_engine.bench.cases import topk
from opd_engine.bench.compare import compare
from opd_engine.bench.goals import GOALS, LINEAR_GOALS
from opd_engine.bench.record import read_records
from opd_engine.bench.runner import Settings, run_plan
from opd_engine.bench.shapes import CASES, Shape
from opd_engine.bench.table import digits, duration, print_table, size
from ranks import ROOT

FAST = ["--shapes", "tiny", "--seconds", "0", "--min-rounds", "2", "--copy-mib", "1", "--no-compile"]


def test_records_go_to_stdout_as_json_and_are_not_measured_twice(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["topk", "loss_fwd_bwd_inplace", *FAST, "--threads", "1", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(line["case"], line["impl"]) for line in printed} >= {
        ("topk", "opd_engine"),
        ("topk", "torch_eager"),
        ("loss_fwd_bwd_inplace", "opd_engine"),
        ("loss_fwd_bwd_inplace", "opd_ablation_one_pass"),
    }
    ours = next(line for line in printed if (line["case"], line["impl"]) == ("loss_fwd_bwd_inplace", "opd_engine"))
    assert ours["threads"] == 1 and ours["logits_size_allocations"] == 0 and len(ours["samples_us"]) == 2
    assert not any(part in json.dumps(printed) for part in (str(Path.home()), str(ROOT), str(tmp_path)))
    assert len(read_records([out])) == len(printed)

    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == "" and again.err.count("already in") == 2
    assert len(read_records([out])) == len(printed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["topq"], "topk, gather"),
        (["--dtype", "fp8"], "bfloat16"),
        (["--shapes", "huge"], "quick"),
        (["--threads", "0"], "--threads: wanted at least 1"),
        (["step", "--shapes", "patterns"], "no shape"),
        (["compare", "no-such-file.jsonl", "b.jsonl"], "no-such-file"),
        (["report", "--root", "no-such-folder"], "benchmarks/results"),
    ],
)
def test_usage_errors_say_what_was_wanted(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_device_is_an_error_not_a_fallback(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_help_names_every_case_and_set(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(word in shown for word in ("sweep", "compare", "report", "--threads"))
    listed = shown[shown.index("cases:") : shown.index("sets of shapes:")]
    assert [line.split()[0] for line in listed.splitlines() if line[:3].strip()] == ["cases:", *CASES]
    assert "from hidden states" in listed[listed.index("  step ") : listed.index("  linear_topk ")]


def test_what_fails_is_reported_and_the_rest_goes_on(monkeypatch):
    settings = Settings(torch.device("cpu"), threads=1, seconds=0, min_rounds=1, copy_bytes=1 << 20)
    settings.compile_seconds = 0
    real = topk.topk_log_probs

    def wrong(logits, k):
        scores = real(logits, k)
        return dataclasses.replace(scores, lse=scores.lse + 0.5)

    monkeypatch.setattr(topk, "topk_log_probs", wrong)
    plan = [("topk", Shape(4, 100, k=3)), ("gather", Shape(4, 100, k=3)), ("gather", Shape(4, 100, mask_density=0.5))]
    outcome = run_plan(plan, settings, None, lambda label: None)
    assert len(outcome.failed) == 1 and "off by 0.5" in outcome.failed[0]
    assert {record.case for record in outcome.records} == {"gather"}
    assert any("no loss mask" in line for line in outcome.skipped)
    assert any("flashinfer" in line for line in outcome.skipped)
    assert any("torch_compile: no time left" in line for line in outcome.skipped)


def test_what_does_not_fit_is_left_out_with_its_size(monkeypatch):
    monkeypatch.setattr(runner, "_available_bytes", lambda device: 10_000)
    settings = Settings(torch.device("cpu"), threads=1, seconds=0, min_rounds=1, copy_bytes=1 << 20)
    plan = [("gather", Shape(4, 1_000, k=3)), ("gather", Shape(4, 200, k=3))]
    outcome = run_plan(plan, settings, None, lambda label: None)
    assert outcome.failed == [] and {record.impl for record in outcome.records} == {"opd_engine"}
    assert "would need" in outcome.skipped[0] and "baselines would need" in outcome.skipped[1]


def test_comparing_tells_a_change_from_noise(tmp_path, capsys):
    before = make_record(samples_us=[10.0, 11.0, 12.0])
    same, slower = make_record(samples_us=[11.0, 12.0, 13.0]), make_record(samples_us=[20.0, 21.0, 22.0])
    assert [verdict for *_, verdict in compare([before], [same])] == ["same"]
    assert [verdict for *_, verdict in compare([before], [slower])] == ["slower"]
    assert [verdict for *_, verdict in compare([slower], [before])] == ["faster"]
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for record, path in zip((before, slower, make_record(k=3)), paths):
        record.append_to(path)
    assert main(["compare", str(paths[0]), str(paths[1])]) == 0
    assert main(["compare", str(paths[0]), str(paths[1]), "--max-slowdown", "1.5"]) == 1
    assert main(["compare", str(paths[1]), str(paths[0]), "--max-slowdown", "1.5"]) == 0
    capsys.readouterr()
    assert main(["compare", str(paths[0]), str(paths[2])]) == 1
    assert "nothing" in capsys.readouterr().out


def test_the_table_is_for_reading():
    eager = make_record(impl="torch_eager", samples_us=[100.0, 240.0, 300.0])
    table = print_table([make_record(), eager])
    assert "256 x 151,936, k=64" in table and "12.0" not in table
    assert "10.0" in table.splitlines()[-1]  # the median of 10, 8 and 15 within rounds
    assert "5.00 GB/s" in table and "TFLOP/s" not in table
    head = make_record(case="linear_distill", hidden_size=512, flops=5_000_000_000, matmul_tflops=1e3)
    assert "250 TFLOP/s" in print_table([head]) and "GB/s" not in print_table([head])
    assert (duration(1.5), duration(2_345), duration(9.99e6)) == ("1.50 µs", "2.35 ms", "9.99 s")
    assert (digits(123.4), size(1536), size(10)) == ("123", "1.50 KiB", "10 B")


def test_goals_without_records_are_named_as_not_measured():
    shown = report.goals([])
    assert shown.count("not measured") == len(GOALS) + len(LINEAR_GOALS)
    head = {"case": "linear_distill", "num_tokens": 2_048, "vocab_size": 65_536, "hidden_size": 512}
    extra = {"pattern": "random", "mask_density": 0.8, "layout": "rows", "threads": 2}
    ours = make_record(**head, extra=extra, samples_us=[8.0, 8.5, 9.0])
    logits = make_record(**head, extra=extra, impl="opd_ablation_through_logits", samples_us=[10.0, 10.0, 10.0])
    row = next(line for line in report.goals([ours, logits]).splitlines() if "80% of rows" in line)
    assert row.endswith("| at most 1 | 0.85 | yes |")
    assert LINEAR_GOALS[1.0].measure([ours, logits]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_matrix_rate_is_measured_in_what_is_multiplied(dtype, monkeypatch):
    rates = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 0.1, torch.float64: 0.5}
    monkeypatch.setattr(machine, "_matmul_tflops", lambda device, dtype: rates[dtype])
    settings = Settings(torch.device("cpu"), threads=1, seconds=0, min_rounds=1, copy_bytes=1 << 20)
    name = str(dtype).removeprefix("torch.")
    shape = Shape(4, 100, k=3, dtype=name, baselines=False)
    plan = [("topk", shape), ("linear_topk", dataclasses.replace(shape, hidden_size=16))]
    records = run_plan(plan, settings, None, lambda label: None).records
    on_logits, from_hidden = (
        next(r for r in records if (r.case, r.impl) == (case, "opd_engine")) for case in ("topk", "linear_topk")
    )
    double = dtype == torch.float64
    assert (on_logits.matmul_tflops, on_logits.matmul_dtype) == ((0.5, name) if double else (1.0, "float32"))
    # float16 that nothing multiplies fast: widening first is the faster way, and the floor is its
    head = {torch.bfloat16: (2.0, name), torch.float64: (0.5, name)}.get(dtype, (1.0, "float32"))
    assert (from_hidden.matmul_tflops, from_hidden.matmul_dtype) == head
    assert machine.matmul_dtypes(torch.device("cuda"), dtype, from_hidden=False) == (dtype,)


def test_a_product_that_takes_seconds_is_not_repeated(monkeypatch):
    ran = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: ran.append(a.dtype))
    machine._matmul_tflops(torch.device("cpu"), torch.float32)
    assert len(ran) == 7
    times = iter(range(0, 100, 3))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    assert machine._matmul_tflops(torch.device("cpu"), torch.float16) == pytest.approx(2 * 1536**3 / 3 / 1e12)
    assert len(ran) == 9


def test_the_documents_say_what_the_records_say():
    assert report.load(ROOT), "no committed records"
    assert report.out_of_date(ROOT) == [], "run: opd-engine bench report"


def copied(tmp_path: Path) -> Path:
    for name in (*report.BLOCKS, *(f"docs/assets/{plot}" for plot in plots.PLOTS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        (tmp_path / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
        (tmp_path / "benchmarks" / "results" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_changed_record_or_a_number_by_hand_is_found(tmp_path):
    root = copied(tmp_path)
    assert main(["report", "--check", "--root", str(root)]) == 0
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace(" ms |", " µs |", 1))
    assert main(["report", "--check", "--root", str(root)]) == 1
    assert main(["report", "--root", str(root)]) == 0
    assert report.out_of_date(root) == []
    head = Shape(256, 151_936)
    ours = report.find(report.load(root), "topk", head)
    faster = [sample / 2 for sample in ours.samples_us]
    changed = {"samples_us": faster, "median_us": ours.median_us / 2, "floor_fraction": ours.floor_fraction * 2}
    dataclasses.replace(ours, **changed).append_to(root / "benchmarks" / "results" / "zz.jsonl")
    stale = report.out_of_date(root)
    assert {"README.md", "docs/performance.md", "docs/assets/bench_roofline.png"} <= set(stale)
    readme.write_text(readme.read_text().replace("benchmark-table:end", "benchmark-table:gone"))
    with pytest.raises(ValueError, match="benchmark-table"):
        report.out_of_date(root)
