import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wnq.data import Augment, Batches, Dataset, ImageData, load_data
from wnq.data.images import channel_statistics, hold_out
from wnq.data.tables import dataset_split

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def make_split(count: int = 50, size: int = 12, channels: int = 3, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return ImageData(images, torch.arange(count) % 5, tuple("abcde"))


def make_batches(data: ImageData, batch_size: int, **options) -> Batches:
    return Batches(data, batch_size, mean=MEAN, std=STD, **options)


def denormalize(images: Tensor) -> Tensor:
    std, mean = torch.tensor(STD).view(1, 3, 1, 1), torch.tensor(MEAN).view(1, 3, 1, 1)
    return ((images * std + mean) * 255).round().to(torch.uint8)


TRAINING = {"augment": Augment(3, flip=True), "shuffle": True, "seed": 7}


# Batches


def test_evaluation_is_sequential_complete_and_normalised():
    data = make_split(50)
    batches = make_batches(data, 16)
    images, labels = (torch.cat(part) for part in zip(*batches.epoch(0), strict=True))
    assert batches.steps_per_epoch == 4 and images.dtype == torch.float32
    assert torch.equal(labels, data.labels)
    expected = (data.images / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    # The multiply-add form rounds differently by some units in the last place.
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop_last", [False, True])
def test_resumed_epoch_sees_exactly_the_same_batches(drop_last: bool):
    data = make_split(50)
    whole = list(make_batches(data, 8, drop_last=drop_last, **TRAINING).epoch(3))
    resumed = list(make_batches(data, 8, drop_last=drop_last, **TRAINING).epoch(3, start_step=4))
    assert len(whole) == (6 if drop_last else 7) and len(resumed) == len(whole) - 4
    for (images, labels), (images_again, labels_again) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


def test_batches_ignore_and_keep_the_global_random_state():
    data = make_split(50)
    torch.manual_seed(0)
    first = [images for images, _ in make_batches(data, 8, **TRAINING).epoch(0)]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = [images for images, _ in make_batches(data, 8, **TRAINING).epoch(0)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_epochs_and_seeds_differ_in_order_and_augmentation():
    data = make_split(50)

    def order(seed: int, epoch: int) -> Tensor:
        options = TRAINING | {"seed": seed}
        return torch.cat([images for images, _ in make_batches(data, 8, **options).epoch(epoch)])

    assert not torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))
    # A sum of seed and epoch would make these two the same.
    assert not torch.equal(order(0, 1), order(1, 0))


def test_shuffled_epoch_holds_every_image_once():
    data = make_split(50)
    images = torch.cat([images for images, _ in make_batches(data, 8, shuffle=True).epoch(0)])
    order = {tuple(image.flatten().tolist()): index for index, image in enumerate(data.images)}
    seen = [order[tuple(image.flatten().tolist())] for image in denormalize(images)]
    assert sorted(seen) == list(range(50)) and seen != list(range(50))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_union_of_the_ranks_is_the_single_process_batch(world_size: int, training: bool):
    data = make_split(50)
    options = TRAINING if training else {}
    single = list(make_batches(data, 8, **options).epoch(2))
    ranks = [list(make_batches(data, 8, rank=r, world_size=world_size, **options).epoch(2)) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(single)}
    for step, (images, labels) in enumerate(single):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), labels)
    assert all(len(rank[0][1]) == 8 // world_size for rank in ranks)


def test_ranks_beyond_the_last_images_get_an_empty_batch():
    data = make_split(9)
    last = [list(make_batches(data, 8, rank=r, world_size=4).epoch(0))[-1] for r in range(4)]
    assert sorted(len(labels) for _, labels in last) == [0, 0, 0, 1]
    assert all(images.shape[1:] == (3, 12, 12) for images, _ in last)


@pytest.mark.parametrize("pad_mode", ["reflect", "zero"])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_every_augmented_image_is_a_crop_of_its_padded_original(pad_mode: str, padding: int, flip: bool):
    data = make_split(60, size=9)
    augment = Augment(padding, flip=flip, pad_mode=pad_mode)
    images = torch.cat([images for images, _ in make_batches(data, 16, augment=augment).epoch(0)])
    mode = {"reflect": "reflect", "zero": "constant"}[pad_mode]
    widths = ((0, 0), (padding, padding), (padding, padding))
    found: set[tuple[int, int, bool]] = set()
    for original, augmented in zip(data.images, denormalize(images), strict=True):
        padded = torch.from_numpy(np.pad(original.numpy(), widths, mode=mode))
        matches = [
            (top, left, flipped)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for flipped in ({False, flip})
            if torch.equal(
                padded[:, top : top + 9, left : left + 9].flip(2)
                if flipped
                else padded[:, top : top + 9, left : left + 9],
                augmented,
            )
        ]
        # Two where a reflection makes the crop its own mirror image.
        assert len(matches) in (1, 2)
        found.add(matches[0])
    possible = (2 * padding + 1) ** 2 * (2 if flip else 1)
    # 60 draws from at most 162 places: far more than half of the number that distinct draws could reach.
    assert len(found) >= min(possible, 60) * 0.5


def test_crops_and_flips_are_uniform():
    data = make_split(20_000, size=3)
    batches = make_batches(data, 100, augment=Augment(1, flip=True), shuffle=True, seed=1)
    drawn = batches.draw(0)
    for draws, values in ((drawn.down, (-1, 0, 1)), (drawn.right, (-1, 0, 1)), (drawn.flip, (0, 1))):
        shares = torch.stack([(draws == value).float().mean() for value in values])
        # Standard error 0.0035: five of them.
        assert (shares - 1 / len(values)).abs().max() < 0.018


def test_memory_format_and_dtype():
    data = make_split(20)
    plain = next(make_batches(data, 8).epoch(0))[0]
    other = next(make_batches(data, 8, channels_last=True, dtype=torch.bfloat16).epoch(0))[0]
    assert plain.is_contiguous() and other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.to(torch.bfloat16), other)


def test_the_images_are_not_changed():
    data = make_split(20)
    before = data.images.clone()
    for _ in make_batches(data, 8, augment=Augment(2, flip=True, pad_mode="zero")).epoch(0):
        pass
    assert torch.equal(data.images, before)


def test_the_whole_set_stays_uint8():
    batches = make_batches(make_split(20), 8, **TRAINING)
    kept = [*vars(batches).values(), *vars(batches._normalize).values()]
    held = [value for value in kept if isinstance(value, Tensor) and value.is_floating_point()]
    assert sum(value.numel() for value in held) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "world_size": 2}, "positive multiple of world_size 2, got 9"),
        ({"batch_size": 0}, "positive multiple of world_size 1, got 0"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "got rank 2 of 2"),
        ({"batch_size": 64, "drop_last": True}, "batch_size is 64 but there are 50 images"),
        ({"batch_size": 4, "augment": Augment(12)}, "crop_padding 12 must be less than the image size 12x12"),
        ({"batch_size": 4, "mean": (0.5,)}, "need 3 values"),
        ({"batch_size": 4, "std": (0.5, 0.0, 0.5)}, "std must be greater than 0"),
    ],
)
def test_arguments_that_do_not_fit(options: dict, message: str):
    options = {"mean": MEAN, "std": STD} | options
    with pytest.raises(ValueError, match=message):
        Batches(make_split(50), **options)


def test_augment_and_start_step_are_checked():
    with pytest.raises(ValueError, match="0 or more pixels, got -1"):
        Augment(-1)
    with pytest.raises(ValueError, match="reflect, zero, got 'mirror'"):
        Augment(1, pad_mode="mirror")
    with pytest.raises(ValueError, match=r"start_step must be in \[0, 7\], got 8"):
        make_batches(make_split(50), 8).epoch(0, start_step=8)


def test_image_data_is_checked():
    data = make_split(4)
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        ImageData(data.images.float(), data.labels, data.classes)
    with pytest.raises(ValueError, match="contiguous"):
        ImageData(data.images.permute(0, 1, 3, 2), data.labels, data.classes)
    with pytest.raises(ValueError, match="4 images need as many labels"):
        ImageData(data.images, data.labels[:3], data.classes)
    with pytest.raises(ValueError, match="labels run from 0 to 3 but there are 2 classes"):
        ImageData(data.images, data.labels, ("a", "b"))


# Statistics and splits


def test_channel_statistics_are_those_of_numpy():
    images = make_split(40).images
    mean, std = channel_statistics(images)
    scaled = images.numpy() / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std((0, 2, 3)), rtol=1e-12)


def test_constant_channel_has_a_usable_deviation():
    mean, std = channel_statistics(torch.full((3, 1, 4, 4), 51, dtype=torch.uint8))
    assert mean == pytest.approx((0.2,)) and std == (1 / 255,)


def test_hold_out_is_stratified_and_repeatable():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 2 + [3])
    kept, held = hold_out(labels, 0.2)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(labels)))
    assert labels[held].bincount(minlength=4).tolist() == [20, 10, 1, 0]
    assert torch.equal(hold_out(labels, 0.2)[1], held)
    assert not torch.equal(hold_out(labels, 0.2, seed=1)[1], held)


def test_digits():
    data = load_data("digits")
    assert data.train.images.shape[1:] == (1, 8, 8) and len(data.train) + len(data.val) == 1797
    assert len(data.val) / 1797 == pytest.approx(0.2, abs=0.005)
    assert int(data.train.images.max()) == 255 and data.train.classes == tuple("0123456789")
    assert torch.equal(data.val.images, load_data("digits").val.images)
    assert (data.mean, data.std) == channel_statistics(data.train.images)
    small = load_data("digits", limit=30, mean=[0.5], std=[0.25])
    assert len(small.train) == len(small.val) == 30 and (small.mean, small.std) == ((0.5,), (0.25,))
    with pytest.raises(ValueError, match="digits does not take size"):
        load_data("digits", size=4)


# Files

CLASSES = ["cat", "dog", "owl"]


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def random_pixels(count: int, seed: int, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_parquet(path: Path, columns: dict, features: dict | None = None) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if features is None:
        pq.write_table(pa.table(columns), path)
    else:
        schema = datasets.Features(features).arrow_schema
        pq.write_table(pa.table(columns, schema=schema), path)


def image_rows(pixels: np.ndarray) -> list[dict]:
    return [{"bytes": encode(image), "path": None} for image in pixels]


def named_features(image: str = "img", label: str = "fine_label") -> dict:
    import datasets

    return {image: datasets.Image(), label: datasets.ClassLabel(names=CLASSES)}


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    for name, count, seed in (("train-0", 7, 0), ("train-1", 5, 1), ("test-0", 4, 2)):
        columns = {"img": image_rows(random_pixels(count, seed)), "fine_label": [i % 3 for i in range(count)]}
        write_parquet(folder / f"{name}.parquet", columns, named_features())
    return folder


@pytest.fixture
def load(tmp_path: Path):
    def load_with_own_cache(name: str | Path, **options) -> Dataset:
        return load_data(str(name), cache_dir=tmp_path / "cache", **options)

    return load_with_own_cache


def test_parquet_folder_is_decoded_without_loss(parquet_folder: Path, load):
    calls: list[tuple[int, int]] = []
    data = load(parquet_folder, progress=lambda done, total: calls.append((done, total)))
    expected = np.concatenate([random_pixels(7, 0), random_pixels(5, 1)]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.train.images.numpy(), expected)
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert data.train.classes == data.val.classes == tuple(CLASSES)
    assert np.array_equal(data.val.images.numpy(), random_pixels(4, 2).transpose(0, 3, 1, 2))
    assert calls == [(12, 12), (4, 4)]


def test_named_set_is_read_from_a_folder(parquet_folder: Path, load):
    assert len(load("cifar100", folder=parquet_folder).train) == 12


def test_limit_takes_a_fixed_random_choice_across_files(parquet_folder: Path, load):
    whole = load(parquet_folder)
    some, again = load(parquet_folder, limit=6), load(parquet_folder, limit=6)
    assert len(some.train) == 6 and len(some.val) == 4 and torch.equal(some.train.images, again.train.images)
    positions = [int((whole.train.images == image).flatten(1).all(1).nonzero()) for image in some.train.images]
    assert positions == sorted(set(positions)) and positions != list(range(6))
    assert torch.equal(some.train.labels, whole.train.labels[positions])
    with pytest.raises(ValueError, match="limit must be a positive number of images, got 0"):
        load(parquet_folder, limit=0)


def test_second_load_comes_from_the_cache_until_the_files_change(parquet_folder: Path, load, tmp_path: Path):
    first = load(parquet_folder)
    calls: list[int] = []
    second = load(parquet_folder, progress=lambda done, total: calls.append(done))
    assert calls == [] and torch.equal(first.train.images, second.train.images)
    assert second.train.classes == first.train.classes
    os.utime(parquet_folder / "test-0.parquet", ns=(1, 1))
    load(parquet_folder, progress=lambda done, total: calls.append(total))
    assert calls == [4]
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("damage", [b"", b"not a cache", None])
def test_corrupt_cache_is_decoded_again_with_a_warning(damage, parquet_folder: Path, load, tmp_path: Path, caplog):
    first = load(parquet_folder)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10] if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger="wnq.data.decode"):
        again = load(parquet_folder)
    assert torch.equal(first.train.images, again.train.images)
    assert [record.message.split(": ")[1].startswith("unusable cache") for record in caplog.records] == [True, True]
    caplog.clear()
    load(parquet_folder)
    assert not caplog.records


def test_unwritable_cache_is_done_without(parquet_folder: Path, tmp_path: Path, caplog):
    (tmp_path / "file").write_text("in the way")
    data = load_data(str(parquet_folder), cache_dir=tmp_path / "file")
    assert len(data.train) == 12 and "could not be cached" in caplog.text


def test_cache_folder_from_the_environment(parquet_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WNQ_CACHE", str(tmp_path / "elsewhere"))
    load_data(str(parquet_folder))
    assert len(list((tmp_path / "elsewhere").rglob("*.safetensors"))) == 2


def test_hub_clone_layout_and_validation_split_names(tmp_path: Path, load):
    for split in ("train", "validation", "valid"):
        columns = {"image": image_rows(random_pixels(3, 0)), "label": [0, 1, 2]}
        write_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet", columns)
    assert len(load(tmp_path / "set").val) == 3
    with pytest.raises(ValueError, match="no split 'test' for validation; there are: train, valid, validation"):
        load(tmp_path / "set", val_split="test")


def test_only_a_training_split(tmp_path: Path, load):
    columns = {"image": image_rows(random_pixels(30, 0)), "label": [i % 3 for i in range(30)]}
    write_parquet(tmp_path / "set" / "train.parquet", columns)
    with pytest.raises(
        ValueError, match=r"no split for validation .* only: train; pass val_split= .* or val_share=0\.1"
    ):
        load(tmp_path / "set")
    data = load(tmp_path / "set", val_share=0.2)
    assert (len(data.train), len(data.val)) == (24, 6) and data.val.labels.bincount().tolist() == [2, 2, 2]
    assert not (data.train.images[:, None] == data.val.images[None]).flatten(2).all(2).any()
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.0"):
        load(tmp_path / "set", val_share=1.0)
    with pytest.raises(ValueError, match="val_split cannot be set as well"):
        load(tmp_path / "set", val_share=0.1, val_split="test")


def write_pair(folder: Path, columns: dict, features: dict | None = None) -> Path:
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", columns, features)
    return folder


def test_string_labels_are_numbered_in_sorted_order(tmp_path: Path, load):
    folder = write_pair(tmp_path / "set", {"image": image_rows(random_pixels(3, 0)), "label": ["owl", "cat", "owl"]})
    data = load(folder)
    assert data.train.classes == ("cat", "owl") and data.train.labels.tolist() == [1, 0, 1]


def test_validation_with_fewer_classes_is_renumbered_and_with_more_refused(tmp_path: Path, load):
    for split, labels in (("train", ["a", "b", "c"]), ("test", ["c", "b", "c"]), ("val", ["a", "b", "d"])):
        columns = {"image": image_rows(random_pixels(3, 0)), "label": labels}
        write_parquet(tmp_path / "set" / f"{split}.parquet", columns)
    assert load(tmp_path / "set").val.labels.tolist() == [2, 1, 2]
    with pytest.raises(ValueError, match="classes that the training images lack: d"):
        load(tmp_path / "set", val_split="val")


def test_ambiguous_columns_name_the_option(tmp_path: Path, load):
    rows = image_rows(random_pixels(2, 0))
    folder = write_pair(tmp_path / "a", {"left": rows, "right": rows, "label": [0, 1]})
    with pytest.raises(
        ValueError, match="several columns could be the image; set image_column= to one of: left, right, label"
    ):
        load(folder)
    assert len(load(folder, image_column="right").train) == 2
    with pytest.raises(ValueError, match="no column 'middle'; the columns are: left, right, label"):
        load(folder, image_column="middle")
    folder = write_pair(tmp_path / "b", {"image": rows, "kind": [0, 1], "other": [1, 0]})
    with pytest.raises(
        ValueError, match="no column is evidently the label; set label_column= to one of: image, kind, other"
    ):
        load(folder)
    assert load(folder, label_column="other").train.labels.tolist() == [1, 0]


def test_fine_label_is_preferred_among_several_class_labels(tmp_path: Path, load):
    import datasets

    features = named_features() | {"coarse_label": datasets.ClassLabel(names=["animal"])}
    columns = {"img": image_rows(random_pixels(2, 0)), "fine_label": [2, 1], "coarse_label": [0, 0]}
    assert load(write_pair(tmp_path / "set", columns, features)).train.labels.tolist() == [2, 1]


@pytest.mark.parametrize("labels", [[-1, 0], [None, 1]])
def test_missing_labels_are_refused(labels: list, tmp_path: Path, load):
    folder = write_pair(tmp_path / "set", {"image": image_rows(random_pixels(2, 0)), "label": labels})
    with pytest.raises(ValueError, match="some images have no label"):
        load(folder)


def test_corrupt_image_is_named_by_file_and_row(tmp_path: Path, load):
    rows = image_rows(random_pixels(3, 0))
    rows[2]["bytes"] = rows[2]["bytes"][:40]
    folder = write_pair(tmp_path / "set", {"image": rows, "label": [0, 1, 2]})
    with pytest.raises(ValueError, match=r"train\.parquet row 2: not a readable image"):
        load(folder)
    rows[2]["bytes"] = None
    with pytest.raises(ValueError, match=r"train\.parquet row 2: there is no image in the image column"):
        load(write_pair(tmp_path / "set", {"image": rows, "label": [0, 1, 2]}))


def test_file_that_is_no_parquet(tmp_path: Path, load):
    (tmp_path / "train.parquet").write_bytes(b"something else")
    (tmp_path / "test.parquet").write_bytes(b"something else")
    with pytest.raises(ValueError, match="cannot read the parquet files of"):
        load(tmp_path)


def test_memory_limit_names_numbers_and_options(parquet_folder: Path, load):
    with pytest.raises(ValueError, match=r"12 images of 3x6x5 take .* GiB .* size=, a limit= .* memory_limit="):
        load(parquet_folder, memory_limit=12 * 90 - 1)
    assert len(load(parquet_folder, memory_limit=12 * 90).train) == 12


def test_imagenet_is_checked_before_any_download():
    with pytest.raises(ValueError, match="imagenet has images of many sizes; pass size="):
        load_data("imagenet")
    with pytest.raises(ValueError, match=r"1281167 images of 3x224x224 take 179\.\d+ GiB"):
        load_data("imagenet", size=224)


def write_images(folder: Path, files: dict[str, np.ndarray]) -> Path:
    for name, pixels in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, {".png": "PNG", ".jpg": "JPEG"}[path.suffix]))
    return folder


def test_image_folder(tmp_path: Path, load):
    pixels = random_pixels(4, 0)
    files = {"train/owl/a.png": pixels[0], "train/cat/b.png": pixels[1], "train/cat/c.png": pixels[2]}
    folder = write_images(tmp_path / "set", files | {"val/owl/d.png": pixels[3]})
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load(folder)
    assert data.train.classes == data.val.classes == ("cat", "owl")
    assert data.train.labels.tolist() == [0, 0, 1] and data.val.labels.tolist() == [1]
    assert np.array_equal(data.train.images.numpy(), pixels[[1, 2, 0]].transpose(0, 3, 1, 2))


def test_class_folders_without_splits(tmp_path: Path, load):
    folder = write_images(tmp_path, {f"{c}/{i}.png": p for c in "ab" for i, p in enumerate(random_pixels(4, 0))})
    data = load(folder, val_share=0.25)
    assert data.train.classes == ("a", "b") and (len(data.train), len(data.val)) == (6, 2)


def test_size_scales_the_shorter_side_and_crops_the_centre(tmp_path: Path, load):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    files = {"train/a/0.png": wide, "train/b/1.png": wide.transpose(1, 0, 2), "test/a/2.png": random_pixels(1, 0)[0]}
    folder = write_images(tmp_path / "set", files)
    with pytest.raises(ValueError, match=r"1\.png: the image is 24x8 pixels but the first .* is 8x24; pass size="):
        load(folder)
    data = load(folder, size=8)
    assert data.train.images.shape == (2, 3, 8, 8) and (data.train.images == 200).all()
    assert load(folder, size=5).val.images.shape == (1, 3, 5, 5)
    with pytest.raises(ValueError, match="size must be a positive number of pixels, got 0"):
        load(folder, size=0)


def test_splits_of_different_sizes_are_refused(tmp_path: Path, load):
    files = {"train/a/0.png": random_pixels(1, 0)[0], "test/a/0.png": random_pixels(1, 0, (4, 4, 3))[0]}
    with pytest.raises(ValueError, match=r"training images are \(3, 6, 5\) .* validation images are \(3, 4, 4\)"):
        load(write_images(tmp_path / "set", files))


def test_first_image_decides_between_grey_and_colour(tmp_path: Path, load):
    grey, colour = random_pixels(1, 0, (4, 4))[0], random_pixels(1, 1, (4, 4, 3))[0]
    files = {"train/a/0.png": grey, "train/a/1.png": colour, "test/a/0.png": grey}
    data = load(write_images(tmp_path / "grey", files))
    assert data.train.images.shape == (2, 1, 4, 4) and np.array_equal(data.train.images[0, 0].numpy(), grey)
    files = {"train/a/0.png": colour, "train/a/1.png": grey, "test/a/0.png": colour}
    data = load(write_images(tmp_path / "colour", files))
    assert np.array_equal(data.train.images[1].numpy(), np.stack([grey] * 3))


def test_folders_that_do_not_fit(tmp_path: Path, load):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match="does not exist"):
        load("cifar10", folder=tmp_path / "missing")
    with pytest.raises(ValueError, match=r"neither train-.* nor folders of images"):
        load(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in folders named by their class"):
        load(tmp_path, val_share=0.1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match="a folder of images has no columns"):
        load(tmp_path, image_column="img")
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "cat").rmdir()
    (tmp_path / "train").rmdir()
    with pytest.raises(ValueError, match="no split 'train' among: test"):
        load(tmp_path)


def test_unknown_name_gives_the_closest_and_all():
    with pytest.raises(
        ValueError, match=r"unknown data set 'cifar101'\. Did you mean 'cifar10\d?'\? Give one of digits, cifar10"
    ):
        load_data("cifar101")


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' could not be loaded from the Hugging Face hub .* without a network"
    ) as error:
        load_data("nobody/nothing", cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_hub_data_set_is_read_as_encoded_bytes():
    import datasets

    pixels = random_pixels(5, 0)
    table = datasets.Dataset.from_dict(
        {"img": image_rows(pixels), "fine_label": [0, 1, 2, 0, 1]}, features=datasets.Features(named_features())
    )
    split = dataset_split("some/set train", table, None, None)
    assert split.labels.tolist() == [0, 1, 2, 0, 1] and split.classes == tuple(CLASSES)
    read = list(split.read(torch.tensor([1, 4])))
    assert read == [("some/set train row 1", encode(pixels[1])), ("some/set train row 4", encode(pixels[4]))]


def test_parquet_damaged_in_the_middle(parquet_folder: Path, load):
    path = parquet_folder / "train-0.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-0\.parquet: cannot read the images from row 0 on"):
        load(parquet_folder)
