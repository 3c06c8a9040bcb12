"""The tokenizers of released models, as their directories carry them: a Hugging Face
tokenizer.json (byte-level BPE: DeepSeek, Qwen, Llama 3), or a file of ranks (Moonlight, Qwen 1,
Llama as Meta publishes it). Each reader returns the arguments of data.tokenizer.Tokenizer.

tiktoken merges the pair whose result has the lowest rank, tokenizer.json's library the pair that
comes first in its list. The two agree where each token's own bytes, under the merges before its
own, end in the two parts of its own merge. Training on text leaves no other list: a merge is learnt
where its parts stand side by side, and the merges before it treat a token alike in any text.

A character newer than the Unicode of Python, of `regex` and of tiktoken may be cut differently.

Read next: prompts.py.  Check it: python -m pytest tests/test_released_tokenizers.py
"""

import base64
import json
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

from data.prompts import default_template

# What cuts text before merging, from the code published with each model.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + END
QWEN_PATTERN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + END
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
MOONLIGHT_PATTERN = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}" + END
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The special tokens that follow the ranks, in their published order.
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
]  # fmt: skip
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPECIAL += [f"<|extra_{i}|>" for i in range(205)]
# What a tokenizer can be read from (the first is our own; a tokenizer.json goes before the others),
# and what is saved with a model.
KINDS = [
    "tokenizer.tiktoken",
    "tokenizer.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "tokenizer.model",
]
FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "*.tiktoken", "tiktoken.model", "tokenizer.model",
         "tokenization_*.py", "chat_template.jinja", "generation_config.json"]  # fmt: skip
CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)  # what a control token looks like

# GPT-2's alphabet: a printable character for each byte. `BYTES` takes it to Latin-1, and Latin-1's
# characters that are not in it to one that no byte has.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
ALPHABET = {byte: chr(byte) for byte in PRINTABLE}
ALPHABET |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTES = {byte: 0xFFFF for byte in OTHERS} | {ord(c): byte for byte, c in ALPHABET.items()}


def spelt(token: str) -> bytes | None:
    """The bytes that a token of a tokenizer.json stands for; None if it is not in the alphabet."""
    try:
        return token.translate(BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return None


def dump(settings: dict) -> bytes:
    return json.dumps(settings, indent=2, ensure_ascii=False).encode()


def read_json(path: Path) -> dict:
    """An object from a file; {} where there is none, ValueError with its name if it is broken."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return {}
    except ValueError as error:  # broken UTF-8 or JSON
        raise ValueError(f"{path} can't be read: {error}") from None
    return value


def read_ranks(path: Path) -> dict[bytes, int]:
    """A .tiktoken file: a token in base64 and its rank on each line. ValueError with file and line
    for anything else."""
    content, ranks = path.read_bytes(), {}
    if b"\0" in content:
        raise ValueError(f"{path} is binary (sentencepiece?); only tiktoken's files can be read")
    for number, line in enumerate(content.splitlines(), 1):
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


def read(directory: Path, template: str | None) -> dict:
    """The arguments of Tokenizer for a released model's directory, in the first of KINDS that it
    has. eos, pad and the other ends come from the files beside it."""
    settings = read_json(directory / "tokenizer_config.json")
    path = next(directory / name for name in KINDS if (directory / name).is_file())
    json_file = path.name == "tokenizer.json"
    found = read_tokenizer_json(path) if json_file else read_rank_file(path, settings)
    special = found["special"]
    named = read_json(directory / "special_tokens_map.json") | settings
    eos, bos, pad = (text_of(named.get(f"{each}_token")) for each in ("eos", "bos", "pad"))
    generation = read_json(directory / "generation_config.json")
    ends, more = ends_of(generation), ends_of(read_json(directory / "config.json"))
    names = {number: name for name, number in special.items()}
    eos = eos or found.get("eos") or next((names[end] for end in ends + more if end in names), None)
    bos = bos if named.get("add_bos_token") else found.get("bos")
    for end, name in (("end", eos), ("begin", bos or eos)):
        if name not in special:
            raise ValueError(f"{path}: texts {end} in {name!r}: not among its special tokens")
    originals = {
        file.name: file.read_bytes()
        for pattern in FILES for file in sorted(directory.glob(pattern)) if file.is_file()
    }  # fmt: skip
    stop = [*dict.fromkeys([special[eos], *ends, *more, *found.get("stop", ())])]
    if {*more} - {special[eos], *ends}:  # config.json is the model's, which is written anew
        originals["generation_config.json"] = dump(generation | {"eos_token_id": stop})
    chat_template = read_chat_template(directory, settings)
    template = template or named.get("prompt_template") or default_template(chat_template, eos)
    reserved = next((name for name in special if "reserved" in name), eos)
    return found | dict(
        bos=bos, eos=eos, pad=pad if pad in special else reserved, stop=stop,
        template=template, chat_template=chat_template, originals=originals,
    )  # fmt: skip


def ends_of(config: dict) -> list[int]:
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(type(end) is not int for end in ends):
        raise ValueError(f"eos_token_id {ends}: not a whole number, nor a list of them")
    return ends


def read_chat_template(directory: Path, settings: dict) -> str:
    """The text of the model's own chat template; "" where it has none."""
    if (file := directory / "chat_template.jinja").is_file():
        return file.read_text("utf-8")
    found = settings.get("chat_template") or ""
    if isinstance(found, list):  # several, by name
        found = {each["name"]: each["template"] for each in found}.get("default", "")
    return found


def text_of(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


# ---- a file of ranks ---------------------------------------------------------------------


def read_rank_file(path: Path, settings: dict) -> dict:
    """tiktoken.model (Moonlight, Kimi), qwen.tiktoken or Meta's tokenizer.model; `settings` is
    tokenizer_config.json, whose added_tokens_decoder names special tokens by id."""
    ranks = read_ranks(path)
    try:
        named = settings.get("added_tokens_decoder", {}).items()
        named = {int(i): {"content": token["content"], **token} for i, token in named}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        beside = path.with_name("tokenizer_config.json")
        raise ValueError(f"{beside}: added_tokens_decoder can't be read: {error!r}") from None
    start = max(ranks.values()) + 1
    if path.name == "tiktoken.model":
        names = [f"<|reserved_token_{start + i}|>" for i in range(256)]
        rest = dict(pattern=MOONLIGHT_PATTERN)
    elif path.name == "qwen.tiktoken":
        names, rest = QWEN_SPECIAL, dict(pattern=QWEN_PATTERN, nfc=True, eos="<|endoftext|>")
    else:
        names = LLAMA3_SPECIAL
        rest = dict(pattern=LLAMA3_PATTERN, bos="<|begin_of_text|>", eos="<|end_of_text|>")
        rest["stop"] = [start + LLAMA3_SPECIAL.index(f"<|{end}|>") for end in ("eom_id", "eot_id")]
    published = {start + i: {"content": name, "special": True} for i, name in enumerate(names)}
    added = [{"id": i, **token} for i, token in sorted((published | named).items())]
    # Qwen's code normalizes the text before it looks for its special tokens.
    added = [{**token, "normalized": True} for token in added]
    return dict(ranks=ranks, **rest) | sort_added(path, added, nfc="nfc" in rest)


def sort_added(path: Path, added: list[dict], nfc: bool) -> dict:
    """Added tokens as `special` (control tokens, which text never yields: those marked special, and
    those that look like one, since DeepSeek marks its roles as text), `words` (text that is one
    token), and which of them are looked for after NFC. ValueError for what can't be told apart."""
    special, words, normalized = {}, {}, set()
    for token in added:
        name, number = token["content"], token["id"]
        if nfc and token.get("normalized", not token.get("special", False)):
            name = unicodedata.normalize("NFC", name)
            normalized.add(name)
        for odd in ("lstrip", "rstrip", "single_word"):
            if token.get(odd):
                raise ValueError(f"{path}: added token {name!r} with {odd}: not supported")
        if not name or name in special or name in words:
            raise ValueError(f"{path}: added token {name!r} is empty or comes a second time")
        control = token.get("special", False) or CONTROL.fullmatch(name)
        (special if control else words)[name] = number
    numbers = [*special.values(), *words.values()]
    if len({*numbers}) < len(numbers):
        raise ValueError(f"{path}: two added tokens have the same id")
    return dict(special=special, words=words, normalized=frozenset(normalized))


# ---- tokenizer.json ----------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> dict:
    """A byte-level BPE. ValueError, with the file and the thing, for another kind of tokenizer and
    for a broken file."""
    data = read_json(path)
    try:
        cuts, pattern = read_cuts(path, data["pre_tokenizer"])
        nfc = read_normalizer(path, data.get("normalizer"))
        if data["decoder"]["type"] != "ByteLevel":
            raise ValueError(f"{path}: decoder {data['decoder']['type']}: not supported")
        added = sort_added(path, data.get("added_tokens") or [], nfc)
        names = added["special"] | added["words"]
        vocab = data["model"]["vocab"] | names
        spelling = {token: spelt(token) for token in vocab}
        ranks, ids = read_merges(path, data["model"], names, spelling)
        bos = first_of(data.get("post_processor") or {})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no tokenizer of byte-level BPE: {error!r}") from None
    # The library decodes what is not in the alphabet, as most added tokens, as it is.
    spelling = {
        number: token.encode() if spelling[token] is None else spelling[token]
        for token, number in vocab.items()
    }
    return dict(
        ranks=ranks, ids=ids, pattern=pattern, cuts=cuts, nfc=nfc, bos=bos, spelling=spelling,
        **added,
    )  # fmt: skip


def read_merges(
    path: Path, model: dict, added: dict[str, int], spelling: dict[str, bytes | None]
) -> tuple[dict[bytes, int], list[int] | None]:
    """(ranks for tiktoken, None or the ids that they stand for)."""
    plain = {"type": "BPE", "byte_fallback": False, "dropout": None}
    plain |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    for key, allowed in plain.items():
        if model.get(key, allowed) not in (allowed, None):
            raise ValueError(f"{path}: {key} {model[key]!r}: not supported")
    vocab, made, last = model["vocab"], dict.fromkeys(ALPHABET.values()), None
    numbers = [*(vocab | added).values()]
    if len({*numbers}) < len(numbers) or any(vocab.get(t, n) != n for t, n in added.items()):
        raise ValueError(f"{path}: duplicate ids: two tokens have the same, or a token has two")
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        token = "".join(pair)
        if len(pair) != 2 or pair[0] not in vocab or pair[1] not in vocab or token not in vocab:
            raise ValueError(f"{path}: merge {merge!r} of tokens that are not in the vocabulary")
        # Ways to make one token that follow each other (Llama 3 lists all) are one rank.
        if token in made and token != last:
            raise ValueError(f"{path}: {token!r} is made by merges far apart: not supported")
        made[token], last = None, token
    missing = [byte for byte, c in ALPHABET.items() if c not in vocab]
    if missing:
        raise ValueError(f"{path}: no token for byte {missing[0]}, and {len(missing) - 1} more")
    if odd := [token for token in made if token in added or spelling[token] is None]:
        raise ValueError(f"{path}: {odd[0]!r} is made by a merge, and an added token or no bytes")
    in_order = all(vocab[a] < vocab[b] for a, b in pairwise(list(made)[256:]))
    # tiktoken takes a whole piece that is in its ranks at once. Tokens that no merge makes are
    # therefore left out, unless that is what the file asks for.
    if model.get("ignore_merges"):
        for token in sorted(vocab.keys() - made.keys() - added.keys()):
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            if any(left in vocab and right in vocab for left, right in splits):
                raise ValueError(f"{path}: no merge makes {token!r} of its parts: not supported")
            if spelling[token]:
                made[token] = None
    if in_order:  # then an id is as good as a rank
        return {spelling[token]: vocab[token] for token in made}, None
    ids = [vocab[token] for token in made]
    return {spelling[token]: rank for rank, token in enumerate(made)}, ids


def read_normalizer(path: Path, normalizer: dict | None) -> bool:
    """Whether text is brought to NFC first."""
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        return any([read_normalizer(path, each) for each in normalizer["normalizers"]])
    if normalizer["type"] != "NFC":
        raise ValueError(f"{path}: normalizer {normalizer['type']}: not supported")
    return True


def read_cuts(path: Path, step: dict) -> tuple[tuple[str, ...], str]:
    """(the regular expressions that cut text one after the other, the last one, for tiktoken)."""
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        what = "add_prefix_space" if last["type"] == "ByteLevel" else last["type"]
        raise ValueError(f"{path}: pre-tokenizer that ends in {what}: not supported")
    patterns = []
    for split in splits:
        if split["type"] != "Split" or split["behavior"] != "Isolated" or split.get("invert"):
            told = [split.get(key) for key in ("type", "behavior", "invert")]
            raise ValueError(f"{path}: pre-tokenizer {told}: not supported")
        [(kind, pattern)] = split["pattern"].items()
        # In the library's dialect ^ and $ stand at each line.
        patterns.append(re.escape(pattern) if kind == "String" else f"(?m:{pattern})")
    if last.get("use_regex", True):
        return (*patterns,), GPT2_PATTERN
    if not patterns:
        return (), r"[\s\S]+"
    # tiktoken drops what its pattern does not match; the library keeps such a stretch as a piece.
    *cuts, pattern = patterns
    return (*cuts,), rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def first_of(processor: dict) -> str | None:
    """The token that a post-processor puts before each text."""
    for each in processor.get("processors", [processor]):
        if each.get("type") == "TemplateProcessing" and "SpecialToken" in each["single"][0]:
            return each["single"][0]["SpecialToken"]["id"]
    return None
