"""The training state that --resume starts from, and (from pretrained.py) models.

torch.distributed.checkpoint (DCP) writes a state into step_000123/. It counts once `.metadata` is
there, which DCP writes last and by rename: a kill at any moment leaves the one before. It holds no
random state and no position in the data: both are functions of (seed, step).

It is no part of the method. Read next: pretrained.py.
"""

import errno
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from runtime import parallel
from runtime.flags import UserError
from runtime.pretrained import load_pretrained, save_pretrained

__all__ = ["latest", "load_pretrained", "load_state", "save_pretrained", "save_state", "step_path"]


def step_path(directory: str | Path, step: int) -> Path:
    return Path(directory) / f"step_{step:06}"


def complete_steps(directory: str | Path) -> list[int]:
    """The steps of the complete checkpoints, in order."""
    found = Path(directory).glob("step_*/.metadata")
    return sorted(int(file.parent.name.removeprefix("step_")) for file in found)


def latest(directory: str | Path) -> int | None:
    """The step of the newest complete checkpoint."""
    return max(complete_steps(directory), default=None)


def save_state(directory: str | Path, step: int, state: dict[str, Any], keep: int = 2) -> None:
    """Write the checkpoint of a step, then delete all but the last `keep`.

    state: dicts and lists of tensors, numbers and strings, nested: state_dicts of models and
    optimizers, and what else the recipe has to remember. All ranks call it.
    """
    path = step_path(directory, step)
    if parallel.is_main():
        _delete(path)  # what a kill, or an earlier save of the same step, has left
        path.mkdir(parents=True)
    parallel.barrier()
    # DCP turns int keys (optimizers have them) into text, loses empty dicts, and reads only into
    # what the caller has (an optimizer has nothing before its first step). So it is given the
    # tensors by name, and the tree that they hang in as one value.
    tensors: dict[str, Tensor] = {}
    tree = pickle.dumps(_take_tensors(state, "", tensors))
    try:
        with _without_warnings():
            writer = dcp.FileSystemWriter(path, sync_files=True)
            dcp.save({"tree": tree, **tensors}, storage_writer=writer)
    except (Exception, KeyboardInterrupt, CheckpointException) as error:
        cause = _cause(error)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if isinstance(cause, Exception) and shutil.disk_usage(directory).free < size:
            # torch says "unexpected pos 704 vs 598"
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if parallel.is_main():
            shutil.rmtree(path, ignore_errors=True)
        raise cause from error
    if parallel.is_main():
        kept = [step_path(directory, each) for each in complete_steps(directory)[-keep:]]
        for old in Path(directory).glob("step_*"):
            if old not in kept:
                _delete(old)
    parallel.barrier()


def load_state(directory: str | Path, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """What `save_state` was given at this step, bit for bit, in new tensors.

    state: the same tree as it is now. Its tensors say on which device theirs are read; where it has
    none yet, as an optimizer before its first step, the CPU. Raises UserError where the checkpoint
    is missing, unreadable, or of another model.
    """
    path = step_path(directory, step)
    if step not in complete_steps(directory):
        raise UserError(f"no checkpoint at {path}; there are steps {complete_steps(directory)}")
    present: dict[str, Tensor] = {}
    _take_tensors(state, "", present)
    try:
        dcp.FileSystemReader(path).read_metadata()  # dcp.load would log a traceback
        tree = pickle.loads(_read(path, {"tree": b""})["tree"])
        tensors: dict[str, Tensor] = {}
        _take_tensors(tree, "", tensors)
        _check_same(path, present, tensors)
        for name, meta in tensors.items():
            like = present.get(name, torch.empty(0))
            if isinstance(like, DTensor):  # this rank's part of it
                tensors[name] = torch.empty_like(like, dtype=meta.dtype)
            else:
                tensors[name] = torch.empty_like(meta, device=like.device)
        tensors = _read(path, tensors)
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        if isinstance(cause, (UserError, KeyboardInterrupt)):
            raise cause from None
        before = [each for each in complete_steps(directory) if each < step]
        rest = step_path(directory, before[-1]) if before else "the start"
        reason = str(cause).split("\n")[0].split(". ")[0] or repr(cause)
        raise UserError(
            f"{path} can't be read ({reason}); delete it, and --resume goes on from {rest}"
        ) from error
    return _give_tensors(tree, "", tensors)


def _read(path: Path, into: dict[str, Any]) -> dict[str, Any]:
    with _without_warnings():
        dcp.load(into, storage_reader=dcp.FileSystemReader(path))
    return into


def _take_tensors(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tree's tensors to `tensors`, by path; those of the result have no memory."""
    if isinstance(tree, Tensor):
        assert path not in tensors, f"two tensors are called {path}"
        tensors[path] = tree.detach()
        if isinstance(tree, DTensor):  # which is of these processes: another run may have others
            return torch.empty(tree.shape, dtype=tree.dtype, device="meta")
        return torch.empty_like(tree, device="meta")
    if isinstance(tree, dict):
        return {key: _take_tensors(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_take_tensors(v, f"{path}/{i}", tensors) for i, v in enumerate(tree))
    return tree


def _give_tensors(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    if isinstance(tree, Tensor):
        return tensors[path]
    if isinstance(tree, dict):
        return {key: _give_tensors(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_give_tensors(v, f"{path}/{i}", tensors) for i, v in enumerate(tree))
    return tree


def _check_same(path: Path, present: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    other = [n for n, t in present.items() if n not in saved or saved[n].shape != t.shape]
    if other:
        raise UserError(
            f"{path} is of another model: {len(other)} tensors are missing or misshapen"
            f" ({', '.join(other[:3])}); give the config that it was made with, or another --out"
        )


def _cause(error: BaseException) -> BaseException:
    """What failed on the first rank that failed, out of the wrapper that DCP puts around it."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _delete(path: Path) -> None:
    (path / ".metadata").unlink(missing_ok=True)  # first: half deleted, it must not count
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # DCP warns that it works without a process group
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
