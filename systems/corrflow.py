"""CorrFlow: Lai and Xie, "Self-supervised Learning for Video Correspondence Flow" (BMVC 2019).

Code: github.com/zlai0/CorrFlow. File: the weights trained on OxUvA, a link to Google Drive. Licence: none stated.
The net is MAST's (by the same authors): stride 4, a slim layer4, 64 channels. Pictures are 0..1 as they are.
"""

from dataclasses import replace

from common import find_system

MAST = find_system("mast")

SYSTEMS = {
    "corrflow": replace(
        MAST,
        about="CorrFlow, grid 2x",
        paper=50.3,
        colours=None,
        # its reader cuts frames to multiples of 8; scaling them to that size instead moves no label
        settings=replace(
            MAST.settings,
            size="480/8",
            localization="window",
            radius=6,
            topk=13**2,
            context=1,
            memory="latest",
            keep_first=False,
        ),
        mark=r"^module\.feature_extraction\.conv1\.0\.weight",
        source="https://drive.google.com/file/d/1hBufOBoKmHWWKy2-BJObMbYrqDAUJrs7 (OxUvA weights)",
    ),
}
