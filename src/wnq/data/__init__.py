"""Images to batches: held in memory as uint8, or streamed from files, and normalised batch by batch.

>>> data = load_data("digits")
>>> train = batches_of(data.train, 128, mean=data.mean, std=data.std, augment=Augment(crop_padding=1), shuffle=True)
>>> for images, labels in train.epoch(0):
...     pass
>>> images.shape[1:], train.steps_per_epoch
(torch.Size([1, 8, 8]), 12)
"""

from wnq.data.batches import Augment, Batches
from wnq.data.choosing import batches_of
from wnq.data.dataset import Dataset, Split
from wnq.data.decode import Progress
from wnq.data.images import ImageData
from wnq.data.sources import load_data
from wnq.data.streamed import StreamedImages, unreadable_images
from wnq.data.streaming import StreamedBatches

__all__ = [
    "Augment",
    "Batches",
    "Dataset",
    "ImageData",
    "Progress",
    "Split",
    "StreamedBatches",
    "StreamedImages",
    "batches_of",
    "load_data",
    "unreadable_images",
]
