"""The public path of what reads and writes scans; it lives in `mupkg.scans.files`."""

from mupkg.scans.files import access_named, files_below, no_access, read_scan, read_series, write_image

__all__ = ["access_named", "files_below", "no_access", "read_scan", "read_series", "write_image"]
