"""What does the loss at the end of a language model cost: output projection and cross-entropy, forward and backward?

nsphere's `linear_cross_entropy` against full logits with `F.cross_entropy`, and against torch's `linear_cross_entropy`
(from 2.13; by default it stores the logits, and its chunks are not compiled); eager and compiled, by turns in one
process.

    python benchmarks/loss.py --json benchmarks/results/loss.json
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import harness
import torch
import torch.nn.functional as F
import tyro

from nsphere.ops.linear_cross_entropy import linear_cross_entropy

OURS = "nsphere"


@dataclass(frozen=True)
class Args:
    """Milliseconds of the loss, forward and backward."""

    tokens: int = 4096
    """N."""
    d_model: int = 512
    """d."""
    vocab_sizes: tuple[int, ...] = (8192, 32768)
    """V."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of h and the products; weights are fp32 under autocast then."""
    rounds: int = 5
    """Calls of each that count."""
    threads: int = 2
    """Threads of torch."""
    json: Path | None = None
    """Where to write the numbers."""


def full_logits(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((h @ weight.t()).float(), targets)


def ways() -> dict[str, Any]:
    """Each way to the loss, by name; torch's where this torch has it."""
    found: dict[str, Any] = {OURS: linear_cross_entropy, "full logits": full_logits}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    compiled = {f"{name}, compiled": torch.compile(function, dynamic=False) for name, function in found.items()}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        chunks = functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
        found["F.linear_cross_entropy by chunks"] = chunks
    return found | compiled


def measure(args: Args, vocab_size: int) -> dict[str, dict[str, Any]]:
    """All ways at one vocabulary."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    h = torch.randn(args.tokens, args.d_model, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, args.d_model, generator=generator) / args.d_model**0.5).requires_grad_()
    targets = torch.randint(vocab_size, (args.tokens,), generator=generator)
    losses: dict[str, float] = {}

    def step(name: str, function: Any) -> Any:
        def run() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = function(h, weight, targets)
            loss.backward()
            losses[name] = loss.item()
            h.grad = weight.grad = None

        return harness.milliseconds(run)

    calls = {name: step(name, function) for name, function in ways().items()}
    harness.interleave(calls, 2)
    values = {name: found["ms"] for name, found in harness.interleave(calls, args.rounds).items()}
    return {
        name: {
            "ms": harness.quartiles(ms),
            "ours_compiled_over": harness.ratios(values[f"{OURS}, compiled"], ms),
            "loss": losses[name],
        }
        for name, ms in values.items()
    }


def main(args: Args) -> None:
    """Measure, print, write."""
    torch.set_num_threads(args.threads)
    results, rows = {}, []
    for vocab_size in args.vocab_sizes:
        results[f"V {vocab_size}"] = found = measure(args, vocab_size)
        rows += [
            [
                f"V {vocab_size}, {name}",
                f"{r['ms'][1]:.0f}",
                harness.spread(r["ours_compiled_over"]),
                f"{r['loss']:.5f}",
            ]
            for name, r in found.items()
        ]
    title = f"loss, forward and backward, {args.tokens} tokens, d {args.d_model}, {args.dtype}"
    harness.finish(title, ["", "ms", f"{OURS}, compiled, over it", "loss"], rows, results, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
