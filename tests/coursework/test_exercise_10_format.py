import pytest

import rewards
from tests.coursework.checks import same

pytestmark = pytest.mark.exercise_10

RIGHT = "<think>2 + 2</think> <answer>4</answer>"


def earns(response, wanted, **rest):
    same(rewards.format_reward(response, **rest), wanted, f"{response!r} {rest or ''}".strip())


def test_the_asked_layout_earns_1():
    earns(RIGHT, 1.0)
    earns("\n<think>\na\n\nb\n</think>\n\n<answer>\n4\n</answer>\n", 1.0)


def test_a_missing_tag_earns_nothing():
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        earns(RIGHT.replace(tag, ""), 0.0)
    earns("4", 0.0)


def test_each_tag_comes_once():
    earns(RIGHT + "</answer>", 0.0)
    earns(RIGHT + RIGHT, 0.0)
    earns("<think>a</think><think>b</think><answer>4</answer>", 0.0)
    earns("<think>a<think>b</think><answer>4</answer>", 0.0)


def test_the_tags_come_in_order():
    earns("<answer>4</answer> <think>2 + 2</think>", 0.0)
    earns("<think>2 + 2 <answer>4</answer></think>", 0.0)


def test_nothing_stands_outside():
    for response in ("Well: " + RIGHT, RIGHT + " Done.", RIGHT.replace("> <", "> so <")):
        earns(response, 0.0)


def test_reasoning_and_answer_are_not_empty():
    earns("<think></think> <answer>4</answer>", 0.0)
    earns("<think> \n </think> <answer>4</answer>", 0.0)
    earns("<think>2 + 2</think> <answer> </answer>", 0.0)


def test_something_visible_is_in_each():
    earns("<think>\u200b</think> <answer>4</answer>", 0.0)


def test_tags_are_in_lower_case():
    earns(RIGHT.upper(), 0.0)


def test_without_tags_the_answer_is_what_follows_the_reasoning():
    earns("<think>2 + 2</think> 4", 1.0, tags=False)
    earns("<think>2 + 2</think> ", 0.0, tags=False)
    earns("2 + 2</think> 4", 0.0, tags=False)
    earns(RIGHT, 0.0, tags=False)
