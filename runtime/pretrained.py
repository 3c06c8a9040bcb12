"""Models in the Hugging Face layout: config.json and model.safetensors, one file or many.

The tensors are named as in the official checkpoints. So are our modules, except that the experts of
a layer are one stacked tensor here and one tensor each there. Weights in FP8 are dequantised.

It is no part of the method. Read next: checkpoint.py.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.fp8 import SIDE, dequant_fp8
from model import Config, Transformer
from runtime import parallel
from runtime.configs import read_config, to_json
from runtime.flags import UserError
from runtime.progress import progress

SHARD_BYTES = 5 * 10**9  # a model.safetensors that would be larger is cut into several files
EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
TYPES = dict(BF16=torch.bfloat16, F16=torch.float16, F32=torch.float32, F64=torch.float64,
             F8_E4M3=torch.bfloat16)  # fmt: skip  # stored type -> what it becomes
Region = tuple[slice, ...]  # a part of a tensor


def official(name: str, tensor: Tensor) -> list[str]:
    """The official names of one of our tensors: its own, or those of the experts stacked in it."""
    match = EXPERTS.fullmatch(name)
    if match is None:
        return [name]
    return [f"{match[1]}.{e}.{match[2]}.weight" for e in range(len(tensor))]


def mtp_layer(config: Config) -> str:
    return f"model.layers.{config.num_hidden_layers}."


def mtp_copies(config: Config) -> dict[str, str]:
    """Released checkpoints repeat the embedding and the head in the multi-token prediction layer:
    the name of each copy, and of what it is a copy of."""
    copies = {
        mtp_layer(config) + "embed_tokens.weight": "model.embed_tokens.weight",
        mtp_layer(config) + "shared_head.head.weight": "lm_head.weight",
    }
    return copies if config.num_nextn_predict_layers else {}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without a head that is the embedding."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def each_tensor(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Official name and tensor, for all that a checkpoint of the model holds. Where each rank has a
    part of the model, all go through it together."""
    state = model.state_dict()
    copies = {copy: state[name] for copy, name in mtp_copies(model.config).items()}
    for name, tensor in (own_tensors(model) | copies).items():
        tensor = parallel.whole(tensor)
        names = official(name, tensor)
        yield from zip(names, [tensor] if names == [name] else tensor)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(each_tensor(model))


def save_pretrained(
    model: nn.Module, path: str | Path, *, tokenizer_files: dict[str, bytes] = {}
) -> None:
    """Write a model directory; one that is there is replaced once the new one is complete. All
    ranks call it, and rank 0 writes."""
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
    else:
        for _ in each_tensor(model):  # gives rank 0 its part
            pass
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
    shards: list[list[str]] = []  # the names in each file
    total = 0
    for i, shard in enumerate(_shards(model)):
        save_file(shard, directory / f"{i}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # before the next one is gathered
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for i, file in enumerate(files):
        os.rename(directory / f"{i}", directory / file)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = {**to_json(model.config), "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, content in tokenizer_files.items():
        (directory / name).write_bytes(content)


def _shards(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after the other."""
    shard: dict[str, Tensor] = {}
    copies, size = mtp_copies(model.config), 0
    for name, tensor in each_tensor(model):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.clone() if name in copies else tensor.contiguous()
        size += tensor.nbytes
    yield shard


def load_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    mtp: bool = True, shard: Callable[[Transformer], object] | None = None,
) -> Transformer:  # fmt: skip
    """A model from its directory, in the stored dtype (bf16 for FP8) unless another is asked for.

    mtp: with the multi-token prediction layer, where the files have it. shard: called with the
    model before it has memory; of the parameters that it turns into DTensors only this rank's part
    is read. Raises UserError where a file is missing or unreadable, or the tensors are not the
    config's.
    """
    path = find_model(path)
    config = read_config(path)
    stored = Stored(path)
    if not mtp:
        stored.leave_out(mtp_layer(config))
    if not any(name.startswith(mtp_layer(config)) for name in stored.shapes):
        config = replace(config, num_nextn_predict_layers=0)
    model = without_memory(config, path)
    stored.check(model)
    if shard is not None:
        # In its dtype, which decides in what gradients are summed.
        shard(model.to(dtype or TYPES[stored.types["model.embed_tokens.weight"]]))
    state, total = {}, sum(map(math.prod, stored.shapes.values()))
    with progress(total, "load", show=total > 10**9) as bar:
        for name, meta in own_tensors(model).items():
            state[name] = stored.read(name, meta, dtype, device)
            bar.update(meta.numel())
    for name, parameter in model.named_parameters():
        state[name] = nn.Parameter(state[name], requires_grad=parameter.requires_grad)
    if config.tie_word_embeddings:  # the same Parameter under both names
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    return model


def find_model(path: str | Path) -> Path:
    """The directory that a model is in. Raises UserError where there is none."""
    found = Path(path).absolute()
    if not found.exists() and _old(found).exists():
        found = _old(found)  # a save was killed between its two renames
    if not found.is_dir():
        name = str(path)
        hint = f"; `hf download {name} --local-dir DIR` fetches it" if name.count("/") == 1 else ""
        raise UserError(
            f"no model at {name}: give a directory with config.json and *.safetensors{hint}"
        )
    return found


def without_memory(config: Config, path: Path) -> Transformer:
    """The model with shapes alone. Raises UserError where the config's numbers make none."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path / 'config.json'}: no model has such sizes ({error})") from error


class Stored:
    """The tensors that the safetensors files of a directory hold, read a part at a time.

    A file is mapped, and mapped anew after so many bytes: what was read of it would count as memory
    of this process until then.
    """

    REMAP = 2**27

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.mapped, self.source, self.seen = None, None, 0
        for file in self._list():
            source = self._map(file)
            for name in source.keys():
                part = source.get_slice(name)
                self.files[name], self.types[name] = file, part.get_dtype()
                self.shapes[name] = tuple(part.get_shape())

    def _list(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return [self.path / "model.safetensors"]
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            return sorted(self.path / name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index}: unreadable ({error!r}); copy or download it again"
            ) from error

    def _map(self, file: Path):
        if self.mapped != file or self.seen >= self.REMAP:
            self.source, self.seen = None, 0  # the former is unmapped here
            if not file.exists():
                old = any(self.path.glob("*.bin"))
                fix = (
                    "*.bin is not read: take its safetensors"
                    if old
                    else "copy or download it again"
                )
                raise UserError(f"no {file.name} in {self.path}; {fix}")
            try:
                self.mapped, self.source = file, safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file}: truncated, or not safetensors ({error}); copy or download it again"
                ) from error
        return self.source

    def leave_out(self, prefix: str) -> None:
        self.shapes = {n: shape for n, shape in self.shapes.items() if not n.startswith(prefix)}

    def check(self, model: Transformer) -> None:
        """Raises UserError unless the tensors are those of the model, by name and shape."""
        wanted = {name: tuple(part.shape) for name, part in stored_tensors(model).items()}
        # Not needed: the copies, and a head that is tied.
        spare = {*mtp_copies(model.config), "lm_head.weight"} - set(own_tensors(model))
        for name in [name for name in wanted if self.types.get(name) == "F8_E4M3"]:
            wanted[name + "_scale_inv"] = tuple(-(-size // SIDE) for size in wanted[name])
        stored = self.shapes
        wrong = {
            "missing": [name for name in wanted if name not in stored and name not in spare],
            "unexpected": [name for name in stored if name not in wanted and name not in spare],
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
                f"the tensors in {self.path} are not those of its config.json: {'; '.join(found)};"
                " correct config.json, or copy or download the directory again"
            )

    def read(self, name: str, meta: Tensor, dtype: torch.dtype | None, device: Any) -> Tensor:
        """One of our tensors, or this rank's part of it."""
        region = parallel.local_region(meta)
        names = official(name, meta)
        wanted = dtype or TYPES[self.types[names[0]]]
        if name.endswith("e_score_correction_bias"):
            wanted = torch.promote_types(wanted, torch.float32)  # its steps of 0.001 need it
        # A copy, and not the mapped file: matrix products may round otherwise where memory
        # is aligned otherwise, and the file may be replaced.
        shape = [part.stop - part.start for part in region]
        result = torch.empty(shape, dtype=wanted, device=device)
        if names == [name]:
            self._copy(name, region, result)
        else:
            experts, *inner = region
            for stored, out in zip(names[experts], result):
                self._copy(stored, tuple(inner), out)
        return parallel.like(result, meta)

    def _copy(self, name: str, region: Region, out: Tensor) -> None:
        """Copy a part of a stored tensor, as many rows at a time as are worth one mapping."""
        if out.numel() == 0:  # a tensor may have fewer rows than there are ranks
            return
        rows = max(1, self.REMAP // out[0].nbytes // SIDE) * SIDE
        first, *rest = region
        for piece, start in zip(out.split(rows), range(first.start, first.stop, rows)):
            part = (slice(start, start + len(piece)), *rest)
            if self.types[name] == "F8_E4M3":
                piece.copy_(self._dequantised(name, part, out.dtype))
            else:
                piece.copy_(self._part(name, part))

    def _part(self, name: str, region: Region) -> Tensor:
        part = self._map(self.files[name]).get_slice(name)[region]
        self.seen += part.nbytes
        return part

    def _dequantised(self, name: str, region: Region, dtype: torch.dtype) -> Tensor:
        """A part of an FP8 weight, from the whole blocks around it."""
        blocks = tuple(slice(part.start // SIDE, -(-part.stop // SIDE)) for part in region)
        around = tuple(
            slice(block.start * SIDE, min(block.stop * SIDE, size))
            for block, size in zip(blocks, self.shapes[name])
        )
        scales = self._part(name + "_scale_inv", blocks)
        whole = dequant_fp8(self._part(name, around).contiguous(), scales.contiguous(), dtype)
        inside = (
            slice(part.start - full.start, part.stop - full.start)
            for part, full in zip(region, around)
        )
        return whole[tuple(inside)]
