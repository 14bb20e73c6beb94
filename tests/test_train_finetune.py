"""train_finetune.py: the three tasks are what their papers say, the frozen part stays as it is, nothing is lost."""

import copy
import csv
import dataclasses
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import evaluate
import propagate
import train_finetune
from common import UserError
from train_finetune import Args, Classification, MoCo, Net, Rotation, settle

ROOT = Path(train_finetune.__file__).parent
TINY = ("--crop", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu")
TINY_MOCO = (*TINY, "--queue", "8", "--bn-groups", "2")


def tiny(objective: str) -> tuple[str, ...]:
    return TINY_MOCO if objective == "moco" else TINY


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tidy(tmp_path):
    """A checkpoint takes 100 MB; pytest keeps folders."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def write_pictures(folder: Path, count: int, kind: int = 0) -> Path:
    """Pictures that can be learnt: bright above, dark below; the class is a colour."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count + kind)
    for i in range(count):
        picture = np.linspace(230, 20, 40)[:, None, None] + rng.normal(0, 10, (40, 48, 3))
        picture[..., kind] = 128
        cv2.imwrite(str(folder / f"{i:03}.jpg"), np.clip(picture, 0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """train/ and val/ of two classes, 8 + 4 and 2 + 2 pictures."""
    root = tmp_path_factory.mktemp("data")
    for split, counts in (("train", (8, 4)), ("val", (2, 2))):
        for kind, count in enumerate(counts):
            write_pictures(root / split / f"class{kind}", count, kind)
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Weights of the original stride, of a network whose BatchNorm has seen something, with a rotation head."""
    torch.manual_seed(5)
    net = Net("resnet18", 4)
    for _ in range(3):
        net(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save({"state_dict": net.state_dict()}, path)
    return path


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)["state_dict" if path.name == "weights.pth" else "method"]


def images(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# The settings of the paper


@pytest.mark.parametrize(
    ("flags", "epochs", "rates"),
    [
        ({"objective": "imagenet"}, 90, {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 1e-3, 89: 1e-3}),
        (
            {"objective": "rotation"},
            180,
            {0: 0.1, 29: 0.1, 30: 0.01, 60: 1e-3, 90: 1e-4, 120: 1e-5, 150: 1e-6, 179: 1e-6},
        ),
        ({"objective": "moco"}, 200, {0: 0.03, 119: 0.03, 120: 3e-3, 159: 3e-3, 160: 3e-4, 199: 3e-4}),
        ({"objective": "moco", "moco_v2": True}, 200, {0: 0.03, 50: 0.03 * (0.5 + 0.5**1.5), 100: 0.015}),
        ({"objective": "imagenet", "finetune": Path("w")}, 40, {0: 0.01, 19: 0.01, 20: 1e-3, 39: 1e-3}),
        ({"objective": "rotation", "finetune": Path("w")}, 40, {0: 0.01, 19: 0.01, 20: 1e-3, 39: 1e-3}),
        ({"objective": "moco", "finetune": Path("w")}, 40, {0: 3e-3, 19: 3e-3, 20: 3e-4, 39: 3e-4}),
        ({"objective": "moco", "moco_v2": True, "finetune": Path("w")}, 40, {0: 3e-3, 20: 3e-4}),
        ({"objective": "rotation", "schedule": "cosine", "epochs": 30, "lr": 1.0}, 30, {0: 1.0, 10: 0.75, 15: 0.5}),
    ],
)
def test_the_schedule_is_the_papers(flags, epochs, rates):
    args = settle(Args(data=Path(), **flags))
    assert (args.epochs, args.batch_size, args.momentum, args.weight_decay, args.crop) == (epochs, 256, 0.9, 1e-4, 224)
    assert args.min_area == (0.2 if args.objective == "moco" else 0.08)
    assert (args.temperature, args.queue, args.key_momentum) == (0.2 if args.moco_v2 else 0.07, 65536, 0.999)
    lr = train_finetune.learning_rate(args)
    for epoch, rate in rates.items():
        assert lr(epoch) == pytest.approx(rate), epoch


def test_every_default_has_a_flag():
    flags = "--data d --epochs 7 --batch-size 64 --lr 0.2 --decay-epochs 2 5 --weight-decay 0 --momentum 0.5 --crop 96 "
    flags += "--min-area 0.5 --objective moco --queue 128 --dim 16 --temperature 1 --key-momentum 0.9 --bn-groups 4"
    args = settle(common.parse(Args, flags.split()))
    lr = train_finetune.learning_rate(args)
    assert [lr(epoch) for epoch in (0, 1, 2, 4, 5)] == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002])
    assert (args.min_area, args.temperature, args.bn_groups, args.dim) == (0.5, 1, 4, 16)
    assert settle(Args(data=Path("d"), batch_size=64)).lr == pytest.approx(0.025)  # in proportion
    assert settle(Args(data=Path("d"), objective="moco", accumulate=8)).bn_groups == 16  # two at a time
    assert settle(Args(data=Path("d"), objective="moco")).bn_groups == 8


# Rotation


def test_the_turn_of_each_image_is_what_its_label_says():
    x = images(3)
    turned, labels = train_finetune.rotations(x)
    assert labels.tolist() == [0, 1, 2, 3] * 3 and turned.shape == (12, 3, 32, 32)
    for i, (image, label) in enumerate(zip(turned, labels, strict=True)):
        expected = np.rot90(x[i // 4].permute(1, 2, 0).numpy(), int(label))  # counter-clockwise
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_rotation_loss_is_the_mean_over_the_four_turns():
    torch.manual_seed(0)
    net = Net("resnet18", 4).eval()
    terms = Rotation(net)({"pictures": {"image": images(2)}}, 0)
    logits = [net(torch.rot90(images(2)[i : i + 1], k, (2, 3)))[0] for i in range(2) for k in range(4)]
    expected = torch.stack([-row.log_softmax(0)[i % 4] for i, row in enumerate(logits)]).mean()
    torch.testing.assert_close(terms["loss"], expected)
    right = [int(row.argmax()) == i % 4 for i, row in enumerate(logits)]
    assert float(terms["top1"]) == pytest.approx(np.mean(right)) and "top5" not in terms
    guess = Rotation(Net("resnet18", 4))({"pictures": {"image": images(16)}}, 0)["loss"]
    assert guess.item() == pytest.approx(math.log(4), abs=0.4)


def test_accuracy():
    logits = torch.eye(7)[[0, 1, 2]] + torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    found = train_finetune.accuracy(logits, torch.tensor([0, 2, 0]))  # first; third of the others; last of all
    assert found == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(1 / 3)}
    assert train_finetune.accuracy(logits, torch.tensor([6, 3, 2]))["top5"] == 1


def test_pictures_are_normalised():
    net, seen = Net("resnet18", 2), []
    net.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    net(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 32, 32))
    expected = [-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(seen[0][1, :, 5, 5], torch.tensor(expected))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# The stride change


@pytest.mark.parametrize(("arch", "conv"), [("resnet18", "conv1"), ("resnet50", "conv2")])
def test_the_stride_change_doubles_the_grid_of_layer3_and_leaves_the_weights_alone(arch, conv):
    torch.manual_seed(0)
    before = Net(arch, 4).eval()
    after = Net(arch, 4, frozen=True).eval()
    assert {k: v.shape for k, v in before.state_dict().items()} == {k: v.shape for k, v in after.state_dict().items()}
    after.load_state_dict(before.state_dict())
    changed = {name for name, part in after.named_modules() if getattr(part, "stride", None) == (1, 1)}
    changed -= {name for name, part in before.named_modules() if getattr(part, "stride", None) == (1, 1)}
    assert changed == {f"layer3.0.{conv}", "layer3.0.downsample.0"}
    grids, stages = {}, ("layer2", "layer3", "layer4", "layer3.0.downsample.0")
    for key, net in (("before", before), ("after", after)):
        for name in stages:
            part, place = net.get_submodule(name), grids.setdefault(name, {})
            part.register_forward_hook(lambda m, i, output, place=place, key=key: place.update({key: output}))
        net(images(1, 64))
    size = {name: [tuple(grids[name][key].shape[2:]) for key in ("before", "after")] for name in stages}
    assert (
        size["layer2"] == [(8, 8), (8, 8)] and size["layer3"] == [(4, 4), (8, 8)] and size["layer4"] == [(2, 2), (4, 4)]
    )
    short = grids["layer3.0.downsample.0"]  # the old grid is every second cell of the new one
    torch.testing.assert_close(short["after"][:, :, ::2, ::2], short["before"])


EARLY = ("conv1", "bn1", "layer1", "layer2")


@pytest.mark.parametrize("objective", ["imagenet", "rotation", "moco"])
def test_fine_tuning_leaves_the_frozen_part_alone_to_the_bit(objective, data, start, tmp_path, cli):
    """Weights and statistics, also after a measurement of accuracy; all later parameters and statistics move."""
    flags = ("--objective", objective, "--data", data, "--finetune", start, "--epochs", "2", "--lr", "0.1")
    code, _, said = cli(train_finetune, *flags, *tiny(objective), "--out", tmp_path)
    assert code == 0, said
    before, whole = torch.load(start, weights_only=True)["state_dict"], state_of(tmp_path / "last.pth")
    for prefix in ("encoder_q.", "encoder_k.") if objective == "moco" else ("net.",):
        after = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
        assert set(after) == set(before)
        for key, value in before.items():
            if key.split(".")[0] in EARLY:
                assert torch.equal(value, after[key]), key
            elif not key.startswith("fc"):
                assert not torch.equal(value, after[key]), key
    saved = state_of(tmp_path / "weights.pth")
    source = "encoder_q." if objective == "moco" else "net."
    assert all(torch.equal(saved[key], whole[source + key]) for key in before)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert {"loss", "top1", "waiting", "images_per_s", "lr"} <= set(rows[0]) and len(rows) == 6
    assert (tmp_path / "validation.csv").exists() == (objective != "moco")
    note = "note: " in said and "no fitting head (fc); random weights" in said
    assert note == (objective != "rotation")  # the head of the rotation task goes on


def test_the_frozen_part_needs_no_gradient():
    net = Net("resnet18", 4, frozen=True).train()
    assert not any(part.training for part in net.early) and net.layer3.training
    assert sum(value.numel() for value in Net("resnet18", 1000, True).parameters() if value.requires_grad) == 11_006_440
    Rotation(net)({"pictures": {"image": images(2)}}, 0)["loss"].backward()
    assert {name.split(".")[0] for name, v in net.named_parameters() if v.grad is None} == set(EARLY)


# MoCo


def small_moco(groups: int = 2, queue: int = 8, temperature: float = 0.07, frozen: bool = False, **more) -> MoCo:
    torch.manual_seed(0)
    return MoCo(Net("resnet18", 16, frozen, **more), queue, 16, temperature, 0.9, groups).train()


def pairs(step: int, count: int = 4, size: int = 32) -> dict:
    return {"pictures": {"query": images(count, size, 2 * step), "key": images(count, size, 2 * step + 1)}}


def test_a_step_of_moco_is_the_papers_algorithm():
    """Against Algorithm 1 of He et al. 2020, written out one sample and one group at a time."""
    moco, plain = small_moco(), small_moco()
    f_q, f_k, queue = plain.encoder_q, plain.encoder_k, plain.queue.clone()
    for value in f_q.parameters():  # the query encoder has moved since the copy
        value.data += 0.01 * torch.randn_like(value)
    moco.encoder_q.load_state_dict(f_q.state_dict())
    batch = pairs(0, 8, 96)  # BatchNorm over 4 x 3 x 3 cells at the end; over few it enlarges rounding
    query, key = batch["pictures"].values()
    terms = moco(batch, 0)
    terms["loss"].backward()
    for own, other in zip(f_k.parameters(), f_q.parameters(), strict=True):
        own.data = 0.9 * own.data + 0.1 * other.data
    q = torch.cat([f_q(query[:4]), f_q(query[4:])])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    k = torch.zeros(8, 16)
    with torch.no_grad():
        for group in (order[:4], order[4:]):
            k[group] = f_k(key[group])
    k, losses = k / k.norm(dim=1, keepdim=True), []
    for i in range(8):
        unit = q[i] / q[i].norm()
        logits = torch.cat([(unit @ k[i])[None], unit @ queue]) / 0.07
        losses.append(-logits.log_softmax(0)[0])
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.testing.assert_close(terms["loss"], loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moco.queue, k.T, rtol=1e-4, atol=1e-4)
    for (name, own), other in zip(moco.encoder_q.named_parameters(), f_q.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=2e-3, atol=2e-3 * float(other.grad.abs().max()), msg=name)
    assert all(value.grad is None for value in moco.encoder_k.parameters())
    for (name, own), other in zip(moco.encoder_k.state_dict().items(), f_k.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5, msg=name)


def test_the_queue_rolls_and_wraps():
    moco, written = small_moco(queue=12), []
    torch.testing.assert_close(moco.queue.norm(dim=0), torch.ones(12))
    for step in range(4):
        before = moco.queue.clone()
        moco(pairs(step), step)
        columns = [(4 * step + i) % 12 for i in range(4)]
        others = [i for i in range(12) if i not in columns]
        assert torch.equal(before[:, others], moco.queue[:, others])
        assert not torch.equal(before[:, columns], moco.queue[:, columns])
        assert int(moco.queue_ptr) == (4 * step + 4) % 12 and torch.equal(moco.negatives, before)
        written.append(moco.queue[:, columns].clone())
    assert torch.equal(moco.queue, torch.cat([written[3], written[1], written[2]], 1))


def test_keys_come_back_in_their_order():
    moco = small_moco().eval()  # in eval mode a key does not depend on its company
    keys = train_finetune.shuffled_keys(partial(moco.embed, moco.encoder_k), images(4), 3)
    torch.testing.assert_close(keys, F.normalize(moco.encoder_k(images(4)), dim=1))


def test_keys_are_dealt_out_alike_on_all_devices():
    """A GPU's generator has an order of its own, with other company and another loss."""
    assert train_finetune.shuffled_keys(lambda x: x.flatten(1), torch.zeros(4, 3, 2, 2, device="meta"), 3).is_meta


def test_the_loss_before_learning_is_that_of_a_guess():
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(64, 128, generator=generator), dim=1) for _ in range(2))
    queue = F.normalize(torch.randn(128, 4096, generator=generator), dim=0)
    logits = train_finetune.contrast(q, k, queue, 1.0)
    assert logits.shape == (64, 4097)
    loss = F.cross_entropy(logits, torch.zeros(64, dtype=torch.long))
    assert float(loss) == pytest.approx(math.log(4097), abs=0.02)
    moco = small_moco(queue=4096, temperature=50)
    assert moco(pairs(0), 0)["loss"].item() == pytest.approx(math.log(4097), abs=0.05)


def test_parts_of_a_batch_share_the_step():
    """With --accumulate the key encoder moves once a step, and no key of the batch is a negative in it."""
    moco = small_moco(groups=1)
    for value in moco.encoder_q.parameters():
        value.data += 1
    key, query, before = (
        next(moco.encoder_k.parameters()).clone(),
        next(moco.encoder_q.parameters()),
        moco.queue.clone(),
    )
    for part in range(2):
        moco({"pictures": {name: value[2 * part :][:2] for name, value in pairs(0)["pictures"].items()}}, 0)
    torch.testing.assert_close(next(moco.encoder_k.parameters()), 0.9 * key + 0.1 * query)
    assert torch.equal(moco.negatives, before) and int(moco.queue_ptr) == 4
    moco({"pictures": {name: value[:2] for name, value in pairs(1)["pictures"].items()}}, 1)
    assert torch.equal(moco.negatives[:, :4], moco.queue[:, :4]) and not torch.equal(moco.negatives, before)


def test_version_2_has_a_head_of_two_layers():
    head = small_moco(mlp=True).encoder_q.fc
    assert [tuple(value.shape) for value in head.parameters()] == [(512, 512), (512,), (16, 512), (16,)]
    names = [
        type(step).__name__
        for step in train_finetune.augmentation(settle(Args(data=Path("d"), objective="moco"))).transforms
    ]
    assert names == ["RandomResizedCrop", "RandomGrayscale", "ColorJitter", "RandomHorizontalFlip"]
    args = settle(Args(data=Path("d"), objective="moco", moco_v2=True, crop=32))
    picture = images(1, 40)[0]
    for seed in range(3):
        torch.manual_seed(seed)
        once = train_finetune.augmentation(args)(picture)
        torch.manual_seed(seed)
        assert torch.equal(once, train_finetune.augmentation(args)(picture))
        assert once.shape == (3, 32, 32) and once.dtype == torch.uint8


# Many processes, and a run that is cut off


def command(*flags) -> list[str]:
    return [sys.executable, "train_finetune.py", *map(str, flags)]


@pytest.mark.parametrize("objective", ["rotation", "moco"])
def test_two_processes_train_as_one_with_the_whole_batch(objective, data, tmp_path, cli):
    """rotation: BatchNorm sees half a batch in both; moco: shuffling over processes is what groups are in one."""
    flags = ("--objective", objective, "--data", data, "--epochs", "2", *tiny(objective))
    flags += ("--batch-size", "8", "--crop", "96")  # BatchNorm over few cells enlarges rounding
    parts = ("--accumulate", "2") if objective == "rotation" else ()
    assert cli(train_finetune, *flags, *parts, "--out", tmp_path / "one")[0] == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    run += ["--rdzv-endpoint", "localhost:0", *command(*flags, "--out", tmp_path / "two")[1:]]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):  # of both processes
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-2)
    if objective == "rotation":
        assert_score_is_of_the_saved_weights(data, tmp_path / "two")
    one, two = (state_of(tmp_path / name / "last.pth") for name in ("one", "two"))
    assert set(one) == set(two)
    moved = 0
    for key, value in one.items():
        if not any(word in key for word in ("running", "num_batches")):  # each process has statistics of its own
            torch.testing.assert_close(value, two[key], rtol=1e-3, atol=2e-4, msg=key)
            moved += 1
    assert moved > 60


def assert_score_is_of_the_saved_weights(data: Path, out: Path) -> None:
    """The statistics of BatchNorm that are scored are those that are saved."""
    args = settle(Args(data=data, objective="rotation", crop=96, batch_size=8, workers=0))
    method = Rotation(Net("resnet18", 4))
    method.net.load_state_dict(state_of(out / "weights.pth"))
    kept = train_finetune.HeldOut(train_finetune.find_pictures(args)[1], train_finetune.centre(args))
    expected = train_finetune.held_out_score(args, method, kept, torch.device("cpu"))
    last = list(csv.DictReader((out / "validation.csv").open()))[-1]
    assert float(last["loss"]) == pytest.approx(expected["loss"], rel=1e-4)
    assert (float(last["top1"]), float(last["pictures"])) == pytest.approx((expected["top1"], 4), rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(data, tmp_path, cli):
    flags = ("--objective", "moco", "--data", data, "--epochs", "2", *TINY_MOCO)
    run = subprocess.Popen(command(*flags, "--out", tmp_path / "cut"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (tmp_path / "cut" / "log.csv").exists() and run.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "the same command goes on" in said, said
    assert 0 < torch.load(tmp_path / "cut" / "last.pth", weights_only=True)["step"] < 6
    for name in ("cut", "whole"):
        code, _, said = cli(train_finetune, *flags, "--out", tmp_path / name)
        assert code == 0, said
    for file in ("last.pth", "weights.pth"):
        cut, whole = (torch.load(tmp_path / name / file, weights_only=True) for name in ("cut", "whole"))
        assert cut.get("step") == whole.get("step")
        part = "state_dict" if file == "weights.pth" else "method"
        for key, value in whole[part].items():
            assert torch.equal(value, cut[part][key]), key
        if file == "last.pth":
            for i, state in whole["optimizer"]["state"].items():
                assert torch.equal(state["momentum_buffer"], cut["optimizer"]["state"][i]["momentum_buffer"]), i


def test_other_settings_are_not_resumed(data, tmp_path, cli):
    flags = ("--objective", "rotation", "--data", data, *TINY, "--out", tmp_path, "--max-steps", "1")
    assert cli(train_finetune, *flags)[0] == 0
    before = (tmp_path / "last.pth").read_bytes()
    code, _, said = cli(train_finetune, *flags, "--lr", "0.3")
    assert code == 2 and "was trained with --lr" in said and said.count("\n") == 1
    assert (tmp_path / "last.pth").read_bytes() == before


def test_a_run_goes_on_after_its_files_moved(data, start, tmp_path, cli):
    """Pictures by another path, weights to start from under another folder, which need not be there any more."""
    flags = ("--objective", "rotation", *TINY, "--out", tmp_path / "out")
    assert cli(train_finetune, *flags, "--data", data, "--finetune", start, "--max-steps", "1")[0] == 0
    shutil.copytree(data, tmp_path / "moved")
    flags += ("--data", tmp_path / "moved", "--max-steps", "2", "--finetune")
    code, _, said = cli(train_finetune, *flags, tmp_path / "gone" / start.name)
    assert code == 0, said
    assert torch.load(tmp_path / "out" / "last.pth", weights_only=True)["step"] == 2
    code, _, said = cli(train_finetune, *flags, tmp_path / "other.pth")
    assert code == 2 and "was trained with --finetune " in said
    (tmp_path / "moved" / "train" / "class0" / "000.jpg").unlink()
    code, _, said = cli(train_finetune, *flags, start)
    assert code == 2 and "was trained with 12 samples (pictures), not 11" in said and said.count("\n") == 1


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(data, tmp_path, cli):
    flags = ("--objective", "imagenet", "--data", data, *TINY, "--out", tmp_path, "--epochs", "9", "--lr", "1e18")
    code, _, said = cli(train_finetune, *flags)
    last = said.splitlines()[-1]
    assert (
        code == 2
        and last.startswith("error: loss or weights are no numbers by step")
        and "lower the learning rate" in last
    )
    if (tmp_path / "last.pth").exists():
        assert all(value.isfinite().all() for value in state_of(tmp_path / "last.pth").values())


def test_mixed_precision_and_parts(data, tmp_path, cli):
    flags = (
        "--objective",
        "moco",
        "--data",
        data,
        "--crop",
        "32",
        "--batch-size",
        "8",
        "--queue",
        "16",
        "--workers",
        "1",
    )
    flags += ("--bn-groups", "4", "--accumulate", "2", "--amp", "bfloat16", "--moco-v2", "--epochs", "2")
    code, _, said = cli(train_finetune, *flags, "--out", tmp_path)
    assert code == 0, said
    state = state_of(tmp_path / "last.pth")
    assert all(value.dtype in (torch.float32, torch.int64) and value.isfinite().all() for value in state.values())
    torch.testing.assert_close(state["queue"].norm(dim=0), torch.ones(16))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_no_more_workers_than_cpus_it_may_run_on(data, tmp_path):
    """DataLoader would warn."""
    flags = ("--objective", "rotation", "--data", data, "--crop", "32", "--batch-size", "4", "--max-steps", "1")
    one = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        command(*flags, "--device", "cpu", "--out", tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, one),
    )
    assert done.returncode == 0 and "worker" not in done.stderr, done.stderr
    assert torch.load(tmp_path / "last.pth", weights_only=True)["config"]["workers"] == "1"


# Pictures


def found(root: Path, objective: str, **flags) -> tuple[list, list, list]:
    learned, held, classes = train_finetune.find_pictures(settle(Args(data=root, objective=objective, **flags)))
    names = [[(str(Path(path).relative_to(root)), label) for path, label in part] for part in (learned, held)]
    return *names, classes


def test_layouts(data, tmp_path):
    learned, held, classes = found(data, "imagenet")
    assert classes == ["class0", "class1"] and len(learned) == 12 and len(held) == 4
    assert ("train/class1/003.jpg", 1) in learned and ("val/class0/001.jpg", 0) in held
    assert [len(part) for part in found(data, "rotation")] == [12, 4, 0]
    assert [len(part) for part in found(data, "moco")] == [12, 0, 0]
    for folder in ("a", "b/c"):
        write_pictures(tmp_path / folder, 10)
    write_pictures(tmp_path / ".thumbs", 3)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "._001.jpg").write_text("nor this")
    learned, held, _ = found(tmp_path, "rotation", holdout=0.2)
    assert [path for path, _ in held] == ["a/008.jpg", "a/009.jpg", "b/c/008.jpg", "b/c/009.jpg"] and len(learned) == 16
    assert [len(part) for part in found(tmp_path, "rotation", holdout=0.05)] == [19, 1, 0]  # shares add up
    assert [len(part) for part in found(tmp_path, "rotation", holdout=0)] == [20, 0, 0]
    assert [len(part) for part in found(tmp_path, "moco")] == [20, 0, 0]
    learned, held, classes = found(tmp_path, "imagenet", holdout=0.1)
    assert classes == ["a", "b"] and held == [("a/009.jpg", 0), ("b/c/009.jpg", 1)] and len(learned) == 18


def test_every_class_keeps_a_picture_to_learn_from(tmp_path):
    """However much is held out: what is never learnt can never be right."""
    for folder, count in (("a", 1), ("b", 3), ("c/1", 1), ("c/2", 1)):
        write_pictures(tmp_path / folder, count)
    for holdout, expected in ((0.4, 2), (0.6, 3), (1, 3)):
        learned, held, _ = found(tmp_path, "imagenet", holdout=holdout)
        assert {label for _, label in learned} == {0, 1, 2} and len(held) == expected
        assert len(learned) + len(held) == 6
    assert [len(part) for part in found(tmp_path, "rotation", holdout=1)] == [1, 5, 0]


def test_links_that_lead_back_are_walked_once(tmp_path):
    write_pictures(tmp_path / "a", 3)
    write_pictures(tmp_path / "b", 3)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "over").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    learned, _, _ = found(tmp_path, "moco")
    assert sorted(path for path, _ in learned) == sorted(
        f"{folder}/{i:03}.jpg" for folder in ("a", "a/over", "b", "b/back") for i in range(3)
    )


@pytest.mark.parametrize("locked", ["train/b", "val/b", "val"])
def test_a_folder_that_cannot_be_listed_is_refused(locked):
    """Else its pictures would be missing without a word."""
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are for one user
        root, user = Path(root), os.geteuid()
        for part, name in itertools.product(("train", "val"), "abc"):
            write_pictures(root / part / name, 2)
        root.chmod(0o755)
        (root / locked).chmod(0)
        try:
            os.seteuid(65534 if user == 0 else user)  # root may list all
            with pytest.raises(common.UserError, match=f"{root / locked}: cannot be listed .Permission denied"):
                found(root, "imagenet")
        finally:
            os.seteuid(user)
            (root / locked).chmod(0o755)


def test_pictures_beside_the_class_folders_are_told(data, tmp_path, cli):
    shutil.copytree(data, tmp_path / "data")
    shutil.copy(data / "train" / "class0" / "000.jpg", tmp_path / "data" / "train" / "loose.jpg")
    code, _, said = cli(train_finetune, "--data", tmp_path / "data", *TINY, "--max-steps", "1", "--out", tmp_path / "o")
    assert code == 0 and f"note: {tmp_path / 'data' / 'train'}: 1 pictures beside the class folders" in said, said


def test_a_fifo_is_no_picture(tmp_path, cli):
    """Reading it would wait for ever."""
    write_pictures(tmp_path / "data", 11)
    os.mkfifo(tmp_path / "data" / "pipe.jpg")
    flags = ("--objective", "rotation", "--holdout", "0", "--data", tmp_path / "data", *TINY, "--out", tmp_path / "out")
    code, _, said = cli(train_finetune, *flags, "--epochs", "1")
    assert code == 0 and f"warning: {tmp_path / 'data' / 'pipe.jpg'}: is no file (any more): skipped" in said, said


def test_pictures_of_many_kinds(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name in ("a.png", "b.bmp", "c.TIFF", "d.webp", "e.ppm"):
        assert cv2.imwrite(str(tmp_path / name), colour[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])
        assert np.array_equal(common.read_picture(tmp_path / name), colour), name
    cv2.imwrite(str(tmp_path / "grey.png"), colour[..., 0])
    cv2.imwrite(str(tmp_path / "deep.png"), colour[..., 0].astype(np.uint16) * 257)
    for name in ("grey.png", "deep.png"):
        assert np.array_equal(common.read_picture(tmp_path / name)[..., 2], colour[..., 0]), name


def test_damaged_pictures_are_told(tmp_path):
    whole = write_pictures(tmp_path / "whole", 1) / "000.jpg"
    for name, content in (
        ("half.jpg", whole.read_bytes()[:400]),
        ("no.png", b"text"),
        ("no.bmp", b"BM"),
        ("empty.jpg", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(common.UserError, match=f"{name}: .*; replace or remove it"):
            common.read_picture(tmp_path / name)


def test_damaged_pictures_are_named_and_skipped(data, tmp_path, cli):
    root = tmp_path / "data"
    write_pictures(root, 11)
    (root / "000.jpg").write_bytes((root / "001.jpg").read_bytes()[:300])
    (root / "010.jpg").write_bytes(b"text")  # held out
    flags = (
        "--objective",
        "rotation",
        "--data",
        root,
        "--holdout",
        "0.2",
        *TINY,
        "--epochs",
        "2",
        "--out",
        tmp_path / "out",
    )
    code, _, said = cli(train_finetune, *flags)
    assert code == 0, said
    assert said.count("warning: ") == 1 and f"{root / '000.jpg'}: " in (tmp_path / "out" / "unreadable.txt").read_text()
    assert [row["pictures"] for row in csv.DictReader((tmp_path / "out" / "validation.csv").open())] == ["1", "1"]
    for i in range(10):
        (root / f"{i:03}.jpg").write_bytes(b"text")
    code, _, said = cli(train_finetune, *flags, "--no-resume")
    assert code == 2 and "error: " in said and "cannot be read, such as" in said


def test_held_out_accuracy_is_that_of_a_plain_loop(data):
    args = settle(Args(data=data, crop=32, batch_size=3, workers=0))
    _, held, classes = train_finetune.find_pictures(args)
    torch.manual_seed(1)
    method = Classification(Net("resnet18", len(classes))).train()
    kept = train_finetune.HeldOut([*held, (str(data / "none.jpg"), 0)], train_finetune.centre(args))
    score = train_finetune.held_out_score(args, method, kept, torch.device("cpu"))
    method.eval()
    rows = [method.net(kept[i]["image"][None])[0].log_softmax(0) for i in range(4)]
    right = [int(row.argmax()) == label for row, (_, label) in zip(rows, held, strict=True)]
    losses = [-row[label].item() for row, (_, label) in zip(rows, held, strict=True)]
    assert score == {
        "loss": pytest.approx(np.mean(losses), rel=1e-4),
        "top1": pytest.approx(np.mean(right)),
        "pictures": 4,
    }
    assert kept[0]["image"].shape == (3, 32, 32)


# Weights, in and out


def test_what_is_wrong_with_a_start_is_said(start, tmp_path, data, cli):
    whole = torch.load(start, weights_only=True)["state_dict"]

    def error(state: dict, *flags) -> str:
        torch.save(state, tmp_path / "w.pth")
        code, _, said = cli(train_finetune, "--finetune", tmp_path / "w.pth", "--data", data, *TINY, *flags)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "layer1.0.conv1.weight is (64, 64, 3, 3), not (64, 64, 1, 1)" in error(whole, "--arch", "resnet50")
    assert "it lacks 1 of 102 entries, such as layer1.0.bn2.weight" in error(
        {k: v for k, v in whole.items() if k != "layer1.0.bn2.weight"}
    )
    assert "layer1.2.conv1.weight as well" in error({**whole, "layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)})
    folded = {key: value for key, value in whole.items() if "bn" not in key} | {"conv1.bias": torch.zeros(64)}
    assert "BatchNorm is folded" in error(folded)
    assert "no such weights file" in cli(train_finetune, "--finetune", tmp_path / "none.pth", "--data", data, *TINY)[2]


def test_released_names_and_files_that_end_at_layer3(start, tmp_path, capsys):
    whole = torch.load(start, weights_only=True)["state_dict"]
    moco = {f"module.encoder_q.{key}": value for key, value in whole.items()} | {"module.queue": torch.zeros(2, 2)}
    moco |= {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in whole.items()}
    short = {key: value for key, value in whole.items() if key[:6] != "layer4"}
    for content, note in (
        ({"state_dict": moco}, ""),
        ({"state_dict": {}, **whole}, None),
        (short, "no fitting layer4;"),
    ):
        torch.manual_seed(9)
        net = Net("resnet18", 4, frozen=True)
        fresh = copy.deepcopy(net.state_dict())
        if note is None:
            content.pop("state_dict")
        torch.save(content, tmp_path / "w.pth")
        train_finetune.load_start(net, tmp_path / "w.pth", "resnet18")
        for key, value in net.state_dict().items():
            assert torch.equal(value, fresh[key] if note and key.startswith("layer4") else whole[key]), key
        said = capsys.readouterr().err
        assert (note in said and said.count("\n") == 1) if note else not said


def test_the_real_imagenet_file(imagenet, capsys):
    net = Net("resnet18", 1000, frozen=True)
    train_finetune.load_start(net, imagenet, "resnet18")
    assert "no fitting layer4;" in capsys.readouterr().err
    encoder = common.load_encoder("imagenet", imagenet, common.Propagation(size="full"), "cpu")
    seen = []
    net.eval().layer3.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = images(1, 64)
    net(x)
    torch.testing.assert_close(F.normalize(seen[0], dim=1), encoder(x.permute(0, 2, 3, 1)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--objective", "rotation"), "rotation"),
        (("--objective", "moco", "--arch", "resnet50"), "moco"),
        (("--objective", "imagenet", "--finetune"), "imagenet-finetuned"),
    ],
)
def test_propagate_takes_the_weights(flags, name, data, start, small_clip, tmp_path, cli):
    flags += (start,) if "--finetune" in flags else ()
    code, _, said = cli(train_finetune, *flags, "--data", data, *tiny(name), "--max-steps", "1", "--out", tmp_path)
    assert code == 0, said
    path = tmp_path / "weights.pth"
    state, rest = common.read_weights(path)
    assert common.recognise(state, rest) == name and "fc.weight" in state
    meta = torch.load(path, weights_only=True)["meta"]
    assert meta["strides"] == {"layer3": 1 if "--finetune" in flags else 2, "layer4": 2} and meta["task"] == name
    flags = ("--video", small_clip / "clip.mp4", "--mask", small_clip / "f0.png", "--weights", path, "--device", "cpu")
    code, _, said = cli(propagate, *flags, "--size", "48", "--end", "3", "--out", tmp_path / "masks")
    assert code == 0 and f"recognised as {name}" in said, said
    assert len(list((tmp_path / "masks" / "masks").iterdir())) >= 3


def test_rows_of_the_paper_take_the_fine_tuned_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = evaluate.Args(data=tmp_path)
    rows = [line for line in csv.DictReader(evaluate.PAPER.open()) if line["table"] == "table3"]
    assert {name for row in rows for name in row["models"].split()} <= set(common.systems())
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "rotation-finetuned.pth").touch()
    model, settings = evaluate.paper_settings(args, ["rotation-finetuned", "rotation"], ["aggregation=per-frame"])
    assert model == "rotation-finetuned" and settings.aggregation == "per-frame"
    with pytest.raises(UserError, match=r"weights of moco-r18-finetuned \(train_finetune.py makes them\)"):
        evaluate.paper_settings(args, ["moco-r18-finetuned"], ["aggregation=per-frame"])


# What the user gets wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--data: missing"),
        (("--data", "nowhere"), "no such folder"),
        (("--data", "."), "an empty class folder"),
        (("--data", "empty", "--objective", "moco"), "holds no pictures"),
        (("--data", "one"), "holds 1 class folders"),
        (("--data", "stray"), "is no class of"),
        (("--data", "one", "--objective", "rotation", "--batch-size", "64"), "there are 10 samples"),
        (("--data", "one", "--objective", "moco", "--batch-size", "6", "--queue", "100"), "give 96"),
        (("--data", "one", "--objective", "moco", "--batch-size", "6", "--queue", "12"), "--bn-groups 8: must divide"),
        (("--data", "one", "--objective", "rotation", "--batch-size", "6", "--accumulate", "4"), "no multiple of 4"),
        (("--data", "one", "--moco-v2"), "is for --objective moco"),
        (("--data", "one", "--moco-v2", "--objective", "moco", "--crop", "5"), "--crop 5: give 8 or more"),
        (
            ("--data", "one", "--objective", "moco", "--crop", "32", "--batch-size", "8"),
            "BatchNorm would see one",
        ),
        (("--data", "one", "--epochs", "0"), "--epochs 0: must be above 0"),
        (("--data", "one", "--holdout", "2"), "--holdout 2.0: give 0 to 1"),
        (("--data", "stray", "--holdout", "0.2"), "--holdout 0.2: accuracy is measured on stray/val; leave it out"),
        (("--data", "one", "--objective", "moco", "--holdout", "0.2"), "moco measures no accuracy"),
        (("--data", "one", "--objective", "rotation", "--validate", "empty"), "val.txt"),
        (("--data", "one", "--objective", "rotation", "--validate", "listed"), "'../../one' is no name of a sequence"),
        (("--data", "flat"), "flat/val: has 1 pictures but no class folders; move them into one folder a class"),
        (("--data", "one", "--objective", "moco", "--queue", "16777216", "--dim", "1024"), "more than 8 GiB"),
        (("--data", "one", "--objective", "rotation", "--batch-size", "4", "--device", "cuda:77"), "--device cuda:77"),
    ],
)
def test_bad_input_gets_one_line(flags, message, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "stray/train/a", "stray/train/b", "stray/val/c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "listed" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "listed" / "ImageSets" / "2017" / "val.txt").write_text("../../one\n")
    for folder in ("flat/train/a", "flat/train/b", "flat/val"):
        write_pictures(tmp_path / folder, 1)
    write_pictures(tmp_path / "one" / "class0", 10)
    for folder in ("stray/train/a", "stray/train/b", "stray/val/c"):
        write_pictures(tmp_path / folder, 1)
    code, _, said = cli(train_finetune, *flags, "--out", tmp_path / "out")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said, said
    assert not (tmp_path / "out").exists()


HUGE = str(10**12)
BAD_NUMBERS = {  # for each flag that is a number
    "max_steps": ("-1", "nan", "1.5"),
    "accumulate": ("0", "-1", HUGE),
    "workers": ("-1", HUGE),
    "seed": ("-1", str(10**30), "x"),
    "save_minutes": ("-1", "nan", "x"),
    "validate_every": ("0", "-1", "x"),
    "epochs": ("0", "-3", "nan", HUGE),
    "batch_size": ("0", "-4", "x", HUGE),
    "lr": ("0", "-1", "nan", "inf"),
    "decay_epochs": ("0", "-1", "x"),
    "momentum": ("-0.1", "1.5", "nan"),
    "weight_decay": ("-0.1", "1.5", "nan"),
    "crop": ("0", "-1", "7", HUGE),
    "min_area": ("0", "1.5", "nan"),
    "holdout": ("-1", "2", "nan"),
    "queue": ("0", "-8", HUGE),
    "dim": ("0", "-8", HUGE),
    "temperature": ("0", "-1", "nan", "inf"),
    "key_momentum": ("-1", "2", "nan"),
    "bn_groups": ("0", "-2", HUGE),
}


def numbers_of(args_type) -> set[str]:
    kinds = {field.name: str(field.type) for field in dataclasses.fields(args_type)}
    return {name for name, kind in kinds.items() if "int" in kind or ("float" in kind and "Literal" not in kind)}


def one_line(cli, script, *flags) -> str:
    code, _, said = cli(script, *flags)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (flags, said)
    return said


def test_every_number_is_checked(data, tmp_path, cli):
    assert set(BAD_NUMBERS) == numbers_of(Args)
    for name, values in BAD_NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        for value in values:
            flags = ("--data", data, "--objective", "moco", *TINY_MOCO, "--out", tmp_path / "out", flag, value)
            assert flag in one_line(cli, train_finetune, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", ["imagenet", "rotation"])
def test_flags_of_moco_are_refused_elsewhere(objective, data, tmp_path, cli):
    flags = ("--objective", objective, "--data", data, *TINY, "--out", tmp_path / "out")
    given = ("--queue 8", "--dim 16", "--temperature 0.2", "--key-momentum 0.9", "--bn-groups 2", "--moco-v2")
    for flag in given:
        why = f"{flag}: is for --objective moco, not {objective}; leave it out"
        assert why in one_line(cli, train_finetune, *flags, *flag.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cosine", [("--schedule", "cosine"), ("--objective", "moco", "--moco-v2")])
def test_epochs_of_decay_are_refused_with_a_cosine(cosine, data, tmp_path, cli):
    flags = ("--data", data, *cosine, "--decay-epochs", "3", "--out", tmp_path / "out")
    assert "--decay-epochs (3,): the cosine schedule has no such steps" in one_line(cli, train_finetune, *flags)


def test_every_path_is_checked(data, tmp_path, cli):
    """Nothing there, a file, a FIFO, a link to itself, an empty folder."""
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    kinds = {"none", "file", "fifo", "loop", "folder"}
    for flag, wrong in (("data", kinds), ("finetune", kinds), ("validate", kinds), ("out", {"file", "fifo", "loop"})):
        for kind in sorted(wrong):
            flags = ("--data", data, *TINY, "--out", tmp_path / "out", f"--{flag}", tmp_path / kind)
            assert str(tmp_path / kind) in one_line(cli, train_finetune, *flags)
    assert not (tmp_path / "out").exists()
