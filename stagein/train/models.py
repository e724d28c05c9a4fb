"""Image classifiers to start with: a small one for small images, a tiny one for the demo, and ResNet-18 and -50.

They take float32 `[batch, channels, height, width]` of any size from 16 pixels on and give `[batch, num_classes]`.
"""

from collections.abc import Callable

import torch
from torch import nn

from stagein.formats.errors import UsageError


class ConvNormRelu(nn.Sequential):
    """A convolution with padding, BatchNorm and ReLU; `stride` divides height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=(kernel - 1) // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.add(inputs, self.branch(inputs))


class SmallResNet(nn.Sequential):
    """For images of 32 to 64 pixels: stages of `width`, twice and four times as many channels, a residual block in each.

    The first convolution already halves the image: on a CPU the full resolution costs more than it brings. The largest
    value of each channel is what is classified, as in Page's ResNet-9 (DAWNBench, 2018).
    """

    def __init__(self, num_classes: int, channels: int = 3, width: int = 32) -> None:
        stages: list[nn.Module] = [ConvNormRelu(channels, width, kernel=4, stride=2), ConvNormRelu(width, width)]
        for in_channels, out_channels in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
            if out_channels > in_channels:
                stages.append(ConvNormRelu(in_channels, out_channels, stride=2))
            stages.append(Residual(ConvNormRelu(out_channels, out_channels), ConvNormRelu(out_channels, out_channels)))
        super().__init__(*stages, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))


class TinyNet(nn.Sequential):
    """Four convolutions, 25 thousand parameters: learns simple patterns within seconds."""

    def __init__(self, num_classes: int, channels: int = 3, width: int = 16) -> None:
        super().__init__(
            ConvNormRelu(channels, width, kernel=4, stride=2),
            ConvNormRelu(width, 2 * width, stride=2),
            ConvNormRelu(2 * width, 2 * width, stride=2),
            ConvNormRelu(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, num_classes),
        )


class ResidualBlock(nn.Module):
    """A block of He et al., "Deep Residual Learning" (2016), basic or bottleneck, with a projection where shapes change.

    The stride is in the 3x3 convolution, and the last BatchNorm starts at zero, so that a block starts as the identity
    (Goyal et al., 2017).
    """

    def __init__(self, in_channels: int, inner_channels: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        out_channels = 4 * inner_channels if bottleneck else inner_channels
        if bottleneck:
            inner = [
                ConvNormRelu(in_channels, inner_channels, 1),
                ConvNormRelu(inner_channels, inner_channels, 3, stride),
            ]
        else:
            inner = [ConvNormRelu(in_channels, inner_channels, 3, stride)]
        last_kernel = 1 if bottleneck else 3
        last = nn.Conv2d(inner_channels, out_channels, last_kernel, padding=last_kernel // 2, bias=False)
        last_norm = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(last_norm.weight)
        self.branch = nn.Sequential(*inner, last, last_norm)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        self.out_channels = out_channels

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.shortcut(inputs) + self.branch(inputs))


class ResNet(nn.Sequential):
    """The ImageNet ResNets of He et al. (2016): four stages of `depths` blocks."""

    def __init__(
        self, num_classes: int, depths: tuple[int, int, int, int], *, bottleneck: bool, channels: int = 3
    ) -> None:
        layers: list[nn.Module] = [ConvNormRelu(channels, 64, kernel=7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)]
        width = 64
        for stage, depth in enumerate(depths):
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                block = ResidualBlock(width, 64 << stage, stride, bottleneck=bottleneck)
                layers.append(block)
                width = block.out_channels
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "tiny": TinyNet,
    "small": SmallResNet,
    "resnet18": lambda num_classes: ResNet(num_classes, (2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda num_classes: ResNet(num_classes, (3, 4, 6, 3), bottleneck=True),
}


def build_model(name: str, num_classes: int) -> nn.Module:
    """The model called `name`, freshly initialised from torch's random state. Raises UsageError for an unknown name."""
    if name not in MODELS:
        raise UsageError(f"there is no model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](num_classes)
