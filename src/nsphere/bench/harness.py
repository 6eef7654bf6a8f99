"""What every benchmark here shares: interleaved timing, medians with spread, a table, and JSON with the machine."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nsphere.table import text_table
from nsphere.train.machine import environment


def interleave(
    candidates: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, seconds: float | None = None
) -> dict[str, dict[str, list]]:
    """Call each candidate once a round, beginning with another each round; the values it returned, by key.

    Where `seconds` are given, no round but the first three begins after them.
    """
    began = time.perf_counter()
    names = list(candidates)
    values: dict[str, dict[str, list]] = {name: {} for name in names}
    for turn in range(rounds):
        if turn >= 3 and seconds is not None and time.perf_counter() - began > seconds:
            break
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            for key, value in candidates[name]().items():
                values[name].setdefault(key, []).append(value)
    return values


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    q = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return q[0], statistics.median(values), q[2]


def ratios(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratio, round by round: what slows both in a round cancels."""
    return quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def milliseconds(run: Callable[[], object]) -> Callable[[], dict[str, float]]:
    """A candidate for `interleave` that times one call."""

    def timed() -> dict[str, float]:
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        return {"ms": 1e3 * (time.perf_counter() - began)}

    return timed


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(quartiles: tuple[float, float, float], digits: int = 2) -> str:
    """A median with its quartiles: 1.02 [0.99, 1.05]."""
    first, median, third = (f"{q:.{digits}f}" for q in quartiles)
    return f"{median} [{first}, {third}]"


def finish(title: str, header: list[str], rows: list[list[str]], results: Any, path: Path | None) -> None:
    """Print the table and, if a path is given, write the JSON, with machine, versions and commit."""
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"\n{title}\n{text_table(header, rows)}\n")
    print(f"{facts['cpu']}, {facts['num_threads']} threads, torch {facts['torch']}, commit {facts['git_commit']}")
    if path is not None:
        record = {"benchmark": title, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts, "results": results}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")
