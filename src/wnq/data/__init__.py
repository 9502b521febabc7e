"""Images as device-resident uint8 tensors: load a data set, then iterate over normalised batches of it.

>>> data = load_data("digits")
>>> train = Batches(data.train, 128, mean=data.mean, std=data.std, augment=Augment(crop_padding=1), shuffle=True)
>>> for images, labels in train.epoch(0):
...     pass
>>> images.shape[1:], train.steps_per_epoch
(torch.Size([1, 8, 8]), 12)
"""

from wnq.data.batches import Augment, Batches
from wnq.data.decode import Progress
from wnq.data.images import Dataset, ImageData
from wnq.data.sources import load_data

__all__ = ["Augment", "Batches", "Dataset", "ImageData", "Progress", "load_data"]
