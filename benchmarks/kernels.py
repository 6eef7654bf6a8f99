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

from nsphere.norms import NormSpec, eps_of
from nsphere.ops.launch import Launch
from nsphere.ops.normalized_update import triton as update_kernels
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors
from nsphere.ops.qk_norm_rope import triton as qk_kernels
from nsphere.ops.sphere_adamw import triton as adamw_kernels
from nsphere.rope import RopeSpec

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
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def kind(path: tuple[int, ...], value: Any, fixed: bool) -> Any:
        """The argument's type in the signature, as the launcher would specialise it."""
        if isinstance(value, tuple) and not fixed:
            return type(value)._make(kind((*path, i), v, False) for i, v in enumerate(value))  # type: ignore[attr-defined]
        if fixed or value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    parameters = launch.kernel.params
    signature = {n: kind((i,), v, parameters[i].is_constexpr) for i, (n, v) in enumerate(ordered(launch))}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options())
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


def qk_tensors(spec: SideSpec, head_dim: int, heads: int, tokens: int, learned_scale: bool) -> SideTensors:
    """Weights in fp32, tables in fp32, and s_qk where asked."""
    fp32 = torch.float32
    shapes = {"shared": (head_dim,), "per_head": (heads, head_dim), "full": (heads * head_dim,)}
    shape = None if spec.norm is None else shapes.get(spec.norm.weight)
    weight = None if shape is None else on_meta(*shape, dtype=fp32)
    bias = weight if spec.norm is not None and spec.norm.bias else None
    cos = None if spec.rope is None else on_meta(tokens, 1, spec.rope.dim // 2, dtype=fp32)
    return SideTensors(weight, bias, cos, cos, on_meta(heads, head_dim, dtype=fp32) if learned_scale else None)


def qk_case(
    name: str, spec: SideSpec, head_dim: int, dtype: torch.dtype, learned_scale: bool = False, tokens: int = 8192
) -> Iterator[Case]:
    """Forward and backward at 32 query and 8 key heads; the least bytes count what the backward keeps as well."""
    num_heads = (32, 8)
    xs, ys, grads, dxs = ([on_meta(1, tokens, h, head_dim, dtype=dtype) for h in num_heads] for _ in range(4))
    values = [qk_tensors(spec, head_dim, h, tokens, learned_scale and h == 32) for h in num_heads]
    inverses = [qk_kernels._inverse_like(x, spec) if spec.norm else None for x in xs]
    flat = tuple(getattr(t, f) for t in values for f in ("weight", "bias", "cos", "sin", "multiplier"))
    plan, norm = qk_kernels.encode((spec, spec)), spec.norm
    numbers = (1.0, *((0.0, 1.0) if norm is None else (eps_of(norm, dtype), norm.scale))) * 2
    sides, blocks = qk_kernels._sides(xs, plan, flat, numbers, [False] * 6)
    tables = num_bytes(values[0].cos, values[0].sin)
    parameters = num_bytes(*(w for t in values for w in (t.weight, t.bias, t.multiplier)))
    least = num_bytes(*xs, *ys, *inverses) + tables + parameters
    yield Case(
        f"qk_norm_rope forward, {name}", qk_kernels.forward_launch(xs, ys, inverses, sides, blocks), least, least
    )
    wanted = [w is not None for t in values for w in (t.weight, t.bias, t.multiplier)]
    sides, blocks = qk_kernels._sides(xs, plan, flat, numbers, wanted)
    grid = (-(-4 * 132 // blocks), blocks)
    sums = [qk_kernels._empty_sums(side, grid, x) for side, x in zip(sides, xs, strict=True)]
    saved = [None if spec.norm is None and t.multiplier is None else x for x, t in zip(xs, values, strict=True)]
    launch = qk_kernels.backward_launch(grads, saved, dxs, inverses, sums, sides, grid)
    least = num_bytes(*grads, *saved, *dxs, *inverses) + tables + 2 * parameters
    moved = least + 2 * num_bytes(*(rows for of_side in sums for rows in of_side))
    yield Case(f"qk_norm_rope backward, {name}", launch, moved, least)


def qk_cases() -> Iterator[Case]:
    """What the published families and nGPT use."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for head_dim in (64, 128):
        half, interleaved = RopeSpec(head_dim), RopeSpec(head_dim, layout="interleaved")
        partial = RopeSpec(head_dim // 2)
        rms, bare = NormSpec("rms", 1e-6, weight="shared"), NormSpec("rms", 1e-6)
        unit = NormSpec("l2", 0.0)
        layer = NormSpec("layer", 1e-5, weight="per_head")
        full = NormSpec("rms", 1e-6, weight="full")
        for name, spec, dtype, scale in (
            ("rms [D], half", SideSpec(rms, half), bf16, False),
            ("rms [D], half, fp32", SideSpec(rms, half), fp32, False),
            ("rms [D], interleaved", SideSpec(rms, interleaved), bf16, False),
            ("rms [D], half of D", SideSpec(rms, partial), bf16, False),
            ("rms bare, half", SideSpec(bare, half), bf16, False),
            ("rms bare after half", SideSpec(bare, half, norm_first=False), bf16, False),
            ("nGPT: l2 after half, s_qk", SideSpec(unit, half, norm_first=False), bf16, True),
            ("layer [H, D], interleaved", SideSpec(layer, interleaved), bf16, False),
            ("rms [H·D] over all heads, half", SideSpec(full, half, over="full"), bf16, False),
            ("rope alone, half", SideSpec(None, half), bf16, False),
        ):
            yield from qk_case(f"D {head_dim}, {name}", spec, head_dim, dtype, scale)


def adamw_cases() -> Iterator[Case]:
    """The matrices of the 0.5B preset (d 1024), fp32, and one weight without a norm."""
    hyper = dict.fromkeys(adamw_kernels.NO_STEP, 0.5)
    table = on_meta(1, 9, dtype=torch.int64)
    for what, shape, dim in (("rows", (4096, 1024), 1), ("columns", (1024, 4096), 0), ("no norm", (32000,), None)):
        w = on_meta(*shape, dtype=torch.float32)
        step = on_meta(dtype=torch.float32)
        for grad, copy in ((torch.float32, None), (torch.bfloat16, torch.bfloat16)):
            rounded = None if copy is None else w.to(copy)
            member = adamw_kernels.Tensors(w, dim, w.to(grad), w, w, rounded, step)
            kind = adamw_kernels.kind_of(member)
            launch = adamw_kernels.launch_for(kind, [member], table, hyper, seed=None, grad_scale=None, found_inf=None)
            least = 6 * num_bytes(w) + num_bytes(member.grad, rounded)
            moved = least + (2 * num_bytes(w) if kind.columns else 0)
            name = f"sphere_adamw {what}, {str(grad).removeprefix('torch.')} gradient"
            yield Case(name + (", bf16 copy" if copy else ""), launch, moved, least)
        if dim is None:
            continue
        member = adamw_kernels.Tensors(w, dim)
        kind = adamw_kernels.kind_of(member)
        launch = adamw_kernels.launch_for(kind, [member], table, hyper, seed=None, grad_scale=None, found_inf=None)
        moved = num_bytes(w) * (3 if kind.columns else 2)
        yield Case(f"normalize_matrices {what}", launch, moved, 2 * num_bytes(w))


def cases() -> list[Case]:
    return [*update_cases(), *qk_cases(), *adamw_cases()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, 90 for sm_90")
    parser.add_argument("--short", action="store_true", help="one case of each kernel")
    parser.add_argument("--only", default="", help="the cases whose name has this in it")
    parser.add_argument("--json", type=Path, help="where to write the table")
    args = parser.parse_args()
    import harness

    chosen, archs = [c for c in cases() if args.only in c.name], args.arch
    if args.short:
        chosen = list({case.name.partition(",")[0]: case for case in chosen}.values())
    results, rows, spilled = [], [], []
    for case in chosen:
        print(f"\r{case.name}".ljust(100), end="", file=sys.stderr, flush=True)
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
