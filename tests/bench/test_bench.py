"""The benchmarks run, and what they say has the parts that it should; nGPT keeps no more than GPT."""

import json
from pathlib import Path

import pytest
import torch

from nsphere.bench import harness, memory, step
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
    flags = ["--sizes", "demo", "--modes", "eager", "--rounds", "2", "--dtype", "bfloat16"]
    assert main(["bench", "step", *flags, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {"cpu", "torch", "git_commit", "num_threads", "date"} <= set(record)
    found = record["results"]["demo eager"]
    assert set(found) == set(step.ARMS)
    assert found["gpt"]["over_gpt"] == [1, 1, 1] and found["ngpt"]["rounds"] == 2
    for arm in found.values():
        assert sum(arm["ms"][part][1] for part in step.PARTS) == pytest.approx(arm["ms"]["total"][1], rel=0.5)
    assert {arm["dtype"] for arm in found.values()} == {"bfloat16 autocast"}
    printed = capsys.readouterr().out
    assert "over gpt-qknorm" in printed and "bfloat16 autocast" in printed


@pytest.mark.parametrize(("rounds", "seconds", "run"), [(5, None, 5), (5, 0.0, 3), (2, 0.0, 2), (5, 60.0, 5)])
def test_no_round_begins_late(rounds, seconds, run):
    values = harness.interleave({"a": lambda: {"ms": 1.0}, "b": lambda: {"ms": 2.0}}, rounds, seconds)
    assert values == {"a": {"ms": [1.0] * run}, "b": {"ms": [2.0] * run}}


@pytest.mark.parametrize(
    "flags, keys",
    [
        (["optimizer", "--size", "demo", "--rounds", "2"], {"AdamW", "AdamW, then projection", "SphereAdamW"}),
        (
            ["decode", "--size", "demo", "--rounds", "1", "--new-tokens", "3", "--eager"],
            {"ngpt"},
        ),
        (["memory", "--size", "demo", "--eager"], {"gpt", "gpt-qknorm", "ngpt"}),
    ],
)
def test_the_others(flags, keys, tmp_path):
    path = tmp_path / "out.json"
    with_products = flags[0] != "optimizer"
    flags = [*flags, *(["--dtype", "float32"] if with_products else [])]
    assert main(["bench", *flags, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert keys <= set(results)
    assert all(results[key]["dtype"] == "float32" for key in keys if with_products)


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

    def absent(*_, **__):
        raise ImportError("no module of that name")

    def broken(*_, **__):
        raise RuntimeError("does not run")

    monkeypatch.setattr(peers, "ngpt_pytorch", absent)
    monkeypatch.setattr(peers, "olmo_core", broken)
    trainers = make_trainers(TINY, ("ngpt",), compiled=False, dtype="float32")
    monkeypatch.setattr(peers, "make_trainers", lambda *_: trainers)
    path = tmp_path / "p.json"
    assert main(["bench", "peers", "--rounds", "1", "--dtype", "float32", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "(fp32): not installed (no module of that name); pip install nGPT-pytorch" in printed
    assert "ai2-olmo-core, eager (all in fp32): RuntimeError: does not run" in printed
    results = json.loads(path.read_text())["results"]
    assert results["dtype"] == "float32" and len(results["left_out"]) == 5
    assert results[peers.PRODUCTS]["over_products"] == [1, 1, 1] and results["nsphere"]["nsphere_is_faster_by"][1] == 1


def test_the_products_of_a_step_are_those_that_the_model_makes():
    """Counted where torch makes them: a step's products, attention's apart, and what stands for them."""
    from torch.utils.flop_counter import FlopCounterMode

    from nsphere.bench import peers

    trainer = make_trainers(TINY, ("ngpt",), compiled=False, dtype="float32")["ngpt"]
    counted = []
    for run in (trainer.step, peers.products(Size(trainer.config, TINY.vocab_size), "cpu", torch.float32)):
        with FlopCounterMode(display=False) as counter:
            run()
        by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
        counted.append(by_op["aten.mm"])
    assert counted[0] == counted[1]


def test_bad_input_is_one_line_and_2(capsys, tmp_path):
    assert main(["bench", "stepp"]) == 2
    assert "did you mean step?" in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert main(["bench", "step", "--rounds", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert main(["bench", "step", "--seconds", "0"]) == 2
    assert capsys.readouterr().err == "nsphere bench: --seconds is 0.0; give more than 0, or leave it out\n"
    assert main(["bench", "decode", "--size", "demo", "--new-tokens", "0"]) == 2
    assert capsys.readouterr().err == "nsphere bench: new_tokens must be at least 1, got 0\n"
    for path, why in ((tmp_path, "is a folder"), (Path(__file__) / "x.json", "is a file")):
        assert main(["bench", "step", "--json", str(path)]) == 2
        assert why in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of which errors would be made inside it
@pytest.mark.parametrize("dtype, rounding", [("bfloat16", 2e-3), ("float32", 2e-5)])
def test_a_compiled_block_of_ngpt_keeps_no_more_than_gpts_and_learns_what_the_eager_one_does(dtype, rounding):
    """The sum of what is kept; and the losses of 20 steps are those of the eager run, within rounding."""
    torch._dynamo.reset()
    compiled = make_trainers(TINY, ("gpt", "ngpt"), compiled=True, dtype=dtype)
    kept = {arm: sum(memory.kept_by_a_block(trainer).values()) for arm, trainer in compiled.items()}
    num_tokens, d, num_heads = 2 * 32, 32, 2
    # nGPT's two numbers more for a token, and one for each head of its q and its k, are made up for in bf16, where
    # GPT's h is kept in fp32
    roots = 4 * num_tokens * (2 + 2 * num_heads)
    assert kept["ngpt"] <= kept["gpt"] + (roots if dtype == "float32" else 0)
    assert kept["ngpt"] >= 20 * num_tokens * d  # it has been counted at all
    eager = make_trainers(TINY, ("ngpt",), compiled=False, dtype=dtype)["ngpt"]
    for _ in range(20):
        assert compiled["ngpt"].step().loss == pytest.approx(eager.step().loss, rel=rounding)
    assert timed_step(compiled["ngpt"])["total"] > 0
