"""runtime/flags.py, run.py and launch.py: flags, the run directory, metrics, exits."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from runtime import checkpoint, parallel
from runtime import launch as launching
from runtime import run as running
from runtime.checkpoint import save_state
from runtime.run import (
    Diverged,
    Run,
    UserError,
    check_finite,
    flag,
    launch,
    parse,
    pick_device,
    usable_dtype,
    progress,
    write_file,
)  # fmt: skip

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Config:
    out: str = flag("runs/x", "where the run goes")
    group_size: int = flag(16, "outputs for each question")
    lr: float = flag(1e-3, "learning rate, 95 % of it")
    data: str | None = flag(None, "a file of problems")
    resume: bool = flag(False, "continue the run in --out")
    shuffle: bool = flag(True, "shuffle the problems")
    levels: tuple[int, ...] = flag((1, 2), "levels of the problems")
    ratio: Literal["token", "sequence"] = flag("token", "level of the ratio")
    seed: int = flag(0, "of everything random")
    steps: int = flag(10, "updates")

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: a group takes at least 2")


PRESETS = {"toy": {}, "gsm8k": {"group_size": 64, "lr": 3e-6}}


@pytest.fixture(autouse=True)
def signals_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    launching.stop.signal = 0


def refused(capsys, *argv: str) -> str:
    """What parse says when it refuses the flags: one line, exit code 2."""
    with pytest.raises(SystemExit) as exit:
        parse(Config, PRESETS, argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


# --- flags


def test_a_flag_wins_over_the_preset_which_wins_over_the_default():
    config = parse(Config, PRESETS, ["--preset", "gsm8k", "--lr", "0.5"])
    assert (config.group_size, config.lr, config.steps) == (64, 0.5, 10)
    assert parse(Config, PRESETS, ["--lr=0.5", "--preset=gsm8k"]) == config


def test_a_flag_given_with_its_default_still_wins_over_the_preset():
    assert parse(Config, PRESETS, ["--preset", "gsm8k", "--group-size", "16"]).group_size == 16


def test_the_first_preset_is_the_default():
    presets = {"fast": {"steps": 3}, "toy": {}}
    assert parse(Config, presets, []).steps == 3
    assert parse(Config, {}, []) == Config()


def test_each_kind_of_field_is_read():
    config = parse(
        Config, PRESETS,
        ["--no-shuffle", "--resume", "--data", "a.jsonl", "--levels", "3,4", "--ratio", "sequence"],
    )  # fmt: skip
    assert config == replace(
        Config(), shuffle=False, resume=True, data="a.jsonl", levels=(3, 4), ratio="sequence"
    )
    assert parse(Config, PRESETS, ["--data", "none"]).data is None


def test_an_unknown_flag_is_refused_with_the_nearest_name(capsys):
    assert "--group-sise; did you mean --group-size?" in refused(capsys, "--group-sise", "8")
    assert "--no-shufle; did you mean --no-shuffle?" in refused(capsys, "--no-shufle")
    assert "unknown flag --zzz (" in refused(capsys, "--zzz=1")
    assert "unexpected 'toy'" in refused(capsys, "toy")


def test_a_flag_cannot_be_abbreviated(capsys):
    assert "did you mean --group-size?" in refused(capsys, "--group-siz", "8")


def test_an_unknown_preset_is_refused_with_the_nearest_name(capsys):
    message = refused(capsys, "--preset", "gsm8")
    assert "'gsm8' is not a preset; did you mean gsm8k? (there are toy, gsm8k)" in message


@pytest.mark.parametrize(
    "argv, takes",
    [
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--steps", "2.5"], "--steps: '2.5' is not a whole number"),
        (["--levels", "1,x"], "--levels: '1,x' is not whole numbers with commas between"),
        (["--ratio", "tokn"], "--ratio: 'tokn' is not one of token, sequence; did you mean token?"),
        (["--lr"], "--lr: expected one argument"),
    ],
)
def test_a_bad_value_is_refused_with_the_flag_the_value_and_what_it_takes(capsys, argv, takes):
    assert takes in refused(capsys, *argv)


def test_what_the_config_itself_refuses_is_one_line_too(capsys):
    assert "group_size=1: a group takes at least 2" in refused(capsys, "--group-size", "1")


def test_help_has_a_sentence_and_the_default_of_the_chosen_preset_for_each_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Config, PRESETS, ["--preset", "gsm8k", "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "outputs for each question (default: 64)" in text
    assert "learning rate, 95 % of it (default: 3e-06)" in text
    assert "levels of the problems (default: 1,2)" in text
    assert "--shuffle, --no-shuffle shuffle the problems (default: true)" in text


def test_under_torchrun_only_rank_0_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit:
        parse(Config, PRESETS, ["--nonsense"])
    assert exit.value.code == 2 and capsys.readouterr().err == ""


# --- the run directory


def lines(run: Run) -> list[dict]:
    return [json.loads(row) for row in run.metrics.read_text().splitlines()]


def test_a_run_writes_its_config_and_one_line_of_json_for_each_log(tmp_path):
    config = Config(levels=(1, 5))
    run = Run(tmp_path / "a" / "b", config)
    run.log(phase="rl", step=1, loss=torch.tensor(0.5), reward=np.float32(0.25), by_level={"1": 1})
    saved = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert saved == {**asdict(config), "levels": [1, 5]}
    expected = {"phase": "rl", "step": 1, "loss": 0.5, "reward": 0.25, "by_level": {"1": 1}}
    assert lines(run) == [expected]


def test_a_number_that_is_not_finite_is_logged_as_null(tmp_path):
    run = Run(tmp_path, Config())
    run.log(phase="rl", step=1, kl=float("nan"), norm=torch.tensor(torch.inf), deep={"a": [np.nan]})
    expected = {"phase": "rl", "step": 1, "kl": None, "norm": None, "deep": {"a": [None]}}
    assert lines(run) == [expected]


def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_is(tmp_path):
    Run(tmp_path, Config()).log(phase="rl", step=1)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="--resume.*--out"):
        Run(tmp_path, Config(seed=1))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "config.json").unlink()  # metrics alone are a run as well
    with pytest.raises(UserError, match="holds a run"):
        Run(tmp_path, Config(seed=1))


def test_resuming_with_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    Run(tmp_path, Config(lr=0.1))
    with pytest.raises(UserError) as error:
        Run(tmp_path, Config(lr=0.2, group_size=8, resume=True), resume=True)
    assert "--lr was 0.1, now 0.2" in str(error.value)
    assert "--group-size was 16, now 8" in str(error.value)
    assert "resume was" not in str(error.value) and "seed" not in str(error.value)


def test_resuming_may_change_what_the_recipe_allows(tmp_path):
    Run(tmp_path, Config(steps=10))
    with pytest.raises(UserError, match="--steps was 10, now 20"):
        Run(tmp_path, Config(steps=20), resume=True)
    Run(tmp_path, Config(steps=20, levels=(1, 2)), resume=True, may_change=("steps",))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 20


def test_a_resumed_metrics_file_equals_an_uninterrupted_one(tmp_path):
    def log(run, *steps):
        for step in steps:
            run.log(phase="rl", step=step, loss=step / 7, seconds_update=0.5)
            if step % 2 == 0:
                run.log(phase="eval", step=step, accuracy=step / 10)

    whole, cut = Run(tmp_path / "whole", Config()), Run(tmp_path / "cut", Config())
    for run in (whole, cut):
        run.log(phase="pretrain", step=9, loss=1.0, seconds_pretrain=3.0)
    log(whole, 1, 2, 3, 4, 5, 6)
    log(cut, 1, 2, 3, 4, 5)
    with cut.metrics.open("a") as file:
        file.write('{"phase": "rl", "st')  # killed while it wrote
    again = Run(tmp_path / "cut", Config(), resume=True)
    for phase in ("rl", "eval"):
        again.rewind(phase, 3)  # the last checkpoint was of step 3
    assert again.seconds == {"pretrain": 3.0, "update": 1.5}
    log(again, 4, 5, 6)
    assert again.metrics.read_text() == whole.metrics.read_text()


def test_resumed_rollouts_equal_uninterrupted_ones_and_end_with_a_whole_line(tmp_path):
    def keep(run, *steps):
        for step in steps:
            run.keep_rollouts([{"question": "1 + 1"}, {"question": "2"}], phase="rl", step=step)

    whole, cut = Run(tmp_path / "whole", Config()), Run(tmp_path / "cut", Config())
    assert not (tmp_path / "cut" / "rollouts.jsonl").exists()  # for one that has none
    keep(whole, 1, 3, 5, 7)
    keep(cut, 1, 3, 5)
    with (tmp_path / "cut" / "rollouts.jsonl").open("a") as file:
        file.write('{"phase": "rl", "st')  # killed while it wrote
    again = Run(tmp_path / "cut", Config(), resume=True)
    again.rewind("rl", 4)
    keep(again, 5, 7)
    files = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("whole", "cut")]
    assert files[0] == files[1] and files[0].count("\n") == 8


def test_a_line_of_metrics_that_is_no_json_is_named(tmp_path):
    run = Run(tmp_path, Config())
    run.log(phase="rl", step=1)
    run.metrics.write_text("what\n" + run.metrics.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a line with a phase"):
        Run(tmp_path, Config(), resume=True)


def test_resuming_where_there_is_no_run_starts_one_and_says_so(tmp_path, capsys):
    Run(tmp_path / "new", Config(), resume=True)
    assert "no run to resume" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Run(tmp_path / "file", Config())


def test_a_phase_adds_up_seconds_and_tokens(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(running, "_now", lambda: next(clock))
    run = Run(tmp_path, Config())
    for tokens in (100, 400):
        with run.phase("rollout") as timer:
            timer.tokens += tokens
    assert timer.seconds == 3.0
    timing = run.timing()
    assert timing.pop("peak_mb_rollout") > 0
    assert timing == {"seconds_rollout": 5.0, "tokens_per_second_rollout": 100.0}
    assert run.timing() == {}
    with pytest.raises(KeyError), run.phase("rollout"):
        raise KeyError  # timed as well
    assert run.timing()["seconds_rollout"] == 4.0 and run.seconds == {"rollout": 9.0}


def test_seconds_of_a_phase_inside_another_and_of_communication_are_counted_once(
    tmp_path, monkeypatch
):
    clock = iter([0.0, 2.0, 7.0, 10.0])
    monkeypatch.setattr(running, "_now", lambda: next(clock))
    run = Run(tmp_path, Config())
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with run.phase("rollout") as outer:
        monkeypatch.setattr(parallel, "seconds", parallel.seconds + 0.5)
        with run.phase("reward") as inner:
            monkeypatch.setattr(parallel, "seconds", parallel.seconds + 1.0)
        inner.tokens += 8
    monkeypatch.setattr(parallel, "seconds", parallel.seconds + 3.0)  # between phases
    assert (outer.seconds, inner.seconds) == (4.5, 4.0)
    seconds = {"seconds_rollout": 4.5, "seconds_reward": 4.0, "seconds_communication": 4.5}
    assert {k: v for k, v in run.timing().items() if k.startswith("seconds_")} == seconds
    assert run.seconds == {key.removeprefix("seconds_"): value for key, value in seconds.items()}
    assert run.timing() == {"seconds_communication": 0.0}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the peak begin anew")
def test_each_phase_has_a_peak_of_memory_of_its_own(tmp_path):
    run = Run(tmp_path, Config())
    with run.phase("small"):
        pass
    with run.phase("large"):
        block = bytearray(300 * 2**20)
        block[::4096] = b"x" * len(block[::4096])
        del block
    with run.phase("after"):
        pass
    peak = run.timing()
    assert peak["peak_mb_large"] > peak["peak_mb_small"] + 250
    assert peak["peak_mb_after"] < peak["peak_mb_large"] - 250


def test_without_a_terminal_progress_is_a_few_plain_lines(capsys, monkeypatch):
    bar = progress(1000, "RL")
    for step in range(1000):
        bar.set_postfix(reward=step)
        bar.update()
    bar.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\r" not in err
    assert "RL: 1000/1000" in err and "reward=999" in err
    monkeypatch.setattr("runtime.progress.LINE_EVERY", 0.0)
    bar = progress(3, "RL", initial=1)
    bar.set_postfix(reward=1)
    bar.update(2)
    bar.close()
    rows = capsys.readouterr().err.splitlines()
    assert len(rows) >= 2 and rows[0].startswith("RL: 1/3") and rows[-1].startswith("RL: 3/3")


# --- starts and ends


def ended(main, capsys, config=SimpleNamespace(), **options) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit:
        launch(main, config, **options)
    return exit.value.code, capsys.readouterr().err


def raises(error: BaseException):
    def main(config):
        raise error

    return main


class DataError(ValueError):
    pass


def test_the_users_mistakes_end_with_one_line_and_2(capsys, tmp_path):
    main = raises(UserError("give another --out"))
    assert ended(main, capsys) == (2, "error: give another --out\n")
    missing = tmp_path / "no.jsonl"
    expected = (2, f"error: {missing}: No such file or directory\n")
    assert ended(lambda config: missing.open(), capsys) == expected
    bad = raises(DataError("a.jsonl:3: no answer"))
    assert ended(bad, capsys, user_errors=(DataError,)) == (2, "error: a.jsonl:3: no answer\n")


def test_any_other_error_keeps_its_traceback(capsys):
    for error in (ValueError("ours"), DataError("not passed in"), AssertionError("n=3")):
        code, err = ended(raises(error), capsys)
        assert code == 1 and err.startswith("Traceback")
        assert err.splitlines()[-1].endswith(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("error", [None, UserError("no"), Diverged("nan"), MemoryError(), 7])
@pytest.mark.parametrize("hindered", [False, True])
def test_what_a_run_leaves_at_its_end_it_leaves_at_any_end(capsys, tmp_path, error, hindered):
    left, error = [], ValueError("a bug") if error == 7 else error

    def page(out):
        left.append(out)
        assert (out / "config.json").exists()
        if hindered:
            raise OSError("no room for it")

    def main(config):
        Run(tmp_path / "run", Config(), at_end=page)
        if error:
            raise error

    if error:
        code, err = ended(main, capsys)
        assert code == (2 if isinstance(error, UserError) else 1)
        said, _, hindrance = err.partition("at the end of the run: ")  # what is said comes first
        assert said.startswith(("error: ", "Traceback")) and str(error) in said
        assert hindrance == ("no room for it\n" if hindered else "")
    else:
        launch(main, SimpleNamespace())
    assert left == [tmp_path / "run"]
    left.clear()
    ended(main, capsys)  # the directory is another run's by now
    assert left == []


@pytest.mark.parametrize("error, stopped, leaves", [
    (None, None, True), (None, signal.SIGINT, True), (None, signal.SIGTERM, False),
    (MemoryError(), None, False), (ValueError("a bug"), None, False),
])  # fmt: skip
def test_of_several_ranks_that_torchrun_starts_again_none_is_kept_waiting(
    capsys, monkeypatch, error, stopped, leaves
):
    left = []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "first_to_fail", lambda: True)

    def main(config):
        launching.at_end.append(lambda: left.append("page"))
        launching.stop.signal = stopped
        if error:
            raise error

    try:
        launch(main, SimpleNamespace())
    except SystemExit:
        pass
    finally:
        launching.stop.signal = None
    assert bool(left) == leaves


def test_on_a_full_disk_nothing_more_is_written_and_nothing_is_left_over(
    capsys, monkeypatch, tmp_path
):
    left = []

    def main(config):
        launching.at_end.append(lambda: left.append("page"))
        raise OSError(errno.ENOSPC, "No room", "x/y.bin")

    assert ended(main, capsys)[0] == 1 and left == []

    def no_room(number):
        raise OSError(errno.ENOSPC, "No room")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError):
        write_file(tmp_path / "report.html", b"page")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_nan_names_the_step_and_the_last_checkpoint(capsys, tmp_path):
    save_state(tmp_path, 4, {"a": torch.zeros(1)})
    check_finite(3.0, 5, tmp_path)
    for loss in (float("nan"), torch.tensor(float("inf"))):
        code, err = ended(lambda config: check_finite(loss, 6, tmp_path), capsys)
        assert code == 1 and err.count("\n") == 1
        assert "at step 6" in err and "step_000004" in err
    with pytest.raises(Diverged, match="at step 6; try"):
        check_finite(float("nan"), 6, tmp_path / "none")


@pytest.mark.parametrize("wrapped", ["plain", "safetensors", "cause", "quota"])
def test_a_full_disk_ends_with_one_line_and_1(capsys, wrapped):
    def main(config):
        error = OSError(errno.EDQUOT if wrapped == "quota" else errno.ENOSPC, "No room", "x/y.bin")
        if wrapped == "safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        if wrapped == "cause":
            raise RuntimeError("unexpected pos 704 vs 598") from error
        raise error

    code, err = ended(main, capsys, SimpleNamespace(out="runs/x"))
    assert code == 1 and err.count("\n") == 1 and "the disk is full" in err and "--resume" in err
    assert ("x/y.bin" if wrapped in ("plain", "quota") else "runs/x") in err


def test_seeds_and_threads_are_set_before_main(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    drawn = []
    config = SimpleNamespace(seed=5, threads=3)
    for _ in range(2):
        launch(lambda config: drawn.append((torch.rand(1).item(), np.random.rand())), config)
    assert drawn[0] == drawn[1] and threads == [3, 3]


def test_a_device_that_cannot_be_used_is_refused_with_those_that_can():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="'?cpuu.*did you mean cpu"):
        pick_device("cpuu")
    with pytest.raises(UserError, match="--device cuda:99 can't be used"):
        pick_device("cuda:99")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_without_bf16_gets_fp16_and_a_line_that_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert usable_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert not capsys.readouterr().out
    assert usable_dtype(torch.bfloat16, gpu) == torch.float16
    said = capsys.readouterr().out
    assert "Tesla T4 has no bf16" in said and "in float16" in said
    assert usable_dtype(torch.float32, gpu) == torch.float32
    assert "in float32" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert usable_dtype(torch.bfloat16, gpu) == torch.bfloat16
    assert not capsys.readouterr().out


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_the_loop_save_and_return(capfd, tmp_path, number, code):
    saved = []

    def main(config):
        run = Run(tmp_path, Config())
        for step in range(1, 100):
            if step == 3:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # the same key press, delivered twice
            if run.stopping:
                return saved.append(step)

    with pytest.raises(SystemExit) as exit:
        launch(main, SimpleNamespace())
    assert exit.value.code == code and saved == [3]
    assert capfd.readouterr().err.count("press Ctrl-C again to quit now") == 1


def test_a_second_ctrl_c_quits_where_it_is(tmp_path):
    def main(config):
        Run(tmp_path, Config())
        os.kill(os.getpid(), signal.SIGINT)
        launching.stop.at -= 2  # two seconds later
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("went on")

    with pytest.raises(SystemExit) as exit:
        launch(main, SimpleNamespace())
    assert exit.value.code == 130


def full_disk(handle):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_a_save_in_the_background_ends_the_run_with_the_usual_line(
    tmp_path, monkeypatch, capsys
):
    """At the next step, or at the end where no other follows."""
    for steps_after in (True, False):
        goes_on = []

        def main(config):
            run, parts = (
                Run(tmp_path / str(steps_after), Config()),
                {"model": torch.nn.Linear(2, 2)},
            )
            monkeypatch.setattr(os, "fsync", full_disk)
            goes_on.append(run.goes_on("rl", 2, parts, every=4))
            while checkpoint.saving():
                time.sleep(0.01)
            monkeypatch.undo()
            if steps_after:
                goes_on.append(run.goes_on("rl", 3, parts, every=4))

        code, err = ended(main, capsys)
        assert code == 1 and "the disk is full; free some space, then --resume" in err
        assert goes_on == [True]


@pytest.mark.parametrize("piece, every, saves, waits", [
    (1, 6, [3, 6, 9, 12], False), (2, 6, [4, 8, 12], True), (2, 8, [4, 8, 12], False),
    (4, 6, [4, 8, 12], True), (1, 1, list(range(1, 13)), True), (1, 100, [], False),
])  # fmt: skip
def test_a_kill_loses_no_more_than_was_said(tmp_path, monkeypatch, piece, every, saves, waits):
    """Where a save is not waited for, a kill leaves the one before, until the next begins."""
    run, seen = Run(tmp_path, Config()), []
    monkeypatch.setattr(
        running, "save_state", lambda _, step, __, wait: seen.append((step, wait))
    )  # fmt: skip
    for done in range(piece, 13, piece):
        run.goes_on("rl", done, {}, every=every)
    assert seen == [(step, waits) for step in saves]
    kept = [0, *saves] if waits else [0, 0, *saves]  # when the next begins
    lost = [begun - left for left, begun in zip(kept, saves)]
    assert all(count <= max(every, piece) for count in lost)


@pytest.mark.parametrize("stopped, every", [(True, 100), (False, 1), (False, 9)])
def test_a_save_is_waited_for_on_ctrl_c_at_a_phases_end_and_where_it_would_come_too_late(
    tmp_path, monkeypatch, stopped, every
):
    run, parts = Run(tmp_path, Config()), {"model": torch.nn.Linear(2, 2)}
    launching.stop.signal = signal.SIGINT if stopped else 0
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.2), real(handle)))
    assert run.goes_on("rl", 5, parts, every=every) is not stopped
    assert checkpoint.latest(run.checkpoints("rl")) == 5 and not checkpoint.saving()


def test_ctrl_c_at_a_step_that_is_saved_leaves_its_checkpoint_as_it_is(tmp_path):
    """To write it anew would mean to have none for a moment."""
    run, parts = Run(tmp_path, Config()), {"model": torch.nn.Linear(2, 2)}
    assert run.goes_on("rl", 5, parts, every=5)
    launching.stop.signal = signal.SIGINT
    checkpoint.finish_saving()
    [saved] = run.checkpoints("rl").iterdir()
    before = saved.stat().st_ino
    assert not run.goes_on("rl", 5, parts, every=1) and saved.stat().st_ino == before
    assert not run.goes_on("rl", 6, parts, every=100) and checkpoint.latest(saved.parent) == 6


def test_a_second_ctrl_c_does_not_wait_for_a_save(tmp_path, monkeypatch):
    """Python would, before it ends."""
    release, real = threading.Event(), os.fsync

    def exit_at_once(code):
        raise RuntimeError(f"exit {code}")

    def main(config):
        run = Run(tmp_path, Config())
        monkeypatch.setattr(os, "fsync", lambda handle: (release.wait(), real(handle)))
        run.goes_on("rl", 2, {"model": torch.nn.Linear(2, 2)}, every=4)
        os.kill(os.getpid(), signal.SIGINT)
        launching.stop.at -= 2  # two seconds later
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "_exit", exit_at_once)
    with pytest.raises(RuntimeError, match="exit 130"):
        launch(main, SimpleNamespace())
    release.set()
    checkpoint.finish_saving()


RECIPE = """
import sys, time
from dataclasses import dataclass
import torch
from runtime.run import Run, flag, launch, parse, progress
from runtime.checkpoint import latest, load_state, save_state

@dataclass(frozen=True)
class Config:
    out: str = flag("run", "where")
    steps: int = flag(40, "updates")
    pause: float = flag(0.0, "seconds for each")
    resume: bool = flag(False, "continue")

def main(config):
    run = Run(config.out, config, resume=config.resume, may_change=("pause",))
    checkpoints = run.out / "checkpoints"
    start, state = latest(checkpoints) or 0, {"x": torch.zeros(5)}
    if start:
        state = load_state(checkpoints, start, state)
    run.rewind("rl", start)
    bar = progress(config.steps, "RL", initial=start)
    for step in range(start + 1, config.steps + 1):
        state["x"] = torch.sin(state["x"] + step)
        time.sleep(config.pause)
        run.log(phase="rl", step=step, x=state["x"].sum())
        stopping = run.stopping
        if step % 10 == 0 or stopping:
            save_state(checkpoints, step, state)
        bar.update()
        if stopping:
            return
    run.save_json("result.json", state["x"].tolist())

launch(main, parse(Config, {}))
"""


def test_ctrl_c_and_resume_give_what_an_uninterrupted_run_gives(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "recipe.py"]
    options = dict(cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
    cut = subprocess.Popen([*command, "--pause=0.1"], stderr=subprocess.PIPE, **options)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and cut.poll() is None
        time.sleep(0.02)
    cut.send_signal(signal.SIGINT)
    err = cut.communicate(timeout=30)[1]
    assert cut.returncode == 130 and "saving" in err and "Traceback" not in err
    done = metrics.read_text().count("\n")
    assert 3 <= done < 30
    subprocess.run([*command, "--resume"], check=True, capture_output=True, **options)
    subprocess.run([*command, "--out=whole"], check=True, capture_output=True, **options)
    for name in ("metrics.jsonl", "result.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
