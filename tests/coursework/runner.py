"""The process in which students' code runs: reads jobs from stdin, writes what happened to stdout.

It imports torch and the pristine files once, and forks for each job. A child has no terminal, no
input, an environment without the instructor's, limits of time and memory, and a process group that
is killed at the end. What it may say is one line, which begins with a secret of the job: prints
and whatever else it writes are lost. Deliberate tampering from within the same interpreter can
be made harder, not impossible: `changed` finds patched functions, and what was put into them.

Started by grade.py. Linux or macOS: it needs os.fork.
"""

import builtins
import gc
import importlib
import json
import math
import os
import resource
import secrets
import select
import signal
import sys
import time
import traceback
import unittest.mock
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, TracebackType

import pytest
import torch

from tests.coursework import checks

MEMORY = 2**30  # bytes beyond what the process has after its imports
ANSWER = 2**16  # bytes of a child's line at most
GUARDED = (builtins, math, json, os, time, unittest.mock, pytest, torch, torch.Tensor,
           torch.testing, torch.nn.functional, checks)  # fmt: skip


def main() -> None:
    jobs, seconds = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    for name in dict.fromkeys(job["module"] for job in jobs):
        importlib.import_module(name)
    before = [looks(vars(owner)) for owner in GUARDED]
    gc.freeze()  # what is there already is never collected, hence not copied by a child
    print("ready", file=out, flush=True)
    for job in jobs:
        result = attempt(job, job.get("seconds", seconds), before)
        print(json.dumps(result), file=out, flush=True)


def attempt(job: dict, seconds: float, before: list[dict]) -> dict:
    """Run the job in a child; what it says, or how it ended."""
    token, tests = secrets.token_hex(16), compiled(job["tests"])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        confine(writer, seconds)
        say = os.write, os._exit, json.dumps  # before anything of the student's has run
        try:
            result = run(job, tests, before)
        except BaseException as error:
            result = dict(ended=described(error, job))
        say[0](writer, (token + say[2](result)[: ANSWER - 100] + "\n").encode())
        say[1](0)
    os.close(writer)
    line = read(reader, time.monotonic() + seconds)
    os.close(reader)
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # before setsid, or gone
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if line is None:
        return dict(ended=f"took more than {seconds:g} s: an endless loop?")
    if not line.startswith(token):
        how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        return dict(ended=f"the process ended before its tests were through ({how})")
    return json.loads(line[len(token) :])


def read(reader: int, deadline: float) -> str | None:
    """The child's line, "" where it ended without one, None at the deadline."""
    data = b""
    while len(data) < ANSWER and not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        part = os.read(reader, ANSWER)
        if not part:
            return ""
        data += part
    return data.decode(errors="replace").strip()


def confine(writer: int, seconds: float) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in range(3):
        os.dup2(nothing, file)
    os.closerange(3, writer)
    os.closerange(writer + 1, 256)
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    cpu = math.ceil(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@cache
def compiled(tests: str) -> CodeType:
    path = Path(__file__).with_name(tests)
    return compile(path.read_text(), str(path), "exec")


def run(job: dict, code: CodeType, before: list[dict]) -> dict:
    """The job's tests on its file: how many there are, and for each that fails its name, why, and
    whether it is a value that was wrong (and not the code that broke)."""
    module = ModuleType(job["module"])
    module.__file__ = job["file"]
    sys.modules[job["module"]] = module
    parent, _, name = job["module"].rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)
    exec(compile(job["source"], job["file"], "exec"), vars(module))
    tests = ModuleType("tests")  # not through sys.modules, where something may wait
    exec(code, vars(tests))
    names = [name for name in vars(tests) if name.startswith("test_")]
    own, looked = dict(vars(tests)), looks(vars(tests))
    failed = []
    with getattr(tests, "stand_ins", nullcontext)():
        for name in names:
            torch.manual_seed(0)
            try:
                own[name]()
            except BaseException as error:  # SystemExit and KeyboardInterrupt are failures too
                wrong = isinstance(error, AssertionError)
                failed.append((name, described(error, job), wrong))
    patched = changed(before) or differing(vars(tests), looked)
    if patched:
        return dict(ended=f"{patched[0]} was changed: only the exercise's own file may be")
    return dict(tests=len(names), failed=failed)


def looks(names: dict) -> dict[str, tuple]:
    """Of each name its value and, of a function, what it does: that can be put into it as well."""
    parts = ("__code__", "__defaults__", "__closure__")
    return {
        name: (value, *[getattr(value, part, None) for part in parts])
        if isinstance(value, FunctionType)
        else (value,)
        for name, value in names.items()
    }


def differing(names: dict, before: dict[str, tuple]) -> list[str]:
    now = looks({name: names.get(name) for name in before})
    return [
        name
        for name, known in before.items()
        if [id(part) for part in now[name]] != [id(part) for part in known]
    ]


def changed(before: list[dict]) -> list[str]:
    """What has another value now; a method may also be new, where it was inherited."""
    added = set(vars(torch.Tensor)) - set(before[GUARDED.index(torch.Tensor)])
    return [f"Tensor.{name}" for name in added] + [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, known in zip(GUARDED, before)
        for name in differing(vars(owner), known)
    ]


def described(error: BaseException, job: dict) -> str:
    """In one line: what went wrong and, if it went wrong in the student's code, in which line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, SyntaxError):
        return f"{job['file']}, line {student_line(error.lineno, job)}: {error.msg}"
    if isinstance(error, SystemExit):
        text = "SystemExit: a function may not end the program"
    elif not isinstance(error, (AssertionError, NotImplementedError)) or not text:
        text = f"{type(error).__name__}: {text}"
    frame = last_frame(error.__traceback__, job["file"])
    if frame is None or isinstance(error, NotImplementedError):
        return text
    return f"{text} ({job['file']}, line {student_line(frame, job)})"


def last_frame(trace: TracebackType | None, file: str) -> int | None:
    lines = [f.lineno for f in traceback.extract_tb(trace) if f.filename == file]
    return lines[-1] if lines else None


def student_line(line: int | None, job: dict) -> object:
    """A line of the assembled file as the student counts; `?` where it is the instructor's."""
    origin = job["origin"]
    return (line and line <= len(origin) and origin[line - 1]) or "?"
