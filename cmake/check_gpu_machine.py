"""Say in one line what a GPU machine lacks, before minutes are spent on it. Standard library, and torch if any."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys

MODULES = {"setuptools": (77, 0), "pybind11": (2, 13), "numpy": (1, 0), "pytest": (8, 0)}
PROGRAMS = {"cmake": (3, 24), "ninja": (1, 0), "make": (3, 81), "nvcc": (12, 8)}
TORCH = (2, 10)


def numbers(text):
    """The first version in a text, as (major, minor)."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def said_by(program):
    """What a program's --version says; of nvcc the release, which is not the first number in it."""
    if shutil.which(program) is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60).stdout
    return said.partition("release ")[2] or said


def look():
    """(what is there, what is wrong), lines of text."""
    found, wrong = [], []

    def compare(name, version, wanted):
        if version is None:
            wrong.append("{}: wanted at least {}.{}, got none".format(name, *wanted))
            return
        found.append("{} {}.{}".format(name, *numbers(version)))
        if numbers(version) < wanted:
            wrong.append("{}: wanted at least {}.{}, got {}.{}".format(name, *wanted, *numbers(version)))

    for name, wanted in MODULES.items():
        there = importlib.util.find_spec(name) is not None
        compare(name, importlib.metadata.version(name) if there else None, wanted)
    for name, wanted in PROGRAMS.items():
        compare(name, said_by(name), wanted)
    if importlib.util.find_spec("torch") is None:
        wrong.append("torch: wanted at least {}.{} with CUDA, got none".format(*TORCH))
        return found, wrong
    import torch

    compare("torch", torch.__version__, TORCH)
    built_with = torch.version.cuda
    if not torch.cuda.is_available():
        wrong.append(f"a GPU: torch {torch.__version__} sees none (torch.version.cuda = {built_with})")
        return found, wrong
    for device in range(torch.cuda.device_count()):
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        found.append(f"{torch.cuda.get_device_name(device)} (sm {capability})")
    release = said_by("nvcc")
    if release is not None and numbers(release)[0] != numbers(built_with)[0]:
        wrong.append("nvcc: wanted CUDA {}, torch's, got {}.{}".format(built_with, *numbers(release)))
    return found, wrong


if __name__ == "__main__":
    found, wrong = look()
    print("; ".join(found), flush=True)
    if wrong:
        sys.exit("opd_engine: this machine cannot build or check CUDA kernels: " + "; ".join(wrong))
