"""transformers' server on an exported folder, asked by OpenAI's own client."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import tiny
import torch

from nsphere import cli
from nsphere.export import export
from nsphere.train.loop import train
from nsphere.train.saved import load_run

pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
for needed in ("fastapi", "uvicorn", "accelerate"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train("ngpt", tiny.config(steps=20, context=64), tiny.options(), tiny.text_file(folder), folder / "run")
    return load_run(folder / "run", torch.device("cpu"))


CHAT = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    """A client, and the name of the model: the folder as the server was given it."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "chat.jinja").write_text(CHAT)
    export(run, folder / "x", "hf", folder / "chat.jinja")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = folder / "log"
    command = [sys.executable, "-m", "nsphere", "serve", str(folder / "x"), "--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                break
            except OSError:
                time.sleep(0.5)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            yield client, str(folder / "x")
    finally:
        server.terminate()
        server.wait(60)


def test_whole_and_streamed_it_says_what_nsphere_generates(run, served, capsys):
    flags = ("--max-new-tokens", "30", "--temperature", "0", "--device", "cpu")
    assert cli.main(["generate", str(run.folder), "--prompt", "line 7", *flags]) == 0
    expected = capsys.readouterr().out.removeprefix("line 7").removesuffix("\n")
    client, model = served
    asked = {"model": model, "prompt": "line 7", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected and len(expected) > 10
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 30)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 5
    stopped = client.completions.create(**asked, stop=[expected[7:9]])
    assert stopped.choices[0].text.startswith(expected[: expected.index(expected[7:9])])
    assert stopped.choices[0].finish_reason == "stop"


def test_a_chat_goes_through_the_template_that_was_exported(served):
    client, model = served
    asked = {"model": model, "max_tokens": 12, "temperature": 0}
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "line 7"}], **asked)
    plain = client.completions.create(prompt="user: line 7\nassistant: ", **asked)
    assert chat.choices[0].message.content == plain.choices[0].text != ""
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens == 24


def test_a_temperature_draws(served):
    client, model = served
    asked = {"model": model, "prompt": "line 7", "max_tokens": 30, "temperature": 2.0}
    texts = [client.completions.create(**asked, extra_body={"seed": seed}).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_template_that_cannot_be(run, tmp_path, capsys):
    template = tmp_path / "chat.jinja"
    for text, message in (
        (None, "can't be used: FileNotFoundError"),
        ("{% for m in messages %}", "can't be used: TemplateSyntaxError: Unexpected end of template"),
        ("{{ raise_exception('no') }}", "can't be used: TemplateError: no"),
        ("", "makes an empty prompt of a question"),
    ):
        if text is not None:
            template.write_text(text)
        assert cli.main(["export", str(run.folder), str(tmp_path / "x"), "--chat-template", str(template)]) == 2
        out, err = capsys.readouterr()
        assert message in err and (out, err.count("\n")) == ("", 1)
    tokens_alone = dataclasses.replace(run, tokenizer=None)
    with pytest.raises(ValueError, match="has no tokenizer, which a chat template is part of"):
        export(tokens_alone, tmp_path / "x", "hf", template)
    flags = ["--to", "safetensors", "--chat-template", str(template)]
    assert cli.main(["export", str(run.folder), str(tmp_path / "x.safetensors"), *flags]) == 2
    assert "belongs to a transformers folder, not to --to safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jinja"]


def test_an_address_that_cannot_be_listened_at(run, tmp_path, capsys):
    """Said before the model is loaded."""
    export(run, tmp_path / "x", "hf")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host, message in (("127.0.0.1", f"can't listen at 127.0.0.1:{port} ("), ("no.such.host.invalid", "can't")):
            assert cli.main(["serve", str(tmp_path / "x"), "--host", host, "--port", str(port)]) == 2
            out, err = capsys.readouterr()
            assert message in err and (out, err.count("\n")) == ("", 1)


def test_what_cannot_be_served_is_one_line(run, tmp_path, capsys):
    for folder, message in (
        (tmp_path, "is no transformers folder; make one with nsphere export"),
        (run.folder, "is no transformers folder; make one with nsphere export"),
        (tmp_path / "none", "does not exist; give a transformers folder"),
    ):
        assert cli.main(["serve", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert message in err and (out, err.count("\n")) == ("", 1)
    export(run, tmp_path / "x", "hf")
    weights, config = tmp_path / "x" / "model.safetensors", tmp_path / "x" / "config.json"
    for path, half, message in (
        (weights, weights.read_bytes()[:-100], "is not whole: model.safetensors can't be read"),
        (config, config.read_bytes()[:100], "is not whole: config.json can't be read"),
        (config, b"[]", "its config.json names no architectures"),
        (weights.with_name("model.safetensors.index.json"), b"{}", "model.safetensors.index.json names no weights"),
    ):
        whole = path.read_bytes() if path.exists() else None
        path.write_bytes(half)
        assert cli.main(["serve", str(tmp_path / "x")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
        path.unlink() if whole is None else path.write_bytes(whole)
    assert cli.main(["serve", str(tmp_path / "x"), "--port", "99999"]) == 2
    assert "--port is 99999; choose one from 1 to 65535" in capsys.readouterr().err
    (tmp_path / "x" / "tokenizer.json").unlink()
    assert cli.main(["serve", str(tmp_path / "x")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
