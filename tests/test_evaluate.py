"""evaluate.py: scores with known answers, the three data sets' layouts, running, sweeps, tables, and bad input."""

import csv
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
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

import clip
import common
import evaluate
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
    assert str(tmp_path / "nowhere") in err and evaluate.PAGES[dataset] in err


@pytest.mark.parametrize("paper, name", [("table7", "VIP"), ("figure5", "VIP"), ("table8", "JHMDB")])
def test_a_table_of_another_data_set_says_which_it_wants(cli, tmp_path, paper, name):
    data = davis(tmp_path / "data", {"a": [square((5, 5))] * 3})
    code, _, err = cli(evaluate, "--data", data, "--paper", paper, "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{paper} is of {name}, see {evaluate.PAGES[name.lower()]}" in err


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


def test_help_says_what_a_reader_of_the_paper_needs(capsys):
    with pytest.raises(SystemExit):
        common.parse(evaluate.Args, ["--help"])
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


@pytest.mark.parametrize("flag", [("--no-l2",), ("--topk", "3"), ("--model", "crw"), ("--dtype", "bfloat16")])
def test_what_has_no_say_in_predictions_is_told(cli, tmp_path, flag):
    data = davis(tmp_path / "data", {"s": [square((5, 5))] * 3})
    code, _, err = cli(evaluate, "--data", data, "--predictions", data / "Annotations/480p", *flag)
    says = "has no say in --predictions, which are only scored; leave it out"
    assert code == 2 and err == f"error: {flag[0].replace('no-', '')}: {says}\n"


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


def test_pck_scale_is_the_box_of_the_joints_shown(tmp_path):
    truth, pred = grid_of_joints(2), grid_of_joints(2)
    pred[1, :5] = -5  # the row at y = 10 is lost: the box is 40 x 10
    pred[1, 10, 1] += 1
    for name, points in (("truth", truth), ("mine", pred)):
        (tmp_path / name / "c").mkdir(parents=True)
        savemat(tmp_path / name / "c/joint_positions.mat", {"pos_img": points.transpose(2, 1, 0) + 1})
    seq = evaluate.Sequence("jhmdb", "c", tmp_path, ("1", "2"), {"1": tmp_path / "truth/c/joint_positions.mat"})
    distance = evaluate.score_jhmdb(seq, tmp_path / "mine")["distance"]
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
    assert all(ours[c] > theirs[c] for c in evaluate.PCK_COLUMNS)
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
    monkeypatch.setitem(evaluate.WHOLE, "davis", 2)  # as if this were all of DAVIS val, and these the settings
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
    monkeypatch.setattr(evaluate, "weights_of", lambda args, model, fetch=True: tmp_path / model)
    settings = {}
    for dataset in evaluate.COLUMNS:
        for line in evaluate.read_paper(dataset):
            if line["models"] != ["-"]:
                row = line["table"], line["row"]
                settings[row] = evaluate.paper_settings(
                    evaluate.Args(dataset=dataset), line["models"], line["settings"]
                )
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


def test_two_processes_give_the_scores_of_one(whole, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*torchrun, *command("--data", data, *RANDOM, "--out", tmp_path)[1:]]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("J&F_M") == 1  # one table
    ours, theirs = read(tmp_path), read(whole)
    assert ours["per_object"] == theirs["per_object"] and ours["overall"] == theirs["overall"]


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
        found = pool.map(common.find_weights, ["deepcluster"] * 2, chunksize=1)  # its link names no hash
    assert found == [tmp_path / "checkpoints/deepcluster.pth"] * 2 and found[0].read_bytes() == b"weights"
    assert list(found[0].parent.iterdir()) == found[:1]
