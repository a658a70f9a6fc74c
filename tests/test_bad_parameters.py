"""Wrong parameters of every notebook are refused by name, with what is allowed, before anything is written."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoiling import *  # noqa

from mupkg.parameters import (
    CohortSettings,
    ExploreSettings,
    NnunetSettings,
    ReportSettings,
    SegmentSettings,
    Settings,
    Stage1Settings,
    Stage2Settings,
)
from mupkg.trials.protocol import Study

# Parameters

GIVEN = {SegmentSettings: {"run": "a", "scan": "b"}, Study: {"study": "a", "cohort": "b", "configurations": ["UNet"]}}
NAMES = {"study": (7, "../x"), "cohort": (["a"], r"..\x"), "data_folder": (7, ""), "outputs_folder": (True, "a\0b")}
TRAINING = {
    "size": (7, "huge"),
    "stage1": (7, "../stage1"),
    "seed": ("many", -1),
    "replicate": ("all", -1),
    "steps": ("many", -5),
    "batch_size": (1.5, -1),
    "patch_size": ([8], 20),
    "learning_rate": ("fast", float("inf")),
    "precision": (16, "fp8"),
}
WRONG = {  # of every parameter of every notebook: a wrong type and a value out of range
    CohortSettings: {
        "cohort": (7, "a/b"),
        "source": (["table"], "web"),
        "source_folder": (7, "  "),
        "size": (7, "huge"),
        "modality": (7, "PET"),
        "spacing_mm": (["a", 1, 1], [0.0, 1.0, 1.0]),
        "window_hu": ("wide", [240.0, -160.0]),
        "image_pattern": (7, "image.nii.gz"),
        "label_pattern": (["{case}"], "/{case}.nii.gz"),
        "label_values": ([1.5], [0]),
        "channel": ("T2", -1),
        "roi": (7, ""),
        "hash_patients": ("perhaps", 2),
        "fill_gaps": ("perhaps", 2),
        "phantoms": ("many", 10**9),
        "replicates": ("many", 0),
        "test_phantoms": ("many", 0),
        "folds": ("many", 2),
        "repeats": ("many", 0),
        "seed": (1.5, 2**31),
        "data_folder": (7, ""),
    },
    Stage1Settings: {
        **NAMES,
        **TRAINING,
        "filters": ("many", -1),
        "coarse_mm": ("4 mm", 0.0),
        "region_mm": ([128.0, 128.0], [128.0, 128.0, 1e6]),
    },
    Stage2Settings: {
        **NAMES,
        **TRAINING,
        "configuration": (7, "MetricUNet-X"),
        "arm": (7, "a/b"),
        "training_cases": ("all", 0),
        "label_noise_mm": ("some", -1.0),
        "choose_from": ("late", 1.5),
        "base_filters": ("many", -1),
        "depth": (16.5, 24),
        "embedding_dim": (0.5, -8),
        "validate_every": ("often", -1),
        "momentum": ("some", 1.0),
        "weight_decay": ("some", -1e-4),
        "anchors": ("many", 0),
        "pairs": (1.5, 0),
        "threshold": ("low", 1.0),
        "margin": ("wide", -0.7),
        "metric_weight": ("some", float("nan")),
        "pair_weight": ("some", -0.1),
        "pair_distance": ([0.01], -0.01),
        "normalize": ("perhaps", 2),
        "hinge": ("perhaps", 2),
        "control": (True, "voxel"),
        "infonce_temperature": ("warm", 0.0),
        "dice": ("perhaps", 2),
        "channels_last": ("perhaps", 2),
        "compile": ("perhaps", 2),
        "workers": ("many", -1),
        "deterministic": ([True], -1),
        "film": ("perhaps", 2),
        "test_last": ("perhaps", 2),
        "test_shifts": ("noise", ["blur"]),
    },
    ReportSettings: {
        **NAMES,
        "size": (7, "huge"),
        "configurations": ("UNet", ["../UNet"]),
        "seed": ("all", -1),
        "cases": ("all", 0),
        "real_scan": (7, "a\nb"),
    },
    NnunetSettings: {
        **NAMES,
        "size": (7, "huge"),
        "configurations": ("nnUNet", ["nnUNet-HC"]),
        "seed": ("many", -1),
        "replicate": ("all", -1),
        "epochs": ("many", 0),
        "iterations": (1.5, -1),
        "batch": ("all", 0),
        "width": ("wide", 10**6),
    },
    ExploreSettings: {
        "study_folder": (7, ""),
        "case_id": (7, "../a"),
        "configurations": ("UNet", ["../UNet"]),
        "seed": ("all", -1),
        "viewer": (3, "vtk"),
        "per_kind": ("many", 1),
        "projection": (2, "LDA"),
        "anchors": ("many", 201),
        "pairs": (1.5, 11),
        "threshold": ("low", 0.99),
        "margin": ("wide", -0.7),
        "patch": ([8], 20),
        "pictures_folder": (7, "  "),
    },
    SegmentSettings: {"run": (7, ""), "scan": (["a"], " "), "output": (7, ""), "precision": (16, "fp16")},
    Study: {
        **NAMES,
        "size": (7, "huge"),
        "configurations": ("UNet", ["UNet3"]),
        "trial": ("all", {"name": "t"}),
        "seeds": ("all", [-1]),
        "source_folder": (7, ""),
        "prepare": ("all", {"phantoms": 1}),
        "stage1": ([1], {"step": 5}),
        "stage2": ("all", {"momentum": 2.0}),
        "report": ("all", {"cases": 0}),
        "external": ("all", {"zero_shot": ""}),
        "explore": ("all", {"viewer": "vtk"}),
        "segment_case": ("perhaps", 2),
        "threads": (2, {"stage1": 0}),
    },
}


def from_notebook(model: type[Settings], **parameters: object) -> Settings:
    """As in a notebook into which papermill has put these."""
    parameters = GIVEN.get(model, {}) | parameters
    return model.from_notebook(parameters, ["", "\n".join(["# Parameters", *(f"{name} = 0" for name in parameters)])])


def test_no_parameter_is_left_out_of_the_corpus():
    for model, wrong in WRONG.items():
        assert set(wrong) == set(model.model_fields), model


def refusal(model: type[Settings], name: str, value: object) -> str:
    try:
        return f"taken, as {getattr(from_notebook(model, **{name: value}), name)!r}"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("model", WRONG, ids=lambda model: model.__name__)
def test_a_wrong_parameter_is_named_with_what_is_allowed_and_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mupkg.parameters.repository", lambda: tmp_path)  # where relative paths lead
    monkeypatch.chdir(tmp_path)
    for name, values in WRONG[model].items():
        for value in values:
            message = refusal(model, name, value)
            assert re.match(r"parameter \w+", message) and name in message, (name, value)
            assert re.search(r"should|must|required|valid names are|there are:", message)  # what is allowed
            assert not list(tmp_path.iterdir()), (name, value)


@pytest.mark.parametrize("model", WRONG, ids=lambda model: model.__name__)
def test_an_unknown_parameter_is_told_with_those_there_are(model):
    with pytest.raises(ValueError, match=r"unknown parameter 'sede'; there are: .*\w"):
        from_notebook(model, sede=1)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["UNet", "CT", "paper"]),
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=8), SCALARS, max_size=3), st.binary()
)


@pytest.mark.slow
@pytest.mark.parametrize("model", WRONG, ids=lambda model: model.__name__)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_parameters_make_a_model_or_an_error_that_names_one_of_them(model, data):
    names = st.sampled_from([*model.model_fields, "sede"])
    parameters = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=4))
    try:
        assert isinstance(from_notebook(model, **parameters), model)
    except ValueError as error:
        found = re.match(r"(?:unknown )?parameter '?(\w+)", str(error))
        assert found
        if found[1] != "combination":
            assert found[1] in parameters
        else:
            assert any(name in str(error) for name in parameters)
