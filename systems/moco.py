"""MoCo: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (CVPR 2020).

Code: github.com/facebookresearch/moco. File: moco_v2_800ep_pretrain.pth.tar of its authors (a ResNet-50), MIT (its
README: CC BY-NC 4.0). The paper's ResNet-18 was not released: train_finetune.py trains it.
Names in it: module.encoder_q. before torchvision's. The second encoder (encoder_k), the queue and the heads are not
used, as in the authors' own evaluation.
Settings: the paper's for still images, and its best on DAVIS (Table 6b). Its authors have no program for videos.
"""

from dataclasses import replace

from common import R18, R50, Propagation, System

SYSTEMS = {
    "moco": System(
        "resnet50",
        "momentum contrast v2, 800 epochs",
        Propagation(topk=5, temperature=1.0),  # circle of 12 cells, n = 20
        keys=((r"^encoder_q\.", ""),),
        mark=r"^(module\.)?encoder_q\." + R50,
        source="https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        digest="md5:a04e12f8",
        licence="MIT (its README: CC BY-NC 4.0)",
    ),
}
SYSTEMS["moco-r18"] = replace(
    SYSTEMS["moco"],
    arch="resnet18",
    about="momentum contrast",
    paper=62.7,
    mark=r"^(module\.)?encoder_q\." + R18,
    source="train_finetune.py makes them",
    digest="",
    licence="your own",
)
SYSTEMS["moco-r18-finetuned"] = replace(SYSTEMS["moco-r18"], about="momentum contrast, stride fine-tuned", mark="")
