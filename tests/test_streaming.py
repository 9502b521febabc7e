"""Images that are read while training: what a network sees, that nothing depends on who reads, and what damage does."""

import dataclasses
import io
import json
import logging
import math
import os
import pickle
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wnq.data import Augment, Dataset, StreamedImages, batches_of, load_data, unreadable_images
from wnq.data.crops import centre, random_box, random_part, rgb
from wnq.data.workers import default_workers
from wnq.recipe import load_run, recipe_from, run_recipe
from wnq.train import Interrupted

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
TRAINING: dict[str, Any] = {**PLAIN, "augment": Augment(flip=True), "shuffle": True, "seed": 3, "drop_last": True}
BROKEN, TRUNCATED = "train/bird/05.jpg", "train/cat/03.jpg"


def picture(rng: random.Random, width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / rng.uniform(3, 9)) * np.cos(y / rng.uniform(3, 9)) for _ in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), random.Random(0)
    for split, count in (("train", 15), ("val", 4)):
        for name in ("bird", "cat", "dog"):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                image = picture(rng, rng.randint(20, 60), rng.randint(20, 60))
                (place / f"{number:02}.jpg").write_bytes(encoded(image, "JPEG", quality=90))
    for mode, name in (("L", "grey.jpg"), ("CMYK", "print.jpg"), ("RGBA", "clear.png"), ("P", "palette.png")):
        picture(rng, 40, 30).convert(mode).save(root / "train" / "dog" / name)
    (root / BROKEN).write_bytes(b"no image at all")
    (root / TRUNCATED).write_bytes((root / TRUNCATED).read_bytes()[:-200])
    return root


def load(folder: Path, workers: int = 0, **options: Any) -> Dataset:
    return load_data(str(folder), stream=True, size=12, workers=workers, **options)


@pytest.fixture
def train(folder: Path) -> StreamedImages:
    return load(folder).train


def seen(split: StreamedImages, epoch: int = 1, start: int = 0, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(batches_of(split, 8, **{**TRAINING, **options}).epoch(epoch, start))


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


# What a network sees


def test_evaluation_sees_the_centre_of_the_scaled_image(folder: Path):
    data = load(folder)
    batches = batches_of(data.val, 5, mean=data.mean, std=data.std)
    images, labels = (torch.cat(part) for part in zip(*batches.epoch(0), strict=True))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and data.val.classes == ("bird", "cat", "dog")
    assert (data.val.resize, batches.steps_per_epoch, len(batches)) == (14, 3, 12)
    for path, seen_image in zip(sorted((folder / "val").rglob("*.jpg")), images, strict=True):
        image = Image.open(path)
        scale = 14 / min(image.size)
        size = [14 if side == min(image.size) else math.floor(side * scale + 1e-9) for side in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = round((image.width - 12) / 2), round((image.height - 12) / 2)
        pixels = np.asarray(image.crop((left, top, left + 12, top + 12))) / 255
        # The published statistics of ImageNet, typed here once more.
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(seen_image.permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_training_sees_a_random_part(flip: bool):
    data = encoded(picture(random.Random(1), 70, 50), "PNG")
    mirrored = 0
    for seed in range(20):
        found = random_part(data, 12, flip, random.Random(seed))
        rng = random.Random(seed)
        mirror = rng.random() < 0.5 and flip
        left, top, width, height = random_box(70, 50, rng)
        part = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((12, 12), Image.Resampling.BILINEAR))
        assert np.array_equal(found, expected[:, ::-1] if mirror else expected)
        mirrored += mirror
    assert 4 < mirrored < 16 if flip else mirrored == 0


def test_random_parts_have_the_published_areas_and_ratios():
    rng = random.Random(0)
    boxes = np.array([random_box(400, 300, rng) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 400).all() and (top + height <= 300).all()
    share, ratio = width * height / 120_000, width / height
    assert 0.079 < share.min() < 0.09 and 0.9 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.29 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.05  # large upright parts do not fit and are drawn again
    small = share[share < 0.5]  # these fit with any ratio, so they are uniform; 2,000 draws: standard error 0.003
    assert small.mean() == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
    assert np.corrcoef(left / np.maximum(400 - width, 1), top / np.maximum(300 - height, 1))[0, 1] < 0.1
    # No part of these fits: the largest central one within the ratios.
    assert random_box(100, 5, rng) == (46, 0, 7, 5) and random_box(5, 100, rng) == (0, 46, 5, 7)


def test_large_jpegs_are_decoded_smaller_without_changing_the_part():
    image = picture(random.Random(2), 120, 90).resize((1200, 900))  # no finer than photographs are
    data = encoded(image, "JPEG", quality=95)
    reopened = Image.open(io.BytesIO(data)).convert("RGB")
    differences: list[float] = []
    for seed in range(8):
        quick = random_part(data, 32, False, random.Random(seed)).astype(int)
        rng = random.Random(seed)
        rng.random()  # for the mirroring
        left, top, width, height = random_box(1200, 900, rng)
        part = reopened.crop((left, top, left + width, top + height))
        full = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        differences.append(np.abs(quick - full).mean())
    # Of 255; decoded at no more than twice the result's size, the mean would be 1.2, and less than its size far more.
    assert min(differences) > 0 and sum(differences) / 8 < 0.8


def test_modes_become_rgb():
    colour = (200, 100, 50)
    for mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        pixels = np.asarray(rgb(Image.new("RGB", (4, 4), colour).convert(mode, palette=Image.Palette.ADAPTIVE)))
        assert pixels.shape == (4, 4, 3) and np.abs(pixels[0, 0].astype(int) - colour).max() <= 2, mode
    for mode, value in (("L", 77), ("LA", (77, 3)), ("1", 1), ("F", 77.0), ("I", 77)):
        pixels = np.asarray(rgb(Image.new(mode, (4, 4), value)))
        assert pixels.shape == (4, 4, 3) and (pixels == (255 if mode == "1" else 77)).all(), mode
    deep = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    reopened = Image.open(io.BytesIO(encoded(Image.fromarray(deep), "PNG")))
    assert np.array_equal(np.asarray(rgb(reopened))[:, :, 1], deep // 256)
    with pytest.raises(OSError):
        centre(b"no image", 4, 4)


def test_16_bit_images_in_memory_keep_their_range(tmp_path: Path):
    for split in ("train", "val"):
        place = tmp_path / "data" / split / "a"
        place.mkdir(parents=True)
        Image.fromarray(np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)).save(place / "x.png")
    data = load_data(str(tmp_path / "data"), cache_dir=tmp_path / "cache")
    assert data.train.images.flatten().tolist() == list(range(0, 256, 16))


# The law: a function of seed, epoch and position


def test_batches_do_not_depend_on_who_reads(train: StreamedImages):
    here = seen(train)
    assert_same(here, seen(dataclasses.replace(train, workers=2)))
    assert_same(here, seen(pickle.loads(pickle.dumps(train))))


def test_resumed_epoch_sees_the_same_batches(train: StreamedImages):
    assert_same(seen(train)[3:], seen(train, start=3))
    with pytest.raises(ValueError, match=r"start_step must be in \[0, 6\], got 7"):
        seen(train, start=7)


def test_two_ranks_see_together_what_one_sees(train: StreamedImages):
    shares = [seen(train, rank=rank, world_size=2, drop_last=False) for rank in range(2)]
    together = [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in zip(*shares, strict=True)]
    assert_same(seen(train, drop_last=False), together)
    assert len(shares[0][-1][1]) == len(train) % 8 // 2


def test_epochs_and_seeds_differ_and_the_global_state_stays(train: StreamedImages):
    state = torch.get_rng_state()
    first = seen(train)[0][0]
    assert not torch.equal(first, seen(train, epoch=2)[0][0]) and not torch.equal(first, seen(train, seed=4)[0][0])
    assert torch.equal(state, torch.get_rng_state())
    in_order = [seen(train, epoch=epoch, shuffle=False)[0][0] for epoch in (1, 2)]
    assert not torch.equal(*in_order)


def test_memory_format_and_dtype(train: StreamedImages):
    images, _ = next(iter(batches_of(train, 4, **PLAIN, channels_last=True, dtype=torch.bfloat16).epoch(0)))
    assert images.dtype == torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)


# Damage


def test_unreadable_images_are_replaced_in_training_and_left_out_in_evaluation(folder: Path, caplog):
    train = load(folder).train
    with caplog.at_level(logging.WARNING, logger="wnq.data"):
        training = seen(train, drop_last=False)
        seen(train, epoch=2)
    assert sum(len(labels) for _, labels in training) == len(train) == 49
    found = unreadable_images(train)
    assert [Path(path).relative_to(folder).as_posix() for path in found] == [BROKEN, TRUNCATED]
    assert "format is not known" in found[str(folder / BROKEN)] and "truncated" in found[str(folder / TRUNCATED)]
    assert len(caplog.records) == 2  # once each, though every epoch meets them
    evaluated = list(batches_of(train, 8, **PLAIN).epoch(0))
    assert sum(len(labels) for _, labels in evaluated) == sum(len(images) for images, _ in evaluated) == 47


def test_too_many_unreadable_images_end_with_one_sentence(train: StreamedImages, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(train.source), "read", lambda *_: b"gone")
    for options in (TRAINING, PLAIN):
        with pytest.raises(ValueError, match=r"train: \d+ images cannot be read, more than 1 %, among them .*\.jpg \("):
            list(batches_of(train, 8, **options).epoch(0))


@pytest.mark.parametrize("allowed", [2, 1])
def test_an_epoch_may_meet_few(train: StreamedImages, allowed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnq.data.streaming.ALLOWED", allowed)
    if allowed == 2:
        seen(train, drop_last=False)
    else:
        with pytest.raises(ValueError, match="2 images cannot be read"):
            seen(train, drop_last=False)


class Deadly:
    """Kills the process that reads the last of eight images."""

    def where(self, position: int) -> str:
        return str(position)

    def read(self, position: int) -> bytes:
        if position == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return encoded(Image.new("RGB", (20, 20)), "PNG")


def test_killed_worker_ends_with_one_sentence(train: StreamedImages):
    split = dataclasses.replace(train.select(torch.arange(8)), source=Deadly(), workers=1)
    with pytest.raises(
        ChildProcessError, match=r"train: a process that reads images has died \(.*lower \[data\] workers"
    ):
        list(batches_of(split, 2, **PLAIN).epoch(0))


# Loading


def test_tables_give_the_same_batches(folder: Path, tmp_path: Path):
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["bird", "cat", "dog"])})
    for split, name in (("train", "train"), ("val", "validation"), ("val", "test")):
        paths = [path for label in features["label"].names for path in sorted((folder / split / label).iterdir())]
        rows = [{"bytes": path.read_bytes(), "path": None} for path in paths]
        labels = [-1 if name == "test" else features["label"].str2int(path.parent.name) for path in paths]
        plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
        table = Table.from_dict({"image": rows, "label": labels}, plain).cast(features) if name != "test" else None
        table = table or Table.from_dict({"image": rows, "label": labels}, plain)
        table.to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    options = {"stream": True, "size": 12, "workers": 2, "cache_dir": tmp_path / "cache"}
    data, plain_data = load_data("imagenet", folder=tmp_path, **options), load(folder)
    assert_same(seen(data.train), seen(plain_data.train))
    assert len(data.val) == 12 and data.val.classes == data.train.classes
    assert sorted(data.train.unreadable) == ["imagenet train row 18", "imagenet train row 5"]


def test_options_and_defaults(folder: Path):
    data = load_data(str(folder), stream=True)
    assert data.train.shape == (3, 224, 224) and data.val.resize == 256
    assert data.train.workers == default_workers() >= 1
    held = load(folder, val_share=0.2, limit=30)
    assert (len(held.train), len(held.val)) == (24, 6)
    for split in (held.train, held.val):
        paths = [Path(split.source.where(position)) for position in split.positions.tolist()]
        assert [split.classes.index(path.parent.name) for path in paths] == split.labels.tolist()
    assert load(folder, limit=30).train.positions.tolist() == load(folder, limit=30).train.positions.tolist()
    with pytest.raises(ValueError, match="train is streamed: its images are never all in memory"):
        _ = data.train.images
    with pytest.raises(ValueError, match="crop_padding is for images in memory, got 4"):
        batches_of(data.train, 8, **PLAIN, augment=Augment(4))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {"stream": True, "size": 32, "resize": 31}, "resize must be at least size, 32 pixels, got 31"),
        (None, {"stream": True, "workers": -1}, "workers must be 0 or more processes, got -1"),
        (None, {"workers": 2}, "set stream as well"),
        (None, {"size": 32, "memory_limit": 99}, r"pass stream=True \(\[data\] stream = true\)"),
        ("digits", {"stream": True}, "digits does not take stream"),
        ("imagenet", {}, "or stream=True"),
    ],
)
def test_bad_options_are_explained(folder: Path, name: str | None, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_data(name or str(folder), **options)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_workers() == 2


# Training


def make_recipe(folder: Path, workers: int):
    return recipe_from(
        {
            "model": {"name": "digits_cnn"},
            "data": {"name": str(folder), "stream": True, "size": 12, "workers": workers},
            "quantize": {"method": "wnq", "options": {"w_bits": 2, "a_bits": 2}},
            "train": {"epochs": 2, "batch_size": 16, "lr": 0.05, "flip": True, "bn_batches": 1},
        }
    )


def test_recipe_trains_stops_resumes_and_says_what_it_left_out(folder: Path, tmp_path: Path):
    whole, result = run_recipe(make_recipe(folder, 0), tmp_path / "whole")
    assert result.val.images == 12 and len(result.history) == 2

    def stop(progress: Any) -> None:
        if progress.epoch == 2 and progress.step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run_recipe(make_recipe(folder, 2), tmp_path / "parts", on_step=stop)
    resumed, _ = run_recipe(make_recipe(folder, 1), tmp_path / "parts", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for run in ("whole", "parts"):
        left_out = json.loads((tmp_path / run / "result.json").read_text())["unreadable"]
        assert left_out["count"] == 2
        assert sorted(left_out["images"]) == [str(folder / BROKEN), str(folder / TRUNCATED)]
    assert load_run(tmp_path / "whole")[0].data.stream
