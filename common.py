"""What every stage of softcopy shares: errors and flags, the factors, the feature extractor and its weights.

The paper is McKee et al., "Transfer of Representations to Video Label Propagation: Implementation Factors
Matter" (2022). Words and shapes, the same everywhere:

    frame     H x W x 3 uint8 RGB       features  C x h x w         grid  h x w cells, stride 8 unless said
    mask      H x W uint8 ids           labels    L x h x w in [0, 1], label 0 is the background
    context   the annotated frame(s), then the latest n frames      target  the frame being labelled
"""

import argparse
import contextlib
import difflib
import importlib
import io
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn


class UserError(Exception):
    """Something the user can put right. The message says what, where and what to do, in one line."""


def run(main, parse) -> None:
    """Run a script: what the user got wrong becomes one line on stderr and exit code 2, Ctrl-C one line and 130."""
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        less = "less at a time (such as --size or --context; in training --batch-size)"
        print(f"error: the GPU's memory is full; take {less}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what is written is whole; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def rank_world() -> tuple[int, int]:
    """This process and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, its container's quota, its share among torchrun's processes."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group = Path("/sys/fs/cgroup")
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        if all((group / file).is_file() for file in files):
            quota, period = " ".join((group / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------------------------------
# The factors; the systems, each a file of systems/


@dataclass(frozen=True)
class Propagation:
    """The factors that the paper studies (sections 2 and 4), and refine.

    The defaults are those of --model's authors. For still-image features they are the paper's best (section 4.3,
    "Strong image baselines"); what the paper leaves open was chosen on DAVIS train sequences (benchmarks/tuning.md).
    """

    size: str = "480"
    """Network input: short side in pixels (never enlarging), reached with anti-aliasing; HxW exactly and plainly, as
    the protocols do; or full (section 4.2). /M rounds the long side down to a multiple of M (480/64: UVC)."""
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
    """Labels enter the context as predicted, stretched to 0..1 (TimeCycle), or as the arg-max (CorrFlow, MAST)."""
    localization: Literal["none", "fixed", "window", "predicted", "track"] = "fixed"
    """Where to search: the whole frame; a fixed region around the target cell (section 4.3); a square window, with the
    softmax over it (CorrFlow), whose place is predicted in frames far back (MAST); boxes of the objects (UVC)."""
    shape: Literal["circle", "square"] = "circle"
    """Fixed region: distance < radius, or |dx|, |dy| <= radius."""
    radius: int = 12
    """Radius of the fixed region, in grid cells."""
    exempt_first: bool = False
    """Search annotated frames as a whole, whatever the fixed region (as CRW's code does)."""
    minmax: bool = False
    """Stretch each label to 0..1 over the frame before the arg-max."""
    refine: float = 0.0
    """Let the masks' edges follow the picture's: how far, as a share of the object's thickness; 0 is off, as in the
    paper. It changes what is written, not what is carried on."""

    def __post_init__(self):
        if not re.fullmatch(r"([1-9]\d*(x[1-9]\d*)?|full)(/[1-9]\d*)?", self.size):
            raise UserError(f"--size {self.size!r}: give the short side (480), height x width (480x854), or full")
        if any(len(number) > 5 for number in re.findall(r"\d+", self.size)):
            raise UserError(f"--size {self.size}: is more pixels than a video has; give 480, 480x854 or full")
        bounds = {"upsample": (1, 64), "stride": (1, 64), "topk": (1, 10**6), "context": (0, 10**5)}
        bounds |= {"radius": (1, 10**4), "temperature": (1e-9, 1e9), "refine": (0, 10)}
        for flag, (least, most) in bounds.items():
            value = getattr(self, flag)
            if not least <= value <= most:  # nan neither
                what = f"is too large; give {most} or less" if value > most else f"give {least} or more"
                raise UserError(f"--{flag} {value}: {what}")
        if self.context < 1 and not self.keep_first:
            raise UserError("--context 0 --no-keep-first: leaves nothing to copy from; give --context 1 or more")
        if self.localization in ("window", "predicted") and self.softmax_over == "frame":
            raise UserError(f"--localization {self.localization}: sees windows alone; take --softmax region or topk")
        if self.localization == "track" and (self.aggregation, self.softmax_over) != ("per-frame", "frame"):
            raise UserError("--localization track: needs --aggregation per-frame and --softmax auto (section 4.3)")

    @property
    def softmax_over(self) -> str:
        """topk, region or frame."""
        algorithm1 = "topk" if self.aggregation == "overall" else "frame"
        auto = "region" if self.localization in ("window", "predicted") else algorithm1
        return auto if self.softmax == "auto" else self.softmax

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the network's input for a frame of height x width pixels."""
        size, _, step = self.size.partition("/")
        sides, short = [height, width], min(height, width)
        if "x" in size:
            sides = [int(side) for side in size.split("x")]
        elif size != "full":
            sides = [side * min(int(size), short) / short for side in sides]
        if step:
            sides = [int(side) for side in sides]
            sides = [side if side == min(sides) else max(side // int(step), 1) * int(step) for side in sides]
        return round(sides[0]) * self.upsample, round(sides[1]) * self.upsample

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of the features of a frame of height x width pixels."""
        return tuple(math.ceil(side / self.stride) for side in self.input_size(height, width))


@dataclass(frozen=True)
class System:
    """A row of the paper, declared by a file of systems/: a network, its weights, and how its authors propagate."""

    arch: str  # torchvision's name, or timm:NAME
    about: str
    settings: Propagation = Propagation()  # on DAVIS
    vip: dict = field(default_factory=lambda: {"size": "560x560", "context": 4})  # what differs on VIP, Table 7b
    jhmdb: dict = field(default_factory=lambda: {"size": "240x240", "context": 7, "localization": "none"})  # Table 8
    paper: float | None = None  # J&F on DAVIS 2017 val in the paper, best without up-sampling (Tables 2, 4, 6)
    # The network and what it sees
    colours: Callable[[], nn.Module] | None = None  # RGB in 0..1, B x 3 x H x W -> the same in other colours
    normalise: bool = True  # less ImageNet's mean, over its deviation
    padding: str = "zeros"
    head: Callable[[], dict[str, nn.Module]] = dict  # layers after the output stage, where that is settings.layer
    build: Callable[..., nn.Module] | None = None  # (system, settings) -> the network up to settings.layer
    # Its released file
    source: str = ""  # a stable link to the file, which is fetched, or where else to get it
    file: str = ""  # its name on disk, where the link's last part says nothing
    digest: str = ""  # algorithm:first digits; "": the file name ends in the first 8 digits of its SHA-256, or unknown
    licence: str = "none stated"
    keys: tuple[tuple[str, str], ...] = ()  # (regex, replacement), in turn: names in the released file -> torchvision's
    mark: str = ""  # regex that tells its file by its lines: "entry" of the container, "name shape" of tensors
    load: Callable | None = None  # (name, file or None, settings) -> Encoder, else systems/torchvision.py's
    # A way to localise of its own: propagate_labels by itself, and what it keeps of a frame beside features and labels
    localize: Callable[..., Tensor] | None = None  # (target, features, labels, s, annotated, ages, notes, share) -> z
    note: Callable | None = None  # (labels, s, note of the frame before, mask) -> note

    @property
    def released(self) -> str:
        """The name of its released file on disk; "" where the source names none."""
        return self.file or re.search(r"([\w.-]+\.(pth|tar))?\)?$", self.source)[1] or ""


SYSTEMS = Path(__file__).parent / "systems"
R18, R50 = r"layer1\.0\.conv1\.weight 64x64x3x3", r"layer1\.0\.conv1\.weight 64x64x1x1"  # which ResNet a file holds


def find_system(name: str) -> System:
    """The row of a name (uvc+, in any case), of torchvision:NAME (a ResNet or VGG), of timm:NAME (a ResNet or ViT)."""
    name = name.lower()
    path, arch = SYSTEMS / f"{re.match('[a-z]*', name)[0]}.py", name.partition(":")[2]  # uvc+ stands in systems/uvc.py
    if path.is_file():
        module = importlib.import_module(f"systems.{path.stem}")
        if arch and hasattr(module, "find"):
            return module.find(arch)
        if name in module.SYSTEMS:
            return module.SYSTEMS[name]
    near = "".join(f"did you mean {other}? " for other in difflib.get_close_matches(name, systems(), 1))
    known = f"choose one of {', '.join(systems())}, torchvision:NAME or timm:NAME"
    raise UserError(f"unknown model {name!r}: {near}{known}")


def system_files() -> list:
    """The files of systems/, as modules."""
    return [importlib.import_module(f"systems.{path.stem}") for path in sorted(SYSTEMS.glob("[a-z]*.py"))]


def systems() -> dict[str, System]:
    """All rows with a name of their own."""
    return {name: row for module in system_files() for name, row in module.SYSTEMS.items()}


def preset(name: str, dataset: str = "davis") -> Propagation:
    """How a system's authors propagate its features on davis, vip or jhmdb."""
    system = find_system(name)
    return replace(system.settings, **{"vip": system.vip, "jhmdb": system.jhmdb}.get(dataset, {}))


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors and their weights


def build_net(system: System, s: Propagation, *whole: nn.Module) -> nn.Module:
    """The network of a row up to s.layer, the stages beyond s.stride no longer reducing (section 4.2). UserError if it
    has no such layer at such a stride. whole: the whole network, if it is there already."""
    build = system.build or find_system(f"torchvision:{system.arch}").build
    if net := build(system, s, *whole):
        return net
    raise UserError(
        f"--layer {s.layer} --stride {s.stride}: not to be had of {system.arch}; ResNets have res2 to res4 at stride "
        "4, 8, 16 and 32, VGGs conv1, conv2, ... at 1 to 32, ViTs last at the size of their patches"
    )


class Encoder(nn.Module):
    """Frames in, features out. Resizing and colours are inside, so an exported graph needs nothing else."""

    def __init__(self, net: nn.Module, settings: Propagation, system: System | None = None, mean=None, std=None):
        super().__init__()
        self.net, self.settings = net, settings
        self.colours = system.colours() if system and system.colours else None
        self.normalise = system is None or system.normalise
        self.multiple = getattr(net, "patch", 1)  # a ViT wants whole patches
        self.register_buffer("mean", torch.tensor(mean or (0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or (0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """frames B x H x W x 3 uint8 RGB -> features B x C x h x w in the encoder's precision."""
        height, width = frames.shape[1:3]
        x = frames.permute(0, 3, 1, 2)  # B 3 H W
        x = x.float() / 255  # resized in float32: a CPU does not in bfloat16
        size = tuple(math.ceil(n / self.multiple) * self.multiple for n in self.settings.input_size(height, width))
        if size != (height, width):
            reduced = size[0] < height and "x" not in self.settings.size
            x = F.interpolate(x, size=size, mode="bilinear", antialias=reduced)
        x = (self.colours(x) if self.colours else x).to(self.mean.dtype)
        x = self.net((x - self.mean) / self.std if self.normalise else x)
        return F.normalize(x.float(), dim=1).to(x.dtype) if self.settings.l2 else x  # 1e-12 is 0 in half


def load_encoder(
    name: str, weights: str | Path | None = None, settings: Propagation | None = None, device="auto", dtype="float32"
) -> Encoder:
    """The extractor of a system (find_system), in eval mode, BatchNorm folded into the convolutions.

    weights: a file as it was released, which may lack the stages after settings.layer; what it is taken for, and what
    of it is not used, is said on stderr. By default it is found or fetched. UserError if it is missing or does not fit.
    """
    system, device, dtype = find_system(name), pick_device(device), getattr(torch, dtype)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every device
    torch.set_float32_matmul_precision("highest")
    load = system.load or find_system(f"torchvision:{system.arch}").load
    encoder = load(name.lower(), weights and Path(weights), settings or system.settings)
    for parent in list(encoder.eval().requires_grad_(False).modules()):
        for (first, conv), (second, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    return encoder.to(device, dtype).to(memory_format=torch.channels_last)


def pick_device(name: str) -> torch.device:
    """auto is the GPU where there is one, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0][:100]
        raise UserError(f"--device {name}: cannot be used here ({why}); take auto, cpu or cuda") from error


def find_weights(name: str) -> Path | None:
    """The weights file of a model on disk: in weights/ or torch hub's cache, under its released name or NAME.pth."""
    names = (find_system(name).released, f"{name}.pth", f"{name}.pth.tar")
    for folder in (Path("weights"), Path(__file__).parent / "weights", Path(torch.hub.get_dir()) / "checkpoints"):
        for file in names:
            if (folder / file).is_file():
                return folder / file
    return None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict in a checkpoint, names as they are, and the entries beside it. Never runs code from the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check its name")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # CRW's file keeps its arguments
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = "is not a PyTorch checkpoint, or is damaged; download it again"
        if "GLOBAL" in str(error):  # the unpickler's word for a function or class that it will not touch
            why = "refused, it holds pickled code beside tensors; save its state_dict alone"
        raise UserError(f"{path}: {why}") from error
    state = state if isinstance(state, dict) else {}
    inner = [key for key in ("state_dict", "model", "teacher", "method") if isinstance(state.get(key), dict)]
    state, rest = (state.pop(inner[0]), state) if inner else (state, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no state dict (names and tensors); save model.state_dict() with torch.save")
    return tensors, rest


def fit(net: nn.Module, state: dict[str, Tensor]) -> str:
    """Load those of the weights that the net has a place for. "", or what is wrong with them."""
    wanted = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            return f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
    others = net.load_state_dict(state, strict=False).unexpected_keys
    missing = [key for key in wanted if key not in state]
    if missing and re.sub(r"bn(\d)\.\w+$", r"conv\1.bias", missing[0]) in others:
        return f"its BatchNorm is folded into the convolutions ({missing[0]} is gone)"
    if missing:
        return f"it lacks {len(missing)} of {len(wanted)} entries, such as {missing[0]}"
    for key in others:  # ResNet-34's stages begin as ResNet-18's
        if re.match(r"layer\d\.\d+\.\w+\.weight$", key) and any(each.startswith(key[:7]) for each in wanted):
            return f"it has {key} as well"
    return ""


def recognise(state: dict[str, Tensor], rest: Mapping = {}) -> str | None:
    """The system that a file of read_weights is of, by its entries; None where these do not tell."""
    task = str(rest["meta"].get("task")) if isinstance(rest.get("meta"), dict) else ""  # of a training script
    if task in systems() or task.startswith("torchvision:"):
        return task
    shapes = {key: value.squeeze(2).shape if value.dim() == 5 else value.shape for key, value in state.items()}
    text = "\n".join([*map(str, rest), *(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())])
    return next((name for name, row in systems().items() if row.mark and re.search(row.mark, text, re.M)), None)


# ---------------------------------------------------------------------------------------------------------------------
# Small things: what Algorithm 1 and the systems' own ways to localise share; files


def cuts(length: int, step: int) -> list[tuple[int, int]]:
    """Cut 0..length into even pieces of at most `step`."""
    pieces = math.ceil(length / step)
    return [(i * length // pieces, (i + 1) * length // pieces) for i in range(pieces)]


# MKL leaves out AVX-512 on AMD's processors. There oneDNN, which torch has for linear layers, is faster from so many
# cells on; the AVX-512 of Zen 5 is twice as wide as that of Zen 4.
CPU = getattr(torch.cpu, "get_capabilities", dict)()
ONEDNN = 512 if CPU.get("avx512_vp2intersect") else 4096
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
if not (AVX512 and "AMD" in CPU.get("cpu_name", "")):
    ONEDNN = math.inf


def products(keys: Tensor, queries: Tensor, out: Tensor) -> None:
    """Dot products of keys (cells x C) and queries (q x C) into out (cells x q)."""
    if len(keys) >= ONEDNN and keys.is_cpu and keys.dtype == torch.float32:
        # oneDNN keeps a compiled product of each shape, together a GiB in a run: so one length for all.
        for some, into in zip(keys.split(512), out.split(512), strict=True):
            if len(some) == 512:
                into.copy_(torch.ops.mkldnn._linear_pointwise(some, queries, None, "none", [], ""))
            else:
                torch.mm(some, queries.T, out=into)
    elif keys.dtype == out.dtype:
        torch.mm(keys, queries.T, out=out)
    else:
        out.copy_(keys @ queries.T)


def stretch(labels: Tensor) -> Tensor:
    """Each label that occurs (L x h x w) stretched to 0..1 over the frame."""
    low, high = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (labels - low) / (high - low).clamp_min(1e-12), labels)


PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
AS_STORED = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH


def read_picture(path: str | Path, reduce: bool = True, page: int = 0) -> np.ndarray:
    """A JPEG, PNG, ... -> H x W x 3 uint8 RGB. Values of more than 8 bits (16-bit, float) are brought to 0..255 by
    their own range, or left with reduce=False. page: which one of a TIFF's several. UserError if it is damaged."""
    try:
        data = b"" if page else Path(path).read_bytes()
        if data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9", len(data) // 2) < 0:  # OpenCV would fill it up with grey
            raise UserError(f"{path}: is a JPEG without an end, it breaks off; replace or remove it")
        if page:
            picture = next(iter(cv2.imreadmulti(str(path), page, 1, flags=AS_STORED)[1]), None)
        else:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), AS_STORED) if data else None
    except (OSError, cv2.error) as error:
        why = getattr(error, "strerror", None) or getattr(error, "err", None) or "too large"
        raise UserError(f"{path}: cannot be read as a picture ({why}); replace or remove it") from error
    if picture is None:
        raise UserError(f"{path}: cannot be read as a picture; replace or remove it")
    channels = cv2.split(picture)  # grey, or blue, green, red
    picture = cv2.merge(channels * 3 if len(channels) == 1 else channels[::-1])
    if reduce and picture.dtype != np.uint8:
        picture = np.nan_to_num(picture, posinf=0, neginf=0)
        picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    return picture


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside becomes a UserError about `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written ({why}); free space or choose another --out") from error


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


def parse(args_type, argv: Sequence[str] | None = None, default=None):
    """Parse a script's Args, a dataclass. default: where flags that are not given have their values from."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(args_type, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        box = [line.strip("│ ").strip("─-") for line in said.getvalue().splitlines()[1:]]  # below its title
        text = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, box))).rstrip(". ")
        text = text.replace("Unrecognized options", "unknown options or words (a pattern wants quotes)")
        raise UserError(f"{text}; see --help") from stop
