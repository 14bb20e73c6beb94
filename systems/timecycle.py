"""TimeCycle: Wang, Jabri and Efros, "Learning Correspondence from the Cycle-consistency of Time" (CVPR 2019).

Code: github.com/xiaolonw/TimeCycle, no licence stated. File: checkpoint_14.pth.tar, a link to Google Drive. A 1 x 1
convolution to 512 channels and a ReLU come after layer3. The paper's ResNet-18 was not released.
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
