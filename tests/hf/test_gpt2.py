"""GPT of convention nanogpt against transformers' GPT-2, both ways: folders, logits, gradients, greedy tokens."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from nsphere import cli, hf  # noqa: E402
from nsphere.fold import fold  # noqa: E402
from nsphere.generate import Generation, Request, Sampling  # noqa: E402
from nsphere.presets import make_config, make_model  # noqa: E402
from nsphere.train.loop import train  # noqa: E402
from nsphere.train.saved import load_run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 31, "context": 24, "d_model": 24, "num_layers": 2, "num_heads": 4, "convention": "nanogpt"}
TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(1))


def gpt2(**changes):
    """A GPT-2 of transformers, every parameter away from its start."""
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    config = transformers.GPT2Config(**shape | changes, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5))
    return model


def make(**fields):
    torch.manual_seed(0)
    model = make_model(make_config("gpt", **SHAPE | {"init_std": 0.3} | fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": 40, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
    ],
)
def test_their_model_as_ours(changes):
    theirs = gpt2(**changes).double()
    ours = hf.from_hf(theirs)
    assert not ours.training
    assert (ours.config.tied, ours.config.norm_eps) == (
        changes.get("tie_word_embeddings", True),
        changes.get("layer_norm_epsilon", 1e-5),
    )
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-9, atol=1e-11)
    loss = torch.nn.functional.cross_entropy(theirs(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(ours.loss(TOKENS[:, :-1], TOKENS[:, 1:]), loss, rtol=1e-9, atol=0)
    loss.backward()
    ours.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    block, same = theirs.transformer.h[1], ours.blocks[1]
    packed = block.attn.c_attn
    for p, expected in (
        (ours.embed.weight, theirs.transformer.wte.weight.grad),
        (ours.embed.positions, theirs.transformer.wpe.weight.grad),
        (same.attn.W_q.weight, packed.weight.grad[:, :24].t()),
        (same.attn.W_v.bias, packed.bias.grad[48:]),
        (same.attn.W_o.weight, block.attn.c_proj.weight.grad.t()),
        (same.mlp.W_u.bias, block.mlp.c_fc.bias.grad),
        (same.mlp.W_down.weight, block.mlp.c_proj.weight.grad.t()),
        (same.mlp_norm.bias, block.ln_2.bias.grad),
        (ours.final_norm.weight, theirs.transformer.ln_f.weight.grad),
    ):
        assert expected.norm() > 0
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-11)
    back = hf.to_hf(ours)
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in theirs.state_dict().items())
    assert (back.config.tie_word_embeddings, back.config.n_inner) == (ours.config.tied, ours.config.d_mlp)
    assert [back.config.resid_pdrop, back.config.embd_pdrop, back.config.attn_pdrop] == [0.0] * 3  # 0.1 by default


def test_a_head_that_is_not_tied_but_equal_is_kept_apart():
    theirs = gpt2(tie_word_embeddings=False)
    with torch.no_grad():
        theirs.lm_head.weight.copy_(theirs.transformer.wte.weight)
    ours = hf.from_hf(theirs)
    assert not ours.config.tied and ours.head.weight is not ours.embed.weight


@pytest.mark.parametrize("fields", [{"bias": True}, {}, {"bias": True, "gelu": "tanh", "tied": False}])
@torch.no_grad()
def test_our_model_as_theirs(fields):
    ours = make(**fields).double()
    theirs = hf.to_hf(ours)
    assert type(theirs) is transformers.GPT2LMHeadModel
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=1e-9, atol=1e-11)
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == ours.config.tied
    back = hf.from_hf(theirs)
    assert torch.equal(back(TOKENS), ours(TOKENS)) or not ours.config.bias
    if ours.config.bias:
        assert back.config == ours.config
    else:  # GPT-2 has biases, here zeros
        assert back.config.bias and not back.blocks[0].mlp.W_u.bias.any()
        torch.testing.assert_close(back(TOKENS), ours(TOKENS), rtol=1e-9, atol=1e-11)


def test_what_gpt2_does_not_have_is_refused():
    for fields, message in (
        ({"qk_norm": "rms"}, "transformers' GPT-2 has no qk_norm 'rms'; export it as safetensors"),
        ({"num_kv_heads": 2}, "has no num_kv_heads 2 of 4 heads"),
        ({"head_dim": 8, "num_kv_heads": 1}, "no num_kv_heads 1 of 4 heads and no heads of 8 in a d_model of 24"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.to_hf(make(**fields))


PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


def greedy(theirs, side, **options):
    """What transformers makes of each prompt: the shorter one padded on the left, or each by itself."""
    options |= {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    if side == "alone":
        made = [theirs.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]
        return made
    tokens = torch.tensor([PROMPTS[0], [0, 0, 0, *PROMPTS[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    return theirs.generate(tokens, attention_mask=mask, **options)[:, 5:].tolist()


def our_greedy(ours, **options):
    drawn = [[] for _ in PROMPTS]
    for tokens in Generation(fold(ours), [Request(p, 15, Sampling(0.0)) for p in PROMPTS], **options):
        for row, token in tokens.items():
            drawn[row].append(token)
    return drawn


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_greedy_tokens_are_theirs(activation):
    theirs = gpt2(activation_function=activation).double()  # fp64: no ties that rounding could break
    expected = greedy(theirs, "alone")
    assert len(set(expected[0])) > 1 and expected[0] != expected[1]
    for cache in ("dynamic", "static"):
        assert greedy(theirs, "left", cache_implementation=cache) == expected
    ours = hf.from_hf(theirs)
    assert our_greedy(ours) == our_greedy(ours, grow=False) == expected


def call(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    return code, *capsys.readouterr()


def refused(capsys, source, out, message):
    capsys.readouterr()
    code, said, err = call(capsys, "import", source, out)
    assert (code, said, err.count("\n")) == (2, "", 1), err
    assert message in err, err
    assert not out.exists()


def bpe(folder):
    """A byte-level BPE as GPT-2's, of a few merges, and its end of text."""
    from nsphere.hf.tokenizer import hf_tokenizer
    from nsphere.train.tokenizer import train_bpe

    made = hf_tokenizer(train_bpe([tiny.TEXT], 270), 24)
    made.save_pretrained(folder)
    return made


@torch.no_grad()
def test_a_folder_of_theirs_becomes_a_run(tmp_path, capsys):
    theirs = gpt2(vocab_size=272)
    theirs.save_pretrained(tmp_path / "gpt2")
    tokenizer = bpe(tmp_path / "gpt2")
    # as OpenAI's own on the hub: no prefix, and with the masks that older versions kept
    path = tmp_path / "gpt2" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    save_file(tensors | masks, path, {"format": "pt"})
    code, out, err = call(capsys, "import", tmp_path / "gpt2", tmp_path / "run")
    assert code == 0 and f"gpt, {sum(p.numel() for p in theirs.parameters()):,} parameters, step 0" in out, err
    run = load_run(tmp_path / "run", CPU)
    assert run.model.config.gelu == "tanh" and run.model.config.tied
    torch.testing.assert_close(run.model(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert run.tokenizer.encode("line 7: the quick") == tokenizer("line 7: the quick").input_ids
    assert run.tokenizer.separator_id == tokenizer.eos_token_id
    code, out, err = call(capsys, "generate", tmp_path / "run", "--prompt", "line ", "--max-new-tokens", 30)
    assert code == 0 and out.startswith("line "), err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "attention scaled by layer (scale_attn_by_inverse_layer_idx)"),
        ({"scale_attn_weights": False}, "attention without 1/√D (scale_attn_weights=False)"),
        ({"activation_function": "relu"}, "has the activation relu, which nsphere's GPT does not have"),
        ({"add_cross_attention": True}, "cross-attention (add_cross_attention)"),
    ],
)
def test_what_gpt_does_not_have_is_refused_by_name(change, message, tmp_path, capsys):
    gpt2(n_layer=1, **change).save_pretrained(tmp_path / "gpt2")
    refused(capsys, tmp_path / "gpt2", tmp_path / "run", message)


def test_half_a_folder_is_refused(tmp_path, capsys):
    folder = tmp_path / "gpt2"
    gpt2().save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"n_inner": 40}, "holds weights of another shape than its config.json says: "),
        ({"n_layer": 3}, "is not whole: it lacks transformer.h.2."),
        ({"n_layer": 1}, "holds transformer.h.1."),
        ({"n_positions": 48}, "holds weights of another shape than its config.json says: transformer.wpe.weight"),
        ({"n_head": 5}, "can't be loaded"),
        ({"model_type": "gptj"}, "holds a model of type 'gptj'; ngpt, gpt2, llama and qwen3 can be imported"),
    ):
        (folder / "config.json").write_text(json.dumps(said | change))
        refused(capsys, folder, tmp_path / "run", message)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanogpt")
    arm = "gpt:convention=nanogpt,bias=true"
    train(arm, tiny.config(steps=4), tiny.options(), tiny.text_file(folder), folder / "run")
    return load_run(folder / "run", CPU)


@torch.no_grad()
@pytest.mark.parametrize("to", ["hf", "safetensors", "torch-export", "onnx"])
def test_every_export_of_a_run_and_back(run, to, tmp_path, capsys):
    suffix = {"hf": "", "safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}[to]
    if to == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = tmp_path / f"x{suffix}"
    code, _, err = call(capsys, "export", run.folder, out, "--to", to)
    assert code == 0, err
    shapes = ((1, 1), (1, 16), (3, 7))
    for tokens in (torch.randint(200, shape) for shape in shapes):
        expected = run.model(tokens)
        if to == "hf":
            made = transformers.AutoModelForCausalLM.from_pretrained(out)
            assert (
                type(made) is transformers.GPT2LMHeadModel and "as GPT2LMHeadModel" in (out / "README.md").read_text()
            )
            torch.testing.assert_close(made(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        elif to == "torch-export":
            torch.testing.assert_close(torch.export.load(out).module()(tokens), expected, rtol=1e-4, atol=1e-5)
        elif to == "onnx":
            (logits,) = onnxruntime.InferenceSession(str(out)).run(["logits"], {"tokens": tokens.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)
    if to in ("hf", "safetensors"):
        assert call(capsys, "import", out, tmp_path / "back")[0] == 0
        back = load_run(tmp_path / "back", CPU)
        assert back.model.config == run.model.config
        assert all(torch.equal(t, back.model.state_dict()[name]) for name, t in run.model.state_dict().items())
