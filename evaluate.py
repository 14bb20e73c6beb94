"""A data set -> the paper's scores, tables and figures.

    python evaluate.py --dataset davis --data DAVIS --model imagenet     # a row of the paper's Table 6
    python evaluate.py --dataset davis --data DAVIS --predictions A B    # score any methods' masks side by side
    python evaluate.py --data DAVIS --sweep topk=1,5,10 --sweep temperature=0.02,0.05,1
    python evaluate.py --data DAVIS --paper table4                       # paper's figure, ours, the difference
    torchrun --nproc-per-node 4 evaluate.py --data DAVIS                 # sequences shared out over processes

Predictions go to OUT/predictions/<row>, one folder of indexed PNG masks a sequence, where the row's name ends in a
digest of all its settings: what is there whole is not computed again, and never taken for that of other settings.
OUT also gets scores.json, scores.csv and report.html. Exit code 0: all scored; 1: some sequences failed, the others
are scored; 2: nothing could be done.
"""

import base64
import contextlib
import csv
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib import rcParams
from matplotlib.figure import Figure
from scipy.io import loadmat, savemat
from torch import distributed
from tqdm import tqdm

from common import (
    PICTURES,
    Propagation,
    UserError,
    atomic,
    find_weights,
    load_encoder,
    parse,
    preset,
    rank_world,
    run,
    systems,
)
from propagate import (
    PALETTE,
    Video,
    ahead,
    labels_from_mask,
    labels_from_points,
    mask_from_labels,
    overlay,
    points_from_labels,
    propagate_video,
    read_ids,
    write_mask,
)

rcParams["svg.fonttype"] = "none"  # text stays text, in any script that the browser has a font for
warnings.filterwarnings("ignore", "Glyph")

FEATURE_FACTORS = ("size", "upsample", "layer", "stride", "l2", "sampling")  # a change means new features or labels


@dataclass(frozen=True)
class Args:
    dataset: Literal["davis", "davis2016", "vip", "jhmdb"] = "davis"
    """DAVIS 2017, DAVIS 2016 (one object), VIP (semantic and instance parts) or JHMDB (body joints). vip and jhmdb have
    other defaults of the factors: see --dataset vip --help."""
    data: Path | None = None
    """Root of the data set in its official layout (default: data/<dataset>)."""
    subset: Literal["val", "train", "test-dev"] = "val"
    """test-dev is propagated, not scored: its annotations are not public."""
    split: Literal[1, 2, 3] = 1
    """JHMDB: which of the three train/test splits."""
    sequences: str = ""
    """Only these, separated by commas (default: all of the subset)."""
    model: str = "default"
    """Feature extractor, a name from propagate.py --list-models."""
    weights: Path | None = None
    """Its weights (default: weights/, the torch hub cache, or a download)."""
    propagation: Propagation = field(default_factory=Propagation)
    predictions: tuple[Path, ...] = ()
    """Only score these folders (<folder>/<sequence>/<frame>.png, or <sequence>/masks/ as propagate.py writes them), a
    row each."""
    out: Path | None = None
    """Folder for predictions, scores.json, scores.csv and report.html (default: results/<dataset>)."""
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """factor=value,value,... Give it several times: one factor at a time, or all combinations with --grid."""
    grid: bool = False
    """Sweep all combinations of the factors."""
    paper: Literal[
        "", "table1", "table2", "table3", "table4", "table5", "table6", "table7", "table8", "figure4", "figure5"
    ] = ""
    """Run the rows of this table or figure of the paper, at the paper's settings, side by side with its figures. Table
    7 and Figure 5 want VIP in --data, Table 8 JHMDB, the others DAVIS 2017."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the features."""


# ---------------------------------------------------------------------------------------------------------------------
# Data sets

PAGES = {
    "davis": "https://davischallenge.org/davis2017/code.html",
    "davis2016": "https://davischallenge.org/davis2016/code.html",
    "vip": "https://sysu-hcp.net/lip/overview.php",
    "jhmdb": "http://jhmdb.is.tue.mpg.de/dataset",
}
# fmt: off
PARTS = ("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks", "pants", "gloves",
         "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm", "right-leg", "left-leg", "right-shoe",
         "left-shoe")
JOINTS = ("neck", "belly", "face", "right-shoulder", "left-shoulder", "right-hip", "left-hip", "right-elbow",
          "left-elbow", "right-knee", "left-knee", "right-wrist", "left-wrist", "right-ankle", "left-ankle")
# fmt: on


@dataclass(frozen=True)
class Sequence:
    """One video of a data set. names: its frames, in order. truth: the annotated ones' files (JHMDB: one .mat)."""

    dataset: str
    name: str
    frames: Path  # folder of pictures
    names: tuple[str, ...]
    truth: dict[str, Path]
    instances: Path | None = None  # VIP


def read_dataset(args: Args, root: Path) -> tuple[list[Sequence], dict[str, str]]:
    """The sequences asked for, and why others of the subset are missing. UserError if one that is named is not there,
    or if there are none."""
    wanted = [name.strip() for name in args.sequences.split(",") if name.strip()]
    mark = {"vip": "lists/*_videos.txt", "jhmdb": "splits/*_test_split*.txt"}.get(args.dataset, "ImageSets/*/*.txt")
    holds = next((folder for folder in (root, *root.absolute().parents) if any(folder.glob(mark))), root)
    of = f"{args.paper} is of {args.dataset.upper()}, " if args.paper else ""
    page = f"{of}see {PAGES[args.dataset]}, and say where it is with --data"
    page = page if holds == root else f"take --data {holds}"
    instances, file = None, ""
    if args.dataset == "jhmdb":
        pictures = root / "Frames" if (root / "Frames").is_dir() else root / "Rename_Images"
        truth, file = root / "joint_positions", "joint_positions.mat"
        listings = sorted((root / "splits").glob(f"*_test_split{args.split}.txt"))
        if not listings:
            raise UserError(f"{root}/splits/<class>_test_split{args.split}.txt: not found; JHMDB is incomplete, {page}")
        known, group = [], {"val": "2", "train": "1", "test-dev": ""}[args.subset]
        for listing in listings:
            kind = listing.name.removesuffix(f"_test_split{args.split}.txt")
            clips = [line.rsplit(maxsplit=1) for line in listing.read_text().splitlines() if line.strip()]
            known += [f"{kind}/{Path(clip).stem}" for clip, of in clips if wanted or of == group]
    else:
        if args.dataset == "vip":
            base = root / "VIP_Fine" if (root / "VIP_Fine").is_dir() else root
            masks = base / "Annotations" if (base / "Annotations").is_dir() else base
            pictures, truth, instances = base / "Images", masks / "Category_ids", masks / "Instance_ids"
            lists = root / "lists" if (root / "lists").is_dir() else base / "lists"
            listing = lists / f"{args.subset}_videos.txt"
        else:
            pictures, truth = root / "JPEGImages/480p", root / "Annotations/480p"
            listing = root / "ImageSets" / ("2016" if args.dataset == "davis2016" else "2017") / f"{args.subset}.txt"
        # sequences that are named need not be of the subset, nor a list be there
        known = (wanted and sorted(path.name for path in truth.glob("*"))) or read_list(listing, page)
    chosen = {want: [name for name in known if want in (name, Path(name).name)] for want in wanted}
    for want, names in chosen.items():
        if not names:
            near = ", ".join(get_close_matches(want, known) or known[:3])
            raise UserError(f"--sequences {want}: is not in {truth}; names there are like {near}")

    sequences, missing = [], {}
    for name in dict.fromkeys(itertools.chain(*chosen.values())) if wanted else known:
        frames, annotation = pictures / name, truth / name / file
        if not annotation.exists():
            missing[name] = f"{annotation}: not found; the data set is incomplete, {page}"
            continue
        masks = {p.stem: p for p in sorted(annotation.iterdir()) if p.suffix.lower() == ".png"} if not file else {}
        names = {p.stem for p in frames.iterdir() if p.suffix.lower() in PICTURES} if frames.is_dir() else set()
        names = set(masks) if args.dataset == "vip" else names | set(masks)  # VIP: every 25th frame
        names = tuple(sorted(names, key=lambda n: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", n)]))
        if file:  # one for all frames, which need not be there to be scored
            names = names or ("00001",)
        files = dict.fromkeys(names, annotation) if file else masks
        sequences.append(Sequence(args.dataset, name, frames, names, files, instances and instances / name))
    if not sequences:
        raise UserError(next(iter(missing.values()), f"{root}: the {args.subset} list is empty, {page}"))
    return sequences, missing


def read_list(path: Path, page: str) -> list[str]:
    """One name a line; DAVIS 2016's own lists have the paths of all frames instead."""
    if not path.is_file():
        raise UserError(f"{path}: not found, it lists the sequences; {page}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(dict.fromkeys(Path(line.split()[0]).parent.name if line[0] == "/" else line for line in lines))


def check_names(folder: Path, names: Iterable[str], like: str) -> None:
    """A folder whose file names differ in more than numbers holds more than one sequence."""
    pattern = re.sub(r"\d+", "0", like)
    for name in names:
        if re.sub(r"\d+", "0", name) != pattern:
            raise UserError(f"{folder / name}: is not named like {like}; the folder mixes sequences, keep one in each")


def one_object(ids: np.ndarray) -> np.ndarray:
    """DAVIS 2016: every id is the one object; 255 is it in copies that store {0, 255}, else void."""
    return ((ids > 0) & (ids < 255) if ((ids > 0) & (ids < 255)).any() else ids > 0).astype(np.uint8)


def read_joints(path: Path) -> np.ndarray:
    """T x 15 x 2 (x, y), 0-based, of a joint_positions.mat."""
    try:
        return loadmat(path)["pos_img"].transpose(2, 1, 0).astype(float) - 1
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a .mat with pos_img, 2 x 15 x frames; download it again") from error


def read_instances(path: Path) -> tuple[np.ndarray, dict[int, int]]:
    """VIP: ids of the (person, part) instances, and the part class of each id (lines: id class ...)."""
    try:
        lines = [line.split() for line in path.with_suffix(".txt").read_text().splitlines() if line.strip()]
        classes = {int(line[0]): int(line[1]) for line in lines}
        if not all(0 <= number < 256 and 0 <= kind < 20 for number, kind in classes.items()):
            raise ValueError
        return read_ids(path), classes
    except (OSError, ValueError, IndexError) as error:
        lines = "instance id (1..255), part class (1..19)"
        raise UserError(f"{path.with_suffix('.txt')}: not found, or not lines of: {lines}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Scores. protocols: the official DAVIS, VIP and JHMDB tools; identical numbers, less work


def score_frame(truth: np.ndarray, pred: np.ndarray, objects: int) -> np.ndarray:
    """J and F (2 x objects) of objects 1..objects in one frame, from H x W uint8 ids (Perazzi et al. 2016).

    The official definition dilates two full-size boundary maps with a disk for each object. Here all objects'
    boundary pixels are found at once, within the objects' bounding box, and only they are compared.
    """
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    x, y, width, height = cv2.boundingRect(truth | pred)
    inside = slice(max(y - 1, 0), y + height + 1), slice(max(x - 1, 0), x + width + 1)
    truth, pred = (truth[inside], pred[inside]) if width else (truth, pred)
    scores = np.ones((2, objects))
    (at_t, ids_t), (at_p, ids_p) = outlines(truth), outlines(pred)
    for k in range(1, objects + 1):
        t, p = truth == k, pred == k
        both = np.count_nonzero(t & p)
        if either := np.count_nonzero(t) + np.count_nonzero(p) - both:
            scores[0, k - 1] = both / either
        t, p = ids_t == k, ids_p == k
        t, p = at_t[t.any(0) & ~t.all(0)], at_p[p.any(0) & ~p.all(0)]
        if len(t) and len(p):
            precision = within(p, t, truth.shape, radius) / len(p)
            recall = within(t, p, truth.shape, radius) / len(t)
            scores[1, k - 1] = 2 * precision * recall / (precision + recall) if precision + recall else 0
        elif len(t) or len(p):
            scores[1, k - 1] = 0
    return scores


def outlines(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (flat index) whose 2 x 2 block to the south-east is not of one id, and the 4 x n ids of these blocks.

    Object k has a boundary at such a pixel where its block holds k and another id: the official
    s XOR east OR s XOR south OR s XOR south-east, with the image continued past its last row and column.
    """
    padded = cv2.copyMakeBorder(ids, 0, 1, 0, 1, cv2.BORDER_REPLICATE)
    here = padded[:-1, :-1]
    at = np.flatnonzero((here != padded[1:, :-1]) | (here != padded[:-1, 1:]) | (here != padded[1:, 1:]))
    width = ids.shape[1]
    return at, padded.reshape(-1)[at + at // width + np.array([[0], [1], [width + 1], [width + 2]])]


def within(query: np.ndarray, target: np.ndarray, shape: tuple[int, int], radius: int) -> int:
    """How many query pixels have a target pixel in x^2 + y^2 <= radius^2. Both: sorted flat indices.

    Yes for targets in the square inside the disk, no if there are none in the square around it; in between, the
    runs of pixels that make up the disk's rows are looked up among the (sorted) targets.
    """
    near = np.zeros(shape, np.uint8)
    near.reshape(-1)[target] = 1
    side = int(radius / math.sqrt(2))
    inside = cv2.dilate(near, np.ones((2 * side + 1,) * 2, np.uint8))
    around = cv2.dilate(inside, np.ones((2 * (radius - side) + 1,) * 2, np.uint8))
    yes = inside.reshape(-1)[query]
    unsure = query[around.reshape(-1)[query] != yes]
    if not len(unsure):
        return np.count_nonzero(yes)
    dy, reach = disk(radius)
    y, x = np.divmod(unsure, shape[1])
    row = (y + dy) * shape[1]  # 2r+1 rows x unsure
    first, last = row + np.maximum(x - reach, 0), row + np.minimum(x + reach, shape[1] - 1)
    following = np.append(target, np.iinfo(np.int64).max)[np.searchsorted(target, first)]
    return np.count_nonzero(yes) + np.count_nonzero((following <= last).any(0))


@lru_cache
def disk(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the disk, and how far each reaches to either side: (2r+1) x 1."""
    rows = np.arange(-radius, radius + 1)
    return rows[:, None], np.array([math.isqrt(radius**2 - dy**2) for dy in rows.tolist()])[:, None]


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall (share above 0.5) and decay (first quarter - last quarter) of a value per frame.

    The official tool casts the quarters' edges to uint8, which scrambles them past 256 frames; here they are not.
    """
    if not len(values):
        return (math.nan,) * 3
    edges = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return values.mean(), (values > 0.5).mean(), first.mean() - last.mean()


def prediction(folder: Path, seq: Sequence, name: str = "") -> Path:
    """Where the prediction for a sequence, or for one frame of it, lies."""
    if seq.dataset == "jhmdb":
        return folder / seq.name / "joint_positions.mat"
    base = folder / "Category_ids" if not (folder / seq.name).is_dir() and seq.dataset == "vip" else folder
    own = base / seq.name / "masks"  # as propagate.py writes them
    base = own if own.is_dir() else base / seq.name
    return base / f"{name}.png" if name else base


def score_davis_frame(job: tuple) -> np.ndarray:
    truth_file, pred_file, objects, single, seq = job
    truth, pred = read_ids(truth_file), read_ids(pred_file)
    if single:
        truth, pred = one_object(truth), one_object(pred)
    if truth.shape != pred.shape:
        sizes = "is {1}x{0}, but the ground truth is {3}x{2}".format(*pred.shape, *truth.shape)
        raise UserError(f"{pred_file}: {sizes}; predictions are scored at the size of the annotation")
    if (top := int(pred.max())) > objects:
        raise UserError(f"{pred_file}: has id {top}, but {seq} has objects 1..{objects} in its first frame")
    return score_frame(truth, pred, objects)


def score_davis(seq: Sequence, folder: Path, pool) -> dict:
    """J, F: objects x frames; the first and the last annotated frame are left out."""
    annotated = [name for name in seq.names if name in seq.truth]
    first = first_mask(seq)
    objects = int(first[first < 255].max())
    jobs = [
        (seq.truth[n], prediction(folder, seq, n), objects, seq.dataset == "davis2016", seq.name)
        for n in annotated[1:-1]
    ]
    scores = np.array(pool.map(score_davis_frame, jobs, chunksize=4)).reshape(len(jobs), 2, objects)
    return {"J": scores[:, 0].T, "F": scores[:, 1].T, "frames": annotated[1:-1]}


def score_vip(seq: Sequence, folder: Path) -> dict:
    """Confusion matrix (truth x prediction) over all frames; and for AP^r_vol the parts' classes, scores, IoUs."""
    confusion, found, present = np.zeros((20, 20), np.int64), [], np.zeros(20, np.int64)
    guess = folder / "Instance_ids" / seq.name
    for name in seq.names:
        truth, path = read_ids(seq.truth[name]), prediction(folder, seq, name)
        pred = nearest(read_ids(path), truth.shape)
        if (top := int(pred.max())) > 19:
            raise UserError(f"{path}: has id {top}, but the part classes are 0..19")
        valid = truth < 20
        confusion += np.bincount(20 * truth[valid].astype(int) + pred[valid], minlength=400).reshape(20, 20)
        if not (guess.is_dir() and seq.instances and seq.instances.is_dir()):
            continue
        truth, classes = read_instances(seq.instances / f"{name}.png")
        pred = nearest(read_ids(guess / f"{name}.png"), truth.shape)
        try:
            lines = [line.split() for line in (guess / f"{name}.txt").read_text().splitlines() if line.strip()]
            parts = [(i, int(line[0]), float(line[1])) for i, line in enumerate(lines, 1)]
            if not all(i < 256 and 0 <= kind < 20 for i, kind, _ in parts):
                raise ValueError
        except (OSError, ValueError, IndexError) as error:
            lines = "part class (1..19), score; one for each of the ids 1..255"
            raise UserError(f"{guess / name}.txt: not found, or not lines of: {lines}") from error
        table = np.bincount(256 * truth.astype(int).ravel() + pred.ravel(), minlength=65536).reshape(256, 256)
        areas_t, areas_p = table.sum(1), table.sum(0)
        for number, kind in classes.items():
            present[kind] += areas_t[number] > 0
        for number, kind, score in parts:
            if areas_p[number]:
                same = np.array([n for n, k in classes.items() if k == kind and areas_t[n]], int)
                iou = table[same, number] / (areas_t[same] + areas_p[number] - table[same, number])
                found.append((kind, score, iou.max(initial=0.0)))
    return {"confusion": confusion, "parts": np.array(found).reshape(-1, 3), "present": present}


def nearest(ids: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return ids if ids.shape == shape else cv2.resize(ids, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def average_precision(parts: np.ndarray, present: np.ndarray) -> float:
    """AP^r_vol: mean over IoU thresholds 0.1..0.9 of the mean over part classes of the all-point VOC AP.

    parts: n x 3 (class, score, best IoU with a true part of that class in its frame; one may be matched more than
    once, as in the public script). present: true parts of each class; classes without any are left out.
    """
    aps = []
    for kind in np.flatnonzero(present[1:]) + 1:
        mine = parts[parts[:, 0] == kind]
        mine = mine[np.argsort(-mine[:, 1], kind="stable")]
        for threshold in np.arange(1, 10) / 10:
            hits = np.cumsum(mine[:, 2] > threshold)
            recall = np.concatenate([[0], hits / present[kind]])
            envelope = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
            aps.append((np.diff(recall) * envelope).sum())
    return float(np.mean(aps)) if aps else math.nan


def score_jhmdb(seq: Sequence, folder: Path) -> dict:
    """Distance of each joint in each frame but the first (15 x T-1), in units of 0.6 of the person's diagonal.

    The person's box holds the true joints that the prediction shows; joints it does not show are nan: not counted.
    """
    truth, path = read_joints(seq.truth[seq.names[0]]), prediction(folder, seq)
    if not path.is_file():
        raise UserError(f"{path}: not found; JHMDB predictions are joint_positions.mat files like the annotation")
    pred = read_joints(path)
    if pred.shape != truth.shape:
        raise UserError(
            f"{path}: has {pred.shape[0]} frames x {pred.shape[1]} joints, the annotation {truth.shape[:2]}"
        )
    shown = (pred[..., 0] >= 0)[..., None]
    low, high = np.where(shown, truth, np.inf).min(1), np.where(shown, truth, -np.inf).max(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.linalg.norm(pred - truth, axis=2) / (0.6 * np.linalg.norm(high - low, axis=1))[:, None]
        distance = np.where(shown[..., 0], np.where((pred == truth).all(2), 0, distance), np.nan)
    return {"distance": distance[1:].T}


MAIN = {"davis": "J&F_M", "davis2016": "J&F_M", "vip": "mIoU", "jhmdb": "PCK@0.1"}  # the figure to rank by
DAVIS_COLUMNS = ["J&F_M", "J_M", "J_O", "J_D", "F_M", "F_O", "F_D"]
PCK_COLUMNS = [f"PCK@{a / 10}" for a in range(1, 6)]
COLUMNS = {"davis": DAVIS_COLUMNS, "davis2016": DAVIS_COLUMNS, "vip": ["mIoU", "AP^r_vol"], "jhmdb": PCK_COLUMNS}
LEGEND = {
    "J&F_M": "J overlap, F boundary accuracy; M mean, O share of frames above 50 %, D loss over time (less is better)",
    "mIoU": "mIoU overlap, mean over part classes; AP^r_vol average precision of the parts of each person",
    "PCK@0.1": "PCK@a share of joints within a x the person's size (0.6 of its box's diagonal) of the truth",
}


def summarize(dataset: str, results: dict[str, dict]) -> dict:
    """Per-sequence results -> {"overall", "per_object", "per_sequence"}: fractions, under the paper's names.

    per_object is per part class for VIP and per joint for JHMDB.
    """
    one = {"vip": summarize_vip, "jhmdb": summarize_jhmdb}.get(dataset, summarize_davis)
    overall, per_object = one(results) if results else ({}, {})
    per_sequence = {name: one({name: result})[0] for name, result in results.items()}
    return {"overall": overall, "per_object": per_object, "per_sequence": per_sequence}


def summarize_davis(results: dict[str, dict]) -> tuple[dict, dict]:
    """The figures of each object, and their mean over objects, not over sequences."""
    objects = {}
    for name, result in results.items():
        for k, (j, f) in enumerate(zip(result["J"], result["F"], strict=True), 1):
            row = dict(zip(DAVIS_COLUMNS[1:], statistics(j) + statistics(f), strict=True))
            objects[f"{name}_{k}"] = {"J&F_M": (row["J_M"] + row["F_M"]) / 2, **row}
    return mean_scores(objects.values()), objects


def summarize_vip(results: dict[str, dict]) -> tuple[dict, dict]:
    """IoU of each class that occurs in truth or prediction; their mean, and AP^r_vol where there are instances."""
    confusion = sum(r["confusion"] for r in results.values())
    present = sum(r["present"] for r in results.values())
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = confusion.diagonal() / np.where(union, union, np.nan)
    overall = {"mIoU": float(np.nanmean(iou))}
    if present.any():
        overall["AP^r_vol"] = average_precision(np.concatenate([r["parts"] for r in results.values()]), present)
    return overall, {part: {"IoU": float(x)} for part, x in zip(PARTS, iou, strict=True) if x == x}


def summarize_jhmdb(results: dict[str, dict]) -> tuple[dict, dict]:
    """PCK of each joint over all its frames, and the mean over joints."""
    distance = np.concatenate([r["distance"] for r in results.values()], 1)  # 15 x frames
    counted = (~np.isnan(distance)).sum(1)
    share = [(distance <= a / 10).sum(1) / np.where(counted, counted, np.nan) for a in range(1, 6)]
    rows = [dict(zip(PCK_COLUMNS, map(float, row), strict=True)) for row in np.array(share).T]
    return mean_scores(rows), dict(zip(JOINTS, rows, strict=True))


def mean_scores(rows: Iterable[dict]) -> dict:
    """Mean of each figure over the rows that have it (a sequence of two frames has nothing to score)."""
    rows = list(rows)
    columns = {key: [row[key] for row in rows if row[key] == row[key]] for key in (rows[0] if rows else ())}
    return {key: float(np.mean(values)) if values else math.nan for key, values in columns.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Running


@dataclass(frozen=True)
class Row:
    """A line of the table: predictions in a folder, and what they are made with (model None: someone else's)."""

    name: str
    folder: Path = Path()
    model: str | None = None
    weights: Path | None = None
    settings: Propagation | None = None
    changed: tuple[str, ...] = ()  # factor=value where it is not that of the preset, or of the paper's row
    paper: dict[str, float] = field(default_factory=dict)  # the paper's figures, per cent
    lacks: str = ""  # why it cannot run


def make_row(args: Args, root: Path, out: Path, settings: Propagation, name: str = "", model: str = "", **more) -> Row:
    """The row of a model at some settings; its folder's name ends in a digest of all that the predictions depend on."""
    model = model or args.model
    weights, model = weights_of(args, model), model.partition("@")[0]
    fits(model, weights, settings.layer, settings.stride, weights != args.weights or rank_world()[0] > 0)
    own = asdict(preset(model, args.dataset))
    changed = tuple(f"{key}={value}" for key, value in asdict(settings).items() if own[key] != value)
    record = {"model": model, "weights": weights and file_digest(weights), "dtype": args.dtype}
    record |= {"dataset": [args.dataset, str(root.resolve())], "settings": asdict(settings)}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    folder = out / "predictions" / f"{model}-{digest}"
    return Row(name or " ".join([model, *changed]), folder, model, weights, settings, **{"changed": changed, **more})


def weights_of(args: Args, model: str, fetch: bool = True) -> Path | None:
    """--weights where they are of this model, else those that find_weights finds; of MODEL@FILE, weights/FILE alone."""
    model, _, file = model.partition("@")
    if file:
        places = Path("weights", file), Path(__file__).with_name("weights") / file
        return next((path for path in places if path.is_file()), None)
    return args.weights if args.weights and model == args.model else find_weights(model, fetch)


@lru_cache
def fits(model: str, weights: Path | None, layer: str, stride: int, quiet: bool) -> None:
    """UserError, before any long work, if the weights do not fit the settings. Unless quiet, says what they are."""
    with contextlib.redirect_stderr(io.StringIO() if quiet else sys.stderr):
        load_encoder(model, weights, replace(preset(model), layer=layer, stride=stride), "cpu")


@lru_cache
def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sweep_settings(args: Args, base: Propagation) -> list[Propagation]:
    """The settings of a sweep: one factor at a time about `base`, or all combinations."""
    factors = {}
    for sweep in args.sweep:
        name, _, values = sweep.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if name not in (f.name for f in fields(Propagation)) or not values:
            known = ", ".join(f.name for f in fields(Propagation))
            raise UserError(f"--sweep {sweep}: give factor=value,value,... with a factor of {known}")
        try:
            factors[name] = [parse_value(name, value) for value in values.split(",")]
        except ValueError as error:
            raise UserError(f"--sweep {sweep}: {error}") from error
    if args.grid:
        chosen = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    else:
        chosen = [{name: value} for name, values in factors.items() for value in values]
    return list(dict.fromkeys(replace(base, **factors) for factors in chosen))


def parse_value(factor: str, text: str):
    """A value of a field of Propagation from text."""
    kind = next(f.type for f in fields(Propagation) if f.name == factor)
    choices = {"true": True, "false": False} if kind is bool else {choice: choice for choice in get_args(kind)}
    try:
        return choices[text.lower()] if choices else kind(text)
    except (KeyError, ValueError) as error:
        wants = f"none of {', '.join(choices)}" if choices else f"no {'whole ' * (kind is int)}number"
        raise ValueError(f"{text!r} is {wants}") from error


def first_mask(seq: Sequence) -> np.ndarray:
    """The given annotation of the first frame, as ids; void stays 255."""
    first = next(iter(seq.names), "00000")
    if first not in seq.truth:
        folder = next(iter(seq.truth.values())).parent if seq.truth else Path(seq.name)
        raise UserError(f"{folder / first}.png: not found; the first frame's annotation is what is propagated")
    ids = read_ids(seq.truth[first])
    ids = one_object(ids) if seq.dataset == "davis2016" else ids
    if not ((ids > 0) & (ids < 255)).any():
        hint = "; for copies with masks of 0 and 255 take --dataset davis2016" if ids.max(initial=0) == 255 else ""
        raise UserError(f"{seq.truth[first]}: has no object, so there is nothing to propagate{hint}")
    return ids


def complete(seq: Sequence, folder: Path) -> bool:
    path = prediction(folder, seq)
    return path.is_file() if seq.dataset == "jhmdb" else {p.stem for p in path.glob("*.png")} >= set(seq.names)


@torch.inference_mode()
def propagate(seq: Sequence, encoder, rows: list[Row], bar: tqdm) -> None:
    """Predict one sequence at the settings of each row; features are computed once, the rows go in lockstep.

    A sequence's folder gets its name when all of it is written: what exists is whole, even after kill -9.
    """
    device = encoder.mean.device
    video = Video(seq.frames)
    at = {name: i for i, name in enumerate(video.names)}
    for name in seq.names:
        if name not in at:
            raise UserError(f"{seq.frames / name}.jpg: not found, yet it is annotated; download the sequence again")

    frames = ahead(frame for _, frame in video.frames([at[name] for name in seq.names]))
    features = (encoder(torch.from_numpy(frame)[None].to(device))[0] for frame in frames)  # C h w each
    first = next(features)
    grid = tuple(first.shape[1:])
    if seq.dataset == "jhmdb":
        given, size = read_joints(seq.truth[seq.names[0]])[0], video.size
        labels, ids, parts = labels_from_points(given, size, grid).to(device), [], []
    else:
        given = first_mask(seq)
        given, size = np.where(given == 255, 0, given).astype(np.uint8), given.shape
        if size != video.size and seq.dataset != "vip":
            sizes = "is {1}x{0}, but its frame is {3}x{2}".format(*size, *video.size)
            raise UserError(f"{seq.truth[seq.names[0]]}: {sizes}; they must show the same pixels")
        ids, parts = [i for i in np.unique(given).tolist() if i], []
        labels = labels_from_mask(torch.from_numpy(given).to(device), ids, grid, rows[0].settings.sampling)
        if seq.instances and seq.instances.is_dir():  # semantic and instance labels travel together
            given_parts, classes = read_instances(seq.instances / f"{seq.names[0]}.png")
            parts = [i for i in np.unique(given_parts).tolist() if i in classes]
        if parts:
            kinds = [classes[i] for i in parts]
            given_parts = torch.from_numpy(given_parts.copy()).to(device)
            labels = torch.cat([labels, labels_from_mask(given_parts, parts, grid, rows[0].settings.sampling)])

    folders, tracks = [row.folder / ".partial" / seq.name for row in rows], [[] for _ in rows]
    for row, folder in zip(rows, folders, strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "parts").mkdir(parents=True)
        record = {"model": row.model, "weights": str(row.weights), **asdict(row.settings)}
        with atomic(row.folder / "settings.json") as path:
            path.write_text(json.dumps(record, indent=1))
    streams = [
        propagate_video(targets, [(first, labels)], row.settings)
        for row, targets in zip(rows, itertools.tee(features, len(rows)), strict=True)
    ]
    with ThreadPoolExecutor(2) as writers:
        pending, soft_maps = deque(), itertools.chain([[labels] * len(rows)], zip(*streams, strict=True))
        for name, maps in zip(seq.names, soft_maps, strict=True):
            for row, folder, track, soft in zip(rows, folders, tracks, maps, strict=True):
                if seq.dataset == "jhmdb":
                    track.append(points_from_labels(soft, size) if name != seq.names[0] else given)
                    continue
                # VIP's masks are made at the network's input size and brought to full size by nearest neighbour
                full = row.settings.input_size(*size) if seq.dataset == "vip" else size
                soft, soft_parts = soft[: 1 + len(ids)], soft[1 + len(ids) :]
                mask = given
                if name != seq.names[0]:
                    mask = nearest(mask_from_labels(soft, ids, full, row.settings.minmax).cpu().numpy(), size)
                pending.append(writers.submit(write_mask, folder / f"{name}.png", mask))
                if parts:
                    if name == seq.names[0]:
                        soft_parts, full = labels_from_mask(given_parts, parts, given_parts.shape), given_parts.shape
                    job = write_parts, folder / f"parts/{name}.png", soft_parts, kinds, full, size
                    pending.append(writers.submit(*job))
            while len(pending) > 16 * len(rows):
                pending.popleft().result()
            bar.update(len(rows))
        for job in pending:
            job.result()
    for row, folder, track in zip(rows, folders, tracks, strict=True):
        if track:
            savemat(folder / "joint_positions.mat", {"pos_img": np.stack(track).transpose(2, 1, 0) + 1})
        if parts:
            move(folder / "parts", row.folder / "Instance_ids" / seq.name)
        shutil.rmtree(folder / "parts", ignore_errors=True)
        move(folder, row.folder / seq.name)


def write_parts(
    path: Path, labels: torch.Tensor, kinds: list[int], full: tuple[int, int], size: tuple[int, int]
) -> None:
    """VIP instances as the public script reads them: ids 1..n, and a line `part class, score` for each id."""
    soft = F.interpolate(labels[None].float(), size=full, mode="bilinear")[0]  # 1 + n, H, W
    probability, winner = (each.cpu().numpy() for each in soft.max(0))
    winner = winner.astype(np.uint8)
    sums, areas = (np.bincount(winner.ravel(), w, 1 + len(kinds)) for w in (probability.ravel(), None))
    scores = sums / np.maximum(areas, 1)  # the mean probability over the mask
    text = "".join(f"{kind} {scores[i]:.6f}\n" for i, kind in enumerate(kinds, 1))
    path.with_suffix(".txt").write_text(text)
    write_mask(path, nearest(winner, size))


def move(source: Path, target: Path) -> None:
    """Give a finished folder its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)  # an earlier one with frames missing
    source.rename(target)


def evaluate(args: Args, rows: list[Row], sequences: list[Sequence], pool, results: dict, failed: dict) -> None:
    """Predict what is missing and score it, sequence after sequence: fills results and failed, [row name][sequence]."""
    groups = {}
    for row in rows:  # rows that share features share one pass over each video
        key = row.settings and (row.model, row.weights, *(getattr(row.settings, f) for f in FEATURE_FACTORS))
        groups.setdefault(key or row.folder, []).append(row)
    total, quiet = len(rows) * sum(len(seq.names) for seq in sequences), rank_world()[0] > 0
    device = args.device
    if device in ("auto", "cuda") and torch.cuda.is_available():  # each of torchrun's processes has its own
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    score = {"vip": score_vip, "jhmdb": score_jhmdb}.get(args.dataset, partial(score_davis, pool=pool))
    with tqdm(total=total, unit="frame", smoothing=0.05, dynamic_ncols=True, disable=quiet) as bar:

        def failure(rows: list[Row], seq: Sequence, error: UserError) -> None:
            for row in rows:
                failed[row.name][seq.name] = str(error)
            bar.write(f"error: {error}", file=sys.stderr)

        for group in groups.values():
            encoder = None  # loaded where there is something to do
            for seq in sequences:
                bar.set_description(seq.name)
                todo, done = [row for row in group if row.settings and not complete(seq, row.folder)], bar.n
                if todo and encoder is None:
                    with contextlib.redirect_stderr(io.StringIO()):  # fits has said what the file is taken for
                        encoder = load_encoder(group[0].model, group[0].weights, group[0].settings, device, args.dtype)
                try:
                    check_names(seq.frames, seq.names, seq.names[0] if seq.names else "")
                    if todo:
                        propagate(seq, encoder, todo, bar)
                except UserError as error:
                    failure(todo or group, seq, error)
                for row in group:
                    if args.subset == "test-dev" or seq.name in failed[row.name]:
                        continue
                    try:
                        check_prediction(seq, row.folder)
                        results[row.name][seq.name] = score(seq, row.folder)
                    except UserError as error:
                        failure([row], seq, error)
                        continue
                    so_far = summarize(args.dataset, results[row.name])["overall"][MAIN[args.dataset]]
                    bar.set_postfix({MAIN[args.dataset].removesuffix("_M"): percent(so_far)})
                bar.update(done + len(group) * len(seq.names) - bar.n)


def check_prediction(seq: Sequence, folder: Path) -> None:
    """Is there a prediction for this sequence, and of it alone?"""
    if seq.dataset == "jhmdb":
        return
    path = prediction(folder, seq)
    if not path.is_dir():
        raise UserError(f"{path}: not found; predictions are <folder>/<sequence>/<frame>.png, or in masks/ there")
    extra = sorted({p.stem for p in path.glob("*.png")} - set(seq.names))
    check_names(path, extra, seq.names[0])
    if extra:
        what = f"{len(extra)} masks for frames that {seq.name} does not have are left out, such as {extra[0]}"
        tqdm.write(f"note: {path}: {what}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's figures, side by side with ours

# A line of paper.csv is a row: what it prints (per cent); models, of which the first whose weights are at hand is run
# (MODEL@FILE: with weights/FILE); settings, what differs from the model's preset (sections 4.2 and 4.3).
PAPER = Path(__file__).with_name("paper.csv")
FIGURE_AXES = {  # the factor swept: its values, the others fixed as in the captions
    "figure4": {
        "temperature": [1 / t for t in (1, 5, 10, 20, 30, 40, 50)],
        "context": [1, 3, 5, 7, 10, 15, 20],
        "topk": [1, 3, 5, 10, 20, 50],
    },
    "figure5": {"context": [1, 2, 4, 7, 10, 20], "topk": [1, 3, 5, 10, 20, 50]},
}
WHOLE = {"davis": 30, "vip": 50, "jhmdb": 268}  # sequences that the paper's figures are over: val; test of split 1
NOTE = (
    "The paper's still-image rows of Tables 4, 6, 7 and 8 are fine-tuned after the stride change. Its UVC of Table 4 "
    "is trained anew (59.4 without localization, the released one 57.8), here weights/uvc-ours.pth."
)


def read_paper(dataset: str) -> list[dict]:
    """The lines of paper.csv for a data set; figures: what they print, models and settings as lists."""
    with PAPER.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["dataset"] == dataset]
    for line in lines:
        line["figures"] = {c: float(line[c]) for c in COLUMNS[dataset] if line.get(c)}
        line["models"], line["settings"] = line["models"].split(), line["settings"].split()
    return lines


def paper_rows(args: Args, root: Path, out: Path, given: dict) -> list[Row]:
    """The rows of a table or figure, in the paper's order; what cannot run says what it lacks."""
    rows, axes = {}, FIGURE_AXES.get(args.paper, {})
    points = [(f", {factor} {show(v)}", [f"{factor}={v}"]) for factor, values in axes.items() for v in values]
    lines = [line for line in read_paper(args.dataset) if line["table"] == args.paper]
    for line, (suffix, word) in itertools.product(lines, points or [("", [])]):
        name, figures = line["row"] + suffix, line["figures"]
        try:
            model, settings = paper_settings(args, line["models"], line["settings"] + word)
            changed = tuple(f"{factor}={v}" for factor, v in given.items() if getattr(settings, factor) != v)
            row = make_row(args, root, out, replace(settings, **given), name, model, changed=changed, paper=figures)
        except UserError as error:
            row = Row(name, paper=figures, lacks=str(error))
        rows.setdefault(row.folder if axes and not row.lacks else name, row)  # curves share points
    if all(row.lacks for row in rows.values()):
        print(*lacking(list(rows.values())), sep="\n")
        raise UserError(f"--paper {args.paper}: no row can run; put weights in weights/, or give --model and --weights")
    return list(rows.values())


def paper_best(args: Args, row: Row) -> Row:
    """The same row with the best figures that the paper prints for its model on this data set, at this grid."""
    best = {}
    for line in read_paper(args.dataset):
        scale, model = 2 if "upsample=2" in line["settings"] else 1, line["models"][0].removesuffix("-finetuned")
        if row.model.removesuffix("-finetuned") == model and scale == row.settings.upsample:
            best = max(best, line["figures"], key=lambda f: (f.get(MAIN[args.dataset], 0), len(f)))
    return replace(row, paper=best, changed=tuple(c for c in row.changed if not c.startswith("upsample=")))


def paper_settings(args: Args, models: list[str], words: list[str]) -> tuple[str, Propagation]:
    """The model and settings of a row of the paper; UserError with what is missing."""
    if models == ["-"]:
        raise UserError("quoted in the paper from another one")
    rows = systems()
    if not (chosen := next((model for model in models if weights_of(args, model, fetch=False)), None)):
        sources = {model: rows[model].source if model in rows else "train_uvc_plus.py makes it" for model in models}
        either = " or ".join(f"{model.rpartition('@')[2]} ({source})" for model, source in sources.items())
        files = " or ".join(f"{model.rpartition('@')[2].removesuffix('.pth')}.pth" for model in models)
        raise UserError(f"needs weights of {either} in weights/, named {files}")
    factors = {}
    for word in words:  # factor=value, or one of the two factors that the tables name by their values
        factor, _, text = word.rpartition("=")
        factor = factor or ("aggregation" if word in ("overall", "per-frame") else "localization")
        factors[factor] = parse_value(factor, text)
    return chosen, replace(preset(chosen.partition("@")[0], args.dataset), **factors)


# ---------------------------------------------------------------------------------------------------------------------
# What people look at


def print_table(args: Args, rows: list[Row], scores: dict, failed: dict, total: int) -> None:
    """The terminal table; for a table of the paper: the paper's figure, ours, and the difference."""
    columns = [c for c in COLUMNS[args.dataset] if any(c in row.paper for row in rows)]
    if args.paper and columns:
        body = [["%", *(cell for c in columns for cell in (c, "ours", "diff"))]]
        body += [[row.name, *(cell for c in columns for cell in beside(row, scores, c))] for row in rows]
    else:
        columns = COLUMNS[args.dataset]
        body = [["%", *columns]]
        body += [[r.name, *(percent(scores[r.name]["overall"].get(c)) for c in columns)] for r in rows if not r.lacks]
        if rows[0].paper:
            paper, _, difference = zip(*(beside(rows[0], scores, c) for c in columns), strict=True)
            body += [["the paper, whole data set", *paper], ["difference", *difference]]
        if args.dataset == "vip" and len(rows) == 1:
            body += [[f"  {part}", percent(s["IoU"]), ""] for part, s in scores[rows[0].name]["per_object"].items()]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    for line in [body[0], ["-" * width for width in widths], *body[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    print(LEGEND[MAIN[args.dataset]], *unlike(args, rows, scores), sep="\n")
    for row in rows:
        if failed[row.name]:
            print(f"{row.name}: {len(failed[row.name])} of {total} sequences failed; its figures are over the others")
    for line in lacking(rows) + [NOTE] * bool(args.paper):
        print(line)


def beside(row: Row, scores: dict, column: str) -> list[str]:
    """The paper's figure, ours, and the difference, per cent."""
    ours = 100 * scores.get(row.name, {"overall": {}})["overall"].get(column, math.nan)
    paper = row.paper.get(column, math.nan)
    return [percent(paper, 1), percent(ours, 1), percent(ours - paper, 1, "+")]


def unlike(args: Args, rows: list[Row], scores: dict) -> list[str]:
    """One line, why our figures are not to be compared with the paper's; none where they are."""
    rows = [row for row in rows if row.paper and row.name in scores]
    counts = {len(scores[row.name]["per_sequence"]) for row in rows} - {WHOLE.get(args.dataset)}
    why = [f"{count}, not {WHOLE[args.dataset]} sequences" for count in counts]
    why += dict.fromkeys(change for row in rows for change in row.changed)
    return [f"not comparable with the paper: {', '.join(why)}"] if why else []


def lacking(rows: list[Row]) -> list[str]:
    """A line for each thing that rows lack to be run, with the names of the first that lack it."""
    lines = []
    for why in dict.fromkeys(row.lacks for row in rows if row.lacks):
        names = [row.name for row in rows if row.lacks == why]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"not run: {'; '.join(names[:3])}{more}: {why}")
    return lines


def percent(value: float | None, scale: float = 100, sign: str = "") -> str:
    return "-" if value is None or value != value else f"{scale * value:{sign}.1f}"


def show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_scores(args: Args, out: Path, rows: list[Row], scores: dict, failed: dict) -> None:
    """scores.json and scores.csv. What is at the top of scores.json is the first row's, all are in `rows`."""
    table = []
    for row in rows:
        entry = {"name": row.name, "model": row.model, "weights": row.weights and str(row.weights), "lacks": row.lacks}
        entry |= {"predictions": str(row.folder), "settings": row.settings and asdict(row.settings), "paper": row.paper}
        table.append({**entry, **scores.get(row.name, {}), "failed": failed[row.name]})
    first = next(entry for entry in table if "overall" in entry)
    record = {"dataset": args.dataset, "subset": args.subset, "split": args.split if args.dataset == "jhmdb" else None}
    record |= {level: first[level] for level in ("overall", "per_object", "per_sequence")} | {"rows": table}
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)  # JSON has no nan: null
    with atomic(out / "scores.json") as path:
        path.write_text(json.dumps(record, indent=1))
    columns = COLUMNS[args.dataset] + (["IoU"] if args.dataset == "vip" else [])
    with atomic(out / "scores.csv") as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "level", "name", *columns])
        for name, score in scores.items():
            for level, entries in {**score, "overall": {"all": score["overall"]}}.items():
                for what, entry in entries.items():
                    values = [entry.get(c, math.nan) for c in columns]
                    writer.writerow([name, level, what, *("" if v != v else f"{v:.6f}" for v in values)])


def sweep_curves(rows: list[Row], scores: dict, figure: str) -> dict[str, dict]:
    """factor -> {(model, the other varied settings): [(value, score)]}: rows that differ in one number alone."""
    curves, values = {}, {f.name: {getattr(row.settings, f.name) for row in rows} for f in fields(Propagation)}
    varied = [f for f, seen in values.items() if len(seen) > 1]
    for factor in varied:
        if any(isinstance(value, str | bool) for value in values[factor]):
            continue
        lines = {}
        for row in rows:
            others = tuple((f, getattr(row.settings, f)) for f in varied if f != factor)
            point = getattr(row.settings, factor), 100 * scores[row.name]["overall"].get(figure, math.nan)
            lines.setdefault((row.model, others), []).append(point)
        if lines := {key: sorted(set(points)) for key, points in lines.items() if len(set(points)) > 1}:
            curves[factor] = lines
    return curves


def draw_curves(curves: dict[str, dict], ylabel: str) -> str:
    """Figures 4 and 5 of the paper: overall solid, per-frame dashed, one colour a model (or a setting)."""
    names = {"temperature": "1 / temperature", "context": "context frames n", "topk": "neighbours k"}
    figure = Figure(figsize=(max(4.4 * len(curves), 6), 3.8))
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)
    for ax, (factor, lines) in zip(axes[0], curves.items(), strict=True):
        told = {"aggregation"} if len({dict(others).get("aggregation") for _, others in lines}) > 1 else set()
        for f, _ in next(iter(lines))[1]:  # what does not follow from the model and the aggregation tells lines apart
            seen = {(model, dict(others).get("aggregation"), dict(others)[f]) for model, others in lines}
            told |= {f} if len(seen) > len({key[:2] for key in seen}) else set()
        hues = {}
        for (model, others), points in lines.items():
            label = [model, *(v if isinstance(v, str) else f"{f}={show(v)}" for f, v in others if f in told)]
            hue = (model, *(v for f, v in others if f in told and f != "aggregation"))
            style = "--" if dict(others).get("aggregation") == "per-frame" else "-"
            x, y = zip(*points, strict=True)
            x = [1 / v for v in x] if factor == "temperature" else x
            colour = f"C{hues.setdefault(hue, len(hues))}"
            ax.plot(x, y, style, marker="o", ms=4, color=colour, label=" ".join(map(str, label)))
        ticks = sorted({1 / v if factor == "temperature" else v for points in lines.values() for v, _ in points})
        if len(ticks) > 2 and ticks[-1] > 8 * ticks[0]:
            ax.set_xscale("log")
            ax.minorticks_off()
        ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        ax.set_xlabel(names.get(factor, factor))
        ax.legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel(ylabel)
    return embed_figure(figure)


def draw_time(results: dict[str, dict]) -> str:
    """J and F over time: a small plot a sequence, a colour an object (as in its masks)."""
    shown = {name: result for name, result in results.items() if len(result["frames"])}
    lines = math.ceil(len(shown) / 3)
    figure = Figure(figsize=(12.6, 2 * lines))
    axes = figure.subplots(lines, 3, squeeze=False, sharey=True)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax, (name, result) in zip(axes.flat, shown.items(), strict=False):
        for k, (j, f) in enumerate(zip(result["J"], result["F"], strict=True), 1):
            colour = PALETTE[k] / 255
            ax.plot(result["frames"], j, "-", color=colour, lw=1.6)
            ax.plot(result["frames"], f, ":", color=colour, lw=1.6)
        ax.set_xticks(range(0, len(result["frames"]), max(1, len(result["frames"]) // 4)))
        ax.set_title(f"{name}: {len(result['J'])} object{'s' * (len(result['J']) > 1)}", fontsize=10, loc="left")
        ax.set_ylim(-0.03, 1.03)
    return embed_figure(figure)


def embed_figure(figure: Figure) -> str:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f'<img class=plot src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def contact_sheet(seq: Sequence, folder: Path, result: dict, count: int = 5) -> str:
    """Ground truth above the prediction, at evenly spaced frames (not the first, which is given)."""
    scored = {name: i for i, name in enumerate(result.get("frames", ()))}
    among = [name for name in seq.names if name in scored] or seq.names
    picks = np.linspace(0, len(among), count, endpoint=False).astype(int) + len(among) // (2 * count)
    video = Video(seq.frames) if seq.frames.is_dir() else None
    cells = {"": [], "ground truth": [], "prediction": []}
    for name in dict.fromkeys(among[i] for i in picks):
        frame = next(video.frames([video.names.index(name)]))[1] if video and name in video.names else None
        caption = name
        if name in scored:
            j, f = (percent(result[what][:, scored[name]].mean()) for what in "JF")
            caption += f" &middot; J {j} F {f}"
        cells[""].append(f"<span class=cap>{caption}</span>")
        for kind, path in (("ground truth", seq.truth[name]), ("prediction", prediction(folder, seq, name))):
            if seq.dataset == "jhmdb":
                picture = draw_joints(frame, read_joints(path)[seq.names.index(name)])
            else:
                ids = read_ids(path)
                ids = one_object(ids) if seq.dataset == "davis2016" else np.where(ids == 255, 0, ids).astype(np.uint8)
                backdrop = np.full((*ids.shape, 3), 40, np.uint8) if frame is None else frame
                picture = overlay(backdrop, nearest(ids, backdrop.shape[:2]), PALETTE)
            small = 320, round(picture.shape[0] * 320 / picture.shape[1])
            small = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
            jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
            cells[kind].append(f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">')
    lines = "".join(f"<span class=side>{kind}</span>{''.join(line)}" for kind, line in cells.items())
    return f'<div class=sheet style="grid-template-columns:5.5em repeat({len(cells[""])},1fr)">{lines}</div>'


def draw_joints(frame: np.ndarray | None, joints: np.ndarray, scale: int = 3) -> np.ndarray:
    """The frame, enlarged, with a coloured dot on each joint."""
    out = np.full((240, 320, 3), 40, np.uint8) if frame is None else frame
    out = cv2.resize(out, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    for k, (x, y) in enumerate(joints, 1):
        if x >= 0:
            at = round(scale * x), round(scale * y)
            cv2.circle(out, at, 4 * scale, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(out, at, 3 * scale, PALETTE[k].tolist(), -1, cv2.LINE_AA)
    return out


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f5f6f8;margin:0}
main{max-width:1180px;margin:auto;padding:28px 24px 60px}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:34px 0 10px}
.sub,.cap,.side{color:#637083}.cap,.side{font-size:12px;text-align:center}.fail{color:#a12622}
.card,.kpi{background:#fff;border:1px solid #e2e6eb;border-radius:10px;padding:14px 18px;overflow-x:auto}
.kpis{display:flex;gap:12px;flex-wrap:wrap;margin:18px 0}.kpi{min-width:88px}
.kpi b{display:block;font-size:28px;line-height:1.2}.kpi span{color:#637083;font-size:13px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}tr.best td{font-weight:650}
td,th{padding:4px 10px;border-bottom:1px solid #edf0f3;text-align:right}th{color:#637083;font-size:13px}
td:first-child,th:first-child{text-align:left}tr.off td{color:#8b97a5}
.bar{display:grid;grid-template-columns:15em 1fr 3.5em;gap:10px;align-items:center;margin:4px 0}
.bar i,.key i{display:block;height:8px;border-radius:4px;margin:2px 0}.bar em{font-style:normal;text-align:right}
.bar span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar div{background:#eef1f4;border-radius:4px}.key i{display:inline-block;width:12px;margin:0 5px 0 14px}
.sheet{display:grid;gap:4px;align-items:center}.sheet img{width:100%;border-radius:4px;display:block}
.plot{max-width:100%;height:auto}dl{display:grid;grid-template-columns:repeat(4,auto 1fr);gap:4px 14px;margin:0}
dt{color:#637083}dd{margin:0}ul{margin:0;padding-left:18px}@media print{.card{break-inside:avoid}}
"""


def write_report(args: Args, out: Path, rows: list[Row], sequences: list[Sequence], results, scores, failed) -> None:
    """report.html: one self-contained file, for a browser or a talk."""
    columns, figure, esc, text = COLUMNS[args.dataset], MAIN[args.dataset], html.escape, []
    ran = [row for row in rows if row.name in scores]
    best = max(ran, key=lambda row: np.nan_to_num(scores[row.name]["overall"].get(figure, math.nan), nan=-1))
    overall, by_name = scores[best.name]["overall"], {seq.name: seq for seq in sequences}
    colours = ("#2f6db5", "#e08a2e", "#4a9a57", "#b5485d", "#7a5fb0", "#7f8b97")

    def card(title: str, *inside: str) -> None:
        text.append(f"<h2>{title}</h2><div class=card>{''.join(inside)}</div>")

    def bars(numbers: dict[str, list[float]], keys: list[str]) -> str:  # name: the number beside it, then a bar a key
        key = "".join(f"<i style='background:{colours[i]}'></i>{esc(k)}" for i, k in enumerate(keys))
        out = [f"<div class='sub key'>{key}</div>"]
        for name, (number, *values) in numbers.items():
            widths = [100 * float(np.nan_to_num(value)) for value in values]
            lines = "".join(f"<i style='width:{w:.1f}%;background:{colours[i]}'></i>" for i, w in enumerate(widths))
            out.append(f"<div class=bar><span>{esc(name)}</span><div>{lines}</div><em>{percent(number)}</em></div>")
        return "".join(out)

    def table(heads: list[str], lines: list[tuple[Row, list[str]]]) -> str:
        text = "".join(f"<th>{head}</th>" for head in ["", *heads])
        for row, cells in lines:
            kind = " class=best" if row is best else " class=off" if row.lacks else ""
            text += f"</tr><tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in [esc(row.name), *cells])
        return f"<table><tr>{text}</tr></table>"

    title = {"davis": "DAVIS 2017", "davis2016": "DAVIS 2016", "vip": "VIP", "jhmdb": f"JHMDB split {args.split}"}
    title = f"{title[args.dataset]} {args.subset}: {esc(best.name)}"
    over = {"vip": "part classes", "jhmdb": "joints"}.get(args.dataset, "objects")
    count = f"{len(results[best.name])} sequence{'s' * (len(results[best.name]) != 1)}"
    count += f" in {esc(args.data.resolve().name)}" if args.data else ""
    note = f"; the best of {len(ran)} rows" if len(ran) > 1 else ""
    about = [f"per cent, mean over {over} of {count}{note}", LEGEND[MAIN[args.dataset]], *unlike(args, rows, scores)]
    text.append(f"<h1>{title}</h1><div class=sub>{'<br>'.join(about)}</div>")
    boxes = {c: percent(overall.get(c)) for c in columns} | {f"{c}, paper": v for c, v in best.paper.items()}
    boxes = (f"<div class=kpi><b>{number}</b><span>{esc(c)}</span></div>" for c, number in boxes.items())
    text.append(f"<div class=kpis>{''.join(boxes)}</div>")

    if curves := sweep_curves([row for row in ran if row.settings], scores, figure):
        card("Sweep", draw_curves(curves, f"{figure.removesuffix('_M')} (%)"))
    if len(rows) > 1:
        paper = [c for c in columns if any(c in row.paper for row in rows)]
        heads = [esc(c) for c in columns] + [f"{esc(c)}<br>{what}" for c in paper for what in ("paper", "difference")]
        lines = []
        for row in rows if paper else ran:
            ours = [beside(row, scores, c)[1] for c in columns]
            lines.append((row, ours + [cell for c in paper for cell in beside(row, scores, c)[::2]]))
        card("Rows", table(heads, lines), f"<div class=sub>{NOTE}</div>" if args.paper else "")

    of_best = scores[best.name]["per_sequence"]
    ranked = sorted((n for n in of_best if of_best[n].get(figure, -1) >= 0), key=lambda n: -of_best[n][figure])
    if 1 < len(ran) <= len(colours):
        keys = [row.name for row in ran]
        values = {n: [scores[k]["per_sequence"].get(n, {}).get(figure, 0) for k in keys] for n in ranked}
    else:
        keys = ["J_M", "F_M"] if "J_M" in columns else columns[:2]
        values = {n: [of_best[n].get(k, 0) for k in keys] for n in ranked}
    numbers = bars({n: [of_best[n][figure], *values[n]] for n in ranked}, keys)
    card(f"Sequences, by {figure} of {esc(best.name)}", numbers)

    half = min(2, max(1, len(ranked) // 2))
    for kind, names in (("Best", ranked[:half]), ("Worst", ranked[half:][-half:][::-1])):
        for name in names:
            sheet = contact_sheet(by_name[name], best.folder, results[best.name][name])
            card(f"{kind}: {esc(name)}, {figure} {percent(of_best[name][figure])}", sheet)
    if "J_M" in columns and ranked:
        legend = "<div class=sub>solid J, dotted F; a colour an object, as in the masks</div>"
        card(f"J and F over time, {esc(best.name)}", legend, draw_time(results[best.name]))
    elif ranked:
        keys = ["IoU"] if args.dataset == "vip" else columns[:2]
        of_parts = scores[best.name]["per_object"].items()
        card(over.capitalize(), bars({n: [score[k] for k in (keys[0], *keys)] for n, score in of_parts}, keys))

    if models := [row for row in ran if row.settings]:
        used = [{"model": r.model, "weights": getattr(r.weights, "name", "-"), **asdict(r.settings)} for r in models]
        same = {f: v for f, v in used[0].items() if all(entry[f] == v for entry in used)}
        lines = ["<dl>", *(f"<dt>{f}</dt><dd>{esc(show(v))}</dd>" for f, v in same.items()), "</dl>"]
        if differ := [f for f in used[0] if f not in same]:
            cells = [[esc(show(entry[f])) for f in differ] for entry in used]
            lines += ["<br>", table(differ, list(zip(models, cells, strict=True)))]
        card("Settings", *lines)
    if not_run := lacking(rows):
        card("Not run", "<ul>", *(f"<li>{esc(line.removeprefix('not run: '))}</li>" for line in not_run), "</ul>")
    if wrong := dict.fromkeys(why for row in rows for why in failed[row.name].values()):
        more = f"<li>and {len(wrong) - 10} more, in scores.json</li>" if len(wrong) > 10 else ""
        items = "".join(f"<li>{esc(why)}</li>" for why in list(wrong)[:10])
        card("<span class=fail>Failed</span>", "<ul>", items, more, "</ul>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    with atomic(out / "report.html") as path:
        path.write_text(f"{head}<main>{''.join(text)}</main></html>", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------


def cores() -> int:
    """Cores for this process: its share of those that the system lets it use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def worker_pool(processes: int):
    """Processes for scoring, forked: they share what is imported, and use neither torch nor the GPU."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # ends OpenCV's threads before the fork; a child cannot
    pool = multiprocessing.get_context("fork").Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    cv2.setNumThreads(threads)
    return pool


def main(args: Args) -> None:
    typed = {arg.split("=")[0].lstrip("-").removeprefix("no-").replace("-", "_") for arg in sys.argv if arg[:2] == "--"}
    own = asdict(preset(args.model, args.dataset))
    given = {factor: v for factor, v in asdict(args.propagation).items() if v != own[factor] or factor in typed}
    if args.paper:
        args = replace(args, dataset={"table7": "vip", "table8": "jhmdb", "figure5": "vip"}.get(args.paper, "davis"))
    if sum(map(bool, (args.predictions, args.sweep, args.paper))) > 1:
        raise UserError("--predictions, --sweep and --paper: each is a run of its own; give one of them")
    root, out = args.data or Path("data") / args.dataset, args.out or Path("results") / args.dataset
    sequences, absent = read_dataset(args, root)
    if args.predictions:
        for folder in args.predictions:
            if not any(prediction(folder, seq).exists() for seq in sequences):
                what = "holds none of the sequences" if folder.is_dir() else "no such folder"
                wants = next(folder.glob("predictions/*"), prediction(Path("<folder>"), sequences[0], "<frame>"))
                raise UserError(f"{folder}: {what}; --predictions takes {wants}")
        idle = [name for name in ("weights", "model", "dtype") if getattr(args, name) != getattr(Args, name)]
        if idle := [*idle, *given]:
            flag = idle[0].replace("_", "-")
            raise UserError(f"--{flag}: has no say in --predictions, which are only scored; leave it out")
        short = len({folder.resolve().name for folder in args.predictions}) == len(args.predictions)
        rows = [Row(folder.resolve().name if short else str(folder), folder) for folder in args.predictions]
    elif args.paper:
        rows = paper_rows(args, root, out, given)
    else:
        chosen = sweep_settings(args, args.propagation) if args.sweep else [args.propagation]
        rows = [make_row(args, root, out, settings) for settings in chosen]
        rows = rows if args.sweep else [paper_best(args, row) for row in rows]
    if args.dataset == "jhmdb" and any(row.settings and row.settings.localization == "track" for row in rows):
        raise UserError("--localization track: follows masks, JHMDB has key points; take --localization none or fixed")
    can_run = [row for row in rows if not row.lacks]

    rank, world = rank_world()
    results, failed = {row.name: {} for row in rows}, {row.name: {} if row.lacks else dict(absent) for row in rows}
    if absent and rank == 0:
        of = len(sequences) + len(absent)
        print(f"error: {next(iter(absent.values()))} ({len(absent)} of {of} sequences are missing)", file=sys.stderr)
    with worker_pool(cores()) as pool:
        if world > 1:
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        evaluate(args, can_run, sequences[rank::world], pool, results, failed)
    if world > 1:
        parts = [None] * world
        distributed.all_gather_object(parts, (results, failed))
        distributed.destroy_process_group()
        for name, (part_results, part_failed) in itertools.product(results, parts):
            results[name] |= part_results[name]
            failed[name] |= part_failed[name]
    code = 1 if any(failed.values()) else 0
    if rank:
        sys.exit(code)
    for row in can_run if not args.predictions else ():
        shutil.rmtree(row.folder / ".partial", ignore_errors=True)
    if args.subset == "test-dev":
        print("predicted, not scored (the annotations are not public):", *(row.folder for row in can_run), sep="\n  ")
        sys.exit(code)
    order = {row.name: [seq.name for seq in sequences if seq.name in results[row.name]] for row in can_run}
    results = {name: {seq: results[name][seq] for seq in names} for name, names in order.items()}
    scores = {name: summarize(args.dataset, result) for name, result in results.items()}
    print_table(args, rows, scores, failed, len(sequences) + len(absent))
    if any(results.values()):
        write_scores(args, out, rows, scores, failed)
        write_report(args, out, rows, sequences, results, scores, failed)
        print(f"{out}/scores.json  {out}/scores.csv  {out}/report.html")
    sys.exit(code)


if __name__ == "__main__":
    run(main, partial(parse, Args))
