"""A video and the mask of one frame in, a mask for every frame out, and a film to look at.

    python propagate.py --model imagenet --video clip.mp4 --mask f0.png
    python propagate.py --model imagenet --video frames/ --points points.csv --context 7
    python propagate.py --model imagenet --video clip.mp4 --mask a.png --mask-frame 0 --mask b.png --mask-frame 40
    python propagate.py --model imagenet --video 0 --pick --show
    python propagate.py --engine tracker.onnx --video clip.mp4 --mask f0.png

Writes --out (results/<video name>/): masks/*.png (indexed PNG) or points.csv, overlay.mp4, contact_sheet.jpg and
run.json. Stopped and started again, it goes on after the last whole frame; with --engine, it keeps what is whole but
runs through it again.
"""

import csv
import glob
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import av
import cv2
import numpy as np
import torch
import tyro
from tqdm import tqdm

import common
from common import MODELS, PALETTE, Propagation, UserError, Video


@dataclass
class Args:
    model: str = "default"
    """Whose features: a name from --list-models."""
    weights: Path | None = None
    """Weights file; without it weights/ and torch hub's cache are searched, then it is fetched."""
    engine: Path | None = None
    """A graph of export.py (.onnx or .engine) to run instead of a model; it holds model and settings."""
    video: str = ""
    """A film, a folder or a quoted glob of pictures, or the number of a camera."""
    mask: Annotated[list[Path], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Picture of an annotated frame's objects: indexed PNG, grey ids, black and white, or one colour an object."""
    mask_frame: Annotated[list[int], tyro.conf.UseAppendAction] = field(default_factory=list)
    """The frame of the video that each --mask (or --points) belongs to; default: the first one used."""
    points: Annotated[list[Path], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Track key points instead: a CSV file with the columns id,x,y (pixels)."""
    pick: bool = False
    """Draw the objects in a window on the annotated frame."""
    out: Path | None = None
    """Output folder; default results/<video name>."""
    overwrite: bool = False
    """Replace results in --out that were made with other settings."""
    start: int = 0
    """First frame used, counted from 0."""
    end: int | None = None
    """Stop before this frame."""
    every: int = 1
    """Use every n-th frame."""
    reverse: bool = False
    """Run from the last frame to the first."""
    film: bool = True
    """Make overlay.mp4, for which the whole video is read once more."""
    show: bool = False
    """Show the result in a window as it is made; q stops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the features and affinities."""
    list_models: bool = False
    """Print the models and where their weights are, and stop."""
    propagation: Propagation = field(default_factory=Propagation)


# ---------------------------------------------------------------------------------------------------------------------
# What to do: the frames, the annotations, and what is already there


class Camera:
    """A camera as a video: each frame is kept in `folder`, and its time, so that the film can be made afterwards."""

    def __init__(self, number: int, folder: Path):
        self.source, self.broken, self.folder, self.times = f"camera {number}", None, folder, {}
        self.capture = cv2.VideoCapture(number)
        ok, self.first = self.capture.read()
        if not ok:
            raise UserError(f"--video {number}: no camera of this number gives pictures; try another, or a file")
        self.size = self.first.shape[:2]

    def frames(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in indices:
            frame = self.first if index == 0 else self.capture.read()[1]
            if frame is None:
                return
            self.times[index] = time.perf_counter()
            cv2.imwrite(str(self.folder / f"{index:05d}.jpg"), frame, [cv2.IMWRITE_JPEG_QUALITY, 95])
            yield index, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def choose_frames(args: Args, length: int) -> list[int]:
    """Indices of the frames to use, in the order in which they are run."""
    if args.every < 1:
        raise UserError(f"--every {args.every}: give 1 or more")
    chosen = list(range(length))[args.start : args.end : args.every] if args.start >= 0 else []
    if not chosen:
        span = f"--start {args.start}" + (f" --end {args.end}" if args.end is not None else "")
        raise UserError(f"{span}: no frame is left of the {length} in {args.video}")
    return chosen[::-1] if args.reverse else chosen


def read_frame(video, index: int) -> np.ndarray:
    """The frame that is annotated. UserError where the film does not give it."""
    for _, frame in video.frames([index]):
        return frame
    raise UserError(f"--mask-frame {index}: cannot be decoded from {video.source}; annotate another frame")


def fit_mask(path: Path, size: tuple[int, int], known: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Read a mask and its palette; bring it to the frame's size where the aspect is the same. known: as read_mask."""
    mask, palette = common.read_mask(path, known)
    (H, W), (h, w) = size, mask.shape
    if (h, w) != (H, W):
        if abs(w / h * H / W - 1) > 0.02:
            raise UserError(f"{path}: is {w}x{h}, the frames are {W}x{H}; draw it on a frame of this video")
        print(f"note: {path} is {w}x{h}, the frames are {W}x{H}: resized, nearest neighbour", file=sys.stderr)
        mask = cv2.resize(mask, (W, H), interpolation=cv2.INTER_NEAREST_EXACT)
    return mask, palette


def read_points(path: Path, size: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """A CSV file with the columns id,x,y -> the position of each id, in pixels."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
        points = {row["id"]: (float(row["x"]), float(row["y"])) for row in rows}
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a CSV file with the columns id,x,y"
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a table id,x,y with a header line and numbers ({error})") from error
    if not points or len(points) < len(rows):
        raise UserError(f"{path}: " + ("holds no points" if not points else "names an id twice") + "; one line a point")
    for name, (x, y) in points.items():
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise UserError(f"{path}: point {name} at {x:g},{y:g} lies outside the frame ({size[1]}x{size[0]} pixels)")
    return points


def check_topk(settings: Propagation, size: tuple[int, int], annotated: int) -> None:
    """Refuse a k beyond the context cells that there are to choose from."""
    if settings.localization in ("window", "predicted"):  # their presets take all there is
        return
    h, w = settings.grid(*size)
    cells = h * w
    if settings.localization == "fixed":
        r = min(settings.radius, max(h, w))
        region = ~common.beyond(settings, (r, r + 1, r, r + 1), (0, 2 * r + 1, 0, 2 * r + 1), "cpu")
        cells = min(cells, int(region.sum()))
    frames = annotated + settings.context if settings.aggregation == "overall" else 1
    if settings.topk > cells * frames:
        raise UserError(
            f"--topk {settings.topk}: only {cells} cells of {frames} context frame(s) are searched; "
            f"give {cells * frames} or less"
        )


def open_job(out: Path, job: dict, overwrite: bool, live: bool) -> dict:
    """Write run.json and give what it holds; refuse to mix with results of another job, so that nothing computed is
    lost or mislabelled. A camera's recording always replaces what is there."""
    try:
        record = json.loads((out / "run.json").read_text())
        before = record["job"]
    except (OSError, ValueError, KeyError):
        before = None
    for name in ("masks", "points.csv", *["frames"] * live) if before is None else ():
        if (out / name).exists():  # drawn by hand, maybe: never deleted
            raise UserError(f"{out / name}: is there already and not of a run (no run.json); choose another --out")
    if live or (before is not None and before != job):
        old, new = ({**each, **each.get("settings", {})} for each in (before or {}, job))
        keys = sorted(key for key in old.keys() | new.keys() if key != "settings" and old.get(key) != new.get(key))
        changed = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in keys)
        if not (overwrite or live):
            raise UserError(f"{out}: has results of another run ({changed}); add --overwrite or choose another --out")
        for name in ("masks", ".state") + ("frames",) * live:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("points.csv", "overlay.mp4", "contact_sheet.jpg"):
            (out / name).unlink(missing_ok=True)
    if before != job:
        record = {"job": job}
        write_json(out / "run.json", record)
    return record


def write_json(path: Path, content: dict) -> None:
    with common.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def digest(path: Path | None) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path and path.is_file() else None


def describe(video: Video) -> str:
    """What tells a video from another one under its name. The first picture of a folder stands for all: a later one
    that is broken may be replaced, and the run goes on."""
    file = Path(video.pictures[0] if video.pictures else video.source).stat()
    return f"{len(video)} frames, {file.st_size} bytes, changed {datetime.fromtimestamp(file.st_mtime)}"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing the mask by hand


def need_window(flag: str) -> None:
    """Refuse where no window can be opened; tried in a process of its own, since a missing display aborts."""
    probe = "import cv2; cv2.namedWindow('softcopy'); cv2.waitKey(1)"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        instead = "give --mask" if flag == "--pick" else "leave it away"
        raise UserError(f"{flag}: no window can be opened here; run it on a desktop, or {instead}")


def pick_mask(frame: np.ndarray) -> np.ndarray:
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
        view = common.overlay(frame, mask)
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
                raise UserError("--pick: nothing was drawn; drag a box over an object, then press Enter")
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


# ---------------------------------------------------------------------------------------------------------------------
# The run: reading, extracting, propagating and writing overlap


class Stopwatch(Counter):
    """Seconds by stage."""

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[stage] += time.perf_counter() - start

    def each(self, stage: str, items: Iterator) -> Iterator:
        """The same items; waiting for them is `stage`."""
        while True:
            with self.time(stage):
                item = next(items, None)
            if item is None:
                return
            yield item


Answer = tuple[int, np.ndarray, np.ndarray, torch.Tensor | None]  # index, frame, mask or points, soft labels


class Results:
    """What whole frames got, written by a thread: a mask or points, and the soft labels of the latest `keep` frames
    (in .state/), from which a stopped run goes on exactly as if it had not stopped."""

    def __init__(self, out: Path, names: list[str], keep: int, ids: list, palette: np.ndarray, points: bool):
        self.out, self.names, self.keep, self.ids, self.palette, self.points = out, names, keep, ids, palette, points
        self.pool, self.pending, self.csv = ThreadPoolExecutor(1), deque(), out / "points.csv"
        self.states = deque(sorted((out / ".state").glob("*.npy"), key=lambda path: path.stat().st_mtime_ns))
        self.table: dict[int, np.ndarray] = {}  # frame -> J x 2 positions, -1 where lost
        if points and self.csv.is_file():
            lines = self.csv.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            for index, name, x, y in csv.reader(line for line in lines if line[-1] == "\n"):  # the last may be torn
                place = self.table.setdefault(int(index), np.full((len(ids), 2), np.nan))
                place[ids.index(name)] = (x, y) if x else (-1, -1)
            self.table = {index: place for index, place in self.table.items() if not np.isnan(place).any()}
        if points:
            self.write_points(self.table)

    def mask_path(self, index: int) -> Path:
        return self.out / "masks" / f"{self.names[index] if self.names else f'{index:05d}'}.png"

    def state_path(self, index: int) -> Path:
        return self.out / ".state" / f"{index:05d}.npy"

    def has(self, index: int) -> bool:
        return index in self.table if self.points else self.mask_path(index).is_file()

    def read(self, index: int) -> np.ndarray:
        return self.table[index] if self.points else common.read_ids(self.mask_path(index))

    def add(self, index: int, answer: np.ndarray, labels: torch.Tensor | None = None) -> None:
        """Write what a frame got: its mask (H x W) or points (J x 2), and its soft labels."""
        labels = None if labels is None else labels.float().cpu().numpy()
        self.pending.append(self.pool.submit(self._write, index, answer, labels))
        while len(self.pending) > 4:
            self.pending.popleft().result()

    def _write(self, index: int, answer: np.ndarray, labels: np.ndarray | None) -> None:
        if labels is not None and self.keep:
            with common.atomic(self.state_path(index)) as temporary, temporary.open("wb") as file:
                np.save(file, labels)
            self.states.append(self.state_path(index))
            while len(self.states) > self.keep + 1:  # one more: a frame's answer comes after its state
                self.states.popleft().unlink(missing_ok=True)
        if self.points:
            self.table[index] = np.round(answer.astype(float), 2)  # as it is written: a run that goes on has no more
            with common.writing(self.csv), self.csv.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(self.rows([index]))
        else:
            common.write_mask(self.mask_path(index), answer, self.palette)

    def flush(self) -> None:
        while self.pending:
            self.pending.popleft().result()

    def rows(self, order: Iterable[int]) -> Iterator[list]:
        for index in order:
            for name, (x, y) in zip(self.ids, self.table[index], strict=True):
                yield [index, name, *(("", "") if x < 0 else (f"{x:.2f}", f"{y:.2f}"))]

    def write_points(self, order: Iterable[int]) -> None:
        with common.atomic(self.csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["frame", "id", "x", "y"], *self.rows(order)])

    def finish(self, backwards: bool, whole: bool) -> None:
        """Bring the table of points into order; where there is nothing to go on with, drop the state."""
        if self.points:
            self.write_points(sorted(self.table, reverse=backwards))
        if whole:
            shutil.rmtree(self.out / ".state", ignore_errors=True)


def segments(order: list[int], annotated: Iterable[int]) -> list[list[int]]:
    """The stretches that are run one by one: backwards from the first annotated frame, then onwards from each one.

    A stretch starts afresh with its annotated frame, so that what went wrong before a correction ends there.
    """
    places = sorted(order.index(index) for index in annotated)
    onwards = [order[a:b] for a, b in zip(places, [*places[1:], len(order)], strict=True)]
    return ([order[places[0] :: -1]] if places[0] else []) + onwards


def track(
    s: Propagation, video, stretches: list, annotations: dict[int, torch.Tensor], results: Results, encoder, clock
) -> Iterator[Answer]:
    """Label every frame that has no result yet. annotations: frame -> soft labels L x h x w."""
    device = encoder.mean.device

    def encode(frame: np.ndarray) -> torch.Tensor:
        with clock.time("extract"):
            features = encoder(torch.from_numpy(frame).to(device)[None])[0]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return features

    annotated = {}
    for stretch in stretches:
        rest = stretch[1:]
        done = next((i for i, index in enumerate(rest) if not results.has(index)), len(rest))
        if done == len(rest):
            continue
        if not annotated:  # every annotated frame stays in the context of all stretches for good
            for index, labels in annotations.items():
                annotated[index] = encode(read_frame(video, index)), labels.to(device)
        latest = rest[max(0, done - s.context) : done]
        back = rest[:done] if s.history else latest
        if not all(results.state_path(index).is_file() for index in back):
            back, done = [], 0  # its soft labels are gone: run this stretch from its annotated frame
        # Of all that came before, propagate_video looks again at the labels, but only at these frames' features.
        again = [index for index in back if index in latest or index in rest[4:5]]
        known = {index: encode(frame) for index, frame in (video.frames(again) if again else ())}
        other = annotated[next(iter(annotations))][0]
        recent = [
            (known.get(index, other), torch.from_numpy(np.load(results.state_path(index))).to(device)) for index in back
        ]
        current = deque()

        def features(todo=rest[done:], current=current) -> Iterator[torch.Tensor]:
            for item in clock.each("read", common.ahead(video.frames(todo))):
                current.append(item)
                yield encode(item[1])

        first = [annotated[stretch[0]], *(each for index, each in annotated.items() if index != stretch[0])]
        labelled = common.propagate_video(features(), first, s, recent)
        while True:
            start, elsewhere = time.perf_counter(), clock["read"] + clock["extract"]
            if (z := next(labelled, None)) is None:
                break
            index, frame = current.popleft()
            if results.points:
                answer = common.points_from_labels(z, video.size)
            else:
                answer = common.mask_from_labels(z, results.ids, video.size, s.minmax).cpu().numpy()
            clock["propagate"] += time.perf_counter() - start - (clock["read"] + clock["extract"] - elsewhere)
            yield index, frame, answer, z


def check_engine(args: Args, info: dict, size: tuple[int, int], annotations: dict, ids: list) -> None:
    """Refuse what --engine was not made for. info: what the file says of itself."""
    fixed = common.engine_settings(args.engine, info)
    flags = {"model": (args.model, info["model"])}
    if args.weights:
        flags["weights"] = args.weights.name, info.get("weights")
    if args.dtype != Args.dtype:
        flags["dtype"] = args.dtype, info["dtype"]
    flags |= {flag: (value, getattr(fixed, flag)) for flag, value in asdict(args.propagation).items()}
    for flag, (value, own) in flags.items():
        if value != own:
            flag = flag.replace("_", "-")
            raise UserError(f"--{flag} {value}: is fixed in {args.engine} ({own}); leave it away or export anew")
    if args.points:
        raise UserError(f"--points: {args.engine} follows masks; give --mask, or run without --engine")
    if len(annotations) > 1:
        raise UserError(f"--mask: {args.engine} starts from one annotated frame, not {len(annotations)}; give one")
    if size != (info["height"], info["width"]):
        raise UserError(
            f"{args.video}: is {size[1]}x{size[0]}, {args.engine} was made for {info['width']}x{info['height']}; "
            f"export with --height {size[0]} --width {size[1]}"
        )
    if len(ids) > info["objects"]:
        raise UserError(
            f"--mask: has {len(ids)} objects, {args.engine} follows {info['objects']}; export with --objects {len(ids)}"
        )


def track_engine(
    video, stretches: list, annotations: dict[int, np.ndarray], results: Results, engine, clock
) -> Iterator[Answer]:
    """As track, by an exported graph. annotations: the annotated frame -> its mask H x W. A stopped run computes a
    stretch again from its annotated frame, since the graph's memory is not on disk."""
    ids = np.array([0, *results.ids], np.uint8)
    number = np.zeros(256, np.uint8)  # the graph's ids are 1, 2, ...
    number[ids] = np.arange(len(ids))
    for stretch in stretches:
        if all(map(results.has, stretch)):
            continue
        for index, frame in clock.each("read", common.ahead(video.frames(stretch))):
            with clock.time("extract and propagate"):
                answer = ids[engine.step(frame, number[annotations[index]] if index in annotations else None)]
            if not results.has(index):
                yield index, frame, answer, None


def follow(answers: Iterator[Answer], results: Results, bar: tqdm, window: bool, clock: Stopwatch) -> None:
    """Write answer after answer, and show it in the window; until the last, or q."""
    with bar, closing(answers):
        for index, frame, answer, labels in answers:
            bar.update(not results.has(index))
            with clock.time("write"):
                results.add(index, answer, labels)
            if window and not show(draw(frame, answer, results)):
                return


# ---------------------------------------------------------------------------------------------------------------------
# What people look at


def draw(frame: np.ndarray, answer: np.ndarray, results: Results) -> np.ndarray:
    """The frame with its objects tinted, or its key points as dots."""
    if not results.points:
        return common.overlay(frame, answer, results.palette)
    picture, radius = frame.copy(), max(3, min(frame.shape[:2]) // 90)
    for number, (x, y) in enumerate(answer, 1):
        if x >= 0:
            centre, colour = (round(float(x)), round(float(y))), PALETTE[number % 255 + (number % 255 == 0)].tolist()
            cv2.circle(picture, centre, radius + 1, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(picture, centre, radius, colour, -1, cv2.LINE_AA)
    return picture


def show(picture: np.ndarray) -> bool:
    """Show a picture in the window; False when q or Esc is pressed."""
    cv2.imshow("softcopy", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(1) & 0xFF not in (ord("q"), 27)


def make_pictures(out: Path, video: Video, order: list[int], results: Results, film: bool) -> None:
    """contact_sheet.jpg of twelve frames, and overlay.mp4 of all in the order of `order`, at their times."""
    chosen = {order[round(i)] for i in np.linspace(0, len(order) - 1, min(12, len(order)))}
    H, W = video.size
    thumbs, width = [], min(480, W)
    writer = common.film_writer(out / "overlay.mp4", video.fps, video.size)
    if not film:
        (out / "overlay.mp4").unlink(missing_ok=True)
        writer, order = nullcontext(lambda *_: None), [index for index in order if index in chosen]
    with writer as append:
        for index, frame in tqdm(common.ahead(video.frames(order)), total=len(order), unit="frame", desc="overlay.mp4"):
            picture = draw(frame, results.read(index), results)
            append(picture, abs(video.times[index] - video.times[order[0]]))
            if index in chosen:
                thumb = cv2.resize(picture, (width, max(1, round(width * H / W))), interpolation=cv2.INTER_AREA)
                name = video.names[index][-((width - 10) // 11) :]  # the end tells the frames apart
                cv2.rectangle(thumb, (0, 0), (11 * len(name) + 10, 24), (0, 0, 0), -1)
                cv2.putText(thumb, name, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255))
                thumbs.append(thumb)
    columns = 4 if W >= H else 6
    thumbs += [np.full_like(thumbs[0], 255)] * (-len(thumbs) % columns if len(thumbs) > columns else 0)
    rows = [np.concatenate(thumbs[i : i + columns], 1) for i in range(0, len(thumbs), columns)]
    sheet = cv2.cvtColor(np.concatenate(rows), cv2.COLOR_RGB2BGR)
    with common.atomic(out / "contact_sheet.jpg") as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())


def list_models() -> None:
    """Print the table of models; the paper's score is J&F on DAVIS 2017 val, best without up-sampled input."""
    print(f"{'name':18} {'features':34} {'stride':>6}  {'paper J&F':>9}  weights")
    for name, model in MODELS.items():
        s = model.settings
        where = common.find_weights(name, fetch=False)
        where = f"found: {where}" if where else "-" if name == "random" else f"not here: {model.source}"
        features = ", ".join([f"{model.arch} {s.layer}", *list(model.head())[:1], *(["L2"] if s.l2 else [])])
        print(f"{name:18} {features:34} {s.stride:6}  {model.paper or '-':>9}  {where}; licence: {model.licence}")
    print("torchvision:NAME  any ResNet or VGG of torchvision     timm:NAME  any ResNet or ViT of timm (DINO, ...)")


# ---------------------------------------------------------------------------------------------------------------------


def annotate(args: Args, video, first: int) -> tuple[dict[int, np.ndarray], list, np.ndarray]:
    """Read or draw what is annotated: frame -> mask H x W or points J x 2; the ids; the palette."""
    if bool(args.mask) + bool(args.points) + args.pick != 1:
        raise UserError("--mask, --points or --pick: give one of them, to say what to track")
    frames, files = args.mask_frame or [first], len(args.mask or args.points) or 1
    if len(set(frames)) < len(frames):
        raise UserError(f"--mask-frame {max(frames, key=frames.count)}: is given twice; a frame has one mask")
    if len(frames) != files:
        raise UserError(f"--mask-frame: {len(frames)} frame(s) for {files} mask(s) or table(s); give one for each")
    if args.points:  # a point that a table does not name is lost in its frame
        tables = [read_points(path, video.size) for path in args.points]
        ids = list(dict.fromkeys(name for table in tables for name in table))
        places = [np.array([table.get(name, (-1, -1)) for name in ids]) for table in tables]
        return dict(zip(frames, places, strict=True)), ids, PALETTE
    if args.pick:
        need_window("--pick")
        masks = {frames[0]: pick_mask(read_frame(video, frames[0]))}
        palette = PALETTE
    else:
        known = {}  # an object has one id in all masks, and the last palette all their colours
        read = [fit_mask(path, video.size, known) for path in args.mask]
        masks, palette = dict(zip(frames, (mask for mask, _ in read), strict=True)), read[-1][1]
    ids = [int(number) for number in np.unique(np.concatenate([np.unique(mask) for mask in masks.values()])) if number]
    return masks, ids, palette


def introduce(mask: np.ndarray, index: int, s: Propagation) -> None:
    """Say what a mask holds, and what of it looks like a mistake."""
    ids, pixels = np.unique(mask[mask > 0], return_counts=True)
    found = ", ".join(f"{number} ({count} pixels)" for number, count in zip(ids, pixels, strict=True))
    print(f"objects in frame {index}: {found or 'none'}", file=sys.stderr)
    cell = mask.size / math.prod(s.grid(*mask.shape))
    for number, count in zip(ids, pixels, strict=True):
        if all((edge == number).any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
            print(f"note: object {number} touches all four borders: is it the background, or all?", file=sys.stderr)
        elif count < cell:
            print(f"note: object {number} is less than a cell of the grid; a larger --size keeps it", file=sys.stderr)


def main(args: Args) -> None:
    if args.list_models:
        return list_models()
    if not args.video:
        raise UserError("--video: missing; give a film, a folder of pictures or the number of a camera (see --help)")
    live = args.video.isdigit() and not Path(args.video).exists()
    path = Path(args.video).resolve()
    pattern = glob.has_magic(path.name) and not path.exists()
    name = f"camera{args.video}" if live else path.parent.name if pattern else path.name if path.is_dir() else path.stem
    out = args.out or Path("results") / name
    if args.dtype == "float16" and common.pick_device(args.device).type == "cpu":
        raise UserError("--dtype float16: needs a GPU; take bfloat16 on this device")
    if args.show:
        need_window("--show")

    # What is asked for, checked before any long work.
    if live and (args.start or args.every != 1 or args.reverse or any(args.mask_frame)):
        raise UserError("--start, --every, --reverse, --mask-frame: a camera runs from its first frame on; leave them")
    if live and args.end is not None and args.end < 2:
        raise UserError(f"--end {args.end}: give 2 or more, or stop the camera with q")
    video = Camera(int(args.video), out / "frames") if live else Video(args.video)
    frames = set() if live or not args.mask else {picture.resolve() for picture in video.pictures}
    for mask in args.mask:
        if mask.resolve() in frames:
            raise UserError(f"{mask}: lies among the frames of --video and would be one; move it elsewhere")
    order = range(args.end or 10**9) if live else choose_frames(args, len(video))
    annotations, ids, palette = annotate(args, video, order[0])
    for index in annotations:
        if index not in order:
            used = f"{min(order)} to {max(order)}" + (f", every {args.every}" if args.every > 1 else "")
            raise UserError(f"--mask-frame {index}: is not among the frames used ({used})")
    if args.points and args.propagation.localization == "track":
        raise UserError("--localization track: follows masks, these are key points; take --localization none or fixed")
    engine = None
    if args.engine:
        check_engine(args, common.engine_info(args.engine), video.size, annotations, ids)
        engine = common.load_engine(args.engine, args.device)
    else:
        check_topk(args.propagation, video.size, len(annotations))
        encoder = common.load_encoder(args.model, args.weights, args.propagation, args.device, args.dtype)
    weights = None if engine else args.weights or common.find_weights(args.model, fetch=False)
    job = {
        "video": video.source if live else str(path),
        "content": None if live else describe(video),
        "frames": [args.start, args.every, *(["from", args.end] if args.reverse else [])],  # a later --end adds to it
        "annotations": {str(k): hashlib.sha256(v.tobytes()).hexdigest()[:16] for k, v in annotations.items()},
        "ids": ids,
        "model": engine.info["model"] if engine else args.model,
        "weights": digest(weights),
        "dtype": engine.info["dtype"] if engine else args.dtype,
        "settings": asdict(args.propagation),
    }
    if engine:
        job["engine"] = digest(args.engine)
    record = open_job(out, job, args.overwrite, live)
    for index, mask in annotations.items() if not args.points else ():
        introduce(mask, index, args.propagation)

    keep = 0 if live else len(order) if args.propagation.history else args.propagation.context
    results = Results(out, [] if live else video.names, keep, ids, palette, points=bool(args.points))
    clock, start = Stopwatch(), time.perf_counter()
    grid, labels = args.propagation.grid(*video.size), {}
    for index, known in annotations.items():
        if args.points:
            labels[index] = common.labels_from_points(known, video.size, grid)
        else:
            labels[index] = common.labels_from_mask(torch.from_numpy(known), ids, grid, args.propagation.sampling)
        if not results.has(index):
            results.add(index, known)
    results.flush()
    before = len(annotations) if live else sum(map(results.has, order))
    stretches = segments(order, annotations)
    bar = tqdm(total=None if live else len(order), initial=before, unit="frame", desc=video.source)
    try:
        with torch.inference_mode():
            if engine:
                answers = track_engine(video, stretches, annotations, results, engine, clock)
            else:
                answers = track(args.propagation, video, stretches, labels, results, encoder, clock)
            follow(answers, results, bar, args.show, clock)
    except KeyboardInterrupt:
        if not live:  # a camera is stopped this way
            raise
    finally:
        results.flush()
    if live:
        times, video = video.times, Video(out / "frames")
        order, video.times = range(len(video)), times
    if video.broken:
        print(f"note: {video.broken}", file=sys.stderr)
    done = [index for index in order if results.has(index)]
    to_come = order if live or args.reverse else choose_frames(replace(args, end=None), len(video))
    results.finish(args.reverse, whole=live or all(map(results.has, to_come)))
    made, seconds = len(done) - before, time.perf_counter() - start
    pictures, shown = ["overlay.mp4"] * args.film + ["contact_sheet.jpg"], [len(done), done[0], done[-1]]
    stale = made or record.get("shown") != shown or not all((out / name).is_file() for name in pictures)
    if stale:
        with clock.time("film"):
            make_pictures(out, video, done, results, args.film)
    rates = {stage: round(made / spent, 2) for stage, spent in clock.items() if spent > 0}
    versions = {"softcopy": common.__version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {"opencv": cv2.__version__, "av": av.__version__}
    if made:
        rates = {"whole run": round(made / seconds, 2), **rates}
        record = {"job": job, "versions": versions, "frames": made, "frames_per_second": rates}
        record["ran_on"] = engine.provider if engine else str(encoder.mean.device)
    if stale:
        write_json(out / "run.json", record | {"shown": shown})  # in the pictures: how many frames, the first, the last
    what = f"{len(done)} frames of points.csv" if results.points else f"{len(done)} masks"
    speed = f"{made / seconds:.2f} frames/s" if made else "all was there"
    print(f"{out}: {', '.join([what, *pictures])}; {speed}")


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args))
