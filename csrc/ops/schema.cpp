// Every op on one screen. All work on one shard and never communicate; collectives stand between *_partials and
// merge_* one floor up. `stats` rows are (m, s, w, m_tail, s_tail); `upstream` rows (d_log_probs[k], d_tail, d_lse,
// d_entropy, d_target). Signatures are documented in opd_engine/ops/__init__.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(opd_engine, m) {
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
