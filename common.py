"""What every stage of softcopy shares: feature extractors, Algorithm 1 of the paper, frames and masks on disk.

The paper is McKee et al., "Transfer of Representations to Video Label Propagation: Implementation Factors
Matter" (2022). Words and shapes, the same everywhere:

    frame     H x W x 3 uint8 RGB       features  C x h x w         grid  h x w cells, stride 8 unless said
    mask      H x W uint8 ids           labels    L x h x w in [0, 1], label 0 is the background
    context   the annotated frame(s), then the latest n frames      target  the frame being labelled
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from isal import isal_zlib
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

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
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # by start_training
            torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# The factors


@dataclass(frozen=True)
class Propagation:
    """Every factor that the paper studies (sections 2 and 4).

    The defaults are those of --model's authors. For still-image features they are the paper's best (section 4.3,
    "Strong image baselines"); what the paper leaves open was chosen on DAVIS train sequences (benchmarks/tuning.md).
    """

    size: str = "480"
    """Network input: short side in pixels (never enlarging), HxW exactly, or full (section 4.2). With /M the long
    side is rounded down to a multiple of M (480/64: UVC). Larger frames are reduced with anti-aliasing, but to HxW
    plainly, as the protocols do."""
    upsample: int = 1
    """Enlarge the input this many times for a finer grid (Table 6c)."""
    layer: Literal["res2", "res3", "res4", "conv10", "conv13", "last"] = "res3"
    """Output stage: res2, res3, res4 are torchvision's layer2, layer3, layer4; convN is a VGG's N-th convolution
    (Table 2); last is the last stage, a ViT's last block."""
    stride: int = 8
    """Pixels per grid cell: a ResNet keeps its stages at it, 4 removes the max-pool (section 4.2); a ViT's patch."""
    l2: bool = True
    """L2-normalise the feature vectors (section 4.2)."""
    sampling: Literal["bilinear", "nearest"] = "bilinear"
    """How the annotated mask is brought to the grid."""
    aggregation: Literal["overall", "per-frame"] = "overall"
    """The k nearest over all context frames together, or k in each frame, averaged (section 2)."""
    softmax: Literal["auto", "topk", "region", "frame"] = "auto"
    """Normalise affinities over the k kept, the searched region (softmax after the mask), or the whole frame (softmax
    before the mask). auto: region for window and predicted, else Algorithm 1: topk for overall, frame for per-frame."""
    temperature: float = 0.05
    """Affinities are divided by it before the softmax (the paper's 1/Temp is its inverse)."""
    topk: int = 10
    """Nearest neighbours kept, k."""
    context: int = 20
    """Latest frames in the context, n; the annotated frames come on top."""
    memory: Literal["latest", "spaced"] = "latest"
    """Context of the latest n frames, or every second one of them and the video's frame 5 (MAST)."""
    keep_first: bool = True
    """The annotated frames stay in the context; otherwise they leave it as the others do (CorrFlow)."""
    pad: bool = False
    """Begin with a full context: copies of the first annotated frame (CRW, TimeCycle)."""
    carry: Literal["soft", "minmax", "hard"] = "soft"
    """Labels enter the context as predicted, stretched to 0..1 over the frame (TimeCycle), or as the arg-max (CorrFlow,
    MAST)."""
    localization: Literal["none", "fixed", "window", "predicted", "track"] = "fixed"
    """Where to search: the whole frame; a fixed region around the target cell (section 4.3); window, the square region
    with the softmax over it (CorrFlow); predicted, in frames more than 15 back the square is centred by a coarse
    search (MAST); track, a box for each object limits where its label comes from and goes to (UVC)."""
    shape: Literal["circle", "square"] = "circle"
    """Fixed region: distance < radius, or |dx|, |dy| <= radius."""
    radius: int = 12
    """Radius of the fixed region, in grid cells."""
    exempt_first: bool = False
    """Search annotated frames as a whole, whatever the fixed region (as CRW's code does)."""
    minmax: bool = False
    """Stretch each label to 0..1 over the frame before the arg-max."""

    def __post_init__(self):
        if not re.fullmatch(r"([1-9]\d*(x[1-9]\d*)?|full)(/[1-9]\d*)?", self.size):
            raise UserError(f"--size {self.size!r}: give the short side (480), height x width (480x854), or full")
        for flag, least in (("upsample", 1), ("stride", 1), ("topk", 1), ("context", 0), ("radius", 1)):
            if getattr(self, flag) < least:
                raise UserError(f"--{flag} {getattr(self, flag)}: give {least} or more")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature {self.temperature}: give a number above 0; affinities are divided by it")
        if self.context < 1 and not self.keep_first:
            raise UserError(
                "--context 0 --no-keep-first: nothing is left to copy labels from; give --context 1 or more"
            )
        if self.localization in ("window", "predicted") and self.norm == "frame":
            raise UserError(f"--localization {self.localization}: sees windows alone; take --softmax region or topk")
        if self.localization == "track" and (self.aggregation, self.norm) != ("per-frame", "frame"):
            raise UserError("--localization track: needs --aggregation per-frame and --softmax auto (section 4.3)")

    @property
    def history(self) -> bool:
        """Whether a target depends on more than the annotated and the latest frames."""
        return self.memory == "spaced" or self.localization in ("predicted", "track")

    @property
    def norm(self) -> str:
        """What the softmax is over: topk, region or frame."""
        if self.softmax == "auto" and self.localization in ("window", "predicted"):
            return "region"
        return {"overall": "topk", "per-frame": "frame"}[self.aggregation] if self.softmax == "auto" else self.softmax

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the network's input for a frame of height x width pixels."""
        size, _, multiple = self.size.partition("/")
        multiple = int(multiple or 1)
        if size == "full":
            scaled = height, width
        elif "x" in size:
            scaled = tuple(int(side) for side in size.split("x"))
        else:
            short, least = min(height, width), min(int(size), height, width)
            exact = [Fraction(side * least, short) for side in (height, width)]
            scaled = tuple(math.floor(side) if multiple > 1 else round(side) for side in exact)
        scaled = tuple(side if side == min(scaled) else max(side // multiple, 1) * multiple for side in scaled)
        return scaled[0] * self.upsample, scaled[1] * self.upsample

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of the features of a frame of height x width pixels."""
        return tuple(math.ceil(side / self.stride) for side in self.input_size(height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors


@dataclass(frozen=True)
class Model:
    """A row of MODELS: what a system's features are, where its weights come from, how its authors propagate."""

    arch: str  # torchvision's name, or timm:NAME
    about: str
    settings: Propagation = Propagation()  # on DAVIS
    vip: dict = field(default_factory=dict)  # what differs on VIP
    jhmdb: dict = field(default_factory=dict)  # and on JHMDB
    input: Literal["rgb", "unit", "lightness", "lab", "sobel"] = "rgb"  # pre-processing, see Encoder
    padding: str = "zeros"
    slim: bool = False  # layer4 has 256 channels
    head: Callable[[], dict[str, nn.Module]] = dict  # layers after the output stage, where that is settings.layer
    keys: tuple[tuple[str, str], ...] = ()  # (regex, replacement), in turn: names in the released file -> torchvision's
    mark: str = (
        ""  # regex that tells this system's file by its lines: "entry" of the container, "name shape" of tensors
    )
    source: str = ""  # a stable link to the file, which is fetched, or where else to get it
    digest: str = ""  # algorithm:first digits; "": the file name ends in the first 8 digits of its SHA-256, or unknown
    licence: str = "none stated"
    paper: float | None = None  # J&F on DAVIS 2017 val in the paper, best without up-sampling (Tables 2, 4, 6)


# fmt: off
R18, R50 = r"layer1\.0\.conv1\.weight 64x64x3x3", r"layer1\.0\.conv1\.weight 64x64x1x1"  # which ResNet a file holds
TORCHVISION, META = "https://download.pytorch.org/models/", "https://dl.fbaipublicfiles.com/"
VFS_FILES = "https://github.com/xvjiarui/VFS/releases/download/v0.1-rc1/"
STILL = {"vip": {"size": "560x560", "context": 4},  # Tables 7b and 8
         "jhmdb": {"size": "240x240", "context": 7, "localization": "none"}}
BEST = Propagation(topk=5, temperature=1.0)  # Table 6b: overall, circle of 12 cells, n = 20
MOCO = {**STILL, "settings": BEST, "keys": ((r"^encoder_q\.", ""),)}
TIMECYCLE = {
    "settings": Propagation(size="480x480", aggregation="per-frame", temperature=512**-0.5, topk=5, context=7, pad=True,
                            carry="minmax", localization="none"),
    "vip": {"size": "560x560", "topk": 20, "context": 1}, "jhmdb": {"size": "320x320"},
    "keys": ((r"^encoderVideo\.", ""),)}
UVC = {  # the released code, with boxes; the coordinates, the lost rule and the rest in track_boxes
    "settings": Propagation(size="480/64", layer="res4", l2=False, sampling="nearest", aggregation="per-frame",
                            temperature=1.0, topk=5, context=7, localization="track", minmax=True),
    "vip": {"size": "560x560", "context": 1, "localization": "none"},
    "jhmdb": {"size": "320x320", "topk": 20, "context": 7, "localization": "none", "pad": True, "carry": "minmax",
              "minmax": False},
    "input": "lightness", "keys": ((r"^gray_encoder\.", ""),)}
COLOUR = {  # CorrFlow and MAST have one net: stride 4, layer4 as wide as layer3, a convolution to 64 channels
    "slim": True, "head": lambda: {"post_convolution": nn.Conv2d(256, 64, 3, padding=1)},
    "vip": {"size": "560x560"}, "jhmdb": {"size": "240x240"},
    "keys": ((r"^feature_extraction\.", ""), (r"^conv1\.0\.", "conv1."), (r"^conv1\.1\.", "bn1."),
             (r"\.left\.0\.", ".conv1."), (r"\.left\.1\.", ".bn1."), (r"\.left\.3\.", ".conv2."),
             (r"\.left\.4\.", ".bn2."), (r"\.shortcut\.", ".downsample."))}
WINDOWS = Propagation(layer="res4", stride=4, l2=False, sampling="nearest", temperature=1.0, carry="hard")
VFS = {"vip": {"size": "560x560", "context": 8}, "jhmdb": {"size": "240x240", "context": 4}, "licence": "Apache-2.0",
       "keys": ((r"^backbone\.", ""), (r"conv(\d)\.conv\.", r"conv\1."), (r"conv(\d)\.bn\.", r"bn\1."),
                (r"downsample\.conv\.", "downsample.0."), (r"downsample\.bn\.", "downsample.1."))}

MODELS = {
    "default": Model("resnet18", "UVC+ with rotation, trained with this project", **STILL, input="lightness",
        settings=Propagation(layer="res2", temperature=0.01),  # chosen on DAVIS train sequences, weights/README.md
        source="a part of this project: weights/default.pth", licence="MIT"),
    "imagenet": Model("resnet18", "ImageNet classification", **STILL, paper=65.8, mark=r"^fc\.weight 1000x512$",
        source=TORCHVISION + "resnet18-f37072fd.pth"),
    "imagenet-r50": Model("resnet50", "ImageNet classification", **STILL, mark=r"^fc\.weight 1000x2048$",
        source=TORCHVISION + "resnet50-0676ba61.pth"),
    "rotation": Model("resnet18", "rotation prediction", BEST, **STILL, paper=62.3, mark=r"^fc\.weight 4x512$",
        source="train_finetune.py makes them", licence="your own"),
    "moco": Model("resnet50", "momentum contrast v2, 800 epochs", **MOCO, mark=r"^(module\.)?encoder_q\." + R50,
        source=META + "moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", digest="md5:a04e12f8",
        licence="MIT (its README: CC BY-NC 4.0)"),
    "moco-r18": Model("resnet18", "momentum contrast", **MOCO, paper=62.7, mark=r"^(module\.)?encoder_q\." + R18,
        source="train_finetune.py makes them", licence="your own"),
    "deepcluster": Model("vgg16_bn", "DeepCluster", **STILL, paper=50.7, input="sobel",
        settings=Propagation(layer="conv10", aggregation="per-frame", temperature=0.025, topk=5, context=7,
                             localization="none", minmax=True),
        keys=((r"^features\.module\.", "features."),), mark=r"^(module\.)?(features\.module|top_layer)\.",
        source=META + "deepcluster/vgg16/checkpoint.pth.tar", licence="CC BY-NC 4.0"),
    "timecycle": Model("resnet50", "cycle-consistency of time", **TIMECYCLE, paper=48.2,
        head=lambda: {"afterconv1": nn.Conv2d(1024, 512, 1, bias=False), "relu1": nn.ReLU()},
        mark=r"^(module\.)?encoderVideo\." + R50,
        source="https://drive.google.com/file/d/1jKwP6qOoEFhhr9WFL_mfXvk0IHtElsmB (checkpoint_14.pth.tar)"),
    "timecycle-r18": Model("resnet18", "cycle-consistency of time", **TIMECYCLE,
        head=lambda: {"afterconv1": nn.Conv2d(256, 512, 1, bias=False), "relu1": nn.ReLU()},
        mark=r"^(module\.)?encoderVideo\." + R18,
        source="not released; https://github.com/xiaolonw/TimeCycle trains it"),
    "corrflow": Model("resnet18", "CorrFlow, grid 2x", **COLOUR, paper=50.3, input="unit",
        # its reader cuts frames to multiples of 8; scaling them to that size instead moves no label
        settings=replace(WINDOWS, size="480/8", localization="window", radius=6, topk=13**2, context=1,
                         keep_first=False),
        mark=r"^module\.feature_extraction\.conv1\.0\.weight",
        source="https://drive.google.com/file/d/1hBufOBoKmHWWKy2-BJObMbYrqDAUJrs7 (OxUvA weights)"),
    "mast": Model("resnet18", "MAST, grid 2x", **COLOUR, paper=65.5, input="lab",
        settings=replace(WINDOWS, localization="predicted", topk=5 * 25**2, context=5, memory="spaced"),
        mark=r"^feature_extraction\.conv1\.0\.weight",
        source="https://drive.google.com/file/d/1vjiBdom75QzwCF5jnMRsxz897XyotVO8"),
    "uvc": Model("resnet18", "joint-task learning", **UVC, paper=59.5, mark=r"^(module\.)?gray_encoder\.conv1\.weight",
        source="https://github.com/Liusifei/UVC (weights/checkpoint_latest.pth.tar)", licence="MIT"),
    "uvc+": Model("resnet18", "UVC and an image loss", **{**UVC, "settings": replace(UVC["settings"], context=10)},
        paper=66.0, source="train_uvc_plus.py makes them", licence="your own"),
    "crw": Model("resnet18", "contrastive random walk", Propagation(exempt_first=True, pad=True), paper=67.5,
        padding="reflect", vip={"size": "560x560", "context": 4}, jhmdb={"size": "320x320", "context": 7},
        keys=((r"^encoder\.model\.", ""), (r"(conv[12])\.1\.weight$", r"\1.weight")),
        mark=r"^(module\.)?encoder\.model\.conv1\.", licence="MIT",
        source="https://github.com/ajabri/videowalk (pretrained.pth)"),
    "vfs": Model("resnet18", "frame-level similarity", Propagation(temperature=0.07, sampling="nearest", minmax=True),
        **VFS, paper=66.7, mark=rf"^backbone\.{R18.replace('.weight', '.conv.weight')}|^meta$(?s:.*)^{R18}",
        source=VFS_FILES + "r18_nc_sgd_cos_100e_r2_1xNx8_k400-db1a4c0d.pth"),
    "vfs-r50": Model("resnet50", "frame-level similarity",
        Propagation(temperature=0.07, sampling="nearest", minmax=True, radius=18),
        **VFS, mark=rf"^backbone\.{R50.replace('.weight', '.conv.weight')}|^meta$(?s:.*)^{R50}",
        source=VFS_FILES + "r50_nc_sgd_cos_100e_r5_1xNx2_k400-d7ce3ad0.pth"),
    "random": Model("resnet18", "no training: random weights from seed 0", **STILL, licence="-"),
}
MODELS |= {  # section 4.2: trained on after res3 got stride 1
    f"{name}-finetuned": replace(MODELS[name], about=MODELS[name].about + ", stride fine-tuned", mark="",
                                 source="train_finetune.py makes them", licence="your own")
    for name in ("imagenet", "rotation", "moco-r18")}
# fmt: on


def find_model(name: str) -> Model:
    """The row of a name: one of MODELS, torchvision:NAME (a ResNet or VGG), or timm:NAME (a ResNet or ViT)."""
    kind, _, arch = name.partition(":")
    if name in MODELS:
        return MODELS[name]
    if kind == "torchvision":
        if not re.match(r"(wide_)?resne|vgg", arch) or arch not in torchvision.models.list_models(torchvision.models):
            raise UserError(f"--model {name}: torchvision has no ResNet or VGG of this name; take resnet34, vgg16, ...")
        layer = "res3" if "resne" in arch else "last" if arch.startswith("vgg11") else "conv10"
        url = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url
        return Model(arch, "ImageNet classification", Propagation(layer=layer), source=url, **STILL)
    if kind == "timm":
        settings, source = Propagation(), "timm fetches them from its hub"
        if patch := re.search(r"patch(\d+)", arch):  # a ViT: the settings of DINO's and DINOv3's authors
            settings = Propagation(
                **{"size": "480/64", "layer": "last", "stride": int(patch[1]), "sampling": "nearest"},
                **{"temperature": 0.1, "topk": 5, "context": 7, "shape": "square", "minmax": True},
            )
            if "dinov3" in arch:  # its authors' circle holds the cells at distance 12 too, four more
                settings = replace(settings, size="480", upsample=2, temperature=0.2, shape="circle")
        return Model(name, "see its card in timm's hub", settings, source=source, licence="see there", **STILL)
    raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}, torchvision:NAME or timm:NAME")


def preset(name: str, dataset: str = "davis") -> Propagation:
    """How a system's authors propagate its features on davis, vip or jhmdb."""
    model = find_model(name)
    return replace(model.settings, **{"vip": model.vip, "jhmdb": model.jhmdb}.get(dataset, {}))


def build_net(model: Model, s: Propagation, net: nn.Module | None = None) -> nn.Module:
    """The network of a row up to its output stage, the stages beyond the wanted stride no longer reducing (section
    4.2). net: the whole network, if it is there already. UserError if it has no such layer at such a stride."""
    unfit = UserError(
        f"--layer {s.layer} --stride {s.stride}: not to be had of {model.arch}; ResNets have res2 to res4 at stride 4, "
        "8, 16 and 32, VGGs conv1, conv2, ... at 1 to 32, ViTs last at the size of their patches"
    )
    if hasattr(net, "patch_embed"):
        if s.layer != "last" or s.stride != net.patch_embed.patch_size[0]:
            raise unfit
        return Tokens(net)
    if model.arch.startswith("vgg"):
        with torch.device("meta"):  # the classifier, dropped here, has 10^8 weights
            features = torchvision.models.get_model(model.arch).features
        convs = [i for i, part in enumerate(features) if isinstance(part, nn.Conv2d)]
        number = len(convs) if s.layer == "last" else int(s.layer[4:]) if s.layer.startswith("conv") else 99
        if number > len(convs):
            raise unfit
        stop = next(i for i in range(convs[number - 1], len(features)) if isinstance(features[i], nn.ReLU)) + 1
        features, reduction = features[:stop], 1
        for i, part in enumerate(features):
            if isinstance(part, nn.MaxPool2d) and reduction < s.stride:
                part.ceil_mode, reduction = True, reduction * 2  # a grid of ceil(side / stride), as ResNets have
            elif isinstance(part, nn.MaxPool2d):
                features[i] = nn.Identity()  # keeps the numbers of the layers after it
        parts = {"features": features}
        if model.input == "sobel":  # grey, then its two derivatives; the file holds their weights
            parts = {"sobel": nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1)), **parts}
            features[0] = nn.Conv2d(2, 64, 3, padding=1)
        features.to_empty(device="cpu")
    else:
        net = net or torchvision.models.get_model(model.arch)
        if model.slim:
            net.layer4 = nn.Sequential(*(torchvision.models.resnet.BasicBlock(256, 256) for _ in range(2)))
        parts = dict(net.named_children())  # conv1, bn1, relu, maxpool, layer1, ...
        layer = "layer4" if s.layer == "last" else s.layer.replace("res", "layer")
        if layer not in parts:
            raise unfit
        parts = dict(list(parts.items())[: list(parts).index(layer) + 1])
        reduction = 4
        if s.stride < 8:
            parts.pop("maxpool")
            reduction = 2
        for stage in (parts[name][0] for name in ("layer2", "layer3", "layer4") if name in parts):
            if reduction < s.stride:
                reduction *= 2
                continue
            for part in stage.modules():
                if isinstance(part, nn.Conv2d):
                    part.stride = (1, 1)
                elif isinstance(part, nn.AvgPool2d):  # timm's shortcuts
                    part.kernel_size = part.stride = 1
    if reduction != s.stride:
        raise unfit
    net = nn.Sequential(OrderedDict(parts | (model.head() if s.layer == model.settings.layer else {})))
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and any(conv.padding):
            conv.padding_mode = model.padding
    return net


class Tokens(nn.Module):
    """The patch tokens of a ViT's last block, after the final norm, as a grid."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, self.patch = vit, vit.patch_embed.patch_size[0]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, [side // self.patch for side in x.shape[-2:]])


class Encoder(nn.Module):
    """Frames in, features out. Resizing and colours are inside, so an exported graph needs nothing else.

    input    rgb, sobel: 0..1, less ImageNet's mean, over its deviation; unit: 0..1 as it is (CorrFlow);
             lightness: OpenCV's 8-bit L, exactly, / 256, in three channels, normalised as rgb (UVC);
             lab: float Lab as (L / 50 - 1, a / 127, b / 127) (MAST); OpenCV's own, interpolated, is within 0.2 in L
             and 0.5 in a, b of it.
    """

    def __init__(self, net: nn.Module, settings: Propagation, input: str = "rgb", mean=None, std=None):
        super().__init__()
        self.net, self.settings, self.input = net, settings, input
        self.multiple = getattr(net, "patch", 1)  # a ViT wants whole patches
        self.register_buffer("mean", torch.tensor(mean or (0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or (0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)
        # OpenCV's integer arithmetic: sRGB -> 8 x linear light -> luminance Y in 1 / 8 -> cube root -> 8-bit L
        level = np.arange(256) / 255
        linear = np.rint(2040 * np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4))
        Y = np.arange(2041) / 2040
        root = np.rint(2**15 * np.where(Y < 0.008856, 7.787 * Y + 16 / 116, np.cbrt(Y)))
        lightness = (296 * root - (16 * 255 * 2**15 + 50) // 100 + 2**14) // 2**15
        self.register_buffer("linear", torch.from_numpy(linear).int(), persistent=False)
        self.register_buffer("lightness", torch.from_numpy(lightness).int(), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """frames B x H x W x 3 uint8 RGB -> features B x C x h x w in the encoder's precision."""
        height, width = frames.shape[1:3]
        x = frames.permute(0, 3, 1, 2)  # B 3 H W
        x = x.to(torch.float32 if self.input in ("lightness", "lab") else self.mean.dtype) / 255
        size = tuple(math.ceil(n / self.multiple) * self.multiple for n in self.settings.input_size(height, width))
        if size != (height, width):
            reduced = size[0] < height and "x" not in self.settings.size
            x = F.interpolate(x, size=size, mode="bilinear", antialias=reduced)
        if self.input == "lightness":
            r, g, b = self.linear[(x * 255).round().long()].unbind(1)
            Y = torch.div(871 * r + 2929 * g + 296 * b + 2048, 4096, rounding_mode="floor")
            x = (self.lightness[Y.long()] / 256)[:, None].expand(-1, 3, -1, -1)
        if self.input == "lab":
            light = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
            X, Y, Z = torch.einsum("dc,bchw->dbhw", light.new_tensor(XYZ), light).unbind()
            fx, fy, fz = (
                torch.where(v > 0.008856, v.clamp_min(1e-9) ** (1 / 3), 7.787 * v + 16 / 116) for v in (X, Y, Z)
            )
            x = torch.stack([(116 * fy - 66) / 50, 500 / 127 * (fx - fy), 200 / 127 * (fy - fz)], 1)
        x = x.to(self.mean.dtype)
        x = self.net(x if self.input in ("unit", "lab") else (x - self.mean) / self.std)
        return F.normalize(x.float(), dim=1).to(x.dtype) if self.settings.l2 else x  # half knows no 1e-12: 0 / 0


XYZ = (  # linear sRGB -> X, Y, Z of D65, each over its white
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)


def load_encoder(
    name: str,
    weights: str | Path | None = None,
    settings: Propagation | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Encoder:
    """The extractor of a system (find_model), in eval mode, BatchNorm folded into the convolutions.

    weights: a file as it was released; without it weights/, then torch hub's cache are searched, then the system's
    link is fetched. Files may lack the stages after settings.layer. What a given file is taken for, and what of it is
    not used, is said in one line on stderr. Raises UserError for what is unknown, missing or does not fit.
    """
    model, device, dtype = find_model(name), pick_device(device), getattr(torch, dtype)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every device
    settings = settings or model.settings
    if model.arch.startswith("timm:"):
        net, mean, std = timm_model(model.arch[5:], weights and Path(weights))
        encoder = Encoder(build_net(model, settings, net), settings, model.input, mean, std)
    elif name == "random" and weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = Encoder(build_net(model, settings), settings)
    else:
        path = Path(weights) if weights else find_weights(name)
        released, rest = read_weights(path)
        guess, state = recognise(released, rest), {}
        for key, value in released.items():
            key = key.removeprefix("module.")
            for pattern, replacement in model.keys:
                key = re.sub(pattern, replacement, key)
            state[key] = value.squeeze(2) if value.dim() == 5 else value  # convolutions over time of one frame
        with torch.device("meta"):  # no initial weights, the file has them
            net = build_net(model, settings)
        encoder = Encoder(net.to_empty(device="cpu"), settings, model.input)
        if why := fit(encoder.net, state):
            hint = ""
            if guess and guess != name:
                hint = f"; it looks like {guess} ({MODELS[guess].arch}): say --model {guess}"
            elif patches := [value for key, value in state.items() if key.endswith("patch_embed.proj.weight")]:
                width, patch = len(patches[0]), patches[0].shape[-1]
                size = {384: "small", 768: "base", 1024: "large"}.get(width, "SIZE")
                kind = "dinov2.lvd142m" if patch == 14 else "224.dino"
                kind = "dinov3.lvd1689m" if any("storage_tokens" in key for key in state) else kind
                hint = f"; it is a ViT: say --model timm:vit_{size}_patch{patch}_{kind}"
            elif settings.layer in ("res4", "last") and "such as layer4." in why:
                hint = "; it ends at layer3: say --layer res3"
            elif path.name == "last.pth":
                hint = "; give weights.pth, beside it"
            elif " as well" in why:
                hint = "; a deeper network: say --model torchvision:NAME"
            raise UserError(f"{path}: does not fit {name} ({model.arch} up to {settings.layer}): {why}{hint}")
        if weights:
            wanted = encoder.net.state_dict()
            unused = Counter(key.split(".")[0] for key in state if key not in wanted)
            ignored = [*(f"{key} ({count})" for key, count in unused.items()), *rest]
            what = f"recognised as {guess}" if guess else "names no system"
            what += f", used as {name}" if guess != name else ""
            print(f"note: {path}: {what}; ignored: {', '.join(ignored) or 'nothing'}", file=sys.stderr)
    fold_batchnorm(encoder.eval().requires_grad_(False))
    return encoder.to(device, dtype).to(memory_format=torch.channels_last)


def timm_model(arch: str, path: Path | None) -> tuple[nn.Module, tuple, tuple]:
    """A whole ResNet or ViT of timm with its weights (from a file, timm's cache or its hub), its mean and deviation."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--model timm:{arch}: timm is not installed; pip install timm") from error
    if not timm.is_model(arch.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{arch.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise UserError(f"--model timm:{arch}: timm has no model of this name; such as {near}")
    kind = {"dynamic_img_size": True} if "patch" in arch else {}
    try:
        net = timm.create_model(arch, pretrained=path is None, num_classes=0, **kind)
    except TypeError as error:
        raise UserError(f"--model timm:{arch}: takes frames of one size alone; take another ViT") from error
    except Exception as error:  # of its hub client: many kinds
        raise UserError(
            f"weights of timm:{arch}: could not be fetched ({str(error).splitlines()[0]}); give --weights FILE"
        ) from error
    if not (hasattr(net, "num_prefix_tokens") or hasattr(net, "layer3")):
        raise UserError(f"--model timm:{arch}: is neither a ResNet nor a ViT; take one of these")
    if path:
        state = {
            re.sub(r"^(module|backbone)\.", "", re.sub(r"^module\.", "", k)): v
            for k, v in read_weights(path)[0].items()
        }
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", lambda state, net: state)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what it drops of a DINOv3 file
                missing = net.load_state_dict(convert(state, net), strict=False).missing_keys
        except (RuntimeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: does not fit timm:{arch}: {str(error).splitlines()[-1].strip()}") from error
        if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
            raise UserError(f"{path}: does not fit timm:{arch}: it lacks {len(missing)} entries, such as {missing[0]}")
        print(f"note: {path}: used as timm:{arch}", file=sys.stderr)
    return net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"]


def pick_device(name: str) -> torch.device:
    """auto is the GPU where there is one, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error).splitlines()[0], 100)
        raise UserError(f"--device {name}: cannot be used here ({reason}); take auto, cpu or cuda") from error


def find_weights(name: str, fetch: bool = True) -> Path | None:
    """The weights file of a model, under its released name or NAME.pth: in weights/, torch hub's cache, or fetched
    (with progress, and its hash checked). None if it is not here and not to be fetched."""
    model = find_model(name)
    link = model.source if re.fullmatch(r"https://\S+\.(pth|tar)", model.source) else ""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    file = Path(link).name if link and not link.endswith("/checkpoint.pth.tar") else f"{name}.pth"
    for folder in (Path("weights"), Path(__file__).parent / "weights", hub):
        for path in (folder / file, folder / f"{name}.pth", folder / f"{name}.pth.tar"):
            if path.is_file():
                return path
    if not fetch or name == "random" or name.startswith("timm:"):  # timm fetches its own
        return None
    if not link:
        raise UserError(
            f"weights of {name}: neither in weights/ nor in {hub}; get them ({model.source}) and give --weights FILE"
        )
    print(f"fetching the weights of {name} from {link} (licence: {model.licence})", file=sys.stderr)
    suffix = re.search(r"-([0-9a-f]{8})\.pth$", file)
    algorithm, _, digits = (model.digest or f"sha256:{suffix[1] if suffix else ''}").partition(":")
    path, part = hub / file, hub / f"{file}.{os.getpid()}.part"  # torchrun's processes may all be at it
    try:
        hub.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(link, str(part))
        got = hashlib.new(algorithm, part.read_bytes()).hexdigest()
        if not got.startswith(digits):
            raise OSError(f"its {algorithm} is {got[: len(digits)]}..., not {digits}...")
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"weights of {name}: could not be fetched ({error}); download {link} to weights/ or give --weights FILE"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a checkpoint, names as they are, and what else it holds. Never runs code from the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check its name")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # CRW's file keeps its arguments
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "GLOBAL" in str(error):  # the unpickler's word for a function or class that it will not touch
            raise UserError(
                f"{path}: refused, it holds pickled code beside tensors; save its state_dict alone"
            ) from error
        raise UserError(f"{path}: is not a PyTorch checkpoint, or is damaged; download it again") from error
    rest = []
    for key in ("state_dict", "model", "teacher", "method"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            rest = [str(other) for other in state if other != key]
            task = meta.get("task", "") if isinstance(meta := state.get("meta"), dict) else ""
            if task in MODELS or str(task).startswith("torchvision:"):  # of a training script
                rest[rest.index("meta")] = f"meta {task}"
            state = state[key]
            break
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors); save model.state_dict() with torch.save")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, rest


def fit(net: nn.Module, state: dict[str, Tensor]) -> str:
    """Load those of the weights that the net has a place for. "", or what is wrong with them."""
    wanted = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    missing = [key for key in wanted if key not in state]
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            return f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
    norms = [key for key in missing if re.search(r"(bn\d|downsample\.1)\.\w+$", key)]
    if missing == norms and any(re.search(r"(^|\.)(conv\d|downsample\.0)\.bias$", key) for key in state):
        return f"its BatchNorm is folded into the convolutions ({norms[0]} is gone)"
    if missing:
        return f"it lacks {len(missing)} of {len(wanted)} entries, such as {missing[0]}"
    stages = {key.split(".")[0] for key in wanted}
    for key in state:  # ResNet-34's stages begin as ResNet-18's
        if re.match(r"layer\d\.\d+\.\w+\.weight$", key) and key.split(".")[0] in stages and key not in wanted:
            return f"it has {key} as well"
    net.load_state_dict(state, strict=False)
    return ""


def recognise(state: dict[str, Tensor], rest: Sequence[str] = ()) -> str | None:
    """The system of MODELS that a released file is of, by its entries; None where these do not tell."""
    entries = {key: value.squeeze(2) if value.dim() == 5 else value for key, value in state.items()}
    lines = [*rest, *(f"{key} {'x'.join(map(str, value.shape))}" for key, value in entries.items())]
    text = "\n".join(lines)
    if own := re.search(r"^meta (.+)$", text, re.M):
        return own[1]
    return next((name for name, row in MODELS.items() if row.mark and re.search(row.mark, text, re.M)), None)


def fold_batchnorm(module: nn.Module) -> None:
    """Replace every convolution and the BatchNorm after it by one convolution with the same output."""
    for parent in list(module.modules()):
        for (name, conv), (after, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, nn.Identity())


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def propagate_labels(
    target: Tensor,
    features: Tensor,
    labels: Tensor,
    settings: Propagation,
    annotated: int = 1,
    ages: Sequence[int] | None = None,
    boxes: np.ndarray | None = None,
) -> Tensor:
    """Algorithm 1 of the paper for one target frame: each cell copies the labels of its k nearest context cells.

    target    C x h x w      features of the target frame
    features  n x C x h x w  features of the context frames, the `annotated` ones first
    labels    n x L x h x w  their soft labels
    ages      n              how many frames each lies before the target (default: n, ..., 1)
    boxes     n x L x 4      track: their objects' boxes, see label_boxes (default: found in the labels)
    returns   L x h x w      soft labels of the target frame, float32

    Exact, but the (h w) x (n h w) affinity matrix is never formed: a tile of target cells meets only the window of
    context cells that its search regions cover. Fastest when features are a view of an h x w x n x C tensor, as
    propagate_video keeps them: then a window is read in place.
    """
    s = settings
    n, C, h, w = features.shape
    ages = list(range(n, 0, -1)) if ages is None else ages
    if s.localization in ("window", "predicted"):
        return propagate_windows(target, features, labels, s, ages)
    if s.localization == "track":
        if boxes is None:
            boxes = np.stack([label_boxes(each, s) for each in labels])
        return propagate_boxes(target, features, labels, s, annotated, ages, boxes)
    overall, norm = s.aggregation == "overall", s.norm
    query = target.permute(1, 2, 0)  # h w C
    keys = features.permute(2, 3, 0, 1).contiguous()  # h w n C: the n frames of a cell side by side
    values = labels.permute(2, 3, 0, 1).reshape(h * w * n, -1).float()  # an entry is (cell, frame), cell-major

    # The parts of the context that are searched together: all frames (overall) or each frame (per-frame).
    fixed = s.localization == "fixed"
    exempt = min(annotated, n) if s.exempt_first and fixed else 0
    edges = [0, exempt, n] if overall else range(n + 1)
    parts = [(a, keys[:, :, a:b], fixed and a >= exempt) for a, b in itertools.pairwise(edges) if a < b]
    most = max(part.shape[2] for _, part, _ in parts)
    cpu = target.device.type == "cpu"
    again = most > 1 or (cpu and norm == "frame")  # many tiles read the same cells: a copy is worth it
    parts = [(a, part.contiguous() if again or (cpu and not local) else part, local) for a, part, local in parts]
    near_only = cpu and overall and fixed and norm != "frame"  # of one frame at a time the products would be too small
    ty, tx = (30, 8) if near_only else (12, 16) if cpu else (24, 32)  # caches like it small, a GPU few launches
    while (norm == "frame" or not all(local for *_, local in parts)) and h * w * most * ty * tx > 2**26:
        ty, tx = math.ceil(ty / 2), math.ceil(tx / 2)  # a window of the whole frame: keep the tile under 256 MiB
    query = query if norm == "topk" else query / s.temperature
    z = torch.empty(h, w, values.shape[1], device=target.device)
    scratch = query.new_empty(0)
    for y0, y1 in cuts(h, ty):
        for x0, x1 in cuts(w, tx):
            q = query[y0:y1, x0:x1].reshape(-1, C)  # q C
            found = []
            for first, part, local in parts:
                reach = s.radius - (s.shape == "circle") if local else max(h, w)
                ya, yb, xa, xb = max(y0 - reach, 0), min(y1 + reach, h), max(x0 - reach, 0), min(x1 + reach, w)
                top, bottom, left, right = (0, h, 0, w) if norm == "frame" else (ya, yb, xa, xb)
                rows, cols, m = bottom - top, right - left, part.shape[2]
                if scratch.numel() < rows * cols * m * len(q):
                    scratch = query.new_empty(rows * cols * m * len(q))
                A = scratch[: rows * cols * m * len(q)].view(rows, cols * m, len(q))
                if near_only and local:  # Eq. 1
                    near_products(part, q, s, (y0, y1, x0, x1), (ya, yb, xa, xb), A)
                elif cpu and cols == w:
                    products(part[top:bottom].flatten(0, 2), q, out=A.flatten(0, 1))
                else:
                    torch.bmm(part[top:bottom, left:right].flatten(1, 2), q.T.expand(rows, -1, -1), out=A)
                A = A.view(rows, cols, m, len(q)) if norm == "topk" else A.view(rows, cols, m, len(q)).float()
                near = A[ya - top : yb - top, xa - left : xb - left].flatten(0, 1)  # cells m q
                outside = beyond(s, (y0, y1, x0, x1), (ya, yb, xa, xb), A.device) if local else None
                if norm == "region" and local:
                    near.masked_fill_(outside[:, None], -math.inf)
                best, cell, frame = nearest(near, outside, s.topk)
                if norm == "topk":
                    best = total = best.float() / s.temperature
                else:
                    peak = A.amax((0, 1, 2))
                    total = A.sub_(peak).exp_().sum((0, 1, 2)).log_().add_(peak)[None]  # log-sum-exp
                found.append((best, ((ya + cell // (xb - xa)) * w + xa + cell % (xb - xa)) * n + first + frame, total))
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


# MKL leaves out AVX-512 on AMD's processors: there oneDNN multiplies twice as fast, as a 1x1 convolution.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and "AMD" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
)


def products(keys: Tensor, queries: Tensor, out: Tensor) -> None:
    """Dot products of keys (cells x C) and queries (q x C), into out (cells x q)."""
    small = out.numel() < 2**15  # the call would cost what it saves
    if small or not (ONEDNN and keys.is_cpu and keys.dtype == torch.float32):
        torch.mm(keys, queries.T, out=out)
        return
    kernels = queries[..., None, None]
    some = max(1, 2**20 // len(queries))  # more at a time would be memory that is new each time
    for part, place in zip(keys.split(some), out.split(some), strict=True):
        picture = part.view(1, 1, *part.shape).permute(0, 3, 1, 2)  # 1 C 1 cells, channels last
        # F.conv2d would take another path with one thread, and round to bfloat16 under autocast.
        answer = torch.mkldnn_convolution(
            picture, kernels, None, padding=(0, 0), stride=(1, 1), dilation=(1, 1), groups=1
        )
        place.copy_(answer[0, :, 0].T)


def near_products(part: Tensor, q: Tensor, s: Propagation, tile: tuple, window: tuple, out: Tensor) -> None:
    """The products of a tile's queries (q x C) and the context cells of its window (part: h x w x m x C), row by row of
    the window and without most of those that the fixed region forbids, whose place in `out` is left as it was.
    out: rows x (columns m) x q."""
    (y0, y1, x0, x1), (ya, yb, xa, xb), R, m = tile, window, s.radius, part.shape[2]
    for y, row in zip(range(ya, yb), out, strict=True):
        away = max(y0 - y, y - y1 + 1, 0)  # rows to the nearest query
        near = R if s.shape == "square" else math.isqrt(R**2 - away**2 - 1)
        rows = slice((max(y - R, y0) - y0) * (x1 - x0), (min(y + R + 1, y1) - y0) * (x1 - x0))
        left, right = max(x0 - near, xa), min(x1 + near, xb)
        products(part[y, left:right].flatten(0, 1), q[rows], out=row[(left - xa) * m : (right - xa) * m, rows])


def beyond(s: Propagation, tile: tuple, window: tuple, device) -> Tensor:
    """Which window cells lie outside the fixed region of each tile cell: window cells x tile cells, bool."""
    (y0, y1, x0, x1), (ya, yb, xa, xb) = tile, window
    dy = (torch.arange(ya, yb, device=device)[:, None] - torch.arange(y0, y1, device=device)).square()
    dx = (torch.arange(xa, xb, device=device)[:, None] - torch.arange(x0, x1, device=device)).square()
    dy, dx = dy[:, None, :, None], dx[None, :, None, :]
    outside = dy + dx >= s.radius**2 if s.shape == "circle" else torch.maximum(dy, dx) > s.radius**2
    return outside.flatten(0, 1).flatten(1, 2)


def nearest(A: Tensor, outside: Tensor | None, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest affinities of each query. A: cells x frames x q; outside: cells x q or None. -> value, cell, frame,
    each k x q.

    The region does not depend on the frame, so the k best entries lie in the k best cells by their best frame: mask
    and search the cells' maxima, then only the k x frames entries behind the k best.
    """
    peak = A.amax(1)  # cells q
    if outside is not None:
        peak.masked_fill_(outside, -math.inf)
    k, frames = min(topk, len(peak)), A.shape[1]
    peak, cell = peak.topk(k, dim=0)
    kept = A.gather(0, cell[:, None].expand(-1, frames, -1)).masked_fill_((peak == -math.inf)[:, None], -math.inf)
    best, entry = kept.flatten(0, 1).topk(min(topk, k * frames), dim=0)
    return best, cell.gather(0, entry // frames), entry % frames


def propagate_windows(target: Tensor, features: Tensor, labels: Tensor, s: Propagation, ages: Sequence[int]) -> Tensor:
    """propagate_labels where each context frame is searched in a square window of (2 radius + 1)^2 cells.

    window: about the target cell, without what lies beyond the frame (CorrFlow). predicted (MAST): in frames more than
    15 back the window is centred where a search of the same size over cells D apart, D = 2, 3 or 4 by the frame's age,
    expects the target cell. It is read bilinearly; beyond the frame features and labels are 0.
    """
    n, _, h, w = features.shape
    R, S = s.radius, 2 * s.radius + 1
    query = (target / s.temperature).permute(1, 2, 0)  # h w C
    keys, values = features.permute(0, 2, 3, 1), labels.permute(0, 2, 3, 1).float()  # n h w C, n h w L
    d = torch.arange(-R, R + 1, device=target.device)
    ys, xs = torch.arange(h, device=d.device), torch.arange(w, device=d.device)
    beyond_y, beyond_x = (((i[:, None] + d < 0) | (i[:, None] + d >= len(i))) for i in (ys, xs))  # h S, w S
    far = {}  # context frame -> the middle of each target cell's window, h x w x (y, x)
    for i, age in enumerate(ages):
        if s.localization == "predicted" and age > 15:
            far[i] = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), -1).float()
            D = min(4, age // 15 + 1)
            # the cells D apart are a frame of their own
            for y, x in itertools.product(range(min(D, h)), range(min(D, w))):
                P = correlate(query[y::D, x::D], keys[i, y::D, x::D], R).flatten(2).softmax(-1).unflatten(2, (S, S))
                far[i][y::D, x::D] += D * torch.stack([P.sum(3) @ d.float(), P.sum(2) @ d.float()], -1)
    flat = {i: keys[i].flatten(0, 1).contiguous() for i in far}
    z = torch.zeros(h, w, values.shape[3], device=d.device)
    for y0, y1 in cuts(h, max(1, 2**24 // (w * n * S * S))):
        A, places = [], {}  # affinities of rows y0..y1, each S x S
        for i in range(n):
            if i not in far:
                A.append(correlate(query[y0:y1], keys[i], R, y0))
                continue
            places[i] = corners(far[i][y0:y1].flatten(0, 1), R, (h, w))
            cell, inside, part_y, part_x = places[i]
            a = []
            for q, c in zip(query[y0:y1].flatten(0, 1).split(256), cell.flatten(1).split(256), strict=True):
                if q.is_cpu:  # one product with the cells from the first to the last of the windows
                    first = c.min()
                    a.append((q @ flat[i][first : c.max() + 1].T).gather(1, c - first))
                else:  # which are not known there without waiting
                    a.append((flat[i][c] @ q[:, :, None])[..., 0])
            a = torch.cat(a).float().view(cell.shape) * inside  # targets S+1 S+1
            a = a[:, :-1] * (1 - part_y) + a[:, 1:] * part_y
            A.append((a[:, :, :-1] * (1 - part_x) + a[:, :, 1:] * part_x).view(y1 - y0, w, S, S))
        A = torch.stack(A, 2)  # rows w n S S
        if s.localization == "window":
            A.masked_fill_(beyond_y[y0:y1, None, None, :, None] | beyond_x[None, :, None, None, :], -math.inf)
        shape, A = A.shape, A.flatten(2) if s.aggregation == "overall" else A.flatten(3)
        if s.topk < A.shape[-1]:
            best, entry = A.topk(s.topk, dim=-1, sorted=False)
            total = (A if s.norm == "region" else best).logsumexp(-1, keepdim=True)
            A = torch.zeros_like(A).scatter_(-1, entry, (best - total).exp())
        else:
            A = A.softmax(-1)
        A = A.view(shape) / (1 if s.aggregation == "overall" else n)
        for i in range(n):
            if i not in far:
                z[y0:y1] += gather(A[:, :, i], values[i], R, y0)
                continue
            cell, inside, part_y, part_x = places[i]
            a = A[:, :, i].flatten(0, 1)  # targets S S
            a = F.pad(a * (1 - part_x), (0, 1)) + F.pad(a * part_x, (1, 0))
            a = F.pad(a * (1 - part_y), (0, 0, 0, 1)) + F.pad(a * part_y, (0, 0, 1, 0))
            a = (a * inside).flatten(1)
            copied = F.embedding_bag(cell.flatten(1), values[i].flatten(0, 1), per_sample_weights=a, mode="sum")
            z[y0:y1] += copied.view(y1 - y0, w, -1)
    return z.permute(2, 0, 1)


def corners(centre: Tensor, R: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What bilinear windows of (2R + 1)^2 cells about `centre` (q x (y, x)) are read from: the numbers of the cells and
    whether they are in the grid, q x (2R + 2)^2, and the parts of the lower and the right one, q x 1 x 1."""
    base = centre.floor()
    y, x = (base.long()[:, :, None] + torch.arange(-R, R + 2, device=centre.device)).unbind(1)
    inside = ((y >= 0) & (y < grid[0]))[:, :, None] & ((x >= 0) & (x < grid[1]))[:, None]
    cell = y.clamp(0, grid[0] - 1)[:, :, None] * grid[1] + x.clamp(0, grid[1] - 1)[:, None]
    part = (centre - base)[:, :, None, None]
    return cell, inside, part[:, 0], part[:, 1]


def bands(x: Tensor, R: int, y0: int, rows: int) -> Iterator[Tensor]:
    """For each dy in -R..R what each 2R neighbouring cells of rows y0.. have within R in row y + dy of x (h x w x C), 0
    beyond the frame: views, rows * tiles x 4R x C, where the last tile of a row is none."""
    h, w, C = x.shape
    width, tiles = 2 * R, math.ceil(w / (2 * R)) + 1
    x = x[max(y0 - R, 0) : y0 + rows + R]
    x = F.pad(x, (0, 0, R, tiles * width - R - w, max(R - y0, 0), max(y0 + rows + R - h, 0) + 1))
    for dy in range(2 * R + 1):
        yield x[dy:].as_strided((rows * tiles, 2 * width, C), (width * C, C, 1))


def diagonals(A: Tensor, R: int) -> Tensor:
    """A view of A, tiles x 2R x 4R, that has for each of the 2R rows the 2R + 1 entries from the diagonal on."""
    return A.as_strided((*A.shape[:2], 2 * R + 1), (A.stride(0), A.stride(1) + 1, 1))


def correlate(query: Tensor, keys: Tensor, R: int, y0: int = 0) -> Tensor:
    """Dot products of each cell of `query` (rows y0.. of a frame, rows x w x C) with the cells within R of it in `keys`
    (h x w x C), 0 beyond the frame: rows x w x (2R + 1) x (2R + 1) float."""
    rows, w, C = query.shape
    query = F.pad(query, (0, 0, 0, 2 * R + -w % (2 * R))).reshape(-1, 2 * R, C)  # rows*tiles 2R C
    out = torch.empty(*query.shape[:2], 2 * R + 1, 2 * R + 1, device=query.device)
    for dy, band in enumerate(bands(keys, R, y0, rows)):
        out[:, :, dy] = diagonals(torch.bmm(query, band.transpose(1, 2)), R)
    return out.view(rows, -1, 2 * R + 1, 2 * R + 1)[:, :w]


def gather(weights: Tensor, values: Tensor, R: int, y0: int) -> Tensor:
    """Sums of the values (h x w x L) within R of each cell of rows y0.., by `weights` (rows x w x (2R + 1) x (2R + 1)):
    rows x w x L."""
    rows, w, S, _ = weights.shape
    weights = F.pad(weights, (0, 0, 0, 0, 0, 2 * R + -w % (2 * R))).view(-1, 2 * R, S, S)  # rows*tiles 2R S S
    A = torch.zeros(*weights.shape[:2], 4 * R, device=weights.device)
    out = torch.zeros(*weights.shape[:2], values.shape[2], device=weights.device)
    for dy, band in enumerate(bands(values, R, y0, rows)):
        diagonals(A, R).copy_(weights[:, :, dy])
        out.baddbmm_(A, band)
    return out.view(rows, -1, values.shape[2])[:, :w]


def propagate_boxes(
    target: Tensor,
    features: Tensor,
    labels: Tensor,
    s: Propagation,
    annotated: int,
    ages: Sequence[int],
    boxes: np.ndarray,
) -> Tensor:
    """propagate_labels where an object's label comes from its box in the context frame and goes to its box in the
    target frame (UVC's track, as released: github.com/Liusifei/UVC at c448a26). A context frame in which, or from
    which, any object is lost is used without boxes."""
    n, C, h, w = features.shape
    L, query = labels.shape[1], target.flatten(1).T / s.temperature  # hw C
    keys = features.permute(0, 2, 3, 1).reshape(n, h * w, C).contiguous()
    values = labels.flatten(2).float()
    # Where the objects go: the cells of each in the newest frame, each to the mean of its affinities.
    newest = int(np.argmin(ages))
    hard = values[newest].argmax(0)
    y, x = torch.arange(h * w, device=target.device) // w, torch.arange(h * w, device=target.device) % w
    places = torch.stack([x * w / max(w - 1, 1), y * h / max(h - 1, 1)], 1)  # hw (x, y), the corners aligned
    goal = np.full((L, 4), np.nan)
    goal[0] = 0, w, 0, h
    for l in range(1, L):
        cells = (hard == l).nonzero()[:, 0]
        if len(cells) > 1 and not np.isnan(boxes[newest, l, 0]):
            moved = [
                (keys[newest, part] @ query.T).float().softmax(1) @ places
                for part in cells.split(max(1, 2**26 // (h * w)))
            ]
            goal[l] = smooth_box(box_around(torch.cat(moved).cpu().numpy(), 5, 1.0, w, h), boxes[newest, l], w, h)
    z = torch.zeros(L, h * w, device=target.device)

    def small(box: np.ndarray) -> bool:
        return not (box[1] - box[0] >= 3 and box[3] - box[2] >= 3)  # true for nan, there is no box

    lost = [
        i >= annotated and any(values[i, l].sum() < 3 or small(boxes[i, l]) or small(goal[l]) for l in range(L))
        for i in range(n)
    ]
    for a, b in cuts(h * w, 192):
        scratch = query.new_empty(h * w, b - a)
        for i in range(n):
            products(keys[i], query[a:b], out=scratch)
            A = scratch.float()
            total = A.logsumexp(0)
            if lost[i]:
                best, cell = A.topk(min(s.topk, h * w), dim=0)
                z[:, a:b] += (values[i][:, cell] * (best - total).exp()).sum(1)
                continue
            for l in range(L):
                if np.isnan(boxes[i, l, 0]) or np.isnan(goal[l, 0]):
                    continue
                (left, right, top, bottom), box = boxes[i, l].astype(int), goal[l]
                into = ((x[a:b] >= box[0]) & (x[a:b] < box[1]) & (y[a:b] >= box[2]) & (y[a:b] < box[3])).nonzero()[:, 0]
                near = A.view(h, w, -1)[top:bottom, left:right]
                near = (near if len(into) == b - a else near[..., into]).flatten(0, 1)
                best, cell = near.topk(min(s.topk, len(near)), dim=0)
                copied = values[i, l].view(h, w)[top:bottom, left:right].flatten()[cell]
                z[l, a + into] += (copied * (best - total[into]).exp()).sum(0)
    return z.view(L, h, w) / n


def label_boxes(labels: Tensor, s: Propagation, before: np.ndarray | None = None) -> np.ndarray:
    """The box of each label of a frame (labels L x h x w) for `track`, L x (left, right, top, bottom) in cells: of an
    annotated frame, or after a frame whose boxes are `before`. nan: there is none, now or before."""
    (L, h, w), p = labels.shape, s.stride
    full = F.interpolate((labels if before is None else stretch(labels))[None].float(), scale_factor=p, mode="bilinear")
    hard = full[0].argmax(0).cpu().numpy()
    boxes = np.full((L, 4), np.nan)
    boxes[0] = 0, w, 0, h
    for l in range(1, L):
        points = np.argwhere(hard == l)[:, ::-1].astype(float)  # (x, y) in pixels of the network's input
        if len(points) and before is None:
            (left, top), (right, bottom) = points.min(0), points.max(0)
            boxes[l] = grow_box(np.array([left, right, top, bottom]), 0.6, w * p, h * p) // p
        elif len(points):
            boxes[l] = smooth_box(box_around(points, 20, 0.6, w * p, h * p) // p, before[l], w * p, h * p)
    return boxes


def grow_box(box: np.ndarray, margin: float, w: float, h: float) -> np.ndarray:
    """A box (left, right, top, bottom) grown by margin / 2 of its size on each side, to whole cells of the frame."""
    left, right, top, bottom = box
    x, y = margin / 2 * (right - left), margin / 2 * (bottom - top)
    grown = [np.floor(left - x), np.ceil(right + x), np.floor(top - y), np.ceil(bottom + y)]
    return np.clip(grown, 0, [w, w, h, h])


def box_around(points: np.ndarray, reach: float, margin: float, w: float, h: float) -> np.ndarray:
    """The box about the mode of the points (q x (x, y)), twice their mean distance from it to each side, grown.

    The mode is that of a mean shift from the point nearest to the mean: points within reach, Gaussian of sigma 4.
    """
    centre = points[((points - points.mean(0)) ** 2).sum(1).argmin()]
    moved = np.array([1.0, 0.0])
    while moved.sum() >= 0.1:  # signed, as released: a step to the left or up is the last
        distance = ((points - centre) ** 2).sum(1)
        near = distance <= reach**2
        weight = np.exp(-distance[near] / 32)
        moved = weight @ points[near] / weight.sum() - centre
        centre = centre + moved
    x, y = 2 * np.abs(points - centre).mean(0)
    box = np.clip([centre[0] - x, centre[0] + x, centre[1] - y, centre[1] + y], 0, [w, w, h, h])
    return grow_box(box, margin, w, h)


def smooth_box(box: np.ndarray, before: np.ndarray, w: float, h: float) -> np.ndarray:
    """A box of the middle of `box`, whose size is a tenth the new and nine tenths the old one; nan if it had none."""
    size = 0.1 * (box[1::2] - box[::2]) + 0.9 * (before[1::2] - before[::2])
    middle = (box[::2] + box[1::2]) / 2
    return grow_box(np.stack([middle - size / 2, middle + size / 2], 1).ravel(), 0, w, h)


def stretch(labels: Tensor) -> Tensor:
    """Each label that occurs (L x h x w) stretched to 0..1 over the frame."""
    low, high = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (labels - low) / (high - low).clamp_min(1e-12), labels)


def propagate_video(
    features: Iterable[Tensor],
    annotated: Sequence[tuple[Tensor, Tensor]],
    settings: Propagation,
    recent: Sequence[tuple[Tensor, Tensor]] = (),
    given: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[Tensor]:
    """Label frame after frame: yields the soft labels (L x h x w) of each target in `features` (C x h x w each).

    annotated: (features, labels) of the annotated frames. The first is frame 0, and the targets come after it, from
    frame 1 on; the others, of elsewhere in the video, are in the context too and count as far away.
    recent: the last targets and their labels, oldest first, to go on with an earlier run: the last settings.context, or
    all where settings.history.
    given: annotations that name some of the objects: target t (1, 2, ...) -> (labels L x h x w, named, L bools). Once
    t is predicted, the labels that are named replace their prediction and cover that of the others; from then on t is
    an annotated frame.
    The context lives in one ring buffer, so memory does not grow with the video. Each
    target is pulled only when it is due, so that several settings can share one pass over the frames (itertools.tee).
    """
    s, given = settings, given or {}
    (C, h, w), L, device = annotated[0][0].shape, len(annotated[0][1]), annotated[0][0].device
    fixed, spaced = len(annotated) if s.keep_first else 0, s.memory == "spaced"
    later = dict(zip(sorted(given), range(fixed, fixed + len(given)), strict=True)) if s.keep_first else {}
    pinned = fixed + len(later)
    ring = pinned + spaced  # slots: the annotated frames, those of `given`, frame 5 if spaced, the latest frames
    keys = torch.zeros(
        h, w, ring + s.context, C, device=device, dtype=annotated[0][0].dtype
    )  # as propagate_labels reads
    values = torch.zeros(h, w, ring + s.context, L, device=device)
    number: dict[int, int] = {}  # slot -> the frame in it
    boxes = np.zeros((ring + s.context, L, 4))

    def remember(slot: int, t: int, f: Tensor, z: Tensor, box: np.ndarray | None = None) -> None:
        keys[:, :, slot], values[:, :, slot], number[slot] = f.permute(1, 2, 0), z.permute(1, 2, 0), t
        if box is not None:
            boxes[slot] = box

    def remember_target(t: int, f: Tensor, z: Tensor) -> None:
        box = None
        if s.localization == "track":
            box = label_boxes(z, s, None if t in given else boxes[max(number, key=number.get)])
        if s.carry == "hard":
            z = F.one_hot(z.argmax(0), L).permute(2, 0, 1).float()
        if t in later:  # for good, so not among the latest as well
            remember(later[t], t, f, z, box)
            number.pop(ring + (t - 1) % max(s.context, 1), None)
            return
        if spaced and t == 5:
            remember(pinned, t, f, z, box)
        if s.context:
            remember(ring + (t - 1) % s.context, t, f, z, box)

    first = [(f, z, label_boxes(z, s) if s.localization == "track" else None) for f, z in annotated]
    for slot in range(fixed):
        remember(slot, -(10**6) if slot else 0, *first[slot])
    for i, each in enumerate(first[:1] * s.context if s.pad else () if s.keep_first else first[: s.context]):
        remember(ring + (-1 - i) % s.context, 0, *each)  # in the places of frames 0, -1, ...
    recent = list(recent)
    for t, (f, z) in enumerate(recent, 1):
        remember_target(t, f, z)
    for t, f in enumerate(features, len(recent) + 1):
        slots = sorted(number)
        if spaced:  # frame 5 unless the ring gives it, and every second frame of the ring
            latest = [i for i in slots if i >= ring and (t - number[i]) % 2 == 1]
            slots = [i for i in slots if i < pinned or (i < ring and 5 not in (number[j] for j in latest))] + latest
        whole = slots == list(range(len(slots)))  # then the buffer is read in place
        k, v = (x[:, :, : len(slots)] if whole else x[:, :, slots] for x in (keys, values))
        ages, first_ones = [t - number[i] for i in slots], sum(i < pinned for i in slots)
        z = propagate_labels(f, k.permute(2, 3, 0, 1), v.permute(2, 3, 0, 1), s, first_ones, ages, boxes[slots])
        if s.carry == "minmax":
            z = stretch(z)
        if t in given:
            own, named = given[t]
            z = torch.where(named[:, None, None], own, z * (1 - own[named].sum(0)))
        yield z
        remember_target(t, f, z)


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
    labels: Tensor, ids: Sequence[int], size: tuple[int, int], minmax: bool = False, chunk: int = 8
) -> Tensor:
    """Soft labels L x h x w -> mask H x W uint8: up-sampled bilinearly to full size, then the arg-max (section 4.2).

    minmax stretches each label that occurs to 0..1 over the frame first. Labels are up-sampled `chunk` at a time.
    """
    best = winner = None
    for start in range(0, len(labels), chunk):
        full = F.interpolate(labels[None, start : start + chunk].float(), size=size, mode="bilinear")[0]
        if minmax:
            full = stretch(full)
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

    info is what engine_info says. step(frame, mask) starts at an annotated frame, step(frame) follows; both give the
    frame's mask. read("labels") and read("features") are those of the last step. One thread at a time. Raises UserError
    for a file that is not a graph of export.py or cannot run here.
    """
    info = engine_info(path)
    return (OnnxEngine if path.suffix == ".onnx" else TensorRTEngine)(path, info, device)


def engine_info(path: Path) -> dict:
    """What export.py wrote into a graph or an engine about itself: model, settings, height, width, objects, ..."""
    if not path.is_file():
        raise UserError(f"{path}: no such engine; make it with export.py")
    if path.suffix not in (".onnx", ".engine"):
        raise UserError(f"{path}: is neither .onnx nor .engine; give a file that export.py wrote")
    text, twin = TensorRTEngine.read_file(path)[0] if path.suffix == ".engine" else None, path.with_suffix(".onnx")
    if not (text or twin.is_file()):  # built by trtexec: what it is stands in the graph that it was built from
        raise UserError(f"{path}: was not written by softcopy's export.py, nor is {twin} beside it")
    try:
        if not text:
            import onnx

            text = {entry.key: entry.value for entry in onnx.load(twin).metadata_props}["softcopy"]
        info = json.loads(text)
        return {
            key: info[key] for key in ("version", "model", "settings", "height", "width", "objects", "dtype")
        } | info
    except ImportError as error:
        raise UserError(f"{path}: needs the onnx package; run pip install onnx") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: was not written by softcopy's export.py; make it again with export.py") from error
    except Exception as error:  # of protobuf
        raise UserError(f"{path}: ONNX cannot load it; is it whole? Export it again") from error


def engine_settings(path: Path, info: dict) -> Propagation:
    """The settings that a graph was exported with; info: what engine_info says of it."""
    try:
        return Propagation(**info["settings"])
    except TypeError as error:
        raise UserError(
            f"{path}: was made by softcopy {info['version']}, which this {__version__} cannot read; make it again with "
            "export.py"
        ) from error


class OnnxEngine:
    """A graph run by ONNX Runtime: TensorRT, CUDA or CPU, whichever comes first of those that are there.

    The memory stays on the device, twice: a step reads one copy and writes the other.
    """

    def __init__(self, path: Path, info: dict, device: str = "auto"):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{path}: needs the onnxruntime package; run pip install onnxruntime") from error
        where, order = pick_device(device), [("CPUExecutionProvider", {})]
        if where.type == "cuda":
            number = {"device_id": torch.cuda.current_device() if where.index is None else where.index}
            order.insert(0, ("CUDAExecutionProvider", number))
            with contextlib.suppress(ImportError):
                import tensorrt  # noqa: F401  with its libraries, which ONNX Runtime's TensorRT wants

                # Building takes minutes: the engine is kept, by the graph's content (the name alone forgets weights).
                cache = str(Path(torch.hub.get_dir()).parent / "softcopy")
                kept = {"trt_engine_cache_enable": True, "trt_engine_cache_path": cache}
                kept |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": cache}
                kept |= {"trt_engine_cache_prefix": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
                order.insert(0, ("TensorrtExecutionProvider", number | kept))
            if hasattr(onnxruntime, "preload_dlls"):
                with contextlib.redirect_stdout(sys.stderr):
                    onnxruntime.preload_dlls()  # CUDA of the pip packages, where torch has not loaded the same
        order = [each for each in order if each[0] in onnxruntime.get_available_providers()]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_mem_pattern = False  # a plan for all tiles at once costs 280 MiB at 480p and saves no time
        options.add_session_config_entry("session.x64quantprecision", "1")  # INT8 sums overflow on x86 without VNNI
        self.session = None
        while self.session is None:
            try:
                self.session = onnxruntime.InferenceSession(str(path), options, providers=order, enable_fallback=0)
            except Exception as error:
                reason, failed = str(error).splitlines()[0][:200], order.pop(0)[0].removesuffix("ExecutionProvider")
                if not order:
                    raise UserError(
                        f"{path}: ONNX Runtime cannot load it ({reason}); is it whole? Export it again"
                    ) from error
                print(f"note: {path}: {failed} cannot run it ({reason}); going on without", file=sys.stderr)
        self.info, self.seen = info, 0
        self.provider = self.session.get_providers()[0].removesuffix("ExecutionProvider")
        if self.provider == "CPU" and where.type == "cuda":
            if device != "auto":
                raise UserError(f"--device {device}: ONNX Runtime has no CUDA here; run pip install onnxruntime-gpu")
            print(f"note: {path}: ONNX Runtime has no CUDA here, so the CPU runs it", file=sys.stderr)
        place = ("cpu", 0) if self.provider == "CPU" else ("cuda", number["device_id"])

        def zeros(tensor):
            kind = {"float": "float32"}.get(name := tensor.type[7:-1], name)  # tensor(float16) -> float16
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(tensor.shape, kind), *place)

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
        return self.outputs[name].numpy().copy()  # on the CPU a view of what the next step writes


class TensorRTEngine:
    """An engine run by TensorRT on the GPU that it was built for; the memory is handled as in OnnxEngine."""

    MAGIC = b"softcopy engine\n"  # then 4 bytes, the length of the JSON that follows; then TensorRT's plan

    @classmethod
    def read_file(cls, path: Path) -> tuple[bytes | None, bytes]:
        """The JSON that export.py wrote (none in a file of trtexec's), and TensorRT's plan."""
        content = path.read_bytes()
        if not content.startswith(cls.MAGIC):
            return None, content
        start = len(cls.MAGIC) + 4
        end = start + int.from_bytes(content[start - 4 : start], "little")
        return content[start:end], content[end:]

    def __init__(self, path: Path, info: dict, device: str = "auto"):
        try:
            import tensorrt as trt
        except ImportError as error:
            raise UserError(
                f"{path}: needs the tensorrt package; run pip install tensorrt, or give the .onnx"
            ) from error
        if device == "cpu" or not torch.cuda.is_available():
            raise UserError(f"{path}: a TensorRT engine needs an NVIDIA GPU; give the .onnx to run elsewhere")
        where = torch.device("cuda" if device == "auto" else device)
        self.info, self.engine = info, None
        here, built = torch.cuda.get_device_name(where), info.get("hardware")
        if built in (None, here):
            with torch.cuda.device(where):
                self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
                self.engine = self.runtime.deserialize_cuda_engine(self.read_file(path)[1])
        if self.engine is None:
            made = f"{built or 'another GPU'} and TensorRT {info.get('tensorrt', '(unknown)')}"
            raise UserError(
                f"{path}: was built for {made}, here is {here} and {trt.__version__}, or it is damaged; build it again "
                "here"
            )
        if tuple(self.engine.get_tensor_shape("frame")) != (info["height"], info["width"], 3):
            raise UserError(f"{path}: was built from another graph than the .onnx beside it; build it again")
        self.provider, self.seen, self.tensors = "TensorRT", 0, {}
        with torch.cuda.device(where):
            self.context, self.stream = self.engine.create_execution_context(), torch.cuda.Stream()
            if self.context is None:
                raise UserError(f"{path}: {here} has not enough free memory for it; close what else runs there")
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
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise UserError("TensorRT could not run a step (its reasons stand above); build the engine again here")
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
# Training: what train_finetune.py and train_uvc_plus.py share


@dataclass
class Training:
    """Flags of both training scripts."""

    out: Path = Path("results/train")
    """Folder for weights.pth (for propagate.py), last.pth (to go on from), log.csv, TensorBoard and pictures; one that
    all nodes share."""
    resume: bool = True
    """Go on from OUT/last.pth where there is one; --no-resume begins again."""
    max_steps: int = 0
    """Stop after this many steps in all; 0: after the last epoch."""
    accumulate: int = 1
    """Parts that a batch is cut into, their gradients added up: for small memories."""
    workers: int = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    """Processes that read and augment the data, for each GPU."""
    amp: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of convolutions; float16 with loss scaling."""
    device: str = "auto"
    """auto, cpu or cuda; under torchrun each process takes a GPU of its own."""
    seed: int = 0
    """Of initial weights, order and augmentation."""
    save_minutes: float = 10
    """Minutes between checkpoints; also one at the end of an epoch (of a minute or more) and on SIGTERM or Ctrl-C."""
    validate: Path | None = None
    """A DAVIS root: score label propagation on a few clips while training."""
    validate_every: int = 5
    """Epochs between two such scores."""
    validate_sequences: str = ""
    """Clips to score, separated by commas (default: the first two of the val list)."""


# what may change when a run is resumed; every other flag decides what is learnt
FREE = {"out", "resume", "max_steps", "workers", "device", "save_minutes"}
FREE |= {"validate", "validate_every", "validate_sequences", "look_every"}
FREE |= {"data", "image_data"}  # the number of samples must be the same
MOVED = {"finetune", "init", "autoencoder"}  # not read again; the same name elsewhere is taken for the same file


class Unreadable(Exception):
    """Raised with "path: why" by a data set that cannot read a sample: train() names it and draws another."""


def rank_world() -> tuple[int, int]:
    """This process and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def all_gather(x: Tensor) -> Tensor:
    """x of all processes, one after the other."""
    world = rank_world()[1]
    if world == 1:
        return x
    x = x.contiguous()  # not channels last, whose strides a gather does not heed
    everybody = x.new_empty(world * len(x), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(everybody, x)
    return everybody


def start_training(args: Training, streams: dict[str, tuple[Sequence, str]]) -> torch.device:
    """Check the flags, the batch sizes of the streams (as in train) and both against OUT/last.pth, seed, join the
    process group. To be called first."""
    flags = {"max_steps": 0, "accumulate": 1, "workers": 0, "save_minutes": 0, "validate_every": 1, "seed": 0}
    for flag, least in flags.items():
        if not getattr(args, flag) >= least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give {least} or more")
    if args.validate:
        clips(args)
    parts = rank_world()[1] * args.accumulate
    for samples, flag in streams.values():
        size, what = getattr(args, flag), f"--{flag.replace('_', '-')} {getattr(args, flag)}"
        if len(samples) < size:
            raise UserError(f"{what}: there are {len(samples)} samples to learn from; give fewer")
        if size % parts:
            raise UserError(f"{what}: is no multiple of {parts}, processes x --accumulate; change one of them")
    step = read_checkpoint(args, streams)["step"] if resumes(args) else 0
    name, _, index = args.device.partition(":")
    if name in ("auto", "cuda") and torch.cuda.is_available():  # on GPU 0 each process would keep some memory
        name, index = "cuda", os.environ.get("LOCAL_RANK", index or "0")
    device = pick_device(f"{name}:{index}" if index else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same
    if rank_world()[1] > 1:
        backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        patience = timedelta(days=1)  # the others wait for a validation
        torch.distributed.init_process_group(backend, timeout=patience, device_id=gpu)
        everybody = [None] * rank_world()[1]
        found = step, sorted(str(path.relative_to(args.out)) for path in args.out.rglob("*.pth"))
        torch.distributed.all_gather_object(everybody, found)
        if any(other != found for other in everybody):
            raise UserError(f"--out {args.out}: processes find other files there; give a folder that all nodes share")
    torch.manual_seed(args.seed)
    return device


def resumes(args: Training) -> bool:
    """Whether train() goes on from OUT/last.pth, which holds all weights."""
    return args.resume and (args.out / "last.pth").is_file()


def read_checkpoint(args: Training, streams: dict[str, tuple[Sequence, str]]) -> dict:
    """OUT/last.pth of train(). UserError if it was trained with other flags or another number of samples."""
    path = args.out / "last.pth"
    try:
        state = {"samples": {}, **torch.load(path, map_location="cpu", weights_only=True)}  # older ones have no count
        state = {key: state[key] for key in ("step", "config", "samples", "method", "optimizer", "scaler")}
    except Exception as error:  # of the unpickler: many kinds
        raise UserError(f"{path}: is not a checkpoint of this script, or damaged; delete it or --no-resume") from error
    remedy = "give the same, another --out, or --no-resume to begin again"
    for flag, old in state["config"].items():
        now = str(getattr(args, flag, None))
        if now != old and flag not in FREE and not (flag in MOVED and Path(now).name == Path(old).name):
            raise UserError(f"{path}: was trained with --{flag.replace('_', '-')} {old}, not {now}; {remedy}")
    for name, (samples, _) in streams.items():
        if (old := state["samples"].get(name, len(samples))) != len(samples):
            raise UserError(f"{path}: was trained with {old} samples ({name}), not {len(samples)}; {remedy}")
    return state


def read_start(path: Path) -> dict[str, Tensor]:
    """Weights to start from, with torchvision's names: of a released file, or weights.pth or last.pth of a run."""
    prefix = r"^(module\.)?(encoder_q\.|net\.|backbone\.)?"
    return {re.sub(prefix, "", key): value for key, value in read_weights(path)[0].items()}


def write_checkpoint(path: Path, content: dict) -> None:
    """torch.save, whole or not at all; UserError where it cannot be written."""
    whole = io.BytesIO()  # torch.save to a full disk is no OSError
    torch.save(content, whole)
    with atomic(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, such as (run, stream, step, place)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Draws(torch.utils.data.Dataset):
    """A data set asked by (index, seed, step): what is random in a sample depends on its seed alone; what changes while
    training reads samples.step. A sample that cannot be read gives place to another; None in its place after 100."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, key: tuple[int, int, int]):
        (index, seed, self.samples.step), skipped = key, []
        torch.manual_seed(seed)
        while len(skipped) < 100:
            try:
                return self.samples[index], skipped
            except Unreadable as error:
                skipped.append(str(error))
                index = int(torch.randint(len(self.samples), ()))
        return None, skipped

    @staticmethod
    def collate(drawn: list) -> tuple:
        samples = [sample for sample, _ in drawn]
        whole = all(sample is not None for sample in samples)
        return torch.utils.data.default_collate(samples) if whole else None, [
            line for _, lines in drawn for line in lines
        ]


class Batches(torch.utils.data.Sampler):
    """Endless shuffled batches of (index, seed, step) from step `start` on, full ones only; those of a step are a
    function of (seed, step), and a process takes its slice of them."""

    def __init__(self, count: int, size: int, seed: tuple[int, ...], start: int):
        self.count, self.size, self.seed, self.start = count, size, seed, start

    def __iter__(self):
        rank, world = rank_world()
        share, epoch = self.size // world, None
        for step in itertools.count(self.start):
            if step // (self.count // self.size) != epoch:
                epoch = step // (self.count // self.size)
                order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed_of(*self.seed, epoch)))
            first = step % (self.count // self.size) * self.size
            places = range(rank * share, (rank + 1) * share)
            yield [(int(order[first + place]), seed_of(*self.seed, step, place), step) for place in places]


def visible(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """The folders below one, in order, with the names of their files; links are followed, what is hidden left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield place, sorted(name for name in files if name[0] != ".")


def pictures_in(folder: str | Path) -> list[str]:
    """The pictures below a folder, in order."""
    return [f"{at}/{name}" for at, files in visible(folder) for name in files if name.lower().endswith(PICTURES)]


def quiet_worker(_) -> None:
    """A loader process leaves signals to the main one, which wants its last batches before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)


def each(batch, do: Callable[[Tensor], Tensor]):
    """A batch of nested dicts, lists and tuples with `do` applied to its tensors."""
    if isinstance(batch, dict):
        return {key: each(value, do) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(each(value, do) for value in batch)
    return do(batch) if isinstance(batch, Tensor) else batch


class Curve:
    """A CSV with a row for each call; rows of later steps than `step`, from a run that was cut off, are dropped."""

    def __init__(self, path: Path, step: int):
        self.path, self.columns, self.kept = path, [], []
        if step and path.is_file():
            self.kept = [row for row in self.read() if None not in row.values() and int(row["step"]) <= step]

    def read(self) -> list[dict]:
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def add(self, row: dict) -> None:
        row = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        if row.keys() <= set(self.columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
            return
        rows = [*(self.read() if self.columns else self.kept), row]  # the first, or one with new columns
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        with atomic(self.path) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def clips(args: Training) -> list[str]:
    """The sequences that validate() scores. UserError if they are not there."""
    names = [name for name in args.validate_sequences.split(",") if name]
    listing = args.validate / "ImageSets" / "2017" / "val.txt"
    if not names and not listing.is_file():
        raise UserError(f"--validate {args.validate}: has no ImageSets/2017/val.txt; give the root of DAVIS 2017")
    names = names or listing.read_text().split()[:2]
    for place in (f"{folder}/480p/{name}" for folder in ("JPEGImages", "Annotations") for name in names):
        if not (args.validate / place).is_dir():
            raise UserError(
                f"--validate {args.validate}: has no {place}; give DAVIS 2017 and --validate-sequences of it"
            )
    return names


def validate(args: Training, flags: Sequence[str]) -> dict[str, float]:
    """J&F of label propagation with OUT/weights.pth, by evaluate.py in a process of its own; {} if that fails."""
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        command = [sys.executable, Path(__file__).parent / "evaluate.py", "--data", args.validate, "--out", folder]
        command += [
            "--weights",
            args.out / "weights.pth",
            "--sequences",
            ",".join(clips(args)),
            "--device",
            args.device,
            *flags,
        ]
        alone = {name: value for name, value in os.environ.items() if not name.endswith(("RANK", "WORLD_SIZE"))}
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        if done.returncode:
            tqdm.write(
                f"warning: validation failed: {(done.stderr.splitlines() or ['no message'])[-1]}", file=sys.stderr
            )
            return {}
        overall = json.loads((Path(folder) / "scores.json").read_text())["overall"]
    return {name: 100 * overall[name] for name in ("J&F_M", "J_M", "F_M")}


def train(
    args: Training,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float],
    epochs: int,
    steps_per_epoch: int,
    streams: dict[str, tuple[Sequence, str]],
    weights: Callable[[], dict],
    validation: Sequence[str] = (),
    score: Callable[[], dict[str, float]] | None = None,
    look: Callable[[], np.ndarray] | None = None,
    look_every: int = 0,
) -> None:
    """Train, on one process or many, so that a run that is cut off and resumed ends with the same weights.

    method(batch, step) gives scalar tensors, the same ones at all steps of an epoch: "loss" is minimised, all are
    logged. streams names data sets and the flags of their batch sizes over all processes, as checked by start_training;
    batch[name] is what their samples collate to. Randomness is a function of (seed, step, place in the batch), so a
    checkpoint needs no random states, and processes x accumulated parts see the same samples however they are shared
    out. lr(epoch), epochs from 0. weights() is saved as OUT/weights.pth; validation are flags of evaluate.py for
    --validate; score() is run by all processes at the end of an epoch; look() is a picture, H x W x 3 uint8, of the
    step before. Raises UserError for a loss that is not finite, data that cannot be read and a full disk; the last
    checkpoint stays.
    """
    from torch.utils.tensorboard import SummaryWriter

    rank, world = rank_world()
    device, last = next(method.parameters()).device, args.out / "last.pth"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); choose another") from error
    total = min(epochs * steps_per_epoch, args.max_steps or math.inf)
    streams = {name: (samples, getattr(args, flag)) for name, (samples, flag) in streams.items()}
    scaler, step = torch.amp.GradScaler(device.type, enabled=args.amp == "float16"), 0
    if resumes(args):
        state = read_checkpoint(args, streams)
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step = state["step"]
    loaders = [
        iter(
            torch.utils.data.DataLoader(
                Draws(samples),
                batch_sampler=Batches(len(samples), size, (args.seed, number), step),
                collate_fn=Draws.collate,
                num_workers=math.ceil(args.workers / len(streams)),
                worker_init_fn=quiet_worker,
                pin_memory=device.type == "cuda",
            )
        )
        for number, (samples, size) in enumerate(streams.values())
    ]
    parallel = method
    if world > 1:
        parallel = nn.parallel.DistributedDataParallel(
            method, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )

    def save() -> None:
        state = {"step": step, "config": {flag: str(value) for flag, value in vars(args).items()}}
        state["samples"] = {name: len(samples) for name, (samples, _) in streams.items()}
        state |= {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        write_checkpoint(last, state)
        write_checkpoint(args.out / "weights.pth", weights())

    stopped, halt, lost, sums = [], 0, set(), {}

    def stop(number: int, _) -> None:
        if stopped and number == signal.SIGINT:  # asked twice: now
            raise KeyboardInterrupt
        stopped.append(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    began = saved = time.perf_counter()
    waited, first, since = 0.0, step, (began, step)
    log, scores = (Curve(args.out / name, step) for name in ("log.csv", "validation.csv"))  # rank 0 adds to them
    board = SummaryWriter(args.out, purge_step=step) if not rank else None
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)

    def due_to_validate() -> bool:
        return bool(args.validate) and (step == total or step % (args.validate_every * steps_per_epoch) == 0)

    def judge() -> None:
        """Scores of an epoch that is over, and of the end."""
        row = score() if score and step % steps_per_epoch == 0 else {}
        if due_to_validate() and not rank:
            row |= validate(args, validation)
        if row and not rank:
            epoch = (step - 1) // steps_per_epoch
            scores.add({"step": step, "epoch": epoch, **row})
            for name, value in row.items():
                board.add_scalar(f"validation/{name}", value, step)
            tqdm.write(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        method.train()

    method.train()
    try:
        if step and not any(int(row["step"]) == step for row in scores.kept):  # stopped before it could be judged
            judge()
        while step < total and not halt:
            epoch = step // steps_per_epoch
            for group in optimizer.param_groups:
                group["lr"] = lr(epoch)
            start, batch = time.perf_counter(), {}
            for loader, name in zip(loaders, streams, strict=True):
                batch[name], skipped = next(loader)
                for line in set(skipped) - lost:
                    tqdm.write(f"warning: {line}: skipped", file=sys.stderr)
                    with (args.out / "unreadable.txt").open("a") as file:
                        file.write(f"{line}\n")
                lost.update(skipped)
                if batch[name] is None or len(lost) > max(10, len(streams[name][0]) // 10):
                    raise UserError(f"{len(lost)} samples of {name} cannot be read, such as {min(lost)}; check --data")
            waited += time.perf_counter() - start
            batch = each(batch, lambda x: x.to(device, non_blocking=True))
            for part in range(args.accumulate):
                torch.manual_seed(seed_of(args.seed, step, rank * args.accumulate + part))
                cut = each(batch, lambda x, part=part: x.chunk(args.accumulate)[part])
                final = part == args.accumulate - 1 or world == 1
                with contextlib.nullcontext() if final else parallel.no_sync():
                    with torch.autocast(device.type, getattr(torch, args.amp), enabled=args.amp != "float32"):
                        terms = parallel(cut, step)
                    scaler.scale(terms["loss"] / args.accumulate).backward()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / args.accumulate
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            bar.update()
            halt = max(stopped, default=0)
            if world > 1:  # all stop at the same step
                flag = torch.tensor(halt)  # on the CPU: a GPU would have to finish the step first
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
                halt = int(flag)
            over = step % steps_per_epoch == 0
            since_saved = (time.perf_counter() - saved) / 60
            due = halt or due_to_validate() or step == total
            due = due or since_saved > (min(1, args.save_minutes) if over else args.save_minutes)
            if due or over or step % 10 == 0 or step <= 10:
                now, steps = time.perf_counter(), step - since[1]
                means = {name: float(value) / steps for name, value in sums.items()}
                whole = not due or all(value.isfinite().all() for value in method.parameters())
                if not (math.isfinite(means["loss"]) and whole):
                    raise UserError(
                        f"loss or weights are no numbers by step {step}; {last if last.exists() else 'nothing'} is "
                        "kept from before; lower the learning rate, or take --amp float32"
                    )
                speed = steps * sum(size for _, size in streams.values()) / (now - since[0])
                row = {"lr": lr(epoch), "images_per_s": speed, "waiting": waited / (now - began), **means}
                bar.set_postfix({name: f"{value:.4g}" for name, value in {**means, **row}.items()}, refresh=False)
                if not rank:
                    log.add({"step": step, "epoch": epoch, **row})
                    for name, value in row.items():
                        board.add_scalar(name, value, step)
                sums, since = {}, (now, step)
            if due:
                if not rank:
                    save()
                saved = time.perf_counter()
            if look and not rank and step % look_every == 0:
                picture = look()
                with atomic(args.out / "pictures" / f"{step:07}.jpg") as path:
                    path.write_bytes(cv2.imencode(".jpg", picture[..., ::-1])[1])
                board.add_image("picture", picture, step, dataformats="HWC")
            if (over or step == total) and not halt:
                judge()
                since = time.perf_counter(), step
    except OSError as error:  # of the logs; a checkpoint's says so itself
        why = error.strerror or error
        raise UserError(f"{args.out}: cannot be written ({why}); free space, the same command goes on") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        bar.close()
        with contextlib.suppress(OSError):
            board and board.close()
    if world > 1:
        torch.distributed.barrier()  # last.pth is written before anybody leaves or reads it
    if halt:
        if not rank:
            print(f"stopped at step {step}: {last} is whole; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + halt)
    if not rank:
        took = time.perf_counter() - began
        if step > first:
            print(f"steps {first} to {step} in {took:.0f} s, {waited / took:.0%} of it waiting for data")
        else:
            print(f"{last}: is at step {step} of {total}, nothing is left to do")
        print(args.out / "weights.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Frames and masks on disk

PALETTE = np.zeros((256, 3), np.uint8)  # PASCAL VOC: the bits of the id, dealt to r, g, b from the highest down
for _bit in range(8):
    for _channel in range(3):
        PALETTE[:, _channel] |= (((np.arange(256) >> (3 * _bit + _channel)) & 1) << (7 - _bit)).astype(np.uint8)

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Video:
    """Frames of a film, or of a folder or glob of pictures, by index and in either direction.

    names: one for each frame (file stems of pictures, else 00000, 00001, ...); times: when each is shown, in seconds;
    fps; size (H, W). Memory does not depend on the length: no frame is kept, but for a block of at most 32 when
    reading backwards. A film that breaks off gives the frames before the break; `broken` then says where and why.
    Raises UserError where there is nothing to read or the frame size changes.
    """

    def __init__(self, source: str | Path):
        self.source, self.fps, self.broken, self.names, self.times = str(source), 25.0, None, [], []
        path, self.pictures = Path(source), []
        if path.is_dir():
            self.pictures = [p for p in path.glob("[!.]*") if p.suffix.lower() in PICTURES]  # macOS keeps ._00000.jpg
        elif glob.has_magic(self.source) and not path.exists():
            folder = glob.escape(str(path.parent)) if path.parent.is_dir() else path.parent  # brackets in its name
            found = glob.glob(str(Path(folder) / path.name))
            self.pictures = [Path(p) for p in found if Path(p).suffix.lower() in PICTURES]
        elif not path.is_file():
            raise UserError(f"{source}: no such video on disk; give a film, a folder or a glob of pictures")
        elif path.suffix.lower() in PICTURES:
            self.pictures = [path]
        if self.pictures:  # natural order: 2.jpg before 10.jpg
            self.pictures.sort(key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.name)])
            self.names = [p.stem for p in self.pictures]
            if len(set(self.names)) < len(self.names):
                raise UserError(f"{source}: two pictures share a name before the dot; masks could not be told apart")
        elif path.is_file():
            self._index(path)
        self.times = self.times or [i / self.fps for i in range(len(self))]
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
        if promised > len(packets):
            self.broken = f"{path}: breaks off after {len(packets)} of {promised} frames; the frames before are kept"

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
                yield index, read_picture(self.pictures[index])
        elif len(indices) < 2 or indices[0] < indices[-1]:
            yield from self._decode(indices)
        else:  # backwards: blocks of frames, each decoded forwards
            step = min(32, max(1, 2**28 // (3 * self.size[0] * self.size[1])))  # 256 MiB
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
                        frame = picture.to_ndarray(format="rgb24")
                        yield index, np.ascontiguousarray(np.rot90(frame, round(picture.rotation / 90)))
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


def read_picture(path: str | Path) -> np.ndarray:
    """A JPEG, PNG, ... -> H x W x 3 uint8 RGB. UserError if it is damaged."""
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9", len(data) // 2) < 0:  # OpenCV would fill it up with grey
            raise UserError(f"{path}: is a JPEG without an end, it breaks off; replace or remove it")
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    except (OSError, cv2.error) as error:
        why = getattr(error, "strerror", None) or getattr(error, "err", None) or "too large"
        raise UserError(f"{path}: cannot be read as a picture ({why}); replace or remove it") from error
    if picture is None:
        raise UserError(f"{path}: cannot be read as a picture; replace or remove it")
    return picture


def ahead(items: Iterable, depth: int = 4) -> Iterator:
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
def writing(path: Path) -> Iterator[None]:
    """An OSError inside becomes a UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end: a file that exists is whole."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def film_writer(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[..., None]]:
    """Write an H.264 film that plays in a browser: yields a function that appends a frame, at a time in seconds if one
    is given; atomic."""
    height, width = (side - side % 2 for side in size)  # 4:2:0 colour wants even sides
    with atomic(path) as temporary, av.open(str(temporary), "w", options={"movflags": "faststart"}) as film:
        stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}
        stream.codec_context.colorspace = 5  # BT.601, which from_ndarray's conversion follows; untagged HD reads as 709
        stream.codec_context.time_base = tick = Fraction(1, 90000)
        number, last = itertools.count(), -1

        def append(frame: np.ndarray, seconds: float | None = None) -> None:
            nonlocal last
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            last = max(last + 1, round((next(number) / fps if seconds is None else seconds) / tick))
            picture.pts, picture.time_base = last, tick
            film.mux(stream.encode(picture))

        yield append
        film.mux(stream.encode())


def write_mask(path: Path, mask: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """Write a mask (H x W uint8 ids) as an indexed PNG, the field's interchange format; atomic."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette.tobytes())
    with atomic(Path(path)) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def read_ids(path: str | Path) -> np.ndarray:
    """Read the ids (H x W uint8) of an indexed or grey PNG as they are stored. UserError if it is none, or broken."""
    try:
        data = Path(path).read_bytes()
        with contextlib.suppress(ValueError, isal_zlib.error, struct.error, IndexError):
            return inflate_ids(data)  # about four times as fast as Pillow, which reads and judges the rest
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise UserError(f"{path}: is a {picture.mode} picture; masks are indexed (or grey) PNGs of ids")
            return np.array(picture, np.uint8)  # of one bit: ids 0 and 1
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such mask") from error
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


def read_mask(path: str | Path, known: dict[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a mask: (ids H x W uint8, palette 256 x 3 uint8).

    An indexed PNG gives its ids; a grey picture its values; black and white is one object, id 1; in a colour
    picture black (or transparent) is background and each other colour an object: the id of that colour in PASCAL
    VOC's palette if all have one, else 1, 2, ... by how much they cover. 255 beside other ids is void, background.
    known: the ids of colours, and of values above 255, in masks read before; filled up, so that they stay the same.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            lossy = picture.format in ("JPEG", "MPO")
            ImageOps.exif_transpose(picture, in_place=True)  # as frames are
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such mask; give the picture of the first frame's objects") from error
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a picture; give a PNG mask") from error
    palette, known = PALETTE.copy(), {} if known is None else known
    indexed, coloured = picture.mode == "P", False
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
        r, g, b, alpha = np.asarray(picture.convert("RGBA")).astype(np.int64).transpose(2, 0, 1)
        coloured = bool(((r != g) | (g != b))[alpha > 0].any())
        ids = (r << 16 | g << 8 | b if coloured else r) * (alpha > 0)
    numbers, counts = np.unique(ids, return_counts=True)
    numbers, counts = numbers[numbers != 0], counts[numbers != 0]
    if not indexed:
        solid = sum(cv2.erode((ids == n).astype(np.uint8), np.ones((3, 3))).any() for n in numbers[:300])
        white = 0 if coloured else counts[numbers == 255].sum()  # void is a thin border
        smooth = len(numbers) > 255 or (len(numbers) >= 8 and solid < len(numbers) / 2)
        if smooth or (lossy and len(numbers) > 1) or counts.sum() > white > counts.sum() / 2:
            raise UserError(
                f"{path}: has {len(numbers)} colours beside black, as smoothed edges have (anti-aliased or JPEG); "
                "save it as PNG without smoothing, one flat colour an object"
            )
    if len(numbers) == 0:
        raise UserError(f"{path}: is empty, all of it is background; paint each object in a value of its own")
    if coloured or numbers[-1] > 255:
        voc = {int(r) << 16 | int(g) << 8 | int(b): i for i, (r, g, b) in enumerate(PALETTE)} if coloured else {}
        unknown = [n for n in (numbers[np.argsort(-counts, kind="stable")] if coloured else numbers) if n not in known]
        own = [voc.get(n) for n in unknown]
        if None in own or set(own) & set(known.values()):
            own = sorted(set(range(1, 256)) - set(known.values()))[: len(unknown)]
        if len(own) < len(unknown):
            raise UserError(f"{path}: brings the objects of all masks to more than 255; give fewer")
        known.update(zip(unknown, own, strict=True))
        new, names = [known[n] for n in numbers], np.array(list(known))
        if coloured:
            palette[list(known.values())] = np.stack([names >> 16, names >> 8 & 255, names & 255], 1)
    elif len(numbers) == 1 and numbers[0] in (1, 255):
        new = [1]
        palette[1] = palette[numbers[0] if indexed else 1]
    else:
        new = np.where(numbers == 255, 0, numbers)
        if numbers[-1] == 255 and not indexed:
            print(f"note: {path}: 255 beside other values is void, so background; is it an object?", file=sys.stderr)
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
    """Parse a script's Args, a dataclass. Where it has `propagation`, the defaults are those of --engine or --model,
    without one those of the system that --weights is recognised as."""
    default = args_type()
    if not issubclass(args_type, Training):
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        peek.add_argument("--model")
        peek.add_argument("--weights", type=Path)
        peek.add_argument("--dataset", default="davis")
        peek.add_argument("--engine", type=Path)
        given = peek.parse_known_args(argv)[0]
        if given.engine and hasattr(args_type, "engine"):  # model and settings are fixed in it
            info = engine_info(given.engine)
            name, settings = info["model"], engine_settings(given.engine, info)
        else:  # without a sign of a system: a ResNet of torchvision's, most likely
            bare = given.weights and not given.model
            name = (recognise(*read_weights(given.weights)) or "imagenet") if bare else given.model or default.model
            settings = preset(name, given.dataset)
        default = replace(default, model=name, propagation=settings)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.AvoidSubcommands)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(args_type, args=argv, default=default, config=config)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        box = [line.strip("│ ").strip("─-") for line in said.getvalue().splitlines()[1:]]  # below its title
        text = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, box))).rstrip(". ")
        text = text.replace("Unrecognized options", "unknown options or words (a pattern wants quotes)")
        raise UserError(f"{text}; see --help") from stop
