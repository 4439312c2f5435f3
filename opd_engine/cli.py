"""The `opd-engine` command: argument parsing only; each subcommand's work lies in the module it names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import opd_engine
from opd_engine._version import __version__
from opd_engine.last_line import say_error
from opd_engine.packages import require_for_command

_SHORTHANDS = (
    ("--student", "student.path", "DIR", "folder of the student"),
    ("--prompts", "data.prompts", "FILE", "JSONL or parquet file of prompts"),
    ("--output-dir", "run.output_dir", "DIR", "folder of the run"),
    ("--backend", "run.backend", "NAME", "what trains the student: hf or megatron"),
    ("--tp", "run.tp", "N", "ranks that share the LM head"),
)


def _train_parser(commands) -> None:
    from opd_engine.train.config import all_settings
    from opd_engine.train.settings import Once, add_flags

    parser = commands.add_parser(
        "train",
        help="distil teachers into a student on its own rollouts",
        description="Distil teachers into a student on its own rollouts. Every key of the TOML file is a flag too, and "
        "a flag wins over the file.",
        epilog="example: opd-engine train --student ./small --teacher math=./big --prompts prompts.jsonl "
        "--opd.divergence jsd --opd.k 64",
        usage="opd-engine train [CONFIG] [--student DIR] [--teacher NAME=DIR] [--prompts FILE] [--section.key VALUE]",
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="TOML file; without one, defaults and flags")
    for flag, key, metavar, text in _SHORTHANDS:
        single = {"action": Once} if key in ("student.path", "data.prompts") else {}
        parser.add_argument(
            flag, dest=key, metavar=metavar, default=argparse.SUPPRESS, help=f"{text} (--{key})", **single
        )
    for flag, text in (
        ("resume", "refuse to begin where --output-dir holds no run to continue"),
        ("overwrite", "discard the run in --output-dir"),
    ):
        parser.add_argument(
            f"--{flag}",
            dest=f"run.{flag}",
            action="store_const",
            const="true",
            default=argparse.SUPPRESS,
            help=f"{text} (--run.{flag})",
        )
    parser.add_argument(
        "--teacher", action="append", metavar="NAME=DIR", help="a teacher and its folder; repeat for several"
    )
    parser.add_argument(
        "--dry-run",
        type=int,
        metavar="RANKS",
        help="print the memory plan of a megatron run on so many ranks, and do nothing; models may be folders with a "
        "config.json or names such as qwen3-8b",
    )
    add_flags(parser, all_settings())
    parser.set_defaults(run=_run_train)


def _run_train(options: argparse.Namespace, unknown: Sequence[str]) -> int:
    from opd_engine.train.config import TrainConfig, apply_flags, apply_toml, read_toml, unknown_flag_error

    if unknown:
        raise unknown_flag_error(unknown)
    config = TrainConfig()
    if options.config is not None:
        apply_toml(config, read_toml(options.config), options.config)
    apply_flags(config, options)
    config.validate()
    if options.dry_run is not None:
        from opd_engine.train.memory import dry_run

        print(dry_run(config, options.dry_run))
        return 0

    from opd_engine.train.loop import run
    from opd_engine.train.summary import describe

    try:
        summary = run(config)
    except KeyboardInterrupt:
        say_error(f"opd-engine: interrupted{_how_to_continue(config.run.output_dir)}")
        return 130
    if summary:
        print(describe(summary, config.run.output_dir))
    return 0


def _how_to_continue(folder: str) -> str:
    from opd_engine.train.checkpoint import list_checkpoints
    from opd_engine.train.run_folder import CHECKPOINTS, CONFIG_FILE

    saved = list_checkpoints(Path(folder) / CHECKPOINTS)
    if saved:
        return (
            f"; the same command with --resume continues after step {saved[-1][0]}, its newest checkpoint in {folder}"
        )
    if (Path(folder) / CONFIG_FILE).is_file():
        return "; no checkpoint was written yet, the same command begins anew"
    return " before anything began"


def _run_check(arguments: Sequence[str]) -> int:
    from opd_engine.check import main as check_main

    return check_main(list(arguments))


def _run_bench(arguments: Sequence[str]) -> int:
    from opd_engine.bench import main as bench_main

    return bench_main(list(arguments))


def _run_convert(arguments: Sequence[str]) -> int:
    from opd_engine.convert import main as convert_main

    return convert_main(list(arguments))


def _run_env(arguments: Sequence[str]) -> int:
    from opd_engine.env import main as env_main

    return env_main(list(arguments))


def _run_report(arguments: Sequence[str]) -> int:
    from opd_engine.report import main as report_main

    return report_main(list(arguments))


# Subcommands with a parser of their own: name -> (what runs it, help).
_OWN_PARSERS = {
    "bench": (_run_bench, "measure the ops beside torch and other libraries"),
    "check": (_run_check, "compare every op with a float64 reference on this machine"),
    "convert": (_run_convert, "convert models between Hugging Face and Megatron"),
    "env": (_run_env, "print versions, build flags and devices"),
    "report": (_run_report, "draw one or several runs on one HTML page"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 1 failed, 2 wrong usage or settings."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except ValueError as error:
        say_error(f"opd-engine: error: {error}")
        return 2
    except (RuntimeError, OSError, ImportError) as error:
        say_error(f"opd-engine: error: {error}")
        return 1
    except KeyboardInterrupt:
        say_error("opd-engine: interrupted")
        return 130


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in _OWN_PARSERS:
        if not {"-h", "--help"} & set(arguments):
            require_for_command(arguments[0])
            opd_engine._load()
        return _OWN_PARSERS[arguments[0]][0](arguments[1:])
    parser = argparse.ArgumentParser(
        prog="opd-engine", description="On-policy distillation losses, exact under tensor parallelism."
    )
    parser.add_argument("--version", action="version", version=f"opd_engine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    # Only the subcommand that is called pays for its settings.
    if arguments and arguments[0] == "train":
        _train_parser(commands)
    else:
        commands.add_parser("train", help="distil teachers into a student on its own rollouts")
    for name, (_, text) in _OWN_PARSERS.items():
        commands.add_parser(name, help=text)
    options, unknown = parser.parse_known_args(arguments)
    return options.run(options, unknown)
