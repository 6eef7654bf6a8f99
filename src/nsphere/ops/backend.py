"""Which implementation of an op runs: chosen once per device, logged, and refused with the reason if it cannot.

    reference  plain PyTorch, op by op
    compiled   the same formulas through torch.compile: the graph they are traced into, or one of their own, cached
    triton     the hand-written kernels, on cuda; on a CPU with TRITON_INTERPRET=1, to test them

The default on a device is what measured fastest there. NSPHERE_BACKEND, or an op's `backend` argument, asks for one by
name, and what then cannot run is an error.
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

_PREFERRED = {
    "cpu": (("compiled", "reference"), "the compiler's code measured fastest (docs/performance.md)"),
    "cuda": (
        ("compiled", "reference"),
        "the kernels have not been measured on a GPU yet (`make gpu` does it); NSPHERE_BACKEND=triton asks for them",
    ),
}

logger = logging.getLogger("nsphere")


class Ability(NamedTuple):
    """Whether something can be done here; the reason why not, or what makes it possible."""

    available: bool
    reason: str


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), for what the forward of an autograd function returns.

    Where there is nothing to convert, `to` gives the tensor back, which torch 2.11 then takes for two, in a compiled
    graph: the gradient goes to the one that is not the output, and is lost (pytorch/pytorch#180642).
    """
    return x if x.dtype == dtype else x.to(dtype)


def cpp_command() -> list[str]:
    """The C++ compiler that torch.compile would call."""
    return shlex.split(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


@functools.cache
def cpp_compiler() -> Ability:
    """Whether the C++ compiler that torch.compile would call, $CXX or g++, builds a shared library with OpenMP."""
    command = cpp_command()
    name = shlex.join(command)
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


def interpreted() -> bool:
    """Whether Triton kernels are interpreted, which is how they run, slowly, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, device_type: str) -> str | None:
    """The reason `backend` cannot run on this kind of device, or None if it can."""
    if backend == "reference":
        return None
    if backend == "compiled":
        ability = can_compile(device_type)
        return None if ability.available else ability.reason
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if device_type == "cpu" and interpreted():
        return None
    if device_type != "cuda":
        return f"Triton kernels run on cuda, not on {device_type}"
    return None


def asked_by_environment() -> str | None:
    """The value of NSPHERE_BACKEND, None if it is unset or empty."""
    return os.environ.get("NSPHERE_BACKEND") or None


def check_name(backend: str) -> None:
    """Raises ValueError for the name of no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")


def choose(device: torch.device, asked: str | None = None) -> str:
    """The backend for an op on this device.

    Args:
        device: where the tensors live.
        asked: a name; None reads NSPHERE_BACKEND, and without that takes the one that measured fastest.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for one that was asked for and cannot run, with the reason.
    """
    return choose_for(device.type, asked)


def choose_for(device_type: str, asked: str | None = None) -> str:
    """`choose` by the device's type; a graph that is being traced takes the answer as a constant."""
    return _choose(device_type, asked or asked_by_environment())


# what torch.compiler.assume_constant_result sets, without its import of the compiler, which takes seconds
choose_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(device_type: str, asked: str | None) -> str:
    if asked is not None:
        check_name(asked)
        reason = why_not(asked, device_type)
        if reason is not None:
            raise refuse(asked, reason)
        return asked
    for backend in preferred(device_type)[0]:
        reason = why_not(backend, device_type)
        if reason is None:
            logger.info("nsphere ops on %s: %s", device_type, backend)
            return backend
        logger.info("nsphere ops on %s: not %s, because %s", device_type, backend, reason)
    raise AssertionError("the reference always runs")


def preferred(device_type: str) -> tuple[tuple[str, ...], str]:
    """The backends in the order in which they are tried on this kind of device, and why in that order."""
    return _PREFERRED.get(device_type, (("reference",), "nothing else runs here"))


def refuse_or_log(asked: str | None, backend: str, reason: str) -> None:
    """Raise RuntimeError where the backend that can't do this call was asked for by name, else log it once."""
    if asked or asked_by_environment():
        raise refuse(backend, reason)
    _log_once(f"not {backend}: {reason}")


# in a graph that is being traced it speaks while tracing
refuse_or_log._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _log_once(message: str) -> None:
    logger.info("nsphere ops: %s", message)


def refuse(asked: str, reason: str) -> RuntimeError:
    """The error for a backend that was asked for by name and cannot do this call."""
    return RuntimeError(f"the backend {asked!r} was asked for and cannot run: {reason}")
