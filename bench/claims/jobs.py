"""The runs that claims are made of: commands that leave result.json in a directory of their own.

What is there is not run again, and what was stopped goes on where it was, by the same command.
made.json beside a result says where it was made: commit, machine, versions, date, seconds (where it
was stopped and went on: of its last part).
"""

import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from runtime.flags import UserError
from runtime.run import end_with_parent

MADE = ("commit", "machine", "versions", "date", "seconds")
EVALUATION = ("--eval-samples", "8")  # of an arm; the default run has 16
# A smoke test's: it proves that the code runs, and measures nothing.
SHORT = {
    "train_zero.py": "--steps 4 --questions 16 --eval-problems 18 --eval-samples 4",
    "ppo": "--steps 4 --questions 16 --eval-problems 18 --eval-samples 4",
    "kl_reward": "--steps 4 --questions 16 --eval-problems 18 --eval-samples 4",
    "hacking": "--steps 4 --questions 8 --eval-problems 18 --eval-samples 4 --pairs 64",
    "sampling": "--eval-problems 18 --samples 8",
    "checkpoints": "--first 2 --last 12 --every 2 --questions 8 --eval-problems 18"
    " --eval-samples 4",
    "sizes": "--steps 4 --questions 8 --eval-problems 18 --eval-samples 4 --pretrain-steps 20",
}


@dataclass(frozen=True)
class Job:
    """One run. Without a command it is another bench's, and only read."""

    name: str
    out: Path
    command: tuple[str, ...] = ()  # what follows `python`
    seconds: float = 0.0  # on a core to itself, about
    needs: tuple["Job", ...] = ()
    bench: str = ""  # the command that makes it, where it is only read

    @property
    def done(self) -> bool:
        return (self.out / "result.json").exists()

    def made_by(self) -> str:
        """The command, for the row."""
        if self.command:
            return " ".join(["python", *(part for part in self.command if part != "--resume")])
        return f"{self.bench}; read from {self.out}"

    def made_where(self) -> dict:
        """Of made.json; "not recorded" where there is none."""
        file = self.out / "made.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        return {key: known.get(key, "not recorded") for key in MADE}


@dataclass(frozen=True)
class Lab:
    """Where runs and results go, and which seeds there are. base: a smoke test's, of all seeds."""

    runs: Path = Path("runs")
    results: Path = Path("bench/results/claims")
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Path | None = None

    def zero(self, seed: int) -> Job:
        """The default run, whose base/ is where all other runs of its seed start."""
        given = ("--model", str(self.base)) if self.base else ()
        return self._job(f"zero-{seed}", seed, ("train_zero.py",), given, 310, ())

    def bases(self, seed: int) -> Path:
        return self.base or self.zero(seed).out / "base"

    def arm(self, name: str, seed: int, *flags: str, seconds: float = 180) -> Job:
        """The default run's RL from the same base, but for the flags."""
        flags = ("--model", str(self.bases(seed)), *EVALUATION, *flags)
        return self._job(f"claims/{name}-{seed}", seed, ("train_zero.py",), flags, seconds)

    def program(
        self, program: str, name: str, seed: int, *flags: str, seconds: float,
        models: Mapping[str, Path] | None = None,
    ) -> Job:  # fmt: skip
        """A run of one of this package's own programs. models: the flags that name a directory,
        where it isn't --model with the seed's base."""
        models = {"model": self.bases(seed)} if models is None else models
        given = [part for key, path in models.items() for part in (f"--{key}", str(path))]
        command = ("-m", f"bench.claims.{program}")
        return self._job(f"claims/{name}-{seed}", seed, command, (*given, *flags), seconds)

    def _job(
        self, name: str, seed: int, command: tuple[str, ...], flags: tuple[str, ...],
        seconds: float, needs: tuple[Job, ...] | None = None,
    ) -> Job:  # fmt: skip
        program, out = command[-1].rpartition("claims.")[2], self.runs / name
        flags = ("--seed", str(seed), "--threads", "1", "--out", str(out), *flags)
        if program == "train_zero.py":
            flags += ("--resume",)  # this package's programs do so unasked
        if self.base:
            flags += tuple(SHORT[program].split())
        needs = (self.zero(seed),) if needs is None else needs
        return Job(name, out, command + flags, seconds, needs)

    def made(self, name: str, kept: str, bench: str) -> Job:
        """A run of another bench: in runs/, or, where that has none, its committed result."""
        here = self.runs / name
        there = Path("bench/results") / kept
        return Job(name, here if (here / "result.json").exists() else there, bench=bench)


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Each once, behind those that it needs."""
    found: dict[Path, Job] = {}
    for job in jobs:
        for each in (*in_order(job.needs), job):
            found.setdefault(each.out, each)
    return list(found.values())


def missing(jobs: Sequence[Job]) -> list[Job]:
    """What is still to run. Raises UserError where another bench has to run first."""
    todo = [job for job in in_order(jobs) if not job.done]
    if unmade := [job for job in todo if not job.command]:
        names = ", ".join(job.name for job in unmade)
        raise UserError(f"no result of {names}, which are another bench's: {unmade[0].bench}")
    return todo


def minutes(jobs: Sequence[Job], at_once: int) -> float:
    """About how long they take, with a core for each of `at_once`."""
    total = sum(job.seconds for job in jobs)
    longest = max((job.seconds for job in jobs), default=0.0)
    return max(total / at_once, longest) / 60


def here() -> dict:
    """Commit (+: with changes), machine and versions of what is run now."""
    import torch

    def git(*arguments: str) -> str:
        try:
            command = ["git", *arguments]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    changed = git("status", "--porcelain", "-uno")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        cpu = names[0] if names else cpu
    return dict(
        commit=(git("log", "-1", "--format=%h") or "not recorded") + "+" * bool(changed),
        machine=f"{cpu}, one thread a run",
        versions=f"torch {torch.__version__}, Python {platform.python_version()}",
        date=date.today().isoformat(),
    )


def start(job: Job) -> subprocess.Popen:
    """In a session of its own, so that Ctrl-C reaches it once, through us."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with log_of(job).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *job.command], stdout=log, stderr=log, start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


def log_of(job: Job) -> Path:
    return job.out.with_name(f"{job.out.name}.log")


def run_all(
    jobs: Sequence[Job], at_once: int, start: Callable[[Job], subprocess.Popen] = start,
    poll: float = 0.2, tell: float = 30.0,
) -> list[str]:  # fmt: skip
    """Run what is missing; the names of those that failed. What needs one of these is left out.

    On Ctrl-C or SIGTERM the runs are told to save and end, and KeyboardInterrupt goes on.
    """
    waiting, running, failed = missing(jobs), {}, []
    total, told = len(waiting), time.monotonic()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            ready = [job for job in waiting if all(each.done for each in job.needs)]
            if not ready and not running:  # what they need has failed
                break
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                print(f"[{total - len(waiting)}/{total}] {job.name}: {job.made_by()}", flush=True)
                running[job.name] = job, start(job), time.monotonic(), here()
            time.sleep(poll)
            for name, (job, child, since, about) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[name]
                seconds = time.monotonic() - since
                if not ended_well(job, child.returncode, seconds):
                    failed.append(name)
                    continue
                made = {**about, "seconds": round(seconds)}
                (job.out / "made.json").write_text(json.dumps(made) + "\n")
            if time.monotonic() - told > tell:
                told = time.monotonic()
                print("  ".join(where(job) for job, *_ in running.values()), flush=True)
    finally:
        stop([child for _, child, *_ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failed + [job.name for job in waiting]


def ended_well(job: Job, code: int, seconds: float) -> bool:
    if code == 0 and job.done:
        print(f"{job.name}: {seconds:.0f} s", flush=True)
        return True
    lines = log_of(job).read_text(errors="replace").splitlines() if log_of(job).exists() else []
    last = "\n    ".join(lines[-6:])
    print(f"{job.name} FAILED with exit code {code} ({log_of(job)}):\n    {last}", flush=True)
    return False


def where(job: Job) -> str:
    """How far a run is."""
    file = job.out / "metrics.jsonl"
    rows = file.read_text().split("\n")[:-1] if file.exists() else []
    line = json.loads(rows[-1]) if rows else dict(phase="starting", step=0)
    return f"{job.name}: {line['phase']} {line['step']}"


def stop(children: Sequence[subprocess.Popen], patience: float = 60.0) -> None:
    """Ask them to save and end, and wait; kill what does not come to an end."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
