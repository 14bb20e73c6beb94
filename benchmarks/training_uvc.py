"""train_uvc_plus.py against its bare model, and the memory that a batch takes.

    python benchmarks/training_uvc.py    # some minutes on two cores; the table is printed and kept in training_uvc.md

The script trains on clips drawn here (films of 256 x 340 pixels); the bare model does the same forward and backward
passes and Adam steps on random tensors. Each in a process of its own, in turns; steps/s is that of the last ten steps
of twenty. Memory is what the forward pass keeps for the backward pass, counted tensor by tensor.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import clip  # noqa: E402
import train_uvc_plus as uvc  # noqa: E402

MARK = "<!-- above: written by training_uvc.py; below: by hand -->"

SMALL = {"crop": 128, "full": 256, "out_layer": "layer3", "batch_size": 4, "image_batch_size": 2, "image_size": 112}
SMALL["image_objective"] = "rotation"
STEPS = 20


def build(args: uvc.Args, localise: bool) -> tuple[uvc.UVC, dict]:
    """The method and a random batch for it."""
    net = uvc.UVC(args, (uvc.LabEncoder(), uvc.LabDecoder()), 0)
    side, size = args.full if localise else args.crop, args.batch_size
    batch = {"video": {name: torch.randint(0, 255, (size, n, n, 3), dtype=torch.uint8)
                       for name, n in (("reference", args.crop), ("target", side))}}  # fmt: skip
    if args.image_objective != "none":
        picture = (args.image_batch_size, 3, args.image_size, args.image_size)
        batch["image"] = torch.randint(0, 255, picture, dtype=torch.uint8)
    return net, batch


def bare(localise: bool) -> float:
    """Steps/s of the model alone."""
    net, batch = build(uvc.check(uvc.Args(data=(Path(),), **SMALL)), localise)
    optimizer = torch.optim.Adam([weight for weight in net.parameters() if weight.requires_grad], lr=1e-4)
    for step in range(STEPS):
        if step == STEPS - 10:
            start = time.perf_counter()
        net(batch, step)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return 10 / (time.perf_counter() - start)


def script(localise: bool, folder: Path, out: Path) -> float:
    """Steps/s of the whole script."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in SMALL.items()}
    flags |= {"--data": folder / "clips", "--autoencoder": folder, "--out": out, "--max-steps": STEPS, "--epochs": 9}
    flags |= {"--warmup-epochs": 0 if localise else 9, "--pairs-per-video": 20, "--workers": 2}
    command = [sys.executable, ROOT / "train_uvc_plus.py", *(part for pair in flags.items() for part in pair)]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    with (out / "log.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["images_per_s"]) / (SMALL["batch_size"] + SMALL["image_batch_size"])


def kept(localise: bool, **changes) -> float:
    """GiB that the forward pass of a batch keeps for the backward pass."""
    net, batch = build(uvc.check(uvc.Args(data=(Path(),), **changes)), localise)
    held = {weight.untyped_storage().data_ptr() for weight in (*net.parameters(), *net.buffers())}
    sizes = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        terms = net(batch, 0)  # while it lives no storage is used twice
    del terms
    return sum(sizes.values()) / 2**30


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, module in (("encoder", uvc.LabEncoder()), ("decoder", uvc.LabDecoder())):
            torch.save(module.state_dict(), folder / f"{part}.pth")
        for i in range(4):
            clip.write_clip(folder / "clips" / str(i), frames=60, height=256, width=340, seed=i)
            (folder / "clips" / str(i) / "f0.png").unlink()
            for mask in (folder / "clips" / str(i) / "truth").iterdir():
                mask.unlink()
        for localise, phase in ((False, "warm-up"), (True, "localisation")):
            best = {"bare": 0.0, "script": 0.0}
            for turn in range(2):
                command = [sys.executable, __file__, "--bare", *(["--localise"] if localise else [])]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                best["bare"] = max(best["bare"], float(out))
                best["script"] = max(best["script"], script(localise, folder, folder / f"{phase}{turn}"))
            share = best["script"] / best["bare"]
            lines.append(f"| {phase} | {best['bare']:.2f} | {best['script']:.2f} | {share:.0%} |")
            print(lines[-1], file=sys.stderr)
    memory = []
    for localise, phase in ((False, "warm-up"), (True, "localisation")):
        for layer in ("layer4", "layer3"):
            one, two = (kept(localise, out_layer=layer, batch_size=size) for size in (1, 2))
            memory.append(f"| {phase}, {layer} | {one:.2f} | {two:.2f} | {one + 39 * (two - one):.1f} |")
            print(memory[-1], file=sys.stderr)
    settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SMALL.items())
    text = [
        "# UVC+ training: last measured",
        "",
        f"`python benchmarks/training_uvc.py`, {platform.machine()}, {os.cpu_count()} cores (load "
        f"{os.getloadavg()[0]:.1f}), {torch.get_num_threads()} thread(s), torch {torch.__version__}; the better "
        "of two runs in turns",
        "",
        f"`{settings}`",
        "",
        "| phase | bare model, steps/s | script, steps/s | share |",
        "|---|---:|---:|---:|",
        *lines,
        "",
        "GiB kept for the backward pass at `--crop 256 --full 640`, float32, without an image loss; 40 pairs: one and",
        "39 times what the second adds",
        "",
        "| phase, last stage | 1 pair | 2 pairs | 40 pairs |",
        "|---|---:|---:|---:|",
        *memory,
    ]
    path = ROOT / "benchmarks" / "training_uvc.md"
    by_hand = path.read_text().partition(MARK)[2] if path.is_file() else "\n"
    path.write_text("\n".join([*text, "", MARK]) + by_hand)
    print("\n".join(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--localise", action="store_true")
    given = parser.parse_args()
    print(bare(given.localise)) if given.bare else main()
