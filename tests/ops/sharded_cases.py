"""The ops on DTensors over 2 ranks, held against the same call on whole tensors: values and every gradient."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nsphere.norms import NormSpec
from nsphere.ops.normalized_update import normalized_update
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors, qk_norm_rope
from nsphere.rope import RopeSpec

B, T, H, HKV, D = 2, 2, 4, 2, 8


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(tensors, wholes, what):
    """Each DTensor, gathered (which sums a Partial), is its whole counterpart, within roundings of fp32."""
    for i, (a, b) in enumerate(zip(tensors, wholes, strict=True)):
        assert isinstance(a, DTensor), f"{what}: {i} is no DTensor"
        torch.testing.assert_close(
            a.full_tensor(), b, rtol=1e-5, atol=1e-5, msg=lambda text, i=i: f"{what} {i}: {text}"
        )


def check_update(mesh, backend):
    h, o, lr, grad = random(B, T, D), random(B, T, D, seed=1), random(D, seed=2).abs(), random(B, T, D, seed=3)
    for placement in (Shard(0), Shard(1), Replicate()):
        for eigen_lr in (lr, lr[:1], lr[0]) if placement == Shard(0) else (lr,):
            results = []
            for place in (lambda t, p: t.clone(), lambda t, p: distribute_tensor(t.clone(), mesh, [p])):
                leaves = [place(h, placement), place(o, placement), place(eigen_lr, Replicate())]
                leaves = [t.detach().requires_grad_() for t in leaves]
                y = normalized_update(*leaves, backend=backend)
                results.append([y, *torch.autograd.grad(y, leaves, place(grad, placement))])
            same(results[1], results[0], f"normalized_update, {placement}, eigen_lr {tuple(eigen_lr.shape)}")


def check_qk(mesh, backend):
    half = RopeSpec(D)
    rms, layer = NormSpec("rms", 1e-6, weight="shared"), NormSpec("layer", 1e-5, weight="per_head", bias=True)
    scalar, unit = NormSpec("rms", 1e-6, weight="scalar_per_head"), NormSpec("l2", 0.0)
    full = NormSpec("rms", 1e-6, weight="full")
    shapes = {"shared": lambda h: (D,), "per_head": lambda h: (h, D), "scalar_per_head": lambda h: (h,)}
    shapes |= {"full": lambda h: (h * D,), "none": lambda h: None}
    cos, sin = half.tables(T)
    rows, tokens, heads_split, whole = Shard(0), Shard(1), Shard(2), Replicate()
    for spec, placements in (
        (SideSpec(rms, half), (rows, tokens, heads_split, whole)),
        (SideSpec(layer, half), (rows, heads_split)),
        (SideSpec(scalar, half), (rows, heads_split)),
        (SideSpec(unit, half, norm_first=False), (tokens, heads_split)),
        (SideSpec(full, half, over="full"), (rows, tokens, whole)),
    ):
        scaled = spec.norm is unit
        for placement in placements:
            results = []
            for sharded in (False, True):

                def place(t, p, sharded=sharded):
                    return (distribute_tensor(t, mesh, [p]) if sharded else t.clone()).detach().requires_grad_()

                leaves, sides, grads = [], [], []
                for i, heads in enumerate((H, HKV)):
                    leaves.append(place(random(B, T, heads, D, seed=i), placement))
                    y_grad = random(B, T, heads, D, seed=5 + i)
                    grads.append(distribute_tensor(y_grad, mesh, [placement]) if sharded else y_grad)
                    shape = shapes[spec.norm.weight](heads)
                    per_head = len(shape or ()) and shape[0] == heads
                    along = Shard(0) if placement == Shard(2) and per_head else Replicate()
                    weight = None if shape is None else place(random(*shape, seed=2 + i), along)
                    bias = place(random(*shape, seed=8 + i), Replicate()) if spec.norm.bias else None
                    scale = place(random(H, D, seed=4), Replicate()) if scaled and i == 0 else None
                    sides.append(SideTensors(weight, bias, cos, sin, scale, constant=1.5))
                learned = [w for t in sides for w in (t.weight, t.bias, t.multiplier) if w is not None]
                ys = qk_norm_rope(*leaves, spec, spec, *sides, backend=backend)
                results.append([*ys, *torch.autograd.grad(ys, [*leaves, *learned], grads)])
            same(results[1], results[0], f"qk_norm_rope, {spec.norm.weight}, {placement}")


def check_refusals(mesh):
    h = distribute_tensor(random(B, T, D), mesh, [Shard(2)])
    rows = distribute_tensor(random(B, T, D), mesh, [Shard(0)])
    q = distribute_tensor(random(B, T, H, D), mesh, [Shard(2)])
    over = SideSpec(NormSpec("rms", 1e-6), None, over="full")
    calls = {
        "a norm spans the last dim": lambda: normalized_update(h, h, torch.ones(D)),
        "redistribute one of them": lambda: normalized_update(
            rows, rows.redistribute(placements=[Shard(1)]), torch.ones(D)
        ),
        "a plain tensor beside DTensors": lambda: normalized_update(rows, random(B, T, D), torch.ones(D)),
        "a norm spans several heads": lambda: qk_norm_rope(q, q, over, over, SideTensors(), SideTensors()),
    }
    for message, call in calls.items():
        try:
            call()
        except ValueError as error:
            assert message in str(error), str(error)
        else:
            raise AssertionError(f"{message}: accepted")


def work(backend):
    """For `ranks.Job`."""

    def run(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ranks",))
        check_update(mesh, backend)
        check_qk(mesh, backend)
        check_refusals(mesh)
        dist.destroy_process_group()

    return run
