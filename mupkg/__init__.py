"""MetricUNet: two-stage prostate segmentation in CT with online voxel-wise metric learning."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.auto import tqdm as notebook_tqdm

__version__ = "0.1.0"


def repository() -> Path:
    """The repository's root, wherever the kernel was started: relative paths resolve from here."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks").is_dir() and (folder / "mupkg").is_dir():
            return folder
    return Path(__file__).resolve().parents[1]


def in_lab() -> bool:
    """Whether somebody can move a slider: true in JupyterLab and Notebook, false under papermill."""
    return bool(os.environ.get("JPY_SESSION_NAME"))


def progress(items: Iterable, **options: Any) -> tqdm:
    """A progress bar with the time left: a widget in JupyterLab, a few plain lines in a batch run."""
    if in_lab():
        return notebook_tqdm(items, **options)
    return tqdm(items, file=sys.stdout, mininterval=10, ascii=True, ncols=100, **options)


def lazily(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that imports a name from its module when it is first used.

    So training on a bare GPU machine needs none of the libraries that read scans.
    """
    home = {name: module for module, offered in names.items() for name in offered}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return __getattr__
