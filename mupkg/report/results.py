"""A study's numbers: runs gathered, summarised, compared; the paper's figures beside them, never mixed in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mupkg.configurations import TABLE_II
from mupkg.data.cohort import read_cases
from mupkg.metrics import METRICS, headline, with_unit
from mupkg.models import BACKBONES
from mupkg.parameters import Stage2Settings, Tag, tagged
from mupkg.scans.writing import save_table as save_table
from mupkg.stages.regions import Regions
from mupkg.stages.runs import NNUNET_RUNS, REGIONS, RUN, Shift, metrics_name, parse_run_name, read_run

WITH = "with notebook 03 (a run of nnU-Net: 11)"


def finished_runs(
    study: str | Path, configurations: Sequence[str] | None = None, seed: int | None = None
) -> pd.DataFrame:
    """The finished runs of a study: configuration, seed, folder; in the order asked for, or Table II's.

    Runs of nnU-Net have no weights of ours, and are there only if `configurations` names them.

    Args:
        seed: of this seed alone; None: of all.

    Raises:
        ValueError: if there is none, or one that was asked for is missing.
    """
    rows = [(*parse_run_name(path.parent), path.parent) for path in sorted(Path(study).glob("*-seed*/metrics.csv"))]
    table = pd.DataFrame(rows, columns=["configuration", "seed", "folder"])
    ours = [*TABLE_II, *sorted({*table["configuration"]} - {*TABLE_II, *NNUNET_RUNS})]
    order = list(configurations or ours)
    table = table[table["configuration"].isin(order) & (True if seed is None else table["seed"] == seed)]
    missing = [name for name in configurations or () if name not in set(table["configuration"])]
    if table.empty or missing:
        of_seed, other = ("", "") if seed is None else (f" with seed {seed}", ", or choose another seed")
        what = ", ".join(missing) or "any configuration"
        raise ValueError(f"{study}: no finished run of {what}{of_seed}; train it {WITH}{other}")
    return table.sort_values(["configuration", "seed"], key=lambda c: c.map(order.index) if c.name != "seed" else c)


def case_metrics(table: pd.DataFrame, regions: Regions | None = None) -> pd.DataFrame:
    """metrics.csv of a study's runs in one table: `tested_metrics`; ValueError as there and as `check_settings`."""
    metrics = tested_metrics(table, regions)
    check_settings({run.name: read_run(run / RUN)["parameters"] for run in table["folder"]})
    return metrics


def tested_metrics(table: pd.DataFrame, regions: Regions | None = None, shift: Shift | None = None) -> pd.DataFrame:
    """metrics.csv of all these runs in one table: configuration, seed, case_id and the metrics.

    Args:
        regions: the study's as they are now: what every run must have been trained on, and whose test cases it must
            have been tested on, all of them; None: those that any run was tested on.

    Raises:
        ValueError: if runs differ in their test cases or regions, or a file is missing or broken or lists a case
            twice.
    """
    parts, again = {}, f"test the run again {WITH}"
    for run in table.itertuples():
        path = run.folder / metrics_name(shift)
        parts[path] = read_cases(path, again).assign(configuration=run.configuration, seed=run.seed)
        if "case_id" not in parts[path] or parts[path]["case_id"].duplicated().any():
            raise ValueError(f"{path}: must have a case_id for every row, each once; {again}")
    tested = {path: {*part["case_id"]} for path, part in parts.items()}
    wanted = {*regions.ids("test")} if regions is not None else set().union(*tested.values())
    for path, cases in tested.items():
        faults = {"lacks the test case(s)": wanted - cases, "was tested on others:": cases - wanted}
        if wrong := [f"{fault} {', '.join(sorted(ids))}" for fault, ids in faults.items() if ids]:
            raise ValueError(f"{path}: {' and '.join(wrong)}; {again}")
    trained_on = {read_run(folder / RUN, "data_fingerprint")["data_fingerprint"] for folder in table["folder"]}
    cure = "(data_fingerprint in run.json); after a new stage 1, train every run of the study again"
    if len(trained_on) > 1:
        raise ValueError(f"the runs were not trained on the same regions {cure}")
    if regions is not None and {regions.fingerprint()} != trained_on:
        place = regions.folder / REGIONS
        raise ValueError(f"{place}: its regions are not those that the runs were trained on {cure}")
    return pd.concat(parts.values(), ignore_index=True)


def check_settings(parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError if runs, by name, were not trained alike.

    Names, places and speed may differ; so may, where there are no samplers, the options of the metric loss.
    """
    values = {}  # of each run, as text: what may not differ
    for run, given in parameters.items():
        name_of = str(given.get("configuration", run))
        free = tagged(Stage2Settings, Tag.NAME, Tag.SPEED)
        free |= set() if name_of.startswith("Metric") else tagged(Stage2Settings, Tag.METRIC)
        in_3d = name_of in BACKBONES and BACKBONES[name_of].dimensions == 3
        free |= set() if in_3d else tagged(Stage2Settings, Tag.BLOCKS)
        values[run] = {name: json.dumps(value) for name, value in given.items() if name not in free}
    table = pd.DataFrame.from_dict(values, orient="index")
    differ = []
    for name in sorted(table):
        first = table[name].dropna().drop_duplicates()  # of each value the first run that has it
        if len(first) > 1:
            differ.append(f"{name} is " + ", ".join(f"{value} in {run}" for run, value in first.items()))
    if differ:
        raise ValueError(
            f"the runs were not trained with the same settings (parameters in run.json): {'; '.join(differ)}; "
            "train them alike, or put those trained otherwise into a study of their own"
        )


def per_case(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric as a table case x configuration, averaged over seeds; a NaN or inf of any seed stays one."""
    order = list(dict.fromkeys(metrics["configuration"]))
    mean_keeping_nan = lambda values: values.mean(skipna=False)  # noqa: E731
    return metrics.pivot_table(metric, "case_id", "configuration", aggfunc=mean_keeping_nan, dropna=False)[order]


def trainings(metrics: pd.DataFrame) -> list[str]:
    """The columns that tell an arm's trainings apart: the seed, and in a k-fold the fold."""
    return [column for column in ("seed", "fold") if column in metrics]


def mostly_empty_on_test(metrics: pd.DataFrame) -> pd.DataFrame:
    """The runs (configuration, seed, in a k-fold fold) with DSC 0 in more than half of the test cases.

    They find no prostate there, stay in every mean, and rule verdicts. Tables count them under `collapsed`.
    """
    share = metrics["DSC"].eq(0).groupby([metrics[name] for name in ("configuration", *trainings(metrics))]).mean()
    return share[share > 0.5].index.to_frame(index=False)


def summary(metrics: pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Mean, std, median over cases for each configuration, and how many cases that are: n, and `undefined` (NaN).

    `collapsed` counts the runs that find no prostate in most test cases. They stay in the mean.

    An infinite distance (one mask empty) makes its mean infinite, visibly. A NaN (PPV without prediction) cannot
    be averaged: it is left out and counted under `undefined`.

    Args:
        names: of the metrics; None: the headline's.
    """
    rows = {}
    for name in headline() if names is None else names:
        cases = per_case(metrics, name)
        with np.errstate(invalid="ignore"):  # inf - inf in a std is NaN, and shown as such
            rows[name] = cases.agg(["mean", "std", "median"]).T
        rows[name] = rows[name].assign(n=cases.notna().sum(), undefined=cases.isna().sum())
    table = pd.concat(rows, axis=1)
    table.insert(0, ("", "seeds"), metrics.groupby("configuration")["seed"].nunique().reindex(table.index))
    fallen = mostly_empty_on_test(metrics)["configuration"].value_counts()
    table.insert(1, ("", "collapsed"), fallen.reindex(table.index, fill_value=0))
    return table


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table to read: three digits, one number a cell, metrics with their units, and no column of empty cells."""
    table = table.dropna(axis="columns", how="all")
    for name in [name for name in table if str(name).endswith(("_zyx", "_zyx_mm"))]:  # lists, as cohort.csv has them
        what, unit = name.split("_")[0], ", mm" * name.endswith("_mm")
        numbers = pd.DataFrame(table[name].map(json.loads).tolist(), table.index)
        table = table.drop(columns=name).join(numbers.set_axis([f"{what} {axis}{unit}" for axis in "zyx"], axis=1))
    return table.map(_three_digits).rename(columns=_titled)


def _titled(column: Any) -> Any:
    """A column's name with the unit of its metric, of which it may be the mean or the standard deviation."""
    metric = re.sub("(_all)?(_mean|_std)?$", "", str(column))
    unit = METRICS[metric].unit if metric in METRICS else ""
    return f"{column} ({unit})" if unit else column


def _three_digits(value: Any) -> Any:
    if not isinstance(value, float) or np.isinf(value):
        return value
    return "" if np.isnan(value) else f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def as_table(table: pd.DataFrame) -> pd.DataFrame:
    """A summary to read: one number a cell; n in the head where it is the same for all configurations."""
    columns = {("", name): table["", name] for name in table[""]}
    for name in dict.fromkeys(table.columns.get_level_values(0).drop("")):
        part, counts = table[name].rename(columns={"std": "sd"}), table[name]["n"].unique()
        left_out = {"n"} if len(counts) == 1 else set()
        left_out |= set() if part["undefined"].any() else {"undefined"}
        head = f"{with_unit(name)}, n = {counts[0]}" if len(counts) == 1 else with_unit(name)
        columns |= {(head, key): part[key] for key in part if key not in left_out}
    return shown(pd.DataFrame(columns))


def published(table: int, **options: Any) -> pd.DataFrame:
    """The paper's Table III, IV, V or VI, as printed. Other patients, other hardware: to stand beside ours."""
    return pd.read_csv(files("mupkg.report") / "published" / f"table{table}.csv", **options)


def published_as_text(table: int) -> pd.DataFrame:
    """The same digit by digit, a column for each metric's mean, sd and median; what the paper lacks is left out."""
    printed = published(table, dtype=str, index_col=0)
    columns = [tuple(name.rsplit("_", 1)) for name in printed if name.endswith(("_mean", "_std", "_median"))]
    parts = {(name, "sd" if part == "std" else part): printed[f"{name}_{part}"] for name, part in columns}
    return pd.DataFrame(parts).dropna(axis="columns", how="all").fillna("")
