"""The table of models whose dictionaries are published: one record for each set of dictionaries.

What is here is from SAELens' registry, circuit-tracer's list of sets, and the shapes of the models. Sizes are computed
from shapes and dtype, so they are approximate; where a width is not known there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from circuit_lens.errors import nearest
from circuit_lens.loading.failures import LoadError, readable_size

Kind = Literal["plt", "skip", "clt", "sae"]
ModelClass = Literal["HookedTransformer", "TransformerBridge"]
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Published:
    """A set of dictionaries that is published for a model.

    Attributes:
        model: TransformerLens' name of the model.
        variant: Name of the set, unique for its model; the first of a model is its default.
        kind: ``plt`` per-layer transcoders (``skip``: with a linear skip path), ``clt`` a cross-layer transcoder,
            ``sae`` autoencoders.
        source: What :func:`circuit_lens.loading.load_dictionaries` takes.
        repository: Of the model's weights on the Hugging Face hub.
        model_bytes: Approximate download of the model.
        gated: Whether the model's licence has to be accepted on the hub, and HF_TOKEN be set.
        n_layers, d_model: Of the model.
        d_sae: Features of a layer; None: not known here.
        stored: Dtype of the published dictionaries.
        reads, writes: Hooks within the block, as TransformerLens names them; None: as the set's own files say.
        dtype: In which the model is loaded by default.
        model_class: The class whose hooks the set was made for.
        processing: What :meth:`HookedTransformer.from_pretrained_no_processing` is told; nothing: weights as they are.
        sha256: File to sum, where known.
        note: What else to know.
    """

    model: str
    variant: str
    kind: Kind
    source: str
    repository: str
    model_bytes: float
    gated: bool
    n_layers: int
    d_model: int
    d_sae: int | None
    stored: str
    reads: str | None = None
    writes: str | None = None
    dtype: str = "bfloat16"
    model_class: ModelClass = "HookedTransformer"
    processing: Mapping[str, bool] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def download(self) -> float | None:
        """Approximate bytes of the dictionaries, None where a width is not known."""
        if self.d_sae is None:
            return None
        matrix = self.d_model * self.d_sae
        numbers = 2 * self.n_layers * matrix
        if self.kind == "clt":
            numbers = self.n_layers * matrix + self.n_layers * (self.n_layers + 1) // 2 * matrix
        if self.kind == "skip":
            numbers += self.n_layers * self.d_model**2
        return float(numbers * _BYTES[self.stored])

    def cells(self) -> tuple[str, ...]:
        """Return what a line of the table shows: names, kind, features, sizes, class, source."""
        return (
            self.model, self.variant, self.kind, "" if self.d_sae is None else f"{self.d_sae}",
            "" if self.download is None else f"~{readable_size(self.download)}",
            f"~{readable_size(self.model_bytes)}{' (gated)' if self.gated else ''}", self.model_class, self.source,
        )  # fmt: skip


class Table(tuple[Published, ...]):
    """Records that print as one line each."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("model", "set", "kind", "features", "download", "model's", "class", "source")
        rows = [head, *(one.cells() for one in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def __repr__(self) -> str:
        return str(self)


def table(model: str | None = None) -> Table:
    """Return all records, or those of a model, the default one first.

    Args:
        model: A name as TransformerLens knows it, with or without organisation, capitals or not.

    Raises:
        LoadError: No record of that model; names the nearest.
    """
    if model is None:
        return _TABLE
    wanted = _ALIASES.get(_plain(model), _plain(model))
    found = Table(one for one in _TABLE if wanted in (_plain(one.model), _plain(one.repository)))
    if not found:
        known = dict.fromkeys(one.model for one in _TABLE)
        raise LoadError(
            f"no dictionaries of {model!r} are in the table{nearest(wanted, known)}; circuit_lens.loading.table() "
            "lists them"
        )
    return found


def variant(model: str, name: str | None) -> Published:
    """Return the record of a model's set by its name, or its default one.

    Raises:
        LoadError: No such model or set.
    """
    records = table(model)
    for one in records:
        if name in (None, one.variant):
            return one
    raise LoadError(
        f"{model} has no set {name!r}{nearest(str(name), [r.variant for r in records])}; valid are "
        f"{', '.join(r.variant for r in records)}"
    )


_ALIASES = {"gpt2-small": "gpt2"}


def _plain(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


# --------------------------------------------------------------------------------------------------------- records


def _gemma_2() -> list[Published]:
    base = {
        "repository": "google/gemma-2-2b", "model_bytes": 10.5e9, "gated": True, "n_layers": 26, "d_model": 2304,
    }  # fmt: skip
    plt = {
        "kind": "plt", "source": "gemma-scope-2b-pt-transcoders", "d_sae": 16384, "stored": "float32",
        "reads": "ln2.hook_normalized", "writes": "hook_mlp_out",
    }  # fmt: skip
    sae = {"kind": "sae", "d_sae": 16384, "stored": "float32"}
    canonical = "layer_*/width_16k/canonical"
    clt = {"kind": "clt", "stored": "bfloat16"}
    it = {**base, "repository": "google/gemma-2-2b-it", "model_bytes": 5.2e9}
    return [
        _record("gemma-2-2b", "plt-16k", base, plt, note="one L0 a layer, those of the published graphs"),
        _record("gemma-2-2b", "clt-426k", base, clt, source="hf:mntss/clt-gemma-2-2b-426k", d_sae=16384),
        _record("gemma-2-2b", "clt-2.5m", base, clt, source="hf:mntss/clt-gemma-2-2b-2.5M", d_sae=98304),
        _record("gemma-2-2b", "sae-resid-16k", base, sae, source=f"gemma-scope-2b-pt-res-canonical:{canonical}",
                reads="hook_resid_post", writes="hook_resid_post"),
        _record("gemma-2-2b", "sae-mlp-16k", base, sae, source=f"gemma-scope-2b-pt-mlp-canonical:{canonical}",
                reads="hook_mlp_out", writes="hook_mlp_out"),
        _record("gemma-2-2b-it", "plt-16k", it, plt, note="trained on the base model"),
    ]  # fmt: skip


def _gemma_3() -> list[Published]:
    shapes = {"270m": (18, 640, 0.5e9), "1b": (26, 1152, 2e9), "4b": (34, 2560, 8.6e9), "12b": (48, 3840, 24e9),
              "27b": (62, 5376, 55e9)}  # fmt: skip
    records = []
    for size, (n_layers, d_model, n_bytes) in shapes.items():
        for tuning in ("pt", "it"):
            model = f"gemma-3-{size}" + ("" if (size, tuning) == ("270m", "pt") else f"-{tuning}")
            release = f"gemma-scope-2-{size}-{tuning}-transcoders-all"
            common = {
                "repository": f"google/{model}", "model_bytes": n_bytes, "gated": True, "n_layers": n_layers,
                "d_model": d_model, "stored": "float32", "reads": "mlp.hook_in", "writes": "hook_mlp_out",
                "model_class": "TransformerBridge",
                "note": "declared to read hook_mlp_in, by which the norm's output is meant",
            }  # fmt: skip
            for width, d_sae in (("16k", 16384), ("262k", 262144)):
                for kind, end in (("skip", "_affine"), ("plt", "")):
                    if (size, width, kind) == ("27b", "16k", "plt"):
                        continue  # published for 59 of the 62 layers
                    source = f"{release}:layer_*_width_{width}_l0_small{end}"
                    records.append(_record(model, f"{kind}-{width}", common, kind=kind, source=source, d_sae=d_sae))
    return records


def _llama() -> list[Published]:
    small = {
        "repository": "meta-llama/Llama-3.2-1B", "model_bytes": 2.5e9, "gated": True, "n_layers": 16, "d_model": 2048,
        "stored": "bfloat16",
    }  # fmt: skip
    return [
        _record("Llama-3.2-1B", "plt-131k", small, kind="plt", source="hf:mntss/transcoder-Llama-3.2-1B",
                d_sae=131072),
        _record("Llama-3.2-1B", "clt-524k", small, kind="clt", source="hf:mntss/clt-llama-3.2-1b-524k", d_sae=32768),
        Published("Llama-3.1-8B-Instruct", "plt-topk", "plt", "hf:facebook/crv-8b-instruct-transcoders",
                  "meta-llama/Llama-3.1-8B-Instruct", 16e9, True, 32, 4096, None, "bfloat16", reads="mlp.hook_in",
                  writes="hook_mlp_out", note="TopK"),
    ]  # fmt: skip


def _qwen() -> list[Published]:
    shapes = {"0.6B": (28, 1024, 1.5e9, "-lowl0"), "1.7B": (28, 2048, 4.1e9, "-lowl0"), "4B": (36, 2560, 8.1e9, ""),
              "8B": (36, 4096, 16.4e9, ""), "14B": (40, 5120, 29.5e9, "-lowl0")}  # fmt: skip
    records = []
    for size, (n_layers, d_model, n_bytes, end) in shapes.items():
        ends = (("plt", end), ("plt-high-l0", "")) if size == "14B" else (("plt", end),)
        for name, release_end in ends:
            records.append(
                Published(
                    f"qwen3-{size.lower()}", name, "plt", f"mwhanna-qwen3-{size.lower()}-transcoders{release_end}",
                    f"Qwen/Qwen3-{size}", n_bytes, False, n_layers, d_model, None, "bfloat16", reads="mlp.hook_in",
                    writes="hook_mlp_out",
                )
            )  # fmt: skip
    return records


def _gpt_2() -> list[Published]:
    return [
        Published("gpt2", "sae-resid-25k", "sae", "gpt2-small-res-jb:blocks.*.hook_resid_pre", "gpt2", 0.55e9, False,
                  12, 768, 24576, "float32", reads="hook_resid_pre", writes="hook_resid_pre", dtype="float32",
                  processing={"center_writing_weights": True}, note="trained with centred writing weights"),
    ]  # fmt: skip


def _record(model: str, name: str, *parts: Mapping[str, object], **more: object) -> Published:
    settings: dict = {}
    for part in (*parts, more):
        settings.update(part)
    return Published(model=model, variant=name, **settings)


_TABLE = Table([*_gemma_2(), *_llama(), *_qwen(), *_gemma_3(), *_gpt_2()])
