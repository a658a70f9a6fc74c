"""Write the lessons' notebooks from source/*.py: a blank one for students, and a solved one in solutions/.

Cells tagged `answer`, and code between the two markers, are left out of the blank notebooks. Markers and cell
metadata are nbgrader's.
"""

import re
from pathlib import Path

import jupytext
import nbformat

LESSONS = Path(__file__).parent
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.DOTALL | re.MULTILINE)
PAGE = re.compile(r"`((?:METHOD|RESULTS)\.md)`")  # becomes a link to the repository's root
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
STUB = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()"


def sources() -> list[Path]:
    return sorted((LESSONS / "source").glob("[0-9]_*.py"))


def blank(code: str) -> str:
    """A cell's code without its solution."""
    return SOLUTION.sub(STUB, code)


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def notebooks(source: Path) -> dict[Path, str]:
    """The text of both notebooks of a lesson, by path."""
    lesson = jupytext.read(source)
    lesson.metadata = METADATA
    for number, cell in enumerate(lesson.cells):
        cell.id = str(number)  # as nbstripout numbers them
        if tagged(cell, "setup"):  # folded: the picture comes first
            cell.metadata["jupyter"] = {"source_hidden": True}
        if SOLUTION.search(cell.source) or tagged(cell, "check"):
            check = tagged(cell, "check")
            cell.metadata["nbgrader"] = {
                "grade": check, "grade_id": f"{source.stem}-{number}", "locked": check, "schema_version": 3,
                "solution": not check, "task": False, **({"points": 1} if check else {}),
            }  # fmt: skip
    solved = PAGE.sub(r"[\1](../../../\1)", nbformat.writes(lesson) + "\n")
    lesson.cells = [cell for cell in lesson.cells if not tagged(cell, "answer")]
    for cell in lesson.cells:
        cell.source = blank(cell.source)
    name = f"{source.stem}.ipynb"
    unsolved = PAGE.sub(r"[\1](../../\1)", nbformat.writes(lesson) + "\n")
    return {LESSONS / name: unsolved, LESSONS / "solutions" / name: solved}


def slides() -> tuple[Path, str]:
    """Path and text of the lecturer's slides."""
    notebook = jupytext.read(LESSONS / "source" / "slides.py")
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
    return LESSONS / "slides.ipynb", nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    written = [slides(), *(item for source in sources() for item in notebooks(source).items())]
    for path, text in written:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
