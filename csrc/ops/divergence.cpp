// Divergences on buckets, on the full vocabulary, and the fused one-shard loss: check, allocate, launch.
#include <array>

#include "ops/check.h"
#include "ops/huge_pages.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace opd::ops {

std::tuple<Tensor, Tensor, Tensor> bucket_divergence(Tensor indices, Tensor student_log_probs, Tensor student_tail,
                                                     Tensor teacher_log_probs, Tensor teacher_tail,
                                                     std::string divergence, double beta, double alpha,
                                                     std::string tail, std::optional<double> teacher_log_prob_min) {
  const Context context = context_of_scores("bucket_divergence", "student_log_probs", student_log_probs);
  check_tensor(context, "indices", indices, ScalarType::Long, {-1, -1});
  BucketDivergenceParams p{};
  p.num_rows = indices.size(0);
  p.k = indices.size(1);
  check_scores(context, "student_log_probs", student_log_probs, {p.num_rows, p.k});
  check_scores(context, "student_tail", student_tail, {p.num_rows});
  check_scores(context, "teacher_log_probs", teacher_log_probs, {p.num_rows, p.k});
  check_scores(context, "teacher_tail", teacher_tail, {p.num_rows});
  p.is_float64 = context.is_float64();
  p.divergence = parse_divergence(context, divergence, beta, alpha);
  p.tail = parse_tail(context, tail);
  p.has_floor = teacher_log_prob_min.has_value();
  p.teacher_log_prob_min = teacher_log_prob_min.value_or(0);
  p.indices = static_cast<const int64_t*>(indices.data_ptr());
  p.student_log_probs = student_log_probs.data_ptr();
  p.student_tail = student_tail.data_ptr();
  p.teacher_log_probs = teacher_log_probs.data_ptr();
  p.teacher_tail = teacher_tail.data_ptr();
  Tensor loss = context.empty_scores({p.num_rows}), grad_log_probs = context.empty_scores({p.num_rows, p.k});
  Tensor grad_tail = context.empty_scores({p.num_rows});
  p.loss = loss.data_ptr();
  p.grad_log_probs = grad_log_probs.data_ptr();
  p.grad_tail = grad_tail.data_ptr();
  launch_bucket_divergence(context, p);
  return {loss, grad_log_probs, grad_tail};
}

namespace {

FullDivergenceParams full_params(const Context& context, const Tensor& student_logits, const Tensor& teacher_logits,
                                 const Tensor& student_stats, const Tensor& teacher_stats, int64_t vocab_start_index,
                                 int64_t vocab_size, int64_t teacher_vocab_size, const std::string& divergence,
                                 double beta, double alpha, double temperature, const OptionalTensor& row_temperature) {
  FullDivergenceParams p{};
  p.student = view_of(context, "student_logits", student_logits, vocab_start_index, vocab_size);
  p.teacher = view_of(context, "teacher_logits", teacher_logits, vocab_start_index, teacher_vocab_size);
  const int64_t num_tokens = p.student.num_rows;
  STD_TORCH_CHECK(p.teacher.num_rows == num_tokens, context.op, ": teacher_logits must have ", num_tokens,
                  " rows, got ", p.teacher.num_rows);
  const int64_t left = teacher_vocab_size - vocab_start_index, below = left < 0 ? 0 : left;
  p.num_shared = p.student.num_valid < below ? p.student.num_valid : below;
  STD_TORCH_CHECK(p.teacher.width >= p.num_shared, context.op, ": teacher_logits must hold the ", p.num_shared,
                  " columns this shard shares with it, got ", p.teacher.width);
  check_scores(context, "student_stats", student_stats, {num_tokens, kNumStats});
  check_scores(context, "teacher_stats", teacher_stats, {num_tokens, kNumStats});
  p.student_stats = student_stats.data_ptr();
  p.teacher_stats = teacher_stats.data_ptr();
  p.divergence = parse_divergence(context, divergence, beta, alpha);
  p.temperature = temperature_of(context, temperature, row_temperature, num_tokens);
  return p;
}

}  // namespace

Tensor full_divergence(Tensor student_logits, Tensor teacher_logits, Tensor student_stats, Tensor teacher_stats,
                       int64_t vocab_start_index, int64_t vocab_size, int64_t teacher_vocab_size,
                       std::string divergence, double beta, double alpha, double temperature,
                       OptionalTensor row_temperature) {
  const Context context = context_of("full_divergence", student_logits);
  FullDivergenceParams p =
      full_params(context, student_logits, teacher_logits, student_stats, teacher_stats, vocab_start_index, vocab_size,
                  teacher_vocab_size, divergence, beta, alpha, temperature, row_temperature);
  const Pieces pieces = pieces_of(context, p.student);
  Tensor sums = context.empty_scores({pieces.count, p.student.num_rows, 2});
  p.sums = sums.data_ptr();
  launch_full_divergence(context, p, pieces);
  return pieces.count == 1 ? torch::stable::squeeze(sums, 0) : torch::stable::sum(sums, std::array<int64_t, 1>{0});
}

namespace {

void run_full_backward(const Context& context, FullDivergenceParams p, const Tensor& grad, const Tensor& sums,
                       const Tensor& grad_loss, int64_t vocab_start_index, int64_t vocab_size) {
  check_scores(context, "sums", sums, {p.student.num_rows, 2});
  check_scores(context, "grad_loss", grad_loss, {p.student.num_rows});
  p.grad = view_of(context, "grad", grad, vocab_start_index, vocab_size);
  p.sums = sums.data_ptr();
  p.grad_loss = grad_loss.data_ptr();
  launch_full_divergence_backward(context, p);
}

}  // namespace

Tensor full_divergence_backward(Tensor student_logits, Tensor teacher_logits, Tensor student_stats,
                                Tensor teacher_stats, int64_t vocab_start_index, int64_t vocab_size,
                                int64_t teacher_vocab_size, std::string divergence, double beta, double alpha,
                                double temperature, OptionalTensor row_temperature, Tensor sums, Tensor grad_loss) {
  const Context context = context_of("full_divergence_backward", student_logits);
  Tensor grad = new_gradient(student_logits);
  run_full_backward(
      context,
      full_params(context, student_logits, teacher_logits, student_stats, teacher_stats, vocab_start_index, vocab_size,
                  teacher_vocab_size, divergence, beta, alpha, temperature, row_temperature),
      grad, sums, grad_loss, vocab_start_index, vocab_size);
  return grad;
}

void full_divergence_backward_(Tensor student_logits, Tensor teacher_logits, Tensor student_stats, Tensor teacher_stats,
                               int64_t vocab_start_index, int64_t vocab_size, int64_t teacher_vocab_size,
                               std::string divergence, double beta, double alpha, double temperature,
                               OptionalTensor row_temperature, Tensor sums, Tensor grad_loss) {
  const Context context = context_of("full_divergence_backward_", student_logits);
  run_full_backward(
      context,
      full_params(context, student_logits, teacher_logits, student_stats, teacher_stats, vocab_start_index, vocab_size,
                  teacher_vocab_size, divergence, beta, alpha, temperature, row_temperature),
      student_logits, sums, grad_loss, vocab_start_index, vocab_size);
}

namespace {

// Rows that would leave threads or multiprocessors idle: the same in four launches, whose passes cut rows into pieces.
Tensor distill_few_rows(const Context& context, const Tensor& logits, const Tensor& indices,
                        const Tensor& teacher_log_probs, const Tensor& teacher_tail, const Tensor& weights,
                        const std::string& divergence, double beta, double alpha, const std::string& tail,
                        std::optional<double> teacher_log_prob_min, int64_t vocab_size, double temperature,
                        const OptionalTensor& row_temperature) {
  const auto [log_probs, tail_log_prob, lse, entropy, no_target, stats] =
      gather_log_probs(logits, indices, std::nullopt, vocab_size, temperature, row_temperature);
  const auto [loss, grad_log_probs, grad_tail] =
      bucket_divergence(indices, log_probs, tail_log_prob, teacher_log_probs, teacher_tail, divergence, beta, alpha,
                        tail, teacher_log_prob_min);
  WeighUpstreamParams p{};
  p.num_rows = indices.size(0);
  p.k = indices.size(1);
  p.is_float64 = context.is_float64();
  p.grad_log_probs = grad_log_probs.data_ptr();
  p.grad_tail = grad_tail.data_ptr();
  p.weights = weights.data_ptr();
  Tensor upstream = context.empty_scores({p.num_rows, p.k + 4});
  p.upstream = upstream.data_ptr();
  launch_weigh_upstream(context, p);
  scores_backward_(logits, indices, std::nullopt, stats, upstream, 0, vocab_size, temperature, row_temperature);
  return loss;
}

}  // namespace

Tensor distill_loss_(Tensor logits, Tensor indices, Tensor teacher_log_probs, Tensor teacher_tail, Tensor weights,
                     std::string divergence, double beta, double alpha, std::string tail,
                     std::optional<double> teacher_log_prob_min, int64_t vocab_size, double temperature,
                     OptionalTensor row_temperature) {
  const Context context = context_of("distill_loss_", logits);
  DistillLossParams p{};
  p.logits = view_of(context, "logits", logits, 0, vocab_size);
  STD_TORCH_CHECK(p.logits.width >= vocab_size, "distill_loss_: logits must hold the whole vocabulary of ", vocab_size,
                  " columns, got ", p.logits.width);
  const int64_t num_tokens = p.logits.num_rows;
  check_tensor(context, "indices", indices, ScalarType::Long, {num_tokens, -1});
  p.k = indices.size(1);
  check_scores(context, "teacher_log_probs", teacher_log_probs, {num_tokens, p.k});
  check_scores(context, "teacher_tail", teacher_tail, {num_tokens});
  check_scores(context, "weights", weights, {num_tokens});
  p.temperature = temperature_of(context, temperature, row_temperature, num_tokens);
  p.vocab_size = vocab_size;
  p.divergence = parse_divergence(context, divergence, beta, alpha);
  p.tail = parse_tail(context, tail);
  p.has_floor = teacher_log_prob_min.has_value();
  p.teacher_log_prob_min = teacher_log_prob_min.value_or(0);
  p.indices = static_cast<const int64_t*>(indices.data_ptr());
  p.teacher_log_probs = teacher_log_probs.data_ptr();
  p.teacher_tail = teacher_tail.data_ptr();
  p.weights = weights.data_ptr();
  if (pieces_of(context, p.logits).count > 1) {
    return distill_few_rows(context, logits, indices, teacher_log_probs, teacher_tail, weights, divergence, beta, alpha,
                            tail, teacher_log_prob_min, vocab_size, temperature, row_temperature);
  }
  Tensor loss = context.empty_scores({num_tokens});
  p.loss = loss.data_ptr();
  launch_distill_loss(context, p);
  return loss;
}

}  // namespace opd::ops
