"""Executed notebooks as web pages that read well without running anything, and offline; an index leads to them."""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter

from mupkg.scans.writing import write_text

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; max-width: 50em; margin: 3em auto; line-height: 1.6 }}</style>
<h1>{title}</h1><p>Executed notebooks. CT results on phantoms are results on phantoms, not on patients.</p>
<ul>{items}</ul>
"""

# Lab's page without the scripts that it would ask the internet for, and with the alternative texts of pictures
TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block data_png scoped %}<div class="jp-RenderedImage jp-OutputArea-output {{ extra_class }}">
<img src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}"
alt="{{ (output | get_metadata('alt', 'image/png') or '') | escape_html }}"></div>{% endblock %}
"""
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$`\n]+?)\$", re.DOTALL)


def draw_formula(found: re.Match) -> str:
    """A TeX formula as a picture in HTML, with its source as alternative text."""
    source, drawn = (found[1] or found[2]).strip(), io.BytesIO()
    math_to_image(f"${source}$", drawn, dpi=72, format="svg")
    data = base64.b64encode(drawn.getvalue()).decode()
    return f'<img alt="{html.escape(source)}" style="display: inline" src="data:image/svg+xml;base64,{data}">'


def executed_notebooks(folder: Path) -> list[Path]:
    """The finished notebooks of a study, in the order of their numbers; running and failed ones are left out."""
    found = [p for p in folder.rglob("[0-9][0-9]_*.ipynb") if p.suffixes == [".ipynb"]]
    return sorted(found, key=lambda path: (path.name, path.parent.name))


def make_gallery(notebooks: Iterable[Path], target: Path, title: str) -> Path:
    """Write one HTML page a notebook and an index.html; the index.

    Raises:
        ValueError: if there is no notebook to show.
    """
    exporter, items = HTMLExporter(embed_images=True, raw_template=TEMPLATE), []
    for notebook in notebooks:
        name, content = f"{notebook.stem}-{notebook.parent.name}.html", nbformat.read(notebook, 4)
        for cell in content.cells:
            if cell.cell_type == "markdown":
                cell.source = FORMULA.sub(draw_formula, cell.source)
        page, _ = exporter.from_notebook_node(content, {"metadata": {"name": notebook.stem}})
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
