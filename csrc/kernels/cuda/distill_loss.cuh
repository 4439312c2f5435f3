// Gather, bucket divergence and gradient of a row by one block: one read and one write of memory. With one block an SM
// the rows in flight stay in the second-level cache, where the backward's read finds them. Bound: memory.
#pragma once

#include "kernels/cuda/bucket_divergence.cuh"
#include "kernels/cuda/gather_partials.cuh"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/scores_backward.cuh"

namespace opd::cuda {

constexpr int kDistillThreads = 768;

// Dynamic shared memory: the support's logits, its student log-probs, the upstream gradients, the backward's scratch,
// the bitmap.
__host__ __device__ inline size_t distill_scores_bytes(int64_t k) {
  return (static_cast<size_t>(3 * k + 4) * sizeof(float) + backward_shared_bytes(k) + 15) / 16 * 16;
}
__host__ __device__ inline size_t distill_shared_bytes(int64_t k, int64_t columns) {
  return distill_scores_bytes(k) + bitmap_bytes(columns);
}

__device__ __noinline__ void set_row_scores(const float* stats, double t, RowScores* scores) {
  Mass total, tail;
  total.add(stats[kMax], stats[kSum], stats[kWeighted], t);
  tail.add(stats[kTailMax], stats[kTailSum], 0, t);
  *scores = finish(total, tail, t);
}

template <class Scalar>
__global__ void __launch_bounds__(kDistillThreads, 1)
    distill_loss_kernel(const DistillLossParams p, const Pieces whole) {
  OPD_DYNAMIC_SHARED(dynamic);
  __shared__ GatherShared gather_shared;
  __shared__ BackwardShared backward_shared;
  __shared__ RowScores scores;
  __shared__ BucketDivergenceParams bucket;
  __shared__ float stats[kNumStats], student_tail;
  const int k = static_cast<int>(p.k);
  float* support = reinterpret_cast<float*>(dynamic);
  float *student = support + k, *upstream = student + k;
  unsigned char* scratch = reinterpret_cast<unsigned char*>(upstream + k + 4);
  unsigned* bitmap = reinterpret_cast<unsigned*>(dynamic + distill_scores_bytes(k));

  const PieceRow at = piece_row(p.logits, whole);
  Scalar* logits = piece_pointer<Scalar>(p.logits, at);
  const int64_t* ids = p.indices + at.row * p.k;
  const double t = temperature_of(p.temperature, at.row);
  const RowMasses masses = gather_row(
      RowSpan<const Scalar>(logits, at.count), 0, k, k, [&](int j) { return ids[j]; }, exponent_scale(t), bitmap,
      &gather_shared, [&](int j, float z) { support[j] = z; });
  if (threadIdx.x == 0) {
    write_statistics(masses.total, masses.tail, masses.poisoned, stats);
    set_row_scores(stats, t, &scores);
    student_tail = static_cast<float>(scores.tail_log_prob);
    bucket.num_rows = 1;
    bucket.k = p.k;
    bucket.divergence = p.divergence;
    bucket.tail = p.tail;
    bucket.has_floor = p.has_floor;
    bucket.teacher_log_prob_min = p.teacher_log_prob_min;
    bucket.indices = ids;
    bucket.student_log_probs = student;
    bucket.student_tail = &student_tail;
    bucket.teacher_log_probs = static_cast<const float*>(p.teacher_log_probs) + at.row * p.k;
    bucket.teacher_tail = static_cast<const float*>(p.teacher_tail) + at.row;
    bucket.loss = static_cast<float*>(p.loss) + at.row;
    bucket.grad_log_probs = upstream;
    bucket.grad_tail = upstream + k;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    student[j] = log_prob_of_id(scores, ids[j], p.vocab_size, support[j], t);
  }
  __syncthreads();
  if (threadIdx.x < 32) bucket_row(bucket, 0, threadIdx.x);  // one warp
  __syncthreads();
  const float weight = static_cast<const float*>(p.weights)[at.row];
  for (int j = threadIdx.x; j < k + 4; j += blockDim.x) {
    upstream[j] = j > k || weight == 0 ? 0.0f : upstream[j] * weight;
  }
  __syncthreads();
  backward_row(static_cast<const Scalar*>(logits), logits, at.count, p.logits.width, 0, p.vocab_size, ids, k, kAbsent,
               stats, upstream, t, scratch, &backward_shared);
}

__global__ void __launch_bounds__(kMergeThreads) weigh_upstream_kernel(const WeighUpstreamParams p) {
  const int64_t row = blockIdx.x;
  const float weight = static_cast<const float*>(p.weights)[row];
  float* upstream = static_cast<float*>(p.upstream) + row * (p.k + 4);
  for (int64_t j = threadIdx.x; j < p.k + 4; j += blockDim.x) {
    float gradient = 0;
    if (j < p.k) gradient = static_cast<const float*>(p.grad_log_probs)[row * p.k + j];
    if (j == p.k) gradient = static_cast<const float*>(p.grad_tail)[row];
    upstream[j] = weight == 0 ? 0.0f : gradient * weight;
  }
}

int launch_weigh_upstream(const WeighUpstreamParams& p, void* stream) {
  return OPD_LAUNCH(weigh_upstream_kernel, p.num_rows, kMergeThreads, 0, stream, p);
}

int launch_distill_loss(const DistillLossParams& p, void* stream) {
  const Pieces whole{1, p.logits.width};
  return with_scalar(p.logits.dtype, [&](auto scalar) {
    return OPD_LAUNCH(distill_loss_kernel<decltype(scalar)>, p.logits.num_rows, kDistillThreads,
                      distill_shared_bytes(p.k, p.logits.width), stream, p, whole);
  });
}

}  // namespace opd::cuda
