"""Kill a training run at random moments, resume it, and see whether anything shows.

    python tests/faults/kill_loop.py --kills 25 --seed 0 --ranks 2

Every kill is a SIGKILL at a random moment after the first step, or the first checkpoint, of a start: to all ranks at
once, or, by turns, to one of them, whose end the others must notice by themselves. The run saves at every step, so
that many kills fall into the writing of a checkpoint. After each the run is resumed. What must hold, or this fails:

- it goes on at the newest complete checkpoint: nothing but the steps since that is repeated;
- the metrics up to there are the uninterrupted run's, line by line;
- once it gets to its end, its metrics and its weights are the uninterrupted run's, bit for bit. Then another begins.
"""

import argparse
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from ranks import Job

from nsphere.cli import explain
from nsphere.train.checkpoint import load_checkpoint
from nsphere.train.checkpoint.folders import by_step, is_complete
from nsphere.train.files import read_jsonl
from nsphere.train.loop import train
from nsphere.train.machine import git_commit

STEPS = 30


def work(arm: str, data: Any, out: Path) -> int:
    """What each rank does; its exit code is the command's."""
    config = tiny.config(steps=STEPS, eval_every=7)
    options = tiny.options(checkpoint_every=1, micro_batch_size=2)
    try:
        train(arm, config, options, data, out, resume=True)
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        print(known[0], flush=True)
        return known[1]
    return 0


def curve(run: Path) -> list[dict[str, Any]]:
    """The metrics, without what depends on the clock."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_jsonl(run / "metrics.jsonl")]


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint, as a look from outside that changes nothing; -1 if there is none."""
    return next((step for step, folder in by_step(run / "checkpoints") if is_complete(folder)), -1)


def first_step_is_made(run: Path, starts: int) -> bool:
    """Whether the run has begun again and made a step."""
    try:
        told = json.loads((run / "environment.json").read_text())
        lines = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]
    except (OSError, ValueError):
        return False
    return len(told) > starts and bool(lines) and lines[-1]["step"] > told[-1]["started_at_step"]


def kill_loop(folder: Path, kills: int, seed: int, ranks: int, arm: str = "ngpt") -> dict[str, Any]:
    """Do it; what was seen. Raises AssertionError if anything shows."""
    rng, data = random.Random(seed), tiny.text_file(folder)
    began, commit = time.monotonic(), git_commit()

    def start(run: Path) -> Job:
        return Job(ranks, lambda rank: work(arm, data, run), run.with_suffix(".log"))

    whole = folder / "whole"
    job = start(whole)
    assert set(job.wait()) == {0}, job.output()
    expected, weights = curve(whole), load_checkpoint(whole).model_tensors
    assert len(expected) == STEPS + 1 + len([s for s in range(1, STEPS + 1) if s % 7 == 0 or s == STEPS])

    seen: Counter[str] = Counter()
    at_steps, repeated, slowest = [], [], 0.0
    runs = (folder / f"cut-{i}" for i in itertools.count())
    run, starts = next(runs), 0
    while seen["kills"] < kills:
        before = newest(run)
        job = start(run)
        early = rng.random() < 0.25  # before this start has saved anything
        while not job.poll() and not (first_step_is_made(run, starts) if early else newest(run) > before):
            time.sleep(0.002)
        time.sleep(rng.expovariate(1 / 0.1))
        if not job.poll():
            alone = ranks > 1 and seen["kills"] % 2
            for rank in [rng.randrange(ranks)] if alone else range(ranks):
                job.kill(rank)
            killed = time.monotonic()
            codes = job.wait()
            if alone and sorted(codes) == [-9, 75]:
                seen["of one rank, the other named it and left"] += 1
                assert re.search(
                    r"rank [01] died or hangs.*; the job ends in step \d+; start it again", job.output()
                ), job.output()
                slowest = max(slowest, time.monotonic() - killed)
            seen["kills"] += 1
            seen["while a checkpoint was being written"] += any((run / "checkpoints").glob(".tmp-*"))
        else:
            assert set(job.wait()) == {0}, job.output()
        told = json.loads((run / "environment.json").read_text())
        resumed_at = told[-1]["started_at_step"]
        assert len(told) == starts + 1, job.output()
        assert resumed_at == max(before, 0), f"resumed at {resumed_at}, with a checkpoint of step {before} there"
        starts += 1
        lines, step = curve(run), newest(run)
        past = [r for r in lines if r["step"] <= step]
        assert past == [r for r in expected if r["step"] <= step], f"{run}: another curve up to step {step}"
        at_steps.append(lines[-1]["step"] if lines else 0)
        repeated.append(at_steps[-1] - max(step, 0))
        if (run / "result.json").exists():
            assert lines == expected, f"{run}: another curve"
            same = load_checkpoint(run).model_tensors
            assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items()), f"{run}: other weights"
            seen["runs that got to their end, equal to the whole one"] += 1
            run, starts = next(runs), 0
    while not (run / "result.json").exists():  # the last one too must get to its end
        assert set(start(run).wait()) == {0}
    assert curve(run) == expected
    seen["runs that got to their end, equal to the whole one"] += 1
    return {
        "arm": arm,
        "ranks": ranks,
        "seed": seed,
        **seen,
        "steps in which the kills fell": at_steps,
        "most steps lost by a kill": max(repeated),
        "slowest end of the ranks left, s": round(slowest, 2),
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "commit": commit,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--arm", default="ngpt")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, value in kill_loop(Path(folder), args.kills, args.seed, args.ranks, args.arm).items():
            print(f"{name}: {value}")
