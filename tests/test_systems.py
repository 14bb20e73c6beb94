"""Every system of systems/: a file with the released names, shapes and container gives the features of a plain second
implementation, from uint8 frames on. The weights are random: what is tested is the net, its input and the loading."""

import argparse
import copy
import functools
import hashlib
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import propagate
from common import Propagation, UserError, find_system, find_weights, load_encoder, preset, recognise, systems
from propagate import parse_with_model as parse

fetch_weights = importlib.import_module("systems.torchvision").fetch_weights

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

# ---------------------------------------------------------------------------------------------------------------------
# Random weights under torchvision's names


class Weights(dict):
    """name -> tensor, filled at random; every BatchNorm with statistics of its own."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def conv(self, name, out, into, k, bias=False):
        gain = math.sqrt(2 / (into * k * k))
        self[f"{name}.weight"] = torch.randn(out, into, k, k, generator=self.generator) * gain
        if bias:
            self[f"{name}.bias"] = torch.randn(out, generator=self.generator) * 0.1

    def norm(self, name, channels):
        for part, scale, shift in (("weight", 0.2, 0.8), ("bias", 0.1, 0), ("running_mean", 0.1, 0)):
            self[f"{name}.{part}"] = torch.randn(channels, generator=self.generator) * scale + shift
        self[f"{name}.running_var"] = torch.rand(channels, generator=self.generator) + 0.5
        self[f"{name}.num_batches_tracked"] = torch.tensor(7)


def resnet_weights(deep=False, stages=4, last=512):
    return copy.copy(make_resnet_weights(deep, stages, last))


@functools.cache
def make_resnet_weights(deep, stages, last):
    """A ResNet-18 (or -50) up to stage `stages`, the fourth `last` channels wide."""
    p = Weights()
    p.conv("conv1", 64, 3, 7)
    p.norm("bn1", 64)
    into = 64
    for s, blocks in enumerate((3, 4, 6, 3)[:stages] if deep else (2, 2, 2, 2)[:stages], 1):
        width = (64, 128, 256, last)[s - 1]
        out = width * 4 if deep else width
        for b in range(blocks):
            name = f"layer{s}.{b}"
            if deep:
                shapes = ((width, into, 1), (width, width, 3), (out, width, 1))
            else:
                shapes = ((width, into, 3), (width, width, 3))
            for i, (o, c, k) in enumerate(shapes, 1):
                p.conv(f"{name}.conv{i}", o, c, k)
                p.norm(f"{name}.bn{i}", o)
            if into != out:
                p.conv(f"{name}.downsample.0", out, into, 1)
                p.norm(f"{name}.downsample.1", out)
            into = out
    return p


# ---------------------------------------------------------------------------------------------------------------------
# The networks, written out


def conv(p, x, name, stride=1, padding=0, mode="constant"):
    x = F.pad(x, (padding,) * 4, mode=mode) if padding else x
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), stride)


def norm(p, x, name):
    mean, var, weight, bias = (
        p[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def resnet(p, x, stages=3, strides=(1, 2, 1, 1), pool=True, mode="constant"):
    """torchvision's ResNet up to a stage with other strides: the stage's is that of its first block."""
    x = norm(p, conv(p, x, "conv1", 2, 3, mode), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1) if pool else x
    for s in range(1, stages + 1):
        for b in range(next(b for b in range(9) if f"layer{s}.{b}.conv1.weight" not in p)):
            name, stride = f"layer{s}.{b}", strides[s - 1] if b == 0 else 1
            if f"{name}.conv3.weight" in p:
                y = norm(p, conv(p, x, f"{name}.conv1"), f"{name}.bn1").relu()
                y = norm(p, conv(p, y, f"{name}.conv2", stride, 1, mode), f"{name}.bn2").relu()
                y = norm(p, conv(p, y, f"{name}.conv3"), f"{name}.bn3")
            else:
                y = norm(p, conv(p, x, f"{name}.conv1", stride, 1, mode), f"{name}.bn1").relu()
                y = norm(p, conv(p, y, f"{name}.conv2", 1, 1, mode), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in p:
                x = norm(p, conv(p, x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = (x + y).relu()
    return x


VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg_weights(into=2):
    p, i = Weights(), 0
    for width in VGG:
        if width != "M":
            p.conv(f"features.{i}", width, into, 3, bias=True)
            p.norm(f"features.{i + 1}", width)
            into = width
        i += 1 if width == "M" else 3
    p["sobel.0.weight"], p["sobel.0.bias"] = torch.full((1, 3, 1, 1), 1 / 3), torch.zeros(1)
    rows = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    p["sobel.1.weight"], p["sobel.1.bias"] = torch.stack([rows, rows.T])[:, None], torch.zeros(2)
    return p


def deepcluster(p, x, last=30, skip=()):
    """Grey, Sobel, VGG-16-BN up to the ReLU after convolution `last` (an index of `features`)."""
    x = conv(p, x.mean(1, keepdim=True), "sobel.1", padding=1)
    i = 0
    for width in VGG:
        if width == "M":
            x = x if i in skip else F.max_pool2d(x, 2)
            i += 1
            continue
        x = norm(p, conv(p, x, f"features.{i}", padding=1), f"features.{i + 1}").relu()
        if i == last:
            return x
        i += 3


# ---------------------------------------------------------------------------------------------------------------------
# The inputs, from uint8 RGB frames B x H x W x 3, with OpenCV where the authors use it


def unit(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def rgb(frames):
    return (unit(frames) - MEAN[:, None, None]) / STD[:, None, None]


def lightness(frames):
    L = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2LAB)[..., 0] for frame in frames])
    x = (torch.from_numpy(L).float() - 128) / 128
    return ((x + 1) / 2)[:, None].expand(-1, 3, -1, -1).sub(MEAN[:, None, None]).div(STD[:, None, None])


def lab(frames):
    """CIE Lab by its definition, in float64."""
    x = frames.astype(np.float64) / 255
    x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    x = x @ to_xyz.T / [0.950456, 1, 1.088754]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    L, a, b = 116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])
    return torch.from_numpy(np.stack([(L - 50) / 50, a / 127, b / 127], 1)).float()


# ---------------------------------------------------------------------------------------------------------------------
# The files as released


def under(prefix, p, time=False):
    return {prefix + k: v[:, :, None] if time and v.dim() == 4 else v for k, v in p.items()}


def colour_names(p):
    """CorrFlow's and MAST's names."""
    out = {}
    for key, value in p.items():
        if not key.startswith("post"):
            key = "feature_extraction." + key
            key = (
                key.replace("n.conv1.", "n.conv1.0.").replace("n.bn1.", "n.conv1.1.").replace("downsample", "shortcut")
            )
            for i, part in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2")):
                blocks = [f"layer{s}.{b}." for s in range(1, 5) for b in range(2)]
                for block in blocks:
                    key = key.replace(f"{block}{part}.", f"{block}left.{i}.")
        out[key] = value
    return out


def crw_names(p):
    out = {}
    for key, value in p.items():
        if key.endswith(("conv1.weight", "conv2.weight")):
            key = key.removesuffix("weight") + "1.weight"
        out["encoder.model." + key] = value
    return out


def mm_names(p):
    """VFS as it is trained, in mmcv's names."""
    out = {}
    for key, value in p.items():
        head, _, rest = key.partition("downsample.")
        if rest:
            key = head + "downsample." + rest.replace("0.", "conv.").replace("1.", "bn.")
        else:
            for i in (1, 2, 3):
                key = key.replace(f"conv{i}.", f"conv{i}.conv.").replace(f"bn{i}.", f"conv{i}.bn.")
        out["backbone." + key] = value
    return out


def post(p):
    p.conv("post_convolution", 64, 256, 3, bias=True)
    return p


def after(p, into):
    p.conv("afterconv1", 512, into, 1)
    return p


R18, R50 = resnet_weights, lambda **stages: resnet_weights(True, **stages)


def unused(*shape):
    """An entry that nobody reads: of any shape, and four bytes on disk."""
    return torch.zeros(()).expand(shape)


def beyond(arch, *but):
    """The entries of torchvision's network that a system has no use for."""
    with torch.device("meta"):
        state = torchvision.models.get_model(arch).state_dict()
    return {key: unused(*value.shape) for key, value in state.items() if not key.startswith(("conv1", "bn1", *but))}


def after_layer3(arch, fc=True):
    return beyond(arch, "layer1", "layer2", "layer3", *(() if fc else ("fc",)))


def convolution(name, out, into, k):
    return {f"{name}.weight": unused(out, into, k, k), f"{name}.bias": unused(out)}


def linear(name, out, into):
    return {f"{name}.weight": unused(out, into), f"{name}.bias": unused(out)}


def optimizer(**group):
    state = {i: {"momentum_buffer": unused(64, 3, 7, 7)} for i in range(2)}
    return {"state": state, "param_groups": [{"lr": 0.03, "momentum": 0.9, **group, "params": [0, 1]}]}


def system(name):
    """(torchvision-named weights, the file's content, features of frames) of a system. The content has every entry of
    the released file, the training's own included: heads, second encoders, queues, optimisers, arguments."""
    arch = "resnet50" if name in ("moco", "timecycle") or name.endswith("-r50") else "resnet18"
    p = None if name == "deepcluster" else (R50 if arch == "resnet50" else R18)(stages=3)
    width = {"resnet18": 256, "resnet50": 1024}[arch]
    if name in ("imagenet", "imagenet-r50"):
        return p, p | after_layer3(arch), lambda f: F.normalize(resnet(p, rgb(f)))
    if name == "rotation":
        return p, p | after_layer3(arch, fc=False) | linear("fc", 4, 512), lambda f: F.normalize(resnet(p, rgb(f)))
    if name == "default":  # grey, layer2
        return p, {"state_dict": {**p}, "meta": {"task": name}}, lambda f: F.normalize(resnet(p, lightness(f), 2))
    if name.endswith("-finetuned"):  # train_finetune.py writes the name beside the weights
        state = p | after_layer3(arch, fc=False) | linear("fc", 4, 512)
        return p, {"state_dict": state, "meta": {"task": name}}, lambda f: F.normalize(resnet(p, rgb(f)))
    if name.startswith("moco"):
        head = linear("fc.0", 2 * width, 2 * width) | linear("fc.2", 128, 2 * width)
        query = p | after_layer3(arch, fc=False) | head
        state = under("module.encoder_q.", query) | under("module.encoder_k.", beyond(arch, "fc") | head)
        state |= {"module.queue": unused(128, 65536), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
        content = {"epoch": 800, "arch": arch, "state_dict": state, "optimizer": optimizer(nesterov=False)}
        return p, content, lambda f: F.normalize(resnet(p, rgb(f)))
    if name == "deepcluster":
        p = vgg_weights()
        state = {k.replace("features.", "features.module."): v for k, v in p.items()}
        state |= linear("classifier.0", 4096, 25088) | linear("classifier.3", 4096, 4096)
        state |= linear("top_layer", 10000, 4096)
        content = {"epoch": 500, "arch": "vgg16", "state_dict": state, "optimizer": optimizer(dampening=0)}
        return p, content, lambda f: F.normalize(deepcluster(p, rgb(f)))
    if name.startswith("timecycle"):
        after(p, width)
        video = {k: v for k, v in p.items() if not k.startswith("after")} | after_layer3(arch, fc=False)
        state = under("module.encoderVideo.", video, time=True)
        state |= {"module.afterconv1.weight": p["afterconv1.weight"][:, :, None]}
        state |= {f"module.afterconv{i}_trans.{k}": v for i in (3, 4) for k, v in convolution("0", 128, 512, 3).items()}
        state |= linear("module.linear1", 512, 900) | linear("module.linear2", 6, 512)
        return (
            p,
            {"epoch": 14, "state_dict": state},
            lambda f: F.normalize(conv(p, resnet(p, rgb(f)), "afterconv1").relu()),
        )
    if name in ("corrflow", "mast"):
        p = post(R18(last=256))
        state = under("module." if name == "corrflow" else "", colour_names(p))
        see = unit if name == "corrflow" else lab
        return (
            p,
            {"epoch": 1, "state_dict": state, "optimizer": optimizer(betas=(0.9, 0.999), amsgrad=False)},
            lambda f: conv(p, resnet(p, see(f), 4, pool=False), "post_convolution", padding=1),
        )
    if name in ("uvc", "uvc+"):
        p = R18()
        colours = {"conv1": (3, 3, 1), "conv2": (64, 3, 3), "conv3": (64, 64, 3), "conv4": (128, 64, 3)}
        colours |= {"conv5": (128, 128, 3), "conv6": (256, 128, 3), "downsample.1": (256, 256, 1)}
        picture = {"upsample.1": (256, 256, 1), "conv7": (128, 256, 3), "conv8": (128, 128, 3), "conv9": (64, 128, 3)}
        picture |= {"conv10": (64, 64, 3), "conv11": (3, 64, 3)}
        state = under("module.gray_encoder.", p)
        for part, layers in (("rgb_encoder", colours), ("decoder", picture)):
            for layer, shape in layers.items():
                state |= convolution(f"module.{part}.{layer}", *shape)
        state |= {"module.normalize.mean": unused(3), "module.normalize.std": unused(3)}
        return p, {"epoch": 29, "state_dict": state, "best_loss": 0.5}, lambda f: resnet(p, lightness(f), 4)
    if name == "crw":
        state = crw_names(p | after_layer3(arch, fc=False)) | linear("selfsim_fc.0", 128, 512)
        args = argparse.Namespace(lr=0.1, name="crw", lr_milestones=[20, 30], device="cuda")
        scheduler = {"milestones": {20: 1, 30: 1}, "gamma": 0.3, "base_lrs": [0.0001], "last_epoch": 24}
        rest = {"optimizer": optimizer(eps=1e-8), "lr_scheduler": scheduler, "epoch": 24, "args": args}
        return p, {"model": state, **rest}, lambda f: F.normalize(resnet(p, rgb(f), mode="reflect"))
    if name in ("vfs", "vfs-r50"):
        meta = {
            "epoch": 100,
            "iter": 93900,
            "mmaction_version": "0.6.0",
            "config": "model = dict(...)",
            "CLASSES": None,
        }
        state = p | after_layer3(arch, fc=False)
        return p, {"meta": meta, "state_dict": state}, lambda f: F.normalize(resnet(p, rgb(f)))
    raise AssertionError(name)


SYSTEMS = [name for name in systems() if name != "random"]
FRAMES = np.random.default_rng(0).integers(0, 256, (1, 40, 64, 3), dtype=np.uint8)


def same(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_released_file_gives_the_features_of_a_second_implementation(name, tmp_path, capsys):
    _, content, features = system(name)
    path = tmp_path / "released.pth.tar"
    torch.save(content, path)
    settings = replace(find_system(name).settings, size="full")
    encoder = load_encoder(name, path, settings, "cpu")
    with torch.inference_mode():
        got = encoder(torch.from_numpy(FRAMES))
    same(got, features(FRAMES))
    assert tuple(got.shape[2:]) == settings.grid(40, 64)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"recognised as {'uvc' if name == 'uvc+' else name}" in line


def test_vfs_as_trained(tmp_path):
    """Raw training checkpoints have mmcv's names and heads."""
    p = R18(stages=3)
    path = save(tmp_path / "raw.pth", {"state_dict": mm_names(p) | {"iteration": torch.zeros(())}, "meta": {}})
    assert recognise(*common.read_weights(path)) == "vfs"
    assert recognise(mm_names(R50(stages=3))) == "vfs-r50"
    with torch.inference_mode():
        got = load_encoder("vfs", path, Propagation(size="full"), "cpu")(torch.from_numpy(FRAMES))
    same(got, F.normalize(resnet(p, rgb(FRAMES))))


def test_conv13_keeps_stride_8_by_leaving_out_a_pool(tmp_path):
    p, content, _ = system("deepcluster")
    torch.save(content, tmp_path / "w.pth")
    settings = replace(find_system("deepcluster").settings, layer="conv13", size="full")
    with torch.inference_mode():
        got = load_encoder("deepcluster", tmp_path / "w.pth", settings, "cpu")(torch.from_numpy(FRAMES))
    same(got, F.normalize(deepcluster(p, rgb(FRAMES), last=40, skip=(33,))))


@pytest.mark.parametrize(
    ("changes", "net"),
    [
        ({"layer": "res2"}, {"stages": 2}),
        ({"layer": "res4"}, {"stages": 4}),
        ({"stride": 4}, {"pool": False}),
        ({"stride": 16}, {"strides": (1, 2, 2, 1)}),
        ({"l2": False}, {}),
    ],
    ids=str,
)
def test_layers_and_strides_of_a_resnet(changes, net, tmp_path):
    p = R18()
    torch.save(dict(p), tmp_path / "w.pth")
    settings = Propagation(**{"size": "full"} | changes)
    with torch.inference_mode():
        got = load_encoder("imagenet", tmp_path / "w.pth", settings, "cpu")(torch.from_numpy(FRAMES))
    expected = resnet(p, rgb(FRAMES), **net)
    same(got, F.normalize(expected) if settings.l2 else expected)
    assert tuple(got.shape[2:]) == settings.grid(40, 64)


def test_layers_that_a_network_does_not_have_are_refused():
    for name, changes in (("imagenet", {"layer": "conv10"}), ("imagenet", {"layer": "res2", "stride": 16})):
        with pytest.raises(UserError, match="--layer"):
            common.build_net(find_system(name), Propagation(**changes))
    with pytest.raises(UserError, match="--layer res3"):
        common.build_net(find_system("deepcluster"), Propagation())


# ---------------------------------------------------------------------------------------------------------------------
# Input


def colours(name, frames):
    """What the network of a system is given."""
    return common.Encoder(torch.nn.Identity(), Propagation(size="full", l2=False), find_system(name))(
        torch.from_numpy(frames)
    )


def test_lightness_is_opencvs_for_every_colour():
    """Each 17th level of red with all of green and blue: a million colours, without one difference."""
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    for red in range(0, 256, 17):
        frame = np.stack([np.full_like(green, red), green, blue], -1)[None]
        got = (colours("uvc", frame)[0, 0] * STD[0] + MEAN[0]) * 256
        assert torch.equal(got.round(), torch.from_numpy(cv2.cvtColor(frame[0], cv2.COLOR_RGB2LAB)[..., 0]).float())
        assert (got - got.round()).abs().max() < 1e-3


def test_spot_checks_of_the_colours():
    """L = 128 under UVC; white and black under MAST (models.md 1c)."""
    grey = next(
        g for g in range(256) if cv2.cvtColor(np.full((1, 1, 3), g, np.uint8), cv2.COLOR_RGB2LAB)[0, 0, 0] == 128
    )
    frame = np.full((1, 1, 1, 3), grey, np.uint8)
    assert colours("uvc", frame).flatten().tolist() == pytest.approx([0.0655, 0.1964, 0.4178], abs=1e-4)
    white = np.array([255, 0], np.uint8)[None, None, :, None].repeat(3, 3)
    assert (colours("mast", white)[0, :, 0].T - torch.tensor([[1.0, 0, 0], [-1, 0, 0]])).abs().max() < 1e-4


def test_lab_is_opencvs_to_its_interpolation():
    """OpenCV's float Lab interpolates a table: within 0.2 in L, 0.5 in a and b of the definition."""
    frame = np.random.default_rng(1).integers(0, 256, (1, 300, 300, 3), dtype=np.uint8)
    theirs = torch.from_numpy(cv2.cvtColor(frame[0].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)).permute(2, 0, 1)
    ours = (
        colours("mast", frame)[0] * torch.tensor([50.0, 127, 127])[:, None, None]
        + torch.tensor([50.0, 0, 0])[:, None, None]
    )
    difference = (ours - theirs).abs().amax((1, 2))
    assert (difference < torch.tensor([0.2, 0.5, 0.5])).all()


def test_lightness_after_resizing_is_of_whole_levels():
    """UVC resizes bytes: the resized picture is rounded before its lightness is taken."""
    settings = Propagation(size="32/16", l2=False)
    encoder = common.Encoder(torch.nn.Identity(), settings, find_system("uvc"))
    got = encoder(torch.from_numpy(FRAMES))
    assert got.shape[2:] == (32, 48) == settings.input_size(40, 64)
    small = F.interpolate(unit(FRAMES), size=(32, 48), mode="bilinear", antialias=True) * 255
    same(got, lightness(small.round().byte().permute(0, 2, 3, 1).contiguous().numpy()))


def test_a_size_in_both_directions_is_reached_as_opencv_does():
    """Protocols resize plainly (models.md, section 0); a short side is reached with anti-aliasing."""
    frame = np.random.default_rng(0).integers(0, 256, (1, 90, 120, 3), dtype=np.uint8)
    plain = cv2.resize(frame[0].astype(np.float32) / 255, (40, 40), interpolation=cv2.INTER_LINEAR)
    for size, equal in (("40x40", True), ("40", False)):
        encoder = common.Encoder(torch.nn.Identity(), Propagation(size=size, l2=False), find_system("corrflow"))
        got = encoder(torch.from_numpy(frame))[0, :, :40, :40].permute(1, 2, 0)
        assert (float((got - torch.from_numpy(plain)).abs().max()) < 1e-5) == equal


def test_grids_of_the_systems():
    """The grids of a 480 x 854 frame (models.md 1c), and rule-64."""
    grids = {"crw": (60, 107), "vfs": (60, 107), "uvc": (60, 104), "mast": (120, 214), "corrflow": (120, 212)}
    for name, grid in grids.items():
        assert find_system(name).settings.grid(480, 854) == grid
    assert preset("timm:vit_small_patch16_224.dino").grid(480, 854) == (30, 52)
    assert preset("timm:vit_small_patch8_224.dino").grid(480, 854) == (60, 104)
    dinov3 = preset("timm:vit_small_patch16_dinov3.lvd1689m")
    assert dinov3.grid(480, 854) == (60, 107) and (dinov3.temperature, dinov3.shape) == (0.2, "circle")
    uvc = find_system("uvc").settings
    assert uvc.input_size(480, 910) == (480, 896) and uvc.input_size(910, 480) == (896, 480)
    assert uvc.input_size(720, 1152) == (480, 768) and uvc.input_size(480, 480) == (480, 480)
    assert preset("uvc", "vip").input_size(480, 854) == (560, 560)
    assert preset("crw", "jhmdb").input_size(240, 320) == (320, 320)
    assert preset("uvc", "jhmdb").context == preset("uvc+", "jhmdb").context == 7


@pytest.mark.parametrize("name", ["imagenet", "deepcluster", "corrflow", "uvc", "crw"])
def test_the_grid_is_that_of_the_features_for_odd_frames(name):
    settings = find_system(name).settings
    net = common.build_net(find_system(name), settings).eval()
    encoder = common.Encoder(net, settings, find_system(name))
    with torch.inference_mode():
        for size in ((41, 67), (33, 90)):
            assert encoder(torch.zeros(1, *size, 3, dtype=torch.uint8)).shape[2:] == settings.grid(*size)


def test_half_precision_normalises_as_float32_does():
    """A cell where every ReLU is shut stays zero (0 / 0 would spread over the memory), and squares may pass 65504."""
    x = torch.tensor([[0.0, 0.0, 0.0], [3e-5, 4e-5, 0.0], [600.0, 0.0, 800.0]]).T.view(1, 3, 1, 3)
    net = torch.nn.Module()
    net.forward = lambda _: x.half()
    encoder = common.Encoder(net, Propagation()).half()
    features = encoder(torch.zeros(1, 8, 24, 3, dtype=torch.uint8))[0, :, 0].T
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.6, 0.0, 0.8]])
    assert features.dtype == torch.float16 and torch.allclose(features.float(), wanted, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def save(path, content):
    torch.save(dict(content), path)
    return path


def test_what_is_missing_or_of_the_wrong_shape_is_named(tmp_path):
    for name in ("crw", "timecycle-r18", "mast", "deepcluster"):
        _, content, _ = system(name)
        state = content.get("state_dict", content.get("model"))
        key = next(
            k
            for k in state
            if k.endswith(("layer2.0.bn2.weight", "layer2.0.left.4.weight", "features.module.17.weight"))
        )
        value = state.pop(key)
        with pytest.raises(UserError, match=r"does not fit .* lacks 1 of"):
            load_encoder(name, save(tmp_path / "w.pth", content), device="cpu")
        state[key] = value[:-1]
        with pytest.raises(UserError, match=r"(layer2|17)\.\S+ is \(\d+,.*\), not \(\d+,.*\)"):
            load_encoder(name, save(tmp_path / "w.pth", content), device="cpu")


def test_a_file_of_another_system_says_whose_it_is(tmp_path):
    path = save(tmp_path / "w.pth", system("crw")[1])
    with pytest.raises(UserError, match=r"looks like crw \(resnet18\): say --model crw"):
        load_encoder("imagenet", path, device="cpu")


def test_stripped_names_obey_the_model(tmp_path, capsys):
    """CorrFlow's net without `module.` is MAST's; bare ResNet names without fc are anyone's."""
    content = system("corrflow")[1]
    bare = {k.removeprefix("module."): v for k, v in content["state_dict"].items()}
    path = save(tmp_path / "w.pth", bare)
    assert recognise(*common.read_weights(path)) == "mast"
    encoder = load_encoder("corrflow", path, device="cpu")
    assert encoder.colours is None and not encoder.normalise
    assert "recognised as mast, used as corrflow" in capsys.readouterr().err
    path = save(tmp_path / "bare.pth", R18())
    assert recognise(*common.read_weights(path)) is None
    for name in ("imagenet", "vfs", "uvc"):
        load_encoder(name, path, device="cpu")
        assert f"names no system, used as {name}" in capsys.readouterr().err


def test_containers(tmp_path, capsys):
    """Old files without counters, DataParallel, DINO's teacher; what is not used is listed."""
    p = {k: v for k, v in R18(stages=3).items() if not k.endswith("num_batches_tracked")}
    for content in (p, {"state_dict": under("module.", p)}, {"model": p}, {"teacher": p, "student": {}}):
        load_encoder("imagenet", save(tmp_path / "w.pth", content), device="cpu")
    load_encoder("crw", save(tmp_path / "crw.pth", system("crw")[1]), device="cpu")
    assert "layer4 (30), selfsim_fc (2), optimizer, lr_scheduler, epoch, args" in capsys.readouterr().err


class Code:
    def __reduce__(self):
        return os.getcwd, ()


def test_code_in_a_file_is_refused_but_crws_arguments_are_not(tmp_path):
    with pytest.raises(UserError, match="refused"):
        load_encoder("imagenet", save(tmp_path / "w.pth", {**R18(stages=3), "code": Code()}))
    assert "args" in common.read_weights(save(tmp_path / "crw.pth", system("crw")[1]))[1]


def test_the_model_of_a_weights_file_sets_the_defaults(tmp_path):
    crw = str(save(tmp_path / "crw.pth", system("crw")[1]))
    args = parse(propagate.Args, ["--weights", crw, "--topk", "3"])
    assert args.model == "crw" and args.propagation == replace(find_system("crw").settings, topk=3)
    assert parse(propagate.Args, ["--weights", crw, "--model", "vfs"]).propagation == find_system("vfs").settings
    bare = str(save(tmp_path / "bare.pth", R18(stages=3)))
    assert parse(propagate.Args, ["--weights", bare]).model == "imagenet"
    own = str(save(tmp_path / "own.pth", {"state_dict": {**R18(stages=3)}, "meta": {"task": "torchvision:resnet18"}}))
    assert parse(propagate.Args, ["--weights", own]).model == "torchvision:resnet18"
    assert parse(propagate.Args, []).propagation == find_system("default").settings
    assert parse(propagate.Args, []).model == "default"
    assert preset("crw", "vip") == replace(find_system("crw").settings, size="560x560", context=4)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty working directory and torch hub cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    return tmp_path


def test_weights_are_looked_for_in_turn(nowhere):
    assert find_weights("crw") is None
    with pytest.raises(UserError, match=r"github.com/ajabri/videowalk .*--weights FILE"):
        fetch_weights("crw")
    for folder, file in (("hub/checkpoints", "resnet18-f37072fd.pth"), ("weights", "imagenet.pth")):
        (nowhere / folder).mkdir(parents=True)
        (nowhere / folder / file).touch()
        assert find_weights("imagenet").name == file


def test_what_is_fetched_is_checked(nowhere, monkeypatch):
    links = []

    def download(link, path, *_, **__):
        links.append(link)
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for name in ("imagenet", "moco", "vfs"):
        with pytest.raises(UserError, match=r"its (sha256|md5) is"):
            fetch_weights(name)
    assert links[0].endswith("resnet18-f37072fd.pth") and not list((nowhere / "hub/checkpoints").iterdir())
    digest = "md5:" + hashlib.md5(b"weights").hexdigest()[:8]
    monkeypatch.setitem(
        importlib.import_module("systems.moco").SYSTEMS, "moco", replace(find_system("moco"), digest=digest)
    )
    assert fetch_weights("moco").read_bytes() == b"weights"
    assert fetch_weights("deepcluster").name == "deepcluster.pth"  # its link names no hash


# ---------------------------------------------------------------------------------------------------------------------
# Other networks


@pytest.mark.parametrize(
    ("arch", "layer"), [("resnet34", "res3"), ("resnet101", "res2"), ("vgg11", "last"), ("vgg19_bn", "conv10")]
)
def test_torchvision(arch, layer, tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.get_model(arch, weights=None).eval()
    path = save(tmp_path / "w.pth", {k: v for k, v in net.state_dict().items() if "classifier" not in k})
    settings = replace(preset(f"torchvision:{arch}"), layer=layer, size="full")
    with torch.inference_mode():
        got = load_encoder(f"torchvision:{arch}", path, settings, "cpu")(torch.from_numpy(FRAMES))
        if "resnet" in arch:
            same(got, F.normalize(resnet(net.state_dict(), rgb(FRAMES), int(layer[3:]))))
        else:
            stop, pools = {"vgg11": (20, (15,)), "vgg19_bn": (33, ())}[arch]  # 20, 33: after the ReLU of the layer
            x = rgb(FRAMES)
            for i, part in enumerate(net.features[:stop]):
                x = x if i in pools else part(x)
            same(got, F.normalize(x))


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_resnets_are_torchvisions(arch):
    """The same random weights from the same seed, the same features, the same file."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch, weights=None).eval()
    torch.manual_seed(0)
    ours = importlib.import_module("systems.torchvision").resnet(arch).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    x = y = rgb(FRAMES)
    with torch.inference_mode():
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x, y = getattr(ours, name)(x), getattr(theirs, name)(y)
    assert torch.equal(x, y)
    assert find_system(f"torchvision:{arch}").source == torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("crw", "pretrained.pth"),
        ("uvc", "checkpoint_latest.pth.tar"),
        ("timecycle", "checkpoint_14.pth.tar"),
        ("imagenet", "resnet18-f37072fd.pth"),
        ("deepcluster", "deepcluster.pth"),  # released as checkpoint.pth.tar, which says nothing
        ("mast", "mast.pth"),
        ("corrflow", "corrflow.pth.tar"),
        ("uvc+", "uvc+.pth"),
    ],
)
def test_weights_are_found_under_their_released_name_or_the_models(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert find_weights(name) is None
    Path("weights").mkdir()
    (Path("weights") / file).touch()
    assert find_weights(name) == Path("weights") / file


def test_a_resnet_is_built_without_torchvision(tmp_path):
    """Its import takes two seconds and 180 MiB."""
    path = save(tmp_path / "w.pth", R18(stages=3))
    code = f"import sys, common; common.load_encoder('imagenet', {str(path)!r}, device='cpu')\n"
    code += "assert 'torchvision' not in sys.modules and 'torch._dynamo' not in sys.modules"
    root = Path(propagate.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_names_that_are_not_known_are_refused():
    for name in ("nonsense", "torchvision:alexnet", "torchvision:nonsense", "timm:"):
        with pytest.raises(UserError, match=r"model|unknown"):
            load_encoder(name)


def test_names_are_known_in_any_case_and_a_slip_is_guessed(tmp_path):
    assert find_system("CRW") is find_system("crw") and find_system("UVC+") is find_system("uvc+")
    path = str(save(tmp_path / "w.pth", system("crw")[1]))
    assert parse(propagate.Args, ["--model", "CRW", "--weights", path]).model == "crw"
    assert parse(propagate.Args, ["--model", "CRW"]).propagation == find_system("crw").settings
    for slip, name in (("image-net", "imagenet"), ("Time-Cycle", "timecycle"), ("dafault", "default")):
        with pytest.raises(UserError, match=rf"unknown model '{slip.lower()}': did you mean {name}\? choose one of"):
            find_system(slip)
    with pytest.raises(UserError, match="unknown model 'nonsense': choose one of"):
        find_system("nonsense")


def test_a_system_is_a_file(tmp_path):
    """One more file in systems/ is one more model of every script; a name imports its own file alone."""
    root = Path(propagate.__file__).parent
    shutil.copytree(root / "systems", tmp_path / "systems", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("common.py", "propagate.py"):
        shutil.copy(root / file, tmp_path)
    row = 'SYSTEMS = {"mine-r18": System("resnet18", "my own", paper=12.3, source="my disk", licence="my own")}\n'
    (tmp_path / "systems" / "mine.py").write_text("from common import System\n\n" + row)
    code = (
        "import sys, common, propagate\n"
        "loaded = lambda: sorted(name for name in sys.modules if name.startswith(('systems.', 'torchvision')))\n"
        "assert common.find_system('crw').padding == 'reflect' and loaded() == ['systems.crw'], loaded()\n"
        "assert common.find_system('mine-r18').paper == 12.3\n"
        "assert loaded() == ['systems.crw', 'systems.mine'], loaded()\n"
        "common.build_net(common.find_system('mine-r18'), common.Propagation())\n"
        "propagate.list_models()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("mine-r18 "))
    assert "resnet18 res3, L2" in line and "12.3" in line and "not here: my disk; licence: my own" in line


def test_timm_vit(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    arch = "vit_tiny_patch16_224"
    vit = timm.create_model(arch, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    head = linear("module.head.mlp.0", 2048, 192) | {"module.head.last_layer.weight_v": unused(65536, 256)}
    both = {"teacher": under("module.backbone.", vit.state_dict()) | head, "student": {}, "optimizer": optimizer()}
    path = save(tmp_path / "dino.pth", both | {"epoch": 800, "args": argparse.Namespace(arch=arch), "dino_loss": {}})
    settings = replace(preset(f"timm:{arch}"), size="full")
    assert settings.stride == 16 and settings.layer == "last"
    with torch.inference_mode():
        got = load_encoder(f"timm:{arch}", path, settings, "cpu")(torch.from_numpy(FRAMES))
        mean, std = (torch.tensor(vit.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
        x = F.interpolate(unit(FRAMES), size=(48, 64), mode="bilinear")  # 40 is rounded up to whole patches
        tokens = vit.forward_features((x - mean) / std)[:, 1:]
    same(got, F.normalize(tokens.transpose(1, 2).reshape(1, -1, 3, 4)))
    assert settings.grid(40, 64) == (3, 4)
    with pytest.raises(UserError, match="--stride 8"):
        load_encoder(f"timm:{arch}", path, replace(settings, stride=8), "cpu")
    with pytest.raises(UserError, match="does not fit"):
        load_encoder(f"timm:{arch}", save(tmp_path / "w.pth", R18(stages=3)), settings, "cpu")


@torch.inference_mode()
def test_dino_sees_what_its_own_script_gives_it(tmp_path):
    """Its deviation of red, and its position embeddings: 14 x 14 to the grid by (side + 0.1) / 14, bicubic, plain."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    arch = "vit_small_patch16_224.dino"
    vit = timm.create_model(arch, pretrained=False, num_classes=0).eval()
    vit.pos_embed.normal_()
    path = save(tmp_path / "dino_deitsmall16_pretrain.pth", vit.state_dict())
    settings = replace(preset(f"timm:{arch}"), size="full")
    encoder = load_encoder(f"timm:{arch}", path, settings, "cpu")
    frames = np.random.default_rng(0).integers(0, 256, (1, 160, 256, 3), dtype=np.uint8)
    x = (unit(frames) - MEAN[:, None, None]) / torch.tensor([0.228, 0.224, 0.225])[:, None, None]
    x = F.conv2d(x, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=16).flatten(2).transpose(1, 2)
    places = vit.pos_embed[:, 1:].reshape(1, 14, 14, 384).permute(0, 3, 1, 2)
    places = F.interpolate(places, scale_factor=(10.1 / 14, 16.1 / 14), mode="bicubic").flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token, x], 1) + torch.cat([vit.pos_embed[:, :1], places], 1)
    tokens = vit.norm(vit.blocks(x))[:, 1:].transpose(1, 2)
    same(encoder(torch.from_numpy(frames)), F.normalize(tokens.unflatten(2, (10, 16))))
    square = torch.from_numpy(frames[:, :, :160]).repeat(1, 2, 2, 1)[:, :224, :224]
    assert encoder(square).shape == (1, 384, 14, 14)  # its own size: no resampling


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
@torch.inference_mode()
def test_the_files_of_dinov2_and_dinov3_as_they_are_released(family, tmp_path, capsys):
    """Their own names: register_tokens with a place of their own for the class token; storage_tokens, ls1.gamma."""
    timm = pytest.importorskip("timm")
    names = {"dinov2": "vit_small_patch14_reg4_dinov2.lvd142m", "dinov3": "vit_small_patch16_dinov3.lvd1689m"}
    torch.manual_seed(0)
    vit = timm.create_model(names[family], pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    for parameter in vit.parameters():
        parameter.normal_(std=0.05)
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    if family == "dinov2":
        released = {"register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 384)}
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], 1)
    else:
        released = {"storage_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 384)}
        released |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * 384) for i in range(12)}
        state = {re.sub(r"gamma_(\d)", r"ls\1.gamma", key): value for key, value in state.items()}
    path = save(tmp_path / "released.pth", state | released)
    settings = replace(preset(f"timm:{names[family]}"), size="full", upsample=1)
    got = load_encoder(f"timm:{names[family]}", path, settings, "cpu")(torch.from_numpy(FRAMES))
    size = [settings.stride * math.ceil(side / settings.stride) for side in (40, 64)]
    mean, std = (torch.tensor(vit.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    x = F.interpolate(unit(FRAMES), size=size, mode="bilinear")
    tokens = vit.forward_features((x - mean) / std)[:, 5:].transpose(1, 2)
    same(got, F.normalize(tokens.unflatten(2, settings.grid(40, 64))))
    assert capsys.readouterr().out == ""


def test_timm_resnet(tmp_path):
    pytest.importorskip("timm")
    p = R18()
    path = save(tmp_path / "w.pth", p)
    with torch.inference_mode():
        got = load_encoder("timm:resnet18", path, Propagation(size="full"), "cpu")(torch.from_numpy(FRAMES))
    same(got, F.normalize(resnet(p, rgb(FRAMES))))
    for name in ("timm:nonsense", "timm:mixer_b16_224"):
        with pytest.raises(UserError, match="timm:"):
            load_encoder(name, path)


def test_timm_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        load_encoder("timm:resnet18")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_list_models(nowhere, cli):
    (nowhere / "weights").mkdir()
    (nowhere / "weights" / "crw.pth").touch()
    lines = cli(propagate, "--list-models")[1].splitlines()
    rows = {line.split()[0]: line for line in lines[1:]}
    assert set(systems()) <= set(rows)
    assert "67.5" in rows["crw"] and "found: weights/crw.pth" in rows["crw"] and "MIT" in rows["crw"]
    assert "res4, post_convolution" in rows["mast"] and "drive.google.com" in rows["mast"]


@pytest.mark.parametrize("name", ["crw", "uvc", "mast"])
def test_weights_alone_run_the_system(name, tmp_path, cli):
    """--weights FILE is enough: the system is recognised and propagates as its authors do."""
    rng = np.random.default_rng(0)
    for t in range(3):
        cv2.imwrite(str(tmp_path / f"{t}.png"), cv2.resize(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8), (96, 64)))
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 24:72] = 1
    propagate.write_mask(tmp_path / "masks" / "0.png", mask)
    path = save(tmp_path / "w.pth", system(name)[1])
    out = tmp_path / "out"
    flags = ("--video", tmp_path / "[0-9].png", "--weights", path, "--out", out, "--device", "cpu")
    code, _, said = cli(propagate, *flags, "--mask", tmp_path / "masks" / "0.png")
    assert code == 0, said
    assert f"recognised as {name}" in said and len(list((out / "masks").iterdir())) == 3
    if name == "uvc":
        (tmp_path / "points.csv").write_text("id,x,y\na,30,30\n")
        code, _, said = cli(propagate, *flags, "--overwrite", "--points", tmp_path / "points.csv")
        assert code == 2 and "error: --localization track" in said


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("resnet34", "it has layer1.2.conv1.weight as well; a deeper network: say --model torchvision:NAME"),
        ("dino", "it is a ViT: say --model timm:vit_small_patch8_224.dino"),
        ("dinov2", "it is a ViT: say --model timm:vit_base_patch14_dinov2.lvd142m"),
        ("dinov3", "it is a ViT: say --model timm:vit_large_patch16_dinov3.lvd1689m"),
    ],
)
def test_files_of_other_networks_are_refused_with_what_they_are(file, message, tmp_path):
    """ResNet-34 begins as ResNet-18 does: its file would otherwise load, and be half used."""
    state = torchvision.models.resnet34().state_dict()
    if file != "resnet34":
        width, patch = {"dino": (384, 8), "dinov2": (768, 14), "dinov3": (1024, 16)}[file]
        state = {"patch_embed.proj.weight": torch.zeros(width, 3, patch, patch)}
        state |= {"storage_tokens": torch.zeros(1, 4, width)} if file == "dinov3" else {}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(UserError, match=re.escape(message)):
        common.load_encoder("imagenet", tmp_path / "file.pth")


def test_uvcs_first_boxes_are_those_of_the_mask_at_the_networks_input_size():
    """To the pixel (models.md 3.4, step 1), where the labels on the grid would give them to the cell."""
    uvc = importlib.import_module("systems.uvc")
    mask = np.zeros((96, 160), np.uint8)
    mask[30:53, 41:98], mask[60:61, 9:12] = 1, 2  # the second is between the middles of the cells: not on the grid
    settings = replace(find_system("uvc").settings, size="64x96")
    labels = propagate.labels_from_mask(torch.from_numpy(mask), [1, 2], (8, 12), "nearest")
    small = np.array(Image.fromarray(mask).resize((96, 64), Image.Resampling.NEAREST))
    boxes = uvc.label_boxes(labels, settings, mask=torch.from_numpy(mask))
    assert boxes[0].tolist() == [0, 12, 0, 8]
    for number in (1, 2):
        y, x = np.nonzero(small == number)
        grown = []
        for low, high, end in ((x.min(), x.max(), 96), (y.min(), y.max(), 64)):
            more = 0.3 * (high - low)
            grown += [max(math.floor(low - more), 0) // 8, min(math.ceil(high + more), end) // 8]
        assert boxes[number].tolist() == grown
    assert not labels[2].any() and np.isnan(uvc.label_boxes(labels, settings)[2]).all()


def test_the_mask_of_an_annotated_frame_reaches_uvcs_boxes(monkeypatch):
    seen = []

    def spy(target, features, labels, settings, annotated, ages, boxes, share):
        seen.append([each[1].tolist() for each in boxes])
        return labels[0]

    module, settings = importlib.import_module("systems.uvc"), replace(find_system("uvc").settings, size="64x96")
    monkeypatch.setitem(module.SYSTEMS, "uvc", replace(find_system("uvc"), localize=spy))
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[16:32, 17:47] = 1
    first = torch.ones(3, 8, 12), propagate.labels_from_mask(mask, [1], (8, 12), "nearest")
    for item, box in (((*first, mask), [1, 6, 1, 4]), (first, [0, 7, 1, 4])):
        seen.clear()
        list(propagate.propagate_video(torch.ones(2, 3, 8, 12), [item], settings))
        assert [boxes[0] for boxes in seen] == [box, box]
