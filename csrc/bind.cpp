// The module itself: what this build was made with. Tensors never pass through pybind11; ops register with torch.
#include <pybind11/pybind11.h>

#include "kernels/cpu/kernels.h"
#include "opd_build_config.h"

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
}
