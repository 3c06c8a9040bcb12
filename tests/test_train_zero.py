"""train_zero.py from end to end, on models that take a second: what it leaves, resuming, mistakes.

The reward is mostly the control "random", a coin for each text: it is the one that a model which
can do nothing yet learns from. Where a test kills the program, it runs in a process of its own.
"""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
import sample
import sft
import train_zero
from bench.readme import unexplained
from data.corpus import BILINGUAL, Mix
from data.problems import Problem, calc_chain
from data.tokenizer import Tokenizer
from model import Config as ModelConfig
from model import Transformer
from runtime import checkpoint
from runtime import launch as launching
from runtime import run as running
from runtime.pretrained import load_pretrained, save_pretrained
from runtime.run import launch, parse

ROOT = Path(__file__).parent.parent
SMALL = ["--questions", "2", "--group-size", "3", "--minibatches", "2", "--max-new-tokens", "8",
         "--eval-problems", "9", "--eval-samples", "2", "--reward", "random", "--save-every", "2",
         "--refresh", "4", "--threads", "1", "--device", "cpu"]  # fmt: skip
# Pretraining and RL.
WHOLE = [*SMALL, "--pretrain-steps", "4", "--force", "--steps", "6"]


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch):
    monkeypatch.setattr(train_zero, "draw_curve", lambda out: None)  # `whole` has the one drawn
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    launching.stop.signal = 0


def start(*argv) -> int:
    """train_zero.py in this process; its exit code."""
    launching.stop.signal = 0
    try:
        config = parse(train_zero.Config, train_zero.PRESETS, [str(arg) for arg in argv])
        launch(train_zero.main, config)
    except SystemExit as end:
        return end.code
    return 0


def command(*argv, program=("train_zero.py",)) -> subprocess.CompletedProcess:
    """train_zero.py in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *program, *map(str, argv)], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The directory of a small model that has the toy's tokenizer."""
    tokenizer = Tokenizer.toy()
    torch.manual_seed(0)
    config = ModelConfig.preset(
        "toy", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, moe_intermediate_size=8,
        max_position_embeddings=1024,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "base"
    save_pretrained(Transformer(config), path, tokenizer_files=tokenizer.files())
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of a run with pretraining, as the command line makes it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = command(*WHOLE, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def lines(out: Path, phase: str = "") -> list[dict]:
    """Of the phases whose name begins so."""
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"].startswith(phase)]


def untimed(rows: list[dict]) -> list[dict]:
    """What does not depend on the machine's mood."""
    moods = ("seconds_", "tokens_per_second_", "peak_")
    return [{k: v for k, v in row.items() if not k.startswith(moods)} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    for file in ("model/model.safetensors", "base/model.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert untimed(lines(a)) == untimed(lines(b))
    results = [json.loads((out / "result.json").read_text()) for out in (a, b)]
    assert results[0].keys() == results[1].keys()
    assert all(results[0][name] == results[1][name] for name in ("base", "zero"))


def refused(capsys, *argv) -> str:
    """The one line that a mistake is answered with; exit code 2."""
    capsys.readouterr()
    assert start(*argv) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1] == errors[0]
    return errors[0]


# --- what a run leaves


def test_readme_explains_every_metric(whole):
    assert not unexplained(whole / "metrics.jsonl")


def test_a_run_leaves_models_metrics_config_result_and_curve(whole):
    config = json.loads((whole / "config.json").read_text())
    assert (config["group_size"], config["steps"], config["seed"]) == (3, 6, 0)
    for name in ("base", "model"):
        assert {"config.json", "model.safetensors"} <= {f.name for f in (whole / name).iterdir()}
        assert Tokenizer.load(whole / name).vocab_size == Tokenizer.toy().vocab_size
    before, after = (load_file(whole / name / "model.safetensors") for name in ("base", "model"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > len(before) / 2  # RL has learned something
    assert not any("e_score_correction_bias" in name for name in moved)  # frozen in RL
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_the_curves_the_outputs_and_the_result(whole):
    page = (whole / "report.html").read_text()
    content = json.loads(page.split('id="data">')[1].split("</script>")[0])
    kept = (whole / "rollouts.jsonl").read_text().splitlines()
    assert len(content["groups"]) == len(kept) > 0
    assert content["result"] == json.loads((whole / "result.json").read_text())
    assert {"rl", "evaluate base"} <= {phase["name"] for phase in content["phases"]}


def test_the_result_has_what_readme_promises(whole):
    result = json.loads((whole / "result.json").read_text())
    assert result.keys() == {"base", "zero", "seconds"}
    measures = {"pass@1", "cons@2", "pass@2", "greedy", "format", "language", "tokens",
                "reflection", "by_level"}  # fmt: skip
    for name in ("base", "zero"):
        assert measures <= result[name].keys()
        assert result[name]["by_level"].keys() == {str(level) for level in range(2, 11)}
        assert 1 <= result[name]["tokens"] <= 8
    assert result["seconds"].keys() == {"pretrain", "rl", "eval"}
    assert all(seconds > 0 for seconds in result["seconds"].values())


def test_every_update_says_what_explains_a_flat_reward(whole):
    rl = lines(whole, "rl")
    assert [row["step"] for row in rl] == [1, 2, 3, 4, 5, 6]
    for row in rl:
        assert {"loss", "clip_fraction", "kl", "entropy", "mismatch", "grad_norm", "seconds_update",
                "tokens_per_second_update", "peak_mb_update"} <= row.keys()  # fmt: skip
    for row in rl[::2]:  # a rollout feeds two updates
        assert {"reward", "accuracy", "format", "language", "unparsed", "truncated", "tokens",
                "reflection", "groups_without_signal", "skipped", "seconds_rollout",
                "seconds_reference", "tokens_per_second_rollout"} <= row.keys()  # fmt: skip
        assert row["mismatch"] < 1e-5  # the first of the two is on-policy
    assert all("reward" not in row for row in rl[1::2])
    assert all(math.isfinite(row["grad_norm"]) for row in rl)
    assert any(row["grad_norm"] > 0 for row in rl)


def test_seconds_of_the_result_are_those_of_the_metrics(whole):
    seconds = json.loads((whole / "result.json").read_text())["seconds"]
    for name, phases in (("pretrain", ["pretrain"]), ("eval", ["evaluate"]),
                         ("rl", ["rollout", "reward", "reference", "update"])):  # fmt: skip
        logged = sum(row.get(f"seconds_{phase}", 0) for row in lines(whole) for phase in phases)
        assert seconds[name] == pytest.approx(logged, abs=0.01)


# --- resume = uninterrupted


def raise_signal(monkeypatch, module, name: str, call: int, number: int) -> None:
    """Have the process get a signal at the end of the call-th call of a function."""
    real, calls = getattr(module, name), []

    @functools.wraps(real)
    def wrapper(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(module, name, wrapper)


def save_pretraining_often(monkeypatch) -> None:
    real = train_zero.Run.goes_on

    def often(*args, every: int, **options) -> bool:
        return real(*args, every=2, **options)

    monkeypatch.setattr(train_zero.Run, "goes_on", often)


# In RL after update 5 has been logged, but not saved.
PLACES = {"pretraining": (sft, "sft_step", 3), "RL": (grpo, "step", 6)}


def killed_run(place: str, *argv: str) -> None:
    """In a process of its own: it does not come back."""
    monkeypatch = pytest.MonkeyPatch()
    save_pretraining_often(monkeypatch)
    raise_signal(monkeypatch, *PLACES[place], signal.SIGKILL)
    sys.exit(start(*argv))


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_killed_and_resumed_is_the_uninterrupted_one(
    whole, tmp_path, monkeypatch, place
):
    code = f"import test_train_zero, sys; test_train_zero.killed_run({place!r}, *sys.argv[1:])"
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; {code}"
    killed = command(*WHOLE, "--out", tmp_path / "run", program=("-c", code))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    phase, saved = {"pretraining": ("pretrain", 2), "RL": ("rl", 4)}[place]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints" / phase) == saved
    assert not (tmp_path / "run" / "result.json").exists()
    save_pretraining_often(monkeypatch)
    assert start(*WHOLE, "--out", tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_saves_and_the_resumed_run_is_the_uninterrupted_one(
    whole, tmp_path, monkeypatch, place
):
    with monkeypatch.context() as patch:
        raise_signal(patch, *PLACES[place], signal.SIGINT)
        assert start(*WHOLE, "--out", tmp_path / "run") == 128 + signal.SIGINT
    # Pretraining stops at once; RL when the updates of its rollout are done.
    phase, saved = {"pretraining": ("pretrain", 3), "RL": ("rl", 6)}[place]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints" / phase) == saved
    assert not (tmp_path / "run" / "result.json").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert start(*WHOLE, "--out", tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert start(*WHOLE, "--out", tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", whole)
    runs = (whole, tmp_path / "run")
    before, after = (json.loads((out / "result.json").read_text()) for out in runs)
    assert after["seconds"] == pytest.approx(before["seconds"], abs=0.01)  # nor does it take any


@pytest.mark.parametrize("name", ["save_json", "save_pretrained"])
def test_a_kill_between_a_line_and_its_file_leaves_no_line_twice(
    whole, tmp_path, monkeypatch, name
):
    """Of an evaluation, and of the competence of a base that is then saved."""
    module = train_zero.Run if name == "save_json" else sft
    real = getattr(module, name)

    def dies(*args, **kwargs):
        if name == "save_pretrained" or args[1] == "evaluation_base.json":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        assert start(*WHOLE, "--out", tmp_path / "run") == 128 + signal.SIGINT
    assert start(*WHOLE, "--out", tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


def test_no_more_than_one_interval_is_lost_where_it_is_no_multiple_of_the_minibatches(
    base, tmp_path, monkeypatch
):
    saved = []
    real = running.save_state
    monkeypatch.setattr(
        running, "save_state",
        lambda directory, step, state, **options: (
            saved.append(step), real(directory, step, state, **options)
        ),
    )  # fmt: skip
    flags = ["--minibatches", "2", "--save-every", "3", "--steps", "12", "--eval-problems", "1"]
    assert start(*SMALL, *flags, "--model", base, "--out", tmp_path / "run") == 0
    gaps = [b - a for a, b in zip([0, *saved], [*saved, 12])]
    assert max(gaps) <= 3


def test_a_finished_run_can_go_on_with_more_steps_and_is_measured_again(
    base, tmp_path, monkeypatch
):
    flags = [*SMALL, "--model", base, "--out", tmp_path / "run"]
    assert start(*flags, "--steps", "2") == 0
    first = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    measured, real = [], sample.evaluate

    def record(model, *args, **options):
        measured.append(model)
        return {**real(model, *args, **options), "tokens": 77.0}

    monkeypatch.setattr(sample, "evaluate", record)
    assert start(*flags, "--steps", "4", "--resume") == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != first
    assert [row["step"] for row in lines(tmp_path / "run", "rl")] == [1, 2, 3, 4]
    assert len(set(map(id, measured))) == 1  # the final model, and not the base again
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["zero"]["tokens"] == 77.0 != result["base"]["tokens"]


# --- the loop


def run_from(base: Path, out: Path, *flags) -> list[dict]:
    assert start(*SMALL, "--model", base, "--out", out, "--eval-problems", "1", *flags) == 0
    return lines(out, "rl")


def test_the_reference_is_replaced_by_the_policy_every_so_many_updates(base, tmp_path):
    flags = ["--steps", "6", "--lr", "0.01", "--warmup", "1"]
    kept = run_from(base, tmp_path / "kept", *flags, "--refresh", "100")
    fresh = run_from(base, tmp_path / "fresh", *flags, "--refresh", "2")
    assert kept[0]["kl"] == fresh[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert kept[2]["kl"] > 1e-4 and kept[4]["kl"] > kept[2]["kl"]
    for row in fresh[::2]:  # the updates are over when the next rollout begins
        assert row["kl"] == pytest.approx(0, abs=1e-9)
    for row in fresh[1::2]:
        assert row["kl"] > 1e-6


def test_the_learning_rate_rises_over_the_warm_up_and_stays(base, tmp_path, monkeypatch):
    shares, real = [], grpo.set_rates
    monkeypatch.setattr(
        grpo, "set_rates", lambda optimizers, share: (shares.append(share), real(optimizers, share))
    )
    run_from(base, tmp_path / "run", "--steps", "6", "--warmup", "4")
    assert shares == [0.25, 0.5, 0.75, 1, 1, 1]


def test_each_rollout_asks_new_questions_in_the_template(base, tmp_path, monkeypatch):
    asked, streams, real = [], [], grpo.draw_outputs

    def record(model, tokenizer, questions, *rest, **options):
        streams.append((options["seed"], options["step"]))
        pairs = zip(questions.problems, questions.prompts)
        asked.append([(problem.question, tokenizer.decode(prompt)) for problem, prompt in pairs])
        return real(model, tokenizer, questions, *rest, **options)

    monkeypatch.setattr(grpo, "draw_outputs", record)
    run_from(base, tmp_path / "toy", "--steps", "6")
    questions = [question for batch in asked for question, _ in batch]
    assert len(asked) == 3 and len(set(questions)) == 6
    assert len(set(streams)) == 3  # and draws its outputs from new numbers
    assert all(prompt == f"User: {q} Assistant:" for batch in asked for q, prompt in batch)
    held_out = calc_chain().held_out(225)
    assert not {each.question for each in held_out} & set(questions)
    asked.clear()
    run_from(base, tmp_path / "paper", "--steps", "2", "--template", "r1-zero")
    for question, prompt in asked[0]:
        assert prompt.startswith("A conversation between User and Assistant.")
        assert prompt.endswith(f"User: {question}. Assistant:")


def test_it_is_measured_as_it_samples_and_greedily(base, tmp_path, monkeypatch):
    """R1 evaluates at T = 0.6 and top-p 0.95; the curve here is of what RL trains."""
    options, real = [], sample.evaluate

    def record(*args, **kwargs):
        options.append((kwargs["temperature"], kwargs.get("top_p", 1.0), kwargs["samples"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "evaluate", record)
    run_from(base, tmp_path / "run", "--steps", "2")
    assert options == [(1.0, 1.0, 2), (0.0, 1.0, 1)] * 2


def test_a_base_stored_in_bfloat16_learns_at_the_rate_of_the_presets(base, tmp_path):
    """A step of 1e-6 is lost in a bf16 weight above 5e-4: the weights must be kept in fp32."""
    model = load_pretrained(base, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "half", tokenizer_files=Tokenizer.toy().files())
    flags = ["--lr", "1e-6", "--warmup", "1", "--steps", "6"]
    run_from(tmp_path / "half", tmp_path / "run", *flags)
    models = (tmp_path / "half", tmp_path / "run" / "model")
    before, after = (load_file(path / "model.safetensors") for path in models)
    moved = sum((before[name].float() != after[name].float()).sum().item() for name in before)
    assert moved > 0.5 * sum(tensor.numel() for tensor in before.values())


def test_a_rollout_feeds_several_updates_of_which_the_later_are_off_policy(base, tmp_path):
    rl = run_from(base, tmp_path / "run", "--steps", "4", "--lr", "0.01", "--warmup", "1")
    on, off = rl[0::2], rl[1::2]
    assert all(row["mismatch"] < 1e-5 for row in on)
    assert all(row["mismatch"] > 1e-3 for row in off)


def test_the_last_rollout_is_cut_short_where_the_steps_end(base, tmp_path):
    assert [row["step"] for row in run_from(base, tmp_path / "run", "--steps", "3")] == [1, 2, 3]


def test_the_longest_output_is_raised_in_the_middle(base, tmp_path):
    rl = run_from(base, tmp_path / "run", "--steps", "4", "--raise-at", "2",
                  "--raised-max-new-tokens", "20")  # fmt: skip
    assert rl[0]["tokens"] <= 8 < rl[2]["tokens"] <= 20


def test_shaping_is_told_only_where_it_is_on_and_its_limit_is_raised_with_the_cap(base, tmp_path):
    flags = ["--overlong-buffer", "4", "--repetition-penalty", "0.5"]
    raised = ["--raise-at", "2", "--raised-max-new-tokens", "30"]
    plain = run_from(base, tmp_path / "plain", "--steps", "4", *raised)
    shaped = run_from(base, tmp_path / "shaped", "--steps", "4", *flags, *raised)
    assert not any("overlong" in row or "repetition" in row for row in plain)
    first, second = [row for row in shaped if "reward" in row]
    assert first["overlong"] < 0 and first["repetition"] == 0  # hardly ten words in 8 tokens
    assert first["reward"] == pytest.approx(plain[0]["reward"] + first["overlong"])
    assert -first["truncated"] >= first["overlong"] >= -1 and second["overlong"] >= -1
    assert second["tokens"] > 8


def test_without_beta_the_reference_is_not_asked(base, tmp_path, monkeypatch):
    monkeypatch.delattr(grpo, "reference_logprobs")
    rl = run_from(base, tmp_path / "run", "--steps", "2", "--beta", "0")
    assert [row["kl"] for row in rl] == [0, 0]


@pytest.mark.parametrize(
    "flags",
    [("--aggregation", "token"), ("--ratio", "sequence"), ("--mask-truncated",),
     ("--replay-routes",), ("--no-normalize-std", "--aggregation", "constant"),
     ("--eps-high", "0.28")],
)  # fmt: skip
def test_each_variant_runs(base, tmp_path, flags):
    assert len(run_from(base, tmp_path / "run", "--steps", "2", *flags)) == 2


GOOD = "<think> x </think> <answer> 4 </answer>"
TIDY = "<think> x </think> <answer> 5 </answer>"
BARE = "4"


def test_the_rules_reward_accuracy_and_format_and_the_controls_do_not():
    config = train_zero.Config(format_weight=0.25)
    problem = Problem("compute 2 a +2 ?", "4")

    def earned(rule, *texts: str, finished: bool = True) -> list[float]:
        return rule([problem] * len(texts), list(texts), [finished] * len(texts))

    rules = train_zero.reward_rule(config)
    assert earned(rules, GOOD, TIDY, BARE) == [1.25, 0.25, 0]
    only_format = train_zero.reward_rule(replace(config, reward="format"))
    assert earned(only_format, GOOD, TIDY, BARE) == [1, 1, 0]
    for rule in (rules, only_format):  # what was cut off earns nothing, whatever stands there
        assert earned(rule, GOOD, TIDY, finished=False) == [0, 0]
    coin = train_zero.reward_rule(replace(config, reward="random"))
    texts = [f"<answer> {i} </answer>" for i in range(400)]
    tosses = earned(coin, *texts)
    assert set(tosses) == {0, 1} and 0.4 < sum(tosses) / 400 < 0.6
    assert tosses == earned(coin, *texts)
    other = train_zero.reward_rule(replace(config, reward="random", seed=1))
    assert tosses != earned(other, *texts)


def test_each_output_is_rewarded_for_its_own_question_and_end():
    rules = train_zero.reward_rule(train_zero.Config(format_weight=0.25))
    problems = [Problem("compute 2 a +2 ?", answer) for answer in ("4", "5", "4", "5")]
    texts, finished = [GOOD, GOOD, TIDY, TIDY], [True, True, True, False]
    assert rules(problems, texts, finished) == [1.25, 0.25, 0.25, 0]


# --- the base


@pytest.mark.parametrize("data, mix", [("calc-chain", Mix()), ("bilingual-chain", BILINGUAL)])
def test_a_base_reads_and_is_examined_on_the_corpus_of_its_task(tmp_path, monkeypatch, data, mix):
    read, examined, documents, solutions = [], [], sft.documents, sft.solutions
    monkeypatch.setattr(
        sft, "documents",
        lambda corpus, *rest: (read.append(corpus.mix), documents(corpus, *rest))[1],
    )  # fmt: skip
    monkeypatch.setattr(
        sft, "solutions", lambda seed, mix: (examined.append(mix), solutions(seed, mix))[1]
    )
    assert start(*SMALL, "--data", data, "--pretrain-steps", "2", "--out", tmp_path / "run") == 2
    assert read == [mix] * 2 and examined == [mix]


def test_bilingual_chains_have_a_base_with_their_own_words_and_are_asked_in_both_languages(
    tmp_path, monkeypatch
):
    asked, real = [], grpo.draw_outputs

    def record(model, tokenizer, questions, *rest, **options):
        asked.extend(zip(questions.problems, questions.prompts))
        return real(model, tokenizer, questions, *rest, **options)

    monkeypatch.setattr(grpo, "draw_outputs", record)
    out = tmp_path / "run"
    flags = ["--preset", "bilingual", *WHOLE, "--minibatches", "1", "--out", out]
    assert start(*flags) == 0
    tokenizer = Tokenizer.toy(bilingual=True)
    for name in ("base", "model"):
        assert Tokenizer.load(out / name).ranks == tokenizer.ranks
        rows = load_file(out / name / "model.safetensors")["lm_head.weight"].shape[0]
        assert rows == tokenizer.vocab_size
    assert {problem.language for problem, _ in asked} == {"en", "zh"}
    for problem, prompt in asked:
        assert tokenizer.decode(prompt) == f"User: {problem.question} Assistant:"
    result = json.loads((out / "result.json").read_text())
    assert result["zero"]["by_level"].keys() == {str(level) for level in range(2, 9)}


def test_pretraining_reads_on_in_the_corpus(tmp_path, monkeypatch):
    steps, real = [], sft.documents

    def record(corpus, tokenizer, step, tokens):
        steps.append(step)
        return real(corpus, tokenizer, step, tokens)

    monkeypatch.setattr(sft, "documents", record)
    flags = [*SMALL, "--pretrain-steps", "4", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        raise_signal(patch, sft, "sft_step", 3, signal.SIGINT)
        assert start(*flags) == 128 + signal.SIGINT
    assert start(*flags, "--resume") == 2  # it is not competent
    assert steps == [0, 1, 2, 3]


def test_an_incompetent_base_ends_the_run_with_the_reason_and_force_goes_on(tmp_path, capsys):
    flags = [flag for flag in WHOLE if flag != "--force"]
    error = refused(capsys, *flags, "--out", tmp_path / "run")
    assert re.search(r"base is not competent: .*\d%.*--pretrain-steps.*--force", error)
    assert not (tmp_path / "run" / "base").exists()
    assert start(*flags, "--out", tmp_path / "run", "--resume", "--force") == 0  # as it advises
    assert (tmp_path / "run" / "result.json").exists()


# --- data


def gsm8k(path: Path, count: int = 60, words: int = 3) -> Path:
    rows = [
        {"question": f"{'word ' * words}{i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_like_gsm8k_runs_through_and_says_why_nothing_is_learned(base, tmp_path, capsys):
    data = gsm8k(tmp_path / "train.jsonl")
    flags = ["--preset", "gsm8k", "--model", base, "--data", data, "--out", tmp_path / "run"]
    assert start(*flags, *SMALL, "--reward", "rules", "--steps", "2") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["zero"]["pass@1"] == 0
    assert [row["step"] for row in lines(tmp_path / "run", "rl")] == [1, 2]
    out = capsys.readouterr().out
    assert re.search(r"0.0% of the questions are ever solved .*gives RL nothing to reinforce", out)
    assert not (tmp_path / "run" / "base").exists()  # --model is the base


def test_the_preset_for_files_leaves_the_toy_model_room_for_a_question():
    """`--preset gsm8k --model runs/zero/model` runs through."""
    context = ModelConfig.preset("toy").max_position_embeddings
    config = parse(train_zero.Config, train_zero.PRESETS, ["--preset", "gsm8k", "--model", "x"])
    usual = 300  # bytes, for to the toy's tokenizer English is bytes
    assert context - config.max_new_tokens >= usual


def test_questions_that_are_too_long_are_skipped_and_counted(base, tmp_path):
    data = gsm8k(tmp_path / "train.jsonl")
    with data.open("a") as file:
        for i in range(60):
            file.write(json.dumps({"question": f"{'z' * 1100} {i}", "answer": "1"}) + "\n")
    flags = ["--model", base, "--data", data, "--questions", "10", "--steps", "2"]
    assert start(*SMALL, *flags, "--out", tmp_path / "run") == 0
    [first, _] = lines(tmp_path / "run", "rl")
    assert 0 < first["skipped"] < 10
    assert first["by_level"].keys() == {"0"}
    [measured, _] = lines(tmp_path / "run", "evaluate")
    assert measured["problems"] + measured["skipped"] <= 9 and measured["skipped"] > 0


def test_questions_that_are_all_too_long_are_an_error(base, tmp_path, capsys):
    data = gsm8k(tmp_path / "train.jsonl", words=300)
    test = gsm8k(tmp_path / "test.jsonl")
    flags = [*SMALL, "--model", base, "--data", data, "--out", tmp_path / "run"]
    assert re.search(r"none of \d+ problems fits", refused(capsys, *flags))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    error = refused(capsys, *flags, "--test-data", test)  # there is something to evaluate on
    assert re.search(r"none of 2 \w+ fits: the shortest prompt has \d+ tokens", error)


# --- mistakes


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--group-sise", "4"], "unknown flag --group-sise; did you mean --group-size?"),
        (["--preset", "gsm8"], "'gsm8' is not a preset; did you mean gsm8k?"),
        (["--steps", "many"], "--steps: 'many' is not a whole number"),
        (["--reward", "rule"], "--reward: 'rule' is not one of rules, format, random"),
        (["--data", "countdown"], "--data countdown needs --model DIR"),
        (["--preset", "gsm8k"], "--data train.jsonl needs --model DIR"),
    ],
)
def test_a_wrong_flag_is_answered_with_one_line(tmp_path, capsys, argv, words):
    assert words in refused(capsys, *argv, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_itself_answers_a_wrong_flag_with_one_line():
    done = command("--preset", "toi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "train_zero.py: error: --preset: 'toi' is not a preset; did you mean toy?"
        f" (there are {', '.join(train_zero.PRESETS)})\n"
    )


@pytest.mark.parametrize(
    "flag, value",
    [("--group-size", "1"), ("--temperature", "0"), ("--eps", "0"), ("--beta", "-1"),
     ("--questions", "0"), ("--minibatches", "0"), ("--refresh", "0"), ("--save-every", "0"),
     ("--eval-problems", "0"), ("--eval-samples", "0"), ("--max-new-tokens", "0"),
     ("--template", "r1"), ("--raise-at", "2")],
)  # fmt: skip
def test_a_setting_that_cannot_work_is_refused_before_anything_is_done(
    base, tmp_path, capsys, flag, value
):
    """And the line says which it was. --raise-at needs --raised-max-new-tokens."""
    error = refused(capsys, *SMALL, "--steps", "4", "--model", base, "--out", tmp_path / "run",
                    flag, value)  # fmt: skip
    assert flag[2:].replace("-", "_") in error.replace("-", "_") and value in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def spoilt_model(base: Path, tmp_path: Path, what: str) -> Path:
    path = tmp_path / "model"
    if what == "missing":
        return path
    shutil.copytree(base, path)
    if what == "truncated":
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        (path / what).unlink()
    return path


SPOILT = ["missing", "truncated", "config.json", "tokenizer.tiktoken", "tokenizer_config.json"]


@pytest.mark.parametrize("what", SPOILT)
def test_a_model_directory_that_cannot_be_read_is_named(base, tmp_path, capsys, what):
    path = spoilt_model(base, tmp_path, what)
    error = refused(capsys, *SMALL, "--model", path, "--out", tmp_path / "run")
    words = {"missing": "no model at", "truncated": "model.safetensors: truncated"}
    assert str(path) in error and words.get(what, what) in error


@pytest.mark.parametrize(
    "content, place",
    [("", ":1: found no problem"), ("\n\n", ":1: found no problem"),
     ('{"question": "1+1?", "answer": "#### 2"}\n{"question": \n', ":2: "),
     ('{"question": "1+1?", "answer": "2"}\n\n{"query": "?"}\n', ":3: ")],
)  # fmt: skip
def test_a_data_file_that_cannot_be_used_is_named_with_its_line(
    base, tmp_path, capsys, content, place
):
    data = tmp_path / "some.jsonl"
    data.write_text(content)
    good = gsm8k(tmp_path / "good.jsonl")
    for flags in (["--data", data], ["--data", good, "--test-data", data]):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        error = refused(capsys, *SMALL, "--model", base, *flags, "--out", tmp_path / "run")
        assert f"{data}{place}" in error


def test_a_data_file_that_is_missing_is_named(base, tmp_path, capsys):
    data = tmp_path / "none.jsonl"
    error = refused(capsys, *SMALL, "--model", base, "--data", data, "--out", tmp_path / "run")
    assert str(data) in error and "No such file" in error


def test_a_file_too_small_to_hold_out_from_is_refused_with_the_flag_that_helps(
    base, tmp_path, capsys
):
    few = gsm8k(tmp_path / "few.jsonl", count=1)
    error = refused(capsys, *SMALL, "--model", base, "--data", few, "--out", tmp_path / "run")
    assert "--test-data" in error


def test_the_held_out_part_of_generated_problems_can_be_the_test(base, tmp_path):
    data = gsm8k(tmp_path / "train.jsonl")
    flags = ["--model", base, "--data", data, "--test-data", "calc-chain", "--steps", "2"]
    assert start(*SMALL, *flags, "--out", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["zero"]["by_level"].keys() == {str(level) for level in range(2, 11)}


def test_a_refused_start_leaves_out_free_for_the_next_try(base, tmp_path, capsys):
    data = gsm8k(tmp_path / "good.jsonl")
    flags = [*SMALL, "--steps", "2", "--out", tmp_path / "run"]
    refused(capsys, *flags, "--model", base, "--data", tmp_path / "goood.jsonl")
    refused(capsys, *flags, "--model", tmp_path / "bass", "--data", data)
    assert start(*flags, "--model", base, "--data", data) == 0


def test_a_second_run_does_not_overwrite_the_first(whole, capsys):
    before = {f: f.read_bytes() for f in whole.rglob("*") if f.is_file()}
    assert "holds a run already: --resume continues it" in refused(capsys, *WHOLE, "--out", whole)
    other = refused(capsys, *WHOLE, "--out", whole, "--resume", "--lr", "0.5")
    assert "--lr was 0.0005, now 0.5" in other
    assert {f: f.read_bytes() for f in whole.rglob("*") if f.is_file()} == before


# --- divergence


def test_a_loss_that_is_no_number_stops_names_the_step_and_keeps_the_last_checkpoint(
    base, tmp_path, monkeypatch, capsys
):
    flags = [*SMALL, "--steps", "6", "--model", base]
    assert start(*flags, "--out", tmp_path / "good") == 0
    real, calls = grpo.step, []

    def poisoned(model, *args):
        calls.append(1)
        if len(calls) == 5:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.nan
        return real(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "step", poisoned)
        capsys.readouterr()
        assert start(*flags, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    kept = tmp_path / "run" / "checkpoints" / "rl" / "step_000004"
    assert error.startswith("error: the loss is nan at step 5") and f"{kept};" in error
    assert not (tmp_path / "run" / "model").exists()
    page = (tmp_path / "run" / "report.html").read_text()  # with what led there
    assert '"step":3' in page and page.count('"finished":') > 0
    assert start(*flags, "--out", tmp_path / "run", "--resume") == 0  # and it is whole
    good, again = (tmp_path / name / "model" / "model.safetensors" for name in ("good", "run"))
    assert good.read_bytes() == again.read_bytes()


def test_a_gradient_that_is_no_number_stops_too(base, tmp_path, monkeypatch, capsys):
    """The loss may be finite still; no update would ever be made again."""
    real, calls = sft.parallel.sum_gradients, []

    def poisoned(model):
        calls.append(1)
        if len(calls) >= 3:
            model.lm_head.weight.grad.fill_(math.inf)
        return real(model)

    monkeypatch.setattr(sft.parallel, "sum_gradients", poisoned)
    assert start(*SMALL, "--steps", "6", "--model", base, "--out", tmp_path / "run") == 1
    assert "step 3" in capsys.readouterr().err.splitlines()[-1]


def test_an_absurd_learning_rate_stops_with_the_step(base, tmp_path, capsys):
    flags = ["--steps", "8", "--lr", "1e30", "--model", base, "--out", tmp_path / "run"]
    assert start(*SMALL, *flags) == 1
    assert re.search(r"error: the (loss|gradient).* at step \d; .*--lr", capsys.readouterr().err)


# --- several processes


def test_torchrun_with_two_processes_makes_the_model_of_one(whole, tmp_path):
    program = ("-m", "torch.distributed.run", "--nproc_per_node=2", "train_zero.py")
    done = command(*WHOLE, "--out", tmp_path / "run", program=program)
    assert done.returncode == 0, done.stderr
    for name in ("base", "model"):
        runs = (whole, tmp_path / "run")
        one, two = (load_file(out / name / "model.safetensors") for out in runs)
        assert one.keys() == two.keys()
        for tensor in one:
            difference = (one[tensor] - two[tensor]).abs().max().item()
            assert difference < 1e-5, f"{name} {tensor} {difference}"
    for wanted, found in zip(lines(whole, "rl"), lines(tmp_path / "run", "rl"), strict=True):
        for key in ("step", "loss", "reward", "tokens", "kl", "groups_without_signal"):
            assert found.get(key) == pytest.approx(wanted.get(key), abs=1e-4), key
    assert done.stdout.count("of single steps right") <= 1  # one process speaks for both
