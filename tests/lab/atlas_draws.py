"""Embedding Atlas draws what notebook 08 saves, offline: `make test-atlas`, not part of `make test`."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from lab import find_chromium, wait_for
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from mupkg.explore import save_voxels, voxels_table

ROOT = Path(__file__).parents[2]
ATLAS = os.environ.get("MUPKG_ATLAS", str(ROOT / ".venv-atlas/bin/embedding-atlas"))
FLAGS = (  # WebGPU in software, and no network
    "--no-sandbox",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# What Embedding Atlas asks of WebGPU and this browser has not; its own software, SwiftShader, lacks half precision.
MISSING = """async () => {
    const adapter = await navigator.gpu?.requestAdapter();
    if (!adapter) return 'WebGPU, and this browser has no adapter for it';
    const device = `${adapter.info.vendor} ${adapter.info.architecture}`;
    return adapter.features.has('shader-f16') ? '' : `WebGPU with shader-f16, which ${device} lacks`;
}"""
COLUMNS = ("--x", "projection_x", "--y", "projection_y", "--neighbors", "neighbors")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory):
    """Of a server with the shipped pair's voxels."""
    path = save_voxels(voxels_table(ROOT / "data/demo", per_kind=100), tmp_path_factory.mktemp("voxels"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [ATLAS, str(path), *COLUMNS, "--host", "127.0.0.1", "--port", port, "--duckdb", "server"]
    server = subprocess.Popen(command)

    def answers() -> bool:
        assert server.poll() is None, "embedding-atlas ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", int(port))) == 0

    try:
        wait_for(answers, "Embedding Atlas answers", timeout=120)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory):
    """Embedding Atlas in a browser that reaches nothing else; a picture of it in MUPKG_PICTURES at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(address)
        yield page
        folder = Path(os.environ.get("MUPKG_PICTURES", tmp_path_factory.mktemp("pictures")))
        page.screenshot(path=folder / "embedding_atlas.png")
        browser.close()


def test_table_and_charts_are_drawn_without_a_network(page: Page):
    page.get_by_text("phantom-0007").first.wait_for(timeout=120_000)
    for column in ("case", "split", "z", "run", "x_mm"):
        page.get_by_text(column, exact=True).first.wait_for(timeout=60_000)
    assert "2,000 points" in page.locator("body").inner_text()
    assert page.locator("svg rect, svg path").count() > 20  # bars


def test_points_are_drawn_where_the_browser_has_webgpu(page: Page, tmp_path: Path):
    page.get_by_text("phantom-0007").first.wait_for(timeout=120_000)
    if missing := page.evaluate(MISSING):
        page.get_by_text("WebGPU is unavailable").wait_for()
        pytest.skip(f"table and charts were seen, but no points: Embedding Atlas needs {missing}")

    def coloured() -> float:
        """The share of the embedding view that is not grey: points are."""
        page.locator("canvas").first.screenshot(path=tmp_path / "points.png")
        with Image.open(tmp_path / "points.png") as image:
            return float((np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2) > 40).mean())

    wait_for(lambda: coloured() > 0.005, "the points are drawn", timeout=60)
