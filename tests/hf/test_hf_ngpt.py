"""nsphere.hf.modeling_ngpt against ngpt.py, and under what transformers does with a model."""

import math

import needs
import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from nsphere import hf  # noqa: E402
from nsphere.fold import fold  # noqa: E402
from nsphere.generate import Generation, Request, Sampling, generate  # noqa: E402
from nsphere.hypersphere import assert_on_hypersphere, max_norm_deviation, normalize_matrices_  # noqa: E402
from nsphere.optim import keep_on_hypersphere  # noqa: E402
from nsphere.presets import make_config, make_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

SHAPE = {"vocab_size": 31, "context": 24, "d_model": 24, "num_layers": 2, "num_heads": 4}
CASES = {
    "paper": ("ngpt", {}),
    "gqa": ("ngpt", {"num_kv_heads": 2, "head_dim": 8, "d_mlp": 40, "rope_base": 500.0}),
    "scalar": ("ngpt", {"eigen_lr": "scalar", "s_qk": "scalar", "s_uv": "scalar", "s_z": "scalar"}),
    "fixed": ("ngpt", {"eigen_lr": "fixed", "s_qk": "fixed", "s_uv": "fixed", "s_z": "fixed", "s_z_init": 5.0}),
    "no qk norm": ("ngpt", {"qk_norm": False, "softmax_scale": 0.7}),
    "nvidia": ("ngpt", {"convention": "nvidia"}),
    "llama": ("gpt", {}),
    "qwen3": ("gpt", {"qk_norm": "rms", "tied": True, "num_kv_heads": 1, "head_dim": 8}),
}
TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(1))


def make(case, **more):
    architecture, fields = CASES[case]
    torch.manual_seed(0)
    model = make_model(make_config(architecture, **SHAPE | fields | more))
    with torch.no_grad():
        for p in model.parameters():  # away from the start; a third of all scales negative, as α may be
            if p.dim() == 1:
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5) * torch.where(torch.rand_like(p) < 1 / 3, -1, 1))
        for name, p in model.named_parameters():  # logits with a spread
            if name == "head.scale.stored":
                p.mul_(10)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient(case):
    ours = make(case).double()
    theirs = hf.to_hf(ours)
    assert type(theirs).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(
        case, "NGPTForCausalLM"
    )
    # transformers' GPTs rotate in fp32, and a fixed 0.05 is fp32 with us
    close = {"rtol": 1e-5, "atol": 1e-6} if case in ("llama", "qwen3", "fixed") else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), **close)
    loss = theirs(TOKENS, labels=TOKENS).loss
    expected = F.cross_entropy(ours(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)  # their loss is fp32
    weight = torch.randn(2, 12, 31, dtype=torch.float64)
    (theirs(TOKENS).logits * weight).sum().backward()
    (ours(TOKENS) * weight).sum().backward()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(p.grad)
        for p in theirs.parameters():
            p.copy_(p.grad)
    gradients = dict(hf.from_hf(theirs).named_parameters())
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(gradients[name], p, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(case, tmp_path):
    ours = make(case)
    hf.to_hf(ours).save_pretrained(tmp_path)
    back = hf.from_hf(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert back.config == ours.config
    for (name, a), (other, b) in zip(ours.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)


@torch.no_grad()
def test_what_is_normalised_in_every_forward_pass_is_exported_normalised():
    ours = make("paper", projection="forward").double()
    for p in ours.parameters():
        p.mul_(1.3)
    theirs = hf.to_hf(ours)
    assert_on_hypersphere(theirs, 1e-12)
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=1e-9, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("case", ["paper", "gqa", "fixed", "nvidia"])
def test_autocast_and_bf16_weights_are_as_near_to_the_truth(case):
    ours, exact = make(case), make(case).double()(TOKENS)
    theirs = hf.to_hf(ours)
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = (ours(TOKENS) - exact).norm(), (theirs(TOKENS).logits - exact).norm()
    assert got <= 2 * plain
    plain = (ours.to(torch.bfloat16)(TOKENS) - exact).norm()
    logits = theirs.to(torch.bfloat16)(TOKENS).logits
    assert logits.dtype == torch.float32 and (logits - exact).norm() <= 2 * plain


def test_a_qk_norm_that_transformers_does_not_have_is_refused():
    for fields, message in (
        ({"qk_norm": "layer"}, "no model of this shape with qk_norm 'layer'"),
        ({"qk_norm": "rms", "norm_eps": 1e-5}, "no Qwen3, which has one eps for both"),
        ({"qk_norm": "rms", "qk_norm_over": "full"}, "no model of this shape with a QK-norm over 'full'"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.to_hf(make_model(make_config("gpt", **SHAPE, **fields)))


def test_models_of_others():
    shape = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(**shape, intermediate_size=24)
    model = transformers.LlamaForCausalLM(llama).eval()
    tokens = TOKENS % 11
    torch.testing.assert_close(hf.from_hf(model)(tokens), model(tokens).logits, rtol=1e-4, atol=1e-6)
    for change, message in (
        ({"attention_bias": True}, "has biases, which"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.from_hf(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=24, **change)))
    with pytest.raises(ValueError, match="GPT2Model is no model that nsphere has"):
        hf.from_hf(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
    for other in ("a path", llama):
        with pytest.raises(ValueError, match=f"{type(other).__name__} is no model that nsphere has"):
            hf.from_hf(other)
    with pytest.raises(ValueError, match="to_hf takes a GPT or NGPT of this library, got a LlamaForCausalLM"):
        hf.to_hf(model)
    with pytest.raises(ValueError, match="was folded, which its scales do not survive; give the one that it was made"):
        hf.to_hf(fold(make("paper")))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_gets_the_scale_and_the_mask(attention):
    ours = make("gqa")
    theirs = hf.to_hf(ours)
    theirs.set_attn_implementation(attention)
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=1e-4, atol=1e-5)
    out = theirs(TOKENS, output_hidden_states=True, output_attentions=attention == "eager")
    assert len(out.hidden_states) == 3
    for h in out.hidden_states:
        torch.testing.assert_close(h.norm(dim=-1), torch.ones(2, 12))
    if attention == "eager":
        weights = out.attentions[1]
        assert weights.shape == (2, 4, 12, 12) and weights.triu(1).abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_flex_attention():
    """Which transformers compiles, and this test for its time does not; it takes a head_dim of 16 and more."""
    ours = make("gqa", head_dim=16)
    theirs = hf.to_hf(ours)
    theirs.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        logits = theirs(TOKENS).logits
        drawn = greedy(theirs, max_new_tokens=4)
    torch.testing.assert_close(logits, ours(TOKENS), rtol=1e-4, atol=1e-5)
    assert drawn == [row[:4] for row in our_greedy(ours)]


@torch.no_grad()
def test_an_attention_of_ones_own_is_told_everything():
    seen = {}

    def attend(module, q, k, v, mask, scaling, **kwargs):
        seen.update(q=q, k=k, scaling=scaling, is_causal=module.is_causal)
        return v.repeat_interleave(module.num_key_value_groups, 1).transpose(1, 2), None

    transformers.AttentionInterface.register("of_ones_own", attend)
    theirs = hf.to_hf(make("gqa"))
    assert theirs._supports_attention_backend
    theirs.set_attn_implementation("of_ones_own")
    theirs(TOKENS)
    assert seen["scaling"] == math.sqrt(8) and seen["is_causal"]
    assert seen["q"].shape == (2, 4, 12, 8) and seen["k"].shape == (2, 2, 12, 8)
    torch.testing.assert_close(seen["k"].norm(dim=-1), torch.ones(2, 2, 12))


@torch.no_grad()
def test_padding_on_either_side_changes_nothing():
    theirs = hf.to_hf(make("paper").double())
    alone = theirs(TOKENS[:1, :7]).logits[0]
    pad = torch.zeros(1, 5, dtype=torch.long)
    for tokens, mask, kept in (
        (torch.cat((pad, TOKENS[:1, :7]), 1), [0] * 5 + [1] * 7, slice(5, None)),
        (torch.cat((TOKENS[:1, :7], pad), 1), [1] * 7 + [0] * 5, slice(0, 7)),
    ):
        logits = theirs(tokens, attention_mask=torch.tensor([mask])).logits[0, kept]
        torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-11)
    # and it matters: positions that begin at 5 give other logits
    shifted = theirs(TOKENS[:1, :7], position_ids=torch.arange(5, 12)[None]).logits[0]
    assert (shifted - alone).abs().max() > 1e-3


PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


def greedy(theirs, **options):
    """What transformers makes of both prompts side by side, the shorter one padded on its left."""
    tokens = torch.tensor([PROMPTS[0], [0, 0, 0, *PROMPTS[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0} | options
    return theirs.generate(tokens, attention_mask=mask, **options)[:, 5:].tolist()


def our_greedy(ours, **options):
    """What nsphere makes of both side by side, without padding."""
    drawn = [[] for _ in PROMPTS]
    for tokens in Generation(fold(ours), [Request(p, 15, Sampling(0.0)) for p in PROMPTS], **options):
        for row, token in tokens.items():
            drawn[row].append(token)
    return drawn


@pytest.mark.parametrize("case", ["paper", "gqa", "nvidia", "llama", "qwen3"])
def test_greedy_generation_is_ours_token_for_token(case):
    ours = make(case).double()  # fp64: no ties that rounding could break
    theirs, expected = hf.to_hf(ours), our_greedy(ours)
    assert our_greedy(ours, grow=False) == expected
    for cache in ("dynamic", "static"):
        assert greedy(theirs, cache_implementation=cache) == expected, cache
    assert len(set(expected[0])) > 1 and expected[0] != expected[1]


def caches(config):
    """One of every class in transformers that can hold an nGPT's keys and values unrounded."""
    known = transformers.cache_utils
    layers = [known.DynamicLayer, lambda: known.DynamicSlidingWindowLayer(sliding_window=64)]
    layers += [known.DynamicIndexedLayer] if hasattr(known, "DynamicIndexedLayer") else []
    yield known.DynamicCache()
    yield known.DynamicCache(config=config)
    yield known.StaticCache(config=config, max_cache_len=40)
    for layer in layers:
        yield known.Cache(layer_class_to_replicate=layer)


def test_every_cache_makes_the_same_tokens():
    ours = make("gqa").double()
    theirs, expected = hf.to_hf(ours), our_greedy(ours)
    for cache in caches(theirs.config):
        assert greedy(theirs, past_key_values=cache, max_new_tokens=6) == [row[:6] for row in expected], cache
    for name in ("sliding_window", "hybrid", "hybrid_chunked"):  # older names of the static one
        assert greedy(theirs, cache_implementation=name) == expected, name


def test_continuous_batching_makes_the_same_tokens():
    """More requests than a step has room for, prompts read in parts, and a beginning that two of them share."""
    kind = getattr(transformers, "ContinuousBatchingConfig", None)
    if kind is None:
        pytest.skip("this transformers has no ContinuousBatchingConfig")
    ours = make("gqa").double()
    theirs = hf.to_hf(ours)
    prompts = [[*PROMPTS[0], 9, 2, 6], [*PROMPTS[0], 8], *PROMPTS]
    expected = [list(generate(fold(ours), prompt, 6, Sampling(0.0))) for prompt in prompts]
    drawn = theirs.generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1),
        # without these numbers the cache is nine tenths of the machine's memory
        continuous_batching_config=kind(num_blocks=8, page_size=4, max_batch_tokens=8),
        progress_bar=False,
    )
    assert [row.generated_tokens for row in drawn.values()] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "paper"},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 2, "cache_implementation": "static"},
    ],
    ids=lambda options: " ".join(options),
)
def test_drafts_and_chunks_make_the_same_tokens(options):
    """Drafted by the prompt, by another model or by the first layer: what is accepted is what the model says itself."""
    ours = make("gqa").double()
    theirs = hf.to_hf(ours)
    if "assistant_model" in options:
        options = {"assistant_model": hf.to_hf(make("paper", num_layers=1).double())}
    prompt = torch.tensor(PROMPTS[:1])
    made = theirs.generate(prompt, max_new_tokens=15, do_sample=False, pad_token_id=0, **options)
    assert made[0, 5:].tolist() == our_greedy(ours)[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_makes_the_same_tokens(attention):
    ours = make("gqa")
    theirs = hf.to_hf(ours)
    theirs.set_attn_implementation(attention)
    assert greedy(theirs) == our_greedy(ours)


@needs.compiler
def test_our_compiled_steps_make_the_same_tokens():
    ours = make("gqa", num_layers=1)
    assert our_greedy(ours, compile=True) == greedy(hf.to_hf(ours))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves layers to a GPU and back")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_make_the_same_tokens(cache):
    ours = make("gqa").double()
    theirs = hf.to_hf(ours).cuda()
    made = theirs.generate(
        torch.tensor([PROMPTS[0]], device="cuda"), max_new_tokens=15, do_sample=False, cache_implementation=cache
    )
    assert made[0, 5:].tolist() == our_greedy(ours)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be used")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_are_transformers_own_error_on_a_cpu(cache):
    with pytest.raises((AssertionError, RuntimeError), match="(?i)cuda|nvidia"):
        greedy(hf.to_hf(make("gqa")), cache_implementation=cache)


def relative_error(theirs, config):
    """Of the logits of 15 greedy tokens through a quantized cache."""

    def logits(**options):
        out = theirs.generate(
            torch.tensor(PROMPTS[:1]),
            max_new_tokens=15,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        return torch.stack(out.logits)

    exact = logits()
    made = logits(cache_implementation="quantized", cache_config=config)
    return ((made - exact).norm() / exact.norm()).item()


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache"
)
@pytest.mark.parametrize("case", ["paper", "nvidia"])
def test_a_cache_in_fp8_gives_nearly_the_same_logits(case):
    assert 1e-4 < relative_error(hf.to_hf(make(case)), {"backend": "fp8"}) < 0.02


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_a_quantized_cache_gives_nearly_the_same_logits(backend, package):
    pytest.importorskip(package)
    theirs = hf.to_hf(make("paper"))
    errors = []
    for nbits in (4, 2):
        # groups, of 64 numbers if not given, must divide heads · head_dim, which here is 24
        config = {"backend": backend, "nbits": nbits, "residual_length": 4, "q_group_size": 24}
        errors.append(relative_error(theirs, config))
    assert 1e-4 < errors[0] < 0.05 and 2 * errors[0] < errors[1] < 0.5, errors


def test_generation_without_cache_with_beams_and_samples():
    theirs = hf.to_hf(make("paper"))
    greedy = theirs.generate(TOKENS[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = theirs.generate(TOKENS[:1, :4], max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(greedy, plain)
    beams = theirs.generate(TOKENS[:1, :4], max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)

    def likelihood(tokens):
        with torch.no_grad():
            log_p = theirs(tokens).logits.log_softmax(-1)
        return log_p[0, 3:-1].gather(-1, tokens[0, 4:, None]).sum().item()

    assert likelihood(beams) >= likelihood(greedy) - 1e-4
    assert theirs.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=True, top_k=5, pad_token_id=0).shape == (2, 7)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = hf.to_hf(make("paper").double()).train()
        if checkpointing:
            # its new name within transformers 5
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        calls = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(TOKENS, labels=TOKENS).loss.backward()
        assert len(calls) == 1 + checkpointing
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_fresh_model_is_on_the_sphere_and_loading_leaves_every_bit(tmp_path):
    torch.manual_seed(0)
    config = hf.NGPTConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert isinstance(model, hf.NGPTForCausalLM)
    assert_on_hypersphere(model)
    assert model.model.layers[1].self_attn.s_qk.stored.unique().item() == pytest.approx(1 / 4)
    # 14 KB of weights in shards of 6 KB, with an index
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, hf.NGPTModel)
    torch.testing.assert_close(body(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convention": "papr"}, "choose paper or nvidia"),
        ({"s_qk": "matrix"}, "choose vector, scalar or fixed"),
        ({"hidden_size": 20, "num_attention_heads": 4}, "head_dim is 5; .* choose an even number"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_attention_heads": 3}, "hidden_size 256 is not divisible by num_attention_heads 3; choose a divisor"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"softmax_scale": -1}, "softmax_scale must be a positive number, got -1"),
        ({"s_z_scale": 0.0}, "s_z_scale must be a positive number, got 0.0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"sliding_window": 4}, "sliding_window is 4, which nGPT does not have; leave it out"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is .*, which nGPT does not have"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is .*, which nGPT does not have"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, which nGPT does not have"),
    ],
)
def test_a_config_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        hf.NGPTConfig(**change)


def test_weights_that_belong_to_another_model(tmp_path):
    """Paper and nvidia have the same names and shapes, so that torch alone would load one into the other."""
    state = hf.to_hf(make("nvidia")).state_dict()
    model = hf.to_hf(make("paper"))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    for found in (state, torch.load(tmp_path / "weights.pt")):
        with pytest.raises(ValueError, match="are of convention 'nvidia' and the model is of 'paper', .* make it with"):
            model.load_state_dict(found)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for name, change, message in (
        ("lm_head.weight", None, r'Missing key\(s\) in state_dict: "lm_head.weight"'),
        ("lm_head.bias", torch.ones(31), r'Unexpected key\(s\) in state_dict: "lm_head.bias"'),
        ("lm_head.weight", torch.ones(30, 24), r"size mismatch for lm_head.weight: .*\[30, 24\]"),
    ):
        changed = {n: t for n, t in (state | {name: change}).items() if t is not None}
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(changed)
    other = hf.to_hf(make("nvidia", eigen_lr_init=0.05))
    other.load_state_dict(state)
    assert torch.equal(other(TOKENS).logits, hf.to_hf(make("nvidia"))(TOKENS).logits)


class Batches(torch.utils.data.Dataset):
    """Row i is the same whatever the loader."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        tokens = torch.randint(31, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def train(model, folder, callbacks, **changes):
    pytest.importorskip("accelerate")
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    arguments = transformers.TrainingArguments(str(folder), **options | changes)
    trainer = transformers.Trainer(model, arguments, train_dataset=Batches(), callbacks=callbacks)
    trainer.train()
    return trainer


def test_the_trainer_trains_as_we_do(tmp_path):
    ours = make("paper")
    normalize_matrices_(ours)
    theirs = hf.to_hf(ours)
    train(theirs, tmp_path, [hf.SphereCallback()])
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    keep_on_hypersphere(ours, optimizer)
    data = Batches()
    for step in range(6):
        rows = torch.stack([data[i]["input_ids"] for i in range(4 * step, 4 * step + 4)])
        ours.loss(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_on_hypersphere(theirs)
    start = dict(make("paper").named_parameters())
    for name, p in hf.from_hf(theirs).named_parameters():
        trained = dict(ours.named_parameters())[name]
        moved = (trained - start[name]).norm()
        assert (p - trained).norm() < 0.01 * moved, name


def test_without_the_callback_the_matrices_leave_the_sphere(tmp_path):
    theirs = hf.to_hf(make("paper"))
    train(theirs, tmp_path, [])
    assert max_norm_deviation(theirs).value > 1e-4
    trainer = train(theirs, tmp_path, [hf.SphereCallback()])  # which projects at once
    assert_on_hypersphere(theirs)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert not inner._optimizer_step_post_hooks  # and leaves nothing behind


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora_leaves_the_base_on_the_sphere_and_its_sum_not(tmp_path):
    peft = pytest.importorskip("peft")
    base = hf.to_hf(make("paper"))
    normalize_matrices_(base)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    train(model, tmp_path, [], learning_rate=1e-2, max_steps=12)
    assert_on_hypersphere(model)
    for name, p in model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    adapted = model(TOKENS).logits.detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, adapted, rtol=1e-3, atol=1e-3)
    deviation = max_norm_deviation(merged).value
    assert deviation > 1e-3  # W + BA has rows of any length
    normalize_matrices_(merged)
    changed = (merged(TOKENS).logits - adapted).norm() / adapted.norm()
    assert 1e-5 < changed < deviation * 10  # projecting the sum is another function, if a near one


def test_the_callback_refuses_a_model_without_sphere_matrices(tmp_path):
    with pytest.raises(ValueError, match="no module of this model says that a matrix belongs on the sphere"):
        train(hf.to_hf(make("llama")), tmp_path, [hf.SphereCallback()])
