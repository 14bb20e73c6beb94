"""CorrFlow: Lai and Xie, "Self-supervised Learning for Video Correspondence Flow" (BMVC 2019).

Code: github.com/zlai0/CorrFlow, no licence stated. File: the weights trained on OxUvA, a link to Google Drive.
Names in it: MAST's (by the same authors) behind module.; a file without module. is taken for MAST's: say --model.
Network: MAST's, of stride 4 with 64 channels. It sees RGB in 0..1 as it is.
Settings: benchmark.py. Labels come from the previous frame alone, out of a window of 13 x 13 cells, with the softmax
over the window (`window`, in systems/mast.py), and are carried as hard masks. It has no program for VIP and JHMDB.

On purpose not as theirs: their reader cuts columns at the right and fills both sides, so the mask moves by 3 pixels;
here frames are scaled to multiples of 8. It brings masks to the grid as means of ids, where two objects can give a
third; here labels are averaged, not ids. With labels carried as theirs, the masks are theirs, pixel by pixel; without,
98.3-99.9 % (benchmarks/systems.md).
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
