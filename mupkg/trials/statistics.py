"""Is a difference between two arms more than chance? Cases and replicates are both random draws.

An arm is a configuration, a replicate a seed (and training set) that all arms share. One model throughout, derived in
METHOD.md, "How a difference is judged": d(case, replicate) = difference + case + replicate + rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import nctdtrinc
from scipy.stats import false_discovery_control, rankdata, t, ttest_1samp, wilcoxon

from mupkg.metrics import METRICS, headline, metric_of
from mupkg.report.results import mostly_empty_on_test, trainings

LEVEL = 0.05  # of every test; intervals hold 95 %
FEW = 5  # with fewer cases or replicates Satterthwaite's approximation is too generous: up to 13 % false alarms
MARGINS = {"DSC": 0.01, "DSC_all": 0.01}  # a smaller difference does not matter; without a margin, no equivalence
PILOT_SD = {"DSC": 0.010, "DSC_all": 0.010}  # of a difference over replicates: the least of a pilot, quick phantoms
PAPERS_T_TEST = "paper's t-test over cases, one replicate"
ONE_REPLICATE = "one seed cannot tell the method from the draw of the seed"


# One difference


@dataclass(frozen=True)
class Estimate:
    """A mean difference, the variance of this mean, its degrees of freedom; arrays for a stack of tables.

    `case`, `replicate` and `rest` are the variance components, not below zero (NaN where they are not estimated).
    """

    mean: Any
    variance: Any = np.nan
    df: Any = np.nan
    case: Any = np.nan
    replicate: Any = np.nan
    rest: Any = np.nan

    @property
    def p(self) -> Any:
        """Two-sided p of no difference. Half of it is the chance, under a flat prior, that the sign is wrong."""
        return 2 * t.sf(np.abs(self.mean) / np.sqrt(self.variance), self.df)

    def p_equivalence(self, margin: float) -> Any:
        """p of the two one-sided tests (TOST, Schuirmann 1987) of a difference at least as large as the margin."""
        return t.sf((margin - np.abs(self.mean)) / np.sqrt(self.variance), self.df)

    @property
    def interval(self) -> tuple[Any, Any]:
        """The 95 % confidence interval."""
        half = t.ppf(1 - LEVEL / 2, self.df) * np.sqrt(self.variance)
        return self.mean - half, self.mean + half


def _variance_of_mean(ms_case: Any, ms_replicate: Any, ms_rest: Any, cases: Any, replicates: Any) -> tuple[Any, Any]:
    """Variance of the mean from the mean squares, and its degrees of freedom (Satterthwaite 1946)."""
    of_cases, of_replicates = np.maximum(cases - 1, 1), replicates - 1
    total, larger = ms_case + ms_replicate - ms_rest, np.maximum(ms_case, ms_replicate)
    parts = ms_case**2 / of_cases + ms_replicate**2 / of_replicates + ms_rest**2 / (of_cases * of_replicates)
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing varies
        df = np.where(total > larger, total**2 / parts, np.where(ms_case > ms_replicate, of_cases, of_replicates))
    fewer = np.where(cases > 1, np.minimum(cases, replicates), replicates)
    df = np.where(fewer < FEW, np.minimum(df, fewer - 1), df)
    return np.maximum(total, larger) / (cases * replicates), df[()]


def random_effects(table: Float[np.ndarray, "*stack cases replicates"]) -> Estimate:
    """The balanced two-way random-effects analysis of a table of differences, or of each of a stack of tables.

    A single row, one number a replicate, gives the t-test over replicates. Where all differences are the same there
    is nothing to test: variance and p are NaN.

    Raises:
        ValueError: with one replicate.
    """
    d = np.asarray(table, dtype=float)
    cases, replicates = d.shape[-2:]
    if replicates < 2:
        raise ValueError(f"{ONE_REPLICATE}: train at least {FEW} replicates of both arms")
    mean = d.mean((-2, -1), keepdims=True)
    by_case, by_replicate = d.mean(-1, keepdims=True) - mean, d.mean(-2, keepdims=True) - mean
    ms_case = replicates * (by_case**2).sum((-2, -1)) / max(cases - 1, 1)
    ms_replicate = cases * (by_replicate**2).sum((-2, -1)) / (replicates - 1)
    ms_rest = ((d - mean - by_case - by_replicate) ** 2).sum((-2, -1)) / (max(cases - 1, 1) * (replicates - 1))
    variance, df = _variance_of_mean(ms_case, ms_replicate, ms_rest, cases, replicates)
    same = _all_the_same(d, axis=(-2, -1))
    components = np.maximum(ms_case - ms_rest, 0) / replicates, np.maximum(ms_replicate - ms_rest, 0) / cases
    return Estimate(mean[..., 0, 0], np.where(same, np.nan, variance)[()], df, *components, ms_rest)


def _all_the_same(d: Float[np.ndarray, "..."], axis: int | tuple[int, ...]) -> Any:
    return np.ptp(d, axis=axis) <= 1e-9 * np.abs(d).max(axis)  # but for rounding


def one_replicate(table: Float[np.ndarray, "cases 1"], replicate_sd: float) -> Estimate:
    """The mean of one replicate, without a test, and components for `replicates_needed`.

    How far replicates spread cannot be seen in one, so a pilot's figure is taken. All that varies over the cases is
    taken for rest, which replicates average out: the number of replicates comes out as the least possible.
    """
    d = np.asarray(table, dtype=float)
    rest = d.var(ddof=1) if len(d) > 1 else np.nan
    return Estimate(d.mean(), case=0.0, replicate=replicate_sd**2, rest=rest)


def bootstrap_interval(
    table: Float[np.ndarray, "cases replicates"], draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean, cases and replicates both drawn anew (pigeonhole bootstrap, Owen 2007).

    Nothing need be normal, but with few replicates the interval is too narrow: METHOD.md says by how much.
    """
    rng = np.random.default_rng(seed)
    of_cases, of_replicates = (rng.multinomial(n, np.full(n, 1 / n), size=draws) for n in np.shape(table))
    means = ((of_cases @ np.asarray(table)) * of_replicates).sum(1) / np.size(table)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def nadeau_bengio(fold_differences: Float[np.ndarray, " trainings"], folds: int) -> Estimate:
    """The corrected resampled t-test (Nadeau & Bengio, Machine Learning 52, 2003), for repeated k-fold.

    Training sets that overlap are no independent replicates: the variance of the mean of J trainings is taken as
    (1/J + test cases / training cases) times their sample variance, with J - 1 degrees of freedom.

    Args:
        fold_differences: of each training the mean difference over its own test cases.
        folds: k, so test cases / training cases = 1 / (k - 1).

    Raises:
        ValueError: if the trainings are not whole repeats of k folds.
    """
    d = np.asarray(fold_differences, dtype=float)
    if folds < 2 or len(d) == 0 or len(d) % folds:
        raise ValueError(f"{len(d)} trainings are not whole repeats of {folds} folds; train the missing folds")
    variance = np.nan if _all_the_same(d, axis=0) else d.var(ddof=1)
    return Estimate(d.mean(), (1 / len(d) + 1 / (folds - 1)) * variance, len(d) - 1)


# How large a trial must be


def smallest_effect(measured: Estimate, cases: Any, replicates: Any, power: float = 0.8) -> Any:
    """The smallest difference that so many cases and replicates find at `power`, given components measured before."""
    ms_case, ms_replicate = measured.rest + replicates * measured.case, measured.rest + cases * measured.replicate
    variance, df = _variance_of_mean(ms_case, ms_replicate, measured.rest, cases, replicates)
    return nctdtrinc(df, 1 - power, t.ppf(1 - LEVEL / 2, df)) * np.sqrt(variance)  # noncentral t


def replicates_needed(measured: Estimate, effect: float, cases: int, power: float = 0.8) -> float:
    """How many replicates find this difference at `power`; inf: no number up to 1000, it takes more cases."""
    tried = np.arange(2, 1001)
    found = smallest_effect(measured, cases, tried, power)
    if np.isnan(found * effect).any():
        return np.nan
    return float(next(iter(tried[found <= abs(effect)]), np.inf))


# Tables of runs: `metrics` is what results.case_metrics gives (configuration, seed, case_id, metrics)


def differences(metrics: pd.DataFrame, arm: str, against: str, metric: str) -> pd.DataFrame:
    """One metric of `arm` minus that of `against`: case x replicate.

    Raises:
        ValueError: if the table is not balanced; it names every run and case that is missing or there twice.
    """
    both = _of_both(metrics, arm, against)
    cases, key = both["case_id"].unique(), ["configuration", "seed", "case_id"]
    wanted = pd.MultiIndex.from_product([(arm, against), sorted(both["seed"].unique()), cases], names=key)
    times = both.value_counts(key).reindex(wanted, fill_value=0).rename("times").reset_index()
    faults = [
        f"{name}-seed{seed} has {'every case' if len(odd) == len(cases) else ', '.join(map(str, odd))} {n} times"
        for (name, seed, n), odd in times[times["times"] != 1].groupby(["configuration", "seed", "times"])["case_id"]
    ]
    if faults or both.empty:
        raise ValueError(
            f"{arm} against {against}: both need the same seeds and cases, each once, but "
            f"{'; '.join(faults) or 'there is no run of either'}; "
            "train or test what is missing with notebook 03, or take that seed or case out of both"
        )
    values = both.pivot_table(metric, "case_id", ["configuration", "seed"], dropna=False)
    return values[arm] - values[against]


def _of_both(metrics: pd.DataFrame, arm: str, against: str) -> pd.DataFrame:
    return metrics[metrics["configuration"].isin([arm, against])]


# Factors: `levels` is `Trial.levels`, for each factor its two levels and the arms that have them


def with_main_effects(metrics: pd.DataFrame, levels: Mapping[str, Mapping[str, Sequence[str]]]) -> pd.DataFrame:
    """The table with every level of every factor as an arm of its own: the mean over its arms, case by replicate.

    A factor's main effect is then the difference of its two levels, and is judged as any other. What failed in one
    arm fails in the mean; whether a run collapsed can be seen in the arms alone.
    """
    parts = [metrics]
    for level, its_own in (level for of in levels.values() for level in of.items()):
        rows = metrics[metrics["configuration"].isin(its_own)].drop(columns="configuration")
        key = [*trainings(rows), "case_id"]
        mean = rows.groupby(key, sort=False).sum(min_count=len(its_own)) / len(its_own)
        parts.append(mean.reset_index().assign(configuration=level))
    return pd.concat(parts, ignore_index=True)


def aliases(levels: Mapping[str, Mapping[str, Sequence[str]]], most: int = 3) -> pd.Series:
    """With which interactions, of two to `most` other factors, each main effect is mixed: C × P, H × N × hinge, ...

    An interaction's contrast is the product of its factors' signs over the arms. Where this product goes along with
    the sign of another factor, an effect of that factor may as well be the interaction.
    """
    arms = sorted({arm for of in levels.values() for group in of.values() for arm in group})
    sign = {name: np.where(np.isin(arms, next(iter(of.values()))), 1, -1) for name, of in levels.items()}
    found = {
        name: [
            " × ".join(others)
            for order in range(2, most + 1)
            for others in combinations([other for other in sign if other != name], order)
            if sign[name] @ np.prod([sign[other] for other in others], axis=0)
        ]
        for name in sign
    }
    return pd.Series({name: "; ".join(mixed) or "none" for name, mixed in found.items()}, name="mixed with")


def fold_differences(metrics: pd.DataFrame, arm: str, against: str, metric: str) -> pd.Series:
    """The mean difference of every training of a repeated k-fold: seed is the repeat, and there is a column `fold`.

    Raises:
        ValueError: as `differences`, and if the arms tested a case in different folds.
    """
    differences(metrics, arm, against, metric)
    rows = metrics.set_index(["seed", "fold", "case_id"])
    ours, theirs = (rows.loc[rows["configuration"] == name, metric] for name in (arm, against))
    odd = ours.index.symmetric_difference(theirs.index).unique("case_id")
    if len(odd):
        raise ValueError(
            f"{arm} and {against} tested {', '.join(map(str, odd))} in different folds; split both alike"
        )
    return (ours - theirs).groupby(["seed", "fold"]).agg(lambda values: values.mean(skipna=False))


def papers_t_test(table: pd.DataFrame) -> pd.Series:
    """p of the paper's test in each replicate alone: a paired t-test over cases.

    It takes the draw of the seed for an effect: METHOD.md says how often. Only to compare with.
    """
    found = {}
    for seed, d in table.items():
        testable = len(d) > 1 and np.isfinite(d).all() and d.std() > 0
        found[seed] = ttest_1samp(d, 0).pvalue if testable else np.nan
    return pd.Series(found, name=PAPERS_T_TEST)


def holm(p: Sequence[float]) -> Float[np.ndarray, " tests"]:
    """p adjusted so that the chance of any false alarm among these tests is at most 5 % (Holm 1979)."""
    p, order = np.asarray(p, dtype=float), np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def contrasts(
    metrics: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    *,
    margins: Mapping[str, float] = MARGINS,
    named: Collection[tuple[str, str, str]] = (),
) -> pd.DataFrame:
    """Every pair (arm, against) on every metric: a row each, with its test, verdict and answer in one sentence.

    `p_adjusted` is Holm's over the contrasts of `named`, Benjamini-Hochberg's (1995) over the rest;
    `p_equivalence_adjusted` likewise. The verdict rests on these two: "equivalent" if the difference is surely
    smaller than the margin, *even if it is surely not zero* (`answer` then says both); else "benefit" or "harm" if
    it is surely not zero; else "undecided". One replicate has no p, only the paper's, in a column that says so.

    Failures are counted, never dropped in silence. An infinite distance makes the mean infinite and leaves no p; a
    case with a NaN (PPV without prediction) cannot be compared, and `cases` is how many could. `failed` and
    `failed_against` count both kinds; `collapsed` and `collapsed_against` count such runs, which stay in the mean.
    `p_rank` ranks the replicates' means (Wilcoxon), failures last: .06 at best with five replicates.
    `replicates_needed` is for a difference as large as the margin; with one replicate it is a lower bound.
    With a column `fold`, `replicates` counts the repeats of the k-fold; the test is `nadeau_bengio`'s, and the mean
    that of the folds' means, each fold counting alike.

    Args:
        margins: by metric; a metric without one is never equivalent.
        named: (arm, against, metric) of the contrasts that the protocol names.

    Raises:
        ValueError: as `differences`; a named contrast that is not compared; a metric that is not in METRICS.
    """
    planned, named = [(*pair, name) for name in names for pair in pairs], [tuple(contrast) for contrast in named]
    absent = [f"{arm} against {against} on {metric}" for arm, against, metric in set(named) - set(planned)]
    if absent:
        raise ValueError(f"the protocol names {'; '.join(sorted(absent))}: add this to what is compared")
    unknown = [name for name in names if name.removesuffix("_all") not in METRICS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: is more of it better or worse? Say so in metrics.METRICS")
    if not planned:
        return pd.DataFrame(columns=["configuration", "against", "metric"])
    table = pd.DataFrame([_contrast(metrics, *contrast, margins.get(contrast[2], np.nan)) for contrast in planned])
    table["correction"] = ["Holm" if contrast in named else "Benjamini-Hochberg" for contrast in planned]
    for p in ("p", "p_equivalence"):
        for correction, adjust in (("Holm", holm), ("Benjamini-Hochberg", false_discovery_control)):
            tests = table.loc[table["correction"].eq(correction) & table[p].notna(), p]
            table.loc[tests.index, f"{p}_adjusted"] = adjust(tests)
    table["verdict"] = [_verdict(row) for row in table.itertuples()]
    table["answer"] = [_answer(row) for row in table.itertuples()]
    return table


def _contrast(metrics: pd.DataFrame, arm: str, against: str, metric: str, margin: float) -> dict[str, Any]:
    """One row of `contrasts`, without what depends on the other rows."""
    both, table = _of_both(metrics, arm, against), differences(metrics, arm, against, metric)
    table = table.drop(index=both.loc[both[metric].isna(), "case_id"].unique())
    d, (cases, replicates) = table.to_numpy(), table.shape
    folds = both["fold"].nunique() if "fold" in both else 0
    finite = bool(cases and np.isfinite(d).all())
    with np.errstate(invalid="ignore"):  # inf - inf: both failed, so the mean is unknown
        estimate = Estimate(d.mean() if cases else np.nan)
    if finite and folds:
        of_folds = fold_differences(both[both["case_id"].isin(table.index)], arm, against, metric)
        if len(of_folds) == replicates * folds:  # else no case of a fold can be compared
            estimate = nadeau_bengio(of_folds.to_numpy(), folds)
    elif finite:
        estimate = random_effects(d) if replicates > 1 else one_replicate(d, PILOT_SD.get(metric, np.nan))
    low, high = estimate.interval
    resampled = finite and replicates > 1 and not folds
    bootstrap_low, bootstrap_high = bootstrap_interval(d) if resampled else (np.nan, np.nan)
    failed = (~np.isfinite(both[metric])).groupby(both["configuration"]).sum()
    fallen = mostly_empty_on_test(both)["configuration"].value_counts()
    return {
        "configuration": arm,
        "against": against,
        "metric": metric,
        "mean_difference": float(estimate.mean),
        "low": float(low),
        "high": float(high),
        "bootstrap_low": bootstrap_low,
        "bootstrap_high": bootstrap_high,
        "df": float(estimate.df),
        "p": float(estimate.p),
        "p_rank": _rank_test(d),
        "margin": margin,
        "p_equivalence": float(estimate.p_equivalence(margin)),
        PAPERS_T_TEST: papers_t_test(table).iloc[0] if replicates == 1 else np.nan,
        "cases": cases,
        "replicates": replicates,
        "folds": folds,
        **{f"{part}_sd": float(getattr(estimate, part)) ** 0.5 for part in ("case", "replicate", "rest")},
        "replicates_needed": replicates_needed(estimate, margin, cases),
        "failed": failed[arm],
        "failed_against": failed[against],
        "collapsed": fallen.get(arm, 0),
        "collapsed_against": fallen.get(against, 0),
    }


def _rank_test(d: Float[np.ndarray, "cases replicates"]) -> float:
    """p of Wilcoxon's signed ranks of the replicates' means; infinite ones rank last, inf - inf (NaN) is none."""
    if len(d) == 0 or d.shape[1] < 2:
        return np.nan
    with np.errstate(invalid="ignore"):
        mean = np.nan_to_num(d.mean(0), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return float(wilcoxon(np.sign(mean) * rankdata(np.abs(mean))).pvalue) if mean.any() else np.nan


def _verdict(row: Any) -> str:
    """Equivalence first: the margin was set beforehand as the smallest difference that matters."""
    if row.p_equivalence_adjusted < LEVEL:
        return "equivalent"
    if row.p_adjusted < LEVEL:
        return "benefit" if row.mean_difference * metric_of(row.metric).better > 0 else "harm"
    return "undecided"


def _answer(row: Any) -> str:
    """The row as one sentence."""
    said = [f"{row.configuration} against {row.against}, {row.metric}: {row.verdict}, {row.mean_difference:+.4f}"]
    if np.isfinite(row.p):
        said[0] += f" [{row.low:+.4f}, {row.high:+.4f}]"
        said += [f"p = {row.p_adjusted:.2g} ({row.correction})"]
    times = "repeat" if row.folds else "replicate"
    said += [f"{row.cases} cases", f"{row.replicates} {times}" + "s" * (row.replicates > 1)]
    said[-1] += f" of {row.folds} folds" if row.folds else ""
    if row.verdict == "equivalent":
        said += [f"smaller than {row.margin:g} (TOST: p = {row.p_equivalence_adjusted:.2g})"]
        said += ["but surely not zero"] * (row.p_adjusted < LEVEL)
    if row.replicates == 1 and not row.folds:
        said += [ONE_REPLICATE]
        if np.isfinite(row.replicates_needed):
            seen = f"are needed to see {row.margin:g} if they spread by {PILOT_SD[row.metric]:g}, as in a pilot"
            said += [f"at least {row.replicates_needed:.0f} replicates {seen}"]
    for what in ("failed", "collapsed"):
        ours, theirs = getattr(row, what), getattr(row, f"{what}_against")
        said += [f"{what}: {ours} against {theirs}"] * bool(ours or theirs)
    return "; ".join(said)


def paired_tests(metrics: pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Every configuration against the first, on every metric: the rows of `contrasts`.

    With several seeds the seeds are the replicates; with one there is no p but the paper's, in a column that says so.
    """
    first, *others = dict.fromkeys(metrics["configuration"])
    return contrasts(metrics, [(other, first) for other in others], headline() if names is None else names)


# The paper's own tables


def published_rankings(
    table: pd.DataFrame,
    metric: str = "DSC",
    *,
    cases: int = 68,
    correlations: Sequence[float] = (0.3, 0.8),
    replicate_sds: Sequence[float] = (0.0, 0.003, 0.010),
) -> pd.DataFrame:
    """The chance that each row's ranking against the row above is false, from printed means and deviations alone.

    Every row was trained once and tested on the same cases. The variance of a difference is taken as
    (s1² + s2² - 2 r s1 s2) / cases + replicate_sd²; the chance is the tail of Student's t beyond it (cases - 1
    degrees of freedom), which is the probability of the other sign under a flat prior on the true difference.

    Args:
        table: results.published(3), or those rows of results.published(4) that share the test cases (its figures are
            rounded to two digits: a difference of .01 may be anything up to .02), or any two rows.
        cases: 20 % of 339 are 68.
        correlations: r, of two rows' values over the cases, which the paper does not give.
        replicate_sds: of the difference over replicates, in the metric's unit; 0: as if the seed did not matter.
    """
    rows, mean, variance = table.iloc[:, 0], table[f"{metric}_mean"], table[f"{metric}_std"] ** 2
    found = pd.DataFrame({"row": rows, "against": rows.shift(), "difference": mean.diff()})
    for r in correlations:
        of_cases = (variance + variance.shift() - 2 * r * np.sqrt(variance * variance.shift())) / cases
        for sd in replicate_sds:
            found[f"r = {r:g}, replicate sd {sd:g}"] = t.sf(mean.diff().abs() / np.sqrt(of_cases + sd**2), cases - 1)
    return found.iloc[1:].reset_index(drop=True)
