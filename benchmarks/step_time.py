"""What quantized training costs: a training step of a CIFAR ResNet-20, float and quantized by several libraries.

    python benchmarks/step_time.py [--rounds 15] [--bits 3]

The arms take turns, one step each a round in an order drawn anew, so that a drifting machine drifts for all; the ratio to the float
step is taken round by round and its median reported. Peers: brevitas' ``QuantConv2d`` (``pip install brevitas``), torchao's fake
quantizers (``pip install torchao``; either is left out if missing) and torch's own fused fake-quantization kernels, put in the same
places. torchao's quantization-aware training covers linear layers and embeddings only: its quantizers stand here in front of the
convolutions in the cheapest way that they allow, symmetric and one scale a channel for weights, asymmetric and one scale an
image for inputs, computed from each batch as they do.

Freed memory stays in the process for all arms (``wnq.allocator``), as a trainer wants it; ``--system-allocator`` leaves that to
the C library, and the time then depends on how each arm happens to fragment the heap. ``--clock processor`` takes the processor
time of the process instead of the time on the wall: with one thread on a busy machine the two differ by the waiting.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from random import Random

import torch
from results import hardware_tag, write_results
from torch import nn
from torch.nn.utils import parametrize

import wnq
from wnq.allocator import keep_freed_memory
from wnq.environment import environment
from wnq.models import build_model
from wnq.speed import median_ratio

WNQ = "wnq, weights and inputs"


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


def arms(bits: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = build_model("resnet20", num_classes=100)

    def ours(**options: object) -> nn.Module:
        model = copy.deepcopy(base)
        return wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(**options), first_last_bits=None))

    built = {
        "float": copy.deepcopy(base),
        WNQ: ours(name="wnq", w_bits=bits, a_bits=bits),
        "wnq, weights only": ours(name="wnq", w_bits=bits, a_bits=32),
        "lsq, weights and inputs": ours(name="lsq", w_bits=bits, a_bits=bits),
        "wnq weights, inputs as a chain": with_chain(ours(name="wnq", w_bits=bits, a_bits=32), bits),
        "torch fused, fixed scale": with_parts(
            copy.deepcopy(base), lambda: FusedFixed(bits, True), lambda: FusedFixed(bits, False)
        ),
        "torch fused, learnable scale": with_parts(
            copy.deepcopy(base), lambda: FusedLearnable(bits, True), lambda: FusedLearnable(bits, False)
        ),
    }
    for name, peer in (("brevitas QuantConv2d", brevitas_peer), ("torchao fake quantizers", torchao_peer)):
        try:
            built[name] = peer(copy.deepcopy(base), bits)
        except ModuleNotFoundError as error:
            print(f"{error.name} is not installed: its arm is left out (pip install {error.name})")
    return built


def brevitas_peer(model: nn.Module, bits: int) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    options = {
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": bits,
        "input_quant": Uint8ActPerTensorFloat,
        "input_bit_width": bits,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--hardware", default=None)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--system-allocator", action="store_true", help="let the C library return freed memory at once")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    now = time.perf_counter if options.clock == "wall" else time.process_time
    keeps = not options.system_allocator and keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (options.batch,), generator=generator).to(device)
    models = {
        name: model.to(device, memory_format=torch.channels_last).train() for name, model in arms(options.bits).items()
    }
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for name, model in models.items()}

    def step(name: str) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = now()
        optimizers[name].zero_grad()
        nn.functional.cross_entropy(models[name](images), labels).backward()
        optimizers[name].step()
        if device == "cuda":
            torch.cuda.synchronize()
        return now() - start

    for _ in range(3):
        for name in models:
            step(name)
    times: dict[str, list[float]] = {name: [] for name in models}
    order, draw = list(models), Random(0)
    for _ in range(options.rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(step(name))
    rows = []
    lines = [
        "| arm | ms a step, median | ratio to float, median (95 %) | min – max of the ratio | times as long as wnq (95 %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["float"], strict=True)]
        to_float, to_wnq = median_ratio(seconds, times["float"]), median_ratio(seconds, times[WNQ])
        row = {
            "arm": name,
            "ms": [1e3 * s for s in seconds],
            "ratio_median": to_float.median,
            "ratio_interval": [to_float.low, to_float.high],
            "ratio_to_wnq": to_wnq._asdict(),
            "ratios": ratios,
        }
        rows.append(row)
        lines.append(
            f"| {name} | {1e3 * statistics.median(seconds):.1f} "
            f"| {to_float.median:.2f} ({to_float.low:.2f} – {to_float.high:.2f}) | {min(ratios):.2f} – {max(ratios):.2f} "
            f"| {to_wnq.median:.2f} ({to_wnq.low:.2f} – {to_wnq.high:.2f}) |"
        )
    env = environment()
    for package in ("brevitas", "torchao"):
        if any(name.startswith(package) for name in models):
            env[package] = version(package)
    config = {
        **vars(options),
        "network": "resnet20, 100 classes, channels-last, float32, eager",
        "optimizer": "SGD, momentum 0.9",
        "freed memory kept in the process": keeps,
    }
    path = write_results("step_time", options.hardware or hardware_tag(), config, env, rows, lines)
    print("\n".join(lines))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
