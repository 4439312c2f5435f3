"""Thin driver: setuptools for metadata and packaging, CMake for every compiled file.

Every option is passed to CMake on every run, because a reused build folder would otherwise keep old answers.
Options come from the environment: OPD_CUDA (AUTO, ON, OFF), OPD_CUDA_ARCHS, OPD_WERROR and OPD_EMULATOR
(ON, OFF), OPD_TORCH_DIR, MAX_JOBS.
"""

import fcntl
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
from find_torch import find_torch  # noqa: E402

DEFAULTS = {
    "OPD_CUDA": "AUTO",
    "OPD_CUDA_ARCHS": "80-real;90a-real;100a-real;120-real",
    "OPD_WERROR": "OFF",
    "OPD_EMULATOR": "OFF",
}

REQUIRES = "pip install 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24' ninja"

if int(setuptools.__version__.split(".")[0]) < 77:
    # An older one stops at pyproject.toml's license with a message that helps nobody.
    sys.exit(f"opd_engine: setuptools {setuptools.__version__} is too old to build without isolation; {REQUIRES}")


def tool(name: str) -> str:
    """The PyPI wheel of cmake or ninja where it is installed, else the one on PATH."""
    try:
        module = __import__(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR
        if (Path(folder) / name).exists():
            return str(Path(folder) / name)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if not found:
        sys.exit(f"opd_engine: {name} is missing; {REQUIRES}")
    return found


def replace_if_changed(source: Path, target: Path) -> None:
    """Atomic: a process that has the old module mapped keeps it, and no reader ever sees half a file."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, part)
    os.replace(part, target)


class DistInfo(dist_info):
    """The metadata of a wheel, asked for before its dependencies are fetched: stop before gigabytes of torch come."""

    def run(self):
        find_torch()
        super().run()


class BuildPy(build_py):
    def run(self):
        # A reused build/lib would put modules deleted since into the wheel.
        if not getattr(self, "editable_mode", False):
            shutil.rmtree(Path(self.build_lib) / "opd_engine", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        try:
            import pybind11
        except ImportError:
            sys.exit(f"opd_engine: pybind11 is missing; {REQUIRES}")
        torch_dir, torch_version = find_torch()
        environment = hashlib.sha256(f"{sys.prefix}|{torch_dir}".encode()).hexdigest()[:8]
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{environment}"
        build_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build_dir / "out"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "OPD_TORCH_DIR": torch_dir,
            "OPD_TORCH_VERSION": torch_version,
            **{name: os.environ.get(name, default) for name, default in DEFAULTS.items()},
        }
        cmake = tool("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        with open(build_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once must not share one ninja folder
            quiet = {"stdout": subprocess.DEVNULL} if self.verbose < 1 else {}
            if subprocess.run(configure, **quiet).returncode:
                sys.exit("opd_engine: CMake could not configure the build; its message is above")
            if subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs, "--", "--quiet"]).returncode:
                sys.exit("opd_engine: the compiler failed; its message is above")
            name = Path(self.get_ext_filename(self.get_ext_fullname(ext.name))).name
            replace_if_changed(build_dir / "out" / name, Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self):
        for ext in self.extensions:
            name = Path(self.get_ext_filename(self.get_ext_fullname(ext.name)))
            replace_if_changed(Path(self.build_lib) / name, ROOT / name)


setup(
    ext_modules=[Extension("opd_engine._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy, "dist_info": DistInfo},
)
