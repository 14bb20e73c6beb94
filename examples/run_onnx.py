"""Run an exported tracker with numpy, OpenCV and ONNX Runtime alone: a film and a mask in, a mask a frame out.

python export.py --model imagenet --height 480 --width 854 --objects 1 --out tracker.onnx
python examples/run_onnx.py tracker.onnx clip.mp4 f0.png masks/
"""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

if len(sys.argv) != 5:
    sys.exit(f"usage: {sys.argv[0]} tracker.onnx film mask.png output-folder")
graph, film, first_mask, out = sys.argv[1:]

# 1. Open the graph; its metadata say what it was made for.
onnxruntime.preload_dlls()  # CUDA of pip's packages
usable = ("Tensorrt", "CUDA", "CPU") if shutil.which("nvidia-smi") else "CPU"  # in this order, where they are there
providers = [name for name in onnxruntime.get_available_providers() if name.startswith(usable)]
options = onnxruntime.SessionOptions()
options.enable_mem_pattern = False  # a fifth less memory
options.add_session_config_entry("session.x64quantprecision", "1")  # INT8 sums overflow on x86 without VNNI
session = onnxruntime.InferenceSession(graph, options, providers=providers)
info = json.loads(session.get_modelmeta().custom_metadata_map["softcopy"])
size, device = (info["height"], info["width"]), "cpu" if session.get_providers()[0][:3] == "CPU" else "cuda"

# 2. Two memories on the device, zeros at first: each step reads one and writes the other.
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
memory = [(t.name, t.shape, kinds[t.type]) for t in session.get_inputs() if t.name.startswith("memory_")]
place = onnxruntime.OrtValue.ortvalue_from_numpy
memories = [{name: place(np.zeros(shape, kind), device, 0) for name, shape, kind in memory} for _ in range(2)]

# 3. The annotated frame's mask: grey ids, or a palette such as DAVIS's, whose colours hold the bits of the id.
mask, video, seen = cv2.imread(first_mask, cv2.IMREAD_UNCHANGED), cv2.VideoCapture(film), 0
if mask is not None and mask.ndim == 3:
    mask = sum((mask[..., 2 - c].astype(int) >> (7 - k) & 1) << (3 * k + c) for k in range(3) for c in range(3))
if mask is None or mask.shape != size or len(ids := np.unique(np.append(mask, 0))) > info["objects"] + 1:
    sys.exit(f"error: {first_mask}: give a mask of {size[1]}x{size[0]} pixels with {info['objects']} object(s) at most")
mask = np.searchsorted(ids, mask).astype(np.uint8)  # 1, 2, ...

# 4. A step a frame.
Path(out).mkdir(parents=True, exist_ok=True)
while (read := video.read())[0] and read[1].shape[:2] == size:
    step = session.io_binding()
    step.bind_cpu_input("frame", cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    step.bind_cpu_input("mask", mask)  # read where seen is 0
    step.bind_cpu_input("seen", np.array([seen], np.int32))
    for name, before in memories[0].items():
        step.bind_ortvalue_input(name, before)
        step.bind_ortvalue_output(f"new_{name}", memories[1][name])
    step.bind_output("new_mask", "cpu")
    session.run_with_iobinding(step)
    cv2.imwrite(f"{out}/{seen:05d}.png", step.get_outputs()[-1].numpy())
    memories, seen = memories[::-1], seen + 1
sys.exit(print(f"{out}: {seen} masks") if seen else f"error: {film}: gives no frames of {size[1]}x{size[0]} pixels")
