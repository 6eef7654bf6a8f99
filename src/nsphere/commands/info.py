"""`nsphere info`."""

import platform
from dataclasses import dataclass

import torch

import nsphere
from nsphere.commands.flags import parse
from nsphere.ops import backend
from nsphere.train.machine import cpu_name, has_bf16


@dataclass(frozen=True)
class Info:
    """What this machine can do: devices, dtypes, the compiler and the backends, and why not."""


def main(argv: list[str]) -> None:
    parse(Info, "info", argv)
    print(_info())


def _info() -> str:
    rows = [
        ["nsphere", nsphere.__version__],
        ["torch", torch.__version__],
        ["python", platform.python_version()],
        ["cpu", f"{cpu_name()}, {torch.get_num_threads()} threads"],
    ]
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if len(devices) == 1:
        rows.append(["gpu", "none" if torch.version.cuda else "none (this torch is built without CUDA)"])
    for device in devices:
        bf16, compiler = has_bf16(device), backend.can_compile(device.type)
        rows.append([f"{device} dtype", f"{'bfloat16' if bf16.available else 'float32'}: {bf16.reason}"])
        rows.append([f"{device} model", f"{'compiled' if compiler.available else 'eager'}: {compiler.reason}"])
        for name in backend.BACKENDS:
            reason = backend.why_not(name, device.type)
            rows.append([f"{device} ops, {name}", "runs" if reason is None else f"does not run: {reason}"])
        asked = backend.asked_by_environment()
        why = "NSPHERE_BACKEND asks for it" if asked else backend.preferred(device.type)[1]
        rows.append([f"{device} ops, chosen", f"{backend.choose(device)}: {why}"])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
