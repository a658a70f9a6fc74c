"""How what a notebook is told is read and checked: a message for every fault, before any work is done.

A notebook's `parameters` cell holds literals; its next cell turns them into one of the objects of `mupkg.parameters`
with `from_notebook`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mupkg.scans.cases import MOST_LETTERS

NAME_SIMILARITY = 0.75  # from this similarity on (difflib's), a name is taken for a misspelt parameter
LONGEST_SHOWN = 100  # characters of a wrong value
ANNOTATED = re.compile(r"^([^\W\d]\w*)[ \t]*:[^=\n]+=", re.MULTILINE)  # in a cell
INJECTED = re.compile(r"^([^\W\d]\w*) = ", re.MULTILINE)  # in the cell that papermill writes


def check_path(value: str, *, most: int = 255) -> str:
    """Something that can be a path at all, each of its names of at most so many bytes."""
    if not value.strip() or not value.isprintable():
        raise ValueError(f"must be a path, not {value!r}")
    for name in Path(value).parts:
        if len(name.encode()) > most:
            raise ValueError(f"a name of {len(name)} characters is too long for a file; at most {most} bytes fit")
    return value


def check_name(value: str) -> str:
    """A folder's own name, not a path: so no study or cohort can leave its place."""
    if not value.isprintable() or not value or value in (".", "..") or Path(value).name != value or "\\" in value:
        raise ValueError(f"must be a plain folder name, not {value!r}")
    return check_path(value, most=MOST_LETTERS)


FolderName = Annotated[str, AfterValidator(check_name)]
AnyPath = Annotated[  # ~ is the user's home folder
    str,
    BeforeValidator(lambda path: str(path) if isinstance(path, Path) else path),
    AfterValidator(check_path),
    AfterValidator(os.path.expanduser),
]


class Settings(BaseModel):
    """Base of all notebook parameters: nothing unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_other_type(cls, value: Any, info: ValidationInfo) -> Any:
        """True would pass for 1, and a list that papermill's -p has made a text of for a name."""
        takes_several = "tuple[" in str(cls.model_fields[info.field_name].annotation)
        if takes_several and isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            raise ValueError(
                f"must not be a text in brackets; papermill takes a list by -y '{info.field_name}: {value}'"
            )
        values = value if isinstance(value, list | tuple) else (value,)
        if cls.model_fields[info.field_name].annotation is not bool and any(isinstance(v, bool) for v in values):
            raise ValueError("must not be True or False: it is no switch")
        return value

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], inputs: Sequence[str]) -> Self:
        """The validated parameters of a running notebook: `from_notebook(globals(), In)`.

        Every parameter that is a name of the notebook counts, with the value it holds now, however it was set. A name
        that was meant as a parameter but is none is refused (see `_meant_as_parameters`); papermill only warns of it.

        Raises:
            ValueError: naming every parameter that is wrong or unknown, and what is allowed.
        """
        names = {*cls.model_fields, *_meant_as_parameters(namespace, inputs)}
        given = {name: namespace[name] for name in names if name in namespace}
        return cls.checked(given, hint=" (a name of your own may begin with _; mended it? restart the kernel)")

    @classmethod
    def checked(cls, values: Mapping[str, Any], *, without: Container[str] = (), hint: str = "") -> Self:
        """The validated values.

        Args:
            without: known names that are not to be given here. hint: said of an unknown name.

        Raises:
            ValueError: naming every one that is wrong or unknown, and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            names = [name for name in cls.model_fields if name not in without]
            raise ValueError("\n".join(_explained(fault, names, hint) for fault in error.errors())) from None


def _meant_as_parameters(namespace: Mapping[str, Any], inputs: Sequence[str]) -> set[str]:
    """Names with an annotation, but for those that begin with _, and all names that papermill's cell sets.

    Cells are also read line by line: of a kernel's annotations Python 3.14 keeps those of the last statement only.
    """
    annotated = {*namespace.get("__annotations__", ()), *ANNOTATED.findall("\n".join(inputs))}
    injected = [name for cell in inputs if cell.startswith("# Parameters") for name in INJECTED.findall(cell)]
    return {name for name in annotated if not name.startswith("_")} | {*injected}


def _explained(fault: Mapping[str, Any], names: Sequence[str], hint: str) -> str:
    """One of pydantic's faults in our words."""
    name, value = ".".join(str(part) for part in fault["loc"]), fault["input"]
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(name, names, 3, NAME_SIMILARITY)
        ask = f". Did you mean {' or '.join(near)}?" if near else ""
        return f"unknown parameter {name!r}; there are: {', '.join(names)}{ask}{hint}"
    message, shown = fault["msg"], repr(value)
    if len(shown) > LONGEST_SHOWN:  # a whole cohort, say, which a later cell has put in the name's place
        again = "" if isinstance(value, str) else "; run the cell that sets it again"
        shown = f"{shown[:LONGEST_SHOWN]}...{again}"
    if fault["type"] == "string_type" and isinstance(value, int | float):
        message += f"; papermill's -r {fault['loc'][0]} takes a number for text, and so do quotes in -y and in files"
    elif fault["type"] == "tuple_type" and isinstance(value, str):
        message += f"; papermill takes a list by -y '{name}: [{value}]'"
    return f"parameter {name}: {message} (given: {shown})" if name else f"parameter combination: {message}"
