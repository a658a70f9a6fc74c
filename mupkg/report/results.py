"""A study's numbers: runs gathered, summarised, compared; the paper's figures beside them, never mixed in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mupkg.configurations import TABLE_II
from mupkg.data.writing import whole_file

HEADLINE = ("DSC", "ASD", "SEN", "PPV", "HD95", "aRVD")


def runs(study: str | Path, configurations: Sequence[str] = ()) -> pd.DataFrame:
    """The finished runs of a study: configuration, seed, folder; in the order asked for, or Table II's.

    Raises:
        ValueError: if there is none, or one that was asked for is missing.
    """
    rows = []
    for path in sorted(Path(study).glob("*-seed*/metrics.csv")):
        name, _, seed = path.parent.name.rpartition("-seed")
        if not seed.isdecimal():
            raise ValueError(f"{path.parent}: is not named <configuration>-seed<number>; rename or move it")
        rows.append({"configuration": name, "seed": int(seed), "folder": path.parent})
    table = pd.DataFrame(rows, columns=["configuration", "seed", "folder"])
    order = list(configurations) or [*TABLE_II, *sorted(set(table["configuration"]) - set(TABLE_II))]
    missing = [name for name in configurations if name not in set(table["configuration"])]
    if table.empty or missing:
        raise ValueError(f"{study}: no finished run of {', '.join(missing) or 'any configuration'}; run notebook 03")
    table = table[table["configuration"].isin(order)]
    return table.sort_values(["configuration", "seed"], key=lambda c: c.map(order.index) if c.name != "seed" else c)


def case_metrics(table: pd.DataFrame) -> pd.DataFrame:
    """metrics.csv of all these runs in one table: configuration, seed, case_id and the metrics.

    Raises:
        ValueError: if runs differ in their test cases or regions, or a file is broken or lists a case twice.
    """
    parts = [
        _run_metrics(row.folder / "metrics.csv").assign(configuration=row.configuration, seed=row.seed)
        for row in table.itertuples()
    ]
    metrics = pd.concat(parts, ignore_index=True)
    cases = metrics.groupby(["configuration", "seed"])["case_id"].agg(frozenset)
    if len(set(cases)) > 1:
        raise ValueError("the runs were not tested on the same cases; evaluate runs of one study only")
    records = [folder / "run.json" for folder in table["folder"]]
    if len({_trained_on(record) for record in records if record.is_file()}) > 1:
        raise ValueError(
            "the runs were not trained on the same regions (data_fingerprint in run.json); "
            "after a new stage 1, train every run of the study again"
        )
    return metrics


def _trained_on(record: Path) -> str | None:
    try:
        return json.loads(record.read_bytes()).get("data_fingerprint")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{record}: is no record of a run ({error}); run notebook 03 again") from error


def _run_metrics(path: Path) -> pd.DataFrame:
    try:
        metrics = pd.read_csv(path, dtype={"case_id": str})
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not a CSV table ({error}); test the run again with notebook 03") from error
    if "case_id" not in metrics or metrics["case_id"].duplicated().any():
        raise ValueError(f"{path}: must have a case_id for every row, each once; test the run again with notebook 03")
    return metrics


def per_case(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric as a table case x configuration, averaged over seeds; a NaN or inf of any seed stays one."""
    order = list(dict.fromkeys(metrics["configuration"]))
    kept = lambda values: values.mean(skipna=False)  # noqa: E731
    return metrics.pivot_table(metric, "case_id", "configuration", aggfunc=kept, dropna=False)[order]


def summary(metrics: pd.DataFrame, names: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """Mean, std, median over cases for each configuration, and how many cases that are: n, and `undefined` (NaN).

    An infinite distance (one mask empty) makes its mean infinite, visibly. A NaN (PPV without prediction) cannot
    be averaged: it is left out and counted under `undefined`.
    """
    rows = {}
    for name in names:
        cases = per_case(metrics, name)
        with np.errstate(invalid="ignore"):  # inf - inf in a std is NaN, and shown as such
            rows[name] = pd.DataFrame(
                {
                    "mean": cases.mean(),
                    "std": cases.std(ddof=1),
                    "median": cases.median(),
                    "n": cases.notna().sum(),
                    "undefined": cases.isna().sum(),
                }
            )
    table = pd.concat(rows, axis=1)
    table.insert(0, ("", "seeds"), metrics.groupby("configuration")["seed"].nunique().reindex(table.index))
    return table


def readable(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """A summary as text: "mean ± std (median), n" and what was undefined."""
    text = {}
    for name in dict.fromkeys(table.columns.get_level_values(0).drop("")):
        part = table[name]
        text[name] = [
            f"{r['mean']:.{digits}f} ± {r['std']:.{digits}f} ({r['median']:.{digits}f}), n={r['n']:.0f}"
            + (f", {r['undefined']:.0f} undefined" if r["undefined"] else "")
            for _, r in part.iterrows()
        ]
    return pd.DataFrame(text, index=table.index)


def paired_tests(metrics: pd.DataFrame, names: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """Every configuration against the first, case by case: two-sided paired t-test, and Wilcoxon's signed ranks.

    A failed case has no finite value: an infinite distance, or the PPV of an empty mask (NaN). `failed` and
    `failed_against` count them on each side. A distance that is infinite on one side makes `mean_difference` infinite
    and leaves no t-test (`p` is NaN); in the rank test (`p_rank`) it is the greatest difference of all, and none if
    both failed. What is NaN cannot be paired: `n` says how many pairs there were. Fewer than two pairs, or pairs that
    do not differ, give NaN.
    """
    from scipy.stats import ttest_rel  # slow to import

    rows = []
    for name in names:
        cases = per_case(metrics, name)
        reference = cases.columns[0]
        for other in cases.columns[1:]:
            pair = cases[[reference, other]].dropna()
            with np.errstate(invalid="ignore"):  # inf - inf: both failed, so the mean of all is unknown
                difference = (pair[other] - pair[reference]).to_numpy()
                mean = float(difference.mean()) if len(pair) else float("nan")
            testable = len(pair) > 1 and np.isfinite(difference).all() and difference.std(ddof=1) > 0
            failed = (~np.isfinite(cases)).sum()
            rows.append(
                {
                    "configuration": other,
                    "against": reference,
                    "metric": name,
                    "mean_difference": mean,
                    "p": float(ttest_rel(pair[other], pair[reference]).pvalue) if testable else float("nan"),
                    "p_rank": _rank_test(difference),
                    "n": len(pair),
                    "failed": failed[other],
                    "failed_against": failed[reference],
                }
            )
    columns = ["configuration", "against", "metric", "mean_difference", "p", "p_rank", "n", "failed"]
    return pd.DataFrame(rows, columns=[*columns, "failed_against"])


def _rank_test(difference: np.ndarray) -> float:
    """p of Wilcoxon's signed-rank test, in which an infinite difference ranks last, and inf - inf (NaN) is none."""
    from scipy.stats import wilcoxon  # slow to import

    finite = np.abs(difference[np.isfinite(difference)])
    last = 2 * finite.max(initial=0.0) + 1
    ranked = np.nan_to_num(difference, nan=0.0, posinf=last, neginf=-last)
    return float(wilcoxon(ranked).pvalue) if len(ranked) > 1 and ranked.any() else float("nan")


def published(table: int, **options: Any) -> pd.DataFrame:
    """The paper's Table III, IV, V or VI, as printed. Other patients, other hardware: to stand beside ours."""
    return pd.read_csv(files("mupkg.report") / "published" / f"table{table}.csv", **options)


def published_readable(table: int) -> pd.DataFrame:
    """The same as text, "mean ± std (median)", digit by digit; what the paper lacks is left out."""
    printed, text = published(table, dtype=str, keep_default_na=False), {}
    for name in (column.removesuffix("_mean") for column in printed if column.endswith("_mean")):
        text[name] = [
            row[f"{name}_mean"]
            + (f" ± {row[f'{name}_std']}" if row.get(f"{name}_std") else "")
            + (f" ({row[f'{name}_median']})" if row.get(f"{name}_median") else "")
            for _, row in printed.iterrows()
        ]
    return pd.DataFrame(text, index=printed.iloc[:, 0])


def save_table(table: pd.DataFrame, path: str | Path, *, index: bool = True) -> pd.DataFrame:
    """Write a table as CSV, whole, and give it back for display."""
    with whole_file(path) as temporary:
        table.to_csv(temporary, index=index)
    return table
