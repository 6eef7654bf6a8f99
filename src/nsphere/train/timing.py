"""Step times of several trainers, measured so that they are comparable: interleaved in one process."""

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nsphere.train.trainer import Trainer


@dataclass(frozen=True)
class StepCost:
    """What an optimizer step of one arm costs: data, forward, backward, clipping, optimizer and projection."""

    step_time_ms_median: float
    step_time_ms_spread: tuple[float, float]
    """First and third quartile."""
    peak_memory_bytes: int | None
    """Parameters and optimizer state of this arm, and what a step needs besides; None where it can't be measured."""


def time_steps(trainers: dict[str, Trainer], rounds: int) -> dict[str, StepCost]:
    """Take `rounds` steps with each trainer, by turns, and return what each step costs.

    The turns begin with another trainer each round, so that a slow moment of the machine falls on all alike. Two
    steps each come first and don't count. The trainers move on by rounds + 2 steps.
    """
    names = list(trainers)
    for _ in range(2):
        for name in names:
            trainers[name].step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            _synchronize(trainers[name])
            began = time.perf_counter()
            trainers[name].step()
            _synchronize(trainers[name])
            times[name].append(1e3 * (time.perf_counter() - began))
    costs = {}
    for name in names:
        quartiles = statistics.quantiles(times[name], n=4) if rounds > 1 else [times[name][0]] * 3
        costs[name] = StepCost(
            statistics.median(times[name]), (quartiles[0], quartiles[2]), peak_memory(trainers[name])
        )
    return costs


def _synchronize(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def peak_memory(trainer: Trainer) -> int | None:
    """Bytes of the trainer's parameters and optimizer state, and the most that a step allocates on top.

    On CUDA the allocator counts. On Linux the kernel does: the high-water mark of resident memory is reset before the
    step. Elsewhere there is no such counter, and the answer is None.
    """
    state = {id(t): t for o in trainer.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)}
    state |= {id(p): p for p in trainer.model.parameters()}
    held = sum(t.numel() * t.element_size() for t in state.values())
    gc.collect()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
        torch.cuda.reset_peak_memory_stats(trainer.device)
        before = torch.cuda.memory_allocated(trainer.device)
        trainer.step()
        return held + torch.cuda.max_memory_allocated(trainer.device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for reuse would hide what the step needs
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        trainer.step()
        return held + _status("VmHWM") - before
    except (OSError, AttributeError, KeyError):
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
