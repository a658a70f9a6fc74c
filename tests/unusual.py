"""Phantoms that no notebook asks for: with contrast medium in the bladder, or turned by a chosen angle."""

from types import SimpleNamespace

import pytest

from mupkg.data import phantom


def unusual_phantom(seed, spacing_mm, *, contrast=False, rotation_deg=None):
    """`make_phantom` with a bladder of 330 HU, or rotated by these degrees about x, y and z."""
    draw = phantom.draw_anatomy
    with pytest.MonkeyPatch.context() as patch:
        if contrast:
            patch.setitem(phantom.HU, "urine", 330.0)
        if rotation_deg is not None:
            turned = {"rotation_deg": rotation_deg}
            patch.setattr(phantom, "draw_anatomy", lambda rng: SimpleNamespace(**vars(draw(rng)) | turned))
        return phantom.make_phantom(seed, spacing_mm=spacing_mm)
