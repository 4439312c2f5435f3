// Top-k of a shard, its statistics and the tail off its own winners. Bound: memory, one read of the logits.
//
// Sample -> floor -> stream -> exact select. A sample of 4,096 logits gives a floor that a few hundred columns reach;
// the stream lifts those into shared memory as 64-bit keys and sums the rest; a bitonic sort of the keys selects. Where
// the floor missed (too few, or more than the buffer holds) an exact radix selection re-reads the row, and a counter
// counts it. Winners leave sorted: value descending, id ascending; -inf is never one.
#pragma once

#include "kernels/cuda/statistics.cuh"

namespace opd::cuda {

constexpr int kTopkThreads = 512;
constexpr int kMaxTopk = 1024;
constexpr int kCapacity = 4096;  // keys a block holds; a narrower row needs no floor
constexpr int kSamplesPerThread = 8;
constexpr unsigned kLowestKey = 0x00800000u;  // the ordered bits just above those of -inf

using Key = unsigned long long;

// Rows whose floor missed since the counter was last reset; read by the host, for diagnosis only.
__device__ unsigned topk_fallback_counter = 0;

__device__ __forceinline__ unsigned ordered_bits(float value) {
  const unsigned raw = __float_as_uint(value + 0.0f);  // -0.0 equals +0.0
  return raw & 0x80000000u ? ~raw : raw | 0x80000000u;
}
__device__ __forceinline__ float ordered_value(unsigned ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ Key make_key(float value, int column) {
  return static_cast<Key>(ordered_bits(value)) << 32 | ~static_cast<unsigned>(column);
}
__device__ __forceinline__ float key_value(Key key) { return ordered_value(static_cast<unsigned>(key >> 32)); }
__device__ __forceinline__ int key_column(Key key) { return static_cast<int>(~static_cast<unsigned>(key)); }

struct TopkShared {
  SharedArray<Statistics, kMaxWarps> statistics;
  int counts[2][kMaxWarps];
  float maxima[kMaxWarps];
  unsigned histogram[256];
  int digit, above, found;
};

// Every thread's kSamplesPerThread logits, in runs of 32 adjacent bytes spread evenly over the row: sorted and periodic
// rows are sampled like any other, and a run is one sector of memory.
template <class Scalar>
__device__ __forceinline__ void read_sample(const RowSpan<const Scalar>& span, float (&sample)[kSamplesPerThread]) {
  constexpr int kLanes = Pack<Scalar>::kLanes, kPacks = kSamplesPerThread / kLanes;
  const int64_t runs = static_cast<int64_t>(blockDim.x) * kPacks / 2;
#pragma unroll
  for (int part = 0; part < kPacks; ++part) {
    const int64_t slot = threadIdx.x + static_cast<int64_t>(part) * blockDim.x;
    const int index = static_cast<int>((slot / 2) * (span.packs - 1) / runs) + static_cast<int>(slot & 1);
    float z[kLanes];
    unpack(*span.at(index), z);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sample[part * kLanes + lane] = z[lane];
  }
}

// The rank-th largest sample of the block, its low 16 bits cleared; at least the lowest finite float. One bit and one
// barrier a round: threads count, warps add, everyone adds the warps.
__device__ inline float sample_floor(const float (&sample)[kSamplesPerThread], int rank, TopkShared* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = (blockDim.x + 31) >> 5;
  unsigned bits[kSamplesPerThread], prefix = 0;
#pragma unroll
  for (int i = 0; i < kSamplesPerThread; ++i) bits[i] = ordered_bits(sample[i]);
  for (int bit = 31; bit >= 16; --bit) {
    const unsigned candidate = prefix | 1u << bit;
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < kSamplesPerThread; ++i) mine += bits[i] >= candidate;
    mine = __reduce_add_sync(kFullWarp, mine);
    int* counts = shared->counts[bit & 1];  // the other half may still be read
    if (lane == 0) counts[warp] = static_cast<int>(mine);
    __syncthreads();
    int total = 0;
    for (int i = 0; i < num_warps; ++i) total += counts[i];
    if (total >= rank) prefix = candidate;
  }
  return ordered_value(prefix > kLowestKey ? prefix : kLowestKey);
}

// keys[0, size) descending, size a power of two.
__device__ inline void bitonic_sort(Key* keys, int size) {
  for (int width = 2; width <= size; width <<= 1) {
    for (int stride = width >> 1; stride > 0; stride >>= 1) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const bool descending = (low & width) == 0;
        const Key a = keys[low], b = keys[high];
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Exact: the rank-th largest ordered value of the row, and how many are larger. Lanes of one digit add once together,
// so that a constant row costs no more than another.
template <class Scalar>
__device__ unsigned radix_select(const RowSpan<const Scalar>& span, int rank, TopkShared* shared, int* num_greater) {
  unsigned prefix = 0;
  *num_greater = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared->histogram[i] = 0;
    __syncthreads();
    for (int start = 0; start < span.count; start += blockDim.x) {
      const int column = start + threadIdx.x;
      const unsigned bits = column < span.count ? ordered_bits(to_float(span.row[column])) : 0;
      const bool matches = column < span.count && (shift == 24 || (bits >> (shift + 8)) == (prefix >> (shift + 8)));
      const unsigned digit = matches ? (bits >> shift) & 255u : 256u;
      const unsigned peers = __match_any_sync(kFullWarp, digit);
      if (matches && (threadIdx.x & 31) == static_cast<unsigned>(__ffs(static_cast<int>(peers)) - 1)) {
        atomicAdd(&shared->histogram[digit], static_cast<unsigned>(__popc(peers)));
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const int wanted = rank - *num_greater;
      int digit = 255, above = 0;
      while (digit > 0 && above + static_cast<int>(shared->histogram[digit]) < wanted)
        above += shared->histogram[digit--];
      shared->digit = digit;
      shared->above = above;
    }
    __syncthreads();
    prefix |= static_cast<unsigned>(shared->digit) << shift;
    *num_greater += shared->above;
  }
  return prefix;
}

// How many threads before this one have `flag`, and, in *total, how many of the block do.
__device__ inline int count_before(bool flag, int* warp_counts, int* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = (blockDim.x + 31) >> 5;
  const unsigned votes = __ballot_sync(kFullWarp, flag);
  __syncthreads();
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1u));
  *total = 0;
  for (int i = 0; i < num_warps; ++i) {
    if (i < warp) before += warp_counts[i];
    *total += warp_counts[i];
  }
  return before;
}

// The whole row again: the k winners by exact selection into keys (in column order), the rest into `rest`. Returns
// their number. Constant, periodic and adversarial rows end here.
template <class Scalar>
__device__ __noinline__ int select_exactly(const RowSpan<const Scalar>& span, int k, const ExponentScale& scale,
                                           TopkShared* shared, Key* keys, Statistics* rest) {
  int num_greater;
  const unsigned kth = radix_select(span, k, shared, &num_greater);
  // Fewer than k columns above -inf: all of them win, and -inf itself never ties.
  const bool too_few = kth < kLowestKey;
  const unsigned floor = too_few ? kLowestKey : kth;
  const int ties_wanted = too_few ? span.count : k - num_greater;
  if (threadIdx.x == 0) shared->found = 0;
  *rest = Statistics();
  int ties_seen = 0;
  for (int start = 0; start < span.count; start += blockDim.x) {
    const int column = start + threadIdx.x;
    const float z = column < span.count ? to_float(span.row[column]) : -kInfF;
    const unsigned bits = ordered_bits(z);
    const bool tie = bits == floor;
    int ties_here;
    const int before = count_before(tie, shared->counts[0], &ties_here);
    const bool wins = bits > floor || (tie && ties_seen + before < ties_wanted);
    ties_seen += ties_here;
    if (wins) {
      keys[atomicAdd(&shared->found, 1)] = make_key(z, column);
    } else {
      rest->add_one(z, scale);
    }
  }
  __syncthreads();
  return shared->found;
}

template <class Scalar>
__global__ void __launch_bounds__(kTopkThreads, 2)
    topk_partials_kernel(const TopkPartialsParams p, const Pieces pieces) {
  constexpr int kLanes = Pack<Scalar>::kLanes;
  constexpr bool kCompensate = kCompensated<Scalar>;
  OPD_DYNAMIC_SHARED(dynamic);
  Key* keys = reinterpret_cast<Key*>(dynamic);
  __shared__ TopkShared shared;
  const PieceRow at = piece_row(p.logits, pieces);
  const Scalar* logits = piece_pointer<Scalar>(p.logits, at);
  const RowSpan<const Scalar> span(logits, at.count);
  const ExponentScale scale = exponent_scale(temperature_of(p.temperature, at.row));
  const int k = static_cast<int>(p.k);

  if (threadIdx.x == 0) shared.found = 0;
  Statistics rest;
  float floor = k > 0 ? -kFltMax : kInfF;  // without a support nothing reaches it
  if (span.count > kCapacity) {
    float sample[kSamplesPerThread];
    read_sample(span, sample);
    if (k > 0) {
      const float samples = static_cast<float>(blockDim.x * kSamplesPerThread);
      const float expected = samples * static_cast<float>(k) / static_cast<float>(span.count);
      floor = sample_floor(sample, static_cast<int>(1.5f * expected + 4.0f * sqrtf(expected) + 5.0f), &shared);
    }
    float below = -kInfF;
#pragma unroll
    for (int i = 0; i < kSamplesPerThread; ++i) below = sample[i] < floor ? fmaxf(below, sample[i]) : below;
    rest.max = max_block(below, shared.maxima);  // hardly ever rises after this
  }
  __syncthreads();

  bool poisoned = false;
  const auto lift = [&](float z, int column) {
    // Beyond the capacity the row is selected exactly; counting on is enough.
    const int slot = atomicAdd(&shared.found, 1);
    if (slot < kCapacity) keys[slot] = make_key(z, column);
  };
  for_each_pack(span, [&](int i, const Pack<Scalar>& pack) {
    float best = pack_max(pack), z[kLanes];
    unpack(pack, z);
    poisoned |= !(best < kInfF);
    if (best >= floor) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        if (z[lane] >= floor) {
          lift(z[lane], span.pack_column(i) + lane);
          z[lane] = -kInfF;
        }
      }
      best = max_of(z);
    }
    rest.template add<kLanes, kCompensate>(z, best, scale);
  });
  for (int i = threadIdx.x; i < span.num_ragged(); i += blockDim.x) {
    const int column = span.ragged_column(i);
    const float z = to_float(logits[column]);
    poisoned |= !(z < kInfF);
    if (z >= floor) {
      lift(z, column);
    } else {
      rest.add_one(z, scale);
    }
  }
  const bool any_poisoned = __syncthreads_or(poisoned) != 0;
  int found = any_poisoned ? 0 : shared.found;
  __syncthreads();
  if (!any_poisoned && k > 0 && (found > kCapacity || (found < k && floor > -kFltMax))) {
    found = select_exactly(span, k, scale, &shared, keys, &rest);
    if (threadIdx.x == 0) atomicAdd(&topk_fallback_counter, 1u);
  }
  int sorted = 1;
  while (sorted < found) sorted *= 2;
  for (int i = found + threadIdx.x; i < sorted; i += blockDim.x) keys[i] = 0;
  bitonic_sort(keys, sorted);

  const int kept = found < k ? found : k;
  for (int i = kept + threadIdx.x; i < found; i += blockDim.x) rest.add_one(key_value(keys[i]), scale);
  Statistics total;
  for (int i = threadIdx.x; i < kept; i += blockDim.x) total.add_one(key_value(keys[i]), scale);
  rest = reduce_block(rest, scale, shared.statistics.get());
  total = reduce_block(total, scale, shared.statistics.get());
  total.merge(rest, scale);

  const int64_t first_id = p.vocab_start_index + at.first_column;
  int32_t* packed = p.packed + (at.piece * p.logits.num_rows + at.row) * p.packed_words;
  float* values = reinterpret_cast<float*>(packed);
  int32_t* ids = packed + p.packed_words - k;
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    values[i] = i < kept ? key_value(keys[i]) : -kInfF;
    ids[i] = i < kept ? static_cast<int32_t>(first_id + key_column(keys[i])) : -1;
  }
  if (threadIdx.x == 0) {
    write_statistics(total, rest, any_poisoned, values + k);
    if (p.target != nullptr) {
      const int64_t column = p.target[at.row] - first_id;
      values[k + kNumStats] = 0 <= column && column < at.count ? to_float(logits[column]) : 0.0f;
    }
  }
}

int launch_topk_partials(const TopkPartialsParams& p, const Pieces& pieces, void* stream) {
  return with_scalar(p.logits.dtype, [&](auto scalar) {
    return OPD_LAUNCH(topk_partials_kernel<decltype(scalar)>, p.logits.num_rows * pieces.count, kTopkThreads,
                      kCapacity * sizeof(Key), stream, p, pieces);
  });
}

int64_t max_topk() { return kMaxTopk; }

}  // namespace opd::cuda
