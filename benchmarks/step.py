"""What does a training step of nGPT cost, over GPT and over GPT + QK-norm, and where does it go?

Forward, backward, clipping, optimizer and projection, compiled and eager, by turns in one process, with the same
engine, batches and residual dtype for all arms.

    python benchmarks/step.py --sizes demo d512 --rounds 15 --json benchmarks/results/step.json
"""

import dataclasses
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import torch
import tyro

from nsphere.hypersphere import normalize_matrices_
from nsphere.train.config import RunOptions, TrainConfig, resolve
from nsphere.train.data import Corpus, TokenSplit
from nsphere.train.gradients import clip_grad_norm_
from nsphere.train.timing import peak_memory
from nsphere.train.tokenizer import ByteTokenizer
from nsphere.train.trainer import Trainer

ARMS = ("gpt", "gpt-qknorm", "ngpt")
PARTS = ("forward", "backward", "clip", "optimizer", "projection")


@dataclass(frozen=True)
class Size:
    """A shape to measure at."""

    config: TrainConfig
    vocab_size: int


SIZES = {
    "demo": Size(TrainConfig(preset="demo"), 256),
    "d512": Size(TrainConfig(preset="demo", d_model=512, num_layers=8, num_heads=8, context=512, batch_size=8), 8192),
}


@dataclass(frozen=True)
class Args:
    """Step times of nGPT over GPT."""

    sizes: tuple[str, ...] = ("demo", "d512")
    """demo: the demo's shape; d512: d_model 512, 8 layers, context 512, vocabulary 8192, batch 8."""
    rounds: int = 15
    """Steps of each arm that count."""
    modes: tuple[str, ...] = ("compiled", "eager")
    """compiled, eager."""
    json: Path | None = None
    """Where to write the numbers."""


def random_corpus(vocab_size: int) -> Corpus:
    """Tokens without meaning: the cost of a step does not depend on them."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, 200_000, dtype=np.uint16)
    split = TokenSplit("training", tokens)
    return Corpus(split, split, vocab_size, ByteTokenizer(), "", "random", None)


def timed_step(trainer: Trainer) -> dict[str, float]:
    """One step in parts, ms. The optimizer's hook projects too; that time is taken out of `optimizer`."""
    batch = trainer.batches(trainer.num_steps).to(trainer.device)
    marks = [time.perf_counter()]

    def mark() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
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
    normalize_matrices_(trainer.model)
    mark()
    forward, backward, clip, optimizer_ms, projection = (1e3 * (b - a) for a, b in itertools.pairwise(marks))
    trainer.num_steps += 1
    parts = dict(zip(PARTS, (forward, backward, clip, optimizer_ms - projection, projection), strict=True))
    return parts | {"total": forward + backward + clip + optimizer_ms}


def measure(size: Size, mode: str, rounds: int) -> dict[str, dict]:
    """All arms at one size."""
    torch._dynamo.reset()
    corpus = random_corpus(size.vocab_size)
    options = RunOptions(compile=mode == "compiled")
    config = dataclasses.replace(size.config, steps=10_000, eval_sequences=8)
    trainers = {arm: Trainer(arm, resolve(arm, config), options, corpus) for arm in ARMS}
    for _ in range(2):
        for trainer in trainers.values():
            timed_step(trainer)
    values = harness.interleave({arm: lambda t=t: timed_step(t) for arm, t in trainers.items()}, rounds)
    return {
        arm: {
            "ms": {part: harness.quartiles(values[arm][part]) for part in (*PARTS, "total")},
            "over_gpt": harness.ratios(values[arm]["total"], values["gpt"]["total"]),
            "over_gpt_qknorm": harness.ratios(values[arm]["total"], values["gpt-qknorm"]["total"]),
            "peak_memory_bytes": peak_memory(trainers[arm]),
        }
        for arm in ARMS
    }


def main(args: Args) -> None:
    results, rows = {}, []
    for size in args.sizes:
        for mode in args.modes:
            found = results[f"{size} {mode}"] = measure(SIZES[size], mode, args.rounds)
            for arm, r in found.items():
                memory = "–" if r["peak_memory_bytes"] is None else f"{r['peak_memory_bytes'] / 2**20:,.0f}"
                rows.append(
                    [
                        f"{size} {mode} {arm}",
                        *(f"{r['ms'][part][1]:.1f}" for part in (*PARTS, "total")),
                        f"{r['over_gpt'][1]:.3f} [{r['over_gpt'][0]:.3f}, {r['over_gpt'][2]:.3f}]",
                        f"{r['over_gpt_qknorm'][1]:.3f}",
                        memory,
                    ]
                )
    header = ["size, mode, arm", *PARTS, "total ms", "over gpt", "over qknorm", "peak MiB"]
    harness.finish("training step", header, rows, results, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
