"""The runs of a comparison, and the folder they leave.

OUT/compare.json                    what is compared; a second start with other settings is refused
    arms/ARM/lr-LR-seed-SEED/       a run folder each (see train/run_folder.py), those of a sweep among them
    summary.json  report.html       the answer, as numbers and as a page
"""

import dataclasses
import gc
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nsphere.compare.config import CompareConfig
from nsphere.compare.lr_sweep import Sweep, sweep_lr
from nsphere.compare.summary import SCHEMA_VERSION, ArmOutcome, read_json, summarize
from nsphere.presets import make_model
from nsphere.report import write_report
from nsphere.train.config import RunOptions, TrainConfig, model_config, resolve, usual_lr
from nsphere.train.data import Corpus, DataConfig
from nsphere.train.distributed import World
from nsphere.train.files import atomic_write_json, atomic_write_text
from nsphere.train.job import job
from nsphere.train.loop import train
from nsphere.train.machine import choose_device
from nsphere.train.parallelize import check_layout
from nsphere.train.precision import pin_dtype
from nsphere.train.progress import say
from nsphere.train.roll_call import RollCall
from nsphere.train.run_folder import CONFIG_FILE, Result, check_same, check_writable
from nsphere.train.signals import Interrupted, StopRequest
from nsphere.train.timing import time_steps
from nsphere.train.trainer import NonFinite, Trainer, micro_batch_size

COMPARE_FILE, SUMMARY_FILE, REPORT_FILE = "compare.json", "summary.json", "report.html"


def compare(
    what: CompareConfig,
    config: TrainConfig,
    options: RunOptions,
    data: DataConfig,
    out: Path,
    *,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Train the arms, time them, and write summary.json and report.html into `out`.

    Everything can be interrupted and resumed: finished runs are kept, an unfinished one goes on from its checkpoint.
    Under torchrun all ranks train every arm together, in the same order; rank 0 alone writes and looks at the results.

    Returns:
        The summary; None on ranks other than the first, which are done once everything is trained and timed.

    Raises:
        ValueError: bad settings, layout, data or folder; before anything is written.
        Interrupted, NonFinite, LostRank: as from `train`.
    """
    rates = what.learning_rates()
    if config.init_from is not None:
        raise ValueError("a comparison starts every arm from scratch; give --init-from to nsphere train")
    device = choose_device(options.device)
    arms = {
        arm: pin_dtype(resolve(arm, dataclasses.replace(config, lr=rates.get(arm, config.lr))), device)
        for arm in what.arms
    }
    with torch.device("meta"):
        for arm, resolved in arms.items():
            make_model(model_config(arm, resolved, vocab_size=1))  # what can't be built is refused before any work
            micro_batch_size(resolved, options)
    with job(out, options) as work:
        world = work.world
        with work.during("the preparation"):
            world.all(lambda: _check_folder(out, resume))
            corpus = work.load_corpus(data)
            comparison = _Comparison(what, arms, options, data, corpus, out, lr_source(config, arms, rates), world)
            wanted = comparison.record()
            settings = {**dataclasses.asdict(options), "timing_rounds": what.timing_rounds}
            work.check_agreement({**wanted, "options": settings})
            comparison.check()
            work.heed_signals()

            def begin() -> None:
                _check_folder(out, resume)
                if (out / COMPARE_FILE).exists():
                    check_same(out, read_json(out / COMPARE_FILE), wanted, "comparison")
                atomic_write_json(out / COMPARE_FILE, wanted)

            work.take(out, begin)
        with work.during("the comparison"):
            outcomes = comparison.run(work.roll_call)
        if not world.is_first:
            return None
        summary = summarize(dataclasses.asdict(what), what.sample(), corpus, outcomes)
        atomic_write_text(out / SUMMARY_FILE, json.dumps(summary, indent=1, allow_nan=False) + "\n")
        write_report(summary, out / REPORT_FILE)
    return summary


def lr_source(config: TrainConfig, arms: Mapping[str, TrainConfig], rates: Mapping[str, float]) -> dict[str, str]:
    """Where each arm's learning rate comes from, if it is not swept."""
    given = {arm: "given" for arm in arms if arm in rates or config.lr is not None}
    return {arm: usual_lr(arm, config)[1] for arm in arms} | given


def _check_folder(out: Path, resume: bool) -> None:
    """Refuse to write over a run or another comparison; before the data is read."""
    check_writable(out)
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"{out} holds a single run; choose another --out for the comparison")
    if (out / COMPARE_FILE).exists() and not resume:
        raise ValueError(f"{out} exists; give --resume to continue it, or another --out")


class _Comparison:
    """A comparison in its folder: what `compare` does once everything is checked."""

    def __init__(
        self,
        what: CompareConfig,
        arms: dict[str, TrainConfig],
        options: RunOptions,
        data: DataConfig,
        corpus: Corpus,
        out: Path,
        lr_source: dict[str, str],
        world: World,
    ) -> None:
        self.what, self.arms, self.options, self.data, self.corpus, self.out = what, arms, options, data, corpus, out
        self.lr_source, self.world = lr_source, world

    def check(self) -> None:
        """Refuse data too short to train on, a layout that an arm doesn't fit, a prompt that can't be continued."""
        for arm, resolved in self.arms.items():
            context = resolved.context
            assert context is not None
            check_layout(
                model_config(arm, resolved, self.corpus.vocab_size),
                self.world,
                resolved,
                micro_batch_size(resolved, self.options),
            )
            for split in (self.corpus.train, self.corpus.val):
                split.num_windows(context)
            sample = self.what.sample()
            if self.corpus.tokenizer is not None and sample.num_tokens:
                length = len(self.corpus.tokenizer.encode(sample.prompt))
                if not 0 < length < context:
                    raise ValueError(
                        f"the prompt has {length} tokens, the context is {context}; give a --prompt of 1 to "
                        f"{context - 1} tokens, or --sample-tokens 0"
                    )

    def record(self) -> dict[str, Any]:
        """compare.json: what defines the comparison."""
        defining = {"arms": list(self.what.arms), "seeds": self.what.seeds, "sweep_lr": self.what.sweep_lr}
        return {
            "schema_version": SCHEMA_VERSION,
            "compare": defining,
            "arms": {arm: dataclasses.asdict(config) for arm, config in self.arms.items()},
            "data": dataclasses.asdict(self.data),
            "data_sha256": self.corpus.sha256,
        }

    def run(self, roll_call: RollCall) -> dict[str, ArmOutcome]:
        """Everything that all ranks do together: by arm its sweep and its runs, then the timing of all."""
        sweeps: dict[str, Sweep] = {}
        rates: dict[str, float] = {}
        results: dict[str, dict[int, Result]] = {}
        for arm, config in self.arms.items():
            assert config.lr is not None
            if self.what.sweep_lr:
                sweeps[arm] = self._sweep(arm, config.lr)
            rates[arm] = sweeps[arm].best if arm in sweeps else config.lr
            results[arm] = {seed: self._train(arm, rates[arm], seed) for seed in self._seeds(arm)}
        say(f"timing {self.what.timing_rounds} steps of each arm, by turns")
        trainers = {arm: self._trainer(arm, rates[arm]) for arm in self.arms}
        with roll_call.during("the timing"):
            costs = time_steps(trainers, self.what.timing_rounds)
        self._stop_if_asked("the timing")
        return {
            arm: ArmOutcome(
                arm,
                rates[arm],
                "swept here" if arm in sweeps else self.lr_source[arm],
                sweeps.get(arm),
                {seed: self.folder(arm, rates[arm], seed) for seed in results[arm]},
                results[arm],
                costs[arm],
                trainers[arm],
            )
            for arm in self.arms
        }

    def _stop_if_asked(self, after: str) -> None:
        """Leave on all ranks if a signal came to one: training stops for it only between two steps of a run."""
        number = int(self.world.largest(StopRequest.received() or 0)[0])
        if number:
            raise Interrupted(number, f"stopped after {after}, saved in {self.out}; --resume continues it")

    def _seeds(self, arm: str) -> Iterator[int]:
        first = self.arms[arm].seed
        return iter(range(first, first + self.what.seeds))

    def folder(self, arm: str, lr: float, seed: int) -> Path:
        return self.out / "arms" / re.sub(r"[^\w.=,-]", "+", arm) / f"lr-{lr:g}-seed-{seed}"

    def _train(self, arm: str, lr: float, seed: int, title: str | None = None) -> Result:
        # each arm compiles its own code; what the last one compiled would only slow down the look-up
        torch._dynamo.reset()
        gc.collect()  # compiled models are held by cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        config = dataclasses.replace(self.arms[arm], lr=lr, seed=seed)
        result = train(
            arm,
            config,
            self.options,
            self.data,
            self.folder(arm, lr, seed),
            resume=True,
            corpus=self.corpus,
            title=title or (arm if self.what.seeds == 1 else f"{arm}, seed {seed}"),
            world=self.world,
        )
        self._stop_if_asked(arm)
        return self.world.first(lambda: result)  # what is decided by it, all ranks decide by the same bits

    def _sweep(self, arm: str, start: float) -> Sweep:
        def loss_at(lr: float) -> float:
            try:
                return self._train(arm, lr, self.arms[arm].seed, f"{arm}, lr {lr:g}").final_val_loss
            except NonFinite as error:
                say(f"{arm}, lr {lr:g}: diverged ({error})")
                return math.inf

        return sweep_lr(start, loss_at)

    def _trainer(self, arm: str, lr: float) -> Trainer:
        """A fresh trainer for timing; it shares no state with the runs."""
        return Trainer(arm, dataclasses.replace(self.arms[arm], lr=lr), self.options, self.corpus, self.world)
