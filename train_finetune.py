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

import contextlib
import copy
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms import v2

import common
from common import PICTURES, Unreadable, UserError, all_gather, pictures_in, rank_world


@dataclass
class Args(common.Training):
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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def settle(args: Args) -> Args:
    """The flags with the paper's values where none were given. UserError for those that make no sense."""
    epochs, lr, decay = PAPER[args.objective, args.finetune is not None]
    moco, world = args.objective == "moco", rank_world()[1]
    parts = world * max(args.accumulate, 1)
    chosen = {
        "epochs": epochs,
        "lr": lr * args.batch_size / 256,
        "decay_epochs": decay,
        "schedule": "cosine" if args.moco_v2 and not args.finetune else "steps",
        "min_area": 0.2 if moco else 0.08,
        "temperature": 0.2 if args.moco_v2 else 0.07,
        "bn_groups": parts * max(math.ceil(8 / parts), 2 if world == 1 else 1) if moco else None,
    }
    args = replace(args, **{name: value for name, value in chosen.items() if getattr(args, name) is None})
    if args.data is None:
        raise UserError("--data: missing; give the folder of pictures to learn from")
    for flag in ("epochs", "batch_size", "crop", "queue", "dim", "lr", "temperature", "min_area"):
        if not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be above 0")
    for flag in ("momentum", "weight_decay", "holdout", "key_momentum", "min_area"):
        if not 0 <= getattr(args, flag) <= 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give 0 to 1")
    if args.crop < 8:
        raise UserError(f"--crop {args.crop}: give 8 or more")
    batch = f"--batch-size {args.batch_size}"
    if args.moco_v2 and not moco:
        raise UserError(f"--moco-v2: is for --objective moco, not {args.objective}; leave it out")
    if moco and args.holdout != Args.holdout:
        raise UserError(f"--holdout {args.holdout}: moco measures no accuracy; leave it out")
    if moco and args.queue % args.batch_size:
        right = max(args.queue // args.batch_size, 1) * args.batch_size
        raise UserError(f"--queue {args.queue}: must be a multiple of {batch}; give {right}")
    if moco and (args.bn_groups < 1 or args.batch_size % args.bn_groups or args.bn_groups % parts):
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


def find_pictures(args: Args) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[str]]:
    """Pictures to learn from and pictures held out, each (path, class number), and the names of the classes."""
    if not args.data.is_dir():
        raise UserError(f"--data {args.data}: no such folder; give one with pictures in it")
    folder, val = (args.data / name for name in ("train", "val"))
    if not folder.is_dir():
        folder = val = args.data
    apart = val.is_dir() and val != folder
    if apart and args.holdout != Args.holdout:
        raise UserError(f"--holdout {args.holdout}: accuracy is measured on {val}; leave it out")

    def folders(folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    classes = [path.name for path in folders(folder)] if args.objective == "imagenet" else []
    if args.objective == "imagenet" and len(classes) < 2:
        what = f"holds {len(classes)} class folders, classification needs 2"
        raise UserError(f"{folder}: {what}; --objective rotation and moco take pictures of any kind")

    def listed(folder: Path) -> list[tuple[str, int]]:
        found = [] if classes else [(path, 0) for path in pictures_in(folder)]
        for path in folders(folder) if classes else []:
            if path.name not in classes:
                raise UserError(f"{path}: is no class of {args.data / 'train'}; remove it, or add it there")
            if not (inside := pictures_in(path)):
                raise UserError(f"{path}: an empty class folder, no pictures in it; fill or remove it")
            found += [(picture, classes.index(path.name)) for picture in inside]
        if not found:
            raise UserError(f"{folder}: holds no pictures ({', '.join(PICTURES[:3])}, ...) at any depth; check --data")
        return found

    pictures = listed(folder)
    if apart:
        return pictures, listed(val) if args.objective != "moco" else [], classes
    train, held, owed = [], [], 0.0
    for _, inside in groupby(pictures, lambda picture: Path(picture[0]).parent):  # a class, the frames of a video, ...
        inside = list(inside)
        owed += len(inside) * (args.holdout if args.objective != "moco" else 0)
        kept, owed = len(inside) - int(owed), owed % 1
        train, held = train + inside[:kept], held + inside[kept:]
    return train, held, classes


class Pictures(Dataset):
    """Samples {"label": class number, and for each of `views` a picture 3 x crop x crop uint8}."""

    def __init__(self, pictures: Sequence[tuple[str, int]], transform: Callable, views: Sequence[str] = ("image",)):
        self.paths = np.array([os.fsencode(path) for path, _ in pictures])  # objects would be copied by every worker
        self.labels = np.array([label for _, label in pictures])
        self.transform, self.views = transform, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        try:
            picture = torch.from_numpy(common.read_picture(os.fsdecode(self.paths[index]))).permute(2, 0, 1)
        except UserError as error:
            raise Unreadable(str(error)) from error
        return {"label": int(self.labels[index]), **{view: self.transform(picture) for view in self.views}}


class HeldOut(Pictures):
    """Pictures where one that cannot be read is black and has class -1."""

    def __getitem__(self, index: int) -> dict:
        try:
            return super().__getitem__(index)
        except Unreadable:
            return {
                "label": -1,
                **{view: self.transform(torch.zeros(3, 9, 9, dtype=torch.uint8)) for view in self.views},
            }


def augmentation(args: Args) -> v2.Transform:
    """What a picture goes through on its way to a crop, uint8 to uint8."""
    steps = [v2.RandomResizedCrop(args.crop, scale=(args.min_area, 1), antialias=True)]
    if args.objective == "moco" and args.moco_v2:
        steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
        steps += [v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5)]
    elif args.objective == "moco":
        steps += [v2.RandomGrayscale(0.2), v2.ColorJitter(0.4, 0.4, 0.4, 0.4)]
    return v2.Compose([*steps, v2.RandomHorizontalFlip()])


def centre(args: Args) -> v2.Transform:
    """The middle of a picture, as it is judged: short side 256 / 224 of the crop."""
    return v2.Compose([v2.Resize(round(args.crop * 256 / 224), antialias=True), v2.CenterCrop(args.crop)])


# ---------------------------------------------------------------------------------------------------------------------
# The network and the three methods


class Net(ResNet):
    """A ResNet with a task's head. frozen: layer3 has stride 1, what is before it is not trained and its BatchNorm
    stays in eval mode, so that neither weights nor statistics change (section 3.3; training goes on as layer3's)."""

    def __init__(self, arch: str, outputs: int, frozen: bool = False, mlp: bool = False):
        super().__init__(*{"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}[arch])
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
        x = v2.functional.normalize(x.float() / 255, MEAN, STD).contiguous(memory_format=torch.channels_last)
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            for part in self.early:
                x = part(x)
        x = self.layer4(self.layer3(x))
        return self.fc(self.avgpool(x).flatten(1)).float()


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Share of samples whose label is the highest logit, and among the five highest where there are more."""
    place = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1  # of the label's logit; a tie is not won
    return {f"top{k}": (place < k).float().mean() for k in (1, 5) if k == 1 or logits.shape[1] > 5}


class Classification(nn.Module):
    """Cross-entropy over the classes."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        logits, labels = self.net(batch["pictures"]["image"]), batch["pictures"]["label"]
        return {"loss": F.cross_entropy(logits, labels), **accuracy(logits, labels)}


def rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture of N x 3 x S x S turned by 0, 90, 180 and 270 degrees counter-clockwise, 4N x 3 x S x S, the four of
    a picture side by side; and 0, 1, 2, 3 for each, 4N."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], 1)  # N 4 3 S S
    return turned.flatten(0, 1), torch.arange(4, device=images.device).repeat(len(images))


class Rotation(nn.Module):
    """Which way is up (RotNet, Gidaris et al. 2018). All four turns are in every part of a batch: BatchNorm's
    statistics would tell the turn of one by itself."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        images, labels = rotations(batch["pictures"]["image"])
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), **accuracy(logits, labels)}


def contrast(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Logits of each query (N x D) with its own key (N x D), then with the queue (D x K): N x (1 + K)."""
    return torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / temperature


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

    @torch.no_grad()
    def follow(self) -> None:
        """Key encoder <- m key encoder + (1 - m) query encoder: parameters alone, statistics are its own."""
        for own, other in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            if other.requires_grad:
                own.lerp_(other, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, images: Tensor, step: int) -> Tensor:
        """Keys of the images of all processes, in their order."""
        rank, everybody = rank_world()[0], all_gather(images)
        generator = torch.Generator(images.device).manual_seed(step)
        order = torch.randperm(len(everybody), generator=generator, device=images.device)
        own = order[rank * len(images) : (rank + 1) * len(images)]
        shuffled = all_gather(self.embed(self.encoder_k, everybody[own]))
        return torch.empty_like(shuffled).index_copy_(0, order, shuffled)

    def forward(self, batch: dict, step: int) -> dict[str, Tensor]:
        query, key = batch["pictures"]["query"], batch["pictures"]["key"]
        q = self.embed(self.encoder_q, query)
        if step != self.step:
            self.follow()
            self.step, self.negatives = step, self.queue.clone()
        keys = self.keys(key, step)
        place = rank_world()[0] * len(q)
        with torch.autocast(q.device.type, enabled=False):
            logits = contrast(q, keys[place : place + len(q)], self.negatives, self.temperature)
            labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
            terms = {"loss": F.cross_entropy(logits, labels), **accuracy(logits, labels)}
        places = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.queue.shape[1]
        self.queue[:, places] = keys.T
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % self.queue.shape[1])
        return terms


# ---------------------------------------------------------------------------------------------------------------------
# Weights to start from, weights to save, accuracy


def load_start(net: Net, path: Path, arch: str) -> None:
    """Weights of the original stride into the network; what the file lacks beyond layer3 is named and stays random.
    UserError for another architecture."""
    state, own = common.read_start(path), net.state_dict()

    def head(entries: dict) -> dict:
        return {key: value.shape for key, value in entries.items() if key.startswith("fc.")}

    fresh = [] if any(key.startswith("layer4.") for key in state) else ["layer4"]
    fresh += [] if head(state) == head(own) else ["fc"]
    state = {key: value for key, value in state.items() if key.split(".")[0] not in fresh}
    if why := common.fit(net, state | {key: value for key, value in own.items() if key.split(".")[0] in fresh}):
        raise UserError(f"{path}: is no {arch} with torchvision's names: {why}; give another file, or another --arch")
    if fresh and not rank_world()[0]:
        names = " and ".join({"layer4": "layer4", "fc": "head (fc)"}[name] for name in fresh)
        print(f"note: {path}: has no fitting {names}; random weights are taken instead", file=sys.stderr)


def system(args: Args) -> str:
    """The row of common.MODELS that the weights are of."""
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
        worker_init_fn=common.quiet_worker,
    )
    sums = torch.zeros(4, device=device)  # loss, top1, top5, pictures
    method.eval()
    for batch in loader:
        readable = batch["label"] >= 0
        batch = {"pictures": {name: values[readable].to(device) for name, values in batch.items()}}
        mixed = torch.autocast(device.type, getattr(torch, args.amp), enabled=args.amp != "float32")
        with torch.inference_mode(), mixed:
            terms = method(batch, 0) if readable.any() else {}
        means = [float(terms.get(name, 0)) for name in ("loss", "top1", "top5")]
        sums += torch.tensor([*means, 1.0], device=device) * readable.sum().to(device)
    if world > 1:
        torch.distributed.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    means = {"loss": loss, "top1": top1} | ({"top5": top5} if method.net.fc.out_features > 5 else {})
    return {name: value / max(count, 1) for name, value in means.items()} | {"pictures": count}


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args = settle(args)
    learned, held, classes = find_pictures(args)
    moco = args.objective == "moco"
    pictures = Pictures(learned, augmentation(args), ("query", "key") if moco else ("image",))
    streams = {"pictures": (pictures, "batch_size")}
    device = common.start_training(args, streams)
    outputs = {"imagenet": len(classes), "rotation": 4, "moco": args.dim}[args.objective]
    net = Net(args.arch, outputs, frozen=args.finetune is not None, mlp=moco and args.moco_v2)
    if args.finetune and not common.resumes(args):
        load_start(net, args.finetune, args.arch)
    if moco:
        groups = args.bn_groups // (rank_world()[1] * args.accumulate)
        method = MoCo(net, args.queue, args.dim, args.temperature, args.key_momentum, groups)
    else:
        method = {"imagenet": Classification, "rotation": Rotation}[args.objective](net)
    method.to(device, memory_format=torch.channels_last)
    if not rank_world()[0]:
        what = f"{len(learned)} pictures" + (f" of {len(classes)} classes" if classes else "")
        print(f"{args.objective}: {what}, {len(held)} held out; {args.epochs} epochs, lr {args.lr:g}", file=sys.stderr)
        if moco and args.queue > len(learned):
            print(f"note: --queue {args.queue}: longer than an epoch, a picture meets keys of itself", file=sys.stderr)

    def weights() -> dict:
        meta = {"arch": args.arch, "task": system(args), "out_layer": "layer3", "input": "rgb", "l2_normalise": True}
        meta["strides"] = {"layer3": 1 if args.finetune else 2, "layer4": 2}
        meta["temperature"] = common.preset(system(args)).temperature
        meta |= {"torch": str(torch.__version__), "config": {flag: str(value) for flag, value in vars(args).items()}}
        return {"state_dict": net.state_dict(), "meta": meta}

    trained, kept = [value for value in method.parameters() if value.requires_grad], HeldOut(held, centre(args))
    common.train(
        args,
        method,
        torch.optim.SGD(trained, args.lr, momentum=args.momentum, weight_decay=args.weight_decay),
        learning_rate(args),
        args.epochs,
        len(pictures) // args.batch_size,
        streams,
        weights,
        validation=("--model", system(args)),
        score=(lambda: held_out_score(args, method, kept, device)) if held else None,
    )


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args))
