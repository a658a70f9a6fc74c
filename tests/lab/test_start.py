"""`make lab` opens the start page, rendered, and its links lead to what they name: in a real browser, offline."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, find_chromium
from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#]+)\)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page that opens first, of a server with the options of `make lab`."""
    if not find_chromium():
        pytest.skip("no Chromium: apt-get install chromium, or name one in MUPKG_CHROMIUM")
    command = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    options = re.search(r"jupyter lab (--.*)", command)[1].split()
    options = [option.replace("=notebooks/", f"={ROOT}/notebooks/") for option in options]
    options.append(
        f"--FileCheckpoints.checkpoint_dir={tmp_path_factory.mktemp('checkpoints')}"
    )  # not beside our files
    with Lab(ROOT, *options) as lab:
        page = lab._context.new_page()
        page.goto(f"{lab.address}/?token={lab.token}")
        yield page
        assert lab.outside == []


def test_the_start_page_is_rendered_with_its_four_doors_and_pictures(page: Page) -> None:
    shown = page.locator(".jp-RenderedMarkdown")
    shown.get_by_role("heading", name="Start here").wait_for(timeout=60_000)
    assert shown.locator("th").all_inner_texts() == ["Explore", "Rerun a table", "Segment a scan", "Learn"]
    page.wait_for_function("() => [...document.querySelectorAll('.jp-RenderedMarkdown img')].every(i => i.complete)")
    widths = shown.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) == 4 and min(widths) > 300
    assert "make demo" in shown.inner_text()


@pytest.mark.parametrize(
    ("link", "opened"),
    [
        ("notebook 08", "08_explore.ipynb"),
        ("notebook 04", "04_evaluation.ipynb"),
        ("notebook 09", "09_segment_a_patient.ipynb"),
        ("lesson 1", "1_cross_entropy.ipynb"),
        ("all six", "README.md"),
        ("what is computed", "METHOD.md"),
    ],
)
def test_a_door_opens(page: Page, link: str, opened: str) -> None:
    page.locator(".lm-TabBar-tabLabel", has_text="START.md").click()
    page.get_by_role("link", name=link).click()
    page.locator(".lm-DockPanel-tabBar .lm-mod-current", has_text=opened).wait_for(timeout=30_000)
    if opened.endswith(".md"):  # rendered, not as text
        page.locator(".jp-RenderedMarkdown:visible h1").first.wait_for(timeout=30_000)


def test_all_links_of_the_start_page_lead_somewhere() -> None:
    start = ROOT / "notebooks/START.md"
    links = LINK.findall(start.read_text(encoding="utf-8"))
    assert len(links) > 20
    assert [link for link in links if not (start.parent / link).exists()] == []
