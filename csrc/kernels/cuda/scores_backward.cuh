// Gradient of all scores with respect to a shard's logits (docs/math.md, "the one backward for all"). Bound: memory,
// one read and one write; rows without upstream gradient are written, not read. One exponential an element: with E =
// e^((z - m_tail)/t), off the support dz = E (a + b log2 E). One block a row (or piece of a row).
#pragma once

#include "kernels/cuda/statistics.cuh"

namespace opd::cuda {

constexpr int kBackwardThreads = 256;

// Support and target columns, whose gradient the stream does not give, and what it is.
__host__ __device__ inline size_t backward_shared_bytes(int64_t k) {
  return static_cast<size_t>(k + 1) * (sizeof(int) + sizeof(float));
}

// Sum over the block, on every thread, in a fixed order.
__device__ inline double sum_block(double value, double* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = (blockDim.x + 31) >> 5;
  for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_down_sync(kFullWarp, value, distance);
  __syncthreads();
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < num_warps; ++i) total += shared[i];
  return total;
}

template <class Scalar>
__device__ void fill_row(Scalar* row, int64_t count, float value) {
  if (count <= 0) return;
  const RowSpan<Scalar> span(row, count);
  float lanes[Pack<Scalar>::kLanes];
#pragma unroll
  for (int lane = 0; lane < Pack<Scalar>::kLanes; ++lane) lanes[lane] = value;
  const Pack<Scalar> pack = round_pack<Scalar>(lanes);
  for (int i = threadIdx.x; i < span.packs; i += blockDim.x) *span.at(i) = pack;
  for (int i = threadIdx.x; i < span.num_ragged(); i += blockDim.x)
    row[span.ragged_column(i)] = round_to<Scalar>(value);
}

// What the streaming formula needs of a row, the same on every thread.
struct RowGradient {
  float offset, slope, tail_max;
  bool has_tail;
  double m, t, log_s, entropy, d_tail, shared_part, d_entropy, s_tail;

  // dz of one column by the full formula, in double.
  __device__ __noinline__ double exact(double z, double upstream, bool on_support) const {
    if (!(z > -static_cast<double>(kInfF))) return 0;
    const double log_q = (z - m) / t - log_s, q = ::exp(log_q);
    double dz = upstream;
    if (q > 0) dz += q * (d_entropy == 0 ? shared_part : shared_part - d_entropy * (log_q + entropy));
    if (!on_support && has_tail) {
      const double share = ::exp((z - tail_max) / t) / s_tail;
      if (share > 0) dz += d_tail * share;
    }
    return dz / t;
  }
};

struct RowUpstream {
  double sum, tail, lse, entropy, target;
};

// Out of line, like exact(): its doubles would cost the stream its registers.
__device__ __noinline__ void set_row_gradient(const float* stats, double t, const RowUpstream& up, RowGradient* out) {
  RowGradient g;
  g.m = stats[kMax];
  g.t = t;
  g.log_s = ::log(static_cast<double>(stats[kSum]));
  g.entropy = g.log_s - static_cast<double>(stats[kWeighted]) / stats[kSum];
  g.tail_max = stats[kTailMax];
  g.has_tail = g.tail_max > -kInfF;
  g.s_tail = stats[kTailSum];
  g.d_tail = g.has_tail ? up.tail : 0;
  g.d_entropy = up.entropy;
  g.shared_part = up.lse - (up.sum + g.d_tail + up.target);
  g.offset = g.slope = 0;
  if (g.has_tail) {
    const double gap = (g.tail_max - g.m) / t, tail_share = ::exp(gap) / stats[kSum];
    double a = g.d_tail / g.s_tail, b = 0;
    if (tail_share > 0) {
      a += tail_share * (up.entropy == 0 ? g.shared_part : g.shared_part - up.entropy * (gap - g.log_s + g.entropy));
      b = up.entropy == 0 ? 0 : -up.entropy * tail_share * kLn2;
    }
    g.offset = static_cast<float>(a / t);
    g.slope = static_cast<float>(b / t);
  }
  *out = g;
}

struct BackwardShared {
  double sums[kMaxWarps];
  RowGradient gradient;
};

// The piece's gradient: `width` columns of which `count` lie below the vocabulary. `up`: k log-probs, then tail, lse,
// entropy and target. `scratch`: backward_shared_bytes(k). Logits and gradient may be the same memory.
template <class Scalar>
__device__ __forceinline__ void backward_row(const Scalar* logits, Scalar* grad, int64_t count, int64_t width,
                                             int64_t first_id, int64_t vocab_size, const int64_t* ids, int k,
                                             int64_t target, const float* stats, const float* up, double t,
                                             unsigned char* scratch, BackwardShared* shared) {
  constexpr int kLanes = Pack<Scalar>::kLanes;
  int* exception_column = reinterpret_cast<int*>(scratch);
  float* exception_grad = reinterpret_cast<float*>(exception_column + k + 1);
  bool any = up[k] != 0 || up[k + 1] != 0 || up[k + 2] != 0 || (target != kAbsent && up[k + 3] != 0);
  bool invalid = is_invalid_id(target, vocab_size);
  double mine = 0;
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    invalid |= is_invalid_id(ids[j], vocab_size);
    if (ids[j] == kAbsent) continue;
    mine += up[j];
    any |= up[j] != 0;
  }
  if (!__syncthreads_or(any)) {
    fill_row(grad, width, 0.0f);
    return;
  }
  const bool finite = stats[kMax] > -kInfF && stats[kMax] < kInfF;
  if (__syncthreads_or(invalid || !finite)) {
    fill_row(grad, count, nan_f());
    fill_row(grad + count, width - count, 0.0f);
    return;
  }
  const double d_target = target == kAbsent ? 0 : up[k + 3], d_sum = sum_block(mine, shared->sums);
  if (threadIdx.x == 0) set_row_gradient(stats, t, {d_sum, up[k], up[k + 1], up[k + 2], d_target}, &shared->gradient);
  __syncthreads();
  const RowGradient& g = shared->gradient;

  // Support and target first: they read their logits before an in-place stream overwrites them.
  bool target_on_support = false;
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    const int64_t column = ids[j] - first_id;
    const bool owned = ids[j] != kAbsent && 0 <= column && column < count;
    exception_column[j] = owned ? static_cast<int>(column) : -1;
    const bool is_target = ids[j] != kAbsent && ids[j] == target;
    target_on_support |= is_target;
    if (owned) {
      exception_grad[j] =
          static_cast<float>(g.exact(to_float(logits[column]), up[j] + (is_target ? d_target : 0), true));
    }
  }
  const bool target_found = __syncthreads_or(target_on_support) != 0;
  if (threadIdx.x == 0) {
    const int64_t column = target - first_id;
    const bool owned = target != kAbsent && !target_found && 0 <= column && column < count;
    exception_column[k] = owned ? static_cast<int>(column) : -1;
    if (owned) exception_grad[k] = static_cast<float>(g.exact(to_float(logits[column]), d_target, false));
  }
  __syncthreads();

  if (g.has_tail) {
    const ExponentScale scale = exponent_scale(t);
    const float tail_max = g.tail_max, slope = g.slope, offset = g.offset;
    const auto gradient_of = [=](float z) {
      float y;
      const float e = exp_scaled<kCompensated<Scalar>>(z, tail_max, scale, &y);
      return e > 0.0f ? e * fmaf(slope, y, offset) : 0.0f;  // also where the factor is infinite
    };
    const RowSpan<const Scalar> in(logits, count);
    const RowSpan<Scalar> out(grad, count);
    if (in.head == out.head) {
      constexpr int kInFlight = 4;
      const int stride = static_cast<int>(blockDim.x);
      for (int i = threadIdx.x; i < in.packs; i += kInFlight * stride) {
        Pack<Scalar> pack[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (i + j * stride < in.packs) pack[j] = *in.at(i + j * stride);
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (i + j * stride >= in.packs) break;
          float z[kLanes];
          unpack(pack[j], z);
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) z[lane] = gradient_of(z[lane]);
          *out.at(i + j * stride) = round_pack<Scalar>(z);
        }
      }
      for (int i = threadIdx.x; i < in.num_ragged(); i += blockDim.x) {
        const int column = in.ragged_column(i);
        grad[column] = round_to<Scalar>(gradient_of(to_float(logits[column])));
      }
    } else {  // logits and gradient start at different places of a 16-byte line
      for (int column = threadIdx.x; column < in.count; column += blockDim.x) {
        grad[column] = round_to<Scalar>(gradient_of(to_float(logits[column])));
      }
    }
  } else {
    fill_row(grad, count, 0.0f);  // every off-support logit is -inf
  }
  fill_row(grad + count, width - count, 0.0f);
  __syncthreads();
  for (int j = threadIdx.x; j <= k; j += blockDim.x) {
    if (exception_column[j] >= 0) grad[exception_column[j]] = round_to<Scalar>(exception_grad[j]);
  }
}

template <class Scalar>
__global__ void __launch_bounds__(kBackwardThreads, 3)
    scores_backward_kernel(const ScoresBackwardParams p, const Pieces pieces) {
  OPD_DYNAMIC_SHARED(dynamic);
  __shared__ BackwardShared shared;
  const PieceRow at = piece_row(p.logits, pieces);
  const int64_t left = p.logits.width - at.first_column;
  backward_row(piece_pointer<Scalar>(p.logits, at), piece_pointer<Scalar>(p.grad, at), at.count,
               left < pieces.columns ? left : pieces.columns, p.vocab_start_index + at.first_column, p.vocab_size,
               p.indices + at.row * p.k, static_cast<int>(p.k), p.target == nullptr ? kAbsent : p.target[at.row],
               static_cast<const float*>(p.stats) + at.row * kNumStats,
               static_cast<const float*>(p.upstream) + at.row * (p.k + 4), temperature_of(p.temperature, at.row),
               dynamic, &shared);
}

int launch_scores_backward(const ScoresBackwardParams& p, const Pieces& pieces, void* stream) {
  return with_scalar(p.logits.dtype, [&](auto scalar) {
    return OPD_LAUNCH(scores_backward_kernel<decltype(scalar)>, p.logits.num_rows * pieces.count, kBackwardThreads,
                      backward_shared_bytes(p.k), stream, p, pieces);
  });
}

}  // namespace opd::cuda
