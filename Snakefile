# A whole study in the right order: snakemake --configfile notebooks/studies/quick.yaml --cores 2
# Skips what is done, goes on after a break; a failed notebook is kept as *.failed.ipynb and its target is not there.
import pandas as pd

from mupkg.report.batch import run_notebook
from mupkg.stages.settings import Study

STUDY = Study.model_validate(config)
DATA, OUT = f"{STUDY.data_folder}/{STUDY.cohort}", f"{STUDY.outputs_folder}/{STUDY.study}"
FOLDERS = {"data_folder": STUDY.data_folder, "outputs_folder": STUDY.outputs_folder}
COMMON = {"study": STUDY.study, "cohort": STUDY.cohort, "size": STUDY.size, **FOLDERS}
RUNS = [f"{name}-seed{seed}" for name in STUDY.configurations for seed in STUDY.seeds]
REPORT = {**COMMON, "configurations": list(STUDY.configurations), "seed": STUDY.seeds[0], **STUDY.report}


wildcard_constraints:
    configuration="[^/]+?",
    seed=r"\d+",


rule all:
    input:
        f"{OUT}/report/01_data_exploration.ipynb",
        f"{OUT}/report/04_evaluation.ipynb",
        f"{OUT}/report/05_visualization.ipynb",
        f"{OUT}/report/09_segment_a_patient.ipynb" if STUDY.segment_case else [],


rule prepare_cohort:
    input:
        "notebooks/00_prepare_cohort.ipynb",
    output:
        f"{DATA}/cohort.csv",
        notebook=f"{DATA}/00_prepare_cohort.ipynb",
    params:
        notebook={"cohort": STUDY.cohort, "size": STUDY.size, "data_folder": STUDY.data_folder, **STUDY.prepare},
    run:
        run_notebook(input[0], output.notebook, params.notebook)


rule explore_data:
    input:
        "notebooks/01_data_exploration.ipynb",
        f"{DATA}/cohort.csv",
    output:
        notebook=f"{OUT}/report/01_data_exploration.ipynb",
    params:
        notebook=REPORT,
    run:
        run_notebook(input[0], output.notebook, params.notebook)


rule stage1:
    input:
        "notebooks/02_stage1_localization.ipynb",
        f"{DATA}/cohort.csv",
    output:
        f"{OUT}/stage1/regions.csv",
        f"{OUT}/stage1/run.json",
        f"{OUT}/stage1/weights.safetensors",
        notebook=f"{OUT}/stage1/02_stage1_localization.ipynb",
    params:
        notebook={**COMMON, **STUDY.stage1},
    threads: STUDY.threads["stage1"]
    run:
        run_notebook(input[0], output.notebook, params.notebook, threads=threads)


rule stage2:
    input:
        "notebooks/03_stage2_training.ipynb",
        f"{OUT}/stage1/regions.csv",
        f"{OUT}/stage1/weights.safetensors",
    output:
        OUT + "/{configuration}-seed{seed}/metrics.csv",
        OUT + "/{configuration}-seed{seed}/weights.safetensors",
        notebook=OUT + "/{configuration}-seed{seed}/03_stage2_training.ipynb",
    params:
        notebook=lambda w: {**COMMON, "configuration": w.configuration, "seed": int(w.seed), **STUDY.stage2},
    threads: STUDY.threads["stage2"]
    run:
        run_notebook(input[0], output.notebook, params.notebook, threads=threads)


rule evaluate:
    input:
        "notebooks/04_evaluation.ipynb",
        expand(OUT + "/{run}/metrics.csv", run=RUNS),
    output:
        f"{OUT}/report/cases.csv",
        notebook=f"{OUT}/report/04_evaluation.ipynb",
    params:
        notebook=REPORT,
    run:
        run_notebook(input[0], output.notebook, params.notebook)


rule visualize:
    input:
        "notebooks/05_visualization.ipynb",
        expand(OUT + "/{run}/metrics.csv", run=RUNS),
    output:
        notebook=f"{OUT}/report/05_visualization.ipynb",
    params:
        notebook=REPORT,
    run:
        run_notebook(input[0], output.notebook, params.notebook)


rule segment_a_patient:
    input:
        "notebooks/09_segment_a_patient.ipynb",
        f"{OUT}/stage1/regions.csv",
        f"{OUT}/{RUNS[-1]}/weights.safetensors",
    output:
        notebook=f"{OUT}/report/09_segment_a_patient.ipynb",
    params:
        run=f"{OUT}/{RUNS[-1]}",
    run:
        regions = pd.read_csv(input[1], dtype={"case_id": str})
        case_id = regions.loc[regions["split"] == "test", "case_id"].iloc[0]
        scan = f"{DATA}/images/{case_id}.nii.gz"
        run_notebook(
            input[0], output.notebook, {"run": params.run, "scan": scan, "output": f"{OUT}/report/segmented"}
        )
