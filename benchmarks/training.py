"""How much of the machine's speed training reaches: a run with its data, against the network alone.

    python benchmarks/training.py        # some minutes on two cores; the table is printed and kept in training.md

Fine-tuning a ResNet-18 after the stride change, 224 x 224 crops of JPEGs of 500 x 375 drawn here, by the command line's
own main(): decoding, augmentation, optimiser and log included. Alone: forward and backward passes of the same task on
one batch of random pictures that is in memory. Both in this process, in turns.
"""

import contextlib
import csv
import io
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
import common  # noqa: E402
import train_finetune as tf  # noqa: E402

STEPS, ROUNDS, MARK = 8, 2, "<!-- above: written by training.py; below: by hand -->"
CASES = {"imagenet": 8, "rotation": 2, "moco": 4}  # pictures a step: 8 go through the network each time


def write_pictures(folder: Path, count: int) -> None:
    """Two classes of smooth pictures with some noise, which decode at the speed of photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (500, 375), interpolation=cv2.INTER_CUBIC)
        picture = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), picture)


def trained(objective: str, folder: Path, batch: int) -> tuple[float, float]:
    """Pictures/s of a run after its first three steps, and the share of its time that it waited for data."""
    flags = ["--objective", objective, "--data", folder / "pictures", "--finetune", folder / "start.pth", "--no-resume"]
    flags += ["--batch-size", batch, "--max-steps", STEPS, "--device", "cpu"]
    flags += ["--queue", 64 * batch, "--bn-groups", 2] if objective == "moco" else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        tf.main(common.parse(tf.Args, [str(flag) for flag in [*flags, "--out", folder / "out"]]))
    with (folder / "out" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))  # one a step
    return 1 / np.median([1 / float(row["images_per_s"]) for row in rows[3:]]), float(rows[-1]["waiting"])


def alone(objective: str, batch: int) -> float:
    """Pictures/s of forward and backward passes on random pictures, after three."""
    torch.manual_seed(0)
    net = tf.Net("resnet18", {"imagenet": 2, "rotation": 4, "moco": 128}[objective], frozen=True)
    method = {"imagenet": tf.Classification, "rotation": tf.Rotation}.get(objective)
    method = method(net) if method else tf.MoCo(net, 64 * batch, 128, 0.07, 0.999, 2)
    method.to(memory_format=torch.channels_last).train()
    pictures, seconds = torch.randint(0, 256, (3, batch, 3, 224, 224), dtype=torch.uint8), []
    sample = {"image": pictures[0], "query": pictures[1], "key": pictures[2], "label": torch.arange(batch) % 2}
    for step in range(STEPS):
        start = time.perf_counter()
        method({"pictures": sample}, step)["loss"].backward()
        method.zero_grad()
        seconds.append(time.perf_counter() - start)
    return batch / float(np.median(seconds[3:]))


def main() -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), torch {torch.__version__}"
    lines = [
        "# Training: last measured",
        "",
        f"`python benchmarks/training.py`, {machine}; the best of {ROUNDS} runs in turns",
        "",
        "| stride fine-tuning, ResNet-18, 224 x 224 | training, pictures/s | alone | share | waiting for data |",
        "|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        write_pictures(folder / "pictures", 160)
        torch.save(tf.Net("resnet18", 4).state_dict(), folder / "start.pth")
        for objective, batch in CASES.items():
            results = []
            for _ in range(ROUNDS):
                results.append((alone(objective, batch), *trained(objective, folder, batch)))
                print(f"{objective}: alone {results[-1][0]:.1f}, training {results[-1][1]:.1f}", file=sys.stderr)
            bare, speed, waiting = (np.array(values) for values in zip(*results, strict=True))
            row = (
                f"{speed.max():.1f} | {bare.max():.1f} | {speed.max() / bare.max():.0%} | {waiting[speed.argmax()]:.1%}"
            )
            lines.append(f"| {objective}, {batch} a step | {row} |")
    path = ROOT / "benchmarks" / "training.md"
    by_hand = path.read_text().partition(MARK)[2] if path.is_file() else "\n"
    path.write_text("\n".join([*lines, "", MARK]) + by_hand)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
