"""The paper's still-image models: trained from scratch, or fine-tuned after the stride change (sections 3.1, 3.3, 4.2).

    python train_finetune.py --objective rotation --data IMAGENET --out results/rotation
    python train_finetune.py --objective imagenet --data IMAGENET --finetune resnet18-f37072fd.pth --out results/tuned
    torchrun --nproc-per-node 8 train_finetune.py --objective moco --data FRAMES --amp bfloat16 --out results/moco
    python propagate.py --weights results/tuned/weights.pth --video clip.mp4 --mask f0.png

--finetune gives layer3 (the paper's res3) stride 1, freezes what comes before it, and goes on with the task that the
weights were trained on. Defaults are the paper's, for 256 pictures a batch; small machines keep that with --accumulate.
Stop it whenever you like: the same command goes on from OUT/last.pth and ends with the same weights. Beside it:
weights.pth (bare torchvision names, with the task head), log.csv and validation.csv, TensorBoard's events.
"""

import atexit
import contextlib
import copy
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms import v2
from tqdm import tqdm

import common
from common import PICTURES, UserError, atomic, pick_device, rank_world, read_weights, usable_cpus


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
    """Parts that a batch is cut into, their gradients added up: for small memories. A run can go on with fewer
    processes and more parts each (not moco)."""
    workers: int = min(8, usable_cpus())
    """Processes that read and augment the data, of one thread each, for each GPU."""
    amp: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of convolutions: float32 (TF32 where a GPU has it), bfloat16, or float16 with loss scaling."""
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

    @property
    def parts(self) -> int:
        """Parts that a batch is cut into, over all processes."""
        return rank_world()[1] * self.accumulate


@dataclass
class Args(Training):
    objective: Literal["imagenet", "rotation", "moco"] = "imagenet"
    """imagenet: classification, of whatever classes; rotation: tell by which of four angles a picture is turned; moco:
    momentum contrast."""
    data: Path | None = None
    """ROOT with train/ and val/, each a folder a class; without these ROOT itself is divided by --holdout. rotation and
    moco take pictures at any depth, of any names."""
    finetune: Path | None = None
    """Weights to fine-tune after the stride change: a released file, or weights.pth or last.pth of an earlier run."""
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    """The network."""
    epochs: int | None = None
    """Passes over the data. Default: imagenet 90, rotation 180, moco 200; 40 with --finetune."""
    batch_size: int = 256
    """Pictures a step, over all processes. rotation shows each four ways, moco two."""
    lr: float | None = None
    """Learning rate at first. Default for 256 pictures a batch, in proportion for others: imagenet and rotation 0.1,
    moco 0.03; with --finetune 0.01, moco 0.003."""
    decay_epochs: tuple[int, ...] | None = None
    """Epochs after which the learning rate is divided by 10. Default: imagenet and rotation every 30, moco 120 160; 20
    with --finetune."""
    schedule: Literal["steps", "cosine"] | None = None
    """Of the learning rate: steps at --decay-epochs, or half a cosine to 0. Default: cosine for --moco-v2
    from scratch, else steps."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Of all parameters that are trained."""
    crop: int = 224
    """Side of the training crops, in pixels."""
    min_area: float | None = None
    """Smallest part of a picture that a crop covers. Default: 0.08, moco 0.2."""
    holdout: float = 0.05
    """Share of the pictures kept to measure accuracy where ROOT has no val/; the last ones of each folder."""
    moco_v2: bool = False
    """Momentum contrast as of version 2: a head of two layers, stronger augmentation, temperature 0.2, cosine."""
    queue: int = 65536
    """Keys that moco compares with, K; a multiple of --batch-size."""
    dim: int = 128
    """Length of moco's keys."""
    temperature: float | None = None
    """Of moco's softmax. Default: 0.07, with --moco-v2 0.2."""
    key_momentum: float = 0.999
    """How slowly moco's key encoder follows."""
    bn_groups: int | None = None
    """Parts of a batch that moco normalises by themselves, the keys in another order than the queries, over all
    processes and --accumulate parts: what shuffled BatchNorm is on one GPU. Default: 8, and 2 or more at a time in a
    process that is alone."""


# objective, fine-tuning: epochs, learning rate, epochs of decay (section 3.3; PyTorch's ImageNet example; MoCo's code)
PAPER = {
    ("imagenet", False): (90, 0.1, (30, 60)),
    ("rotation", False): (180, 0.1, (30, 60, 90, 120, 150)),
    ("moco", False): (200, 0.03, (120, 160)),
    ("imagenet", True): (40, 0.01, (20,)),
    ("rotation", True): (40, 0.01, (20,)),
    ("moco", True): (40, 0.003, (20,)),
}

MOCO_FLAGS = ("moco_v2", "queue", "dim", "temperature", "key_momentum", "bn_groups")

ABOVE_0 = math.ulp(0)  # the least number that is more


def check_numbers(args: Training, limits: dict[str, tuple[float, float]]) -> None:
    """UserError for a flag below the least or above the most that makes sense; None is a default."""
    for flag, (least, most) in limits.items():
        values = getattr(args, flag)
        for value in values if isinstance(values, tuple) else (values,):
            if value is None or least <= value <= most:
                continue
            if value > most:
                how = f"give {least:.0f} to {most}"
            else:  # nan is no more than anything
                how = "must be above 0" if least == ABOVE_0 else f"give {least} or more"
            raise UserError(f"--{flag.replace('_', '-')} {value}: {how}")


def refuse_unused(args: Training, names: Sequence[str], why: str) -> None:
    """UserError for a flag of these that was given, though the run would not read it."""
    for name in names:
        if (value := getattr(args, name)) != getattr(type(args), name):
            given = "" if value is True else f" {value}"
            raise UserError(f"--{name.replace('_', '-')}{given}: {why}; leave it out")


def say(line: str) -> None:
    """Print a line on stderr, of all processes the first."""
    if not rank_world()[0]:
        print(line, file=sys.stderr)


def settle(args: Args) -> Args:
    """The flags with the paper's values where none were given. UserError for those that make no sense."""
    epochs, lr, decay = PAPER[args.objective, args.finetune is not None]
    moco, world = args.objective == "moco", rank_world()[1]
    parts = max(args.parts, 1)
    chosen = {
        "epochs": epochs,
        "lr": lr * args.batch_size / 256,
        "decay_epochs": decay,
        "schedule": "cosine" if args.moco_v2 and not args.finetune else "steps",
        "min_area": 0.2 if moco else 0.08,
        "temperature": 0.2 if args.moco_v2 else 0.07,
        "bn_groups": parts * max(math.ceil(8 / parts), 2 if world == 1 else 1) if moco else None,
    }
    limits = {"batch_size": (1, 2**20), "epochs": (ABOVE_0, 10**6), "crop": (8, 4096), "lr": (ABOVE_0, 1e30)}
    limits |= {"temperature": (ABOVE_0, 1000), "queue": (ABOVE_0, 2**24), "dim": (ABOVE_0, 2**16)}
    limits |= {"min_area": (ABOVE_0, 1), "decay_epochs": (1, math.inf), "bn_groups": (1, math.inf)}
    limits |= dict.fromkeys(("momentum", "weight_decay", "holdout", "key_momentum"), (0, 1))
    check_numbers(args, limits)
    if moco:
        refuse_unused(args, ["holdout"], "moco measures no accuracy")
    else:
        refuse_unused(args, MOCO_FLAGS, f"is for --objective moco, not {args.objective}")
    if (args.schedule or chosen["schedule"]) == "cosine":
        refuse_unused(args, ["decay_epochs"], "the cosine schedule has no such steps")
    args = replace(args, **{name: value for name, value in chosen.items() if getattr(args, name) is None})
    if args.data is None:
        raise UserError("--data: missing; give the folder of pictures to learn from")
    if moco and args.queue * args.dim > 2**31:
        raise UserError(f"--queue {args.queue} --dim {args.dim}: these keys take more than 8 GiB; give fewer")
    batch = f"--batch-size {args.batch_size}"
    if moco and args.queue % args.batch_size:
        right = max(args.queue // args.batch_size, 1) * args.batch_size
        raise UserError(f"--queue {args.queue}: must be a multiple of {batch}; give {right}")
    if moco and (args.batch_size % args.bn_groups or args.bn_groups % parts):
        what = f"must divide {batch} and be a multiple of {parts}, processes x --accumulate"
        raise UserError(f"--bn-groups {args.bn_groups}: {what}; change one of them")
    groups = {"imagenet": parts, "rotation": 0, "moco": args.bn_groups}[args.objective]
    if args.crop <= 32 and args.batch_size < 2 * groups:
        what = "leaves one cell of a picture, and BatchNorm would see one picture at a time"
        raise UserError(f"--crop {args.crop}: {what}; give more, a larger batch, or fewer --bn-groups or --accumulate")
    return args


def learning_rate(args: Args) -> Callable[[int], float]:
    """The learning rate of an epoch, the first is 0."""
    if args.schedule == "cosine":
        return lambda epoch: args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return lambda epoch: args.lr * 0.1 ** sum(epoch >= after for after in args.decay_epochs)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def leads_back(folder: Path) -> bool:
    """Whether a link leads to a folder that it was reached through: a loop."""
    return folder.is_symlink() and any(folder.samefile(above) for above in folder.parents)


def visible(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """The folders below one, in order, with the names of their files; links are followed, what is hidden left out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); see to its permissions") from error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and not leads_back(Path(place, name)))
        yield place, sorted(name for name in files if name[0] != ".")


def pictures_in(folder: Path) -> dict[str, list[str]]:
    """The pictures below each folder of a folder, in order, by the folder's name; those beside the folders by ""."""
    found = {}
    for place, names in visible(folder):
        below = "".join(Path(place).relative_to(folder).parts[:1])
        found.setdefault(below, []).extend(f"{place}/{name}" for name in names if name.lower().endswith(PICTURES))
    return found


def labelled(folder: Path, found: dict[str, list[str]], classes: Sequence[str]) -> list[tuple[str, int]]:
    """What pictures_in() found, each (path, class number); without classes the number is 0. UserError for nothing, and
    for a folder that is empty or no class."""
    number = {name: i for i, name in enumerate(classes)}
    if classes:
        loose = found.pop("")
        if loose and not found:
            what = f"has {len(loose)} pictures but no class folders"
            raise UserError(f"{folder}: {what}; move them into one folder a class")
        for name, inside in found.items():
            if name not in number:
                train = folder.parent / "train"
                raise UserError(f"{folder / name}: is no class of {train}; remove it, or add it there")
            if not inside:
                raise UserError(f"{folder / name}: an empty class folder, no pictures in it; fill or remove it")
        if loose:
            say(f"note: {folder}: {len(loose)} pictures beside the class folders are left out")
    if not any(found.values()):
        raise UserError(f"{folder}: holds no pictures ({', '.join(PICTURES[:3])}, ...) at any depth; check --data")
    return [(path, number.get(name, 0)) for name, inside in found.items() for path in inside]


def find_pictures(args: Args) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[str]]:
    """Pictures to learn from and pictures held out, each (path, class number), and the names of the classes."""
    if not args.data.is_dir():
        raise UserError(f"--data {args.data}: no such folder; give one with pictures in it")
    train, val = args.data / "train", args.data / "val"
    folder = train if train.is_dir() else args.data
    apart = folder == train and val.is_dir()
    if apart and args.holdout != Args.holdout:
        raise UserError(f"--holdout {args.holdout}: accuracy is measured on {val}; leave it out")
    found = pictures_in(folder)
    classes = [name for name in found if name] if args.objective == "imagenet" else []
    if args.objective == "imagenet" and len(classes) < 2:
        what = f"holds {len(classes)} class folders, classification needs 2"
        raise UserError(f"{folder}: {what}; --objective rotation and moco take pictures of any kind")
    pictures = labelled(folder, found, classes)
    if args.objective == "moco":
        return pictures, [], classes
    if apart:
        return pictures, labelled(val, pictures_in(val), classes), classes
    return *hold_out(pictures, args.holdout), classes


def hold_out(pictures: Sequence[tuple[str, int]], share: float) -> tuple[list, list]:
    """The pictures without a share of them, and these: the last ones of each folder (a class, the frames of a video),
    all but one of a class at the most. What is too little for a picture is added to the next folder's share."""
    left = Counter(label for _, label in pictures)
    learned, held, owed = [], [], 0.0
    for _, inside in itertools.groupby(pictures, lambda picture: Path(picture[0]).parent):
        inside = list(inside)
        label = inside[0][1]
        owed += len(inside) * share
        count = min(int(owed), len(inside), left[label] - 1)
        owed, left[label] = owed - count, left[label] - count
        learned.extend(inside[: len(inside) - count])
        held.extend(inside[len(inside) - count :])
    return learned, held


def read_picture(path: str | Path) -> np.ndarray:
    """A picture file -> H x W x 3 uint8 RGB. UserError if it cannot be read."""
    if not Path(path).is_file():
        raise UserError(f"{path}: is no file (any more)")
    return common.read_picture(path)


class Pictures(Dataset):
    """Samples {"label": class number, and for each of `views` a picture 3 x crop x crop uint8}."""

    def __init__(self, pictures: Sequence[tuple[str, int]], transform: Callable, views: Sequence[str] = ("image",)):
        self.paths = np.array([os.fsencode(path) for path, _ in pictures])  # objects would be copied by every worker
        self.labels = np.array([label for _, label in pictures])
        self.transform, self.views = transform, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        picture = torch.from_numpy(read_picture(os.fsdecode(self.paths[index]))).permute(2, 0, 1)
        return {"label": int(self.labels[index]), **{view: self.transform(picture) for view in self.views}}


class HeldOut(Pictures):
    """Pictures where one that cannot be read is black and has class -1."""

    def __getitem__(self, index: int) -> dict:
        try:
            return super().__getitem__(index)
        except UserError:
            black = torch.zeros(3, 9, 9, dtype=torch.uint8)
            return {"label": -1, **{view: self.transform(black) for view in self.views}}


def augmentation(args: Args) -> v2.Transform:
    """What a picture goes through on its way to a crop, uint8 to uint8."""
    return random_view(args.crop, args.min_area, 1 + args.moco_v2 if args.objective == "moco" else 0)


def random_view(side: int, min_area: float, moco: int = 0) -> v2.Transform:
    """A random crop, flipped or not; its colours changed as version 1 or 2 of moco does. uint8 to uint8."""
    steps = [v2.RandomResizedCrop(side, scale=(min_area, 1), antialias=True)]
    if moco == 1:
        steps += [v2.RandomGrayscale(0.2), v2.ColorJitter(0.4, 0.4, 0.4, 0.4)]
    if moco == 2:
        steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
        steps += [v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5)]
    return v2.Compose([*steps, v2.RandomHorizontalFlip()])


def centre(args: Args) -> v2.Transform:
    """The middle of a picture, as it is judged: short side 256 / 224 of the crop."""
    return v2.Compose([v2.Resize(round(args.crop * 256 / 224), antialias=True), v2.CenterCrop(args.crop)])


# ---------------------------------------------------------------------------------------------------------------------
# The network and the three objectives; train_uvc_plus.py has the same objectives for another network

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Net(ResNet):
    """A ResNet with a task's head. frozen: layer3 has stride 1, what is before it is not trained and its BatchNorm
    stays in eval mode, so that neither weights nor statistics change (section 3.3; training goes on as layer3's)."""

    def __init__(self, arch: str, outputs: int, frozen: bool = False, mlp: bool = False):
        super().__init__(*{"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}[arch])
        for name, values in (("mean", MEAN), ("std", STD)):  # on the device: to copy them to a GPU waits for it
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        width, self.frozen = self.fc.in_features, frozen
        self.fc = nn.Linear(width, outputs)
        if mlp:
            self.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.fc)
        if frozen:
            for part in self.layer3[0].modules():
                if isinstance(part, nn.Conv2d):
                    part.stride = (1, 1)
            for part in self.early:
                part.requires_grad_(False)

    @property
    def early(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.relu, self.maxpool, self.layer1, self.layer2]

    def train(self, mode: bool = True) -> "Net":
        super().train(mode)
        for part in self.early if self.frozen else []:
            part.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images N x 3 x S x S uint8 -> outputs of the head, N x outputs float32."""
        x = (x.float() / 255).sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            for part in self.early:
                x = part(x)
        x = self.layer4(self.layer3(x))
        return self.fc(self.avgpool(x).flatten(1)).float()


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Share of samples whose label is the highest logit, and among the five highest where there are more."""
    place = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1  # of the label's logit; a tie is not won
    return {f"top{k}": (place < k).float().mean() for k in (1, 5) if k == 1 or logits.shape[1] > 5}


def classify(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of logits N x classes, and accuracy."""
    return {"loss": F.cross_entropy(logits, labels), **accuracy(logits, labels)}


class Classification(nn.Module):
    """Cross-entropy over the classes."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        return classify(self.net(batch["pictures"]["image"]), batch["pictures"]["label"])


def rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture of N x 3 x S x S turned by 0, 90, 180 and 270 degrees counter-clockwise, 4N x 3 x S x S, the four of
    a picture side by side; and 0, 1, 2, 3 for each, 4N."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], 1)  # N 4 3 S S
    return turned.flatten(0, 1), torch.arange(4, device=images.device).repeat(len(images))


class Rotation(Classification):
    """Which way is up (RotNet, Gidaris et al. 2018). All four turns are in every part of a batch: BatchNorm's
    statistics would tell the turn of one by itself."""

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        images, labels = rotations(batch["pictures"]["image"])
        return classify(self.net(images), labels)


def all_gather(x: Tensor) -> Tensor:
    """x of all processes, one after the other."""
    world = rank_world()[1]
    if world == 1:
        return x
    x = x.contiguous()  # not channels last, whose strides a gather does not heed
    everybody = [torch.empty_like(x) for _ in range(world)]
    torch.distributed.all_gather(everybody, x)
    return torch.cat(everybody)


def contrast(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Logits of each query (N x D) with its own key (N x D), then with the queue (D x K): N x (1 + K)."""
    return torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / temperature


def tell_own_key(q: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> dict[str, Tensor]:
    """Terms of momentum contrast: queries N x D of this process, keys of all processes, negatives D x K."""
    own = keys[rank_world()[0] * len(q) :][: len(q)]
    with torch.autocast(q.device.type, enabled=False):
        logits = contrast(q, own, negatives, temperature)
        return classify(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@torch.no_grad()
def follow(keys: nn.Module, queries: nn.Module, momentum: float) -> None:
    """Key network <- m key network + (1 - m) query network: parameters alone, statistics are its own."""
    for own, other in zip(keys.parameters(), queries.parameters(), strict=True):
        if other.requires_grad:
            own.lerp_(other, 1 - momentum)


@torch.no_grad()
def shuffled_keys(embed: Callable[[Tensor], Tensor], images: Tensor, step: int) -> Tensor:
    """Keys of the images of all processes, in their order: embed() gets them dealt out anew, as the step says, so that
    BatchNorm sees them in other company than their queries."""
    rank, everybody = rank_world()[0], all_gather(images)
    generator = torch.Generator().manual_seed(step)  # a GPU's would give another order
    order = torch.randperm(len(everybody), generator=generator).to(images.device, non_blocking=True)
    own = order[rank * len(images) : (rank + 1) * len(images)]
    shuffled = all_gather(embed(everybody[own]))
    return torch.empty_like(shuffled).index_copy_(0, order, shuffled)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """The keys take the places of the oldest ones in the queue, D x K."""
    places = (pointer + torch.arange(len(keys), device=keys.device)) % queue.shape[1]
    queue[:, places] = keys.T
    pointer.copy_((pointer + len(keys)) % queue.shape[1])


class MoCo(nn.Module):
    """Momentum contrast (He et al. 2020): of all keys, find that of the other crop of the same picture.

    BatchNorm must not tell which key shared a query's batch. So keys are normalised in other company than their
    queries: the keys of all processes are dealt out anew, and each process takes its share in `groups` parts. One
    process with G groups computes what G processes do. With --accumulate the encoder moves, and the negatives change,
    once a step. Entries of the state dict have the published names.
    """

    def __init__(self, net: Net, queue: int, dim: int, temperature: float, momentum: float, groups: int):
        super().__init__()
        self.encoder_q, self.encoder_k = net, copy.deepcopy(net).requires_grad_(False)
        for name in ("conv1", "bn1", "layer1", "layer2") if net.frozen else ():  # never differ: one of each
            setattr(self.encoder_k, name, getattr(net, name))
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.temperature, self.momentum, self.groups = temperature, momentum, groups
        self.step, self.negatives = None, None  # of which step the negatives are

    def embed(self, net: Net, images: Tensor) -> Tensor:
        """Images N x 3 x S x S -> keys of length 1, N x D; BatchNorm in groups."""
        return F.normalize(torch.cat([net(part) for part in images.chunk(self.groups)]), dim=1)

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        query, key = batch["pictures"]["query"], batch["pictures"]["key"]
        q = self.embed(self.encoder_q, query)
        if step != self.step:
            follow(self.encoder_k, self.encoder_q, self.momentum)
            self.step, self.negatives = step, self.queue.clone()
        keys = shuffled_keys(functools.partial(self.embed, self.encoder_k), key, step)
        terms = tell_own_key(q, keys, self.negatives, self.temperature)
        enqueue(self.queue, self.queue_ptr, keys)
        return terms


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, with its guarantees; train_uvc_plus.py trains by the same


# what may change when a run is resumed; every other flag decides what is learnt
FREE = {"out", "resume", "max_steps", "workers", "device", "save_minutes"}
FREE |= {"validate", "validate_every", "validate_sequences", "look_every"}
FREE |= {"data", "image_data"}  # the number of samples must be the same
MOVED = {"finetune", "init", "autoencoder"}  # not read again; the same name elsewhere is taken for the same file


def start_training(args: Training, streams: dict[str, tuple[Sequence, str]]) -> torch.device:
    """Check the flags, the batch sizes of the streams (as in train) and both against OUT/last.pth, seed, join the
    process group. To be called first."""
    limits = {"max_steps": (0, math.inf), "accumulate": (1, math.inf), "workers": (0, 256)}
    limits |= {"save_minutes": (0, math.inf), "validate_every": (1, math.inf), "seed": (0, 2**63 - 1)}
    check_numbers(args, limits)
    if os.path.lexists(args.out) and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is there, and is no folder; choose another")
    if args.validate:
        clips(args)
    for samples, flag in streams.values():
        size, what = getattr(args, flag), f"--{flag.replace('_', '-')} {getattr(args, flag)}"
        if len(samples) < size:
            raise UserError(f"{what}: there are {len(samples)} samples to learn from; give fewer")
        if size % args.parts:
            raise UserError(f"{what}: is no multiple of {args.parts}, processes x --accumulate; change one of them")
    world = rank_world()[1]
    state = read_checkpoint(args, streams) if resumes(args) else {"step": 0, "parts": args.parts}
    if state["parts"] != args.parts:
        what = f"was trained by {state['processes']} processes, not {world}; BatchNorm sees other parts of a batch"
        say(f"note: {args.out / 'last.pth'}: {what} from here on")
    name, _, index = args.device.partition(":")
    if name in ("auto", "cuda") and torch.cuda.is_available():  # on GPU 0 each process would keep some memory
        name, index = "cuda", os.environ.get("LOCAL_RANK", index or "0")
    device = pick_device(f"{name}:{index}" if index else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same
    if world > 1:
        backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        patience = timedelta(days=1)  # the others wait for a validation
        torch.distributed.init_process_group(backend, timeout=patience, device_id=gpu)
        everybody = [None] * world
        found = state["step"], sorted(str(path.relative_to(args.out)) for path in args.out.rglob("*.pth"))
        torch.distributed.all_gather_object(everybody, found)
        if any(other != found for other in everybody):
            raise UserError(f"--out {args.out}: processes find other files there; give a folder that all nodes share")
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))  # PyTorch knows no container's quota
    torch.manual_seed(args.seed)
    return device


def resumes(args: Training) -> bool:
    """Whether train() goes on from OUT/last.pth, which holds all weights."""
    return args.resume and (args.out / "last.pth").is_file()


def read_checkpoint(args: Training, streams: dict[str, tuple[Sequence, str | int]]) -> dict:
    """OUT/last.pth of train(). UserError if it was trained with other flags or another number of samples."""
    path, older = args.out / "last.pth", {"processes": rank_world()[1], "samples": {}}  # which do not say it
    try:
        state = older | torch.load(path, map_location="cpu", weights_only=True)
        state = {key: state[key] for key in ("step", "config", "method", "optimizer", "scaler", *older)}
        state["parts"] = state["processes"] * int(state["config"]["accumulate"])
    except Exception as error:  # of the unpickler: many kinds
        raise UserError(f"{path}: is not a checkpoint of this script, or damaged; delete it or --no-resume") from error
    said, remedy = f"{path}: was trained with", "another --out, or --no-resume to begin again"
    moco = "moco" in (getattr(args, "objective", ""), getattr(args, "image_objective", ""))  # processes swap samples
    free = FREE if moco or state["parts"] != args.parts else FREE | {"accumulate"}  # the same parts, cut otherwise
    for flag, old in state["config"].items():
        now = str(getattr(args, flag, None))
        if now != old and flag not in free and not (flag in MOVED and Path(now).name == Path(old).name):
            why = f"not {now}; give the same," if hasattr(args, flag) else "which is no flag of this script; take"
            raise UserError(f"{said} --{flag.replace('_', '-')} {old}, {why} {remedy}")
    for name, (samples, _) in streams.items():
        if (old := state["samples"].get(name, len(samples))) != len(samples):
            raise UserError(f"{said} {old} samples ({name}), not {len(samples)}; give the same, {remedy}")
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


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """common.writing; where the run has a checkpoint, the line says that it goes on from it."""
    try:
        with common.writing(out):
            yield
    except UserError as error:
        if isinstance(error.__cause__, OSError) and (out / "last.pth").is_file():
            raise UserError(f"{error}; with space, the same command goes on from {out / 'last.pth'}") from error
        raise


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, such as (run, stream, step, place)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Draws(Dataset):
    """A data set asked by (index, seed, step): what is random in a sample depends on its seed alone; what changes while
    training reads samples.step. A sample whose reading is a UserError gives place to another; None in its place after
    100. Beside the sample stands what was wrong with those before it."""

    def __init__(self, samples: Sequence):
        self.samples = samples

    def __getitem__(self, key: tuple[int, int, int]) -> tuple:
        index, seed, self.samples.step = key
        torch.manual_seed(seed)
        skipped = []
        while len(skipped) < 100:
            try:
                return self.samples[index], skipped
            except UserError as error:
                skipped.append(str(error))
                index = int(torch.randint(len(self.samples), ()))
        return None, skipped


def collate(drawn: Sequence[tuple]) -> tuple:
    """Samples of Draws -> their batch, None where one is missing; and all that was wrong."""
    samples, skipped = zip(*drawn, strict=True)
    whole = all(sample is not None for sample in samples)
    return default_collate(samples) if whole else None, list(itertools.chain(*skipped))


def batches(count: int, size: int, seed: tuple[int, ...], start: int) -> Iterator[list[tuple[int, int, int]]]:
    """Endless shuffled batches of (index, seed, step) from step `start` on, full ones only; those of a step are a
    function of (seed, step), and a process takes its slice of them."""
    rank, world = rank_world()
    places = range(rank * size // world, (rank + 1) * size // world)
    steps = count // size  # an epoch
    for epoch in itertools.count(start // steps):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*seed, epoch)))
        for step in range(max(start, epoch * steps), (epoch + 1) * steps):
            first = (step - epoch * steps) * size
            yield [(int(order[first + place]), seed_of(*seed, step, place), step) for place in places]


def quiet_worker(_) -> None:
    """A loader process leaves signals to the main one, which wants its last batches before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)


def each(batch, do: Callable[[Tensor], Tensor]):
    """A batch of nested dicts and lists with `do` applied to its tensors."""
    if isinstance(batch, dict):
        return {key: each(value, do) for key, value in batch.items()}
    return do(batch) if isinstance(batch, Tensor) else [each(value, do) for value in batch]


class Feed:
    """Batches of all streams, from step `step` on. Samples that cannot be read are named once, and kept in
    OUT/unreadable.txt. UserError where there are too many of them."""

    def __init__(self, args: Training, streams: dict[str, tuple[Sequence, int]], step: int, device: torch.device):
        self.streams, self.device, self.file = streams, device, args.out / "unreadable.txt"
        self.lost, self.waited = set(), 0.0  # lines of unreadable.txt; seconds
        self.loaders = []
        for number, (samples, size) in enumerate(streams.values()):
            loader = DataLoader(
                Draws(samples),
                batch_sampler=batches(len(samples), size, (args.seed, number), step),
                collate_fn=collate,
                num_workers=math.ceil(args.workers / len(streams)),
                worker_init_fn=quiet_worker,
                pin_memory=device.type == "cuda",
            )
            self.loaders.append(iter(loader))

    def next(self) -> dict:
        start, batch = time.perf_counter(), {}
        for loader, (name, (samples, _)) in zip(self.loaders, self.streams.items(), strict=True):
            batch[name], skipped = next(loader)
            for line in set(skipped) - self.lost:
                tqdm.write(f"warning: {line}: skipped", file=sys.stderr)
                with self.file.open("a") as file:
                    file.write(f"{line}\n")
            self.lost.update(skipped)
            if batch[name] is None or len(self.lost) > max(10, len(samples) // 10):
                count, example = len(self.lost), min(self.lost)
                raise UserError(f"{count} samples of {name} cannot be read, such as {example}; check --data")
        self.waited += time.perf_counter() - start
        return each(batch, lambda x: x.to(self.device, non_blocking=True))


def clips(args: Training) -> list[str]:
    """The sequences that validate() scores. UserError if they are not there."""
    listing = args.validate / "ImageSets" / "2017" / "val.txt"
    names = [name for name in args.validate_sequences.split(",") if name]
    if not names and listing.is_file():
        names = listing.read_text(errors="replace").split()[:2]
    what = f"--validate {args.validate}"
    if not names:
        raise UserError(f"{what}: has no ImageSets/2017/val.txt with sequences; give the root of DAVIS 2017")
    for folder, name in itertools.product(("JPEGImages", "Annotations"), names):
        if name != Path(name).name or name == "..":
            raise UserError(f"{what}: {name!r} is no name of a sequence; give names without folders")
        if not (args.validate / folder / "480p" / name).is_dir():
            raise UserError(f"{what}: has no {folder}/480p/{name}; give DAVIS 2017 and --validate-sequences of it")
    return names


def validate(args: Training, flags: Sequence[str]) -> dict[str, float]:
    """J&F of label propagation with OUT/weights.pth, by evaluate.py in a process of its own; {} if that fails."""
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        command = [sys.executable, Path(__file__).parent / "evaluate.py", "--data", args.validate, "--out", folder]
        command += ["--weights", args.out / "weights.pth", "--sequences", ",".join(clips(args))]
        command += ["--device", args.device, *flags]
        alone = {name: value for name, value in os.environ.items() if not name.endswith(("RANK", "WORLD_SIZE"))}
        if rank_world()[1] > 1:  # torchrun sets it to 1 unasked, and the other processes wait
            alone.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        if done.returncode:
            why = (done.stderr.splitlines() or ["no message"])[-1]
            tqdm.write(f"warning: validation failed: {why}", file=sys.stderr)
            return {}
        overall = json.loads((Path(folder) / "scores.json").read_text())["overall"]
    return {name: 100 * overall[name] for name in ("J&F_M", "J_M", "F_M")}


def together(values: Sequence[float], how: str) -> list[float]:
    """The "SUM" or "MAX" of each value over all processes; on the CPU, as a GPU would have to finish its work."""
    x = torch.tensor(values, dtype=torch.float64)
    if rank_world()[1] > 1:
        torch.distributed.all_reduce(x, getattr(torch.distributed.ReduceOp, how))
    return x.tolist()


@torch.no_grad()
def share_statistics(method: nn.Module) -> None:
    """BatchNorm's running statistics: in every process the mean over all. They are running means, so it does not matter
    how often this is done."""
    world = rank_world()[1]
    norms = [part for part in method.modules() if isinstance(part, nn.BatchNorm2d) and part.training]
    for norm in norms if world > 1 else ():
        for values in (norm.running_mean, norm.running_var):
            torch.distributed.all_reduce(values)
            values /= world


class Curve:
    """The rows of a CSV, and the same in TensorBoard where there is a board. Rows of later steps than `step`, from a
    run that was cut off, are dropped."""

    def __init__(self, path: Path, step: int, board, prefix: str = ""):
        self.path, self.board, self.prefix = path, board, prefix
        self.columns, self.kept = [], []
        if step and path.is_file():
            self.kept = [row for row in self.read() if None not in row.values() and int(row["step"]) <= step]

    def read(self) -> list[dict]:
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def add(self, step: int, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(self.prefix + name, value, step)
        row = {"step": step, "epoch": epoch} | {name: f"{value:.6g}" for name, value in values.items()}
        if not row.keys() <= set(self.columns):  # the first, or one with new columns
            rows = self.read() if self.columns else self.kept
            self.columns = list(dict.fromkeys(itertools.chain(*rows, row)))
            with atomic(self.path) as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


def report_thread(what) -> None:
    """threading.excepthook without TensorBoard's thread: what it cannot write is raised where it is written next."""
    if not type(what.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(what)


class Log:
    """What is written down of a run: log.csv, validation.csv and TensorBoard's events by rank 0, and a bar. The terms
    of a row are means over the steps since the row before, and over all processes."""

    def __init__(self, out: Path, step: int, total: float, pictures: int):
        self.board, self.pictures = None, pictures  # of one step, over all processes
        if not rank_world()[0]:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = report_thread
            self.board = SummaryWriter(out, purge_step=step)
        self.rows = Curve(out / "log.csv", step, self.board)
        self.scores = Curve(out / "validation.csv", step, self.board, "validation/")
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not self.board, dynamic_ncols=True)
        self.sums, self.steps, self.began = {}, 0, time.perf_counter()  # of the row to come

    def note(self, terms: dict[str, Tensor]) -> None:
        """The terms of one step."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1
        self.bar.update()

    def means(self) -> dict[str, float]:
        """Of the terms since the last row; together() with the other processes."""
        sums = together([float(value) / self.steps for value in self.sums.values()], "SUM")
        return {name: value / rank_world()[1] for name, value in zip(self.sums, sums, strict=True)}

    def row(self, step: int, epoch: int, lr: float, waiting: float, means: dict[str, float]) -> None:
        """waiting: share of the time that this process waited for data."""
        now = time.perf_counter()
        row = {"lr": lr, "images_per_s": self.pictures * self.steps / (now - self.began), "waiting": waiting, **means}
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in {**means, **row}.items()}, refresh=False)
        if self.board:
            self.rows.add(step, epoch, row)
        self.sums, self.steps, self.began = {}, 0, now

    def score(self, step: int, epoch: int, values: dict[str, float]) -> None:
        if values and self.board:
            self.scores.add(step, epoch, values)
            tqdm.write(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.began = time.perf_counter()  # scoring is no part of a row's time

    def picture(self, step: int, picture: np.ndarray, path: Path) -> None:
        with atomic(path) as temporary:
            temporary.write_bytes(cv2.imencode(".jpg", picture[..., ::-1])[1])
        self.board.add_image("picture", picture, step, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):
            if self.board:
                self.board.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The numbers of the signals to stop (SIGTERM, SIGINT) that came; a second SIGINT is a KeyboardInterrupt."""
    came = []

    def note(number: int, _) -> None:
        if came and number == signal.SIGINT:  # asked twice: now
            raise KeyboardInterrupt
        came.append(number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def update(args: Training, parallel: nn.Module, optimizer, scaler, batch: dict, step: int) -> dict[str, Tensor]:
    """One step of the optimiser on a batch, in --accumulate parts. The method's terms, means over the parts."""
    rank, world = rank_world()
    device, means = next(parallel.parameters()).device, {}
    for part in range(args.accumulate):
        torch.manual_seed(seed_of(args.seed, step, rank * args.accumulate + part))
        piece = each(batch, lambda x, part=part: x.chunk(args.accumulate)[part])
        exchange = part == args.accumulate - 1 or world == 1  # gradients, at the last part
        with contextlib.nullcontext() if exchange else parallel.no_sync():
            with torch.autocast(device.type, getattr(torch, args.amp), enabled=args.amp != "float32"):
                terms = parallel(piece, step)
            scaler.scale(terms["loss"] / args.accumulate).backward()
        for name, value in terms.items():
            means[name] = means.get(name, 0) + value.detach().float() / args.accumulate
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return means


def train(
    args: Training,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float],
    epochs: int,
    streams: dict[str, tuple[Sequence, str]],
    net: nn.Module,
    meta: dict,
    validation: Sequence[str] = (),
    score: Callable[[], dict[str, float]] | None = None,
    look: Callable[[], np.ndarray | None] | None = None,
) -> None:
    """Train, on one process or many, so that a run that is cut off and resumed ends with the same weights.

    method(batch, step) gives scalar tensors, the same ones at all steps of an epoch: "loss" is minimised, all are
    logged. streams names data sets and the flags of their batch sizes over all processes, as checked by start_training;
    batch[name] is what their samples collate to, and an epoch is one of the first. Randomness is a function of (seed,
    step, place in the batch), so a checkpoint needs no random states, and processes x accumulated parts see the same
    samples however they are shared out. lr(epoch), epochs from 0. The net's weights and meta are saved as
    OUT/weights.pth; validation are flags of evaluate.py for --validate; score() is run by all processes at the end of
    an epoch; look() is a picture of the step before, H x W x 3 uint8, or None. Raises UserError for a loss that is not
    finite, data that cannot be read and a full disk; the last checkpoint stays.
    """
    rank, world = rank_world()
    device, last = next(method.parameters()).device, args.out / "last.pth"
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out) as file:  # found before any work
            file.write(bytes(1024))
    streams = {name: (samples, getattr(args, flag)) for name, (samples, flag) in streams.items()}
    samples, size = next(iter(streams.values()))
    steps_per_epoch = len(samples) // size
    total = min(epochs * steps_per_epoch, args.max_steps or math.inf)
    scaler, first = torch.amp.GradScaler(device.type, enabled=args.amp == "float16"), 0
    if resumes(args):
        state = read_checkpoint(args, streams)
        try:
            method.load_state_dict(state["method"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
        except Exception as error:  # of torch: several kinds, such as where there are more classes now
            why = str(error).splitlines()[-1].strip()
            raise UserError(f"{last}: does not fit ({why}); another --out, or --no-resume to begin again") from error
        first = state["step"]
    parallel = method
    if world > 1:
        atexit.unregister(torch.distributed.destroy_process_group)  # a process that fails alone would wait in it
        parallel = nn.parallel.DistributedDataParallel(method)
        parallel.broadcast_buffers = False  # the argument's name depends on torch's version
    feed = Feed(args, streams, first, device)
    log = Log(args.out, first, total, sum(size for _, size in streams.values()))
    began = saved = time.perf_counter()
    step, halt = first, 0

    def ends_epoch() -> bool:
        return step % steps_per_epoch == 0

    def validates() -> bool:
        return bool(args.validate) and (step == total or step % (args.validate_every * steps_per_epoch) == 0)

    def save() -> None:
        config = {flag: str(value) for flag, value in vars(args).items()}
        state = {"step": step, "config": config, "processes": world, "scaler": scaler.state_dict()}
        state |= {"samples": {name: len(samples) for name, (samples, _) in streams.items()}}
        state |= {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
        write_checkpoint(last, state)
        about = meta | {"torch": str(torch.__version__), "config": config}
        write_checkpoint(args.out / "weights.pth", {"state_dict": net.state_dict(), "meta": about})

    def judge() -> None:
        """Scores of an epoch that is over, and of the end, unless a run before this one had the time for them."""
        if not (ends_epoch() or step == total) or str(step) in [row["step"] for row in log.scores.kept]:
            return
        values = score() if score and ends_epoch() else {}
        if validates() and not rank:
            values |= validate(args, validation)
        log.score(step, (step - 1) // steps_per_epoch, values)
        method.train()

    method.train()
    try:
        with writing(args.out), stop_signals() as signals:
            if step:
                judge()
            while step < total and not halt:
                epoch = step // steps_per_epoch
                for group in optimizer.param_groups:
                    group["lr"] = lr(epoch)
                log.note(update(args, parallel, optimizer, scaler, feed.next(), step))
                step += 1

                minutes = (time.perf_counter() - saved) / 60
                late = minutes > (min(1, args.save_minutes) if ends_epoch() else args.save_minutes)
                halt, late = map(int, together([max(signals, default=0), late], "MAX"))  # all at the same step
                due = halt or late or validates() or step == total
                if due or ends_epoch():
                    share_statistics(method)
                if due or ends_epoch() or step % 10 == 0 or step <= 10:
                    means = log.means()
                    whole = not due or all(value.isfinite().all() for value in method.parameters())
                    if not (math.isfinite(means["loss"]) and whole):
                        what = f"no numbers by step {step}; {last if last.exists() else 'nothing'} is kept from before"
                        raise UserError(f"loss or weights are {what}; lower the learning rate, or take --amp float32")
                    log.row(step, epoch, lr(epoch), feed.waited / (time.perf_counter() - began), means)
                if due:
                    if not rank:
                        save()
                    saved = time.perf_counter()
                if look and not rank and (picture := look()) is not None:
                    log.picture(step, picture, args.out / "pictures" / f"{step:07}.jpg")
                if not halt:
                    judge()
    finally:
        log.close()
    if world > 1:
        torch.distributed.barrier()  # last.pth is written before anybody leaves or reads it
        atexit.register(torch.distributed.destroy_process_group)
    if halt:
        say(f"stopped at step {step}: {last} is whole; the same command goes on from there")
        sys.exit(128 + halt)
    if not rank:
        took = time.perf_counter() - began
        if step > first:
            print(f"steps {first} to {step} in {took:.0f} s, {feed.waited / took:.0%} of it waiting for data")
        else:
            print(f"{last}: is at step {step} of {total}, nothing is left to do")
        print(args.out / "weights.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Weights to start from, accuracy


def load_start(net: Net, path: Path, arch: str) -> None:
    """Weights of the original stride into the network; what the file lacks beyond layer3 is named and stays random.
    UserError for another architecture."""
    state, own, fresh = read_start(path), net.state_dict(), {}

    def head(entries: dict) -> dict:
        return {key: value.shape for key, value in entries.items() if key.startswith("fc.")}

    if not any(key.startswith("layer4.") for key in state):
        fresh["layer4."] = "layer4"
    if head(state) != head(own):
        fresh["fc."] = "head (fc)"
    state |= {key: value for key, value in own.items() if key.startswith(tuple(fresh))}
    if why := common.fit(net, state):
        raise UserError(f"{path}: is no {arch} with torchvision's names: {why}; give another file, or another --arch")
    if fresh:
        say(f"note: {path}: has no fitting {' and '.join(fresh.values())}; random weights are taken instead")


def system(args: Args) -> str:
    """The system that the weights are of."""
    if args.arch == "resnet50":
        return {"imagenet": "imagenet-r50", "rotation": "torchvision:resnet50", "moco": "moco"}[args.objective]
    name = "moco-r18" if args.objective == "moco" else args.objective
    return f"{name}-finetuned" if args.finetune else name


def held_out_score(args: Args, method: nn.Module, pictures: HeldOut, device: torch.device) -> dict[str, float]:
    """Means of the method's terms over the pictures held out, which the processes share out; how many there were."""
    rank, world = rank_world()
    loader = DataLoader(
        Subset(pictures, range(rank, len(pictures), world)),
        batch_size=max(1, args.batch_size // world // args.accumulate),
        num_workers=min(args.workers, len(pictures) // 64),
        worker_init_fn=quiet_worker,
    )
    names = ("loss", "top1", "top5") if method.net.fc.out_features > 5 else ("loss", "top1")
    sums = np.zeros(len(names) + 1)  # the last counts the pictures
    method.eval()
    for batch in loader:
        readable = batch["label"] >= 0
        if not readable.any():
            continue
        batch = {"pictures": {name: values[readable].to(device) for name, values in batch.items()}}
        mixed = torch.autocast(device.type, getattr(torch, args.amp), enabled=args.amp != "float32")
        with torch.inference_mode(), mixed:
            terms = method(batch, 0)
        sums += int(readable.sum()) * np.array([*(float(terms[name]) for name in names), 1])
    *sums, count = together(sums, "SUM")
    return {name: value / max(count, 1) for name, value in zip(names, sums, strict=True)} | {"pictures": count}


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args = settle(args)
    learned, held, classes = find_pictures(args)
    moco = args.objective == "moco"
    pictures = Pictures(learned, augmentation(args), ("query", "key") if moco else ("image",))
    streams = {"pictures": (pictures, "batch_size")}
    device = start_training(args, streams)
    outputs = {"imagenet": len(classes), "rotation": 4, "moco": args.dim}[args.objective]
    net = Net(args.arch, outputs, frozen=args.finetune is not None, mlp=moco and args.moco_v2)
    if args.finetune and not resumes(args):
        load_start(net, args.finetune, args.arch)
    if moco:
        method = MoCo(net, args.queue, args.dim, args.temperature, args.key_momentum, args.bn_groups // args.parts)
    else:
        method = {"imagenet": Classification, "rotation": Rotation}[args.objective](net)
    method.to(device, memory_format=torch.channels_last)
    what = f"{len(learned)} pictures" + (f" of {len(classes)} classes" if classes else "")
    say(f"{args.objective}: {what}, {len(held)} held out; {args.epochs} epochs, lr {args.lr:g}")
    if moco and args.queue > len(learned):
        say(f"note: --queue {args.queue}: longer than an epoch, a picture meets keys of itself")

    meta = {"arch": args.arch, "task": system(args), "out_layer": "layer3", "input": "rgb", "l2_normalise": True}
    meta["strides"] = {"layer3": 1 if args.finetune else 2, "layer4": 2}
    meta["temperature"] = common.preset(system(args)).temperature
    trained = [value for value in method.parameters() if value.requires_grad]
    train(
        args,
        method,
        torch.optim.SGD(trained, args.lr, momentum=args.momentum, weight_decay=args.weight_decay),
        learning_rate(args),
        args.epochs,
        streams,
        net,
        meta,
        validation=("--model", system(args)),
        score=(lambda: held_out_score(args, method, HeldOut(held, centre(args)), device)) if held else None,
    )


if __name__ == "__main__":
    common.run(main, lambda: common.parse(Args))
