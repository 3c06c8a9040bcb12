"""Models in the Hugging Face layout: config.json and model.safetensors.

The tensors are named as in the official checkpoints. So are our modules, except that the experts of
a layer are one stacked tensor here and one tensor each there.

It is no part of the method. Read next: checkpoint.py.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import Config, Transformer
from runtime import parallel
from runtime.flags import UserError

SHARD_BYTES = 5 * 10**9  # a model.safetensors that would be larger is cut into several files
EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")


def official(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The official names of one of our tensors, with the part of it that each stands for."""
    match = EXPERTS.fullmatch(name)
    if match is None:
        return [(name, tensor)]
    return [(f"{match[1]}.{e}.{match[2]}.weight", tensor[e]) for e in range(len(tensor))]


def save_pretrained(
    model: nn.Module, path: str | Path, *, tokenizer_files: dict[str, bytes] = {}
) -> None:
    """Write a model directory; one that is there is replaced once the new one is complete."""
    path = Path(path).absolute()
    if parallel.is_main():
        if path.exists() and not (path.is_dir() and _replaceable(path)):
            raise UserError(f"{path} is there and is no model directory: give another path")
        new, old = path.with_name(f".{path.name}.new"), _old(path)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            _write_model(model, new, tokenizer_files)
            for file in (*new.iterdir(), new):
                _sync(file)
        except BaseException:  # a full disk, Ctrl-C: leave no half of a model behind
            shutil.rmtree(new, ignore_errors=True)
            raise
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    parallel.barrier()


def _replaceable(path: Path) -> bool:
    return (path / "config.json").exists() or not any(path.iterdir())


def _old(path: Path) -> Path:
    """Where the former model stands for the instant between the two renames."""
    return path.with_name(f".{path.name}.old")


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows syncs only what is open for writing
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _write_model(model: nn.Module, directory: Path, tokenizer_files: dict[str, bytes]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # it is the embedding
        for stored, part in official(name, tensor):
            if shards[-1] and size + part.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][stored] = part.contiguous()
            size += part.nbytes
            total += part.nbytes
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards):
        save_file(shard, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    for name, content in tokenizer_files.items():
        (directory / name).write_bytes(content)


def load_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """A model from its directory, in the stored dtype unless another is asked for.

    Raises UserError where a file is missing or unreadable, or the tensors are not the config's.
    """
    given, path = path, Path(path).absolute()
    if not path.exists() and _old(path).exists():
        path = _old(path)  # a save was killed between its two renames
    if not path.is_dir():
        raise UserError(f"no model at {given}: give a directory with config.json and *.safetensors")
    config = _read_config(path / "config.json")
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)
    shapes = model.state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    with ExitStack() as stack:
        sources = _open_tensors(path, str(device), stack)
        _check_tensors(path, config, shapes, sources)
        state = {
            name: _read_tensor(name, meta, sources, dtype, device) for name, meta in shapes.items()
        }
    for name, parameter in model.named_parameters():
        state[name] = nn.Parameter(state[name], requires_grad=parameter.requires_grad)
    if config.tie_word_embeddings:  # the same Parameter under both names
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    return model


def _read_config(file: Path) -> Config:
    if not file.exists():
        raise UserError(f"no config.json in {file.parent}: give a model directory")
    try:
        return Config.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a config that can be used: {error}") from error


def _open_tensors(path: Path, device: str, stack: ExitStack) -> dict[str, Any]:
    """For each stored tensor's name, the open file that it is in."""
    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    try:
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: unreadable ({error!r}); copy or download it again") from error
    sources = {}
    for file in sorted(path / name for name in names):
        if not file.exists():
            raise UserError(f"no {file.name} in {path}; copy or download it again")
        try:
            source = stack.enter_context(safe_open(file, framework="pt", device=device))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: truncated, or not safetensors ({error}); copy or download it again"
            ) from error
        sources |= dict.fromkeys(source.keys(), source)
    return sources


def _check_tensors(
    path: Path, config: Config, shapes: dict[str, Tensor], sources: dict[str, Any]
) -> None:
    wanted = {
        stored: tuple(part.shape)
        for name, meta in shapes.items()
        for stored, part in official(name, meta)
    }
    # Released checkpoints repeat the embedding and the head in the multi-token prediction layer,
    # and some store the head that is tied.
    mtp = f"model.layers.{config.num_hidden_layers}."
    copies = {mtp + "embed_tokens.weight", mtp + "shared_head.head.weight"}
    if config.tie_word_embeddings:
        copies.add("lm_head.weight")
    stored = {name: tuple(file.get_slice(name).get_shape()) for name, file in sources.items()}
    wrong = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted and name not in copies],
        "misshapen": [
            f"{name} {stored[name]} for {wanted[name]}"
            for name in wanted
            if name in stored and stored[name] != wanted[name]
        ],
    }
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in wrong.items()
        if names
    ]
    if found:
        raise UserError(
            f"the tensors in {path} are not those of its config.json: {'; '.join(found)}; correct"
            " config.json, or copy or download the directory again"
        )


def _read_tensor(
    name: str, meta: Tensor, sources: dict[str, Any], dtype: torch.dtype | None, device: Any
) -> Tensor:
    result = None
    for i, (stored, part) in enumerate(official(name, meta)):
        piece = sources[stored].get_tensor(stored)
        if result is None:
            wanted = dtype or piece.dtype
            if name.endswith("e_score_correction_bias"):
                wanted = torch.promote_types(wanted, torch.float32)  # its steps of 0.001 need it
            # A copy, and not the mapped file: matrix products may round otherwise where memory
            # is aligned otherwise, and the file may be replaced.
            result = torch.empty(meta.shape, dtype=wanted, device=device)
        (result if part is meta else result[i]).copy_(piece)
    return result
