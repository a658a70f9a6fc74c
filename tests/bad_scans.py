"""The corpus of malformed scans, labels, files, DICOM series, tables and paths."""

from __future__ import annotations

import gzip
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from spoiling import AGAIN, GOOD, P7, Bad, Call, into_a_cohort, mask, painted, scan, stored, turned

from mupkg.data.build import write_cohort
from mupkg.data.cohort import Cohort
from mupkg.data.preprocessing import Preparation
from mupkg.scans.files import read_scan

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
        "choose a channel",
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
        return lambda: read_scan(series)

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
        return lambda: [*Cohort.read(folder).cases()]

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
    bad_table("an image that is not there", entry("image", "x.nii.gz"), "x.nii.gz", "check it"),
    bad_table("an image of two cases", entry("image", "a.nii.gz"), "cases a, b", "give each its own"),
    bad_table("a label of two cases", entry("label", "a_label.nii.gz"), "cases a, b", "give each its own"),
    bad_table("an unknown modality", entry("modality", "PET"), "case b", "must be CT or MR"),
    bad_table("a head in words", entry("head_left_x", "left"), "case b: head_left_x", "must be a number"),
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
    bad_table("out as in Windows", entry("image", r"..\elsewhere\x.nii.gz"), "case b", "check it"),
    bad_table("a drive of Windows", entry("image", r"C:\scans\x.nii.gz"), "case b", "check it"),
    bad_table("a name too long", entry("image", "x" * 300), "case b", "check it in cohort.csv"),
]


CORPUS = [*IMAGES, *COHORTS, *FILES, *HUGE, *DICOM, *TABLES, *PATHS]
