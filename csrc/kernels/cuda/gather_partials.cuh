// Gather: a shard's share of k given ids' logits, and its statistics with the tail over the off-support columns.
// Bound: memory, one read. A bitmap of the support in shared memory masks its columns out of the stream; they join the
// total afterwards. One block a row (or piece of a row).
#pragma once

#include "kernels/cuda/statistics.cuh"

namespace opd::cuda {

constexpr int kGatherThreads = 512;

// One bit a column, shifted so that the lanes of a pack share one byte or nibble.
__host__ __device__ inline size_t bitmap_bytes(int64_t columns) { return ((columns + 16) / 32 + 2) * 4; }

struct GatherShared {
  SharedArray<Statistics, kMaxWarps> statistics;
  float maxima[kMaxWarps];
};

struct RowMasses {
  Statistics total, tail;
  bool poisoned;
};

// Statistics of a row, and its support's logits by emit(j, z) (0 where this piece does not own the id): on every
// thread. num_ids: k ids, then the target if there is one, which is no part of the support.
template <class Scalar, class IdOf, class Emit>
__device__ __forceinline__ RowMasses gather_row(const RowSpan<const Scalar>& span, int64_t first_id, int k, int num_ids,
                                                const IdOf& id_of, const ExponentScale& scale, unsigned* bitmap,
                                                GatherShared* shared, const Emit& emit) {
  constexpr int kLanes = Pack<Scalar>::kLanes;
  constexpr bool kCompensate = kCompensated<Scalar>;
  const int num_words = static_cast<int>(bitmap_bytes(span.count) / 4);
  const int shift = (kLanes - span.head % kLanes) % kLanes;
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) bitmap[i] = 0;
  __syncthreads();
  Statistics on_support;
  bool poisoned = false;
  for (int j = threadIdx.x; j < num_ids; j += blockDim.x) {
    const int64_t column = id_of(j) - first_id;
    const bool owned = 0 <= column && column < span.count;
    const float z = owned ? to_float(span.row[column]) : 0.0f;
    emit(j, z);
    if (j < k && owned) {
      const int bit = static_cast<int>(column) + shift;
      const unsigned mark = 1u << (bit & 31);
      // An id given twice is no support: its mass would count twice in the total and once off the tail.
      const bool is_repeated = (atomicOr(&bitmap[bit >> 5], mark) & mark) != 0;
      poisoned |= is_repeated || !(z < kInfF);
      on_support.add_one(z, scale);
    }
  }
  __syncthreads();
  const auto members_at = [&](int column) { return bitmap[(column + shift) >> 5] >> ((column + shift) & 31); };
  const auto mask = [&](int column, float (&z)[kLanes]) {
    const unsigned members = members_at(column);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = (members >> lane) & 1u ? -kInfF : z[lane];
    return max_of(z);
  };

  // The maximum of the first packs: after it, a row's maximum hardly ever rises.
  Statistics tail;
  float first = -kInfF;
  if (static_cast<int>(threadIdx.x) < span.packs) {
    float z[kLanes];
    unpack(*span.at(threadIdx.x), z);
    first = mask(span.pack_column(threadIdx.x), z);
  }
  tail.max = max_block(first, shared->maxima);
  for_each_pack(span, [&](int i, const Pack<Scalar>& pack) {
    float best = pack_max(pack), z[kLanes];
    unpack(pack, z);
    poisoned |= !(best < kInfF);
    if (members_at(span.pack_column(i)) & ((1u << kLanes) - 1u)) best = mask(span.pack_column(i), z);
    tail.template add<kLanes, kCompensate>(z, best, scale);
  });
  for (int i = threadIdx.x; i < span.num_ragged(); i += blockDim.x) {
    const int column = span.ragged_column(i);
    const float z = to_float(span.row[column]);
    poisoned |= !(z < kInfF);
    if (!(members_at(column) & 1u)) tail.add_one(z, scale);
  }
  RowMasses masses;
  masses.poisoned = __syncthreads_or(poisoned) != 0;
  masses.tail = reduce_block(tail, scale, shared->statistics.get());
  masses.total = reduce_block(on_support, scale, shared->statistics.get());
  masses.total.merge(masses.tail, scale);
  return masses;
}

template <class Scalar>
__global__ void __launch_bounds__(kGatherThreads, 2)
    gather_partials_kernel(const GatherPartialsParams p, const Pieces pieces) {
  OPD_DYNAMIC_SHARED(dynamic);
  __shared__ GatherShared shared;
  const PieceRow at = piece_row(p.logits, pieces);
  const RowSpan<const Scalar> span(piece_pointer<Scalar>(p.logits, at), at.count);
  const int k = static_cast<int>(p.k), num_ids = k + (p.target != nullptr);
  const int64_t at_row = at.piece * p.logits.num_rows + at.row;
  float* support = static_cast<float*>(p.support_logits) + at_row * num_ids;
  const int64_t* ids = p.indices + at.row * p.k;
  const RowMasses masses = gather_row(
      span, p.vocab_start_index + at.first_column, k, num_ids, [&](int j) { return j < k ? ids[j] : p.target[at.row]; },
      exponent_scale(temperature_of(p.temperature, at.row)), reinterpret_cast<unsigned*>(dynamic), &shared,
      [&](int j, float z) { support[j] = z; });
  if (threadIdx.x == 0) {
    write_statistics(masses.total, masses.tail, masses.poisoned, static_cast<float*>(p.stats) + at_row * kNumStats);
  }
}

int launch_gather_partials(const GatherPartialsParams& p, const Pieces& pieces, void* stream) {
  return with_scalar(p.logits.dtype, [&](auto scalar) {
    return OPD_LAUNCH(gather_partials_kernel<decltype(scalar)>, p.logits.num_rows * pieces.count, kGatherThreads,
                      bitmap_bytes(pieces.columns), stream, p, pieces);
  });
}

}  // namespace opd::cuda
