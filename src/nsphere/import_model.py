"""Models from elsewhere as run folders: our own exports, transformers folders, checkpoints of nanoGPT and nGPTs."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsphere.export import METADATA_KEY, new_folder
from nsphere.foreign_names import unwrapped
from nsphere.gpt import GPTConfig
from nsphere.layers import Decoder
from nsphere.nanogpt import config_of, from_nanogpt_state_dict
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.ngpt_nvidia import from_reference_state_dict
from nsphere.ngpt_pytorch import from_ngpt_pytorch, parse_options
from nsphere.presets import make_config, make_model
from nsphere.train.checkpoint import save_checkpoint
from nsphere.train.config import SCHEMA_VERSION
from nsphere.train.data import DataConfig
from nsphere.train.files import atomic_write_json
from nsphere.train.model_state import some
from nsphere.train.run_folder import TOKENIZER_FOLDER
from nsphere.train.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, open_tokenizer


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model read from elsewhere."""

    model: Decoder
    config: dict[str, Any]
    """config.json of the run that it becomes."""
    step: int
    tokenizer: Tokenizer | None
    options_apply: bool = False
    """Whether it is a model that is built with options which its file does not hold."""


def import_model(
    source: Path,
    out: Path,
    *,
    num_heads: int | None = None,
    context: int | None = None,
    tokenizer: str | None = None,
    options: tuple[str, ...] = (),
) -> Imported:
    """Read a model and write it as a run folder, whole or not at all. Nothing in it is executed.

    Args:
        source: a .safetensors file of `nsphere export`; a transformers folder with an nGPT, a GPT-2, or a Llama or
            Qwen3 of the shape that GPT has; a checkpoint (ckpt.pt) of nanoGPT or of NVIDIA/ngpt, nGPT or GPT; a state
            dict of PyPI's nGPT-pytorch.
        out: the run folder to make; must not exist.
        num_heads: of a checkpoint that does not say.
        context: of a checkpoint that does not say.
        tokenizer: what made the tokens, as `DataConfig.tokenizer`; the source's own if not given.
        options: NAME=VALUE, what a model was built with and its file does not say: of nGPT-pytorch see
            `nsphere.ngpt_pytorch`; of nanoGPT gelu=tanh, where its MLP approximates GELU as OpenAI's does.

    Raises:
        ValueError: something is there already, the source says otherwise, or it can't be read as any of these, with
            the reason.
    """
    if os.path.exists(out):
        raise ValueError(f"{out} is there already; remove it, or choose another name")
    if source.is_dir():
        found = _from_folder(source)
    elif not source.is_file():
        raise ValueError(f"{source} does not exist; give a .safetensors file, a transformers folder or a ckpt.pt")
    elif source.suffix == ".safetensors":
        found = _from_safetensors(source)
    else:
        found = _from_checkpoint(source, num_heads, context, options)
    if options and not found.options_apply:
        raise ValueError(f"--option is for models of nGPT-pytorch and nanoGPT, which {source} is not; leave it out")
    for name, given in (("num_heads", num_heads), ("context", context)):
        if given is not None and given != (known := getattr(found.model.config, name)):
            raise ValueError(f"--{name.replace('_', '-')} is {given}, and {source} says {known}; leave it out")
    own = found.tokenizer if tokenizer is None else open_tokenizer(tokenizer)
    vocab_size = found.model.config.vocab_size
    if own is not None and own.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {own.vocab_size} tokens and the model of {source} {vocab_size}; give --tokenizer the "
            "one that it was trained with"
        )
    found = dataclasses.replace(found, tokenizer=own)
    with new_folder(out) as folder:
        save_checkpoint(
            folder,
            step=found.step,
            model=found.model,
            optimizer=None,
            state={"architecture": found.config["architecture"], "imported_from": source.name},
        )
        if own is not None:
            (folder / TOKENIZER_FOLDER).mkdir()
            own.save(folder / TOKENIZER_FOLDER)
        atomic_write_json(folder / "config.json", found.config)
    return found


def _record(model: Decoder) -> dict[str, Any]:
    """config.json of a model of which no more is known than its shape."""
    architecture = "ngpt" if isinstance(model, NGPT) else "gpt"
    return {
        "schema_version": SCHEMA_VERSION,
        "arm": architecture,
        "architecture": architecture,
        "model": dataclasses.asdict(model.config),
        "train": {},
        "data": dataclasses.asdict(DataConfig(data="unknown")),
    }


def _from_safetensors(path: Path) -> Imported:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if about is None:
        raise ValueError(f"{path} does not say what its tensors are; it is no file of nsphere export --to safetensors")
    if about["schema_version"] > SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {about['schema_version']}; install a newer nsphere")
    config = about["config"]
    model = make_model(make_config(config["architecture"], **config["model"]))
    _load(model, tensors | {name: tensors[owner] for name, owner in about["tied"].items()}, path)
    return Imported(model, config, about["step"], None)


def _load(model: Decoder, state: dict[str, Tensor], source: Path) -> None:
    """load_state_dict, with what does not fit in one sentence."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        faults = " ".join(str(error).split()).partition(": ")[2]
        raise ValueError(f"{source} does not fit the model it describes: {faults[:300]}") from None


def _from_folder(folder: Path) -> Imported:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no transformers folder: its config.json can't be read ({error})") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if isinstance(content, dict) and "architecture" in content:
        raise ValueError(f"{folder} is a run folder of nsphere already; use it as it is")
    if kind not in ("ngpt", "gpt2", "llama", "qwen3"):
        raise ValueError(f"{folder} holds a model of type {kind!r}; ngpt, gpt2, llama and qwen3 can be imported")
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"{folder} needs transformers: pip install 'nsphere[hf]'") from error
    from nsphere.hf import from_hf  # which also tells transformers of nGPT: no code of the folder runs

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # what is missing is said below, in one line
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            dtype="auto",
        )
        theirs, loading = loaded
    except Exception as error:  # whatever a config of any content brings about in transformers
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} can't be loaded, as it is not whole or no {kind} can be like that: {reason}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    if unequal := sorted(loading["mismatched_keys"]):
        name, saved, expected = unequal[0]
        raise ValueError(
            f"{folder} holds weights of another shape than its config.json says: {name} is {tuple(saved)}, not "
            f"{tuple(expected)}"
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{folder} is not whole: it lacks {some(missing)}; export it again")
    if more := sorted(loading["unexpected_keys"]):
        raise ValueError(
            f"{folder} holds {some(more)}, which a {type(theirs).__name__} of its config.json does not have"
        )
    model = from_hf(theirs).float()
    return Imported(model, _record(model), 0, _tokenizer(folder))


def _tokenizer(folder: Path) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    from nsphere.hf.tokenizer import byte_backend

    found = open_tokenizer(str(folder / "tokenizer.json"))
    if isinstance(found, SubwordTokenizer) and found.backend.get_vocab() == byte_backend().get_vocab():
        return ByteTokenizer()
    return found


class _Config:
    """Stands in for the config class of the authors' code: its fields, and no behaviour."""


# what numpy's random state, which training scripts save, is made of
_HARMLESS = re.compile(r"numpy(\._core|\.core)?(\.multiarray)?\.(_reconstruct|ndarray|dtype|scalar)|numpy\.dtypes\.\w+")


def _unpickled(path: Path) -> dict[str, Any]:
    """A .pt file, read with weights_only: tensors, plain data, numpy arrays and the authors' config class."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # torch names no narrower class
        raise ValueError(f"{path} is no checkpoint of torch.save: {error}") from error
    allowed: list[Any] = []
    for name in names:
        if name.endswith(".GPTConfig"):
            allowed.append((_Config, name))
        elif _HARMLESS.fullmatch(name):
            module, _, attribute = name.rpartition(".")
            allowed.append(getattr(__import__(module, fromlist=[attribute]), attribute))
            allowed.extend({type(np.dtype(kind)) for kind in ("uint8", "uint32", "int64", "float64")})
        else:
            raise ValueError(f"{path} holds a {name}, which is not read, as it could run code; save its 'model' alone")
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; a dict with 'model', or a state dict, can be imported"
        )
    return content


def _from_checkpoint(path: Path, num_heads: int | None, context: int | None, options: tuple[str, ...] = ()) -> Imported:
    content = _unpickled(path)
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise ValueError(f"{path} holds no state dict: names and tensors, by themselves or as its 'model'")
    said = content.get("model_args") or content.get("config") or {}
    said = said if isinstance(said, dict) else getattr(said, "__dict__", {})
    names = {unwrapped(name) for name in state}
    if "token_embed.linear.parametrizations.weight.original" in names or "token_embed.linear.weight" in names:
        if context is None:
            raise ValueError(f"{path} is of nGPT-pytorch, which does not say its context; give --context")
        config, ours = from_ngpt_pytorch(state, context, parse_options(options))
        model = make_model(config)
        _load(model, ours, path)
        return Imported(model, _record(model), 0, None, options_apply=True)
    if "transformer.wpe.weight" in names:
        return _from_nanogpt(path, content, state, said, num_heads, options)
    is_gpt = "rmsnorm_f.weight" in names
    if "transformer.wte.weight" not in names or not (is_gpt or "sz" in names):
        raise ValueError(
            f"{path} holds no model of the authors' code: it lacks transformer.wte.weight, and sz (nGPT) or "
            "rmsnorm_f.weight (GPT)"
        )
    num_heads = said.get("n_head", num_heads)
    context = said.get("block_size", context)
    if num_heads is None or context is None:
        raise ValueError(f"{path} does not say its number of heads and its context; give --num-heads and --context")
    ours = from_reference_state_dict(state)
    vocab_size, d_model = ours["embed.weight"].shape
    layers = [int(name.split(".")[1]) for name in ours if name.startswith("blocks.")]
    shape = {
        "vocab_size": vocab_size,
        "context": context,
        "d_model": d_model,
        "num_layers": 1 + max(layers, default=0),
        "num_heads": num_heads,
        "convention": "nvidia",
    }
    scale = said.get("base_scale", d_model**-0.5)
    model = make_model(
        GPTConfig(**shape, init_std=scale)
        if is_gpt
        else NGPTConfig(**shape, eigen_lr_scale=scale, s_qk_scale=scale, s_z_scale=scale)
    )
    _load(model, ours, path)
    return Imported(model, _record(model), int(content.get("iter_num", 0)), None)


def _from_nanogpt(
    path: Path,
    content: dict[str, Any],
    state: dict[str, Tensor],
    said: dict[str, Any],
    num_heads: int | None,
    options: tuple[str, ...],
) -> Imported:
    known = {"gelu=exact": "exact", "gelu=tanh": "tanh"}
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"nanoGPT has no option {unknown[0]!r} that matters here; known: {', '.join(known)}")
    if len(set(options)) > 1:
        raise ValueError(f"--option {' and --option '.join(options)} exclude each other; give one")
    if (num_heads := said.get("n_head", num_heads)) is None:
        raise ValueError(f"{path} does not say its number of heads; give --num-heads")
    ours = from_nanogpt_state_dict(state)
    config = config_of(ours, num_heads, gelu=known[options[-1]] if options else "exact")
    if (context := said.get("block_size", config.context)) != config.context:
        raise ValueError(f"{path} says a context of {context} and holds {config.context} positions; it is not whole")
    model = make_model(config)
    _load(model, ours, path)
    return Imported(model, _record(model), int(content.get("iter_num", 0)), None, options_apply=True)
