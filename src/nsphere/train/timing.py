"""Step times of several trainers, measured so that they are comparable: by turns in the same processes."""

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nsphere.collectives import local
from nsphere.train.trainer import Trainer


@dataclass(frozen=True)
class StepCost:
    """What an optimizer step of one arm costs: data, forward, backward, clipping, optimizer and projection."""

    step_time_ms_median: float
    step_time_ms_spread: tuple[float, float]
    """First and third quartile."""
    peak_memory_bytes: int | None
    """Parameters and optimizer state of this arm, and what a step needs besides, on the rank that needs most; None
    where it can't be measured."""


def time_steps(trainers: dict[str, Trainer], rounds: int) -> dict[str, StepCost]:
    """Take `rounds` steps with each trainer, by turns, and return what each step costs.

    The turns begin with another trainer each round, so that a slow moment of the machine falls on all alike. Two
    steps each come first and don't count. Ranks begin each step together, and the slowest one's time counts: every
    rank returns the same. The trainers move on by rounds + 3 steps.
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
            trainers[name].world.wait()
            began = time.perf_counter()
            trainers[name].step()
            _synchronize(trainers[name])
            times[name].append(1e3 * (time.perf_counter() - began))
    costs = {}
    for name in names:
        slowest = trainers[name].world.largest(*times[name])
        quartiles = statistics.quantiles(slowest, n=4) if rounds > 1 else slowest * 3
        costs[name] = StepCost(statistics.median(slowest), (quartiles[0], quartiles[2]), peak_memory(trainers[name]))
    return costs


def _synchronize(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def peak_memory(trainer: Trainer) -> int | None:
    """Bytes of the trainer's parameters and optimizer state, and the most that a step allocates on top.

    On CUDA the allocator counts. On Linux the kernel does: the high-water mark of resident memory is reset before the
    step. Elsewhere there is no such counter, and the answer is None. Of several ranks, that of the one with most.
    """
    state = {id(t): t for o in trainer.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)}
    state |= {id(p): p for p in trainer.model.parameters()}
    held = sum(local(t).numel() * t.element_size() for t in state.values())
    gc.collect()
    before = _reset_peak(trainer.device)
    trainer.step()  # on every rank, whether or not it can measure
    on_top = None if before is None else _peak(trainer.device) - before
    seen = trainer.world.all(lambda: on_top)
    return None if None in seen else held + max(bytes for bytes in seen if bytes is not None)


def _reset_peak(device: torch.device) -> int | None:
    """Bytes in use, from which on the peak counts anew; None where there is no such counter."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for reuse would hide what the step needs
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
