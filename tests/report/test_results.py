"""Numbers are gathered from like runs, averaged by case, and nothing undefined is dropped in silence."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mupkg.configurations import TABLE_II
from mupkg.report.results import (
    as_table,
    case_metrics,
    finished_runs,
    per_case,
    published,
    published_as_text,
    save_table,
    shown,
    summary,
)

NAMES = ("DSC", "ASD")
nan, inf = float("nan"), float("inf")


def write_run(root, name, dsc, asd=None, cases=None, trained_on="1234", **parameters):
    folder = root / name
    folder.mkdir(parents=True)
    record = {"data_fingerprint": trained_on, "parameters": {"configuration": name, "anchors": 20} | parameters}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    asd = [1.0] * len(dsc) if asd is None else asd
    cases = [f"{i:03d}" for i in range(len(dsc))] if cases is None else cases
    pd.DataFrame({"case_id": cases, "DSC": dsc, "ASD": asd}).to_csv(folder / "metrics.csv", index=False)


def metrics_of(**columns):
    """One metric, DSC, of configurations on cases; a list of lists is seeds."""
    rows = []
    for configuration, values in columns.items():
        for seed, scores in enumerate(values if isinstance(values[0], list) else [values]):
            for case, score in enumerate(scores):
                rows.append({"configuration": configuration, "seed": seed, "case_id": f"{case:03d}", "DSC": score})
    return pd.DataFrame(rows)


# Runs


def test_runs_of_nnunet_are_listed_where_they_are_asked_for(tmp_path):
    """They have no weights of ours, so what needs a network must not meet them."""
    for name in ("UNet-seed0", "nnUNet-seed0", "nnUNet-HCP-seed0"):
        write_run(tmp_path, name, [0.5])
    names = {"all": ["UNet", "nnUNet", "nnUNet-HCP"], "ours": ["UNet"], "one": ["nnUNet-HCP"]}
    assert finished_runs(tmp_path)["configuration"].tolist() == names["ours"]
    assert finished_runs(tmp_path, names["all"])["configuration"].tolist() == names["all"]
    assert finished_runs(tmp_path, names["one"])["configuration"].tolist() == names["one"]
    assert len(case_metrics(finished_runs(tmp_path, names["all"]))) == 3


def test_runs_come_in_table_iis_order_with_others_behind(tmp_path):
    for name in (
        "MetricUNet-HCP-seed1",
        "MetricUNet-HCP-seed0",
        "UNet-seed0",
        "MetricUNet-HCR-seed0",
        "UNet++-seed10",
    ):
        write_run(tmp_path, name, [0.5])
    (tmp_path / "MetricUNet-R-seed0").mkdir()  # not finished
    (tmp_path / "stage1").mkdir()
    table = finished_runs(tmp_path)
    found = list(zip(table["configuration"], table["seed"], strict=True))
    assert found == [("UNet", 0), ("UNet++", 10), ("MetricUNet-HCP", 0), ("MetricUNet-HCP", 1), ("MetricUNet-HCR", 0)]
    assert all((folder / "metrics.csv").is_file() for folder in table["folder"])


def test_runs_come_in_the_order_asked_for(tmp_path):
    for name in ("UNet-seed0", "MetricUNet-R-seed0", "MetricUNet-H-seed0"):
        write_run(tmp_path, name, [0.5])
    assert list(finished_runs(tmp_path, ["MetricUNet-R", "UNet"])["configuration"]) == ["MetricUNet-R", "UNet"]


def test_a_run_that_is_not_there_is_missed(tmp_path):
    with pytest.raises(ValueError, match="no finished run of any configuration; train it with notebook 03"):
        finished_runs(tmp_path)
    write_run(tmp_path, "UNet-seed0", [0.5])
    with pytest.raises(ValueError, match="no finished run of MetricUNet-R, VNet; train it with notebook 03"):
        finished_runs(tmp_path, ["UNet", "MetricUNet-R", "VNet"])


def test_runs_of_one_seed_are_those_alone(tmp_path):
    for name in ("UNet-seed0", "UNet-seed1", "MetricUNet-R-seed0"):
        write_run(tmp_path, name, [0.5])
    assert list(finished_runs(tmp_path, seed=0)["configuration"]) == ["UNet", "MetricUNet-R"]
    assert list(finished_runs(tmp_path, seed=1)["configuration"]) == ["UNet"]
    with pytest.raises(
        ValueError, match=r"no finished run of MetricUNet-R with seed 1; train it with notebook 03 .*, or choose"
    ):
        finished_runs(tmp_path, ["UNet", "MetricUNet-R"], seed=1)
    with pytest.raises(
        ValueError, match="no finished run of any configuration with seed 7; train it with notebook 03"
    ):
        finished_runs(tmp_path, seed=7)


def test_metrics_are_gathered_with_names_as_text(tmp_path):
    write_run(tmp_path, "UNet-seed0", [0.5, 0.7])
    write_run(tmp_path, "UNet-seed1", [0.6, 0.8])
    metrics = case_metrics(finished_runs(tmp_path))
    assert metrics["case_id"].tolist() == ["000", "001", "000", "001"]
    assert metrics["seed"].tolist() == [0, 0, 1, 1]
    assert metrics["DSC"].tolist() == [0.5, 0.7, 0.6, 0.8]


@pytest.mark.parametrize("other", [["000", "002"], ["000"]])
def test_runs_on_other_cases_are_not_compared(tmp_path, other):
    """Regression: the first run was the yardstick, and a good one was blamed for the case that the first lacked."""
    write_run(tmp_path, "UNet-seed0", [0.5, 0.7])
    write_run(tmp_path, "MetricUNet-R-seed0", [0.5] * len(other), cases=other)
    with pytest.raises(ValueError, match=r"MetricUNet-R-seed0.*lacks the test case\(s\) 001; test the run again"):
        case_metrics(finished_runs(tmp_path).iloc[::-1])


def regions_of(tmp_path, *cases, fingerprint="1234"):
    return SimpleNamespace(folder=tmp_path / "stage1", ids=lambda split: list(cases), fingerprint=lambda: fingerprint)


def test_a_test_case_that_every_run_lacks_is_missed(tmp_path):
    for name in ("UNet-seed0", "MetricUNet-R-seed0"):
        write_run(tmp_path, name, [0.5, 0.7])
    assert len(case_metrics(finished_runs(tmp_path), regions_of(tmp_path, "000", "001"))) == 4
    with pytest.raises(ValueError, match=r"UNet-seed0.metrics\.csv: lacks the test case\(s\) 002, 003; test the run"):
        case_metrics(finished_runs(tmp_path), regions_of(tmp_path, "000", "002", "001", "003"))
    with pytest.raises(ValueError, match=r"lacks the test case\(s\) 002 and was tested on others: 001; test"):
        case_metrics(finished_runs(tmp_path), regions_of(tmp_path, "000", "002"))


def test_regions_cut_anew_after_all_trainings_are_seen(tmp_path):
    for name in ("UNet-seed0", "MetricUNet-R-seed0"):
        write_run(tmp_path, name, [0.5])
    with pytest.raises(ValueError, match=r"regions\.csv: its regions are not those .* train every run of the study"):
        case_metrics(finished_runs(tmp_path), regions_of(tmp_path, "000", fingerprint="5678"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text('{"parameters": {}}'),
        lambda path: path.write_text('{"data_fingerprint": "1234", "parameters": 3}'),
    ],
)
def test_a_run_without_a_record_is_named(tmp_path, spoil):
    for name in ("UNet-seed0", "MetricUNet-R-seed0"):
        write_run(tmp_path, name, [0.5])
    spoil(tmp_path / "MetricUNet-R-seed0" / "run.json")
    with pytest.raises(ValueError, match=r"MetricUNet-R-seed0.run\.json: does not tell .*run its notebook again"):
        case_metrics(finished_runs(tmp_path))


@pytest.mark.parametrize("name", ["anchors", "steps", "learning_rate", "margin", "batch_size", "precision", "cohort"])
def test_runs_trained_otherwise_are_not_compared(tmp_path, name):
    for run, value in {"UNet-seed0": 1, "MetricUNet-R-seed0": 1, "MetricUNet-R-seed1": 2}.items():
        write_run(tmp_path, run, [0.5], **{name: value})
    found = rf"same settings .*: {name} is 1 in \S+-seed0, 2 in MetricUNet-R-seed1; train them alike"
    with pytest.raises(ValueError, match=found):
        case_metrics(finished_runs(tmp_path))


def test_every_setting_that_differs_is_told(tmp_path):
    write_run(tmp_path, "UNet-seed0", [0.5], steps=600, momentum=0.9)
    write_run(tmp_path, "UNet++-seed0", [0.5], steps=900, momentum=0.8)
    with pytest.raises(
        ValueError, match=r"momentum is 0\.9 in UNet-seed0, 0\.8 in UNet.*; steps is 600 in UNet-seed0"
    ):
        case_metrics(finished_runs(tmp_path))


def test_speed_place_and_what_never_reaches_a_baseline_may_differ(tmp_path):
    write_run(tmp_path, "UNet-seed0", [0.5], study="a", data_folder="x", workers=0, channels_last=True, film=True)
    write_run(tmp_path, "MetricUNet-R-seed3", [0.5], seed=3, study="b", data_folder="y", workers=4, anchors=50)
    assert len(case_metrics(finished_runs(tmp_path))) == 2


# Averages


def test_cases_are_averaged_over_seeds_first():
    metrics = metrics_of(A=[[0.5, 0.7, 0.9], [0.7, 0.7, 0.5]], B=[0.1, 0.2, 0.3])
    cases = per_case(metrics, "DSC")
    assert list(cases.columns) == ["A", "B"]
    np.testing.assert_allclose(cases["A"], [0.6, 0.7, 0.7])
    table = summary(metrics, ["DSC"])
    assert table.loc["A", ("DSC", "mean")] == pytest.approx(2 / 3)
    assert table.loc["A", ("DSC", "std")] == pytest.approx(np.std([0.6, 0.7, 0.7], ddof=1))  # over cases, not seeds
    assert table.loc["A", ("DSC", "median")] == pytest.approx(0.7)
    assert table.loc["A", ("DSC", "n")] == 3
    assert table[("", "seeds")].to_dict() == {"A": 2, "B": 1}


def test_the_order_is_that_of_the_runs():
    metrics = metrics_of(**{"UNet": [0.1, 0.2], "MetricUNet-HCP": [0.3, 0.4], "MetricUNet-C": [0.5, 0.6]})
    assert list(summary(metrics, ["DSC"]).index) == ["UNet", "MetricUNet-HCP", "MetricUNet-C"]
    assert list(per_case(metrics, "DSC").columns) == ["UNet", "MetricUNet-HCP", "MetricUNet-C"]


def test_what_is_undefined_is_counted():
    table = summary(metrics_of(A=[0.5, nan, 0.9], B=[nan, nan, nan], C=[0.1, 0.2, 0.3]), ["DSC"])["DSC"]
    assert table["n"].tolist() == [2, 0, 3] and table["undefined"].tolist() == [1, 3, 0]
    assert table["mean"].tolist()[::2] == pytest.approx([0.7, 0.2]) and np.isnan(table["mean"]["B"])


def test_an_infinite_distance_makes_its_mean_infinite():
    table = summary(metrics_of(A=[1.0, inf, 3.0]), ["DSC"])["DSC"]
    assert table["mean"]["A"] == inf and table["median"]["A"] == 3.0
    assert (table["n"]["A"], table["undefined"]["A"]) == (3, 0)


@pytest.mark.parametrize("value", [nan, inf])
def test_one_undefined_seed_leaves_its_case_undefined(value):
    cases = per_case(metrics_of(A=[[0.5, 0.7], [value, 0.9]], B=[0.1, 0.2]), "DSC")
    np.testing.assert_equal(cases["A"].to_numpy(), [value, 0.8])


def test_a_case_undefined_everywhere_is_still_a_case():
    cases = per_case(metrics_of(A=[nan, 0.7], B=[nan, 0.2]), "DSC")
    assert list(cases.index) == ["000", "001"]
    assert summary(metrics_of(A=[nan, 0.7], B=[nan, 0.2]), ["DSC"])[("DSC", "undefined")].tolist() == [1, 1]


def test_a_summary_to_read_has_one_number_a_cell_and_what_is_the_same_in_its_head():
    table = as_table(summary(metrics_of(A=[[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]], B=[0.1, 0.2]), ["DSC"]))
    assert table["", "seeds"].to_dict() == {"A": 3, "B": 1}
    parts = [("DSC, n = 2", part) for part in ("mean", "sd", "median")]
    assert list(table) == [("", "seeds"), ("", "collapsed"), *parts]
    assert table.loc["A"].tolist() == [3, 0, "0.700", "0.141", "0.700"]


def test_a_summary_to_read_says_what_was_undefined_and_where_n_differs():
    table = summary(metrics_of(A=[0.5, nan, 0.9], B=[1.0, inf, 3.0], C=[0.25, 0.25, 0.25]), ["DSC"])
    text = as_table(table)["DSC"]
    assert text.loc["A"].to_dict() == {"mean": "0.700", "sd": "0.283", "median": "0.700", "n": 2, "undefined": 1}
    assert text.loc["B"].tolist() == [inf, "", "3.00", 3, 0]


def test_of_one_case_no_deviation_is_shown():
    assert list(as_table(summary(metrics_of(A=[0.5], B=[0.7]), ["DSC"]))["DSC, n = 1"]) == ["mean", "median"]


def test_a_collapsed_run_is_counted_in_the_summary_and_stays_in_its_mean():
    table = as_table(summary(metrics_of(A=[[0.8, 0.6], [0.0, 0.0]], B=[[0.8, 0.6], [0.0, 0.5]]), ["DSC"]))
    assert table["", "collapsed"].to_dict() == {"A": 1, "B": 0}
    assert table["DSC, n = 2", "mean"]["A"] == "0.350"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (25.50601, "25.5"), (0.64, "0.640"), (551.264, "551"), (99.96, "100"), (99.94, "99.9"), (0.0071, "0.00710"),
        (-195.645, "-196"), (0.0, "0.00"), (8.6e-06, "8.60e-06"), (12345.6, "12346"), (nan, ""), (inf, inf),
        (-inf, -inf), (7, 7), (True, True), ("a", "a"), ([1.2345], [1.2345]),
    ],
)  # fmt: skip
def test_a_table_to_read_has_three_digits(value, text):
    assert shown(pd.DataFrame({"x": pd.Series([value, "b"], dtype=object)})).loc[0, "x"] == text


def test_a_table_to_read_names_units_and_leaves_out_what_is_empty_altogether():
    table = pd.DataFrame({"HD95": [4.5678, nan], "DSC_all": [0.9, 0.8], "p": [nan, nan], "aRVD_all": [1.0, 2.0]})
    table[3] = [1, 2]
    assert list(shown(table)) == ["HD95 (mm)", "DSC_all", "aRVD_all (%)", 3]
    assert shown(table)["HD95 (mm)"].tolist() == ["4.57", ""]
    assert list(table) == ["HD95", "DSC_all", "p", "aRVD_all", 3]


# Tables


def test_published_tables_are_at_hand():
    assert {*published(3)["configuration"]} == {*TABLE_II}
    for number in (4, 5, 6):
        assert len(published(number))


def test_a_table_is_saved_and_given_back(tmp_path):
    table = pd.DataFrame({"DSC": [0.5, nan]}, index=["A", "B"])
    assert save_table(table, tmp_path / "new" / "t.csv") is table
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "t.csv", index_col=0), table)
    save_table(table, tmp_path / "t.csv", index=False)
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()[0] == "DSC"


def test_published_tables_are_shown_with_the_papers_digits_and_without_what_they_lack():
    text = published_as_text(3)
    assert text.loc["MetricUNet-R-Sep", "DSC"].to_dict() == {"mean": "0.8514", "sd": "0.0506", "median": "0.8550"}
    assert list(text.index) == list(published(3)["configuration"])
    assert " nan" not in published_as_text(4).to_string().lower()
    assert list(published_as_text(6)["DSC"]) == ["mean"]
