// Divergence on k support ids and one tail bucket, with its derivative with respect to the student's log-probabilities,
// in double. Bound: latency; one warp a row, k + 1 terms over its lanes. docs/math.md, "Tail modes".
#pragma once

#include "kernels/cuda/port.cuh"
#define OPD_DIVERGENCE_NAMESPACE opd::cuda
#include "kernels/divergence.h"

namespace opd::cuda {

constexpr int kBucketThreads = 128;

__device__ __forceinline__ double sum_warp(double value) {
  for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}
// NaN wins over every number.
__device__ __forceinline__ double max_warp(double value) {
  for (int distance = 16; distance > 0; distance >>= 1) {
    const double other = __shfl_xor_sync(kFullWarp, value, distance);
    value = other > value || other != other ? other : value;
  }
  return value;
}

struct BucketPair {
  double log_q, log_p, added_mass;
  bool present;
};

// Bucket j of a row, j = k being the tail; the floor holds where the student can reach.
__device__ inline BucketPair read_bucket(const BucketDivergenceParams& p, int64_t row, int64_t j) {
  BucketPair bucket;
  const bool is_tail = j == p.k;
  const int64_t at = row * p.k + j;
  bucket.present = is_tail || p.indices[at] != kAbsent;
  bucket.added_mass = 0;
  bucket.log_q = static_cast<const float*>(is_tail ? p.student_tail : p.student_log_probs)[is_tail ? row : at];
  bucket.log_p = static_cast<const float*>(is_tail ? p.teacher_tail : p.teacher_log_probs)[is_tail ? row : at];
  if (bucket.present && p.has_floor && bucket.log_q > -kInfinity && bucket.log_p < p.teacher_log_prob_min) {
    bucket.added_mass = -::exp(p.teacher_log_prob_min) * ::expm1(bucket.log_p - p.teacher_log_prob_min);
    bucket.log_p = p.teacher_log_prob_min;
  }
  return bucket;
}

// One row by one warp.
__device__ __noinline__ void bucket_row(const BucketDivergenceParams& p, int64_t row, int lane) {
  const double nan = ::nan("");
  const float student_tail = static_cast<const float*>(p.student_tail)[row];
  const float teacher_tail = static_cast<const float*>(p.teacher_tail)[row];
  float* loss = static_cast<float*>(p.loss) + row;
  float* grad = static_cast<float*>(p.grad_log_probs) + row * p.k;
  float* grad_tail = static_cast<float*>(p.grad_tail) + row;
  const bool poisoned = student_tail != student_tail || teacher_tail != teacher_tail;
  const bool renormalize = p.tail == TailMode::kRenormalize, has_tail = p.tail == TailMode::kBucket;

  double q_max = -kInfinity, p_max = -kInfinity, num_present = 0;
  for (int64_t j = lane; j < p.k; j += 32) {
    const BucketPair b = read_bucket(p, row, j);
    if (!b.present) continue;
    num_present += 1;
    q_max = b.log_q > q_max || b.log_q != b.log_q ? b.log_q : q_max;
    p_max = b.log_p > p_max || b.log_p != b.log_p ? b.log_p : p_max;
  }
  num_present = sum_warp(num_present);
  const bool is_constant = renormalize && num_present < 2;
  if (poisoned || is_constant) {
    for (int64_t j = lane; j < p.k; j += 32) {
      grad[j] = poisoned && p.indices[row * p.k + j] != kAbsent ? static_cast<float>(nan) : 0.0f;
    }
    if (lane == 0) *loss = *grad_tail = poisoned ? static_cast<float>(nan) : 0.0f;
    return;
  }
  double q_mass = 0, p_mass = 0;
  if (renormalize) {
    q_max = max_warp(q_max);
    p_max = max_warp(p_max);
    double q_sum = 0, p_sum = 0;
    for (int64_t j = lane; j < p.k; j += 32) {
      const BucketPair b = read_bucket(p, row, j);
      if (!b.present) continue;
      q_sum += ::exp(b.log_q - q_max);
      p_sum += ::exp(b.log_p - p_max);
    }
    q_mass = q_max + ::log(sum_warp(q_sum));
    p_mass = p_max + ::log(sum_warp(p_sum));
  }
  const bool plain = p.tail == TailMode::kTruncate;
  double value = 0, gradient_sum = 0, added_mass = 0, tail_gradient = 0;
  for (int64_t j = lane; j < p.k + (has_tail ? 1 : 0); j += 32) {
    const BucketPair b = read_bucket(p, row, j);
    double gradient = 0;
    if (b.present) {
      const auto term = bucket_term<ScalarMath>(p.divergence, b.log_q - q_mass, b.log_p - p_mass, plain);
      value += term.value;
      gradient = term.gradient;
      gradient_sum += gradient;
      added_mass += b.added_mass;
    }
    if (j < p.k) {
      grad[j] = static_cast<float>(gradient);
    } else {
      tail_gradient = gradient;
    }
  }
  value = sum_warp(value);
  added_mass = sum_warp(added_mass);
  tail_gradient = sum_warp(tail_gradient);  // held by one lane
  if (renormalize) {
    gradient_sum = sum_warp(gradient_sum);
    for (int64_t j = lane; j < p.k; j += 32) {
      const BucketPair b = read_bucket(p, row, j);
      if (!b.present) continue;
      const double q = ::exp(b.log_q - q_mass);
      const auto term = bucket_term<ScalarMath>(p.divergence, b.log_q - q_mass, b.log_p - p_mass, plain);
      grad[j] = static_cast<float>(q != 0 ? term.gradient - q * gradient_sum : term.gradient);
    }
  } else if (has_tail) {
    value += floored_mass_correction(p.divergence, added_mass);
  }
  if (lane == 0) {
    *loss = static_cast<float>(value);
    *grad_tail = static_cast<float>(tail_gradient);
  }
}

__global__ void __launch_bounds__(kBucketThreads) bucket_divergence_kernel(const BucketDivergenceParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row < p.num_rows) bucket_row(p, row, threadIdx.x & 31);
}

int launch_bucket_divergence(const BucketDivergenceParams& p, void* stream) {
  constexpr int kRowsPerBlock = kBucketThreads / 32;
  return OPD_LAUNCH(bucket_divergence_kernel, (p.num_rows + kRowsPerBlock - 1) / kRowsPerBlock, kBucketThreads, 0,
                    stream, p);
}

}  // namespace opd::cuda
