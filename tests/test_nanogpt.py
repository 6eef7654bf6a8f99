"""GPT of convention nanogpt: against nanoGPT's formula over its own names in fp64, and in everything that uses it.

Legend: T tokens, H heads, D head_dim, d d_model.
"""

import dataclasses
import json
import math
import shutil
import sys
import types

import needs
import pytest
import tiny
import torch
import torch.nn.functional as F

from nsphere import cli
from nsphere.export import export_program
from nsphere.fold import fold
from nsphere.generate import Generation, Request, Sampling
from nsphere.gpt import GPT, GPTConfig
from nsphere.nanogpt import NanoGPT, config_of, from_nanogpt_state_dict, to_nanogpt_state_dict
from nsphere.presets import make_model
from nsphere.qk_clip import QKClip
from nsphere.train.config import read_config, resolve
from nsphere.train.data import DataConfig
from nsphere.train.distributed import Layout, World
from nsphere.train.inspection import inspect_model
from nsphere.train.loop import train
from nsphere.train.metrics import flops_per_token
from nsphere.train.optimizer import make_optimizers
from nsphere.train.parallelize import check_layout
from nsphere.train.saved import load_run

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 17, "context": 8, "d_model": 12, "num_layers": 2, "num_heads": 3, "convention": "nanogpt"}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def layer_norm(x, w, b):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w
    return x if b is None else x + b


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].t()
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def gelu(x, kind):
    if kind == "exact":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def formula(w, row, num_heads, kind="exact", eps=1e-5):
    """nanoGPT: tokens [T] → logits [T, V], from its state dict."""
    T, D = len(row), w["transformer.wte.weight"].shape[1] // num_heads
    h = w["transformer.wte.weight"][row] + w["transformer.wpe.weight"][:T]
    norm = lambda name: layer_norm(h, w[f"{name}.weight"], w.get(f"{name}.bias"))  # noqa: E731
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        at = f"transformer.h.{i}"
        heads = linear(w, f"{at}.attn.c_attn", norm(f"{at}.ln_1")).view(T, 3, num_heads, D)
        done = []
        for q, k, v in heads.permute(2, 1, 0, 3):
            scores = (q @ k.t() / math.sqrt(D)).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
            done.append(scores.softmax(-1) @ v)
        h = h + linear(w, f"{at}.attn.c_proj", torch.cat(done, -1))
        h = h + linear(w, f"{at}.mlp.c_proj", gelu(linear(w, f"{at}.mlp.c_fc", norm(f"{at}.ln_2")), kind))
    return norm("transformer.ln_f") @ w["lm_head.weight"].t()


def make(dtype=torch.float64, seed=0, **fields):
    """A model all of whose parts matter: wide matrices, norms and biases away from their start."""
    torch.manual_seed(seed)
    model = make_model(GPTConfig(**SHAPE | {"init_std": 0.3} | fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5))
    return model.to(dtype)


def weights(model):
    """Its parameters under nanoGPT's names; a tied head is the embedding itself."""
    w = {name: t.detach().clone().requires_grad_() for name, t in to_nanogpt_state_dict(model).items()}
    if model.config.tied:
        w["lm_head.weight"] = w["transformer.wte.weight"]
    return w


VARIANTS = {
    "biases": {"bias": True},
    "no biases": {},
    "GPT-2's GELU": {"bias": True, "gelu": "tanh"},
    "untied, odd heads, odd MLP": {"tied": False, "num_heads": 4, "d_mlp": 7},
}
TOKENS = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_loss_and_every_gradient(fields):
    model = make(**fields)
    w, targets = weights(model), TOKENS.roll(1, 1)
    H, kind = model.config.num_heads, model.config.gelu
    modules = {name.rpartition(".")[0] for name in w if ".h." in name or ".ln_f." in name}
    assert {f"{module}.bias" in w for module in modules} == {model.config.bias}
    expected = torch.stack([formula(w, row, H, kind) for row in TOKENS])
    torch.testing.assert_close(model(TOKENS), expected, **CLOSE)
    torch.testing.assert_close(model(TOKENS[:, :3]), expected[:, :3], **CLOSE)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(TOKENS, targets), loss, **CLOSE)
    loss.backward()
    model.loss(TOKENS, targets).backward()
    gradients = from_nanogpt_state_dict({name: t.grad for name, t in w.items()})
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        # the bias of k moves all of a row's logits alike
        assert gradients[name].norm() > 0 or name.endswith("W_k.bias"), name
        torch.testing.assert_close(p.grad, gradients[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_names_there_and_back():
    for fields in VARIANTS.values():
        model = make(torch.float32, **fields)
        theirs = to_nanogpt_state_dict(model)
        back = from_nanogpt_state_dict({f"_orig_mod.{name}": t for name, t in theirs.items()})
        assert config_of(back, model.config.num_heads, gelu=model.config.gelu, init_std=0.3) == model.config
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(t, back[name]) for name, t in model.state_dict().items())
    for name, tensor, message in (
        ("attn.q_norm.weight", torch.ones(2), "'transformer.h.0.attn.q_norm.weight' is no parameter of nanoGPT"),
        ("attn.c_attn.bias", torch.ones(4), "'transformer.h.0.attn.c_attn.bias' has 4 rows, which are no q, k and v"),
    ):
        with pytest.raises(ValueError, match=message):
            from_nanogpt_state_dict({f"transformer.h.0.{name}": tensor})
    for fields, message in (
        ({"qk_norm": "rms"}, "nanoGPT has no qk_norm 'rms'; it can't hold this model"),
        ({"num_kv_heads": 1, "head_dim": 6}, "no num_kv_heads 1 of 3 heads and no heads of 6 in a d_model of 12"),
    ):
        with pytest.raises(ValueError, match=message):
            to_nanogpt_state_dict(make(**fields))


def test_a_qk_norm_and_grouped_heads_can_be_had():
    """Which nanoGPT does not have: of the function what is left is checked."""
    model = make(qk_norm="rms", num_kv_heads=1)
    plain = make(num_kv_heads=1)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "qk_norm" not in n})
    assert (model(TOKENS) - plain(TOKENS)).abs().max() > 1e-2
    cache = model.make_cache(2, 8, torch.float64)
    parts = torch.cat([model(TOKENS[:, a:b], cache=cache) for a, b in ((0, 3), (3, 8))], 1)
    torch.testing.assert_close(parts, model(TOKENS), **CLOSE)


def test_documents_begin_at_position_0_and_see_themselves():
    model = make(bias=True)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5] * 8])
    alone = torch.cat([model(TOKENS[:1, s]) for s in (slice(0, 3), slice(3, 7), slice(7, 8))], 1)
    together = model(TOKENS, ids)
    torch.testing.assert_close(together[:1], alone, **CLOSE)
    torch.testing.assert_close(together[1:], model(TOKENS[1:]), **CLOSE)
    assert (model(TOKENS[:1]) - alone).abs().max() > 1e-3


def test_init_is_nanogpts():
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "context": 128, "d_model": 128, "num_layers": 8, "num_heads": 4}
    model = make_model(GPTConfig(**shape, convention="nanogpt", bias=True))
    assert model.config.tied and model.config.norm_eps == 1e-5 and not GPTConfig(**shape).tied
    for name, t in to_nanogpt_state_dict(model).items():
        if t.dim() == 1:
            assert (t == (0 if name.endswith("bias") else 1)).all(), name
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(t.std().item() / expected - 1) < 0.02 and abs(t.mean()) < 4 * expected / t.numel() ** 0.5, name
    with torch.device("meta"):
        empty = make_model(model.config)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for p in empty.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(1)
    empty.reset_parameters()
    for name, p in empty.named_parameters():
        of_model = model.get_parameter(name)
        assert torch.equal(p, of_model) if p.dim() == 1 else 0.9 < p.std() / of_model.std() < 1.1, name
    assert not list(empty.buffers())


def test_what_can_not_be():
    for fields, message in (
        (
            {"convention": "paper", "bias": True},
            "bias and gelu are nanoGPT's; got bias True and gelu 'exact' with conv",
        ),
        ({"convention": "nvidia", "gelu": "tanh"}, "bias and gelu are nanoGPT's"),
        ({"bias": "no"}, "bias must be True or False, got 'no'"),
        ({"tied": 1}, "tied must be True or False, got 1"),
        ({"num_layers": 2.5}, "num_layers must be a whole number, got 2.5"),
        ({"norm_eps": "small"}, "norm_eps must be a positive number, got 'small'"),
        ({"gelu": "new"}, "gelu is 'new'; choose exact or tanh"),
        ({"rope_base": 500.0}, "learns its positions and rotates nothing; got rope_base 500"),
        ({"convention": "gpt2"}, "convention is 'gpt2'; choose paper or nvidia or nanogpt"),
    ):
        with pytest.raises(ValueError, match=message):
            GPTConfig(**SHAPE | fields)
    for build, convention in ((GPT, "nanogpt"), (NanoGPT, "paper")):
        with pytest.raises(ValueError, match=f"the config says '{convention}'; build it with nsphere.make_model"):
            build(GPTConfig(**SHAPE | {"convention": convention, "num_heads": 2}))


def test_positions_beyond_the_context_are_refused():
    model = make()
    nine = torch.zeros(1, 9, dtype=torch.long)
    said = "the model learned 8 positions and has none for sequences of 9 tokens; give at most 8"
    for refused in (
        lambda: model(nine),
        lambda: model.loss(nine, nine),
        lambda: model(nine, torch.zeros_like(nine)),
        lambda: model.make_cache(1, 9),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    cache = model.make_cache(1, 8, torch.float64)
    model(nine[:, :8], cache=cache)
    with pytest.raises(ValueError, match="the cache holds 8 tokens, 9 were asked for"):
        model(nine[:, :1], cache=cache)


PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3]]


def greedy_by_formula(w, prompt, num_new, num_heads):
    """Token by token through the whole formula; a full context begins again with its last half."""
    seen, start = list(prompt), 0
    for _ in range(num_new):
        if len(seen) - start > 8:
            start = len(seen) - 4
        seen.append(int(formula(w, torch.tensor(seen[start:]), num_heads)[-1].argmax()))
    return seen[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("how", ["growing", "static", pytest.param("compiled", marks=needs.compiler)])
def test_side_by_side_each_prompt_gets_the_formula_s_tokens(how):
    """Prompts of unequal length, past the context."""
    model = make(bias=True)
    expected = [greedy_by_formula(weights(model), prompt, 14, 3) for prompt in PROMPTS]
    requests = [Request(prompt, 14, Sampling(0.0)) for prompt in PROMPTS]
    drawn = [[] for _ in PROMPTS]
    for tokens in Generation(fold(model), requests, grow=how == "growing", compile=how == "compiled"):
        for row, token in tokens.items():
            drawn[row].append(token)
    assert drawn == expected and len({*map(tuple, drawn)}) == 3


@torch.no_grad()
def test_autocast_and_folded_bf16_keep_the_residual_in_fp32():
    model, exact = make(torch.float32, bias=True), make(bias=True)
    dtypes = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, x, h: dtypes.append(h.dtype))
    truth = exact(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        logits, folded = model(TOKENS), fold(model, torch.bfloat16)(TOKENS)
    assert dtypes[:2] == [torch.float32] * 2
    assert (logits.double() - truth).norm() < 0.03 * truth.norm()
    assert torch.equal(logits, folded)


@torch.no_grad()
def test_a_program_of_torch_export():
    model = make(torch.float32, bias=True)
    program = export_program(model).module()
    for shape in ((1, 1), (3, 8), (2, 5)):
        tokens = torch.randint(17, shape)
        torch.testing.assert_close(program(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_counts():
    model = make(bias=True)
    d, L, V, T = 12, 2, 17, 8
    block = 4 * d * d + 8 * d * d + 4 * d + 5 * d + 4 * d
    assert model.num_parameters() == V * d + T * d + L * block + 2 * d
    assert flops_per_token(model) == 6 * (V * d + L * block + 2 * d) + 12 * L * d * T


def test_tensor_parallelism_is_refused():
    with pytest.raises(ValueError, match="tensor parallelism is not made for learned positions and biases"):
        check_layout(GPTConfig(**SHAPE), World(Layout(1, 1, 2), CPU), tiny.config(), 1)


def test_qk_clip_clips_biases_with_their_rows():
    model = make(bias=True)
    clip = QKClip(model, threshold=0.1)
    model.loss(TOKENS, TOKENS).backward()
    attn = model.blocks[0].attn
    before = attn.W_q.weight.clone(), attn.W_q.bias.clone()
    (gamma, _) = clip().values()
    factor = gamma.double().sqrt().repeat_interleave(4)
    assert (gamma < 1).all()
    torch.testing.assert_close(attn.W_q.weight, before[0] * factor[:, None])
    torch.testing.assert_close(attn.W_q.bias, before[1] * factor)


ARM = "gpt:convention=nanogpt,bias=true"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanogpt")
    train(ARM, tiny.config(), tiny.options(), tiny.text_file(folder), folder / "run")
    return load_run(folder / "run", CPU)


def call(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_a_run_is_trained_resumed_evaluated_and_looked_into(run, tmp_path, capsys):
    assert isinstance(run.model, NanoGPT) and run.model.config.bias
    assert max(p.abs().max() for n, p in run.model.named_parameters() if n.endswith("bias")) > 0
    cut = tmp_path / "cut"
    shutil.copytree(run.folder, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    (cut / "result.json").unlink()
    assert load_run(cut, CPU).step == 4
    train(ARM, tiny.config(), tiny.options(), DataConfig(**run.config["data"]), cut, resume=True)
    again = load_run(cut, CPU).model.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in run.model.state_dict().items())
    code, out, err = call(capsys, "eval", run.folder, "--device", "cpu")
    assert code == 0 and "16 (trained)" in out and "32" not in out, err
    code, out, err = call(capsys, "eval", run.folder, "--contexts", 32)
    assert (code, out) == (2, "") and "the model learned 16 positions and has none for sequences of 32 tokens" in err
    assert err.count("\n") == 1
    found = inspect_model(run.model, None)
    assert found["layers"][0]["condition_numbers"].keys() == {"W_q", "W_k", "W_v", "W_o", "W_u", "W_down"}
    code, out, err = call(capsys, "generate", run.folder, "--prompt", "line ", "--max-new-tokens", 40)
    assert code == 0 and out.startswith("line "), err


def test_weight_decay_is_of_matrices_and_positions_alone(run):
    (optimizer,) = make_optimizers(run.model, resolve(ARM, tiny.config()))
    decayed, free = (group["params"] for group in optimizer.param_groups)
    names = {id(p): name for name, p in run.model.named_parameters()}
    assert "embed.positions" in {names[id(p)] for p in decayed}
    assert all(names[id(p)].endswith(("norm.weight", "bias")) for p in free)
    assert len(decayed) + len(free) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_config_of_before_these_fields_is_read_as_it_was_meant(run, tmp_path):
    (tmp_path / "run").mkdir()
    content = json.loads((run.folder / "config.json").read_text())
    older = dataclasses.asdict(GPTConfig(vocab_size=256, context=16, d_model=32, num_layers=2, num_heads=2))
    whole = dict(older)
    del older["bias"], older["gelu"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(content | {"model": older}))
    assert read_config(tmp_path / "run")["model"] == whole


def refused(capsys, source, out, message, *flags):
    code, said, err = call(capsys, "import", source, out, *flags)
    assert (code, said, err.count("\n")) == (2, "", 1), err
    assert message in err, err
    assert not out.exists()


SAID = {"block_size": 8, "vocab_size": 17, "n_layer": 2, "n_head": 3, "n_embd": 12, "dropout": 0.1, "bias": True}


def config_object(monkeypatch):
    """NanoGPT's dataclass of these, which is `model.GPTConfig` there."""
    fields = [(name, type(value), value) for name, value in SAID.items()]
    kind = dataclasses.make_dataclass("GPTConfig", fields, namespace={"__module__": "model"})
    monkeypatch.setitem(sys.modules, "model", types.ModuleType("model"))
    sys.modules["model"].GPTConfig = kind
    return kind()


def checkpoint(path, of, *, masks=False, **more):
    """What nanoGPT's train.py saves, by its names; `masks` as versions before flash attention have them."""
    state = {f"_orig_mod.{name}": t.float() for name, t in to_nanogpt_state_dict(of).items()}
    if masks:
        for i in range(2):
            state[f"_orig_mod.transformer.h.{i}.attn.bias"] = torch.ones(8, 8).tril().view(1, 1, 8, 8)
            state[f"_orig_mod.transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    content = {
        "model": state,
        "optimizer": torch.optim.AdamW(of.parameters()).state_dict(),
        "model_args": SAID | {"bias": of.config.bias},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.25),
        "config": {"dataset": "openwebtext", "compile": True, "learning_rate": 6e-4},
    }
    content |= more
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("form", ["as train.py saves it", "masks, no biases", "config object", "flags", "GPT-2's GELU"])
def test_a_checkpoint_becomes_a_run_of_the_same_function(form, tmp_path, capsys, monkeypatch):
    model = make(bias=form != "masks, no biases")
    more, flags = {}, ()
    if form == "config object":
        more = {"model_args": None, "config": config_object(monkeypatch)}
    elif form == "flags":
        more, flags = {"model_args": None, "config": None}, ("--num-heads", 3)
    elif form == "GPT-2's GELU":
        flags = ("--option", "gelu=tanh")
    path = checkpoint(tmp_path / "ckpt.pt", model, masks=form == "masks, no biases", **more)
    monkeypatch.undo()  # no class of nanoGPT is needed to read it
    if form == "flags":
        refused(capsys, path, tmp_path / "run", "does not say its number of heads; give --num-heads")
        refused(capsys, path, tmp_path / "run", "--context is 9, and", *flags, "--context", 9)
    code, out, err = call(capsys, "import", path, tmp_path / "run", *flags)
    assert code == 0 and f"gpt, {model.num_parameters():,} parameters, step 2000" in out, err
    back = load_run(tmp_path / "run", CPU).model
    kind = "tanh" if form == "GPT-2's GELU" else "exact"
    assert back.config == dataclasses.replace(model.config, gelu=kind, init_std=0.02) and back.config.tied
    expected = torch.stack([formula(weights(model), row, 3, kind) for row in TOKENS])
    torch.testing.assert_close(back.double()(TOKENS), expected, rtol=1e-5, atol=1e-5)  # the file is fp32


def test_checkpoints_that_are_no_nanogpt(tmp_path, capsys):
    model, out, path = make(bias=True), tmp_path / "run", tmp_path / "ckpt.pt"
    state = {name: t.float() for name, t in to_nanogpt_state_dict(model).items()}

    def saved(**more):
        return checkpoint(path, model, **more)

    def without(part):
        return {name: t for name, t in state.items() if part not in name}

    refused(capsys, saved(), out, "nanoGPT has no option 'gelu=new' that matters here; known: gelu=exact, gelu=tanh",
            "--option", "gelu=new")  # fmt: skip
    refused(capsys, saved(), out, "--option gelu=exact and --option gelu=tanh exclude each other; give one",
            "--option", "gelu=exact", "--option", "gelu=tanh")  # fmt: skip
    refused(capsys, saved(model_args=[3]), out, "does not say its number of heads; give --num-heads")
    refused(capsys, saved(), out, "--num-heads is 2, and", "--num-heads", 2)
    for change, message in (
        ({"model": without("h.1.ln_2")}, "Missing key(s) in state_dict: \"blocks.1.mlp_norm"),
        ({"model": without("wte")}, "it lacks what becomes embed.weight"),
        ({"model": without("transformer.h.")}, "it lacks what becomes blocks.0.mlp.W_u.weight"),
        ({"model": {**state, "transformer.wpe.weight": torch.ones(3)}}, "becomes embed.positions is no matrix"),
        ({"model": without("c_attn.bias")}, "does not fit the model it describes"),
        ({"model": {**state, "transformer.h.0.attn.rope": torch.ones(3)}}, "'transformer.h.0.attn.rope' is no param"),
        ({"model_args": {"n_head": 5}}, "d_model 12 is not divisible by num_heads 5"),
        ({"model_args": {"n_head": 3, "block_size": 16}}, "says a context of 16 and holds 8 positions"),
    ):  # fmt: skip
        refused(capsys, saved(**change), out, message)


def test_an_untied_checkpoint_keeps_its_head(tmp_path, capsys):
    model = make(torch.float32, tied=False)
    path = checkpoint(tmp_path / "ckpt.pt", model)
    assert call(capsys, "import", path, tmp_path / "run")[0] == 0
    back = load_run(tmp_path / "run", CPU).model
    assert not back.config.tied and torch.equal(back.head.weight, model.head.weight)


def test_an_import_is_trained_further(tmp_path, capsys):
    data = tiny.text_file(tmp_path)
    model = make_model(
        GPTConfig(vocab_size=256, context=16, d_model=32, num_layers=2, num_heads=2, convention="nanogpt")
    )
    said = {"n_head": 2, "block_size": 16}
    path = checkpoint(tmp_path / "ckpt.pt", model, model_args=said)
    assert call(capsys, "import", path, tmp_path / "theirs")[0] == 0
    tuned = tiny.config(init_from=str(tmp_path / "theirs"), steps=1, lr=1e-9, warmup_steps=0, weight_decay=0.0)
    train("gpt:convention=nanogpt", tuned, tiny.options(), data, tmp_path / "tuned")
    trained = load_run(tmp_path / "tuned", CPU).model
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), p, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="the weights belong to another model: convention is 'nanogpt' there"):
        train("gpt", tuned, tiny.options(), data, tmp_path / "other")
