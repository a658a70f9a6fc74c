"""Write the lessons' notebooks from source/*.py: a blank one for students, and a solved one in solutions/.

Cells tagged `mistake` or `alternative` stay in the source: the tests put them in place of the solution. Code between
the two markers is left out of the blank notebooks. Markers and cell metadata are nbgrader's.
"""

import re
from pathlib import Path

import jupytext
import nbformat

LESSONS = Path(__file__).parent
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.DOTALL | re.MULTILINE)
STUB = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()"


def sources() -> list[Path]:
    return sorted((LESSONS / "source").glob("*.py"))


def blank(code: str) -> str:
    """A cell's code without its solution."""
    return SOLUTION.sub(STUB, code)


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def notebooks(source: Path) -> dict[Path, str]:
    """The text of both notebooks of a lesson, by path."""
    lesson = jupytext.read(source)
    lesson.cells = [cell for cell in lesson.cells if not tagged(cell, "mistake") and not tagged(cell, "alternative")]
    lesson.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(lesson.cells):
        cell.id = str(number)  # as nbstripout numbers them
        if tagged(cell, "setup") or tagged(
            cell, "check"
        ):  # folded: the picture comes first, and checks know the answer
            cell.metadata["jupyter"] = {"source_hidden": True}
        if SOLUTION.search(cell.source) or tagged(cell, "check"):
            check = tagged(cell, "check")
            cell.metadata["nbgrader"] = {
                "grade": check, "grade_id": f"{source.stem}-{number}", "locked": check, "schema_version": 3,
                "solution": not check, "task": False, **({"points": 1} if check else {}),
            }  # fmt: skip
    solved = nbformat.writes(lesson) + "\n"
    for cell in lesson.cells:
        cell.source = blank(cell.source)
    name = f"{source.stem}.ipynb"
    return {LESSONS / name: nbformat.writes(lesson) + "\n", LESSONS / "solutions" / name: solved}


if __name__ == "__main__":
    for source in sources():
        for path, text in notebooks(source).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
