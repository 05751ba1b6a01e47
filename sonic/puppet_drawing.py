"""How a puppet is drawn: unmoving layers once per identity and size, then each frame's eyes, brows, mouth and jaw.

Lengths are in pictures (1 = side of the picture), x to the right and y down. Head coordinates have their origin between
the eyes; the face reaches from -0.26 (crown) to about 0.24 (chin). Whatever keeps its shape is painted at leisure, with
soft shading; a frame then costs one pass over the jaw, a few small patches and one warp of the finished head.
"""

import cv2
import numpy as np

from sonic.canvas import Canvas, Patch, curls, curve, hls, lay_over, mirror, moved, ramp

# Colour ramps (RGB): skin light to deep, hair black to blond to silver, irises brown to grey.
SKIN = [(250, 221, 202), (240, 198, 168), (221, 168, 130), (182, 126, 90), (140, 91, 63), (112, 71, 50)]
HAIR = [(30, 26, 28), (62, 43, 33), (104, 68, 44), (150, 80, 45), (196, 148, 88), (226, 194, 134), (196, 194, 194)]
IRIS = [(70, 44, 28), (112, 76, 38), (98, 112, 62), (66, 122, 112), (74, 116, 164), (104, 124, 142)]

ACROSS = np.linspace(-1, 1, 25, dtype=np.float32)  # along a lip or an eyelid
ALONG = np.linspace(0, 1, 13, dtype=np.float32)  # along a brow, from the nose outwards


class Puppet:
    """An identity at one size, with its unmoving layers painted: `draw(pose)` gives frames, `truth(pose)` where things are."""

    REST = np.float32([0.5, 0.44])  # the head's origin in the picture
    PIVOT = np.float32([0.0, 0.24])  # the head turns about the top of the neck
    HEAD = 1.1  # pictures per unit of head coordinates

    def __init__(self, identity, size):
        look, self.size = identity, size
        # Proportions, in head coordinates (a drawing teacher's: eyes half way down, nose half way from brow to chin).
        self.half_width = 0.158 + 0.026 * look.face_width
        self.chin = 0.222 + 0.022 * look.face_height
        self.mouth = np.float32([0, 0.6 * self.chin])
        self.mouth_half = 0.050 + 0.014 * look.mouth_width
        self.lips = 0.011 + 0.009 * look.lip_thickness
        self.eye = np.float32([0.41 * self.half_width + 0.008 * look.eye_spacing, 0])
        self.eye_half = np.float32([0.0285 + 0.006 * look.eye_size, 0.0135 + 0.006 * look.eye_size])
        self.eye_tilt = 0.012 * (look.eye_tilt - 0.5)
        self.nose = 0.076 + 0.016 * look.nose_length
        self.brow_arch, self.brow_thickness = 0.006 + 0.012 * look.brow_arch, 0.007 + 0.007 * look.brow_thickness
        # Colours.
        self.skin = ramp(SKIN, look.skin) + np.float32([5, 0, -9]) * (look.warmth - 0.5) * 2
        self.shade = self.skin * np.float32([0.70, 0.60, 0.57])
        self.light = self.skin + (255 - self.skin) * np.float32([0.42, 0.38, 0.33])
        self.blush = self.skin * np.float32([0.97, 0.72, 0.70])
        self.hair = ramp(HAIR, look.hair)
        self.brow_colour = np.minimum(self.hair, self.skin) * np.float32([0.62, 0.55, 0.50])
        # Lips stand out from the mouth's inside and teeth not too much from lips: the landmark predictor takes a white
        # edge under a dark lip for the lip's own, and the measured mouth then stops following the drawn one.
        rouge = hls(0.95 + 0.05 * look.lip_tint, 0.46, 0.30 + 0.25 * look.lip_tint) * (0.5 + self.skin[0] / 500)
        lip = 0.62 * self.skin * np.float32([0.93, 0.66, 0.66]) + 0.38 * rouge
        self.lip = np.minimum(lip * (1 + 0.4 * look.skin), 245)
        self.teeth = 0.55 * np.float32([234, 228, 218]) + 0.45 * self.light
        self.iris = ramp(IRIS, look.eye_colour)

        self.background = self._paint_background(look)
        self.body, self.body_top = self._paint_body(look)
        self.head = self._paint_head(look)
        self.head_pixels = self.head.merged()

        # How far the neck follows the head.
        self.body_rows, self.body_columns = np.indices(self.body.shape[:2], dtype=np.float32)
        free = np.clip((0.83 - (self.body_rows + self.body_top) / size) / 0.15, 0, 1)
        self.body_follow = free * free * (3 - 2 * free) * size

        # How far the skin follows the jaw: from the mouth down, and less towards the cheeks.
        down = np.clip((self.head.y - self.mouth[1]) / 0.05, 0, 1)
        aside = np.clip((np.abs(self.head.x) / self.half_width - 1.0) / -0.5, 0, 1)
        self.jaw_row = int(np.argmax(down[:, 0] > 0))
        follow = (down**2 * (3 - 2 * down) * aside**2 * (3 - 2 * aside))[self.jaw_row :]
        self.jaw_follow = (follow * (0.034 * self.head.density)).astype(np.float32)  # head pixels, at opening 1
        rows, columns = np.indices(follow.shape, dtype=np.float32)
        self.jaw_rows, self.jaw_columns = rows + self.jaw_row, columns

    # --- layers that are painted once ---

    def _paint_background(self, look):
        turn = 2 * np.pi * look.background_angle
        across = np.linspace(-1, 1, self.size, dtype=np.float32)
        slope = (np.cos(turn) * across[None] + np.sin(turn) * across[:, None]) / 1.4
        lightness = 0.42 + 0.34 * look.background_lightness
        near = hls(look.background_hue, lightness, 0.22)
        far = hls(look.background_hue + 0.07, lightness + 0.24 * (look.background_slope - 0.5), 0.28)
        wall = near + (far - near) * (slope[..., None] + 1) / 2
        radius = across[None] ** 2 + (across[:, None] + 0.2) ** 2
        return np.clip(wall * (1.10 - 0.17 * radius[..., None]), 0, 255).astype(np.float32)

    def _paint_body(self, look):
        """Neck, shoulders and clothes: premultiplied RGBA [rows, W, 4] in picture pixels, and its first row."""
        first = round(0.55 * self.size)  # on a whole pixel, so that halving the canvas keeps its place
        body = Canvas.empty(0, first / self.size, 1, first / self.size + 1, 2 * self.size)
        neck, reach = 0.46 * self.half_width, 0.33 + 0.07 * look.shoulders
        side = [(0, 0.56), (neck, 0.58), (neck * 0.97, 0.70), (neck * 1.1, 0.765), (0.19, 0.83), (0.2, 0.98), (0, 1.05)]
        skin = moved(curve(mirror(side)), 0.5, 0)
        body.paint(body.mask(skin), self.skin)
        body.tint(body.glow(0.5 + neck, 0.72, 0.05, 0.2), self.shade, 0.55)
        body.tint(body.glow(0.5 - neck * 1.1, 0.72, 0.025, 0.2), self.shade, 0.45)
        body.tint(body.glow(0.5, 0.685, 0.12, 0.05), self.shade * 0.85, 0.95)  # the chin's shadow
        cloth = hls(look.clothes_hue, 0.1 + 0.7 * look.clothes_lightness, 0.12 + 0.42 * look.clothes_saturation)
        opening = 0.805 + 0.12 * look.neckline
        side = [
            (neck * 0.95, 0.748),
            (0.16, 0.775),
            (0.26, 0.81),
            (reach, 0.86),
            (reach + 0.04, 0.93),
            (reach + 0.06, 1.06),
        ]
        outer = curve(side, closed=False)
        neckline = curve(
            [(0, opening), (neck * 0.55, opening - 0.016 - 0.03 * look.neckline), (neck * 0.95, 0.748)], closed=False
        )
        right = np.concatenate([neckline, outer])
        mask = body.mask(moved(mirror(right), 0.5, 0))
        rim = moved(np.concatenate([neckline[::-1] * (-1, 1), neckline[1:]]), 0.5, 0)
        body.tint(body.stroke(moved(rim, 0, -0.008), 0.016, 0.008), self.shade * 0.8, 0.6)
        body.paint(mask, cloth)
        body.tint(body.glow(0.33, 0.84, 0.10, 0.05), cloth + (255 - cloth) * 0.30, 0.7)
        body.tint(body.glow(0.88, 1.0, 0.16, 0.14), cloth * 0.55, 0.8)
        body.tint(body.glow(0.08, 1.05, 0.12, 0.12), cloth * 0.6, 0.7)
        for side in (-1, 1):  # where the sleeves begin
            fold = curve(
                [(0.5 + side * 0.245, 0.89), (0.5 + side * 0.225, 0.94), (0.5 + side * 0.235, 1.04)], closed=False
            )
            body.tint(body.stroke(fold, 0.014, 0.014), cloth * 0.55, 0.9)
        body.tint(body.stroke(moved(rim, 0, 0.009), 0.015, 0.0015), cloth * 0.72, 0.9)
        layer = cv2.resize(body.merged(), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        return layer[: self.size - first], first

    def _paint_head(self, look):
        """Hair, ears and face without eyes, brows and mouth, on a canvas of twice the picture's density."""
        head = Canvas.empty(-0.32, -0.37, 0.32, 0.43, 2 * self.size)
        w, chin, volume = self.half_width, self.chin, 0.010 + 0.045 * look.hair_volume
        skin, shade, hair = self.skin, self.shade, self.hair
        hair_shade, hair_light = hair * 0.62, hair + (255 - hair) * np.float32([0.26, 0.22, 0.17])
        end = -0.01 + 0.34 * look.hair_length**1.5
        crown = [
            (0, -0.262 - volume),
            (0.55 * w, -0.248 - volume * 0.95),
            (0.93 * w + volume * 0.4, -0.175 - volume * 0.4),
        ]

        # Hair behind the face, down to `end`; cut short, it tapers above the ears.
        tip, long = max(end, 0.0), min(1, max(0, (end - 0.02) / 0.08))
        spread = w - 0.004 + long * (0.014 + 0.5 * volume + 0.03 * look.hair_length)
        behind = [
            *crown,
            (w + 0.006 + (0.35 + 0.25 * long) * volume, -0.06),
            (spread, 0.45 * tip),
            (spread * 0.99, 0.85 * tip),
        ]
        behind += [(0.80 * spread, tip + 0.012), (0.55 * w, 0.95 * tip), (0.46 * w, 0.6 * tip), (0, 0.4 * tip)]
        back = head.mask(curls(curve(mirror(behind)), look.hair_curl))
        head.paint(back, hair * 0.78)
        for side in (-1, 1):
            head.tint(head.glow(side * spread * 0.97, 0.5 * tip, 0.02, 0.12), hair_light, 0.35 if side < 0 else 0.15)
            head.tint(head.glow(side * 0.55 * w, 0.20, 0.045, 0.09), hair * 0.35, 0.8)  # the face's shadow
            for strand in np.linspace(0.70, 0.97, 4):
                lock = curve(
                    [(side * w, 0), (side * strand * spread, 0.5 * tip), (side * strand * spread, tip)], closed=False
                )
                head.tint(back * head.stroke(lock, 0.004, 0.002), hair_shade * 0.8, 0.35 * long)

        for side in (-1, 1):
            turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            ear = np.stack([side * (w + 0.002 + 0.019 * np.cos(turn)), 0.022 + 0.04 * np.sin(turn)], 1)
            head.paint(head.mask(ear), skin * 0.94)
            head.tint(head.glow(side * (w + 0.004), 0.026, 0.008, 0.022), shade * 0.9, 0.75)

        jaw = w * (0.77 + 0.12 * look.jaw)
        side = [(0, -0.262), (0.55 * w, -0.246), (0.9 * w, -0.17), (0.99 * w, -0.08), (w, 0.0), (0.96 * w, 0.075)]
        side += [(jaw, 0.62 * chin), (0.74 * jaw, 0.83 * chin), ((0.40 - 0.1 * look.chin) * w, 0.975 * chin), (0, chin)]
        self.outline = curve(mirror(side))
        face = head.mask(self.outline)
        head.paint(face, skin)
        self._shade_face(head, face, look)

        # Hair over the forehead: from the crown down to the hairline, high where it parts.
        part, low = 0.15 * (look.hair_parting - 0.5), 0.065 * look.hair_fringe
        part_y = -0.188 + 1.2 * max(0, low - 0.035)
        burn = 0.02 + min(end, 0.10) * 0.4  # sideburns
        right = [
            (part, part_y),
            (part + 0.35 * (w - part), -0.172 + 0.8 * low),
            (0.70 * w, -0.142 + low),
            (0.90 * w, -0.085 + 0.5 * low),
        ]
        left = [(-x, y) for x, y in [(0.90 * w, -0.085 + 0.5 * low), (0.70 * w, -0.142 + low)]]
        left += [(part - 0.35 * (w + part), -0.172 + 0.8 * low)]
        outer = [
            (w * 0.965, burn - 0.03),
            (w * 0.975, burn),
            (w + 0.004, burn - 0.012),
            (w + 0.006 + (0.35 + 0.25 * long) * volume, -0.06),
        ]
        outer += crown[::-1]
        hairline = curve(
            [(-0.975 * w, burn), (-0.965 * w, burn - 0.03), *left, *right, (w * 0.965, burn - 0.03), (w * 0.975, burn)],
            closed=False,
        )
        top = curls(curve([*outer[1:], *[(-x, y) for x, y in outer[1:-1][::-1]]], closed=False), look.hair_curl)
        shape = np.concatenate([hairline, top])
        fringe = head.mask(shape)
        head.tint(
            head.mask(moved(shape, 0.004, 0.010), 0.007) * (1 - fringe), shade * 0.92, 0.8
        )  # its shadow on the skin
        head.paint(fringe, hair)
        everything = np.maximum(fringe, back * (1 - face))
        head.tint(everything * head.glow(-0.4 * w, -0.20 - volume, 0.07, 0.045), hair_light, 0.75)
        head.tint(everything * head.glow(0.9 * w, -0.12, 0.07, 0.12), hair_shade, 0.75)
        head.tint(
            fringe * np.clip(1 - cv2.GaussianBlur(fringe, (0, 0), float(0.012 * head.density)) * 1.15, 0, 1),
            hair_shade,
            0.9,
        )
        for strand in range(26):  # from the parting to the hairline and the sides
            goal = hairline[round((strand + 0.5) / 26 * (len(hairline) - 1))]
            swing = 0.012 * np.sin(strand * 2.4)
            bulge = np.float32(
                [0.75 * goal[0] + 0.25 * part + 0.1 * goal[0], -0.215 - 0.5 * volume + 0.25 * abs(goal[0])]
            )
            line = curve(
                [(part + 0.1 * goal[0], -0.262 - volume), moved(bulge, 0, swing), moved(goal, swing, -0.004)],
                closed=False,
            )
            line = line + 0.007 * look.hair_curl * np.sin(np.linspace(0, 14, len(line)) + 2.4 * strand)[:, None]
            head.tint(fringe * head.stroke(line, 0.004, 0.0012), hair_light if strand % 2 else hair_shade, 0.45)
        return head

    def _shade_face(self, head, face, look):
        """Light from the upper left: what makes an egg a head, and what the landmark detector looks for."""
        w, chin, skin, shade, light = self.half_width, self.chin, self.skin, self.shade, self.light
        rim = np.clip(1 - cv2.GaussianBlur(face, (0, 0), float(0.022 * head.density)), 0, 1) * face
        head.tint(rim, shade, 1.0)
        head.tint(face * np.clip(head.x / w * 0.55 + 0.05, 0, 1) ** 1.3, shade, 0.55)
        head.tint(face * head.glow(-0.35 * w, -0.10, 0.06, 0.05), light, 0.55)  # forehead
        for side in (-1, 1):
            head.tint(face * head.glow(side * 0.60 * w, 0.075, 0.036, 0.028), self.blush, 0.45)
            head.tint(face * head.glow(side * 0.56 * w, 0.045, 0.030, 0.016), light, 0.5 if side < 0 else 0.25)
            head.tint(face * head.glow(side * self.eye[0], -0.024, 0.034, 0.014), shade, 0.65)  # sockets
            head.tint(face * head.glow(side * 0.024, -0.006, 0.011, 0.026), shade, 0.55)  # beside the bridge
            head.tint(face * head.glow(side * self.eye[0], 0.030, 0.030, 0.008), shade, 0.30)  # under the eyes
            fold = [
                (side * 0.036, self.nose + 0.006),
                (side * 0.055, self.nose + 0.026),
                (side * 0.064, self.nose + 0.05),
            ]
            head.tint(face * head.stroke(curve(fold, closed=False), 0.005, 0.006), shade, 0.55)
            crease = [
                (side * (self.eye[0] - 0.9 * self.eye_half[0]), -0.012),
                (side * self.eye[0], -1.62 * self.eye_half[1]),
            ]
            crease += [(side * (self.eye[0] + 1.0 * self.eye_half[0]), -0.012 - self.eye_tilt)]
            head.tint(face * head.stroke(curve(crease, closed=False), 0.004, 0.0012), shade * 0.85, 0.75)
        # Nose: a lit bridge, a shaded flank, a ball with wings and nostrils.
        base, wing = self.nose, 0.023 + 0.010 * look.nose_width
        head.tint(face * head.glow(0.016, 0.6 * base, 0.010, 0.03), shade, 0.6)
        head.tint(face * head.glow(-0.016, 0.6 * base, 0.007, 0.03), shade, 0.25)
        head.tint(face * head.glow(-0.002, 0.45 * base, 0.0065, 0.035), light, 0.8)
        head.tint(face * head.glow(0, base + 0.011, 0.026, 0.007), shade * 0.92, 0.75)
        head.tint(face * head.glow(0, base - 0.012, wing * 0.62, 0.013), skin, 0.7)
        head.tint(face * head.glow(-0.003, base - 0.016, 0.009, 0.008), light, 0.9)
        for side in (-1, 1):
            alar = [
                (side * wing * 0.82, base - 0.024),
                (side * wing * 1.05, base - 0.008),
                (side * wing * 0.9, base + 0.003),
                (side * wing * 0.6, base + 0.003),
            ]
            head.tint(face * head.stroke(curve(alar, closed=False), 0.004, 0.0016), shade * 0.82, 0.95)
            head.tint(face * head.glow(side * wing * 0.47, base + 0.003, 0.0065, 0.0034), shade * 0.45, 0.95)
        # Around the mouth.
        head.tint(face * head.glow(0, self.mouth[1] - 0.026, 0.006, 0.012), shade, 0.4)
        head.tint(face * head.glow(0, self.mouth[1] + 2.0 * self.lips + 0.010, 0.030, 0.008), shade, 0.75)
        head.tint(face * head.glow(-0.004, 0.87 * chin, 0.030, 0.016), light, 0.35)
        head.tint(face * head.glow(0, chin + 0.006, 0.09, 0.016), shade, 0.6)

    # --- what moves ---

    def _mouth_curves(self, pose):
        """(inner upper, inner lower, outer upper, outer lower) lip curves, each [n, 2] from left to right."""
        t = ACROSS
        gap = 0.062 * max(pose.opening, 0)
        half = self.mouth_half * (1 + 0.24 * pose.width) * (1 - 0.10 * pose.opening)
        thick = self.lips * (1 - 0.22 * pose.width)
        corners = self.mouth[1] + 0.12 * gap - (0.003 + 0.015 * pose.smile) * np.abs(t) ** 2.2
        arch = (1 - t**2) ** (0.75 - 0.25 * max(-pose.width, 0))
        bow = 1 - 0.22 * np.exp(-((t / 0.16) ** 2)) - 0.10 * t**2  # Cupid's bow
        body = np.maximum(1 - np.abs(t) ** 2.6, 0)
        upper, lower = corners - 0.36 * gap * arch, corners + 0.64 * gap * arch
        rest = 0.0013 * (1 - t**2) * np.cos(3 * np.pi * t)  # closed lips meet in a soft wave
        curves = (
            upper - rest,
            lower - rest,
            upper - rest - thick * bow * body - 0.001,
            lower + 1.28 * thick * body**0.8 + 0.001,
        )
        widths = (half, half, half + 0.005, half + 0.005)
        return [np.stack([t * wide, line], 1) for wide, line in zip(widths, curves, strict=True)]

    def _draw_mouth(self, patch, pose):
        upper, lower, top, bottom = self._mouth_curves(pose)
        gap = lower[12, 1] - upper[12, 1]
        part = patch(bottom[0, 0] - 0.018, top[:, 1].min() - 0.018, bottom[-1, 0] + 0.018, bottom[:, 1].max() + 0.018)
        inner = part.mask(np.concatenate([upper, lower[::-1]])) if gap > 1e-4 else None
        upper_lip = part.mask(np.concatenate([top, upper[::-1]]))
        lower_lip = part.mask(np.concatenate([lower, bottom[::-1]]))
        middle = (lower[12] + bottom[12]) / 2
        part.tint(upper_lip, self.lip * 0.95)
        part.tint(lower_lip, self.lip)
        part.tint(lower_lip * part.glow(middle[0] - 0.006, middle[1], 0.022, 0.3 * self.lips), self.light, 0.40)
        if inner is not None:
            part.tint(inner, (34, 10, 14))
            tongue = part.glow(0, lower[12, 1] + 0.004, 0.55 * upper[-1, 0], 0.20 * gap + 0.004)
            part.tint(inner * np.minimum(tongue * 1.3, 1) * min(1, gap / 0.02), (176, 74, 78), 0.75)
            edge = upper[12, 1] + min(0.009, 0.40 * gap) - 0.004 * (upper[:, 0] / upper[-1, 0]) ** 2
            teeth = np.stack([upper[:, 0] * 0.84, edge], 1)
            teeth = np.concatenate([teeth, moved(teeth[::-1], 0, -0.03)])
            part.tint(inner * part.mask(teeth), self.teeth, 0.93)
            part.tint(inner * part.stroke(moved(upper, 0, 0.002), 0.006), (60, 20, 24), 0.45)  # the lip's shadow
        seam = part.stroke(upper if gap > 0.004 else (upper + lower) / 2, 0.0042)
        part.tint(seam, self.lip * 0.36, 0.9 if gap <= 0.004 else 0.6)
        for corner in (upper[0], upper[-1]):
            part.tint(part.glow(corner[0], corner[1], 0.005, 0.004), self.shade * 0.6, 0.6)
        part.put_back()

    def _draw_eye(self, part, pose, side):
        centre, (half, height) = self.eye * (side, 1), self.eye_half
        x, bulge = centre[0] + half * ACROSS, 1 - ACROSS**2
        tilt = centre[1] - self.eye_tilt * side * ACROSS
        lower = tilt + 0.62 * height * bulge**0.8
        upper = tilt - height * bulge**0.7
        upper = upper + (lower - upper) * min(pose.blink, 1.0) * 0.97
        lid, rim = np.stack([x, upper], 1), np.stack([x, lower], 1)
        if pose.blink < 0.95:
            ball = part.mask(np.concatenate([lid, rim[::-1]]))
            part.tint(ball, (240, 236, 232))
            iris_x, iris_y, radius = centre[0] + 0.010 * pose.gaze_x, centre[1] - 0.001 + 0.004 * pose.gaze_y, 0.0155
            lit = np.clip(0.7 + (part.y - iris_y) / radius, 0, 1)
            part.tint(ball * part.disc(iris_x, iris_y, radius), self.iris * 0.55)
            part.tint(ball * part.disc(iris_x, iris_y, 0.82 * radius) * lit, self.iris * 1.15)
            part.tint(ball * part.disc(iris_x, iris_y, 0.45 * radius), (18, 14, 14))
            part.tint(ball * part.disc(iris_x - 0.005, iris_y - 0.006, 0.004), (255, 255, 255), 0.95)
            part.tint(ball * part.stroke(moved(lid, 0, 0.003), 0.007), self.shade * 0.5, 0.45)  # the lid's shadow
        part.tint(part.stroke(rim, 0.0026), self.shade * 0.75, 0.7)
        lashes = np.concatenate([moved(lid, 0, -0.0024), moved(lid[::-1], 0, 0.0016)])
        part.tint(part.mask(lashes), np.minimum(self.hair * 0.35, 40), 0.95)

    def _draw_brow(self, part, pose, side):
        x = side * (self.eye[0] - 0.040 + 0.082 * ALONG)
        lift = 0.020 * pose.brow * (1 - 0.45 * ALONG if pose.brow < 0 else 0.7 + 0.3 * np.sin(np.pi * ALONG))
        arch = self.brow_arch * np.sin(np.pi * (0.05 + 0.82 * ALONG))
        y = -0.033 - 0.35 * self.eye_half[1] - arch + 0.003 * ALONG - lift
        thick = self.brow_thickness * (1 - 0.75 * ALONG**2) * np.minimum(1, 0.6 + 4 * ALONG)
        shape = np.concatenate([np.stack([x, y - thick / 2], 1), np.stack([x, y + thick / 2], 1)[::-1]])
        part.tint(part.mask(shape, 0.0018), self.brow_colour, 0.92)

    def _transform(self, pose):
        """Head coordinates to picture pixels: [2, 3]."""
        turn = np.deg2rad(pose.rotation)
        matrix = self.HEAD * pose.scale * np.float32([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        shift = self.REST + (pose.x, pose.y) + self.HEAD * self.PIVOT - matrix @ self.PIVOT
        return np.concatenate([matrix, shift[:, None]], 1) * self.size + np.float32([[0, 0, -0.5], [0, 0, -0.5]])

    def draw(self, pose):
        """One frame: uint8 RGB [size, size, 3]."""
        head = self.head_pixels.copy()
        if pose.opening > 0:
            rows = self.jaw_rows - self.jaw_follow * np.float32(pose.opening)
            head[self.jaw_row :] = cv2.remap(self.head_pixels, self.jaw_columns, rows, cv2.INTER_LINEAR)

        def patch(*box):
            return Patch(head, self.head.corner, self.head.density, box)

        self._draw_mouth(patch, pose)
        for side in (-1, 1):
            middle, lift = side * self.eye[0], 0.025 * abs(pose.brow)
            part = patch(middle - 0.054, -0.085 - lift, middle + 0.054, 0.025)
            self._draw_eye(part, pose, side)
            self._draw_brow(part, pose, side)
            part.put_back()

        picture = self.background.copy()
        lay_over(picture[self.body_top :], self._lean_body(pose))
        # From the canvas' pixels to head coordinates, from there to the picture.
        near, (left, top) = 1 / self.head.density, self.head.corner + 0.5 / self.head.density
        matrix = self._transform(pose) @ np.float32([[near, 0, left], [0, near, top], [0, 0, 1]])
        lay_over(picture, cv2.warpAffine(head, matrix, (self.size, self.size), flags=cv2.INTER_LINEAR))
        return cv2.convertScaleAbs(picture)  # rounds and saturates

    def truth(self, pose):
        """Where things are, in pixels: face box [4] (left, top, right, bottom: brows to chin, as with a closed mouth) and
        mouth [4, 2] (left corner, right corner, middle of the upper and of the lower lip's inner edge)."""
        upper, lower, _, _ = self._mouth_curves(pose)
        middle = len(upper) // 2
        mouth = np.stack([upper[0], upper[-1], upper[middle], lower[middle]])
        face = self.outline[self.outline[:, 1] > -0.08]
        matrix = self._transform(pose)
        face, mouth = (points @ matrix[:, :2].T + matrix[:, 2] for points in (face, mouth))
        return {"face_box": np.float32([*face.min(0), *face.max(0)]), "mouth": mouth.astype(np.float32)}

    def _lean_body(self, pose):
        """The neck follows the head, the shoulders stay."""
        columns = self.body_columns - self.body_follow * np.float32(pose.x)
        rows = self.body_rows - self.body_follow * np.float32(max(pose.y, 0))
        return cv2.remap(self.body, columns, rows, cv2.INTER_LINEAR)
