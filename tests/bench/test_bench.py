"""The benchmarks run, and what they say has the parts that it should; nGPT keeps no more than GPT."""

import json

import pytest
import torch

from nsphere.bench import memory, step
from nsphere.bench.step import SIZES, Size, make_trainers, timed_step
from nsphere.cli import main
from nsphere.ops.backend import cpp_compiler
from nsphere.train.config import TrainConfig

TINY = Size(TrainConfig(preset="demo", d_model=32, num_layers=1, num_heads=2, context=32, batch_size=2), 64)
needs_compiler = pytest.mark.skipif(not cpp_compiler().available, reason=cpp_compiler().reason)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "demo", TINY)


def test_step(tmp_path, capsys):
    path = tmp_path / "step.json"
    assert main(["bench", "step", "--sizes", "demo", "--modes", "eager", "--rounds", "2", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {"cpu", "torch", "git_commit", "num_threads", "date"} <= set(record)
    found = record["results"]["demo eager"]
    assert set(found) == set(step.ARMS)
    assert found["gpt"]["over_gpt"] == [1, 1, 1]
    for arm in found.values():
        assert sum(arm["ms"][part][1] for part in step.PARTS) == pytest.approx(arm["ms"]["total"][1], rel=0.5)
    assert "over gpt-qknorm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, keys",
    [
        (["optimizer", "--size", "demo", "--rounds", "2"], {"AdamW", "AdamW, then projection", "SphereAdamW"}),
        (
            ["decode", "--size", "demo", "--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "3", "--eager"],
            {"ngpt"},
        ),
        (["memory", "--size", "demo", "--eager"], {"gpt", "gpt-qknorm", "ngpt"}),
    ],
)
def test_the_others(flags, keys, tmp_path):
    path = tmp_path / "out.json"
    assert main(["bench", *flags, "--json", str(path)]) == 0
    assert keys <= set(json.loads(path.read_text())["results"])


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_ops(tmp_path, capsys):
    path = tmp_path / "ops.json"
    tiny = ["--ops", "normalized_update", "--tokens", "16", "--widths", "32", "--rounds", "3"]
    assert main(["bench", "ops", *tiny, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    found = results["normalized_update, h float32, d 32, 16 tokens"]
    assert found["least_bytes"] == {"forward": 16 * 32 * (4 + 4 + 2), "backward": 16 * 32 * (3 * 4 + 2 * 2)}
    assert found["torch.compile of the formula"]["forward"]["over_compiled_formula"] == [1, 1, 1]
    assert found["copy"]["backward"]["share_of_copy_rate"] == [1, 1, 1]
    assert found["nsphere, compiled"]["backward"]["ms"][1] > 0
    assert "of copy" in capsys.readouterr().out


def test_peers_that_are_not_installed_are_said_to_be(tmp_path, capsys, monkeypatch):
    from nsphere.bench import peers

    def absent(*_):
        raise ImportError("no module of that name")

    monkeypatch.setattr(peers, "PEERS", {"some-peer": absent})
    trainers = make_trainers(TINY, ("ngpt",), compiled=False)
    monkeypatch.setattr(peers, "make_trainers", lambda *_: trainers)
    assert main(["bench", "peers", "--rounds", "1", "--json", str(tmp_path / "p.json")]) == 0
    assert "some-peer, eager: not installed (no module of that name); pip install some-peer" in capsys.readouterr().out


def test_bad_input_is_one_line_and_2(capsys):
    assert main(["bench", "stepp"]) == 2
    assert "did you mean step?" in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert main(["bench", "step", "--rounds", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of which errors would be made inside it
def test_a_compiled_block_of_ngpt_keeps_what_gpts_does_and_learns_what_the_eager_one_does(monkeypatch):
    """The sum of what is kept; and the losses of a run are those of the run that is not compiled, within rounding."""
    arms = ("gpt", "ngpt")
    torch._dynamo.reset()
    compiled = make_trainers(TINY, arms, compiled=True)
    kept = {arm: sum(memory.kept_by_a_block(trainer).values()) for arm, trainer in compiled.items()}
    num_tokens, d, num_heads = 2 * 32, 32, 2
    # h in bf16 instead of fp32 makes up for the outputs of both sub-blocks; what is left is norms: two numbers more
    # for a token, and one for each head of its q and its k
    assert kept["ngpt"] <= kept["gpt"] + 4 * num_tokens * (2 + 2 * num_heads)
    assert kept["ngpt"] >= 20 * num_tokens * d  # it has been counted at all
    eager = make_trainers(TINY, ("ngpt",), compiled=False)["ngpt"]
    for _ in range(50):
        ours, theirs = compiled["ngpt"].step().loss, eager.step().loss
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert timed_step(compiled["ngpt"])["total"] > 0
