"""What does a compiled training step cost beside its matrix products and its attention?

These two are the same for GPT and nGPT, call by call, and most of a step: on a busy machine their noise hides the rest,
which is where the arms differ. Here torch's profiler times every kernel of a step; the arms take turns in one process.

    python benchmarks/step_parts.py --dtypes float32 bfloat16 --json benchmarks/results/step_parts.json
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from nsphere.bench.step import ARMS, SIZES, Size, SizeName, make_trainers, timed_step
from nsphere.train.config import DtypeName
from nsphere.train.machine import has_bf16
from nsphere.train.trainer import Trainer

PARTS = ("products", "attention", "kernels", "clip", "optimizer")
"""kernels: all that the compiler made; clip and optimizer: all of these two phases of the step."""


@dataclass(frozen=True)
class Args:
    """Milliseconds of a step by kind of work, CPU."""

    size: SizeName = "d512"
    """As in `nsphere bench step`."""
    layers: int | None = None
    """Blocks; the size's if not given."""
    dtypes: tuple[DtypeName, ...] = ("auto",)
    """Of the products; auto is bfloat16 where the processor has it, as in training."""
    arms: tuple[str, ...] = ARMS
    """What to measure; the first two are what the others are divided by."""
    rounds: int = 7
    """Steps of each arm that count."""
    seconds: float | None = None
    """After so many (not counting compilation and warm-up) a dtype gets no round but the first three."""
    threads: int = 2
    """Threads of torch."""
    json: Path | None = None
    """Where to write the numbers."""


def emulated(dtype: str) -> bool:
    """Whether this processor has no instructions for such products, so that a step would take minutes."""
    return dtype == "bfloat16" and not has_bf16(torch.device("cpu")).available


@contextlib.contextmanager
def products_by_way_of_fp32() -> Iterator[None]:
    """Compiled graphs multiply bf16 matrices in fp32, where that is the faster; nothing but the products changes."""
    from torch._inductor.select_algorithm import extern_kernels

    plain = extern_kernels.mm

    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return plain(a, b, out=out) if a.dtype != torch.bfloat16 else out.copy_(a.float() @ b.float())

    extern_kernels.mm = mm
    try:
        yield
    finally:
        extern_kernels.mm = plain


def profiled_step(trainer: Trainer) -> dict[str, float]:
    """One step, ms by part."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        phases = timed_step(trainer)
    parts = dict.fromkeys(PARTS, 0.0) | {"clip": phases["clip"], "optimizer": phases["optimizer"]}
    for event in profiler.key_averages():
        name, ms = event.key, event.self_cpu_time_total / 1e3
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            parts["products"] += ms
        elif "scaled_dot_product" in name and "cpp_fused" not in name:
            parts["attention"] += ms
        elif "cpp_fused" in name:
            parts["kernels"] += ms
    return parts | {"beside": parts["kernels"] + parts["clip"] + parts["optimizer"]}


def measure(args: Args, dtype: Any) -> dict[str, dict[str, Any]]:
    """All arms in one dtype."""
    torch._dynamo.reset()
    size = SIZES[args.size]
    if args.layers is not None:
        size = Size(dataclasses.replace(size.config, num_layers=args.layers), size.vocab_size)
    trainers = make_trainers(size, args.arms, True, dtype)
    with products_by_way_of_fp32() if emulated(dtype) else contextlib.nullcontext():
        for trainer in trainers.values():
            timed_step(trainer)
        values = harness.interleave(
            {arm: lambda t=t: profiled_step(t) for arm, t in trainers.items()},  # type: ignore[misc]
            args.rounds,
            args.seconds,
        )
    return {
        arm: {
            "ms": {part: harness.quartiles(found) for part, found in values[arm].items()},
            **{f"over_{base}": harness.ratios(values[arm]["beside"], values[base]["beside"]) for base in args.arms[:2]},
        }
        for arm in args.arms
    }


def main(args: Args) -> None:
    """Measure, print, write."""
    torch.set_num_threads(args.threads)
    # each kernel that the compiler makes shows in the profile by its name
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True
    results, rows = {}, []
    bf16 = has_bf16(torch.device("cpu")).available
    for asked in args.dtypes:
        dtype = asked if asked != "auto" else "bfloat16" if bf16 else "float32"
        for arm, found in measure(args, dtype).items():
            name = f"{dtype}, products by way of float32" if emulated(dtype) else dtype
            results.setdefault(name, {})[arm] = found
            rows.append(
                [
                    f"{name}, {arm}",
                    *(f"{found['ms'][part][1]:.1f}" for part in (*PARTS, "beside")),
                    *(harness.spread(found[f"over_{base}"], 3) for base in args.arms[:2]),
                ]
            )
    header = ["dtype, arm", *PARTS, "the last three", *(f"over {base}" for base in args.arms[:2])]
    title = f"a step beside its products, {args.size}" + ("" if args.layers is None else f", {args.layers} blocks")
    harness.finish(title, header, rows, results, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
