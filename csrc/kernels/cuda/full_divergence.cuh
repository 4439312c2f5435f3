// Full-vocabulary divergence of a shard and its gradient, in double (docs/math.md, "Full vocabulary"). Bound:
// arithmetic; one read of each model's logits, no [T, V] tensor. One block a row (or piece of a row).
#pragma once

#include "kernels/cuda/bucket_divergence.cuh"
#include "kernels/cuda/scores_backward.cuh"

namespace opd::cuda {

constexpr int kFullThreads = 256;

struct FullRow {
  double student_max, student_log_sum, teacher_max, teacher_log_sum, t;
  bool poisoned;
};

__device__ inline FullRow full_row(const FullDivergenceParams& p, int64_t row) {
  const float* student = static_cast<const float*>(p.student_stats) + row * kNumStats;
  const float* teacher = static_cast<const float*>(p.teacher_stats) + row * kNumStats;
  const auto is_bad = [](float m) { return !(m > -kInfF && m < kInfF); };
  return {student[kMax],
          ::log(static_cast<double>(student[kSum])),
          teacher[kMax],
          ::log(static_cast<double>(teacher[kSum])),
          temperature_of(p.temperature, row),
          is_bad(student[kMax]) || is_bad(teacher[kMax])};
}

// The teacher's logits, of a dtype known at run time: the pair of dtypes would be nine kernels for three.
struct TeacherRow {
  const void* data;
  DType dtype;
  int64_t num_shared;  // columns of this piece below both vocabularies

  __device__ TeacherRow(const FullDivergenceParams& p, const PieceRow& at)
      : data(static_cast<const char*>(p.teacher.data) +
             (row_offset(p.teacher, at.row) + at.first_column) * (p.teacher.dtype == DType::kFloat32 ? 4 : 2)),
        dtype(p.teacher.dtype),
        num_shared(p.num_shared - at.first_column) {}
  __device__ __forceinline__ float operator[](int64_t column) const {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[column];
    return dtype == DType::kBFloat16 ? to_float(static_cast<const BFloat16*>(data)[column])
                                     : to_float(static_cast<const Float16*>(data)[column]);
  }
};

__device__ __forceinline__ BucketTerm<double> full_term(const FullDivergenceParams& p, const FullRow& r, float student,
                                                        const TeacherRow& teacher, int64_t column, double* log_q) {
  *log_q = (student - r.student_max) / r.t - r.student_log_sum;
  const double log_p =
      column < teacher.num_shared ? (teacher[column] - r.teacher_max) / r.t - r.teacher_log_sum : -kInfinity;
  return bucket_term<ScalarMath>(p.divergence, *log_q, log_p, false);
}

template <class Scalar>
__global__ void __launch_bounds__(kFullThreads)
    full_divergence_kernel(const FullDivergenceParams p, const Pieces pieces) {
  __shared__ double shared_sum[kMaxWarps];
  const PieceRow at = piece_row(p.student, pieces);
  const FullRow r = full_row(p, at.row);
  const Scalar* student = piece_pointer<Scalar>(p.student, at);
  const TeacherRow teacher(p, at);
  double loss = 0, projected = 0;
  for (int64_t column = threadIdx.x; column < at.count && !r.poisoned; column += blockDim.x) {
    double log_q;
    const auto term = full_term(p, r, to_float(student[column]), teacher, column, &log_q);
    loss += term.value;
    projected += term.gradient;
  }
  loss = sum_block(loss, shared_sum);
  projected = sum_block(projected, shared_sum);
  if (threadIdx.x == 0) {
    float* sums = static_cast<float*>(p.sums) + (at.piece * p.student.num_rows + at.row) * 2;
    sums[0] = r.poisoned ? nan_f() : static_cast<float>(loss);
    sums[1] = r.poisoned ? nan_f() : static_cast<float>(projected);
  }
}

template <class Scalar>
__global__ void __launch_bounds__(kFullThreads)
    full_divergence_backward_kernel(const FullDivergenceParams p, const Pieces pieces) {
  const PieceRow at = piece_row(p.student, pieces);
  const FullRow r = full_row(p, at.row);
  const Scalar* student = piece_pointer<Scalar>(p.student, at);
  const TeacherRow teacher(p, at);
  Scalar* grad = piece_pointer<Scalar>(p.grad, at);
  const int64_t left = p.student.width - at.first_column, width = left < pieces.columns ? left : pieces.columns;
  const float upstream = static_cast<const float*>(p.grad_loss)[at.row];
  fill_row(grad + at.count, width - at.count, 0.0f);
  if (upstream == 0 || r.poisoned) {
    fill_row(grad, at.count, upstream == 0 ? 0.0f : nan_f());
    return;
  }
  const double projected = static_cast<const float*>(p.sums)[at.row * 2 + 1], scale = upstream / r.t;
  for (int64_t column = threadIdx.x; column < at.count; column += blockDim.x) {
    double log_q;
    const auto term = full_term(p, r, to_float(student[column]), teacher, column, &log_q);
    const double q = ::exp(log_q), pull = q > 0 ? q * projected : 0;
    const double dz = log_q == -kInfinity ? 0 : scale * (term.gradient - pull);
    grad[column] = round_to<Scalar>(static_cast<float>(dz));
  }
}

int launch_full_divergence(const FullDivergenceParams& p, const Pieces& pieces, void* stream) {
  return with_scalar(p.student.dtype, [&](auto scalar) {
    return OPD_LAUNCH(full_divergence_kernel<decltype(scalar)>, p.student.num_rows * pieces.count, kFullThreads, 0,
                      stream, p, pieces);
  });
}

int launch_full_divergence_backward(const FullDivergenceParams& p, const Pieces& pieces, void* stream) {
  return with_scalar(p.student.dtype, [&](auto scalar) {
    return OPD_LAUNCH(full_divergence_backward_kernel<decltype(scalar)>, p.student.num_rows * pieces.count,
                      kFullThreads, 0, stream, p, pieces);
  });
}

}  // namespace opd::cuda
