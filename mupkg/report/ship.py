"""The small trained pair in data/demo, out of a finished study: `make demo-pair`.

    python -m mupkg.report.ship STUDY TARGET [--cases 2]

Kept of each run: both stages' weights, the history, the metrics, the record and the film; of stage 1 the regions of
the film's case and of a few test cases. Nothing is changed on the way, but regions.csv loses the other cases' rows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from mupkg.data.files import whole_file
from mupkg.report import results
from mupkg.report.watch import read_films
from mupkg.stages.inference import LOCALIZER
from mupkg.stages.localization import Regions
from mupkg.stages.training import BEST, HISTORY

KEPT = (BEST, LOCALIZER, HISTORY, "metrics.csv", "run.json")


def ship(study: str | Path, target: str | Path, cases: int = 2) -> None:
    """Copy what notebook 08 needs of a study to a folder of its own; what was there before is replaced.

    Raises:
        ValueError: if a run has no film, or the study is not finished.
    """
    study, target = Path(study), Path(target)
    runs, regions = results.runs(study), Regions.read(study / "stage1")
    films = read_films(study)
    if missing := set(runs["configuration"]) - set(films):
        raise ValueError(f"{study}: no film of {', '.join(sorted(missing))}; train with film set to True")
    shutil.rmtree(target, ignore_errors=True)
    for run in runs.itertuples():
        place = target / run.folder.name
        shutil.copytree(run.folder / "film", place / "film")
        for name in KEPT:
            shutil.copy2(run.folder / name, place / name)
    filmed = {film.frames.case_id for film in films.values()}
    chosen = [*regions.ids("test")[:cases], *sorted(filmed)]
    (target / "stage1" / "regions").mkdir(parents=True)
    for case_id in chosen:
        for path in (study / "stage1" / "regions").glob(f"{case_id}_*.npy"):
            shutil.copy2(path, target / "stage1" / "regions")
    shutil.copy2(study / "stage1" / "run.json", target / "stage1")
    with whole_file(target / "stage1" / "regions.csv") as temporary:
        regions.table.loc[chosen].to_csv(temporary, index=False)


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
