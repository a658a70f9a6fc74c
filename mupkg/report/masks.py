"""Masks of new scans in a folder: what lies there already is never written over."""

from __future__ import annotations

import re
from pathlib import Path

import SimpleITK as sitk

from mupkg.scans.files import write_image
from mupkg.stages.runs import RUN, read_run, write_json

ENDINGS = re.compile(r"\.(nii(\.gz)?|mha|mhd|nrrd|nhdr|hdr|img)$", re.IGNORECASE)


def scan_name(path: str | Path) -> str:
    """What to call a scan: its file's name without a known ending (names may hold dots), or its folder's own name."""
    return ENDINGS.sub("", Path(path).name) or "scan"


def new_mask_path(folder: str | Path, scan: str | Path) -> Path:
    """Where a scan's mask goes in a folder.

    Raises:
        ValueError: naming the mask, if there is one already, of this scan or of another one of its name.
    """
    mask = Path(folder) / f"{scan_name(scan)}_prostate.nii.gz"
    if mask.exists():
        raise ValueError(f"{mask}: is there already; choose another output folder, or remove that result")
    return mask


def write_mask(image: sitk.Image, mask: Path, *, scan: str, run: str) -> None:
    """Write a mask, and beside it a small JSON file that says which scan and which run it is of."""
    write_json(mask.with_name(mask.name.removesuffix(".nii.gz") + ".json"), {"scan": scan, "run": run})
    write_image(image, mask)


def described(run: Path) -> str:
    """Which model a run is and what it was trained on, in a line that goes with its masks."""
    record = read_run(run / RUN, "data_fingerprint")
    data, parameters = record["data_fingerprint"], record["parameters"]
    named = [f"{name} {parameters[name]}" for name in ("configuration", "seed", "cohort") if name in parameters]
    return f"Run {run.name}: {', '.join(named)}, trained on data {data}."
