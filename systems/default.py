"""The weights that come with this project: UVC+ with rotation, trained by its own scripts (weights/README.md). MIT."""

from common import Propagation, System, find_system

SYSTEMS = {
    "default": System(
        "resnet18",
        "UVC+ with rotation, trained with this project",
        Propagation(layer="res2", temperature=0.01),  # chosen on DAVIS train sequences, weights/README.md
        colours=find_system("uvc").colours,
        source="a part of this project: weights/default.pth",
        licence="MIT",
    ),
}
