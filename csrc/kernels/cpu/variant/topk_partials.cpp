// Top-k of one shard, its statistics and the tail off its own candidates. Bound: one read of the logits from memory;
// the second pass finds the row in cache (150,000 float32 are 600 KB).
//
// Pass 1 keeps the maximum of each of about 8 k strided sets of columns: the k-th largest of them is a floor under the
// k-th largest logit, whatever the row holds, and striding spreads sorted rows over all sets. Pass 2 lifts what reaches
// the floor into a candidate buffer and sums the exponentials of the rest; candidates that lose are summed too, so the
// tail is never a difference. Order: value descending, then id ascending; -inf is never a candidate. The winners leave
// in the order of their columns: the merge sorts once.
#include <algorithm>
#include <memory>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/variant/select.h"
#include "kernels/cpu/variant/statistics.h"

namespace opd::cpu::OPD_CPU_VARIANT {

namespace {

// Candidates in ascending order of their columns, which are local to the shard.
template <class C>
class TopkBuffer {
 public:
  explicit TopkBuffer(int64_t k)
      : k_(k),
        capacity_(2 * k + 1024),
        values_(new OrderedOf<C>[capacity_]),
        columns_(new int32_t[capacity_]),
        losers_(new C[round_up_to_group<C>(capacity_)]) {}
  void reset(C floor) {
    size_ = 0;
    floor_ = floor;
  }
  C floor() const { return floor_; }
  int64_t size() const { return size_; }
  C value(int64_t i) const { return value_of(values_[i]); }
  int64_t column(int64_t i) const { return columns_[i]; }

  template <bool kCompensate>
  void add(C value, int64_t column, double temperature, Statistics* rest) {
    if (size_ == capacity_) keep_best<kCompensate>(temperature, rest);
    if (value > floor_) {
      values_[size_] = ordered(value);
      columns_[size_++] = static_cast<int32_t>(column);
    } else {
      rest->add_logit(value, temperature);
    }
  }
  // Drops all but the k best into `rest`. Of equals the first win, so one that comes later and equals the k-th loses:
  // the floor may rise to the bound itself.
  template <bool kCompensate>
  void keep_best(double temperature, Statistics* rest) {
    if (size_ <= k_) return;
    Selection<OrderedOf<C>> best(values_.get(), size_, k_);
    int64_t kept = 0, lost = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const OrderedOf<C> value = values_[i];
      const bool taken = best.take(value);
      losers_[lost] = value_of(value);
      values_[kept] = value;
      columns_[kept] = columns_[i];
      kept += taken;
      lost += !taken;
    }
    const int64_t padded = round_up_to_group<C>(lost);
    std::fill(losers_.get() + lost, losers_.get() + padded, -std::numeric_limits<C>::infinity());
    const Groups<C> groups{losers_.get(), padded / kGroup<C>};
    add_groups<kCompensate>(groups, maximum(groups), temperature, rest);
    size_ = k_;
    floor_ = value_of(best.bound);
  }

 private:
  int64_t k_, capacity_, size_ = 0;
  C floor_ = 0;
  std::unique_ptr<OrderedOf<C>[]> values_;
  std::unique_ptr<int32_t[]> columns_;
  std::unique_ptr<C[]> losers_;
};

// Of the following row, asked for during pass 2: beside a row of 150,000 float32 it fits a second cache of 1 MiB.
constexpr int64_t kAheadBytes = 256 << 10;
constexpr int64_t kPageBytes = 4096;

// Vectors of running maxima in pass 1, a power of two: lane l of vector j holds the maximum of the columns that are
// l + j lanes modulo the whole. 0 when the row is too short to gain from a floor.
template <class C>
int64_t num_maxima_vectors(int64_t valid, int64_t k) {
  const int64_t wanted = std::min<int64_t>(8 * k, std::max<int64_t>(2 * k, 2048));
  int64_t vectors = 8;
  while (vectors * kLanes<C> < wanted) vectors *= 2;
  return k == 0 || valid < 4 * vectors * kLanes<C> ? 0 : vectors;
}

// Strictly below the k-th largest logit, or -inf; NaN is left out.
template <class Scalar, class C = ComputeOf<Scalar>>
C find_floor(const Scalar* logits, int64_t valid, int64_t k, int64_t vectors, VecOf<C>* maxima, OrderedOf<C>* values) {
  constexpr C kLowest = -std::numeric_limits<C>::infinity();
  std::fill(maxima, maxima + vectors, splat<C>(kLowest));
  int64_t slot = 0;
  for (int64_t start = 0; start < valid; start += kChunk<C>) {
    const Chunk<Scalar> chunk(logits + start, std::min(kChunk<C>, valid - start));
    for (int64_t g = 0; g < chunk.count(); ++g, slot += 8) {
      VecOf<C>* group = maxima + (slot & (vectors - 1));
      // A page ahead, whose address is then translated before it is needed; the row is read from memory here.
      const Scalar* ahead = logits + start + g * kGroup<C> + kPageBytes / static_cast<int64_t>(sizeof(Scalar));
      for (int64_t i = 0; i < kGroup<C>; i += 64 / sizeof(Scalar)) __builtin_prefetch(ahead + i, 0, 2);
      chunk.visit(g, [group](const auto& read) {
        for (int v = 0; v < 8; ++v) group[v] = max<C>(read(v), group[v]);
      });
    }
  }
  for (int64_t j = 0; j < vectors; ++j) {
    C lanes[kLanes<C>];
    store(lanes, maxima[j]);
    for (int lane = 0; lane < kLanes<C>; ++lane) values[j * kLanes<C> + lane] = ordered(lanes[lane]);
  }
  // Candidates are strictly above the floor; a few more of them cost less than the last steps of the search.
  const C bound = value_of(bound_of_largest(values, vectors * kLanes<C>, k, k / 8 + 4));
  const C below = std::nextafter(bound, kLowest);
  // A denormal may compare as 0 (torch.set_flush_denormal), and would not be below it.
  constexpr C kSmallest = std::numeric_limits<C>::min();
  return std::fabs(below) < kSmallest ? -kSmallest : below;
}

template <class Scalar>
void rows_of(const TopkPartialsParams& p, int64_t begin, int64_t end) {
  using C = ComputeOf<Scalar>;
  using Score = ScoreOf<Scalar>;
  constexpr bool kCompensate = kCompensated<Scalar>;
  constexpr C kLowest = -std::numeric_limits<C>::infinity();
  const int64_t valid = p.logits.num_valid;
  const int64_t vectors = num_maxima_vectors<C>(valid, p.k);
  alignas(64) C buffer[kChunk<C>];
  const std::unique_ptr<VecOf<C>[]> maxima(new VecOf<C>[vectors + 1]);
  const std::unique_ptr<OrderedOf<C>[]> ordered_maxima(new OrderedOf<C>[vectors * kLanes<C> + 1]);
  TopkBuffer<C> candidates(std::max<int64_t>(std::min(p.k, valid), 1));
  const int64_t words_per_score = sizeof(Score) / sizeof(int32_t);
  for (int64_t row = begin; row < end; ++row) {
    const Scalar* logits = row_pointer<Scalar>(p.logits, row);
    const double temperature = temperature_of(p.temperature, row);
    Statistics rest, total;
    candidates.reset(vectors > 0 ? find_floor<Scalar>(logits, valid, p.k, vectors, maxima.get(), ordered_maxima.get())
                                 : kLowest);
    const Scalar* following = row + 1 < end ? row_pointer<Scalar>(p.logits, row + 1) : logits + valid;
    const int64_t ahead_columns = row + 1 < end || p.goes_on ? kAheadBytes / static_cast<int64_t>(sizeof(Scalar)) : 0;
    const int64_t ahead_from = std::max<int64_t>(valid - ahead_columns, 0);
    for (int64_t start = 0; start < valid && !rest.poisoned; start += kChunk<C>) {
      const int64_t count = std::min(kChunk<C>, valid - start);
      const Scalar* ahead = start < ahead_from ? nullptr : following + (start - ahead_from);
      Chunk<Scalar> chunk(logits + start, count, ahead);
      VecOf<C> rest_max = splat<C>(kLowest);
      for (int64_t g = 0; g < chunk.count(); ++g) {
        VecOf<C> group_max = group_maximum(chunk, g, splat<C>(kLowest));
        if (p.k > 0 && greater_mask(group_max, splat<C>(candidates.floor())) != 0) {
          alignas(64) C storage[kGroup<C>];
          const C* in_order = chunk.in_order(g, storage);
          group_max = splat<C>(kLowest);
          for (int64_t v = 0; v < kGroup<C>; v += kLanes<C>) {
            const VecOf<C> lanes = load(in_order + v), floor = splat<C>(candidates.floor());
            group_max = max<C>(lanes > floor ? splat<C>(kLowest) : lanes, group_max);
            for (uint32_t mask = greater_mask(lanes, floor); mask != 0; mask &= mask - 1) {
              const int lane = __builtin_ctz(mask);
              const int64_t column = g * kGroup<C> + v + lane;
              candidates.template add<kCompensate>(lanes[lane], start + column, temperature, &rest);
              chunk.remove(column);
            }
          }
        }
        rest_max = max<C>(group_max, rest_max);
      }
      add_groups<kCompensate>(chunk, largest_lane<C>(rest_max), temperature, &rest);
    }

    int32_t* packed = p.packed + row * p.packed_words;
    Score score[kNumStats];
    int32_t* ids = packed + p.packed_words - p.k;
    int64_t kept = 0;
    if (!rest.poisoned) {
      candidates.template keep_best<kCompensate>(temperature, &rest);
      total = rest;
      const auto winner = [&](int64_t j) { return candidates.value(j); };
      add_logits<C, kCompensate>(candidates.size(), winner, temperature, buffer, &total);
      kept = total.poisoned ? 0 : candidates.size();
    }
    write_statistics(total, rest, score);
    for (int64_t j = 0; j < p.k; ++j) {
      const Score value = static_cast<Score>(j < kept ? candidates.value(j) : kLowest);
      std::memcpy(packed + j * words_per_score, &value, sizeof(value));
      ids[j] = j < kept ? static_cast<int32_t>(candidates.column(j) + p.vocab_start_index) : -1;
    }
    std::memcpy(packed + p.k * words_per_score, score, sizeof(score));
    if (p.target != nullptr) {
      const int64_t column = p.target[row] - p.vocab_start_index;
      const Score value = 0 <= column && column < valid ? static_cast<Score>(to_float(logits[column])) : Score{0};
      std::memcpy(packed + (p.k + kNumStats) * words_per_score, &value, sizeof(value));
    }
  }
}

}  // namespace

void topk_partials(const TopkPartialsParams& p, int64_t begin, int64_t end) {
  with_scalar(p.logits.dtype, [&](auto scalar) { rows_of<decltype(scalar)>(p, begin, end); });
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
