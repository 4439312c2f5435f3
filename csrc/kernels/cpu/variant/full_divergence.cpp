// Full-vocabulary divergence of one shard and its gradient (docs/math.md, "Full vocabulary"): the two KL in float where
// the logits are, everything else in double. Bound: arithmetic, one to four transcendentals an element; one read of
// each model's logits and no [T, V] tensor.
#include <algorithm>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/variant/float_kl.h"
#include "kernels/cpu/variant/statistics.h"
#define OPD_DIVERGENCE_NAMESPACE opd::cpu::OPD_CPU_VARIANT
#include "kernels/divergence.h"

namespace opd::cpu::OPD_CPU_VARIANT {

namespace {

// Natural logarithm of a positive normal double: m 2^e with m in [sqrt(1/2), sqrt(2)), atanh series of (m-1)/(m+1).
DoubleVec log_of_positive(DoubleVec x) {
  const Int64Vec bits = (Int64Vec)x;
  const Int64Vec offset = bits - 0x3fe6a09e667f3bcdLL;
  const Int64Vec exponent = offset >> 52;
  const DoubleVec m = (DoubleVec)(bits - exponent * (int64_t{1} << 52));
  const DoubleVec z = (m - 1.0) / (m + 1.0), z2 = z * z;
  DoubleVec p = splat<double>(2.0 / 23.0);
  p = p * z2 + 2.0 / 21.0;
  p = p * z2 + 2.0 / 19.0;
  p = p * z2 + 2.0 / 17.0;
  p = p * z2 + 2.0 / 15.0;
  p = p * z2 + 2.0 / 13.0;
  p = p * z2 + 2.0 / 11.0;
  p = p * z2 + 2.0 / 9.0;
  p = p * z2 + 2.0 / 7.0;
  p = p * z2 + 2.0 / 5.0;
  p = p * z2 + 2.0 / 3.0;
  const DoubleVec series = p * z2 * z;
  const DoubleVec n = __builtin_convertvector(exponent, DoubleVec);
  return n * kLn2High + ((2.0 * z + series) + n * kLn2Low);
}

struct VectorMath {
  using V = DoubleVec;
  static V exp(V x) { return opd::cpu::OPD_CPU_VARIANT::exp(x); }
  static V log(V x) { return log_of_positive(x); }
};

constexpr int64_t kBlock = 1024;  // columns at a time: four L1-resident buffers of 8 KiB

// log-probabilities of a block; NaN-free statistics are the caller's to check.
void log_probs_of_block(const double* logits, int64_t count, double max, double log_sum, double temperature,
                        double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = (logits[i] - max) / temperature - log_sum;
}

struct Row {
  double student_max, student_sum, teacher_max, teacher_sum, temperature;
  bool poisoned;
};

template <class Score>
Row read_row(const FullDivergenceParams& p, int64_t row) {
  const Score* student = static_cast<const Score*>(p.student_stats) + row * kNumStats;
  const Score* teacher = static_cast<const Score*>(p.teacher_stats) + row * kNumStats;
  const auto is_bad = [](double m) { return !(m > -kInf && m < kInf); };
  return {student[kMax],
          student[kSum],
          teacher[kMax],
          teacher[kSum],
          temperature_of(p.temperature, row),
          is_bad(student[kMax]) || is_bad(teacher[kMax])};
}

// Calls body(kl) with the row's FloatKL, where it is one of the two KL and the logits are computed with in float.
// Returns whether it did.
template <class StudentScalar, class TeacherScalar, class Body>
bool with_float_kl(const FullDivergenceParams& p, const Row& r, const Body& body) {
  if constexpr (std::is_same<ComputeOf<StudentScalar>, float>::value &&
                std::is_same<ComputeOf<TeacherScalar>, float>::value) {
    const auto run = [&](auto kind) {
      const FloatKL<decltype(kind), kCompensated<StudentScalar>, kCompensated<TeacherScalar>> kl(
          r.student_max, r.student_sum, r.teacher_max, r.teacher_sum, r.temperature);
      if (kl.is_exact()) body(kl);
      return kl.is_exact();
    };
    if (p.divergence.kind == Divergence::kReverseKL) return run(ReverseKL{});
    if (p.divergence.kind == Divergence::kForwardKL) return run(ForwardKL{});
  }
  return false;
}

// Calls body(start, count, padded, log_q, log_p) for every block of the row; columns beyond the teacher's vocabulary
// have log p = -inf, and the block's padding has both, which contributes exactly 0.
template <class StudentScalar, class TeacherScalar, class Body>
void for_each_block(const FullDivergenceParams& p, int64_t row, const Row& r, const Body& body) {
  const StudentScalar* student = row_pointer<StudentScalar>(p.student, row);
  const TeacherScalar* teacher = row_pointer<TeacherScalar>(p.teacher, row);
  const double student_log_sum = std::log(r.student_sum), teacher_log_sum = std::log(r.teacher_sum);
  alignas(64) double z[kBlock], log_q[kBlock], log_p[kBlock];
  for (int64_t start = 0; start < p.student.num_valid; start += kBlock) {
    const int64_t count = std::min(kBlock, p.student.num_valid - start);
    const int64_t shared = std::max<int64_t>(0, std::min(count, p.num_shared - start));
    const int64_t padded = round_up_to_group<double>(count);
    widen(student + start, count, z);
    log_probs_of_block(z, padded, r.student_max, student_log_sum, r.temperature, log_q);
    widen(teacher + start, shared, z);
    log_probs_of_block(z, shared, r.teacher_max, teacher_log_sum, r.temperature, log_p);
    std::fill(log_p + shared, log_p + padded, -kInf);
    body(start, count, padded, log_q, log_p);
  }
}

// The teacher may have another dtype than the student: the pair of element types, one call.
template <class Body>
void with_scalars(const FullDivergenceParams& p, const Body& body) {
  with_scalar(p.student.dtype,
              [&](auto student) { with_scalar(p.teacher.dtype, [&](auto teacher) { body(student, teacher); }); });
}

}  // namespace

void full_divergence(const FullDivergenceParams& p, int64_t begin, int64_t end) {
  with_scalars(p, [&](auto student_scalar, auto teacher_scalar) {
    using StudentScalar = decltype(student_scalar);
    using TeacherScalar = decltype(teacher_scalar);
    using Score = ScoreOf<StudentScalar>;
    for (int64_t row = begin; row < end; ++row) {
      const Row r = read_row<Score>(p, row);
      Score* sums = static_cast<Score*>(p.sums) + row * 2;
      if (r.poisoned) {
        sums[0] = sums[1] = static_cast<Score>(kNaN);
        continue;
      }
      double loss = 0, projected = 0;
      const bool done = with_float_kl<StudentScalar, TeacherScalar>(p, r, [&](const auto& kl) {
        for_each_float_block(row_pointer<StudentScalar>(p.student, row), row_pointer<TeacherScalar>(p.teacher, row),
                             p.student.num_valid, p.num_shared,
                             [&](int64_t, int64_t, int64_t padded, const float* z, const float* teacher_z) {
                               kl.add_block(z, teacher_z, padded, &loss, &projected);
                             });
      });
      sums[0] = static_cast<Score>(loss);
      sums[1] = static_cast<Score>(projected);
      if (done) continue;
      for_each_block<StudentScalar, TeacherScalar>(
          p, row, r, [&](int64_t, int64_t, int64_t padded, const double* log_q, const double* log_p) {
            DoubleVec block_loss{}, block_projected{};
            for (int64_t i = 0; i < padded; i += kLanes<double>) {
              const auto term = bucket_term<VectorMath>(p.divergence, load(log_q + i), load(log_p + i), false);
              block_loss += term.value;
              block_projected += term.gradient;
            }
            for (int lane = 0; lane < kLanes<double>; ++lane) {
              loss += block_loss[lane];
              projected += block_projected[lane];
            }
          });
      sums[0] = static_cast<Score>(loss);
      sums[1] = static_cast<Score>(projected);
    }
  });
}

void full_divergence_backward(const FullDivergenceParams& p, int64_t begin, int64_t end) {
  with_scalars(p, [&](auto student_scalar, auto teacher_scalar) {
    using Scalar = decltype(student_scalar);
    using TeacherScalar = decltype(teacher_scalar);
    using Score = ScoreOf<Scalar>;
    alignas(64) double dz[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      Scalar* grad = row_pointer<Scalar>(p.grad, row);
      const int64_t valid = p.student.num_valid, width = p.student.width;
      const double upstream = static_cast<const Score*>(p.grad_loss)[row];
      const Row r = read_row<Score>(p, row);
      std::fill(grad + valid, grad + width, round_to<Scalar>(0.0));
      if (upstream == 0 || r.poisoned) {
        std::fill(grad, grad + valid, round_to<Scalar>(upstream == 0 ? 0.0 : kNaN));
        continue;
      }
      const double projected = static_cast<const Score*>(p.sums)[row * 2 + 1], scale = upstream / r.temperature;
      const bool done = with_float_kl<Scalar, TeacherScalar>(p, r, [&](const auto& kl) {
        alignas(64) float rounded[kFloatBlock];
        for_each_float_block(
            row_pointer<Scalar>(p.student, row), row_pointer<TeacherScalar>(p.teacher, row), valid, p.num_shared,
            [&](int64_t start, int64_t count, int64_t padded, const float* z, const float* teacher_z) {
              float* out = rounded;
              if constexpr (std::is_same<Scalar, float>::value) {
                if (padded == count) out = grad + start;
              }
              kl.write_gradient(z, teacher_z, padded, static_cast<float>(projected), static_cast<float>(scale), out);
              if (out == rounded) narrow(rounded, count, grad + start);
            });
      });
      if (done) continue;
      for_each_block<Scalar, TeacherScalar>(
          p, row, r, [&](int64_t start, int64_t count, int64_t padded, const double* log_q, const double* log_p) {
            for (int64_t i = 0; i < padded; i += kLanes<double>) {
              const DoubleVec lq = load(log_q + i), q = VectorMath::exp(lq);
              const auto term = bucket_term<VectorMath>(p.divergence, lq, load(log_p + i), false);
              const DoubleVec pull = q > 0.0 ? q * projected : DoubleVec{};
              store(dz + i, lq == -kInf ? DoubleVec{} : scale * (term.gradient - pull));
            }
            narrow(dz, count, grad + start);
          });
    }
  });
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
