"""`opd-engine env`: what runs here. Versions, build flags, processor variant, devices, what is compiled in.

A bug report starts with this. It imports torch and opd_engine only; optional packages are looked up, not imported.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import opd_engine
from opd_engine import ops

# import name -> distribution name, by extra
OPTIONAL = {
    "train": {
        "transformers": "transformers",
        "tokenizers": "tokenizers",
        "safetensors": "safetensors",
        "numpy": "numpy",
        "matplotlib": "matplotlib",
        "tensorboard": "tensorboard",
        "rich": "rich",
        "jinja2": "jinja2",
        "pyarrow": "pyarrow",
    },
    "megatron": {"megatron.core": "megatron-core"},
    "ray": {"ray": "ray"},
    "serving": {"sglang": "sglang"},
}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _optional(name: str, distribution: str) -> str | None:
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return importlib.metadata.version(distribution)
    except (ImportError, ValueError):  # a parent package that does not import, or one without metadata
        return None


def _devices() -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [f"cpu: {_processor()}, {cores} usable cores, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        )
    return devices


def report() -> dict[str, Any]:
    """Everything `opd-engine env` prints, as one JSON-serialisable dict.

    Returns: versions, build (what _C was compiled with), devices (a list of lines), optional ({extra: {import name:
        version or None}}), environment (the OPD_* variables that are set).
    """
    return {
        "versions": {
            "opd_engine": opd_engine.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "installed_in": str(Path(opd_engine.__file__).parent),
            "executable": sys.executable,
        },
        "build": ops.build_info(),
        "devices": _devices(),
        "optional": {
            extra: {name: _optional(name, distribution) for name, distribution in packages.items()}
            for extra, packages in OPTIONAL.items()
        },
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("OPD_")},
    }


def _lines(title: str, value: Any):
    yield title
    if isinstance(value, dict):
        width = max(map(len, value), default=0)
        for name, item in value.items():
            if isinstance(item, dict):
                item = ", ".join(f"{key} {found or '(absent)'}" for key, found in item.items())
            elif isinstance(item, (list, tuple)):
                item = " ".join(map(str, item)) or "none"
            yield f"  {name:{width}}  {'none' if item in (None, '') else item}"
    else:
        yield from (f"  {item}" for item in value or ["none"])


def main(argv: list[str] | None = None) -> int:
    """Print `report()`, for people or with --json for programs; returns the exit code."""
    parser = argparse.ArgumentParser(prog="opd-engine env", description="Print what this installation runs on.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args(argv)
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, value in found.items():
        print("\n".join(_lines(title, value)))
    return 0
