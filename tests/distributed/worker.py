"""What the ranks of a test do: many checks in one process group, whose numbers they write.

worker.py FOLDER two_ranks 2
"""

import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ranks
import tiny
import torch
import torch.distributed as dist
from mutations import MUTATIONS, applied
from torch.distributed.tensor import Shard, distribute_tensor
from traffic import counted

from nsphere.collectives import local, split_axes
from nsphere.hypersphere import assert_on_hypersphere, max_norm_deviation, project_what_is_off_, sphere_matrices
from nsphere.multiplier import LearnedMultiplier
from nsphere.norms import register_norm
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec
from nsphere.tensor_parallel import parallelize_qk_norm
from nsphere.train import scaling
from nsphere.train.config import resolve
from nsphere.train.data import DataConfig, load_corpus
from nsphere.train.distributed import Layout, World, start
from nsphere.train.model_state import canonical_name
from nsphere.train.muon import ShardedMuon
from nsphere.train.trainer import Trainer

STEPS, FEW = 10, 4
FULL = "gpt-qknorm:qk_norm_over=full"
NANOGPT = ("gpt:convention=nanogpt,bias=true", "gpt:convention=nanogpt,tied=false")
SHAPE: dict[str, Any] = {"d_model": 32, "num_heads": 4, "d_mlp": 64, "batch_size": 8, "steps": STEPS}


class Job:
    """The checks' surroundings: data, and the runs of one process that others are held against."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if dist.get_rank() == 0:
            tiny.text_file(folder)
        dist.barrier()
        self.corpus = load_corpus(DataConfig(data=str(folder / "text.txt")), cache_dir=None)
        self.references: dict[str, Any] = {}

    def trainer(self, arm: str, world: World | None = None, compile: bool = False, **shape: Any) -> Trainer:
        config = resolve(arm, tiny.config(**{**SHAPE, **shape}))
        return Trainer(arm, config, tiny.options(micro_batch_size=2, compile=compile), self.corpus, world)

    def run(
        self, arm: str, world: World | None = None, steps: int = STEPS, evaluate: bool = True, **shape: Any
    ) -> dict[str, Any]:
        trainer = self.trainer(arm, world, **shape)
        done = [trainer.step() for _ in range(steps)]
        return {
            "losses": [r.loss for r in done],
            "grad_norms": [r.grad_norm for r in done],
            "val_loss": trainer.evaluate() if evaluate else None,
            "weights": whole_weights(trainer),
        }

    def against_one(
        self, arm: str, world: World, steps: int = STEPS, compile: bool = False, **shape: Any
    ) -> dict[str, float]:
        """How far a layout's numbers are from those of one eager process, relative to those; empty but on rank 0.

        A compiled one is not evaluated: that is another compilation.
        """
        many = self.run(arm, world, steps, evaluate=not compile, compile=compile, **shape)
        # rank 0 writes the numbers, the others wait for it at the next collective; QKClip asks all ranks of a job
        if dist.get_rank() != 0 and "qk_clip" not in arm:
            return {}
        key = json.dumps([arm, steps, shape])
        if key not in self.references:
            self.references[key] = self.run(arm, None, steps, **shape)
        one = self.references[key]
        found = {
            "loss": max(abs(a - b) / b for a, b in zip(many["losses"], one["losses"], strict=True)),
            "grad_norm": max(abs(a - b) / b for a, b in zip(many["grad_norms"], one["grad_norms"], strict=True)),
            # the bias of k moves all logits of a row alike: its gradient is rounding, of which Adam makes a step
            "weights": max(
                ((many["weights"][name] - w).norm() / w.norm()).item()
                for name, w in one["weights"].items()
                if not name.endswith("W_k.bias")
            ),
        }
        if not compile:
            found["val_loss"] = abs(many["val_loss"] - one["val_loss"]) / one["val_loss"]
        return found


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    parameters = {canonical_name(name): p.detach() for name, p in trainer.model.named_parameters()}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in parameters.items()}


def same_start(job: Job, world: World) -> bool:
    """Whether a layout begins with the bits of one process, parameters and buffers."""
    same = True
    arms = ("ngpt", "gpt-qknorm", "gpt-tied", "ngpt-fixed-suv")
    for arm in arms if world.tp > 1 else (*arms, *NANOGPT):
        one, many = job.trainer(arm), job.trainer(arm, world)
        for mine, theirs in ((whole_weights(one), whole_weights(many)), (buffers(one), buffers(many))):
            same &= mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())
    return same


def buffers(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {canonical_name(name): buffer for name, buffer in trainer.model.named_buffers()}


@contextmanager
def world_of(**layout: Any) -> Iterator[World]:
    with start(Layout(**layout, timeout=120), "cpu") as world:
        yield world


def same_twice(job: Job, arm: str, world: World) -> bool:
    first, second = job.run(arm, world, 4), job.run(arm, world, 4)
    weights = all(torch.equal(w, second["weights"][name]) for name, w in first["weights"].items())
    return weights and all(first[k] == second[k] for k in ("losses", "grad_norms", "val_loss"))


def on_the_sphere(job: Job, world: World, **shape: Any) -> dict[str, Any]:
    """Deviations after training; a planted one is found by all ranks and repaired, and nothing else is touched."""
    trainer = job.trainer("ngpt", world, **shape)
    trainer.step()
    model = trainer.model
    trained = max_norm_deviation(model)
    assert trained is not None
    found = {"trained": trained.value}
    for name, row in (("blocks.1.attn.W_o.weight", 5), ("blocks.0.mlp.W_down.weight", 30), ("embed.weight", 70)):
        matrix = {m.name: m for m in sphere_matrices(model)}[name]
        plant(matrix.weight, matrix.dim, row)
        worst = max_norm_deviation(model)
        assert worst is not None
        found[name] = [worst.name, worst.row, worst.value]
        try:
            assert_on_hypersphere(model)
            found[name].append("passed")
        except AssertionError as error:
            found[name].append(str(error))
        before = {m.name: local(m.weight).clone() for m in sphere_matrices(model)}
        project_what_is_off_(model)
        changed = sorted(m.name for m in sphere_matrices(model) if not torch.equal(local(m.weight), before[m.name]))
        found[name].append(max(t.value if (t := max_norm_deviation(model)) else 1.0, 0.0))
        found[name].append(sorted({name for names in world.all(lambda names=changed: names) for name in names}))
    return found


def plant(weight: Any, dim: int, row: int) -> None:
    """Make vector `row` of a matrix 1.5 times as long, whichever ranks hold it."""
    if not hasattr(weight, "full_tensor"):
        with torch.no_grad():
            weight.select(1 - dim, row).mul_(1.5)
        return
    factors = torch.ones(weight.shape[1 - dim])
    factors[row] = 1.5
    whole = weight.detach().full_tensor() * factors.unsqueeze(dim)
    # this rank's part of the new matrix, by the same cuts as the parameter's
    part = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    with torch.no_grad():
        weight.to_local().copy_(part.to_local())


def sent(job: Job, arm: str, world: World, micro_batches: int = 1, **shape: Any) -> dict[str, Any]:
    """Collectives and bytes of the second step, and bytes of state; as measured, and on paper."""
    trainer = job.trainer(arm, world, batch_size=2 * micro_batches * world.dp, **shape)
    trainer.step()
    with counted() as traffic:
        trainer.step()
    layout, config = world.layout, trainer.config
    bf16, muon = trainer.autocast_dtype is not None, config.optimizer == "muon"
    if muon:  # of an all-to-all each rank has seen its own part
        traffic.bytes["all_to_all"] = int(world.sum(torch.tensor(traffic.bytes["all_to_all"])))
    split = sum(bool(split_axes(m.weight, m.dim)) for m in sphere_matrices(trainer.model))
    state = [t for o in trainer.optimizers for s in o.state.values() for t in s.values() if t.dim()]
    numbers = sum(local(t).numel() for t in [*state, *trainer.model.parameters()])
    gradients = sum(local(p).numel() for p in trainer.model.parameters())
    return {
        "calls": dict(traffic.calls),
        "bytes": dict(traffic.bytes),
        "split_matrices": split,
        "state_bytes": 4 * (numbers + gradients),
        "on_paper": scaling.traffic(
            trainer.model_config, layout, rows=2, micro_batches=micro_batches, bf16=bf16, muon=muon
        ),
        "state_on_paper": scaling.state_bytes(trainer.model_config, layout, muon=muon),
    }


def muon_bits(world: World) -> bool:
    """Whether the same gradients make the same weights as torch's Muon of whole matrices; some ranks have no part."""
    assert world.mesh is not None
    mesh, rng = world.mesh["dp_shard"], torch.Generator().manual_seed(0)
    shapes = [(8, 12, 0), (13, 6, 0), (1, 9, 0), (6, 5, 1), (9, 4, 0)][: world.size - 1 if world.size > 2 else 5]
    whole = [torch.nn.Parameter(torch.randn(n, m, generator=rng)) for n, m, _ in shapes]

    def split(w: torch.Tensor, dim: int) -> torch.Tensor:
        return distribute_tensor(w.detach().clone(), mesh, [Shard(dim)], src_data_rank=None)

    parts = [torch.nn.Parameter(split(w, dim)) for w, (_, _, dim) in zip(whole, shapes, strict=True)]
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = torch.optim.Muon(whole, **options), ShardedMuon(parts, **options)
    for _ in range(3):
        for w, part, (_, _, dim) in zip(whole, parts, shapes, strict=True):
            w.grad = torch.randn(w.shape, generator=rng)
            part.grad = split(w.grad, dim)
        for optimizer in optimizers:
            optimizer.step()
    return all(torch.equal(w, part.full_tensor()) for w, part in zip(whole, parts, strict=True))  # type: ignore[attr-defined]


@register_norm("tests-own")
class OwnNorm(torch.nn.Module):
    """A norm over a head that no spec describes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (1 + x.abs().mean(-1, keepdim=True))


@register_norm("tests-own-per-head")
class OwnPerHead(OwnNorm):
    """The same with weights of which nobody knows to which head they belong."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim)
        self.weight = torch.nn.Parameter(torch.ones(num_heads, dim))


PARTS: dict[str, dict[str, Any]] = {
    "shared": {"q": "rms"},
    "per head": {"q": "rms", "weight": "per_head", "multiplier": True},
    "scalar per head": {"q": "l2", "weight": "scalar_per_head"},
    "groups in a head": {"q": "rms", "over": 4, "weight": "per_head", "weight_cast": "before"},
    "a slice of a head": {"q": "layer", "over": (0, 6), "weight": "per_head", "bias": True},
    "all heads": {"q": "rms", "over": "full", "weight": "shared", "multiplier": True},
    "all heads, centred": {"q": "layer", "over": "full", "weight": "shared", "bias": True, "place": "after"},
}


def qk_norm_parts(world: World) -> dict[str, float]:
    """The largest difference of this rank's part of a QKNorm, forward and backward, from the whole one's."""
    assert world.mesh is not None
    mesh, found = world.mesh["tp"], {}
    for kv_heads in (4, 1):
        for name, options in PARTS.items():
            torch.manual_seed(0)
            options = dict(options)
            if options.pop("multiplier", False):
                options["multiplier"] = LearnedMultiplier((4, 1))
            rope = RopeSpec(8)
            whole = QKNorm(head_dim=8, num_heads=4, num_kv_heads=kv_heads, rope=rope, backend="reference", **options)
            for p in whole.parameters():
                torch.nn.init.uniform_(p, 0.5, 1.5)
            part = copy.deepcopy(whole)
            parallelize_qk_norm(part, mesh)
            tables = rope.tables(torch.arange(5))
            inputs = torch.randn(2, 5, 4, 8), torch.randn(2, 5, kv_heads, 8)
            weights = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 8)
            here = slice(2 * world.tp_rank, 2 * world.tp_rank + 2)
            keys = here if kv_heads == 4 else slice(0, 1)
            ends = []
            for norm, cuts in ((whole, (slice(None),) * 2), (part, (here, keys))):
                q, k = (x[:, :, cut].clone().requires_grad_() for x, cut in zip(inputs, cuts, strict=True))
                y, z = norm(q, k, rope=tables)
                uses = weights[0][:, :, cuts[0]], weights[1][:, :, cuts[0]]
                # every head of q uses its key head, as in attention
                keys_used = z.repeat_interleave(uses[1].shape[2] // z.shape[2], 2)
                (y * uses[0] + keys_used * uses[1]).sum().backward()
                ends.append((y, z, q.grad, k.grad))
            k_grad = ends[1][3]
            if kv_heads == 1:  # two ranks hold this head, and each has the gradient of its own queries
                k_grad = sum(world.all(lambda k_grad=k_grad: k_grad))
            got = (*ends[1][:3], k_grad)
            cuts = here, keys, here, keys
            pairs = zip(got, (whole_[:, :, cut] for whole_, cut in zip(ends[0], cuts, strict=True)), strict=True)
            found[f"{name}, {kv_heads} key heads"] = max((a - b).abs().max().item() for a, b in pairs)
    return {name: max(world.all(lambda name=name: found[name])) for name in found}


def refusal(make: Callable[[], Any]) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return "accepted"


def two_ranks(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {"parity": {}, "same_twice": {}, "mutations": {}, "sent": {}, "refused": {}}
    with world_of(dp_shard=2) as fsdp, world_of(tp=2) as tp, world_of(dp_replicate=2) as ddp:
        for arm, steps in (("ngpt", STEPS), ("gpt", FEW), (FULL, FEW)):
            found["parity"][f"{arm} fsdp"] = job.against_one(arm, fsdp, steps)
            found["parity"][f"{arm} tp"] = job.against_one(arm, tp, steps)
        found["parity"]["ngpt replicated"] = job.against_one("ngpt", ddp)
        for arm in ("ngpt", "gpt-qknorm", FULL):
            found["parity"][f"{arm} multi-query tp"] = job.against_one(arm, tp, FEW, num_kv_heads=1)
        # 33 columns of W_down are not shared evenly by two: the projection then needs its all-reduce
        found["parity"]["ngpt odd fsdp"] = job.against_one("ngpt", fsdp, FEW, d_mlp=33)
        found["parity"]["gpt-tied fsdp"] = job.against_one("gpt-tied", fsdp, FEW)
        for arm in NANOGPT:
            found["parity"][f"{arm} fsdp"] = job.against_one(arm, fsdp, FEW)
        found["parity"]["gpt-tied tp"] = job.against_one("gpt-tied", tp, FEW)
        found["parity"]["norm of one's own tp"] = job.against_one("gpt:qk_norm=tests-own", tp, FEW)
        found["parity"]["qk-clip fsdp"] = job.against_one("gpt:qk_clip=0.01", fsdp, FEW)
        for arm in ("ngpt-forward", "ngpt-scalar-suv", "ngpt:convention=nvidia"):
            found["parity"][f"{arm} tp"] = job.against_one(arm, tp, 3)
        found["bf16"] = {
            "fsdp": job.against_one("ngpt", fsdp, 3, dtype="bfloat16"),
            "tp": job.against_one("ngpt", tp, 3, dtype="bfloat16"),
        }
        found["muon"] = {
            name: job.against_one("gpt-muon", world, FEW) for name, world in (("fsdp", fsdp), ("ddp", ddp))
        }
        found["muon"]["ngpt odd fsdp"] = job.against_one("ngpt:optimizer=muon", fsdp, FEW, d_mlp=33)
        found["muon_bits"] = muon_bits(fsdp)
        found["same_start"] = same_start(job, fsdp)
        with world_of(tp=2, activation_checkpointing=True) as ac:
            found["parity"]["ngpt checkpointed tp"] = job.against_one("ngpt", ac, FEW)
        for name, world in (("fsdp", fsdp), ("tp", tp)):
            found["same_twice"][name] = same_twice(job, "ngpt", world)
        worlds, sound = {"fsdp": fsdp, "tp": tp}, {}
        for name, mutation in MUTATIONS.items():
            world = worlds[mutation.layout]
            run = (mutation.arm, mutation.layout, str(mutation.shape))
            if run not in sound:
                sound[run] = job.against_one(mutation.arm, world, 2, **mutation.shape)
            with applied(mutation):
                broken = job.against_one(mutation.arm, world, 2, **mutation.shape)
            found["mutations"][name] = {"sound": sound[run], "broken": broken}
        found["qk_norm_parts"] = qk_norm_parts(tp)
        found["sphere fsdp"] = on_the_sphere(job, fsdp, d_mlp=33)
        for arm in ("gpt", "ngpt"):
            found["sent"][f"{arm} fsdp"] = sent(job, arm, fsdp)
            found["sent"][f"{arm} tp"] = sent(job, arm, tp)
        found["sent"]["ngpt accumulated tp"] = sent(job, "ngpt", tp, micro_batches=2)
        found["sent"]["gpt-muon fsdp"] = sent(job, "gpt-muon", fsdp)
        found["sent"]["ngpt odd fsdp"] = sent(job, "ngpt", fsdp, d_mlp=33)
        found["refused"] = {
            "heads": refusal(lambda: job.trainer("gpt", tp, num_heads=1)),
            "batch": refusal(lambda: job.trainer("gpt", fsdp, batch_size=6)),
            "d_mlp": refusal(lambda: job.trainer("gpt", tp, d_mlp=33)),
            "context": refusal(lambda: job.trainer("gpt", tp, context=15)),
            "muon": refusal(lambda: job.trainer("gpt-muon", tp)),
            "own_full": refusal(lambda: job.trainer("gpt:qk_norm=tests-own,qk_norm_over=full", tp)),
            "own_per_head": refusal(lambda: job.trainer("gpt:qk_norm=tests-own-per-head", tp)),
            "qk_clip": refusal(lambda: job.trainer("gpt:qk_clip=100", tp)),
            "nanogpt": refusal(lambda: job.trainer(NANOGPT[0], tp)),
            "size": refusal(lambda: start(Layout(tp=3), "cpu").__enter__()),
        }
    return found


def four_ranks(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {"parity": {}, "same_twice": {}, "sent": {}}
    with (
        world_of() as fsdp,
        world_of(dp_replicate=2) as hsdp,
        world_of(tp=2) as fsdp_tp,
        world_of(dp_replicate=2, tp=2) as ddp_tp,
        world_of(tp=4) as tp,
    ):
        for name, world in (("fsdp 4", fsdp), ("hsdp 2x2", hsdp), ("fsdp 2 x tp 2", fsdp_tp)):
            for arm in ("ngpt", "gpt", FULL):
                found["parity"][f"{arm} {name}"] = job.against_one(arm, world, FEW)
        found["parity"][f"{FULL} two key heads, tp 4"] = job.against_one(FULL, tp, 2, num_kv_heads=2)
        found["parity"]["ngpt replicated 2 x tp 2"] = job.against_one("ngpt", ddp_tp, 3)
        found["parity"]["ngpt multi-query fsdp 2 x tp 2"] = job.against_one("ngpt", fsdp_tp, 3, num_kv_heads=1)
        found["parity"]["gpt-tied fsdp 2 x tp 2"] = job.against_one("gpt-tied", fsdp_tp, 3)
        found["muon"] = {
            name: job.against_one("gpt-muon", world, FEW) for name, world in (("fsdp 4", fsdp), ("hsdp 2x2", hsdp))
        }
        found["muon_bits"] = muon_bits(fsdp)
        found["same_start"] = same_start(job, fsdp_tp)
        found["same_twice"]["fsdp 2 x tp 2"] = same_twice(job, "ngpt", fsdp_tp)
        found["same_twice"]["hsdp 2x2"] = same_twice(job, "ngpt", hsdp)
        found["sphere fsdp 2 x tp 2"] = on_the_sphere(job, fsdp_tp)
        for arm in ("gpt", "ngpt"):
            found["sent"][f"{arm} fsdp 4"] = sent(job, arm, fsdp)
            found["sent"][f"{arm} fsdp 2 x tp 2"] = sent(job, arm, fsdp_tp)
            found["sent"][f"{arm} hsdp 2x2"] = sent(job, arm, hsdp)
        found["sent"]["ngpt bf16 fsdp 2 x tp 2"] = sent(job, "ngpt", fsdp_tp, dtype="bfloat16")
        found["sent"]["ngpt accumulated fsdp 4"] = sent(job, "ngpt", fsdp, micro_batches=2)
    return found


def compiled(job: Job) -> dict[str, Any]:
    """Compiled ranks, some of which compute their activations again in the backward pass."""
    with world_of(tp=2) as tp, world_of(dp_shard=2, activation_checkpointing=True) as checkpointed_fsdp:
        return {
            "tp": job.against_one("ngpt", tp, 2, compile=True, num_layers=1),
            "checkpointed fsdp": job.against_one("ngpt", checkpointed_fsdp, 3, compile=True, num_layers=1),
        }


def work(what: Callable[[Job], dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = what(Job(folder))
    if dist.get_rank() == 0:
        (folder / f"{what.__name__}.json").write_text(json.dumps(numbers, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), {f.__name__: f for f in (two_ranks, four_ranks, compiled)}[sys.argv[2]]
    gc.freeze()  # what is imported is shared by the ranks, and not looked through by each
    job = ranks.Job(int(sys.argv[3]), lambda _: work(what, folder), folder / f"{what.__name__}.log")
    if any(job.wait(540)):
        sys.exit(job.output()[-6000:])
