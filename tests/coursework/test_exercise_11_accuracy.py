import pytest

import rewards
from tests.coursework.checks import same

pytestmark = pytest.mark.exercise_11


def answers(response, wanted):
    same(rewards.extract_answer(response), wanted, f"the answer of {response!r}")


def test_the_answer_stands_between_its_tags_or_in_a_box():
    answers("<think>2 + 2</think> <answer> 4 </answer>", "4")
    answers(r"<think>2 + 2</think> It is \boxed{4}.", "4")
    answers(r"<think>2 + 2</think> <answer>It is \boxed{4}.</answer>", "4")
    answers("<answer>4</answer>", "4")


def test_the_answer_is_not_taken_from_the_reasoning():
    answers(r"<think>\boxed{4} or <answer>4</answer></think> I give up.", None)
    answers("<think>so <answer>4</answer>", None)


def test_reasoning_that_has_no_clear_end_has_no_answer():
    answers("<think>a</think> b</think> <answer>4</answer>", None)


def test_the_last_answer_counts():
    answers("<think>a</think> <answer>3</answer> No: <answer>4</answer>", "4")
    answers(r"<think>a</think> \boxed{3}, no, \boxed{4}", "4")
    answers(r"<think>a</think> <answer>3</answer> No: \boxed{4}", "4")


def test_an_earlier_box_does_not_replace_a_malformed_last_one():
    answers(r"<think>a</think> \boxed{3}, no, \boxed{4", None)
    answers(r"<think>a</think> <answer>3</answer> No: \boxed{4", None)


def test_broken_answer_tags_have_no_answer():
    for text in (
        "<answer>4",
        "4</answer>",
        "<answer>4</answer></answer>",
        "<answer>3<answer>4</answer>",
    ):
        answers("<think>a</think> " + text, None)


def test_two_boxes_in_an_answer_are_no_answer():
    answers(r"<think>a</think> <answer>\boxed{3} or \boxed{4}</answer>", None)


def test_an_empty_answer_is_none():
    for text in ("<answer> </answer>", r"\boxed{}", "nothing"):
        answers("<think>a</think> " + text.replace("nothing", ""), None)


def test_a_right_answer_earns_1_and_any_other_0():
    for answer, wanted in (("4", 1.0), ("4.0", 1.0), ("5", 0.0), ("4 or 5", 0.0), ("14", 0.0)):
        response = f"<think>a</think> <answer>{answer}</answer>"
        same(rewards.accuracy_reward(response, "4"), wanted, f"{answer!r} where 4 is right")


def test_no_answer_earns_0():
    same(rewards.accuracy_reward("<think>4</think>", "4"), 0.0, "no answer where 4 is right")


def test_check_decides_and_is_asked_once():
    asked = []

    def check(answer, gold):
        asked.append((answer, gold))
        return True

    reward = rewards.accuracy_reward("<answer>4</answer>", "24 from 1 2", check)
    same(reward, 1.0, "the check says yes")
    same(asked, [("4", "24 from 1 2")], "what the check was asked")
