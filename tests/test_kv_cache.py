import pytest
import torch

from nsphere.fold import fold
from nsphere.kv_cache import CACHE_NAMES, KVCache, Vectors, cache_dtype
from nsphere.presets import make_config, make_model


def write(vectors, x, positions):
    vectors.write(x, torch.arange(x.shape[0]).unsqueeze(-1), positions)


def test_a_slot_is_a_position_whatever_the_other_rows_hold():
    vectors = Vectors((2, 6, 1, 3), torch.float32, torch.device("cpu"), unit=False)
    x = torch.randn(2, 2, 1, 3)
    write(vectors, x, torch.tensor([[0, 1], [3, 4]]))
    got = vectors.read(5, torch.float32)
    assert torch.equal(got[0, :2], x[0]) and torch.equal(got[1, 3:], x[1])
    assert got[0, 2:].abs().sum() == got[1, :3].abs().sum() == 0


def test_a_row_shares_the_memory():
    cache = KVCache(1, 3, 4, 1, 2, torch.float32, "cpu")
    row = cache.row(1)
    row.reserve(2)
    k = torch.randn(1, 2, 1, 2)
    row.layer(0, torch.tensor([[0, 1]])).append(k, -k)
    cache.reserve(2)
    assert torch.equal(cache.layers[0][0].codes[1, :2], k[0])
    assert torch.equal(cache.layers[0][1].codes[1, :2], -k[0])
    assert cache.layers[0][0].codes[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, "int8", "fp8"])
def test_growing_keeps_what_is_there(dtype):
    fixed, growing = (KVCache(2, 1, 300, 1, 8, dtype, "cpu", grow=grow) for grow in (False, True))
    assert growing.num_bytes() < fixed.num_bytes() / 4
    x = torch.randn(1, 300, 1, 8)
    for cache in (fixed, growing):
        for start, end in ((0, 5), (5, 6), (6, 200), (200, 300)):
            cache.reserve(end)
            for layer in range(2):
                k, v = cache.layer(layer, torch.arange(start, end)[None]).append(x[:, start:end], -x[:, start:end])
    assert torch.equal(k, fixed.layer(1, torch.arange(1)[None]).k.read(300, torch.float32))
    assert torch.equal(k, -v)
    assert (k - x).norm() < 0.05 * x.norm()


def test_a_full_cache_says_so():
    cache = KVCache(1, 1, 4, 1, 2, torch.float32, "cpu")
    with pytest.raises(ValueError, match="the cache holds 4 tokens, 6 were asked for"):
        cache.reserve(6)


def test_the_mask_shows_a_token_what_came_before_it():
    cache = KVCache(1, 2, 4, 1, 2, torch.float32, "cpu")
    cache.reserve(4)
    mask = cache.mask(torch.tensor([[1], [3]]))
    assert mask.tolist() == [[[[True, True, False, False]]], [[[True] * 4]]]


@pytest.mark.parametrize(
    ("dtype", "unit", "most"),
    # an int8 vector's step is max|x| / 127, its error that over √12: 0.6% of a Gaussian vector of 64
    [
        ("int8", True, 0.008),
        ("int8", False, 0.008),
        ("fp8", True, 0.03),
        ("fp8", False, 0.03),
        (torch.bfloat16, True, 0.002),
    ],
)
def test_the_error_of_what_is_stored(dtype, unit, most):
    torch.manual_seed(0)
    x = torch.randn(4, 32, 2, 64)
    x = torch.nn.functional.normalize(x, dim=-1) if unit else x * torch.logspace(-3, 3, 32)[:, None, None]
    vectors = Vectors((4, 32, 2, 64), dtype, torch.device("cpu"), unit)
    write(vectors, x, torch.arange(32).expand(4, -1))
    got = vectors.read(32, torch.float32)
    relative = (got - x).norm(dim=-1) / x.norm(dim=-1)
    assert most / 4 < relative.mean() < most, relative.mean()
    assert relative.max() < 2 * most


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_vectors_with_one_component_and_with_none(dtype):
    for unit in (True, False):
        vectors = Vectors((1, 3, 1, 4), dtype, torch.device("cpu"), unit)
        x = torch.tensor([[1.0, 0, 0, 0], [0, -1.0, 0, 0], [0, 0, 0, 0]]).view(1, 3, 1, 4)
        write(vectors, x, torch.arange(3)[None])
        torch.testing.assert_close(vectors.read(3, torch.float32), x, rtol=0, atol=0.005)


def test_the_memory_of_eight_bits():
    sizes = {
        d: KVCache(2, 1, 128, 2, 64, d, "cpu", unit_keys=True).num_bytes() for d in (torch.bfloat16, "int8", "fp8")
    }
    assert sizes["int8"] / sizes[torch.bfloat16] == 66 / 128  # a bf16 scale for each vector
    assert sizes["fp8"] / sizes[torch.bfloat16] == 65 / 128  # for the values alone


def test_a_cache_that_is_not_supported_is_refused():
    assert cache_dtype("bfloat16") is torch.bfloat16
    assert {cache_dtype(name) for name in CACHE_NAMES} >= {"int8", "fp8", torch.float32}
    with pytest.raises(ValueError, match="a cache of 'int4' is not supported; choose float32, bfloat16"):
        cache_dtype("int4")


@pytest.mark.parametrize("architecture", ["gpt", "ngpt"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@torch.no_grad()
def test_what_eight_bits_do_to_the_logits(architecture, dtype):
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "context": 32, "d_model": 64, "num_layers": 2, "num_heads": 2}
    model = make_model(make_config(architecture, **shape))
    model = fold(model)
    tokens = torch.randint(31, (2, 32))
    exact = model(tokens)
    cache = model.make_cache(2, 32, dtype)
    logits = torch.cat([model(tokens[:, a:b], cache=cache) for a, b in ((0, 20), (20, 21), (21, 32))], 1)
    relative = ((logits - exact).norm() / exact.norm()).item()
    assert 1e-5 < relative < (0.01 if dtype == "int8" else 0.04)
