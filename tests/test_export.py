"""export.py: the graph computes what the PyTorch path computes, searches locally, and keeps to what runtimes read."""

import ctypes
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import clip
import common
import export
import propagate
from common import Propagation
from propagate import read_ids, write_mask

ROOT = Path(export.__file__).parent
SMALL = Propagation(context=3, radius=4, topk=5)
FLAGS = ("--model", "random", "--context", "3", "--radius", "4", "--topk", "5", "--refine", "0")


pytestmark = pytest.mark.usefixtures("one_thread")


# What runs: one graph of the small clip for all tests, made through the command line.


@pytest.fixture(scope="module")
def tracker(small_clip, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tracker") / "tracker.onnx"
    flags = ["--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png", "--objects", 3, "--out", path]
    result = subprocess.run(
        [sys.executable, "export.py", *FLAGS, *map(str, flags)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    # A processor whose kernels add up in another order may tip a pixel.
    agree = r"check: 8 frames on \w+: (100\.0+|99\.99\d+)% of the mask pixels agree with PyTorch \(99\.9% wanted"
    assert re.search(agree, result.stdout)
    assert "frames/s, PyTorch" in result.stdout
    return path


@pytest.fixture(scope="module")
def reduced(tmp_path_factory) -> Path:
    """A graph of four tiles whose frames are reduced first: 300 x 200 pixels to 240 x 160, a grid of 20 x 30."""
    path = tmp_path_factory.mktemp("reduced") / "tracker.onnx"
    settings = replace(SMALL, size="160", radius=3)
    args = export.Args("random", height=200, width=300, objects=2, propagation=settings)
    export.write_onnx(path, args, common.load_encoder("random", None, settings, "cpu"), export.describe(args))
    return path


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> Path:
    """A graph of the default model, which turns frames to 8-bit lightness."""
    path = tmp_path_factory.mktemp("default") / "tracker.onnx"
    args = export.Args(height=64, width=96, objects=1, propagation=SMALL)
    export.write_onnx(path, args, common.load_encoder("default", None, SMALL, "cpu"), export.describe(args))
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A half-precision graph of another flavour, of the newest operator set."""
    path = tmp_path_factory.mktemp("half") / "tracker.onnx"
    flags = ["--fp16", "--height", 50, "--width", 77, "--objects", 9, "--opset", 20, "--frames", 4, "--minmax"]
    flags += ["--aggregation", "per-frame", "--softmax", "region", "--exempt-first", "--out", path]
    export.main(propagate.parse_with_model(export.Args, [str(flag) for flag in (*FLAGS, *flags)]))
    return path


@pytest.fixture(scope="module")
def int8(small_clip, tmp_path_factory) -> Path:
    """An INT8 graph whose regions have two parts: the annotated frame's is the whole frame."""
    path = tmp_path_factory.mktemp("int8") / "tracker.onnx"
    flags = ["--int8", "--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png", "--objects", 3]
    flags += ["--exempt-first"]
    export.main(propagate.parse_with_model(export.Args, [str(flag) for flag in (*FLAGS, *flags, "--out", path)]))
    return path


# One step


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"context": 0},
        {"context": 1},
        {"topk": 60},
        {"shape": "square"},
        {"localization": "none"},
        {"exempt_first": True},
        {"softmax": "region"},
        {"softmax": "frame", "exempt_first": True},
        {"aggregation": "per-frame"},
        {"aggregation": "per-frame", "softmax": "topk"},
        {"aggregation": "per-frame", "softmax": "region", "exempt_first": True},
        {"minmax": True},
        {"l2": False, "temperature": 5.0},
        {"stride": 4, "layer": "res2"},
        {"size": "32", "upsample": 2},
        {"pad": True},
        {"pad": True, "exempt_first": True},
        {"pad": True, "aggregation": "per-frame", "softmax": "region"},
        {"sampling": "nearest"},
    ],
    ids=lambda factors: ",".join(f"{key}={value}" for key, value in factors.items()) or "default",
)
@torch.inference_mode()
def test_a_step_is_the_pytorch_path(factors):
    """For frames whose sides the stride does not divide, over many tiles, while the ring fills and goes round. What
    an unfilled slot holds (here nan) has no influence."""
    torch.manual_seed(0)
    s, size, objects = replace(SMALL, **factors), (50, 77), 2
    encoder = common.load_encoder("random", None, s, "cpu")
    step, grid = export.Step(encoder, size, objects, tile=(4, 5)).eval(), s.grid(*size)
    frames = torch.randint(0, 255, (6, *size, 3), dtype=torch.uint8)
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[5:30, 10:40], mask[20:45, 35:70], mask[0, 0] = 1, 2, 7  # 7 is no object: background
    features = [encoder(frame[None])[0] for frame in frames]
    first = propagate.labels_from_mask(mask, (1, 2), grid, s.sampling)
    first[0] = propagate.labels_from_mask(torch.where(mask > objects, 0, mask), (1, 2), grid, s.sampling)[0]
    expected = [first, *propagate.propagate_video(features[1:], [(features[0], first)], s)]
    memory = (torch.full((1 + s.context, *grid, n), torch.nan) for n in (len(features[0]), objects + 1))
    for seen, (frame, wanted) in enumerate(zip(frames, expected, strict=True)):
        winner, labels, own, *memory = step(frame, mask, torch.tensor([seen], dtype=torch.int32), *memory)
        torch.testing.assert_close(own, features[seen])
        torch.testing.assert_close(labels, wanted, atol=1e-4, rtol=0)
        full = propagate.mask_from_labels(wanted, (1, 2), size, s.minmax) if seen else mask
        assert (winner == full).float().mean() > 0.999


def test_the_reduction_is_exact():
    """Antialiased bilinear reduction is two matrix products."""
    picture = torch.rand(1, 3, 61, 83)
    product = export.resize_weights(24, 61) @ picture @ export.resize_weights(30, 83).T
    expected = torch.nn.functional.interpolate(picture, size=(24, 30), mode="bilinear", antialias=True)
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-5)


# The graph in runtimes


def test_the_reduced_graph_is_the_pytorch_path(reduced):
    session = onnxruntime.InferenceSession(reduced)
    frames = [frame for frame, _ in clip.render(frames=2, height=200, width=300, objects=2)]
    mask = next(clip.render(frames=1, height=200, width=300, objects=2))[1]
    feed = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs() if i.name.startswith("memory_")}
    encoder = common.load_encoder("random", None, replace(SMALL, size="160", radius=3), "cpu")
    for seen, frame in enumerate(frames):
        feed |= {"frame": frame, "mask": mask, "seen": np.array([seen], np.int32)}
        _, _, features, *memory = session.run(None, feed)
        feed |= dict(zip(("memory_features", "memory_labels"), memory, strict=True))
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(frame)[None])[0]
        np.testing.assert_allclose(features, expected, atol=1e-4)


def test_unfilled_slots_have_no_influence(tracker):
    session = onnxruntime.InferenceSession(tracker)
    rng, feed = np.random.default_rng(0), {}
    for i in session.get_inputs():
        if i.name.startswith("memory_"):
            feed[i.name] = rng.random(i.shape, np.float32)
    frame = rng.integers(0, 255, (96, 160, 3), np.uint8)
    feed |= {"frame": frame, "mask": np.zeros((96, 160), np.uint8)}
    for filled in (1, 2, 3, 4):
        feed["seen"] = np.array([filled], np.int32)
        labels = session.run(["labels"], feed)[0]
        for junk in (1e6, -1e6, np.inf):
            other = {name: value.copy() for name, value in feed.items()}
            for name in ("memory_features", "memory_labels"):
                other[name][filled:] = junk
            assert (session.run(["labels"], other)[0] == labels).all()
    feed["memory_features"] = feed["memory_features"][:, ::-1].copy()
    assert (session.run(["labels"], feed)[0] != labels).any()  # what is filled has


def test_the_memory_is_a_ring(tracker):
    """Slot 0 keeps the annotated frame, the others hold the latest frames; nothing else is written."""
    session = onnxruntime.InferenceSession(tracker)
    shape = {i.name: i.shape for i in session.get_inputs()}
    feed = {name: np.zeros(shape[name], np.float32) for name in ("memory_features", "memory_labels")}
    feed |= {"frame": np.full((96, 160, 3), 99, np.uint8), "mask": np.zeros((96, 160), np.uint8)}
    for seen, slot in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 1), (1000, 1), (1001, 2)):
        _, labels, features, *memory = session.run(None, {**feed, "seen": np.array([seen], np.int32)})
        for after, own in zip(memory, (features, labels), strict=True):
            np.testing.assert_array_equal(after[slot], own.transpose(1, 2, 0))
            assert not np.delete(after, slot, 0).any()


def test_metadata_say_what_made_it(tracker):
    info = export.load_engine(tracker).info
    assert info["version"] == propagate.__version__ and info["model"] == "random" and info["weights"] is None
    assert (info["height"], info["width"], info["objects"], info["ids"]) == (96, 160, 3, [0, 1, 2, 3])
    assert Propagation(**info["settings"]) == SMALL and info["dtype"] == "float32"


def test_an_answer_stays_what_it_was(tracker, small_clip):
    engine, mask = export.load_engine(tracker), read_ids(small_clip / "f0.png")
    frames = dict(propagate.Video(small_clip / "clip.mp4").frames(range(12)))
    first, labels = engine.step(frames[0], mask), engine.read("labels")
    kept = first.copy(), labels.copy()
    second = engine.step(frames[11])
    assert (first == kept[0]).all() and (labels == kept[1]).all() and (second != first).any()


# What TensorRT reads (its ONNX parser's published list, opsets 9 to 20): the operators used here, with restrictions.

PLAIN = """
    Add And ArgMax Cast Clip Concat Constant Conv Div Equal Exp Expand Floor Gather GatherElements GatherND Greater
    Less Log MatMul Max Min Mod Mul Neg Not Or Pad Pow Reciprocal Relu Reshape Round Softmax Split Sqrt Sub Tile
    Transpose Where
"""
CONSTANT_AXES = "ReduceMax ReduceMin ReduceSum ReduceL2 ReduceLogSumExp Slice Squeeze Unsqueeze"
ARITHMETIC = "Add Div MatMul Mod Mul Pow ReduceMax ReduceSum Sub Where"


def assert_tensorrt_reads(path: Path) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.input, *graph.output]}
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    constants |= {
        n.output[0]: onnx.helper.get_node_attr_value(n, "value") for n in graph.node if n.op_type == "Constant"
    }
    ends = {v.name for v in [*graph.input, *graph.output]}

    def kind(name: str) -> int:
        return (
            onnx.helper.np_dtype_to_tensor_dtype(constants[name].dtype) if name in constants else kinds[name].elem_type
        )

    for name, value in kinds.items():
        assert value.elem_type not in (onnx.TensorProto.DOUBLE, 0), name
        assert all(d.HasField("dim_value") and d.dim_value > 0 for d in value.shape.dim), f"{name} is not static"
    for node in graph.node:
        here, attributes = f"{node.op_type} {node.name}", {a.name: a for a in node.attribute}
        assert node.domain == "", here
        inputs = [name for name in node.input if name]
        for name in [*inputs, *node.output]:
            if kind(name) == onnx.TensorProto.UINT8:
                assert name in ends and node.op_type == "Cast", here
                other = kind(node.output[0] if name == node.input[0] else node.input[0])
                assert other in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16), (
                    f"{here}: 8 bits to or from integers"
                )
        if node.op_type in ARITHMETIC.split():
            assert kind(node.output[0]) != onnx.TensorProto.INT64, f"{here}: 64-bit arithmetic"
        if node.op_type in CONSTANT_AXES.split():
            assert all(name in constants for name in node.input[1:]), here
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any(), here
        elif node.op_type == "TopK":
            assert attributes["sorted"].i == 1 if "sorted" in attributes else True, here
            assert node.input[1] in constants and constants[node.input[1]].item() < 3840, here
        elif node.op_type == "ScatterND":
            assert "reduction" not in attributes or attributes["reduction"].s == b"none", here
        elif node.op_type == "MaxPool":
            assert len(node.output) == 1 and set(attributes["dilations"].ints or [1]) == {1}, here
        elif node.op_type == "Resize":
            assert attributes["mode"].s in (b"linear", b"nearest"), here
            assert attributes["coordinate_transformation_mode"].s in (b"half_pixel", b"pytorch_half_pixel"), here
            assert "antialias" not in attributes or attributes["antialias"].i == 0, here
            assert node.input[-1] in constants, here
        else:
            assert node.op_type in PLAIN.split(), here


@pytest.mark.parametrize("graph", ["tracker", "reduced", "half", "default", "int8"])
def test_tensorrt_reads_the_graph(graph, request):
    assert_tensorrt_reads(request.getfixturevalue(graph))


@pytest.mark.parametrize(("graph", "opset", "ir"), [("tracker", 18, 8), ("int8", 18, 8), ("half", 20, 9)])
def test_a_graph_asks_for_no_newer_runtime_than_its_operators_do(graph, opset, ir, request):
    """ONNX Runtime 1.17 ends at IR version 9, 1.15 at 8."""
    model = onnx.load(request.getfixturevalue(graph))
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir)


def test_the_walk_finds_what_tensorrt_does_not_read(tracker, tmp_path):
    for change in ("topk", "operator", "float64"):
        model = onnx.load(tracker)
        if change == "topk":
            k = next(node for node in model.graph.node if node.op_type == "TopK").input[1]
            next(i for i in model.graph.initializer if i.name == k).CopyFrom(
                onnx.numpy_helper.from_array(np.array([4000]), k)
            )
        elif change == "operator":
            next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Det"
        else:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [1]))
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises((AssertionError, onnx.shape_inference.InferenceError)):
            assert_tensorrt_reads(tmp_path / "changed.onnx")


@pytest.fixture(scope="module")
def tensorrt() -> ModuleType:
    """TensorRT for RTX, whose parser and compiler need no GPU; its libraries are in one package, its API in another."""
    for package in ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings"):
        if not find_spec(package):
            pytest.skip(f"{package} is not installed; make test does so on x86-64 Linux")
    importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")  # loads the libraries
    return importlib.import_module("tensorrt_rtx_bindings")


def without_gpu(trt: ModuleType, target: str) -> SimpleNamespace:
    """The package, its builder compiling for the given GPUs and not for the one of this machine."""

    class Builder(trt.Builder):
        def create_builder_config(self):
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
            return config

    return SimpleNamespace(**vars(trt) | {"Builder": Builder})


@pytest.mark.parametrize("target", ["SM75", "SM89", "SM120"])
@pytest.mark.parametrize("graph", ["tracker", "reduced", "half", "default", "int8"])
@pytest.mark.filterwarnings("ignore:Use ")
def test_tensorrt_builds_the_graph(graph, target, tensorrt, request, tmp_path, monkeypatch):
    """Its own parser reads the graph and its own compiler turns every part into code, for Turing, Ada and Blackwell;
    the file holds what it was made from."""
    if target == "SM75" and graph != "half":
        pytest.skip("TensorRT for RTX has no float32 products for Turing")
    monkeypatch.setitem(sys.modules, "tensorrt", without_gpu(tensorrt, target))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test GPU")
    engine = tmp_path / "tracker.engine"
    graph = request.getfixturevalue(graph)
    engine.write_bytes(export.build_engine(graph, export.engine_info(graph), tmp_path / "tracker.timing"))
    made = {"hardware": "NVIDIA Test GPU", "tensorrt": tensorrt.__version__}
    assert export.engine_info(engine) == export.engine_info(graph) | made
    weights = onnx.load(graph).graph.initializer
    _, plan = export.TensorRTEngine.read_file(engine)
    assert len(plan) > 0.9 * sum(onnx.numpy_helper.to_array(weight).nbytes for weight in weights)


def on_a_gpu(monkeypatch, *providers: str) -> list:
    """ONNX Runtime for a GPU, where there is none: the providers asked of each session; all but the CPU's fail."""
    asked, real = [], onnxruntime.InferenceSession

    def session(path, options, providers, enable_fallback):
        asked.append(list(providers))
        if providers[0][0] != "CPUExecutionProvider":
            raise RuntimeError("no such library\nand more")
        return real(path, options, providers)

    monkeypatch.setattr(export, "pick_device", lambda name: torch.device("cuda:1" if name == "auto" else name))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [f"{p}ExecutionProvider" for p in providers])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    return asked


def test_providers_come_in_order_and_fall_back(tracker, half, monkeypatch, capfd):
    """TensorRT, CUDA, CPU; all on the GPU that was asked for; what fails is named, and the next one is taken."""
    asked = on_a_gpu(monkeypatch, "Tensorrt", "CUDA", "CPU")
    engine = export.load_engine(tracker)
    names = [[name.removesuffix("ExecutionProvider") for name, _ in each] for each in asked]
    assert names == [["Tensorrt", "CUDA", "CPU"], ["CUDA", "CPU"], ["CPU"]] and engine.provider == "CPU"
    (_, tensorrt), (_, cuda), (_, cpu) = asked[0]
    assert tensorrt["device_id"] == cuda["device_id"] == 1 and cpu == {}
    out, err = capfd.readouterr()
    assert out == "" and f"note: {tracker}: Tensorrt cannot run it (no such library); going on without\n" in err
    assert "ONNX Runtime has no CUDA here, so the CPU runs it" in err

    # An engine that TensorRT built is found again by the graph's content: precision and weights are the graph's.
    assert tensorrt["trt_engine_cache_enable"] and not any("fp16" in key or "int8" in key for key in tensorrt)
    export.load_engine(half)
    assert asked[3][0][1]["trt_engine_cache_prefix"] != tensorrt["trt_engine_cache_prefix"]


def test_a_device_that_onnx_runtime_lacks_is_refused(tracker, monkeypatch):
    on_a_gpu(monkeypatch, "CPU")
    with pytest.raises(common.UserError, match="--device cuda:0: ONNX Runtime has no CUDA here; run pip install onnx"):
        export.load_engine(tracker, "cuda:0")
    assert export.load_engine(tracker, "cpu").provider == "CPU"


@pytest.mark.parametrize("kept", ["fitting", "broken", "other GPU"])
def test_timings_are_kept_for_the_next_engine(kept, tmp_path, monkeypatch):
    """Those that do not fit are begun anew (a stand-in for TensorRT's builder, which wants a GPU for them)."""
    used = []

    class Cache(SimpleNamespace):
        def serialize(self) -> bytes:
            return b"new " + self.content

    def use(cache, ignore_mismatch) -> bool:
        if cache.content == b"other GPU":
            return False
        used[:] = [cache]
        return True

    config = SimpleNamespace(
        create_timing_cache=lambda content: None if content == b"broken" else Cache(content=content),
        set_timing_cache=use,
        get_timing_cache=lambda: used[0],
    )
    builder = SimpleNamespace(
        create_network=lambda flags: None,
        create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: b"plan",
    )
    trt = SimpleNamespace(
        __version__="0",
        Logger=type("Logger", (), {"WARNING": 0, "__init__": lambda self, level: None}),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
        Builder=lambda logger: builder,
        OnnxParser=lambda network, logger: SimpleNamespace(parse=lambda content: True),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test GPU")
    (tmp_path / "graph.onnx").write_bytes(b"graph")
    (tmp_path / "tracker.timing").write_bytes(kept.encode())
    assert export.build_engine(tmp_path / "graph.onnx", {}, tmp_path / "tracker.timing").endswith(b"plan")
    assert (tmp_path / "tracker.timing").read_bytes() == (b"new fitting" if kept == "fitting" else b"new ")


def test_what_tensorrt_cannot_read_is_said(tracker, tensorrt, tmp_path, monkeypatch):
    model = onnx.load(tracker)
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Det"
    onnx.save(model, tmp_path / "changed.onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", without_gpu(tensorrt, "SM89"))
    with pytest.raises(common.UserError, match=r"changed.onnx: TensorRT [0-9.]+ cannot read Det node_relu"):
        export.build_engine(tmp_path / "changed.onnx", {}, tmp_path / "tracker.timing")


def test_the_graph_searches_locally(reduced):
    """Its matrix products are the extractor's, the windows' and the reduction's; far from hw x nhw."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(reduced)).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.value_info, *graph.output]}
    shapes |= {i.name: list(i.dims) for i in graph.initializer}
    flops = {"Conv": 0, "MatMul": 0, "Gemm": 0}
    for node in graph.node:
        if node.op_type == "Conv":
            flops["Conv"] += 2 * np.prod(shapes[node.output[0]]) * np.prod(shapes[node.input[1]][1:])
        elif node.op_type in flops:
            flops[node.op_type] += 2 * np.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]

    settings = replace(SMALL, size="160", radius=3)
    encoder = common.load_encoder("random", None, settings, "cpu")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder(torch.zeros(1, 200, 300, 3, dtype=torch.uint8))
    assert flops["Conv"] == counter.get_total_flops()

    step = export.Step(encoder, (200, 300), 2)
    tiles = [(q, window) for row in step.tiles for q, window in row]
    windows = sum((y1 - y0) * (x1 - x0) * len(cells) for (y0, y1, x0, x1), [(cells, _)] in tiles) * step.slots
    resize = 3 * (160 * 200 * 300 + 160 * 300 * 240)
    assert flops["MatMul"] == 2 * (windows * 256 + resize)
    assert len(tiles) == 4 and windows < 0.45 * (20 * 30) ** 2 * step.slots
    for (y0, y1, x0, x1), [(cells, outside)] in tiles:  # every cell of a window is of use to a cell of the tile
        assert not outside.all(0).any() and outside.shape == ((y1 - y0) * (x1 - x0), len(cells))


# The command line


@pytest.mark.parametrize(("graph", "share", "flags"), [("tracker", 0.9995, ()), ("int8", 0.98, ("--exempt-first",))])
def test_propagate_runs_it_to_the_same_masks(graph, share, flags, small_clip, tmp_path, cli, request):
    tracker = request.getfixturevalue(graph)
    for start in ((), ("--mask-frame", 5)):  # from a frame in the middle it runs both ways
        job = ["--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png", *start, "--overwrite"]
        code, out, err = cli(propagate, *job, "--engine", tracker, "--out", tmp_path / "engine")
        assert code == 0 and "12 masks" in out, err
        assert cli(propagate, *job, *FLAGS, *flags, "--device", "cpu", "--out", tmp_path / "torch")[0] == 0
        for path in sorted((tmp_path / "torch" / "masks").iterdir()):
            a, b = read_ids(path), read_ids(tmp_path / "engine" / "masks" / path.name)
            assert (a == b).mean() > share
    job = json.loads((tmp_path / "engine" / "run.json").read_text())["job"]
    assert job["model"] == "random" and job["settings"]["context"] == 3 and job["engine"]


def test_q_stops_an_engine_too(tracker, small_clip, tmp_path, cli, monkeypatch):
    shown = []
    monkeypatch.setattr(propagate, "need_window", lambda: None)
    monkeypatch.setattr(propagate, "show", lambda picture: shown.append(picture))  # False: as if q was pressed
    job = ["--engine", tracker, "--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png"]
    assert cli(propagate, *job, "--mask-frame", 6, "--show", "--out", tmp_path / "out")[0] == 0
    assert len(shown) == 1 and len(list((tmp_path / "out" / "masks").iterdir())) == 2


def test_propagate_keeps_the_ids_and_goes_on(tracker, small_clip, tmp_path, cli):
    mask = read_ids(small_clip / "f0.png")
    write_mask(tmp_path / "own.png", np.array([0, 200, 0, 7], np.uint8)[mask])  # two objects, ids 200 and 7
    job = ["--engine", tracker, "--video", small_clip / "clip.mp4", "--mask", tmp_path / "own.png"]
    assert cli(propagate, *job, "--out", tmp_path / "out")[0] == 0
    masks = sorted((tmp_path / "out" / "masks").iterdir())
    before = [path.read_bytes() for path in masks]
    assert set(np.unique([read_ids(path) for path in masks])) == {0, 7, 200}
    for path in masks[6:]:  # as if it had been stopped
        path.unlink()
    code, out, _ = cli(propagate, *job, "--out", tmp_path / "out")
    assert code == 0 and "12 masks" in out
    assert [path.read_bytes() for path in masks] == before


def example(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "examples/run_onnx.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("graph", "share"), [("tracker", 0.999), ("int8", 0.998)])
def test_the_example_gives_the_same_masks(graph, share, small_clip, tmp_path, request):
    tracker = request.getfixturevalue(graph)
    cv2.imwrite(str(tmp_path / "grey.png"), 20 * read_ids(small_clip / "f0.png"))
    engine, mask = export.load_engine(tracker), read_ids(small_clip / "f0.png")
    for given, step in ((tmp_path / "grey.png", 20), (small_clip / "f0.png", 1)):
        result = example(tracker, small_clip / "clip.mp4", given, tmp_path / "out")
        assert result.returncode == 0 and result.stdout == f"{tmp_path / 'out'}: 12 masks\n", result.stderr
        for index, frame in propagate.Video(small_clip / "clip.mp4").frames(range(12)):
            answer = engine.step(frame, None if index else mask)
            own = read_ids(tmp_path / "out" / f"{index:05d}.png")
            assert (own == step * answer).mean() > share  # OpenCV's decoder rounds colours in its own way
    assert len((ROOT / "examples" / "run_onnx.py").read_text().splitlines()) < 90


IDS = np.array([0, 5, 9, 200], np.uint8)


@pytest.mark.parametrize(
    "kind", ["palette", "grey palette", "grey", "RGB of ids", "reds", "transparent", "16 bits", "void", "shuffled"]
)
def test_the_example_reads_every_kind_of_mask(kind, tracker, small_clip, tmp_path):
    """The first mask comes back as it was given: ids, or the colours of a picture that has no ids."""
    numbers = read_ids(small_clip / "f0.png")
    ids, reds = IDS[numbers], np.array([[0, 0, 0], [255, 0, 0], [254, 0, 0], [0, 0, 255]], np.uint8)
    picture = Image.fromarray(ids)
    if kind == "palette":
        picture.putpalette(propagate.PALETTE.tobytes())
    elif kind == "grey palette":
        picture.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    elif kind == "RGB of ids":
        picture = Image.fromarray(np.repeat(ids[..., None], 3, 2))
    elif kind in ("reds", "transparent"):
        picture = Image.fromarray(reds[numbers])
    elif kind == "16 bits":
        picture = Image.fromarray(ids.astype(np.uint16) * 300)
    elif kind == "void":
        picture = Image.fromarray(np.where(numbers == 3, 255, ids).astype(np.uint8))
    elif kind == "shuffled":  # as quantising makes them: black is number 3
        picture = Image.fromarray(3 - numbers)
        picture.putpalette(reds[::-1].tobytes())
    if kind == "transparent":  # of what colour it is there says nothing
        picture.putalpha(Image.fromarray(np.where(numbers, 255, 0).astype(np.uint8)))
    picture.save(tmp_path / "mask.png")
    result = example(tracker, small_clip / "clip.mp4", tmp_path / "mask.png", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert ("255 beside other ids is void" in result.stderr) == (kind == "void")
    masks = [Image.open(path) for path in sorted((tmp_path / "out").iterdir())]
    if kind in ("reds", "transparent", "shuffled"):
        first, last = (np.array(masks[i].convert("RGB")) for i in (0, -1))
        assert (first == reds[numbers]).all() and {*map(tuple, last.reshape(-1, 3))} == {*map(tuple, reds)}
    else:
        first, last = np.array(masks[0]), np.array(masks[-1])
        expected = np.array(picture.convert("L") if kind == "RGB of ids" else picture)
        expected = np.where(expected == 255, 0, expected) if kind == "void" else expected
        assert (first == expected).all() and set(np.unique(last)) == set(np.unique(expected))
        assert masks[0].getpalette() == picture.getpalette()


def test_the_example_says_what_it_cannot_use(tracker, small_clip, tmp_path):
    film, mask, out = small_clip / "clip.mp4", small_clip / "f0.png", tmp_path / "out"
    cv2.imwrite(str(tmp_path / "other.png"), np.ones((10, 10), np.uint8))
    cv2.imwrite(str(tmp_path / "four.png"), np.repeat(np.arange(160, dtype=np.uint8)[None] // 35, 96, 0))
    cv2.imwrite(str(tmp_path / "empty.png"), np.zeros((96, 160), np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    foreign = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8
    )
    onnx.save(foreign, tmp_path / "foreign.onnx")
    clip.write_clip(tmp_path / "small", frames=2, height=64, width=80)
    for args, message in (
        ((), "usage: "),
        ((tmp_path / "none.onnx", film, mask, out), "none.onnx: is not a graph of export.py that runs here"),
        ((tmp_path / "text.png", film, mask, out), "text.png: is not a graph of export.py that runs here"),
        ((tmp_path / "foreign.onnx", film, mask, out), "foreign.onnx: is not a graph of export.py that runs here"),
        ((tracker, tmp_path / "none.mp4", mask, out), "none.mp4: gives no frame 0 of 160x96"),
        ((tracker, tmp_path / "small" / "clip.mp4", mask, out), "clip.mp4: gives no frame 0 of 160x96"),
        ((tracker, film, tmp_path / "none.png", out), "none.png: cannot be read as a mask"),
        ((tracker, film, tmp_path / "text.png", out), "text.png: cannot be read as a mask"),
        ((tracker, film, tmp_path / "other.png", out), "other.png: is 10x10 with 1 object(s); give 160x96 pixels"),
        ((tracker, film, tmp_path / "four.png", out), "with 4 object(s); give 160x96 pixels with 1 to 3 object(s)"),
        ((tracker, film, tmp_path / "empty.png", out), "with 0 object(s); give 160x96 pixels with 1 to 3 object(s)"),
        ((tracker, film, mask, tmp_path / "text.png"), "text.png: cannot be the output folder (File exists)"),
    ):
        result = example(*args)
        assert result.returncode == 1 and message in result.stderr.splitlines()[-1]
        own = [line for line in result.stderr.splitlines() if "onnxruntime" not in line and "cap_" not in line]
        assert "Traceback" not in result.stderr and len(own) <= 1, result.stderr
    assert not out.exists() or not any(out.iterdir())


def test_half_precision_is_checked_too(half):
    graph = onnx.load(half).graph
    kinds = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    assert kinds["memory_features"] == onnx.TensorProto.FLOAT16 and kinds["memory_labels"] == onnx.TensorProto.FLOAT
    assert onnx.load(half).opset_import[0].version == 20
    assert export.load_engine(half).info["dtype"] == "float16"


def test_int8_is_int8(int8, tmp_path):
    """Convolutions stand between INT8 tensors, the affinities are products of two, and ONNX Runtime fuses both."""
    graph = onnx.load(int8).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    read = {name: node.op_type for node in graph.node for name in node.input}
    projections = {node.input[0]: node for node in graph.node if node.op_type == "Conv"}
    convolutions = [node for node in graph.node if node.op_type == "Conv" and ".downsample." not in node.input[1]]
    assert len(convolutions) == 13 and len(projections) == 15
    for node in convolutions:
        assert made[node.input[0]] == made[node.input[1]] == "DequantizeLinear"
        assert read[node.output[0]] == "QuantizeLinear"
    kinds = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    assert kinds["memory_features"] == onnx.TensorProto.INT8 and kinds["memory_labels"] == onnx.TensorProto.FLOAT
    assert export.load_engine(int8).info["dtype"] == "int8"

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    tiles = len(common.cuts(12, 12)) * len(common.cuts(20, 16))
    assert fused["QLinearConv"] >= 13 and fused["MatMulIntegerToFloat"] == tiles


def test_the_int8_memory_holds_features_in_steps(int8):
    graph = onnx.load(int8).graph
    made = {name: node for node in graph.node for name in node.output}
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    (scale,) = {
        float(constants[made[name].input[1]])
        for node in graph.node
        if node.op_type == "MatMul" and made[node.input[0]].op_type == "DequantizeLinear"
        for name in node.input
    }
    session = onnxruntime.InferenceSession(int8)
    feed = {i.name: np.zeros(i.shape, {"tensor(float)": np.float32}.get(i.type, np.int8)) for i in session.get_inputs()}
    feed |= {"frame": np.full((96, 160, 3), 99, np.uint8), "mask": np.zeros((96, 160), np.uint8)}
    feed["seen"] = np.array([0], np.int32)
    features, memory = session.run(["features", "new_memory_features"], feed)
    steps = np.clip(np.round(features / scale), -128, 127).transpose(1, 2, 0)
    assert np.abs(memory[0] - steps).max() <= 1 and (memory[0] == steps).mean() > 0.999  # a tie may round either way
    assert memory[0].max() > 60 and not memory[1:].any()


def test_many_objects_and_no_context(tmp_path, cli):
    out = tmp_path / "tracker.onnx"
    size = ("--height", 48, "--width", 64, "--objects", 200, "--frames", 3, "--radius", 2, "--context", 0)
    code, text, err = cli(export, "--model", "random", *size, "--out", out)
    assert code == 0 and "100.0000%" in text, err
    assert export.load_engine(out).info["objects"] == 200


def test_a_graph_that_fails_its_check_is_not_left(tracker, small_clip, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(export, "write_onnx", lambda path, *_: shutil.copy(tracker, path))
    flags = ["--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png", "--objects", 3, "--radius", 1]
    code, text, err = cli(export, *FLAGS, *flags, "--topk", 1, "--out", tmp_path / "tracker.onnx")
    assert code == 1 and "the check failed, nothing is left behind" in err
    assert "of the mask pixels agree with PyTorch (99.9% wanted)" in text
    assert list(tmp_path.iterdir()) == []


@torch.inference_mode()
def test_features_that_are_no_numbers_or_a_lost_object_fail_the_check(tracker, small_clip, monkeypatch, capsys):
    """Of no number the arg-max is background: most of the pixels of a small object's film."""
    clip = [frame for _, frame in propagate.Video(small_clip / "clip.mp4").frames(range(4))]
    mask = np.zeros((96, 160), np.uint8)
    mask[30:41, 50:61] = 1
    encoder = common.load_encoder("random", None, SMALL, "cpu")
    reference, rate = export.run_reference(encoder, clip, mask, 3)
    answers = iter(reference)

    class Engine:
        provider = "CPU"
        object_there, number = True, 0.0

        def step(self, frame, mask=None):
            if mask is None:
                self.now = next(answers)
                return self.now[0] if self.object_there else np.zeros_like(self.now[0])

        def read(self, name):
            return self.now[{"labels": 1, "features": 2}[name]] + self.number

    monkeypatch.setattr(export, "load_engine", lambda path: Engine())
    for there, number, good in ((True, 0, True), (False, 0, False), (True, math.nan, False), (True, math.inf, False)):
        answers, Engine.object_there, Engine.number = iter(reference), there, number
        assert export.check(tracker, clip, mask, reference, rate, 0.99, 3) == good
        said = capsys.readouterr().out
        assert float(re.search(r"([\d.]+)% of the mask pixels agree", said)[1]) > 99
        assert there or "0.0% of the object that agrees least (80%)" in said


def test_features_of_any_length_fit_half_precision(tmp_path):
    """Affinities that are not of unit vectors would leave half's range: UVC's, CorrFlow's, MAST's."""
    s = replace(SMALL, l2=False, temperature=1000.0)
    encoder = common.load_encoder("random", None, s, "cpu")
    args = export.Args("random", height=64, width=96, fp16=True, propagation=s)
    clip = [frame for frame, _ in export.moving_clip(5, (64, 96), 1)]
    mask = next(export.moving_clip(1, (64, 96), 1))[1]
    with torch.inference_mode():
        for weight in encoder.net[-1][-1].conv2.parameters():
            weight.mul_(64)
        longest = float(encoder(torch.from_numpy(clip[0])[None]).square().sum(1).max())
    assert 65504 < longest < 64 * 65504
    reference, rate = export.run_reference(encoder, clip, mask, 1)
    export.write_onnx(tmp_path / "tracker.onnx", args, encoder.cpu(), export.describe(args))
    assert export.check(tmp_path / "tracker.onnx", clip, mask, reference, rate, 0.99, 3)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 200)])
def test_the_clip_of_the_check_may_be_long(size):
    clip = list(export.moving_clip(200, size, 2))
    assert len(clip) == 200 and all(frame.shape == (*size, 3) and mask.max() == 2 for frame, mask in clip)


def test_an_engine_of_an_earlier_graph_does_not_stay_beside_a_new_one(tmp_path, cli):
    """trtexec's engines say nothing of themselves: the graph beside one is what it was built from."""
    job = [*FLAGS, "--height", 48, "--width", 64, "--frames", 2, "--out", tmp_path / "tracker.onnx"]
    (tmp_path / "tracker.engine").write_bytes(b"ftrt")
    code, _, err = cli(export, *job)
    assert code == 2 and "tracker.engine: is there already; add --overwrite" in err
    assert cli(export, *job, "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tracker.onnx"]


@pytest.mark.parametrize("precision", [[], ["--int8"]])
def test_real_video(precision, shared, imagenet, tmp_path, cli):
    folder = shared / "data" / "DAVIS_train_256"
    frames = next(iter(folder.glob("JPEGImages/*/bear")))
    mask = next(iter(folder.glob("Annotations/*/bear"))) / "00000.png"
    flags = ["--weights", imagenet, "--video", frames, "--mask", mask, "--size", 96, "--context", 4, "--frames", 8]
    code, text, err = cli(export, *flags, *precision, "--out", tmp_path / "tracker.onnx")
    assert code == 0 and "check: 7 frames" in text, err + text
    assert float(re.search(r"([\d.]+)% of the mask pixels agree", text)[1]) > (99 if precision else 99.9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objects", 0], "--objects 0: give 1 to 255"),
        (["--objects", 256], "--objects 256: give 1 to 255"),
        (["--objects", "many"], "Error parsing --objects: invalid literal for int() with base 10: 'many'; see --help"),
        (["--localization", "here"], "invalid choice 'here' for argument '--localization'. Expected one of ('none', "),
        (["one.png", "two.png"], "unknown options or words (a pattern wants quotes): one.png, two.png; see --help"),
        (["--topk", 3840], "--topk 3840: cannot be exported, TensorRT's TopK ends below 3840"),
        (["--carry", "hard"], "--carry hard: cannot be exported, the graph has no such step"),
        (["--memory", "spaced"], "--memory spaced: cannot be exported"),
        (["--no-keep-first"], "--keep-first False: cannot be exported"),
        (["--localization", "window"], "--localization window: cannot be exported"),
        (["--opset", 13], "--opset 13: give 18 to 20"),
        (["--height", 0], "--height 0 --width 854: give 16 pixels or more"),
        (["--context", -1], "--context -1: give 0 or more"),
        (["--frames", 1], "--frames 1: give 2 or more"),
        (["--frames", 10**8], "--frames 100000000: give 2 or more, at most 10000"),
        (["--height", 10**6], "--height 1000000 --width 854: give 16 pixels or more, and at most 8192"),
        (["--width", 15], "--height 480 --width 15: give 16 pixels or more"),
        (["--width", "wide"], "Error parsing --width: "),
        (["--context", 10**5], "--context 100000: a memory of over 2^31 numbers, no runtime takes it"),
        (["--radius", 10**12], "--radius 1000000000000: is too large"),
        (["--size", "100000x100000"], "--size 100000x100000: is more pixels than a video has"),
        (["--upsample", 10**6], "--upsample 1000000: is too large"),
        (["--upsample", 64], "--size 480 --upsample 64: makes an input of 30720x54656; give at most 8192 pixels"),
        (["--topk", 0], "--topk 0: give 1 or more"),
        (["--temperature", "nan"], "--temperature nan: give 1e-09 or more"),
        (["--stride", 3], "--layer res3 --stride 3: not to be had of resnet18"),
        (["--layer", "conv13"], "--layer conv13 --stride 8: not to be had of resnet18"),
        (["--weights", "none.pth"], "none.pth: no such weights file"),
        (["--weights", Path(__file__).parent], "no such weights file"),
        (["--weights", __file__], "is not a PyTorch checkpoint"),
        (["--video", __file__, "--mask", __file__], "cannot be read as a film"),
        (["--video", Path(__file__).parent, "--mask", "f0.png"], "holds no pictures"),
        (["--mask", "f0.png"], "--video and --mask: give both"),
        (["--model", "torchvision:none"], "torchvision has no ResNet or VGG of this name"),
        (["--out", ""], "--out .: give a name that ends in .onnx"),
        (["--video", "clip.mp4"], "--video and --mask: give both"),
        (["--video", "clip.mp4", "--mask", "f0.png"], "clip.mp4: no such video"),
        (["--int8"], "--int8: needs --video and --mask"),
        (["--int8", "--fp16"], "--int8 and --fp16: give one of the two"),
        (["--out", "tracker.engine"], "give a name that ends in .onnx"),
        (["--out", __file__.replace(".py", ".onnx"), "--model", "none"], "unknown model 'none'"),
    ],
)
def test_bad_flags(flags, message, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(export, "--model", "random", *flags)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tmp_path, cli):
    (tmp_path / "tracker.onnx").write_bytes(b"mine")
    code, _, err = cli(export, "--model", "random", "--out", tmp_path / "tracker.onnx")
    assert code == 2 and "is there already; add --overwrite" in err
    assert (tmp_path / "tracker.onnx").read_bytes() == b"mine"


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path, cli):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file/tracker.onnx", tmp_path / f"{'long' * 62}.onnx"):
        code, _, err = cli(export, "--model", "random", "--out", out)
        assert code == 2 and f"{out}: cannot be written" in err and "running PyTorch" not in err


def test_a_clip_that_does_not_fit_the_graph(small_clip, cli, tmp_path, monkeypatch):
    made = []
    job = ["--model", "random", "--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png"]
    job += ["--out", tmp_path / "tracker.onnx"]
    monkeypatch.setattr(export, "Video", lambda source: made.append(source) or propagate.Video(source))
    assert "is 160x96, the graph 170x96; give its own size" in cli(export, *job, "--height", 96, "--width", 170)[2]
    assert made == [str(small_clip / "clip.mp4")]  # indexed once
    assert "holds 3 objects, the graph 2; give --objects 3" in cli(export, *job, "--objects", 2)[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_tensorrt_that_is_not_there(small_clip, cli, tmp_path):
    job = ["--model", "random", "--tensorrt", "--out", tmp_path / "tracker.onnx"]
    clip = ["--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png"]
    assert "export with --int8 alone" in cli(export, *job, *clip, "--int8")[2]
    code, _, err = cli(export, *job)
    assert code == 2 and err.count("\n") == 1 and "--tensorrt: needs" in err and "export with --fp16 alone" in err
    assert f"trtexec --onnx={tmp_path}/tracker.onnx --saveEngine={tmp_path}/tracker.engine --stronglyTyped" in err


def test_engines_that_cannot_run(tracker, small_clip, tmp_path, cli):
    def complaint(engine, *flags, video=small_clip / "clip.mp4", mask=small_clip / "f0.png") -> str:
        job = ["--engine", engine, "--video", video, "--mask", mask, "--out", tmp_path / "out", *flags]
        code, out, err = cli(propagate, *job)
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return err

    assert "none.onnx: no such engine" in complaint(tmp_path / "none.onnx")
    assert "is neither .onnx nor .engine" in complaint(__file__)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    opsets = [onnx.helper.make_opsetid("", 18)]
    foreign = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=10)
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert "was not written by softcopy's export.py" in complaint(tmp_path / "foreign.onnx")
    for info in ("", "{}", "[]", "5", '{"settings": {}}'):
        onnx.helper.set_model_props(foreign, {"softcopy": info})
        onnx.save(foreign, tmp_path / "foreign.onnx")
        assert "was not written by softcopy's export.py" in complaint(tmp_path / "foreign.onnx")
    (tmp_path / "damaged.onnx").write_bytes(tracker.read_bytes()[:1000])
    assert "cannot load it" in complaint(tmp_path / "damaged.onnx")
    (tmp_path / "plan.engine").write_bytes(b"ftrt")
    assert "was not written by softcopy's export.py, nor is" in complaint(tmp_path / "plan.engine")

    clip.write_clip(tmp_path / "other", frames=2, height=64, width=80)
    other = {"video": tmp_path / "other" / "clip.mp4", "mask": tmp_path / "other" / "f0.png"}
    assert "is 80x64" in (said := complaint(tracker, **other)) and "export with --height 64 --width 80" in said
    many = np.arange(96 * 160, dtype=np.uint8).reshape(96, 160) // 50
    write_mask(tmp_path / "many.png", many)
    assert "has 5 objects" in (said := complaint(tracker, mask=tmp_path / "many.png")) and "--objects 5" in said
    assert "--topk 7: is fixed in" in complaint(tracker, "--topk", 7)
    assert "--topk 10: is fixed in" in complaint(tracker, "--topk", 10)  # the default of a run without --engine
    assert "--weights other.pth: is fixed in" in complaint(tracker, "--weights", "folder/other.pth")
    assert "--device nonsense: cannot be used here" in complaint(tracker, "--device", "nonsense")
    assert "--dtype bfloat16: is fixed in" in complaint(tracker, "--dtype", "bfloat16")
    assert "starts from one annotated frame, not 2" in complaint(
        tracker, "--mask", small_clip / "f0.png", "--mask-frame", 0, "--mask-frame", 4
    )


def stand_in_for_tensorrt(graph: Path) -> SimpleNamespace:
    """TensorRT's runtime, played by ONNX Runtime: a step reads and writes the memory at the addresses it was given."""
    session = onnxruntime.InferenceSession(graph)
    inputs, outputs = ([tensor.name for tensor in some] for some in (session.get_inputs(), session.get_outputs()))
    tensors = {tensor.name: tensor for tensor in (*session.get_inputs(), *session.get_outputs())}
    kinds = {"tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    addresses = {}

    def at(name: str) -> np.ndarray:
        kind, shape = np.dtype(kinds[tensors[name].type]), tensors[name].shape
        held = (ctypes.c_char * (kind.itemsize * math.prod(shape))).from_address(addresses[name])
        return np.frombuffer(held, kind).reshape(shape)

    def execute(stream: int) -> bool:
        for name, value in zip(outputs, session.run(outputs, {name: at(name) for name in inputs}), strict=True):
            at(name)[...] = value
        return True

    context = SimpleNamespace(set_tensor_address=addresses.__setitem__, execute_async_v3=execute)
    engine = SimpleNamespace(
        num_io_tensors=len(tensors),
        get_tensor_name=list(tensors).__getitem__,
        get_tensor_dtype=lambda name: tensors[name].type,
        get_tensor_shape=lambda name: tensors[name].shape,
        create_execution_context=lambda: context,
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan == b"plan" else None)
    logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})
    return SimpleNamespace(__version__="0", Logger=logger, Runtime=lambda logger: runtime, nptype=kinds.__getitem__)


def test_an_engine_gives_the_graphs_masks(tracker, small_clip, tmp_path, cli, monkeypatch):
    """What surrounds TensorRT's step, on host memory: the memory goes round by its addresses, a mask starts afresh."""
    path = tmp_path / "tracker.engine"
    info = export.load_engine(tracker).info | {"hardware": "NVIDIA Test GPU", "tensorrt": "0"}
    head = json.dumps(info).encode()
    path.write_bytes(export.TensorRTEngine.MAGIC + len(head).to_bytes(4, "little") + head + b"plan")
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_for_tensorrt(tracker))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA Test GPU")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.clone())
    job = ["--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png", "--mask-frame", 5]
    for engine in (path, tracker):
        where = ("--device", "cpu") if engine == tracker else ()
        code, out, err = cli(propagate, *job, "--engine", engine, *where, "--out", tmp_path / engine.suffix)
        assert code == 0 and "12 masks" in out, err
    for mask in sorted((tmp_path / ".onnx" / "masks").iterdir()):
        assert mask.read_bytes() == (tmp_path / ".engine" / "masks" / mask.name).read_bytes()

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA Other GPU")
    with pytest.raises(common.UserError, match="was built for NVIDIA Test GPU and TensorRT 0, here is NVIDIA Other"):
        export.load_engine(path)


def test_an_engine_says_what_it_needs(tmp_path, cli, monkeypatch):
    info = export.describe(export.Args(height=96, width=160)) | {"hardware": "NVIDIA Test GPU"}
    head, path = json.dumps(info).encode(), tmp_path / "tracker.engine"
    path.write_bytes(export.TensorRTEngine.MAGIC + len(head).to_bytes(4, "little") + head + b"plan")
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it fails
    with pytest.raises(common.UserError, match=r"needs the tensorrt package; run pip install tensorrt"):
        export.load_engine(path)
