"""Where cohorts come from: phantoms, image / label pairs, tables, PROMISE12, Decathlon, one DICOM series."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from mupkg.data.cases import checked_case
from mupkg.data.cohort import Case, CohortError, Source, read_table
from mupkg.data.files import closed, read_scan, readable
from mupkg.data.phantom import make_phantom


def sources_from_phantoms(seeds: Iterable[int], spacing_mm: tuple[float, float, float] | None) -> list[Source]:
    """Phantoms of these seeds; on grids as in the paper if no spacing (z, y, x) is given."""
    return [
        Source(f"phantom-{seed:04d}", lambda seed=seed: make_phantom(seed, spacing_mm=spacing_mm), {"seed": seed})
        for seed in seeds
    ]


def _file_source(
    case_id: str, image: Path, label: Path | None, modality: str, values: tuple[int, ...] | None, channel: int | None
) -> Source:
    def read() -> Case:
        try:
            scan = read_scan(image, channel=channel)
            mask = read_scan(label) if label else None
        except ValueError as error:
            raise ValueError(f"case {case_id}: {error}") from error
        return checked_case(
            case_id, scan, mask, image_name=str(image), label_name=str(label), label_values=values, modality=modality
        )

    return Source(case_id, read, {"source": image.name, "label": label.name if label else None})


def check_pattern(pattern: str) -> str:
    """The pattern, if it can name a file in a folder for every case."""
    inside = not pattern.startswith("/") and ".." not in pattern.split("/")
    if pattern.count("{case}") != 1 or not pattern.isprintable() or not inside:
        raise ValueError(
            "must hold {case} once, for example {case}_image.nii.gz, and must not lead out of the folder by / or ..; "
            f"it is {pattern!r}"
        )
    return pattern


def _files_below(folder: Path, faults: list[str]) -> Iterator[Path]:
    """Every file below a folder, through links too; what may not be read is added to the faults."""
    walk = os.walk(folder, followlinks=True, onerror=lambda error: faults.append(closed(error.filename, error)))
    for place, folders, names in walk:
        above = {os.path.realpath(path) for path in (Path(place), *Path(place).parents)}
        folders[:] = [name for name in folders if os.path.realpath(Path(place, name)) not in above]  # no circles
        yield from (Path(place, name) for name in names if not name.startswith("."))  # "._x": a Mac's leftovers


def sources_from_pattern(
    folder: str | Path,
    image_pattern: str,
    label_pattern: str,
    *,
    modality: str,
    label_values: tuple[int, ...] | None = None,
    channel: int | None = None,
) -> list[Source]:
    """Image / label pairs found by name, for example "{case}_image.nii.gz" and "{case}_label.nii.gz".

    A file that matches both patterns is a label; folders may be links.

    Raises:
        CohortError: if nothing is found, labels are missing, folders may not be read, or cases share a file.
    """
    folder = Path(folder)
    with readable(folder):
        there = folder.is_dir()
    if not there:
        raise CohortError([f"{folder}: there is no such folder"])
    for name, pattern in (("image_pattern", image_pattern), ("label_pattern", label_pattern)):
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise CohortError([f"{name} {error}"]) from error
    if image_pattern == label_pattern:
        raise CohortError([f"image_pattern and label_pattern are both {image_pattern!r}; give labels another one"])
    matcher = re.compile(re.escape(image_pattern).replace(re.escape("{case}"), "(?P<case>[^/]+)"))
    label_matcher = re.compile(re.escape(label_pattern).replace(re.escape("{case}"), "[^/]+"))
    found, faults, files = [], [], defaultdict(list)
    for path in sorted(_files_below(folder, faults)):
        name = path.relative_to(folder).as_posix()
        match = matcher.fullmatch(name)
        if match is None or label_matcher.fullmatch(name):
            continue
        case_id = match["case"]
        label = folder / label_pattern.replace("{case}", case_id)
        if not os.path.isfile(label):
            faults.append(
                f"case {case_id}: no label {label.relative_to(folder)} beside {name}; add it or move the image"
            )
        found.append(_file_source(case_id, path, label, modality, label_values, channel))
        files[os.path.realpath(path)].append(case_id)
    for path, cases in files.items():
        if len(cases) > 1:
            faults.append(f"cases {', '.join(cases)}: have one and the same image {path}; remove the links to it")
    if not found:
        faults.append(f"{folder}: no file there matches {image_pattern!r}")
    if faults:
        raise CohortError(faults)
    return found


def sources_from_table(
    path: str | Path, *, modality: str, label_values: tuple[int, ...] | None = None, channel: int | None = None
) -> list[Source]:
    """Cases listed in a CSV beside the volumes: case_id, image, label and, if known, split and patient.

    Args:
        path: the table, or the folder in which it is called cohort.csv.
    """
    path = Path(path)
    with readable(path):
        path = path / "cohort.csv" if path.is_dir() else path
    sources, faults = [], []
    for row in read_table(path, ("case_id", "image", "label")).to_dict("records"):
        told = row.get("modality")
        if isinstance(told, str) and told != modality:
            faults.append(f"case {row['case_id']}: is {told} in {path}, not {modality}; set modality to it")
        label = path.parent / row["label"] if isinstance(row["label"], str) else None
        source = _file_source(row["case_id"], path.parent / row["image"], label, modality, label_values, channel)
        sources.append(Source(source.case_id, source.read, source.columns | row))
    if faults:
        raise CohortError(faults)
    return sources


def sources_from_promise12(folder: str | Path) -> list[Source]:
    """The PROMISE12 layout: CaseNN.mhd and CaseNN_segmentation.mhd in one folder."""
    return sources_from_pattern(folder, "{case}.mhd", "{case}_segmentation.mhd", modality="MR")


def sources_from_decathlon(
    folder: str | Path,
    *,
    modality: str = "MR",
    label_values: tuple[int, ...] | None = (1, 2),
    channel: int | None = 0,
) -> list[Source]:
    """The Medical Segmentation Decathlon's layout: imagesTr/ and labelsTr/.

    The defaults fit its prostate task: channel 0 is T2, and both zones (1, 2) make the prostate.
    """
    label = "labelsTr/{case}.nii.gz"
    return sources_from_pattern(
        folder, "imagesTr/{case}.nii.gz", label, modality=modality, label_values=label_values, channel=channel
    )


def source_from_dicom(folder: str | Path, *, modality: str) -> list[Source]:
    """One DICOM series as a case without a label (contours from RTSTRUCT are not read yet)."""
    folder = Path(folder)
    case_id = re.sub(r"[^A-Za-z0-9._-]", "_", folder.resolve().name).lstrip("._-") or "scan"
    return [_file_source(case_id, folder, None, modality, None, None)]
