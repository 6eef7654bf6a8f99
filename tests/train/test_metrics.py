import json
import sys
import types

import pytest
import tiny
import torch

from nsphere.gpt import GPT, GPTConfig
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.train import metrics as metrics_module
from nsphere.train.files import read_jsonl
from nsphere.train.loop import train
from nsphere.train.metrics import Metrics, attention_logit_bound, check_tracker, flops_per_token, peak_flops

SHAPE = {"vocab_size": 64, "context": 16, "d_model": 32, "num_layers": 2, "num_heads": 2}


def counted_flops(model):
    """Of one token's forward and backward pass, as torch counts them, product by product."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    return counter.get_total_flops() / 16


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tied):
    model = GPT(GPTConfig(**SHAPE, tied=tied))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    # torch counts products of matrices only; ours counts every weight, and vectors are few
    assert flops_per_token(model) - 6 * vectors == pytest.approx(counted_flops(model), rel=0.1)


def test_a_formula_written_out():
    model = NGPT(NGPTConfig(**SHAPE))
    weights = sum(p.numel() for p in model.parameters()) - 64 * 32
    assert flops_per_token(model) == 6 * weights + 12 * 2 * 2 * 16 * 16


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA Something 1", None),
    ],
)
def test_peaks(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), True) == peak
    assert peak_flops(torch.device("cuda"), False) is None
    assert peak_flops(torch.device("cpu"), True) is None


def test_logit_bounds():
    assert attention_logit_bound(GPT(GPTConfig(**SHAPE))) is None
    model = NGPT(NGPTConfig(**SHAPE))
    with torch.no_grad():
        model.blocks[1].attn.qk_norm.multiplier.s_qk.stored[3] *= 2
    assert attention_logit_bound(model) == pytest.approx(4 * 16**0.5)  # √D · s_qk²


class Tracker(types.ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.told = []

    def init(self, **settings):
        self.told.append(("init", settings))

    def log(self, numbers, step):
        self.told.append((step, numbers))

    def finish(self):
        self.told.append("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_what_the_file_gets(tmp_path, monkeypatch, name):
    tracker = Tracker(name)
    tracker.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, tracker)
    data = tiny.text_file(tmp_path)
    train("ngpt", tiny.config(), tiny.options(track=name, peak_flops=1e12), data, tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    (_, settings), *points, last = tracker.told
    assert (settings["project"], settings["name"], settings["resume"], last) == ("nsphere", "run", "allow", "finish")
    assert settings["config"]["arm"] == "ngpt"
    assert points == [
        (r["step"], {f"{r['kind']}/{k}": v for k, v in r.items() if k not in ("step", "kind")}) for r in records
    ]
    steps = [r for r in records if r["kind"] == "train"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    flops = flops_per_token(NGPT(NGPTConfig(**config)))
    assert all(r["mfu"] == pytest.approx(r["tokens_per_second"] * flops / 1e12) for r in steps)
    evals = [r for r in records if r["kind"] == "eval"]
    assert all(r["attention_logit_bound"] > 0 for r in steps)
    assert all(r["max_norm_deviation"] < 1e-6 for r in evals)


def test_a_tracker_that_is_not_installed_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--track wandb needs the package wandb; pip install wandb"):
        check_tracker("wandb")
    with pytest.raises(ValueError, match="needs the package trackio"):
        train("ngpt", tiny.config(), tiny.options(track="trackio"), tiny.text_file(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_forgets_what_a_start_that_saved_nothing_wrote(tmp_path):
    """A run that begins again from scratch, and one that goes on after step 2: each step is there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def seen(step, steps, loss):
        with Metrics(tmp_path, step, writes=True, tensorboard=True, track=None, config={}) as metrics:
            for at in steps:
                metrics.write(at, "train", loss=loss)
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [(e.step, e.value) for e in events.Scalars("train/loss")]

    assert seen(None, [0, 1, 2, 3], 1.0) == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)]
    assert seen(None, [0, 1, 2, 3], 2.0) == [(0, 2.0), (1, 2.0), (2, 2.0), (3, 2.0)]
    assert seen(2, [3, 4], 3.0) == [(0, 2.0), (1, 2.0), (2, 2.0), (3, 3.0), (4, 3.0)]


def test_other_ranks_write_nothing(tmp_path):
    with Metrics(tmp_path, None, writes=False, tensorboard=True, track="wandb", config={}) as metrics:
        metrics.write(1, "train", loss=1.0)
        metrics.sync()
    assert not list(tmp_path.iterdir())
