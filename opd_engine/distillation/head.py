"""Some rows at the LM head, ready to be scored: as logits, or as hidden states whose logits exist a chunk at a time.

A framework brings its rows here and knows no more of the loss; both give scores with a gradient, the second also the
loss itself, in three products instead of four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_engine.functional.linear_losses import LinearLoss, linear_distill_loss
from opd_engine.functional.linear_scores import linear_gather_log_probs, linear_topk_log_probs
from opd_engine.functional.scores import gather_log_probs, topk_log_probs
from opd_engine.functional.token_scores import TokenScores
from opd_engine.parallel.vocab import VocabShard


@dataclass(frozen=True)
class LogitRows:
    """Wanted rows as logits. logits: [n, vocab_shard_size], in the model's dtype."""

    logits: Tensor
    shard: VocabShard

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def topk(self, k: int, **options) -> TokenScores:
        return topk_log_probs(self.logits, k, shard=self.shard, **options)

    def gather(self, indices: Tensor, *, inplace_backward: bool = False, **options) -> TokenScores:
        return gather_log_probs(self.logits, indices, shard=self.shard, inplace_backward=inplace_backward, **options)


@dataclass(frozen=True)
class HiddenRows:
    """Wanted rows as hidden states [n, hidden_size], whose logits exist a chunk at a time.

    weight: [vocab_shard_size, hidden_size]; logit_softcap: c of logits c tanh(z / c), or None
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    shard: VocabShard
    workspace_bytes: int
    logit_softcap: float | None = None

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def topk(self, k: int, **options) -> TokenScores:
        return linear_topk_log_probs(self.hidden, self.weight, k, **self._options(), **options)

    def gather(self, indices: Tensor, *, inplace_backward: bool = False, **options) -> TokenScores:
        """Four products: the backward computes the logits again.

        inplace_backward: has no meaning here, the gradient of the logits always overwrites them.
        """
        return linear_gather_log_probs(self.hidden, self.weight, indices, **self._options(), **options)

    def distill(self, teacher: TokenScores, **options) -> LinearLoss:
        """Three products: the gradients are computed with the loss, and scaled in the backward."""
        return linear_distill_loss(self.hidden, self.weight, teacher, **self._options(), **options)

    def _options(self) -> dict:
        return {
            "bias": self.bias,
            "shard": self.shard,
            "workspace_bytes": self.workspace_bytes,
            "logit_softcap": self.logit_softcap,
        }
