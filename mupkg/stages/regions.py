"""The regions of a study: cut around located prostates, written once, read by everything that follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import UInt8
from torch import nn

from mupkg import progress
from mupkg.data.cohort import SPLITS, TABLE, Cohort, fold_columns, of_replicate, read_cases, recorded
from mupkg.data.preprocessing import Prepared, centroid, crop_region, label_on, whole_label
from mupkg.scans.cases import Point
from mupkg.scans.writing import FINGERPRINT, fingerprint, save_table, whole_file, write_text
from mupkg.stages.localization import locate
from mupkg.stages.runs import REGIONS, RUN, read_run

CENTRE = tuple(f"centre_{axis}" for axis in "xyz")
GEOMETRY = ("origin", "spacing", "direction")


def coverage(label: sitk.Image, centre: Point, region_mm: Sequence[float], whole: sitk.Image | None = None) -> float:
    """Share of the voxels of `whole`, the label if None, that the label's region around `centre` holds.

    Args:
        label: prepared. whole: the label before the body crop, of which the region cannot hold more than is left.
            Then the prepared one must be sampled from it, `label_on`.

    Returns:
        The share, rounded down to five digits, so that 1 means every voxel; NaN for an empty label.
    """
    regions = crop_region(label, centre, region_mm), whole if whole is not None else label
    inside, total = (int(np.count_nonzero(sitk.GetArrayFromImage(region))) for region in regions)
    return inside * 10**5 // total / 10**5 if total else float("nan")


@dataclass(frozen=True)
class Regions:
    """The regions of a study, as stage 1 left them: `regions.csv` and the cropped volumes.

    The same for every configuration of a study; training, validation and test alike centred without a label.
    """

    folder: Path
    table: pd.DataFrame

    @classmethod
    def read(cls, stage1_folder: str | Path, cohort: Cohort | None = None) -> Regions:
        """The regions in a stage 1's folder.

        Args:
            cohort: the one they must have been cut from, as notebook 00 left it.

        Raises:
            ValueError: naming the file, if it is missing or broken, or the regions are of another cohort.
        """
        path = Path(stage1_folder) / REGIONS
        table = read_cases(path, "run notebook 02 for this study")
        missing = [c for c in ("case_id", "split", *CENTRE, *GEOMETRY) if c not in table]
        if missing:
            raise ValueError(f"{path}: lacks the column(s) {', '.join(missing)}; run notebook 02 again")
        table = table.fillna({"fallback": ""}).set_index("case_id", drop=False).rename_axis(None)
        regions = cls(path.parent, table)
        if cohort is None:
            return regions
        anew = recorded("cohort", path.parent, 2) != recorded("cohort", cohort.folder, 0)
        if anew or (moved := regions._moved(cohort)):
            why = "another cohort, or prepared anew" if anew else f"{', '.join(moved[:3])} no longer in its split"
            raise ValueError(
                f"{path}: its regions were not cut from {cohort.folder} as it is now ({why}); run notebook 02 again, "
                f"and before it notebook 00 if it was {TABLE} that was changed"
            )
        return regions

    def _moved(self, cohort: Cohort) -> list[str]:
        """The cases that the cohort's table has no longer, or has in another split or replicate."""
        told, columns = cohort.table, [c for c in ("split", "replicate") if c in self.table]
        if fold_columns(told) and (cut_for := self._cut_for()) is not None:
            told = of_replicate(told, cut_for)
        now, then = told.reindex(index=self.table.index, columns=columns), self.table[columns]
        return list(then.compare(now).index)

    def _cut_for(self) -> int | None:
        """The replicate that a stage 1 was trained for; None if for none."""
        return read_run(self.folder / RUN)["parameters"].get("replicate")

    def fingerprint(self) -> str:
        """The digest of the table and of its cases' volumes."""
        names = [f"{case_id}_{kind}.npy" for case_id in self.table.index for kind in Prepared._fields]
        return fingerprint([self.folder / REGIONS, *(self.folder / "regions" / name for name in names)])

    def of_replicate(self, replicate: int) -> Regions:
        """Those of one replicate of a trial; regions that were cut for one fold alone are all its own.

        Raises:
            ValueError: if there is no such replicate, or these were cut for another one or for none.
        """
        if "replicate" in self.table:
            return Regions(self.folder, of_replicate(self.table, replicate))
        cut_for = self._cut_for()
        if cut_for != replicate:
            which = "no replicate" if cut_for is None else f"replicate {cut_for}"
            raise ValueError(
                f"{self.folder / REGIONS}: its regions were cut for {which}, not for replicate {replicate}; in "
                "a trial on folds set folds under prepare (as many as the table has, if it has some): then each fold "
                "has a stage 1 of its own"
            )
        return self

    def ids(self, split: str) -> list[str]:
        return list(self.table.index[self.table["split"] == split])

    def centre(self, case_id: str) -> Point:
        return tuple(float(self.table.loc[case_id, name]) for name in CENTRE)

    def spacing_mm(self, case_id: str) -> tuple[float, float, float]:
        """Voxel size in array order (z, y, x)."""
        return tuple(json.loads(self.table.loc[case_id, "spacing"])[::-1])

    def image(self, case_id: str, kind: str = "image") -> sitk.Image:
        """A region with its place in space, as it was cut from the prepared scan; kind "image" or "label"."""
        image = sitk.GetImageFromArray(self.volume(case_id, kind))
        for name in GEOMETRY:
            getattr(image, f"Set{name.capitalize()}")(json.loads(self.table.loc[case_id, name]))
        return image

    def volume(self, case_id: str, kind: str = "image") -> np.ndarray:
        """A region's voxels (z, y, x), memory-mapped; kind "image" or "label"."""
        path = self.folder / "regions" / f"{case_id}_{kind}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); run notebook 02 again") from error

    def volumes(
        self, split: str, first: int | None = None
    ) -> tuple[list[UInt8[np.ndarray, "z y x"]], list[UInt8[np.ndarray, "z y x"]]]:
        """Images and labels of one split, or of its first cases; ValueError if there are not so many."""
        ids = self.ids(split)
        if first is not None and first > len(ids):
            raise ValueError(f"training_cases: {first} are asked for, but {self.folder} has {len(ids)} {split} cases")
        ids = ids[:first]
        _allow_open_files(2 * len(ids))
        return [self.volume(i) for i in ids], [self.volume(i, "label") for i in ids]


def _allow_open_files(more: int) -> None:
    """Every memory-mapped volume keeps a file open, of which a process may often have but 1024 unless it asks."""
    try:
        import resource
    except ImportError:  # Windows, where files are not counted so
        return
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY:
        wanted = now + more if most == resource.RLIM_INFINITY else min(now + more, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def unmark(folder: Path) -> None:
    """Remove what says that a stage 1's regions are whole: from here on they are in the making."""
    for name in (REGIONS, FINGERPRINT):
        (folder / name).unlink(missing_ok=True)


def save_region(
    prepared: Prepared, centre: Point, region_mm: Sequence[float], folder: Path, case_id: str
) -> sitk.Image:
    """Crop a case's region, image and label, into a stage 1's folder; the region with its place in space."""
    for kind, volume in zip(Prepared._fields, prepared, strict=True):
        region = crop_region(volume, centre, region_mm)
        with whole_file(folder / "regions" / f"{case_id}_{kind}.npy") as temporary:
            np.save(temporary, sitk.GetArrayFromImage(region))
    return region


def write_regions(
    cohort: Cohort, network: nn.Module, folder: str | Path, *, coarse_mm: float, region_mm: Sequence[float]
) -> Regions:
    """Locate every labelled case of a cohort, crop its region, and report how well that went.

    Columns of regions.csv: the centre and its two parts, what fell back to what, the distance of the centre and
    of the coarse centre from the true centroid in mm, the region's geometry as SimpleITK gives it (x, y, z; JSON),
    and the share of the whole prostate the region covers.
    """
    folder, rows = Path(folder), []
    unmark(folder)
    ids = [case_id for split in SPLITS for case_id in cohort.ids(split)]
    for case_id in progress(ids, desc="locating", unit="case"):
        case, prepared = cohort.case(case_id), cohort.prepared(case_id)
        location = locate(case, prepared.image, network, coarse_mm=coarse_mm)
        region = save_region(prepared, location.centre, region_mm, folder, case_id)
        truth = np.array(centroid(case.label))
        told = cohort.table.loc[case_id, [c for c in ("split", "replicate") if c in cohort.table]]
        row: dict[str, object] = {"case_id": case_id, **told, "fallback": location.fallback}
        for name, point in zip(("centre", "coarse", "heads"), location[:3], strict=True):
            place = np.full(3, np.nan) if point is None else np.array(point)
            row |= dict(zip((f"{name}_{axis}" for axis in "xyz"), place.round(4), strict=True))
            row[f"{name}_distance_mm"] = round(float(np.linalg.norm(truth - place)), 3)
        whole = whole_label(case, cohort.preparation)
        row |= {name: json.dumps(getattr(region, f"Get{name.capitalize()}")()) for name in GEOMETRY}
        left = label_on(prepared.label, whole)  # sampled from `whole`, so that no tie between two voxels tells
        row["covered"] = coverage(left, location.centre, region_mm, whole)
        rows.append(row)
    save_table(pd.DataFrame(rows), folder / REGIONS, index=False)
    regions = Regions.read(folder)
    content = {"cohort": recorded("cohort", cohort.folder, 0), "regions": regions.fingerprint()}
    write_text(folder / FINGERPRINT, json.dumps(content) + "\n")
    return regions
