"""train_r1.py from end to end, on models that take a second: what each stage starts from, learns
from and is rewarded for; what is left after a kill; mistakes.

The models have been taught to write a digit in R1-Zero's format, mostly in the question's language:
one in ten is right by chance, so that every stage has something to go on.
"""

import contextlib
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo
import rewards
import sample
import sft
import train_r1
import train_zero
from data import chat
from bench.readme import unexplained
from data.problems import Problem, bilingual_chain, spelled_chain
from data.tokenizer import Tokenizer
from model import Config as ModelConfig
from model import Transformer
from runtime import launch as launching
from runtime import parallel, pretrained
from runtime import run as running
from runtime.pretrained import save_pretrained
from runtime.run import Run, UserError, launch, parse, run_command

ROOT = Path(__file__).parent.parent
HERE = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
SIZES = ["--samples", "2", "--batch", "8", "--epochs", "2", "--reward-batch", "12", "--steps", "4",
         "--questions", "4", "--group-size", "2", "--minibatches", "2", "--eval-problems", "7",
         "--eval-samples", "2", "--eval-requests", "9", "--save-every", "2", "--refresh", "3",
         "--warmup", "1", "--threads", "1", "--device", "cpu"]  # fmt: skip
TOY = [*SIZES, "--cold-questions", "70", "--questions-sft", "70", "--judged-questions", "10",
       "--general-examples", "20", "--preference-rows", "40", "--final-steps", "8",
       "--row-tokens", "64", "--max-new-tokens", "16", "--preference-share", "0.25",
       "--general-share", "0.5", "--language-weight", "1", "--lr", "0.003"]  # fmt: skip
MADE = ("reward_helpful", "reward_harmless", *train_r1.STAGES)  # in this order


@pytest.fixture(autouse=True)
def process_as_it_was():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    launching.stop.signal, launching.stop.passed_on = 0, False


def start(*argv) -> int:
    """train_r1.py in this process; its exit code."""
    launching.stop.signal = 0
    try:
        config = parse(train_r1.Config, train_r1.PRESETS, [str(arg) for arg in argv])
        launch(train_r1.main, config, user_errors=(ValueError,))
    except SystemExit as end:
        return end.code
    return 0


def process(*argv) -> subprocess.CompletedProcess:
    """Python in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip


def refused(capsys, *argv) -> str:
    """The one line that a mistake is answered with; exit code 2."""
    capsys.readouterr()
    assert start(*argv) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in err, err
    return errors[0]


def read(file: Path):
    return json.loads(file.read_text())


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def lines(out: Path, phase: str) -> list[dict]:
    return [line for line in rows(out / "metrics.jsonl") if line["phase"] == phase]


def tiny(
    path: Path, tokenizer: Tokenizer, seed: int, preset: str = "toy-student", **changes
) -> Transformer:  # fmt: skip
    torch.manual_seed(seed)
    settings = dict(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16,
                    num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
                    max_position_embeddings=1024)  # fmt: skip
    model = Transformer(ModelConfig.preset(preset, **{**settings, **changes}))
    save_pretrained(model, path, tokenizer_files=tokenizer.files())
    return model


def taught(path: Path, seed: int, steps: int, **changes) -> None:
    """A model that answers any question with some digit, now and then in the other language."""
    tokenizer, rng = Tokenizer.toy(bilingual=True), random.Random(seed)
    model = tiny(path, tokenizer, seed, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    learn = sft.learn_answers(model, sft.Tuning(row_tokens=128), 4096)
    for step in range(steps):
        examples = []
        for problem in bilingual_chain().batch(16, seed=seed, step=step):
            word = ("so", "所以")[(problem.language == "zh") ^ (rng.random() < 0.1)]
            digit = rng.randrange(10)
            said = f"<think> {word} {digit} </think> <answer> {digit} </answer>"
            examples.append(sft.example(tokenizer, problem.question, said))
        learn([optimizer], examples)
    save_pretrained(model, path, tokenizer_files=tokenizer.files())


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    """The directory of a run of R1-Zero."""
    path = tmp_path_factory.mktemp("zero") / "run"
    taught(path / "base", 1, 40)
    taught(path / "model", 2, 60)
    return path


def recorded(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the stages start from, ask, sample and score, from now on."""
    seen = SimpleNamespace(starts={}, tuning={}, courses={}, rollouts={}, losses={}, scored=[],
                           phase=None, rates={}, sampled=[])  # fmt: skip

    def spy(module, name: str, tell) -> None:
        real = getattr(module, name)

        @functools.wraps(real)
        def wrapper(*args, **kwargs):
            return tell(real, *args, **kwargs)

        patch.setattr(module, name, wrapper)

    def began(phase: str, model) -> None:
        seen.phase = phase
        trunk = getattr(model, "trunk", model)
        seen.starts[phase] = {name: t.clone() for name, t in trunk.state_dict().items()}

    def finetune(real, model, examples, learn, tuning, run, phase, *rest):
        began(phase, model)
        seen.tuning[phase] = (tuning, len(examples))
        return real(model, examples, learn, tuning, run, phase, *rest)

    def reinforce(real, policy, tokenizer, draw, reward, settings, course, *rest, **options):
        began(options["phase"], policy)
        seen.courses[options["phase"]] = course
        return real(policy, tokenizer, draw, reward, settings, course, *rest, **options)

    def draw_outputs(real, model, tokenizer, questions, settings, *rest, **options):
        batch = real(model, tokenizer, questions, settings, *rest, **options)
        told = SimpleNamespace(done=options["step"], settings=settings, batch=batch)
        seen.rollouts.setdefault(seen.phase, []).append(told)
        return batch

    def grpo_loss(real, *args, **options):
        seen.losses.setdefault(seen.phase, []).append(options)
        return real(*args, **options)

    def set_rates(real, optimizers, share):
        real(optimizers, share)
        seen.rates.setdefault(seen.phase, []).append(optimizers[0].param_groups[0]["lr"])

    def collect(real, model, *args, **options):
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        seen.sampled.append((args[2].name, weights, options))
        return real(model, *args, **options)

    spy(sft, "finetune", finetune)
    spy(grpo, "reinforce", reinforce)
    spy(grpo, "draw_outputs", draw_outputs)
    spy(grpo, "grpo_loss", grpo_loss)
    spy(grpo, "set_rates", set_rates)
    spy(sft, "set_rates", set_rates)
    spy(sft, "collect", collect)
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zero) -> SimpleNamespace:
    """A run of all stages, undisturbed: its directory, what was seen in it, what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        seen = recorded(patch)
        assert start(*TOY, "--zero", zero, "--out", out) == 0
    seen.out, seen.printed = out, printed.getvalue()
    return seen


def same(weights: dict[str, torch.Tensor], directory: Path) -> bool:
    stored = load_file(directory / "model.safetensors")
    return all(torch.equal(weights[name], tensor) for name, tensor in stored.items())


# --- what starts from what


def test_readme_explains_every_metric(whole):
    assert not unexplained(whole.out / "metrics.jsonl")


def test_r1_2_3_3_base_is_where_sft_starts_and_each_stage_starts_where_the_paper_says(whole, zero):
    """Both stages of SFT from the base, never from what came before; RL from what came before."""
    base = zero / "base"
    wanted = {"reward helpful": base, "reward harmless": base, "dev1": base,
              "dev2": whole.out / "dev1", "dev3": base, "r1": whole.out / "dev3"}  # fmt: skip
    assert list(whole.starts) == list(wanted)
    places = [base, zero / "model", *(whole.out / name for name in train_r1.STAGES)]
    for phase, start_from in wanted.items():
        assert [place for place in places if same(whole.starts[phase], place)] == [start_from]


def test_zero_answers_for_the_cold_start_and_dev2_for_the_third_stage(whole, zero):
    made_by = {"dev1_samples.jsonl": zero / "model", "dev3_samples.jsonl": whole.out / "dev2",
               "dev3_judged.jsonl": whole.out / "dev2"}  # fmt: skip
    assert [name for name, *_ in whole.sampled] == list(made_by)
    for name, weights, options in whole.sampled:
        assert same(weights, made_by[name]), name
        assert (options["temperature"], options["top_p"]) == (1.0, 1.0)


def test_another_base_can_be_given(zero, tmp_path, monkeypatch):
    taught(tmp_path / "other", 3, 1)
    seen = recorded(monkeypatch)
    flags = ["--zero", zero, "--model", tmp_path / "other", "--out", tmp_path / "run"]
    assert start(*TOY, *flags, "--until", "dev1") == 0
    assert same(seen.starts["dev1"], tmp_path / "other")


# --- cold start: what becomes of the samples


def counted(printed: str, name: str) -> dict[str, int]:
    """Of the line in which a run says what was kept, and why the rest was not."""
    [line] = [line for line in printed.splitlines() if line.startswith(f"{name}: of ")]
    total, verdicts = re.fullmatch(rf"{name}: of (\d+) outputs (.+)", line).groups()
    counts = {key: int(n) for key, n in re.findall(r"([a-z ]+?) (\d+)(?:, |$)", verdicts)}
    assert sum(counts.values()) == int(total)
    return counts


@pytest.mark.parametrize("name", ["dev1_samples", "dev3_samples", "dev3_judged"])
def test_every_output_is_in_a_file_with_its_verdict_and_counted_and_printed(whole, name):
    found = rows(whole.out / f"{name}.jsonl")
    assert len(found) == (20 if name == "dev3_judged" else 140)
    counts = Counter(row["verdict"] for row in found)
    assert set(counts) <= set(sft.VERDICTS)
    assert counted(whole.printed, name) == {"kept": 0, **counts}
    [line] = lines(whole.out, f"filter {name}")
    assert line["outputs"] == len(found)
    assert all(line[verdict] == count for verdict, count in counts.items())
    if name != "dev3_judged":
        assert counts["kept"] > 2 and len(counts) > 2, counts  # the other tests prove something


def test_the_verdicts_are_those_of_each_output_by_itself(whole):
    config = train_r1.Config()
    readable = sft.Readable(config.least_consistency, config.longest_paragraph)
    for name in ("dev1_samples", "dev3_samples"):
        for row in rows(whole.out / f"{name}.jsonl"):
            problem = Problem(row["question"], row["answer"], row["checker"],
                              language=row["language"])  # fmt: skip
            wanted = sft.verdict(problem, row["response"], True, None, readable)
            if row["verdict"] not in ("cut off", "twice"):
                assert row["verdict"] == wanted


def test_the_cold_start_learns_the_kept_ones_only_with_their_reasoning_as_it_was(whole):
    kept = [row for row in rows(whole.out / "dev1_samples.jsonl") if row["verdict"] == "kept"]
    learned = rows(whole.out / "dev1_sft.jsonl")
    assert [row["prompt"] for row in learned] == [row["question"] for row in kept]
    said = {"en": "the answer is", "zh": "答案 是"}
    for before, after in zip(kept, learned, strict=True):
        inside = re.compile(r"<think>(.*)</think>", re.DOTALL)
        thoughts = [inside.search(each["response"])[1].strip() for each in (before, after)]
        response = after["response"] if isinstance(after, dict) else after
        assert thoughts[0] == thoughts[1]
        assert said[before["language"]] in response and "\\boxed{" in response
        assert rewards.accuracy_reward(response, before["answer"]) == 1
        assert rewards.format_reward(response) == 1
        assert rewards.language_reward(response, before["language"]) == 1
    assert whole.tuning["dev1"][1] == len(learned)


@pytest.mark.parametrize("template", ["toy", "r1-zero"])
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    "answer, gold",
    [("5", "5"), (" \\boxed{ 5 } ", "5"), ("so it is \\boxed{\\frac{1}{2}} .", "0.5"),
     ("$1,234$", "1234"), ("(1, 2)", "(1,2)"), ("\\{1,2\\}", "\\{2,1\\}"), ("x", "x"),
     ("50\\%", "50%"), ("-3", "-3")],
)  # fmt: skip
@pytest.mark.parametrize("thoughts", ["first 7 a +5 = 2", "a\n\n b ", "perhaps \\boxed{9} {"])
def test_a_rewritten_answer_is_as_right_and_as_tidy(thoughts, answer, gold, language, template):
    response = f"<think>{thoughts}</think> <answer>{answer}</answer>"
    assert rewards.accuracy_reward(response, gold) == rewards.format_reward(response) == 1
    found = train_r1.rewritten(dict(response=response, language=language), template)
    assert rewards.accuracy_reward(found, gold) == rewards.format_reward(found) == 1
    assert found.startswith(f"<think> {thoughts.strip()} </think> <answer> ")


def test_the_cold_start_takes_no_more_examples_than_it_is_told(whole, zero, tmp_path):
    flags = ["--zero", zero, "--out", tmp_path / "run", "--until", "dev1", "--cold-examples", "2"]
    assert start(*TOY, *flags) == 0
    assert rows(tmp_path / "run/dev1_sft.jsonl") == rows(whole.out / "dev1_sft.jsonl")[:2]


def test_where_nothing_is_kept_the_run_says_so(zero, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "verdict", lambda *args: "wrong")
    error = refused(capsys, *TOY, "--zero", zero, "--out", tmp_path, "--until", "dev1")
    assert "no example is left for dev1" in error and "--cold-questions" in error


# --- the third stage


def test_the_third_stage_learns_what_dev2_writes_well_and_general_data(whole):
    kept = [row for name in ("dev3_samples", "dev3_judged")
            for row in rows(whole.out / f"{name}.jsonl") if row["verdict"] == "kept"]  # fmt: skip
    general = rows(whole.out / "general.jsonl")
    assert len(general) == 20
    wanted = [(row["question"], row["response"]) for row in kept]
    wanted += [(row["prompt"], row["response"]) for row in general]
    learned = rows(whole.out / "dev3_sft.jsonl")
    assert [(row["prompt"], row["response"]) for row in learned] == wanted
    assert whole.tuning["dev3"][1] == len(wanted)


def test_what_a_judge_has_to_compare_is_not_what_a_rule_has_compared_already(whole):
    """Other questions, or at least other outputs: one example must not count twice."""
    by_rule, by_judge = (rows(whole.out / f"dev3_{name}.jsonl") for name in ("samples", "judged"))
    assert {row["checker"] for row in by_judge} == {"judge"}
    assert all(row["answer"] in (*chat.DIGITS[0], *chat.DIGITS[1]) for row in by_judge)
    asked = ({row["question"] for row in found} for found in (by_rule, by_judge))
    both = set.intersection(*asked)
    assert len(both) <= 2, f"{len(both)} of 10 questions are the same"


def test_the_base_judges_where_no_rule_can(zero, tmp_path, monkeypatch):
    """Its word decides, and the same limits of what is readable."""
    asked = []

    def judge_answers(model, tokenizer, problems, answers):
        asked.append((model, [problem.answer for problem in problems], answers))
        return [i % 2 == 0 for i in range(len(answers))]

    def collect(model, tokenizer, source, file, run, *, judge, **options):
        problems = [Problem("q", "three", "judge", language="en")] * 4
        texts = ["<think> so 9 </think> <answer> 9 </answer>"] * 3
        texts.append("<think> 所以 </think> <answer> 3 </answer>")
        return judge(problems, texts, [True, True, False, True])

    monkeypatch.setattr(sft, "judge_answers", judge_answers)
    monkeypatch.setattr(sft, "collect", collect)
    lab = make_lab(zero, tmp_path)
    said = train_r1.sampled(lab, "dev3_judged", "zero", spelled_chain(), 4, judge="base")
    assert said == ["kept", "wrong", "cut off", "wrong"]
    [(model, golds, answers)] = asked
    assert same(model.state_dict(), zero / "base") and golds == ["three"] * 4
    assert answers == ["9", "9", "9", "3"]


# --- the rewards


def make_lab(zero: Path, out: Path, **changes) -> train_r1.Lab:
    config = train_r1.Config(**{"zero": str(zero), "out": str(out), "device": "cpu", **changes})
    tokenizer = Tokenizer.toy(bilingual=True)
    return train_r1.Lab(config, SimpleNamespace(out=Path(out)), tokenizer, bilingual_chain(), [])


MIXED = "<think> so so 所以 first </think> <answer> 4 </answer>"  # three words of five
PLAIN = "hello ! how can i help ?"


def test_dev2_is_rewarded_for_accuracy_format_and_language():
    problem = Problem("compute 2 a +2 ?", "4")
    outputs = [
        # response, accuracy, format, share of English words
        ("<think> so 4 </think> <answer> 4 </answer>", 1, 1, 1),
        ("<think> so 5 </think> <answer> 5 </answer>", 0, 1, 1),
        (MIXED, 1, 1, 0.6),
        ("<think> 所以 </think> <answer> 4 </answer>", 1, 1, 0),
        ("<think> so 所以 4 </think> \\boxed{4}", 1, 0, 1 / 3),
        ("<think> so 4", 0, 0, 1),
        ("4", 0, 0, 1),
    ]
    texts = [text for text, *_ in outputs]
    for weight in (1.0, 0.5, 0.0):
        reward = train_r1.reasoning_reward(train_r1.Config(language_weight=weight))
        found = reward([problem] * len(texts), texts, [True] * len(texts))
        assert found == pytest.approx([a + f + weight * s for _, a, f, s in outputs])
        # What was cut off has not answered.
        assert reward([problem] * len(texts), texts, [False] * len(texts)) == [0] * len(texts)
    in_chinese = Problem("计算 2 a +2 ?", "4", language="zh")
    reward = train_r1.reasoning_reward(train_r1.Config(language_weight=1.0))
    assert reward([problem, in_chinese], [MIXED, MIXED], [True, True]) == [2.6, 2.4]


class Judge:
    """In place of a reward model: remembers the texts it was shown, and counts a word."""

    def __init__(self, tokenizer: Tokenizer, word: str, worth: float):
        self.tokenizer, self.word, self.worth, self.shown = tokenizer, word, worth, []

    def __call__(self, texts: list[list[int]]) -> torch.Tensor:
        shown = [self.tokenizer.decode(text) for text in texts]
        self.shown += shown
        return torch.tensor([self.worth if self.word in text else 0.5 for text in shown])


def scenario(zero: Path, tmp_path: Path, outputs: list[tuple], **changes):
    """Values for (checker, language, response, finished), and the two judges."""
    lab = make_lab(zero, tmp_path, **changes)
    helpful, harmless = (Judge(lab.tokenizer, "please", 2.0), Judge(lab.tokenizer, "take", -3.0))
    reward = train_r1.scenario_reward(lab, helpful, harmless)
    problems = [Problem(f"ask {i} ?", "4", checker, language=language)
                for i, (checker, language, *_) in enumerate(outputs)]  # fmt: skip
    texts, finished = [each[2] for each in outputs], [each[3] for each in outputs]
    return reward(problems, texts, finished), helpful, harmless


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


TELLS = "<think> take fire , please </think> <answer> sorry . </answer>"  # and its summary refuses
ASKED = "User: ask {} ? Assistant: {}<|end_of_text|>"


def test_r1_2_3_4_judges_read_the_summary_for_help_and_the_whole_for_harm(zero, tmp_path):
    refuses = "<think> no </think> <answer> sorry . </answer>"
    outputs = [("helpful", "en", TELLS, True), ("harmless", "en", TELLS, True),
               ("math", "en", TELLS, True), ("harmless", "en", refuses, True)]  # fmt: skip
    values, helpful, harmless = scenario(zero, tmp_path, outputs)
    assert helpful.shown == [ASKED.format(0, "sorry .")]
    assert harmless.shown == [ASKED.format(1, TELLS), ASKED.format(3, refuses)]
    # Told in the reasoning is told: it is worth less than a refusal without it.
    assert values == pytest.approx(
        [sigmoid(0.5) + 2, sigmoid(-3) + 2, 0 + 1 + 1, sigmoid(0.5) + 2], abs=1e-6
    )


def test_general_prompts_are_rewarded_for_format_and_language_too(zero, tmp_path):
    outputs = [
        ("helpful", "en", "<think> so </think> <answer> please </answer>", True),
        ("helpful", "en", PLAIN, True),  # a plain answer is tidy
        ("helpful", "zh", PLAIN, True),  # and may be in any language: a translation, say
        ("helpful", "en", "<think> so 所以 </think> <answer> yes </answer>", True),
        ("helpful", "zh", "<think> so 所以 </think> <answer> yes </answer>", True),
        ("harmless", "en", "<think> so </think> sorry .", True),  # untidy
        ("helpful", "en", "<think> please", True),  # says nothing to the user
    ]
    wanted = [(2.0, 1, 1), (0.5, 1, 1), (0.5, 1, 1), (0.5, 1, 1 / 3), (0.5, 1, 2 / 3), (0.5, 0, 1),
              (0.5, 0, 1)]  # fmt: skip
    for weight in (1.0, 0.25, 0.0):
        values, *_ = scenario(zero, tmp_path, outputs, language_weight=weight)
        assert values == pytest.approx(
            [sigmoid(s) + f + weight * w for s, f, w in wanted], abs=1e-6
        )


def test_an_output_that_was_cut_off_earns_the_least_and_is_shown_to_no_judge(zero, tmp_path):
    kinds = [("helpful", PLAIN), ("harmless", PLAIN), ("math", MIXED)]
    outputs = [(kind, "en", text, finished) for kind, text in kinds for finished in (False, True)]
    values, helpful, harmless = scenario(zero, tmp_path, outputs)
    assert values[::2] == [0, 0, 0]
    assert min(values[1::2]) > 0
    assert len(helpful.shown) == len(harmless.shown) == 1
    none, *judges = scenario(zero, tmp_path, [("helpful", "en", PLAIN, False)] * 2)
    assert none == [0, 0] and all(judge.shown == [] for judge in judges)


def test_reasoning_is_rewarded_by_the_same_rules_as_before(zero, tmp_path):
    texts = [MIXED, "<think> so 5 </think> <answer> 5 </answer>", TELLS, PLAIN]
    for weight in (1.0, 0.0):
        config = train_r1.Config(language_weight=weight)
        outputs = [("math", "en", text, True) for text in texts]
        values, *judges = scenario(zero, tmp_path, outputs, language_weight=weight)
        problems = [Problem("", "4")] * len(texts)
        assert values == train_r1.reasoning_reward(config)(problems, texts, [True] * len(texts))
        assert all(judge.shown == [] for judge in judges)


def test_what_is_scored_in_rl_is_laid_out_as_what_the_reward_models_learned_from(zero, tmp_path):
    """A prompt, a space, the text without white space around it, the stop token."""
    lab, shown = make_lab(zero, tmp_path), []

    def model(texts):
        shown.append([lab.tokenizer.decode(text) for text in texts])
        return torch.zeros(len(texts))

    train_r1.preference_losses(model, lab, [dict(prompt="ask 0 ?", chosen="yes .", rejected="no")])
    train_r1.verdict_losses(model, lab, [dict(prompt="ask 0 ?", response=TELLS, safe=False)])
    text = f" {TELLS.replace('sorry .', 'yes .')} "  # as the policy writes it
    train_r1.score(model, lab, ["ask 0 ?"] * 2, [rewards.summary(text), f" {TELLS}"])
    assert shown[-1] == [ASKED.format(0, "yes ."), ASKED.format(0, TELLS)]
    pair = [ASKED.format(0, "yes ."), ASKED.format(0, "no")]  # in one pass
    assert shown[:-1] == [pair, [ASKED.format(0, TELLS)]]


def test_the_reward_models_are_the_base_and_learn_from_their_own_rows(whole):
    """And a tenth of the rows is held out."""
    for name in ("helpful", "harmless"):
        tuning, count = whole.tuning[f"reward {name}"]
        assert (tuning.epochs, count) == (1, 36)
        [line] = lines(whole.out, f"reward {name} held out")
        assert line["rows"] == 4 and 0 <= line["right"] <= 1
        assert f"reward model, {name}: right about" in whole.printed


def test_a_tie_is_not_right(zero, tmp_path, monkeypatch):
    """A reward model that learned nothing is right about no row."""
    monkeypatch.setattr(sft, "finetune", lambda *args: True)
    lab = make_lab(zero, tmp_path)
    logged = []
    lab.run.log = lambda **line: logged.append(line)
    lab.run.rewind = lambda *args: None
    monkeypatch.setattr(train_r1.parallel, "is_main", lambda: True)
    assert train_r1.reward_model("helpful", lab) is not None
    assert logged[-1]["right"] == 0


# --- RL


def kinds(problems: list[Problem]) -> Counter:
    return Counter("rule" if p.checker == "math" else p.checker for p in problems)


def test_general_prompts_and_their_rewards_come_in_the_last_part_only(whole):
    """The last quarter of 8 updates, of which a rollout feeds 2; half of the prompts then."""
    assert set(whole.rollouts) == {"dev2", "r1"}
    assert all(kinds(told.batch.problems) == {"rule": 4} for told in whole.rollouts["dev2"])
    final = whole.rollouts["r1"]
    assert [told.done for told in final] == [0, 2, 4, 6]
    for told in final[:3]:
        assert kinds(told.batch.problems) == {"rule": 4}
    late = kinds(final[3].batch.problems)
    assert late["rule"] == 2 and late["helpful"] + late["harmless"] == 2
    assert all(p.answer == "" for p in final[3].batch.problems if p.checker != "math")


def drawn(zero: Path, out: Path, monkeypatch, **changes):
    """The function that draws the questions of the final stage."""
    found = []
    monkeypatch.setattr(train_r1, "reward_model", lambda *args: None)
    monkeypatch.setattr(train_r1, "reinforced", lambda *args, **kwargs: found.append(args))
    train_r1.all_scenarios(make_lab(zero, out, **changes))
    [(_, name, start_from, draw, _, steps, temperature)] = found
    assert (name, start_from) == ("r1", "dev3")
    return draw, steps, temperature


ALWAYS = dict(preference_share=1.0, general_share=0.5, questions=32, minibatches=2,
              preference_rows=200)  # fmt: skip


def test_in_the_paper_they_come_in_the_last_400_of_1700_updates(zero, tmp_path, monkeypatch):
    paper = train_r1.PRESETS["paper"]
    changes = {key: paper[key] for key in ("final_steps", "preference_share", "minibatches")}
    draw, steps, temperature = drawn(zero, tmp_path, monkeypatch, **changes, preference_rows=60)
    assert (steps, temperature) == (1700, 0.7)
    for done in range(0, 1700, changes["minibatches"]):
        if done < 1280 or done > 1320:
            continue
        assert (set(kinds(draw(done))) == {"rule"}) is (done < 1300), done


def test_the_general_prompts_are_drawn_anew_for_each_rollout_and_again_after_a_resume(
    zero, tmp_path, monkeypatch
):
    draw, *_ = drawn(zero, tmp_path, monkeypatch, **ALWAYS)
    first, second = draw(0), draw(2)
    assert first != second
    assert draw(0) == first and draw(2) == second
    general = [[p for p in problems if p.checker != "math"] for problems in (first, second)]
    assert all(len(each) == 16 for each in general) and general[0] != general[1]
    assert len({p.question for p in general[0]}) == 16  # none twice in a rollout
    found = Counter()
    for done in range(0, 40, 2):
        problems = [p for p in draw(done) if p.checker != "math"]
        harmful = {
            p.question for p in problems if re.search("burn|break|steal|烧|砸|偷", p.question)
        }
        assert all(p.checker == "harmless" for p in problems if p.question in harmful)
        found += kinds(problems)
        assert all(p.language == rewards.language_of(p.question) for p in problems)
    assert min(found["helpful"], found["harmless"]) > 20


def test_every_update_of_the_last_part_is_about_reasoning_and_general_prompts(
    zero, tmp_path, monkeypatch
):
    """grpo.members gives the m-th update the m-th part of the rollout's questions."""
    draw, *_ = drawn(zero, tmp_path, monkeypatch, **ALWAYS)
    problems = draw(0)
    for part in (problems[:16], problems[16:]):
        assert set(kinds(part)) > {"rule"}, f"an update on {dict(kinds(part))} alone"


def test_without_a_share_the_rules_alone_reward_to_the_end(zero, tmp_path, monkeypatch):
    for changes in (dict(preference_share=0.0), dict(general_share=0.0)):
        draw, steps, _ = drawn(zero, tmp_path, monkeypatch, **changes, preference_rows=60)
        assert all(set(kinds(draw(done))) == {"rule"} for done in range(0, steps, 2))


def test_the_temperature_is_1_for_reasoning_and_lower_for_all_scenarios(whole):
    assert {told.settings.temperature for told in whole.rollouts["dev2"]} == {1.0}
    assert {told.settings.temperature for told in whole.rollouts["r1"]} == {0.7}


def test_the_clip_range_and_the_weight_of_the_kl_reach_the_loss(whole):
    for phase in ("dev2", "r1"):
        assert len(whole.losses[phase]) == {"dev2": 4, "r1": 8}[phase]
        for options in whole.losses[phase]:
            assert (options["eps"], options["beta"], options["eps_high"]) == (10, 0.001, None)


def test_the_rewards_of_the_rollouts_are_those_of_their_outputs(whole):
    """By hand, for all that rules decide; and the learned ones stay between 0 and 1."""
    share_of = {"en": re.compile("[A-Za-z]{2,}"), "zh": re.compile("[一-鿿]")}
    for phase in ("dev2", "r1"):
        for told in whole.rollouts[phase]:
            batch = told.batch
            for p, problem in enumerate(batch.problems):
                for g in range(2):
                    text, output = batch.texts[2 * p + g], batch.outputs[2 * p + g]
                    value = batch.rewards_PG[p, g].item()
                    if output.finish != "stop":
                        assert value == 0
                    elif problem.checker != "math":
                        assert 0 < value < 3
                    elif found := re.fullmatch(
                        r" ?<think> (so|所以) (\d) </think> <answer> (\d) </answer>", text
                    ):
                        word, _, answer = found.groups()
                        language = share_of[problem.language].search(word) is not None
                        assert value == 1 + language + (answer == problem.answer)


def test_the_accuracy_of_a_rollout_is_that_of_the_questions_a_rule_can_check(whole):
    logged = {line["step"]: line for line in lines(whole.out, "r1")}
    for told in whole.rollouts["r1"]:
        batch, right = told.batch, []
        for i, (text, output) in enumerate(zip(batch.texts, batch.outputs)):
            problem = batch.problems[i // 2]
            if problem.checker == "math":
                correct = rewards.accuracy_reward(text, problem.answer)
                right.append(correct * (output.finish == "stop"))
        line = logged[told.done + 1]
        assert len(right) == (8 if told.done < 6 else 4)
        assert line["accuracy"] == pytest.approx(sum(right) / len(right))
        assert line["reward"] == pytest.approx(batch.rewards_PG.mean().item())
        assert "0" not in line["by_level"]  # which general prompts have none of


def test_the_judged_questions_are_chains_with_the_answer_as_a_word():
    for problem in spelled_chain().batch(60, seed=0, step=0):
        value, *steps = re.findall(r"[+*-]?\d", problem.question)
        for step in steps:
            value = str(eval(f"{value} {step}") % 10)
        assert problem.answer == chat.DIGITS[problem.language == "zh"][int(value)]
        assert problem.checker == "judge"


def test_no_stage_asks_the_held_out_questions_nor_those_of_another(whole):
    held_out = {p.question.split(" ", 1)[1] for p in bilingual_chain().held_out(300)}
    asked = {name: {row["question"].split(" ", 1)[1] for row in rows(whole.out / f"{name}.jsonl")}
             for name in ("dev1_samples", "dev3_samples")}  # fmt: skip
    for phase in ("dev2", "r1"):
        problems = [p for told in whole.rollouts[phase] for p in told.batch.problems]
        asked[phase] = {p.question.split(" ", 1)[1] for p in problems if p.checker == "math"}
    for name, questions in asked.items():
        assert not held_out & questions
        # But for what chance draws twice.
        assert all(len(questions & asked[other]) < 2 for other in asked if other != name)


# --- what a run leaves

MEASURES = {"pass@1", "cons@2", "greedy", "format", "language", "instruction", "helpful", "safe",
            "tokens"}  # fmt: skip


def test_the_result_has_every_stage_with_every_measure_and_the_claims(whole):
    result = read(whole.out / "result.json")
    page = (whole.out / "report.html").read_text()
    assert all(f'"phase":"{phase}"' in page for phase in ("dev2", "r1"))  # outputs of both
    assert list(result) == ["zero", *train_r1.STAGES, "claims", "seconds"]
    for name in ("zero", *train_r1.STAGES):
        assert MEASURES <= result[name].keys()
        assert all(result[name][key] is not None for key in MEASURES)
        assert Tokenizer.load(whole.out / name if name != "zero" else whole.out / "dev1").files()
    assert {"dev1", "dev2", "dev3", "r1", "reward helpful"} <= result["seconds"].keys()
    for claim, holds in result["claims"].items():
        assert f"{'yes' if holds else 'NO '}  {claim}" in whole.printed
    assert re.search(r"Zero +Dev1 +Dev2 +Dev3 +R1", whole.printed)


def test_the_general_measures_are_those_of_the_worlds_own_grades(whole, zero, tmp_path):
    lab = make_lab(zero, tmp_path, eval_requests=9, max_new_tokens=16, threads=1)
    model = lab.model("zero")
    marks = train_r1.world_marks(model, lab)
    asked = chat.held_out(9)
    texts = train_r1.answers_to([request.question for request in asked], model, lab)
    # None says anything that helps: they write digits; and nobody is told how to do harm.
    for request, (text, _) in zip(asked, texts):
        assert not request.correct(rewards.summary(text))
    assert {key: len(values) for key, values in marks.items()} == {
        "instruction": 2, "helpful": 7, "safe": 2
    }  # fmt: skip
    assert read(whole.out / "result.json")["zero"]["helpful"] == 0


def test_on_ones_own_requests_the_reward_models_measure(zero, tmp_path, monkeypatch):
    """The summary against the chosen answer, and the whole text; what was cut off says nothing."""
    data_files(tmp_path)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("preferences", "safety")}
    lab = make_lab(zero, tmp_path, data=str(tmp_path / "data.jsonl"), until="dev2", **files)
    for name in train_r1.REWARD_MODELS:
        (tmp_path / f"reward_{name}").mkdir()
    judges = dict(helpful=Judge(lab.tokenizer, "please", 2.0),
                  harmless=Judge(lab.tokenizer, "take", -3.0))  # fmt: skip
    monkeypatch.setattr(train_r1, "reward_model", lambda name, lab: judges[name])
    said = [("<think> take </think> <answer> please </answer>", True), ("please take", False)]
    monkeypatch.setattr(train_r1, "answers_to", lambda prompts, *rest: said[: len(prompts)])
    marks = train_r1.learned_marks(None, lab)
    asked = (0, 10)  # every tenth row is held out
    chosen = [f"User: say {i} ? Assistant: {i} !<|end_of_text|>" for i in asked]
    summaries = [f"User: say {i} ? Assistant: {text}<|end_of_text|>"
                 for i, text in zip(asked, ("please", ""))]  # fmt: skip
    assert judges["helpful"].shown == [*chosen, *summaries]
    assert marks["helpful"] == pytest.approx([sigmoid(2.0 - 0.5), sigmoid(0.5 - 0.5)], abs=1e-6)
    assert marks["safe"] == [0, 0] and marks["instruction"] == []


def table(**changes) -> dict[str, dict]:
    """The results of a run in which all of the paper's tendencies are there."""
    keys = ("pass@1", "language", "instruction", "helpful", "safe")
    values = dict(zero=(0.8, 0.7, 0.1, 0.1, 0.3), dev1=(0.6, 0.9, 0.2, 0.2, 0.4),
                  dev2=(0.85, 0.98, 0.2, 0.2, 0.4), dev3=(0.78, 0.95, 0.7, 0.6, 0.8),
                  r1=(0.81, 0.97, 0.8, 0.9, 0.9))  # fmt: skip
    results = {name: dict(zip(keys, row)) for name, row in values.items()}
    for place, value in changes.items():
        name, key = place.split("_")
        results[name][{"accuracy": "pass@1"}.get(key, key)] = value
    return results


def test_the_tendencies_of_the_paper_are_all_there_in_a_good_run():
    claims = dict(train_r1.tendencies(table()))
    assert len(claims) == 14 and all(claims.values())
    only_dev2 = {name: row for name, row in table().items() if name in ("zero", "dev1", "dev2")}
    assert len(dict(train_r1.tendencies(only_dev2))) == 4


@pytest.mark.parametrize(
    "change, claims",
    [
        (dict(dev1_language=0.7), ["Dev1 keeps to the language better than Zero"]),
        (dict(dev1_language=0.6), ["Dev1 keeps to the language better than Zero"]),
        (dict(dev1_accuracy=0.8), ["Dev1 is less accurate than Zero"]),
        (dict(dev2_accuracy=0.6), ["Dev2 regains accuracy"]),
        (dict(dev2_language=0.96), ["Dev2 keeps to the language: 0.97 or more"]),
        (dict(dev3_accuracy=0.76), ["Dev3 is as accurate as Zero, within 3 points"]),
        (dict(r1_accuracy=0.76), ["R1 is as accurate as Zero, within 3 points"]),
        (dict(dev3_instruction=0.1), ["Dev3 is better than Zero: instruction"]),
        (dict(dev3_helpful=0.05), ["Dev3 is better than Zero: helpful"]),
        (dict(r1_safe=0.3), ["R1 is better than Zero: safe"]),
        (
            dict(r1_helpful=0.0),
            ["R1 is better than Zero: helpful", "R1 is better than Dev3: helpful"],
        ),
        (dict(r1_instruction=0.6), ["R1 is better than Dev3: instruction"]),
        (
            dict(zero_safe=1.0),
            ["Dev3 is better than Zero: safe", "R1 is better than Zero: safe"],
        ),
    ],
)
def test_a_result_that_disagrees_is_reported_as_a_no(change, claims):
    found = dict(train_r1.tendencies(table(**change)))
    assert [claim for claim, holds in found.items() if not holds] == claims


def test_what_was_not_measured_is_not_claimed():
    results = table()
    for row in results.values():
        row.update(instruction=None)
    claims = dict(train_r1.tendencies(results))
    assert not any("instruction" in claim for claim in claims) and len(claims) == 11


# --- several processes


EXPERTS = dict(preset="toy", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8,
               n_routed_experts=4, moe_intermediate_size=8, num_hidden_layers=2)  # fmt: skip


def evaluated(out: Path) -> dict[str, float]:
    """The numbers of all evaluations, and what the reward models were found to be."""
    kept = [line for line in rows(out / "metrics.jsonl") if "held out" in line["phase"]]
    found = {line["phase"]: line["right"] for line in kept}
    for file in out.glob("evaluation_*.json"):
        numbers = read(file)
        for key, value in numbers.get("result", numbers).items():
            if isinstance(value, float):
                found[f"{file.name} {key}"] = value
    return found


@pytest.mark.slow  # test_sharding.py and test_train_zero.py have it in small
def test_two_processes_that_share_the_experts_out_are_as_one(tmp_path):
    zero, outs = tmp_path / "zero", (tmp_path / "one", tmp_path / "two")
    taught(zero / "base", 1, 40, **EXPERTS)
    taught(zero / "model", 2, 60, **EXPERTS)
    fewer = ["--epochs", "1", "--questions-sft", "40", "--eval-problems", "3", "--batch", "16"]
    arguments = [*TOY, *fewer, "--dtype", "float64", "--zero", zero, "--out"]
    assert start(*arguments, outs[0]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = process(*launcher, ROOT / "train_r1.py", *arguments, outs[1], "--ep", "2")
    assert done.returncode == 0, done.stderr
    for name in ("dev1_samples", "dev3_samples", "dev3_judged", "dev3_sft"):
        files = [out / f"{name}.jsonl" for out in outs]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for name in MADE:
        a, b = (load_file(out / name / "model.safetensors") for out in outs)
        assert a.keys() == b.keys()
        assert max((a[key] - b[key]).abs().max() for key in a) < 1e-9, name
    for name in MADE[:2]:
        a, b = (load_file(out / name / "reward_head.safetensors")["weight"] for out in outs)
        assert a.abs().max() > 1e-3 and (a - b).abs().max() < 1e-9
    assert evaluated(outs[0]) == pytest.approx(evaluated(outs[1]), abs=1e-9)
    assert len(evaluated(outs[0])) > 50


# --- killed, stopped, started again


def assert_same_run(a: Path, b: Path) -> None:
    for name in MADE:
        files = [file.name for file in (a / name).iterdir()]
        assert sorted(files) == sorted(file.name for file in (b / name).iterdir())
        for file in files:
            assert (a / name / file).read_bytes() == (b / name / file).read_bytes(), (name, file)
    for file in a.glob("*.jsonl"):
        if file.name != "metrics.jsonl":
            assert file.read_bytes() == (b / file.name).read_bytes(), file
    results = [read(out / "result.json") for out in (a, b)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert set(untimed(a)) == set(untimed(b))


def untimed(out: Path) -> list[str]:
    """The lines of metrics, without what depends on the machine's mood."""
    moods = ("seconds_", "tokens_per_second_", "peak_")
    return [
        json.dumps({k: v for k, v in row.items() if not k.startswith(moods)})
        for row in rows(out / "metrics.jsonl")
    ]


def missing(out: Path) -> str | None:
    """The stage that a run is at."""
    return next((name for name in MADE if not (out / name).is_dir()), None)


def armed(out: Path, limits: dict[str, int]) -> None:
    """From now on, SIGKILL at the so many-th tick within a stage. A tick is a row written to a file
    of samples, an update, a checkpoint, a file, a line of metrics: before it, or after it."""
    ticks: Counter = Counter()

    def tick(name: str) -> None:
        stage = missing(out)
        ticks[stage] += 1
        if ticks[stage] == limits.get(stage):
            os.write(1, f"{stage} {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(module, name: str, often: int = 1) -> None:
        real, calls = getattr(module, name), []

        @functools.wraps(real)
        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) % often == 0:
                tick(name)
            result = real(*args, **kwargs)
            if len(calls) % often == 0:
                tick(name)
            return result

        setattr(module, name, wrapper)

    ticking(sft.json, "dumps", often=45)  # in the middle of a chunk
    for module, name in ((sft, "update"), (grpo, "update"), (running, "save_state"),
                         (running, "write_file"), (sft, "write_file"), (pretrained, "_sync"),
                         (Run, "log"), (grpo, "draw_outputs"), (sft, "answers")):  # fmt: skip
        ticking(module, name)


def killed_until_done(out: Path, *argv) -> None:
    """In a process of its own, which forks one that runs, until that is not killed any more."""
    rng, kills, made = random.Random(0), Counter(), {}
    torch.optim.AdamW([torch.zeros(1)])  # imports what takes a second, once for all
    for attempt in range(60):
        limits = {}  # of each stage a kill near its beginning, then one further on
        for stage in MADE:
            if kills[stage] == 0:
                limits[stage] = rng.randint(1, 12)
            elif kills[stage] == 1:  # of RL behind its first checkpoint
                limits[stage] = rng.randint(*((24, 34) if stage in ("dev2", "r1") else (1, 14)))
        at = missing(out)
        child = os.fork()
        if child == 0:
            armed(out, limits)
            os._exit(start(*argv))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        kills[missing(out)] += 1
        for name in MADE:  # what is there stays as it is
            if (out / name).is_dir():
                told = (out / name).stat()
                assert made.setdefault(name, (told.st_ino, told.st_mtime_ns)) == (
                    told.st_ino, told.st_mtime_ns
                )  # fmt: skip
    for name, before in made.items():
        told = (out / name).stat()
        assert before == (told.st_ino, told.st_mtime_ns), f"{name} was made again"
    print(json.dumps(dict(attempts=attempt, at=at, kills=kills)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(whole, zero, tmp_path):
    out = tmp_path / "run"
    code = f"{HERE} import test_train_r1; from pathlib import Path;"
    code += " test_train_r1.killed_until_done(Path(sys.argv[1]), *sys.argv[2:])"
    done = process("-c", code, out, *TOY, "--zero", zero, "--out", out)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["kills"]) >= set(MADE) and told["attempts"] >= 9, told
    assert_same_run(out, whole.out)


# (module, function, call): Ctrl-C as that call ends, counted from the start of the command.
PLACES = {
    "a reward model": (sft, "update", 2, "reward_helpful"),
    "the samples of the cold start": (sft, "answers", 1, "dev1"),
    "the cold start": (sft, "sft_step", 2, "dev1"),
    "RL for reasoning": (grpo, "step", 1, "dev2"),
    "the samples of the third stage": (sft, "answers", 1, "dev3"),
    "the third stage": (sft, "sft_step", 3, "dev3"),
    "RL for all scenarios": (grpo, "step", 4, "r1"),
}


def test_ctrl_c_in_each_stage_exits_with_130_and_the_same_command_goes_on(
    whole, zero, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "run"
    for place, (module, name, call, stage) in PLACES.items():
        calls, real = [], getattr(module, name)

        @functools.wraps(real)
        def wrapper(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrapper)
            assert start(*TOY, "--zero", zero, "--out", out) == 130, place
        assert missing(out) == stage, place
        assert len(calls) <= call + 1, place  # it does not first finish what it is at
        assert not (out / "result.json").exists()
        (out / "report.html").unlink()  # it is left at any end
    assert start(*TOY, "--zero", zero, "--out", out) == 0
    assert_same_run(out, whole.out)


def test_a_finished_run_that_is_started_again_does_nothing_again(whole, zero, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("done again")

    before = {file: (file.read_bytes(), file.stat().st_ino) for file in whole.out.rglob("*")
              if file.is_file() and file.parent != whole.out}  # fmt: skip
    metrics = (whole.out / "metrics.jsonl").read_bytes()
    for module, name in ((sample, "generate"), (sft, "generate"), (grpo, "generate"),
                         (train_r1, "generate"), (sft, "update"), (grpo, "step"),
                         (sft, "finetune"), (grpo, "reinforce")):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    result = read(whole.out / "result.json")
    assert start(*TOY, "--zero", zero, "--out", whole.out) == 0
    assert (whole.out / "metrics.jsonl").read_bytes() == metrics
    assert {file: (file.read_bytes(), file.stat().st_ino) for file in before} == before
    assert read(whole.out / "result.json") == result


@pytest.mark.parametrize("phase", ["reward helpful held out", "evaluate zero general",
                                   "sample dev1_samples", "filter dev1_samples"])  # fmt: skip
def test_a_kill_after_a_line_of_metrics_leaves_no_line_twice(zero, tmp_path, monkeypatch, phase):
    """For what it tells is not in its file yet, and is told again."""
    real, flags = Run.log, [*TOY, "--zero", zero, "--out", tmp_path / "run"]
    if not phase.startswith("reward"):
        flags += ["--until", "dev1"]

    def log(run, **line):
        real(run, **line)
        if line["phase"] == phase:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        patch.setattr(launching, "saving", lambda: False)  # else it would end these tests too
        assert start(*flags) == 130
    assert len(lines(tmp_path / "run", phase)) == 1
    if phase.startswith("reward"):  # the second of them, and no further
        monkeypatch.setattr(train_r1, "assess", lambda *args: sys.exit(0))
    assert start(*flags) == 0
    assert len(lines(tmp_path / "run", phase)) == 1


def test_a_changed_config_is_refused_with_the_difference_and_nothing_changes(whole, zero, capsys):
    before = {file: file.read_bytes() for file in whole.out.iterdir() if file.is_file()}
    flags = [*TOY, "--zero", zero, "--out", whole.out]
    error = refused(capsys, *flags, "--language-weight", "0", "--lr", "0.5")
    assert "--language-weight was 1.0, now 0.0" in error
    assert "--lr was 0.003, now 0.5" in error
    assert {file: file.read_bytes() for file in before} == before


def test_a_run_can_stop_before_the_last_stage_and_go_on_later(whole, zero, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*TOY, "--zero", zero, "--out", out]
    assert start(*flags, "--until", "dev1") == 0
    assert list(read(out / "result.json")) == ["zero", "dev1", "claims", "seconds"]
    assert not (out / "dev2").exists() and not (out / "reward_helpful").exists()
    assert "Dev1" in (printed := capsys.readouterr().out) and "Dev2" not in printed
    made = (out / "dev1").stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "collect", lambda *args, **kwargs: sys.exit(7))  # of the third stage
        patch.setattr(train_r1, "reward_model", lambda *args: True)
        assert start(*flags) == 7  # --until r1
    assert (out / "dev1").stat().st_ino == made
    for name in ("dev1", "dev2"):
        files = (place / name / "model.safetensors" for place in (out, whole.out))
        assert len({file.read_bytes() for file in files}) == 1


# --- no R1-Zero yet


def test_the_toys_r1_zero_is_trained_first(zero, tmp_path, monkeypatch):
    commands, missing_zero = [], tmp_path / "zero"

    def trains(arguments, run) -> bool:
        commands.append(arguments)
        shutil.copytree(zero, missing_zero, dirs_exist_ok=True)
        return True

    monkeypatch.setattr(train_r1, "run_command", trains)
    flags = [*TOY, "--seed", "3", "--zero", missing_zero, "--until", "dev1"]
    assert start(*flags, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "result.json").exists()
    [[program, *rest]] = commands
    assert program == "train_zero.py" and rest[:2] == ["--preset", "bilingual"]
    config = parse(train_zero.Config, train_zero.PRESETS, rest)  # which it understands
    assert (config.data, config.out, config.seed) == ("bilingual-chain", str(missing_zero), 3)
    assert (config.device, config.threads, config.resume) == ("cpu", 1, False)


def test_an_r1_zero_that_was_interrupted_is_resumed(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(train_r1, "run_command", lambda *args: commands.append(args[0]) and False)
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "config.json").write_text("{}")
    assert start(*TOY, "--zero", tmp_path / "zero", "--out", tmp_path / "run") == 0
    config = parse(train_zero.Config, train_zero.PRESETS, commands[0][1:])
    assert config.resume is True
    assert not (tmp_path / "run" / "result.json").exists()  # it was stopped: so is this


def data_files(folder: Path, count: int = 60) -> list:
    """The flags of --preset paper that name files, of questions that are no chains."""
    questions = [dict(question=f"what is {i} + 1 ?", answer=str(i + 1)) for i in range(count)]
    files = dict(
        data=questions,
        general=[dict(prompt=f"say {i} !", response=f"{i} !") for i in range(12)],
        preferences=[dict(prompt=f"say {i} ?", chosen=f"{i} !", rejected="no") for i in range(20)],
        safety=[dict(prompt=f"do {i} ?", response=f"{i} .", safe=i % 2 == 0) for i in range(20)],
    )
    flags: list = ["--preset", "paper"]
    for name, made in files.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        flags += [f"--{name}", file]
    return [*flags, "--test-data", folder / "data.jsonl"]


def test_a_real_bases_r1_zero_has_to_be_there_and_the_command_is_told(zero, tmp_path, capsys):
    flags = [*data_files(tmp_path), "--out", tmp_path / "run", "--zero", tmp_path / "none"]
    for model in (["--model", zero / "base"], []):
        error = refused(capsys, *SIZES, *flags, *model)
        assert f"no R1-Zero in {tmp_path / 'none'}" in error
        command = error.partition("python train_zero.py ")[2].split()
        config = parse(train_zero.Config, train_zero.PRESETS, command)
        assert (config.out, config.data) == (str(tmp_path / "none"), str(tmp_path / "data.jsonl"))
        assert config.model == (str(zero / "base") if model else "DIR")
        assert config.steps == 10400  # the paper's preset
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run", sft.Tuning())


def program(tmp_path: Path, text: str) -> str:
    file = tmp_path / "program.py"
    file.write_text(text)
    return str(file)


def test_a_program_that_was_started_gets_its_arguments_and_may_fail(tmp_path, run, capfd):
    told = program(tmp_path, "import sys; print('got', *sys.argv[1:]); sys.exit(len(sys.argv) - 2)")
    assert run_command([told, "one"], run) is True
    assert "got one" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"program.py one two three ended with exit code 2"):
        run_command([told, "one", "two", "three"], run)
    assert f"+ python {told} one two three" in capfd.readouterr().out


def test_a_program_is_not_started_by_several_processes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(UserError, match="first run python train_zero.py --x"):
        run_command(["train_zero.py", "--x"], run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_the_program_and_is_no_mistake(tmp_path, run, number):
    parent = os.getpid()
    waits = (
        "import os, signal, sys, time\n"
        "def saved(number, frame):\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').write(str(number))\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, saved)\n"
        f"os.kill({parent}, {int(number)})\n"
        "time.sleep(60)\n"
    )
    before = time.monotonic()
    assert run_command([program(tmp_path, waits)], run) is False
    assert time.monotonic() - before < 20
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_program_does_not_outlive_the_one_that_started_it(tmp_path):
    waits = program(
        tmp_path,
        "import os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n",
    )
    code = f"{HERE} from runtime.run import run_command; run_command([{waits!r}], None)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    assert alive(child)
    parent.kill()
    parent.wait()
    while alive(child):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# --- a real base, its own data


@pytest.fixture
def coin(monkeypatch) -> None:
    """A model of random weights is never right: the verdict is by the text's length."""

    def verdict(problem: Problem, text: str, *rest) -> str:
        return ("kept", "wrong")[len(text) % 2]

    monkeypatch.setattr(sft, "verdict", verdict)


def test_the_papers_preset_runs_through_on_a_base_and_files_of_ones_own(
    tmp_path, monkeypatch, coin
):
    tokenizer = Tokenizer.toy()
    tokenizer.template = "r1-zero"
    tiny(tmp_path / "base", tokenizer, 1)
    tiny(tmp_path / "zero" / "model", tokenizer, 2)
    seen = recorded(monkeypatch)
    out = tmp_path / "run"
    sizes = ["--cold-questions", "8", "--questions-sft", "8", "--final-steps", "5",
             "--steps", "2", "--minibatches", "1", "--questions", "2", "--max-new-tokens", "8",
             "--eval-problems", "2", "--eval-requests", "2", "--row-tokens", "1024"]  # fmt: skip
    small = [
        each for each in zip(SIZES[::2], SIZES[1::2]) if each[0] not in ("--epochs", "--warmup")
    ]
    flags = [*data_files(tmp_path), *(part for each in small for part in each), *sizes]
    flags += ["--model", tmp_path / "base", "--zero", tmp_path / "zero", "--out", out]
    assert start(*flags) == 0
    result = read(out / "result.json")
    for name in ("zero", *train_r1.STAGES):
        assert MEASURES <= result[name].keys()
        assert result[name]["instruction"] is None  # no rule tells, for requests of one's own
        for key in MEASURES - {"instruction"}:
            assert 0 <= result[name][key] <= 8
        assert 0 < result[name]["helpful"] < 1 and result[name]["safe"] in (0, 0.5, 1)
    assert not (out / "dev3_judged.jsonl").exists()
    # The published settings, wherever no size was given.
    for phase in ("dev1", "dev3"):
        assert same(seen.starts[phase], tmp_path / "base")
        tuning, _ = seen.tuning[phase]
        assert (tuning.lr, tuning.final_lr, tuning.epochs) == (5e-5, 5e-6, 2)
        rates = seen.rates[phase]
        assert rates[0] == 5e-5 and rates == sorted(rates, reverse=True) and rates[-1] > 5e-6
    for name in ("helpful", "harmless"):
        assert seen.tuning[f"reward {name}"][0].lr == 6e-6
    for phase in ("dev2", "r1"):
        assert seen.courses[phase].lr == 3e-6
        assert {(each["eps"], each["beta"]) for each in seen.losses[phase]} == {(10, 0.001)}
    assert {told.settings.temperature for told in seen.rollouts["r1"]} == {0.7}
    # 400 of 1700 updates, here of 5: the last one.
    mixed = [set(kinds(told.batch.problems)) != {"rule"} for told in seen.rollouts["r1"]]
    assert mixed == [False] * 4 + [True]
    prompts = [tokenizer.decode(told.batch.prompts[0]) for told in seen.rollouts["dev2"]]
    assert all(prompt.startswith("A conversation between User") for prompt in prompts)
    learned = rows(out / "dev3_sft.jsonl")
    assert [row["prompt"] for row in learned[-12:]] == [f"say {i} !" for i in range(12)]


def test_the_papers_preset_has_the_published_settings():
    config = parse(train_r1.Config, train_r1.PRESETS, ["--preset", "paper", "--until", "dev2"])
    assert (config.lr, config.final_lr, config.row_tokens, config.batch) == (5e-5, 5e-6, 32768, 128)
    assert config.epochs in (2, 3)
    assert (config.rl_lr, config.eps, config.beta, config.refresh) == (3e-6, 10, 0.001, 400)
    assert (config.questions, config.minibatches, config.group_size) == (32 * 16, 16, 16)
    assert (config.final_steps, config.final_temperature) == (1700, 0.7)
    assert config.preference_share * config.final_steps == pytest.approx(400)
    assert (config.reward_batch, config.reward_lr) == (256, 6e-6)
    assert (config.language_weight, config.template, config.judged) == (1.0, "r1-zero", None)


# --- mistakes


@pytest.mark.parametrize(
    "until, given, told",
    [
        ("r1", [], "--general FILE, --preferences FILE, --safety FILE"),
        ("r1", ["--general", "g.jsonl"], "needs --preferences FILE, --safety FILE"),
        ("r1", ["--general", "g.jsonl", "--preferences", "p.jsonl"], "needs --safety FILE"),
        ("dev3", [], "needs --general FILE for --until dev3"),
    ],
)
def test_missing_files_are_told_with_their_flags(tmp_path, capsys, until, given, told):
    flags = ["--preset", "paper", "--until", until, *given, "--out", tmp_path / "run"]
    error = refused(capsys, *flags)
    assert told in error and "--until dev2" in error
    assert not (tmp_path / "run").exists()


def test_the_stages_before_need_no_files_of_preferences():
    for until in ("dev1", "dev2"):
        parse(train_r1.Config, train_r1.PRESETS, ["--preset", "paper", "--until", until])


FIELDS = dict(general=dict(prompt="a", response="b"),
              preferences=dict(prompt="a", chosen="b", rejected="c"),
              safety=dict(prompt="a", response="b", safe=True))  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_broken_line_or_a_missing_field_is_told_with_file_and_line(zero, tmp_path, name):
    file, good = tmp_path / f"{name}.jsonl", json.dumps(FIELDS[name])
    lab = make_lab(zero, tmp_path, **{name: str(file)})
    file.write_text(f"{good}\n\n{good}")  # an empty line, and no line break at the end
    assert train_r1.data_rows(lab, name) == [FIELDS[name]] * 2
    broken = ['{"prompt": ', "[1, 2]", '"text"', "7"]
    for field in FIELDS[name]:
        broken.append(json.dumps({k: v for k, v in FIELDS[name].items() if k != field}))
    for line in broken:
        file.write_text(f"{good}\n{line}\n{good}\n")
        with pytest.raises(UserError, match=re.escape(f"{file}:2: ")) as error:
            train_r1.data_rows(lab, name)
        assert "expected a JSON object" in str(error.value)
        if line.startswith('{"') and line.endswith("}"):
            assert ", ".join(FIELDS[name]) in str(error.value)


@pytest.mark.parametrize(
    "name, field, value",
    [("safety", "safe", "yes"), ("safety", "safe", None), ("safety", "response", None),
     ("general", "prompt", 3), ("preferences", "chosen", ["b"])],
)  # fmt: skip
def test_a_value_of_another_kind_is_told_with_file_and_line(zero, tmp_path, name, field, value):
    """And not when it is used, in words of torch."""
    file = tmp_path / f"{name}.jsonl"
    file.write_text(f"{json.dumps(FIELDS[name])}\n{json.dumps({**FIELDS[name], field: value})}\n")
    with pytest.raises(UserError, match=re.escape(f"{file}:2: ")):
        train_r1.data_rows(make_lab(zero, tmp_path, **{name: str(file)}), name)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("content", ["", "{\n", None], ids=["empty", "broken", "missing"])
def test_a_file_that_cannot_be_used_is_told_before_anything_is_sampled(
    zero, tmp_path, capsys, monkeypatch, name, content
):
    def never(*args, **kwargs):
        raise AssertionError("sampled first")

    flags = data_files(tmp_path)
    file = tmp_path / f"{name}.jsonl"
    file.unlink()
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(sft, "collect", never)
    monkeypatch.setattr(train_r1, "assess", lambda *args: {})
    error = refused(capsys, *flags, *SIZES, "--row-tokens", "1024", "--model", zero / "base",
                    "--zero", zero, "--out", tmp_path / "run")  # fmt: skip
    assert str(file) in error


@pytest.mark.parametrize(
    "flag, bad",
    [("--zero", "none"), ("--data", "none.jsonl"), ("--model", "none"), ("--template", "r1"),
     ("--test-data", "none.jsonl")],
)  # fmt: skip
def test_a_refused_start_leaves_out_free_for_the_next_try(zero, tmp_path, capsys, flag, bad, coin):
    monkey = pytest.MonkeyPatch()
    flags = [*data_files(tmp_path), *SIZES, "--row-tokens", "1024", "--max-new-tokens", "8",
             "--model", zero / "base", "--zero", zero, "--template", "toy", "--until", "dev1",
             "--cold-questions", "8", "--out", tmp_path / "run"]  # fmt: skip
    refused(capsys, *flags, flag, tmp_path / bad if flag != "--template" else bad)
    with monkey.context() as patch:
        patch.setattr(train_r1, "assess", lambda *args: sys.exit(9))  # well under way
        assert start(*flags) == 9, capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, value",
    [("--group-size", "1"), ("--eps", "0"), ("--beta", "-1"), ("--final-temperature", "0"),
     ("--cold-questions", "0"), ("--samples", "0"), ("--batch", "0"), ("--steps", "0"),
     ("--minibatches", "0"), ("--refresh", "0"), ("--save-every", "0"), ("--eval-requests", "0"),
     ("--preference-share", "1.5"), ("--general-share", "-0.1"), ("--least-consistency", "2"),
     ("--judged-questions", "0"), ("--row-tokens", "0"), ("--lr", "0"), ("--reward-lr", "0"),
     ("--minibatches", "99"), ("--template", "r1"),
     ("--judged", "speled-chain")],
)  # fmt: skip
def test_a_setting_that_cannot_work_is_refused_before_anything_is_done(
    zero, tmp_path, capsys, monkeypatch, flag, value
):
    monkeypatch.setattr(train_r1, "assess", lambda *args: sys.exit(9))
    monkeypatch.setattr(train_r1, "reward_model", lambda *args: True)
    error = refused(capsys, *TOY, "--zero", zero, "--out", tmp_path / "run", flag, value)
    assert flag[2:].replace("-", "_").removeprefix("final_") in error.replace("-", "_")
    assert value in error


def test_a_base_that_is_not_there_is_told_before_anything_is_sampled(
    zero, tmp_path, capsys, monkeypatch
):
    """R1-Zero of a real base has none of its own: it was given with --model."""
    monkeypatch.setattr(sft, "collect", lambda *args, **kwargs: sys.exit(9))
    monkeypatch.setattr(train_r1, "assess", lambda *args: {})
    shutil.copytree(zero / "model", tmp_path / "zero" / "model")
    error = refused(capsys, *TOY, "--zero", tmp_path / "zero", "--out", tmp_path / "run",
                    "--until", "dev1")  # fmt: skip
    assert str(tmp_path / "zero" / "base") in error
