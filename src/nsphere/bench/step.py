"""What does a training step of nGPT cost, over GPT and over GPT + QK-norm, and where does it go?"""

import dataclasses
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nsphere.bench import harness
from nsphere.train.config import DtypeName, RunOptions, TrainConfig, resolve
from nsphere.train.data import Corpus, TokenSplit
from nsphere.train.gradients import clip_grad_norm_
from nsphere.train.metrics import flops_per_token, peak_flops
from nsphere.train.timing import peak_memory
from nsphere.train.tokenizer import ByteTokenizer
from nsphere.train.trainer import Trainer

ARMS = ("gpt", "gpt-qknorm", "ngpt")
PARTS = ("forward", "backward", "clip", "optimizer")


@dataclass(frozen=True)
class Size:
    """A shape to measure at."""

    config: TrainConfig
    vocab_size: int


SIZES = {
    "demo": Size(TrainConfig(preset="demo"), 256),
    "d512": Size(TrainConfig(preset="demo", d_model=512, num_layers=8, num_heads=8, context=512, batch_size=8), 8192),
    "0.5b-1k": Size(TrainConfig(preset="0.5b", context=1024, batch_size=16), 32000),
    "0.5b-4k": Size(TrainConfig(preset="0.5b", context=4096, batch_size=4), 32000),
    "0.5b-8k": Size(TrainConfig(preset="0.5b", context=8192, batch_size=2), 32000),
}
SizeName = Literal["demo", "d512", "0.5b-1k", "0.5b-4k", "0.5b-8k"]


@dataclass(frozen=True)
class Args:
    """Step times of nGPT over GPT: forward, backward, clipping, optimizer with projection; by turns, one process."""

    sizes: tuple[SizeName, ...] = ("demo", "d512")
    """demo: the demo's; d512: d_model 512, 8 layers, context 512, vocabulary 8192, batch 8; 0.5b: for a GPU."""
    rounds: int = 15
    """Steps of each arm that count."""
    seconds: float | None = None
    """After so many (not counting compilation and warm-up) a size and mode gets no round but the first three."""
    modes: tuple[Literal["compiled", "eager"], ...] = ("compiled", "eager")
    """How the models run."""
    arms: tuple[str, ...] = ARMS
    """What to measure; the first two are what the others are divided by."""
    dtype: DtypeName = "auto"
    """As in training: products in bfloat16 (autocast) or float32; auto is bfloat16 where the hardware has it."""
    batch_size: int | None = None
    """Sequences of a step; the size's if not given."""
    json: Path | None = None
    """Where to write the numbers."""


def random_corpus(vocab_size: int) -> Corpus:
    """Tokens without meaning: the cost of a step does not depend on them."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, 200_000, dtype=np.uint16)
    split = TokenSplit("training", tokens)
    return Corpus(split, split, vocab_size, ByteTokenizer(), "", "random", None)


def make_trainers(size: Size, arms: tuple[str, ...], compiled: bool, dtype: DtypeName = "auto") -> dict[str, Trainer]:
    """A trainer for each arm, on random tokens."""
    corpus, options = random_corpus(size.vocab_size), RunOptions(compile=compiled)
    config = dataclasses.replace(size.config, steps=10_000, eval_sequences=8, dtype=dtype)
    return {arm: Trainer(arm, resolve(arm, config), options, corpus) for arm in arms}


def timed_step(trainer: Trainer) -> dict[str, float]:
    """One step in parts, ms. nGPT's projection is part of its optimizer's step."""
    batch = trainer.batches(trainer.num_steps).to(trainer.device)
    harness.synchronize()
    marks = [time.perf_counter()]

    def mark() -> None:
        harness.synchronize()
        marks.append(time.perf_counter())

    with trainer.autocast():
        loss = trainer.model.loss(*batch)
    mark()
    loss.backward()
    mark()
    clip_grad_norm_(trainer.model, 1.0, trainer.world)
    mark()
    for optimizer in trainer.optimizers:
        optimizer.step()
    trainer.model.zero_grad(set_to_none=True)
    mark()
    trainer.num_steps += 1
    parts = dict(zip(PARTS, (1e3 * (b - a) for a, b in itertools.pairwise(marks)), strict=True))
    return parts | {"total": 1e3 * (marks[-1] - marks[0])}


def utilisation(trainer: Trainer, ms: float) -> float | None:
    """Model FLOPs utilisation of steps of so many milliseconds; None where the device's peak is not known."""
    peak = peak_flops(trainer.device, trainer.autocast_dtype == torch.bfloat16)
    return None if peak is None else flops_per_token(trainer.model) * trainer.tokens_per_step / (ms / 1e3) / peak


def measure(
    size: Size,
    mode: str,
    rounds: int,
    arms: tuple[str, ...] = ARMS,
    dtype: DtypeName = "auto",
    seconds: float | None = None,
) -> dict[str, dict[str, Any]]:
    """All arms at one size."""
    torch._dynamo.reset()
    trainers = make_trainers(size, arms, mode == "compiled", dtype)
    for _ in range(2):
        for trainer in trainers.values():
            timed_step(trainer)
    steps = {arm: lambda t=t: timed_step(t) for arm, t in trainers.items()}
    values = harness.interleave(steps, rounds, seconds)
    return {
        arm: {
            "dtype": trainers[arm].dtype_name,
            "rounds": len(values[arm]["total"]),
            "ms": {part: harness.quartiles(values[arm][part]) for part in (*PARTS, "total")},
            **{f"over_{base}": harness.ratios(values[arm]["total"], values[base]["total"]) for base in arms[:2]},
            "mfu": utilisation(trainers[arm], harness.quartiles(values[arm]["total"])[1]),
            "peak_memory_bytes": peak_memory(trainers[arm]),
        }
        for arm in arms
    }


def main(args: Args) -> None:
    """Measure, print, write."""
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds}; give more than 0, or leave it out")
    results, rows = {}, []
    for size in args.sizes:
        shape = SIZES[size]
        if args.batch_size is not None:
            shape = Size(dataclasses.replace(shape.config, batch_size=args.batch_size), shape.vocab_size)
        for mode in args.modes:
            found = results[f"{size} {mode}"] = measure(shape, mode, args.rounds, args.arms, args.dtype, args.seconds)
            for arm, r in found.items():
                memory = "–" if r["peak_memory_bytes"] is None else f"{r['peak_memory_bytes'] / 2**20:,.0f}"
                rows.append(
                    [
                        f"{size} {mode} {arm}",
                        r["dtype"],
                        *(f"{r['ms'][part][1]:.1f}" for part in (*PARTS, "total")),
                        *(harness.spread(r[f"over_{base}"], 3) for base in args.arms[:2]),
                        memory,
                        "–" if r["mfu"] is None else f"{r['mfu']:.1%}",
                    ]
                )
    over = [f"over {base}" for base in args.arms[:2]]
    header = ["size, mode, arm", "dtype", *PARTS, "total ms", *over, "peak MiB", "MFU"]
    harness.finish("training step", header, rows, results, args.json)
