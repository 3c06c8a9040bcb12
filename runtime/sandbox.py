"""Programs that a model wrote, run on tests, where they can do no harm and fool nobody.

    with Pool() as pool:
        pool.run(program, tests)                 a word for each test: "passed", or why not
        pool.map([(program, tests), ...], 8)     the same for many, eight at a time
    passes(program, tests)                       in this process's own pool, opened when first used
    protection()                                 what holds on this machine, in words

A test gives a program an input and says what to print, or calls a function of it:

    {"input": "3 4\\n", "output": "7\\n"}
    {"call": "add", "args": [3, 4], "expected": 7}

A policy searches for whatever the reward can't see. Hence: what is expected never leaves this
process; a program gets its own input and nothing else, and what it hands out is text. It may forge
that as it likes: only the right text is right, and whoever finds it without being told has solved
the task. Each test has a fresh process of jail.py: no network, no files, no other processes, and
limits. Where the kernel can't shut off files and network, programs are not run.

It is no part of the method. Read next: jail.py, the other side.
"""

import atexit
import json
import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from data.problems import code_tests, strict_json
from runtime.flags import UserError

SECONDS = 4.0  # of processor time for each test
WALL = 3  # so many times that may pass by the clock: the machine may have other things to do
MEMORY = 512 << 20  # bytes of address space; Python itself takes 40 MB of it
MOST = 1 << 20  # bytes that a program may write
WEAK = "NANOR1_WEAK_SANDBOX"  # set in the environment: run programs without protection too

# A program that tries what none may do, and tells what it could.
PROBE = """
import os, socket
def attempt(path):
    could = []
    for what, act in (("files", lambda: open(path).read()), ("network", lambda: socket.socket()),
                      ("processes", lambda: os.fork() or os._exit(0))):
        try:
            act()
            could.append(what)
        except OSError:
            pass
    return could
"""


class JailLost(RuntimeError):
    """A jail's process has died: killed from outside, perhaps for want of memory."""


# ---- what is right -------------------------------------------------------------------------


def same(found: object, expected: object) -> bool:
    """Equal as JSON, types included: True is not 1, nor is 1.0. Floats to nine digits, since sums
    in another order are right too."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, float):
        return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-15)
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    return found == expected


def lines(text: str) -> list[str]:
    """Without white space at the ends of lines and empty lines at the end, which no one sees."""
    return "\n".join(line.rstrip(" \t\r") for line in text.split("\n")).rstrip("\n").split("\n")


def right(output: bytes, test: dict) -> bool:
    """Whether this is what the test wants to see. Never raises, whatever the program wrote."""
    try:
        text = output.decode()
        if "call" in test:
            return same(strict_json(text), test["expected"])
        return lines(text) == lines(test["output"])
    except (ValueError, RecursionError):  # bytes that are no text, a text that is no JSON
        return False


# ---- one jail --------------------------------------------------------------------------------


class Jail:
    """A server of jail.py and the socket to it. One test at a time."""

    def __init__(self, namespaces: bool = True):
        for how in ("namespaces",) * namespaces + ("no namespaces",):
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            file = Path(__file__).with_name("jail.py")
            self.process = subprocess.Popen(
                [sys.executable, "-ISB", file, how], stdin=theirs, stdout=subprocess.DEVNULL,
                cwd="/", env={"MALLOC_ARENA_MAX": "1"},  # else each thread may reserve 128 MB
                start_new_session=True,  # Ctrl-C in the terminal is this process's affair
            )  # fmt: skip
            theirs.close()
            try:
                self.layers = self._receive(60)
            except BaseException:
                self.close()
                raise
            if "refused" not in self.layers:
                break
            self.close()

    def close(self) -> None:
        """The server ends, and with it the test, when nobody holds the other end of its socket."""
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _receive(self, seconds: float) -> dict:
        self.control.settimeout(seconds)
        try:
            message = self.control.recv(4096)
        except OSError:
            message = b""
        if not message:
            raise JailLost("a jail has died, or does not answer; is there enough memory?")
        return json.loads(message)

    def run(self, program: str, test: dict, seconds: float, memory: int) -> tuple[str, bytes]:
        """How the program ended on this test ("ended", or why it can't have passed), and what it
        wrote."""
        call = {key: test[key] for key in ("call", "args") if key in test}
        job = json.dumps({"program": program, **call} if call else program)
        limits = dict(seconds=seconds, memory=memory, wall=WALL * seconds)
        pipe, end = os.pipe()
        fds = [end]
        try:
            for content in (test.get("input", ""), job):
                fds.insert(0, os.memfd_create("test"))
                with open(fds[0], "w", encoding="utf-8", newline="", closefd=False) as file:
                    file.write(content)
                os.lseek(fds[0], 0, os.SEEK_SET)
            with suppress(OSError):  # the server has died: _receive will say so
                socket.send_fds(self.control, [json.dumps(limits).encode()], fds)
            while fds:
                os.close(fds.pop())
            output = self._collect(pipe, WALL * seconds)
        finally:
            for fd in (pipe, *fds):
                os.close(fd)
        how = self._receive(WALL * seconds)
        if len(output) > MOST:
            return "too much output", b""
        if how["stopped"] or how["cpu"] > seconds:
            return "out of time", b""
        return "ended" if how["status"] == 0 else "failed", output

    def _collect(self, pipe: int, wall: float) -> bytes:
        """What comes out of the pipe until the server has something to say."""
        output, deadline = bytearray(), time.monotonic() + wall + 30
        poll = select.poll()
        for source in (pipe, self.control.fileno()):
            poll.register(source, select.POLLIN)
        while True:
            ready = [source for source, _ in poll.poll(1000)]
            if pipe in ready:
                chunk = os.read(pipe, 1 << 16)
                output += chunk
                if not chunk or len(output) > MOST:
                    poll.unregister(pipe)
                if len(output) > MOST:
                    with suppress(OSError):
                        self.control.send(b"stop")
            elif ready or time.monotonic() > deadline:
                return bytes(output)


# ---- many ------------------------------------------------------------------------------------


class Pool:
    """Jails that are opened as they are needed and closed together. Several threads may use it.

    weak: run programs also where files or the network can't be shut off; otherwise that raises
    UserError. namespaces: False does without, as it is where the kernel refuses them.
    """

    def __init__(self, weak: bool | None = None, namespaces: bool = True):
        if sys.platform != "linux":
            raise UserError(
                f"programs can't be run safely on {sys.platform}: the jail needs Linux; leave out"
                " the problems that have tests, or score them in a container"
            )
        self.weak = bool(os.environ.get(WEAK)) if weak is None else weak
        self.namespaces, self.closed, self.protection = namespaces, False, ""
        self.idle: list[Jail] = []
        self.busy: set[Jail] = set()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """All jails end; what still runs in another thread raises RuntimeError there."""
        self.closed = True
        for jail in list(self.busy):
            with suppress(OSError):
                jail.control.shutdown(socket.SHUT_RDWR)
        while self.idle:
            self.idle.pop().close()

    def run(
        self, program: str, tests: Sequence[dict], seconds: float = SECONDS, memory: int = MEMORY
    ) -> list[str]:
        """A word for each test in turn, up to the first that isn't "passed"."""
        words: list[str] = []
        for attempt in (1, 2):
            try:
                with self._jail() as jail:
                    while len(words) < len(tests) and set(words) <= {"passed"}:
                        test = tests[len(words)]
                        word, output = jail.run(program, test, seconds, memory)
                        if word == "ended":
                            word = "passed" if right(output, test) else "wrong"
                        words.append(word)
                break
            except JailLost:  # not the program's doing: it can't reach its server
                if attempt == 2:
                    raise
        return words

    def map(self, jobs: Sequence[tuple], at_a_time: int, **limits) -> list[list[str]]:
        """`run` for each (program, tests), so many at a time."""
        words: list[list[str]] = [[] for _ in jobs]
        errors: list[BaseException] = []
        rest = iter(range(len(jobs)))

        def work() -> None:
            try:
                for i in rest:
                    words[i] = self.run(*jobs[i], **limits)
            except BaseException as error:
                errors.append(error)
                self.close()  # so that the others end too

        # Daemons: after a second Ctrl-C Python does not wait for them, and their jails end with it.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(at_a_time)]
        try:
            for act in (threading.Thread.start, threading.Thread.join):
                for thread in threads:
                    act(thread)
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if errors:
            raise errors[0]
        return words

    @contextmanager
    def _jail(self) -> Iterator[Jail]:
        if self.closed:
            raise RuntimeError("the pool of jails is closed; open another one")
        try:
            jail = self.idle.pop()
        except IndexError:
            jail = self._open()
        self.busy.add(jail)
        try:
            yield jail
        except BaseException:  # its next answer would be to the question that was left
            jail.close()
            raise
        finally:
            self.busy.discard(jail)
        self.idle.append(jail)
        if self.closed:
            self.close()

    def _open(self) -> Jail:
        """A jail that has withstood the probe."""
        jail = Jail(self.namespaces)
        try:
            with tempfile.NamedTemporaryFile("w") as file:
                os.chmod(file.name, 0o644)
                attempt = {"call": "attempt", "args": [file.name]}
                how, output = jail.run(PROBE, attempt, SECONDS, MEMORY)
            if how != "ended":
                raise UserError(
                    f"{sys.executable} can't be used for programs in a jail ({how}): its library"
                    " must be readable by every user"
                )
            could = json.loads(output)
            self.protection = describe(could, **jail.layers)
            if not self.weak and {"files", "network"} & set(could):
                raise UserError(
                    f"programs that a model wrote are not run here: {self.protection}. Run as root"
                    " in a container that allows namespaces (docker: --privileged), on a kernel"
                    f" with Landlock (5.13), or set {WEAK}=1 if nothing here can be harmed"
                )
        except BaseException:
            jail.close()
            raise
        return jail


def describe(could: list[str], namespaces: bool, landlock: int, seccomp: bool) -> str:
    """What a program can't reach, as the probe has found, and by what means."""
    found = [f"{x} {'OPEN' if x in could else 'closed'}" for x in ("files", "network", "processes")]
    means = {"namespaces": namespaces, f"Landlock {landlock}": landlock, "seccomp": seccomp}
    return f"{', '.join(found)} ({', '.join([*filter(means.get, means), 'rlimits'])})"


@lru_cache
def pool_of(process: int) -> Pool:
    """A process's own pool, opened at the first call, closed at its end. A fork gets another."""
    pool = Pool()
    atexit.register(pool.close)
    return pool


def passes(program: str | None, tests: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether the program passes every one of the tests, a JSON list. Raises ValueError where they
    are none, UserError where this machine can't run programs safely."""
    wanted = code_tests(tests)
    if program is None:
        return False
    return pool_of(os.getpid()).run(program, wanted, seconds, memory) == ["passed"] * len(wanted)


def protection() -> str:
    """What holds on this machine, as a probe finds it. Raises UserError where that is too weak."""
    pool = pool_of(os.getpid())
    pool.run("", [{"input": "", "output": ""}])
    return pool.protection
