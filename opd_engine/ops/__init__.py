"""The ops on one shard, `torch.ops.opd_engine.*`: schema in csrc/ops/schema.cpp, fakes and autograd here.

They never communicate and hold no policy: the functional API puts collectives between a `*_partials` op and its
`merge_*`. T is the product of the logits' leading dimensions; every row output is flat, `[T, ...]`. Scores are float64
for float64 logits, else float32. `stats [T, 5]` holds `(m, s, w, m_tail, s_tail)` of docs/math.md (5); `upstream
[T, k + 4]` holds the gradients `(d_log_probs[k], d_tail, d_lse, d_entropy, d_target)`; `packed [T, words]` int32 is one
shard's top-k message: k values, 5 statistics, the target's logit if there is a target, k int32 global ids.
"""

from opd_engine import _C  # noqa: F401  (the ops themselves)
from opd_engine.choices import DIVERGENCES, TAIL_MODES
from opd_engine.ops import autograd as _autograd  # noqa: F401  (registers)
from opd_engine.ops import fakes as _fakes  # noqa: F401  (registers)
from opd_engine.ops.build_info import build_info, take_topk_fallbacks
from opd_engine.ops.debug import debug, debug_enabled
from opd_engine.ops.layout import NUM_STATS, score_dtype

__all__ = [
    "DIVERGENCES",
    "NUM_STATS",
    "TAIL_MODES",
    "build_info",
    "debug",
    "debug_enabled",
    "score_dtype",
    "take_topk_fallbacks",
]
