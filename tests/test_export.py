"""Exports, and what reads them: transformers without nsphere, torch.export, onnxruntime."""

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere import cli
from nsphere.fold import fold
from nsphere.generate import Sampling, generate
from nsphere.train.loop import train
from nsphere.train.saved import load_run
from nsphere.train.tokenizer import ByteTokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["ngpt", "gpt-qknorm"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    data = tiny.text_file(folder)
    if request.param == "ngpt":
        data = type(data)(data=data.data, tokenizer="bpe:300")
    train(request.param, tiny.config(steps=4), tiny.options(), data, folder / "run")
    return load_run(folder / "run", CPU)


def call(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_what_is_refused_before_anything_is_written(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for flags, message in (
        ((run.folder, tmp_path / "x", "--to", "onnx"), "does not end in .onnx, as a file of --to onnx does"),
        ((run.folder, tmp_path / "there"), "is there already; remove it, or choose another name"),
        ((run.folder, tmp_path / "no" / "x"), "there is no folder"),
        ((run.folder, tmp_path / ("x" * 300)), "can't be written: its name is too long; choose a shorter one"),
        ((run.folder, tmp_path / f"{'x' * 238}.pt2", "--to", "torch-export"), "its name is too long"),
        ((tmp_path / "there", tmp_path / "x"), "is not a run folder"),
        ((run.folder, tmp_path / "x", "--to", "gguf"), "'gguf'.*choose hf, onnx, safetensors, torch-export"),
    ):
        code, out, err = call(capsys, "export", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert re.search(message, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    from nsphere.export import export

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nsphere.export.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(run, tmp_path / "x.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(run.tokenizer), "vocab_size", 999, raising=False)
    if isinstance(run.tokenizer, ByteTokenizer):
        for command in (["export", run.folder, tmp_path / "x"], ["generate", run.folder], ["eval", run.folder]):
            code, out, err = call(capsys, *command)
            assert (code, out) == (2, "")
            assert "has a tokenizer of 999 tokens and a model of 256: it is another model's" in err


def test_one_safetensors_file(run, tmp_path):
    from safetensors import safe_open

    from nsphere.export import export

    (path,) = export(run, tmp_path / "x.safetensors", "safetensors")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["nsphere"])
        assert about["config"] == run.config and about["step"] == 4
        for name, p in run.model.named_parameters():
            assert torch.equal(file.get_tensor(name), p)


@torch.no_grad()
def test_a_program_of_torch_export(run, tmp_path):
    from nsphere.export import export

    (path,) = export(run, tmp_path / "x.pt2", "torch-export")
    program = torch.export.load(path).module()
    for shape in ((1, 1), (1, 16), (3, 7), (2, 2)):
        tokens = torch.randint(200, shape)
        torch.testing.assert_close(program(tokens), run.model(tokens), rtol=1e-4, atol=1e-5)
    with pytest.raises((RuntimeError, AssertionError), match="16"):
        program(torch.zeros(1, 17, dtype=torch.long))


@torch.no_grad()
def test_onnx_in_onnxruntime(run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "x.onnx"
    code, out, err = call(capsys, "export", run.folder, path, "--to", "onnx")
    assert (code, out) == (0, f"{path}\n"), err
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()] == ["tokens"]
    for shape in ((1, 1), (1, 16), (3, 7)):
        tokens = torch.randint(200, shape)
        (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), run.model(tokens), rtol=1e-3, atol=1e-4)


ALONE = """
import json, sys
class Blocked:  # nsphere is not there
    def find_spec(self, name, path=None, target=None):
        if name == "nsphere" or name.startswith("nsphere."):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double()
inputs = tokenizer(prompt, return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=10, do_sample=False)
print(json.dumps({"class": type(model).__name__, "tokens": inputs.input_ids[0].tolist(), "made": made[0].tolist(),
    "loaded": sorted(m for m in sys.modules if m == "nsphere" or m.startswith("nsphere."))}))
"""


@torch.no_grad()
def test_eval_says_what_transformers_computes_from_the_export(run, tmp_path, capsys):
    """Windows, tokens and bytes of the validation text, the last twentieth from a line's start, are counted here."""
    transformers = pytest.importorskip("transformers")
    assert call(capsys, "export", run.folder, tmp_path / "x")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "x", trust_remote_code=True)
    text = Path(run.config["data"]["data"]).read_bytes()
    text = text[text.index(b"\n", round(0.95 * len(text))) + 1 :]
    tokens = torch.tensor(tokenizer(text.decode()).input_ids)
    flags = ("--contexts", 8, 16, 32, "--out", tmp_path / "e.json", "--device", "cpu")
    assert call(capsys, "eval", run.folder, *flags)[0] == 0
    found = json.loads((tmp_path / "e.json").read_text())["results"]
    assert [f["context"] for f in found] == [8, 16, 32]
    for f in found:
        count = (len(tokens) - 1) // f["context"] * f["context"]
        inputs, targets = (part.view(-1, f["context"]) for part in (tokens[:count], tokens[1 : count + 1]))
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).item()
        assert f["num_tokens"] == count > len(tokens) - 33
        assert f["loss"] == pytest.approx(loss, rel=1e-6)
        assert f["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert f["bits_per_byte"] == pytest.approx(loss / math.log(2) * len(tokens) / len(text), rel=1e-6)


def test_the_folder_loads_without_nsphere_and_continues_token_for_token(run, tmp_path, capsys):
    pytest.importorskip("transformers")
    code, out, err = call(capsys, "export", run.folder, tmp_path / "x")
    assert code == 0, err
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {Path(p).name for p in out.split()}
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "x"), "line 7"], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["loaded"] == []
    assert said["class"] == {"ngpt": "NGPTForCausalLM", "gpt": "Qwen3ForCausalLM"}[run.config["architecture"]]
    tokens = run.tokenizer.encode("line 7")
    assert said["tokens"] == tokens
    expected = list(generate(fold(run.model.double()), tokens, 10, Sampling(0.0)))
    run.model.float()
    if run.tokenizer.separator_id in expected:
        expected = expected[: expected.index(run.tokenizer.separator_id) + 1]
    assert said["made"] == tokens + expected


def test_the_folder_loads_without_the_flag_where_nsphere_is_installed(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    import nsphere.hf
    from nsphere.export import export

    export(run, tmp_path / "x", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    if run.config["architecture"] == "ngpt":
        assert type(model) is nsphere.hf.NGPTForCausalLM
        shipped = (tmp_path / "x" / "modeling_ngpt.py").read_text()
        assert "nsphere." not in "".join(line for line in shipped.splitlines() if "import" in line)
        assert isinstance(transformers.AutoModel.from_pretrained(tmp_path / "x"), nsphere.hf.NGPTModel)
    back = nsphere.hf.from_hf(model)
    for name, p in run.model.state_dict().items():
        assert torch.equal(back.state_dict()[name], p), name


def test_the_card_says_what_the_run_was_and_its_code_runs(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from nsphere.export import export

    export(run, tmp_path / "x", "hf")
    card = (tmp_path / "x" / "README.md").read_text()
    result = json.loads((run.folder / "result.json").read_text())
    for said in (
        f"{result['final_val_loss']:.4f} nats per token",
        f"| parameters | {result['num_parameters']:,} |",
        f"`{run.config['arm']}`",
        "4 steps of 4 × 16 tokens",
        "`text.txt`",
    ):
        assert said in card, said
    assert str(run.folder.parent) not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert ("trust_remote_code" in code) == (run.config["architecture"] == "ngpt")
    monkeypatch.chdir(tmp_path / "x")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    exec(code, {})
    assert capsys.readouterr().out.startswith("def ")


@functools.cache
def hf_bytes():
    pytest.importorskip("transformers")
    from nsphere.hf.tokenizer import hf_tokenizer

    return hf_tokenizer(ByteTokenizer(), 16)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_bytes_as_a_tokenizer_json_are_bytes(text):
    tokenizer = hf_bytes()
    tokens = tokenizer(text).input_ids
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text.replace("\0", "")


@settings(max_examples=100, deadline=None)
@given(st.binary())
def test_bytes_that_are_no_text_decode_as_ours_do(data):
    assert hf_bytes().decode(list(data), skip_special_tokens=True) == ByteTokenizer().decode(list(data))


def test_the_bytes_tokenizer_is_saved_whole(tmp_path):
    transformers = pytest.importorskip("transformers")
    hf_bytes().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Ā<|endoftext|> é€😀\n\t 's"
    assert tokenizer(text).input_ids == list(text.encode())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 0, 256)
    assert tokenizer(["ab", "c"], padding=True).input_ids == [[97, 98], [0, 99]]
