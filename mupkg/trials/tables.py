"""A trial's runs, as its protocol names them, and what their trainings and differences look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mupkg.data.cohort import Cohort
from mupkg.metrics import with_unit
from mupkg.parameters import Stage2Settings
from mupkg.report import results
from mupkg.report.figures import BLUE
from mupkg.stages.regions import Regions
from mupkg.stages.runs import HISTORY, METRICS, RUN, Shift, metrics_name, read_run
from mupkg.trials.statistics import differences


def trial_runs(study: str | Path, runs: dict[str, dict]) -> pd.DataFrame:
    """The finished runs of a trial: `configuration` (the arm), `seed`, `replicate`, `stage1` and `folder`.

    Args:
        study: outputs/<study>. runs: by folder what they were told, `Study.runs`.

    Raises:
        ValueError: naming every run of the protocol that is not there, or was told something else.
    """
    study = Path(study)
    missing = [name for name in runs if not (study / name / METRICS).is_file()]
    if missing:
        raise ValueError(
            f"{study}: {len(missing)} of the protocol's {len(runs)} runs are missing: {', '.join(missing)}; "
            "start the batch again, it trains only these"
        )
    odd = {name: fault for name, told in runs.items() if (fault := _told_otherwise(study / name, told))}
    if odd:
        raise ValueError(
            f"{study}: runs were not trained as the protocol says: "
            f"{'; '.join(f'{name}: {fault}' for name, fault in odd.items())}; remove these runs and start the batch "
            "again, or give the changed arm a name of its own"
        )
    rows = []
    for name, told in runs.items():
        rows.append({"configuration": told["arm"], "seed": told["seed"], "replicate": told["replicate"]})
        rows[-1] |= {"stage1": study / told.get("stage1", "stage1"), "folder": study / name}
    return pd.DataFrame(rows)


def _told_otherwise(run: Path, told: Mapping[str, Any]) -> str:
    """How a run's record differs from the protocol; empty if it does not."""
    made = read_run(run / RUN)["parameters"]
    asked = Stage2Settings.checked(told).model_dump(mode="json", include={*told})
    return ", ".join(
        f"{name} is {made.get(name)!r}, not {value!r}" for name, value in asked.items() if made.get(name) != value
    )


def trial_metrics(
    table: pd.DataFrame,
    cohort: Cohort | None,
    may_differ: Iterable[str],
    shift: Shift | None = None,
    folds: int | None = None,
) -> pd.DataFrame:
    """metrics.csv of these runs in one table, `seed` being the replicate: what `statistics.contrasts` takes.

    Args:
        cohort: as it is now; every run must have been trained and tested on the regions that its stage 1 cut from it.
        may_differ: the parameters in which the arms differ on purpose, `Trial.told_by_arms`.
        shift: on shifted test scans instead. Else `validation_area` is there as well, the mean validation DSC over
            the whole training: a run's own, so the same for all its cases.
        folds: of a repeated k-fold. `seed` is then the repeat, and there is a column `fold`.

    Raises:
        ValueError: as `results.case_metrics`, and if a run's history is missing or broken.
    """
    if len(set(table["stage1"])) > 1:  # else case_metrics looks at all of them
        results.check_settings({run.name: read_run(run / RUN)["parameters"] for run in table["folder"]}, may_differ)
    parts = []
    for stage1, rows in table.groupby("stage1", sort=False):  # one, or in a k-fold one a fold
        regions = Regions.read(stage1, cohort) if cohort is not None else None
        parts.append(results.case_metrics(rows, regions, may_differ, shift))
    metrics = pd.concat(parts, ignore_index=True)
    runs = table.set_index(["configuration", "seed"])
    keys, replicate = pd.MultiIndex.from_frame(metrics[["configuration", "seed"]]), runs["replicate"]
    if shift is None:
        metrics["validation_area"] = runs["folder"].map(_validation_area).loc[keys].to_numpy()
    metrics["seed"] = replicate.loc[keys].to_numpy()
    if folds is not None:
        metrics["seed"], metrics["fold"] = divmod(metrics["seed"], folds)
    return metrics


def _validation_area(run: Path) -> float:
    """The area under a training's validation curve, as a share of a curve that is 1 from the first step on."""
    curve = _history(run).dropna(subset="validation_dsc")
    steps, dsc = ([0, *curve[name]] for name in ("step", "validation_dsc"))
    return float(np.trapezoid(dsc, steps) / steps[-1])


def _history(run: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(run / HISTORY, usecols=["step", "learning_rate", "cross_entropy", "validation_dsc"])
    except (OSError, ValueError) as error:
        raise ValueError(f"{run / HISTORY}: cannot be read ({error}); train this run again") from error


def shifts_tested(table: pd.DataFrame) -> list[Shift]:
    """The shifts that every run of the table was tested on."""
    return [s for s in get_args(Shift) if all((folder / metrics_name(s)).is_file() for folder in table["folder"])]


def histories(table: pd.DataFrame) -> pd.DataFrame:
    """history.csv of all runs: configuration, replicate, step, summed_rate, validation_dsc, cross_entropy.

    `replicate` is the seed where runs are of no trial. `summed_rate` is the sum of the learning rates of all steps so
    far: how far a training can have gone.
    """
    parts = []
    for row in table.itertuples():
        found = _history(row.folder)
        summed = (found["learning_rate"] * found["step"].diff().fillna(found["step"])).cumsum()
        replicate = getattr(row, "replicate", row.seed)
        parts.append(found.assign(configuration=row.configuration, replicate=replicate, summed_rate=summed))
    wanted = ["configuration", "replicate", "step", "summed_rate", "validation_dsc", "cross_entropy"]
    return pd.concat(parts, ignore_index=True)[wanted]


def boxes(metrics: pd.DataFrame, parameters: Mapping[str, Mapping[Any, str]], names: Sequence[str]) -> Figure:
    """Fig. 6: one row a metric, one column a parameter, one box a value, over the cases' means over replicates.

    Dots are the replicates' means over the cases: what one seed would have reported. Values that are not finite are
    left out of a mean.

    Args:
        parameters: `Trial.parameters`.
    """
    size = (4.2 * len(parameters), 3.4 * len(names))
    figure, axes = plt.subplots(len(names), len(parameters), figsize=size, squeeze=False, layout="constrained")
    for line, metric in zip(axes, names, strict=True):
        finite = metrics.assign(**{metric: metrics[metric].where(np.isfinite(metrics[metric]))})
        of_case, of_replicate = (finite.groupby(["configuration", k])[metric].mean() for k in ("case_id", "seed"))
        for ax, (parameter, arms) in zip(line, parameters.items(), strict=True):
            values = [of_case[arm].dropna().to_numpy() for arm in arms.values()]
            ax.boxplot(values, tick_labels=[f"{value:g}" for value in arms], flierprops={"markersize": 3})
            for place, arm in enumerate(arms.values(), 1):
                dots = of_replicate[arm]
                ax.plot(np.full(len(dots), place), dots, "o", color=BLUE, alpha=0.6, label="one replicate")
            ax.set(xlabel=parameter.replace("_", " "), title=f"{len(values[0])} cases, {len(dots)} replicates")
        line[0].set_ylabel(with_unit(metric))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(handles[:1], labels[:1], fontsize=8)
    return figure


def replicate_means(metrics: pd.DataFrame, pairs: list[tuple[str, str]], metric: str, margin: float) -> Figure:
    """Each contrast's mean difference in every replicate: what a study with one seed would have reported."""
    figure, ax = plt.subplots(figsize=(7.5, 0.9 + 0.8 * len(pairs)))
    ax.axvspan(-margin, margin, color="0.92", label=f"equivalent: within ± {margin:g}")
    ax.axvline(0, color="0.4", linewidth=1)
    for line, (arm, against) in enumerate(pairs):
        means = differences(metrics, arm, against, metric).mean()
        ax.plot(means, np.full(len(means), line), "o", color=BLUE, alpha=0.45, label="one replicate")
        ax.plot(means.mean(), line, "D", color="black", label="mean")
    ax.set(yticks=range(len(pairs)), yticklabels=[f"{arm} − {against}" for arm, against in pairs])
    ax.set(xlabel=f"difference of the mean {metric} over cases", ylim=(len(pairs) - 0.5, -0.5))
    handles, labels = ax.get_legend_handles_labels()
    seen = dict(zip(labels, handles, strict=True))
    ax.legend(seen.values(), seen.keys(), fontsize=8)
    return figure
