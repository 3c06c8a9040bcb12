"""runtime/spool.py: rollouts drawn by other programs, who claim, stall, die and join."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_zero
from data.tokenizer import Tokenizer
from model import Config, Transformer
from runtime import spool
from runtime.flags import UserError
from runtime.launch import stop
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.run import Run
from runtime.spool import Plan, Spool, Worker, claim, clock, part_name
from sample import Output

ROOT = Path(__file__).parent.parent
TINY = Config.preset("toy-student", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(TINY, vocab_size=Tokenizer.toy().vocab_size))


@pytest.fixture
def plan(tmp_path) -> Plan:
    return Plan(tmp_path, steps=8, minibatches=2, ahead=1, questions=5, part=2)


@pytest.fixture
def run(tmp_path, plan):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Run(tmp_path, plan_as_config(plan), resume=None)
    for number, handler in before.items():
        signal.signal(number, handler)
    stop.signal = 0


def plan_as_config(plan: Plan) -> Plan:
    return replace(plan, directory=str(plan.directory))


def trainer(plan: Plan) -> Spool:
    return Spool(plan, Tokenizer.toy(), [])


def write(model, tokenizer, done: int, numbers: range) -> dict:
    """Two outputs for each question, which tell where they come from."""
    texts = [f"{done} a", f"{done} b"]
    outputs = [Output([done, n, 1], [-0.5, -1.0, -2.0], "stop") for n in range(2)]
    return {number: (outputs, [f"{text} {number}" for text in texts]) for number in numbers}


def worker(plan: Plan, name: str = "w", write=write) -> Worker:
    made = Worker(plan, write, torch.device("cpu"), None)
    made.name = name
    return made


# ---- claims --------------------------------------------------------------------------------------


def test_of_many_who_claim_a_part_one_gets_it(tmp_path):
    for number in range(20):
        got, file, gate = [], tmp_path / str(number), threading.Barrier(8)

        def ask(name: str) -> None:
            gate.wait()
            if claim(file, name, clock(tmp_path / name)):
                got.append(name)

        threads = [threading.Thread(target=ask, args=(f"w{i}",)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(got) == 1 and file.read_text() == got[0]


def test_a_claim_that_is_touched_is_kept_and_one_that_is_not_goes_to_who_asks(tmp_path):
    file, now = tmp_path / "claim", clock(tmp_path / "clock")
    assert claim(file, "first", now) and not claim(file, "second", now)
    assert not claim(file, "second", now + spool.LEASE - 1)
    assert claim(file, "second", now + spool.LEASE + 1) and file.read_text() == "second"
    assert [path.name for path in tmp_path.glob("claim.*")] == ["claim.lost-second"]


def test_a_worker_draws_no_further_ahead_than_the_staleness_allows(plan):
    parts = [[part_name(done, part) for part in range(3)] for done in (2, 4)]
    assert [name for *_, name in plan.names(2)] == parts[0] + parts[1]
    assert [done for done, *_ in plan.names(6)] == [6] * 3  # the run ends at 8
    assert {done for done, *_ in replace(plan, ahead=0).names(2)} == {2}
    assert [list(plan.numbers(part)) for part in range(plan.parts)] == [[0, 1], [2, 3], [4]]


# ---- both sides in one process -------------------------------------------------------------------


def serving(plan: Plan, *workers: Worker, patience: float = 20) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=each.serve, args=(patience,), daemon=True) for each in workers
    ]
    for thread in threads:
        thread.start()
    return threads


def test_the_trainer_gets_each_question_once_and_knows_how_old_the_weights_were(plan, run, policy):
    with trainer(plan) as ours:
        threads = serving(plan, worker(plan, "a"), worker(plan, "b"))
        for done in range(0, plan.steps, plan.minibatches):
            found = ours.take(policy, done, run)
            assert sorted(found) == list(range(plan.questions))
            for number, (outputs, texts) in found.items():
                assert texts == [f"{done} a {number}", f"{done} b {number}"]
                assert outputs[1] == Output([done, 1, 1], [-0.5, -1.0, -2.0], "stop")
            assert 0 <= ours.metrics["staleness"] <= ours.metrics["staleness_max"] <= 2
            assert ours.metrics["workers"] in (1, 2)
        ours.over = True
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()  # the run is over
    assert [path.name for path in plan.spool.iterdir()] == ["notice.json"]


def test_weights_and_routes_arrive_as_they_are(plan, run, policy, tmp_path):
    routes, seen = torch.arange(6, dtype=torch.int16).view(3, 1, 2), []

    def with_routes(model, tokenizer, done, numbers):
        seen.append({name: t.clone() for name, t in model.state_dict().items()})
        return {n: ([Output([1], [-1.0], "length", routes)], ["x"]) for n in numbers}

    torch.manual_seed(1)
    other = Transformer(policy.config)
    with trainer(replace(plan, ahead=0)) as ours:
        serving(plan, worker(replace(plan, ahead=0), write=with_routes))
        for done, model in ((0, policy), (2, other)):
            [output], _ = ours.take(model, done, run)[4]
            assert torch.equal(output.routes, routes) and output.finish == "length"
            wanted = model.state_dict()
            assert all(torch.equal(seen[-1][name], wanted[name]) for name in wanted)
        ours.over = True


def test_what_a_lost_worker_had_claimed_is_drawn_by_another(plan, run, policy, monkeypatch):
    monkeypatch.setattr(spool, "LEASE", 0.6)
    monkeypatch.setattr(spool, "BEAT", 0.1)
    gate = threading.Event()

    def stalled(model, tokenizer, done, numbers):
        dead.held = []  # its heart has stopped as well
        gate.wait(20)
        return {number: ([Output([9], [-9.0], "stop")], ["late"]) for number in numbers}

    dead = worker(plan, "dead", stalled)
    with trainer(plan) as ours:
        serving(plan, dead)
        ours.publish(policy, 0)
        while not list((ours.place / "claims").iterdir()):
            time.sleep(0.02)
        serving(plan, worker(plan, "alive"))  # joins
        assert len(ours.take(policy, 0, run)) == plan.questions
        assert ours.metrics["workers"] == 1
        later = ours.take(policy, 2, run)  # and 0's files are gone
        gate.set()  # the stalled one comes back, too late
        time.sleep(0.5)
        assert len(ours.take(policy, 4, run)) == plan.questions and later
        assert not list((ours.place / "parts").glob("000000*"))
        ours.over = True


def test_a_long_part_is_not_taken_from_a_worker_that_is_alive(plan, run, policy, monkeypatch):
    monkeypatch.setattr(spool, "LEASE", 0.6)
    monkeypatch.setattr(spool, "BEAT", 0.1)
    drawn = []

    def slow(model, tokenizer, done, numbers):
        drawn.append((done, numbers))
        time.sleep(1.5)
        return write(model, tokenizer, done, numbers)

    with trainer(replace(plan, ahead=0)) as ours:
        alone = replace(plan, ahead=0)
        serving(alone, worker(alone, "a", slow), worker(alone, "b", slow))
        ours.take(policy, 0, run)
        ours.over = True
    assert sorted(map(str, drawn)) == sorted({str(each) for each in drawn})


def test_a_new_start_of_the_trainer_forgets_what_was_drawn_for_the_former_one(plan, run, policy):
    first = trainer(plan)
    first.publish(policy, 4)
    (first.place / "parts" / f"{part_name(4, 0)}.pt").write_bytes(b"of weights that are lost")
    left = worker(plan)
    assert left.work(notice := spool.read_notice(plan))
    again = trainer(plan)
    assert again.generation > first.generation and not first.place.exists()
    assert not left.work(spool.read_notice(plan) or notice)  # gone: see the next notice
    serving(plan, left)
    with again:
        assert len(again.take(policy, 2, run)) == plan.questions
        again.over = True


def test_ctrl_c_ends_the_waiting(plan, run, policy):
    ours = trainer(plan)
    stop.signal = signal.SIGINT
    assert ours.take(policy, 0, run) is None


def test_what_cannot_be_read_is_said_with_its_file(plan, run, policy):
    ours = trainer(plan)
    ours.publish(policy, 0)
    (ours.place / "parts" / f"{part_name(0, 1)}.pt").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="000000-001.pt can't be read"):
        ours.take(policy, 0, run)


def test_without_any_worker_the_trainer_says_how_to_start_one(plan, run, policy, capsys):
    ours = trainer(plan)
    ours.publish(policy, 0)
    ours._watch()
    ours._watch()
    said = capsys.readouterr().err
    assert said.count("waiting for rollout workers; start some: python train_zero.py --join") == 1


def test_when_all_that_were_started_have_died_it_is_an_error(plan, run, policy, monkeypatch):
    ours = Spool(plan, Tokenizer.toy(), [[sys.executable, "-c", "raise SystemExit(3)"]])
    with pytest.raises(UserError, match="no rollout worker is left; go on with --resume"):
        ours.take(policy, 0, run)


def test_a_worker_gives_up_where_no_trainer_comes(plan):
    with pytest.raises(UserError, match="no trainer was alive in .*spool for 0.2 s"):
        worker(plan).serve(patience=0.2)


def test_a_worker_waits_for_a_trainer_that_is_alive_and_outlives_its_own_work(
    plan, run, policy, monkeypatch
):
    monkeypatch.setattr(spool, "BEAT", 0.1)

    def slow(model, tokenizer, done, numbers):
        time.sleep(1.0)
        return write(model, tokenizer, done, numbers)

    alone = replace(plan, ahead=0, part=5)
    with trainer(alone) as ours:
        [thread] = serving(alone, worker(alone, "a", slow), patience=0.5)
        ours.take(policy, 0, run)
        time.sleep(1.0)  # the trainer makes its updates
        assert thread.is_alive() and len(ours.take(policy, 2, run)) == plan.questions
        ours.over = True


def test_a_worker_follows_the_plan_of_a_trainer_that_resumed_with_another(plan, run, policy):
    other = replace(plan, part=1, ahead=0)
    with trainer(other) as ours:
        serving(plan, worker(plan))  # which knows of three parts
        assert len(ours.take(policy, 0, run)) == plan.questions
        assert len(ours.take(policy, 2, run)) == plan.questions
        assert ours.metrics["staleness_max"] == 0
        ours.over = True


def test_a_run_that_goes_on_after_its_end_has_work_again(plan, run, policy):
    with trainer(plan) as ours:
        ours.publish(policy, 6)
        ours.over = True
    again = trainer(plan)
    assert spool.read_notice(plan) is None and again.generation > ours.generation


def test_each_process_gets_its_questions_of_every_part(plan, run, policy, monkeypatch):
    ours = trainer(replace(plan, part=4))
    ours.publish(policy, 0)
    left = worker(replace(plan, part=4))
    while left.work(spool.read_notice(plan)):
        pass
    monkeypatch.setattr(spool.parallel, "all_sum", lambda value: value)
    monkeypatch.setattr(spool.parallel, "gather_numbered", lambda items: items)
    monkeypatch.setattr(spool.parallel, "world_size", lambda: 2)
    monkeypatch.setattr(ours, "publish", lambda *args: None)
    for rank, wanted in ((0, [0, 2, 4]), (1, [1, 3])):
        monkeypatch.setattr(spool.parallel, "rank", lambda: rank)
        assert sorted(ours.take(policy, 0, run)) == wanted


def test_foreign_files_are_left_alone(plan, run, policy):
    ours = trainer(plan)
    ours.publish(policy, 0)
    (ours.place / "parts" / ".nfs0000abcd").touch()
    ours.publish(policy, 2)
    assert (ours.place / "parts" / ".nfs0000abcd").exists()


def test_a_worker_that_is_stopped_does_not_hold_up_the_end(plan, run, policy):
    sleeping = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    with Spool(plan, Tokenizer.toy(), [sleeping]) as ours:
        ours.publish(policy, 0)
        time.sleep(0.5)
    assert ours.children[0].returncode == -signal.SIGKILL


# ---- the program ---------------------------------------------------------------------------------

# float64: a batch of other outputs rounds otherwise, and a token may be another one.
SMALL = ["--questions", "6", "--group-size", "4", "--minibatches", "2", "--max-new-tokens", "12",
         "--eval-problems", "9", "--eval-samples", "2", "--reward", "random", "--part", "2",
         "--threads", "1", "--device", "cpu", "--steps", "16", "--lr", "0.01",
         "--dtype", "float64"]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    tokenizer = Tokenizer.toy()
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, hidden_size=16)
    path = tmp_path_factory.mktemp("models") / "base"
    save_pretrained(Transformer(config), path, tokenizer_files=tokenizer.files())
    return path


def started(*argv) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train_zero.py", *map(str, argv)], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(program: subprocess.Popen) -> str:
    said, _ = program.communicate(timeout=300)
    assert program.returncode == 0, said
    return said


def rl(out: Path) -> list[dict]:
    file = out / "metrics.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if row["phase"] == "rl"]


def test_with_the_newest_weights_a_run_is_the_synchronous_one(base, tmp_path):
    common = [*SMALL, "--model", base, "--steps", "8"]
    alone = started(*common, "--out", tmp_path / "alone")
    others = [*common, "--async-rollouts", 2, "--ahead", 0, "--out", tmp_path / "others"]
    ended(started(*others))
    ended(alone)
    ours, theirs = rl(tmp_path / "others"), rl(tmp_path / "alone")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-9)
    assert [r.get("tokens") for r in ours] == [r.get("tokens") for r in theirs]
    assert {row["staleness_max"] for row in ours if "tokens" in row} == {0}
    weights = [load_pretrained(tmp_path / name / "model") for name in ("others", "alone")]
    for a, b in zip(*(model.state_dict().values() for model in weights)):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


def test_workers_may_die_and_join_and_the_run_ends_well(base, tmp_path):
    out = tmp_path / "run"
    common = [*SMALL, "--model", base, "--out", out]
    program = started(*common, "--async-rollouts", 3)
    wait_for(lambda: len(rl(out)) >= 2, program)
    alive = sorted((out / "spool").glob("*/workers/[!.]*"))
    os.kill(int(alive[0].name.rsplit("-", 1)[1]), signal.SIGKILL)
    joined = started("--join", out, "--threads", "1")
    said = ended(program)
    assert "rollout worker" in said and "ended with code -9" in said
    ended(joined)  # when the run is over
    rows = [row for row in rl(out) if "tokens" in row]
    assert len(rows) == 8 and max(row["staleness_max"] for row in rows) <= 2
    assert any(row["staleness"] > 0 for row in rows)
    assert (out / "model").is_dir() and not list((out / "spool").glob("*/parts"))


@pytest.mark.slow
def test_a_killed_trainer_goes_on_with_new_workers(base, tmp_path):
    out = tmp_path / "run"
    common = [*SMALL, "--model", base, "--out", out, "--async-rollouts", 2, "--save-every", "2",
              "--steps", "10"]  # fmt: skip
    program = started(*common)
    wait_for(lambda: len(rl(out)) >= 4, program)
    names = [file.name for file in (out / "spool").glob("*/workers/[!.]*")]
    program.kill()
    program.wait()
    wait_for(lambda: not any(is_alive(int(name.rsplit("-", 1)[1])) for name in names))
    ended(started(*common, "--resume"))
    assert [row["step"] for row in rl(out)] == list(range(1, 11))


def wait_for(condition, program: subprocess.Popen | None = None) -> None:
    for _ in range(1500):
        if condition():
            return
        assert program is None or program.poll() is None, program.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("it never came")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_to_join_what_is_no_such_run_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no run is there; first start it: python train_zero.py"):
        train_zero.main(train_zero.Config(join=str(tmp_path / "none")))
    (tmp_path / "config.json").write_text(json.dumps(dict(questions=4)))
    with pytest.raises(UserError, match="that run draws its outputs itself"):
        train_zero.main(train_zero.Config(join=str(tmp_path)))
    with pytest.raises(UserError, match="--join with --ep or --tp"):
        train_zero.main(train_zero.Config(join=str(tmp_path), ep=2))
    with pytest.raises(UserError, match="--tp 2 and --async-rollouts"):
        train_zero.Config(tp=2, async_rollouts=1)
