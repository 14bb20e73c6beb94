"""What needs CUDA: the GPU gives what the CPU gives (pytest -m cuda). And benchmarks/gpu.py runs, here on the CPU."""

import csv
import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import clip
import common
import export
import propagate
import train_finetune
import train_uvc_plus
from common import Propagation

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import gpu  # noqa: E402
from training import write_pictures  # noqa: E402

GPU = torch.cuda.is_available()


def cuda(test):
    """Mark a test: it needs an NVIDIA GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")(test))


# The same on both


@cuda
@pytest.mark.parametrize("way", gpu.WAYS)
@torch.inference_mode()
def test_labels_on_the_gpu_are_the_cpus(way):
    """One step over several tiles, with frames far back. The features are positive, as after a ReLU."""
    torch.manual_seed(0)
    s = replace(Propagation(), **gpu.WAYS[way])
    target, features, labels = torch.rand(64, 40, 70), torch.rand(20, 64, 40, 70), torch.rand(20, 3, 40, 70)
    target, features = (torch.nn.functional.normalize(x, dim=-3) for x in (target, features))
    data = target, features, labels.softmax(1)
    ages, notes = [40, *range(19, 0, -1)], None
    if own := propagate.localizer(s.localization):
        notes = [own.note(z, s, None) for z in data[2]] if own.note else None
    here = propagate.propagate_labels(*data, s, 1, ages, notes)
    there = propagate.propagate_labels(*(x.cuda() for x in data), s, 1, ages, notes).cpu()
    apart = (here - there).abs().amax(0)
    assert (apart > 1e-4).float().mean() < 1e-3  # of two neighbours as near either may be the k-th


@cuda
@pytest.mark.parametrize("way", gpu.WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_masks_on_the_gpu_are_the_cpus(way, dtype):
    """From frames to masks, with the extractor, over a whole clip."""
    drawn = list(clip.render(frames=20, height=96, width=160))
    frames, mask = [frame for frame, _ in drawn], drawn[0][1]
    s = replace(Propagation(), **gpu.WAYS[way])
    _, here = gpu.follow(frames, mask, s, "cpu")
    _, there = gpu.follow(frames, mask, s, "cuda", dtype)
    assert (here == there).mean() > (0.999 if dtype == "float32" else 0.98)


@cuda
@pytest.mark.parametrize("model", ["default", "random"])
@torch.inference_mode()
def test_features_on_the_gpu_are_the_cpus(model):
    frame = torch.from_numpy(next(clip.render(frames=1, height=100, width=170))[0])[None]
    here, there = (common.load_encoder(model, None, None, device)(frame.to(device)) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-3)


@cuda
@pytest.mark.parametrize("minmax", [False, True])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
def test_labels_of_a_mask_and_back(sampling, minmax):
    _, mask = next(clip.render(frames=1, height=101, width=170))
    mask = torch.from_numpy(mask)
    here = propagate.labels_from_mask(mask, (1, 2, 3), (13, 22), sampling)
    there = propagate.labels_from_mask(mask.cuda(), (1, 2, 3), (13, 22), sampling)
    torch.testing.assert_close(there.cpu(), here, atol=1e-6, rtol=0)
    full = propagate.mask_from_labels(here, (1, 2, 200), (101, 170), minmax)
    again = propagate.mask_from_labels(there, (1, 2, 200), (101, 170), minmax).cpu()
    assert set(again.unique().tolist()) == {0, 1, 2, 200} and (full == again).float().mean() > 0.999


@cuda
@pytest.mark.parametrize("job", ["--mask", "--points"])
def test_a_run_on_the_gpu_is_that_on_the_cpu(job, small_clip, tmp_path, cli):
    given = small_clip / "f0.png"
    if job == "--points":
        given = tmp_path / "points.csv"
        given.write_text("id,x,y\na,50,40\nb,90,60\n")
    for device in ("cpu", "cuda"):
        flags = ["--video", small_clip / "clip.mp4", job, given, "--no-film", "--device", device]
        assert cli(propagate, *flags, "--out", tmp_path / device)[0] == 0
    if job == "--mask":
        for path in (tmp_path / "cpu" / "masks").iterdir():
            here, there = propagate.read_ids(path), propagate.read_ids(tmp_path / "cuda" / "masks" / path.name)
            assert (here == there).mean() > 0.999
    else:
        here, there = (list(csv.reader((tmp_path / d / "points.csv").open())) for d in ("cpu", "cuda"))
        moved = np.subtract(*([[float(v) for v in row[2:]] for row in rows[1:]] for rows in (here, there)))
        assert np.median(np.abs(moved)) < 0.5


# Training


def first_loss(folder: Path) -> float:
    with (folder / "log.csv").open(newline="") as file:
        return float(next(csv.DictReader(file))["loss"])


@cuda
@pytest.mark.parametrize("amp", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("objective", ["imagenet", "rotation", "moco"])
def test_fine_tuning_on_the_gpu_begins_as_on_the_cpu(objective, amp, tmp_path, cli):
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures", 24)
    flags = ["--objective", objective, "--data", tmp_path / "pictures", "--batch-size", 8, "--crop", 64]
    flags += ["--epochs", 9, "--workers", 0, "--max-steps", 2]
    flags += ["--queue", 64, "--bn-groups", 2] if objective == "moco" else []
    for device, kind in (("cpu", "float32"), ("cuda", amp)):
        code, _, err = cli(
            train_finetune, *flags, "--device", device, "--amp", kind, "--out", tmp_path / (device + objective)
        )
        assert code == 0, err
    here, there = (first_loss(tmp_path / (device + objective)) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=1e-3 if amp == "float32" else 0.05)


@cuda
@pytest.mark.parametrize("amp", ["float32", "float16"])
@pytest.mark.parametrize("warmup", [0, 9])
def test_uvc_on_the_gpu_begins_as_on_the_cpu(warmup, amp, tmp_path, cli):
    for part, module in (("encoder", train_uvc_plus.LabEncoder()), ("decoder", train_uvc_plus.LabDecoder())):
        torch.save(module.state_dict(), tmp_path / f"{part}.pth")
    for i in range(2):
        clip.write_clip(tmp_path / "clips" / str(i), frames=8, height=72, width=96, seed=i)
        (tmp_path / "clips" / str(i) / "f0.png").unlink()
        for mask in (tmp_path / "clips" / str(i) / "truth").iterdir():
            mask.unlink()
    flags = ["--data", tmp_path / "clips", "--autoencoder", tmp_path, "--epochs", 9, "--warmup-epochs", warmup]
    flags += ["--crop", 64, "--full", 128, "--batch-size", 2, "--workers", 0, "--max-steps", 1]
    for device, kind in (("cpu", "float32"), ("cuda", amp)):
        code, _, err = cli(train_uvc_plus, *flags, "--device", device, "--amp", kind, "--out", tmp_path / device)
        assert code == 0, err
    here, there = (first_loss(tmp_path / device) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=1e-2 if amp == "float32" else 0.05)


# The exported graph


@cuda
@pytest.mark.parametrize("flags", [[], ["--fp16"]])
def test_the_graph_runs_on_cuda(flags, tmp_path, cli):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has no CUDA here; pip install onnxruntime-gpu")
    size = ["--height", 64, "--width", 96, "--context", 3, "--frames", 6]
    code, out, err = cli(export, "--model", "random", *size, *flags, "--out", tmp_path / "tracker.onnx")
    assert code == 0 and "check: 5 frames on CUDA" in out, err


# benchmarks/gpu.py


@pytest.mark.parametrize(
    ("step", "rows"), [("masks", 4), ("speed", 10), ("training", 3), ("export", 2)], ids=lambda value: str(value)
)
def test_a_step_of_the_benchmark_runs(step, rows, tmp_path, cli, monkeypatch):
    """Scripts run as processes in the step of speed alone; a start takes seconds."""

    def script(job: gpu.Job, name: str, *flags) -> str:
        code, out, err = cli(importlib.import_module(Path(name).stem), *flags)
        assert code == 0, err
        return out + err

    if step != "speed":
        monkeypatch.setattr(gpu, "script", script)
    gpu.STEPS[step](gpu.Job("cpu", tmp_path / "gpu.md", time.time() + 600))
    text = (tmp_path / "gpu.md").read_text()
    assert sum(line.startswith("| ") for line in text.splitlines()) - text.count("\n## ") == rows, text
    assert "no time" not in text


def test_the_benchmark_keeps_its_time_and_says_what_it_left_out(tmp_path, monkeypatch, capfd):
    """On the CPU it is marked as a trial. A table that is there is not touched for flags that are wrong."""
    command = ["gpu.py", "--device", "cpu", "--out", str(tmp_path / "gpu.md"), "--steps", "masks", "tests"]
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0.005"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    text = (tmp_path / "gpu.md").read_text()
    assert stop.value.code == 0 and text.count("cut off, its time was over") == 2
    assert text.startswith("# On a CPU: this shows that the program runs, and measures nothing\n")
    for flags, message in ((["--device", "nonsense"], "cannot be used here"), (["--minutes", "0"], "give more than 0")):
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        assert stop.value.code == 2 and message in capfd.readouterr().err.splitlines()[-1]
        assert (tmp_path / "gpu.md").read_text() == text


def test_a_step_of_the_benchmark_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    program = tmp_path / "broken.py"  # as if each step raised
    program.write_text("raise ValueError('no such kernel')")
    monkeypatch.setattr(gpu, "__file__", str(program))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path / "gpu.md")])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 1
    assert (tmp_path / "gpu.md").read_text().count("failed, ValueError: no such kernel") == len(gpu.STEPS)


def test_a_row_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    real = gpu.follow

    def broken(frames, mask, s, device, *dtype):
        if dtype == ("float32",):
            raise ValueError("no such | kernel\nhere")
        return real(frames, mask, s, device, *dtype)

    monkeypatch.setattr(gpu, "follow", broken)
    monkeypatch.setattr(gpu, "WAYS", {"fixed": {}})
    job = gpu.Job("cpu", tmp_path / "gpu.md", time.time() + 600)
    gpu.masks(job)
    *_, failed, fine = (tmp_path / "gpu.md").read_text().splitlines()
    assert failed == "| fixed, float32 | failed: ValueError: no such / kernel |" and job.failed
    assert fine.startswith("| fixed | bfloat16 | 9")


def test_tests_that_cannot_run_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--bogus")
    job = gpu.Job("cpu", tmp_path / "gpu.md", time.time() + 600)
    gpu.tests(job)
    text = (tmp_path / "gpu.md").read_text()
    assert job.failed and "| none ran | failed, exit code 4 |" in text and "cut off" not in text


def test_a_step_runs_on_the_gpu_that_is_named(tmp_path, monkeypatch):
    """torch wants its number."""
    chosen = []
    monkeypatch.setattr(common, "pick_device", lambda name: torch.device(name, 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setitem(gpu.STEPS, "masks", lambda job: setattr(job, "failed", True))
    command = ["gpu.py", "--device", "cuda", "--steps", "masks", "--out", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", [*command, "--until", str(time.time() + 9)])
    with pytest.raises(SystemExit, match="some of it"):
        gpu.main()
    assert chosen == [torch.device("cuda:0")]


def test_what_no_time_is_left_for_is_said(tmp_path):
    gpu.masks(gpu.Job("cpu", tmp_path / "gpu.md", 0))
    assert (tmp_path / "gpu.md").read_text().endswith("| fixed | left out: no time was left |\n")
