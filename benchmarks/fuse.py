"""What does nsphere.hf.fuse save in a transformers model: in one attention, in a training step, in generation?

A small Qwen 3 as transformers has it, and the same with norm and RoPE of q and k as one op, eager and compiled (layer
by layer), forward and backward; greedy generation eager only. By turns in one process; medians, and ratios round by
round.

    python benchmarks/fuse.py --json benchmarks/results/fuse.json
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
import tyro

from nsphere import hf

Candidate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Args:
    """Fused over plain transformers."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of weights and activations."""
    modes: tuple[str, ...] = ("eager", "compiled")
    """eager, compiled."""
    parts: tuple[str, ...] = ("attention", "step", "generation")
    """What is timed: attention, step, generation."""
    batch: int = 2
    """Sequences."""
    length: int = 512
    """Tokens in each."""
    new_tokens: int = 24
    """Tokens generated."""
    rounds: int = 9
    """Runs of each that count."""
    threads: int = 2
    """Threads of torch."""
    json: Path | None = None
    """Where to write the numbers."""


def make(dtype: torch.dtype) -> Any:
    config = transformers.Qwen3Config(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        intermediate_size=1536, vocab_size=4096, max_position_embeddings=1024, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(config).to(dtype)


def timed(run: Callable[[], Any]) -> Candidate:
    def candidate() -> dict[str, float]:
        start = time.perf_counter()
        run()
        return {"ms": (time.perf_counter() - start) * 1e3}

    return candidate


def attention(model: Any, args: Args, dtype: torch.dtype, compiled: bool) -> Candidate:
    block = model.model.layers[0].self_attn
    x = torch.randn(args.batch, args.length, 512, dtype=dtype, requires_grad=True)
    tables = model.model.rotary_emb(x, torch.arange(args.length)[None])
    call = torch.compile(block) if compiled else block

    def run() -> None:
        call(x, tables, None)[0].sum().backward()

    return timed(run)


def step(model: Any, args: Args, compiled: bool) -> Candidate:
    ids = torch.randint(0, 4096, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    if compiled:
        for layer in model.model.layers:
            layer.compile()

    def run() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(run)


def generation(model: Any, args: Args) -> Candidate:
    ids = torch.arange(8)[None]
    model.eval()
    return timed(lambda: model.generate(ids, max_new_tokens=args.new_tokens, do_sample=False))


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    candidates: dict[str, dict[str, Candidate]] = {}
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for mode in args.modes:
            compiled = mode == "compiled"
            models = {"plain": make(dtype)}
            models["fused"] = copy.deepcopy(models["plain"])
            hf.fuse(models["fused"])
            if "attention" in args.parts:
                candidates[f"attention {name} {mode}"] = {
                    arm: attention(copy.deepcopy(m), args, dtype, compiled) for arm, m in models.items()
                }
            if "generation" in args.parts and not compiled:
                candidates[f"generation {name} {mode}"] = {
                    arm: generation(copy.deepcopy(m), args) for arm, m in models.items()
                }
            if "step" in args.parts:
                candidates[f"step {name} {mode}"] = {arm: step(m, args, compiled) for arm, m in models.items()}
    for arms in candidates.values():
        for run in arms.values():
            run(), run()  # what is compiled is compiled here
    print("warm", flush=True)
    results, rows = {}, []
    for what, arms in candidates.items():
        ms = {arm: values["ms"] for arm, values in harness.interleave(arms, args.rounds).items()}
        ratio = harness.ratios(ms["fused"], ms["plain"])
        results[what] = {**{arm: harness.quartiles(v) for arm, v in ms.items()}, "fused_over_plain": ratio}
        medians = [f"{harness.quartiles(ms[arm])[1]:.1f}" for arm in ("plain", "fused")]
        rows.append([what, *medians, f"{ratio[1]:.3f} [{ratio[0]:.3f}, {ratio[2]:.3f}]"])
    harness.finish("fuse", ["", "plain ms", "fused ms", "fused over plain"], rows, results, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
