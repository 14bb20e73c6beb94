"""CRW: Jabri, Owens and Efros, "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020).

Code: github.com/ajabri/videowalk, MIT. File: pretrained.pth there.
Names in it: encoder.model. before torchvision's; a convolution behind a padding layer has one more ".1". Its layer4 and
selfsim_fc are not used.
Network: a ResNet-18 up to layer3, whose convolutions pad by reflection.
Settings: the README's for DAVIS (temperature 0.05, not the script's 0.07). The context begins with copies of the first
frame, which is searched as a whole. The repository has none for VIP and JHMDB: these are the paper's size and context.

With the same weights, the masks are those of their test.py, pixel by pixel (benchmarks/systems.md).
On purpose not as theirs: on VIP their reader mixes the ids of neighbouring objects bilinearly, so that classes appear
that nobody drew; ids are never mixed here. No files of labels are kept beside the annotations.
"""

from common import Propagation, System

SYSTEMS = {
    "crw": System(
        "resnet18",
        "contrastive random walk",
        Propagation(exempt_first=True, pad=True),
        vip={"size": "560x560", "context": 4},
        jhmdb={"size": "320x320", "context": 7},
        paper=67.5,
        padding="reflect",
        keys=((r"^encoder\.model\.", ""), (r"(conv[12])\.1\.weight$", r"\1.weight")),
        mark=r"^(module\.)?encoder\.model\.conv1\.",
        source="https://github.com/ajabri/videowalk (pretrained.pth)",
        licence="MIT",
    ),
}
