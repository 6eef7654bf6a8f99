"""Which implementation of an op runs: chosen once per device, logged, and refused with the reason if it cannot.

    reference  plain PyTorch, op by op
    compiled   the same formulas through torch.compile, cached; the default where a compiler is at hand
    triton     the hand-written kernels, where an op has them

NSPHERE_BACKEND, or an op's `backend` argument, asks for one by name.
"""

import functools
import importlib.util
import logging
import os
import shutil

import torch

BACKENDS = ("reference", "compiled", "triton")

logger = logging.getLogger("nsphere")


def why_not(backend: str, device_type: str, *, has_triton_kernel: bool) -> str | None:
    """The reason `backend` cannot run on this kind of device, or None if it can."""
    if backend == "reference":
        return None
    triton = importlib.util.find_spec("triton") is not None
    if backend == "compiled":
        if device_type == "cpu":
            compiler = os.environ.get("CXX", "g++")
            found = shutil.which(compiler) is not None
            return None if found else f"there is no C++ compiler ({compiler!r} is not on the PATH; set CXX)"
        if device_type == "cuda":
            return None if triton else "the triton package is not installed"
        return f"torch.compile is not used on {device_type}"
    if not has_triton_kernel:
        return "this op has no Triton kernel"
    if device_type != "cuda":
        return f"Triton kernels run on cuda, not on {device_type}"
    return None if triton else "the triton package is not installed"


def asked_by_environment() -> str | None:
    """The value of NSPHERE_BACKEND, None if it is unset or empty."""
    return os.environ.get("NSPHERE_BACKEND") or None


def choose(device: torch.device, asked: str | None = None, *, has_triton_kernel: bool = False) -> str:
    """The backend for an op on this device.

    Args:
        device: where the tensors live.
        asked: a name; None reads NSPHERE_BACKEND, and without that takes the best that can run.
        has_triton_kernel: whether the op has a kernel to choose.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for one that was asked for and cannot run, with the reason.
    """
    return _choose(device.type, asked or asked_by_environment(), has_triton_kernel)


@functools.cache
def _choose(device_type: str, asked: str | None, has_triton_kernel: bool) -> str:
    if asked is not None:
        if asked not in BACKENDS:
            raise ValueError(f"unknown backend {asked!r}; choose from {', '.join(BACKENDS)}")
        reason = why_not(asked, device_type, has_triton_kernel=has_triton_kernel)
        if reason is not None:
            raise RuntimeError(f"the backend {asked!r} was asked for and cannot run: {reason}")
        return asked
    for backend in reversed(BACKENDS):
        reason = why_not(backend, device_type, has_triton_kernel=has_triton_kernel)
        if reason is None:
            logger.info("nsphere ops on %s: %s", device_type, backend)
            return backend
        logger.info("nsphere ops on %s: not %s, because %s", device_type, backend, reason)
    raise AssertionError("the reference always runs")
