"""A video and the mask of one frame in, a mask for every frame out, and a film to look at.

    python propagate.py --model imagenet --video clip.mp4 --mask f0.png
    python propagate.py --model imagenet --video frames/ --points points.csv --context 7
    python propagate.py --model imagenet --video clip.mp4 --mask a.png --mask-frame 0 --mask b.png --mask-frame 40
    python propagate.py --model imagenet --video 0 --mask f0.png --show
    python propagate.py --engine tracker.onnx --video clip.mp4 --mask f0.png

Writes --out (results/<video name>/): masks/*.png (indexed PNG) or points.csv, overlay.mp4, contact_sheet.jpg and
run.json. Stopped and started again, it goes on after the last whole frame; with --engine, it keeps what is whole but
runs through it again.
"""

import argparse
import atexit
import contextlib
import csv
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import queue
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from av.sidedata.sidedata import SideDataContainer
from isal import isal_zlib
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import common
from common import (
    PICTURES,
    Propagation,
    System,
    UserError,
    atomic,
    cuts,
    find_system,
    products,
    read_picture,
    stretch,
    systems,
    usable_cpus,
    writing,
)

__version__ = "0.1.0"


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
    """Picture of an annotated frame's objects: indexed PNG, grey ids, black and white, or one colour an object.
    MASK=2 gives its one object the id 2. Several masks of one frame are merged. A folder: masks named as the frames."""
    mask_frame: Annotated[list[int], tyro.conf.UseAppendAction] = field(default_factory=list)
    """The frame of the video that each --mask (or --points) belongs to; default: the first one used."""
    points: Annotated[list[Path], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Track key points instead: a CSV file with the columns id,x,y (pixels), and frame if not all are of one."""
    partial: bool = False
    """A later mask (or table) says nothing of the ids that it does not name: these keep what is predicted."""
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
    save_labels: bool = False
    """Also write the soft labels of each frame, OUT/labels/*.npz: labels (L x h x w float16, on the grid; the first is
    the background), ids and size."""
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
# Algorithm 1


class Box(NamedTuple):
    """Rows top..bottom and columns left..right of the grid."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


class Part(NamedTuple):
    """Context frames that are searched alike: everywhere, or in the fixed region."""

    first: int  # the number of its first frame
    keys: Tensor  # h w m C
    fixed: bool


def propagate_labels(
    target: Tensor,
    features: Tensor,
    labels: Tensor,
    settings: Propagation,
    annotated: int = 1,
    ages: Sequence[int] | None = None,
    notes: Sequence | None = None,
) -> Tensor:
    """Algorithm 1 of the paper for one target frame: each cell copies the labels of its k nearest context cells.

    target    C x h x w      features of the target frame, g
    features  n x C x h x w  features of the context frames, F, the `annotated` ones first
    labels    n x L x h x w  their soft labels, Y
    ages      n              how many frames each lies before the target (default: n, ..., 1)
    notes     n              what a system's way to localise keeps of them (track: boxes; default: from the labels)
    returns   L x h x w      soft labels of the target frame, z, float32

    Exact, but the (n h w) x (h w) affinity matrix is never formed: a tile of target cells meets only the window of
    context cells that its search regions cover. On a CPU the tiles are shared out over the pool. Fastest when features
    are a view of an h x w x n x C tensor, as propagate_video keeps them: then they are read in place.
    """
    s = settings
    n, _, h, w = features.shape
    share = pool().map if target.is_cpu else map_here
    if own := localizer(s.localization):
        ages = list(range(n, 0, -1)) if ages is None else ages
        return own.localize(target, features, labels, s, annotated, ages, notes, share)
    query = target.permute(1, 2, 0)  # h w C
    if s.softmax_over != "topk":
        query = query / s.temperature
    keys = features.permute(2, 3, 0, 1)  # h w n C: the n frames of a cell side by side
    values = labels.permute(2, 3, 0, 1).reshape(h * w * n, -1).float()  # an entry is (cell, frame), cell-major
    fixed = s.localization == "fixed"
    edges = [0, min(annotated, n) if s.exempt_first and fixed else 0, n]
    parts = [
        Part(a, keys[:, :, a:b].contiguous(), fixed and a >= edges[1]) for a, b in itertools.pairwise(edges) if a < b
    ]
    z = torch.empty(h, w, values.shape[1], device=target.device)

    def fill(tile: Box) -> None:
        z[tile.top : tile.bottom, tile.left : tile.right] = label_tile(query, parts, values, s, tile)

    boxes = tiles(parts, s, (h, w))
    share(fill, boxes)
    return z.permute(2, 0, 1)


def localizer(name: str) -> System | None:
    """The system that brings a way to localise; None for what Algorithm 1 has itself."""
    owner = {"window": "mast", "predicted": "mast", "track": "uvc"}.get(name)
    return find_system(owner) if owner else None


def map_here(task: Callable, items: Iterable) -> list:
    """What Pool.map does, without a pool: a GPU has its own."""
    return [task(item) for item in items]


def label_tile(query: Tensor, parts: list[Part], values: Tensor, s: Propagation, tile: Box) -> Tensor:
    """Lines 14 to 36 of Algorithm 1 for the target cells of one tile: their labels, rows x columns x L.

    query: h x w x C; values: the context labels, (h w n) x L.
    """
    h, w, _ = query.shape
    n, found = len(values) // (h * w), []
    for part in parts:
        search = search_blocks if in_blocks(part, s) else search_tile
        best, cell, frame, total = search(part, query, s, tile)
        found.append((best, cell * n + part.first + frame, total))
    if s.aggregation == "overall":
        return soft_copy(*merge(found, s), values, s).unflatten(0, tile.shape)
    return (sum(soft_copy(*each, values, s) for each in found) / n).unflatten(0, tile.shape)  # line 36


def search_tile(part: Part, query: Tensor, s: Propagation, tile: Box) -> tuple[Tensor, ...]:
    """Lines 14 to 26 for the target cells of a tile and the context frames of `part`.

    -> affinity, cell and frame (of the part) of the k kept, each k x q, or k x m x q per frame; and the log of what
    their softmax is divided by, m x q (None: by their own sum).
    """
    _, f, fixed = part
    h, w, _ = query.shape
    g = query[tile.top : tile.bottom, tile.left : tile.right].flatten(0, 1)  # q C
    window = search_window(s, tile, (h, w)) if fixed and f.is_cpu else Box(0, h, 0, w)
    seen = Box(0, h, 0, w) if s.softmax_over == "frame" else window
    A, peak = compute_affinity(f, g, s, tile, seen, only_near(part, s))  # rows columns m q
    inside = (
        slice(window.top - seen.top, window.bottom - seen.top),
        slice(window.left - seen.left, window.right - seen.left),
    )
    near, peak = A[inside], peak[inside]
    M = compute_masks(s, window, tile, A.device) if fixed else None
    if fixed and s.softmax_over == "region":
        near.masked_fill_(~M[:, :, None], -math.inf)
    best, cell, frame = topk(near.flatten(0, 1), peak.flatten(0, 1), M if M is None else M.flatten(0, 1), s)
    width = window.right - window.left
    cell = (window.top + cell // width) * w + window.left + cell % width
    return best, cell, frame, None if s.softmax_over == "topk" else logsumexp_(A, (0, 1))


def compute_affinity(f: Tensor, g: Tensor, s: Propagation, tile: Box, seen: Box, fixed: bool) -> tuple[Tensor, Tensor]:
    """Eq. 1, A = f^T g, of the context cells of `seen` (f: h x w x m x C) and the cells of a tile (g: q x C).

    -> A, rows x columns x m x q, and for `overall` the largest of each cell's m, rows x columns x q, taken while a row
    of A is still in the cache. Both lie in the thread's scratch memory, which its next call overwrites. fixed: pairs of
    rows further apart than the fixed region reaches are left out, and what stands in their place is of no meaning.
    """
    m, q = f.shape[2], len(g)
    rows, columns = seen.shape
    if not f.is_cpu:
        A = f.flatten(0, 2) @ g.T
        A = (A if s.softmax_over == "topk" else A.float()).view(rows, columns, m, q)
        return A, A.amax(2)
    dtype = g.dtype if s.softmax_over == "topk" else torch.float32
    A, peak = scratch(rows * columns * (m + 1) * q, dtype).split(rows * columns * m * q)
    A, peak = A.view(rows, columns, m, q), peak.view(rows, columns, q)
    reach, width = reach_of(s) if fixed else f.shape[0], tile.right - tile.left
    for y, row, best in zip(range(seen.top, seen.bottom), A, peak, strict=True):
        first, end = max(y - reach, tile.top) - tile.top, min(y + reach + 1, tile.bottom) - tile.top
        near = slice(first * width, end * width)
        products(f[y, seen.left : seen.right].flatten(0, 1), g[near], out=row[:, :, near].flatten(0, 1))
        if s.aggregation == "overall":
            torch.amax(row[:, :, near], 1, out=best[:, near])
    return A, peak


def compute_masks(s: Propagation, window: Box, tile: Box, device) -> Tensor:
    """The mask M of the fixed region: whether a context cell of `window` is searched for a target cell of `tile`. The
    affinities that it leaves out become -inf, so that their weight is 0.

    -> rows x columns x q, bool. It is the same for all labels and context frames.
    """
    dy = torch.arange(window.top, window.bottom, device=device)[:, None] - torch.arange(
        tile.top, tile.bottom, device=device
    )
    dx = torch.arange(window.left, window.right, device=device)[:, None] - torch.arange(
        tile.left, tile.right, device=device
    )
    dy, dx = dy[:, None, :, None], dx[None, :, None, :]  # rows columns rows columns
    M = dy**2 + dx**2 < s.radius**2 if s.shape == "circle" else (dy.abs() <= s.radius) & (dx.abs() <= s.radius)
    return M.flatten(2)


def topk(A: Tensor, peak: Tensor, M: Tensor | None, s: Propagation) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 23 to 26: the k largest masked affinities of each target cell. A: cells x m x q; peak, its largest over m,
    and M: cells x q.

    -> affinity, cell, frame of each: k x q over all m frames, or k x m x q per frame.
    """
    cells, m = A.shape[:2]
    if s.aggregation == "per-frame":
        A = A if M is None else A.masked_fill(~M[:, None], -math.inf)
        best, cell = A.topk(min(s.topk, cells), dim=0)
        return best.float(), cell, torch.arange(m, device=A.device)[:, None]
    # M does not depend on the frame, so the k best lie in the k best cells by their best frame.
    if M is not None:
        peak.masked_fill_(~M, -math.inf)
    peak, cell = peak.topk(min(s.topk, cells), dim=0)  # k q
    A = A.gather(0, cell[:, None].expand(-1, m, -1)).masked_fill_((peak == -math.inf)[:, None], -math.inf)  # k m q
    best, entry = A.flatten(0, 1).topk(min(s.topk, len(cell) * m), dim=0)
    return best.float(), cell.gather(0, entry // m), entry % m


def soft_copy(best: Tensor, entry: Tensor, total: Tensor | None, values: Tensor, s: Propagation) -> Tensor:
    """Lines 28 to 33: the labels of the k entries kept, weighted by their affinities after the softmax: q x L.

    best, entry: k x q, or k x m x q per frame; total: the log of what their softmax is divided by, None for their own.
    """
    weight = (best / s.temperature).softmax(0) if total is None else (best - total).exp()
    weight, entry = (x.flatten(0, -2).T.contiguous() for x in (weight, entry))
    return F.embedding_bag(entry, values, per_sample_weights=weight, mode="sum")


def merge(found: list[tuple], s: Propagation) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k best of the k best of several parts."""
    best, entry, total = zip(*found, strict=True)
    total = None if total[0] is None else torch.cat(total).logsumexp(0)
    if len(found) == 1:
        return best[0], entry[0], total
    best, order = torch.cat(best).topk(min(s.topk, sum(map(len, best))), dim=0)
    return best, torch.cat(entry).gather(0, order), total


# ---------------------------------------------------------------------------------------------------------------------
# How memory is walked


BLOCK, COLUMNS = 4, 16  # cells of a block: see search_blocks


def tiles(parts: list[Part], s: Propagation, grid: tuple[int, int]) -> list[Box]:
    """The grid cut into tiles whose affinities fit 32 MiB (on a GPU, which likes few launches, 1 GiB)."""
    h, w = grid
    cpu = parts[0].keys.is_cpu
    most = 2**23 if cpu else 2**28
    ty, tx = (30, 8) if cpu else grid  # tall: most rows of a window then meet only target rows that they may
    while ty * tx > 1 and count_affinities(parts, s, grid, ty, tx) > most:
        ty, tx = (ty // 2, tx) if ty > tx else (ty, tx // 2)
    return [Box(*rows, *columns) for rows in cuts(h, ty) for columns in cuts(w, tx)]


def count_affinities(parts: list[Part], s: Propagation, grid: tuple[int, int], ty: int, tx: int) -> int:
    """The most affinities that a tile of ty x tx needs at a time."""
    most = 0
    for part in parts:
        rows, columns = grid
        if in_blocks(part, s):
            rows, columns = BLOCK + 2 * reach_of(s), COLUMNS + 2 * reach_of(s)
        elif only_near(part, s) and part.keys.is_cpu:
            rows, columns = min(ty + 2 * reach_of(s), rows), min(tx + 2 * reach_of(s), columns)
        most = max(most, rows * columns * part.keys.shape[2] * ty * tx)
    return most


def only_near(part: Part, s: Propagation) -> bool:
    """Whether what lies beyond the fixed regions need not be compared at all."""
    return part.fixed and s.softmax_over != "frame"


def in_blocks(part: Part, s: Propagation) -> bool:
    """Whether search_blocks searches these frames: on a GPU, where the window of a block is smaller than the grid."""
    h, w = part.keys.shape[:2]
    smaller = (BLOCK + 2 * reach_of(s)) * (COLUMNS + 2 * reach_of(s)) < h * w
    return only_near(part, s) and smaller and not part.keys.is_cpu


def reach_of(s: Propagation) -> int:
    """How many rows or columns away the fixed region reaches."""
    return s.radius - (s.shape == "circle")


def search_window(s: Propagation, tile: Box, grid: tuple[int, int]) -> Box:
    """The context cells that the fixed regions of a tile's cells reach."""
    reach = reach_of(s)
    top, left = max(tile.top - reach, 0), max(tile.left - reach, 0)
    return Box(top, min(tile.bottom + reach, grid[0]), left, min(tile.right + reach, grid[1]))


def logsumexp_(A: Tensor, dim: tuple[int, ...]) -> Tensor:
    """A.logsumexp(dim), in the memory of A."""
    peak = A.amax(dim, keepdim=True)
    return A.sub_(peak).exp_().sum(dim).log_().add_(peak.squeeze(dim))


_scratch = threading.local()


def scratch(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that a thread has for itself and uses again: new memory costs as much as a product."""
    floats = size * dtype.itemsize // 4 + 1
    if getattr(_scratch, "memory", None) is None or len(_scratch.memory) < floats:
        with torch.inference_mode(False):
            _scratch.memory = torch.empty(floats)
    return _scratch.memory[:floats].view(dtype)[:size]


def search_blocks(part: Part, query: Tensor, s: Propagation, tile: Box) -> tuple[Tensor, ...]:
    """What search_tile does, for the fixed region on a GPU, which likes few and large operators.

    The tile is cut into blocks of BLOCK x COLUMNS cells. Each meets the window of context cells that its regions reach;
    the blocks below one another are one batched product, and all that follows is done for all blocks at a time.
    """
    m, reach = part.keys.shape[2], reach_of(s)
    own, seen, place, far, outside = block_regions(s, tile, query.shape[:2], query.device)
    (across, down, q), rows, columns = own.shape, BLOCK + 2 * reach, seen.shape[2]
    frames = torch.arange(m, device=query.device)
    g = query.flatten(0, 1)[own]  # across down q C
    f = part.keys.flatten(0, 2)[seen[:, :, None] * m + frames[:, None]]  # across (rows of all blocks) m columns C
    A = g.new_empty(across, down, q, rows * m * columns)
    for mine, theirs, out in zip(g, f, A, strict=True):  # the rows that blocks share are read in place
        theirs = theirs.unfold(0, rows, BLOCK).permute(0, 4, 1, 2, 3).flatten(1, 3)  # down (rows m columns) C
        torch.bmm(mine, theirs.mT, out=out)
    A = (A if s.softmax_over == "topk" else A.float()).view(across * down, q, rows, m, columns)
    beyond = (far | outside).flatten(0, 1)  # blocks q rows columns
    if s.softmax_over == "region" or s.aggregation == "per-frame":
        A.masked_fill_(beyond[:, :, :, None], -math.inf)
    if s.aggregation == "per-frame":
        best, cell = A.transpose(2, 3).flatten(3).topk(min(s.topk, rows * columns))  # blocks q m k
        frame = frames[:, None].expand_as(cell)
    else:  # as in topk
        peak = A.amax(3).masked_fill_(beyond, -math.inf).flatten(2)
        peak, cell = peak.topk(min(s.topk, rows * columns), sorted=False)  # blocks q k
        at = (cell // columns * m * columns + cell % columns)[..., None] + frames * columns  # blocks q k m
        near = A.flatten(2).gather(2, at.flatten(2)).view(at.shape)
        near = near.masked_fill_((peak == -math.inf)[..., None], -math.inf).flatten(2)
        best, entry = near.topk(min(s.topk, near.shape[2]), sorted=False)
        cell, frame = cell.gather(2, entry // m), entry % m
    cell = place.view(across * down, *[1] * (cell.dim() - 2), -1).take_along_dim(cell, -1)
    total = None if s.softmax_over == "topk" else logsumexp_(A, (2, 4))  # blocks q m

    def of_tile(x: Tensor | None) -> Tensor | None:
        """blocks x q x ... -> ... x cells of the tile."""
        if x is None:
            return None
        x = x.view(across, down, BLOCK, COLUMNS, *x.shape[2:]).movedim(0, 2).flatten(2, 3).flatten(0, 1)
        x = x[: tile.shape[0], : tile.shape[1]].flatten(0, 1)
        return x.permute(*range(x.dim())[::-1])

    return of_tile(best.float()), of_tile(cell), of_tile(frame), of_tile(total)


@functools.lru_cache(64)  # the same for each target: to launch what makes them takes longer than to use them
def block_regions(s: Propagation, tile: Box, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """The blocks of search_blocks, in numbers of cells of the grid: own, those of each block, across x down x q; seen,
    the context cells that those below one another see, across x rows x columns; place, those that each sees, across x
    down x rows x columns. And what is seen in vain: far, out of the region, q x rows x columns; outside, beyond the
    grid, across x down x 1 x rows x columns."""
    (h, w), reach = grid, reach_of(s)
    columns = math.ceil((COLUMNS + 2 * reach) / 8) * 8  # a GPU's matrix units want rows of a multiple of 16 bytes
    top = torch.arange(tile.top, tile.bottom, BLOCK)[:, None]
    left = torch.arange(tile.left, tile.right, COLUMNS)[:, None]
    y = top + torch.arange(-reach, BLOCK + reach)  # down rows
    x = left + torch.arange(-reach, columns - reach)  # across columns

    def numbers(first: int, last: int, x: Tensor) -> Tensor:
        """Of the rows first..last and columns x (across x columns): across x rows x columns, within the grid."""
        return torch.arange(first, last).clamp(0, h - 1)[:, None] * w + x.clamp(0, w - 1)[:, None]

    end = tile.top + len(top) * BLOCK
    own = numbers(tile.top, end, left + torch.arange(COLUMNS)).view(len(left), len(top), -1)
    seen = numbers(tile.top - reach, end + reach, x)
    place = seen.unfold(1, BLOCK + 2 * reach, BLOCK).transpose(2, 3).contiguous()
    outside = ((y < 0) | (y >= h))[..., None] | ((x < 0) | (x >= w))[:, None, None]
    M = compute_masks(s, Box(-reach, BLOCK + reach, -reach, columns - reach), Box(0, BLOCK, 0, COLUMNS), "cpu")
    found = own, seen, place, ~M.permute(2, 0, 1), outside[:, :, None]
    return tuple(each.to(device) for each in found)


def needs_history(s: Propagation) -> bool:
    """Whether a target depends on more than the annotated and the latest frames."""
    return s.memory == "spaced" or s.localization in ("predicted", "track")


def propagate_video(
    features: Iterable[Tensor],
    annotated: Sequence[tuple[Tensor, ...]],
    settings: Propagation,
    recent: Iterable[tuple[Tensor, Tensor]] = (),
    given: dict[int, tuple[Tensor, ...]] | None = None,
) -> Iterator[Tensor]:
    """Label frame after frame: yields the soft labels (L x h x w) of each target in `features` (C x h x w each).

    annotated: (features, labels) of the annotated frames. The first is frame 0, and the targets come after it, from
    frame 1 on; the others, of elsewhere in the video, are in the context too and count as far away. A third entry, the
    number of each pixel's label (H x W, full size), gives UVC's boxes to the pixel; without it they are to the cell.
    recent: the last targets and their labels, oldest first, to go on with an earlier run: the last settings.context, or
    all where needs_history(settings).
    given: number of a target -> (labels, which of them the annotation names, L bool): these are laid over what is
    predicted, the others keep their prediction, and the frame stays in the context for good as an annotated one does.
    A third entry, which of them it is the first to name, has them looked for in the context's earlier frames.
    The context lives in one ring buffer, so memory does not grow with the video. Each target is pulled only when it is
    due, so that several settings can share one pass over the frames (itertools.tee).
    """
    s, given, own = settings, given or {}, localizer(settings.localization)
    (C, h, w), L, device = annotated[0][0].shape, len(annotated[0][1]), annotated[0][0].device
    kept = [-(10**6) * (i > 0) for i in range(len(annotated))] + sorted(given) if s.keep_first else []
    spaced, ring = len(kept), len(kept) + (s.memory == "spaced")  # slots: kept frames, frame 5 if spaced, the latest n
    keys = torch.zeros(h, w, ring + s.context, C, device=device, dtype=annotated[0][0].dtype)  # read in place
    values = torch.zeros(h, w, ring + s.context, L, device=device)
    number: dict[int, int] = {}  # slot -> the frame in it
    notes = {}  # slot -> what a system's way to localise keeps of it

    def note(z: Tensor, first: bool = False, mask: Tensor | None = None):
        before = None if first else notes[max(number, key=number.get)]
        return own.note(z, s, before, mask) if own and own.note else None

    def remember(slot: int, t: int, f: Tensor, z: Tensor, about=None) -> None:
        keys[:, :, slot], values[:, :, slot] = f.permute(1, 2, 0), z.permute(1, 2, 0)
        number[slot], notes[slot] = t, about

    def remember_target(t: int, f: Tensor, z: Tensor) -> None:
        about = note(z, first=t in given)
        for new in given.get(t, ())[2:]:
            for slot in number if new.any() else ():
                before = keys[:, :, slot].permute(2, 0, 1), values[:, :, slot].permute(2, 0, 1)
                values[:, :, slot] = hindsight(*before, (f, z), new, s).permute(1, 2, 0)
        z = carried(z, s)
        latest = ring + (t - 1) % s.context if s.context else None
        if t in kept:
            remember(kept.index(t), t, f, z, about)
            number.pop(latest, None)  # it is not among the latest as well
        elif s.context:
            remember(latest, t, f, z, about)
        if s.memory == "spaced" and t == 5:
            remember(spaced, t, f, z, about)

    first = [(f, z, note(z, True, *mask)) for f, z, *mask in annotated]
    for slot in range(len(first) if s.keep_first else 0):
        remember(slot, kept[slot], *first[slot])
    for i, each in enumerate(first[:1] * s.context if s.pad else () if s.keep_first else first[: s.context]):
        remember(ring + (-1 - i) % s.context, 0, *each)  # in the places of frames 0, -1, ...
    done = 0
    for done, (f, z) in enumerate(recent, 1):
        remember_target(done, f, z)
    for t, f in enumerate(features, done + 1):
        slots = sorted(number)
        if s.memory == "spaced":  # frame 5 unless the ring gives it, and every second frame of the ring
            latest = [i for i in slots if i >= ring and (t - number[i]) % 2 == 1]
            slots = [i for i in slots if i < spaced or (i < ring and 5 not in (number[j] for j in latest))] + latest
        whole = slots == list(range(len(slots)))  # then the buffer is read in place
        k, v = (x[:, :, : len(slots)] if whole else x[:, :, slots] for x in (keys, values))
        ages = [t - number[i] for i in slots]
        fixed = sum(i < spaced for i in slots)
        about = [notes[i] for i in slots]
        z = propagate_labels(f, k.permute(2, 3, 0, 1), v.permute(2, 3, 0, 1), s, fixed, ages, about)
        if s.carry == "minmax":
            z = stretch(z)
        if t in given:
            z = lay_over(z, *given[t][:2])
        yield z
        remember_target(t, f, z)


def encode_ahead(encode: Callable, frames: Iterable, shared: bool = True) -> Iterator[tuple]:
    """(frame, encode(frame)) for each of `frames`, in order. Up to workers + 1 frames are encoded ahead by tasks of the
    pool, which come after the tiles of the frame that is being labelled. Where `frames` breaks off with an error, the
    frames before it come first. shared=False: each is encoded when it is due, by a GPU or for a camera's next frame."""
    if not shared:
        yield from ((frame, encode(frame)) for frame in frames)
        return
    coming, frames, error = deque(), iter(frames), None
    try:
        while True:
            try:
                frame = next(frames, None)
            except UserError as broken:
                frame, error = None, broken
            if frame is None:
                break
            coming.append((frame, pool().submit(encode, frame, order=1)))
            if len(coming) > pool().workers + 1:
                frame, features = coming.popleft()
                yield frame, features.result()
        while coming:
            frame, features = coming.popleft()
            yield frame, features.result()
        if error:
            raise error
    finally:
        for _, features in coming:
            features.cancel()


def lay_over(z: Tensor, labels: Tensor, named: Tensor) -> Tensor:
    """The prediction z with the labels that an annotation names in their places (both L x h x w, named L bool); label
    0, the background, is never named."""
    labels, named = labels * named[:, None, None], named[:, None, None]
    freed = (z * named).sum(0)  # where a named object was predicted and is not
    z = torch.cat([z[:1] + freed, z[1:]]) * ~named
    return z * (1 - labels.sum(0)) + labels


def carried(z: Tensor, s: Propagation) -> Tensor:
    """Predicted labels (L x h x w) as they enter the context."""
    return F.one_hot(z.argmax(0), len(z)).permute(2, 0, 1).float() if s.carry == "hard" else z


def hindsight(f: Tensor, z: Tensor, first: tuple[Tensor, Tensor], new: Tensor, s: Propagation) -> Tensor:
    """The labels z (L x h x w) of a frame (features f) that was labelled before the objects `new` (L bool) were known.

    They may be visible in it, as background. So its background becomes theirs as far as Algorithm 1 copies their labels
    from the first frame that names them: its (features, labels).
    """
    seen = propagate_labels(f, first[0][None], first[1][None], s)
    share = z[:1] * seen * new[:, None, None] / seen.sum(0).clamp_min(1e-12)
    return torch.cat([z[:1] - share.sum(0), z[1:] + share[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# One pool of single-threaded tasks: nothing waits for a thread that another program keeps from running


def pool_workers() -> int:
    """Threads of the pool: the CPUs that this process may use, at most OMP_NUM_THREADS."""
    count, most = usable_cpus(), os.environ.get("OMP_NUM_THREADS", "")
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:  # torchrun sets the other to 1 unasked
        return count
    return min(count, int(most)) if most.isdecimal() and int(most) else count


class Pool:
    """Threads that run tasks, each with one intra-op thread: many small operators never wait for one another.

    Tasks of the lowest `order` go first, those of the same order as they came.
    """

    def __init__(self, workers: int):
        self.workers, self.tasks, self.number = workers, queue.PriorityQueue(), itertools.count()
        self.local = threading.local()  # a worker knows itself by it
        threads, ready = torch.get_num_threads(), threading.Barrier(workers + 1)
        self.threads = [threading.Thread(target=self._work, args=(ready,), daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()
        ready.wait()
        torch.set_num_threads(threads)  # a worker's own setting is the default of threads to come
        atexit.register(self.close)  # a thread that is at work while Python ends would abort the process

    def close(self) -> None:
        for _ in self.threads:
            self.tasks.put((-math.inf, next(self.number), None, None, ()))
        for thread in self.threads:
            thread.join()

    def _work(self, ready: threading.Barrier) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch reads it in each thread when first asked: now, before __init__ sets it back
        self.local.inside = True
        ready.wait()
        while (entry := self.tasks.get())[2]:
            *_, future, task, args = entry
            if future.set_running_or_notify_cancel():
                try:
                    with torch.inference_mode():
                        future.set_result(task(*args))
                except BaseException as error:
                    future.set_exception(error)
            del entry, future, task, args  # nothing is kept while it waits

    def submit(self, task: Callable, *args, order: int = 0) -> Future:
        """The future of task(*args). Called by a task it is computed at once, so that none waits for another."""
        future = Future()
        if getattr(self.local, "inside", False):
            future.set_result(task(*args))
        else:
            self.tasks.put((order, next(self.number), future, task, args))
        return future

    def map(self, task: Callable, items: Iterable) -> list:
        """[task(item) for item in items], shared out. What is left is cancelled where one raises."""
        futures = [self.submit(task, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def pool() -> Pool:
    """The pool of this process, made when it is first asked for."""
    return _pool(os.getpid())  # a forked process has none of the threads


@functools.cache
def _pool(process: int) -> Pool:
    return Pool(pool_workers())


# ---------------------------------------------------------------------------------------------------------------------
# Labels on the grid, masks and points at full size


def labels_from_mask(mask: Tensor, ids: Sequence[int], grid: tuple[int, int], sampling: str = "bilinear") -> Tensor:
    """Mask H x W -> soft labels L x h x w: one-hot (background, then each id of `ids`), bilinear or nearest to the
    grid."""
    mode = {"bilinear": "bilinear", "nearest": "nearest-exact"}[sampling]
    one_hot = [mask == number for number in ids]
    one_hot = [~torch.stack(one_hot).any(0), *one_hot]
    small = [F.interpolate(m[None, None].float(), size=grid, mode=mode)[0, 0] for m in one_hot]
    return torch.stack(small)


def mask_from_labels(
    labels: Tensor,
    ids: Sequence[int],
    size: tuple[int, int],
    minmax: bool = False,
    frame: Tensor | None = None,
    refine: float = 0.0,
    chunk: int = 4,
) -> Tensor:
    """Soft labels L x h x w -> mask H x W uint8: up-sampled bilinearly to full size, then the arg-max (section 4.2).

    minmax stretches each label that occurs to 0..1 over the frame first. refine: then the labels are drawn to the edges
    of the frame (H x W x 3 uint8), see refined_winner. `chunk` labels are at full size at a time.
    """
    if refine:
        winner = refined_winner(labels, frame.to(labels.device), refine, minmax, chunk=chunk)
    else:
        winner = winner_in_turns(full_size(labels, size, minmax, chunk))
    return torch.tensor([0, *ids], dtype=torch.uint8, device=labels.device)[winner]


def labels_from_points(points: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Points J x 2 (x, y in pixels of an H x W frame) -> soft labels (1 + J) x h x w.

    Each point is a Gaussian of sigma 0.5 cells on the 4 x 4 cells about its own, the background is 1 where all are
    0 (CRW's JHMDB protocol). A point outside the frame, or not a number, has no label anywhere.
    """
    (H, W), (h, w) = size, grid
    labels = torch.zeros(1 + len(points), h, w)
    for label, (x, y) in zip(labels[1:], points, strict=True):
        if not (0 <= x < W and 0 <= y < H):  # false for nan as well
            continue
        cx, cy = min(int(x / W * w + 0.5), w - 1), min(int(y / H * h + 0.5), h - 1)
        ys, xs = torch.arange(max(cy - 2, 0), min(cy + 2, h)), torch.arange(max(cx - 2, 0), min(cx + 2, w))
        bell = torch.exp(-2.0 * ((ys[:, None] - cy) ** 2 + (xs - cx) ** 2))
        label[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] = bell
    labels[0] = (labels[1:] == 0).all(0)
    return labels


def points_from_labels(labels: Tensor, size: tuple[int, int], best: int = 3) -> np.ndarray:
    """Soft labels (1 + J) x h x w -> points J x 2 in pixels of an H x W frame: the mean position of the `best`
    highest cells of each label, weighted by their values; -1, -1 where a label is lost (CRW's JHMDB protocol)."""
    (H, W), (h, w) = size, labels.shape[1:]
    value, cell = labels[1:].flatten(1).topk(min(best, h * w), dim=1)  # J best
    total = value.sum(1)
    weight = value / total.clamp_min(1e-30)[:, None]
    x = (weight * (cell % w)).sum(1) / w * W
    y = (weight * (cell // w)).sum(1) / h * H
    return torch.where((total > 0)[:, None], torch.stack([x, y], 1), -1.0).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Masks that follow the picture: a guided filter (He, Sun, Tang, TPAMI 2013) on the up-sampled labels, in the fast form
# of He and Sun (Fast Guided Filter, 2015)

REFINE = 0.5  # the strength that people with a video get (benchmarks/tuning.md); evaluate.py has the paper's 0
EPS = 1e-5  # added to the variance of the colours; a smaller one follows fainter edges
MOST = 4  # largest radius, in samples: two cells of the grid


def refined_winner(
    labels: Tensor, frame: Tensor, strength: float, minmax: bool = False, eps: float = EPS, chunk: int = 4
) -> Tensor:
    """The label that wins at each pixel (H x W int64), each label's map having been drawn to the edges of the frame.

    labels    L x h x w  soft labels, label 0 the background
    frame     H x W x 3  uint8, the picture that they belong to
    strength  >= 0       the filter's radius over the label's thickness; 0 filters nothing
    minmax    the up-sampled labels are stretched to 0..1 first, then filtered

    The filter works on samples, two to a cell of the grid (4 pixels at stride 8), whatever the size of the frame. The
    radius of a label follows its thickness, so that wheels and legs are not smoothed away: see label_radii. `chunk`
    labels are at full size at a time.
    """
    size, L = frame.shape[:2], len(labels)
    if L == 1 or strength == 0:
        return winner_in_turns(full_size(labels, size, minmax, chunk))
    cell = math.sqrt(size[0] * size[1] / labels[0].numel())
    guide = Guide(frame, max(1, round(cell / 2)), eps)
    if L == 2:  # one filter instead of two: it is linear, so the difference of the two maps tells which is larger
        background, label = next(full_size(labels, size, minmax, chunk=2))
        ahead = (label - background)[None]
        radii = label_radii((ahead[0] > 0).int(), 2, strength / guide.step)[1:]
        return (guide.follow(ahead, radii)[0] > 0).long()
    radii = label_radii(winner_in_turns(full_size(labels, size, minmax, chunk)), L, strength / guide.step)
    maps = zip(full_size(labels, size, minmax, chunk), radii.split(chunk), strict=True)
    return winner_in_turns(guide.follow(full, radius) for full, radius in maps)


def full_size(labels: Tensor, size: tuple[int, int], minmax: bool, chunk: int) -> Iterator[Tensor]:
    """Labels L x h x w -> their maps up-sampled bilinearly, at most `chunk` at a time (section 4.2)."""
    for some in labels.split(chunk):
        full = F.interpolate(some[None].float(), size=size, mode="bilinear")[0]
        yield stretch(full) if minmax else full


def winner_in_turns(maps: Iterable[Tensor]) -> Tensor:
    """The arg-max (H x W) over maps (K x H x W) that come in turns; of equals the first."""
    best = winner = None
    start = 0
    for full in maps:
        value, index = full.max(0)  # argmax(0) takes ten times as long
        index = index.int() + start  # TensorRT adds no integers of 64 bits
        winner = index if best is None else torch.where(value > best, index, winner)
        best = value if best is None else torch.maximum(value, best)
        start += len(full)
    return winner.long()


def label_radii(winner: Tensor, count: int, scale: float) -> Tensor:
    """The radius at which each of `count` labels is filtered, in samples: 0 (left alone) to MOST.

    scale x thickness, where thickness is area / length of the outline in the mask (H x W): half the width of a strip.
    Below 1/8 sample (half a pixel at stride 8) a label is left alone. The background takes the objects' smallest.
    """
    thickness = [torch.zeros((), device=winner.device)]
    for number in range(1, count):
        own = winner == number
        here = own[:-1, :-1]
        outline = (here ^ own[1:, :-1]) | (here ^ own[:-1, 1:])  # another id to the right or below
        thickness.append(own.float().sum() / outline.float().sum().clamp(min=1))
    reach = scale * torch.stack(thickness)
    radii = torch.where(reach < 1 / 8, 0.0, reach.round().clamp(1, MOST))
    present = reach[1:] > 0
    smallest = torch.where(present, radii[1:], MOST).amin(0) * present.any()
    return torch.cat([smallest[None], radii[1:]])


class Guide:
    """A frame (H x W x 3 uint8) that maps can follow. Samples are means of step x step pixels."""

    def __init__(self, frame: Tensor, step: int, eps: float):
        self.step, self.eps = step, eps
        self.frame = frame.permute(2, 0, 1).contiguous().float()  # 3 H W
        self.small = self.sample(self.frame) / 255  # 3 h w
        self.mean = box_mean if frame.is_cpu or torch.compiler.is_exporting() else pooled_mean

    def sample(self, maps: Tensor) -> Tensor:
        """K x H x W -> K x h x w, the last row and column repeated where the step does not divide the size."""
        height, width = maps.shape[1:]
        padded = F.pad(maps[None], (0, -width % self.step, 0, -height % self.step), mode="replicate")
        return F.avg_pool2d(padded, self.step)[0]

    def enlarge(self, maps: Tensor) -> Tensor:
        """K x h x w -> K x H x W."""
        height, width = self.frame.shape[1:]
        full = F.interpolate(maps[None], scale_factor=float(self.step), mode="bilinear")[0]
        return full[:, :height, :width]

    def follow(self, maps: Tensor, radii: Tensor) -> Tensor:
        """Maps K x H x W as locally linear functions of the frame's colours, map k in windows of radii[k] samples."""
        small, found = self.sample(maps), None
        among = range(1, MOST + 1)
        if not torch.compiler.is_exporting():
            present = radii.tolist()  # read back once; a GPU is waited for
            among = [radius for radius in among if radius in present]
        for radius in among:
            chosen = radii == radius
            ab = self.coefficients(small, radius)
            found = ab if found is None else torch.where(chosen[:, None, None, None], ab, found)
        if found is None:
            return maps
        *a, b = found.unbind(1)
        followed = self.enlarge(b)
        for each, colour in zip(a, self.frame, strict=True):
            followed = torch.addcmul(followed, self.enlarge(each / 255), colour)
        return torch.where((radii > 0)[:, None, None], followed, maps)

    def coefficients(self, p: Tensor, radius: int) -> Tensor:
        """Maps p (K x h x w) -> a, b (K x 4 x h x w) of q = a . colour + b, averaged over the windows of each sample.

        a = (covariance of the colours + eps 1)^-1 covariance of the colours with p; b = mean p - a . mean colour.
        """
        I, K = self.small, len(p)
        products = [I[i] * I[j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))]
        maps = torch.cat([I, torch.stack(products), p, (p[:, None] * I).flatten(0, 1)])
        mean_I, mean_II, mean_p, mean_pI = self.mean(maps, radius).split([3, 6, K, 3 * K])
        r, g, b = mean_I
        rr, rg, rb, gg, gb, bb = mean_II
        rr, gg, bb = rr - r * r + self.eps, gg - g * g + self.eps, bb - b * b + self.eps
        rg, rb, gb = rg - r * g, rb - r * b, gb - g * b
        x, y, z = (mean_pI.unflatten(0, (K, 3)) - mean_p[:, None] * mean_I).unbind(1)  # K h w each
        # The 3 x 3 system by elimination: adjugate over determinant loses all its digits where a picture is grey.
        down, across = rg / rr, rb / rr
        gg, gb, bb = gg - down * rg, gb - down * rb, bb - across * rb
        y, z = y - down * x, z - across * x
        last = gb / gg
        z = (z - last * y) / (bb - last * gb)
        y = (y - gb * z) / gg
        x = (x - rg * y - rb * z) / rr
        a = torch.stack([x, y, z], 1)
        ab = torch.cat([a, (mean_p - (a * mean_I).sum(1))[:, None]], 1)
        return self.mean(ab.flatten(0, 1), radius).unflatten(0, (K, 4))


def box_mean(maps: Tensor, radius: int) -> Tensor:
    """Means over windows of 2 radius + 1 samples a side, less where they end at the border. maps K x h x w.

    By sums of shifted maps, a row of windows and then a column: torch's pooling adds every window up by itself.
    """
    for axis, margin in ((1, (0, 0, radius, radius)), (2, (radius, radius))):
        length = maps.shape[axis]
        padded, total = F.pad(maps, margin), maps
        for shift in (*range(radius), *range(radius + 1, 2 * radius + 1)):
            total = total + padded.narrow(axis, shift, length)
        at = torch.arange(length, device=maps.device)
        count = (at + radius).clamp(max=length - 1) - (at - radius).clamp(min=0) + 1
        maps = total / (count[:, None] if axis == 1 else count)
    return maps


def pooled_mean(maps: Tensor, radius: int) -> Tensor:
    """What box_mean does, by one operator: faster on a GPU."""
    return F.avg_pool2d(maps[None], 2 * radius + 1, 1, radius, count_include_pad=False)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Frames and masks on disk

PALETTE = np.zeros((256, 3), np.uint8)  # PASCAL VOC: the bits of the id, dealt to r, g, b from the highest down
for _bit in range(8):
    for _channel in range(3):
        PALETTE[:, _channel] |= (((np.arange(256) >> (3 * _bit + _channel)) & 1) << (7 - _bit)).astype(np.uint8)


def say(text: str) -> None:
    """What a person should know, on stderr, above a bar if there is one."""
    tqdm.write(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """An OSError inside, such as of permissions, becomes a UserError about its file."""
    try:
        yield
    except OSError as error:
        remedy = "see to its permissions" if isinstance(error, PermissionError) else "give another"
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); {remedy}") from error


def listed(folder: Path) -> list[Path]:
    """What a folder holds, but for hidden files: macOS keeps ._00000.jpg beside 00000.jpg."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@reading()
def files_of(source: str) -> list[Path]:
    """The files of a video: the film or picture itself, what its folder holds, or what the glob finds."""
    path = Path(source)
    if path.is_dir():
        return listed(path)
    if path.is_file():
        return [path]
    if glob.has_magic(source) and not path.exists():
        folder = glob.escape(str(path.parent)) if path.parent.is_dir() else path.parent  # brackets in its name
        return [Path(found) for found in glob.glob(str(Path(folder) / path.name))]
    what = "is no regular file" if path.exists() else "no such video on disk"
    raise UserError(f"{source}: {what}; give a film, a folder or a glob of pictures")


class Video:
    """Frames of a film, of a folder or glob of pictures, or of a TIFF of several, by index and in either direction.

    names: one for each frame (file stems of pictures, else 00000, 00001, ...); times: when each is shown, in seconds;
    fps; size (H, W); aspect: width of a pixel over its height. Memory does not depend on the length: no frame is kept,
    but for a block when reading backwards (32 frames; 256 MiB of a film without usable stamps). A film that breaks off
    gives the frames before the break; `broken` then says where and why. Frames of more than 8 bits (16-bit, float) are
    brought to 8 by one range for the whole video. Raises UserError where there is nothing to read or the frame size
    changes.
    """

    live = False  # a camera is

    def __init__(self, source: str | Path):
        self.source, self.fps, self.aspect, self.broken, self.range = str(source), 25.0, Fraction(1), None, None
        self.names, self.times, self.pages, path = [], [], 1, Path(source)
        found = files_of(self.source)
        self.pictures = [p for p in found if p.suffix.lower() in PICTURES]
        if self.pictures == [path]:
            self.pages = max(cv2.imcount(self.source), 1)
        if self.pages > 1:
            if path.suffix.lower() not in (".tif", ".tiff"):
                raise UserError(f"{source}: holds {self.pages} pictures in one; save each as a file of its own")
            self.pictures, self.names = [], [f"{i:05d}" for i in range(self.pages)]
        elif self.pictures:  # natural order: 2.jpg before 10.jpg
            self.pictures.sort(key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.name)])
            self.names = [p.stem for p in self.pictures]
            if len(set(self.names)) < len(self.names):
                raise UserError(f"{source}: two pictures share a name before the dot, as their masks would; rename one")
        elif found == [path]:
            self._index(path)
        if not self.names:
            other = sorted(p.name for p in found if p.suffix)
            why = f", but {other[0]}; if that is a film, name it" if other else "; give a film or a folder of pictures"
            raise UserError(f"{source}: holds no pictures{why}")
        self.times = self.times or [i / self.fps for i in range(len(self))]
        first = next(self._read([0]))[1]
        self.size = first.shape[:2]
        if self.aspect != 1 and first.shape[1] != self._width:  # on its side
            self.aspect = 1 / self.aspect
        if first.dtype != np.uint8:
            self._find_range(first.dtype)

    def _find_range(self, dtype: np.dtype) -> None:
        """One range for all frames of more than 8 bits: cameras of 12 or 14 bits use a small part of 16."""
        some = sorted({round(i) for i in np.linspace(0, len(self) - 1, 8)})
        frames = [frame for i in some for _, frame in self._read([i])]
        ends = [np.percentile(frame[np.isfinite(frame)], (0.1, 99.9)) for frame in frames if np.isfinite(frame).any()]
        low, high = np.array(ends or [(0, 1)]).T
        low, high = float(low.min()), float(high.max())  # a few dead or hot pixels do not count
        what = f"has {dtype} frames; {low:g} to {high:g}, the range of {len(some)}, becomes 0 to 255 in all of them"
        say(f"{self.source}: {what}")
        self.range = low, high

    def __len__(self) -> int:
        return len(self.names)

    def _index(self, path: Path) -> None:
        """Read the time stamps of all frames (no decoding), to seek by and to know how many there are."""
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty (0 bytes); copy or download it again")
        try:
            with av.open(str(path)) as film:
                if not film.streams.video:
                    raise UserError(f"{path}: holds no video stream; give a film with pictures")
                stream = film.streams.video[0]
                self.fps = float(stream.average_rate or stream.guessed_rate or 25)
                self.aspect, self._width = stream.sample_aspect_ratio or Fraction(1), stream.width
                tick = stream.time_base
                # A truncated film promises more frames than it has packets; in mp4 an edit list leaves only these.
                promised = len(stream.index_entries) if "mp4" in film.format.name else stream.frames
                packets = (p for p in film.demux(stream) if p.size)
                packets = [(p.pts if p.pts is not None else p.dts, p.is_discard, p.is_keyframe) for p in packets]
                kinds = {film.format.name, stream.codec_context.name} if stream.codec_context.has_b_frames else set()
        except av.error.FFmpegError as error:
            raise UserError(
                f"{path}: cannot be read as a film ({error.strerror}); is it whole? Try to play it"
            ) from error
        start = next((i for i, (*_, key) in enumerate(packets) if key), 0)  # a recording may begin between key frames
        stamps = [stamp for stamp, discarded, _ in packets[start:] if not discarded]  # an edit list cuts frames away
        # Without usable stamps frames are counted from the start, and seeking means decoding from there. AVI and XviD
        # do not say when B-frames are shown, and MPEG program streams have other stamps after seeking.
        vague = kinds & {"avi", "mpeg4", "mpeg"}
        self._seekable = not vague and None not in stamps and len(set(stamps)) == len(stamps)
        self._pts = list(range(len(stamps)))
        if self._seekable:
            self._pts = sorted(stamp for stamp in stamps if stamp >= packets[start][0])  # others lean on frames before
            self.times = [float((stamp - self._pts[0]) * tick) for stamp in self._pts]
        self.names = [f"{i:05d}" for i in range(len(self._pts))]
        if film.format.name == "avi" and packets:  # a place without a packet shows the frame before it once more
            promised -= max(stamp or 0 for stamp, *_ in packets) + 1 - len(packets)
        if promised > len(packets):
            self.broken = f"{path}: breaks off after {len(packets)} of {promised} frames; the frames before are kept"

    def check(self, indices: Sequence[int]) -> None:
        """Look at the headers of these pictures before any long work. UserError as frames, and where a file holds
        several."""
        usual = None
        for index in indices if self.pictures else ():
            size, count = picture_header(self.pictures[index])
            usual = usual or size
            if count > 1:
                what = f"holds {count} pictures, where one frame is wanted; save each as a file"
                raise UserError(f"{self.pictures[index]}: {what}")
            if not size or size != usual:
                for _ in self.frames([index]):
                    pass

    def recorded(self) -> "Video":
        """The video itself; a camera has one only after the run."""
        return self

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, frame) for each of `indices`, which must all rise or all fall."""
        for index, frame in self._read(indices):
            if frame.shape[:2] != self.size:
                raise UserError(
                    f"{self.source}: frame {self.names[index]} is {frame.shape[1]}x{frame.shape[0]}, the first is "
                    f"{self.size[1]}x{self.size[0]}; cut the video there (--end {index}) or bring it to one size"
                )
            if (frame.dtype == np.uint8) != (self.range is None):
                raise UserError(
                    f"{self.source}: frame {self.names[index]} is {frame.dtype}, the first is not; save all alike"
                )
            if self.range:
                low, high = self.range
                frame = np.nan_to_num(frame.astype(np.float32), posinf=0, neginf=0)
                frame = np.clip((frame - low) * (255 / max(high - low, 1e-12)) + 0.5, 0, 255).astype(np.uint8)
            yield index, frame

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """As frames, in the depth that they have."""
        if self.pictures:
            for index in indices:
                path = self.pictures[index]
                with reading():
                    irregular = path.exists() and not path.is_file()
                if irregular:  # a pipe would never end
                    raise UserError(f"{path}: is no regular file, so it cannot be read as a picture; remove it")
                yield index, read_picture(path, reduce=False)
        elif self.pages > 1:
            for index in indices:
                yield index, read_picture(self.source, reduce=False, page=index)
        elif len(indices) < 2 or indices[0] < indices[-1]:
            yield from self._decode(indices)
        else:  # backwards: blocks of frames, each decoded forwards; large ones where that is from the film's start
            step = max(1, 2**28 // (3 * self.size[0] * self.size[1]))  # 256 MiB
            step = min(32, step) if self._seekable else step
            for block in (indices[i : i + step] for i in range(0, len(indices), step)):
                yield from reversed(list(self._decode(block[::-1])))

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        first, last, left = indices[0], indices[-1], set(indices)
        number = {stamp: i for i, stamp in enumerate(self._pts)} if self._seekable else None
        done = -1
        try:
            with contextlib.ExitStack() as stack:
                # A key frame is found by its decoding time, which may come before it is shown; in some containers
                # seeking overshoots, and never finds the first one: then the film is read from its start.
                for back in (0, 32, None) if first and number else (None,):
                    film = stack.enter_context(av.open(self.source))
                    stream = film.streams.video[0]
                    stream.thread_type = "AUTO"
                    if back is not None:
                        film.seek(self._pts[max(0, first - back)], stream=stream)
                    pictures = film.decode(stream)
                    head = next(pictures, None)
                    if head and number and number.get(head.pts, last + 1) <= first:
                        break
                pictures = itertools.chain([head] if head else [], pictures)
                for count, picture in enumerate(pictures):
                    index = number.get(picture.pts) if number else count
                    if index is None:  # a stamp that the index does not know
                        continue
                    if index > last:
                        break
                    if index >= first:
                        done = index
                    if index in left:
                        left.remove(index)
                        deep = max(part.bits for part in picture.format.components) > 14
                        # By itself each frame would be converted by as many new threads as there are CPUs.
                        frame = picture.to_ndarray(format="rgb48le" if deep else "rgb24", threads=1)
                        yield index, upright(frame, picture)
                        if not left:
                            return
        except av.error.FFmpegError as error:
            self.broken = (
                f"{self.source}: cannot be decoded after frame {done} ({error.strerror}); the frames before are kept"
            )
        else:
            if done < last:
                self.broken = f"{self.source}: breaks off after frame {done}; the frames up to there are kept"
        if done < 0 and first == 0:
            raise UserError(f"{self.source}: no frame can be decoded; is it whole? Try to play it")


def upright(frame: np.ndarray, picture: av.VideoFrame) -> np.ndarray:
    """The frame turned by quarters and mirrored as its film says, and as players show it."""
    # picture.side_data is the same, but the two hold each other: the picture would stay until Python looks for cycles.
    matrix = SideDataContainer(picture).get("DISPLAYMATRIX")
    if matrix is None:
        return frame
    # A pixel at x, y is shown in the direction a x + c y, b x + d y.
    a, b, c, d = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist()
    if abs(b) > abs(a):  # on its side
        frame, a, d = frame.swapaxes(0, 1), c, b
    return np.ascontiguousarray(frame[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def picture_header(path: Path) -> tuple[tuple[int, int] | None, int]:
    """Width and height as stored, and how many pictures the file holds, without decoding; None and 1 where that is not
    to be had."""
    try:
        if path.is_file():  # a pipe would never end
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large ones
                picture = Image.open(path)
            with picture:
                several = picture.format != "MPO"  # a phone's JPEG, with a preview or a depth map behind it
                return picture.size, getattr(picture, "n_frames", 1) if several else 1
    except Exception:  # Pillow raises what it likes
        pass
    return None, 1


def read_ahead(items: Iterable, depth: int = 4) -> Iterator:
    """The same items, made by a thread that runs ahead by up to `depth`."""
    items, done, thread = iter(items), object(), ThreadPoolExecutor(1)
    try:
        coming = deque(thread.submit(next, items, done) for _ in range(depth))
        while (item := coming.popleft().result()) is not done:
            coming.append(thread.submit(next, items, done))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


@contextlib.contextmanager
def film_writer(
    path: Path, fps: float, size: tuple[int, int], aspect: Fraction = Fraction(1)
) -> Iterator[Callable[..., None]]:
    """Write an H.264 film that plays in a browser: yields a function that appends a frame, at a time in seconds if one
    is given; atomic. aspect: width of a pixel over its height."""
    height, width = (side - side % 2 for side in size)  # 4:2:0 colour wants even sides
    with atomic(path) as temporary, av.open(str(temporary), "w", options={"movflags": "faststart"}) as film:
        stream = film.add_stream("libx264", rate=max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001)))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}
        stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.colorspace = 5  # BT.601, which from_ndarray's conversion follows; untagged HD reads as 709
        stream.codec_context.time_base = tick = Fraction(1, 90000 if fps > 1 else 1000)
        number, last = itertools.count(), -1

        def append(frame: np.ndarray, seconds: float | None = None) -> None:
            nonlocal last
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            last = max(last + 1, round((next(number) / fps if seconds is None else seconds) / tick))
            picture.pts, picture.time_base = last, tick
            film.mux(stream.encode(picture))

        try:
            yield append
            film.mux(stream.encode())
        except av.error.FFmpegError as error:  # frames that are half a day apart
            raise UserError(f"{path}: cannot be written ({error.strerror}); --no-film leaves it out") from error


def write_mask(path: Path, mask: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """Write a mask (H x W uint8 ids) as an indexed PNG, the field's interchange format; atomic."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette.tobytes())
    with atomic(Path(path)) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def read_ids(path: str | Path) -> np.ndarray:
    """Read the ids (H x W uint8) of an indexed or grey PNG as they are stored. UserError if it is none, or broken."""
    try:
        if not Path(path).is_file():  # a pipe would never end
            raise UserError(f"{path}: no such mask")
        data = Path(path).read_bytes()
        with contextlib.suppress(ValueError, isal_zlib.error, struct.error, IndexError):
            return inflate_ids(data)  # about four times as fast as Pillow, which reads and judges the rest
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise UserError(f"{path}: is a {picture.mode} picture; masks are indexed (or grey) PNGs of ids")
            return np.array(picture, np.uint8)  # of one bit: ids 0 and 1
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); is it whole?") from error


def inflate_ids(data: bytes) -> np.ndarray:
    """The ids of the usual mask: a PNG of one byte a pixel, not interlaced, its rows not filtered. ValueError else."""
    width, height, *kind = struct.unpack(">IIBBBBB", data[16:29])  # depth, colour type, compression, filter, interlace
    if data[:8] != b"\x89PNG\r\n\x1a\n" or kind not in ([8, 3, 0, 0, 0], [8, 0, 0, 0, 0]):
        raise ValueError
    place, parts = 8, []
    while data[place + 4 : place + 8] != b"IEND":
        (length,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            parts.append(data[place + 8 : place + 8 + length])
        place += 12 + length
    rows = np.frombuffer(isal_zlib.decompress(b"".join(parts)), np.uint8).reshape(height, 1 + width)
    if rows[:, 0].any():
        raise ValueError
    return rows[:, 1:].copy()


@dataclass
class Mask:
    """A mask as it was read."""

    ids: np.ndarray  # H x W uint8
    palette: np.ndarray  # 256 x 3 uint8
    kind: str  # what its values were: ids, black and white, VOC colours, colours, values above 255; or empty


def read_mask(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The mask of a picture with objects: (ids H x W uint8, palette 256 x 3 uint8), by the rules of load_mask."""
    mask = load_mask(Path(path), {})
    if mask.kind == "empty":
        raise UserError(f"{path}: is empty, all of it is background; paint each object in a value of its own")
    return mask.ids, mask.palette


def load_mask(path: Path, known: dict[int, int], size: tuple[int, int] | None = None) -> Mask:
    """Read a mask in whichever way it is painted.

    An indexed PNG gives its ids; a grey picture its values; black and white is one object, id 1; in a colour
    picture black (or what is more than half transparent) is background and each other colour an object: the id of that
    colour in PASCAL VOC's palette if all have one, else 1, 2, ... by how much they cover. 255 beside other ids is void,
    background. known: the ids of colours, and of values above 255, in masks read before; filled up, so that they stay
    the same. size: H, W of the frames, to which a mask of the same shape is brought.
    """
    picture, lossy = open_mask(path, size)
    palette, indexed, coloured = PALETTE.copy(), picture.mode == "P", False
    if indexed:
        own = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
        # A palette in another order, as after quantising: the black that is used is not number 0.
        indexed = not own[0].any() or all(own[n].any() for n in np.unique(picture) if n < len(own))
    if indexed:
        ids = np.asarray(picture)
        palette[: len(own)] = own
    elif picture.mode[0] in "IF":  # integers of 16 or 32 bits, or floats
        ids = np.asarray(picture)
        if not ((ids >= 0) & (ids % 1 == 0)).all():
            raise UserError(f"{path}: holds values that are no ids (below 0, or no integers); save it as 0, 1, 2, ...")
        ids = ids.astype(np.int64)
    else:
        r, g, b, alpha = np.asarray(picture.convert("RGBA")).astype(np.int32).transpose(2, 0, 1)
        solid = alpha > 127  # the border of a soft edge
        coloured = bool(((r != g) | (g != b))[solid].any())
        ids = (r << 16 | g << 8 | b if coloured else r) * solid
    numbers, counts = np.unique(ids, return_counts=True)
    numbers, counts = numbers[numbers != 0], counts[numbers != 0]
    if not indexed:
        refuse_smooth(path, ids, numbers, counts, coloured, lossy)
    kind, new = "ids" if len(numbers) else "empty", numbers
    if coloured or numbers.max(initial=0) > 255:
        kind, new = "values above 255", number_values(path, numbers, counts, coloured, known)
        if coloured:
            values = np.array(list(known))
            palette[list(known.values())] = np.stack([values >> 16, values >> 8 & 255, values & 255], 1)
            kind = "VOC colours" if (palette[new] == PALETTE[new]).all() else "colours"
    elif numbers.tolist() == [255]:
        kind, new = "black and white", [1]
        palette[1] = palette[255 if indexed else 1]
    elif 255 in numbers:
        new = np.where(numbers == 255, 0, numbers)
        if not indexed:
            say(f"{path}: 255 beside other values is void (background); an object wants another value")
    ids = np.asarray([0, *new], np.uint8)[np.searchsorted(np.array([0, *numbers]), ids)]
    if size and ids.shape != size:
        (h, w), (H, W) = ids.shape, size
        if abs(w / h * H / W - 1) > 0.02:
            raise misfit(path, ids.shape, size)
        say(f"{path} is {w}x{h}, the frames are {W}x{H}: resized, nearest neighbour")
        ids = cv2.resize(ids, (W, H), interpolation=cv2.INTER_NEAREST_EXACT)
    return Mask(ids, palette, kind)


def open_mask(path: Path, size: tuple[int, int] | None) -> tuple[Image.Image, bool]:
    """The picture, and whether its format is a lossy one."""
    stored, count = picture_header(path)
    if count > 1:
        raise UserError(f"{path}: holds {count} pictures, a mask is one; save the one that is meant")
    if size and stored and max(stored) > 8 * max(size):  # it would fill the memory before it is refused
        raise misfit(path, stored[::-1], size)
    try:
        if not path.is_file():  # a pipe would never end
            raise UserError(f"{path}: no such mask; give the picture of a frame's objects")
        with Image.open(path) as picture:
            picture.load()
            lossy = picture.format in ("JPEG", "MPO")
            ImageOps.exif_transpose(picture, in_place=True)  # as frames are
            return picture, lossy
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a picture; give a PNG mask") from error


def misfit(path: Path, shape: tuple[int, int], size: tuple[int, int]) -> UserError:
    (h, w), (H, W) = shape, size
    return UserError(f"{path}: is {w}x{h}, the frames are {W}x{H}; draw it on a frame of this video")


def refuse_smooth(path: Path, ids: np.ndarray, numbers: np.ndarray, counts: np.ndarray, coloured: bool, lossy: bool):
    """UserError for a picture whose values are no ids: those of smoothed edges, too many, or 255 that may be void."""
    flat = [cv2.erode((ids == n).astype(np.uint8), np.ones((3, 3))).any() for n in numbers[:300]]
    if len(numbers) > 255 and sum(flat) >= len(flat) / 2:
        raise UserError(f"{path}: has {len(numbers)} objects; 255 is the most, give fewer")
    white = 0 if coloured else counts[numbers == 255].sum()  # void is a thin border
    doubtful = counts.sum() > white > counts.sum() / 2
    if doubtful and not lossy and all(flat):
        raise UserError(
            f"{path}: 255 beside {', '.join(map(str, numbers[:-1][:3]))} would be void, but most of what is painted is "
            "255; give each object a value from 1 to 254"
        )
    smooth = len(numbers) > 255 or (len(numbers) >= 8 and sum(flat) < len(numbers) / 2)
    if smooth or doubtful or (lossy and len(numbers) > 1):
        raise UserError(
            f"{path}: has {len(numbers)} colours beside black, as smoothed edges have (anti-aliased or JPEG); "
            "save it as PNG without smoothing, each object in one flat colour"
        )


def number_values(path: Path, numbers: np.ndarray, counts: np.ndarray, coloured: bool, known: dict[int, int]) -> list:
    """The ids of colours or of values above 255: those of `known`, which is filled up."""
    voc = {int(r) << 16 | int(g) << 8 | int(b): i for i, (r, g, b) in enumerate(PALETTE)} if coloured else {}
    unknown = [int(n) for n in (numbers[np.argsort(-counts, kind="stable")] if coloured else numbers) if n not in known]
    own = [voc.get(n) for n in unknown]
    if None in own or set(own) & set(known.values()):
        own = sorted(set(range(1, 256)) - set(known.values()))[: len(unknown)]
    if len(own) < len(unknown):
        raise UserError(f"{path}: with it, the masks have more than 255 objects; give fewer")
    known.update(zip(unknown, own, strict=True))
    return [known[n] for n in numbers]


# ---------------------------------------------------------------------------------------------------------------------
# What to do: the frames, the annotations, and what is already there


class Camera:
    """A camera as a video: each frame is kept in `folder`, and its time, so that the film can be made afterwards."""

    live, names, pictures = True, (), ()  # neither is known before

    def __init__(self, number: int, folder: Path):
        self.source, self.folder, self.times = f"camera {number}", folder, {}
        self.capture = cv2.VideoCapture(number)
        ok, self.first = self.capture.read()
        if not ok:
            raise UserError(f"--video {number}: no camera of this number gives pictures; try another number, or a file")
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

    def check(self, indices: Sequence[int]) -> None:
        """There is nothing to look at beforehand."""

    def recorded(self) -> Video:
        """What was kept."""
        video = Video(self.folder)
        video.times = self.times
        return video


def need_window() -> None:
    """Refuse where no window can be opened; tried in a process of its own, since a missing display aborts."""
    probe = "import cv2; cv2.namedWindow('softcopy'); cv2.waitKey(1)"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        raise UserError("--show: no window can be opened here; run it on a desktop, or leave --show out")


def open_video(args: Args) -> tuple[Video | Camera, range, Path]:
    """The video, the frames of it to use in the order in which they are run, and the folder for the results."""
    if not args.video:
        raise UserError("--video: missing; give a film, a folder of pictures or the number of a camera (see --help)")
    if args.show:
        need_window()
    path = Path(os.path.realpath(args.video))
    if not args.video.isdigit() or path.exists():
        video = Video(args.video)
        name = path.stem if path.is_file() else path.name if path.is_dir() else path.parent.name  # of a glob
        return video, choose_frames(args, len(video)), args.out or Path("results") / name
    if args.start or args.every != 1 or args.reverse or any(args.mask_frame):
        raise UserError("--start, --every, --reverse, --mask-frame: a camera runs from its first frame on; omit them")
    if args.end is not None and args.end < 2:
        raise UserError(f"--end {args.end}: give 2 or more, or stop the camera with q")
    out = args.out or Path("results") / f"camera{args.video}"
    return Camera(int(args.video), out / "frames"), range(args.end or 10**9), out


def choose_frames(args: Args, length: int) -> range:
    """Indices of the frames to use, in the order in which they are run."""
    if args.every < 1:
        raise UserError(f"--every {args.every}: give 1 or more")
    chosen = range(length)[args.start : args.end : args.every]
    if not chosen or args.start < 0:
        span = f"--start {args.start}" + (f" --end {args.end}" if args.end is not None else "")
        raise UserError(f"{span}: no frame is left of the {length} in {args.video}")
    return chosen[::-1] if args.reverse else chosen


def read_points(path: Path, size: tuple[int, int]) -> dict[int | None, dict[str, tuple[float, float]]]:
    """A CSV file with the columns id,x,y and maybe frame -> the position of each id in pixels, by frame (None without
    that column). A line without x and y is a point that is lost, as a run writes it."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file; give a CSV file with the columns id,x,y")
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            columns, rows = list(table.fieldnames or ()), list(table)
        if missing := {"id", "x", "y"} - set(columns):
            raise KeyError(sorted(missing)[0])
        if unknown := set(columns) - {"frame", "id", "x", "y"}:
            raise UserError(f"{path}: column {sorted(unknown)[0]!r} is not known; give id,x,y and, if you like, frame")
        whole = [row for row in rows if row["x"] != "" or row["y"] != ""]
        where = [(int(row["frame"]) if "frame" in columns else None, row["id"]) for row in whole]
        points = {key: (float(row["x"]), float(row["y"])) for key, row in zip(where, whole, strict=True)}
        if any(None in row for row in rows):
            raise ValueError("a line has more cells than the header")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a CSV file with the columns id,x,y"
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a table id,x,y with a header line and numbers ({error})") from error
    if not points:
        raise UserError(f"{path}: holds no points; give one line for each")
    if len(points) < len(whole):
        raise UserError(f"{path}: names an id twice" + " in a frame" * ("frame" in columns) + "; keep one line of it")
    frames: dict = {}
    for (index, name), (x, y) in points.items():
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise UserError(f"{path}: point {name} at {x:g},{y:g} lies outside the frame ({size[1]}x{size[0]} pixels)")
        frames.setdefault(index, {})[name] = (x, y)
    return frames


@dataclass
class Annotations:
    """What is annotated, of all masks or tables together."""

    size: tuple[int, int]  # H, W of the frames
    frames: dict[int, np.ndarray]  # frame -> mask H x W, or points J x 2, -1 where a table does not name one
    ids: list
    palette: np.ndarray = field(default_factory=PALETTE.copy)
    renamed: dict[str, int] = field(default_factory=dict)  # a mask's colour, or value above 255 -> its id
    starts: list[int] = field(default_factory=list)  # the frames that stretches start from

    @property
    def points(self) -> bool:
        return any(known.dtype != np.uint8 for known in self.frames.values())

    @property
    def laid_over(self) -> list[int]:
        """The frames in the middle of a stretch (--partial): what they name is laid over what is predicted."""
        return [index for index in self.frames if index not in self.starts]

    @functools.cached_property
    def named(self) -> dict[int, np.ndarray]:
        """Annotated frame -> which of the ids it names, bool."""
        each = self.frames.items()
        return {index: known[:, 0] >= 0 if self.points else np.isin(self.ids, known) for index, known in each}

    def new(self, order: range) -> dict[int, np.ndarray]:
        """Annotated frame -> which of the ids it is the first to name; in the order of the run."""
        before, new = np.zeros(len(self.ids), bool), {}
        for index in sorted(self.frames, key=order.index):
            new[index] = self.named[index] & ~before
            before |= new[index]
        return new

    def labels(self, index: int, s: Propagation) -> Tensor:
        """The soft labels of an annotated frame, L x h x w."""
        known, grid = self.frames[index], s.grid(*self.size)
        if self.points:
            return labels_from_points(known, self.size, grid)
        return labels_from_mask(torch.from_numpy(known), self.ids, grid, s.sampling)


def annotate(args: Args, video: Video | Camera, order: range) -> Annotations:
    """Read what is annotated."""
    if bool(args.mask) == bool(args.points):
        raise UserError(
            "--mask or --points: give one of them, to say what to track; no mask yet? Draw one: "
            f"python examples/draw_mask.py {args.video} mask.png"
        )
    files = place_files(args, video, order)
    annotations = read_tables(args, video, files) if args.points else read_masks(video, files)
    for index in annotations.frames:
        if video.live and index:
            raise UserError(f"annotated frame {index}: a camera runs from its first frame on; annotate frame 0")
        if index not in order:
            used = f"{min(order)} to {max(order)}" + (f", every {args.every}" if args.every > 1 else "")
            raise UserError(f"annotated frame {index}: is not among the frames used ({used})")
    starts = annotations.frames
    annotations.starts = [min(starts, key=order.index)] if args.partial else list(starts)
    return annotations


@reading()
def place_files(args: Args, video: Video | Camera, order: range) -> list[tuple[Path, int]]:
    """(file, frame) for each mask or table: that of --mask-frame, the first one, or in a folder the frame of its
    name."""
    given, frames, names = args.mask or args.points, args.mask_frame, video.names
    pictures = {os.path.realpath(path) for path in video.pictures if args.mask}
    pictures |= {str(Path(path).parent) for path in pictures}
    for path in given:
        if os.path.realpath(split_id(path)[0]) in pictures:
            raise UserError(f"{path}: lies among the frames of --video and would be taken for one; move it elsewhere")
    number = {name: i for i, name in enumerate(names)}
    if any(path.is_dir() for path in given):
        if len(given) > 1 or frames or args.points:
            raise UserError(f"{given[0]}: is a folder, whose masks belong to the frames of their names; give it alone")
        return place_folder(given[0], number, order)
    if frames and len(frames) != len(given):
        raise UserError(f"--mask-frame: {len(frames)} frame(s) for {len(given)} mask(s) or table(s); give one for each")
    files = list(zip(given, frames or [order[0]] * len(given), strict=True))
    for path, frame in files:
        other = number.get(path.stem, frame)
        if other != frame and frame < len(names):
            what = f"is named as frame {other}, but laid on frame {frame} ({names[frame]})"
            say(f"{path}: {what}; --mask-frame {other} lays it there")
    return files


def place_folder(folder: Path, number: dict[str, int], order: range) -> list[tuple[Path, int]]:
    """As place_files, for a folder of masks; number: of each frame, by its name. 7.png is of frame 00007, too."""
    number = {int(name): i for name, i in number.items() if name.isdecimal()} | number
    files, left = [], []
    for path in sorted(listed(folder)):
        if path.suffix.lower() in PICTURES:
            frame = number.get(path.stem, number.get(int(path.stem) if path.stem.isdecimal() else None))
            if frame in order:
                files.append((path, frame))
            else:
                left.append(path.name)
    if not files:
        raise UserError(f"{folder}: no mask in it has the name of a frame that is used; name it as its frame")
    if left:
        say(f"{folder}: {len(left)} of its masks are of no frame used: {brief(left)}")
    return files


def brief(words: Sequence, most: int = 8) -> str:
    return ", ".join([str(word) for word in words[:most]] + ["..."] * (len(words) > most))


def read_tables(args: Args, video: Video | Camera, files: list[tuple[Path, int]]) -> Annotations:
    """The key points. One that a table does not name is lost in its frame."""
    frames: dict[int, dict] = {}
    for path, place in files:
        for own, points in read_points(path, video.size).items():
            if own is not None and args.mask_frame:
                raise UserError(f"--mask-frame: {path} has a column `frame`; leave one of them away")
            index = place if own is None else own
            if index in frames:
                raise UserError(f"{path}: frame {index} has a table already; give one for each frame")
            frames[index] = points
    ids = list(dict.fromkeys(name for points in frames.values() for name in points))
    places = {index: np.array([points.get(name, (-1, -1)) for name in ids]) for index, points in frames.items()}
    return Annotations(video.size, places, ids)


def read_masks(video: Video | Camera, files: list[tuple[Path, int]]) -> Annotations:
    """The masks, several of one frame merged. An object has one id in all masks, and the last palette all their
    colours."""
    frames, known, kinds, palette, plain = {}, {}, {}, PALETTE.copy(), {}
    for path, index in files:
        path, number = split_id(path)
        mask = load_mask(path, known, video.size)
        kinds.setdefault(mask.kind, path)
        merged = frames.setdefault(index, np.zeros_like(mask.ids))
        objects = [int(n) for n in np.unique(mask.ids) if n]
        if number and len(objects) > 1:
            raise UserError(f"{path}={number}: holds {len(objects)} objects; =ID is for a mask of one object")
        if mask.kind == "black and white":
            number = number or next(n for n in range(1, 256) if not (merged == n).any())
            plain[path] = number
        else:
            palette = mask.palette
        if number and objects:
            mask.ids[mask.ids > 0] = number
            objects = [number]
        if twice := [n for n in objects if (merged == n).any()]:
            what = f"object {twice[0]} of frame {index} is in another mask too"
            raise UserError(f"{path}: {what}; --mask {path}=ID renames it")
        if lost := int(((merged > 0) & (mask.ids > 0)).sum()):
            say(f"{path}: covers {lost} pixels of the masks given before it for this frame")
        np.copyto(merged, mask.ids, where=mask.ids > 0)
    kinds.pop("empty", None)
    if not kinds:
        raise UserError(f"{files[0][0]}: is empty, all of it is background; paint each object in a value of its own")
    renamed = {}
    for numbered in ("colours", "values above 255"):
        other = [path for kind, path in kinds.items() if not kind.endswith(numbered)]  # VOC colours are colours
        if numbered in kinds and other:
            raise UserError(
                f"{kinds[numbered]}: has {numbered}, which get ids of their own, but {other[0]} has not; save both in "
                "one way, so that an object has one id"
            )
        if numbered in kinds:
            renamed = {f"#{value:06x}" if numbered == "colours" else str(value): n for value, n in known.items()}
            which = brief([f"{value} is {number}" for value, number in renamed.items()])
            say(f"the masks' {numbered.split()[0]} get ids: {which}")
    if len(plain) > 1 or (plain and len(kinds) > 1):
        which = brief([f"{path} is object {number}" for path, number in plain.items()])
        say(f"black and white masks: {which}; --mask FILE=ID gives another id")
    ids = sorted({int(n) for mask in frames.values() for n in np.unique(mask)} - {0})
    if kinds.keys() == {"black and white"} and len(ids) == 1:
        palette[ids] = 255  # black and white gives black and white
    return Annotations(video.size, frames, ids, palette, renamed)


def split_id(path: Path) -> tuple[Path, int | None]:
    """mask.png=2 -> the file and the id that is given to its object."""
    found = re.fullmatch(r"(.+)=(\d+)", str(path))
    if not found or path.exists():
        return path, None
    if not 1 <= int(found[2]) <= 255:
        raise UserError(f"--mask {path}: an id is a number from 1 to 255")
    return Path(found[1]), int(found[2])


def introduce(mask: np.ndarray, index: int, name: str, s: Propagation) -> None:
    """Say what a mask holds, and what of it looks like a mistake."""
    ids, pixels = np.unique(mask[mask > 0], return_counts=True)
    found = ", ".join(f"{number} ({count} pixels)" for number, count in zip(ids, pixels, strict=True))
    name = f" ({name})" if name else ""
    print(f"objects in frame {index}{name}: {found or 'none'}", file=sys.stderr)
    cell = mask.size / math.prod(s.grid(*mask.shape))
    whole = s.input_size(*mask.shape)[0] >= s.upsample * mask.shape[0]  # --size never enlarges
    more = f"--upsample {2 * s.upsample}" if whole else "a larger --size"
    for number, count in zip(ids, pixels, strict=True):
        if all((edge == number).any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
            say(f"object {number} touches all four borders; is it the background?")
        elif count < cell:
            say(f"object {number} is less than a cell of the grid, so it may be lost; {more} keeps it")


def introduce_all(annotations: Annotations, order: range, video: Video | Camera, args: Args) -> None:
    """Say what is annotated where, and what a later annotation leaves out."""
    before = np.zeros(len(annotations.ids), bool)
    for index in sorted(annotations.frames, key=order.index):
        if not args.points:
            name = video.pictures[index].name if video.pictures else ""
            introduce(annotations.frames[index], index, name, args.propagation)
        missing = list(itertools.compress(annotations.ids, before & ~annotations.named[index]))
        if missing and not args.partial:
            what = f"leaves out {brief(missing)}, which is gone from there on"
            say(f"the annotation of frame {index} {what}; --partial keeps what it does not name")
        before |= annotations.named[index]


def check_topk(settings: Propagation, size: tuple[int, int], annotated: int) -> None:
    """Refuse a k beyond the context cells that there are to choose from."""
    if settings.localization in ("window", "predicted"):  # their presets take all there is
        return
    h, w = settings.grid(*size)
    cells = h * w
    if settings.localization == "fixed":
        r = min(settings.radius, max(h, w))
        region = compute_masks(settings, Box(0, 2 * r + 1, 0, 2 * r + 1), Box(r, r + 1, r, r + 1), "cpu")
        cells = min(cells, int(region.sum()))
    frames = annotated + settings.context if settings.aggregation == "overall" else 1
    if settings.topk > cells * frames:
        raise UserError(
            f"--topk {settings.topk}: only {cells} cells of {frames} context frame(s) are searched; "
            f"give {cells * frames} or less"
        )


def check_memory(s: Propagation, size: tuple[int, int], annotated: int, objects: int) -> None:
    """Refuse a grid that is too coarse, or more than this machine's memory holds."""
    (H, W), (h, w) = s.input_size(*size), s.grid(*size)
    if min(h, w) < 2:
        raise UserError(f"--size {s.size}: is a grid of {h}x{w} cells, too coarse to follow anything; enlarge it")
    frames = annotated + s.context + (s.memory == "spaced")
    need = h * w * frames * (256 + objects + 1) * 4 + H * W * 64 * 4  # the context, and the first stage of a ResNet
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return
    if need > memory:
        raise UserError(
            f"--size {s.size} --upsample {s.upsample} --context {s.context}: an input of {H}x{W} and {frames} frames "
            f"of {h}x{w} cells take about {need / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}; give less"
        )


def open_job(out: Path, job: dict, overwrite: bool, live: bool) -> dict:
    """Write run.json and give what it holds; refuse to mix with results of another job, so that nothing computed is
    lost or mislabelled. A camera's recording always replaces what is there."""
    try:
        record = json.loads((out / "run.json").read_text())
        before = record["job"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    for name in ("masks", "points.csv", "labels", *["frames"] * live) if before is None else ():
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
        for path in (out / "labels").glob("*.npz"):
            path.unlink()
        for name in ("points.csv", "overlay.mp4", "contact_sheet.jpg"):
            (out / name).unlink(missing_ok=True)
    if before != job:
        record = {"job": job}
        write_json(out / "run.json", record)
    return record


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def check_dtype(dtype: str, device: str) -> None:
    """Refuse float16 on a CPU, and say where bfloat16 is slow."""
    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())  # no GPU is touched before a fork
    if cpu and dtype == "float16":
        raise UserError("--dtype float16: needs a GPU; take bfloat16 on this device")
    if cpu and dtype == "bfloat16" and not has_bfloat16() and not common.rank_world()[0]:
        say("--dtype bfloat16: this CPU converts each number, many times slower than float32")


def check_range(dtype: str, l2: bool) -> None:
    """Refuse float16, whose largest number is 65504, for features that are not normalised."""
    if dtype == "float16" and not l2:
        raise UserError("--dtype float16: may be too small for affinities of features without --l2; take bfloat16")


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; True where torch cannot tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return known.get("architecture") != "x86_64" or any(known.get(kind) for kind in ("avx512_bf16", "amx_bf16"))


def load_tracker(args: Args, video: Video | Camera, annotations: Annotations):
    """What labels the frames, an encoder or an engine. UserError where it cannot do what is asked for."""
    s, count = args.propagation, len(annotations.frames)
    if args.engine:
        import export  # it imports this module

        check_engine(args, export.engine_info(args.engine), annotations)
        return export.load_engine(args.engine, args.device)
    if annotations.points and s.localization == "track":
        raise UserError("--localization track: follows masks, these are key points; take --localization none or fixed")
    own = replace(common.preset(args.model), refine=REFINE)
    for factor in ("sampling", "minmax", "refine") if annotations.points else ():
        if getattr(s, factor) != getattr(own, factor):
            raise UserError(f"--{factor}: is about masks, these are key points; leave it out")
    check_dtype(args.dtype, args.device)
    check_range(args.dtype, s.l2)
    check_memory(s, video.size, count, len(annotations.ids))
    check_topk(s, video.size, count)
    encoder = common.load_encoder(args.model, args.weights, s, args.device, args.dtype)
    if not video.live:  # the pool does the work; a camera cannot be read ahead, so all threads encode its frame
        torch.set_num_threads(1)
    return encoder


def describe_job(args: Args, video: Video | Camera, annotations: Annotations, tracker) -> dict:
    """What a run's results depend on: a run with another one does not go on with them."""

    def digest(path: Path | None) -> str | None:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path and path.is_file() else None

    content, weights = None, None
    if not video.live:  # the first picture stands for all: a later one that is broken may be replaced
        file = Path(video.pictures[0] if video.pictures else video.source).stat()
        content = f"{len(video)} frames, {file.st_size} bytes, changed {datetime.fromtimestamp(file.st_mtime)}"
    if not args.engine:
        weights = args.weights or common.find_weights(args.model)
    job = {
        "video": video.source if video.live else os.path.realpath(args.video),
        "content": content,
        "frames": [args.start, args.every, *(["from", args.end] if args.reverse else [])],  # a later --end adds to it
        "annotations": {str(k): hashlib.sha256(v.tobytes()).hexdigest()[:16] for k, v in annotations.frames.items()},
        "ids": annotations.ids,
        "model": args.model,
        "weights": digest(weights),
        "dtype": tracker.info["dtype"] if args.engine else args.dtype,
        "settings": asdict(args.propagation),
    }
    if args.engine:
        job["engine"] = digest(args.engine)
    if annotations.renamed:
        job["renamed"] = annotations.renamed
    if args.partial and len(annotations.frames) > 1:
        job["partial"] = True
    if not all(map(all, annotations.named.values())):
        job["late objects"] = "looked for in the frames before"  # earlier versions did not
    return job


# ---------------------------------------------------------------------------------------------------------------------
# The run: reading, extracting, propagating and writing overlap


class Stopwatch(Counter):
    """Seconds by stage; a stage inside another counts for itself alone."""

    inside = 0.0

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start, before, self.inside = time.perf_counter(), self.inside, 0.0
        yield
        spent = time.perf_counter() - start
        self[stage] += spent - self.inside
        self.inside = before + spent

    def each(self, stage: str, items: Iterator) -> Iterator:
        """The same items; waiting for them is `stage`."""
        while True:
            with self.time(stage):
                item = next(items, None)
            if item is None:
                return
            yield item


Answer = tuple[int, np.ndarray, np.ndarray, Tensor | None]  # index, frame, mask or points, soft labels


class Results:
    """What whole frames got, written by a thread: a mask or points, and the soft labels of the latest frames and of
    those that --partial lays over (in .state/), from which a stopped run goes on exactly as if it had not stopped."""

    def __init__(self, args: Args, out: Path, video: Video | Camera, order: range, annotations: Annotations):
        self.out, self.names, self.labels, self.annotations = out, video.names, args.save_labels, annotations
        self.ids, self.palette, self.points = annotations.ids, annotations.palette, annotations.points
        s = args.propagation
        self.keep = 0 if video.live else len(order) if needs_history(s) else s.context  # states
        self.pool, self.pending, self.csv = ThreadPoolExecutor(1), deque(), out / "points.csv"
        states = sorted((out / ".state").glob("*.npy"), key=lambda path: path.stat().st_mtime_ns)
        self.always = {self.state_path(index) for index in annotations.laid_over}
        self.states = deque(path for path in states if path not in self.always)
        self.table: dict[int, np.ndarray] = {}  # frame -> J x 2 positions, -1 where lost
        if self.points and self.csv.is_file():
            lines = self.csv.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            for index, name, x, y in csv.reader(line for line in lines if line[-1] == "\n"):  # the last may be torn
                place = self.table.setdefault(int(index), np.full((len(self.ids), 2), np.nan))
                place[self.ids.index(name)] = (x, y) if x else (-1, -1)
            self.table = {index: place for index, place in self.table.items() if not np.isnan(place).any()}
        if self.points:
            self.write_points(self.table)

    def name(self, index: int) -> str:
        return self.names[index] if self.names else f"{index:05d}"

    def mask_path(self, index: int) -> Path:
        return self.out / "masks" / f"{self.name(index)}.png"

    def labels_path(self, index: int) -> Path:
        return self.out / "labels" / f"{self.name(index)}.npz"

    def state_path(self, index: int) -> Path:
        return self.out / ".state" / f"{index:05d}.npy"

    def has(self, index: int) -> bool:
        if self.labels and not self.labels_path(index).is_file():
            return False
        return index in self.table if self.points else self.mask_path(index).is_file()

    def read(self, index: int) -> np.ndarray:
        return self.table[index] if self.points else read_ids(self.mask_path(index))

    def add(self, index: int, answer: np.ndarray, labels: Tensor | None) -> None:
        """Write what a frame got: its mask (H x W) or points (J x 2), and its soft labels where they are wanted."""
        self.pending.append(self.pool.submit(self._write, index, answer, labels))
        while len(self.pending) > 4:
            self.pending.popleft().result()

    def _write(self, index: int, answer: np.ndarray, labels: Tensor | None) -> None:
        labels = None if labels is None else labels.float().cpu().numpy()
        if self.labels:
            with atomic(self.labels_path(index)) as temporary, temporary.open("wb") as file:
                about = {"ids": np.array(self.ids), "size": self.annotations.size}
                np.savez_compressed(file, labels=labels.astype(np.float16), **about)
        if labels is not None and self.keep and index not in self.annotations.starts:
            path = self.state_path(index)
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, labels)
            if path not in self.always:
                self.states.append(path)
            while len(self.states) > self.keep + 1:  # one more: a frame's answer comes after its state
                self.states.popleft().unlink(missing_ok=True)
        if self.points:
            self.table[index] = np.round(answer.astype(float), 2)  # as it is written: a run that goes on has no more
            with writing(self.csv), self.csv.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(self.rows([index]))
        else:
            write_mask(self.mask_path(index), answer, self.palette)

    def flush(self) -> None:
        while self.pending:
            self.pending.popleft().result()

    def rows(self, order: Iterable[int]) -> Iterator[list]:
        for index in order:
            for name, (x, y) in zip(self.ids, self.table[index], strict=True):
                yield [index, name, *(("", "") if x < 0 else (f"{x:.2f}", f"{y:.2f}"))]

    def write_points(self, order: Iterable[int]) -> None:
        with atomic(self.csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["frame", "id", "x", "y"], *self.rows(order)])

    def finish(self, backwards: bool, whole: bool) -> None:
        """Bring the table of points into order; where there is nothing to go on with, drop the state."""
        if self.points:
            self.write_points(sorted(self.table, reverse=backwards))
        if whole:
            shutil.rmtree(self.out / ".state", ignore_errors=True)


def segments(order: range, annotated: Iterable[int]) -> list[range]:
    """The stretches that are run one by one: backwards from the first annotated frame, then onwards from each one.

    A stretch starts afresh with its annotated frame, so that what went wrong before a correction ends there.
    """
    places = sorted(order.index(index) for index in annotated)
    onwards = [order[a:b] for a, b in zip(places, [*places[1:], len(order)], strict=True)]
    return ([order[places[0] :: -1]] if places[0] else []) + onwards


def label_video(encoder, video: Video | Camera, order: range, results: Results, clock: Stopwatch) -> Iterator[Answer]:
    """Label every frame that has no result yet.

    The frames that stretches start from are in the context of all stretches for good. An object that comes later than
    such a frame is looked for in it.

    Who does what, on a CPU: a thread decodes a few frames ahead (read_ahead), the pool encodes them (encode_ahead) and
    labels tiles of the target (propagate_labels), this thread enlarges the labels, and a thread of `results` writes.
    """
    s, device, annotations = encoder.settings, encoder.mean.device, results.annotations
    ids, size = annotations.ids, annotations.size
    labels = {index: annotations.labels(index, s).to(device) for index in annotations.frames}
    named, new = (
        {index: torch.tensor([False, *each], device=device) for index, each in flags.items()}
        for flags in (annotations.named, annotations.new(order))
    )
    given = {index: (labels[index], named[index], new[index]) for index in annotations.laid_over}  # see propagate_video
    # Where each point lies from what its labels on the grid give back (J x 2, pixels), nan where it is not named.
    places = annotations.frames.items() if results.points else ()
    offsets = {i: np.where(known >= 0, known - points_from_labels(labels[i], size), np.nan) for i, known in places}
    usual = latest_offset(offsets, annotations.starts)

    def encode(frame: np.ndarray | Tensor) -> Tensor:
        return encoder(torch.as_tensor(frame, device=device)[None])[0]

    def features(todo: Sequence[int], read: deque, clock: Stopwatch) -> Iterator[Tensor]:
        """Those of each frame, which goes to `read`; ahead of time where the frames are there and a CPU encodes."""
        frames = clock.each("read", read_ahead(video.frames(todo)))
        frames = ((*item, torch.as_tensor(item[1], device=device)) for item in frames)  # sent to a GPU once
        shared = device.type == "cpu" and not video.live
        for item, f in clock.each("extract", encode_ahead(lambda item: encode(item[2]), frames, shared)):
            read.append(item)
            yield f

    def features_again(done: Sequence[int]) -> Iterator[Tensor]:
        """Those of frames that an earlier run has labelled."""
        read: deque = deque()
        found = features(done, read, Stopwatch())
        for index in done:
            f = next(found, None)
            if f is None or read.popleft()[0] != index:
                raise UserError(f"{video.source}: frame {index} cannot be read again; give the film as it was")
            yield f

    def state(index: int) -> Tensor:
        return torch.from_numpy(np.load(results.state_path(index))).to(device)

    def looked_back(before: tuple, index: int, f: Tensor, z: Tensor) -> tuple:
        """An earlier frame's (features, labels, ...), with the objects that the frame `index` is the first to name."""
        g, y, *mask = before
        return (g, hindsight(g, y, (f, z), new[index], s), *mask) if new[index].any() else before

    annotated = {}
    for part in segments(order, annotations.starts):
        rest = part[1:]
        done = next((i for i, index in enumerate(rest) if not results.has(index)), len(rest))
        if done == len(rest):
            continue
        for index, frame in video.frames(sorted(annotations.starts, key=order.index)) if not annotated else ():
            f, mask = encode(frame), annotations.frames[index]
            annotated = {other: looked_back(each, index, f, labels[index]) for other, each in annotated.items()}
            annotated[index] = f, labels[index], *([] if results.points else [label_numbers(mask, ids)])
        for index in annotations.starts:
            if index not in annotated:
                raise UserError(f"--mask-frame {index}: cannot be decoded from {video.source}; annotate another frame")
        # To go on, the labels of the targets from `back` on are looked at again, and before it those laid over.
        back = 0 if needs_history(s) else max(0, done - s.context)
        early = [index for index in rest[:back] if index in given and s.keep_first]
        if not all(results.state_path(index).is_file() for index in [*early, *rest[back:done]]):
            back, early, done = 0, [], 0  # its soft labels are gone: run this stretch from its annotated frame
        # Their features only of these: the latest, those laid over, and frame 5 (--memory spaced).
        latest = rest[max(0, done - s.context) : done]
        fifth = rest[4:5] if s.memory == "spaced" else ()
        again = [index for index in rest[back:done] if index in latest or index in given or index in fifth]
        known = features_again([*early, *again])
        others = [index for index in annotations.starts if index != part[0]]
        first = [annotated[index] for index in (part[0], *others)]
        for index in early:
            f, z = next(known), state(index)
            first = [*(looked_back(each, index, f, z) for each in first), (f, carried(z, s))]
        recent = ((next(known) if index in again else first[0][0], state(index)) for index in rest[back:done])
        targets, read = rest[back:], deque()
        later = {targets.index(index) + 1: each for index, each in given.items() if index in targets}
        labelled = propagate_video(features(rest[done:], read, clock), first, s, recent, later)
        shift = latest_offset(offsets, [part[0], *rest[:done]], usual)
        for z in clock.each("propagate", labelled):
            index, frame, picture = read.popleft()
            with clock.time("up-sample"):
                if results.points:
                    shift = latest_offset(offsets, [index], shift)
                    answer = shifted(points_from_labels(z, size), shift, size)
                else:
                    unnamed = z * ~named[index][:, None, None] if index in given else z
                    answer = mask_from_labels(unnamed, ids, size, s.minmax, picture, s.refine).cpu().numpy()
                if index in given:  # at full size, what is given is exactly as given
                    own = annotations.frames[index]
                    answer = np.where(own >= 0 if results.points else own > 0, own, answer)
            yield index, frame, answer, z


def latest_offset(
    offsets: dict[int, np.ndarray], frames: Iterable[int], before: np.ndarray | float = 0.0
) -> np.ndarray | float:
    """The offset of each point (J x 2, pixels) in the last of `frames` that names it, else as it was `before`. So a
    point keeps its place within its cell of the grid."""
    for index in frames:
        if index in offsets:
            before = np.where(np.isnan(offsets[index]), before, offsets[index])
    return before


def shifted(points: np.ndarray, shift: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The points (J x 2) moved by `shift`, within the frame; a lost one (-1, -1) stays so."""
    moved = np.clip(points + shift, 0, np.array(size[::-1]) - 1)
    return np.where(points >= 0, moved, points)


def label_numbers(mask: np.ndarray, ids: Sequence[int]) -> torch.Tensor:
    """A mask of ids -> the number of each pixel's label, as labels_from_mask counts them."""
    number = np.zeros(256, np.int64)
    number[list(ids)] = np.arange(1, len(ids) + 1)
    return torch.from_numpy(number[mask])


def check_engine(args: Args, info: dict, annotations: Annotations) -> None:
    """Refuse what --engine was not made for. info: what the file says of itself."""
    import export

    size, count, objects = annotations.size, len(annotations.frames), len(annotations.ids)
    fixed = export.engine_settings(args.engine, info)
    flags = {"model": (args.model, info["model"])}
    if args.weights:
        flags["weights"] = args.weights.name, info.get("weights")
    if args.dtype != Args.dtype:
        flags["dtype"] = args.dtype, info["dtype"]
    flags |= {flag: (value, getattr(fixed, flag)) for flag, value in asdict(args.propagation).items()}
    for flag, (value, own) in flags.items():
        if value != own:
            flag = flag.replace("_", "-")
            raise UserError(f"--{flag} {value}: is fixed in {args.engine} ({own}); leave it out or export anew")
    if args.points:
        raise UserError(f"--points: {args.engine} follows masks; give --mask, or run without --engine")
    if args.save_labels:
        raise UserError(f"--save-labels: {args.engine} gives masks alone; run without --engine")
    if count > 1:
        raise UserError(f"--mask: {args.engine} starts from one annotated frame, not {count}; give one")
    if size != (info["height"], info["width"]):
        raise UserError(
            f"{args.video}: is {size[1]}x{size[0]}, {args.engine} was made for {info['width']}x{info['height']}; "
            f"export with --height {size[0]} --width {size[1]}"
        )
    if objects > info["objects"]:
        raise UserError(
            f"--mask: has {objects} objects, {args.engine} follows {info['objects']}; export with --objects {objects}"
        )


def track_engine(engine, video: Video | Camera, order: range, results: Results, clock: Stopwatch) -> Iterator[Answer]:
    """As label_video, by an exported graph. A stopped run computes a stretch again from its annotated frame, since the
    graph's memory is not on disk."""
    masks, ids = results.annotations.frames, np.array([0, *results.ids], np.uint8)
    number = label_numbers(np.arange(256), results.ids).numpy().astype(np.uint8)  # the graph's ids are 1, 2, ...
    for part in segments(order, masks):
        if all(map(results.has, part)):
            continue
        for index, frame in clock.each("read", read_ahead(video.frames(part))):
            with clock.time("extract and propagate"):
                answer = ids[engine.step(frame, number[masks[index]] if index in masks else None)]
            if not results.has(index):
                yield index, frame, answer, None


def label_frames(args: Args, tracker, video: Video | Camera, order: range, results: Results, clock: Stopwatch) -> int:
    """Label and write all frames that have no result yet, and show them in the window; until the last, or q. How many
    it were."""
    annotations, made = results.annotations, 0
    for index in annotations.starts:
        if not results.has(index):
            labels = annotations.labels(index, args.propagation) if args.save_labels else None
            results.add(index, annotations.frames[index], labels)
    results.flush()
    before = len(annotations.starts) if video.live else sum(map(results.has, order))
    answers = (track_engine if args.engine else label_video)(tracker, video, order, results, clock)
    bar = tqdm(total=None if video.live else len(order), initial=before, unit="frame", desc=video.source)
    try:
        with torch.inference_mode(), bar, contextlib.closing(answers):
            for index, frame, answer, labels in answers:
                new = not results.has(index)
                bar.update(new)
                made += new
                with clock.time("write"):
                    results.add(index, answer, labels)
                if args.show and not show(draw(frame, answer, results)):
                    break
    except KeyboardInterrupt:
        if not video.live:  # a camera is stopped this way
            raise
    finally:
        results.flush()
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What people look at


def overlay(frame: np.ndarray, mask: np.ndarray, palette: np.ndarray = PALETTE, opacity: float = 0.5) -> np.ndarray:
    """The frame with its objects tinted in their palette colours and outlined."""
    tint = cv2.addWeighted(frame, 1 - opacity, palette[mask], opacity, 0)
    out = np.where(mask[..., None] > 0, tint, frame)
    width = max(1, round(min(mask.shape) / 240))
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((1 + width, 1 + width), np.uint8)) > 0
    out[edge & (mask > 0)] = 255
    return out


def draw(frame: np.ndarray, answer: np.ndarray, results: Results) -> np.ndarray:
    """The frame with its objects tinted, or its key points as dots."""
    if not results.points:
        white = (results.palette[results.ids] == 255).all()  # it would be hard to see
        return overlay(frame, answer, PALETTE if white else results.palette)
    picture, radius = frame.copy(), max(3, min(frame.shape[:2]) // 90)
    for number, (x, y) in enumerate(answer, 1):
        if x >= 0:
            centre, colour = (round(float(x)), round(float(y))), PALETTE[1 + (number - 1) % 255].tolist()
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
    wide = float(video.aspect) * W / H  # as it is shown
    thumbs, width = [], min(480, W)
    writer = film_writer(out / "overlay.mp4", video.fps, video.size, video.aspect)
    if not film:
        (out / "overlay.mp4").unlink(missing_ok=True)
        writer, order = contextlib.nullcontext(lambda *_: None), [index for index in order if index in chosen]
    with writer as append:
        for index, frame in tqdm(read_ahead(video.frames(order)), total=len(order), unit="frame", desc="overlay.mp4"):
            picture = draw(frame, results.read(index), results)
            append(picture, abs(video.times[index] - video.times[order[0]]))
            if index in chosen:
                thumb = cv2.resize(picture, (width, max(1, round(width / wide))), interpolation=cv2.INTER_AREA)
                name = video.names[index][-((width - 10) // 11) :]  # the end tells the frames apart
                cv2.rectangle(thumb, (0, 0), (11 * len(name) + 10, 24), (0, 0, 0), -1)
                cv2.putText(thumb, name, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255))
                thumbs.append(thumb)
    columns = 4 if wide >= 1 else 6
    thumbs += [np.full_like(thumbs[0], 255)] * (-len(thumbs) % columns if len(thumbs) > columns else 0)
    rows = [np.concatenate(thumbs[i : i + columns], 1) for i in range(0, len(thumbs), columns)]
    sheet = cv2.cvtColor(np.concatenate(rows), cv2.COLOR_RGB2BGR)
    with atomic(out / "contact_sheet.jpg") as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())


def list_models() -> None:
    """Print the table of models; the paper's score is J&F on DAVIS 2017 val, best without up-sampled input."""
    print(f"{'name':18} {'features':34} {'stride':>6}  {'paper J&F':>9}  weights")
    for name, system in systems().items():
        s = system.settings
        where = common.find_weights(name)
        where = f"found: {where}" if where else "-" if name == "random" else f"not here: {system.source}"
        features = ", ".join([f"{system.arch} {s.layer}", *list(system.head())[:1], *(["L2"] if s.l2 else [])])
        print(f"{name:18} {features:34} {s.stride:6}  {system.paper or '-':>9}  {where}; licence: {system.licence}")
    print("torchvision:NAME  any ResNet or VGG of torchvision     timm:NAME  any ResNet or ViT of timm (DINO, ...)")


# ---------------------------------------------------------------------------------------------------------------------


def write_record(args: Args, out: Path, record: dict, tracker, made: int, seconds: float, clock: Stopwatch) -> None:
    """Add to run.json how the frames were made, if any were."""
    if made:
        rates = {"whole run": seconds, **{stage: spent for stage, spent in clock.items() if spent > 0}}
        versions = {"softcopy": __version__, "python": platform.python_version(), "torch": torch.__version__}
        record = {
            "job": record["job"],
            "versions": versions | {"opencv": cv2.__version__, "av": av.__version__},
            "frames": made,
            "frames_per_second": {stage: round(made / spent, 2) for stage, spent in rates.items()},
            "ran_on": tracker.provider if args.engine else str(tracker.mean.device),
            "shown": record["shown"],
        }
    write_json(out / "run.json", record)


def main(args: Args) -> None:
    if args.list_models:
        return list_models()
    # What is asked for, checked before any long work.
    video, order, out = open_video(args)
    annotations = annotate(args, video, order)
    tracker = load_tracker(args, video, annotations)
    video.check(order)
    with writing(out):
        record = open_job(out, describe_job(args, video, annotations, tracker), args.overwrite, video.live)
    introduce_all(annotations, order, video, args)

    # The run.
    results, clock, start = Results(args, out, video, order, annotations), Stopwatch(), time.perf_counter()
    made = label_frames(args, tracker, video, order, results, clock)
    seconds = time.perf_counter() - start
    video = video.recorded()
    if video.broken:
        say(video.broken)
    done = [index for index in order[: len(video)] if results.has(index)]
    to_come = order if args.reverse else choose_frames(replace(args, end=None), len(video))
    results.finish(args.reverse, whole=all(map(results.has, to_come)))

    # What people look at, and the record.
    pictures, shown = ["overlay.mp4"] * args.film + ["contact_sheet.jpg"], [len(done), done[0], done[-1]]
    if made or record.get("shown") != shown or not all((out / name).is_file() for name in pictures):
        with clock.time("film"):
            make_pictures(out, video, done, results, args.film)
        record["shown"] = shown  # in the pictures: how many frames, the first, the last
        write_record(args, out, record, tracker, made, seconds, clock)
    what = f"{len(done)} frames of points.csv" if results.points else f"{len(done)} masks"
    speed = f"{made / seconds:.2f} frames/s" if made else "all was there"
    print(f"{out}: {', '.join([what, *pictures])}; {speed}")


def parse_with_model(args_type, argv: Sequence[str] | None = None, **changes):
    """Parse Args that have `propagation`. Its defaults are those of --model, without one those of the system that
    --weights is recognised as, with `changes`; with --engine model and settings are those that it was exported with."""
    default, peek = args_type(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--weights", "--dataset", "--engine"):
        peek.add_argument(flag, nargs="?", type=str if flag in ("--model", "--dataset") else Path)
    given = peek.parse_known_args(argv)[0]
    if given.engine:
        import export

        info = export.engine_info(given.engine)
        model, settings = info["model"], export.engine_settings(given.engine, info)
    else:
        model = given.model or default.model
        if given.weights and not given.model:  # without a sign of a system: a ResNet of torchvision's, most likely
            model = common.recognise(*common.read_weights(given.weights)) or "imagenet"
        settings = replace(common.preset(model, given.dataset), **changes)
    args = common.parse(args_type, argv, replace(default, model=model, propagation=settings))
    return replace(args, model=args.model.lower())


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """With --refine on."""
    return parse_with_model(Args, argv, refine=REFINE)


if __name__ == "__main__":
    import propagate  # the module that export imports: there is one of it

    common.run(propagate.main, propagate.parse_args)
