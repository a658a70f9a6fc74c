"""What every test runs under: one thread, and the method's signatures checked at run time."""

import locale
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jaxtyping
import numpy as np
import pytest
import torch
from real_scans import real_scans
from warm_python import warm_python

torch.set_num_threads(1)  # results do not depend on the machine's cores, and parallel test runs do not fight

# Shapes and types of the method's signatures are checked at every call. The hook works on modules imported after
# it, so it must come before the first import of mupkg. An int is a good float, as everywhere in Python.
jaxtyping.install_import_hook(
    [f"mupkg.{module}" for module in ("models", "samplers", "losses", "configurations", "metrics")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_locale() -> Iterator[None]:
    """Writing DICOM, as tests do, leaves the process with ASCII for its text files."""
    before = locale.setlocale(locale.LC_CTYPE)
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the signature checks, as users run it: for tests of what the code itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Their tests start kernels, browsers, studies and processes, search whole scans or read all tables: seconds each.
SLOW = {"benchmarks", "lab", "lessons", "notebooks", "soak"}
SLOW |= {f"test_{name}.py" for name in ("batch", "batch_from_kept", "claims", "demo_pair", "distributed")}
SLOW |= {f"test_{name}.py" for name in ("field_cases", "kept_tables", "landmarks")}
# The longest first, so that no worker is left alone with one of them at the end.
LONGEST = ("test_notebooks", "test_kill", "test_lessons", "test_batch_from_kept", "test_distributed")
LONGEST += ("test_bench", "test_claims", "test_field_cases", "test_gpu_minutes", "test_notebook_08", "test_any_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m "not slow"` leaves out what takes long, `-m real_scans` runs what wants real scans, and nothing else."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))  # else as they were
    for item in items:
        if SLOW & {*item.path.relative_to(Path(__file__).parent).parts}:
            item.add_marker("slow")
        if "real_scan" in getattr(item, "fixturenames", ()):
            item.add_marker("real_scans")


@pytest.fixture(scope="session")
def real_scan() -> Callable[[str], Path]:
    """The path of a real scan, or of a folder of some, by its name; the test is skipped where it is not at hand."""
    folder = real_scans()

    def path_of(name: str) -> Path:
        if folder is None or not (folder / name).exists():
            pytest.skip(f"no real scans: MUPKG_REALDATA names no folder with {name}")
        return folder / name

    return path_of


@pytest.fixture(scope="session")
def _warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], dict[str, str]]]:
    with warm_python(tmp_path_factory.mktemp("warm")) as command_and_environment:
        yield command_and_environment


@pytest.fixture(scope="module")
def warm(_warm_python: tuple[list[str], dict[str, str]]) -> Iterator[list[str]]:
    """What `python -m` is in a command that starts warm; the kernels of this module's tests do, too."""
    command, environment = _warm_python
    with mock.patch.dict(os.environ, environment):
        yield command


# A chain at smoke size for the tests that only look at it: what one of them changes, it copies first.


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory):
    """Three coarse phantoms, prepared: one to train on, one to validate on, one to test on."""
    from mupkg.data.build import sources_from_phantoms, write_cohort
    from mupkg.data.preprocessing import Preparation

    sources = sources_from_phantoms(range(3), (7.0, 6.0, 6.0))
    return write_cohort(
        tmp_path_factory.mktemp("data") / "phantoms", sources, Preparation(spacing_mm=(6.0, 5.0, 5.0)), split_seed=0
    )


def stage1_of(cohort, study: Path):
    """Stage 1 of a cohort with an untrained light UNet of two channels: its folder is complete."""
    from mupkg.models import light_unet
    from mupkg.stages.localization import COARSE_CHANNELS
    from mupkg.stages.regions import write_regions
    from mupkg.stages.runs import save_tensors, write_run
    from mupkg.stages.training import BEST

    folder, grid = study / "stage1", {"coarse_mm": 8.0, "region_mm": [96.0, 120.0, 120.0]}
    torch.manual_seed(1)
    network = light_unet(COARSE_CHANNELS, 2).eval()
    settings = {"filters": 2, **grid, "preparation": cohort.preparation.model_dump(mode="json")}
    save_tensors(network.state_dict(), folder / BEST, settings)
    write_run(folder, grid)
    return write_regions(cohort, network, folder, **grid)


def run_of(regions, *, base_filters=2, embedding_dim=4, batch_size=4, steps=12, learning_rate=0.2):
    """A run on these regions, a dozen steps of the narrowest network; its folder."""
    from mupkg.configurations import build, configuration
    from mupkg.data.patches import PatchSource
    from mupkg.stages.inference import copy_localizer
    from mupkg.stages.prediction import mean_dice
    from mupkg.stages.training import train

    folder = regions.folder.parent / "MetricUNet-HCP-seed0"
    sizes = {"base_filters": base_filters, "embedding_dim": embedding_dim}
    torch.manual_seed(0)
    network, loss = build(configuration("MetricUNet-HCP"), **sizes, anchors=4)
    source = PatchSource(*regions.volumes("train"), patch_size=(16, 16), batch_size=batch_size)
    validation = regions.volumes("validation")
    train(
        network,
        loss,
        source,
        folder,
        steps=steps,
        validate_every=6,
        learning_rate=learning_rate,
        validate=lambda net: mean_dice(net, *validation, channels=3),
        metadata={"configuration": "MetricUNet-HCP", **sizes},
    )
    copy_localizer(regions.folder, folder)
    return folder


@pytest.fixture(scope="session")
def regions(cohort, tmp_path_factory: pytest.TempPathFactory):
    return stage1_of(cohort, tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def run_folder(regions):
    return run_of(regions)


@pytest.fixture(scope="session")
def trained_on():
    """Both stages on another cohort, long enough that something is predicted; the run's folder."""
    smoke = {"base_filters": 4, "embedding_dim": 8, "batch_size": 16, "steps": 60, "learning_rate": 0.5}
    return lambda cohort, study: run_of(stage1_of(cohort, study), **smoke)


@pytest.fixture(scope="session")
def trained(cohort, run_folder, tmp_path_factory) -> Path:
    """What the spoilers of runs copy: the cohort, stage 1 and the run of the session."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(cohort.folder, folder / "phantoms")
    shutil.copytree(run_folder.parent / "stage1", folder / "study" / "stage1")
    shutil.copytree(run_folder, folder / "study" / "run-seed0")
    return folder


@pytest.fixture
def copied(run_folder, tmp_path):
    """The run's folder alone, somewhere else."""
    shutil.copytree(run_folder, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.fixture
def heads(cohort, monkeypatch):
    """The femoral heads are known: looking for them takes a second."""
    from mupkg.stages import localization
    from mupkg.stages.landmarks import FemoralHeads

    left, right = cohort.case(cohort.ids("test")[0]).femoral_heads
    monkeypatch.setattr(localization, "femoral_heads", lambda image: FemoralHeads(left, right, 1.0, ""))


@pytest.fixture
def bones(monkeypatch, heads):
    """Instead of stage 2's network: bones are foreground. So masks are not empty and in several pieces."""
    from mupkg.stages import inference

    monkeypatch.setattr(
        inference, "predict_volume", lambda network, volume, box, **_: (volume[box] > 200).astype(np.float32)
    )
