"""What quantized training costs: a training step of a CIFAR ResNet-20, float and quantized by several libraries.

    python benchmarks/step_time.py [--rounds 15] [--bits 3]

The arms take turns, one step each a round, so that a drifting machine drifts for all; the ratio to the float step is taken round by
round and its median reported. Peers: brevitas' ``QuantConv2d`` (``pip install brevitas``; left out if missing) and torch's own
fused fake-quantization kernels, put in the same places.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from results import hardware_tag, write_results
from torch import nn
from torch.nn.utils import parametrize

import wnq
from wnq.environment import environment
from wnq.models import build_model


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
        "wnq, weights and inputs": ours(name="wnq", w_bits=bits, a_bits=bits),
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
    try:
        import brevitas.nn as qnn
        from brevitas.graph.quantize import layerwise_quantize
        from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
    except ModuleNotFoundError:
        print("brevitas is not installed: its arm is left out (pip install brevitas)")
        return built
    options = {
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": bits,
        "input_quant": Uint8ActPerTensorFloat,
        "input_bit_width": bits,
        "return_quant_tensor": False,
    }
    kinds = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    built["brevitas QuantConv2d"] = layerwise_quantize(copy.deepcopy(base), compute_layer_map=kinds)
    return built


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
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
        start = time.perf_counter()
        optimizers[name].zero_grad()
        nn.functional.cross_entropy(models[name](images), labels).backward()
        optimizers[name].step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        for name in models:
            step(name)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name in models:
            times[name].append(step(name))
    rows = []
    lines = [
        "| arm | ms a step, median | ratio to float, median | min – max of the ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["float"], strict=True)]
        row = {
            "arm": name,
            "ms": [1e3 * s for s in seconds],
            "ratio_median": statistics.median(ratios),
            "ratios": ratios,
        }
        rows.append(row)
        lines.append(
            f"| {name} | {1e3 * statistics.median(seconds):.1f} | {row['ratio_median']:.2f} | "
            f"{min(ratios):.2f} – {max(ratios):.2f} |"
        )
    env = environment()
    if "brevitas QuantConv2d" in models:
        from importlib.metadata import version

        env["brevitas"] = version("brevitas")
    config = {
        **vars(options),
        "network": "resnet20, 100 classes, channels-last, float32, eager",
        "optimizer": "SGD, momentum 0.9",
    }
    path = write_results("step_time", options.hardware or hardware_tag(), config, env, rows, lines)
    print("\n".join(lines))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
