"""The training run: one loop that can be read aloud. What it leaves in its folder: run_folder.py."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsphere.hypersphere import max_norm_deviation, project_what_is_off_
from nsphere.train.checkpoint import CheckpointSaver, latest_checkpoint, load_checkpoint
from nsphere.train.config import RunOptions, TrainConfig, differences, model_config, read_config, record, resolve, shown
from nsphere.train.data import Corpus, DataConfig
from nsphere.train.distributed import World
from nsphere.train.files import atomic_write_json
from nsphere.train.job import job
from nsphere.train.machine import choose_device, environment
from nsphere.train.metrics import Metrics, attention_logit_bound, check_tracker, flops_per_token, peak_flops
from nsphere.train.precision import pin_dtype
from nsphere.train.progress import StepProgress, duration, say
from nsphere.train.roll_call import RollCall
from nsphere.train.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    RESULT_FILE,
    TOKENIZER_FOLDER,
    Result,
    check_run_folder,
    earlier_result,
)
from nsphere.train.signals import Interrupted, StopRequest
from nsphere.train.tokenizer import load_tokenizer
from nsphere.train.trainer import NonFinite, Trainer, micro_batch_size


def train(
    arm: str,
    config: TrainConfig,
    options: RunOptions,
    data: DataConfig,
    out: Path,
    *,
    resume: bool = False,
    corpus: Corpus | None = None,
    title: str | None = None,
    world: World | None = None,
) -> Result:
    """Train one arm into a run folder. Under torchrun all ranks call this; see train/distributed.py.

    Args:
        arm: name of the arm.
        config: what defines the numbers; need not be resolved.
        options: how it is carried out.
        data: what it learns.
        out: the run folder.
        resume: continue what is there; a folder that is not there yet is started.
        corpus: the data, if it is loaded already.
        title: what the progress is called; the arm's name if not given.
        world: the ranks, if they are joined already; otherwise they are for the time of the run.

    Raises:
        ValueError: bad settings, data or folder; before anything is written.
        Interrupted: a signal asked to stop; a checkpoint was saved.
        NonFinite: a loss was not finite; says which checkpoint is good.
        LostRank: another rank died or hangs.
    """
    config = pin_dtype(resolve(arm, config), choose_device(options.device))
    model_config(arm, config, vocab_size=1)  # a shape that can't be is refused before the data is read
    micro_batch_size(config, options)
    check_tracker(options.track)
    with job(out, options, world) as work:
        with work.during("the preparation"):
            world = work.world
            world.all(lambda: check_run_folder(out, resume))
            corpus = work.load_corpus(data) if corpus is None else corpus
            settings: dict[str, Any] = {"train": config, "data": data, "options": options}
            asked = {name: dataclasses.asdict(given) for name, given in settings.items()}
            work.check_agreement({"arm": arm, **asked, "data_sha256": corpus.sha256})
            trainer = Trainer(arm, config, options, corpus, world)
            wanted = record(arm, config, data, trainer.model_config)
            done = world.first(lambda: earlier_result(out, wanted))
            if done is not None:
                say(f"{out}: finished before, validation loss {done.final_val_loss:.4f}")
                return done
            if config.init_from is not None and world.first(lambda: latest_checkpoint(out)) is None:
                _start_from(trainer, Path(config.init_from))

            def check() -> None:
                check_run_folder(out, resume)
                earlier_result(out, wanted)

            work.take(out, check)
        return _Run(trainer, out, wanted, title or arm, work.roll_call).go()


def _start_from(trainer: Trainer, source: Path) -> None:
    """Take over the weights of another run, which must mean there what they mean here."""
    folder = source.parent.parent if source.parent.name == "checkpoints" else source
    checkpoint = load_checkpoint(source, expect_architecture=trainer.architecture, ranks=trainer.world)
    there = read_config(folder)["model"]
    here = dataclasses.asdict(trainer.model_config)
    different = [line for line in differences(here, there) if not line.startswith("context ")]
    if different:
        raise ValueError(
            f"--init-from {source}: the weights belong to another model: {shown(different)}. "
            "Set the same, as flags or as ARM:field=value"
        )
    saved = folder / TOKENIZER_FOLDER
    ours = trainer.corpus.tokenizer
    if ours is not None and saved.is_dir() and load_tokenizer(saved).sha256 != ours.sha256:
        raise ValueError(f"--init-from {source}: it was trained with another tokenizer; give --tokenizer {saved}")
    checkpoint.restore(trainer.model)
    _verify_sphere(trainer, f"weights of {source}")


def _verify_sphere(trainer: Trainer, what: str) -> None:
    """Leave unit rows bit for bit as they are; project and say so where one is off by more than rounding."""
    worst = max_norm_deviation(trainer.model)
    if worst is not None and worst.value > 1e-6:
        say(f"{what}: {worst.name}[{worst.row}] was off the sphere by {worst.value:.2g}; what was off was projected")
        project_what_is_off_(trainer.model)


class _Run:
    """A run in its folder: what `train` does once everything is checked. Every rank goes through it; rank 0 writes."""

    def __init__(self, trainer: Trainer, out: Path, wanted: dict[str, Any], title: str, roll_call: RollCall) -> None:
        self.trainer, self.out, self.title, self.roll_call = trainer, out, title, roll_call
        self.world, options = trainer.world, trainer.options
        self.steps: int = trainer.config.steps  # type: ignore[assignment]
        self.eval_every: int = trainer.config.eval_every  # type: ignore[assignment]
        self.checkpoint_every = options.checkpoint_every or max(1, self.steps // 10)
        self.train_seconds = 0.0
        self.wanted = wanted
        self.saver = CheckpointSaver(
            out,
            keep_last=options.keep_checkpoints,
            keep_every=options.keep_every,
            background=options.background_checkpoints,
            ranks=self.world.beside,
        )
        peak = options.peak_flops or peak_flops(self.world.device, trainer.autocast_dtype is not None)
        self.mfu_of_a_token = None if peak is None else flops_per_token(trainer.model) / (peak * self.world.size)

    def go(self) -> Result:
        during = self.roll_call.during
        with during("the start"):
            resumed = self._begin()
        with self._reporting(resumed) as stop:
            if not resumed:
                with during("the first evaluation"):
                    self._evaluate()
            self.compiles_at = self.trainer.num_steps + 1
            while (step := self.trainer.num_steps + 1) <= self.steps:
                with during(f"step {step}"):
                    self._step(step, stop)
            with during("the last save"):
                self.saver.wait()
        with during("the end"):
            return self._finish()

    def _begin(self) -> bool:
        """Write down what the run is, and take up its newest checkpoint; False if it starts from scratch."""
        trainer = self.trainer
        self.world.first(self._record_config)
        resumed = self._resume()
        self.world.first(self._record_environment)
        say(trainer.describe() + (f", resumed at step {trainer.num_steps}" if resumed else ""))
        return resumed

    @contextlib.contextmanager
    def _reporting(self, resumed: bool) -> Iterator[StopRequest]:
        """Metrics, progress and signals, for the time of the steps; a save on its way is waited for at the end."""
        trainer, options = self.trainer, self.trainer.options
        with (
            Metrics(
                self.out,
                trainer.num_steps if resumed else None,
                writes=self.world.is_first,
                tensorboard=options.tensorboard,
                track=options.track,
                config=self.wanted,
            ) as self.metrics,
            StopRequest() as stop,
            StepProgress(
                self.title, self.steps, options.log_every or max(1, self.steps // 20), trainer.num_steps
            ) as self.progress,
            self.saver,
        ):
            yield stop

    def _step(self, step: int, stop: StopRequest) -> None:
        """One step, and what is due after it: numbers, an evaluation, a checkpoint, the end."""
        trainer = self.trainer
        compiles = step == self.compiles_at
        began = time.perf_counter()
        try:
            with contextlib.nullcontext() if compiles else self.roll_call.watched(f"step {step}"):
                result = trainer.step()
        except NonFinite as error:
            raise NonFinite(self._advice(error)) from None
        seconds = time.perf_counter() - began
        self.train_seconds += seconds
        bound = attention_logit_bound(trainer.model)
        rate = trainer.tokens_per_step / seconds
        self.metrics.write(
            step,
            "train",
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            tokens=step * trainer.tokens_per_step,
            seconds=seconds,
            tokens_per_second=rate,
            **({} if bound is None else {"attention_logit_bound": self.world.largest(bound)[0]}),
            **({} if self.mfu_of_a_token is None else {"mfu": rate * self.mfu_of_a_token}),
            **({"skipped": True} if result.skipped else {}),
            **({} if result.qk_clip is None else result.qk_clip._asdict()),
        )
        if step % self.eval_every == 0 or step == self.steps:
            self._evaluate()
        self.progress.update(step, f"loss {result.loss:.3f}  val {self.val_loss:.3f}  {rate:,.0f} tok/s")
        # a signal may have come to one rank alone, and a save may have failed on one first: all leave after one step
        number, failed = self.world.largest(stop.signal or 0, self.saver.has_failed)
        if failed:
            self.saver.wait()
        leaving = number and step < self.steps
        if leaving or step % self.checkpoint_every == 0 or step == self.steps:
            self._save()
        if leaving:
            self.saver.wait()
            raise Interrupted(int(number), f"stopped at step {step}, saved in {self.out}; --resume continues it")

    def _resume(self) -> bool:
        """Take up the newest sound checkpoint; False if the run starts from scratch."""
        if self.world.first(lambda: latest_checkpoint(self.out)) is None:
            return False
        trainer = self.trainer
        checkpoint = load_checkpoint(self.out, expect_architecture=trainer.architecture, ranks=self.world)
        data_sha256 = str(checkpoint.state.get("data_sha256"))
        if data_sha256 != trainer.corpus.sha256:
            raise ValueError(
                f"{self.out} was trained on other data (sha256 {data_sha256[:12]}…, now "
                f"{trainer.corpus.sha256[:12]}…), so it can't be continued; give the same data, or another --out"
            )
        checkpoint.restore(trainer.model, trainer.optimizers)
        trainer.num_steps = checkpoint.step
        trainer.num_skipped = checkpoint.state["skipped_steps"]
        self.train_seconds = checkpoint.state["train_seconds"]
        self.val_loss = checkpoint.state["val_loss"]
        _verify_sphere(trainer, f"checkpoint {checkpoint.path}")
        return True

    def _save(self) -> None:
        trainer = self.trainer
        self.metrics.sync()
        self.saver.save(
            step=trainer.num_steps,
            model=trainer.model,
            optimizer=trainer.optimizers,
            state={
                "architecture": trainer.architecture,
                "config": self.wanted,
                "data_sha256": trainer.corpus.sha256,
                "skipped_steps": trainer.num_skipped,
                "train_seconds": self.train_seconds,
                "val_loss": self.val_loss,
            },
        )

    def _evaluate(self) -> None:
        trainer = self.trainer
        self.val_loss = trainer.evaluate()
        if not math.isfinite(self.val_loss):
            raise NonFinite(self._advice(f"the validation loss at step {trainer.num_steps} is {self.val_loss}"))
        worst = max_norm_deviation(trainer.model)
        self.metrics.write(
            trainer.num_steps,
            "eval",
            val_loss=self.val_loss,
            tokens=trainer.num_steps * trainer.tokens_per_step,
            **({} if worst is None else {"max_norm_deviation": worst.value}),
        )

    def _advice(self, error: NonFinite | str) -> str:
        with contextlib.suppress(OSError):  # what is being written may be the last good one
            self.saver.wait()
        good = latest_checkpoint(self.out)
        return (
            f"{error}; the last good checkpoint is {good if good is not None else '(none yet)'}. "
            f"Try a smaller --lr (now {self.trainer.config.lr:g}), more --warmup-steps, or --skip-nonfinite"
        )

    def _record_config(self) -> None:
        if (self.out / CONFIG_FILE).exists():
            return
        tokenizer = self.trainer.corpus.tokenizer
        if tokenizer is not None:
            (self.out / TOKENIZER_FOLDER).mkdir(exist_ok=True)
            tokenizer.save(self.out / TOKENIZER_FOLDER)
        atomic_write_json(self.out / CONFIG_FILE, self.wanted)

    def _record_environment(self) -> None:
        path = self.out / ENVIRONMENT_FILE
        starts = json.loads(path.read_text()) if path.exists() else []
        now = {
            "started_at_step": self.trainer.num_steps,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **environment(self.trainer.device),
            "dtype": self.trainer.dtype_name,
            "compiled": self.trainer.compiled,
            "options": dataclasses.asdict(self.trainer.options),
            "data_sha256": self.trainer.corpus.sha256,
        }
        atomic_write_json(path, [*starts, now])

    def _finish(self) -> Result:
        trainer = self.trainer
        per_token = trainer.corpus.bytes_per_token
        result = Result(
            final_val_loss=self.val_loss,
            bits_per_byte=None if per_token is None else self.val_loss / math.log(2) / per_token,
            steps=trainer.num_steps,
            tokens=trainer.num_steps * trainer.tokens_per_step,
            skipped_steps=trainer.num_skipped,
            num_parameters=trainer.model.num_parameters(),
            train_seconds=self.train_seconds,
            data_sha256=trainer.corpus.sha256,
        )
        self.world.first(lambda: atomic_write_json(self.out / RESULT_FILE, dataclasses.asdict(result)))
        skipped = f", {trainer.num_skipped} steps skipped" if trainer.num_skipped else ""
        say(f"{self.title}: validation loss {self.val_loss:.4f} after {duration(self.train_seconds)}{skipped}")
        return result
