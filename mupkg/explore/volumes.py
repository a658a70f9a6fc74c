"""Volumes in WebGL: ipyniivue's three planes, and itkwidgets where somebody asks for it and it can work."""

from __future__ import annotations

import importlib.util
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path

import ipywidgets
import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.colors import to_rgb

from mupkg import in_lab
from mupkg.explore.predictions import CasePredictions
from mupkg.report.figures import HEAT, PREDICTION, TRUTH
from mupkg.samplers import contour

# One file of every host that itkwidgets 1.0a55 loads its viewer from; without any of them its view() waits for ever
ITK_FILES = (
    "https://cdn.jsdelivr.net/npm/itk-viewer-bootstrap-ui@0.30.0/dist/bootstrapUIMachineOptions.js.es.js",
    "https://imjoy-team.github.io/vue-js-modal/index.js",
    "https://lib.imjoy.io/imjoy-loader.js",
    "https://bafybeieiqiiwvdq66e2bndws5nwojbe4wwerbxyua6u37axxivi2rwf7wy.ipfs.dweb.link/itkVtkViewer.js",
)


def nifti(array: np.ndarray, spacing_mm: tuple[float, float, float]) -> bytes:
    """A volume (z, y, x) as a compressed NIfTI file's bytes: what ipyniivue takes."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        sitk.WriteImage(image, str(path), useCompression=True)
        return path.read_bytes()


def one_colour(colour: str) -> dict[str, list[int]]:
    """A colour map of niivue's that goes from nothing to one colour."""
    named = zip("RGB", (round(255 * part) for part in to_rgb(colour)), strict=True)
    return {letter: [value, value] for letter, value in named} | {"A": [0, 255], "I": [0, 255]}


class NiivueViewer:
    """A row of ipyniivue views, one a run, with their cross-hairs tied together.

    Grey: the region. Over it the truth's contour, the foreground probability, and what exceeds the threshold: that is
    one number to the graphics card, so the cut follows the slider at once. The cross-hair moves the case's slice.
    """

    def __init__(self, case: CasePredictions):
        from ipyniivue import NiiVue, SliceType, Volume  # slow to import

        self.case, self._in_plane = case, [0.5, 0.5]
        # slices stand for the batch here: a contour within each of them, as on paper
        edge = contour(torch.from_numpy(case.truth)).numpy().astype(np.uint8)
        region, edge = (nifti(volume, case.spacing_mm) for volume in (case.region, edge))
        self.views = []
        # as in the pictures: the patient's left on the right; cross-hair in mm, voxels as they are
        options = {"is_radiological_convention": True, "is_nearest_interpolation": True, "is_colorbar": False}
        options |= {"slice_type": SliceType.MULTIPLANAR, "crosshair_width": 0.5, "crosshair_width_unit": "mm"}
        for heat in case.heat.values():
            probability = nifti(np.round(255 * heat).astype(np.uint8), case.spacing_mm)
            view = NiiVue(height=260, **options)
            for name, colour in {"truth": TRUTH, "prediction": PREDICTION}.items():
                view.add_colormap(name, one_colour(colour))
            view.load_volumes(
                [
                    Volume(data=region, name="region.nii.gz", colormap="gray", cal_min=0, cal_max=255),
                    Volume(data=probability, name="heat.nii.gz", colormap=HEAT, cal_min=5, cal_max=255),
                    Volume(data=probability, name="cut.nii.gz", colormap="prediction", opacity=0.3),
                    Volume(data=edge, name="truth.nii.gz", colormap="truth", cal_min=0.5, cal_max=1),
                ]
            )
            view.on_location_change(self._located)
            self.views.append(view)
        for view in self.views:
            if others := [other for other in self.views if other is not view]:
                view.broadcast_to(others, {"crosshair": True, "zoom_pan": True})
        share = ipywidgets.Layout(width=f"{100 // len(self.views)}%")
        pairs = zip((ipywidgets.HTML(f"<b>{name}</b>") for name in case.heat), self.views, strict=True)
        self.widget = ipywidgets.HBox([ipywidgets.VBox(pair, layout=share) for pair in pairs])

    def _located(self, place: dict) -> None:
        """niivue tells a place (RAS, mm; the region's first slice lies at 0), perhaps beside the region."""
        self._in_plane = place["frac"][:2]  # the view's own cross-hair is told a little later
        self.case.slice.value = round(place["mm"][2] / self.case.spacing_mm[0])

    def show(self, z: int, opacity: float, threshold: float) -> None:
        """Move to a slice, and cut the probability anew."""
        for view in self.views:
            view.scene.crosshair_pos = [*self._in_plane, (z + 0.5) / len(self.case.region)]
            _, heat, cut, _ = view.volumes
            heat.opacity = opacity
            cut.cal_min, cut.cal_max = 255 * threshold, 255 * threshold + 0.1


def why_no_itkwidgets() -> str:
    """Why itkwidgets cannot be used here, in one line; empty if it can."""
    if not in_lab():
        return "itkwidgets works in JupyterLab only; here importing it would lose the outputs of later cells"
    if importlib.util.find_spec("itkwidgets") is None:
        return 'itkwidgets is not installed: pip install -c constraints.txt -e ".[itkwidgets]"'
    for file in ITK_FILES:
        try:
            urllib.request.urlopen(file, timeout=4.0).close()
        except (OSError, HTTPException) as error:
            return f"itkwidgets loads its viewer from the internet, and {file} does not answer ({error})"
    return ""


def show_itkwidgets(case: CasePredictions) -> None:
    """Show a case with itkwidgets below the cell; where that cannot work, one line that says why."""
    if reason := why_no_itkwidgets():
        print(f"{reason}; the default viewer or its picture stands instead")
        return
    from itkwidgets import view
    from ngff_zarr import to_ngff_image

    scale = dict(zip("zyx", case.spacing_mm, strict=True))
    volumes = case.region, case.truth.astype(np.uint8)
    image, label = (to_ngff_image(volume, dims=["z", "y", "x"], scale=scale) for volume in volumes)
    print("itkwidgets starts where it can be seen: scroll to it. The cells below wait until it has drawn.")
    # the slice that is chosen: in the rendered volume a label is seen only where the region is opaque, in bones
    plane = {"view_mode": "ZPlane", "z_slice": case.slice.value * case.spacing_mm[0]}
    view(image, label_image=label, label_blend=0.75, cmap="Grayscale", **plane)
