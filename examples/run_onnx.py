"""Run an exported tracker with numpy, OpenCV, Pillow and ONNX Runtime alone: a film and a mask in, a mask a frame out.

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
from PIL import Image

if len(sys.argv) != 5:
    sys.exit(f"usage: {sys.argv[0]} tracker.onnx film mask.png output-folder")
graph, film, first_mask, out = sys.argv[1:]

# 1. Open the graph; its metadata say what it was made for.
if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
    onnxruntime.preload_dlls()  # CUDA of pip's packages
usable = ("Tensorrt", "CUDA", "CPU") if shutil.which("nvidia-smi") else "CPU"  # in this order, where they are there
providers = [name for name in onnxruntime.get_available_providers() if name.startswith(usable)]
options = onnxruntime.SessionOptions()
options.enable_mem_pattern = False  # a fifth less memory
options.add_session_config_entry("session.x64quantprecision", "1")  # INT8 sums overflow on x86 without VNNI
try:
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    info = json.loads(session.get_modelmeta().custom_metadata_map["softcopy"])
except Exception as error:  # ONNX Runtime has many kinds
    sys.exit(f"error: {graph}: is not a graph of export.py that runs here ({str(error).splitlines()[0]})")
size, device = (info["height"], info["width"]), "cpu" if session.get_providers()[0][:3] == "CPU" else "cuda"

# 2. Two memories on the device, zeros at first: each step reads one and writes the other.
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
memory = [(t.name, t.shape, kinds[t.type]) for t in session.get_inputs() if t.name.startswith("memory_")]
place = onnxruntime.OrtValue.ortvalue_from_numpy
memories = [{name: place(np.zeros(shape, kind), device, 0) for name, shape, kind in memory} for _ in range(2)]

# 3. The annotated frame's mask: the indexes of an indexed picture, grey values, or a colour an object on black.
try:
    picture = Image.open(first_mask)
    values, palette = np.array(picture), np.array(picture.getpalette() or [], np.uint8).reshape(-1, 3)
    shuffled = picture.mode == "P" and palette[0].any() and not palette[np.unique(values)].any(1).all()
    if shuffled or picture.mode[0] not in "PLI" or values.ndim == 3:  # a palette whose black is not first: colours too
        *rgb, alpha = np.array(picture.convert("RGBA")).astype(int).transpose(2, 0, 1)
        values = (rgb[0] << 16 | rgb[1] << 8 | rgb[2]) * (alpha >= 128)
        colours = np.unique(np.append(values, 0))
        palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8)
        values = np.searchsorted(colours, values)
        if not (colours % 0x10101).any():  # red = green = blue, so grey values after all
            values, palette = colours[values] & 255, []
except (OSError, ValueError) as error:
    sys.exit(f"error: {first_mask}: cannot be read as a mask ({error})")
if values.max() == 255 and ((values > 0) & (values < 255)).any():
    print(f"note: {first_mask}: 255 beside other ids is void, so background", file=sys.stderr)
    values = np.where(values == 255, 0, values)
ids = np.unique(np.append(values, 0))  # what the mask calls the graph's objects 1, 2, ...
if values.shape != size or not 1 < len(ids) <= info["objects"] + 1:
    has = f"is {values.shape[1]}x{values.shape[0]} with {len(ids) - 1} object(s)"
    sys.exit(f"error: {first_mask}: {has}; give {size[1]}x{size[0]} pixels with 1 to {info['objects']} object(s)")
mask, ids = np.searchsorted(ids, values).astype(np.uint8), ids.astype(np.uint8 if ids[-1] < 256 else np.uint16)

# 4. A step a frame; masks have the ids and the colours of the given one.
try:
    Path(out).mkdir(parents=True, exist_ok=True)
except OSError as error:
    sys.exit(f"error: {out}: cannot be the output folder ({error.strerror})")
video, seen = cv2.VideoCapture(film), 0
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
    picture = Image.fromarray(ids[step.get_outputs()[-1].numpy()])
    if len(palette):
        picture.putpalette(palette.tobytes())
    picture.save(f"{out}/{seen:05d}.png")
    memories, seen = memories[::-1], seen + 1
if read[0] or not seen:
    sys.exit(f"error: {film}: gives no frame {seen} of {size[1]}x{size[0]} pixels, as the graph wants")
print(f"{out}: {seen} masks")
