"""ImageNet classification: the supervised networks of torchvision, and the paper's after the stride change (4.2).

Files: resnet18-f37072fd.pth and resnet50-0676ba61.pth of torchvision (IMAGENET1K_V1, not the later recipe); no licence
is stated for the weights. Names: torchvision's; layer4 and fc are not used. The fine-tuned row is trained with
`train_finetune.py --objective imagenet --finetune FILE`.
Settings: the defaults, of which the paper gives the ranges (section 4.3) and benchmarks/tuning.md the choice.
"""

from dataclasses import replace

from common import System

LINK = "https://download.pytorch.org/models/"

SYSTEMS = {
    "imagenet": System(
        "resnet18",
        "ImageNet classification",
        paper=65.8,
        mark=r"^fc\.weight 1000x512$",
        source=LINK + "resnet18-f37072fd.pth",
    ),
    "imagenet-r50": System(
        "resnet50",
        "ImageNet classification",
        mark=r"^fc\.weight 1000x2048$",
        source=LINK + "resnet50-0676ba61.pth",
    ),
}
SYSTEMS["imagenet-finetuned"] = replace(
    SYSTEMS["imagenet"],
    about="ImageNet classification, stride fine-tuned",
    mark="",
    source="train_finetune.py makes them",
    licence="your own",
)
