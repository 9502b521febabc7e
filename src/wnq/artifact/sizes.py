"""Where the bytes of a file are, and how near that is to what is possible."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wnq.artifact.container import header_size
from wnq.artifact.content import Content


@dataclass(frozen=True)
class LayerSize:
    """One stored weight.

    Attributes:
        name: of the layer.
        shape: of its weight.
        bits: width of a code.
        weights: how many codes.
        method: how they lie in the file: ``rows`` (filled up to whole words), ``bits`` (dense), ``zstd`` or ``ans``.
        packed_bytes: their bytes in the file, with the tables that decode them.
        float_bytes: the same weight as float32.
        bits_per_weight: ``8 * packed_bytes / weights``.
        entropy: bits a weight by the histogram of the layer's codes; the least for a coder that knows nothing else.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    weights: int
    method: str
    packed_bytes: int
    float_bytes: int
    bits_per_weight: float
    entropy: float


@dataclass(frozen=True)
class SizeReport:
    """Where the bytes of a file are. ``packed + scale + codebook + rest + header == file``.

    Attributes:
        layers: one row a stored weight; a weight that layers share comes once.
        coder: what the file was written with: ``none``, ``zstd`` or ``ans``.
        packed_bytes: codes of all weights.
        scale_bytes: scales of all weights.
        codebook_bytes: their levels.
        rest_bytes: all other tensors: biases, normalization, float layers, quantizers of inputs and outputs.
        header_bytes: table of tensors, metadata, and shapes of packed matrices.
        file_bytes: the whole file.
        float_bytes: the model's float state_dict with float32 weights.
        ideal_bytes: the codes at exactly their widths.
        entropy_bytes: the codes at each layer's entropy.
        sha256: of the file.
    """

    layers: tuple[LayerSize, ...]
    coder: str
    packed_bytes: int
    scale_bytes: int
    codebook_bytes: int
    rest_bytes: int
    header_bytes: int
    file_bytes: int
    float_bytes: int
    ideal_bytes: float
    entropy_bytes: float
    sha256: str

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the float32 state."""
        return self.float_bytes / self.file_bytes


def entropy(codes: Tensor) -> float:
    """Return the zero-order entropy of uint8 codes, in bits a code; 0 of none."""
    counts = torch.bincount(codes.reshape(-1), minlength=1).double()
    shares = counts[counts > 0] / max(1, codes.numel())
    return abs(float((shares * shares.log2()).sum()))


def sizes_of(content: Content, path: str | Path) -> SizeReport:
    """Return the sizes of a file that was read as ``content``.

    Raises:
        ArtifactError: its codes are damaged.
        ModuleNotFoundError: the package that decodes them is not installed.
    """
    layers: list[LayerSize] = []
    for name, quantized in content.quantized.items():
        count, size = quantized.codes.numel(), content.codes.bytes[name]
        layers.append(
            LayerSize(
                name=name,
                shape=tuple(quantized.codes.shape),
                bits=content.manifest.stored[name].bits,
                weights=count,
                method=content.codes.methods[name],
                packed_bytes=size,
                float_bytes=4 * count,
                bits_per_weight=8 * size / max(1, count),
                entropy=entropy(quantized.codes),
            )
        )
    packed = sum(layer.packed_bytes for layer in layers)
    scales = sum(book.scale.nbytes for book in content.books.values())
    codebooks = sum(book.nbytes for book in content.books.values())
    rest = sum(tensor.nbytes for tensor in content.rest.values())
    float_rest = sum(tensor.nbytes for key, tensor in content.rest.items() if not content.is_quantizer_state(key))
    data = Path(path).read_bytes()
    return SizeReport(
        layers=tuple(layers),
        coder=content.manifest.coding.name,
        packed_bytes=packed,
        scale_bytes=scales,
        codebook_bytes=codebooks,
        rest_bytes=rest,
        header_bytes=header_size(path) + content.codes.bookkeeping,
        file_bytes=len(data),
        float_bytes=sum(layer.float_bytes for layer in layers) + float_rest,
        ideal_bytes=sum(layer.weights * layer.bits / 8 for layer in layers),
        entropy_bytes=sum(layer.weights * layer.entropy / 8 for layer in layers),
        sha256=hashlib.sha256(data).hexdigest(),
    )
