"""Latency of networks, float and integer, in every engine: ``wnq bench infer`` on the shapes that deployment is judged by.

    python benchmarks/infer.py [--seconds 30] [--engines eager,compiled,onnx,openvino,torch,executorch]

ResNet-18 at 3x224x224 and ResNet-20 at 3x32x32, 4-bit weights and inputs, random weights: time does not depend on them. One thread,
no spinning, all ways in turn. What is not installed is left out. Writes
``benchmarks/results/infer_<hardware>_<yyyymm>.{json,md}``. Five minutes on a quiet machine.
"""

import argparse
import copy
import os
from typing import Any

import torch
from results import FOLDER, hardware_tag, write_results
from sizes import ResNet18
from torch import nn

import wnq
from wnq.speed import measure_speed

NETWORKS = {"resnet18": (ResNet18, (3, 224, 224)), "resnet20": (lambda: wnq.build_model("resnet20"), (3, 32, 32))}
GOALS = {"resnet18": 3.0, "resnet20": 2.0}
"""Times faster than ONNX Runtime's float, on processors with VNNI."""


def quantized(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return a W4A4 copy with random weights."""
    model = copy.deepcopy(network)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=4, a_bits=4)))
    with torch.no_grad():
        wnq.calibrate_(model, x)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="for each network and batch size, all ways together"
    )
    parser.add_argument("--engines", default="eager,compiled,onnx,openvino,torch,executorch")
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for name, (build, shape) in NETWORKS.items():
        torch.manual_seed(0)
        network, x = build().eval(), torch.randn(32, *shape)
        load = os.getloadavg()[0]
        found = measure_speed(
            quantized(network, x), (x,), float_model=network, seconds=options.seconds,
            engines=options.engines.split(","),
        )  # fmt: skip
        rows += [{"network": name, "load": round(load, 1), **row} for row in found["rows"]]
        about |= {key: found[key] for key in ("base", "left_out", "processor", "environment")}
        print(name, found["left_out"])
    lines = [
        "| network | batch | way | median ms | 5 to 95 % | times faster than float in ONNX Runtime | 95 % interval | rounds |",
        "|---|---:|---|---:|---|---:|---|---:|",
    ]
    for r in sorted(rows, key=lambda r: (r["network"], r["batch"], r["median_ms"])):
        lines.append(
            f"| {r['network']} | {r['batch']} | {r['arm']} | {r['median_ms']:.3g} | {r['p5_ms']:.3g} to {r['p95_ms']:.3g} "
            f"| {r['times_faster']:.2f} | {r['times_faster_low']:.2f} to {r['times_faster_high']:.2f} | {r['rounds']} |"
        )
    vnni = about["processor"]["vnni"]
    goals = " and ".join(f"{goal:.1f} on {name}" for name, goal in GOALS.items())
    lines += [
        "",
        f"Goal, on processors with VNNI: {goals}. "
        + ("This one has it." if vnni else "This one has none, so it does not judge that goal."),
    ]
    config = {
        "command": f"python benchmarks/infer.py --seconds {options.seconds:g} --engines {options.engines}",
        "networks": "ResNet-18 at 3x224x224 and ResNet-20 at 3x32x32, W4A4, first and last layer 8 bits, random weights, seed 0",
        "protocol": "one thread, no spinning, in turn in an order drawn anew each round, an untimed run before each timed one; "
        "ratios are medians over rounds with the interval of the sign test",
        "left out": about["left_out"],
        "processor": about["processor"],
    }
    path = write_results("infer", options.hardware or hardware_tag(), config, about["environment"], rows, lines)
    print("\n".join(lines))
    print(f"written to {path.relative_to(FOLDER.parent.parent)}")


if __name__ == "__main__":
    main()
