// Merging the shards' partial results into scores, in rank order and in double: equal bits on every rank.
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
  double max = -kInf, sum = 0, weighted = 0;
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
    sum += factor * other_sum;
    weighted += factor * (other_weighted + gap * other_sum);
  }
  void add_logit(double z, double temperature) { add(z, 1, 0, temperature); }

 private:
  void rescale(double gap) {
    const double factor = std::exp(gap);  // 0 when nothing was added yet: max = -inf
    weighted = factor == 0 ? 0 : factor * (weighted + gap * sum);
    sum *= factor;
  }
};

struct RowScores {
  double max, log_sum, lse, entropy, tail_log_prob;
  bool is_nan;
};

RowScores finish(const Mass& total, const Mass& tail, double temperature) {
  if (total.is_nan || tail.is_nan || total.max == -kInf) return {kNaN, kNaN, kNaN, kNaN, kNaN, true};
  const double log_sum = std::log(total.sum);
  const double tail_log_prob =
      tail.max == -kInf ? -kInf : (tail.max - total.max) / temperature + (std::log(tail.sum) - log_sum);
  return {total.max, log_sum, total.max / temperature + log_sum, log_sum - total.weighted / total.sum, tail_log_prob,
          false};
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

struct Candidate {
  double value;
  int64_t id;
};

template <class Score>
Score read_word(const int32_t* words) {
  Score value;
  std::memcpy(&value, words, sizeof(value));
  return value;
}

template <class Score>
void topk_rows(const MergeTopkParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kWords = sizeof(Score) / sizeof(int32_t);
  std::vector<Candidate> candidates(p.tp_size * p.k);
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  };
  for (int64_t row = begin; row < end; ++row) {
    const double temperature = temperature_of(p.temperature, row);
    Mass total, tail;
    int64_t count = 0;
    double target_logit = 0;
    for (int64_t rank = 0; rank < p.tp_size; ++rank) {
      const int32_t* packed = p.packed + (rank * p.num_rows + row) * p.packed_words;
      const int32_t* stats = packed + p.k * kWords;
      const auto stat = [&](int i) { return static_cast<double>(read_word<Score>(stats + i * kWords)); };
      total.add(stat(kMax), stat(kSum), stat(kWeighted), temperature);
      tail.add(stat(kTailMax), stat(kTailSum), 0, temperature);
      if (p.target != nullptr) target_logit += stat(kNumStats);
      const int32_t* ids = packed + p.packed_words - p.k;
      for (int64_t j = 0; j < p.k; ++j) {
        if (ids[j] >= 0) candidates[count++] = {static_cast<double>(read_word<Score>(packed + j * kWords)), ids[j]};
      }
    }
    const int64_t kept = std::min(count, p.k);
    std::partial_sort(candidates.begin(), candidates.begin() + kept, candidates.begin() + count, better);
    for (int64_t i = kept; i < count; ++i) tail.add_logit(candidates[i].value, temperature);
    const RowScores scores = finish(total, tail, temperature);
    for (int64_t j = 0; j < p.k; ++j) {
      const bool present = j < kept && !scores.is_nan;
      p.indices[row * p.k + j] = present ? candidates[j].id : kAbsent;
      put<Score>(p.log_probs, row * p.k + j,
                 present ? log_prob(scores, candidates[j].value, temperature) : scores.is_nan ? kNaN : -kInf);
    }
    put<Score>(p.tail_log_prob, row, scores.tail_log_prob);
    put<Score>(p.lse, row, scores.lse);
    put<Score>(p.entropy, row, scores.entropy);
    if (p.target != nullptr) {
      put<Score>(p.target_log_prob, row,
                 log_prob_of_id(scores, p.target[row], p.vocab_size, target_logit, temperature));
    }
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
    Score* merged = static_cast<Score*>(p.merged_stats) + row * kNumStats;
    const double values[kNumStats] = {total.max, total.sum, total.weighted, tail.max, tail.sum};
    for (int i = 0; i < kNumStats; ++i) merged[i] = static_cast<Score>(scores.is_nan ? kNaN : values[i]);
  }
}

}  // namespace

void merge_topk(const MergeTopkParams& p, int64_t begin, int64_t end) {
  p.is_float64 ? topk_rows<double>(p, begin, end) : topk_rows<float>(p, begin, end);
}

void merge_gather(const MergeGatherParams& p, int64_t begin, int64_t end) {
  p.is_float64 ? gather_rows<double>(p, begin, end) : gather_rows<float>(p, begin, end);
}

}  // namespace opd::cpu
