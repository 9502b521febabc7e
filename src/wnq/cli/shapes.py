"""What networks given by name are measured with: shapes of images, widths."""

IMAGENET = ("alexnet_bn", "mobilenet_v1", "mobilenet_v2", "resnet18", "resnet34", "resnet50")
SHAPES = {"digits_cnn": "1x8x8", "digits_mlp": "1x8x8", **dict.fromkeys(IMAGENET, "3x224x224")}
"""Of one image: channels, height, width. Networks that are not named here are measured at :data:`USUAL`."""
USUAL = "3x32x32"


def shape_of(target: str, size: str | None) -> list[int]:
    """Return channels, height and width: those of ``--size``, or what suits the network.

    Raises:
        ValueError: ``size`` is not of the form CxHxW.
    """
    shape = numbers_in(size or SHAPES.get(target, USUAL), "x", "--size")
    if len(shape) != 3:
        raise ValueError(f"--size must be channels x height x width, such as 3x224x224, got {size!r}.")
    return shape


def widths_of(bits: str) -> dict[str, int]:
    """Return the options ``w_bits`` and ``a_bits`` that ``--bits`` says.

    Raises:
        ValueError: it is not of the form W/A.
    """
    widths = numbers_in(bits, "/", "--bits")
    if len(widths) != 2:
        raise ValueError(f"--bits must be W/A, such as 4/4, got {bits!r}.")
    return {"w_bits": widths[0], "a_bits": widths[1]}


def numbers_in(text: str, separator: str, option: str) -> list[int]:
    """Return the positive integers of an option.

    Raises:
        ValueError: something else is in it.
    """
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{option} must be positive integers separated by {separator!r}, got {text!r}.")
    return numbers
