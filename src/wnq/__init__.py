"""wnq: any PyTorch model at 1-8 bits by weight-normalization based quantization (arXiv:1907.00593)."""

from wnq.attach import calibrate_, freeze_, get_plan, input_signs, param_groups, quantize_, quantized_layers
from wnq.methods import Method, get_method, list_methods, register
from wnq.plan import Plan, format_plan, make_plan
from wnq.quantizer import CodebookQuantizer, Quantized, Quantizer, Uniform

__version__ = "0.1.0"

__all__ = [
    "CodebookQuantizer",
    "Method",
    "Plan",
    "Quantized",
    "Quantizer",
    "Uniform",
    "calibrate_",
    "format_plan",
    "freeze_",
    "get_method",
    "get_plan",
    "input_signs",
    "list_methods",
    "make_plan",
    "param_groups",
    "quantize_",
    "quantized_layers",
    "register",
]
