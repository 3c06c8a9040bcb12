"""Tests of rewards.py: what must score, what must not, and how long a hostile output may take."""

import copy
import math
import operator
import time
from fractions import Fraction

import pytest
import torch

import rewards
from data.problems import Problem
from model import Config, Transformer
from rewards import (
    RewardModel,
    accuracy_reward,
    countdown_equal,
    extract_answer,
    format_reward,
    general_format_reward,
    language_of,
    language_reward,
    majority,
    math_equal,
    need_rules,
    overlong_penalty,
    pairwise_loss,
    pointwise_loss,
    reflections,
    repetition,
    summary,
)
from runtime.pretrained import load_pretrained, save_pretrained

GOOD = "<think> 6 * 7 </think> <answer> 42 </answer>"
HUGE = 300_000  # characters: more than an output of 32,768 tokens


# ---- the final answer ------------------------------------------------------------------

ACCEPTED = [  # every response here must score 1 against "42", or the hostile ones prove nothing
    GOOD,
    "<think> 6 * 7 </think> <answer>$42$</answer>",
    "<think> 6 * 7 </think> The answer is \\boxed{42}.",
    "<think> 6 * 7 </think> <answer> So it is \\boxed{42}. </answer>",
    "<think> 6 * 7 </think> <answer>41</answer> No: <answer>42</answer>",
    "<think> 6 * 7 </think> \\boxed{41} <answer>42</answer>",
    "<think> 6 * 7 </think> <answer>41</answer> \\boxed{42}",
    "<think> perhaps \\boxed{41} or <answer>43 </think> <answer>42</answer>",
    "<think> 6 * 7 </think> Write \\boxed around it: \\boxed {42}",
    "no reasoning, \\boxed{42}",
    "<answer>42</answer>",
    "the opening tag is missing </think> <answer>42</answer>",
    "<think>\n6 * 7\n</think>\n<answer>\n42.0\n</answer>",
]

HOSTILE = [  # every response here must score 0 against "42"
    # nothing offered
    "",
    " \n ",
    "42",
    "The answer is 42.",
    "answer: 42",
    "<think> 42 </think>",
    "<think> 6 * 7 </think> 42",
    # inside the reasoning, or no end of the reasoning
    "<think> \\boxed{42} </think>",
    "<think> <answer>42</answer> </think>",
    "<think> \\boxed{42} </think> The answer is above.",
    "<think> <answer>42</answer> </think> <answer>41</answer>",
    "<think> \\boxed{42}",
    "<think> <answer> 42 </answer>",
    "<think> 6 * 7 <answer> 42 </answer> <think>",
    "</think> <think> <answer> 42 </answer>",
    "<think> a </think> <think> <answer> 42 </answer>",
    "<think> a </think> <think> b </think> <answer> 42 </answer>",
    "<think> a </think> </think> <answer> 42 </answer>",
    "<think> <think> a </think> <answer> 42 </answer>",
    "<think> a < /think> <answer> 42 </answer>",
    "<think> a </THINK> <answer> 42 </answer>",
    # malformed last tag or box
    "<think> a </think> <answer> 42",
    "<think> a </think> 42 </answer>",
    "<think> a </think> </answer> 42 <answer>",
    "<think> a </think> <answer> 42 </answer></answer>",
    "<think> a </think> <answer><answer> 42 </answer>",
    "<think> a </think> <answer><answer> 42 </answer></answer>",
    "<think> a </think> <answer> 42 <answer>",
    "<think> a </think> <answer> 42 </answer> <answer>",
    "<think> a </think> <answer> 42 </answer> <answer> </answer>",
    "<think> a </think> <answer></answer>",
    "<think> a </think> <ANSWER> 42 </ANSWER>",
    "<think> a </think> < answer > 42 </ answer >",
    "<think> a </think> \\boxed{42",
    "<think> a </think> \\boxed 42",
    "<think> a </think> \\boxed{}",
    "<think> a </think> \\boxed{42} \\boxed{",
    "<think> a </think> \\boxed{42} \\boxed{}",
    "<think> a </think> \\boxed{42} \\boxed",
    "<think> a </think> \\boxed{41 \\boxed{42}",
    "<think> a </think> \\boxed{\\boxed{42}}",
    "<think> a </think> \\boxed{42\\}",
    "<think> a </think> <answer> \\boxed{42 </answer>",
    "<think> a </think> <answer> \\boxed{42 </answer> }",
    "<think> a </think> <answer> 42 </answer> \\boxed{",
    # several answers
    "<think> a </think> <answer> 41 or 42 or 43 </answer>",
    "<think> a </think> <answer> 42 or 43 </answer>",
    "<think> a </think> <answer> 42, 43 </answer>",
    "<think> a </think> <answer> (42, 43) </answer>",
    "<think> a </think> <answer> \\boxed{42} or \\boxed{43} </answer>",
    "<think> a </think> <answer> \\boxed{43} or \\boxed{42} </answer>",
    "<think> a </think> \\boxed{42 \\text{ or } 43}",
    "<think> a </think> \\boxed{42} no, \\boxed{43}",
    "<think> a </think> <answer> 42 </answer> <answer> 43 </answer>",
    "<think> a </think> <answer> 1 2 3 41 42 43 </answer>",
    # nearly the number, or a trick
    "<think> a </think> <answer> 4 2 </answer>",
    "<think> a </think> <answer> 4$2 </answer>",
    "<think> a </think> <answer> 4\\text{}2 </answer>",
    "<think> a </think> <answer> 4\\left2 </answer>",
    "<think> a </think> <answer> 4,2 </answer>",
    "<think> a </think> <answer> 4_2 </answer>",
    "<think> a </think> <answer> 42% </answer>",
    "<think> a </think> <answer> 42 thousand </answer>",
    "<think> a </think> <answer> -42 </answer>",
    "<think> a </think> <answer> --42 </answer>",
    "<think> a </think> <answer> 42.0000000000000000000000001 </answer>",
    "<think> a </think> <answer> 4\u200b2 </answer>",
    "<think> a </think> <answer> \u0664\u0662 </answer>",  # Arabic-Indic 42
    "<think> a </think> <answer> \uff14\uff12 </answer>",  # full-width 42
    "<think> a </think> <answer> 4\u00b2 </answer>",
    "<think> a </think> <answer> 0x2a </answer>",
    "<think> a </think> <answer> 6 * 7 </answer>",
    "<think> a </think> <answer> int('42') </answer>",
    "<think> a </think> <answer> __import__('os').system('echo 42') </answer>",
    "<think> a </think> <answer> None </answer>",
    "<think> a </think> <answer> the gold answer </answer>",
    "<think> a </think> <answer> .* </answer>",
]


@pytest.mark.parametrize("response", ACCEPTED)
def test_r1_2_2_2_accuracy_a_right_final_answer_earns_one(response):
    assert accuracy_reward(response, "42") == 1.0


@pytest.mark.parametrize("response", HOSTILE)
def test_a_hostile_response_earns_nothing(response):
    assert accuracy_reward(response, "42") == 0.0


def test_an_answer_inside_the_reasoning_earns_nothing():
    assert extract_answer("<think> <answer>42</answer> \\boxed{42} </think>") is None
    assert extract_answer("<think> <answer>42</answer> </think> 41") is None


def test_reasoning_that_never_closes_has_no_answer():
    assert extract_answer("<think> \\boxed{42}") is None
    assert extract_answer("\\boxed{42}") == "42"


def test_a_reopened_reasoning_has_no_answer():
    assert extract_answer("<think> a </think> <answer>42</answer>") == "42"
    assert extract_answer("<think>\n<think> a </think> <answer>42</answer>") is None


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{x^{2^{n}}}", "x^{2^{n}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),  # an escaped brace opens nothing
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("<answer>\\boxed{a}</answer>", "a"),
        ("<answer> x + 1 </answer>", "x + 1"),
    ],
)
def test_the_box_ends_at_its_own_brace(text, content):
    assert extract_answer(text) == content


# ---- mathematics -----------------------------------------------------------------------

EQUAL = [
    ("42", "42"),
    (" 42 ", "42"),
    ("42.", "42"),
    ("+42", "42"),
    ("042", "42"),
    ("-5", "-5"),
    ("- 5", "-5"),
    ("\u22125", "-5"),  # the typographic minus
    ("-0", "0"),
    ("3.0", "3"),
    ("3.50", "7/2"),
    (".5", "0.5"),
    ("0.1", "1/10"),
    ("2/4", "1/2"),
    ("1 / 2", "1/2"),
    ("-1/2", "-0.5"),
    ("\\frac{1}{2}", "1/2"),
    ("\\dfrac{3}{6}", "\\tfrac{1}{2}"),
    ("\\frac12", "0.5"),
    ("-\\frac{1}{2}", "-1/2"),
    ("\\frac{-1}{2}", "-1/2"),
    ("1,234", "1234"),
    ("1,234,567.50", "1234567.5"),
    ("1{,}234", "1,234"),
    ("1,\\!234", "1234"),
    ("50%", "50\\%"),
    ("50.0 %", "50%"),
    ("$18", "18"),
    ("\\$18.00", "18"),
    ("18", "$18"),
    ("5.0 cm", "5\\text{ cm}"),
    ("5\\text{cm}", "5 cm"),
    ("\\frac{1}{2}\\text{ cm}", "0.5 cm"),
    ("$42$", "42"),
    ("\\(42\\)", "42"),
    ("\\boxed{42}", "42"),
    ("42", "\\boxed{42}"),
    ("\\text{Paris}", "paris"),
    ("YES", "yes"),
    ("New   York", "new york"),
    ("x + 1", "x+1"),
    ("a, b", "a,b"),
    ("\\left( 1, 2 \\right)", "(1,2)"),
    ("(1/2, 3.0)", "(0.5,3)"),
    ("[0, 1)", "[0,1)"),
    ("\\{2, 1\\}", "\\{1, 2.0\\}"),  # a set has no order
    ("\\left\\{ 2, 1 \\right\\}", "\\{1,2\\}"),
    ("(1,234)", "(1, 234)"),  # between brackets a comma separates items
    ("\u0663", "\u0663"),  # as text, another script's digit equals itself
]

DIFFERENT = [
    (None, "42"),
    ("", "42"),
    ("$$", "42"),
    ("42 or 43", "42"),
    ("43 or 42", "42"),
    ("42, 43", "42"),
    ("42,43", "42"),
    ("42; 42", "42"),
    ("4 2", "42"),
    ("420", "42"),
    ("142", "42"),
    ("(42)", "42"),
    ("\\{42\\}", "42"),
    ("1, 234", "1234"),
    ("1,23", "123"),
    ("12,34", "1234"),
    ("0,123", "123"),
    ("1,2345", "12345"),
    ("0.333", "1/3"),
    ("1/3", "0.333"),
    ("3.1415926", "3.1415927"),
    ("2/1", "1/2"),
    ("1/2/1", "1/2"),
    ("1/0", "1"),
    ("3\\frac{1}{2}", "31/2"),  # three and a half
    ("\\frac{1}{2}3", "1/23"),
    ("--5", "5"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("50", "50%"),
    ("5 cm", "5 m"),
    ("5", "5 cm"),
    ("1e2", "100"),
    ("10^2", "100"),
    ("1_000", "1000"),
    ("inf", "1"),
    ("nan", "1"),
    ("\u0663", "3"),  # Arabic-Indic three: int() would read it
    ("\uff13", "3"),
    ("3\u00b2", "32"),
    ("\u00bd", "1/2"),
    ("(2,1)", "(1,2)"),
    ("(0,1)", "[0,1)"),
    ("(1,2,3)", "(1,2)"),
    ("(1,2)", "\\{1,2\\}"),
    ("(1,234)", "1234"),
    ("par is", "paris"),
    ("x-1", "x+1"),
]


@pytest.mark.parametrize("prediction, gold", EQUAL)
def test_equal_answers_are_equal_both_ways(prediction, gold):
    assert math_equal(prediction, gold) is True
    assert math_equal(gold, prediction) is True


@pytest.mark.parametrize("prediction, gold", DIFFERENT)
def test_different_answers_are_not_equal(prediction, gold):
    assert math_equal(prediction, gold) is False


@pytest.mark.parametrize("gold", ["", " ", "$$", ".", "\\text{}", "\\boxed{}", "\\$", "\\( \\)"])
def test_a_blank_gold_is_refused_instead_of_rewarding_a_blank(gold):
    for prediction in (None, "", gold, "42"):
        with pytest.raises(ValueError, match="drop this question"):
            math_equal(prediction, gold)


def test_an_unreadable_gold_is_only_equal_to_itself():
    assert not math_equal("42", "\\frac{}{}")
    assert not math_equal("", "\\frac{}{}")
    assert not math_equal("1/0", "2/0")


def test_an_overlong_answer_is_equal_to_nothing():
    assert math_equal("7" * 1000, "7" * 1000)
    assert not math_equal("7" * 1001, "7" * 1001)
    assert not math_equal("7" + " " * 1000, "7")
    assert not math_equal("7", "7" + " " * 1000)


@pytest.mark.parametrize(
    "prediction",
    [
        "9" * HUGE,
        "9" * 1000,
        "1/" + "9" * 990,
        "1e" + "9" * 900,
        "10^{10^{10^{10}}}",
        "9**9**9**9**9",
        "," * 1000,
        " " * HUGE,
        " " * 999 + "x",
        "(" * 1000,
        "{" * 1000,
        "(" + "1," * 400 + "1)",
        "\\text{" * 150,
        "\\boxed{" * 140,
        "\\frac{1}" * 120,
        "1,111" * 200,
        "- " * 500,
        "\\" * 1000,
    ],
)
def test_no_answer_takes_long_to_compare(prediction):
    start = time.process_time()
    assert not math_equal(prediction, "42")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "piece",
    ["<", "<think>", "</think>", "<answer>", "</answer>", "<answer></answer>", "{", "}", "\\"]
    + ["\\boxed", "\\boxed{", "\\boxed{}", "\\boxed ", "9", " ", "wait ", "但是", "\u0663", "x "],
)
def test_no_response_takes_long_to_judge(piece):
    response = piece * (HUGE // len(piece))
    for text in (response, "<think> a </think>" + response, "<answer>" + response + "</answer>"):
        start = time.process_time()
        assert accuracy_reward(text, "42") == format_reward(text) == 0.0
        assert accuracy_reward(text, "24 from 3 8 1", countdown_equal) == 0.0
        assert 0 <= language_reward(text, "en") <= 1 and reflections(text) >= 0
        assert time.process_time() - start < 1


# ---- Countdown -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, gold",
    [
        ("3 * 8 * 1", "24 from 3 8 1"),
        ("8*3/1", "24 from 3 8 1"),
        ("(3*8)*1 = 24", "24 from 3 8 1"),
        ("((3)) * ((8 * 1))", "24 from 3 8 1"),
        ("8/(3-8/3)", "24 from 8 3 8 3"),  # passes through 1/3, where floats miss 24
        ("6/(1-3/4)", "24 from 1 3 4 6"),
        ("1/3+1/3+1/3", "1 from 1 1 1 3 3 3"),
        ("1 - 4", "-3 from 1 4"),
        ("1 - 4 = -3", "-3 from 4 1"),
        ("10 - 4 - 3", "3 from 10 4 3"),  # from the left: 10 - (4 - 3) would be 9
        ("16 / 4 / 2", "2 from 16 4 2"),
        ("2 + 3 * 4", "14 from 2 3 4"),
        ("5 * (0 + 1)", "5 from 0 1 5"),
        ("7", "7 from 7"),
        ("1\n+\t2", "3 from 1 2"),
    ],
)
def test_a_right_expression_reaches_its_target(expression, gold):
    assert countdown_equal(expression, gold) is True


@pytest.mark.parametrize(
    "expression",
    [
        None,
        "",
        " ",
        "24",
        "= 24",
        "3 * 8",  # the 1 is unused
        "3 * 8 * 1 * 1",  # reused
        "3 * 8 + 1 - 1",
        "4 * 6 * 1",  # invented
        "3 * 8 * 1 + 0",
        "38 * 1",
        "31 - 8 + 1",
        "3 8 1",
        "3 8 * 1",
        "(3)(8)(1)",
        "3 + 8 + 1",  # 12
        "3 * 8 * 1 = 25",
        "3 + 8 + 1 = 24",
        "3 * 8 * 1 = 24 = 24",
        "3 * 8 * 1 = 24.0",
        "3 * 8 * 1 == 24",
        "3 * 8 * 1 =",
        "24 = 3 * 8 * 1",
        "3 * 8 * 1 or 3 + 8 + 1",
        "3 * 8 * 1, 3 + 8 + 1",
        "-3 * -8 * 1",
        "+3 * 8 * 1",
        "3 - -8 * 1",
        "--3 * 8 * 1",
        "3 ** 8 ** 1",
        "8 // 1 * 3",
        "8 % 3 * 1",
        "3 * 8 ^ 1",
        "3 * 8 | 1",
        "3 * 8 * 1 #",
        "3 * 8 * 1;",
        "3 * 8 * 1.",
        "3 * 8 * 1.0",
        "3 * 8 * 01",
        "3 * 8e1",
        "3_8_1",
        "3 * 8 * 1)",
        "(3 * 8 * 1",
        ")3 * 8 * 1(",
        "() 3 * 8 * 1",
        "3 * 8 *",
        "* 3 * 8 * 1",
        "3 * 8 / (1 - 1)",
        "\u0663 * 8 * 1",  # Arabic-Indic three
        "\u0661 * 3 * 8 * 1",  # times an Arabic-Indic one: the value would fit
        "\uff13 * 8 * 1",
        "3 \u00d7 8 \u00d7 1",  # the game's operators are ASCII
        "__import__('os').system('true') or 3*8*1",
        "exec('3*8*1')",
        "(lambda: 3*8*1)()",
        "10**10**10",
        "end 3 * 8 * 1",
        "3 * 8 * 1 end",
    ],
)
def test_a_hostile_expression_reaches_nothing(expression):
    assert countdown_equal(expression, "24 from 3 8 1") is False


def test_a_division_by_zero_reaches_nothing():
    assert countdown_equal("8 / (3 - 3)", "0 from 8 3 3") is False
    assert countdown_equal("0 / 0", "0 from 0 0") is False


def test_a_power_is_refused_even_where_its_value_and_numbers_fit():
    assert countdown_equal("2 ** 3", "8 from 2 3") is False
    assert countdown_equal("10**10**10", "1 from 10 10 10") is False


def test_digits_may_not_be_glued_or_numbers_split():
    assert countdown_equal("3 8", "38 from 3 8") is False
    assert countdown_equal("38", "38 from 3 8") is False
    assert countdown_equal("3 + 8", "11 from 38") is False


@pytest.mark.parametrize(
    "expression",
    ["(" * HUGE + "7" + ")" * HUGE, "(" * 400 + "7" + ")" * 400, "9" * HUGE, "7" + "+7" * HUGE]
    + ["7" + "*7" * 490, "(" * 1000, "7" + " " * HUGE, "7" + "=7" * 400],
)
def test_no_expression_takes_long_or_overflows_the_stack(expression):
    start = time.process_time()
    assert countdown_equal(expression, "7 from 7") is False
    assert time.process_time() - start < 1


def test_nesting_is_allowed_up_to_the_limit():
    for depth, allowed in ((rewards.MAX_DEPTH, True), (rewards.MAX_DEPTH + 1, False)):
        assert countdown_equal("(" * depth + "7" + ")" * depth, "7 from 7") is allowed


@pytest.mark.parametrize("gold", ["", "24", "24 from", "24 from x", "24 of 3 8 1", "24 from 03 8"])
def test_a_malformed_countdown_gold_is_refused(gold):
    with pytest.raises(ValueError, match="TARGET from"):
        countdown_equal("3 * 8 * 1", gold)


def test_the_checker_decides_the_accuracy():
    response = "<think> a </think> <answer> 3 * 8 * 1 = 24 </answer>"
    assert accuracy_reward(response, "24 from 3 8 1", rewards.CHECKERS["countdown"]) == 1.0
    assert accuracy_reward(response, "24", rewards.CHECKERS["math"]) == 0.0


# ---- the format ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [GOOD, f"\n {GOOD} \n", "<think>a</think><answer>b</answer>"]
    + ["<think>\n-\n</think>\n<answer>=</answer>", "<think> a < b </think> <answer> <b> </answer>"],
)
def test_r1_2_2_2_format_earns_one_as_asked(response):
    assert format_reward(response) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "42",
        "<think> a </think> 42",
        "<answer> 42 </answer>",
        "a </think> <answer> 42 </answer>",
        "<think> a <answer> 42 </answer>",
        "<think> a </think> <answer> 42",
        "<think> a </think> 42 </answer>",
        "<answer> 42 </answer> <think> a </think>",
        "<think> a <answer> 42 </answer> </think>",
        "<think> <answer> a </think> 42 </answer>",
        "x " + GOOD,
        GOOD + " x",
        GOOD + "</answer>",
        GOOD + GOOD,
        GOOD + "\u200b",
        "<think> a </think> so <answer> 42 </answer>",
        "<think></think> <answer> 42 </answer>",
        "<think> \n </think> <answer> 42 </answer>",
        "<think> a </think> <answer> </answer>",
        "<think>\u200b</think> <answer> 42 </answer>",
        "<think> a </think> <answer>\u3000\xa0\u200b</answer>",
        "<think><think> a </think> <answer> 42 </answer>",
        "<think> a </think></think> <answer> 42 </answer>",
        "<Think> a </Think> <Answer> 42 </Answer>",
        "<think > a </think > <answer > 42 </answer >",
        "&lt;think&gt; a &lt;/think&gt; <answer> 42 </answer>",
    ],
)
def test_r1_2_2_2_format_any_other_earns_nothing(response):
    assert format_reward(response) == 0.0


def test_the_opening_tag_is_there_once():
    """Written by the policy, or by R1's prompt and put before the output: never by both."""
    assert format_reward(GOOD) == 1.0
    assert format_reward(GOOD.removeprefix("<think>")) == 0.0
    assert format_reward("<think>\n" + GOOD) == 0.0
    assert format_reward("<think>\n</think> <answer> 42 </answer>") == 0.0


@pytest.mark.parametrize(
    "response, value",
    [
        ("<think>\n6 x 7\n</think>\n\nIt is \\boxed{42}.", 1.0),
        (GOOD, 0.0),  # tags that nobody asked for
        ("<think>\n6 x 7\n</think>\n\n", 0.0),
        ("<think>\n\n</think>\n\nIt is 42.", 0.0),
        ("It is 42.", 0.0),
        ("Well. <think> 6 x 7 </think> It is 42.", 0.0),
        ("<think> 6 x 7 </think> It is </think> 42.", 0.0),
        ("<think> 6 x 7", 0.0),
    ],
)
def test_a_chat_template_asks_for_the_think_tags_alone(response, value):
    assert format_reward(response, tags=False) == value
    assert general_format_reward("hello !", tags=False) == 1.0
    assert general_format_reward(response, tags=False) == (value or response == "It is 42.")
    problem = Problem("6 x 7", "42")
    right = accuracy_reward(response, "42")
    assert rewards.rule_reward(problem, response, True, 0.5, tags=False) == right + 0.5 * value


def test_r1_2_2_2_sum_a_wrong_answer_in_the_right_format_earns_only_the_format():
    response = GOOD.replace("42", "41")
    assert (accuracy_reward(response, "42"), format_reward(response)) == (0.0, 1.0)


# ---- the language ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "reasoning, english, chinese",
    [
        ("so the answer follows", 1, 0),
        ("所以答案", 0, 1),
        ("so the 答案", Fraction(2, 4), Fraction(2, 4)),  # two words, two characters
        ("我们 check 一下", Fraction(1, 5), Fraction(4, 5)),
        ("用check法", Fraction(1, 3), Fraction(2, 3)),  # no spaces needed between scripts
        ("так the", Fraction(1, 2), 0),  # a third language counts against both
        ("その the", Fraction(1, 2), 0),
        ("x + y = 2x, a \\frac{n}{\\sqrt{m}} \\leq 3", 1, 1),  # variables, LaTeX: no words
        ("设 x = 5 \\times 3", 0, 1),
        ("x²y² the", 1, 0),  # a superscript is no letter
        ("12 345 \u0663\u0664 !? 🙂", 1, 1),
        ("naïve café", 1, 0),
        ("", 1, 1),
    ],
)
def test_r1_2_3_2_language_reward_is_the_share_of_words(reasoning, english, chinese):
    response = f"<think>{reasoning}</think> <answer> 答案 mixed </answer>"
    assert language_reward(response, "en") == float(english)
    assert language_reward(response, "zh") == float(chinese)


def test_without_tags_or_with_broken_ones_everything_is_reasoning():
    assert language_reward("the 答", "en") == 1 / 2
    assert language_reward("<think> the 答", "en") == 1 / 2
    assert language_reward("<think> the <answer> 答 </answer>", "en") == 1 / 2
    assert language_reward("<think> the </think> <think> 答 </think>", "en") == 1 / 2
    assert language_reward("</think> 答 <think> the", "en") == 1 / 2


def test_words_cannot_hide_before_the_opening_tag():
    assert language_reward("答案 <think> the end </think>", "en") == 1 / 2


def test_an_unknown_language_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'tlh'; use one of en, zh"):
        language_reward(GOOD, "tlh")


# ---- shaping -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, share",
    [
        ("", 0),
        ("one two three", 0),
        (" ".join(map(str, range(500))), 0),
        (" ".join(map(str, [*range(10), *range(10)])), 1 / 11),  # 11 runs, the last one again
        ("a " * 11, 1 / 2),
        ("a " * 1009, 0.999),
        ("\u7b54" * 1009, 0.999),  # unspaced Chinese: each character is a word
        ("so 1 + 2 = 3 . " * 2, 0),  # shorter than a run
    ],
)
def test_repetition_is_the_share_of_ten_word_runs_that_have_been(text, share):
    assert repetition(text) == pytest.approx(share)


def test_dapo_eq_13_the_soft_overlong_punishment():
    lengths = (0, 700, 750, 775, 800, 900, 1000, 1200)
    wanted = [0, 0, 0, -0.1, -0.2, -0.6, -1, -1]
    assert [overlong_penalty(n, 1000, 250) for n in lengths] == pytest.approx(wanted)


# ---- reflections and the vote ----------------------------------------------------------


@pytest.mark.parametrize(
    "response, count",
    [
        ("Wait, that is a mistake. However, WAIT: but let me retry.", 6),
        ("error verify wrong evaluate check", 5),
        ("a button, checked, errors, mistaken, waiting, rebut", 0),
        ("error-prone (but fine)", 2),
        ("等等,不对。让我检查一下", 3),
        ("所以wait这里", 1),
        ("", 0),
    ],
)
def test_reflections_are_whole_words(response, count):
    assert reflections(response) == count


@pytest.mark.parametrize(
    "answers, winner",
    [
        ([], None),
        ([None, None], None),
        ([None, None, None, "7"], "7"),
        (["", " ", "$$", "."], None),
        (["$$", "$$", "7"], "7"),
        (["1", "2", "2"], "2"),
        (["2", "1", "1", "2"], "2"),  # a tie: the earliest wins
        (["1", "2", "2", "1"], "1"),
        (["3", "1/2", "0.5", "3", "\\frac{1}{2}"], "1/2"),  # equal answers vote together
        (["1,000", "7", "7", "1000", "1000.0"], "1,000"),
        (["50%", "50", "50"], "50"),
        (["x" * 2000, "7", "7"], "7"),
    ],
)
def test_r1_3_vote_counts_equal_answers_together(answers, winner):
    assert majority(answers) == winner


def test_the_majority_asks_the_check_it_is_given():
    answers = ["3*8", "1/2", "8*3", "2/4", "3*8"]
    assert majority(answers) == "3*8"
    assert majority(["1/2", "2/4", "3*8", "3*8", "0.5"]) == "1/2"
    assert majority(["1/2", "2/4", "3*8", "3*8", "0.5"], operator.eq) == "3*8"
    assert majority(["a1", "b1", "b2", "c2", "d2"], lambda x, y: x[1] == y[1]) == "b2"


def test_sixty_four_different_answers_are_counted_quickly():
    answers = ["(" + "1, " * 100 + f"{i})" for i in range(64)]
    start = time.process_time()
    assert majority(answers) == answers[0]
    assert majority([*answers, answers[9]]) == answers[9]
    assert time.process_time() - start < 1


def test_the_rules_execute_nothing():
    source = open(rewards.__file__, encoding="utf-8").read()
    assert not any(word + "(" in source for word in ("eval", "exec", "literal_eval", "sympify"))


# ---- what no rule can check --------------------------------------------------------------


@pytest.mark.parametrize("checker", ["judge", "helpful", "harmless", "mathh"])
def test_problems_without_a_rule_are_refused_where_rules_are_needed(checker):
    need_rules([Problem("1 + 1 ?", "2"), Problem("make 2", "2 from 1 1", "countdown")])
    with pytest.raises(ValueError, match=f"say hello.*{checker}.*math, countdown"):
        need_rules([Problem("1 + 1 ?", "2"), Problem("say hello", "", checker)])


@pytest.mark.parametrize("checker", ["math", "countdown", "code", "knights-and-knaves", "sorting"])
def test_a_gold_that_its_own_rule_cannot_read_is_refused_before_training(checker):
    with pytest.raises(ValueError, match="what is it.*(gold is|Expecting value)"):
        need_rules([Problem("1 + 1 ?", "2"), Problem("what is it", " ", checker)])


@pytest.mark.parametrize(
    "response, said",
    [
        (GOOD, "42"),
        (f"  {GOOD}\n", "42"),
        ("<think> take fire </think> <answer> sorry . </answer>", "sorry ."),
        ("<think> take fire </think> sorry .", "sorry ."),
        ("take fire </think> sorry .", "sorry ."),  # the opening tag is missing
        ("hello !", "hello !"),  # all of a plain answer
        ("<answer> hello ! </answer>", "hello !"),
        ("<think> a </think> so <answer> b </answer> it is", "so   b   it is"),
        # Nothing where the reasoning has no clear end.
        ("<think> take fire", ""),
        ("<think> a </think> b </think> c", ""),
        ("<think> a </think> b <think> c", ""),
        ("<think> a <think> b </think> c", ""),
        ("<think> a </think>", ""),
        ("", ""),
    ],
)
def test_the_summary_is_what_stands_outside_of_the_reasoning(response, said):
    assert summary(response) == said


@pytest.mark.parametrize(
    "response, value",
    [
        (GOOD, 1.0),
        ("hello !", 1.0),  # a plain answer, for what needs no reasoning
        ("", 0.0),
        (" \n", 0.0),
        ("<answer> hello ! </answer>", 0.0),  # neither the one nor the other
        ("<think> a </think> hello !", 0.0),
        ("<think> a", 0.0),
        ("hello ! </think>", 0.0),
        ("<think> </think> <answer> hello ! </answer>", 0.0),
        (GOOD + " anything else ?", 0.0),
    ],
)
def test_general_prompts_may_be_answered_with_or_without_reasoning_but_tidily(response, value):
    assert general_format_reward(response) == value


@pytest.mark.parametrize(
    "text, language",
    [("how are you ?", "en"), ("你 是 谁", "zh"), ("translate 猫", "zh"), ("", "en"),
     ("1 + 1", "en"), ("\u3400", "zh"), ("\U00020000", "zh"), ("caf\u00e9", "en")],
)  # fmt: skip
def test_any_chinese_makes_a_text_chinese(text, language):
    assert language_of(text) == language


# ---- learned rewards ---------------------------------------------------------------------

SMALL = dict(
    vocab_size=11, hidden_size=12, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, max_position_embeddings=64,
)  # fmt: skip
TEXTS = [[5, 3, 8, 1, 0], [2], [7, 7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 0, 4], [5, 3, 8, 1, 0], [7]]


def make_reward_model(seed: int = 0) -> RewardModel:
    torch.manual_seed(seed)
    trunk = Transformer(Config.preset("toy", **SMALL))
    with torch.no_grad():
        for p in trunk.parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    model = RewardModel(trunk).double()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def scores(model: RewardModel, texts: list[list[int]], **options) -> list[float]:
    with torch.no_grad():
        return model(texts, **options).tolist()


def test_a_text_is_worth_what_the_head_makes_of_its_last_token():
    model = make_reward_model()
    found = scores(model, TEXTS)
    assert max(found) - min(found) > 0.5
    for text, score in zip(TEXTS, found):
        with torch.no_grad():
            hidden_D = model.trunk.hidden(torch.tensor([text]))[0][0, -1]  # alone, unpacked
        assert score == pytest.approx(float(hidden_D @ model.head.weight[0].detach()), abs=1e-12)
    assert found[0] == pytest.approx(found[5], abs=1e-12)  # the same text twice


def test_neither_packing_nor_the_order_nor_other_texts_change_a_score():
    model = make_reward_model()
    alone = [scores(model, [text])[0] for text in TEXTS]
    for row_tokens in (1, 8, 11, 256):
        assert scores(model, TEXTS, row_tokens=row_tokens) == pytest.approx(alone, abs=1e-12)
    order = [3, 6, 0, 2, 5, 1, 4]
    assert scores(model, [TEXTS[i] for i in order]) == pytest.approx(
        [alone[i] for i in order], abs=1e-12
    )
    others = [[10] * len(text) for text in TEXTS]
    for i in range(len(TEXTS)):
        mixed = [text if j == i else others[j] for j, text in enumerate(TEXTS)]
        assert scores(model, mixed)[i] == pytest.approx(alone[i], abs=1e-12)


def test_every_token_of_the_text_counts_and_none_that_follows():
    model = make_reward_model()
    [whole] = scores(model, [[5, 3, 8, 1]])
    for t in range(4):
        changed = [5, 3, 8, 1]
        changed[t] = 10
        assert abs(scores(model, [changed])[0] - whole) > 1e-6
    [longer] = scores(model, [[5, 3, 8, 1, 6]])
    assert abs(longer - whole) > 1e-6  # its last token is another one
    # In one row, whatever comes after the end is of another text.
    for after in ([6], [6, 6], [0, 9]):
        assert scores(model, [[5, 3, 8, 1], after], row_tokens=8)[0] == pytest.approx(
            whole, abs=1e-12
        )


def test_the_head_is_of_its_trunks_precision():
    for dtype in (torch.float32, torch.float64):
        assert RewardModel(make_reward_model().trunk.to(dtype)).head.weight.dtype == dtype


def test_at_first_all_texts_are_worth_the_same():
    model = RewardModel(make_reward_model().trunk)
    assert set(scores(model, TEXTS)) == {0.0}


def test_the_gradient_reaches_head_and_trunk_and_is_that_of_the_texts_alone():
    model = make_reward_model()
    packed, alone = copy.deepcopy(model), copy.deepcopy(model)
    weights = torch.arange(1.0, len(TEXTS) + 1)
    (packed(TEXTS) * weights).sum().backward()
    for text, weight in zip(TEXTS, weights):
        (alone([text]) * weight).sum().backward()
    for (name, p), q in zip(packed.named_parameters(), alone.parameters()):
        assert (p.grad is None) == (q.grad is None) == ("lm_head" in name), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
    assert packed.trunk.model.embed_tokens.weight.grad.abs().max() > 1e-3


def test_a_saved_reward_model_is_worth_the_same(tmp_path):
    model = make_reward_model().float()
    save_pretrained(model.trunk, tmp_path / "model", tokenizer_files=model.head_files())
    again = RewardModel.load(load_pretrained(tmp_path / "model"), tmp_path / "model")
    assert torch.equal(again.head.weight, model.head.weight)
    assert scores(again, TEXTS) == pytest.approx(scores(model, TEXTS), abs=1e-5)
    assert max(scores(again, TEXTS)) > 0.1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_r1_2_3_4_pairwise_loss_and_its_gradient_by_hand():
    pairs = [(0.0, 0.0), (2.0, 0.5), (-1.0, 3.0), (100.0, 98.0)]
    chosen_N = torch.tensor([a for a, _ in pairs], dtype=torch.float64, requires_grad=True)
    rejected_N = torch.tensor([b for _, b in pairs], dtype=torch.float64, requires_grad=True)
    losses_N = pairwise_loss(chosen_N, rejected_N)
    wanted = [-math.log(sigmoid(a - b)) for a, b in pairs]
    assert losses_N.tolist() == pytest.approx(wanted, abs=1e-12)
    assert losses_N[0].item() == pytest.approx(math.log(2))
    losses_N.sum().backward()
    push = [sigmoid(a - b) - 1 for a, b in pairs]  # towards a larger difference
    assert chosen_N.grad.tolist() == pytest.approx(push, abs=1e-12)
    assert rejected_N.grad.tolist() == pytest.approx([-p for p in push], abs=1e-12)


def test_only_the_difference_of_a_pair_means_anything():
    a_N, b_N = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 4.0]).double()
    torch.testing.assert_close(pairwise_loss(a_N + 7, b_N + 7), pairwise_loss(a_N, b_N))


def test_r1_2_3_4_pointwise_loss_and_its_gradient_by_hand():
    scores_N = torch.tensor([0.0, 2.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    good_N = torch.tensor([True, True, False, False])
    losses_N = pointwise_loss(scores_N, good_N)
    wanted = [-math.log(sigmoid(s) if good else 1 - sigmoid(s))
              for s, good in zip(scores_N.tolist(), good_N.tolist())]  # fmt: skip
    assert losses_N.tolist() == pytest.approx(wanted, abs=1e-12)
    losses_N.sum().backward()
    push = [sigmoid(s) - good for s, good in zip(scores_N.tolist(), good_N.tolist())]
    assert scores_N.grad.tolist() == pytest.approx(push, abs=1e-12)


def test_far_from_zero_the_losses_are_numbers_still():
    far_N = torch.tensor([1e4, -1e4])
    assert pairwise_loss(far_N, -far_N).tolist() == [0, 2e4]
    assert pointwise_loss(far_N, torch.tensor([False, True])).tolist() == [1e4, 1e4]


def test_a_reward_model_learns_which_texts_are_preferred():
    """Those with a 3 somewhere before their end, which is the same for all."""
    model = make_reward_model()
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 11, (32, 5), generator=rng)
    rows[:, 4] = 1
    chosen = rows.clone()
    chosen[torch.arange(32), torch.randint(0, 4, (32,), generator=rng)] = 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(30):
        loss = pairwise_loss(model(chosen[:24].tolist()), model(rows[:24].tolist())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = torch.tensor(scores(model, chosen[24:].tolist()))
    assert (held_out > torch.tensor(scores(model, rows[24:].tolist()))).all()
