"""fuse and unfuse: the same model with norm and RoPE of q and k as one op."""

import copy
import pickle
import sys

import pytest
import torch
from needs import compiler
from tolerances import error, floor
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_models import WITH_QK_NORM, gradients, llama, logits, token_ids, with_qk_norm  # noqa: E402
from transformers import AttentionInterface, StaticCache  # noqa: E402

from nsphere import hf  # noqa: E402
from nsphere.hf.fuse import _why_not, record_calls  # noqa: E402
from nsphere.hf.rewire import Wiring, wiring_of  # noqa: E402

families = pytest.mark.parametrize("family", WITH_QK_NORM)
LAYER = "model.layers.0.self_attn"


def attention(model) -> nn.Module:
    return model.model.layers[0].self_attn


def norm_weights(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if "norm" in name]


@families
def test_logits_are_the_same_bit_for_bit_in_the_familys_rounding(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = with_qk_norm(family, dtype)
        before, keys = logits(model), list(model.state_dict())
        report = hf.fuse(model, rounding="family")
        assert LAYER in report.replaced and wiring_of(attention(model)) is not None
        assert len(report.replaced) == (1 if family == "llama4" else 2)  # layers without RoPE too, where they normalise
        assert list(model.state_dict()) == keys
        assert torch.equal(logits(model), before)
        for weight in norm_weights(attention(model)):  # it is our op that ran, and it reads the model's weights
            with torch.no_grad():
                weight.mul_(1.5)
            assert not torch.equal(logits(model), before)


@families
def test_fused_rounding_is_nearer_to_the_exact_q_and_k(family):
    seen: list[torch.Tensor] = []

    def capture(module, q, k, v, *args, **kwargs):
        seen[:] = [q.double(), k.double()]
        return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3]), None

    AttentionInterface.register("nsphere_seen", capture)
    model = with_qk_norm(family, torch.bfloat16)
    module, calls = attention(model), record_calls(model, [LAYER], None)
    call = calls[module]
    module.config._attn_implementation = "nsphere_seen"

    def q_and_k(cast=lambda t: t):
        with torch.no_grad():
            module(*map(cast, call.args), **{k: cast(v) for k, v in call.kwargs.items()})
        return list(seen)

    def doubled(value):
        if isinstance(value, tuple):
            return tuple(map(doubled, value))
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def rms(x):
        return x.square().mean().sqrt().item()

    plain = q_and_k()
    hf.fuse(model)
    fused = q_and_k()
    # the projections' own rounding is not in question: they see what they gave in bf16
    given = {}
    for name in ("q_proj", "k_proj"):
        projection = getattr(module, name)
        with torch.no_grad():
            given[name] = projection(call.kwargs["hidden_states"])
        projection.register_forward_hook(lambda m, i, o, name=name: given[name].double())
    module.double()
    exact = q_and_k(doubled)
    for a, b, truth in zip(fused, plain, exact, strict=True):
        assert 0 < rms(a - truth) < 1.001 * rms(b - truth)


@families
def test_gradients_of_all_parameters(family):
    model = with_qk_norm(family)
    before, exact = gradients(model), gradients(copy.deepcopy(model).double())
    hf.fuse(model)
    after = gradients(model)
    assert after.keys() == before.keys() and {n for n, p in attention(model).named_parameters()} <= {
        n.removeprefix(LAYER + ".") for n in after
    }
    for name, gradient in after.items():
        allowed = floor(torch.float32) + 3 * error(before[name], exact[name])
        assert error(gradient, exact[name]) <= allowed, name


@families
def test_generation_is_token_identical(family):
    model, ids = with_qk_norm(family), token_ids(length=5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    def generated():
        dynamic = model.generate(ids, **options)
        static = model.generate(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20), **options)
        return dynamic, static

    before = generated()
    assert before[0].unique().numel() > 3 and torch.equal(*before)
    hf.fuse(model)
    for a, b in zip(generated(), before, strict=True):
        assert torch.equal(a, b)


def test_one_token_at_a_time_runs_the_models_own_code(monkeypatch):
    model, ids = with_qk_norm("qwen3", torch.bfloat16), token_ids(length=5)
    hf.fuse(model)
    lengths: list[int] = []
    call = Wiring.__call__

    def counted(self, q, k, tables):
        lengths.append(q.shape[2])
        return call(self, q, k, tables)

    monkeypatch.setattr(Wiring, "__call__", counted)
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert lengths == [5, 5]  # two attentions, the prompt alone
    with torch.no_grad():
        before = model(ids[:, :1]).logits
    assert lengths == [5, 5]
    one = model(ids[:, :1]).logits  # with gradients it is the fused op again
    assert lengths == [5, 5, 1, 1] and error(one, before.double()) < 0.02
    hf.unfuse(model)
    assert torch.equal(logits(model, ids[:, :1]), before)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "stablelm"])
def test_saved_it_loads_in_plain_transformers(family, tmp_path):
    model = with_qk_norm(family)
    before, keys = logits(model), list(model.state_dict())
    hf.fuse(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == keys and wiring_of(attention(loaded)) is None
    assert torch.equal(logits(loaded), before)


def test_unfuse_restores_the_models_own_code():
    model = with_qk_norm("qwen3")
    before, kind, own = logits(model), type(attention(model)), dict(vars(attention(model)))
    hf.fuse(model)
    assert type(attention(model)) is not kind and isinstance(attention(model), kind)
    assert "FusedQwen3Attention" in repr(model) and type(attention(model)).__name__ == kind.__name__
    assert hf.unfuse(model) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert type(attention(model)) is kind and vars(attention(model)) == own
    assert torch.equal(logits(model), before)
    assert hf.unfuse(model) == []


def test_fused_twice_is_fused_once_and_the_last_rounding_counts():
    model = with_qk_norm("qwen3", torch.bfloat16)
    before = logits(model)
    hf.fuse(model)
    fused = logits(model)
    assert not torch.equal(fused, before)
    report = hf.fuse(model, rounding="family")
    assert len(report.replaced) == 2 and not report.left
    assert torch.equal(logits(model), before)
    hf.fuse(model)
    assert torch.equal(logits(model), fused)
    hf.unfuse(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_fused_and_independent(duplicate):
    model = with_qk_norm("stablelm")
    hf.fuse(model)
    before = logits(model)
    twin = duplicate(model)
    assert wiring_of(attention(twin)) is not None and torch.equal(logits(twin), before)
    with torch.no_grad():
        for weight in norm_weights(attention(twin)):
            weight.zero_()
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    hf.unfuse(twin)
    assert wiring_of(attention(model)) is not None


def test_the_model_may_change_its_dtype_and_its_parameters_afterwards():
    model, other = with_qk_norm("qwen3"), with_qk_norm("qwen3")
    with torch.no_grad():
        for weight in norm_weights(other):
            weight.mul_(1.3)
    hf.fuse(model, rounding="family")
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits(model), logits(other))
    assert torch.equal(logits(model.bfloat16()), logits(other.bfloat16()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flex attention's own compilation
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_and_their_weights(implementation):
    model = with_qk_norm("qwen3", attn_implementation=implementation)
    before = logits(model)
    with torch.no_grad():
        weights = model(token_ids(), output_attentions=implementation == "eager").attentions
    hf.fuse(model)
    assert error(logits(model), before.double()) < 1e-5
    if implementation == "eager":
        with torch.no_grad():
            after = model(token_ids(), output_attentions=True).attentions
        assert len(after) == 2
        for a, b in zip(after, weights, strict=True):
            assert error(a, b.double()) < 1e-5


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_and_autocast():
    model = with_qk_norm("qwen3").train()
    hf.fuse(model)
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = gradients(model)
    for name, gradient in lower.items():
        assert gradient.dtype == torch.float32 and error(gradient, plain[name].double()) < 0.1, name


@compiler
def test_compiled_it_is_one_graph_and_the_same():
    model = with_qk_norm("qwen3", use_cache=False)
    plain = logits(model)
    hf.fuse(model)
    expected = gradients(model)
    model.compile(backend="aot_eager", fullgraph=True)
    assert error(logits(model), plain.double()) < 1e-5
    for name, gradient in gradients(model).items():
        assert error(gradient, expected[name].double()) < 1e-4, name


def test_the_report_says_what_and_why():
    report = hf.fuse(with_qk_norm("llama4"))
    assert list(report.replaced) == [LAYER] and list(report.left) == ["model.layers.1.self_attn"]
    assert str(report).splitlines() == [
        'norm and RoPE are one op (rounding="fused") in 1 attention(s):',
        "  model.layers.0.self_attn: Llama4TextAttention: llama4, RMS over each head after RoPE",
        "left as they are, 1:",
        "  model.layers.1.self_attn: Llama4TextAttention (llama4_nope) has no norm of both q and k per token",
    ]
    text = str(hf.fuse(with_qk_norm("qwen3")))
    assert "  model.layers.*.self_attn (2): Qwen3Attention: qwen3, RMS over each head before RoPE" in text


def test_what_has_nothing_to_fuse_is_an_error():
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM has nothing to fuse: LlamaAttention has no QK-norm that nsp"
    ):
        hf.fuse(llama())
    with pytest.raises(ValueError, match=r"Linear has nothing to fuse: it holds no attention of transformers"):
        hf.fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"its QK-norm is switched off \(nsphere.hf.add_qk_norm puts QK-norm"):
        hf.fuse(with_qk_norm("cohere", use_qk_norm=False))
    with pytest.raises(ValueError, match='rounding is "fused" or "family"; got \'fast\''):
        hf.fuse(with_qk_norm("qwen3"), rounding="fast")


def test_what_is_not_certain_is_left_as_it_is():
    model = with_qk_norm("qwen3")
    handle = attention(model).q_norm.register_forward_hook(lambda m, i, o: o)
    report = hf.fuse(model)
    assert report.left == {LAYER: "its q_norm has hooks, which would not be called any more"}
    handle.remove()
    # a norm that is not what the family's is: the check sees it
    attention(model).q_norm.forward = lambda x: x * 2
    before = logits(model)
    report = hf.fuse(model)
    assert "the check failed: its output changed by" in report.left[LAYER]
    assert type(attention(model)).__name__ == "Qwen3Attention" and wiring_of(attention(model)) is None
    hf.unfuse(model)
    assert torch.equal(logits(model), before)

    # nor may an error of an unusual kind leave one half done
    def fails(*args, **kwargs):
        raise IndexError("no such kernel")

    del attention(model).q_norm.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["nsphere.hf.fuse"], "_run", fails)
        with pytest.raises(ValueError, match="the check failed: IndexError: no such kernel"):
            hf.fuse(model)
    assert all(wiring_of(layer.self_attn) is None for layer in model.model.layers)
    # accelerate's way of putting itself in between
    attention(model).forward = attention(model).forward
    assert "its forward has been replaced" in hf.fuse(model).left[LAYER]


class Quantized(torch.Tensor):
    """A subclass of Tensor, as quantized weights are."""


def test_weights_that_are_sharded_or_quantized_are_left_alone(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    why = "the parameters of its q_norm are of a subclass of Tensor (sharded, or quantized)"
    model = with_qk_norm("qwen3")
    norm = attention(model).q_norm
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Quantized))
    before = logits(model)
    report = hf.fuse(model)
    assert report.left == {LAYER: why} and list(report.replaced) == ["model.layers.1.self_attn"]
    hf.unfuse(model)
    assert torch.equal(logits(model), before)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                whole = norm.weight.detach().as_subclass(torch.Tensor)
                norm.weight = nn.Parameter(distribute_tensor(whole, mesh, [Replicate()]))
        assert all(_why_not(layer.self_attn, ("q_norm", "k_norm")) == why for layer in model.model.layers)
        with pytest.raises(ValueError, match="did not run on example token ids"):  # which are no DTensors
            hf.fuse(model)
    finally:
        dist.destroy_process_group()


def test_models_that_cannot_be_checked_are_refused():
    with torch.device("meta"):
        model = with_qk_norm("qwen3")
    with pytest.raises(ValueError, match="weights on the meta device; load them before fusing"):
        hf.fuse(model)
    module = attention(with_qk_norm("qwen3"))
    with pytest.raises(ValueError, match=r"Qwen3Attention did not run on example token ids .*; give inputs=\{...\}"):
        hf.fuse(module)
    model = with_qk_norm("qwen3").train()
    model.model.layers[0].eval()
    hf.fuse(model)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
