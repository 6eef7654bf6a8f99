"""The main job: arms trained side by side on the same batches, and what each needed to get where.

OUT/compare.json                    what is compared; a second start with other settings is refused
    arms/ARM/lr-LR-seed-SEED/       a run folder each (see train/loop.py), those of a sweep among them
    summary.json  report.html       the answer, as numbers and as a page
"""

import contextlib
import dataclasses
import gc
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from nsphere.curves import best_gpt_arm, headline_ratios, ngpt_arm, ratio_curve
from nsphere.generate import Sampling, generate
from nsphere.presets import PRESETS, make_model
from nsphere.report import write_report
from nsphere.train.arms import RECIPE_FIELDS, parse_arm
from nsphere.train.config import RunOptions, TrainConfig, model_config, resolve, usual_lr
from nsphere.train.data import Corpus, DataConfig, load_corpus
from nsphere.train.distributed import World, start
from nsphere.train.files import RunLock, atomic_write_json, atomic_write_text, read_jsonl
from nsphere.train.inspection import inspect_model
from nsphere.train.loop import (
    ENVIRONMENT_FILE,
    Result,
    check_agreement,
    check_same,
    check_writable,
    data_cache,
    one_voice,
    train,
)
from nsphere.train.machine import choose_device, environment
from nsphere.train.metrics import METRICS_FILE
from nsphere.train.parallelize import check_layout
from nsphere.train.progress import say
from nsphere.train.roll_call import RollCall
from nsphere.train.saved import load_run
from nsphere.train.signals import Interrupted, StopRequest
from nsphere.train.timing import StepCost, time_steps
from nsphere.train.trainer import NonFinite, Trainer, micro_batch_size, pin_dtype, process_settings

COMPARE_FILE, SUMMARY_FILE, REPORT_FILE = "compare.json", "summary.json", "report.html"
SCHEMA_VERSION = 1

LR_STEPS_PER_DECADE = 5
"""The sweep's grid: 1, 1.6, 2.5, 4, 6.3 times a power of ten."""
MAX_SWEEP_RUNS = 12


@dataclass(frozen=True)
class CompareConfig:
    """What is compared."""

    arms: tuple[str, ...] = ("gpt", "gpt-qknorm", "ngpt")
    """Arms by name, such as gpt-qknorm-muon, ngpt-scalar-alpha, or ngpt:s_z_init=1 to change a field."""
    seeds: int = 1
    """How many seeds to train each arm with; seeds count up from --seed."""
    arm_lr: tuple[str, ...] = ()
    """Learning rates by arm, as ARM=LR; --lr sets that of all arms."""
    sweep_lr: bool = False
    """Tune each arm's learning rate first, on a grid that is extended until the optimum lies inside it."""
    timing_rounds: int = 20
    """Steps of each arm, by turns, from which the step times are taken."""
    prompt: str | None = None
    """What the samples continue; "def " if not given."""
    sample_tokens: int = 400
    """Length of each arm's sample."""

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("no arms given; give some, such as --arms gpt ngpt")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"an arm is given twice in {' '.join(self.arms)}; give each once")
        for name, least in (("seeds", 1), ("timing_rounds", 1), ("sample_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def learning_rates(self) -> dict[str, float]:
        """`arm_lr`, parsed. Raises ValueError for what is not ARM=LR of a given arm."""
        rates: dict[str, float] = {}
        for item in self.arm_lr:
            arm, _, text = item.rpartition("=")
            if arm not in self.arms:
                raise ValueError(f"--arm-lr {item}: {arm or item!r} is not among the arms {', '.join(self.arms)}")
            if arm in rates:
                raise ValueError(f"--arm-lr gives {arm} two learning rates; give one")
            try:
                rates[arm] = float(text)
            except ValueError:
                raise ValueError(f"--arm-lr {item}: {text!r} is not a number") from None
        return rates


@dataclass(frozen=True)
class Sweep:
    """Final validation losses on a grid of learning rates; a run that diverged counts as inf."""

    losses: dict[float, float]

    @property
    def best(self) -> float:
        """The rate with the lowest loss."""
        return min(self.losses, key=lambda lr: self.losses[lr])

    @property
    def best_inside(self) -> bool:
        """Whether the grid goes on, with higher losses, on both sides of the best."""
        return min(self.losses) < self.best < max(self.losses)

    def as_record(self) -> dict[str, Any]:
        """For the summary; a diverged run's loss is null."""
        rates = sorted(self.losses)
        losses = [self.losses[lr] if math.isfinite(self.losses[lr]) else None for lr in rates]
        return {"lr": rates, "val_loss": losses, "best_inside_grid": self.best_inside}


def grid_lr(i: int) -> float:
    """Learning rate number i of the grid, to two digits; number -15 is 0.001."""
    return float(f"{10 ** (i / LR_STEPS_PER_DECADE):.1e}")


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
    with (
        start(options.layout, options.device) as world,
        process_settings(options, world.device),
        one_voice(world),
        RollCall(world, f"; start it again with --resume on {out}") as roll_call,
        contextlib.ExitStack() as held,
    ):
        with roll_call.during("the preparation"):
            world.all(lambda: _check_folder(out, resume))
            corpus = world.first_then_all(lambda: load_corpus(data, cache_dir=data_cache()))
            comparison = _Comparison(what, arms, options, data, corpus, out, lr_source(config, arms, rates), world)
            wanted = comparison.record()
            settings = {**dataclasses.asdict(options), "timing_rounds": what.timing_rounds}
            check_agreement(world, {**wanted, "options": settings})
            comparison.check()

            def begin() -> None:
                held.enter_context(RunLock(out))
                _check_folder(out, resume)  # again: another job may have been here since
                if (out / COMPARE_FILE).exists():
                    check_same(out, _read(out / COMPARE_FILE), wanted, "comparison")
                atomic_write_json(out / COMPARE_FILE, wanted)

            held.enter_context(StopRequest())
            world.first(begin)
        with roll_call.during("the comparison"):
            results, costs, trainers = comparison.run(roll_call)
        if not world.is_first:
            return None
        summary = comparison.summary(results, costs, trainers)
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
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a single run; choose another --out for the comparison")
    if (out / COMPARE_FILE).exists() and not resume:
        raise ValueError(f"{out} exists; give --resume to continue it, or another --out")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is broken; remove its folder, or choose another --out") from None


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
        self.sweeps: dict[str, Sweep] = {}

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
            if self.corpus.tokenizer is not None and self.what.sample_tokens:
                length = len(self.corpus.tokenizer.encode(self.prompt))
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

    @property
    def prompt(self) -> str:
        """What the samples continue."""
        return "def " if self.what.prompt is None else self.what.prompt

    def run(self, roll_call: RollCall) -> tuple[dict[str, dict[int, Result]], dict[str, StepCost], dict[str, Trainer]]:
        """Everything that all ranks do together: the sweeps, the runs, and the timing, with the trainers it used."""
        results: dict[str, dict[int, Result]] = {}
        for arm in self.arms:
            if self.what.sweep_lr:
                self._sweep(arm)
            results[arm] = {seed: self._train(arm, self._lr(arm), seed) for seed in self._seeds(arm)}
        say(f"timing {self.what.timing_rounds} steps of each arm, by turns")
        trainers = {arm: self._trainer(arm) for arm in self.arms}
        with roll_call.during("the timing"):
            costs = time_steps(trainers, self.what.timing_rounds)
        self._stop_if_asked("the timing")
        return results, costs, trainers

    def summary(
        self, results: dict[str, dict[int, Result]], costs: dict[str, StepCost], trainers: dict[str, Trainer]
    ) -> dict[str, Any]:
        """summary.json: what `run` gave, and the samples and the looks inside, which rank 0 takes alone."""
        facts = next(iter(trainers.values()))
        summary_arms = {arm: self._arm_summary(arm, results[arm], costs[arm], trainers[arm]) for arm in self.arms}
        best = best_gpt_arm(summary_arms)
        deviations = [a["inspection"]["max_norm_deviation"] for a in summary_arms.values()]
        return {
            "schema_version": SCHEMA_VERSION,
            "arms": summary_arms,
            "best_gpt_arm": best,
            **headline_ratios(summary_arms, best, ngpt_arm(summary_arms) or "ngpt"),
            "max_norm_deviation": max((d for d in deviations if d is not None), default=None),
            "ratio_curve": ratio_curve(summary_arms, best),
            "environment": {
                **environment(facts.device),
                "dtype": facts.dtype_name,
                "compiled": facts.compiled,
                "data": self.corpus.name,
                "data_sha256": self.corpus.sha256,
                "seeds": list(self._seeds(next(iter(self.arms)))),
                "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
            "config": {
                **dataclasses.asdict(self.what),
                **facts.config.shape(),
                "steps": facts.config.steps,
                "batch_tokens": facts.tokens_per_step,
                "eval_every": facts.config.eval_every,
            },
            "limits": self._limits(facts),
        }

    def _stop_if_asked(self, after: str) -> None:
        """Leave on all ranks if a signal came to one: training stops for it only between two steps of a run."""
        number = int(self.world.largest(StopRequest.received() or 0)[0])
        if number:
            raise Interrupted(number, f"stopped after {after}, saved in {self.out}; --resume continues it")

    def _seeds(self, arm: str) -> Iterator[int]:
        first = self.arms[arm].seed
        return iter(range(first, first + self.what.seeds))

    def _lr(self, arm: str) -> float:
        lr = self.sweeps[arm].best if arm in self.sweeps else self.arms[arm].lr
        assert lr is not None
        return lr

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

    def _sweep(self, arm: str) -> None:
        """Try the grid's rates around the arm's default, and go on at whichever edge is best until none is."""
        start = self.arms[arm].lr
        assert start is not None
        middle = round(math.log10(start) * LR_STEPS_PER_DECADE)
        losses: dict[int, float] = {}
        wanted = [middle - 1, middle, middle + 1]
        while wanted and len(losses) < MAX_SWEEP_RUNS:
            for i in wanted:
                try:
                    lr = grid_lr(i)
                    losses[i] = self._train(arm, lr, self.arms[arm].seed, f"{arm}, lr {lr:g}").final_val_loss
                except NonFinite as error:
                    say(f"{arm}, lr {grid_lr(i):g}: diverged ({error})")
                    losses[i] = math.inf
            best = min(losses, key=lambda i: losses[i])
            wanted = [i for i in (best - 1, best + 1) if i not in losses]
        self.sweeps[arm] = Sweep({grid_lr(i): loss for i, loss in losses.items()})

    def _trainer(self, arm: str) -> Trainer:
        """A fresh trainer at the arm's rate, for timing; it shares no state with the runs."""
        config = dataclasses.replace(self.arms[arm], lr=self._lr(arm))
        return Trainer(arm, config, self.options, self.corpus, self.world)

    def _arm_summary(self, arm: str, results: dict[int, Result], cost: StepCost, trainer: Trainer) -> dict[str, Any]:
        losses = [r.final_val_loss for r in results.values()]
        per_byte = [r.bits_per_byte for r in results.values() if r.bits_per_byte is not None]
        any_result = next(iter(results.values()))
        sweep = self.sweeps.get(arm)
        sample = self._sample(arm, trainer)
        return {
            "architecture": parse_arm(arm).architecture,
            "description": parse_arm(arm).about,
            "final_val_loss": mean(losses),
            "final_val_loss_spread": max(losses) - min(losses) if len(losses) > 1 else None,
            "bits_per_byte": mean(per_byte) if per_byte else None,
            "best_lr": self._lr(arm),
            "lr_source": "swept here" if sweep else self.lr_source[arm],
            "lr_sweep": sweep.as_record() if sweep else None,
            "tokens": any_result.tokens,
            "steps": any_result.steps,
            "step_time_ms_median": cost.step_time_ms_median,
            "step_time_ms_spread": list(cost.step_time_ms_spread),
            "tokens_per_second": trainer.tokens_per_step / (cost.step_time_ms_median / 1e3),
            "peak_memory_bytes": cost.peak_memory_bytes,
            "num_parameters": any_result.num_parameters,
            "train_seconds": mean(r.train_seconds for r in results.values()),
            "skipped_steps": sum(r.skipped_steps for r in results.values()),
            "model": dataclasses.asdict(trainer.model_config),
            "recipe": {name: getattr(trainer.config, name) for name in RECIPE_FIELDS},
            "seeds": {str(seed): self._curves(arm, seed, r) for seed, r in results.items()},
            **sample,
        }

    def _curves(self, arm: str, seed: int, result: Result) -> dict[str, Any]:
        records = read_jsonl(self.folder(arm, self._lr(arm), seed) / METRICS_FILE)
        evals = [r for r in records if r["kind"] == "eval"]
        steps = [r for r in records if r["kind"] == "train"]
        return {
            "final_val_loss": result.final_val_loss,
            "curve": {
                "step": [r["step"] for r in evals],
                "tokens": [r["tokens"] for r in evals],
                "val_loss": [r["val_loss"] for r in evals],
            },
            "train_curve": {"step": [r["step"] for r in steps], "loss": [r["loss"] for r in steps]},
        }

    def _sample(self, arm: str, trainer: Trainer) -> dict[str, Any]:
        """A sample of text and the look inside, from the arm's first seed."""
        run = load_run(self.folder(arm, self._lr(arm), next(self._seeds(arm))), trainer.device)
        with trainer.autocast():
            found: dict[str, Any] = {"inspection": inspect_model(run.model, trainer.val_batches[0])}
            if run.tokenizer is not None and self.what.sample_tokens:
                prompt = run.tokenizer.encode(self.prompt)
                tokens = generate(run.model, prompt, self.what.sample_tokens, Sampling(0.7))
                found |= {"sample_prompt": self.prompt, "sample": run.tokenizer.decode(list(tokens))}
        return found

    def _limits(self, trainer: Trainer) -> list[str]:
        """What the result does not show, said before somebody asks."""
        config = trainer.config
        assert config.steps is not None
        size = trainer.model.num_parameters()
        machines = {self._machine(arm, seed) for arm in self.arms for seed in self._seeds(arm)}
        limits = [
            f"Scale: models of about {size / 1e6:.3g} million parameters on one data set; the ratio depends on both.",
            f"Horizon: {config.steps:,} steps of {trainer.tokens_per_step:,} tokens; the order may differ after more.",
        ]
        if self.what.seeds == 1:
            limits.append("Chance: one seed; differences of about 0.01 nats may be chance. --seeds 3 shows the spread.")
        if not self.what.sweep_lr:
            limits.append("Grid: learning rates were not swept in this run; --sweep-lr tunes every arm on this data.")
        elif not all(s.best_inside for s in self.sweeps.values()):
            edge = [arm for arm, s in self.sweeps.items() if not s.best_inside]
            limits.append(f"Grid: the best learning rate of {', '.join(edge)} lies at the edge of what was tried.")
        else:
            limits.append("Grid: learning rates are factors of 1.6 apart, and tuned with one seed.")
        limits.append("Choice: the same validation set chose the learning rates and gives the final losses.")
        preset = PRESETS[config.preset]
        if preset.ngpt and any(parse_arm(arm).architecture == "ngpt" for arm in self.arms):
            starts = ", ".join(f"{name} {value:g}" for name, value in preset.ngpt.items())
            warmup = " and warms up" if preset.ngpt_warmup else ""
            limits.append(f"Recipe: at this preset nGPT starts from {starts}{warmup}, unlike the paper's.")
        if len(machines) > 1:
            limits.append(f"Machines: the runs were made under {'; '.join(sorted(machines))}.")
        return limits

    def _machine(self, arm: str, seed: int) -> str:
        """Under what a run was made, all its starts together."""
        starts = _read(self.folder(arm, self._lr(arm), seed) / ENVIRONMENT_FILE)
        keys = ("cpu", "gpu", "torch", "num_threads", "compiled")
        return " and ".join(sorted({", ".join(f"{k} {start.get(k)}" for k in keys) for start in starts}))
