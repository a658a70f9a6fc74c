"""The files that itkwidgets 1.0a55 loads from the internet, taken from npm packages instead.

`python tests/lab/npm_copies.py` fetches them into the Python environment that it runs in: 52 MB, once; it needs npm.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(sys.prefix) / "npm-copies"
# Pinned packages and the SHA-512 of their archives, as npm writes it.
PACKAGES = {
    "vue@2.6.10": "ImThpeNU9HbdZL3utgMCq0oiMzAkt1mcgy3/E6zWC/G6AaQoeuFdsl9nDhTDU3X1R6FK7nsIUuRACVcjI+A2GQ==",
    "vue-js-modal@2.0.1": "5FUwsH2zoxRKX4a7wkFAqX0eITCcIMunJDEfIxzHs2bHw9o20+Iqm+uQvBcg1jkzyo1+tVgThR/7NGU8djbD8Q==",
    "imjoy-core@0.14.5": "G0ybhLq57vOSM+4DhJ7A/3WSjJdbzk+WoEqg4+c5clkRhLOYY5VfI6oJ4MI664ZsVVgIinswsEJWbHAWQOBxFg==",
    "imjoy-rpc@0.5.9": "wjK01PPTboNh4nas2nlxB8PXpSToR6vOFnjBeIJ4LiMU5pRi7VIcTSsvO0WQapxyiFkA1fkm2s9HsZ2D2mHj0Q==",
    "itk-vtk-viewer@14.51.0": (
        "i1H0PfekLdCfL45lZ96aWCoh4thzxeexiGJ3NYC9euF1WefXW0P1JijBLIJfrDBvp5fhjncj/EEnIW1auBh+zw=="
    ),
    "itk-viewer-bootstrap-ui@0.30.0": (
        "JfXAeCEgllRblolFwB4HaPQp+AyPzUt8s3g74LVnWLkvOyng4p24aO2Sjsk6ZIkWyZjdfZWAtvrdScKh/RPkKw=="
    ),
}
# What an address begins with, and the folder here that holds what follows.
ADDRESSES = {
    "https://cdn.jsdelivr.net/npm/": "",
    "https://imjoy-team.github.io/vue-js-modal/": "vue-js-modal@2.0.1/dist/",
    "https://lib.imjoy.io/": "imjoy-core@0.14.5/dist/",
    "https://bafybeieiqiiwvdq66e2bndws5nwojbe4wwerbxyua6u37axxivi2rwf7wy.ipfs.dweb.link/": (
        "itk-vtk-viewer@14.51.0/dist/"
    ),
}
# A Vue component for floating windows that is not on npm; a viewer in a cell does not use it.
STUB = "@oeway/vue-window@2.4.1-a/lib/index.js"


def fetch() -> None:
    """Fetches and unpacks what is not there yet; ValueError if an archive is not the pinned one."""
    FOLDER.mkdir(exist_ok=True)
    for package, checksum in PACKAGES.items():
        if (FOLDER / package).exists():
            continue
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True)
            (archive,) = Path(scratch).glob("*.tgz")
            if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != checksum:
                raise ValueError(f"{package}: the archive fetched from npm is not the one whose SHA-512 is pinned")
            with tarfile.open(archive) as files:
                files.extractall(scratch, filter="data")
            (Path(scratch) / "package").rename(FOLDER / package)
    (FOLDER / STUB).parent.mkdir(parents=True, exist_ok=True)
    (FOLDER / STUB).write_text("window.VueWindow = {install() {}};", encoding="utf-8")


def copy_of(url: str) -> Path | None:
    """The local copy of what lies at an address, or None."""
    address = url.partition("?")[0].replace("imjoy-core@latest", "imjoy-core@0.14.5")
    for start, folder in ADDRESSES.items():
        path = FOLDER / folder / (address.removeprefix(start) or "index.html")
        if address.startswith(start) and path.is_file():
            return path
    return None


if __name__ == "__main__":
    fetch()
