"""One arm in training: model, optimizers and the step they take. No files, no printing."""

import contextlib
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from nsphere.presets import make_model
from nsphere.train.arms import parse_arm
from nsphere.train.config import RunOptions, TrainConfig, model_config
from nsphere.train.data import Batches, Corpus, val_batches
from nsphere.train.machine import Ability, can_compile, choose_device, has_bf16
from nsphere.train.optimizer import clip_grad_norm, make_optimizers
from nsphere.train.schedule import lr_factor


class StepResult(NamedTuple):
    """What one optimizer step did; losses in nats per token."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool


class NonFinite(ArithmeticError):
    """A loss or gradient that is not finite; the weights are those before the step."""


class Trainer:
    """A model, its optimizers, its data and how many steps it has taken.

    Everything that the next step depends on is `model`, `optimizers` and `num_steps`: restore these three and the run
    goes on as if it had never stopped.

    Args:
        arm: name of the arm.
        config: resolved for this arm.
        options: how to carry it out.
        corpus: the data.

    Raises:
        ValueError: a shape, device or dtype that can't be, or data shorter than a sequence.
    """

    def __init__(self, arm: str, config: TrainConfig, options: RunOptions, corpus: Corpus) -> None:
        assert config.context is not None and config.batch_size is not None and config.micro_batch_size is not None
        self.arm, self.config, self.options, self.corpus = arm, config, options, corpus
        self.device = choose_device(options.device)
        self.autocast_dtype = choose_dtype(config, self.device)
        self.num_steps = 0
        self.num_skipped = 0
        self.batches = Batches(corpus.train, context=config.context, batch_size=config.batch_size, seed=config.seed)
        self.val_batches = [
            batch.to(self.device)
            for batch in val_batches(
                corpus.val,
                context=config.context,
                batch_size=config.micro_batch_size,
                num_batches=config.eval_batches or None,
            )
        ]
        self.model_config = model_config(arm, config, corpus.vocab_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = make_model(self.model_config).to(self.device)
        self.optimizers = make_optimizers(self.model, config)
        self.compiled = options.compile and can_compile(self.device).available
        if self.compiled:
            # a silent fall-back to eager would be slow and, worse, change the last bits in the middle of a run
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self.model.compile_parts()

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context that forward passes run in."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def lr(self) -> float:
        """The learning rate of the next step."""
        config = self.config
        assert config.lr is not None and config.steps is not None and config.warmup_steps is not None
        return config.lr * lr_factor(
            config.schedule, self.num_steps, config.steps, config.warmup_steps, config.decay_fraction
        )

    def step(self) -> StepResult:
        """One optimizer step on the next batch.

        Raises:
            NonFinite: the loss or the gradient norm is not finite, and such steps are not to be skipped.
        """
        config = self.config
        assert config.batch_size is not None and config.micro_batch_size is not None
        num_micro = config.batch_size // config.micro_batch_size
        losses: list[Tensor] = []
        for i in range(num_micro):
            rows = slice(i * config.micro_batch_size, (i + 1) * config.micro_batch_size)
            batch = self.batches(self.num_steps, rows if num_micro > 1 else None).to(self.device)
            with self.autocast():
                loss = self.model.loss(*batch)
            (loss if num_micro == 1 else loss / num_micro).backward()
            losses.append(loss.detach())
        grad_norm = clip_grad_norm(self.model, config.grad_clip).item()
        mean_loss = torch.stack(losses).mean().item()
        lr = self.lr()
        finite = math.isfinite(mean_loss) and math.isfinite(grad_norm)
        if finite:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        if not finite:
            if not self.options.skip_nonfinite:
                what = "loss" if not math.isfinite(mean_loss) else "gradient norm"
                raise NonFinite(
                    f"the {what} of step {self.num_steps + 1} is {mean_loss if what == 'loss' else grad_norm}"
                )
            self.num_skipped += 1
        self.num_steps += 1
        return StepResult(mean_loss, grad_norm, lr, not finite)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the fixed validation set, in nats per token."""
        with self.autocast():
            losses = [self.model.loss(*batch) for batch in self.val_batches]
        weights = [batch.targets.numel() for batch in self.val_batches]
        return sum(loss.item() * w for loss, w in zip(losses, weights, strict=True)) / sum(weights)

    @property
    def architecture(self) -> str:
        """Gpt or ngpt; a checkpoint of the other does not fit."""
        return parse_arm(self.arm).architecture

    @property
    def keeps_sphere(self) -> bool:
        """Whether this model's matrices are kept on the sphere by the optimizer."""
        return getattr(self.model_config, "projection", None) == "step"

    @property
    def dtype_name(self) -> str:
        """What products are computed in."""
        return "float32" if self.autocast_dtype is None else "bfloat16 autocast"

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step."""
        assert self.config.batch_size is not None and self.config.context is not None
        return self.config.batch_size * self.config.context

    def describe(self) -> str:
        """One line: device, dtype, compiled or why not, parameters."""
        why = "" if self.config.dtype != "auto" else f" ({has_bf16(self.device).reason})"
        return (
            f"{self.arm}: {self.model.num_parameters():,} parameters, {self.device}, {self.dtype_name}{why}, "
            f"{compile_line(self.options, can_compile(self.device))}"
        )


def compile_line(options: RunOptions, ability: Ability) -> str:
    """Whether the model is compiled, and if not, why."""
    if not options.compile:
        return "eager (--no-compile)"
    return f"compiled ({ability.reason})" if ability.available else f"eager: {ability.reason}"


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for plain float32."""
    if config.dtype == "auto":
        return torch.bfloat16 if has_bf16(device).available else None
    return torch.bfloat16 if config.dtype == "bfloat16" else None


@contextlib.contextmanager
def process_settings(options: RunOptions, device: torch.device):
    """Threads and determinism for the time of a run; what was set before comes back afterwards.

    On CPU every operation used here is deterministic for a given number of threads, the embedding's gradient by
    construction. CUDA needs to be asked.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
