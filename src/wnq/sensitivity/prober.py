"""A model and its data, ready to be asked what quantizing any choice of layers does."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from wnq.activations import input_builder
from wnq.layers import INDEX_INPUT, channel_axis
from wnq.quantizer import Quantizer, check_finite
from wnq.sensitivity.records import Change, Settings, quantizable_layers
from wnq.sensitivity.rounding import quantized_weight

LossFunction = Callable[[Any, Any], Tensor]
"""``(outputs, labels) -> losses``: one a sample ``(B,)``, or one a batch ``()``, which then is the unit of the standard error."""


class Outcome(NamedTuple):
    """What the model did on the data, float64 on the processor."""

    losses: Tensor
    """One a sample, or one a batch."""
    right: Tensor | None
    """1 where the answer is correct, else 0; None if nobody says what is."""


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, in nats, for logits ``(B, classes)``."""
    return F.cross_entropy(outputs.float(), labels, reduction="none")


def largest_is_label(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return for each sample whether its largest logit is the label's; never where a logit is NaN."""
    return (outputs.argmax(1) == labels) & ~outputs.isnan().any(1)


def paired(values: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the mean difference and its standard error; NaN where a value is not finite, the latter also for a single pair."""
    difference = values - reference
    if not bool(torch.isfinite(difference).all()):
        return math.nan, math.nan
    count = len(difference)
    error = float(difference.std(correction=1)) / math.sqrt(count) if count > 1 else math.nan
    return float(difference.mean()), error


class Prober:
    """A float model and its data, ready to be asked what quantizing any choice of layers does.

    Args:
        model: a float model, on the device of the data; only read. It runs in eval mode and gets its modes back.
        batches: ``(inputs, labels)``; kept in memory, so that every measurement sees the same. Inputs are a tensor, a tuple of
            positional arguments or a mapping of named ones.
        settings: grid, granularity, inputs and layers count here.
        loss: one loss a sample, or one a batch.
        correct: for each sample whether it is right; by default the largest logit's rule, with the default loss only.

    Raises:
        ValueError: no batches, nothing to quantize, the model is quantized already, a weight is not finite, or the float model's
            own loss is not.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Any]],
        settings: Settings | None = None,
        *,
        loss: LossFunction = cross_entropy,
        correct: LossFunction | None = None,
    ) -> None:
        self.model, self.settings = model, settings or Settings()
        self.layers = quantizable_layers(model, self.settings.layers)
        self.loss = loss
        self.correct: LossFunction | None = largest_is_label if correct is None and loss is cross_entropy else correct
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("there are no batches to measure on. They are empty, or an iterator was used up before.")
        for layer in self.layers:
            check_finite(self.weight(layer.name), where=f"the weight of layer {layer.name!r}")
        self.float_outcome = self.run({})
        losses = self.float_outcome.losses
        bad = int((~torch.isfinite(losses)).sum())
        if bad:
            raise ValueError(
                f"the float model's own loss is NaN or infinite on {bad} of {len(losses)} samples; changes from it mean nothing. "
                "Check weights and data."
            )

    def weight(self, name: str) -> Tensor:
        """Return a layer's float weight."""
        return cast(Tensor, self.model.get_submodule(name).weight).detach()

    def quantized(self, name: str, bits: int, variant: str) -> Tensor:
        """Return a layer's weight, quantized."""
        axis = channel_axis(self.model.get_submodule(name))
        assert axis is not None
        grid, granularity = self.settings.grid, self.settings.granularity
        return quantized_weight(self.weight(name), bits, variant, grid=grid, granularity=granularity, axis=axis)

    def run(self, choices: Mapping[str, tuple[int, str]]) -> Outcome:
        """Run the model with some layers quantized.

        Args:
            choices: layer -> (bits, variant). Layers that share its weight are quantized with it.
        """
        return self.run_with({name: (self.quantized(name, *choice), choice[0]) for name, choice in choices.items()})

    @torch.no_grad()
    def run_with(self, weights: Mapping[str, tuple[Tensor, int]]) -> Outcome:
        """As :meth:`run`, with weights that are quantized already: layer -> (values, width of its inputs if those count)."""
        sharing = {layer.name: (layer.name, *layer.tied) for layer in self.layers}
        replaced = {
            f"{name}.weight" if name else "weight": values
            for owner, (values, _) in weights.items()
            for name in sharing[owner]
        }
        inputs = {name: bits for owner, (_, bits) in weights.items() for name in sharing[owner]}
        losses: list[Tensor] = []
        right: list[Tensor] = []
        with _eval_mode(self.model), _inputs_quantized(self.model, inputs if self.settings.inputs else {}):
            for given, labels in self.batches:
                arguments, named = _arguments(given)
                outputs = functional_call(self.model, replaced, arguments, named, tie_weights=False)
                loss = self.loss(outputs, labels)
                if loss.ndim > 1:
                    raise ValueError(
                        f"the loss function must return one loss a sample (B,) or one a batch (), got {tuple(loss.shape)}. "
                        "Average over the other dimensions."
                    )
                losses.append(loss.reshape(-1).cpu().double())
                if (correct := self.correct) is not None:
                    right.append(correct(outputs, labels).reshape(-1).cpu().double())
        return Outcome(torch.cat(losses), torch.cat(right) if right else None)

    def change(self, outcome: Outcome, reference: Outcome | None = None) -> Change:
        """Compare two outcomes of :meth:`run`; by default with the float model's."""
        reference = reference or self.float_outcome
        change, error = paired(outcome.losses, reference.losses)
        bad = int((~torch.isfinite(outcome.losses)).sum())
        loss = math.nan if bad else float(outcome.losses.mean())
        if outcome.right is None or reference.right is None:
            return Change(loss, change, error, bad)
        points, points_error = paired(100 * outcome.right, 100 * reference.right)
        return Change(loss, change, error, bad, 100 * float(outcome.right.mean()), points, points_error)

    def fingerprint(self) -> dict[str, str]:
        """Return digests of the model's state and of the data, and the name of the loss: equal numbers come of equal ones only."""
        names = [f"{f.__module__}.{f.__qualname__}" for f in (self.loss, self.correct) if hasattr(f, "__qualname__")]  # pyright: ignore
        return {
            "weights": _digest(self.model.state_dict()),
            "data": _digest(self.batches),
            "loss": ", ".join(names),
        }


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and named arguments of the model."""
    if isinstance(given, Mapping):
        return (), dict(cast(Mapping[str, Any], given))
    return (cast(tuple[Any, ...], given) if isinstance(given, tuple) else (given,)), {}


def _digest(value: Any) -> str:
    """Return a SHA-256 of tensors in lists, tuples and mappings: their bytes, types and shapes; of anything else its ``repr``."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(part, Mapping):
            for key, entry in cast(Mapping[Any, Any], part).items():
                digest.update(f"{key!r}:".encode())
                add(entry)
        elif isinstance(part, list | tuple):
            digest.update(f"[{len(cast(list[Any], part))}".encode())
            for entry in cast(list[Any], part):
                add(entry)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    """Put every module into eval mode while the block runs."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _inputs_quantized(model: nn.Module, widths: Mapping[str, int]) -> Generator[None]:
    """Round the inputs of some layers while the block runs; their steps start from the first batch. Indices stay as they are."""
    handles: list[Any] = []
    try:
        for name, bits in widths.items():
            layer = model.get_submodule(name)
            if not isinstance(layer, INDEX_INPUT):
                handles.append(layer.register_forward_pre_hook(_rounding_hook(bits), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding_hook(bits: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    build = input_builder("lsq", bits)
    assert build is not None
    quantizer: Quantizer = build()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = cast(Tensor, args[0] if args else kwargs["input"])
        quantizer.to(x.device).observe_(x)  # the first batch only: see StartsFromData
        return ((quantizer(x), *args[1:]), kwargs) if args else (args, {**kwargs, "input": quantizer(x)})

    return hook
