"""MetricUNet: two-stage prostate segmentation in CT with online voxel-wise metric learning."""

from pathlib import Path

__version__ = "0.1.0"


def repository() -> Path:
    """The repository's root, wherever the kernel was started: relative paths resolve from here."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks").is_dir() and (folder / "mupkg").is_dir():
            return folder
    return Path(__file__).resolve().parents[1]
