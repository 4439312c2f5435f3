// The CUDA home of every op: torch-free entry points that enqueue on a stream and return a cudaError_t as int.
// Compiled by nvcc for GPUs, and from the same .cuh by the emulator for tests.
#pragma once

#include "kernels/params.h"

namespace opd::cuda {

// Blocks count rows, then pieces of rows; a piece is at most `columns` wide. Each piece writes partial results of its
// own, [count, T, ...], which launch_combine_* merges into the shard's.
struct Pieces {
  int64_t count, columns;
};

int launch_topk_partials(const TopkPartialsParams&, const Pieces&, void* stream);
int launch_gather_partials(const GatherPartialsParams&, const Pieces&, void* stream);
int launch_scores_backward(const ScoresBackwardParams&, const Pieces&, void* stream);
int launch_full_divergence(const FullDivergenceParams&, const Pieces&, void* stream);
int launch_full_divergence_backward(const FullDivergenceParams&, const Pieces&, void* stream);
int launch_distill_loss(const DistillLossParams&, void* stream);
int launch_weigh_upstream(const WeighUpstreamParams&, void* stream);
int launch_merge_topk(const MergeTopkParams&, void* stream);
int launch_merge_gather(const MergeGatherParams&, void* stream);
int launch_bucket_divergence(const BucketDivergenceParams&, void* stream);
int launch_combine_topk(const MergeTopkParams&, int32_t* combined, void* stream);
int launch_combine_gather(const MergeGatherParams&, void* stream);

int64_t max_topk();
// Multiprocessors of a device, so that few rows can be cut into enough pieces.
int num_multiprocessors(int device);
// Rows of top-k whose sampled floor missed, on the current device since the last call. Synchronises.
unsigned take_topk_fallbacks();
const char* error_string(int status);

}  // namespace opd::cuda
