"""Numbers in a notebook's text: each comes from the notebook's own cells, or its sentence names the source.

A *measurement* is a decimal, or a whole number of two digits or more, that is no reference (section, equation,
exercise, year) and stands in no formula and in no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbformat import NotebookNode

NOT_PROSE = re.compile(  # blocks and spans of code, formulas, DOIs, what links point to, tags
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\bdoi:[^\s\]]+|\]\([^)]*\)|<[^>]*>", re.DOTALL
)
REFERENCE = re.compile(  # whose digits are no measurement; and how long an exercise takes
    r"(?:Eq|Eqs|Fig|Figs|Section|Sections|Table|Tables|[Ll]essons?|[Nn]otebooks?|[Ee]xercises?|[Rr]eadings?)"
    r"\.?(?:\s|\*\*)+\(?[\dIVXR][\w.()*]*(?:(?:,| and| or| to|, and)\s+\(?[\dIVXR][\w.()*]*)*"
    r"|\bR\d+\b|\b(?:19|20)\d\d\b|^#+ \d\d · .*|\(\d+ minutes\)|\*\*Time\*\*.*",
    re.MULTILINE,
)
SENTENCE = re.compile(r"(?<=[.!?:;])(?<!al\.)\s+(?=[^\da-z])|\n\s*\n|\n\s*(?:[*>|-]|\d\.)\s")
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:[ \u202f,]\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?![\w])")
SOURCE = re.compile(  # of an example, in the same sentence: a study, a trial, a lesson, a publication
    r"\bpaper(?:'s)?\b|\bEq\.|\bTable [IVX]+|\b(?:quick|demo|smoke)\b|\btrial E_|\b[Ll]esson _"
    r"|\([^()]*\b____\)"
)


def without_references(text: str) -> str:
    """The text with a line in place of every digit of a reference."""
    return REFERENCE.sub(lambda found: re.sub(r"\d", "_", found[0]), text)


def values(text: str) -> set[float]:
    """All numbers in a text."""
    return {float(re.sub(r"[ \u202f,]", "", found[0])) for found in NUMBER.finditer(text)}


def told_by_cells(notebook: NotebookNode) -> set[float]:
    """All numbers in the code cells and in what they put out."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts.append(cell.source)
            for output in cell.outputs:
                parts += [output.get("text", "")]
                parts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return values("\n".join(parts))


def sentences(text: str) -> Iterator[str]:
    """The sentences of a markdown cell, without code, formulas and the digits of references."""
    prose = without_references(NOT_PROSE.sub(" ", text))
    yield from (" ".join(part.split()) for part in SENTENCE.split(prose) if part and part.strip())


def unfounded(notebook: NotebookNode) -> list[tuple[str, str]]:
    """Measurements, and their sentences, that no cell of the notebook shows and that name no source."""
    known, found = told_by_cells(notebook), []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for sentence in sentences(cell.source):
                if SOURCE.search(sentence):
                    continue
                for number in NUMBER.finditer(sentence):
                    (value,) = values(number[0])
                    share = value / 100 if sentence[number.end() :].lstrip().startswith("%") else value
                    if (value >= 10 or "." in number[0]) and not known & {value, share}:
                        found.append((number[0], sentence))
    return found
