"""CRW: Jabri, Owens and Efros, "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020).

Code: github.com/ajabri/videowalk, MIT. File: pretrained.pth there. Its convolutions pad by reflection. The context
begins with copies of the first frame, which is searched as a whole.
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
