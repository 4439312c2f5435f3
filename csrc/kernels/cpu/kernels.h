// The CPU home of every op: each function computes rows [begin, end) and is called from several threads at once.
// The vocabulary-sized passes and the merges exist once per instruction set (variant/); the buckets once (bucket.cpp).
#pragma once

#include "kernels/params.h"

namespace opd::cpu {

struct VariantKernels {
  const char* name;
  void (*topk_partials)(const TopkPartialsParams&, int64_t begin, int64_t end);
  void (*gather_partials)(const GatherPartialsParams&, int64_t begin, int64_t end);
  void (*scores_backward)(const ScoresBackwardParams&, int64_t begin, int64_t end);
  void (*full_divergence)(const FullDivergenceParams&, int64_t begin, int64_t end);
  void (*full_divergence_backward)(const FullDivergenceParams&, int64_t begin, int64_t end);
  void (*merge_topk)(const MergeTopkParams&, int64_t begin, int64_t end);
  void (*merge_gather)(const MergeGatherParams&, int64_t begin, int64_t end);
  void (*combine_topk_partials)(const MergeTopkParams&, int32_t* combined, int64_t begin, int64_t end);
  void (*combine_gather_partials)(const MergeGatherParams&, int64_t begin, int64_t end);
};

// The best variant this processor runs, chosen once; OPD_CPU_VARIANT=baseline|avx2|avx512|neon forces one.
// Returns nullptr when the forced one is not compiled in or not supported here.
const VariantKernels* variant_kernels();
const char* requested_variant();   // what OPD_CPU_VARIANT asked for, "" if nothing
const char* available_variants();  // comma-separated, best first

void merge_topk(const MergeTopkParams&, int64_t begin, int64_t end);
void merge_gather(const MergeGatherParams&, int64_t begin, int64_t end);
// Pieces of one shard into that shard's partials. topk: `tp_size` pieces of `packed` into `combined`. gather: `stats`
// and `support_logits` [pieces, T, ...] into `merged_stats` [T, 5] and (through log_probs) support logits [T, k +
// has_target].
void combine_topk_partials(const MergeTopkParams&, int32_t* combined, int64_t begin, int64_t end);
void combine_gather_partials(const MergeGatherParams&, int64_t begin, int64_t end);
void bucket_divergence(const BucketDivergenceParams&, int64_t begin, int64_t end);
void distill_loss(const DistillLossParams&, int64_t begin, int64_t end);
void weigh_upstream(const WeighUpstreamParams&, int64_t begin, int64_t end);

}  // namespace opd::cpu
