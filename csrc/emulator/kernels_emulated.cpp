// The CUDA kernels, compiled for the emulator from the files nvcc compiles.
#define OPD_EMULATE_CUDA 1
#include "kernels/cuda/kernels.cuh"

namespace opd::cuda {

// Few, so that small tests cut rows into pieces too.
int num_multiprocessors(int) { return 4; }

unsigned take_topk_fallbacks() { return __atomic_exchange_n(&topk_fallback_counter, 0u, __ATOMIC_SEQ_CST); }

const char* error_string(int) { return "the emulator failed"; }

}  // namespace opd::cuda
