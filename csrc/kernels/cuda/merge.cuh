// Merging the shards' partial results into scores, in rank order and in double. Bound: latency; one block a row.
// A candidate's place among all shards is the number of better ones, found by binary search in each shard's sorted
// list: no sort, and the same place on every rank. combine = true writes one shard's partials from its pieces instead.
#pragma once

#include "kernels/cuda/topk_partials.cuh"

namespace opd::cuda {

constexpr int kMergeThreads = 128;

struct Mass {
  double max = -static_cast<double>(kInfF), sum = 0, weighted = 0;
  bool is_nan = false;

  __device__ void add(double other_max, double other_sum, double other_weighted, double temperature) {
    is_nan |= other_max != other_max || other_max == static_cast<double>(kInfF);
    if (is_nan || other_max == -static_cast<double>(kInfF)) return;
    if (other_max > max) {
      const double gap = (max - other_max) / temperature, factor = ::exp(gap);  // 0 while max is -inf
      weighted = factor == 0 ? 0 : factor * (weighted + gap * sum);
      sum *= factor;
      max = other_max;
    }
    const double gap = (other_max - max) / temperature, factor = ::exp(gap);
    if (factor == 0) return;
    sum += factor * other_sum;
    weighted += factor * (other_weighted + gap * other_sum);
  }
  __device__ void merge(const Mass& other, double temperature) {
    if (other.is_nan) is_nan = true;
    add(other.max, other.sum, other.weighted, temperature);
  }
};

struct RowScores {
  double max, log_sum, lse, entropy, tail_log_prob;
  bool is_nan;
};

__device__ inline RowScores finish(const Mass& total, const Mass& tail, double temperature) {
  const double nan = ::nan(""), inf = static_cast<double>(kInfF);
  if (total.is_nan || tail.is_nan || total.max == -inf) return {nan, nan, nan, nan, nan, true};
  const double log_sum = ::log(total.sum);
  const double tail_log_prob =
      tail.max == -inf ? -inf : (tail.max - total.max) / temperature + ::log(tail.sum / total.sum);
  return {total.max,     log_sum, total.max / temperature + log_sum, log_sum - total.weighted / total.sum,
          tail_log_prob, false};
}

__device__ inline float log_prob_of_id(const RowScores& scores, int64_t id, int64_t vocab_size, float z,
                                       double temperature) {
  const float nan = nan_f();
  if (id == kAbsent) return -kInfF;
  if (scores.is_nan || is_invalid_id(id, vocab_size)) return nan;
  return z == -kInfF ? -kInfF : static_cast<float>((z - scores.max) / temperature - scores.log_sum);
}

__device__ inline void write_mass(const Mass& total, const Mass& tail, bool is_nan, float* stats) {
  const float nan = nan_f();
  const double values[kNumStats] = {total.max, total.sum, total.weighted, tail.max, tail.sum};
  for (int i = 0; i < kNumStats; ++i) stats[i] = is_nan ? nan : static_cast<float>(values[i]);
}

// Deterministic block merge of per-thread masses; `shared` holds blockDim.x entries. Result on every thread.
__device__ inline Mass merge_block(const Mass& mine, double temperature, Mass* shared) {
  __syncthreads();
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int stride = blockDim.x / 2; stride > 0; stride /= 2) {
    if (static_cast<int>(threadIdx.x) < stride) shared[threadIdx.x].merge(shared[threadIdx.x + stride], temperature);
    __syncthreads();
  }
  return shared[0];
}

__global__ void __launch_bounds__(kMergeThreads) merge_topk_kernel(const MergeTopkParams p, int32_t* combined) {
  __shared__ SharedArray<Mass, kMergeThreads> storage;
  Mass* shared = storage.get();
  const int64_t row = blockIdx.x, k = p.k;
  const double temperature = temperature_of(p.temperature, row);
  const auto message = [&](int64_t rank) { return p.packed + (rank * p.num_rows + row) * p.packed_words; };
  const auto key_of = [&](int64_t rank, int64_t j) -> Key {  // 0 for an empty slot: worse than all
    const int32_t* packed = message(rank);
    const int32_t id = packed[p.packed_words - k + j];
    return id < 0 ? 0 : make_key(reinterpret_cast<const float*>(packed)[j], id);
  };
  Mass total, tail;
  double target_logit = 0;
  int64_t found = 0;
  for (int64_t rank = 0; rank < p.tp_size; ++rank) {
    const float* stats = reinterpret_cast<const float*>(message(rank)) + k;
    total.add(stats[kMax], stats[kSum], stats[kWeighted], temperature);
    tail.add(stats[kTailMax], stats[kTailSum], 0, temperature);
    if (p.target != nullptr) target_logit += stats[kNumStats];
  }
  // Losers: candidates with k or more better ones.
  Mass losers;
  int my_found = 0;
  for (int64_t slot = threadIdx.x; slot < p.tp_size * k; slot += blockDim.x) {
    const int64_t rank = slot / k, j = slot % k;
    const Key key = key_of(rank, j);
    if (key == 0) continue;
    ++my_found;
    int64_t place = j;
    for (int64_t other = 0; other < p.tp_size; ++other) {
      if (other == rank) continue;
      int64_t low = 0, high = k;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (key_of(other, middle) > key) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      place += low;
    }
    if (place >= k) losers.add(key_value(key), 1, 0, temperature);
    // The winner's place is kept in its own slot's thread until the scores are known.
    if (place < k && combined == nullptr) {
      p.indices[row * k + place] = key_column(key);
      static_cast<float*>(p.log_probs)[row * k + place] = key_value(key);
    }
    if (place < k && combined != nullptr) {
      int32_t* packed = combined + row * p.packed_words;
      reinterpret_cast<float*>(packed)[place] = key_value(key);
      packed[p.packed_words - k + place] = key_column(key);
    }
  }
  losers = merge_block(losers, temperature, shared);
  tail.merge(losers, temperature);
  for (int stride = 16; stride > 0; stride /= 2) my_found += __shfl_down_sync(kFullWarp, my_found, stride);
  __shared__ int warp_found[kMergeThreads / 32];
  if ((threadIdx.x & 31) == 0) warp_found[threadIdx.x >> 5] = my_found;
  __syncthreads();
  for (int i = 0; i < kMergeThreads / 32; ++i) found += warp_found[i];
  const int64_t kept = found < k ? found : k;

  if (combined != nullptr) {
    int32_t* packed = combined + row * p.packed_words;
    float* values = reinterpret_cast<float*>(packed);
    for (int64_t j = kept + threadIdx.x; j < k; j += blockDim.x) {
      values[j] = -kInfF;
      packed[p.packed_words - k + j] = -1;
    }
    if (threadIdx.x == 0) {
      write_mass(total, tail, total.is_nan || tail.is_nan, values + k);
      if (p.target != nullptr) values[k + kNumStats] = static_cast<float>(target_logit);
    }
    return;
  }
  const RowScores scores = finish(total, tail, temperature);
  const float nan = nan_f();
  float* log_probs = static_cast<float*>(p.log_probs) + row * k;
  for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
    const bool present = j < kept && !scores.is_nan;
    if (!present) p.indices[row * k + j] = kAbsent;
    log_probs[j] = present ? log_prob_of_id(scores, 0, 1, log_probs[j], temperature) : scores.is_nan ? nan : -kInfF;
  }
  if (threadIdx.x == 0) {
    static_cast<float*>(p.tail_log_prob)[row] = static_cast<float>(scores.tail_log_prob);
    static_cast<float*>(p.lse)[row] = static_cast<float>(scores.lse);
    static_cast<float*>(p.entropy)[row] = static_cast<float>(scores.entropy);
    if (p.target != nullptr) {
      static_cast<float*>(p.target_log_prob)[row] =
          log_prob_of_id(scores, p.target[row], p.vocab_size, static_cast<float>(target_logit), temperature);
    }
  }
}

template <bool kCombine>
__global__ void __launch_bounds__(kMergeThreads) merge_gather_kernel(const MergeGatherParams p) {
  const int64_t row = blockIdx.x, support_width = p.k + (p.target != nullptr);
  const double temperature = temperature_of(p.temperature, row);
  Mass total, tail;
  for (int64_t rank = 0; rank < p.tp_size; ++rank) {
    const float* stats = static_cast<const float*>(p.stats) + (rank * p.num_rows + row) * kNumStats;
    total.add(stats[kMax], stats[kSum], stats[kWeighted], temperature);
    tail.add(stats[kTailMax], stats[kTailSum], 0, temperature);
  }
  float* log_probs = static_cast<float*>(p.log_probs);
  const float* support = static_cast<const float*>(p.support_logits);
  if (kCombine) {  // log_probs receives the pieces' summed support logits
    for (int64_t j = threadIdx.x; j < support_width; j += blockDim.x) {
      float sum = 0;
      for (int64_t piece = 0; piece < p.tp_size; ++piece)
        sum += support[(piece * p.num_rows + row) * support_width + j];
      log_probs[row * support_width + j] = sum;
    }
    if (threadIdx.x == 0) {
      write_mass(total, tail, total.is_nan || tail.is_nan, static_cast<float*>(p.merged_stats) + row * kNumStats);
    }
    return;
  }
  const RowScores scores = finish(total, tail, temperature);
  for (int64_t j = threadIdx.x; j < p.k; j += blockDim.x) {
    log_probs[row * p.k + j] =
        log_prob_of_id(scores, p.indices[row * p.k + j], p.vocab_size, support[row * support_width + j], temperature);
  }
  if (threadIdx.x == 0) {
    static_cast<float*>(p.tail_log_prob)[row] = static_cast<float>(scores.tail_log_prob);
    static_cast<float*>(p.lse)[row] = static_cast<float>(scores.lse);
    static_cast<float*>(p.entropy)[row] = static_cast<float>(scores.entropy);
    if (p.target != nullptr) {
      static_cast<float*>(p.target_log_prob)[row] =
          log_prob_of_id(scores, p.target[row], p.vocab_size, support[row * support_width + p.k], temperature);
    }
    write_mass(total, tail, scores.is_nan, static_cast<float*>(p.merged_stats) + row * kNumStats);
  }
}

int launch_merge_topk(const MergeTopkParams& p, void* stream) {
  return OPD_LAUNCH(merge_topk_kernel, p.num_rows, kMergeThreads, 0, stream, p, nullptr);
}

int launch_combine_topk(const MergeTopkParams& p, int32_t* combined, void* stream) {
  return OPD_LAUNCH(merge_topk_kernel, p.num_rows, kMergeThreads, 0, stream, p, combined);
}

int launch_merge_gather(const MergeGatherParams& p, void* stream) {
  return OPD_LAUNCH(merge_gather_kernel<false>, p.num_rows, kMergeThreads, 0, stream, p);
}

int launch_combine_gather(const MergeGatherParams& p, void* stream) {
  return OPD_LAUNCH(merge_gather_kernel<true>, p.num_rows, kMergeThreads, 0, stream, p);
}

}  // namespace opd::cuda
