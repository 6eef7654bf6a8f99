import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nsphere.hypersphere import SphereLinear, assert_on_hypersphere
from nsphere.optim import keep_on_hypersphere
from nsphere.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from nsphere.train.checkpoint.optimizer_state import GroupPlan, Stored, carry_out
from nsphere.train.files import RunLock

MODEL, OPTIMIZER = (f"{part}/shard-00001-model-00001-of-00001.safetensors" for part in ("model", "optimizer"))
STATE = {"architecture": "gpt", "seed": 3, "best": 0.1 + 0.2, "worst": float("inf"), "config": {"d_model": 8}}


class Tiny(nn.Module):
    """Tied embedding and head, a buffer, a non-contiguous parameter, a 0-d one and an empty one."""

    def __init__(self, seed=0, tie=True):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(16, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.rand(()))
        self.turned = nn.Parameter(torch.rand(3, 8).t())
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.head = nn.Linear(8, 16, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x):
        self.seen += 1
        h = self.norm(self.embed(x) + self.hidden(self.embed(x)))
        return self.head((h @ self.turned @ self.turned.t()) * self.gain)


def matrices(model):
    return [layer.weight for layer in model.hidden if isinstance(layer, nn.Linear)]


def others(model):
    held = {id(p) for p in matrices(model)}
    return [p for p in model.parameters() if id(p) not in held]


OPTIMIZERS = {
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True),
    "adamw-groups": lambda m: torch.optim.AdamW(
        [{"params": matrices(m), "weight_decay": 0.1}, {"params": others(m), "lr": 3e-3}], lr=1e-2, amsgrad=True
    ),
    "adamw-tensor-lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2), fused=True),
    "muon+adamw": lambda m: [
        torch.optim.Muon(matrices(m), lr=1e-2),
        torch.optim.AdamW(others(m), lr=1e-2, betas=(0.9, 0.95), fused=True),
    ],
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
}


def aslist(optimizers):
    return optimizers if isinstance(optimizers, list) else [optimizers]


def train(model, optimizers, first, last):
    """Steps first..last-1 with a learning rate that falls, as a schedule sets it; the losses."""
    losses = []
    for step in range(first, last):
        x = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten())
        for optimizer in aslist(optimizers):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in aslist(optimizers):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        losses.append(loss.item())
    return losses


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_model(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert torch.equal(bits(x), bits(y)), name


def assert_same_optimizer(a, b, model_a, model_b):
    for x, y in zip(model_a.parameters(), model_b.parameters(), strict=True):
        assert a.state[x].keys() == b.state[y].keys()
        for key, value in a.state[x].items():
            other = b.state[y][key]
            assert (value.dtype, value.device, value.stride()) == (other.dtype, other.device, other.stride()), key
            assert torch.equal(bits(value), bits(other)), key
    for x, y in zip(a.param_groups, b.param_groups, strict=True):
        assert {k: v for k, v in x.items() if k != "params"} == {k: v for k, v in y.items() if k != "params"}


@pytest.fixture
def saved(tmp_path):
    """A run folder with one checkpoint at step 5, and what is in it."""
    model = Tiny()
    optimizer = OPTIMIZERS["adamw-fused"](model)
    train(model, optimizer, 0, 5)
    save_checkpoint(tmp_path, step=5, model=model, optimizer=optimizer, state=STATE)
    return tmp_path, model, optimizer


class TestResume:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_five_and_five_steps_are_ten_to_the_bit(self, tmp_path, name):
        straight = Tiny()
        straight_optimizers = OPTIMIZERS[name](straight)
        losses = train(straight, straight_optimizers, 0, 10)

        first = Tiny()
        optimizers = OPTIMIZERS[name](first)
        before = train(first, optimizers, 0, 5)
        save_checkpoint(tmp_path, step=5, model=first, optimizer=optimizers, state=STATE)

        second = Tiny(seed=9)
        optimizers = OPTIMIZERS[name](second)
        checkpoint = load_checkpoint(tmp_path, expect_architecture="gpt")
        assert checkpoint.restore(second, optimizers, strict=True) == ([], [])
        after = train(second, optimizers, checkpoint.step, 10)

        assert before + after == losses
        assert_same_model(straight, second)
        for a, b in zip(aslist(straight_optimizers), aslist(optimizers), strict=True):
            held = [p for g in a.param_groups for p in g["params"]], [p for g in b.param_groups for p in g["params"]]
            assert_same_optimizer(a, b, nn.ParameterList(held[0]), nn.ParameterList(held[1]))

    def test_it_is_the_state_that_makes_it_the_same(self, saved):
        """Without the optimizer's part the continuation differs: the test above can fail."""
        run, model, optimizer = saved
        second = Tiny(seed=9)
        load_checkpoint(run).restore(second)
        assert_same_model(model, second)
        assert train(second, OPTIMIZERS["adamw-fused"](second), 5, 10) != train(model, optimizer, 5, 10)

    def test_restoring_into_a_trained_optimizer_replaces_all_of_its_state(self, saved):
        run, model, optimizer = saved
        second = Tiny(seed=9)
        other = OPTIMIZERS["adamw-fused"](second)
        train(second, other, 100, 107)
        moments = {p: state["exp_avg"] for p, state in other.state.items()}
        load_checkpoint(run).restore(second, other)
        assert_same_optimizer(optimizer, other, model, second)
        # in place, so that whatever holds the tensors (a CUDA graph) sees the new values
        assert moments
        assert all(other.state[p]["exp_avg"] is m for p, m in moments.items())

    def test_a_fresh_optimizer_comes_back_fresh(self, tmp_path):
        model = Tiny()
        save_checkpoint(tmp_path, step=0, model=model, optimizer=OPTIMIZERS["adamw-fused"](model), state={})
        second = Tiny(seed=9)
        optimizer = OPTIMIZERS["adamw-fused"](second)
        train(second, optimizer, 0, 3)
        load_checkpoint(tmp_path).restore(second, optimizer)
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 1e-2

    def test_step_counters_stay_where_torch_keeps_them(self, saved):
        run, model, _ = saved
        optimizer = OPTIMIZERS["adamw-foreach"](model)
        load_checkpoint(run).restore(model, optimizer)
        for state in optimizer.state.values():
            assert (state["step"].dtype, state["step"].dim(), state["step"].device.type) == (torch.float32, 0, "cpu")
            assert state["step"].item() == 5

    @pytest.mark.parametrize(("option", "device"), [("foreach", "cpu"), ("fused", "meta"), ("capturable", "meta")])
    def test_step_counters_go_to_the_device_of_the_kernel_that_reads_them(self, option, device):
        parameter = nn.Parameter(torch.empty(2, device="meta"))  # stands for any device but the CPU
        optimizer = torch.optim.SGD([parameter])
        group = optimizer.param_groups[0] | {option: True}
        state = {"step": Stored("step", torch.tensor(3.0)), "exp_avg": Stored("exp_avg", torch.ones(2))}
        targets = carry_out([GroupPlan(optimizer, group, {}, [state])])
        assert targets == optimizer.state[parameter]
        assert optimizer.state[parameter]["step"].device.type == device
        assert optimizer.state[parameter]["exp_avg"].device.type == "meta"

    def test_how_an_optimizer_computes_is_its_own_choice(self, saved):
        run, model, _ = saved
        optimizer = OPTIMIZERS["adamw-foreach"](model)
        load_checkpoint(run).restore(model, optimizer)
        assert (optimizer.param_groups[0]["foreach"], optimizer.param_groups[0]["fused"]) == (True, None)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**5, rel=1e-12)
        assert isinstance(optimizer.param_groups[0]["betas"], tuple)

    def test_a_checkpoint_restores_twice_and_shares_no_memory(self, saved):
        run, model, trained = saved
        checkpoint = load_checkpoint(run)
        second = Tiny(seed=9)
        optimizer = OPTIMIZERS["adamw-fused"](second)
        checkpoint.restore(second, optimizer)
        train(second, optimizer, 5, 7)
        optimizer = OPTIMIZERS["adamw-fused"](second)
        checkpoint.restore(second, optimizer)
        assert_same_model(model, second)
        assert_same_optimizer(trained, optimizer, model, second)

    def test_gradients_and_requires_grad_are_left_alone(self, saved):
        run, _, _ = saved
        second = Tiny(seed=9)
        second.embed.weight.requires_grad_(False)
        second.gain.grad = torch.tensor(7.0)
        parameters = dict(second.named_parameters())
        load_checkpoint(run).restore(second)
        assert not second.embed.weight.requires_grad
        assert second.hidden[0].weight.requires_grad
        assert second.gain.grad.item() == 7
        assert all(p is parameters[n] for n, p in second.named_parameters())

    def test_nan_payloads_and_signed_zeros_survive(self, tmp_path):
        model = Tiny()
        with torch.no_grad():
            model.norm.weight.view(torch.int32).copy_(
                torch.tensor([0x7FC00001, 0x7F800001, -1, -(2**31), 1, 0, 2139095040, -8388608], dtype=torch.int32)
            )
        save_checkpoint(tmp_path, step=0, model=model, optimizer=None, state={})
        second = Tiny(seed=9)
        load_checkpoint(tmp_path).restore(second)
        assert_same_model(model, second)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes_keep_theirs(self, tmp_path, dtype):
        model = nn.Linear(4, 4).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(4, dtype=dtype)).sum().backward()
        optimizer.step()
        # fp32 moments beside low-precision weights, which torch's own load_state_dict would round
        optimizer.state[model.weight]["exp_avg"] = torch.full((4, 4), 1 + 2**-20)
        save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, state={})
        second = nn.Linear(4, 4).to(dtype)
        other = torch.optim.AdamW(second.parameters())
        load_checkpoint(tmp_path).restore(second, other)
        assert_same_model(model, second)
        assert_same_optimizer(optimizer, other, model, second)

    def test_matrices_on_the_sphere_keep_every_bit(self, tmp_path):
        def make(seed):
            torch.manual_seed(seed)
            model = nn.Sequential(SphereLinear(6, 9, 1), nn.SiLU(), SphereLinear(9, 6, 0))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
            keep_on_hypersphere(model, optimizer)
            return model, optimizer

        def steps(model, optimizer, first, last):
            for step in range(first, last):
                optimizer.zero_grad()
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
                (model(x) - x).square().sum().backward()
                optimizer.step()

        straight, optimizer = make(0)
        steps(straight, optimizer, 0, 10)
        first, optimizer = make(0)
        steps(first, optimizer, 0, 5)
        save_checkpoint(tmp_path, step=5, model=first, optimizer=optimizer, state={})
        second, optimizer = make(1)
        load_checkpoint(tmp_path).restore(second, optimizer)
        assert_same_model(first, second)
        assert_on_hypersphere(second)
        steps(second, optimizer, 5, 10)
        assert_same_model(straight, second)


class TestNames:
    def test_what_is_stored(self, saved):
        run, model, _ = saved
        folder = run / "checkpoints" / "step-00000005"
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
            "manifest.json",
            MODEL,
            OPTIMIZER,
            "state.json",
        ]
        stored = load_file(folder / MODEL)
        assert "head.weight" not in stored
        assert "scratch" not in stored
        assert torch.equal(stored["embed.weight"], model.embed.weight)
        assert torch.equal(stored["turned"], model.turned)
        assert stored["seen"].item() == 5
        moments = load_file(folder / OPTIMIZER)
        assert moments["state.hidden.0.weight.exp_avg"].shape == (12, 8)
        assert moments["state.embed.weight.step"].item() == 5

    def test_files_are_as_readable_as_their_folder(self, saved):
        folder = saved[0] / "checkpoints" / "step-00000005"
        for path in (p for p in folder.rglob("*") if p.is_file()):
            assert path.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666, path.name

    def test_state_comes_back(self, saved):
        checkpoint = load_checkpoint(saved[0])
        assert checkpoint.state == STATE
        assert checkpoint.step == 5
        assert checkpoint.path == latest_checkpoint(saved[0])

    def test_compiled_whole_or_by_module(self, tmp_path):
        model = Tiny()
        model.hidden[0] = torch.compile(model.hidden[0], backend="eager")
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.AdamW(compiled.parameters())
        save_checkpoint(tmp_path, step=1, model=compiled, optimizer=optimizer, state={})
        checkpoint = load_checkpoint(tmp_path)
        assert set(checkpoint.model_tensors) == set(Tiny().state_dict())
        plain = Tiny(seed=9)
        checkpoint.restore(plain, torch.optim.AdamW(plain.parameters()))
        assert_same_model(plain, Tiny())

        again = Tiny(seed=8)
        again.hidden[2] = torch.compile(again.hidden[2], backend="eager")
        checkpoint.restore(torch.compile(again, backend="eager"), torch.optim.AdamW(again.parameters()))
        for name, parameter in Tiny().named_parameters():
            assert torch.equal(dict(plain.named_parameters())[name], parameter)
        assert torch.equal(again.hidden[2].weight, plain.hidden[2].weight)

    def test_distributed_data_parallel(self, tmp_path):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(Tiny())
            optimizer = torch.optim.AdamW(wrapped.parameters())
            save_checkpoint(tmp_path, step=1, model=wrapped, optimizer=optimizer, state={})
            plain = Tiny(seed=9)
            load_checkpoint(tmp_path).restore(plain, torch.optim.AdamW(plain.parameters()))
            assert_same_model(plain, Tiny())
            other = nn.parallel.DistributedDataParallel(Tiny(seed=8))
            load_checkpoint(tmp_path).restore(other)
            assert_same_model(other.module, plain)
        finally:
            torch.distributed.destroy_process_group()

    def test_a_module_that_is_called_module_keeps_its_name(self, tmp_path):
        model = nn.ModuleDict({"module": nn.Linear(2, 2)})
        save_checkpoint(tmp_path, step=0, model=model, optimizer=None, state={})
        assert set(load_checkpoint(tmp_path).model_tensors) == {"module.weight", "module.bias"}

    def test_two_names_that_become_one_are_refused(self, tmp_path):
        clash = nn.Module()
        clash.inner = nn.Linear(2, 2)
        clash.inner.add_module("_orig_mod", nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"inner\.weight and inner\._orig_mod\.weight both become inner\.weight"):
            save_checkpoint(tmp_path, step=0, model=clash, optimizer=None, state={})
        assert not (tmp_path / "checkpoints").exists()

    def test_views_of_one_storage_are_stored_apart(self, tmp_path):
        model = nn.Module()
        whole = torch.arange(8.0)
        model.register_buffer("left", whole[:5])
        model.register_buffer("right", whole[3:])
        model.register_buffer("turned", whole.view(2, 4).t())
        save_checkpoint(tmp_path, step=0, model=model, optimizer=None, state={})
        tensors = load_checkpoint(tmp_path).model_tensors
        assert {name: t.tolist() for name, t in tensors.items()} == {
            "left": [0, 1, 2, 3, 4],
            "right": [3, 4, 5, 6, 7],
            "turned": [[0, 4], [1, 5], [2, 6], [3, 7]],
        }

    def test_what_is_not_a_tensor_is_refused(self, tmp_path):
        class Odd(nn.Linear):
            def get_extra_state(self):
                return {"a": 1}

        with pytest.raises(ValueError, match="_extra_state is a dict"):
            save_checkpoint(tmp_path, step=0, model=Odd(2, 2), optimizer=None, state={})


class TestTiedWeights:
    def test_tied_ones_stay_tied(self, saved):
        second = Tiny(seed=9)
        load_checkpoint(saved[0]).restore(second)
        assert second.head.weight is second.embed.weight
        assert torch.equal(second.head.weight, saved[1].embed.weight)

    def test_empty_tensors_are_not_tied(self, tmp_path):
        model = nn.ParameterDict({name: nn.Parameter(torch.empty(0, 3)) for name in "ab"})
        save_checkpoint(tmp_path, step=0, model=model, optimizer=None, state={})
        assert load_checkpoint(tmp_path).tied == {}
        assert set(load_checkpoint(tmp_path).model_tensors) == {"a", "b"}

    def test_saved_tied_goes_into_an_untied_model(self, saved):
        second = Tiny(seed=9, tie=False)
        load_checkpoint(saved[0]).restore(second)
        assert torch.equal(second.head.weight, saved[1].embed.weight)
        assert torch.equal(second.embed.weight, saved[1].embed.weight)

    def test_two_tensors_do_not_go_into_one(self, tmp_path):
        save_checkpoint(tmp_path, step=0, model=Tiny(tie=False), optimizer=None, state={})
        with pytest.raises(ValueError, match=r"head\.weight and embed\.weight are one tensor in the model and two"):
            load_checkpoint(tmp_path).restore(Tiny())

    def test_the_tie_may_be_listed_in_another_order(self, tmp_path):
        class Turned(nn.Module):
            def __init__(self, head_first):
                super().__init__()
                for name in ("head", "embed") if head_first else ("embed", "head"):
                    self.add_module(name, nn.Linear(4, 4, bias=False))
                self.head.weight = self.embed.weight

        model, second = Turned(False), Turned(True)
        optimizer, other = (torch.optim.AdamW(m.parameters()) for m in (model, second))
        model.head(torch.ones(4)).sum().backward()
        optimizer.step()
        save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, state={})
        load_checkpoint(tmp_path).restore(second, other)
        assert torch.equal(second.head.weight, model.head.weight)
        assert_same_optimizer(optimizer, other, model, second)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestMismatches:
    def unchanged(self, run, model, optimizers=None, **kwargs):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        rates = [g["lr"] for o in aslist(optimizers or []) for g in o.param_groups]
        with pytest.raises(ValueError) as caught:
            load_checkpoint(run).restore(model, optimizers, **kwargs)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert rates == [g["lr"] for o in aslist(optimizers or []) for g in o.param_groups]
        assert not any(o.state for o in aslist(optimizers or []))
        return one_line(caught)

    def test_shape(self, saved):
        model = Tiny(seed=9)
        model.hidden[0] = nn.Linear(8, 13)
        message = self.unchanged(saved[0], model)
        assert "hidden.0.weight is float32 [12, 8] in the checkpoint and float32 [13, 8] in the model" in message

    def test_dtype(self, saved):
        message = self.unchanged(saved[0], Tiny(seed=9).bfloat16(), strict=False)
        assert "turned is float32 [8, 3] in the checkpoint and bfloat16 [8, 3] in the model" in message
        assert "and 8 more" in message  # every float, the tied weight under both of its names

    def test_missing_and_unexpected(self, saved):
        model = Tiny(seed=9)
        del model.gain
        model.extra = nn.Linear(2, 2)
        message = self.unchanged(saved[0], model)
        assert "the checkpoint lacks extra.weight, extra.bias; the model lacks gain" in message

    def test_not_strict_takes_what_is_common_and_says_what_is_not(self, saved):
        model = Tiny(seed=9)
        del model.gain
        model.extra = nn.Linear(2, 2)
        untouched = model.extra.weight.clone()
        mismatch = load_checkpoint(saved[0]).restore(model, strict=False)
        assert mismatch == (["extra.weight", "extra.bias"], ["gain"])
        assert torch.equal(model.extra.weight, untouched)
        assert torch.equal(model.hidden[0].weight, saved[1].hidden[0].weight)

    def test_a_model_without_memory(self, saved):
        with torch.device("meta"):
            model = Tiny(seed=9)
        with pytest.raises(ValueError, match=r"has no memory in the model \(call to_empty first\)"):
            load_checkpoint(saved[0]).restore(model)

    def test_another_optimizer_class(self, saved):
        model = Tiny(seed=9)
        message = self.unchanged(saved[0], model, OPTIMIZERS["sgd"](model))
        assert "SGD's group of gain, turned, nothing and 7 more was saved from AdamW; build the optimizers" in message

    def test_other_groups(self, saved):
        model = Tiny(seed=9)
        message = self.unchanged(saved[0], model, OPTIMIZERS["adamw-groups"](model))
        assert "AdamW's group of hidden.0.weight, hidden.2.weight is not a group in the checkpoint" in message

    def test_an_optimizer_is_missing(self, tmp_path):
        model = Tiny()
        save_checkpoint(tmp_path, step=0, model=model, optimizer=OPTIMIZERS["muon+adamw"](model), state={})
        second = Tiny(seed=9)
        message = self.unchanged(tmp_path, second, OPTIMIZERS["muon+adamw"](second)[1])
        assert "no optimizer was given for Muon's group of hidden.0.weight, hidden.2.weight" in message
        with pytest.raises(ValueError, match="no optimizer was given"):
            load_checkpoint(tmp_path).restore(second, [])

    def test_order_of_optimizers_and_of_parameters_does_not_matter(self, tmp_path):
        model = Tiny()
        muon, adamw = OPTIMIZERS["muon+adamw"](model)
        train(model, [muon, adamw], 0, 3)
        save_checkpoint(tmp_path, step=3, model=model, optimizer=[muon, adamw], state={})
        second = Tiny(seed=9)
        new_adamw = torch.optim.AdamW(others(second)[::-1], fused=True)
        new_muon = torch.optim.Muon(matrices(second)[::-1])
        load_checkpoint(tmp_path).restore(second, [new_adamw, new_muon])
        restored = {**new_adamw.state, **new_muon.state}
        saved = {**adamw.state, **muon.state}
        assert len(restored) == len(saved) == len(list(model.parameters())) - 1  # one has no entries, so no gradient
        for a, b in zip(model.parameters(), second.parameters(), strict=True):
            for key, value in saved.get(a, {}).items():
                assert torch.equal(restored[b][key], value), key

    def test_an_optimizer_of_another_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"AdamW holds a parameter of shape \[\] that the model does not have"):
            save_checkpoint(tmp_path, step=0, model=Tiny(), optimizer=torch.optim.AdamW(Tiny().parameters()), state={})

    @pytest.mark.parametrize("value", [object(), {"a": 1}, [torch.ones(2)]])
    def test_optimizer_state_that_cannot_be_stored(self, tmp_path, value):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.state[model.weight]["odd"] = value
        with pytest.raises(ValueError, match=r"SGD's state 'odd' of weight is a .*; a checkpoint holds"):
            save_checkpoint(tmp_path, step=0, model=model, optimizer=optimizer, state={})

    def test_numbers_in_the_optimizer_state_come_back(self, tmp_path):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.state[model.weight].update(count=3, mean=0.1 + 0.2, name="a", none=None, on=True)
        save_checkpoint(tmp_path, step=0, model=model, optimizer=optimizer, state={})
        second = nn.Linear(2, 2)
        other = torch.optim.SGD(second.parameters())
        load_checkpoint(tmp_path).restore(second, other)
        assert other.state[second.weight] == {"count": 3, "mean": 0.1 + 0.2, "name": "a", "none": None, "on": True}
        assert isinstance(other.state[second.weight]["count"], int)


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def save(run, step, value=None, **kwargs):
    """A checkpoint of a model whose every weight is `value` (the step)."""
    model = nn.Linear(3, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step if value is None else value)
    return save_checkpoint(run, step=step, model=model, optimizer=None, state={"architecture": "gpt"}, **kwargs)


class TestFolders:
    def test_the_last_are_kept(self, tmp_path):
        for step in (2, 4, 6, 8):
            assert save(tmp_path, step).name == f"step-{step:08d}"
        assert names(tmp_path) == ["step-00000006", "step-00000008"]
        save(tmp_path, 10, keep_last=1)
        assert names(tmp_path) == ["step-00000010"]

    def test_and_those_of_every_so_many_steps(self, tmp_path):
        for step in range(1, 11):
            save(tmp_path, step, keep_last=2, keep_every=3)
        assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 9, 10)]

    def test_steps_are_ordered_as_numbers(self, tmp_path):
        for step in (99_999_999, 100_000_000):
            save(tmp_path, step)
        assert load_checkpoint(tmp_path).step == 100_000_000

    def test_a_broken_one_is_not_counted_among_the_kept(self, tmp_path):
        save(tmp_path, 2)
        (save(tmp_path, 4) / MODEL).unlink()
        save(tmp_path, 6)
        assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000006"]
        save(tmp_path, 8)
        assert names(tmp_path) == ["step-00000006", "step-00000008"]

    def test_the_same_step_again_replaces(self, tmp_path):
        save(tmp_path, 4, value=1.0)
        save(tmp_path, 4, value=2.0)
        assert names(tmp_path) == ["step-00000004"]
        assert load_checkpoint(tmp_path).model_tensors["weight"].unique().tolist() == [2]

    def test_going_back_is_warned_of_and_deletes_nothing_newer(self, tmp_path, caplog):
        for step in (4, 6):
            save(tmp_path, step)
        with caplog.at_level(logging.WARNING):
            save(tmp_path, 2)
        assert "step-00000006 is newer than step 2" in caplog.text
        assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000006"]

    def test_one_checkpoint_by_name(self, tmp_path):
        for step in (4, 6):
            save(tmp_path, step)
        assert load_checkpoint(tmp_path / "checkpoints" / "step-00000004").step == 4
        assert load_checkpoint(str(tmp_path)).step == 6

    def test_a_copy_under_another_name(self, tmp_path):
        save(tmp_path, 4).rename(tmp_path / "best")
        assert load_checkpoint(tmp_path / "best").step == 4

    def test_a_renamed_step_is_not_believed(self, tmp_path):
        save(tmp_path, 4).rename(tmp_path / "checkpoints" / "step-00000009")
        with pytest.raises(ValueError, match="named for step 9 and holds step 4"):
            load_checkpoint(tmp_path)

    def test_none_there(self, tmp_path):
        assert latest_checkpoint(tmp_path) is None
        with pytest.raises(ValueError, match="holds no checkpoint; give a run folder"):
            load_checkpoint(tmp_path)
        with pytest.raises(ValueError, match="is not a folder"):
            load_checkpoint(tmp_path / "none")

    def test_latest_passes_over_what_is_incomplete(self, tmp_path):
        first = save(tmp_path, 2)
        (save(tmp_path, 4) / "state.json").write_text("")
        assert latest_checkpoint(tmp_path) == first

    def test_latest_does_not_say_none_where_all_are_broken(self, tmp_path):
        """A run that took this for a fresh start would bury what is left of the old one."""
        for step in (2, 4):
            (save(tmp_path, step) / MODEL).unlink()
        with pytest.raises(ValueError, match=f"step-00000004: {MODEL} is missing; step-00000002: model"):
            latest_checkpoint(tmp_path)

    def test_what_a_killed_save_left_is_removed(self, tmp_path):
        save(tmp_path, 2)
        for left in (".tmp-step-00000004-abcd", ".replaced-step-00000002"):
            (tmp_path / "checkpoints" / left).mkdir()
        assert load_checkpoint(tmp_path).step == 2
        assert names(tmp_path) == ["step-00000002"]
        (tmp_path / "checkpoints" / ".tmp-step-00000004-abcd").mkdir()
        save(tmp_path, 4)
        assert names(tmp_path) == ["step-00000002", "step-00000004"]

    def test_a_half_done_replacement_is_undone(self, tmp_path):
        path = save(tmp_path, 2)
        for look in (load_checkpoint, latest_checkpoint):
            path.rename(path.with_name(".replaced-step-00000002"))
            assert look(tmp_path)
            assert names(tmp_path) == ["step-00000002"]

    def test_loading_leaves_alone_what_a_running_job_is_writing(self, tmp_path, monkeypatch):
        save(tmp_path, 2)
        (tmp_path / "checkpoints" / ".tmp-step-00000004-abcd").mkdir()
        with RunLock(tmp_path):
            monkeypatch.setattr(RunLock, "is_held_here", lambda _: False)  # as another process sees it
            assert load_checkpoint(tmp_path).step == 2
            assert ".tmp-step-00000004-abcd" in names(tmp_path)
            with pytest.raises(ValueError, match="in use by process"):
                save(tmp_path, 4)

    def test_saving_under_the_own_lock(self, tmp_path):
        with RunLock(tmp_path):
            save(tmp_path, 2)
            assert RunLock.is_held_here(tmp_path)

    @pytest.mark.parametrize("kwargs", [{"step": -1}, {"step": 1, "keep_last": 0}, {"step": 1, "keep_every": 0}])
    def test_arguments(self, tmp_path, kwargs):
        with pytest.raises(ValueError, match=r"step must be >= 0, keep_last and keep_every >= 1; got"):
            save(tmp_path, **kwargs)

    @pytest.mark.parametrize("state", [{"a": torch.ones(1)}, {"a": {1, 2}}, {(1, 2): 3}])
    def test_state_must_be_json(self, tmp_path, state):
        with pytest.raises(ValueError, match="the state to save is not JSON"):
            save_checkpoint(tmp_path, step=0, model=nn.Linear(1, 1), optimizer=None, state=state)
        assert not (tmp_path / "checkpoints").exists()

    def test_another_architecture(self, tmp_path):
        save(tmp_path, 2)
        save(tmp_path, 4)
        with pytest.raises(ValueError, match=r"holds the architecture 'gpt', and 'ngpt' was asked for") as caught:
            load_checkpoint(tmp_path, expect_architecture="ngpt")
        one_line(caught)
        assert load_checkpoint(tmp_path, expect_architecture="gpt").step == 4

    def test_manifest_states_schema_step_and_files(self, tmp_path):
        manifest = json.loads((save(tmp_path, 2) / "manifest.json").read_text())
        assert manifest["schema_version"] == 2
        assert manifest["step"] == 2
        assert set(manifest["files"]) == {MODEL, "state.json"}
