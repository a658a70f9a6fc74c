"""Cohorts: a folder with `cohort.csv` and the volumes it names, read and checked.

data/<cohort>/cohort.csv          case_id, image, label, split, modality and whatever else is known
              images/, labels/    the scans on their own grids
              prepared/           the same on the working grid (see `preprocessing`), made once
              preparation.json    how they were prepared
              fingerprint.json    what cohort.csv and prepared/ hold, so that a change is seen; the kind of source
"""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import SimpleITK as sitk

from mupkg.data.preprocessing import Preparation, Prepared, array_spacing
from mupkg.scans.cases import PHANTOM, Case, CohortError, grid_difference, name_faults, patient_key, spelt_alike
from mupkg.scans.files import no_access, read_scan
from mupkg.scans.writing import FINGERPRINT, fingerprint

SPLITS = ("train", "validation", "test")
COLUMNS = ("case_id", "image", "label", "split")
TABLE = "cohort.csv"
PHANTOMS = "phantoms"  # a source
OPTIONAL = ("split", "patient", "modality")  # columns of a table from elsewhere
REMADE = "run notebook 00 again on this cohort"
TEXT = (*COLUMNS, "patient", "modality", "source", "fallback")
HEADS = [f"head_{side}_{axis}" for side in ("left", "right") for axis in "xyz"]
_PATIENT = re.compile(r"(patient|subject|participant|person)s?(id|name|nr|no|number|key)?|pat|patid|pid|mrn")


@dataclass(frozen=True)
class Cohort:
    """A cohort on disk; `table` has one row a case, indexed by case_id."""

    folder: Path
    table: pd.DataFrame

    @classmethod
    def read(cls, folder: str | Path) -> Cohort:
        """Read and check a cohort's table; its volumes were checked when it was built, and are trusted since.

        Raises:
            CohortError: with every fault of the table, each naming the case, the file and the way out.
        """
        table = read_table(Path(folder) / TABLE)
        return cls(Path(folder), table.set_index("case_id", drop=False).rename_axis(None))

    @property
    def preparation(self) -> Preparation:
        """How the cohort's prepared volumes were made."""
        path = self.folder / "preparation.json"
        try:
            return Preparation.model_validate_json(path.read_bytes())
        except PermissionError as error:
            raise CohortError([no_access(path, error)]) from error
        except (OSError, ValueError) as error:
            raise CohortError([f"{path}: does not tell the preparation ({error}); {REMADE}"]) from error

    def ids(self, split: str | None = None) -> list[str]:
        """Case names of one split, or all, in the table's order."""
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        return list(self.table.index if split is None else self.table.index[self.table["split"] == split])

    def of_replicate(self, replicate: int) -> Cohort:
        """The same cohort as one replicate of a trial sees it, see `of_replicate`."""
        return Cohort(self.folder, of_replicate(self.table, replicate))

    def case(self, case_id: str) -> Case:
        """One case with its scan and label on their own grid, as they were checked when the cohort was built."""
        if case_id not in self.table.index:
            near = get_close_matches(str(case_id), map(str, self.table.index), 3) or list(self.table.index[:3])
            raise CohortError([f"case {case_id}: is not in {self.folder / TABLE}; there are, say, {', '.join(near)}"])
        row = self.table.loc[case_id]
        files = [self.folder / row[kind] for kind in ("image", "label") if isinstance(row[kind], str)]
        told = {name: row[name] for name in ("split", "modality") if isinstance(row.get(name), str)}
        if all(column in row and np.isfinite(row[column]) for column in HEADS):
            heads = [float(row[column]) for column in HEADS]
            told["femoral_heads"] = (tuple(heads[:3]), tuple(heads[3:]))
        return Case(case_id, *self._volumes(case_id, files), **told)

    def _volumes(self, case_id: str, paths: list[Path]) -> tuple[sitk.Image, sitk.Image | None]:
        """A case's image and, if it has one, its label, on one grid."""
        try:
            image, label = [*map(read_scan, paths), None][:2]
        except ValueError as error:
            raise CohortError([f"case {case_id}: {error}, or {REMADE}"]) from error
        if label is not None:
            if difference := grid_difference(image, label):
                off = f"{paths[1]}: does not lie on the grid of {paths[0].name} ({difference})"
                raise CohortError([f"case {case_id}: {off}; {REMADE}"])
            label.CopyInformation(image)  # the same up to rounding; SimpleITK wants it to the last digit
        return image, label

    def cases(self, split: str | None = None) -> Iterator[Case]:
        """The cases of one split, or all, read one after the other."""
        return map(self.case, self.ids(split))

    def fingerprint(self) -> str:
        """The digest of the table and of its cases' prepared volumes."""
        volumes = [path for case_id in self.table.index for path in self._prepared(case_id)]
        return fingerprint([self.folder / TABLE, *volumes])

    @property
    def of_phantoms(self) -> bool:
        """Whether all its scans are made up: phantoms are no patients."""
        return bool(self.table["case_id"].str.startswith(PHANTOM).all())

    @property
    def described(self) -> str:
        """What its figures are measured on, as every table must say."""
        return "PHANTOMS (made-up CT), not patients" if self.of_phantoms else f"cohort {self.folder.name}"

    def _prepared(self, case_id: str) -> list[Path]:
        """The case's prepared image, and its label if the table names one."""
        kinds = ("image", "label") if isinstance(self.table["label"][case_id], str) else ("image",)
        return [self.folder / "prepared" / f"{case_id}_{kind}.mha" for kind in kinds]

    def prepared(self, case_id: str) -> Prepared:
        """One case on the working grid, as notebook 00 left it.

        Raises:
            CohortError: if a volume is missing, or lies on another grid than preparation.json and its image say.
        """
        paths = self._prepared(case_id)
        prepared, spacing_mm = Prepared(*self._volumes(case_id, paths)), self.preparation.spacing_mm
        if not np.allclose(array_spacing(prepared.image), spacing_mm, rtol=1e-4):
            off = f"{paths[0]}: does not lie on the grid of {spacing_mm} mm (z, y, x) that preparation.json tells"
            raise CohortError([f"case {case_id}: {off}; {REMADE}"])
        return prepared


def of_replicate(table: pd.DataFrame, replicate: int) -> pd.DataFrame:
    """A cohort's table as one replicate of a trial sees it.

    With a column `replicate`, a replicate has training and validation cases of its own; cases without a number, the
    test cases, belong to all. With columns `fold_0`, `fold_1`, ... (one a repeat), replicate r is fold r % k of
    repeat r // k: that fold is tested, an eighth of the other patients validates, the rest trains.

    Raises:
        ValueError: naming the replicates that there are.
    """
    there = replicates(table)
    if replicate not in there:
        which = f"from {min(there)} to {max(there)}" if there else "none; notebook 00 makes replicates and folds"
        raise ValueError(f"there is no replicate {replicate} in this cohort, which has {which}")
    column, number = there[replicate]
    if column == "replicate":
        return table[table[column].isna() | (table[column] == number)]
    patient, fold = patients(table), table[column]
    tested = fold == number
    others = sorted(set(patient[fold.notna() & ~tested]))
    chosen = np.random.default_rng(replicate).permutation(others)[: max(1, round(len(others) / 8))]
    split = np.select([tested, fold.isna(), patient.isin(chosen)], ["test", None, "validation"], "train")
    return table.assign(split=split)


def replicates(table: pd.DataFrame) -> dict[int, tuple[str, int]]:
    """The replicates of a trial that a table has: each one's column, and its number there."""
    if "replicate" in table:
        return {number: ("replicate", number) for number in sorted(table["replicate"].dropna().astype(int).unique())}
    repeats = fold_columns(table)
    folds = min(int(table[repeats].fillna(-1).max(axis=None)) + 1, len(table)) if repeats else 0
    return dict(enumerate((column, fold) for column in repeats for fold in range(folds)))


def recorded(what: Literal["cohort", "regions"], folder: Path, notebook: int) -> str:
    """The fingerprint that the folder of a cohort (notebook 0) or of regions (2) holds; ValueError without one."""
    path = folder / FINGERPRINT
    try:
        return json.loads(path.read_bytes())[what]
    except PermissionError as error:
        raise ValueError(no_access(path, error)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: does not tell the {what} ({error!r}); run notebook 0{notebook} again") from error


def read_cases(path: Path, advice: str) -> pd.DataFrame:
    """A CSV table with a row a case, read alike wherever one is read: cohort.csv, regions.csv, metrics.csv.

    Names stay text, also those that look like numbers or like nothing (007, 1e5, NA): only an empty entry is missing.
    Blanks around entries, a byte order mark, and rows and columns without any entry are passed over. `~` in a path is
    the home folder.

    Raises:
        CohortError: naming the file, with this advice if it is no such table.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            options = {"index_col": False, "skipinitialspace": True, "keep_default_na": False}
            read = partial(pd.read_csv, path, encoding="utf-8-sig", **options)
            header = read(header=None, nrows=1, dtype=str).iloc[0].str.strip()
            if twice := sorted({*header[header.duplicated() & (header != "")]}):
                raise ValueError(f"there are two columns {', '.join(map(repr, twice))}; leave one out")
            names = [name or f"Unnamed: {number}" for number, name in enumerate(header)]
            table = read(header=0, names=names, dtype=dict.fromkeys(TEXT, str), na_values=[""])
    except FileNotFoundError:
        raise CohortError([f"{path}: there is no such table; {advice}"]) from None
    except PermissionError as error:
        raise CohortError([no_access(path, error)]) from error
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        raise CohortError([f"{path}: is not a CSV table ({error}); {advice}"]) from error
    for column in table.columns.intersection(TEXT):
        table[column] = table[column].str.strip().replace("", None)
    for column in table.columns.intersection(["image", "label"]):
        table[column] = table[column].map(os.path.expanduser, na_action="ignore")
    table = table.dropna(how="all").reset_index(drop=True)
    return table.drop(columns=[c for c in table if c.startswith("Unnamed: ") and table[c].isna().all()])


def read_table(path: Path, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """A table of cases and of the files beside it; CohortError with everything that is wrong with it."""
    table = read_cases(path, "notebook 00 makes one, or save it as CSV with commas, in UTF-8")
    missing = [column for column in columns if column not in table]
    if missing:
        has = f"it has {', '.join(table)}"
        raise CohortError([f"{path}: lacks the column(s) {', '.join(missing)}; {has}. Add them, set off by commas"])
    faults = [*name_faults(table["case_id"]), *_column_faults(path, table), *_file_faults(path.parent, table)]
    faults += table_faults(table)
    if faults or table.empty:
        raise CohortError(faults or [f"{path}: has no cases; list at least one"])
    return table


def patients(table: pd.DataFrame) -> pd.Series:
    """The patient of every case, in one spelling (see `patient_key`): the first of those in the table.

    Where none is known, the case itself.
    """
    if "patient" not in table:
        return table["case_id"]
    spelt = table["patient"].map(spelt_alike, na_action="ignore").replace("", None).astype(object)
    first = spelt.groupby(spelt.map(patient_key, na_action="ignore")).transform("min")
    return first.where(spelt.notna(), table["case_id"])


def _counts(entries: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(entries, errors="coerce")
    return numbers.ge(0) & numbers.mod(1).eq(0)


RULES = {  # of a column: what an entry that is not empty must be, in words, and which entries are so
    "split": (f"one of {', '.join(SPLITS)}", lambda entries: entries.isin(SPLITS)),
    "modality": ("CT or MR", lambda entries: entries.isin(("CT", "MR"))),
    "patient": (
        "a whole ID, but a table program rounded it; format the column as text there, and fill in the IDs again",
        lambda entries: ~entries.astype(str).str.fullmatch(r"\d([.,]\d+)?[eE]\+\d+"),
    ),
    r"replicate|fold_\d+": ("a whole number from 0 on, or empty", _counts),
    "|".join(HEADS): ("a number, or empty", lambda entries: pd.to_numeric(entries, errors="coerce").notna()),
}


def table_faults(table: pd.DataFrame) -> list[str]:
    """What is wrong with entries; if nothing is, with cases; if nothing is, with the splits that they make."""
    return [*_entry_faults(table)] or [*_patient_faults(table), *_side_faults(table)] or [*_split_faults(table)]


def _entry_faults(table: pd.DataFrame) -> Iterator[str]:
    for column, (pattern, (words, right)) in itertools.product(table, RULES.items()):
        if re.fullmatch(pattern, column):
            wrong = table[column].notna() & ~right(table[column])
            for case_id, entry in zip(table["case_id"][wrong], table[column][wrong], strict=True):
                yield f"case {case_id}: {column} is {entry!r}; it must be {words}"


def _side_faults(table: pd.DataFrame) -> Iterator[str]:
    """Split and folds must be there for exactly the cases with a label, and one for each patient.

    A split may be missing altogether, then it is drawn; and test cases belong to all replicates.
    """
    repeats, labelled, of = fold_columns(table), table["label"].notna(), patients(table)
    if repeats != [f"fold_{repeat}" for repeat in range(len(repeats))]:
        yield f"columns {', '.join(repeats)}: must be called fold_0, fold_1, ..., in this order, without a gap"
    for column in (["split"] if "split" in table and table["split"].notna().any() else []) + repeats:
        side = table[column]
        for case_id in table["case_id"][side.isna() & labelled]:
            yield f"case {case_id}: has a label but no {column}; fill it, or empty the whole column to have it drawn"
        for case_id in table["case_id"][side.notna() & ~labelled]:
            yield f"case {case_id}: has a {column} but no label; name its label, or leave its {column} empty"
        several = side.groupby(of).nunique()
        for patient in several.index[several > 1]:
            cases = ", ".join(map(str, table["case_id"][of == patient]))
            yield f"cases {cases}: are of one patient ({patient}) but differ in {column}; put them into one"
    if {"replicate", "split"} <= {*table}:
        for case_id in table["case_id"][table["replicate"].notna() & (table["split"] == "test")]:
            yield f"case {case_id}: is tested in one replicate alone; test cases belong to all, leave it empty"


def _split_faults(table: pd.DataFrame) -> Iterator[str]:
    """Of the table and of each of its replicates: none of the three splits may be empty, once there are any."""
    parts = {"column split": table}
    for replicate, (column, _) in replicates(table).items():
        parts[f"replicate {replicate} (column {column})"] = of_replicate(table, replicate)
    for name, part in parts.items():
        has = {*part["split"].dropna()} if "split" in part else {*()}
        if has and (missing := [split for split in SPLITS if split not in has]):
            none = " and ".join(missing)
            yield f"{name}: no case is in {none}; give each split a case, or empty the column to have it drawn"


def fold_columns(table: pd.DataFrame) -> list[str]:
    """The columns that deal cases out to folds, one a repeat."""
    return [column for column in table if re.fullmatch(r"fold_\d+", column)]


def _patient_faults(table: pd.DataFrame) -> Iterator[str]:
    """The faults of cases that look like scans of one patient and may be torn apart, where no patient is known.

    They share all before the last sign of their names, a number in it: 10000_1000000, 10000_1000001, 10001_1000003.
    """
    if "patient" in table and table["patient"].notna().any():
        return
    stem = table["case_id"].str.extract(r"^(.*\d.*)[_.-][^_.-]+$", expand=False)
    drawn = "split" not in table or table["split"].isna().all()
    torn = table["case_id" if drawn else "split"]  # a split yet to be drawn may tear any apart
    for name, cases in table["case_id"].groupby(stem):
        if 1 < len(cases) < len(table) and len(set(torn[cases.index].dropna())) > 1:
            yield (
                f"cases {', '.join(cases)}: look like scans of one patient, {name}. Say who is who in a table with a "
                "column 'patient'; it repeats the name of the case where every scan is another patient's"
            )


def _column_faults(path: Path, table: pd.DataFrame) -> Iterator[str]:
    """The faults of columns that would be passed over though somebody means them."""
    for column in table:
        name = re.sub(r"[^a-z]", "", column.casefold())
        meant = "patient" if _PATIENT.fullmatch(name) else next(iter(get_close_matches(name, OPTIONAL, 1, 0.8)), None)
        if meant and meant not in table:
            yield f"{path}: nothing reads the column {column!r}; call it {meant!r}, or leave it out"


def shared_files(column: str, files: Iterable[tuple[str, str | Path, str]]) -> Iterator[str]:
    """The faults of cases that share a file, by whatever name or link; from case, the file's name, its real path."""
    cases_of = defaultdict(dict)
    for case_id, name, real in files:
        cases_of[real][case_id] = name
    for names in cases_of.values():
        if len(names) > 1:
            same = " and ".join(map(str, dict.fromkeys(names.values())))
            yield f"cases {', '.join(names)}: have one and the same {column} {same}; give each its own"


def _file_faults(folder: Path, table: pd.DataFrame) -> Iterator[str]:
    for case_id in table["case_id"][table["image"].isna()]:
        yield f"case {case_id}: no image is named; fill the column 'image'"
    for column in ("image", "label"):
        named = table.dropna(subset=column)
        reals = [os.path.realpath(folder / name.replace("\0", "?")) for name in named[column]]
        files = [*zip(named["case_id"].astype(str), named[column], reals, strict=True)]
        for case_id, name, real in files:
            if not Path(real).is_relative_to(os.path.realpath(folder)):
                yield f"case {case_id}: {column} {name} leads out of {folder}; copy the file into the folder"
            elif not os.path.exists(real):
                yield f"case {case_id}: {column} {name} is not there, or may not be read; check it in {TABLE}"
        yield from shared_files(column, files)
