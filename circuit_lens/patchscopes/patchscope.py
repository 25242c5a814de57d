"""One call for every patchscope: source, map, target, for whole grids of layers at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from circuit_lens.errors import PatchscopeError
from circuit_lens.hooks import preserved_rng
from circuit_lens.patchscopes.fitting import same_vocabulary
from circuit_lens.patchscopes.given import require_memory, require_model, whole
from circuit_lens.patchscopes.grid import Grid, Layers, Layout, Part, row_bytes
from circuit_lens.patchscopes.maps import Identity, Map, as_map
from circuit_lens.patchscopes.readout import Reader, SourceNext, Wording
from circuit_lens.patchscopes.result import PatchscopeResult
from circuit_lens.patchscopes.rows import THROUGH, WRITES, Rows, Through, Write
from circuit_lens.patchscopes.run import say
from circuit_lens.patchscopes.sources import At, Vectors
from circuit_lens.patchscopes.streams import EMBEDDING, MEMORY, room
from circuit_lens.patchscopes.targets import Placed, Preset, Target
from circuit_lens.protocols import Cache, HookedModel
from circuit_lens.running import Prompt, plain_tensors

Source = At | Iterable[At] | Vectors | Prompt | Cache
OTHER_BASIS = (
    "another model reads without a map: its residual stream has another basis unless both have the same weights, "
    "processed alike; cl.patchscopes.fit_map(model, texts, target_model=...) fits one"
)


def patchscope(
    model: HookedModel,
    source: Source,
    target: Target | Prompt | Sequence[Target],
    *,
    source_layers: Layers = "all",
    target_layers: Layers | None = None,
    mapping: Map | nn.Module | None = None,
    write: Write = "replace",
    patch_through: Through = "layer",
    scales: float | Sequence[float] = 1.0,
    target_model: HookedModel | None = None,
    max_new_tokens: int | None = None,
    n_top: int = 10,
    keep_logits: bool | None = None,
    read_layer: int | None = None,
    controls: bool = True,
    use_cache: bool = True,
    check: bool = True,
    memory: float = MEMORY,
    progress: bool | None = None,
) -> PatchscopeResult:
    """Move hidden states into an inspection prompt and read what the model says about them.

    h of a source prompt at a position and layer becomes f(h) at the target prompt's placeholder and layer, and the
    target prompt runs on from there (Ghandeharioun et al. 2024, Patchscopes, §3). All source layers, target layers,
    items and scales are rows of one batch over a shared prefix, and text is generated from its keys and values; the
    result is that of running every cell alone (`circuit_lens.patchscopes.definition`).

    Args:
        model: A HookedTransformer or TransformerBridge: the source's model.
        source: ``cl.At(prompt, pos)`` or several; an activation cache (its last position); `Vectors`, or a tensor
            ``[n_items, d_model]``; or a prompt (its last token).
        target: ``cl.Target(prompt, at="x")``, or a prompt with the placeholder ``x``; one for all items (also as a list
            of one), or a list with one for each. A preset (`circuit_lens.presets`) brings target layers, map and number
            of new tokens with it.
        source_layers: Numbers; -1 is the embedding, l the output of block l. "all": every one that the source has.
        target_layers: Numbers, "all", "last", or "same": each source layer into itself. None: the preset's; else
            "same", or "all" for vectors of no layer.
        mapping: f: a torch module or a `Map`; None: the preset's, else the identity.
        write: "replace", "add", or "add_matched" (with the placeholder's norm), see `rows.Rows`.
        patch_through: "layer": at the target layer. "below": also in all layers below it, so that the placeholder's
            keys and values do not reach what is generated.
        scales: What f(h) is multiplied with; several are an axis of the grid.
        target_model: Another model to read with; widths that differ need a map.
        max_new_tokens: Tokens to generate greedily; 0: the next token's distribution alone. None: the preset's, else 0.
        n_top: Most probable next tokens to keep.
        keep_logits: Keep the next token's logits of every run; None: where they take at most a quarter of ``memory``.
        read_layer: Also keep the residual stream of the target's last position after this layer, ``patched.state``.
        controls: Also move the embedding of the source's token into every target layer.
        use_cache: Keep keys and values; without, every new token runs the whole prompt again.
        check: For every target prompt, compare two rows with runs without cache; where they differ, all are run
            without, and a note says so.
        memory: Gigabytes that runs may take at once, the source's and the grid's, beside the models; they are run in
            parts that fit. Beside it are kept: the source's states, what the source says next (n_items x d_vocab
            numbers of its dtype, on the CPU; sources of ``Vectors.from_prompts(..., next_logits=False)`` have none),
            and with ``keep_logits=True`` the grid's logits.
        progress: Show a bar; None: where it takes more than two seconds.

    Returns:
        A `PatchscopeResult` with axes item, source layer, target layer, scale, and the controls: the prompt without a
        patch, and the re-embedded token.

    Raises:
        PatchscopeError: An empty grid, layers or scales that do not exist, a placeholder of several tokens, widths that
            do not fit, a map that makes NaN or raises, vectors that cannot be of ``model``, something that is no
            model, source, target or number.
        TokensError, TokenNotFoundError: A prompt that is too long or empty, a placeholder that is missing or twice.
        HookError: A model without hook points of the residual stream.
        ConsistencyError: States or logits that are NaN or infinite.
    """
    reading = model if target_model is None else target_model
    _require_models(model, reading)
    _require(write, patch_through, n_top, memory, max_new_tokens, read_layer, reading.cfg.n_layers)
    with plain_tensors(), preserved_rng():  # a map may draw
        vectors = as_vectors(model, source, memory)
        _require_own(vectors, model)
        targets = _targets(target, len(vectors))
        preset = _preset(targets)
        if target_layers is None:
            target_layers = preset.target_layers
            if target_layers == "same" and vectors.layers is None:
                target_layers = "all"
        n_new = preset.max_new_tokens if max_new_tokens is None else max_new_tokens
        chosen = as_map(preset.mapping if mapping is None else mapping)
        grid = Grid.of(vectors, reading, source_layers, target_layers, scales, controls)
        placed, target_of = _placed(reading, targets, vectors)
        rows = Rows(vectors, (), _NONE, _NONE, chosen, write, patch_through, reading.cfg.d_model)
        grid, notes = _checked(rows, grid)
        known, differ = _source_next(vectors, model, reading)
        layout = Layout(grid, len(vectors), target_of)
        every = layout.n_rows * reading.cfg.d_vocab * reading.W_U.element_size()
        kept = every <= memory * 1e9 / 4 if keep_logits is None else keep_logits
        reader = Reader(layout.n_rows, n_top, kept)
        rows = replace(rows, cells=layout.cells)
        space = room(reading, memory, every if kept else 0)
        run = _Run(reading, rows, layout, placed, n_new, use_cache, check, space, read_layer, known)
        if reading is not model and isinstance(chosen, Identity):
            notes += (OTHER_BASIS,)
        notes += differ + run.read(reader, progress)
        settings = _settings(model, reading, targets, run)
    return _result(run, reader, notes, settings)


_NONE = torch.zeros(0, dtype=torch.long)


def as_vectors(model: HookedModel, source: Source, memory: float = MEMORY) -> Vectors:
    """Return the vectors of whatever a source is given as; see `patchscope`."""

    def run(at: At | Sequence[At]) -> Vectors:
        return Vectors.from_prompts(model, at, memory=memory)

    if isinstance(source, Vectors):
        return source
    if isinstance(source, Tensor):
        return Vectors.of(source) if source.is_floating_point() else run(At(source))
    if isinstance(source, At | str):
        return run(source if isinstance(source, At) else At(source))
    if isinstance(source, Cache):
        return Vectors.from_cache(source, model=model)
    listed = list(source) if isinstance(source, Iterable) else []
    positions = [one for one in listed if isinstance(one, At)]
    ids = [int(one) for one in listed if isinstance(one, Integral)]
    if listed and len(positions) == len(listed):
        return run(positions)
    if listed and len(ids) == len(listed):
        return run(At(ids))
    raise PatchscopeError(
        f"{source!r:.80} is no source; give cl.At(prompt, pos) or a list of them, a prompt, an activation cache, or "
        "cl.Vectors"
    )


def _require_models(model: Any, reading: Any) -> None:
    require_model(model)
    require_model(reading, "target_model")


def _require_own(vectors: Vectors, model: HookedModel) -> None:
    """Fail where vectors that were taken from layers, or what was said there, cannot be this model's."""
    if vectors.layers is None:
        return
    d_model, last, d_vocab = model.cfg.d_model, model.cfg.n_layers - 1, int(model.W_U.shape[-1])
    width, said = vectors.values.shape[-1], d_vocab if vectors.next_logits is None else vectors.next_logits.shape[-1]
    found = [f"width {width}, not {d_model}"] * (width != d_model)
    found += [f"layer {max(vectors.layers)}, where the model ends with {last}"] * (max(vectors.layers) > last)
    found += [f"next tokens of a vocabulary of {said}, not {d_vocab}"] * (said != d_vocab)
    if found:
        raise PatchscopeError(
            f"the source's vectors are not of this model: they have {', and '.join(found)}. Give the model that they "
            "were taken from, and as target_model the one that reads them; vectors of no model are cl.Vectors.of(rows)"
        )


def _require(
    write: str, through: str, n_top: Any, memory: Any, max_new_tokens: Any, read_layer: Any, n_layers: int
) -> None:
    if write not in WRITES:
        raise PatchscopeError(f"write={write!r} is not valid; give one of {', '.join(map(repr, WRITES))}")
    if through not in THROUGH:
        raise PatchscopeError(f"patch_through={through!r} is not valid; give one of {', '.join(map(repr, THROUGH))}")
    if whole(n_top, "n_top") < 1:
        raise PatchscopeError(f"n_top={n_top} is not valid; give 1 or more")
    require_memory(memory)
    if max_new_tokens is not None and whole(max_new_tokens, "max_new_tokens") < 0:
        raise PatchscopeError(f"max_new_tokens={max_new_tokens} is not valid; give 0 or more")
    if read_layer is not None and whole(read_layer, "read_layer") not in range(EMBEDDING, n_layers):
        raise PatchscopeError(
            f"read_layer={read_layer} does not exist; the model has layers {EMBEDDING} (the embedding) to "
            f"{n_layers - 1}"
        )


def _targets(target: Target | Prompt | Sequence[Target], n_items: int) -> list[Target]:
    """Return one target for all items, or one for each."""
    if isinstance(target, Target):
        return [target]
    if isinstance(target, str | Tensor):
        return [Target(target)]
    if isinstance(target, Mapping) or not isinstance(target, Iterable):
        raise PatchscopeError(
            f"target={target!r:.80} is no target; give cl.Target(prompt, at=placeholder), a prompt, or the messages of "
            'a chat as a list: [{"role": "user", "content": "..."}]'
        )
    listed = list(target)
    found = [one for one in listed if isinstance(one, Target)]
    if not found:
        return [Target(listed)]  # pyright: ignore[reportArgumentType]
    if len(found) not in (1, n_items) or len(found) != len(listed):
        raise PatchscopeError(f"{n_items} items need one cl.Target, or one each; given {len(found)} of {len(listed)}")
    return found


def _preset(targets: Sequence[Target]) -> Preset:
    """Return the settings that the targets bring; plain targets bring none."""
    presets = [one if isinstance(one, Preset) else Preset(one.prompt) for one in targets]
    if len({(repr(one.target_layers), one.max_new_tokens, id(one.mapping)) for one in presets}) > 1:
        raise PatchscopeError(
            "the items' presets differ in target layers, new tokens or map; run those that agree together"
        )
    return presets[0]


def _placed(model: HookedModel, targets: Sequence[Target], vectors: Vectors) -> tuple[list[Placed], list[int]]:
    """Return the distinct target prompts, and the number of each item's."""
    known: dict[tuple[Any, ...], int] = {}
    placed: list[Placed] = []
    target_of = []
    for target in targets:
        one = target.place(model)
        key = (tuple(one.tokens.tolist()), one.positions)
        if key not in known:
            known[key] = len(placed)
            placed.append(one)
        target_of.append(known[key])
        n_slots = vectors.values.shape[2]
        if n_slots not in (1, len(one.positions)):
            raise PatchscopeError(
                f"the source has {n_slots} positions and the target {len(one.positions)} placeholders ({one.text!r}); "
                "give as many, or one position for all placeholders"
            )
    return placed, target_of * len(vectors) if len(targets) == 1 else target_of


def _checked(rows: Rows, grid: Grid) -> tuple[Grid, tuple[str, ...]]:
    """Try every cell's map on one item before anything runs; leave the controls out where the map has none."""
    one = torch.zeros(1, dtype=torch.long)
    for cell in grid.cells:
        for layer in rows.layers(cell):
            rows.value(cell, layer, one)
    try:
        for cell in grid.controls:
            for layer in rows.layers(cell):
                rows.value(cell, layer, one)
    except PatchscopeError as error:
        return replace(grid, controls=()), (f"no re-embedded control: {error}",)
    return grid, ()


class _Run:
    """The rows of a grid, run in parts that fit into memory."""

    def __init__(
        self, reading: HookedModel, rows: Rows, layout: Layout, placed: Sequence[Placed], n_new: int,
        use_cache: bool, check: bool, room: float, read_layer: int | None, source: SourceNext | None,
    ) -> None:  # fmt: skip
        self.reading, self.rows, self.layout, self.placed = reading, rows, layout, placed
        self.n_new, self.use_cache, self.check, self.room = n_new, use_cache, check, room
        self.read_layer, self.source = read_layer, source

    def read(self, reader: Reader, progress: bool | None) -> tuple[str, ...]:
        """Run everything; return what must be noted."""
        notes: list[str] = []
        bar = tqdm(
            total=self.layout.n_rows, desc="patchscope", unit="run", disable=progress is False, leave=False,
            delay=0 if progress else 2,
        )  # fmt: skip
        with bar:
            for number, target in enumerate(self.placed):
                use_cache, check = self.use_cache, self.check
                for part in self.layout.parts(number, self._size(target, use_cache)):
                    note = self._part(target, part, reader, use_cache, check)
                    use_cache, check = use_cache and not note, False
                    if note and note not in notes:
                        notes.append(note)
                    bar.update(len(part.at))
        return tuple(notes)

    def _size(self, target: Placed, use_cache: bool) -> int:
        """Return how many rows fit."""
        through = max((len(self.rows.layers(cell)) for cell in self.layout.cells), default=1)
        return max(1, int(self.room // row_bytes(self.reading, target, self.n_new, through, use_cache=use_cache)))

    def _part(self, target: Placed, part: Part, reader: Reader, use_cache: bool, check: bool) -> str:
        rows = replace(self.rows, item=part.item, cell=part.cell)
        said = say(
            self.reading, target, rows, self.n_new, check=check, use_cache=use_cache, read_layer=self.read_layer,
            uncached_rows=self._size(target, use_cache=False),
        )  # fmt: skip
        reader.add(part.at, said, self.source, part.item)
        return said.note


def _source_next(
    vectors: Vectors, model: HookedModel, reading: HookedModel
) -> tuple[SourceNext | None, tuple[str, ...]]:
    """Return what the source says next, and a note if that cannot be compared with what the reading model says."""
    if vectors.next_logits is None:
        return None, ()
    if not same_vocabulary(model, reading):
        return None, ("the models' vocabularies differ, so next tokens are not compared",)
    return SourceNext.of(vectors.next_logits, int(reading.W_U.shape[-1])), ()


def _settings(model: HookedModel, reading: HookedModel, targets: Sequence[Target], run: _Run) -> dict[str, Any]:
    """Return how a result was made, as JSON can say it."""
    target = targets[0]
    return {
        "model": str(getattr(model.cfg, "model_name", "")),
        "target_model": None if reading is model else str(getattr(reading.cfg, "model_name", "")),
        "target": target.name,
        "provenance": target.provenance if isinstance(target, Preset) else "",
        "mapping": run.rows.mapping.name,
        "write": run.rows.write,
        "patch_through": run.rows.through,
        "max_new_tokens": run.n_new,
    }


def _result(run: _Run, reader: Reader, notes: tuple[str, ...], settings: dict[str, Any]) -> PatchscopeResult:
    grid, layout, vectors = run.layout.grid, run.layout, run.rows.vectors
    n_items, whole = len(vectors), reader.done()
    main = whole.at(slice(0, layout.n_main)).arranged((*grid.shape, n_items), (3, 0, 1, 2))
    controlled = None
    if grid.controls:
        rows = whole.at(slice(layout.n_main, layout.n_patched))
        n_scales = len(grid.scales)
        controlled = rows.arranged((len(grid.controls) // n_scales, n_scales, n_items), (2, 0, 1))
    return PatchscopeResult(
        items=vectors.names,
        source_layers=grid.source_layers,
        target_layers=grid.target_layers,
        scales=grid.scales,
        patched=main,
        reembedded=controlled,
        unpatched=whole.at(layout.n_patched + layout.target_of),
        source_top=None if run.source is None else run.source.best.cpu(),
        targets=tuple(run.placed[i].text for i in layout.target_of.tolist()),
        wording=Wording(getattr(run.reading, "tokenizer", None), int(run.reading.W_U.shape[-1])),
        settings=settings,
        notes=notes,
    )
