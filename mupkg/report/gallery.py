"""Executed notebooks as web pages that read well without running anything; an index leads to them."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable
from pathlib import Path

from nbconvert import HTMLExporter

from mupkg.data.writing import write_text

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; max-width: 50em; margin: 3em auto; line-height: 1.6 }}</style>
<h1>{title}</h1><p>Executed notebooks. CT results on phantoms are results on phantoms, not on patients.</p>
<ul>{items}</ul>
"""


def executed_notebooks(folder: Path) -> list[Path]:
    """The finished notebooks of a study, in the order of their numbers; running and failed ones are left out."""
    found = [p for p in folder.rglob("[0-9][0-9]_*.ipynb") if p.suffixes == [".ipynb"]]
    return sorted(found, key=lambda path: (path.name, path.parent.name))


def make_gallery(notebooks: Iterable[Path], target: Path, title: str) -> Path:
    """Write one HTML page a notebook and an index.html; the index.

    Raises:
        ValueError: if there is no notebook to show.
    """
    exporter, items = HTMLExporter(embed_images=True), []
    for notebook in notebooks:
        name = f"{notebook.stem}-{notebook.parent.name}.html"
        page, _ = exporter.from_filename(str(notebook))
        write_text(target / name, page)
        items.append(
            f'<li><a href="{html.escape(name)}">{html.escape(f"{notebook.stem} ({notebook.parent.name})")}</a></li>'
        )
    if not items:
        raise ValueError(f"no executed notebook of {title}; run the study first, for example with make demo")
    write_text(target / "index.html", PAGE.format(title=html.escape(title), items="\n".join(items)))
    return target / "index.html"


if __name__ == "__main__":
    study, data, gallery = map(Path, sys.argv[1:])
    cohorts = executed_notebooks(data)
    try:
        print("open", make_gallery([*cohorts, *executed_notebooks(study)], gallery, f"Study {study.name}"))
    except ValueError as error:
        sys.exit(str(error))
