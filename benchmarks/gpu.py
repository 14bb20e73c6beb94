"""What only a GPU can answer, in one command and in the minutes that are given.

    python benchmarks/gpu.py [--minutes 8]                      # the table is kept in benchmarks/gpu.md
    python benchmarks/gpu.py --device cpu                       # tiny: it only shows that this program runs
    python benchmarks/gpu.py --steps speed --out results/speed.md

The most important comes first: masks against the CPU's, then speed and memory, the tests that need CUDA, training, the
exported graph. A row is written as soon as it is measured. Each step is a process of its own and has its share of the
time: one that fails or hangs is cut off, said so in the table, and the next one runs.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
from propagation import context, dense_step  # noqa: E402

import clip  # noqa: E402
import common  # noqa: E402
import propagate  # noqa: E402
from common import Propagation  # noqa: E402

SHARES = {"masks": 0.2, "speed": 0.35, "tests": 0.1, "training": 0.2, "export": 0.15}  # of the time, in this order

WAYS = {  # every way to localise, and what is computed by other code
    "fixed": {},
    "fixed, annotated frame whole": {"exempt_first": True},
    "fixed, per-frame": {"aggregation": "per-frame"},
    "none": {"localization": "none"},
    "window": {"localization": "window", "radius": 6},
    "predicted": {"localization": "predicted", "radius": 6, "carry": "hard"},
    "track": {"localization": "track", "aggregation": "per-frame", "minmax": True},
}


@dataclass
class Job:
    """A step's part of the work: where it runs, until when, and where its rows go."""

    device: str
    out: Path
    until: float  # of time.time()
    failed: bool = False

    @property
    def small(self) -> bool:
        """Whether this is only to show that the program runs."""
        return self.device == "cpu"

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("float32", "bfloat16") if self.small else ("float32", "bfloat16", "float16")

    def left(self) -> float:
        return self.until - time.time()

    def write(self, line: str) -> None:
        """Append a line to the table, on disk before the next thing is measured."""
        print(line, flush=True)
        with self.out.open("a") as file:
            file.write(line + "\n")

    def title(self, text: str, columns: str) -> None:
        bar = re.sub(r"[^|]+", "---", columns)
        self.write(f"\n## {text}\n\n{columns}\n{bar}")

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """A row that fails is said in the table, and the next one is tried."""
        try:
            yield
        except Exception as error:
            self.failed = True
            why = (str(error).strip() or "no message").splitlines()[0][:160].replace("|", "/")
            self.write(f"| {what} | failed: {type(error).__name__}: {why} |")
            if "illegal" in why or "device-side assert" in why:  # nothing more runs in this process
                raise

    def time_for(self, what: str, seconds: float = 2) -> bool:
        """Whether there are some seconds left; if not, it is said what was left out."""
        if self.left() < seconds:
            self.write(f"| {what} | left out: no time was left |")
        return self.left() >= seconds


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def in_a_row(work: Callable[[], object], job: Job, calls: int = 20) -> tuple[float, float]:
    """Of calls of which none waits for the one before: seconds of each, and of the CPU to launch it."""
    calls = 2 if job.small else calls
    work()
    synchronise(job.device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    launched = time.perf_counter() - start
    synchronise(job.device)
    return (time.perf_counter() - start) / calls, launched / calls


def seconds(work: Callable[[], object], job: Job, most: int = 20) -> float:
    """Median time of a call, after two that do not count; about a second, or a part of what is left."""
    until = time.perf_counter() + min(1.0, max(job.left() / 4, 0.0))
    times = []
    for turn in range(2 + most):
        synchronise(job.device)
        start = time.perf_counter()
        work()
        synchronise(job.device)
        times.append(time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() > until:
            break
    return float(np.median(times[2:]))


# ---------------------------------------------------------------------------------------------------------------------
# Masks on the GPU against the CPU's


@torch.inference_mode()
def follow(
    frames: list[np.ndarray], mask: np.ndarray, s: Propagation, device: str, dtype: str = "float32", model="default"
) -> tuple[np.ndarray, np.ndarray]:
    """The whole way from frames to masks: (soft labels, masks) of each frame after the annotated one."""
    encoder = common.load_encoder(model, None, s, device, dtype)
    ids, size = range(1, int(mask.max()) + 1), mask.shape
    features = (encoder(torch.from_numpy(frame).to(encoder.mean.device)[None])[0] for frame in frames)
    given = torch.from_numpy(mask).to(encoder.mean.device)
    first = next(features), propagate.labels_from_mask(given, ids, s.grid(*size), s.sampling)
    labels, masks = [], []
    for z in propagate.propagate_video(features, [first], s):
        labels.append(z.cpu().numpy())
        masks.append(propagate.mask_from_labels(z, ids, size, s.minmax).cpu().numpy())
    return np.stack(labels), np.stack(masks)


def masks(job: Job) -> None:
    job.title(
        "Masks against the CPU's, float32",
        "| localisation | precision | pixels that agree | least object's IoU | labels differ by at most |",
    )
    count, height, width = (19, 48, 80) if job.small else (40, 240, 426)  # frames over 15 back: those of `predicted`
    drawn = list(clip.render(frames=count, height=height, width=width))
    frames, mask = [frame for frame, _ in drawn], drawn[0][1]
    for way, factors in WAYS.items():
        s = replace(Propagation(), **{"context": 18 if job.small else 20, **factors})
        if job.small and way not in ("fixed", "predicted"):  # the others have tests of their own on the CPU
            continue
        if not job.time_for(way, 5):
            return
        labels, truth = follow(frames, mask, s, "cpu")
        for dtype in job.precisions:
            if not job.time_for(f"{way}, {dtype}", 3):
                return
            with job.trying(f"{way}, {dtype}"):
                z, own = follow(frames, mask, s, job.device, dtype)
                pairs = [(own == i, truth == i) for i in np.unique(truth) if i]
                least = min((a & b).sum() / (a | b).sum() for a, b in pairs)
                agree, apart = (own == truth).mean(), np.abs(z - labels).max()
                job.write(f"| {way} | {dtype} | {agree:.4%} | {least:.2%} | {apart:.1e} |")


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


def limits(job: Job, dtype: torch.dtype) -> tuple[float, float]:
    """What the machine reaches here: FLOP/s of a large matrix product, bytes/s of a copy (read and written)."""
    n = 256 if job.small else 8192
    a, b = (torch.randn(n, n, device=job.device).to(dtype) for _ in range(2))
    flops = 2 * n**3 / seconds(lambda: a @ b, job)
    x = torch.empty(2**20 if job.small else 2**30, dtype=torch.uint8, device=job.device)
    y = torch.empty_like(x)
    return flops, 2 * len(x) / seconds(lambda: y.copy_(x), job)


def speed(job: Job) -> None:
    small, large = ((64, 96), None) if job.small else ((480, 854), (1080, 1920))
    reach = {}
    steps_of(job, small, reach)
    kernels(job, small)
    blocks(job, small)
    extractors(job, small)
    mask_of_labels(job, small)
    if large:
        steps_of(job, large, reach)
    whole(job, [small, large] if large else [small])


def steps_of(job: Job, size: tuple[int, int], reach: dict) -> None:
    """The rows of a frame size. reach: what the machine reaches, by precision."""
    job.title(
        f"Speed and memory, {size[0]}x{size[1]}; frames/s",
        "| n, precision | extractor | step, many in a row | step, one by one | CPU time to launch a step, ms | dense "
        "step of public practice | step's peak memory, MiB | of a large product's FLOP/s | of a copy's bytes/s |",
    )
    for n in (3,) if job.small else (20, 7):
        for dtype in job.precisions:
            if not job.time_for(f"{n}, {dtype}", 5):
                return
            with job.trying(f"{n}, {dtype}"):
                if dtype not in reach:
                    reach[dtype] = limits(job, getattr(torch, dtype))
                step(job, size, n, dtype, *reach[dtype])


def step_data(job: Job, size: tuple[int, int], n: int, dtype: str) -> tuple[tuple, Propagation]:
    """What propagate_labels takes for frames of a size."""
    s = replace(Propagation(), size="full", context=n)
    target, features, labels = context(*s.grid(*size), n, device=job.device)
    kind = getattr(torch, dtype)
    return (target.to(kind), features.to(kind), labels), s  # in the same layout


@torch.inference_mode()
def kernels(job: Job, size: tuple[int, int]) -> None:
    """Where the time of a step goes: what to look at first."""
    job.title("A step's costliest kernels, n = 20", "| precision | kernel | calls | of the kernels' time | ms |")
    profiler, kind = torch.profiler, torch.autograd.DeviceType.CPU if job.small else torch.autograd.DeviceType.CUDA
    activities = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * (not job.small)
    for dtype in job.precisions[: 1 if job.small else 2]:
        if not job.time_for(dtype, 4):
            return
        with job.trying(dtype):
            data, s = step_data(job, size, 3 if job.small else 20, dtype)
            propagate.propagate_labels(*data, s)
            with profiler.profile(activities=activities) as profile:
                propagate.propagate_labels(*data, s)
                synchronise(job.device)
            spent = [
                (e.self_cpu_time_total if job.small else e.self_device_time_total, e.count, e.key)
                for e in profile.key_averages()
                if e.device_type == kind  # on a GPU the kernels, not the operators that launch them as well
            ]
            spent, total = sorted(spent, reverse=True), sum(each[0] for each in spent)
            spent.insert(0, (total, sum(each[1] for each in spent), "all"))
            for microseconds, calls, name in spent[: 4 if job.small else 16]:
                name = re.sub(r"^void |at::native::|at::|\(anonymous namespace\)::", "", name).replace("|", "/")[:140]
                share = microseconds / max(total, 1e-9)
                job.write(f"| {dtype} | `{name}` | {calls} | {share:.0%} | {microseconds / 1000:.2f} |")


@torch.inference_mode()
def blocks(job: Job, size: tuple[int, int]) -> None:
    """Steps/s for blocks of other sizes than propagate's BLOCK and COLUMNS."""
    if job.small:  # a CPU has no blocks
        return
    job.title("The step by the size of its blocks, n = 20, frames/s", "| rows x columns | float32 | bfloat16 |")
    given = propagate.BLOCK, propagate.COLUMNS
    data = [step_data(job, size, 20, dtype) for dtype in ("float32", "bfloat16")]
    for high, wide in [given, *itertools.product((2, 4, 8), (8, 16, 32))]:
        if not job.time_for(f"{high}x{wide}", 3):
            break
        propagate.BLOCK, propagate.COLUMNS = high, wide
        propagate.block_regions.cache_clear()
        with job.trying(f"{high}x{wide}"):
            rates = [1 / in_a_row(partial(propagate.propagate_labels, *each, s), job)[0] for each, s in data]
            job.write(f"| {high}x{wide} | {rates[0]:.1f} | {rates[1]:.1f} |")
    propagate.BLOCK, propagate.COLUMNS = given
    propagate.block_regions.cache_clear()


@torch.inference_mode()
def extractors(job: Job, size: tuple[int, int]) -> None:
    """The extractor by the layout of its weights, and with cuDNN's own measurements."""
    job.title("The extractor, frames/s", "| precision | layout | as it is | cudnn.benchmark |")
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    frame = torch.randint(0, 255, (1, *size, 3), dtype=torch.uint8, device=job.device)
    for dtype, layout in itertools.product(job.precisions[: 1 if job.small else 3], layouts):
        if not job.time_for(f"{dtype}, {layout}", 3):
            return
        with job.trying(f"{dtype}, {layout}"):
            s = replace(Propagation(), size="full")
            encoder = common.load_encoder("random", None, s, job.device, dtype).to(memory_format=layouts[layout])
            rates = []
            for torch.backends.cudnn.benchmark in (False, True):
                rates.append(1 / in_a_row(partial(encoder, frame), job)[0])
            job.write(f"| {dtype} | {layout} | {rates[0]:.1f} | {rates[1]:.1f} |")
    torch.backends.cudnn.benchmark = False


@torch.inference_mode()
def mask_of_labels(job: Job, size: tuple[int, int]) -> None:
    """From soft labels to a mask at full size."""
    job.title("A mask of its labels, ms", "| objects | plain | --refine 0.5 |")
    frame = torch.randint(0, 255, (*size, 3), dtype=torch.uint8, device=job.device)
    for objects in (1,) if job.small else (1, 5):
        with job.trying(str(objects)):
            labels = torch.rand(1 + objects, *Propagation(size="full").grid(*size), device=job.device).softmax(0)
            masks_of = partial(propagate.mask_from_labels, labels, range(1, 1 + objects), size, False, frame)
            times = [1000 * seconds(partial(masks_of, refine), job) for refine in (0, 0.5)]
            job.write(f"| {objects} | {times[0]:.2f} | {times[1]:.2f} |")


@torch.inference_mode()
def step(job: Job, size: tuple[int, int], n: int, dtype: str, most_flops: float, most_bytes: float) -> None:
    """The row of one size, context and precision."""
    data, s = step_data(job, size, n, dtype)
    encoder = common.load_encoder("random", None, s, job.device, dtype)
    frame = torch.randint(0, 255, (1, *size, 3), dtype=torch.uint8, device=job.device)
    extract, _ = in_a_row(lambda: encoder(frame), job)
    peak = "-"
    if not job.small:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    single = seconds(lambda: propagate.propagate_labels(*data, s), job)
    if not job.small:
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
    ours, launch = in_a_row(lambda: propagate.propagate_labels(*data, s), job)
    with FlopCounterMode(display=False) as counter:
        propagate.propagate_labels(*data, s)
    flops = counter.get_total_flops()
    # At the least: the context is read once, each affinity is written and read once.
    moved = data[1].element_size() * (data[1].numel() + 2 * flops / 2 / len(data[0]))
    dense = "-"
    if dtype == "float32" and job.left() > 10:
        with torch.device(job.device):  # its coordinates too
            dense = f"{1 / seconds(lambda: dense_step(*data, s), job, 1):.2f}"
    reached = f"{flops / ours / most_flops:.1%} | {moved / ours / most_bytes:.1%}"
    rates = f"{1 / extract:.1f} | {1 / ours:.1f} | {1 / single:.1f} | {1000 * launch:.2f}"
    job.write(f"| {n}, {dtype} | {rates} | {dense} | {peak} | {reached} |")


def whole(job: Job, sizes: Sequence[tuple[int, int]]) -> None:
    """propagate.py from a film to masks, with what each stage alone would reach."""
    job.title(
        "Whole runs of propagate.py, n = 20, frames/s",
        "| frames | precision | whole run | stages (on a GPU of another run, in which each operator is waited for) |",
    )
    for size in sizes:
        what = f"{size[0]}x{size[1]}"
        if not job.time_for(what, 15):
            return
        with tempfile.TemporaryDirectory() as name:
            folder, few = Path(name), 4 if job.small else 12
            drawn = list(clip.render(frames=few, height=size[0], width=size[1], objects=2))
            propagate.write_mask(folder / "f0.png", drawn[0][1])
            with propagate.film_writer(folder / "clip.mp4", 25, size) as append:
                for i in range(few if job.small else 96):  # there and back
                    append(drawn[i % few if i // few % 2 == 0 else -1 - i % few][0])
            for dtype in job.precisions[:1] if job.small else job.precisions:
                if not job.time_for(f"{what}, {dtype}", 8):
                    return
                with job.trying(f"{what}, {dtype}"):
                    rates = rates_of(job, folder, dtype, f"{dtype} in a row", {})
                    rest = rates
                    if dtype == "float32" and not job.small:
                        rest = rates_of(job, folder, dtype, f"{dtype} one by one", {"CUDA_LAUNCH_BLOCKING": "1"})
                    stages = ", ".join(f"{stage} {rate}" for stage, rate in rest.items() if stage != "whole run")
                    stages = "-" if rest is rates and not job.small else stages
                    job.write(f"| {what} | {dtype} | {rates['whole run']} | {stages} |")


def rates_of(job: Job, folder: Path, dtype: str, out: str, environment: dict[str, str]) -> dict[str, float]:
    """Frames/s of a run of propagate.py on the film in a folder, and of its stages."""
    flags = ["--model", "random", "--video", folder / "clip.mp4", "--mask", folder / "f0.png"]
    flags += ["--dtype", dtype, "--device", job.device, "--out", folder / out]
    script(job, "propagate.py", *flags, **environment)
    return json.loads((folder / out / "run.json").read_text())["frames_per_second"]


# ---------------------------------------------------------------------------------------------------------------------
# Tests, training, the exported graph: by their command lines


def script(job: Job, *command, **environment: str) -> str:
    """Run a script of the project within the time left; what it printed. RuntimeError if it failed."""
    command, limit = [sys.executable, *(str(part) for part in command)], max(job.left() - 1, 1)
    environment = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{Path(command[1]).name}: exit code {done.returncode}, {last}")
    return done.stdout + done.stderr


def tests(job: Job) -> None:
    job.title("Tests that need CUDA", "| `pytest -m cuda` | |")
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-vv", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    ended = "cut off, its time was over"
    with tempfile.TemporaryFile("w+") as output:  # what is there when time is up counts
        with contextlib.suppress(subprocess.TimeoutExpired):
            limit = max(job.left() - 3, 1)
            done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=limit)
            ended = "all" if done.returncode in (0, 1) else f"failed, exit code {done.returncode}"
        output.seek(0)
        text = output.read()
    found = re.findall(r"^(tests/\S+).* (PASSED|FAILED|ERROR|SKIPPED)", text, re.M)
    counts = Counter(result.lower() for _, result in found)
    summary = ", ".join(f"{count} {result}" for result, count in counts.items()) or "none ran"
    job.write(f"| {summary} | {ended} |")
    if not found:
        job.failed = True
        job.write(f"| | {(text.strip() or 'no message').splitlines()[-1].replace('|', '/')[:160]} |")
    for name, result in found:
        if result in ("FAILED", "ERROR"):
            job.failed = True
            job.write(f"| {result} | {name.replace('|', '/')} |")
    for why in dict.fromkeys(re.findall(r"^E   (.*)", text, re.M)):
        job.write(f"| | {why.strip().replace('|', '/')[:160]} |")


def logged(folder: Path) -> int:
    """Steps in the log of a training run."""
    return len((folder / "log.csv").read_text().splitlines()) - 1


def rate(folder: Path, skip: int) -> str:
    """Pictures/s of a training run, after its first steps."""
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return f"{1 / np.median([1 / float(row['images_per_s']) for row in rows[skip:] or rows]):.1f}"


def training(job: Job) -> None:
    from training import write_pictures

    from train_uvc_plus import LabDecoder, LabEncoder

    job.title("Training", "| script | precision | pictures/s |")
    steps, batch, side = (3, 4, 32) if job.small else (20, 256, 224)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        write_pictures(folder / "pictures", 12 if job.small else 600)
        for part, module in (("encoder", LabEncoder()), ("decoder", LabDecoder())):
            torch.save(module.state_dict(), folder / f"{part}.pth")
        for i in range(2 if job.small else 4):
            shape = {"height": 72, "width": 96} if job.small else {"height": 256, "width": 340}
            clip.write_clip(folder / "clips" / str(i), frames=8 if job.small else 40, seed=i, **shape)
            (folder / "clips" / str(i) / "f0.png").unlink()
            for mask in (folder / "clips" / str(i) / "truth").iterdir():
                mask.unlink()
        shared = ["--device", job.device, "--epochs", 99, "--workers", 0 if job.small else min(16, os.cpu_count() or 1)]
        finetune = ["train_finetune.py", "--objective", "rotation", "--data", folder / "pictures", *shared]
        finetune += ["--batch-size", batch // 4, "--crop", side]  # each picture is shown four ways
        uvc = ["train_uvc_plus.py", "--data", folder / "clips", "--autoencoder", folder, *shared, "--warmup-epochs", 0]
        uvc += ["--crop", 64, "--full", 128, "--batch-size", 2] if job.small else ["--batch-size", 16]
        uvc += ["--pairs-per-video", 2 if job.small else 40]
        runs = [(finetune, amp, ()) for amp in ("float32", "bfloat16", "float16")]
        runs += [(uvc, amp, ()) for amp in ("float32", "float16")]  # which refuses bfloat16
        runs = runs[:1] + runs[3:4] if job.small else runs
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
        runs.insert(1, (finetune, "float32, gone on with", ()))
        if not job.small:
            runs.insert(2, (finetune, "float32, torchrun with one process", launcher))
        for number, (command, amp, before) in enumerate(runs):
            what = f"{command[0]}, {amp}"
            if not job.time_for(what, 5):
                return
            goes_on = amp.endswith("gone on with")
            out = folder / str(0 if goes_on else number)
            last = steps + 2 if goes_on else steps
            with job.trying(what):
                script(job, *before, *command, "--amp", amp.partition(",")[0], "--max-steps", last, "--out", out)
                if goes_on and logged(out) != last:
                    raise RuntimeError(f"{command[0]}: a log of {logged(out)} steps after going on to step {last}")
                job.write(f"| {command[0]} | {amp} | {rate(out, 3)} |")


def export(job: Job) -> None:
    job.title("The exported graph", "| what | result |")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        return job.write(f"| export.py | left out: {', '.join(missing)} not installed |")
    import onnxruntime

    if not job.small and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        job.write("| ONNX Runtime on CUDA | left out: onnxruntime-gpu is not installed; the CPU runs the graph |")
    runs = {"float32": [], "--fp16": ["--fp16"]}
    if find_spec("tensorrt") and not job.small:
        runs["--tensorrt"] = ["--tensorrt"]
    else:
        job.write("| TensorRT | left out: the tensorrt package is not installed, or this is the CPU |")
    size = ["--height", 480, "--width", 854]
    if job.small:
        size = ["--height", 48, "--width", 64, "--context", 3, "--refine", 0]
    for what, flags in list(runs.items())[: 1 if job.small else None]:
        if not job.time_for(f"export.py, {what}", 10):
            return
        with tempfile.TemporaryDirectory() as name, job.trying(f"export.py, {what}"):
            text = script(job, "export.py", "--model", "random", *size, *flags, "--out", Path(name) / "tracker.onnx")
            for line in re.findall(r"^check: (.*)$", text, re.M):
                job.write(f"| export.py, {what} | {line} |")


STEPS = {"masks": masks, "speed": speed, "tests": tests, "training": training, "export": export}


# ---------------------------------------------------------------------------------------------------------------------


def head(device: str, minutes: float) -> str:
    if device == "cpu":
        return (
            f"# On a CPU: this shows that the program runs, and measures nothing\n\n{platform.machine()}, torch "
            f"{torch.__version__}, at most {minutes:g} minutes"
        )
    card = torch.cuda.get_device_properties(device)
    return (
        f"# On a GPU: last measured\n\n`python benchmarks/gpu.py --minutes {minutes:g}`, {card.name}, "
        f"{card.total_memory / 2**30:.0f} GiB, {os.cpu_count()} cores, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="the time for all of it; it is honoured")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu runs a tiny part, as a trial")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which of them")
    parser.add_argument("--out", type=Path, help="default benchmarks/gpu.md; on the CPU results/gpu_on_cpu.md")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # this is the process of one step
    given = parser.parse_args()
    if given.minutes <= 0:
        parser.error(f"--minutes {given.minutes:g}: give more than 0")
    try:
        common.pick_device(given.device)
    except common.UserError as error:
        parser.error(f"{error}; --device cpu is a trial without a GPU")
    default = "results/gpu_on_cpu.md" if given.device == "cpu" else "benchmarks/gpu.md"
    out = (given.out or ROOT / default).resolve()
    if given.until:
        if given.device != "cpu":
            torch.cuda.set_device(common.pick_device(given.device))  # with its index
        job = Job(given.device, out, given.until)
        STEPS[given.steps[0]](job)
        sys.exit("some of it" if job.failed else 0)

    start = time.time()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(head(given.device, given.minutes) + "\n")
    job, failed = Job(given.device, out, start + 60 * given.minutes), False
    steps = [name for name in SHARES if name in given.steps]
    shares = np.cumsum([SHARES[name] for name in steps]) / sum(SHARES[name] for name in steps)
    for name, share in zip(steps, shares, strict=True):  # what a step leaves goes to the next one
        until = start + 60 * given.minutes * share
        command = [sys.executable, __file__, "--steps", name, "--until", str(until), "--device", given.device]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen([*command, "--out", str(out)], stderr=errors, start_new_session=True)
            try:
                code = child.wait(max(until - time.time(), 1))
            except subprocess.TimeoutExpired:
                job.write(f"\n{name}: cut off, its time was over")
                code = 0
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # what it started too
            if code:
                errors.seek(0)
                print(text := errors.read().strip(), file=sys.stderr)
                job.write(f"\n{name}: failed, {(text or 'no message').splitlines()[-1]}")
                failed = True
    job.write(f"\n{(time.time() - start) / 60:.1f} minutes in all.")
    sys.exit(failed)


if __name__ == "__main__":
    main()
