// The module itself: what this build was made with. Tensors never pass through pybind11; ops register with torch.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "kernels/cpu/kernels.h"
#include "opd_build_config.h"

#ifdef OPD_WITH_CUDA
#include "kernels/cuda/launchers.h"
#endif

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = OPD_VERSION;
    info["compiler"] = OPD_BUILD_COMPILER;
    info["torch"] = OPD_BUILD_TORCH_VERSION;
    info["flags"] = OPD_BUILD_FLAGS;
    info["cuda"] = OPD_BUILD_CUDA;
    info["cuda_archs"] = OPD_BUILD_CUDA_ARCHS;
    const opd::cpu::VariantKernels* chosen = opd::cpu::variant_kernels();
    info["cpu_variant"] = chosen == nullptr ? "" : chosen->name;
    info["cpu_variants_available"] = opd::cpu::available_variants();
    info["cpu_variants_compiled"] = OPD_BUILD_VARIANTS;
    return info;
  });
  m.def("take_topk_fallbacks", []() -> unsigned {
#ifdef OPD_WITH_CUDA
    return opd::cuda::take_topk_fallbacks();
#else
    throw std::runtime_error("this build has no CUDA kernels: nvcc was not found when it was compiled");
#endif
  });
}
