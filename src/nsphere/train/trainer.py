"""One arm in training: model, optimizers and the step they take. No files, no printing."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from nsphere.layers import Decoder
from nsphere.ops import backend
from nsphere.ops.backend import Ability, can_compile
from nsphere.presets import PRESETS, make_model
from nsphere.qk_clip import QKClip
from nsphere.qk_norm import QKNorm
from nsphere.train.arms import parse_arm
from nsphere.train.config import RunOptions, TrainConfig, model_config
from nsphere.train.data import Batches, Corpus, val_batches
from nsphere.train.distributed import Layout, World
from nsphere.train.gradients import clip_grad_norm_, reduce_vectors_
from nsphere.train.initial import make_spread
from nsphere.train.machine import choose_device, has_bf16
from nsphere.train.optimizer import make_optimizers
from nsphere.train.parallelize import check_layout, parallelize, reshard
from nsphere.train.precision import autocast, choose_dtype, dtype_name
from nsphere.train.schedule import lr_factor


class QKClipResult(NamedTuple):
    """What QK-clip saw and did in one optimizer step."""

    max_logit: float
    """The largest attention logit of the step's forward passes."""
    clipped_heads: int
    """How many heads got smaller weights, over all layers."""


class StepResult(NamedTuple):
    """What one optimizer step did; losses in nats per token."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    qk_clip: QKClipResult | None = None


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
        world: the ranks that share the work; this process alone if not given.

    Raises:
        ValueError: a shape, device, dtype or layout that can't be, or data shorter than a sequence.
    """

    def __init__(
        self, arm: str, config: TrainConfig, options: RunOptions, corpus: Corpus, world: World | None = None
    ) -> None:
        assert config.context is not None and config.batch_size is not None and config.optimizer is not None
        self.arm, self.config, self.options, self.corpus = arm, config, options, corpus
        self.world = World(Layout(), choose_device(options.device)) if world is None else world
        self.device = self.world.device
        self.autocast_dtype = choose_dtype(config, self.device)
        self.num_steps = 0
        self.num_skipped = 0
        self.micro_batch_size = micro_batch_size(config, options)
        self.batches = Batches(corpus.train, context=config.context, batch_size=config.batch_size, seed=config.seed)
        self.val_batches = [
            batch.to(self.device)
            for batch in val_batches(
                corpus.val,
                context=config.context,
                batch_size=self.micro_batch_size,
                num_sequences=config.eval_sequences or None,
            )
        ]
        self.model_config = model_config(arm, config, corpus.vocab_size)
        check_layout(self.model_config, self.world, config, self.micro_batch_size)
        try:
            backend.choose(self.device)
        except RuntimeError as error:  # NSPHERE_BACKEND asks for what can't run here
            raise ValueError(str(error)) from None
        self.compiled = options.compile and can_compile(self.device.type).available
        self.model = self._make_model()
        self.optimizers = make_optimizers(self.model, config)
        self.qk_clip = None if config.qk_clip is None else QKClip(self.model, config.qk_clip)

    def _make_model(self) -> Decoder:
        """The weights of any layout are those that one process draws from the seed."""

        def spread(model: Decoder) -> None:
            if not self.compiled and backend.choose(self.device) == "compiled":
                for module in model.modules():
                    if isinstance(module, QKNorm):
                        module.backend = "reference"  # eager means eager: its op would compile itself
            parallelize(model, self.world, self.autocast_dtype, self.compiled)

        if self.world.mesh is not None:
            return make_spread(self.model_config, self.config.seed, self.device, spread)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = make_model(self.model_config)
        spread(model)
        return model.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context that forward passes run in."""
        return autocast(self.device, self.autocast_dtype)

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
        assert config.batch_size is not None
        # data-parallel rank r takes its stretch of the global batch; tensor-parallel ranks share theirs
        num_rows = config.batch_size // self.world.dp
        num_micro = num_rows // self.micro_batch_size
        losses: list[Tensor] = []
        for i in range(num_micro):
            first = self.world.dp_rank * num_rows + i * self.micro_batch_size
            rows = slice(first, first + self.micro_batch_size)
            batch = self.batches(self.num_steps, rows).to(self.device)
            with self.autocast():
                loss = self.model.loss(*batch)
            (loss if num_micro == 1 else loss / num_micro).backward()
            losses.append(loss.detach())
        reduce_vectors_(self.model, self.world)
        grad_norm = clip_grad_norm_(self.model, config.grad_clip, self.world).item()
        mean_loss = self.world.mean_loss(torch.stack(losses).mean()).item()
        lr = self.lr()
        finite = math.isfinite(mean_loss) and math.isfinite(grad_norm)
        if finite:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        clipped = self._clip_heads(finite)
        self.model.zero_grad(set_to_none=True)
        if not finite:
            if not self.options.skip_nonfinite:
                what = "loss" if not math.isfinite(mean_loss) else "gradient norm"
                raise NonFinite(
                    f"the {what} of step {self.num_steps + 1} is {mean_loss if what == 'loss' else grad_norm}"
                )
            self.num_skipped += 1
        self.num_steps += 1
        return StepResult(mean_loss, grad_norm, lr, not finite, clipped)

    def _clip_heads(self, stepped: bool) -> QKClipResult | None:
        if self.qk_clip is None:
            return None
        if not stepped:  # the weights stay; what was seen is not carried over, as a resumed run would not know it
            self.qk_clip.forget()
            return None
        gammas = torch.cat(list(self.qk_clip().values()))
        largest = torch.cat(list(self.qk_clip.max_logits.values())).max()
        return QKClipResult(largest.item(), int((gammas < 1).sum().item()))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the fixed validation set, in nats per token; data-parallel ranks share its batches."""
        losses = torch.zeros(len(self.val_batches), dtype=torch.float64)
        for first in range(0, len(losses), self.world.dp):
            own = first + self.world.dp_rank
            # all ranks run the same number of passes, as each takes part in gathering the weights of the others
            batch = self.val_batches[min(own, len(losses) - 1)]
            with self.autocast():
                loss = self.model.loss(*batch)
            if own < len(losses) and self.world.tp_rank == 0:
                losses[own] = loss.item()
        reshard(self.model)
        losses = self.world.sum(losses)
        weights = torch.tensor([batch.targets.numel() for batch in self.val_batches], dtype=torch.float64)
        return ((losses * weights).sum() / weights.sum()).item()

    @property
    def architecture(self) -> str:
        """Gpt or ngpt; a checkpoint of the other does not fit."""
        return parse_arm(self.arm).architecture

    @property
    def dtype_name(self) -> str:
        """What products are computed in."""
        return dtype_name(self.autocast_dtype)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step."""
        assert self.config.batch_size is not None and self.config.context is not None
        return self.config.batch_size * self.config.context

    def describe(self) -> str:
        """One line: device, dtype, compiled or why not, parameters."""
        bf16 = has_bf16(self.device).reason
        return (
            f"{self.arm}: {self.model.num_parameters():,} parameters, {self.device}, {self.dtype_name} ({bf16}), "
            f"{compile_line(self.options, can_compile(self.device.type))}, {self.world.describe()}"
        )


def micro_batch_size(config: TrainConfig, options: RunOptions) -> int:
    """Sequences per forward pass: what is asked for, else the preset's, as far as the batch goes.

    Raises:
        ValueError: the batch is no multiple of it.
    """
    assert config.batch_size is not None
    size = options.micro_batch_size or min(PRESETS[config.preset].micro_batch_size, config.batch_size)
    if config.batch_size % size:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of micro_batch_size {size}; "
            "give --micro-batch-size a divisor"
        )
    return size


def compile_line(options: RunOptions, ability: Ability) -> str:
    """Whether the model is compiled, and if not, why."""
    if not options.compile:
        return "eager (--no-compile)"
    return f"compiled ({ability.reason})" if ability.available else f"eager: {ability.reason}"
