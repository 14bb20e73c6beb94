"""The exported graph on ONNX Runtime against the PyTorch path: the same clip, machine, threads and run.

    python benchmarks/export.py          # a few minutes on two cores; the table is printed and kept in export.md

480 x 854, one object, 20 context frames; the clip is drawn here. Each path runs in a process of its own, in turns; time
is the median of whole frames (extraction, Algorithm 1, mask at full size) once the context is full. The weights are
random, which changes no time. On a GPU half precision is timed as well, by ONNX Runtime's CUDA or TensorRT and, where
the tensorrt package is, as an engine. What INT8 costs in agreement has to be seen on real frames and weights: export.py
--int8 prints it, and the README has three examples.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import clip  # noqa: E402
import common  # noqa: E402
import export  # noqa: E402
import propagate  # noqa: E402

SETTINGS, SIZE, FRAMES = common.Propagation(), (480, 854), 40


def work(path: str, folder: Path) -> None:
    """One path over the clip: print the seconds of a frame, and the peak memory of this process in MiB."""
    frames = (frame for _, frame in propagate.Video(folder / "clip.mp4").frames(range(FRAMES)))
    mask, times = propagate.read_ids(folder / "f0.png"), []
    if path != "torch":
        engine = export.load_engine(folder / path)
        engine.step(next(frames), mask)
        answers = (engine.step(frame) for frame in frames)
    else:
        encoder = common.load_encoder("random", None, SETTINGS)
        features = (encoder(torch.from_numpy(frame).to(encoder.mean.device)[None])[0] for frame in frames)
        labels = propagate.labels_from_mask(torch.from_numpy(mask), [1], SETTINGS.grid(*SIZE)).to(encoder.mean.device)
        labelled = propagate.propagate_video(features, [(next(features), labels)], SETTINGS)
        answers = (propagate.mask_from_labels(z, [1], SIZE).cpu().numpy() for z in labelled)
    while True:
        start = time.perf_counter()
        if next(answers, None) is None:
            break
        times.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()  # Linux; getrusage would count the parent's peak
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(float(np.median(times[SETTINGS.context :])), peak)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip.write_clip(folder, frames=FRAMES, height=SIZE[0], width=SIZE[1], objects=1)
        start = time.perf_counter()
        args = export.Args(height=SIZE[0], width=SIZE[1], propagation=SETTINGS)
        encoder = common.load_encoder("random", None, SETTINGS, "cpu")
        export.write_onnx(folder / "float32.onnx", args, encoder, export.describe(args))
        tracing, nodes = time.perf_counter() - start, len(onnx.load(folder / "float32.onnx").graph.node)
        frames = [frame for _, frame in propagate.Video(folder / "clip.mp4").frames(range(5))]
        scale = float(encoder(torch.from_numpy(frames[0])[None]).max()) / 127
        export.write_onnx(folder / "int8.onnx", args, encoder, export.describe(args) | {"dtype": "int8"}, scale)
        export.quantise_convolutions(folder / "int8.onnx", frames)
        megabytes = [(folder / f"{path}.onnx").stat().st_size / 1e6 for path in ("float32", "int8")]
        results = {"torch": [], "float32.onnx": [], "int8.onnx": []}
        if torch.cuda.is_available():
            args.fp16 = True
            export.write_onnx(folder / "float16.onnx", args, encoder, export.describe(args))
            results["float16.onnx"] = []
            if find_spec("tensorrt"):
                built = export.build_engine(folder / "float16.onnx", export.describe(args), folder / "timings")
                (folder / "float16.engine").write_bytes(built)
                results["float16.engine"] = []
        for path in (*results, *results):
            command = [sys.executable, __file__, "--work", path, "--folder", str(folder)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[path].append([float(value) for value in out.split()])
            print(f"{path}: {results[path][-1][0]:.2f} s/frame, {results[path][-1][1]:.0f} MiB", file=sys.stderr)
    best = {path: np.min(measured, 0) for path, measured in results.items()}
    titles = {"torch": "PyTorch", "float32.onnx": "ONNX Runtime", "int8.onnx": "ONNX Runtime, `--int8`"}
    titles |= {"float16.onnx": "ONNX Runtime, `--fp16`", "float16.engine": "TensorRT, `--tensorrt`"}
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    load = os.getloadavg()[0]
    lines = [
        "# The exported graph: last measured",
        "",
        f"`python benchmarks/export.py`, {platform.machine()}, {place} (load {load:.1f}), torch "
        f"{torch.__version__}, ONNX Runtime {onnxruntime.__version__}; the better of two runs in turns",
        "",
        "| path, 480 x 854, n = 20 | s/frame | frames/s | against PyTorch | peak memory, MiB |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {titles[path]} | {seconds:.3f} | {1 / seconds:.1f} | {best['torch'][0] / seconds:.2f} x | {peak:.0f} |"
            for path, (seconds, peak) in best.items()
        ),
        "",
        f"The graph: {nodes} nodes, {megabytes[0]:.1f} MB (INT8 {megabytes[1]:.1f}), "
        f"traced and written in {tracing:.0f} s.",
    ]
    (ROOT / "benchmarks" / "export.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with torch.inference_mode():
        work(given.work, given.folder) if given.work else main()
