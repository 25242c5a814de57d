"""``circuit-lens patchscope``: move hidden states or features into a prompt and read what the model says about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from circuit_lens.cli import options
from circuit_lens.cli import patchscope_options as own
from circuit_lens.cli.changes import parse_position
from circuit_lens.cli.failing import CommandError, line_width
from circuit_lens.cli.outputs import output_file, write_files, write_json
from circuit_lens.cli.patchscope_names import FeatureName, TargetName, parse_feature, parse_layers, parse_target
from circuit_lens.cli.progress import show_bar, working

if TYPE_CHECKING:
    from circuit_lens.patchscopes.result import PatchscopeResult
    from circuit_lens.patchscopes.sources import Vectors
    from circuit_lens.patchscopes.targets import Target
    from circuit_lens.protocols import HookedModel
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.viewer.heatmap import HeatMap

VERSION = 1
_SUFFIXES = (".html", ".png", ".json")
_FEATURE_SCALES = (1.0, 2.0, 4.0)
_CELLS = 3000  # at most, of all heat maps of a page that are of one item


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, what it is called, whether it is bundled, and bound to dictionaries, where there are any."""

    model: HookedModel
    name: str
    bundled: bool
    rm: ReplacementModel | None = None


def patchscope(
    source: own.SOURCE = None,
    pos: own.POS = "-1",
    feature: own.FEATURE = None,
    layers: own.LAYERS = "all",
    target: own.TARGET = "entity",
    at: own.AT = None,
    target_layers: own.TARGET_LAYERS = None,
    target_model: own.TARGET_MODEL = None,
    mapping: own.MAPPING = None,
    max_new_tokens: own.NEW_TOKENS = None,
    write: own.WRITE = None,
    through: own.THROUGH = own.Through.layer,
    scale: own.SCALE = None,
    answer: own.ANSWER = None,
    model: options.MODEL = None,
    dictionaries: options.DICTIONARIES = None,
    bridge: options.BRIDGE = False,
    device: options.DEVICE = None,
    dtype: options.DTYPE = "float32",
    out: own.OUT = None,
    json: own.JSON = None,
    measure: own.MEASURE = None,
    items: own.ITEMS = 12,
    quiet: options.QUIET = False,
) -> None:
    """Move the hidden states of --source into the prompt of --target, and read what the model says about them.

    --target is a text with the placeholder x, or a preset: entity, identity, logit-lens, explain, attribute:TEXT,

    multi-hop:TEXT; with --mapping also tuned-lens, cross-model. identity:FORM takes arrows, lines, pairs, is or words.

    Beside stand two controls: the embedding of the source's own token, moved likewise, and the prompt with no patch.

    Without --model the bundled model is used, offline. Exit status: 0, or 2 for something that cannot be used.
    """
    if bool(source) == bool(feature):
        raise CommandError('give --source, such as --source "Maria read about Dallas", or --feature, such as L1:302')
    features = [parse_feature(text) for text in feature or ()]
    placeholder = None if at is None else parse_position(at)
    wanted = parse_target(target, at=placeholder, mapped=mapping is not None)
    chosen = {
        "source_layers": parse_layers("--layers", layers, words=("all", "last")),
        "target_layers": parse_layers("--target-layers", target_layers, words=("same", "all", "last")),
        "scales": list(scale or (_FEATURE_SCALES if feature else (1.0,))),
        "write": (write or (own.Write.add_matched if feature else own.Write.replace_)).value,
        "patch_through": through.value,
        "max_new_tokens": max_new_tokens,
    }
    if feature and chosen["source_layers"] != "all":
        raise CommandError("--layers are those of --source; a feature's direction belongs to none")
    answers = _answers(answer or (), len(source or features))
    if measure is own.Shown.accuracy and not answers:
        raise CommandError("--measure accuracy counts how often the answer is said; give --answer")
    if features and measure not in (None, own.Shown.entropy, own.Shown.accuracy):
        raise CommandError(f"--measure {measure.value} compares with the source's next token; a feature has none")
    paths = [output_file("--out", path, _SUFFIXES) for path in out or ()]
    paths += [] if json is None else [output_file("--json", json, (".json",))]
    if mapping is not None and not Path(mapping).expanduser().is_file():
        raise CommandError(f"--mapping {mapping}: there is no such file; fit_map(...).save(FILE) writes one")
    with working("Loading torch and the model", quiet):
        from circuit_lens.cli.quiet import upstream_quiet

        loaded = {"device": device, "dtype": dtype, "bridge": bridge}
        mine = _load(model, dictionaries or (), bool(features), loaded)
        reading = mine if target_model is None else _reader(target_model, loaded)
    with upstream_quiet():
        from circuit_lens.patchscopes.maps import load_map
        from circuit_lens.patchscopes.patchscope import patchscope as run

        by = None if mapping is None else load_map(Path(mapping).expanduser())
        moved = _vectors(mine, source or (), pos, features)
        where = _target(wanted, reading, placeholder, by)
        other = None if reading is mine else reading.model
        result = run(
            mine.model, moved, where, mapping=by, target_model=other, progress=show_bar(quiet), **chosen
        )  # fmt: skip
    shown = (measure or (own.Shown.accuracy if answers else own.Shown.entropy)).value
    written = _write(result, mine.name, paths, shown, answers)
    if not quiet:
        from circuit_lens.cli.patchscope_report import print_result
        from circuit_lens.cli.report import new_console, print_files

        console = new_console(line_width(Console()))
        names = mine.name if reading is mine else f"{mine.name} read by {reading.name}"
        print_result(console, result, name=names, answers=answers, items=items)
        if written:
            print_files(console, written)


def _answers(given: Sequence[str], n: int) -> list[list[str]] | None:
    """Return the answers of each item, any of which counts; None: none were given.

    Raises:
        CommandError: Not as many as items, or an empty one.
    """
    if not given:
        return None
    if len(given) != n:
        raise CommandError(f"--answer is given {len(given)} times for {n} sources; give one for each, in their order")
    found = [[one.strip() for one in text.split("|")] for text in given]
    for text, parts in zip(given, found, strict=True):
        if not all(parts):
            raise CommandError(f"--answer {text!r} is empty; write what is to be said, or 'a|b' for either")
    return found


def _load(name: str | None, dictionaries: Sequence[str], features: bool, loaded: dict[str, Any]) -> Loaded:
    """Return a model, with dictionaries where features are named; published ones need none otherwise."""
    from circuit_lens import zoo
    from circuit_lens.cli import loading

    called = loading.DEFAULT_MODEL if name is None else name
    bundled = called in zoo.model_names()
    alone = bundled and called not in zoo.names()  # no dictionaries come with it
    if features or dictionaries or name is None or (bundled and not alone):
        rm = loading.load_pair(name, dictionaries, **loaded).rm
        return Loaded(rm.model, called, bundled, rm)
    device, dtype = loading.choose_device(loaded["device"], cpu=bundled), loading.parse_dtype(loaded["dtype"])
    if alone:
        return Loaded(loading.load_bundled_model(called, device, dtype, bridge=loaded["bridge"]), called, True)
    return Loaded(loading.load_model(called, device, dtype, bridge=loaded["bridge"]), called, False)


def _reader(name: str, loaded: dict[str, Any]) -> Loaded:
    """Return the model to read with; ``bridge`` is not about bundled ones."""
    from circuit_lens import zoo

    return _load(name, (), False, loaded | ({"bridge": False} if name in zoo.model_names() else {}))


def _vectors(mine: Loaded, sources: Sequence[str], pos: str, features: Sequence[FeatureName]) -> Vectors:
    """Return what is moved.

    Raises:
        CommandError: A position that is not there, or a feature that no dictionary has.
    """
    from circuit_lens.cli.intervene import plain
    from circuit_lens.errors import TokenNotFoundError
    from circuit_lens.patchscopes.sources import At, Vectors

    if features:
        return _joined([_decoder(mine, one) for one in features])
    try:
        found = Vectors.from_prompts(mine.model, [At(text, parse_position(pos)) for text in sources])
    except TokenNotFoundError as error:
        raise CommandError(f"--pos {pos}: {plain(str(error))}") from error
    names = Counter(found.names)
    return replace(
        found, names=tuple(name if names[name] == 1 else text for name, text in zip(found.names, sources, strict=True))
    )


def _target(wanted: TargetName, reading: Loaded, at: int | str | None, mapping: Any) -> Target:
    """Return the target prompt, whose placeholder is there.

    Raises:
        CommandError: It is not, or is no single token.
    """
    from circuit_lens.cli.intervene import plain
    from circuit_lens.errors import PatchscopeError, TokenNotFoundError

    made = wanted.make(at=at, words=reading.bundled, mapping=mapping)
    try:
        made.place(reading.model)
    except (TokenNotFoundError, PatchscopeError) as error:
        raise CommandError(f"--target {wanted.typed!r}: {plain(str(error))} Name its placeholder with --at") from error
    return made


def _decoder(mine: Loaded, name: FeatureName) -> Vectors:
    from circuit_lens.errors import DictionaryError, PatchscopeError
    from circuit_lens.patchscopes.sources import Vectors

    assert mine.rm is not None, "features are of dictionaries"
    listed = mine.rm.dictionaries
    shown = f"--feature {name.typed}"
    try:
        if name.layer is None:
            fits = [d for d in listed if d.site == name.site]
            if len(fits) != 1:
                raise CommandError(f"{shown}: there is no such site; there are {', '.join(d.site for d in listed)}")
            return Vectors.decoder(fits[0], name.index)
        return Vectors.decoder(mine.rm.binding.dictionary(name.layer, name.site), name.index)
    except DictionaryError as error:
        hint = str(error).replace("name one with site=:", "name one after the index:")
        raise CommandError(f"{shown}: {hint}") from error
    except PatchscopeError as error:
        raise CommandError(f"{shown}: {error}") from error


def _joined(parts: Sequence[Vectors]) -> Vectors:
    import torch

    from circuit_lens.patchscopes.sources import Vectors

    return Vectors.of(torch.cat([part.values[:, 0, 0] for part in parts]), [part.names[0] for part in parts])


# ------------------------------------------------------------------------------------------------------------ the files


def _write(
    result: PatchscopeResult, name: str, paths: Sequence[Path], measure: str, answers: list[list[str]] | None
) -> list[Path]:
    """Write all files or none; every scale has a heat map of its own."""
    writers: dict[Path, Any] = {}
    maps = _maps(result, measure, answers) if any(path.suffix != ".json" for path in paths) else []
    for path in paths:
        if path.suffix == ".json":
            writers[path] = write_json(_as_json(result, name, answers))
        elif path.suffix == ".html":
            writers[path] = _page_writer(result, maps, measure, answers)
        else:
            writers |= _figure_writers(path, maps)
    return write_files(writers)


def _maps(result: PatchscopeResult, measure: str, answers: list[list[str]] | None) -> list[tuple[str, HeatMap]]:
    """Return the heat maps, each with what is added to a file's name: one, or one for each scale."""
    kind: Any = measure
    if len(result.scales) == 1 or (len(result.items) == 1 and result.source_layers == (None,)):
        return [("", result.heatmap(kind, answers=_given(measure, answers)))]
    return [
        (f"-x{scale:g}", _scaled(result.heatmap(kind, answers=_given(measure, answers), scale=scale), scale))
        for scale in result.scales
    ]


def _given(measure: str, answers: list[list[str]] | None) -> list[list[str]] | None:
    return answers if measure == "accuracy" else None


def _scaled(heat: HeatMap, scale: float) -> HeatMap:
    return replace(heat, title=f"{heat.title}, × {scale:g}")


def _page_writer(
    result: PatchscopeResult, maps: Sequence[tuple[str, HeatMap]], measure: str, answers: list[list[str]] | None
) -> Any:
    """Return what writes one page: the heat maps, and those of each item where a grid has few."""
    from circuit_lens.patchscopes.text import title
    from circuit_lens.viewer.heatmap_html import fragment, page

    shown = [heat for _, heat in maps]
    grid = result.target_layers != "same" and result.source_layers != (None,)
    n = len(result.items)
    if grid and n > 1 and int(result.patched.entropy.numel()) <= _CELLS:
        kind: Any = measure
        for i in range(n):
            for scale in result.scales:
                heat = result.heatmap(kind, item=i, answers=_given(measure, answers), scale=scale)
                shown.append(heat if len(result.scales) == 1 else _scaled(heat, scale))
    text = page(f"Patchscope: {title(result)}", fragment(shown))
    return lambda path: path.write_text(text, encoding="utf-8")


def _figure_writers(path: Path, maps: Sequence[tuple[str, HeatMap]]) -> dict[Path, Any]:
    """Return what writes each heat map as a picture."""

    def writer(heat: HeatMap) -> Any:
        figure = heat.figure()
        return lambda to: figure.savefig(to, format="png")

    return {path.with_name(path.stem + end + path.suffix): writer(heat) for end, heat in maps}


def _as_json(result: PatchscopeResult, name: str, answers: list[list[str]] | None) -> dict[str, Any]:
    document = {"version": VERSION, "model": name} | result.to_json()
    if answers is None:
        return document
    found = result.accuracy(answers)
    return document | {
        "answers": answers,
        "accuracy": {
            "any_cell": found.any_layer.to_json(),
            "best_fixed": None if found.best_fixed is None else found.best_fixed.to_json(),
            "cells": [list(cell) for cell in found.cells],
            "unpatched": found.unpatched.to_json(),
            "reembedded": None if found.reembedded is None else found.reembedded.to_json(),
            "gain": None if found.gain is None else found.gain.to_json(),
            "source_layers": list(found.source_layers),
            "by_cell": found.by_cell.tolist(),
        },
    }
