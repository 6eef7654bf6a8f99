"""Every norm of queries or keys in transformers is compared, or listed here with the reason why not."""

import ast
import pathlib
import re

import pytest

transformers = pytest.importorskip("transformers")

from hf_cases import CASES  # noqa: E402

from nsphere import families  # noqa: E402

# what a module calls a norm of q, k or their latents, and functions that normalise
ATTRIBUTE = re.compile(
    r"(^|_)(q|k|qk|query|key|kv)(_\w+)?_?(norm|ln|layernorm|clip|normalization)\w*$|(^|_)norms?_(q|k|qk|query|key)\w*$"
)
CALL = re.compile(r"\bF\.normalize|functional\.normalize|l2norm$|_len_norm$")
HINT = re.compile(r"(q|k|qk|query|key|kv)_?\w*_?(norm|ln|clip)|norms?_(q|k)|l2norm|_len_norm|\.normalize\(")
ATTENTION = re.compile(r"Attention|Attn|DeltaNet|Indexer|Compressor")

DELTA = "family gated_deltanet, test_gated_deltanet"
INDEXER = "an indexer: plain norms"
# class -> what becomes of it: a family that another test compares, or why it is none
OTHERS = {
    "AriaCrossAttention": "its norms precede the projections",
    "BltCrossAttention": "its norms precede the projections",
    "NeoMMEExclusiveSelfAttention": "a projection of its output",
    **dict.fromkeys(("BailingHybridDeltaAttention", "Glm5NextTextLinearAttention", "KimiLinearDeltaAttention"), DELTA),
    **dict.fromkeys(("OlmoHybridGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"), DELTA),
    **dict.fromkeys(("Qwen3NextGatedDeltaNet", "Qwen4ExpTextGatedDeltaNet"), DELTA),
    **dict.fromkeys(("AXK2Indexer", "DeepseekV32Indexer", "DeepseekV4Indexer", "Dots3NoteTextIndexer"), INDEXER),
    **dict.fromkeys(("Glm5NextTextIndexer", "GlmMoeDsaIndexer", "HYV4Indexer", "MiniMaxM3VLIndexer"), INDEXER),
    **dict.fromkeys(("MistralLarge4TextIndexer", "Qwen4ExpTextQSAIndexer"), INDEXER),
    "DeepseekV4HCACompressor": "a latent: a plain norm",
    "DeepseekV4CSACompressor": "a latent: a plain norm",
    "IdeficsPerceiverAttention": "family idefics_perceiver, test_functional_norms",
    "Inkling2FullAttention": "family inkling2, as Inkling2SlidingAttention",
    "LSHSelfAttention": "family reformer, test_functional_norms",
    "Qwen3OmniMoeCode2WavAttention": "its norms are identities",
    "SwiftFormerEfficientAdditiveAttention": "family swiftformer, test_functional_norms",
    "Swin2SRSelfAttention": "family swin2sr, test_cosine_attention",
    "Swinv2SelfAttention": "family swinv2, test_cosine_attention",
}


def normalising_attentions():
    """(directory, class) of every attention in transformers that normalises queries or keys."""
    for path in sorted((pathlib.Path(transformers.__file__).parent / "models").glob("*/*.py")):
        if not path.name.startswith("modeling_") and path.name != "perceiver.py":
            continue
        text = path.read_text(encoding="utf-8")
        if not HINT.search(text):
            continue
        for kind in ast.parse(text).body:
            if not isinstance(kind, ast.ClassDef) or not ATTENTION.search(kind.name):
                continue
            nodes = list(ast.walk(kind))
            made = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)]
            names = [t.attr for n in made for t in n.targets if isinstance(t, ast.Attribute)]
            calls = [ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)]
            keywords = {k.arg for n in nodes if isinstance(n, ast.Call) for k in n.keywords}
            if (
                any(map(ATTRIBUTE.search, names))
                or any(map(CALL.search, calls))
                or "use_qk_l2norm_in_kernel" in keywords
            ):
                yield path.parent.name, kind.name


def test_no_normalising_attention_is_forgotten():
    compared = {tuple(case.attention.split(":")) for case in CASES}
    found = list(normalising_attentions())
    assert len(found) >= 100
    forgotten = [f"{directory}:{kind}" for directory, kind in found if (directory, kind) not in compared]
    forgotten = [name for name in forgotten if name.split(":")[1] not in OTHERS]
    assert not forgotten, f"compare these in hf_cases.py, or say why not: {forgotten}"
    assert {kind for _, kind in found} >= OTHERS.keys()  # nothing is excused that is not there


def test_the_families_it_speaks_of_exist():
    named = {re.match(r"family (\w+)", why)[1] for why in OTHERS.values() if why.startswith("family")}
    assert named <= families.FAMILIES.keys()
