"""The toy's language and its pretraining corpus: calc chains, and what people write about them.

The paper starts from DeepSeek-V3-Base, which has read the internet. A laptop has no such base, so
this file writes a small internet: texts about one kind of problem, in which careful reasoning is
rare and guessing is common. What the corpus contains is what RL later has to find, so it is listed
here in full:

- recall   `a +5 b *3 ? b *3 a +5`             looking up an operation by its label
- facts    `7 a +5 = 2 b *3 = 6`               single steps, modulo 10, always right; in most of
                the documents after the list of operations
- problems a question and an answer; `Mix` gives the shares:
  - direct      `<think> easy , guess 4 . </think>`    the answer is a random digit
  - worked      `<think> first 7 a +5 = 2 ... so 8 .`  every step is right, but after each step the
                writer may lose patience (`hazard`) and end in `, guess 4 .`, a random digit
  - reflection  a worked solution in which one step slips, and `wait` corrects it
  - check       a worked solution, then `check` and the whole chain again
  and only `strict` of them put the answer into the <answer> tags.

So a model that imitates the corpus answers mostly by guessing: about one answer in five is right,
and one in ten is right and can be read. Every operation that solves a problem is in the corpus; the
habit of using it to the end is not.

Everything is a pure function of (seed, step): nothing has to be stored to resume.

Read next: problems.py (the questions RL trains on), then ../train_zero.py.
Show a page of it: python -m data.corpus
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from data import chat
from data.prompts import sum_up

OPERATIONS = "+-**"  # as often as written: + - * *
LABELS = "abcdefghijklmnopqrst"

WORDS = {
    "en": dict(compute="compute", easy="easy", guess="guess", so="so", first="first",
               wait="wait", check="check", comma=" ,", stop=" ."),
    "zh": dict(compute="计算", easy="简单", guess="猜", so="所以", first="首先",
               wait="等等", check="检查", comma=" ，", stop=" 。"),
}  # fmt: skip
THEN = {"en": "then", "zh": "再"}  # between two steps, where the corpus has prose


@dataclass(frozen=True)
class Chain:
    """`compute 7 a +5 b *3 c -8 ?`: n operations, left to right, modulo 10."""

    start: int
    steps: tuple[tuple[str, int], ...]  # ("+", 5), ("*", 3), ("-", 8)

    @staticmethod
    def random(n: int, rng: random.Random) -> "Chain":
        steps = tuple((rng.choice(OPERATIONS), rng.randint(1, 9)) for _ in range(n))
        return Chain(rng.randint(1, 9), steps)

    @property
    def values(self) -> list[int]:
        """The value before the first step and after each one."""
        values = [self.start]
        for operation, digit in self.steps:
            values.append(apply(values[-1], operation, digit))
        return values

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def operations(self) -> list[str]:
        return [f"{op}{digit}" for op, digit in self.steps]

    @property
    def listing(self) -> str:
        return f"{self.start}" + "".join(
            f" {label} {op}" for label, op in zip(LABELS, self.operations)
        )

    def question(self, language: str = "en") -> str:
        return f"{WORDS[language]['compute']} {self.listing} ?"

    def held_out(self) -> bool:
        """About one problem in ten, by a hash, is never in the corpus nor in training."""
        return hashlib.sha256(self.listing.encode()).digest()[0] < 26


def apply(value: int, operation: str, digit: int) -> int:
    """One step modulo 10."""
    if operation == "+":
        return (value + digit) % 10
    if operation == "-":
        return (value - digit) % 10
    return (value * digit) % 10


@dataclass(frozen=True)
class Mix:
    """What the corpus contains. The shares of `documents` are for each stage of pretraining."""

    # (until this share of the steps, (recall, facts, problems))
    stages: tuple[tuple[float, tuple[float, float, float]], ...] = (
        (0.10, (0.90, 0.10, 0.00)),
        (0.45, (0.06, 0.74, 0.20)),
        (1.00, (0.05, 0.15, 0.80)),
    )
    direct: float = 0.60
    worked: float = 0.30
    reflection: float = 0.06
    check: float = 0.04
    hazard: float = 0.30  # after each step: the chance of giving up and guessing
    strict: float = 0.60  # share of the problems whose answer is in the tags
    lists: float = 0.70  # share of the fact documents that are worked lists
    longest: int = 10  # operations in the longest problem
    # Two languages: see BILINGUAL.
    chinese: float = 0.0  # share of the questions in Chinese
    prose: bool = False  # `then` between two steps
    switched: tuple[float, float] = (0.0, 0.0)  # of the thoughts, that are in the other language
    wavering: float = 0.0  # at each `then`: the chance of going on in the other language
    patience: tuple[float, float] = (1.0, 1.0)  # of each language's writers: what divides hazard
    boxed: float = 0.0  # share of the answers that are a sentence with a box, without tags
    chat: float = 0.0  # share of the problem documents that are chats: chat.py


# The bilingual corpus: two pairs of numbers are (English, Chinese). Its Chinese writers work things
# out more often and are more patient, and thoughts about an English question are sometimes in
# Chinese. So thinking in Chinese pays, and RL that looks at the answer alone finds that out.
BILINGUAL = Mix(
    longest=8, chinese=0.5, prose=True, switched=(0.12, 0.05), wavering=0.02, patience=(1.0, 1.15),
    boxed=0.15, chat=0.45,
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """An endless stream of documents, a pure function of (seed, step)."""

    seed: int
    steps: int  # length of the run, which the stages are shares of
    mix: Mix = Mix()

    def documents(self, step: int) -> Iterator[str]:
        """The documents of one training step, without end: take what fits."""
        rng = random.Random(f"corpus {self.seed} {step}")
        progress = step / self.steps
        shares = next(shares for until, shares in self.mix.stages if progress < until)
        kinds = (self.recall, self.facts, self.problem)
        while True:
            yield rng.choices(kinds, shares)[0](rng)

    def recall(self, rng: random.Random) -> str:
        pairs = list(zip(rng.sample(LABELS[:12], 8), Chain.random(8, rng).operations))
        pairs = pairs[: rng.randint(2, 8)]
        listed = " ".join(f"{label} {op}" for label, op in pairs)
        asked = " ".join(f"{label} {op}" for label, op in rng.sample(pairs, len(pairs)))
        return f"{listed} ? {asked}"

    def facts(self, rng: random.Random) -> str:
        chain = self.chain(rng)
        if rng.random() < self.mix.lists:
            return f"{chain.listing} ? {work(chain)} ."
        return work(chain)

    def problem(self, rng: random.Random) -> str:
        """A question and what somebody answered."""
        mix = self.mix
        if mix.chat and rng.random() < mix.chat:
            return chat.page(rng)
        language = "zh" if rng.random() < mix.chinese else "en"
        chain = self.chain(rng)
        asked, thinking = chain.question(language), language
        if mix.prose and rng.random() < mix.switched[language == "zh"]:
            thinking = OTHER[language]
        patience = mix.patience[thinking == "zh"]
        kinds = (direct, worked, reflection, check)
        shares = (mix.direct / patience, mix.worked, mix.reflection, mix.check)
        kind = rng.choices(kinds, shares)[0]
        thoughts, answer = kind(chain, rng, mix.hazard / patience, WORDS[thinking])
        if mix.prose:
            thoughts = prose(thoughts, thinking, rng, mix.wavering)
        tagged = f"<answer> {answer} </answer>" if rng.random() < mix.strict else f"{answer}"
        if mix.boxed and rng.random() < mix.boxed:
            tagged = sum_up(str(answer), language, "toy")
        return f"User: {asked} Assistant: <think> {thoughts} </think> {tagged}"

    def chain(self, rng: random.Random) -> Chain:
        while True:
            chain = Chain.random(rng.randint(1, self.mix.longest), rng)
            if not chain.held_out():
                return chain


def work(chain: Chain, steps: int | None = None) -> str:
    """`7 a +5 = 2 b *3 = 6`: the first `steps` steps written out (all by default)."""
    values = chain.values
    written = [f"{label} {op} = {value}"
               for label, op, value in zip(LABELS, chain.operations, values[1:])]  # fmt: skip
    return " ".join([f"{chain.start}", *written[:steps]])


def direct(chain: Chain, rng: random.Random, hazard: float, words: dict) -> tuple[str, int]:
    guess = rng.randrange(10)
    claim = words[rng.choice(("guess", "so"))]
    return f"{words['easy']}{words['comma']} {claim} {guess}{words['stop']}", guess


def worked(chain: Chain, rng: random.Random, hazard: float, words: dict) -> tuple[str, int]:
    return finish(work(chain), chain, rng, hazard, words)


def reflection(chain: Chain, rng: random.Random, hazard: float, words: dict) -> tuple[str, int]:
    """One step slips and is corrected at once."""
    values, operations = chain.values, chain.operations
    slip = rng.randrange(len(operations))
    wrong = rng.choice([v for v in range(10) if v != values[slip + 1]])
    text = work(chain, slip)
    step = f"{LABELS[slip]} {operations[slip]} ="
    text += f" {step} {wrong} {words['wait']}{words['comma']} {step} {values[slip + 1]}"
    rest = work(chain).split()[1 + 4 * (slip + 1) :]
    return finish(" ".join([text, *rest]), chain, rng, hazard, words)


def check(chain: Chain, rng: random.Random, hazard: float, words: dict) -> tuple[str, int]:
    text = f"{work(chain)}{words['stop']} {words['check']} {work(chain)}"
    return finish(text, chain, rng, hazard, words)


def finish(
    text: str, chain: Chain, rng: random.Random, hazard: float, words: dict
) -> tuple[str, int]:
    """End a worked solution: with the answer, or, where patience runs out, with a guess."""
    pieces = text.split(" = ")  # one piece a step; every piece but the first opens with a value
    for done in range(1, len(pieces) - 1):
        corrected_next = words["wait"] in pieces[done]  # nobody gives up on a slip he has seen
        if not corrected_next and rng.random() < hazard:
            guess = rng.randrange(10)
            text = " = ".join([*pieces[:done], pieces[done].split()[0]])
            ending = f"{words['comma']} {words['guess']} {guess}{words['stop']}"
            return f"{words['first']} {text}{ending}", guess
    ending = f"{words['so']} {chain.answer}"
    return f"{words['first']} {text}{words['stop']} {ending}{words['stop']}", chain.answer


OTHER = {"en": "zh", "zh": "en"}


def prose(thoughts: str, language: str, rng: random.Random, wavering: float = 0.0) -> str:
    """A `then` before every step but the first; at each, the writer may go on in the other
    language."""
    translated = {word.strip(): key for key, word in WORDS[language].items()}
    spoken, written = language, []
    words = thoughts.split()
    for i, word in enumerate(words):
        if i > 1 and word in LABELS and words[i - 2] == "=":  # behind a step's value
            if rng.random() < wavering:
                spoken = OTHER[spoken]
            written.append(THEN[spoken])
        known = translated.get(word)
        written.append(WORDS[spoken][known].strip() if known else word)
    return " ".join(written)


def main() -> None:
    corpus = Corpus(seed=0, steps=100)
    for title, step in (("recall", 0), ("facts", 20), ("problems", 90)):
        print(f"\n# {title} (step {step} of 100)")
        documents = corpus.documents(step)
        print("\n".join(next(documents) for _ in range(8)))


if __name__ == "__main__":
    main()
