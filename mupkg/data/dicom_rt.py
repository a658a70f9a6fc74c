"""The public path of planning scans and their contours: read and written by `mupkg.scans.dicom_rt`."""

from mupkg.data.build import sources_from_dicom_rt
from mupkg.scans.dicom_rt import contourable, list_dicom, pseudonym, read_rtstruct, write_rtstruct

__all__ = ["contourable", "list_dicom", "pseudonym", "read_rtstruct", "sources_from_dicom_rt", "write_rtstruct"]
