"""train_uvc_plus.py: each loss has the value that can be worked out by hand, and training can be cut off and shared."""

import csv
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import common
import propagate
import train_finetune
import train_uvc_plus as uvc

ROOT = Path(uvc.__file__).parent
SMALL = ["--crop", 64, "--full", 128, "--out-layer", "layer3", "--batch-size", 2, "--workers", 0, "--device", "cpu"]
SMALL += ["--epochs", 2, "--warmup-epochs", 1, "--look-every", 2]
IMAGES = ["--image-size", 64, "--image-batch-size", 2]  # for an image objective


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Four videos of one training set: three folders of frames and a film in a folder of its own."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("a", "b", "deep/c"):
        (root / name).mkdir(parents=True)
        for t, (frame, _) in enumerate(clip.render(frames=4, height=80, width=96, seed=len(name))):
            cv2.imwrite(str(root / name / f"{t:05d}.jpg"), frame[..., ::-1])
    clip.write_clip(root / "film", frames=8, height=80, width=96, seed=3)
    for extra in ("truth", "f0.png"):
        path = root / "film" / extra
        for file in path.glob("*") if path.is_dir() else ():
            file.unlink()
        path.rmdir() if path.is_dir() else path.unlink()
    return root


@pytest.fixture(scope="session")
def coders(tmp_path_factory) -> Path:
    """Files of an auto-encoder that has learnt nothing."""
    folder = tmp_path_factory.mktemp("coders")
    torch.manual_seed(0)
    torch.save(uvc.LabEncoder().state_dict(), folder / "my_encoder.pth")
    torch.save(uvc.LabDecoder().state_dict(), folder / "my_decoder.pth")
    return folder


@pytest.fixture(scope="module")
def trained(videos, coders, tmp_path_factory) -> Path:
    """One run of both phases with the rotation loss: two steps each."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--data", videos, "--autoencoder", coders, "--image-objective", "rotation", *IMAGES, "--out", out]
    uvc.main(common.parse(uvc.Args, [str(flag) for flag in (*SMALL, *flags)]))
    return out


def args(**changes) -> uvc.Args:
    small = {"data": (Path(),), "crop": 64, "full": 128, "out_layer": "layer3"}
    if "image_objective" in changes:
        small["image_size"] = 64
    return uvc.check(uvc.Args(**(small | changes)))


def checkpoint(out: Path) -> dict:
    return torch.load(out / "last.pth", weights_only=True)


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "log.csv").open() as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def hot(cells: list[int] | torch.Tensor, n: int) -> torch.Tensor:
    """Logits by which cell j of the target is cell cells[j] of the reference, and no other."""
    return 1e4 * F.one_hot(torch.as_tensor(cells), n).T[None].float()


# Losses


def test_affinity_is_the_dot_product_over_the_temperature():
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 2, 2)
    S = uvc.affinity(a, b, 0.5)
    assert S.shape == (2, 12, 4)
    assert torch.isclose(S[1, 7, 2], 2 * a[1, :, 1, 3] @ b[1, :, 1, 0])


@pytest.mark.parametrize("legacy", [False, True])
def test_identity_costs_nothing(legacy):
    """Colours are copied as they are, there and back; every cell comes back to where it was. The windows of the
    concentration loss are as wide as windows are: 2 (2 / n)^2 63 / 12 (the released code takes this as its zero)."""
    S, codes = hot(torch.arange(256), 256), torch.rand(1, 7, 16, 16)
    A = S.softmax(1)
    assert torch.equal(uvc.copy_colors(codes, A), codes)
    assert torch.equal(uvc.copy_colors(codes, A.transpose(1, 2)), codes)
    image = codes[:, :3]
    error = uvc.lab_error(uvc.copy_colors(image, A), image)
    assert uvc.color_loss(error, error, 0.1, math.inf) == (0, 0)
    assert uvc.coordinate_cycle(S, legacy) == pytest.approx(0, abs=1e-5)
    assert uvc.cycle_accuracy(S) == 1
    step = 2 / 15 if legacy else 2 / 16
    assert uvc.concentration(S, legacy) == pytest.approx(2 * step**2 * 63 / 12, rel=1e-5)
    assert uvc.concentration(hot(torch.arange(1024), 1024), legacy) == pytest.approx(
        0.0437045 if legacy else 0.0410156, rel=1e-5
    )


def test_uniform_affinity_is_concentrated_in_one_point():
    assert uvc.concentration(torch.zeros(2, 256, 256)) == pytest.approx(0, abs=1e-10)


def test_a_permuted_affinity_costs_what_is_stated():
    """Two cells of opposite corners swap places: their windows' spread and nothing else grows."""
    order = torch.arange(256)
    order[0], order[255] = 255, 0
    S = hot(order, 256)
    codes = torch.rand(1, 3, 16, 16)
    swapped = codes.flatten(2)[..., order].view(1, 3, 16, 16)
    assert torch.equal(uvc.copy_colors(codes, S.softmax(1)), swapped)
    L, a, b = (codes - swapped).abs().sum((2, 3))[0] / 256
    assert uvc.lab_error(swapped, codes).item() == pytest.approx((L + 10 * a + 10 * b).item(), rel=1e-5)
    at = (2 * torch.arange(16) + 1) / 16 - 1
    x = at.repeat(16, 1)
    places = torch.stack([x, x.T]).flatten(1)[:, order].view(2, 16, 16)
    expected = np.mean(
        [
            places[axis, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy().var()
            for axis in (0, 1)
            for i in (0, 1)
            for j in (0, 1)
        ]
    )
    assert uvc.concentration(S).item() == pytest.approx(2 * expected, rel=1e-5)
    assert expected > 2 * 63 / 12 / 8**2 / 2
    everything_turned = hot(torch.arange(256).flip(0), 256)  # a half turn leaves windows whole: not penalised
    assert uvc.concentration(everything_turned).item() == pytest.approx(2 * (2 / 16) ** 2 * 63 / 12, rel=1e-5)


def test_coordinate_cycle_is_in_cells():
    """One cell of the first column whose best match j = 1 is taken by its neighbour comes back one cell off in x."""
    S = hot(torch.arange(256), 256)
    S[0, 0, 1] = 2e4  # cell 0 goes to 1; what is there comes from both, weighed 1e4 : 2e4, that is from cell 0
    S[0, 1, 1] = 3e4  # now from cell 1
    assert uvc.coordinate_cycle(S).item() == pytest.approx(1 / 512, rel=1e-4)


def test_outliers_count_zero_but_count():
    forward, back = torch.tensor([1.0, 2.4, 3.0]), torch.tensor([2.0, 2.0, 0.0])
    loss, share = uvc.color_loss(forward, back, 0.1, 2.5)  # s = 1.2, 2.6, 3.0
    assert loss == pytest.approx(1.2 / 3)
    assert share == pytest.approx(2 / 3)
    assert uvc.color_loss(forward, back, 0.1, math.inf)[0] == pytest.approx((1.2 + 2.6 + 3.0) / 3)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_shift_gives_back_its_coordinates_and_box(legacy):
    """The reference is cut from the target at column 5, row 7 (of 20 x 20 cells): so says each cell, and the box."""
    torch.manual_seed(0)
    F2 = F.normalize(torch.randn(1, 64, 20, 20), dim=1)
    F1 = F2[:, :, 7:15, 5:13]
    grid = uvc.cell_grid(20, legacy, F2)
    found = uvc.soft_argmax(uvc.affinity(F1, F2, 1e-3), grid)
    assert torch.allclose(found[0].T, grid.view(2, 20, 20)[:, 7:15, 5:13].flatten(1), atol=1e-5)
    where = uvc.box(found.mean(1), 8, 20)
    if not legacy:  # aligned corners do not give whole cells back
        assert torch.allclose(where * 20, torch.tensor([[5.0, 7.0, 13.0, 15.0]]), atol=1e-4)
        assert torch.allclose(uvc.crop(F2, where, 8), F1, atol=1e-5)


def test_box_is_shifted_at_the_left_and_cut_at_the_right():
    centre = torch.tensor([[2.0, 78.0], [40.0, 40.0]]) / 40 - 1  # of 80 x 80 cells
    expected = torch.tensor([[0.0, 62.0, 32.0, 80.0], [24.0, 24.0, 56.0, 56.0]])
    assert torch.allclose(uvc.box(centre, 32, 80) * 80, expected, atol=1e-4)


def test_crop_samples_where_the_fact_sheet_says():
    """l = 10.5, r = 42.5 of 80 columns: samples 0, 1 and 31 of 32 lie at 10.5, 11.5, 41.5; in PyTorch 1.1 elsewhere."""
    x = torch.arange(80.0).expand(1, 1, 80, 80)
    where = torch.tensor([[10.5, 20.0, 42.5, 52.0]]) / 80
    # a column's number is its value, whose sample index is 10.5, ... (its middle is + 1/2)
    assert uvc.crop(x, where, 32)[0, 0, 9, [0, 1, 31]].tolist() == pytest.approx([10.5, 11.5, 41.5], abs=1e-4)
    legacy = uvc.crop(x, where, 32, legacy=True)[0, 0, 9, [0, 1, 31]].tolist()
    assert legacy == pytest.approx([10.369, 11.388, 41.969], abs=1e-3)


def test_crop_has_a_gradient_in_the_box():
    """A box moved by one pixel over a ramp: its mean grows by one."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    where = (torch.tensor([[8.0, 8.0, 16.0, 16.0]]) / 32).requires_grad_()
    uvc.crop(ramp, where, 8).mean().backward()
    assert where.grad[0, [0, 2]].sum().item() == pytest.approx(32)
    assert where.grad[0, [1, 3]].tolist() == pytest.approx([0, 0], abs=1e-5)


# The auto-encoder


def ramps() -> torch.Tensor:
    c = torch.arange(64.0)
    L = (-1 + 2 * c / 63).expand(64, 64)
    a = (0.25 * torch.sin(2 * math.pi * c / 64))[:, None].expand(64, 64)
    b = (0.25 * torch.cos(2 * math.pi * c / 64)).expand(64, 64)
    return torch.stack([L, a, b])[None]


@torch.no_grad()
def test_released_autoencoder(shared):
    """Its fingerprint, and real frames: weighted error 0.07 to 0.23."""
    encoder, decoder = uvc.load_autoencoder(shared / "weights")
    code = encoder(ramps())
    assert code.shape == (1, 256, 8, 8)
    assert (code.mean().item(), code.std().item()) == pytest.approx((0.099176, 0.101405), abs=2e-6)
    assert code.max().item() == pytest.approx(0.529679, abs=2e-6)
    assert (code == 0).float().mean().item() == pytest.approx(0.282, abs=1e-3)
    assert code[0, :4, 3, 3].tolist() == pytest.approx([0, 0.17821, 0.28404, 0.35999], abs=1e-5)
    assert decoder(code)[0, :, 20, 40].tolist() == pytest.approx([0.26837, 0.24263, -0.18089], abs=1e-5)
    frame = uvc.read_frames(shared / "data" / "DAVIS" / "JPEGImages" / "480p" / "goat", lambda length: [0])[0]
    lab = uvc.from_uint8(torch.from_numpy(uvc.to_lab(frame, 256))[None])
    assert uvc.lab_error(decoder(encoder(lab)), lab).item() < 0.3


@torch.no_grad()
def test_decoder_is_the_plain_one():
    """Enlarging and convolving in one step, and the 1 x 1 convolution before it, change nothing."""
    torch.manual_seed(0)
    decoder, code = uvc.LabDecoder(), torch.rand(2, 256, 5, 6)

    def plain(x, conv, twice=False):
        x = F.interpolate(x, scale_factor=2) if twice else x
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), conv.weight, conv.bias)

    x = decoder.upsample(code)
    x = plain(x, decoder.conv7).relu()
    x = plain(x, decoder.conv8, True).relu()
    x = plain(x, decoder.conv9).relu()
    x = plain(x, decoder.conv10, True).relu()
    assert torch.allclose(decoder(code), plain(x, decoder.conv11).tanh(), atol=1e-5)


# The method


def coded() -> tuple[uvc.LabEncoder, uvc.LabDecoder]:
    torch.manual_seed(1)
    return uvc.LabEncoder(), uvc.LabDecoder()


def pair(localise: bool, side: int = 64, full: int = 128) -> dict[str, torch.Tensor]:
    side2 = full if localise else side
    return {
        "reference": torch.randint(0, 255, (2, side, side, 3), dtype=torch.uint8),
        "target": torch.randint(0, 255, (2, side2, side2, 3), dtype=torch.uint8),
    }


@pytest.mark.parametrize("localise", [False, True])
def test_forward_is_the_method_step_by_step(localise):
    """The loss of a batch, against section 4 of the facts written plainly: whole frames encoded, logits by einsum."""
    a = args(coordinate=0.1, threshold_steps=(0, 0), concentration_steps=0, threshold=2.0)
    torch.manual_seed(0)
    net = uvc.UVC(a, coded(), warmup_steps=0)
    batch = pair(localise)
    terms = net({"video": batch}, step=3)
    x1, x2 = (x.permute(0, 3, 1, 2).float() / 128 - 1 for x in (batch["reference"], batch["target"]))

    def features(x):
        grey = (x[:, :1] * 128 + 128) / 256
        return net.backbone((grey - net.mean) / net.std)

    F1, F2, y2, c2 = features(x1), features(x2), x2, net.encoder(x2)
    if localise:
        P = torch.einsum("bcij,bckl->bijkl", F1, F2).flatten(3).softmax(3).view(2, 8, 8, 16, 16)
        x = torch.einsum("bijkl,l->b", P, torch.arange(16) + 0.5) / 64
        y = torch.einsum("bijkl,k->b", P, torch.arange(16) + 0.5) / 64
        boxes = []
        for cx, cy in zip(x, y, strict=True):
            l, t = (cx - 4).clamp(min=0), (cy - 4).clamp(min=0)
            boxes.append((l, (l + 8).clamp(max=16), t, (t + 8).clamp(max=16)))

        def cut(maps, n):
            out = []
            for one, (l, r, t, b) in zip(maps, boxes, strict=True):
                scale = torch.stack([(r - l) / 16, (b - t) / 16]).diag()
                offset = torch.stack([(l + r) / 16 - 1, (t + b) / 16 - 1])[:, None]
                grid = F.affine_grid(torch.cat([scale, offset], 1)[None], (1, 1, n, n), align_corners=False)
                out.append(F.grid_sample(one[None], grid, padding_mode="border", align_corners=False))
            return torch.cat(out)

        F2, y2, c2 = cut(F2, 8), cut(x2, 64), cut(c2, 8)
    S = torch.einsum("bcij,bckl->bijkl", F1, F2).flatten(1, 2).flatten(2)
    A = S.softmax(1)
    there = net.decoder((net.encoder(x1).flatten(2) @ A).unflatten(2, (8, 8)))
    back = net.decoder((c2.flatten(2) @ A.transpose(1, 2)).unflatten(2, (8, 8)))
    weight = torch.tensor([1.0, 10, 10])
    s = (there - y2).abs().mean((2, 3)) @ weight + 0.1 * (back - x1).abs().mean((2, 3)) @ weight
    expected = torch.where(s > 2.0, 0, s).mean() + 1.2 * uvc.concentration(S)
    expected = expected + 0.1 * uvc.coordinate_cycle(S) if localise else expected
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms["zeroed"].item() == (s > 2.0).float().mean()
    gradients = []
    for loss in (terms["loss"], expected):
        net.zero_grad()
        loss.backward()
        gradients.append(net.backbone.layer3[0].conv1.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-2, atol=1e-3 * gradients[1].abs().max())


@pytest.mark.parametrize("legacy", [False, True])
def test_codes_of_a_box_are_those_of_the_whole_frame(legacy):
    """At the corners, where the box is cut, and inside."""
    net = uvc.UVC(args(full=192, legacy_align_corners=legacy), coded(), 0)
    x = torch.rand(4, 3, 192, 192) * 2 - 1
    centre = torch.tensor([[-0.9, -0.9], [0.05, -0.31], [0.9, 0.2], [0.87, 0.95]])
    where = uvc.box(centre, 8, 24).requires_grad_()
    whole = uvc.crop(net.encode(x), where, 8, legacy)
    part = net.encode_box(x, where, 8)
    assert torch.allclose(part, whole, atol=1e-5)
    slopes = [torch.autograd.grad((codes * codes).sum(), where, retain_graph=True)[0] for codes in (whole, part)]
    assert torch.allclose(*slopes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("objective", ["rotation", "moco", "imagenet"])
def test_gradients_reach_backbone_and_head_and_nothing_else(objective):
    a = args(image_objective=objective, image_batch_size=4, **({"queue": 64} if objective == "moco" else {}))
    net = uvc.UVC(a, coded(), 0, classes=3)
    images = torch.randint(0, 255, (4, 2, 3, 64, 64) if objective == "moco" else (4, 3, 64, 64), dtype=torch.uint8)
    image = (images, torch.tensor([0, 1, 2, 0])) if objective == "imagenet" else images
    terms = net({"video": pair(True), "image": image}, 0)
    terms["loss"].backward()
    for name, weight in net.named_parameters():
        trained = name.startswith(("backbone", "auxiliary"))
        assert weight.requires_grad == trained, name
        assert (weight.grad is not None and bool(weight.grad.abs().sum() > 0)) == trained, name
    assert terms["loss"].item() == pytest.approx(
        (terms["color"] + 0.1 * terms["switch"] + a.image_weight * terms["image"]).item(), rel=1e-5
    )


def test_mixed_precision_stops_at_the_affinities(monkeypatch):
    """Features of convolutions in half precision, but what is made of them is float32, and about the same."""
    net, batch, kinds = uvc.UVC(args(), coded(), 0), {"video": pair(True)}, []
    real = uvc.affinity

    def spied(*features):
        kinds.extend([features[0].dtype, real(*features).dtype])
        return real(*features)

    monkeypatch.setattr(uvc, "affinity", spied)
    expected = net(batch, 0)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert net.features(uvc.from_uint8(batch["video"]["reference"])).dtype == torch.bfloat16
        loss = net(batch, 0)["loss"]
    assert set(kinds) == {torch.float32}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.2)


def test_true_frames_are_encoded_without_a_graph():
    net = uvc.UVC(args(), coded(), 0)
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert not net.encode(x).requires_grad


def test_phases_switch_by_steps():
    """Threshold and concentration come in when they are said to, in either phase."""
    a = args(threshold=0.0, threshold_steps=(2, 3), concentration_steps=1)
    net = uvc.UVC(a, coded(), warmup_steps=10)
    for step, localise, zeroed in ((0, False, 0), (1, False, 0), (2, False, 1), (12, True, 0), (13, True, 1)):
        terms = net({"video": pair(localise)}, step)
        assert terms["zeroed"] == zeroed
        color = 0 if zeroed else (terms["color"] + 0.1 * terms["switch"]).item()
        spread = 1.2 * terms["concentration"].item() if step else 0
        assert terms["loss"].item() == pytest.approx(color + spread, rel=1e-5)


def test_rotation_turns_each_picture_four_times():
    """The network sees each picture's four turns, counter-clockwise, one after the other."""
    net = uvc.UVC(args(image_objective="rotation"), coded(), 0)
    seen = []
    net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    net.rotation(images, 0)
    for i, image in enumerate(images):
        for k in range(4):
            turned = np.rot90(image.permute(1, 2, 0).numpy(), k).transpose(2, 0, 1).copy()
            assert torch.allclose(seen[0][4 * i + k], net.pictures(torch.from_numpy(turned)[None])[0])
    net.auxiliary[-1].weight.data.zero_(), net.auxiliary[-1].bias.data.zero_()
    assert net.rotation(images, 0)[0].item() == pytest.approx(math.log(4))


def test_moco_is_momentum_contrast():
    """Keys come from the slow network and go to the queue in their order; its weights move by a thousandth; a step
    cut into parts moves them once."""
    net = uvc.UVC(args(image_objective="moco", image_batch_size=4, queue=12), coded(), 0)
    images = torch.randint(0, 255, (4, 2, 3, 64, 64), dtype=torch.uint8)
    before, key = net.queue.clone(), net.key_auxiliary[-1].weight.clone()
    net.auxiliary[-1].weight.data += 1
    loss, _ = net.moco(images, 5)
    moved = key.lerp(net.auxiliary[-1].weight, 0.001)
    assert torch.allclose(net.key_auxiliary[-1].weight, moved)
    assert int(net.pointer) == 4
    assert torch.equal(net.queue[:, 4:], before[:, 4:])
    assert torch.allclose(net.queue[:, :4].norm(dim=0), torch.ones(4))
    net.moco(images, 5)
    assert torch.allclose(net.key_auxiliary[-1].weight, moved)
    net.moco(images, 6)
    assert int(net.pointer) == 0
    # the loss, from keys made one by one: groups are of one picture each at a batch of four
    net.queue.copy_(before)
    q = torch.cat([net.auxiliary(net.backbone(net.pictures(x[None, 0]))) for x in images])
    q, old = F.normalize(q, dim=1), net.queue.clone()
    loss = net.moco(images, 7)[0]
    k = net.queue[:, :4].T
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ old], 1) / 0.07
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[:, 0].mean().item(), rel=1e-3)


def test_moco_groups_weigh_as_one_pass_in_the_statistics():
    """Of what a step adds to the backbone's running statistics 30 % are of the pictures, whatever their groups; the
    rest are of the video."""
    net = uvc.UVC(args(image_objective="moco", image_batch_size=4, queue=8), coded(), 0)
    kinds = {1: torch.ones_like, 2: torch.zeros_like}  # groups of one picture; two pairs
    net.backbone.bn1.register_forward_pre_hook(lambda _, inputs: kinds[len(inputs[0])](inputs[0]))
    net({"video": pair(False), "image": torch.randint(0, 255, (4, 2, 3, 64, 64), dtype=torch.uint8)}, 0)
    assert net.backbone.bn1.running_mean.numpy() == pytest.approx(0.1 * 0.9 * 0.9, rel=1e-5)  # then two passes of video


def test_moco_never_shares_one_group():
    """Also a part of a batch cut with --accumulate is normalised in two groups: in one a key would give itself away."""
    net = uvc.UVC(args(image_objective="moco", image_batch_size=16, queue=16, accumulate=4), coded(), 0)
    seen = []
    for part in (net.backbone, net.key_backbone):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    net.moco(torch.randint(0, 255, (4, 2, 3, 64, 64), dtype=torch.uint8), 0)
    assert seen == [2, 2, 2, 2]


# Data


def test_pair_times_are_at_most_the_gap_apart():
    torch.manual_seed(0)
    times = [uvc.pair_times(60, 50) for _ in range(2000)]
    assert {b - a for a, b in times} == set(range(1, 51))
    assert {a for a, _ in times} == set(range(10))
    assert {t for _ in range(200) for t in uvc.pair_times(3, 50)} == {0, 1, 2}


def test_pairs_of_both_phases(videos):
    """Sizes and kind; the same seed gives the same pair; the warm-up's frames are of one video, cut differently."""
    a = args(crop=64, full=128)
    for localise, side in ((False, 64), (True, 128)):
        pairs = uvc.Pairs(a, uvc.find_videos([videos]), warmup_steps=5)
        pairs.step = 5 if localise else 4
        assert len(pairs) == 4
        for index in range(4):
            torch.manual_seed(index)
            sample = pairs[index]
            assert sample["reference"].shape == (64, 64, 3)
            assert sample["target"].shape == (side, side, 3)
            assert sample["target"].dtype == torch.uint8
            torch.manual_seed(index)
            assert torch.equal(pairs[index]["target"], sample["target"])
    small = uvc.Pairs(args(crop=192, full=256), uvc.find_videos([videos]), 1)[0]  # frames of 80 x 96: reflected
    assert small["reference"].shape == small["target"].shape == (192, 192, 3)
    assert len(uvc.Pairs(args(pairs_per_video=3), [Path("a")], 0)) == 3


def test_transforms_keep_what_they_should():
    frame = clip_frame = next(clip.render(frames=1, height=70, width=100))[0]
    lab = uvc.to_lab(frame, 0)
    assert lab.shape == (64, 64, 3)
    assert uvc.to_lab(np.zeros((300, 500, 3), np.uint8), 256).shape == (256, 384, 3)
    assert np.array_equal(uvc.rotate(clip_frame, 0), clip_frame)
    assert np.array_equal(uvc.rotate(clip_frame, 180)[1:, 1:], clip_frame[::-1, ::-1][:-1, :-1])  # about the middle
    padded = uvc.pad(frame, 128)
    assert padded.shape == (128, 128, 3)
    assert np.array_equal(padded[29:99, 14:114], frame)
    assert np.array_equal(padded[28], padded[30])  # reflected without its edge
    whole = uvc.enlarge(frame, 200)
    assert whole.shape == (200, 200, 3)
    assert np.array_equal(whole[30:170], cv2.resize(frame, (200, 140)))


def test_lab_is_what_propagate_sees():
    """The grey input of training is that of the extractor which propagate.py runs, bit for bit."""
    frame = next(clip.render(frames=1, height=64, width=64))[0]
    net = uvc.UVC(args(), coded(), 0).eval()
    settings = replace(common.find_system("uvc+").settings, layer="res3", size="full")
    encoder = common.Encoder(net.backbone, settings, common.find_system("uvc+"))
    ours = net.features(uvc.from_uint8(torch.from_numpy(uvc.to_lab(frame, 64))[None]))
    assert torch.allclose(ours, encoder(torch.from_numpy(frame)[None]), atol=1e-5)


def test_images_are_found_and_labelled(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(tmp_path / "train" / name / f"{i}.png"), np.full((20, 30, 3), 50 * i, np.uint8))
    images = uvc.find_images(args(image_objective="imagenet", image_data=str(tmp_path)), [])
    assert images.labels.tolist() == [0, 0, 1, 1]
    picture, label = images[2]
    assert (picture.shape, picture.dtype, label) == ((3, 64, 64), torch.uint8, 1)
    two = uvc.find_images(args(image_objective="moco", image_data=str(tmp_path), image_grey=True), [])[0]
    assert two.shape == (2, 1, 64, 64)
    frames = uvc.find_images(args(image_objective="rotation", pairs_per_video=3), [tmp_path / "train" / "cat"])
    assert len(frames) == 3
    assert frames[2].shape == (3, 64, 64)


def test_linked_folders_are_seen_and_hidden_files_are_not(videos, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).symlink_to(videos / "a")
    (tmp_path / ".thumbs").symlink_to(videos / "a")
    (tmp_path / "films").mkdir()
    for name in ("._clip.mp4", "clip.mp4"):
        (tmp_path / "films" / name).symlink_to(videos / "film" / "clip.mp4")
    images = uvc.find_images(args(image_objective="imagenet", image_data=str(tmp_path)), [])
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [path.name for path in uvc.find_videos([tmp_path])] == ["clip.mp4", "x", "y"]


def test_only_the_frames_needed_are_converted(videos, monkeypatch):
    converted = []
    real = av.VideoFrame.to_ndarray

    class Spy:
        def __init__(self, frame):
            self.frame = frame

        def __getattr__(self, name):
            return getattr(self.frame, name)

        def to_ndarray(self, **kinds):
            converted.append(self.pts)
            return real(self.frame, **kinds)

    def spied(stream_decode):
        return lambda *a: (Spy(frame) for frame in stream_decode(*a))

    film = propagate.Video(videos / "film" / "clip.mp4")
    opened = av.open

    class Film:
        def __init__(self, path):
            self.film = opened(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.film.close()

        def __getattr__(self, name):
            return spied(self.film.decode) if name == "decode" else getattr(self.film, name)

    monkeypatch.setattr(propagate.av, "open", Film)
    upright = propagate.upright
    monkeypatch.setattr(propagate, "upright", lambda frame, picture: upright(frame, picture.frame))
    frames = dict(film.frames([2, 6]))
    assert sorted(frames) == [2, 6]
    assert len(converted) == 2


# Training, through the command line


def test_a_run_writes_what_is_promised(trained):
    log = rows(trained)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [row["epoch"] for row in log] == [0, 0, 1, 1]
    for name in ("loss", "color", "switch", "concentration", "zeroed", "image", "image_accuracy", "cycle_accuracy"):
        assert all(math.isfinite(row[name]) for row in log), name
    assert math.isnan(log[0]["centre_x"])  # the phases: no box in the warm-up
    assert -1 <= log[3]["centre_x"] <= 1
    picture = cv2.imread(str(trained / "pictures" / "0000004.jpg"))
    assert picture.shape == (2 * 64, 4 * 64, 3)
    saved = torch.load(trained / "weights.pth", weights_only=True)
    assert "layer3.1.bn2.running_var" in saved["state_dict"]
    assert not any(name.startswith(("layer4", "fc", "backbone")) for name in saved["state_dict"])
    assert saved["meta"]["task"] == "uvc+"
    assert saved["meta"]["out_layer"] == "layer3"
    assert saved["meta"]["input"] == "lab_l"


@pytest.mark.parametrize("flags", [[], ["--model", "uvc+", "--localization", "none"]], ids=["track", "per-frame"])
def test_weights_go_into_propagate(trained, small_clip, tmp_path, cli, flags):
    """Recognised by what they are; with the authors' track settings and without boxes."""
    flags = [*flags, "--layer", "res3", "--size", "64", "--context", 2, "--end", 3, "--out", tmp_path]
    flags += ["--weights", trained / "weights.pth", "--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png"]
    code, _, err = cli(propagate, *flags)
    assert code == 0, err
    assert "recognised as uvc+" in err
    assert len(list((tmp_path / "masks").glob("*.png"))) == 3


def test_it_starts_from_given_weights(trained, videos, coders, tmp_path, cli):
    """One step of a tiny learning rate leaves them where they are; so does going on, without the files."""
    flags = [*SMALL, "--data", videos, "--lr", 1e-9, "--out", tmp_path / "out"]
    before = torch.load(trained / "weights.pth", weights_only=True)["state_dict"]
    before = {key: value for key, value in before.items() if "num_batches" not in key}  # as torchvision's files
    torch.save({f"module.{key}": value for key, value in before.items()}, tmp_path / "start.pth")
    for steps, inits, codes in ((1, tmp_path, coders), (2, tmp_path / "gone", tmp_path / "gone" / coders.name)):
        files = ["--autoencoder", codes, "--init", inits / "start.pth"]
        code, _, err = cli(uvc, *flags, *files, "--max-steps", steps)
        assert code == 0, err
        after = torch.load(tmp_path / "out" / "weights.pth", weights_only=True)["state_dict"]
        weights = [key for key in before if "running" not in key]
        assert weights and all(torch.allclose(before[key], after[key], atol=1e-6) for key in weights)
    code, _, err = cli(uvc, *flags, *files[:2], "--max-steps", 3)
    assert code == 2 and "--init" in err  # another start is another run


@pytest.mark.parametrize("prefix", ["module.", "module.encoder_q.", "net.", "backbone."])
def test_it_starts_from_files_of_all_trainings(prefix, tmp_path):
    """Released ones, MoCo's, last.pth of either script."""
    state = uvc.build_backbone(args()).state_dict()
    torch.save({"method": {prefix + key: value for key, value in state.items()}}, tmp_path / "w.pth")
    found = uvc.build_backbone(args(init=tmp_path / "w.pth", out=tmp_path)).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in state.items())


def test_resumed_is_the_same(trained, videos, coders, tmp_path, cli):
    """Stopped after one step, and after the warm-up, and gone on with: the weights of the run that was not."""
    flags = [*SMALL, "--data", videos, "--autoencoder", coders, "--image-objective", "rotation", *IMAGES]
    flags += ["--out", tmp_path]
    for steps in (1, 2, 3, 0):
        code, _, err = cli(uvc, *flags, "--max-steps", steps)
        assert code == 0, err
    old, new = (torch.load(out / "weights.pth", weights_only=True)["state_dict"] for out in (trained, tmp_path))
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    code, out, err = cli(uvc, *flags)
    assert code == 0, err
    assert "is at step 4 of 4, nothing is left to do" in out
    code, _, err = cli(uvc, *flags, "--temperature", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "--temperature 1.0, not 2.0" in err


def script(*flags, launcher=(sys.executable,)) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, ROOT / "train_uvc_plus.py", *SMALL, *flags]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_sigterm_leaves_a_checkpoint_to_go_on_from(videos, coders, tmp_path, cli):
    flags = ["--data", videos, "--autoencoder", coders, "--out", tmp_path, "--pairs-per-video", 8]
    process = script(*flags)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.csv").is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "the same command goes on" in err
    step = checkpoint(tmp_path)["step"]
    assert 0 < step < 32
    code, _, err = cli(uvc, *SMALL, *flags, "--max-steps", step + 1)
    assert code == 0, err
    assert checkpoint(tmp_path)["step"] == step + 1


def test_two_processes_are_one_with_two_parts(videos, tmp_path, cli):
    """Through the auto-encoder's stage and both phases: a batch shared out to processes, or cut into parts, has the
    same gradients (their running mean in Adam; weights would show only their signs)."""
    flags = ["--data", videos, "--image-objective", "rotation", *IMAGES, "--autoencoder-steps", 1, "--lr", 1e-9]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = script(*flags, "--out", tmp_path / "two", launcher=launcher)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    code, _, err = cli(uvc, *SMALL, *flags, "--out", tmp_path / "one", "--accumulate", 2)
    assert code == 0, err
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one["step"] == two["step"] == 4
    for i, state in one["optimizer"]["state"].items():
        expected, found = state["exp_avg"], two["optimizer"]["state"][i]["exp_avg"]
        assert (found - expected).norm() <= 0.01 * expected.norm(), i
    assert len(rows(tmp_path / "two")) == 4


@pytest.mark.parametrize("objective", ["moco", "imagenet", "none"])
def test_other_objectives_train(videos, coders, tmp_path, cli, objective):
    flags = ["--data", videos, "--autoencoder", coders, "--image-objective", objective, "--out", tmp_path / "out"]
    if objective != "none":
        flags += IMAGES
    if objective == "moco":
        flags += ["--queue", 64, "--image-grey", "--image-batch-size", 4]
    if objective == "imagenet":
        for i, name in enumerate("xy"):
            (tmp_path / "pictures" / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "pictures" / name / "1.png"), np.full((20, 30, 3), 200 * i, np.uint8))
        flags += ["--image-data", tmp_path / "pictures"]
    if objective == "none":
        flags += ["--coordinate", 0.1, "--legacy-align-corners"]
    code, _, err = cli(uvc, *SMALL, *flags, "--max-steps", 3)
    assert code == 0, err
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "out"))
    assert ("image" in rows(tmp_path / "out")[0]) == (objective != "none")


def test_workers_that_are_no_forks(videos, tmp_path):
    """As on macOS, and as on Linux from Python 3.14 on: workers get all that they need by pickle."""
    flags = ["--data", videos, "--autoencoder-steps", 1, "--image-objective", "moco", "--out", tmp_path]
    flags += [*IMAGES, "--queue", 4, "--workers", 2, "--max-steps", 1]
    code = "import multiprocessing as m, sys\nm.set_start_method('forkserver')\n"
    code += "m.set_forkserver_preload(['train_uvc_plus'])\n"
    code += "import common, train_uvc_plus as uvc; uvc.main(common.parse(uvc.Args, sys.argv[1:]))"
    command = [sys.executable, "-c", code, *(str(flag) for flag in (*SMALL, *flags))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_videos_and_pictures_share_the_workers(videos, coders, tmp_path, cli, monkeypatch):
    real, counts = train_finetune.DataLoader, []

    def loader(*samples, num_workers, **flags):
        counts.append(num_workers)
        return real(*samples, **flags)

    monkeypatch.setattr(train_finetune, "DataLoader", loader)
    flags = ["--data", videos, "--autoencoder", coders, "--image-objective", "rotation", *IMAGES]
    flags += ["--out", tmp_path]
    code, _, err = cli(uvc, *SMALL, *flags, "--max-steps", 1, "--workers", 4)
    assert code == 0, err
    assert counts == [2, 2]


def test_validation_propagates(videos, coders, small_clip, tmp_path, cli):
    """--validate scores the weights of the moment on a data set in DAVIS's layout."""
    root = tmp_path / "davis"
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("clip\n")
    (root / "JPEGImages" / "480p" / "clip").mkdir(parents=True)
    (root / "Annotations" / "480p").mkdir(parents=True)
    (root / "Annotations" / "480p" / "clip").symlink_to(small_clip / "truth")
    for t, frame in propagate.Video(small_clip / "clip.mp4").frames(range(12)):
        cv2.imwrite(str(root / "JPEGImages" / "480p" / "clip" / f"{t:05d}.jpg"), frame[..., ::-1])
    flags = ["--data", videos, "--autoencoder", coders, "--out", tmp_path / "out", "--validate", root]
    code, _, err = cli(uvc, *SMALL, *flags, "--epochs", 2, "--warmup-epochs", 2, "--validate-every", 1)
    assert code == 0, err
    assert "validation failed" not in err
    with (tmp_path / "out" / "validation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["0", "1"] and table[0] != table[1]
    assert all(0 < float(row["J&F_M"]) <= 100 for row in table)


def test_autoencoder_is_trained_first_and_kept(videos, tmp_path, cli):
    """Its error falls; it is used again by a resumed run and by another one."""
    root = tmp_path / "many"
    root.mkdir()
    for i in range(20):
        (root / f"{i}").symlink_to(videos / "ab"[i % 2])
    flags = ["--data", root, "--autoencoder-steps", 12, "--out", tmp_path / "out", "--max-steps", 1]
    code, out, err = cli(uvc, *SMALL, *flags)
    assert code == 0, err
    assert re.search(
        r"Lab auto-encoder: error loss \S+, L \S+, a \S+, b \S+ \(Lab units\) on 2 frames; learnt from 18 videos", out
    )
    errors = [row["loss"] for row in rows(tmp_path / "out" / "autoencoder")]
    assert np.mean(errors[-3:]) < np.mean(errors[:3])
    before = (tmp_path / "out" / "autoencoder" / "decoder.pth").stat().st_mtime_ns
    code, out, err = cli(uvc, *SMALL, *flags, "--max-steps", 2)
    assert code == 0, err
    assert "Lab auto-encoder" not in out
    assert (tmp_path / "out" / "autoencoder" / "decoder.pth").stat().st_mtime_ns == before
    few = ["--data", videos / "a", "--pairs-per-video", 2, "--autoencoder-steps", 1, "--max-steps", 1]
    code, out, err = cli(uvc, *SMALL, *few, "--out", tmp_path / "few")
    assert code == 0, err
    assert "on 1 frames; learnt from 1 videos" in out
    flags = ["--data", root, "--autoencoder", tmp_path / "out" / "autoencoder", "--out", tmp_path / "other"]
    code, _, err = cli(uvc, *SMALL, *flags, "--max-steps", 1)
    assert code == 0, err


# Bad input


def test_unreadable_videos_are_named_kept_and_skipped(videos, coders, tmp_path, cli):
    root = tmp_path / "data"
    root.mkdir()
    (root / "good").symlink_to(videos / "a")
    (root / "one").mkdir()
    cv2.imwrite(str(root / "one" / "0.png"), np.zeros((70, 70, 3), np.uint8))
    (root / "sizes").mkdir()
    for t in range(2):
        cv2.imwrite(str(root / "sizes" / f"{t}.png"), np.zeros((70 + t, 70, 3), np.uint8))
    (root / "cut").mkdir()
    for t in range(2):
        (root / "cut" / f"{t}.jpg").write_bytes((videos / "a" / "00000.jpg").read_bytes()[:500])
    (root / "broken.mp4").write_bytes(b"no film")
    (root / "empty.mkv").touch()
    with av.open(str(root / "sound.avi"), "w") as film:
        stream = film.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        film.mux(stream.encode(sound))
    flags = ["--data", root, "--autoencoder", coders, "--out", tmp_path / "out", "--pairs-per-video", 2]
    code, _, err = cli(uvc, *SMALL, *flags)
    assert code == 0, err
    kept = (tmp_path / "out" / "unreadable.txt").read_text()
    for name, why in (
        ("one", "one frame"),
        ("cut/0.jpg", "breaks off"),
        ("broken.mp4", "cannot be read as a film"),
        ("empty.mkv", "is empty"),
        ("sound.avi", "no video stream"),
    ):
        line = next(line for line in kept.splitlines() if f"/{name}:" in line)
        assert why in line
        assert line in err
    assert "sizes" in kept
    assert "good" not in kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--data", "{empty}"], "holds no videos"),
        ([], "--data is missing"),
        (["--data", "{videos}", "--crop", "100"], "--crop 100: give a multiple of 64"),
        (["--data", "{videos}", "--full", "64"], "--full 64: give a multiple of 8 above"),
        (["--data", "{videos}", "--warmup-epochs", "3"], "--warmup-epochs 3: give 0 to"),
        (["--data", "{videos}", "--amp", "bfloat16"], "--amp bfloat16: is too coarse"),
        (["--data", "{videos}", "--look-every", "0"], "--look-every 0: give 1 or more"),
        (["--data", "{videos}", "--crop", "4096", "--full", "8192"], "affinities of a pair take over 8 GiB"),
        (["--data", "{videos}", "--temperature", "0"], "--temperature 0.0: give a number above 0"),
        (["--data", "{videos}", "--lr", "-1"], "--lr -1.0: give a number above 0"),
        (["--data", "{videos}", "--short-side", "-5"], "--short-side -5: give 0 or more"),
        (["--data", "{videos}", "--threshold", "nan"], "--threshold nan: give 0 or more"),
        (["--data", "{videos}", "--image-size", "8"], "--image-size 8: give 64 or more"),
        (["--data", "{videos}", "--save-minutes", "nan"], "--save-minutes nan: give 0 or more"),
        (["--data", "{videos}", "--image-objective", "imagenet"], "needs --image-data ROOT"),
        (["--data", "{videos}", "--image-data", "x"], "--image-data x: is for an --image-objective"),
        (["--data", "{videos}", "--image-objective", "moco", "--image-data", "{empty}"], "holds no pictures"),
        (["--data", "{videos}", "--image-objective", "imagenet", "--image-data", "{videos}/a"], "has 0 folders"),
        (["--data", "{videos}", "--image-objective", "moco", "--queue", "63"], "--queue 63: give a multiple"),
        (["--data", "{videos}", "--autoencoder", "nowhere"], "--autoencoder nowhere: no such folder"),
        (["--data", "{videos}", "--autoencoder", "{empty}"], "0 files *encoder*.pth"),
        (["--data", "{videos}", "--autoencoder", "{swapped}"], "is not the encoder of UVC's Lab auto-encoder"),
        (["--data", "{videos}", "--batch-size", "6"], "--batch-size 6: there are"),
        (["--data", "{videos}", "--accumulate", "3"], "is no multiple of 3"),
        (["--data", "{videos}", "--image-weight", "0.5"], "--image-weight 0.5: is for an --image-objective"),
        (["--data", "{videos}", "--image-grey"], "--image-grey: is for an --image-objective, and none was given"),
        (["--data", "{videos}", "--image-size", "64"], "--image-size 64: is for an --image-objective"),
        (["--data", "{videos}", "--image-batch-size", "4"], "--image-batch-size 4: is for an --image-objective"),
        (["--data", "{videos}", "--queue", "64"], "--queue 64: is for --image-objective moco, not none"),
        (["--data", "{videos}", "--autoencoder", "{coders}", "--autoencoder-steps", "3"], "is given, not trained"),
        (["--data", "{videos}", "--image-objective", "moco", "--queue", "0"], "--queue 0: give 1 or more"),
        (["--data", "{videos}", "--autoencoder", "{coders}", "--seed", "-1"], "--seed -1: give 0 or more"),
        (["--data", "{videos}", "--init", "none.pth"], "none.pth: no such weights file"),
        (
            ["--data", "{videos}", "--init", "{default}", "--out-layer", "layer4"],
            "it lacks 25 of 100 entries, such as layer4.0.conv1.weight",
        ),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(flags, message, videos, coders, tmp_path, cli):
    (tmp_path / "empty").mkdir()
    (tmp_path / "swapped").mkdir()
    (tmp_path / "swapped" / "encoder.pth").symlink_to(coders / "my_decoder.pth")
    (tmp_path / "swapped" / "decoder.pth").symlink_to(coders / "my_encoder.pth")
    places = {"empty": tmp_path / "empty", "swapped": tmp_path / "swapped", "videos": videos, "coders": coders}
    places["default"] = ROOT / "weights" / "default.pth"
    flags = [flag.format(**places) for flag in flags]
    code, _, err = cli(uvc, *SMALL, "--out", tmp_path / "out", *flags)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


HUGE = str(10**12)
BAD_NUMBERS = {  # for each flag that is a number
    "max_steps": ("-1", "nan"),
    "accumulate": ("0", "-1", HUGE),
    "workers": ("-1", HUGE),
    "seed": ("-1", str(10**30)),
    "save_minutes": ("-1", "nan"),
    "validate_every": ("0", "-1"),
    "autoencoder_steps": ("0", "-1", "x"),
    "image_weight": ("-1", "nan", "inf"),
    "image_batch_size": ("0", "-1", HUGE),
    "image_size": ("0", "-1", HUGE),
    "queue": ("0", "-1", HUGE),
    "batch_size": ("0", "-1", HUGE),
    "epochs": ("0", "-1", HUGE),
    "warmup_epochs": ("-1", HUGE),
    "pairs_per_video": ("0", "-1", HUGE),
    "lr": ("0", "-1", "nan", "inf"),
    "crop": ("0", "-64", "65", HUGE, "64000000"),
    "full": ("0", "-64", "129", HUGE, "64000000"),
    "short_side": ("-1", "x", HUGE),
    "gap": ("0", "-1"),
    "temperature": ("0", "-1", "nan", "inf"),
    "threshold": ("-1", "nan"),
    "threshold_steps": ("-1", "x"),
    "color_switch": ("-1", "nan", "inf"),
    "concentration": ("-1", "nan", "inf"),
    "concentration_steps": ("-1", "x"),
    "coordinate": ("-1", "nan", "inf"),
    "look_every": ("0", "-1"),
}


def test_every_number_is_checked(videos, coders, tmp_path, cli):
    kinds = {field.name: str(field.type) for field in dataclasses.fields(uvc.Args)}
    numbers = {name for name, kind in kinds.items() if "int" in kind or ("float" in kind and "Literal" not in kind)}
    assert set(BAD_NUMBERS) == numbers
    flags = ["--data", videos, "--autoencoder", coders, "--image-objective", "moco", *IMAGES]
    flags += ["--out", tmp_path / "out"]
    for name, values in BAD_NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        for value in values:
            given = [value, value] if name == "threshold_steps" else [value]
            code, _, err = cli(uvc, *SMALL, "--queue", 64, *flags, flag, *given)
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and flag in err, (flag, value, err)
    assert not (tmp_path / "out").exists()


def test_every_path_is_checked(videos, coders, tmp_path, cli):
    """Nothing there, a file, a FIFO, a link to itself, an empty folder."""
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    kinds = {"none", "file", "fifo", "loop", "folder"}
    wrong = dict.fromkeys(("data", "autoencoder", "init", "image-data", "validate"), kinds)
    for flag, names in (wrong | {"out": {"file", "fifo", "loop"}}).items():
        for kind in sorted(names):
            flags = ["--data", videos, "--autoencoder", coders, "--image-objective", "rotation", *IMAGES]
            flags += ["--out", tmp_path / "o"]
            code, _, err = cli(uvc, *SMALL, *flags, f"--{flag}", tmp_path / kind)
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (flag, kind, err)
            assert str(tmp_path / kind) in err
    assert not (tmp_path / "o").exists()


def test_a_fifo_is_no_video(videos, coders, tmp_path, cli):
    """Nor a picture: reading it would wait for ever."""
    for name in ("data", "pictures"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good").symlink_to(videos / "a")
    os.mkfifo(tmp_path / "data" / "pipe.mp4")
    os.mkfifo(tmp_path / "pictures" / "pipe.jpg")
    flags = ["--data", tmp_path / "data", "--autoencoder", coders, "--out", tmp_path / "out", "--pairs-per-video", 2]
    flags += ["--image-objective", "rotation", *IMAGES, "--image-data", tmp_path / "pictures"]
    code, _, err = cli(uvc, *SMALL, *flags)
    assert code == 0, err
    assert "pipe.mp4: is no file" in err and "pipe.jpg: is no file" in err


def test_training_learns_on_real_frames(shared, tmp_path, cli):
    """A few steps on DAVIS train frames with the released auto-encoder: the colour loss falls."""
    root = shared / "data" / "DAVIS_train_256"
    flags = ["--data", root, "--autoencoder", shared / "weights", "--out", tmp_path, "--max-steps", 8, "--lr", 3e-4]
    code, _, err = cli(uvc, *SMALL, *flags, "--pairs-per-video", 2, "--epochs", 2, "--warmup-epochs", 1)
    assert code == 0, err
    losses = [row["color"] for row in rows(tmp_path)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
