"""The laws, over every registered method at every width, and over the activation quantizers."""

import pytest
import torch

from wnq.activations import list_inputs
from wnq.methods import get_method, list_methods
from wnq.quantizer import CodebookQuantizer, Uniform
from wnq.testing import LAWS, METHOD_LAWS, check_method

WNQ = [
    {"w_bits": bits, "grid": grid, "scale": scale, "granularity": granularity}
    for bits in (1, 2, 3, 4, 8)
    for grid in ("full", "symmetric")
    for scale in ("max", "one", "learned", "optimal")
    for granularity in ("tensor", "channel")
    if not (bits == 1 and grid == "symmetric")
]
METHODS = [("wnq", options) for options in WNQ]
METHODS += [("wnq", {"w_bits": bits, "max_gain": gain}) for bits in (5, 6, 7) for gain in (0.0, 0.3, 1.0)]
METHODS += [(info.name, {"w_bits": bits}) for info in list_methods() if info.name != "wnq" for bits in info.widths]


def ignoring_tensor(kind, *args, **kwargs):
    return lambda _: kind(*args, **kwargs)


INPUTS = {
    f"{info.name}{bits}": ignoring_tensor(info.build, bits)
    for info in list_inputs()
    for bits in info.widths
    if bits in (1, 2, 3, 8)
}
INPUTS |= {
    "uniform3": lambda _: Uniform(3),
    "uniform4-symmetric": lambda _: Uniform(4, "symmetric"),
    "codebook": lambda _: CodebookQuantizer(torch.tensor([-1.0, 0.0, 0.5]), torch.tensor(0.7), 2),
    "codebook-channel": lambda x: CodebookQuantizer(
        torch.tensor([-1.0, 0.0, 0.5, 2.0]), torch.linspace(0.1, 1, x.shape[0]), 2
    ),
}


def identity(name, options):
    return name + "".join(f"-{value}" for value in options.values())


@pytest.mark.parametrize(("name", "options"), METHODS, ids=[identity(*m) for m in METHODS])
def test_weight_quantizer_keeps_the_laws(name, options):
    method = get_method(name, **options)
    laws = [law for law in LAWS if law.__name__ != "compiles"]
    for law in laws:
        law(lambda x: method.weight(x, 0))


COMPILED = [
    ("wnq", {"w_bits": 1}),
    ("wnq", {"w_bits": 2, "scale": "learned", "granularity": "channel"}),
    ("wnq", {"scale": "optimal"}),
    ("wnq", {"grid": "symmetric", "normalize": "standardize", "ewgs": 1e-2}),
]
COMPILED += [(info.name, {}) for info in list_methods() if info.name != "wnq"]


@pytest.mark.parametrize(("name", "options"), COMPILED, ids=[identity(*m) for m in COMPILED])
def test_weight_quantizer_compiles(name, options):
    (compiles,) = [law for law in LAWS if law.__name__ == "compiles"]
    compiles(lambda x: get_method(name, **options).weight(x, 0))


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
def test_input_quantizer_keeps_the_laws(make, law):
    law(make)


@pytest.mark.parametrize("name", [f"{info.name}{info.widths[-1]}" for info in list_inputs()] + ["uniform3"])
def test_input_quantizer_compiles(name):
    (compiles,) = [law for law in LAWS if law.__name__ == "compiles"]
    compiles(INPUTS[name])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [info.name for info in list_methods()])
def test_laws_hold_along_either_axis(name, axis):
    for law in LAWS[:4]:
        law(lambda x: get_method(name).weight(x, axis))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", [info.name for info in list_methods()])
def test_method_keeps_the_laws(name, law):
    law(get_method(name))


def test_the_shipped_check_accepts_a_good_method_and_names_the_broken_law():
    check_method(get_method("wnq", w_bits=2, a_bits=2))

    class Leaky(Uniform):
        def forward(self, x):
            return super().forward(x) * 1.0000001

    with pytest.raises(AssertionError, match="exact: forward differs"):
        LAWS[0](lambda _: Leaky(3))

    class Wide(Uniform):
        def levels(self, like):
            return torch.arange(9.0)

    with pytest.raises(AssertionError, match="integer codes: 9 levels at 3 bits"):
        LAWS[1](lambda _: Wide(3))
