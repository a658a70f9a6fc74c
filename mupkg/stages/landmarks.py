"""The centres of the femoral heads in a CT: stage 1's second opinion on where the prostate is.

The paper (section III-A) takes the heads' centre for granted. Reading R3: find the heads without any label, as the
best pair of balls in their sockets, one for each side, of like size and at about equal height.

At a coarse resolution a head is no free ball: it melts into its socket and its neck, and metal or contrast medium
may be rounder. So the search is for a ball *in a socket*, four parts around an axis that points down the femoral
neck (nothing is asked of the neck itself):

    ball    the head, bone or marrow                              should be bright
    gap     the cartilage around it                               should be darker
    socket  the acetabulum, on the far side from the neck         should be bright
    free    a collar between the socket's rim and the neck        should be soft tissue

The score is a correlation, so fast Fourier transforms try every place at once; then two candidates must lie as hips
do. Where the scan is fine enough to show the layers of the joint, they settle the centre to a millimetre.
"""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import fft, ndimage, optimize

from mupkg.scans.cases import BODY_HU, Point, not_in_hu

GRID_MM, MAX_VOXELS = 3.0, 2_000_000  # working grid; coarser for very large scans, so that the work is bounded
SMOOTHING_MM = 2.0  # standard deviation; calms noise and bridges small marrow holes (R3: bone, filled)
SOFT_HU, BONE_HU = 50.0, 200.0  # likeness to bone rises from 0 to 1 between these
RADII_MM = (14.0, 17.0, 20.0, 23.0, 26.0)  # a template fits heads up to about 15 % larger: R3's 13 to 30 mm
NECK_AXIS = (0.73, -0.10, -0.68)  # (lateral, back, up): where the socket opens and the neck leaves
DISTANCE_MM = (130.0, 175.0, 230.0)  # between the two centres: least, usual, most
DISTANCE_PENALTY = 0.1  # off the score at 50 mm from the usual distance; grows with the square
MAX_SLOPE = 0.45  # height (or depth) difference per distance between the centres: about 25 degrees
HEIGHT_PENALTY = 0.2  # off the score, times the height's slope: a level pair beats a crooked one
MAX_RADIUS_DIFFERENCE_MM, MAX_OFF_MIDDLE_MM = 6.0, 50.0  # the pair's midpoint against the body's, side to side
MIN_SCORE, SURE_SCORE = 0.50, 0.65  # template score (1 = perfect) of confidence 0 and 1
REFINE_GRID_MM, REFINE_SMOOTHING_MM, REFINE_HU = 2.0, 1.5, (0.0, 400.0)
REFINE_REACH_MM = 12.0  # how far the layers of the joint may move a centre
REFINE_RADII_MM = (10.0, (24.0, 27.0))  # layers looked at, to suit small and large heads: not the core (a nail?)
MIN_EXPLAINED = 0.40  # share of the density's variance that the layers of a resolved joint explain


class FemoralHeads(NamedTuple):
    """Centres as physical points (x, y, z) in mm (LPS: the patient's left is +x); both None when in doubt."""

    left: Point | None = None
    right: Point | None = None
    confidence: float = 0.0  # 0 to 1
    reason: str = ""  # in words: what was found, or why there is no answer


def femoral_heads(image: sitk.Image) -> FemoralHeads:
    """Both femoral head centres in a CT in HU of any spacing (mm) and direction, without any label (reading R3).

    In doubt (an MR, another part of the body, a cut or ruined hip) both are None and `reason` says why.
    """
    if problem := _unusable(image):
        return FemoralHeads(reason=problem)
    low, high = _bounds(image)
    grid_mm = float(max(GRID_MM, np.cbrt(np.prod(high - low) / MAX_VOXELS)))
    volume, first = _upright(image, low, high - low, grid_mm)
    volume = ndimage.gaussian_filter(volume, SMOOTHING_MM / grid_mm)
    bone = np.clip((volume - SOFT_HU) / (BONE_HU - SOFT_HU), 0, 1)
    body, solid = volume > BODY_HU, bone > 0.5
    if not 0 < solid.sum() < 0.5 * body.sum():
        return FemoralHeads(reason="no bone found" if not solid.any() else "more than half would be bone")
    box = ndimage.find_objects(solid.astype(np.uint8))[0]
    right, left = (_candidates(bone[box], side, grid_mm) for side in (-1, 1))
    score, right, left = _best_pair(right, left, body[box], grid_mm)
    if score == -np.inf:
        return FemoralHeads(reason="no two ball-in-socket shapes lie as the two hips do")
    if score < MIN_SCORE:
        return FemoralHeads(
            reason=f"the best pair looks too little like hip joints (score {score:.2f}, {MIN_SCORE:.2f} needed)"
        )
    corner = first + grid_mm * np.array([part.start for part in box[::-1]])
    left, right = (_refined(image, corner + grid_mm * at[::-1], side) for at, side in ((left, 1), (right, -1)))
    confidence = float(min(1.0, (score - MIN_SCORE) / (SURE_SCORE - MIN_SCORE)))
    return FemoralHeads(left, right, confidence, f"two ball-in-socket shapes found (score {score:.2f})")


def _unusable(image: sitk.Image) -> str:
    """Why the image cannot be a CT of both hips at all; empty if it can."""
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        return "not a three-dimensional image of single values"
    thinnest_mm = min(n * s for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True))
    if thinnest_mm < 60 or min(image.GetSize()) < 4:
        return f"the scan is only {thinnest_mm:.0f} mm thick: too little for a hip joint"
    values = sitk.GetArrayViewFromImage(image)
    if not np.isfinite(values).all():
        return "some voxels are not finite numbers"
    reason = not_in_hu(values)
    return f"not a CT in HU: {reason}" if reason else ""


def _bounds(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest physical coordinates (x, y, z) in mm; the scan may lie obliquely."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * image.GetSize() - 0.5
    points = [image.TransformContinuousIndexToPhysicalPoint(corner.tolist()) for corner in corners]
    return np.min(points, axis=0), np.max(points, axis=0)


def _upright(image: sitk.Image, low: np.ndarray, extent: np.ndarray, grid_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """HU (z, y, x) on an isotropic grid along the patient's axes, and where its first voxel lies: (x, y, z) in mm."""
    # Averaged in blocks first: resampling alone would keep a fine scan's noise.
    image = sitk.Cast(sitk.BinShrink(image, [max(1, int(grid_mm / s)) for s in image.GetSpacing()]), sitk.sitkFloat32)
    first, axes = low + grid_mm / 2, np.eye(3).ravel().tolist()
    grid = np.ceil(extent / grid_mm).astype(int).tolist(), sitk.Transform(), sitk.sitkLinear, first.tolist()
    image = sitk.Resample(image, *grid, [grid_mm] * 3, axes, -1000.0)
    return np.clip(sitk.GetArrayFromImage(image), -1000, 600), first


def _neck_axis(side: int) -> np.ndarray:
    """Unit vector (x, y, z) from the head down the neck. side: -1 the patient's right, 1 the left."""
    return np.array(NECK_AXIS) * (side, 1, 1) / np.linalg.norm(NECK_AXIS)


def _template(side: int, radius_mm: float, grid_mm: float) -> np.ndarray:
    """The ball in its socket on a cube (z, y, x); its correlation with a perfect hip is 1."""
    reach = int(np.ceil(1.75 * max(RADII_MM) / grid_mm))
    position = (np.indices((2 * reach + 1,) * 3) - reach) * grid_mm
    distance = np.sqrt((position**2).sum(0))
    cosine = np.tensordot(_neck_axis(side)[::-1], position, 1) / np.maximum(distance, grid_mm / 2)  # 1: down the neck

    def shell(inner: float, outer: float, where: np.ndarray | bool = True) -> np.ndarray:
        to_outer, to_inner = outer * radius_mm - distance, distance - inner * radius_mm
        weights = np.clip(to_outer / grid_mm + 0.5, 0, 1) * np.clip(to_inner / grid_mm + 0.5, 0, 1) * where
        return weights / weights.sum()

    ball, gap = shell(-1, 0.75), shell(0.85, 1.05, cosine < 0.5)
    socket, free = shell(1.1, 1.4, cosine < 0.1), shell(1.25, 1.75, (cosine > 0.2) & (cosine < 0.75))
    return (0.4 * ball - 0.25 * gap + 0.6 * socket - 0.5 * free).astype(np.float32)


def _candidates(bone: np.ndarray, side: int, grid_mm: float) -> list[tuple[float, float, np.ndarray]]:
    """The dozen places most like a hip joint of this side, best first: (score, radius mm, index (z, y, x))."""
    reach = _template(side, RADII_MM[0], grid_mm).shape[0] // 2
    n_z, n_y, n_x = bone.shape
    # Past the scan's lower and upper end its last slice goes on, lest a bone cut off there look round.
    bone = np.pad(bone, ((reach, reach), (0, 0), (0, 0)), mode="edge")
    shape = [fft.next_fast_len(n, real=True) for n in (n_z + 2 * reach, n_y + reach, n_x + reach)]
    spectrum = fft.rfftn(bone, shape)
    best = np.full((n_z, n_y, n_x), -np.inf, np.float32)
    radius = np.zeros_like(best)
    for radius_mm in RADII_MM:
        template = _template(side, radius_mm, grid_mm)[::-1, ::-1, ::-1]  # correlation = convolution, mirrored
        score = fft.irfftn(spectrum * fft.rfftn(template, shape), shape)
        score = score[2 * reach : 2 * reach + n_z, reach : reach + n_y, reach : reach + n_x]
        radius[score > best] = radius_mm
        best = np.maximum(best, score)
    peaks = np.argwhere(best == ndimage.maximum_filter(best, size=2 * int(12 / grid_mm) + 1))
    room_mm = np.minimum(peaks[:, 0], n_z - 1 - peaks[:, 0]) * grid_mm
    peaks = peaks[room_mm >= radius[tuple(peaks.T)]]  # a head that the scan cuts is left out
    peaks = peaks[np.argsort(-best[tuple(peaks.T)])][:12]
    return [(float(best[tuple(p)]), float(radius[tuple(p)]), p) for p in peaks]


def _best_pair(right: list, left: list, body: np.ndarray, grid_mm: float) -> tuple:
    """The candidates with the best score among those that lie as two hips do: (score or -inf, right, left index)."""
    best = (-np.inf, None, None)
    for score_r, radius_r, r in right:
        for score_l, radius_l, at in left:
            apart = (at - r) * grid_mm
            distance = max(grid_mm, float(np.linalg.norm(apart)))
            height, depth = abs(apart[:2]) / distance
            if apart[2] < 0 or not DISTANCE_MM[0] < distance < DISTANCE_MM[2] or max(height, depth) > MAX_SLOPE:
                continue
            way = np.rint(np.linspace(r, at, 51)).astype(int)
            in_body = body[tuple(way.T)].mean()  # knees have air between them
            off_middle_mm = abs(ndimage.center_of_mass(body[way[25, 0]])[1] - way[25, 2]) * grid_mm
            unlike_mm = abs(radius_r - radius_l)
            if unlike_mm > MAX_RADIUS_DIFFERENCE_MM or off_middle_mm > MAX_OFF_MIDDLE_MM or in_body < 0.7:
                continue
            unusual = ((distance - DISTANCE_MM[1]) / 50) ** 2
            score = float((score_r + score_l) / 2 - HEIGHT_PENALTY * height - DISTANCE_PENALTY * unusual)
            best = max(best, (score, r, at), key=lambda pair: pair[0])
    return best


def _refined(image: sitk.Image, centre: np.ndarray, side: int) -> Point:
    """Where density is most a function of the distance from the centre alone: marrow, shell, gap, shell.

    The measure is the share of the density's variance that the distance explains. Where it stays low (thick slices,
    worn joints) the layers are not resolved and the given centre (x, y, z) in mm is the better one.
    """
    grid_mm, half_mm = REFINE_GRID_MM, REFINE_REACH_MM + max(REFINE_RADII_MM[1])
    volume, first = _upright(image, centre - half_mm, np.full(3, 2 * half_mm), grid_mm)
    volume = np.clip(ndimage.gaussian_filter(volume, REFINE_SMOOTHING_MM / grid_mm), *REFINE_HU)
    directions = np.random.default_rng(0).normal(size=(300, 3))  # many at random cover the sphere evenly enough
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions = directions[directions @ _neck_axis(side) < 0.7]  # all but the neck's

    radii = np.arange(REFINE_RADII_MM[0], max(REFINE_RADII_MM[1]), 1.5)
    sphere = np.moveaxis(radii[:, None, None] * directions, -1, 0)[::-1].copy()  # (z, y, x), layer, direction
    middle, corner = (point[::-1, None, None] for point in (centre, first))

    def unexplained(shift: np.ndarray, outer_mm: float) -> float:
        """The share of the variance within `outer_mm` of the shifted centre that the distance leaves over."""
        part = slice(np.count_nonzero(radii < outer_mm))
        index = (middle + shift[::-1, None, None] + sphere[:, part] - corner) / grid_mm
        density = ndimage.map_coordinates(volume, index, order=1, mode="nearest")
        layer, area = density.mean(1), radii[part] ** 2 / (radii[part] ** 2).sum()
        mean = area @ layer
        total = area @ ((density - mean) ** 2).mean(1)
        return 1 - float(area @ (layer - mean) ** 2 / max(total, 1e-6))

    steps, fits = np.arange(-REFINE_REACH_MM, REFINE_REACH_MM + 1, 4.0), []
    shifts = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    for outer_mm in REFINE_RADII_MM[1]:
        start = shifts[np.argmin([unexplained(shift, outer_mm) for shift in shifts])]
        fits.append(optimize.fmin(unexplained, start, (outer_mm,), full_output=True, disp=False))
    shift, rest, *_ = min(fits, key=lambda fit: fit[1])
    if 1 - rest >= MIN_EXPLAINED and np.linalg.norm(shift) <= REFINE_REACH_MM:
        centre = centre + shift
    return tuple(float(v) for v in centre)
