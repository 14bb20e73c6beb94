"""MAST: Lai, Lu and Xie, "MAST: A Memory-Augmented Self-supervised Tracker" (CVPR 2020).

Code: github.com/zlai0/MAST, no licence stated. File: checkpoint_epoch_N.pt, a link to Google Drive.
Names in it: feature_extraction.layer1.0.left.0 and so on (left.0, 1, 3, 4 are conv1, bn1, conv2, bn2; shortcut is
downsample), and post_convolution.
Network: a ResNet-18 of stride 4 (no max-pool) whose layer4 is as wide as layer3, then a convolution to 64 channels. It
sees Lab in -1..1.
Settings: benchmark.py. The context is frames 0 and 5 and every second one of the last five; one softmax is over the
windows of 25 x 25 cells of all of them; hard masks are carried. In frames more than 15 back a coarse search places the
window (`predicted`). It has no program for VIP and JHMDB.

On purpose not as theirs: their labels are every fourth pixel of the mask, which moves them by 3/8 of a cell in each
frame; the labels of all far frames are read where the window of the last far frame lies; a seventh object stops the
program. None of these is done here. With labels carried as theirs 99.9 % of the pixels agree; without, 96.1-99.9 %
(benchmarks/systems.md).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common import Propagation, System, cuts, find_system

XYZ = (  # linear sRGB -> X, Y, Z of D65, each over its white
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)


class Lab(nn.Module):
    """RGB B x 3 x H x W in 0..1 -> float Lab as (L / 50 - 1, a / 127, b / 127). OpenCV's own, interpolated, is within
    0.2 in L and 0.5 in a, b of it."""

    def forward(self, x: Tensor) -> Tensor:
        light = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        X, Y, Z = torch.einsum("dc,bchw->dbhw", light.new_tensor(XYZ), light).unbind()
        fx, fy, fz = (torch.where(v > 0.008856, v.clamp_min(1e-9) ** (1 / 3), 7.787 * v + 16 / 116) for v in (X, Y, Z))
        return torch.stack([(116 * fy - 66) / 50, 500 / 127 * (fx - fy), 200 / 127 * (fy - fz)], 1)


def build(system: System, settings: Propagation) -> nn.Module | None:
    """The ResNet-18 with the slim layer4."""
    net = torchvision.models.resnet18()
    net.layer4 = nn.Sequential(*(torchvision.models.resnet.BasicBlock(256, 256) for _ in range(2)))
    return find_system("torchvision:resnet18").build(system, settings, net)


# ---------------------------------------------------------------------------------------------------------------------
# window and predicted: square windows of each context frame


def propagate_windows(
    target: Tensor,
    features: Tensor,
    labels: Tensor,
    s: Propagation,
    annotated: int,
    ages: Sequence[int],
    notes: None = None,
    share: Callable = map,
) -> Tensor:
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


SYSTEMS = {
    "mast": System(
        "resnet18",
        "MAST, grid 2x",
        Propagation(
            layer="res4",
            stride=4,
            l2=False,
            sampling="nearest",
            temperature=1.0,
            carry="hard",
            localization="predicted",
            topk=5 * 25**2,
            context=5,
            memory="spaced",
        ),
        vip={"size": "560x560"},
        jhmdb={"size": "240x240"},
        paper=65.5,
        colours=Lab,
        normalise=False,
        build=build,
        head=lambda: {"post_convolution": nn.Conv2d(256, 64, 3, padding=1)},
        keys=(
            (r"^feature_extraction\.", ""),
            (r"^conv1\.0\.", "conv1."),
            (r"^conv1\.1\.", "bn1."),
            (r"\.left\.0\.", ".conv1."),
            (r"\.left\.1\.", ".bn1."),
            (r"\.left\.3\.", ".conv2."),
            (r"\.left\.4\.", ".bn2."),
            (r"\.shortcut\.", ".downsample."),
        ),
        mark=r"^feature_extraction\.conv1\.0\.weight",
        source="https://drive.google.com/file/d/1vjiBdom75QzwCF5jnMRsxz897XyotVO8",
        localize=propagate_windows,
    ),
}
