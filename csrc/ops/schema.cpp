// Every op on one screen. All work on one shard and never communicate; collectives stand between *_partials and
// merge_* one floor up. `stats` rows are (m, s, w, m_tail, s_tail); `upstream` rows (d_log_probs[k], d_tail, d_lse,
// d_entropy, d_target). Signatures are documented in opd_engine/ops/__init__.py.
#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

// The library's name; tests build the ops once more under another, with the CUDA kernels emulated on CPU tensors.
#ifndef OPD_LIBRARY
#define OPD_LIBRARY opd_engine
#endif
#define OPD_DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)
#define OPD_IMPLEMENT(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

OPD_DEFINE(OPD_LIBRARY, m) {
  m.def(
      "topk_partials(Tensor logits, int k, Tensor? target, int vocab_start_index, int vocab_size, "
      "float temperature, Tensor? row_temperature) -> Tensor");
  m.def(
      "merge_topk(Tensor packed, int k, Tensor? target, int vocab_size, float temperature, "
      "Tensor? row_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gather_partials(Tensor logits, Tensor indices, Tensor? target, int vocab_start_index, int vocab_size, "
      "float temperature, Tensor? row_temperature) -> (Tensor, Tensor)");
  m.def(
      "merge_gather(Tensor stats, Tensor support_logits, Tensor indices, Tensor? target, int vocab_size, "
      "float temperature, Tensor? row_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "scores_backward(Tensor logits, Tensor indices, Tensor? target, Tensor stats, Tensor upstream, "
      "int vocab_start_index, int vocab_size, float temperature, Tensor? row_temperature) -> Tensor");
  m.def(
      "scores_backward_(Tensor(a!) logits, Tensor indices, Tensor? target, Tensor stats, Tensor upstream, "
      "int vocab_start_index, int vocab_size, float temperature, Tensor? row_temperature) -> ()");
  m.def(
      "topk_log_probs(Tensor logits, int k, Tensor? target, int vocab_size, float temperature, "
      "Tensor? row_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gather_log_probs(Tensor logits, Tensor indices, Tensor? target, int vocab_size, float temperature, "
      "Tensor? row_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bucket_divergence(Tensor indices, Tensor student_log_probs, Tensor student_tail, Tensor teacher_log_probs, "
      "Tensor teacher_tail, str divergence, float beta, float alpha, str tail, float? teacher_log_prob_min) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "full_divergence(Tensor student_logits, Tensor teacher_logits, Tensor student_stats, Tensor teacher_stats, "
      "int vocab_start_index, int vocab_size, int teacher_vocab_size, str divergence, float beta, float alpha, "
      "float temperature, Tensor? row_temperature) -> Tensor");
  m.def(
      "full_divergence_backward(Tensor student_logits, Tensor teacher_logits, Tensor student_stats, "
      "Tensor teacher_stats, int vocab_start_index, int vocab_size, int teacher_vocab_size, str divergence, "
      "float beta, float alpha, float temperature, Tensor? row_temperature, Tensor sums, Tensor grad_loss) -> Tensor");
  m.def(
      "full_divergence_backward_(Tensor(a!) student_logits, Tensor teacher_logits, Tensor student_stats, "
      "Tensor teacher_stats, int vocab_start_index, int vocab_size, int teacher_vocab_size, str divergence, "
      "float beta, float alpha, float temperature, Tensor? row_temperature, Tensor sums, Tensor grad_loss) -> ()");
  m.def(
      "distill_loss_(Tensor(a!) logits, Tensor indices, Tensor teacher_log_probs, Tensor teacher_tail, "
      "Tensor weights, str divergence, float beta, float alpha, str tail, float? teacher_log_prob_min, "
      "int vocab_size, float temperature, Tensor? row_temperature) -> Tensor");
}

namespace {

template <class Library>
void implement(Library& m) {
  m.impl("topk_partials", TORCH_BOX(&opd::ops::topk_partials));
  m.impl("merge_topk", TORCH_BOX(&opd::ops::merge_topk));
  m.impl("gather_partials", TORCH_BOX(&opd::ops::gather_partials));
  m.impl("merge_gather", TORCH_BOX(&opd::ops::merge_gather));
  m.impl("topk_log_probs", TORCH_BOX(&opd::ops::topk_log_probs));
  m.impl("gather_log_probs", TORCH_BOX(&opd::ops::gather_log_probs));
  m.impl("scores_backward", TORCH_BOX(&opd::ops::scores_backward));
  m.impl("scores_backward_", TORCH_BOX(&opd::ops::scores_backward_));
  m.impl("bucket_divergence", TORCH_BOX(&opd::ops::bucket_divergence));
  m.impl("full_divergence", TORCH_BOX(&opd::ops::full_divergence));
  m.impl("full_divergence_backward", TORCH_BOX(&opd::ops::full_divergence_backward));
  m.impl("full_divergence_backward_", TORCH_BOX(&opd::ops::full_divergence_backward_));
  m.impl("distill_loss_", TORCH_BOX(&opd::ops::distill_loss_));
}

}  // namespace

// One function an op for every device: ops/launch.cpp knows where a tensor's kernels run.
OPD_IMPLEMENT(OPD_LIBRARY, CPU, m) { implement(m); }
#ifdef OPD_WITH_CUDA
OPD_IMPLEMENT(OPD_LIBRARY, CUDA, m) { implement(m); }
#endif
