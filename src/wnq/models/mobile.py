"""MobileNets for 224x224 images, as in :mod:`wnq.models.imagenet`. MobileNetV2 has torchvision's state names."""

from collections.abc import Sequence

from torch import Tensor, nn

from wnq.models.imagenet import check_sizes, initialize
from wnq.models.registry import register_model


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, 3x3 depthwise convolution, 1x1 convolution back without activation.

    The input is added where the shape stays.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the depthwise convolution.
        expansion: of the channels inside; at 1 the first convolution is left out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        widen = [] if expansion == 1 else [_conv_bn(in_channels, hidden, 1, activation=nn.ReLU6)]
        self.conv = nn.Sequential(
            *widen,
            _conv_bn(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H', W')``."""
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNet(nn.Module):
    """Convolutions, average pooling, one linear layer.

    Args:
        features: everything before the pooling.
        channels: of its output.
        num_classes: size of the output.
    """

    def __init__(self, features: Sequence[nn.Module], channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        # After dropout in torchvision's, whose place the names keep; low-bit training goes without it.
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(channels, num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


@register_model
def mobilenet_v1(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """MobileNet of width 1, 4,231,976 parameters at 1000 classes.

    Args:
        num_classes: size of the output.
        in_channels: of the images.

    References:
        A. Howard et al., *MobileNets*, 2017, arXiv:1704.04861, table 1.
    """
    check_sizes(num_classes, in_channels)
    features = [_conv_bn(in_channels, 32, 3, 2)]
    narrow = 32
    # Table 1; its last stride of 2, on 7x7 pixels that stay 7x7, is 1.
    rows = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for wide, stride in rows:
        depthwise = _conv_bn(narrow, narrow, 3, stride, groups=narrow)
        features.append(nn.Sequential(*depthwise, *_conv_bn(narrow, wide, 1)))
        narrow = wide
    return MobileNet(features, narrow, num_classes)


@register_model
def mobilenet_v2(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """MobileNetV2 of width 1, 3,504,872 parameters at 1000 classes.

    Args:
        num_classes: size of the output.
        in_channels: of the images.

    References:
        M. Sandler et al., *MobileNetV2: Inverted Residuals and Linear Bottlenecks*, 2018, arXiv:1801.04381, table 2.
    """
    check_sizes(num_classes, in_channels)
    features: list[nn.Module] = [_conv_bn(in_channels, 32, 3, 2, activation=nn.ReLU6)]
    narrow = 32
    # Table 2: expansion, channels, how often, first stride.
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, wide, count, stride in rows:
        for number in range(count):
            features.append(InvertedResidual(narrow, wide, 1 if number else stride, expansion))
            narrow = wide
    return MobileNet([*features, _conv_bn(narrow, 1280, 1, activation=nn.ReLU6)], 1280, num_classes)


def _conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), activation())
