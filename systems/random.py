"""A ResNet-18 with random weights from seed 0, for comparison: what propagation does without any training."""

from pathlib import Path

import torch

from common import Encoder, Propagation, System, build_net, find_system


def load(name: str, weights: Path | None, settings: Propagation) -> Encoder:
    if weights:
        return find_system("torchvision:resnet18").load(name, weights, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(build_net(SYSTEMS["random"], settings), settings)


SYSTEMS = {
    "random": System("resnet18", "no training: random weights from seed 0", load=load, licence="-"),
}
