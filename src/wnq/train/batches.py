"""The batches of a run: this process's share of what it trains on, and of what it is evaluated on."""

from typing import TYPE_CHECKING, Any

from wnq.data import Augment, Batches, Dataset, StreamedBatches, batches_of
from wnq.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATED = 256
"""Images a step of an evaluation at least, for each process."""

AnyBatches = Batches | StreamedBatches


def training_batches(data: Dataset, config: TrainConfig, accelerator: "Accelerator") -> tuple[AnyBatches, AnyBatches]:
    """Return batches to train on, shuffled and augmented, and batches to evaluate on, on this process's device.

    Raises:
        ValueError: several processes with fewer images than a batch.
    """
    processes = accelerator.num_processes
    if processes > 1 and len(data.train) < config.batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} is more than the {len(data.train)} training images, which "
            f"{processes} processes cannot share evenly. Use a smaller batch or one process."
        )
    share: dict[str, Any] = {
        "mean": data.mean,
        "std": data.std,
        "device": accelerator.device,
        "rank": accelerator.process_index,
        "world_size": processes,
        "channels_last": config.channels_last,
    }
    train = batches_of(
        data.train,
        config.batch_size,
        augment=Augment(config.crop_padding, config.flip),
        shuffle=True,
        seed=config.seed,
        drop_last=len(data.train) >= config.batch_size,
        **share,
    )
    return train, batches_of(data.val, max(config.batch_size, EVALUATED * processes), **share)
