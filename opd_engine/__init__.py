"""On-policy distillation losses for large language models, exact under tensor parallelism.

Importing this package needs torch alone. Public names arrive floor by floor; foreign frameworks live in
`opd_engine.integrations` and are imported only when used.
"""

import sys as _sys
from os.path import basename as _basename
from typing import TYPE_CHECKING

from opd_engine._version import __version__

if TYPE_CHECKING:
    from opd_engine.functional import (
        LinearLoss,
        TokenScores,
        distill_loss,
        full_distill_loss,
        gather_log_probs,
        linear_distill_loss,
        linear_full_distill_loss,
        linear_gather_log_probs,
        linear_topk_log_probs,
        topk_log_probs,
    )
    from opd_engine.ops import debug
    from opd_engine.parallel import VocabShard, local_logits
    from opd_engine.teachers import mix_teachers

__all__ = [
    "LinearLoss",
    "TokenScores",
    "VocabShard",
    "__version__",
    "debug",
    "distill_loss",
    "full_distill_loss",
    "gather_log_probs",
    "linear_distill_loss",
    "linear_full_distill_loss",
    "linear_gather_log_probs",
    "linear_topk_log_probs",
    "local_logits",
    "mix_teachers",
    "topk_log_probs",
]


def _load() -> None:
    """Import torch, the compiled module and the public names.

    Raises: ImportError that says what to install or build.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "opd_engine needs torch >= 2.10, which cannot be imported here. Install the build that fits this machine "
            "first (for example: pip install torch==2.13.0), then install opd_engine again, so that its compiled "
            f"module is built against it. The import said: {error}"
        ) from error
    try:
        from opd_engine import _C  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "opd_engine's compiled module _C is missing or does not load in this Python with "
            f"torch {torch.__version__}. In a source checkout run `make build` (or: pip install --no-build-isolation "
            ".); an installed package was built for another Python or an older torch than 2.10 and must be "
            f"reinstalled. The import said: {error}"
        ) from error
    from opd_engine import functional, ops, parallel, teachers

    for name in set(__all__) - {"__version__"}:
        home = next(floor for floor in (functional, ops, parallel, teachers) if name in floor.__all__)
        globals()[name] = getattr(home, name)


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


# The command answers --help, --version and a mistake before torch is there: seconds earlier. It calls _load by itself.
if not (_sys.argv[0] == "-m" or _basename(_sys.argv[0]) == "opd-engine"):
    _load()
