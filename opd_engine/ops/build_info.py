"""What this build of the compiled module was made with, and which CPU variant this processor runs."""

from opd_engine import _C


def build_info() -> dict[str, str]:
    """Versions, flags, CUDA and CPU variants of the compiled module.

    Returns: `version, compiler, torch, flags, cuda, cuda_archs, cpu_variant, cpu_variants_available,
    cpu_variants_compiled`; `cuda` is empty in a build without CUDA kernels, `cpu_variant` when OPD_CPU_VARIANT asks for
    one this processor lacks.
    """
    return dict(_C.build_info())
