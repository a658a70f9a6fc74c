"""MetricUNet: two-stage prostate segmentation in CT with online voxel-wise metric learning."""

__version__ = "0.1.0"
