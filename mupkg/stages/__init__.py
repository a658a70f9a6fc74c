"""The two stages: localization, training, inference."""

from mupkg.stages.inference import Pipeline, segment
from mupkg.stages.landmarks import FemoralHeads, femoral_heads
from mupkg.stages.localization import Regions, locate
from mupkg.stages.slices import predict_volume
from mupkg.stages.training import train

__all__ = ["FemoralHeads", "Pipeline", "Regions", "femoral_heads", "locate", "predict_volume", "segment", "train"]
