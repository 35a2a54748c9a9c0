"""Images per second: Parquet through our store against torchvision's ImageFolder, both in torch's DataLoader.

    python experiments/benchmarks/data_speed.py --images A.parquet [--processes 2] [--batch 64]

The same pictures, transforms, batch and number of processes; the two take turns, in one run. Small images
are those of the Parquet file as they are; large ones are the same scaled up to ImageNet's usual size and
saved as JPEG (500×375). Peak memory of a process that reads our store is told for a set and for ten times as
many images. The last line sums up; the exit status is 1 when a stated ratio is missed.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from trainers.config.training import AugmentSettings
from trainers.data import datasets as data
from trainers.data.augment import Augment, Normalise
from trainers.sources.convert import convert, plan

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
KINDS = {"32² JPEG": (12000, 32, 1.3), "500×375 JPEG to 224²": (1200, 224, 1.0)}


def write_folder(images: Path, folder: Path, count: int, side: int) -> None:
    """Pictures in class folders."""
    rows = pq.read_table(images).slice(0, count).to_pylist()
    for number, row in enumerate(rows):
        class_folder = folder / f"{row['label']:03d}"
        class_folder.mkdir(parents=True, exist_ok=True)
        if side == 32:
            (class_folder / f"{number:05d}.jpg").write_bytes(row["image"]["bytes"])
            continue
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        picture.resize((500, 375), Image.Resampling.BICUBIC).save(
            class_folder / f"{number:05d}.jpg", quality=90
        )


def config(side: int) -> dict[str, Any]:
    return {"input_size": (3, side, side), "mean": MEAN, "std": STD}


def augment(side: int) -> AugmentSettings:
    """Training's crop and flip."""
    return AugmentSettings(scale=(0.08, 1.0) if side > 32 else None, flip=0.5)


def theirs_as_usual(side: int) -> transforms.Compose:
    """The same, as torchvision's users write it."""
    crop = transforms.RandomResizedCrop(side, interpolation=transforms.InterpolationMode.BICUBIC)
    first = crop if side > 32 else transforms.Resize(side)
    flip = transforms.RandomHorizontalFlip(0.5)
    return transforms.Compose([first, flip, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def normalised(batches: Iterable[Any], side: int) -> Iterator[Tensor]:
    """Our batches as the model takes them."""
    normalise = Normalise(config(side), augment(side), torch.device("cpu"))
    for pixels, rectangles, *_ in batches:
        yield normalise(pixels, rectangles)


def rate(batches: Iterable[Tensor]) -> float:
    """Images per second of one pass, from the first batch on (processes have started by then)."""
    began, images = 0.0, 0
    for batch in batches:
        if not began:
            began = time.perf_counter()
        else:
            images += len(batch)
    return images / (time.perf_counter() - began)


def compare(images: Path, kind: str, args: argparse.Namespace) -> float:
    count, side, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as scratch:
        folder, target = Path(scratch, "folder"), Path(scratch, "parquet")
        write_folder(images, folder, count, side)
        list(convert(plan(folder), target, args.processes))
        theirs = DataLoader(
            ImageFolder(str(folder), theirs_as_usual(side)),
            args.batch,
            shuffle=True,
            num_workers=args.processes,
            persistent_workers=args.processes > 0,
        )
        table = data.images(str(target), data.eval_transform(config(side)), key="images")
        drawn = Augment(config(side), augment(side))
        ours, sampler = data.train_loader(
            table, drawn, args.batch, rank=0, world=1, seed=0, processes=args.processes
        )
        rates: dict[str, list[float]] = {"theirs": [], "ours": []}
        for turn in range(args.rounds):
            rates["theirs"].append(rate(images for images, _ in theirs))
            sampler.start(turn)
            rates["ours"].append(rate(normalised(ours, side)))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    ratio = medians["ours"] / medians["theirs"]
    print(
        f"{kind}, {args.processes} processes: ImageFolder {medians['theirs']:,.0f} images/s, "
        f"ours {medians['ours']:,.0f}: {ratio:.2f} (≥ {KINDS[kind][2]})",
        flush=True,
    )
    return ratio


def memory(images: Path, times: int) -> float:
    """Peak megabytes that a process takes to read every image of a set."""
    with tempfile.TemporaryDirectory() as folder:
        rows = pq.read_table(images).slice(0, 3000)
        for number in range(times):
            pq.write_table(rows, Path(folder, f"{number:03d}.parquet"))
        command = [sys.executable, __file__, "--read", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def read_all(folder: str) -> None:
    """Decode every image, and print the memory that it took: anonymous, as mapped files can be dropped."""
    torch.set_num_threads(1)

    def anonymous() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    pa.array([1])
    before = most = anonymous()
    table = data.images(folder, data.eval_transform(config(32)), key="images")
    for index in range(0, len(table)):
        _ = table[index]
        if index % 500 == 0:
            most = max(most, anonymous())
    print(max(most, anonymous()) - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_all(args.read)
        return
    if args.images is None:
        parser.error("--images is needed")
    torch.set_num_threads(1)  # the processors are for those who decode
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ESPALIER_CACHE"] = cache
        ratios = {kind: compare(args.images, kind, args) for kind in KINDS}
        small, large = memory(args.images, 5), memory(args.images, 50)
    print(f"memory to read a set: {small:.0f} MB, of ten times as many images: {large:.0f} MB")
    missed = [kind for kind, ratio in ratios.items() if ratio < KINDS[kind][2]]
    if large > 1.25 * small + 16:
        missed.append("memory")
    summary = "; ".join(f"{kind} {ratio:.2f}×" for kind, ratio in ratios.items())
    print(
        f"{summary}; memory {large - small:+.0f} MB for ten times as many"
        + (f"; missed: {missed}" if missed else "")
    )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
