"""The layers of a model in numbers: rows of evidence for tables, and all that a report draws.

``rows`` are the statistics of a weight and of what its quantizer makes of it, ``profile`` is what each clip rule would make of
it at each width, ``evidence`` is both for a whole model or a checkpoint, ``causes`` is what the error comes from. What is
undefined (the crest factor of an all-zero weight) is NaN in the dataclasses and ``None`` in JSON; what does not apply (the
error of a float layer) is ``None`` in both.
"""

from wnq.analysis.causes import CAUSES, HALF, Cause, cause_of
from wnq.analysis.evidence import ModelEvidence, checkpoint_evidence, checkpoint_stats, collect_evidence, layer_names
from wnq.analysis.profile import OUTLIER, RULES, WIDTHS, Channels, Profile, RuleError, Tail, profile
from wnq.analysis.rows import LayerStats, layer_stats, plain, stats_rows, weight_stats
from wnq.tails import ErrorStats, Histogram, TensorStats, error_stats, histogram, predicted_error, tensor_stats

__all__ = [
    "CAUSES",
    "HALF",
    "OUTLIER",
    "RULES",
    "WIDTHS",
    "Cause",
    "Channels",
    "ErrorStats",
    "Histogram",
    "LayerStats",
    "ModelEvidence",
    "Profile",
    "RuleError",
    "Tail",
    "TensorStats",
    "cause_of",
    "checkpoint_evidence",
    "checkpoint_stats",
    "collect_evidence",
    "error_stats",
    "histogram",
    "layer_names",
    "layer_stats",
    "plain",
    "predicted_error",
    "profile",
    "stats_rows",
    "tensor_stats",
    "weight_stats",
]
