"""What malformed input is made of, and how it must be refused.

Each generator writes something bad into a folder and gives back the call that must refuse it with a ValueError that
names the file, case or parameter (`named`) and what to do about it (`cure`). Neither a file nor the memory may change
by it. The corpora: `bad_scans`, `bad_runs`.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk

from mupkg.data.build import Source, sources_from_pattern, write_cohort
from mupkg.data.preprocessing import Preparation
from mupkg.scans.cases import Case

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (12, 14, 16)
MOST_MEMORY = 256 * 2**20  # bytes that a refusal may touch
AGAIN = "copy or export it again"

Call = Callable[[], object]


class Bad(NamedTuple):
    """Something malformed: `make(folder)` writes it and gives back the call that must refuse it."""

    id: str
    make: Callable[[Path], Call]
    named: str
    cure: str


# Good parts, to be spoiled


def scan(shape=SHAPE, dtype=np.int16, low=-300) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(low, 900, shape).astype(dtype))
    image.SetSpacing((2.0, 2.5, 5.0))
    return image


def mask(value=1, shape=SHAPE) -> sitk.Image:
    voxels = np.zeros(shape, np.uint8)
    voxels[3:9, 4:10, 3:12] = value
    label = sitk.GetImageFromArray(voxels)
    label.CopyInformation(scan(shape))
    return label


def painted(image: sitk.Image, value: float) -> sitk.Image:
    """The image as floats, its middle voxel changed."""
    changed = sitk.Cast(image, sitk.sitkFloat32)
    changed[tuple(n // 2 for n in image.GetSize())] = value
    return changed


def turned(image: sitk.Image, direction=None, origin=None, spacing=None) -> sitk.Image:
    image = sitk.Image(image)
    image.SetDirection(direction or image.GetDirection())
    image.SetOrigin(origin or image.GetOrigin())
    image.SetSpacing(spacing or image.GetSpacing())
    return image


def stored(image: sitk.Image, path: Path, *, compress: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


*GOOD, P7 = [  # each a scan of its own: identical voxels are refused
    Source(name, lambda name=name, low=low: Case(name, scan(low=low), mask()), {"label": f"{name}.mha"})
    for name, low in (("good-1", -300), ("good-2", -310), ("P7", -320))
]


def into_a_cohort(folder: Path, ending: str, **options) -> Call:
    """Notebook 00 on the scan P7 in this folder, among good ones."""
    label = "{case}_label" + next(p.name[len("P7_label") :] for p in folder.glob("P7_label.*"))
    options = {"modality": "CT"} | options
    preparation = Preparation(modality=options["modality"])
    return lambda: write_cohort(
        folder.parent / "data" / "cohort",
        [GOOD[0], *sources_from_pattern(folder, "{case}" + ending, label, **options), GOOD[1]],
        preparation,
        split_seed=0,
    )


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Every path under a folder with what it holds."""
    content = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        content[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return content


def peak_memory() -> int:
    """The most bytes this process has held, on Linux since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Begin the peak anew: a test before may have reached one that would hide all others."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def assert_refused(bad: Bad, folder: Path) -> None:
    """By name, with the way out, and without a trace; `folder` may hold what is to be spoiled, under `in`."""
    call = bad.make(folder / "in")
    before = tree(folder)
    forget_peak()
    memory = peak_memory()
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert bad.named in message
    assert bad.cure in message
    assert tree(folder) == before
    assert peak_memory() - memory < MOST_MEMORY
