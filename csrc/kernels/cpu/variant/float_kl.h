// Forward and reverse KL over the vocabulary in float: two exponentials an element forward, one or two backward.
// r = log q - log p is taken from the difference of the logits, with the rounding of that difference carried along and
// both models' constants in one: as q -> p it loses no digit, and neither do the non-negative forms built on it
// (docs/math.md, "Divergences").
#pragma once

#include <algorithm>

#include "kernels/cpu/variant/statistics.h"

namespace opd::cpu::OPD_CPU_VARIANT {

// Columns of either model at a time: two L1-resident buffers of 8 KiB.
constexpr int64_t kFloatBlock = 2048;

// e^u - 1 - u for |u| <= 0.5: Taylor, truncated below 5e-8 of it.
OPD_INLINE FloatVec expm1_minus_u(FloatVec u) {
  FloatVec p = u * (1.0f / 40320.0f) + 1.0f / 5040.0f;
  p = p * u + 1.0f / 720.0f;
  p = p * u + 1.0f / 120.0f;
  p = p * u + 1.0f / 24.0f;
  p = p * u + 1.0f / 6.0f;
  p = p * u + 0.5f;
  return p * u * u;
}

OPD_INLINE FloatVec is_small(FloatVec u, FloatVec yes, FloatVec no) { return (u <= 0.5f) & (u >= -0.5f) ? yes : no; }

// What a column contributes to the loss, and its derivative with respect to log q.
struct FloatTerm {
  FloatVec value, gradient;
};

struct ReverseKL {
  static constexpr bool kBackwardNeedsP = false;

  // q (r + expm1(-r)); p may be anything where only the gradient is wanted.
  static OPD_ALWAYS_INLINE FloatTerm term(FloatVec q, FloatVec p, FloatVec r) {
    const FloatVec cost = q > 0.0f ? q * r : FloatVec{};
    return {is_small(r, q * expm1_minus_u(-r), (p - q) + cost), cost};
  }
  static OPD_ALWAYS_INLINE FloatTerm without_q(FloatVec p) { return {p, FloatVec{}}; }
  static OPD_ALWAYS_INLINE FloatTerm without_p(FloatVec) {
    const FloatVec infinite = splat<float>(std::numeric_limits<float>::infinity());
    return {infinite, infinite};
  }
};

struct ForwardKL {
  static constexpr bool kBackwardNeedsP = true;

  // p (expm1(r) - r), and q - p = p expm1(r)
  static OPD_ALWAYS_INLINE FloatTerm term(FloatVec q, FloatVec p, FloatVec r) {
    const FloatVec cost = p > 0.0f ? p * r : FloatVec{}, series = p * expm1_minus_u(r), excess = q - p;
    return {is_small(r, series, excess - cost), is_small(r, series + cost, excess)};
  }
  static OPD_ALWAYS_INLINE FloatTerm without_q(FloatVec) {
    const FloatVec infinite = splat<float>(std::numeric_limits<float>::infinity());
    return {infinite, -infinite};
  }
  static OPD_ALWAYS_INLINE FloatTerm without_p(FloatVec q) { return {q, q}; }
};

// One row: from logits to q, p and r. kOffset as in exp_scaled, of each model.
template <class Kind, bool kStudentOffset, bool kTeacherOffset>
struct FloatKL {
  ExponentScale<float> student, teacher;
  float student_inverse_sum, teacher_inverse_sum;
  // Two-sum of the difference of the logits, which may round; halves less their maxima hardly ever do.
  static constexpr bool kTwoSum = kStudentOffset || kTeacherOffset;
  float shift_high, shift_low;  // the difference of the logits (less their maxima) less t (log q - log p)

  // student_max, student_sum: merged statistics of the row; the teacher's likewise.
  FloatKL(double student_max, double student_sum, double teacher_max, double teacher_sum, double temperature)
      : student(exponent_scale<float>(student_max, temperature)),
        teacher(exponent_scale<float>(teacher_max, temperature)),
        student_inverse_sum(static_cast<float>(1.0 / student_sum)),
        teacher_inverse_sum(static_cast<float>(1.0 / teacher_sum)) {
    const double shift =
        (kTwoSum ? student_max - teacher_max : 0.0) + temperature * (std::log(student_sum) - std::log(teacher_sum));
    shift_high = static_cast<float>(shift);
    shift_low = static_cast<float>(shift - static_cast<double>(shift_high));
  }
  // Else |m| / t is so large that this row's exponentials want another range reduction, or m so low that they want -inf
  // told apart.
  bool is_exact() const {
    return student.is_floor_zero && teacher.is_floor_zero && (!kStudentOffset || student.is_offset_small) &&
           (!kTeacherOffset || teacher.is_offset_small);
  }

  OPD_ALWAYS_INLINE FloatVec log_ratio(FloatVec z, FloatVec teacher_z) const {
    const FloatVec d = kTwoSum ? z - teacher_z : (z - student.max) - (teacher_z - teacher.max);
    FloatVec low = splat<float>(-shift_low);
    if (kTwoSum) {  // NaN where the difference is infinite
      const FloatVec back = d - z, lost = (z - (d - back)) - (teacher_z + back);
      low += lost == lost ? lost : FloatVec{};
    }
    return ((d - shift_high) + low) * student.inverse;
  }
  OPD_ALWAYS_INLINE FloatVec student_probability(FloatVec z) const {
    FloatVec exponent2;
    return exp_scaled<float, kStudentOffset>(z, student, &exponent2) * student_inverse_sum;
  }
  OPD_ALWAYS_INLINE FloatVec teacher_probability(FloatVec z) const {
    FloatVec exponent2;
    return exp_scaled<float, kTeacherOffset>(z, teacher, &exponent2) * teacher_inverse_sum;
  }
  // Absence is told from the logits: a probability of 0 may be an exponential that underflowed.
  OPD_ALWAYS_INLINE FloatTerm term(FloatVec z, FloatVec teacher_z, FloatVec q, FloatVec p) const {
    const float absent = -std::numeric_limits<float>::infinity();
    const FloatTerm both = Kind::term(q, p, log_ratio(z, teacher_z));
    const FloatTerm only_q = Kind::without_p(q), only_p = Kind::without_q(p);
    FloatTerm out;
    out.value = teacher_z == absent ? only_q.value : both.value;
    out.gradient = teacher_z == absent ? only_q.gradient : both.gradient;
    const FloatVec p_value = teacher_z == absent ? FloatVec{} : only_p.value;
    const FloatVec p_gradient = teacher_z == absent ? FloatVec{} : only_p.gradient;
    out.value = z == absent ? p_value : out.value;
    out.gradient = z == absent ? p_gradient : out.gradient;
    return out;
  }

  OPD_ALWAYS_INLINE void add_block(const float* z, const float* teacher_z, int64_t count, double* loss,
                                   double* projected) const {
    LaneSums<float> losses, gradients;
    for (int64_t i = 0; i < count; i += kGroup<float>) {
      FloatVec value{}, gradient{};
      for (int64_t j = i; j < i + kGroup<float>; j += kLanes<float>) {
        const FloatVec zs = load(z + j), zt = load(teacher_z + j);
        const FloatTerm one = term(zs, zt, student_probability(zs), teacher_probability(zt));
        value += one.value;
        gradient += one.gradient;
      }
      losses.add(value);
      gradients.add(gradient);
    }
    *loss += losses.total();
    *projected += gradients.total();
  }

  // target = scale (gradient - q projected); it may be z.
  OPD_ALWAYS_INLINE void write_gradient(const float* z, const float* teacher_z, int64_t count, float projected,
                                        float scale, float* target) const {
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const FloatVec zs = load(z + i), zt = load(teacher_z + i), q = student_probability(zs);
      const FloatVec p = Kind::kBackwardNeedsP ? teacher_probability(zt) : FloatVec{};
      const FloatVec pull = q > 0.0f ? q * projected : FloatVec{};
      const FloatVec dz = (term(zs, zt, q, p).gradient - pull) * scale;
      store(target + i, zs == -std::numeric_limits<float>::infinity() ? FloatVec{} : dz);
    }
  }
};

// Calls body(start, count, padded, student, teacher) for every block; columns beyond the teacher's vocabulary, and the
// padding of a last group in both, are -inf.
template <class StudentScalar, class TeacherScalar, class Body>
OPD_INLINE void for_each_float_block(const StudentScalar* student, const TeacherScalar* teacher, int64_t valid,
                                     int64_t num_shared, const Body& body) {
  alignas(64) float student_buffer[kFloatBlock], teacher_buffer[kFloatBlock];
  for (int64_t start = 0; start < valid; start += kFloatBlock) {
    const int64_t count = std::min(kFloatBlock, valid - start), padded = round_up_to_group<float>(count);
    const int64_t shared = std::max<int64_t>(0, std::min(count, num_shared - start));
    const float* z = chunk_of(student + start, count, student_buffer);
    const float* teacher_z = teacher_buffer;
    if (shared == count) {
      teacher_z = chunk_of(teacher + start, count, teacher_buffer);
    } else {
      widen(teacher + start, shared, teacher_buffer);
      std::fill(teacher_buffer + shared, teacher_buffer + padded, -std::numeric_limits<float>::infinity());
    }
    body(start, count, padded, z, teacher_z);
  }
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
