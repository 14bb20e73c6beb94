"""timm:NAME, any ResNet or ViT of timm: DINO, DINOv2, DINOv3 and others. Licences: on their cards in timm's hub."""

import contextlib
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from common import STILL, Encoder, Propagation, System, UserError, build_resnet, find_system, read_weights, unfit

SYSTEMS = {}


def find(arch: str) -> System:
    """The row of timm:ARCH. A ViT has the settings of DINO's, DINOv2's and DINOv3's authors."""
    settings = Propagation()
    if patch := re.search(r"patch(\d+)", arch):
        settings = Propagation(
            size="480/64",
            layer="last",
            stride=int(patch[1]),
            sampling="nearest",
            temperature=0.1,
            topk=5,
            context=7,
            shape="square",
            minmax=True,
        )
        if "dinov3" in arch:  # its authors' circle holds the cells at distance 12 too, four more
            settings = replace(settings, size="480", upsample=2, temperature=0.2, shape="circle")
    return System(
        f"timm:{arch}",
        "see its card in timm's hub",
        settings,
        **STILL,
        load=load,
        source="timm fetches them from its hub",
        licence="see there",
    )


class Tokens(nn.Module):
    """The patch tokens of a ViT's last block, after the final norm, as a grid."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, self.patch = vit, vit.patch_embed.patch_size[0]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, [side // self.patch for side in x.shape[-2:]])


def build(system: System, s: Propagation, net: nn.Module) -> nn.Module:
    """A whole network of timm up to the wanted layer."""
    if not hasattr(net, "patch_embed"):
        return build_resnet(system, s, net)
    if s.layer != "last" or s.stride != net.patch_embed.patch_size[0]:
        raise unfit(system, s)
    return Tokens(net)


def load(name: str, path: Path | None, settings: Propagation) -> Encoder:
    """The extractor with its weights: from a file, timm's cache or its hub."""
    system, arch = find_system(name), name.removeprefix("timm:")
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--model timm:{arch}: timm is not installed; pip install timm") from error
    if not timm.is_model(arch.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{arch.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise UserError(f"--model timm:{arch}: timm has no model of this name; such as {near}")
    kind = {"dynamic_img_size": True} if "patch" in arch else {}
    try:
        net = timm.create_model(arch, pretrained=path is None, num_classes=0, **kind)
    except TypeError as error:
        raise UserError(f"--model timm:{arch}: takes frames of one size alone; take another ViT") from error
    except Exception as error:  # of its hub client: many kinds
        raise UserError(
            f"weights of timm:{arch}: could not be fetched ({str(error).splitlines()[0]}); give --weights FILE"
        ) from error
    if not (hasattr(net, "num_prefix_tokens") or hasattr(net, "layer3")):
        raise UserError(f"--model timm:{arch}: is neither a ResNet nor a ViT; take one of these")
    if path:
        state = {
            re.sub(r"^(module|backbone)\.", "", re.sub(r"^module\.", "", k)): v
            for k, v in read_weights(path)[0].items()
        }
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", lambda state, net: state)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what it drops of a DINOv3 file
                missing = net.load_state_dict(convert(state, net), strict=False).missing_keys
        except (RuntimeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: does not fit timm:{arch}: {str(error).splitlines()[-1].strip()}") from error
        if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
            raise UserError(f"{path}: does not fit timm:{arch}: it lacks {len(missing)} entries, such as {missing[0]}")
        print(f"note: {path}: used as timm:{arch}", file=sys.stderr)
    mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    return Encoder(build(system, settings, net), settings, system, mean, std)
