import io
import json
import re
import subprocess
import sys

import pytest
import tiny
import torch

import nsphere
from nsphere import cli, norms
from nsphere.table import printable
from nsphere.train.arms import SHAPE_FIELDS
from nsphere.train.loop import train
from nsphere.train.saved import load_run

SHAPE = (
    *("--d-model", "32", "--num-layers", "1", "--num-heads", "2", "--context", "16"),
    *("--batch-size", "4", "--eval-sequences", "8", "--steps", "4"),
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


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws its boxes with other signs in each
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train", "missing: --out PATH The run folder"),
        ("import", "missing: SOURCE A .safetensors of .* RUN The run folder to make"),
        ("serve folder --port text", "--port takes a whole number, got 'text'"),
        ("generate run --temperature hot", "--temperature takes a number, got 'hot'"),
        ("info --bogus", "Unrecognized options: --bogus"),
        ("export run out --to gguf", "invalid choice 'gguf' for argument '--to'. choose hf, onnx, safetensors"),
    ],
)
def test_what_the_flag_parser_says_is_one_sentence(capsys, monkeypatch, words, said, encoding) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    name = words.split()[0]
    assert cli.main(words.split()) == 2
    assert re.fullmatch(f"nsphere {name}: {said}.*; nsphere {name} --help tells the flags\n", capsys.readouterr().err)


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
        (["--stepz", "3"], r"--stepz.*did you mean --steps"),
        (["--d-model", "33"], "d_model 33 is not divisible by num_heads 2"),
        (["--head-dim", "7"], "head_dim 7 is odd"),
        (["--device", "cuda:99"], "cuda:99 is not on this machine|unknown device"),
        (["--data", "no/such/file"], "no/such/file"),
        (["--init-from", "no/such/run"], "no/such/run|starts every arm from scratch"),
        (["--context", "999999"], "context"),
        (["--tokenizer", "no/such/tokenizer.json"], "no/such/tokenizer.json"),
        (["--micro-batch-size", "3"], "batch_size 4 is not a multiple of micro_batch_size 3"),
        (["--seed", "9" * 400], "seed must be from 0 to 2"),
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


def test_an_output_path_that_cannot_be(capsys, tmp_path, text) -> None:
    for command in ("train", "compare"):
        long = tmp_path / ("x" * 300)
        assert_refused(call(capsys, command, "--out", long, "--data", text, *QUICK), "can't be written")
        (tmp_path / "file").write_text("")
        inside = tmp_path / "file" / "run"
        assert_refused(call(capsys, command, "--out", inside, "--data", text, *QUICK), "is a file|can't be written")


def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(capsys, tmp_path, text, monkeypatch) -> None:
    flags = ["train", "--out", tmp_path / "run", "--data", text, *SHAPE, "--device", "cpu", "--no-tensorboard"]
    monkeypatch.setenv("NSPHERE_BACKEND", "triton")
    assert_refused(call(capsys, *flags), "'triton' was asked for and cannot run")
    monkeypatch.setenv("NSPHERE_BACKEND", "tritn")
    assert_refused(call(capsys, *flags), "unknown backend 'tritn'")
    assert not (tmp_path / "run").exists()


def test_bad_shapes_are_refused_before_the_data_is_read(capsys, tmp_path, monkeypatch) -> None:
    def never(*_, **__):
        raise AssertionError("the data was read")

    monkeypatch.setattr("nsphere.train.job.load_corpus", never)
    for command in ("train", "compare"):
        flags = ["--out", tmp_path / "out", *QUICK, "--d-model", "33"]
        assert_refused(call(capsys, command, *flags), "d_model 33 is not divisible")


def test_a_bug_is_not_taken_for_bad_input(capsys, tmp_path, text, monkeypatch) -> None:
    def bug(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr("nsphere.train.job.load_corpus", bug)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["train", "--out", str(tmp_path / "out"), "--data", text, *QUICK])


def test_memory_that_runs_out_is_one_line(capsys, tmp_path, text, monkeypatch) -> None:
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("nsphere.train.trainer.Trainer.step", no_memory)
    code, _, err = call(capsys, "train", "--out", tmp_path / "run", "--data", text, *QUICK)
    assert code == 1 and "give a smaller --micro-batch-size" in err.splitlines()[-1]


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
    several = call(capsys, "generate", run, "--prompt", "line ", "the ", "--max-new-tokens", 20, "--seed", 3)[1]
    assert several.startswith(first) and "\nthe " in several
    letter = next(c for c in first[5:] if c.isascii() and c.isalpha())
    stopped = call(capsys, "generate", run, "--prompt", "line ", "--seed", 3, "--stop", letter)[1]
    assert stopped == first[: first.index(letter, 5)] + "\n"
    assert call(capsys, "generate", run, "--prompt", "line ", "--cache", "int8", "--max-new-tokens", 20)[0] == 0
    assert_refused(call(capsys, "generate", run, "--cache", "int4"), "a cache of 'int4' is not supported; choose")
    assert_refused(call(capsys, "generate", run, "--stop", ""), "a stop string is empty")
    assert_refused(call(capsys, "generate", run, "--prompt", ""), "the prompt is empty")
    assert_refused(call(capsys, "generate", run, "--prompt", "x" * 16), "has 16 tokens, the model's context is 16")
    assert_refused(call(capsys, "generate", run, "--temperature", "-1"), "temperature must be a number from 0 up")
    assert_refused(call(capsys, "generate", tmp_path), "is not a run folder")

    assert_refused(call(capsys, "generate"), "missing: RUN A run folder")
    for command in ("generate", "eval", "inspect"):
        assert_refused(call(capsys, command, tmp_path / "none"), "none does not exist; give a run folder")
    for out, why in ((tmp_path, "it is a folder"), (tmp_path / "none" / "x.json", "there is no folder")):
        assert_refused(call(capsys, "eval", run, "--out", out), why)
    assert_refused(call(capsys, "eval", run, "--data", "hf:"), "data 'hf:' names no dataset")

    code, table, _ = call(capsys, "inspect", run)
    assert code == 0 and "cond W_q" in table and "mean eigen_lr_mlp" in table
    assert "<svg" in (run / "inspection.html").read_text()


def test_broken_checkpoints_are_named(capsys, tmp_path, text) -> None:
    run = tmp_path / "run"
    train("gpt", tiny.config(steps=4), tiny.options(), tiny.text_file(tmp_path), run)
    capsys.readouterr()
    newest = run / "checkpoints" / "step-00000004"
    (weights,) = (newest / "model").iterdir()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    assert_refused(call(capsys, "generate", newest), "step-00000004.*model/shard-00001.*safetensors")
    weights.write_bytes(whole)

    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"schema_version": 99}))
    assert_refused(call(capsys, "generate", run), "schema version 99.*install a newer nsphere")
    other = {"architecture": "ngpt", "model": {k: v for k, v in config["model"].items() if k in SHAPE_FIELDS}}
    (run / "config.json").write_text(json.dumps(config | other))
    assert_refused(call(capsys, "generate", run), "holds the architecture 'gpt', and 'ngpt' was asked for")
    for broken in ({"schema_version": 1}, config | {"model": {"d_mod": 1}}, config | {"schema_version": "x"}):
        (run / "config.json").write_text(json.dumps(broken))
        assert_refused(call(capsys, "generate", run), "config.json is broken")


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
    for line in ("nsphere", "torch", "cpu dtype", "cpu model", "cpu ops, reference", "cpu ops, compiled"):
        assert line in out
    assert re.search("cpu ops, triton +does not run: ", out)


def test_no_compiler_means_eager_and_one_line_saying_so(tmp_path, text) -> None:
    """In a fresh process whose CXX is no compiler."""
    flags = [*SHAPE, "--device", "cpu", "--no-tensorboard", "--data", text, "--out", str(tmp_path / "run")]
    env = {"PATH": "/nowhere", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = "import sys; from nsphere.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", code, "train", *flags], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("eager: no C++ compiler found (g++ is not on the PATH); install g++, or set CXX") == 1
    assert "Traceback" not in ran.stderr


def test_a_compiler_that_is_there_but_broken_means_eager_too(tmp_path, text) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    flags = [
        *SHAPE,
        "--arm",
        "ngpt",
        "--device",
        "cpu",
        "--no-tensorboard",
        "--data",
        text,
        "--out",
        str(tmp_path / "r"),
    ]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CXX": str(broken), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = "import sys; from nsphere.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", code, "train", *flags], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "can't build a small library" in ran.stderr


def test_samples_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tc\x07é") == "a�[2Jb\n\tc�é"


def test_importing_the_library_does_not_import_the_trainer() -> None:
    code = """
import sys, nsphere
heavy = {"numpy", "tyro", "rich", "matplotlib", "tensorboard", "tokenizers", "safetensors", "transformers", "datasets"}
print(sorted(m for m in sys.modules if m.startswith("nsphere.train") or m in heavy - {"numpy"}))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)  # as where only torch is installed
    said = call(capsys, "families")
    assert said == (2, "", "nsphere families: the package tyro is not installed; pip install 'nsphere[train]'\n")
    assert call(capsys, "--help")[1].endswith("\nNot installed: tyro; pip install 'nsphere[train]'\n")


# norms of the user's own

P_NORM = """
import torch
from nsphere import Norm, register_norm


@register_norm("p4")
class P4Norm(Norm):
    def __init__(self, dim):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        return (y / y.pow(4).mean(-1, keepdim=True).add(1e-6).pow(0.25) * self.weight).to(x.dtype)
"""


@pytest.fixture
def p_norm(tmp_path, monkeypatch):
    """A file with a norm, and a registry that forgets it again."""
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))
    path = tmp_path / "my_norms.py"
    path.write_text(P_NORM)
    return path


def test_a_norm_of_ones_own_trains_resumes_and_generates(capsys, tmp_path, text, p_norm, monkeypatch) -> None:
    out = tmp_path / "run"
    train_it = ["train", "--out", out, "--arm", "gpt:qk_norm=p4", "--data", text, *QUICK]
    assert_refused(call(capsys, *train_it), "unknown norm 'p4'; known: .*--import the file that does")
    assert not out.exists()
    assert call(capsys, *train_it, "--import", p_norm)[0] == 0
    weights = load_run(out, torch.device("cpu")).model.state_dict()
    gains = [value for name, value in weights.items() if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(gains) == 2 and all((gain != 1).any() for gain in gains)
    assert str(p_norm.name) not in (out / "config.json").read_text()  # nothing there to be imported from
    generate = ["generate", out, "--device", "cpu", "--max-new-tokens", "4"]
    assert call(capsys, *generate, "--import", p_norm)[0] == 0  # the same file twice is no clash
    assert call(capsys, *train_it, "--import", p_norm, "--resume")[0] == 0

    monkeypatch.setattr(norms, "_NORMS", {k: v for k, v in norms._NORMS.items() if k != "p4"})  # another process
    for command in (generate, ["inspect", out, "--device", "cpu"], [*train_it, "--resume"]):
        assert_refused(
            call(capsys, *command), "unknown norm 'p4'; known: l2, layer, rms; .*--import the file that does"
        )
    compare = ["compare", "--out", tmp_path / "both", "--arms", "gpt", "gpt:qk_norm=p4", "--data", text, *QUICK]
    assert_refused(call(capsys, *compare), "unknown norm 'p4'")


def test_what_cannot_be_imported(capsys, tmp_path, text) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package")
    (tmp_path / "torch.py").write_text("raise RuntimeError('mine')")
    for name, message in (
        (tmp_path / "gone.py", "gone.py: not found; give a .py file, or a module that is installed"),
        ("no_such_module", "--import no_such_module: not found; give"),
        ("no_such.module", "--import no_such.module: not found; give"),
        (tmp_path / "broken.py", "broken.py failed: ModuleNotFoundError: No module named 'no_such_package'"),
        (tmp_path / "torch.py", "torch.py failed: RuntimeError: mine"),
    ):
        assert_refused(call(capsys, "families", "--import", name), message)
