"""The training-time view in the loops of others: Lightning, the Trainer of transformers, accelerate, TensorBoard.

None of those packages is imported before it is used. What is recorded, and when, is :class:`wnq.recorder.TailRecorder`'s.
"""

from wnq.integrations.accelerate import to_trackers
from wnq.integrations.lightning import lightning_callback
from wnq.integrations.naming import LOGS, scalars
from wnq.integrations.tensorboard import to_tensorboard
from wnq.integrations.transformers import transformers_callback

__all__ = ["LOGS", "lightning_callback", "scalars", "to_tensorboard", "to_trackers", "transformers_callback"]
