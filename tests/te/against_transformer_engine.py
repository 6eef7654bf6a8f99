"""nsphere.te against Transformer Engine's own Python, on a CPU: run by hand, not by pytest.

    pip download --no-deps transformer-engine==2.20.2     # 1.2 MB of Python; its CUDA extension is another package
    python tests/te/against_transformer_engine.py transformer_engine-2.20.2-py3-none-any.whl

Transformer Engine's modules are imported with their CUDA extension replaced by a mock, "cuda" by "cpu", and what they
compute in CUDA (products, norms, activations) by torch; constructors, parameters, state dicts, the splitting and
interleaving of q, k and v, where norm and rotation come, masks, windows, packed sequences, residuals and unfused
attention are their own code. Needs NVTE_TORCH_COMPILE=0 and the like, which it sets itself.
"""

import enum
import importlib.machinery
import inspect
import itertools
import os
import runpy
import sys
import tempfile
import types
import warnings
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

os.environ |= {"NVTE_TORCH_COMPILE": "0", "NVTE_BIAS_DROPOUT_FUSION": "0", "TORCHDYNAMO_DISABLE": "1"}

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import nsphere
from nsphere import te as ours


def package(name, path, module=types.ModuleType):
    made = module(name)
    made.__path__ = [path]
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = made
    return made


class MockedPackage(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return getattr(self, name)


class CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == 0 or str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def mocked_extension():
    extension = MagicMock(name="transformer_engine_torch")
    types_ = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
    extension.DType = enum.IntEnum("DType", types_, start=0)
    gemms = [f"GEMM{i}_{what}" for i in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")]
    extension.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", gemms, start=0)
    grads = [f"GRAD_{what}{i}" for i in (1, 2, 3) for what in ("OUTPUT", "INPUT")]
    extension.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", grads, start=0)
    backends = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    extension.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
    return extension


def import_transformer_engine(root):
    sys.modules |= {"transformer_engine_torch": mocked_extension(), "einops": MagicMock()}
    package("transformer_engine", root).common = package("transformer_engine.common", f"{root}/common", MockedPackage)
    pytorch = package("transformer_engine.pytorch", f"{root}/pytorch")
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=1, name="", total_memory=1)
    torch.cuda.get_device_properties = lambda device=None: properties
    from transformer_engine.pytorch.torch_version import torch_version

    pytorch.torch_version = torch_version
    # the order of its own __init__: its modules import each other in circles
    from transformer_engine.pytorch import module, transformer
    from transformer_engine.pytorch.attention import dot_product_attention, multi_head_attention, rope
    from transformer_engine.pytorch.ops.basic.l2normalization import L2Normalization

    theirs = types.SimpleNamespace(
        MultiheadAttention=multi_head_attention.MultiheadAttention,
        TransformerLayer=transformer.TransformerLayer,
        DotProductAttention=dot_product_attention.DotProductAttention,
        Linear=module.Linear,
        LayerNormLinear=module.LayerNormLinear,
        LayerNormMLP=module.LayerNormMLP,
    )
    compute_in_torch(theirs, module, L2Normalization)
    fused = rope.apply_rotary_pos_emb
    multi_head_attention.apply_rotary_pos_emb = lambda *args, **kwargs: fused(*args, **kwargs | {"fused": False})
    theirs.DotProductAttention.forward = unfused(dot_product_attention)
    return theirs


def compute_in_torch(theirs, module, L2Normalization):
    def project(self, x, **_):
        weight = torch.cat([getattr(self, name) for name in self.weight_names])
        bias = torch.cat([getattr(self, name) for name in self.bias_names]) if self.use_bias else x.new_empty(0)
        y = F.linear(x, weight, bias if self.apply_bias else None)
        return (y, bias) if self.return_bias else y

    def norm(self, x):
        factor = self.layer_norm_weight + (1 if self.zero_centered_gamma else 0)
        if self.normalization == "RMSNorm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * factor
        return F.layer_norm(x, x.shape[-1:], factor, self.layer_norm_bias, self.eps)

    def norm_and_project(self, x, **_):
        normed = norm(self, x)
        y = project(self, normed)
        out = (*(y if isinstance(y, tuple) else (y,)), *((normed,) if self.return_layernorm_output else ()))
        return out if len(out) > 1 else out[0]

    def mlp(self, x, **_):
        normed = norm(self, x)
        h = F.linear(normed, self.fc1_weight, self.fc1_bias if self.use_bias else None)
        if self.activation == "swiglu":
            gate, value = h.chunk(2, -1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h, approximate="tanh")
        y = F.linear(h, self.fc2_weight, self.fc2_bias if self.apply_bias else None)
        rest = (*((self.fc2_bias,) if self.return_bias else ()), *((normed,) if self.return_layernorm_output else ()))
        return (y, *rest) if rest else y

    def root(self, x, mean):
        squares = x.square().mean(-1, keepdim=True) if mean else x.square().sum(-1, keepdim=True)
        return x * torch.rsqrt(squares + self.eps)

    def gamma(self):
        return self.weight + (1 if self.zero_centered_gamma else 0)

    theirs.Linear.forward, theirs.LayerNormLinear.forward, theirs.LayerNormMLP.forward = project, norm_and_project, mlp
    module.RMSNorm.forward = lambda self, x: root(self, x, True) * gamma(self)
    module.LayerNorm.forward = lambda self, x: F.layer_norm(x, x.shape[-1:], gamma(self), self.bias, self.eps)
    L2Normalization.forward = lambda self, x: root(self, x, False)


def unfused(dot_product_attention):
    """A forward of its DotProductAttention that always takes its own unfused backend."""
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as whole

    def pad(t, ends, length):
        rows = [F.pad(part, (0, 0, 0, 0, 0, length - len(part))) for part in t.split(ends.diff().tolist())]
        return torch.stack(rows)

    def unpad(t, ends, *_):
        return torch.cat([t[i, :n] for i, n in enumerate(ends.diff().tolist())])

    for holder in (backends, utils):
        for name, function in (("ConvertTHDtoBSHD", pad), ("ConvertBSHDtoTHD", unpad)):
            if hasattr(holder, name):
                setattr(holder, name, types.SimpleNamespace(apply=function))

    def forward(
        self, q=None, k=None, v=None, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None,
        qkv_layer=None, kv_layer=None, qkv_interleave_dim=-3, attn_mask_type=None, window_size=None,
        bottom_right_diagonal=None, **_,
    ):  # fmt: skip
        q, k, v, _ = whole._unpack_packed_qkv(qkv_layer, kv_layer, q, k, v, qkv_format, qkv_interleave_dim, None)
        longest = {}
        if qkv_format == "thd":
            longest = {"max_seqlen_q": int(cu_seqlens_q.diff().max()), "max_seqlen_kv": int(cu_seqlens_kv.diff().max())}
        return self.unfused_attention(
            {}, q.contiguous(), k.contiguous(), v.contiguous(), qkv_layout="_".join([qkv_format] * 3),
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, attn_mask_type=attn_mask_type,
            attention_mask=attention_mask, window_size=window_size, bottom_right_diagonal=bottom_right_diagonal,
            **longest,
        )  # fmt: skip

    return forward


def check_signatures(theirs):
    for name, cls in vars(theirs).items():
        for method in ("__init__", "forward") if name in ("MultiheadAttention", "TransformerLayer") else ("__init__",):
            of_theirs = inspect.signature(getattr(cls, method)).parameters
            of_ours = inspect.signature(getattr(getattr(ours, name), method)).parameters
            of_ours = {n: p for n, p in of_ours.items() if p.kind is not p.KEYWORD_ONLY}
            assert list(of_theirs) == list(of_ours), f"{name}.{method}"
            for n, p in of_theirs.items():
                assert n == "device" or p.default == of_ours[n].default, f"{name}.{method}: {n}"


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (1 if p.dim() == 1 else 0))


def run(module, x, *args, **kwargs):
    x = x.clone().requires_grad_()
    y = module(x, *args, **kwargs)
    parameters = dict(module.named_parameters())
    probe = torch.linspace(-1, 1, y.numel()).view_as(y)
    grads = torch.autograd.grad((y * probe).sum(), [x, *parameters.values()])
    return {"y": y} | dict(zip(["x", *parameters], grads, strict=True))


def check(cls, mine, args, call=(), **kwargs):
    """State dicts agree and go both ways; outputs and every gradient agree."""
    their_module, our_module = cls(*args, **kwargs), mine(*args, **kwargs)
    randomize(their_module)
    state = their_module.state_dict()
    assert list(state) == list(our_module.state_dict()) or set(state) == set(our_module.state_dict())
    our_module.load_state_dict(state)
    their_module.load_state_dict(our_module.state_dict())
    call_args, call_kwargs = call
    a, b = run(their_module, *call_args, **call_kwargs), run(our_module, *call_args, **call_kwargs)
    for name, expected in a.items():
        error, scale = (expected - b[name]).abs().max().item(), expected.abs().max().item()
        assert error <= 2e-5 * max(scale, 0.1), f"{name}: {error:.3g} of {scale:.3g}"
    return 1


def main(wheel):
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        with CudaIsCpu(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = import_transformer_engine(f"{folder}/transformer_engine")
            run_script(theirs)
            torch.set_default_dtype(torch.float64)
            torch.manual_seed(0)
            compare(theirs)


def run_script(theirs):
    """The script that test_te_script.py runs on nsphere.te, on Transformer Engine's own Python, in fp32."""
    from transformer_engine.pytorch.quantization import autocast

    vars(sys.modules["transformer_engine.pytorch"]).update(vars(theirs), autocast=autocast)
    script = Path(__file__).with_name("script_for_transformer_engine.py")
    has_cuda, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    read = runpy.run_path(str(script))
    torch.cuda.is_available = has_cuda
    read["main"]()


def compare(theirs):
    check_signatures(theirs)
    print("signatures: the same names, order and defaults")
    x, encoder = torch.randn(6, 2, 16), torch.randn(7, 2, 16)
    common = {"attention_dropout": 0.0, "device": "cpu", "params_dtype": torch.float64}

    def attention(*args, call=None, **kwargs):
        kwargs = common | kwargs
        if kwargs.get("attention_type") == "cross":
            call = {"encoder_output": encoder} | (call or {})
        return check(theirs.MultiheadAttention, ours.MultiheadAttention, (16, 2), (args or (x,), call or {}), **kwargs)

    booleans = [False, True]
    count = 0
    for kind, before, fused, interleaved, groups, norm, cross, pairs, bias in itertools.product(
        [None, "L2Normalization", "RMSNorm", "LayerNorm"], booleans, booleans, booleans, [4, 2], *[booleans] * 4
    ):
        count += check(
            theirs.MultiheadAttention, ours.MultiheadAttention, (16, 4),
            ((x,), {"rotary_pos_emb": ours.RotaryPositionEmbedding(4, interleaved=pairs)(9).double()}
             | ({"encoder_output": encoder} if cross else {})),
            **common, kv_channels=8, num_gqa_groups=groups, qk_norm_type=kind, qk_norm_before_rope=before,
            fuse_qkv_params=fused, qkv_weight_interleaved=interleaved, input_layernorm=norm,
            attention_type="cross" if cross else "self", rotary_pos_interleaved=pairs, bias=bias,
            attn_mask_type="no_mask" if cross else "causal",
        )  # fmt: skip
    print(f"attention: {count} configurations")

    count = 0
    for kind, window in itertools.product(("causal", "causal_bottom_right", "no_mask"), (None, (1, 0), (2, 1))):
        if kind == "no_mask" or window != (2, 1):
            count += attention(attention_type="cross", attn_mask_type=kind, window_size=window)
    padded = [torch.arange(n)[None] >= torch.tensor(ends)[:, None] for n, ends in ((6, [4, 6]), (7, [5, 3]))]
    masks, ends = tuple(p[:, None, None] for p in padded), torch.tensor([0, 5, 12], dtype=torch.int32)
    rotary = ours.RotaryPositionEmbedding(4)(9).double()
    for kind in ("padding", "padding_causal", "padding_causal_bottom_right"):
        count += attention(x, masks, attention_type="cross", attn_mask_type=kind)
        packed = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "rotary_pos_emb": rotary}
        count += attention(x.flatten(0, 1), call=packed, attn_mask_type=kind, qkv_format="thd", qk_norm_type="RMSNorm")
    mask = torch.rand(2, 2, 6, 6) < 0.4
    mask[..., 0] = False
    count += attention(x, mask, attn_mask_type="arbitrary")
    for table in (rotary, torch.randn(9, 1, 1, 4)):
        count += attention(x.transpose(0, 1).contiguous(), call={"rotary_pos_emb": table}, qkv_format="bshd")
    print(f"masks, windows, layouts: {count} configurations")

    count = 0
    for norm, activation, bias, fused, style in itertools.product(
        ("LayerNorm", "RMSNorm"), ("gelu", "swiglu"), booleans, booleans,
        ({}, {"apply_residual_connection_post_layernorm": True}, {"output_layernorm": True},
         {"parallel_attention_mlp": True}, {"layer_type": "decoder"}, {"zero_centered_gamma": True}),
    ):  # fmt: skip
        count += check(
            theirs.TransformerLayer, ours.TransformerLayer, (16, 24, 2),
            ((x,), {"encoder_output": encoder} if "layer_type" in style else {}),
            **common, hidden_dropout=0.0, normalization=norm, activation=activation, bias=bias, fuse_qkv_params=fused,
            qk_norm_type="RMSNorm", **style,
        )  # fmt: skip
    print(f"layers: {count} configurations")

    for place in ("before", "after"):
        own = nsphere.QKNorm("rms", head_dim=8, place=place, weight="per_head", num_heads=2, softmax_scale=0.7)
        with torch.no_grad():
            for p in own.parameters():
                p.normal_()
        their_module = theirs.MultiheadAttention(16, 2, **common)
        randomize(their_module)
        our_module = ours.MultiheadAttention(16, 2, qk_norm_type=own, **common)
        our_module.load_state_dict(their_module.state_dict(), strict=False)
        ours.install(their_module, own)
        y, expected = (m(x, rotary_pos_emb=rotary) for m in (their_module, our_module))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    print("install: before and after RoPE")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
