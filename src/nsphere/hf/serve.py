"""transformers' own OpenAI-compatible server, on an exported folder."""

import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def check_servable(folder: Path) -> None:
    """Raise ValueError for what the server would fail on: a folder that is no export, or packages that are missing."""
    if not folder.is_dir():
        raise ValueError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; give a transformers folder")
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} is no transformers folder; make one with nsphere export RUN FOLDER")
    if "architectures" not in _read(folder / "config.json"):
        raise ValueError(f"{folder} is no transformers folder: its config.json names no architectures")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer, so text can't be served from it")
    index = folder / "model.safetensors.index.json"
    parts = _read(index).get("weight_map") if index.is_file() else {"all": "model.safetensors"}
    if not parts:
        raise ValueError(f"{folder} is not whole: {index.name} names no weights; export it again")
    for name in sorted(set(parts.values())):
        try:
            with safe_open(folder / name, "pt"):  # which sees whether the file is as long as it says
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder} is not whole: {name} can't be read ({error}); export it again") from None
    missing = [name for name in ("fastapi", "uvicorn", "openai", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'transformers[serving]'")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent} is not whole: {path.name} can't be read ({error})") from None
    return content if isinstance(content, dict) else {}


def _check_free(host: str, port: int) -> None:
    """Raise ValueError for an address that can't be listened at, which the server sees once the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            listener.bind(address)
    except OSError as error:
        raise ValueError(f"can't listen at {host}:{port} ({error.strerror}); choose another --host or --port") from None


def serve(folder: Path, host: str, port: int) -> None:
    """Run `transformers serve FOLDER` until it is interrupted, with nGPT known to it.

    The server looks the class of a model up in the namespace of transformers itself (5.0 to 5.23), whatever a folder
    ships and --trust-remote-code says. So an nGPT is put there, in this process; a GPT, which is a Llama, Qwen3 or
    GPT-2, would not need it.

    Raises:
        ValueError: see `check_servable`; an address that can't be listened at.
    """
    if not 0 < port < 65536:
        raise ValueError(f"--port is {port}; choose one from 1 to 65535")
    check_servable(folder)
    _check_free(host, port)
    import transformers
    from transformers.cli.transformers import main

    from nsphere.hf import NGPTForCausalLM

    transformers.NGPTForCausalLM = NGPTForCausalLM  # type: ignore[attr-defined]
    sys.argv = ["transformers", "serve", str(folder), "--host", host, "--port", str(port)]
    main()
