"""What becomes of a damaged file: refused in one sentence, loaded as it says, or a failure."""

import functools
import json
import math
import re
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_blind import BLIND, RARE, take_apart
from fuzz_sealed import SEALED
from torch import Tensor, nn

import wnq
from wnq.artifact import ArtifactError

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = BLIND | SEALED | RARE
# Sealed mutations reach deeper than blind ones; large files take long to make.
SHARES = {
    **dict.fromkeys(BLIND, 0.06),
    **dict.fromkeys(SEALED, 0.1),
    **dict.fromkeys(RARE, 0.005),
    "bombs, sealed": 0.02,
    "many tensors, sealed": 0.005,
}

State = dict[str, Tensor]


class Net(nn.Module):
    """Convolutions, a transposed one, BatchNorm, a bias, tied weights, an own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 32, 2, stride=2, bias=False)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.head = nn.Linear(32, 10)
        self.register_buffer("offset", torch.arange(10.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.bn(self.stem(x)))).mean((2, 3))
        return self.head(torch.relu(self.second(torch.relu(self.first(x))))) + self.offset


def old_network() -> nn.Module:
    """The network of tests/fixtures/version1.safetensors."""
    conv, up = nn.Conv2d(2, 4, 3, bias=False), nn.ConvTranspose2d(4, 3, 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), up, nn.Flatten(), nn.Linear(75, 5))


@dataclass(frozen=True)
class Seed:
    """A valid file, how to build its network (None: the file says), and what it holds."""

    name: str
    data: bytes
    build: Callable[[], nn.Module] | None
    state: State


@functools.cache
def seeds(folder: Path) -> list[Seed]:
    """Valid files of both versions, every coder and every kind of codebook; ``folder`` is for temporary files."""
    cases: list[tuple[str, str, dict[str, Any], Callable[[], nn.Module] | None]] = [
        ("symmetric w3, a scale a channel", "wnq", {"w_bits": 3, "grid": "symmetric", "granularity": "channel"}, Net),
        ("full w2, rounded outputs", "wnq", {"w_bits": 2}, Net),
        ("free levels w2, float inputs", "lqnets", {"w_bits": 2, "a_bits": 32}, Net),
        ("digits_cnn w2", "wnq", {"w_bits": 2}, None),
    ]
    found: list[Seed] = []
    for name, method, options, build in cases:
        torch.manual_seed(0)
        model = build() if build else wnq.build_model("digits_cnn")
        residual_bits = 8 if "rounded outputs" in name else 32
        wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(method, **options), residual_bits=residual_bits))
        wnq.calibrate_(model, torch.randn(4, 3 if build else 1, 8, 8))
        for coder in ("none", "zstd", "ans"):
            path = folder / "seed.safetensors"
            wnq.save(model.eval(), path, coder=coder)
            found.append(Seed(f"{name}, {coder}", path.read_bytes(), build, wnq.unpack_file(path)))
    old = ROOT / "tests" / "fixtures" / "version1.safetensors"
    return [*found, Seed("version 1", old.read_bytes(), old_network, wnq.unpack_file(old))]


@functools.cache
def page_reader() -> Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]:
    """The independent reader of the format's page."""
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)), names)
    return names["read"]


def read_version1(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for version 1, from the page's last section."""
    pieces, document = take_apart(path.read_bytes())
    types = {
        "F32": "f4",
        "F64": "f8",
        "I64": "i8",
        "I32": "i4",
        "I16": "i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
        "F16": "f2",
    }
    raw = {name: np.frombuffer(data, types[dtype]).reshape(shape) for name, (dtype, shape, data) in pieces.items()}
    used: dict[str, int] = {}
    for module, number in document["small"]["modules"]:
        for name, (dtype, shape) in sorted(document["small"]["kinds"][number].items()):
            begin, used[dtype] = used.get(dtype, 0), used.get(dtype, 0) + math.prod(shape)
            raw[f"{module}.{name}" if module else name] = raw[f"small.{dtype}"][begin : used[dtype]].reshape(shape)
    weights: dict[str, Any] = {}
    for layer, number, *_ in document["plan"]["layers"]:
        kind = document["plan"]["kinds"][number]
        if "bits" in kind:
            bits, shape, axis, own = kind["bits"], kind["shape"], kind["axis"], layer + "." * bool(layer)
            stream = int.from_bytes(raw[own + "weight_packed"].tobytes(), "little")
            codes = [(stream >> (j * bits)) & ((1 << bits) - 1) for j in range(math.prod(shape))]
            rows = np.moveaxis(np.array(codes, int).reshape(shape), axis, 0)
            grid, scale = raw.get(own + "weight_grid"), raw[own + "weight_scale"]
            levels = raw.get(own + "weight_levels")
            if grid is not None:
                levels = grid[..., :1] + grid[..., 1:2] * np.arange(grid[..., 2].max())
            levels = np.broadcast_to(levels.astype(scale.dtype), (shape[axis], levels.shape[-1]))
            values = np.take_along_axis(levels, rows.reshape(shape[axis], -1), 1) * scale.reshape(-1, 1)
            weights[layer] = np.moveaxis(values.reshape(rows.shape), 0, axis)
    return weights, raw


@dataclass(frozen=True)
class Verdict:
    """What became of one file. ``outcome``: refused, loaded, or what went wrong; ``error``: the message's kind."""

    index: int
    mutation: str
    seed: str
    bytes: int
    outcome: str
    error: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


def judge(index: int, seed: int, folder: Path) -> Verdict:
    """Make file ``index`` of a run, read it in every way, and judge what comes back."""
    rng = np.random.default_rng([seed, index])
    valid = seeds(folder)
    base, other = valid[rng.integers(len(valid))], valid[rng.integers(len(valid))]
    names = list(SHARES)
    mutation = names[rng.choice(len(names), p=np.array(list(SHARES.values())) / sum(SHARES.values()))]
    try:
        data = MUTATIONS[mutation](rng, base.data, other.data)
    except UnicodeEncodeError:  # a lone surrogate that cannot be put into a file
        data = base.data
    path = folder / "fuzzed.safetensors"
    path.write_bytes(data)
    reads = (wnq.unpack_file, lambda file: wnq.load(file, base.build() if base.build else None), wnq.inspect_file)
    outcome, error, seconds, cpu, state = "refused", "", 0.0, 0.0, None
    for number, read in enumerate(reads):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        try:
            got: Any = read(path)
        except ArtifactError as refusal:
            error = error or kind_of(str(refusal), path)
            if "\n" in str(refusal) or len(str(refusal)) > 1100:
                outcome = "no single sentence"
            continue
        except Exception as failure:
            outcome, error = f"{type(failure).__name__}", kind_of(str(failure), path)
            break
        finally:
            seconds = max(seconds, time.perf_counter() - begin)
            cpu = max(cpu, time.process_time() - cpu_begin)
        if number == 0:
            state = got
            wrong = differs(state, base.state) if mutation not in SEALED else not_as_written(path, state)
        elif number == 1:
            wrong = "loaded what does not unpack" if state is None else differs(tensors_of(got, state), state)
        else:
            wrong = "" if state is not None else "inspected what does not unpack"
        if wrong:
            outcome, error = "wrong values", wrong
            break
        outcome = "loaded" if outcome == "refused" else outcome
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Verdict(index, mutation, base.name, len(data), outcome, error, seconds, cpu, peak)


def tensors_of(model: nn.Module, state: State) -> State:
    """The loaded model's own tensors under the keys of a state."""
    return {key: getattr(model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]).detach() for key in state}


def differs(got: State, expected: State) -> str:
    if got.keys() != expected.keys():
        return f"other tensors: {sorted(got.keys() ^ expected.keys())[:3]}"
    return next((f"{key} differs" for key in got if not same(got[key].numpy(), expected[key].numpy())), "")


def same(one: Any, two: Any) -> bool:
    return (
        one.dtype == two.dtype
        and one.shape == two.shape
        and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(two).tobytes()
    )


def not_as_written(path: Path, state: State) -> str:
    """Compare with the independent reader; the file has passed all checks, so its header can be believed."""
    _, document = take_apart(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a scale of 3e38 overflows, in both readers alike
        try:
            weights, raw = (read_version1 if document["format_version"] == 1 else page_reader())(path)
        except Exception as error:
            return f"loaded what the reader of the page cannot: {type(error).__name__} {error}"
    for key, tensor in state.items():
        owner = document["aliases"].get(key, key)
        layer = owner.removesuffix("weight").removesuffix(".")
        expected = weights[layer] if layer in weights and owner.endswith("weight") else raw.get(owner)
        values = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        if expected is None or not same(values, expected.astype(values.dtype)):
            return f"{key} is not what the page's reader reads"
    return ""


def kind_of(message: str, path: Path) -> str:
    """A message without what is particular to one file."""
    text = message.replace(f"{path}: ", "")
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "…", text)
    return re.sub(r"-?\d[\d.,e+]*\d|\d", "N", text)[:100]


def to_json(verdict: Verdict) -> str:
    return json.dumps(vars(verdict))
