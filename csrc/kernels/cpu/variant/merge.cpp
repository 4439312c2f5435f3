// Merging the shards' partial results into scores, in rank order and in double: equal bits on every rank.
// The combine_* functions merge the pieces of one shard's rows into what the shard would have sent whole.
// Bound: latency; k + 5 words a shard and row. docs/math.md, "Merging shards".
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace opd::cpu {

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// (max, sum e^((z-max)/t), sum e^(...) (z-max)/t) of a set of columns, grown shard by shard.
struct Mass {
  double max = -kInf, sum = 0, lost = 0, weighted = 0;  // sum + lost: compensated
  bool is_nan = false;

  void add(double other_max, double other_sum, double other_weighted, double temperature) {
    is_nan |= other_max != other_max || other_max == kInf;
    if (is_nan || other_max == -kInf) return;
    if (other_max > max) {
      rescale((max - other_max) / temperature);
      max = other_max;
    }
    const double gap = (other_max - max) / temperature, factor = std::exp(gap);
    if (factor == 0) return;
    const double value = factor * other_sum, grown = sum + value, back = grown - sum;
    lost += (sum - (grown - back)) + (value - back);
    sum = grown;
    weighted += factor * (other_weighted + gap * other_sum);
  }
  void add_logit(double z, double temperature) { add(z, 1, 0, temperature); }
  // The five statistics of a row whose whole is *this; NaN where either part is.
  void write(const Mass& tail, double* stats) const {
    const double values[kNumStats] = {max, sum + lost, weighted, tail.max, tail.sum + tail.lost};
    for (int i = 0; i < kNumStats; ++i) stats[i] = is_nan || tail.is_nan ? kNaN : values[i];
  }

 private:
  void rescale(double gap) {
    const double factor = std::exp(gap);  // 0 when nothing was added yet: max = -inf
    weighted = factor == 0 ? 0 : factor * (weighted + gap * sum);
    sum *= factor;
    lost *= factor;
  }
};

struct RowScores {
  double max, log_sum, lse, entropy, tail_log_prob;
  bool is_nan;
};

RowScores finish(const Mass& total, const Mass& tail, double temperature) {
  if (total.is_nan || tail.is_nan || total.max == -kInf) return {kNaN, kNaN, kNaN, kNaN, kNaN, true};
  const double sum = total.sum + total.lost, log_sum = std::log(sum);
  // The log of the ratio, not the difference of two logs of about 12 each: that alone would cost 8 ulp of 1.
  const double tail_log_prob =
      tail.max == -kInf ? -kInf : (tail.max - total.max) / temperature + std::log((tail.sum + tail.lost) / sum);
  return {total.max, log_sum, total.max / temperature + log_sum, log_sum - total.weighted / sum, tail_log_prob, false};
}

double log_prob(const RowScores& scores, double z, double temperature) {
  if (scores.is_nan) return kNaN;
  return z == -kInf ? -kInf : (z - scores.max) / temperature - scores.log_sum;
}

double log_prob_of_id(const RowScores& scores, int64_t id, int64_t vocab_size, double z, double temperature) {
  if (id == kAbsent) return -kInf;
  return is_invalid_id(id, vocab_size) ? kNaN : log_prob(scores, z, temperature);
}

template <class Score>
void put(void* array, int64_t i, double value) {
  static_cast<Score*>(array)[i] = static_cast<Score>(value);
}

template <class Score>
Score read_word(const int32_t* words) {
  Score value;
  std::memcpy(&value, words, sizeof(value));
  return value;
}
template <class Score>
void write_word(int32_t* words, double value) {
  const Score rounded = static_cast<Score>(value);
  std::memcpy(words, &rounded, sizeof(rounded));
}

// A candidate's place in the total order (value descending, id ascending), one integer for float32.
template <class Score>
struct Key;
template <>
struct Key<float> {
  uint64_t bits;
  static Key make(float value, int32_t id) {
    value += 0.0f;  // -0.0 equals +0.0
    uint32_t raw;
    std::memcpy(&raw, &value, sizeof(raw));
    return {static_cast<uint64_t>(raw & 0x80000000u ? ~raw : raw | 0x80000000u) << 32 | ~static_cast<uint32_t>(id)};
  }
  float value() const {
    const uint32_t ordered = static_cast<uint32_t>(bits >> 32);
    const uint32_t raw = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
    float value;
    std::memcpy(&value, &raw, sizeof(value));
    return value;
  }
  int64_t id() const { return ~static_cast<uint32_t>(bits); }
  bool operator<(const Key& other) const { return bits > other.bits; }
};
template <>
struct Key<double> {
  double logit;
  int32_t token;
  static Key make(double value, int32_t id) { return {value, id}; }
  double value() const { return logit; }
  int64_t id() const { return token; }
  bool operator<(const Key& other) const {
    return logit > other.logit || (logit == other.logit && token < other.token);
  }
};

// The messages of all shards about one row: masses, the k best candidates in order, the rest in the tail.
template <class Score>
struct MergedCandidates {
  Mass total, tail;
  double target_logit = 0;
  int64_t kept = 0;
};

template <class Score>
MergedCandidates<Score> merge_candidates(const MergeTopkParams& p, int64_t row, double temperature,
                                         std::vector<Key<Score>>* candidates) {
  constexpr int64_t kWords = sizeof(Score) / sizeof(int32_t);
  MergedCandidates<Score> merged;
  candidates->clear();
  for (int64_t rank = 0; rank < p.tp_size; ++rank) {
    const int32_t* packed = p.packed + (rank * p.num_rows + row) * p.packed_words;
    const int32_t* stats = packed + p.k * kWords;
    const auto stat = [&](int i) { return static_cast<double>(read_word<Score>(stats + i * kWords)); };
    merged.total.add(stat(kMax), stat(kSum), stat(kWeighted), temperature);
    merged.tail.add(stat(kTailMax), stat(kTailSum), 0, temperature);
    if (p.target != nullptr) merged.target_logit += stat(kNumStats);
    const int32_t* ids = packed + p.packed_words - p.k;
    for (int64_t j = 0; j < p.k; ++j) {
      if (ids[j] >= 0) candidates->push_back(Key<Score>::make(read_word<Score>(packed + j * kWords), ids[j]));
    }
  }
  const int64_t count = static_cast<int64_t>(candidates->size());
  merged.kept = std::min(count, p.k);
  const auto first = candidates->begin();
  if (merged.kept > 0 && merged.kept < count) std::nth_element(first, first + merged.kept - 1, candidates->end());
  std::sort(first, first + merged.kept);
  for (int64_t i = merged.kept; i < count; ++i) merged.tail.add_logit((*candidates)[i].value(), temperature);
  return merged;
}

template <class Score>
void topk_rows(const MergeTopkParams& p, int64_t begin, int64_t end) {
  std::vector<Key<Score>> candidates;
  candidates.reserve(p.tp_size * p.k);
  for (int64_t row = begin; row < end; ++row) {
    const double temperature = temperature_of(p.temperature, row);
    const MergedCandidates<Score> merged = merge_candidates<Score>(p, row, temperature, &candidates);
    const RowScores scores = finish(merged.total, merged.tail, temperature);
    for (int64_t j = 0; j < p.k; ++j) {
      const bool present = j < merged.kept && !scores.is_nan;
      p.indices[row * p.k + j] = present ? candidates[j].id() : kAbsent;
      put<Score>(p.log_probs, row * p.k + j,
                 present         ? log_prob(scores, candidates[j].value(), temperature)
                 : scores.is_nan ? kNaN
                                 : -kInf);
    }
    put<Score>(p.tail_log_prob, row, scores.tail_log_prob);
    put<Score>(p.lse, row, scores.lse);
    put<Score>(p.entropy, row, scores.entropy);
    if (p.target != nullptr) {
      put<Score>(p.target_log_prob, row,
                 log_prob_of_id(scores, p.target[row], p.vocab_size, merged.target_logit, temperature));
    }
  }
}

template <class Score>
void combine_topk_rows(const MergeTopkParams& p, int32_t* combined, int64_t begin, int64_t end) {
  constexpr int64_t kWords = sizeof(Score) / sizeof(int32_t);
  std::vector<Key<Score>> candidates;
  candidates.reserve(p.tp_size * p.k);
  for (int64_t row = begin; row < end; ++row) {
    const MergedCandidates<Score> merged =
        merge_candidates<Score>(p, row, temperature_of(p.temperature, row), &candidates);
    int32_t* packed = combined + row * p.packed_words;
    int32_t* ids = packed + p.packed_words - p.k;
    for (int64_t j = 0; j < p.k; ++j) {
      write_word<Score>(packed + j * kWords, j < merged.kept ? static_cast<double>(candidates[j].value()) : -kInf);
      ids[j] = j < merged.kept ? static_cast<int32_t>(candidates[j].id()) : -1;
    }
    double stats[kNumStats];
    merged.total.write(merged.tail, stats);
    for (int i = 0; i < kNumStats; ++i) write_word<Score>(packed + (p.k + i) * kWords, stats[i]);
    if (p.target != nullptr) write_word<Score>(packed + (p.k + kNumStats) * kWords, merged.target_logit);
  }
}

template <class Score>
void combine_gather_rows(const MergeGatherParams& p, int64_t begin, int64_t end) {
  const int64_t support_width = p.k + (p.target != nullptr);
  for (int64_t row = begin; row < end; ++row) {
    const double temperature = temperature_of(p.temperature, row);
    Mass total, tail;
    Score* support = static_cast<Score*>(p.log_probs) + row * support_width;
    std::fill(support, support + support_width, Score{0});
    for (int64_t piece = 0; piece < p.tp_size; ++piece) {
      const int64_t at = piece * p.num_rows + row;
      const Score* stats = static_cast<const Score*>(p.stats) + at * kNumStats;
      total.add(stats[kMax], stats[kSum], stats[kWeighted], temperature);
      tail.add(stats[kTailMax], stats[kTailSum], 0, temperature);
      const Score* owned = static_cast<const Score*>(p.support_logits) + at * support_width;
      for (int64_t j = 0; j < support_width; ++j) support[j] += owned[j];
    }
    double stats[kNumStats];
    total.write(tail, stats);
    for (int i = 0; i < kNumStats; ++i) put<Score>(p.merged_stats, row * kNumStats + i, stats[i]);
  }
}

template <class Score>
void gather_rows(const MergeGatherParams& p, int64_t begin, int64_t end) {
  const int64_t support_width = p.k + (p.target != nullptr);
  for (int64_t row = begin; row < end; ++row) {
    const double temperature = temperature_of(p.temperature, row);
    Mass total, tail;
    for (int64_t rank = 0; rank < p.tp_size; ++rank) {
      const Score* stats = static_cast<const Score*>(p.stats) + (rank * p.num_rows + row) * kNumStats;
      total.add(stats[kMax], stats[kSum], stats[kWeighted], temperature);
      tail.add(stats[kTailMax], stats[kTailSum], 0, temperature);
    }
    const RowScores scores = finish(total, tail, temperature);
    const Score* support = static_cast<const Score*>(p.support_logits) + row * support_width;
    for (int64_t j = 0; j < p.k; ++j) {
      put<Score>(p.log_probs, row * p.k + j,
                 log_prob_of_id(scores, p.indices[row * p.k + j], p.vocab_size, support[j], temperature));
    }
    put<Score>(p.tail_log_prob, row, scores.tail_log_prob);
    put<Score>(p.lse, row, scores.lse);
    put<Score>(p.entropy, row, scores.entropy);
    if (p.target != nullptr) {
      put<Score>(p.target_log_prob, row,
                 log_prob_of_id(scores, p.target[row], p.vocab_size, support[p.k], temperature));
    }
    double merged[kNumStats];
    total.write(tail, merged);
    for (int i = 0; i < kNumStats; ++i) {
      put<Score>(p.merged_stats, row * kNumStats + i, scores.is_nan ? kNaN : merged[i]);
    }
  }
}

}  // namespace

void merge_topk(const MergeTopkParams& p, int64_t begin, int64_t end) {
  p.is_float64 ? topk_rows<double>(p, begin, end) : topk_rows<float>(p, begin, end);
}

void combine_topk_partials(const MergeTopkParams& p, int32_t* combined, int64_t begin, int64_t end) {
  p.is_float64 ? combine_topk_rows<double>(p, combined, begin, end) : combine_topk_rows<float>(p, combined, begin, end);
}

void combine_gather_partials(const MergeGatherParams& p, int64_t begin, int64_t end) {
  p.is_float64 ? combine_gather_rows<double>(p, begin, end) : combine_gather_rows<float>(p, begin, end);
}

void merge_gather(const MergeGatherParams& p, int64_t begin, int64_t end) {
  p.is_float64 ? gather_rows<double>(p, begin, end) : gather_rows<float>(p, begin, end);
}

}  // namespace opd::cpu
