"""`opd-engine env` tells what runs here, importing nothing optional."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch

import opd_engine
from opd_engine import env


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_the_report_names_versions_build_and_devices():
    found = env.report()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["opd_engine"] == opd_engine.__version__
    build = found["build"]
    assert build["version"] == opd_engine.__version__, "the module was built from another version of the sources"
    assert build["cpu_variant"] in build["cpu_variants_compiled"].split()
    assert "-ffast-math" not in build["flags"] and "-O3" in build["flags"]
    assert build["compiler"] and build["torch"]
    assert found["devices"][0].startswith("cpu: ")
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["optional"]["train"]["numpy"], "the test environment has numpy"


def test_every_gpu_of_the_list_has_kernels():
    """The build leaves out what its nvcc does not know; one that knows all four compiles all four."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH: no CUDA kernel was compiled")
    for name in ("OPD_CUDA", "OPD_CUDA_ARCHS"):
        if os.environ.get(name, "AUTO") not in ("AUTO", "ON"):
            pytest.skip(f"{name}={os.environ[name]} asks for another build")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = tuple(map(int, re.search(r"release (\d+)\.(\d+)", version).groups()))
    if release < (12, 8):
        pytest.skip(f"nvcc {release[0]}.{release[1]} knows no sm_100a and no sm_120; 12.8 does")
    build = env.report()["build"]
    assert build["cuda"], f"nvcc is at {nvcc}, but the module was built without it"
    assert build["cuda_archs"].split() == ["80-real", "90a-real", "100a-real", "120-real"]


def test_it_prints_for_people_and_for_programs():
    text = run("-m", "opd_engine", "env")
    assert text.returncode == 0, text.stderr
    for wanted in ("torch", "cpu_variant", "compiler", "devices", "optional", "cuda"):
        assert wanted in text.stdout
    as_json = run("-m", "opd_engine", "env", "--json")
    assert json.loads(as_json.stdout)["versions"]["torch"] == torch.__version__


def test_an_absent_optional_package_is_said_to_be_absent(monkeypatch, capsys):
    monkeypatch.setitem(env.OPTIONAL, "ray", {"a_package_that_does_not_exist": "none-such"})
    assert env.report()["optional"]["ray"] == {"a_package_that_does_not_exist": None}
    assert env.main([]) == 0
    assert "a_package_that_does_not_exist (absent)" in capsys.readouterr().out


def test_it_imports_no_optional_package():
    program = (
        "import contextlib, io, sys\n"
        "from opd_engine import env\n"
        "before = set(sys.modules)\n"
        "with contextlib.redirect_stdout(io.StringIO()): env.main([])\n"
        "print(*sorted({n.split('.')[0] for n in set(sys.modules) - before} & "
        "{'transformers', 'matplotlib', 'ray', 'tensorboard', 'pyarrow', 'sglang'}))\n"
    )
    ran = run("-c", program)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
