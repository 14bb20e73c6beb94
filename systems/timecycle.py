"""TimeCycle: Wang, Jabri and Efros, "Learning Correspondence from the Cycle-consistency of Time" (CVPR 2019).

Code: github.com/xiaolonw/TimeCycle, no licence stated. File: checkpoint_14.pth.tar, a link to Google Drive. The paper's
ResNet-18 was not released.
Names in it: encoderVideo. before torchvision's, and afterconv1; its kernels have an axis of time of length 1. The other
heads and layer4 are not used.
Network: a ResNet-50 up to layer3 at stride 8, then a 1 x 1 convolution to 512 channels and a ReLU. (The authors'
notebook that makes a plain ResNet-50 of it gives stride 16, and no such convolution: other features.)
Settings: run_test.sh for DAVIS at the paper's 480 x 480; VIP's are those of a script by an author of UVC.

On purpose not as theirs: their program predicts the annotated frame from itself, and uses the prediction, not the mask,
in frames 1 to 7. The mask goes to the network's size by nearest neighbour first; labels are taken at that size, and go
to full size by nearest neighbour, where ours go bilinearly. With these three as theirs, the masks are theirs, pixel by
pixel; without, 95.5-99.8 % (benchmarks/systems.md).
"""

from dataclasses import replace

from torch import nn

from common import R18, R50, Propagation, System


def head(channels: int) -> dict[str, nn.Module]:
    return {"afterconv1": nn.Conv2d(channels, 512, 1, bias=False), "relu1": nn.ReLU()}


SYSTEMS = {
    "timecycle": System(
        "resnet50",
        "cycle-consistency of time",
        Propagation(
            size="480x480",
            aggregation="per-frame",
            temperature=512**-0.5,
            topk=5,
            context=7,
            pad=True,
            carry="minmax",
            localization="none",
        ),
        vip={"size": "560x560", "topk": 20, "context": 1},
        jhmdb={"size": "320x320"},
        paper=48.2,
        head=lambda: head(1024),
        keys=((r"^encoderVideo\.", ""),),
        mark=r"^(module\.)?encoderVideo\." + R50,
        source="https://drive.google.com/file/d/1jKwP6qOoEFhhr9WFL_mfXvk0IHtElsmB (checkpoint_14.pth.tar)",
    ),
}
SYSTEMS["timecycle-r18"] = replace(
    SYSTEMS["timecycle"],
    arch="resnet18",
    paper=None,
    head=lambda: head(256),
    mark=r"^(module\.)?encoderVideo\." + R18,
    source="not released; https://github.com/xiaolonw/TimeCycle trains it",
)
