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
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
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
    import torchvision

    net = torchvision.models.resnet18()
    net.layer4 = nn.Sequential(*(torchvision.models.resnet.BasicBlock(256, 256) for _ in range(2)))
    return find_system("torchvision:resnet18").build(system, settings, net)


# ---------------------------------------------------------------------------------------------------------------------
# window and predicted: a square window of each context frame


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

    window (CorrFlow): about the target cell, without what lies beyond the frame. predicted (MAST): in frames more than
    15 back about the place where a coarse search expects the target cell, read bilinearly; beyond the frame features
    and labels are 0, and such cells take part.
    """
    n, _, h, w = features.shape
    R, S = s.radius, 2 * s.radius + 1
    query = (target / s.temperature).permute(1, 2, 0)  # h w C
    keys, values = features.permute(0, 2, 3, 1), labels.permute(0, 2, 3, 1).float()  # n h w C, n h w L
    near_keys, near_values = (F.pad(x, (0, 0, R, R, R, R)) for x in (keys, values))
    predicted = s.localization == "predicted"
    far = {i: expected(query, keys[i], R, age) for i, age in enumerate(ages) if predicted and age > 15}
    inside = F.pad(torch.ones(h, w, device=target.device), (R, R, R, R)).unfold(0, S, 1).unfold(1, S, 1)  # h w S S

    def label_rows(rows: tuple[int, int]) -> Tensor:
        a, b = rows
        q, around = query[a:b], slice(a, b + 2 * R)
        places = {i: corners(place[a:b].flatten(0, 1), R, (h, w)) for i, place in far.items()}
        A = [read_far(q, keys[i], places[i]) if i in far else read_near(q, near_keys[i, around], R) for i in range(n)]
        A = torch.stack(A, 2)  # rows w n S S
        if not predicted:
            A.masked_fill_(inside[a:b, :, None] == 0, -math.inf)
        weight = weigh(A.flatten(3), s).view(A.shape)
        z = torch.zeros(b - a, w, values.shape[3], device=weight.device)
        for i in range(n):
            if i in far:
                z += copy_far(weight[:, :, i], values[i], places[i])
            else:
                z += copy_near(weight[:, :, i], near_values[i, around], R)
        return z

    most = 2**21 if target.is_cpu else 2**26  # affinities at a time; a GPU likes few and large operators
    bands = cuts(h, max(1, most // (w * n * S * S)))
    return torch.cat(list(share(label_rows, bands))).permute(2, 0, 1)


def weigh(A: Tensor, s: Propagation) -> Tensor:
    """The weights of the soft copy: affinities (... n x cells) after top-k and softmax, over all frames or each."""
    shape = A.shape
    if s.aggregation == "overall":
        A = A.flatten(2)
    if s.topk < A.shape[-1]:
        best, entry = A.topk(s.topk, dim=-1, sorted=False)
        total = (A if s.softmax_over == "region" else best).logsumexp(-1, keepdim=True)
        A = torch.zeros_like(A).scatter_(-1, entry, (best - total).exp())
    else:
        A = A.softmax(-1)
    return A.view(shape) / (1 if s.aggregation == "overall" else shape[2])


def read_near(query: Tensor, keys: Tensor, R: int) -> Tensor:
    """Dot products of each query (rows x w x C) with the S x S cells, S = 2R + 1, about it in `keys`, which have R
    cells more on each side: rows x w x S x S."""
    if not query.is_cpu:
        return read_blocks(query, keys, R)
    rows, w, _ = query.shape
    A = torch.empty(rows, w, 2 * R + 1, 2 * R + 1)
    for (a, b), (c, d) in itertools.product(cuts(rows, BLOCK), cuts(w, BLOCK)):
        around = keys[a : b + 2 * R, c : d + 2 * R].flatten(0, 1)
        A[a:b, c:d] = squares((query[a:b, c:d].flatten(0, 1) @ around.T).float(), b - a, d - c, R)
    return A


def copy_near(weight: Tensor, values: Tensor, R: int) -> Tensor:
    """Sums of the values about each query by its weights (rows x w x S x S): rows x w x L."""
    if not weight.is_cpu:
        return copy_blocks(weight, values, R)
    rows, w = weight.shape[:2]
    z = torch.empty(rows, w, values.shape[2])
    for (a, b), (c, d) in itertools.product(cuts(rows, BLOCK), cuts(w, BLOCK)):
        around = values[a : b + 2 * R, c : d + 2 * R].flatten(0, 1)
        whole = torch.zeros((b - a) * (d - c), len(around))
        squares(whole, b - a, d - c, R).copy_(weight[a:b, c:d])
        z[a:b, c:d] = (whole @ around).view(b - a, d - c, -1)
    return z


BLOCK = 12  # cells: what a block of 12 x 12 queries needs stays in a CPU's cache; a GPU takes all blocks at a time


def read_blocks(query: Tensor, keys: Tensor, R: int) -> Tensor:
    """What read_near does, all blocks in one product."""
    A = (blocks(query, 0) @ blocks(keys, R).mT).float()  # down across q cells
    return joined(squares(A, BLOCK, BLOCK, R), query)


def copy_blocks(weight: Tensor, values: Tensor, R: int) -> Tensor:
    """What copy_near does, all blocks in one product."""
    own, around = blocks(weight.flatten(2), 0), blocks(values, R)  # down across q S^2, down across cells L
    whole = torch.zeros(*own.shape[:3], around.shape[2], device=weight.device)
    part = squares(whole, BLOCK, BLOCK, R)
    part.copy_(own.view(part.shape))
    return joined((whole @ around).unflatten(2, (BLOCK, BLOCK)), weight)


def blocks(x: Tensor, R: int) -> Tensor:
    """The cells of x (rows x columns x C) about each BLOCK x BLOCK queries: down x across x cells x C. x has R cells
    more on each side than there are queries; it is filled up with zeros to whole blocks."""
    rows, columns, side = x.shape[0] - 2 * R, x.shape[1] - 2 * R, BLOCK + 2 * R
    x = F.pad(x, (0, 0, 0, -columns % BLOCK, 0, -rows % BLOCK))
    return x.unfold(0, side, BLOCK).unfold(1, side, BLOCK).permute(0, 1, 3, 4, 2).flatten(2, 3)


def joined(x: Tensor, like: Tensor) -> Tensor:
    """Results of blocks of queries, down x across x BLOCK x BLOCK x ..., as rows x columns x ... of `like`."""
    return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)[: like.shape[0], : like.shape[1]]


def squares(A: Tensor, rows: int, columns: int, R: int) -> Tensor:
    """Of the pairs of rows x columns queries and the (rows + 2R) x (columns + 2R) cells about them (A: queries x cells)
    those within R of each other: a view, rows x columns x S x S. One query on, the square begins one cell on. A may be
    of several blocks (blocks ... x queries x cells), contiguous."""
    width, cells, S = columns + 2 * R, A.shape[-1], 2 * R + 1
    strides = (columns * cells + width, cells + 1, width, 1)
    return A.as_strided((*A.shape[:-2], rows, columns, S, S), (*A.stride()[:-2], *strides))


def expected(query: Tensor, keys: Tensor, R: int, age: int) -> Tensor:
    """Where a frame `age` back shows each target cell: h x w x (y, x), the mean over the cells D apart within R steps,
    weighted by the softmax of their affinities; D = 2, 3 or 4 by the age."""
    h, w, _ = query.shape
    y, x = torch.arange(h, device=query.device), torch.arange(w, device=query.device)
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).float()
    D, d = min(4, age // 15 + 1), torch.arange(-R, R + 1.0, device=query.device)
    for i, j in itertools.product(range(min(D, h)), range(min(D, w))):  # cells D apart are a frame of their own
        A = read_near(query[i::D, j::D], F.pad(keys[i::D, j::D], (0, 0, R, R, R, R)), R)
        P = A.flatten(2).softmax(-1).view(A.shape)
        place[i::D, j::D] += D * torch.stack([P.sum(3) @ d, P.sum(2) @ d], -1)
    return place


def corners(centre: Tensor, R: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a bilinear reading of the S x S cells about `centre` (q x (y, x)) reads: numbers of cells, and their parts,
    both 4 x q x S^2; the part of a cell beyond the grid is 0."""
    (h, w), d = grid, torch.arange(-R, R + 1, device=centre.device)
    base = centre.floor()
    (y, x), (part_y, part_x) = base.long().T, (centre - base).T
    cells, parts = [], []
    for dy, dx in itertools.product((0, 1), (0, 1)):
        rows, columns = y[:, None, None] + dy + d[:, None], x[:, None, None] + dx + d  # q S 1, q 1 S
        inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
        part = (part_y if dy else 1 - part_y) * (part_x if dx else 1 - part_x)
        cells.append((rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)).flatten(1))
        parts.append((part[:, None, None] * inside).flatten(1))
    return torch.stack(cells), torch.stack(parts)


def read_far(query: Tensor, keys: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Dot products of each query (rows x w x C) with its window of keys (h x w x C), read bilinearly:
    rows x w x S x S."""
    rows, w, _ = query.shape
    S = math.isqrt(places[0].shape[2])
    A = torch.empty(rows * w, places[0].shape[2], device=query.device)
    most = 256 if query.is_cpu else max(1, 2**26 // len(keys.flatten(0, 1)))  # queries at a time
    for a, b in cuts(rows * w, most):
        cell, part = (x[:, a:b] for x in places)
        first, end = (cell.min(), cell.max() + 1) if query.is_cpu else (0, None)  # not known on a GPU without waiting
        whole = (query.flatten(0, 1)[a:b] @ keys.flatten(0, 1)[first:end].T).float()
        A[a:b] = sum(whole.gather(1, c - first) * p for c, p in zip(cell, part, strict=True))
    return A.view(rows, w, S, S)


def copy_far(weight: Tensor, values: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Sums of the values read as in read_far, by the weights (rows x w x S x S): rows x w x L."""
    rows, w = weight.shape[:2]
    weight = weight.flatten(2).flatten(0, 1)  # targets S^2
    copied = [
        F.embedding_bag(cell, values.flatten(0, 1), per_sample_weights=weight * part, mode="sum")
        for cell, part in zip(*places, strict=True)
    ]
    return sum(copied).view(rows, w, -1)


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
