"""Which of transformers' attentions `fuse` takes, and why it leaves the others."""

import dataclasses
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_attentions import HIDDEN, B, T, make_config, make_module, make_tables  # noqa: E402
from hf_cases import CASES  # noqa: E402

from nsphere import families, hf  # noqa: E402
from nsphere.hf.rewire import wiring_of  # noqa: E402

LEFT = {
    "turns q and k in 0 calls": {
        "mllama", "inkling", "gemma4_vision", "internvl", "qianfan_ocr", "janus",
    },
    "turns q and k in [23] calls": {"gemma3n", "gemma4", "gemma4_unified", "diffusion_gemma", "deepseek_v4"},
    "more than a norm happens to query_states in one line": {"muse_glimmer", "muse_spark", "esmc"},
    "something happens to (query|key)_states between its norm and RoPE": {"idefics", "olmoe"},
    "the norm of query_states was not found": {"zaya"},
    "a norm is applied to something else besides q and k": {"t5gemma2_merged"},
    # its relative shift wants an input longer than the one used here
    "did not run on the inputs given": {"nemotron3_5_transcribe"},
}  # fmt: skip


def normalised(name: str) -> bool:
    return families.get(name).q is not None and families.get(name).k is not None


def reason(family: str) -> str | None:
    if not normalised(family):
        return "has no norm of both q and k per token"
    return next((reason for reason, names in LEFT.items() if family in names), None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fused_it_is_the_same_or_the_reason_is_given(case):
    case = dataclasses.replace(case, options={**case.options, "attn_implementation": "eager"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' configs, which are tiny on purpose
        config = make_config(case)
        module = make_module(case, config, torch.float32)
    hidden = torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(4))
    positions = (torch.arange(T) + 5).expand(B, T)
    tables = make_tables(case, config, hidden, positions)

    def inputs():
        if case.forward is not None:
            return case.forward(hidden, tables, positions, module)
        return {"hidden_states": hidden, "position_embeddings": tables, "attention_mask": None}

    why = reason(case.family)
    if why is not None:
        with pytest.raises(ValueError, match=why):
            hf.fuse(module, inputs=inputs())
        assert wiring_of(module) is None
        return
    with torch.no_grad():
        before = module(**inputs())
        for rounding in ("family", "fused"):
            hf.fuse(module, rounding=rounding, inputs=inputs())
            after = module(**inputs())
            a, b = (o[0] if isinstance(o, tuple) else o for o in (after, before))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_more_than_fifty_families_are_fused():
    fused = {case.family for case in CASES if reason(case.family) is None}
    assert len(fused) >= 55
