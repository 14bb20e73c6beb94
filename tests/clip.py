"""The clip that the demo and the tests run on, drawn here: textured objects over a moving background, exact masks.

Three objects move, turn, grow and shrink, and half hide each other in the course of 60 frames.

    python tests/clip.py results/demo-clip          # clip.mp4, f0.png and the truth, as a data set of one sequence
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from propagate import PALETTE, Video, film_writer, write_mask


def texture(rng: np.random.Generator, side: int, colours: list[tuple[int, int, int]], fineness: int) -> np.ndarray:
    """Cloudy noise of several octaves, coloured along the given colours: side x side x 3 uint8."""
    noise = np.zeros((side, side), np.float32)
    for octave in range(4):
        cells = max(2, fineness << octave)
        coarse = rng.random((cells, cells), np.float32)
        noise += cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    rank = (noise - noise.min()) / np.ptp(noise) * (len(colours) - 1)
    low = np.minimum(rank.astype(int), len(colours) - 2)
    table, part = np.array(colours, np.float32), (rank - low)[..., None]
    return (table[low] * (1 - part) + table[low + 1] * part).astype(np.uint8)


def outline(kind: str) -> np.ndarray:
    """A closed shape about the origin, about 1 in radius: points x 2."""
    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    radius = {
        "ball": np.ones_like(angle),
        "star": 0.75 + 0.25 * np.cos(5 * angle),
        "bean": 0.8 + 0.2 * np.cos(2 * angle) + 0.12 * np.sin(3 * angle),
    }[kind]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)


def render(
    frames: int = 60, height: int = 360, width: int = 640, objects: int = 3, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(frame H x W x 3 uint8, mask H x W uint8) of each frame; the same clip for the same arguments."""
    rng = np.random.default_rng(seed)
    fine = 2  # drawn at twice the size and reduced, so that frames have soft edges as real ones do
    H, W, unit = height * fine, width * fine, min(height, width) * fine
    side = max(H, W) * 2
    ground = texture(rng, side, [(38, 52, 40), (86, 104, 72), (150, 146, 104), (96, 120, 128), (190, 196, 190)], 12)
    looks = [
        ("ball", [(120, 16, 20), (232, 84, 36), (255, 214, 120), (140, 30, 40)]),
        ("star", [(16, 30, 110), (40, 120, 220), (200, 240, 255), (60, 20, 120)]),
        ("bean", [(70, 20, 90), (200, 60, 170), (255, 200, 230), (30, 110, 60)]),
    ]
    skins = [texture(rng, 256, looks[i % 3][1], 5) for i in range(objects)]
    for t in range(frames):
        u = t / 60
        shift = np.float32([[1, 0, -u * unit * 0.25 - side / 8], [0, 1, -side / 8 - unit * 0.04 * math.sin(5 * u)]])
        frame = cv2.warpAffine(ground, shift, (W, H), borderMode=cv2.BORDER_REFLECT)
        mask = np.zeros((H, W), np.uint8)
        for i in range(objects):
            phase = 2 * math.pi * i / objects
            across, down = ((-2.1, 0.6), (-1.0, -2.9), (1.4, 2.8))[i % 3]
            x, y = W * (0.5 + 0.3 * math.cos(phase + across * u)), H * (0.5 + 0.26 * math.sin(phase + down * u))
            size, turn = unit * 0.16 * (1 + 0.25 * math.sin(phase + 4 * u)), phase + (-1) ** i * 1.6 * u
            spin = np.float32([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) * size
            shape = outline(looks[i % 3][0]) @ spin.T + np.float32([x, y])
            own = cv2.fillPoly(np.zeros((H, W), np.uint8), [np.round(shape).astype(np.int32)], 1) > 0
            place = np.concatenate([spin / 110, np.float32([[x], [y]]) - spin / 110 @ np.float32([[128], [128]])], 1)
            frame[own] = cv2.warpAffine(skins[i], place, (W, H), borderMode=cv2.BORDER_REFLECT)[own]
            mask[own] = i + 1
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        noise = rng.normal(0, 2, frame.shape)
        yield np.clip(frame + noise, 0, 255).astype(np.uint8), mask[fine // 2 :: fine, fine // 2 :: fine].copy()


def write_clip(folder: Path, fps: float = 15, truth: str = "truth", **shape) -> Path:
    """clip.mp4, f0.png, and the true mask of every frame (<truth>/00000.png, ...) in `folder`."""
    clip = list(render(**shape))
    with film_writer(folder / "clip.mp4", fps, clip[0][0].shape[:2]) as append:
        for frame, _ in clip:
            append(frame)
    for t, (_, mask) in enumerate(clip):
        write_mask(folder / truth / f"{t:05d}.png", mask, PALETTE)
    write_mask(folder / "f0.png", clip[0][1], PALETTE)
    return folder / "clip.mp4"


if __name__ == "__main__":  # laid out as DAVIS is, so that evaluate.py scores the demo
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/demo-clip")
    print(film := write_clip(folder, truth="Annotations/480p/demo"))
    (pictures := folder / "JPEGImages" / "480p" / "demo").mkdir(parents=True, exist_ok=True)
    for t, frame in Video(film).frames(range(60)):
        cv2.imwrite(str(pictures / f"{t:05d}.jpg"), frame[..., ::-1])
    (folder / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("demo\n")
