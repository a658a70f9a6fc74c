"""Masks of new scans in a folder: none takes another scan's place unseen."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import SimpleITK as sitk

from mupkg.scans.files import write_image
from mupkg.stages.runs import RUN, read_run, write_json

ENDINGS = re.compile(r"\.(nii(\.gz)?|mha|mhd|nrrd|nhdr|hdr|img)$", re.IGNORECASE)


def scan_name(path: str | Path) -> str:
    """What to call a scan: its file's name without a known ending, for names may hold dots; a folder's own name."""
    return ENDINGS.sub("", Path(path).name) or "scan"


def record_of(mask: Path, image: sitk.Image, *, scan: str, run: str) -> dict[str, str]:
    """What to write beside a mask to be, so that one sees of which scan and run it is.

    The scan is known by its voxels, so that the same one may be segmented again, wherever it lies.

    Raises:
        ValueError: naming the mask, if there is one already that is another scan's, or nobody knows whose.
    """
    digest = sitk.Hash(image)
    if mask.exists():
        try:
            before = json.loads(_beside(mask).read_bytes())
            theirs, whose = before["voxels_sha1"], f"of another scan, {before['scan']}"
        except (OSError, ValueError, KeyError, TypeError):
            theirs, whose = None, f"of a scan that {_beside(mask).name} does not tell"
        if theirs != digest:
            raise ValueError(
                f"{mask}: is there already, {whose}; choose another output folder, or remove that result"
            )
    return {"scan": scan, "run": run, "voxels_sha1": digest}


def write_mask(image: sitk.Image, mask: Path, record: Mapping[str, str]) -> None:
    """Write a mask with its record; the record first, for a mask without one is nobody's."""
    write_json(_beside(mask), record)
    write_image(image, mask)


def described(run: Path) -> str:
    """Which model a run is and what it was trained on, in a line that goes with its masks."""
    record = read_run(run / RUN, "data_fingerprint")
    data, parameters = record["data_fingerprint"], record["parameters"]
    told = [f"{name} {parameters[name]}" for name in ("configuration", "seed", "cohort") if name in parameters]
    return f"Run {run.name}: {', '.join(told)}, trained on data {data}."


def _beside(mask: Path) -> Path:
    return mask.with_name(mask.name.removesuffix(".nii.gz") + ".json")
