"""A data set -> the paper's scores, tables and figures.

    python evaluate.py --dataset davis --data DAVIS --model imagenet     # a row of the paper's Table 6
    python evaluate.py --dataset davis --data DAVIS --predictions A B    # score any methods' masks side by side
    python evaluate.py --dataset folder --data MOSE --predictions A      # any folder of masks
    python evaluate.py --data DAVIS --sweep topk=1,5,10 --sweep temperature=0.02,0.05,1
    python evaluate.py --data DAVIS --paper table4                       # paper's figure, ours, the difference
    torchrun --nproc-per-node 4 evaluate.py --data DAVIS                 # sequences shared out over processes

Predictions go to OUT/predictions/<row>, one folder of indexed PNG masks a sequence, where the row's name ends in a
digest of all its settings: what is there whole is not computed again, and never taken for that of other settings.
They are made again when the annotation or the frames that they depend on have changed. OUT also gets scores.json,
scores.csv and report.html. Exit code 0: all scored; 1: some sequences failed, the others are scored, or there was
nothing to score; 2: nothing could be done.
"""

import atexit
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
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import cache, cached_property, lru_cache
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

import common
import propagate
from common import PICTURES, Propagation, UserError, atomic, find_weights, load_encoder, preset, rank_world, writing
from propagate import Video, labels_from_mask, mask_from_labels, pool_workers, propagate_video, read_ids, write_mask

rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
rcParams.update({"legend.fontsize": 8, "legend.frameon": False, "figure.autolayout": True})
rcParams["svg.fonttype"] = "none"  # text stays text, in any script that the browser has a font for
warnings.filterwarnings("ignore", "Glyph")

FEATURE_FACTORS = ("size", "upsample", "layer", "stride", "l2", "sampling")  # a change means new features or labels


@dataclass(frozen=True)
class Args:
    dataset: Literal["davis", "davis2016", "folder", "vip", "jhmdb"] = "davis"
    """DAVIS 2017, DAVIS 2016 (one object), any folder of masks (YouTube-VOS, LVOS, MOSE, your own), VIP (semantic
    and instance parts) or JHMDB (body joints). vip and jhmdb have other defaults of the factors: see --dataset vip
    --help."""
    data: Path | None = None
    """Root of the data set in its official layout (default: data/<dataset>). folder: Annotations/<sequence>/*.png and
    JPEGImages/<sequence>/, with or without a folder for the resolution between; or <sequence>/*.png at once. Frames
    may have no mask, objects may come in later."""
    subset: Literal["val", "train", "test-dev"] = "val"
    """test-dev is propagated, not scored: its annotations are not public."""
    all_frames: bool = False
    """folder: score the first and the last annotated frame of a sequence, too (as for unsupervised DAVIS)."""
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
    typed: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()  # the flags that were given


# ---------------------------------------------------------------------------------------------------------------------
# Data sets. A new one: a class of what is different from DAVIS 2017, its name in DATASETS and in Args


@dataclass(frozen=True)
class Sequence:
    """One video of a data set, and all that is particular to that data set: here to DAVIS 2017."""

    name: str
    frames: Path  # folder of pictures
    names: tuple[str, ...]  # its frames, in order
    truth: dict[str, Path]  # the annotated ones' files (JHMDB: one .mat)
    instances: Path | None = None  # VIP: folder of the parts of persons, which may not be there

    title, year = "DAVIS 2017 {subset}", "2017"  # year: of its lists
    page = "https://davischallenge.org/davis2017/code.html"
    mark = "ImageSets/*/*.txt"  # what its root is known by
    flags = ()  # those that are for this data set alone
    file = ""  # joints: their file in a sequence's folder; else there are masks, named as the frames
    one = False  # all ids are one object
    sparse = False  # objects may come in later, and 255 is an id as any other
    between = True  # frames without an annotation are predicted, too
    beside = ""  # parts of persons: their folder beside that of the masks
    at_input = False  # masks are made at the network's input size and brought to full size by nearest neighbour
    columns = ("J&F_M", "J_M", "J_O", "J_D", "F_M", "F_O", "F_D")  # the figures; rows are ranked by the first
    of_parts = ()  # those of each object or part, where they are others
    over = "objects"  # what they are a mean over
    legend = "J overlap, F boundary accuracy; M mean, O share of frames above 50 %, D loss over time (less is better)"
    whole = 30  # sequences that the paper's figures are over: val; JHMDB: test of split 1

    @classmethod
    def layout(cls, root: Path, args: Args, page: str) -> tuple[Path, list[Path], Path | None]:
        """Where the annotations lie, where the frames may, and the list of the sequences (None: all that are there)."""
        return root / "Annotations/480p", [root / "JPEGImages/480p"], root / f"ImageSets/{cls.year}/{args.subset}.txt"

    @staticmethod
    def read_list(path: Path, args: Args, page: str) -> list[str]:
        """One name a line; DAVIS 2016's own lists have the paths of all frames instead."""
        lines = read_lines(path, page)
        names = [(where, Path(line.split()[0]).parent.name if line[0] == "/" else line) for where, line in lines]
        return list(dict.fromkeys(plain(name, where) for where, name in names))

    @cached_property
    def table(self) -> np.ndarray:
        """The id that each value 0..255 of the annotation stands for, 0 for background and void."""
        if self.one:
            return one_object(self.truth.values(), void=True)
        return np.append(np.arange(255), 255 * self.sparse).astype(np.uint8)

    def ids(self, name: str) -> np.ndarray:
        """The annotation of a frame, H x W ids."""
        return self.table[read_ids(self.truth[name])]

    @cached_property
    def shown(self) -> dict[str, set[int]]:
        """The ids in each annotated frame that objects are taken from: the first, or any (sparse)."""
        among = (self.sparse and self.truth) or self.names[:1]
        if (first := next(iter(among))) not in self.truth:
            if self.sparse:
                raise UserError(f"{self.name}: holds no masks, so there is nothing to propagate")
            folder = next(iter(self.truth.values())).parent if self.truth else Path(self.name)
            raise UserError(f"{folder / first}.png: not found; the first frame's annotation is what is propagated")
        values = {name: np.flatnonzero(histogram(read_ids(self.truth[name]))) for name in among}
        return {name: set(self.table[found].tolist()) - {0} for name, found in values.items()}

    @cached_property
    def given(self) -> dict[str, list[int]]:
        """What is propagated: the ids of the objects that a frame's annotation is the first to show. JHMDB: none."""
        given, seen = {}, set()
        for name, ids in self.shown.items():
            if ids - seen:
                given[name] = sorted(ids - seen)
            seen |= ids
        if not given:
            file = self.truth[next(iter(self.shown))]
            void = not self.one and read_ids(file).max(initial=0) == 255
            hint = "; for copies with masks of 0 and 255 take --dataset davis2016" if void else ""
            raise UserError(f"{file}: has no object, so there is nothing to propagate{hint}")
        return given

    @cached_property
    def made_from(self) -> str:
        """A digest of what a prediction depends on beside the settings: the annotation that is given, the frames."""
        try:
            given = self.given
        except UserError:  # said when it is predicted
            given = {}
        paths = [self.truth[name] for name in given or self.names[:1] if name in self.truth]
        if self.instances:
            paths += [self.instances / f"{name}{suffix}" for name in given for suffix in (".png", ".txt")]
        digest = hashlib.sha256(self.table.tobytes() if given else b"")
        for path in paths:
            digest.update(path.read_bytes() if path.is_file() else b"")
        for name, path in files(self.frames, PICTURES).items():
            digest.update(f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def prediction(self, folder: Path, name: str = "") -> Path:
        """Where the prediction, or that for one frame of it, lies."""
        own = folder / self.name / "masks"  # as propagate.py writes them
        base = own if own.is_dir() else folder / self.name
        return base / f"{name}.png" if name else base

    def complete(self, folder: Path) -> bool:
        return all(self.prediction(folder, name).is_file() for name in self.names)

    def score(self, folder: Path, pool, all_frames: bool) -> dict:
        """J, F: objects x frames; the first and the last annotated frame are left out. ids: the objects'.

        The official tool's rules; sparse: those of github.com/hkchengrex/vos-benchmark at acb4733. There the objects
        are those that the annotation of the scored frames shows; each counts from the first of these frames on in which
        truth or prediction shows it (nan before). given: the frames in which an object's mask was given.
        """
        annotated = list(self.truth)
        scored = annotated if all_frames else annotated[1:-1]
        if not scored:
            note(f"{self.name}: is annotated in {len(annotated)} frames; without the first and the last none is scored")
        paths = [self.prediction(folder, name) for name in scored]
        if self.sparse:
            ids = sorted(set().union(*(self.shown[name] for name in scored)))
            if 255 in ids[1:] or len(ids) > 50:
                what = f"has {len(ids)} ids up to {ids[-1]}, each scored as an object, also void and smoothed edges"
                note(f"{next(iter(self.truth.values())).parent}: {what}")
        else:
            first = next(iter(self.given.values()))
            ids = list(range(1, max(first) + 1))
            if len(first) < len(ids):
                what = f"of the ids 1 to {len(ids)} only {len(first)} are objects of the first frame"
                rule = "the others count as right, as in the official tool, where there are none; see --dataset folder"
                note(f"{self.truth[self.names[0]]}: {what}; {rule}")
        number = np.zeros(256, np.uint8)
        number[ids] = range(1, len(ids) + 1)
        of_pred = one_object(paths, void=False) if self.one else number if self.sparse else None
        same = number[self.table], of_pred, len(ids), self.name
        jobs = [(self.truth[name], path, *same) for name, path in zip(scored, paths, strict=True)]
        scores = np.array(pool.starmap(score_masks_frame, jobs, chunksize=4)).reshape(len(jobs), 3, len(ids))
        result = {"J": scores[:, 0].T, "F": scores[:, 1].T, "ids": ids, "frames": scored}
        if self.sparse:
            counts = np.maximum.accumulate(scores[:, 2].T > 0, axis=1)
            result |= {what: np.where(counts, result[what], np.nan) for what in "JF"}
            given = [[number in self.given.get(name, ()) for name in scored] for number in ids]
            result["given"] = np.array(given, bool).reshape(counts.shape)
        return result | {"table": of_pred if self.one else None}

    @classmethod
    def summarize(cls, results: dict[str, dict]) -> tuple[dict, dict]:
        """The figures of each object, and their mean over objects, not over sequences."""
        objects = {}
        for name, result in results.items():
            for i, (j, f) in enumerate(zip(result["J"], result["F"], strict=True)):
                if cls.sparse:
                    row, ungiven = {"J_M": mean(j), "F_M": mean(f)}, ~result["given"][i]
                    row["J&F_ungiven"] = (mean(j[ungiven]) + mean(f[ungiven])) / 2
                else:
                    row = dict(zip(cls.columns[1:], statistics(j) + statistics(f), strict=True))
                objects[f"{name}_{result['ids'][i]}"] = {"J&F_M": (row["J_M"] + row["F_M"]) / 2, **row}
        return mean_scores(objects.values()), objects


class DAVIS2016(Sequence):
    title, page = "DAVIS 2016 {subset}", "https://davischallenge.org/davis2016/code.html"
    year, one = "2016", True


class Folder(Sequence):
    """Any folder of masks, with or without a folder for the resolution between."""

    title, page, mark, flags, sparse = "Folder of masks", "evaluate.py --help", "Annotations/*", ("all_frames",), True
    columns = ("J&F_M", "J_M", "F_M", "J&F_ungiven")
    legend = "J overlap, F boundary accuracy, as vos-benchmark; ungiven: without the frames where a mask is given"

    @classmethod
    def layout(cls, root, args, page):
        if args.subset != Args.subset:
            raise UserError(f"--subset {args.subset}: a folder has no subsets; name --sequences, or leave it out")
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; {page}")
        truth = root / "Annotations" if (root / "Annotations").is_dir() else root
        inside = [path for path in listed(truth) if path.is_dir()]
        if not any(files(path, (".png",)) for path in inside):
            inside = [path for path in inside if any(below.is_dir() for below in listed(path))]
            if len(inside) > 1:
                names = ", ".join(path.name for path in inside)
                raise UserError(f"{truth}: holds sequences in each of {names}; take one, such as --data {inside[0]}")
            truth = inside[0] if inside else truth
        above = next((path for path in (truth, *truth.parents) if path.name == "Annotations"), truth)
        pictures = above.parent / "JPEGImages"
        return truth, [pictures / truth.relative_to(above), pictures, *listed(pictures)], None


class VIP(Sequence):
    """Part classes and, where there are `instances`, the parts of each person. Every 25th frame is annotated."""

    title, page = "VIP {subset}", "https://sysu-hcp.net/lip/overview.php"
    mark, beside, between, at_input, whole = "lists/*_videos.txt", "Instance_ids", False, True, 50
    columns, of_parts, over = ("mIoU", "AP^r_vol"), ("IoU",), "part classes"
    legend = "mIoU overlap, mean over part classes; AP^r_vol average precision of the parts of each person"
    parts = ("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks", "pants", "gloves",
             "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm", "right-leg", "left-leg", "right-shoe",
             "left-shoe")  # fmt: skip

    @classmethod
    def layout(cls, root, args, page):
        base = root / "VIP_Fine" if (root / "VIP_Fine").is_dir() else root
        masks = base / "Annotations" if (base / "Annotations").is_dir() else base
        lists = root / "lists" if (root / "lists").is_dir() else base / "lists"
        return masks / "Category_ids", [base / "Images"], lists / f"{args.subset}_videos.txt"

    @cached_property
    def given(self):
        ((name, ids),) = self.shown.items()
        if not ids:
            note(f"{self.truth[name]}: shows nobody, so all of {self.name} is predicted as background")
        return {name: sorted(ids)}

    def prediction(self, folder, name=""):
        return super().prediction(folder if (folder / self.name).is_dir() else folder / "Category_ids", name)

    def score(self, folder, pool, all_frames):
        """Confusion matrix (truth x prediction) over all frames; and for AP^r_vol the parts' classes, scores, IoUs.

        As in the public script (github.com/sunshineatnoon/UVC at 4dbeb9d, eval_instance2.py), a class in a frame is
        left out of what is predicted if a part of it is listed that has no pixels.
        """
        confusion, found, present = np.zeros((20, 20), np.int64), [], np.zeros(20, np.int64)
        guess = folder / "Instance_ids" / self.name
        for name in self.names:
            truth, path = read_ids(self.truth[name]), self.prediction(folder, name)
            pred = nearest(read_ids(path), truth.shape)
            if (top := int(pred.max())) > 19:
                raise UserError(f"{path}: has id {top}, but the part classes are 0..19")
            valid = truth < 20
            confusion += np.bincount(20 * truth[valid].astype(int) + pred[valid], minlength=400).reshape(20, 20)
            if not (guess.is_dir() and self.instances.is_dir()):
                continue
            truth, true_parts = read_parts(self.instances / f"{name}.png", given=True)
            pred, parts = read_parts(guess / f"{name}.png", given=False)
            classes, pred = {number: kind for number, kind, _ in true_parts}, nearest(pred, truth.shape)
            table = np.bincount(256 * truth.astype(int).ravel() + pred.ravel(), minlength=65536).reshape(256, 256)
            areas_t, areas_p = table.sum(1), table.sum(0)
            for number, kind in classes.items():
                present[kind] += areas_t[number] > 0
            vanished = {kind for number, kind, _ in parts if not areas_p[number]}
            for number, kind, score in parts:
                if kind not in vanished:
                    same = np.array([n for n, k in classes.items() if k == kind and areas_t[n]], int)
                    iou = table[same, number] / (areas_t[same] + areas_p[number] - table[same, number])
                    found.append((kind, score, iou.max(initial=0.0)))
        return {"confusion": confusion, "parts": np.array(found).reshape(-1, 3), "present": present}

    @classmethod
    def summarize(cls, results):
        """IoU of each class that occurs in truth or prediction; their mean, and AP^r_vol where there are instances."""
        confusion = sum(r["confusion"] for r in results.values())
        present = sum(r["present"] for r in results.values())
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = confusion.diagonal() / np.where(union, union, np.nan)
        overall = {"mIoU": float(np.nanmean(iou))}
        if present.any():
            overall["AP^r_vol"] = average_precision(np.concatenate([r["parts"] for r in results.values()]), present)
        return overall, {part: {"IoU": float(x)} for part, x in zip(cls.parts, iou, strict=True) if x == x}


class JHMDB(Sequence):
    """Key points instead of masks: all of the first frame are given."""

    title, page = "JHMDB split {split} {subset}", "http://jhmdb.is.tue.mpg.de/dataset"
    mark, file, flags, whole = "splits/*_test_split*.txt", "joint_positions.mat", ("split",), 268
    columns, over = tuple(f"PCK@{a / 10}" for a in range(1, 6)), "joints"
    legend = "PCK@a share of joints within a x the person's size (0.6 of its box's diagonal) of the truth"
    joints = ("neck", "belly", "face", "right-shoulder", "left-shoulder", "right-hip", "left-hip", "right-elbow",
              "left-elbow", "right-knee", "left-knee", "right-wrist", "left-wrist", "right-ankle",
              "left-ankle")  # fmt: skip

    @classmethod
    def layout(cls, root, args, page):
        if args.subset == "test-dev":  # its annotations are all public
            raise UserError("--subset test-dev: JHMDB has none; give val (its test clips) or train")
        return root / "joint_positions", [root / "Rename_Images", root / "Frames"], root / "splits"

    @staticmethod
    def read_list(path, args, page):
        """Clips, class/clip, of the subset."""
        ending, group, names = f"_test_split{args.split}.txt", {"train": "1", "val": "2"}[args.subset], []
        listings = listed(path, f"*{ending}")
        if not listings:
            raise UserError(f"{path}/<class>{ending}: not found; JHMDB is incomplete, {page}")
        for listing in listings:
            for where, line in read_lines(listing, page):
                clip, *of = line.rsplit(maxsplit=1)
                name = plain(f"{listing.name.removesuffix(ending)}/{clip}", where)
                if of not in (["0"], ["1"], ["2"]):
                    raise UserError(f"{where}: wants the name of a clip and 1 (train) or 2 (test); correct the list")
                if of == [group]:
                    names.append(str(Path(name).with_suffix("")))
        return names

    @property
    def given(self):
        return {}

    def prediction(self, folder, name=""):
        return folder / self.name / self.file

    def score(self, folder, pool, all_frames):
        """Distance of each joint in each frame but the first (15 x T-1), in units of 0.6 of the person's diagonal.

        The person's box holds the true joints that the prediction shows; joints it does not show are nan: not counted.
        """
        path = self.prediction(folder)
        truth, pred = read_joints(self.truth[self.names[0]]), read_joints(path)
        if len(pred) != len(truth):
            raise UserError(f"{path}: has {len(pred)} frames, the annotation {len(truth)}; it must have the same")
        if len(truth) < 2:
            note(f"{self.name}: has joints in {len(truth)} frame; the first is given, so none is scored")
        shown = (pred[..., 0] >= 0)[..., None]
        low, high = np.where(shown, truth, np.inf).min(1), np.where(shown, truth, -np.inf).max(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            distance = np.linalg.norm(pred - truth, axis=2) / (0.6 * np.linalg.norm(high - low, axis=1))[:, None]
            distance = np.where(shown[..., 0], np.where((pred == truth).all(2), 0, distance), np.nan)
        return {"distance": distance[1:].T, "frames": self.names[: len(truth)]}

    @classmethod
    def summarize(cls, results):
        """PCK of each joint over all its frames, and the mean over joints."""
        distance = np.concatenate([r["distance"] for r in results.values()], 1)  # 15 x frames
        counted = (~np.isnan(distance)).sum(1)
        share = [(distance <= a / 10).sum(1) / np.where(counted, counted, np.nan) for a in range(1, 6)]
        rows = [dict(zip(cls.columns, map(float, row), strict=True)) for row in np.array(share).T]
        return mean_scores(rows), dict(zip(cls.joints, rows, strict=True))


DATASETS = {"davis": Sequence, "davis2016": DAVIS2016, "folder": Folder, "vip": VIP, "jhmdb": JHMDB}


def read_dataset(args: Args, root: Path) -> tuple[list[Sequence], dict[str, str]]:
    """The sequences asked for, and why others of the subset are missing. UserError if one that is named is not there,
    or if there are none."""
    wanted = [name.strip() for name in args.sequences.split(",") if name.strip()]
    if args.sequences and not wanted:
        raise UserError(f"--sequences {args.sequences!r}: names no sequence; give names, separated by commas")
    dataset = DATASETS[args.dataset]
    holds = next((folder for folder in (root, *root.absolute().parents) if any(folder.glob(dataset.mark))), root)
    of = f"{args.paper} is of {args.dataset.upper()}, " if args.paper else ""
    page = f"{of}see {dataset.page}, and say where it is with --data"
    page = page if holds == root else f"take --data {holds}"
    truth, pictures, listing = dataset.layout(root, args, page)
    folders = listed(truth, "*/*" if dataset.file else "*")
    known = [path.relative_to(truth).as_posix() for path in folders if path.is_dir()]
    if listing and not (wanted and known):  # what is named need not be in a list
        known = dataset.read_list(listing, args, page)
    chosen = {want: [name for name in known if want in (name, Path(name).name)] for want in wanted}
    for want, names in chosen.items():
        if not names:
            near = ", ".join(get_close_matches(want, known) or known[:3])
            raise UserError(f"--sequences {want}: is not in {truth}; names there are like {near}")

    sequences, missing = [], {}
    for name in dict.fromkeys(itertools.chain(*chosen.values())) if wanted else known:
        annotation = truth / name / dataset.file
        frames = next((folder / name for folder in pictures if (folder / name).is_dir()), pictures[0] / name)
        masks = {} if dataset.file else files(annotation, (".png",))
        names = {*masks, *(files(frames, PICTURES) if dataset.between else ())}
        if not (annotation.is_file() if dataset.file else annotation.is_dir()):
            missing[name] = f"{annotation}: not found; the data set is incomplete, {page}"
        elif not (dataset.file or names):
            missing[name] = f"{annotation}: holds no masks; the data set is incomplete, {page}"
        else:
            names = tuple(sorted(names, key=natural)) or ("00001",)  # joints are scored without frames
            of_frames = dict.fromkeys(names, annotation) if dataset.file else masks
            instances = truth.with_name(dataset.beside) / name if dataset.beside else None
            sequences.append(dataset(name, frames, names, of_frames, instances))
    if not sequences:
        raise UserError(next(iter(missing.values()), f"{root}: the {args.subset} list is empty, {page}"))
    return sequences, missing


def natural(name: str) -> list:
    """A key to sort names by their numbers: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What is in a folder, in order. What begins with a dot is no data, such as ._00000.jpg of macOS."""
    return sorted((path for path in folder.glob(pattern) if path.name[0] != "."), key=lambda path: natural(path.name))


def files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files in a folder with one of the suffixes, by their names before it."""
    return {path.stem: path for path in listed(folder) if path.suffix.lower() in suffixes and path.is_file()}


def plain(name: str, where: str) -> str:
    """A sequence's name as a list gives it. It becomes that of a folder that is written and replaced, so it may not
    lead out of the folder it is put into."""
    if "\\" in name or not name.isprintable() or any(not p or p[0] == "." or len(p) > 200 for p in name.split("/")):
        raise UserError(f"{where}: {name[:80]!r} is no sequence's name, a plain name of a folder; correct the list")
    return name


def read_lines(path: Path, page: str) -> list[tuple[str, str]]:
    """The lines of a list that are not empty: (where it stands, what it says)."""
    if not path.is_file():
        raise UserError(f"{path}: not found, it lists the sequences; {page}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); {page}") from error
    return [(f"{path}, line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]


def check_names(folder: Path, names: Iterable[str], like: str) -> None:
    """A folder whose file names differ in more than numbers holds more than one sequence."""
    pattern = re.sub(r"\d+", "0", like)
    for name in names:
        if re.sub(r"\d+", "0", name) != pattern:
            raise UserError(f"{folder / name}: is not named like {like}; the folder mixes sequences, keep one in each")


def one_object(paths: Iterable[Path], void: bool) -> np.ndarray:
    """DAVIS 2016: which of the values 0..255 in a sequence's masks are the one object, 256 of 0 or 1.

    Any id is. 255 is the object in copies that store {0, 255}; beside ids it is void in an annotation (void), in a
    prediction the object. The levels up to 255 at the edge of a mask that was resized are no ids, as none of them
    covers an area: there half is the border.
    """
    paths, values = list(paths), np.arange(256)
    counts, areas = np.zeros((2, 256))
    for path in paths:
        ids, around = read_ids(path), np.ones((3, 3))
        counts += histogram(ids)
        areas += np.bincount(ids[cv2.erode(ids, around) == cv2.dilate(ids, around)], minlength=256)
    between = counts[1:255] > 0
    if between[63:].any() and (areas[1:255].sum() < areas[255] or between.sum() > 32):
        note(f"{paths[0].parent}: has grey levels, as a smoothed edge has; the object is what is 128 or more")
        return (values > 127).astype(np.uint8)
    return ((values > 0) & ~((values == 255) & (void and between.any()))).astype(np.uint8)


note = cache(propagate.say)  # once


def read_joints(path: Path) -> np.ndarray:
    """T x 15 x 2 (x, y), 0-based, of a joint_positions.mat."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        joints = loadmat(path)["pos_img"].transpose(2, 1, 0).astype(float) - 1
        if joints.shape[1:] != (15, 2):
            raise ValueError
        return joints
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a .mat with pos_img, 2 x 15 x frames; download it again") from error


def read_parts(path: Path, given: bool) -> tuple[np.ndarray, list[tuple[int, int, float]]]:
    """VIP's parts of persons: H x W ids, and (id, part class, score) of each, from the .txt beside the picture.

    Its lines are: id, class, ... in an annotation (given), else class, score of the ids 1, 2, ...
    """
    path, wants = path.with_suffix(".txt"), "part class (1..19), score; one for each of the ids 1..255"
    try:
        if not path.is_file():
            raise FileNotFoundError
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        if given:
            wants = "instance id (1..255), part class (1..19)"
            parts = [(int(line[0]), int(line[1]), 1.0) for line in lines]
        else:
            parts = [(number, int(line[0]), float(line[1])) for number, line in enumerate(lines, 1)]
        if not all(0 <= number < 256 and 0 <= kind < 20 for number, kind, _ in parts):
            raise ValueError
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not found, or not lines of: {wants}") from error
    return read_ids(path.with_suffix(".png")), parts


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


def histogram(ids: np.ndarray) -> np.ndarray:
    return cv2.calcHist([ids], [0], None, [256], [0, 256]).ravel()  # three times as fast as numpy's bincount


def score_masks_frame(truth_file: Path, pred_file: Path, of_truth, of_pred, objects: int, seq: str) -> np.ndarray:
    """J, F, and whether truth or prediction shows it, of each object: 3 x objects. of_truth, of_pred: the id that each
    of the values 0..255 stands for."""
    truth, pred = read_ids(truth_file), read_ids(pred_file)
    if truth.shape != pred.shape:
        sizes = "is {1}x{0}, but the ground truth is {3}x{2}".format(*pred.shape, *truth.shape)
        raise UserError(f"{pred_file}: {sizes}; predictions are scored at the size of the annotation")
    if of_pred is None and (top := int(pred.max())) > objects:
        raise UserError(f"{pred_file}: has id {top}, but {seq} has objects 1..{objects} in its first frame")
    truth, pred = cv2.LUT(truth, of_truth), pred if of_pred is None else cv2.LUT(pred, of_pred)
    counts = histogram(truth) + histogram(pred)
    return np.concatenate([score_frame(truth, pred, objects), counts[None, 1 : objects + 1] > 0])


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


def summarize(dataset: str, results: dict[str, dict]) -> dict:
    """Per-sequence results -> {"overall", "per_object", "per_sequence"}: fractions, under the paper's names.

    per_object is per part class for VIP and per joint for JHMDB.
    """
    one = DATASETS[dataset].summarize
    overall, per_object = one(results) if results else ({}, {})
    per_sequence = {name: one({name: result})[0] for name, result in results.items()}
    return {"overall": overall, "per_object": per_object, "per_sequence": per_sequence}


def mean_scores(rows: Iterable[dict]) -> dict:
    """Mean of each figure over the rows that have it (a sequence of two frames has nothing to score)."""
    rows = list(rows)
    return {key: mean([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def mean(values) -> float:
    """The mean of what is a number; nan if nothing is."""
    values = np.asarray(values, float)
    return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else math.nan


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


def make_rows(args: Args, root: Path, out: Path, given: dict, sequences: list[Sequence]) -> list[Row]:
    """The rows that are asked for: folders of predictions, a table of the paper, or a model at some settings."""
    if args.paper:
        if given.get("refine"):
            raise UserError("--refine: has no say in --paper, whose figures are of masks as they are; leave it out")
        rows = paper_rows(args, root, out, given)
    elif args.predictions:
        folders = list(dict.fromkeys(args.predictions))
        for folder in folders:
            if not any(seq.prediction(folder).exists() for seq in sequences):
                what = "holds none of the sequences" if folder.is_dir() else "no such folder"
                wants = next(folder.glob("predictions/*"), sequences[0].prediction(Path("<folder>"), "<frame>"))
                raise UserError(f"{folder}: {what}; --predictions takes {wants}")
        idle = [name for name in ("weights", "model", "dtype", "device") if getattr(args, name) != getattr(Args, name)]
        if idle := [*idle, *given]:
            flag = idle[0].replace("_", "-")
            raise UserError(f"--{flag}: has no say in --predictions, which are only scored; leave it out")
        short = len({folder.resolve().name for folder in folders}) == len(folders)
        rows = [Row(folder.resolve().name if short else str(folder), folder) for folder in folders]
    else:
        rows = [make_row(args, root, out, settings) for settings in sweep_settings(args, args.propagation)]
        rows = rows if args.sweep else [paper_best(args, row) for row in rows]
    used = [row.settings for row in rows if row.settings]
    if used:
        propagate.check_dtype(args.dtype, args.device)
    dataset, points = DATASETS[args.dataset], f"{args.dataset.upper()} has key points"
    if dataset.file and any(s.localization == "track" for s in used):
        raise UserError(f"--localization track: follows masks, {points}; take --localization none or fixed")
    if dataset.file and any(s.refine for s in used):
        raise UserError(f"--refine: is for the edges of masks, {points}; leave it out")
    if dataset.beside and any(s.refine for s in used) and rank_world()[0] == 0:
        note("--refine: changes VIP's classes alone, so mIoU; the parts of persons, so AP^r_vol, are as without it")
    return rows


def make_row(args: Args, root: Path, out: Path, settings: Propagation, name: str = "", model: str = "", **more) -> Row:
    """The row of a model at some settings; its folder's name ends in a digest of all that the predictions depend on."""
    chosen = model or args.model
    weights, model = weights_of(args, chosen), chosen.partition("@")[0]
    propagate.check_range(args.dtype, settings.l2)
    fits(model, weights, settings.layer, settings.stride, weights != args.weights or rank_world()[0] > 0)
    weights = weights_of(args, chosen)  # fetched by now
    own = asdict(preset(model, args.dataset))
    changed = tuple(f"{key}={value}" for key, value in asdict(settings).items() if own[key] != value)
    record = {"model": model, "weights": weights and file_digest(weights), "dtype": args.dtype}
    record |= {"dataset": [args.dataset, str(root.resolve())], "settings": asdict(settings)}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    folder = out / "predictions" / f"{model}-{digest}"
    return Row(name or " ".join([model, *changed]), folder, model, weights, settings, **{"changed": changed, **more})


def weights_of(args: Args, model: str) -> Path | None:
    """--weights where they are of this model, else those that find_weights finds; of MODEL@FILE, weights/FILE alone."""
    model, _, file = model.partition("@")
    if file:
        places = Path("weights", file), Path(__file__).with_name("weights") / file
        return next((path for path in places if path.is_file()), None)
    return args.weights if args.weights and model == args.model else find_weights(model)


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
        known = [f.name for f in fields(Propagation)]
        if name not in known or not values:
            raise UserError(f"--sweep {sweep}: give factor=value,value,... with a factor of {', '.join(known)}")
        try:
            factors.setdefault(name, []).extend(parse_value(name, value) for value in values.split(","))
        except ValueError as error:
            raise UserError(f"--sweep {sweep}: {error}") from error
    if args.grid or not factors:
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


def forget_stale(row: Row, sequences: list[Sequence]) -> None:
    """Delete predictions that were made from another annotation or other frames than are there now; settings.json, in
    the row's folder, says what each sequence's prediction is made from."""
    path = row.folder / "settings.json"
    try:
        before = json.loads(path.read_text())["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    now = {seq.name: seq.made_from for seq in sequences}
    for seq in sequences:
        if before.get(seq.name) != now[seq.name]:
            if seq.name in before and seq.prediction(row.folder).exists():
                note(f"{row.folder / seq.name}: is made again, its annotation or its frames have changed")
            discard(row.folder, seq)
    record = {"model": row.model, "weights": str(row.weights), **asdict(row.settings), "made_from": {**before, **now}}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def discard(base: Path, seq: Sequence) -> None:
    """Delete a prediction, and the folders that it leaves empty. UserError if anything is there that no run made."""
    for folder in (base / "Instance_ids" / seq.name, base / seq.name):
        inside = list(folder.glob("*"))
        other = [path for path in inside if path.suffix not in (".png", ".txt", ".mat") or not path.is_file()]
        if folder.is_symlink() or other:
            what = other[0] if other else folder
            raise UserError(f"{what}: no run has made it; move it away or choose another --out")
        for path in inside:
            path.unlink()
        if folder.is_dir():
            os.removedirs(folder)


@torch.inference_mode()
def predict(seq: Sequence, encoder, rows: list[Row], bar: tqdm) -> None:
    """Predict one sequence at the settings of each row; features are computed once, the rows go in lockstep.

    A sequence's folder gets its name when all of it is written: what exists is whole, even after kill -9.
    """
    device, sampling = encoder.mean.device, rows[0].settings.sampling
    if not seq.frames.is_dir():
        raise UserError(f"{seq.frames}: not found; to predict needs the frames (to score masks: --predictions)")
    video = Video(seq.frames)
    at = {name: i for i, name in enumerate(video.names)}
    for name in seq.names:
        if name not in at:
            raise UserError(f"{seq.frames / name}.jpg: not found, yet it is annotated; download the sequence again")
    given, parts = seq.given, {}  # parts: id -> class
    masks = {name: seq.ids(name) for name in given}  # the first whole, of others the ids that are new
    ids = sorted(itertools.chain(*given.values()))
    names = seq.names[seq.names.index(next(iter(masks), seq.names[0])) :]
    size = masks[names[0]].shape if masks else video.size
    for name, mask in masks.items():
        if mask.shape != (size if seq.at_input else video.size):
            sizes = "is {1}x{0}, but its frame is {3}x{2}".format(*mask.shape, *video.size)
            raise UserError(f"{seq.truth[name]}: {sizes}; they must show the same pixels")
    if seq.file:
        joints = read_joints(seq.truth[names[0]])
        if len(joints) != len(names):
            counts = f"holds {len(names)} frames, yet {seq.truth[names[0]]} has the joints of {len(joints)}"
            raise UserError(f"{seq.frames}: {counts}; download the clip again")

    frames, shown = propagate.read_ahead(frame for _, frame in video.frames([at[name] for name in names])), deque()

    def encode(frame: np.ndarray) -> torch.Tensor:
        return encoder(torch.from_numpy(frame)[None].to(device))[0]

    def encoded() -> Iterator[torch.Tensor]:  # C h w each; a frame waits in `shown` for its masks
        for frame, features in propagate.encode_ahead(encode, frames, device.type == "cpu"):
            shown.append(torch.from_numpy(frame))
            yield features

    features = encoded()
    first = next(features)
    grid = tuple(first.shape[1:])
    if seq.file:
        labels = {names[0]: propagate.labels_from_points(joints[0], size, grid).to(device)}
    elif ids:
        on_device = {name: torch.from_numpy(mask).to(device) for name, mask in masks.items()}
        labels = {name: labels_from_mask(mask, ids, grid, sampling) for name, mask in on_device.items()}
    else:
        labels = {names[0]: torch.ones(1, *grid, device=device)}
    if seq.instances and seq.instances.is_dir():  # semantic and instance labels travel together
        given_parts, listed_parts = read_parts(seq.instances / f"{names[0]}.png", given=True)
        parts = {number: kind for number, kind, _ in sorted(listed_parts) if (given_parts == number).any() and number}
    if parts:
        given_parts = torch.from_numpy(given_parts).to(device)
        labels[names[0]] = torch.cat([labels[names[0]], labels_from_mask(given_parts, parts, grid, sampling)])
    numbers = [propagate.label_numbers(masks[names[0]], ids)] if ids and not parts else []  # boxes are drawn round them
    annotated = labels.pop(names[0])
    later = {  # objects that come in later
        names.index(name): (soft, torch.tensor([False, *(number in given[name] for number in ids)], device=device))
        for name, soft in labels.items()
    }

    folders, tracks = [row.folder / ".partial" for row in rows], [[] for _ in rows]
    for folder in folders:
        with writing(folder):
            discard(folder, seq)
            (folder / seq.name).mkdir(parents=True)
        for name in seq.names[: -len(names)]:  # before there is any object
            write_mask(folder / seq.name / f"{name}.png", np.zeros(size, np.uint8))
    streams = [
        propagate_video(targets, [(first, annotated, *numbers)], row.settings, given=later)
        for row, targets in zip(rows, itertools.tee(features, len(rows)), strict=True)
    ]
    with ThreadPoolExecutor(2) as writers:
        pending, soft_maps = deque(), itertools.chain([[annotated] * len(rows)], zip(*streams, strict=True))
        for name, maps in zip(names, soft_maps, strict=True):
            frame = shown.popleft()
            for row, folder, track, soft in zip(rows, folders, tracks, maps, strict=True):
                if seq.file:
                    track.append(propagate.points_from_labels(soft, size) if name != names[0] else joints[0])
                    continue
                s, mask, new = row.settings, masks.get(name), given.get(name, [])
                full = s.input_size(*size) if seq.at_input else size
                soft, soft_parts = soft[: 1 + len(ids)], soft[1 + len(ids) :]
                if name != names[0]:
                    old = [number for number in ids if number not in new]
                    soft = soft[[True, *(number in old for number in ids)]]
                    others = mask_from_labels(soft, old, full, s.minmax, frame, s.refine).cpu().numpy()
                    others = nearest(others, size)
                    mask = np.where(np.isin(mask, new), mask, others) if new else others
                pending.append(writers.submit(write_mask, folder / seq.name / f"{name}.png", mask))
                if parts:
                    if name == names[0]:
                        soft_parts, full = labels_from_mask(given_parts, parts, given_parts.shape), given_parts.shape
                    path = folder / "Instance_ids" / seq.name / f"{name}.png"
                    pending.append(writers.submit(write_parts, path, soft_parts, list(parts.values()), full, size))
            while len(pending) > 16 * len(rows):
                pending.popleft().result()
            bar.update(len(rows))
        for job in pending:
            job.result()
    for row, folder, track in zip(rows, folders, tracks, strict=True):
        with writing(row.folder):
            if track:
                savemat(folder / seq.name / "joint_positions.mat", {"pos_img": np.stack(track).transpose(2, 1, 0) + 1})
            discard(row.folder, seq)  # an earlier one with frames missing
            for place in ["Instance_ids"] * bool(parts) + [""]:  # the masks last: where they are, all is whole
                target = row.folder / place / seq.name
                target.parent.mkdir(parents=True, exist_ok=True)
                (folder / place / seq.name).rename(target)


def write_parts(path: Path, labels: torch.Tensor, kinds: list[int], full: tuple, size: tuple) -> None:
    """VIP instances as the public script reads them: ids 1..n, and a line `part class, score` for each id."""
    soft = F.interpolate(labels[None].float(), size=full, mode="bilinear")[0]  # 1 + n, H, W
    probability, winner = (each.cpu().numpy() for each in soft.max(0))
    winner = winner.astype(np.uint8)
    sums, areas = (np.bincount(winner.ravel(), w, 1 + len(kinds)) for w in (probability.ravel(), None))
    scores = sums / np.maximum(areas, 1)  # the mean probability over the mask
    write_mask(path, nearest(winner, size))
    path.with_suffix(".txt").write_text("".join(f"{kind} {scores[i]:.6f}\n" for i, kind in enumerate(kinds, 1)))


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
    due, figure = 0.0, DATASETS[args.dataset].columns[0]  # when the figure so far is worked out again
    with tqdm(total=total, unit="frame", smoothing=0.05, dynamic_ncols=True, disable=quiet) as bar:

        def failure(rows: list[Row], seq: Sequence, error: UserError) -> None:
            for row in rows:
                failed[row.name][seq.name] = str(error)
            bar.write(f"error: {error}", file=sys.stderr)

        for group in groups.values():
            encoder = None  # loaded where there is something to do
            for seq in sequences:
                bar.set_description(seq.name)
                todo, done = [row for row in group if row.settings and not seq.complete(row.folder)], bar.n
                if todo and encoder is None:
                    with contextlib.redirect_stderr(io.StringIO()):  # fits has said what the file is taken for
                        encoder = load_encoder(group[0].model, group[0].weights, group[0].settings, device, args.dtype)
                try:
                    check_names(seq.frames, seq.names if todo else seq.truth, seq.names[0])  # scored without frames
                    if todo:
                        predict(seq, encoder, todo, bar)
                except UserError as error:
                    failure(todo or group, seq, error)
                for row in group:
                    if args.subset == "test-dev" or seq.name in failed[row.name]:
                        continue
                    try:
                        check_prediction(seq, row.folder)
                        results[row.name][seq.name] = seq.score(row.folder, pool, args.all_frames)
                    except UserError as error:
                        failure([row], seq, error)
                        continue
                    if not quiet and (start := time.monotonic()) >= due:
                        so_far = summarize(args.dataset, results[row.name])["overall"].get(figure)
                        bar.set_postfix({figure.removesuffix("_M"): percent(so_far)})
                        due = time.monotonic() + 20 * (time.monotonic() - start)  # a sum over all: not each time
                bar.update(done + len(group) * len(seq.names) - bar.n)


def check_prediction(seq: Sequence, folder: Path) -> None:
    """Is there a prediction for this sequence, and of it alone?"""
    path = seq.prediction(folder)
    if not path.exists():
        where = seq.prediction(Path("<folder>"), "<frame>")
        raise UserError(f"{path}: not found; predictions are {where}, masks may also be in masks/ there")
    extra = sorted(files(path, (".png",)).keys() - set(seq.names))
    check_names(path, extra, seq.names[0])
    if extra:
        what = f"{len(extra)} masks for frames that {seq.name} does not have are left out, such as {extra[0]}"
        note(f"{path}: {what}")


# ---------------------------------------------------------------------------------------------------------------------
# The paper's figures, side by side with ours

# A line of paper.csv is a row: what it prints (per cent); models, of which that of --weights is run, or the first whose
# weights are at hand (MODEL@FILE: with weights/FILE); settings, what differs from the preset (sections 4.2 and 4.3).
PAPER = Path(__file__).with_name("paper.csv")
FIGURE_AXES = {  # the factor swept: its values, the others fixed as in the captions
    "figure4": {
        "temperature": [1 / t for t in (1, 5, 10, 20, 30, 40, 50)],
        "context": [1, 3, 5, 7, 10, 15, 20],
        "topk": [1, 3, 5, 10, 20, 50],
    },
    "figure5": {"context": [1, 2, 4, 7, 10, 20], "topk": [1, 3, 5, 10, 20, 50]},
}
NOTE = (
    "The paper's still-image rows of Tables 4, 6, 7 and 8 are fine-tuned after the stride change. Its UVC of Table 4 "
    "is trained anew (59.4 without localization, the released one 57.8), here weights/uvc-ours.pth."
)


def read_paper(dataset: str) -> list[dict]:
    """The lines of paper.csv for a data set; figures: what they print, models and settings as lists."""
    with PAPER.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["dataset"] == dataset]
    for line in lines:
        line["figures"] = {c: float(line[c]) for c in DATASETS[dataset].columns if line.get(c)}
        line["models"], line["settings"] = line["models"].split(), line["settings"].split()
    return lines


def paper_rows(args: Args, root: Path, out: Path, given: dict) -> list[Row]:
    """The rows of a table or figure, in the paper's order; what cannot run says what it lacks."""
    rows, axes = {}, FIGURE_AXES.get(args.paper, {})
    points = [(f", {factor} {show(v)}", [f"{factor}={v}"]) for factor, values in axes.items() for v in values]
    lines = [line for line in read_paper(args.dataset) if line["table"] == args.paper]
    known = [model for model in common.systems() if any(model in line["models"] for line in lines)]
    if args.model not in known and ("model" in args.typed or args.weights):
        flag, why = "model" if "model" in args.typed else "weights", f"it has no row of {args.model}, but of"
        raise UserError(f"--{flag}: has no say in --paper {args.paper}, {why} {', '.join(known)}; leave it out")
    if "model" in args.typed and not args.weights:
        raise UserError(f"--model: has no say in --paper {args.paper}, its rows name theirs; add --weights or drop it")
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
            best = max(best, line["figures"], key=lambda f: (f.get(DATASETS[args.dataset].columns[0], 0), len(f)))
    return replace(row, paper=best, changed=tuple(c for c in row.changed if not c.startswith("upsample=")))


def paper_settings(args: Args, models: list[str], words: list[str]) -> tuple[str, Propagation]:
    """The model and settings of a row of the paper; UserError with what is missing."""
    if models == ["-"]:
        raise UserError("quoted in the paper from another one")
    rows = common.systems()
    models = sorted(models, key=lambda model: not (args.weights and model == args.model))  # --weights come first
    if not (chosen := next((model for model in models if weights_of(args, model)), None)):
        sources = {model: rows[model].source if model in rows else "train_uvc_plus.py makes it" for model in models}
        either = " or ".join(f"{model.rpartition('@')[2]} ({source})" for model, source in sources.items())
        files = " or ".join(f"{model.rpartition('@')[2].removesuffix('.pth')}.pth" for model in models)
        raise UserError(f"needs weights of {either} in weights/, named {files}")
    factors = {"refine": 0.0}  # the paper does not
    for word in words:
        factor, _, text = word.partition("=")
        factors[factor] = parse_value(factor, text)
    return chosen, replace(preset(chosen.partition("@")[0], args.dataset), **factors)


# ---------------------------------------------------------------------------------------------------------------------
# What people look at


def print_table(args: Args, rows: list[Row], scores: dict, failed: dict, total: int) -> None:
    """The terminal table; for a table of the paper: the paper's figure, ours, and the difference."""
    dataset = DATASETS[args.dataset]
    columns = [c for c in dataset.columns if any(c in row.paper for row in rows)]
    if args.paper and columns:
        body = [["%", *(cell for c in columns for cell in (c, "ours", "diff"))]]
        body += [[row.name, *(cell for c in columns for cell in beside(row, scores, c))] for row in rows]
    else:
        columns = dataset.columns
        body = [["%", *columns]]
        body += [[r.name, *(percent(scores[r.name]["overall"].get(c)) for c in columns)] for r in rows if not r.lacks]
        if rows[0].paper:
            paper, _, difference = zip(*(beside(rows[0], scores, c) for c in columns), strict=True)
            body += [["the paper, whole data set", *paper], ["difference", *difference]]
        for part, s in scores[rows[0].name]["per_object"].items() if dataset.of_parts and len(rows) == 1 else ():
            cells = [percent(s.get(c)) for c in dataset.of_parts]
            body.append([f"  {part}", *cells, *[""] * (len(columns) - len(cells))])
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    for line in [body[0], ["-" * width for width in widths], *body[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    print(dataset.legend, *unlike(args, rows, scores), sep="\n")
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
    rows, whole = [row for row in rows if row.paper and row.name in scores], DATASETS[args.dataset].whole
    counts = {len(scores[row.name]["per_sequence"]) for row in rows} - {whole}
    why = [f"{count}, not {whole} sequences" for count in counts]
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
    dataset = DATASETS[args.dataset]
    record = {"dataset": args.dataset, "subset": args.subset, "split": args.split if "split" in dataset.flags else None}
    record |= {level: first[level] for level in ("overall", "per_object", "per_sequence")} | {"rows": table}
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)  # JSON has no nan: null
    with atomic(out / "scores.json") as path:
        path.write_text(json.dumps(record, indent=1))
    with atomic(out / "scores.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["row", "level", "name", *dataset.columns, *dataset.of_parts], extrasaction="ignore"
        )
        writer.writeheader()
        for name, score in scores.items():
            for level, entries in {**score, "overall": {"all": score["overall"]}}.items():
                for what, entry in entries.items():
                    numbers = {column: f"{value:.6f}" for column, value in entry.items() if value == value}
                    writer.writerow({"row": name, "level": level, "name": what, **numbers})


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
        ax.legend()
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
        for k, j, f in zip(result["ids"], result["J"], result["F"], strict=True):
            colour = propagate.PALETTE[k] / 255
            ax.plot(result["frames"], j, "-", color=colour, lw=1.6)
            ax.plot(result["frames"], f, ":", color=colour, lw=1.6)
        ax.set_xticks(range(0, len(result["frames"]), max(1, len(result["frames"]) // 4)))
        ax.set_title(f"{name}: {len(result['J'])} object{'s' * (len(result['J']) != 1)}", fontsize=10, loc="left")
        ax.set_ylim(-0.03, 1.03)
    return embed_figure(figure)


def embed_figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f'<img class=plot src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def contact_sheet(seq: Sequence, folder: Path, result: dict, count: int = 5) -> str:
    """Ground truth above the prediction, at evenly spaced frames (not the first, which is given)."""
    scored = {name: i for i, name in enumerate(result.get("frames", ()))}
    among = list(scored) or seq.names
    picks = np.linspace(0, len(among), count, endpoint=False).astype(int) + len(among) // (2 * count)
    pictures = files(seq.frames, PICTURES)
    cells = {"": [], "ground truth": [], "prediction": []}
    for name in dict.fromkeys(among[i] for i in picks):
        frame = None
        with contextlib.suppress(UserError):  # then its cells are grey
            frame = common.read_picture(pictures[name]) if name in pictures else None
        caption = name
        if name in scored and not seq.file:
            j, f = (percent(mean(result[what][:, scored[name]])) for what in "JF")
            caption += f" &middot; J {j} F {f}"
        cells[""].append(f"<span class=cap>{caption}</span>")
        for kind, path in (("ground truth", seq.truth[name]), ("prediction", seq.prediction(folder, name))):
            if seq.file:
                picture = draw_joints(frame, read_joints(path)[seq.names.index(name)])
            else:
                table = seq.table if kind == "ground truth" else result.get("table")
                ids = read_ids(path) if table is None else cv2.LUT(read_ids(path), table)
                backdrop = np.full((*ids.shape, 3), 40, np.uint8) if frame is None else frame
                picture = propagate.overlay(backdrop, nearest(ids, backdrop.shape[:2]))
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
            cv2.circle(out, at, 3 * scale, propagate.PALETTE[k].tolist(), -1, cv2.LINE_AA)
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
    dataset, esc, text = DATASETS[args.dataset], html.escape, []
    columns, figure = dataset.columns, dataset.columns[0]
    ran = [row for row in rows if results.get(row.name)]
    shared = set.intersection(*(set(results[row.name]) for row in ran))
    even = {row.name: {n: result for n, result in results[row.name].items() if n in shared} for row in ran}
    even = {name: summarize(args.dataset, result) for name, result in even.items()}
    best = max(ran, key=lambda row: np.nan_to_num(even[row.name]["overall"].get(figure, math.nan), nan=-1))
    overall, by_name = scores[best.name]["overall"], {seq.name: seq for seq in sequences}
    colours = ("#2f6db5", "#e08a2e", "#4a9a57", "#b5485d", "#7a5fb0", "#7f8b97")

    def card(title: str, *inside: str) -> None:
        text.append(f"<h2>{title}</h2><div class=card>{''.join(inside)}</div>")

    def bullets(lines: Iterable[str]) -> str:
        return f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in lines)}</ul>"

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
            kind = " class=best" if row is best and shared else " class=off" if row.lacks else ""
            text += f"</tr><tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in [esc(row.name), *cells])
        return f"<table><tr>{text}</tr></table>"

    title = f"{dataset.title.format(**vars(args))}: {esc(best.name)}"
    count = f"{len(results[best.name])} sequence{'s' * (len(results[best.name]) != 1)}"
    count += f" in {esc(args.data.resolve().name)}" if args.data else ""
    told = f"; the best of {len(ran)} rows" if len(ran) > 1 else ""
    if any(set(results[row.name]) != shared for row in ran):
        told += f" over the sequences that all have ({len(shared)})" if shared else "? They have no sequence in common"
    about = [f"per cent, mean over {dataset.over} of {count}{told}", dataset.legend, *unlike(args, rows, scores)]
    text.append(f"<h1>{title}</h1><div class=sub>{'<br>'.join(about)}</div>")
    boxes = {c: percent(overall.get(c)) for c in columns} | {f"{c}, paper": v for c, v in best.paper.items()}
    boxes = (f"<div class=kpi><b>{number}</b><span>{esc(c)}</span></div>" for c, number in boxes.items())
    text.append(f"<div class=kpis>{''.join(boxes)}</div>")

    if curves := sweep_curves([row for row in ran if row.settings], even, figure):
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
        # Matplotlib takes minutes for some hundreds.
        drawn = {name: result for name, result in results[best.name].items() if name in ranked[-60:]}
        which = f"; the {len(drawn)} worst of {len(ranked)} sequences" if len(drawn) < len(ranked) else ""
        legend = f"<div class=sub>solid J, dotted F; a colour an object, as in the masks{which}</div>"
        card(f"J and F over time, {esc(best.name)}", legend, draw_time(drawn))
    elif ranked:
        keys = dataset.of_parts or columns[:2]
        of_parts = scores[best.name]["per_object"].items()
        card(dataset.over.capitalize(), bars({n: [score[k] for k in (keys[0], *keys)] for n, score in of_parts}, keys))

    if models := [row for row in ran if row.settings]:
        used = [{"model": r.model, "weights": getattr(r.weights, "name", "-"), **asdict(r.settings)} for r in models]
        same = {f: v for f, v in used[0].items() if all(entry[f] == v for entry in used)}
        lines = ["<dl>", *(f"<dt>{f}</dt><dd>{esc(show(v))}</dd>" for f, v in same.items()), "</dl>"]
        if differ := [f for f in used[0] if f not in same]:
            cells = [[esc(show(entry[f])) for f in differ] for entry in used]
            lines += ["<br>", table(differ, list(zip(models, cells, strict=True)))]
        card("Settings", *lines)
    if not_run := lacking(rows):
        card("Not run", bullets(line.removeprefix("not run: ") for line in not_run))
    if wrong := list(dict.fromkeys(why for row in rows for why in failed[row.name].values())):
        more = [f"and {len(wrong) - 10} more, in scores.json"] if len(wrong) > 10 else []
        card("<span class=fail>Failed</span>", bullets(wrong[:10] + more))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    with atomic(out / "report.html") as path:
        path.write_text(f"{head}<main>{''.join(text)}</main></html>", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------


def worker_pool():
    """A process for scoring on each CPU, forked: they share what is imported, and use neither torch nor the GPU.

    What else this process computes is shared out over propagate's pool, so torch and OpenCV have one thread each.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # ends OpenCV's threads before the fork; a child cannot
    context = multiprocessing.get_context("fork")
    return context.Pool(pool_workers(), signal.signal, (signal.SIGINT, signal.SIG_IGN))


def check_flags(args: Args) -> None:
    """UserError for flags that exclude each other, or that have no say in this run."""
    if sum(map(bool, (args.predictions, args.sweep, args.paper))) > 1:
        raise UserError("--predictions, --sweep and --paper: each is a run of its own; give one of them")
    if args.subset == "test-dev" and args.predictions:
        raise UserError("--subset test-dev --predictions: cannot be scored here, its annotations are not public")
    for name, flag in ((name, flag) for name, dataset in DATASETS.items() for flag in dataset.flags):
        if getattr(args, flag) != getattr(Args, flag) and args.dataset != name:
            raise UserError(f"--{flag.replace('_', '-')}: is for --dataset {name} alone; leave it out")
    if args.grid and not args.sweep:
        raise UserError("--grid: is about --sweep, which is not given")
    if not torch.cuda.is_available():
        common.pick_device(args.device)


def main(args: Args) -> None:
    own = asdict(preset(args.model, args.dataset))
    given = {factor: v for factor, v in asdict(args.propagation).items() if v != own[factor] or factor in args.typed}
    if args.paper:
        dataset = next(name for name in DATASETS for line in read_paper(name) if line["table"] == args.paper)
        if args.dataset not in (Args.dataset, dataset):
            raise UserError(f"--dataset {args.dataset}: --paper {args.paper} is about {dataset}; leave it out")
        args = replace(args, dataset=dataset)
    check_flags(args)
    root, out = args.data or Path("data") / args.dataset, args.out or Path("results") / args.dataset
    sequences, absent = read_dataset(args, root)
    rank, world = rank_world()
    rows = make_rows(args, root, out, given, sequences)
    can_run = [row for row in rows if not row.lacks]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    results, failed = {row.name: {} for row in rows}, {row.name: {} if row.lacks else dict(absent) for row in rows}
    if absent and rank == 0:
        of = len(sequences) + len(absent)
        print(f"error: {next(iter(absent.values()))} ({len(absent)} of {of} sequences are missing)", file=sys.stderr)
    with worker_pool() as pool:  # forked before there is any thread
        if world > 1:
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
            atexit.register(distributed.destroy_process_group)
        if rank == 0:
            for row in can_run if not args.predictions else ():
                forget_stale(row, sequences)
        if world > 1:
            distributed.barrier()
        evaluate(args, can_run, sequences[rank::world], pool, results, failed)
    if world > 1:
        parts = [None] * world
        distributed.all_gather_object(parts, (results, failed))
        for name, (part_results, part_failed) in itertools.product(results, parts):
            results[name] |= part_results[name]
            failed[name] |= part_failed[name]
    code = 1 if any(failed.values()) else 0
    if rank == 0 and args.subset == "test-dev":
        print("predicted, not scored (the annotations are not public):", *(row.folder for row in can_run), sep="\n  ")
    elif rank == 0:
        order = {row.name: [seq.name for seq in sequences if seq.name in results[row.name]] for row in can_run}
        results = {name: {seq: results[name][seq] for seq in names} for name, names in order.items()}
        scores = {name: summarize(args.dataset, result) for name, result in results.items()}
        print_table(args, rows, scores, failed, len(sequences) + len(absent))
        figures = [score["overall"].get(DATASETS[args.dataset].columns[0], math.nan) for score in scores.values()]
        code = 1 if np.isnan(figures).all() else code
        if any(results.values()):
            write_scores(args, out, rows, scores, failed)
            write_report(args, out, rows, sequences, results, scores, failed)
            print(f"{out}/scores.json  {out}/scores.csv  {out}/report.html")
    for row, seq in itertools.product(can_run if rank == 0 and not args.predictions else (), sequences):
        with contextlib.suppress(UserError, OSError):  # what a run that was killed has left
            (row.folder / ".partial" / seq.name).mkdir(parents=True, exist_ok=True)
            discard(row.folder / ".partial", seq)
    if world > 1:
        distributed.barrier()  # a process that leaves with code 1 ends the others, so it waits for the report
    sys.exit(code)


def parse_args(argv: list[str] | None = None) -> Args:
    typed = re.findall(r"^--(?:no[-_])?([^=\n]+)", "\n".join(sys.argv[1:] if argv is None else argv), re.M)
    return replace(propagate.parse_with_model(Args, argv), typed=tuple(flag.replace("-", "_") for flag in typed))


if __name__ == "__main__":
    common.run(main, parse_args)
