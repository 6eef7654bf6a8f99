"""How near do the fused operations come to a copy of as many bytes, and to what torch.compile makes of the formula?"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nsphere.bench import harness
from nsphere.norms import NormSpec
from nsphere.ops import backend as backends
from nsphere.ops.normalized_update import normalized_update
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors, qk_norm_rope
from nsphere.rope import RopeSpec

OpName = Literal["qk_norm_rope", "normalized_update"]
FORMULA, COPY = "torch.compile of the formula", "copy"


@dataclass(frozen=True)
class Args:
    """Forward and backward of the fused operations over torch.compile and over a copy, by turns, one process."""

    ops: tuple[OpName, ...] = ("qk_norm_rope", "normalized_update")
    """What to measure."""
    tokens: tuple[int, ...] = (1024, 8192)
    """Tokens of a call."""
    head_dims: tuple[int, ...] = (64, 128)
    """Of qk_norm_rope, which gets 4 query heads for each key head."""
    num_heads: int = 32
    """Query heads."""
    widths: tuple[int, ...] = (1024, 4096)
    """d_model of normalized_update."""
    rounds: int = 15
    """Calls of each that count."""
    json: Path | None = None
    """Where to write the numbers."""


class Case(NamedTuple):
    """One operation at one size."""

    name: str
    call: Callable[[str | None], tuple[Tensor, ...]]
    """From the backend's name to the outputs."""
    leaves: list[Tensor]
    """What gets a gradient."""
    least_forward: int
    """The fewest bytes that the forward pass could move: each input read, each output written, once."""
    least_backward: int
    """The same for the backward pass, which reads the outputs' gradients and what the forward pass kept."""


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def qk_cases(args: Args, device: str) -> Iterator[Case]:
    """The weighted RMSNorm of Qwen3 and others, and nGPT's norm after RoPE with s_qk; bf16, half pairs."""
    for head_dim in args.head_dims:
        rope = RopeSpec(head_dim)
        rms, unit = NormSpec("rms", 1e-6, weight="shared"), NormSpec("l2", 0.0)
        for name, spec in (("rms", SideSpec(rms, rope)), ("nGPT", SideSpec(unit, rope, norm_first=False))):
            for tokens in args.tokens:
                q, k = (
                    _random(1, tokens, heads, head_dim, dtype=torch.bfloat16, device=device)
                    for heads in (args.num_heads, max(1, args.num_heads // 4))
                )
                cos, sin = rope.tables(tokens, device=device)
                if name == "rms":
                    parameters = [_random(head_dim, dtype=torch.float32, device=device) for _ in "qk"]
                    values = [SideTensors(weight=w, cos=cos, sin=sin) for w in parameters]
                else:
                    parameters = [_random(args.num_heads, head_dim, dtype=torch.float32, device=device)]
                    values = [SideTensors(cos=cos, sin=sin, multiplier=parameters[0]), SideTensors(cos=cos, sin=sin)]

                def call(
                    backend: str | None,
                    q: Tensor = q,
                    k: Tensor = k,
                    spec: SideSpec = spec,
                    values: list[SideTensors] = values,
                ) -> tuple[Tensor, ...]:
                    return qk_norm_rope(q, k, spec, spec, *values, backend=backend)

                tables = _bytes(cos, sin)
                yield Case(
                    f"qk_norm_rope, {name}, D {head_dim}, {tokens:,} tokens",
                    call,
                    [q, k, *parameters],
                    2 * _bytes(q, k) + tables,
                    3 * _bytes(q, k) + tables,
                )


def update_cases(args: Args, device: str) -> Iterator[Case]:
    """The hidden state in fp32 and the block's output in bf16, as in training under autocast; and both in bf16."""
    for width in args.widths:
        for h_dtype in (torch.float32, torch.bfloat16):
            for tokens in args.tokens:
                h = _random(tokens, width, dtype=h_dtype, device=device)
                o = _random(tokens, width, dtype=torch.bfloat16, device=device)
                lr = torch.full((width,), 0.05, device=device).requires_grad_()

                def call(backend: str | None, h: Tensor = h, o: Tensor = o, lr: Tensor = lr) -> tuple[Tensor, ...]:
                    return (normalized_update(h, o, lr, backend=backend),)

                name = str(h_dtype).removeprefix("torch.")
                yield Case(
                    f"normalized_update, h {name}, d {width}, {tokens:,} tokens",
                    call,
                    [h, o, lr],
                    2 * _bytes(h) + _bytes(o),
                    3 * _bytes(h) + 2 * _bytes(o),
                )


CASES: dict[str, Callable[[Args, str], Iterator[Case]]] = {
    "qk_norm_rope": qk_cases,
    "normalized_update": update_cases,
}


def candidates_for(case: Case, device: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The formula compiled; what this library puts into a compiled graph; and its kernels, where they run."""
    found = {FORMULA: torch.compile(lambda: case.call("reference"), dynamic=False)}
    if backends.why_not("compiled", device) is None:
        found["nsphere, compiled"] = torch.compile(lambda: case.call("compiled"), dynamic=False)
    if backends.why_not("triton", device) is None:
        found["nsphere, triton"] = lambda: case.call("triton")
    return found


class Timer:
    """Milliseconds of a call: on a GPU between two events, with nothing of the call's in the L2 cache."""

    def __init__(self, device: str) -> None:
        self.device = device
        # more than any GPU's L2; clearing it also keeps the queue full, so that a launch costs the call nothing
        self.flushed = torch.empty(2**28 if device == "cuda" else 0, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """The time, and what the call returned."""
        if self.device != "cuda":
            began = time.perf_counter()
            result = run()
            return 1e3 * (time.perf_counter() - began), result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), result


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Forward and backward of every candidate and a copy of as many bytes, by turns."""
    torch._dynamo.reset()  # each size is compiled for itself, as a model of that size is
    timer = Timer(device)
    with torch.no_grad():
        outputs = case.call("reference")
    gradients = [torch.randn_like(y) for y in outputs]
    sources = {
        "forward": torch.empty(case.least_forward // 2, dtype=torch.int8, device=device),
        "backward": torch.empty(case.least_backward // 2, dtype=torch.int8, device=device),
    }
    targets = {name: torch.empty_like(source) for name, source in sources.items()}

    def of(function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            forward, outputs = timer(function)
            backward, _ = timer(lambda: torch.autograd.grad(outputs, case.leaves, gradients))
            return {"forward": forward, "backward": backward}

        return run

    candidates = {name: of(function) for name, function in candidates_for(case, device).items()}
    candidates[COPY] = lambda: {
        name: timer(lambda name=name: targets[name].copy_(sources[name]))[0]  # type: ignore[misc]
        for name in sources
    }
    harness.interleave(candidates, 3)
    values = harness.interleave(candidates, rounds)
    return {
        name: {
            way: {
                "ms": harness.quartiles(values[name][way]),
                "share_of_copy_rate": harness.ratios(values[COPY][way], values[name][way]),
                "over_compiled_formula": harness.ratios(values[name][way], values[FORMULA][way]),
            }
            for way in ("forward", "backward")
        }
        for name in candidates
    }


def main(args: Args) -> None:
    """Measure, print, write."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    rows = []
    for op in args.ops:
        for case in CASES[op](args, device):
            found = measure(case, device, args.rounds)
            results[case.name] = {
                "least_bytes": {"forward": case.least_forward, "backward": case.least_backward},
                **found,
            }
            for name, ways in found.items():
                cells = []
                for way in ("forward", "backward"):
                    cells += [
                        f"{ways[way]['ms'][1]:.4g}",
                        f"{ways[way]['share_of_copy_rate'][1]:.0%}",
                        harness.spread(ways[way]["over_compiled_formula"]),
                    ]
                rows.append([f"{case.name}: {name}", *cells])
    header = [
        "case",
        *(f"{way} {what}" for way in ("forward", "backward") for what in ("ms", "of copy", "over formula")),
    ]
    harness.finish("fused operations", header, rows, results, args.json)
