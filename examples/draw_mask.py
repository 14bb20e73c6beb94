"""Draw the first mask by hand: drag a box round an object, or click the corners of a polygon.

    python examples/draw_mask.py clip.mp4 f0.png              # on the first frame
    python examples/draw_mask.py clip.mp4 f40.png --frame 40  # then: propagate.py --mask f40.png --mask-frame 40

A box is refined to the object in it (GrabCut). Needs a screen, OpenCV, numpy and Pillow, nothing else of this project:
draw on a laptop, run on a server. The video is a film, a folder of pictures, or one picture.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
PALETTE = np.zeros((256, 3), np.uint8)  # PASCAL VOC: the bits of the id, dealt to r, g, b from the highest down
for bit in range(8):
    for channel in range(3):
        PALETTE[:, channel] |= (((np.arange(256) >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)


def read_frame(video: Path, number: int) -> np.ndarray:
    """Frame `number` of a film, a folder of pictures, a TIFF of several or a picture: H x W x 3 uint8 RGB."""
    frame = None
    if video.is_dir() or (video.is_file() and video.suffix.lower() in PICTURES):
        found = [path for path in video.glob("[!.]*") if path.suffix.lower() in PICTURES and path.is_file()] or [video]
        found.sort(key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)])
        flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR
        if found == [video] and video.is_file():
            frame = next(iter(cv2.imreadmulti(str(video), number, 1, flags=flags)[1]), None) if number >= 0 else None
        elif 0 <= number < len(found):
            frame = cv2.imread(str(found[number]), flags)
    elif video.is_file():
        film, left = cv2.VideoCapture(str(video)), number
        while left >= 0 and film.grab():  # seeking is not exact in every film
            frame, left = (film.retrieve()[1] if left == 0 else None), left - 1
    if frame is None:
        print(
            f"error: {video}: frame {number} cannot be read; give a film, a folder or a picture that has it",
            file=sys.stderr,
        )
        sys.exit(2)
    if frame.dtype != np.uint8:  # 16 bits, of which a camera may use a small part
        frame = cv2.normalize(frame, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    return cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB if frame.ndim == 2 else cv2.COLOR_BGR2RGB)


def need_window() -> None:
    """Refuse where no window can be opened; tried in a process of its own, since a missing display aborts."""
    probe = "import cv2; cv2.namedWindow('softcopy'); cv2.waitKey(1)"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        sys.exit("error: no window can be opened here; run it on a desktop")


def draw(frame: np.ndarray) -> np.ndarray:
    """Draw the objects on a frame: drag a box (refined with GrabCut) or click a polygon's corners. -> H x W ids."""
    help_line = "drag: box   click: corner, right click: close   n: next object   u: undo   Enter: done   Esc: give up"
    mask, corners, history, box = np.zeros(frame.shape[:2], np.uint8), [], [], []
    current = 1

    def claim(region: np.ndarray) -> None:
        history.append(mask.copy())
        mask[region > 0] = current

    def on_mouse(event, x, y, flags, _) -> None:
        if event == cv2.EVENT_LBUTTONDOWN:
            box[:] = [x, y, x, y]
        elif event == cv2.EVENT_MOUSEMOVE and box:
            box[2:] = [x, y]
        elif event == cv2.EVENT_LBUTTONUP and box:
            (left, right), (top, bottom) = sorted((box[0], x)), sorted((box[1], y))
            box.clear()
            if right - left > 4 and bottom - top > 4:
                claim(refine_box(frame, left, top, right, bottom))
            else:
                corners.append((x, y))
        elif event == cv2.EVENT_RBUTTONDOWN and len(corners) > 2:
            claim(cv2.fillPoly(np.zeros_like(mask), [np.array(corners, np.int32)], 1))
            corners.clear()

    cv2.namedWindow("softcopy", cv2.WINDOW_NORMAL)
    cv2.setMouseCallback("softcopy", on_mouse)
    while True:
        view = np.where(mask[..., None] > 0, (frame // 2 + PALETTE[mask] // 2), frame)
        if corners:
            cv2.polylines(view, [np.array(corners, np.int32)], False, (255, 255, 0), 2)
        if box:
            cv2.rectangle(view, tuple(box[:2]), tuple(box[2:]), (255, 255, 0), 2)
        cv2.putText(
            view, f"object {current}   {help_line}", (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1
        )
        cv2.imshow("softcopy", cv2.cvtColor(view, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(20) & 0xFF
        if key == ord("n") and (mask == current).any() and current < 255:
            current += 1
        elif key == ord("u"):
            if corners:
                corners.pop()
            elif history:
                mask[:] = history.pop()
        elif key in (13, 10, 27):
            cv2.destroyWindow("softcopy")
            if key == 27 or not mask.any():
                sys.exit("nothing was drawn; drag a box over an object, then press Enter")
            return mask


def refine_box(frame: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """The object inside a box, by GrabCut: H x W uint8, 1 inside. The whole box where GrabCut finds nothing."""
    state = np.zeros(frame.shape[:2], np.uint8)
    rectangle = (left, top, right - left, bottom - top)
    cv2.setRNGSeed(0)
    cv2.grabCut(frame, state, rectangle, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_RECT)
    found = np.isin(state, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    if not found.any():
        found[top:bottom, left:right] = 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="a film, a folder of pictures, or one picture")
    parser.add_argument("mask", type=Path, help="the indexed PNG to write")
    parser.add_argument("--frame", type=int, default=0, help="which frame, counted from 0")
    args = parser.parse_args()
    frame = read_frame(args.video, args.frame)
    need_window()
    mask = Image.fromarray(draw(frame))
    mask.putpalette(PALETTE.tobytes())
    mask.save(args.mask)
    print(f"{args.mask}: give it to propagate.py with --mask" + f" --mask-frame {args.frame}" * (args.frame > 0))


if __name__ == "__main__":
    main()
