"""VFS: Xu and Wang, "Rethinking Self-supervised Correspondence Learning: A Video Frame-level Similarity Perspective"
(ICCV 2021).

Code: github.com/xvjiarui/VFS, Apache-2.0. Files: r18_nc_sgd_cos_100e_r2_1xNx8_k400-db1a4c0d.pth and
r50_nc_sgd_cos_100e_r5_1xNx2_k400-d7ce3ad0.pth of its releases.
Names in them: torchvision's; a file as trained has OpenMMLab's (backbone.layer1.0.conv1.conv.weight). Both are read.
Network: a ResNet-18 or -50 up to layer3.
Settings: its configurations for DAVIS; the ResNet-50 searches 18 cells far. There are none for VIP and JHMDB: sizes and
contexts are the paper's (Tables 7b and 8).

On purpose not as theirs: up to frame 20 their context has the first frame twice, so it weighs double; here it is there
once. With it twice, the masks are theirs, pixel by pixel; without, 99.66-99.98 % (benchmarks/systems.md). An object
that vanishes on the grid stays known, where theirs counts the objects on the grid.
"""

from dataclasses import replace

from common import R18, R50, Propagation, System

LINK = "https://github.com/xvjiarui/VFS/releases/download/v0.1-rc1/"


def mark(first: str) -> str:
    """With OpenMMLab's names of layers, or a file of its training (an entry "meta") with torchvision's."""
    return rf"^backbone\.{first.replace('.weight', '.conv.weight')}|^meta$(?s:.*)^{first}"


SYSTEMS = {
    "vfs": System(
        "resnet18",
        "frame-level similarity",
        Propagation(temperature=0.07, sampling="nearest", minmax=True),
        vip={"size": "560x560", "context": 8},
        jhmdb={"size": "240x240", "context": 4},
        paper=66.7,
        keys=(
            (r"^backbone\.", ""),
            (r"conv(\d)\.conv\.", r"conv\1."),
            (r"conv(\d)\.bn\.", r"bn\1."),
            (r"downsample\.conv\.", "downsample.0."),
            (r"downsample\.bn\.", "downsample.1."),
        ),
        mark=mark(R18),
        source=LINK + "r18_nc_sgd_cos_100e_r2_1xNx8_k400-db1a4c0d.pth",
        licence="Apache-2.0",
    ),
}
SYSTEMS["vfs-r50"] = replace(
    SYSTEMS["vfs"],
    arch="resnet50",
    settings=replace(SYSTEMS["vfs"].settings, radius=18),
    paper=None,
    mark=mark(R50),
    source=LINK + "r50_nc_sgd_cos_100e_r5_1xNx2_k400-d7ce3ad0.pth",
)
