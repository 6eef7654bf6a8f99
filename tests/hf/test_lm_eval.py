"""EleutherAI's lm_eval on an exported folder, offline, with tasks of one's own, against this library's evaluation.

It is a program with forty dependencies, so it may live in an environment of its own, without nsphere: LM_EVAL names
it, if it is not on the path.
"""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from nsphere.export import export
from nsphere.train.batches import TokenSplit
from nsphere.train.evaluation import loss_by_context
from nsphere.train.loop import train
from nsphere.train.saved import load_run

LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
pytestmark = [
    pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed: pip install lm_eval, or name it in LM_EVAL"),
    pytest.mark.slow,
]
TASKS = Path(__file__).parents[2] / "examples" / "lm_eval"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train("ngpt", tiny.config(steps=30, context=64), tiny.options(), tiny.text_file(folder), folder / "run")
    return load_run(folder / "run", torch.device("cpu"))


@torch.no_grad()
def test_its_numbers_are_ours(run, tmp_path):
    export(run, tmp_path / "x", "hf")
    shutil.copytree(TASKS, tmp_path / "tasks")
    text = tiny.TEXT[-64 * 40 :]
    (tmp_path / "tasks" / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    rows = [(f"line {i}: ", [" the", "the "], 1) for i in range(40)] + [("line 7: the ", ["zzzz", "quick"], 0)]
    with (tmp_path / "tasks" / "choice.jsonl").open("w") as file:
        for prompt, choices, answer in rows:
            file.write(json.dumps({"prompt": prompt, "choices": choices, "answer": answer}) + "\n")
    command = [LM_EVAL, "--model", "hf", "--model_args", "pretrained=x,trust_remote_code=True,max_length=64"]
    command += ["--tasks", "my_text,my_choice", "--include_path", "tasks", "--device", "cpu", "--batch_size", "8"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ran = subprocess.run([*command, "--output_path", "out"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (result,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(result.read_text())["results"]

    # it lets the text follow the end of a document, and lays windows side by side as `nsphere eval` does
    tokens = np.array([0, *run.tokenizer.encode(text)], dtype=np.uint16)
    (ours,) = loss_by_context(run.model, TokenSplit("validation", tokens), [64], bytes_per_token=1.0)
    assert theirs["my_text"]["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-5)
    assert theirs["my_text"]["byte_perplexity,none"] == pytest.approx(math.exp(ours.loss), rel=1e-5)
    assert ours.bits_per_byte < 5  # of 8: it has learned something

    def likelihood(prompt, choice):
        tokens = torch.tensor([run.tokenizer.encode(prompt + choice)])
        log_p = run.model(tokens[:, :-1]).log_softmax(-1)[0].gather(-1, tokens[0, 1:, None])
        return log_p[-len(choice) :].sum().item()

    right = [max(range(2), key=lambda i, p=p, c=c: likelihood(p, c[i])) == answer for p, c, answer in rows]
    assert theirs["my_choice"]["acc,none"] == pytest.approx(sum(right) / len(rows))
    assert 0 < sum(right) < len(rows)
