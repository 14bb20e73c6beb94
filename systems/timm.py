"""timm:NAME, any ResNet or ViT of timm: DINO, DINOv2, DINOv3 and others. An extension, not of the paper.

DINO: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021); DINOv2: Oquab et al.
(2023); DINOv3: Simeoni et al. (2025). Code: github.com/facebookresearch/dino, dinov2, dinov3. timm:vit_small_patch16_
224.dino and so on fetch the weights from timm's hub; --weights takes the authors' own files, whose names timm converts,
and DINO's full checkpoints (teacher, backbone). Licences: Apache-2.0, DINOv3 has its own; others on timm's cards.

Features: the patch tokens of the last block, after the final norm. DINO's ViTs see what DINO's own script gives them: a
deviation of red of 0.228, and position embeddings brought to the grid without anti-aliasing, where timm smooths them.
DINOv2 without registers has the same embeddings. All other ViTs are as timm has them.

On purpose not as DINO's script (eval_video_segmentation.py): labels go bilinearly to full size and the arg-max is taken
there; theirs is taken at the network's input size, with nearest neighbour after it, so borders are coarser. Frames are
reduced with anti-aliasing. With float weights the masks agree to 99.86-99.97 % (benchmarks/systems.md). DINOv2 has no
program of its own for videos: DINO's settings are taken.
"""

import contextlib
import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Encoder, Propagation, System, UserError, build_net, find_system, read_weights

SYSTEMS = {}


def find(arch: str) -> System:
    """The row of timm:ARCH. A ViT has the settings of DINO's, DINOv2's and DINOv3's authors."""
    settings = Propagation()
    if patch := re.search(r"patch(\d+)", arch):
        settings = Propagation(  # of DINO's script
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
        build=build,
        load=load,
        licence="see there",
    )


def add_positions(vit: nn.Module, x: Tensor) -> Tensor:
    """timm's ViT._pos_embed as DINO has it: patch tokens B x h x w x C -> class and patch tokens with their positions,
    resampled bicubically by (h + 0.1) / 14, which is not quite to h."""
    h, w = x.shape[1:3]
    base = vit.patch_embed.grid_size
    places = vit.pos_embed[:, 1:].unflatten(1, base).permute(0, 3, 1, 2)  # 1 C 14 14
    if (h, w) != base:
        scale = [(side + 0.1) / old for side, old in zip((h, w), base, strict=True)]
        places = F.interpolate(places.float(), scale_factor=scale, mode="bicubic").to(x.dtype)
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    return torch.cat([first, (x + places.permute(0, 2, 3, 1)).flatten(1, 2)], 1)


class Tokens(nn.Module):
    """The patch tokens of a ViT's last block, after the final norm, as a grid."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, self.patch = vit, vit.patch_embed.patch_size[0]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, [side // self.patch for side in x.shape[-2:]])


def build(system: System, s: Propagation, net: nn.Module) -> nn.Module | None:
    """A whole network of timm up to the wanted layer; None if it has none such."""
    if not hasattr(net, "patch_embed"):
        return find_system("torchvision:resnet18").build(system, s, net)
    return Tokens(net) if s.layer == "last" and s.stride == net.patch_embed.patch_size[0] else None


def hint(state: dict[str, Tensor]) -> str:
    """Which ViT a file of other names holds, for who gave it to another model."""
    patches = next((value for key, value in state.items() if key.endswith("patch_embed.proj.weight")), None)
    if patches is None:
        return ""
    width, patch = len(patches), patches.shape[-1]
    size = {384: "small", 768: "base", 1024: "large", 1536: "giant"}.get(width, "SIZE")
    family = "224.dino" if patch != 14 else "dinov2.lvd142m"
    if "register_tokens" in state:
        family = "reg4_dinov2.lvd142m"
    if "storage_tokens" in state:
        family = "dinov3.lvd1689m"
    return f"; it is a ViT: say --model timm:vit_{size}_patch{patch}_{family}"


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
    if arch.endswith(".dino"):
        std = (0.228, 0.224, 0.225)
    if arch.endswith(".dino") or re.search("patch14_dinov2", arch):
        net._pos_embed = MethodType(add_positions, net)
    return Encoder(build_net(system, settings, net), settings, system, mean, std)
