"""What this machine can do: device, dtype, compiler; and why not, where it can't."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import nsphere
from nsphere.ops.backend import Ability


def has_bf16(device: torch.device) -> Ability:
    """Whether bf16 products are fast on this device: in hardware, not emulated."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Ability(native, f"{torch.cuda.get_device_name(device)} {'has' if native else 'has no'} bf16")
    if device.type != "cpu":
        return Ability(False, f"{device.type} is trained in float32")
    supports = [
        name
        for name, check in (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported"))
        if getattr(torch.cpu, check, lambda: False)()
    ]
    if supports:
        return Ability(True, f"this CPU has bf16 ({', '.join(supports)})")
    return Ability(False, "this CPU has no bf16 instructions")


def choose_device(name: str) -> torch.device:
    """The device of a flag: auto, cpu, cuda, cuda:1.

    Raises:
        ValueError: not a device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index is not None and device.index >= torch.cuda.device_count())
    ):
        raise ValueError(f"device {name} is not on this machine ({torch.cuda.device_count()} CUDA devices); use cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:N")
    return device


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the source this runs from, with + where files differ from it; None for an installed package."""
    source = Path(nsphere.__file__).parent
    try:
        run = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        tracked = subprocess.run(
            ["git", "-C", str(source), "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 and tracked.returncode == 0 else None


def environment(device: torch.device) -> dict[str, object]:
    """Versions and hardware, as they go into every record of a run."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "nsphere": nsphere.__version__,
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
