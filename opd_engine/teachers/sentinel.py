"""Whether a teacher is alive: scores that are NaN, no distribution, or the same whatever was asked end the run.

A teacher that was never loaded, lost a shard or answers for another vocabulary trains the student towards nothing, and
the loss curve shows little of it. Works on scores [rows, k] on the host, once a rollout.
"""

from __future__ import annotations

import math

from torch import Tensor

from opd_engine.functional.token_scores import TokenScores

_FEW = 8
"""Scores or rows below which sameness proves nothing."""
_SAME = 1e-4
_MASS_ERROR = 0.02


class DeadTeacherError(RuntimeError):
    """A teacher's scores cannot teach; the message names the teacher and says what is wrong with them."""


def check_alive(name: str, scores: TokenScores, tokens: Tensor, samples: Tensor, *, vocab_size: int) -> None:
    """Refuse scores that no trained teacher gives.

    scores: of the rows that count and that this teacher weighs in, on the host
    tokens: [rows], each row's own token: where all contexts are alike, so may all answers be
    samples: [rows], the sample id of each row, and vocab_size, the teacher's: for the messages

    Raises:
        DeadTeacherError: NaN; masses that do not add up to 1 (within 0.02); no mass on any id that was asked; one and
            the same log-prob everywhere (-log vocab_size: a head of zeros); one and the same distribution in every row.
    """
    rows = scores.tail_log_prob.shape[0]
    if rows == 0:
        return
    present = scores.indices != -1
    nan = (scores.log_probs.isnan() & present).any(1) | scores.tail_log_prob.isnan()
    if bool(nan.any()):
        raise DeadTeacherError(
            f"teacher {name!r}: NaN in {int(nan.sum())} of {rows} rows, first in sample {int(samples[nan][0])}"
        )
    mass = scores.log_probs.double().exp().where(present, 0.0).sum(1) + scores.tail_log_prob.double().exp()
    if float((mass - 1.0).abs().max()) > _MASS_ERROR:
        raise DeadTeacherError(
            f"teacher {name!r}: support and tail should have probability 1 together, got {float(mass.min()):.4g} to "
            f"{float(mass.max()):.4g}"
        )
    given = scores.log_probs[present]
    if given.numel() < _FEW:
        return
    finite = given[given.isfinite()].double()
    contexts_differ = tokens.unique().numel() >= _FEW // 2
    if finite.numel() == 0:
        if not contexts_differ:
            return
        raise DeadTeacherError(f"teacher {name!r}: no mass on any of the {given.numel()} ids that were asked")
    # One id a row that is certain, or one context seen many times, may honestly score the same everywhere.
    telling = bool(((present & scores.log_probs.isfinite()).sum(1) > 1).any()) or (
        contexts_differ and float(finite.max()) < -_SAME
    )
    if telling and finite.numel() >= _FEW and float(finite.max() - finite.min()) <= _SAME:
        uniform = -math.log(vocab_size)
        value = float(finite.mean())
        what = (
            f"-log {vocab_size}: its head gives one and the same logit" if abs(value - uniform) < 1e-3 else "constant"
        )
        raise DeadTeacherError(f"teacher {name!r}: all {finite.numel()} scores are {value:.6g} ({what})")
    entropy = scores.entropy
    if entropy is None or rows < _FEW or not contexts_differ:
        return
    if float(entropy.min()) > _SAME and float(entropy.max() - entropy.min()) <= _SAME * 1e-2:
        raise DeadTeacherError(
            f"teacher {name!r}: one and the same distribution in all {rows} rows (entropy {float(entropy[0]):.6g}): it "
            "does not see what it scores"
        )
