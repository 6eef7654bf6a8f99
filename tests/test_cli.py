import json
import re
import subprocess
import sys

import pytest
import tiny

import nsphere
from nsphere import cli
from nsphere.train.loop import train

SHAPE = (
    *("--d-model", "32", "--num-layers", "1", "--num-heads", "2", "--context", "16"),
    *("--batch-size", "4", "--eval-batches", "2", "--steps", "4"),
)
QUICK = [*SHAPE, "--device", "cpu", "--no-compile", "--no-tensorboard"]


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def text(tmp_path) -> str:
    return tiny.text_file(tmp_path).data


def assert_refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, f"not one line: {err!r}"
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arm", "ngtp"], "unknown arm 'ngtp'; did you mean ngpt"),
        (["--preset", "1B!"], "unknown preset '1B!'; did you mean 1b"),
        (["--schedule", "cosin"], "'cosin'.*cosine.*linear.*wsd"),
        (["--optimizer", "sgd"], "'sgd'.*adamw.*muon"),
        (["--lr", "0"], "lr must be a positive number, got 0.0"),
        (["--lr", "-1e-3"], "lr must be a positive number, got -0.001"),
        (["--lr", "fast"], "--lr.*'fast'"),
        (["--stepz", "3"], "--stepz"),
        (["--d-model", "33"], "d_model 33 is not divisible by num_heads 2"),
        (["--head-dim", "7"], "head_dim 7 is odd"),
        (["--device", "cuda:99"], "cuda:99 is not on this machine|unknown device"),
        (["--data", "no/such/file"], "no/such/file"),
        (["--init-from", "no/such/run"], "no/such/run|starts every arm from scratch"),
        (["--context", "999999"], "context"),
        (["--tokenizer", "no/such/tokenizer.json"], "no/such/tokenizer.json"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(capsys, tmp_path, text, flags, message) -> None:
    out = tmp_path / "out"
    assert_refused(call(capsys, "train", "--out", out, "--data", text, *QUICK, *flags), message)
    assert not out.exists()
    if "--arm" not in flags:
        assert_refused(call(capsys, "compare", "--out", out, "--data", text, *QUICK, *flags), message)
        assert not out.exists()


def test_an_unknown_command_names_the_nearest(capsys) -> None:
    assert_refused(call(capsys, "tarin"), "unknown command 'tarin'; did you mean train")


def test_no_command_shows_what_there_is(capsys) -> None:
    code, out, _ = call(capsys)
    assert code == 2 and "compare" in out
    assert call(capsys, "--help")[0] == 0
    assert call(capsys, "--version")[1] == f"nsphere {nsphere.__version__}\n"
    for command in cli.COMMANDS:
        assert f"  {command} " in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_tells_its_flags(capsys, command) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: nsphere {command}" in capsys.readouterr().out


def test_train_generate_inspect(capsys, tmp_path, text) -> None:
    run = tmp_path / "run"
    assert call(capsys, "train", "--out", run, "--data", text, *QUICK)[0] == 0
    # finished: a second start with --resume says so, one without is refused
    assert call(capsys, "train", "--out", run, "--data", text, *QUICK, "--resume")[0] == 0
    assert_refused(call(capsys, "train", "--out", run, "--data", text, *QUICK), "give --resume")

    code, first, _ = call(capsys, "generate", run, "--prompt", "line ", "--max-new-tokens", 20, "--seed", 3)
    assert code == 0 and first.startswith("line ") and len(first.encode()) >= 20
    assert call(capsys, "generate", run, "--prompt", "line ", "--max-new-tokens", 20, "--seed", 3)[1] == first
    checkpoint = run / "checkpoints" / "step-00000004"
    assert call(capsys, "generate", checkpoint, "--prompt", "line ", "--max-new-tokens", 20, "--seed", 3)[1] == first
    assert_refused(call(capsys, "generate", run, "--prompt", ""), "the prompt is empty")
    assert_refused(call(capsys, "generate", run, "--prompt", "x" * 16), "has 16 tokens, the model's context is 16")
    assert_refused(call(capsys, "generate", run, "--temperature", "-1"), "temperature must be a number from 0 up")
    assert_refused(call(capsys, "generate", tmp_path), "is not a run folder")

    code, table, _ = call(capsys, "inspect", run)
    assert code == 0 and "cond W_q" in table and "mean eigen_lr_mlp" in table
    assert "<svg" in (run / "inspection.html").read_text()


def test_broken_checkpoints_are_named(capsys, tmp_path, text) -> None:
    run = tmp_path / "run"
    train("gpt", tiny.config(steps=4), tiny.options(), tiny.text_file(tmp_path), run)
    capsys.readouterr()
    newest = run / "checkpoints" / "step-00000004"
    whole = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(whole[:-7])
    assert_refused(call(capsys, "generate", newest), "step-00000004.*model.safetensors")
    (newest / "model.safetensors").write_bytes(whole)

    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"schema_version": 99}))
    assert_refused(call(capsys, "generate", run), "schema version 99.*install a newer nsphere")
    (run / "config.json").write_text(json.dumps(config | {"architecture": "ngpt"}))
    assert_refused(call(capsys, "generate", run), "holds the architecture 'gpt', and 'ngpt' was asked for")


def test_compare_prints_the_table(capsys, tmp_path, text) -> None:
    flags = [*QUICK, "--arms", "gpt", "ngpt", "--timing-rounds", "2", "--sample-tokens", "10", "--prompt", "line "]
    code, out, err = call(capsys, "compare", "--out", tmp_path / "c", "--data", text, *flags)
    assert code == 0, err
    assert "val loss" in out and "a sample of ngpt" in out and "report.html" in out
    assert_refused(call(capsys, "generate", tmp_path / "c"), "holds a comparison; give one of its runs: .*arms/gpt")
    assert_refused(call(capsys, "train", "--out", tmp_path / "c", "--data", text, *QUICK), "holds a comparison|another")


def test_info_says_what_this_machine_can_do(capsys) -> None:
    code, out, _ = call(capsys, "info")
    assert code == 0
    for line in ("nsphere", "torch", "cpu dtype", "cpu model"):
        assert line in out


def test_no_compiler_means_eager_and_one_line_saying_so(tmp_path, text) -> None:
    """In a fresh process whose CXX is no compiler."""
    flags = [*SHAPE, "--device", "cpu", "--no-tensorboard", "--data", text, "--out", str(tmp_path / "run")]
    env = {"PATH": "/nowhere", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = "import sys; from nsphere.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", code, "train", *flags], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("eager: no C++ compiler found (g++, clang++, c++); install g++") == 1
    assert "Traceback" not in ran.stderr


def test_importing_the_library_does_not_import_the_trainer() -> None:
    code = """
import sys, nsphere
heavy = {"numpy", "tyro", "rich", "matplotlib", "tensorboard", "tokenizers", "safetensors", "transformers", "datasets"}
print(sorted(m for m in sys.modules if m.startswith("nsphere.train") or m in heavy - {"numpy"}))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
