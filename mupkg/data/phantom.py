"""Planning CTs of a male pelvis, made up: every structure is a formula in mm, drawn anew for every seed.

The anatomy is written in the *frame of an average man*: millimetres from the midpoint of the femoral heads, x to
the patient's left, y to the back, z to the head (the LPS axes of DICOM). A patient (`draw_anatomy`) is this frame
stretched, turned and laid somewhere on the grid. Structures are signed distances (negative inside) evaluated within
their own boxes only, and painted one over the other, from the air inwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace as Anatomy

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mupkg.scans.cases import Case, phantom_name

HU = {  # the means of the tissues; those of a real CT beside them are in notebook 01
    "air": -1000.0, "gas": -960.0, "table shell": 120.0, "table foam": -940.0, "skin": 5.0, "fat": -105.0,
    "muscle": 49.0, "lean muscle": 52.0, "gluteus": 40.0, "vessel": 44.0, "bowel": 34.0, "stool": 22.0,
    "urine": 12.0, "bladder wall": 28.0, "rectal wall": 36.0, "seminal vesicle": 34.0,
    "prostate": 36.0, "plexus": 34.0, "cortex": 680.0, "marrow": 105.0, "head marrow": 295.0,
    "yellow marrow": -20.0, "cartilage": 60.0,
}  # fmt: skip
# Grain against density (HU, standard deviation in HU): fat has strands, marrow trabeculae, urine nothing but noise.
GRAIN = ((-1000, 8), (-300, 12), (-130, 17.5), (-60, 15), (0, 11), (20, 11), (33, 15), (60, 16), (150, 30), (400, 35))
GRAIN_SIGMA_MM = 0.95  # of the Gaussian that gives noise its grain in plane; it falls to 1/e at twice this
POINT_SPREAD_MM = 1.6  # width of the scanner's blurred edge
VOLUME_ML = (17.0, 112.0)  # drawn within; the label of a coarse grid still lies in 15 to 120
LEAST_MM = (130, 160, 260)  # that hold a pelvis (z, y, x)
SLAB_VOXELS = 2_000_000  # larger boxes are painted in slabs of slices, to bound memory

Vector = tuple[float, float, float]
Array = np.ndarray
Surface = Callable[[Array, Array, Array], Array]  # signed distance at x, y, z, mm


def waves(rng: np.random.Generator, shortest_mm: float, longest_mm: float, n: int = 6) -> Surface:
    """A smooth random function of position with mean 0 and standard deviation 1: a few plane waves."""
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = rng.uniform(shortest_mm, longest_mm, size=(n, 1))
    vectors = (2 * np.pi * direction / length).astype(np.float32)  # rad/mm
    phases = rng.uniform(0, 2 * np.pi, n).astype(np.float32)
    scale = np.float32(np.sqrt(2 / n))
    parts = [*zip(vectors, phases, strict=True)]
    return lambda x, y, z: scale * sum(np.cos(k[0] * x + k[1] * y + k[2] * z + phase) for k, phase in parts)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """What differs from patient to patient. Lengths in mm of the average man's frame unless said otherwise."""
    u = rng.uniform
    size = u(0.95, 1.05)
    stretch = tuple(size * u(0.98, 1.02, 3))
    volume = float(np.clip(45 * np.exp(0.5 * rng.normal()), *VOLUME_ML))
    radius = (volume * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    shape = np.array([1.16, 0.88, 0.98]) * u(0.9, 1.1, 3)
    filling = np.exp(u(np.log(70), np.log(420)))  # ml of urine
    bladder = (filling * 1000 * 3 / (4 * np.pi)) ** (1 / 3) * np.array([1.16, 1.0, 0.86]) * u(0.93, 1.07, 3)
    # A large prostate grows backwards and up into the bladder: the symphysis is in its way.
    centre = (u(-3, 3), u(-2, 5) + 0.35 * max(0.0, radius - 20), u(-31, -24) + 0.35 * max(0.0, radius - 20))
    return Anatomy(
        stretch=stretch,  # size of this man against the average one, along x, y, z
        rotation_deg=(u(-4, 4), u(-3, 3), u(-6, 6)),  # about x (pitch), y (yaw), z (roll)
        position_mm=(u(-30, 30), u(-220, -120), u(-900, 300)),  # of the heads' midpoint in the scanner (x, y, z)
        offset_mm=(u(-15, 15), u(-12, 12)),  # middle of the field of view against the middle of the body (x, y)
        margin_mm=(u(38, 60), u(36, 66)),  # air beside, and in front of and behind the body
        z_range_mm=(u(-122, -104), u(125, 165)),  # lowest and highest slice against the heads
        fat=u(12, 38),  # subcutaneous, at the sides
        belly=u(-3, 14),  # how much more of it in front than behind
        head_x=u(85, 91),  # lateral distance of each head's centre
        head_radius=u(23, 26),
        cartilage=u(3.0, 4.2),  # joint gap between head and socket
        prostate_ml=volume,  # true volume
        prostate_radius=(volume / np.prod(stretch) * 1000 * 3 / (4 * np.pi)) ** (1 / 3),  # were it a ball
        prostate_centre=centre,  # centroid aimed at
        prostate_shape=tuple(shape),  # relative half axes, left-right, front-back, up-down
        prostate_hu=HU["prostate"] + u(-4, 4),
        prostate_bumps=u(0.08, 0.15),  # surface irregularity, as a fraction of the mean radius
        bladder_radii=tuple(bladder),
        bladder_tilt=u(-8, 8),  # how far the bladder leans to the left
        rectum_radius=u(12, 20),
        gas_z=(u(-35, 10), u(20, 70)),  # where the gas bubbles of the rectum lie
        gas_radius=(u(2, 17), u(5, 20)),
        # Mean width of the fat planes around the prostate; below 0 most of its edge touches muscle.
        plane=u(-2.0, 0.5),
        body_waves=waves(rng, 180, 400, 3),
        organ_waves=waves(rng, 50, 120, 4),  # bends organs and muscles
        prostate_waves=waves(rng, 1.1 * radius, 3.2 * radius, 8),
        plane_waves=waves(rng, 22, 60),  # where those fat planes open and close
        bowel_waves=waves(rng, 45, 75, 5),
        fine_waves=waves(rng, 8, 25),  # stool, bowel gas and the trabeculae of marrow
    )


class Canvas:
    """The scan being painted: HU and label on the grid, and the coordinates of any box of it in the man's frame."""

    def __init__(self, anatomy: Anatomy, spacing: Vector, shape: tuple[int, int, int] | None) -> None:
        self.turn = Rotation.from_euler("xyz", anatomy.rotation_deg, degrees=True).as_matrix()
        self.stretch = np.array(anatomy.stretch)
        self.position = np.array(anatomy.position_mm)
        self.spacing = np.array(spacing[::-1])  # x, y, z from here on
        half_x = (172 + anatomy.fat) * self.stretch[0] + anatomy.margin_mm[0]
        half_y = (106 + anatomy.fat + abs(anatomy.belly)) * self.stretch[1] + anatomy.margin_mm[1]
        middle_z, half_z = np.mean(anatomy.z_range_mm), np.ptp(anatomy.z_range_mm) / 2
        half = np.array([half_x, half_y, half_z])
        if shape is None:
            size = np.ceil(2 * half / self.spacing).astype(int)
            size[:2] = np.minimum(size[:2], 512)
        else:
            size = np.array(shape[::-1])
        middle = self.position + [anatomy.offset_mm[0], 10 + anatomy.offset_mm[1], middle_z]
        self.origin = middle - (size - 1) / 2 * self.spacing
        self.axes = [self.origin[i] - self.position[i] + np.arange(size[i]) * self.spacing[i] for i in range(3)]
        self.hu = np.full(size[::-1], HU["air"], np.float32)
        self.label = np.zeros(size[::-1], bool)
        self.edge = float(np.hypot(POINT_SPREAD_MM, np.prod(self.spacing) ** (1 / 3)))

    def boxes(self, low: Vector, high: Vector, mirrored: bool = False) -> Iterator[tuple[Array, ...]]:
        """(x, y, z, hu, label) of the voxels around a box of the man's frame; hu and label are views to paint on.

        With `mirrored` the box comes twice: as given (the patient's left) and on the right, with x counted to the
        right, so that a structure is written once for both sides.
        """
        for side in (1, -1) if mirrored else (1,):
            centre = self.turn @ (self.stretch * (np.add(low, high) / 2) * [side, 1, 1])
            half = np.abs(self.turn) @ (self.stretch * np.subtract(high, low) / 2) + self.edge
            ends = zip(self.axes, centre - half, centre + half, strict=True)
            cut = [slice(*np.searchsorted(axis, (start, stop))) for axis, start, stop in ends]
            thick = max(1, SLAB_VOXELS // max(1, (cut[0].stop - cut[0].start) * (cut[1].stop - cut[1].start)))
            for start in range(cut[2].start, cut[2].stop, thick):
                part = (slice(start, min(start + thick, cut[2].stop)), cut[1], cut[0])
                open_axes = np.ix_(*(self.axes[i][part[2 - i]].astype(np.float32) for i in (2, 1, 0)))[::-1]
                back = (self.turn / self.stretch).astype(np.float32)  # columns: the man's axes
                x, y, z = (sum(back[j, i] * open_axes[j] for j in range(3)) for i in range(3))
                if x.size:
                    yield np.float32(side) * x, y, z, self.hu[part], self.label[part]


def blend(hu: Array, distance: Array, value: float | Array, edge: float) -> None:
    """Paint `value` where the distance is negative, over an edge of the given width in mm."""
    cover = np.clip(0.5 - distance / np.float32(edge), 0, 1)
    hu += cover * (np.asarray(value, np.float32) - hu)


def ellipsoid(x: Array, y: Array, z: Array, centre: Vector, radii: Vector) -> Array:
    """Approximate signed distance, exact to first order at the surface."""
    a, b, c = (np.float32(1 / r) for r in radii)
    u, v, w = (x - np.float32(centre[0])) * a, (y - np.float32(centre[1])) * b, (z - np.float32(centre[2])) * c
    k = np.sqrt(u * u + v * v + w * w)
    return k * (k - 1) / np.sqrt((u * a) ** 2 + (v * b) ** 2 + (w * c) ** 2 + np.float32(1e-9))


def capsule(x: Array, y: Array, z: Array, start: Vector, end: Vector, r0: float, r1: float | None = None) -> Array:
    """Signed distance to a rounded stick whose radius goes from r0 to r1."""
    axis = np.subtract(end, start).astype(np.float32)
    x, y, z = x - np.float32(start[0]), y - np.float32(start[1]), z - np.float32(start[2])
    t = np.clip((x * axis[0] + y * axis[1] + z * axis[2]) / (axis @ axis), 0, 1)
    radius = np.float32(r0) if r1 is None else np.float32(r0) + t * np.float32(r1 - r0)
    return np.sqrt((x - t * axis[0]) ** 2 + (y - t * axis[1]) ** 2 + (z - t * axis[2]) ** 2) - radius


def tube(x: Array, y: Array, z: Array, points: list[Vector], radii: list[float]) -> Array:
    parts = [capsule(x, y, z, points[i], points[i + 1], radii[i], radii[i + 1]) for i in range(len(radii) - 1)]
    return np.minimum.reduce(parts)


def merge(a: Array, b: Array, width: float) -> Array:
    """Union with the crease rounded over `width` mm."""
    h = np.clip(width - np.abs(a - b), 0, None)
    return np.minimum(a, b) - h * h / np.float32(4 * width)


# Muscles and vessels of one side: name, tissue, course (x lateral), radii. Fat fills what they leave.
COURSES: tuple[tuple[str, str, list[Vector], list[float]], ...] = (
    ("gluteus medius", "gluteus", [(112, -8, 90), (124, 2, 45), (134, 12, 8)], [20, 27, 15]),
    ("gluteus minimus", "gluteus", [(108, -30, 60), (126, -12, 10)], [14, 13]),
    ("iliacus", "muscle", [(98, -8, 112), (82, -22, 60), (80, -38, 12)], [13, 22, 15]),
    ("psoas", "lean muscle", [(40, 8, 175), (50, -12, 100), (66, -32, 45), (78, -38, 2), (92, 2, -55)],
     [22, 23, 20, 17, 11]),
    ("piriformis", "gluteus", [(30, 66, 48), (75, 48, 30), (128, 18, 6)], [11, 12, 6]),
    ("obturator externus", "muscle", [(38, -24, -42), (70, 0, -42), (112, 14, -22)], [11, 12, 6]),
    ("pectineus", "muscle", [(34, -50, -18), (90, -8, -75)], [12, 13]),
    ("adductor longus", "muscle", [(22, -48, -48), (70, -30, -140)], [12, 27]),
    ("adductor magnus", "muscle", [(34, -6, -66), (70, 12, -150)], [16, 34]),
    ("hamstrings", "muscle", [(62, 42, -64), (88, 56, -150)], [15, 26]),
    ("rectus femoris", "muscle", [(96, -46, 22), (112, -60, -60), (114, -58, -150)], [9, 20, 25]),
    ("sartorius", "muscle", [(116, -58, 62), (96, -74, -20), (72, -66, -140)], [7, 10, 12]),
    ("tensor fasciae", "muscle", [(126, -50, 50), (144, -40, -20), (152, -20, -110)], [10, 14, 7]),
    ("vastus", "muscle", [(138, 2, -48), (138, -6, -160)], [18, 36]),
    ("vastus medialis", "muscle", [(104, -22, -55), (108, -26, -160)], [12, 26]),
    ("erector spinae", "gluteus", [(22, 92, 60), (34, 78, 180)], [10, 28]),
    ("iliac vessels", "vessel", [(22, -8, 150), (38, -6, 90), (56, -34, 40), (66, -62, 0), (72, -60, -120)],
     [9, 8, 7, 7, 7]),
    ("femoral vein", "vessel", [(24, 6, 140), (44, 8, 80), (52, -28, 30), (54, -60, 0), (60, -56, -120)],
     [9, 8, 6, 7, 6]),
)  # fmt: skip


def paint_body(c: Canvas, a: Anatomy) -> None:
    """Table, skin, fat, the abdominal wall and the great gluteal muscles."""
    back = 101 * a.stretch[1] + a.fat - a.belly  # where the table holds the body, in the scanner
    y = c.axes[1][None, :, None] - back
    x = c.axes[0][None, None, :]
    plank = np.maximum(np.abs(y - 18) - 18, np.abs(x - 12) - 230).astype(np.float32)
    blend(c.hu, plank, HU["table shell"], c.edge)
    blend(c.hu, plank + 3, HU["table foam"], c.edge)
    wide, front = 185 + a.fat, 105 + a.fat + abs(a.belly)
    for x, y, z, hu, _ in c.boxes((-wide, -front, -300), (wide, front + 16, 300)):
        s = np.abs(x)
        u, v = (x / (163 - 0.1 * np.abs(z))) ** 2, ((y - 10) / (98 + 0.02 * z)) ** 2
        k = np.sqrt(np.sqrt(u * u + v * v + 1.3 * u * v)) + np.float32(1e-3)  # between an ellipse and a box
        trunk = np.sqrt(x * x + (y - 10) ** 2) * (1 - 1 / k)
        trunk = np.maximum(trunk, -58 - z - 0.1 * y)
        thigh = np.sqrt((s - 86 - 0.04 * z) ** 2 + ((y - 6) * 0.9) ** 2) - 80 - 0.05 * z
        fascia = merge(trunk, np.maximum(thigh, z - 40), 30)
        bend = a.body_waves(x, y, z)
        fat = a.fat - a.belly * y / 100 + 2.5 * bend
        height = sum(np.float32(t) * axis for t, axis in zip(c.turn[1] * c.stretch, (x, y, z), strict=True))
        skin = np.maximum(fascia - fat, height - np.float32(back))  # the buttocks lie flat on the table
        blend(hu, skin, HU["skin"], c.edge)
        blend(hu, skin + 2.5, HU["fat"], c.edge)
        # One sheet under the fat: thin in front (abdominal wall, above the groin), thick behind (gluteus maximus).
        rear = np.clip((y - 14) / 40, 0, 1)
        thick = 10 + 26 * rear * np.clip((95 - z) / 60, 0, 1) * np.clip((z + 95) / 40, 0, 1)
        sheet = np.maximum(fascia, -fascia - thick)
        sheet = np.maximum(sheet, np.maximum(6 + 14 * rear - s, -5 - z - 60 * rear - 0.3 * s))
        # Around hip and thigh muscle fills what the pelvic cavity leaves; the named ones are painted over it.
        cavity = ellipsoid(x, y, z, (0, 12, 15), (68, 62, 88))
        fill = np.maximum(-cavity, np.maximum(z - 78 - 0.2 * y, -50 + 0.3 * z - y))
        blend(hu, np.maximum(np.maximum(fill, fascia + 3), 8 - s), HU["gluteus"], c.edge + 1)
        blend(hu, sheet - 2, HU["fat"], c.edge + 1)
        blend(hu, sheet + 1.5 * bend, HU["gluteus"] * rear + HU["muscle"] * (1 - rear), c.edge + 1)
    for x, y, z, hu, _ in c.boxes((-15, back - 25, -110), (15, back + 20, 30)):
        blend(hu, capsule(x, y, z, (0, back + 2, -110), (0, back + 8, 25), 6), HU["air"], c.edge)
    for x, y, z, hu, _ in c.boxes((-30, -130, -130), (30, -40, -40)):
        blend(hu, capsule(x, y, z, (0, -62, -58), (0, -92, -110), 14, 20), HU["gluteus"], c.edge)


def paint_muscles(c: Canvas, a: Anatomy) -> None:
    """The courses of the table above, both sides, and the obturator internus that lines the pelvis."""
    for _, tissue, points, radii in COURSES:
        low, high = np.min(points, axis=0) - max(radii) - 3, np.max(points, axis=0) + max(radii) + 3
        for x, y, z, hu, _ in c.boxes(tuple(low), tuple(high), mirrored=True):
            d = tube(x, y, z, points, radii) + a.organ_waves(x, y, z)
            blend(hu, d - 1.5, HU["fat"], c.edge)  # the fat around each muscle is what tells them apart
            blend(hu, d, HU[tissue], c.edge)
    for x, y, z, hu, _ in c.boxes((38, -35, -70), (72, 45, 25), mirrored=True):
        blend(hu, ellipsoid(x, y, z, (56, 6, -22), (11, 35, 40)), HU["muscle"], c.edge)


def paint_bowel(c: Canvas, a: Anatomy) -> None:
    """Loops above the bladder: where a random wave is high; some hold gas."""
    for x, y, z, hu, _ in c.boxes((-110, -85, 20), (110, 45, 200)):
        cavity = ellipsoid(x, y, z, (0, -25, 125), (104, 52, 95))
        wave = a.bowel_waves(x, y, z)
        loops = np.maximum(cavity, (0.22 - np.abs(wave)) * 12)  # both signs: neighbouring loops with fat between
        blend(hu, loops, HU["bowel"], c.edge)
        gas = np.maximum(cavity + 6, (1.6 - wave) * 12 + 0.3 * y)  # it rises to the front
        blend(hu, gas, HU["gas"] + 150 * np.abs(a.fine_waves(x, y, z)), c.edge)


def rectum_course(a: Anatomy) -> tuple[list[Vector], list[float]]:
    """Centres and radii of the rectum's outer wall, from the anus up: just behind the prostate, then the sacrum."""
    _, py, pz = a.prostate_centre
    behind = py + a.prostate_radius * a.prostate_shape[1] + a.rectum_radius - 1.5
    down = pz - a.prostate_radius * a.prostate_shape[2]
    points = [(0, behind + 16, -112), (0, behind + 2, min(down - 12, -58)), (0, behind, pz), (1, behind + 5, pz + 28),
              (4, 50, 30), (-4, 54, 62), (-22, 34, 92), (-55, 5, 100)]  # fmt: skip
    wide = a.rectum_radius
    return points, [11, 12, wide, wide, wide + 2, wide, wide - 2, wide - 2]


def rectum(x: Array, y: Array, z: Array, a: Anatomy) -> Array:
    """Signed distance to the rectum's outer wall."""
    return tube(0.92 * x, y, z, *rectum_course(a)) + 1.6 * a.organ_waves(x, y, z)


def prostate(x: Array, y: Array, z: Array, a: Anatomy, centre: Vector, radius: float) -> Array:
    """Signed distance: an egg with random bumps, narrower towards the apex, dented by the rectum."""
    rx, ry, rz = (radius * s for s in a.prostate_shape)
    narrow = 1 - 0.16 * np.clip((z - centre[2]) / rz, -1.2, 0.6)  # > 1 below the centre: x, y stretched, so narrower
    d = ellipsoid((x - centre[0]) * narrow, (y - centre[1]) * narrow, z - centre[2], (0, 0, 0), (rx, ry, rz))
    d = d + a.prostate_bumps * radius * a.prostate_waves(x, y, z)
    return np.maximum(d, 1.0 - rectum(x, y, z, a))


def fit_prostate(a: Anatomy) -> Surface:
    """The prostate whose volume and centroid are the drawn ones, found on a grid of its own (no scan's spacing)."""
    target = a.prostate_ml * 1000 / float(np.prod(a.stretch))  # mm^3 in the average man's frame
    radius, centre = (target * 3 / (4 * np.pi)) ** (1 / 3), np.array(a.prostate_centre)
    span = np.arange(-51, 51.1, 3.0, dtype=np.float32)
    z, y, x = (g + np.float32(a.prostate_centre[2 - i]) for i, g in enumerate(np.ix_(span, span, span)))
    x, y, z = np.broadcast_arrays(x, y, z)
    for _ in range(4):
        inside = prostate(x, y, z, a, tuple(centre), radius) < 0
        radius *= float((target / (inside.sum() * 27)) ** (1 / 3))
        centre = centre + 0.8 * (np.array(a.prostate_centre) - [g[inside].mean() for g in (x, y, z)])
    return lambda x, y, z: prostate(x, y, z, a, tuple(centre), radius)


def paint_organs(c: Canvas, a: Anatomy, gland: Surface) -> None:
    """Bladder, seminal vesicles, plexus, prostate, pelvic floor and rectum, and the label."""
    px, py, pz = a.prostate_centre
    rx, ry, rz = (a.prostate_radius * s for s in a.prostate_shape)
    top, bottom = pz + rz, pz - rz
    _, by, bz = a.bladder_radii
    bladder_centre = (px + a.bladder_tilt * 0.5, py - 10 - 0.15 * by, top + 0.84 * bz)
    points, _ = rectum_course(a)
    reach = np.array(a.bladder_radii) + 12
    for x, y, z, hu, _ in c.boxes(tuple(np.subtract(bladder_centre, reach)), tuple(np.add(bladder_centre, reach))):
        bladder = ellipsoid(x - a.bladder_tilt * (z - bladder_centre[2]) / 60, y, z, bladder_centre, a.bladder_radii)
        bladder = bladder + 2.5 * a.organ_waves(x, y, z)
        wall = 3 + 3 * np.clip((top + 10 - z) / 12, 0, 1)  # the muscle is thicker at the neck
        blend(hu, bladder - wall, HU["bladder wall"], c.edge + 1)
        blend(hu, bladder, HU["urine"], c.edge + 1)
    for x, y, z, hu, _ in c.boxes((-45, py - 15, top - 20), (45, py + 60, top + 30)):
        vesicle = capsule(np.abs(x), y, z, (3, py + 0.6 * ry, top - 2), (30, py + 0.6 * ry + 12, top + 14), 6.5, 5)
        blend(hu, vesicle + 1.2 * a.plane_waves(x, y, z), HU["seminal vesicle"], c.edge + 1.5)
    for x, y, z, hu, _ in c.boxes((-35, -55, bottom - 50), (35, py + 30, top + 5)):
        # In front of the gland its veins, below it the sphincter and the bulb: as dense as the gland itself.
        blend(hu, ellipsoid(x, y, z, (0, py - ry - 2, pz - 2), (0.95 * rx, 8, 0.9 * rz)), HU["plexus"], c.edge + 3)
        blend(hu, capsule(x, y, z, (0, py, bottom + 8), (0, py + 2, bottom - 16), 9), HU["rectal wall"], c.edge + 2)
        blend(hu, ellipsoid(x, y, z, (0, py - 4, bottom - 28), (13, 20, 11)), HU["muscle"], c.edge)
    for x, y, z, hu, label in c.boxes((px - 65, py - 60, pz - 65), (px + 65, py + 75, pz + 65)):
        d, behind = gland(x, y, z), rectum(x, y, z, a)
        around = merge(d, behind, 10)
        gap = np.clip(a.plane + 2.0 * a.plane_waves(x, y, z), 0, 5)
        half = np.clip(2.8 + 1.2 * a.body_waves(x, y, z) + 0.8 * a.organ_waves(x, y, z), 1.2, 5)  # its thickness
        floor = np.maximum(np.abs(around - gap - half) - half, np.maximum(z - pz - 0.6 * rz, py - 0.8 * ry - y))
        blend(hu, floor, HU["muscle"], c.edge + 1)
        value = a.prostate_hu + 3 * a.organ_waves(x, y, z) - 2 * np.clip((z - pz) / rz, -1, 1)
        blend(hu, d, value, c.edge + 3)
        label |= d < 0
    low, high = np.min(points, axis=0) - 28, np.max(points, axis=0) + 28
    for x, y, z, hu, _ in c.boxes(tuple(low), tuple(high)):
        outer = rectum(x, y, z, a)
        blend(hu, outer, HU["rectal wall"], c.edge + 1)
        lumen = np.maximum(outer + 4.5, -48 - z)  # the anal canal is closed
        blend(hu, lumen, HU["stool"] - 45 * np.clip(a.fine_waves(x, y, z), 0, 3), c.edge)
        for z0, r in zip(a.gas_z, a.gas_radius, strict=True):
            y0 = np.interp(z0, [p[2] for p in points[:6]], [p[1] for p in points[:6]])
            bubble = np.maximum(lumen + 0.5, ellipsoid(x, y, z, (0, y0 - 5, z0), (r, r, 1.4 * r)))
            blend(hu, bubble, HU["gas"], c.edge)


def hip_bone(x: Array, y: Array, z: Array, a: Anatomy) -> Array:
    """Iliac wing, socket, pubis and ischium of one side, with the head's room cut out."""
    # The wing is a plate: in every axial plane a stretch from its front end to its back end.
    levels = [15, 27, 57, 87, 117, 140]
    front = [80, 92, 106, 113, 122, 122], [-30, -40, -52, -54, -44, -8]  # its x and y at these levels
    back = [74, 72, 46, 41, 45, 96], [26, 28, 54, 64, 64, 36]
    fx, fy, bx, by = (np.interp(z, levels, end).astype(np.float32) for end in (*front, *back))
    tx, ty = bx - fx, by - fy
    t = np.clip(((x - fx) * tx + (y - fy) * ty) / (tx * tx + ty * ty), 0, 1)
    bow = 9 * np.float32(4) * t * (1 - t)  # the wing is hollow on the inside
    plate = np.sqrt((x - fx - t * tx - 0.5 * bow) ** 2 + (y - fy - t * ty - 0.5 * bow) ** 2)
    plate = (plate - (5 + 5 * np.abs(2 * t - 1) ** 2 + np.clip((50 - z) / 7, 0, 5))) * 0.9
    crest = 146 - 60 * (2 * t - 0.85) ** 2 * 0.7
    plate = np.maximum(plate, np.maximum(z - crest, 8 - z))
    head = np.sqrt((x - a.head_x) ** 2 + y * y + z * z)
    socket = head - (a.head_radius + a.cartilage + 8)
    opening = (x - a.head_x) * 0.80 - z * 0.52 - y * 0.30 - 7  # the socket looks outwards, down and to the front
    socket = np.maximum(socket, opening)
    pubis = ellipsoid(x, y, z, (15, -43, -34), (12, 9, 19))
    rami = np.minimum(capsule(x, y, z, (70, -26, -6), (16, -43, -26), 10, 8),
                      capsule(x, y, z, (12, -41, -46), (50, 14, -68), 6.5, 8))  # fmt: skip
    ischium = tube(x, y, z, [(80, 26, 4), (72, 34, -24), (58, 32, -60)], [14, 13, 15])
    spine = capsule(x, y, z, (72, 36, -8), (56, 50, -12), 7, 4)
    bone = merge(merge(merge(plate, socket, 8), merge(rami, pubis, 6), 6), np.minimum(ischium, spine), 6)
    bone = np.maximum(bone, 2.2 - x)  # the symphysis
    return np.maximum(bone, a.head_radius + a.cartilage - head)


def femur(x: Array, y: Array, z: Array, a: Anatomy) -> Array:
    """Head, neck, trochanters and shaft of one side."""
    hx, r = a.head_x, a.head_radius
    head = np.sqrt((x - hx) ** 2 + y * y + z * z) - r
    neck = capsule(x, y, z, (hx, 0, 0), (hx + 42, 8, -26), 0.64 * r, 16)
    trochanter = merge(ellipsoid(x, y, z, (hx + 53, 18, -10), (14, 19, 22)),
                       capsule(x, y, z, (hx + 28, 14, -48), (hx + 18, 22, -56), 13, 7), 6)  # fmt: skip
    shaft = capsule(x, y, z, (hx + 44, 12, -30), (hx + 26, 2, -220), 18, 14.5)
    return merge(merge(head, neck, 6), merge(trochanter, shaft, 10), 8)


def spine(x: Array, y: Array, z: Array) -> Array:
    """Sacrum, coccyx and the two lowest vertebrae."""
    levels = [-8, 10, 40, 70, 100, 122]
    y0, w, h = (np.interp(z, levels, v).astype(np.float32)
                for v in ([62, 78, 86, 80, 58, 40], [6, 14, 40, 48, 52, 48], [4, 6, 9, 14, 24, 26]))  # fmt: skip
    sacrum = (np.sqrt((x / w) ** 2 + ((y - y0) / h) ** 2) - 1) * np.minimum(w, h)
    sacrum = np.maximum(np.maximum(sacrum, -6 - z), z - 122 + 0.5 * np.abs(x) - 0.4 * (y - 40))
    column = (np.sqrt((x / 27) ** 2 + ((y - 22) / 19) ** 2) - 1) * 19
    disc = np.abs(np.mod(z - 121, 36) - 18) - 13.5  # vertebral bodies 27 mm high, discs of 9 mm
    arch = tube(np.abs(x), y, z, [(16, 36, 152), (22, 50, 150), (4, 60, 148)], [6, 8, 5])
    for level in (130, 166):
        arch = np.minimum(arch, capsule(x, y, z, (0, 60, level), (0, 78, level - 7), 5))
    return np.minimum(sacrum, np.minimum(np.maximum(np.maximum(column, disc), 123 - z), arch))


def paint_bones(c: Canvas, a: Anatomy) -> None:
    """Skeleton: cortical shell, marrow, cartilage in the joints. Bone is never prostate."""

    def bone(hu: Array, label: Array, d: Array, trabeculae: Array, shell: float) -> None:
        blend(hu, d, HU["cortex"], c.edge)
        blend(hu, d + shell, HU["marrow"] + 35 * trabeculae, c.edge)
        label &= d > 0

    for x, y, z, hu, label in c.boxes((-75, 0, -20), (75, 110, 200)):
        bone(hu, label, spine(x, y, z), a.fine_waves(x, y, z), 2.0)
    for x, y, z, hu, _ in c.boxes((-8, -55, -55), (8, -25, -12)):
        blend(hu, ellipsoid(x, y, z, (0, -42, -34), (6, 8, 18)), HU["cartilage"], c.edge)
    for x, y, z, hu, _ in c.boxes((55, -35, -35), (125, 35, 35), mirrored=True):
        joint = ellipsoid(x, y, z, (a.head_x, 0, 0), (a.head_radius + a.cartilage + 2,) * 3)
        blend(hu, joint, HU["cartilage"], c.edge)
    for x, y, z, hu, label in c.boxes((0, -70, -85), (140, 85, 150), mirrored=True):
        bone(hu, label, hip_bone(x, y, z, a), a.fine_waves(x, y, z), 2.0)
    for x, y, z, hu, label in c.boxes((55, -40, -200), (165, 50, 35), mirrored=True):
        d = femur(x, y, z, a)
        grain = a.fine_waves(x, y, z)
        bone(hu, label, d, grain, 1.8)
        blend(hu, np.maximum(d + 6, z + 55), HU["yellow marrow"], c.edge)  # the shaft holds fat within a thick cortex
        blend(hu, capsule(x, y, z, (a.head_x, 0, 0), (a.head_x + 8, 2, -5), 14), HU["head marrow"] + 50 * grain, 18.0)


def add_noise(c: Canvas, rng: np.random.Generator) -> None:
    """Noise with a grain in plane, stronger where the tissue itself is grainy."""
    noise = rng.standard_normal(c.hu.shape, dtype=np.float32)
    ndimage.gaussian_filter(noise, (0, *(GRAIN_SIGMA_MM / c.spacing[1::-1])), output=noise, mode="wrap")
    noise /= noise.std()
    density = np.arange(-1100, 2001)
    grain = np.interp(density, *zip(*GRAIN, strict=True)).astype(np.float32)
    c.hu += noise * grain[(np.clip(c.hu, -1100, 2000) + 1100).astype(np.int16)]


def make_phantom(seed: int, *, spacing_mm: Vector | None = None, shape: tuple[int, int, int] | None = None) -> Case:
    """A made-up planning CT of a male pelvis with its prostate label; the same seed gives the same bits.

    `spacing_mm` and `shape` are in array order (z, y, x). Spacing left out is drawn like the paper's (0.93 to 1.37 mm
    in plane, 1 to 3 mm slices); shape left out covers the body, from below the ischium to the iliac crests, at
    most 512 x 512 in plane. The anatomy depends on the seed alone; spacing changes the sampling and the noise.
    The image is int16 in HU, the label uint8; `femoral_heads` are the true centres of the left and the right head in
    physical mm (x, y, z).
    """
    anatomy_rng, spacing_rng, noise_rng = (np.random.default_rng([seed, stream]) for stream in range(3))
    anatomy = draw_anatomy(anatomy_rng)
    if spacing_mm is None:
        in_plane = spacing_rng.uniform(0.93, 1.37)
        spacing_mm = (float(spacing_rng.uniform(1.0, 3.0)), in_plane, in_plane)
    _check_grid(spacing_mm, shape)
    canvas = Canvas(anatomy, spacing_mm, shape)
    paint_body(canvas, anatomy)
    paint_muscles(canvas, anatomy)
    paint_bowel(canvas, anatomy)
    paint_organs(canvas, anatomy, fit_prostate(anatomy))
    paint_bones(canvas, anatomy)
    add_noise(canvas, noise_rng)
    image = sitk.GetImageFromArray(np.clip(np.rint(canvas.hu), -1024, 3071).astype(np.int16))
    label = sitk.GetImageFromArray(canvas.label.astype(np.uint8))
    label = sitk.RelabelComponent(sitk.ConnectedComponent(label)) == 1  # no crumbs where bone cuts a corner off
    for volume in (image, label):
        volume.SetSpacing(canvas.spacing.tolist())
        volume.SetOrigin(canvas.origin.tolist())
    heads = [canvas.turn @ (canvas.stretch * (side * anatomy.head_x, 0.0, 0.0)) for side in (1, -1)]
    heads = tuple(tuple((canvas.position + head).tolist()) for head in heads)
    return Case(phantom_name(seed), image, label, modality="CT", femoral_heads=heads)


def _check_grid(spacing_mm: Vector, shape: tuple[int, int, int] | None) -> None:
    spacing = np.asarray(spacing_mm, float)
    if spacing.shape != (3,) or not ((spacing > 0) & (spacing <= 12)).all():
        raise ValueError(f"spacing_mm must be three lengths (z, y, x) above 0 and up to 12 mm, not {spacing_mm!r}")
    if shape is not None and (len(shape) != 3 or not (np.multiply(shape, spacing) >= LEAST_MM).all()):
        raise ValueError(
            f"shape {shape!r} at spacing_mm {spacing_mm!r}: a pelvis needs {LEAST_MM} mm (z, y, x) at least"
        )
