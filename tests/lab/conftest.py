"""One JupyterLab for all tests of this folder."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from lab import Lab, find_chromium


@pytest.fixture(scope="session")
def lab(_warm_python, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab in a browser, offline; opening a notebook in it takes seconds.

    Playwright keeps an event loop running while it is open: `asyncio.run` cannot be used beside it, papermill can.
    """
    if not find_chromium():
        pytest.skip("no Chromium: apt-get install chromium, or name one in MUPKG_CHROMIUM")
    _, environment = _warm_python
    with mock.patch.dict(os.environ, environment), Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab
