"""The model card of a compressed model: its compression, its losses, and how to load it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from fasc_lightning._utils import Row, library_versions, markdown_table
from fasc_lightning.compression import CompressionReport, outcome, recovery_line
from fasc_lightning.layers import (
    CompressedLinear,
    Form,
    Grid,
    Size,
    compressed_layers,
    layer_sizes,
    linear_shape,
    model_size,
    named_layers,
    quantization_of,
)
from fasc_lightning.models._attach import provenance_of
from fasc_lightning.models._card_results import costs, eval_results, measured
from fasc_lightning.models._compressed_tensors import how_to_load
from fasc_lightning.models._tags import tags_of
from fasc_lightning.options import described, own_spelling

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from transformers import PreTrainedModel

#: The hub's task and the auto class of a model class, by the table of transformers that names the class.
TASKS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("text-generation", "AutoModelForCausalLM"),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": ("text-classification", "AutoModelForSequenceClassification"),
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": ("token-classification", "AutoModelForTokenClassification"),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ("fill-mask", "AutoModelForMaskedLM"),
}

#: Heading of each figure of a size.
FIGURES = {"parameters": "parameters", "bytes": "MB", "flops_per_token": "MFLOPs a token"}

#: The meaning of a size that is a fraction.
BYTES = "the fraction of the targeted layers' bytes in 16 bits"

#: Columns of the rho table: the suffix of "rho" in the heading and in the report.
RHO = {"": "", " null": "_null", " debiased": "_debiased"}


def model_card(
    model: PreTrainedModel,
    report: CompressionReport | Mapping[str, Any] | None = None,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    license: str | None = None,
    calibration: str | Sequence[str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    format: Literal["fasc", "compressed-tensors"] = "fasc",
) -> ModelCard:
    """Describe a compressed model in the form that the hub reads: a YAML header and Markdown.

    Args:
        model: The compressed model.
        report: The report of its compression, as an object or as the JSON that ``recipes/compress.py`` writes. Without
            a report the card shows the facts that the model holds: method, options and ranks, but no rho and no dense
            sizes.
        base_model: Hub id or folder of the model that was compressed. By default the argument of the
            ``from_pretrained`` call before the compression.
        licence: Licence of the base model, which holds for this model too: an identifier of the hub ("apache-2.0"). By
            default the licence in README.md of the base model's folder.
        license: Another name of ``licence``.
        calibration: The calibration data. By default the report's.
        evaluation: Results before and after, in the form of the recipe's report: ``{"perplexity": {name: {"dense": ...,
            "compressed": ...}}, "facts": {"dense": ..., "compressed": ..., "by_kind": ...}}``, and in the same forms
            "divergence" (KL from the dense model, nats a token) and "minimal_pairs" (percent). By default the report's.
            The compressed model's figures also stand in the header, as the hub's model index.
        format: Format of the model's folder; the card tells how such a folder is loaded.

    Raises:
        ValueError: If the model has no compressed layers, the report belongs to another model, or both spellings of
            the licence are given.
    """
    from huggingface_hub import ModelCard, ModelCardData

    content = report.to_dict() if isinstance(report, CompressionReport) else dict(report or {})
    provenance = provenance_of(model)
    _check_report(model, content)
    if content:
        content = _as_quantized(model, _own_names(model, content))
    results = measured(content, evaluation)
    base = base_model or provenance.get("base_model")
    licence = own_spelling({"licence": licence, "license": license}, "license")["licence"]
    licence = licence or _stated_licence(base_model or model.config._name_or_path)
    task, auto_class = _task(model)
    indexed = eval_results(results, task or "other")
    data = ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        eval_results=indexed or None,
        library_name="transformers",
        license=licence,
        metrics=list(dict.fromkeys(result.metric_type for result in indexed)) or None,
        model_name=_title(model, base) if indexed else None,
        pipeline_tag=task,
        tags=tags_of(model, format),
    )
    options = {**provenance.get("options", {}), **content.get("options", {})}
    if options.keys() & {"rank", "keep"}:  # what reports do not state is at its default
        options = {name: described(name).default for name in ("allocation", "layout", "refit")} | options
    made = {**provenance, **content, "options": options, "base": _short(base), "licence": licence}
    made["quantization"] = _quantization(model)
    sections = [
        _introduction(model, made),
        _loading(auto_class) if format == "fasc" else how_to_load(model, auto_class),
        *costs(results),
        *_sizes(content),
        *_bits(model, content),
        _making(made, calibration),
        *_layers(model, content),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _check_report(model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a report whose layers differ from the model's.

    Raises:
        ValueError: If a layer differs, naming the first, or if the model is not compressed.
    """
    layers = compressed_layers(model)
    if not layers:
        raise ValueError(
            f"Expected a compressed model, but {type(model).__name__} is dense. Compress it first, or use its own "
            "save_pretrained."
        )
    if not report:
        return
    # Quantised dense layers are compressed layers too, but have no rank.
    held = {name: layer.rank for name, layer in layers.items() if layer.layout != "dense"}
    told = {row["name"]: row["rank"] for row in _own_names(model, report)["layers"] if row["layout"] != "dense"}
    different = sorted(name for name in held.keys() | told.keys() if held.get(name) != told.get(name))
    if different:
        ranks = (f"rank {ranks[different[0]]}" if different[0] in ranks else "no such layer" for ranks in (held, told))
        raise ValueError(
            f"Expected the report of this model, but {different[0]!r} and {len(different) - 1} other layers differ: "
            f"{' in the model, '.join(ranks)} in the report. Give the report of this compression."
        )


def _own_names(model: PreTrainedModel, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with the model's names; in a fit they begin with the name inside the LightningModule."""
    known = {name for name, _ in model.named_modules()}

    def own(name: str) -> str:
        parts = name.split(".")
        return next((tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in known), name)

    return {**report, "layers": [{**row, "name": own(row["name"])} for row in report["layers"]]}


def _as_quantized(model: PreTrainedModel, report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with the model's present sizes if the model was quantised after the report was made."""
    rounded = report["options"].keys() & {"quantize", "size"} or any(row.get("quantize") for row in report["layers"])
    if _quantization(model) is None or rounded:
        return report
    targeted = {row["name"]: model.get_submodule(row["name"]) for row in report["layers"]}
    return {
        **report,
        "targeted": _with_compressed(report["targeted"], layer_sizes(targeted)),
        "whole": _with_compressed(report["whole"], model_size(model)),
    }


def _with_compressed(sizes: Mapping[str, Mapping[str, int]], found: Size) -> dict[str, dict[str, int]]:
    return {
        figure: {**states, "unquantized": states["compressed"], "compressed": getattr(found, figure)}
        for figure, states in sizes.items()
    }


def _quantization(model: PreTrainedModel) -> str | None:
    """Return the quantisation of the model's compressed layers, of all or some."""
    forms = [form for layer in compressed_layers(model).values() if (form := quantization_of(layer))]
    found = Counter(map(_words, forms))
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{count} layers {words}" for words, count in sorted(found.items())) or None


def _words(form: Form) -> str:
    """Return a quantisation in words."""
    if not isinstance(form, Grid):
        return form
    group = "one group an output" if form.group is None else f"groups of {form.group}"
    return f"int{form.bits} in {group}{', symmetric' if form.symmetric else ''}"


def _stated_licence(folder: str | None) -> str | None:
    """Return the licence in the header of a local folder's README.md, if there is one."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]

    readme = Path(folder or "") / "README.md"
    if not folder or not readme.is_file():
        return None
    try:
        return ModelCard.load(readme, ignore_metadata_errors=True).data.license
    except (ValueError, OSError, YAMLError):  # the README may have an invalid header
        return None


def _is_hub_id(name: str) -> bool:
    return not Path(name).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _short(name: str | None) -> str | None:
    """Return a hub id unchanged, and the last part of a path: readers of a card do not have the folder."""
    return name if name is None or _is_hub_id(name) else Path(name).name


def _task(model: PreTrainedModel) -> tuple[str | None, str]:
    from transformers.models.auto import modeling_auto

    for table, task in TASKS.items():
        if type(model).__name__ in getattr(modeling_auto, table).values():
            return task
    return None, "AutoModel"


def _title(model: PreTrainedModel, base: str | None) -> str:
    return f"{_short(base)}, compressed" if base else f"A compressed {type(model).__name__}"


def _introduction(model: PreTrainedModel, made: Mapping[str, Any]) -> str:
    base = made["base"]
    of = f"{base} with" if base else f"A {type(model).__name__} with"
    full = sum(layer.layout == "dense" for layer in compressed_layers(model).values())
    counts = {
        "held as matrices of low rank": len(compressed_layers(model)) - full,
        "rounded to few bits": full,
    }
    held = " and ".join(f"{count} of its linear layers {how}" for how, count in counts.items() if count)
    return (
        f"# {_title(model, base)}\n\n{of} {held}, made by fasc-lightning. It is an ordinary transformers model in "
        "every other respect: it generates, trains and is saved as before."
    )


def _loading(auto_class: str) -> str:
    return f"""## How to load it

```python
import fasc_lightning  # pip install fasc-lightning; it tells transformers how to read this folder
from transformers import {auto_class}

model = {auto_class}.from_pretrained("...")  # this folder, or its hub id
```

Without that import transformers says "Unknown quantization type, got fasc" and fails on weights of another size.
Nothing in the folder is pickled, and no code is loaded from it. `fasc_lightning.load_compressed(...)` also
refuses a folder that lacks weights or has others. `fasc_lightning.to_dense(model)` makes the model dense, for tools
that know no low-rank layers: as large as before, as good as it is now."""


def _sizes(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section on sizes, if the report has them."""
    rows = [
        {
            "": f"{part}, {heading}",
            **{
                state: f"{value:,}" if figure == "parameters" else f"{value / 1e6:,.1f}"
                for state, value in values.items()
            },
            "kept": f"{values['compressed'] / values['dense']:.1%}",
        }
        for part, sizes in (("targeted layers", report.get("targeted")), ("whole model", report.get("whole")))
        if sizes
        for figure, heading in FIGURES.items()
        for values in [sizes[figure]]
    ]
    if rows:
        yield "## What it saves\n\n" + markdown_table(rows)


def _bits(model: PreTrainedModel, report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section on the bits of layers by kind, if dense layers are rounded."""
    compressed = compressed_layers(model)
    if all(layer.layout != "dense" for layer in compressed.values()):
        return
    layers, kinds = named_layers(model), dict[str, dict[str, Any]]()
    for name in [row["name"] for row in report.get("layers", [])] or compressed:
        kinds.setdefault(name.rpartition(".")[2], {})[name] = layers[name]
    rows: list[Row] = [
        {
            "layers": kind,
            "stored as": ", ".join(
                f"{count} x {form}" for form, count in sorted(Counter(map(_stored, of.values())).items())
            ),
            "MB": f"{layer_sizes(of).bytes / 1e6:,.1f}",
            "MB in 16 bits": f"{sum(2 * math.prod(linear_shape(layer)) for layer in of.values()) / 1e6:,.1f}",
        }
        for kind, of in kinds.items()
    ]
    yield f"## Bits\n\n{markdown_table(rows)}\n\nThe first size has scales, zero points and biases."


def _stored(layer: nn.Module) -> str:
    """Return how a layer is held: its layout, or its bits if it is of full rank."""
    layout = layer.layout if isinstance(layer, CompressedLinear) else "dense"
    form = quantization_of(layer)
    return layout if layout != "dense" or form is None else _words(form)


def _making(made: Mapping[str, Any], calibration: str | Sequence[str] | None) -> str:
    options = made["options"]
    versions = made.get("versions") or library_versions()
    lines = {
        "base model": made["base"] or "not stated",
        "licence": f"{made['licence'] or 'not stated'}; the base model's holds for this one",
        "method": made.get("method", "not stated"),
        "budget": _budget(options),
        "allocation, layout": ", ".join(str(options[name]) for name in ("allocation", "layout") if name in options),
        "refit": _outcome(made, "refit", "layers"),
        "refinement": _outcome(made, "refine", "blocks"),
        "recovery": _recovery(made),
        "quantised": made["quantization"] or "no",
        "calibration data": _calibration(made, calibration),
        "seed": made.get("seed", "not stated"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return "## How it was made\n\n" + "\n".join(f"* {name}: {value}" for name, value in lines.items() if value != "")


def _budget(options: Mapping[str, Any]) -> str:
    if options.get("keep") is not None:
        return f"keep {options['keep']:g}, the fraction of the targeted layers' parameters"
    if options.get("rank") is not None:
        kind = "absolute" if isinstance(options["rank"], int) else "as a fraction of full rank"
        return f"rank {options['rank']:g} ({kind}), the parameters of uniform matrices of that rank"
    if (size := options.get("size")) is not None:
        return f"size {size}, {'bytes of the whole model' if isinstance(size, str) else BYTES}"
    return "one grid for all targeted layers" if options.get("quantize") is not None else "not stated"


def _outcome(made: Mapping[str, Any], phase: str, parts: str) -> str:
    """Return the outcome of a refit or a refinement; without figures the option, or "none" if it was not asked for."""
    figures = made.get(phase)
    if figures is None:
        return "none" if "layers" in made else f"{made['options'].get(phase, 'not stated')}"
    before, after = (figures["loss"][when] for when in ("before", "after"))
    return f"{outcome(figures, parts)}, loss on held-out batches {before:.4f} before and {after:.4f} after"


def _recovery(made: Mapping[str, Any]) -> str:
    """Return the outcome of a recovery; "" without a recovery."""
    figures, options = made.get("recovery"), made["options"].get("recovery")
    if figures is not None:
        return recovery_line(figures)
    if options is None or "layers" in made:  # a report holds the figures of a finished recovery
        return ""
    return f"{options['arm']}, by {'a teacher' if options['teacher'] else 'labels'}"


def _calibration(made: Mapping[str, Any], stated: str | Sequence[str] | None) -> str:
    options = made["options"]
    given = [stated] if isinstance(stated, str) else list(stated or options.get("calibration") or [])
    names = [
        "text sampled from the model itself" if name == "self" else _short(name) if stated is None else name
        for name in given
    ]
    tokens = max((row["tokens"] for row in made.get("layers", [])), default=0)
    parts = [", ".join(map(str, names)) or "not stated"]
    if {"windows", "window"} <= options.keys():
        parts.append(f"{options['windows']} windows of {options['window']} tokens")
    if tokens:
        parts.append(f"{tokens:,} tokens seen by a layer")
    return "; ".join(parts)


def _layers(model: PreTrainedModel, report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section on single layers: dense layers, ranks, and rho if the report has it."""
    if "layers" not in report:
        rows: list[Row] = [
            {"layer": name, "shape": _shape((layer.out_features, layer.in_features)), "rank": layer.rank}
            | {"stored as": _stored(layer)}
            for name, layer in compressed_layers(model).items()
        ]
        yield "## Layers\n\n" + _folded(f"Ranks of all {len(rows)} compressed layers", rows)
        return
    stored = {name: _stored(layer) for name, layer in named_layers(model).items()}
    dense = [row["name"] for row in report["layers"] if stored[row["name"]] == "dense"]
    rows = [
        {
            "layer": row["name"],
            "shape": _shape(row["shape"]),
            "rank": row["rank"],
            "stored as": stored[row["name"]],
            "tokens": row["tokens"],
            **{f"rho{name}": _number(row[f"rho{key}"]) for name, key in RHO.items()},
            "loss": _number(row["loss"]),
        }
        for row in report["layers"]
    ]
    kept = f"Targeted, but kept dense: {', '.join(f'`{name}`' for name in dense) if dense else 'none'}."
    yield f"## Layers\n\n{kept}\n\n" + _folded(
        f"Ranks, rho and predicted loss of all {len(rows)} targeted layers", rows
    )
    yield (
        "rho says how strongly a layer's inputs and the gradients there are coupled (0 to 1); *null* is what shuffled "
        "sequences reach, *debiased* is around 0 where there is no coupling. The loss is what the method's own "
        "objective says was lost in the layer."
    )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _number(value: float | None) -> str:
    """Return a figure as text; it may not have been measured."""
    return "-" if value is None else f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _folded(summary: str, rows: Sequence[Row]) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{markdown_table(rows)}\n\n</details>"
