"""Malformed input of every kind is refused by name and with the way out, before anything is written.

One table of small generators. Each writes something bad into a folder and gives back the call that must refuse it
with a ValueError that names the file, case or parameter (`named`) and what to do about it (`cure`). Neither a file
nor the memory may change by it.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mupkg.configurations import build, configuration
from mupkg.data.build import Source, source_from_dicom, sources_from_pattern, write_cohort
from mupkg.data.cases import Case, checked_case
from mupkg.data.cohort import Cohort
from mupkg.data.files import read_scan
from mupkg.data.patches import PatchSource
from mupkg.data.preprocessing import Preparation, prepare, to_scan_grid
from mupkg.parameters import (
    CohortSettings,
    ExploreSettings,
    ReportSettings,
    SegmentSettings,
    Settings,
    Stage1Settings,
    Stage2Settings,
    Study,
)
from mupkg.report.results import case_metrics, runs
from mupkg.stages.inference import LOCALIZER, Pipeline
from mupkg.stages.regions import Regions
from mupkg.stages.runs import load_tensors, save_tensors
from mupkg.stages.training import BEST, CHECKPOINT, train

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


# Scans and labels that cannot be worked with


def bad_image(id: str, image: Call, cure: str, *, ending=".mha", named=None, **options) -> Bad:
    def make(folder: Path) -> Call:
        bad, label = image(), mask()
        if bad.GetSize() == label.GetSize():
            label.CopyInformation(bad)
        stored(label, folder / "P7_label.mha")
        stored(bad, folder / f"P7{ending}")
        return into_a_cohort(folder, ending, **options)

    return Bad(id, make, named or f"P7{ending}", cure)


def bad_label(id: str, label: Call, cure: str, *, named="P7_label.mha", **options) -> Bad:
    def make(folder: Path) -> Call:
        stored(scan(), folder / "P7.mha")
        stored(label(), folder / "P7_label.mha")
        return into_a_cohort(folder, ".mha", **options)

    return Bad(id, make, named, cure)


SHEARED = (1, 0.05, 0, 0, 1, 0, 0, 0, 1)
FLIPPED = (1, 0, 0, 0, -1, 0, 0, 0, 1)
IMAGES = [
    bad_image("NaN", lambda: painted(scan(), np.nan), "export the scan again"),
    bad_image("infinity", lambda: painted(scan(), np.inf), "export the scan again"),
    bad_image("constant", lambda: scan() * 0, "export the scan again"),
    bad_image("one slice", lambda: scan((1, 14, 16)), "leave it out"),
    bad_image("two slices", lambda: scan((2, 14, 16)), "leave it out", ending=".nii.gz"),
    bad_image("2D", lambda: scan()[:, :, 0], "choose a channel"),
    bad_image("4D", lambda: sitk.JoinSeries([scan(), scan()]), "choose a channel", ending=".nii.gz"),
    bad_image(
        "4D without that channel", lambda: sitk.JoinSeries([scan(), scan()]), "choose one from 0 to 1", channel=2
    ),
    bad_image("RGB", lambda: sitk.Compose(scan(), scan(), scan()), "choose a channel", ending=".nii.gz"),
    bad_image(
        "complex",
        lambda: sitk.RealAndImaginaryToComplex(*[sitk.Cast(scan(), sitk.sitkFloat32)] * 2),
        "choose one volume",
        ending=".nii.gz",
    ),
    bad_image("CT without its intercept", lambda: scan(low=0), "apply its rescale intercept"),
    bad_image("CT scaled to -1..1", lambda: sitk.Cast(scan(), sitk.sitkFloat32) / 1000, "undo the normalisation"),
    bad_image("z-scores of a CT", lambda: sitk.Normalize(scan()), "undo the normalisation", ending=".nii.gz"),
    bad_image("tilted gantry", lambda: turned(scan(), SHEARED), "resample it first"),
    bad_image("voxels of a nanometre", lambda: turned(scan(), spacing=(1e-6, 2, 5)), "export the scan again"),
    bad_image("voxels of a metre", lambda: turned(scan(), spacing=(2, 1000, 5)), "export the scan again"),
    bad_image("on the moon", lambda: turned(scan(), origin=(3.8e11, 0, 0)), "export the scan again"),
    bad_image(
        "2.7e9 voxels of 1 mm",
        lambda: turned(scan(), spacing=[100] * 3),
        "the spacing, or leave the case out",  # a prostate of 3 litres, before so large a grid is made
        named="case P7",
    ),
    bad_label("label elsewhere", lambda: turned(mask(), origin=(3, 0, 0)), "resample it onto"),
    bad_label("label of another spacing", lambda: turned(mask(), spacing=(2, 2.5, 3)), "resample it onto"),
    bad_label("label the other way round", lambda: turned(mask(), FLIPPED), "resample it onto"),
    bad_label("label of another size", lambda: mask()[:, :, :8], "resample it onto"),
    bad_label("4D label", lambda: sitk.JoinSeries([mask(), mask()]), "choose a channel"),
    bad_label("RGB label", lambda: sitk.Compose(mask(), mask(), mask()), "choose a channel"),
    bad_label("empty label", lambda: mask(0), "correct the contour"),
    bad_label("label everywhere", lambda: mask(0) + 1, "correct the contour"),
    bad_label("label with 3 values", lambda: painted(mask(), 2), "choose which are prostate"),
    bad_label("probabilities for a label", lambda: painted(mask(), 0.4), "export a mask"),
    bad_label("NaN in the label", lambda: painted(mask(), np.nan), "export a mask"),
    bad_label("label without the chosen value", mask, "correct the contour", label_values=(4,)),
]


def one_bad_among_good(folder: Path) -> Call:
    """Prepared before, and now one of its scans is spoiled: the cohort must stay as it is."""
    write_cohort(folder.parent / "data" / "cohort", [*GOOD, P7], Preparation(), split_seed=0)
    stored(painted(scan(), np.nan), folder / "P7.mha")
    stored(mask(), folder / "P7_label.mha")
    return into_a_cohort(folder, ".mha")


def few_patients(folder: Path) -> Call:
    return lambda: write_cohort(folder.parent / "data" / "cohort", GOOD, Preparation(), split_seed=0)


COHORTS = [
    Bad("one bad among good, into an existing cohort", one_bad_among_good, "P7.mha", "export the scan again"),
    Bad("two patients", few_patients, "cohort", "Add labelled scans of more patients"),
]


# Files that are cut, damaged, or lie about what they hold


def bad_file(
    id: str,
    ending: str,
    spoil: Callable[[bytes], bytes],
    cure: str = AGAIN,
    *,
    compress=False,
    label=False,
    voxels: str | None = None,
) -> Bad:
    """A good file of this ending, its bytes spoiled; the scan's, or its label's. Or those of the `voxels` beside."""
    name = f"P7_label{ending}" if label else f"P7{ending}"

    def make(folder: Path) -> Call:
        good = stored(scan() if not label else mask(), folder / name, compress=compress)
        stored(mask(), folder / "P7_label.mha") if not label else stored(scan(), folder / "P7.mha")
        good = good.with_suffix(voxels or good.suffix)
        good.write_bytes(spoil(good.read_bytes()))
        return into_a_cohort(folder, ".mha" if label else ending)

    return Bad(id, make, name if voxels is None or "hdr" in ending else f"P7{voxels}", cure)


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(len(whole) * share)]


def flipped_bit(whole: bytes) -> bytes:
    """One bit in the last third, where only voxels are."""
    at = len(whole) * 3 // 4
    return whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :]


def nifti(layout: str, offset: int, *values: object, size: int | None = None) -> Callable[[bytes], bytes]:
    """A field of a NIfTI-1 header overwritten, the file cut to `size` bytes."""

    def spoil(whole: bytes) -> bytes:
        changed = bytearray(whole)
        struct.pack_into("<" + layout, changed, offset, *values)
        return bytes(changed[:size])

    return spoil


def packed(spoil: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The same done to the contents of a .gz."""
    return lambda whole: gzip.compress(spoil(gzip.decompress(whole)))


def dims(*sizes: int, size: int | None = None) -> Callable[[bytes], bytes]:
    return nifti("8h", 40, len(sizes), *sizes, *[1] * (7 - len(sizes)), size=size)


def line(name: str, value: str) -> Callable[[bytes], bytes]:
    """A line of a text header (MHA, MHD, NRRD) rewritten."""

    def spoil(whole: bytes) -> bytes:
        changed, times = re.subn(rf"(?m)^{name}( = |: ).*$".encode(), rf"{name}\g<1>{value}".encode(), whole, count=1)
        assert times == 1
        return changed

    return spoil


POSITIVE, AFFINE = "export it again with a positive one", "save it with the right affine"
FILES = [
    bad_file("truncated NIfTI", ".nii", cut(0.9)),
    bad_file("truncated NIfTI, packed", ".nii.gz", cut(0.9)),
    bad_file("truncated MHA", ".mha", cut(0.9)),
    bad_file("truncated MHA, packed", ".mha", cut(0.9), compress=True),
    bad_file("truncated NRRD", ".nrrd", cut(0.9)),
    bad_file("truncated NRRD, packed", ".nrrd", cut(0.9), compress=True),
    bad_file("truncated label", ".nii.gz", cut(0.7), label=True),
    bad_file("NIfTI cut in its header", ".nii", lambda whole: whole[:200]),
    bad_file("MHA cut in its header", ".mha", lambda whole: whole[:80]),
    bad_file("nothing in it", ".nii.gz", lambda whole: b""),
    bad_file("text for an image", ".nii.gz", lambda whole: b"hello"),
    bad_file("wrong magic of NIfTI", ".nii", nifti("4s", 344, b"XXXX"), "export it again"),
    bad_file("wrong magic of MHA", ".mha", lambda whole: whole.replace(b"NDims", b"NSmid", 1)),
    bad_file("wrong magic of NRRD", ".nrrd", lambda whole: b"DRRN" + whole[4:]),
    bad_file("a bit flipped in NIfTI", ".nii.gz", flipped_bit),
    bad_file("a bit flipped in MHA", ".mha", flipped_bit, compress=True),
    bad_file("a bit flipped in NRRD", ".nrrd", flipped_bit, compress=True),
    bad_file("a bit flipped in a label", ".mha", flipped_bit, label=True, compress=True),
    bad_file("unknown type in NIfTI", ".nii", nifti("h", 70, 9999)),
    bad_file("unknown type in MHA", ".mha", line("ElementType", "MET_BANANA")),
    bad_file("negative spacing in NIfTI", ".nii", nifti("f", 80, -2.0), AFFINE),
    bad_file("negative spacing in MHA", ".mha", line("ElementSpacing", "-2 2 5"), POSITIVE),
    bad_file("spacing 0 in NIfTI", ".nii", nifti("f", 88, 0.0), AFFINE),
    bad_file("spacing 0 in MHA", ".mha", line("ElementSpacing", "2 0 5"), POSITIVE),
    bad_file("spacing NaN in NIfTI", ".nii.gz", packed(nifti("f", 80, np.nan)), AFFINE),
    bad_file("spacing infinite in MHA", ".mha", line("ElementSpacing", "inf 2 5"), POSITIVE),
    bad_file("direction NaN in NIfTI", ".nii", nifti("4f", 280, *[np.nan] * 4)),
    bad_file("direction singular in MHA", ".mha", line("TransformMatrix", "1 0 0 1 0 0 0 0 1")),
    bad_file("an endless axis in MHA", ".mha", line("TransformMatrix", "1 0 0 0 1 0 1e308 0 1")),
    bad_file("no dimension", ".mha", line("NDims", "0")),
    bad_file("size in words", ".mha", line("DimSize", "ten 14 12")),
    bad_file("size 0 in MHA", ".mha", line("DimSize", "0 14 12")),
    bad_file("size negative in MHA", ".mha", line("DimSize", "-16 14 12")),
    bad_file("size negative in NIfTI", ".nii", dims(-16, 14, 12)),
    bad_file("an MHD without its voxels", ".mhd", line("ElementDataFile", "absent.raw")),
    bad_file("an MHD whose voxels are cut", ".mhd", cut(0.9), voxels=".raw"),
    bad_file("an MHD whose packed voxels are cut", ".mhd", cut(0.9), compress=True, voxels=".zraw"),
    bad_file("an MHD with a bit flipped in its voxels", ".mhd", flipped_bit, compress=True, voxels=".zraw"),
    bad_file(
        "an MHD whose packed voxels are fewer", ".mhd", lambda _: zlib.compress(b"00"), voxels=".zraw", compress=True
    ),
    bad_file("an MHD that names a list of files", ".mhd", line("ElementDataFile", "LIST")),
    bad_file("a NIfTI pair", ".hdr", cut(0.5), "convert them to one .nii.gz", voxels=".img"),
    bad_file("half a NIfTI pair", ".img", cut(0.5), "convert them to one .nii.gz"),
    bad_file("the mark of a pair in one NIfTI", ".nii", nifti("4s", 344, b"ni1"), "export it again"),
    bad_file("a header of NRRD alone", ".nhdr", cut(1), "convert them to one .nii.gz"),
    bad_file("a NRRD with its voxels elsewhere", ".nrrd", lambda w: w.replace(b"kinds:", b"data file: x.raw\n#")),
    bad_file("a NRRD with a line too long", ".nrrd", lambda w: w.replace(b"kinds:", b"kinds:" + b"domain " * 1000)),
    bad_file("a NRRD without spacing", ".nrrd", lambda w: w.replace(b"space directions:", b"#")),
    bad_file("an MHA without spacing", ".mha", lambda w: w.replace(b"ElementSpacing", b"Remark")),
    bad_file("voxels of MHA elsewhere", ".mha", line("ElementDataFile", "LOXAL"), compress=True),
    bad_file("packed bytes of MHA miscounted", ".mha", line("CompressedDataSize", "99"), compress=True),
    *(bad_file(f"{n} dimensions", ".mha", line("NDims", str(n))) for n in (-1, -2, 99, 101, 513, 2**31 - 1)),
]
HUGE = [
    bad_file("10 000 slices without data, NIfTI", ".nii", dims(512, 512, 10_000, size=352)),
    bad_file("10 000 slices without data, MHD", ".mhd", line("DimSize", "512 512 10000")),
    bad_file("10 000 slices without data, NRRD", ".nrrd", line("sizes", "512 512 10000")),
    bad_file("60000 cubed in MHA", ".mha", line("DimSize", "60000 60000 60000")),
    bad_file("60000 cubed in MHD", ".mhd", line("DimSize", "60000 60000 60000")),
    bad_file("60000 cubed in NRRD", ".nrrd", line("sizes", "60000 60000 60000")),
    bad_file("32767 cubed in NIfTI", ".nii", dims(32767, 32767, 32767)),
    bad_file("32767 cubed in NIfTI, packed", ".nii.gz", packed(dims(32767, 32767, 32767))),
    bad_file("five huge dimensions", ".nii", dims(32767, 32767, 32767, 32767, 32767)),
    bad_file("a size that overflows", ".mha", line("DimSize", " ".join(["4294967296"] * 3))),
    bad_file("a huge label", ".mha", line("DimSize", "60000 60000 60000"), label=True),
]


# DICOM


def write_series(folder: Path, *, uid="1.2.3.4", slices=range(8)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    writer, image, paths = sitk.ImageFileWriter(), scan(), []
    writer.KeepOriginalImageUIDOn()
    for z in slices:
        slice_ = image[:, :, z]
        position = "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, z))))
        tags = {"0008|0060": "CT", "0020|000d": "1.2.3", "0020|000e": uid, "0008|0018": f"{uid}.{z + 1}"}
        tags |= {"0020|0013": str(z), "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0032": position}
        for key, value in tags.items():
            slice_.SetMetaData(key, value)
        paths.append(folder / f"{uid}-{z:02d}.dcm")
        writer.SetFileName(str(paths[-1]))
        writer.Execute(slice_)
    return paths


def bad_dicom(id: str, write: Callable[[Path], object], cure: str) -> Bad:
    def make(folder: Path) -> Call:
        series = folder / "series"
        series.mkdir(parents=True)
        write(series)
        (source,) = source_from_dicom(series, modality="CT")
        cohort = folder.parent / "data" / "cohort"
        return lambda: write_cohort(cohort, [source], Preparation(), split_seed=0)

    return Bad(id, make, "series", cure)


def two_series(folder: Path) -> None:
    write_series(folder)
    write_series(folder, uid="1.2.3.5")


def a_slice_cut_short(folder: Path) -> None:
    path = write_series(folder)[3]
    path.write_bytes(path.read_bytes()[:700])


def huge_slices(folder: Path) -> None:
    """Rows and columns of 65535: 68 GB in eight slices."""
    for path in write_series(folder):
        whole = path.read_bytes()
        for tag in (b"\x28\x00\x10\x00\x02\x00\x00\x00", b"\x28\x00\x11\x00\x02\x00\x00\x00"):
            at = whole.index(tag) + len(tag)
            whole = whole[:at] + b"\xff\xff" + whole[at + 2 :]
        path.write_bytes(whole)


DICOM = [
    bad_dicom("empty folder", lambda folder: None, "give a folder with exactly one image series"),
    bad_dicom("no DICOM in it", lambda f: (f / "a.dcm").write_text("hello"), "copy it again"),
    bad_dicom("two series", two_series, "give a folder with exactly one image series"),
    bad_dicom("a missing slice", lambda f: write_series(f, slices=[0, 1, 2, 4, 5, 6]), "copy the series again"),
    bad_dicom("a slice cut short", a_slice_cut_short, "again"),
    bad_dicom("one slice of a series", lambda folder: write_series(folder, slices=[0]), "leave it out"),
    bad_dicom("huge slices", huge_slices, "again"),
]


# cohort.csv, and paths that lead out of the folder


def bad_table(id: str, spoil: Callable[[pd.DataFrame, Path], object], named: str, cure: str) -> Bad:
    """A cohort of three good cases; `spoil` gives back another table, or the bytes to write for it."""

    def make(folder: Path) -> Call:
        folder = folder / "cohort"
        for case_id in "abc":
            stored(scan(), folder / f"{case_id}.nii.gz")
            stored(mask(), folder / f"{case_id}_label.nii.gz")
        table = pd.DataFrame({"case_id": list("abc"), "split": ["train", "validation", "test"]})
        table["image"], table["label"] = table["case_id"] + ".nii.gz", table["case_id"] + "_label.nii.gz"
        spoiled = spoil(table, folder)
        if isinstance(spoiled, pd.DataFrame):
            spoiled = spoiled.to_csv(index=False).encode()
        if spoiled is not None:
            (folder / "cohort.csv").write_bytes(spoiled)
        return lambda: Cohort.read(folder)

    return Bad(id, make, named, cure)


def entry(column: str, value: object, row: int = 1) -> Callable[[pd.DataFrame, Path], pd.DataFrame]:
    """One entry of the table overwritten."""

    def spoil(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
        table = table.astype(object) if column in table else table.assign(**{column: None})
        table.loc[row, column] = value(folder) if callable(value) else value
        return table

    return spoil


def outside(folder: Path) -> Path:
    return stored(scan(), folder.parent / "elsewhere" / "x.nii.gz")


def linked(folder: Path) -> str:
    os.symlink(outside(folder), folder / "link.nii.gz")
    return "link.nii.gz"


def linked_folder(folder: Path) -> str:
    os.symlink(outside(folder).parent, folder / "links")
    return "links/x.nii.gz"


def looping(folder: Path) -> str:
    os.symlink(folder / "loop.nii.gz", folder / "loop.nii.gz")
    return "loop.nii.gz"


def text(table: pd.DataFrame, **options) -> bytes:
    return table.to_csv(index=False, **options).encode()


TABLES = [
    bad_table("no table", lambda t, f: None, "cohort.csv", "notebook 00 makes one"),
    bad_table("table is a folder", lambda t, f: (f / "cohort.csv").mkdir(), "cohort.csv", "save it as CSV"),
    bad_table("nothing in the table", lambda t, f: b"", "cohort.csv", "save it as CSV"),
    bad_table(
        "a spreadsheet", lambda t, f: b"PK\x03\x04\xff\xfe" + bytes(range(256)), "cohort.csv", "save it as CSV"
    ),
    bad_table("table in UTF-16", lambda t, f: text(t).decode().encode("utf-16"), "cohort.csv", "save it as CSV"),
    bad_table("quote without end", lambda t, f: text(t) + b'"d,train', "cohort.csv", "save it as CSV"),
    bad_table("semicolons", lambda t, f: text(t, sep=";"), "cohort.csv", "set off by commas"),
    bad_table("a column missing", lambda t, f: t.drop(columns="label"), "label", "Add them"),
    bad_table("no cases", lambda t, f: t[:0], "cohort.csv", "list at least one"),
    bad_table("a case twice", entry("case_id", "a"), "case a", "give every scan a name of its own"),
    bad_table("a case without a name", entry("case_id", None), "case nan", "rename it"),
    bad_table("a name that is a path", entry("case_id", "../b"), "case ../b", "rename it"),
    bad_table("a misspelt split", entry("split", "tset"), "case b", "must be one of train, validation, test"),
    bad_table("a split left open", entry("split", None), "case b", "fill it"),
    bad_table(
        "no case to test on", lambda t, f: t.assign(split=["train", "train", "validation"]), "test", "empty the"
    ),
    bad_table(
        "no case to validate on", lambda t, f: t.assign(split=["train", "train", "test"]), "validation", "empty"
    ),
    bad_table(
        "no case to train on", lambda t, f: t.assign(split=["test", "validation", "test"]), "train", "empty the"
    ),
    bad_table("an image spelt in two ways", entry("image", "./a.nii.gz"), "cases a, b", "give each its own"),
    bad_table("a split without a label", entry("label", None), "case b", "name its label"),
    bad_table("no image", entry("image", None), "case b", "fill the column"),
    bad_table("an image that is not there", entry("image", "x.nii.gz"), "x.nii.gz", "check the name"),
    bad_table("an image of two cases", entry("image", "a.nii.gz"), "cases a, b", "give each its own"),
    bad_table("a label of two cases", entry("label", "a_label.nii.gz"), "cases a, b", "give each its own"),
    bad_table("an unknown modality", entry("modality", "PET"), "case b", "must be CT or MR"),
    bad_table("a head in words", entry("head_left_x", "left"), "head_left_x", "mend it"),
    bad_table("a patient in two splits", lambda t, f: t.assign(patient="01"), "a, b, c", "put them into one"),
    bad_table("broken voxels", lambda t, f: (f / "b.nii.gz").write_bytes(b"torn") and t, "b.nii.gz", AGAIN),
]
INSIDE = "copy the file into the folder"
PATHS = [
    bad_table("out by ..", entry("image", lambda f: os.path.relpath(outside(f), f)), "case b", INSIDE),
    bad_table("label out by ..", entry("label", lambda f: "../elsewhere/" + outside(f).name), "case b", INSIDE),
    bad_table("out by an absolute path", entry("image", lambda f: str(outside(f))), "case b", INSIDE),
    bad_table("out by a link", entry("image", linked), "link.nii.gz", INSIDE),
    bad_table("out by a linked folder", entry("image", linked_folder), "links/x.nii.gz", INSIDE),
    bad_table("a link to itself", entry("image", looping), "loop.nii.gz", "cohort.csv"),
    bad_table("out as in Windows", entry("image", r"..\elsewhere\x.nii.gz"), "case b", "check the name"),
    bad_table("a drive of Windows", entry("image", r"C:\scans\x.nii.gz"), "case b", "check the name"),
    bad_table("a name too long", entry("image", "x" * 300), "case b", "mend it in cohort.csv"),
]


# Runs with pieces missing, broken, or of something else


def bad_run(id: str, spoil: Callable[[Path], Call], named: str, cure: str) -> Bad:
    """A study of one trained run and its stage 1, laid out as always; `spoil(study)` gives back the call."""

    def make(folder: Path) -> Call:
        return spoil(folder / "study")

    return Bad(id, make, named, cure)


def on_loading(spoil: Callable[[Path], object], name: str = BEST) -> Callable[[Path], Call]:
    """The file of a run spoiled; then the run is loaded for a new scan."""

    def spoiled(study: Path) -> Call:
        spoil(study / "run-seed0" / name)
        return lambda: Pipeline.load(study / "run-seed0")

    return spoiled


def on_resuming(spoil: Callable[[Path], object], *, name: str = "MetricUNet-HCP", filters: int = 2, **other):
    """A file of a run spoiled, or another network or other settings; then the training goes on."""

    def spoiled(study: Path) -> Call:
        run = study / "run-seed0"
        spoil(run)
        metadata = {"configuration": "MetricUNet-HCP", "base_filters": 2, "embedding_dim": 4} | other
        network, loss = build(configuration(name), base_filters=filters, embedding_dim=4)
        volume = np.zeros((3, 16, 16), np.uint8)
        source = PatchSource([volume], [volume], patch_size=(16, 16), batch_size=1)
        options = {"steps": 12, "validate_every": 6, "validate": lambda net: 0.0, "metadata": metadata}
        return lambda: train(network, loss, source, run, **options)

    return spoiled


def changed(**other) -> Callable[[Path], None]:
    """The file's metadata changed."""

    def spoil(path: Path) -> None:
        tensors, metadata = load_tensors(path)
        save_tensors(tensors, path, metadata | other)

    return spoil


def foreign(metadata: dict[str, str] | None) -> Callable[[Path], None]:
    return lambda path: save_file({"layer.weight": torch.zeros(3)}, path, metadata)


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def nothing(path: Path) -> None:
    pass


def on_regions(spoil: Callable[[Path], object], name: str) -> Callable[[Path], Call]:
    """A file of stage 1 spoiled; then notebook 03 reads what it needs of it."""

    def spoiled(study: Path) -> Call:
        (path,) = (study / "stage1").glob(name)
        spoil(path)

        def read() -> None:
            regions = Regions.read(study / "stage1")
            assert [regions.volumes(split) for split in ("train", "validation", "test")]

        return read

    return spoiled


def on_evaluating(spoil: Callable[[Path], object]) -> Callable[[Path], Call]:
    """A study of two tested runs spoiled; then notebook 04 gathers their numbers."""

    def spoiled(study: Path) -> Call:
        for name in ("run-seed0", "other-seed0"):
            (study / name).mkdir(exist_ok=True)
            pd.DataFrame({"case_id": ["a", "b"], "DSC": [0.5, 0.6]}).to_csv(study / name / "metrics.csv", index=False)
            (study / name / "run.json").write_text(json.dumps({"data_fingerprint": "1234"}))
        spoil(study)
        return lambda: case_metrics(runs(study))

    return spoiled


def on_prepared(spoil: Callable[[Path], object], name: str) -> Callable[[Path], Call]:
    """A file of the prepared cohort spoiled; then stage 1 reads it."""

    def spoiled(study: Path) -> Call:
        folder = study.parent / "phantoms"
        (path,) = folder.glob(name)
        spoil(path)
        cohort = Cohort.read(folder, check_voxels=False)
        return lambda: [cohort.preparation, cohort.prepared("phantom-0000")]

    return spoiled


def write(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


TRAIN, COPY, NOTEBOOK_2 = "train", "copy", "run notebook 02"
RUNS = [
    bad_run("no weights", on_loading(Path.unlink), BEST, TRAIN),
    bad_run("no localizer", on_loading(Path.unlink, LOCALIZER), LOCALIZER, TRAIN),
    bad_run("weights cut short", on_loading(shorter), BEST, "copy it again"),
    bad_run("localizer cut short", on_loading(shorter, LOCALIZER), LOCALIZER, "copy it again"),
    bad_run("empty weights", on_loading(write("")), BEST, "copy it again"),
    bad_run(
        "a pickle for weights", on_loading(lambda p: torch.save({"w": torch.zeros(3)}, p)), BEST, "copy it again"
    ),
    bad_run("safetensors of another program", on_loading(foreign(None)), BEST, TRAIN),
    bad_run("safetensors with its own metadata", on_loading(foreign({"format": "pt"})), BEST, TRAIN),
    bad_run("metadata that is no JSON", on_loading(foreign({"mupkg": "{"})), BEST, TRAIN),
    bad_run("metadata that is a list", on_loading(foreign({"mupkg": "[1]"})), BEST, TRAIN),
    bad_run("weights of the other stage", on_loading(lambda p: shutil.copy(p.parent / LOCALIZER, p)), BEST, COPY),
    bad_run("weights of another backbone", on_loading(changed(configuration="UNet++")), BEST, COPY),
    bad_run("weights of another width", on_loading(changed(base_filters=3)), BEST, COPY),
    bad_run("a network of 10^9 channels", on_loading(changed(base_filters=10**9)), BEST, COPY),
    bad_run("a network of half a channel", on_loading(changed(embedding_dim=0.5)), BEST, COPY),
    bad_run("a localizer of 10^9 channels", on_loading(changed(filters=10**9), LOCALIZER), LOCALIZER, COPY),
    bad_run("an unknown preparation", on_loading(changed(preparation={"a": 1}), LOCALIZER), LOCALIZER, COPY),
    bad_run("checkpoint of another network", on_resuming(nothing, name="UNet++"), CHECKPOINT, TRAIN),
    bad_run("checkpoint of another width", on_resuming(nothing, filters=3), CHECKPOINT, TRAIN),
    bad_run("checkpoint of other settings", on_resuming(nothing, seed=1), CHECKPOINT, "give this run another name"),
    bad_run("checkpoint cut short", on_resuming(lambda run: shorter(run / CHECKPOINT)), CHECKPOINT, TRAIN),
    bad_run(
        "a pickle for a checkpoint",
        on_resuming(lambda run: torch.save({"w": torch.zeros(3)}, run / CHECKPOINT)),
        CHECKPOINT,
        TRAIN,
    ),
    bad_run("checkpoint without weights", on_resuming(lambda run: (run / BEST).unlink()), BEST, "delete"),
    bad_run("no regions", on_regions(Path.unlink, "regions.csv"), "regions.csv", NOTEBOOK_2),
    bad_run("empty regions", on_regions(write(""), "regions.csv"), "regions.csv", NOTEBOOK_2),
    bad_run("regions without centres", on_regions(write("case_id,split\n"), "regions.csv"), "centre_x", NOTEBOOK_2),
    bad_run("a region missing", on_regions(Path.unlink, "*/*0_image.npy"), "_image.npy", NOTEBOOK_2),
    bad_run("a region cut short", on_regions(shorter, "*/*0_label.npy"), "_label.npy", NOTEBOOK_2),
    bad_run(
        "a pickle for a region",
        on_regions(lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "*/*0_image.npy"),
        "_image.npy",
        NOTEBOOK_2,
    ),
    bad_run(
        "regions without their geometry",
        on_regions(write("case_id,split,centre_x,centre_y,centre_z\n"), "regions.csv"),
        "origin, spacing, direction",
        NOTEBOOK_2,
    ),
    bad_run(
        "empty metrics",
        on_evaluating(lambda study: (study / "run-seed0" / "metrics.csv").write_text("")),
        "run-seed0",
        "notebook 03",
    ),
    bad_run(
        "a case measured twice",
        on_evaluating(lambda study: (study / "run-seed0" / "metrics.csv").write_text("case_id,DSC\na,1\na,1\n")),
        "run-seed0",
        "notebook 03",
    ),
    bad_run(
        "a run's record cut short",
        on_evaluating(lambda study: shorter(study / "run-seed0" / "run.json")),
        "run.json",
        "run notebook 03 again",
    ),
    bad_run(
        "a run renamed",
        on_evaluating(lambda study: (study / "run-seed0").rename(study / "run-seed0 copy")),
        "run-seed0 copy",
        "rename",
    ),
    bad_run("no finished run", lambda study: lambda: runs(study), "study", "run notebook 03"),
    bad_run("no preparation", on_prepared(Path.unlink, "preparation.json"), "preparation.json", "run notebook 00"),
    bad_run(
        "a broken preparation", on_prepared(write("{}}"), "preparation.json"), "preparation.json", "run notebook"
    ),
    bad_run(
        "a prepared scan missing", on_prepared(Path.unlink, "*/*0_image.mha"), "0_image.mha", "run notebook 00 again"
    ),
    bad_run("a prepared label missing", on_prepared(Path.unlink, "*/*0_label.mha"), "0_label.mha", "run notebook 00"),
    bad_run("a prepared label cut", on_prepared(shorter, "*/*0_label.mha"), "0_label.mha", AGAIN),
]

CORPUS = [*IMAGES, *COHORTS, *FILES, *HUGE, *DICOM, *TABLES, *PATHS, *RUNS]


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


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system's peak cannot be reset")
def test_a_peak_of_before_does_not_hide_one_of_now():
    bytes(2 * MOST_MEMORY)
    forget_peak()
    before = peak_memory()
    assert np.ones(MOST_MEMORY, np.uint8).all()
    assert peak_memory() - before > MOST_MEMORY // 2


@pytest.fixture(scope="module")
def trained(cohort, run_folder, tmp_path_factory) -> Path:
    """What the spoilers of runs copy: the cohort, stage 1 and the run of the session."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(cohort.folder, folder / "phantoms")
    shutil.copytree(run_folder.parent / "stage1", folder / "study" / "stage1")
    shutil.copytree(run_folder, folder / "study" / "run-seed0")
    return folder


@pytest.mark.parametrize("bad", CORPUS, ids=lambda bad: bad.id)
def test_it_is_refused_by_name_with_the_way_out_and_leaves_no_trace(bad, tmp_path, request):
    folder = tmp_path / "in"
    if bad in RUNS:
        shutil.copytree(request.getfixturevalue("trained"), folder)
    call = bad.make(folder)
    before = tree(tmp_path)
    forget_peak()
    memory = peak_memory()
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert bad.named in message
    assert bad.cure in message
    assert tree(tmp_path) == before
    assert peak_memory() - memory < MOST_MEMORY


def test_the_corpus_is_large_and_every_entry_has_a_name_of_its_own():
    assert len({bad.id for bad in CORPUS}) == len(CORPUS) >= 60


# Headers that must not bring the process down


def with_little_memory(paths: Iterable[Path]) -> list[str]:
    """What reading each of these says, "" if it is read; by one process that may not ask for more than 256 MB."""
    script = f"""
import resource, sys
from mupkg.data.files import read_scan
most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + {MOST_MEMORY}
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in sys.stdin.read().splitlines():
    print(path, end=": ", flush=True)
    try:
        read_scan(path)
        print(flush=True)
    except ValueError as error:
        print(repr(str(error)), flush=True)
"""
    command, names = [sys.executable, "-c", script], "\n".join(map(str, paths))
    done = subprocess.run(
        ["timeout", "60", *command], input=names, capture_output=True, text=True, errors="replace", cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} ended it: {done.stderr[-2000:]}"
    return [row.partition(": ")[2] for row in done.stdout.splitlines()]


only_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux holds a process to RLIMIT_AS"
)


@only_linux
def test_a_huge_header_is_refused_before_any_memory_is_asked_for(tmp_path):
    for number, bad in enumerate(HUGE):
        bad.make(tmp_path / str(number))
    (huge := tmp_path / "series").mkdir()
    huge_slices(huge)
    said = with_little_memory([*(tmp_path / str(number) / bad.named for number, bad in enumerate(HUGE)), huge])
    assert len(said) == len(HUGE) + 1 and all("claims" in row for row in said), said


NASTY = [
    b"-1",
    b"0",
    b"99",
    b"513",
    b"2147483647",
    b"-2147483648",
    b"18446744073709551615",
    b"1e308",
    b"nan",
    b"",
    b"%n",
]
HEADERS = {".mha": b"LOCAL\n", ".mhd": b".raw\n", ".nrrd": b"\n\n", ".nii": None}  # what ends each


def mutation(header: bytes, rng: random.Random) -> bytes:
    """A bit, a byte, a number or a line of a header changed, dropped or told again."""
    at, lines, numbers = rng.randrange(len(header)), header.split(b"\n"), [*re.finditer(rb"-?\d+", header)]
    row, number = rng.randrange(len(lines)), rng.choice(numbers) if numbers else re.match(b"", header)
    return rng.choice(
        [
            lambda: header[:at] + bytes([header[at] ^ 1 << rng.randrange(8)]) + header[at + 1 :],
            lambda: header[:at] + header[at + rng.randint(1, 4) :],
            lambda: header[:at] + rng.randbytes(rng.randint(1, 4)) + header[at:],
            lambda: (
                header[:at]
                + rng.choice([b"\0\0\0\0", b"\xff" * 4, b"\xff\x7f" * 2, b"\0\0\xc0\x7f"])
                + header[at + 4 :]
            ),
            lambda: header[: number.start()] + rng.choice(NASTY) + header[number.end() :],
            lambda: b"\n".join([*lines[:row], *lines[row + 1 :]]),
            lambda: b"\n".join([*lines[:row], lines[row] * rng.choice([2, 100]), *lines[row:]]),
        ]
    )()


@only_linux
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", HEADERS)
def test_no_change_to_a_header_brings_the_process_down(ending, compress, tmp_path):
    """ITK trusts some headers: NDims = -1 was a segmentation fault."""
    good = stored(scan(), tmp_path / f"good{ending}", compress=compress).read_bytes()
    mark = HEADERS[ending] if not (compress and ending == ".mhd") else b".zraw\n"
    size = 352 if mark is None else good.index(mark) + len(mark)
    rng, paths, pack = random.Random(0), [], gzip.compress if mark is None and compress else bytes
    for number in range(100):
        header = good[:size]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            header = mutation(header, rng)
        paths.append(tmp_path / f"{number}{ending}{'.gz' * (pack is gzip.compress)}")
        paths[-1].write_bytes(pack(header + good[size:]))
    said = with_little_memory(paths)
    assert len(said) == len(paths)
    assert all(not row or str(tmp_path) in row for row in said), said  # each refusal names a file


# Parameters

GIVEN = {SegmentSettings: {"run": "a", "scan": "b"}, Study: {"study": "a", "cohort": "b", "configurations": ["UNet"]}}
NAMES = {"study": (7, "../x"), "cohort": (["a"], r"..\x"), "data_folder": (7, ""), "outputs_folder": (True, "a\0b")}
TRAINING = {
    "size": (7, "huge"),
    "stage1": (7, "../stage1"),
    "seed": ("many", -1),
    "replicate": ("all", -1),
    "steps": ("many", -5),
    "batch_size": (1.5, -1),
    "patch_size": ([8], 20),
    "learning_rate": ("fast", float("inf")),
    "precision": (16, "fp8"),
}
WRONG = {  # of every parameter of every notebook: a wrong type and a value out of range
    CohortSettings: {
        "cohort": (7, "a/b"),
        "source": (["table"], "web"),
        "source_folder": (7, "  "),
        "size": (7, "huge"),
        "modality": (7, "PET"),
        "spacing_mm": (["a", 1, 1], [0.0, 1.0, 1.0]),
        "window_hu": ("wide", [240.0, -160.0]),
        "image_pattern": (7, "image.nii.gz"),
        "label_pattern": (["{case}"], "/{case}.nii.gz"),
        "label_values": ([1.5], [0]),
        "channel": ("T2", -1),
        "phantoms": ("many", 10**9),
        "replicates": ("many", 0),
        "test_phantoms": ("many", 0),
        "folds": ("many", 2),
        "repeats": ("many", 0),
        "seed": (1.5, 2**31),
        "data_folder": (7, ""),
    },
    Stage1Settings: {
        **NAMES,
        **TRAINING,
        "filters": ("many", -1),
        "coarse_mm": ("4 mm", 0.0),
        "region_mm": ([128.0, 128.0], [128.0, 128.0, 1e6]),
    },
    Stage2Settings: {
        **NAMES,
        **TRAINING,
        "configuration": (7, "MetricUNet-X"),
        "arm": (7, "a/b"),
        "training_cases": ("all", 0),
        "label_noise_mm": ("some", -1.0),
        "choose_from": ("late", 1.5),
        "base_filters": ("many", -1),
        "embedding_dim": (0.5, -8),
        "validate_every": ("often", -1),
        "momentum": ("some", 1.0),
        "weight_decay": ("some", -1e-4),
        "anchors": ("many", 0),
        "pairs": (1.5, 0),
        "threshold": ("low", 1.0),
        "margin": ("wide", -0.7),
        "metric_weight": ("some", float("nan")),
        "pair_weight": ("some", -0.1),
        "pair_distance": ([0.01], -0.01),
        "normalize": ("perhaps", 2),
        "hinge": ("perhaps", 2),
        "control": (True, "voxel"),
        "infonce_temperature": ("warm", 0.0),
        "dice": ("perhaps", 2),
        "channels_last": ("perhaps", 2),
        "compile": ("perhaps", 2),
        "workers": ("many", -1),
        "deterministic": ([True], -1),
        "film": ("perhaps", 2),
        "test_shifts": ("noise", ["blur"]),
    },
    ReportSettings: {
        **NAMES,
        "size": (7, "huge"),
        "configurations": ("UNet", ["../UNet"]),
        "seed": ("all", -1),
        "cases": ("all", 0),
        "real_scan": (7, "a\nb"),
    },
    ExploreSettings: {
        "study_folder": (7, ""),
        "case_id": (7, "../a"),
        "configurations": ("UNet", ["../UNet"]),
        "seed": ("all", -1),
        "viewer": (3, "vtk"),
        "per_kind": ("many", 1),
        "projection": (2, "LDA"),
        "anchors": ("many", 201),
        "pairs": (1.5, 11),
        "threshold": ("low", 0.99),
        "margin": ("wide", -0.7),
        "patch": ([8], 20),
        "pictures_folder": (7, "  "),
    },
    SegmentSettings: {"run": (7, ""), "scan": (["a"], " "), "output": (7, ""), "precision": (16, "fp16")},
    Study: {
        **NAMES,
        "size": (7, "huge"),
        "configurations": ("UNet", ["UNet3"]),
        "trial": ("all", {"name": "t"}),
        "seeds": ("all", [-1]),
        "source_folder": (7, ""),
        "prepare": ("all", {"phantoms": 1}),
        "stage1": ([1], {"step": 5}),
        "stage2": ("all", {"momentum": 2.0}),
        "report": ("all", {"cases": 0}),
        "external": ("all", {"zero_shot": ""}),
        "explore": ("all", {"viewer": "vtk"}),
        "segment_case": ("perhaps", 2),
        "threads": (2, {"stage1": 0}),
    },
}
PARAMETERS = [
    pytest.param(model, name, value, id=f"{model.__name__}-{name}-{kind}")
    for model, wrong in WRONG.items()
    for name, values in wrong.items()
    for kind, value in zip(("type", "range"), values, strict=True)
]


def from_notebook(model: type[Settings], **parameters: object) -> Settings:
    """As in a notebook whose cell of parameters assigns these."""
    parameters = GIVEN.get(model, {}) | parameters
    return model.from_notebook(parameters, ["", "\n".join(f"{name} = 0" for name in parameters)])


def test_no_parameter_is_left_out_of_the_corpus():
    for model, wrong in WRONG.items():
        assert set(wrong) == set(model.model_fields), model


@pytest.mark.parametrize(("model", "name", "value"), PARAMETERS)
def test_a_wrong_parameter_is_named_with_what_is_allowed_and_nothing_is_written(
    model, name, value, tmp_path, monkeypatch
):
    monkeypatch.setattr("mupkg.parameters.repository", lambda: tmp_path)  # where relative paths lead
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        from_notebook(model, **{name: value})
    message = str(error.value)
    assert re.match(r"parameter (\w+)", message) and name in message
    assert re.search(r"should|must|required|valid names are|there are:", message)  # what is allowed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", WRONG, ids=lambda model: model.__name__)
def test_an_unknown_parameter_is_told_with_those_there_are(model):
    with pytest.raises(ValueError, match=r"unknown parameter 'sede'; there are: .*\w"):
        from_notebook(model, sede=1)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["UNet", "CT", "paper"]),
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=8), SCALARS, max_size=3), st.binary()
)


@pytest.mark.parametrize("model", WRONG, ids=lambda model: model.__name__)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_parameters_make_a_model_or_an_error_that_names_one_of_them(model, data):
    names = st.sampled_from([*model.model_fields, "sede"])
    parameters = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=4))
    try:
        assert isinstance(from_notebook(model, **parameters), model)
    except ValueError as error:
        found = re.match(r"(?:unknown )?parameter '?(\w+)", str(error))
        assert found
        if found[1] != "combination":
            assert found[1] in parameters
        else:
            assert any(name in str(error) for name in parameters)


# No error: any direction


TURNS = {
    "flipped across": (-1, 0, 0, 0, 1, 0, 0, 0, 1),
    "upside down": (1, 0, 0, 0, 1, 0, 0, 0, -1),
    "flipped all ways": (-1, 0, 0, 0, -1, 0, 0, 0, -1),
    "sagittal": (0, 0, 1, 1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, 1, 0, -1, 0),
    "oblique": (0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1),
    "oblique and permuted": (0, 0.28, -0.96, 0, 0.96, 0.28, 1, 0, 0),
}


def assert_round_trip(case) -> None:
    """On a working grid of the scan's own voxels nothing may be lost, and nothing may move."""
    spacing = sitk.DICOMOrient(case.image, "LPS").GetSpacing()[::-1]
    prepared = prepare(case, Preparation(modality=case.modality, spacing_mm=spacing))
    back = to_scan_grid(sitk.Cast(prepared.label, sitk.sitkFloat32), case.image)
    found, truth = (sitk.GetArrayFromImage(image) for image in (back, case.label))
    if case.modality == "CT":
        np.testing.assert_array_equal(found, truth)
    else:  # what lies outside the body by Otsu's threshold may be cut off
        assert (found <= truth).all()
    assert back.GetDirection() == case.image.GetDirection() and back.GetOrigin() == case.image.GetOrigin()


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
@pytest.mark.parametrize("how", TURNS)
def test_flipped_permuted_and_oblique_scans_are_handled(how, ending, tmp_path):
    read = {
        name: read_scan(stored(turned(image, TURNS[how], (10.0, -20.0, 30.0)), tmp_path / f"{name}{ending}"))
        for name, image in (("scan", scan()), ("label", mask()))
    }
    assert_round_trip(checked_case("P7", read["scan"], read["label"], image_name="scan", label_name="label"))


TYPES = [sitk.sitkUInt8, sitk.sitkUInt16, sitk.sitkInt16, sitk.sitkInt32, sitk.sitkInt64, sitk.sitkFloat32]
USUAL_MM, ANY_MM = st.floats(0.02, 20), st.floats(-6, 4).map(lambda power: 10**power)
SIGNED_AXES = [axes for how, axes in TURNS.items() if "oblique" not in how]


@st.composite
def directions(draw) -> np.ndarray:
    """Any rotation of any storage order."""
    quaternion = np.array(draw(st.tuples(*[st.integers(-9, 9)] * 4).filter(any)), float)
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + 2 * w * cross + 2 * cross @ cross
    return rotation @ np.reshape(draw(st.sampled_from(SIGNED_AXES)), (3, 3))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 9)),
    spacing=st.tuples(*[USUAL_MM] * 3) | st.tuples(*[USUAL_MM] * 3) | st.tuples(*[ANY_MM] * 3),
    origin=st.tuples(*[st.floats(-1e4, 1e4)] * 3) | st.tuples(*[st.floats(-1e7, 1e7)] * 3),
    direction=directions(),
    shear=st.sampled_from([0, 0, 0, 1e-5, 0.3]),
    kind=st.sampled_from(TYPES),
    data=st.data(),
)
def test_any_header_is_refused_by_name_or_comes_back_to_the_voxel(
    size, spacing, origin, direction, shear, kind, data
):
    first = np.array([data.draw(st.integers(0, n - 1)) for n in size[::-1]])
    last = [data.draw(st.integers(a, n - 1)) + 1 for a, n in zip(first, size[::-1], strict=True)]
    signed = kind not in (sitk.sitkUInt8, sitk.sitkUInt16)
    voxels = np.random.default_rng(0).integers(-100 if signed else 150, 250, size[::-1])
    voxels[-1, -1, -1] = -100 if signed else 0  # air, for Otsu's threshold of the MR
    inside = np.zeros(size[::-1], np.uint8)
    inside[tuple(map(slice, first, last))] = 1
    image, label = sitk.Cast(sitk.GetImageFromArray(voxels.astype(np.int16)), kind), sitk.GetImageFromArray(inside)
    direction[:, 1] += shear * direction[:, 0]
    image, label = (turned(volume, direction.ravel().tolist(), origin, spacing) for volume in (image, label))
    try:
        case = checked_case("P7", image, label, image_name="s", label_name="l", modality="CT" if signed else "MR")
        assert_round_trip(case)
    except ValueError as error:
        assert all(row.startswith("case P7: ") for row in str(error).splitlines())
        assert re.search(r"leave it out|export|resample|correct the contour|choose a coarser", str(error))


# The exit code of a batch


def batch(notebook: Path, target: Path, **parameters: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mupkg.batch", str(notebook), str(target), json.dumps(parameters)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_failing_notebook_ends_with_exit_code_1_and_a_message(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise ValueError('case P7: mend it')")])
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    done = batch(tmp_path / "bad.ipynb", tmp_path / "out" / "bad.ipynb")
    assert done.returncode == 1
    assert "bad.ipynb failed: ValueError: case P7: mend it" in done.stderr and "kept for reading" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bad.failed.ipynb"]


def test_a_notebook_that_is_none_ends_with_exit_code_1_and_a_message(tmp_path):
    (tmp_path / "bad.ipynb").write_text('{"cells": [')
    done = batch(tmp_path / "bad.ipynb", tmp_path / "out.ipynb")
    assert done.returncode == 1
    assert "bad.ipynb: cannot be run" in done.stderr and "check the names" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.ipynb").exists()


def with_good_ones(folder: Path) -> dict[str, object]:
    """Notebook 00 on the bad scan in this folder and two good ones beside it."""
    for number in (1, 2):
        stored(scan(), folder / f"good-{number}.mha")
        stored(mask(), folder / f"good-{number}_label.mha")
    return {"source": "pattern", "source_folder": str(folder)} | {
        "image_pattern": "{case}.mha",
        "label_pattern": "{case}_label.mha",
    }


def for_segmenting(folder: Path) -> dict[str, object]:
    run, scan_file = folder / "study" / "run-seed0", next((folder / "phantoms" / "images").iterdir())
    return {"run": str(run), "scan": str(scan_file), "output": str(folder / "mask.nii.gz")}


END_TO_END = {  # one of every class of the corpus: by what its notebook reads it
    "NaN": with_good_ones,
    "empty label": with_good_ones,
    "a bit flipped in MHA": with_good_ones,
    "60000 cubed in MHA": with_good_ones,
    "a missing slice": lambda folder: {"source": "dicom", "source_folder": str(folder / "series")},
    "a misspelt split": lambda folder: {"source": "table", "source_folder": str(folder / "cohort")},
    "out by a link": lambda folder: {"source": "table", "source_folder": str(folder / "cohort")},
    "weights cut short": for_segmenting,
}


@pytest.mark.parametrize("name", END_TO_END)
def test_a_notebook_ends_with_exit_code_1_the_file_and_the_way_out(name, tmp_path, request):
    (bad,) = (bad for bad in CORPUS if bad.id == name)
    folder = tmp_path / "in"
    if bad in RUNS:
        shutil.copytree(request.getfixturevalue("trained"), folder)
    bad.make(folder)
    notebook = "09_segment_a_patient" if bad in RUNS else "00_prepare_cohort"
    parameters = END_TO_END[name](folder)
    if bad not in RUNS:
        parameters |= {"cohort": "cohort", "data_folder": str(tmp_path / "data")}
    (tmp_path / "report").mkdir()
    before = tree(tmp_path)
    done = batch(Path("notebooks") / f"{notebook}.ipynb", tmp_path / "report" / "bad.ipynb", **parameters)
    assert done.returncode == 1
    assert bad.named in done.stderr and bad.cure in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    after = tree(tmp_path)
    assert after.pop("report/bad.failed.ipynb")
    assert after == before
