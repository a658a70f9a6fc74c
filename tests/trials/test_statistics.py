"""Differences are judged with cases and replicates both random: closed forms, naive recomputation, simulation."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, binom, t, ttest_1samp, ttest_rel
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.multitest import multipletests

from mupkg.report.results import mostly_empty_on_test, published
from mupkg.trials.statistics import (
    ONE_REPLICATE,
    PAPERS_T_TEST,
    Estimate,
    aliases,
    balanced,
    collapse_rate,
    contrasts,
    differences,
    fold_differences,
    holm,
    judged,
    nadeau_bengio,
    one_replicate,
    paired_tests,
    papers_t_test,
    promised,
    published_rankings,
    random_effects,
    replicates_needed,
    sign_flip,
    smallest_effect,
    with_means,
)

nan, inf = float("nan"), float("inf")
REST_SD = 0.018


def tables(number, cases, replicates, case_sd=0.0, replicate_sd=0.0, rest_sd=REST_SD, difference=0.0, seed=0):
    """A stack of tables drawn from the model."""
    rng = np.random.default_rng(seed)
    d = difference + case_sd * rng.standard_normal((number, cases, 1))
    d = d + replicate_sd * rng.standard_normal((number, 1, replicates))
    return d + rest_sd * rng.standard_normal((number, cases, replicates))


def metrics_of(**arms):
    """A long table from arm = {metric: case x replicate}, or case x replicate of DSC."""
    parts = []
    for arm, values in arms.items():
        values = values if isinstance(values, dict) else {"DSC": values}
        columns = {name: np.atleast_2d(np.asarray(v, dtype=float)).T.ravel() for name, v in values.items()}
        cases, replicates = np.atleast_2d(next(iter(values.values()))).shape
        index = {
            "seed": np.repeat(range(replicates), cases),
            "case_id": [f"{c:03d}" for c in range(cases)] * replicates,
        }
        parts.append(pd.DataFrame({"configuration": arm} | index | columns))
    return pd.concat(parts, ignore_index=True)


def answer_to(d, metric="DSC", **options):
    """The one row for this table of differences."""
    d = np.asarray(d, dtype=float)
    same = np.full(d.shape, 0.8)
    arms = {"UNet": {"DSC": same, metric: same}, "HCP": {"DSC": same, metric: same + d}}
    return contrasts(metrics_of(**arms), [("HCP", "UNet")], [metric], **options).iloc[0]


# The analysis


def test_the_analysis_is_the_textbooks_sum_by_sum():
    d = tables(1, 7, 6, 0.01, 0.01)[0]
    cases, replicates = d.shape
    ms_case = replicates * sum((d[c].mean() - d.mean()) ** 2 for c in range(cases)) / (cases - 1)
    ms_replicate = cases * sum((d[:, r].mean() - d.mean()) ** 2 for r in range(replicates)) / (replicates - 1)
    rest = [d[c, r] - d[c].mean() - d[:, r].mean() + d.mean() for c in range(cases) for r in range(replicates)]
    ms_rest = np.square(rest).sum() / ((cases - 1) * (replicates - 1))
    assert min(ms_case, ms_replicate) > ms_rest  # so no floor is reached
    total = ms_case + ms_replicate - ms_rest
    df = total**2 / (ms_case**2 / 6 + ms_replicate**2 / 5 + ms_rest**2 / 30)
    p = 2 * t.sf(abs(d.mean()) / np.sqrt(total / d.size), df)
    found = random_effects(d)
    assert found.variance == pytest.approx(total / d.size) and found.df == pytest.approx(df)
    assert found.p == pytest.approx(p)
    assert (found.case, found.replicate, found.rest) == pytest.approx(
        ((ms_case - ms_rest) / 6, (ms_replicate - ms_rest) / 7, ms_rest)
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_components_are_those_of_restricted_maximum_likelihood(seed):
    """On balanced tables both agree, unless a component would be negative."""
    d = tables(1, 12, 8, 0.02, 0.02, seed=seed)[0]
    case, replicate = np.indices(d.shape)
    long = pd.DataFrame({"case": case.ravel(), "replicate": replicate.ravel()})
    long["d"] = 100 * d.ravel()  # its optimiser stops at absolute tolerances
    parts = {name: f"0 + C({name})" for name in ("case", "replicate")}
    model = MixedLM.from_formula("d ~ 1", groups=np.ones(len(long)), vc_formula=parts, re_formula="0", data=long)
    fitted = model.fit(reml=True)
    found = random_effects(d)
    named = dict(zip(model.exog_vc.names, fitted.vcomp / 1e4, strict=True))
    assert named["case"] == pytest.approx(found.case, rel=1e-3)
    assert named["replicate"] == pytest.approx(found.replicate, rel=1e-3)
    assert fitted.scale / 1e4 == pytest.approx(found.rest, rel=1e-3)
    assert fitted.bse_fe.iloc[0] / 100 == pytest.approx(np.sqrt(found.variance), rel=1e-3)


@pytest.mark.parametrize("along", ["cases that are all alike", "replicates that are all alike", "a single row"])
def test_without_one_kind_of_variance_it_is_the_t_test_over_the_other(along):
    d = np.random.default_rng(0).normal(0.01, 0.02, 9)
    table = {"a single row": d[None]}.get(along, np.tile(d, (6, 1)))
    table = table.T if along.startswith("replicates") else table
    found, expected = random_effects(table), ttest_1samp(d, 0)
    assert found.df == pytest.approx(8) and found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval()
    assert found.interval == pytest.approx((low, high))


def test_the_variance_never_falls_below_its_larger_part():
    stack = tables(200, 8, 6, replicate_sd=0.005)
    found = random_effects(stack)
    by_case, by_replicate = (stack.mean(axis).var(-1, ddof=1) / stack.shape[3 - axis] for axis in (2, 1))
    larger = np.maximum(by_case, by_replicate)
    assert (found.variance >= larger * (1 - 1e-9)).all()
    floor = np.isclose(found.variance, larger)
    assert 20 < floor.sum() < 180
    np.testing.assert_allclose(found.df[floor], np.where(by_case > by_replicate, 7, 5)[floor])


def test_few_replicates_or_cases_have_few_degrees_of_freedom():
    assert random_effects(tables(500, 100, 3, 0.015, 0.005)).df.max() <= 2
    assert random_effects(tables(500, 4, 30, 0.005, 0.015)).df.max() <= 3
    assert random_effects(tables(500, 100, 5, 0.015, 0.005)).df.max() > 20


def test_a_stack_is_analysed_table_by_table():
    stack = tables(3, 5, 6, 0.01, 0.01)
    for table, p in zip(stack, random_effects(stack).p, strict=True):
        assert random_effects(table).p == pytest.approx(p)


def test_differences_that_are_all_the_same_have_no_p():
    a = np.random.default_rng(0).uniform(0.7, 0.9, (6, 5))
    for d in (np.zeros((6, 5)), (a + 0.01) - a):
        assert np.isnan(random_effects(d).p) and np.isnan(random_effects(d).p_equivalence(0.02))


def test_one_replicate_is_refused():
    with pytest.raises(
        ValueError, match="one seed cannot tell the method from the draw of the seed: train at least 5"
    ):
        random_effects(np.ones((8, 1)))


# Its error rates, by simulation


@pytest.mark.slow
@pytest.mark.parametrize(("replicates", "number"), [(5, 8000), (30, 4000)])
@pytest.mark.parametrize(
    ("cases", "replicate_sd", "of_the_papers_test"),
    [(8, 0.005, 0.11), (8, 0.015, 0.39), (100, 0.005, 0.50), (100, 0.015, 0.81)],
)
def test_false_alarms_are_five_percent_where_the_test_over_cases_has_many(
    cases, replicate_sd, of_the_papers_test, replicates, number
):
    """With eight cases and replicates that hardly differ the floor makes it cautious (2 to 4 %), never careless."""
    stack = tables(number, cases, replicates, replicate_sd=replicate_sd)
    alarms = (random_effects(stack).p < 0.05).mean()
    assert alarms < 0.06 and alarms > (0.02 if (cases, replicate_sd) == (8, 0.005) else 0.04)
    over_cases = (ttest_1samp(stack[..., 0], 0, axis=1).pvalue < 0.05).mean()
    assert over_cases == pytest.approx(of_the_papers_test, abs=0.02)


@pytest.mark.parametrize("case_sd", [0.005, 0.01])
def test_nor_do_cases_that_differ_raise_false_alarms(case_sd):
    for cases, replicates in ((8, 10), (100, 5), (100, 10)):
        alarms = (random_effects(tables(5000, cases, replicates, case_sd, 0.01)).p < 0.05).mean()
        assert alarms == pytest.approx(0.05, abs=0.01)


def test_a_difference_at_the_margin_is_called_equivalent_in_five_percent():
    found = random_effects(tables(6000, 100, 10, 0.005, 0.005, difference=-0.01))
    assert (found.p_equivalence(0.01) < 0.05).mean() == pytest.approx(0.05, abs=0.01)


def test_equivalence_is_two_one_sided_tests():
    found = random_effects(tables(1, 20, 10, 0.005, 0.005, difference=0.004)[0])
    below = t.cdf((found.mean - 0.01) / np.sqrt(found.variance), found.df)
    above = t.sf((found.mean + 0.01) / np.sqrt(found.variance), found.df)
    assert found.p_equivalence(0.01) == pytest.approx(max(below, above))


def test_the_interval_covers_in_95_percent():
    low, high = random_effects(tables(6000, 30, 8, 0.01, 0.01, difference=0.02)).interval
    assert ((low < 0.02) & (high > 0.02)).mean() == pytest.approx(0.95, abs=0.01)


# Signs


def naive_sign_flip(means):
    """Every choice of signs, one after the other."""
    flipped = [np.mean(np.array(signs) * means) for signs in itertools.product((1, -1), repeat=len(means))]
    return np.mean(np.abs(flipped) >= abs(np.mean(means)) * (1 - 1e-12))


@pytest.mark.parametrize("replicates", [6, 9, 12])
def test_the_sign_flip_test_is_the_share_of_all_signs(replicates):
    means = np.random.default_rng(replicates).normal(0.01, 0.02, replicates)
    assert sign_flip(means) == pytest.approx(naive_sign_flip(means))


def test_with_all_signs_alike_only_two_choices_are_as_far():
    assert sign_flip(np.arange(1.0, 9.0)) == pytest.approx(2 / 2**8)


def test_with_twenty_replicates_signs_are_drawn_and_seeded():
    """The closed form for alike magnitudes: the number of plus signs is binomial."""
    means = np.array([1.0] * 14 + [-1.0] * 6)
    exact = 2 * binom.sf(13, 20, 0.5)
    assert sign_flip(means) == sign_flip(means) == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


def test_one_collapse_does_not_hide_what_all_signs_show():
    """The t-test is fooled by the collapsed run's large difference; the signs are not."""
    means = np.array([-0.01 - 0.0001 * n for n in range(19)] + [-0.8])
    assert ttest_1samp(means, 0).pvalue > 0.1 and sign_flip(means) < 1e-3


def test_the_corrected_resampled_t_test_by_hand():
    """Differences 1, 2, 3 of three folds: mean 2, variance 1, times 1/3 + 1/2."""
    found = nadeau_bengio([1.0, 2.0, 3.0], folds=3)
    assert (found.mean, found.variance, found.df) == pytest.approx((2, 5 / 6, 2))


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_folds_that_all_differ_alike_leave_nothing_to_test(difference):
    """Two arms that collapsed in every fold are not equivalent: nobody knows."""
    found = nadeau_bengio(np.full(3, difference), folds=3)
    assert np.isnan(found.p) and np.isnan(found.p_equivalence(0.01)) and found.mean == pytest.approx(difference)


def test_the_correction_holds_five_percent_where_folds_are_correlated():
    """With the correlation 1/k that the authors assume it is exact."""
    rng, folds, trainings = np.random.default_rng(0), 5, 15
    shared = np.sqrt(1 / folds) * rng.standard_normal((10_000, 1))
    stack = shared + np.sqrt(1 - 1 / folds) * rng.standard_normal((10_000, trainings))
    corrected = np.mean([nadeau_bengio(d, folds).p < 0.05 for d in stack[:4000]])
    assert corrected == pytest.approx(0.05, abs=0.01)
    assert (ttest_1samp(stack, 0, axis=1).pvalue < 0.05).mean() > 0.2


def in_folds():
    """Four cases in two folds, two repeats."""
    rng = np.random.default_rng(0)
    metrics = metrics_of(UNet=rng.uniform(size=(4, 2)), HCP=rng.uniform(size=(4, 2)))
    fold = {0: "0011", 1: "0101"}
    metrics["fold"] = [
        int(fold[seed][int(case)]) for seed, case in zip(metrics["seed"], metrics["case_id"], strict=True)
    ]
    return metrics


def test_the_differences_of_folds_are_means_over_their_own_cases():
    metrics = in_folds()
    d = differences(metrics, "HCP", "UNet", "DSC")
    found = fold_differences(metrics, "HCP", "UNet", "DSC")
    assert found.loc[0, 1] == pytest.approx(d.loc[["002", "003"], 0].mean())
    assert found.loc[1, 0] == pytest.approx(d.loc[["000", "002"], 1].mean()) and len(found) == 4
    metrics.loc[0, "DSC"] = nan  # case 000 of repeat 0: its fold has no mean
    assert fold_differences(metrics, "HCP", "UNet", "DSC").isna().to_dict() == {
        (0, 0): True,
        (0, 1): False,
        (1, 0): False,
        (1, 1): False,
    }


def test_a_case_in_another_fold_is_named():
    metrics = in_folds()
    metrics.loc[(metrics["configuration"] == "HCP") & (metrics["case_id"] == "002"), "fold"] = 0
    with pytest.raises(ValueError, match=r"HCP, UNet: all need the same .*002 is in 2 folds of repeat 0"):
        fold_differences(metrics, "HCP", "UNet", "DSC")


def test_contrasts_of_folds_are_nadeau_and_bengio_s():
    metrics = in_folds()
    (row,) = contrasts(metrics, [("HCP", "UNet")], ["DSC"], primary="DSC").to_dict("records")
    found = nadeau_bengio(fold_differences(metrics, "HCP", "UNet", "DSC").to_numpy(), folds=2)
    assert (row["mean_difference"], row["p"]) == pytest.approx((found.mean, found.p))
    assert (row["low"], row["high"]) == pytest.approx(found.interval)
    assert (row["cases"], row["replicates"], row["folds"]) == (4, 2, 2)
    assert "4 cases; 2 repeats of 2 folds" in row["answer"]


def test_one_repeat_of_a_k_fold_has_a_p():
    metrics = in_folds().query("seed == 0")
    (row,) = contrasts(metrics, [("HCP", "UNet")], ["DSC"]).to_dict("records")
    assert np.isfinite(row["p"]) and "1 repeat of 2 folds" in row["answer"] and "one seed" not in row["answer"]


def test_a_training_that_collapsed_in_one_fold_is_counted():
    metrics = in_folds()
    fallen = metrics["fold"].eq(1) & metrics["seed"].eq(0) & metrics["configuration"].eq("HCP")
    metrics.loc[fallen, "DSC"] = 0.0
    assert mostly_empty_on_test(metrics).to_dict("records") == [{"configuration": "HCP", "seed": 0, "fold": 1}]


# Power


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "replicates"), [(8, 12), (100, 5), (100, 30)])
def test_the_smallest_effect_is_found_in_80_percent(cases, replicates):
    known = Estimate(0.0, case=0.01**2, replicate=0.01**2, rest=REST_SD**2)
    effect = smallest_effect(known, cases, replicates)
    stack = tables(4000, cases, replicates, 0.01, 0.01, difference=effect)
    assert (random_effects(stack).p < 0.05).mean() == pytest.approx(0.8, abs=0.025)


def test_as_many_replicates_are_needed_as_find_the_effect():
    known = Estimate(0.0, case=0.005**2, replicate=0.015**2, rest=REST_SD**2)
    needed = int(replicates_needed(known, -0.01, cases=100))
    assert smallest_effect(known, 100, needed) <= 0.01 < smallest_effect(known, 100, needed - 1)


def test_no_number_of_replicates_makes_up_for_too_few_cases():
    known = Estimate(0.0, case=0.01**2, replicate=0.01**2, rest=REST_SD**2)
    assert replicates_needed(known, 0.005, cases=8) == inf and replicates_needed(known, 0.005, cases=100) < 100
    assert np.isnan(replicates_needed(Estimate(0.0), 0.005, cases=8))


# Several tests


@pytest.mark.parametrize("number", [1, 2, 9])
def test_holms_p_is_statsmodels(number):
    p = np.random.default_rng(number).uniform(0, 0.2, number)
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


@pytest.mark.slow
def test_contrasts_named_are_one_family_and_the_rest_another():
    rng = np.random.default_rng(0)
    arms = {name: rng.normal(0.8 + 0.003 * step, 0.01, (10, 6)) for step, name in enumerate("ABCDE")}
    metrics = metrics_of(**{name: {"DSC": dsc, "DSC_all": dsc + 0.01 * dsc**2} for name, dsc in arms.items()})
    table = contrasts(metrics, [(name, "A") for name in "BCDE"], ["DSC", "DSC_all"], primary="DSC")
    table = table.set_index("metric")
    for metric, method, correction in (("DSC", "holm", "Holm"), ("DSC_all", "fdr_bh", "Benjamini-Hochberg")):
        part = table.loc[metric]
        assert set(part["correction"]) == {correction}
        for p in ("p", "p_equivalence"):
            np.testing.assert_allclose(part[f"{p}_adjusted"], multipletests(part[p], method=method)[1])


def test_a_contrast_without_a_test_is_in_no_family():
    rng = np.random.default_rng(0)
    arms = {name: rng.normal(0.8, 0.01, (10, 6)) for name in "ABC"} | {"D": np.full((10, 6), inf)}
    table = contrasts(metrics_of(**arms), [("B", "A"), ("C", "A"), ("D", "A")], ["DSC"]).set_index("configuration")
    np.testing.assert_allclose(
        table["p_adjusted"][["B", "C"]], multipletests(table["p"][["B", "C"]], method="fdr_bh")[1]
    )
    assert np.isnan(table["p_adjusted"]["D"])


# The verdict


@pytest.mark.parametrize(
    ("metric", "difference", "spread", "verdict"),
    [
        ("DSC", 0.03, 0.01, "benefit"),
        ("DSC", -0.03, 0.01, "harm"),
        ("DSC_all", -0.03, 0.01, "harm"),
        ("ASD", 0.5, 0.1, "harm"),
        ("ASD", -0.5, 0.1, "benefit"),
        ("DSC", 0.0, 0.01, "equivalent"),
        ("DSC", 0.004, 0.001, "equivalent"),
        ("DSC", 0.01, 0.2, "undecided"),
        ("ASD", 0.0, 0.01, "undecided"),  # no margin was named
    ],
)
def test_the_verdict(metric, difference, spread, verdict):
    d = tables(1, 20, 10, 0, 0, spread)[0]
    row = answer_to(difference + d - d.mean(), metric)
    assert row["verdict"] == verdict and row["answer"].startswith(f"HCP against UNet, {metric}: {verdict}, ")
    assert ("surely not zero" in row["answer"]) == (difference == 0.004)


def test_a_margin_of_ones_own():
    d = tables(1, 20, 10, 0, 0, 0.1)[0]
    assert answer_to(d - d.mean(), "ASD", margins={"ASD": 0.1})["verdict"] == "equivalent"
    assert answer_to(d - d.mean(), "ASD", margins={"ASD": 0.001})["verdict"] == "undecided"


def test_a_metric_must_say_which_way_is_better():
    with pytest.raises(ValueError, match="colour: is more of it better or worse"):
        answer_to(np.zeros((3, 3)), "colour")


def test_a_row_holds_the_analysis():
    d = tables(1, 20, 6, 0.01, 0.01, difference=0.03)[0]
    row, found = answer_to(d), random_effects(d)
    assert (row["mean_difference"], row["p"], row["df"]) == pytest.approx((d.mean(), found.p, found.df))
    assert (row["low"], row["high"]) == pytest.approx(found.interval)
    assert (row["low_90"], row["high_90"]) == pytest.approx(found.interval_at(0.9))
    assert (row["case_sd"], row["rest_sd"]) == pytest.approx((found.case**0.5, found.rest**0.5))
    assert row["replicates_needed"] == replicates_needed(found, 0.01, 20)
    assert (row["cases"], row["replicates"]) == (20, 6) and np.isnan(row[PAPERS_T_TEST])


# One replicate


def test_one_replicate_has_no_p_but_the_papers():
    d = np.random.default_rng(0).normal(0.02, 0.02, (20, 1))
    row = answer_to(d)
    assert row[["p", "p_adjusted", "p_rank", "p_equivalence", "low", "low_90"]].isna().all()
    assert row["verdict"] == "undecided" and ONE_REPLICATE in row["answer"]
    assert row[PAPERS_T_TEST] == pytest.approx(ttest_1samp(d[:, 0], 0).pvalue) and row[PAPERS_T_TEST] < 0.01
    assert f"at least {row['replicates_needed']:.0f} replicates are needed to see 0.01" in row["answer"]


def test_the_replicates_needed_rest_on_the_pilots_spread():
    d = np.random.default_rng(0).normal(0.02, 0.02, (20, 1))
    known = Estimate(0.0, case=0.0, replicate=0.01**2, rest=d.var(ddof=1))
    assert answer_to(d)["replicates_needed"] == replicates_needed(known, 0.01, 20)
    assert replicates_needed(one_replicate(d, 0.02), 0.01, 20) > replicates_needed(known, 0.01, 20)
    assert np.isnan(answer_to(d, "ASD", margins={"ASD": 0.1})["replicates_needed"])  # no pilot of that


def test_one_case_and_one_replicate_are_still_told():
    row = answer_to([[0.02]])
    assert (
        row["mean_difference"] == pytest.approx(0.02)
        and np.isnan(row[PAPERS_T_TEST])
        and ONE_REPLICATE in row["answer"]
    )


def test_the_papers_test_of_every_replicate_alone():
    d = differences(metrics_of(A=np.zeros((9, 3)), B=tables(1, 9, 3)[0]), "B", "A", "DSC")
    np.testing.assert_allclose(papers_t_test(d), ttest_1samp(d, 0).pvalue)
    d.iloc[0, 0], d[1] = inf, 0.5
    assert papers_t_test(d).isna().tolist() == [True, True, False]


# Failures


def test_an_infinite_distance_leaves_no_p_and_is_counted():
    d = tables(1, 10, 8)[0]
    d[3, 2] = inf
    row = answer_to(d, "ASD")
    assert row["mean_difference"] == inf and np.isnan(row["p"]) and row["verdict"] == "undecided"
    assert (row["failed"], row["failed_against"]) == (1, 0) and "failed: 1 against 0" in row["answer"]


def test_a_failure_on_both_sides_leaves_the_mean_unknown():
    both = {"DSC": np.full((4, 3), 0.8), "ASD": [[1, 2, inf], [1, 2, 3], [2, 2, 2], [3, 1, 1]]}
    row = contrasts(metrics_of(A=both, B=both), [("B", "A")], ["ASD"]).iloc[0]
    assert np.isnan(row["mean_difference"]) and (row["failed"], row["failed_against"]) == (1, 1)


def test_the_rank_test_ranks_failures_last():
    """Eight replicates, one against all others: rank 8 if it failed; by hand from the 2^8 signs."""
    means = np.array([-1.0, -2, -3, -4, -5, -6, -7, inf])
    row = answer_to(np.tile(means / 10, (3, 1)), "ASD")
    signs = np.array(np.meshgrid(*[[0, 1]] * 8)).reshape(8, -1)
    sums = signs.T @ np.arange(1, 9)
    assert row["p_rank"] == pytest.approx(2 * np.mean(sums <= 8))
    assert row["p_rank"] > answer_to(np.tile(np.append(means[:7], -8.0) / 10, (3, 1)), "ASD")["p_rank"]


def test_a_case_that_is_undefined_is_left_out_of_all_replicates_and_counted():
    d = tables(1, 10, 6)[0]
    d[4, 1] = d[4, 2] = nan
    row = answer_to(d, "PPV")
    kept = random_effects(np.delete(d, 4, axis=0))
    assert row["p"] == pytest.approx(kept.p) and (row["cases"], row["failed"]) == (9, 2)
    assert np.isnan(answer_to(np.full((3, 3), nan), "PPV")["p"])


def test_a_collapsed_run_is_counted_and_stays_in_the_mean():
    a = np.random.default_rng(0).normal(0.8, 0.02, (10, 5))
    b = a.copy()
    b[:, 3] = [0] * 6 + [0.1] * 4
    metrics = metrics_of(A=a, B=b)
    assert mostly_empty_on_test(metrics).to_dict("records") == [{"configuration": "B", "seed": 3}]
    row = contrasts(metrics, [("B", "A")], ["DSC"]).iloc[0]
    assert row["mean_difference"] == pytest.approx((b - a).mean())
    assert (row["collapsed"], row["collapsed_against"]) == (
        1,
        0,
    ) and "collapsed: 1 of 5 [1 to 72 %] against 0 of 5 [0 to 52 %]" in row["answer"]
    metrics.loc[metrics["DSC"].eq(0).idxmax(), "DSC"] = 0.01
    assert mostly_empty_on_test(metrics).empty  # 5 of 10 is not more than half


# The table of differences


def test_differences_are_case_by_replicate():
    a, b = np.random.default_rng(0).uniform(size=(2, 4, 3))
    shuffled = metrics_of(A=a, B=b, C=a).sample(frac=1, random_state=0)
    np.testing.assert_allclose(differences(shuffled, "B", "A", "DSC"), b - a)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: m.drop(index=m.index[m["configuration"] == "B"][-1]), "B-seed2 has 003 0 times"),
        (lambda m: m[(m["configuration"] != "B") | (m["seed"] != 1)], "B-seed1 has every case 0 times"),
        (lambda m: m[(m["configuration"] != "A") | (m["case_id"] > "001")], "A-seed0 has 000, 001 0 times; A-seed1"),
        (lambda m: pd.concat([m, m.iloc[:1]]), "A-seed0 has 000 2 times"),
        (lambda m: m[m["configuration"] != "B"], "B-seed0 has every case 0 times; B-seed1 has"),
        (lambda m: m[m["configuration"] == "C"], "there is no run of them"),
    ],
)
def test_a_table_with_holes_is_refused_and_each_is_named(spoil, told):
    metrics = metrics_of(**dict.fromkeys("ABC", np.ones((4, 3))))
    with pytest.raises(ValueError, match=f"B, A: all need the same seeds and cases, each once, but {told}"):
        contrasts(spoil(metrics), [("B", "A")], ["DSC"])


# Factors

TWO_CUBED = {f"{a}{b}{c}": (a, b, c) for a in "+-" for b in "+-" for c in "+-"}


def levels_of(design, names="ABC"):
    """`Trial.levels` of a design, arm -> the sign of each factor."""
    return {
        name: {f"{name} {sign}": [arm for arm, signs in design.items() if signs[place] == sign] for sign in "+-"}
        for place, name in enumerate(names)
    }


def flat(levels):
    """`Trial.means` of a design: every level and its arms."""
    return {level: arms for of in levels.values() for level, arms in of.items()}


def test_additive_effects_are_recovered_exactly_case_by_case_and_replicate_by_replicate():
    rng = np.random.default_rng(0)
    shape = (6, 5)
    effects = {name: rng.normal(0, 0.01, shape) for name in "ABC"}
    base = rng.uniform(0.7, 0.9, shape)
    arms = {
        arm: base + sum((0.5 if sign == "+" else -0.5) * effects[n] for n, sign in zip("ABC", signs, strict=True))
        for arm, signs in TWO_CUBED.items()
    }
    metrics = with_means(metrics_of(**arms), flat(levels_of(TWO_CUBED)))
    for name, effect in effects.items():
        d = differences(metrics, f"{name} +", f"{name} -", "DSC")
        np.testing.assert_allclose(d.to_numpy(), effect, atol=1e-12)
    row = contrasts(metrics, [("A +", "A -")], ["DSC"]).iloc[0]
    found = random_effects(effects["A"])
    assert (row["mean_difference"], row["p"]) == pytest.approx((float(found.mean), float(found.p)))
    assert set(metrics["configuration"]) >= set(arms)  # the arms are still there


def test_an_interaction_moves_no_main_effect_of_a_full_design_but_that_of_its_alias():
    both = {arm: signs.count("-") % 2 == 0 for arm, signs in TWO_CUBED.items()}  # the sign of A x B x C
    arms = {arm: np.full((4, 3), 0.8 + 0.05 * plus) for arm, plus in both.items()}
    full = with_means(metrics_of(**arms), flat(levels_of(TWO_CUBED)))
    assert differences(full, "A +", "A -", "DSC").to_numpy() == pytest.approx(0, abs=1e-12)
    half = {arm: (*TWO_CUBED[arm], "+" if plus else "-") for arm, plus in both.items()}  # D = A x B x C
    mixed = with_means(metrics_of(**arms), flat(levels_of(half, "ABCD")))
    assert differences(mixed, "D +", "D -", "DSC").to_numpy() == pytest.approx(0.05)


@pytest.mark.parametrize("failure", [nan, inf])
def test_what_failed_in_one_arm_fails_in_its_levels_alone(failure):
    arms = {arm: np.full((3, 2), 0.8) for arm in TWO_CUBED}
    arms["+++"] = arms["+++"].copy()
    arms["+++"][1, 0] = failure
    metrics = with_means(metrics_of(**arms), flat(levels_of(TWO_CUBED))).set_index("configuration")["DSC"]
    assert (~np.isfinite(metrics["A +"])).sum() == 1 and np.isfinite(metrics["A -"]).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table[(table["configuration"] != "again") | (table["seed"] != 1)],  # a whole run
        lambda table: table.drop(index=table.index[table["configuration"] == "again"][0]),  # one case
        lambda table: pd.concat([table, table[table["configuration"] == "again"].head(1)]),  # a case twice
    ],
)
def test_a_mean_of_arms_that_lacks_a_part_is_refused(spoil):
    """Regression: without a run on a pooled side it said "undecided, +nan; 0 cases"; without a case, a verdict."""
    metrics = metrics_of(A=np.full((5, 4), 0.8), UNet=np.full((5, 4), 0.7), again=np.full((5, 4), 0.6))
    pooled = {"both": ["UNet", "again"]}
    contrasts(metrics, [("A", "both")], ["DSC"], means=pooled)
    with pytest.raises(
        ValueError,
        match=r"UNet, again: all need the same .*, but again-seed\d has .* [02] times",
    ):
        contrasts(spoil(metrics), [("A", "both")], ["DSC"], means=pooled)


@pytest.mark.slow
def test_answers_of_several_tables_can_be_judged_as_one_family():
    """Ten contrasts without an effect: one that is judged harm alone is undecided among them."""
    rng, surprising = np.random.default_rng(2), 0
    for _ in range(8):
        arms = [metrics_of(A=a, B=b) for a, b in 0.8 + 0.01 * rng.standard_normal((10, 2, 6, 8))]
        parts = [contrasts(metrics, [("A", "B")], ["DSC"], margins={}) for metrics in arms]
        alone = [part["verdict"].iloc[0] for part in parts if part["p"].iloc[0] > 0.006]  # 0.05 / 10, and a little
        family = judged(pd.concat(parts, ignore_index=True))
        assert family["p_adjusted"].to_numpy() == pytest.approx(multipletests(family["p"], method="fdr_bh")[1])
        if len(alone) == 10 and {*alone} != {"undecided"}:
            surprising += 1
            assert (family["verdict"] == "undecided").all()
    assert surprising


def test_without_factors_the_table_stays_as_it_is():
    metrics = metrics_of(A=np.full((3, 2), 0.8), B=np.full((3, 2), 0.7))
    pd.testing.assert_frame_equal(with_means(metrics, {}), metrics)


def test_under_no_effect_five_percent_of_main_effects_are_called_one():
    """Arms share the replicate's draw and the case; what is left is their own. Holm: 5 % of the trials, at most."""
    rng, replicates, cases, alarms, trials = np.random.default_rng(1), 5, 20, 0, 400
    for _ in range(trials):
        own = 0.012 * rng.standard_normal((8, 1, replicates)) + 0.02 * rng.standard_normal((8, cases, replicates))
        values = own + 0.01 * rng.standard_normal((1, 1, replicates)) + 0.05 * rng.standard_normal((1, cases, 1))
        signs = np.array([[1 if s == "+" else -1 for s in signs] for signs in TWO_CUBED.values()])
        p = random_effects(np.einsum("af,acr->fcr", signs / 4, values)).p
        alarms += holm(p).min() < 0.05
    assert 0.01 < alarms / trials < 0.08


def test_aliases_are_those_of_the_defining_relation():
    """C = A x B mixes every main effect with the interaction of two others, D = A x B x C with that of three."""
    third = {f"{a}{b}": (a, b, "+" if a == b else "-") for a in "+-" for b in "+-"}
    assert aliases(levels_of(third)).to_dict() == {"A": "B × C", "B": "A × C", "C": "A × B"}
    fourth = {arm: (*signs, "+" if signs.count("-") % 2 == 0 else "-") for arm, signs in TWO_CUBED.items()}
    assert aliases(levels_of(fourth, "ABCD"))["A"] == "B × C × D"
    assert set(aliases(levels_of(TWO_CUBED))) == {"none"}


# The paper's own tables


def test_the_chance_of_a_false_ranking_by_hand():
    rows = pd.DataFrame({"configuration": ["A", "B"], "DSC_mean": [0.80, 0.81], "DSC_std": [0.03, 0.05]})
    (row,) = published_rankings(rows, cases=25, correlations=[0.6], replicate_sds=[0, 0.01]).to_dict("records")
    of_cases = (0.03**2 + 0.05**2 - 2 * 0.6 * 0.03 * 0.05) / 25  # = 0.008**2
    assert row["r = 0.6, replicate sd 0"] == pytest.approx(t.sf(0.01 / np.sqrt(of_cases), 24))
    assert row["r = 0.6, replicate sd 0.01"] == pytest.approx(t.sf(0.01 / np.hypot(0.008, 0.01), 24))
    assert (row["row"], row["against"]) == ("B", "A") and row["difference"] == pytest.approx(0.01)


def test_few_of_the_papers_rankings_are_beyond_chance():
    """Whatever the correlation, and with no regard to seeds: three rankings of eleven; with them fewer."""
    found = published_rankings(published(3)).set_index("row")
    beyond = {
        sd: found.loc[:, [f"r = {r}, replicate sd {sd}" for r in (0.3, 0.8)]].max(axis=1) < 0.025 for sd in (0, 0.01)
    }
    assert list(beyond[0][beyond[0]].index) == ["MetricUNet-R", "MetricUNet-H", "MetricUNet-C"]
    assert list(beyond[0.01][beyond[0.01]].index) == ["MetricUNet-R"]
    equal = found.loc["MetricUNet-HR"].drop(["against", "difference"])
    assert (equal == 0.5).all()


# A study's configurations against its first


def test_several_seeds_are_the_replicates_of_the_analysis():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.80, 0.02, (5, 8)), rng.normal(0.83, 0.02, (5, 8))
    (row,) = paired_tests(metrics_of(UNet=a.T, HCP=b.T), ["DSC"]).to_dict("records")
    assert row["p"] == pytest.approx(random_effects((b - a).T).p)
    assert row["mean_difference"] == pytest.approx(np.mean(b) - np.mean(a)) and row["mean_difference"] > 0
    assert (row["configuration"], row["against"], row["cases"], row["replicates"]) == ("HCP", "UNet", 8, 5)


def test_one_seed_has_the_papers_test_alone():
    a, b = [0.81, 0.85, 0.78, 0.90], [0.85, 0.86, 0.80, 0.93]
    (row,) = paired_tests(metrics_of(UNet=np.transpose([a]), HCP=np.transpose([b])), ["DSC"]).to_dict("records")
    assert row[PAPERS_T_TEST] == pytest.approx(ttest_rel(b, a).pvalue) and row[PAPERS_T_TEST] < 0.05
    assert np.isnan(row["p"]) and row["verdict"] == "undecided"


def test_a_configuration_with_other_seeds_is_not_compared():
    metrics = metrics_of(UNet=[[0.8, 0.7], [0.9, 0.8]], HCP=[[0.8], [0.9]])
    with pytest.raises(ValueError, match=r"HCP, UNet: .*HCP-seed1 has every case 0 times"):
        paired_tests(metrics, ["DSC"])


def test_every_configuration_is_tested_against_the_first_on_every_metric():
    metrics = metrics_of(A=[[0.1], [0.2]], B=[[0.3], [0.5]], C=[[0.2], [0.9]]).assign(ASD=lambda t: 1 / t["DSC"])
    table = paired_tests(metrics, ["DSC", "ASD"])
    found = list(table[["configuration", "against", "metric"]].itertuples(index=False, name=None))
    assert found == [(name, "A", metric) for metric in ["DSC", "ASD"] for name in "BC"]


# Collapsed runs


def with_a_collapse(replicates=20, effect=-0.01, folds=None):
    """HCP is lower by `effect` in every replicate, and mostly empty in the first."""
    rng = np.random.default_rng(3)
    control = 0.9 + 0.01 * rng.standard_normal((10, replicates))
    ours = control + effect + 0.0005 * rng.standard_normal(control.shape)
    ours[:6, 0] = 0.0
    metrics = metrics_of(HCP=ours, UNet=control)
    return metrics if folds is None else metrics.assign(fold=0)


def test_with_a_collapse_the_signs_decide():
    metrics = with_a_collapse()
    row = contrasts(metrics, [("HCP", "UNet")], ["DSC"], primary="DSC").iloc[0]
    assert row["p"] > 0.05 and row["verdict"] == "harm"
    assert row["p_adjusted"] == row["p_sign_flip"] == sign_flip(differences(metrics, "HCP", "UNet", "DSC").mean())
    assert (
        "sign flip" in row["answer"] and "collapsed: 1 of 20 [0 to 25 %] against 0 of 20 [0 to 17 %]" in row["answer"]
    )


def test_with_a_collapse_nothing_is_equivalent():
    """A single collapse in 60 replicates: the interval is within the margin, and no equivalence is claimed."""
    rng = np.random.default_rng(3)
    control = 0.9 + 0.001 * rng.standard_normal((100, 60))
    ours = control + 0.0005 * rng.standard_normal(control.shape)
    ours[:51, 0] = 0.0
    row = contrasts(metrics_of(HCP=ours, UNet=control), [("HCP", "UNet")], ["DSC"], margins={"DSC": 0.05}).iloc[0]
    assert row["p_equivalence"] < 0.05 < row["p_equivalence_adjusted"] and row["verdict"] == "undecided"


def test_with_a_collapse_and_few_replicates_nothing_is_decided():
    row = contrasts(with_a_collapse(5, effect=-0.3), [("HCP", "UNet")], ["DSC"], primary="DSC").iloc[0]
    assert np.isnan(row["p_sign_flip"]) and row["p_adjusted"] == 1 and row["verdict"] == "undecided"


def test_with_a_collapse_in_folds_nothing_is_decided():
    cases = [f"case{n}" for n in range(40)]
    rows = [
        {"configuration": arm, "seed": repeat, "fold": n // 4, "case_id": case}
        | {"DSC": 0.0 if arm == "A" and repeat == 0 and n < 4 else 0.9 - 0.2 * (arm == "A") + 1e-4 * n}
        for arm in "AB"
        for repeat in range(2)
        for n, case in enumerate(cases)
    ]
    row = contrasts(pd.DataFrame(rows), [("A", "B")], ["DSC"], primary="DSC").iloc[0]
    assert row["p"] < 0.05 and row["collapsed"] == 1 and row["verdict"] == "undecided"


def test_a_mean_of_arms_counts_the_collapses_of_its_arms():
    metrics = pd.concat([with_a_collapse(), with_a_collapse().replace({"HCP": "again", "UNet": "other"})])
    means = {"mean of HCP, again": ["HCP", "again"]}
    row = contrasts(metrics, [("mean of HCP, again", "UNet")], ["DSC"], means=means).iloc[0]
    assert (row["collapsed"], row["runs"], row["collapsed_against"], row["runs_against"]) == (2, 40, 0, 20)


def test_a_pooled_control_is_the_mean_case_by_case_and_replicate_by_replicate():
    rng = np.random.default_rng(0)
    arms = {name: rng.uniform(0.8, 0.9, (6, 4)) for name in ("HCP", "UNet", "again")}
    row = contrasts(metrics_of(**arms), [("HCP", "both")], ["DSC"], means={"both": ["UNet", "again"]}).iloc[0]
    found = random_effects(arms["HCP"] - (arms["UNet"] + arms["again"]) / 2)
    assert (row["mean_difference"], row["p"]) == pytest.approx((float(found.mean), float(found.p)))


@pytest.mark.parametrize(("collapsed", "runs"), [(0, 20), (1, 20), (8, 20), (20, 20)])
def test_collapses_have_clopper_and_pearsons_limits(collapsed, runs):
    low = beta.ppf(0.025, collapsed, runs - collapsed + 1) if collapsed else 0.0
    high = beta.ppf(0.975, collapsed + 1, runs - collapsed) if collapsed < runs else 1.0
    assert collapse_rate(collapsed, runs) == f"{collapsed} of {runs} [{100 * low:.0f} to {100 * high:.0f} %]"


def test_a_descriptive_contrast_gives_its_interval_and_no_verdict():
    d = tables(1, 20, 6, 0, 0, 0.001, difference=0.05)[0]
    row = answer_to(d, descriptive=True)
    assert row["verdict"] == "not judged" and "p =" not in row["answer"] and "benefit" not in row["answer"]
    assert row["answer"].startswith(f"HCP against UNet, DSC: {row['mean_difference']:+.4f} [{row['low']:+.4f}, ")


@pytest.mark.slow
def test_an_equivalence_shows_the_interval_of_its_two_one_sided_tests():
    """The 90 % interval lies within the margin exactly if both one-sided tests reject at 5 %."""
    for seed in range(40):
        d = tables(1, 10, 8, 0.002, 0.008, 0.01, seed=seed)[0]
        row, margin = answer_to(d), 0.01
        within = -margin < row["low_90"] and row["high_90"] < margin
        assert within == (row["p_equivalence"] < 0.05)
        assert (row["verdict"] == "equivalent") == within == ("(90 %)" in row["answer"])


# What a trial can promise


COMPONENTS = Estimate(0.0, case=0.003**2, replicate=0.014**2, rest=0.023**2)


@pytest.mark.parametrize(("replicates", "half"), [(5, 0.018), (10, 0.010), (20, 0.007)])
def test_the_half_width_is_that_of_the_method(replicates, half):
    """METHOD.md, section on where normal theory is not enough: about these, at 100 cases."""
    assert promised(balanced(COMPONENTS, 100, replicates), 0.01)["half_width"] == pytest.approx(half, abs=6e-4)


@pytest.mark.parametrize(
    ("cases", "replicates", "arms", "against"), [(100, 10, 1, 1), (40, 20, 1, 2), (100, 5, 8, 8)]
)
def test_promises_are_kept_by_simulated_trials(cases, replicates, arms, against):
    """Arms of their own replicate and rest effects, and means of them; 4000 trials, standard error below .8 %."""
    rng, half = np.random.default_rng(5), 4000
    parts = COMPONENTS.case, COMPONENTS.replicate, COMPONENTS.rest
    share = (1 / arms + 1 / against) / 2
    case_sd, replicate_sd, rest_sd = (np.sqrt(part * share) for part in parts)
    d = tables(half, cases, replicates, case_sd, replicate_sd, rest_sd, seed=int(rng.integers(99)))
    promise = promised(balanced(COMPONENTS, cases, replicates, arms, against), 0.01)
    seen = random_effects(d + 0.01)
    assert np.mean(seen.p < 0.05) == pytest.approx(promise["power_at_0.01"], abs=0.03)
    none = random_effects(d)
    chance = np.mean(none.p_equivalence(0.01) < 0.05)  # promised as if the spread were measured without error
    assert chance == pytest.approx(promise["equivalent"], abs=0.06)
    expected = balanced(COMPONENTS, cases, replicates, arms, against)
    assert np.mean(none.variance) == pytest.approx(expected.variance, rel=0.05)
    assert promise["half_width"] == pytest.approx(t.ppf(0.975, expected.df) * np.sqrt(expected.variance))
