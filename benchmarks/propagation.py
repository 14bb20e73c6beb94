"""Speed and memory of the main job, as ratios within this run; the table is printed and kept in propagation.md.

    python benchmarks/propagation.py            # about ten minutes on two cores
    python benchmarks/propagation.py --quick    # without the long clips

The reference is the public practice: dense affinity of the target and all context frames in chunks of queries, mask,
top-k, softmax (as in the scripts that released systems come with). Same machine, same threads, same numbers.
"""

import argparse
import contextlib
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import clip  # noqa: E402
import common  # noqa: E402
import propagate  # noqa: E402
from common import Propagation, load_encoder  # noqa: E402
from propagate import film_writer, mask_from_labels, pool_workers, propagate_labels, write_mask  # noqa: E402


def dense_step(target, features, labels, s, chunk=512):
    """The public practice: every target cell against every context cell, `chunk` target cells at a time."""
    n, _, h, w = features.shape
    rows, columns = (torch.arange(side, device=target.device) for side in (h, w))
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    keys, values = features.transpose(0, 1).flatten(1), labels.transpose(0, 1).flatten(1)  # C nhw, L nhw
    z = []
    for start in range(0, h * w, chunk):
        here = slice(start, start + chunk)
        far = (y[:, None] - y[here]) ** 2 + (x[:, None] - x[here]) ** 2 >= s.radius**2
        A = keys.T @ target.flatten(1)[:, here]  # nhw q
        A.add_(far.float().mul_(-1e10).repeat(n, 1)).div_(s.temperature)
        best, index = A.topk(s.topk, dim=0)
        z.append((values[:, index] * best.softmax(0)).sum(1))
    return torch.cat(z, 1).view(-1, h, w)


def seconds(work, repeat=3) -> float:
    """Best time of a call of `repeat`, after one that does not count: what disturbs a machine only adds."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def context(h, w, n, C=256, device="cpu"):
    """Features like a ResNet's (non-negative, unit length), in the layout of the ring buffer, and labels."""
    torch.manual_seed(0)
    ring = F.normalize(torch.randn(h, w, n + 1, C, device=device).relu_(), dim=-1)
    labels = torch.rand(h, w, n + 1, 2, device=device)
    noise = torch.rand(h, w, C, device=device)
    target = F.normalize(ring[:, :, n] + 0.3 * noise, dim=-1).permute(2, 0, 1)
    return target, ring.permute(2, 3, 0, 1), labels.permute(2, 3, 0, 1)


def disk_flops(s, h, w, n, C) -> float:
    """Floating-point operations of the products that the circle admits, and no others."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    pairs = sum(int(((y - y[i]) ** 2 + (x - x[i]) ** 2 < s.radius**2).sum()) for i in range(h * w))
    return 2.0 * pairs * n * C


def product_rate() -> float:
    """Floating-point operations a second of one thread's matrix product, 2000 a side: the better of torch's two."""
    torch.set_num_threads(1)
    a, b = torch.randn(2000, 2000), torch.randn(2000, 2000)
    products = [lambda: a @ b, lambda: F.linear(a, b)]
    with contextlib.suppress(AttributeError, RuntimeError):
        onednn = torch.ops.mkldnn._linear_pointwise
        onednn(a, b, None, "none", [], "")
        products.append(lambda: onednn(a, b, None, "none", [], ""))
    rate = 2 * 2000**3 / min(seconds(each) for each in products)
    torch.set_num_threads(pool_workers())
    return rate


def stages(step) -> str:
    """CPU seconds of a step's parts, all workers together."""
    names, spent = ("label_tile", "compute_affinity", "topk", "compute_masks", "soft_copy"), Counter()

    def timed(name, work):
        def call(*args):
            start = time.thread_time()
            result = work(*args)
            spent[name] += time.thread_time() - start
            return result

        return call

    originals = {name: getattr(propagate, name) for name in names}
    try:
        for name, work in originals.items():
            setattr(propagate, name, timed(name, work))
        step()
    finally:
        for name, work in originals.items():
            setattr(propagate, name, work)
    rest = 2 * spent["label_tile"] - spent.total()
    return ", ".join([*(f"{name} {spent[name]:.2f}" for name in names[1:]), f"rest {rest:.2f}"])


def run_film(film: Path, mask: Path, *flags: str) -> tuple[float, float]:
    """propagate.py on a film: (wall seconds, peak MiB of the process)."""
    with tempfile.TemporaryDirectory() as out:
        return run_python("propagate.py", "--model", "random", "--video", film, "--mask", mask, "--out", out, *flags)


def run_python(*command) -> tuple[float, float]:
    """Wall seconds and peak MiB of a process."""
    # A small process in between: Linux counts the memory of the one that starts another as the other's own.
    measure = "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=-3, stderr=-3); "
    measure += "_, status, usage = os.wait4(p.pid, 0); print(usage.ru_maxrss); sys.exit(status != 0)"
    start = time.perf_counter()
    command = [sys.executable, *map(str, command)]
    peak = subprocess.check_output([sys.executable, "-c", measure, *command], cwd=ROOT)
    return time.perf_counter() - start, int(peak) / 1024


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Other programs that take all they get; they end by themselves after five minutes."""
    code = "import time; end = time.time() + 300\nwhile time.time() < end: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_grad_enabled(False)
    s, rows = Propagation(), []

    def row(what: str, value: str) -> None:
        rows.append(f"| {what} | {value} |")
        print(rows[-1], flush=True)

    print("| what | measured |\n|---|---|")
    # One step at 480 x 854: grid 60 x 107, n = 20, radius 12, k = 10, T = 0.05.
    at480 = context(60, 107, 20)
    encoder, frame = load_encoder("random", device="cpu"), torch.randint(0, 255, (1, 480, 854, 3), dtype=torch.uint8)
    extract = seconds(lambda: encoder(frame), 5)
    ours = seconds(lambda: propagate_labels(*at480, s), 5)
    dense = seconds(lambda: dense_step(*at480, s))
    difference = (propagate_labels(*at480, s) - dense_step(*at480, s)).abs().amax(0)  # h w
    swapped = difference > 1e-4
    row("one step, 480x854, n 20, radius 12, k 10: dense reference", f"{dense:.2f} s")
    row("the same step, propagate_labels", f"{ours:.3f} s: **{dense / ours:.1f} times** faster")
    if (least := common.ONEDNN) <= 512:
        common.ONEDNN = math.inf
        plain = seconds(lambda: propagate_labels(*at480, s), 5)
        common.ONEDNN = least
        row(
            "its products by torch.mm, as the reference's, and not by oneDNN",
            f"{plain:.3f} s: {dense / plain:.1f} times",
        )
    row(
        "largest difference of the two",
        f"{difference[~swapped].max():.1e}; {swapped.sum()} of {swapped.numel()} cells keep another k-th neighbour",
    )
    limit = disk_flops(s, 60, 107, 20, 256) / (pool_workers() * product_rate())
    row(
        "the disk's products alone, at the rate of this machine's matrix product",
        f"{limit:.3f} s; the step takes {ours / limit:.1f} times that",
    )
    row("CPU seconds of a step, all workers together", stages(lambda: propagate_labels(*at480, s)))
    if propagate.has_bfloat16():
        target, features, labels = at480
        half = target.bfloat16(), features.bfloat16(), labels
        short = seconds(lambda: propagate_labels(*half, s), 5)
        row("the step in bfloat16", f"{short:.3f} s: {ours / short:.2f} times as fast as in float32")
    row("extractor (ResNet-18 up to layer3, stride 8)", f"{extract:.3f} s")
    soft = F.interpolate(torch.rand(1, 1, 4, 7), size=(60, 107), mode="bicubic")[0].clamp(0, 1)
    soft, sharp = torch.cat([1 - soft, soft]), frame[0]
    torch.set_num_threads(1)  # as in a run
    plain, refined = (
        seconds(lambda c=c: mask_from_labels(soft, [1], (480, 854), False, sharp, c), 9) for c in (0, 0.5)
    )
    torch.set_num_threads(pool_workers())
    row(
        "a mask of one object at full size, one thread",
        f"{1000 * plain:.0f} ms, with --refine 0.5 {1000 * refined:.0f} ms",
    )

    # Linear in the number of cells, at the same n and radius.
    per_cell = []
    for side in (480, 720, 1080):
        h, w = s.grid(side, side * 16 // 9) if side == 480 else Propagation(size="full").grid(side, side * 16 // 9)
        data = context(h, w, 20)
        per_cell.append((side, h, w, seconds(lambda data=data: propagate_labels(*data, s), 2)))
        del data
    unit = per_cell[0][3] / per_cell[0][1] / per_cell[0][2]
    cost = ", ".join(f"{side}p ({h}x{w}) {t:.2f} s = {t / h / w / unit:.2f}" for side, h, w, t in per_cell)
    row("step by frame size, and its cost a cell relative to 480p", cost)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # End to end at 480 x 854: decode, extract, propagate, write masks and film.
        clip.write_clip(folder, frames=60, height=480, width=854)
        early, middle, (whole, peak) = (
            run_film(folder / "clip.mp4", folder / "f0.png", "--end", end) for end in ("22", "41", "60")
        )
        each = (whole - early[0]) / 38  # start-up and the growing context are in both
        row(
            "a frame of 22-40 against one of 41-59",
            f"{(middle[0] - early[0]) / 19:.3f} s, {(whole - middle[0]) / 19:.3f} s",
        )
        against = f"{each:.3f} s = {each / (extract + ours):.2f} x (extractor + step)"
        row("whole run a frame (decode, extract, propagate, masks, film)", against)
        bare = run_python("-c", "import torch")[1]
        row("peak memory of that run", f"{peak:.0f} MiB, of which `import torch` takes {bare:.0f}")
        with busy_loops(2):
            beside, _ = run_film(folder / "clip.mp4", folder / "f0.png")
        row("the whole run beside two busy loops", f"{beside:.1f} s, alone {whole:.1f} s: {beside / whole:.2f} times")
        jobs = [(folder / f"{name}.mp4", folder / "f0.png") for name in ("one", "two")]
        for film, _ in jobs:
            shutil.copy(folder / "clip.mp4", film)
        with ThreadPoolExecutor(2) as both:
            twice = max(wall for wall, _ in both.map(lambda job: run_film(*job), jobs))
        row("two whole runs side by side", f"{twice:.1f} s each, alone {whole:.1f} s: {twice / whole:.2f} times")
        if not quick:
            frames = [pair[0] for pair in clip.render(frames=50, height=48, width=80)]
            write_mask(folder / "small.png", next(clip.render(frames=1, height=48, width=80))[1])
            peaks = []
            for length in (100, 1000, 10000):
                with film_writer(folder / f"{length}.mp4", 25, (48, 80)) as append:
                    for i in range(length):
                        append(frames[(i if i // 50 % 2 == 0 else -1 - i) % 50])
                wall, peak = run_film(folder / f"{length}.mp4", folder / "small.png")
                peaks.append(f"{length} frames {peak:.0f} MiB, {wall:.0f} s")
            row("peak memory, 48x80 pixels", "; ".join(peaks))

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for dtype in (torch.float32, torch.bfloat16):
            target, features, labels = context(60, 107, 20, device="cuda")
            target, features = target.to(dtype), features.to(dtype)  # strides, and so the layout, are kept
            t = seconds(lambda data=(target, features, labels): propagate_labels(*data, s), 10)
            row(f"the step on {name}, {dtype}", f"{1 / t:.0f} frames/s")
    kind = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())
    kind = f"{kind}, {torch.backends.cpu.get_cpu_capability()}"
    where = f"{kind}, {pool_workers()} workers, torch {torch.__version__}"
    table = "\n".join(["| what | measured |", "|---|---|", *rows])
    (ROOT / "benchmarks" / "propagation.md").write_text(
        f"Measured by `python benchmarks/propagation.py` ({where}).\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
