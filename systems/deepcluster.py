"""DeepCluster: Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features" (ECCV 2018).

Code: github.com/facebookresearch/deepcluster. File: vgg16/checkpoint.pth.tar of its authors, CC BY-NC 4.0.
Names in it: features.module. before torchvision's numbers, and sobel. The classifier and the top_layer are not used.
Network: a VGG-16 with BatchNorm up to conv10, on the two derivatives of the grey picture; these filters (Sobel) are in
the file. The grey picture is the mean of the three channels after ImageNet's mean and deviation.
Settings: the paper's (Table 2: per-frame, k = 5, n = 7), which leaves the temperature open: that of ImageNet is taken.
Its authors have no program for videos.
"""

from collections import OrderedDict

from torch import nn

from common import Propagation, System, find_system


def build(system: System, settings: Propagation) -> nn.Module | None:
    """The VGG behind its two filters: grey, then the derivatives along x and y."""
    vgg = find_system("torchvision:vgg16_bn").build(system, settings)
    if vgg is None:
        return None
    features = vgg.features
    features[0] = nn.Conv2d(2, 64, 3, padding=1)
    sobel = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1))
    return nn.Sequential(OrderedDict(sobel=sobel, features=features))


SYSTEMS = {
    "deepcluster": System(
        "vgg16_bn",
        "DeepCluster",
        Propagation(
            layer="conv10",
            aggregation="per-frame",
            temperature=0.025,
            topk=5,
            context=7,
            localization="none",
            minmax=True,
        ),
        paper=50.7,
        build=build,
        keys=((r"^features\.module\.", "features."),),
        mark=r"^(module\.)?(features\.module|top_layer)\.",
        source="https://dl.fbaipublicfiles.com/deepcluster/vgg16/checkpoint.pth.tar",
        file="deepcluster.pth",
        licence="CC BY-NC 4.0",
    ),
}
