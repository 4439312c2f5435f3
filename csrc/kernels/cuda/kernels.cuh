// Every CUDA kernel with its launcher, each in the file of its name.
#pragma once

#include "kernels/cuda/bucket_divergence.cuh"
#include "kernels/cuda/distill_loss.cuh"
#include "kernels/cuda/full_divergence.cuh"
#include "kernels/cuda/gather_partials.cuh"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/scores_backward.cuh"
#include "kernels/cuda/topk_partials.cuh"
