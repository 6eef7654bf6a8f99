"""Checkpoints and failures of jobs of several ranks; run by test_rank_faults.py.

Ranks are forked, which needs a process in which nothing was differentiated before. So nothing here computes outside of
them.
"""

import dataclasses
import json
import os
import resource
import shutil
import signal
import time

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import Job
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nsphere.cli import explain
from nsphere.compare import CompareConfig, compare
from nsphere.train.checkpoint import CheckpointSaver, load_checkpoint
from nsphere.train.config import resolve
from nsphere.train.data import load_corpus
from nsphere.train.distributed import Layout, start
from nsphere.train.files import RunLock, read_jsonl
from nsphere.train.loop import train
from nsphere.train.ranks import Ranks
from nsphere.train.timing import time_steps
from nsphere.train.trainer import Trainer

STEPS = 6


def run(size, out, *, data, layout=None, arm="ngpt", before=lambda rank: None, config=None, **options):
    """Start `nsphere train` on some ranks; the job."""
    wanted = tiny.config(steps=STEPS, **(config or {}))
    how = tiny.options(layout=layout or Layout(timeout=500), micro_batch_size=1, **options)
    return job(size, out, before, lambda: train(arm, wanted, how, data, out, resume=True))


def job(size, out, before, command):
    """A command of nsphere on some ranks, with its exit codes; what each says begins with its number."""

    def work(rank):
        before(rank)
        try:
            command()
        except Exception as error:
            known = explain(error)
            if known is None:
                raise
            print(f"[{rank}] {known[0]}", flush=True)
            return known[1]
        return 0

    return Job(size, work, out.with_suffix(".log"))


def finish(job):
    assert set(job.wait()) == {0}, job.output()


def failing(rank, do, at=2, who=1):
    """Let a rank do something before the step after `at`."""
    step = Trainer.step

    def patched(self):
        if rank == who and self.num_steps == at:
            do(self)
        return step(self)

    Trainer.step = patched


def curve(folder):
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_jsonl(folder / "metrics.jsonl")]


def cut_short(run_folder, copy, step):
    """The run as it was when it had just saved that step."""
    shutil.copytree(run_folder, copy)
    (copy / "result.json").unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run on 4 ranks, with all its checkpoints, and its data."""
    folder = tmp_path_factory.mktemp("four")
    data = tiny.text_file(folder)
    finish(run(4, folder / "run", data=data, checkpoint_every=3, keep_checkpoints=5))
    return folder / "run", data


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, Layout()), (2, Layout(timeout=500)), (2, Layout(tp=2, timeout=500)), (4, Layout(timeout=500))],
    ids=["1", "2", "tp 2", "4"],
)
def test_saved_on_four_ranks_and_resumed_on(tmp_path, four, size, layout):
    """The same losses to fp32's rounding, the sphere to 1e-6; on the same layout the same bits."""
    whole, data = four
    resumed = cut_short(whole, tmp_path / "resumed", 3)
    finish(run(size, resumed, data=data, layout=layout, checkpoint_every=3))
    expected, found = curve(whole), curve(resumed)
    if size == 4:
        assert found == expected
        a, b = (load_checkpoint(folder).model_tensors for folder in (whole, resumed))
        assert all(torch.equal(a[name], b[name]) for name in a)
        a, b = (load_checkpoint(folder).optimizer_tensors for folder in (whole, resumed))
        assert all(torch.equal(a[name], b[name]) for name in a)
        return
    assert [(r["step"], r["kind"]) for r in found] == [(r["step"], r["kind"]) for r in expected]
    for a, b in zip(expected, found, strict=True):
        for key in {"loss", "val_loss", "grad_norm"} & a.keys():
            # three steps of a tiny model: other orders of summation, and Adam's first steps near sign(g) · lr
            assert a[key] == pytest.approx(b[key], rel=2e-5), (a["step"], key)
    assert max(r["max_norm_deviation"] for r in found if r["kind"] == "eval") <= 1e-6


def test_what_several_ranks_saved_is_one_checkpoint(four):
    """A file a rank; every number of the model in them once."""
    whole, _ = four
    folder = whole / "checkpoints" / f"step-{STEPS:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for part in ("model", "optimizer"):
        assert [name for name in files if name.startswith(part)] == [
            f"{part}/shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2, 3, 4)
        ]
    checkpoint = load_checkpoint(whole)
    numbers = sum(t.numel() for t in checkpoint.model_tensors.values())
    stored = sum((folder / name).stat().st_size for name in files if name.startswith("model"))
    assert 4 * numbers <= stored <= 4 * numbers + 4 * 8000  # fp32, and the headers


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "bit-flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_every_rank_in_turn(tmp_path, four, damage):
    """Detected, named, the older one used; and where there is none, a clear stop."""
    whole, _ = four
    broken = cut_short(whole, tmp_path / "broken", STEPS)
    newest = broken / "checkpoints" / f"step-{STEPS:08d}"
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert len(files) == 10
    for path in files:
        name, sound = path.relative_to(newest), path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(ValueError, match=f"{newest.name} can't be used: {name} "):
            load_checkpoint(newest)
        assert load_checkpoint(broken).step == 3
        older = newest.with_name("step-00000003")
        older.rename(tmp_path / "away")
        with pytest.raises(ValueError, match=f"no checkpoint in .* can be used: {newest.name}: {name} "):
            load_checkpoint(broken)
        (tmp_path / "away").rename(older)
        path.write_bytes(sound)
    assert load_checkpoint(broken).step == STEPS


def test_a_broken_one_is_passed_over_by_all_ranks(tmp_path, four):
    whole, data = four
    broken = cut_short(whole, tmp_path / "broken", STEPS)
    file = broken / "checkpoints" / f"step-{STEPS:08d}" / "model" / "shard-00002-model-00001-of-00001.safetensors"
    DAMAGES["bit-flipped"](file)
    finish(job := run(2, broken, data=data, checkpoint_every=3))
    assert "resumed at step 3" in job.output()
    assert job.output().count("shard-00002-model-00001-of-00001.safetensors is damaged") == 1


class Odd(nn.Module):
    """Sizes that four ranks can't share evenly, one with fewer rows than ranks, a 0-d buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1, bias=False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)).tanh())


def test_uneven_shards_and_any_mesh(tmp_path):
    """Saved by FSDP on 4 ranks, in the background, while training goes on; read by HSDP 2 × 2 and by one process."""

    def make(mesh):
        model = Odd()
        for layer in (model.a, model.b, model.c):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model, optimizer):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole(model, optimizer):
        full = {n: (t.full_tensor() if isinstance(t, DTensor) else t) for n, t in model.state_dict().items()}
        for name, p in model.named_parameters():
            for key, t in optimizer.state[p].items():
                full[f"{name}/{key}"] = t.full_tensor() if isinstance(t, DTensor) else t
        return {name: tensor.detach().clone() for name, tensor in full.items()}

    def work(rank):
        dist.init_process_group("gloo")
        ranks = Ranks(dist.new_group(backend="gloo"))
        model, optimizer = make(init_device_mesh("cpu", (4,)))
        step(model, optimizer)
        before = whole(model, optimizer)
        with CheckpointSaver(tmp_path / "run", ranks=ranks) as saver:
            saver.save(step=1, model=model, optimizer=optimizer, state={})
            for _ in range(3):
                step(model, optimizer)
        for mesh in (init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))):
            other, optimizer = make(mesh)
            step(other, optimizer)
            step(other, optimizer)
            load_checkpoint(tmp_path / "run", ranks=ranks).restore(other, optimizer)
            for name, tensor in whole(other, optimizer).items():
                assert torch.equal(tensor, before[name]), name
        if rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in before.items()}, tmp_path / "before.safetensors")
        dist.destroy_process_group()

    finish(Job(4, work, tmp_path / "log"))
    saved = load_file(tmp_path / "before.safetensors")
    alone = Odd()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1)
    load_checkpoint(tmp_path / "run").restore(alone, optimizer)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert optimizer.state[alone.c.weight]["step"].item() == 1
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    data = tiny.text_file(tmp_path)

    def signalled(rank):
        failing(rank, lambda _: os.kill(os.getpid(), signal.SIGUSR1))

    out = tmp_path / "run"
    job = run(2, out, data=data, before=signalled, checkpoint_every=100)
    assert job.wait() == [128 + signal.SIGUSR1] * 2, job.output()
    assert "[0] stopped at step 3, saved in" in job.output() and "[1] stopped at step 3" in job.output()
    finish(run(2, out, data=data))
    finish(run(2, tmp_path / "whole", data=data))
    assert curve(out) == curve(tmp_path / "whole")


def hang(_):
    time.sleep(1000)


def burn(_):
    raise RuntimeError("the device is on fire")


def lose_the_disk(_):
    raise OSError(5, "Input/output error")


def die_at_the_start(rank):
    if rank == 1:
        Trainer.__init__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def hurt(tmp_path_factory):
    """Jobs whose second rank ends or hangs, side by side: what they do is wait. Which one, and each one's folder."""
    folder = tmp_path_factory.mktemp("hurt")
    data, began = tiny.text_file(folder), time.monotonic()
    hanging = run(2, folder / "hangs", data=data, layout=Layout(timeout=8), before=lambda rank: failing(rank, hang))
    # the others come when it has begun to hang: what slows its steps would look like hanging
    metrics = folder / "hangs" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 2' in metrics.read_text()):
        assert not hanging.poll() and time.monotonic() - began < 300, hanging.output()
        time.sleep(0.01)
    return {
        "hangs": hanging,
        "burns": run(2, folder / "burns", data=data, before=lambda rank: failing(rank, burn)),
        "loses its disk": run(2, folder / "disk", data=data, before=lambda rank: failing(rank, lose_the_disk)),
        "dies": run(2, folder / "dies", data=data, before=die_at_the_start),
    }, folder


def test_a_rank_that_fails_is_named_with_its_reason(hurt):
    job = hurt[0]["burns"]
    assert job.wait() == [75, 1], job.output()
    assert "[0] rank 1 stopped in step 3: RuntimeError: the device is on fire; the job ends" in job.output()


def test_a_rank_whose_disk_fails_is_named_with_its_reason(hurt):
    job = hurt[0]["loses its disk"]
    assert job.wait() == [75, 1], job.output()
    assert "[0] rank 1 stopped in step 3: OSError: [Errno 5] Input/output error; the job ends" in job.output()


def test_a_rank_that_dies_before_the_run_begins_is_named(hurt):
    jobs, folder = hurt
    job = jobs["dies"]
    assert job.wait() == [75, -9], job.output()
    assert "[0] rank 1 died or hangs in the preparation; the job ends in the preparation" in job.output()
    assert not (folder / "dies").exists()


def test_a_rank_that_hangs_ends_the_job_and_is_named(hurt):
    began, job = time.monotonic(), hurt[0]["hangs"]
    assert job.wait() == [75, 75], job.output()
    assert "[0] rank 1 died or hangs in step 3; the job ends in step 3; start it again with --resume" in job.output()
    assert "rank 1 hangs in step 3, for 18 s" in job.output()  # by its own watch, where nobody else can end it
    assert time.monotonic() - began < 300


def test_a_rank_that_never_comes_ends_the_job(tmp_path):
    def away(rank):
        if rank == 1:
            os._exit(0)

    job = run(2, tmp_path / "run", data=tiny.text_file(tmp_path), layout=Layout(timeout=3), before=away)
    assert job.wait() == [75, 0], job.output()
    assert "[0] a rank of 2 did not come within 3 s; start the job again" in job.output()


def test_ranks_that_were_started_differently_are_refused(tmp_path):
    """They would wait for each other in vain, or learn from different data."""
    data, out = tiny.text_file(tmp_path), tmp_path / "run"
    (tmp_path / "other.txt").write_text(tiny.TEXT[::-1])

    def start(config, options, data):
        return lambda: train("gpt", tiny.config(**config), tiny.options(micro_batch_size=1, **options), data, out)

    other = dataclasses.replace(data, data=str(tmp_path / "other.txt"))
    for settings, told in (
        (({"steps": 5}, {}, data), "train.steps is 5 there, 6 asked for"),
        (({}, {"checkpoint_every": 3}, data), "options.checkpoint_every is 3 there, 2 asked for"),
        (({"batch_size": 5}, {}, data), "train.batch_size is 5 there, 4 asked for"),
        (({}, {}, other), "data_sha256 is "),
    ):
        starts = [start({}, {}, data), start(*settings)]
        ranks = job(2, out, lambda _: None, lambda starts=starts: starts[int(os.environ["RANK"])]())
        assert ranks.wait() == [2, 2], ranks.output()
        assert ranks.output().count("rank 1 was started otherwise than rank 0: ") == 2
        assert told in ranks.output()
        assert not out.exists()
        ranks.log.unlink()


def poison(trainer):
    """The gradient of this rank alone is not finite: its loss is."""
    parameter = next(p for p in trainer.model.parameters() if p.dim() < 2)
    handle = parameter.register_hook(lambda grad: (handle.remove(), grad * float("nan"))[1])


@pytest.mark.parametrize("skip", [True, False])
def test_a_gradient_that_is_not_finite_on_one_rank(tmp_path, skip):
    out = tmp_path / "run"
    job = run(2, out, data=tiny.text_file(tmp_path), before=lambda rank: failing(rank, poison), skip_nonfinite=skip)
    if skip:
        finish(job)
        assert [r["step"] for r in curve(out) if r.get("skipped")] == [3]
        assert all(torch.isfinite(t).all() for t in load_checkpoint(out).model_tensors.values())
    else:
        assert job.wait() == [1, 1], job.output()
        assert "[0] the gradient norm of step 3 is nan; the last good checkpoint is" in job.output()


def test_a_disk_that_is_full_for_one_rank_stops_all_and_leaves_the_last_good_one(tmp_path):
    def little_room(rank):
        # a limit on the size of files stands for a disk that is full, on rank 1 alone
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            failing(rank, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))

    out = tmp_path / "run"
    job = run(
        2, out, data=tiny.text_file(tmp_path), before=little_room, checkpoint_every=2, background_checkpoints=False
    )
    assert job.wait() == [1, 1], job.output()
    assert "the checkpoint of step 4 could not be written" in job.output()
    assert "File too large (rank 1)" in job.output()
    assert f"the last good checkpoint is {out}/checkpoints/step-00000002" in job.output()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert load_checkpoint(out).step == 2


def test_two_jobs_in_one_folder(tmp_path):
    data, out = tiny.text_file(tmp_path), tmp_path / "run"
    with RunLock(out):
        job = run(2, out, data=data)
        assert job.wait() == [2, 2], job.output()
    assert "is in use by process" in job.output()
    assert not (out / "config.json").exists()


def test_metrics_of_many_ranks_are_those_of_one_writer(four):
    whole, _ = four
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [r["step"] for r in steps if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert all(r["attention_logit_bound"] > 0 for r in steps if r["kind"] == "train")


def test_a_comparison_of_two_ranks_is_that_of_one_process(tmp_path, monkeypatch):
    """The same losses to rounding, through a signal and a kill to the same bits; rank 0 alone writes the answer."""
    monkeypatch.setattr("nsphere.compare.lr_sweep.MAX_SWEEP_RUNS", 3)
    monkeypatch.setattr("nsphere.compare.comparison.write_report", lambda summary, path: path.write_text("a page"))
    data = tiny.text_file(tmp_path)
    what = CompareConfig(arms=("ngpt",), sweep_lr=True, timing_rounds=2, sample_tokens=4, prompt="line ")

    def comparison(size, name, before=lambda rank: None):
        out, config, options = tmp_path / name, tiny.config(steps=4), tiny.options(micro_batch_size=1)
        return job(size, out, before, lambda: compare(what, config, options, data, out, resume=True))

    finish(comparison(1, "one"))
    finish(whole := comparison(2, "two"))
    assert whole.output().count("timing 2 steps of each arm, by turns") == 1
    signalled = comparison(2, "cut", lambda rank: failing(rank, lambda _: os.kill(os.getpid(), 15)))
    assert signalled.wait() == [143, 143], signalled.output()
    killed = comparison(2, "cut", lambda rank: failing(rank, lambda _: os.kill(os.getpid(), 9)))
    assert killed.wait() == [75, -9], killed.output()  # in its second run: the first went on after step 3
    assert "rank 1 died or hangs in step 3; the job ends in step 3" in killed.output()
    assert not (tmp_path / "cut" / "summary.json").exists()
    finish(comparison(2, "cut"))

    one, two, cut = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two", "cut"))
    for arm in what.arms:
        a, b, c = (summary["arms"][arm] for summary in (one, two, cut))
        assert (b["lr_sweep"], b["seeds"], b["sample"]) == (c["lr_sweep"], c["seeds"], c["sample"])
        assert a["lr_sweep"]["lr"] == b["lr_sweep"]["lr"] and a["best_lr"] == b["best_lr"]
        assert a["lr_sweep"]["val_loss"] == pytest.approx(b["lr_sweep"]["val_loss"], rel=2e-5)
        assert a["seeds"]["0"]["train_curve"]["loss"] == pytest.approx(b["seeds"]["0"]["train_curve"]["loss"], rel=2e-5)
        assert a["num_parameters"] == b["num_parameters"] and b["step_time_ms_median"] > 0
        assert (a["peak_memory_bytes"] is None) == (b["peak_memory_bytes"] is None)
    assert (tmp_path / "two" / "report.html").exists()


def test_two_arms_are_timed_by_turns_on_all_ranks(tmp_path):
    """The slowest rank's time counts, every rank gets the same, and each round begins with the next arm."""
    data = tiny.text_file(tmp_path)
    order = "gpt ngpt gpt ngpt | gpt ngpt | ngpt gpt | gpt ngpt | gpt ngpt".replace("| ", "").split()

    def work():
        turns, step = [], Trainer.step

        def counted(self):
            turns.append(self.arm)
            time.sleep(0.3 * (self.arm == "ngpt" and self.world.rank == 1))
            return step(self)

        Trainer.step = counted
        with start(Layout(timeout=500), "cpu") as world:
            corpus, options = load_corpus(data), tiny.options(micro_batch_size=1)
            trainers = {
                arm: Trainer(arm, resolve(arm, tiny.config()), options, corpus, world) for arm in ("gpt", "ngpt")
            }
            costs = time_steps(trainers, 3)
            assert world.all(lambda: costs) == [costs, costs]
            assert costs["ngpt"].step_time_ms_median > 300
        assert turns == order, turns

    finish(job(2, tmp_path / "timed", lambda _: None, work))
