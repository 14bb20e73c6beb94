"""torchvision:NAME, any ResNet or VGG of torchvision with its ImageNet weights. BSD-3; none is stated for weights."""

import re
from collections import OrderedDict

import torch
import torchvision
from torch import nn

from common import STILL, Propagation, System, UserError, unfit

SYSTEMS = {}


def find(arch: str) -> System:
    """The row of torchvision:ARCH."""
    known = re.match(r"(wide_)?resne|vgg", arch) and arch in torchvision.models.list_models(torchvision.models)
    if not known:
        raise UserError(
            f"--model torchvision:{arch}: torchvision has no ResNet or VGG of this name; take resnet34, vgg16, ..."
        )
    layer = "res3" if "resne" in arch else "last" if arch.startswith("vgg11") else "conv10"
    url = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url
    build = build_vgg if arch.startswith("vgg") else None
    return System(arch, "ImageNet classification", Propagation(layer=layer), **STILL, build=build, source=url)


def build_vgg(system: System, s: Propagation) -> nn.Module:
    """A VGG up to the ReLU of the wanted convolution; the max-pools beyond the wanted stride are left out."""
    with torch.device("meta"):  # the classifier, dropped here, has 10^8 weights
        features = torchvision.models.get_model(system.arch).features
    convs = [i for i, part in enumerate(features) if isinstance(part, nn.Conv2d)]
    number = len(convs) if s.layer == "last" else int(s.layer[4:]) if s.layer.startswith("conv") else 99
    if number > len(convs):
        raise unfit(system, s)
    stop = next(i for i in range(convs[number - 1], len(features)) if isinstance(features[i], nn.ReLU)) + 1
    features, reduction = features[:stop], 1
    for i, part in enumerate(features):
        if isinstance(part, nn.MaxPool2d) and reduction < s.stride:
            part.ceil_mode, reduction = True, reduction * 2  # a grid of ceil(side / stride), as ResNets have
        elif isinstance(part, nn.MaxPool2d):
            features[i] = nn.Identity()  # keeps the numbers of the layers after it
    if reduction != s.stride:
        raise unfit(system, s)
    return nn.Sequential(OrderedDict(features=features.to_empty(device="cpu")))
