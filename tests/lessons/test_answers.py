"""What checks say to blanks, to mistakes and to right answers: each mistake has a hint of its own."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from tried import FOLDER, PASSED, exercises, module, read, said, solution

LESSONS = sorted(FOLDER.glob("*.md"))
EXERCISES = [name for path in LESSONS for name in exercises(path.stem)]
MISTAKES = 12  # tried in every exercise, at least


def without_numbers(hint: str) -> str:
    """Processors differ in the last digits."""
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", hint)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_answer_that_was_tried_gets_what_is_written_down(path: Path) -> None:
    for answer in read(path):
        now = said(answer.exercise, answer.cell())
        assert without_numbers(now) == without_numbers(answer.says), f"{answer.title}: python tests/lessons/tried.py"
        assert (now == PASSED) == answer.title.startswith("right"), answer.title


@pytest.mark.parametrize("exercise", EXERCISES)
def test_each_mistake_has_a_hint_of_its_own(exercise: str) -> None:
    answers = [answer for answer in read(FOLDER / f"{exercise[0]}.md") if answer.exercise == exercise]
    hints = Counter(answer.says for answer in answers if answer.says != PASSED)
    assert len(hints) >= MISTAKES and max(hints.values()) == 1, hints.most_common(1)
    assert len({answer.title for answer in answers}) == len(answers)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_blank_is_told_from_what_fails(exercise: str) -> None:
    blank = module("make_lessons").blank(solution(exercise))
    assert said(exercise, solution(exercise)) == PASSED
    assert said(exercise, blank).startswith("is not written yet. ")
    described = blank.replace("# YOUR CODE HERE", '"""What it does."""')
    assert said(exercise, described).startswith("is not written yet. ")
    started = blank.replace("# YOUR CODE HERE", "something = 1")
    assert said(exercise, started).startswith("delete the line")
    other = blank.replace("NotImplementedError()", 'NotImplementedError("max_pool2d for Bool")')
    assert "not written yet" not in said(exercise, other)
