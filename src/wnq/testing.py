"""The laws that every quantizer keeps, as functions, so that a third party can hold its own quantizer to them.

    from wnq.testing import check_method, check_quantizer
    check_quantizer(lambda weight: MyQuantizer(bits=2))
    check_method(get_method("my_method"))

Each law raises ``AssertionError`` with the law's name and what it saw. No tolerance is used except where a law says why.
"""

import copy
import io
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from wnq.attach import freeze_, quantize_
from wnq.methods import Method, get_method
from wnq.plan import make_plan
from wnq.quantizer import Quantizer

Make = Callable[[Tensor], Quantizer]
"""Builds a fresh quantizer for a tensor (a weight, or a first batch of activations)."""

SHAPES = ((4, 3, 3, 3), (5, 7), (3, 2, 5), (2, 3, 1, 2, 3), (1, 1))


def _require(holds: bool, law: str, seen: str) -> None:
    if not holds:
        raise AssertionError(f"{law}: {seen}")


def _samples(dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Yield weights of several shapes: Gaussian, heavy-tailed (a few large values), and tiny."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for scale in (1.0, 1e-3):
            x = torch.randn(shape, generator=generator)
            yield (x * scale).to(dtype)
            yield (x**3 * scale).to(dtype)


def _made(make: Make, x: Tensor) -> Quantizer:
    quantizer = make(x)
    quantizer.reset_(x)
    quantizer.observe_(x)
    return quantizer


def exact(make: Make) -> None:
    """Law 1: ``forward(x)`` equals ``quantize(x).dequantize()``, bit for bit, and that equals a look-up in the codebook."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for x in _samples(dtype):
            quantizer = _made(make, x)
            quantized = quantizer.quantize(x)
            values = quantized.dequantize()
            _require(
                torch.equal(quantizer(x), values.to(dtype)),
                "exact",
                f"forward differs from the codes' values, {dtype}, shape {tuple(x.shape)}",
            )
            book = quantized.codebook
            rows = quantized.codes.movedim(quantized.axis, 0).reshape(quantized.codes.shape[quantized.axis], -1).long()
            looked_up = book[rows] if book.ndim == 1 else book.gather(1, rows)
            expected = values.movedim(quantized.axis, 0).reshape(rows.shape)
            _require(torch.equal(looked_up, expected), "exact", "codebook[codes] differs from dequantize()")


def integer_codes(make: Make) -> None:
    """Law 2: codes are uint8 and below ``n_levels``, which is at most 2^bits; levels never descend."""
    for x in _samples():
        quantizer = _made(make, x)
        quantized = quantizer.quantize(x)
        _require(quantized.codes.dtype == torch.uint8, "integer codes", f"dtype {quantized.codes.dtype}")
        _require(
            int(quantized.codes.max()) < quantized.n_levels <= 2**quantizer.bits,
            "integer codes",
            f"{quantized.n_levels} levels at {quantizer.bits} bits",
        )
        _require(bool((quantized.levels.diff(dim=-1) >= 0).all()), "integer codes", "levels descend")


def few_values(make: Make) -> None:
    """Law 3: at most 2^bits distinct values in a channel."""
    for x in _samples():
        quantizer = _made(make, x)
        for channel in quantizer(x).detach().movedim(quantizer.axis, 0):
            _require(
                len(channel.unique()) <= 2**quantizer.bits,
                "few values",
                f"{len(channel.unique())} distinct values at {quantizer.bits} bits",
            )


def same_kind(make: Make) -> None:
    """Law 4: shape, dtype and device are kept, also for a tensor that is not contiguous."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for x in _samples(dtype):
            turned = x.transpose(0, 1).contiguous().transpose(0, 1)
            y = _made(make, turned)(turned)
            kept = y.shape == x.shape and y.dtype == dtype and y.device == x.device
            _require(kept, "same kind", f"{tuple(y.shape)}, {y.dtype}")


def gradients(make: Make) -> None:
    """Law 5: gradients are finite and reach the input and every parameter."""
    for x in _samples():
        if x.numel() == 1:
            continue
        quantizer = _made(make, x)
        x = x.clone().requires_grad_()
        quantizer(x).backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
        _require(
            x.grad is not None and bool(torch.isfinite(x.grad).all()) and bool(x.grad.any()),
            "gradients",
            "none, or not finite, at the input",
        )
        for name, parameter in quantizer.named_parameters():
            _require(
                parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()),
                "gradients",
                f"none, or not finite, at {name}",
            )


def degenerate(make: Make) -> None:
    """Law 6: zeros, constants and a single element give finite values and finite gradients."""
    for shape in ((3, 4), (1, 1), (2, 1, 3, 3)):
        for constant in (0.0, 0.7, -0.7, 1e-30):
            x = torch.full(shape, constant)
            quantizer = _made(make, x)
            x.requires_grad_()
            y = quantizer(x)
            y.sum().backward()
            _require(bool(torch.isfinite(y).all()), "degenerate", f"forward of {constant} x {shape} is not finite")
            _require(
                x.grad is not None and bool(torch.isfinite(x.grad).all()),
                "degenerate",
                f"gradient at {constant} x {shape} is not finite",
            )
            _require(
                torch.equal(y.detach(), quantizer.quantize(x.detach()).dequantize()), "degenerate", "codes disagree"
            )


def non_finite(make: Make) -> None:
    """Law 7: ``quantize`` refuses NaN and infinity with a ``ValueError``; ``forward`` keeps a NaN visible."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        good = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
        quantizer = _made(make, good)
        x = good.clone()
        x[1, 2] = bad
        try:
            quantizer.quantize(x)
        except ValueError as error:
            _require("NaN or infinite" in str(error), "non-finite", f"unclear message: {error}")
        else:
            raise AssertionError(f"non-finite: quantize accepted {bad}")
        if bad != bad:
            _require(bool(quantizer(x).isnan().any()), "non-finite", "forward hides a NaN")


def pure(make: Make) -> None:
    """Law 8: two calls agree, and neither ``forward`` nor ``quantize`` changes the state."""
    for x in _samples():
        quantizer = _made(make, x).train()
        before = copy.deepcopy(quantizer.state_dict())
        first, second = quantizer(x), quantizer(x)
        quantizer.quantize(x)
        _require(torch.equal(first, second), "pure", "two calls differ")
        _require(all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items()), "pure", "the state changed")


def portable(make: Make) -> None:
    """Law 9: a deepcopy is independent, and a strict state_dict round trip and ``torch.save`` give equal outputs."""
    generator = torch.Generator().manual_seed(3)
    x, other = torch.randn(4, 6, generator=generator), 5 * torch.randn(4, 6, generator=generator)
    quantizer = _made(make, x)
    expected = quantizer(x).detach()
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(3)
    _require(torch.equal(quantizer(x), expected), "portable", "changing a deepcopy changed the original")
    loaded = _made(make, other)
    loaded.load_state_dict(quantizer.state_dict(), strict=True)
    _require(torch.equal(loaded(x), expected), "portable", "a state_dict round trip changed the output")


def compiles(make: Make) -> None:
    """Law 11: ``torch.compile(fullgraph=True)`` runs, forward and backward, and is close.

    Close, not equal: the compiler may fuse or reorder sums and products, and a value that sits within such a rounding error of a
    threshold may then take the neighbouring level; at most one element in fifty may do so here.
    """
    x = torch.randn(8, 50, generator=torch.Generator().manual_seed(4))
    quantizer = _made(make, x)
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = quantizer(eager)
    actual = torch.compile(quantizer, fullgraph=True)(compiled)
    expected.square().sum().backward()
    actual.square().sum().backward()
    far = ~torch.isclose(actual, expected, rtol=1e-5, atol=1e-7)
    _require(int(far.sum()) <= x.numel() // 50, "compiles", f"{int(far.sum())} of {x.numel()} values differ")
    assert eager.grad is not None and compiled.grad is not None
    off = ~torch.isclose(compiled.grad, eager.grad, rtol=1e-4, atol=1e-5)
    _require(int(off.sum()) <= x.numel() // 50, "compiles", f"{int(off.sum())} of {x.numel()} gradients differ")


LAWS: tuple[Callable[[Make], None], ...] = (
    exact, integer_codes, few_values, same_kind, gradients, degenerate, non_finite, pure, portable, compiles,
)  # fmt: skip
"""The laws of one quantizer. Laws 10, 12 and 13 are about methods: see :data:`METHOD_LAWS`."""


def check_quantizer(make: Make) -> None:
    """Hold a quantizer to all :data:`LAWS`.

    Args:
        make: builds a fresh one for a given tensor. It is then shown the tensor through ``reset_`` and ``observe_``.

    Raises:
        AssertionError: the first law that is broken, with what was seen.
    """
    for law in LAWS:
        law(make)


def _toy(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a two-layer net with a learnable task: which of four directions a 2-d point lies in."""
    torch.manual_seed(seed)
    # Leaky, because behind a plain ReLU a binary input would be +1 everywhere.
    model = nn.Sequential(
        nn.Linear(2, 32),
        nn.BatchNorm1d(32),
        nn.LeakyReLU(0.2),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.LeakyReLU(0.2),
        nn.Linear(32, 4),
    )
    x = torch.randn(512, 2)
    return model, x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()


def rebuilt(method: Method) -> None:
    """Law 10: the registry rebuilds the method from its name and options."""
    again = get_method(method.name, **method.options)
    _require(again == method and dict(again.options) == dict(method.options), "rebuilt", f"{again} is not {method}")
    _require((again.weight is None) == (method.weight is None), "rebuilt", "the weight builder was lost")


def stored(method: Method) -> None:
    """Law 12: a frozen model, and a pickled one, give the same logits as the trained one, bit for bit."""
    model, x, _ = _toy()
    quantize_(model, make_plan(model, method, first_last_bits=None))
    model(x)
    model.eval()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    _require(torch.equal(loaded(x), expected), "stored", "a pickled model differs")
    _require(torch.equal(freeze_(copy.deepcopy(model))(x), expected), "stored", "a frozen model differs")
    _require(torch.equal(model(x), expected), "stored", "freezing a copy changed the original")


def learns(method: Method) -> None:
    """Law 13: it learns a small task far above chance (25 %).

    A start may fail, for a few weights of a bit can swing to a bad end on one processor and not on another; two others must not.
    """
    accuracies = [_accuracy(method, seed=0)]
    if accuracies[0] <= LEARNT:
        accuracies += [_accuracy(method, seed) for seed in (1, 2)]
    worst = accuracies[0] if len(accuracies) == 1 else min(accuracies[1:])
    said = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    _require(worst > LEARNT, "learns", f"accuracy {said} from as many starts on a task of four classes")


def _accuracy(method: Method, seed: int) -> float:
    model, x, y = _toy(seed)
    quantize_(model, make_plan(model, method))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = 150
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (model.eval()(x).argmax(1) == y).float().mean().item()


LEARNT = 0.8
"""Accuracy that counts as learnt, a share."""

METHOD_LAWS: tuple[Callable[[Method], None], ...] = (rebuilt, stored, learns)


def check_method(method: Method, *, axis: int = 0) -> None:
    """Hold a method to :data:`METHOD_LAWS` and its quantizers to :data:`LAWS`."""
    if method.weight is not None:
        weight = method.weight
        check_quantizer(lambda x: weight(x, axis))
    if method.input is not None:
        build = method.input
        check_quantizer(lambda _: build())
    for law in METHOD_LAWS:
        law(method)
