"""The small trained pair in data/demo, out of a finished study: `make demo-pair`.

    python -m mupkg.report.ship STUDY TARGET [--cases 2]

Kept of each run: both stages' weights, the history, the metrics, the record and the film, with a model card of them;
of stage 1 the regions of the film's case and of a few test cases. Nothing is changed on the way, but regions.csv
loses the other cases' rows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from mupkg.report import results
from mupkg.scans.writing import whole_file, write_text
from mupkg.stages.cards import card
from mupkg.stages.film import read_film
from mupkg.stages.inference import LOCALIZER
from mupkg.stages.regions import Regions
from mupkg.stages.runs import BEST, CARD, FILM, HISTORY, METRICS, RUN

KEPT = (BEST, LOCALIZER, HISTORY, METRICS, RUN)


def ship(study: str | Path, target: str | Path, cases: int = 2) -> None:
    """Copy what notebook 08 needs of a study to a folder of its own; what was there before is replaced.

    Raises:
        ValueError: before anything is touched, if the target holds the study, or a run lacks a file or its film.
    """
    study, target = Path(study), Path(target)
    if study.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target}: holds the study itself, and would be replaced; choose another target")
    runs, regions = results.finished_runs(study), Regions.read(study / "stage1")
    for folder in runs["folder"]:
        for name in (*KEPT, FILM):
            if not (folder / name).exists():
                raise ValueError(f"{folder / name}: is missing; train the run to its end, with film set to True")
    chosen = [*regions.ids("test")[:cases], *sorted({read_film(folder).case_id for folder in runs["folder"]})]
    making = target.with_name(f".{target.name}.making")
    if making.exists():
        shutil.rmtree(making)
    for folder in runs["folder"]:
        shutil.copytree(folder / FILM, making / folder.name / FILM)
        for name in KEPT:
            shutil.copy2(folder / name, making / folder.name / name)
        write_text(making / folder.name / CARD, card(folder))
    (making / "stage1" / "regions").mkdir(parents=True)
    for case_id in chosen:
        for path in (study / "stage1" / "regions").glob(f"{case_id}_*.npy"):
            shutil.copy2(path, making / "stage1" / "regions")
    shutil.copy2(study / "stage1" / "run.json", making / "stage1")
    with whole_file(making / "stage1" / "regions.csv") as temporary:
        regions.table.loc[chosen].to_csv(temporary, index=False)
    if target.exists():
        shutil.rmtree(target)
    making.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=ship.__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--cases", type=int, default=2)
    arguments = parser.parse_args()
    try:
        ship(arguments.study, arguments.target, arguments.cases)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
