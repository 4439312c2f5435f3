"""Print the directory and the version of the torch to build against, one a line, without importing it.

It sees the target environment even under pip's build isolation, where torch cannot be imported: `sysconfig` still
names that environment's site-packages. OPD_TORCH_DIR (the folder that holds torch/include) overrides.
"""

import importlib.util
import os
import re
import sys
import sysconfig

HINT = "opd_engine: no torch >= 2.10 in this environment ({}). Install it first, for example: pip install torch==2.13.0"


def candidates():
    if os.environ.get("OPD_TORCH_DIR"):
        yield os.environ["OPD_TORCH_DIR"]
        return
    for scheme_path in ("platlib", "purelib"):
        yield os.path.join(sysconfig.get_path(scheme_path), "torch")
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield os.path.dirname(spec.origin)


def version_of(torch_dir):
    try:
        with open(os.path.join(torch_dir, "version.py"), encoding="utf-8") as file:
            found = re.search(r"^__version__\s*(?::[^=]+)?=\s*['\"]([^'\"]+)", file.read(), re.M)
    except OSError:
        return None
    return found.group(1) if found else None


def find_torch():
    """Return (directory, version), or exit with what to do."""
    seen = []
    for torch_dir in candidates():
        version = version_of(torch_dir)
        if version is None:
            continue
        release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        has_headers = os.path.exists(os.path.join(torch_dir, "include", "torch", "csrc", "stable", "library.h"))
        if release >= (2, 10) and has_headers:
            return torch_dir, version
        seen.append(f"found {version} in {torch_dir}")
    sys.exit(HINT.format("; ".join(seen) or f"looked in {sysconfig.get_path('platlib')}"))


if __name__ == "__main__":
    print("\n".join(find_torch()))
