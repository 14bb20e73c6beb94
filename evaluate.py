"""A data set -> the paper's scores, tables and figures.

    python evaluate.py --dataset davis --data DAVIS                      # the default model, a row of Table 6
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
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import cv2
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from scipy.io import loadmat, savemat
from torch import distributed
from tqdm import tqdm

from common import (
    MODELS,
    PALETTE,
    PICTURES,
    Propagation,
    UserError,
    Video,
    atomic,
    find_weights,
    labels_from_mask,
    labels_from_points,
    load_encoder,
    mask_from_labels,
    overlay,
    parse_args,
    points_from_labels,
    propagate_video,
    run,
    write_mask,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURE_FACTORS = ("size", "upsample", "layer", "stride", "l2")  # a change in these means new features


@dataclass(frozen=True)
class Args:
    dataset: Literal["davis", "davis2016", "vip", "jhmdb"] = "davis"
    """DAVIS 2017, DAVIS 2016 (one object), VIP (semantic and instance parts) or JHMDB (body joints)."""
    data: Path | None = None
    """Root of the data set in its official layout (default: data/<dataset>)."""
    subset: Literal["val", "train", "test-dev"] = "val"
    """test-dev is propagated, not scored: its annotations are not public."""
    split: Literal[1, 2, 3] = 1
    """JHMDB: which of the three train/test splits."""
    sequences: str = ""
    """Only these, separated by commas (default: all of the subset)."""
    model: str = "imagenet"
    """Feature extractor, a name in common.MODELS."""
    weights: Path | None = None
    """Its weights (default: weights/, the torch hub cache, or a download)."""
    propagation: Propagation = field(default_factory=Propagation)
    predictions: tuple[Path, ...] = ()
    """Only score these folders (<folder>/<sequence>/<frame>.png), a row each."""
    out: Path | None = None
    """Folder for predictions, scores.json, scores.csv and report.html (default: results/<dataset>)."""
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """factor=value,value,... Give it several times: one factor at a time, or all combinations with --grid."""
    grid: bool = False
    """Sweep all combinations of the factors."""
    paper: (
        Literal["table1", "table2", "table3", "table4", "table6", "table7", "table8", "figure4", "figure5"] | None
    ) = None
    """Run the rows of this table or figure of the paper, and print them side by side with the paper's."""
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
SIZES = {"vip": "560x560", "jhmdb": "240x240"}  # section 7; else the model's own
PARTS = [
    "background",
    "hat",
    "hair",
    "sun-glasses",
    "upper-clothes",
    "dress",
    "coat",
    "socks",
    "pants",
    "gloves",
    "scarf",
    "skirt",
    "torso-skin",
    "face",
    "right-arm",
    "left-arm",
    "right-leg",
    "left-leg",
    "right-shoe",
    "left-shoe",
]
JOINTS = [
    "neck",
    "belly",
    "face",
    "right-shoulder",
    "left-shoulder",
    "right-hip",
    "left-hip",
    "right-elbow",
    "left-elbow",
    "right-knee",
    "left-knee",
    "right-wrist",
    "left-wrist",
    "right-ankle",
    "left-ankle",
]


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
    """The sequences asked for, and why others that were asked for are missing. UserError if there are none."""
    wanted = [name for name in args.sequences.split(",") if name]
    page = f"see {PAGES[args.dataset]}, and say where it is with --data"
    if args.dataset.startswith("davis"):
        pictures, truth = root / "JPEGImages/480p", root / "Annotations/480p"
        listing = root / "ImageSets" / ("2016" if args.dataset == "davis2016" else "2017") / f"{args.subset}.txt"
        folders = [(name, pictures / name, truth / name, None) for name in wanted or read_list(listing, page)]
    elif args.dataset == "vip":
        root = root / "VIP_Fine" if (root / "VIP_Fine").is_dir() else root
        truth = root / "Annotations" if (root / "Annotations").is_dir() else root
        listing = root / f"lists/{args.subset}_videos.txt"
        folders = [
            (name, root / "Images" / name, truth / "Category_ids" / name, truth / "Instance_ids" / name)
            for name in wanted or read_list(listing, page)
        ]
    else:
        pictures = root / "Frames" if (root / "Frames").is_dir() else root / "Rename_Images"
        listings = sorted((root / "splits").glob(f"*_test_split{args.split}.txt"))
        if not listings:
            raise UserError(f"{root}/splits/<class>_test_split{args.split}.txt: not found; JHMDB is incomplete, {page}")
        folders, chosen = [], {"val": "2", "train": "1", "test-dev": ""}[args.subset]
        for listing in listings:
            kind = listing.name.removesuffix(f"_test_split{args.split}.txt")
            for clip, group in (line.rsplit(maxsplit=1) for line in listing.read_text().splitlines() if line.strip()):
                name = f"{kind}/{Path(clip).stem}"
                if group == chosen if not wanted else {name, Path(clip).stem} & set(wanted):
                    folders.append(
                        (name, pictures / name, root / "joint_positions" / name / "joint_positions.mat", None)
                    )

    sequences, missing = [], {}
    for name, pictures, truth, instances in folders:
        if not truth.exists():
            missing[name] = f"{truth}: not found; the data set is incomplete, {page}"
            continue
        frames = {p.stem for p in pictures.iterdir() if p.suffix.lower() in PICTURES} if pictures.is_dir() else set()
        if truth.is_file():
            annotated = {}
        else:
            annotated = {p.stem: p for p in sorted(truth.iterdir()) if p.suffix.lower() == ".png"}
        names = set(annotated) if args.dataset == "vip" else frames | set(annotated)  # VIP: every 25th frame
        names = tuple(sorted(names, key=lambda n: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", n)]))
        files = annotated or dict.fromkeys(names or ("00001",), truth)
        sequences.append(Sequence(args.dataset, name, pictures, names, files, instances))
    if not folders and wanted:
        raise UserError(
            f"--sequences {args.sequences}: not in split {args.split} of {root}; names are like <class>/<clip>"
        )
    if not sequences:
        raise UserError(next(iter(missing.values()), f"{root}: the {args.subset} list is empty, {page}"))
    return sequences, missing


def read_list(path: Path, page: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: not found, it lists the sequences; {page}")
    lines = [
        line.split()[0] if line.startswith("/") else line.strip() for line in path.read_text().splitlines() if line
    ]
    names = [
        Path(line).parent.name if line.startswith("/") else line for line in lines if line
    ]  # DAVIS 2016's own lists
    return list(dict.fromkeys(names))


def check_names(folder: Path, names: Iterable[str], like: str) -> None:
    """A folder whose file names differ in more than numbers holds more than one sequence."""
    pattern = re.sub(r"\d+", "0", like)
    for name in names:
        if re.sub(r"\d+", "0", name) != pattern:
            raise UserError(f"{folder / name}: is not named like {like}; the folder mixes sequences, keep one in each")


def read_ids(path: Path) -> np.ndarray:
    """An indexed (or grey) PNG as it is: H x W uint8 ids."""
    try:
        with Image.open(path) as picture:
            if picture.mode in ("P", "L"):
                return np.asarray(picture)
            mode = picture.mode
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; every scored frame needs its mask there") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it is damaged, write or download it again") from error
    raise UserError(f"{path}: is a {mode} picture, not an indexed PNG; save object ids (mode P), not colours")


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
        return read_ids(path), {int(line[0]): int(line[1]) for line in lines}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path.with_suffix('.txt')}: not found, or not lines of: instance id, part class") from error


# ---------------------------------------------------------------------------------------------------------------------
# Scores. protocols: the official DAVIS, VIP and JHMDB tools; identical numbers, less work


def score_frame(truth: np.ndarray, pred: np.ndarray, objects: int) -> np.ndarray:
    """J and F (2 x objects) of objects 1..objects in one frame, from H x W uint8 ids (Perazzi et al. 2016).

    The official definition dilates two full-size boundary maps with a disk for each object. Here all objects'
    boundary pixels are found at once, within the objects' bounding box, and only they are compared.
    """
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    boxes = np.array([cv2.boundingRect(ids) for ids in (truth, pred)])  # x y w h
    boxes = boxes[boxes[:, 2] > 0]
    if len(boxes):
        x, y = np.maximum(boxes[:, :2].min(0) - 1, 0)
        right, bottom = (boxes[:, :2] + boxes[:, 2:]).max(0) + 1
        truth, pred = truth[y:bottom, x:right], pred[y:bottom, x:right]
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
    return base / seq.name / f"{name}.png" if name else base / seq.name


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


def score_vip(seq: Sequence, folder: Path, pool) -> dict:
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
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{guess / name}.txt: not found, or not lines of: part class, score") from error
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


def score_jhmdb(seq: Sequence, folder: Path, pool) -> dict:
    """Distance of each joint in each frame but the first (15 x T-1), in units of 0.6 of the person's diagonal.

    The person's box holds the true joints that the prediction shows; joints it does not show are nan: not counted.
    """
    truth, path = read_joints(seq.truth[next(iter(seq.truth))]), prediction(folder, seq)
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


SCORE = {"davis": score_davis, "davis2016": score_davis, "vip": score_vip, "jhmdb": score_jhmdb}
MAIN = {"davis": "J&F_M", "davis2016": "J&F_M", "vip": "mIoU", "jhmdb": "PCK@0.1"}  # the figure to rank by
COLUMNS = {
    "davis": ["J&F_M", "J_M", "J_O", "J_D", "F_M", "F_O", "F_D"],
    "davis2016": ["J&F_M", "J_M", "J_O", "J_D", "F_M", "F_O", "F_D"],
    "vip": ["mIoU", "AP^r_vol"],
    "jhmdb": [f"PCK@{a / 10}" for a in range(1, 6)],
}


def summarize(dataset: str, results: dict[str, dict]) -> dict:
    """Per-sequence results -> {"overall", "per_object", "per_sequence"}: fractions, under the paper's names.

    per_object is per part class for VIP and per joint for JHMDB.
    """
    if dataset.startswith("davis"):
        per_object, per_sequence = {}, {}
        for name, result in results.items():
            rows = []
            for k, (j, f) in enumerate(zip(result["J"], result["F"], strict=True), 1):
                row = dict(zip(COLUMNS[dataset][1:], statistics(j) + statistics(f), strict=True))
                rows.append({"J&F_M": (row["J_M"] + row["F_M"]) / 2, **row})
                per_object[f"{name}_{k}"] = rows[-1]
            per_sequence[name] = mean_scores(rows)
        return {"overall": mean_scores(per_object.values()), "per_object": per_object, "per_sequence": per_sequence}
    if dataset == "vip":

        def one(group: Iterable[dict]) -> dict:
            group = list(group)
            score = {"mIoU": float(np.nanmean(class_iou(sum(r["confusion"] for r in group))))} if group else {}
            present = sum(r["present"] for r in group)
            if np.any(present):
                score["AP^r_vol"] = average_precision(np.concatenate([r["parts"] for r in group]), present)
            return score

        iou = class_iou(sum(r["confusion"] for r in results.values())) if results else []
        per_object = {part: {"IoU": float(x)} for part, x in zip(PARTS, iou, strict=False) if x == x}
        return {
            "overall": one(results.values()),
            "per_object": per_object,
            "per_sequence": {name: one([result]) for name, result in results.items()},
        }

    def pck(distance: np.ndarray) -> list[dict]:  # 15 x frames -> a row a joint
        counted = ~np.isnan(distance)
        share = [(distance <= a / 10).sum(1) / np.where(counted.sum(1), counted.sum(1), np.nan) for a in range(1, 6)]
        return [dict(zip(COLUMNS[dataset], map(float, row), strict=True)) for row in np.array(share).T]

    joints = pck(np.concatenate([r["distance"] for r in results.values()], 1)) if results else []
    per_sequence = {name: mean_scores(pck(r["distance"])) for name, r in results.items()}
    return {
        "overall": mean_scores(joints),
        "per_object": dict(zip(JOINTS, joints, strict=False)),
        "per_sequence": per_sequence,
    }


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class, nan for those in neither truth nor prediction."""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return confusion.diagonal() / np.where(union, union, np.nan)


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
    folder: Path
    model: str | None = None
    weights: Path | None = None
    settings: Propagation | None = None
    paper: tuple[str, dict] | None = None  # (table, {score: the paper's figure in per cent})


def make_row(args: Args, root: Path, out: Path, settings: Propagation, name: str = "", paper=None, model="") -> Row:
    """The row of a model at some settings; its folder's name ends in a digest of all that the predictions depend on."""
    model = model or args.model
    weights = args.weights if args.weights and model == args.model else find_weights(model)
    own = asdict(MODELS[model].settings)
    changed = [f"{key}={value}" for key, value in asdict(settings).items() if own[key] != value]
    record = {
        "model": model,
        "weights": file_digest(weights) if weights and weights.is_file() else str(weights),
        "dataset": [args.dataset, str(root.resolve())],
        "dtype": args.dtype,
        "settings": asdict(settings),
    }
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    folder = out / "predictions" / f"{model}-{digest}"
    return Row(name or " ".join([model, *changed]), folder, model, weights, settings, paper)


@lru_cache
def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if kind is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else fail(text)
    if choices := get_args(kind):
        return {str(choice): choice for choice in choices}[text] if text in map(str, choices) else fail(text, choices)
    return kind(text)


def fail(text: str, choices=("true", "false")):
    raise ValueError(f"{text!r} is none of {', '.join(map(str, choices))}")


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
    check_names(seq.frames, seq.names, seq.names[0])

    frames = ahead(frame for _, frame in video.frames([at[name] for name in seq.names]))
    features = (encoder(torch.from_numpy(frame)[None].to(device))[0] for frame in frames)  # C h w each
    first = next(features)
    grid = tuple(first.shape[1:])
    if seq.dataset == "jhmdb":
        given, size = read_joints(next(iter(seq.truth.values())))[0], video.size
        labels, ids, parts, kinds = labels_from_points(given, size, grid).to(device), [], [], {}
    else:
        given = first_mask(seq)
        given, size = np.where(given == 255, 0, given).astype(np.uint8), given.shape
        if size != video.size and seq.dataset != "vip":
            sizes = "is {1}x{0}, but its frame is {3}x{2}".format(*size, *video.size)
            raise UserError(f"{seq.truth[seq.names[0]]}: {sizes}; they must show the same pixels")
        ids, parts, kinds = [i for i in np.unique(given).tolist() if i], [], {}
        labels = labels_from_mask(torch.from_numpy(given).to(device), ids, grid)
        if seq.instances and seq.instances.is_dir():  # semantic and instance labels travel together
            given_parts, kinds = read_instances(seq.instances / f"{seq.names[0]}.png")
            parts = [i for i in np.unique(given_parts).tolist() if i in kinds]
            part_labels = labels_from_mask(torch.from_numpy(given_parts.copy()).to(device), parts, grid)
            labels = torch.cat([labels, part_labels])

    folders = [row.folder / ".partial" / seq.name for row in rows]
    for row, folder in zip(rows, folders, strict=True):
        shutil.rmtree(row.folder / ".partial" / seq.name, ignore_errors=True)
        (folder / "parts").mkdir(parents=True)
        record = {"model": row.model, "weights": str(row.weights), **asdict(row.settings)}
        with atomic(row.folder / "settings.json") as path:
            path.write_text(json.dumps(record, indent=1))
    points = [[given[:, :2]] for _ in rows] if seq.dataset == "jhmdb" else []
    streams = [
        propagate_video(targets, [(first, labels)], row.settings)
        for row, targets in zip(rows, itertools.tee(features, len(rows)), strict=True)
    ]
    with ThreadPoolExecutor(2) as writers:
        pending = deque()
        for name, maps in zip(
            seq.names, itertools.chain([[labels] * len(rows)], zip(*streams, strict=True)), strict=True
        ):
            for i, (row, soft) in enumerate(zip(rows, maps, strict=True)):
                if seq.dataset == "jhmdb":
                    if name != seq.names[0]:
                        points[i].append(points_from_labels(soft, size))
                    continue
                # VIP's masks are made at the network's input size and brought to full size by nearest neighbour
                full = row.settings.input_size(*size) if seq.dataset == "vip" else size
                soft, soft_parts = soft[: 1 + len(ids)], soft[1 + len(ids) :]
                mask = (
                    given
                    if name == seq.names[0]
                    else mask_from_labels(soft, ids, full, row.settings.minmax).cpu().numpy()
                )
                pending.append(writers.submit(write_mask, folders[i] / f"{name}.png", nearest(mask, size)))
                if parts:
                    pending.append(
                        writers.submit(
                            write_parts, folders[i] / f"parts/{name}.png", soft_parts, parts, kinds, full, size
                        )
                    )
            while len(pending) > 16 * len(rows):
                pending.popleft().result()
            bar.update(len(rows))
        for job in pending:
            job.result()
    for i, (row, folder) in enumerate(zip(rows, folders, strict=True)):
        if seq.dataset == "jhmdb":
            savemat(folder / "joint_positions.mat", {"pos_img": np.stack(points[i]).transpose(2, 1, 0) + 1})
        if parts:
            move(folder / "parts", row.folder / "Instance_ids" / seq.name)
        shutil.rmtree(folder / "parts", ignore_errors=True)
        move(folder, row.folder / seq.name)


def ahead(items: Iterable) -> Iterator:
    """The same items, each prepared in a thread while the one before is in use."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def write_parts(path: Path, labels: torch.Tensor, parts: list[int], kinds: dict[int, int], full, size) -> None:
    """VIP instances as the public script reads them: ids 1..n, and a line `class score` for each id."""
    soft = F.interpolate(labels[None], size=full, mode="bilinear")[0]  # 1 + n, H, W
    probability, winner = (each.cpu().numpy() for each in soft.max(0))
    winner = winner.astype(np.uint8)
    sums = np.bincount(winner.ravel(), probability.ravel(), minlength=1 + len(parts))
    areas = np.bincount(winner.ravel(), minlength=1 + len(parts))
    scores = sums / np.maximum(areas, 1)
    path.with_suffix(".txt").write_text("".join(f"{kinds[n]} {scores[i]:.6f}\n" for i, n in enumerate(parts, 1)))
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
    scored = args.subset != "test-dev"
    total = len(rows) * sum(len(seq.names) for seq in sequences)
    with tqdm(total=total, unit="frame", smoothing=0.05, dynamic_ncols=True) as bar:
        for group in groups.values():
            encoder = None
            for seq in sequences:
                bar.set_description(seq.name)
                todo = [row for row in group if row.settings and not complete(seq, row.folder)]
                done = bar.n
                try:
                    if todo and encoder is None:
                        device = args.device
                        if device == "auto" and torch.cuda.is_available():
                            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
                        encoder = load_encoder(group[0].model, group[0].weights, group[0].settings, device, args.dtype)
                except UserError:
                    raise
                try:
                    if todo:
                        propagate(seq, encoder, todo, bar)
                except UserError as error:
                    for row in todo:
                        failed[row.name][seq.name] = str(error)
                    bar.write(f"error: {error}", file=sys.stderr)
                for row in group:
                    if not scored or seq.name in failed[row.name]:
                        continue
                    try:
                        check_prediction(seq, row.folder)
                        results[row.name][seq.name] = SCORE[args.dataset](seq, row.folder, pool)
                    except UserError as error:
                        failed[row.name][seq.name] = str(error)
                        bar.write(f"error: {error}", file=sys.stderr)
                    else:
                        so_far = summarize(args.dataset, results[row.name])["overall"].get(MAIN[args.dataset], math.nan)
                        bar.set_postfix({MAIN[args.dataset].removesuffix("_M"): f"{100 * so_far:.1f}"})
                bar.update(done + len(group) * len(seq.names) - bar.n)


def check_prediction(seq: Sequence, folder: Path) -> None:
    """Is there a prediction for this sequence, and of it alone?"""
    if seq.dataset == "jhmdb":
        return
    path = prediction(folder, seq)
    if not path.is_dir():
        raise UserError(f"{path}: not found; predictions are <folder>/<sequence>/<frame>.png")
    extra = sorted({p.stem for p in path.glob("*.png")} - set(seq.names))
    check_names(path, extra, seq.names[0])
    if extra:
        note = f"note: {path}: {len(extra)} masks for frames that {seq.name} does not have are left out, such as {extra[0]}"
        tqdm.write(note, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's figures, side by side with ours

# paper.csv holds the printed figures (per cent). models: the first whose weights are at hand is run; settings: what
# differs from the paper's common ones (section 4): 480 x full, k 5, n 7, radius 12 and the temperature below.
PAPER = Path(__file__).with_name("paper.csv")
TEMPERATURES = {  # section 4.3 and the caption of Figure 4: per-frame, overall
    "imagenet": (1 / 40, 1.0),
    "rotation": (1 / 40, 1.0),
    "deepcluster": (1 / 40, 1.0),
    "moco": (1 / 50, 1.0),
    "uvc": (1.0, 1.0),
    "uvc+": (1.0, 1.0),
    "crw": (1 / 50, 1 / 20),
}
FIGURE_MODELS = ("rotation", "moco", "imagenet", "uvc", "crw")
FIGURE_AXES = {  # the factor swept: its values, the others fixed as in the captions
    "figure4": {
        "temperature": [1 / t for t in (1, 5, 10, 20, 30, 40, 50)],
        "context": [1, 3, 5, 7, 10, 15, 20],
        "topk": [1, 3, 5, 10, 20, 50],
    },
    "figure5": {"context": [1, 2, 4, 7, 10, 20], "topk": [1, 3, 5, 10, 20, 50]},
}
NOTES = "The paper's still-image rows of Tables 4, 6, 7 and 8 are fine-tuned after the stride change."


def paper_rows(args: Args, root: Path, out: Path, given: dict) -> tuple[list[Row], list[tuple[str, str, dict]]]:
    """Rows of a table or figure that can run, and (row, what is missing, the paper's figures) of the others."""
    wanted = []  # name, models, settings, figures
    for model, way in itertools.product(FIGURE_MODELS, ("overall", "per-frame")) if args.paper in FIGURE_AXES else ():
        models = [f"{model}-finetuned", model] if model in ("imagenet", "moco", "rotation") else [model]
        fixed = [way, "none", *(["topk=10", "context=1"] if args.dataset == "vip" else [])]
        for factor, values in FIGURE_AXES[args.paper].items():
            for value in values:
                words = [*fixed, f"{factor}={value}"]
                wanted.append((f"{model}, {way}, {factor} {value:.4g}", models, words, {}))
    with PAPER.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["table"] == args.paper:
                figures = {c: float(line[c]) for c in COLUMNS[args.dataset] if line.get(c)}
                wanted.append((line["row"], line["models"].split(), line["settings"].split(), figures))
    rows, missing = {}, []
    for name, models, words, figures in wanted:
        settings, why = paper_settings(args, models, words)
        if why:
            missing.append((name, why, figures))
            continue
        model, settings = settings
        row = make_row(args, root, out, replace(settings, **given), name, (args.paper, figures), model)
        rows.setdefault(row.folder if args.paper in FIGURE_AXES else name, row)  # curves share points
    return list(rows.values()), missing


def paper_settings(args: Args, models: list[str], words: list[str]):
    """((model, settings), "") of a row of the paper, or (None, what is missing)."""
    at_hand = [m for m in models if m in MODELS]
    if not at_hand:
        return None, "another paper's figure, not run here" if models == [
            "-"
        ] else f"model {models[0]}: not in common.MODELS yet"
    ready = [m for m in at_hand if (args.weights and m == args.model) or m == "random" or find_weights(m, fetch=False)]
    if not ready:
        url = MODELS[at_hand[0]].url
        return None, f"weights of {at_hand[0]}: {f'download {url} to weights/' if url else 'put them in weights/'}"
    model = ready[0]
    factors = {"size": SIZES.get(args.dataset, "480"), "upsample": 1, "softmax": "auto", "topk": 5, "context": 7}
    factors |= {"shape": "circle", "radius": 12, "exempt_first": False}
    for word in words:
        factor, _, value = word.partition("=")
        if not value:
            factor, value = "aggregation" if word in ("overall", "per-frame") else "localization", word
        try:
            factors[factor] = parse_value(factor, value)
        except ValueError:
            return None, f"{factor} {value}: not in common.Propagation yet"
    per_frame = factors["aggregation"] == "per-frame"
    family = model.removesuffix("-finetuned")
    factors = {"temperature": TEMPERATURES.get(family, (1.0, 1.0))[not per_frame], "minmax": per_frame, **factors}
    return (model, replace(MODELS[model].settings, **factors)), ""


# ---------------------------------------------------------------------------------------------------------------------
# What people look at


def print_table(args: Args, rows: list[Row], scores: dict, missing: list, failed: dict, total: int) -> None:
    """The terminal table; for --paper: paper, ours and the difference."""
    columns = COLUMNS[args.dataset]
    if args.paper and args.paper not in FIGURE_AXES:
        listed = [
            c
            for c in columns
            if any(c in (row.paper or ("", {}))[1] for row in rows) or any(c in m[2] for m in missing)
        ]
        body = []
        for row in rows:
            cells = [row.name + (f" [{row.model}]" if row.model not in row.name.lower() else "")]
            for c in listed:
                paper, ours = row.paper[1].get(c), 100 * scores[row.name]["overall"].get(c, math.nan)
                cells += [percent(paper, 1), percent(ours, 1), percent(None if paper is None else ours - paper, 1, "+")]
            body.append(cells)
        body += [
            [name, *(cell for c in listed for cell in (percent(figures.get(c), 1), "", ""))]
            for name, _, figures in missing
        ]
        head = ["% (paper, ours, difference)", *(cell for c in listed for cell in (c, "ours", "diff"))]
    else:
        head = ["%", *columns]
        body = [[row.name, *(percent(scores[row.name]["overall"].get(c)) for c in columns)] for row in rows]
    if args.dataset == "vip" and len(rows) == 1:
        body += [[f"  {part}", percent(s["IoU"]), ""] for part, s in scores[rows[0].name]["per_object"].items()]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    for line in [head, ["-" * w for w in widths], *body]:
        print(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        )
    if missing:
        print("\nnot run, with what is missing:")
        for why, names in itertools.groupby(missing, key=lambda m: m[1]):
            print(f"  {why}: {', '.join(name for name, *_ in names)}"[:400])
    if args.paper:
        print(f"\n{NOTES}")
    for row in rows:
        if failed[row.name]:
            print(f"{row.name}: {len(failed[row.name])} of {total} sequences failed, the figures are over the others")


def percent(value: float | None, scale: float = 100, sign: str = "") -> str:
    return "-" if value is None or value != value else f"{scale * value:{sign}.1f}"


def clean(value):
    """For JSON: nan becomes null, paths text."""
    if isinstance(value, dict):
        return {key: clean(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def write_scores(args: Args, out: Path, rows: list[Row], scores: dict, failed: dict, missing: list) -> None:
    """scores.json and scores.csv. `overall` and `per_object` at the top of scores.json are those of the first row."""
    table = []
    for row in rows:
        entry = {"name": row.name, "predictions": str(row.folder), "model": row.model}
        entry |= {"weights": row.weights and str(row.weights), "settings": row.settings and asdict(row.settings)}
        entry |= {"paper": row.paper and {"table": row.paper[0], "per_cent": row.paper[1]}}
        table.append({**entry, **scores[row.name], "failed": failed[row.name]})
    record = {
        "dataset": args.dataset,
        "subset": args.subset,
        **({"split": args.split} if args.dataset == "jhmdb" else {}),
    }
    record |= {"overall": table[0]["overall"], "per_object": table[0]["per_object"], "rows": table}
    record |= {"not_run": {name: why for name, why, _ in missing}}
    with atomic(out / "scores.json") as path:
        path.write_text(json.dumps(clean(record), indent=1))
    columns = COLUMNS[args.dataset] + (["IoU"] if args.dataset == "vip" else [])
    with atomic(out / "scores.csv") as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "level", "name", *columns])
        for row in rows:
            levels = {
                "overall": {"all": scores[row.name]["overall"]},
                **{k: scores[row.name][k] for k in ("per_sequence", "per_object")},
            }
            for level, entries in levels.items():
                for name, entry in entries.items():
                    values = [entry.get(c, math.nan) for c in columns]
                    writer.writerow([row.name, level, name, *("" if v != v else f"{v:.6f}" for v in values)])


def sweep_curves(args: Args, rows: list[Row], scores: dict) -> dict[str, list]:
    """factor -> [(model, settings that tell the line apart, [(value, score)])]: rows that differ in one number alone."""
    figure, rows = {}, [row for row in rows if row.settings]
    values = {f.name: {getattr(row.settings, f.name) for row in rows} for f in fields(Propagation)}
    varied = [f for f, seen in values.items() if len(seen) > 1]
    for factor in varied:
        lines = {}
        if any(isinstance(v, str | bool) for v in values[factor]):
            continue
        for row in rows:
            others = {f: getattr(row.settings, f) for f in varied if f != factor}
            lines.setdefault((row.model, *others.items()), {})[getattr(row.settings, factor)] = row
        long = [(key, line) for key, line in lines.items() if len(line) > 1]
        told = [
            f for i, f in enumerate(f for f in varied if f != factor) if len({key[1 + i][1] for key, _ in long}) > 1
        ]
        figure[factor] = [
            (key[0], {f: v for f, v in key[1:] if f in told or f == "aggregation"},
             sorted((x, 100 * scores[row.name]["overall"].get(MAIN[args.dataset], math.nan)) for x, row in line.items()))
            for key, line in long
        ]  # fmt: skip
    return {factor: lines for factor, lines in figure.items() if lines}


def draw_curves(args: Args, figure: dict[str, list], models: list[str]) -> str:
    """Figures 4 and 5 of the paper: overall solid, per-frame dashed, one colour a model."""
    names = {"temperature": "1 / temperature", "context": "context frames n", "topk": "neighbours k"}
    fig, axes = plt.subplots(1, len(figure), figsize=(4.2 * len(figure) + 0.6, 3.6), squeeze=False, sharey=True)
    for ax, (factor, lines) in zip(axes[0], figure.items(), strict=True):
        for i, (model, told, points) in enumerate(lines):
            x, y = zip(*points, strict=True)
            x = [1 / v for v in x] if factor == "temperature" else x
            several = len({m for m, *_ in lines}) > 1
            label = " ".join([model, *(str(v) if f == "aggregation" else f"{f}={v}" for f, v in told.items())])
            style = "--" if told.get("aggregation") == "per-frame" else "-"
            ax.plot(x, y, style, marker="o", ms=4, color=f"C{models.index(model) if several else i}", label=label)
        if factor == "temperature" and len({v for *_, p in lines for v, _ in p}) > 2:
            ax.set_xscale("log")
            ax.set_xticks(ticks := sorted({1 / v for *_, p in lines for v, _ in p}), [f"{t:.3g}" for t in ticks])
            ax.minorticks_off()
        ax.set_xlabel(names.get(factor, factor))
        ax.legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel(f"{MAIN[args.dataset].removesuffix('_M')} (%)")
    return embed_figure(fig)


def draw_time(results: dict[str, dict]) -> str:
    """J and F over time, a small plot a sequence, a colour an object."""
    shown = {name: r for name, r in results.items() if r["frames"]}
    columns = min(3, max(1, len(shown)))
    lines = math.ceil(len(shown) / columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.1 * columns, 1.9 * lines + 0.3), squeeze=False, sharey=True)
    for ax, (name, result) in itertools.zip_longest(axes.flat, shown.items(), fillvalue=("", None)):
        if result is None:
            ax.axis("off")
            continue
        for k, (j, f) in enumerate(zip(result["J"], result["F"], strict=True)):
            ax.plot(range(1, len(j) + 1), j, "-", color=f"C{k}", lw=1.5, label=f"J {k + 1}")
            ax.plot(range(1, len(f) + 1), f, ":", color=f"C{k}", lw=1.5, label=f"F {k + 1}")
        ax.set_title(name, fontsize=10, loc="left")
        ax.set_ylim(-0.03, 1.03)
        if len(result["J"]) <= 4:
            ax.legend(fontsize=7, frameon=False, ncols=2, loc="lower left")
    return embed_figure(fig)


def embed_figure(fig) -> str:
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    fig.tight_layout()
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg")
    plt.close(fig)
    return f'<img class="plot" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def embed_picture(frame: np.ndarray) -> str:
    jpeg = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def contact_sheet(seq: Sequence, folder: Path, result: dict, count: int = 5) -> str:
    """Ground truth (or the frame, where it is not annotated) above the prediction, at evenly spaced frames."""
    picks = [seq.names[i] for i in np.linspace(0, len(seq.names) - 1, min(count + 1, len(seq.names))).astype(int)][
        -count:
    ]
    video = Video(seq.frames) if seq.frames.is_dir() else None
    cells = {"ground truth": [], "prediction": []}
    for name in picks:
        frame = next(video.frames([video.names.index(name)]))[1] if video and name in video.names else None
        for kind, column in cells.items():
            if seq.dataset == "jhmdb":
                t = seq.names.index(name)
                source = next(iter(seq.truth.values())) if kind == "ground truth" else prediction(folder, seq)
                picture = draw_joints(frame, read_joints(source)[t])
            else:
                path = seq.truth.get(name) if kind == "ground truth" else prediction(folder, seq, name)
                mask = read_ids(path) if path and path.is_file() else None
                if mask is not None:
                    mask = (
                        one_object(mask)
                        if seq.dataset == "davis2016"
                        else np.where(mask == 255, 0, mask).astype(np.uint8)
                    )
                backdrop = np.full((*mask.shape, 3), 40, np.uint8) if frame is None else frame
                picture = backdrop if mask is None else overlay(backdrop, nearest(mask, backdrop.shape[:2]), PALETTE)
            height = round(picture.shape[0] * 300 / picture.shape[1])
            column.append(embed_picture(cv2.resize(picture, (300, height), interpolation=cv2.INTER_AREA)))
    label = {name: name for name in picks}
    if "J" in result:
        for i, name in enumerate(result["frames"]):
            label[name] = f"{name} &middot; J {percent(result['J'][:, i].mean())} F {percent(result['F'][:, i].mean())}"
    out = [
        '<div class="sheet">',
        f'<div style="grid-template-columns:5.5em repeat({len(picks)},1fr)">',
        "<span></span>",
    ]
    out += [f"<span class=cap>{label[name]}</span>" for name in picks]
    for kind, column in cells.items():
        out += [f"<span class=side>{kind}</span>", *column]
    return "".join([*out, "</div></div>"])


def draw_joints(frame: np.ndarray | None, joints: np.ndarray) -> np.ndarray:
    """The frame with a coloured dot on each joint."""
    scale = 3  # JHMDB is 320 x 240: dots need finer pixels than that
    frame = np.full((240, 320, 3), 40, np.uint8) if frame is None else frame
    out = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    for k, (x, y) in enumerate(joints):
        if x >= 0:
            at = (round(scale * x), round(scale * y))
            cv2.circle(out, at, 4 * scale, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(out, at, 3 * scale, PALETTE[k + 1].tolist(), -1, cv2.LINE_AA)
    return out


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f5f6f8;margin:0}
main{max-width:1180px;margin:auto;padding:28px 24px 60px}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:36px 0 10px}h3{font-size:15px;margin:18px 0 6px}
.sub{color:#637083}.card,.kpi{background:#fff;border:1px solid #e2e6eb;border-radius:10px;padding:14px 18px}
.kpis{display:flex;gap:12px;flex-wrap:wrap;margin:18px 0}.kpi{min-width:92px}.kpi b{display:block;font-size:28px;line-height:1.2}
.kpi span{color:#637083;font-size:13px}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th{font-weight:600;text-align:right;color:#637083;font-size:13px}td,th{padding:4px 10px;border-bottom:1px solid #edf0f3}
td{text-align:right}td:first-child,th:first-child{text-align:left}tr.best td{font-weight:650}.scroll{overflow-x:auto}
.bar{display:grid;grid-template-columns:13em 1fr 3.5em;gap:10px;align-items:center;margin:3px 0}
.bar i{display:block;height:8px;border-radius:4px;margin:2px 0}.bar em{font-style:normal;text-align:right}
.track{background:#eef1f4;border-radius:4px}.plot{max-width:100%;height:auto}.fail{color:#a12622}
.sheet>div{display:grid;gap:4px;align-items:center}.sheet img{width:100%;border-radius:4px;display:block}
.cap{font-size:12px;color:#637083;text-align:center}.side{font-size:13px;color:#637083}
.key i{display:inline-block;width:12px;height:8px;border-radius:4px;margin:0 5px 0 14px}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""


def write_report(
    args: Args, out: Path, rows: list[Row], sequences: list[Sequence], results, scores, failed, missing
) -> None:
    """report.html: one self-contained file, for a browser or a talk."""
    columns, main_score, colours = COLUMNS[args.dataset], MAIN[args.dataset], ("#2f6db5", "#e08a2e")
    figure = lambda row: scores[row.name]["overall"].get(main_score, math.nan)  # noqa: E731
    best = max(rows, key=lambda row: -1 if figure(row) != figure(row) else figure(row))
    esc, text = html.escape, []
    title = {"davis": "DAVIS 2017", "davis2016": "DAVIS 2016", "vip": "VIP", "jhmdb": "JHMDB"}[args.dataset]
    count = f"{len(results[best.name])} sequence{'s' * (len(results[best.name]) != 1)}"
    where = f"split {args.split} " * (args.dataset == "jhmdb") + args.subset
    text.append(f"<h1>{title} {where}: {esc(best.name)}</h1><div class=sub>{count}, mean over "
                f"{'objects' if 'J_M' in columns else 'part classes' if args.dataset == 'vip' else 'joints'}; per cent"
                f"{', best of ' + str(len(rows)) + ' rows' if len(rows) > 1 else ''}</div>")  # fmt: skip
    kpis = [
        f"<div class=kpi><b>{percent(scores[best.name]['overall'].get(c))}</b><span>{esc(c)}</span></div>"
        for c in columns
    ]
    if best.paper and main_score in best.paper[1]:
        kpis.append(f"<div class=kpi><b>{best.paper[1][main_score]:.1f}</b><span>{main_score}, paper</span></div>")
    text.append(f"<div class=kpis>{''.join(kpis)}</div>")

    if curves := sweep_curves(args, rows, scores):
        models = list(dict.fromkeys(row.model for row in rows if row.model))
        text.append(f"<h2>Sweep</h2><div class=card>{draw_curves(args, curves, models)}</div>")
    if len(rows) > 1 or best.paper:
        paper = [c for c in columns if any(c in (row.paper or ("", {}))[1] for row in rows)]
        heads = [f"<th>{esc(c)}</th>" for c in columns] + [f"<th>{esc(c)}<br>paper</th><th>diff</th>" for c in paper]
        text.append(f"<h2>Rows</h2><div class='card scroll'><table><tr><th></th>{''.join(heads)}</tr>")
        for row in rows:
            ours = scores[row.name]["overall"]
            cells = [percent(ours.get(c)) for c in columns]
            for c in paper:
                theirs = (row.paper or ("", {}))[1].get(c)
                cells += [percent(theirs, 1), percent(theirs and 100 * ours.get(c, math.nan) - theirs, 1, "+")]
            text.append(
                f"<tr{' class=best' * (row is best)}><td>{esc(row.name)}</td><td>{'</td><td>'.join(cells)}</td></tr>"
            )
        text.append("</table></div>")
        if best.paper:
            text.append(f"<div class=sub>{NOTES}</div>")

    text.append("<h2>Sequences</h2><div class=card>")
    pairs = ("J_M", "F_M") if "J_M" in columns else (main_score, columns[1])
    key = "".join(f"<i style='background:{c}'></i>{esc(p)}" for p, c in zip(pairs, colours, strict=True))
    text.append(f"<div class='sub key'>{esc(best.name)}, best first; the number is {main_score}{key}</div>")
    ranked = sorted(
        (item for item in scores[best.name]["per_sequence"].items() if item[1].get(main_score, math.nan) >= 0),
        key=lambda item: -item[1][main_score],
    )
    for name, score in ranked:
        bars = [
            f"<i style='width:{100 * (score.get(p, 0) or 0):.1f}%;background:{c}'></i>"
            for p, c in zip(pairs, colours, strict=True)
        ]
        text.append(f"<div class=bar><span>{esc(name)}</span><div class=track>{''.join(bars)}</div>"
                    f"<em>{percent(score[main_score])}</em></div>")  # fmt: skip
    text.append("</div>")

    by_name = {seq.name: seq for seq in sequences}
    half = 2 if len(ranked) >= 4 else 1
    shown = [("best", name) for name, _ in ranked[:half]]
    shown += [("worst", name) for name, _ in ranked[half:][-half:][::-1]]
    for kind, name in shown:
        sheet = contact_sheet(by_name[name], best.folder, results[best.name][name])
        score = percent(scores[best.name]["per_sequence"][name][main_score])
        text.append(f"<h2>{kind.capitalize()}: {esc(name)}, {main_score} {score}</h2><div class=card>{sheet}</div>")
    if "J_M" in columns and ranked:
        text.append(f"<h2>Over time, each object</h2><div class=card><div class=sub>solid J, dotted F, by frame; {esc(best.name)}"
                    f"</div>{draw_time(results[best.name])}</div>")  # fmt: skip
    elif scores[best.name]["per_object"]:
        label = "Part classes" if args.dataset == "vip" else "Joints"
        first = "IoU" if args.dataset == "vip" else "PCK@0.1"
        text.append(f"<h2>{label}</h2><div class=card>")
        for name, score in scores[best.name]["per_object"].items():
            text.append(f"<div class=bar><span>{name}</span><div class=track><i style='width:{100 * score[first]:.1f}%;"
                        f"background:{colours[0]}'></i></div><em>{percent(score[first])}</em></div>")  # fmt: skip
        text.append("</div>")

    models = [row for row in rows if row.settings]
    if models:
        text.append("<h2>Settings</h2><div class='card scroll'><table>")
        table = [
            {"model": r.model, "weights": r.weights.name if r.weights else "-", **asdict(r.settings)} for r in models
        ]
        same = {f: v for f, v in table[0].items() if all(entry[f] == v for entry in table)}
        if len(models) > 1:
            differ = [f for f in table[0] if f not in same]
            text.append(f"<tr><th>row</th>{''.join(f'<th>{f}</th>' for f in differ)}</tr>")
            for row, entry in zip(models, table, strict=True):
                cells = "".join(f"<td>{value(entry[f])}</td>" for f in differ)
                text.append(f"<tr><td>{esc(row.name)}</td>{cells}</tr>")
            text.append("</table><h3>the same in all rows</h3><table>")
        text += [f"<tr><td>{f}</td><td>{esc(value(v))}</td></tr>" for f, v in same.items()]
        text.append("</table></div>")
    for heading, lines in (
        ("Failed", [f"{esc(row.name)}: {esc(why)}" for row in rows for why in failed[row.name].values()]),
        ("Not run", [f"{esc(name)}: {esc(why)}" for name, why, _ in missing]),
    ):
        if lines:
            items = "".join(f"<li>{line}</li>" for line in lines)
            text.append(
                f"<h2{' class=fail' * (heading == 'Failed')}>{heading}</h2><div class=card><ul>{items}</ul></div>"
            )
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}: {esc(best.name)}</title><style>{STYLE}</style>"
    with atomic(out / "report.html") as path:
        path.write_text(f"{page}<main>{''.join(text)}</main></html>", encoding="utf-8")


def value(setting) -> str:
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting)


def quiet_worker() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent


def main(args: Args) -> None:
    typed = {arg.split("=")[0].lstrip("-").removeprefix("no-").replace("-", "_") for arg in sys.argv if arg[:2] == "--"}
    given = {f: v for f, v in asdict(args.propagation).items() if f in typed}
    if args.paper:
        args = replace(args, dataset={"table7": "vip", "table8": "jhmdb", "figure5": "vip"}.get(args.paper, "davis"))
    root, out = args.data or Path("data") / args.dataset, args.out or Path("results") / args.dataset
    sequences, absent = read_dataset(args, root)
    missing = []
    if args.predictions:
        for folder in args.predictions:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; --predictions takes <folder>/<sequence>/<frame>.png")
        short = len({folder.resolve().name for folder in args.predictions}) == len(args.predictions)
        rows = [Row(folder.resolve().name if short else str(folder), folder) for folder in args.predictions]
    elif args.paper:
        rows, missing = paper_rows(args, root, out, given)
    else:
        size = {"size": SIZES[args.dataset]} if args.dataset in SIZES and "size" not in given else {}
        base = replace(args.propagation, **size)
        rows = [make_row(args, root, out, s) for s in (sweep_settings(args, base) if args.sweep else [base])]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    results, failed = {row.name: {} for row in rows}, {row.name: dict(absent) for row in rows}
    for why in absent.values() if rank == 0 else ():
        print(f"error: {why}", file=sys.stderr)

    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with multiprocessing.get_context("fork").Pool(cores, quiet_worker) as pool:  # before torch starts its threads
        if world > 1:
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        evaluate(args, rows, sequences[rank::world], pool, results, failed)
    if world > 1:
        parts = [None] * world
        distributed.all_gather_object(parts, (results, failed))
        for other_results, other_failed in parts:
            for row in rows:
                results[row.name] |= other_results[row.name]
                failed[row.name] |= other_failed[row.name]
        distributed.destroy_process_group()
    code = 1 if any(failed.values()) else 0
    if rank:
        sys.exit(code)
    order = [seq.name for seq in sequences]
    results = {name: {seq: result[seq] for seq in order if seq in result} for name, result in results.items()}
    scores = {name: summarize(args.dataset, result) for name, result in results.items()}
    if args.subset == "test-dev":
        print("predictions, not scored (the annotations are not public):", *(row.folder for row in rows), sep="\n  ")
        sys.exit(code)
    print_table(args, rows, scores, missing, failed, len(sequences) + len(absent))
    if any(results.values()):
        write_scores(args, out, rows, scores, failed, missing)
        write_report(args, out, rows, sequences, results, scores, failed, missing)
        print(f"\n{out}/scores.json  {out}/scores.csv  {out}/report.html")
    sys.exit(code)


if __name__ == "__main__":
    run(main, partial(parse_args, Args))
