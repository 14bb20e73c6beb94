"""Masks that follow the picture: known answers, and equality with the guided filter as it is written down."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import propagate
from common import stretch
from propagate import Guide, box_mean, label_radii, pooled_mean, read_ids, refined_winner

DATA = Path(os.environ.get("SOFTCOPY_DATA", Path(__file__).parent.parent.parent / "shared")) / "data"


def plain_winner(labels, size, minmax=False):
    full = F.interpolate(labels[None], size=size, mode="bilinear")[0]
    return (stretch(full) if minmax else full).argmax(0)


def two(labels):
    """An object's map -> soft labels with the background as the rest."""
    return torch.stack([1 - labels, labels])


def blob(grid, centre, radius, sharpness=1.0):
    """A soft disk on the grid, in cells."""
    y, x = torch.meshgrid(torch.arange(grid[0]) + 0.5, torch.arange(grid[1]) + 0.5, indexing="ij")
    return torch.sigmoid(sharpness * (radius - torch.hypot(y - centre[0], x - centre[1])))


def guided_filter(frame, p, radius, eps):
    """He, Sun, Tang 2013, equations 19 to 21, pixel by pixel at full size. frame H x W x 3 in [0, 1], p H x W."""

    def mean(x):
        return cv2.blur(x, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_CONSTANT) / share

    share = np.ones(p.shape)
    share = cv2.blur(share, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_CONSTANT)
    mean_I = np.stack([mean(frame[..., c]) for c in range(3)], -1)
    mean_p = mean(p)
    pairs = [
        [mean(frame[..., i] * frame[..., j]) - mean_I[..., i] * mean_I[..., j] for j in range(3)] for i in range(3)
    ]
    covariance = np.array(pairs).transpose(2, 3, 0, 1)  # H W 3 3
    with_p = np.stack([mean(frame[..., c] * p) - mean_I[..., c] * mean_p for c in range(3)], -1)
    a = np.linalg.solve(covariance + eps * np.eye(3), with_p[..., None])[..., 0]
    b = mean_p - (a * mean_I).sum(-1)
    return sum(mean(a[..., c]) * frame[..., c] for c in range(3)) + mean(b)


def test_a_blurred_label_comes_out_on_the_step_in_the_picture():
    frame = torch.full((96, 160, 3), 40, dtype=torch.uint8)
    frame[:, 77:] = torch.tensor([200, 180, 90], dtype=torch.uint8)
    ramp = torch.sigmoid((torch.arange(20) + 0.5 - 10.2) / 1.5).expand(12, 20)  # its 0.5 lies at pixel 81.6
    assert int(plain_winner(two(ramp), (96, 160)).argmax(1)[48]) in (81, 82)
    winner = refined_winner(two(ramp), frame, strength=0.5)
    assert torch.equal(winner, (torch.arange(160) >= 77).long().expand(96, 160))


def test_a_constant_picture_gives_a_box_blur():
    p = torch.rand(1, 48, 64)
    guide = Guide(torch.full((48, 64, 3), 130, dtype=torch.uint8), step=1, eps=1e-4)
    followed = guide.follow(p, torch.tensor([2.0]))
    twice = p
    for _ in range(2):  # b = mean p, and its mean over the windows
        count = F.avg_pool2d(torch.ones_like(p), 5, 1, 2)
        twice = F.avg_pool2d(twice, 5, 1, 2) / count
    torch.testing.assert_close(followed, twice, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grey", [False, True])
def test_at_full_size_it_is_the_guided_filter(grey):
    rng = np.random.default_rng(3)
    frame = cv2.GaussianBlur(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8), (7, 7), 0)
    if grey:  # three equal channels: a covariance of rank one
        frame = np.repeat(frame[..., :1], 3, 2)
    p = cv2.GaussianBlur((rng.random((60, 80)) > 0.5).astype(np.float64), (0, 0), 4)
    guide = Guide(torch.from_numpy(frame), step=1, eps=3e-5)
    for radius in (1, 3, 4):
        want = guided_filter(frame / 255, p, radius, 3e-5)
        got = guide.follow(torch.from_numpy(p).float()[None], torch.tensor([float(radius)]))[0].numpy()
        assert np.abs(got - want).max() < 2e-3


def test_a_quarter_of_the_size_makes_little_difference_on_a_real_frame():
    picture = DATA / "DAVIS/JPEGImages/480p/dog/00020.jpg"
    if not picture.is_file():
        pytest.skip(f"{picture} is not there")
    frame = cv2.imread(str(picture), cv2.IMREAD_COLOR_RGB)
    truth = cv2.imread(str(DATA / "DAVIS/Annotations/480p/dog/00020.png"), cv2.IMREAD_GRAYSCALE) > 0
    small = cv2.resize(truth.astype(np.float32), (107, 60), interpolation=cv2.INTER_AREA)
    p = cv2.resize(cv2.GaussianBlur(small, (0, 0), 1.5), (854, 480))
    got = Guide(torch.from_numpy(frame), 4, 3e-5).follow(torch.from_numpy(p)[None], torch.tensor([3.0]))[0].numpy()
    want = guided_filter(frame / 255, p.astype(np.float64), 12, 3e-5)
    assert np.abs(got - want).mean() < 0.005
    assert ((got > 0.5) != (want > 0.5)).mean() < 0.002


def test_radii_follow_the_thickness():
    winner = torch.zeros(120, 200, dtype=torch.int64)
    winner[10:110, 20:24] = 1  # a strip of 4 pixels: thickness 2
    y, x = torch.meshgrid(torch.arange(120), torch.arange(200), indexing="ij")
    winner[torch.hypot(y - 60.0, x - 120.0) < 40] = 2  # a disk: thickness about 20
    radii = label_radii(winner, 4, scale=0.1)
    assert radii.tolist() == [1, 1, 2, 0]  # 0.2 -> 1, the lowest; label 3 has vanished and does not count
    assert label_radii(winner, 4, scale=0.05).tolist() == [0, 0, 1, 0]  # too thin: left alone, the background too
    assert label_radii(winner, 4, scale=9).tolist() == [4, 4, 4, 0]
    assert label_radii(torch.zeros(9, 9), 3, scale=9).tolist() == [0, 0, 0]


def test_a_thin_label_is_left_alone_to_the_bit():
    strip = torch.zeros(12, 20)
    strip[3] = 0.7
    frame = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8)
    assert torch.equal(refined_winner(two(strip), frame, strength=0.05), plain_winner(two(strip), (96, 160)))
    thick = blob((12, 20), (8, 14), 3)
    three = torch.stack([1 - strip - thick, strip, thick])
    guide = Guide(frame, 4, 1e-4)
    full = F.interpolate(three[None], size=(96, 160), mode="bilinear")[0]
    followed = guide.follow(full, torch.tensor([0.0, 0.0, 2.0]))
    assert torch.equal(followed[:2], full[:2]) and not torch.equal(followed[2], full[2])


@pytest.mark.parametrize("minmax", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_without_strength_it_is_the_plain_arg_max(count, minmax):
    labels = torch.rand(count, 8, 11)
    frame = torch.randint(0, 256, (61, 83, 3), dtype=torch.uint8)
    assert torch.equal(refined_winner(labels, frame, 0, minmax), plain_winner(labels, (61, 83), minmax))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 50), (7, 9), (61, 83), (96, 160)])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_any_size_and_any_number_of_labels(count, size):
    labels = torch.rand(count, max(1, -(-size[0] // 8)), max(1, -(-size[1] // 8)))
    frame = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    winner = refined_winner(labels, frame, 0.5)
    assert winner.shape == size and winner.dtype == torch.int64
    assert winner.min() >= 0 and winner.max() < count
    assert torch.equal(winner, refined_winner(labels, frame, 0.5, chunk=1))  # labels in turns


def test_a_label_that_has_vanished_changes_nothing():
    frame = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8)
    disk = blob((12, 20), (6, 10), 4)
    none = torch.zeros_like(disk)
    pair = refined_winner(two(disk), frame, 0.5)
    assert torch.equal(refined_winner(torch.stack([1 - disk, disk, none]), frame, 0.5), pair)
    assert not refined_winner(two(none), frame, 0.5).any()


def test_of_two_labels_the_difference_is_filtered_which_is_both_filtered():
    frame = torch.from_numpy(
        cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (96, 160, 3)).astype(np.uint8), (9, 9), 0)
    )
    labels = torch.stack([blob((12, 20), (6, 4), 5), blob((12, 20), (6, 11), 4)])  # no complements
    guide, full = Guide(frame, 4, 3e-5), F.interpolate(labels[None], size=(96, 160), mode="bilinear")[0]
    radii = label_radii(full.argmax(0), 2, 0.5 / 4)
    both = guide.follow(full, radii).argmax(0)
    assert (refined_winner(labels, frame, 0.5) != both).float().mean() < 1e-3  # rounding at ties


@pytest.mark.parametrize("count", [2, 4])
def test_minmax_stretches_first(count):
    frame = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8)
    labels = torch.stack([blob((12, 20), (6, 3 + 4 * i), 3) * (0.3 + 0.2 * i) for i in range(count)])
    full = stretch(F.interpolate(labels[None], size=(96, 160), mode="bilinear")[0])
    radii = label_radii(full.argmax(0), count, 0.5 / 4)
    assert radii[1:].all()
    want = Guide(frame, 4, 3e-5).follow(full, radii).argmax(0)
    got = refined_winner(labels, frame, 0.5, minmax=True, eps=3e-5)
    assert (got != want).float().mean() < 1e-3
    # the filter is linear and keeps constants, so the other order would give the same maps


def test_box_mean_is_the_mean_over_the_window_inside_the_picture():
    maps = torch.rand(3, 7, 10)
    for radius in (1, 4):
        want = torch.stack(
            [
                maps[:, max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1].mean((1, 2))
                for y in range(7)
                for x in range(10)
            ],
            1,
        ).view(3, 7, 10)
        torch.testing.assert_close(box_mean(maps, radius), want)
        torch.testing.assert_close(pooled_mean(maps, radius), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_the_same():
    frame = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8)
    labels = torch.rand(5, 12, 20)
    same = refined_winner(labels.cuda(), frame.cuda(), 0.5).cpu() == refined_winner(labels, frame, 0.5)
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("count", [2, 3])
def test_the_exported_graph_gives_the_same(count, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    frame = torch.from_numpy(
        cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (61, 83, 3)).astype(np.uint8), (9, 9), 0)
    )
    labels = torch.stack([blob((8, 11), (4, 2 + 4 * i), 3) for i in range(count)])

    class Graph(torch.nn.Module):
        def forward(self, labels, frame):
            return refined_winner(labels, frame, 0.5).float()

    path = tmp_path / "refine.onnx"
    torch.onnx.export(Graph().eval(), (labels, frame), str(path), opset_version=18, verbose=False, optimize=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (labels.numpy(), frame.numpy()), strict=True)))
    assert (torch.from_numpy(got).long() != refined_winner(labels, frame, 0.5)).float().mean() < 1e-3


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
