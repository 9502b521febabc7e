"""How to train: every setting, checked, and the learning rate that follows from them."""

import dataclasses
import math

OPTIMIZERS = ("sgd", "adamw")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Every field is a key of a recipe's ``[train]`` table."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, over all processes together."""
    optimizer: str = "sgd"
    """``sgd`` (momentum, Nesterov) or ``adamw``."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Of SGD, with Nesterov's correction."""
    weight_decay: float = 5e-4
    """Of the model's own parameters."""
    warmup_epochs: float = 1.0
    """Linear warm-up from zero, then cosine to ``final_lr`` times the peak."""
    final_lr: float = 0.0
    """Share of the peak rate that the cosine ends at."""
    quantizer_lr: float = 1.0
    """Learning rate of the quantizers' parameters (steps, clips, scales), as a share of ``lr``."""
    quantizer_weight_decay: float = 0.0
    """Their decay: 0 for learned steps, that of the weights for PACT."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, 0 to 1."""
    distill_weight: float = 0.0
    """Share of the loss that is distillation from the float twin, 0 (off) to 1."""
    distill_temperature: float = 1.0
    """Softening of both distributions; the term is multiplied by its square."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay a step of an exponential average of the weights, which becomes the result; 0: off."""
    bn_batches: int = 0
    """Training batches to re-estimate BatchNorm statistics on at the end; 0: keep the running ones."""
    crop_padding: int = 0
    """Random crops: pixels of padding on each side."""
    flip: bool = False
    """Mirror images at random."""
    bf16: bool = False
    """Run the model under bfloat16 autocast (quantizers still compute in float32)."""
    channels_last: bool = False
    """Memory format of images and weights; faster for most convolutions."""
    compile: bool = False
    """Compile the model with ``torch.compile(fullgraph=True)``."""
    cuda_graph: bool = False
    """Replay every step as one CUDA graph, which frees it from the host's pace; on other devices it changes nothing."""
    compact_activations: bool = False
    """Keep quantized inputs as codes for the backward pass: less memory, the same gradients bit for bit; eager only."""
    eval_every: int = 1
    """Evaluate after every this many epochs (and always after the last)."""
    checkpoint_steps: int = 0
    """Write a checkpoint every this many steps; 0: after every epoch."""
    record_every: int = 0
    """Record tails, errors and the gradient at the maximum of every quantized layer each this many steps; 0: off."""
    seed: int = 0
    """Of the data order and augmentation (and of the model's start, where a recipe builds it)."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "distill_temperature", "eval_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)!r}.")
        for name in ("label_smoothing", "distill_weight", "ema_decay", "final_lr", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}.")
        decays_and_rates = ("weight_decay", "quantizer_lr", "quantizer_weight_decay", "warmup_epochs", "clip_grad_norm")
        for name in (*decays_and_rates, "bn_batches", "crop_padding", "checkpoint_steps", "record_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}.")
        if self.compact_activations and self.compile:
            raise ValueError(
                "compact_activations works in eager mode, and a compiled step decides by itself what to keep: "
                "set compile = false or compact_activations = false."
            )
        if self.cuda_graph and self.record_every:
            raise ValueError(
                "record_every looks into steps that the host takes, and with cuda_graph the device takes them alone: set "
                "record_every = 0 or cuda_graph = false."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {self.optimizer!r}.")


def schedule(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Return the learning rate at a step as a share of its peak: linear warm-up, then a cosine."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    total = config.epochs * steps_per_epoch
    done = (step - warmup) / max(1.0, total - warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
