// What every kernel of the engine is told: pointers, sizes, strides. No torch here, so that the same structures
// serve the CPU kernels, the CUDA kernels and their tests. A "score" is float64 for float64 logits, else float32.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define OPD_HOST_DEVICE __host__ __device__
#else
#define OPD_HOST_DEVICE
#endif

namespace opd {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int kMaxLeadingDims = 6;
constexpr int kNumStats = 5;  // a row's statistics, in this order:
enum Stat : int { kMax = 0, kSum = 1, kWeighted = 2, kTailMax = 3, kTailSum = 4 };

// [*, vocab_shard_size] logits with any leading strides (Megatron's transposed [s, b, V] is never copied).
struct LogitsView {
  void* data;
  DType dtype;
  int64_t num_rows;
  int num_leading_dims;
  int64_t sizes[kMaxLeadingDims];
  int64_t strides[kMaxLeadingDims];  // in elements
  int64_t width;                     // columns of this shard, padding included
  int64_t num_valid;                 // columns whose global id is below vocab_size; the rest is masked by index
};

OPD_HOST_DEVICE static inline int64_t row_offset(const LogitsView& logits, int64_t row) {
  int64_t offset = 0;
  for (int dim = logits.num_leading_dims - 1; dim >= 0; --dim) {
    offset += (row % logits.sizes[dim]) * logits.strides[dim];
    row /= logits.sizes[dim];
  }
  return offset;
}

// One temperature for all rows, or one a row.
struct Temperature {
  double value;
  const void* per_row;  // nullptr, or [num_rows] of float32 or float64
  bool per_row_is_float64;
};

OPD_HOST_DEVICE static inline double temperature_of(const Temperature& temperature, int64_t row) {
  if (temperature.per_row == nullptr) return temperature.value;
  return temperature.per_row_is_float64 ? static_cast<const double*>(temperature.per_row)[row]
                                        : static_cast<double>(static_cast<const float*>(temperature.per_row)[row]);
}

// -1 is absent; anything else outside [0, vocab_size) is invalid and poisons its own row with NaN.
constexpr int64_t kAbsent = -1;
OPD_HOST_DEVICE static inline bool is_invalid_id(int64_t id, int64_t vocab_size) {
  return id < kAbsent || id >= vocab_size;
}

struct TopkPartialsParams {
  LogitsView logits;
  Temperature temperature;
  int64_t k, vocab_start_index, vocab_size;
  const int64_t* target;  // [T] or nullptr
  int32_t* packed;        // [T, packed_words]: k values, 5 stats, target logit, k int32 global ids
  int64_t packed_words;
  bool goes_on;  // what follows the last row in memory is read next
};

struct MergeTopkParams {
  const int32_t* packed;  // [tp_size, T, packed_words]
  int64_t packed_words, tp_size, num_rows, k, vocab_size;
  bool is_float64;
  Temperature temperature;
  const int64_t* target;
  int64_t* indices;  // [T, k]
  void *log_probs, *tail_log_prob, *lse, *entropy, *target_log_prob;
};

struct GatherPartialsParams {
  LogitsView logits;
  Temperature temperature;
  int64_t k, vocab_start_index, vocab_size;
  const int64_t* indices;  // [T, k] global
  const int64_t* target;
  void* stats;           // [T, 5]
  void* support_logits;  // [T, k + has_target]
};

struct MergeGatherParams {
  const void* stats;           // [tp_size, T, 5]
  const void* support_logits;  // [T, k + has_target], summed over shards
  int64_t tp_size, num_rows, k, vocab_size;
  bool is_float64;
  Temperature temperature;
  const int64_t* indices;
  const int64_t* target;
  void *log_probs, *tail_log_prob, *lse, *entropy, *target_log_prob, *merged_stats;
};

struct ScoresBackwardParams {
  LogitsView logits;
  LogitsView grad;  // may be the logits themselves
  Temperature temperature;
  int64_t k, vocab_start_index, vocab_size;
  const int64_t* indices;
  const int64_t* target;
  const void* stats;     // merged [T, 5]
  const void* upstream;  // [T, k + 4]: d_log_probs, d_tail, d_lse, d_entropy, d_target
};

enum class Divergence : int32_t { kForwardKL, kReverseKL, kJSD, kSkewForwardKL, kSkewReverseKL };
enum class TailMode : int32_t { kBucket, kTruncate, kRenormalize };

// mix: jsd's beta, or alpha of the skewed divergences, strictly inside (0, 1); the ends are forward or reverse KL.
struct DivergenceSpec {
  Divergence kind;
  double mix;
};

struct BucketDivergenceParams {
  int64_t num_rows, k;
  bool is_float64;
  DivergenceSpec divergence;
  TailMode tail;
  bool has_floor;
  double teacher_log_prob_min;
  const int64_t* indices;
  const void *student_log_probs, *student_tail, *teacher_log_probs, *teacher_tail;
  void *loss, *grad_log_probs, *grad_tail;
};

struct FullDivergenceParams {
  LogitsView student, teacher;
  Temperature temperature;
  DivergenceSpec divergence;
  int64_t num_shared;                         // columns below both vocabularies: the teacher's support
  const void *student_stats, *teacher_stats;  // merged [T, 5]
  void* sums;                                 // forward out, backward in: [T, 2]
  const void* grad_loss;                      // [T], backward only
  LogitsView grad;                            // backward only; may be the student's logits
};

struct DistillLossParams {
  LogitsView logits;  // overwritten by weights[row] * dloss/dlogits
  Temperature temperature;
  int64_t k, vocab_size;
  DivergenceSpec divergence;
  TailMode tail;
  bool has_floor;
  double teacher_log_prob_min;
  const int64_t* indices;
  const void *teacher_log_probs, *teacher_tail, *weights;
  void* loss;
};

// Of a loss of known weights: what scores_backward takes, [T, k + 4].
struct WeighUpstreamParams {
  int64_t num_rows, k;
  bool is_float64;
  const void *grad_log_probs, *grad_tail, *weights;  // [T, k], [T], [T]
  void* upstream;
};

}  // namespace opd
