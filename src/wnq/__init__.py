"""wnq: any PyTorch model at 1-8 bits by weight-normalization based quantization (arXiv:1907.00593).

The public names are imported when they are first used, so that the command line starts quickly.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wnq.activations import register_input
    from wnq.allocation import plan_for_budget
    from wnq.analysis import (
        LayerStats,
        ModelEvidence,
        checkpoint_evidence,
        checkpoint_stats,
        collect_evidence,
        layer_stats,
        weight_stats,
    )
    from wnq.artifact import ArtifactError, SizeReport, inspect_file, load, save, unpack_file
    from wnq.attach import calibrate_, freeze_, get_plan, input_signs, param_groups, quantize_, quantized_layers
    from wnq.budget import parse_budget
    from wnq.checkpoints import open_checkpoint
    from wnq.compact import compact_activations_
    from wnq.data import load_data
    from wnq.export import export_model
    from wnq.folding import batchnorm_pairs, fold_batchnorm_, merge_batchnorm_
    from wnq.integer import Conversion, convert
    from wnq.methods import Method, get_method, list_inputs, list_methods, register
    from wnq.metrics import evaluate
    from wnq.models import build_model, list_models
    from wnq.normalizers import normalize_
    from wnq.plan import Plan, make_plan
    from wnq.plan_table import format_plan
    from wnq.quantizer import CodebookQuantizer, Quantized, Quantizer, Uniform
    from wnq.recipe import load_recipe, load_run, run_recipe
    from wnq.recorder import TailRecorder
    from wnq.report import write_report
    from wnq.sensitivity import Prober, load_sensitivity, measure_sensitivity
    from wnq.together import rounded_together
    from wnq.train import TrainConfig, fit

__version__ = "0.1.0"

_MODULES = {
    "activations": ("register_input",),
    "analysis": (
        "LayerStats",
        "ModelEvidence",
        "checkpoint_evidence",
        "checkpoint_stats",
        "collect_evidence",
        "layer_stats",
        "weight_stats",
    ),
    "artifact": ("ArtifactError", "SizeReport", "inspect_file", "load", "save", "unpack_file"),
    "attach": ("calibrate_", "freeze_", "get_plan", "input_signs", "param_groups", "quantize_", "quantized_layers"),
    "data": ("load_data",),
    "export": ("export_model",),
    "integer": ("Conversion", "convert"),
    "metrics": ("evaluate",),
    "folding": ("batchnorm_pairs", "fold_batchnorm_", "merge_batchnorm_"),
    "methods": ("Method", "get_method", "list_inputs", "list_methods", "register"),
    "models": ("build_model", "list_models"),
    "normalizers": ("normalize_",),
    "plan": ("Plan", "make_plan"),
    "plan_table": ("format_plan",),
    "quantizer": ("CodebookQuantizer", "Quantized", "Quantizer", "Uniform"),
    "recipe": ("load_recipe", "load_run", "run_recipe"),
    "report": ("write_report",),
    "train": ("TrainConfig", "fit"),
    "allocation": ("plan_for_budget",),
    "budget": ("parse_budget",),
    "checkpoints": ("open_checkpoint",),
    "compact": ("compact_activations_",),
    "recorder": ("TailRecorder",),
    "sensitivity": ("Prober", "load_sensitivity", "measure_sensitivity"),
    "together": ("rounded_together",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ArtifactError",
    "CodebookQuantizer",
    "Conversion",
    "LayerStats",
    "Method",
    "ModelEvidence",
    "Plan",
    "Prober",
    "Quantized",
    "Quantizer",
    "SizeReport",
    "TailRecorder",
    "TrainConfig",
    "Uniform",
    "batchnorm_pairs",
    "build_model",
    "calibrate_",
    "checkpoint_evidence",
    "checkpoint_stats",
    "collect_evidence",
    "compact_activations_",
    "convert",
    "evaluate",
    "export_model",
    "fit",
    "fold_batchnorm_",
    "format_plan",
    "freeze_",
    "get_method",
    "get_plan",
    "input_signs",
    "inspect_file",
    "layer_stats",
    "list_inputs",
    "list_methods",
    "list_models",
    "load",
    "load_data",
    "load_recipe",
    "load_run",
    "load_sensitivity",
    "make_plan",
    "measure_sensitivity",
    "merge_batchnorm_",
    "normalize_",
    "open_checkpoint",
    "param_groups",
    "parse_budget",
    "plan_for_budget",
    "quantize_",
    "quantized_layers",
    "register",
    "register_input",
    "rounded_together",
    "run_recipe",
    "save",
    "unpack_file",
    "weight_stats",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"wnq.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    try:  # wnq.attach after import wnq, as if it had been imported
        return importlib.import_module(f"wnq.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"wnq.{name}":
            raise
        raise AttributeError(f"module 'wnq' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
