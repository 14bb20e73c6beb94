"""What the tests share: a small generated clip, the command line, and where the real data is."""

import copy
import functools
import importlib
import inspect
import os
import signal
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a thread each, and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import clip  # noqa: E402
import common  # noqa: E402

inspect.findsource = functools.cache(inspect.findsource)  # tyro asks for it at each parsing of a command line: 0.1 s


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A shell starts what is in the background with SIGINT ignored, which goes on to all that is started there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights, SOFTCOPY_DATA; tests that need it skip where it is not."""
    folder = Path(os.environ.get("SOFTCOPY_DATA", ROOT / ".." / "shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data in {folder}; set SOFTCOPY_DATA to the folder that holds data/ and weights/")
    return folder


@pytest.fixture(scope="session")
def imagenet(shared: Path) -> Path:
    """Real ImageNet weights of a ResNet-18 up to layer3."""
    return shared / "weights" / "resnet18_imagenet1k_v1_conv1-layer3.pth"


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory) -> Path:
    """A folder with clip.mp4 (12 frames, 160 x 96, three objects), f0.png and truth/."""
    folder = tmp_path_factory.mktemp("clip")
    clip.write_clip(folder, frames=12, height=96, width=160, seed=1)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@functools.cache
def random_net(build, layer: str, stride: int):
    return build(common.find_system("random"), common.Propagation(layer=layer, stride=stride))


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a script's command line in this process: cli(module, "--flag", value, ...) -> (exit code, stdout, stderr).
    The weights of --model random, always the same, are drawn once."""
    random = importlib.import_module("systems.random")
    drawn = functools.partial(random_net, random.build_net)
    monkeypatch.setattr(random, "build_net", lambda _, s: copy.deepcopy(drawn(s.layer, s.stride)))

    def call(script, *argv) -> tuple[int, str, str]:
        code, parse = 0, getattr(script, "parse_args", functools.partial(common.parse, script.Args))
        try:
            common.run(script.main, lambda: parse([str(arg) for arg in argv]))
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
