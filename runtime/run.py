"""What every recipe needs around its algorithm: a run directory, metrics, timing, progress, exits.

    def main(config):
        run = Run(config.out, config, resume=config.resume, may_change=("steps",))
        ...

    if __name__ == "__main__":
        launch(main, parse(Config, PRESETS))

It is no part of the method. Steps are counted by what is done: the line of step 7 is written after
the 7th update, and checkpoint 7 holds the state after it.

Read next: flags.py, parallel.py, checkpoint.py.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ModuleNotFoundError:  # Windows: runs are not locked
    fcntl = None

from runtime import launch as launching
from runtime import parallel
from runtime.checkpoint import finish_saving, latest, load_state, save_state
from runtime.flags import UserError, flag, parse
from runtime.launch import (
    Diverged, ask_to_stop, check_finite, launch, pick_device, spare_devices, stop, usable_dtype,
)  # fmt: skip
from runtime.progress import progress
from runtime.sharding import begin

__all__ = ["Diverged", "Run", "UserError", "check_finite", "flag", "launch", "parse", "pick_device",
           "progress", "run_command", "spare_devices", "usable_dtype", "write_file"]  # fmt: skip

# On --resume.
FREE_TO_CHANGE = ("out", "resume", "device", "threads", "ep", "tp", "recompute", "offload",
                  "dry_run", "gpu_memory", "timeout")  # fmt: skip

# The files of the locks that this process holds: to close one, wherever, would give its lock back.
_locks: dict[Path, IO] = {}


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to another name, then by rename."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)  # it would fill the disk
        raise


def run_command(arguments: list[str], run: "Run") -> bool:
    """Start one of our programs and wait; False where it was asked to stop. It gets the signals
    that this one gets and, on Linux, does not outlive it. Raises UserError where it fails."""
    shown = f"python {' '.join(arguments)}"
    if parallel.world_size() > 1:
        raise UserError(f"first run {shown}: this program starts it only when it runs alone")
    print(f"+ {shown}", flush=True)
    program = Path(__file__).parent.parent / arguments[0]
    command = [sys.executable, str(program), *arguments[1:]]
    begin = end_with_parent if sys.platform == "linux" else None
    child = subprocess.Popen(command, preexec_fn=begin)
    while child.poll() is None:
        if stop.signal and not stop.passed_on:
            stop.passed_on = True
            child.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    if child.returncode and not stop.signal:
        raise UserError(f"{shown} ended with exit code {child.returncode}")
    return child.returncode == 0 and not run.stopping


def end_with_parent() -> None:
    """In the child: end when the parent does, even where that is killed."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def lock(out: Path, wait: float = 5.0) -> None:
    """Keep other processes from writing to this run until this one ends, however it ends. Programs
    that it starts don't hold the lock. wait: seconds, for one that torchrun replaces may still be
    ending. Raises UserError where another process has it."""
    if fcntl is None or out.resolve() in _locks:
        return
    file = (out / ".lock").open("a+")
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip()
                raise UserError(
                    f"another process (pid {holder}) is writing to {out}: wait for it, or give"
                    " another --out"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system that has no locks
            break
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    _locks[out.resolve()] = file


class Timer:
    """One passage through a phase; the recipe adds the tokens it worked on."""

    seconds: float = 0.0
    tokens: int = 0
    peak_mb: float = 0.0  # memory, of the GPU where there is one


class Journal:
    """A file of JSON lines, each with its phase and step; there is none before the first line.
    Raises UserError on a line that is something else."""

    def __init__(self, path: Path):
        self.path, self._file = path, None

    def write(self, line: dict) -> None:
        if self._file is None:
            self._file = self.path.open("a")
        self._file.write(json.dumps(_plain(line)) + "\n")
        self._file.flush()

    def lines(self) -> Iterator[dict]:
        for row in self._rows():
            yield json.loads(row)

    def keep(self, wanted: Callable[[dict], bool]) -> None:
        """Rewrite the file with the wanted lines only, and without a half-written last one."""
        if not self.path.exists():
            return
        new = self.path.with_name(f".{self.path.name}.new")
        with new.open("w") as file:
            for number, row in enumerate(self._rows(), 1):
                try:
                    keep = wanted(json.loads(row))
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path}:{number}: not a line with a phase and a step; delete that"
                        " line, or give another --out"
                    ) from None
                if keep:
                    file.write(row)
            file.flush()
            os.fsync(file.fileno())
        if self._file:
            self._file.close()
            self._file = None
        new.replace(self.path)

    def _rows(self) -> Iterator[str]:
        if self.path.exists():
            with self.path.open() as file:
                yield from (row for row in file if row.endswith("\n"))


class Run:
    """The directory of a run: config.json, metrics.jsonl and whatever the recipe puts beside them.

    Only rank 0 writes. Raises UserError where `out` holds a run already, unless told to resume it,
    and where the resumed run had another config. resume=None: continue a run that is there.
    at_end(out): what rank 0 does when the program ends, be it by an error or by Ctrl-C.
    """

    def __init__(
        self, out: str | Path, config: Any, *, resume: bool | None = False,
        may_change: tuple[str, ...] = (), at_end: Callable[[Path], Any] | None = None,
    ):  # fmt: skip
        self.out = Path(out)
        self.metrics = self.out / "metrics.jsonl"
        self._metrics = Journal(self.metrics)
        self._rollouts = Journal(self.out / "rollouts.jsonl")
        self.seconds: Counter[str] = Counter()  # by phase, over all of the run
        self._recent: dict[str, Timer] = {}  # by phase, since the last `timing()`
        self._inside: list[Timer] = []  # the phases that it is in, the innermost last
        self._since = (0.0, 0.0)  # when the innermost began to count, and parallel.seconds then
        self._told = parallel.seconds  # of which `timing()` has told
        self._saved: dict[str, int] = {}  # by phase, the step of the last checkpoint
        self._how = "the same command" if resume is None else "--resume"
        if parallel.is_main():
            free = (*FREE_TO_CHANGE, *may_change)
            self._open(dataclasses.asdict(config), resume, free)
            if at_end is not None:
                launching.at_end.append(partial(at_end, self.out))
        parallel.barrier()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)

    def _open(self, config: dict, resume: bool | None, free: tuple[str, ...]) -> None:
        config = json.loads(json.dumps(config))  # tuples as lists, as they will be read
        saved = self.out / "config.json"
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: give a directory")
        if (saved.exists() or self.metrics.exists()) and resume is False:
            raise UserError(
                f"{self.out} holds a run already: --resume continues it; or give another --out"
            )
        if saved.exists():
            before = json.loads(saved.read_text())
            changed = [
                f"--{name.replace('_', '-')} was {before.get(name)!r}, now {config.get(name)!r}"
                for name in {**before, **config}
                if name not in free and before.get(name) != config.get(name)
            ]
            if changed:
                raise UserError(
                    f"{self.out} can't be resumed with another config: {'; '.join(changed)}. Give"
                    " the same flags, or another --out"
                )
        elif resume:
            print(f"{self.out}: no run to resume; starting one", file=sys.stderr)
        self.out.mkdir(parents=True, exist_ok=True)
        lock(self.out)
        self.save_json("config.json", config)
        self._keep(lambda line: True)

    def save_json(self, name: str, value: Any) -> None:
        """Write out/name, whole or not at all."""
        if parallel.is_main():
            write_file(self.out / name, (json.dumps(value, indent=2) + "\n").encode())

    def log(self, *, phase: str, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl. Log a step before saving its checkpoint: a kill in
        between repeats the step and its line, where the other order would lose the line."""
        if parallel.is_main():
            self._metrics.write({"phase": phase, "step": step, **values})

    def keep_rollouts(self, groups: Iterable[dict], *, phase: str, step: int) -> None:
        """Append questions with their outputs to rollouts.jsonl, for a reader: what the policy
        wrote before update `step`, and what it earned."""
        if parallel.is_main():
            for group in groups:
                self._rollouts.write({"phase": phase, "step": step, **group})

    def rewind(self, phase: str, step: int) -> None:
        """On resuming after `step` (0: at the beginning): drop the phase's later lines, which will
        be written again."""
        if parallel.is_main():
            self._keep(lambda line: line["phase"] != phase or line["step"] <= step)

    def _keep(self, wanted: Callable[[dict], bool]) -> None:
        self._rollouts.keep(wanted)
        self._metrics.keep(wanted)
        self.seconds = Counter()
        for line in self._metrics.lines():
            for key, value in line.items():
                if key.startswith("seconds_"):
                    self.seconds[key.removeprefix("seconds_")] += value

    @contextmanager
    def phase(self, name: str) -> Iterator[Timer]:
        """Time a passage: `with run.phase("rollout") as timer: ...; timer.tokens += n`. What is
        counted in a phase inside it, or as communication, is not counted in this one."""
        timer = Timer()
        self._count()
        self._inside.append(timer)
        try:
            yield timer
        finally:
            self._count()
            self._inside.pop()
            recent = self._recent.setdefault(name, Timer())
            recent.peak_mb = max(recent.peak_mb, timer.peak_mb)
            recent.seconds += timer.seconds
            recent.tokens += timer.tokens
            self.seconds[name] += timer.seconds

    def _count(self) -> None:
        """Give the innermost phase what has passed since this was last called."""
        now, talked = _now(), parallel.seconds
        if self._inside:
            timer, (before, talked_before) = self._inside[-1], self._since
            timer.seconds += now - before - (talked - talked_before)
            timer.peak_mb = max(timer.peak_mb, _peak_mb())
        _forget_peak()
        self._since = now, talked

    def timing(self) -> dict[str, float]:
        """For `log`: seconds, tokens per second and peak memory of this rank by phase, since the
        last call. Where there are several, `seconds_communication` has what rank 0 spent in the
        collectives of parallel.py, in a phase or not, with what it waited for the others; those
        that FSDP makes within forward and backward are counted there."""
        recent, self._recent = self._recent, {}
        numbers = {}
        if parallel.world_size() > 1:
            talked, self._told = parallel.seconds - self._told, parallel.seconds
            numbers["seconds_communication"] = round(talked, 4)
            self.seconds["communication"] += talked
        for name, timer in recent.items():
            numbers[f"seconds_{name}"] = round(timer.seconds, 4)
            numbers[f"peak_mb_{name}"] = round(timer.peak_mb, 1)
            if timer.tokens:
                numbers[f"tokens_per_second_{name}"] = round(timer.tokens / timer.seconds, 1)
        return numbers

    def spent(self) -> Counter[str]:
        """Seconds by phase of metrics.jsonl, all that was timed in it."""
        spent: Counter[str] = Counter()
        for line in self._metrics.lines():
            times = [value for key, value in line.items() if key.startswith("seconds_")]
            spent[line["phase"]] += round(sum(times), 4)
        return spent

    def resume(self, phase: str, parts: dict[str, Any]) -> int:
        """Load the phase's newest checkpoint into `parts`, models and optimizers by name, and drop
        the lines logged after it; how many steps it has seen (0 where there is none)."""
        finish_saving()
        directory = self.checkpoints(phase)
        # By rank 0's look at it: on a network file system another may not see the newest yet.
        done = parallel.from_main(latest(directory) or 0)
        if done:
            for part in parts.values():
                if isinstance(part, torch.optim.Optimizer):
                    begin(part)
            saved = {name: part.state_dict() for name, part in parts.items()}
            for name, state in load_state(directory, done, saved).items():
                parts[name].load_state_dict(state)
        self.rewind(phase, done)
        self._saved[phase] = done
        return done

    def goes_on(self, phase: str, done: int, parts: dict[str, Any], every: int) -> bool:
        """After each step, or some of them: save now and then, and return False where Ctrl-C was
        pressed, which saves too. A kill loses at most `every` steps: saves are half of that apart,
        and while one is written training goes on, but no further than the next. Where the steps
        come in larger pieces, and on Ctrl-C, a save is waited for; every=1 is for a phase's end.
        (What comes in one piece, the updates that follow a rollout, is lost as one.)
        """
        stopping = self.stopping
        finish_saving(wait=False)
        new = done - self._saved.get(phase, 0)  # steps since the last save began
        if stopping and self._saved.get(phase) == done:
            finish_saving()  # it is saved already
        elif stopping or new >= max(1, every // 2):
            self._saved[phase] = done
            saved = {name: part.state_dict() for name, part in parts.items()}
            wait = stopping or 2 * new > every
            save_state(self.checkpoints(phase), done, saved, wait=wait)
        if stopping and parallel.is_main():
            print(f"saved after step {done} ({phase}); {self._how} continues", file=sys.stderr)
        return not stopping

    def checkpoints(self, phase: str) -> Path:
        return self.out / "checkpoints" / phase

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C or SIGTERM asked to stop. All ranks must ask at the same point of the
        loop, so that they save the same step; the recipe then saves and returns."""
        return parallel.all_sum(int(stop.signal > 0)) > 0


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # else a phase ends before its kernels do
    return time.perf_counter()


def _forget_peak() -> None:
    """Let the peak of memory begin anew. On Linux the kernel can be asked to; elsewhere the peak is
    that of the whole run so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):  # some containers forbid it
            Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    """MB that this process, or its GPU, held at most since `_forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    if sys.platform == "win32":
        return 0.0  # not measured
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _plain(value: Any) -> Any:
    """Numbers of torch and numpy as Python's; what is not finite as None, which JSON can hold."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
