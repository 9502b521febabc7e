"""The packed file: true k-bit codes, the float rest and the plan, in one safetensors file.

``verbs`` are what users call; under them, ``content`` is a decoded file checked against a model, ``manifest`` what a file
says about itself, ``container`` safetensors with checksums, and ``bundle`` many small tensors laid end to end.
"""

from wnq.artifact.container import ArtifactError
from wnq.artifact.verbs import LayerSize, SizeReport, inspect_file, load, save, unpack_file

__all__ = ["ArtifactError", "LayerSize", "SizeReport", "inspect_file", "load", "save", "unpack_file"]
