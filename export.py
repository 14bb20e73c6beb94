"""The whole tracker as one graph: extractor, Algorithm 1, memory update and full-size mask in one ONNX file.

    python export.py --model imagenet --height 480 --width 854 --objects 1 --context 20 --out tracker.onnx
    python export.py --model imagenet --video clip.mp4 --mask f0.png --tensorrt --out tracker.onnx  # and tracker.engine
    python export.py --model imagenet --video clip.mp4 --mask f0.png --int8 --out tracker.onnx  # faster on CPUs
    python propagate.py --engine tracker.onnx --video clip.mp4 --mask f0.png

A program calls the graph once a frame and hands the memory back; it needs a runtime and nothing else:

    inputs    frame  H x W x 3 uint8 RGB      mask  H x W uint8, ids 0 to --objects; read where seen is 0
              seen   1 int32: 0 for the annotated frame, then 1, 2, ...: how much of the memory is filled
              memory_features  (1 + n) x h x w x C      memory_labels  (1 + n) x h x w x L; zeros at first
    outputs   new_mask  H x W uint8           labels  L x h x w           features  C x h x w
              new_memory_features, new_memory_labels: the next call's memory

After writing, the graph is run against the PyTorch path on --video and --mask, or on a clip made here. One that
differs is removed, with exit code 1. The file's metadata say what made it (model, settings, sizes, version).
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import propagate
from common import Propagation, UserError, pick_device
from propagate import Box, Video, compute_masks, pool_workers


@dataclass
class Args:
    model: str = "default"
    """Whose features: a name from propagate.py --list-models."""
    weights: Path | None = None
    """Weights file; without it weights/ and torch hub's cache are searched, then it is fetched."""
    height: int | None = None
    """Height of the frames in pixels; default that of --video, else 480."""
    width: int | None = None
    """Width of the frames in pixels; default that of --video, else 854."""
    objects: int = 1
    """Most objects that the graph can follow, 1 to 255; fewer is fine."""
    out: Path = Path("tracker.onnx")
    """The graph to write."""
    opset: int = 18
    """ONNX operator set, 18 to 20. The oldest ONNX Runtime that ran them: 1.15 for 18, 1.16 for 19, 1.17 for 20."""
    fp16: bool = False
    """Features, affinities and memory in half precision, for GPUs; labels stay float32."""
    int8: bool = False
    """Convolutions, affinities and memory in INT8, with the ranges that the frames of the check have (of --video, which
    should be like those to come); the rest stays float32."""
    tensorrt: bool = False
    """Also build a TensorRT engine (.engine, beside --out) for this machine's GPU; without --int8 it implies --fp16."""
    video: str | None = None
    """Check on this film or folder of pictures instead of a clip made here; needs --mask."""
    mask: Path | None = None
    """The mask of the first frame of --video."""
    frames: int | None = None
    """Frames that the check runs; default --context and 5 more, so that the memory goes round."""
    overwrite: bool = False
    """Replace --out if it exists."""
    propagation: Propagation = field(default_factory=Propagation)


# ---------------------------------------------------------------------------------------------------------------------
# One step, with static shapes


class Step(nn.Module):
    """What the graph computes: propagate.propagate_labels and what stands around it, in operators that runtimes have.

    Every shape is fixed when it is built. A tile of target cells meets the context cells that the regions of its
    cells cover; the keys of all frames at these cells are gathered, so the (h w) x (n h w) affinity is never formed.
    A slot of the memory that is not filled yet is read as slot 0 and its entries are dropped before the softmax.
    With a scale the memory holds the features as int8, in steps of it, and the affinities are integer products.
    """

    def __init__(
        self,
        encoder: common.Encoder,
        size: tuple[int, int],
        objects: int,
        tile: tuple[int, int] = (12, 16),
        scale: float | None = None,
    ):
        super().__init__()
        if scale is not None:
            from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers torch.ops.quantized_decomposed
        self.int8 = None if scale is None else (scale, 0, -128, 127, torch.int8)
        s = encoder.settings
        self.encoder, self.settings, self.size, self.objects = encoder, s, size, objects
        self.slots, self.grid = 1 + s.context, s.grid(*size)
        self.overall = s.aggregation == "overall"
        self.softmax_over = s.softmax_over
        fixed = s.localization == "fixed"
        exempt = 1 if s.exempt_first and fixed else 0
        self.parts = [(a, b, local) for a, b, local in ((0, exempt, False), (exempt, self.slots, fixed)) if a < b]

        (h, w), (ty, tx) = self.grid, tile
        whole = self.softmax_over == "frame" or not all(local for *_, local in self.parts)
        while whole and h * w * self.slots * ty * tx > 2**26:  # as in propagate_labels: at most 256 MiB a tile
            ty, tx = math.ceil(ty / 2), math.ceil(tx / 2)
        everywhere, patterns = torch.arange(h * w, dtype=torch.int32), {}
        self.everywhere = everywhere if len(self.parts) == 1 and (self.softmax_over == "frame" or not fixed) else None
        self.tiles = []  # rows of tiles: (place in the grid, for each part its cells and which of them are outside)
        for y0, y1 in common.cuts(h, ty):
            self.tiles.append([])
            for x0, x1 in common.cuts(w, tx):
                window = []
                for *_, local in self.parts:
                    cells, outside = everywhere, None
                    if local:
                        searched = compute_masks(s, Box(0, h, 0, w), Box(y0, y1, x0, x1), "cpu").flatten(0, 1)
                        if self.softmax_over != "frame":
                            cells, searched = everywhere[searched.any(1)], searched[searched.any(1)]
                        outside = ~searched.T.contiguous()  # Q cells
                        key = outside.shape, outside.numpy().tobytes()  # tiles inside the grid share one pattern
                        outside = patterns.setdefault(key, outside)
                    window.append((cells, outside))
                self.tiles[-1].append(((y0, y1, x0, x1), window))

        # Bilinear reduction reads 2 x 2 pixels of the mask for a cell, nearest one: which, and with which weights.
        self.pixels, weights = [], []
        for pixels, cells in zip(size, self.grid, strict=True):
            centre = (torch.arange(cells) + 0.5) * pixels / cells
            at = centre.floor() if s.sampling == "nearest" else (centre - 0.5).clamp(min=0)
            low = at.floor().int()
            self.pixels.append(torch.stack([low, (low + 1).clamp(max=pixels - 1)], 1).flatten())
            weights.append(torch.stack([1 - (at - low), at - low], 1).flatten())
        self.pixel_weights = weights[0][:, None] * weights[1]  # 2h 2w

    def forward(
        self, frame: Tensor, mask: Tensor, seen: Tensor, memory_features: Tensor, memory_labels: Tensor
    ) -> tuple[Tensor, ...]:
        (h, w), n = self.grid, self.settings.context
        frames = frame.to(self.encoder.mean.dtype)[None]  # TensorRT knows uint8 as an input alone: cast first
        features = self.encoder(frames)[0]  # C h w
        query = features.permute(1, 2, 0)  # h w C
        keys, values = memory_features.flatten(0, 2), memory_labels.flatten(0, 2)  # an entry is (slot, cell)
        slot = torch.arange(self.slots, dtype=torch.int32)
        filled = (slot < seen) | (slot == 0)
        first = torch.where(filled, slot, 0) * (h * w)  # entry of each slot's cell 0
        if self.settings.pad:  # copies of the annotated frame count until they are overwritten
            filled = torch.ones_like(filled)
        memory = keys, values, first, filled
        if self.everywhere is not None:  # every tile searches all: gathered once
            memory = keys.index_select(0, (self.everywhere[:, None] + first).flatten()), *memory[1:]
        rows = [
            [self.search(query[y0:y1, x0:x1], window, *memory) for (y0, y1, x0, x1), window in row]
            for row in self.tiles
        ]
        z = torch.cat([torch.cat(row, 1) for row in rows])  # h w L
        start = seen == 0
        z = torch.where(start, self.labels_from_mask(mask), z)
        winner = propagate.refined_winner(z.permute(2, 0, 1), frame, self.settings.refine, self.settings.minmax)
        winner = torch.where(start, mask.float(), winner.float())  # TensorRT's casts to and from uint8 know no integers
        query = self.quantise(query)
        if n:  # slot 0 is the annotated frame's for good, the others are a ring
            place = (torch.where(start, 0, 1 + (seen - 1) % n).long(),)
            memory = memory_features.index_put(place, query[None]), memory_labels.index_put(place, z[None])
        else:
            memory = torch.where(start, query[None], memory_features), torch.where(start, z[None], memory_labels)
        return winner.to(torch.uint8), z.permute(2, 0, 1), features, *memory

    def quantise(self, x: Tensor) -> Tensor:  # ONNX's QuantizeLinear
        return torch.ops.quantized_decomposed.quantize_per_tensor(x, *self.int8) if self.int8 else x

    def dequantise(self, x: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_tensor(x, *self.int8) if self.int8 else x

    def search(
        self, query: Tensor, windows: list, keys: Tensor, values: Tensor, first: Tensor, filled: Tensor
    ) -> Tensor:
        """Algorithm 1 for a tile: query ty x tx x C -> soft labels ty x tx x L."""
        s, found = self.settings, []
        entries = [cells[:, None] + first[a:b] for (a, b, _), (cells, _) in zip(self.parts, windows, strict=True)]
        key = keys
        if self.everywhere is None:
            key = keys.index_select(0, torch.cat([entry.flatten() for entry in entries]))
        q = self.dequantise(self.quantise(query.flatten(0, 1)))  # runtimes fuse it, read once, into the product
        shrink = 1 / 64 if q.dtype == torch.float16 and not s.l2 else 1  # half ends at 65,504
        if shrink != 1:
            q = q * shrink
        product = q @ self.dequantise(key.T)  # Eq. 1
        products = product.split([entry.numel() for entry in entries], 1) if len(entries) > 1 else [product]
        unfilled = torch.where(filled, 0.0, -math.inf).to(q.dtype)
        for (a, b, _), (cells, outside), entry, A in zip(self.parts, windows, entries, products, strict=True):
            A = A.unflatten(1, entry.shape)  # Q cells n
            k, inside = min(s.topk, len(cells)), A
            if outside is not None and not (self.overall and self.softmax_over == "topk"):
                inside = A.masked_fill(outside[:, :, None], -math.inf)
            if self.overall:  # the k best entries lie in the k best cells by their best frame
                peak = A.max(2).values  # amax would go through float32 in a half-precision graph
                peak, cell = (peak if outside is None else peak.masked_fill(outside, -math.inf)).topk(k)
                kept = A.gather(1, cell[:, :, None].expand(-1, -1, b - a)) + unfilled[a:b]  # Q k n
                kept = kept.masked_fill((peak == -math.inf)[:, :, None], -math.inf).flatten(1)
                best, place = kept.topk(min(s.topk, k * (b - a)))
                entry = entry.index_select(0, cell.flatten()).view_as(kept).gather(1, place)
                axes = (1, 2)
            else:
                best, cell = inside.transpose(1, 2).topk(k)  # Q n k
                entry = cells.index_select(0, cell.flatten()).view_as(cell) + first[a:b, None]
                axes = 1
            temperature = s.temperature * shrink
            best, total = best.float() / temperature, None
            if self.softmax_over != "topk":
                over = (inside if self.softmax_over == "region" else A).float() / temperature
                total = (over + unfilled[a:b] if self.overall else over).logsumexp(axes)[..., None]
            found.append((best, entry, total))
        best, entry, total = zip(*found, strict=True)
        if self.overall:
            best, entry = torch.cat(best, 1), torch.cat(entry, 1)
            if len(found) > 1:  # the k best of the parts' k best
                best, place = best.topk(min(s.topk, best.shape[1]))
                entry = entry.gather(1, place)
            if self.softmax_over == "topk":
                weight = best.softmax(1)
            else:
                weight = (best - torch.cat(total, 1).logsumexp(1, keepdim=True)).exp()
        else:  # line 36: the mean over the frames
            share = filled.float() / filled.float().sum()
            weight = [b.softmax(2) if t is None else (b - t).exp() for b, t in zip(best, total, strict=True)]
            weight = [w * share[a:b, None] for w, (a, b, _) in zip(weight, self.parts, strict=True)]
            weight, entry = (torch.cat([each.flatten(1) for each in part], 1) for part in (weight, entry))
        copied = (weight[..., None] * F.embedding(entry, values)).sum(1)  # the soft copy, line 33: Q L
        return copied.view(*query.shape[:2], -1)

    def labels_from_mask(self, mask: Tensor) -> Tensor:
        """As propagate.labels_from_mask, for ids 1, 2, ...; another id is background. mask H x W -> h x w x L."""
        rows, cols = self.pixels
        ids = mask.float().index_select(0, rows).index_select(1, cols)  # 2h 2w
        ids = torch.where(ids > self.objects, 0.0, ids)
        one_hot = (ids[..., None] == torch.arange(self.objects + 1, dtype=torch.float32)).float()
        weighted = (one_hot * self.pixel_weights[..., None]).unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
        return weighted.sum((1, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Writing the graph and the engine


def check_args(args: Args) -> None:
    """Refuse what cannot be exported, and say why."""
    s = args.propagation
    known = "size upsample layer stride l2 aggregation softmax temperature topk context localization shape radius "
    known += "sampling pad exempt_first minmax refine"
    for factor in fields(Propagation):
        name, value = factor.name, getattr(s, factor.name)
        if name not in known.split() and value != factor.default:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: cannot be exported, the graph has no such step; leave it"
            )
    if s.localization not in ("none", "fixed"):
        raise UserError(
            f"--localization {s.localization}: cannot be exported, its regions follow the data and the graph's shapes "
            "are fixed; take fixed or none"
        )
    if s.topk >= 3840:
        raise UserError(f"--topk {s.topk}: cannot be exported, TensorRT's TopK ends below 3840; give 3839 or less")
    if not 18 <= args.opset <= 20:
        raise UserError(f"--opset {args.opset}: give 18 to 20, which the exporter writes and TensorRT 10 reads")
    if not 1 <= args.objects <= 255:
        raise UserError(
            f"--objects {args.objects}: give 1 to 255; a mask has one byte a pixel, and 0 is the background"
        )
    if min(args.height, args.width) < 16 or max(args.height, args.width) > 8192:
        raise UserError(f"--height {args.height} --width {args.width}: give 16 pixels or more, and at most 8192")
    if args.frames is not None and not 2 <= args.frames <= 10_000:
        raise UserError(f"--frames {args.frames}: give 2 or more, at most 10000; the first one is given")
    if max(input_size := s.input_size(args.height, args.width)) > 8192:
        what = f"--size {s.size} --upsample {s.upsample}"
        raise UserError(f"{what}: makes an input of {'x'.join(map(str, input_size))}; give at most 8192 pixels a side")
    cells = math.prod(s.grid(args.height, args.width))
    if (1 + s.context) * cells * 256 > 2**31:
        most = 2**31 // (256 * cells) - 1
        raise UserError(f"--context {s.context}: a memory of over 2^31 numbers, no runtime takes it; {most} at most")
    if args.int8 and args.fp16:
        raise UserError("--int8 and --fp16: give one of the two; what --int8 leaves stays float32")
    if args.int8 and not args.video:
        raise UserError("--int8: needs --video and --mask, frames like those to come: its ranges are measured on them")
    if bool(args.video) != bool(args.mask):
        raise UserError("--video and --mask: give both to check on a clip of your own, or none")
    if args.out.suffix != ".onnx":
        raise UserError(f"--out {args.out}: give a name that ends in .onnx; --tensorrt adds the .engine beside it")
    for path in (args.out, args.out.with_suffix(".engine")):  # an engine of trtexec's is known by the graph beside it
        if path.exists() and not args.overwrite:
            raise UserError(f"{path}: is there already; add --overwrite or choose another --out")


def check_packages(args: Args) -> None:
    """Refuse to start without what the export needs."""
    if args.int8 and not find_spec("torch.ao.quantization.fx._decomposed"):
        raise UserError(
            f"--int8: torch {torch.__version__} has none of its operators; leave it away or take torch 2.14"
        )
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise UserError(f"{missing[0]}: is not installed; run pip install {' '.join(missing)}")
    if args.tensorrt and not (find_spec("tensorrt") and torch.cuda.is_available()):
        precision = "--int8" if args.int8 else "--fp16"
        lacks = "the tensorrt package (pip install tensorrt)" if not find_spec("tensorrt") else "an NVIDIA GPU"
        raise UserError(
            f"--tensorrt: needs {lacks}; or export with {precision} alone and build the engine where there is one: "
            f"trtexec --onnx={args.out} --saveEngine={args.out.with_suffix('.engine')} --stronglyTyped"
        )


def resize_weights(size: int, length: int) -> Tensor:
    """Antialiased bilinear reduction along one axis as a matrix, size x length."""
    return F.interpolate(torch.eye(length)[None, None], size=(size, length), mode="bilinear", antialias=True)[0, 0]


def resize_by_matmul(self, output_size, align_corners, scales_h=None, scales_w=None):
    """The antialiased reduction of the input, which TensorRT's Resize lacks, as two matrix products (exact)."""
    import onnx_ir
    from onnxscript import opset18 as op

    (H, W), (h, w) = self.shape[-2:], output_size
    down, across = resize_weights(int(h), int(H)).numpy(), resize_weights(int(w), int(W)).T.contiguous().numpy()
    down, across = (op.Constant(value=onnx_ir.tensor(m.astype(self.dtype.numpy()))) for m in (down, across))
    return op.MatMul(op.MatMul(down, self), across)


def describe(args: Args) -> dict:
    """What the files say of themselves (engine_info)."""
    info = {"version": propagate.__version__, "model": args.model, "weights": args.weights and args.weights.name}
    info |= {"height": args.height, "width": args.width, "objects": args.objects, "ids": [*range(args.objects + 1)]}
    dtype = "int8" if args.int8 else "float16" if args.fp16 or args.tensorrt else "float32"
    return info | {"dtype": dtype, "settings": asdict(args.propagation)}


def write_onnx(path: Path, args: Args, encoder: common.Encoder, info: dict, scale: float | None = None) -> None:
    """Trace one step and write it, with what a runner must know in its metadata. scale: see Step."""
    import onnx

    gpu, int8 = args.fp16 or args.tensorrt, scale is not None
    size, dtype = (args.height, args.width), torch.float16 if gpu and not int8 else torch.float32
    tile = (24, 32) if gpu else (12, 16)  # a GPU likes few launches
    step = Step(encoder, size, args.objects, tile, scale).eval()
    with torch.inference_mode():
        channels = encoder(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape[1]
    encoder.to(dtype)
    example = {
        "frame": torch.zeros(*size, 3, dtype=torch.uint8),
        "mask": torch.zeros(size, dtype=torch.uint8),
        "seen": torch.zeros(1, dtype=torch.int32),
        "memory_features": torch.zeros(step.slots, *step.grid, channels, dtype=torch.int8 if int8 else dtype),
        "memory_labels": torch.zeros(step.slots, *step.grid, args.objects + 1),
    }
    program = torch.onnx.export(
        step,
        tuple(example.values()),
        input_names=list(example),
        output_names=["new_mask", "labels", "features", "new_memory_features", "new_memory_labels"],
        opset_version=args.opset,
        custom_translation_table={torch.ops.aten._upsample_bilinear2d_aa.default: resize_by_matmul},
        verbose=False,
    )
    graph = program.model_proto
    graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import)  # an older runtime reads it
    onnx.helper.set_model_props(graph, {"softcopy": json.dumps(info)})
    onnx.save(graph, path)


def quantise_convolutions(path: Path, frames: list[np.ndarray]) -> None:
    """Turn the graph's convolutions to INT8 in place, with the ranges that its tensors take on the frames.

    Zero points are 0, weights have a scale a channel and biases stay float32, as TensorRT demands. ONNX Runtime runs
    a convolution in integers where nothing else reads its INT8 input: of the convolutions of one tensor the first is
    taken, the other (a ResNet's projection) and the residual sums read the tensor as it was.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    model = onnx.load(path)
    made = {name: node for node in model.graph.node for name in node.output}

    def source(name: str) -> str:
        """The tensor that is padded or pooled into this one."""
        while name in made and made[name].op_type in ("Pad", "AveragePool"):
            name = made[name].input[0]
        return name

    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    taken = list({source(node.input[0]): node.name for node in reversed(convolutions)}.values())
    empty = {
        tensor.name: np.zeros(
            [d.dim_value for d in tensor.type.tensor_type.shape.dim],
            onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type),
        )
        for tensor in model.graph.input
    }

    class Reader(CalibrationDataReader):
        """One frame at a time: the activations of all together would fill the memory."""

        def __len__(self) -> int:
            return len(frames)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(frames[start_index:end_index])

        def get_next(self) -> dict | None:
            return None if (frame := next(self.left, None)) is None else empty | {"frame": frame}

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises steps that change nothing here
    try:
        with redirect_stdout(io.StringIO()):
            quantize_static(
                path,
                path,
                Reader(),
                op_types_to_quantize=["Conv"],
                nodes_to_quantize=taken,
                per_channel=True,
                calibrate_method=CalibrationMethod.Percentile,  # nearer to float32 than MinMax and Entropy
                extra_options={"ActivationSymmetric": True, "QuantizeBias": False, "CalibStridedMinMax": 1},
            )
    finally:
        logging.disable(level)
    model = onnx.load(path)
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("Add", "Conv") and node.name not in taken:
            for i, name in enumerate(node.input):
                if name in made and made[name].op_type == "DequantizeLinear":
                    exact = made[made[name].input[0]].input[0]
                    node.input[i] = name if exact in made and made[exact].op_type == "Conv" else exact
    onnx.save(model, path)


def build_engine(graph: Path, info: dict, timings: Path) -> bytes:
    """A TensorRT engine of the graph for this machine's GPU, as TensorRTEngine reads it; what TensorRT timed is kept in
    `timings` for the next build."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # The graph says where half precision is meant; TensorRT 11 always takes it so, 10 when told.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.read_bytes()):
        error = parser.get_error(0)
        what = f"{error.node_operator()} {error.node_name()} ({error.desc()})"
        raise UserError(f"{graph}: TensorRT {trt.__version__} cannot read {what}; try --opset 18")
    config = builder.create_builder_config()
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # broken, or of another GPU
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{graph}: TensorRT could not build it (its reasons stand above); try a smaller --height")
    with common.atomic(timings) as temporary:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    head = json.dumps(info | {"hardware": torch.cuda.get_device_name(), "tensorrt": trt.__version__}).encode()
    return TensorRTEngine.MAGIC + len(head).to_bytes(4, "little") + head + bytes(plan)


# ---------------------------------------------------------------------------------------------------------------------
# The two runners: what was exported, frame by frame


def load_engine(path: Path, device: str = "auto") -> "OnnxEngine | TensorRTEngine":
    """A graph of export.py, ready to run: .onnx by ONNX Runtime, .engine by TensorRT.

    info is what engine_info says. step(frame, mask) starts at an annotated frame, step(frame) follows; both give the
    frame's mask. read("labels") and read("features") are those of the last step. One thread at a time. Raises UserError
    for a file that is not a graph of export.py or cannot run here.
    """
    info = engine_info(path)
    return (OnnxEngine if path.suffix == ".onnx" else TensorRTEngine)(path, info, device)


def engine_info(path: Path) -> dict:
    """What export.py wrote into a graph or an engine about itself: model, settings, height, width, objects, ..."""
    if not path.is_file():
        raise UserError(f"{path}: no such engine; make it with export.py")
    if path.suffix not in (".onnx", ".engine"):
        raise UserError(f"{path}: is neither .onnx nor .engine; give a file that export.py wrote")
    text, twin = TensorRTEngine.read_file(path)[0] if path.suffix == ".engine" else None, path.with_suffix(".onnx")
    if not (text or twin.is_file()):  # built by trtexec: what it is stands in the graph that it was built from
        raise UserError(f"{path}: was not written by softcopy's export.py, nor is {twin} beside it")
    try:
        if not text:
            import onnx

            text = {entry.key: entry.value for entry in onnx.load(twin).metadata_props}["softcopy"]
        info = json.loads(text)
        return {
            key: info[key] for key in ("version", "model", "settings", "height", "width", "objects", "dtype")
        } | info
    except ImportError as error:
        raise UserError(f"{path}: needs the onnx package; run pip install onnx") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: was not written by softcopy's export.py; make it again with export.py") from error
    except Exception as error:  # of protobuf
        raise UserError(f"{path}: ONNX cannot load it; is it whole? Export it again") from error


def engine_settings(path: Path, info: dict) -> Propagation:
    """The settings that a graph was exported with; info: what engine_info says of it."""
    try:
        return Propagation(**info["settings"])
    except TypeError as error:
        raise UserError(
            f"{path}: was made by softcopy {info['version']}, which this {propagate.__version__} cannot read; make it "
            "again with export.py"
        ) from error


class OnnxEngine:
    """A graph run by ONNX Runtime: TensorRT, CUDA or CPU, whichever comes first of those that are there.

    The memory stays on the device, twice: a step reads one copy and writes the other.
    """

    def __init__(self, path: Path, info: dict, device: str = "auto"):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{path}: needs the onnxruntime package; run pip install onnxruntime") from error
        where, order = pick_device(device), [("CPUExecutionProvider", {})]
        if where.type == "cuda":
            number = {"device_id": torch.cuda.current_device() if where.index is None else where.index}
            order.insert(0, ("CUDAExecutionProvider", number))
            with contextlib.suppress(ImportError):
                import tensorrt  # noqa: F401  with its libraries, which ONNX Runtime's TensorRT wants

                # Building takes minutes: the engine is kept, by the graph's content (the name alone forgets weights).
                cache = str(Path(torch.hub.get_dir()).parent / "softcopy")
                kept = {"trt_engine_cache_enable": True, "trt_engine_cache_path": cache}
                kept |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": cache}
                kept |= {"trt_engine_cache_prefix": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
                order.insert(0, ("TensorrtExecutionProvider", number | kept))
            if hasattr(onnxruntime, "preload_dlls"):
                with contextlib.redirect_stdout(sys.stderr):
                    onnxruntime.preload_dlls()  # CUDA of the pip packages, where torch has not loaded the same
        order = [each for each in order if each[0] in onnxruntime.get_available_providers()]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = pool_workers()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside other programs it would wait
        options.enable_mem_pattern = False  # a plan for all tiles at once costs 280 MiB at 480p and saves no time
        options.add_session_config_entry("session.x64quantprecision", "1")  # INT8 sums overflow on x86 without VNNI
        self.session = None
        while self.session is None:
            try:
                self.session = onnxruntime.InferenceSession(str(path), options, providers=order, enable_fallback=0)
            except Exception as error:
                reason, failed = str(error).splitlines()[0][:200], order.pop(0)[0].removesuffix("ExecutionProvider")
                if not order:
                    raise UserError(
                        f"{path}: ONNX Runtime cannot load it ({reason}); is it whole? Export it again"
                    ) from error
                print(f"note: {path}: {failed} cannot run it ({reason}); going on without", file=sys.stderr)
        self.info, self.seen = info, 0
        self.provider = self.session.get_providers()[0].removesuffix("ExecutionProvider")
        if self.provider == "CPU" and where.type == "cuda":
            if device != "auto":
                raise UserError(f"--device {device}: ONNX Runtime has no CUDA here; run pip install onnxruntime-gpu")
            print(f"note: {path}: ONNX Runtime has no CUDA here, so the CPU runs it", file=sys.stderr)
        place = ("cpu", 0) if self.provider == "CPU" else ("cuda", number["device_id"])

        def zeros(tensor):
            kind = {"float": "float32"}.get(name := tensor.type[7:-1], name)  # tensor(float16) -> float16
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(tensor.shape, kind), *place)

        memory = [tensor for tensor in self.session.get_inputs() if tensor.name.startswith("memory_")]
        self.memory = [{tensor.name: zeros(tensor) for tensor in memory} for _ in range(2)]
        self.outputs = {t.name: zeros(t) for t in self.session.get_outputs() if not t.name.startswith("new_memory_")}
        self.binding = self.session.io_binding()
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def step(self, frame: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """frame H x W x 3 uint8; mask H x W uint8 starts afresh with this annotated frame -> mask H x W uint8."""
        self.seen = 0 if mask is not None else self.seen + 1
        self.binding.bind_cpu_input("frame", np.ascontiguousarray(frame))
        self.binding.bind_cpu_input("mask", np.zeros(frame.shape[:2], np.uint8) if mask is None else mask)
        self.binding.bind_cpu_input("seen", np.array([self.seen], np.int32))
        before, after = self.memory
        for name in before:
            self.binding.bind_ortvalue_input(name, before[name])
            self.binding.bind_ortvalue_output(f"new_{name}", after[name])
        self.session.run_with_iobinding(self.binding)
        self.memory.reverse()
        return self.read("new_mask")

    def read(self, name: str) -> np.ndarray:
        return self.outputs[name].numpy().copy()  # on the CPU a view of what the next step writes


class TensorRTEngine:
    """An engine run by TensorRT on the GPU that it was built for; the memory is handled as in OnnxEngine."""

    MAGIC = b"softcopy engine\n"  # then 4 bytes, the length of the JSON that follows; then TensorRT's plan

    @classmethod
    def read_file(cls, path: Path) -> tuple[bytes | None, bytes]:
        """The JSON that export.py wrote (none in a file of trtexec's), and TensorRT's plan."""
        content = path.read_bytes()
        if not content.startswith(cls.MAGIC):
            return None, content
        start = len(cls.MAGIC) + 4
        end = start + int.from_bytes(content[start - 4 : start], "little")
        return content[start:end], content[end:]

    def __init__(self, path: Path, info: dict, device: str = "auto"):
        try:
            import tensorrt as trt
        except ImportError as error:
            raise UserError(
                f"{path}: needs the tensorrt package; run pip install tensorrt, or give the .onnx"
            ) from error
        if device == "cpu" or not torch.cuda.is_available():
            raise UserError(f"{path}: a TensorRT engine needs an NVIDIA GPU; give the .onnx to run elsewhere")
        where = torch.device("cuda" if device == "auto" else device)
        self.info, self.engine = info, None
        here, built = torch.cuda.get_device_name(where), info.get("hardware")
        if built in (None, here):
            with torch.cuda.device(where):
                self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
                self.engine = self.runtime.deserialize_cuda_engine(self.read_file(path)[1])
        if self.engine is None:
            made = f"{built or 'another GPU'} and TensorRT {info.get('tensorrt', '(unknown)')}"
            raise UserError(
                f"{path}: was built for {made}, here is {here} and {trt.__version__}, or it is damaged; build it again "
                "here"
            )
        if tuple(self.engine.get_tensor_shape("frame")) != (info["height"], info["width"], 3):
            raise UserError(f"{path}: was built from another graph than the .onnx beside it; build it again")
        self.provider, self.seen, self.tensors = "TensorRT", 0, {}
        with torch.cuda.device(where):
            self.context, self.stream = self.engine.create_execution_context(), torch.cuda.Stream()
            if self.context is None:
                raise UserError(f"{path}: {here} has not enough free memory for it; close what else runs there")
            for name in (self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)):
                kind, shape = trt.nptype(self.engine.get_tensor_dtype(name)), tuple(self.engine.get_tensor_shape(name))
                self.tensors[name] = torch.from_numpy(np.zeros(shape, kind)).cuda()
                self.context.set_tensor_address(name, self.tensors[name].data_ptr())

    def step(self, frame: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """frame H x W x 3 uint8; mask H x W uint8 starts afresh with this annotated frame -> mask H x W uint8."""
        self.seen = 0 if mask is not None else self.seen + 1
        with torch.cuda.stream(self.stream):
            self.tensors["frame"].copy_(torch.from_numpy(np.ascontiguousarray(frame)))
            self.tensors["seen"].fill_(self.seen)
            if mask is not None:
                self.tensors["mask"].copy_(torch.from_numpy(mask))
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise UserError("TensorRT could not run a step (its reasons stand above); build the engine again here")
        for name in ("memory_features", "memory_labels"):  # what was written is read next
            a, b = self.tensors[name], self.tensors[f"new_{name}"]
            self.tensors[name], self.tensors[f"new_{name}"] = b, a
            self.context.set_tensor_address(name, b.data_ptr())
            self.context.set_tensor_address(f"new_{name}", a.data_ptr())
        return self.read("new_mask")

    def read(self, name: str) -> np.ndarray:
        self.stream.synchronize()
        return self.tensors[name].cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The check

LEAST_IOU = 0.8  # least intersection over union of each object, over the clip


def moving_clip(frames: int, size: tuple[int, int], objects: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Textured discs on a moving background: (frame, true mask) of each frame, always the same."""
    H, W = size
    rng = np.random.default_rng(0)

    def cloth() -> np.ndarray:
        coarse = rng.integers(0, 256, (H // 12 + 2, W // 12 + 2, 3), np.uint8)
        return cv2.resize(coarse, (2 * W, 2 * H), interpolation=cv2.INTER_CUBIC)

    ground, skins = cloth(), [cloth() for _ in range(min(objects, 8))]
    across = math.ceil(math.sqrt(objects))
    radius = max(2, round(min(H, W) / (3 * across)))
    ys, xs = np.mgrid[:H, :W]
    for t in range(frames):
        shift = t * min(H, W) // 160
        frame, mask = np.roll(ground, (-shift, -2 * shift), (0, 1))[:H, :W].copy(), np.zeros(size, np.uint8)
        for i in range(objects):
            angle = 0.15 * t + i
            y = (i // across + 0.5) * H / across + 0.3 * radius * math.sin(angle)
            x = (i % across + 0.5) * W / across + 0.3 * radius * math.cos(angle)
            own = (ys - y) ** 2 + (xs - x) ** 2 < radius**2
            frame[own] = np.roll(skins[i % len(skins)], (round(y), round(x)), (0, 1))[:H, :W][own]
            mask[own] = i + 1
        noise = rng.normal(0, 2, frame.shape)  # no two cells are equal, so that the nearest are well defined
        yield np.clip(frame + noise, 0, 255).astype(np.uint8), mask


def read_clip(args: Args, video: Video | None, frames: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The frames to check on, of --video if there is one, and the mask of the first one with ids 1 to --objects."""
    if video is None:
        clip = list(moving_clip(frames, (args.height, args.width), args.objects))
        return [frame for frame, _ in clip], clip[0][1]
    mask, _ = propagate.read_mask(args.mask)
    for what, size in ((args.video, video.size), (args.mask, mask.shape)):
        if size != (args.height, args.width):
            raise UserError(f"{what}: is {size[1]}x{size[0]}, the graph {args.width}x{args.height}; give its own size")
    ids = np.unique(mask[mask > 0])
    if len(ids) > args.objects:
        raise UserError(f"{args.mask}: holds {len(ids)} objects, the graph {args.objects}; give --objects {len(ids)}")
    renumber = np.zeros(256, np.uint8)
    renumber[ids] = np.arange(1, len(ids) + 1)
    return [frame for _, frame in video.frames(range(min(frames, len(video))))], renumber[mask]


@torch.inference_mode()
def run_reference(
    encoder: common.Encoder, clip: list[np.ndarray], mask: np.ndarray, objects: int
) -> tuple[list, float]:
    """The PyTorch path: (mask, labels, features) of each frame after the first, and frames/s."""
    s, ids, device = encoder.settings, range(1, objects + 1), encoder.mean.device
    results, seconds = [], []
    features = (encoder(torch.from_numpy(frame).to(device)[None])[0] for frame in clip)
    latest: list[Tensor] = []

    def remembered() -> Iterator[Tensor]:
        for each in features:
            latest[:] = [each]
            yield each

    first = propagate.labels_from_mask(torch.from_numpy(mask), ids, s.grid(*mask.shape), s.sampling).to(device)
    labelled = propagate.propagate_video(remembered(), [(next(features), first)], s)
    while True:
        start = time.perf_counter()
        if (z := next(labelled, None)) is None:
            return results, frame_rate(seconds, s.context)
        frame = torch.from_numpy(clip[1 + len(results)])
        winner = propagate.mask_from_labels(z, ids, mask.shape, s.minmax, frame, s.refine).cpu().numpy()
        seconds.append(time.perf_counter() - start)
        results.append((winner, z.cpu().numpy(), latest[0].cpu().numpy()))


def frame_rate(seconds: list[float], context: int) -> float:
    """Frames/s once the context is full, where there are such frames."""
    return 1 / float(np.median(seconds[context:] or seconds))


def check(
    path: Path, clip: list[np.ndarray], mask: np.ndarray, reference: list, rate: float, least: float, context: int
) -> bool:
    """Run the graph on the clip, print how it differs from the PyTorch path; whether it agrees well enough: all pixels
    together, and each object by itself (a small one could be lost and not be missed)."""
    engine = load_engine(path)
    engine.step(clip[0], mask)
    pairs, features, labels, seconds = np.zeros((256, 256), np.int64), 0.0, 0.0, []  # ids of PyTorch x of the graph
    for frame, (winner, z, f) in zip(clip[1:], reference, strict=True):
        start = time.perf_counter()
        answer = engine.step(frame)
        seconds.append(time.perf_counter() - start)
        pairs += np.bincount(256 * winner.ravel().astype(int) + answer.ravel(), minlength=65536).reshape(256, 256)
        features = np.maximum(features, np.abs(engine.read("features") - f).max())  # nan stays nan
        labels = np.maximum(labels, np.abs(engine.read("labels") - z).max())
    both, either = pairs.diagonal(), pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    share, objects = both.sum() / pairs.sum(), (both / np.maximum(either, 1))[1:][either[1:] > 0]
    print(
        f"check: {len(reference)} frames on {engine.provider}: {share:.4%} of the mask pixels agree with PyTorch ("
        f"{least:.1%} wanted), {objects.min(initial=1):.1%} of the object that agrees least ({LEAST_IOU:.0%}); largest "
        f"difference of the features {features:.2g}, of the labels {labels:.2g}; "
        f"{frame_rate(seconds, context):.2f} frames/s, PyTorch {rate:.2f}"
    )
    return bool(
        share >= least and objects.min(initial=1) >= LEAST_IOU and np.isfinite(features) and np.isfinite(labels)
    )


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    video = Video(args.video) if args.video and args.mask else None
    height, width = video.size if video else (480, 854)
    args.height = height if args.height is None else args.height
    args.width = width if args.width is None else args.width
    check_args(args)
    check_packages(args)
    if args.propagation.refine and args.objects > 32:  # each map is filtered at four radii: the graph would not end
        print(
            f"note: --objects {args.objects}: more than 32, so the graph is written without --refine", file=sys.stderr
        )
        args = replace(args, propagation=replace(args.propagation, refine=0.0))
    frames = args.propagation.context + 6 if args.frames is None else args.frames
    clip, mask = read_clip(args, video, frames)
    if len(clip) < 2:
        raise UserError(f"{args.video}: holds one frame; a check needs 2 or more")
    encoder = common.load_encoder(args.model, args.weights, args.propagation)
    info = describe(args)

    engine = args.out.with_suffix(".engine")
    with common.atomic(args.out) as graph:
        graph.touch()  # a place where nothing can be written is found before the work
        print(f"{args.out}: running PyTorch on {len(clip)} frames", file=sys.stderr)
        reference, rate = run_reference(encoder, clip, mask, args.objects)
        print(f"{args.out}: tracing one step", file=sys.stderr)
        judge = reference, rate, 0.999 if info["dtype"] == "float32" else 0.99, args.propagation.context
        scale = None
        if args.int8:
            with torch.inference_mode():
                largest = float(encoder(torch.from_numpy(clip[0]).to(encoder.mean.device)[None]).abs().max())
            scale = max([largest, *(float(np.abs(features).max()) for *_, features in reference)]) / 127 or 1.0
        write_onnx(graph, args, encoder.cpu(), info, scale)
        if args.int8:
            some = np.linspace(0, len(clip) - 1, min(5, len(clip))).astype(int)
            quantise_convolutions(graph, [clip[i] for i in some])
        if not check(graph, clip, mask, *judge):
            hint = "; leave --int8 away, or give a clip like those to come" if args.int8 else ""
            print(f"{args.out}: the check failed, nothing is left behind{hint}", file=sys.stderr)
            sys.exit(1)
    engine.unlink(missing_ok=True)  # of an earlier graph
    if args.tensorrt:
        with common.atomic(engine) as built:
            built.write_bytes(build_engine(args.out, info, args.out.with_suffix(".timing")))
            if not check(built, clip, mask, *judge):
                print(f"{engine}: the check failed, {args.out} alone is left", file=sys.stderr)
                sys.exit(1)
    size = f"{args.height}x{args.width}"
    print(f"{args.out}: {size}, {args.objects} object(s), {args.propagation.context} context frames")


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """With --refine on, as in propagate.py."""
    return propagate.parse_with_model(Args, argv, refine=propagate.REFINE)


if __name__ == "__main__":
    common.run(main, parse_args)
