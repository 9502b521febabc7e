"""Images as device-resident uint8 tensors: load a data set, then iterate over normalised batches of it.

data = load_data("cifar100")
train = Batches(data.train, 128, mean=data.mean, std=data.std, augment=Augment(4, flip=True), shuffle=True)
for images, labels in train.epoch(0): ...
"""

from wnq.data.batches import Augment, Batches
from wnq.data.decode import Progress
from wnq.data.images import Dataset, ImageData
from wnq.data.sources import load_data

__all__ = ["Augment", "Batches", "Dataset", "ImageData", "Progress", "load_data"]
