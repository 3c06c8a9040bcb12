"""distill.py from end to end, on models that take a second: the dataset, both students, the ledger.

A random teacher is never right, so a coin (a hash of the text) stands in for the verdict; and a
clock that ticks with the work stands in for the CPU's, so that what is compared is the same twice.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import distill
import grpo
import sample
import sft
from bench.readme import unexplained
from data.problems import Problem
from data.tokenizer import Tokenizer
from model import Config as ModelConfig
from model import Transformer
from runtime import launch as launching
from runtime.pretrained import save_pretrained
from runtime.run import launch, parse

ROOT = Path(__file__).parent.parent
HERE = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import test_distill; "
SIZES = ["--per-question", "2", "--epochs", "2", "--batch", "24", "--context", "128",
         "--points", "2",
         "--questions", "2", "--group-size", "2", "--minibatches", "2", "--rollouts", "2",
         "--max-new-tokens", "8", "--eval-problems", "7", "--eval-samples", "2",
         "--curve-problems", "3", "--curve-samples", "2", "--threads", "1",
         "--device", "cpu"]  # fmt: skip
WHOLE = [*SIZES, "--samples", "80", "--compare-rl"]


class Killed(BaseException):
    """Nothing catches it: what is not in a file is lost, as with SIGKILL."""


@pytest.fixture(autouse=True)
def process_as_it_was():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    logging.disable(logging.DEBUG)  # which pytest would collect: thousands of a checkpoint's
    yield
    logging.disable(logging.NOTSET)
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    launching.stop.signal = 0


def coin(problem: Problem, text: str, *rest) -> str:
    return "wrong" if hashlib.sha256(text.encode()).digest()[0] % 3 == 0 else "kept"


def controlled(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The verdict a coin; the clock a count of chunks sampled and updates made."""
    clock = SimpleNamespace(now=0.0)

    def ticking(module, name: str, seconds: float) -> None:
        real = getattr(module, name)

        @functools.wraps(real)
        def wrapper(*args, **kwargs):
            clock.now += seconds
            return real(*args, **kwargs)

        patch.setattr(module, name, wrapper)

    ticking(sft, "answers", 1)
    ticking(sft, "sft_step", 1)
    ticking(grpo, "step", 1)
    for module, name in ((distill, "evaluate"), (distill, "measure"), (sft, "pretrain_toy")):
        ticking(module, name, 1000)  # none of these is charged
    patch.setattr(distill, "CHUNK", 20)
    patch.setattr(sft, "verdict", coin)
    patch.setattr(distill, "time", SimpleNamespace(process_time=lambda: clock.now))
    patch.setattr(distill, "draw_distillation", lambda out: None)
    return clock


def start(*argv) -> int:
    """distill.py in this process; its exit code."""
    launching.stop.signal = 0
    try:
        config = parse(distill.Config, distill.PRESETS, [str(arg) for arg in argv])
        launch(distill.main, config, user_errors=(ValueError,))
    except SystemExit as end:
        return end.code
    return 0


def controlled_start(*argv) -> int:
    with pytest.MonkeyPatch.context() as patch:
        controlled(patch)
        return start(*argv)


def process(*argv) -> subprocess.CompletedProcess:
    """Python in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


def tiny(
    path: Path, tokenizer: Tokenizer, seed: int, preset: str = "toy-student",
    dtype: torch.dtype = torch.float32, **changes,
) -> Path:  # fmt: skip
    """A small model, dense by default, with random weights."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    config = ModelConfig.preset(preset, **{**settings, **changes})
    save_pretrained(Transformer(config).to(dtype), path, tokenizer_files=tokenizer.files())
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("models") / "teacher", Tokenizer.toy(bilingual=True), 0)


@pytest.fixture(scope="module")
def pair(teacher) -> list:
    """The flags of a teacher and a student."""
    student = tiny(teacher.with_name("student"), Tokenizer.toy(bilingual=True), 1)
    return ["--teacher", teacher, "--student", student]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pair) -> Path:
    """The directory of a run with both students."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert controlled_start(*WHOLE, *pair, "--out", out) == 0
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "dataset.jsonl").read_text().splitlines()]


def read(file: Path):
    return json.loads(file.read_text())


def assert_same_run(a: Path, b: Path) -> None:
    for file in ("dataset.jsonl", "curves.json", "result.json", "distilled/model.safetensors",
                 "rl/model.safetensors"):  # fmt: skip
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def refused(capsys, *argv) -> str:
    """The one line that a mistake is answered with; exit code 2."""
    capsys.readouterr()
    assert start(*argv) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in err, err
    return errors[0]


# --- the paper's settings


def test_the_presets_are_the_papers_table():
    rates = {"qwen-1.5b": ("Qwen2.5-Math-1.5B", 1e-4), "qwen-7b": ("Qwen2.5-Math-7B", 8e-5),
             "qwen-14b": ("Qwen2.5-14B", 7e-5), "qwen-32b": ("Qwen2.5-32B", 6e-5),
             "llama-8b": ("Llama-3.1-8B", 5e-5),
             "llama-70b": ("Llama-3.3-70B-Instruct", 2e-5)}  # fmt: skip
    assert distill.PRESETS.keys() == {"toy", *rates}
    for name, (base, lr) in rates.items():
        config = parse(distill.Config, distill.PRESETS, ["--preset", name])
        assert (Path(config.student).name, config.lr) == (base, lr)
        assert (config.batch, config.context, config.decay) == (64, 32768, 0.1)
        assert config.epochs in (2, 3) and config.samples == 800_000


def test_the_toys_student_is_small_and_dense():
    student = Transformer(ModelConfig.preset("toy-student"))
    assert 60_000 <= sum(p.numel() for p in student.parameters()) <= 120_000
    assert student.config.model_type == "qwen2" and not student.config.is_moe
    assert student.config.vocab_size == Tokenizer.toy(bilingual=True).vocab_size


# --- the dataset


def test_readme_explains_every_metric(whole):
    assert not unexplained(whole / "metrics.jsonl")


def test_the_dataset_is_lines_of_json_with_a_verdict_each(whole):
    found = rows(whole)
    assert len(found) == 80
    for row in found:
        assert {"question", "answer", "language", "checker", "response", "tokens",
                "verdict"} == row.keys()  # fmt: skip
    assert {row["verdict"] for row in found} == {"kept", "wrong"}
    assert all(found[i]["question"] == found[i + 1]["question"] for i in range(0, 80, 2))
    counted = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    [counted] = [line for line in counted if line["phase"] == "filter dataset"]
    kept = sum(row["verdict"] == "kept" for row in found)
    assert (counted["outputs"], counted["kept"], counted["wrong"]) == (80, kept, 80 - kept)


def test_no_held_out_question_is_in_the_dataset(whole):
    asked = {row["question"].split(" ", 1)[1].removesuffix(" ?") for row in rows(whole)}
    assert len(asked) > 35
    # corpus.py: a tenth of the problems, by the hash of what stands between `compute` and `?`.
    assert not [each for each in asked if hashlib.sha256(each.encode()).digest()[0] < 26]


def test_the_verdict_is_whether_an_output_is_right_and_readable(pair, tmp_path, monkeypatch):
    judges, problem = [], Problem("compute 1 a +5 ?", "6", language="en")
    monkeypatch.setattr(sft, "collect", lambda *args, judge, **kwargs: judges.append(judge))
    texts = ["<think> first 1 a +5 = 6 . so 6 . </think> <answer> 6 </answer>",
             "<think> first 1 a +5 = 6 。 所以 6 。 </think> <answer> 6 </answer>",
             "<think> easy , guess 7 . </think> <answer> 7 </answer>"]  # fmt: skip
    for i, share in enumerate(("0.95", "0.1")):
        out = tmp_path / str(i)
        start(*WHOLE, *pair, "--out", out, "--least-consistency", share)
        said = judges[-1]([problem] * 4, [*texts, texts[0]], [True, True, True, False])
        assert said == ["kept", ("mixed", "kept")[i], "wrong", "cut off"]


def test_a_teacher_that_is_never_right_leaves_nothing_to_learn_from(pair, tmp_path, capsys):
    error = refused(capsys, *WHOLE, *pair, "--out", tmp_path / "run")
    assert "0 of 80 outputs" in error and "dataset.jsonl" in error


# --- what the student learns


def learned(patch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Of each document that is trained on from now on: what is not learned, and what is."""
    found, real = [], sft.sft_step

    def sft_step(model, optimizers, batch, mask_BT=None, objective=sft.Objective()):
        for number in range(int(batch.documents_BT.max()) + 1) if mask_BT is not None else ():
            mine = batch.documents_BT == number
            parts = batch.tokens_BT[mine & ~mask_BT], batch.tokens_BT[mine & mask_BT]
            found.append(tuple(tokenizer.decode(part.tolist()) for part in parts))
        return real(model, optimizers, batch, mask_BT, objective)

    patch.setattr(sft, "sft_step", sft_step)
    return found


def test_r1_2_4_sft_learns_only_the_answers_of_the_kept_outputs(pair, tmp_path, monkeypatch):
    controlled(monkeypatch)
    found = learned(monkeypatch, Tokenizer.toy(bilingual=True))
    assert start(*WHOLE[:-1], *pair, "--out", tmp_path / "run") == 0
    end = "<|end_of_text|>"
    wanted = [
        (f"User: {row['question']} Assistant:", f" {row['response']}{end}")
        for row in rows(tmp_path / "run")
        if row["verdict"] == "kept"
    ]
    assert sorted(found) == sorted(wanted * 2)  # two epochs
    assert read(tmp_path / "run" / "result.json").keys() == {"teacher", "base", "distilled"}


def test_a_student_with_its_own_tokenizer_and_a_paper_preset(teacher, tmp_path, monkeypatch):
    tokenizer = Tokenizer.toy()
    tokenizer.template = "r1-zero"
    assert tokenizer.vocab_size != Tokenizer.load(teacher).vocab_size
    student = tiny(tmp_path / "student", tokenizer, 1)
    questions = [{"question": f"what is {i} + 1 ?", "answer": str(i + 1)} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(each) for each in questions))
    controlled(monkeypatch)
    found = learned(monkeypatch, tokenizer)
    out = tmp_path / "run"
    data = ["--data", tmp_path / "train.jsonl", "--test-data", tmp_path / "train.jsonl"]
    arguments = ["--preset", "qwen-1.5b", "--teacher", teacher, "--student", student, "--out", out]
    sizes = [*SIZES, "--samples", "40", "--context", "512", "--compare-rl"]
    assert start(*arguments, *sizes, *data) == 0
    kept = [row for row in rows(out) if row["verdict"] == "kept"]
    assert len(found) == 2 * len(kept) > 10
    assert all(
        prompt.endswith(" Assistant:") and "<think> </think>" in prompt for prompt, _ in found
    )
    asked = {prompt.split("User: ")[-1].removesuffix(". Assistant:") for prompt, _ in found}
    assert asked == {row["question"] for row in kept}
    assert Tokenizer.load(out / "distilled").template == "r1-zero"
    assert read(out / "config.json")["lr"] == 1e-4
    assert not (out / "base").exists()  # it is the student's directory
    assert read(out / "result.json").keys() == {"teacher", "base", "distilled", "rl"}


def test_examples_longer_than_the_context_are_left_out(capsys):
    tokenizer = Tokenizer.toy(bilingual=True)
    found = [
        dict(question="compute 1 a +5 ?", response="<think> first " + "so " * n) for n in (1, 90)
    ]
    config = distill.Config(context=40)
    lab = SimpleNamespace(tokenizer=tokenizer, config=config, run=SimpleNamespace(out=Path("x")))
    [kept] = distill.examples(found, lab)
    assert len(kept.prompt) + len(kept.answer) <= 40
    assert "1 of them are longer than --context 40" in capsys.readouterr().out


# --- two students of the same base, at the same cost


def test_both_students_start_from_the_base_that_a_preset_pretrains(teacher, tmp_path, monkeypatch):
    starts, out = [], tmp_path / "run"

    def first(*args, **kwargs) -> bool:
        starts.append({name: value.clone() for name, value in args[0].state_dict().items()})
        with torch.no_grad():
            args[0].lm_head.weight.add_(1)  # as if it had learned something
        return False

    controlled(monkeypatch)
    monkeypatch.setattr(distill, "distill", lambda model, rows, lab: not first(model))
    monkeypatch.setattr(grpo, "reinforce", first)
    assert start(*WHOLE, "--teacher", teacher, "--pretrain-steps", "2", "--out", out) in (0, None)
    base = load_file(out / "base" / "model.safetensors")
    assert len(starts) == 2
    for weights in starts:
        assert all(torch.equal(weights[name], value) for name, value in base.items())


def test_rl_stops_when_it_has_cost_as_much_as_distilling_and_the_samples(whole):
    saved = read(whole / "curves.json")
    spent, curves = saved["spent"], saved["curves"]
    kept = sum(row["verdict"] == "kept" for row in rows(whole))
    updates = 2 * -(-kept // 24)  # two epochs
    # Two chunks of 20 questions, a tick each; nothing but sampling and updates counts.
    assert spent["samples"] == 2 and spent["distilled"] == updates
    budget = 2 + updates
    assert curves["rl"][-1]["seconds"] == spent["rl"] >= budget > curves["rl"][-2]["seconds"]
    assert spent["rl"] < budget + 4  # the updates of a part
    assert [point["step"] for point in curves["rl"]] == list(range(0, len(curves["rl"]) * 4, 4))
    assert curves["distilled"][0]["step"] == 0 and curves["distilled"][-1]["step"] == updates
    assert len(curves["distilled"]) == 3  # two parts
    assert read(whole / "result.json").keys() == {"teacher", "base", "distilled", "rl"}
    for result in read(whole / "result.json").values():
        assert {"pass@1", "cons@2", "greedy", "by_level"} <= result.keys()


def test_the_table_charges_the_samples_to_one_column_only():
    spent = {"samples": 10.0, "distilled": 10.0, "rl": 20.0}
    points = {"distilled": ((0, 0.1), (5, 0.4), (10, 0.8)), "rl": ((0, 0.1), (12, 0.2), (20, 0.3))}
    curves = {
        name: [{"seconds": seconds, "pass@1": value} for seconds, value in curve]
        for name, curve in points.items()
    }
    lines = distill.compare(spent, curves, rows=4).splitlines()[-5:]
    values = [[float(value) for value in line.split()] for line in lines]
    assert values == [[0, 0.1, 0.1, 0.1], [5, 0.1, 0.4, 0.1], [10, 0.1, 0.8, 0.1],
                      [15, 0.4, 0.8, 0.2], [20, 0.8, 0.8, 0.3]]  # fmt: skip


def test_the_curves_are_drawn(whole):
    pytest.importorskip("matplotlib")
    distill.draw_distillation(whole)
    assert (whole / "distill.png").read_bytes().startswith(b"\x89PNG")


# --- resume = uninterrupted

PLACES = {"sampling": (sft, "answers"), "distillation": (sft, "sft_step"),
          "an evaluation": (distill, "evaluate"), "RL": (grpo, "step")}  # fmt: skip


def interrupted(place: str, call: int, stop: Callable[[], None], *argv) -> int:
    """A run in which stop() is called at the end of the call-th call at this place."""
    module, name = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        controlled(patch)
        real, calls = getattr(module, name), []

        @functools.wraps(real)
        def wrapper(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append(1)
            if len(calls) == call:
                stop()
            return result

        patch.setattr(module, name, wrapper)
        return start(*argv)


@pytest.mark.parametrize(
    "place, call", [("sampling", 1), ("distillation", 3), ("an evaluation", 2)]
)
def test_a_run_that_was_killed_and_started_again_is_the_uninterrupted_one(
    whole, pair, tmp_path, place, call
):
    def kill():
        raise Killed

    arguments = [*WHOLE, *pair, "--out", tmp_path / "run"]
    with pytest.raises(Killed):
        interrupted(place, call, kill, *arguments)
    assert not (tmp_path / "run" / "result.json").exists()
    assert controlled_start(*arguments) == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("place, asked", [("sampling", 40), ("distillation", 80), ("RL", 80)])
def test_ctrl_c_saves_and_the_same_command_goes_on(whole, pair, tmp_path, place, asked):
    """At the first update, in the middle of a part: what was done of it is neither lost nor paid
    twice."""

    def press():
        os.kill(os.getpid(), signal.SIGINT)

    arguments = [*WHOLE, *pair, "--out", tmp_path / "run"]
    assert interrupted(place, 1, press, *arguments) == 130
    assert not (tmp_path / "run" / "result.json").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert len(rows(tmp_path / "run")) == asked  # it does not first finish what it is at
    assert controlled_start(*arguments) == 0
    assert_same_run(tmp_path / "run", whole)


def test_what_is_finished_is_not_done_again(whole, pair, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("done again")

    shutil.rmtree(whole / "checkpoints")  # nobody needs them any more
    before = {file: file.read_bytes() for file in whole.rglob("*")
              if file.suffix not in (".png", ".html") and file.is_file()
              and file.name != "metrics.jsonl"}  # fmt: skip
    controlled(monkeypatch)
    for module, name in ((sample, "generate"), (sft, "generate"), (grpo, "generate"),
                         (sft, "sft_step"), (grpo, "step")):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    assert start(*WHOLE, *pair, "--out", whole) == 0
    assert {file: file.read_bytes() for file in before} == before


def test_rl_can_be_asked_for_later(whole, pair, tmp_path):
    arguments = [*WHOLE[:-1], *pair, "--out", tmp_path / "run"]
    assert controlled_start(*arguments) == 0
    assert controlled_start(*arguments, "--compare-rl") == 0
    assert_same_run(tmp_path / "run", whole)


def test_two_processes_make_the_same_dataset_and_both_students(whole, pair, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(HERE + "sys.exit(test_distill.controlled_start(*sys.argv[1:]))")
    arguments = [*WHOLE, *pair, "--out", tmp_path / "run"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = process(*launcher, program, *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/dataset.jsonl").read_bytes() == (whole / "dataset.jsonl").read_bytes()
    spent = [read(out / "curves.json")["spent"] for out in (whole, tmp_path / "run")]
    assert spent[1]["distilled"] == 2 * spent[0]["distilled"]  # the seconds of both
    for name in ("distilled", "rl"):
        a, b = (load_file(out / name / "model.safetensors") for out in (whole, tmp_path / "run"))
        assert all(torch.allclose(a[key], b[key], atol=1e-2) for key in a)


@pytest.mark.slow
def test_two_processes_share_the_teachers_experts_out_and_both_students_are_as_alone(
    pair, tmp_path
):
    shape = dict(preset="toy", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
                 v_head_dim=8, n_routed_experts=4, moe_intermediate_size=8)  # fmt: skip
    tokenizer = Tokenizer.toy(bilingual=True)
    teacher = tiny(tmp_path / "teacher", tokenizer, 0, dtype=torch.float64, **shape)
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*WHOLE, *pair, "--teacher", teacher, "--samples", "40", "--dtype", "float64"]
    arguments += ["--epochs", "1", "--ep"]
    assert controlled_start(*arguments, "0", "--out", one) == 0
    program = tmp_path / "program.py"
    program.write_text(HERE + "sys.exit(test_distill.controlled_start(*sys.argv[1:]))")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    done = process(*launcher, *arguments, "2", "--out", two)
    assert done.returncode == 0, done.stderr
    assert (one / "dataset.jsonl").read_bytes() == (two / "dataset.jsonl").read_bytes()
    for name in ("distilled", "rl"):
        a, b = (load_file(out / name / "model.safetensors") for out in (one, two))
        assert max((a[key] - b[key]).abs().max() for key in a) < 1e-9


def test_experts_are_shared_out_only_by_what_has_experts(teacher, pair, tmp_path, monkeypatch):
    flags = [*WHOLE, *pair, "--out", tmp_path / "run", "--ep", "2"]
    monkeypatch.setattr(distill.parallel, "world_size", lambda: 2)
    dense = distill.shape_of(str(teacher))
    config = parse(distill.Config, distill.PRESETS, [str(flag) for flag in flags])
    assert distill.ep_of(config, ModelConfig.preset("toy")) == 2
    assert distill.ep_of(config, dense) == 1
    with pytest.raises(distill.UserError, match="--ep 2: .* the model is dense"):
        distill.prepare(config)  # neither the teacher nor the student
    for ep in (None, 0, 1):
        assert distill.ep_of(dataclasses.replace(config, ep=ep), dense) == ep


# --- mistakes


def test_a_changed_config_is_refused_with_the_difference(whole, pair, capsys):
    error = refused(capsys, *WHOLE, *pair, "--out", whole, "--lr", "0.5")
    assert "--lr was" in error and "now 0.5" in error


def test_a_missing_teacher_is_told_how_to_make_one(tmp_path, capsys):
    error = refused(capsys, "--teacher", tmp_path / "none", "--out", tmp_path / "run")
    assert str(tmp_path / "none") in error and "python train_r1.py" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--student", "toy-studnet"], "toy-student"),
        (["--data", "train.jsonl"], "--student DIR"),
        (["--samples", "9", "--per-question", "2"], "--per-question"),
        (["--minibatches", "99"], "--questions"),
        (["--batch", "0"], "at least 1"),
        (["--decay", "0"], "--decay"),
        (["--group-size", "1"], "group_size"),
        (["--template", "chat"], "r1-zero"),
        (["--max-new-tokens", "4000"], "max_position_embeddings"),
    ],
)
def test_a_mistake_is_told_in_one_line(teacher, tmp_path, capsys, flags, told):
    few = ["--pretrain-steps", "1", "--eval-problems", "1", "--eval-samples", "1"]
    assert told in refused(capsys, "--teacher", teacher, "--out", tmp_path / "run", *few, *flags)


def test_questions_that_no_rule_checks_are_refused(pair, tmp_path, capsys):
    question = dict(question="say hello", answer="hello", checker="judge")
    (tmp_path / "train.jsonl").write_text(json.dumps(question))
    data = ["--data", tmp_path / "train.jsonl", "--test-data", tmp_path / "train.jsonl"]
    assert "no rule checks" in refused(capsys, *WHOLE, *pair, *data, "--out", tmp_path / "run")
