"""The site of `make site`, read from a file:// path in a real browser without a network; and what it does not show.

`make test-site` makes .venv-site, the site's environment; without it these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup
from lab import CHROMIUM_FLAGS, find_chromium, playwright
from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
SPHINX = ROOT / ".venv-site/bin/sphinx-build"
pytestmark = pytest.mark.skipif(not SPHINX.exists(), reason="no .venv-site: make test-site makes it")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def executed(path: Path, target: Path) -> None:
    """A notebook as if it had been executed: every code cell shows the target's folder, and a picture."""
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("Up: [METHOD.md](../../../METHOD.md)"))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            png = nbformat.v4.new_output("display_data", {"image/png": PIXEL})
            png.metadata = {"image/png": {"alt": f'"one" pixel of {path.stem}'}}
            cell.outputs = [nbformat.v4.new_output("stream", text=f"shown-{target.parent.name}\n"), png]
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


NAMES = ("04_evaluation", "05_visualization", "07_external_validation", "09_segment_a_patient")


def run_of(outputs: Path, study: str, source: str, seed: int = 0) -> None:
    """A study with a run on scans of a source, and with notebooks of all kinds."""
    run = outputs / study / f"UNet-seed{seed}"
    executed(ROOT / "notebooks/03_stage2_training.ipynb", run / "03_stage2_training.ipynb")
    (run / "run.json").write_text(json.dumps({"data": {"source": source}}), encoding="utf-8")
    for name in NAMES:
        executed(ROOT / f"notebooks/{name}.ipynb", outputs / study / f"report/{name}.ipynb")
    stage1 = outputs / study / "stage1"
    executed(ROOT / "notebooks/02_stage1_localization.ipynb", stage1 / "02_stage1_localization.ipynb")
    (stage1 / "run.json").write_text("{}", encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small site: of the repository's own pages, one executed lesson, and made-up studies."""
    root = tmp_path_factory.mktemp("a repository")
    for name in ("README.md", "METHOD.md"):
        shutil.copy2(ROOT / name, root)
    for name in ("notebooks", "outputs/reference"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    lesson = Path("notebooks/lessons/3_triplets.ipynb")
    executed(ROOT / lesson.parent / "solutions" / lesson.name, root / "outputs/pages" / lesson)
    run_of(root / "outputs", "made_up", "phantoms")
    run_of(root / "outputs", "scans", "pattern")
    run_of(root / "outputs", "mixed", "phantoms")
    run_of(root / "outputs", "mixed", "promise12", seed=1)
    for left in (".ipynb_checkpoints/05_visualization.ipynb", "05_visualization.failed.ipynb"):
        executed(ROOT / "notebooks/05_visualization.ipynb", root / "outputs/made_up/report" / left)
    command = [SPHINX, "-q", "-E", "-c", root / "notebooks/site", root, root / "outputs/site"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[-2000:]
    return root / "outputs/site"


@pytest.fixture
def page(site: Path) -> Iterator[Page]:
    """A page of a browser that reaches nothing but files; all that it asked for must be there."""
    if not find_chromium():
        pytest.skip("no Chromium: apt-get install chromium, or name one in MUPKG_CHROMIUM")
    missed: list[str] = []
    browser = playwright().chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
    page = browser.new_context(viewport={"width": 1400, "height": 1000}, offline=True).new_page()
    page.on("requestfailed", lambda request: missed.append(request.url))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or missed.append(request.url))
    page.on("pageerror", lambda error: missed.append(str(error)))
    yield page
    browser.close()
    assert not missed


def text(site: Path, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


def test_the_first_page_shows_the_readme_with_its_pictures(site: Path, page: Page) -> None:
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/README.html")
    loaded = page.locator("article img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert loaded and min(loaded) > 500
    page.locator("nav.bd-links").get_by_text("Lesson 3").click()
    assert page.locator("h1").first.inner_text().startswith("Lesson 3")


def test_a_lesson_is_solved_and_draws_its_formulas(site: Path, page: Page) -> None:
    page.goto((site / "notebooks/lessons/3_triplets.html").as_uri())
    page.wait_for_function("() => document.querySelectorAll('mjx-container svg').length > 3")
    boxes = [box.bounding_box() for box in page.locator("mjx-container svg").all()]
    assert all(box["width"] > 3 and box["height"] > 3 for box in boxes)
    assert not page.locator("mjx-merror").count()
    shown = text(site, "notebooks/lessons/3_triplets.html")
    assert 'href="../../METHOD.html"' in shown.partition("<p>Up: ")[2]
    assert "shown-lessons" in shown and "NotImplementedError" not in shown
    assert page.get_by_alt_text('"one" pixel of 3_triplets').count() > 10
    assert page.locator("details").first.get_attribute("open") is None  # the code of a folded cell


def test_the_search_finds_a_page(site: Path, page: Page) -> None:
    page.goto((site / "search.html").as_uri() + "?q=triplet+margin")
    page.locator("#search-results li a").first.wait_for()
    assert "Lesson 3" in page.locator("#search-results").inner_text()


def test_no_link_between_pages_is_dead(site: Path) -> None:
    dead = []
    for path in site.rglob("*.html"):
        for link in BeautifulSoup(path.read_bytes(), "html.parser").select("article a[href], nav a[href]"):
            target, _, anchor = unquote(link["href"]).partition("#")
            if ":" not in target:
                there = path.parent / target if target else path
                if not there.exists() or (anchor and f'id="{anchor}"' not in there.read_text(encoding="utf-8")):
                    dead.append(f"{path.relative_to(site)}: {link['href']}")
    assert not dead


def test_a_notebook_that_was_not_run_says_so(site: Path) -> None:
    assert "Not run for the site" in text(site, "notebooks/03_stage2_training.html")
    assert "Not run for the site" not in text(site, "notebooks/lessons/3_triplets.html")


def test_notebooks_of_studies_are_shown_but_no_voxel_of_a_scan(site: Path) -> None:
    shown = {}
    for path in site.glob("outputs/*/*/[01]*.html"):
        assert f"shown-{path.parent.name}" in path.read_text(encoding="utf-8")
        shown.setdefault(path.parents[1].name, set()).add(path.name[:2])
    assert "train one configuration (made_up, UNet-seed0)" in text(site, "README.html")
    assert "Evaluate a study (scans)" in text(site, "README.html")
    without_voxels = {"04", "07"}
    assert len(list(site.glob("outputs/**/05_*"))) == 1
    assert shown == {"made_up": {"02", "03", "05", *without_voxels}, "scans": without_voxels, "mixed": without_voxels}
    assert not list(site.glob("notebooks/07_*")) and not list(site.glob("notebooks/11_*"))
