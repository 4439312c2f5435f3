"""What this build of the compiled module was made with, which CPU variant runs, and what its CUDA kernels counted."""

from opd_engine import _C


def build_info() -> dict[str, str]:
    """Versions, flags, CUDA and CPU variants of the compiled module.

    Returns: `version, compiler, torch, flags, cuda, cuda_archs, cpu_variant, cpu_variants_available,
    cpu_variants_compiled`; `cuda` is empty in a build without CUDA kernels, `cpu_variant` when OPD_CPU_VARIANT asks for
    one this processor lacks.
    """
    return dict(_C.build_info())


def take_topk_fallbacks() -> int:
    """Rows of top-k on the current CUDA device whose sampled floor missed since the last call: they were read again.

    Returns: a count; the counter starts again at 0. Waits for the device: for diagnosis, not for the hot path.
    Raises: RuntimeError where the build has no CUDA kernels.
    """
    return _C.take_topk_fallbacks()
