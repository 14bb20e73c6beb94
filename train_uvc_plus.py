"""UVC, features that copy a frame's colours to later frames of its video, and UVC+, with an image loss beside.

    python train_uvc_plus.py --data kinetics/ --autoencoder weights/                    # UVC
    python train_uvc_plus.py --data kinetics/ --image-objective rotation --out results/uvc+
    torchrun --nproc-per-node 4 train_uvc_plus.py --data kinetics/ --image-objective imagenet --image-data ILSVRC/
    python propagate.py --model uvc+ --weights results/uvc+/weights.pth --video clip.mp4 --mask f0.png

L = L_video + lambda L_image on one backbone (section 5 of the paper, its Table 5). L_video is UVC's (Li et al. 2019):
in the warm-up phase colours are copied between two crops, in the localisation phase the crop of the first frame is
first found in the whole second one. Where papers and released code differ, this follows the code that was run.
Without --autoencoder the Lab auto-encoder, whose codes are what is copied, is trained first.
"""

import contextlib
import copy
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

import common
import train_finetune
from common import PICTURES, UserError, rank_world
from propagate import Video
from train_finetune import check_numbers, pictures_in, read_picture, read_start, refuse_unused, resumes, say, visible


@dataclass
class Args(train_finetune.Training):
    out: Path = Path("results/uvc_plus")
    """Folder for weights.pth (for propagate.py), last.pth (to go on from), log.csv, TensorBoard and pictures."""
    data: tuple[Path, ...] = ()
    """Folders of videos, searched to any depth: films, and folders of pictures as frames."""
    autoencoder: Path | None = None
    """Folder with *encoder*.pth and *decoder*.pth of the Lab auto-encoder; without it, it is trained first."""
    autoencoder_steps: int = 20_000
    """Steps of that training; it is kept in OUT/autoencoder/."""
    init: Path | None = None
    """Weights of a ResNet-18 for the backbone to start from; without it these are random, as released."""
    image_objective: Literal["none", "rotation", "moco", "imagenet"] = "none"
    """The image loss of UVC+; none is UVC."""
    image_data: str = "frames"
    """Pictures for it: frames (of the videos), or a folder of pictures; for imagenet one with a folder a class."""
    image_weight: float | None = None
    """lambda; default 0.3 for rotation, 0.1 for moco, 0.05 for imagenet (section 5)."""
    image_batch_size: int | None = None
    """Pictures in a batch over all processes; default 64 for rotation (each turned four times), 32, 256 (section 5)."""
    image_size: int = 224
    """Side of the crops for the image loss, in pixels."""
    image_grey: bool = False
    """Grey pictures for the image loss, as the video loss sees its frames (Table 5, the row without colour)."""
    queue: int = 65536
    """Keys that moco compares with."""
    batch_size: int = 40
    """Pairs of frames in a batch over all processes."""
    epochs: int = 50
    """Passes over the videos, of both phases together (section 3.3)."""
    warmup_epochs: int = 10
    """How many of them are warm-up."""
    pairs_per_video: int = 1
    """Pairs drawn from a video in an epoch; more where there are few videos."""
    lr: float = 1e-4
    """Learning rate of Adam at the start of either phase; it falls as (1 - epoch / epochs)^0.9."""
    out_layer: Literal["layer4", "layer3"] = "layer4"
    """Last stage of the ResNet-18: layer4 as released, layer3 as the paper says; all beyond layer2 at stride 1. For
    layer3, propagate.py and evaluate.py take --layer res3."""
    crop: int = 256
    """Side of the crops, in pixels, a multiple of 64."""
    full: int = 640
    """Side of the whole second frame in the localisation phase, in pixels, a multiple of 8 above --crop."""
    short_side: int | None = None
    """Frames are first reduced to this short side; default --crop, 0: as they are."""
    gap: int = 50
    """Most frames between the two of a pair."""
    temperature: float = 1.0
    """Affinities are divided by it before the softmax; propagate.py takes the same."""
    threshold: float = 2.5
    """Samples whose colour loss is above count 0."""
    threshold_steps: tuple[int, int] = (6000, 12000)
    """From which step of the warm-up and of the localisation phase on they do (the released 1 and 2 epochs)."""
    color_switch: float = 0.1
    """Weight of the cycle: colours copied back, within the colour loss."""
    concentration: float = 1.2
    """Weight of the concentration loss: 0.3 on each of the 4 GPUs of the released run, which added them up."""
    concentration_steps: int = 6000
    """From which step on there is one."""
    coordinate: float = 0.0
    """Weight of the coordinate cycle in the localisation phase; off in the released run, 0.1 in its code."""
    legacy_align_corners: bool = False
    """Coordinates as PyTorch 1.1 had them, where the released run was made."""
    look_every: int = 500
    """Steps between two pictures in OUT/pictures: reference, target, its box, and the colours copied to it."""


FILMS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".ts")
# image objective: lambda, pictures in a batch (section 5)
IMAGE_LOSS = {"none": (0.0, 0), "rotation": (0.3, 64), "moco": (0.1, 32), "imagenet": (0.05, 256)}
IMAGE_FLAGS = ("image_data", "image_weight", "image_batch_size", "image_size", "image_grey")


# ---------------------------------------------------------------------------------------------------------------------
# Data. Frames are H x W x 3 uint8; what is random comes from torch's global generator, which train() seeds by sample


def find_videos(roots: Sequence[Path]) -> list[Path]:
    """Films in the folders, and folders of pictures: each is a video. In DAVIS's layout those in JPEGImages."""
    videos = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--data {root}: no such folder; give one with videos, or with folders of frames")
        top = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root
        before = len(videos)
        for folder, files in visible(top):
            videos += [Path(folder, name) for name in files if name.lower().endswith(FILMS)]
            if any(name.lower().endswith(PICTURES) for name in files):
                videos.append(Path(folder))
        if len(videos) == before:
            raise UserError(f"--data {root}: holds no videos; give films ({', '.join(FILMS[:4])}) or folders of frames")
    return sorted(videos)


indexed = functools.lru_cache(maxsize=256)(Video)  # no open film: where its frames are, 100 to 350 bytes for each


def read_frames(path: Path, choose: Callable[[int], Sequence[int]]) -> list[np.ndarray]:
    """The frames `choose(length)` of a video, or a picture. UserError if they cannot be read."""
    if path.suffix.lower() in PICTURES and not path.is_dir():
        return [read_picture(path)]
    if not (path.is_file() or path.is_dir()):  # a FIFO would wait for ever
        raise UserError(f"{path}: is no file (any more)")
    try:
        video = indexed(path)
        times = choose(len(video))
        frames = dict(video.frames(sorted(set(times))))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if len(frames) < len(set(times)):
        raise UserError(video.broken or f"{path}: not all of its frames can be decoded")
    return [frames[t] for t in times]


def integer(low: int, high: int) -> int:
    """Uniform in low ... high, both included."""
    return int(torch.randint(low, high + 1, ()))


def pair_times(length: int, gap: int) -> tuple[int, int]:
    """Two frames of a video of `length`: the second 1 ... gap later; any two where it is no longer than that."""
    if length - 1 > gap:
        t = integer(0, length - 1 - gap)
        return t, t + integer(1, gap)
    return integer(0, length - 1), integer(0, length - 1)


def to_lab(frame: np.ndarray, short: int) -> np.ndarray:
    """RGB frame -> OpenCV's 8-bit Lab, of sides that 64 divides, the short one at most about `short` (0: any)."""
    height, width = frame.shape[:2]
    scale = min(1, short / min(height, width)) if short else 1
    if scale < 1:
        frame = cv2.resize(frame, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    height, width = (max(1, side // 64) * 64 for side in frame.shape[:2])
    return cv2.cvtColor(cv2.resize(frame, (width, height)), cv2.COLOR_RGB2LAB)


def rotate(frame: np.ndarray, angle: float) -> np.ndarray:
    """Turned about the middle by `angle` degrees; what comes in at the sides is reflected."""
    height, width = frame.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
    return cv2.warpAffine(frame, turn, (width, height), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)


def pad(frame: np.ndarray, side: int) -> np.ndarray:
    """Reflected on all sides, as far as needed for `side` pixels in either direction."""
    y, x = (max(0, side - length) for length in frame.shape[:2])
    return cv2.copyMakeBorder(frame, y // 2, y - y // 2, x // 2, x - x // 2, cv2.BORDER_REFLECT_101)


def random_crop(frame: np.ndarray, side: int) -> np.ndarray:
    frame = pad(frame, side)
    y, x = (integer(0, length - side) for length in frame.shape[:2])
    return frame[y : y + side, x : x + side]


def enlarge(frame: np.ndarray, side: int) -> np.ndarray:
    """Resized to a longer side of `side`, reflected to a square."""
    height, width = frame.shape[:2]
    size = width * side // max(height, width), height * side // max(height, width)
    return pad(cv2.resize(frame, size), side)


class Pairs(Dataset):
    """Two frames of a video, 8-bit Lab: reference (crop x crop x 3) and target (the same, or full x full x 3).

    Warm-up: both turned by one angle of -10 ... 10 degrees, scaled by one factor of 1/1.2 ... 1.2, cut at places of
    their own, both flipped or neither. Localisation: the reference turned, both enlarged, the reference cut.
    """

    step = 0  # as train() says

    def __init__(self, args: Args, videos: Sequence[Path], warmup_steps: int):
        self.args, self.warmup_steps = args, warmup_steps
        self.videos = np.array([os.fsencode(path) for path in videos])  # objects would be copied by every worker

    def __len__(self) -> int:
        return len(self.videos) * self.args.pairs_per_video

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        a, path = self.args, Path(os.fsdecode(self.videos[index % len(self.videos)]))

        def choose(length: int) -> tuple[int, int]:
            if length < 2:
                raise UserError(f"{path}: has one frame, a pair takes two")
            return pair_times(length, a.gap)

        frames = [to_lab(frame, a.short_side) for frame in read_frames(path, choose)]
        angle = integer(-10, 10)
        if self.step >= self.warmup_steps:
            frames[0] = random_crop(enlarge(rotate(frames[0], angle), a.full), a.crop)
            frames[1] = enlarge(frames[1], a.full)
        else:
            scale, flip = 1 / 1.2 + (1.2 - 1 / 1.2) * torch.rand(()).item(), integer(0, 1)
            how = cv2.INTER_LANCZOS4 if scale < 1 else cv2.INTER_CUBIC
            for i, frame in enumerate(frames):
                size = int(frame.shape[1] * scale), int(frame.shape[0] * scale)
                frame = random_crop(cv2.resize(rotate(frame, angle), size, interpolation=how), a.crop)
                frames[i] = frame[:, ::-1] if flip else frame
        reference, target = (torch.from_numpy(np.ascontiguousarray(frame)) for frame in frames)
        return {"reference": reference, "target": target}


class Images(Dataset):
    """A random frame of each video, or pictures, as `change` turns them; with their labels if there are any."""

    def __init__(self, paths: Sequence, change: Callable[[np.ndarray], Tensor], labels: Sequence[int] = ()):
        self.paths, self.labels = np.array([os.fsencode(path) for path in paths]), np.array(labels, int)
        self.change = change

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        (frame,) = read_frames(Path(os.fsdecode(self.paths[index])), lambda length: [integer(0, length - 1)])
        return (self.change(frame), int(self.labels[index])) if len(self.labels) else self.change(frame)


def augment(frame: np.ndarray, change: v2.Transform, grey: bool, views: int) -> Tensor:
    """RGB frame -> `views` of it as `change` makes them, each 3 (grey: 1) x size x size uint8; one as it is."""
    if grey:
        frame = cv2.cvtColor(frame, cv2.COLOR_RGB2LAB)[..., :1]
    frame = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))
    return torch.stack([change(frame) for _ in range(views)]) if views > 1 else change(frame)


def lab_crop(frame: np.ndarray, short_side: int, side: int) -> Tensor:
    """RGB frame -> what the auto-encoder learns from, side x side x 3 uint8, flipped or not."""
    frame = random_crop(to_lab(frame, short_side), side)
    return torch.from_numpy(np.ascontiguousarray(frame[:, ::-1] if integer(0, 1) else frame))


def find_images(args: Args, videos: Sequence[Path]) -> Images | None:
    """The data of the image objective."""
    objective, moco = args.image_objective, args.image_objective == "moco"
    if objective == "none":
        return None
    change = train_finetune.random_view(args.image_size, 0.2 if moco else 0.08, 1 if moco else 0)
    change = functools.partial(augment, change=change, grey=args.image_grey, views=2 if moco else 1)
    if args.image_data == "frames":
        if objective == "imagenet":
            raise UserError("--image-objective imagenet: needs --image-data ROOT, a folder with a folder a class")
        return Images([*videos] * args.pairs_per_video, change)
    root = Path(args.image_data)
    root = root / "train" if (root / "train").is_dir() else root
    found = pictures_in(root)
    if not any(found.values()):
        raise UserError(f"--image-data {args.image_data}: holds no pictures; give a folder of them, or frames")
    if objective != "imagenet":
        return Images(list(itertools.chain(*found.values())), change)
    loose, *classes = (inside for name, inside in found.items() if inside or not name)
    if len(classes) < 2:
        raise UserError(f"--image-data {args.image_data}: has {len(classes)} folders of pictures; give one a class")
    if loose:
        say(f"note: {root}: {len(loose)} pictures beside the class folders are left out")
    labels = np.repeat(range(len(classes)), [len(inside) for inside in classes])
    return Images(list(itertools.chain(*classes)), change, labels)


# ---------------------------------------------------------------------------------------------------------------------
# The Lab auto-encoder


def convolution(channels: int, filters: int) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 3, padding=1, padding_mode="reflect")


def enlarged(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv of x enlarged twice (nearest), B x C x h x w -> B x D x 2h x 2w, as one transposed convolution of x: less
    than half the work. Reflection on the fine grid is replication on the coarse one."""
    kernel = conv.weight.flip(2, 3).transpose(0, 1)  # C D 3 3, then the sum over the four fine cells of a coarse one
    kernel = sum(F.pad(kernel, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1))  # C D 4 4
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    return F.conv_transpose2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, conv.bias, stride=2, padding=3)


class LabEncoder(nn.Module):
    """Lab (uint8 - 128) / 128, B x 3 x H x W -> code, B x 256 x H/8 x W/8, not negative. Layers named as released."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 1)
        self.conv2, self.conv3 = convolution(3, 64), convolution(64, 64)
        self.conv4, self.conv5 = convolution(64, 128), convolution(128, 128)
        self.conv6 = convolution(128, 256)
        self.downsample = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(256, 256, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x)).relu_()
        x = F.max_pool2d(self.conv3(x).relu_(), 2)
        x = self.conv4(x).relu_()
        x = F.max_pool2d(self.conv5(x).relu_(), 2)
        return self.downsample(self.conv6(x).relu_())


class LabDecoder(nn.Module):
    """Code -> Lab in -1 ... 1, the inverse of LabEncoder."""

    def __init__(self):
        super().__init__()
        self.upsample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(256, 256, 1), nn.ReLU())
        self.conv7, self.conv8 = convolution(256, 128), convolution(128, 128)
        self.conv9, self.conv10 = convolution(128, 64), convolution(64, 64)
        self.conv11 = convolution(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample[1](x).relu_()  # before it is enlarged, which changes nothing
        x = enlarged(x, self.conv7).relu_()
        x = enlarged(x, self.conv8).relu_()
        x = self.conv9(x).relu_()
        x = enlarged(x, self.conv10).relu_()
        return self.conv11(x).tanh()


def from_uint8(lab: Tensor) -> Tensor:
    """8-bit Lab, B x H x W x 3 -> what the auto-encoder sees, B x 3 x H x W (channels last)."""
    return (lab.permute(0, 3, 1, 2).float() - 128) / 128


class AutoEncoder(nn.Module):
    """Its own training: the error of lab_error between crops and what is decoded of their codes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = LabEncoder(), LabDecoder()

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        x = from_uint8(batch["frames"])
        decoded = self.decoder(self.encoder(x)).float()
        L, a, b = 128 * (decoded - x).detach().abs().mean((0, 2, 3))
        return {"loss": lab_error(decoded, x).mean(), "L": L / 2.55, "a": a, "b": b}  # OpenCV stretches L to 0 ... 255


def load_autoencoder(folder: Path, coders: tuple[nn.Module, nn.Module] = ()) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder with the released weights, or those of another run, found in a folder."""
    parts = coders or (LabEncoder(), LabDecoder())
    for name, part in zip(("encoder", "decoder"), parts, strict=True):
        found = sorted(folder.glob(f"*{name}*.pth"))
        if len(found) != 1:
            what = f"{len(found)} files *{name}*.pth" if folder.is_dir() else "no such folder"
            raise UserError(f"--autoencoder {folder}: {what}; give one with *encoder*.pth and *decoder*.pth")
        if why := common.fit(part, common.read_weights(found[0])[0]):
            raise UserError(f"{found[0]}: is not the {name} of UVC's Lab auto-encoder: {why}")
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# UVC's losses. n = crop / 8 and N = full / 8 cells a side; i is a cell of the reference, j one of the target


def positions(n: int, legacy: bool, like: Tensor) -> Tensor:
    """Middles of n cells over -1 ... 1; legacy: from -1 to 1, the corners aligned."""
    i = torch.arange(n, device=like.device).float()
    return 2 * i / max(n - 1, 1) - 1 if legacy else (2 * i + 1) / n - 1


def cell_grid(n: int, legacy: bool, like: Tensor) -> Tensor:
    """(x, y) of n x n cells over -1 ... 1: 2 x nn."""
    at = positions(n, legacy, like)
    return torch.stack([at.repeat(n), at.repeat_interleave(n)])


def affinity(reference: Tensor, target: Tensor, temperature: float) -> Tensor:
    """S_ij = f_i . f_j / T, before the softmax. B x C x n x n and B x C x m x m -> B x nn x mm."""
    return (reference / temperature).flatten(2).transpose(1, 2) @ target.flatten(2)  # a second nn x mm would be large


def copy_colors(codes: Tensor, A: Tensor) -> Tensor:
    """c_j = sum_i c_i A_ij for codes B x C x n x n and A B x nn x mm -> B x C x m x m."""
    copied = codes.flatten(2) @ A
    side = math.isqrt(copied.shape[2])
    return copied.unflatten(2, (side, side))


def soft_argmax(S: Tensor, grid: Tensor) -> Tensor:
    """Where each reference cell is expected in the target: sum_j softmax_j(S_ij) g_j. S B x nn x mm, grid 2 x mm -> B
    x nn x 2, in the units of the grid."""
    return S.softmax(2) @ grid.T


def box(centre: Tensor, n: int, N: int) -> Tensor:
    """The box of n x n cells about a centre (x, y) in -1 ... 1, as parts of the frame: B x 2 -> B x 4 (left, top,
    right, bottom) in 0 ... 1. It is shifted into the frame at the left and the top and cut off at the right and the
    bottom, as released: l = max(x - n / 2, 0), r = min(l + n, N)."""
    first = ((centre + 1) / 2 - n / N / 2).clamp(min=0)
    return torch.cat([first, (first + n / N).clamp(max=1)], 1)


def crop(x: Tensor, where: Tensor, side: int, legacy: bool = False) -> Tensor:
    """The boxes `where` (B x 4, parts of the frame) of x, B x C x H x W -> B x C x side x side, bilinear; the gradient
    reaches x and the boxes. Sample j of n lies at l + (j + 1/2) (r - l) / n, between cells whose middles are at + 1/2;
    legacy: at the l + j (r - l) / (n - 1) of corners that are aligned."""
    at = positions(side, legacy, x)
    left, top, right, bottom = where[:, :, None].unbind(1)  # B 1
    xs, ys = at * (right - left) + (left + right) - 1, at * (bottom - top) + (top + bottom) - 1  # B side
    grid = torch.stack([xs[:, None].expand(-1, side, -1), ys[:, :, None].expand(-1, -1, side)], 3)
    return F.grid_sample(x, grid, padding_mode="zeros" if legacy else "border", align_corners=legacy)


def lab_error(copied: Tensor, true: Tensor) -> Tensor:
    """mean |L - L'| + 10 mean |a - a'| + 10 mean |b - b'| of each sample: B x 3 x H x W -> B."""
    L, a, b = (copied.float() - true).abs().mean((2, 3)).unbind(1)
    return L + 10 * a + 10 * b


def color_loss(forward: Tensor, back: Tensor, switch: float, threshold: float) -> tuple[Tensor, Tensor]:
    """mean_n s_n of s = forward + switch * back, where s_n > threshold counts 0; and the share of these. The errors of
    colours copied forward, and back by the transposed affinity (the cycle): B each."""
    s = forward + switch * back
    outlier = s.detach() > threshold
    return s.masked_fill(outlier, 0).mean(), outlier.float().mean()


def concentration(S: Tensor, legacy: bool = False) -> Tensor:
    """D(S) + D(S^T). D: where u_j = sum_i softmax_i(S_ij) g_i, in -1 ... 1, the mean squared distance of u_j from its
    mean over a window of 8 x 8 cells j, a mean over axes, cells and windows. S B x nn x nn."""
    n = math.isqrt(S.shape[1])
    grid = cell_grid(n, legacy, S)

    def spread(P: Tensor) -> Tensor:
        windows = (grid @ P).unflatten(2, (n // 8, 8, n // 8, 8))  # B 2 window row window column
        return windows.var((3, 5), correction=0).mean()

    return spread(S.softmax(1)) + spread(S.transpose(1, 2).softmax(1))


def coordinate_cycle(S: Tensor, legacy: bool = False) -> Tensor:
    """mean |g_i - sum_j softmax_j(S_ij) sum_k softmax_k(S_kj) g_k|: how far a cell is, in cells, from where it comes
    back to. S B x nn x nn."""
    n = math.isqrt(S.shape[1])
    grid = cell_grid(n, legacy, S) * n / 2
    return (S.softmax(2) @ (grid @ S.softmax(1)).transpose(1, 2) - grid.T).abs().mean()


@torch.no_grad()
def cycle_accuracy(S: Tensor) -> Tensor:
    """The share of cells that come back to within one cell over their best match and its best match."""
    n = math.isqrt(S.shape[1])
    back = S.argmax(1).gather(1, S.argmax(2))  # B nn
    i = torch.arange(n * n, device=S.device)
    return (((back % n - i % n).abs() <= 1) & ((back // n - i // n).abs() <= 1)).float().mean()


# ---------------------------------------------------------------------------------------------------------------------
# UVC and UVC+


def build_backbone(args: Args) -> nn.Module:
    """A ResNet-18 up to --out-layer, its weights random or those of --init, which must hold all of them."""
    row = common.find_system("uvc+")
    net = common.build_net(row, replace(row.settings, layer=args.out_layer.replace("layer", "res")))
    if args.init and not resumes(args) and (why := common.fit(net, read_start(args.init))):
        what = f"give a ResNet-18 up to {args.out_layer} with torchvision's names and its BatchNorm"
        raise UserError(f"--init {args.init}: {why}; {what}")
    return net


class UVC(nn.Module):
    """Backbone, auto-encoder and image network; forward() gives the loss and its terms.

    batch: video: reference and target, 8-bit Lab, B x crop x crop x 3 and B x crop x crop x 3 or, in the localisation
    phase, B x full x full x 3. image: pictures B x 3 (grey: 1) x h x w uint8, two of each for moco, with their labels
    for imagenet.
    """

    def __init__(self, args: Args, coders: tuple[nn.Module, nn.Module], warmup_steps: int, classes: int = 0):
        super().__init__()
        self.args, self.warmup_steps, self.shown = args, warmup_steps, None
        self.moved, self.negatives = None, None  # moco: the step at which its keys' network moved, the queue before it
        self.backbone = build_backbone(args).to(memory_format=torch.channels_last)
        self.encoder, self.decoder = (
            part.requires_grad_(False).eval().to(memory_format=torch.channels_last) for part in coders
        )
        self.register_buffer("mean", torch.tensor(train_finetune.MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(train_finetune.STD).view(3, 1, 1), persistent=False)
        outputs = {"none": 0, "rotation": 4, "moco": 128, "imagenet": classes}[args.image_objective]
        if outputs:
            channels = 512 if args.out_layer == "layer4" else 256
            shortcut = nn.Sequential(nn.Conv2d(channels, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
            blocks = BasicBlock(channels, 512, 2, shortcut), BasicBlock(512, 512)
            for conv in (part for block in blocks for part in block.modules() if isinstance(part, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs)
            self.auxiliary = nn.Sequential(nn.MaxPool2d(3, 2, 1), *blocks, *head).to(memory_format=torch.channels_last)
        if args.image_objective == "moco":
            self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
            self.key_auxiliary = copy.deepcopy(self.auxiliary).requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(128, args.queue), dim=0))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        a, terms = self.args, {}
        if "image" in batch:  # first, so that the running statistics weigh grey frames more
            terms["image"], terms["image_accuracy"] = getattr(self, a.image_objective)(batch["image"], step)
        x1, x2 = from_uint8(batch["video"]["reference"]), from_uint8(batch["video"]["target"])
        F1, F2 = self.features(x1), self.features(x2)  # two passes, each with statistics of its own
        n, N, legacy = F1.shape[-1], F2.shape[-1], a.legacy_align_corners
        localise = n < N
        exact = functools.partial(torch.autocast, x1.device.type, enabled=False)
        y2, where = x2, None
        with exact():
            F1, F2 = F1.float(), F2.float()
            if localise:
                centre = soft_argmax(affinity(F1, F2, a.temperature), cell_grid(N, legacy, F1)).mean(1)
                where = box(centre, n, N)
                F2, y2 = crop(F2, where, n, legacy), crop(x2, where, 8 * n, legacy)
                cut = (where[:, 2:] - where[:, :2] < (n - 0.01) / N).any(1).float().mean()
                terms |= {"centre_x": centre[:, 0].mean(), "centre_y": centre[:, 1].mean(), "cut_boxes": cut}
            S = affinity(F1, F2, a.temperature)
            A = S.softmax(1)
        c1, c2 = self.encode(x1), self.encode_box(x2, where, n)
        with exact():
            copied = torch.cat([copy_colors(c1.float(), A), copy_colors(c2.float(), A.transpose(1, 2))])
        forward, back = self.decoder(copied.contiguous(memory_format=torch.channels_last)).chunk(2)
        error, error_back = lab_error(forward, y2), lab_error(back, x1)
        since, late = (step - self.warmup_steps, 1) if localise else (step, 0)
        threshold = a.threshold if since >= a.threshold_steps[late] else math.inf
        color, zeroed = color_loss(error, error_back, a.color_switch, threshold)
        with exact():
            spread = concentration(S, legacy)
            video = color + (a.concentration * spread if step >= a.concentration_steps else 0)
            if localise and a.coordinate:
                terms["coordinate"] = coordinate_cycle(S, legacy)
                video = video + a.coordinate * terms["coordinate"]
        loss = video + a.image_weight * terms["image"] if "image" in terms else video
        self.shown = None
        if (step + 1) % a.look_every == 0:
            self.shown = [None if x is None else x[:4].detach().clone() for x in (x1, x2, y2, forward, where)]
        return {
            "loss": loss,
            "color": error.mean(),
            "switch": error_back.mean(),
            "zeroed": zeroed,
            "concentration": spread,
            "cycle_accuracy": cycle_accuracy(S),
            "sharpness": A.detach().amax(1).mean(),
            "largest_logit": S.detach().abs().max(),
            **terms,
        }

    def features(self, lab: Tensor) -> Tensor:
        """Lab B x 3 x H x W -> features B x C x H/8 x W/8 of its L, OpenCV's 8 bits / 256, in three channels."""
        return self.backbone(((lab[:, :1] + 1) / 2 - self.mean) / self.std)

    @torch.no_grad()
    def encode(self, lab: Tensor) -> Tensor:
        """Codes of true frames; in parts, which bounds the memory."""
        return torch.cat([self.encoder(part) for part in lab.split(8)])

    def encode_box(self, lab: Tensor, where: Tensor | None, n: int) -> Tensor:
        """The codes of whole frames, cut at the boxes. Of the frame only what these can see is encoded: a code sees
        10 pixels around its 8 x 8, so two cells beyond those that are sampled do."""
        if where is None:
            return self.encode(lab)
        N = lab.shape[-1] // 8
        side = N if self.args.legacy_align_corners else min(n + 8, N)
        first = (torch.floor(where[:, :2].detach() * N) - 3).clamp(0, N - side)
        parts = zip(lab, (8 * first).long().tolist(), strict=True)
        codes = self.encode(torch.stack([x[:, t : t + 8 * side, l : l + 8 * side] for x, (l, t) in parts]))
        with torch.autocast(lab.device.type, enabled=False):
            return crop(codes.float(), (where * N - first.repeat(1, 2)) / side, n, self.args.legacy_align_corners)

    def pictures(self, x: Tensor) -> Tensor:
        """uint8 pictures as the backbone wants them, B x 3 x h x w."""
        x = x.float() / (256 if self.args.image_grey else 255)
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the image network's logits, and the share that is right."""
        terms = train_finetune.classify(self.auxiliary(self.backbone(self.pictures(images))).float(), labels)
        return terms["loss"], terms["top1"]

    def rotation(self, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Which of four turns, all four of each picture in the batch."""
        return self.judged(*train_finetune.rotations(images))

    def imagenet(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, Tensor]:
        """Which class."""
        return self.judged(*batch)

    def embed(self, backbone: nn.Module, auxiliary: nn.Module, images: Tensor) -> Tensor:
        """Pictures -> keys of length 1, N x 128. BatchNorm sees groups of a quarter of the batch, at least two at a
        time in a process that is alone. In the running statistics, which inference takes, all groups weigh as much
        as one pass."""
        groups = images.chunk(max(2 if rank_world()[1] == 1 else 1, 4 // (rank_world()[1] * self.args.accumulate)))
        norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1 - 0.9 ** (1 / len(groups))
        keys = torch.cat([auxiliary(backbone(self.pictures(group))) for group in groups])
        for norm in norms:
            norm.momentum = 0.1
        return F.normalize(keys.float(), dim=1)

    def moco(self, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Which of the queue's keys and the picture's own is its own (MoCo v1), and the share that is right."""
        query_images, key_images = images.unbind(1)
        query = self.embed(self.backbone, self.auxiliary, query_images)
        if self.moved != step:  # once, also where gradients are accumulated
            train_finetune.follow(self.key_backbone, self.backbone, 0.999)
            train_finetune.follow(self.key_auxiliary, self.auxiliary, 0.999)
            self.moved, self.negatives = step, self.queue.clone()
        embed = functools.partial(self.embed, self.key_backbone, self.key_auxiliary)
        keys = train_finetune.shuffled_keys(embed, key_images, step)
        terms = train_finetune.tell_own_key(query, keys, self.negatives, 0.07)
        train_finetune.enqueue(self.queue, self.pointer, keys)
        return terms["loss"], terms["top1"]

    def look(self) -> np.ndarray | None:
        """Rows of reference, whole target with its box, target, and the colours copied; None between --look-every."""
        if self.shown is None:
            return None
        x1, x2, y2, copied, where = self.shown
        side, rows = x1.shape[-1], []
        for i, row in enumerate(zip(*map(from_lab, (x1, x2, y2, copied)), strict=True)):
            if where is not None:
                l, t, r, b = (where[i] * row[1].shape[0]).round().int().tolist()
                cv2.rectangle(row[1], (l, t), (r, b), (255, 40, 40), max(2, row[1].shape[0] // 100))
            rows.append(np.hstack([cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA) for part in row]))
        return np.vstack(rows)


def from_lab(x: Tensor) -> list[np.ndarray]:
    """Lab in -1 ... 1, B x 3 x H x W -> RGB frames."""
    frames = (x.float() * 128 + 128).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [cv2.cvtColor(frame, cv2.COLOR_LAB2RGB) for frame in frames]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def check(args: Args) -> Args:
    """The arguments with the defaults that depend on others; UserError for what cannot be."""
    if not args.data:
        raise UserError("--data is missing: give a folder of videos, or of folders of frames")
    if args.crop < 64 or args.crop % 64:
        raise UserError(f"--crop {args.crop}: give a multiple of 64, the concentration loss has windows of 64 pixels")
    if args.full <= args.crop or args.full % 8:
        raise UserError(f"--full {args.full}: give a multiple of 8 above --crop {args.crop}")
    for flag in ("lr", "temperature"):
        if not getattr(args, flag) > 0:
            raise UserError(f"--{flag} {getattr(args, flag)}: give a number above 0")
    factors = ("lr", "temperature", "image_weight", "color_switch", "concentration", "coordinate")
    limits = dict.fromkeys(factors, (0, 1000)) | dict.fromkeys(("threshold", "threshold_steps"), (0, math.inf))
    limits |= dict.fromkeys(("batch_size", "image_batch_size", "gap", "look_every"), (1, math.inf))
    limits |= {"autoencoder_steps": (1, math.inf), "concentration_steps": (0, math.inf), "short_side": (0, 2**15)}
    limits |= {"epochs": (1, 10**6), "pairs_per_video": (1, 10**5), "queue": (1, 2**24), "image_size": (64, 4096)}
    check_numbers(args, limits)
    if (args.crop // 8) ** 2 * (args.full // 8) ** 2 > 2**31:
        raise UserError(f"--crop {args.crop} --full {args.full}: affinities of a pair take over 8 GiB; give less")
    if args.image_objective == "none":
        refuse_unused(args, IMAGE_FLAGS, "is for an --image-objective, and none was given")
    if args.image_objective != "moco":
        refuse_unused(args, ["queue"], f"is for --image-objective moco, not {args.image_objective}")
    if args.autoencoder:
        refuse_unused(args, ["autoencoder_steps"], "the auto-encoder is given, not trained")
    if not 0 <= args.warmup_epochs <= args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs}: give 0 to --epochs {args.epochs}")
    if args.amp == "bfloat16":
        what = "is too coarse for affinities of features that have no unit length"
        raise UserError(f"--amp bfloat16: {what}; take float16")
    weight, batch = IMAGE_LOSS[args.image_objective]
    chosen = {"short_side": args.crop, "image_weight": weight, "image_batch_size": batch}
    args = replace(args, **{name: value for name, value in chosen.items() if getattr(args, name) is None})
    if args.image_objective == "moco" and args.queue % args.image_batch_size:
        raise UserError(f"--queue {args.queue}: give a multiple of --image-batch-size {args.image_batch_size}")
    return args


def train_autoencoder(args: Args, videos: Sequence[Path], device: torch.device) -> Path:
    """The folder of an auto-encoder trained on the videos' frames, every tenth video held out to report its error."""
    folder = args.out / "autoencoder"
    if args.resume and (folder / "decoder.pth").is_file():
        return folder
    torch.manual_seed(args.seed)
    change = functools.partial(lab_crop, short_side=args.short_side, side=args.crop)
    held = videos[::10] if len(videos) >= 20 else videos  # few: all are learnt from, and tell nothing about others
    learn = [video for i, video in enumerate(videos) if i % 10 or len(videos) < 20]
    frames = Images(learn * math.ceil(500 * args.batch_size / len(learn)), change)  # 500 steps an epoch
    method = AutoEncoder().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(method.parameters())
    torch.manual_seed(0)  # the same crops whatever the seed
    test = []
    for video in held[:64]:
        with contextlib.suppress(UserError):
            test.append(change(read_frames(video, lambda length: [length // 2])[0]))

    @torch.no_grad()
    def score() -> dict[str, float]:
        terms = [method({"frames": frame[None].to(device)}, 0) for frame in test]
        return {name: float(sum(t[name] for t in terms)) / len(terms) for name in ("loss", "L", "a", "b")}

    own = replace(args, out=folder, max_steps=args.autoencoder_steps, validate=None)
    streams = {"frames": (frames, "batch_size")}
    epochs = math.ceil(args.autoencoder_steps / (len(frames) // args.batch_size))

    def lr(epoch: int) -> float:
        return 1e-3 * (1 - epoch / epochs) ** 0.9

    train_finetune.train(own, method, optimizer, lr, epochs, streams, method, {}, score=score if test else None)
    if rank_world()[0] == 0:
        errors = ", ".join(f"{name} {value:.3g}" for name, value in (score() if test else {}).items())
        print(f"Lab auto-encoder: error {errors} (Lab units) on {len(test)} frames; learnt from {len(learn)} videos")
        for name, part in (("encoder", method.encoder), ("decoder", method.decoder)):
            train_finetune.write_checkpoint(folder / f"{name}.pth", part.state_dict())
    if rank_world()[1] > 1:
        torch.distributed.barrier()
    return folder


def main(args: Args) -> None:
    args = check(args)
    videos = find_videos(args.data)
    images = find_images(args, videos)
    warmup = args.warmup_epochs * (len(videos) * args.pairs_per_video // args.batch_size)
    streams = {"video": (Pairs(args, videos, warmup), "batch_size")}
    streams |= {"image": (images, "image_batch_size")} if images else {}
    again = resumes(args)  # all weights are in last.pth
    coders = load_autoencoder(args.autoencoder) if args.autoencoder and not again else (LabEncoder(), LabDecoder())
    device = train_finetune.start_training(args, streams)
    method = UVC(args, coders, warmup, max(images.labels, default=-1) + 1 if images else 0).to(device)
    if not (args.autoencoder or again):  # an --init that does not fit has been refused by now
        load_autoencoder(train_autoencoder(args, videos, device), coders)
    optimizer = torch.optim.Adam([weight for weight in method.parameters() if weight.requires_grad], lr=args.lr)

    def lr(epoch: int) -> float:
        """It begins again with the localisation phase (as released)."""
        e = epoch if epoch < args.warmup_epochs else epoch - args.warmup_epochs
        return args.lr * (1 - e / args.epochs) ** 0.9

    meta = {"task": "uvc+", "arch": "resnet18", "image_objective": args.image_objective, "out_layer": args.out_layer}
    meta |= {"strides": {stage: 1 for stage in ("layer3", "layer4") if stage <= args.out_layer}, "input": "lab_l"}
    meta |= {"l2_normalise": False, "temperature": args.temperature}
    layer = args.out_layer.replace("layer", "res")
    validation = ["--model", "uvc+", "--layer", layer, "--localization", "none", "--context", "7"]
    validation += ["--temperature", str(args.temperature)]
    train_finetune.train(
        *(args, method, optimizer, lr, args.epochs, streams, method.backbone, meta, validation), look=method.look
    )


if __name__ == "__main__":
    common.run(main, lambda: common.parse(Args))
