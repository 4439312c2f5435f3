"""Say in one line which system package is missing, before anything is installed. Runs on any Python 3, stdlib only."""

import importlib.util
import os
import shutil
import sys
import sysconfig

if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "opd_engine needs Python 3.10 to 3.13; {} is {}.{}. Choose another: make PYTHON=python3.12 ...".format(
            sys.executable, *sys.version_info[:2]
        )
    )
missing = []
if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "c++", "g++", "clang++")):
    missing.append(("a C++17 compiler", "g++"))
if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
    missing.append(("the venv module", "python{}.{}-venv".format(*sys.version_info[:2])))
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    missing.append(("Python's headers", "python{}.{}-dev".format(*sys.version_info[:2])))
if missing:
    sys.exit(
        "opd_engine: missing {}; on Debian or Ubuntu: apt-get install {}".format(
            ", ".join(what for what, _ in missing), " ".join(package for _, package in missing)
        )
    )
