"""UVC: Li et al., "Joint-task Self-supervised Learning for Temporal Correspondence" (NeurIPS 2019); and UVC+, section 5
of the paper: UVC with an image loss beside.

Code: github.com/Liusifei/UVC, MIT. File: weights/checkpoint_latest.pth.tar there. UVC+ is not released:
train_uvc_plus.py trains it.
Names in it: gray_encoder. before torchvision's. The rgb_encoder and the decoder of its training are not used.
Network: a ResNet-18 up to layer4 (res4 here), layer3 and layer4 at stride 1. Features are not normalised.
Input: grey. OpenCV's 8-bit L of the resized frame, over 256, in three channels, then ImageNet's mean and deviation.
Settings: test_with_track.py on DAVIS; each object is followed by a box (`propagate_boxes`). On VIP those of
test_mask_vip.py, on JHMDB those of the branch jhmdb, both without boxes.

Their script runs as of commit c448a26 only: later versions of its helpers do not fit it. `propagate_boxes` follows that
one.
On purpose not as theirs: they take the arg-max at the network's input size, and bring it to full size by nearest
neighbour; here labels go bilinearly to full size first, so that borders are finer. A first box of fewer than k cells,
and an object that is not in the first frame, stop their program and not this one. Before that last step, and with the
first boxes from the mask, the masks are theirs, pixel by pixel (benchmarks/systems.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Propagation, System, cuts, products, stretch


class Lightness(nn.Module):
    """RGB B x 3 x H x W in 0..1 -> OpenCV's 8-bit L, exactly, / 256, in three channels.

    Integer arithmetic as in OpenCV: sRGB -> 8 x linear light -> luminance Y in 1 / 8 -> cube root -> 8-bit L.
    """

    def __init__(self):
        super().__init__()
        level = np.arange(256) / 255
        linear = np.rint(2040 * np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4))
        Y = np.arange(2041) / 2040
        root = np.rint(2**15 * np.where(Y < 0.008856, 7.787 * Y + 16 / 116, np.cbrt(Y)))
        lightness = (296 * root - (16 * 255 * 2**15 + 50) // 100 + 2**14) // 2**15
        self.register_buffer("linear", torch.from_numpy(linear).int(), persistent=False)
        self.register_buffer("lightness", torch.from_numpy(lightness).int(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        r, g, b = self.linear[(x * 255).round().long()].unbind(1)
        Y = torch.div(871 * r + 2929 * g + 296 * b + 2048, 4096, rounding_mode="floor")
        return (self.lightness[Y.long()] / 256)[:, None].expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# track: a box for each object limits where its label comes from and goes to


def propagate_boxes(
    target: Tensor,
    features: Tensor,
    labels: Tensor,
    s: Propagation,
    annotated: int,
    ages: Sequence[int],
    boxes: Sequence[np.ndarray] | None = None,
    share: Callable = map,
) -> Tensor:
    """propagate_labels where an object's label comes from its box in the context frame and goes to its box in the
    target frame (UVC's track, as released: github.com/Liusifei/UVC at c448a26). A context frame in which, or from
    which, any object is lost is used without boxes.

    boxes: of each context frame, by label_boxes (default: found in the labels). share(task, items) runs the tasks, side
    by side where it can.
    """
    boxes = np.stack([label_boxes(each, s) for each in labels] if boxes is None else boxes)
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

    faint = (values.sum(2) < 3).tolist()  # read back once; a GPU is waited for each time
    lost = [
        i >= annotated and any(faint[i][l] or small(boxes[i, l]) or small(goal[l]) for l in range(L)) for i in range(n)
    ]

    def fill(cells: tuple[int, int]) -> None:
        a, b = cells
        y, x = np.divmod(np.arange(a, b), w)
        goes = [(x >= left) & (x < right) & (y >= top) & (y < bottom) for left, right, top, bottom in goal]
        goes = [torch.from_numpy(np.flatnonzero(into)).to(target.device) for into in goes]  # to each goal, from a on
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
                (left, right, top, bottom), into = boxes[i, l].astype(int), goes[l]
                near = A.view(h, w, -1)[top:bottom, left:right]
                near = (near if len(into) == b - a else near[..., into]).flatten(0, 1)
                best, cell = near.topk(min(s.topk, len(near)), dim=0)
                copied = values[i, l].view(h, w)[top:bottom, left:right].flatten()[cell]
                z[l, a + into] += (copied * (best - total[into]).exp()).sum(0)

    # A GPU likes few and large operators: affinities of 256 MiB.
    list(share(fill, cuts(h * w, 192 if target.is_cpu else max(1, 2**26 // (h * w)))))
    return z.view(L, h, w) / n


def label_boxes(
    labels: Tensor, s: Propagation, before: np.ndarray | None = None, mask: Tensor | None = None
) -> np.ndarray:
    """The box of each label of a frame (labels L x h x w), L x (left, right, top, bottom) in cells: of an annotated
    frame, or after a frame whose boxes are `before`. nan: there is none, now or before.

    mask: the number of each pixel's label, H x W, of an annotated frame: the box is then that of the mask at the
    network's input size, as released; without it, of the labels enlarged to that size.
    """
    (L, h, w), p = labels.shape, s.stride
    if mask is not None:
        hard = F.interpolate(mask[None, None].float(), size=(h * p, w * p), mode="nearest-exact")[0, 0]
    else:
        labels = labels if before is None else stretch(labels)
        hard = F.interpolate(labels[None].float(), scale_factor=p, mode="bilinear")[0]
        hard = hard.max(0).indices  # argmax(0) takes ten times as long
    hard = hard.cpu().numpy()
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


SYSTEMS = {
    "uvc": System(
        "resnet18",
        "joint-task learning",
        Propagation(
            size="480/64",
            layer="res4",
            l2=False,
            sampling="nearest",
            aggregation="per-frame",
            temperature=1.0,
            topk=5,
            context=7,
            localization="track",
            minmax=True,
        ),
        vip={"size": "560x560", "context": 1, "localization": "none"},
        jhmdb={
            "size": "320x320",
            "topk": 20,
            "context": 7,
            "localization": "none",
            "pad": True,
            "carry": "minmax",
            "minmax": False,
        },
        paper=59.5,
        colours=Lightness,
        keys=((r"^gray_encoder\.", ""),),
        mark=r"^(module\.)?gray_encoder\.conv1\.weight",
        source="https://github.com/Liusifei/UVC (weights/checkpoint_latest.pth.tar)",
        licence="MIT",
        localize=propagate_boxes,
        note=label_boxes,
    ),
}
SYSTEMS["uvc+"] = replace(
    SYSTEMS["uvc"],
    about="UVC and an image loss",
    settings=replace(SYSTEMS["uvc"].settings, context=10),
    paper=66.0,
    mark="",
    source="train_uvc_plus.py makes them",
    licence="your own",
)
