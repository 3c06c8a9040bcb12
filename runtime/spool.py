"""Asynchronous rollouts: outputs are drawn by other programs while the trainer makes its updates.

A directory is all that trainer and rollout workers share, so that workers may be on any machine
that sees it, and may come, stall and die. In a run's spool/:

    notice.json                     of the trainer: the generation, the plan, updates done, the end
    000002/                         a generation: one start of the trainer
        weights/step_000040/        the policy after so many updates; the newest two
        claims/000042-003           of a worker: it draws this part
        parts/000042-003.pt         what it drew: under another name first, then by rename
        workers/NAME                of a worker: touched every few seconds while it lives

A worker reads the newest weights, claims the first part that nobody has, draws its outputs, commits
them, and so on. A claim is a lease: a worker touches its own now and then, and one that has not
been touched for a while goes to who asks next. Where two draw the same part, the later commit
replaces the earlier one, or comes too late.

Files are named by the updates done when a rollout is first learned from: 000042-003 is part 3 of
the one for update 43. Who has the weights after v updates may draw the rollouts v, v + minibatches,
..., v + ahead x minibatches, and then waits for newer weights: so staleness is bounded. It is how
many updates lie between the weights that drew an output and the first that learns from it. The loss
needs no correction for it: pi_old in GRPO's ratio is whoever drew the tokens, with the log-probs
stored when they were drawn.

It is no part of the method. Read next: ../bench/asynchronous.py (what it gains and costs).
"""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer
from model import Transformer
from runtime import parallel
from runtime.checkpoint import step_path
from runtime.flags import UserError
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.run import Run, end_with_parent, write_file
from sample import Output

LEASE = 20.0  # seconds without a touch after which a worker counts as lost
BEAT = LEASE / 5
POLL = 0.05


@dataclass(frozen=True)
class Plan:
    """What trainer and workers have to agree on."""

    directory: Path  # the run's
    steps: int
    minibatches: int  # updates that follow a rollout
    ahead: int  # rollouts that may be drawn beyond the one that the newest weights are for
    questions: int  # of a rollout
    part: int  # of these, how many a worker claims at a time

    @property
    def spool(self) -> Path:
        return self.directory / "spool"

    @property
    def parts(self) -> int:
        return -(-self.questions // self.part)

    def numbers(self, part: int) -> range:
        """The questions of a part."""
        return range(part * self.part, min((part + 1) * self.part, self.questions))

    def names(self, step: int) -> Iterator[tuple[int, int, str]]:
        """The parts that may be drawn with the weights of this step: (update, part, file)."""
        last = min(step + self.ahead * self.minibatches, self.steps - 1)
        for done in range(step, last + 1, self.minibatches):
            for part in range(self.parts):
                yield done, part, part_name(done, part)


def part_name(done: int, part: int) -> str:
    return f"{done:06}-{part:03}"


def read_notice(plan: Plan) -> dict | None:
    try:
        return json.loads((plan.spool / "notice.json").read_text())
    except FileNotFoundError:
        return None


# ---- the trainer ---------------------------------------------------------------------------------


class Spool:
    """The trainer's side, for a `with`; all of its processes call `take` together. Set `over` where
    the run has come to its end."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, commands: Sequence[Sequence[str]]):
        """commands: of the workers that are started beside this process."""
        self.plan, self.tokenizer, self.commands = plan, tokenizer, commands
        self.children: list[subprocess.Popen] = []
        self.reported: set[int] = set()  # pids of those that have ended
        self.started = self.told = self.over = False
        self.ended = threading.Event()
        self.metrics: dict[str, float] = {}  # of the last rollout
        number = 1
        if parallel.is_main():
            plan.spool.mkdir(parents=True, exist_ok=True)
            old = [path for path in plan.spool.iterdir() if path.name.isdigit()]
            before = read_notice(plan) or {}
            number = 1 + max([int(before.get("generation", 0)), *(int(path.name) for path in old)])
            (plan.spool / "notice.json").unlink(missing_ok=True)  # it may say that the run is over
            for name in ("claims", "parts", "workers"):
                (plan.spool / f"{number:06}" / name).mkdir(parents=True)
            for path in old:
                shutil.rmtree(path, ignore_errors=True)  # where a worker may be writing still
        self.generation = f"{parallel.all_sum(number if parallel.is_main() else 0):06}"
        self.place = plan.spool / self.generation

    def take(
        self, policy: Transformer, done: int, run: Run
    ) -> dict[int, tuple[list[Output], list[str]]] | None:
        """The outputs and texts of this process's questions, by number, of the rollout that update
        done + 1 learns from; None where Ctrl-C stopped the waiting. Raises UserError where no
        worker is left."""
        self.publish(policy, done)
        found, stale, names = {}, [], set()
        # Each rank reads all parts and takes its questions, as `parallel.shard` would deal them.
        rank, world, missing = parallel.rank(), parallel.world_size(), list(range(self.plan.parts))
        while True:
            for part in list(missing):
                if (content := self._read(done, part)) is not None:
                    missing.remove(part)
                    groups = {n: g for n, g in content["groups"].items() if n % world == rank}
                    found |= {n: unpack(group) for n, group in groups.items()}
                    outputs = sum(len(group["texts"]) for group in groups.values())
                    stale += [done - content["version"]] * outputs
                    names.add(content["worker"])
            if not parallel.all_sum(len(missing)):
                break
            if run.stopping:
                return None
            self._watch()
            time.sleep(POLL)
        everyone = parallel.gather_numbered({parallel.rank(): (stale, names)}).values()
        stale = [each for stales, _ in everyone for each in stales]
        self.metrics = dict(
            staleness=sum(stale) / max(1, len(stale)), staleness_max=max(stale, default=0),
            workers=len(set().union(*(names for _, names in everyone))),
        )  # fmt: skip
        return found

    def publish(self, policy: Transformer, done: int) -> None:
        """Let the workers have the weights after `done` updates; forget what is behind them."""
        weights = step_path(self.place / "weights", done)
        save_pretrained(policy, weights, tokenizer_files=self.tokenizer.files())
        if not parallel.is_main():
            return
        self._notify(done)
        for old in sorted(weights.parent.glob("step_*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)
        for kind in ("claims", "parts"):
            for file in (self.place / kind).iterdir():
                number = file.name.lstrip(".")[:6]  # a file system may have put others there
                if number.isdigit() and int(number) < done:
                    file.unlink(missing_ok=True)
        if not self.started:
            self._start()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *error) -> None:
        """End the workers that were started here and, where the run is over, all others too."""
        self.ended.set()
        if not parallel.is_main():
            return
        if self.over:
            self._notify(self.plan.steps, over=True)
        for child in self.children:
            child.kill()  # it has nothing to save, and one that is stopped heeds no other signal
        for child in self.children:
            child.wait()
        if self.over:
            shutil.rmtree(self.place, ignore_errors=True)

    def _notify(self, done: int, over: bool = False) -> None:
        plan = {name: getattr(self.plan, name) for name in ("steps", "ahead", "part")}
        notice = dict(generation=self.generation, step=done, over=over, plan=plan)
        write_file(self.plan.spool / "notice.json", json.dumps(notice).encode())

    def _start(self) -> None:
        self.started = True
        threading.Thread(target=self._beat, daemon=True).start()
        # Not of this process's group, where torchrun started this one.
        ours = ("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE")
        environment = {key: v for key, v in os.environ.items() if not key.startswith(ours)}
        begin = end_with_parent if sys.platform == "linux" else None
        for command in self.commands:
            self.children.append(subprocess.Popen(command, env=environment, preexec_fn=begin))

    def _beat(self) -> None:
        """Tell the workers that the trainer lives: it touches its notice."""
        while not self.ended.wait(BEAT):
            touch(self.plan.spool / "notice.json")

    def _read(self, done: int, part: int) -> dict | None:
        file = self.place / "parts" / f"{part_name(done, part)}.pt"
        if not file.exists():
            return None
        try:
            return torch.load(file)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{file} can't be read; --resume draws it again") from error

    def _watch(self) -> None:
        """Say once of each worker that it has ended; raise where none is left."""
        if not parallel.is_main():
            return
        for number, child in enumerate(self.children):
            if child.poll() is not None and child.pid not in self.reported:
                self.reported.add(child.pid)
                print(
                    f"rollout worker {number} (pid {child.pid}) ended with code {child.returncode};"
                    " the others take over its questions",
                    file=sys.stderr,
                )  # fmt: skip
        if any(child.poll() is None for child in self.children):
            return
        now = clock(self.place / "workers" / ".trainer")
        beats = [file.stat().st_mtime for file in (self.place / "workers").glob("[!.]*")]
        if max(beats, default=0) > now - LEASE:
            return
        how = f"python train_zero.py --join {self.plan.directory}"
        if self.children:
            raise UserError(f"no rollout worker is left; go on with --resume, or first start {how}")
        if not self.told:
            self.told = True
            print(f"waiting for rollout workers; start some: {how}", file=sys.stderr)


def touch(file: Path) -> None:
    try:
        os.utime(file)
    except OSError:  # it is gone; or the file system has a bad moment
        pass


def clock(file: Path) -> float:
    """The time by the clock of the file system, which all machines share."""
    file.touch()
    return file.stat().st_mtime


def pack(outputs: Sequence[Output], texts: Sequence[str]) -> dict[str, list]:
    """A group of outputs as what torch.load reads without running anything."""
    return dict(
        tokens=[output.tokens for output in outputs], texts=list(texts),
        logprobs=[output.logprobs for output in outputs],
        finish=[output.finish for output in outputs], routes=[output.routes for output in outputs],
    )  # fmt: skip


def unpack(group: dict[str, list]) -> tuple[list[Output], list[str]]:
    fields = (group[name] for name in ("tokens", "logprobs", "finish", "routes"))
    return [Output(*each) for each in zip(*fields)], group["texts"]


# ---- a rollout worker ----------------------------------------------------------------------------

# write(model, tokenizer, done, numbers) -> number -> its outputs and their texts
Write = Callable[[Transformer, Tokenizer, int, range], dict[int, tuple[list[Output], list[str]]]]


class Worker:
    """Draws what the trainer of a run asks for, until the run is over."""

    def __init__(self, plan: Plan, write: Write, device: torch.device, template: str | None):
        self.plan, self.write, self.device, self.template = plan, write, device, template
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.held: list[Path] = []  # what is touched while this process lives
        self.model, self.tokenizer, self.version = None, None, None

    def serve(self, patience: float) -> None:
        """Raises UserError where no trainer has been alive for so many seconds."""
        threading.Thread(target=self._beat, daemon=True).start()
        file, heard, last = self.plan.spool / "notice.json", time.monotonic(), None
        while True:
            notice = read_notice(self.plan)
            if notice is not None and notice["over"]:
                return
            worked = notice is not None and self.work(notice)
            touched = file.stat().st_mtime if file.exists() else None
            if worked or touched != last:
                heard, last = time.monotonic(), touched
            elif time.monotonic() - heard > patience:
                raise UserError(f"no trainer was alive in {self.plan.spool} for {patience:g} s")
            else:
                time.sleep(POLL)

    def work(self, notice: dict) -> bool:
        """Draw one part; False where there is none to draw."""
        self.plan = replace(self.plan, **notice["plan"])  # --resume may have changed it
        place = self.plan.spool / notice["generation"]
        alive = place / "workers" / self.name
        try:
            now = clock(alive)
            for done, part, name in self.plan.names(notice["step"]):
                if (place / "parts" / f"{name}.pt").exists():
                    continue
                if claim(place / "claims" / name, self.name, now):
                    self.held = [alive, place / "claims" / name]
                    self.read(place, notice)
                    self.commit(place, name, self.draw(done, part))
                    return True
            self.held = [alive]
            return False
        except FileNotFoundError:  # the trainer has started again or gone on: see the next notice
            for abandoned in self.held[1:]:
                abandoned.unlink(missing_ok=True)
            self.held = []
            return False

    def read(self, place: Path, notice: dict) -> None:
        """The notice's weights, unless they are here. In place: what was recorded of the model's
        steps (runtime/record.py) remains."""
        if self.version == (notice["generation"], notice["step"]):
            return
        directory = step_path(place / "weights", notice["step"])
        try:
            tokenizer = self.tokenizer or Tokenizer.load(directory, self.template)
            new = load_pretrained(directory, device=self.device, mtp=False)
        except UserError as error:
            raise FileNotFoundError(directory) from error  # two updates on, it is deleted
        if self.model is None:
            self.model, self.tokenizer = new, tokenizer
        else:
            self.model.load_state_dict(new.state_dict())
        self.version = notice["generation"], notice["step"]

    def draw(self, done: int, part: int) -> dict[str, Any]:
        drawn = self.write(self.model, self.tokenizer, done, self.plan.numbers(part))
        groups = {number: pack(*group) for number, group in drawn.items()}
        return dict(version=self.version[1], worker=self.name, groups=groups)

    def commit(self, place: Path, name: str, content: dict[str, Any]) -> None:
        new = place / "parts" / f".{name}.{self.name}"
        with new.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(place / "parts" / f"{name}.pt")

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            for file in self.held:
                touch(file)


def claim(file: Path, name: str, now: float) -> bool:
    """Whether this worker is the one that creates the file, or takes it over from one that is
    lost."""
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        try:
            if now - file.stat().st_mtime < LEASE:
                return False
            # Of several who see that it has lapsed, one can do this; or, where another has taken it
            # over since, it is drawn twice.
            file.rename(file.with_name(f"{file.name}.lost-{name}"))
        except FileNotFoundError:
            return False
        return claim(file, name, now)
    os.write(handle, name.encode())
    os.close(handle)
    return True
