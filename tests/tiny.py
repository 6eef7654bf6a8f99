"""Runs small enough for tests: one layer's worth of everything, on a text made here."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsphere.train.config import RunOptions, TrainConfig
from nsphere.train.data import DataConfig
from nsphere.train.trainer import StepResult, Trainer

TEXT = "".join(f"line {i}: {'the quick brown fox jumps over the lazy dog'[: 5 + i % 30]}\n" for i in range(800))


def text_file(folder: Path) -> DataConfig:
    path = folder / "text.txt"
    path.write_text(TEXT)
    return DataConfig(data=str(path))


def config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        d_model=32,
        num_layers=2,
        num_heads=2,
        context=16,
        steps=6,
        batch_size=4,
        lr=3e-3,
        eval_every=3,
        eval_sequences=8,
        dtype="float32",
    )
    return dataclasses.replace(base, **changes)


def options(**changes: Any) -> RunOptions:
    base = RunOptions(device="cpu", compile=False, threads=1, checkpoint_every=2, tensorboard=False)
    return dataclasses.replace(base, **changes)


def poisoned_step(at: int, arm: str | None = None) -> Callable[[Trainer], StepResult]:
    """Trainer.step with a weight of NaN in the step after `at` steps, and the weight back afterwards."""
    step = Trainer.step

    def run(self: Trainer) -> StepResult:
        if self.num_steps != at or arm not in (None, self.arm):
            return step(self)
        weight = next(self.model.parameters())
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:] = float("nan")
        try:
            return step(self)
        finally:
            with torch.no_grad():
                weight.copy_(kept)

    return run
