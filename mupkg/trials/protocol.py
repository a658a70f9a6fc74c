"""What a study file and a trial's protocol may say, checked before the first notebook runs."""

from __future__ import annotations

from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
import yaml
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mupkg import repository
from mupkg.configurations import configuration
from mupkg.metrics import METRICS
from mupkg.parameters import (
    NUMBERS_OF_THE_LOSS,
    AnyPath,
    CohortSettings,
    ConfigurationName,
    ExploreSettings,
    ExternalSettings,
    FolderName,
    MetricOptions,
    ReportSettings,
    Seed,
    Settings,
    Size,
    Stage1Settings,
    Stage2Settings,
    Tag,
    tagged,
)
from mupkg.samplers import SAMPLERS
from mupkg.stages.runs import STAGE1, run_name
from mupkg.stages.shifts import check_ct
from mupkg.trials.kept import kept_folder
from mupkg.trials.statistics import EQUIVALENT_DSC

OF_THE_STUDY = ("study", "cohort", "size", "data_folder", "outputs_folder")  # what it tells every notebook
OF_A_TRAINING = {*Stage2Settings.model_fields} - tagged(Stage2Settings, Tag.NAME) - {*OF_THE_STUDY}
Side = str | Annotated[tuple[str, ...], Field(min_length=2)]  # of a contrast: an arm, or arms whose mean it is


def side_name(side: Side) -> str:
    """What a side of a contrast is called: the arm's name, or that of the mean of several."""
    return side if isinstance(side, str) else f"mean of {', '.join(side)}"


class Trial(Settings):
    """A question put in advance: which arms are compared, on how many replicates, by what, within which margin.

    A replicate is a training set and a seed of its own, the same for all arms. `seed_offset` of an arm gives it other
    seeds on the same training sets. `varies` names further parameters of notebook 03 that the trial is about. With
    `by_parameter`, every arm differs from the first in one number, and notebook 06 shows them parameter by parameter.
    With `factors`, arms are the runs of a two-level design, and its main effects are contrasts: a factor is a letter
    of the configuration, which is there or not, or a setting of two values. Either side of a contrast may be a list
    of arms: their mean, case by case and replicate by replicate. A `descriptive` trial gives intervals, no verdict.
    """

    name: FolderName
    arms: Annotated[dict[FolderName, dict[str, Any]], Field(min_length=2)]
    replicates: Annotated[int, Field(ge=2, le=1000)]
    contrasts: tuple[tuple[Side, Side], ...] = ()  # (arm, against)
    factors: tuple[str, ...] = ()
    descriptive: bool = False
    primary: Literal[*(name for name, metric in METRICS.items() if metric.of)] = "DSC"
    margin: PositiveFloat = EQUIVALENT_DSC
    varies: tuple[Literal[*sorted(OF_A_TRAINING)], ...] = ()
    by_parameter: bool = False

    @property
    def parameters(self) -> dict[str, dict[Any, str]]:
        """With `by_parameter`: each parameter's values and their arms, among them the first arm's."""
        base, arms_of = next(iter(self.arms)), {}
        for arm in list(self.arms)[1:]:
            ((name, value),) = self._unlike_the_first(arm).items()
            usual = self.arms[base].get(name, Stage2Settings.model_fields[name].default)
            arms_of.setdefault(name, {usual: base})[value] = arm
        return {name: dict(sorted(arms.items())) for name, arms in arms_of.items()}

    def _unlike_the_first(self, arm: str) -> dict[str, Any]:
        first = next(iter(self.arms.values()))
        return {name: value for name, value in self.arms[arm].items() if name not in first or first[name] != value}

    @property
    def levels(self) -> dict[str, dict[str, list[str]]]:
        """The two levels of each factor, the higher first, and the arms that have each."""
        levels: dict[str, dict[str, list[str]]] = {}
        features = self._features if self.factors else {}
        for factor in self.factors:
            values = features[factor]
            for value in sorted(set(values), reverse=True):
                name = (
                    f"{'with' if value else 'without'} {factor}" if isinstance(value, bool) else f"{factor} {value}"
                )
                levels.setdefault(factor, {})[name] = list(values.index[values == value])
        return levels

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What the protocol compares: its contrasts, and the levels of its factors."""
        contrasts = [(side_name(arm), side_name(against)) for arm, against in self.contrasts]
        return [*contrasts, *(tuple(of) for of in self.levels.values())]

    @property
    def means(self) -> dict[str, list[str]]:
        """What `pairs` names that is the mean of several arms: the pooled sides and the factors' levels."""
        pooled = {side_name(side): [*side] for pair in self.contrasts for side in pair if not isinstance(side, str)}
        return pooled | {level: arms for of in self.levels.values() for level, arms in of.items()}

    @property
    def _features(self) -> pd.DataFrame:
        """What tells arms apart: a row an arm, a column a letter of the configuration or a setting of the arms."""
        rows, set_by_arms = {}, {name for given in self.arms.values() for name in given} - {"seed_offset"}
        for arm, given in self.arms.items():
            chosen = configuration(given["configuration"])
            letters = {letter: letter in chosen.samplers for letter in SAMPLERS}
            letters |= {"N": chosen.near_negatives, "P": chosen.positive_pair, "Sep": chosen.separate}
            usual = {name: Stage2Settings.model_fields[name].default for name in set_by_arms}
            values = {name: str(value) if isinstance(value, list | dict) else value for name, value in given.items()}
            rows[arm] = letters | {"backbone": chosen.backbone, "seed_offset": 0} | usual | values
        return pd.DataFrame.from_dict(rows, orient="index").drop(columns="configuration").astype(object)

    @property
    def as_in_the_paper(self) -> dict[str, str]:
        """The configuration of each arm that is nothing else, but perhaps with Table III's margin."""
        alone = {"configuration", "seed_offset", "learning_rate", "steps"}
        plain = {
            arm: {*given} - ({"margin"} if given.get("margin") == 1.0 else {*()}) for arm, given in self.arms.items()
        }
        return {arm: self.arms[arm]["configuration"] for arm, names in plain.items() if names <= alone}

    @model_validator(mode="after")
    def _arms_that_can_be_compared(self) -> Self:
        allowed = ("configuration", "seed_offset", "learning_rate", *MetricOptions.model_fields, *self.varies)
        for name, given in self.arms.items():
            if "configuration" not in given:
                raise ValueError(f"arm {name}: must name its configuration")
            if type(given.get("seed_offset", 0)) is not int:
                raise ValueError(f"arm {name}: seed_offset must be a whole number, not {given['seed_offset']!r}")
            if wrong := [key for key in given if key not in allowed]:
                raise ValueError(
                    f"arm {name}: {', '.join(wrong)} must be the same for all arms; it may set {allowed}"
                )
        for arm in list(self.arms)[1:] if self.by_parameter else ():
            other = self._unlike_the_first(arm)
            if len(other) != 1 or not other.keys() <= NUMBERS_OF_THE_LOSS:
                raise ValueError(
                    f"arm {arm}: differs from the first arm in {', '.join(other) or 'nothing'}; with by_parameter it "
                    "must differ in one number of the metric loss"
                )
        for pair in self.contrasts:
            arms = [arm for side in pair for arm in ([side] if isinstance(side, str) else side)]
            if unknown := [arm for arm in arms if arm not in self.arms]:
                raise ValueError(f"contrasts: there is no arm {', '.join(unknown)}; there are {', '.join(self.arms)}")
            sides = " and ".join(map(side_name, pair))
            if len({*arms}) < len(arms):
                raise ValueError(f"contrasts: {sides} share an arm; name each one once")
            if len(arms) == 2 and self.arms[arms[0]] == self.arms[arms[1]]:
                raise ValueError(f"contrasts: {sides} are the same; let them differ in something")
        if len({frozenset(pair) for pair in self.contrasts}) < len(self.contrasts):
            raise ValueError("contrasts: must name each one once, in one direction")
        if not (self.contrasts or self.factors):
            raise ValueError("contrasts: must name a pair of arms at least, or factors the factors of a design")
        return self

    @model_validator(mode="after")
    def _factors_that_can_be_told_apart(self) -> Self:
        """Two levels each, in as many arms; no two factors go together; and nothing else varies."""
        if not self.factors:
            return self
        features = self._features
        varying = {name: values for name, values in features.items() if len(set(values)) > 1}
        for name in self.factors:
            if name not in features or features[name].isna().any() or features[name].nunique() != 2:
                raise ValueError(
                    f"factors: {name} must have two values, told by the arms: a letter of the configuration (H, C, "
                    f"R, N, P, Sep) that some have, or a setting; what varies is {', '.join(varying)}"
                )
        sign = {name: np.where(values == values.iloc[0], 1, -1) for name, values in varying.items()}
        for name, other in combinations(["", *self.factors], 2):
            if np.sum(sign.get(name, 1) * sign[other]):
                half = f"the arms with either value of {name}" if name else "the arms"
                raise ValueError(f"factors: {other} must have each of its values in half of {half}")
        for name in varying.keys() - {*self.factors}:
            if features[name].nunique() != 2 or all(abs(sign[name] @ sign[f]) < len(features) for f in self.factors):
                raise ValueError(f"factors: arms differ in {name} as well; name it, or let all arms have the same")
        if taken := {*self.means} & {*self.arms}:
            raise ValueError(f"arm {', '.join(sorted(taken))}: is what a mean of arms is called; name it otherwise")
        return self


SECTIONS: dict[str, tuple[type[Settings], tuple[str, ...]]] = {  # and what it tells this one beside
    "prepare": (CohortSettings, ()),
    "stage1": (Stage1Settings, ()),
    "stage2": (Stage2Settings, ("configuration", "seed", "arm", "replicate", "stage1")),
    "report": (ReportSettings, ("configurations", "seed")),
    "external": (ExternalSettings, ("configurations",)),
    "explore": (ExploreSettings, ("configurations", "seed", "study_folder", "pictures_folder")),
}


SECTION = Field(default_factory=dict)  # what a notebook is told beside


class _EachKeyOnce(yaml.SafeLoader):
    """YAML would take the last of two."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, marks = super().compose_mapping_node(anchor), {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in marks:
                given = f"the key {key.value!r} is given"
                raise yaml.composer.ComposerError(given, marks[key.value], "and given again", key.start_mark)
            marks[key.value] = key.start_mark
        return node


def read_yaml(path: str | Path) -> Any:
    """What a file says; ValueError naming it if it cannot be read, with both lines if it gives a key twice."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, _EachKeyOnce)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


class Study(Settings):
    """A study file of notebooks/studies: what a batch runs, and with which parameters."""

    study: FolderName
    cohort: FolderName
    size: Size = "quick"
    configurations: tuple[ConfigurationName, ...] = ()
    trial: Trial | None = None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    data_folder: AnyPath = "data"
    outputs_folder: AnyPath = "outputs"
    source_folder: AnyPath | None = None  # of notebook 00; here, so that --config source_folder=FOLDER can give it
    prepare: dict[str, Any] = SECTION
    stage1: dict[str, Any] = SECTION
    stage2: dict[str, Any] = SECTION
    report: dict[str, Any] = SECTION
    external: dict[str, Any] = SECTION
    explore: dict[str, Any] = SECTION
    segment_case: bool = False
    threads: dict[Literal["stage1", "stage2"], Annotated[PositiveInt, Field(strict=True)]] = SECTION

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """A study file, read and checked; ValueError naming it and what is wrong."""
        given = read_yaml(path)
        try:
            return cls.checked(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def as_yaml(self) -> str:
        """A study file that says the same, with all that was told on the command line or by a second file."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)

    @field_validator("configurations", "seeds")
    @classmethod
    def _each_once(cls, value: tuple) -> tuple:
        """Two runs would be written to one folder."""
        if len(set(value)) < len(value):
            raise ValueError(f"must name each one once, not {', '.join(map(str, value))}")
        return value

    @field_validator("threads")
    @classmethod
    def _threads_of_both(cls, value: dict[str, int]) -> dict[str, int]:
        return {"stage1": 2, "stage2": 1} | value

    @property
    def folds(self) -> int | None:
        """The number of folds of a trial's k-fold by patient; None if every replicate has its own training set."""
        return self._prepared.folds

    @property
    def _prepared(self) -> CohortSettings:
        """What notebook 00 is told."""
        known = {"source_folder": self.source_folder or "given later", "size": self.size}
        return CohortSettings.checked(known | self.prepare, without=OF_THE_STUDY)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """What notebook 03 is told of each run beside the study's own, by the run's folder."""
        if self.trial is None:
            pairs = [(name, seed) for name in self.configurations for seed in self.seeds]
            return {run_name(name, seed): {"configuration": name, "seed": seed} for name, seed in pairs}
        runs, folds = {}, self.folds
        for replicate in range(self.trial.replicates):
            for arm, given in self.trial.arms.items():
                parameters = {key: value for key, value in given.items() if key != "seed_offset"}
                seed = replicate + given.get("seed_offset", 0)
                own = {"stage1": f"{STAGE1}-replicate{replicate}"} if folds else {}
                runs[run_name(arm, seed)] = {"arm": arm, "replicate": replicate, "seed": seed} | own | parameters
        return runs

    @property
    def run_parameters(self) -> dict[str, dict[str, Any]]:
        """All that notebook 03 is told of each run, by the run's folder: the study's own and the run's."""
        own = self.runs.items()
        return {run: {"cohort": self.cohort, "size": self.size, **self.stage2, **told} for run, told in own}

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """All that notebook 02 is told of each first stage, by its folder: one for all runs, in folds one a fold."""
        shared = {"study": self.study, "cohort": self.cohort, "size": self.size, **self.stage1}
        folds = {told["stage1"]: {"replicate": told["replicate"]} for told in self.runs.values() if "stage1" in told}
        return {name: {**shared, "stage1": name, **own} for name, own in (folds or {STAGE1: {}}).items()}

    @model_validator(mode="after")
    def _parameters_of_the_notebooks(self) -> Self:
        """What the notebooks will be told is checked before the first one runs, not hours later."""
        for section, (model, own) in SECTIONS.items():
            given = getattr(self, section)
            fixed = [name for name in (*OF_THE_STUDY, *own) if name in model.model_fields]
            if taken := [name for name in fixed if name in given]:
                raise ValueError(
                    f"{section}: must leave out {', '.join(taken)}: what this notebook is told as {', '.join(fixed)} "
                    "is set at the top of the study file"
                )
            sized = {"size": self.size} if "size" in model.model_fields else {}
            try:
                _ = self._prepared if section == "prepare" else model.checked(sized | given, without=fixed)
            except ValueError as error:
                raise ValueError(f"{section}: {error}") from None
        return self

    @model_validator(mode="after")
    def _either_configurations_or_a_trial(self) -> Self:
        if bool(self.configurations) == (self.trial is not None):
            raise ValueError("a study names either its configurations or a trial")
        for run, parameters in self.runs.items():
            try:
                Stage2Settings.checked({"size": self.size, **self.stage2, **parameters})
            except ValueError as error:
                which = f"trial: arm {parameters['arm']} ({run})" if self.trial else run
                raise ValueError(f"{which}: {error}") from None
        return self

    @model_validator(mode="after")
    def _shifts_of_ct_alone(self) -> Self:
        """Here, and not when the first training is done."""
        check_ct(self.stage2.get("test_shifts", ()), self._prepared.modality)
        return self

    @model_validator(mode="after")
    def _replicates_that_the_cohort_will_have(self) -> Self:
        """A table may bring replicates or folds of its own; of all other sources notebook 00 is told how many."""
        made = self._prepared
        number = made.replicates or (made.folds or 0) * made.repeats
        if self.trial is None or (not number and made.source == "table"):
            return self
        wanted, folds = self.trial.replicates, made.folds or 1
        if wanted > number:
            raise ValueError(
                f"trial: {wanted} replicates, but notebook 00 would make {number}; under prepare, set replicates (of "
                "phantoms) or folds and repeats (of scans: k folds are k replicates), or ask for fewer"
            )
        if wanted % folds:
            raise ValueError(f"trial: {wanted} replicates are no whole repeats of {folds} folds; ask for all folds")
        return self


class TrialSettings(Settings):
    """Notebook 10: a trial's file."""

    protocol: AnyPath = "notebooks/studies/trials/e1.yaml"
    data_folder: AnyPath = "data"
    outputs_folder: AnyPath = "outputs"

    @cached_property
    def study(self) -> Study:
        """What the file says; ValueError naming it if it is not there, no study, or one without a trial."""
        path = repository() / self.protocol
        study = Study.read(path)
        if study.trial is None:
            raise ValueError(f"{path}: names no trial; evaluate this study with notebook 04")
        return study

    @property
    def cohort_path(self) -> Path:
        return repository() / self.data_folder / self.study.cohort

    @property
    def study_path(self) -> Path:
        return repository() / self.outputs_folder / self.study.study

    @property
    def kept_path(self) -> Path:
        """Where runs of this study are kept as small tables."""
        return kept_folder(self.study.study)

    @property
    def report_path(self) -> Path:
        return self.study_path / "report" / self.study.trial.name


class ParameterStudySettings(TrialSettings):
    """Notebook 06: the file of a trial with `by_parameter`."""

    protocol: AnyPath = "notebooks/studies/trials/parameters.yaml"

    @model_validator(mode="after")
    def _by_parameter(self) -> Self:
        if not self.study.trial.by_parameter:
            raise ValueError(f"{self.protocol}: is no study of parameters (by_parameter); notebook 10 analyses it")
        return self
