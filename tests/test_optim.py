"""keep_on_hypersphere with any optimizer and any model."""

import copy

import pytest
import torch
from torch import nn

from nsphere.hypersphere import assert_on_hypersphere, on_sphere, sphere_matrices
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.optim import keep_on_hypersphere

SHAPE = {"vocab_size": 17, "context": 8, "d_model": 12, "num_layers": 1, "num_heads": 3}


def make(**fields):
    torch.manual_seed(0)
    return NGPT(NGPTConfig(**SHAPE | fields))


def loss(model, step=0):
    generator = torch.Generator().manual_seed(step)
    return model.loss(*torch.randint(17, (2, 2, 8), generator=generator).unbind())


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def by_hand(model):
    """W ← w / ‖w‖ in fp32, columns of W_o and W_down and rows of the rest."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                dim = 0 if name.endswith(("W_o.weight", "W_down.weight")) else 1
                p.copy_(p / (p * p).sum(dim, keepdim=True).sqrt())


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0),
    "adamw, decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_weights_and_moments_are_those_of_the_plain_optimizer_and_a_projection_by_hand(build):
    model, twin = make(), make()
    optimizer, plain = build(model.parameters()), build(twin.parameters())
    keep_on_hypersphere(model, optimizer)
    for step in range(4):
        for m, o in ((model, optimizer), (twin, plain)):
            o.zero_grad()
            loss(m, step).backward()
            o.step()
        by_hand(twin)
        assert_on_hypersphere(model)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == plain.state[q].keys()
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, plain.state[q][key]), (name, key)


def test_without_it_the_matrices_leave_the_sphere():
    model = make()
    train(model, OPTIMIZERS["adamw"](model.parameters()), 1)
    with pytest.raises(AssertionError, match="norm off by"):
        assert_on_hypersphere(model)


def muon_and_adamw(model):
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks")]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-2, weight_decay=0)


def test_muon_for_the_matrices_and_adamw_for_the_rest():
    model, twin = make(), make()
    ours, plain = muon_and_adamw(model), muon_and_adamw(twin)
    for optimizer in ours:
        keep_on_hypersphere(model, optimizer)
    before = snapshot(model)
    for step in range(3):
        for m, optimizers in ((model, ours), (twin, plain)):
            m.zero_grad()
            loss(m, step).backward()
            for optimizer in optimizers:
                optimizer.step()
        by_hand(twin)
        assert_on_hypersphere(model)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not torch.equal(p, before[name]), name


def test_an_optimizers_step_touches_its_own_matrices_only():
    model = make()
    muon, adamw = muon_and_adamw(model)
    keep_on_hypersphere(model, muon)
    keep_on_hypersphere(model, adamw)
    loss(model).backward()
    before = snapshot(model)
    adamw.step()
    for name, p in model.named_parameters():
        held_by_muon = p.dim() == 2 and name.startswith("blocks")
        assert torch.equal(p, before[name]) == held_by_muon, name


def test_gradient_accumulation_is_one_step():
    accumulated, whole = make().double(), make().double()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (accumulated, whole)]
    for model, optimizer in zip((accumulated, whole), optimizers, strict=True):
        keep_on_hypersphere(model, optimizer)
    before = snapshot(accumulated)
    for micro in range(3):
        (loss(accumulated, micro) / 3).backward()
        for name, p in accumulated.named_parameters():
            assert torch.equal(p, before[name]), f"{name} moved between micro-batches"
    (sum(loss(whole, micro) for micro in range(3)) / 3).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_on_hypersphere(accumulated)
    for p, q in zip(accumulated.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_changes_no_bit(fused):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    keep_on_hypersphere(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(model, optimizer, 1)  # rows that are unit to rounding, not exactly
    before = snapshot(model)
    for spoiled in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss(model)).backward()
        if spoiled:
            next(model.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == spoiled, name
        assert_on_hypersphere(model)


def test_frozen_matrices_keep_every_bit():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    keep_on_hypersphere(model, optimizer)
    train(model, optimizer)
    frozen = [model.embed.weight, model.blocks[0].attn.W_o.weight]
    for p in frozen:
        p.requires_grad_(False)
    optimizer.zero_grad()
    before = snapshot(model)
    train(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == any(p is f for f in frozen), name


def test_matrices_outside_the_optimizer_keep_every_bit():
    model = make()
    optimizer = torch.optim.SGD(model.blocks.parameters(), lr=0.1)
    keep_on_hypersphere(model, optimizer)
    before = model.embed.weight.clone(), model.head.weight.clone()
    train(model, optimizer)
    assert torch.equal(model.embed.weight, before[0])
    assert torch.equal(model.head.weight, before[1])


def test_what_is_off_is_projected_at_once_and_what_is_on_keeps_every_bit():
    model = make()
    train(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    keep_on_hypersphere(model, optimizer).remove()
    assert_on_hypersphere(model)
    with torch.no_grad():
        model.head.weight[3] *= 1 + 3e-6
    before = snapshot(model)
    keep_on_hypersphere(model, optimizer)
    assert_on_hypersphere(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name != "head.weight"), name


def test_the_handle_stops_it():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = keep_on_hypersphere(model, optimizer)
    train(model, optimizer, 1)
    assert_on_hypersphere(model)
    handle.remove()
    train(model, optimizer, 1)
    with pytest.raises(AssertionError, match="norm off by"):
        assert_on_hypersphere(model)


def test_a_closure():
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    keep_on_hypersphere(model, optimizer)

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    before = snapshot(model)
    optimizer.step(closure)
    assert_on_hypersphere(model)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_bf16_parameters():
    model = make().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keep_on_hypersphere(model, optimizer)
    train(model, optimizer)
    assert_on_hypersphere(model, atol=1e-2)


class PatchTransformer(nn.Module):
    """Somebody's ViT, with biases, a convolution and torch's own attention."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.layer(h).mean(1))


def marked_vit():
    torch.manual_seed(0)
    model = PatchTransformer()
    on_sphere(model.layer.self_attn, 1, "in_proj_weight")
    on_sphere(model.layer.self_attn.out_proj, 0)
    on_sphere(model.layer.linear1, 1)
    on_sphere(model.layer.linear2, 0)
    on_sphere(model.head, 1)
    return model, torch.randn(4, 3, 8, 8)


def marked_mlp():
    torch.manual_seed(0)
    model = nn.Sequential(on_sphere(nn.Linear(8, 32), 1), nn.GELU(), on_sphere(nn.Linear(32, 10), 0))
    return model, torch.randn(4, 8)


@pytest.mark.parametrize("build", [marked_vit, marked_mlp])
def test_a_users_own_model(build):
    model, x = build()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keep_on_hypersphere(model, optimizer)
    assert_on_hypersphere(model)
    on = {id(m.weight) for m in sphere_matrices(model)}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) == (id(p) not in on)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), torch.arange(4))
        value.backward()
        losses.append(value.item())
        optimizer.step()
        assert_on_hypersphere(model)
    assert losses[-1] < losses[0] - 0.1


class TestErrors:
    def test_a_model_without_sphere_matrices(self):
        model = nn.Linear(3, 3)
        with pytest.raises(ValueError, match="mark them with on_sphere"):
            keep_on_hypersphere(model, torch.optim.SGD(model.parameters()))

    def test_an_optimizer_of_another_model(self):
        model, other = make(), make()
        with pytest.raises(ValueError, match=r"this SGD holds none of the model's 9 sphere matrices .*embed\.weight"):
            keep_on_hypersphere(model, torch.optim.SGD(other.parameters()))
