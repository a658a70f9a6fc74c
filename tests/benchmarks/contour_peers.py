"""Masks written as contours by rt-utils, and read back by dcmrtstruct2nii and by us: how many voxels differ.

rt-utils traces the centres of a mask's outermost voxels; half of the shapes are ellipsoids whose outlines are drawn
from their formula instead. The peers want pydicom < 3, so they get an environment of their own:

    python -m venv peers && peers/bin/pip install rt-utils==1.2.7 dcmrtstruct2nii==5 "pydicom<3"
    python tests/benchmarks/contour_peers.py make FOLDER
    peers/bin/python tests/benchmarks/contour_peers.py peers FOLDER
    python tests/benchmarks/contour_peers.py compare FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE, SPACING, ORIGIN = (20, 96, 110), (0.9765625, 0.9765625, 2.5), (-37.3, 12.7, -401.13)
SOLIDS = {  # centres and radii in voxels (z, y, x)
    "ellipsoid": [((9.7, 45.3, 50.4), (7.9, 16.2, 20.3))],
    "ellipsoid with a hole": [((9.7, 45.3, 50.4), (7.9, 16.2, 20.3)), ((9.7, 44.6, 52.2), (4.6, 7.1, 8.4))],
}


def masks() -> dict[str, np.ndarray]:
    """Closed forms: the solids, a block, and noise with holes, spurs and single voxels."""
    from scipy.ndimage import gaussian_filter

    zyx, shapes = np.indices(SHAPE).T, {}
    for name, solids in SOLIDS.items():
        shapes[name] = sum((((zyx - c) / r) ** 2).sum(-1).T < 1 for c, r in solids) == 1
    shapes["block"] = (np.abs(zyx - (10, 40, 50)) < (5, 8, 10)).all(-1).T
    noise = np.random.default_rng(7).normal(size=SHAPE)
    inside = (np.abs(zyx - (10, 48, 55)) < (8, 44, 50)).all(-1).T
    for width in (1, 2, 4):
        smooth = gaussian_filter(noise, (1, width, width))
        shapes[f"noise of width {width}"] = (smooth > np.quantile(smooth, 0.6)) & inside
    return shapes


def outlines(solids: list) -> list[tuple[str, np.ndarray]]:
    angle, rings = np.linspace(0, 2 * np.pi, 240, endpoint=False), []
    for (cz, cy, cx), (rz, ry, rx) in solids:
        for z in range(SHAPE[0]):
            if (inside := 1 - ((z - cz) / rz) ** 2) > 0:
                x, y = cx + rx * inside**0.5 * np.cos(angle), cy + ry * inside**0.5 * np.sin(angle)
                rings.append(("CLOSED_PLANAR", np.c_[x, y, np.full(len(x), z)] * SPACING + ORIGIN))
    return rings


def make(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from dicom_series import write_series, write_structures

    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    write_series(folder / "ct", image, StudyID="1", SeriesNumber=1)
    write_structures(folder / "formula.dcm", {name: outlines(solids) for name, solids in SOLIDS.items()})
    np.savez(folder / "masks.npz", **masks())


def peers(folder: Path) -> None:
    from dcmrtstruct2nii import dcmrtstruct2nii
    from rt_utils import RTStructBuilder

    written = RTStructBuilder.create_new(dicom_series_path=str(folder / "ct"))
    for name, mask in np.load(folder / "masks.npz").items():
        written.add_roi(mask=np.transpose(mask, (1, 2, 0)), name=name)
    written.save(str(folder / "rt_utils.dcm"))
    for structures in ("rt_utils", "formula"):
        (folder / structures).mkdir(exist_ok=True)
        dcmrtstruct2nii(
            str(folder / f"{structures}.dcm"),
            str(folder / "ct"),
            str(folder / structures),
            convert_original_dicom=False,
        )


def compare(folder: Path) -> None:
    from mupkg.data.dicom_rt import read_rtstruct

    for structures in ("rt_utils", "formula"):
        files = {path.name: path for path in (folder / structures).glob("mask_*.nii.gz")}
        for name, mask in np.load(folder / "masks.npz").items():
            if structures == "formula" and name not in SOLIDS:
                continue
            key = f"mask_{name.replace(' ', '-')}.nii.gz"
            theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(files[key]))) > 0
            ours = sitk.GetArrayFromImage(read_rtstruct(folder / f"{structures}.dcm", folder / "ct", name)) > 0
            differ = [np.count_nonzero(found != mask) for found in (ours, theirs)]
            print(
                f"{structures}, {name}: {mask.sum()} voxels; ours differs in {differ[0]}, dcmrtstruct2nii {differ[1]}"
            )


if __name__ == "__main__":
    {"make": make, "peers": peers, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
