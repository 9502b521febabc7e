"""The packed file: true k-bit codes, the float rest and the plan, in one safetensors file.

``verbs`` are what users call; under them, ``sizes`` says where the bytes are, ``content`` is a file checked against itself and a
model, ``manifest`` and ``coding`` what a file says about itself, ``layout`` how codes lie in it, ``coders`` and ``ans`` how they
become few bytes, ``container`` safetensors with checksums, and ``bundle`` many small tensors laid end to end.
"""

from wnq.artifact.container import ArtifactError
from wnq.artifact.sizes import LayerSize, SizeReport
from wnq.artifact.verbs import inspect_file, load, save, unpack_file

__all__ = ["ArtifactError", "LayerSize", "SizeReport", "inspect_file", "load", "save", "unpack_file"]
