"""Where real scans are, for the tests that want some: none belongs to the repository."""

import os
from pathlib import Path


def real_scans() -> Path | None:
    """The folder that MUPKG_REALDATA names; None where it is unset or empty, as `make` leaves it in a fresh clone.

    A folder that is named and not there is an error: tests that were meant to run would be skipped.
    """
    named = os.environ.get("MUPKG_REALDATA", "").strip()
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"MUPKG_REALDATA names {named}, which is no folder")
    return folder
