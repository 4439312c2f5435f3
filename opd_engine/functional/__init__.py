"""F3: the public functions on logits and on hidden states, and their autograd.

Read token_scores.py (what a model says about a support), scores.py (how it is computed), losses.py, full.py; then
linear_scores.py and linear_losses.py, the same from hidden states and the LM head, on linear_chunks.py.
"""

from opd_engine.functional.full import full_distill_loss
from opd_engine.functional.linear_full import linear_full_distill_loss
from opd_engine.functional.linear_losses import LinearLoss, linear_distill_loss
from opd_engine.functional.linear_scores import linear_gather_log_probs, linear_topk_log_probs
from opd_engine.functional.losses import distill_loss
from opd_engine.functional.scores import gather_log_probs, topk_log_probs
from opd_engine.functional.token_scores import TokenScores

__all__ = [
    "LinearLoss",
    "TokenScores",
    "distill_loss",
    "full_distill_loss",
    "gather_log_probs",
    "linear_distill_loss",
    "linear_full_distill_loss",
    "linear_gather_log_probs",
    "linear_topk_log_probs",
    "topk_log_probs",
]
