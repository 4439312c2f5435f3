"""A miniature of this project for tests that build: its setup.py, CMakeLists.txt and cmake/, one binding, one kernel.

It compiles in seconds, where the real kernels take minutes; what it shows of the build holds for the real tree.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from ranks import ROOT

SITE = Path(sysconfig.get_path("purelib"))

BINDING = """
#include <pybind11/pybind11.h>
#include "opd_build_config.h"
extern "C" int opd_answer_baseline();
PYBIND11_MODULE(_C, m) {
  m.def("answer", &opd_answer_baseline);
  m.attr("version") = OPD_VERSION;
}
"""
KERNEL_PATH = "csrc/kernels/cpu/variant/answer.cpp"
KERNEL = """
#define OPD_JOIN2(a, b) a##b
#define OPD_JOIN(a, b) OPD_JOIN2(a, b)
extern "C" int OPD_JOIN(opd_answer_, OPD_CPU_VARIANT)() { return 42; }
"""


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run([str(part) for part in command], **options)


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPD_", "PYTHON"))}
    return {**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


def plant(folder: Path) -> Path:
    tree = folder / "tree"
    (tree / "csrc/kernels/cpu/variant").mkdir(parents=True)
    (tree / "opd_engine").mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "THIRD_PARTY_NOTICES"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "cmake", tree / "cmake", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "opd_engine/_version.py", tree / "opd_engine")
    (tree / "opd_engine/__init__.py").touch()
    (tree / "csrc/bind.cpp").write_text(BINDING)
    (tree / KERNEL_PATH).write_text(KERNEL)
    return tree
