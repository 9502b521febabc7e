"""The arms of ``step_time.py``: a network, float and quantized by several libraries in the same places, and a step of each."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

import wnq
from wnq.together import layers_together, rounded_together

WNQ = "wnq, weights and inputs"
TORCHAO = "torchao fake quantizers"
ARMS = (
    "float", WNQ, "wnq, weights only", "lsq, weights and inputs", "wnq weights, inputs as a chain",
    "torch fused, fixed scale", "torch fused, learnable scale", "brevitas QuantConv2d", TORCHAO,
)  # fmt: skip
COMPILED = ("float", WNQ, TORCHAO)
"""Those that are compiled as well, if asked for."""
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Arm:
    """A network with its optimizer and a batch that is always the same."""

    def __init__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], *, bf16: bool) -> None:
        self.model = model.to(DEVICE, memory_format=torch.channels_last).train()
        self.batch, self.bf16 = batch, bf16
        self.network: Callable[[torch.Tensor], torch.Tensor] = self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=CUDA or None)
        self.graph: torch.cuda.CUDAGraph | None = None
        together = bool(layers_together(self.model))
        self.rounding = partial(rounded_together, self.model) if together else contextlib.nullcontext

    def plain(self) -> None:
        images, labels = self.batch
        self.optimizer.zero_grad()
        with self.rounding():
            with torch.autocast(DEVICE, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
                logits = self.network(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()

    def step(self) -> None:
        if self.graph is None:
            self.plain()
        else:
            self.graph.replay()

    def compile(self) -> None:
        self.plain()  # quantizers that start from data do so here
        self.network = torch.compile(self.model)
        self.rounding = contextlib.nullcontext

    def record(self) -> None:
        """Record a whole step, after some on a stream of their own.

        The last of those must not make the host wait for the device: an arm that does cannot be recorded, and says so here
        without leaving a broken recording behind.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.plain()
            with no_waiting():
                self.plain()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.plain()
        self.graph = graph
        torch.cuda.synchronize()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def settle() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def recorder(*, compiled: bool) -> Callable[[Arm], None]:
    def prepare(arm: Arm) -> None:
        if compiled:
            arm.compile()
        arm.record()

    return prepare


class FusedFixed(nn.Module):
    """torch's fused kernel with a fixed scale: max scaling of the weight, detached; a constant for the input."""

    def __init__(self, bits: int, weight: bool) -> None:
        super().__init__()
        self.low, self.high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if weight else (0, 2**bits - 1)
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = float(x.detach().abs().max()) / self.high if self.weight else 0.25
        return torch.fake_quantize_per_tensor_affine(x, scale, 0, self.low, self.high)


class FusedLearnable(nn.Module):
    """torch's fused kernel with a learned scale (the one of its learnable FakeQuantize)."""

    def __init__(self, bits: int, weight: bool) -> None:
        super().__init__()
        self.low, self.high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if weight else (0, 2**bits - 1)
        self.scale = nn.Parameter(torch.tensor([0.1 if weight else 0.25]))
        self.register_buffer("zero_point", torch.tensor([0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.scale, self.zero_point, self.low, self.high, (x.numel() * self.high) ** -0.5
        )


class Chain(nn.Module):
    """The same rounding of inputs as a plain chain of elementwise operations, straight through by hand."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.25))
        self.high = 2**bits - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = torch.clamp(x / self.step, 0, self.high)
        return (scaled.round().detach() + (scaled - scaled.detach())) * self.step


def quantize_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return module.fused_input(args[0])


def with_parts(model: nn.Module, weight: Callable[[], nn.Module], inputs: Callable[[], nn.Module]) -> nn.Module:
    for layer in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        parametrize.register_parametrization(layer, "weight", weight())
        layer.fused_input = inputs()
        layer.register_forward_pre_hook(quantize_input)
    return model


def builders(base: nn.Module, bits: int) -> dict[str, Callable[[], nn.Module]]:
    """Each arm by its name, built anew at every call from a copy of the float network."""

    def ours(**options: object) -> nn.Module:
        model = copy.deepcopy(base)
        return wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(**options), first_last_bits=None))

    def fused(kind: type[FusedFixed] | type[FusedLearnable]) -> nn.Module:
        return with_parts(copy.deepcopy(base), lambda: kind(bits, True), lambda: kind(bits, False))

    return {
        "float": lambda: copy.deepcopy(base),
        WNQ: lambda: ours(name="wnq", w_bits=bits, a_bits=bits),
        "wnq, weights only": lambda: ours(name="wnq", w_bits=bits, a_bits=32),
        "lsq, weights and inputs": lambda: ours(name="lsq", w_bits=bits, a_bits=bits),
        "wnq weights, inputs as a chain": lambda: with_chain(ours(name="wnq", w_bits=bits, a_bits=32), bits),
        "torch fused, fixed scale": lambda: fused(FusedFixed),
        "torch fused, learnable scale": lambda: fused(FusedLearnable),
        "brevitas QuantConv2d": lambda: brevitas_peer(copy.deepcopy(base), bits),
        TORCHAO: lambda: torchao_peer(copy.deepcopy(base), bits),
    }


def brevitas_peer(model: nn.Module, bits: int) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    options = {
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": bits,
        "input_quant": Uint8ActPerTensorFloat,
        "input_bit_width": bits,
        "input_collect_stats_steps": 1,  # of 300 at first: what is timed is training, not the collection before it
        "return_quant_tensor": False,
    }
    kinds = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    return layerwise_quantize(model, compute_layer_map=kinds)


class AsMatrix(nn.Module):
    """One of torchao's fake quantizers, which read matrices, on a weight (a row a channel) or an input (a row an image)."""

    def __init__(self, quantizer: nn.Module, *, images: bool) -> None:
        super().__init__()
        self.quantizer, self.images = quantizer, images

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2:
            return self.quantizer(x)
        if not self.images:
            return self.quantizer(x.flatten(1)).view_as(x)
        rows = x.permute(0, 2, 3, 1)  # as a channels-last image lies in memory
        return self.quantizer(rows.flatten(1)).view_as(rows).permute(0, 3, 1, 2)


def torchao_peer(model: nn.Module, bits: int) -> nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    def weight() -> nn.Module:
        config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), "per_channel", is_symmetric=True)
        return AsMatrix(IntxFakeQuantizer(config), images=False)

    def inputs() -> nn.Module:
        config = IntxFakeQuantizeConfig(getattr(torch, f"uint{bits}"), "per_token", is_symmetric=False)
        return AsMatrix(IntxFakeQuantizer(config), images=True)

    return with_parts(model, weight, inputs)


def with_chain(model: nn.Module, bits: int) -> nn.Module:
    for layer in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        layer.fused_input = Chain(bits)
        layer.register_forward_pre_hook(quantize_input)
    return model
