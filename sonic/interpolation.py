"""More frames per second than a model makes: pictures in between, by ffmpeg's motion compensation or by a RIFE model.

The model's own pictures pass through unchanged, each at the time it had; so sound and picture stay in step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.filter import Graph
from torch import Tensor

from sonic.config import CHECKPOINTS, TICK_RATE, UserError
from sonic.media import EXACT
from sonic.weights import ROOT

RIFE = f"{CHECKPOINTS}/RIFE"  # where a user may put a TorchScript file of the model
# Every setting at ffmpeg's best but the search, which its default bounds to what a face moves. Without scd it would take
# a fast turn of the head for a cut and freeze it.
FILTER = "fps={rate}:mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=none"
LOOKAHEAD = 3  # pictures that the filter holds back; the last one is repeated so often to have them all

# Two neighbouring pictures uint8 [H, W, 3] -> those between them, [factor - 1, H, W, 3].
Between = Callable[[np.ndarray, np.ndarray], np.ndarray]


def factor_for(fps: str, native: float) -> int:
    """How many times `native` frames per second make what --fps asks for. Raises UserError if that is no whole number above 0."""
    if fps == "native":
        return 1
    factor = Fraction(int(fps)) / Fraction(native).limit_denominator(1001)
    if factor.denominator != 1:
        raise UserError(f"--fps {fps} is no multiple of the {native:g} frames per second here: use --fps native")
    return int(factor)


def rife_file(folder: str | Path = RIFE) -> Path | None:
    """The TorchScript file in the RIFE folder, None if there is none. Raises UserError if there are several."""
    folder = next((path for path in (Path(folder), ROOT / folder) if path.is_dir()), None)
    files = sorted(folder.glob("*.pt")) if folder else []
    if len(files) > 1:
        raise UserError(f"'{folder}' holds {len(files)} .pt files: leave the one that interpolation is to use")
    return files[0] if files else None


def load_rife(path: Path, factor: int, device: torch.device) -> Between:
    """A TorchScript model: two pictures [1, 3, H, W] in 0..1 and a time [1, 1, 1, 1] in 0..1 -> the picture then."""
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"'{path}' is no TorchScript model: {str(error).strip().splitlines()[0]}") from None

    def tensor(picture: np.ndarray) -> Tensor:
        return torch.from_numpy(picture).to(device).permute(2, 0, 1)[None].float() / 255

    @torch.inference_mode()
    def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        ends, made = (tensor(first), tensor(second)), []
        for number in range(1, factor):
            time = torch.full((1, 1, 1, 1), number / factor, device=device)
            try:
                picture = model(*ends, time)
            except RuntimeError as error:
                raise UserError(
                    f"'{path}' failed as model(first, second, time): {str(error).strip().splitlines()[-1]}"
                ) from None
            made.append((picture[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy())
        return np.stack(made)

    return between


def interpolate(
    frames: Iterable[np.ndarray], factor: int, between: Between | None = None, native: float = TICK_RATE
) -> Iterator[np.ndarray]:
    """Chunks uint8 [n, H, W, 3] at `native` frames per second -> chunks with `factor` times as many pictures.

    The last picture is held. `between` makes those in between; None leaves them to ffmpeg. At most a few pictures are kept.
    """
    if factor == 1:
        yield from frames
        return
    pictures = (picture for chunk in frames for picture in chunk)
    if between is None:
        yield from _motion_compensated(pictures, factor, Fraction(native).limit_denominator(1001))
        return
    last = None
    for first, last in pairwise(_repeat_last(pictures, 1)):
        yield np.concatenate(
            [first[None], between(first, last) if first is not last else np.stack([first] * (factor - 1))]
        )


def _repeat_last(pictures: Iterable[np.ndarray], times: int) -> Iterator[np.ndarray]:
    last = None
    for last in pictures:
        yield last
    if last is not None:
        yield from [last] * times


def _motion_compensated(pictures: Iterable[np.ndarray], factor: int, rate: Fraction) -> Iterator[np.ndarray]:
    """Groups [factor, H, W, 3]: one of the model's own pictures and those that follow it until the next."""
    own: deque[np.ndarray] = deque()

    def noted() -> Iterator[np.ndarray]:
        for picture in pictures:
            own.append(picture)
            yield picture

    group = []
    for number, picture in enumerate(_filtered(_repeat_last(noted(), LOOKAHEAD), factor, rate)):
        is_own = number % factor == 0
        if is_own and not own:  # what comes now follows from the repeated last picture
            return
        group.append(own.popleft() if is_own else picture)
        if len(group) == factor:
            yield np.stack(group)
            group = []


def _filtered(pictures: Iterable[np.ndarray], factor: int, rate: Fraction) -> Iterator[np.ndarray]:
    """Pictures at `rate` -> pictures at `factor` times that, as soon as ffmpeg's filter has them."""
    graph = None
    for number, picture in enumerate(pictures):
        if graph is None:
            graph = _graph(picture, factor, rate)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv444p", interpolation=EXACT, threads=1)
        frame.pts, frame.time_base = number, 1 / rate
        graph.push(frame)
        while True:
            try:
                made = graph.pull()
            except av.error.BlockingIOError:  # it wants another picture first
                break
            yield made.reformat(format="rgb24", interpolation=EXACT, threads=1).to_ndarray()


def _graph(picture: np.ndarray, factor: int, rate: Fraction) -> Graph:
    height, width = picture.shape[:2]
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format="yuv444p", time_base=1 / rate)
    motion = graph.add("minterpolate", FILTER.format(rate=rate * factor))
    source.link_to(motion)
    motion.link_to(graph.add("buffersink"))
    graph.configure()
    return graph
