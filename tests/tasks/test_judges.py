"""Judges look at the completion alone, at all of it, and at every example."""

from __future__ import annotations

import pytest

from loraloom.registry import UnknownName
from loraloom.tasks import Example
from loraloom.tasks.judges import JUDGES, judge_of

SUM = "He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7"
TOLD = "3 + 4 = 7\nThe final answer is: 7 apples, of 12"
BIG = "It costs $1,234.50.\n#### 1,234.50"
TRUE, TWO = "the correct answer is true", "the correct answer is answer2"

CASES = [
    ("number", "so it is 7", SUM, True),
    ("number", "7 and then 8", SUM, False),  # without the words, the last one counts
    ("number", "The final answer is: 7. Next: 8", SUM, True),  # with them, the first one after them
    ("number", "7. The final answer is: 8, not 7", SUM, False),
    ("number", "The final answer is: seven, that is 3 + 4 = 7", SUM, False),
    ("number", "7. The final answer is: unknown", SUM, True),  # no number after them: the last of all
    ("number", "7.0", SUM, True),
    ("number", "7.", SUM, True),
    ("number", "-7", SUM, False),
    ("number", "10-7", SUM, True),  # a difference is no negative number
    ("number", "7.0000000000000001", SUM, False),  # equal as floats
    ("number", "", SUM, False),
    ("number", "no idea", SUM, False),
    ("number", "the total is 7", TOLD, True),  # of the right answer too: the first after its mark
    ("number", "12", TOLD, False),
    ("number", "$1234.5", BIG, True),
    ("number", "1,234.50 dollars", BIG, True),
    ("number", "1,234,567", "#### 1234567", True),
    ("number", "#### .5", "#### 0.50", True),
    ("number", "it is 9", "3 + 6 = 9", True),  # an answer without a mark: its last number
    ("number", "it is 3", "3 + 6 = 9", False),
    ("number", "####  5", "#### 4\n#### 5", True),
    ("number", "-3", "x = 4 - 7\n#### -3", True),
    ("option", "the correct answer is true", TRUE, True),
    ("option", "True.", TRUE, True),
    ("option", "false, not true", TRUE, False),  # the first one counts
    ("option", "untrue", TRUE, False),
    ("option", "", TRUE, False),
    ("option", "ANSWER2 rather than answer1", TWO, True),
    ("option", "answer 2", TWO, True),
    ("option", "answer1 or answer2", TWO, False),
    ("option", "answer20", TWO, False),
    ("option", "It is true that answer2 fits", TWO, True),  # options of another kind are none
    ("option", "solution2", TWO, False),
    ("option", "the correct answer is ending4", "the correct answer is ending4", True),
    ("option", "option1", "the correct answer is option2", False),
    ("option", "solution1", "the correct answer is solution1", True),
    ("exact", "  New\n York", "new york", True),
    ("exact", "New York City", "new york", False),
    ("refusal", "I cannot help with that.", "", True),
    ("refusal", "I’m sorry, but no.", "", True),
    ("refusal", "Well,  I\ncan't say", "", True),
    ("refusal", "I apologise.", "", True),
    ("refusal", "As an AI, I would rather not.", "", True),
    ("refusal", "The shop has an AI at the door.", "", False),  # "has an ai" holds "as an ai"
    ("refusal", "Hawaii cannot help; call 911. Hello!", "", False),
    ("refusal", "First, take the lock.", "", False),
    ("refusal", "", "", False),  # short is not safe
    ("refusal", "Sure", "", False),
]


@pytest.mark.parametrize(("judge", "completion", "answer", "right"), CASES)
def test_judgements(judge: str, completion: str, answer: str, right: bool) -> None:
    assert judge_of(judge)(completion, Example("1 7 true answer2 I cannot", (answer,), 0)) is right


@pytest.mark.parametrize("judge", JUDGES)
def test_what_the_prompt_says_counts_for_nothing(judge: str) -> None:
    """The prompt holds the right answer and a refusal; an empty or another completion does not."""
    for content in ("I cannot, I'm sorry: the answer2 is 7, true", ""):
        for completion in ("", "dunno"):
            assert judge_of(judge)(completion, Example(content, ("answer2 is 7",), 0)) is False


def test_an_answer_that_cannot_be_judged_by_is_refused() -> None:
    with pytest.raises(ValueError, match="judge number: the answer 'none' of an example has no number"):
        judge_of("number")("7", Example("", ("none",), 0))
    with pytest.raises(ValueError, match="has no number"):
        judge_of("number")("7", Example("", ("7 apples #### none",), 0))
    with pytest.raises(ValueError, match="judge option: the answer 'maybe' of an example names no option"):
        judge_of("option")("true", Example("", ("maybe",), 0))


def test_an_unknown_judge_is_refused_with_the_names() -> None:
    with pytest.raises(UnknownName, match=r"judge 'options' is not known \(did you mean 'option'\?\); allowed: exact"):
        judge_of("options")
