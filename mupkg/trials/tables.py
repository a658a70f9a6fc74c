"""A trial's runs, as its protocol names them, and what their trainings and differences look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from mupkg.data.cohort import Cohort, read_cases
from mupkg.metrics import metric_of
from mupkg.parameters import Stage1Settings
from mupkg.report import results
from mupkg.stages.regions import Regions
from mupkg.stages.runs import HISTORY, METRICS_CSV, RUN, STAGE1, Shift, metrics_name
from mupkg.trials import statistics
from mupkg.trials.kept import parameter_fault
from mupkg.trials.protocol import Study, Trial
from mupkg.trials.statistics import Estimate, differences


def trial_runs(
    study: str | Path,
    planned: Mapping[str, Mapping[str, Any]],
    stages: Mapping[str, Mapping[str, Any]],
    kept: Path | None = None,
) -> pd.DataFrame:
    """The finished runs of a trial: `configuration` (the arm), `seed`, `replicate`, `stage1`, `folder` and `kept`.

    Args:
        study: outputs/<study>.
        planned, stages: by folder what runs and first stages were told, `Study.run_parameters` and `Study.stages`.
        kept: where runs are kept as small tables, for those that are not in the study's folder.

    Raises:
        ValueError: naming every run of the protocol that is not there, or was told something else.
    """
    study, faults, rows = Path(study), {}, []
    for name, own in planned.items():
        places = [place / name for place in (study, kept) if place and (place / name / METRICS_CSV).is_file()]
        folder = next(iter(places), study / name)
        faults[name] = parameter_fault(folder, own) if places else "is missing"
        rows.append({"configuration": own["arm"], "seed": own["seed"], "replicate": own["replicate"]})
        rows[-1] |= {"stage1": study / own.get("stage1", STAGE1), "folder": folder, "kept": folder.parent != study}
    for stage1 in dict.fromkeys(row["folder"].parent / name for row in rows for name in stages):
        if (stage1 / RUN).is_file():
            faults[str(stage1)] = parameter_fault(stage1, stages[stage1.name], Stage1Settings)
    if wrong := [f"{name}: {fault}" for name, fault in faults.items() if fault]:
        raise ValueError(
            f"{study}: the protocol plans {len(planned)} runs, but {'; '.join(wrong)}; remove what was told "
            "something else, or give a changed arm a name of its own, and start the batch again: it trains what is "
            "missing"
        )
    return pd.DataFrame(rows)


def trial_metrics(
    table: pd.DataFrame,
    cohort: Cohort | None,
    shift: Shift | None = None,
    folds: int | None = None,
) -> pd.DataFrame:
    """metrics.csv of these runs in one table, `seed` being the replicate: what `statistics.contrasts` takes.

    Args:
        cohort: as it is now; every run must have been trained and tested on the regions that its stage 1 cut from it.
        shift: on shifted test scans instead. Else `validation_area` is there as well, the mean validation DSC over
            the whole training, and `active_share`, the mean share of the samplers' tuples that were active in its
            last tenth (NaN without samplers): a run's own, so the same for all its cases.
        folds: of a repeated k-fold. `seed` is then the repeat, and there is a column `fold`.

    Raises:
        ValueError: as `results.tested_metrics`, and if a run's history is missing or broken.
    """
    parts = []
    for stage1, rows in table.groupby("stage1", sort=False):  # one, or in a k-fold one a fold
        regions = Regions.read(stage1, cohort) if cohort is not None else None
        parts.append(results.tested_metrics(rows, regions, shift))
    metrics = pd.concat(parts, ignore_index=True)
    of_run = table[["configuration", "seed", "replicate"]]
    if shift is None:
        of_run = of_run.assign(validation_area=table["folder"].map(_validation_area))
        of_run = of_run.assign(active_share=table["folder"].map(_active_share))
    metrics = metrics.merge(of_run, "left", on=["configuration", "seed"])
    metrics["seed"] = metrics.pop("replicate")
    if folds is not None:
        metrics["seed"], metrics["fold"] = divmod(metrics["seed"], folds)
    return metrics


def _validation_area(run: Path) -> float:
    """The area under a training's validation curve, as a share of a curve that is 1 from the first step on."""
    curve = _history(run).dropna(subset="validation_dsc")
    steps, dsc = ([0, *curve[name]] for name in ("step", "validation_dsc"))
    return float(np.trapezoid(dsc, steps) / steps[-1])


def _active_share(run: Path) -> float:
    """The mean over the samplers and the last tenth of the steps; NaN where no share was recorded."""
    curve = _history(run)
    late = curve.loc[curve["step"] > 0.9 * curve["step"].max()]
    return float(late.filter(like="active_").mean().mean())


def _history(run: Path) -> pd.DataFrame:
    cure = "train this run again"
    table = read_cases(run / HISTORY, cure)
    if missing := {"step", "learning_rate", "cross_entropy", "validation_dsc"} - {*table}:
        raise ValueError(f"{run / HISTORY}: lacks {', '.join(sorted(missing))}; {cure}")
    return table


def shifts_tested(table: pd.DataFrame) -> list[Shift]:
    """The shifts that every run of the table was tested on."""
    return [s for s in get_args(Shift) if all((folder / metrics_name(s)).is_file() for folder in table["folder"])]


def histories(table: pd.DataFrame) -> pd.DataFrame:
    """history.csv of all runs: configuration, replicate, step, summed_rate, validation_dsc, cross_entropy.

    `replicate` is the seed where runs are of no trial. `summed_rate` is the sum of the learning rates of all steps so
    far, each row's rate taken for the steps since the row before: how far a training can have gone.
    """
    parts = []
    for row in table.itertuples():
        history = _history(row.folder)
        summed = (history["learning_rate"] * history["step"].diff().fillna(history["step"])).cumsum()
        replicate = getattr(row, "replicate", row.seed)
        parts.append(history.assign(configuration=row.configuration, replicate=replicate, summed_rate=summed))
    wanted = ["configuration", "replicate", "step", "summed_rate", "validation_dsc", "cross_entropy"]
    return pd.concat(parts, ignore_index=True)[wanted]


# What a trial's tables say: notebook 10, and the pages made of outputs/reference

MEASURED_BEFORE = Estimate(0.0, case=0.003**2, replicate=0.014**2, rest=0.023**2)  # E1: HCP - UNet, quick phantoms
FOLD_SD = 0.0165  # of the mean difference of four patients in a fold; a pilot with eight had .0134
OUTCOMES = ("DSC", "DSC_all", "SEN", "PPV", "ASD", "HD95", "HD95_all", "surface_DSC_2mm", "Brier", "ECE")
OUTCOMES += ("validation_area", "log_sd")


def with_spread(metrics: pd.DataFrame) -> pd.DataFrame:
    """The table with `log_sd`, the logarithm of a run's sd of DSC over its test cases, the same for all of them.

    Its difference between two arms is the log ratio of their spreads: is one more even over patients?
    """
    runs = metrics.groupby(["configuration", *results.trainings(metrics)])["DSC"]
    with np.errstate(divide="ignore"):  # all cases alike: minus infinity, counted as failed
        return metrics.assign(log_sd=np.log(runs.transform("std")))


def outcomes(trial: Trial, metrics: pd.DataFrame) -> list[str]:
    """What every run of the trial has measured, the primary outcome first."""
    complete = metrics.groupby(["configuration", *results.trainings(metrics)]).count().gt(0).all()
    return [trial.primary, *(n for n in OUTCOMES if n != trial.primary and complete.get(n, False))]


def answers(trial: Trial, metrics: pd.DataFrame, names: Sequence[str], *, shifted: bool = False) -> pd.DataFrame:
    """The protocol's contrasts on these outcomes: `statistics.contrasts`.

    Args:
        shifted: on harder scans, of which no protocol names a contrast.
    """
    margins = dict.fromkeys((trial.primary, f"{trial.primary}_all"), trial.margin)
    options = {"margins": margins, "means": trial.means, "descriptive": trial.descriptive}
    return statistics.contrasts(metrics, trial.pairs, names, primary=None if shifted else trial.primary, **options)


def arm_means(metrics: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A row an arm: mean and std over replicates of the mean over cases, and how many replicates."""
    training = ["configuration", *results.trainings(metrics)]
    means = metrics.groupby(training, sort=False)[list(names)].mean()
    with np.errstate(invalid="ignore"):  # inf - inf
        table = means.groupby("configuration", sort=False).agg(["mean", "std"])
    table[("", "replicates")] = means.groupby("configuration", sort=False).size()
    return table


def arms(trial: Trial, metrics: pd.DataFrame) -> pd.DataFrame:
    """The arms' means of what is looked at first: the primary outcome, distances, and what still taught."""
    names = [trial.primary, f"{trial.primary}_all", "ASD", "HD95", "active_share"]
    return arm_means(metrics, [name for name in names if name in metrics])


def single_seeds(trial: Trial, metrics: pd.DataFrame) -> pd.DataFrame:
    """What a study with one seed would have reported of each contrast, by the paper's test over cases."""
    judged, rows = statistics.with_means(metrics, trial.means), []
    for arm, against in trial.pairs:
        difference = differences(judged, arm, against, trial.primary)
        p, means = statistics.papers_t_test(difference), difference.mean()
        gain = metric_of(trial.primary).better * means
        rows.append({"contrast": f"{arm} - {against}", "replicates": len(p)})
        rows[-1] |= {"says better": ((p < 0.05) & (gain > 0)).sum(), "says worse": ((p < 0.05) & (gain < 0)).sum()}
        rows[-1] |= {"lowest": means.min(), "highest": means.max(), "sd over replicates": means.std()}
    return pd.DataFrame(rows)


def rankings(trial: Trial, table: pd.DataFrame) -> pd.DataFrame:
    """The chance that each ranking is false; of DSC beside the paper's, where its Table III holds both rows.

    Args:
        table: `answers`.
    """
    columns = ["configuration", "against", "mean_difference", "ranking false"]
    table = table.assign(**{"ranking false": statistics.deciding_p(table) / 2})
    ours = table.loc[table["metric"] == trial.primary, columns]
    table3, paper = results.published(3).set_index("configuration", drop=False), []
    in_the_paper = trial.as_in_the_paper if trial.primary == "DSC" else {}
    for arm, against in zip(ours["configuration"], ours["against"], strict=True):
        both = [in_the_paper.get(against), in_the_paper.get(arm)]
        rows = table3.reindex(both if both[0] != both[1] else [None, None])
        paper.append(statistics.published_rankings(rows, replicate_sds=(0, 0.01)).iloc[:, 1:])
    paper = pd.concat(paper).drop(columns="against").rename(columns={"difference": "paper: difference"})
    chances = {c: f"paper: {c}" for c in paper if c.startswith("r = ")}
    ours = ours.join(paper.rename(columns=chances).set_index(ours.index))
    sure, alike = ours["ranking false"] < 0.025, ours["mean_difference"] * ours["paper: difference"] > 0
    none, tie = ours["paper: difference"].isna(), ours["paper: difference"] == 0
    words = ["", "a tie", "supported", "contradicted"]
    ours["the paper's ranking"] = np.select([none, tie, sure & alike, sure], words, "cannot be told")
    return ours


def power(trial: Trial, metrics: pd.DataFrame, replicates: Sequence[int] = (5, 10, 20, 30, 100)) -> pd.DataFrame:
    """The smallest difference that a trial finds four times in five, by number of replicates and of cases."""
    judged, rows = statistics.with_means(metrics, trial.means), {}
    for arm, against in trial.pairs:
        table = differences(judged, arm, against, trial.primary).to_numpy()
        measured = statistics.random_effects(table)
        for cases in (len(table), 100 * len(table)):
            smallest = [statistics.smallest_effect(measured, cases, r) for r in replicates]
            rows[f"{arm} - {against}, {cases} cases"] = smallest
    return pd.DataFrame.from_dict(rows, orient="index", columns=[f"R = {r}" for r in replicates])


def promised(study: Study, cases: int = 100) -> pd.DataFrame:
    """What the protocol can promise before it is run: a row a contrast, `statistics.promised` and what follows.

    The components are E1's where training sets are drawn anew, and `FOLD_SD` in folds. Of other outcomes than DSC
    nothing is known before.
    """
    trial, rows = study.trial, []
    if trial.primary != "DSC":
        return pd.DataFrame(columns=["a verdict"], index=pd.Index([], name="contrast"))
    for arm, against in trial.pairs:
        if study.folds:
            variance = (1 / trial.replicates + 1 / (study.folds - 1)) * FOLD_SD**2  # as `statistics.nadeau_bengio`
            estimate = Estimate(0.0, variance, trial.replicates - 1)
        else:
            sides = (len(trial.means.get(side, [side])) for side in (arm, against))
            estimate = statistics.balanced(MEASURED_BEFORE, cases, trial.replicates, *sides)
        row = statistics.promised(estimate, trial.margin)
        reach = row["equivalent"] > 0.2 or row["power_at_0.02"] > 0.8
        verdict = "not judged" if trial.descriptive else "can be reached" if reach else "CANNOT BE REACHED"
        rows.append({"contrast": f"{arm} - {against}", **row, "a verdict": verdict})
    return pd.DataFrame(rows).set_index("contrast")
