"""Arguments of `opd-engine convert`, its progress line and its exit status."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from opd_engine.last_line import say_error

DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="opd-engine convert",
        description="Convert a Qwen3 or Llama between a Hugging Face folder (config.json, safetensors) and a\n"
        "Megatron distributed checkpoint; which way follows from what SOURCE holds. One process, no\n"
        "GPU, a few times the largest tensor of memory. The result serves every tensor- and\n"
        "pipeline-parallel size, is read back and compared by hash, and takes its name only when it\n"
        "is whole.",
        epilog="examples:\n"
        "  opd-engine convert ./Qwen3-8B ./Qwen3-8B-megatron\n"
        "  opd-engine convert runs/math/checkpoints/step_00000100 ./student --like ./Qwen3-8B --dtype bfloat16\n"
        "  torchrun --nproc-per-node 4 -m opd_engine convert --check --tp 2 --pp 2 ./Qwen3-8B ./Qwen3-8B-megatron\n\n"
        "Exit status: 0 done, or logits equal; 1 not; 2 wrong usage, or a model that cannot be converted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder to read; with --check, the Hugging Face folder")
    parser.add_argument("target", metavar="TARGET", help="folder to make; with --check, what Megatron loads")
    parser.add_argument(
        "--like",
        metavar="DIR",
        help="to Hugging Face: folder of the same model whose config.json and tokenizer the result gets (default: "
        "what lies beside the checkpoint, as after a conversion)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the result (default: as SOURCE has them)")
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="to Hugging Face: largest file (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET once the new one is whole")
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    parser.add_argument(
        "--check",
        action="store_true",
        help="convert nothing: compare the logits of SOURCE in transformers with those of TARGET (a checkpoint or a "
        "Hugging Face folder) in Megatron, float32, and fail beyond 1e-5 of the largest; start it with torchrun for "
        "--tp and --pp",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="--check: tensor-parallel ranks (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="--check: pipeline stages (default: 1)")
    options = parser.parse_args(argv)
    if options.shard_gb <= 0:
        parser.error(f"--shard-gb: wanted above 0, got {options.shard_gb}")
    if not options.check and (options.tp, options.pp) != (1, 1):
        parser.error("--tp and --pp go with --check: a converted checkpoint serves every layout")
    if not options.check and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("one process converts; torchrun is for --check")
    return options


def run_command(argv: Sequence[str] | None) -> int:
    options = parse(argv)
    try:
        return _check(options) if options.check else _convert(options)
    except ValueError as error:
        say_error(f"opd-engine convert: error: {error}")
        return 2
    except (RuntimeError, OSError) as error:
        say_error(f"opd-engine convert: error: {error}")
        return 1
    except KeyboardInterrupt:
        say_error("opd-engine convert: interrupted, nothing is left behind")
        return 130


def _convert(options: argparse.Namespace) -> int:
    from opd_engine.integrations.hf.models import torch_dtype
    from opd_engine.integrations.megatron.convert import is_megatron, to_hugging_face, to_megatron

    common = {"dtype": None if options.dtype is None else torch_dtype(options.dtype), "overwrite": options.overwrite}
    line = ProgressLine(shown=not options.quiet)
    started = time.monotonic()
    try:
        if is_megatron(options.source):
            done = to_hugging_face(
                options.source,
                options.target,
                like=options.like,
                shard_bytes=int(options.shard_gb * 1e9),
                moved=line.moved,
                **common,
            )
        elif options.like is not None:
            raise ValueError(f"--like: serves a Megatron checkpoint, {options.source} is none")
        else:
            done = to_megatron(options.source, options.target, moved=line.moved, **common)
    finally:
        line.close()
    seconds = time.monotonic() - started
    print(
        f"{options.target}: {done.tensors} tensors, {done.tensor_bytes / 1e9:.2f} GB, read back and equal, "
        f"{seconds:.1f} s"
    )
    if done.unchanged is not None:
        print(f"{done.unchanged} of {done.tensors} have the bytes the checkpoint was converted from")
    return 0


def _check(options: argparse.Namespace) -> int:
    import torch

    from opd_engine.convert.logits import LIMIT, compare_logits

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = compare_logits(options.source, options.target, tp=options.tp, pp=options.pp, device=device)
    if found is None:
        return 0  # another rank prints
    equal = found.relative <= LIMIT
    print(
        f"logits of {found.rows} rows x {found.vocab_size} ids, TP {options.tp}, PP {options.pp}: largest difference "
        f"{found.difference:.2e} at {found.largest:.3g}, {found.relative:.2e} of the largest: "
        f"{'equal' if equal else f'NOT equal, wanted at most {LIMIT:.0e}'}"
    )
    return 0 if equal else 1


class ProgressLine:
    """A bar on a terminal's standard error: what is done, how much of it, and the speed; nothing elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._what, self._bytes, self._since, self._last = "", 0, 0.0, 0.0

    def moved(self, what: str, nbytes: int, total: int) -> None:
        """More of it is done."""
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._bytes, self._since, self._last = what, 0, now, 0.0
        self._bytes += nbytes
        if self._shown and (now - self._last > 0.1 or self._bytes >= total):
            self._last = now
            share = min(1.0, self._bytes / max(total, 1))
            bar = ("━" * round(30 * share)).ljust(30)
            speed = self._bytes / max(now - self._since, 1e-3) / 1e6
            text = f"\r{what} {bar} {share:4.0%} of {total / 1e9:.2f} GB  {speed:6.0f} MB/s"
            print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        if self._shown and self._what:
            print(file=sys.stderr)
