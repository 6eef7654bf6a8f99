"""A run as a folder that transformers loads: weights, config, tokenizer, modeling code and a model card."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from nsphere.generate import Sampling
from nsphere.hf.convert import to_hf
from nsphere.hf.tokenizer import hf_tokenizer
from nsphere.train.run_folder import read_result
from nsphere.train.saved import SavedRun


def write_folder(
    run: SavedRun, folder: Path, max_shard_size: str | int = "5GB", chat_template: Path | None = None
) -> None:
    """Write the model, its tokenizer if it has one, and a model card into an empty folder.

    Of nGPT the folder holds modeling_ngpt.py, which needs torch and transformers alone: with trust_remote_code=True it
    loads anywhere; where nsphere is installed, after `import nsphere.hf`, without that flag. GPT is a Llama, Qwen3 or
    GPT-2, which transformers has.

    Args:
        run: from `load_run`.
        folder: exists and is empty.
        max_shard_size: weights beyond this are split into several files and an index.
        chat_template: a Jinja file that makes a prompt of a conversation; it goes along as chat_template.jinja.

    Raises:
        ValueError: a model that transformers has no class for; a chat template that can't be read or makes no prompt.
    """
    tokenizer = None if run.tokenizer is None else hf_tokenizer(run.tokenizer, run.model.config.context)
    if chat_template is not None:
        if tokenizer is None:
            raise ValueError(f"{run.folder} has no tokenizer, which a chat template is part of")
        tokenizer.chat_template = _read_template(chat_template, tokenizer)
    model = to_hf(run.model)
    ends = None if run.tokenizer is None else run.tokenizer.separator_id
    # drawn from as `nsphere generate` does; a server that is asked for a temperature ignores it without do_sample
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=Sampling().temperature, top_k=0, eos_token_id=ends, pad_token_id=ends
    )
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if bar:
            logging.enable_progress_bar()
    if "auto_map" in (config := json.loads((folder / "config.json").read_text())):
        config["auto_map"]["AutoModel"] = "modeling_ngpt.NGPTModel"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(run, model), encoding="utf-8")


def _read_template(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A chat template, tried on a question."""
    try:
        template = path.read_text(encoding="utf-8")
        question = [{"role": "user", "content": "?"}]
        prompt = tokenizer.apply_chat_template(
            question, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # Jinja's own, and whatever the template itself brings about
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the chat template {path} can't be used: {type(error).__name__}: {reason}") from None
    if not str(prompt).strip():
        raise ValueError(f"the chat template {path} makes an empty prompt of a question; it must write the messages")
    return template


_OF_NGPT = """
Where nsphere is installed, `import nsphere.hf` first and leave `trust_remote_code` out.

## On the sphere

Every matrix has unit rows (`o_proj`, `down_proj`: unit columns), and positions must count from 0 in every sequence, as
`generate` and left padding with an `attention_mask` make them do. To train the matrices themselves, use
`nsphere.hf.SphereCallback` with the Trainer, and weight_decay 0; LoRA needs nothing.
"""


def model_card(run: SavedRun, model: PreTrainedModel) -> str:
    """README.md: what the model is, what it was trained on, how good it is, how to load it."""
    config, train, shape = run.config, run.config["train"], run.model.config
    is_ngpt = config["architecture"] == "ngpt"
    what = "nGPT, the normalized transformer (arXiv 2410.01131)" if is_ngpt else f"GPT, as {type(model).__name__}"
    rows = {
        "architecture": what,
        "arm": f"`{config['arm']}`",
        "parameters": f"{run.model.num_parameters():,}",
        "d_model, layers, heads, key/value heads": f"{shape.d_model}, {shape.num_layers}, {shape.num_heads}, "
        f"{shape.num_kv_heads}",
        "vocabulary": f"{shape.vocab_size:,}",
        "context": f"{shape.context:,} tokens",
        "data": f"`{_name(config['data'].get('data'))}`, tokenizer `{_name(config['data'].get('tokenizer'))}`",
        **_training_rows(run, train),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    trust = ", trust_remote_code=True" if is_ngpt else ""
    if run.tokenizer is not None:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        load_tokenizer = f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"
        inputs, output = 'tokenizer("def ", return_tensors="pt").input_ids', "tokenizer.decode(made[0])"
    else:
        imports = "import torch\nfrom transformers import AutoModelForCausalLM"
        load_tokenizer = "# it was trained on tokens, without a tokenizer"
        inputs, output = "torch.tensor([[1, 2, 3]])", "made[0].tolist()"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nsphere", config["architecture"]],
    }
    return f"""---
{_yaml(front)}
---

# {config["arm"]}, step {run.step}

{what}. Trained with [nsphere](https://pypi.org/project/nsphere/) and written by `nsphere export`.

| | |
|---|---|
{table}

## Use

```python
{imports}

folder = "."  # this folder
{load_tokenizer}
model = AutoModelForCausalLM.from_pretrained(folder{trust})
made = model.generate({inputs}, max_new_tokens=50)
print({output})
```
{_OF_NGPT if is_ngpt else ""}
## Limits

A language model continues text; it was not tuned to follow instructions, and repeats what its data holds, errors and
biases included. Beyond its context of {shape.context:,} tokens it was not trained.
"""


def _name(source: object) -> str:
    """What data or a tokenizer is called, without the folders of this machine."""
    name = str(source)
    return name if name.startswith(("hf:", "bpe:")) else Path(name).name


def _training_rows(run: SavedRun, train: dict[str, Any]) -> dict[str, str]:
    rows = {"step of the weights": f"{run.step:,}"}
    if train.get("steps") and train.get("batch_size"):
        rows["training"] = (
            f"{train['steps']:,} steps of {train['batch_size']:,} × {run.model.config.context:,} tokens, "
            f"{train.get('optimizer')}, learning rate {train.get('lr'):g}, {train.get('schedule')}, seed "
            f"{train.get('seed')}, {train.get('dtype')}"
        )
    result = read_result(run.folder)
    if result is not None and result.steps == run.step:
        rows["validation loss"] = f"{result.final_val_loss:.4f} nats per token, perplexity "
        rows["validation loss"] += f"{math.exp(min(result.final_val_loss, 700)):.4g}"
        if result.bits_per_byte is not None:
            rows["validation bits per byte"] = f"{result.bits_per_byte:.4f}"
    return rows


def _yaml(front: dict[str, Any]) -> str:
    """Strings and lists of strings; JSON's quoting is YAML's."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items())
