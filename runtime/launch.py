"""How a program starts and ends: device, threads, seeds, the process group; signals and exit codes.

It is no part of the method. Read next: parallel.py.
"""

import errno
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from runtime import parallel
from runtime.checkpoint import finish_saving, latest, saving, step_path
from runtime.flags import UserError, nearest

# Which signal asked this process to stop, when, and whether a program it started was told.
stop = SimpleNamespace(signal=0, at=0.0, passed_on=False)
# What is still to be done for a run of this process, however it ends.
at_end: list[Callable[[], Any]] = []


class Diverged(RuntimeError):
    """The loss is not a number any more."""


def check_finite(
    loss: float, step: int, checkpoints: str | Path | None = None, name: str = "loss"
) -> None:
    """Raise Diverged where the loss, or what `name` says, is NaN or infinite."""
    loss = float(loss)
    if math.isfinite(loss):
        return
    finish_saving()  # of the last good one
    last = latest(checkpoints) if checkpoints else None
    kept = "" if last is None else f"; the last good checkpoint is {step_path(checkpoints, last)}"
    raise Diverged(f"the {name} is {loss} at step {step}{kept}; try a lower --lr")


def pick_device(name: str = "auto") -> torch.device:
    """This process's device: with "auto" or "cuda" under torchrun, each rank has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = ("auto", "cpu", "cuda")
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--device {name} can't be used ({reason}); it takes {', '.join(known)}"
            f"{nearest(name, known)}"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current GPU, wherever tensors are
    return device


def spare_devices(name: str, count: int) -> list[str]:
    """Devices for so many further processes on this machine: where there are several GPUs, those
    come first that this run's own processes leave free."""
    gpus = torch.cuda.device_count() if name in ("auto", "cuda") else 0
    taken = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return [f"cuda:{(taken + i) % gpus}" if gpus > 1 else name for i in range(count)]


def usable_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype, or fp16 in place of bf16 on a GPU that has none, with a line that says so."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return dtype
    instead = torch.float16 if dtype == torch.bfloat16 else dtype
    if parallel.is_main():
        print(
            f"{torch.cuda.get_device_name(device)} has no bf16: torch's own functions run in place"
            f" of the Triton kernels, in {str(instead).removeprefix('torch.')}"
        )
    return instead


def launch(
    main: Callable[[Any], None], config: Any, user_errors: tuple[type[Exception], ...] = ()
) -> None:
    """Run main(config) with threads, seeds and the process group set, and end the process well.

    The config's fields `threads`, `seed` and `device` are heeded where it has them. Exit codes: 2
    for the user's mistake (UserError, a file that is not there, the types in user_errors), 1 for a
    diverged loss, memory or a disk that is full, or the loss of another rank, each with one line
    in place of a traceback, and for any other error, with its traceback; 130 after Ctrl-C, 143
    after SIGTERM. Of several ranks the first that failed speaks. At the end, when all has been
    said, comes what a Run was given as `at_end`; a second Ctrl-C does not wait for it.
    """
    at_end.clear()
    try:
        _prepare(config)
        main(config)
        finish_saving()
        _leave()
    except KeyboardInterrupt:
        _quit(128 + (stop.signal or signal.SIGINT))
    except Exception as error:
        if not parallel.first_to_fail() or parallel.is_gone(error):
            _let_the_cause_speak()
        code, line = _explain(error, config, user_errors)
        if code:
            rank = f"[rank {parallel.rank()}] " if parallel.world_size() > 1 else ""
            print(f"error: {rank}{line}", file=sys.stderr, flush=True)
        else:
            sys.excepthook(*sys.exc_info())  # torch's, which names the rank
        if not _disk_is_full(error):
            _leave()
        sys.exit(code or 1)
    parallel.shutdown()
    if stop.signal:
        sys.exit(128 + stop.signal)


def _prepare(config: Any) -> None:
    if getattr(config, "threads", None):
        torch.set_num_threads(config.threads)
    if (seed := getattr(config, "seed", None)) is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    timeout = getattr(config, "timeout", parallel.TIMEOUT)
    parallel.init(pick_device(getattr(config, "device", "cpu")), timeout)


def _explain(error: Exception, config: Any, user_errors: tuple) -> tuple[int, str]:
    """The exit code and the line for an error that needs no traceback; 0 for others."""
    files = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    if parallel.is_gone(error):
        return 1, "another process ended; what it said, or torchrun says of it, is the cause"
    if parallel.is_stuck(error):
        timeout = getattr(config, "timeout", parallel.TIMEOUT)
        return 1, (
            f"another process did not come within --timeout {timeout:g} s: it is stuck, or needs"
            " more time"
        )
    line = str(error)
    if isinstance(error, OSError) and error.filename:
        line = f"{error.filename}: {error.strerror}"
    if isinstance(error, (UserError, *files, *user_errors)):
        return 2, line
    if isinstance(error, Diverged):
        return 1, line
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _on_cpu(error):
        return 1, _memory(error, config)
    if _disk_is_full(error):
        name = getattr(error, "filename", None) or getattr(config, "out", "")
        return 1, f"{name}: the disk is full; free some space, then --resume"
    return 0, ""


def _on_cpu(error: Exception) -> bool:
    """Whether torch's allocator on the CPU found no memory: it has no error of its own."""
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _memory(error: Exception, config: Any) -> str:
    """What was asked for and was not there, and which of this program's flags need less."""
    asked = re.search(r"[Tt]ried to allocate [0-9.]+ \w+", str(error))
    held = ""
    if torch.cuda.is_available() and isinstance(error, torch.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info()
        held = f" ({free / 2**30:.1f} of {total / 2**30:.1f} GB are free)"
    less = [
        f"a lower --{name.replace('_', '-')} (now {getattr(config, name)})"
        for name in ("micro_tokens", "slots", "max_new_tokens") if getattr(config, name, 0)
    ]  # fmt: skip
    less += [f"--{name}" for name in ("recompute", "offload") if not getattr(config, name, True)]
    bf16 = getattr(config, "dtype", "") == "bfloat16"
    if getattr(config, "optimizer", "") == "master" and (bf16 or getattr(config, "model", None)):
        less += ["--optimizer rounding" if bf16 else "--dtype bfloat16 --optimizer rounding"]
    if not getattr(config, "ep", True) and not config.offload:
        several = "" if parallel.world_size() > 1 else "on several GPUs, under torchrun, "
        less += [f"{several}--ep N, 1 for a model without experts"]
    less += ["--dry-run shows what takes how much"] if hasattr(config, "dry_run") else []
    advice = f": {'; '.join(less)}" if less else ""
    wanted = asked[0].replace("Tried", "tried") if asked else "none was left"
    return f"out of memory: {wanted}{held}{advice}"


def _leave() -> None:
    """What is to be done at the end, as far as that succeeds: it hides no error. Where torchrun
    waits to start several ranks again it is left to the end of what they do then."""
    failed = isinstance(sys.exc_info()[1], Exception)
    if parallel.world_size() > 1 and (failed or stop.signal == signal.SIGTERM):
        at_end.clear()
    while at_end:
        try:
            at_end.pop(0)()
        except (Exception, KeyboardInterrupt) as error:
            said = str(error) or type(error).__name__
            print(f"at the end of the run: {said}", file=sys.stderr, flush=True)


def _let_the_cause_speak() -> None:
    """Another rank has failed before: torchrun ends this one in its sleep."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)


def _quit(code: int) -> None:
    """At once, although Python would first let a save come to its end."""
    if saving():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _disk_is_full(error: BaseException | None) -> bool:
    """Also where a library has wrapped the system's error in one of its own."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def ask_to_stop(number: int, frame: Any) -> None:
    """The first signal asks the loop to stop; the second stops it where it is."""
    now = time.monotonic()
    if stop.signal and now - stop.at < 1:
        return  # the same key press, passed on by a terminal and by a launcher such as `uv run`
    if stop.signal:
        raise KeyboardInterrupt
    stop.signal, stop.at = number, now
    if parallel.is_main():  # os.write: print may not be entered a second time
        os.write(2, b"\nsaving after this step; press Ctrl-C again to quit now\n")
