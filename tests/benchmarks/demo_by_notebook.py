"""Where a study's time goes, from its executed notebooks alone; nothing is run.

    python tests/benchmarks/demo_by_notebook.py outputs/quick [OTHER_STUDY ...]

Papermill leaves every notebook's and cell's duration in the executed notebook. What a notebook takes beyond its cells
is its kernel's start and end. With several studies, seconds and the ratio to the first stand side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

COSTLIEST = 5


def cell_seconds(notebook: Path) -> tuple[dict, list[tuple[float, str]]]:
    """Papermill's record of an executed notebook (empty if it never was), and each cell's seconds and first line."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = []
    for cell in content["cells"]:
        took = cell["metadata"].get("papermill", {}).get("duration")
        if took:
            cells.append((float(took), next(iter("".join(cell["source"]).splitlines()), "")))
    return content["metadata"].get("papermill", {}), cells


def breakdown(study: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a notebook (seconds, of them outside its cells), and a row for each of the costliest cells.

    The cohort's notebook 00 is found by the parameters of the study's own.

    Raises:
        ValueError: if the folder holds no executed notebook.
    """
    study = Path(study)
    paths = {path: path.relative_to(study).as_posix() for path in sorted(study.rglob("*.ipynb"))}
    for path in list(paths):
        told = cell_seconds(path)[0].get("parameters", {})
        cohort = study.parent.parent / told.get("data_folder", "data") / told.get("cohort", "")
        if "cohort" in told and (prepared := cohort / "00_prepare_cohort.ipynb").is_file():
            paths[prepared] = prepared.name
    notebooks, cells = [], []
    for path, name in paths.items():
        record, timed = cell_seconds(path)
        if record.get("duration"):
            inside = sum(took for took, _ in timed)
            notebooks.append({"notebook": name, "seconds": record["duration"], "kernel": record["duration"] - inside})
            cells += [{"notebook": name, "seconds": took, "cell": line} for took, line in timed]
    if not notebooks:
        raise ValueError(f"{study}: holds no executed notebook; run `make study STUDY={study.name}` first")
    costliest = pd.DataFrame(cells, columns=["notebook", "seconds", "cell"]).nlargest(COSTLIEST, "seconds")
    return pd.DataFrame(notebooks).sort_values("seconds", ascending=False, ignore_index=True), costliest


def side_by_side(studies: Sequence[str | Path]) -> pd.DataFrame:
    """Seconds a notebook takes in each study, and each later study's ratio to the first."""
    seconds = {str(study): breakdown(study)[0].set_index("notebook")["seconds"] for study in studies}
    table = pd.DataFrame(seconds)
    table.loc["all"] = table.sum()
    for name in list(table)[1:]:
        table[f"{name} / {next(iter(seconds))}"] = table[name] / table[next(iter(seconds))]
    return table


def main() -> None:
    studies = sys.argv[1:] or ["outputs/quick"]
    try:
        for study in studies:
            notebooks, costliest = breakdown(study)
            print(f"{study}: {notebooks['seconds'].sum():.0f} s in {len(notebooks)} notebooks, some side by side\n")
            print(notebooks.round(1).to_string(index=False), f"\n\nThe {COSTLIEST} costliest cells")
            print(costliest.round(1).to_string(index=False), "\n")
        if len(studies) > 1:
            print(side_by_side(studies).round(2).to_string())
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
