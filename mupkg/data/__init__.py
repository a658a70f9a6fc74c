"""Scans, cohorts, phantoms, preparation and patches."""

from mupkg.data.cases import Case
from mupkg.data.cohort import Cohort, CohortError
from mupkg.data.patches import PatchSource
from mupkg.data.phantom import make_phantom
from mupkg.data.preprocessing import Preparation, prepare

__all__ = ["Case", "Cohort", "CohortError", "PatchSource", "Preparation", "make_phantom", "prepare"]
