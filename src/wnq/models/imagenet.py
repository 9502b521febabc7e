"""The ImageNet networks of the low-bit literature, for 224x224 images: residual nets and AlexNet.

State names of the residual nets are those of torchvision's, so its published weights load. Every activation is a module of its
own, so that a plan sees it. Convolutions are initialised by Kaiming's rule with the fan-out (arXiv:1502.01852), linear layers by a
normal distribution of standard deviation 0.01.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from wnq.models.registry import check_size, register_model


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes.

    Args:
        in_channels: of the input.
        width: of the convolutions.
        stride: of the first one.
    """

    expansion: ClassVar[int] = 1
    """Channels of the output by ``width``."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, width, H', W')``."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.downsample(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, and a shortcut; the 3x3 convolution strides ("v1.5").

    Args:
        in_channels: of the input.
        width: of the inner convolutions; the output has four times as many channels.
        stride: of the 3x3 convolution.
    """

    expansion: ClassVar[int] = 4
    """Channels of the output by ``width``."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu3 = nn.ReLU()
        self.downsample = _shortcut(in_channels, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, 4 * width, H', W')``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        return self.relu3(y + self.downsample(x))


class ImageNetResNet(nn.Module):
    """The ImageNet residual network: 7x7 stem, max pooling, four stages of blocks, average pooling, one linear layer.

    Args:
        block: the kind of block.
        blocks: in each of the four stages.
        num_classes: size of the output.
        in_channels: of the images.
    """

    def __init__(
        self, block: type[Basic] | type[Bottleneck], blocks: Sequence[int], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        stages: list[nn.Module] = []
        for index, count in enumerate(blocks):
            width = 64 * 2**index
            layers: list[nn.Module] = []
            for number in range(count):
                layers.append(block(channels, width, 2 if index and not number else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


@register_model
def resnet18(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-18 for ImageNet with option B shortcuts, 11,689,512 parameters at 1000 classes.

    Args:
        num_classes: size of the output.
        in_channels: of the images.

    References:
        K. He, X. Zhang, S. Ren, J. Sun, *Deep Residual Learning for Image Recognition*, 2016, arXiv:1512.03385, table 1.
    """
    return ImageNetResNet(Basic, (2, 2, 2, 2), num_classes, in_channels)


@register_model
def resnet34(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-34 for ImageNet, 21,797,672 parameters at 1000 classes. See :func:`resnet18`."""
    return ImageNetResNet(Basic, (3, 4, 6, 3), num_classes, in_channels)


@register_model
def resnet50(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-50 for ImageNet, 25,557,032 parameters at 1000 classes. See :func:`resnet18`.

    **Differences from the paper:** the 3x3 convolution of a block strides, not the 1x1 before it ("v1.5", which today's
    published numbers are of).
    """
    return ImageNetResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels)


@register_model
def alexnet_bn(num_classes: int = 1000, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """AlexNet with batch normalization, 60,974,792 parameters at 1000 classes and 224x224 pixels.

    Args:
        num_classes: size of the output.
        in_channels: of the images.
        image_size: height and width of the images in pixels, at least 63.

    Raises:
        ValueError: a size is out of range.

    References:
        A. Krizhevsky, I. Sutskever, G. Hinton, *ImageNet Classification with Deep Convolutional Neural Networks*, 2012, §3.5.

    **Differences from the paper:** batch normalization after every layer but the last, in the place of biases, local response
    normalization and dropout, as usual for low bits; the groups of two stay.
    """
    check_sizes(num_classes, in_channels)
    check_size("image_size", image_size)
    if image_size < 63:
        raise ValueError(f"image_size must be at least 63 pixels, for the stem and three poolings, got {image_size}")
    side = (image_size - 7) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, 96, 11, 4, 2, bias=False), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, 1, 2, groups=2, bias=False), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, 1, 1, bias=False), nn.BatchNorm2d(384), nn.ReLU(),
        nn.Conv2d(384, 384, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(384), nn.ReLU(),
        nn.Conv2d(384, 256, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(256 * side**2, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU(),
        nn.Linear(4096, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU(),
        nn.Linear(4096, num_classes),
    ]  # fmt: skip
    return initialize(nn.Sequential(*layers))


def check_sizes(num_classes: int, in_channels: int) -> None:
    """Raise ``ValueError`` unless both are sizes."""
    check_size("num_classes", num_classes)
    check_size("in_channels", in_channels)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def initialize(model: nn.Module) -> nn.Module:
    """Initialise convolutions and linear layers in place, and return the model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(module.bias)
    return model
