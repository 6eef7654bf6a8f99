"""Masks, windows and lengths of nsphere.te's attention, against what a query may see said pair by pair."""

import pytest
import te_formula as formula
import torch

from nsphere import te

H, K, D = 4, 2, 8


def attend(T, S, *, kind, window=None, B=2, bottom=None, allowed, **kwargs):
    """The library's [B, H, T, D] and the formula's, where allowed(b, h, i, j)."""
    torch.manual_seed(0)
    q = torch.randn(B, T, H, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, S, K, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    module = te.DotProductAttention(
        H, D, K, qkv_format="bshd", attn_mask_type=kind, window_size=window, bottom_right_diagonal=bottom
    )
    y = module(q, k, v, **kwargs)
    expected = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen = [j for j in range(S) if allowed(b, h, i, j)]
                if seen:
                    logits = torch.stack([q[b, i, h] @ k[b, j, h // 2] for j in seen]) * D**-0.5
                    weights = logits.softmax(0)
                    expected[b, i, h] = sum(w * v[b, j, h // 2] for w, j in zip(weights, seen, strict=True))
    torch.testing.assert_close(y, expected.flatten(-2))
    probe = torch.randn_like(y)
    grads = torch.autograd.grad((y * probe).sum(), (q, k, v))
    truth = torch.autograd.grad((expected.flatten(-2) * probe).sum(), (q, k, v))
    for a, e in zip(grads, truth, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("T", "S"), [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("window", [None, (1, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["causal", "causal_bottom_right"])
def test_causal(kind, window, T, S):
    offset = S - T if kind == "causal_bottom_right" else 0
    left = S + T if window is None else window[0]
    attend(T, S, kind=kind, window=window, allowed=lambda b, h, i, j: i + offset - left <= j <= i + offset)


@pytest.mark.parametrize("bottom", [None, True, False])
@pytest.mark.parametrize("window", [(-1, -1), (1, 1), (0, 2), (2, -1)])
@pytest.mark.parametrize(("T", "S"), [(4, 4), (3, 5)])
def test_window_without_a_mask(T, S, window, bottom):
    offset = 0 if bottom is False else S - T
    left, right = (S + T if w < 0 else w for w in window)
    attend(
        T,
        S,
        kind="no_mask",
        window=window,
        bottom=bottom,
        allowed=lambda b, h, i, j: i + offset - left <= j <= i + offset + right,
    )


def padded(lengths, size):
    return torch.arange(size)[None] >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("given", ["mask", "lengths"])
@pytest.mark.parametrize("window", [None, (1, 0)])
@pytest.mark.parametrize("kind", ["padding", "padding_causal", "padding_causal_bottom_right"])
def test_padding(kind, window, given):
    T, S, q_lengths, k_lengths = 4, 6, [3, 4], [5, 2]
    if kind == "padding" and window is not None:
        window = (1, 2)
    left, right = window or (S, S)
    right = 0 if "causal" in kind else right

    def allowed(b, h, i, j):
        if i >= q_lengths[b] or j >= k_lengths[b]:
            return False
        offset = 0 if kind == "padding_causal" else k_lengths[b] - q_lengths[b]
        return (window is None and "causal" not in kind) or i + offset - left <= j <= i + offset + right

    if given == "mask":
        masks = tuple(padded(n, s)[:, None, None] for n, s in ((q_lengths, T), (k_lengths, S)))
        kwargs = {"attention_mask": masks}
    else:
        ends = [
            torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (q_lengths, k_lengths)
        ]
        kwargs = {"cu_seqlens_q": ends[0], "cu_seqlens_kv": ends[1]}
    attend(T, S, kind=kind, window=window, allowed=allowed, **kwargs)


def test_padding_in_self_attention_is_one_mask():
    mask = padded([2, 4], 4)[:, None, None]
    attend(4, 4, kind="padding", attention_mask=mask, allowed=lambda b, h, i, j: max(i, j) < [2, 4][b])


def test_arbitrary():
    mask = torch.rand(2, H, 4, 5, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0, 1, 2] = True  # a query that sees nothing
    attend(4, 5, kind="arbitrary", attention_mask=mask, allowed=lambda b, h, i, j: not mask[b, h, i, j])


def test_packed_sequences_with_padding_between_them():
    torch.manual_seed(0)
    starts, ends = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 3, 8], dtype=torch.int32)
    mha = te.MultiheadAttention(
        16,
        2,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        qk_norm_type="RMSNorm",
        device="cpu",
        params_dtype=torch.float64,
    ).eval()
    rotary = te.RotaryPositionEmbedding(8)(8).cpu()
    x = torch.randn(9, 16, dtype=torch.float64)
    y = mha(x, cu_seqlens_q=ends, cu_seqlens_q_padded=starts, rotary_pos_emb=rotary)
    state = {n: p.detach() for n, p in mha.named_parameters()}
    for start, length in ((0, 3), (4, 5)):
        alone = formula.attention(
            x[start : start + length],
            state,
            H=2,
            K=2,
            D=8,
            kind="RMSNorm",
            angles=rotary.double()[:, 0, 0],
            allowed=lambda i, j: j <= i,
        )
        torch.testing.assert_close(y[start : start + length], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[3], mha.proj.bias)


def test_largest_logits():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, H, D), torch.randn(2, 5, K, D), torch.randn(2, 5, K, D)
    plain = te.DotProductAttention(H, D, K, qkv_format="bshd")
    reporting = te.DotProductAttention(H, D, K, qkv_format="bshd", return_max_logit=True)
    y, largest = reporting(q, k, v)
    torch.testing.assert_close(y, plain(q, k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * D**-0.5
    seen = torch.ones(5, 5).tril().bool()
    torch.testing.assert_close(largest, logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3)))


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    mha = te.MultiheadAttention(16, 2, attention_dropout=0.0, device="cpu")
    x = torch.randn(4, 2, 16, requires_grad=True)
    grads = [torch.autograd.grad(mha(x, checkpoint_core_attention=c).square().sum(), x)[0] for c in (False, True)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("qkv_format", ["sbhd", "bshd", "thd"])
def test_checkpointing_attends_again_in_the_backward_pass(qkv_format, monkeypatch):
    calls = []
    own = te.DotProductAttention._attend
    monkeypatch.setattr(te.DotProductAttention, "_attend", lambda *args: (calls.append(1), own(*args))[1])
    packed = qkv_format == "thd"
    attention = te.DotProductAttention(
        H, D, K, qkv_format=qkv_format, attn_mask_type="padding_causal" if packed else "causal"
    )
    lead = (7,) if packed else (4, 2)
    q, k, v = (torch.randn(*lead, heads, D, requires_grad=True) for heads in (H, K, K))
    ends = {"cu_seqlens_q": torch.tensor([0, 3, 7])} if packed else {}
    y = attention(q, k, v, **ends, checkpoint_core_attention=True)
    forward = len(calls)
    y.sum().backward()
    assert forward == (2 if packed else 1) and len(calls) == 2 * forward


@pytest.mark.parametrize("reporting", [False, True])
def test_a_packed_sequence_without_tokens(reporting):
    torch.manual_seed(0)
    attention = te.DotProductAttention(
        H, D, K, qkv_format="thd", attn_mask_type="padding_causal", return_max_logit=reporting
    )
    q, k, v = (torch.randn(5, heads, D) for heads in (H, K, K))
    empty, without = (attention(q, k, v, cu_seqlens_q=torch.tensor(ends)) for ends in ([0, 3, 3, 5], [0, 3, 5]))
    torch.testing.assert_close(empty, without)


def test_tokens_behind_the_last_sequence_need_no_row_of_the_rotary_table():
    torch.manual_seed(0)
    mha = te.MultiheadAttention(16, 2, qkv_format="thd", attn_mask_type="padding", device="cpu").eval()
    rotary, ends = te.RotaryPositionEmbedding(8)(4).cpu(), torch.tensor([0, 3, 7])
    x = torch.randn(12, 16)
    y = mha(x, cu_seqlens_q=ends, rotary_pos_emb=rotary)
    torch.testing.assert_close(y[:7], mha(x[:7], cu_seqlens_q=ends, rotary_pos_emb=rotary))


def test_dropout_is_on_while_training():
    torch.manual_seed(0)
    mha = te.MultiheadAttention(16, 2, attention_dropout=0.5, device="cpu")
    x = torch.randn(8, 2, 16)
    assert not torch.equal(mha(x), mha(x))
    mha.eval()
    assert torch.equal(mha(x), mha(x))


def test_windows_that_contradict_the_mask_are_settled_with_a_warning():
    with pytest.warns(UserWarning, match="looks ahead"):
        attend(3, 3, kind="causal", window=(1, 2), allowed=lambda b, h, i, j: i - 1 <= j <= i)
    with pytest.warns(UserWarning, match="is a causal mask"):
        attend(3, 3, kind="no_mask", window=(-1, 0), allowed=lambda b, h, i, j: True)
