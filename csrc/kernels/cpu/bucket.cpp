// Divergence of two distributions on k support ids and one tail bucket, with its derivative with respect to the
// student's log-probabilities. Bound: k + 1 terms a row, in double. docs/math.md, "Tail modes".
#include <algorithm>
#include <vector>

#include "kernels/cpu/kernels.h"
#define OPD_DIVERGENCE_NAMESPACE opd::cpu::scalar
#include "kernels/divergence.h"

namespace opd::cpu {

namespace {

using scalar::kInfinity;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Workspace {
  std::vector<double> log_q, log_p, gradient;
  explicit Workspace(int64_t size) : log_q(size), log_p(size), gradient(size) {}
};

double log_sum_exp(const double* x, int64_t count) {
  double max = -kInfinity, sum = 0;
  for (int64_t i = 0; i < count; ++i) max = x[i] > max || x[i] != x[i] ? x[i] : max;
  if (!(max > -kInfinity && max < kInfinity)) return max;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(x[i] - max);
  return max + std::log(sum);
}

template <class Score>
void bucket_row(const BucketDivergenceParams& p, int64_t row, Workspace* w) {
  const int64_t* ids = p.indices + row * p.k;
  const Score* student = static_cast<const Score*>(p.student_log_probs) + row * p.k;
  const Score* teacher = static_cast<const Score*>(p.teacher_log_probs) + row * p.k;
  const double student_tail = static_cast<const Score*>(p.student_tail)[row];
  const double teacher_tail = static_cast<const Score*>(p.teacher_tail)[row];
  Score* grad = static_cast<Score*>(p.grad_log_probs) + row * p.k;
  Score* loss = static_cast<Score*>(p.loss) + row;
  Score* grad_tail = static_cast<Score*>(p.grad_tail) + row;
  if (student_tail != student_tail || teacher_tail != teacher_tail) {
    *loss = *grad_tail = static_cast<Score>(kNaN);
    for (int64_t j = 0; j < p.k; ++j) grad[j] = static_cast<Score>(ids[j] == kAbsent ? 0 : kNaN);
    return;
  }

  // Present buckets, the tail last; the floor holds where the student can reach.
  int64_t count = 0;
  double added_mass = 0;
  const auto push = [&](double log_q, double log_p) {
    if (p.has_floor && log_q > -kInfinity && log_p < p.teacher_log_prob_min) {
      added_mass -= std::exp(p.teacher_log_prob_min) * std::expm1(log_p - p.teacher_log_prob_min);
      log_p = p.teacher_log_prob_min;
    }
    w->log_q[count] = log_q;
    w->log_p[count++] = log_p;
  };
  for (int64_t j = 0; j < p.k; ++j) {
    if (ids[j] != kAbsent) push(student[j], teacher[j]);
  }
  const int64_t num_present = count;
  const bool renormalize = p.tail == TailMode::kRenormalize, has_tail = p.tail == TailMode::kBucket;
  if (has_tail) push(student_tail, teacher_tail);

  double value = 0;
  if (renormalize && num_present < 2) {
    std::fill(w->gradient.begin(), w->gradient.begin() + num_present, 0.0);
  } else {
    if (renormalize) {
      const double q_mass = log_sum_exp(w->log_q.data(), count), p_mass = log_sum_exp(w->log_p.data(), count);
      for (int64_t i = 0; i < count; ++i) {
        w->log_q[i] -= q_mass;
        w->log_p[i] -= p_mass;
      }
    }
    double gradient_sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const auto term = scalar::bucket_term<scalar::ScalarMath>(p.divergence, w->log_q[i], w->log_p[i],
                                                                p.tail == TailMode::kTruncate);
      value += term.value;
      gradient_sum += term.gradient;
      w->gradient[i] = term.gradient;
    }
    if (renormalize) {
      for (int64_t i = 0; i < count; ++i) {
        const double q = std::exp(w->log_q[i]);
        if (q != 0) w->gradient[i] -= q * gradient_sum;
      }
    } else if (has_tail) {
      value += scalar::floored_mass_correction(p.divergence, added_mass);
    }
  }
  *loss = static_cast<Score>(value);
  *grad_tail = static_cast<Score>(has_tail ? w->gradient[num_present] : 0);
  int64_t next = 0;
  for (int64_t j = 0; j < p.k; ++j) grad[j] = static_cast<Score>(ids[j] == kAbsent ? 0 : w->gradient[next++]);
}

}  // namespace

void bucket_divergence(const BucketDivergenceParams& p, int64_t begin, int64_t end) {
  Workspace workspace(p.k + 1);
  for (int64_t row = begin; row < end; ++row) {
    p.is_float64 ? bucket_row<double>(p, row, &workspace) : bucket_row<float>(p, row, &workspace);
  }
}

namespace {

// upstream = weight (grad_log_probs, grad_tail), 0, 0, 0; a masked row's derivative may be infinite, and counts
// nothing.
template <class Score>
void weigh_row(Score weight, int64_t k, const Score* grad_log_probs, Score grad_tail, Score* upstream) {
  const auto weigh = [weight](Score gradient) { return weight == 0 ? Score{0} : gradient * weight; };
  std::transform(grad_log_probs, grad_log_probs + k, upstream, weigh);
  upstream[k] = weigh(grad_tail);
  std::fill(upstream + k + 1, upstream + k + 4, Score{0});
}

template <class Score>
void weigh_rows(const WeighUpstreamParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    weigh_row(static_cast<const Score*>(p.weights)[row], p.k, static_cast<const Score*>(p.grad_log_probs) + row * p.k,
              static_cast<const Score*>(p.grad_tail)[row], static_cast<Score*>(p.upstream) + row * (p.k + 4));
  }
}

// Gather, divergence and gradient of a row while it is in cache: one read from memory, one write.
template <class Score>
void distill_rows(const DistillLossParams& p, int64_t begin, int64_t end) {
  const VariantKernels* kernels = variant_kernels();
  std::vector<Score> stats(kNumStats), merged(kNumStats), support(p.k), student(p.k), upstream(p.k + 4);
  Workspace workspace(p.k + 1);
  Score tail, lse, entropy, no_target;
  for (int64_t row = begin; row < end; ++row) {
    LogitsView one = p.logits;  // this row alone, so that every buffer is one row long
    const int64_t item = p.logits.dtype == DType::kFloat64 ? 8 : p.logits.dtype == DType::kFloat32 ? 4 : 2;
    one.data = static_cast<char*>(p.logits.data) + row_offset(p.logits, row) * item;
    one.num_rows = 1;
    one.num_leading_dims = 0;
    const Temperature temperature{temperature_of(p.temperature, row), nullptr, false};
    const int64_t* ids = p.indices + row * p.k;
    const bool is_float64 = sizeof(Score) == sizeof(double);

    const GatherPartialsParams gather{one,     temperature,  p.k,           0, p.vocab_size, ids,
                                      nullptr, stats.data(), support.data()};
    kernels->gather_partials(gather, 0, 1);
    const MergeGatherParams merge{
        stats.data(), support.data(), 1,     1,    p.k,      p.vocab_size, is_float64,   temperature, ids,
        nullptr,      student.data(), &tail, &lse, &entropy, &no_target,   merged.data()};
    merge_gather(merge, 0, 1);
    const BucketDivergenceParams bucket{1,
                                        p.k,
                                        is_float64,
                                        p.divergence,
                                        p.tail,
                                        p.has_floor,
                                        p.teacher_log_prob_min,
                                        ids,
                                        student.data(),
                                        &tail,
                                        static_cast<const Score*>(p.teacher_log_probs) + row * p.k,
                                        static_cast<const Score*>(p.teacher_tail) + row,
                                        static_cast<Score*>(p.loss) + row,
                                        upstream.data(),
                                        &upstream[p.k]};
    bucket_row<Score>(bucket, 0, &workspace);
    weigh_row(static_cast<const Score*>(p.weights)[row], p.k, upstream.data(), upstream[p.k], upstream.data());
    const ScoresBackwardParams backward{one,          one, temperature, p.k,           0,
                                        p.vocab_size, ids, nullptr,     merged.data(), upstream.data()};
    kernels->scores_backward(backward, 0, 1);
  }
}

}  // namespace

void distill_loss(const DistillLossParams& p, int64_t begin, int64_t end) {
  p.logits.dtype == DType::kFloat64 ? distill_rows<double>(p, begin, end) : distill_rows<float>(p, begin, end);
}

void weigh_upstream(const WeighUpstreamParams& p, int64_t begin, int64_t end) {
  p.is_float64 ? weigh_rows<double>(p, begin, end) : weigh_rows<float>(p, begin, end);
}

}  // namespace opd::cpu
