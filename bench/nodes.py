"""Two hosts under torchrun, and what happens to a training when one of them, or the link, fails.

    python -m bench.nodes                              all faults, some 15 minutes on two cores
    python -m bench.nodes --faults worker,link

The hosts are network namespaces of this machine, each with its own process numbers and host name,
joined by a veth pair; they see one directory, as the nodes of a cluster do. On each of them a loop
keeps torchrun alive, with two ranks of train_zero.py. Needs Linux, root and iproute2.

Each fault strikes in the midst of RL. How long until an update is logged that had not been logged
before, and is the run, at its end, the undisturbed one? What must hold: less than --limit seconds,
the same sampled tokens, the last loss to within 1e-9 (in float64; a sum over two ranks is rounded
otherwise than one over four), and each update logged once. Exit code 1 where it does not.
"""

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.peers import machine, markdown
from runtime.flags import UserError, flag, parse

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/nodes"
PREFIX = "nanor1"  # of the namespaces: nanor1-PID-a
# torchrun's rendezvous is on a; rank 0 is where the address is lower: on b, which will be lost.
ADDRESSES = {"a": "10.213.7.2", "b": "10.213.7.1"}
PORT = 29511  # nobody else is in the namespace
PATIENCE = 180.0  # seconds without a new update, after which a fault counts as fatal
BOUND = 1e-9  # of the last loss and the weights, against the undisturbed run
SAME = ("tokens_trained", "tokens", "reward", "reflection", "by_level")  # what the tokens decide
# Small enough for short updates. Any other output earns another coin: the losses would show it.
TRAIN = ["--reward", "random", "--dtype", "float64", "--threads", "1", "--questions", "4",
         "--group-size", "4", "--max-new-tokens", "8", "--eval-problems", "1",
         "--eval-samples", "1"]  # fmt: skip
BASE = ["--pretrain-steps", "60", "--force", "--steps", "1", "--questions", "2", "--group-size",
        "2", "--minibatches", "1", "--max-new-tokens", "24", "--eval-problems", "1",
        "--eval-samples", "1", "--threads", "1"]  # fmt: skip


@dataclass(frozen=True)
class Config:
    faults: tuple[str, ...] = flag((), "which of worker, node, link, host; none: all of them")
    updates: int = flag(160, "updates of RL; a fault comes after 10")
    save_every: int = flag(4, "updates that a kill may lose (train_zero.py's flag)")
    timeout: float = flag(15.0, "seconds that a rank waits for the others (train_zero.py's flag)")
    limit: float = flag(60.0, "seconds until training goes on that are too many")
    out: str = flag("runs/nodes", "directory of the runs; those of an earlier time are deleted")
    name: str = flag("faults", "the result is bench/results/nodes/NAME.json")

    def __post_init__(self):
        unknown = [name for name in self.faults if name not in FAULTS]
        if unknown:
            raise UserError(f"--faults {unknown[0]}: not one of {', '.join(FAULTS)}")
        if self.updates < 100:
            raise UserError(
                f"--updates {self.updates}: at least 100, or a run ends before its fault"
            )


# ---- hosts ---------------------------------------------------------------------------------------


def command(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """Why this machine can't play two hosts; None where it can."""
    if sys.platform != "linux":
        return f"needs Linux's network namespaces; this is {sys.platform}"
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"needs {missing[0]}, of {'iproute2' if missing[0] == 'ip' else 'util-linux'}"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        command("ip", "netns", "add", probe)
        command("ip", "-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        command("ip", "netns", "exec", probe, "unshare", "--uts", "--pid", "--fork", "true")
    except OSError as error:
        return f"can't make network namespaces here ({error})"
    finally:
        command("ip", "netns", "del", probe, check=False)
    return None


def delete_left_over() -> None:
    """The namespaces of benches that were killed; their processes ended with them."""
    for line in command("ip", "netns", "list").splitlines():
        prefix, pid, *_ = [*line.split()[0].split("-"), ""]
        if prefix == PREFIX and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            command("ip", "netns", "del", line.split()[0], check=False)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Host:
    """A network namespace, and in it a process namespace while it is on."""

    def __init__(self, letter: str):
        self.letter, self.process = letter, None
        self.name = f"{PREFIX}-{os.getpid()}-{letter}"
        command("ip", "netns", "add", self.name)

    def ip(self, *arguments: str) -> None:
        command("ip", "-n", self.name, *arguments)

    def switch_on(self, script: str, log: Path) -> None:
        # Without the second line a connection that was cut counts as alive for up to 15 minutes.
        shell = (
            f"echo node-{self.letter} > /proc/sys/kernel/hostname;"
            f" echo 5 > /proc/sys/net/ipv4/tcp_retries2; {script}"
        )
        space = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0",
                       "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
        with log.open("a") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *space, "bash", "-c", shell], cwd=ROOT,
                env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def switch_off(self) -> None:
        """All its processes end at once, as by kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def delete(self) -> None:
        self.switch_off()
        deadline = time.monotonic() + 5
        while command("ip", "netns", "pids", self.name, check=False):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        command("ip", "netns", "del", self.name, check=False)  # and its end of the veth pair


@contextmanager
def two_hosts() -> Iterator[dict[str, Host]]:
    hosts: dict[str, Host] = {}
    try:
        for letter in ADDRESSES:
            hosts[letter] = Host(letter)
        peer = ["peer", "name", "eth0", "netns", hosts["b"].name]
        hosts["a"].ip("link", "add", "eth0", "type", "veth", *peer)
        for letter, host in hosts.items():
            host.ip("addr", "add", f"{ADDRESSES[letter]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                host.ip("link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts.values():
            host.delete()


# ---- a run ---------------------------------------------------------------------------------------


class Failed(Exception):
    """Training did not go on, or did not end."""


@dataclass
class Event:
    """Something that befalls a run, and how training went on."""

    what: str
    before: int  # ranks
    after: int
    seconds: float


@dataclass
class Training:
    """A run of train_zero.py on two hosts, from without."""

    hosts: dict[str, Host]
    out: Path
    flags: list[str]
    events: list[Event] = field(default_factory=list)
    failure: str = ""

    def start(self, letter: str) -> None:
        """torchrun in a loop: it ends where the rendezvous is lost, and is started again."""
        settings = dict(is_host=int(letter == "a"), last_call_timeout=5, keep_alive_interval=2,
                        keep_alive_max_attempt=3, read_timeout=10)  # fmt: skip
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2",
                    "--nproc-per-node=2", "--max-restarts=10", "--rdzv-backend=c10d",
                    f"--rdzv-id={self.run_id}", f"--rdzv-endpoint={ADDRESSES['a']}:{PORT}",
                    f"--local-addr={ADDRESSES[letter]}",
                    "--rdzv-conf=" + ",".join(f"{k}={v}" for k, v in settings.items())]  # fmt: skip
        program = ["train_zero.py", *self.flags, "--out", str(self.out), "--resume"]
        script = f"until {shlex.join([*torchrun, *program])}; do sleep 2; done"
        self.hosts[letter].switch_on(script, self.out / f"node-{letter}.log")

    @property
    def run_id(self) -> str:
        return f"{PREFIX}-{os.getpid()}-{self.out.name}"

    def steps(self) -> list[int]:
        return [line["step"] for line in rl_lines(self.out)]

    def workers(self) -> dict[int, dict[str, str]]:
        """The environment of each living rank, by process number, the oldest first."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                text = (place / "environ").read_bytes().decode(errors="replace")
                variables = dict(v.split("=", 1) for v in text.split("\0") if "=" in v)
                if variables.get("TORCHELASTIC_RUN_ID") == self.run_id:
                    stat = (place / "stat").read_text().rpartition(")")[2].split()
                    found[int(place.name)] = int(stat[19]), int(stat[1]), variables
        # A rank's own children have its environment.
        return {
            pid: variables
            for pid, (_, parent, variables) in sorted(found.items(), key=lambda item: item[1][0])
            if parent not in found
        }

    def leader(self) -> tuple[int, int]:
        """The process of the newest rank 0, and how many ranks it has about it; 0, 0: none."""
        newest = (0, 0)
        for pid, variables in self.workers().items():
            if variables["RANK"] == "0":
                newest = pid, int(variables["WORLD_SIZE"])
        return newest

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Raises Failed where it does not come and, for long, no other update comes either."""
        deadline, done = time.monotonic() + PATIENCE, 0
        while not until():
            if (now := max(self.steps(), default=0)) > done:
                deadline, done = time.monotonic() + PATIENCE, now
            if time.monotonic() > deadline:
                raise Failed(f"{self.out.name}: {what}: not within {PATIENCE:.0f} s")
            time.sleep(0.05)

    def wait_for_updates(self, count: int) -> None:
        goal = max(self.steps(), default=0) + count
        self.wait(lambda: max(self.steps(), default=0) >= goal, f"update {goal}")

    def strike(self, what: str, action: Callable[[], None], ranks: int) -> None:
        """Do it, and wait until so many ranks, newly started, have logged an update that had not
        been logged before."""
        old, before = self.leader()
        start, top = time.monotonic(), max(self.steps(), default=0)
        action()

        def goes_on() -> bool:
            nonlocal top
            leader, size = self.leader()
            done = max(self.steps(), default=0)
            if leader in (0, old) or size != ranks:
                top = max(top, done)  # logged before, or on the way there
                return False
            return done > top

        self.wait(goes_on, f"{what}: no update on {ranks} ranks")
        self.events.append(Event(what, before, ranks, round(time.monotonic() - start, 1)))
        print(f"{what}: {before} -> {ranks} ranks, {self.events[-1].seconds} s", flush=True)

    def finish(self) -> None:
        """Wait until torchrun has ended well on both hosts, and so its loop."""
        processes = [host.process for host in self.hosts.values()]
        self.wait(lambda: all(p.poll() is not None for p in processes), "the end")
        if any(p.returncode for p in processes) or not (self.out / "result.json").exists():
            raise Failed(f"{self.out.name}: ended without a result")


def rl_lines(out: Path) -> list[dict]:
    """The lines of RL; the last one may be half written."""
    metrics = out / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    lines = [json.loads(row) for row in text.split("\n")[:-1]]
    return [line for line in lines if line["phase"] == "rl"]


# ---- faults --------------------------------------------------------------------------------------


def worker_killed(run: Training) -> None:
    victim = list(run.workers())[-1]
    run.strike("a worker killed (kill -9)", lambda: os.kill(victim, signal.SIGKILL), 4)


def node_lost(run: Training) -> None:
    run.strike("a node off (its torchrun and workers killed)", run.hosts["b"].switch_off, 2)
    run.wait_for_updates(4)
    run.strike("the node back", lambda: run.start("b"), 4)


def link_cut(run: Training) -> None:
    far_end = run.hosts["b"]
    run.strike("link cut", lambda: far_end.ip("link", "set", "eth0", "down"), 2)
    run.wait_for_updates(4)
    run.strike("link restored", lambda: far_end.ip("link", "set", "eth0", "up"), 4)


def rendezvous_lost(run: Training) -> None:
    def kill_all_but_the_loop() -> None:
        for pid in command("ip", "netns", "pids", run.hosts["a"].name).split():
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0] == sys.executable:
                    os.kill(int(pid), signal.SIGKILL)

    run.strike("the rendezvous host's torchrun and workers killed", kill_all_but_the_loop, 4)


FAULTS = {"worker": worker_killed, "node": node_lost, "link": link_cut, "host": rendezvous_lost}


# ---- what came out -------------------------------------------------------------------------------


def train(fault: str, base: Path, config: Config) -> Training:
    """A run from the base to its end, with the fault after 10 updates."""
    out = Path(config.out).absolute() / fault
    flags = [*TRAIN, "--model", str(base), "--steps", str(config.updates), "--save-every",
             str(config.save_every), "--timeout", str(config.timeout)]  # fmt: skip
    with two_hosts() as hosts:
        run = Training(hosts, out, flags)
        print(f"{fault}: {out}", flush=True)
        try:
            for letter in hosts:
                run.start(letter)
            run.wait(lambda: run.leader()[1] == 4 and run.steps() != [], "the first update")
            run.wait_for_updates(10)
            FAULTS.get(fault, lambda run: None)(run)
            run.finish()
        except Failed as error:
            run.failure = str(error)
            print(error, file=sys.stderr)
    return run


def make_base(out: Path) -> Path:
    """A toy's base, pretrained for a moment on one process: it need not be good."""
    arguments = [sys.executable, "train_zero.py", *BASE, "--out", str(out)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the base could not be trained: {done.stderr.strip()[-500:]}")
    return out / "base"


def differences(run: Path, reference: Path) -> dict:
    """How a run's updates and final weights differ from the undisturbed one's."""
    from safetensors.torch import load_file

    ours, theirs = rl_lines(run), rl_lines(reference)
    pairs = list(zip(ours, theirs))
    weights = [load_file(path / "model/model.safetensors") for path in (run, reference)]
    apart = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[1]]
    return dict(
        each_update_once=[line["step"] for line in ours] == [line["step"] for line in theirs],
        same_tokens=all(a.get(key) == b.get(key) for a, b in pairs for key in SAME),
        last_loss=abs(ours[-1]["loss"] - theirs[-1]["loss"]),
        any_loss=max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        weights=max(apart),
    )


def problems(run: Training, found: dict, limit: float) -> list[str]:
    """What of a run does not meet the criteria."""
    name = run.out.name
    if run.failure:
        return [run.failure]
    bad = [f"{name}: {e.what}: {e.seconds} s" for e in run.events if e.seconds >= limit]
    for key in ("each_update_once", "same_tokens"):
        if not found[key]:
            bad.append(f"{name}: not so: {key.replace('_', ' ')}")
    for key in ("last_loss", "weights"):
        if not found[key] <= BOUND:
            bad.append(f"{name}: {key.replace('_', ' ')} differ by {found[key]:.1e}")
    return bad


def rows(run: Training, found: dict) -> list[dict]:
    """A row of the table for each event; how the run ended stands on the last."""
    events = run.events or [Event("none", 4, 4, 0.0)]
    table = []
    for number, event in enumerate(events):
        row = {"what happens": event.what, "ranks": f"{event.before} → {event.after}",
               "training goes on after, s": f"{event.seconds:.1f}" if run.events else "",
               "last loss differs by": "", "weights by": "", "same tokens": ""}  # fmt: skip
        if number == len(events) - 1 and found:
            row |= {"last loss differs by": f"{found['last_loss']:.1e}",
                    "weights by": f"{found['weights']:.1e}",
                    "same tokens": "yes" if found["same_tokens"] else "**no**"}  # fmt: skip
        table.append(row)
    return table


def main(config: Config) -> int:
    if reason := why_not():
        print(f"python -m bench.nodes can't run: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    delete_left_over()
    out = Path(config.out).absolute()
    shutil.rmtree(out, ignore_errors=True)
    base = make_base(out / "base")
    table, bad, details = [], [], {}
    for fault in ("none", *(config.faults or FAULTS)):
        (out / fault).mkdir()
        run = train(fault, base, config)
        found = {} if run.failure else differences(run.out, out / "none")
        table += rows(run, found)
        bad += problems(run, found, config.limit)
        details[fault] = dict(events=[vars(event) for event in run.events], **found)
        about = keep(config, table, bad, details)
        if run.failure and fault == "none":
            break
    print("\n" + markdown(table) + "\n\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    for line in bad:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if bad else 0


def keep(config: Config, table: list[dict], bad: list[str], details: dict) -> dict:
    """Write the result, with what the machine is, which is returned."""
    about = machine("cpu", ())
    cpu = about["hardware"].split(" x ")[-1]
    about["hardware"] = f"{os.cpu_count()} cores of {cpu}; 2 hosts of 2 ranks, one thread each"
    about["load"] = f"{os.getloadavg()[0]:.1f}"  # the seconds are mostly of starting Python
    shown = " ".join(["python -m bench.nodes", *sys.argv[1:]])
    content = dict(machine=about, command=shown, config=vars(config), table=table, failed=bad,
                   runs=details)  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{config.name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return about


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        sys.exit(main(parse(Config, {})))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
