"""Text to tokens and back, on tiktoken's byte-level BPE.

A tokenizer is three things: the ranks (which byte strings are tokens, and which merge goes first),
a regular expression that cuts text into pieces before merging, and the special tokens. The toy's
ranks are `toy.tiktoken`: the 256 bytes, and the words of the toy's language in English and Chinese.
Whatever is not a word falls back to bytes, so every text has a code.

Read next: released.py.  Rebuild toy.tiktoken: python -m data.tokenizer
"""

import base64
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise, zip_longest
from pathlib import Path

import regex  # tiktoken's own dependency
import tiktoken

from data import chat, released
from data.corpus import LABELS, THEN, WORDS
from data.prompts import TEMPLATES, check_tokens, end_token
from data.released import dump, read_json, read_ranks

HERE = Path(__file__).parent

# A piece is a tag, a word, an operation with its digit, one digit, other signs, or white space;
# each but the last takes the space before it along, so that " +5" is one token.
TOY_PATTERN = (
    r" ?</?(?:think|answer|reasoning|summary)>"
    r"| ?\p{Han}+| ?\p{L}+| ?[+\-*]\d| ?\d| ?[^\s\p{L}\d]|\s"
)
TOY_SPECIAL = [
    "<|end_of_text|>",  # ends a document and an answer: the only stop token
    "<|pad|>",  # never the same as the end, which has to be learned
    "<|special_token|>",  # the paper's cold-start format: |special_token|<reasoning>|special_token|
    "<|User|>",
    "<|Assistant|>",
]


class Tokenizer:
    """tiktoken with the few things that a model directory has to carry.

    encode(text) never yields a control token (a turn's end, a role): text that spells one is plain
    text. They are added by id, on purpose. `words`, as a released model's <think>, are text that
    happens to be one token. data/released.py makes what the toy leaves out.
    """

    def __init__(
        self, ranks: dict[bytes, int], pattern: str, special: dict[str, int], template: str, *,
        words: dict[str, int] = {}, normalized: frozenset[str] = frozenset(),
        cuts: tuple[str, ...] = (), nfc: bool = False, ids: Sequence[int] | None = None,
        spelling: dict[int, bytes] = {}, bos: str | None = None, eos: str = "<|end_of_text|>",
        pad: str = "<|pad|>", stop: Sequence[int] = (), chat_template: str = "",
        originals: dict[str, bytes] = {},
    ):  # fmt: skip
        self.ranks, self.pattern, self.special = ranks, pattern, special
        self.template = template  # the prompt template its model was trained with: prompts.py
        self.encoding = tiktoken.Encoding(
            "nanor1", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.words = words
        self.cuts = [regex.compile(cut, regex.VERSION1) for cut in cuts]  # before `pattern`
        self.nfc = nfc  # text is normalized first
        self.ids = ids  # a token's id by its rank; None where they are the same
        self.chat_template, self.originals = chat_template, originals  # as downloaded
        self._bytes = {ids[rank] if ids else rank: token for token, rank in ranks.items()}
        self._bytes |= {number: name.encode() for name, number in (special | words).items()}
        self._bytes |= spelling
        # What is looked for in the raw text and in the normalized, by `special`.
        self._added = special | words
        self._patterns = [
            (either({*names} - normalized), either(normalized & {*names}))
            for names in (words, self._added)
        ]
        self.vocab_size = max(self._bytes) + 1  # the highest id + 1
        self.eos_token_id, self.pad_token_id = special[eos], special[pad]
        self.bos_token_id = special[bos] if bos else None  # where each text begins with it
        self._stop = stop

    @property
    def end_id(self) -> int:
        """Ends an answer that is learned: a turn's end where the template is a chat's."""
        return self.special.get(end_token(self.template), self.eos_token_id)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Any of these ends an answer that is sampled."""
        return tuple(dict.fromkeys([self.eos_token_id, self.end_id, *self._stop]))

    @property
    def tags(self) -> bool:
        """Whether the template asks for <answer> tags; a chat template does not."""
        return self.template in TEMPLATES

    def same_tokens(self, other: "Tokenizer") -> bool:
        """Whether a model that reads the one can read the other."""
        return self._bytes == other._bytes

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text; special=True also reads control tokens from it."""
        raw, normal = self._patterns[special]
        if not (raw or normal or self.nfc or self.cuts or self.ids):
            return self.encoding.encode_ordinary(text)
        tokens = []
        for section, name in sections(raw, text):
            if self.nfc:
                section = unicodedata.normalize("NFC", section)
            for piece, inner in sections(normal, section):
                tokens += self._merge(piece)
                if inner:
                    tokens.append(self._added[inner])
            if name:
                tokens.append(self._added[name])
        return tokens

    def _merge(self, text: str) -> list[int]:
        pieces = [text]
        for cut in self.cuts:
            pieces = [part for piece in pieces for part in isolate(cut, piece)]
        ranks = [rank for piece in pieces for rank in self.encoding.encode_ordinary(piece)]
        return [self.ids[rank] for rank in ranks] if self.ids else ranks

    def token_bytes(self, token: int) -> bytes:
        """b"" for an id that is no token: models have more rows than tokens."""
        return self._bytes.get(token, b"")

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes that are no UTF-8 come out as U+FFFD; control tokens are spelt out."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        """What a model directory carries of it: file name -> content. Downloaded ones stay as they
        were, but for the name of the template."""
        if self.originals:
            files = dict(self.originals)
            settings = json.loads(files.get("tokenizer_config.json", "{}"))
            settings["prompt_template"] = self.template
            files["tokenizer_config.json"] = dump(settings)
            ends = json.loads(files.get("generation_config.json", "{}"))
            if self.end_id not in (self.eos_token_id, *released.ends_of(ends)):
                ends["eos_token_id"] = [*self.stop_ids]  # what the template ends an answer with
                files["generation_config.json"] = dump(ends)
            return files
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items())
        settings = {
            "pattern": self.pattern,
            "special_tokens": self.special,
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|pad|>",
            "prompt_template": self.template,
        }
        ends = {"eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}
        return {
            "tokenizer.tiktoken": b"".join(lines),
            "tokenizer_config.json": dump(settings),
            "generation_config.json": dump(ends),
        }

    @classmethod
    def toy(cls, bilingual: bool = False) -> "Tokenizer":
        ranks = read_ranks(HERE / ("toy-bilingual.tiktoken" if bilingual else "toy.tiktoken"))
        special = {name: len(ranks) + i for i, name in enumerate(TOY_SPECIAL)}
        return cls(ranks, TOY_PATTERN, special, template="toy")

    @classmethod
    def load(cls, directory: str | Path, template: str | None = None) -> "Tokenizer":
        """The tokenizer of a model directory, ours or a released model's; `template` instead of the
        directory's own. Raises FileNotFoundError, or ValueError for a file that is not one."""
        directory = Path(directory)
        if not any((directory / name).is_file() for name in released.KINDS):
            *names, last = released.KINDS
            raise FileNotFoundError(
                f"{directory} has no {', '.join(names)} or {last}: copy its tokenizer's files there"
            )
        if not (directory / "tokenizer.tiktoken").is_file():
            found = cls(**released.read(directory, template))
            if template:
                check_tokens(template, found.special)
            return found
        path = directory / "tokenizer_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no {path.name}: not one saved by nanoR1")
        settings = read_json(path)
        try:
            special, pattern = settings["special_tokens"], settings["pattern"]
            template = template or settings["prompt_template"]
        except KeyError as error:
            raise ValueError(f"{path} can't be read: {error}") from None
        check_tokens(template, special)
        return cls(read_ranks(directory / "tokenizer.tiktoken"), pattern, special, template)


def either(names: Set[str]) -> re.Pattern | None:
    """Finds any of the names, the longest of those that begin at the same place."""
    names = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None


def sections(names: re.Pattern | None, text: str) -> Iterator[tuple[str, str | None]]:
    """The text before each name, with the name, and the text after the last, with None."""
    found = names.split(text) if names else [text]
    return zip_longest(found[::2], found[1::2])


def isolate(cut: "regex.Pattern", text: str) -> list[str]:
    """Each match, and each stretch between matches."""
    ends = [0, *(end for found in cut.finditer(text) for end in found.span()), len(text)]
    return [text[a:b] for a, b in pairwise(ends) if a < b]


def toy_ranks() -> dict[bytes, int]:
    """The 256 bytes, then the toy's words, each with a space before it (and those that can open a
    text also without)."""
    words = [word for language in WORDS.values() for word in language.values()]
    words = [word.strip() for word in words]
    signs = ["?", "=", ".", ",", ":"]
    operations = [f"{op}{digit}" for op in "+-*" for digit in range(10)]
    tags = ["<think>", "</think>", "<answer>", "</answer>", "<reasoning>", "</reasoning>",
            "<summary>", "</summary>"]  # fmt: skip
    digits = [str(digit) for digit in range(10)]
    roles = ["User", "Assistant"]
    spaced = [*LABELS, *digits, *operations, *signs, *words, *tags, *roles]
    bare = [*roles, *words, *tags, *operations]  # single characters are bytes already
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [f" {word}".encode() for word in spaced] + [word.encode() for word in bare]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def bilingual_ranks() -> dict[bytes, int]:
    """The toy's, then the words of its general requests and of the box."""
    words = [*THEN.values(), "\\", "boxed", "{", "}", *chat.words()]
    tokens = [*toy_ranks(), *(f" {word}".encode() for word in words), b"boxed", b"Reference"]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def main() -> None:
    for name, ranks in (("toy", toy_ranks()), ("toy-bilingual", bilingual_ranks())):
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
        (HERE / f"{name}.tiktoken").write_bytes(b"".join(lines))
        print(f"{name}.tiktoken: {len(lines)} ranks")


if __name__ == "__main__":
    main()
