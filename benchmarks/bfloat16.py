"""What --dtype bfloat16 costs in J&F, on any CPU; the table is kept in bfloat16.md.

    python benchmarks/bfloat16.py --data DAVIS [--imagenet WEIGHTS] [--out FOLDER]

A CPU without bfloat16 converts each number and takes half a minute a frame. Here the products (convolutions and
affinities) are computed as a CPU with bfloat16 computes them: of rounded numbers, summed in float32, the sum rounded.
All else is PyTorch's own bfloat16. Scores are evaluate.py's, in FOLDER/<model>-<dtype>; what is there is not run again.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import evaluate
import propagate


@dataclass
class Args:
    data: Path
    """A data set in DAVIS's layout."""
    imagenet: Path | None = None
    """ImageNet weights of a ResNet-18: a second row."""
    out: Path = Path("results/bfloat16")
    """Folder for the masks and scores."""


conv2d, products = F.conv2d, propagate.products


def rounded_conv2d(x, weight, bias=None, *rest):
    if x.dtype != torch.bfloat16:
        return conv2d(x, weight, bias, *rest)
    return conv2d(x.float(), weight.float(), None if bias is None else bias.float(), *rest).bfloat16()


def rounded_products(keys, queries, out):
    if keys.dtype != torch.bfloat16:
        return products(keys, queries, out)
    return out.copy_(keys.float() @ queries.float().T)


def scores(args: Args, model: str, weights: Path | None, dtype: str) -> dict[str, float]:
    """J&F in percent: of each sequence, and of all objects."""
    out = args.out / f"{model}-{dtype}"
    flags = ["--dataset", "davis", "--data", str(args.data), "--model", model, "--dtype", dtype, "--out", str(out)]
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):  # evaluate.py ends by one
        evaluate.main(evaluate.parse_args([*flags, *(["--weights", str(weights)] if weights else [])]))
    row = json.loads((out / "scores.json").read_text())
    names = {name: each["J&F_M"] for name, each in row["per_sequence"].items()} | {"all": row["overall"]["J&F_M"]}
    return {name: 100 * value for name, value in names.items()}


def main(args: Args) -> None:
    F.conv2d, propagate.products = rounded_conv2d, rounded_products
    lines = []
    for model, weights in {"default": None, "imagenet": args.imagenet}.items():
        if model == "imagenet" and not weights:
            continue
        full, half = (scores(args, model, weights, dtype) for dtype in ("float32", "bfloat16"))
        lines = lines or ["| | " + " | ".join(full) + " |", "|---|" + "---|" * len(full)]
        for name, row in (("float32", full), ("bfloat16", half)):
            lines.append(f"| {model}, {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")
    table = "\n".join(lines)
    print(table)
    command = "python benchmarks/bfloat16.py --data DAVIS" + " --imagenet WEIGHTS" * bool(args.imagenet)
    text = f"J&F by `{command}` (torch {torch.__version__}).\n\n{table}\n"
    (Path(__file__).parent / "bfloat16.md").write_text(text)


if __name__ == "__main__":
    common.run(main, lambda: tyro.cli(Args))
