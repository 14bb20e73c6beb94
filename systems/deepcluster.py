"""DeepCluster: Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features" (ECCV 2018).

Code: github.com/facebookresearch/deepcluster. File: vgg16/checkpoint.pth.tar of its authors, CC BY-NC 4.0. A VGG-16
with BatchNorm on the two derivatives of the grey picture (Sobel filters), whose weights are in the file.
"""

from collections import OrderedDict

from torch import nn

from common import STILL, Propagation, System, find_system


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
        **STILL,
        paper=50.7,
        build=build,
        keys=((r"^features\.module\.", "features."),),
        mark=r"^(module\.)?(features\.module|top_layer)\.",
        source="https://dl.fbaipublicfiles.com/deepcluster/vgg16/checkpoint.pth.tar",
        licence="CC BY-NC 4.0",
    ),
}
