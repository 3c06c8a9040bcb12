"""data/tokenizer.py and data/corpus.py: text to tokens and back, and what the toy reads."""

import base64
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from data.corpus import BILINGUAL, Corpus, Mix, prose
from data.problems import calc_chain
from data.tokenizer import HERE, Tokenizer, bilingual_ranks, read_ranks, toy_ranks
from model import Config

TOKENIZER = Tokenizer.toy()
BILINGUAL_TOKENIZER = Tokenizer.toy(bilingual=True)
HAN = re.compile("[\u3007\u4e00-\u9fff]")

# ---- text to tokens and back -----------------------------------------------------------

HARD = [
    "", " ", "\n", "\r\n\t\v\f", "   two  spaces ", "\u00a0\u3000\u200b\ufeff", "\x00\x7f\x85",
    "compute 7 a +5 b *3 c -8 ?", "12+34=46", "+5+5", "3.14e-10", "½ ² Ⅷ ٣ ๓", "\\frac{1}{2}",
    "计算 7 a +5 ?", "计算7简单，猜4。", "〇々〆 中文English混合 カタカナ 한국어",
    "a\u0301 é ﬁ ß ſ İ",
    "\U00020000\U0002a6d6", "🙂", "👩‍👩‍👧‍👦 🇨🇭 ❤️‍🔥", "\U0010ffff\ue000\ufffe",
    "עברית العربية हिन्दी",
    "<think></think>", "<answer", "< think >", "</reasoning> <summary>x</summary>",
    "<|end_of_text|>", "a <|pad|><|User|> b",
]  # fmt: skip


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_any_text_survives_the_round_trip(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert all(0 <= token < len(TOKENIZER.ranks) for token in tokens)


def test_random_texts_survive_the_round_trip():
    rng = random.Random(0)
    pieces = [*HARD, *(word for token in toy_ranks() if (word := token.decode("utf-8", "ignore")))]
    for _ in range(300):
        kind = rng.randrange(3)
        if kind == 0:  # any bytes, read as Latin-1
            text = rng.randbytes(40).decode("latin-1")
        elif kind == 1:  # any characters but halves of surrogate pairs
            codes = [rng.randrange(0x110000) for _ in range(20)]
            text = "".join(map(chr, (c for c in codes if not 0xD800 <= c < 0xE000)))
        else:
            text = "".join(rng.choices(pieces, k=10))
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_bytes_that_are_no_text_decode_to_the_replacement_character():
    bytes_of = {rank: token for token, rank in toy_ranks().items()}
    rng = random.Random(0)
    for _ in range(200):
        tokens = rng.choices(range(len(bytes_of)), k=12)
        expected = b"".join(bytes_of[token] for token in tokens).decode("utf-8", "replace")
        assert TOKENIZER.decode(tokens) == expected
    smile = TOKENIZER.encode("🙂")
    assert len(smile) == 4 and TOKENIZER.decode(smile[:3]) == "\ufffd"
    assert TOKENIZER.decode([0xFF, 0x41]) == "\ufffdA"
    # Half of a surrogate pair, as Python reads it from a broken pipe, is no text either.
    assert "\ufffd" in TOKENIZER.decode(TOKENIZER.encode("a\ud800b"))


def test_text_that_spells_a_special_token_is_plain_text():
    for name, token in TOKENIZER.special.items():
        assert token >= len(TOKENIZER.ranks)
        for text in (name, f"x{name}y", name * 3):
            tokens = TOKENIZER.encode(text)
            assert max(tokens) < len(TOKENIZER.ranks) and TOKENIZER.decode(tokens) == text
        assert TOKENIZER.decode([token]) == name
    assert TOKENIZER.eos_token_id != TOKENIZER.pad_token_id


def test_what_is_not_a_word_falls_back_to_bytes():
    assert TOKENIZER.encode("xyz") == list(b"xyz")
    assert TOKENIZER.encode("computer") == list(b"computer")
    assert TOKENIZER.encode("é") == list("é".encode())
    # A Chinese word needs no space around it.
    assert TOKENIZER.encode("计算xyz") == [TOKENIZER.ranks["计算".encode()], *b"xyz"]


# ---- the toy's vocabulary --------------------------------------------------------------


@pytest.mark.parametrize(
    "file, made", [("toy.tiktoken", toy_ranks), ("toy-bilingual.tiktoken", bilingual_ranks)]
)
def test_the_file_of_ranks_is_what_its_function_makes(file, made):
    ranks = read_ranks(HERE / file)
    assert ranks == made() and list(ranks) == list(made())
    assert list(ranks.values()) == list(range(len(ranks)))
    assert [ranks[bytes([byte])] for byte in range(256)] == list(range(256))
    # As in tiktoken's own reader.
    lines = (HERE / file).read_bytes().split(b"\n")
    assert {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines[:-1]} == ranks


def test_the_bilingual_ranks_begin_with_the_toys():
    """So that a text of the toy has the same tokens in both."""
    toy, both = (read_ranks(HERE / f"{name}.tiktoken") for name in ("toy", "toy-bilingual"))
    assert len(toy) == 403 and list(both.items())[:403] == list(toy.items())
    for text in documents(1000, PROBLEMS, chinese=0.5):
        assert BILINGUAL_TOKENIZER.encode(text) == TOKENIZER.encode(text)


def test_the_toy_model_has_a_row_for_every_token():
    ids = {*TOKENIZER.ranks.values(), *TOKENIZER.special.values()}
    assert ids == set(range(TOKENIZER.vocab_size))
    assert Config.preset("toy").vocab_size == TOKENIZER.vocab_size


WORDS = "compute easy guess so first wait check , . ? = :".split()
WORDS += "计算 简单 猜 所以 首先 等等 检查 ， 。".split()
WORDS += "User Assistant <think> </think> <answer> </answer> <reasoning> </summary>".split()
WORDS += [*"abcdefghijklmnopqrst", *"0123456789", *(f"{op}{d}" for op in "+-*" for d in range(10))]


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_the_toy_with_its_space_is_one_token(word):
    assert len(TOKENIZER.encode(f" {word}")) == 1
    # Also between others, wherever it stands.
    text = f" 7 {word} +5 {word} ."
    assert len(TOKENIZER.encode(text)) == 5


def test_a_problem_takes_a_token_for_each_word():
    assert len(TOKENIZER.encode("User: compute 7 a +5 ? Assistant:")) == 9
    for chinese in (0.0, 1.0):
        for document in documents(1000, PROBLEMS, chinese=chinese):
            words = re.sub("([:])", r" \1", document).split()
            assert len(TOKENIZER.encode(document)) == len(words)


@pytest.mark.parametrize("step", [0, 20, 60, 99])
def test_bilingual_documents_survive_and_take_a_token_for_each_word(step):
    """Also where there is chat: none of its words falls apart into bytes."""
    for document in islice(Corpus(3, 100, BILINGUAL).documents(step), 2500):
        tokens = BILINGUAL_TOKENIZER.encode(document)
        assert BILINGUAL_TOKENIZER.decode(tokens) == document
        # Signs are tokens, whether or not a space stands before them.
        words = re.sub(r"([:?{}]|(?<=\\)boxed|(?<=\{)\d)", r" \1", document).split()
        assert [BILINGUAL_TOKENIZER.decode([token]).strip() for token in tokens] == words


# ---- model directories -----------------------------------------------------------------


def write(directory, files: dict[str, bytes]):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_a_tokenizer_survives_its_files(tmp_path):
    special = {"<|end_of_text|>": 258, "<|pad|>": 260, "<|ünï|>": 259}
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b" \xe4\xb8": 257}
    odd = Tokenizer(ranks, r"\p{L}+|[^\p{L}]", special, "r1-zero")
    for tokenizer in (TOKENIZER, odd):
        loaded = Tokenizer.load(write(tmp_path / tokenizer.template, tokenizer.files()))
        assert (loaded.ranks, loaded.special) == (tokenizer.ranks, tokenizer.special)
        assert (loaded.pattern, loaded.template) == (tokenizer.pattern, tokenizer.template)
        assert loaded.eos_token_id == tokenizer.eos_token_id
        assert loaded.pad_token_id == tokenizer.pad_token_id
        for text in HARD:
            assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.files() == tokenizer.files()


GOOD = TOKENIZER.files()["tokenizer.tiktoken"].splitlines()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"Kw==",
        b"Kw== 42 1",
        b"K 42",
        b"K!w== 42",
        b"Kw== 4.2",
        b"Kw== x",
        b"\xff\xfe 42",
        b"{",
    ],
    ids=ascii,
)
def test_a_broken_line_of_ranks_is_named(tmp_path, line):
    content = b"\n".join([*GOOD[:42], line, *GOOD[43:]]) + b"\n"
    directory = write(tmp_path, {**TOKENIZER.files(), "tokenizer.tiktoken": content})
    with pytest.raises(ValueError, match=r"tokenizer\.tiktoken:43: ") as error:
        Tokenizer.load(directory)
    assert repr(line) in str(error.value)


@pytest.mark.parametrize("line", [GOOD[7], b"Kw== 7", GOOD[7].split()[0] + b" 42"], ids=ascii)
def test_a_token_or_rank_that_comes_twice_is_refused(tmp_path, line):
    content = b"\n".join([*GOOD[:42], line, *GOOD[43:]]) + b"\n"
    directory = write(tmp_path, {**TOKENIZER.files(), "tokenizer.tiktoken": content})
    with pytest.raises(ValueError, match=r"tokenizer\.tiktoken"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("kept", [0, 1, 255])
def test_ranks_that_lack_a_byte_are_refused(tmp_path, kept):
    """Else every text with that byte would panic in the middle of a run."""
    content = b"\n".join(GOOD[:kept])
    directory = write(tmp_path, {**TOKENIZER.files(), "tokenizer.tiktoken": content})
    with pytest.raises(ValueError, match=r"tokenizer\.tiktoken"):
        Tokenizer.load(directory)


def without(key: str) -> bytes:
    settings = json.loads(TOKENIZER.files()["tokenizer_config.json"])
    del settings[key]
    return json.dumps(settings).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{}", without("pattern"), without("special_tokens"),
     without("prompt_template")],
)  # fmt: skip
def test_broken_settings_are_refused_with_the_files_name(tmp_path, content):
    directory = write(tmp_path, {**TOKENIZER.files(), "tokenizer_config.json": content})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "tokenizer_config.json"])
def test_a_missing_file_is_named(tmp_path, name):
    directory = write(tmp_path, TOKENIZER.files())
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        Tokenizer.load(directory)


# ---- the corpus ------------------------------------------------------------------------

RECALL, FACTS, PROBLEMS = ((1.0, (1.0, 0.0, 0.0)),), ((1.0, (0, 1.0, 0)),), ((1.0, (0, 0, 1.0)),)


def documents(count: int, stages: tuple, seed: int = 0, **mix) -> list[str]:
    return list(islice(Corpus(seed, 1, Mix(stages=stages, **mix)).documents(0), count))


def value_after(value: int, operation: str) -> int:
    return eval(f"({value} {operation[0]} {operation[1:]}) % 10")


LISTING = r"[1-9](?: [a-j] [-+*][1-9]){1,10}"
STEP = re.compile(r" ([a-j]) ([-+*][1-9]) = (\d)")
PROBLEM = re.compile(
    rf"User: (compute|计算) ({LISTING}) \? Assistant:"
    r" <think> (.+) </think> (?:<answer> (\d) </answer>|(\d))"
)


def parse_listing(listing: str) -> tuple[int, list[tuple[str, str]]]:
    start, *rest = listing.split()
    labels, operations = rest[::2], rest[1::2]
    assert "".join(labels) == "abcdefghij"[: len(labels)]
    return int(start), list(zip(labels, operations))


def answer_of(listing: str) -> int:
    value, steps = parse_listing(listing)
    for _, operation in steps:
        value = value_after(value, operation)
    return value


def held_out(listing: str) -> bool:
    return hashlib.sha256(listing.encode()).digest()[0] < 26


def check_work(text: str) -> str:
    """That every step of `7 a +5 = 2 b *3 = 6` is right; its listing is returned."""
    start = int(text[0])
    steps = STEP.findall(text[1:])
    assert text == f"{start}" + "".join(f" {a} {b} = {c}" for a, b, c in steps)
    value = start
    for _, operation, result in steps:
        value = value_after(value, operation)
        assert value == int(result), text
    listing = f"{start}" + "".join(f" {label} {operation}" for label, operation, _ in steps)
    parse_listing(listing)
    return listing


def test_recall_asks_for_every_operation_by_its_label():
    for document in documents(500, RECALL):
        listed, asked = (part.split() for part in document.split(" ? "))
        pairs = list(zip(listed[::2], listed[1::2]))
        assert sorted(pairs) == sorted(zip(asked[::2], asked[1::2]))
        assert 2 <= len(dict(pairs)) == len(pairs) <= 8
        assert all(re.fullmatch("[a-l] [-+*][1-9]", " ".join(pair)) for pair in pairs)


def test_facts_are_right_step_by_step():
    lists = 0
    for document in documents(3000, FACTS):
        if " ? " in document:
            listing, _, rest = document.partition(" ? ")
            assert rest.endswith(" .") and check_work(rest[:-2]) == listing
            lists += 1
        else:
            listing = check_work(document)
        assert not held_out(listing)
    assert lists / 3000 == pytest.approx(Mix().lists, abs=0.03)


def read_problem(document: str) -> tuple[str, str, str, int, bool]:
    match = PROBLEM.fullmatch(document)
    assert match, document
    language, listing, thoughts, tagged, bare = match.groups()
    return language, listing, thoughts, int(tagged or bare), tagged is not None


def check_worked(listing: str, thoughts: str) -> tuple[str, int]:
    """Read `first ... . so 8 .` word by word; its kind and the answer it comes to are returned."""
    opening, *words, so, claim, stop = thoughts.split()
    assert opening == "first" and stop == "." and so in ("so", "guess")
    value, steps = parse_listing(listing)
    start, kind, done = value, "worked", 0
    passes, slipped = 1, False
    assert words.pop(0) == str(start) and words.pop() == {"so": ".", "guess": ","}[so]
    while words:
        if words[0] == "wait":
            assert slipped, f"nothing to correct in {thoughts}"
            assert words[1] == ","
            words, kind, slipped = words[2:], "reflection", False
            done -= 1
        elif words[0] == ".":
            assert words[1:3] == ["check", str(start)] and done == len(steps)
            words, kind, value, done = words[3:], "check", start, 0
            passes += 1
        assert not slipped, f"a slip is left standing in {thoughts}"
        label, operation, equals, result, *words = words
        assert (label, operation, equals) == (*steps[done], "=")
        right = value_after(value, operation)
        slipped = int(result) != right
        if not slipped:
            value = right
        done += 1
    assert not slipped, f"a slip is left standing in {thoughts}"
    if so == "so":
        assert done == len(steps) and int(claim) == value, thoughts
    return kind + ("" if so == "so" else ", guessed"), int(claim)


@pytest.mark.parametrize("hazard", [0.0, 0.35])
def test_worked_solutions_are_right_and_every_slip_is_corrected(hazard):
    kinds = Counter()
    for document in documents(6000, PROBLEMS, direct=0.0, hazard=hazard):
        _, listing, thoughts, answer, _ = read_problem(document)
        kind, claim = check_worked(listing, thoughts)
        assert claim == answer
        if not kind.endswith("guessed"):
            assert answer == answer_of(listing)
        kinds[kind] += 1
    assert {"worked", "reflection", "check"} <= set(kinds)
    assert ("worked, guessed" in kinds) == (hazard > 0)


def test_impatience_strikes_after_each_step_but_the_last():
    """A worked solution of n steps is finished with probability (1 - hazard)^(n - 1)."""
    for hazard in (0.35, 0.1):
        finished, count = Counter(), Counter()
        for document in documents(
            8000, PROBLEMS, direct=0, reflection=0, check=0, hazard=hazard, longest=4
        ):
            _, listing, thoughts, _, _ = read_problem(document)
            n = len(listing.split()) // 2
            count[n] += 1
            finished[n] += " so " in thoughts
        for n in (1, 2, 3, 4):
            assert finished[n] / count[n] == pytest.approx((1 - hazard) ** (n - 1), abs=0.04)


def test_direct_answers_are_guesses_and_one_in_ten_is_right():
    right = []
    for document in documents(4000, PROBLEMS, worked=0, reflection=0, check=0):
        _, listing, thoughts, answer, _ = read_problem(document)
        assert re.fullmatch(rf"easy , (guess|so) {answer} \.", thoughts)
        right.append(answer == answer_of(listing))
    assert sum(right) / 4000 == pytest.approx(0.1, abs=0.02)


def test_the_share_of_each_kind_is_the_mixs():
    mix = Mix()
    begin = 0.0
    for until, shares in mix.stages:
        corpus = Corpus(3, 100, mix)
        for progress in (begin, (begin + until) / 2, until - 0.01):
            found = Counter(
                "problem" if text.startswith("User") else "recall" if text[0].isalpha() else "facts"
                for text in islice(corpus.documents(round(100 * progress)), 2000)
            )
            for kind, share in zip(("recall", "facts", "problem"), shares, strict=True):
                assert found[kind] / 2000 == pytest.approx(share, abs=0.035), (progress, kind)
        begin = until
    kinds, tagged, lengths = Counter(), 0, Counter()
    # Without impatience, which may strike before the word that tells a kind.
    for document in documents(6000, PROBLEMS, hazard=0.0):
        _, listing, thoughts, _, strict = read_problem(document)
        words = {"easy": "direct", "wait": "reflection", "check": "check"}
        kinds[next((kind for word, kind in words.items() if word in thoughts), "worked")] += 1
        tagged += strict
        lengths[len(listing.split()) // 2] += 1
    for kind in ("direct", "worked", "reflection", "check"):
        assert kinds[kind] / 6000 == pytest.approx(getattr(mix, kind), abs=0.02)
    assert tagged / 6000 == pytest.approx(mix.strict, abs=0.02)
    assert set(lengths) == set(range(1, 11))
    assert all(n / 6000 == pytest.approx(0.1, abs=0.02) for n in lengths.values())


def test_held_out_problems_never_occur():
    """Not asked, not listed, not worked; and the evaluation's problems are held out indeed."""
    listings = set()
    for longest in (2, 10):
        mix = Mix(longest=longest)
        for step in (5, 20, 60, 99):
            for document in islice(Corpus(1, 100, mix).documents(step), 2500):
                if document.startswith("User"):
                    listings.add(read_problem(document)[1])
                elif document[0].isdigit():
                    listings.add(
                        document.partition(" ? ")[0] if " ? " in document else check_work(document)
                    )
    assert len(listings) > 5000 and not any(map(held_out, listings))
    asked = {
        p.question.removeprefix("compute ").removesuffix(" ?")
        for p in calc_chain((2, 3, 5)).held_out(300)
    }
    assert len(asked) == 300 and all(map(held_out, asked))
    assert not asked & listings
    # One in ten, or the test above would be empty.
    rng = random.Random(0)
    chance = [
        held_out(f"{rng.randint(1, 9)} a +{rng.randint(1, 9)} b *{rng.randint(1, 9)}")
        for _ in range(5000)
    ]
    assert sum(chance) / 5000 == pytest.approx(0.1, abs=0.03)


def test_the_corpus_is_a_function_of_seed_and_step_alone():
    def page(seed: int, step: int, count: int = 40) -> list[str]:
        return list(islice(Corpus(seed, 100).documents(step), count))

    expected = page(0, 60)
    random.seed(1)
    corpus = Corpus(0, 100)
    together = [corpus.documents(step) for step in (59, 60, 61)]
    pages = list(islice(zip(*together), 40))  # read in turns
    assert [b for _, b, _ in pages] == expected == page(0, 60, 80)[:40]
    assert not set(page(0, 61)) & set(expected) and not set(page(1, 60)) & set(expected)
    # And in another process, where Python hashes strings otherwise.
    code = "from itertools import islice; from data.corpus import Corpus;"
    code += "print('\\n'.join(islice(Corpus(0, 100).documents(60), 40)))"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert other.stdout.splitlines() == expected


def test_the_english_corpus_is_the_one_that_published_runs_have_read():
    """The first 200 documents of each stage, byte for byte."""
    wanted = {
        0: "2eb69f60fbe06d0c23ad1843165106eb310e099e6e6f9ce70193b779bc25a5ed",
        20: "9162b2be024978c8d48a638bf5784c9848208d66bcb73aa69a899820fd51bdc6",
        60: "7658432c2080e31ea3d43c2667ff3d3dd68a553e9436d7c4d43b9ed3765cf7bc",
    }
    for step, digest in wanted.items():
        page = "\n".join(islice(Corpus(0, 100).documents(step), 200))
        assert hashlib.sha256(page.encode()).hexdigest() == digest


def test_without_chinese_there_is_no_han_and_with_all_of_it_no_english_word():
    assert not any(HAN.search(text) for text in documents(2000, PROBLEMS))
    for document in documents(2000, PROBLEMS, chinese=1.0):
        language, _, thoughts, _, _ = read_problem(document)
        assert language == "计算" and HAN.search(thoughts)
        assert not re.search("[A-Za-z]{2,}", thoughts) and not re.search("[,.]", thoughts)
    share = (
        sum(text.startswith("User: 计算") for text in documents(3000, PROBLEMS, chinese=0.3)) / 3000
    )
    assert share == pytest.approx(0.3, abs=0.03)


def test_chinese_documents_say_the_same_as_english_ones():
    """Word for word, with only the words changed."""
    words = dict(
        计算="compute", 简单="easy", 猜="guess", 所以="so", 首先="first", 等等="wait", 检查="check"
    )
    words |= {"，": ",", "。": "."}
    mix = Mix(stages=PROBLEMS, chinese=1.0)
    chinese = islice(Corpus(0, 1, mix).documents(0), 500)
    english = islice(Corpus(0, 1, replace(mix, chinese=1e-9)).documents(0), 500)
    for ours, theirs in zip(chinese, english, strict=True):
        assert " ".join(words.get(word, word) for word in ours.split()) == theirs


# ---- prose -----------------------------------------------------------------------------

ENGLISH = dict(
    首先="first", 再="then", 所以="so", 猜="guess", 等等="wait", 检查="check", 简单="easy",
) | {"，": ",", "。": "."}  # fmt: skip


def spoken(text: str) -> set[str]:
    """The languages that its words are in; labels, digits and operations are in none."""
    english = set(ENGLISH.values())
    known = {word for word in text.split() if word in english or word in ENGLISH}
    return {"en" if word in english else "zh" for word in known}


def as_listed(thoughts: str) -> str:
    """In English, and without any `then`."""
    words = [ENGLISH.get(word, word) for word in thoughts.split()]
    return " ".join(word for word in words if word != "then")


@pytest.mark.parametrize(
    "language, before, after",
    [
        ("en", "first 7 a +5 = 2 .", "first 7 a +5 = 2 ."),
        ("en", "first 7 a +5 = 2 b *3 = 6 c -8 = 8 . so 8 .",
         "first 7 a +5 = 2 then b *3 = 6 then c -8 = 8 . so 8 ."),
        ("zh", "首先 7 a +5 = 2 b *3 = 6 ， 猜 4 。", "首先 7 a +5 = 2 再 b *3 = 6 ， 猜 4 。"),
        ("en", "first 7 a +5 = 3 wait , a +5 = 2 b *3 = 6 . so 6 .",
         "first 7 a +5 = 3 wait , a +5 = 2 then b *3 = 6 . so 6 ."),
        ("zh", "简单 ， 所以 8 。", "简单 ， 所以 8 。"),
    ],
)  # fmt: skip
def test_prose_by_hand(language, before, after):
    assert prose(before, language, random.Random(0)) == after


@pytest.mark.parametrize("language", ["en", "zh"])
def test_without_wavering_prose_has_a_then_before_each_step_but_the_first_in_one_language(language):
    mix = dict(prose=True, chinese=float(language == "zh"), direct=0, check=0)
    kinds, then = Counter(), {"en": "then", "zh": "再"}[language]
    for document in documents(2000, PROBLEMS, **mix):
        _, listing, thoughts, claim, _ = read_problem(document)
        kind, said = check_worked(listing, as_listed(thoughts))
        assert said == claim and spoken(thoughts) == {language}
        kinds[kind] += 1
        words = thoughts.split()
        places = [i for i, word in enumerate(words) if re.fullmatch("[a-j]", word)]
        assert len(places) == words.count("=")  # a label opens each step
        first, *others = places
        assert words[first - 1].isdigit()
        for i in others:  # a correction is no new step
            assert words[i - 1] == then or words[i - 2 : i] in (["wait", ","], ["等等", "，"])
        corrections = sum(word in ("wait", "等等") for word in words)
        assert words.count(then) == len(others) - corrections
    assert {"worked", "reflection"} <= set(kinds)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("wavering", [1.0, 0.5])
def test_prose_changes_its_language_at_a_then_and_nowhere_else(language, wavering):
    """At each, where wavering is 1."""
    mix = dict(prose=True, wavering=wavering, chinese=float(language == "zh"), direct=0)
    turns = Counter()
    for document in documents(2000, PROBLEMS, **mix):
        _, listing, thoughts, claim, _ = read_problem(document)
        assert check_worked(listing, as_listed(thoughts))[1] == claim
        parts = re.split("(?= (?:then|再) )", thoughts)  # each but the first opens with a `then`
        assert all(len(spoken(part)) == 1 for part in parts), thoughts
        assert spoken(parts[0]) == {language}
        turns.update(a != b for a, b in zip(map(spoken, parts), map(spoken, parts[1:])))
    assert turns[True] / turns.total() == pytest.approx(wavering, abs=0.03)
