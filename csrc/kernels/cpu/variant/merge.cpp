// Merging the shards' partial results into scores, in rank order and in double: equal bits on every rank.
// The combine_* functions merge the pieces of one shard's rows into what the shard would have sent whole.
// Bound: latency; k + 5 words a shard and row. docs/math.md, "Merging shards".
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/variant/select.h"
#include "kernels/cpu/variant/statistics.h"

namespace opd::cpu::OPD_CPU_VARIANT {

namespace {

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

// A winner: the ordered bits of its value and its id. Order: value descending, id ascending.
template <class Score>
struct Winner {
  OrderedOf<Score> value;
  int32_t id;
  bool operator<(const Winner& other) const { return value > other.value || (value == other.value && id < other.id); }
};

// Few: each winner's place is the number of those before it, counted without a branch where vectors compare integers.
template <class Score>
void sort_few(const Winner<Score>* winners, int64_t count, uint64_t* keys, Winner<Score>* sorted) {
  if constexpr (std::is_same<Score, float>::value && kVectorBytes >= 32) {
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = static_cast<uint64_t>(winners[i].value) << 32 | ~static_cast<uint32_t>(winners[i].id);
    }
    for (int64_t i = 0; i < count; ++i) {
      uint64_t place = 0;
      for (int64_t j = 0; j < count; ++j) place += keys[j] > keys[i] ? 1 : 0;
      sorted[place] = winners[i];
    }
  } else {
    static_cast<void>(keys);
    std::copy(winners, winners + count, sorted);
    std::sort(sorted, sorted + count);
  }
}

// By bytes of the value, least first, each pass stable; then runs of equal values by id.
template <class Score>
void sort_many(Winner<Score>* winners, int64_t count, Winner<Score>* sorted) {
  constexpr int kBytes = sizeof(OrderedOf<Score>);
  Winner<Score>*from = winners, *to = sorted;
  for (int byte = 0; byte < kBytes; ++byte) {
    int64_t places[256] = {};
    const auto digit = [&](const Winner<Score>& w) { return 255 - static_cast<int>(w.value >> (8 * byte) & 255); };
    for (int64_t i = 0; i < count; ++i) ++places[digit(from[i])];
    if (places[digit(from[0])] == count) continue;
    for (int64_t d = 0, before = 0; d < 256; ++d) {
      const int64_t here = places[d];
      places[d] = before;
      before += here;
    }
    for (int64_t i = 0; i < count; ++i) to[places[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != sorted) std::copy(from, from + count, sorted);
  for (int64_t i = 0; i < count;) {
    int64_t end = i + 1;
    while (end < count && sorted[end].value == sorted[i].value) ++end;
    if (!std::is_sorted(sorted + i, sorted + end)) std::sort(sorted + i, sorted + end);
    i = end;
  }
}

// The messages of all shards about one row: masses, the k best candidates in order, the rest in the tail.
template <class Score>
class Merger {
 public:
  Mass total, tail;
  double target_logit = 0;
  int64_t kept = 0;

  explicit Merger(const MergeTopkParams& p)
      : p_(p),
        capacity_(p.tp_size * p.k),
        values_(new OrderedOf<Score>[capacity_ + 1]),
        ids_(new int32_t[capacity_ + 1]),
        losers_(new C[round_up_to_group<C>(capacity_ + 1)]),
        keys_(new uint64_t[p.k + 1]),
        winners_(new Winner<Score>[capacity_ + 1]),
        sorted_(new Winner<Score>[p.k + 1]) {}

  void merge(int64_t row, double temperature) {
    constexpr int64_t kWords = sizeof(Score) / sizeof(int32_t);
    total = tail = Mass{};
    target_logit = 0;
    int64_t count = 0;
    for (int64_t rank = 0; rank < p_.tp_size; ++rank) {
      const int32_t* packed = p_.packed + (rank * p_.num_rows + row) * p_.packed_words;
      const int32_t* stats = packed + p_.k * kWords;
      const auto stat = [&](int i) { return static_cast<double>(read_word<Score>(stats + i * kWords)); };
      total.add(stat(kMax), stat(kSum), stat(kWeighted), temperature);
      tail.add(stat(kTailMax), stat(kTailSum), 0, temperature);
      if (p_.target != nullptr) target_logit += stat(kNumStats);
      const int32_t* ids = packed + p_.packed_words - p_.k;
      int32_t absent = 0;
      for (int64_t j = 0; j < p_.k; ++j) {
        values_[count + j] = ordered(read_word<Score>(packed + j * kWords));
        ids_[count + j] = ids[j];
        absent |= ids[j];
      }
      count = absent < 0 ? drop_absent(count, p_.k) : count + p_.k;
    }
    kept = std::min(count, p_.k);
    if (kept == 0) return;
    if (kept < count) {
      drop_losers(count, temperature);
    } else {
      for (int64_t i = 0; i < kept; ++i) winners_[i] = {values_[i], ids_[i]};
    }
    constexpr int64_t kFew = 128;
    kept <= kFew ? sort_few(winners_.get(), kept, keys_.get(), sorted_.get())
                 : sort_many(winners_.get(), kept, sorted_.get());
  }
  double value(int64_t i) const { return value_of(sorted_[i].value); }
  int32_t id(int64_t i) const { return sorted_[i].id; }

 private:
  using C = ComputeOf<Score>;

  // Of `num` candidates from `start` keeps those with an id; returns where they end.
  int64_t drop_absent(int64_t start, int64_t num) {
    int64_t end = start;
    for (int64_t i = start; i < start + num; ++i) {
      values_[end] = values_[i];
      ids_[end] = ids_[i];
      end += ids_[i] >= 0;
    }
    return end;
  }
  void drop_losers(int64_t count, double temperature) {
    const OrderedOf<Score> bound = bound_of_largest(values_.get(), count, kept, 0);
    const C lowest = -std::numeric_limits<C>::infinity();
    int64_t won = 0;
    // Of those equal to the bound the lowest ids win, whatever the order of the shards.
    const int32_t last_id = last_id_at(bound, count);
    for (int64_t i = 0; i < count; ++i) {
      const bool wins = (values_[i] > bound) | ((values_[i] == bound) & (ids_[i] <= last_id));
      losers_[i] = wins ? lowest : static_cast<C>(value_of(values_[i]));
    }
    for (int64_t i = 0; i < count; ++i) {
      winners_[won] = {values_[i], ids_[i]};
      won += losers_[i] == lowest;
    }
    const int64_t padded = round_up_to_group<C>(count);
    std::fill(losers_.get() + count, losers_.get() + padded, lowest);
    const Groups<C> groups{losers_.get(), padded / kGroup<C>};
    Statistics rest;
    add_groups<kCompensated<Score>>(groups, maximum(groups), temperature, &rest);
    tail.add(rest.max, rest.sum + rest.lost, 0, temperature);
  }
  int32_t last_id_at(OrderedOf<Score> bound, int64_t count) {
    const int64_t reached = count_at_least(values_.get(), count, bound);
    if (reached == kept) return std::numeric_limits<int32_t>::max();
    return nth_id_at(bound, count,
                     kept - count_at_least(values_.get(), count, static_cast<OrderedOf<Score>>(bound + 1)));
  }
  // The n-th lowest id among the values equal to `bound`, n >= 1.
  int32_t nth_id_at(OrderedOf<Score> bound, int64_t count, int64_t n) {
    const std::unique_ptr<int32_t[]> ids(new int32_t[count]);
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (values_[i] == bound) ids[found++] = ids_[i];
    }
    std::nth_element(ids.get(), ids.get() + n - 1, ids.get() + found);
    return ids[n - 1];
  }

  const MergeTopkParams& p_;
  int64_t capacity_;
  std::unique_ptr<OrderedOf<Score>[]> values_;
  std::unique_ptr<int32_t[]> ids_;
  std::unique_ptr<C[]> losers_;
  std::unique_ptr<uint64_t[]> keys_;
  std::unique_ptr<Winner<Score>[]> winners_, sorted_;
};

template <class Score>
void topk_rows(const MergeTopkParams& p, int64_t begin, int64_t end) {
  Merger<Score> merged(p);
  for (int64_t row = begin; row < end; ++row) {
    const double temperature = temperature_of(p.temperature, row);
    merged.merge(row, temperature);
    const RowScores scores = finish(merged.total, merged.tail, temperature);
    const int64_t present = scores.is_nan ? 0 : merged.kept;
    int64_t* indices = p.indices + row * p.k;
    Score* log_probs = static_cast<Score*>(p.log_probs) + row * p.k;
    for (int64_t j = 0; j < present; ++j) indices[j] = merged.id(j);
    for (int64_t j = 0; j < present; ++j) {
      log_probs[j] = static_cast<Score>((merged.value(j) - scores.max) / temperature - scores.log_sum);
    }
    std::fill(indices + present, indices + p.k, kAbsent);
    std::fill(log_probs + present, log_probs + p.k, static_cast<Score>(scores.is_nan ? kNaN : -kInf));
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
  Merger<Score> merged(p);
  for (int64_t row = begin; row < end; ++row) {
    merged.merge(row, temperature_of(p.temperature, row));
    int32_t* packed = combined + row * p.packed_words;
    int32_t* ids = packed + p.packed_words - p.k;
    for (int64_t j = 0; j < p.k; ++j) {
      write_word<Score>(packed + j * kWords, j < merged.kept ? merged.value(j) : -kInf);
      ids[j] = j < merged.kept ? merged.id(j) : -1;
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

}  // namespace opd::cpu::OPD_CPU_VARIANT
