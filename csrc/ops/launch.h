// Where an op's kernels run: threads of the CPU, or the current CUDA stream of the logits' device. The ops fill
// parameters and allocate; this chooses the home, cuts the work, and turns a kernel's status into an exception.
#pragma once

#include "ops/check.h"
#include "ops/pieces.h"

namespace opd::ops {

// Refuses what the device's kernels do not do: float64, and top-k wider than a block's shared memory, on CUDA.
void check_supported(const Context& context);
void check_topk_supported(const Context& context, int64_t k);

// How rows are cut so that few of them still fill the device.
Pieces pieces_of(const Context& context, const LogitsView& logits);

// Partial results of each piece, one after another: [pieces, T, ...].
void launch_topk_partials(const Context& context, const TopkPartialsParams& p, const Pieces& pieces);
void launch_gather_partials(const Context& context, const GatherPartialsParams& p, const Pieces& pieces);
// The pieces, as `tp_size` messages, into what the uncut rows would have given.
void launch_combine_topk(const Context& context, const MergeTopkParams& p, int32_t* combined);
void launch_combine_gather(const Context& context, const MergeGatherParams& p);

void launch_merge_topk(const Context& context, const MergeTopkParams& p);
void launch_merge_gather(const Context& context, const MergeGatherParams& p);
void launch_scores_backward(const Context& context, const ScoresBackwardParams& p);
void launch_bucket_divergence(const Context& context, const BucketDivergenceParams& p);
void launch_full_divergence(const Context& context, const FullDivergenceParams& p, const Pieces& pieces);
void launch_full_divergence_backward(const Context& context, const FullDivergenceParams& p);
// A row a thread or block: for rows that are too few see distill_few_rows in divergence.cpp.
void launch_distill_loss(const Context& context, const DistillLossParams& p);
void launch_weigh_upstream(const Context& context, const WeighUpstreamParams& p);

}  // namespace opd::ops
