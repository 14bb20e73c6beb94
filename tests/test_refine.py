"""Masks that follow the picture: mask_from_labels with --refine against known answers and a plain guided filter."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import export
import propagate
from common import Propagation
from propagate import mask_from_labels, radii, read_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def soft(mask: np.ndarray, labels: int, stride: int = 8) -> torch.Tensor:
    """What propagation would give for a mask: soft labels on the grid."""
    grid = [math.ceil(side / stride) for side in mask.shape]
    return propagate.labels_from_mask(torch.from_numpy(mask), range(1, labels), grid)


def picture(mask: np.ndarray, seed: int = 0) -> torch.Tensor:
    """A frame in which each label has a colour of its own, with a little noise."""
    colours = np.array([(40, 60, 50), (200, 180, 60), (60, 90, 220), (220, 60, 90)])
    noise = np.random.default_rng(seed).normal(0, 2, (*mask.shape, 3))
    return torch.from_numpy(np.clip(colours[mask] + noise, 0, 255).astype(np.uint8))


def box_mean(x: np.ndarray, r: int) -> np.ndarray:
    """The mean over the part of a (2r + 1)^2 window that lies in the picture, pixel by pixel."""
    H, W = x.shape[:2]
    out = np.empty_like(x)
    for i in range(H):
        for j in range(W):
            out[i, j] = x[max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1].mean((0, 1))
    return out


def guided_filter(p: np.ndarray, frame: np.ndarray, r: int, eps: float) -> np.ndarray:
    """He, Sun, Tang, eq. 5, 6 and 8 at full size; p H x W, frame H x W x 3 in 0..1."""
    mean, mean_p = box_mean(frame, r), box_mean(p[..., None], r)[..., 0]
    products = box_mean(frame[..., :, None].repeat(3, -1) * frame[..., None, :], r)
    covariance = products - mean[..., :, None] * mean[..., None, :] + eps * np.eye(3)
    with_p = box_mean(frame * p[..., None], r) - mean * mean_p[..., None]
    a = np.linalg.solve(covariance, with_p[..., None])[..., 0]
    b = mean_p - (a * mean).sum(-1)
    return (box_mean(a, r) * frame).sum(-1) + box_mean(b[..., None], r)[..., 0]


@pytest.mark.parametrize("size", [(96, 160), (101, 83)])
@pytest.mark.parametrize("minmax", [False, True])
def test_an_edge_comes_out_where_the_picture_has_it(size, minmax):
    """To the pixel, where up-sampled labels are off by up to half a cell."""
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 2 + 3 :] = 1
    labels = soft(mask, 2)
    plain = mask_from_labels(labels, [1], size, minmax).numpy()
    refined = mask_from_labels(labels, [1], size, minmax, picture(mask), 0.35).numpy()
    assert (plain != mask).mean() > 0.005 and np.array_equal(refined, mask)


def test_many_labels_follow_their_edges():
    mask = np.zeros((120, 160), np.uint8)
    mask[10:60, 13:75], mask[51:115, 87:150], mask[70:115, 5:66] = 1, 2, 3
    labels = soft(mask, 4)
    plain = mask_from_labels(labels, [1, 2, 3], mask.shape).numpy()
    for chunk in (8, 3):  # in turns or all together
        refined = mask_from_labels(labels, [1, 2, 3], mask.shape, False, picture(mask), 0.35, chunk).numpy()
        assert (refined != mask).mean() < 0.3 * (plain != mask).mean()


def test_without_edges_only_the_border_is_smoothed():
    """A constant picture: a = 0, so the map is a box blur of itself (twice), which keeps a straight border."""
    mask = np.zeros((96, 160), np.uint8)
    mask[:, 83:] = 1
    grey = torch.full((96, 160, 3), 127, dtype=torch.uint8)
    lead = torch.rand(1, 96, 160, generator=torch.Generator().manual_seed(0))
    got = propagate.guide(lead.clone(), grey, torch.tensor([2.0]))
    p = F.interpolate(lead[None], size=(24, 40), mode="bilinear")[0, 0].numpy().astype(np.float64)
    blurred = torch.from_numpy(box_mean(box_mean(p[..., None], 2), 2)[..., 0])[None, None]
    expected = F.interpolate(blurred, size=(96, 160), mode="bilinear")[0]
    assert (got - expected).abs().max() < 1e-3
    plain, refined = (mask_from_labels(soft(mask, 2), [1], mask.shape, False, grey, c) for c in (0, 0.35))
    assert (plain != refined).float().mean() < 0.01


def test_what_is_thin_is_left_alone_to_the_bit():
    mask = np.zeros((96, 160), np.uint8)
    mask[40:42] = 1  # a strip of two pixels: thickness 1, a third of it is no pixel
    thin = np.kron(mask[::8, ::8], np.ones((8, 8), np.uint8))
    labels = soft(mask, 2, stride=1)
    noise = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, refined = (mask_from_labels(labels, [1], mask.shape, False, noise, c) for c in (0, 0.35))
    assert torch.equal(plain, refined) and plain.any() and thin.shape == mask.shape


def test_the_radius_follows_the_thickness():
    """A strip of width w has w / 2, a disk of radius R about R / 2; the background takes the smallest."""
    mask = torch.zeros(480, 854, dtype=torch.long)
    mask[100:180] = 1
    y, x = torch.meshgrid(torch.arange(480), torch.arange(854), indexing="ij")
    mask[(y - 330) ** 2 + (x - 400) ** 2 < 60**2] = 2
    area, outline = propagate.measure(mask, 4)
    assert area[1] / outline[1] == pytest.approx(80, rel=0.1)  # of the two borders the lower one alone is its own
    assert area[2] / outline[2] == pytest.approx(2 * 60 / 2 * math.pi / 4, rel=0.25)
    radius = radii(area, outline, (480, 854), 0.35)
    assert radius.tolist() == [4, 4, 4, 0]
    assert radii(area, outline, (480, 854), 0.1)[0] == min(radii(area, outline, (480, 854), 0.1)[1:3])


def test_equals_a_plain_guided_filter_but_for_the_small_size():
    """A quarter of the size moves the filtered map by less than 0.05 on average, and 1 % of the pixels of the mask."""
    mask = np.zeros((64, 96), np.uint8)
    mask[13:51, 21:70] = 1
    frame = picture(mask)
    lead = F.interpolate(soft(mask, 2)[None], size=mask.shape, mode="bilinear")[0, 1]
    got = propagate.guide(lead[None].clone(), frame, torch.tensor([1.0]))[0]
    expected = guided_filter(lead.numpy().astype(np.float64), frame.numpy() / 255, 4, propagate.FLAT)
    assert np.abs(got.numpy() - expected).mean() < 0.05
    assert ((got.numpy() > 0.5) != (expected > 0.5)).mean() < 0.01


def test_vanished_labels_and_one_label_alone():
    mask = np.zeros((60, 80), np.uint8)
    frame = picture(mask)
    assert not mask_from_labels(soft(mask, 3), [1, 2], mask.shape, False, frame, 0.35).any()
    assert not mask_from_labels(soft(mask, 1), [], mask.shape, False, frame, 0.35).any()
    mask[20:50, 20:60] = 2
    refined = mask_from_labels(soft(mask, 4), [1, 2, 9], mask.shape, False, picture(mask), 0.35)
    assert set(refined.unique().tolist()) == {0, 2}


def test_the_graph_filters_as_pytorch_does():
    """export.Step, whose shapes are fixed, computes all radii and takes each label's own."""
    mask = np.zeros((96, 160), np.uint8)
    mask[10:60, 13:75], mask[51:90, 87:150] = 1, 2
    for objects in (1, 2):
        settings = Propagation(refine=0.35)
        own = np.where(mask <= objects, mask, 0)
        labels, frame = soft(own, 1 + objects), picture(mask)
        step = export.Step.__new__(export.Step)
        torch.nn.Module.__init__(step)
        step.settings, step.size = settings, mask.shape
        wanted = mask_from_labels(labels, range(1, 1 + objects), mask.shape, False, frame, 0.35)
        assert (step.winner(labels, frame) == wanted).float().mean() > 0.999


def test_through_the_command_line(small_clip, tmp_path, cli):
    """propagate.py refines unless told not to; evaluate.py does when asked."""
    job = ["--model", "random", "--context", 3, "--radius", 4, "--video", small_clip / "clip.mp4", "--end", 4]
    job += ["--mask", small_clip / "f0.png", "--no-film"]
    for name, flags in {"default": [], "off": ["--refine", 0], "named": ["--refine", propagate.REFINE]}.items():
        assert cli(propagate, *job, *flags, "--out", tmp_path / name)[0] == 0
    masks = {name: read_ids(tmp_path / name / "masks/00003.png") for name in ("default", "off", "named")}
    assert np.array_equal(masks["default"], masks["named"]) and not np.array_equal(masks["default"], masks["off"])
    code, _, err = cli(propagate, *job, "--refine", -1, "--out", tmp_path / "bad")
    assert code == 2 and "--refine -1.0: give 0" in err
    assert evaluate.Args().propagation.refine == 0
