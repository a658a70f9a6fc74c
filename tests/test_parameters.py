"""A notebook's parameters are right, or it fails before any work, naming the parameter and what is allowed."""

import json
import re
import subprocess
import sys
from inspect import signature
from itertools import combinations
from math import prod
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill import inspect_notebook
from papermill.translators import PythonTranslator

from mupkg import repository
from mupkg.configurations import build
from mupkg.data.preprocessing import Preparation
from mupkg.parameters import (
    SIZES,
    CohortSettings,
    DataSettings,
    EvaluationSettings,
    ExploreSettings,
    ExternalSettings,
    MetricOptions,
    NnunetSettings,
    ReportSettings,
    SegmentSettings,
    Stage1Settings,
    Stage2Settings,
    Tag,
    VisualizationSettings,
    tagged,
)
from mupkg.settings import check_name
from mupkg.stages.runs import MAX_CHANNELS, load_tensors, require
from mupkg.trials.protocol import ParameterStudySettings, Study, TrialSettings, read_yaml
from mupkg.trials.statistics import contrasts

STUDIES = sorted((repository() / "notebooks/studies").rglob("[!c]*.yaml"))  # all but the profiles' config.yaml
PARAMETERS = """configuration: str = "MetricUNet-HCP"  # a row of Table II
seed: int = 0  # of weights
steps: int | None = None  # SGD steps"""


def told(*cells, settings=Stage2Settings):
    """What a notebook makes of its cells, run one after the other like a kernel does."""
    namespace = {}
    for cell in cells:
        exec(cell, namespace)
    return settings.from_notebook(namespace, ["", *cells])


# From a notebook


def test_the_parameters_cell_is_read():
    settings = told(PARAMETERS)
    assert (settings.configuration, settings.seed, settings.steps) == ("MetricUNet-HCP", 0, 1200)


def test_what_papermill_injects_counts():
    settings = told(PARAMETERS, '# Parameters\nconfiguration = "MetricUNet-CH"\nseed = 3\nsteps = 7\n')
    assert (settings.configuration, settings.seed, settings.steps) == ("MetricUNet-HC", 3, 7)
    assert settings.run_path.name == "MetricUNet-HC-seed3"


def test_an_unknown_parameter_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown parameter 'sed'; there are: .*\bseed\b.*restart the kernel"):
        told(PARAMETERS, "# Parameters\nsed = 3\n")


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("seed = -1", ("'seed'", "greater than or equal to 0", "-1")),
        ('seed = "many"', ("'seed'", "integer", "'many'")),
        ("steps = -5", ("'steps'", "greater than 0", "-5")),
        ('size = "huge"', ("'size'", "'smoke', 'quick' or 'paper'", "'huge'")),
        ("patch_size = 20", ("'patch_size'", "multiple of 8", "20")),
        ('configuration = "MetricUNet-X"', ("'configuration'", "valid names are", "MetricUNet-X")),
        ('study = "../elsewhere"', ("'study'", "plain folder name", "../elsewhere")),
        ("momentum = 1.0", ("'momentum'", "less than 1", "1.0")),
        ('precision = "fp8"', ("'precision'", "'no', 'bf16' or 'fp16'", "fp8")),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(cell, parts):
    with pytest.raises(ValueError, match="parameter") as error:
        told(PARAMETERS, cell)
    assert all(part.strip("'") in str(error.value) for part in parts)
    assert len(str(error.value).splitlines()) == 1


def test_all_wrong_parameters_are_told_at_once():
    with pytest.raises(ValueError, match="parameter") as error:
        told(PARAMETERS, 'seed = -1\nsizes: int = 3\nmargin = "wide"')
    assert len(str(error.value).splitlines()) == 3


WAYS = {  # of setting seed to 5 and steps to 600, beside other things that a cell may do
    "print": "seed: int = 5\nsteps: int = 600\nprint(seed)",
    "import": "import os\nseed = 5\nsteps = 600",
    "calculation": "seed = 5\nsteps: int = 10 * 60",
    "of each other": "seed = 5\nsteps = seed * 120",
    "f-string": "number = 5\nseed = int(f'{number}')\nsteps = 600",
    "chain": "seed = first = 5\nsteps = 600",
    "tuple": "seed, steps = 5, 600",
    "star": "seed, *rest = 5, 600\n(steps,) = rest",
    "if": "seed = 5\nif seed == 5:\n    steps = 600\nelse:\n    steps = 6",
    "augmented": "seed = 2\nseed += 3\nsteps = 60\nsteps *= 10",
    "walrus": "print(seed := 5, steps := 600)",
    "for": "for seed in range(6):\n    steps = 100 * (seed + 1)",
    "with": "from contextlib import nullcontext\nwith nullcontext(5) as seed:\n    steps = 600",
    "try": "try:\n    seed = int('five')\nexcept ValueError:\n    seed = 5\nsteps = 600",
    "match": "match 5, 600:\n    case seed, steps:\n        pass",
    "unpacked": "globals().update({'seed': 5, 'steps': 600})",
    "global": "def choose():\n    global seed, steps\n    seed, steps = 5, 600\nchoose()",
    "docstring": '"""What this run is about."""\nseed = 5\nsteps = 600',
    "of an object": "from argparse import Namespace\ngiven = Namespace(a=5, b=600)\nseed, steps = given.a, given.b",
    "loop over helpers": "seeds = [1, 5]\nfor seed in seeds:\n    pass\nsteps = 600",
}


def test_parameters_count_however_they_were_set():
    """Regression: a cell that was not literal throughout was passed over, and all was left at its default."""
    for way, cell in WAYS.items():
        for cells in ([PARAMETERS, cell], [cell], [cell, "seed = 5"]):
            settings = told(*cells)
            assert (settings.seed, settings.steps) == (5, 600), way


def test_a_misspelt_name_is_seen_if_it_has_an_annotation_or_papermill_sets_it():
    unknown = r"^unknown parameter '\w+'; there are: study, .* begin with _"
    annotated = (
        "sede: int = 3",
        "epochs : int = len('abc')",
        'lr: "float" = 0.1\nprint(lr)',
        "lr: dict[str, int] = {}",
    )
    for cell in WAYS.values():
        for slip in annotated:
            for cells in ([PARAMETERS, cell, slip], [slip, cell], [f"{cell}\n{slip}"]):
                with pytest.raises(ValueError, match=unknown):
                    told(*cells)
        for slip in ("sed = 3", "_sed = 3", "lr = 0.1\nseed = 5", "epochs = [\n    1,\n    2,\n]"):
            with pytest.raises(ValueError, match=unknown):
                told(PARAMETERS, f"# Parameters\n{slip}\n", cell)


def test_what_papermill_injects_is_read_in_its_own_words():
    values = {"sed": "a = 1\nlr = 2", "lr": [1, "b = 3"], "epochs": {"c": None}, "stpes": float("inf"), "film": True}
    with pytest.raises(ValueError, match="unknown") as error:
        told(PARAMETERS, PythonTranslator.codify(values))
    assert {line.split("'")[1] for line in str(error.value).splitlines()} == {*values} - {"film"}


def test_near_names_of_an_unknown_one_are_offered():
    for slip, near in {
        "sede": "seed",
        "stpes": "steps",
        "pair_wieght": "pair_weight",
        "patchsize": "patch_size",
    }.items():
        with pytest.raises(ValueError, match=rf"unknown parameter '{slip}'; .*\. Did you mean {near}"):
            told(PARAMETERS, f"{slip}: int = 3")
    with pytest.raises(ValueError, match=r"unknown parameter 'xyz'; there are: (\w+, )+\w+ \(a name of your own"):
        told(PARAMETERS, "xyz: int = 3")


@pytest.mark.parametrize(
    "cell",
    [
        "x = 1\nprint(x)",
        "sed = 3",
        "x = {}\nx['a'] = 1",
        "_lr: float = 0.1",
        "cases = [1, 2]\nseed = min(cases) - 1",
        "def lr():\n    sed: int = 3",
        "class Mine:\n    sed: int = 3",
        "print('''\nsed: an int = 3\n''')",
        "sed: int",
        "",
    ],
)
def test_names_of_ones_own_are_no_parameters(cell):
    assert told(PARAMETERS, cell) == told(PARAMETERS)


def in_ipython(*cells, settings=Stage2Settings, without=()):
    """What a notebook makes of its cells in a shell of their own, whose namespace lacks some names."""
    shell = InteractiveShell.instance()
    try:
        for cell in cells:
            shell.run_cell(cell, store_history=True).raise_error()
        namespace = {name: value for name, value in shell.user_ns.items() if name not in without}
        return settings.from_notebook(namespace, shell.user_ns["In"])
    finally:
        InteractiveShell.clear_instance()


def test_a_cell_under_a_magic_is_a_cell():
    settings = in_ipython(PARAMETERS, "%%time\nseed: int = 5\nsteps = 600", "%%capture said\nprint(3)")
    assert (settings.seed, settings.steps) == (5, 600)
    if sys.version_info < (3, 14):  # a later one forgets them with the next statement
        with pytest.raises(ValueError, match="unknown parameter 'sed'"):
            in_ipython("%%time\nseed = 5\nsed: int = 3")


def test_a_misspelt_name_is_seen_where_the_kernel_forgets_annotations():
    """Python 3.14 replaces them with every statement that a kernel runs."""
    with pytest.raises(ValueError, match="unknown parameter 'sed'"):
        in_ipython("import os\nsed: int = 3  # of weights\nsteps: int = 600", "x = 3", without={"__annotations__"})


def test_cells_after_the_settings_do_not_hinder_when_these_are_asked_for_again():
    cells = PARAMETERS, "sizes = len('abc')", "x = 5", "seed = 5"
    assert in_ipython(*cells).seed == 5


def test_a_parameter_that_was_put_to_another_use_is_told_shortly():
    with pytest.raises(ValueError, match=r"parameter cohort: .*; run the cell that sets it again") as error:
        Stage2Settings.from_notebook({"cohort": list(map(Path, "a" * 500))}, [])
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("name", "most"),
    {
        "steps": 10**7,
        "batch_size": 4096,
        "base_filters": 512,  # so that the lowest level, eight times as wide, has no more than 4096 channels
        "embedding_dim": 4096,
        "anchors": 10_000,
        "pairs": 1000,
    }.items(),
)
def test_a_number_that_no_memory_holds_is_refused(name, most):
    """Regression: torch or numpy failed to allocate, hours later or in words that name no parameter."""
    assert getattr(told(PARAMETERS, f"{name} = {most}"), name) == most
    with pytest.raises(ValueError, match=rf"parameter {name}: .*less than or equal to {most} \(given: {most + 1}\)"):
        told(PARAMETERS, f"{name} = {most + 1}")


@pytest.mark.parametrize(("settings", "name"), [(Stage1Settings, "filters"), (Stage2Settings, "base_filters")])
def test_what_may_be_trained_may_be_loaded(settings, name):
    """Regression: a width was trained with that the saved file is then refused for."""
    widest = {n: most for n, most in MAX_CHANNELS.items() if n in settings.model_fields}
    require(settings(**widest).model_dump(), (name,), Path("w"))
    for wide in widest:
        with pytest.raises(ValueError, match=wide):
            settings(**{wide: widest[wide] + 1})
        with pytest.raises(ValueError, match=f"another network .it says {wide}"):
            require(widest | {wide: widest[wide] + 1}, (name,), Path("w"))


@pytest.mark.parametrize("settings", [Stage1Settings, Stage2Settings])
def test_a_batch_that_batch_norm_cannot_train_on_is_refused(settings):
    with pytest.raises(ValueError, match=r"patch_size 8 with batch_size 1 .* one of them must be larger"):
        told("patch_size = 8\nbatch_size = 1", settings=settings)
    assert settings(patch_size=8, batch_size=2) != settings(patch_size=16, batch_size=1)


@pytest.mark.parametrize("name", ["steps", "seed", "anchors", "learning_rate", "margin"])
def test_a_switch_is_no_number(name):
    with pytest.raises(ValueError, match=rf"parameter {name}: .*must not be True or False"):
        told(PARAMETERS, f"{name} = True")
    with pytest.raises(ValueError, match=r"region_mm: .*must not be True or False"):
        Stage1Settings.from_notebook({"region_mm": [True, 90.0, 90.0]}, [])
    assert told(PARAMETERS, "film = True").film


def test_a_name_that_was_deleted_is_no_parameter():
    assert told(PARAMETERS, "sed: int = 3", "del sed").seed == 0


@pytest.mark.parametrize(
    ("settings", "given", "way_out"),
    [
        (CohortSettings, {"cohort": 7}, r"papermill's -r cohort takes a number for text, .*quotes.* \(given: 7\)"),
        (Stage1Settings, {"study": 1e5}, "papermill's -r study "),
        (EvaluationSettings, {"configurations": [4]}, "papermill's -r configurations "),
        (CohortSettings, {"spacing_mm": "[3, 1.5, 1]"}, r"papermill takes a list by -y 'spacing_mm: \[3, 1.5, 1\]'"),
        (CohortSettings, {"window_hu": "[0, 9]"}, r"papermill takes a list by -y 'window_hu: \[0, 9\]'"),
        (CohortSettings, {"roi": '["Prostate", "prostate_*"]'}, "must not be a text in brackets; .* by -y 'roi: "),
        (EvaluationSettings, {"configurations": "UNet"}, r"papermill takes a list by -y 'configurations: \[UNet\]'"),
        (Stage1Settings, {"region_mm": "90, 90, 90"}, r"by -y 'region_mm: \[90, 90, 90\]'"),
    ],
)
def test_what_papermill_p_makes_of_text_and_lists_is_refused_with_the_way_out(settings, given, way_out):
    with pytest.raises(ValueError, match=way_out):
        settings.checked(given)


def test_brackets_may_be_part_of_a_roi_s_name():
    for roi in ("CTV [Prostate]", "[1] Prostate", ["[Prostate]"]):
        CohortSettings(source="dicom_rt", source_folder="scans", roi=roi)


def test_a_name_too_long_for_a_file_is_told_as_that():
    """Regression: an OSError in the middle of the work. A file's name may have 255 bytes."""
    for settings, name in ((Stage1Settings, "study"), (CohortSettings, "cohort"), (Stage2Settings, "arm")):
        assert getattr(settings(**{name: "a" * 225}), name) == "a" * 225
        for long in ("a" * 226, "a" * 240, "\u00e4" * 113):
            with pytest.raises(ValueError, match=rf"{name}: .*a name of {len(long)} characters is too long"):
                settings.checked({name: long})
    for path in ("x/" + "b" * 256, "c" * 300 + "/x"):
        with pytest.raises(ValueError, match=r"output: .*a name of \d+ characters is too long for a file"):
            SegmentSettings.checked({"run": "x", "scan": "y", "output": path})
    assert SegmentSettings(run="x", scan="/".join(["d" * 255] * 3)).scan


def test_none_is_what_the_size_says_and_nothing_else_is():
    assert told(PARAMETERS, "steps = None\nlearning_rate = None") == told(PARAMETERS)
    for name, value in {"steps": 0, "learning_rate": 0.0, "study": "", "batch_size": []}.items():
        with pytest.raises(ValueError, match=f"parameter {name}"):
            told(PARAMETERS, f"{name} = {value!r}")
    for name, value in {
        "source_folder": "",
        "spacing_mm": [],
        "label_values": [],
        "phantoms": 0,
        "channel": -1,
    }.items():
        with pytest.raises(ValueError, match=f"parameter {name}"):
            told(f"{name} = {value!r}", settings=CohortSettings)
    with pytest.raises(ValueError, match="parameter configurations"):
        told("configurations = []", settings=EvaluationSettings)


def test_a_path_may_be_a_path_or_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/anywhere")
    settings = told(
        "from pathlib import Path\nrun = Path('outputs') / 'x'\nscan = '~/x.mha'", settings=SegmentSettings
    )
    assert (settings.run, settings.scan) == ("outputs/x", "/anywhere/x.mha")


# In the notebooks

NOTEBOOKS = {
    "00_prepare_cohort": CohortSettings,
    "01_data_exploration": DataSettings,
    "02_stage1_localization": Stage1Settings,
    "03_stage2_training": Stage2Settings,
    "04_evaluation": EvaluationSettings,
    "05_visualization": VisualizationSettings,
    "06_parameter_studies": ParameterStudySettings,
    "07_external_validation": ExternalSettings,
    "08_explore": ExploreSettings,
    "09_segment_a_patient": SegmentSettings,
    "10_does_it_help": TrialSettings,
    "11_nnunet": NnunetSettings,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_offers_all_parameters_with_the_defaults_that_they_have(name):
    path, settings = repository() / "notebooks" / f"{name}.ipynb", NOTEBOOKS[name]
    first, second, *_ = (cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    namespace = {}
    exec(first, namespace)
    assert f"settings = {settings.__name__}.from_notebook(globals(), In)" in second
    assert {name for name in namespace if not name.startswith("__")} == {*settings.model_fields}
    needed = {n: namespace[n] for n, field in settings.model_fields.items() if field.is_required()}
    assert settings.from_notebook(namespace, ["", first]) == settings(**needed)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_shows_every_parameter_with_its_type_and_its_comment(name):
    shown = inspect_notebook(str(repository() / "notebooks" / f"{name}.ipynb"))
    assert set(shown) == set(NOTEBOOKS[name].model_fields)
    assert all(parameter["inferred_type_name"] != "None" and parameter["help"] for parameter in shown.values())
    for parameter in shown.values():
        assert (parameter["default"] == "None") == parameter["inferred_type_name"].startswith("Optional[")


# What made a run


def test_what_made_the_shipped_runs_is_told_by_their_parameters():
    """Settings that came later their weights may lack."""
    stage1, *runs = (
        repository() / "data" / "demo" / name for name in ("stage1", "UNet-seed0", "MetricUNet-HCP-seed0")
    )
    weights = [(folder / "weights.safetensors", folder, Stage2Settings) for folder in runs]
    for path, folder, settings in [*weights, (runs[0] / "localizer.safetensors", stage1, Stage1Settings)]:
        parameters = json.loads((folder / "run.json").read_bytes())["parameters"]
        _, stored = load_tensors(path)
        for name, value in settings.checked(parameters).made_by().items():
            assert value == (value | stored[name] if isinstance(value, dict) else stored[name])


def test_the_options_of_the_loss_are_those_of_build():
    options = Stage2Settings(metric_weight=0.3, hinge=False).loss_options
    assert (options["weight"], options["hinge"]) == (0.3, False)
    network_and_sizes = {"configuration", "in_channels", "base_filters", "embedding_dim"}
    assert {*options} | network_and_sizes == {*signature(build).parameters}
    for name, value in MetricOptions().loss_options.items():
        assert signature(build).parameters[name].default == value


def test_every_setting_reaches_the_weights_or_is_known_not_to():
    for settings in (Stage1Settings, Stage2Settings):
        made_by = settings().made_by(data="")
        told = {*made_by, *made_by["training"], *made_by.get("loss", {})}
        told |= {"metric_weight"} if "weight" in told else set()
        untold = {*settings.model_fields} - told
        assert untold == tagged(settings, Tag.NAME, Tag.SPEED, Tag.BLOCKS) - told | {"cohort", "size"} | (
            untold & {"training_cases", "label_noise_mm"}
        )
        assert told >= tagged(settings, Tag.NETWORK, Tag.TRAINING, Tag.METRIC)


# Sizes


@pytest.mark.parametrize("size", SIZES)
def test_a_size_says_everything_that_is_left_open(size):
    for settings in (Stage1Settings(size=size), Stage2Settings(size=size)):
        assert settings.model_dump().items() >= SIZES[size][settings.stage].items()
        untold = {name for name, value in settings.model_dump().items() if value is None}
        assert untold <= {"control", "infonce_temperature", "replicate", "arm", "training_cases"}
    assert CohortSettings(size=size).preparation.spacing_mm == SIZES[size]["cohort"]["spacing_mm"]


def test_what_is_given_comes_before_the_size():
    settings = Stage2Settings(size="smoke", steps=5, learning_rate=0.5)
    assert (settings.steps, settings.learning_rate) == (5, 0.5)
    assert settings.batch_size == SIZES["smoke"]["stage2"]["batch_size"]


def test_vnet_takes_blocks_that_hold_as_many_slices_as_a_batch_but_at_least_two():
    plain = Stage2Settings(size="paper", seed=3)
    assert plain.patch_source_options == {"patch_size": (64, 64), "batch_size": 30, "seed": 3}
    assert Stage2Settings(size="paper", configuration="VNet").patch_source_options["batch_size"] == 2
    blocks = Stage2Settings(configuration="VNet", batch_size=80).patch_source_options
    assert (blocks["batch_size"], blocks["depth"]) == (5, 16)
    made_by = [Stage2Settings(configuration="VNet", depth=depth).made_by() for depth in (16, 48)]
    assert [about["depth"] for about in made_by] == [16, 48]
    assert Stage2Settings(depth=48).made_by() == Stage2Settings().made_by()
    for wrong in ({"depth": 24}, {"depth": 8}, {"configuration": "VNet", "patch_size": 56}):
        with pytest.raises(ValueError, match=r"multiple of 16|greater than or equal to 16"):
            Stage2Settings.checked(wrong)
    assert Stage2Settings(patch_size=56).patch_source_options["patch_size"] == (56, 56)


def test_the_papers_numbers():
    paper = Stage2Settings(size="paper")
    names = ("batch_size", "patch_size", "base_filters", "embedding_dim", "learning_rate")
    assert [getattr(paper, name) for name in names] == [30, 64, 32, 256, 0.01]
    assert (paper.anchors, paper.pairs, paper.threshold, paper.margin) == (20, 1, 0.1, 0.7)
    assert (paper.metric_weight, paper.pair_weight, paper.pair_distance) == (0.01, 0.1, 0.01)
    stage1 = Stage1Settings(size="paper")
    assert (stage1.filters, stage1.coarse_mm, stage1.region_mm) == (32, 4.0, (128.0,) * 3)
    assert CohortSettings(size="paper").preparation == Preparation()


# Names and folders


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a/", "a\\b", "..\\a"])
def test_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(ValueError, match="plain folder name"):
        check_name(name)
    for settings in (Stage1Settings, ReportSettings):
        for field in ("study", "cohort"):
            with pytest.raises(ValueError, match="plain folder name"):
                settings(**{field: name})
    with pytest.raises(ValueError, match="plain folder name"):
        CohortSettings(cohort=name)


def test_folders_hang_together(tmp_path):
    settings = Stage2Settings(study="s", cohort="c", data_folder="d", outputs_folder=str(tmp_path))
    assert settings.cohort_path == repository() / "d" / "c"
    assert settings.stage1_path == tmp_path / "s" / "stage1"
    assert settings.run_path == tmp_path / "s" / "MetricUNet-HCP-seed0"


def test_the_repository_is_found_wherever_the_kernel_was_started(monkeypatch, tmp_path):
    root = Path(__file__).parents[1]
    for folder in (root, root / "notebooks", tmp_path):
        monkeypatch.chdir(folder)
        assert repository() == root


# Cohorts


def test_a_source_needs_its_folder():
    with pytest.raises(ValueError, match="source 'pattern' needs source_folder"):
        told('source: str = "pattern"', settings=CohortSettings)


@pytest.mark.parametrize("folder", ["data/mine", "data/mine/images", "data/other/../mine"])
def test_a_cohort_is_not_written_over_its_own_source(folder):
    with pytest.raises(ValueError, match="about to be written; move it"):
        CohortSettings(cohort="mine", source="table", source_folder=folder)


def test_a_source_of_the_other_modality_is_seen_at_once(tmp_path):
    """PROMISE12 prepared by a CT window would be one grey."""
    with pytest.raises(ValueError, match="source 'promise12' is MR; set modality to 'MR'"):
        CohortSettings(source="promise12", source_folder=str(tmp_path))
    with pytest.raises(ValueError, match="source 'phantoms' is CT"):
        CohortSettings(modality="MR")


def test_the_chosen_source_is_asked(monkeypatch, tmp_path):
    asked = {}
    for name in (f"sources_from_{name}" for name in ("pattern", "table", "dicom_rt")):
        monkeypatch.setattr(f"mupkg.data.build.{name}", lambda *a, name=name, **k: asked.update({name: (a, k)}) or [])
    common = {"source_folder": str(tmp_path), "modality": "MR"}

    def told(source, **given):
        settings = CohortSettings(source=source, **given, **common)
        settings.sources()
        place, options = asked[f"sources_from_{'table' if source == 'table' else 'pattern'}"]
        assert place == (tmp_path,) and options.pop("modality") == "MR"
        assert settings.preparation.channel == options.get("channel")
        return options

    files = {"image_pattern": "{case}_image.nii.gz", "label_pattern": "{case}_label.nii.gz"}
    assert told("pattern", label_values=[1, 2], channel=0) == files | {"label_values": (1, 2), "channel": 0}
    assert told("table") == {}
    files = {"image_pattern": "{case}.mhd", "label_pattern": "{case}_segmentation.mhd"}
    assert told("promise12", label_values=[3], channel=1) == files | {"label_values": (3,), "channel": 1}
    files = {"image_pattern": "imagesTr/{case}.nii.gz", "label_pattern": "labelsTr/{case}.nii.gz"}
    assert told("decathlon") == files | {"label_values": (1, 2), "channel": 0}
    assert told("decathlon", label_values=[2], channel=1) == files | {"label_values": (2,), "channel": 1}
    CohortSettings(source="dicom_rt", roi=[" CTV "], hash_patients=True, fill_gaps=True, **common).sources()
    options = {"modality": "MR", "hash_patients": True, "fill_gaps": True}
    assert asked["sources_from_dicom_rt"] == ((tmp_path, ("CTV",)), options)


@pytest.mark.parametrize(
    ("given", "source", "sources"),
    [
        ({"label_values": [5]}, "phantoms", "'pattern' or 'table' or 'promise12' or 'decathlon'"),
        ({"channel": 0}, "dicom_rt", "'pattern' or 'table' or 'promise12' or 'decathlon'"),
        ({"roi": "CTV"}, "table", "'dicom_rt'"),
        ({"image_pattern": "{case}.nrrd"}, "table", "'pattern'"),
        ({"label_pattern": "{case}-l.nrrd"}, "promise12", "'pattern'"),
    ],
)
def test_what_the_source_has_no_use_for_is_refused(given, source, sources, tmp_path):
    modality = "MR" if source == "promise12" else "CT"
    common = {"source": source, "source_folder": str(tmp_path), "modality": modality}
    CohortSettings(**common)
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} does nothing with source '{source}'; .* set source to {sources}"):
        CohortSettings(**common, **given)


def test_repeats_without_folds_are_refused():
    with pytest.raises(ValueError, match="repeats does nothing with folds None; leave it out, or set folds, too"):
        CohortSettings(repeats=2)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (
            {"test_phantoms": 5},
            "test_phantoms does nothing with replicates None; .* or set replicates, too",
        ),
        (
            {"source": "pattern", "modality": "MR", "window_hu": (0, 9)},
            "window_hu .* modality 'MR'; leave it out",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(given, refused, tmp_path):
    with pytest.raises(ValueError, match=refused):
        CohortSettings(source_folder=str(tmp_path), **given)


def test_the_channel_goes_along_with_the_preparation(tmp_path):
    """So that a run knows which volume of a 4D scan it was trained on; old ones know of none."""
    common = {"source_folder": str(tmp_path), "modality": "MR"}
    asked = {("decathlon", None): 0, ("decathlon", 1): 1, ("pattern", 2): 2, ("table", None): None}
    for (source, channel), wanted in asked.items():
        settings = CohortSettings(source=source, channel=channel, **common)
        assert settings.preparation.channel == wanted
        assert Preparation.model_validate_json(settings.preparation.model_dump_json()).channel == wanted
    assert Preparation.model_validate({"modality": "CT"}).channel is None


def test_phantoms_are_as_many_as_asked_from_the_seed_on():
    names = [source.case_id for source in CohortSettings(phantoms=4, seed=7).sources()]
    assert names == ["phantom-0007", "phantom-0008", "phantom-0009", "phantom-0010"]
    assert len(CohortSettings(size="quick").sources()) == 40
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        CohortSettings(phantoms=2)


# Other notebooks and studies


def test_a_segmentation_needs_a_run_and_a_scan():
    with pytest.raises(ValueError, match="scan"):
        told('run: str = "outputs/x"', settings=SegmentSettings)


def written(folder: Path, text: str) -> Path:
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    return folder / "study.yaml"


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("study: s\ncohort: c\nstudy: t\n", "study", (1, 3)),
        ("study: s\nstage2:\n  steps: 3\n  # more\n  momentum: 0.8\n  steps: 4\n", "steps", (3, 6)),
        ("study: s\nstage2: {steps: 3,\n  'steps': 4}\n", "steps", (2, 3)),
        ("study: s\ntrial:\n  arms:\n    A: {margin: 1}\n    A: {margin: 2}\n", "A", (4, 5)),
        ("seeds:\n- 1\n- {a: 1,\n   a: 2}\n", "a", (3, 4)),
        ('{"study": "s",\n "study": "t"}', "study", (1, 2)),
        ("base: &b {steps: 3}\nstage2: {<<: *b,\n <<: *b}\n", "<<", (2, 3)),
    ],
)
def test_a_key_given_twice_is_told_with_both_lines(text, key, lines, tmp_path):
    """Regression: the last one won without a word."""
    path = written(tmp_path, text)
    for read in (Study.read, lambda path: TrialSettings(protocol=str(path)).study):
        with pytest.raises(ValueError, match=rf"(?s)study\.yaml: .*the key '{key}' is given.*again") as error:
            read(path)
        assert tuple(map(int, re.findall(r"line (\d+)", str(error.value)))) == lines


def test_a_study_file_may_use_anchors_and_merge_them(tmp_path):
    text = "a: &a {x: 1, y: 1}\np: {b: &b {<<: *a, x: 2}}\nc: {<<: *b, x: 3}\nd: {1: x, '2': x}\n"
    told = read_yaml(written(tmp_path, text))
    assert told["c"] == {"x": 3, "y": 1} and told["p"]["b"] == {"x": 2, "y": 1} and told["d"] == {1: "x", "2": "x"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [("study: [s", "flow sequence"), ("a:\n\tb: c", "line 2"), ("- s", "dictionary"), ("", "dictionary")],
)
def test_a_file_that_is_no_study_is_told_by_name(text, fault, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=rf"(?s)study\.yaml: .*{fault}"):
        Study.read(path)
    with pytest.raises(ValueError, match=r"no_such\.yaml"):
        Study.read(tmp_path / "no_such.yaml")
    path.write_bytes(b"study: \xff")
    with pytest.raises(ValueError, match=r"study\.yaml: "):
        Study.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_written_as_yaml_says_the_same(path, tmp_path):
    study = Study.read(path)
    again = Study.read(written(tmp_path, study.as_yaml()))
    assert again == study and list(again.runs) == list(study.runs)
    if study.trial:
        assert list(again.trial.arms) == list(study.trial.arms) and again.as_yaml() == study.as_yaml()


def test_a_study_file_is_checked():
    study = Study(study="s", cohort="c", configurations=["MetricUNet-RC", "UNet"], seeds=[0, 1])
    assert study.configurations == ("MetricUNet-CR", "UNet")
    with pytest.raises(ValueError, match="valid names are"):
        Study(study="s", cohort="c", configurations=["VNetty"])
    with pytest.raises(ValueError, match="seedz"):
        Study(study="s", cohort="c", configurations=["UNet"], seedz=[0])


STUDY = {"study": "s", "cohort": "c", "configurations": ["UNet", "MetricUNet-HCP"]}


@pytest.mark.parametrize(
    ("section", "names"),
    {
        "prepare": ("cohort", "size", "data_folder"),
        "stage1": ("study", "cohort", "size", "data_folder", "outputs_folder"),
        "stage2": ("study", "cohort", "size", "data_folder", "outputs_folder", "configuration", "seed"),
        "report": ("study", "cohort", "size", "data_folder", "outputs_folder", "configurations", "seed"),
        "explore": ("study_folder", "pictures_folder", "configurations", "seed"),
    }.items(),
)
def test_what_the_study_itself_sets_is_no_parameter_of_a_section(section, names):
    """Regression: with `stage2: {seed: 3}` every run trained into the folder of seed 3, and none was found."""
    for name in names:
        with pytest.raises(ValueError, match=rf"{section}: must leave out {name}: .* at the top of the study file"):
            Study.checked(STUDY | {section: {name: 3}})
    with pytest.raises(ValueError, match=f"{section}: unknown parameter 'sede'; there are: ") as error:
        Study.checked(STUDY | {section: {"sede": 3}})
    allowed = str(error.value).split("there are: ")[1].split(" (given")[0].split(", ")
    assert allowed and not set(names) & set(allowed)


def test_what_the_study_does_not_set_is_left_to_its_sections():
    sections = {"prepare": {"seed": 3, "source": "table"}, "stage1": {"seed": 2}, "stage2": {"film": True}}
    sections |= {"report": {"cases": 2}, "explore": {"viewer": "slices"}}
    study = Study.checked(STUDY | sections)
    assert {name: getattr(study, name) for name in sections} == sections


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"configurations": []}, "either its configurations or a trial"),
        ({"seeds": []}, "parameter seeds: .* at least 1 item"),
        ({"configurations": ["UNet", "UNet"]}, "parameter configurations: .*name each one once, not UNet, UNet"),
        ({"configurations": ["MetricUNet-HC", "MetricUNet-CH"]}, "once, not MetricUNet-HC, MetricUNet-HC"),
        ({"seeds": [1, 0, 1]}, "parameter seeds: .*name each one once, not 1, 0, 1"),
        ({"threads": {"stage1": True}}, "threads.stage1: .*integer"),
        ({"threads": {"stage3": 1}}, "threads.stage3.*'stage1' or 'stage2'"),
        ({"size": "paper", "stage1": {"patch_size": 8, "batch_size": 1}}, "stage1: .*patch_size 8 with batch_size 1"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_with_what_is_allowed(wrong, fault):
    with pytest.raises(ValueError, match=fault):
        Study.checked(STUDY | wrong)


def test_threads_of_one_stage_leave_the_others_as_they_are():
    assert Study.checked(STUDY).threads == {"stage1": 2, "stage2": 1}
    assert Study.checked(STUDY | {"threads": {"stage1": 4}}).threads == {"stage1": 4, "stage2": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("size: smoke\nsize: quick", "the key 'size' is given"),
        (
            "configuration: [UNet]",
            "unknown parameter 'configuration'; there are: study, cohort, size, configurations, trial, seeds",
        ),
        (
            "trial: {name: t, replicates: 2, arms: {A: {configuration: UNet}, B: {configuration: UNet++}}, "
            "contrasts: [[C, A]]}",
            "there is no arm C; there are A, B",
        ),
    ],
)
def test_a_slip_in_a_study_file_is_explained_by_the_batch(more, told, tmp_path, warm):
    """Regression: what pydantic says of it, with a link to its own pages."""
    file = tmp_path / "study.yaml"
    file.write_text(f"study: s\ncohort: c\n{more}\n", encoding="utf-8")
    command = [*warm, "snakemake", "--configfile", str(file), "--dry-run", "--nolock"]
    done = subprocess.run(command, cwd=repository(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1
    assert told in done.stdout
    assert "pydantic" not in done.stdout and "kernel" not in done.stdout and "Traceback" not in done.stdout


# Trials


TRIAL = {
    "name": "e0",
    "replicates": 2,
    "arms": {"A": {"configuration": "UNet"}, "B": {"configuration": "MetricUNet-HCP", "metric_weight": 0.1}},
    "contrasts": [["B", "A"]],
}


def study_with(trial: dict, **more) -> Study:
    told = {"study": "s", "cohort": "c", "size": "smoke", "prepare": {"replicates": 2}}
    return Study.checked(told | {"trial": trial, **more})


def test_a_trial_tells_every_run_its_arm_replicate_and_seed():
    arms = TRIAL["arms"] | {"A-again": {"configuration": "UNet", "seed_offset": 1000}}
    runs = study_with(TRIAL | {"arms": arms}).runs
    assert list(runs) == ["A-seed0", "B-seed0", "A-again-seed1000", "A-seed1", "B-seed1", "A-again-seed1001"]
    assert runs["A-again-seed1001"] == {"arm": "A-again", "replicate": 1, "seed": 1001, "configuration": "UNet"}
    assert runs["B-seed0"]["metric_weight"] == 0.1


def test_with_folds_every_replicate_has_a_stage_1_of_its_own():
    told = {"prepare": {"source": "table", "folds": 5, "repeats": 3}, "source_folder": "x"}
    assert study_with(TRIAL | {"replicates": 10}, **told).runs["B-seed1"]["stage1"] == "stage1-replicate1"


@pytest.mark.parametrize(("prepare", "own"), [({"folds": "5"}, True), ({"folds": None, "replicates": 2}, False)])
def test_folds_are_read_as_notebook_00_reads_them(prepare, own):
    """Regression: "5" was a TypeError, and None gave every replicate a stage 1 of its own."""
    source = {"source": "phantoms"} if "replicates" in prepare else {"source": "table"}
    study = study_with(
        TRIAL | {"replicates": 2 if "replicates" in prepare else 5}, prepare=source | prepare, source_folder="x"
    )
    assert ("stage1" in study.runs["A-seed0"]) == own and study.folds == (5 if own else None)


@pytest.mark.parametrize("options", [{"patch_size": 56}, {"dice": True}])
def test_what_a_configuration_cannot_take_is_told_before_any_other_is_trained(options):
    with pytest.raises(ValueError, match="VNet-seed0: "):
        Study.checked({"study": "s", "cohort": "c", "configurations": ["UNet", "VNet"], "stage2": options})


def test_mr_is_not_tested_on_shifts_in_hu_and_that_is_told_before_the_first_training():
    study = {"study": "s", "cohort": "c", "configurations": ["UNet"], "source_folder": "x"}
    study |= {"prepare": {"source": "pattern", "modality": "CT"}, "stage2": {"test_shifts": ["noise"]}}
    Study.checked(study)
    with pytest.raises(ValueError, match="test_shifts: noise is for CT; these scans are MR, so leave it out"):
        Study.checked(study | {"prepare": {"source": "pattern", "modality": "MR"}})


@pytest.mark.parametrize(
    ("replicates", "prepare", "fault"),
    [
        (3, {"replicates": 2}, "trial: 3 replicates, but notebook 00 would make 2"),
        (2, {}, "trial: 2 replicates, but notebook 00 would make 0; under prepare, set replicates"),
        (2, {"source": "promise12", "modality": "MR"}, "would make 0; under prepare, .* or folds and repeats"),
        (
            6,
            {"source": "promise12", "modality": "MR", "folds": 5},
            "trial: 6 replicates, but notebook 00 would make 5",
        ),
        (6, {"source": "table", "folds": 5, "repeats": 2}, "6 replicates are no whole repeats of 5 folds"),
        (2, {"replicates": 2, "folds": 5}, "replicates and folds are two ways"),
    ],
)
def test_replicates_that_the_cohort_will_not_have_are_told_before_any_training(replicates, prepare, fault):
    with pytest.raises(ValueError, match=fault):
        study_with(TRIAL | {"replicates": replicates}, prepare=prepare, source_folder="x")


def test_a_table_may_bring_replicates_of_its_own():
    assert len(study_with(TRIAL, prepare={"source": "table"}, source_folder="x").runs) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"contrasts": [["C", "A"]]}, "there is no arm C; there are A, B"),
        ({"arms": {"A": {"configuration": "UNet"}, "B": {"configuration": "UNet", "steps": 9}}}, "arm B: steps"),
        ({"arms": {"A": {"configuration": "UNet"}, "B": {"margin": 1.0}}}, "arm B: must name its configuration"),
        ({"arms": {"A": {"configuration": "UNet"}, "B": {"configuration": "Net"}}}, "arm B .*unknown configuration"),
        ({"arms": {"A": {"configuration": "UNet"}}}, "arms"),
        (
            {"arms": TRIAL["arms"] | {"C": {"configuration": "UNet", "seed_offset": "x"}}},
            "arm C: seed_offset must be",
        ),
        ({"arms": TRIAL["arms"] | {"C": {"configuration": "UNet", "seed_offset": -1}}}, "arm C .*seed"),
        (
            {"arms": TRIAL["arms"] | {"C": {"configuration": "UNet"}}, "contrasts": [["C", "A"]]},
            "C and A are the same; let them differ",
        ),
        ({"contrasts": [["A", "A"]]}, "A and A share an arm; name each one once"),
        ({"contrasts": [["A", ["A", "B"]]]}, "A and mean of A, B share an arm; name each one once"),
        ({"contrasts": [["A", ["B", "C"]]]}, "there is no arm C"),
        ({"contrasts": [["A", ["B"]]]}, "at least 2 items"),
        ({"contrasts": [["B", "A"], ["A", "B"]]}, "must name each one once, in one direction"),
        ({"varies": ["bach_size"]}, r"varies.0: .*'batch_size'.*given: 'bach_size'"),
        (
            {"varies": ["seed", "steps", "cohort"]},
            r"(?s)varies.0: .*given: 'seed'.*varies.2: .*given: 'cohort'",
        ),
        ({"primary": "DCS"}, "primary: .*'DSC'.*'ASD'"),
        ({"replicates": 0}, "replicates"),
        ({"replicates": 1}, "replicates"),
    ],
)
def test_a_trial_that_cannot_be_judged_is_refused_before_any_training(change, told):
    with pytest.raises(ValueError, match=told):
        study_with(TRIAL | change)


def test_a_side_of_a_contrast_may_be_the_mean_of_several_arms():
    arms = TRIAL["arms"] | {"A-again": {"configuration": "UNet", "seed_offset": 9}}
    trial = study_with(TRIAL | {"arms": arms, "contrasts": [["B", ["A", "A-again"]], ["B", "A"]]}).trial
    assert trial.pairs == [("B", "mean of A, A-again"), ("B", "A")]
    assert trial.means == {"mean of A, A-again": ["A", "A-again"]}


def test_what_a_trial_varies_may_differ_between_its_arms():
    arms = {"2": {"configuration": "UNet", "batch_size": 2}, "4": {"configuration": "UNet", "batch_size": 4}}
    trial = TRIAL | {"arms": arms, "contrasts": [["4", "2"]], "varies": ["batch_size"]}
    assert study_with(trial).runs["4-seed1"]["batch_size"] == 4


R = {"configuration": "MetricUNet-R"}


def by_parameter(**others: dict) -> Study:
    arms = {"R": R} | {name: R | other for name, other in others.items()}
    contrasts = [[name, "R"] for name in others]
    return study_with(TRIAL | {"arms": arms, "contrasts": contrasts, "by_parameter": True})


FOUR = {  # a half of 2^3: P is there with both or with none of H and N
    "R": {"configuration": "MetricUNet-RP"},
    "HN": {"configuration": "MetricUNet-HNP"},
    "H": {"configuration": "MetricUNet-H"},
    "RN": {"configuration": "MetricUNet-RN"},
}


def with_factors(factors: list[str], arms: dict[str, dict]) -> Study:
    return study_with({"name": "e", "replicates": 2, "factors": factors, "arms": arms})


def test_a_factor_is_a_letter_of_the_configuration_or_a_setting_of_two_values():
    trial = with_factors(["H", "N", "P"], FOUR).trial
    assert trial.levels["P"] == {"with P": ["R", "HN"], "without P": ["H", "RN"]}
    with pytest.raises(ValueError, match="arm with H: is what a mean of arms is called"):
        with_factors(["H", "N", "P"], dict(zip(["with H", *list(FOUR)[1:]], FOUR.values(), strict=True)))
    assert trial.pairs == [("with H", "without H"), ("with N", "without N"), ("with P", "without P")]
    dsc = {"R": 0.68, "HN": 0.70, "H": 0.75, "RN": 0.67}  # .7 + .05 for H, - .03 for N, - .02 for P
    runs = [
        {"configuration": arm, "seed": s, "case_id": c, "DSC": dsc[arm]} for arm in dsc for s in (0, 1) for c in "xy"
    ]
    judged = contrasts(pd.DataFrame(runs), trial.pairs, ["DSC"], means=trial.means)
    assert judged["mean_difference"].tolist() == pytest.approx([0.05, -0.03, -0.02])
    heavy = {"metric_weight": 0.1}
    arms = {"A": R, "B": R | {"margin": 1.0}, "C": R | heavy, "D": R | heavy | {"margin": 1.0}}
    arms |= {f"{name}-u": given | {"normalize": True} for name, given in arms.items()}
    levels = with_factors(["metric_weight", "margin", "normalize"], arms).trial.levels
    assert levels["metric_weight"] == {
        "metric_weight 0.1": ["C", "D", "C-u", "D-u"],
        "metric_weight 0.01": ["A", "B", "A-u", "B-u"],
    }
    assert list(levels["normalize"]) == ["with normalize", "without normalize"]


@pytest.mark.parametrize(
    ("factors", "change", "told"),
    [
        (["H", "N", "X"], {}, "factors: X must have two values.* what varies is H, R, N, P"),
        (["H", "N", "P", "C"], {}, "factors: C must have two values"),
        (
            ["H", "N", "P", "R"],
            {},
            "factors: R must have each of its values in half of the arms with either value of H",
        ),
        (["H", "N"], {}, "factors: arms differ in P as well; name it, or let all arms have the same"),
        (
            ["H", "N", "P"],
            {"RN": {"configuration": "MetricUNet-RNP"}},
            "factors: P must have each .* half of the arms",
        ),
        (["H", "N", "P"], {"RN": {"configuration": "MetricUNet-HN"}}, "factors: H must have each"),
        (
            ["H", "N", "P"],
            {"RN": R | {"configuration": "MetricUNet-RN", "margin": 1.0}},
            "arms differ in margin as well",
        ),
        (
            ["H", "N", "P"],
            {"RN": {"configuration": "MetricUNet-RN", "seed_offset": 9}},
            "differ in seed_offset as well",
        ),
        (["H", "N", "P"], {"RN": {"configuration": "MetricUNet+-RN"}}, "unknown configuration"),
    ],
)
def test_factors_that_cannot_be_told_apart_are_refused(factors, change, told):
    with pytest.raises(ValueError, match=told):
        with_factors(factors, FOUR | change)


def test_a_trial_without_contrasts_and_factors_compares_nothing():
    with pytest.raises(ValueError, match="contrasts: must name a pair of arms at least, or factors"):
        study_with(TRIAL | {"contrasts": []})


def test_e3_is_of_resolution_iv_with_the_words_of_its_head():
    """Signs multiplied: a word is a set of factors whose product is the same in every arm."""
    path = repository() / "notebooks/studies/trials/e3.yaml"
    trial = Study.read(path).trial
    sign = {
        name: [1 if arm in next(iter(of.values())) else -1 for arm in trial.arms] for name, of in trial.levels.items()
    }
    words = {
        frozenset(names)
        for order in range(1, len(sign) + 1)
        for names in combinations(sign, order)
        if abs(sum(prod(signs) for signs in zip(*(sign[name] for name in names), strict=True))) == len(trial.arms)
    }
    assert words == {
        frozenset(word.split()) for word in ("C P metric_weight normalize", "H N P metric_weight", "H C N normalize")
    }
    assert len(trial.arms) == 16 and [*trial.levels] == ["H", "C", "N", "P", "metric_weight", "normalize"]


TRIALS = sorted((repository() / "notebooks/studies/trials").glob("*.yaml"))


@pytest.mark.slow
def test_trials_that_share_a_study_mean_the_same_by_a_run_s_name():
    """They skip what another has trained already: its folder says which run it is."""
    told = {}
    for path in TRIALS:
        study = Study.read(path)
        for run, settings in study.runs.items():
            known = told.setdefault((study.study, run), (study.stage2, settings))
            assert known == (study.stage2, settings), (path, run)


def test_a_study_of_parameters_sorts_its_arms_by_what_they_vary():
    study = by_parameter(wide={"margin": 1.0}, narrow={"margin": 0.1}, many={"anchors": 50})
    assert study.trial.parameters == {
        "margin": {0.1: "narrow", 0.7: "R", 1.0: "wide"},
        "anchors": {20: "R", 50: "many"},
    }
    assert list(study.trial.parameters["margin"]) == [0.1, 0.7, 1.0]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"margin": 1.0, "anchors": 50}, "arm X: differs from the first arm in margin, anchors"),
        ({}, "arm X: differs from the first arm in nothing"),
        ({"configuration": "MetricUNet-H"}, "arm X: differs from the first arm in configuration"),
        ({"normalize": True}, "arm X: differs from the first arm in normalize"),
        ({"control": "shuffled"}, "must differ in one number of the metric loss"),
    ],
)
def test_arms_of_a_study_of_parameters_differ_in_one_number(other, told):
    with pytest.raises(ValueError, match=told):
        by_parameter(X=other)


@pytest.mark.slow
def test_notebook_06_refuses_a_trial_that_is_none_of_parameters():
    assert ParameterStudySettings().study.trial.name == "parameters"
    with pytest.raises(ValueError, match=r"e1\.yaml: is no study of parameters"):
        ParameterStudySettings.checked({"protocol": "notebooks/studies/trials/e1.yaml"})


def test_a_study_names_its_configurations_or_a_trial_and_not_both():
    for wrong in ({"trial": TRIAL, "configurations": ["UNet"]}, {}):
        with pytest.raises(ValueError, match="either its configurations or a trial"):
            Study.checked({"study": "s", "cohort": "c", **wrong})
