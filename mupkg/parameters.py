"""What a notebook may be told: one validated model per stage, and the three sizes of everything.

How they are read and refused is told in `mupkg.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pandas as pd
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from mupkg import repository
from mupkg.configurations import Control, build, configuration
from mupkg.data import build as cohorts
from mupkg.data.preprocessing import CT_WINDOW, Grid, HuRange, Preparation
from mupkg.models import BACKBONES, MULTIPLE, VNET_MULTIPLE, Backbone
from mupkg.settings import AnyPath, FolderName, Settings
from mupkg.stages.runs import MAX_CHANNELS, NNUNET_RUNS, STAGE1, NnunetRun, Shift, run_name

Size = Literal["smoke", "quick", "paper"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
PatchSize = Annotated[int, Field(ge=8, le=1024, multiple_of=8)]
# Upper bounds are far above all use: a slip of the keyboard is told here, not by an allocation that fails.
Steps = Annotated[PositiveInt, Field(le=10**7)]
BatchSize = Annotated[PositiveInt, Field(le=4096)]
Pattern = Annotated[str, AfterValidator(cohorts.check_pattern)]
ConfigurationName = Annotated[str, AfterValidator(lambda name: configuration(name).name)]  # letters in their order
RoiName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # The whole chain in seconds, to see that it runs. Its numbers mean nothing.
    "smoke": {
        "cohort": {"spacing_mm": (6.0, 5.0, 5.0), "phantoms": 3, "phantom_spacing_mm": (7.0, 6.0, 6.0)},
        "stage1": {"steps": 12, "batch_size": 8, "filters": 4, "patch_size": 32, "learning_rate": 0.5},
        # Just long enough that something is predicted and the first validation is not the best.
        "stage2": {"steps": 60, "batch_size": 16, "base_filters": 4, "embedding_dim": 8, "patch_size": 16}
        | {"validate_every": 10, "learning_rate": 0.5, "choose_from": 0.0, "depth": 16},
        "nnunet": {"epochs": 2, "iterations": 2, "batch": 2, "width": 4},
    },
    # Numbers that mean something, in minutes on two cores: coarse grid, narrow network.
    "quick": {
        "cohort": {"spacing_mm": (4.0, 2.5, 2.5), "phantoms": 40, "phantom_spacing_mm": (4.0, 2.5, 2.5)},
        # A short training needs a higher rate than the paper's 0.01 to leave the all-background answer.
        "stage1": {"steps": 800, "batch_size": 16, "filters": 8, "patch_size": 64, "learning_rate": 0.5},
        # At the paper's 0.01 so short a training may never leave the all-background answer (studies/plateau.yaml).
        "stage2": {"steps": 1200, "batch_size": 8, "base_filters": 8, "embedding_dim": 32, "patch_size": 48}
        | {"validate_every": 100, "learning_rate": 0.1, "choose_from": 0.7, "depth": 16},
        "nnunet": {"epochs": 16, "iterations": 50, "batch": 12, "width": 16},
    },
    # METHOD.md's numbers; phantoms on grids as in the paper.
    "paper": {
        "cohort": {"spacing_mm": (1.0, 1.0, 1.0), "phantoms": 339, "phantom_spacing_mm": None},
        "stage1": {"steps": 20000, "batch_size": 30, "filters": 32, "patch_size": 64, "learning_rate": 0.01},
        "stage2": {"steps": 40000, "batch_size": 30, "base_filters": 32, "embedding_dim": 256, "patch_size": 64}
        | {"validate_every": 1000, "learning_rate": 0.01, "choose_from": 0.0, "depth": 32},
        "nnunet": {"epochs": 1000, "iterations": 250, "batch": None, "width": None},  # None: as nnU-Net plans it
    },
}


class Tag(Enum):
    """What a parameter is for; a field may have several."""

    NAME = "tells runs and their places apart"
    NETWORK = "says which network is trained, and on what"
    TRAINING = "reaches the weights, at least their last digits"
    SPEED = "reaches the speed, and at most the weights' last digits"
    LOOP = "is an argument of `stages.training.train`"
    METRIC = "reaches networks with samplers only"
    BLOCKS = "reaches 3D networks only"


def tagged(model: type[BaseModel], *tags: Tag) -> set[str]:
    """The names of a model's fields that have one of these tags."""
    return {name for name, field in model.model_fields.items() if not {*tags}.isdisjoint(field.metadata)}


OF_SIZE = Field(None, validate_default=False)  # the default of what the size decides


class SizedSettings(Settings):
    """Parameters of which some are filled in by the size where they are None."""

    stage: ClassVar[str]
    size: Size = "quick"

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        size = values.get("size")
        says = SIZES[size if isinstance(size, str) and size in SIZES else "quick"][cls.stage]  # a wrong one is told
        says = {name: value for name, value in says.items() if name in cls.model_fields}
        return says | {name: value for name, value in values.items() if value is not None or name not in says}


FILES = ("pattern", "table", "promise12", "decathlon")  # sources whose labels are volumes
NEEDS = {  # parameters of notebook 00: the other one without which they do nothing, and its values (none: any)
    "image_pattern": ("source", ("pattern",)),
    "label_pattern": ("source", ("pattern",)),
    "label_values": ("source", FILES),
    "channel": ("source", FILES),
    "roi": ("source", ("dicom_rt",)),
    "hash_patients": ("source", ("dicom_rt",)),
    "fill_gaps": ("source", ("dicom_rt",)),
    "replicates": ("source", ("phantoms",)),
    "test_phantoms": ("replicates", ()),
    "repeats": ("folds", ()),
    "window_hu": ("modality", ("CT",)),  # an MR is scaled by its percentiles
}


class CohortSettings(SizedSettings):
    """Notebook 00: where scans come from and how they are prepared."""

    stage: ClassVar[str] = "cohort"
    cohort: FolderName = "phantoms-quick"
    source: Literal["phantoms", "pattern", "table", "promise12", "decathlon", "dicom_rt"] = "phantoms"
    source_folder: AnyPath | None = None
    modality: Literal["CT", "MR"] = "CT"
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = OF_SIZE
    window_hu: HuRange = CT_WINDOW
    image_pattern: Pattern = "{case}_image.nii.gz"
    label_pattern: Pattern = "{case}_label.nii.gz"
    label_values: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    channel: Annotated[int, Field(ge=0)] | None = None
    roi: RoiName | Annotated[tuple[RoiName, ...], Field(min_length=1)] = "Prostate"
    hash_patients: bool = False
    fill_gaps: bool = False
    phantoms: Annotated[int, Field(ge=3, le=100_000)] = OF_SIZE
    replicates: Annotated[int, Field(ge=1, le=1000)] | None = None
    test_phantoms: Annotated[int, Field(ge=1, le=100_000)] = 100
    folds: Annotated[int, Field(ge=3, le=100)] | None = None
    repeats: Annotated[int, Field(ge=1, le=100)] = 1
    seed: Seed = 0
    data_folder: AnyPath = "data"

    @model_validator(mode="after")
    def _a_folder_to_read(self) -> Self:
        if self.source != "phantoms" and self.source_folder is None:
            raise ValueError(f"source {self.source!r} needs source_folder, the folder to read from")
        if self.source != "phantoms" and self.source_path.resolve().is_relative_to(self.cohort_path.resolve()):
            raise ValueError(f"source_folder lies in {self.cohort_path}, which is about to be written; move it")
        return self

    @model_validator(mode="after")
    def _parameters_that_do_something(self) -> Self:
        for name, (other, values) in NEEDS.items():
            value, is_default = getattr(self, other), getattr(self, name) == type(self).model_fields[name].default
            if not is_default and not (value in values if values else value):
                to = f" to {' or '.join(map(repr, values))}" if values else ", too"
                raise ValueError(f"{name} does nothing with {other} {value!r}; leave it out, or set {other}{to}")
        if self.replicates and self.folds:
            raise ValueError("replicates and folds are two ways to make training sets; leave one of them out")
        modality = {"phantoms": "CT", "promise12": "MR", "decathlon": "MR"}.get(self.source, self.modality)
        if self.modality != modality:
            raise ValueError(f"source {self.source!r} is {modality}; set modality to {modality!r}")
        return self

    @property
    def cohort_path(self) -> Path:
        return repository() / self.data_folder / self.cohort

    @property
    def source_path(self) -> Path:
        return repository() / (self.source_folder or "")

    def listing(self) -> pd.DataFrame | None:
        """What a folder of DICOM holds, see `list_dicom`; `sources` tells what is damaged. None for other sources."""
        if self.source != "dicom_rt":
            return None
        from mupkg.scans.dicom_rt import list_dicom  # a wing: cohorts of masks do without it

        return list_dicom(self.source_path, hash_patients=self.hash_patients, damaged=[])

    def sources(self) -> list[cohorts.Source]:
        """The cases to be, from whatever source was chosen."""
        folder, modality = self.source_path, self.modality
        match self.source:
            case "phantoms":
                grid = SIZES[self.size]["cohort"]["phantom_spacing_mm"]
                if self.replicates:
                    counts = self.replicates, self.phantoms, self.test_phantoms
                    return cohorts.sources_of_replicates(self.seed, *counts, grid)
                return cohorts.sources_from_phantoms(range(self.seed, self.seed + self.phantoms), grid)
            case "table":
                return cohorts.sources_from_table(folder, modality=modality, **self._reading)
            case "dicom_rt":
                options = {"hash_patients": self.hash_patients, "fill_gaps": self.fill_gaps}
                return cohorts.sources_from_dicom_rt(folder, self.roi, modality=modality, **options)
            case _:
                patterns = {"image_pattern": self.image_pattern, "label_pattern": self.label_pattern}
                return cohorts.sources_from_pattern(folder, modality=modality, **patterns | self._reading)

    @property
    def _reading(self) -> dict[str, Any]:
        """How files are read: as the layout of a public cohort says, but for what is set."""
        told = {"label_values": self.label_values, "channel": self.channel}
        return cohorts.LAYOUTS.get(self.source, {}) | {
            name: value for name, value in told.items() if value is not None
        }

    @property
    def preparation(self) -> Preparation:
        settings = {"modality": self.modality, "spacing_mm": self.spacing_mm, "window_hu": self.window_hu}
        return Preparation(channel=self._reading.get("channel"), **settings)


class StudySettings(Settings):
    """What every notebook of a study is told."""

    study: Annotated[FolderName, Tag.NAME] = "quick"
    cohort: FolderName = "phantoms-quick"
    size: Size = "quick"
    data_folder: Annotated[AnyPath, Tag.NAME] = "data"
    outputs_folder: Annotated[AnyPath, Tag.NAME] = "outputs"

    @property
    def cohort_path(self) -> Path:
        return repository() / self.data_folder / self.cohort

    @property
    def study_path(self) -> Path:
        return repository() / self.outputs_folder / self.study

    @property
    def stage1_path(self) -> Path:
        return self.study_path / getattr(self, "stage1", STAGE1)  # a training may have one of its own

    @property
    def report_path(self) -> Path:
        return self.study_path / "report"


class TrainingSettings(SizedSettings, StudySettings):
    """What both trainings are told."""

    seed: Annotated[Seed, Tag.NAME, Tag.TRAINING, Tag.LOOP] = 0
    replicate: Annotated[Annotated[int, Field(ge=0)] | None, Tag.NAME] = None
    stage1: Annotated[FolderName, Tag.NAME] = STAGE1
    steps: Annotated[Steps, Tag.TRAINING, Tag.LOOP] = OF_SIZE
    batch_size: Annotated[BatchSize, Tag.TRAINING] = OF_SIZE
    patch_size: Annotated[PatchSize, Tag.TRAINING] = OF_SIZE
    learning_rate: Annotated[PositiveFloat, Tag.TRAINING, Tag.LOOP] = OF_SIZE
    precision: Annotated[Literal["no", "bf16", "fp16"], Tag.TRAINING, Tag.LOOP] = "no"

    @model_validator(mode="after")
    def _enough_to_normalise(self) -> Self:
        """Batch norm cannot train on the one value a channel that three poolings leave of a single small patch."""
        if self.batch_size * (self.patch_size // MULTIPLE) ** 2 < 2:
            raise ValueError(f"patch_size {MULTIPLE} with batch_size 1 cannot be trained; one of them must be larger")
        return self

    def made_by(self, **data: Any) -> dict[str, Any]:
        """What made a run's weights, to be stored with them: the settings that reach them, and the data."""
        network, training = (self._of(tag) for tag in (Tag.NETWORK, Tag.TRAINING))
        return network | {"training": training} | data

    @property
    def optimization(self) -> dict[str, Any]:
        """What `train` is told of these settings."""
        return self._of(Tag.LOOP)

    def _of(self, tag: Tag) -> dict[str, Any]:
        return self.model_dump(mode="json", include=tagged(type(self), tag))


class Stage1Settings(TrainingSettings, Grid):
    """Notebook 02: the localizer and the region."""

    stage: ClassVar[str] = "stage1"
    filters: Annotated[PositiveInt, Field(le=MAX_CHANNELS["filters"]), Tag.NETWORK] = OF_SIZE

    def made_by(self, **data: Any) -> dict[str, Any]:
        """The same, with the voxel size and the region."""
        return super().made_by(**self.model_dump(mode="json", include={*Grid.model_fields}), **data)


BUILD = {name: parameter.default for name, parameter in signature(build).parameters.items()}


class MetricOptions(Settings):
    """The options of the loss; their defaults are those of `build`."""

    anchors: Annotated[PositiveInt, Field(le=10_000), Tag.METRIC] = BUILD["anchors"]
    pairs: Annotated[PositiveInt, Field(le=1000), Tag.METRIC] = BUILD["pairs"]
    threshold: Annotated[float, Field(ge=0, lt=1), Tag.METRIC] = BUILD["threshold"]
    margin: Annotated[NonNegativeFloat, Tag.METRIC] = BUILD["margin"]
    metric_weight: Annotated[NonNegativeFloat, Tag.METRIC] = BUILD["weight"]
    pair_weight: Annotated[NonNegativeFloat, Tag.METRIC] = BUILD["pair_weight"]
    pair_distance: Annotated[NonNegativeFloat, Tag.METRIC] = BUILD["pair_distance"]
    normalize: Annotated[bool, Tag.METRIC] = BUILD["normalize"]
    hinge: Annotated[bool, Tag.METRIC] = BUILD["hinge"]
    control: Annotated[Control | None, Tag.METRIC] = BUILD["control"]
    infonce_temperature: Annotated[PositiveFloat | None, Tag.METRIC] = BUILD["infonce_temperature"]
    dice: bool = BUILD["dice"]

    @property
    def loss_options(self) -> dict[str, Any]:
        """The same as arguments of `build`, which calls lambda `weight`."""
        options = {name: getattr(self, name) for name in MetricOptions.model_fields}
        return {"weight": options.pop("metric_weight"), **options}


NUMBERS_OF_THE_LOSS = {
    name for name, field in MetricOptions.model_fields.items() if type(field.default) in (int, float)
}


@cache  # a trial asks it of hundreds of runs that are alike
def _try_to_build(name: str, options: tuple[tuple[str, Any], ...]) -> None:
    build(name, 1, 1, 1, **dict(options))


class Stage2Settings(MetricOptions, TrainingSettings):
    """Notebook 03: one configuration, one seed."""

    stage: ClassVar[str] = "stage2"
    configuration: Annotated[ConfigurationName, Tag.NAME, Tag.NETWORK] = "MetricUNet-HCP"
    arm: Annotated[FolderName | None, Tag.NAME] = None
    training_cases: PositiveInt | None = None
    label_noise_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    base_filters: Annotated[PositiveInt, Field(le=MAX_CHANNELS["base_filters"]), Tag.NETWORK] = OF_SIZE
    embedding_dim: Annotated[PositiveInt, Field(le=MAX_CHANNELS["embedding_dim"]), Tag.NETWORK] = OF_SIZE
    validate_every: Annotated[PositiveInt, Tag.TRAINING, Tag.LOOP] = OF_SIZE
    choose_from: Annotated[float, Field(ge=0, le=1), Tag.TRAINING, Tag.LOOP] = OF_SIZE
    momentum: Annotated[float, Field(ge=0, lt=1), Tag.TRAINING, Tag.LOOP] = 0.9
    weight_decay: Annotated[NonNegativeFloat, Tag.TRAINING, Tag.LOOP] = 1e-4
    channels_last: Annotated[bool, Tag.TRAINING, Tag.SPEED, Tag.LOOP] = True
    compile: Annotated[bool, Tag.TRAINING, Tag.SPEED, Tag.LOOP] = False
    deterministic: Annotated[bool, Tag.TRAINING, Tag.SPEED] = False
    workers: Annotated[int, Field(ge=0, le=64), Tag.SPEED, Tag.LOOP] = 0
    depth: Annotated[int, Field(ge=VNET_MULTIPLE, le=1024, multiple_of=VNET_MULTIPLE), Tag.BLOCKS] = OF_SIZE
    film: Annotated[bool, Tag.SPEED] = False
    test_last: Annotated[bool, Tag.SPEED] = False
    test_shifts: Annotated[tuple[Shift, ...], Tag.SPEED] = ()

    @model_validator(mode="after")
    def _options_that_do_something(self) -> Self:
        """`build` refuses an option that would do nothing; here, before any work."""
        _try_to_build(self.configuration, tuple(self.loss_options.items()))
        return self

    @model_validator(mode="after")
    def _blocks_that_can_be_pooled(self) -> Self:
        multiple = self._backbone.multiple
        if self.patch_size % multiple:
            raise ValueError(
                f"{self.configuration} needs a patch_size that is a multiple of {multiple}, not {self.patch_size}"
            )
        return self

    @property
    def _backbone(self) -> Backbone:
        return BACKBONES[configuration(self.configuration).backbone]

    @property
    def run_path(self) -> Path:
        return self.study_path / run_name(self.arm or self.configuration, self.seed)

    @property
    def patch_source_options(self) -> dict[str, Any]:
        """What `PatchSource` is told. 3D blocks together hold `batch_size` slices, but there are at least two."""
        size = {"patch_size": (self.patch_size,) * 2, "batch_size": self.batch_size, "seed": self.seed}
        blocks = {"batch_size": max(2, self.batch_size // self.depth), "depth": self.depth}
        return size | blocks if self._backbone.dimensions == 3 else size

    def made_by(self, **data: Any) -> dict[str, Any]:
        """The same, with the options of the loss, and the depth of 3D blocks."""
        depth = {"depth": self.depth} if self._backbone.dimensions == 3 else {}
        return super().made_by(loss=self.loss_options, **depth, **data)


Configurations = Annotated[tuple[FolderName, ...], Field(min_length=1)]


class DataSettings(StudySettings):
    """Notebook 01: a cohort."""

    cases: PositiveInt = 3
    real_scan: AnyPath | None = None


class EvaluationSettings(StudySettings):
    """Notebook 04: which runs, in which order; None means all that are there."""

    configurations: Configurations | None = None


class ExternalSettings(EvaluationSettings):
    """Notebook 07: a study on a public cohort, and a run that was trained on other data."""

    study: Annotated[FolderName, Tag.NAME] = "promise12_128"
    cohort: FolderName = "promise12_128"
    zero_shot: AnyPath | None = None

    @property
    def zero_shot_path(self) -> Path | None:
        return repository() / self.zero_shot if self.zero_shot else None


class NnunetSettings(SizedSettings, StudySettings):
    """Notebook 11: how long nnU-Net trains, and how much of what it plans is kept."""

    stage: ClassVar[str] = "nnunet"
    configurations: Annotated[tuple[NnunetRun, ...], Field(min_length=1)] = NNUNET_RUNS
    seed: Annotated[Seed, Tag.NAME] = 0
    replicate: Annotated[Annotated[int, Field(ge=0)] | None, Tag.NAME] = None
    epochs: Annotated[PositiveInt, Field(le=10**5)] = OF_SIZE
    iterations: Annotated[PositiveInt, Field(le=10**5)] = OF_SIZE
    batch: BatchSize | None = OF_SIZE
    width: Annotated[PositiveInt, Field(le=MAX_CHANNELS["base_filters"])] | None = OF_SIZE

    @property
    def nnunet_path(self) -> Path:
        """Where nnU-Net finds the regions."""
        return self.study_path / ("nnunet" if self.replicate is None else f"nnunet-replicate{self.replicate}")


class VisualizationSettings(EvaluationSettings):
    """Notebook 05: the same, of one seed."""

    seed: Seed = 0
    cases: PositiveInt = 3


class ReportSettings(DataSettings, VisualizationSettings):
    """All that a study may tell the notebooks 01, 04 and 05 together."""


class SegmentSettings(Settings):
    """Notebook 09: a trained run and a new scan."""

    run: AnyPath
    scan: AnyPath
    output: AnyPath = "outputs/segmented"
    precision: Literal["no", "bf16"] = "no"


class ExploreSettings(Settings):
    """Notebook 08: which study and case to explore, and what the sliders begin with."""

    study_folder: AnyPath = "data/demo"
    case_id: FolderName | None = None
    configurations: Configurations | None = None
    seed: Seed = 0
    viewer: Literal["niivue", "slices", "itkwidgets"] = "niivue"
    per_kind: Annotated[int, Field(ge=10, le=20_000)] = 300
    projection: Literal["PCA", "t-SNE", "UMAP"] = "PCA"
    anchors: Annotated[int, Field(ge=1, le=200)] = BUILD["anchors"]
    pairs: Annotated[int, Field(ge=1, le=10)] = BUILD["pairs"]
    threshold: Annotated[float, Field(ge=0, le=0.95)] = BUILD["threshold"]
    margin: NonNegativeFloat = BUILD["margin"]
    patch: PatchSize = 32
    pictures_folder: AnyPath = "outputs/explore"

    @property
    def study_path(self) -> Path:
        return repository() / self.study_folder

    @property
    def pictures_path(self) -> Path:
        return repository() / self.pictures_folder
