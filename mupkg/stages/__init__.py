"""The two stages: localization, training, inference.

Names are looked up when they are first used: training needs no library that reads scans.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "inference": ["Pipeline", "segment"],
        "landmarks": ["FemoralHeads", "femoral_heads"],
        "localization": ["Regions", "locate"],
        "slices": ["predict_volume"],
        "training": ["train"],
    },
)
