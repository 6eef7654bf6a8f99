import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch

from nsphere.compare import CompareConfig, compare, comparison
from nsphere.compare.lr_sweep import Sweep, grid_lr
from nsphere.report.curves import headline_ratios
from nsphere.report.terminal import comparison_table
from nsphere.train.distributed import Layout, World
from nsphere.train.files import read_jsonl
from nsphere.train.run_folder import Result
from nsphere.train.signals import Interrupted
from nsphere.train.timing import StepCost
from nsphere.train.trainer import NonFinite, Trainer

WHAT = CompareConfig(arms=("gpt", "gpt-qknorm", "ngpt"), timing_rounds=3, sample_tokens=20, prompt="line ")
ASKED_FOR = {
    "final_val_loss",
    "final_val_loss_spread",
    "best_lr",
    "tokens",
    "steps",
    "step_time_ms_median",
    "tokens_per_second",
    "peak_memory_bytes",
    "num_parameters",
}


def run(tmp_path: Path, what: CompareConfig = WHAT, resume: bool = False, **changes) -> dict:
    data = tiny.text_file(tmp_path)
    return compare(what, tiny.config(**changes), tiny.options(), data, tmp_path / "out", resume=resume)


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Half the time of a comparison this small is drawing; other tests here have a page."""
    monkeypatch.setattr(comparison, "write_report", lambda summary, path: path.write_text("a page"))


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("compare")
    what = dataclasses.replace(WHAT, seeds=2, arm_lr=("ngpt=0.01",))
    return folder / "out", run(folder, what, steps=30, eval_every=5)


def test_the_summary_says_what_was_measured(two_seeds) -> None:
    out, summary = two_seeds
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name, arm in summary["arms"].items():
        assert arm.keys() >= ASKED_FOR
        finals = []
        for seed in ("0", "1"):
            folder = out / "arms" / name / f"lr-{arm['best_lr']:g}-seed-{seed}"
            evals = [r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "eval"]
            assert arm["seeds"][seed]["curve"]["val_loss"] == [r["val_loss"] for r in evals]
            finals.append(evals[-1]["val_loss"])
        assert arm["final_val_loss"] == pytest.approx(sum(finals) / 2)
        assert arm["final_val_loss_spread"] == pytest.approx(abs(finals[0] - finals[1]))
        assert arm["bits_per_byte"] == pytest.approx(arm["final_val_loss"] / math.log(2))
        assert arm["tokens_per_second"] == pytest.approx(64 / arm["step_time_ms_median"] * 1e3)
        assert arm["tokens"] == 30 * 64
        assert len(arm["sample"]) > 0 and arm["sample_prompt"] == "line "
        assert len(arm["inspection"]["layers"]) == 2
    assert summary["arms"]["ngpt"]["best_lr"] == 0.01
    gpts = {n: a["final_val_loss"] for n, a in summary["arms"].items() if a["architecture"] == "gpt"}
    assert summary["best_gpt_arm"] == min(gpts, key=gpts.__getitem__)
    assert 0 < summary["max_norm_deviation"] <= 1e-6
    expected = headline_ratios(summary["arms"], summary["best_gpt_arm"])
    assert {key: summary[key] for key in expected} == expected
    assert summary["environment"]["seeds"] == [0, 1]
    assert len(summary["environment"]["data_sha256"]) == 64


def test_the_table_and_the_page_tell_it(two_seeds) -> None:
    out, summary = two_seeds
    table = comparison_table(summary, out)
    for name, arm in summary["arms"].items():
        assert f"{arm['final_val_loss']:.4f}" in table and name in table
    assert str(out / "report.html") in table
    assert "<svg" in (out / "report.html").read_text()


def test_peak_memory_counts_the_state_of_the_arm(two_seeds) -> None:
    _, summary = two_seeds
    for arm in summary["arms"].values():
        if arm["peak_memory_bytes"] is None:
            pytest.skip("the kernel's high-water mark of memory can't be reset here")
        assert arm["peak_memory_bytes"] >= 12 * arm["num_parameters"]  # fp32 weights and two moments


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    step = Trainer.step
    whole = run(tmp_path)
    (tmp_path / "out").rename(tmp_path / "whole")

    def dying_step(self):
        if self.arm == "gpt-qknorm" and self.num_steps == 4:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not (tmp_path / "out" / "summary.json").exists()
    before = (tmp_path / "out/arms/gpt/lr-0.003-seed-0/result.json").stat().st_mtime_ns
    again = run(tmp_path, resume=True)
    assert (tmp_path / "out/arms/gpt/lr-0.003-seed-0/result.json").stat().st_mtime_ns == before
    for name in whole["arms"]:
        assert again["arms"][name]["seeds"] == whole["arms"][name]["seeds"]


def test_the_sweep_extends_the_grid_until_the_optimum_is_inside(tmp_path, monkeypatch) -> None:
    tried: list[float] = []

    def loss_at(arm, config, options, data, out, **_) -> Result:
        tried.append(config.lr)
        if config.lr > 0.1:
            raise NonFinite("the loss is nan")
        return Result(1 + (math.log10(config.lr) + 2) ** 2, None, 1, 64, 0, 1, 0.0, "")

    monkeypatch.setattr(comparison, "train", loss_at)
    one = comparison._Comparison(
        WHAT,
        {"gpt": tiny.config(lr=1e-3)},
        tiny.options(),
        tiny.text_file(tmp_path),
        None,
        tmp_path,
        {},
        World(Layout(), torch.device("cpu")),
    )
    sweep = one._sweep("gpt", 1e-3)
    assert sweep.best == 0.01 and sweep.best_inside
    assert sorted(tried) == [grid_lr(i) for i in range(-16, -8)]  # 0.00063 … 0.016: no run beyond what was needed
    assert len(tried) == len(set(tried))


def test_a_sweep_whose_best_lies_at_the_edge_says_so() -> None:
    assert not Sweep({1e-3: 1.0, 2e-3: 1.1}).best_inside
    assert Sweep({1e-3: 1.0, 2e-3: 0.9, 4e-3: math.inf}).best_inside
    assert Sweep({1e-3: 1.0, 2e-3: math.inf}).as_record()["val_loss"] == [1.0, None]


def test_a_real_sweep_trains_the_best_only_once(tmp_path) -> None:
    what = dataclasses.replace(WHAT, arms=("ngpt",), sweep_lr=True)
    summary = run(tmp_path, what, steps=4, eval_every=2)
    for name, arm in summary["arms"].items():
        rates = arm["lr_sweep"]["lr"]
        folders = {p.name for p in (tmp_path / "out/arms" / name).iterdir()}
        assert folders == {f"lr-{lr:g}-seed-0" for lr in rates}
        assert arm["best_lr"] == min(zip(arm["lr_sweep"]["val_loss"], rates, strict=True))[1]
        assert arm["lr_source"] == "swept here"


def test_variants_by_field_and_muon(tmp_path) -> None:
    what = dataclasses.replace(WHAT, arms=("gpt-qknorm-muon", "ngpt:s_z_init=1"))
    summary = run(tmp_path, what)
    assert list(summary["arms"]) == ["gpt-qknorm-muon", "ngpt:s_z_init=1"]
    assert (tmp_path / "out/arms/ngpt+s_z_init=1").is_dir()
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"arms": ("gpt", "nGPT")}, "unknown arm 'nGPT'; did you mean ngpt"),
        ({"arms": ("gpt", "gpt")}, "given twice"),
        ({"arms": ()}, "no arms given"),
        ({"arms": ("gpt", "gpt:qk_norm=foo")}, "foo"),
        ({"arms": ("gpt", "gpt:init_std=-1")}, "init_std must be a positive number"),
        ({"prompt": "x" * 16}, "the prompt has 16 tokens, the context is 16; give a --prompt of 1 to 15"),
        ({"prompt": ""}, "the prompt has 0 tokens"),
        ({"arm_lr": ("ngpt=1", "ngpt=2")}, "gives ngpt two learning rates"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"arm_lr": ("ngpt=fast",)}, "'fast' is not a number"),
        ({"arm_lr": ("gtp=1",)}, "'gtp' is not among the arms"),
        ({"arm_lr": ("ngpt=-1",)}, "lr must be a positive number, got -1.0"),
    ],
)
def test_bad_comparisons_write_nothing(tmp_path, what, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, dataclasses.replace(WHAT, **what))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_another_comparison_is_not_written_over(tmp_path) -> None:
    what = dataclasses.replace(WHAT, arms=("gpt",))
    run(tmp_path, what)
    with pytest.raises(ValueError, match="exists; give --resume"):
        run(tmp_path, what)
    with pytest.raises(ValueError, match="holds another comparison: .*steps is 6 there, 7 asked for"):
        run(tmp_path, what, resume=True, steps=7)


@pytest.mark.usefixtures("no_pictures")
def test_a_signal_in_the_last_step_of_an_arm_stops_the_comparison(tmp_path, monkeypatch) -> None:
    step = Trainer.step

    def signalled_step(self):
        if self.arm == "gpt" and self.num_steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled_step)
        with pytest.raises(Interrupted, match="stopped after gpt, saved in .*--resume continues it") as stop:
            run(tmp_path)
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert (tmp_path / "out/arms/gpt/lr-0.003-seed-0/result.json").exists()
    assert not (tmp_path / "out/arms/gpt-qknorm").exists()
    assert list(run(tmp_path, resume=True)["arms"]) == list(WHAT.arms)


def test_what_diverged_is_null_and_said(tmp_path, monkeypatch) -> None:
    """A step skipped for its NaN: strict JSON, a count, and a comparison that goes through."""
    monkeypatch.setattr(Trainer, "step", tiny.poisoned_step(2, arm="ngpt"))
    data = tiny.text_file(tmp_path)
    what = dataclasses.replace(WHAT, arms=("gpt", "ngpt"), timing_rounds=1)
    monkeypatch.setattr(comparison, "time_steps", lambda trainers, rounds: fake_costs(trainers))
    summary = compare(what, tiny.config(), tiny.options(skip_nonfinite=True), data, tmp_path / "out")
    assert summary["arms"]["ngpt"]["skipped_steps"] == 1
    assert summary["arms"]["ngpt"]["seeds"]["0"]["train_curve"]["loss"][2] is None
    text = (tmp_path / "out" / "summary.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def fake_costs(trainers: dict) -> dict:
    return {name: StepCost(100.0, (90.0, 110.0), None) for name in trainers}


def test_matrices_normalised_in_forward_are_not_called_off_the_sphere(tmp_path) -> None:
    summary = run(tmp_path, dataclasses.replace(WHAT, arms=("gpt", "ngpt-forward")))
    assert summary["max_norm_deviation"] is None


def test_recipes_are_told(two_seeds) -> None:
    _, summary = two_seeds
    assert summary["arms"]["ngpt"]["model"]["s_z_init"] == 10.0
    assert summary["arms"]["gpt"]["recipe"]["weight_decay"] == 0.1
    assert summary["arms"]["ngpt"]["recipe"]["weight_decay"] == 0.0
    assert any("unlike the paper's" in limit for limit in summary["limits"])
    assert summary["arms"]["ngpt"]["lr_source"] == "given"


@pytest.mark.usefixtures("no_pictures")
def test_runs_from_different_machines_are_pointed_out(two_seeds, tmp_path) -> None:
    out, summary = two_seeds
    assert not any(limit.startswith("Machines") for limit in summary["limits"])
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out/arms/gpt/lr-0.003-seed-0/environment.json"
    starts = json.loads(path.read_text())
    path.write_text(json.dumps([starts[0] | {"cpu": "another"}]))
    shutil.copy(out.parent / "text.txt", tmp_path / "text.txt")
    what = dataclasses.replace(WHAT, seeds=2, arm_lr=("ngpt=0.01",))
    config = json.loads((out / "compare.json").read_text())
    (tmp_path / "out" / "compare.json").write_text(
        json.dumps(config | {"data": config["data"] | {"data": str(tmp_path / "text.txt")}})
    )
    for run_config in (tmp_path / "out" / "arms").glob("*/*/config.json"):
        saved = json.loads(run_config.read_text())
        run_config.write_text(json.dumps(saved | {"data": saved["data"] | {"data": str(tmp_path / "text.txt")}}))
    again = run(tmp_path, what, resume=True, steps=30, eval_every=5)
    assert any(limit.startswith("Machines") and "cpu another" in limit for limit in again["limits"])


def test_a_layout_of_more_ranks_than_there_are_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="tp 2 is 2 ranks and this is one process"):
        compare(WHAT, tiny.config(), tiny.options(layout=Layout(tp=2)), tiny.text_file(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
