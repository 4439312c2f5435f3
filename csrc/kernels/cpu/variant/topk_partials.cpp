// Top-k of one shard, its statistics and the tail off its own candidates. Bound: one read of the logits from memory;
// the second pass finds the row in cache (150,000 float32 are 600 KB).
//
// Pass 1 keeps the maximum of every block of columns: the k-th largest block maximum is a floor under the k-th
// largest logit, whatever the row's order. Pass 2 lifts what reaches the floor into a candidate buffer and sums the
// exponentials of the rest; candidates that lose are summed too, so the tail is never a difference.
// Order: value descending, then id ascending; -inf is never a candidate.
#include <algorithm>
#include <memory>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/variant/statistics.h"

namespace opd::cpu::OPD_CPU_VARIANT {

namespace {

template <class C>
struct Candidate {
  C value;
  int32_t column;
};
template <class C>
struct Better {
  bool operator()(const Candidate<C>& a, const Candidate<C>& b) const {
    return a.value > b.value || (a.value == b.value && a.column < b.column);
  }
};
template <class C>
struct Greater {
  bool operator()(C a, C b) const { return a > b; }
};

template <class C>
class TopkBuffer {
 public:
  explicit TopkBuffer(int64_t k) : k_(k), capacity_(2 * k + 1024), items_(new Candidate<C>[capacity_]) {
    losers_.reset(new C[round_up_to_group<C>(capacity_)]);
  }
  void reset(C floor) {
    size_ = 0;
    floor_ = floor;
  }
  C floor() const { return floor_; }
  int64_t size() const { return size_; }
  const Candidate<C>& operator[](int64_t i) const { return items_[i]; }

  template <bool kCompensate>
  void add(C value, int64_t column, double temperature, Statistics* rest) {
    if (size_ == capacity_) keep_best<kCompensate>(temperature, rest);
    if (value > floor_) {
      items_[size_++] = {value, static_cast<int32_t>(column)};
    } else {
      rest->add_logit(value, temperature);
    }
  }
  // Drops all but the k best into `rest`. Columns arrive in ascending order, so a later equal of the k-th loses:
  // the floor may rise to the k-th itself.
  template <bool kCompensate>
  void keep_best(double temperature, Statistics* rest) {
    if (size_ <= k_) return;
    std::nth_element(items_.get(), items_.get() + k_ - 1, items_.get() + size_, Better<C>());
    const int64_t lost = size_ - k_, padded = round_up_to_group<C>(lost);
    C best = -std::numeric_limits<C>::infinity();
    for (int64_t i = 0; i < padded; ++i) {
      losers_[i] = i < lost ? items_[k_ + i].value : -std::numeric_limits<C>::infinity();
      if (losers_[i] > best) best = losers_[i];
    }
    add_chunk<C, kCompensate>(losers_.get(), padded, best, temperature, rest);
    size_ = k_;
    floor_ = items_[k_ - 1].value;
  }
  void sort() { std::sort(items_.get(), items_.get() + size_, Better<C>()); }

 private:
  int64_t k_, capacity_, size_ = 0;
  C floor_ = 0;
  std::unique_ptr<Candidate<C>[]> items_;
  std::unique_ptr<C[]> losers_;
};

// Columns a block: about eight blocks a winner, so that few columns beyond the k reach the floor.
template <class C>
int64_t block_size(int64_t valid, int64_t k) {
  const int64_t wanted = std::min<int64_t>(valid / (8 * std::max<int64_t>(k, 1)), 512);
  return std::max<int64_t>(wanted / kGroup<C>, 1) * kGroup<C>;
}

template <class Scalar>
void rows_of(const TopkPartialsParams& p, int64_t begin, int64_t end) {
  using C = ComputeOf<Scalar>;
  using Score = ScoreOf<Scalar>;
  constexpr bool kCompensate = kCompensated<Scalar>;
  constexpr C kLowest = -std::numeric_limits<C>::infinity();
  const int64_t valid = p.logits.num_valid;
  const int64_t block = block_size<C>(valid, p.k), num_blocks = (valid + block - 1) / block;
  alignas(64) C buffer[kChunk<C>];
  const std::unique_ptr<C[]> block_max(new C[num_blocks + 1]);
  TopkBuffer<C> candidates(std::max<int64_t>(std::min(p.k, valid), 1));
  const int64_t words_per_score = sizeof(Score) / sizeof(int32_t);
  for (int64_t row = begin; row < end; ++row) {
    const Scalar* logits = row_pointer<Scalar>(p.logits, row);
    const double temperature = temperature_of(p.temperature, row);
    Statistics rest, total;

    C floor = kLowest;
    if (p.k > 0 && valid > 0) {
      GroupMax<C> all;
      for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t start = b * block, count = std::min(block, valid - start);
        widen(logits + start, count, buffer);
        const GroupMax<C> best = chunk_maximum(buffer, round_up_to_group<C>(count));
        all.nan |= best.nan;
        block_max[b] = best.reduce();
        all.max = max<C>(splat<C>(block_max[b]), all.max);
      }
      total.poisoned = all.any_nan() || all.reduce() == std::numeric_limits<C>::infinity();
      if (!total.poisoned && p.k <= num_blocks) {
        std::nth_element(block_max.get(), block_max.get() + p.k - 1, block_max.get() + num_blocks, Greater<C>());
        floor = std::nextafter(block_max[p.k - 1], kLowest);
      }
    }
    candidates.reset(floor);
    for (int64_t start = 0; start < valid && !total.poisoned; start += kChunk<C>) {
      const int64_t count = std::min(kChunk<C>, valid - start), padded = round_up_to_group<C>(count);
      widen(logits + start, count, buffer);
      GroupMax<C> rest_max;
      for (int64_t i = 0; i < padded; i += kGroup<C>) {
        GroupMax<C> group;
        for (int v = 0; v < 8; ++v) group.add(load(buffer + i + v * kLanes<C>));
        rest_max.nan |= group.nan;
        if (p.k > 0 && greater_mask(group.max, splat<C>(candidates.floor())) != 0) {
          GroupMax<C> left;
          for (int v = 0; v < 8; ++v) {
            C* lanes = buffer + i + v * kLanes<C>;
            uint32_t mask = greater_mask(load(lanes), splat<C>(candidates.floor()));
            for (; mask != 0; mask &= mask - 1) {
              const int lane = __builtin_ctz(mask);
              candidates.template add<kCompensate>(lanes[lane], start + i + v * kLanes<C> + lane, temperature, &rest);
              lanes[lane] = kLowest;
            }
            left.add(load(lanes));
          }
          group.max = left.max;
        }
        rest_max.max = max<C>(group.max, rest_max.max);
      }
      const double chunk_max = rest_max.reduce();
      if (rest_max.any_nan() || chunk_max == kInf) {
        total.poisoned = true;  // reached only with k = 0: pass 1 saw it otherwise
        break;
      }
      add_chunk<C, kCompensate>(buffer, padded, chunk_max, temperature, &rest);
    }

    int32_t* packed = p.packed + row * p.packed_words;
    Score score[kNumStats];
    int32_t* ids = packed + p.packed_words - p.k;
    int64_t kept = 0;
    if (!total.poisoned) {
      candidates.template keep_best<kCompensate>(temperature, &rest);
      candidates.sort();
      kept = candidates.size();
      total = rest;
      for (int64_t j = 0; j < kept; ++j) total.add_logit(candidates[j].value, temperature);
    }
    write_statistics(total, rest, score);
    for (int64_t j = 0; j < p.k; ++j) {
      const Score value = static_cast<Score>(j < kept ? candidates[j].value : kLowest);
      std::memcpy(packed + j * words_per_score, &value, sizeof(value));
      ids[j] = j < kept ? static_cast<int32_t>(candidates[j].column + p.vocab_start_index) : -1;
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
