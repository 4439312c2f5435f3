"""Plain `pip install .`, isolated, finds the target environment's torch, or says in seconds that there is none.

The build requirements come from .venv/build-requires, which `make test-integrations` fills: no network here.
"""

import re
import sys
import time

import pytest

from miniature import ROOT, SITE, environment, plant, run

WHEELS = ROOT / ".venv/build-requires"


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    return folder


def install(environment_folder, tree, *options):
    assert list(WHEELS.glob("*.whl")), f"{WHEELS} is empty; run make test-integrations"
    pip = (sys.executable, "-m", "pip", "--python", environment_folder / "bin/python", "install")
    return run(*pip, *options, "--no-index", "--find-links", WHEELS, tree, env=environment())


def test_isolated_install_builds_against_the_torch_that_is_there(empty, tmp_path):
    (site,) = empty.glob("lib/python*/site-packages")
    (site / "torch").symlink_to(SITE / "torch")
    (site / "rest_of_torch.pth").write_text(f"{SITE}\n")
    ran = install(empty, plant(tmp_path), "--no-deps")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    program = "import torch, opd_engine._C as c; print(c.__file__, c.answer())"
    ran = run(empty / "bin/python", "-c", program, cwd=tmp_path, env=environment())
    assert ran.returncode == 0, ran.stderr
    assert str(site) in ran.stdout and ran.stdout.split()[1] == "42"


def test_isolated_install_without_torch_stops_before_it_fetches_one(empty, tmp_path):
    """With dependencies: pip would fetch gigabytes of torch first, and then find none to build against."""
    began = time.monotonic()
    ran = install(empty, plant(tmp_path))
    assert ran.returncode != 0
    said = ran.stdout + ran.stderr
    assert "no torch >= 2.10 in this environment" in said and "No matching distribution" not in said, said
    assert time.monotonic() - began < 60


def test_make_and_pyproject_agree_on_what_a_build_requires():
    wanted = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    given = re.search(r"^build_requires := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    said = re.search(r'^REQUIRES = "pip install (.*)"$', (ROOT / "setup.py").read_text(), re.M)[1]
    for text in (given, said):
        assert sorted(re.findall(r'"([^"]+)"', wanted)) == sorted(text.replace("'", "").split())
