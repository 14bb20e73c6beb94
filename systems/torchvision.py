"""torchvision:NAME, any ResNet or VGG of torchvision, with its first ImageNet weights (IMAGENET1K_V1).

Code: github.com/pytorch/vision, BSD-3; no licence is stated for the weights. The systems of the paper are networks of
torchvision as well: how these are built up to a layer, and how a released file is read into them, stands here. ResNets
are built without the package, as its import takes two seconds and 180 MiB.
"""

import hashlib
import re
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from common import (
    Encoder,
    Propagation,
    System,
    UserError,
    atomic,
    build_net,
    find_system,
    find_weights,
    fit,
    read_weights,
    recognise,
    system_files,
)

SYSTEMS = {}

# Blocks of each stage, groups, width, and the first digits of the SHA-256 of the weights
RESNETS = {
    "resnet18": ((2, 2, 2, 2), 1, 64, "f37072fd"),
    "resnet34": ((3, 4, 6, 3), 1, 64, "b627a593"),
    "resnet50": ((3, 4, 6, 3), 1, 64, "0676ba61"),
    "resnet101": ((3, 4, 23, 3), 1, 64, "63fe2227"),
    "resnet152": ((3, 8, 36, 3), 1, 64, "394f9c45"),
    "resnext50_32x4d": ((3, 4, 6, 3), 32, 4, "7cdf4587"),
    "resnext101_32x8d": ((3, 4, 23, 3), 32, 8, "8ba56ff5"),
    "resnext101_64x4d": ((3, 4, 23, 3), 64, 4, "173b62eb"),
    "wide_resnet50_2": ((3, 4, 6, 3), 1, 128, "95faca4d"),
    "wide_resnet101_2": ((3, 4, 23, 3), 1, 128, "32ee1156"),
}


def find(arch: str) -> System:
    """The row of torchvision:ARCH."""
    about = "ImageNet classification"
    if arch in RESNETS:
        url = f"https://download.pytorch.org/models/{arch}-{RESNETS[arch][-1]}.pth"
        return System(arch, about, Propagation(layer="res3"), build=build_resnet, load=load, source=url)
    import torchvision

    if not arch.startswith("vgg") or arch not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"--model torchvision:{arch}: torchvision has no ResNet or VGG of this name; take resnet34, vgg16, ..."
        )
    settings = Propagation(layer="last" if arch.startswith("vgg11") else "conv10")
    url = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url
    return System(arch, about, settings, build=build_vgg, load=load, source=url)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, or as a bottleneck 1 x 1, 3 x 3 and 1 x 1 (He et al., CVPR 2016)."""

    def __init__(self, into: int, planes: int, stride: int = 1, bottleneck: bool = False, groups: int = 1, width=64):
        super().__init__()
        inner, out = planes * width // 64 * groups, planes * (4 if bottleneck else 1)
        downsample = None
        if stride > 1 or into != out:
            downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        plain = [(into, out, 3), (out, out, 3)]
        convs = [(into, inner, 1), (inner, inner, 3), (inner, out, 1)] if bottleneck else plain
        reducing = 2 if bottleneck else 1  # which of them has the stride
        for i, (a, b, kernel) in enumerate(convs, 1):
            step, many = (stride if i == reducing else 1), (groups if kernel == 3 else 1)
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, groups=many, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(self.relu(y)))
        y += self.downsample(x) if self.downsample else x
        return self.relu(y)


def resnet(arch: str) -> nn.Sequential:
    """The whole network, its parts named as torchvision's and its random weights drawn in the same order."""
    depths, groups, width, _ = RESNETS[arch]
    bottleneck = arch not in ("resnet18", "resnet34")
    parts = OrderedDict(conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False), bn1=nn.BatchNorm2d(64), relu=nn.ReLU(inplace=True))
    parts["maxpool"], into = nn.MaxPool2d(3, 2, 1), 64
    for stage, depth in enumerate(depths, 1):
        planes, blocks = 32 * 2**stage, []
        for i in range(depth):
            stride = 2 if stage > 1 and i == 0 else 1
            blocks.append(Block(into, planes, stride, bottleneck, groups, width))
            into = planes * (4 if bottleneck else 1)
        parts[f"layer{stage}"] = nn.Sequential(*blocks)
    net = nn.Sequential(parts | {"fc": nn.Linear(into, 1000)})
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and not conv.weight.is_meta:  # there torch would import its compiler
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return net


def build_resnet(system: System, s: Propagation, net: nn.Module | None = None) -> nn.Module | None:
    """A ResNet up to s.layer, whose stages beyond s.stride no longer reduce (section 4.2); None if there is none such.
    net: the whole network, if it is there already."""
    parts = dict((net or resnet(system.arch)).named_children())  # conv1, bn1, ..., layer1, ...
    layer = "layer4" if s.layer == "last" else s.layer.replace("res", "layer")
    if layer not in parts:
        return None
    parts = dict(list(parts.items())[: list(parts).index(layer) + 1])
    reduction = 4
    if s.stride < 8:
        parts.pop("maxpool")
        reduction = 2
    for stage in (parts[name][0] for name in ("layer2", "layer3", "layer4") if name in parts):
        if reduction < s.stride:
            reduction *= 2
            continue
        for part in stage.modules():
            if isinstance(part, nn.Conv2d):
                part.stride = (1, 1)
            elif isinstance(part, nn.AvgPool2d):  # timm's shortcuts
                part.kernel_size = part.stride = 1
    if reduction != s.stride:
        return None
    net = nn.Sequential(OrderedDict(parts | (system.head() if s.layer == system.settings.layer else {})))
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and any(conv.padding):
            conv.padding_mode = system.padding
    return net


def build_vgg(system: System, s: Propagation) -> nn.Module | None:
    """A VGG up to the ReLU of the wanted convolution; the max-pools beyond the wanted stride are left out."""
    import torchvision

    with torch.device("meta"):  # the classifier, dropped here, has 10^8 weights
        features = torchvision.models.get_model(system.arch).features
    convs = [i for i, part in enumerate(features) if isinstance(part, nn.Conv2d)]
    number = len(convs) if s.layer == "last" else int(s.layer[4:]) if s.layer.startswith("conv") else 99
    if number > len(convs):
        return None
    stop = next(i for i in range(convs[number - 1], len(features)) if isinstance(features[i], nn.ReLU)) + 1
    features, reduction = features[:stop], 1
    for i, part in enumerate(features):
        if isinstance(part, nn.MaxPool2d) and reduction < s.stride:
            part.ceil_mode, reduction = True, reduction * 2  # a grid of ceil(side / stride), as ResNets have
        elif isinstance(part, nn.MaxPool2d):
            features[i] = nn.Identity()  # keeps the numbers of the layers after it
    if reduction != s.stride:
        return None
    return nn.Sequential(OrderedDict(features=features.to_empty(device="cpu")))


def fetch_weights(name: str) -> Path:
    """The released file of a system, fetched to torch hub's cache, with progress, and its hash checked."""
    system, hub = find_system(name), Path(torch.hub.get_dir()) / "checkpoints"
    link, path = system.source, hub / system.released
    if not re.fullmatch(r"https://\S+\.(pth|tar)", link):
        how = f"get them ({link}) and give --weights FILE"
        raise UserError(f"weights of {name}: neither in weights/ nor in {hub}; {how}")
    print(f"fetching the weights of {name} from {link} (licence: {system.licence})", file=sys.stderr)
    suffix = re.search(r"-([0-9a-f]{8})\.pth$", link)
    algorithm, _, digits = (system.digest or f"sha256:{suffix[1] if suffix else ''}").partition(":")
    try:
        with atomic(path) as part:  # torchrun's processes may all be at it
            torch.hub.download_url_to_file(link, str(part))
            got = hashlib.new(algorithm, part.read_bytes()).hexdigest()
            if not got.startswith(digits):
                raise UserError(f"its {algorithm} is {got[: len(digits)]}..., not {digits}...")
    except (UserError, OSError, RuntimeError) as error:
        how = f"download {link} to weights/ or give --weights FILE"
        raise UserError(f"weights of {name}: could not be fetched ({error}); {how}") from error
    return path


def load(name: str, weights: Path | None, settings: Propagation) -> Encoder:
    """The extractor of a system with the weights of its released file, or of the one given."""
    system, path = find_system(name), weights or find_weights(name) or fetch_weights(name)
    released, rest = read_weights(path)
    guess, state = recognise(released, rest), {}
    for key, value in released.items():
        key = key.removeprefix("module.")
        for pattern, replacement in system.keys:
            key = re.sub(pattern, replacement, key)
        state[key] = value.squeeze(2) if value.dim() == 5 else value  # convolutions over time of one frame
    with torch.device("meta"):  # no initial weights, the file has them
        net = build_net(system, settings)
    encoder = Encoder(net.to_empty(device="cpu"), settings, system)
    if why := fit(encoder.net, state):
        hint = "".join(module.hint(state) for module in system_files() if hasattr(module, "hint"))
        if guess and guess != name:
            hint = f"; it looks like {guess} ({find_system(guess).arch}): say --model {guess}"
        elif not hint and settings.layer in ("res4", "last") and "such as layer4." in why:
            hint = "; it ends at layer3: say --layer res3"
        elif not hint and path.name == "last.pth":
            hint = "; give weights.pth, beside it"
        elif " as well" in why:
            hint = "; a deeper network: say --model torchvision:NAME"
        raise UserError(f"{path}: does not fit {name} ({system.arch} up to {settings.layer}): {why}{hint}")
    if weights:
        wanted = encoder.net.state_dict()
        unused = Counter(key.split(".")[0] for key in state if key not in wanted)
        ignored = [*(f"{key} ({count})" for key, count in unused.items()), *map(str, rest)]
        what = f"recognised as {guess}" if guess else "names no system"
        what += f", used as {name}" if guess != name else ""
        print(f"note: {path}: {what}; ignored: {', '.join(ignored) or 'nothing'}", file=sys.stderr)
    return encoder
