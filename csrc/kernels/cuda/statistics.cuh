// Statistics of a row in float: maximum, sum e^((z-m)/t), and the same weighted by its log2. One exponential an
// element, no rescaling but when a maximum rises, which a seed makes rare. docs/math.md (5), (10), (11).
#pragma once

#include "kernels/cuda/port.cuh"

namespace opd::cuda {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kLn2F = 0.69314718055994530942f;
constexpr float kFltMax = 3.402823466e38f;
constexpr int kMaxWarps = 32;

// log2(e) / t as an unevaluated sum of two floats, and how far below the maximum an exponential is 0.
struct ExponentScale {
  float c_high, c_low, reach;
};

__device__ __forceinline__ ExponentScale exponent_scale(double temperature) {
  const double c = fmin(kLog2E / temperature, 1e30);
  const float high = static_cast<float>(c);
  return {high, static_cast<float>(c - static_cast<double>(high)), static_cast<float>(fmax(-200.0 / c, -3.4e38))};
}

// Float logits carry the roundings of z - m and of the exponent along: a small t costs no accuracy. Half-precision
// logits are 2^-9 apart at best; there one rounding of the exponent is noise, and instructions are the bound.
template <class Scalar>
constexpr bool kCompensated = sizeof(Scalar) == 4;

// e^((z - m) / t), exactly 0 where it underflows or z = -inf; exponent2 is its log2, clamped. m is finite. The
// difference is clamped, not z: beside a huge m, m + reach is m itself.
template <bool kCompensate>
__device__ __forceinline__ float exp_scaled(float z, float m, const ExponentScale& scale, float* exponent2) {
  const float d = fmaxf(z - m, scale.reach);
  if (!kCompensate) {
    *exponent2 = fmaf(d, scale.c_high, d * scale.c_low);
    return exp2_flush(*exponent2);
  }
  const float y = d * scale.c_high;
  float low = fmaf(d, scale.c_high, -y);
  low = fmaf(d, scale.c_low, low);
  const float back = d - z, lost = (z - (d - back)) + (-m - back);
  low = fmaf(lost, scale.c_high, low);
  const float e = exp2_flush(y);
  *exponent2 = y;
  return e > 0.0f ? fmaf(e * kLn2F, low, e) : 0.0f;  // low is meaningless where d was clamped
}

struct Statistics {
  float max = -kInfF, sum = 0.0f, weighted = 0.0f;  // weighted in units of log2

  __device__ __forceinline__ void raise_max(float value, const ExponentScale& scale) {
    if (!(value > max)) return;
    if (max > -kInfF) {
      float y;
      const float factor = exp_scaled<true>(max, value, scale, &y);
      weighted = factor * (weighted + y * sum);
      sum *= factor;
    }
    max = value;
  }
  // kCount values, absent ones -inf; best: their maximum.
  template <int kCount, bool kCompensate>
  __device__ __forceinline__ void add(const float (&z)[kCount], float best, const ExponentScale& scale) {
    raise_max(best, scale);
    if (!(max > -kInfF)) return;
    float pack_sum = 0.0f, pack_weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float y;
      const float e = exp_scaled<kCompensate>(z[i], max, scale, &y);
      pack_sum += e;
      pack_weighted = fmaf(e, y, pack_weighted);
    }
    sum += pack_sum;
    weighted += pack_weighted;
  }
  __device__ __forceinline__ void add_one(float z, const ExponentScale& scale) {
    const float one[1] = {z};
    add<1, true>(one, z, scale);
  }
  __device__ __forceinline__ void merge(const Statistics& other, const ExponentScale& scale) {
    if (!(other.max > -kInfF)) return;
    raise_max(other.max, scale);
    float y;
    const float factor = exp_scaled<true>(other.max, max, scale, &y);
    sum = fmaf(factor, other.sum, sum);
    weighted = fmaf(factor, fmaf(y, other.sum, other.weighted), weighted);
  }
};

template <int kCount>
__device__ __forceinline__ float max_of(const float (&z)[kCount]) {
  float best = z[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) best = fmaxf(best, z[i]);
  return best;
}

__device__ __forceinline__ Statistics shuffle_down(const Statistics& mine, int distance) {
  Statistics other;
  other.max = __shfl_down_sync(kFullWarp, mine.max, distance);
  other.sum = __shfl_down_sync(kFullWarp, mine.sum, distance);
  other.weighted = __shfl_down_sync(kFullWarp, mine.weighted, distance);
  return other;
}

// The block's statistics, on every thread, in a fixed order of merging. `shared`: kMaxWarps entries.
__device__ inline Statistics reduce_block(Statistics mine, const ExponentScale& scale, Statistics* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = (blockDim.x + 31) >> 5;
  for (int distance = 16; distance > 0; distance >>= 1) mine.merge(shuffle_down(mine, distance), scale);
  __syncthreads();  // `shared` may still be read from an earlier reduction
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  Statistics total = shared[0];
  for (int i = 1; i < num_warps; ++i) total.merge(shared[i], scale);
  return total;
}

// The largest finite value of the block, -inf where there is none. `shared`: kMaxWarps floats.
__device__ inline float max_block(float mine, float* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = (blockDim.x + 31) >> 5;
  if (!(mine < kInfF)) mine = -kInfF;
  for (int distance = 16; distance > 0; distance >>= 1) mine = fmaxf(mine, __shfl_xor_sync(kFullWarp, mine, distance));
  __syncthreads();
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  float best = shared[0];
  for (int i = 1; i < num_warps; ++i) best = fmaxf(best, shared[i]);
  return best;
}

__device__ __forceinline__ void write_statistics(const Statistics& total, const Statistics& tail, bool poisoned,
                                                 float* stats) {
  stats[kMax] = poisoned ? nan_f() : total.max;
  stats[kSum] = poisoned ? nan_f() : total.sum;
  stats[kWeighted] = poisoned ? nan_f() : total.weighted * kLn2F;
  stats[kTailMax] = poisoned ? nan_f() : tail.max;
  stats[kTailSum] = poisoned ? nan_f() : tail.sum;
}

// The piece of a row that a block works on.
struct PieceRow {
  int64_t row, piece, first_column, count;  // count: columns below the vocabulary
};

__device__ __forceinline__ PieceRow piece_row(const LogitsView& logits, const Pieces& pieces) {
  PieceRow at;
  at.row = blockIdx.x % logits.num_rows;
  at.piece = blockIdx.x / logits.num_rows;
  at.first_column = at.piece * pieces.columns;
  const int64_t left = logits.num_valid - at.first_column;
  at.count = left < 0 ? 0 : left < pieces.columns ? left : pieces.columns;
  return at;
}

template <class Scalar>
__device__ __forceinline__ Scalar* piece_pointer(const LogitsView& logits, const PieceRow& at) {
  return static_cast<Scalar*>(logits.data) + row_offset(logits, at.row) + at.first_column;
}

}  // namespace opd::cuda
