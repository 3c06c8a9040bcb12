"""The other side of sandbox.py: a process that does nothing but fork the processes of the tests.

It has nothing but a socket, as its input. For each test it is sent three descriptors: the job (the
program and what to call), the input, and a pipe for the output. It reads none of them: the process
that it forks shuts itself in, and only then looks. So no test finds in its memory what another got.

A program is one process. It may have threads, but start no process, signal none and open no socket
(seccomp). It sees Python's library, /dev/null and an empty /tmp in memory, and nothing else
(namespaces, or Landlock, or both). Time, memory, files and threads are limited (rlimits). Each
layer is used where the kernel has it; sandbox.py finds out what holds.

This file imports only Python's own library, for it is run by its path. Read next: sandbox.py.
"""

import atexit
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import resource
import select
import signal
import site
import socket
import struct
import sys
import types
from contextlib import suppress

PRELOAD = """abc array bisect cmath collections collections.abc copy dataclasses datetime decimal
enum fractions functools heapq io itertools json math operator queue random re statistics string
sys threading time typing""".split()  # what programs import most is there when they start

libc = ctypes.CDLL(None, use_errno=True)


def system(name: str, *arguments) -> int:
    """A function of the C library; raises OSError where it fails."""
    values = [x.encode() if isinstance(x, str) else x for x in arguments]
    values = [ctypes.c_long(x) if isinstance(x, int) else x for x in values]
    result = getattr(libc, name)(*values)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


# ---- what is visible: namespaces ---------------------------------------------------------

NEW_USER, NEW_PIDS = 0x10000000, 0x20000000
NEW = 0x20000 | 0x4000000 | 0x8000000 | 0x40000000 | NEW_PIDS  # mounts, names, IPC, network too
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, NO_ATIME, NO_DIR_ATIME = 1, 2, 4, 8, 1024, 2048
REMOUNT, BIND, RECURSIVE, PRIVATE, REL_ATIME = 32, 4096, 16384, 1 << 18, 1 << 21
DETACH = 2
TMP = "size=16m,nr_inodes=1024,mode=1777"  # as large as /tmp may grow; it counts as memory
DEVICES = ("/dev/null", "/dev/urandom")


def readable() -> list[str]:
    """Python's library, the system's shared ones, and two devices: what a program may read."""
    libraries = [*sys.path, f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    paths = [*libraries, "/etc/ld.so.cache", *DEVICES]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def die_with_parent() -> None:
    system("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def enter_namespaces() -> None:
    """Leave the machine's network, files and processes. Raises OSError where that is not allowed:
    to root in most containers, to users on some systems."""
    ids = {"setgroups": "deny", "uid_map": f"{os.getuid()} {os.getuid()} 1",
           "gid_map": f"{os.getgid()} {os.getgid()} 1"}  # fmt: skip
    try:
        system("unshare", NEW)
    except OSError:  # not root: but everybody has root's rights in a namespace of users
        system("unshare", NEW | NEW_USER)
        for file, line in ids.items():
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(line)
    pid = os.fork()  # only a child is in the new namespace of processes: it goes on from here
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
    die_with_parent()


def enter_new_root(paths: list[str]) -> None:
    """A file system in memory with only these paths in it, which can only be read."""
    system("mount", None, "/", None, RECURSIVE | PRIVATE, None)
    root = "/proc"  # a directory that each Linux has, and that hides none of the paths
    system("mount", "root", root, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    fixed = REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES
    for path in paths:
        target = root + path
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target):
            open(target, "w").close()
        system("mount", path, target, None, BIND | RECURSIVE, None)
        if path not in DEVICES:
            flags = os.statvfs(target).f_flag  # a user may not take back what was forbidden
            flags = flags & (NO_EXEC | NO_ATIME | NO_DIR_ATIME) | (flags & 4096 and REL_ATIME)
            system("mount", None, target, None, fixed | flags, None)
    os.mkdir(f"{root}/tmp")
    os.chdir(root)
    system("syscall", PIVOT_ROOT, b".", b".")
    system("umount2", ".", DETACH)  # the old root, which now lies on the new one
    system("mount", None, "/", None, fixed, None)


def empty_tmp() -> None:
    """A /tmp in which nothing ever was."""
    os.chdir("/")
    with suppress(OSError):  # before the first test there is none
        system("umount2", "/tmp", DETACH)
    system("mount", "tmp", "/tmp", "tmpfs", NO_SUID | NO_DEVICES, TMP)
    os.chdir("/tmp")


# ---- what is allowed: Landlock and seccomp -----------------------------------------------

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR = 2, 4, 8
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many kinds of access each version knows; then 16


def lock_files(paths: list[str], writable: list[str], version: int) -> None:
    """From now on this process may read these paths, write in those, and open no others."""
    every = (1 << RIGHTS.get(version, 16)) - 1
    # From version 6 on it also keeps abstract sockets and signals in.
    handled = struct.pack("QQQ", every, 0, 3)[: 24 if version >= 6 else 8]
    rules = system("syscall", LANDLOCK_CREATE, handled, len(handled), 0)
    for path in [*paths, *writable]:
        rights = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        rights = every if path in writable else rights | (WRITE_FILE if path in DEVICES else 0)
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        system("syscall", LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    system("syscall", LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


# The system calls that a program does not get, with their numbers on x86-64 and on ARM: other
# processes, the network, memory shared under a name, the kernel's own affairs, and what Landlock
# leaves open: to watch files and, on those that are the user's own, to change their mode, owner,
# times, length. What only root may is not listed, for a program has none of root's rights.
FORBIDDEN = """
fork 57 -      vfork 58 -      execve 59 221   execveat 322 281   kill 62 129    tkill 200 130
tgkill 234 131   rt_sigqueueinfo 129 138   rt_tgsigqueueinfo 297 240   ptrace 101 117
process_vm_readv 310 270   process_vm_writev 311 271   prctl 157 167   setns 308 268
unshare 272 97   seccomp 317 277   setsid 112 157   setpgid 109 154   setpriority 141 140
ioprio_set 251 30   sched_setaffinity 203 122   sched_setscheduler 144 119   sched_setparam 142 118
sched_setattr 314 274   socket 41 198   bind 49 200   connect 42 203   listen 50 201
shmget 29 194   shmat 30 196   shmctl 31 195   semget 64 190   semctl 66 191   semop 65 193
semtimedop 220 192   msgget 68 186   msgsnd 69 189   msgrcv 70 188   msgctl 71 187
mq_open 240 180   mq_unlink 241 181   memfd_create 319 279   userfaultfd 323 282
add_key 248 217   request_key 249 218   keyctl 250 219   bpf 321 280   perf_event_open 298 241
io_setup 206 0   flock 73 32   chmod 90 -   fchmod 91 52   fchmodat 268 53   chown 92 -
lchown 94 -   fchown 93 55   fchownat 260 54   utime 132 -   utimes 235 -   futimesat 261 -
utimensat 280 88   setxattr 188 5   lsetxattr 189 6   fsetxattr 190 7   removexattr 197 14
lremovexattr 198 15   fremovexattr 199 16   truncate 76 45   inotify_init 253 -
inotify_init1 294 26   fanotify_init 300 262   sync 162 81   syncfs 306 267   syslog 103 116
setuid 105 146   setreuid 113 145   setresuid 117 147
"""
# Numbers, an argument, which of its bits, values, and whether only these or all others are allowed.
CONDITIONS = (
    ((56, 220), 0, 0x10000, (0x10000,), True),  # clone makes threads, no processes
    ((302, 261), 0, 0xFFFFFFFF, (0,), True),  # prlimit64 is for the program's own limits
    ((53, 199), 1, 0xF, (1,), True),  # socketpair: a stream can't be sent anywhere else
    # fcntl: whom to signal when a descriptor is ready, and leases
    ((72, 25), 1, 0xFFFFFFFF, (8, 10, 15, 1024, 1026), False),
    # ioctl is for what Python asks: is it a terminal, what waits there, block or not, inherit or
    # not. It could change the attributes of files, which Landlock leaves to their owner.
    ((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), True),
)
NEWER = 424  # from here on numbers are the same on all machines: new mounts, io_uring, pidfds, ...
ALLOWED_NEWER = (436, 439, 441)  # close_range, faccessat2, epoll_pwait2
MACHINES = {"x86_64": (0, 0xC000003E, 155), "aarch64": (1, 0xC00000B7, 41)}
COLUMN, ARCHITECTURE, PIVOT_ROOT = MACHINES.get(platform.machine(), (0, 0, 0))

LOAD, AND, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, REFUSE, UNKNOWN, KILL = 0x7FFF0000, 0x50000 + 1, 0x50000 + 38, 0x80000000


def seccomp_filter() -> bytes | None:
    """The rules as instructions (code, steps if true, steps if false, operand); None on a machine
    whose numbers are not known here."""
    if not ARCHITECTURE:
        return None
    lines = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, ARCHITECTURE), (RETURN, 0, 0, KILL)]
    lines += [(LOAD, 0, 0, 0)]
    for number in ALLOWED_NEWER:
        lines += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    # What is newer than this file does not exist: the C library then does without.
    lines += [(IF_AT_LEAST, 0, 1, NEWER), (RETURN, 0, 0, UNKNOWN)]
    for number in FORBIDDEN.split()[1 + COLUMN :: 3]:
        if number != "-":
            lines += [(IF_EQUAL, 0, 1, int(number)), (RETURN, 0, 0, REFUSE)]
    for numbers, argument, bits, values, allowed in CONDITIONS:
        then, otherwise = (ALLOW, REFUSE) if allowed else (REFUSE, ALLOW)
        lines += [(IF_EQUAL, 0, 3 + 2 * len(values), numbers[COLUMN])]
        lines += [(LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, bits)]
        for value in values:
            lines += [(IF_EQUAL, 0, 1, value), (RETURN, 0, 0, then)]
        lines += [(RETURN, 0, 0, otherwise)]
    lines += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


# ---- the server ----------------------------------------------------------------------------


class Jail:
    """The layers that this machine allows, and a way to fork a process into them."""

    def __init__(self, namespaces: bool):
        self.server, self.paths, self.namespaces = os.getpid(), readable(), namespaces
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where the machine's memory ends, the tests go first
        if namespaces:
            enter_namespaces()
            self.pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
            enter_new_root(self.paths)
            empty_tmp()
        self.landlock = max(0, libc.syscall(LANDLOCK_CREATE, None, 0, 1))  # its version
        self.filter = seccomp_filter()

    def fork(self) -> int:
        """As os.fork; the new process is the only one in its namespace of processes."""
        if not self.namespaces:
            os.chdir("/")
            return os.fork()
        empty_tmp()
        system("unshare", NEW_PIDS)
        pid = os.fork()
        if pid:
            system("setns", self.pids, NEW_PIDS)
        return pid

    def shut_in(self, seconds: float, memory: int) -> None:
        """Irrevocable: limits, Landlock, no rights, seccomp."""
        for limit, value in {
            resource.RLIMIT_CPU: math.ceil(seconds), resource.RLIMIT_AS: memory,
            resource.RLIMIT_FSIZE: 16 << 20, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0,
            resource.RLIMIT_STACK: min(memory, 64 << 20), resource.RLIMIT_MEMLOCK: 0,
        }.items():  # fmt: skip
            most = resource.getrlimit(limit)[1]  # of who started the run; -1: no limit
            value = value if most < 0 else min(value, most)
            # A program may raise its stack's, as many do that recurse: it is memory, so limited.
            resource.setrlimit(limit, (value, most if limit == resource.RLIMIT_STACK else value))
        system("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        if self.landlock:
            lock_files(self.paths, ["/tmp"] if self.namespaces else [], self.landlock)
        # Root becomes a user who owns nothing else, so that threads can be counted. Where Landlock
        # alone guards the files only in this count: the library may be readable to root only.
        root, stays = os.geteuid() == 0, self.landlock and not self.namespaces
        for user in (10**9 + self.server, 65534) if root else ():
            with suppress(OSError):
                if not stays:
                    os.setgroups([])
                    os.setresgid(user, user, user)
                os.setresuid(user, *[0 if stays else user] * 2)
                break
        if self.namespaces or root and os.getuid():
            resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
        system("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # no rights at all
        system("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody reads its memory
        die_with_parent()  # after the change of user, which would undo it
        if self.filter:
            place = ctypes.cast(self.filter, ctypes.c_void_p).value
            system("prctl", 22, 2, struct.pack("HP", len(self.filter) // 8, place), 0, 0)


def serve(jail: Jail, control: socket.socket) -> dict | None:
    """Fork a process for each request and say how it ended; None when the parent is gone. In the
    process of a test: returns the job."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, 4096, 3)
        if not message:
            return None
        if message == b"stop":  # what it was meant for had ended by itself
            continue
        limits = json.loads(message)
        pid = jail.fork()
        if pid == 0:
            control.detach()  # else its end would close what has the same number by then
            return begin(jail, *fds, **limits)
        for fd in fds:
            os.close(fd)
        ended = os.pidfd_open(pid)
        ready, _, _ = select.select([ended, control], [], [], limits["wall"])
        stopped = ended not in ready  # out of time, or the parent is no longer interested
        if stopped:
            os.kill(pid, signal.SIGKILL)
        os.close(ended)
        _, status, usage = os.wait4(pid, 0)
        if control in ready and not control.recv(16):
            return None
        times = dict(stopped=stopped, cpu=usage.ru_utime + usage.ru_stime)
        control.send(json.dumps(dict(status=status, **times)).encode())


def begin(jail: Jail, job: int, given: int, out: int, seconds: float, memory: int, wall: float):
    """In the new process: arrange its descriptors, shut it in, and read the job."""
    with open(job, "rb") as file:
        text = file.read()
    called = text[:1] == b"{"  # a call, otherwise a program that reads and prints
    null = os.open("/dev/null", os.O_RDWR)  # its own: flags are shared with whoever has the same
    os.dup2(given, 0)
    os.dup2(null if called else out, 1)
    os.dup2(null, 2)
    os.dup2(out, 3)
    os.closerange(4 if called else 3, 256)
    jail.shut_in(seconds, memory)
    return json.loads(text)


def run(job: dict | str) -> None:
    """Run the program as Python would run a file. For a call: as it would import one, and write the
    result to descriptor 3 as JSON; what else is written there is the program's own loss."""
    dumps, write, leave = json.JSONEncoder(allow_nan=False).encode, os.write, os._exit
    main = types.ModuleType("__main__" if isinstance(job, str) else "program")
    sys.modules["__main__"] = sys.modules[main.__name__] = main
    main.__file__ = "program.py"
    if isinstance(job, str):
        status = [1]
        atexit.register(finish, main, status)
        try:
            exec(compile(job, "program.py", "exec"), main.__dict__)
        except SystemExit as error:
            status[0] = int(error.code not in (None, 0))
            raise
        status[0] = 0
        return
    exec(compile(job["program"], "program.py", "exec"), main.__dict__)
    text = dumps(main.__dict__[job["call"]](*job["args"])).encode()
    while text:
        text = text[write(3, text) :]
    leave(0)


def finish(main: types.ModuleType, status: list[int]) -> None:
    """Python's last act, after the program's threads and its own last acts: write what is still
    unwritten and be gone. To take the interpreter apart would take longer than most tests."""
    sys.stdout.flush()
    main.__dict__.clear()  # files are flushed when they go
    sys.__stdout__.flush()
    os._exit(status[0])


def main(control: socket.socket, namespaces: bool) -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    try:
        jail = Jail(namespaces)
    except OSError as error:
        control.send(json.dumps(dict(refused=str(error))).encode())
        return
    layers = dict(namespaces=namespaces, landlock=jail.landlock, seccomp=bool(jail.filter))
    control.send(json.dumps(layers).encode())
    site.setquit()  # exit() and quit(); the rest of site would look for packages
    gc.freeze()  # the processes share these pages as long as nobody counts references in them
    job = serve(jail, control)
    if job is not None:
        os.environ.clear()
        sys.argv[:] = ["program.py"]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            stream = open(number, "w" if number else "r", encoding="utf-8")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        run(job)  # and then Python ends as usual: threads, what the program has registered, finish


if __name__ == "__main__":
    main(socket.socket(fileno=0), sys.argv[1] == "namespaces")
