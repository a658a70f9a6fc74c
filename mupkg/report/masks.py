"""Masks of new scans in a folder: none takes another scan's place unseen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import SimpleITK as sitk

from mupkg.stages.runs import write_json

ENDINGS = re.compile(r"\.(nii(\.gz)?|mha|mhd|nrrd|nhdr|hdr|img)$", re.IGNORECASE)


def scan_name(path: str | Path) -> str:
    """What to call a scan: its file's name without a known ending, for names may hold dots; a folder's own name."""
    return ENDINGS.sub("", Path(path).name) or "scan"


def claim(mask: Path, image: sitk.Image, *, scan: str, run: str) -> None:
    """Say, in a JSON file beside a mask to be, of which scan and run it is; before it is written.

    The scan is known by its voxels, so that the same one may be segmented again, wherever it lies.

    Raises:
        ValueError: naming the mask, if there is one already that is another scan's, or nobody knows whose.
    """
    record, digest = mask.with_name(mask.name.removesuffix(".nii.gz") + ".json"), sitk.Hash(image)
    if mask.exists():
        try:
            before = json.loads(record.read_bytes())
            theirs, whose = before["voxels_sha1"], f"of another scan, {before['scan']}"
        except (OSError, ValueError, KeyError, TypeError):
            theirs, whose = None, f"of a scan that {record.name} does not tell"
        if theirs != digest:
            raise ValueError(
                f"{mask}: is there already, {whose}; choose another output folder, or remove that result"
            )
    write_json(record, {"scan": scan, "run": run, "voxels_sha1": digest})
