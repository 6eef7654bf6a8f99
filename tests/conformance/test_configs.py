"""hf.qk_norm of a config is that of its attention, or is refused: nothing is guessed."""

import dataclasses
import sys
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from hf_attentions import REPORT, make_config, make_module  # noqa: E402
from hf_cases import CASES  # noqa: E402

from nsphere import families, hf  # noqa: E402
from nsphere.norms import StatisticNorm  # noqa: E402

transformers.logging.set_verbosity_error()
# unlike any default, so that a number read from the wrong place shows
EPS = {"rms_norm_eps": 3e-3, "layer_norm_eps": 2e-3, "norm_eps": 4e-3}
THETA = 54321.0


def said(qk):
    """Everything a QKNorm is made of."""
    norms = [norm.spec if isinstance(norm, StatisticNorm) else type(norm) for norm in (qk.q_norm, qk.k_norm)]
    shapes = [tuple(p.shape) for p in qk.parameters()]
    names = ("rope", "over", "place", "multiplier", "k_multiplier", "head_dim", "num_heads", "num_kv_heads")
    scale = pytest.approx(qk.softmax_scale)
    return {"norms": norms, "shapes": shapes, "scale": scale, **{name: getattr(qk, name) for name in names}}


def with_theta(config):
    """The same config with another θ, told apart by kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for n, each in enumerate(nested or [parameters]):
        if "rope_theta" in each:
            each["rope_theta"] = THETA + n
    return config


def from_config(config, **options):
    try:
        return hf.qk_norm(config, **options)
    except ValueError as refusal:
        assert str(refusal).startswith("no QK-norm can be read from ") and "; " in str(refusal)
        return None


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_config_says_what_its_attention_does_or_is_refused(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' configs, which are tiny on purpose
        case = dataclasses.replace(case, options={**case.options, **EPS})
        config = with_theta(make_config(case))
        module = make_module(case, config, torch.float32)
    expected = said(hf.qk_norm(module))
    layer = getattr(module, "layer_idx", None)
    anyone, this = from_config(config), from_config(config, layer_idx=layer)
    for got in (anyone, this):
        assert got is None or said(got) == expected
    if this is not None and case.family not in ("sapiens2", "gemma4_vision"):
        parameters = getattr(config, "rope_parameters", None) or {}
        assert this.rope is None or not parameters or this.rope.base in (THETA, THETA + 1)
    answer = "read" if anyone is not None else "with layer_idx" if this is not None else "refused"
    REPORT.setdefault("configs", []).append(f"{case.family:28s} {case.name.split(':')[1]:44s} {answer}")


TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}


def tiny(name, **options):
    return getattr(transformers, name)(**{**TINY, **options})


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("CohereConfig", "use_qk_norm"),
        ("Glm4MoeConfig", "use_qk_norm"),
        ("StableLmConfig", "qk_layernorm"),
        ("PhiConfig", "qk_layernorm"),
        ("InternVLVisionConfig", "use_qk_norm"),
    ],
)
def test_a_switch_that_is_off_is_read(name, switch):
    with pytest.raises(ValueError, match=f"{name}: {switch} is False; its QK-norm is switched off; {switch}=True"):
        hf.qk_norm(tiny(name))
    assert hf.qk_norm(tiny(name, **{switch: True})).q_norm.weight is not None


def test_theta_is_read():
    assert hf.qk_norm(tiny("Qwen3Config", rope_theta=1e6)).rope.base == 1e6
    config = transformers.Gemma3TextConfig()
    with pytest.raises(ValueError, match="one rope_theta for all its layers is not in it; give layer_idx, rope_base="):
        hf.qk_norm(config)
    assert [hf.qk_norm(config, layer_idx=layer).rope.base for layer in (0, 5)] == [1e4, 1e6]
    assert hf.qk_norm(config, rope_base=5.0).rope.base == 5.0
    assert hf.qk_norm(config, rope=False).rope is None


def test_a_scaled_rope_is_refused():
    """Its angles, and DeepSeek's softmax scale with them, are not those of one base."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale_all_dim": 1.0, "mscale": 1.0}
    yarn["original_max_position_embeddings"] = 64
    for name, problem in (("Qwen3Config", "its RoPE is 'yarn'"), ("DeepseekV3Config", "softmax scale")):
        with pytest.raises(ValueError, match=f"{name}: .*{problem}.*give the attention module"):
            hf.qk_norm(tiny(name, rope_parameters=yarn))
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = tiny("DeepseekV3Config", rope_parameters=yarn, q_lora_rank=32, kv_lora_rank=32)
    attention = modeling.DeepseekV3Attention(config, 0)
    assert hf.qk_norm(attention).softmax_scale == attention.scaling != attention.qk_head_dim**-0.5


def test_composite_configs_stand_for_their_text_model():
    for name in ("Gemma3Config", "Qwen3VLConfig", "Llama4Config"):
        config = getattr(transformers, name)()
        got, text = hf.qk_norm(config, layer_idx=0), hf.qk_norm(config.text_config, layer_idx=0)
        assert said(got) == said(text) and got.head_dim == config.text_config.head_dim
    with pytest.raises(ValueError, match="no QK-norm can be read from .*: it is no family this version knows"):
        hf.qk_norm(transformers.InternVLConfig())  # its text model has none
    for name in ("Qwen3OmniMoeConfig", "T5Gemma2Config"):  # of several text models
        with pytest.raises(ValueError, match=f"{name}: it has no head_dim; give the config of its text model"):
            hf.qk_norm(getattr(transformers, name)())


def test_layers_that_differ_ask_for_the_layer():
    config = transformers.Gemma4TextConfig()
    with pytest.raises(ValueError, match="Gemma4TextConfig: its layers differ; give layer_idx, or the attention"):
        hf.qk_norm(config)
    assert hf.qk_norm(config, layer_idx=0).head_dim == 256
    with pytest.raises(ValueError, match="RoPE is 'proportional'"):
        hf.qk_norm(config, layer_idx=5)
    assert hf.qk_norm(config, layer_idx=5, rope=False).head_dim == 512
    with pytest.raises(ValueError, match="layer_idx is 99; give one from 0 to 29"):
        hf.qk_norm(config, layer_idx=99)
    with pytest.raises(ValueError, match="layer 0 is linear_attention; give a layer_idx of an attention"):
        hf.qk_norm(transformers.Qwen3NextConfig(), layer_idx=0)
    with pytest.raises(ValueError, match="layer 0 is no cross-attention"):
        hf.qk_norm(transformers.MllamaConfig().text_config, layer_idx=0)
    llama4 = transformers.Llama4TextConfig()
    assert llama4.no_rope_layers[2:4] == [1, 0] and hf.qk_norm(llama4, layer_idx=2).place == "after"
    with pytest.raises(ValueError, match="layers without RoPE have no norm and a multiplier"):
        hf.qk_norm(llama4, layer_idx=3)


@pytest.mark.parametrize(
    ("directory", "name", "window"),
    [
        ("exaone4", "Exaone4", 4),
        ("exaone4", "Exaone4", None),
        ("afmoe", "Afmoe", 4),
        ("afmoe", "Afmoe", None),
        ("flint", "Flint", 4),
    ],
)
def test_which_layers_turn(directory, name, window):
    modeling = pytest.importorskip(f"transformers.models.{directory}.modeling_{directory}")
    kinds = ["sliding_attention", "full_attention"] * 3
    config = tiny(f"{name}Config", sliding_window=window, layer_types=kinds, head_dim=16)
    for layer in (0, 1):
        module = hf.qk_norm(getattr(modeling, f"{name}Attention")(config, layer))
        assert hf.qk_norm(config, layer_idx=layer).rope == module.rope
    if window is not None:
        with pytest.raises(ValueError, match="some of its layers have no RoPE; give layer_idx, rope=True or rope=Fal"):
            hf.qk_norm(config)


@pytest.mark.parametrize("family", ["inkling", "muse_glimmer", "timesfm2_5", "longcat_flash", "mistral4"])
def test_a_multiplier_is_never_dropped(family):
    case = next(c for c in CASES if c.family == family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = make_config(case)
    with pytest.raises(ValueError, match="its attention multiplies q by .*; give the attention module in place of"):
        hf.qk_norm(config, layer_idx=0)


def test_norms_of_v_from_a_config():
    config = transformers.Gemma3nTextConfig(rms_norm_eps=0.5)
    norm = hf.v_norm(config)
    x = torch.randn(3, config.head_dim)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (config.head_dim,), eps=0.5))
    assert hf.v_norm(tiny("Qwen3Config")) is None
    with pytest.raises(ValueError, match="DeepseekV3Config has no norm 'q_a_layernorm'; give an attention module"):
        hf.latent_norm(tiny("DeepseekV3Config"), "q_a_layernorm")


def test_layers_that_take_the_keys_of_others_have_no_norm_of_k():
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    config = transformers.Gemma3nTextConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_hidden_layers=10,
        num_kv_shared_layers=5, layer_types=["full_attention"] * 10, intermediate_size=64,
    )  # fmt: skip
    attention = modeling.Gemma3nTextAttention(config, layer_idx=9)
    assert not hasattr(attention, "k_norm")
    nn.init.normal_(attention.q_norm.weight)
    qk = hf.qk_norm(attention, rope=False)
    assert qk.k_norm is None and qk.q_norm.weight is attention.q_norm.weight
    assert hf.v_norm(attention) is None or hasattr(attention, "v_norm")
    q, k = torch.randn(2, 3, 2, 32), torch.randn(2, 3, 1, 32)
    for rounding in ("family", "fused"):
        q_out, k_out = hf.qk_norm(attention, rope=False, rounding=rounding)(q, k)
        torch.testing.assert_close(q_out, attention.q_norm(q))
        assert torch.equal(k_out, k)
    with pytest.raises(ValueError, match="some of its layers take the keys of others; give the attention module"):
        hf.qk_norm(config, layer_idx=9)


def test_modules_whose_norm_is_switched_off():
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    with pytest.raises(ValueError, match="CohereAttention: it has no q_norm and no k_norm; its QK-norm is switched"):
        hf.qk_norm(cohere.CohereAttention(tiny("CohereConfig"), 0))
    internvl = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    with pytest.raises(ValueError, match="it has no q_norm and no k_norm; its QK-norm is switched off"):
        hf.qk_norm(internvl.InternVLVisionAttention(transformers.InternVLVisionConfig(hidden_size=64)))
    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = tiny("Llama4TextConfig", use_qk_norm=False, head_dim=16)
    with pytest.raises(ValueError, match="its QK-norm is switched off"):
        hf.qk_norm(llama4.Llama4TextAttention(config, 0))


def test_every_family_named_here_exists():
    source = sys.modules["nsphere.hf.qk_norm"]
    names = {*source._FAMILY_OF_CLASS.values(), *source._FAMILY_OF_MODEL_TYPE.values(), *source._EPS_OF_THE_CLASS}
    assert names | source._SLIDING_LAYERS_TURN <= families.FAMILIES.keys()
