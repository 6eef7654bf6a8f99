"""What do the Triton kernels compile to, without a GPU: registers, shared memory, stack and local memory, per kernel.

Each specialisation in use is compiled ahead of time for sm_80, sm_90 and sm_100; the bundled cuobjdump reports what it
needs. Beside it stand the bytes a launch moves and the fewest it could: each input read and each output written once.

    python benchmarks/kernels.py [--arch 80 90 100] [--short] [--json benchmarks/results/kernels.json]
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nsphere.ops.launch import Launch
from nsphere.ops.normalized_update import triton as update_kernels

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Case(NamedTuple):
    """A launch at a size that training uses; the tensors are on the meta device."""

    name: str
    launch: Launch
    moved: int
    """Bytes read and written by this launch."""
    least: int
    """The fewest bytes the operation could move."""


def compile_for(launch: Launch, arch: int) -> dict[str, int]:
    """Registers, and bytes of shared, stack and local memory, of the kernel as this launch specialises it."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(ordered(launch)):
        divisible = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if launch.kernel.params[i].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # cuobjdump knows the static part of shared memory alone
    return resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def ordered(launch: Launch) -> Iterator[tuple[str, Any]]:
    assert set(launch.arguments) == set(launch.kernel.arg_names), set(launch.arguments) ^ set(launch.kernel.arg_names)
    for name in launch.kernel.arg_names:
        yield name, launch.arguments[name]


def resources(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` says of the one function in this cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    fields = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report.stdout))
    return {name.lower(): int(fields[name]) for name in ("REG", "STACK", "LOCAL")}


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def num_bytes(*tensors: Tensor | None) -> int:
    """Each element of each tensor once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def update_cases(tokens: int = 8192) -> Iterator[Case]:
    """normalized_update at the 0.5B preset's width and at a wide one."""
    for d in (1024, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            h, o, out, grad, h_grad, o_grad = (on_meta(1, tokens, d, dtype=dtype) for _ in range(6))
            lr, partial = on_meta(d, dtype=torch.float32), on_meta(4 * 132, d, dtype=torch.float32)
            name = f"d {d} {str(dtype).removeprefix('torch.')}"
            least = num_bytes(h, o, out, lr)
            yield Case(f"normalized_update forward, {name}", update_kernels.forward_launch(h, o, lr, out), least, least)
            least = num_bytes(grad, h, o, lr, h_grad, o_grad, lr)
            launch = update_kernels.backward_launch(grad, h, o, lr, h_grad, o_grad, partial)
            # the partial sums are written here and read by the sum that follows
            yield Case(f"normalized_update backward, {name}", launch, least + 2 * num_bytes(partial), least)


def cases() -> list[Case]:
    return [*update_cases()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, 90 for sm_90")
    parser.add_argument("--short", action="store_true", help="one case of each kernel, for sm_90 alone")
    parser.add_argument("--json", type=Path, help="where to write the table")
    args = parser.parse_args()
    import harness

    chosen, archs = cases(), [90] if args.short else args.arch
    if args.short:
        chosen = list({case.launch.kernel.__name__ + case.name.split()[0]: case for case in chosen}.values())
    results, rows, spilled = [], [], []
    for case in chosen:
        found = {f"sm_{arch}": compile_for(case.launch, arch) for arch in archs}
        bad = [f"{case.name} on {arch}: {use}" for arch, use in found.items() if use["stack"] or use["local"]]
        spilled += bad
        results.append(
            {
                "kernel": case.name,
                "num_warps": case.launch.num_warps,
                "bytes_moved": case.moved,
                "bytes_least": case.least,
                "resources": found,
            }
        )
        uses = [f"{u['reg']} / {u['shared']} / {u['stack']} / {u['local']}" for u in found.values()]
        rows.append([case.name, str(case.launch.num_warps), *uses, f"{case.moved / case.least:.3f}"])
    header = ["kernel", "warps", *(f"sm_{arch} reg / shared / stack / local" for arch in archs), "bytes / least"]
    harness.finish(f"kernels, triton {triton.__version__}", header, rows, results, args.json)
    for line in spilled:
        print(f"uses local memory: {line}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
