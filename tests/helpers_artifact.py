"""What the tests of packed files share: a network with every kind of state, trained a little, and its files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wnq
from wnq.artifact.container import read_artifact, write_artifact
from wnq.artifact.content import Content
from wnq.artifact.manifest import Manifest

CODERS = ("none", "zstd", "ans")


class Net(nn.Module):
    """Every kind of state: convolutions, a transposed one, BatchNorm, a bias, tied weights, an own buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, 10)
        self.register_buffer("offset", torch.arange(10.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.bn(self.stem(x)))).mean((2, 3))
        return self.head(torch.relu(self.second(torch.relu(self.first(x))))) + self.offset


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, method: wnq.Method, x: Tensor, **plan: Any) -> nn.Module:
    """Quantize and take a few optimizer steps, so that no state is at its initial value."""
    wnq.quantize_(model, wnq.make_plan(model, method, **plan))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def net(method: str = "wnq", seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return trained(Net(), wnq.get_method(method, **options), images())


def content_of(path: Path) -> Content:
    """Return what is in a file."""
    tensors, document = read_artifact(path)
    return Content("x", Manifest.from_json(document, where="x"), tensors)


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change an artifact's content and write it with valid checksums, as a hostile author would."""
    tensors, document = read_artifact(path)
    change(tensors, document)
    write_artifact(
        path, tensors, {k: v for k, v in document.items() if k not in ("format", "format_version", "sha256")}
    )
