// Top-k, gather, their merges and their backward: check, allocate, launch.
#include "ops/check.h"
#include "ops/huge_pages.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace opd::ops {

constexpr int64_t kMaxVocab = int64_t{1} << 31;

namespace {

// Messages of all pieces, [pieces, T, words], and what merges them, filled but for its outputs.
std::tuple<Tensor, MergeTopkParams> topk_messages(const Context& context, const Tensor& logits, int64_t k,
                                                  const OptionalTensor& target, int64_t vocab_start_index,
                                                  int64_t vocab_size, double temperature,
                                                  const OptionalTensor& row_temperature) {
  STD_TORCH_CHECK(k >= 0 && k <= vocab_size, context.op, ": k must be in [0, vocab_size = ", vocab_size, "], got ", k);
  check_topk_supported(context, k);
  STD_TORCH_CHECK(vocab_size < kMaxVocab, context.op, ": vocab_size must be below 2^31, got ", vocab_size);
  TopkPartialsParams p{};
  p.logits = view_of(context, "logits", logits, vocab_start_index, vocab_size);  // [*, vocab_shard_size]
  const int64_t num_tokens = p.logits.num_rows;
  p.temperature = temperature_of(context, temperature, row_temperature, num_tokens);
  p.target = target_pointer(context, target, num_tokens);  // [num_tokens]
  p.k = k;
  p.vocab_start_index = vocab_start_index;
  p.vocab_size = vocab_size;
  const int64_t words_per_score = context.is_float64() ? 2 : 1;
  p.packed_words = (k + kNumStats + (p.target != nullptr)) * words_per_score + k;
  const Pieces pieces = pieces_of(context, p.logits);
  Tensor packed = context.empty({pieces.count, num_tokens, p.packed_words}, ScalarType::Int);
  p.packed = static_cast<int32_t*>(packed.data_ptr());
  launch_topk_partials(context, p, pieces);
  MergeTopkParams merge{};
  merge.packed = p.packed;
  merge.packed_words = p.packed_words;
  merge.tp_size = pieces.count;
  merge.num_rows = num_tokens;
  merge.k = k;
  merge.vocab_size = vocab_size;
  merge.is_float64 = context.is_float64();
  merge.temperature = p.temperature;
  merge.target = p.target;
  return {packed, merge};
}

SixTensors merge_messages(const Context& context, MergeTopkParams p) {
  const int64_t rows = p.num_rows;
  Tensor indices = context.empty({rows, p.k}, ScalarType::Long), log_probs = context.empty_scores({rows, p.k});
  Tensor tail = context.empty_scores({rows}), lse = context.empty_scores({rows});
  Tensor entropy = context.empty_scores({rows});
  Tensor target_log_prob = context.empty_scores({p.target != nullptr ? rows : 0});
  p.indices = static_cast<int64_t*>(indices.data_ptr());
  p.log_probs = log_probs.data_ptr();
  p.tail_log_prob = tail.data_ptr();
  p.lse = lse.data_ptr();
  p.entropy = entropy.data_ptr();
  p.target_log_prob = target_log_prob.data_ptr();
  launch_merge_topk(context, p);
  return {indices, log_probs, tail, lse, entropy, target_log_prob};
}

void check_whole_vocab(const Context& context, const Tensor& logits, int64_t vocab_size) {
  const int64_t columns = logits.dim() >= 1 ? logits.size(logits.dim() - 1) : 0;
  STD_TORCH_CHECK(columns >= vocab_size, context.op, ": logits must hold the whole vocabulary of ", vocab_size,
                  " columns, got ", columns);
}

}  // namespace

Tensor topk_partials(Tensor logits, int64_t k, OptionalTensor target, int64_t vocab_start_index, int64_t vocab_size,
                     double temperature, OptionalTensor row_temperature) {
  const Context context = context_of("topk_partials", logits);
  auto [packed, pieces] =
      topk_messages(context, logits, k, target, vocab_start_index, vocab_size, temperature, row_temperature);
  if (pieces.tp_size == 1) return torch::stable::squeeze(packed, 0);
  Tensor combined = context.empty({pieces.num_rows, pieces.packed_words}, ScalarType::Int);
  launch_combine_topk(context, pieces, static_cast<int32_t*>(combined.data_ptr()));
  return combined;
}

SixTensors merge_topk(Tensor packed, int64_t k, OptionalTensor target, int64_t vocab_size, double temperature,
                      OptionalTensor row_temperature) {
  STD_TORCH_CHECK(packed.dim() == 3, "merge_topk: packed must be [tp_size, num_tokens, words], got ", packed.dim(),
                  " dimensions");
  STD_TORCH_CHECK(k >= 0, "merge_topk: k must not be negative, got ", k);
  MergeTopkParams p{};
  p.tp_size = packed.size(0);
  p.num_rows = packed.size(1);
  p.packed_words = packed.size(2);
  const int64_t scores = k + kNumStats + target.has_value();
  STD_TORCH_CHECK(p.packed_words == scores + k || p.packed_words == 2 * scores + k, "merge_topk: packed must have ",
                  scores + k, " words a row (float32 scores) or ", 2 * scores + k, " (float64), got ", p.packed_words);
  p.is_float64 = p.packed_words == 2 * scores + k;
  const Context context{"merge_topk", p.is_float64 ? ScalarType::Double : ScalarType::Float, &packed};
  check_supported(context);
  check_tensor(context, "packed", packed, ScalarType::Int, {-1, -1, -1});
  p.packed = static_cast<const int32_t*>(packed.data_ptr());
  p.k = k;
  p.vocab_size = vocab_size;
  p.temperature = temperature_of(context, temperature, row_temperature, p.num_rows);
  p.target = target_pointer(context, target, p.num_rows);
  return merge_messages(context, p);
}

SixTensors topk_log_probs(Tensor logits, int64_t k, OptionalTensor target, int64_t vocab_size, double temperature,
                          OptionalTensor row_temperature) {
  const Context context = context_of("topk_log_probs", logits);
  check_whole_vocab(context, logits, vocab_size);
  // The pieces of the rows are merged as if they were shards: nothing stands between.
  auto [packed, merge] = topk_messages(context, logits, k, target, 0, vocab_size, temperature, row_temperature);
  return merge_messages(context, merge);
}

std::tuple<Tensor, Tensor> gather_partials(Tensor logits, Tensor indices, OptionalTensor target,
                                           int64_t vocab_start_index, int64_t vocab_size, double temperature,
                                           OptionalTensor row_temperature) {
  const Context context = context_of("gather_partials", logits);
  GatherPartialsParams p{};
  p.logits = view_of(context, "logits", logits, vocab_start_index, vocab_size);  // [*, vocab_shard_size]
  const int64_t num_tokens = p.logits.num_rows;
  check_tensor(context, "indices", indices, ScalarType::Long, {num_tokens, -1});
  p.temperature = temperature_of(context, temperature, row_temperature, num_tokens);
  p.target = target_pointer(context, target, num_tokens);
  p.k = indices.size(1);
  p.vocab_start_index = vocab_start_index;
  p.vocab_size = vocab_size;
  p.indices = static_cast<const int64_t*>(indices.data_ptr());
  const int64_t support_width = p.k + (p.target != nullptr);
  const Pieces pieces = pieces_of(context, p.logits);
  Tensor stats = context.empty_scores({pieces.count, num_tokens, kNumStats});
  Tensor support_logits = context.empty_scores({pieces.count, num_tokens, support_width});
  p.stats = stats.data_ptr();
  p.support_logits = support_logits.data_ptr();
  launch_gather_partials(context, p, pieces);
  if (pieces.count == 1) return {torch::stable::squeeze(stats, 0), torch::stable::squeeze(support_logits, 0)};
  Tensor combined_stats = context.empty_scores({num_tokens, kNumStats});
  Tensor combined_support = context.empty_scores({num_tokens, support_width});
  MergeGatherParams merge{};
  merge.stats = p.stats;
  merge.support_logits = p.support_logits;
  merge.tp_size = pieces.count;
  merge.num_rows = num_tokens;
  merge.k = p.k;
  merge.is_float64 = context.is_float64();
  merge.temperature = p.temperature;
  merge.target = p.target;
  merge.merged_stats = combined_stats.data_ptr();
  merge.log_probs = combined_support.data_ptr();
  launch_combine_gather(context, merge);
  return {combined_stats, combined_support};
}

SixTensors merge_gather(Tensor stats, Tensor support_logits, Tensor indices, OptionalTensor target, int64_t vocab_size,
                        double temperature, OptionalTensor row_temperature) {
  const Context context = context_of_scores("merge_gather", "stats", stats);
  check_scores(context, "stats", stats, {-1, -1, kNumStats});
  MergeGatherParams p{};
  p.tp_size = stats.size(0);
  p.num_rows = stats.size(1);
  check_tensor(context, "indices", indices, ScalarType::Long, {p.num_rows, -1});
  p.k = indices.size(1);
  check_scores(context, "support_logits", support_logits, {p.num_rows, p.k + target.has_value()});
  p.vocab_size = vocab_size;
  p.is_float64 = context.is_float64();
  p.temperature = temperature_of(context, temperature, row_temperature, p.num_rows);
  p.target = target_pointer(context, target, p.num_rows);
  p.indices = static_cast<const int64_t*>(indices.data_ptr());
  p.stats = stats.data_ptr();
  p.support_logits = support_logits.data_ptr();
  Tensor log_probs = context.empty_scores({p.num_rows, p.k}), tail = context.empty_scores({p.num_rows});
  Tensor lse = context.empty_scores({p.num_rows}), entropy = context.empty_scores({p.num_rows});
  Tensor target_log_prob = context.empty_scores({target.has_value() ? p.num_rows : 0});
  Tensor merged = context.empty_scores({p.num_rows, kNumStats});
  p.log_probs = log_probs.data_ptr();
  p.tail_log_prob = tail.data_ptr();
  p.lse = lse.data_ptr();
  p.entropy = entropy.data_ptr();
  p.target_log_prob = target_log_prob.data_ptr();
  p.merged_stats = merged.data_ptr();
  launch_merge_gather(context, p);
  return {log_probs, tail, lse, entropy, target_log_prob, merged};
}

SixTensors gather_log_probs(Tensor logits, Tensor indices, OptionalTensor target, int64_t vocab_size,
                            double temperature, OptionalTensor row_temperature) {
  check_whole_vocab(context_of("gather_log_probs", logits), logits, vocab_size);
  auto [stats, support_logits] = gather_partials(logits, indices, target, 0, vocab_size, temperature, row_temperature);
  return merge_gather(torch::stable::unsqueeze(stats, 0), support_logits, indices, target, vocab_size, temperature,
                      row_temperature);
}

namespace {

void run_backward(const Context& context, const Tensor& logits, const Tensor& grad, const Tensor& indices,
                  const OptionalTensor& target, const Tensor& stats, const Tensor& upstream, int64_t vocab_start_index,
                  int64_t vocab_size, double temperature, const OptionalTensor& row_temperature) {
  ScoresBackwardParams p{};
  p.logits = view_of(context, "logits", logits, vocab_start_index, vocab_size);
  p.grad = view_of(context, "grad", grad, vocab_start_index, vocab_size);
  const int64_t num_tokens = p.logits.num_rows;
  check_tensor(context, "indices", indices, ScalarType::Long, {num_tokens, -1});
  p.k = indices.size(1);
  check_scores(context, "stats", stats, {num_tokens, kNumStats});
  check_scores(context, "upstream", upstream, {num_tokens, p.k + 4});
  p.temperature = temperature_of(context, temperature, row_temperature, num_tokens);
  p.vocab_start_index = vocab_start_index;
  p.vocab_size = vocab_size;
  p.indices = static_cast<const int64_t*>(indices.data_ptr());
  p.target = target_pointer(context, target, num_tokens);
  p.stats = stats.data_ptr();
  p.upstream = upstream.data_ptr();
  launch_scores_backward(context, p);
}

}  // namespace

Tensor scores_backward(Tensor logits, Tensor indices, OptionalTensor target, Tensor stats, Tensor upstream,
                       int64_t vocab_start_index, int64_t vocab_size, double temperature,
                       OptionalTensor row_temperature) {
  const Context context = context_of("scores_backward", logits);
  Tensor grad = new_gradient(logits);
  run_backward(context, logits, grad, indices, target, stats, upstream, vocab_start_index, vocab_size, temperature,
               row_temperature);
  return grad;
}

void scores_backward_(Tensor logits, Tensor indices, OptionalTensor target, Tensor stats, Tensor upstream,
                      int64_t vocab_start_index, int64_t vocab_size, double temperature,
                      OptionalTensor row_temperature) {
  const Context context = context_of("scores_backward_", logits);
  run_backward(context, logits, logits, indices, target, stats, upstream, vocab_start_index, vocab_size, temperature,
               row_temperature);
}

}  // namespace opd::ops
