"""What puppets are painted with: colours, smooth lines, and layers of colour planes.

Lengths are in pictures (1 = side of the picture), x to the right and y down.
"""

import cv2
import numpy as np


def ramp(stops, position):
    """Colour [3] (RGB, 0 … 255) at `position` 0 … 1 along `stops`."""
    stops = np.asarray(stops, np.float32)
    at = np.linspace(0, 1, len(stops))
    return np.array([np.interp(position, at, stops[:, channel]) for channel in range(3)], np.float32)


def hls(hue, lightness, saturation):
    """Colour [3] (RGB, 0 … 255) from hue (turns), lightness and saturation (0 … 1)."""
    pixel = np.float32([[[hue % 1 * 360, lightness, saturation]]])
    return cv2.cvtColor(pixel, cv2.COLOR_HLS2RGB)[0, 0] * 255


def curve(points, closed=True, steps=6):
    """A smooth line [n, 2] through `points` (Catmull-Rom)."""
    points = np.asarray(points, np.float32)
    if closed:
        ring = np.concatenate([points[-1:], points, points[:2]])
    else:
        ring = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    a, b, c, d = (ring[i : len(ring) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, steps, endpoint=False, dtype=np.float32)[:, None]
    line = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * (b - c) + d - a) * t**3)
    line = line.reshape(-1, 2)
    return line if closed else np.concatenate([line, points[-1:]])


def mirror(points):
    """A shape symmetric about x = 0 from its right half, given top to bottom: [n, 2] to [2 n, 2]."""
    points = np.asarray(points, np.float32)
    return np.concatenate([points, points[::-1] * (-1, 1)])


def moved(points, x, y):
    """The points [n, 2], that far away."""
    return np.asarray(points, np.float32) + np.float32([x, y])


def curls(line, amount):
    """A hair outline with the bumps of curls: rounded outwards, `amount` 0 (straight) … 1."""
    step = np.gradient(line, axis=0)
    length = np.hypot(*step.T)
    bump = 0.012 * amount**1.5 * (np.abs(np.sin(np.cumsum(length) * np.pi / 0.028)) - 0.5)
    return line + bump[:, None] * np.stack([step[:, 1], -step[:, 0]], 1) / np.maximum(length, 1e-6)[:, None]


class Canvas:
    """A float32 layer of colour planes with its own coordinates: `pixel = (point - corner) * density - 0.5`.

    Four planes [4, H, W] are premultiplied RGBA; three are an opaque picture. Planes, because numpy is several times
    slower at weighting pixels [H, W, 3] with a mask [H, W].
    """

    def __init__(self, planes, corner, density):
        self.planes, self.corner, self.density = planes, np.float32(corner), float(density)
        height, width = planes.shape[1:]
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / self.density + self.corner[0])[None]
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / self.density + self.corner[1])[:, None]

    @classmethod
    def empty(cls, left, top, right, bottom, density):
        shape = (4, round((bottom - top) * density), round((right - left) * density))
        return cls(np.zeros(shape, np.float32), (left, top), density)

    def _fixed(self, points):
        """Points to OpenCV's fixed-point pixels (4 fractional bits)."""
        return np.rint(((points - self.corner) * self.density - 0.5) * 16).astype(np.int32)

    def _soften(self, mask, blur):
        mask = mask * np.float32(1 / 255)
        return cv2.GaussianBlur(mask, (0, 0), blur * self.density) if blur else mask

    def mask(self, outline, blur=0.0):
        """Coverage [H, W] in 0 … 1 of a closed outline, softened by `blur` (pictures)."""
        mask = np.zeros(self.planes.shape[1:], np.uint8)
        cv2.fillPoly(mask, [self._fixed(outline)], 255, cv2.LINE_AA, 4)
        return self._soften(mask, blur)

    def stroke(self, line, thickness, blur=0.0):
        """Coverage [H, W] of an open line of `thickness` (pictures)."""
        mask = np.zeros(self.planes.shape[1:], np.uint8)
        pixels = thickness * self.density  # a line thinner than a pixel becomes a fainter one
        cv2.polylines(mask, [self._fixed(line)], False, min(255.0, 255 * pixels), max(1, round(pixels)), cv2.LINE_AA, 4)
        return self._soften(mask, blur)

    def disc(self, x, y, radius):
        """Coverage [H, W] of a disc with a soft edge of about a pixel and a half."""
        away = np.sqrt((self.x - x) ** 2 + (self.y - y) ** 2)
        return np.minimum(np.maximum((radius - away) * (0.7 * self.density) + 0.5, 0), 1)

    def glow(self, x, y, radius_x, radius_y):
        """A soft spot [H, W], 1 in the middle."""
        return np.exp(-0.5 * ((self.x - x) / radius_x) ** 2) * np.exp(-0.5 * ((self.y - y) / radius_y) ** 2)

    def paint(self, mask, colour, opacity=1.0):
        """Lay `colour` ([3], RGB) over what is there, and make the layer opaque where `mask` is."""
        self.planes += mask * np.float32(opacity) * (np.float32([*colour, 1])[:, None, None] - self.planes)

    def tint(self, mask, colour, opacity=1.0):
        """Colour only what is there already: shading, shadows, make-up."""
        colour, planes = np.float32(colour)[:, None, None], self.planes[:3]
        if len(self.planes) == 4:
            colour = colour * self.planes[3]
        planes += mask * np.float32(opacity) * (colour - planes)

    def merged(self):
        """The layer as OpenCV has it, [H, W, planes]."""
        return cv2.merge(list(self.planes))


class Patch(Canvas):
    """A small opaque part of a picture [H, W, 4]; what is painted on it gets there with `put_back`."""

    def __init__(self, picture, corner, density, box):
        left, top = (int(v) for v in np.maximum((np.float32(box[:2]) - corner) * density, 0))
        right, bottom = (int(v) for v in (np.float32(box[2:]) - corner) * density)
        self._place = picture[top:bottom, left:right, :3]
        super().__init__(self._place.transpose(2, 0, 1).copy(), corner + np.float32([left, top]) / density, density)

    def put_back(self):
        self._place[:] = self.merged()


def lay_over(picture, layer):
    """Lay a premultiplied RGBA `layer` [H, W, 4] over the opaque `picture` [H, W, 3], in place."""
    red, green, blue, alpha = cv2.split(layer)
    cv2.multiply(picture, cv2.cvtColor(1 - alpha, cv2.COLOR_GRAY2RGB), picture)
    cv2.add(picture, cv2.merge([red, green, blue]), picture)
