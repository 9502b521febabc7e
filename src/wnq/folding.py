"""BatchNorm folded into the weights before they are rounded, so that training sees the weights that an integer engine runs.

    pairs = batchnorm_pairs(model, images)             # the float model
    quantize_(model, plan)
    fold_batchnorm_(model, pairs)                      # train ...
    merge_batchnorm_(model)                            # convolutions with biases; no BatchNorm is left

References:
    B. Jacob et al., arXiv:1712.05877, CVPR 2018, Sec. 3.2, Eq. 14.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wnq.layers import BatchNorm, channel_axis
from wnq.prepared import float_weight, move_output_, weight_quantizer
from wnq.quantizer import Quantized, Quantizer, along_axis, compute_dtype
from wnq.readers import foldable_pairs

FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Folded(Quantizer):
    r"""A weight quantizer behind a BatchNorm's factor: :math:`w_q = Q(w\,\gamma/\sigma)`, one factor an output channel.

    Sigma is the running deviation; during a training step of its layer, that of the batch, through which gradients flow.
    """

    def __init__(self, quantizer: Quantizer, batchnorm: BatchNorm) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.bits, self.axis = quantizer.bits, quantizer.axis
        # Not a submodule: gamma and beta belong to the layer, with the layer's learning rate and decay.
        vars(self)["batchnorm"] = batchnorm

    def scaled(self, w: Tensor) -> Tensor:
        """Return the weights times the factor."""
        batchnorm = cast(BatchNorm, vars(self)["batchnorm"])
        deviation = vars(self).get("batch_deviation")
        if deviation is None:
            deviation = _running_deviation(batchnorm)
        factor = _gamma(batchnorm, deviation) / deviation
        return w * along_axis(factor.to(w.dtype), w.ndim, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(w * factor)."""
        return self.quantizer(self.scaled(x.to(compute_dtype(x)))).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return the quantizer's codes of the folded weights."""
        return self.quantizer.encode(self.scaled(x))

    def reset_(self, x: Tensor) -> None:
        """Start the quantizer's parameters from the folded weights."""
        self.quantizer.reset_(self.scaled(x.to(compute_dtype(x))).detach())


def _running_deviation(batchnorm: BatchNorm) -> Tensor:
    assert batchnorm.running_var is not None
    return (batchnorm.running_var + batchnorm.eps).sqrt()


def _gamma(batchnorm: BatchNorm, like: Tensor) -> Tensor:
    return torch.ones_like(like) if batchnorm.weight is None else batchnorm.weight  # pyright: ignore[reportUnnecessaryComparison]


def _shift(batchnorm: BatchNorm, mean: Tensor, deviation: Tensor) -> Tensor:
    beta = torch.zeros_like(mean) if batchnorm.bias is None else batchnorm.bias  # pyright: ignore[reportUnnecessaryComparison]
    return beta - _gamma(batchnorm, mean) * mean / deviation


def batchnorm_pairs(model: nn.Module, *inputs: Any) -> list[tuple[str, str]]:
    """Return ``(layer, BatchNorm)`` names wherever a BatchNorm alone reads what a convolution or linear layer puts out.

    The model runs once, in eval mode. A layer whose output something else reads as well, such as a shortcut, is left out, and
    so are layers and BatchNorms that run more than once: folding would change their results.

    Args:
        model: the float model.
        inputs: what its forward takes; the smallest batch will do.
    """
    found = foldable_pairs(model, *inputs)
    return [(layer, norm) for layer, norm in found.items() if isinstance(model.get_submodule(layer), FOLDABLE)]


def fold_batchnorm_(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> nn.Module:
    """Move each pair's BatchNorm in front of its layer's rounding, in place, and return the model.

    While training, a layer runs twice: once with float weights, for the batch's mean and deviation, and once with the rounded
    folded weights. Running statistics are kept as BatchNorm keeps them; in eval mode they take the place of the batch's.

    Args:
        model: a quantized model (:func:`wnq.quantize_`), or a float one, whose pairs are merged at once with their running
            statistics, for inference and for loading a packed file of a merged model into.
        pairs: from :func:`batchnorm_pairs`.

    Raises:
        ValueError: a name is not that of a layer or a BatchNorm with running statistics, the channels differ, or the layer is
            neither a convolution nor linear.
    """
    modules = dict(model.named_modules())
    for layer_name, norm_name in pairs:
        _check_pair(modules, layer_name, norm_name)
    for layer_name, norm_name in pairs:
        layer, batchnorm = modules[layer_name], cast(BatchNorm, modules[norm_name])
        path, _, attribute = norm_name.rpartition(".")
        setattr(model.get_submodule(path), attribute, move_output_(batchnorm, nn.Identity()))
        layer.folded_batchnorm = batchnorm
        quantizer = weight_quantizer(layer)
        if quantizer is not None:
            folded = Folded(quantizer, batchnorm)
            cast(Any, layer).parametrizations.weight[0] = folded
            folded.reset_(float_weight(layer).detach())
            layer.register_forward_pre_hook(_measure_batch)
            layer.register_forward_hook(_add_shift)
        else:
            _merge_layer_(layer)
    return model


def _check_pair(modules: dict[str, nn.Module], layer_name: str, norm_name: str) -> None:
    layer, batchnorm = modules.get(layer_name), modules.get(norm_name)
    if not isinstance(layer, FOLDABLE) or not isinstance(batchnorm, BatchNorm) or batchnorm.running_var is None:
        raise ValueError(
            f"cannot fold {norm_name!r} ({type(batchnorm).__name__}) into {layer_name!r} ({type(layer).__name__}): expected a "
            "BatchNorm with running statistics and a convolution or linear layer; take pairs from batchnorm_pairs(model, inputs)."
        )
    channels = float_weight(layer).shape[0]
    if batchnorm.num_features != channels:
        raise ValueError(
            f"cannot fold {norm_name!r} of {batchnorm.num_features} channels into {layer_name!r} of {channels}."
        )


def _measure_batch(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook, after the input was quantized: the batch's statistics of the float layer."""
    batchnorm = cast(BatchNorm, layer.folded_batchnorm)
    if not (layer.training and batchnorm.training):
        return
    weight = float_weight(layer)
    if isinstance(layer, nn.Linear):
        y = nn.functional.linear(args[0], weight)
        dims = list(range(y.ndim - 1))
    else:
        y = cast(nn.Conv2d, layer)._conv_forward(args[0], weight, None)  # pyright: ignore[reportPrivateUsage]
        dims = [0, *range(2, y.ndim)]
    y = y.to(compute_dtype(y))
    mean, variance = y.mean(dims), y.var(dims, unbiased=False)
    folded = weight_quantizer(layer)
    assert isinstance(folded, Folded)
    vars(folded)["batch_deviation"] = (variance + batchnorm.eps).sqrt()
    vars(layer)["batch_mean"] = mean
    with torch.no_grad():
        assert batchnorm.running_mean is not None and batchnorm.running_var is not None
        assert batchnorm.num_batches_tracked is not None
        batchnorm.num_batches_tracked += 1
        share = 1 / batchnorm.num_batches_tracked if batchnorm.momentum is None else batchnorm.momentum
        count = y.numel() / len(mean)
        bias = cast(Tensor | None, layer.bias)
        seen = mean if bias is None else mean + bias
        batchnorm.running_mean.lerp_(seen.to(batchnorm.running_mean), share)
        batchnorm.running_var.lerp_((variance * count / max(1, count - 1)).to(batchnorm.running_var), share)


def _add_shift(layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: what BatchNorm adds. The layer's own bias, already in the output, is scaled as BatchNorm would."""
    batchnorm = cast(BatchNorm, layer.folded_batchnorm)
    folded = weight_quantizer(layer)
    assert isinstance(folded, Folded)
    deviation, mean = vars(folded).pop("batch_deviation", None), vars(layer).pop("batch_mean", None)
    bias = cast(Tensor | None, layer.bias)
    if deviation is None or mean is None:
        shift = _merged_bias(batchnorm, bias)
    else:
        shift = _shift(batchnorm, mean, deviation)  # the batch's mean is of the outputs without bias
    if bias is not None:
        shift = shift - bias
    axis = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
    return output + along_axis(shift.to(output.dtype), output.ndim, axis)


def _merged_bias(batchnorm: BatchNorm, bias: Tensor | None) -> Tensor:
    assert batchnorm.running_mean is not None
    mean = batchnorm.running_mean if bias is None else batchnorm.running_mean - bias
    return _shift(batchnorm, mean, _running_deviation(batchnorm))


@torch.no_grad()
def merge_batchnorm_(model: nn.Module) -> nn.Module:
    """End what :func:`fold_batchnorm_` began: layers with the folded float weights and biases, in place.

    In eval mode the outputs stay what they were, up to the rounding of one multiplication.
    """
    for layer in model.modules():
        if isinstance(getattr(layer, "folded_batchnorm", None), BatchNorm):
            _merge_layer_(layer)
    return model


@torch.no_grad()
def _merge_layer_(layer: nn.Module) -> None:
    batchnorm, weight = cast(BatchNorm, layer.folded_batchnorm), float_weight(layer)
    quantizer = weight_quantizer(layer)
    folded = quantizer if isinstance(quantizer, Folded) else None
    bias = _merged_bias(batchnorm, cast(Tensor | None, layer.bias)).to(weight.dtype)
    if folded is not None:
        scaled = folded.scaled(weight)
        cast(Any, layer).parametrizations.weight[0] = folded.quantizer
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):  # pyright: ignore[reportPrivateUsage]
            for key in [key for key, hook in hooks.items() if hook in (_measure_batch, _add_shift)]:
                del hooks[key]
    else:
        axis = cast(int, channel_axis(layer))
        deviation = _running_deviation(batchnorm)
        scaled = weight * along_axis(_gamma(batchnorm, deviation) / deviation, weight.ndim, axis)
    weight.copy_(scaled)
    layer.bias = nn.Parameter(bias.clone())
    del layer.folded_batchnorm
