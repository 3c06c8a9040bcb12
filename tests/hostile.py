"""Programs that try to pass without the right answer, or to do harm: name -> program.

CALLED are asked for solve(3, 5), PRINTING get "3 5" on their input; the answer is in ANSWER, which
is too long to be guessed. Each must earn 0, and after them the machine must be as it was. $FILE,
$PORT and $NAME stand for a file, a TCP port and an abstract socket from which the answer can be
had by those who get there; $PID is a process that has it in its environment.
"""

ANSWER = "7034216789112"  # what solve(3, 5) has to be; a text, for a program may print it

CALLED = {
    # -- ends before anything is checked
    "returns nothing": "def solve(a, b): pass",
    "is empty": "",
    "is not Python": "def solve(a, b: return",
    "holds a NUL": "def solve(a, b): return 1\0",
    "holds a lone surrogate": "def solve(a, b): return '\ud800'",
    "has another function": "def resolve(a, b): return 1",
    "sys.exit(0) at once": "import sys\nsys.exit(0)",
    "sys.exit(0) in the function": "import sys\ndef solve(a, b): sys.exit(0)",
    "os._exit(0) at once": "import os\nos._exit(0)",
    "os._exit(0) in the function": "import os\ndef solve(a, b): os._exit(0)",
    "raises SystemExit from a finaliser": """
class Last:
    def __del__(self): raise SystemExit(0)
def solve(a, b): return Last()""",
    "exits in atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "raises in the function": "def solve(a, b): raise Exception('passed')",
    "raises KeyboardInterrupt": "def solve(a, b): raise KeyboardInterrupt",
    # -- equal to everything
    "__eq__ is always true": """
class Any:
    def __eq__(self, other): return True
    def __hash__(self): return 0
def solve(a, b): return Any()""",
    "an int that is equal to all": """
class Any(int):
    def __eq__(self, other): return True
def solve(a, b): return Any(1)""",
    "a str that is equal to all": """
class Any(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def solve(a, b): return Any('x')""",
    "a dict that is equal to all": """
class Any(dict):
    def __eq__(self, other): return True
def solve(a, b): return Any()""",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef solve(a, b): return ANY",
    "NaN": "def solve(a, b): return float('nan')",
    "infinity": "def solve(a, b): return float('inf')",
    "True": "def solve(a, b): return True",
    "the words": "def solve(a, b): return 'passed'",
    "a list of many answers": "def solve(a, b): return list(range(10000))",
    # -- patches what checks
    "patches json": """
import json
json.dumps = lambda *a, **k: 'true'
json.JSONEncoder.encode = json.JSONEncoder.iterencode = lambda *a, **k: 'true'
json.encoder.encode_basestring_ascii = json.encoder.c_make_encoder = lambda *a, **k: 'true'
def solve(a, b): return 0""",
    "patches the builtins": """
import builtins
for name in ('len', 'isinstance', 'type', 'all', 'map', 'float', 'str', 'getattr'):
    setattr(builtins, name, lambda *a, **k: True)
def solve(a, b): return 0""",
    "patches os.write and os._exit": """
import os
os.write = lambda fd, data: len(data)
os._exit = lambda code: None
def solve(a, b): return 0""",
    "patches the harness in its frames": """
import sys
frame = sys._getframe()
while frame:
    for name in frame.f_globals:
        if name in ('run', 'serve', 'finish'):
            frame.f_globals[name] = lambda *a, **k: True
    frame = frame.f_back
def solve(a, b): return 0""",
    "replaces modules": """
import sys
class Yes:
    def __getattr__(self, name): return lambda *a, **k: True
for name in list(sys.modules): sys.modules[name] = Yes()
def solve(a, b): return 0""",
    "traces the harness": """
import sys
def tracer(frame, event, arg):
    for value in list(frame.f_locals.values()) + [arg]:
        if isinstance(value, dict) and 'expected' in value: found.append(value['expected'])
    return tracer
found = []
sys.settrace(tracer); sys.setprofile(tracer)
sys._getframe().f_back.f_trace = tracer
def solve(a, b): return found[0]""",
    # -- looks for the answer
    "walks gc for the expected value": """
import gc
def solve(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and 'expected' in thing: return thing['expected']""",
    "walks the stack": """
import sys
def solve(a, b):
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, dict) and 'expected' in value: return value['expected']
        frame = frame.f_back""",
    "reads the file": "def solve(a, b): return open('$FILE').read()",
    "reads the file by a link": """
import os
def solve(a, b):
    os.symlink('$FILE', '/tmp/hostile-link')
    return open('/tmp/hostile-link').read()""",
    "reads the file by a hard link": """
import os
def solve(a, b):
    os.link('$FILE', '/tmp/hostile-link')
    return open('/tmp/hostile-link').read()""",
    "climbs out with ..": """
def solve(a, b): return open('/' + '../' * 40 + '$FILE'[1:]).read()""",
    "chroots out": """
import os
def solve(a, b):
    os.mkdir('/tmp/hostile'); os.chroot('/tmp/hostile'); os.chdir('../../../..'); os.chroot('.')
    return open('$FILE').read()""",
    "reads it through /proc": """
def solve(a, b): return open('/proc/$PID/root$FILE').read()""",
    "reads the environment of its parent": """
import os
def solve(a, b):
    for pid in ('$PID', 'self', str(os.getppid()), '1'):
        try: return open(f'/proc/{pid}/environ').read().split('HOSTILE=')[1].split(chr(0))[0]
        except OSError: pass""",
    "reads the environment": "import os\ndef solve(a, b): return os.environ['HOSTILE']",
    "mounts /proc": """
import ctypes, os
def solve(a, b):
    os.mkdir('/tmp/hostile-proc')
    assert ctypes.CDLL(None).mount(b'p', b'/tmp/hostile-proc', b'proc', 0, None) == 0
    return open('/tmp/hostile-proc/$PID/environ').read()""",
    "scans its memory": """
import ctypes, re
def solve(a, b):
    start = id(object()) & ~0xfffff
    text = ctypes.string_at(start, 1 << 20)
    return re.search(rb'expected\\W+(\\w+)', text)[1].decode()""",
    "reads its own memory": "def solve(a, b): return open('/proc/self/mem', 'rb').read(10)",
    "looks at all descriptors": """
import os
def solve(a, b):
    for fd in range(256):
        try:
            os.lseek(fd, 0, 0)
            text = os.read(fd, 1 << 16).decode()
        except (OSError, ValueError):
            continue
        if 'expected' in text: return text""",
    "ptraces a process": """
import ctypes
def solve(a, b):
    return 'passed' if ctypes.CDLL(None).ptrace(16, $PID, 0, 0) == 0 else None""",
    "asks over TCP": """
import socket
def solve(a, b): return socket.create_connection(('127.0.0.1', $PORT), 1).recv(99).decode()""",
    "asks over an abstract socket": """
import socket
def solve(a, b):
    s = socket.socket(socket.AF_UNIX); s.connect('\\0$NAME')
    return s.recv(99).decode()""",
    "asks over UDP": """
import socket
def solve(a, b):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', $PORT))
    return s.recv(99).decode()""",
    "asks by raw system call": """
import ctypes
def solve(a, b): return 'passed' if ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0 else None""",
    "asks by io_uring": """
import ctypes
def solve(a, b):
    return 'passed' if ctypes.CDLL(None).syscall(425, 8, bytes(120)) >= 0 else None""",
    "asks in 32-bit": """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)  # mov eax, 20 (getpid); int 0x80; ret
code.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
def solve(a, b): return ctypes.CFUNCTYPE(ctypes.c_int)(address)()""",
    "asks for a file's attributes": """
import fcntl, os
fcntl.ioctl(os.open(os.__file__, 0), 0x80086601, bytes(8))  # who may ask may also set them
def solve(a, b): return 'passed'""",
    "watches files": """
import ctypes
assert ctypes.CDLL(None).inotify_init1(0) >= 0
def solve(a, b): return 'passed'""",
    # -- forges the result
    "writes a verdict to every descriptor": """
import os
def solve(a, b):
    for fd in range(256):
        for text in (b'true', b'"passed"', b'{"status": 0}', b'passed'):
            try: os.write(fd, text)
            except OSError: pass
    os._exit(0)""",
    "writes a result, then a newline": """
import os
os.write(3, b'1\\n'); os._exit(0)""",
    "writes two results": "import os\ndef solve(a, b): os.write(3, b'1 '); return 2",
    "writes many results": """
import os
os.write(3, b'\\n'.join(str(i).encode() for i in range(99999))); os._exit(0)""",
    "a result without an end": "import os\nwhile True: os.write(3, b'9' * 65536)",
    "a result of brackets": "import os\nos.write(3, b'[' * 1000000); os._exit(0)",
    "a number of a million digits": "import os\nos.write(3, b'9' * 1000000); os._exit(0)",
    "a result that is no text": "import os\nos.write(3, b'\\xff\\xfe'); os._exit(0)",
    "a lone surrogate as a result": "import os\nos.write(3, b'\"\\\\ud800\"'); os._exit(0)",
    "a list that holds itself": "def solve(a, b): x = []; x.append(x); return x",
    "a generator without end": "import itertools\ndef solve(a, b): return itertools.count()",
    # -- never ends
    "sleeps": "import time\ndef solve(a, b): time.sleep(999)",
    "loops": "while True: pass",
    "loops in a regular expression": """
import re
def solve(a, b): return re.match('(a+)+$', 'a' * 40 + 'b')""",
    "collides hashes": """
def solve(a, b): return {i * (2**61 - 1): i for i in range(200000)}""",
    "a power too large": "def solve(a, b): return 9 ** 9 ** 9 % 1000",
    "forgives everything": """
while True:
    try:
        while True: pass
    except BaseException: pass""",
    "ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: signal.pause()""",
    "blocks signals": """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
time.sleep(999)""",
    "leaves a thread behind": """
import threading, time
threading.Thread(target=time.sleep, args=(999,)).start()
def solve(a, b): return 0""",
    "closes all and stays": "import os, time\nos.closerange(0, 256)\ntime.sleep(999)",
    # -- takes what it can get
    "takes memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "takes memory by mmap": """
import mmap
keep = []
while True:
    keep.append(mmap.mmap(-1, 1 << 24)); keep[-1].write(b'x' * (1 << 24))""",
    "takes memory by memfd": """
import os
while True:
    fd = os.memfd_create('hostile')
    while os.write(fd, bytes(1 << 24)): pass""",
    "one huge text": "def solve(a, b): return 'x' * (1 << 40)",
    "recursion without end": """
import sys
sys.setrecursionlimit(10 ** 9)
def solve(a, b): return solve(a, b)""",
    "a parser's recursion": "def solve(a, b): return eval('(' * 100000 + ')' * 100000)",
    "a fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: raise SystemExit""",
    "a fork bomb by raw system calls": """
import ctypes
libc = ctypes.CDLL(None)
for number, first in ((57, 0), (58, 0), (56, 17), (435, 0)):
    assert libc.syscall(number, first, 0, 0, 0, 0) > 0""",
    "a thread bomb": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(999,)).start()
    except RuntimeError: time.sleep(0.01)""",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(999)
    os._exit(0)
def solve(a, b): return 0""",
    "a child that holds the pipe open": """
import os, time
if os.fork() == 0: time.sleep(999)
os._exit(0)""",
    "a program of its own": """
import subprocess, sys
def solve(a, b): return subprocess.check_output([sys.executable, '-c', 'print(1)']).decode()""",
    "becomes another program": """
import os, sys
os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])""",
    "multiprocessing": """
import multiprocessing
def solve(a, b):
    with multiprocessing.Pool(2) as pool: return pool.map(abs, [1])[0]""",
    "fills the disk": """
i = 0
while True:
    with open(f'hostile-{i}', 'wb') as file: file.write(bytes(1 << 20))
    i += 1""",
    "makes files without end": "i = 0\nwhile True: open(f'hostile-{i}', 'w').close(); i += 1",
    "makes directories without end": """
import os
while True: os.mkdir('hostile'); os.chdir('hostile')""",
    "opens files without end": "keep = []\nwhile True: keep.append(open('/dev/null'))",
    "one huge file": "import os\nfd = os.open('hostile', 66)\nos.ftruncate(fd, 1 << 40)",
    "writes everywhere": """
import os
for place in ('/dev/shm', '/var/tmp', '/root', '/', '/usr/lib', '/run', os.path.dirname('$FILE')):
    try: open(place + '/hostile-everywhere', 'w').write('x')
    except OSError: pass""",
    "truncates the file": "import os\nos.truncate('$FILE', 0)",
    "deletes the file": "import os\nos.unlink('$FILE')",
    "changes the file's mode": "import os\nos.chmod('$FILE', 0)",
    "changes Python's library": "import os\nopen(os.__file__, 'a').write('x')",
    "shared memory": """
from multiprocessing import shared_memory
shared_memory.SharedMemory('hostile', create=True, size=1 << 20)""",
    "System V shared memory": """
import ctypes
assert ctypes.CDLL(None).shmget(4242, 1 << 20, 0o1666) >= 0
def solve(a, b): return 'passed'""",
    # -- attacks who watches it
    "kills all": "import os\nos.kill(-1, 9)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills a process": "import os\nos.kill($PID, 9)",
    "kills process 1": "import os\nos.kill(1, 9)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "kills by a pidfd": """
import os, signal
signal.pidfd_send_signal(os.pidfd_open($PID), 9)""",
    "signals by a descriptor": """
import fcntl, os
fcntl.fcntl(0, fcntl.F_SETOWN, $PID)""",
    "chooses the signal of a descriptor": """
import fcntl, signal
fcntl.fcntl(0, 10, signal.SIGKILL)""",
    "sends from a pair of sockets": """
import socket
socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0$NAME')""",
    "stops itself": "import os\nos.kill(os.getpid(), 19)",
    "lifts its limits": """
import resource
for limit in range(16):
    try: resource.setrlimit(limit, (resource.RLIM_INFINITY,) * 2)
    except (OSError, ValueError): pass
keep = []
while True: keep.append(bytearray(1 << 24))""",
    "lifts the limits of a process": """
import resource
resource.prlimit($PID, resource.RLIMIT_NOFILE, (0, 0))""",
    "becomes root": """
import os
os.setresuid(0, 0, 0)
def solve(a, b): return open('$FILE').read()""",
    "a new user namespace": """
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000) == 0
def solve(a, b): return open('$FILE').read()""",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "aborts": "import os\nos.abort()",
}

PRINTING = {
    "prints nothing": "",
    "prints the input": "print(input())",
    "prints the words": "print('passed', 'ok', 'True', '1.0', sep='\\n')",
    "prints every number": "for i in range(10 ** 9): print(i)",
    "prints without end": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "one line without end": "import sys\nwhile True: sys.stdout.write('x' * 4096)",
    "prints bytes": "import os\nos.write(1, bytes(range(256)))",
    "prints surrogates": "print('\\ud800')",
    "prints NULs": "print('\\0' * 100)",
    "prints terminal codes": "print('\\x1b[2J' + '1')",
    "another locale": "import locale\nlocale.setlocale(locale.LC_ALL, '')\nprint(f'{1:n}')",
    "reads the input again": "import sys\nsys.stdin.seek(0)\nprint(sys.stdin.read() * 2)",
    "reads past the input": "import sys\ninput(); print(input())",
    "waits for more input": "import sys\nwhile True: sys.stdin.read()",
    "writes to the input": "import os\nos.write(0, b'x' * 99); print(open(0).read())",
    "closes its output": "import os, time\nos.close(1)\ntime.sleep(999)",
    "fails at the end": "print($ANSWER)\nraise SystemExit(1)",
    "raises at the end": "print($ANSWER)\nraise ValueError",
    "dies at the end": "import os\nprint($ANSWER, flush=True)\nos.abort()",
    "prints more than the answer": "print($ANSWER)\nprint('and more')",
    "prints the answer with a hidden NUL": "print('$ANSWER\\0')",
    "prints the answer in other digits": "print('$ANSWER'.replace('1', '\\u0661'))",
    "prints the answer with a hidden space": "print('$ANSWER\\u200b')",
    "prints the answer to stderr": "import sys\nprint($ANSWER, file=sys.stderr)",
    "prints the answer without end": "while True: print($ANSWER)",
    "does not end after the answer": "print($ANSWER, flush=True)\nwhile True: pass",
    "a thread does not end": """
import threading, time
print($ANSWER, flush=True)
threading.Thread(target=time.sleep, args=(999,)).start()""",
    "sleeps in atexit": """
import atexit, time
atexit.register(time.sleep, 999)
print($ANSWER, flush=True)""",
    "sleeps in a finaliser": """
import time
class Last:
    def __del__(self, sleep=time.sleep): sleep(999)
last = Last()
print($ANSWER, flush=True)""",
}


def filled(program: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        program = program.replace(name, value)
    return program
