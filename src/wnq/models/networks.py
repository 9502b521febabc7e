"""The networks of the low-bit literature, small enough to train on one device.

Every activation is a module (``nn.ReLU``), so that a plan sees it. Convolutions are initialised by Kaiming's rule (He
et al., *Delving Deep into Rectifiers*, 2015, arXiv:1502.01852) with the fan-out, as in the authors' code for residual
nets.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from wnq.models.registry import check_size, register_model


class PadShortcut(nn.Module):
    """Shortcut without parameters (option A of He et al.): every ``stride``-th pixel, new channels filled with zeros.

    Args:
        in_channels: of the input.
        out_channels: of the output, at least ``in_channels``; the zeros are shared between front and back.
        stride: in both directions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        added = out_channels - in_channels
        self.padding = (0, 0, 0, 0, added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PadShortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H', W')``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR residual network: 3x3 stem, three stages of 16, 32 and 64 channels, average pooling, one linear layer.

    Args:
        blocks_per_stage: ``n``; the depth is ``6 n + 2``.
        num_classes: size of the output.
        in_channels: of the images.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        _check_sizes(num_classes, in_channels)
        self.conv1 = _conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(BasicBlock, blocks_per_stage, 16, 16, stride=1)
        self.layer2 = _stage(BasicBlock, blocks_per_stage, 16, 32, stride=2)
        self.layer3 = _stage(BasicBlock, blocks_per_stage, 32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))


class PreActBlock(nn.Module):
    """Pre-activation block: ``conv2(relu(bn2(conv1(y)))) + shortcut``, with ``y = relu(bn1(x))``.

    The shortcut is ``x``, or a 1x1 convolution of ``y`` where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv3x3(out_channels, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H', W')``."""
        y = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.relu2(self.bn2(self.conv1(y)))) + shortcut


class PreActResNet(nn.Module):
    """ResNet-18 with pre-activation blocks and a 3x3 stem: stages of 64, 128, 256 and 512 channels, two blocks each.

    Args:
        num_classes: size of the output.
        in_channels: of the images.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        _check_sizes(num_classes, in_channels)
        self.conv1 = _conv3x3(in_channels, 64)
        self.layer1 = _stage(PreActBlock, 2, 64, 64, stride=1)
        self.layer2 = _stage(PreActBlock, 2, 64, 128, stride=2)
        self.layer3 = _stage(PreActBlock, 2, 128, 256, stride=2)
        self.layer4 = _stage(PreActBlock, 2, 256, 512, stride=2)
        self.bn = nn.BatchNorm2d(512)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.fc(self.pool(self.relu(self.bn(x))).flatten(1))


@register_model
def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-20 for CIFAR with option A shortcuts, 269,722 parameters at 10 classes.

    Args:
        num_classes: size of the output.
        in_channels: of the images.

    References:
        K. He, X. Zhang, S. Ren, J. Sun, *Deep Residual Learning for Image Recognition*, 2016, arXiv:1512.03385, §4.2.
    """
    return ResNet(3, num_classes, in_channels)


@register_model
def resnet32(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-32 for CIFAR, 464,154 parameters at 10 classes. See :func:`resnet20`."""
    return ResNet(5, num_classes, in_channels)


@register_model
def resnet44(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-44 for CIFAR, 658,586 parameters at 10 classes. See :func:`resnet20`."""
    return ResNet(7, num_classes, in_channels)


@register_model
def resnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-56 for CIFAR, 853,018 parameters at 10 classes. See :func:`resnet20`."""
    return ResNet(9, num_classes, in_channels)


@register_model
def resnet110(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-110 for CIFAR, 1,727,962 parameters at 10 classes. See :func:`resnet20`."""
    return ResNet(18, num_classes, in_channels)


@register_model
def preact_resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Pre-activation ResNet-18 with the CIFAR stem, 11,172,170 parameters at 10 classes.

    Args:
        num_classes: size of the output.
        in_channels: of the images.

    References:
        K. He, X. Zhang, S. Ren, J. Sun, *Identity Mappings in Deep Residual Networks*, 2016, arXiv:1603.05027.
    """
    return PreActResNet(num_classes, in_channels)


@register_model
def vgg_small(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """VGG-Small of the binary-network literature, 4,660,106 parameters at 10 classes and 32x32 pixels.

    Six 3x3 convolutions of 128, 128, 256, 256, 512 and 512 channels, max pooling after every second, a linear layer.

    Args:
        num_classes: size of the output.
        in_channels: of the images.
        image_size: height and width of the images in pixels, at least 8.

    Raises:
        ValueError: a size is out of range.

    References:
        D. Zhang, J. Yang, D. Ye, G. Hua, *LQ-Nets*, 2018, arXiv:1807.10029, §5; the network of M. Courbariaux et al.,
        *BinaryNet*, 2016, arXiv:1602.02830, without its two hidden linear layers.
    """
    _check_sizes(num_classes, in_channels)
    check_size("image_size", image_size)
    if image_size < 8:
        raise ValueError(f"image_size must be at least 8 pixels, for three poolings, got {image_size}")
    widths = (in_channels, 128, 128, 256, 256, 512, 512)
    layers: list[nn.Module] = []
    for index, (narrow, wide) in enumerate(pairwise(widths)):
        pooling = [nn.MaxPool2d(2)] if index % 2 else []
        layers += [_conv3x3(narrow, wide), *pooling, nn.BatchNorm2d(wide), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(512 * (image_size // 8) ** 2, num_classes)]
    return _initialize(nn.Sequential(*layers))


@register_model
def digits_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Three 3x3 convolutions of 16, 32 and 64 channels for 8x8 digits, 24,058 parameters at 10 classes.

    Args:
        num_classes: size of the output.
        in_channels: of the images.
    """
    _check_sizes(num_classes, in_channels)
    layers: Sequence[nn.Module] = (
        _conv3x3(in_channels, 16), nn.BatchNorm2d(16), nn.ReLU(),
        _conv3x3(16, 32, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        _conv3x3(32, 64), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes),
    )  # fmt: skip
    return _initialize(nn.Sequential(*layers))


@register_model
def digits_mlp(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Three linear layers without batch normalization for 8x8 digits, 8,970 parameters at 10 classes.

    Args:
        num_classes: size of the output.
        in_channels: of the images.
    """
    _check_sizes(num_classes, in_channels)
    layers = (nn.Flatten(), nn.Linear(64 * in_channels, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return _initialize(nn.Sequential(*layers, nn.Linear(64, num_classes)))


def _check_sizes(num_classes: int, in_channels: int) -> None:
    check_size("num_classes", num_classes)
    check_size("in_channels", in_channels)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def _stage(
    block: type[BasicBlock] | type[PreActBlock], count: int, in_channels: int, out_channels: int, stride: int
) -> nn.Sequential:
    rest = [block(out_channels, out_channels, 1) for _ in range(count - 1)]
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


def _initialize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model
