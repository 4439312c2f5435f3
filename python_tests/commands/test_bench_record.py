"""A record cannot lie by omission: what it must hold, what is refused, and what measuring allocations sees."""

import ctypes
import dataclasses
import json
import math

import pytest
import torch

from bench_records import make_record
from opd_engine.bench.memory import trace_allocations
from opd_engine.bench.record import RecordRefused, latest, read_records
from opd_engine.bench.timing import Impl, interleave

CPU = torch.device("cpu")
REQUIRED = [
    "case",
    "impl",
    "device",
    "machine",
    "commit",
    "date",
    "dtype",
    "num_tokens",
    "vocab_size",
    "hidden_size",
    "k",
    "tp_size",
    "samples_us",
    "median_us",
    "bytes_moved",
    "flops",
    "copy_gbps",
    "matmul_tflops",
    "floor_us",
    "floor_fraction",
    "peak_extra_bytes",
    "max_abs_err",
]


def test_a_line_holds_every_key(tmp_path):
    make_record().append_to(tmp_path / "new" / "a.jsonl")
    line = json.loads((tmp_path / "new" / "a.jsonl").read_text())
    assert list(line)[: len(REQUIRED)] == REQUIRED
    assert line["floor_us"] == 5.0 and line["floor_fraction"] == 0.25


@pytest.mark.parametrize(
    "changes",
    [
        {"max_abs_err": None},
        {"max_abs_err": math.nan},
        {"max_abs_err": math.inf},
        {"max_abs_err": 0.01},  # ours, and wrong
        {"impl": "torch_eager", "max_abs_err": 2.0},  # a baseline that computes something else
        {"samples_us": [1.0, 0.0, 2.0]},
        {"samples_us": [1.0, 2.0, 3.0], "median_us": 1.0},
        {"floor_us": 1.0},
        {"floor_fraction": 0.9},
        {"dtype": "int8"},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_a_record_that_misleads_is_refused(changes):
    with pytest.raises(RecordRefused):
        make_record(**changes)


def test_baselines_are_recorded_with_the_error_they_make():
    assert make_record(impl="torch_eager", max_abs_err=0.01).max_abs_err == 0.01


def test_reading_gives_what_was_written_and_names_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    record = make_record()
    record.append_to(path)
    assert read_records([path]) == [record]
    assert (record.pattern, record.absent_key) == ("random", None)
    values = json.loads(record.to_json())
    del values["max_abs_err"]
    path.write_text(record.to_json() + "\n\n" + json.dumps(values) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*max_abs_err"):
        read_records([path])
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1"):
        read_records([path])


def test_the_last_line_of_a_key_wins_and_other_commits_share_it():
    old, new = make_record(), make_record(commit="def", samples_us=[1.0])
    other = make_record(extra={**old.extra, "pattern": "ascending"})
    assert list(latest([old, other, new]).values()) == [new, other]


def test_allocations_are_counted_temporaries_included():
    x = torch.randn(64, 1_000)

    _, copied = trace_allocations(x.clone, CPU, x.nbytes)
    assert (copied.peak_bytes, copied.large) == (x.nbytes, 1)
    _, summed = trace_allocations(lambda: ((x + 1) * (x + 2)).sum(), CPU, x.nbytes)
    assert summed.large == 3 and 3 * x.nbytes <= summed.peak_bytes < 4 * x.nbytes
    _, inplace = trace_allocations(lambda: x.add_(1), CPU, x.nbytes)
    assert inplace.large == 0 and inplace.peak_bytes < 1_000


def test_memory_that_passes_the_allocator_by_shows_in_the_process():
    size = 64 << 20
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))  # else it hands out what is resident

    def hidden():
        pointer = libc.malloc(ctypes.c_size_t(size))
        ctypes.memset(pointer, 1, size)
        libc.free(pointer)

    _, seen = trace_allocations(hidden, CPU, size)
    assert seen.peak_bytes < size
    if seen.resident_bytes is None:
        pytest.skip("the system does not let a process reset its resident peak")
    assert seen.resident_bytes > size * 0.9


def test_samples_interleave_restore_and_leave_the_threads_alone():
    log = []

    def impl(name, threads=None):
        def forward(number):
            log.append((name, number, torch.get_num_threads()))

        return Impl(name, forward, restore=lambda number: log.append(("restore", number)), threads=threads)

    torch.set_num_threads(2)
    samples = interleave([impl("a"), impl("b")], num_buffers=3, device=CPU, seconds=0, min_rounds=2)
    assert [len(of_impl) for of_impl in samples] == [2, 2]
    runs = [entry for entry in log if entry[0] != "restore"]
    assert runs == [("a", 0, 2), ("b", 1, 2), ("b", 2, 2), ("a", 0, 2)]  # the order rotates, the buffers go round
    assert [entry[1] for entry in log if entry[0] == "restore"] == [0, 1, 2, 0]
    log.clear()
    interleave([impl("a", threads=1)], num_buffers=2, device=CPU, seconds=0, min_rounds=1)
    assert {entry[2] for entry in log if entry[0] == "a"} == {1} and torch.get_num_threads() == 2


def test_backward_is_part_of_the_sample():
    impl = Impl("x", lambda number: number + 1, lambda forwarded: forwarded * 10)
    assert impl.run(impl.prepare(4)) == 50
    assert dataclasses.replace(impl, backward=None).run(4) == 5
