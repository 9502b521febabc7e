"""Any checkpoint, one tensor at a time.

:func:`open_checkpoint` takes a ``.safetensors`` file, a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file of tensors, the index of a
checkpoint in shards, or a folder that holds one of these. It reads names, shapes and types; the tensors stay in the file until
:meth:`Checkpoint.read`.

The float weight behind a quantized layer is called ``weight``, as in the float model, and the states of quantizers are left out.
Nothing in a file is ever run, and all it says is checked before it is used.
"""

from wnq.checkpoints.opening import Checkpoint, is_weight, open_checkpoint
from wnq.checkpoints.source import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "is_weight", "open_checkpoint"]
