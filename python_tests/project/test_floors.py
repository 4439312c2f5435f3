"""The floors stand: every module imports downward only, kernels know no torch, and importing costs torch alone.

The walk reads syntax trees, so an import hidden inside a function counts as much as one at the top. Each rule is also
shown to bite, on a planted breach.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import ROOT

FLOORS = {
    "_version": 0,
    "_C": 0,
    "choices": 0,
    "whole_files": 0,
    "ops": 1,
    "parallel": 2,
    "functional": 3,
    "teachers": 4,
    "distillation": 5,
    "integrations": 6,
    "train": 7,
    "bench": 7,
    "check": 7,
    "convert": 7,
    "env": 7,
    "last_line": 7,
    "packages": 7,
    "report": 7,
    "scaling": 7,
    "cli": 7,
    "__main__": 8,
}
FRONT_DOOR = 5  # opd_engine/__init__.py re-exports floors 1 to 5; only what stands higher may enter through it
# Floor 6 wraps these; only it may name them. The training loop above it is written for transformers' models.
FRAMEWORKS = {"transformers", "peft", "megatron", "slime", "sglang", "vllm", "ray", "verl"}
TRAINER_MAY = {"transformers"}
SIBLINGS = {"slime": {"megatron", "sglang", "ray"}, "fsdp": {"hf"}}  # integrations that may build on others


def imported(path: Path, source: str) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a module imports anywhere, `a.b` for `from a import b`, literals included."""
    package = list(path.with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.append((node.lineno, str(first.value)))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.append((node.lineno, "torch.distributed"))
    return found


def _is_fsdps_own(path: Path, parts: list[str]) -> bool:
    """The framework of integrations/fsdp is a part of torch.distributed; collectives are none of it."""
    return path.parts[1:3] == ("integrations", "fsdp") and parts[2:3] in (["fsdp"], ["checkpoint"], ["device_mesh"])


def breaches(sources: dict[str, str]) -> list[str]:
    """Every import that points upward or sideways, as `path:line what`; keys are paths such as opd_engine/ops/x.py."""
    rooms = {Path(path).parts[1].removesuffix(".py") for path in sources}
    found = []
    for name, source in sources.items():
        path = Path(name)
        room = path.parts[1].removesuffix(".py")
        if room != "__init__" and room not in FLOORS:
            found.append(f"{name}:1 stands on no floor")
            continue
        floor = FRONT_DOOR if room == "__init__" else FLOORS[room]
        for line, target in imported(path, source):
            parts = target.split(".")
            if parts[0] == "opd_engine":
                entered = parts[1] if len(parts) > 1 and (parts[1] in FLOORS or parts[1] in rooms) else "__init__"
                height = FRONT_DOOR if entered == "__init__" else FLOORS.get(entered, 99)
                if height > floor or (entered == "__init__" and floor <= FRONT_DOOR):
                    found.append(f"{name}:{line} floor {floor} imports {target} of floor {height}")
                if room == entered == "integrations" and len(path.parts) > 3 and len(parts) > 2:
                    ours, theirs = path.parts[2].removesuffix(".py"), parts[2]
                    if theirs != ours and theirs not in SIBLINGS.get(ours, ()):
                        found.append(f"{name}:{line} integration {ours} imports its sibling {theirs}")
            elif parts[:2] == ["torch", "distributed"] and room != "parallel" and not _is_fsdps_own(path, parts):
                found.append(f"{name}:{line} torch.distributed lives in opd_engine/parallel alone")
            elif parts[0] in FRAMEWORKS - (TRAINER_MAY if room == "train" else set()) and room != "integrations":
                found.append(f"{name}:{line} {parts[0]} lives in opd_engine/integrations alone")
            elif floor <= FRONT_DOOR and parts[0] not in sys.stdlib_module_names and parts[0] != "torch":
                found.append(
                    f"{name}:{line} floor {floor} needs {parts[0]}; only the standard library and torch may be"
                )
    return found


def product() -> dict[str, str]:
    files = sorted((ROOT / "opd_engine").rglob("*.py"))
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def test_every_import_points_downward():
    sources = product()
    assert len(sources) > 5, "the walk found next to nothing: is this the source tree?"
    assert breaches(sources) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("opd_engine/ops/planted.py", "from opd_engine.parallel.vocab import VocabShard"),
        ("opd_engine/ops/planted.py", "import opd_engine.functional"),
        ("opd_engine/ops/planted.py", "import opd_engine"),
        ("opd_engine/functional/planted.py", "from ..teachers import mixture"),
        ("opd_engine/functional/planted.py", "from .. import teachers"),
        ("opd_engine/functional/planted.py", "from opd_engine import distill_loss"),
        ("opd_engine/teachers/planted.py", 'import importlib; importlib.import_module("opd_engine.distillation.step")'),
        ("opd_engine/distillation/planted.py", "from opd_engine.integrations.hf import models"),
        ("opd_engine/distillation/planted.py", "import transformers"),
        ("opd_engine/distillation/planted.py", "import numpy as np"),
        ("opd_engine/train/planted.py", "from ray import remote"),
        ("opd_engine/train/planted.py", "import torch.distributed as dist"),
        ("opd_engine/train/planted.py", "from torch import distributed"),
        ("opd_engine/train/planted.py", "import torch; torch.distributed.barrier()"),
        ("opd_engine/integrations/hf/planted.py", "from opd_engine.train import loop"),
        ("opd_engine/integrations/hf/planted.py", "from opd_engine.integrations.megatron import actor"),
        ("opd_engine/integrations/megatron/planted.py", "from ..slime import actor"),
        ("opd_engine/planted.py", "import os"),
        ("opd_engine/__init__.py", "from opd_engine.train import loop"),
    ],
)
def test_a_planted_breach_is_found(path, line):
    sources = {**product(), path: f"def lazily():\n    {line}\n"}
    assert [found for found in breaches(sources) if found.startswith(f"{path}:")]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("opd_engine/functional/planted.py", "from opd_engine.parallel import vocab"),
        ("opd_engine/functional/planted.py", "from .. import ops"),
        ("opd_engine/integrations/slime/planted.py", "from opd_engine.integrations.megatron import actor"),
        ("opd_engine/train/planted.py", "from opd_engine import distill_loss"),
        ("opd_engine/parallel/planted.py", "import torch.distributed as dist"),
    ],
)
def test_what_points_downward_is_let_through(path, line):
    assert breaches({**product(), path: f"def lazily():\n    {line}\n"}) == breaches(product())


FORBIDDEN_INCLUDES = {
    "csrc/kernels": r"torch/|c10/|ATen/|pybind11/|Python\.h|ops/",  # F0: pointers and sizes, testable without torch
    "csrc": r"c10/|ATen/|torch/(?!csrc/(stable|inductor|headeronly)/|headeronly/)",  # F1: the stable ABI alone
}


def include_breaches(sources: dict[str, str]) -> list[str]:
    found = []
    for path, source in sources.items():
        for folder, pattern in FORBIDDEN_INCLUDES.items():
            if path.startswith(folder + "/"):
                for target in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source, re.M):
                    if re.match(pattern, re.sub(r"^(\.\./)+", "", target)):
                        found.append(f"{path} includes {target}")
    return found


def test_kernels_know_no_torch_and_ops_only_its_stable_abi():
    files = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".h", ".cpp", ".cu", ".cuh")]
    sources = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    assert any(path.startswith("csrc/kernels/") for path in sources)
    assert include_breaches(sources) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/kernels/cpu/planted.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("csrc/kernels/cpu/planted.cpp", '#include "../../ops/checks.h"'),
        ("csrc/kernels/params.h", "#  include <c10/util/BFloat16.h>"),
        ("csrc/ops/planted.cpp", "#include <ATen/ATen.h>"),
        ("csrc/ops/planted.cpp", "#include <torch/library.h>"),
    ],
)
def test_a_planted_include_is_found(path, line):
    assert include_breaches({path: f"// kernel\n{line}\n"})


def test_importing_the_package_needs_torch_alone():
    """Whatever `import opd_engine` loads beyond what `import torch` had loaded is ours or the standard library's."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import opd_engine\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'opd_engine', 'torch'}))\n"
        "print(*sorted({name.split('.')[1] for name in sys.modules if name.startswith('opd_engine.')}))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 0, ran.stderr
    foreign, own = ran.stdout.split("\n")[:2]
    assert foreign.split() == []
    too_high = [room for room in own.split() if FLOORS.get(room, 0) > FRONT_DOOR]
    assert too_high == [], "import opd_engine must not load integrations, the trainer or the command line"
