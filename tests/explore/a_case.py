"""A case that two runs predict: what the tests of the views look at."""

import numpy as np
import torch
from torch import nn

from mupkg.explore.predictions import CasePredictions
from mupkg.models import SegmentationOutput

SPACING = (3.0, 2.0, 1.0)
TRUTH = np.zeros((6, 24, 30), bool)
TRUTH[1:5, 8:18, 10:22] = True


class Places(nn.Module):
    """Embeddings (row, column): distances in feature space are distances in the picture."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in images.shape[2:]), indexing="ij")
        embeddings = torch.stack([rows, columns]).expand(len(images), 2, *rows.shape) * self.scale
        return SegmentationOutput(torch.zeros(len(images), 2, *rows.shape), embeddings)


def case_of_two_runs() -> CasePredictions:
    """Two runs: one nearly right, one a voxel off to the right and unsure on slice 3."""
    region = np.random.default_rng(0).integers(0, 256, TRUTH.shape).astype(np.uint8)
    sure, shifted = TRUTH * 0.9, np.roll(TRUTH, 1, axis=2) * 0.8
    shifted[3] *= 0.5
    heat = {"UNet": sure.astype(np.float32), "MetricUNet-H": shifted.astype(np.float32)}
    return CasePredictions("made up", region, TRUTH, SPACING, {"UNet": Places(), "MetricUNet-H": Places(3.0)}, heat)
