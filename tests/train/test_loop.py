import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from nsphere.train.checkpoint import CheckpointSaver, load_checkpoint
from nsphere.train.config import RunOptions, TrainConfig, resolve
from nsphere.train.data import DataConfig, load_corpus
from nsphere.train.files import RunLock, read_jsonl
from nsphere.train.job import process_settings
from nsphere.train.loop import train
from nsphere.train.roll_call import RollCall
from nsphere.train.signals import Interrupted
from nsphere.train.trainer import NonFinite, Trainer

ARMS = ["gpt", "gpt-qknorm-muon", "ngpt"]


def curve(run: Path) -> list[dict]:
    """The metrics, without what depends on the clock."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_jsonl(run / "metrics.jsonl")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run).model_tensors


def assert_same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    assert weights(a).keys() == weights(b).keys()
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name


@pytest.fixture
def data(tmp_path) -> DataConfig:
    return tiny.text_file(tmp_path)


@pytest.mark.parametrize("arm", ARMS)
def test_the_loss_falls_and_everything_is_recorded(tmp_path, data, arm) -> None:
    result = train(arm, tiny.config(steps=60, eval_every=20), tiny.options(tensorboard=True), data, tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert [r["step"] for r in evals] == [0, 20, 40, 60]
    assert evals[-1]["val_loss"] == result.final_val_loss < evals[0]["val_loss"] - 1
    assert result.tokens == 60 * 4 * 16 == steps[-1]["tokens"]
    assert result.bits_per_byte == pytest.approx(result.final_val_loss / 0.6931471805599453)
    assert all(r["grad_norm"] > 0 and r["lr"] > 0 for r in steps)
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["arm"], saved["train"]["steps"], saved["model"]["d_model"]) == (arm, 60, 32)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())[0]["torch"] == torch.__version__
    if arm == "ngpt":
        assert all(r["max_norm_deviation"] <= 1e-6 for r in evals)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_interrupted_and_resumed_is_the_same_run(tmp_path, data, monkeypatch, arm, stop_after) -> None:
    train(arm, tiny.config(), tiny.options(), data, tmp_path / "whole")
    step = Trainer.step

    def dying_step(self):
        if self.num_steps == stop_after:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(arm, tiny.config(), tiny.options(), data, tmp_path / "cut")
    train(arm, tiny.config(), tiny.options(), data, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, data, monkeypatch, number) -> None:
    step = Trainer.step

    def signalled_step(self):
        if self.num_steps == 3:
            os.kill(os.getpid(), number)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled_step)
        with pytest.raises(Interrupted, match="stopped at step 4, saved in") as stop:
            train("ngpt", tiny.config(), tiny.options(checkpoint_every=100), data, tmp_path / "cut")
    assert stop.value.exit_code == 128 + number
    assert (tmp_path / "cut" / "checkpoints" / "step-00000004").is_dir()
    train("ngpt", tiny.config(), tiny.options(), data, tmp_path / "cut", resume=True)
    train("ngpt", tiny.config(), tiny.options(), data, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, data) -> None:
    corpus = load_corpus(data)
    whole, parts = (
        Trainer("ngpt", resolve("ngpt", tiny.config()), tiny.options(micro_batch_size=m), corpus) for m in (4, 1)
    )
    for _ in range(3):
        a, b = whole.step(), parts.step()
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        # Adam's first steps are near sign(g) · lr, so rounding shows in proportion to lr, not to the weight
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-4)


def test_starting_from_another_run(tmp_path, data) -> None:
    train("ngpt", tiny.config(), tiny.options(), data, tmp_path / "first")
    config = tiny.config(init_from=str(tmp_path / "first"), steps=1)
    train("ngpt", config, tiny.options(), data, tmp_path / "second")
    first, second = curve(tmp_path / "first"), curve(tmp_path / "second")
    assert second[0]["val_loss"] == first[-1]["val_loss"]
    with pytest.raises(ValueError, match="holds the architecture 'ngpt', and 'gpt' was asked for"):
        train("gpt", config, tiny.options(), data, tmp_path / "third")
    # the same stored numbers would mean other scales there
    with pytest.raises(ValueError, match=r"belong to another model: s_z_init is 10.0 there, 1.0 asked for"):
        train("ngpt:s_z_init=1", config, tiny.options(), data, tmp_path / "third")
    assert not (tmp_path / "third").exists()
    # a finished run, or one with a checkpoint, needs its source no more
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "second" / "result.json").unlink()
    train("ngpt", config, tiny.options(), data, tmp_path / "second", resume=True)


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path, data, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "step", tiny.poisoned_step(4))
    with pytest.raises(
        NonFinite, match=r"loss of step 5 is nan; .*step-00000004\. Try a smaller --lr .*--skip-nonfinite"
    ):
        train("gpt", tiny.config(), tiny.options(), data, tmp_path / "run")


def test_or_is_skipped_and_counted(tmp_path, data, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "step", tiny.poisoned_step(4))
    result = train("gpt", tiny.config(), tiny.options(skip_nonfinite=True), data, tmp_path / "run")
    assert (result.skipped_steps, result.steps) == (1, 6)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    skipped = [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r.get("skipped")]
    assert skipped == [5]
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "run").values())


def test_a_validation_loss_that_is_not_finite_stops_too(tmp_path, data, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda self: float("nan") if self.num_steps == 3 else 1.0)
    with pytest.raises(NonFinite, match=r"validation loss at step 3 is nan; .*step-00000002"):
        train("gpt", tiny.config(), tiny.options(), data, tmp_path / "run")


# Muon alone, and the arm that has QK-norm with it switched off
@pytest.mark.parametrize(("arm", "threshold"), [("gpt", 0.1), ("gpt-qknorm-muon:qk_norm=none", 0.02)])
def test_qk_clip_holds_the_logits_is_recorded_and_resumes(tmp_path, data, monkeypatch, arm, threshold) -> None:
    config = tiny.config(steps=8, lr=1e-2, num_kv_heads=1, qk_clip=threshold)
    train(arm, config, tiny.options(), data, tmp_path / "whole")
    train(arm, dataclasses.replace(config, qk_clip=1e9), tiny.options(), data, tmp_path / "free")
    train(arm, dataclasses.replace(config, qk_clip=None), tiny.options(), data, tmp_path / "off")
    clipped, free, off = (
        [r for r in curve(tmp_path / run) if r["kind"] == "train"] for run in ("whole", "free", "off")
    )
    assert all(
        0 <= r["clipped_heads"] <= 4 and (r["clipped_heads"] > 0) == (r["max_logit"] > threshold) for r in clipped
    )
    assert any(r["clipped_heads"] for r in clipped)
    assert max(r["max_logit"] for r in free) > max(r["max_logit"] for r in clipped)
    assert all(r["clipped_heads"] == 0 for r in free)
    assert all("clipped_heads" not in r for r in off)
    assert [r["loss"] for r in off] == pytest.approx([r["loss"] for r in free], rel=1e-3 if "muon" in arm else 1e-5)

    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self: step(self) if self.num_steps < 5 else sys.exit("killed"))
        with pytest.raises(SystemExit):
            train(arm, config, tiny.options(), data, tmp_path / "cut")
    train(arm, config, tiny.options(), data, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own code
def test_qk_clip_sees_the_logits_of_all_micro_batches_and_of_compiled_blocks(data) -> None:
    arm, corpus = "gpt:qk_clip=0.1", load_corpus(data)

    def run(**options) -> list:
        trainer = Trainer(arm, resolve(arm, tiny.config(lr=1e-2)), tiny.options(**options), corpus)
        if trainer.compiled:
            del trainer.model.hidden_loss  # eager again: the head has no logits of attention, and takes long to compile
        return [trainer.step() for _ in range(5)]

    whole = run()
    assert whole[-1].qk_clip is not None and whole[-1].qk_clip.clipped_heads > 0
    for other in (run(micro_batch_size=1), run(compile=True)):
        for a, b in zip(whole, other, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=1e-5)
            assert b.qk_clip.max_logit == pytest.approx(a.qk_clip.max_logit, rel=1e-3)
            assert b.qk_clip.clipped_heads == a.qk_clip.clipped_heads


def test_a_skipped_step_clips_nothing_and_forgets_what_it_saw(data, monkeypatch) -> None:
    arm = "gpt:qk_clip=0.001"
    trainer = Trainer(arm, resolve(arm, tiny.config()), tiny.options(skip_nonfinite=True), load_corpus(data))
    trainer.step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr("nsphere.train.trainer.clip_grad_norm_", lambda *args: torch.tensor(float("nan")))
    skipped = trainer.step()
    assert skipped.skipped and skipped.qk_clip is None
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))
    assert all((m.max_logits == -torch.inf).all() for m in trainer.qk_clip.attentions.values())


def test_another_run_is_never_written_over(tmp_path, data) -> None:
    train("ngpt", tiny.config(), tiny.options(), data, tmp_path / "run")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.name != ".lock")
    with pytest.raises(ValueError, match="exists; give --resume"):
        train("ngpt", tiny.config(), tiny.options(), data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train.lr is 0.003 there, 0.001 asked for"):
        train("ngpt", tiny.config(lr=1e-3), tiny.options(), data, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"arm is 'ngpt' there, 'gpt' asked for"):
        train("gpt", tiny.config(), tiny.options(), data, tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train("gpt", tiny.config(), tiny.options(), data, tmp_path / "file" / "run")
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.name != ".lock")


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_that_came_meanwhile_is_not_taken_over(tmp_path, data, monkeypatch, resume) -> None:
    """Between the first look at the folder and its lock another job makes a run there and ends."""
    enter, out = RunLock.__enter__, tmp_path / "run"

    def late(self):
        monkeypatch.setattr(RunLock, "__enter__", enter)
        train("gpt", tiny.config(seed=1), tiny.options(), data, out)
        return enter(self)

    monkeypatch.setattr(RunLock, "__enter__", late)
    with pytest.raises(ValueError, match="another run" if resume else "exists; give --resume"):
        train("gpt", tiny.config(), tiny.options(), data, out, resume=resume)
    assert json.loads((out / "config.json").read_text())["train"]["seed"] == 1


def test_only_training_steps_are_watched_for_hanging(tmp_path, data, monkeypatch) -> None:
    """An evaluation or a save may take longer than the ranks' timeout, and the first step compiles."""
    inside, seen = [], []

    @contextlib.contextmanager
    def watched(self, what):
        inside.append(what)
        yield
        inside.pop()

    def look(name, do):
        return lambda self, *args, **kwargs: (seen.append((name, *inside)), do(self, *args, **kwargs))[1]

    monkeypatch.setattr(RollCall, "watched", watched)
    for owner, name in ((Trainer, "step"), (Trainer, "evaluate"), (CheckpointSaver, "save")):
        monkeypatch.setattr(owner, name, look(name, getattr(owner, name)))
    train("gpt", tiny.config(), tiny.options(), data, tmp_path / "run")
    assert {e for e in seen if e[0] != "step"} == {("evaluate",), ("save",)}
    assert [e for e in seen if e[0] == "step"] == [("step",), *(("step", f"step {i}") for i in range(2, 7))]


def test_other_data_under_the_same_name_is_noticed(tmp_path, data) -> None:
    config = tiny.config(steps=4)
    train("ngpt", config, tiny.options(), data, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    Path(data.data).write_text(tiny.TEXT.upper())
    with pytest.raises(ValueError, match="was trained on other data"):
        train("ngpt", config, tiny.options(), data, tmp_path / "run", resume=True)


def test_the_data_order_is_the_same_for_every_arm(tmp_path, data) -> None:
    corpus = load_corpus(data)
    a, b = (Trainer(arm, resolve(arm, tiny.config()), tiny.options(), corpus) for arm in ("gpt", "ngpt"))
    for step in range(5):
        assert torch.equal(a.batches(step).inputs, b.batches(step).inputs)
    other = Trainer("gpt", resolve("gpt", tiny.config(seed=1)), tiny.options(), corpus)
    assert not torch.equal(a.batches(0).inputs, other.batches(0).inputs)


_RUN = """
import sys
from pathlib import Path
from nsphere.train.checkpoint import load_checkpoint
from nsphere.train.config import RunOptions, TrainConfig
from nsphere.train.data import DataConfig
from nsphere.train.loop import train
config = TrainConfig(d_model=64, num_layers=1, num_heads=2, context=64, steps=24, batch_size=8, eval_every=4,
                     eval_sequences=8, dtype="bfloat16")
train("ngpt", config, RunOptions(threads=2, checkpoint_every=5, tensorboard=False), DataConfig(data=sys.argv[1]),
      Path(sys.argv[2]), resume=True)
"""


@pytest.mark.slow
def test_compiled_with_two_threads_is_bit_identical_when_killed(tmp_path, data, monkeypatch) -> None:
    """A whole run, and one killed with SIGKILL in its middle and resumed, in fresh processes: the same last bits.

    Its compiler, so the test pretends, was killed too, and left an empty library in torch's cache.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    command = [sys.executable, "-c", _RUN, data.data]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = subprocess.Popen([*command, str(tmp_path / "cut")], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not metrics.exists() or '"step": 7' not in metrics.read_text():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    libraries = [path for path in tmp_path.glob("compiled/*/*.so") if path.parent.name != "nsphere"]
    kernel = max(libraries, key=lambda path: path.stat().st_size)
    os.truncate(kernel, 0)
    resumed = subprocess.run([*command, str(tmp_path / "cut")], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert f"removed {kernel}: a process that was killed" in resumed.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_clock_that_jumps_changes_nothing(tmp_path, data, monkeypatch) -> None:
    """Times come from the monotonic clock: the wall clock may go back by years in the middle of a run."""
    jumps = itertools.cycle([1e9, 2e9, 0.0, 5e8])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    result = train("ngpt", tiny.config(), tiny.options(), data, tmp_path / "run")
    assert 0 < result.train_seconds < 600
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < r["seconds"] < 600 and r["tokens_per_second"] > 0 for r in records if r["kind"] == "train")
    assert load_checkpoint(tmp_path / "run").step == 6


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        RunOptions(threads=0)
    with pytest.raises(ValueError, match="unknown device 'gpuu'"):
        train("gpt", TrainConfig(), dataclasses.replace(RunOptions(), device="gpuu"), DataConfig(), Path("nowhere"))


def test_documents_that_share_a_row_are_masked_from_each_other(tmp_path) -> None:
    """The same training whether a document is packed with one text or with another."""
    from nsphere.train.data import Batch

    for number in range(12):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(tiny.TEXT[number * 211 :][:300])
    data = DataConfig(data=str(tmp_path / "texts"), document_mask=True)
    result = train("ngpt", tiny.config(), tiny.options(), data, tmp_path / "run")
    corpus = load_corpus(data)
    trainer = Trainer("ngpt", resolve("ngpt", tiny.config()), tiny.options(), corpus)
    batch = next(b for b in map(trainer.batches, range(100)) if b.document_ids.amax() > 0)
    row = int(batch.document_ids.amax(1).argmax())
    first = batch.document_ids[row] == 0
    changed = torch.where(first, (batch.inputs[row] + 1) % 256, batch.inputs[row])[None]
    ids = batch.document_ids[row][None]
    with torch.no_grad():
        a, b = (trainer.model(x, document_ids=ids)[0] for x in (batch.inputs[row][None], changed))
        together = trainer.model(batch.inputs[row][None])[0]
    assert torch.equal(a[~first], b[~first])  # the first document can't be seen from the second
    assert not torch.allclose(a[~first], together[~first])
    assert isinstance(batch, Batch) and result.steps == 6


def test_eager_means_eager(data) -> None:
    """QK-norm's own op does not compile behind --no-compile."""
    trainer = Trainer("ngpt", resolve("ngpt", tiny.config()), tiny.options(), load_corpus(data))
    assert {block.attn.qk_norm.backend for block in trainer.model.blocks} == {"reference"}


def test_settings_of_the_process_come_back() -> None:
    before = torch.get_num_threads(), torch._dynamo.config.recompile_limit
    with process_settings(tiny.options(threads=before[0] + 1), torch.device("cpu")):
        assert torch.get_num_threads() == before[0] + 1
        assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert (torch.get_num_threads(), torch._dynamo.config.recompile_limit) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_compiled_runs_are_bit_identical_and_resume(tmp_path, data, monkeypatch) -> None:
    config = tiny.config(dtype="bfloat16", steps=20)
    options = tiny.options(device="cuda", compile=True)
    for name in ("one", "two"):
        train("ngpt", config, options, data, tmp_path / name)
    step = Trainer.step

    def dying_step(self):
        if self.num_steps == 7:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train("ngpt", config, options, data, tmp_path / "cut")
    train("ngpt", config, options, data, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "cut")
