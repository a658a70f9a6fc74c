# A whole study in the right order:
#   snakemake --workflow-profile notebooks/studies/profiles/laptop --configfile notebooks/studies/quick.yaml --cores 2
# Skips what is done, goes on after a break (the profile says how); a failed notebook is kept as *.failed.ipynb and its target is not there.
# Weights and checkpoints are no declared outputs: Snakemake deletes those before it starts a broken-off job again,
# and the training goes on from them.
import csv
import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mupkg.parameters import DataSettings, EvaluationSettings, VisualizationSettings
from mupkg.stages.runs import STAGE1
from mupkg.trials.kept import kept_folder, kept_runs, kept_stages
from mupkg.trials.protocol import Study, read_yaml

try:
    for file in workflow.configfiles:
        read_yaml(file)  # Snakemake has read it already, but takes the last of two equal keys
    STUDY = Study.checked(config)
except ValueError as error:
    raise WorkflowError(f"the study file, or --config: {error}") from None
DATA, OUT = f"{STUDY.data_folder}/{STUDY.cohort}", f"{STUDY.outputs_folder}/{STUDY.study}"
TRIAL = f"{OUT}/report/{STUDY.trial.name if STUDY.trial else '-'}"
FOLDERS = {"data_folder": STUDY.data_folder, "outputs_folder": STUDY.outputs_folder}
PREPARE = {"cohort": STUDY.cohort, "size": STUDY.size, "data_folder": STUDY.data_folder, **STUDY.prepare}
PREPARE |= {"source_folder": STUDY.source_folder} if STUDY.source_folder else {}
COMMON = {"study": STUDY.study, "cohort": STUDY.cohort, "size": STUDY.size, **FOLDERS}
RUNS = list(STUDY.runs)
# A trial's runs that are kept as small tables (make keep) are not trained again.
KEPT = kept_runs(STUDY.study, STUDY.run_parameters, STUDY.stages, Path(OUT)) if STUDY.trial else {*()}
TRAINED = [run for run in RUNS if run not in KEPT]
for place in (folder for name in (DATA, OUT) for folder in (Path(name), *Path(name).parents)):
    if place.exists() and not place.is_dir():
        raise WorkflowError(f"{place}: is a file in a folder's place; move it, or set data_folder or outputs_folder")
PYTHON = sys.executable
RUN = "{PYTHON:q} -m mupkg.batch {input[0]:q} {output.notebook:q} {params.notebook:q} --threads {threads}"
TRAIN = RUN + " --one-gpu"
EXPLORE = {"configurations": list(STUDY.configurations), "seed": STUDY.seeds[0], **STUDY.explore}
REPORT = {**COMMON, "configurations": list(STUDY.configurations), "seed": STUDY.seeds[0], **STUDY.report}


def report(settings):
    """What a report notebook is told: those of the study's parameters that it has."""
    return json.dumps({name: value for name, value in REPORT.items() if name in settings.model_fields})


GPUS = workflow.global_resources.get("gpu")
GPUS = (GPUS.value if GPUS is not None else None) or 1
if GPUS > 1 and not os.environ.get("CUDA_VISIBLE_DEVICES"):
    raise WorkflowError(f"gpu={GPUS}: which? set CUDA_VISIBLE_DEVICES, to 0,1 for the first two; else all share one")


# Where the runs' own parameters name a stage 1 (one a fold), it is theirs; else the study has one.
STAGE1_OF = {run: parameters.get("stage1", STAGE1) for run, parameters in STUDY.runs.items()}
# A kept stage 1 is not trained again: another machine would round otherwise, and cut other regions.
KEPT_STAGES = kept_stages(STUDY.study, STUDY.stages, Path(OUT)) if STUDY.trial else {*()}


TRIAL_NOTEBOOKS = ["10_does_it_help"]
if STUDY.trial and STUDY.trial.by_parameter:
    TRIAL_NOTEBOOKS += ["06_parameter_studies"]


wildcard_constraints:
    trial_notebook="|".join(TRIAL_NOTEBOOKS),
    run=r"[^/]+-seed\d+",
    stage1=STAGE1 + r"(-replicate\d+)?",


rule all:
    input:
        [f"{TRIAL}/{name}.ipynb" for name in TRIAL_NOTEBOOKS]
        if STUDY.trial
        else [
            f"{OUT}/report/01_data_exploration.ipynb",
            f"{OUT}/report/04_evaluation.ipynb",
            f"{OUT}/report/05_visualization.ipynb",
            f"{OUT}/report/08_explore.ipynb",
            f"{OUT}/report/07_external_validation.ipynb" if STUDY.external else [],
            f"{OUT}/report/09_segment_a_patient.ipynb" if STUDY.segment_case else [],
        ],


rule prepare_cohort:
    input:
        "notebooks/00_prepare_cohort.ipynb",
    output:
        f"{DATA}/cohort.csv",
        f"{DATA}/fingerprint.json",  # of the volumes: a change must be seen by all that follow
        notebook=f"{DATA}/00_prepare_cohort.ipynb",
    params:
        notebook=json.dumps(PREPARE),
    shell:
        RUN


rule explore_data:
    input:
        "notebooks/01_data_exploration.ipynb",
        f"{DATA}/cohort.csv",
        f"{DATA}/fingerprint.json",
    output:
        notebook=f"{OUT}/report/01_data_exploration.ipynb",
    params:
        notebook=report(DataSettings),
    shell:
        RUN


rule restore_stage1:
    input:
        f"{DATA}/cohort.csv",
        f"{DATA}/fingerprint.json",
    output:
        OUT + "/{stage1}/regions.csv",
        OUT + "/{stage1}/fingerprint.json",
    wildcard_constraints:
        stage1="|".join(KEPT_STAGES) or "-",
    params:
        kept=lambda w: str(kept_folder(STUDY.study) / w.stage1),
        folder=OUT + "/{stage1}",
    shell:
        "{PYTHON:q} -m mupkg.trials.kept restore {DATA:q} {params.kept:q} {params.folder:q}"


rule stage1:
    input:
        "notebooks/02_stage1_localization.ipynb",
        f"{DATA}/cohort.csv",
        f"{DATA}/fingerprint.json",
    output:
        OUT + "/{stage1}/regions.csv",
        OUT + "/{stage1}/fingerprint.json",
        notebook=OUT + "/{stage1}/02_stage1_localization.ipynb",
    wildcard_constraints:
        stage1="|".join({*STUDY.stages} - KEPT_STAGES) or "-",
    params:
        notebook=lambda w: json.dumps({**COMMON, **STUDY.stages[w.stage1]}),
    threads: STUDY.threads["stage1"]
    resources:
        gpu=1,  # counts only where the number of GPUs is given; without one the notebook runs on the CPU
    shell:
        TRAIN


rule stage2:
    input:
        "notebooks/03_stage2_training.ipynb",
        lambda w: f"{OUT}/{STAGE1_OF[w.run]}/regions.csv",
        lambda w: f"{OUT}/{STAGE1_OF[w.run]}/fingerprint.json",
    output:
        OUT + "/{run}/metrics.csv",
        notebook=OUT + "/{run}/03_stage2_training.ipynb",
    params:
        notebook=lambda w: json.dumps({**COMMON, **STUDY.run_parameters[w.run]}),
    threads: STUDY.threads["stage2"]
    resources:
        gpu=1,
    shell:
        TRAIN


# The study as it is run, with --config and all --configfile: what the trial's notebooks read.
rule write_protocol:
    output:
        f"{TRIAL}/protocol.yaml",
    params:
        protocol=STUDY.as_yaml(),
    shell:
        "printf %s {params.protocol:q} > {output:q}"


rule analyse_trial:
    input:
        "notebooks/{trial_notebook}.ipynb",
        f"{TRIAL}/protocol.yaml",
        expand(OUT + "/{run}/metrics.csv", run=TRAINED),
    output:
        notebook=TRIAL + "/{trial_notebook}.ipynb",
    params:
        notebook=json.dumps({**FOLDERS, "protocol": f"{TRIAL}/protocol.yaml"}),
    shell:
        RUN


rule evaluate:
    input:
        "notebooks/04_evaluation.ipynb",
        expand(OUT + "/{run}/metrics.csv", run=RUNS),
    output:
        f"{OUT}/report/cases.csv",
        notebook=f"{OUT}/report/04_evaluation.ipynb",
    params:
        notebook=report(EvaluationSettings),
    shell:
        RUN


rule validate_externally:
    input:
        "notebooks/07_external_validation.ipynb",
        expand(OUT + "/{run}/metrics.csv", run=RUNS),
    output:
        notebook=f"{OUT}/report/07_external_validation.ipynb",
    params:
        notebook=json.dumps({**COMMON, "configurations": list(STUDY.configurations), **STUDY.external}),
    shell:
        RUN


rule visualize:
    input:
        "notebooks/05_visualization.ipynb",
        expand(OUT + "/{run}/metrics.csv", run=RUNS),
    output:
        notebook=f"{OUT}/report/05_visualization.ipynb",
    params:
        notebook=report(VisualizationSettings),
    shell:
        RUN


rule explore:
    input:
        "notebooks/08_explore.ipynb",
        expand(OUT + "/{run}/metrics.csv", run=RUNS),
    output:
        notebook=f"{OUT}/report/08_explore.ipynb",
    params:
        notebook=json.dumps({"study_folder": OUT, "pictures_folder": f"{OUT}/report", **EXPLORE}),
    shell:
        RUN


def first_test_scan(wildcards, input):
    """Parameters of notebook 09; known once stage 1 is done, until then Snakemake shows TBD."""
    with open(input[1], newline="", encoding="utf-8") as file:
        case_id = next(row["case_id"] for row in csv.DictReader(file) if row["split"] == "test")
    run, output = f"{OUT}/{RUNS[-1]}", f"{OUT}/report/segmented"
    return json.dumps({"run": run, "scan": f"{DATA}/images/{case_id}.nii.gz", "output": output})


rule segment_a_patient:
    input:
        "notebooks/09_segment_a_patient.ipynb",
        f"{OUT}/{STAGE1}/regions.csv",
        f"{OUT}/{RUNS[-1]}/metrics.csv",
    output:
        directory(f"{OUT}/report/segmented"),  # removed before the notebook runs again: it writes over nothing
        notebook=f"{OUT}/report/09_segment_a_patient.ipynb",
    params:
        notebook=first_test_scan,
    shell:
        RUN
