"""Scans, cohorts, phantoms, preparation and patches.

Names are looked up when they are first used: cutting patches needs no library that reads scans.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cases": ["Case"],
        "cohort": ["Cohort", "CohortError"],
        "patches": ["PatchSource"],
        "phantom": ["make_phantom"],
        "preprocessing": ["Preparation", "prepare"],
    },
)
