"""Text to tokens and back, on tiktoken's byte-level BPE.

A tokenizer is three things: the ranks (which byte strings are tokens, and which merge goes first),
a regular expression that cuts text into pieces before merging, and the special tokens. The toy's
ranks are `toy.tiktoken`: the 256 bytes, and the words of the toy's language in English and Chinese.
Whatever is not a word falls back to bytes, so every text has a code.

Read next: prompts.py.  Rebuild toy.tiktoken: python -m data.tokenizer
"""

import base64
import json
from pathlib import Path

import tiktoken

from data import chat
from data.corpus import LABELS, THEN, WORDS

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

    encode(text) never yields a special token: text that spells one is plain text. Special tokens
    are added by id, on purpose.
    """

    def __init__(
        self, ranks: dict[bytes, int], pattern: str, special: dict[str, int], template: str
    ):
        self.ranks, self.pattern, self.special = ranks, pattern, special
        self.template = template  # the prompt template its model was trained with: prompts.py
        self.encoding = tiktoken.Encoding(
            "nanor1", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.special)

    @property
    def eos_token_id(self) -> int:
        return self.special["<|end_of_text|>"]

    @property
    def pad_token_id(self) -> int:
        return self.special["<|pad|>"]

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Bytes that are no UTF-8 come out as U+FFFD; special tokens are spelt out."""
        return self.encoding.decode(tokens, errors="replace")

    def files(self) -> dict[str, bytes]:
        """What a model directory carries of it: file name -> content."""
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items())
        settings = {
            "pattern": self.pattern,
            "special_tokens": self.special,
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|pad|>",
            "prompt_template": self.template,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        return {"tokenizer.tiktoken": b"".join(lines), "tokenizer_config.json": text.encode()}

    @classmethod
    def toy(cls, bilingual: bool = False) -> "Tokenizer":
        ranks = read_ranks(HERE / ("toy-bilingual.tiktoken" if bilingual else "toy.tiktoken"))
        special = {name: len(ranks) + i for i, name in enumerate(TOY_SPECIAL)}
        return cls(ranks, TOY_PATTERN, special, template="toy")

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a model directory. Raises FileNotFoundError, or ValueError for a file
        that is not one."""
        directory = Path(directory)
        for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} has no {name}: not a directory saved by nanoR1"
                )
        try:
            settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
            special, pattern = settings["special_tokens"], settings["pattern"]
            template = settings["prompt_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{directory / 'tokenizer_config.json'} can't be read: {error}"
            ) from None
        return cls(read_ranks(directory / "tokenizer.tiktoken"), pattern, special, template)


def read_ranks(path: Path) -> dict[bytes, int]:
    """A .tiktoken file: a token in base64 and its rank on each line. ValueError with file and line
    for anything else."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            known, ranks[token] = token in ranks, int(rank)
        except ValueError:
            raise ValueError(
                f"{path}:{number}: expected 'BASE64 RANK', found {line[:40]!r}"
            ) from None
        if known:
            raise ValueError(f"{path}:{number}: token {token!r} comes a second time")
    if len(set(ranks.values())) < len(ranks):
        raise ValueError(f"{path}: two tokens have the same rank")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:  # tiktoken would panic at the first text that has them
        raise ValueError(f"{path}: no token for byte {missing[0]}, and {len(missing) - 1} more")
    return ranks


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
