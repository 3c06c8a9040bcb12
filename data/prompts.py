"""The text around a question: R1-Zero's template (R1 2.2.3) and a short one for the toy.

No chat template and no opened `<think>`: the policy is a base model that continues plain text, and
whether it writes the tags is what the format reward is about.

Read next: corpus.py (the toy's language), then problems.py (the questions).
Check it: python -m pytest tests/test_problems.py
"""

import difflib
import re

# R1 Table 1, word for word. The full stop after the question is the paper's, so a question that
# ends in "?" reads "?.", as it must have for them.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves"
    " it. The assistant first thinks about the reasoning process in the mind and then provides the"
    " user with the answer. The reasoning process and answer are enclosed within <think> </think>"
    " and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
    " <answer> answer here </answer>. User: {question}. Assistant:"
)

# Departs from R1 2.2.3: no instruction. A model of 0.4M parameters cannot follow one, and would
# spend most of its context on reading it; the toy's corpus shows the tags instead.
TOY = "User: {question} Assistant:"

# How a readable answer sums up, before the boxed result (R1 2.3.1), for each template.
SUMMARY = {
    "r1-zero": {"en": "The answer is", "zh": "答案是"},
    "toy": {"en": "the answer is", "zh": "答案 是"},
}

# What the generative reward model is asked (R1 2.3.3); yes or no follows. Not reported.
JUDGE = {
    "r1-zero": (
        "Question: {question}\nReference answer: {gold}\nAnswer to be judged: {answer}\nIs the"
        " answer to be judged the same as the reference answer, yes or no?\nIt is:"
    ),
    "toy": "Reference: {gold} Answer: {answer} Same?",
}

TEMPLATES = {"r1-zero": R1_ZERO, "toy": TOY}


def build_prompt(question: str, template: str) -> str:
    """The prompt for a question; `template` is a name in TEMPLATES, anything else a ValueError."""
    if template not in TEMPLATES:
        near = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0)[0]
        allowed = ", ".join(TEMPLATES)
        raise ValueError(f"unknown template {template!r}; one of: {allowed} (nearest: {near!r})")
    # Not str.format: braces of LaTeX, in a question or in a template of yours, are no fields.
    return TEMPLATES[template].replace("{question}", question)


def sum_up(answer: str, language: str, template: str) -> str:
    """The sentence that a readable answer ends in, with its result in a box."""
    return f"{SUMMARY[template][language]} \\boxed{{ {answer} }}"


def build_judgement(question: str, gold: str, answer: str, template: str) -> str:
    """What a model is asked that judges an answer, to be followed by " yes" or " no"."""
    values = dict(question=question, gold=gold, answer=answer)
    return re.sub(r"\{(question|gold|answer)\}", lambda found: values[found[1]], JUDGE[template])
