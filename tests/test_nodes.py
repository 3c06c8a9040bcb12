"""bench/nodes.py: how it judges a run, when it refuses, that it leaves nothing; the faults."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train_zero
from bench import nodes
from bench.nodes import Config, Event, Training, differences, problems, rl_lines, rows
from runtime.flags import parse

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hosts_can_be():
    if reason := nodes.why_not():
        pytest.skip(reason)


def write_run(out: Path, steps, loss=0.5, tokens=7, weight=1.0) -> Path:
    lines = [dict(phase="pretrain", step=1, loss=9.0)]
    lines += [dict(phase="rl", step=step, loss=loss, tokens=tokens) for step in steps]
    (out / "model").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"w": torch.full((2,), weight, dtype=torch.float64)}, out / "model/model.safetensors")
    return out


class Scripted(Training):
    """A run whose newest rank 0, number of ranks and last update are given, one after another."""

    def __init__(self, out: Path, *moments):
        super().__init__({}, out, [])
        self.moments = list(moments)

    def leader(self):
        if len(self.moments) > 1 and self.asked:
            self.moments.pop(0)
        self.asked = True
        return self.moments[0][:2]

    def steps(self):
        return [self.moments[0][2]]

    asked = False


# --- judging


def test_a_half_written_line_and_other_phases_are_left_out(tmp_path):
    write_run(tmp_path / "run", [1, 2])
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl", "st')
    assert [line["step"] for line in rl_lines(tmp_path / "run")] == [1, 2]
    assert rl_lines(tmp_path / "none") == []


def test_a_run_is_compared_update_by_update_and_weight_by_weight(tmp_path):
    first = write_run(tmp_path / "first", [1, 2, 3])
    same = differences(write_run(tmp_path / "same", [1, 2, 3]), first)
    assert same == dict(
        each_update_once=True, same_tokens=True, last_loss=0, any_loss=0, weights=0
    )  # fmt: skip
    other = differences(write_run(tmp_path / "other", [1, 2, 3], 0.75, 8, 1.25), first)
    assert (other["last_loss"], other["any_loss"], other["weights"]) == (0.25, 0.25, 0.25)
    assert other["each_update_once"] and not other["same_tokens"]
    for number, steps in enumerate(([1, 2], [1, 2, 2, 3], [2, 3])):
        found = differences(write_run(tmp_path / str(number), steps), first)
        assert not found["each_update_once"], steps


def test_what_misses_a_criterion_is_named(tmp_path):
    good = dict(each_update_once=True, same_tokens=True, last_loss=1e-13, weights=1e-12)
    run = Training({}, tmp_path / "link", [], [Event("link cut", 4, 2, 59.9)])
    assert problems(run, good, limit=60) == []
    assert problems(run, good, limit=30) == ["link: link cut: 59.9 s"]
    bad = dict(each_update_once=False, same_tokens=False, last_loss=float("nan"), weights=1.0)
    assert [line.split(": ", 1)[1] for line in problems(run, bad, limit=60)] == [
        "not so: each update once", "not so: same tokens", "last loss differ by nan",
        "weights differ by 1.0e+00",
    ]  # fmt: skip
    run.failure = "link: the end: not within 240 s"
    assert problems(run, {}, limit=60) == [run.failure]


def test_the_table_has_a_row_for_each_event_and_the_outcome_on_the_last(tmp_path):
    events = [Event("link cut", 4, 2, 20.5), Event("link restored", 2, 4, 9.0)]
    found = dict(last_loss=1e-13, weights=2e-12, same_tokens=True)
    table = rows(Training({}, tmp_path, [], events), found)
    assert [row["ranks"] for row in table] == ["4 → 2", "2 → 4"]
    assert [row["last loss differs by"] for row in table] == ["", "1.0e-13"]
    (only,) = rows(Training({}, tmp_path, []), found)
    assert only["what happens"] == "none" and only["same tokens"] == "yes"


def test_training_goes_on_with_a_new_update_of_new_ranks_and_not_before(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(nodes.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(nodes.time, "sleep", lambda seconds: None)
    old, new = 11, 12
    run = Scripted(
        tmp_path,
        (old, 4, 10),
        (old, 4, 11),  # what the old ranks still log
        (0, 0, 11),
        (new, 2, 11),  # not yet read back to the checkpoint, at 8
        (new, 2, 8),
        (new, 2, 11),
        (new, 2, 12),
    )
    run.strike("a fault", lambda: None, ranks=2)
    assert len(run.moments) == 1, "it went on before update 12"
    run = Scripted(tmp_path, (old, 2, 10), (new, 2, 30), (new, 4, 31))
    monkeypatch.setattr(nodes, "PATIENCE", 20)
    with pytest.raises(nodes.Failed, match="no update on 3 ranks"):
        run.strike("a fault", lambda: None, ranks=3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_is_found_by_its_environment_and_its_children_are_not_ranks(tmp_path):
    run = Training({}, tmp_path / "found", [])
    ours = {**os.environ, "TORCHELASTIC_RUN_ID": run.run_id, "RANK": "0", "WORLD_SIZE": "4"}
    command = ["bash", "-c", "sleep 60 & echo started; wait"]
    rank = subprocess.Popen(
        command, env=ours, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        rank.stdout.readline()
        assert run.leader() == (rank.pid, 4)
        assert list(run.workers()) == [rank.pid]
    finally:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.communicate()
    assert run.leader() == (0, 0)


# --- refusing


def test_a_machine_that_cannot_is_told_why_in_one_line(monkeypatch, capsys):
    def told() -> str:
        assert nodes.main(Config()) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    def refuse(*arguments: str, check: bool = True) -> str:
        if check:
            raise OSError("ip netns add: Operation not permitted")
        return ""

    monkeypatch.setattr(nodes.sys, "platform", "linux")
    monkeypatch.setattr(nodes.shutil, "which", lambda name: "/sbin/" + name)
    monkeypatch.setattr(nodes.os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(nodes, "command", refuse)
    assert "Operation not permitted" in told()
    monkeypatch.setattr(nodes.os, "geteuid", lambda: 1000, raising=False)
    assert "needs root" in told()
    monkeypatch.setattr(nodes.shutil, "which", lambda name: None)
    assert "iproute2" in told()
    monkeypatch.setattr(nodes.sys, "platform", "darwin")
    assert "needs Linux" in told()


def test_flags_that_make_no_sense_are_refused(capsys):
    assert parse(Config, {}, ["--faults", "worker,link"]).faults == ("worker", "link")
    for arguments, message in (
        (["--faults", "worker,fire"], "fire: not one of worker, node, link, host"),
        (["--updates", "10"], "at least 100"),
    ):
        with pytest.raises(SystemExit) as end:
            parse(Config, {}, arguments)
        assert end.value.code == 2 and message in capsys.readouterr().err


# --- leaving nothing


def left(pid: int) -> list[str]:
    return [n for n in nodes.command("ip", "netns", "list").split() if f"-{pid}-" in n]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_two_hosts_reach_each_other_until_the_link_is_cut_and_leave_nothing(hosts_can_be, tmp_path):
    hear = "import socket, sys; s = socket.create_server((sys.argv[1], 1)); s.accept()"
    call = "import socket, sys; socket.create_connection((sys.argv[1], 1), 2)"
    with pytest.raises(ZeroDivisionError), nodes.two_hosts() as hosts:
        a, b = hosts["a"], hosts["b"]
        listen = [sys.executable, "-c", hear, nodes.ADDRESSES["a"]]
        a.switch_on(f"{' '.join(map(repr, listen))}; sleep 1000", tmp_path / "log")
        speak = ["ip", "netns", "exec", b.name, sys.executable, "-c", call, nodes.ADDRESSES["a"]]
        deadline = time.monotonic() + 20
        while subprocess.run(speak, capture_output=True).returncode:
            assert time.monotonic() < deadline, "b does not reach a"
        b.ip("link", "set", "eth0", "down")
        assert subprocess.run(speak, capture_output=True).returncode
        inside = [int(pid) for pid in nodes.command("ip", "netns", "pids", a.name).split()]
        assert inside and len(left(os.getpid())) == 2
        1 / 0
    assert left(os.getpid()) == [] and not any(map(alive, inside))


def test_a_killed_bench_takes_its_processes_along_and_the_next_one_its_namespaces(
    hosts_can_be, tmp_path
):
    program = """
import sys, time
from pathlib import Path
import train_zero
from bench import nodes
with nodes.two_hosts() as hosts:
    hosts["a"].switch_on("echo $$; sleep 1000", Path(sys.argv[1]))
    time.sleep(1000)
"""
    log = tmp_path / "log"
    bench = subprocess.Popen([sys.executable, "-c", program, str(log)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    name = f"{nodes.PREFIX}-{bench.pid}-a"
    inside = [int(pid) for pid in nodes.command("ip", "netns", "pids", name).split()]
    bench.kill()
    bench.wait()
    while any(map(alive, inside)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(left(bench.pid)) == 2
    nodes.delete_left_over()
    assert left(bench.pid) == []


# --- the faults


@pytest.mark.slow
def test_training_survives_every_fault_and_ends_as_if_undisturbed(hosts_can_be, tmp_path):
    command = [sys.executable, "-m", "bench.nodes", "--out", str(tmp_path / "runs"), "--name",
               str(tmp_path / "faults")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "faults.json").read_text())
    assert list(result["runs"]) == ["none", *nodes.FAULTS] and not result["failed"]
    assert all(run["same_tokens"] for run in result["runs"].values())


SLURM = ROOT / "bench/slurm.sh"


@pytest.mark.skipif(not SLURM.exists(), reason=f"there is no {SLURM.name}")
def test_the_slurm_script_is_bash_and_its_flags_are_train_zeros():
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    text = SLURM.read_text()
    train = text[text.index("TRAIN=(train_zero.py") :].split("(", 1)[1].split(")")[0]
    arguments = shlex.split(train.replace("$SLURM_JOB_ID", "7"))[1:]
    config = parse(train_zero.Config, train_zero.PRESETS, arguments)
    assert config.out == "runs/slurm-7" and config.resume and config.timeout < 3600
