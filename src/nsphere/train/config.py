"""The configuration of a run: what defines its numbers, and how it is carried out."""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nsphere.presets import ARCHITECTURES, PRESETS, USUAL_LR, make_config
from nsphere.qk_clip import check_threshold
from nsphere.train.arms import RECIPE_FIELDS, Arm, OptimizerName, ScheduleName, nearest, parse_arm
from nsphere.train.data import DataConfig
from nsphere.train.distributed import Layout

DtypeName = Literal["auto", "bfloat16", "float32"]

SCHEMA_VERSION = 1
"""Of config.json; raised when a field changes its meaning."""


@dataclass(frozen=True)
class TrainConfig:
    """What defines the numbers of a run. What is not given comes from the preset and the architecture's recipe."""

    preset: str = "demo"
    """Shape by name: demo, gpt2-small, 0.5b, 1b. The flags below change it."""
    d_model: int | None = None
    """Width of the hidden state."""
    num_layers: int | None = None
    """Blocks, each of one attention and one MLP."""
    num_heads: int | None = None
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; as many as query heads if not given."""
    head_dim: int | None = None
    """Width of a head; d_model / num_heads if not given."""
    d_mlp: int | None = None
    """Hidden width of the MLP; 4 d_model if not given."""
    context: int | None = None
    """Tokens of a sequence."""
    steps: int | None = None
    """Optimizer steps; the preset's if not given."""
    batch_size: int | None = None
    """Sequences per optimizer step; the preset's if not given."""
    lr: float | None = None
    """Peak learning rate; the preset's, tuned for the arm, if not given."""
    optimizer: OptimizerName | None = None
    """adamw, or muon for the blocks' matrices; the arm's if not given."""
    schedule: ScheduleName = "cosine"
    """cosine or linear decay to zero, or wsd: constant, then linear to zero at the end."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""
    warmup_steps: int | None = None
    """Steps of linear warmup; if not given, GPT a fifth of the run, at most 2000; nGPT none, in the demo a tenth."""
    weight_decay: float | None = None
    """Decoupled decay of matrices; nGPT 0, GPT 0.1, if not given."""
    beta1: float = 0.9
    """Adam's first-moment decay."""
    beta2: float = 0.95
    """Adam's second-moment decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    qk_clip: float | None = None
    """QK-clip: after every step, heads whose largest attention logit was above this (100 in Kimi K2) get smaller query
    and key weights; for GPT without QK-norm. Off if not given."""
    dtype: DtypeName = "auto"
    """Products in bfloat16 (autocast) or float32; auto is bfloat16 where the hardware has it."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    init_from: str | None = None
    """Start from the weights of this run folder or checkpoint; optimizer and data start anew."""
    eval_every: int | None = None
    """Steps between evaluations; a twentieth of the run if not given."""
    eval_sequences: int | None = None
    """Sequences of the fixed validation set; the preset's if not given, 0 for the whole validation split."""

    def shape(self) -> dict[str, int]:
        """The shape fields of the model's config, vocabulary apart: the preset's, with what the flags change."""
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; {nearest(self.preset, PRESETS)}")
        shape = PRESETS[self.preset].shape()
        for name in ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_mlp", "context"):
            if getattr(self, name) is not None:
                shape[name] = getattr(self, name)
        return shape


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. None of these changes what is learned, except by rounding (threads, compile)."""

    micro_batch_size: int | None = None
    """Sequences per forward pass; gradients are accumulated over the batch. The preset's if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: CUDA where there is one."""
    compile: bool = True
    """Compile the model; falls back to eager, and says so, where there is no C++ compiler."""
    threads: int | None = None
    """CPU threads; as many as there are cores if not given."""
    deterministic: bool = True
    """The same bits from run to run."""
    skip_nonfinite: bool = False
    """Skip (and count) steps whose loss or gradient is not finite, rather than stop."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; a tenth of the run if not given. One is always written at the end."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    keep_every: int | None = None
    """Keep the checkpoints of every so many steps besides, for good."""
    background_checkpoints: bool = True
    """Write checkpoints beside the training, from a copy in CPU memory."""
    log_every: int | None = None
    """Steps between plain progress lines, where the output is no terminal; a twentieth of the run if not given."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    track: Literal["wandb", "trackio"] | None = None
    """Send the metrics to Weights & Biases or trackio too, where it is installed."""
    peak_flops: float | None = None
    """What one device computes per second, for the MFU; known for common GPUs in bf16, left out on CPUs."""
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "threads", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every"):
            _at_least(name, getattr(self, name), 1)


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


def resolve(arm_name: str, config: TrainConfig) -> TrainConfig:
    """The config with everything filled in, for an arm. Same numbers for the same result.

    Raises:
        ValueError: an unknown arm or preset, or a value that can't be.
    """
    arm = parse_arm(arm_name)
    config = dataclasses.replace(config, **arm.recipe)
    shape = config.shape()
    preset = PRESETS[config.preset]
    is_ngpt = arm.architecture == "ngpt"
    steps = preset.steps if config.steps is None else config.steps
    defaults: dict[str, Any] = {
        **shape,
        "steps": steps,
        "batch_size": preset.batch_size,
        "optimizer": "adamw",
        "warmup_steps": int(preset.ngpt_warmup * steps) if is_ngpt else min(2000, steps // 5),
        "weight_decay": 0.0 if is_ngpt else 0.1,
        "eval_every": max(1, steps // 20),
        "eval_sequences": preset.eval_sequences,
        "lr": usual_lr(arm_name, config)[0],
    }
    filled = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    resolved = dataclasses.replace(config, **filled)
    _validate(resolved)
    if resolved.qk_clip is not None:
        _check_qk_clip(arm_name, arm, resolved)
    if is_ngpt and resolved.weight_decay:
        raise ValueError(
            f"weight_decay {resolved.weight_decay} has no meaning for nGPT, whose matrices are normalised after "
            "every step; give it to the other arms alone, as gpt:weight_decay=…"
        )
    return resolved


def _check_qk_clip(arm_name: str, arm: Arm, config: TrainConfig) -> None:
    check_threshold("qk_clip", config.qk_clip)
    advice = "give it to the other arms alone, as gpt:qk_clip=…"
    if arm.architecture == "ngpt":
        raise ValueError(
            f"qk_clip {config.qk_clip:g} and {arm_name}: nGPT's query and key weights are unit vectors, which a clip "
            f"would take off the hypersphere, and which can't grow; {advice}"
        )
    if arm.model.get("qk_norm", "none") != "none":
        raise ValueError(
            f"qk_clip {config.qk_clip:g} and {arm_name}: QK-norm undoes a change of the weights before it, and bounds "
            f"the logits itself; {advice}"
        )


def usual_lr(arm_name: str, config: TrainConfig) -> tuple[float, str]:
    """The learning rate of an arm for which none is given, and where it comes from."""
    preset, base = PRESETS[config.preset], arm_name.partition(":")[0]
    own = all(
        getattr(config, name) in (None, value)
        for name, value in {**preset.shape(), "steps": preset.steps, "batch_size": preset.batch_size}.items()
    )
    plain = TrainConfig(preset=config.preset)
    changed = [f for f in RECIPE_FIELDS if getattr(config, f) != getattr(plain, f)]
    for name in (base, base.partition("-")[0]):
        if name in preset.tuned_lr:
            if own and name == arm_name and not changed:
                return preset.tuned_lr[name], f"tuned beforehand for the {config.preset} preset, see docs/demo-sweep.md"
            return preset.tuned_lr[name], f"tuned for {name} at the {config.preset} preset's settings, not for these"
    return USUAL_LR[parse_arm(arm_name).architecture], "a usual value, not tuned"


def _validate(config: TrainConfig) -> None:
    assert config.steps is not None and config.warmup_steps is not None
    for name in ("steps", "batch_size", "eval_every"):
        _at_least(name, getattr(config, name), 1)
    for name in ("warmup_steps", "weight_decay", "grad_clip", "adam_eps", "eval_sequences"):
        _at_least(name, getattr(config, name), 0)
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {config.seed}")
    if config.lr is None or not (config.lr > 0 and math.isfinite(config.lr)):
        raise ValueError(f"lr must be a positive number, got {config.lr}; nGPT and GPT learn at about 1e-3")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    if not 0 < config.decay_fraction <= 1:
        raise ValueError(f"decay_fraction must be in (0, 1], got {config.decay_fraction}")
    for name, kind in (("optimizer", OptimizerName), ("schedule", ScheduleName), ("dtype", DtypeName)):
        if getattr(config, name) not in typing.get_args(kind):
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose {', '.join(typing.get_args(kind))}")
    if config.warmup_steps >= config.steps and config.steps > 1:
        raise ValueError(f"warmup_steps {config.warmup_steps} leaves nothing of {config.steps} steps; give fewer")


def model_config(arm_name: str, config: TrainConfig, vocab_size: int) -> Any:
    """The config of the arm's model at this shape. Raises ValueError for a shape that can't be."""
    arm = parse_arm(arm_name)
    fields = {**PRESETS[config.preset].model_defaults(arm.architecture), **arm.model}
    return make_config(arm.architecture, vocab_size=vocab_size, **config.shape(), **fields)


def record(arm_name: str, config: TrainConfig, data: DataConfig, model: Any) -> dict[str, Any]:
    """config.json: everything that defines the run, explicit."""
    return {
        "schema_version": SCHEMA_VERSION,
        "arm": arm_name,
        "architecture": parse_arm(arm_name).architecture,
        "model": dataclasses.asdict(model),
        "train": dataclasses.asdict(config),
        "data": dataclasses.asdict(data),
    }


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """What differs between two records, as "name: this, not that"."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for key in [*ours, *(k for k in theirs if k not in ours)]
            for line in differences(ours.get(key), theirs.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    same = list(ours) == list(theirs) if isinstance(ours, list | tuple) and theirs is not None else ours == theirs
    return [] if same else [f"{prefix} is {theirs!r} there, {ours!r} asked for"]


def shown(different: list[str], most: int = 5) -> str:
    """What differs, as one sentence."""
    return "; ".join(different[:most]) + (f"; and {len(different) - most} more" if len(different) > most else "")


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run folder.

    Raises:
        ValueError: there is none, it is broken, of transformers, or from a newer version.
    """
    path = run / "config.json"
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise ValueError(f"{run} {what}; give a run folder, as nsphere train made it")
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.json; give a folder that nsphere train made")
    broken = f"{path} is broken; restore it from a backup, or train the run again"
    try:
        content = json.loads(path.read_text())
        of_transformers = "model_type" in content
        version = 0 if of_transformers else int(content["schema_version"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(broken) from None
    if of_transformers:
        raise ValueError(f"{run} is a folder of transformers; make a run folder of it: nsphere import {run} RUN")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this nsphere reads up to {SCHEMA_VERSION}; install a newer nsphere"
        )
    sound = (
        content.get("architecture") in ARCHITECTURES
        and isinstance(content.get("arm"), str)
        and all(isinstance(content.get(part), dict) for part in ("model", "train", "data"))
    )
    try:
        if sound:
            # with what an older version did not write yet
            content["model"] = dataclasses.asdict(make_config(content["architecture"], **content["model"]))
            DataConfig(**content["data"])
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(broken)
    return content
