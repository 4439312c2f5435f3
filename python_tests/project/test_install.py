"""Installing and rebuilding: wheel, missing torch, missing module, changed sources, missing system packages.

The real tree is packed once (its objects are reused); what needs many builds uses the miniature of it.
"""

import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

from miniature import KERNEL, KERNEL_PATH, ROOT, SITE, environment, plant, run


@pytest.fixture
def miniature(tmp_path) -> Path:
    return plant(tmp_path)


@pytest.fixture(scope="module")
def once_built(tmp_path_factory) -> Path:
    tree = plant(tmp_path_factory.mktemp("once"))
    ran = build(tree)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return tree


@pytest.fixture
def built(once_built) -> Path:
    """One build for several tests; each may spoil the kernel and finds it whole again."""
    (once_built / KERNEL_PATH).write_text(KERNEL)
    ran = build(once_built)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return once_built


def build(tree: Path, **options: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, env=environment(**options))


def answer(tree: Path) -> str:
    ran = run(sys.executable, "-c", "import torch, opd_engine._C as c; print(c.answer(), c.version)", cwd=tree)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()[0]


def test_a_changed_source_is_rebuilt_and_an_unchanged_one_is_not(built):
    (module,) = built.glob("opd_engine/_C*.so")
    assert answer(built) == "42"
    first = module.stat()

    began = time.monotonic()
    assert build(built).returncode == 0
    assert (module.stat().st_mtime_ns, module.stat().st_ino) == (first.st_mtime_ns, first.st_ino)
    assert time.monotonic() - began < 15

    (built / KERNEL_PATH).write_text(KERNEL.replace("42", "43"))
    assert build(built).returncode == 0
    assert answer(built) == "43"
    # Replaced, not rewritten: a process that has the old file mapped must keep it.
    assert module.stat().st_ino != first.st_ino


def test_a_broken_source_fails_the_build_and_keeps_the_old_module(built):
    (built / KERNEL_PATH).write_text(KERNEL + "#error planted\n")
    ran = build(built)
    assert ran.returncode != 0 and "planted" in ran.stdout + ran.stderr
    assert answer(built) == "42"


def test_options_are_read_on_every_run(built):
    ran = build(built, OPD_CUDA="perhaps")
    assert ran.returncode != 0 and "OPD_CUDA must be AUTO, ON or OFF; got 'perhaps'" in ran.stderr
    (built / KERNEL_PATH).write_text(KERNEL + "static int unused_function() { return 1; }\n")
    assert build(built, OPD_WERROR="OFF").returncode == 0, "a warning must not stop a user's build"
    ran = build(built, OPD_WERROR="ON")
    assert ran.returncode != 0 and "unused_function" in ran.stdout + ran.stderr


def test_cuda_demanded_where_there_is_no_nvcc_is_a_clear_error(miniature, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "ld", "as", "ar", "ranlib", "nm", "strip", "objdump", "uname", "sh"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    env = {"PATH": str(tools), "CUDACXX": "", "OPD_CUDA": "ON"}
    ran = build(miniature, **env)
    assert ran.returncode != 0 and "OPD_CUDA=ON, but no nvcc was found" in " ".join(ran.stderr.split())


def only(folder: Path, *packages: str) -> str:
    """A PYTHONPATH that shows these packages of this environment and nothing else of it."""
    folder.mkdir()
    for package in packages:
        for found in (SITE / package, *SITE.glob(f"{package}-*.dist-info")):  # setuptools finds its commands in there
            (folder / found.name).symlink_to(found)
    return str(folder)


def test_without_torch_the_build_stops_at_once_and_says_what_to_do(miniature, tmp_path):
    empty = tmp_path / "empty"
    assert run(sys.executable, "-m", "venv", "--without-pip", empty).returncode == 0
    visible = only(tmp_path / "visible", "pip", "setuptools", "_distutils_hack", "pybind11", "cmake", "ninja")
    began = time.monotonic()
    ran = run(
        *(empty / "bin/python", "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", miniature),
        env=environment(PYTHONPATH=visible),
    )
    assert ran.returncode != 0
    assert "no torch >= 2.10 in this environment" in ran.stderr + ran.stdout, ran.stderr + ran.stdout
    assert "pip install torch" in ran.stderr + ran.stdout
    assert time.monotonic() - began < 20


def test_an_older_setuptools_is_named_and_what_to_install(tmp_path):
    """pip without isolation takes the setuptools of the environment; an old one fails on pyproject.toml, obscurely."""
    program = "import setuptools; setuptools.__version__ = '65.5.0'; exec(open('setup.py').read())"
    ran = run(sys.executable, "-c", f"__file__ = 'setup.py'; {program}", cwd=ROOT, env=environment())
    assert ran.returncode != 0 and ran.stderr.count("\n") == 1
    assert "setuptools 65.5.0 is too old" in ran.stderr and "'pybind11>=2.13'" in ran.stderr


def test_an_older_torch_is_named(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.8.0+cpu'\n")
    ran = run(sys.executable, ROOT / "cmake/find_torch.py", env=environment(OPD_TORCH_DIR=str(tmp_path / "torch")))
    assert ran.returncode != 0 and "found 2.8.0+cpu" in ran.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    ran = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, ROOT),
        env=environment(OPD_WERROR="ON"),  # as make has it: another answer would recompile every kernel
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (built,) = folder.glob("opd_engine-*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "opd_engine").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours
    assert "opd_engine/py.typed" in names
    (module,) = [name for name in names if name.endswith(".so")]
    assert module == "opd_engine/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    assert {Path(name).name for name in names} >= {"LICENSE", "THIRD_PARTY_NOTICES", "METADATA", "entry_points.txt"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"opd_engine"}


def test_the_installed_wheel_imports_from_anywhere(wheel, tmp_path):
    fresh = tmp_path / "fresh"
    assert run(sys.executable, "-m", "venv", "--without-pip", fresh).returncode == 0
    (target,) = fresh.glob("lib/python*/site-packages")
    (target / "torch_of_the_tests.pth").write_text(f"{SITE}\n")
    pip = (sys.executable, "-m", "pip", "--python", fresh / "bin/python", "install", "--no-deps", "--no-index")
    ran = run(*pip, "--force-reinstall", wheel, env=environment())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    program = "import opd_engine, torch; print(opd_engine.__file__); print(len(dir(torch.ops.opd_engine)))"
    ran = run(fresh / "bin/python", "-c", program, cwd=tmp_path, env=environment())
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.split()[0]).is_relative_to(fresh)
    ran = run(fresh / "bin/opd-engine", "env", cwd=tmp_path, env=environment())
    assert ran.returncode == 0 and "cpu_variant" in ran.stdout, ran.stdout + ran.stderr


def test_importing_without_torch_says_what_to_do():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import opd_engine"
    ran = run(sys.executable, "-S", "-c", program, env=environment(), cwd="/")
    assert ran.returncode != 0
    assert "ImportError: opd_engine needs torch >= 2.10" in ran.stderr and "pip install torch" in ran.stderr


def test_importing_without_the_compiled_module_says_what_to_do(tmp_path):
    shutil.copytree(ROOT / "opd_engine", tmp_path / "opd_engine", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # -S: the editable install of this environment would find the module for the copy.
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(SITE)!r}]; import opd_engine"
    ran = run(sys.executable, "-S", "-c", program, cwd="/", env=environment())
    assert ran.returncode != 0
    assert "ImportError: opd_engine's compiled module _C is missing" in ran.stderr and "make build" in ran.stderr


def test_the_environment_of_make_imports_from_any_directory(tmp_path):
    ran = run(sys.executable, "-c", "import opd_engine; print(opd_engine.__file__)", cwd=tmp_path, env=environment())
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).parent == ROOT / "opd_engine"


@pytest.mark.parametrize(
    ("pretend", "said"),
    [
        ("sys.version_info = (3, 9, 18)", "needs Python 3.10 to 3.13"),
        ("sys.version_info = (3, 14, 0)", "needs Python 3.10 to 3.13"),
        ("import shutil; shutil.which = lambda name: None", "apt-get install g++"),
        ("import os; os.path.exists = lambda path: False", "-dev"),
        ("import importlib.util as u; u.find_spec = lambda name: None", "-venv"),
    ],
)
def test_a_missing_system_package_is_named_in_one_line(pretend, said):
    program = f"import sys; {pretend}; exec(open({str(ROOT / 'cmake/check_system.py')!r}).read())"
    ran = run(sys.executable, "-c", program)
    assert ran.returncode != 0 and said in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr
