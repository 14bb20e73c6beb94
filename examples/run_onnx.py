"""Run an exported tracker with numpy, OpenCV and ONNX Runtime alone: a film and a mask in, a mask a frame out.

python export.py --model imagenet --height 480 --width 854 --objects 1 --out tracker.onnx
python examples/run_onnx.py tracker.onnx clip.mp4 f0.png masks/
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

graph, film, first_mask, out = sys.argv[1:]

# 1. Open the graph; its metadata say what it was made for.
content, there = Path(graph).read_bytes(), onnxruntime.get_available_providers()
allowed = {"trt_fp16_enable": b'"dtype": "float16"' in content, "trt_int8_enable": b'"dtype": "int8"' in content}
wanted = {"TensorrtExecutionProvider": allowed, "CUDAExecutionProvider": {}, "CPUExecutionProvider": {}}
providers = [(name, wanted[name]) for name in wanted if name in there]
options = onnxruntime.SessionOptions()
options.enable_mem_pattern = False  # a fifth less memory
options.add_session_config_entry("session.x64quantprecision", "1")  # INT8 sums overflow on x86 without VNNI
session = onnxruntime.InferenceSession(graph, options, providers=providers)
info = json.loads(session.get_modelmeta().custom_metadata_map["softcopy"])
device = "cpu" if session.get_providers()[0].startswith("CPU") else "cuda"

# 2. Two memories on the device, zeros at first: each step reads one and writes the other.
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
inputs, place = session.get_inputs(), onnxruntime.OrtValue.ortvalue_from_numpy
memory = [(tensor.name, tensor.shape, kinds[tensor.type]) for tensor in inputs if tensor.name.startswith("memory_")]
memories = [{name: place(np.zeros(shape, kind), device, 0) for name, shape, kind in memory} for _ in range(2)]

# 3. The annotated frame's mask: ids 1 to info["objects"], here from the grey values of a picture.
mask = cv2.imread(first_mask, cv2.IMREAD_GRAYSCALE)
mask = np.searchsorted(np.unique(np.append(mask, 0)), mask).astype(np.uint8)

# 4. A step a frame.
Path(out).mkdir(parents=True, exist_ok=True)
video, seen = cv2.VideoCapture(film), 0
while (read := video.read())[0]:
    frame = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
    if frame.shape[:2] != (info["height"], info["width"]):
        sys.exit(f"error: {film}: {graph} wants frames of {info['width']}x{info['height']}")
    step = session.io_binding()
    step.bind_cpu_input("frame", frame)
    step.bind_cpu_input("mask", mask)  # read where seen is 0
    step.bind_cpu_input("seen", np.array([seen], np.int32))
    for name in memories[0]:
        step.bind_ortvalue_input(name, memories[0][name])
        step.bind_ortvalue_output(f"new_{name}", memories[1][name])
    step.bind_output("new_mask", "cpu")
    session.run_with_iobinding(step)
    cv2.imwrite(f"{out}/{seen:05d}.png", step.copy_outputs_to_cpu()[-1])
    memories.reverse()
    seen += 1
