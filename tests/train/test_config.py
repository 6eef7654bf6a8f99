import dataclasses

import pytest

from nsphere.ngpt import NGPTConfig
from nsphere.train.arms import ARMS, parse_arm
from nsphere.train.config import TrainConfig, differences, model_config, read_config, resolve, usual_lr


def test_recipes_per_architecture() -> None:
    gpt, ngpt = (resolve(arm, TrainConfig(preset="gpt2-small", steps=50_000)) for arm in ("gpt", "ngpt"))
    assert (gpt.warmup_steps, gpt.weight_decay) == (2000, 0.1)
    assert (ngpt.warmup_steps, ngpt.weight_decay) == (0, 0.0)
    assert (gpt.beta1, gpt.beta2, gpt.adam_eps, gpt.grad_clip, gpt.schedule) == (0.9, 0.95, 1e-8, 1.0, "cosine")
    assert resolve("gpt", TrainConfig(steps=600)).warmup_steps == 120
    assert resolve("ngpt", TrainConfig(preset="demo", steps=300)).warmup_steps == 30


def test_resolving_is_idempotent_and_complete() -> None:
    once = resolve("ngpt", TrainConfig())
    assert resolve("ngpt", once) == once
    unset = {f.name for f in dataclasses.fields(once) if getattr(once, f.name) is None}
    assert unset == {"num_kv_heads", "head_dim", "d_mlp", "init_from", "qk_clip"}


def test_flags_change_the_preset_and_arms_change_the_model() -> None:
    config = model_config("ngpt:s_z_init=3,eigen_lr=scalar,qk_norm=false", TrainConfig(d_model=128), 99)
    assert isinstance(config, NGPTConfig)
    assert (config.d_model, config.num_layers, config.vocab_size) == (128, 4, 99)
    assert (config.s_z_init, config.eigen_lr, config.qk_norm) == (3.0, "scalar", False)
    assert config.eigen_lr_init == 0.25  # the demo preset's


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_makes_a_config(arm: str) -> None:
    resolved = resolve(arm, TrainConfig())
    config = model_config(arm, resolved, 256)
    for name, value in parse_arm(arm).model.items():
        assert getattr(config, name) == value
    assert resolved.optimizer == ("muon" if "muon" in arm else "adamw")


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        ("gpt-qknrm", {}, "unknown arm 'gpt-qknrm'; did you mean gpt-qknorm"),
        ("ngpt:s_z=vectr", {}, "s_z is 'vectr'; did you mean vector"),
        ("ngpt:sz_init=1", {}, "has no field 'sz_init'; did you mean s_z_init"),
        ("ngpt:s_z_init=one", {}, "'one', which is not a float"),
        ("gpt:tied=yes", {}, "choose true or false"),
        ("ngpt:d_model=3", {}, "has no field 'd_model'"),
        ("gpt:tied", {}, "is not FIELD=VALUE"),
        ("gpt", {"preset": "demmo"}, "unknown preset 'demmo'; did you mean demo"),
        ("gpt", {"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ("gpt", {"lr": float("nan")}, "lr must be a positive number, got nan"),
        ("gpt", {"steps": 0}, "steps must be at least 1, got 0"),
        ("gpt", {"beta2": 1.0}, "beta2 must be in"),
        ("gpt", {"optimizer": "mun"}, "optimizer is 'mun'; choose adamw, muon"),
        ("gpt", {"schedule": "cosin"}, "schedule is 'cosin'; choose cosine, linear, wsd"),
        ("gpt", {"dtype": "float16"}, "dtype is 'float16'; choose auto, bfloat16, float32"),
        ("gpt:warmup_steps=x", {}, "'x', which is not a int"),
        ("gpt", {"warmup_steps": 600}, "leaves nothing of 600 steps"),
        ("gpt", {"decay_fraction": 0.0}, "decay_fraction must be in"),
        ("gpt", {"seed": -1}, "seed must be from 0"),
        ("ngpt", {"weight_decay": 0.1}, "has no meaning for nGPT"),
        ("gpt", {"qk_clip": 0.0}, "qk_clip must be a positive number, got 0.0"),
        ("gpt:qk_clip=nan", {}, "qk_clip must be a positive number, got nan"),
        ("gpt-qknorm", {"qk_clip": 100.0}, "qk_clip 100 and gpt-qknorm: QK-norm undoes .* as gpt:qk_clip="),
        ("gpt:qk_norm=l2,qk_clip=100", {}, "QK-norm undoes"),
        ("ngpt-no-qknorm", {"qk_clip": 100.0}, "nGPT's query and key weights are unit vectors"),
    ],
)
def test_bad_values_say_what_and_what_instead(arm: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(arm, dataclasses.replace(TrainConfig(), **changes))


def test_qk_clip_goes_with_arms_that_have_no_qk_norm() -> None:
    for arm in ("gpt", "gpt:qk_norm=none", "gpt-qknorm:qk_norm=none", "gpt-qknorm-muon:qk_norm=none", "gpt-muon"):
        assert resolve(arm, TrainConfig(qk_clip=100.0)).qk_clip == 100.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 100, "num_heads": 3}, "d_model 100 is not divisible by num_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
    ],
)
def test_shapes_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config("gpt", dataclasses.replace(TrainConfig(), **changes), 256)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("gpt:qk_norm=foo", "foo"),
        ("gpt:init_std=-1", "init_std must be a positive number, got -1.0"),
        ("gpt:norm_eps=nan", "norm_eps must be a positive number, got nan"),
        ("ngpt:s_z_init=0", "s_z_init must be a positive number, got 0.0"),
        ("ngpt:eigen_lr_scale=inf", "eigen_lr_scale must be a positive number, got inf"),
    ],
)
def test_model_fields_that_cannot_be(arm: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config(arm, TrainConfig(), 256)


def test_an_arm_may_have_a_recipe_of_its_own() -> None:
    shared = TrainConfig(schedule="wsd")
    gpt = resolve("gpt:weight_decay=0.05,warmup_steps=7,optimizer=muon", shared)
    assert (gpt.weight_decay, gpt.warmup_steps, gpt.optimizer, gpt.schedule) == (0.05, 7, "muon", "wsd")
    assert resolve("gpt:weight_decay=0.05", gpt).weight_decay == 0.05


@pytest.mark.parametrize(
    ("arm", "changes", "source"),
    [
        ("ngpt", {}, "tuned beforehand for the demo preset"),
        ("ngpt", {"steps": 600}, "tuned beforehand for the demo preset"),
        ("ngpt", {"steps": 601}, "tuned for ngpt at the demo preset's settings, not for these"),
        ("ngpt", {"d_model": 128}, "not for these"),
        ("ngpt:s_z_init=1", {}, "not for these"),
        ("gpt-tied", {}, "tuned for gpt at the demo preset's settings, not for these"),
        ("gpt", {"optimizer": "muon"}, "not for these"),
        ("ngpt", {"preset": "1b"}, "a usual value, not tuned"),
    ],
)
def test_where_a_learning_rate_comes_from(arm: str, changes: dict, source: str) -> None:
    lr, said = usual_lr(arm, dataclasses.replace(TrainConfig(), **changes))
    assert source in said
    assert resolve(arm, dataclasses.replace(TrainConfig(), **changes)).lr == lr


def test_differences_are_named() -> None:
    ours = {"train": {"lr": 1e-3, "betas": (0.9, 0.95)}, "arm": "gpt"}
    assert differences(ours, {"train": {"lr": 1e-3, "betas": [0.9, 0.95]}, "arm": "gpt"}) == []
    assert differences(ours, {"train": {"lr": 2e-3, "betas": [0.9, 0.95]}, "arm": "gpt"}) == [
        "train.lr is 0.002 there, 0.001 asked for"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a run folder"), ("{", "is broken"), ("[]", "is broken"), ('{"schema_version": 99}', "newer")],
)
def test_config_files_that_cannot_be_read(tmp_path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
