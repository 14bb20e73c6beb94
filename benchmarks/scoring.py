"""Speed of scoring DAVIS masks, against a plainly written version of the official definition in the same run.

    python benchmarks/scoring.py --data DAVIS --predictions PREDICTIONS

`plain` follows the definition for each object: two boundary maps of the whole image, each dilated with a disk (by
OpenCV, the fastest dilation at hand), on one core as the official tool runs. `ours` is evaluate.score_frame, in as many
processes as there are cores. The numbers must be identical; the last table is in scoring.md.
"""

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate


@dataclass
class Args:
    data: Path
    """A data set in DAVIS's layout."""
    predictions: Path
    """Masks for it: <folder>/<sequence>/<frame>.png."""
    repeat: int = 3
    """Time each this often and take the best."""


def plain(truth: np.ndarray, pred: np.ndarray, objects: int) -> list[tuple[float, float]]:
    """J and F of each object by the official definition (void counts as background)."""
    radius = int(np.ceil(0.008 * np.linalg.norm(truth.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    scores = []
    for k in range(1, objects + 1):
        t, p = truth == k, pred == k
        union = np.sum(t | p)
        edge_t, edge_p = boundary(t), boundary(p)
        near_t, near_p = (cv2.dilate(edge.astype(np.uint8), disk) for edge in (edge_t, edge_p))
        count_t, count_p = np.sum(edge_t), np.sum(edge_p)
        if count_t and count_p:
            precision, recall = np.sum(edge_p * near_t) / count_p, np.sum(edge_t * near_p) / count_t
        else:
            precision, recall = (1, 1) if count_t == count_p else (1, 0) if count_t else (0, 1)
        f = 2 * precision * recall / (precision + recall) if precision + recall else 0
        scores.append((np.sum(t & p) / union if union else 1, f))
    return scores


def boundary(mask: np.ndarray) -> np.ndarray:
    """One-pixel boundaries, half a pixel towards the origin."""
    east, south, both = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    east[:, :-1], south[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    edge = mask ^ east | mask ^ south | mask ^ both
    edge[-1], edge[:, -1], edge[-1, -1] = mask[-1] ^ east[-1], mask[:, -1] ^ south[:, -1], False
    return edge


def read_and_score(job: tuple) -> np.ndarray:
    return evaluate.score_masks_frame(*job)[:2]


def plain_of_files(job: tuple) -> list[tuple[float, float]]:
    truth, pred = (np.array(Image.open(path)) for path in job[:2])
    return plain(truth, pred, job[4])


def score_in_memory(index: int) -> np.ndarray:
    return evaluate.score_frame(*MASKS[index])


def best(function, repeat: int) -> tuple[float, list]:
    """Seconds (the best of `repeat`) and result."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = list(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


args = tyro.cli(Args)
jobs, MASKS = [], []
for truth in sorted((args.data / "Annotations/480p").iterdir()):
    frames = sorted(truth.glob("*.png"))
    first = evaluate.read_ids(frames[0])
    objects = int(first[first < 255].max())
    ids = np.append(np.arange(255), 0).astype(np.uint8)  # 255 is void
    for frame in frames[1:-1] if (args.predictions / truth.name).is_dir() else ():
        jobs.append((frame, args.predictions / truth.name / frame.name, ids, None, objects, truth.name))
        MASKS.append((*map(evaluate.read_ids, jobs[-1][:2]), objects))
cores, object_frames = evaluate.pool_workers(), sum(job[4] for job in jobs)
with evaluate.worker_pool() as pool:  # the masks are shared with the processes, not sent; OpenCV has one thread
    indices = range(len(jobs))
    timed = {
        "in memory, plain, 1 core": best(lambda: (plain(*masks) for masks in MASKS), args.repeat),
        "in memory, ours, 1 core": best(lambda: map(score_in_memory, indices), args.repeat),
        f"in memory, ours, {cores} cores": best(lambda: pool.map(score_in_memory, indices, chunksize=8), args.repeat),
        "with reading, plain, 1 core": best(lambda: map(plain_of_files, jobs), args.repeat),
        f"with reading, ours, {cores} cores": best(lambda: pool.map(read_and_score, jobs, chunksize=4), args.repeat),
    }
reference = timed["in memory, plain, 1 core"][1]
for _, result in timed.values():
    for ours, theirs in zip(result, reference, strict=True):
        ours = ours if isinstance(ours, list) else ours.T
        assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-12, "the numbers differ"
print(
    f"{len(jobs)} frames, {object_frames} object masks; {platform.processor() or platform.machine()}, {cores} cores\n"
)
print("| | ms a frame and object | times as fast as plain |\n|---|---|---|")
for name, (seconds, _) in timed.items():
    kind = name.split(",")[0]
    print(f"| {name} | {1000 * seconds / object_frames:.2f} | {timed[f'{kind}, plain, 1 core'][0] / seconds:.1f} |")
