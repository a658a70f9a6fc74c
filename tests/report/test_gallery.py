"""Pages of the gallery ask nobody for anything, draw their formulas, and say what their pictures show."""

import base64
import re

import nbformat
import pytest
from bs4 import BeautifulSoup

from mupkg.report.gallery import make_gallery

PNG = base64.b64encode(b"\x89PNG").decode()


@pytest.fixture
def page(tmp_path) -> str:
    text = "With $d$ the distance,\n\n$$\\max(0,\\; d(a,p) - d(a,n) + \\sigma)$$\n\nin `$HOME` or `$PWD`."
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("print(1)")]
    picture = {"image/png": {"alt": 'a "quoted" <case>'}}
    cells[1].outputs = [
        nbformat.v4.new_output("display_data", {"image/png": PNG}, metadata=picture),
        nbformat.v4.new_output("display_data", {"image/png": PNG}),
    ]
    notebook = tmp_path / "report" / "01_made_up.ipynb"
    notebook.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    index = make_gallery([notebook], tmp_path / "gallery", "Made up")
    assert "01_made_up-report.html" in index.read_text(encoding="utf-8")
    return (tmp_path / "gallery" / "01_made_up-report.html").read_text(encoding="utf-8")


def test_a_page_loads_nothing_from_elsewhere(page):
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)


def test_formulas_are_pictures_that_keep_their_source(page):
    formulas = re.findall(r'<img alt="([^"]*)"[^>]*src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert [source for source, _ in formulas] == ["d", r"\max(0,\; d(a,p) - d(a,n) + \sigma)"]
    assert all(b"<svg" in base64.b64decode(drawn) for _, drawn in formulas)
    assert "$HOME" in page and "$PWD" in page


def test_pictures_say_what_they_show(page):
    pictures = BeautifulSoup(page, "html.parser").select("img[src^='data:image/png']")
    assert [picture["alt"] for picture in pictures] == ['a "quoted" <case>', ""]


def test_without_notebooks_there_is_no_gallery(tmp_path):
    with pytest.raises(ValueError, match="no executed notebook of Study quick; run the study first"):
        make_gallery([], tmp_path / "gallery", "Study quick")
    assert not (tmp_path / "gallery").exists()
