"""The answer: what the numbers say about where a model loses accuracy and what would help, in sentences made from them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from wnq.analysis import CAUSES, OUTLIER, Cause, Channels, LayerStats, ModelEvidence
from wnq.analysis.causes import gaussian_error
from wnq.drawing import counted, listed, median, number, percent
from wnq.report.charts import median_error, own_errors
from wnq.report.subject import Subject

WORST = 5
"""Layers that the answer names."""

CAUTION = (
    "These are errors of weights. How much accuracy the error of a layer costs depends on the network and on the data, and is "
    "measured by wnq sensitivity; where rounding errs most is where to look first."
)


class Said(NamedTuple):
    """One part of the answer."""

    topic: str
    text: str


def answer(subject: Subject) -> list[Said]:
    """Return the answer, part by part; empty if there is nothing to say."""
    judged = subject.judged
    told = _nonfinite(subject)
    if judged is None:
        kept = [model.name for model in subject.models if model.values_only]
        if kept:
            holds = f"{listed(kept)} {'holds' if len(kept) == 1 else 'hold'} quantized values only"
            told.append(
                Said(
                    "Unknown",
                    f"{holds}: what their rounding cost cannot be told. Give the run, or float weights, as well.",
                )
            )
        return told
    return [
        *told,
        Said("Cost", _loss(subject, judged)),
        Said("Where", _worst(subject)),
        Said("Why", _reasons(subject)),
        Said("What would help", _remedies(subject, judged)),
        *(Said("Training", text) for text in _training(subject, judged)),
        Said("Mind", CAUTION),
    ]


def _nonfinite(subject: Subject) -> list[Said]:
    found = [(model, row) for model in subject.models for row in model.stats if row.nonfinite]
    if not found:
        return []
    said = [f"{row.name} of {model.name} ({row.nonfinite:,} of {row.parameters:,})" for model, row in found[:3]]
    said += [counted(len(found) - 3, "more layer")] if len(found) > 3 else []
    return [
        Said(
            "Damage",
            f"Some weights are NaN or infinite: {listed(said)}. They are left out of every other number, and no quantizer can "
            "round them: mend the training first.",
        )
    ]


def _loss(subject: Subject, judged: ModelEvidence) -> str:
    errors = [(cause.error, row.parameters) for cause, row, _ in subject.causes]
    return (
        f"At {subject.focus} bits, with each layer's range set by its largest weight, the rounding error of {judged.name} is "
        f"{percent(weighted(errors))} of the squared norm of its weights, and {percent(median(e for e, _ in errors))} in the "
        f"median of {counted(len(errors), 'layer')}. The width alone costs "
        f"{percent(gaussian_error(subject.focus, subject.grid))}: that is what Gaussian weights have at their best clip."
    )


def weighted(errors: Sequence[tuple[float | None, int]]) -> float:
    """Return the mean of errors, weighted by the number of weights; NaN if there is none."""
    known = [(error, count) for error, count in errors if error is not None and math.isfinite(error)]
    total = sum(count for _, count in known)
    return sum(error * count for error, count in known) / total if total else math.nan


def _worst(subject: Subject) -> str:
    named = [f"{cause.layer} ({percent(cause.error)})" for cause, _, _ in subject.causes[:3] if cause.error]
    if not named:
        return "No layer has an error."
    first, *rest = named
    return f"Most in {first}" + (f", then {listed(rest)}." if rest else ".")


_HELPS = {
    "channels": "a range for each output channel helps most",
    "tail and channels": "a tighter clip and a range for each output channel help about alike",
    "tail": "a tighter clip helps most",
    "width": "neither halves the error",
    "none": "there is no error",
}
_POINTS = {
    "channels": "ranges of their own help channels of different size",
    "tail": "a clip helps against a tail, a few large weights that stretch the range for all",
    "width": "where neither halves the error, the number of levels is the limit",
}


def _reasons(subject: Subject) -> str:
    count = Counter(cause.cause for cause, _, _ in subject.causes)
    total = len(subject.causes)
    parts: list[str] = []
    for name, said in _HELPS.items():
        if count[name]:
            of = "" if parts else f" of {total:,} layers"
            parts.append(f"in {'every layer' if count[name] == total else f'{count[name]:,}{of}'} {said}")
    points = [said for name, said in _POINTS.items() if any(name in found for found in count)]
    return f"{sentence('; '.join(parts))} {sentence('; '.join(points))}".strip()


def sentence(text: str) -> str:
    """Return a text with a capital and a full stop; nothing for nothing."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _remedies(subject: Subject, judged: ModelEvidence) -> str:
    width = subject.focus
    plain, clip, channel = (percent(median_error(judged, width, rule)) for rule in ("max", "mse", "channel"))
    better = percent(median(cause.remedied for cause, _, _ in subject.causes))
    return (
        f"In the median layer, from {plain}: the clip of least squared error, one for the layer, leaves {clip}; a range for each "
        f"output channel, set by its largest weight, {channel}; the better of the two in each layer, {better}."
    )


def _training(subject: Subject, judged: ModelEvidence) -> list[str]:
    trained = [(model, own) for model in subject.models if (own := own_errors(model))]
    if not trained:
        crest = median(cause.crest for cause, _, _ in subject.causes)
        needed = median(cause.needed_crest for cause, _, _ in subject.causes)
        return [
            "What training with the normalization would bring is not measured: nothing here was trained with it. By the law it "
            f"would have to bring the crest factor, max|w| / rms, from {number(crest)} in the median layer down to "
            f"{number(needed)} for the largest weight to set as good a range as the best clip does now."
        ]
    return [_trained(judged, model, own) for model, own in trained]


def _trained(judged: ModelEvidence, model: ModelEvidence, own: dict[int, float]) -> str:
    """Return what a trained model's own quantizers leave at its least width, against the model that is judged."""
    bits = min(own)
    rows = [row for row in model.stats if row.bits == bits]
    methods = listed(dict.fromkeys(row.method for row in rows if row.method))
    text = f"{model.name}, trained with {methods}: {percent(own[bits])} at {bits} bits by its own quantizer, in the median layer"
    against = [judged.profiles[row.name] for row in rows if row.name in judged.profiles]
    plain, clipped = (median(found.measured(bits, rule) for found in against) for rule in ("max", "mse"))
    if plain is not None and clipped is not None:
        whose = "the same float weights" if judged is model else f"those layers of {judged.name}"
        text += (
            f", where {whose} would have {percent(plain)} by the largest weight and {percent(clipped)} at the best clip"
        )
    pairs = [(a.crest, b.crest) for a, b in zip(*shared(judged, model), strict=True)]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if judged is not model and pairs:
        before, after = (number(median(pair[side] for pair in pairs)) for side in (0, 1))
        lower = sum(b < a for a, b in pairs)
        text += f"; crest factor {before} before and {after} after, lower in {lower:,} of {len(pairs):,} layers"
    return f"{text}."


def shared(first: ModelEvidence, second: ModelEvidence) -> tuple[list[LayerStats], list[LayerStats]]:
    """Return the rows of the layers that two models have in common, in the order of the second."""
    before = {row.name: row for row in first.stats}
    after = [row for row in second.stats if row.name in before]
    return [before[row.name] for row in after], after


def layer_text(cause: Cause, row: LayerStats, channels: Channels) -> str:
    """Return what one layer's error comes from and what would help, in numbers."""
    if cause.cause == "none" or cause.error is None:
        return sentence(CAUSES["none"])
    far = (
        "more"
        if cause.crest > 1.1 * cause.gaussian_crest
        else "less"
        if cause.crest < cause.gaussian_crest / 1.1
        else ""
    )
    against = (
        f"{far} than the {number(cause.gaussian_crest)} of as many Gaussian weights"
        if far
        else f"about as in as many Gaussian weights ({number(cause.gaussian_crest)})"
    )
    text = (
        f"At {cause.bits} bits the error is {percent(cause.error)}. The largest weight is {number(cause.crest)} rms, {against}; "
        f"{percent(row.tail_mass)} of the weights lie beyond 3 rms. "
    )
    clip = f"a clip at {number(cause.clip)} rms leaves {percent(cause.clip_error)}"
    channel = f"a range for each channel {percent(cause.channel_error)}"
    if cause.cause == "width":
        text += f"Neither remedy halves that: {clip}, {channel}."
    else:
        text += sentence(f"{clip}, {channel}")
    return f"{text} {channel_text(channels)}".strip()


def channel_text(channels: Channels) -> str:
    """Return which output channels stand out, or nothing if none does."""
    if not channels.outlying:
        return ""
    named = [f"{index} ({times:.3g}×)" for index, times in channels.listed[:4]]
    rest = channels.outlying - len(named)
    which = ", ".join(named) + (f" and {rest:,} more" if rest > 0 else "")
    verb = "peaks" if channels.outlying == 1 else "peak"
    return (
        f"{channels.outlying:,} of {counted(channels.number, 'output channel')} {verb} beyond {number(OUTLIER)} times the "
        f"median peak of a channel: {which}."
    ).replace("3.00 times", "3 times")


def reading(subject: Subject) -> list[str]:
    """Return how to read the numbers, a paragraph an element."""
    grid = (
        "with levels at odd multiples of half a step and none at zero"
        if subject.grid == "full"
        else "with a level at zero"
    )
    return [
        "Error: |w − w_q|² / |w|², the share of a layer's squared norm that rounding loses. Rules of a range are compared on "
        f"the {subject.grid} grid, {grid}. The law predicts step² / 12 over the mean square, C² times a constant of the "
        "width with C the crest factor; it holds where the density is flat across a step and knows no clipping.",
        "A cause is named after what helps: tail, if the best clip leaves at most half of the error that the largest weight's "
        "range makes; channels, if a range for each output channel does; only the better of the two if it leaves at most half of "
        "what the other leaves; width, if neither halves the error. At few bits even Gaussian weights are better off with a clip: "
        "the crest factor next to that of as many Gaussian weights tells whether the tail is unusual.",
        "SAWB and LSQ's start are the clips that those methods begin with; training moves them. Output channels are the first "
        "dimension of a tensor whose layer is not known.",
    ]
