"""What is trained on: cohorts, phantoms, preparation and patches."""

from mupkg import lazily

__getattr__ = lazily(
    __name__,
    {
        "cohort": ["Case", "Cohort", "CohortError"],
        "dicom_rt": ["list_dicom", "read_rtstruct", "write_rtstruct"],
        "patches": ["PatchSource"],
        "phantom": ["make_phantom"],
        "preprocessing": ["Preparation", "prepare"],
    },
)
