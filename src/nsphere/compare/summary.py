"""summary.json: what a comparison found, as numbers, for its page and its table."""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from nsphere.compare.config import Sample
from nsphere.compare.lr_sweep import Sweep
from nsphere.generate import Sampling, generate
from nsphere.presets import PRESETS
from nsphere.report.curves import best_gpt_arm, headline_ratios, ngpt_arm, ratio_curve
from nsphere.train.arms import RECIPE_FIELDS, parse_arm
from nsphere.train.data import Corpus
from nsphere.train.files import read_jsonl
from nsphere.train.inspection import inspect_model
from nsphere.train.machine import environment
from nsphere.train.metrics import METRICS_FILE
from nsphere.train.run_folder import ENVIRONMENT_FILE, Result
from nsphere.train.saved import load_run
from nsphere.train.timing import StepCost
from nsphere.train.trainer import Trainer

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ArmOutcome:
    """What was found out about one arm."""

    name: str
    lr: float
    lr_source: str
    sweep: Sweep | None
    folders: dict[int, Path]
    """The run's folder, by seed."""
    results: dict[int, Result]
    """How it ended, by seed."""
    cost: StepCost
    trainer: Trainer
    """The one that was timed: its settings count here, not its weights."""


def summarize(
    asked: Mapping[str, Any], sample: Sample, corpus: Corpus, outcomes: Mapping[str, ArmOutcome]
) -> dict[str, Any]:
    """The summary: the outcomes, and the samples and the looks inside, which are taken here.

    Args:
        asked: what the comparison was asked for, for the record.
        sample: what the arms are to write.
        corpus: what they were trained on.
        outcomes: by arm, in the order in which they are shown.
    """
    any_arm = next(iter(outcomes.values()))
    facts = any_arm.trainer
    arms = {name: _arm(outcome, sample) for name, outcome in outcomes.items()}
    best = best_gpt_arm(arms)
    deviations = [arm["inspection"]["max_norm_deviation"] for arm in arms.values()]
    return {
        "schema_version": SCHEMA_VERSION,
        "arms": arms,
        "best_gpt_arm": best,
        **headline_ratios(arms, best, ngpt_arm(arms) or "ngpt"),
        "max_norm_deviation": max((d for d in deviations if d is not None), default=None),
        "ratio_curve": ratio_curve(arms, best),
        "environment": {
            **environment(facts.device),
            "dtype": facts.dtype_name,
            "compiled": facts.compiled,
            "data": corpus.name,
            "data_sha256": corpus.sha256,
            "seeds": list(any_arm.results),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
        "config": {
            **asked,
            **facts.config.shape(),
            "steps": facts.config.steps,
            "batch_tokens": facts.tokens_per_step,
            "eval_every": facts.config.eval_every,
        },
        "limits": _limits(outcomes),
    }


def read_json(path: Path) -> Any:
    """A file of a comparison. Raises ValueError where it is broken."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is broken; remove its folder, or choose another --out") from None


def _arm(outcome: ArmOutcome, sample: Sample) -> dict[str, Any]:
    results, cost, trainer = outcome.results, outcome.cost, outcome.trainer
    losses = [r.final_val_loss for r in results.values()]
    per_byte = [r.bits_per_byte for r in results.values() if r.bits_per_byte is not None]
    any_result = next(iter(results.values()))
    arm = parse_arm(outcome.name)
    return {
        "architecture": arm.architecture,
        "description": arm.about,
        "final_val_loss": mean(losses),
        "final_val_loss_spread": max(losses) - min(losses) if len(losses) > 1 else None,
        "bits_per_byte": mean(per_byte) if per_byte else None,
        "best_lr": outcome.lr,
        "lr_source": outcome.lr_source,
        "lr_sweep": outcome.sweep.as_record() if outcome.sweep else None,
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
        "seeds": {str(seed): _curves(outcome.folders[seed], result) for seed, result in results.items()},
        **_looked_at(outcome, sample),
    }


def _curves(folder: Path, result: Result) -> dict[str, Any]:
    records = read_jsonl(folder / METRICS_FILE)
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


def _looked_at(outcome: ArmOutcome, sample: Sample) -> dict[str, Any]:
    """A sample of text and the look inside, from the arm's first seed."""
    trainer = outcome.trainer
    run = load_run(next(iter(outcome.folders.values())), trainer.device)
    with trainer.autocast():
        found: dict[str, Any] = {"inspection": inspect_model(run.model, trainer.val_batches[0])}
        if run.tokenizer is not None and sample.num_tokens:
            prompt = run.tokenizer.encode(sample.prompt)
            tokens = generate(run.model, prompt, sample.num_tokens, Sampling(0.7))
            found |= {"sample_prompt": sample.prompt, "sample": run.tokenizer.decode(list(tokens))}
    return found


def _limits(outcomes: Mapping[str, ArmOutcome]) -> list[str]:
    """What the result does not show, said before somebody asks."""
    any_arm = next(iter(outcomes.values()))
    trainer = any_arm.trainer
    config = trainer.config
    assert config.steps is not None
    size = trainer.model.num_parameters()
    limits = [
        f"Scale: models of about {size / 1e6:.3g} million parameters on one data set; the ratio depends on both.",
        f"Horizon: {config.steps:,} steps of {trainer.tokens_per_step:,} tokens; the order may differ after more.",
    ]
    if len(any_arm.results) == 1:
        limits.append("Chance: one seed; differences of about 0.01 nats may be chance. --seeds 3 shows the spread.")
    sweeps = {name: outcome.sweep for name, outcome in outcomes.items() if outcome.sweep is not None}
    edge = [name for name, sweep in sweeps.items() if not sweep.best_inside]
    if not sweeps:
        limits.append("Grid: learning rates were not swept in this run; --sweep-lr tunes every arm on this data.")
    elif edge:
        limits.append(f"Grid: the best learning rate of {', '.join(edge)} lies at the edge of what was tried.")
    else:
        limits.append("Grid: learning rates are factors of 1.6 apart, and tuned with one seed.")
    limits.append("Choice: the same validation set chose the learning rates and gives the final losses.")
    preset = PRESETS[config.preset]
    if preset.ngpt and any(parse_arm(name).architecture == "ngpt" for name in outcomes):
        starts = ", ".join(f"{name} {value:g}" for name, value in preset.ngpt.items())
        warmup = " and warms up" if preset.ngpt_warmup else ""
        limits.append(f"Recipe: at this preset nGPT starts from {starts}{warmup}, unlike the paper's.")
    machines = {_machine(folder) for outcome in outcomes.values() for folder in outcome.folders.values()}
    if len(machines) > 1:
        limits.append(f"Machines: the runs were made under {'; '.join(sorted(machines))}.")
    return limits


def _machine(folder: Path) -> str:
    """Under what a run was made, all its starts together."""
    starts = read_json(folder / ENVIRONMENT_FILE)
    keys = ("cpu", "gpu", "torch", "num_threads", "compiled")
    return " and ".join(sorted({", ".join(f"{k} {start.get(k)}" for k in keys) for start in starts}))
