"""Shapes without data, for torch.compile, FakeTensor and opcheck."""

import torch
from torch import Tensor
from torch.library import register_fake

from opd_engine.ops.layout import NUM_STATS, is_float64_message, num_rows, packed_words, score_dtype


def _scores(like: Tensor, dtype: torch.dtype, rows: int, k: int, target: Tensor | None) -> tuple[Tensor, ...]:
    """(log_probs, tail_log_prob, lse, entropy, target_log_prob)"""
    shapes = ((rows, k), (rows,), (rows,), (rows,), (rows if target is not None else 0,))
    return tuple(like.new_empty(shape, dtype=dtype) for shape in shapes)


@register_fake("opd_engine::topk_partials")
def _(logits, k, target, vocab_start_index, vocab_size, temperature, row_temperature):
    words = packed_words(k, target is not None, score_dtype(logits.dtype))
    return logits.new_empty((num_rows(logits), words), dtype=torch.int32)


@register_fake("opd_engine::merge_topk")
def _(packed, k, target, vocab_size, temperature, row_temperature):
    is_float64 = is_float64_message(packed.shape[2], k, target is not None)
    rows = packed.shape[1]
    indices = packed.new_empty((rows, k), dtype=torch.int64)
    return (indices, *_scores(packed, torch.float64 if is_float64 else torch.float32, rows, k, target))


@register_fake("opd_engine::topk_log_probs")
def _(logits, k, target, vocab_size, temperature, row_temperature):
    rows, dtype = num_rows(logits), score_dtype(logits.dtype)
    indices = logits.new_empty((rows, k), dtype=torch.int64)
    return (indices, *_scores(logits, dtype, rows, k, target))


@register_fake("opd_engine::gather_partials")
def _(logits, indices, target, vocab_start_index, vocab_size, temperature, row_temperature):
    rows, dtype = num_rows(logits), score_dtype(logits.dtype)
    width = indices.shape[1] + (target is not None)
    return logits.new_empty((rows, NUM_STATS), dtype=dtype), logits.new_empty((rows, width), dtype=dtype)


@register_fake("opd_engine::merge_gather")
def _(stats, support_logits, indices, target, vocab_size, temperature, row_temperature):
    rows, k = indices.shape
    return (*_scores(stats, stats.dtype, rows, k, target), stats.new_empty((rows, NUM_STATS)))


@register_fake("opd_engine::gather_log_probs")
def _(logits, indices, target, vocab_size, temperature, row_temperature):
    rows, dtype = num_rows(logits), score_dtype(logits.dtype)
    stats = logits.new_empty((rows, NUM_STATS), dtype=dtype)
    return (*_scores(logits, dtype, rows, indices.shape[1], target), stats)


@register_fake("opd_engine::scores_backward")
def _(
    logits, indices, target, stats, upstream, vocab_start_index, vocab_size, temperature, row_temperature
):  # one line a schema argument
    return logits.new_empty(logits.shape)


@register_fake("opd_engine::scores_backward_")
def _(logits, indices, target, stats, upstream, vocab_start_index, vocab_size, temperature, row_temperature):
    return None


@register_fake("opd_engine::bucket_divergence")
def _(indices, student_log_probs, student_tail, teacher_log_probs, teacher_tail, *_):
    return (
        student_tail.new_empty(student_tail.shape),
        student_log_probs.new_empty(student_log_probs.shape),
        student_tail.new_empty(student_tail.shape),
    )


@register_fake("opd_engine::full_divergence")
def _(student_logits, *_):
    return student_logits.new_empty((num_rows(student_logits), 2), dtype=score_dtype(student_logits.dtype))


@register_fake("opd_engine::full_divergence_backward")
def _(student_logits, *_):
    return student_logits.new_empty(student_logits.shape)


@register_fake("opd_engine::full_divergence_backward_")
def _(student_logits, *_):
    return None


@register_fake("opd_engine::distill_loss_")
def _(logits, *_):
    return logits.new_empty((num_rows(logits),), dtype=score_dtype(logits.dtype))
