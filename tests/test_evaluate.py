"""evaluate.py: scores with known answers, the three data sets' layouts, running, sweeps, tables, and bad input."""

import csv
import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

import clip
import common
import evaluate
import systems.torchvision
import train_finetune
from common import find_system
from propagate import read_ids, write_mask

ROOT = Path(evaluate.__file__).parent
SMALL = common.Propagation(size="64", context=3, radius=4)
RANDOM = ("--model", "random", "--size", "64", "--context", "3", "--radius", "4", "--device", "cpu")


def read(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text())


def square(*corners: tuple[int, int], size=(60, 80), side=20, ids=()) -> np.ndarray:
    """A mask with a square of `side` at each corner (y, x), numbered 1, 2, ... or as in ids."""
    mask = np.zeros(size, np.uint8)
    for number, (y, x) in zip(ids or range(1, 99), corners, strict=False):
        mask[y : y + side, x : x + side] = number
    return mask


def put(folder: Path, masks: list[np.ndarray], first: int = 0, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(masks, first):
        if suffix == ".png":
            write_mask(folder / f"{i:05d}.png", mask)
        else:
            Image.fromarray(np.dstack([mask * 60] * 3)).save(folder / f"{i:05d}{suffix}")


def davis(root: Path, sequences: dict[str, list[np.ndarray]], year: str = "2017", subset: str = "val") -> Path:
    """A data set in DAVIS's layout: frames are pictures of the masks."""
    for name, masks in sequences.items():
        put(root / "Annotations/480p" / name, masks)
        put(root / "JPEGImages/480p" / name, masks, suffix=".jpg")
    listing = root / "ImageSets" / year / f"{subset}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{name}\n" for name in sequences), encoding="utf-8")
    return root


# ---------------------------------------------------------------------------------------------------------------------
# J and F


def official(truth: np.ndarray, pred: np.ndarray) -> tuple[float, float]:
    """The official definition, plainly: two boolean masks -> J, F."""

    def boundary(mask):
        east, south, both = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
        east[:, :-1], south[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        edge = (mask ^ east) | (mask ^ south) | (mask ^ both)
        edge[-1] = mask[-1] ^ east[-1]
        edge[:, -1] = mask[:, -1] ^ south[:, -1]
        edge[-1, -1] = False
        return edge

    def dilate(edge, radius):
        out = np.zeros_like(edge)
        for y, x in np.argwhere(edge):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    if dy * dy + dx * dx <= radius**2 and 0 <= y + dy < len(out) and 0 <= x + dx < len(out[0]):
                        out[y + dy, x + dx] = True
        return out

    radius = int(np.ceil(0.008 * np.linalg.norm(truth.shape)))
    t, p = boundary(truth), boundary(pred)
    if p.sum() and t.sum():
        precision = (p & dilate(t, radius)).sum() / p.sum()
        recall = (t & dilate(p, radius)).sum() / t.sum()
    else:
        precision, recall = (1, 1) if p.sum() == t.sum() else (1, 0) if t.sum() else (0, 1)
    f = 0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
    union = (truth | pred).sum()
    return 1 if union == 0 else (truth & pred).sum() / union, f


@pytest.mark.parametrize("seed", range(6))
def test_j_and_f_are_those_of_the_official_definition(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(3, 60), rng.integers(3, 500 if seed > 3 else 90)  # radius 1 to 5
    noise = [cv2.GaussianBlur(rng.random((height, width)), (0, 0), rng.uniform(0.5, 6)) for _ in range(2)]
    truth, pred = (np.digitize(n, np.quantile(n, [0.4, 0.6, 0.9])).astype(np.uint8) for n in noise)
    if seed % 2:
        pred[:, width // 2 :] = truth[:, width // 2 :]
    scores = evaluate.score_frame(truth, pred, 4)  # there is no object 4: empty on both sides
    for k in range(1, 5):
        assert tuple(scores[:, k - 1]) == pytest.approx(official(truth == k, pred == k), abs=1e-12)


@pytest.mark.parametrize(
    "truth, pred, j, f",
    [
        (square((5, 5)), square((5, 15)), 1 / 3, None),  # half of 20 x 20 in common: 200 of 600 pixels
        (square((5, 5)), square((5, 6)), 19 / 21, 1),  # one pixel off is within the tolerance of one
        (square((5, 5), (35, 50), ids=(1, 1)), square((5, 5)), 1 / 2, 2 / 3),  # precision 1, recall 1/2
        (square((5, 5)), square((35, 50)), 0, 0),
        (square(), square(), 1, 1),  # both empty
        (square((5, 5)), square(), 0, 0),  # prediction empty
        (square(), square((5, 5)), 0, 0),  # truth empty
        (square((0, 0), side=99), square((0, 0), side=99), 1, 1),  # all of the image: no boundary at all
        (square((0, 0), side=99), square((5, 5)), 400 / 4800, 0),
    ],
)
def test_j_and_f_by_hand(truth, pred, j, f):
    scores = evaluate.score_frame(truth, pred, 1)[:, 0]
    assert scores[0] == pytest.approx(j, abs=1e-12)
    assert f is None or scores[1] == pytest.approx(f, abs=1e-12)


def test_mean_recall_and_decay_by_hand():
    # 8 frames: quarters are frames 0-2 and 5-7
    assert evaluate.statistics(np.arange(8) / 10) == pytest.approx((0.35, 0.25, 0.1 - 0.6))
    assert evaluate.statistics(np.array([0.7])) == (0.7, 1, 0)
    assert all(math.isnan(value) for value in evaluate.statistics(np.array([])))
    # 300 frames: frames 0-75 against 224-299; the official tool's uint8 would read frame 299 as 43
    assert evaluate.statistics(np.arange(300) / 300)[2] == pytest.approx((37.5 - 261.5) / 300)


# ---------------------------------------------------------------------------------------------------------------------
# DAVIS


def test_the_official_tools_scores_of_osvos(shared, cli, tmp_path):
    code, out, _ = cli(
        evaluate, "--data", shared / "data/DAVIS", "--predictions", shared / "data/osvos_predictions", "--out", tmp_path
    )
    assert code == 0
    assert "76.4  72.4  77.2  20.4  80.3  88.8  18.6" in out
    assert "less is better" in out and "less is better" in (tmp_path / "report.html").read_text()  # the columns' legend
    expected, ours = json.loads((shared / "data/osvos_expected.json").read_text()), read(tmp_path)
    assert ours["overall"] == pytest.approx(expected["global"], abs=1e-9)
    assert ours["per_object"].keys() == expected["per_object"].keys()
    for name, scores in expected["per_object"].items():
        assert {k: ours["per_object"][name][k] for k in scores} == pytest.approx(scores, abs=1e-9)


def test_davis_by_hand(cli, tmp_path):
    """First and last frame left out, void is background, a missing object scores as empty, means over objects."""
    wide = (40, 130)
    void = square((5, 5), (5, 60), size=wide)
    void[30:, :] = 255
    data = davis(
        tmp_path / "data",
        {
            "a b": [square((5, 5)), square((5, 10)), square((5, 15)), square((5, 20))],
            "naïve-日本": [
                square((5, 5), (5, 60), size=wide),
                void,
                square((5, 5), (5, 60), size=wide),
                square(size=wide),
            ],
            "one": [square((5, 5))],
        },
    )
    put(tmp_path / "mine/a b", [square(), square((5, 20)), square((5, 15)), square()])  # J 1/3, 1
    put(tmp_path / "mine/naïve-日本", [square(size=wide), void % 255, square((5, 5), size=wide), square(size=wide)])
    put(tmp_path / "mine/one", [square()])
    code, _, err = cli(evaluate, "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    assert code == 0, err
    scores = read(tmp_path / "out")
    j = {name: score["J_M"] for name, score in scores["per_object"].items()}
    assert j == pytest.approx({"a b_1": 2 / 3, "naïve-日本_1": 1, "naïve-日本_2": 0.5, "one_1": None})
    assert scores["overall"]["J_M"] == pytest.approx((2 / 3 + 1 + 0.5) / 3)
    assert scores["overall"]["J_O"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert scores["overall"]["J&F_M"] == pytest.approx((scores["overall"]["J_M"] + scores["overall"]["F_M"]) / 2)
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        rows = {(row["level"], row["name"]): row for row in csv.DictReader(file)}
    assert float(rows["per_object", "naïve-日本_2"]["J_M"]) == 0.5
    assert float(rows["per_sequence", "naïve-日本"]["J_M"]) == 0.75
    assert rows["per_sequence", "one"]["J_M"] == ""
    assert float(rows["overall", "all"]["J_M"]) == pytest.approx(scores["overall"]["J_M"], abs=1e-6)


@pytest.mark.parametrize("number", [1, 255])
def test_davis_2016_has_one_object(cli, tmp_path, number):
    masks = [square((5, 5), (5, 40), ids=(number, number)) for _ in range(3)]
    data = davis(tmp_path / "data", {"s": masks}, year="2016")
    put(tmp_path / "mine/s", [square((5, 5), ids=(7,))] * 3)  # any id is the object: half of it
    code, _, err = cli(
        evaluate,
        "--dataset",
        "davis2016",
        "--data",
        data,
        "--predictions",
        tmp_path / "mine",
        "--out",
        tmp_path / "out",
    )
    assert code == 0, err
    assert read(tmp_path / "out")["per_object"]["s_1"]["J_M"] == 0.5


def soft(mask: np.ndarray) -> np.ndarray:
    """A mask of 0 and 255 that was resized bilinearly."""
    return cv2.resize(cv2.resize(mask, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), mask.shape[::-1])


@pytest.mark.parametrize("kind", ["truth", "prediction", "both"])
def test_davis_2016_takes_smooth_edges_at_half(cli, tmp_path, kind):
    """As if the masks had been thresholded before, also in what is propagated."""
    white = [255 * square((5, 5 + 3 * i), (31, 41), ids=(1, 1)) for i in range(5)]
    mine = [255 * square((9, 5 + 3 * i), (31, 41), ids=(1, 1)) for i in range(5)]
    smooth = {name: [soft(mask) for mask in masks] for name, masks in (("truth", white), ("prediction", mine))}
    hard = {name: [(mask > 127) * np.uint8(255) for mask in masks] for name, masks in smooth.items()}
    smooth["prediction"][2] = hard["prediction"][2]
    scores = []
    for name in "smooth", "hard":
        masks = {k: (smooth if name == "smooth" and kind in (k, "both") else hard)[k] for k in hard}
        davis(tmp_path / name, {"s": masks["truth"]}, year="2016")
        put(tmp_path / name / "mine/s", masks["prediction"])
        argv = ("--dataset", "davis2016", "--data", tmp_path / name, "--out", tmp_path / name / "out")
        code, _, err = cli(evaluate, *argv, "--predictions", tmp_path / name / "mine")
        assert code == 0 and err.count("has grey levels, as a smoothed edge has") == (
            {"both": 2}.get(kind, 1) if name == "smooth" else 0
        )
        scores.append(read(tmp_path / name / "out")["per_object"])
    assert scores[0] == scores[1] and scores[0]["s_1"]["J_M"] > 0.6
    code, _, err = cli(evaluate, *argv, *RANDOM)
    first = next((tmp_path / "hard/out").glob("predictions/*/s/00000.png"))
    assert code == 0 and (read_ids(first) == (hard["truth"][0] > 0)).all(), err


def test_davis_2016_knows_void_by_the_whole_sequence(cli, tmp_path):
    """255 beside ids is void in the annotation, even in a frame without ids; in a prediction it is the object."""
    void = [square((5, 5), (30, 40), ids=(1, 255)), square((30, 40), ids=(255,)), square((5, 5), ids=(2,))]
    data = davis(tmp_path / "data", {"s": [void[0], *void, void[0]]}, year="2016")
    mine = square((5, 5), (30, 40), ids=(3, 255))
    put(tmp_path / "mine/s", [square((5, 5)), mine, square(), square((5, 5)), void[0]])
    argv = ("--dataset", "davis2016", "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 0 and read(tmp_path / "out")["per_object"]["s_1"]["J_M"] == pytest.approx((1 / 2 + 1 + 1) / 3), err


def test_masks_of_one_bit(cli, tmp_path):
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "data", {"a": masks, "b": masks})
    put(tmp_path / "mine/a", masks), put(tmp_path / "mine/b", masks)
    for folder in (data / "Annotations/480p/a", tmp_path / "mine/b"):
        for path, mask in zip(sorted(folder.iterdir()), masks, strict=True):
            Image.fromarray(mask > 0).save(path)
    code, _, err = cli(evaluate, "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    assert code == 0 and read(tmp_path / "out")["overall"]["J&F_M"] == 1, err


def test_what_begins_with_a_dot_is_no_data(cli, tmp_path):
    """macOS keeps a ._ file beside each file on other disks; the run and its scores are those without them."""
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "data", {"a": masks})
    clips = jhmdb(tmp_path / "jhmdb", {"clip": grid_of_joints(3)})
    put(tmp_path / "mine/a", masks)
    for path in [*data.rglob("*"), *clips.rglob("*"), *(tmp_path / "mine").rglob("*")]:
        (path.parent / f"._{path.name}").write_bytes(b"Mac OS X")
    for argv in (*RANDOM,), ("--predictions", tmp_path / "mine"):
        code, _, err = cli(evaluate, "--data", data, *argv, "--out", tmp_path / "out")
        assert code == 0 and list(read(tmp_path / "out")["per_object"]) == ["a_1"] and "note: " not in err, err
    code, _, err = cli(evaluate, "--dataset", "jhmdb", "--data", clips, *RANDOM, "--out", tmp_path / "out")
    assert code == 0 and list(read(tmp_path / "out")["per_sequence"]) == ["wave/clip"], err


def test_a_frame_that_cannot_be_read_is_a_grey_cell_of_the_report(cli, tmp_path):
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "data", {"a": masks})
    for i, broken in enumerate((b"", b"no picture")):
        (data / f"JPEGImages/480p/a/0000{i}.jpg").write_bytes(broken)
    (data / "JPEGImages/480p/a/notes.jpg").write_bytes(b"of another name")
    argv = ("--data", data, "--predictions", data / "Annotations/480p", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 0 and "Best: a" in (tmp_path / "out/report.html").read_text(), err


def test_ids_with_gaps_are_told(cli, tmp_path):
    """199 of 200 objects are nowhere, so right everywhere: the official tool's figure, with a word about it."""
    data = davis(tmp_path / "data", {"a": [square((5, 5 + i), ids=(200,)) for i in range(4)]})
    put(tmp_path / "mine/a", [square((5, 30), ids=(200,))] * 4)
    argv = ("--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 0 and read(tmp_path / "out")["overall"]["J_M"] > 0.99
    assert "00000.png: of the ids 1 to 200 only 1 are objects of the first frame" in err
    code, _, err = cli(evaluate, "--dataset", "folder", *argv)
    assert code == 0 and read(tmp_path / "out")["overall"]["J_M"] < 0.1 and "note" not in err, err


def test_sequences_without_a_frame_to_score_are_told(cli, tmp_path):
    short, long = [square((5, 5))] * 2, [square((5, 5))] * 3
    for sequences, code in (({"a": short, "b": long}, 0), ({"a": short}, 1)):
        data = davis(tmp_path / f"data{code}", sequences)
        argv = ("--data", data, "--predictions", data / "Annotations/480p", "--out", tmp_path / "out")
        got, _, err = cli(evaluate, *argv)
        assert got == code and "a: is annotated in 2 frames; without the first and the last none is scored" in err
        evaluate.note.cache_clear()


def test_the_best_row_is_told_by_the_sequences_that_all_have(cli, tmp_path):
    """`partly` has only the easy sequence: better on average, worse where both have one."""
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "data", {"easy": masks, "hard": masks})
    put(tmp_path / "partly/easy", [square((5, 7))] * 4)
    put(tmp_path / "whole/easy", masks), put(tmp_path / "whole/hard", [square((30, 50))] * 4)
    argv = ("--data", data, "--predictions", tmp_path / "partly", tmp_path / "whole", "--out", tmp_path / "out")
    code, _, _ = cli(evaluate, *argv)
    report, rows = (tmp_path / "out/report.html").read_text(), read(tmp_path / "out")["rows"]
    assert code == 1 and rows[0]["overall"]["J&F_M"] > rows[1]["overall"]["J&F_M"]
    assert "val: whole</h1>" in report and "<tr class=best><td>whole" in report
    assert "the best of 2 rows over the sequences that all have (1)" in report


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-30])
    return path


def in_colour(path: Path) -> Path:
    Image.open(path).convert("RGB").save(path)
    return path


def shrink(path: Path) -> Path:
    write_mask(path, square((5, 5), size=(30, 40)))
    return path


def id_too_high(path: Path) -> Path:
    write_mask(path, square((5, 5), ids=(3,)))
    return path


def remove(path: Path) -> Path:
    path.unlink()
    return path


def other_sequence(path: Path) -> Path:
    return path.rename(path.with_name("good_00002.png")).with_suffix("")


@pytest.mark.parametrize(
    "damage, says",
    [
        (truncate, "cannot be read"),
        (in_colour, "RGB"),
        (shrink, "is 40x30, but the ground truth is 80x60"),
        (id_too_high, "has id 3, but bad has objects 1..1"),
        (remove, "no such mask"),
        (other_sequence, "mixes sequences"),
    ],
)
def test_a_bad_prediction_is_named_and_the_others_are_scored(cli, tmp_path, damage, says):
    masks = [square((5, 5 + i)) for i in range(5)]
    data = davis(tmp_path / "data", {"bad": masks, "good": masks})
    for name in ("bad", "good"):
        put(tmp_path / "mine" / name, masks)
    path = damage(tmp_path / "mine/bad/00002.png")
    code, out, err = cli(evaluate, "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    lines = [line for line in err.splitlines() if "error: " in line]
    assert code == 1 and len(lines) == 1 and str(path) in lines[0] and says in lines[0]
    assert "1 of 2 sequences failed" in out
    assert list(read(tmp_path / "out")["per_object"]) == ["good_1"] and read(tmp_path / "out")["overall"]["J_M"] == 1
    assert says in (tmp_path / "out/report.html").read_text()


def test_frames_that_do_not_matter(cli, tmp_path):
    """The first and last prediction may be missing, masks of frames beyond the sequence are left out with a note."""
    masks = [square((5, 5 + i)) for i in range(5)]
    data = davis(tmp_path / "data", {"s": masks})
    put(tmp_path / "mine/s", [*masks, square((1, 1)), square((2, 2))])
    remove(tmp_path / "mine/s/00000.png"), remove(tmp_path / "mine/s/00004.png")
    code, _, err = cli(evaluate, "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    assert code == 0 and "2 masks for frames that s does not have" in err and "00005" in err
    assert read(tmp_path / "out")["overall"]["J&F_M"] == 1


@pytest.mark.parametrize(
    "breaks, says",
    [
        (
            lambda root: remove(root / "Annotations/480p/bad/00000.png"),
            "00000.png: not found; the first frame's annotation",
        ),
        (lambda root: truncate(root / "Annotations/480p/bad/00000.png"), "bad/00000.png: cannot be read"),
        (lambda root: truncate(root / "JPEGImages/480p/bad/00002.jpg").write_bytes(b"no"), "00002.jpg: cannot be read"),
        (lambda root: remove(root / "JPEGImages/480p/bad/00002.jpg"), "00002.jpg: not found"),
        (lambda root: put(root / "Annotations/480p/bad", [square()]), "has no object"),
        (lambda root: put(root / "Annotations/480p/bad", [square((1, 1), ids=(255,))]), "--dataset davis2016"),
        (
            lambda root: put(root / "Annotations/480p/bad", [square((1, 1), size=(30, 40))]),
            "is 40x30, but its frame is 80x60",
        ),
        (
            lambda root: [path.unlink() for path in (root / "Annotations/480p/bad").iterdir()],
            "00000.png: not found; the first frame's annotation",
        ),
        (
            lambda root: (root / "JPEGImages/480p/bad/00002.jpg").rename(root / "JPEGImages/480p/bad/x2.jpg"),
            "mixes sequences",
        ),
    ],
)
def test_a_bad_sequence_is_named_and_the_others_are_run(cli, tmp_path, breaks, says):
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "data", {"bad": masks, "good": masks})
    breaks(data)
    code, _, err = cli(evaluate, "--data", data, *RANDOM, "--out", tmp_path / "out")
    lines = [line for line in err.splitlines() if "error: " in line]
    assert code == 1 and len(lines) == 1 and says in lines[0], err
    assert list(read(tmp_path / "out")["per_object"]) == ["good_1"]


@pytest.mark.parametrize("dataset", ["davis", "davis2016", "vip", "jhmdb"])
def test_a_missing_data_set_says_where_and_which_page(cli, tmp_path, dataset):
    code, _, err = cli(evaluate, "--dataset", dataset, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1
    assert str(tmp_path / "nowhere") in err and evaluate.DATASETS[dataset].page in err


@pytest.mark.parametrize("paper, name", [("table7", "VIP"), ("figure5", "VIP"), ("table8", "JHMDB")])
def test_a_table_of_another_data_set_says_which_it_wants(cli, tmp_path, paper, name):
    data = davis(tmp_path / "data", {"a": [square((5, 5))] * 3})
    code, _, err = cli(evaluate, "--data", data, "--paper", paper, "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{paper} is of {name}, see {evaluate.DATASETS[name.lower()].page}" in err


def test_a_folder_inside_a_data_set_is_told_where_it_begins(cli, tmp_path):
    masks = [square((5, 5))] * 3
    davis(tmp_path / "davis", {"a": masks})
    vip(tmp_path / "vip", "fine", masks, masks, {1: 1})
    jhmdb(tmp_path / "jhmdb", {"a": grid_of_joints(3)})
    for dataset, root, inside in (
        ("davis", "davis", "JPEGImages"),
        ("davis", "davis", "Annotations/480p"),
        ("vip", "vip/VIP_Fine", "Images"),
        ("jhmdb", "jhmdb", "joint_positions"),
    ):
        for more in (), ("--sequences", "a"):
            argv = ("--dataset", dataset, "--data", tmp_path / root / inside, *more, "--out", tmp_path / "out")
            code, _, err = cli(evaluate, *argv)
            assert code == 2 and err.endswith(f"take --data {tmp_path / root}\n") and len(err.splitlines()) == 1, err


def test_each_data_set_has_a_class_and_a_name_on_the_command_line():
    assert get_args(get_type_hints(evaluate.Args)["dataset"]) == tuple(evaluate.DATASETS)
    lines = csv.DictReader(evaluate.PAPER.open(newline=""))
    assert {line["dataset"] for line in lines} <= evaluate.DATASETS.keys()


def test_help_says_what_a_reader_of_the_paper_needs(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = " ".join(re.sub("[│╭╮╰╯]", "", capsys.readouterr().out).split())
    for words in (
        "a name from propagate.py --list-models",
        "other defaults of the factors: see --dataset vip --help",
        "Figure 5 want VIP in --data, Table 8 JHMDB, the others DAVIS 2017",
    ):
        assert words in text


def test_an_incomplete_data_set_is_scored_as_far_as_it_goes(cli, tmp_path):
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "data", {"a": masks, "b": masks, "c": masks})
    shutil.rmtree(data / "Annotations/480p/b")
    put(tmp_path / "mine/a", masks), put(tmp_path / "mine/c", masks)
    code, _, err = cli(evaluate, "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    assert code == 1 and "(1 of 3 sequences are missing)" in err and str(data / "Annotations/480p/b") in err
    assert list(read(tmp_path / "out")["per_object"]) == ["a_1", "c_1"]
    code, _, err = cli(
        evaluate, "--data", data, "--sequences", "c", "--predictions", tmp_path / "mine", "--out", tmp_path / "out"
    )
    assert code == 0 and list(read(tmp_path / "out")["per_object"]) == ["c_1"]


def test_a_sequence_that_is_not_there_is_named_before_any_work(cli, tmp_path):
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "DAVIS", {"gold-fish": masks, "goat": masks, "dog": masks})
    clips = jhmdb(tmp_path / "JHMDB", {"a_wave": grid_of_joints(3), "another": grid_of_joints(3)})
    vip(tmp_path / "VIP", "fine", masks, masks, {1: 1})
    for dataset, names, near in (
        ("davis", "dog,goats", f"goats: is not in {data}/Annotations/480p; names there are like goat"),
        ("davis", "swan", f"swan: is not in {data}/Annotations/480p; names there are like dog, goat, gold-fish"),
        ("vip", "video1", "names there are like videos1"),
        ("jhmdb", "another,a_waves", f"a_waves: is not in {clips}/joint_positions; names there are like wave/a_wave"),
    ):
        argv = ("--dataset", dataset, "--data", tmp_path / dataset.upper(), "--sequences", names)
        code, _, err = cli(evaluate, *argv, *RANDOM, "--out", tmp_path / "out")
        assert code == 2 and len(err.splitlines()) == 1 and near in err and not (tmp_path / "out").exists(), err
    for name in ("another", "wave/another", " another , "):
        args = evaluate.Args(dataset="jhmdb", sequences=name)
        assert [seq.name for seq in evaluate.read_dataset(args, clips)[0]] == ["wave/another"]


@pytest.mark.parametrize(
    "argv, says",
    [
        (("--predictions", "nowhere"), "nowhere: no such folder"),
        (("--sweep", "tempo=1,2"), "with a factor of size, upsample"),
        (("--sweep", "topk=1,x"), "--sweep topk=1,x: 'x' is no whole number"),
        (("--sweep", "temperature=1,x"), "--sweep temperature=1,x: 'x' is no number"),
        (("--predictions", ".", "--sweep", "topk=1"), "give one of them"),
        (("--paper", "table4", "--sweep", "topk=1"), "give one of them"),
        (("--predictions", "."), ".: holds none of the sequences; --predictions takes <folder>/s/<frame>.png"),
        (("--sweep", "aggregation=some"), "'some' is none of overall, per-frame"),
        (("--sweep", "topk=0,1"), "--topk 0"),
        (("--weights", "nowhere.pth", "--model", "imagenet"), "nowhere.pth"),
    ],
)
def test_wrong_flags_are_told_before_any_work(cli, tmp_path, argv, says):
    data = davis(tmp_path / "data", {"s": [square((5, 5))] * 3})
    code, _, err = cli(evaluate, "--data", data, "--out", tmp_path / "out", *RANDOM, *argv)
    assert code == 2 and says in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_name_that_leads_out_of_the_folder_is_refused(cli, tmp_path):
    """A list decides what is written and what is replaced: its names stay within."""
    masks = [square((5, 5 + i)) for i in range(3)]
    davis(tmp_path / "davis", {"a": masks}), jhmdb(tmp_path / "jhmdb", {"clip": grid_of_joints(3)})
    vip(tmp_path / "vip", "flat", masks, masks, {1: 1})
    (tmp_path / "out/predictions/esc").mkdir(parents=True)
    (tmp_path / "out/predictions/esc/00000.png").touch()
    before = sorted(tmp_path.rglob("*"))
    lists = {
        "davis": ("ImageSets/2017/val.txt", "a\n\n{}\n"),
        "vip": ("lists/val_videos.txt", "videos1\n\n{}\n"),
        "jhmdb": ("splits/wave_test_split1.txt", "clip.avi 2\n\n{}.avi 2\n"),
    }
    for dataset, (path, text) in lists.items():
        for name in ("../esc", "../../x", "a/../b", "a//b", ".hidden", "a\\b", "a\0b", "b" * 300):
            (tmp_path / dataset / path).write_text(text.format(name))
            argv = ("--dataset", dataset, "--data", tmp_path / dataset, *RANDOM, "--out", tmp_path / "out")
            code, _, err = cli(evaluate, *argv)
            assert code == 2 and len(err.splitlines()) == 1 and f"{tmp_path / dataset / path}, line 3: " in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_deleted_that_no_run_made(cli, data, tmp_path):
    """A half prediction is replaced, but not if something else lies there."""
    argv = ("--data", data, "--sequences", "first", *RANDOM, "--out", tmp_path / "out")
    assert cli(evaluate, *argv)[0] == 0
    (folder,) = (tmp_path / "out").glob("predictions/*/first")
    remove(folder / "00002.png")
    (folder / "notes.md").write_text("mine")
    code, _, err = cli(evaluate, *argv)
    assert code == 1 and f"{folder / 'notes.md'}: no run has made it; move it away" in err, err
    assert (folder / "notes.md").read_text() == "mine" and (folder / "00001.png").exists()
    remove(folder / "notes.md")
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    code, _, err = cli(evaluate, *argv)
    assert code == 1 and f"{folder}: no run has made it" in err and len(list(elsewhere.iterdir())) == 5
    remove(folder)
    code, _, err = cli(evaluate, *argv)
    assert code == 0 and len(list(folder.iterdir())) == 6, err


def test_a_disk_that_cannot_be_written_is_one_line(cli, data, tmp_path, monkeypatch):
    """Also where a folder is made or moved, not only where a mask is written."""

    def full(path, real, *rest, **how):
        if "first" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *rest, **how)

    for name in ("rename", "mkdir"):
        argv = ("--data", data, "--sequences", "first", *RANDOM, "--out", tmp_path / name)
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, partialmethod(full, getattr(Path, name)))
            code, _, err = cli(evaluate, *argv)
        assert code == 1 and "cannot be written (No space left on device)" in err and "Traceback" not in err, err
        assert cli(evaluate, *argv)[0] == 0  # the same command goes on


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "argv, says",
    [
        (("--data", "a-file"), "ImageSets/2017/val.txt: not found"),
        (("--data", "loop"), "ImageSets/2017/val.txt: not found"),
        (("--dataset", "folder", "--data", "a-file"), "a-file: no such folder"),
        (("--dataset", "folder", "--data", "empty"), "list is empty"),
        (("--dataset", "jhmdb", "--subset", "test-dev"), "JHMDB has none"),
        (("--dataset", "folder", "--subset", "train"), "--subset train: a folder has no subsets"),
        (("--out", "a-file"), "a-file: cannot be written (File exists)"),
        (("--out", "a-file/inside"), "a-file/inside: cannot be written (Not a directory)"),
        (("--out", "loop"), "loop: cannot be written"),
        (("--sequences", " , "), "--sequences ' , ': names no sequence"),
        (("--predictions", "mine", "nowhere"), "nowhere: no such folder"),
        (("--predictions", "loop"), "loop: no such folder"),
        (("--predictions", "a-pipe"), "a-pipe: no such folder"),
        (("--predictions", "a-file"), "a-file: no such folder"),
        (("--subset", "test-dev", "--predictions", "mine"), "cannot be scored here, its annotations are not public"),
        (("--grid",), "--grid: is about --sweep"),
        (("--paper", "table4", "--dataset", "vip"), "--dataset vip: --paper table4 is about davis; leave it out"),
        (("--split", "2"), "--split: is for --dataset jhmdb alone"),
        (("--split", "4"), "--split"),
        (("--all-frames",), "--all-frames: is for --dataset folder alone"),
        (("--sweep", "topk="), "--sweep topk=: give factor=value,value,..."),
        (("--sweep", "topk=1e9999"), "'1e9999' is no whole number"),
        (("--sweep", "temperature=nan"), "--temperature nan: give 1e-09 or more"),
        (("--sweep", "context=-1"), "--context -1: give 0 or more"),
        (("--device", "tpu"), "tpu"),
        (("--dtype", "int8"), "--dtype"),
        (("--dtype", "float16"), "--dtype float16: needs a GPU"),
    ],
)
def test_bad_flags_and_paths_are_one_line_before_any_work(cli, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    davis(Path("data/davis"), {"s": [square((5, 5))] * 3}), put(Path("data/folder/s"), [square((5, 5))] * 3)
    put(Path("mine/s"), [square((5, 5))] * 3)
    Path("a-file").touch(), Path("loop").symlink_to("loop"), os.mkfifo("a-pipe"), Path("empty").mkdir()
    few = () if "--predictions" in argv else RANDOM[:-2] if "--device" in argv else RANDOM
    code, out, err = cli(evaluate, *few, *argv)
    assert code == 2 and says in err and len(err.splitlines()) == 1 and not out, err
    assert not Path("results").exists()


@pytest.mark.parametrize(
    "damage, says",
    [
        (pipe, "not found, it lists the sequences"),
        (lambda path: path.write_bytes(b"s\n\xff\xfe\n"), "cannot be read as text ('utf-8'"),
        (lambda path: path.unlink() or path.mkdir(), "not found, it lists the sequences"),
        (lambda path: path.write_text("\n \n"), "list is empty"),
    ],
)
@pytest.mark.parametrize("dataset", ["davis", "vip", "jhmdb"])
def test_a_bad_list_is_one_line(cli, tmp_path, dataset, damage, says):
    masks = [square((5, 5))] * 3
    davis(tmp_path / "davis", {"s": masks}), vip(tmp_path / "vip", "flat", masks, masks, {1: 1})
    jhmdb(tmp_path / "jhmdb", {"clip": grid_of_joints(3)})
    lists = {"davis": "ImageSets/2017/val.txt", "vip": "lists/val_videos.txt", "jhmdb": "splits/wave_test_split1.txt"}
    damage(tmp_path / dataset / lists[dataset])
    argv = ("--dataset", dataset, "--data", tmp_path / dataset, *RANDOM, "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 2 and says in err and len(err.splitlines()) == 1, err


def test_pipes_and_files_in_place_of_data_are_not_waited_for(cli, tmp_path):
    masks = [square((5, 5 + i)) for i in range(4)]
    data = davis(tmp_path / "data", dict.fromkeys(("mask", "folder", "empty", "good"), masks))
    pipe(data / "Annotations/480p/mask/00000.png")
    for kind in ("Annotations", "JPEGImages"):
        shutil.rmtree(data / kind / "480p/folder"), shutil.rmtree(data / kind / "480p/empty")
        (data / kind / "480p/folder").touch(), (data / kind / "480p/empty").mkdir()
    code, _, err = cli(evaluate, "--data", data, *RANDOM, "--out", tmp_path / "out")
    assert code == 1 and list(read(tmp_path / "out")["per_object"]) == ["good_1"], err
    failed = read(tmp_path / "out")["rows"][0]["failed"]
    says = {"mask": "00000.png: not found", "folder": "not found", "empty": "no masks"}
    assert failed.keys() == says.keys() and all(text in failed[name] for name, text in says.items())
    clips = jhmdb(tmp_path / "jhmdb", {"bad": grid_of_joints(3), "good": grid_of_joints(3)})
    mat = clips / "joint_positions/wave/bad/joint_positions.mat"
    for content in ({"pos_img": np.zeros((2, 14, 3))}, {"pos_img": "text"}, {}, None):
        savemat(mat, content) if content is not None else pipe(mat)
        argv = ("--dataset", "jhmdb", "--data", clips, "--predictions", clips / "joint_positions")
        code, _, err = cli(evaluate, *argv, "--out", tmp_path / "out")
        assert code == 1 and str(mat) in err and list(read(tmp_path / "out")["per_sequence"]) == ["wave/good"], err


def test_a_factor_that_is_swept_twice_has_all_its_values(cli, data, tmp_path):
    argv = ("--sweep", "topk=1", "--sweep", "topk=2", "--sequences", "first", "--out", tmp_path)
    code, _, err = cli(evaluate, "--data", data, *RANDOM, *argv)
    assert code == 0 and [row["settings"]["topk"] for row in read(tmp_path)["rows"]] == [1, 2], err


@pytest.mark.parametrize(
    "flag",
    [("--no-l2",), ("--topk", "3"), ("--topk", "10"), ("--model", "crw"), ("--dtype", "bfloat16"), ("--device", "cpu")],
)
def test_what_has_no_say_in_predictions_is_told(cli, tmp_path, flag):
    data = davis(tmp_path / "data", {"s": [square((5, 5))] * 3})
    code, _, err = cli(evaluate, "--data", data, "--predictions", data / "Annotations/480p", *flag)
    says = "has no say in --predictions, which are only scored; leave it out"
    assert code == 2 and err == f"error: {flag[0].replace('no-', '')}: {says}\n"


def test_the_command_line_of_another_program_has_no_say(cli, tmp_path, monkeypatch):
    data = davis(tmp_path / "data", {"s": [square((5, 5))] * 3})
    monkeypatch.setattr(sys, "argv", ["training.py", "--topk", "10"])
    argv = ("--data", data, "--predictions", data / "Annotations/480p", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 0, err
    assert evaluate.parse_args(["--no_l2", "--no-minmax", "--topk=3"]).typed == ("l2", "minmax", "topk")
    assert evaluate.parse_args([]).typed == () and evaluate.parse_args(None).typed == ("topk",)


# ---------------------------------------------------------------------------------------------------------------------
# Any folder of masks


def vos_benchmark(truth: Path, preds: Path, all_frames: bool) -> dict[str, tuple[float, float]]:
    """The rules of hkchengrex/vos-benchmark, plainly: <sequence>_<id> -> J, F."""
    scores = {}
    for folder in sorted(truth.iterdir()):
        names = sorted(path.name for path in folder.iterdir())
        seen, true, values = set(), set(), {}
        for name in names if all_frames else names[1:-1]:
            t, p = (np.array(Image.open(root / folder.name / name)) for root in (truth, preds))
            true |= set(np.unique(t).tolist()) - {0}
            seen |= true | set(np.unique(p).tolist()) - {0}
            for k in seen:
                values.setdefault(k, []).append(official(t == k, p == k))
        for k in true:
            scores[f"{folder.name}_{k}"] = tuple(np.mean(values[k], axis=0))
    return scores


def sparse(root: Path, seed: int) -> tuple[Path, Path]:
    """Truth and predictions with ids with gaps, objects that come, go, and are predicted before they are there."""
    rng = np.random.default_rng(seed)
    for name, ids in (("first", (1, 7, 255)), ("second", (3, 40, 41)), ("only predicted", (2,))):
        for kind in ("truth", "mine"):
            masks = []
            for t in range(7):
                shown = [
                    k for k in ids if rng.random() < 0.6 and (t or k != ids[-1]) and (name[0] != "o" or kind == "mine")
                ]
                masks.append(square(*[tuple(rng.integers(0, 30, 2)) for _ in shown], (31, 31), ids=(*shown, 9)))
                masks[-1][masks[-1] == 9] = 0 if kind == "truth" else 9
            put(root / kind / name, masks, first=5)
    return root / "truth", root / "mine"


@pytest.mark.parametrize("all_frames", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_folder_is_scored_as_vos_benchmark_does(cli, tmp_path, all_frames, seed):
    truth, mine = sparse(tmp_path, seed)
    expected = vos_benchmark(truth, mine, all_frames)
    argv = ("--dataset", "folder", "--data", truth, "--predictions", mine, "--out", tmp_path / "out")
    code, out, err = cli(evaluate, *argv, *["--all-frames"] * all_frames)
    assert code == 0 and "J&F_ungiven" in out, err
    scores = read(tmp_path / "out")
    assert scores["per_object"].keys() == expected.keys() and len(expected) > 4
    for name, (j, f) in expected.items():
        assert scores["per_object"][name]["J_M"] == pytest.approx(j, abs=1e-6)
        assert scores["per_object"][name]["F_M"] == pytest.approx(f, abs=1e-6)
    assert scores["overall"]["J_M"] == pytest.approx(np.mean([j for j, _ in expected.values()]), abs=1e-6)
    assert scores["overall"]["J&F_M"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)


def test_the_fairer_column_leaves_out_the_frame_that_gives_an_object(cli, tmp_path):
    """Object 5 comes in frame 2: its mask is given there, so 1 says nothing."""
    truth = [square((5, 5)), square((5, 5)), square((5, 5), (35, 40), ids=(1, 5)), *[square((35, 40), ids=(5,))] * 3]
    mine = [square(), square((5, 15)), truth[2], square((35, 50), ids=(5,)), square(), square()]
    put(tmp_path / "truth/s", truth), put(tmp_path / "mine/s", mine)
    argv = ("--dataset", "folder", "--data", tmp_path / "truth", "--predictions", tmp_path / "mine")
    assert cli(evaluate, *argv, "--out", tmp_path / "out")[0] == 0
    one, five = (read(tmp_path / "out")["per_object"][f"s_{k}"] for k in (1, 5))
    assert one["J_M"] == pytest.approx((1 / 3 + 1 + 1 + 1) / 4) and one["J&F_ungiven"] == one["J&F_M"]
    assert five["J_M"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert five["J&F_ungiven"] == pytest.approx((five["J&F_M"] * 3 - 1) / 2)
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        assert next(csv.reader(file))[3:] == ["J&F_M", "J_M", "F_M", "J&F_ungiven"]


@pytest.mark.parametrize("place", ["", "Annotations", "Annotations/480p", "Annotations/480p as data"])
def test_a_folder_is_read_in_each_layout(cli, tmp_path, place):
    masks = [square((5, 5 + i), ids=(3,)) for i in range(5)]
    at = tmp_path / "data" / place.removesuffix(" as data")
    put(at / "s", masks)
    if place:
        put(
            tmp_path / "data" / at.relative_to(tmp_path / "data").as_posix().replace("Annotations", "JPEGImages") / "s",
            masks,
            suffix=".jpg",
        )
    data = at if place.endswith("data") else tmp_path / "data"
    argv = ("--dataset", "folder", "--data", data, "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv, "--predictions", at)
    assert code == 0 and read(tmp_path / "out")["overall"]["J&F_M"] == 1, err
    code, _, err = cli(evaluate, *argv, *RANDOM)
    assert (code, "to predict needs the frames" in err) == ((0, False) if place else (1, True)), err


def test_a_folder_of_two_resolutions_asks_which(cli, tmp_path):
    for name in ("480p", "Full-Resolution"):
        put(tmp_path / "data/Annotations" / name / "s", [square((5, 5))] * 3)
    code, _, err = cli(evaluate, "--dataset", "folder", "--data", tmp_path / "data", *RANDOM)
    assert code == 2 and "in each of 480p, Full-Resolution; take one, such as --data " in err


def test_a_folder_of_frames_without_any_mask_is_named_and_the_others_are_run(cli, tmp_path):
    masks = [square((5, 5 + i)) for i in range(4)]
    for name in "bad", "good":
        put(tmp_path / "data/Annotations" / name, masks)
        put(tmp_path / "data/JPEGImages" / name, masks, suffix=".jpg")
    for path in (tmp_path / "data/Annotations/bad").iterdir():
        path.unlink()
    code, _, err = cli(evaluate, "--dataset", "folder", "--data", tmp_path / "data", *RANDOM, "--out", tmp_path / "out")
    assert code == 1 and "error: bad: holds no masks, so there is nothing to propagate" in err, err
    assert list(read(tmp_path / "out")["per_object"]) == ["good_1"]


def test_a_sequence_of_which_nothing_is_scored_may_come_first(cli, tmp_path):
    """The figure so far has nothing to show then."""
    masks = [square((5, 5 + i)) for i in range(4)]
    for name, count in (("a", 1), ("b", 4)):
        put(tmp_path / "data/Annotations" / name, masks[:count])
        put(tmp_path / "data/JPEGImages" / name, masks, suffix=".jpg")
    argv = ("--dataset", "folder", "--data", tmp_path / "data", "--out", tmp_path / "out")
    for flags in (RANDOM, ("--predictions", tmp_path / "data/Annotations")):
        code, _, err = cli(evaluate, *argv, *flags)
        assert code == 0, err
        assert list(read(tmp_path / "out")["per_object"]) == ["b_1"]


def test_objects_that_come_in_later(cli, tmp_path):
    """Nothing is known before frame 1; object 7 is given in frame 3, where 2 keeps its prediction."""
    clean = list(clip.render(8, 64, 96, objects=2, seed=0))
    for t, (frame, mask) in enumerate(clean):
        (tmp_path / "data/JPEGImages/s").mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(tmp_path / f"data/JPEGImages/s/{t + 40:05d}.png")
        mask = np.array([0, 2, 7 if t > 2 else 0], np.uint8)[mask]
        if t in (1, 3, 4, 6):
            put(tmp_path / "data/Annotations/s", [mask], first=t + 40)
    argv = ("--dataset", "folder", "--data", tmp_path / "data", *RANDOM, "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 0, err
    scores = read(tmp_path / "out")
    assert list(scores["per_object"]) == ["s_2", "s_7"]  # frames 3 and 4 are scored
    masks = [read_ids(path) for path in sorted(Path(scores["rows"][0]["predictions"], "s").iterdir())]
    given = [read_ids(tmp_path / f"data/Annotations/s/{t + 40:05d}.png") for t in (1, 3)]
    assert len(masks) == 8 and not masks[0].any() and (masks[1] == given[0]).all()
    assert set(np.unique(masks[2])) == {0, 2}
    assert ((masks[3] == 7) == (given[1] == 7)).all() and (masks[3] == 2).any() and (masks[3] != given[1]).any()
    # as Algorithm 1 has it: frame 3 predicted from what came before, merged, and kept as an annotated frame
    frames = torch.stack([torch.from_numpy(frame) for frame, _ in clean[1:]])
    encoder = evaluate.load_encoder("random", None, evaluate.Args(propagation=SMALL).propagation, "cpu")
    with torch.inference_mode():
        features = [encoder(frame[None])[0] for frame in frames]
    grid = features[0].shape[1:]
    first, later = (evaluate.labels_from_mask(torch.from_numpy(mask), [2, 7], grid) for mask in given)
    named = {2: (later, torch.tensor([False, False, True]))}
    soft = list(evaluate.propagate_video(features[1:], [(features[0], first)], SMALL, given=named))
    for t in (2, 4, 5, 6, 7):
        expected = evaluate.mask_from_labels(soft[t - 2], [2, 7], (64, 96))
        assert (masks[t] == expected.numpy()).all()
    made = scores["rows"][0]["predictions"]
    code, _, err = cli(evaluate, *argv[:4], "--predictions", made, f"{made}/", "--out", tmp_path / "b")
    assert code == 0 and read(tmp_path / "b")["overall"] == scores["overall"], err
    assert len(read(tmp_path / "b")["rows"]) == 1


def test_a_folder_at_its_usual_place(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(Path("data/folder/Annotations/s"), [square((5, 5))] * 3)
    code, out, err = cli(evaluate, "--dataset", "folder", "--predictions", "data/folder/Annotations")
    assert code == 0 and "results/folder/report.html" in out, err
    assert "Folder of masks: Annotations</h1>" in Path("results/folder/report.html").read_text()


def test_real_sequences_of_which_one_object_comes_in_later(shared, imagenet, cli, tmp_path):
    """The annotation of bmx-trees' second object, the bicycle, is taken away up to frame 20."""
    for kind in ("Annotations", "JPEGImages"):
        (tmp_path / "data" / kind / "bmx-trees").mkdir(parents=True)
    for t in range(18, 25):
        frame = shared / f"data/DAVIS/JPEGImages/480p/bmx-trees/{t:05d}.jpg"
        (tmp_path / f"data/JPEGImages/bmx-trees/{t:05d}.jpg").symlink_to(frame)
        mask = read_ids(shared / f"data/DAVIS/Annotations/480p/bmx-trees/{t:05d}.png")
        mask[(mask == 2) & (t < 20)] = 0
        write_mask(tmp_path / f"data/Annotations/bmx-trees/{t:05d}.png", mask)
    argv = ("--dataset", "folder", "--data", tmp_path / "data", "--model", "imagenet", "--weights", imagenet)
    code, _, err = cli(evaluate, *argv, "--size", "240", "--radius", 9, "--out", tmp_path / "out")
    assert code == 0, err
    scores = read(tmp_path / "out")
    bicycle = scores["per_object"]["bmx-trees_2"]
    assert bicycle["J&F_M"] > bicycle["J&F_ungiven"] > 0.1
    masks = {path.stem: read_ids(path) for path in Path(scores["rows"][0]["predictions"], "bmx-trees").iterdir()}
    truth = read_ids(tmp_path / "data/Annotations/bmx-trees/00020.png")
    assert 2 not in masks["00018"] and 2 not in masks["00019"] and 2 in masks["00021"]
    assert ((masks["00020"] == 2) == (truth == 2)).all() and (masks["00020"] != truth).any()


def test_real_sequences_in_a_folder(shared, imagenet, cli, tmp_path):
    """Frame numbers do not begin at 0, and in one sequence they go by twos."""
    data = shared / "data/DAVIS_multi_512"
    argv = ("--dataset", "folder", "--data", data, "--model", "imagenet", "--weights", imagenet, "--size", "192")
    code, _, err = cli(evaluate, *argv, "--radius", 6, "--out", tmp_path / "out")
    assert code == 0 and "note: " not in err.replace("note: " + str(imagenet), ""), err
    scores = read(tmp_path / "out")
    assert list(scores["per_object"]) == [f"{name}_{k}" for name in ("kid-football", "stroller") for k in (1, 2)]
    assert scores["overall"]["J_M"] > 0.5
    made = Path(scores["rows"][0]["predictions"])
    expected = vos_benchmark_of(data / "Annotations/480p", made)
    assert scores["overall"]["J_M"] == pytest.approx(expected, abs=1e-6)


def vos_benchmark_of(truth: Path, preds: Path) -> float:
    """Its mean J, where every object is there in every frame."""
    scores = []
    for folder in sorted(truth.iterdir()):
        pairs = [(read_ids(path), read_ids(preds / folder.name / path.name)) for path in sorted(folder.iterdir())[1:-1]]
        for k in (1, 2):
            scores.append(np.mean([((t == k) & (p == k)).sum() / ((t == k) | (p == k)).sum() for t, p in pairs]))
    return float(np.mean(scores))


# ---------------------------------------------------------------------------------------------------------------------
# VIP


def vip(
    root: Path, variant: str, masks: list[np.ndarray], instances: list[np.ndarray], classes: dict[int, int]
) -> Path:
    """A data set in VIP's layout; two variants are in use. Frames between the annotated ones are there, too."""
    base = root / "VIP_Fine" if variant == "fine" else root
    truth = base / "Annotations" if variant == "fine" else base
    for i, (mask, ids) in enumerate(zip(masks, instances, strict=True)):
        put(truth / "Category_ids/videos1", [mask], first=1 + 25 * i)
        put(truth / "Instance_ids/videos1", [ids], first=1 + 25 * i)
        text = "".join(f"{number} {kind} {1}\n" for number, kind in classes.items())
        (truth / f"Instance_ids/videos1/{1 + 25 * i:05d}.txt").write_text(text)
        put(base / "Images/videos1", [mask, mask], first=1 + 25 * i, suffix=".jpg")
    (base / "lists").mkdir()
    (base / "lists/val_videos.txt").write_text("videos1\n")
    return root


def test_vip_by_hand(cli, tmp_path):
    hat, hair = 1, 2
    one = square((0, 0), (0, 40), ids=(hat, hair))
    data = vip(tmp_path / "data", "flat", [one, one], [square((0, 0), (0, 40), ids=(5, 9))] * 2, {5: hat, 9: hair})
    # the prediction has both in the first frame, the hat shifted by half in the second, and no hair there
    mine = tmp_path / "mine"
    for name, (shift, with_hair) in {"00001": (0, True), "00026": (10, False)}.items():
        corners = [(0, shift), *([(0, 40)] if with_hair else [])]
        (mine / "videos1").mkdir(parents=True, exist_ok=True)
        write_mask(mine / f"videos1/{name}.png", square(*corners))
        (mine / "Instance_ids/videos1").mkdir(parents=True, exist_ok=True)
        write_mask(mine / f"Instance_ids/videos1/{name}.png", square(*corners))
        lines = f"{hat} {0.9 if with_hair else 0.8}\n{hair} 0.7\n"
        (mine / f"Instance_ids/videos1/{name}.txt").write_text(lines)
    code, out, err = cli(evaluate, "--dataset", "vip", "--data", data, "--predictions", mine, "--out", tmp_path / "out")
    assert code == 0, err
    scores = read(tmp_path / "out")
    iou_hat, iou_hair = 600 / 1000, 400 / 800
    # background: truth 8000; predicted 9600 - 1200 = 8400; common = 8000 - 200 (the hat shifted onto it)
    iou_ground = 7800 / (8000 + 8400 - 7800)
    assert scores["overall"]["mIoU"] == pytest.approx(
        (iou_ground + iou_hat + iou_hair) / 3
    )  # absent classes do not count
    assert scores["per_object"]["hat"]["IoU"] == pytest.approx(iou_hat)
    # hat: IoU 1 (score 0.9) and 1/3 (0.8) -> AP 1 up to threshold 0.3, then 1/2; hair: one of two found -> 1/2 always
    assert scores["overall"]["AP^r_vol"] == pytest.approx(np.mean([(1 + 0.5) / 2] * 3 + [(0.5 + 0.5) / 2] * 6))
    assert "hat" in out and "AP^r_vol average precision" in out


def test_average_precision_by_hand():
    present = np.zeros(20, int)
    present[3] = 4
    # by score: hit, miss, hit -> precision 1, 1/2, 2/3, envelope 1, 2/3, 2/3 at recall 1/4, 1/4, 2/4
    parts = np.array([[3, 0.2, 0.95], [3, 0.9, 0.95], [3, 0.5, 0.0], [7, 0.9, 0.9]])
    assert evaluate.average_precision(parts, present) == pytest.approx(1 / 4 + 2 / 3 / 4)
    parts[0, 2] = 0.5  # not above 0.5: a hit for thresholds 0.1 to 0.4 only
    assert evaluate.average_precision(parts, present) == pytest.approx((4 * (1 / 4 + 2 / 3 / 4) + 5 * 1 / 4) / 9)


@pytest.mark.parametrize("variant", ["flat", "fine"])
def test_vip_runs_in_both_layouts(cli, tmp_path, variant):
    """A video that stands still keeps its labels, semantic and instance, at the size of the annotation."""
    mask, ids = square((8, 8), (8, 40), ids=(13, 14), side=32), square((8, 8), (8, 40), ids=(3, 4), side=32)
    data = vip(tmp_path / "data", variant, [mask] * 3, [ids] * 3, {3: 13, 4: 14})
    argv = ("--dataset", "vip", "--data", data, *RANDOM, "--size", "48x64", "--topk", "1")
    code, _, err = cli(evaluate, *argv, "--out", tmp_path / "out")
    assert code == 0, err
    scores = read(tmp_path / "out")
    assert scores["overall"]["mIoU"] > 0.7 and scores["overall"]["AP^r_vol"] > 0.6
    folder = Path(scores["rows"][0]["predictions"])
    assert sorted(p.name for p in (folder / "videos1").iterdir()) == ["00001.png", "00026.png", "00051.png"]
    assert read_ids(folder / "videos1/00051.png").shape == (60, 80)
    text = (folder / "Instance_ids/videos1/00051.txt").read_text().split()
    assert [text[0], text[2]] == ["13", "14"] and 0 < float(text[1]) <= 1
    # the first frame has the given parts, each with score 1, and not what the grid has left of them
    assert (read_ids(folder / "Instance_ids/videos1/00001.png") == square((8, 8), (8, 40), side=32)).all()
    assert (folder / "Instance_ids/videos1/00001.txt").read_text() == "13 1.000000\n14 1.000000\n"
    # what it wrote can be scored as anyone's, with the same numbers
    code, _, err = cli(
        evaluate, "--dataset", "vip", "--data", data, "--predictions", folder, "--out", tmp_path / "again"
    )
    assert code == 0 and read(tmp_path / "again")["overall"] == scores["overall"]


def test_a_video_of_vip_whose_first_frame_has_no_instance(cli, tmp_path):
    mask, ids = square((8, 8), ids=(13,), side=32), square((8, 8), ids=(3,), side=32)
    data = vip(tmp_path / "data", "flat", [mask] * 3, [ids * 0, ids, ids], {3: 13})
    code, _, err = cli(evaluate, "--dataset", "vip", "--data", data, *RANDOM, "--out", tmp_path / "out")
    assert code == 0 and read(tmp_path / "out")["overall"].keys() == {"mIoU"}, err


def test_a_video_of_vip_that_begins_without_a_person_is_background(cli, tmp_path):
    mask, ids = square((8, 8), ids=(13,), side=32), square((8, 8), ids=(3,), side=32)
    data = vip(tmp_path / "data", "flat", [mask * 0, mask, mask], [ids * 0, ids, ids], {3: 13})
    code, _, err = cli(evaluate, "--dataset", "vip", "--data", data, *RANDOM, "--out", tmp_path / "out")
    assert code == 0 and "shows nobody, so all of videos1 is predicted as background" in err, err
    ground = (3 * 4800 - 2 * 1024) / (3 * 4800)
    assert read(tmp_path / "out")["overall"]["mIoU"] == pytest.approx((ground + 0) / 2)


def test_a_video_of_vip_without_masks_is_told(cli, tmp_path):
    mask = square((8, 8), ids=(13,), side=32)
    data = vip(tmp_path / "data", "flat", [mask] * 2, [mask] * 2, {13: 13})
    shutil.copytree(data / "Category_ids", tmp_path / "mine")
    for path in (data / "Category_ids/videos1").iterdir():
        path.unlink()
    argv = ("--dataset", "vip", "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 2 and f"{data}/Category_ids/videos1: holds no masks; the data set is incomplete" in err, err


def public_ap(frames: list[tuple[np.ndarray, dict, np.ndarray, list]]) -> float:
    """AP^r_vol as the public script has it. frames: true ids, their classes, predicted ids 1, 2, ..., their (class,
    score)."""
    aps = []
    for kind in {k for _, classes, *_ in frames for k in classes.values()}:
        for threshold in np.arange(1, 10) / 10:
            found, count = [], 0
            for truth, classes, pred, parts in frames:
                true = [truth == n for n, k in classes.items() if k == kind and (truth == n).any()]
                mine = [(score, pred == i) for i, (k, score) in enumerate(parts, 1) if k == kind]
                count += len(true)
                if all(mask.any() for _, mask in mine):
                    for score, mask in mine:
                        iou = max(((mask & t).sum() / (mask | t).sum() for t in true), default=0)
                        found.append((score, iou > threshold))
            hits = np.array([hit for _, hit in sorted(found, reverse=True)], bool)
            recall = np.concatenate([[0], np.cumsum(hits) / count])
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            aps.append(sum((recall[i + 1] - recall[i]) * precision[i:].max() for i in range(len(hits))))
    return float(np.mean(aps))


def test_vip_leaves_out_a_class_where_a_part_of_it_vanishes(cli, tmp_path):
    """Two hats and a coat; in the second frame one hat is listed and has no pixels."""
    truth, classes = square((0, 0), (0, 40), (30, 0), ids=(5, 9, 7)), {5: 1, 9: 1, 7: 6}
    data = vip(tmp_path / "data", "flat", [truth % 4] * 3, [truth] * 3, classes)
    preds = [square((0, 4), (0, 40), (30, 9)), square((0, 2), (30, 3), ids=(1, 3)), square((0, 9), (0, 47), (33, 0))]
    lists, mine = [[(1, 0.9), (1, 0.5), (6, 0.7)], [(1, 0.8), (1, 0), (6, 0.6)], [(1, 0.3), (1, 0.4), (6, 0.9)]], []
    (tmp_path / "mine/Instance_ids/videos1").mkdir(parents=True)
    for name, pred, parts in zip(("00001", "00026", "00051"), preds, lists, strict=True):
        write_mask(tmp_path / f"mine/videos1/{name}.png", pred % 4)
        write_mask(tmp_path / f"mine/Instance_ids/videos1/{name}.png", pred)
        text = "".join(f"{kind} {score}\n" for kind, score in parts)
        (tmp_path / f"mine/Instance_ids/videos1/{name}.txt").write_text(text)
        mine.append((truth, classes, pred, parts))
    argv = ("--dataset", "vip", "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    ours = read(tmp_path / "out")["overall"]["AP^r_vol"]
    assert code == 0 and ours == pytest.approx(public_ap(mine), abs=1e-12), err
    with_all = [(t, c, p, [k for k in parts if k[1]] if len(parts) == 3 else parts) for t, c, p, parts in mine]
    assert ours < 0.99 * public_ap(with_all[:1] + with_all[2:])


@pytest.mark.parametrize("text", ["3 25 1\n", "999 13 1\n", "3\n"])
@pytest.mark.parametrize("of", ["truth", "prediction"])
def test_a_bad_list_of_vips_parts_is_named_and_the_others_are_run(cli, tmp_path, text, of):
    mask, ids = square((8, 8), ids=(13,), side=32), square((8, 8), ids=(3,), side=32)
    data = vip(tmp_path / "data", "flat", [mask] * 3, [ids] * 3, {3: 13})
    for kind in ("Images", "Category_ids", "Instance_ids"):
        shutil.copytree(data / kind / "videos1", data / kind / "videos2")
    (data / "lists/val_videos.txt").write_text("videos1\nvideos2\n")
    argv = ("--dataset", "vip", "--data", data, *RANDOM, "--out", tmp_path / "out")
    path = data / "Instance_ids/videos1/00051.txt"
    if of == "prediction":
        assert cli(evaluate, *argv)[0] == 0
        path = next((tmp_path / "out/predictions").glob("*/Instance_ids/videos1/00051.txt"))
        text = {"3 25 1\n": "25 0.5\n", "999 13 1\n": "13 0.5\n" * 256}.get(text, text)
    path.write_text(text)
    code, _, err = cli(evaluate, *argv)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert code == 1 and len(lines) == 1 and f"{path}: not found, or not lines of: " in lines[0], err
    assert list(read(tmp_path / "out")["per_sequence"]) == ["videos2"]


# ---------------------------------------------------------------------------------------------------------------------
# JHMDB


def jhmdb(root: Path, joints: dict[str, np.ndarray], pictures: str = "Rename_Images") -> Path:
    """A data set in JHMDB's layout. joints: name -> T x 15 x 2, 0-based."""
    (root / "splits").mkdir(parents=True)
    lines = [f"{name}.avi 2\n" for name in joints] + ["trained_on.avi 1\n"]
    (root / "splits/wave_test_split1.txt").write_text("".join(lines))
    for name, points in joints.items():
        folder = root / "joint_positions/wave" / name
        folder.mkdir(parents=True)
        savemat(folder / "joint_positions.mat", {"pos_img": points.transpose(2, 1, 0) + 1})
        frames = [square((5, 5 + i)) for i in range(len(points))]
        put(root / pictures / "wave" / name, frames, first=1)
    return root


def grid_of_joints(frames: int) -> np.ndarray:
    """15 joints on a 5 x 3 lattice of spacing 10 from (10, 10): box 40 x 20."""
    y, x = np.mgrid[10:31:10, 10:51:10]
    return np.repeat(np.stack([x.ravel(), y.ravel()], 1)[None], frames, 0).astype(float)


def test_pck_by_hand(cli, tmp_path):
    truth = grid_of_joints(3)
    data = jhmdb(tmp_path / "data", {"clip": truth})
    unit = 0.6 * math.hypot(40, 20)
    pred = truth.copy()
    pred[0] += 1000  # the first frame is given, not scored
    pred[1, 0, 0] += 0.15 * unit  # joint 0: right at 0.2, wrong at 0.1, in one of two frames
    pred[1:, 1, 0] += 0.6 * unit  # joint 1: always wrong
    pred[2, 7] = -2  # joint 7, inside the box, is not shown in frame 2: not counted
    folder = tmp_path / "mine/wave/clip"
    folder.mkdir(parents=True)
    savemat(folder / "joint_positions.mat", {"pos_img": pred.transpose(2, 1, 0) + 1})
    code, out, err = cli(
        evaluate, "--dataset", "jhmdb", "--data", data, "--predictions", tmp_path / "mine", "--out", tmp_path / "out"
    )
    assert code == 0, err
    scores = read(tmp_path / "out")
    assert scores["overall"]["PCK@0.1"] == pytest.approx((0.5 + 0 + 13) / 15)
    assert scores["overall"]["PCK@0.2"] == pytest.approx((1 + 0 + 13) / 15)
    assert scores["overall"]["PCK@0.5"] == pytest.approx(14 / 15)
    assert "PCK@a " in out and "PCK@a " in (tmp_path / "out/report.html").read_text()
    assert scores["per_object"]["belly"]["PCK@0.5"] == 0 and scores["per_object"]["neck"]["PCK@0.1"] == 0.5


def test_pck_needs_no_frames(cli, tmp_path):
    data = jhmdb(tmp_path / "data", {"clip": grid_of_joints(3)})
    shutil.rmtree(data / "Rename_Images")
    argv = ("--dataset", "jhmdb", "--data", data, "--predictions", data / "joint_positions", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 0 and read(tmp_path / "out")["overall"]["PCK@0.1"] == 1, err


def test_a_clip_with_a_frame_missing_is_told(cli, tmp_path):
    data = jhmdb(tmp_path / "data", {"bad": grid_of_joints(4), "good": grid_of_joints(4)})
    remove(data / "Rename_Images/wave/bad/00003.png")
    code, _, err = cli(evaluate, "--dataset", "jhmdb", "--data", data, *RANDOM, "--out", tmp_path / "out")
    assert code == 1 and err.count("error: ") == 1, err
    assert "Rename_Images/wave/bad: holds 3 frames, yet" in err and "has the joints of 4; download" in err
    argv = ("--predictions", data / "joint_positions", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, "--dataset", "jhmdb", "--data", data, *argv)
    assert code == 0 and read(tmp_path / "out")["overall"]["PCK@0.1"] == 1, err


def test_a_clip_of_one_frame_has_nothing_to_score(cli, tmp_path):
    data = jhmdb(tmp_path / "data", {"clip": grid_of_joints(1)})
    argv = ("--dataset", "jhmdb", "--data", data, "--predictions", data / "joint_positions", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 1 and "wave/clip: has joints in 1 frame; the first is given, so none is scored" in err, err


def test_pck_scale_is_the_box_of_the_joints_shown(tmp_path):
    truth, pred = grid_of_joints(2), grid_of_joints(2)
    pred[1, :5] = -5  # the row at y = 10 is lost: the box is 40 x 10
    pred[1, 10, 1] += 1
    for name, points in (("truth", truth), ("mine", pred)):
        (tmp_path / name / "c").mkdir(parents=True)
        savemat(tmp_path / name / "c/joint_positions.mat", {"pos_img": points.transpose(2, 1, 0) + 1})
    seq = evaluate.JHMDB("c", tmp_path, ("1", "2"), {"1": tmp_path / "truth/c/joint_positions.mat"})
    distance = seq.score(tmp_path / "mine", None, False)["distance"]
    assert distance[10, 0] == pytest.approx(1 / (0.6 * math.hypot(40, 10)))
    assert np.isnan(distance[:5]).all() and (distance[11:] == 0).all()


@pytest.mark.parametrize("pictures", ["Rename_Images", "Frames"])
def test_jhmdb_runs_in_both_layouts_past_a_broken_mat(cli, tmp_path, pictures):
    data = jhmdb(tmp_path / "data", {"bad": grid_of_joints(3), "good": grid_of_joints(3)}, pictures)
    mat = data / "joint_positions/wave/bad/joint_positions.mat"
    mat.write_bytes(b"not a mat file")
    argv = ("--dataset", "jhmdb", "--data", data, *RANDOM, "--size", "48x64", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 1 and str(mat) in err and err.count("error: ") == 1
    scores = read(tmp_path / "out")
    assert list(scores["per_sequence"]) == ["wave/good"] and scores["overall"]["PCK@0.5"] > 0.5
    made = Path(scores["rows"][0]["predictions"]) / "wave/good/joint_positions.mat"
    assert loadmat(made)["pos_img"].shape == (2, 15, 3)


def test_jhmdb_on_a_real_clip(shared, imagenet, cli, tmp_path):
    """Joints that are propagated are far better than joints that stay where they were in the first frame."""
    name = "catch/Goal_Keeping_Tips_catch_f_cm_np1_fr_med_2"
    argv = ("--dataset", "jhmdb", "--data", shared / "data/JHMDB", "--split", 3, "--sequences", name)
    small = ("--size", "120x160", "--context", 2, "--radius", 6)
    code, _, err = cli(evaluate, *argv, "--weights", imagenet, *small, "--out", tmp_path / "out")
    assert code == 0, err
    truth = evaluate.read_joints(shared / "data/JHMDB/joint_positions" / name / "joint_positions.mat")
    still = np.repeat(truth[:1], len(truth), 0)
    (tmp_path / "still" / name).mkdir(parents=True)
    savemat(tmp_path / "still" / name / "joint_positions.mat", {"pos_img": still.transpose(2, 1, 0) + 1})
    code, _, err = cli(evaluate, *argv, "--predictions", tmp_path / "still", "--out", tmp_path / "out2")
    assert code == 0, err
    ours, theirs = read(tmp_path / "out")["overall"], read(tmp_path / "out2")["overall"]
    assert all(ours[c] > theirs[c] for c in evaluate.JHMDB.columns)
    assert ours["PCK@0.5"] > 0.5 > 5 * theirs["PCK@0.5"]


# ---------------------------------------------------------------------------------------------------------------------
# Running, sweeps, tables


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two short sequences of drawn objects, 96 x 64, in DAVIS's layout."""
    root = tmp_path_factory.mktemp("davis")
    for seed, name in enumerate(("first", "second")):
        for t, (frame, mask) in enumerate(clip.render(6, 64, 96, objects=2, seed=seed)):
            for kind in ("JPEGImages", "Annotations"):
                (root / kind / "480p" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", quality=95)
            write_mask(root / f"Annotations/480p/{name}/{t:05d}.png", mask)
    for year in ("2016", "2017"):
        (root / "ImageSets" / year).mkdir(parents=True)
        for subset in ("val", "test-dev"):
            (root / "ImageSets" / year / f"{subset}.txt").write_text("first\nsecond\n")
    return root


def command(*argv) -> list[str]:
    return [sys.executable, str(ROOT / "evaluate.py"), *map(str, argv)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The results of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command("--data", data, *RANDOM, "--out", out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "frame/s" in done.stderr and "J&F=" in done.stderr  # the progress bar
    assert "the paper" not in done.stdout  # it has no row for this model
    return out


def test_a_run_writes_masks_scores_and_a_report(whole, data):
    scores = read(whole)
    assert scores["overall"]["J&F_M"] > 0.3
    assert list(scores["per_object"]) == ["first_1", "first_2", "second_1", "second_2"]
    assert scores["rows"][0]["settings"]["size"] == "64" and scores["rows"][0]["model"] == "random"
    folder = Path(scores["rows"][0]["predictions"])
    assert sorted(p.name for p in folder.iterdir()) == ["first", "second", "settings.json"]
    for name in ("first", "second"):
        assert sorted(p.name for p in (folder / name).iterdir()) == [f"{t:05d}.png" for t in range(6)]
        first = read_ids(data / f"Annotations/480p/{name}/00000.png")
        assert (read_ids(folder / name / "00000.png") == first).all()
    report = (whole / "report.html").read_text()
    assert not re.search(r"(src|href)=.?(?!.?data:)[\w./]", report)  # all of it is in the one file
    for word in ("Best: ", "Worst: ", "J and F over time", "Settings", "radius"):
        assert word in report


def test_many_sequences_take_no_longer_each(tmp_path, cli, monkeypatch):
    """The bar's figure is not summed up anew for each, nor is each one drawn."""
    summed, drawn, summarize = [], [], evaluate.summarize

    def slow(dataset: str, results: dict) -> dict:
        time.sleep(0.05)
        summed.append(len(results))
        return summarize(dataset, results)

    monkeypatch.setattr(evaluate, "summarize", slow)
    monkeypatch.setattr(evaluate, "draw_time", lambda results: drawn.extend(results) or "")
    for i in range(70):
        put(tmp_path / f"truth/{i:02}", [square((4, 4), size=(24, 24), side=10)] * 3)
        put(tmp_path / f"mine/{i:02}", [square((4, 4), size=(24, 24), side=10 if i < 10 else 8)] * 3)
    argv = ("--data", tmp_path / "truth", "--predictions", tmp_path / "mine", "--out", tmp_path / "out")
    assert cli(evaluate, "--dataset", "folder", *argv)[0] == 0
    assert summed[0] == 1 and len(summed) < 35
    assert drawn == [f"{i:02}" for i in range(10, 70)]
    assert "the 60 worst of 70 sequences" in (tmp_path / "out/report.html").read_text()


def test_a_killed_run_goes_on_after_the_last_whole_sequence(whole, data, tmp_path):
    argv = command("--data", data, *RANDOM, "--out", tmp_path)
    run = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not list(tmp_path.glob("predictions/*/first")):
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    (folder,) = tmp_path.glob("predictions/*")
    first = folder / "first/00003.png"
    before = first.stat().st_mtime_ns
    (folder / ".partial/second").mkdir(parents=True, exist_ok=True)  # as after a kill in the second sequence
    (folder / ".partial/second/00001.png").write_bytes(b"half")
    again = subprocess.run(argv, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert first.stat().st_mtime_ns == before and not (folder / ".partial").exists()
    assert read(tmp_path)["per_object"] == read(whole)["per_object"]


def test_other_settings_never_take_old_masks(cli, data, tmp_path):
    for argv in ((), ("--topk", 1), ("--dtype", "bfloat16")):
        code, _, err = cli(evaluate, "--data", data, "--sequences", "first", *RANDOM, *argv, "--out", tmp_path)
        assert code == 0, err
    assert len(list(tmp_path.glob("predictions/*/first"))) == 3


@pytest.mark.parametrize("change", ["annotation", "frame", "fewer"])
def test_what_was_made_from_something_else_is_made_again(cli, data, tmp_path, change):
    root = shutil.copytree(data, tmp_path / "data")
    argv = ("--data", root, *RANDOM)
    assert cli(evaluate, *argv, "--out", tmp_path / "out")[0] == 0
    first, other = (root / kind / "480p/first" for kind in ("Annotations", "JPEGImages"))
    if change == "annotation":
        write_mask(first / "00000.png", read_ids(first / "00000.png")[:, ::-1].copy())
    elif change == "frame":
        Image.open(other / "00003.jpg").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / "00002.jpg")
    else:
        remove(other / "00005.jpg"), remove(first / "00005.png")
    second = next((tmp_path / "out").glob("predictions/*/second/00001.png"))
    before = second.stat().st_mtime_ns
    code, _, err = cli(evaluate, *argv, "--out", tmp_path / "out")
    assert code == 0 and "first: is made again, its annotation or its frames have changed" in err, err
    assert cli(evaluate, *argv, "--out", tmp_path / "fresh")[0] == 0
    assert read(tmp_path / "out")["per_object"] == read(tmp_path / "fresh")["per_object"]
    assert second.stat().st_mtime_ns == before  # the other sequence is left as it is


def test_a_sequence_is_looked_at_once_however_many_rows(data, tmp_path, monkeypatch):
    sequences, _ = evaluate.read_dataset(evaluate.Args(), data)
    files, seen = evaluate.files, []
    monkeypatch.setattr(evaluate, "files", lambda folder, suffixes: seen.append(folder) or files(folder, suffixes))
    for k in 1, 2, 3:
        row = evaluate.Row(f"topk={k}", tmp_path / str(k), settings=replace(SMALL, topk=k))
        evaluate.forget_stale(row, sequences)
        assert json.loads((row.folder / "settings.json").read_text())["made_from"].keys() == {"first", "second"}
    assert seen == [seq.frames for seq in sequences]


def test_half_a_sequence_is_made_again(cli, data, whole, tmp_path):
    shutil.copytree(whole / "predictions", tmp_path / "predictions")
    (folder,) = tmp_path.glob("predictions/*")
    remove(folder / "second/00004.png")
    code, _, err = cli(evaluate, "--data", data, *RANDOM, "--out", tmp_path)
    assert code == 0, err
    assert read(tmp_path)["per_object"] == read(whole)["per_object"]


def test_several_folders_are_rows_of_one_table(cli, data, whole, tmp_path):
    (folder,) = whole.glob("predictions/*")
    code, out, err = cli(
        evaluate, "--data", data, "--predictions", folder, data / "Annotations/480p", "--out", tmp_path
    )
    assert code == 0, err
    assert re.search(rf"^{folder.name} +\d\d\.\d", out, re.M) and re.search(
        r"^480p +100\.0 +100\.0 +100\.0 +0\.0", out, re.M
    )
    rows = read(tmp_path)["rows"]
    assert [row["name"] for row in rows] == [folder.name, "480p"]
    assert rows[0]["overall"] == read(whole)["overall"] and rows[1]["overall"]["J&F_M"] == 1
    for name in ("first", "second"):  # as propagate.py writes them
        shutil.copytree(folder / name, tmp_path / "results" / name / "masks")
    argv = ["--data", data, "--predictions", tmp_path / "results", "--out", tmp_path]
    code, _, err = cli(evaluate, *argv)
    assert code == 0, err
    assert read(tmp_path)["overall"] == read(whole)["overall"]


def test_the_folder_of_a_run_is_told_which_of_its_folders_are_predictions(cli, data, whole, tmp_path):
    (folder,) = whole.glob("predictions/*")
    code, out, err = cli(evaluate, "--data", data, "--predictions", folder, whole, "--out", tmp_path / "out")
    assert code == 2 and not out and not (tmp_path / "out").exists()
    assert err == f"error: {whole}: holds none of the sequences; --predictions takes {folder}\n"


def test_test_dev_is_predicted_and_not_scored(cli, data, tmp_path):
    code, out, err = cli(evaluate, "--data", data, "--subset", "test-dev", *RANDOM, "--out", tmp_path)
    assert code == 0 and "not scored" in out, err
    assert len(list(tmp_path.glob("predictions/*/*/*.png"))) == 12 and not (tmp_path / "scores.json").exists()


def test_a_sweep_computes_features_once_and_changes_nothing(cli, data, whole, tmp_path, monkeypatch):
    frames, alive, most = [], weakref.WeakSet(), 0

    def counted(*args, load=evaluate.load_encoder, **kwargs):
        encoder = load(*args, **kwargs)

        def forward(batch, inner=encoder.forward):
            nonlocal most
            frames.append(len(batch))
            features = inner(batch)
            alive.add(features)
            most = max(most, len(alive))
            return features

        encoder.forward = forward
        return encoder

    monkeypatch.setattr(evaluate, "load_encoder", counted)
    argv = ("--sweep", "topk=1,5,10", "--sweep", "temperature=0.05,1")
    code, _, err = cli(evaluate, "--data", data, *RANDOM, *argv, "--out", tmp_path)
    assert code == 0, err
    assert sum(frames) == 12  # two sequences of 6 frames, once for all 4 settings
    assert most <= 3  # features of the first frame, this one and the next: memory does not grow with the video
    rows = {(row["settings"]["topk"], row["settings"]["temperature"]): row for row in read(tmp_path)["rows"]}
    assert sorted(rows) == [(1, 0.05), (5, 0.05), (10, 0.05), (10, 1.0)]  # one factor at a time
    assert rows[10, 0.05]["per_object"] == read(whole)["per_object"]
    assert "<h2>Sweep</h2>" in (tmp_path / "report.html").read_text()
    frames.clear()
    code, *_ = cli(evaluate, "--data", data, *RANDOM, *argv, "--grid", "--out", tmp_path)
    assert code == 0 and len(read(tmp_path)["rows"]) == 6
    assert sum(frames) == 12  # for the two settings that were not there yet


def test_refine_changes_masks_when_asked(cli, data, whole, tmp_path):
    for argv, values in ((("--refine", 0.35), [0.35]), (("--sweep", "refine=0,0.2,0.35"), [0, 0.2, 0.35])):
        code, _, err = cli(evaluate, "--data", data, *RANDOM, *argv, "--out", tmp_path)
        rows = read(tmp_path)["rows"]
        assert code == 0 and [row["settings"]["refine"] for row in rows] == values, err
        masks = [read_ids(Path(row["predictions"], "first/00003.png")).tobytes() for row in rows]
        assert len(set(masks)) == len(values)
    assert rows[0]["per_object"] == read(whole)["per_object"]  # without the flag it is off
    assert "<h2>Sweep</h2>" in (tmp_path / "report.html").read_text()


def test_refine_where_it_has_no_say(cli, tmp_path):
    clips = jhmdb(tmp_path / "jhmdb", {"clip": grid_of_joints(3)})
    for argv in ("--refine", 0.35), ("--sweep", "refine=0,0.35"):
        argv = ("--dataset", "jhmdb", "--data", clips, *RANDOM, *argv, "--out", tmp_path / "out")
        code, _, err = cli(evaluate, *argv)
        assert code == 2 and err == "error: --refine: is for the edges of masks, JHMDB has key points; leave it out\n"
    mask, ids = square((8, 8), (8, 40), ids=(13, 14), side=32), square((8, 8), (8, 40), ids=(3, 4), side=32)
    data = vip(tmp_path / "vip", "flat", [mask] * 3, [ids] * 3, {3: 13, 4: 14})
    argv = ("--dataset", "vip", "--data", data, *RANDOM, "--sweep", "refine=0,0.35", "--out", tmp_path / "out")
    code, _, err = cli(evaluate, *argv)
    assert code == 0 and err.count("note: --refine: changes VIP's classes alone, so mIoU") == 1, err
    plain, refined = (row["overall"] for row in read(tmp_path / "out")["rows"])
    assert plain["mIoU"] != refined["mIoU"] and plain["AP^r_vol"] == refined["AP^r_vol"]


def test_the_papers_rows_never_refine(data, imagenet, cli, tmp_path, monkeypatch):
    argv = ("--data", data, "--weights", imagenet, "--paper", "table4", "--size", "64", "--sequences", "first")
    code, _, err = cli(evaluate, *argv, "--refine", 0.35, "--out", tmp_path)
    assert code == 2 and err.startswith("error: --refine: has no say in --paper") and len(err.splitlines()) == 1
    imagenet_rows = common.importlib.import_module("systems.imagenet").SYSTEMS
    row = imagenet_rows["imagenet"]
    monkeypatch.setitem(imagenet_rows, "imagenet", replace(row, settings=replace(row.settings, refine=0.35)))
    code, _, err = cli(evaluate, *argv, "--out", tmp_path)  # nor where it is the default
    ran = [row["settings"]["refine"] for row in read(tmp_path)["rows"] if not row["lacks"]]
    assert code == 0 and ran and not any(ran), err


def test_curves_join_rows_that_differ_in_one_number():
    row = lambda name, **factors: evaluate.Row(name, model="m", settings=evaluate.Propagation(**factors))  # noqa: E731
    rows = [
        row("a", topk=1),
        row("b", topk=5),
        row("c", topk=5, temperature=1.0),
        row("d", topk=1, aggregation="per-frame"),
    ]
    rows += [row("e", topk=5, aggregation="per-frame")]
    scores = {r.name: {"overall": {"J&F_M": i / 10}} for i, r in enumerate(rows)}
    curves = evaluate.sweep_curves(rows, scores, "J&F_M")
    lines = {dict(key[1])["aggregation"]: points for key, points in curves["topk"].items()}
    assert lines == {"overall": [(1, 0), (5, 10)], "per-frame": [(1, 30), (5, 40)]}
    assert list(curves["temperature"].values()) == [[(0.05, 10), (1.0, 20)]]


def test_a_table_of_the_paper(data, imagenet, cli, tmp_path):
    argv = ("--data", data, "--weights", imagenet, "--paper", "table4", "--size", "64", "--sequences", "first")
    code, out, err = cli(evaluate, *argv, "--out", tmp_path)
    assert code == 0, err
    line = re.search(r"^\(c\) ImageNet, fixed region, overall +65.1 +(\S+) +(\S+)$", out, re.M)
    assert float(line[2]) == pytest.approx(float(line[1]) - 65.1, abs=0.06)
    assert re.search(r"^\(d\) UVC, none, per-frame +59.4 +- +-$", out, re.M)
    assert re.search(r"^\(c\) ImageNet, track, per-frame +59.3 +[\d.]+ ", out, re.M)
    for text in (out, (tmp_path / "report.html").read_text()):
        assert "not comparable with the paper: 1, not 30 sequences, size=64" in text
    rows = {row["name"]: row for row in read(tmp_path)["rows"]}
    assert len(rows) == 25 and rows["(c) ImageNet, none, per-frame"]["paper"] == {"J&F_M": 56.4}
    settings = rows["(c) ImageNet, none, per-frame"]["settings"]
    assert (settings["topk"], settings["context"], settings["temperature"], settings["size"]) == (5, 7, 0.025, "64")
    assert rows["(e) CRW, none, overall"]["lacks"]


def test_table_5_takes_a_file_of_weights_for_each_training(data, imagenet, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    shutil.copy(imagenet, "weights/uvc+moco.pth")
    argv = ("--data", data, "--paper", "table5", "--size", "64", "--layer", "res3", "--sequences", "first")
    code, out, err = cli(evaluate, *argv, "--out", tmp_path)
    assert code == 0, err
    assert re.search(r"^UVC\+ MoCo, Kinetics +61.0 +\d", out, re.M)
    assert (
        "UVC+ ImageNet, Kinetics+ImageNet: needs weights of uvc+imagenet.pth (train_uvc_plus.py makes it) in weights/"
        in out
    )
    rows = {row["name"]: row for row in read(tmp_path)["rows"]}
    assert len(rows) == 8 and [row["model"] for row in rows.values() if not row["lacks"]] == ["uvc+"]
    assert rows["UVC+ MoCo, Kinetics"]["weights"] == "weights/uvc+moco.pth"


def test_a_model_that_a_table_has_no_row_of_is_told(data, imagenet, cli, tmp_path):
    for flags, flag, model in (
        (("--model", "vfs"), "model", "vfs"),
        (("--model", "torchvision:resnet18", "--weights", imagenet), "model", "torchvision:resnet18"),
        (("--weights", Path(evaluate.__file__).with_name("weights") / "default.pth"), "weights", "default"),
    ):
        argv = ("--data", data, "--paper", "table2", *flags, "--out", tmp_path / "out")
        code, out, err = cli(evaluate, *argv)
        why = f"it has no row of {model}, but of deepcluster, imagenet; leave it out"
        assert code == 2 and err == f"error: --{flag}: has no say in --paper table2, {why}\n" and not out
    code, _, err = cli(evaluate, "--data", data, "--paper", "table2", "--model", "imagenet", "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: --model: has no say in --paper table2, its rows name theirs")
    assert not (tmp_path / "out").exists()


def test_the_weights_that_are_given_come_before_those_that_are_found(imagenet, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "find_weights", lambda *_: tmp_path / "fine-tuned.pth")
    models = ["imagenet-finetuned", "imagenet"]
    args = evaluate.Args(model="imagenet")
    assert evaluate.paper_settings(args, models, [])[0] == "imagenet-finetuned"
    assert evaluate.paper_settings(replace(args, weights=imagenet), models, [])[0] == "imagenet"


def test_a_table_without_weights_lists_the_files_it_looks_for(data, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "find_weights", lambda *_: None)
    code, out, err = cli(evaluate, "--data", data, "--paper", "table6", "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and len(err) < 120 and "--paper table6: no row can run" in err
    assert len(out.splitlines()) == 9 and not (tmp_path / "out").exists()  # a line a model
    assert re.search(
        r"^not run: \(a\) CRW; \(b\) CRW; .*: needs weights of crw .* in weights/, named crw.pth$", out, re.M
    )
    assert "in weights/, named imagenet-finetuned.pth or imagenet.pth\n" in out


def test_a_file_of_weights_is_explained_once_and_only_if_it_was_given(data, imagenet, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    for path in (Path("weights/imagenet.pth"), Path("given.pth")):
        shutil.copy(imagenet, path)
    argv = ("--data", data, *RANDOM[2:], "--sequences", "first", "--model", "imagenet", "--out", tmp_path)
    code, _, err = cli(evaluate, *argv)
    assert code == 0 and "note: " not in err, err
    code, _, err = cli(evaluate, *argv, "--weights", "given.pth", "--topk", "1")
    assert code == 0 and err.count("note: ") == 1 and err.startswith("note: given.pth: "), err  # before the bar


def test_the_uvc_of_table_4_is_not_the_released_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    (line,) = [line for line in evaluate.read_paper("davis") if line["row"] == "(d) UVC, track, per-frame"]
    for name, model in (("uvc.pth", "uvc"), ("uvc-ours.pth", "uvc@uvc-ours.pth")):  # the retrained one goes before it
        Path("weights", name).touch()
        assert evaluate.paper_settings(evaluate.Args(), line["models"], line["settings"])[0] == model
    row = evaluate.Row("uvc", model="uvc", settings=evaluate.preset("uvc"))
    assert evaluate.paper_best(evaluate.Args(), row).paper["J&F_M"] == 59.5  # Table 6; 60.8 is the retrained one's
    assert "57.8" in evaluate.NOTE


def test_a_plain_run_stands_beside_the_paper(data, imagenet, cli, tmp_path, monkeypatch):
    code, out, err = cli(evaluate, "--data", data, "--weights", imagenet, *RANDOM[2:], "--out", tmp_path)
    assert code == 0, err
    assert re.search(r"^the paper, whole data set +65.8 +63.5 +75.5 +- +68.1 +80.6 +-$", out, re.M)
    difference = float(re.search(r"^difference +(\S+)", out, re.M)[1])
    assert difference == pytest.approx(100 * read(tmp_path)["overall"]["J&F_M"] - 65.8, abs=0.06)
    assert "not comparable with the paper: 2, not 30 sequences, size=64, context=3, radius=4\n" in out
    monkeypatch.setattr(evaluate.Sequence, "whole", 2)  # as if this were all of DAVIS val, and these the settings
    monkeypatch.setitem(
        common.importlib.import_module("systems.imagenet").SYSTEMS,
        "imagenet",
        replace(find_system("imagenet"), settings=SMALL),
    )
    for more, says in ((), False), (("--upsample", 2), False), (("--topk", 1), True):  # Table 6c has the finer grid
        _, out, _ = cli(evaluate, "--data", data, "--weights", imagenet, *more, "--out", tmp_path)
        assert "the paper, whole" in out and ("not comparable with the paper: topk=1\n" in out) == says
        assert ("not comparable" in out) == says


def test_the_papers_figures_are_its_own():
    """Spot checks of paper.csv, and every row is well formed."""
    with evaluate.PAPER.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert all(None not in line and None not in line.values() for line in lines)
    values = {
        (line["table"], line["row"]): {
            k: float(v) for k, v in line.items() if (v and k[0].isupper()) or (k == "mIoU" and v)
        }
        for line in lines
    }
    assert values["table6", "(b) CRW"] == {"J&F_M": 67.5, "J_M": 64.8, "J_O": 76.1, "F_M": 70.2, "F_O": 82.1}
    assert values["table1", "UVC 480xfull"] == {"J_M": 56.3, "J_O": 64.9, "F_M": 59.2, "F_O": 64.0}
    assert values["table5", "UVC+ Rotation, Kinetics+ImageNet"]["J&F_M"] == 62.3
    assert values["table7", "(a) UVC+"] == {"mIoU": 38.3, "AP^r_vol": 22.2}
    assert values["table8", "VFS"] == {"PCK@0.1": 60.5, "PCK@0.2": 79.5}
    for name, scores in values.items():
        if "J&F_M" in scores and "J_M" in scores:  # printed figures are rounded to a tenth
            assert scores["J&F_M"] == pytest.approx((scores["J_M"] + scores["F_M"]) / 2, abs=0.11), name


def test_every_row_of_the_paper_says_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "weights_of", lambda args, model: tmp_path / model)
    settings = {}
    for dataset in evaluate.DATASETS:
        for line in evaluate.read_paper(dataset):
            if line["models"] != ["-"]:
                row = line["table"], line["row"]
                settings[row] = evaluate.paper_settings(
                    evaluate.Args(dataset=dataset), line["models"], line["settings"]
                )
    assert not any(s.refine for _, s in settings.values())
    with pytest.raises(evaluate.UserError, match="quoted in the paper from another one"):
        evaluate.paper_settings(evaluate.Args(), ["-"], [])
    model, s = settings["table4", "(c) ImageNet, none, per-frame"]
    assert (model, s.topk, s.context, s.temperature, s.minmax) == ("imagenet-finetuned", 5, 7, 0.025, True)
    model, s = settings["table6", "(b) CRW"]
    assert (model, s.topk, s.context, s.temperature, s.exempt_first) == ("crw", 10, 20, 0.05, True)
    model, s = settings["table8", "UVC"]
    assert (model, s.size, s.localization, s.minmax, s.pad) == ("uvc", "240x240", "none", True, True)
    temperatures = {
        row: s.temperature for (table, row), (_, s) in settings.items() if table == "figure4"
    }  # its caption
    assert {row for row, t in temperatures.items() if t == 1} == {
        *(f"{model}, overall" for model in ("rotation", "moco-r18", "imagenet", "uvc")),
        "uvc, per-frame",
    }
    assert temperatures["crw, overall"] == 1 / 20 and temperatures["crw, per-frame"] == 1 / 50


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory) -> tuple[Path, str]:
    """What torchrun of two processes writes, beside it a file of each with its threads and workers; what it prints."""
    folder = tmp_path_factory.mktemp("two")
    watch = folder / "watch.py"
    watch.write_text(
        "import cv2, evaluate, json, os, pathlib, propagate, torch\n"
        "score, predict, file = evaluate.Sequence.score, evaluate.predict, f\"rank{os.environ['RANK']}.json\"\n"
        "def threads(_=None):\n"
        "    return [torch.get_num_threads(), cv2.getNumThreads()]\n"
        "def scoring(seq, folder, pool, *more):\n"
        "    said = [threads(), *pool.map(threads, range(9))], [pool._processes, propagate.pool().workers]\n"
        "    pathlib.Path(file).write_text(json.dumps(said))\n"
        "    return score(seq, folder, pool, *more)\n"
        "def predicting(*args):\n"
        "    assert [threads(), *propagate.pool().map(threads, range(9))] == [[1, 1]] * 10\n"
        "    return predict(*args)\n"
        "evaluate.Sequence.score, evaluate.predict = scoring, predicting\n"
        "evaluate.common.run(evaluate.main, evaluate.parse_args)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*torchrun, "watch.py", "--data", data, *RANDOM, "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_processes_give_the_scores_of_one(whole, two_processes):
    folder, said = two_processes
    assert said.count("J&F_M") == 1  # one table
    ours, theirs = read(folder / "out"), read(whole)
    assert ours["per_object"] == theirs["per_object"] and ours["overall"] == theirs["overall"]


def test_two_processes_share_the_cpus(two_processes):
    """Each has half of them for its pool and for scoring, and one thread a task, whichever library it calls."""
    share = max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else 1
    for rank in range(2):
        threads, workers = json.loads((two_processes[0] / f"rank{rank}.json").read_text())
        assert threads == [[1, 1]] * 10 and max(workers) <= share and workers[0] == workers[1]


def test_the_report_is_written_before_any_process_leaves(data, tmp_path):
    """torchrun ends all processes when one leaves with an exit code; the one that writes the report is the last."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/ImageSets/2017/val.txt").write_text("first\nnowhere\nsecond\n")
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import evaluate, os, pathlib, time\n"
        "write, report = evaluate.write_report, pathlib.Path('out/report.html')\n"
        "evaluate.write_report = lambda *args: time.sleep(1) or write(*args)\n"
        "try:\n"
        "    evaluate.common.run(evaluate.main, evaluate.parse_args)\n"
        "finally:\n"
        "    pathlib.Path('left' + os.environ['RANK']).write_text(str(report.exists()))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*torchrun, "slow.py", "--data", "data", *RANDOM, "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and (tmp_path / "left1").read_text() == "True", done.stderr
    assert "(1 of 3 sequences are missing)" in done.stderr and len(read(tmp_path / "out")["per_sequence"]) == 2


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_takes_its_own_gpu(data, cli, tmp_path, monkeypatch, device):
    def load(*args):
        raise evaluate.UserError(f"asked for {args[3]}")

    monkeypatch.setattr(evaluate, "fits", lambda *_: None)
    monkeypatch.setattr(evaluate, "load_encoder", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    code, _, err = cli(evaluate, "--data", data, *RANDOM, "--device", device, "--out", tmp_path)
    assert code == 2 and "asked for cuda:3" in err


def test_a_score_within_training_has_all_cores(tmp_path, monkeypatch):
    """torchrun's variables of the training process would make it a process of several."""
    seen = {}

    def run(command, env, **_):
        seen.update(env)
        return subprocess.CompletedProcess(command, 1, "", "")

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setattr(train_finetune.subprocess, "run", run)
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder / "480p" / "first").mkdir(parents=True)
    args = SimpleNamespace(validate=tmp_path, validate_sequences="first", out=tmp_path, device="cpu")
    assert train_finetune.validate(args, []) == {}
    assert "PATH" in seen and not [name for name in seen if name.endswith(("RANK", "WORLD_SIZE"))]


def test_processes_that_fetch_the_same_weights_do_not_meet(tmp_path, monkeypatch):
    both = multiprocessing.get_context("fork").Barrier(2)

    def download(link, path):
        Path(path).write_bytes(b"weights")
        both.wait(20)

    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(systems.torchvision.fetch_weights, ["deepcluster"] * 2, chunksize=1)  # its link names no hash
    assert found == [tmp_path / "checkpoints/deepcluster.pth"] * 2 and found[0].read_bytes() == b"weights"
    assert list(found[0].parent.iterdir()) == found[:1]
