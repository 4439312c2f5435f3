"""A benchmark's record with figures that agree, to be changed one at a time."""

from opd_engine.bench.record import BenchRecord, floor_us


def make_record(**changes) -> BenchRecord:
    samples = changes.pop("samples_us", [10.0, 30.0, 20.0])
    values = {
        "case": "topk",
        "impl": "opd_engine",
        "device": "cpu",
        "machine": "a processor, 2 cores",
        "commit": "abc",
        "date": "2026-01-01",
        "dtype": "float32",
        "num_tokens": 256,
        "vocab_size": 151_936,
        "hidden_size": None,
        "k": 64,
        "tp_size": 1,
        "samples_us": samples,
        "median_us": sorted(samples)[len(samples) // 2],
        "bytes_moved": 100_000,
        "flops": 1_000,
        "copy_gbps": 20.0,
        "matmul_tflops": 0.1,
        "peak_extra_bytes": 5,
        "max_abs_err": 1e-6,
        "extra": {"pattern": "random", "mask_density": 1.0, "layout": "rows", "threads": 2},
        **changes,
    }
    floor = floor_us(values["bytes_moved"], values["flops"], values["copy_gbps"], values["matmul_tflops"])
    values = {"floor_us": floor, "floor_fraction": floor / values["median_us"], **values}
    return BenchRecord(**values)
