"""What checks say to blanks, to mistakes and to right answers; nearly all mistakes have a hint of their own."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from tried import FOLDER, PASSED, cells, exercises, module, names_before, read, said, solution

LESSONS = sorted(FOLDER.glob("*.md"))
EXERCISES = [name for path in LESSONS for name in exercises(path.stem)]
MISTAKES = 12  # tried in every exercise, at least
NO_HINT = re.compile(r"you get |some of your numbers are wrong|all your numbers|the shape is|of \d+ voxels")


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


def test_nearly_all_mistakes_get_a_hint_of_their_own() -> None:
    """As the syllabus says. What a check says to any answer that it does not know is none."""
    module("checks")
    begin = {name: text for name, (_, text) in module("checking").CHECKS.items()}
    told = [a for path in LESSONS for a in read(path) if not a.title.startswith("right")]
    generic = [a for a in told if NO_HINT.match(a.says) or a.says.endswith(begin[a.exercise])]
    assert len(generic) <= 0.03 * len(told), [answer.title for answer in generic]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_no_two_mistakes_of_a_check_give_the_same_answer(exercise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the place where a profile is 0.2 was the distance of two other points, whose hint was shown."""
    checks, checking = module("checks"), module("checking")
    seen: dict[tuple[str, str], list[bool]] = {}  # two hints -> whether they have the same answer, in each comparison

    def apart(answer: object, right: object, mistakes: dict[str, object], *rest: object) -> None:
        for (one, a), (other, b) in combinations(mistakes.items(), 2):
            seen.setdefault((one, other), []).append(checking._equal(checking._array(a), checking._array(b), 1e-4))

    monkeypatch.setattr(checks, "same", apart)
    assert said(exercise, solution(exercise)) == PASSED
    assert not [hints for hints, alike in seen.items() if all(alike)]


def test_an_exercise_that_is_used_but_not_written_is_named() -> None:
    """Regression: 5.4 explained the DSC when it was 5.1 that was not written yet."""
    blank = module("make_lessons").blank(solution("5.1"))
    assert said("5.4", blank, solution("5.4")).startswith("`edge`, which this exercise uses, is not written yet")
    started = blank.replace("# YOUR CODE HERE", "something = 1")
    assert "still holds the line" in said("5.4", started, solution("5.4"))


@pytest.mark.parametrize("exercise", ["1.1", "1.2"])
def test_right_answers_serve_the_cells_that_use_them(exercise: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: two answers passed 1.1, which gives numbers, and stopped at the truth values of the next cell."""
    later = [
        cell.source
        for cell in cells("1")
        if re.search(r"(?<!binary_)cross_entropy\((?!p, y)|^permutation =", cell.source)
    ]
    for answer in (a for a in read(FOLDER / "1.md") if a.exercise == exercise and a.says == PASSED):
        names = names_before("1.3")
        truth = np.zeros((16, 40, 40), bool)
        truth[5:11, 12:28, 12:28] = True
        rim = ndimage.binary_dilation(truth)
        names |= {"truth": truth, "masks": {"rim": rim}, "image": truth, "middle": 8, "guess_shuffled": "?"}
        exec(answer.cell(), names)
        for code in later:
            exec(code.replace("plt.show()", "plt.close()"), names)
        assert "cross-entropy" in capsys.readouterr().out


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
