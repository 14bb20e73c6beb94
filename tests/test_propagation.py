"""Algorithm 1 against a dense, literal transcription of the paper's pseudocode."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import propagate
from common import Propagation, find_system, load_encoder
from propagate import hindsight, labels_from_mask, mask_from_labels, propagate_labels, propagate_video


@pytest.fixture(autouse=True)
def no_fake_tensors_are_kept():
    yield
    propagate.block_regions.cache_clear()


def algorithm_1(g, features, labels, s, annotated=1):
    """The paper's Algorithm 1 line by line: g C h w, features n C h w, labels n L h w -> L h w."""
    n, _, h, w = features.shape
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    near = torch.ones(h * w, h * w, dtype=torch.bool)
    if s.localization == "fixed":
        near = dy**2 + dx**2 < s.radius**2 if s.shape == "circle" else (dy <= s.radius) & (dx <= s.radius)
    M = [torch.ones_like(near) if s.exempt_first and i < annotated else near for i in range(n)]
    softmax = {"auto": "topk" if s.aggregation == "overall" else "frame"}.get(s.softmax, s.softmax)
    Fs, Ys = [f.flatten(1) for f in features], [z.flatten(1) for z in labels]
    if s.aggregation == "overall":
        Fs, Ys, M = [torch.cat(Fs, 1)], [torch.cat(Ys, 1)], [torch.cat(M, 0)]
    z = torch.zeros(labels.shape[1], h * w)
    for f, y, m in zip(Fs, Ys, M, strict=True):
        A = f.T @ g.flatten(1) / s.temperature  # P x N
        masked = A.masked_fill(~m, -math.inf)
        for j in range(h * w):
            top, index = masked[:, j].topk(min(s.topk, len(masked)))
            over = {"topk": top, "region": masked[:, j], "frame": A[:, j]}[softmax]
            z[:, j] += y[:, index] @ (top - over.logsumexp(0)).exp()
    return (z / len(Fs)).view(-1, h, w)


def random_context(n, L, h, w, C=16, seed=0, relu=False):
    torch.manual_seed(seed)
    f = torch.randn(n + 1, C, h, w)
    f = F.normalize(f.relu() if relu else f, dim=1)
    return f[0], f[1:], torch.rand(n, L, h, w)


@pytest.mark.parametrize("aggregation", ["overall", "per-frame"])
@pytest.mark.parametrize("softmax", ["auto", "topk", "region", "frame"])
@pytest.mark.parametrize("region", ["none", "circle", "square", "exempt"])
def test_equals_the_papers_pseudocode(aggregation, softmax, region):
    for (h, w), (n, L), k in itertools.product([(7, 13), (14, 17)], [(1, 2), (3, 5)], [1, 4, 400]):
        s = Propagation(
            aggregation=aggregation,
            softmax=softmax,
            localization="none" if region == "none" else "fixed",
            shape="square" if region == "square" else "circle",
            exempt_first=region == "exempt",
            radius=4,
            topk=k,
            temperature=0.1,
        )
        g, features, labels = random_context(n, L, h, w)
        expected = algorithm_1(g, features, labels, s)
        assert (propagate_labels(g, features, labels, s) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("aggregation", ["overall", "per-frame"])
@pytest.mark.parametrize("softmax", ["topk", "region"])
@pytest.mark.parametrize("region", ["circle", "square", "exempt"])
@pytest.mark.parametrize("high", [3, 8, 30])
def test_blocks_as_a_gpu_searches_them_equal_the_pseudocode(high, region, softmax, aggregation, monkeypatch):
    """On the CPU: tiles of one block, of several, and with rows beyond them; regions beyond the grid on all sides."""
    shape = "square" if region == "square" else "circle"
    s = Propagation(aggregation=aggregation, softmax=softmax, shape=shape, temperature=0.1)
    real, searched = propagate.search_tile, []

    def search(part, query, s, tile):
        if not propagate.only_near(part, s):  # the annotated frame
            return real(part, query, s, tile)
        searched.append(tile)
        return propagate.search_blocks(part, query, s, tile)

    monkeypatch.setattr(propagate, "search_tile", search)
    boxes = [propagate.Box(*rows, *columns) for rows in common.cuts(21, high) for columns in common.cuts(19, 7)]
    monkeypatch.setattr(propagate, "tiles", lambda *_: boxes)
    for n, radius, k in itertools.product([1, 3], [1, 4, 12], [1, 10]):
        s = replace(s, exempt_first=region == "exempt", radius=radius, topk=k)
        g, features, labels = random_context(n, 3, 21, 19)
        expected = algorithm_1(g, features, labels, s)
        assert (propagate_labels(g, features, labels, s) - expected).abs().max() < 1e-5
    assert set(searched) == set(boxes)


@pytest.mark.parametrize("radius", [40, 200, 10_000])
def test_a_large_region_takes_no_more_of_a_gpu_than_the_whole_grid(radius):
    sizes = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            sizes.extend([result.numel()] if isinstance(result, torch.Tensor) and result.is_cuda else [])
            return result

    with torch.no_grad(), FakeTensorMode(), Spy():
        keys = torch.empty(135, 240, 21, 64, device="cuda")
        labels = torch.empty(135, 240, 21, 2, device="cuda")
        s = Propagation(radius=radius)
        propagate_labels(keys[:, :, 0].permute(2, 0, 1), keys.permute(2, 3, 0, 1), labels.permute(2, 3, 0, 1), s)
    assert max(sizes) <= 2**28 * 1.1


@pytest.mark.parametrize(("grid", "most"), [((60, 107), 1), ((135, 240), 6), ((270, 480), 24)])
@pytest.mark.filterwarnings("ignore:.*meta")
def test_a_gpu_has_few_tiles_that_fit_its_memory(grid, most):
    s = Propagation()
    with torch.no_grad(), FakeTensorMode():
        keys = torch.empty(*grid, 21, 256, device="cuda")
        part = propagate.Part(0, keys, True)
        tiles = propagate.tiles([part], s, grid)
        assert sum(math.prod(tile.shape) for tile in tiles) == math.prod(grid) and len(tiles) <= most
        best, cell, frame, _ = propagate.search_blocks(part, keys[:, :, 0], s, tiles[0])
        assert best.shape == cell.shape == frame.shape == (s.topk, math.prod(tiles[0].shape))
        *_, outside = propagate.block_regions(s, tiles[0], grid, keys.device)
    assert outside.numel() * propagate.BLOCK * propagate.COLUMNS * 21 <= 2**28 * 1.2  # affinities at a time


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_any_number_of_context_frames(n):
    g, features, labels = random_context(n, 3, 9, 14, relu=True)
    for s in (Propagation(radius=3), Propagation(radius=3, aggregation="per-frame", topk=5)):
        expected = algorithm_1(g, features, labels, s)
        assert (propagate_labels(g, features, labels, s) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("onednn", [math.inf, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_same_either_way(onednn, dtype, monkeypatch):
    """oneDNN's in pieces of 512 cells, the last one smaller; into places that lie apart."""
    monkeypatch.setattr(common, "ONEDNN", onednn)
    torch.manual_seed(0)
    keys, queries = torch.randn(9000, 24).to(dtype), torch.randn(300, 24).to(dtype)
    out = torch.full((9000, 400), 7.0, dtype=dtype)
    common.products(keys, queries, out[:, 50:350])
    expected = keys.double() @ queries.double().T
    assert (out[:, 50:350] - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)
    assert (out[:, :50] == 7).all() and (out[:, 350:] == 7).all()


@pytest.mark.parametrize("onednn", [math.inf, 512])
def test_equals_the_pseudocode_either_way(onednn, monkeypatch):
    monkeypatch.setattr(common, "ONEDNN", onednn)
    real, sizes = common.products, []
    monkeypatch.setattr(propagate, "products", lambda *args, out: sizes.append(len(out)) or real(*args, out=out))
    g, features, labels = random_context(24, 2, 40, 30)
    s = Propagation(radius=9)
    assert (propagate_labels(g, features, labels, s) - algorithm_1(g, features, labels, s)).abs().max() < 1e-5
    assert max(sizes) > 512  # cells; fewer never go to oneDNN


def test_onednn_keeps_few_compiled_products(monkeypatch):
    """It keeps one for each shape: in a run those of all lengths together took a GiB."""
    lengths = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_linear_pointwise" in str(function):
                lengths.add(len(args[0]))
            return function(*args, **kwargs or {})

    monkeypatch.setattr(common, "ONEDNN", 512)
    queries = torch.randn(64, 16)
    with torch.no_grad(), Spy():
        for cells in (30, 512, 700, 1134, 2000):
            common.products(torch.randn(cells, 16), queries, torch.empty(cells, 64))
    assert lengths == {512}


def test_many_labels_and_two_annotated_frames():
    g, features, labels = random_context(4, 60, 8, 9)
    s = Propagation(radius=2, exempt_first=True)
    expected = algorithm_1(g, features, labels, s, annotated=2)
    assert (propagate_labels(g, features, labels, s, annotated=2) - expected).abs().max() < 1e-5


def test_large_window_is_cut_into_small_tiles():
    """A window of the whole frame over many frames: tiles shrink, results do not change."""
    g, features, labels = random_context(600, 2, 25, 24, C=6)  # 360,000 entries: above 2**26 at 192 cells a tile
    s = Propagation(localization="none", topk=3, temperature=0.1)
    z = propagate_labels(g, features, labels, s)
    for row, column in [(0, 0), (12, 10), (24, 23)]:
        affinity = torch.einsum("nchw,c->nhw", features, g[:, row, column]).flatten() / s.temperature
        best, index = affinity.topk(3)
        expected = labels.permute(1, 0, 2, 3).flatten(1)[:, index] @ best.softmax(0)
        assert (z[:, row, column] - expected).abs().max() < 1e-5


def test_equal_affinities_copy_equal_labels():
    """All affinities tie: whichever neighbours are kept, labels that agree come through unchanged."""
    labels = torch.rand(3, 1, 1, 1).expand(3, 4, 9, 11).clone()
    labels[:] = torch.rand(4, 1, 1)
    features = torch.ones(3, 8, 9, 11)
    for aggregation in ("overall", "per-frame"):
        s = Propagation(aggregation=aggregation, softmax="topk", radius=3)
        assert torch.allclose(propagate_labels(features[0], features, labels, s), labels[0], atol=1e-6)


def test_on_real_features(shared, imagenet):
    from propagate import Video

    video = Video(shared / "data/DAVIS/JPEGImages/480p/dog")
    s = Propagation(size="120", radius=5)
    encoder = load_encoder("imagenet", imagenet, settings=s)
    with torch.inference_mode():
        f = torch.stack([encoder(torch.from_numpy(frame)[None])[0] for _, frame in video.frames([0, 1, 2, 3])])
    assert f.shape[2:] == s.grid(*video.size) == (15, 27)
    labels = torch.rand(3, 2, 15, 27)
    for s in (Propagation(radius=5), Propagation(radius=5, aggregation="per-frame", temperature=0.025)):
        assert (propagate_labels(f[3], f[:3], labels, s) - algorithm_1(f[3], f[:3], labels, s)).abs().max() < 1e-5


@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_context_is_the_first_frame_and_the_latest_n(context):
    """Against a plain list of frames: no duplicates while the video is young, the ring holds the latest after."""
    torch.manual_seed(0)
    frames = F.normalize(torch.randn(8, 6, 5, 7), dim=1)
    first = torch.rand(2, 5, 7)
    s = Propagation(context=context, radius=3, topk=4)
    known, expected = [(frames[0], first)], []
    for f in frames[1:]:
        chosen = known[:1] + known[1:][max(0, len(known) - 1 - context) :]
        z = algorithm_1(f, torch.stack([c[0] for c in chosen]), torch.stack([c[1] for c in chosen]), s)
        known.append((f, z))
        expected.append(z)
    got = list(propagate_video(iter(frames[1:]), [(frames[0], first)], s))
    assert len(got) == 7
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, expected, strict=True))
    # Going on from the middle gives the same as not having stopped.
    again = list(propagate_video(iter(frames[5:]), known[:1], s, recent=known[1:5]))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(again, expected[4:], strict=True))


@pytest.mark.parametrize("factors", [{}, {"exempt_first": True}, {"aggregation": "per-frame"}, {"keep_first": False}])
def test_annotations_that_name_some_objects(factors):
    """Against a plain list of frames: the named labels are laid over the prediction, the frame stays for good."""
    torch.manual_seed(0)
    frames = F.normalize(torch.randn(12, 6, 5, 7), dim=1)
    first, s = torch.rand(4, 5, 7), Propagation(context=3, radius=3, topk=4, **factors)
    named = torch.tensor([False, False, True, True])
    square = torch.zeros(4, 5, 7)
    square[2, 1:3, 2:5], square[3, 3:, :2] = 1, 0.5
    given = {3: (square, named), 8: (square.flip(2), named)}
    pinned, latest, expected = [(frames[0], first)], [], []
    if not s.keep_first:
        pinned, latest = [], pinned
    for t, f in enumerate(frames[1:], 1):
        chosen = pinned + [(g, z) for g, z in latest[-3:] if g is not None]
        features, labels = (torch.stack(each) for each in zip(*chosen, strict=True))
        z = algorithm_1(f, features, labels, s, annotated=len(pinned))
        latest.append((f, z))
        if t in given:
            z[0] += z[2:].sum(0)  # what a named object leaves is background
            z = torch.where(named[:, None, None], given[t][0], z * (1 - given[t][0][2:].sum(0)))
            latest[-1] = (f, z)
            if s.keep_first:
                latest[-1] = None, None
                pinned.append((f, z))
        expected.append(z)
    got = list(propagate_video(iter(frames[1:]), [(frames[0], first)], s, given=given))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, expected, strict=True))
    assert (got[2][2:] == square[2:]).all() and (got[2][:2, 1:3, 2:5] == 0).all()


def test_hindsight_finds_a_late_object_in_the_background_alone():
    """The same frame twice, once before object 2 was known: it gets what was background, and nothing of object 1."""
    torch.manual_seed(0)
    f, s = F.normalize(torch.randn(6, 5, 7), dim=0), Propagation(topk=1)
    before, after = torch.zeros(2, 3, 5, 7)
    before[1, 1:3, :3], after[2, 2:4, 1:6] = 1, 1
    before[0], after[0] = 1 - before.sum(0), 1 - after.sum(0)
    z = hindsight(f, before, (f, after), torch.tensor([False, False, True]), s)
    assert torch.equal(z[1], before[1]) and torch.equal(z[2], after[2] * before[0])
    assert torch.equal(z.sum(0), torch.ones(5, 7))
    assert torch.equal(hindsight(f, before, (f, after), torch.tensor([False] * 3), s), before)


def test_targets_are_pulled_one_at_a_time():
    """So that several settings can share one pass over the features."""
    frames = F.normalize(torch.randn(5, 4, 6, 6), dim=1)
    pulled = []
    labels = propagate_video((pulled.append(i) or f for i, f in enumerate(frames)), [(frames[0], torch.rand(2, 6, 6))],
                             Propagation(radius=2))  # fmt: skip
    for i, _ in enumerate(labels):
        assert pulled == list(range(i + 1))


def test_labels_on_the_grid_and_back():
    mask = torch.zeros(96, 160, dtype=torch.uint8)
    mask[16:64, 40:120], mask[70:90, 8:40] = 7, 200
    labels = labels_from_mask(mask, [7, 200], (12, 20))
    assert labels.shape == (3, 12, 20)
    assert torch.allclose(labels.sum(0), torch.ones(12, 20))
    back = mask_from_labels(labels, [7, 200], (96, 160))
    assert back.dtype == torch.uint8 and set(back.unique().tolist()) == {0, 7, 200}
    assert (back == mask).float().mean() > 0.97


def test_mask_from_labels_is_the_same_in_chunks():
    torch.manual_seed(0)
    labels, ids = torch.rand(20, 6, 9), list(range(1, 20))
    for minmax in (False, True):
        whole = mask_from_labels(labels, ids, (41, 67), minmax, chunk=20)
        chunked = mask_from_labels(labels, ids, (41, 67), minmax, chunk=3)
        assert (whole != chunked).sum() <= 2  # but for two labels that are equal up to rounding


def test_minmax_lets_a_faint_label_win_and_an_absent_one_not():
    labels = torch.zeros(3, 4, 4)
    labels[0], labels[1, 0, 0] = 0.9, 0.2
    labels[0, 0, 0] = 0.8
    assert mask_from_labels(labels, [1, 2], (4, 4)).sum() == 0
    stretched = mask_from_labels(labels, [1, 2], (4, 4), minmax=True)
    assert stretched[0, 0] == 1 and (stretched == 2).sum() == 0


def test_on_a_gpu_far_frames_wait_for_nothing():
    """A value that is read back from the GPU is an error for fake tensors."""
    s = replace(find_system("mast").settings, radius=3)
    with torch.no_grad(), FakeTensorMode(), torch.device("cuda"):
        context = torch.zeros(16, 12, 20), torch.zeros(2, 16, 12, 20), torch.zeros(2, 3, 12, 20)
        assert propagate_labels(*context, s, 1, [40, 1]).shape == (3, 12, 20)


@pytest.mark.parametrize("model", ["imagenet", "default", "crw", "mast", "corrflow", "uvc", "vfs"])
@pytest.mark.parametrize(
    "factors",
    [{}, {"aggregation": "per-frame"}, {"localization": "window"}, {"localization": "none", "minmax": True}],
    ids=lambda factors: ",".join(factors) or "own",
)
@pytest.mark.filterwarnings("ignore:.*meta")
def test_on_a_gpu_everything_stays_there(model, factors):
    """No GPU is needed: fake tensors have shapes and a device alone, and one that is still on the CPU among those of
    the GPU is an error."""
    own = find_system(model).settings
    if own.localization == "track":  # its boxes are computed on the CPU
        own = replace(own, localization="fixed")
    settings = replace(own, **{"context": 2} | factors)
    row = find_system(model)
    with torch.no_grad(), FakeTensorMode():
        with torch.device("cuda"):  # what follows must find the device by itself
            encoder = common.Encoder(common.build_net(row, settings).eval(), settings, row)
            frames = torch.zeros(5, 1, 96, 160, 3, dtype=torch.uint8)
            annotation = torch.zeros(96, 160, dtype=torch.uint8)
        for part in [encoder, *([encoder.colours] if encoder.colours else [])]:
            for name, buffer in list(part.named_buffers(recurse=False)):
                part.register_buffer(name, buffer.cuda(), persistent=False)
        features = (encoder(frame)[0] for frame in frames)
        first = labels_from_mask(annotation, [1, 2], settings.grid(96, 160))
        for labels in propagate_video(features, [(next(features), first)], settings):
            mask = mask_from_labels(labels, [1, 2], (96, 160), settings.minmax)
            assert labels.device.type == mask.device.type == "cuda" and mask.shape == (96, 160)
