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
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
        sys.exit(print("interrupted: what is written is whole; the same command goes on from here", file=sys.stderr) or 130)


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
        self.net = nn.Sequential({stage: getattr(resnet, stage) for stage in stages})
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
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{path}: refused, it holds pickled code beside tensors; save its state_dict alone") from error
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
    keys = features.permute(2, 3, 0, 1)  # h w n C: the n frames of a cell side by side
    values = labels.permute(2, 3, 0, 1).reshape(h * w * n, -1).float()  # an entry is (cell, frame), cell-major

    exempt = min(annotated, n) if s.exempt_first and s.localization == "fixed" else 0
    parts = [(0, exempt, False), (exempt, n, s.localization == "fixed")]  # frames from, to, localised?
    parts = [(keys[:, :, a:b].contiguous(), a, local) for a, b, local in parts if b > a]

    z = torch.empty(h, w, values.shape[1], device=target.device)
    scratch = query.new_empty(0)
    tile = (12, 16) if target.device.type == "cpu" else (24, 32)  # a CPU's caches like it small, a GPU few launches
    for y0, y1 in cuts(h, tile[0]):
        for x0, x1 in cuts(w, tile[1]):
            q = query[y0:y1, x0:x1].reshape(-1, C)  # q C
            found = []
            for part, first, local in parts:
                reach = s.radius - (s.shape == "circle") if local else h + w
                window = (0, h, 0, w) if norm == "frame" else clip(y0 - reach, y1 + reach, x0 - reach, x1 + reach, h, w)
                ya, yb, xa, xb = window
                rows, cols, m = yb - ya, xb - xa, part.shape[2]
                if scratch.numel() < (size := rows * cols * m * len(q)):
                    scratch = query.new_empty(size)
                A = scratch[:size].view(rows, cols * m, len(q))
                torch.bmm(part[ya:yb, xa:xb].flatten(1, 2), q.T.expand(rows, -1, -1), out=A)  # Eq. 1
                A = A.view(rows * cols, m, len(q))  # cell, frame, query
                outside = beyond(s, (y0, y1, x0, x1), window, A.device) if local else None
                best, cell, frame, total = nearest(A, outside, s, overall, norm)
                entry = ((ya + cell // cols) * w + xa + cell % cols) * n + first + frame
                found.append((best, entry, total))
            if overall and len(found) > 1:  # the k best of the parts' k best
                best, entry, total = (torch.cat(each) for each in zip(*found, strict=True))
                best, order = best.topk(min(s.topk, len(best)), dim=0)
                found = [(best, entry.gather(0, order), total.logsumexp(0, keepdim=True))]
            copied = 0
            for best, entry, total in found:  # best, entry: k g q; total: 1 g q
                weight = best.softmax(0) if norm == "topk" else (best - total).exp()
                copied = copied + F.embedding_bag(  # the soft copy, line 33
                    entry.flatten(0, 1).T.contiguous(),
                    values,
                    per_sample_weights=weight.flatten(0, 1).T.contiguous(),
                    mode="sum",
                )
            z[y0:y1, x0:x1] = (copied if overall else copied / n).view(y1 - y0, x1 - x0, -1)
    return z.permute(2, 0, 1)


def cuts(length: int, step: int) -> list[tuple[int, int]]:
    """Cut 0..length into even pieces of at most `step`."""
    pieces = math.ceil(length / step)
    return [(i * length // pieces, (i + 1) * length // pieces) for i in range(pieces)]


def clip(ya: int, yb: int, xa: int, xb: int, h: int, w: int) -> tuple[int, int, int, int]:
    return max(ya, 0), min(yb, h), max(xa, 0), min(xb, w)


def beyond(s: Propagation, tile: tuple, window: tuple, device) -> Tensor:
    """Which window cells lie outside the fixed region of each tile cell: window cells x tile cells, bool."""
    y0, y1, x0, x1 = tile
    ya, yb, xa, xb = window
    dy = (torch.arange(ya, yb, device=device)[:, None] - torch.arange(y0, y1, device=device)).square()
    dx = (torch.arange(xa, xb, device=device)[:, None] - torch.arange(x0, x1, device=device)).square()
    dy, dx = dy[:, None, :, None], dx[None, :, None, :]
    outside = dy + dx >= s.radius**2 if s.shape == "circle" else torch.maximum(dy, dx) > s.radius**2
    return outside.flatten(0, 1).flatten(1, 2)


def nearest(A: Tensor, outside: Tensor | None, s: Propagation, overall: bool, norm: str) -> tuple[Tensor, ...]:
    """The k largest affinities of each query, divided by the temperature.

    A: cells x frames x q. Returns (best, cell, frame, total): k x g x q for the first three with g = 1 (overall) or
    the number of frames (per-frame), and 1 x g x q the log-sum-exp over what the softmax is normalised over.
    """
    cells, frames, q = A.shape
    dims = (0, 1) if overall else 0
    total = (A.float() / s.temperature).logsumexp(dims, keepdim=True) if norm == "frame" else A.new_zeros(1, 1, 1)
    if not (overall and norm == "topk") and outside is not None:
        A.masked_fill_(outside[:, None], -math.inf)
    if norm == "region":
        total = (A.float() / s.temperature).logsumexp(dims, keepdim=True)
    k = min(s.topk, cells)
    if not overall:
        best, cell = A.topk(k, dim=0)
        return best.float() / s.temperature, cell, torch.arange(frames, device=A.device)[:, None], total
    # The region does not depend on the frame, so the k best entries lie in the k best cells by their best frame:
    # mask and search `cells` maxima, then only the k x frames entries behind the k best.
    peak = A.amax(1)
    if outside is not None:
        peak.masked_fill_(outside, -math.inf)
    peak, cell = peak.topk(k, dim=0, sorted=False)
    A = A.gather(0, cell[:, None].expand(-1, frames, -1))  # k frames q
    A = A.masked_fill_((peak == -math.inf)[:, None], -math.inf).flatten(0, 1)
    best, entry = A.topk(min(s.topk, len(A)), dim=0)
    cell, frame = cell.gather(0, entry // frames), entry % frames
    return best[:, None].float() / s.temperature, cell[:, None], frame[:, None], total
