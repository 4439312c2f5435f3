// All CUDA kernels, compiled for every architecture of OPD_CUDA_ARCHS.
#include "kernels/cuda/kernels.cuh"

namespace opd::cuda {

int num_multiprocessors(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

unsigned take_topk_fallbacks() {
  unsigned count = 0;
  const unsigned zero = 0;
  cudaMemcpyFromSymbol(&count, topk_fallback_counter, sizeof(count));
  cudaMemcpyToSymbol(topk_fallback_counter, &zero, sizeof(zero));
  return count;
}

const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace opd::cuda
