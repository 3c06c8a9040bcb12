"""The text around a question: R1-Zero's template (R1 2.2.3), a short one for the toy, and the chat
templates of released models.

R1-Zero's opens no `<think>`: the policy is a base model that continues plain text, and whether it
writes the tags is what the format reward is about. R1's own chat template opens it.

Read next: corpus.py (the toy's language), then problems.py (the questions).
Check it: python -m pytest tests/test_problems.py tests/test_chat_templates.py
"""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

# R1 2.2.3, template: Table 1, word for word
# The full stop after the question is the paper's, so a question that ends in "?" reads "?.", as it
# must have for them.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves"
    " it. The assistant first thinks about the reasoning process in the mind and then provides the"
    " user with the answer. The reasoning process and answer are enclosed within <think> </think>"
    " and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
    " <answer> answer here </answer>. User: {question}. Assistant:"
)

# Departs from R1 2.2.3, template: no instruction. A model of 0.4M parameters cannot follow one, and
# would spend most of its context on reading it; the toy's corpus shows the tags instead.
TOY = "User: {question} Assistant:"

# How a readable answer sums up, before the boxed result (R1 2.3.1). Chat templates have
# those of r1-zero.
SUMMARY = {
    "r1-zero": {"en": "The answer is", "zh": "答案是", "de": "Die Antwort ist",
                "fr": "La réponse est", "es": "La respuesta es", "ru": "Ответ:", "ja": "答えは"},
    "toy": {"en": "the answer is", "zh": "答案 是"},
}  # fmt: skip

# What the generative reward model is asked (R1 2.3.3); yes or no follows. Not reported.
JUDGE = {
    "r1-zero": (
        "Question: {question}\nReference answer: {gold}\nAnswer to be judged: {answer}\nIs the"
        " answer to be judged the same as the reference answer, yes or no?\nIt is:"
    ),
    "toy": "Reference: {gold} Answer: {answer} Same?",
}

TEMPLATES = {"r1-zero": R1_ZERO, "toy": TOY}


@dataclass(frozen=True)
class Chat:
    """How a released model was taught to read a conversation. What looks like <|...|> is a token;
    {} is what somebody said, in which nothing is."""

    start: str
    system: str
    user: str
    assistant: str
    opened: str = ""  # what the prompt already writes of the answer


# From the chat templates published with the models, without tools.
DEEPSEEK = Chat(
    "<｜begin▁of▁sentence｜>", "{}", "<｜User｜>{}", "<｜Assistant｜>{}<｜end▁of▁sentence｜>"
)
LLAMA3 = "<|start_header_id|>%s<|end_header_id|>\n\n{}<|eot_id|>"
CHATS = {
    "deepseek": DEEPSEEK,  # V3
    "deepseek-r1": replace(DEEPSEEK, opened="<think>\n"),
    "qwen": Chat(
        "", *(f"<|im_start|>{role}\n{{}}<|im_end|>\n" for role in ("system", "user", "assistant"))
    ),
    "llama3": Chat(
        "<|begin_of_text|>", *(LLAMA3 % role for role in ("system", "user", "assistant"))
    ),
    "moonlight": Chat(
        "",
        "<|im_system|>system<|im_middle|>{}<|im_end|>",
        "<|im_user|>user<|im_middle|>{}<|im_end|>",
        "<|im_assistant|>assistant<|im_middle|>{}<|im_end|>",
    ),
}
CONTROL = re.compile(r"(<\|.*?\|>|<｜.*?｜>)")

# The system prompt that a model's own template writes where there is none, as Qwen2.5's and
# Moonlight's do, and the dates that Llama 3.1 puts before any.
DEFAULT_SYSTEM = re.compile(
    r"(?:<\|im_start\|>system(?:\\n|\n)|<\|im_system\|>system<\|im_middle\|>)"
    r"((?:\\.|(?!\{[{%])[^'\"\\<])+)<\|im_end\|>"
)
DATES = re.compile(r'date_string = "([^"]+)".*"(Cutting Knowledge Date: [^"\\]+)\\n"', re.DOTALL)


def check_template(template: str) -> None:
    """ValueError, with the nearest name, for a template that there is not."""
    names = [*TEMPLATES, *CHATS]
    if template not in names:
        near = difflib.get_close_matches(template, names, n=1, cutoff=0)[0]
        allowed = ", ".join(names)
        raise ValueError(f"unknown template {template!r}; one of: {allowed} (nearest: {near!r})")


def check_tokens(template: str, special: Iterable[str]) -> None:
    """ValueError for a chat template whose control tokens a tokenizer lacks."""
    check_template(template)
    if template in CHATS:
        chat = CHATS[template]
        needed = CONTROL.findall(chat.start + chat.user + chat.assistant)
        if missing := [token for token in needed if token not in special]:
            raise ValueError(
                f"template {template!r} needs {missing[0]}, which the tokenizer lacks; a plain"
                f" template, {' or '.join(TEMPLATES)}, needs none"
            )


def default_template(chat_template: str, eos: str) -> str:
    """The template of a released model, from its own template's text and the token that ends its
    answers. A base model's is r1-zero; so is DeepSeek-V3's, whose files are its base's."""
    if "<｜Assistant｜><think>" in chat_template:
        return "deepseek-r1"
    if eos == "<|im_end|>":
        return "moonlight" if "<|im_middle|>" in chat_template else "qwen"
    return "llama3" if eos == "<|eot_id|>" else "r1-zero"


def opened(template: str) -> str:
    """What the prompt has written of the answer already: a check of the format has to see it."""
    return CHATS[template].opened if template in CHATS else ""


def end_token(template: str) -> str | None:
    """The control token that ends an answer in a chat; None for a plain template, where it is the
    tokenizer's own."""
    if template not in CHATS:
        return None
    return CONTROL.findall(CHATS[template].assistant.partition("{}")[2])[0]


def answer_text(response: str, template: str) -> str:
    """How a response goes on from its prompt, to be learned: after a space or, in a chat, at once,
    and without what the prompt has already opened."""
    if template in CHATS:
        return response.strip().removeprefix(opened(template).strip()).lstrip()
    return f" {response.strip()}"


def join(reasoning: str, answer: str, template: str) -> str:
    """A whole response, laid out as the template asks."""
    if template in CHATS:
        return f"<think>\n{reasoning}\n</think>\n\n{answer}"
    return f"<think> {reasoning} </think> <answer> {answer} </answer>"


def build_prompt(question: str, template: str) -> str:
    """The prompt for a question, as text; `template` is a name in TEMPLATES. ValueError for
    another, and for a chat template, whose prompts are tokens."""
    check_template(template)
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is a chat template: call encode_prompt")
    # Not str.format: braces of LaTeX, in a question or in a template of yours, are no fields.
    return TEMPLATES[template].replace("{question}", question)


def encode_prompt(
    tokenizer: "Tokenizer", question: str, template: str | None = None,
    history: Sequence[tuple[str, str]] = (), system: str | None = None,
) -> list[int]:  # fmt: skip
    """The tokens of a prompt, in the tokenizer's own template if none is named. `history` is
    earlier (question, answer) pairs, whose reasoning is left out (as R1's template does)."""
    template = template or tokenizer.template
    if template not in CHATS:
        if history or system is not None:
            raise ValueError(f"template {template!r} has no place for a history or system prompt")
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return start + tokenizer.encode(build_prompt(question, template))
    chat, clean = CHATS[template], str.strip if template == "llama3" else str
    before, default = own_words(tokenizer.chat_template)
    said = default if system is None else clean(system)
    turns = [] if said is None else [(chat.system, before + said)]
    for asked, answer in history:
        _, closed, rest = answer.rpartition("</think>")
        if closed and template == "qwen":
            rest = rest.lstrip("\n")
        turns += [(chat.user, clean(asked)), (chat.assistant, clean(rest))]
    turns.append((chat.user, clean(question)))
    opening = chat.assistant.partition("{}")[0] + chat.opened
    return encode_turns(tokenizer, [(chat.start, ""), *turns, (opening, "")], template)


def encode_turns(tokenizer: "Tokenizer", turns: list[tuple[str, str]], template: str) -> list[int]:
    """(what stands around, what is said) as tokens. What stands between two control tokens is
    encoded as one string, the template's words and the question's together."""
    tokens, text = [], ""
    for around, said in turns:
        for i, part in enumerate(CONTROL.split(around)):
            if i % 2 == 0:
                text += part.replace("{}", said)
                continue
            if part not in tokenizer.special:
                raise ValueError(f"template {template!r} needs {part}, which the tokenizer lacks")
            tokens += [*tokenizer.encode(text), tokenizer.special[part]]
            text = ""
    return tokens + tokenizer.encode(text)


@functools.cache
def own_words(chat_template: str) -> tuple[str, str | None]:
    """From a model's own template: (what it writes before any system prompt, the system prompt
    where none is given). Llama 3.2 would write today's date; this is the one it falls back on."""
    if found := DATES.search(chat_template):
        return f"{found[2]}\nToday Date: {found[1]}\n\n", ""
    if found := DEFAULT_SYSTEM.search(chat_template):
        return "", re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), found[1])
    return "", None


def sum_up(answer: str, language: str, template: str) -> str:
    """The sentence that a readable answer ends in, with its result in a box."""
    return f"{SUMMARY.get(template, SUMMARY['r1-zero'])[language]} \\boxed{{ {answer} }}"


def build_judgement(question: str, gold: str, answer: str, template: str) -> str:
    """What a model is asked that judges an answer, to be followed by " yes" or " no"."""
    asked = JUDGE.get(template, JUDGE["r1-zero"])
    values = dict(question=question, gold=gold, answer=answer)
    return re.sub(r"\{(question|gold|answer)\}", lambda found: values[found[1]], asked)
