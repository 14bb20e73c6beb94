"""The variants of Algorithm 1 that belong to systems: each equals a dense, literal reference to 1e-5.

The references follow the paper's section 2 and the released codes: CorrFlow's window, MAST's memory and predicted
windows, UVC's boxes.
"""

import importlib
import math
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import propagate
from common import Propagation, UserError, load_encoder
from propagate import labels_from_mask, needs_history, propagate_labels, propagate_video

DATA = Path(os.environ.get("SOFTCOPY_DATA", Path(__file__).parents[2] / "shared"))


def frames(n, C, h, w, seed=0, ties=False):
    """Features of n frames, each the one before moved by a cell and disturbed: n x C x h x w. ties: few values."""
    generator = torch.Generator().manual_seed(seed)
    f = [torch.randn(C, h, w, generator=generator)]
    for t in range(1, n):
        f.append(f[-1].roll((t % 2, 1), (1, 2)) + 0.3 * torch.randn(C, h, w, generator=generator))
    f = F.normalize(torch.stack(f), dim=1)
    return (f * 4).round() / 4 if ties else f


def one_hot(L, h, w, seed=0):
    """L labels in stripes, the last in one block: L x h x w."""
    ids = torch.zeros(h, w, dtype=torch.long)
    for l in range(1, L):
        ids[h * (l - 1) // L + 1 : h * l // L + 2, w // 4 : 3 * w // 4] = l
    return F.one_hot(ids, L).permute(2, 0, 1).float()


def soft(n, L, h, w, seed=0):
    return torch.rand(n, L, h, w, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def bilinear(f, y, x):
    """f (C x h x w) at a place between cells, 0 outside."""
    value = torch.zeros(f.shape[0])
    for i, j in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= i < f.shape[1] and 0 <= j < f.shape[2]:
            value = value + (1 - abs(y - i)) * (1 - abs(x - j)) * f[:, i, j]
    return value


def windows(g, Fs, Y, s, ages):
    """CorrFlow's and MAST's search, cell by cell (models.md 3.5, 3.6)."""
    _, h, w = g.shape
    d = range(-s.radius, s.radius + 1)
    z = torch.zeros(Y.shape[1], h, w)
    for y, x in product(range(h), range(w)):
        groups = []
        for f, labels, age in zip(Fs, Y, ages, strict=True):
            oy = ox = 0.0
            if s.localization == "predicted" and age > 15:
                D = 2 if age < 30 else 3 if age < 45 else 4
                logits = torch.tensor([float(bilinear(f, y + D * i, x + D * j) @ g[:, y, x]) for i in d for j in d])
                P = (logits / s.temperature).softmax(0)
                oy = float(sum(p * D * i for p, (i, _) in zip(P, product(d, d), strict=True)))
                ox = float(sum(p * D * j for p, (_, j) in zip(P, product(d, d), strict=True)))
            entries = []
            for i, j in product(d, d):
                if s.localization == "window" and not (0 <= y + i < h and 0 <= x + j < w):
                    continue
                a = bilinear(f, y + oy + i, x + ox + j) @ g[:, y, x] / s.temperature
                entries.append((float(a), bilinear(labels, y + oy + i, x + ox + j)))
            groups.append(entries)
        if s.aggregation == "overall":
            groups = [[entry for entries in groups for entry in entries]]
        for entries in groups:
            a = torch.tensor([a for a, _ in entries], dtype=torch.float64)
            kept = a.topk(min(s.topk, len(a))).indices
            total = (a if s.softmax_over == "region" else a[kept]).logsumexp(0)
            for i in kept:
                z[:, y, x] += (a[i] - total).exp().float() * entries[i][1] / len(groups)
    return z


@pytest.mark.parametrize("localization", ["window", "predicted"])
@pytest.mark.parametrize("aggregation", ["overall", "per-frame"])
@pytest.mark.parametrize(("softmax", "topk"), [("auto", 3), ("auto", 10_000), ("topk", 4)])
@pytest.mark.parametrize(("h", "w", "radius", "L"), [(7, 9, 2, 3), (5, 4, 3, 1), (1, 11, 1, 2)])
def test_windows_equal_the_literal_search(localization, aggregation, softmax, topk, h, w, radius, L):
    """Odd sizes, windows cut by the border, one and many labels, k below and beyond the window."""
    s = Propagation(
        localization=localization, aggregation=aggregation, softmax=softmax, topk=topk, radius=radius, temperature=0.2
    )
    f, ages = frames(5, 6, h, w), [50, 33, 17, 1]
    z = propagate_labels(f[4], f[:4], soft(4, L, h, w), s, ages=ages)
    assert (z - windows(f[4], f[:4], soft(4, L, h, w), s, ages)).abs().max() < 1e-5


@pytest.mark.parametrize(("rows", "columns", "R"), [(7, 13, 3), (24, 12, 12), (1, 30, 1), (25, 37, 6)])
def test_all_blocks_at_a_time_as_on_a_gpu_give_what_one_after_another_gives(rows, columns, R):
    torch.manual_seed(0)
    mast = importlib.import_module("systems.mast")
    padded = rows + 2 * R, columns + 2 * R
    query, keys, values = torch.randn(rows, columns, 5), torch.randn(*padded, 5), torch.randn(*padded, 3)
    A = mast.read_near(query, keys, R)
    torch.testing.assert_close(mast.read_blocks(query, keys, R), A)
    torch.testing.assert_close(A[-1, -1, 0, 2 * R], query[-1, -1] @ keys[rows - 1, columns - 1 + 2 * R])
    weight = A.flatten(2).softmax(2).view(A.shape)
    torch.testing.assert_close(mast.copy_blocks(weight, values, R), mast.copy_near(weight, values, R))


def test_windows_are_cut_into_blocks_without_a_seam(monkeypatch):
    """Far frames gathered in several goes, rows in several blocks."""
    import propagate

    s = Propagation(localization="predicted", topk=10_000, radius=2, temperature=0.2)
    f, y = frames(4, 6, 20, 30), soft(3, 2, 20, 30)
    whole = propagate_labels(f[3], f[:3], y, s, ages=[40, 2, 1])
    cuts = propagate.cuts
    monkeypatch.setattr(propagate, "cuts", lambda length, step: cuts(length, 3))
    assert (propagate_labels(f[3], f[:3], y, s, ages=[40, 2, 1]) - whole).abs().max() < 1e-5


def test_windows_with_ties_keep_k():
    """With equal features all cells tie: k labels are copied, whichever they are, and their weights are 1 in sum."""
    ones = torch.ones(2, 4, 6, 7)
    s = Propagation(localization="window", aggregation="overall", softmax="topk", topk=5, radius=2)
    assert (propagate_labels(ones[0], ones, torch.ones(2, 3, 6, 7), s) - 1).abs().max() < 1e-5
    s = replace(s, topk=10_000)
    y = soft(2, 3, 6, 7)
    mean = F.avg_pool2d(F.pad(y, (2, 2, 2, 2)), 5, 1) / F.avg_pool2d(F.pad(torch.ones(1, 1, 6, 7), (2, 2, 2, 2)), 5, 1)
    assert (propagate_labels(ones[0], ones, y, s) - mean.mean(0)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Boxes (models.md 3.4, steps 1 to 10)


class Track:
    """UVC's track for a whole video, step by step, boxes in plain numbers."""

    def __init__(self, s, first, labels):
        self.s, self.frames = s, []
        self.add(first, labels, None)

    @staticmethod
    def box(l, r, t, b, m, W, H):
        ex, ey = m / 2 * (r - l), m / 2 * (b - t)
        return [
            max(math.floor(l - ex), 0),
            min(math.ceil(r + ex), W),
            max(math.floor(t - ey), 0),
            min(math.ceil(b + ey), H),
        ]

    @staticmethod
    def mode(points, reach):
        mean = points.mean(0)
        centre = min(points, key=lambda p: ((p - mean) ** 2).sum())
        while True:
            near = [p for p in points if ((p - centre) ** 2).sum() <= reach**2]
            weight = [math.exp(-((p - centre) ** 2).sum() / (2 * 4**2)) for p in near]
            new = sum(a * p for a, p in zip(weight, near, strict=True)) / sum(weight)
            if (new - centre).sum() < 0.1:
                return new
            centre = new

    def around(self, points, reach, m, W, H):
        c = self.mode(points, reach)
        ax, ay = np.abs(points - c).mean(0)
        l, r = max(c[0] - 2 * ax, 0), min(c[0] + 2 * ax, W)
        t, b = max(c[1] - 2 * ay, 0), min(c[1] + 2 * ay, H)
        return self.box(l, r, t, b, m, W, H)

    @staticmethod
    def smooth(new, old, W, H):
        out = []
        for lo, hi, limit in ((0, 1, W), (2, 3, H)):
            c, size = (new[lo] + new[hi]) / 2, 0.1 * (new[hi] - new[lo]) + 0.9 * (old[hi] - old[lo])
            out += [max(math.floor(c - size / 2), 0), min(math.ceil(c + size / 2), limit)]
        return out

    def add(self, f, z, before):
        """Step 1 (before is None: the annotation) or step 10."""
        L, h, w = z.shape
        p = self.s.stride
        if before is not None:
            low, high = z.flatten(1).min(1).values, z.flatten(1).max(1).values
            z_ = torch.stack([(c - lo) / (hi - lo) if hi > 0 else c for c, lo, hi in zip(z, low, high, strict=True)])
        else:
            z_ = z
        hard = F.interpolate(z_[None], size=(h * p, w * p), mode="bilinear")[0].argmax(0).numpy()
        boxes = [[0, w, 0, h]] + [None] * (L - 1)
        for l in range(1, L):
            ys, xs = np.nonzero(hard == l)
            if len(xs) and before is None:
                boxes[l] = [v // p for v in self.box(xs.min(), xs.max(), ys.min(), ys.max(), 0.6, w * p, h * p)]
            elif len(xs) and before[l] is not None:
                new = self.around(np.stack([xs, ys], 1).astype(float), 20, 0.6, w * p, h * p)
                boxes[l] = self.smooth([v // p for v in new], before[l], w * p, h * p)
        self.frames.append((f, z, boxes))

    def step(self, g):
        s = self.s
        (first, *queue), (_, h, w), L = self.frames, g.shape, len(self.frames[0][1])
        queue = queue[-s.context :] if s.context else []
        f, z, before = self.frames[-1]
        hard = z.argmax(0).flatten()
        goal = [[0, w, 0, h]] + [None] * (L - 1)
        for l in range(1, L):
            cells = [p for p in range(h * w) if hard[p] == l]
            if len(cells) < 2 or before[l] is None:
                continue
            moved = []
            for p in cells:
                P = (f.flatten(1)[:, p] @ g.flatten(1) / s.temperature).softmax(0).double()
                x = sum(P[q] * (q % w) * w / (w - 1) for q in range(h * w))
                y = sum(P[q] * (q // w) * h / (h - 1) for q in range(h * w))
                moved.append([float(x), float(y)])
            goal[l] = self.smooth(self.around(np.array(moved), 5, 1, w, h), before[l], w, h)

        def inside(box):
            return torch.tensor([box[0] <= q % w < box[1] and box[2] <= q // w < box[3] for q in range(h * w)])

        def small(box):
            return box is None or box[1] - box[0] < 3 or box[3] - box[2] < 3

        out = torch.zeros(L, h * w)
        self.lost = []
        for i, (f, z, boxes) in enumerate([first, *queue]):
            A = (f.flatten(1).T @ g.flatten(1) / s.temperature).softmax(0)
            self.lost.append(i > 0 and any(z[l].sum() < 3 or small(boxes[l]) or small(goal[l]) for l in range(L)))
            for l in range(L):
                rows, cols = torch.ones(h * w, dtype=bool), torch.ones(h * w, dtype=bool)
                if not self.lost[-1]:
                    if boxes[l] is None or goal[l] is None:
                        continue
                    rows, cols = inside(boxes[l]), inside(goal[l])
                near = A[rows]
                keep = near >= near.topk(min(s.topk, len(near)), dim=0).values[-1:]
                out[l] += ((near * keep * z[l].flatten()[rows, None]).sum(0)) * cols
        z = (out / (1 + len(queue))).view(L, h, w)
        self.add(g, z, before)
        return z


@pytest.mark.parametrize(("h", "w", "L", "stride"), [(10, 13, 3, 4), (7, 14, 2, 8), (11, 9, 4, 3)])
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_track_equals_the_release_step_by_step(h, w, L, stride, temperature):
    s = Propagation(
        aggregation="per-frame", localization="track", temperature=temperature, topk=5, context=2, stride=stride
    )
    f, labels = frames(5, 8, h, w), one_hot(L, h, w)
    reference = Track(s, f[0], labels)
    for t, z in enumerate(propagate_video(iter(f[1:]), [(f[0], labels)], s), 1):
        expected = reference.step(f[t])
        assert (z - expected).abs().max() < 1e-5, t


def test_track_gives_up_boxes_where_an_object_is_lost_and_never_finds_it_again():
    """An object of one cell: no positions, no box, so frames but the first are used whole."""
    s = Propagation(aggregation="per-frame", localization="track", temperature=0.05, topk=5, context=3, stride=4)
    f, labels = frames(4, 8, 10, 12), one_hot(3, 10, 12)
    labels[:, labels[2] > 0] = torch.tensor([1.0, 0, 0])[:, None]
    labels[:, 8, 3] = torch.tensor([0, 0, 1.0])
    reference = Track(s, f[0], labels)
    for t, z in enumerate(propagate_video(iter(f[1:]), [(f[0], labels)], s), 1):
        assert (z - reference.step(f[t])).abs().max() < 1e-5, t
    assert reference.lost == [False, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# What is in the context


def dense(g, Fs, Y, s):
    """Overall, whole frame: the k best of all context cells, softmax over them."""
    A = torch.cat([f.flatten(1) for f in Fs], 1).T @ g.flatten(1) / s.temperature
    y = torch.cat([labels.flatten(1) for labels in Y], 1)
    best, entry = A.topk(min(s.topk, len(A)), dim=0)
    return (y[:, entry] * best.softmax(0)).sum(1).view(-1, *g.shape[1:])


def test_memory_of_mast():
    """Targets 1..40 see frames 0, 5, t-1, t-3, t-5 (models.md 3.6): sorted, none twice, none before the video."""
    listed = {1: [0], 2: [0, 1], 3: [0, 2], 4: [0, 1, 3], 5: [0, 2, 4], 6: [0, 1, 3, 5], 7: [0, 2, 4, 5, 6]}
    listed[40] = [0, 5, 35, 37, 39]
    # Frame t has the label t everywhere and all features are equal: the mean of the labels seen tells the frames.
    s = Propagation(memory="spaced", context=5, localization="none", topk=10_000)
    seen = {}

    def spy(target, features, labels, settings, annotated, ages, boxes):
        seen[len(seen) + 1] = sorted(labels[:, 0, 0, 0].int().tolist())
        assert [len(seen) - age for age in ages] == labels[:, 0, 0, 0].int().tolist()
        return torch.full((1, 2, 2), float(len(seen)))

    original, propagate.propagate_labels = propagate.propagate_labels, spy
    try:
        list(propagate_video(iter(torch.ones(40, 3, 2, 2)), [(torch.ones(3, 2, 2), torch.zeros(1, 2, 2))], s))
    finally:
        propagate.propagate_labels = original
    for t in range(1, 41):
        wanted = sorted({i for i in (0, 5) if i <= t - 1} | {i for i in (t - 1, t - 3, t - 5) if i > 0})
        assert seen[t] == wanted
        assert t not in listed or listed[t] == wanted


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("setting", ["pad", "forget", "minmax", "hard"])
def test_context_of_a_video(setting, n):
    """CRW's padded start, CorrFlow's context without the first frame, TimeCycle's and CorrFlow's carried labels."""
    s = Propagation(localization="none", context=n, topk=6, temperature=0.1)
    s = replace(s, pad=setting == "pad", keep_first=setting != "forget")
    s = replace(s, carry=setting if setting in ("minmax", "hard") else "soft")
    f, labels = frames(7, 8, 5, 6), one_hot(3, 5, 6)
    past = [(f[0], labels)]
    for t, z in enumerate(propagate_video(iter(f[1:]), past[:], s), 1):
        latest = list(range(max(1, t - n), t))
        context = {
            "pad": [0] + [max(i, 0) for i in range(t - n, t)],
            "forget": list(range(max(0, t - n), t)),
        }.get(setting, [0, *latest])
        expected = dense(f[t], [past[i][0] for i in context], [past[i][1] for i in context], s)
        if setting == "minmax":
            low, high = expected.flatten(1).min(1).values, expected.flatten(1).max(1).values
            expected = (expected - low[:, None, None]) / (high - low)[:, None, None]
        assert (z - expected).abs().max() < 1e-5, t
        carried = expected
        if setting == "hard":
            carried = F.one_hot(expected.argmax(0), 3).permute(2, 0, 1).float()
        past.append((f[t], carried))


@pytest.mark.parametrize(
    "changes",
    [
        {"pad": True},
        {"keep_first": False},
        {"carry": "minmax"},
        {"carry": "hard"},
        {"memory": "spaced"},
        {"localization": "window", "radius": 2},
        {"localization": "predicted", "radius": 1},
        {"localization": "track", "aggregation": "per-frame"},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_as_if_it_had_not(changes):
    """From the last n targets, or from all of them where the settings need the history."""
    s = Propagation(**{"context": 3, "topk": 6, "temperature": 0.1, "radius": 3, "stride": 4} | changes)
    f, first = frames(24, 8, 8, 9), (frames(1, 8, 8, 9)[0], one_hot(2, 8, 9))
    whole = list(propagate_video(iter(f[1:]), [first], s))
    for stop in (2, 9, 19):
        recent = list(zip(f[1 : stop + 1], whole[:stop], strict=True))[0 if needs_history(s) else -s.context :]
        rest = list(propagate_video(iter(f[stop + 1 :]), [first], s, recent))
        assert len(rest) == 23 - stop
        for a, b in zip(rest, whole[stop:], strict=True):
            assert (a - b).abs().max() < 1e-5


def test_sampling_of_the_mask():
    """nearest takes the pixel at the cell's centre, bilinear the mean of the four there."""
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[4:, 4:] = 7
    assert labels_from_mask(mask, [7], (2, 2), "nearest")[1].tolist() == [[1, 1], [1, 1]]
    mask[4:, 4:], mask[:, 3] = 0, 7
    assert labels_from_mask(mask, [7], (2, 2), "nearest")[1].tolist() == [[0, 0], [0, 0]]
    assert labels_from_mask(mask, [7], (2, 2), "bilinear")[1].tolist() == [[0.5, 0], [0.5, 0]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"localization": "track"}, "--aggregation per-frame"),
        ({"localization": "predicted", "softmax": "frame"}, "--softmax region"),
        ({"localization": "window", "softmax": "frame"}, "--softmax region"),
        ({"context": 0, "keep_first": False}, "--context 1"),
        ({"size": "480/"}, "--size"),
        ({"stride": 0}, "--stride"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Propagation(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# Real features


@pytest.fixture(scope="module")
def real():
    """Features of three frames of a DAVIS sequence on a small grid, and soft labels of the first two."""
    weights = DATA / "weights" / "resnet18_imagenet1k_v1_conv1-layer3.pth"
    pictures = sorted((DATA / "data" / "DAVIS" / "JPEGImages" / "480p").glob("*/*.jpg"))[:3]
    if not (weights.is_file() and len(pictures) == 3):
        pytest.skip(f"no DAVIS frames or ImageNet weights under {DATA} (SOFTCOPY_DATA)")
    import cv2

    encoder = load_encoder("imagenet", weights, Propagation(size="56"), "cpu")
    pixels = np.stack([cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in pictures])
    with torch.inference_mode():
        return encoder(torch.from_numpy(pixels))


@pytest.mark.parametrize("localization", ["window", "predicted"])
@pytest.mark.parametrize("topk", [5, 10_000])
def test_windows_on_real_features(real, localization, topk):
    s = Propagation(localization=localization, topk=topk, radius=3, temperature=0.05)
    y = soft(2, 3, *real.shape[2:])
    expected = windows(real[2], real[:2], y, s, [31, 1])
    assert (propagate_labels(real[2], real[:2], y, s, ages=[31, 1]) - expected).abs().max() < 1e-5


def test_track_on_real_features(real):
    s = Propagation(aggregation="per-frame", localization="track", temperature=0.025, topk=5, context=7)
    labels = one_hot(3, *real.shape[2:])
    reference = Track(s, real[0], labels)
    for t, z in enumerate(propagate_video(iter(real[1:]), [(real[0], labels)], s), 1):
        assert (z - reference.step(real[t])).abs().max() < 1e-5


@pytest.mark.parametrize("change", [{"context": 1, "keep_first": False}, {"pad": True, "context": 3}, {}])
def test_a_stretch_starts_from_its_own_annotated_frame(change, monkeypatch):
    """The first annotated frame is the latest of the context, and what a full one is filled up with; others are far."""
    seen = []

    def look(target, features, labels, settings, annotated, ages, boxes):
        seen.append((list(ages), labels[:, 1, 0, 0].tolist()))
        return labels[0]

    monkeypatch.setattr(propagate, "propagate_labels", look)
    own, other = ((torch.zeros(4, 5, 6), torch.full((2, 5, 6), value)) for value in (1.0, 2.0))
    list(propagate.propagate_video([torch.zeros(4, 5, 6)] * 2, [own, other], replace(Propagation(), **change)))
    ages, values = seen[0]
    assert values[ages.index(1)] == 1.0
    assert all(age > 15 for age, value in zip(ages, values, strict=True) if value == 2.0)
    assert values.count(1.0) == (1 + 3 if change.get("pad") else 1)
    assert values.count(2.0) == (0 if change.get("keep_first") is False else 1)
