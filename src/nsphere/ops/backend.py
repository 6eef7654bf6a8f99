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
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch

BACKENDS = ("reference", "compiled", "triton")

logger = logging.getLogger("nsphere")


class Ability(NamedTuple):
    """Whether something can be done here; the reason why not, or what makes it possible."""

    available: bool
    reason: str


@functools.cache
def cpp_compiler() -> Ability:
    """Whether the C++ compiler that torch.compile would call, $CXX or g++, builds a shared library with OpenMP."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    command = shlex.split(name)
    if not command or shutil.which(command[0]) is None:
        return Ability(False, f"no C++ compiler found ({name} is not on the PATH); install g++, or set CXX")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write('#include <cmath>\nextern "C" double probe(double x) { return std::exp(x); }\n')
        try:
            built = subprocess.run(
                [*command, "-shared", "-fPIC", *openmp, source, "-o", os.path.join(folder, "probe.so")],
                capture_output=True,
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Ability(False, f"the C++ compiler {name} does not run ({error})")
    if built.returncode != 0:
        return Ability(False, f"the C++ compiler {name} can't build a small library; repair it, or set CXX")
    return Ability(True, f"C++ compiler {shutil.which(command[0])}")


@functools.cache
def can_compile(device_type: str) -> Ability:
    """Whether torch.compile works for this kind of device."""
    if device_type == "cpu":
        return cpp_compiler()
    if device_type != "cuda":
        return Ability(False, f"torch.compile is not used on {device_type}")
    if importlib.util.find_spec("triton") is None:
        return Ability(False, "the triton package is not installed")
    # Triton builds its launchers with a C compiler
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(name) for name in compilers):
        return Ability(False, f"no C compiler found ({', '.join(compilers)}); install gcc, or set CC")
    return Ability(True, "triton")


def why_not(backend: str, device_type: str, *, has_triton_kernel: bool) -> str | None:
    """The reason `backend` cannot run on this kind of device, or None if it can."""
    if backend == "reference":
        return None
    triton = importlib.util.find_spec("triton") is not None
    if backend == "compiled":
        ability = can_compile(device_type)
        return None if ability.available else ability.reason
    if not has_triton_kernel:
        return "this op has no Triton kernel"
    if device_type != "cuda":
        return f"Triton kernels run on cuda, not on {device_type}"
    return None if triton else "the triton package is not installed"


def asked_by_environment() -> str | None:
    """The value of NSPHERE_BACKEND, None if it is unset or empty."""
    return os.environ.get("NSPHERE_BACKEND") or None


def check_name(backend: str) -> None:
    """Raises ValueError for the name of no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")


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
        check_name(asked)
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
