"""What both training scripts rely on: the loop, here on a tiny method. A run that is cut off ends the same."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # also run as a script, below

import common  # noqa: E402
import train_finetune  # noqa: E402
from common import UserError  # noqa: E402
from train_finetune import Training, start_training, train  # noqa: E402


class Numbers:
    """Samples with something random in them; some cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), seconds: float = 0):
        self.count, self.bad, self.seconds = count, bad, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index in self.bad:
            raise UserError(f"picture{index}.jpg: is damaged")
        time.sleep(self.seconds)
        return {"x": torch.randn(3) + index, "index": index}


class Line(nn.Module):
    """A regression with noise of its own, to see that randomness comes back after a resume."""

    def __init__(self):
        super().__init__()
        self.fit = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(100, dtype=torch.long))
        self.nan_at, self.stop_at = -1, -1

    def forward(self, batch, step):
        x = batch["numbers"]["x"]
        self.seen.index_add_(0, batch["numbers"]["index"], torch.ones_like(batch["numbers"]["index"]))
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = (self.fit(x + 0.1 * torch.randn(3)) - x.sum(1, keepdim=True)).square().mean()
        return {"loss": loss * (float("nan") if step == self.nan_at else 1), "half": loss / 2}


@dataclass
class Args(Training):
    lr: float = 0.001
    batch_size: int = 4


def go(
    out: Path, samples=None, nan_at=-1, stop_at=-1, epochs: int = 4, batch: int = 4, seconds=0.0, score=None, **flags
) -> nn.Module:
    args = Args(out=out, workers=flags.pop("workers", 0), batch_size=batch, **flags)
    streams = {"numbers": (samples or Numbers(20, seconds=seconds), "batch_size")}
    device = start_training(args, streams)
    method = Line().to(device)
    method.nan_at, method.stop_at = nan_at, stop_at
    optimizer = torch.optim.SGD(method.parameters(), args.lr, momentum=0.9)
    train(args, method, optimizer, lambda e: args.lr / (e + 1), epochs, streams, method.fit, {}, score=score)
    return method


def test_an_epoch_sees_every_sample_once(tmp_path):
    method = go(tmp_path, epochs=3)
    assert method.seen[:20].tolist() == [3] * 20


@pytest.mark.parametrize("amp", ["float32", "bfloat16"])
def test_resumed_run_ends_with_the_same_weights(tmp_path, amp):
    whole = go(tmp_path / "whole", amp=amp)
    go(tmp_path / "cut", max_steps=7, amp=amp)  # in the midst of epoch 1
    resumed = go(tmp_path / "cut", amp=amp, workers=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    rows = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "cut")]
    assert [row.split(",")[0] for row in rows[0]] == ["step", *map(str, range(1, 11)), "15", "20"]
    assert rows[1][-1].split(",")[5:] == rows[0][-1].split(",")[5:]


def test_parts_and_processes_are_the_same(tmp_path):
    """Two processes of 2 samples end where one process with two parts of 2 samples ends, up to rounding."""
    one = go(tmp_path / "one", accumulate=2).state_dict()
    run = torchrun(tmp_path / "two")
    assert run.returncode == 0 and run.stdout.count("group ends") == 2
    two = torch.load(tmp_path / "two" / "last.pth", weights_only=True)["method"]
    for name in ("fit.weight", "fit.bias"):
        assert torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6), name
    assert two["seen"][:20].sum() == 40  # rank 0 saw half of 80


def test_a_run_goes_on_with_fewer_processes_and_more_parts(tmp_path, capsys):
    """To the weights of the run that was not cut off, to the bit; other parts of a batch are refused, or told."""
    whole = go(tmp_path / "whole", accumulate=2)
    torchrun(tmp_path / "cut", "0", "7").check_returncode()
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    with pytest.raises(UserError, match="--accumulate 1, not 4"):
        go(tmp_path / "cut", accumulate=4)
    resumed = go(tmp_path / "cut", accumulate=2)
    assert torch.equal(whole.fit.weight, resumed.fit.weight) and torch.equal(whole.fit.bias, resumed.fit.bias)
    assert "note: " not in capsys.readouterr().err
    go(tmp_path / "other", max_steps=8)
    assert "last.pth: was trained by 2 processes, not 1; BatchNorm sees other" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_name_its_processes_goes_on(tmp_path):
    """As older ones."""
    whole = go(tmp_path / "whole")
    go(tmp_path / "cut", max_steps=7)
    state = torch.load(tmp_path / "cut" / "last.pth", weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "processes"}, tmp_path / "cut" / "last.pth")
    with pytest.raises(UserError, match="--accumulate 1, not 2"):
        go(tmp_path / "cut", accumulate=2)
    assert torch.equal(go(tmp_path / "cut").fit.weight, whole.fit.weight)


def torchrun(out: Path, *more: str) -> subprocess.CompletedProcess:
    """This file's last lines in two processes. more: seconds a sample, steps in all, which process reads nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", __file__, str(out), *more]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=90
    )


def test_a_process_that_fails_alone_leaves_at_once(tmp_path):
    """NCCL's communicators end together: to end one would wait for the others, which wait for its part of a step."""
    run = torchrun(tmp_path, "0", "0", "1")
    assert run.returncode and "samples of numbers cannot be read" in run.stderr and "group ends" not in run.stdout


def test_nodes_that_do_not_share_a_folder_are_told(tmp_path):
    """They would go on from different steps, and wait for each other for ever."""
    go(tmp_path / "0", max_steps=2)
    run = torchrun(tmp_path / "{RANK}")
    assert run.returncode and f"--out {tmp_path / '0'}: processes find other files there" in run.stderr


def test_a_process_takes_its_gpu_and_no_other(tmp_path, monkeypatch):
    """Memory of GPU 0 would be lost to the context of every process."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_finetune, "pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    for device, local in (("auto", None), ("cuda:1", None), ("auto", "3"), ("cuda:1", "3"), ("cpu", "3")):
        monkeypatch.setenv("LOCAL_RANK", local) if local else monkeypatch.delenv("LOCAL_RANK", raising=False)
        start_training(Args(out=tmp_path, device=device), {})
    assert asked == ["cuda:0", "cuda:1", "cuda:3", "cuda:3", "cpu"]


@pytest.mark.parametrize("name", ["Rotation", "MoCo", "AutoEncoder", "UVC"])
def test_a_step_makes_no_tensor_from_numbers(name, monkeypatch):
    """To copy them to a GPU waits until it has come to its end."""
    import train_uvc_plus as uvc  # the processes of other tests start sooner without it

    args = uvc.check(uvc.Args(data=(ROOT,), crop=64, full=128, out_layer="layer3", image_objective="rotation"))
    method = {
        "Rotation": lambda: train_finetune.Rotation(train_finetune.Net("resnet18", 4)),
        "MoCo": lambda: train_finetune.MoCo(train_finetune.Net("resnet18", 8), 8, 8, 0.1, 0.9, 2),
        "AutoEncoder": uvc.AutoEncoder,
        "UVC": lambda: uvc.UVC(args, (uvc.LabEncoder(), uvc.LabDecoder()), 0),
    }[name]()
    x = torch.zeros(4, 3, 128, 128, dtype=torch.uint8)
    frames = x.permute(0, 2, 3, 1)
    batch = {"pictures": {"image": x, "query": x, "key": x}, "frames": frames}
    batch |= {"image": x, "video": {"reference": frames[:, :64, :64], "target": frames}}

    def refuse(*_, **__):
        raise AssertionError

    for place, maker in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(place, maker, refuse)
    method(batch, 0)["loss"].backward()


@pytest.mark.parametrize(("processes", "expected"), [("1", "3"), ("2", None)])
def test_a_validation_has_the_threads_of_all_processes(tmp_path, monkeypatch, processes, expected):
    """torchrun's OMP_NUM_THREADS is for each of several; the others wait meanwhile."""
    seen = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(train_finetune, "clips", lambda args: ["dog"])
    done = subprocess.CompletedProcess([], 1, "", "")
    monkeypatch.setattr(train_finetune.subprocess, "run", lambda *_, env, **__: seen.append(env) or done)
    assert train_finetune.validate(Args(out=tmp_path, validate=tmp_path), []) == {}
    assert seen[0].get("OMP_NUM_THREADS") == expected and "WORLD_SIZE" not in seen[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, number):
    command = [sys.executable, __file__, str(tmp_path / "cut"), "0.02"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cut" / "log.csv").exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(number)
    _, err = run.communicate()
    assert run.returncode == 128 + number
    assert "the same command goes on" in err and "Traceback" not in err
    assert 0 < torch.load(tmp_path / "cut" / "last.pth", weights_only=True)["step"] < 80
    resumed, whole = go(tmp_path / "cut", epochs=16), go(tmp_path / "whole", epochs=16)
    assert torch.equal(resumed.fit.weight, whole.fit.weight)


def test_a_stop_at_the_end_of_an_epoch_loses_no_score(tmp_path):
    """What there was no time for is done first when the run goes on; and once."""
    for stop_at in (9, 19):  # the last step of an epoch, and of all
        with pytest.raises(SystemExit):
            go(tmp_path, stop_at=stop_at, score=lambda: {"top1": 0.5})
    for _ in range(2):
        go(tmp_path, score=lambda: {"top1": 0.5})
    lines = (tmp_path / "validation.csv").read_text().splitlines()
    assert lines == ["step,epoch,top1", "5,0,0.5", "10,1,0.5", "15,2,0.5", "20,3,0.5"]


def test_no_number_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no numbers by step 8; .*last\.pth is kept"):
        go(tmp_path, nan_at=7, save_minutes=0)
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    assert state["step"] == 7 and state["method"]["fit.weight"].isfinite().all()


def test_other_settings_are_refused_free_ones_are_not(tmp_path):
    go(tmp_path, max_steps=2)
    with pytest.raises(UserError, match=r"--lr 0\.001, not 0\.5"):
        go(tmp_path, lr=0.5)
    with pytest.raises(UserError, match=r"with 20 samples \(numbers\), not 24"):
        go(tmp_path, Numbers(24))
    go(tmp_path, max_steps=3, save_minutes=1)
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    torch.save(state | {"config": state["config"] | {"old_flag": "5"}}, tmp_path / "last.pth")
    with pytest.raises(UserError, match=r"--old-flag 5, which is no flag of this script; take another --out, or"):
        go(tmp_path)
    go(tmp_path, lr=0.5, resume=False, max_steps=1)
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 1


def test_unreadable_samples_are_named_and_skipped(tmp_path, capsys):
    method = go(tmp_path, Numbers(20, bad=(3, 8)))
    assert method.seen[3] == method.seen[8] == 0 and method.seen.sum() == 80
    assert set((tmp_path / "unreadable.txt").read_text().splitlines()) == {
        "picture3.jpg: is damaged", "picture8.jpg: is damaged",
    }  # fmt: skip
    assert "warning: picture3.jpg: is damaged: skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"samples of numbers cannot be read"):
        go(tmp_path / "more", Numbers(20, bad=tuple(range(18))))
    with pytest.raises(UserError, match=r"samples of numbers cannot be read"):
        go(tmp_path / "all", Numbers(20, bad=tuple(range(20))), workers=1)


def test_bad_sizes_get_one_line(tmp_path):
    with pytest.raises(UserError, match="--batch-size 21: there are 20 samples to learn from"):
        go(tmp_path, batch=21, epochs=1)
    with pytest.raises(UserError, match="--batch-size 4: is no multiple of 3"):
        go(tmp_path, accumulate=3)
    with pytest.raises(UserError, match="--accumulate 0"):
        go(tmp_path, accumulate=0)
    with pytest.raises(UserError, match=r"has no ImageSets/2017/val\.txt"):
        go(tmp_path, validate=tmp_path)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("dog\n")
    (tmp_path / "JPEGImages" / "480p" / "dog").mkdir(parents=True)
    for flags, name in (({}, "Annotations/480p/dog"), ({"validate_sequences": "doog"}, "JPEGImages/480p/doog")):
        with pytest.raises(UserError, match=f"has no {name}; give DAVIS 2017 and"):
            go(tmp_path, validate=tmp_path, **flags)
    (tmp_path / "last.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="damaged"):
        go(tmp_path)


def test_a_checkpoint_of_another_network_gets_one_line(tmp_path):
    """As where the same number of pictures lies in more classes."""
    go(tmp_path, max_steps=2)
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    state["method"]["fit.weight"] = torch.zeros(2, 3)
    torch.save(state, tmp_path / "last.pth")
    with pytest.raises(UserError, match=r"last\.pth: does not fit \(size mismatch for fit\.weight.*--no-resume"):
        go(tmp_path)


def on_a_full_disk(out: Path, free: int) -> str:
    """What go() says where a file can have `free` bytes."""
    code = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
        sys.path.insert(0, sys.argv[1])
        import test_training
        test_training.common.run(test_training.go, lambda: test_training.Path(sys.argv[2]))"""
    command = [sys.executable, "-c", code, ROOT / "tests", out, str(free)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr


def test_full_disk_keeps_what_is_there(tmp_path):
    go(tmp_path, max_steps=2)
    before = (tmp_path / "last.pth").read_bytes()
    said = on_a_full_disk(tmp_path, 1500)
    assert "cannot be written" in said and f"the same command goes on from {tmp_path / 'last.pth'}" in said
    assert (tmp_path / "last.pth").read_bytes() == before


def test_a_disk_that_is_full_from_the_start_gets_one_line(tmp_path):
    """Before TensorBoard starts."""
    said = on_a_full_disk(tmp_path / "o", 0)
    assert len(said.splitlines()) == 1 and f"{tmp_path / 'o'}: cannot be written" in said


if __name__ == "__main__":
    end = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: (print("group ends"), end())

    def main(words: list[str]) -> None:
        out, seconds, steps = Path(words[0].format(**os.environ)), *(float(word) for word in [*words[1:3], 0, 0][:2])
        samples = Numbers(20, range(20) if words[3:] == [os.environ.get("RANK")] else (), seconds)
        go(out, samples, epochs=16 if seconds else 4, max_steps=int(steps))

    common.run(main, lambda: sys.argv[1:])
