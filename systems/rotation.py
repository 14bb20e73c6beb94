"""Rotation prediction: Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image
Rotations" (ICLR 2018), on a ResNet-18 as the paper trained it.

Not released for this network (github.com/gidariss/FeatureLearningRotNet has an AlexNet): train_finetune.py trains it.
Names in its file: torchvision's; fc has four rows, one a rotation, and is not used.
Settings: the paper's for still images, and its best on DAVIS (Table 6b). Its authors have no program for videos.
"""

from dataclasses import replace

from common import Propagation, System

SYSTEMS = {
    "rotation": System(
        "resnet18",
        "rotation prediction",
        Propagation(topk=5, temperature=1.0),  # circle of 12 cells, n = 20
        paper=62.3,
        mark=r"^fc\.weight 4x512$",
        source="train_finetune.py makes them",
        licence="your own",
    ),
}
SYSTEMS["rotation-finetuned"] = replace(SYSTEMS["rotation"], about="rotation prediction, stride fine-tuned", mark="")
