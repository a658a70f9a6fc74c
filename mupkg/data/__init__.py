"""Scans, cohorts, phantoms, preparation and patches."""

from mupkg import lazily

__getattr__ = lazily(
    __name__,
    {
        "cases": ["Case"],
        "cohort": ["Cohort", "CohortError"],
        "patches": ["PatchSource"],
        "phantom": ["make_phantom"],
        "preprocessing": ["Preparation", "prepare"],
    },
)
