"""The part of the report about dictionaries of other kinds: a cross-layer transcoder, skip transcoders, SAEs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from circuit_lens.zoo.markdown import table

if TYPE_CHECKING:
    from circuit_lens.training.cross_layer_network import CrossLayerSettings
    from circuit_lens.training.sae import SaeSettings

Record = Mapping[str, Any]
ADDED, L0, CROSS_DEAD, DEAD = 0.06, 8.0, 0.12, 0.2
THROUGH, CONTROL = 0.6, 0.15


@dataclass(frozen=True, slots=True)
class MeasuredSets:
    """Figures of all sets of the shipped pair, as JSON data.

    Attributes:
        transcoders: Of the per-layer transcoders (`DictionaryFigures`).
        clt: Of the cross-layer transcoder (`ReplacementFigures`).
        saes: Of SAEs and skip transcoders (`SaeFigures`).
        graphs: `GraphFigures` by the name of the set.
        cross_layer: Settings of the cross-layer transcoder.
        sae: Settings of an SAE of a given size.
    """

    transcoders: Record
    clt: Record
    saes: Record
    graphs: Mapping[str, Record]
    cross_layer: CrossLayerSettings
    sae: Callable[[int], SaeSettings]

    def of_set(self, *names: str) -> list[Record]:
        """The dictionaries of some sets."""
        return [one for one in self.saes["dictionaries"] if one["set"] in names]

    def lengths(self, name: str, by: str) -> tuple[float, float]:
        """(on the Dallas prompt, mean over the held-out prompts) of a set's mean path length."""
        found = self.graphs[name]
        return found["dallas"][by], fmean(one[by] for one in found["held_out"])

    def shorter(self, by: str) -> int:
        """On how many held-out prompts the cross-layer transcoder's paths are shorter than the transcoders'."""
        pairs = zip(self.graphs["clt"]["held_out"], self.graphs["plt"]["held_out"], strict=True)
        return sum(clt[by] < plt[by] for clt, plt in pairs)

    def cross_layer_targets(self) -> dict[str, tuple[float, bool]]:
        """Every target of the cross-layer transcoder: (the figure, whether it is met)."""
        added = self.clt["loss_replaced"] - self.clt["loss"]
        largest = {figure: max(layer[figure] for layer in self.clt["layers"]) for figure in ("l0", "dead")}
        through = self.graphs["clt"]["mediation"]
        rows = {
            f"loss added, every MLP replaced ≤ {ADDED} nats": (added, added <= ADDED),
            f"active features per token, largest layer ≤ {L0:g}": (largest["l0"], largest["l0"] <= L0),
            f"dead features, worst layer ≤ {CROSS_DEAD:.0%}": (largest["dead"], largest["dead"] <= CROSS_DEAD),
        }
        for by in ("effect", "influence"):
            (own, _), (plain, _) = self.lengths("clt", by), self.lengths("plt", by)
            rows[f"features on a path, Dallas, by {by}: below the transcoders' {plain:.3f}"] = (own, own < plain)
        rows[f"Dallas → Austin through Texas ≥ {THROUGH}"] = (through["share"], through["share"] >= THROUGH)
        rows[f"through the control state ≤ {CONTROL}"] = (through["control"], through["control"] <= CONTROL)
        return rows


def marked(figure: str, met: bool) -> str:
    """A figure, with a cross if its target is missed."""
    return figure if met else f"{figure} ✗"


def _layers(records: Iterable[Record], limit: float | None = None) -> list[list[str]]:
    return [
        [
            f"{one['explained_variance']:.3f}",
            f"{one['l0']:.1f}",
            marked(f"{one['dead']:.3f}", limit is None or one["dead"] < limit),
        ]
        for one in records
    ]


_LAYER_HEADER = ("explained variance", "active per token", "dead share")


def cross_layer_section(sets: MeasuredSets) -> list[str]:
    """The section about the cross-layer transcoder."""
    found, settings = sets.clt, sets.cross_layer
    targets = [[name, marked(f"{figure:.3f}", met)] for name, (figure, met) in sets.cross_layer_targets().items()]
    layers = [[str(number), *cells] for number, cells in enumerate(_layers(found["layers"]))]
    paths = []
    for by in ("effect", "influence"):
        (clt, clt_mean), (plt, plt_mean) = sets.lengths("clt", by), sets.lengths("plt", by)
        values = [f"{value:.3f}" for value in (plt, clt, plt_mean, clt_mean)]
        paths.append([by, *values, f"{sets.shorter(by)} of {len(sets.graphs['clt']['held_out'])}"])
    shorter = [by for by in ("effect", "influence") if sets.lengths("clt", by)[0] < sets.lengths("plt", by)[0]]
    measures = {0: "by neither measure", 1: f"by one of two measures ({', '.join(shorter)})", 2: "by both measures"}
    return [
        "## Cross-layer transcoder: `clt`",
        "",
        f"{settings.d_sae} features per layer, which read it and write to it and all later ones; BatchTopK "
        f"{settings.k:g} saved as JumpReLU, {settings.steps} steps of {settings.batch} tokens. Figures on "
        f"{found['n_tokens']:,} tokens, as above.",
        "",
        *table(["target", "`clt`"], targets),
        *table(["layer", *_LAYER_HEADER], layers),
        f"Loss {found['loss']:.3f}; with every MLP replaced {found['loss_replaced']:.4f} (transcoders: "
        f"{sets.transcoders['loss_replaced']:.4f}); with every MLP zeroed {found['loss_zeroed']:.2f}.",
        "",
        "Features on a path from a token to the most probable answer, on average, weighted by the linear effect along "
        "the path, or by influence (products of normalised edges); on the Dallas prompt, and the mean over held-out "
        "questions:",
        "",
        *table(["weighted by", "Dallas: `plt`", "`clt`", "held-out: `plt`", "`clt`", "shorter in `clt`"], paths),
        f"The target was shorter paths on the Dallas prompt: they are shorter {measures[len(shorter)]}.",
        "",
    ]


def graphs_section(sets: MeasuredSets) -> list[str]:
    """The section about what mediates in graphs of every set."""
    rows = []
    for name, found in sets.graphs.items():
        record = found["mediation"]
        values = [f"{record[key]:.3f}" for key in ("effect", "share", "control", "others_mean", "others_max")]
        rows.append([f"`{name}`", *values, str(len(record["members"]))])
    header = ["set", "effect (logit)", "through Texas", "California", "other states, mean", "largest", "members"]
    return [
        "## From Dallas to Austin in every set",
        "",
        "The same prompt and the same rule of membership as for the transcoders above, in the attribution graph of "
        "each set, where the MLPs that SAEs leave are their Jacobians. Opposed paths can take a share above 1.",
        "",
        *table(header, rows),
    ]


def skip_section(sets: MeasuredSets) -> list[str]:
    """The section about skip transcoders."""
    records = sets.of_set("skip")
    rows = [
        [str(number), *cells, f"{one['loss_replaced']:.4f}"]
        for number, (one, cells) in enumerate(zip(records, _layers(records), strict=True))
    ]
    loss, plain = sets.saes["loss_skip"], sets.transcoders["loss_replaced"]
    return [
        "## Skip transcoders: `skip`",
        "",
        "As the transcoders, with an affine path beside the features (Paulo et al. 2025).",
        "",
        *table(["layer", *_LAYER_HEADER, "loss, this MLP replaced"], rows),
        f"Loss {sets.saes['loss']:.4f}; with every MLP replaced {loss:.4f} (transcoders without the path: "
        f"{plain:.4f}); with every MLP zeroed {sets.saes['loss_zeroed']:.2f}.",
        "",
    ]


def sae_section(sets: MeasuredSets) -> list[str]:
    """The section about SAEs."""
    names = list(dict.fromkeys(one["set"] for one in sets.saes["dictionaries"] if one["set"] != "skip"))
    records = sets.of_set(*names)
    rows = [
        [f"`{one['set']}`", one["hook"], str(one["d_sae"]), *cells, f"{one['loss_replaced']:.4f}"]
        for one, cells in zip(records, _layers(records, DEAD), strict=True)
    ]
    settings = [sets.sae(size) for size in sorted({one["d_sae"] for one in records})]
    trained = "; ".join(f"{one.d_sae} features {one.steps} steps, auxiliary {one.auxiliary:g}" for one in settings)
    return [
        "## SAEs: " + ", ".join(f"`{name}`" for name in names),
        "",
        f"BatchTopK {settings[0].k:g} saved as JumpReLU, steps of {settings[0].batch} tokens, and a loss that revives "
        f"features silent for {settings[0].dead_window} steps ({trained}). The three sizes at one hook are there to "
        f"see features split. A dead feature is active on none of {sets.saes['n_tokens']:,} tokens (target: fewer than "
        f"{DEAD:.0%}). The loss of the model itself is {sets.saes['loss']:.4f}.",
        "",
        *table(["set", "hook", "features", *_LAYER_HEADER, "loss, replaced there"], rows),
        "`sae-mlp-in` stands at a norm, where an SAE can be compared but not attributed.",
        "",
        _TRIED_SIZES,
    ]


_TRIED_SIZES = """What was tried for dead features in the residual stream after layer 1 (one run each, figures on the
same 100,008 tokens):

| features | steps | rate | auxiliary | silent for | explained variance | dead share |
|---|---|---|---|---|---|---|
| 1600 | 700 | .003 | .5 | 20 | .981 | .349 |
| 1600 | 700 | .001 | .5 | 20 | .963 | .558 |
| 1600 | 1400 | .003 | .5 | 20 | .990 | .073 |
| 1280 | 700 | .003 | 2 | 10 | .977 | .219 |
| 1024 | 700 | .003 | .5 | 20 | .978 | .106 |

All on the same 400,000 tokens of text. What helped is twice the steps.
"""


def sets_sections(sets: MeasuredSets) -> list[str]:
    """All sections."""
    return [*cross_layer_section(sets), *skip_section(sets), *sae_section(sets), *graphs_section(sets)]
