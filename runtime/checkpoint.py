"""The training state that --resume starts from, and (from pretrained.py) models.

torch.distributed.checkpoint (DCP) writes a state into step_000123/, while training goes on. It
counts once `.metadata` is there, which DCP writes last and by rename: a kill at any moment leaves
the one before. It holds no random state and no position in the data: both are functions of
(seed, step).

It is no part of the method. Read next: pretrained.py.
"""

import errno
import os
import pickle
import shutil
import warnings
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from runtime import parallel
from runtime.flags import UserError
from runtime.pretrained import load_pretrained, save_pretrained

__all__ = ["finish_saving", "latest", "load_pretrained", "load_state", "save_pretrained",
           "save_state", "saving", "step_path"]  # fmt: skip

# The thread that saves are written in, and the last of them, until `finish_saving` has seen how it
# ended. Python waits for the thread when it ends, after it has printed a traceback.
_thread = futures.ThreadPoolExecutor(1, "checkpoint")
_saving: futures.Future | None = None
_copies: dict[str, Tensor] = {}  # of the state that it writes


def step_path(directory: str | Path, step: int) -> Path:
    return Path(directory) / f"step_{step:06}"


def complete_steps(directory: str | Path) -> list[int]:
    """The steps of the complete checkpoints, in order."""
    found = Path(directory).glob("step_*/.metadata")
    return sorted(int(file.parent.name.removeprefix("step_")) for file in found)


def latest(directory: str | Path) -> int | None:
    """The step of the newest complete checkpoint."""
    return max(complete_steps(directory), default=None)


def save_state(
    directory: str | Path, step: int, state: dict[str, Any], keep: int = 2, *, wait: bool = True
) -> None:
    """Write the checkpoint of a step, then delete all but the last `keep`.

    state: dicts and lists of tensors, numbers and strings, nested: state_dicts of models and
    optimizers, and what else the recipe has to remember. All ranks call it.

    wait=False: copy this rank's state to the CPU, which takes as much memory there until the next
    save that is waited for, and return. A thread writes it while training goes on; one save at a
    time: the next waits for the one before. What it fails of is raised by `finish_saving`.
    """
    global _saving
    finish_saving()
    # DCP turns int keys (optimizers have them) into text, loses empty dicts, and reads only into
    # what the caller has (an optimizer has nothing before its first step). So it is given the
    # tensors by name, and the tree that they hang in as one value.
    tensors: dict[str, Tensor] = {}
    tree = pickle.dumps(_take_tensors(state, "", tensors))
    if wait:
        _copies.clear()
    else:
        tensors = _copy(tensors)
    _no_warning()
    group = parallel.group_for_saving()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    write = partial(_write, step_path(directory, step), tree, tensors, keep, group, device)
    if wait:
        write()
    else:
        _saving = _thread.submit(write)


def finish_saving(wait: bool = True) -> None:
    """Wait for the save that is under way, and raise what it failed of. wait=False: look only
    whether it has failed."""
    global _saving
    if _saving and (wait or _saving.done()):
        futures.wait([_saving])  # if Ctrl-C ends this, it is under way still
        saved, _saving = _saving, None
        saved.result()


def saving() -> bool:
    """Whether a save is under way."""
    return _saving is not None and not _saving.done()


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, into the memory of the copies before: fresh memory takes five times as long."""
    for name in _copies.keys() - tensors.keys():
        del _copies[name]
    for name, tensor in tensors.items():
        copy = _copies.get(name)
        if copy is None or _layout(copy) != _layout(tensor):
            _copies[name] = tensor.to("cpu", copy=True)
        else:
            copy.copy_(tensor)
    return dict(_copies)


def _layout(tensor: Tensor) -> tuple:
    placements = tensor.placements if isinstance(tensor, DTensor) else None
    return tensor.shape, tensor.stride(), tensor.dtype, placements


def _write(
    path: Path, tree: bytes, tensors: dict[str, Tensor], keep: int,
    group: dist.ProcessGroup | None, device: int | None,
) -> None:  # fmt: skip
    directory = path.parent
    if device is not None:
        torch.cuda.set_device(device)  # each thread has its own current GPU
    if parallel.is_main():
        _delete(path)  # what a kill, or an earlier save of the same step, has left
        path.mkdir(parents=True)
    try:
        if group:
            dist.barrier(group=group)
        writer = dcp.FileSystemWriter(path, sync_files=True)
        dcp.save({"tree": tree, **tensors}, storage_writer=writer, process_group=group)
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
        for old in directory.glob("step_*"):
            if old not in kept:
                _delete(old)


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
    _no_warning()
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


def _no_warning() -> None:
    """DCP warns that it works without a process group. For good: a filter that is set back would be
    so for all threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
