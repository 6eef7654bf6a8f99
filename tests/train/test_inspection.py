import math

import pytest
import torch

from nsphere.presets import make_config, make_model
from nsphere.train.batches import Batch
from nsphere.train.inspection import condition_number, distribution, inspect_model, max_attention_logits


def make(arch: str, **fields):
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "context": 12, "d_model": 16, "num_layers": 2, "num_heads": 4}
    return make_model(make_config(arch, **shape, **fields))


def batch(document_ids=None) -> Batch:
    tokens = torch.randint(0, 31, (3, 12), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, tokens, document_ids)


def test_condition_number_of_a_known_matrix() -> None:
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert condition_number(q @ torch.diag(torch.tensor([8.0, 4, 2, 1, 0.5], dtype=torch.float64))) == pytest.approx(16)


def test_a_singular_matrix_has_no_condition_number() -> None:
    assert condition_number(torch.zeros(3, 3)) is None


def test_distribution_of_known_numbers() -> None:
    d = distribution(torch.tensor([0.0, 0.0, 1.0, 3.0]))
    assert (d["mean"], d["min"], d["max"]) == (1, 0, 3)
    assert d["std"] == pytest.approx(math.sqrt(1.5))
    assert sum(d["histogram"]["counts"]) == 4
    assert len(d["histogram"]["edges"]) == len(d["histogram"]["counts"]) + 1
    constant = distribution(torch.ones(4))
    assert (constant["std"], sum(constant["histogram"]["counts"])) == (0, 4)


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("arch", ["gpt", "ngpt"])
def test_the_largest_logit_is_that_of_plain_attention(arch, fields) -> None:
    model, b = make(arch, **fields), batch()
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def plain(q, k, v, scale, **rest):
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
        seen.append(logits.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf).max().item())
        return original(q, k, v, scale=scale, **rest)

    torch.nn.functional.scaled_dot_product_attention = plain
    try:
        with torch.no_grad():
            model(b.inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    assert max_attention_logits(model, b) == pytest.approx(seen, rel=1e-5)


def test_masked_pairs_do_not_count() -> None:
    model = make("gpt")
    alone = batch(torch.arange(12, dtype=torch.int32).expand(3, 12))  # every token its own document
    together = batch()
    assert max_attention_logits(model, alone)[0] < max_attention_logits(model, together)[0]


def test_everything_of_an_ngpt() -> None:
    model = make("ngpt", eigen_lr_init=0.25, s_z_init=10.0)
    with torch.no_grad():
        model.blocks[1].eigen_lr_attn.stored.mul_(-2)
    found = inspect_model(model, batch())
    assert found["layers"][0]["eigen_lr_attention"]["mean"] == pytest.approx(0.25)
    assert found["layers"][1]["eigen_lr_attention"]["mean"] == pytest.approx(0.5)  # |α|
    assert found["layers"][0]["s_qk"]["mean"] == found["layers"][0]["s_u"]["mean"] == pytest.approx(1)
    assert found["s_z"]["mean"] == pytest.approx(10)
    assert set(found["layers"][0]["condition_numbers"]) == {"W_q", "W_k", "W_v", "W_o", "W_u", "W_nu", "W_down"}
    weight = model.blocks[0].attn.W_q.weight
    assert found["layers"][0]["condition_numbers"]["W_q"] == pytest.approx(condition_number(weight))
    assert found["max_norm_deviation"] <= 1e-6


def test_a_gpt_has_no_scales() -> None:
    found = inspect_model(make("gpt", qk_norm="rms"), batch())
    assert set(found["layers"][0]) == {"condition_numbers", "max_attention_logit"}
    assert found["s_z"] is None and found["max_norm_deviation"] is None
