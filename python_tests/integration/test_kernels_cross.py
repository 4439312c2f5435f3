"""The torch-free kernel check: this processor's variants natively, NEON cross-compiled and run under an emulator."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Icsrc"]


def build(compiler: str, out: Path, variants: dict[str, list[str]]) -> Path:
    """Compiles the kernels once per variant, the dispatch and the check, and links them statically."""
    objects: list[str] = []
    for variant, flags in variants.items():
        for source in sorted((ROOT / "csrc/kernels/cpu/variant").glob("*.cpp")):
            objects.append(str(out / f"{variant}_{source.stem}.o"))
            command = [compiler, *FLAGS, *flags, f"-DOPD_CPU_VARIANT={variant}", "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, cwd=ROOT, check=True)
    defines = [f"-DOPD_HAVE_VARIANT_{variant.upper()}" for variant in variants]
    sources = [*map(str, sorted((ROOT / "csrc/kernels/cpu").glob("*.cpp"))), "csrc/tests/check_kernels.cpp"]
    program = out / "check_kernels"
    subprocess.run(
        [compiler, *FLAGS, *defines, *sources, *objects, "-static", "-o", str(program)], cwd=ROOT, check=True
    )
    return program


def run(command: list[str], variant: str) -> str:
    environment = {**os.environ, "OPD_CPU_VARIANT": variant}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"variant {variant}" in finished.stdout
    return finished.stdout


def test_kernels_without_torch_on_this_processor(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = build(compiler, tmp_path, {"baseline": []})
    assert "all kernels agree" in run([str(program)], "baseline")


def test_neon_kernels_under_an_emulator(tmp_path):
    if platform.machine() == "aarch64":
        pytest.skip("this processor runs NEON itself")
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (Debian's packages)")
    program = build(compiler, tmp_path, {"baseline": [], "neon": []})
    assert "all kernels agree" in run([emulator, str(program)], "neon")
