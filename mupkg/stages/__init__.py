"""The two stages: localization, training, inference."""

from mupkg import lazily

__getattr__ = lazily(
    __name__,
    {
        "cards": ["card"],
        "inference": ["Pipeline", "segment"],
        "landmarks": ["FemoralHeads", "femoral_heads"],
        "localization": ["locate"],
        "prediction": ["predict_volume"],
        "regions": ["Regions"],
        "training": ["train"],
    },
)
