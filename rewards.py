"""The rule rewards of R1-Zero: is the answer right, and is the output laid out as asked?

Where it stands in the paper: section 2.2.2. R1-Zero learns from rules alone, because a learned
reward model can be fooled by the policy it trains. So can a rule: thousands of outputs per step
search for its weak spot. Hence one habit throughout: what is ambiguous, unclosed or unreadable
earns 0. The language reward is R1's (2.3.2); the vote is the evaluation's cons@k. At the end stand
the two reward models that R1 learns from preferences (2.3.4), used late and for a short time.

The paper does not report how answers are matched. Here:
  - nothing that a model writes is executed here: parsers of our own read it all, and a program
    runs in a jail, on tests whose answers stay outside (runtime/sandbox.py);
  - two answers are one by the rules of data/answers.py, which compares them;
  - tags count exactly as the template writes them, in lower case.

A response is judged from its `<think>` on. R1-Zero's policy writes it; where R1's chat template has
written it already, the sampler puts it before the output. `tags`: whether the template asks for
<answer> tags as well, as R1-Zero's does and a chat template does not.

Read next: grpo.py, which turns these numbers into advantages.
Run: python -m pytest tests/test_rewards.py
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data import puzzles
from data.answers import MAX_ANSWER, closing_brace, math_equal, undress
from data.expressions import MAX_DEPTH as MAX_DEPTH  # Countdown's limit too
from data.expressions import arithmetic
from data.languages import HAN, LANGUAGES, language_share
from data.languages import language_of as language_of  # for those who use it beside the reward
from data.packing import pack
from model import Transformer
from runtime import sandbox

# ---- the final answer ------------------------------------------------------------------

THINK_TAG = re.compile(r"</?think>")
ANSWER_TAG = re.compile(r"</?answer>")
TAG = re.compile(r"</?(?:think|answer)>")
BOX = re.compile(r"\\boxed\s*")


def split_reasoning(response: str) -> tuple[str, str | None]:
    """The reasoning, and the text after it: None where the reasoning has no clear end.

    Without any think tag, the whole response is both. With broken ones, all of it is reasoning.
    """
    tags = THINK_TAG.findall(response)
    if not tags:
        return response, response
    if tags not in (["<think>", "</think>"], ["</think>"]):
        return response, None  # never closed, closed twice, reopened: where would the answer start?
    reasoning, _, rest = response.partition("</think>")
    return reasoning, rest


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{...}; None if it is unclosed, nested or without braces."""
    content = None
    box = BOX.search(text)
    while box:
        start = box.end()
        end = closing_brace(text, start) if text.startswith("{", start) else start
        if end < 0:
            return None  # unclosed: it swallows all that follows, later boxes included
        content = text[start + 1 : end]
        box = BOX.search(text, end)
    return None if content and BOX.search(content) else content


def extract_answer(response: str) -> str | None:
    """The last <answer>...</answer> or \\boxed{...} after the reasoning, or None.

    There is no second chance: if the last one is malformed, an earlier one is not taken instead.
    """
    _, text = split_reasoning(response)
    if text is None:
        return None
    tags = ANSWER_TAG.findall(text)
    if tags != ["<answer>", "</answer>"] * (len(tags) // 2):
        return None  # unclosed, doubled or nested
    before, _, after = text.rpartition("</answer>")
    answer = last_box(after)
    if tags and not BOX.search(after):
        answer = before.rpartition("<answer>")[2]
        boxes = BOX.findall(answer)
        if boxes:  # one box is a commitment, whatever the words around it; two are two offers
            answer = last_box(answer) if len(boxes) == 1 else None
    return (answer or "").strip() or None


# ---- Countdown: reach a target from given numbers, each used exactly once --------------

COUNTDOWN_GOLD = re.compile(r"(0|-?[1-9][0-9]*) from ((?:0|[1-9][0-9]*)(?: (?:0|[1-9][0-9]*))*)")


def countdown_equal(expression: str | None, gold: str) -> bool:
    """Whether the expression, with or without "= TARGET", makes the target exactly.

    gold reads "TARGET from N1 N2 ...", e.g. "24 from 3 8 1"; anything else raises ValueError.
    """
    task = COUNTDOWN_GOLD.fullmatch(gold)
    if task is None:
        raise ValueError(f"gold is {gold!r}; write 'TARGET from N1 N2 ...', e.g. '24 from 3 8 1'")
    target, numbers = task[1], task[2].split()
    if expression is None or len(expression) > MAX_ANSWER:
        return False
    expression, equals, claimed = expression.partition("=")
    if equals and claimed.strip() != target:
        return False
    if sorted(re.findall("[0-9]+", expression)) != sorted(numbers):
        return False  # a number is missing, reused, invented or glued from digits
    try:
        return arithmetic(expression) == Fraction(target)
    except (ValueError, ZeroDivisionError):  # not an expression, or it divides by zero
        return False


# ---- code: a program that passes every test ----------------------------------------------

# <answer> and </answer> may stand on a fence's line, as in R1-Zero's template.
FENCE = re.compile(r"^ {0,3}(?:<answer> *)?(`{3,})([^`\n]*)$", re.MULTILINE)


def extract_program(response: str) -> str | None:
    """The last fenced block after the reasoning that says it is Python or, where none says so, the
    last one. None without any, and where a block is not closed: no other takes its place."""
    _, text = split_reasoning(response)
    blocks: list[tuple[bool, str]] = []
    opening = None
    for fence in FENCE.finditer(text or ""):
        if opening is None:
            opening = fence
        elif len(fence[1]) >= len(opening[1]) and fence[2].strip() in ("", "</answer>"):
            named = opening[2].strip().lower() in ("python", "python3", "py")
            blocks.append((named, text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening or not blocks:
        return None
    programs = [program for named, program in blocks if named] or [program for _, program in blocks]
    return programs[-1]


def code_reward(
    response: str, tests: str, timeout: float = sandbox.SECONDS, memory: int = sandbox.MEMORY
) -> float:
    """1.0 if the program passes every test. tests: a JSON list, see runtime/sandbox.py. timeout:
    seconds of processor time for each; memory: bytes."""
    return float(sandbox.passes(extract_program(response), tests, timeout, memory))


# ---- the rewards -----------------------------------------------------------------------

# None: no rule can tell. A model judges these, by its reference or by what people prefer.
CHECKERS = {"math": math_equal, "countdown": countdown_equal, "code": sandbox.passes,
            **puzzles.CHECKERS, "judge": None, "helpful": None, "harmless": None}  # fmt: skip


def need_rules(problems: Iterable) -> None:
    """Raises ValueError where a problem's answer can't be checked by a rule, or its rule can't read
    the gold answer."""
    for problem in problems:
        check = CHECKERS.get(problem.checker)
        if check is None:
            known = ", ".join(name for name, check in CHECKERS.items() if check)
            raise ValueError(
                f"no rule checks {problem.question[:60]!r}: its checker is {problem.checker!r}; use"
                f" one of {known}"
            )
        try:
            check(None, problem.answer)
        except ValueError as error:
            raise ValueError(f"{problem.question[:60]!r}: {error}") from None


def offered(response: str, check: Callable | None) -> str | None:
    """What `check` looks at: the program where it runs tests, otherwise the final answer."""
    return (extract_program if check is sandbox.passes else extract_answer)(response)


def accuracy_reward(response: str, gold: str, check: Callable = math_equal) -> float:
    """1.0 if what the response offers passes `check` against gold, else 0.0."""
    # R1 2.2.2, accuracy: 1 if the final answer is right (of code: if all tests pass), else 0
    return float(check(offered(response, check), gold))


def is_right(checker: str, gold: str, response: str, finished: bool) -> bool | None:
    """Whether an output has the right answer; None where no rule can tell."""
    check = CHECKERS.get(checker)
    return None if check is None else finished and bool(accuracy_reward(response, gold, check))


def format_reward(response: str, tags: bool = True) -> float:
    """1.0 if the response is exactly <think> reasoning </think> <answer> answer </answer> or,
    without tags, <think> reasoning </think> answer."""
    # R1 2.2.2, format: 1 if the reasoning is between its tags and the answer in its own, else 0
    # Departs from R1 2.2.2, format: answer tags too, for R1-Zero's template asks for both.
    wanted = ["<think>", "</think>", *["<answer>", "</answer>"] * tags]
    if TAG.findall(response) != wanted:
        return 0.0
    before, reasoning, *between, answer, after = [*TAG.split(response), *[""] * (not tags)]
    blank = not (before + "".join(between) + after).strip()
    # Something visible in each: a zero-width space is not white space to str.strip.
    filled = [any(c.isprintable() and c != " " for c in part) for part in (reasoning, answer)]
    return float(blank and all(filled))


def general_format_reward(response: str, tags: bool = True) -> float:
    """For general prompts: the same, or a plain answer, for what needs no reasoning (R1 2.3.3)."""
    plain = bool(response.strip()) and not TAG.search(response)
    return 1.0 if plain else format_reward(response, tags)


def summary(response: str) -> str:
    """What the user reads: all that stands outside of the reasoning, without the answer's tags.
    Nothing, where the reasoning has no clear end."""
    _, text = split_reasoning(response)
    return ANSWER_TAG.sub(" ", text or "").strip()


def rule_reward(
    problem, response: str, finished: bool, format_weight: float = 1.0, tags: bool = True
) -> float:
    """R1 2.2.2: accuracy and format. An output that was cut off has not answered: it earns 0."""
    if not finished:
        return 0.0
    accuracy = accuracy_reward(response, problem.answer, CHECKERS[problem.checker])
    # R1 2.2.2, sum: accuracy + format, equally weighted
    return accuracy + format_weight * format_reward(response, tags)


def language_reward(response: str, language: str) -> float:
    """R1 2.3.2: the share of the reasoning's words that are in `language`, a key of LANGUAGES.
    data/languages.py says what a word is, and what tells languages of one script apart."""
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; use one of {', '.join(LANGUAGES)}")
    reasoning, _ = split_reasoning(response)
    return language_share(TAG.sub(" ", reasoning), language)


# ---- shaping that is not R1's, off by default ------------------------------------------

WORD = re.compile(rf"[{HAN}]|[^\s{HAN}]+")  # or one Chinese character
RUN = 10  # words


def repetition(text: str) -> float:
    """The share of the text's runs of ten words that have stood in it before: of what Yeo et al.
    (2502.03373) penalise, token by token, lest long reasoning fill up with repeats."""
    words = WORD.findall(text)
    runs = list(zip(*(words[i:] for i in range(RUN))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """From 0 down to -1 over the last `buffer` tokens before the longest output allowed."""
    # DAPO (2503.14476) Eq. 13: ((L_max - L_cache) - |y|) / L_cache, between 0 and -1
    return min(0.0, max(-1.0, (longest - buffer - length) / buffer))


# ---- measures for the evaluation -------------------------------------------------------

REFLECTIVE = "wait|mistake|however|but|retry|error|verify|wrong|evaluate|check"  # the paper's list
REFLECTIVE_ZH = "等等|等一下|错误|然而|但是|重试|验证|不对|检查"  # our addition, not the paper's


def reflections(response: str) -> int:
    """How often a reflective word occurs; whole words in English, anywhere in unspaced Chinese."""
    english = re.findall(rf"\b(?:{REFLECTIVE})\b", response, re.IGNORECASE | re.ASCII)
    return len(english) + len(re.findall(REFLECTIVE_ZH, response))


def majority(answers: list[str | None], check: Callable = math_equal) -> str | None:
    """cons@k: the first answer of the largest group equal under `check`; ties go to the earliest.

    None and blanks do not vote. All correct Countdown expressions are equivalent, and so are all
    correct programs, yet before the vote none is known to be correct: count those by their text,
    with check=operator.eq.
    """
    # R1 3, vote: cons@k, the answer that most of k outputs give
    # By text first: k answers are mostly a few texts, and each pair of texts costs a comparison.
    ballots = Counter(answer for answer in answers if answer and undress(answer[:MAX_ANSWER]))
    groups: dict[str, int] = {}
    for answer, votes in ballots.items():
        leader = next((other for other in groups if check(answer, other)), answer)
        groups[leader] = groups.get(leader, 0) + votes
    return max(groups, key=groups.__getitem__, default=None)


# ---- learned rewards (R1 2.3.4), for what no rule can check ------------------------------


class RewardModel(nn.Module):
    """A language model that ends in one number in place of the next word: what a whole text is
    worth, read at its last token."""

    def __init__(self, trunk: Transformer):
        super().__init__()
        self.trunk = trunk
        weight = trunk.lm_head.weight
        self.head = nn.Linear(
            weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.head.weight)  # at first all texts are worth the same
        self.spread = getattr(trunk, "spread", None)  # over processes: runtime/sharding.py
        if not trunk.config.tie_word_embeddings:
            trunk.lm_head.requires_grad_(False)  # it is not asked: no optimizer has states of it

    def forward(self, texts: Sequence[list[int]], row_tokens: int = 256) -> Tensor:
        """One number for each of the texts, which are tokens."""
        device = self.head.weight.device
        lengths = torch.tensor([len(text) for text in texts], device=device)
        packed = pack(texts, max(row_tokens, int(lengths.max())), device)
        hidden_BTD, _ = self.trunk.hidden(packed.tokens_BT, packed.positions_BT)
        last_BT = packed.positions_BT == lengths[packed.documents_BT.clamp(min=0)] - 1
        last_BT &= packed.documents_BT >= 0
        scores = self.head(hidden_BTD[last_BT])[:, 0]
        return torch.empty_like(scores).index_copy(0, packed.documents_BT[last_BT], scores)

    def head_files(self) -> dict[str, bytes]:
        """The head, as a file beside those of the trunk."""
        return {"reward_head.safetensors": save({"weight": self.head.weight.detach().cpu()})}

    @classmethod
    def load(cls, trunk: Transformer, directory: Path) -> "RewardModel":
        model = cls(trunk)
        model.head.load_state_dict(load_file(directory / "reward_head.safetensors"))
        return model


def pairwise_loss(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Bradley and Terry (1952): the chosen text wins with probability sigmoid(chosen - rejected).
    N losses. R1's model of helpfulness; only differences mean anything."""
    # R1 2.3.4, pairwise: -log sigmoid(chosen - rejected), for helpfulness
    return -F.logsigmoid(chosen_N - rejected_N)


def pointwise_loss(scores_N: Tensor, good_N: Tensor) -> Tensor:
    """Each text by itself: good (1) with probability sigmoid(score). R1's model of safety."""
    # R1 2.3.4, pointwise: -log sigmoid(score) if it is safe, else -log sigmoid(-score)
    return F.binary_cross_entropy_with_logits(scores_N, good_N.to(scores_N), reduction="none")


if __name__ == "__main__":
    from bench.audit import main  # reads files and runs; nothing here needs it

    main()
