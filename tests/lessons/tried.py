"""The answers that were tried in the exercises, with what their checks say: answers/*.md, read, run and written.

`python tests/lessons/tried.py` writes down anew what the checks say. Read the difference before you keep it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import linecache
import re
import sys
import textwrap
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType

import jupytext

LESSONS = Path(__file__).resolve().parents[2] / "notebooks" / "lessons"
FOLDER = Path(__file__).parent / "answers"
ENTRY = re.compile(r"^### (\d\.\d) ([^\n]*)\n\n```python\n(.*?)\n```\n(?:\n> ?([^\n]*)\n)?", re.DOTALL | re.MULTILINE)
PASSED = "passed"
sys.path.append(str(LESSONS))


def module(name: str) -> ModuleType:
    """A module that lies beside the lessons."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, LESSONS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass
class Answer:
    """What a student writes: the body of the function, or the whole cell; and what the check says to it."""

    exercise: str
    title: str  # "right: ..." if it is right in another way than the solution
    code: str
    says: str = ""

    def cell(self) -> str:
        if re.match(r"(def|class) ", self.code):
            return self.code
        solved = solution(self.exercise)
        return module("make_lessons").SOLUTION.sub(lambda found: textwrap.indent(self.code, found[1]), solved)


def read(path: Path) -> list[Answer]:
    return [Answer(*parts) for parts in ENTRY.findall(path.read_text(encoding="utf-8"))]


def write(path: Path, answers: list[Answer]) -> None:
    text = [f"# Lesson {path.stem}: answers that were tried, and what their checks say\n"]
    for exercise, group in groupby(answers, key=lambda answer: answer.exercise):
        text.append(f"## Exercise {exercise}\n")
        for answer in group:
            text.append(f"### {exercise} {answer.title}\n\n```python\n{answer.code}\n```\n\n> {answer.says}\n")
    path.write_text("\n".join(text), encoding="utf-8")


@cache
def cells(lesson: str) -> list:
    (source,) = (LESSONS / "source").glob(f"{lesson}_*.py")
    return [cell for cell in jupytext.read(source).cells if cell.cell_type == "code"]


def exercises(lesson: str) -> list[str]:
    """The exercises of a lesson, in the order of their checks."""
    found = [re.search(r'^check\("(\d\.\d)"', cell.source, re.MULTILINE) for cell in cells(lesson)]
    return [match[1] for match in found if match]


def solution(exercise: str) -> str:
    solved = [cell.source for cell in cells(exercise[0]) if "### BEGIN SOLUTION" in cell.source]
    return solved[exercises(exercise[0]).index(exercise)]


def names_before(exercise: str) -> dict:
    """What the lesson imports and defines before this exercise, without anything that takes time."""
    names: dict = {"__name__": "__main__"}
    for cell in cells(exercise[0]):
        if cell.source == solution(exercise):
            break
        kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        tree = ast.parse(cell.source)
        tree.body = [part for part in tree.body if isinstance(part, kept)]
        exec(compile(tree, "setup", "exec"), names)
    return names


def said(exercise: str, *cells: str) -> str:
    """What the check says once these cells are run: its hint, or that it is passed. Any other error is not caught."""
    names = names_before(exercise)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number, cell in enumerate(cells):
                file = f"<cell {number} of {exercise}>"
                linecache.cache[file] = (len(cell), None, cell.splitlines(keepends=True), file)
                exec(compile(cell, file, "exec"), names)
            module("checks")
            module("checking").check(exercise, names)
    except module("checking").Hint as hint:
        return " ".join(str(hint).removeprefix(f"Exercise {exercise}").removeprefix(": ").split())
    return PASSED


def main() -> None:
    for path in sorted(FOLDER.glob("*.md")):
        answers = read(path)
        for answer in answers:
            answer.says = said(answer.exercise, answer.cell())
        write(path, answers)


if __name__ == "__main__":
    main()
