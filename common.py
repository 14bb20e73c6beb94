"""What every stage of softcopy shares: feature extractors, Algorithm 1 of the paper, frames and masks on disk.

The paper is McKee et al., "Transfer of Representations to Video Label Propagation: Implementation Factors
Matter" (2022). Words and shapes, the same everywhere:

    frame     H x W x 3 uint8 RGB       features  C x h x w         grid  h x w cells, stride 8 unless said
    mask      H x W uint8 ids           labels    L x h x w in [0, 1], label 0 is the background
    context   the annotated frame(s), then the latest n frames      target  the frame being labelled
"""

import argparse
import contextlib
import glob
import json
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image
from torch import Tensor, nn

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can put right. The message says what, where and what to do, in one line."""


def run(main, parse) -> None:
    """Run a script: what the user got wrong becomes one line on stderr and exit code 2, Ctrl-C one line and 130."""
    try:
        main(parse())
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(
            print("interrupted: what is written is whole; the same command goes on from here", file=sys.stderr) or 130
        )


# ---------------------------------------------------------------------------------------------------------------------
# The factors


@dataclass(frozen=True)
class Propagation:
    """Every factor that the paper studies (sections 2 and 4). The fields are flags of every script that propagates.

    The defaults are the paper's best for still-image features (section 4.3, "Strong image baselines"); what the
    paper leaves open was chosen on DAVIS train sequences (benchmarks/tuning.md).
    """

    size: str = "480"
    """Network input: short side in pixels (never enlarging), HxW exactly, or full (section 4.2)."""
    upsample: int = 1
    """Enlarge the input this many times for a finer grid (Table 6c)."""
    layer: Literal["res2", "res3", "res4"] = "res3"
    """Output stage: res2, res3, res4 are torchvision's layer2, layer3, layer4 (Table 2)."""
    stride: Literal[4, 8] = 8
    """Pixels per grid cell; 4 removes the max-pool (section 4.2)."""
    l2: bool = True
    """L2-normalise the feature vectors (section 4.2)."""
    aggregation: Literal["overall", "per-frame"] = "overall"
    """The k nearest over all context frames together, or k in each frame, averaged (section 2)."""
    softmax: Literal["auto", "topk", "region", "frame"] = "auto"
    """Normalise affinities over the k kept, the searched region (softmax after the mask), or the whole frame (softmax
    before the mask). auto is Algorithm 1: topk for overall, frame for per-frame."""
    temperature: float = 0.05
    """Affinities are divided by it before the softmax (the paper's 1/Temp is its inverse)."""
    topk: int = 10
    """Nearest neighbours kept, k."""
    context: int = 20
    """Latest frames in the context, n; the annotated frames come on top."""
    localization: Literal["none", "fixed"] = "fixed"
    """Search the whole frame, or a fixed region around the target cell (section 4.3)."""
    shape: Literal["circle", "square"] = "circle"
    """Fixed region: distance < radius, or |dx|, |dy| <= radius."""
    radius: int = 12
    """Radius of the fixed region, in grid cells."""
    exempt_first: bool = False
    """Search annotated frames as a whole, whatever the localization (as CRW's code does)."""
    minmax: bool = False
    """Stretch each label to 0..1 over the frame before the arg-max."""

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?|full", self.size):
            raise UserError(f"--size {self.size!r}: give the short side (480), height x width (480x854), or full")
        for flag, least in (("upsample", 1), ("topk", 1), ("context", 0), ("radius", 1)):
            if getattr(self, flag) < least:
                raise UserError(f"--{flag} {getattr(self, flag)}: give {least} or more")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature {self.temperature}: give a number above 0; affinities are divided by it")

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the network's input for a frame of height x width pixels."""
        if self.size == "full":
            scaled = height, width
        elif "x" in self.size:
            scaled = tuple(int(side) for side in self.size.split("x"))
        else:
            scale = min(1.0, int(self.size) / min(height, width))
            scaled = round(height * scale), round(width * scale)
        return scaled[0] * self.upsample, scaled[1] * self.upsample

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of the features of a frame of height x width pixels."""
        return tuple(math.ceil(side / self.stride) for side in self.input_size(height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors


@dataclass(frozen=True)
class Model:
    """A row of MODELS: what a system's features are, where its weights come from, how its authors propagate."""

    arch: str  # torchvision's name
    about: str
    url: str | None = None  # a stable link; its file name ends in the first 8 digits of the SHA-256
    licence: str = ""
    paper: float | None = None  # best J&F on DAVIS 2017 val in the paper, grid 1x (Table 6)
    settings: Propagation = Propagation()


TORCHVISION = "https://download.pytorch.org/models/"
MODELS = {
    "imagenet": Model(
        "resnet18", "ImageNet classification", TORCHVISION + "resnet18-f37072fd.pth", "none stated", paper=65.8
    ),
    "imagenet-r50": Model("resnet50", "ImageNet classification", TORCHVISION + "resnet50-0676ba61.pth", "none stated"),
    "random": Model("resnet18", "no training: random weights from seed 0, for comparison"),
}


class Encoder(nn.Module):
    """Frames in, features out. Resizing and normalisation are inside, so an exported graph needs nothing else."""

    def __init__(self, arch: str, settings: Propagation):
        super().__init__()
        self.settings = settings
        resnet = torchvision.models.get_model(arch, weights=None)
        stages = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
        stages = stages[: stages.index(settings.layer.replace("res", "layer")) + 1]
        for stage in stages[6:]:  # at stride 8 the stages after layer2 no longer reduce (section 4.2)
            for conv in getattr(resnet, stage)[0].modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
        if settings.stride == 4:
            stages.remove("maxpool")
        self.net = nn.Sequential(OrderedDict((stage, getattr(resnet, stage)) for stage in stages))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """frames B x H x W x 3 uint8 RGB -> features B x C x h x w in the encoder's precision."""
        height, width = frames.shape[1:3]
        x = frames.permute(0, 3, 1, 2).to(self.mean.dtype) / 255  # B 3 H W
        if (size := self.settings.input_size(height, width)) != (height, width):
            x = F.interpolate(x, size=size, mode="bilinear", antialias=size[0] < height)
        x = self.net((x - self.mean) / self.std)
        return F.normalize(x, dim=1) if self.settings.l2 else x


def load_encoder(
    name: str,
    weights: str | Path | None = None,
    settings: Propagation | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Encoder:
    """The extractor of a system of MODELS, in eval mode, BatchNorm folded into the convolutions.

    weights: a file; without it weights/, then torch hub's cache are searched, then the system's link is fetched.
    Files may lack the stages after settings.layer. Raises UserError for what is unknown, missing or does not fit.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    model, device, dtype = MODELS[name], pick_device(device), getattr(torch, dtype)
    if name == "random" and weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = Encoder(model.arch, settings or model.settings)
    else:
        path = Path(weights) if weights else find_weights(name)
        state = read_weights(path)
        arch = {"resnet18": "resnet50", "resnet50": "resnet18"}[model.arch]
        if ("layer1.0.conv3.weight" in state) != (model.arch == "resnet50"):
            raise UserError(f"{path}: holds a {arch}, but {name} is a {model.arch}; take a --model of that size")
        encoder = Encoder(model.arch, settings or model.settings)
        missing, wrong = [], []
        for key, value in encoder.net.state_dict().items():
            if key not in state:
                missing += [] if key.endswith("num_batches_tracked") else [key]
            elif state[key].shape != value.shape:
                wrong.append(f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}")
        if missing or wrong:
            why = f"lacks {len(missing)} entries, such as {missing[0]}" if missing else wrong[0]
            raise UserError(f"{path}: does not fit {name} ({model.arch} up to {encoder.settings.layer}): it {why}")
        encoder.net.load_state_dict(state, strict=False)
    fold_batchnorm(encoder.eval().requires_grad_(False))
    return encoder.to(device, dtype).to(memory_format=torch.channels_last)


def pick_device(name: str) -> torch.device:
    """auto is the GPU where there is one, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); take auto, cpu or cuda") from error


def find_weights(name: str, fetch: bool = True) -> Path | None:
    """The weights file of a model: weights/, torch hub's cache, or fetched (with progress, and its hash checked)."""
    url = MODELS[name].url
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    for folder in (Path("weights"), Path(__file__).parent / "weights", hub):
        if (path := folder / Path(url or f"{name}.pth").name).is_file():
            return path
    if not fetch or not url:
        return None
    print(f"fetching the weights of {name} from {url}", file=sys.stderr)
    path = hub / Path(url).name
    try:
        hub.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"weights of {name}: could not be fetched ({error}); download {url} to weights/ or give --weights FILE"
        ) from error
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under torchvision's key names. Never runs code from the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check --weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "GLOBAL" in str(error):  # the unpickler's word for a function or class that it will not touch
            raise UserError(
                f"{path}: refused, it holds pickled code beside tensors; save its state_dict alone"
            ) from error
        raise UserError(f"{path}: is not a PyTorch checkpoint, or is damaged; download it again") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors); save model.state_dict() with torch.save")
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def fold_batchnorm(module: nn.Module) -> None:
    """Replace every convolution and the BatchNorm after it by one convolution with the same output."""
    for parent in list(module.modules()):
        for (name, conv), (after, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, nn.Identity())


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def propagate_labels(
    target: Tensor, features: Tensor, labels: Tensor, settings: Propagation, annotated: int = 1
) -> Tensor:
    """Algorithm 1 of the paper for one target frame: each cell copies the labels of its k nearest context cells.

    target    C x h x w      features of the target frame
    features  n x C x h x w  features of the context frames, the `annotated` ones first
    labels    n x L x h x w  their soft labels
    returns   L x h x w      soft labels of the target frame, float32

    Exact, but the (h w) x (n h w) affinity matrix is never formed: a tile of target cells meets only the window of
    context cells that its search regions cover. Fastest when features are a view of an h x w x n x C tensor, as
    propagate_video keeps them: then a window is read in place.
    """
    s = settings
    n, C, h, w = features.shape
    overall = s.aggregation == "overall"
    norm = s.softmax if s.softmax != "auto" else ("topk" if overall else "frame")
    query = target.permute(1, 2, 0)  # h w C
    keys = features.permute(2, 3, 0, 1).contiguous()  # h w n C: the n frames of a cell side by side
    values = labels.permute(2, 3, 0, 1).reshape(h * w * n, -1).float()  # an entry is (cell, frame), cell-major

    # The parts of the context that are searched together: all frames (overall) or each frame (per-frame).
    fixed = s.localization == "fixed"
    exempt = min(annotated, n) if s.exempt_first and fixed else 0
    edges = [0, exempt, n] if overall else range(n + 1)
    parts = [(a, keys[:, :, a:b], fixed and a >= exempt) for a, b in pairwise(edges) if a < b]
    parts = [(a, part.contiguous() if part.shape[2] > 1 else part, local) for a, part, local in parts]

    ty, tx = (12, 16) if target.device.type == "cpu" else (24, 32)  # caches like it small, a GPU few launches
    while (norm == "frame" or not all(local for *_, local in parts)) and h * w * n * ty * tx > 2**26:
        ty, tx = math.ceil(ty / 2), math.ceil(tx / 2)  # a window of the whole frame: keep the tile under 256 MiB
    z = torch.empty(h, w, values.shape[1], device=target.device)
    scratch = query.new_empty(0)
    for y0, y1 in cuts(h, ty):
        for x0, x1 in cuts(w, tx):
            q = query[y0:y1, x0:x1].reshape(-1, C)  # q C
            found = []
            for first, part, local in parts:
                reach = s.radius - (s.shape == "circle") if local and norm != "frame" else max(h, w)
                ya, yb, xa, xb = max(y0 - reach, 0), min(y1 + reach, h), max(x0 - reach, 0), min(x1 + reach, w)
                rows, cols, m = yb - ya, xb - xa, part.shape[2]
                if scratch.numel() < rows * cols * m * len(q):
                    scratch = query.new_empty(rows * cols * m * len(q))
                A = scratch[: rows * cols * m * len(q)].view(rows, cols * m, len(q))
                torch.bmm(part[ya:yb, xa:xb].flatten(1, 2), q.T.expand(rows, -1, -1), out=A)  # Eq. 1
                outside = beyond(s, (y0, y1, x0, x1), (ya, yb, xa, xb), A.device) if local else None
                best, cell, frame, total = nearest(A.view(rows * cols, m, len(q)), outside, s, norm)
                found.append((best, ((ya + cell // cols) * w + xa + cell % cols) * n + first + frame, total))
            if overall and len(found) > 1:  # the k best of the parts' k best
                best, entry, total = (torch.cat(each) for each in zip(*found, strict=True))
                best, order = best.topk(min(s.topk, len(best)), dim=0)
                found = [(best, entry.gather(0, order), total.logsumexp(0, keepdim=True))]
            weight = [best.softmax(0) if norm == "topk" else (best - total).exp() for best, _, total in found]
            weight = torch.cat(weight) / len(found)  # line 36: the mean over the frames searched by themselves
            entry = torch.cat([entry for _, entry, _ in found])
            copied = F.embedding_bag(  # the soft copy, line 33
                entry.T.contiguous(), values, per_sample_weights=weight.T.contiguous(), mode="sum"
            )
            z[y0:y1, x0:x1] = copied.view(y1 - y0, x1 - x0, -1)
    return z.permute(2, 0, 1)


def cuts(length: int, step: int) -> list[tuple[int, int]]:
    """Cut 0..length into even pieces of at most `step`."""
    pieces = math.ceil(length / step)
    return [(i * length // pieces, (i + 1) * length // pieces) for i in range(pieces)]


def beyond(s: Propagation, tile: tuple, window: tuple, device) -> Tensor:
    """Which window cells lie outside the fixed region of each tile cell: window cells x tile cells, bool."""
    (y0, y1, x0, x1), (ya, yb, xa, xb) = tile, window
    dy = (torch.arange(ya, yb, device=device)[:, None] - torch.arange(y0, y1, device=device)).square()
    dx = (torch.arange(xa, xb, device=device)[:, None] - torch.arange(x0, x1, device=device)).square()
    dy, dx = dy[:, None, :, None], dx[None, :, None, :]
    outside = dy + dx >= s.radius**2 if s.shape == "circle" else torch.maximum(dy, dx) > s.radius**2
    return outside.flatten(0, 1).flatten(1, 2)


def nearest(A: Tensor, outside: Tensor | None, s: Propagation, norm: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest affinities of each query. A: cells x frames x q, overwritten; outside: cells x q or None.

    Returns best (affinity / T), cell, frame, each k x q, and total, 1 x q: the log-sum-exp of affinity / T over
    the cells that the softmax is normalised over (unused where these are the k kept).

    The region does not depend on the frame, so the k best entries lie in the k best cells by their best frame: mask
    and search the cells' maxima, then only the k x frames entries behind the k best.
    """
    if norm != "topk":
        A = A.float()
    if norm == "region" and outside is not None:
        A.masked_fill_(outside[:, None], -math.inf)
    peak = A.amax(1)  # cells q
    top = peak.amax(0)
    if outside is not None:
        peak.masked_fill_(outside, -math.inf)
    k = min(s.topk, len(peak))
    peak, cell = peak.topk(k, dim=0)
    frames = A.shape[1]
    kept = A.gather(0, cell[:, None].expand(-1, frames, -1)).masked_fill_((peak == -math.inf)[:, None], -math.inf)
    best, entry = kept.flatten(0, 1).topk(min(s.topk, k * frames), dim=0)
    total = best[:1].float()
    if norm != "topk":
        total = A.sub_(top).div_(s.temperature).exp_().sum((0, 1)).log_().add_(top / s.temperature)[None]
    return best.float() / s.temperature, cell.gather(0, entry // frames), entry % frames, total


def propagate_video(
    features: Iterable[Tensor],
    annotated: Sequence[tuple[Tensor, Tensor]],
    settings: Propagation,
    recent: Sequence[tuple[Tensor, Tensor]] = (),
) -> Iterator[Tensor]:
    """Label frame after frame: yields the soft labels (L x h x w) of each target in `features` (C x h x w each).

    annotated: (features, labels) of the annotated frames, which stay in the context for good; the targets come
    after them. recent: the last targets and their labels, oldest first, to go on with an earlier run. The context
    lives in one ring buffer, so memory does not grow with the video. Each target is pulled only when it is due, so
    that several settings can share one pass over the frames (itertools.tee).
    """
    (C, h, w), L, device = annotated[0][0].shape, len(annotated[0][1]), annotated[0][0].device
    fixed, size = len(annotated), len(annotated) + settings.context
    keys = torch.zeros(h, w, size, C, device=device, dtype=annotated[0][0].dtype)  # the layout propagate_labels reads
    values = torch.zeros(h, w, size, L, device=device)

    def remember(slot: int, f: Tensor, z: Tensor) -> None:
        keys[:, :, slot], values[:, :, slot] = f.permute(1, 2, 0), z.permute(1, 2, 0)

    for slot, (f, z) in enumerate(annotated):
        remember(slot, f, z)
    recent = list(recent)[-settings.context :] if settings.context else []
    for t, (f, z) in enumerate(recent):
        remember(fixed + t, f, z)
    for t, f in enumerate(features, len(recent)):
        filled = min(fixed + t, size)
        context = keys[:, :, :filled].permute(2, 3, 0, 1), values[:, :, :filled].permute(2, 3, 0, 1)
        z = propagate_labels(f, *context, settings, annotated=fixed)
        yield z
        if settings.context:
            remember(fixed + t % settings.context, f, z)


# ---------------------------------------------------------------------------------------------------------------------
# Labels on the grid, masks and points at full size


def labels_from_mask(mask: Tensor, ids: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Mask H x W -> soft labels L x h x w: one-hot (background, then each id of `ids`), bilinear to the grid."""
    one_hot = [mask == number for number in ids]
    one_hot = [~torch.stack(one_hot).any(0), *one_hot]
    small = [F.interpolate(m[None, None].float(), size=grid, mode="bilinear")[0, 0] for m in one_hot]
    return torch.stack(small)


def mask_from_labels(
    labels: Tensor, ids: Sequence[int], size: tuple[int, int], minmax: bool = False, chunk: int = 8
) -> Tensor:
    """Soft labels L x h x w -> mask H x W uint8: up-sampled bilinearly to full size, then the arg-max (section 4.2).

    minmax stretches each label that occurs to 0..1 over the frame first. Labels are up-sampled `chunk` at a time.
    """
    best = winner = None
    for start in range(0, len(labels), chunk):
        full = F.interpolate(labels[None, start : start + chunk].float(), size=size, mode="bilinear")[0]
        if minmax:
            low, high = full.amin((1, 2), keepdim=True), full.amax((1, 2), keepdim=True)
            full = torch.where(high > 0, (full - low) / (high - low).clamp_min(1e-12), full)
        value, index = full.max(0)
        if best is None:
            best, winner = value, index
        else:
            winner = torch.where(value > best, index + start, winner)
            best = torch.maximum(value, best)
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
# Exported graphs (export.py), run frame by frame


def load_engine(path: Path, device: str = "auto") -> "OnnxEngine | TensorRTEngine":
    """A graph of export.py, ready to run: .onnx by ONNX Runtime, .engine by TensorRT.

    info says what it was made from (model, settings, height, width, objects, ...). step(frame, mask) starts at an
    annotated frame, step(frame) follows; both give the frame's mask. read("labels") and read("features") are those of
    the last step. Raises UserError for a file that is not a graph of export.py or cannot run here.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such engine; make it with export.py")
    if path.suffix not in (".onnx", ".engine"):
        raise UserError(f"{path}: is neither .onnx nor .engine; give a file that export.py wrote")
    return (OnnxEngine if path.suffix == ".onnx" else TensorRTEngine)(path, device)


def engine_info(text: str | bytes | None, path: Path) -> dict:
    """What export.py wrote into the file about itself."""
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: was not written by softcopy's export.py; make it again with export.py") from error


class OnnxEngine:
    """A graph run by ONNX Runtime: TensorRT, CUDA or CPU, whichever comes first of those that are there.

    The memory stays on the device, twice: a step reads one copy and writes the other.
    """

    def __init__(self, path: Path, device: str = "auto"):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{path}: needs the onnxruntime package; run pip install onnxruntime") from error
        there = onnxruntime.get_available_providers()
        order = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
        order = [name for name in order if name in there and (device != "cpu" or name.startswith("CPU"))]
        if device.startswith("cuda") and order[0].startswith("CPU"):
            raise UserError(f"--device {device}: this ONNX Runtime has no CUDA; run pip install onnxruntime-gpu")
        if order[0].startswith("Tensorrt"):  # building takes minutes: keep the engine beside the graph
            cache = {"trt_engine_cache_path": f"{path}.cache", "trt_timing_cache_path": f"{path}.cache"}
            order[0] = order[0], {"trt_engine_cache_enable": True, "trt_timing_cache_enable": True, **cache}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # a plan for all tiles at once costs 280 MiB at 480p and saves no time
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=order)
        except Exception as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{path}: ONNX Runtime cannot load it ({reason}); is it whole? Export it again") from error
        self.info = engine_info(self.session.get_modelmeta().custom_metadata_map.get("softcopy"), path)
        self.provider, self.seen = self.session.get_providers()[0].removesuffix("ExecutionProvider"), 0
        place = "cpu" if self.provider == "CPU" else "cuda"

        def zeros(tensor):
            kind = {"float": "float32"}.get(name := tensor.type[7:-1], name)  # tensor(float16) -> float16
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(tensor.shape, kind), place, 0)

        memory = [tensor for tensor in self.session.get_inputs() if tensor.name.startswith("memory_")]
        self.memory = [{tensor.name: zeros(tensor) for tensor in memory} for _ in range(2)]
        self.outputs = {t.name: zeros(t) for t in self.session.get_outputs() if not t.name.startswith("new_memory_")}
        self.binding = self.session.io_binding()
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def step(self, frame: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """frame H x W x 3 uint8; mask H x W uint8 starts afresh with this annotated frame -> mask H x W uint8."""
        self.seen = 0 if mask is not None else self.seen + 1
        self.binding.bind_cpu_input("frame", np.ascontiguousarray(frame))
        self.binding.bind_cpu_input("mask", np.zeros(frame.shape[:2], np.uint8) if mask is None else mask)
        self.binding.bind_cpu_input("seen", np.array([self.seen], np.int32))
        before, after = self.memory
        for name in before:
            self.binding.bind_ortvalue_input(name, before[name])
            self.binding.bind_ortvalue_output(f"new_{name}", after[name])
        self.session.run_with_iobinding(self.binding)
        self.memory.reverse()
        return self.read("new_mask")

    def read(self, name: str) -> np.ndarray:
        return self.outputs[name].numpy()


class TensorRTEngine:
    """An engine run by TensorRT on the GPU that it was built for; the memory is handled as in OnnxEngine."""

    MAGIC = b"softcopy engine\n"  # then 4 bytes, the length of the JSON that follows; then TensorRT's plan

    def __init__(self, path: Path, device: str = "auto"):
        content = path.read_bytes()
        if content.startswith(self.MAGIC):
            start = len(self.MAGIC) + 4
            end = start + int.from_bytes(content[start - 4 : start], "little")
            self.info, plan = engine_info(content[start:end], path), content[end:]
        else:  # built by trtexec: what it is stands in the graph that it was built from
            twin = path.with_suffix(".onnx")
            if not twin.is_file():
                raise UserError(f"{path}: was not written by softcopy's export.py, nor is {twin} beside it")
            self.info, plan = OnnxEngine(twin, "cpu").info, content
        try:
            import tensorrt as trt
        except ImportError as error:
            raise UserError(
                f"{path}: needs the tensorrt package; run pip install tensorrt, or give the .onnx"
            ) from error
        if device == "cpu" or not torch.cuda.is_available():
            raise UserError(f"{path}: a TensorRT engine needs an NVIDIA GPU; give the .onnx to run elsewhere")
        here, built = torch.cuda.get_device_name(), self.info.get("hardware")
        self.engine = None
        if built in (None, here):
            self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            made = f"{built or 'another GPU'} and TensorRT {self.info.get('tensorrt', '(unknown)')}"
            raise UserError(f"{path}: was built for {made}, here is {here} and {trt.__version__}; build it again here")
        self.provider, self.seen, self.context = "TensorRT", 0, self.engine.create_execution_context()
        self.stream, self.tensors = torch.cuda.Stream(), {}
        for name in (self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)):
            kind, shape = trt.nptype(self.engine.get_tensor_dtype(name)), tuple(self.engine.get_tensor_shape(name))
            self.tensors[name] = torch.from_numpy(np.zeros(shape, kind)).cuda()
            self.context.set_tensor_address(name, self.tensors[name].data_ptr())

    def step(self, frame: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """frame H x W x 3 uint8; mask H x W uint8 starts afresh with this annotated frame -> mask H x W uint8."""
        self.seen = 0 if mask is not None else self.seen + 1
        with torch.cuda.stream(self.stream):
            self.tensors["frame"].copy_(torch.from_numpy(np.ascontiguousarray(frame)))
            self.tensors["seen"].fill_(self.seen)
            if mask is not None:
                self.tensors["mask"].copy_(torch.from_numpy(mask))
            self.context.execute_async_v3(self.stream.cuda_stream)
        for name in ("memory_features", "memory_labels"):  # what was written is read next
            a, b = self.tensors[name], self.tensors[f"new_{name}"]
            self.tensors[name], self.tensors[f"new_{name}"] = b, a
            self.context.set_tensor_address(name, b.data_ptr())
            self.context.set_tensor_address(f"new_{name}", a.data_ptr())
        return self.read("new_mask")

    def read(self, name: str) -> np.ndarray:
        self.stream.synchronize()
        return self.tensors[name].cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Frames and masks on disk

PALETTE = np.zeros((256, 3), np.uint8)  # PASCAL VOC: the bits of the id, dealt to r, g, b from the highest down
for _bit in range(8):
    for _channel in range(3):
        PALETTE[:, _channel] |= (((np.arange(256) >> (3 * _bit + _channel)) & 1) << (7 - _bit)).astype(np.uint8)

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Video:
    """Frames of a film, or of a folder or glob of pictures, by index and in either direction.

    names: one for each frame (file stems of pictures, else 00000, 00001, ...); fps; size (H, W). Nothing is kept:
    memory does not depend on the length. A film that breaks off gives the frames before the break; `broken` then
    says where and why. Raises UserError where there is nothing to read or the frame size changes.
    """

    def __init__(self, source: str | Path):
        self.source, self.fps, self.broken, self.names = str(source), 25.0, None, []
        path, self.pictures = Path(source), []
        if path.is_dir():
            self.pictures = [p for p in path.iterdir() if p.suffix.lower() in PICTURES]
        elif glob.has_magic(self.source) and not path.exists():
            self.pictures = [Path(p) for p in glob.glob(self.source)]
        elif not path.is_file():
            raise UserError(f"{source}: no such video; give a film, a folder or a glob of pictures")
        elif path.suffix.lower() in PICTURES:
            self.pictures = [path]
        if self.pictures:  # natural order: 2.jpg before 10.jpg
            self.pictures.sort(key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])
            self.names = [p.stem for p in self.pictures]
            if len(set(self.names)) < len(self.names):
                raise UserError(f"{source}: two pictures share a name before the dot; masks could not be told apart")
        elif path.is_file():
            self._index(path)
        if not len(self):
            raise UserError(f"{source}: holds no pictures; give a film, or a folder of {', '.join(PICTURES[:3])}, ...")
        self.size = next(self.frames([0]))[1].shape[:2]

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
                promised = stream.frames
                stamps = [p.pts if p.pts is not None else p.dts for p in film.demux(stream) if p.size]
        except av.error.FFmpegError as error:
            raise UserError(
                f"{path}: cannot be read as a film ({error.strerror}); is it whole? Try to play it"
            ) from error
        # Without usable stamps frames are counted from the start, and seeking means decoding from there.
        self._seekable = None not in stamps and len(set(stamps)) == len(stamps)
        self._pts = sorted(stamps) if self._seekable else list(range(len(stamps)))
        self.names = [f"{i:05d}" for i in range(len(stamps))]
        if promised > len(stamps):
            self.broken = f"{path}: breaks off after {len(stamps)} of {promised} frames; the frames before are kept"

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, frame) for each of `indices`, which must all rise or all fall."""
        size = getattr(self, "size", None)
        for index, frame in self._read(indices):
            size = size or frame.shape[:2]
            if frame.shape[:2] != size:
                raise UserError(
                    f"{self.source}: frame {self.names[index]} is {frame.shape[1]}x{frame.shape[0]}, the first is "
                    f"{size[1]}x{size[0]}; cut the video there (--end {index}) or bring it to one size"
                )
            yield index, frame

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if self.pictures:
            for index in indices:
                picture = cv2.imread(str(self.pictures[index]), cv2.IMREAD_COLOR_RGB)
                if picture is None:
                    raise UserError(f"{self.pictures[index]}: cannot be read as a picture; replace or remove it")
                yield index, picture
        elif len(indices) < 2 or indices[0] < indices[-1]:
            wanted = set(indices)
            yield from ((i, frame) for i, frame in self._decode(indices[0], indices[-1]) if i in wanted)
        else:  # backwards: blocks of frames, each decoded forwards
            for block in (indices[i : i + 32] for i in range(0, len(indices), 32)):
                wanted = set(block)
                yield from reversed([(i, f) for i, f in self._decode(block[-1], block[0]) if i in wanted])

    def _decode(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        number = {stamp: i for i, stamp in enumerate(self._pts[: last + 1])} if self._seekable else None
        done = -1
        try:
            with av.open(self.source) as film:
                stream = film.streams.video[0]
                stream.thread_type = "AUTO"
                if first and number:
                    film.seek(self._pts[first], stream=stream)
                for count, picture in enumerate(film.decode(stream)):
                    index = number.get(picture.pts) if number else count
                    if index is None:  # past `last`, or a stamp that the index does not know
                        if picture.pts is not None and picture.pts > self._pts[last]:
                            return
                        continue
                    if index > last:
                        return
                    if index >= first:
                        frame = picture.to_ndarray(format="rgb24")
                        yield index, np.ascontiguousarray(np.rot90(frame, round(picture.rotation / 90)))
                        done = index
        except av.error.FFmpegError as error:
            self.broken = (
                f"{self.source}: cannot be decoded after frame {done} ({error.strerror}); the frames before are kept"
            )
        else:
            if done < last and not self.broken:
                self.broken = f"{self.source}: breaks off after frame {done}; the frames before are kept"
        if done < 0 and first == 0:
            raise UserError(f"{self.source}: no frame can be decoded; is it whole? Try to play it")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end: a file that exists is whole."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def film_writer(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an H.264 film that plays in a browser: yields a function that appends a frame; atomic."""
    height, width = (side - side % 2 for side in size)  # 4:2:0 colour wants even sides
    with atomic(path) as temporary, av.open(str(temporary), "w", options={"movflags": "faststart"}) as film:
        stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}

        def append(frame: np.ndarray) -> None:
            frame = np.ascontiguousarray(frame[:height, :width])
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield append
        film.mux(stream.encode())


def write_mask(path: Path, mask: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """Write a mask (H x W uint8 ids) as an indexed PNG, the field's interchange format; atomic."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette.tobytes())
    with atomic(Path(path)) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def read_ids(path: str | Path) -> np.ndarray:
    """Read the ids (H x W uint8) of an indexed or grey PNG as they are stored."""
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L"):
                raise UserError(f"{path}: is a {picture.mode} picture; masks are indexed (or grey) PNGs of ids")
            return np.array(picture)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such mask") from error
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); is it whole?") from error


def read_mask(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a mask: (ids H x W uint8, palette 256 x 3 uint8).

    An indexed PNG gives its ids; a grey picture its values; black and white is one object, id 1; in a colour
    picture black (or transparent) is background and each other colour an object: the id of that colour in PASCAL
    VOC's palette if all have one, else 1, 2, ... by how much they cover. 255 beside other ids is void, background.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such mask; give the picture of the first frame's objects") from error
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a picture; give a PNG mask") from error
    palette = PALETTE.copy()
    indexed = picture.mode == "P"
    if indexed:
        ids = np.asarray(picture)
        own = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette[: len(own)] = own
    elif picture.mode in ("1", "L", "I", "I;16", "F"):
        ids = np.asarray(picture).astype(np.int64)
    else:
        rgba = np.asarray(picture.convert("RGBA")).astype(np.int64)
        colour = (rgba[..., 0] << 16 | rgba[..., 1] << 8 | rgba[..., 2]) * (rgba[..., 3] > 0)
        ids = colour
    numbers, counts = np.unique(ids, return_counts=True)
    numbers, counts = numbers[numbers != 0], counts[numbers != 0]
    if not indexed:
        solid = sum(cv2.erode((ids == n).astype(np.uint8), np.ones((3, 3))).any() for n in numbers[:300])
        if len(numbers) > 255 or (len(numbers) >= 8 and solid < len(numbers) / 2):
            raise UserError(
                f"{path}: has {len(numbers)} colours beside black, most of them thin: its edges are smoothed "
                "(anti-aliased or JPEG); save it as PNG without smoothing, one flat colour an object"
            )
    if len(numbers) == 0:
        raise UserError(f"{path}: is empty, all of it is background; paint each object in a value of its own")
    if picture.mode not in ("P", "1", "L", "I", "I;16", "F"):
        voc = {int(r) << 16 | int(g) << 8 | int(b): i for i, (r, g, b) in enumerate(PALETTE)}
        new = [voc.get(int(n)) for n in numbers]
        if None in new:
            new = np.argsort(np.argsort(-counts, kind="stable")) + 1
            palette[new] = np.stack([numbers >> 16, numbers >> 8 & 255, numbers & 255], 1)
    elif len(numbers) == 1 and numbers[0] in (1, 255):
        new = [1]
        palette[1] = palette[numbers[0] if indexed else 1]
    elif numbers[-1] > 255:
        new = np.arange(1, len(numbers) + 1)
    else:
        new = np.where(numbers == 255, 0, numbers)
    return np.asarray([0, *new], np.uint8)[np.searchsorted(np.array([0, *numbers]), ids)], palette


def overlay(frame: np.ndarray, mask: np.ndarray, palette: np.ndarray = PALETTE, opacity: float = 0.5) -> np.ndarray:
    """The frame with its objects tinted in their palette colours and outlined."""
    tint = cv2.addWeighted(frame, 1 - opacity, palette[mask], opacity, 0)
    out = np.where(mask[..., None] > 0, tint, frame)
    width = max(1, round(min(mask.shape) / 240))
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((1 + width, 1 + width), np.uint8)) > 0
    out[edge & (mask > 0)] = 255
    return out


def parse_args(args_type, argv: Sequence[str] | None = None):
    """Parse a script's Args (a dataclass with `model` and `propagation`); the defaults are those of its --model."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default=args_type().model)
    name = peek.parse_known_args(argv)[0].model
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    default = replace(args_type(), propagation=MODELS[name].settings)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.AvoidSubcommands)
    return tyro.cli(args_type, args=argv, default=default, config=config)
