"""runtime/sandbox.py: what must pass, what must not, and that the machine is unharmed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.problems import DataError, Problem, code_tests, read_jsonl
from runtime import sandbox
from runtime.flags import UserError
from runtime.sandbox import Jail, Pool, right, same
from runtime.workers import closing, with_workers
from tests.hostile import ANSWER, CALLED, PRINTING, filled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail needs Linux")
ROOT = Path(__file__).parent.parent
QUICK = 0.2  # seconds for a hostile program; by the clock three times that
CALL = {"call": "solve", "args": [3, 5], "expected": ANSWER}
PRINT = {"input": "3 5\n", "output": ANSWER + "\n"}
ADD = {"call": "add", "args": [3, 4], "expected": 7}


# ---- the machine -----------------------------------------------------------------------------


def descendants() -> set[int]:
    """The processes below this one, and those that could only be a jail's."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            if stat.stat().st_uid >= 10**9:
                parents[int(stat.parent.name)] = os.getpid()
        except OSError:  # it has ended
            continue
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def resident(pids: set[int]) -> int:
    """Bytes of memory that these processes hold."""
    statms = [Path(f"/proc/{pid}/statm").read_text().split() for pid in pids]
    return sum(int(statm[1]) for statm in statms) * os.sysconf("SC_PAGE_SIZE")


def traces() -> list[str]:
    """What hostile programs would leave behind: files named by them, shared memory."""
    places = [ROOT, ROOT / "runtime", *map(Path, ("/", "/tmp", "/dev/shm", "/var/tmp", "/run"))]
    files = [str(file) for place in places if place.is_dir() for file in place.glob("hostile*")]
    shared = Path("/proc/sysvipc/shm").read_text() if Path("/proc/sysvipc/shm").exists() else ""
    return [*files, *(line for line in shared.splitlines() if " 4242 " in line)]


def machine() -> dict:
    """What must be the same before and after."""
    return dict(
        processes=descendants(),
        descriptors=sorted(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        traces=traces(),
        sockets=sum("NANOR1" in line for line in open("/proc/net/unix")),
    )


def assert_unharmed(before: dict) -> None:
    deadline = time.monotonic() + 10  # a thread and a namespace take a moment to end
    while (after := machine()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert after == before


@pytest.fixture
def unharmed() -> Iterator[None]:
    before = machine()
    yield
    assert_unharmed(before)


def give_answer(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].sendall(ANSWER.encode())
        except OSError:  # closed
            return


@pytest.fixture
def places(tmp_path, monkeypatch) -> Iterator[dict[str, str]]:
    """Where the answer is to be had by whoever gets there."""
    file = tmp_path / "expected"
    file.write_text(ANSWER)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    keeper = subprocess.Popen(["sleep", "600"], env={"HOSTILE": ANSWER})
    monkeypatch.setenv("HOSTILE", ANSWER)
    name = f"NANOR1-{os.getpid()}"
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    servers[1].bind("\0" + name)
    servers[1].listen()
    for server in servers:
        threading.Thread(target=give_answer, args=(server,), daemon=True).start()
    port = servers[0].getsockname()[1]
    yield {"$FILE": str(file), "$PORT": str(port), "$NAME": name, "$PID": str(keeper.pid),
           "$ANSWER": ANSWER}  # fmt: skip
    assert keeper.poll() is None
    keeper.kill()
    keeper.wait()
    assert file.read_text() == ANSWER and file.stat().st_mode & 0o400
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


@pytest.fixture(scope="module", params=["namespaces", "Landlock"])
def pool(request) -> Iterator[Pool]:
    """In both ways, where the kernel has both."""
    with Pool(namespaces=request.param == "namespaces") as pool:
        try:
            pool.run("", [PRINT])
        except UserError as error:
            pytest.skip(str(error))
        if request.param not in pool.protection:
            pytest.skip(f"not here: {pool.protection}")
        yield pool


# ---- hostile programs ------------------------------------------------------------------------


def test_there_are_many_hostile_programs():
    assert len(CALLED) + len(PRINTING) >= 60


def test_hostile_programs_earn_nothing_and_do_no_harm(pool, places, unharmed):
    jobs = [(filled(program, places), [CALL]) for program in CALLED.values()]
    jobs += [(filled(program, places), [PRINT]) for program in PRINTING.values()]
    limits = dict(seconds=QUICK, memory=256 << 20)
    with Pool(namespaces=pool.namespaces) as pool:
        pool.map([("import time; time.sleep(0.2)", [PRINT])] * 8, 8, **limits)  # opens the jails
        before, running = machine(), resident(descendants())
        words = pool.map(jobs, 8, **limits)
        passed = [name for name, word in zip([*CALLED, *PRINTING], words) if word == ["passed"]]
        assert passed == []
        assert_unharmed(before)
        assert resident(descendants()) < running + (16 << 20)


REACHABLE = ["reads the file", "asks over TCP", "asks over an abstract socket",
             "reads the environment of its parent", "reads the file by a link"]  # fmt: skip


@pytest.mark.parametrize("name", REACHABLE)
def test_outside_of_a_jail_they_would_have_the_answer(name, places):
    program = filled(CALLED[name], places) + "\nprint(solve(3, 5))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    Path("/tmp/hostile-link").unlink(missing_ok=True)
    assert run.stdout.strip() == ANSWER


HOW = {  # the word says what kept a program from passing
    "out of time": ["loops", "sleeps", "forgives everything", "ignores signals", "blocks signals"],
    "too much output": ["a result without an end"],
    "failed": ["a fork bomb by raw system calls", "becomes another program", "takes memory",
               "takes memory by mmap", "asks over TCP", "kills its parent", "NaN",
               "__eq__ is always true", "asks for a file's attributes", "watches files"],
    "wrong": ["True", "the words", "writes two results", "writes a verdict to every descriptor",
              "sys.exit(0) at once", "os._exit(0) at once"],
}  # fmt: skip


@pytest.mark.parametrize("word", HOW)
def test_the_word_says_what_happened(pool, places, word):
    jobs = [(filled(CALLED[name], places), [CALL]) for name in HOW[word]]
    seconds = QUICK if word == "out of time" else 3.0
    assert pool.map(jobs, 4, seconds=seconds, memory=256 << 20) == [[word]] * len(jobs)


# ---- honest programs ---------------------------------------------------------------------------

HONEST = {  # for solve(3, 5), and print of the same
    "plain": "def solve(a, b): return f'{ANSWER}'",
    "exits well after the definition": "def solve(a, b): return ANSWER\nimport sys",
    "imports a lot": """
import asyncio, bisect, collections, decimal, fractions, functools, heapq, itertools, math, random
import re, statistics, string, sqlite3, typing, uuid, zlib, hashlib, json, numbers, queue
def solve(a, b): return ANSWER""",
    "dataclasses, typing and pickle": """
import dataclasses, pickle, typing
@dataclasses.dataclass
class Point:
    x: int
def solve(a, b): return ANSWER if pickle.loads(pickle.dumps(Point(3))).x == 3 else None""",
    "a thread": """
import threading
found = []
def solve(a, b):
    thread = threading.Thread(target=found.append, args=(ANSWER,)); thread.start(); thread.join()
    return found[0]""",
    "deep recursion in a thread": """
import sys, threading
sys.setrecursionlimit(10 ** 6); threading.stack_size(1 << 27)
def depth(n): return n and 1 + depth(n - 1)
found = []
def work(): found.append(depth(50000))
def solve(a, b):
    thread = threading.Thread(target=work); thread.start(); thread.join()
    return ANSWER if found == [50000] else None""",
    "asyncio": """
import asyncio
async def later(): await asyncio.sleep(0.01); return ANSWER
def solve(a, b): return asyncio.run(later())""",
    "a pool of threads, never shut down": """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
def solve(a, b): return pool.submit(lambda: ANSWER).result()""",
    "catches its timer": """
import signal, time
rung = []
signal.signal(signal.SIGALRM, lambda *a: rung.append(1)); signal.setitimer(signal.ITIMER_REAL, 0.01)
def solve(a, b):
    while not rung: time.sleep(0.01)
    return ANSWER""",
    "prints as well": "def solve(a, b): print('x' * 10 ** 6); return ANSWER",
    "raises its stack's limit": """
import resource, sys
resource.setrlimit(resource.RLIMIT_STACK, (1 << 28, resource.getrlimit(resource.RLIMIT_STACK)[1]))
def solve(a, b): return ANSWER if resource.getrlimit(resource.RLIMIT_STACK)[0] == 1 << 28 else 0""",
    "knows its file": "import os\nos.path.abspath(__file__)\ndef solve(a, b): return ANSWER",
    "many threads": """
import threading, time
threads = [threading.Thread(target=time.sleep, args=(0.1,)) for _ in range(40)]
for thread in threads: thread.start()
def solve(a, b): return ANSWER""",
    "a temporary file": """
import tempfile
def solve(a, b):
    with tempfile.TemporaryFile('w+') as file:
        file.write(ANSWER); file.seek(0); return file.read()""",
}
PRINTS = {
    "reads in a thread that goes on": """
import threading, time
def work(): time.sleep(0.1); print(ANSWER[:-2] + str(int(input()[0]) + 9))
threading.Thread(target=work).start()""",
    "exit()": "import sys\nprint(ANSWER)\nassert sys.argv == ['program.py']\nexit()\nprint('more')",
    "exit() in a function": "def main():\n    print(ANSWER)\n    exit(0)\nmain()",
    "a closed output": "import sys\nprint(ANSWER)\nsys.stdout.close()",
    "a fast output": """
import io, os, sys
class Fast:
    def __init__(self): self.buffer = io.BytesIO()
    def write(self, text): self.buffer.write(text.encode())
    def flush(self): os.write(1, self.buffer.getvalue()); self.buffer = io.BytesIO()
sys.stdout = Fast()
print(ANSWER)""",
    "sys.exit(0)": "import sys\nprint(ANSWER)\nsys.exit(0)",
    "white space at the ends": "print(ANSWER + ' \\r')\nprint()",
    "a thread that is not waited for": """
import threading, time
def late(): time.sleep(0.05); print(ANSWER)
threading.Thread(target=late).start()""",
    "output in atexit": """
import atexit, io, sys
sys.stdout = io.StringIO()
atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))
print(ANSWER)""",
    "an output of its own": """
import os
out = os.fdopen(1, 'w'); out.write(ANSWER)""",
    "bytes": "import sys\nsys.stdout.buffer.write(ANSWER.encode())",
    "the main module": "import __main__\nif __name__ == '__main__': print(__main__.ANSWER)",
    "fast reading": """
import os, io, sys
data = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline
assert list(map(int, data().split())) == [3, 5]
os.write(1, ANSWER.encode())""",
    "a pool of threads, never shut down": """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
print(pool.submit(lambda: ANSWER).result())""",
}


def test_honest_programs_pass(pool, unharmed):
    begin = f"ANSWER = {ANSWER!r}\n"
    jobs = {name: (begin + program, [CALL] * 2) for name, program in HONEST.items()}
    if not pool.namespaces:
        del jobs["a temporary file"]  # without namespaces nothing at all can be written
    for name, program in HONEST.items():
        if name != "a temporary file":
            jobs["print: " + name] = (f"{begin}{program}\nprint(solve(*map(int, input().split())))",
                                      [PRINT] * 2)  # fmt: skip
    del jobs["print: prints as well"]
    jobs |= {name: (begin + program, [PRINT]) for name, program in PRINTS.items()}
    with Pool(namespaces=pool.namespaces) as pool:
        words = dict(zip(jobs, pool.map(list(jobs.values()), 2)))
    assert [name for name, each in words.items() if set(each) != {"passed"}] == []


def memory_holds(pid: int, words: bytes) -> bool:
    """Whether the memory that this process may write has these bytes in it."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in maps:
            start, _, end = line.split()[0].partition("-")
            if " rw" in line and "[v" not in line:
                memory.seek(int(start, 16))
                if words in memory.read(int(end, 16) - int(start, 16)):
                    return True
    return False


def test_the_server_never_holds_what_a_test_got_or_wrote(pool):
    """So its next fork can't find it there."""
    others = descendants()
    with Pool(namespaces=pool.namespaces) as pool:
        program = "def solve(text): return text[::-1]"
        test = {"call": "solve", "args": ["drowterces"], "expected": "secretword"}
        assert pool.run(program, [test] * 3) == ["passed"] * 3
        servers = descendants() - others
        assert any(memory_holds(pid, b"the processes of the tests") for pid in servers)  # its text
        for words in (b"drowterces", b"secretword", b"text[::-1]"):
            assert not any(memory_holds(pid, words) for pid in servers), words


def test_a_test_finds_nothing_of_an_earlier_one(pool):
    leave = """
try: open('/tmp/left', 'w').write('x')
except OSError: pass
import builtins, sys, math
builtins.left = math.left = sys.left = 1
def solve(a, b): return 'done'"""
    look = """
import builtins, math, os, sys
def solve(a, b):
    found = [name for thing in (builtins, math, sys) for name in dir(thing) if name == 'left']
    return found + ['file'] * os.path.exists('/tmp/left')"""
    assert pool.run(leave, [{**CALL, "expected": "done"}]) == ["passed"]
    assert pool.run(look, [{**CALL, "expected": []}]) == ["passed"]


def test_a_program_has_no_environment_and_an_empty_directory(pool):
    see = "import os\ndef solve(a, b): return [dict(os.environ), os.getcwd()]"
    place = "/tmp" if pool.namespaces else "/"
    assert pool.run(see, [{**CALL, "expected": [{}, place]}]) == ["passed"]


def test_a_program_has_four_descriptors_however_many_its_parent_has(pool):
    see = """
import os
def is_open(fd):
    try: return bool(os.fstat(fd))
    except OSError: return False
def solve(a, b): return [fd for fd in range(4096) if is_open(fd)]"""
    files = [open(os.devnull) for _ in range(300)]  # the socket to the jail has a number after them
    with Pool(namespaces=pool.namespaces) as pool:
        assert pool.run(see, [{**CALL, "expected": [0, 1, 2, 3]}]) == ["passed"]
    for file in files:
        file.close()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="counts root's only")
def test_threads_are_counted(pool):
    bomb = """
import os, threading, time
threading.stack_size(32768)
def solve(a, b):
    try: os.setresuid(0, 0, 0)  # who is not counted
    except OSError: pass
    try:
        for count in range(1000): threading.Thread(target=time.sleep, args=(0.5,)).start()
    except RuntimeError: return 50 < count < 64"""
    assert pool.run(bomb, [{**CALL, "expected": True}]) == ["passed"]


def test_a_call_imports_the_program_which_does_not_read_then(pool):
    program = """
def solve(a, b): return a + b
if __name__ == '__main__':
    print(solve(*map(int, input().split())))"""
    tests = [{**CALL, "expected": 8}, {"input": "3 5", "output": "8"}]
    assert pool.run(program, tests) == ["passed"] * 2


# ---- what is right -----------------------------------------------------------------------------

SAME = [(1, 1), (0.1 + 0.2, 0.3), ([1, "a", None], [1, "a", None]), ({"a": [1.0]}, {"a": [1.0]})]
OTHER = [(1, True), (1, 1.0), (0, False), ("1", 1), (None, 0), (None, False), ([], {}), (0.3, 0.31),
         ([1], [1, 1]), ({"a": 1}, {"a": True}), ({"a": 1}, {"b": 1}), ([], None)]  # fmt: skip


def test_values_are_the_same_if_their_types_are():
    assert all(same(*pair) for pair in SAME)
    assert not any(same(*pair) or same(*pair[::-1]) for pair in OTHER)


def test_a_result_that_is_no_json_is_wrong():
    for output in (b"", b"NaN", b"Infinity", b"1e999", b"1 2", b"\xff", b"[" * 10**5, b"9" * 10**5):
        assert not right(output, {"call": "f", "args": [], "expected": 1})


def test_printed_text_is_compared_without_what_no_one_sees():
    test = {"input": "", "output": "a b\n\nc\n"}
    for good in ("a b\n\nc", "a b \n\t\nc\r\n\n\n"):
        assert right(good.encode(), test)
    for bad in ("a b\nc", "A b\n\nc", " a b\n\nc", "a  b\n\nc", "a b\n\nc\0", "a b\n\nc\x0b"):
        assert not right(bad.encode(), test)


def test_one_failed_test_ends_it(pool):
    tests = [ADD, {**ADD, "expected": 8}, ADD]
    assert pool.run("def add(a, b): return a + b", tests) == ["passed", "wrong"]


def test_limits(pool):
    burn = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
    seven = {"input": "", "output": "7"}
    assert pool.run(burn.format(0.05) + "print(7)", [seven], seconds=0.3) == ["passed"]
    assert pool.run(burn.format(0.4) + "print(7)", [seven], seconds=0.3) == ["out of time"]
    take = "x = bytearray(200 << 20)\nprint(7)"
    assert pool.run(take, [seven], memory=400 << 20) == ["passed"]
    assert pool.run(take, [seven], memory=150 << 20) == ["failed"]
    assert pool.run("print('7' * (1 << 20))", [seven]) == ["too much output"]


def test_a_large_input_and_a_large_output(pool):
    text = "\n".join(map(str, range(100_000)))
    test = {"input": text, "output": text}
    assert pool.run("import sys\nprint(sys.stdin.read())", [test]) == ["passed"]


# ---- the pool ------------------------------------------------------------------------------------


def test_a_lost_jail_is_replaced(unharmed):
    with Pool() as pool:
        assert pool.run("def add(a, b): return a + b", [ADD]) == ["passed"]
        pool.idle[0].process.kill()
        pool.idle[0].process.wait()
        assert pool.run("def add(a, b): return a + b", [ADD]) == ["passed"]


def test_a_pool_that_is_left_by_an_exception_leaves_nothing(unharmed):
    with pytest.raises(KeyError), Pool() as pool:
        pool.map([("import time\ntime.sleep(0.1)", [PRINT])] * 4, 4, seconds=1.0)
        raise KeyError


def test_an_interrupted_test_does_not_answer_the_next(unharmed):
    def ring(number, frame):
        raise TimeoutError

    with Pool() as pool:
        pool.run("", [PRINT])
        old = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            pool.run("import time\ntime.sleep(5)", [PRINT])
        signal.signal(signal.SIGALRM, old)
        assert pool.idle == []
        assert pool.run("def add(a, b): return a + b", [ADD]) == ["passed"]


RUNNING = """
import sys
from runtime.sandbox import Pool
with Pool() as pool:
    print("ready", flush=True)
    pool.map([("while True: pass", [{"input": "", "output": "x"}])] * 4, 2, seconds=20)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_parent_that_is_stopped(number, unharmed):
    before = descendants()
    parent = subprocess.Popen(
        [sys.executable, "-c", RUNNING], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    with parent:
        parent.stdout.readline()
        started = time.monotonic()
        while len(descendants() - before) < 5 and time.monotonic() < started + 30:
            time.sleep(0.02)
        below = descendants() - before - {parent.pid}
        parent.send_signal(number)
        if number == signal.SIGINT:
            parent.send_signal(number)
        parent.wait(30)
    deadline = time.monotonic() + 10
    while (left := [p for p in below if alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert below and left == []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "column, header",
    [(1, "x86_64-linux-gnu/asm/unistd_64.h"), (2, "asm-generic/unistd.h")],
)
def test_the_numbers_of_system_calls_are_those_of_the_kernel(column, header):
    from runtime import jail  # here: it can't be imported on every system

    file = Path("/usr/include", header)
    if not file.exists():
        pytest.skip(f"no {file}")
    there = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read_text()))
    forbidden = jail.FORBIDDEN.split()
    ours = dict(zip(forbidden[::3], forbidden[column::3]))
    assert ours == {name: there.get(name, "-") for name in ours}
    names = ("clone", "prlimit64", "socketpair", "fcntl", "ioctl")
    assert [str(each[0][column - 1]) for each in jail.CONDITIONS] == [there[n] for n in names]


def test_where_nothing_protects_it_refuses(monkeypatch, unharmed):
    def weak(self, *arguments):
        return "ended", b'["files"]'

    monkeypatch.setattr(Jail, "run", weak)
    with pytest.raises(UserError, match="files OPEN.*NANOR1_WEAK_SANDBOX"), Pool() as pool:
        pool.run("", [PRINT])
    with Pool(weak=True) as pool:
        assert "files OPEN, network closed" in (pool.run("", [PRINT]) and pool.protection)


def test_elsewhere_than_on_linux_it_says_so(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match="darwin: the jail needs Linux"):
        Pool()


def test_nothing_starts_before_the_first_program():
    look = (
        "import runtime.sandbox, os;"
        "print(open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read())"
    )
    out = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "" and out.returncode == 0


# ---- tests as data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tests, message",
    [
        ([], "a list of some"),
        ({}, "a list of some"),
        ([1], "expected \"input\""),
        ([{"input": "1"}], "expected \"input\""),
        ([{"input": 1, "output": "1"}], "expected \"input\""),
        ([{**PRINT, "call": "f"}], "expected \"input\""),
        ([{"call": "a.b", "args": [], "expected": 1}], "expected \"input\""),
        ([{"call": "f", "args": {}, "expected": 1}], "expected \"input\""),
        ([{"input": "1", "output": " \n"}, {"call": "f", "args": [], "expected": None}], "nothing"),
        ([{"call": "f", "args": [], "expected": float("nan")}], "finite"),
        ([{"input": "\ud800", "output": "1"}], "surrogate"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_used_are_refused(tests, message):
    with pytest.raises(ValueError, match=message):
        code_tests(json.dumps(tests))


# ---- the reward ----------------------------------------------------------------------------------

TESTS = json.dumps([ADD, {**ADD, "args": [-1, 1], "expected": 0}])
BLOCK = "```python\ndef add(a, b):\n    return a + b\n```"
WRONG = BLOCK.replace("+", "-")

EARNS = [
    f"<think> easy </think> <answer>\n{BLOCK}\n</answer>",
    f"<think> easy </think>\n{BLOCK}",
    f"<think> easy </think> <answer>{BLOCK}</answer>",
    f"<think> easy </think> <answer> {BLOCK} </answer>",
    f"<think> {WRONG} </think>\n{WRONG}\nNo:\n{BLOCK}\nDone.",
    f"<think> easy </think>\n{BLOCK.replace('```', '````')}",
    f"<think> easy </think>\n{BLOCK}\nIt prints:\n```\n7\n```",
    f"<think> easy </think>\n```text\n7\n```\n{BLOCK.replace('python', '')}",
    f"no reasoning\n{BLOCK.replace('python', '')}",
    f"<think> easy </think>\n{BLOCK.replace('a + b', 'a + b  # ```')}",
]
EARNS_NOTHING = [
    "",
    "<think> easy </think> add",
    f"<think> easy\n{BLOCK}\n",  # unfinished reasoning
    f"<think> easy\n{BLOCK}\n</think> see above",
    f"<think> easy </think>\n{BLOCK}\n</think>\n{BLOCK}",
    f"<think> easy </think>\n{BLOCK}\n{WRONG}",
    f"<think> easy </think>\n{BLOCK}\n```python\nnot closed",
    f"<think> easy </think>\n{BLOCK}\n```Python\npass\n```",
    f"<think> easy </think>\n{BLOCK.replace('python', '')}\n```\n7\n```",
    f"<think> easy </think>\n{BLOCK[:-4]}",
    f"<think> easy </think>\n{WRONG}",
    f"<think> easy </think> <answer>{BLOCK}</answer> or <answer>\n{WRONG}</answer>",
    f"<think> easy </think> {BLOCK}\n<answer>```</answer>",
    "<think> easy </think>\ndef add(a, b): return a + b",
]


def test_the_reward_is_for_the_last_program_after_the_reasoning():
    import rewards

    assert [text for text in EARNS if rewards.code_reward(text, TESTS) != 1.0] == []
    assert [text for text in EARNS_NOTHING if rewards.code_reward(text, TESTS) != 0.0] == []


def test_a_reward_without_tests_is_refused():
    import rewards

    for gold in ("[]", "", "7"):
        with pytest.raises(ValueError):
            rewards.code_reward(EARNS[0], gold)


def test_the_rule_the_evaluation_and_the_vote_know_code():
    import rewards
    import sample

    problem = Problem("Write add.", TESTS, "code")
    rewards.need_rules([problem])
    assert rewards.rule_reward(problem, EARNS[0], finished=True) == 2.0  # accuracy and format
    assert rewards.rule_reward(problem, EARNS[0], finished=False) == 0.0
    stop = [sample.Output([1, 2], [0.0, 0.0], "stop")] * 3
    texts = [EARNS[0], f"<think> x </think>\n{WRONG}", EARNS[0]]
    judged = sample.judge_group(problem, texts, stop)
    assert (judged["pass@1"], judged["cons"], judged["pass"]) == (pytest.approx(2 / 3), 1.0, 1.0)


def jails() -> set[int]:
    """Of all jails on this machine, the servers."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found |= {int(file.parent.name)} if b"runtime/jail.py" in file.read_bytes() else set()
        except OSError:
            continue
    return found


def program_passes(problem: Problem, program: str, finished: bool) -> float:
    """A rule that does without rewards.py, and so without torch, which takes workers seconds."""
    return float(sandbox.passes(program, problem.answer))


def test_workers_run_programs_and_leave_nothing():
    before = jails()
    problem = Problem("Write add.", TESTS, "code")
    with closing(with_workers(program_passes, 2)) as reward:
        programs = ["def add(a, b): return a + b", "def add(a, b): return a - b"] * 4
        assert reward([problem] * 8, programs, [True] * 8) == [1.0, 0.0] * 4
        assert jails() > before
    deadline = time.monotonic() + 10
    while (left := jails() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def test_problems_with_tests_are_read_from_a_file(tmp_path):
    file = tmp_path / "code.jsonl"
    rows = [{"question": "Write add.", "tests": [ADD]}, {"question": "Sum.", "tests": [PRINT] * 2}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_jsonl(file)
    assert [problem.checker for problem in problems] == ["code", "code"]
    assert [json.loads(problem.answer) for problem in problems] == [row["tests"] for row in rows]
    for bad in ({"tests": []}, {"tests": [{"input": "1"}]}, {"checker": "code", "answer": "7"}):
        file.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": "Add.", **bad}) + "\n")
        with pytest.raises(DataError, match=r"code.jsonl:2: found the test"):
            read_jsonl(file)


@pytest.mark.slow
def test_ten_thousand_tests_leak_nothing(unharmed):
    with Pool() as pool:
        pool.map([("def add(a, b): return a + b", [ADD] * 10)] * 20, 4)
        before, running = machine(), resident(descendants())
        words = pool.map([("def add(a, b): return a + b", [ADD] * 10)] * 1000, 4)
        assert words == [["passed"] * 10] * 1000
        assert_unharmed(before)
        assert resident(descendants()) < running + (16 << 20)
