"""add_qk_norm: QK-norm in a model that has none, started, saved, loaded, trained, taken out."""

import copy
import json

import pytest
import torch
from needs import compiler
from safetensors.torch import load_file, save_file
from tolerances import error
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_models import gradients, llama, logits, make, token_ids, with_qk_norm  # noqa: E402
from transformers import StaticCache  # noqa: E402

from nsphere import hf, norms, register_norm  # noqa: E402
from nsphere.hf.rewire import wiring_of  # noqa: E402

# name: (config, model, options, what its RoPE is)
PLAIN = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, (16, "half")),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 4}, (16, "half")),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}, (16, "half")),
    "phi": ("PhiConfig", "PhiForCausalLM", {}, (8, "half")),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}, (16, "half")),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {}, (16, "half")),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {}, (16, "half")),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}, (4, "half")),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4}, (16, "half")),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {}, (16, "interleaved")),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}, (8, "interleaved")),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, (16, "half")),
}
plain = pytest.mark.parametrize("name", PLAIN)
CALIBRATION = {"input_ids": token_ids(4, 16, seed=3)}


def model_of(name: str):
    config, model, options, _ = PLAIN[name]
    return make(config, model, options)


def attention_names(model) -> list[str]:
    return [name for name, module in model.named_modules() if wiring_of(module) is not None]


def q_and_k(model, name: str, inputs) -> list[torch.Tensor]:
    """What the attention's kernel receives, [B, heads, T, D]."""
    seen: list[torch.Tensor] = []

    def capture(module, q, k, v, *args, **kwargs):
        seen[:] = seen or [q, k]
        out = v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2)
        return out.contiguous(), None

    transformers.AttentionInterface.register("nsphere_look", capture)
    was = model.config._attn_implementation
    model.config._attn_implementation = "nsphere_look"
    with torch.no_grad():
        model(**inputs)
    model.config._attn_implementation = was
    return seen


@plain
@pytest.mark.parametrize("place", ["before", "after"])
def test_calibrated_weights_keep_the_mean_square_of_every_dim(name, place):
    model = model_of(name)
    before = q_and_k(model, "", CALIBRATION)
    added = hf.add_qk_norm(model, "rms", place=place, calibrate=CALIBRATION)
    assert added == attention_names(model) and len(added) == 2
    after = q_and_k(model, added[0], CALIBRATION)
    dim, layout = PLAIN[name][3]
    rope = model.config.nsphere_qk_norm["attentions"][0]["rope"]
    assert (rope["dim"], rope["layout"]) == (dim, layout)
    for x, y in zip(before, after, strict=True):
        # before RoPE the weights keep what comes out of the projections; turned, a pair shares what its dims have
        old, new = (t.double().square().mean((0, 2)) for t in (x, y))
        if place == "before":
            turns = torch.arange(x.shape[-1]) < dim
            old, new = (
                torch.cat((old[:, turns].sum(1), old[:, ~turns].flatten())),
                torch.cat((new[:, turns].sum(1), new[:, ~turns].flatten())),
            )
        torch.testing.assert_close(new, old, rtol=1e-4, atol=0)
    # and it is a norm: a hundred times the projection gives the same q
    attention = model.get_submodule(added[0])
    projection = getattr(attention, "q_proj", None)
    if projection is not None:
        with torch.no_grad():
            for p in projection.parameters():
                p.mul_(100)
        torch.testing.assert_close(q_and_k(model, added[0], CALIBRATION)[0], after[0], rtol=1e-3, atol=1e-4)


@plain
def test_saved_loaded_and_taken_out(name, tmp_path):
    model = model_of(name)
    plain_logits, keys = logits(model), list(model.state_dict())
    kinds, config = [type(m) for m in model.modules()], model.config.to_dict()
    added = hf.add_qk_norm(model, calibrate=CALIBRATION)
    expected = logits(model)
    assert not torch.equal(expected, plain_logits)
    assert model.config.to_dict().keys() - config.keys() == {"nsphere_qk_norm"}
    new = set(model.state_dict()) - set(keys)
    assert new == {f"{name}.{side}.weight" for name in added for side in ("q_norm", "k_norm")}
    model.save_pretrained(tmp_path)
    loaded = hf.load(tmp_path).eval()
    assert type(loaded) is type(model) and list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(hf.load(tmp_path / "again").eval()), expected)
    assert hf.remove_qk_norm(model) == added
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), plain_logits)
    assert "nsphere_qk_norm" not in model.config.to_dict()
    assert hf.remove_qk_norm(model) == []


def test_loading_into_the_base_model_and_in_another_dtype(tmp_path):
    model = llama()
    hf.add_qk_norm(model, calibrate=CALIBRATION)
    model.save_pretrained(tmp_path)
    base = hf.load(tmp_path, cls=transformers.LlamaModel).eval()
    with torch.no_grad():
        expected = model.model(token_ids()).last_hidden_state
        assert torch.equal(base(token_ids()).last_hidden_state, expected)
    lower = hf.load(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in lower.parameters()} == {torch.bfloat16}
    assert error(logits(lower), logits(model).double()) < 0.05


def test_a_llama_with_shared_rms_weights_is_a_qwen3():
    model = llama()
    hf.add_qk_norm(model, "rms", weight="shared", eps=1e-6, calibrate=CALIBRATION)
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    qwen3 = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()
    qwen3.load_state_dict(model.state_dict())
    assert error(logits(model), logits(qwen3).double()) < 1e-5


def test_gradients_against_finite_differences():
    model = llama(torch.float64)
    hf.add_qk_norm(model, calibrate=CALIBRATION)
    target = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(5)).double()

    def value():
        return (model(token_ids()).logits * target).mean()

    value().backward()
    for name in ("model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"):
        weight = model.get_parameter(name)
        values = []
        for step in (1e-2, -1e-2):  # transformers' own norms compute in fp32 whatever comes
            with torch.no_grad():
                weight[1, 3] += step
                values.append(value().item())
                weight[1, 3] -= step
        assert weight.grad[1, 3].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


def test_generation_with_every_cache_and_a_copy():
    model = llama()
    hf.add_qk_norm(model, calibrate=CALIBRATION)
    ids = token_ids(length=5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    uncached = ids
    with torch.no_grad():
        for _ in range(12):
            uncached = torch.cat((uncached, model(uncached, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, **options), uncached)
    static = StaticCache(config=model.config, max_cache_len=20)
    assert torch.equal(model.generate(ids, past_key_values=static, **options), uncached)
    twin = copy.deepcopy(model)
    before = logits(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_norm.weight.zero_()
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def test_freeze_trains_the_new_weights_alone():
    model = llama()
    hf.add_qk_norm(model, calibrate=CALIBRATION, freeze=True)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in trainable)
    found = gradients(model)
    assert list(found) == trainable and all(g.abs().max() > 0 for g in found.values())


def test_several_batches_are_one_and_the_weights_follow_the_formula():
    ids = token_ids(4, 16, seed=3)
    whole, parts = llama(), llama()
    x = {}
    handle = whole.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, i, o: x.__setitem__("k", o))
    hf.add_qk_norm(whole, "layer", weight="shared", bias=False, zero_centered=True, calibrate={"input_ids": ids})
    handle.remove()
    hf.add_qk_norm(
        parts,
        "layer",
        weight="shared",
        bias=False,
        zero_centered=True,
        calibrate=[{"input_ids": i} for i in ids.split(2)],
    )
    k = x["k"].double().unflatten(-1, (2, 16))
    plain_norm = nn.functional.layer_norm(k, (16,), eps=1e-5)
    expected = (k.square().mean((0, 1, 2)) / plain_norm.square().mean((0, 1, 2))).sqrt() - 1
    for model in (whole, parts):
        torch.testing.assert_close(
            model.model.layers[0].self_attn.k_norm.weight.double(), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("norm", "options", "shape"),
    [
        ("rms", {"weight": "scalar_per_head"}, (4,)),
        ("rms", {"weight": "scalar"}, (1,)),
        ("rms", {"over": "full"}, (64,)),
        ("l2", {}, (4, 16)),
        ("rms", {"over": 8}, (8,)),
    ],
)
def test_other_norms_and_weights(norm, options, shape, tmp_path):
    model = llama()
    squares = q_and_k(model, "", CALIBRATION)[0].double().square()
    scale = model.model.layers[0].self_attn.scaling
    if options.get("over") == 8:
        with pytest.raises(ValueError, match="calibrate can set the weights of norms over a head or all heads"):
            hf.add_qk_norm(model, norm, calibrate=CALIBRATION, **options)
        assert attention_names(model) == []
        hf.add_qk_norm(model, norm, **options)
    else:
        hf.add_qk_norm(model, norm, calibrate=CALIBRATION, **options)
        after = q_and_k(model, "", CALIBRATION)[0].double().square()
        torch.testing.assert_close(after.mean(), squares.mean(), rtol=1e-3, atol=0)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == shape
    assert model.model.layers[0].self_attn.scaling == scale
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.load(tmp_path).eval()), logits(model))


def test_softmax_scales():
    model = llama()
    hf.add_qk_norm(model, "l2")  # unit norms without their old scale: √D
    attention = model.model.layers[0].self_attn
    assert attention.scaling == 4.0
    q, k = q_and_k(model, "", CALIBRATION)
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(4, 4, 16))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(4, 2, 16))
    hf.remove_qk_norm(model)
    assert attention.scaling == 0.25
    hf.add_qk_norm(model, softmax_scale=0.5)
    assert attention.scaling == 0.5
    hf.remove_qk_norm(model)
    assert attention.scaling == 0.25


def test_a_multiplier_reaches_layers_without_rope_too(tmp_path):
    model = model_of("smollm3")  # of its two layers the second does not turn
    hf.add_qk_norm(model, "rms", weight="shared", multiplier=3.0, eps=0.0)
    lengths = []
    for attention in (layer.self_attn for layer in model.model.layers):
        sides = attention.q_proj(torch.randn(1, 5, 64)), attention.k_proj(torch.randn(1, 5, 64))
        q, k = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in sides)
        tables = None if wiring_of(attention).qk_norm.rope is None else (torch.ones(5, 16), torch.zeros(5, 16))
        q, k = wiring_of(attention)(q, k, tables)
        lengths.append([x.norm(dim=-1).mean().item() for x in (q, k)])
    assert [wiring_of(layer.self_attn).qk_norm.rope is None for layer in model.model.layers] == [False, True]
    for length in lengths:
        assert length == pytest.approx([12.0, 4.0], rel=1e-4)  # 3·√16, and √16


def test_an_error_while_it_is_put_in_leaves_the_model_as_it_was():
    model = llama()
    before, keys = logits(model), list(model.state_dict())
    last = model.model.layers[1].self_attn
    last.scaling = torch.tensor(last.scaling)  # as an attention that computes its scale
    with pytest.raises(ValueError, match="LlamaAttention has no softmax scale that can be set; leave softmax_scale"):
        hf.add_qk_norm(model, "l2", freeze=True)
    assert list(model.state_dict()) == keys and torch.equal(logits(model), before)
    assert attention_names(model) == [] and all(p.requires_grad for p in model.parameters())
    assert model.model.layers[0].self_attn.scaling == 0.25


def test_calibration_takes_any_keywords_of_a_call():
    hf.add_qk_norm(model := llama(), calibrate={**CALIBRATION, "use_cache": False})
    hf.add_qk_norm(other := llama(), calibrate=CALIBRATION)
    assert torch.equal(logits(model), logits(other))


def test_a_norm_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))  # forgets it again
    register_norm("hf_max")(lambda x: x / x.abs().amax(-1, keepdim=True))
    model = llama()
    with pytest.raises(ValueError, match="calibrate sets the weights of a built-in norm, and .* has none"):
        hf.add_qk_norm(model, "hf_max", calibrate=CALIBRATION)
    hf.add_qk_norm(model, "hf_max", place="after")
    q, _ = q_and_k(model, "", CALIBRATION)
    torch.testing.assert_close(q.abs().amax(-1), torch.ones(4, 4, 16))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.load(tmp_path).eval()), logits(model))


@compiler
def test_compiled_it_is_one_graph():
    model = llama(use_cache=False)
    hf.add_qk_norm(model, calibrate=CALIBRATION)
    expected, values = gradients(model), logits(model)
    model.compile(backend="aot_eager", fullgraph=True)
    assert error(logits(model), values.double()) < 1e-5
    for name, gradient in gradients(model).items():
        assert error(gradient, expected[name].double()) < 1e-4, name


def test_refusals_leave_the_model_as_it_was():
    model = llama()
    before, keys = logits(model), list(model.state_dict())
    for match, arguments in {
        r"give the name of a registered norm \(": {"norm": nn.LayerNorm},
        "give numbers, strings and truth values": {"multiplier": torch.ones(3)},
        'place is "before" or "after"; got \'middle\'': {"place": "middle"},
        "calibrate holds no batch": {"calibrate": []},
        r"LlamaForCausalLM did not run on the inputs given .*; give calibrate=\{": {"calibrate": {"ids": 3}},
        "calibrate got Tensor; give keywords of one call": {"calibrate": token_ids()},
        "calibrate got int; give keywords of one call": {"calibrate": 3},
        "softmax_scale='own'; give a positive number": {"softmax_scale": "own"},
        "softmax_scale=0; give a positive number": {"softmax_scale": 0},
        "softmax_scale=True; give a positive number": {"softmax_scale": True},
        "freeze='no'; give True or False": {"freeze": "no"},
        "add_qk_norm got head_dim, rope, which it reads from the model": {"head_dim": 3, "rope": None},
        "RMSNorm got eps='x'; give 0 or a small": {"eps": "x"},
        "over=5 does not divide": {"over": 5},
        "calibrate sets the weights of a built-in norm": {"weight": "none", "calibrate": CALIBRATION},
    }.items():
        with pytest.raises(ValueError, match=match):
            hf.add_qk_norm(model, **arguments)
        assert list(model.state_dict()) == keys and torch.equal(logits(model), before) and not attention_names(model)
    hf.add_qk_norm(model)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn \(LlamaAttention\) has QK-norm already: q_norm"):
        hf.add_qk_norm(model)
    with pytest.raises(ValueError, match="its QK-norm came by add_qk_norm and is one op with RoPE already"):
        hf.fuse(model)
    with pytest.raises(ValueError, match=r"\(Qwen3Attention\) has QK-norm already: q_norm, k_norm; nsphere.hf.fuse ma"):
        hf.add_qk_norm(with_qk_norm("qwen3"))
    with pytest.raises(ValueError, match=r"\(Llama4TextAttention\) has QK-norm already"):
        hf.add_qk_norm(with_qk_norm("llama4"))
    with pytest.raises(ValueError, match=r"\(BloomAttention\): it turns q and k in 0 calls"):
        hf.add_qk_norm(transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=64, n_head=4, n_layer=1)))
    with pytest.raises(ValueError, match=r"\(DeepseekV3Attention\)"):
        hf.add_qk_norm(make("DeepseekV3Config", "DeepseekV3ForCausalLM", {"first_k_dense_replace": 2}))
    with pytest.raises(ValueError, match="Linear holds no attention of transformers"):
        hf.add_qk_norm(nn.Linear(2, 2))
    for function in (hf.add_qk_norm, hf.remove_qk_norm, hf.fuse, hf.unfuse):
        with pytest.raises(ValueError, match=f"{function.__name__} takes a transformers model, got NoneType"):
            function(None)


def test_a_model_saved_without_is_not_loaded(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="was saved without add_qk_norm: its config has no nsphere_qk_norm; use from_pr"
    ):
        hf.load(tmp_path)


def test_what_is_not_whole_is_not_loaded(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*none, and as a name on the hub it can't be loaded"):
        hf.load(tmp_path / "none")
    with pytest.raises(ValueError, match="can't be loaded: Unrecognized model"):
        hf.load(tmp_path)
    model = llama()
    hf.add_qk_norm(model)
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(weights)
    lost = "model.layers.1.self_attn.k_norm.weight"
    save_file({name: t for name, t in tensors.items() if name != lost}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"is not whole: its weights lack {lost}; save the model again"):
        hf.load(tmp_path)
    save_file(tensors, weights, {"format": "pt"})
    assert torch.equal(logits(hf.load(tmp_path).eval()), logits(model))
    said = json.loads(config.read_text())
    for architectures, named in ((None, "no architecture"), (["Lama"], "Lama")):
        config.write_text(json.dumps(said | {"architectures": architectures}))
        with pytest.raises(ValueError, match=f"is of {named}, which is no class of transformers; give cls="):
            hf.load(tmp_path)
        assert torch.equal(logits(hf.load(tmp_path, type(model)).eval()), logits(model))
    config.write_text(json.dumps(said | {"nsphere_qk_norm": {"norm": "rms"}}))
    with pytest.raises(ValueError, match="is not whole: nsphere_qk_norm in its config.json must hold norm, place"):
        hf.load(tmp_path)


def test_the_config_is_json(tmp_path):
    model = llama()
    hf.add_qk_norm(model, "rms", weight="shared", softmax_scale=0.3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["nsphere_qk_norm"] == {
        "norm": "rms",
        "place": "before",
        "options": {"weight": "shared"},
        "softmax_scale": 0.3,
        "attentions": [
            {
                "names": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
                "head_dim": 16,
                "num_heads": 4,
                "num_kv_heads": 2,
                "layout": "bhsd",
                "rope": {"dim": 16, "layout": "half", "twice": None, "sign": 1},
            }
        ],
    }
