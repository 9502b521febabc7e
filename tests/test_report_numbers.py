"""What a report says in words, in CSV and in JSON, against numbers computed by NumPy alone."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers_report import evidence, tailed
from wnq.analysis import ModelEvidence
from wnq.report import as_json, matching, subject_of, write_csv
from wnq.report.tables import cell
from wnq.report.wording import answer, layer_text, weighted

SIZES = {"a": (20, 30), "b": (10, 50), "c": (6, 7)}


def weights(seed: int = 0, df: float = 3.0) -> dict[str, torch.Tensor]:
    return {layer: tailed(*shape, seed=seed + place, df=df) for place, (layer, shape) in enumerate(SIZES.items())}


def plain_error(weight: torch.Tensor, bits: int) -> float:
    """Error of the full grid over plus and minus the largest weight, by NumPy."""
    w = weight.double().numpy()
    levels = np.linspace(-1, 1, 2**bits) * np.abs(w).max()
    nearest = levels[np.abs(w[..., None] - levels).argmin(-1)]
    return float(((w - nearest) ** 2).sum() / (w**2).sum())


def said(models: list[ModelEvidence], focus: int | None = None) -> dict[str, str]:
    found: dict[str, str] = {}
    for topic, text in answer(subject_of(models, focus=focus)):
        found[topic] = f"{found[topic]} {text}" if topic in found else text
    return {topic: text.replace("\N{NO-BREAK SPACE}", " ") for topic, text in found.items()}


def three(value: float) -> str:
    return f"{100 * value:#.3g}".rstrip(".") + " %"


def test_the_answer_gives_cost_place_and_remedy_of_a_float_model():
    raw = weights()
    text = said([evidence("net", raw)], focus=3)
    errors = {layer: plain_error(weight, 3) for layer, weight in raw.items()}
    counts = [math.prod(shape) for shape in SIZES.values()]
    mean = float(np.average(list(errors.values()), weights=counts))
    assert (
        f"At 3 bits, with each layer's range set by its largest weight, the rounding error of net is {three(mean)}"
        in text["Cost"]
    )
    assert f"{three(float(np.median(list(errors.values()))))} in the median of three layers" in text["Cost"]
    assert "The width alone costs 3.74 %" in text["Cost"]  # the textbook's 14.27 dB
    worst = sorted(errors, key=lambda layer: -errors[layer])
    first, second, third = (f"{layer} ({three(errors[layer])})" for layer in worst)
    assert text["Where"] == f"Most in {first}, then {second} and {third}."
    assert text["What would help"].startswith(
        f"In the median layer, from {three(float(np.median(list(errors.values()))))}:"
    )
    crests = [float(np.abs(w).max() / np.sqrt((w**2).mean())) for w in (t.double().numpy() for t in raw.values())]
    assert "is not measured: nothing here was trained with it" in text["Training"]
    assert f"from {np.median(crests):#.3g} in the median layer" in text["Training"]
    assert list(text) == ["Cost", "Where", "Why", "What would help", "Training", "Mind"]


def test_the_answer_counts_causes():
    flat = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (20, 100))).float()
    stretched = flat.clone()
    stretched[:, 0] = 8.0
    text = said([evidence("net", {"flat": flat, "flat too": -flat, "stretched": stretched})], focus=3)["Why"]
    assert text.startswith(
        "In 1 of 3 layers a tighter clip helps most; in 2 neither halves the error. A clip helps against"
    )
    channels = torch.cat([0.05 * flat, flat[:2]])
    text = said([evidence("net", {"flat": flat, "channels": channels})], focus=8)["Why"]
    assert text.startswith(
        "In 1 of 2 layers a range for each output channel helps most; in 1 neither halves the error."
    )
    alone = said([evidence("net", {"flat": flat})])["Why"]
    assert (
        alone
        == "In every layer neither halves the error. Where neither halves the error, the number of levels is the limit."
    )


def test_a_trained_model_is_held_against_the_reference_at_its_own_width():
    before, after = weights(), weights(seed=5, df=50)
    text = said([evidence("start", before), evidence("after", after, own=3)])["Training"]
    own = float(np.median([plain_error(weight, 3) for weight in after.values()]))
    reference = float(np.median([plain_error(weight, 3) for weight in before.values()]))
    assert f"after, trained with wnq: {three(own)} at 3 bits by its own quantizer, in the median layer" in text
    assert f"where those layers of start would have {three(reference)} by the largest weight" in text
    crests = [
        [float(np.abs(w).max() / np.sqrt((w**2).mean())) for w in (t.double().numpy() for t in one.values())]
        for one in (before, after)
    ]
    lower = sum(b < a for a, b in zip(*crests, strict=True))
    assert f"crest factor {np.median(crests[0]):#.3g} before and {np.median(crests[1]):#.3g} after" in text
    assert f"lower in {lower} of 3 layers" in text
    alone = said([evidence("after", after, own=3)])["Training"]
    assert "where the same float weights would have" in alone and "before and" not in alone


def test_models_without_a_layer_in_common_stand_side_by_side():
    subject = subject_of([evidence("one", {"a": tailed(5, 6)}), evidence("two", {"b": tailed(5, 6)}, own=2)])
    assert subject.layers == ("a", "b")
    training = next(text for topic, text in answer(subject) if topic == "Training")
    assert "two, trained with wnq" in training and "where those layers" not in training and "crest" not in training


def test_damage_is_named_first_and_left_out():
    spoilt = weights()
    spoilt["b"][2, 3], spoilt["b"][4, 5] = math.nan, -math.inf
    text = said([evidence("net", spoilt)])
    assert next(iter(text)) == "Damage"
    assert "b of net (2 of 500)" in text["Damage"]
    assert "nan" not in " ".join(list(text.values())[1:]).lower()


def test_a_layer_is_told_with_its_channels():
    weight = tailed(30, 40, df=30)
    weight[7] *= 20
    subject = subject_of([evidence("net", {"layer": weight})])
    cause, row, found = subject.causes[0]
    text = layer_text(cause, row, found.channels).replace("\N{NO-BREAK SPACE}", " ")
    peaks = np.abs(weight.double().numpy()).max(1)
    assert (
        f"1 of 30 output channels peaks beyond 3 times the median peak of a channel: 7 ({peaks[7] / np.median(peaks):.3g}×)."
        in text
    )
    assert f"At 4 bits the error is {three(plain_error(weight, 4))}" in text


def test_csv_holds_every_width_and_rule(tmp_path: Path):
    raw = weights()
    models = [evidence("float", raw), evidence("trained", raw, own=3)]
    path = write_csv(tmp_path / "deep" / "layers.csv", subject_of(models))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["layer"], row["shape"]) for row in rows] == [
        (model, layer, "x".join(map(str, shape))) for model in ("float", "trained") for layer, shape in SIZES.items()
    ]
    for row, weight in zip(rows[:3], raw.values(), strict=True):
        for bits in (2, 3, 4, 8):
            assert float(row[f"max_{bits}"]) == pytest.approx(plain_error(weight, bits), rel=1e-9)
            assert 0 < float(row[f"mse_{bits}"]) <= float(row[f"max_{bits}"])
            crest = float(row["crest"])
            assert float(row[f"predicted_{bits}"]) == pytest.approx(crest**2 / 3 / (2**bits - 1) ** 2, rel=1e-9)
        assert row["relative_error"] == row["bits"] == ""
        assert row["cause"] in ("tail", "channels", "tail and channels", "width")
    for row, weight in zip(rows[3:], raw.values(), strict=True):
        assert float(row["relative_error"]) == pytest.approx(plain_error(weight, 3), rel=1e-6)  # float32 levels


def test_json_holds_all_numbers_and_nothing_that_json_lacks():
    raw = weights()
    raw["c"] = torch.zeros(6, 7)
    content = as_json(subject_of([evidence("net", raw)], focus=3))
    content = json.loads(json.dumps(content, allow_nan=False))
    assert (content["focus"], content["bits"], content["grid"]) == (3, [2, 3, 4, 8], "full")
    assert [row["layer"] for row in content["causes"]] == [*sorted("ab", key=lambda k: -plain_error(raw[k], 3)), "c"]
    layer = content["evidence"][0]["layers"][0]
    assert sum(layer["histogram"]["counts"]) == 600
    errors = {(row["bits"], row["rule"]): row for row in layer["errors"]}
    assert errors[4, "max"]["measured"] == pytest.approx(plain_error(raw["a"], 4), rel=1e-9)
    assert layer["tail"]["share"][-1] == 0
    assert layer["channels"]["number"] == 20
    middle = {(row["bits"], row["rule"]): row for row in content["evidence"][0]["errors"]}[3, "max"]
    assert middle["median"] == pytest.approx(np.median([plain_error(raw[k], 3) for k in "ab"]), rel=1e-9)
    expected = np.average([plain_error(raw[k], 3) for k in "ab"], weights=[600, 500])
    assert middle["weighted"] == pytest.approx(expected, rel=1e-9)


def test_a_weighted_mean_leaves_out_what_is_not_known():
    assert weighted([(0.5, 1), (None, 9), (math.nan, 9), (0.1, 3)]) == pytest.approx(0.2)
    assert math.isnan(weighted([(None, 1)]))


@pytest.mark.parametrize("bits, focus", [((2, 3, 8), 3), ((8,), 8), ((3, 5), 3), ((1, 2), 2)])
def test_the_width_in_question_is_four_or_the_nearest(bits: tuple[int, ...], focus: int):
    assert subject_of([evidence("net", {"a": tailed(4, 4)}, bits=bits)]).focus == focus


def test_the_width_in_question_is_that_of_a_trained_model():
    raw = {"a": tailed(4, 4)}
    models = [evidence("start", raw), evidence("three", raw, own=3), evidence("two", raw, own=2)]
    assert subject_of(models).focus == 3
    assert subject_of(models, focus=8).focus == 8
    assert subject_of([evidence("six", raw, own=6, bits=(2, 5))]).focus == 5


def test_patterns_choose_layers_and_a_typo_is_met_with_the_nearest_name():
    layers = ["layer1.conv1", "layer1.conv2", "fc"]
    assert matching(layers, ["fc", "*.conv2"]) == ["layer1.conv2", "fc"]
    with pytest.raises(
        ValueError, match=r"--layers 'layer1.covn1' matches no layer. Did you mean 'layer1.conv1'\? 3 layers"
    ):
        matching(layers, ["layer1.covn1"])


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (True, "True"), (12345, "12,345"), (0.5, "0.5000"), (1e-7, "1e-07"), (math.inf, "–")]
)
def test_cells(value: object, text: str):
    assert cell(value)["text"] == text
