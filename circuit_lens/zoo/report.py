"""The report of the bundled models: which pair is shipped and why, and every figure that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from circuit_lens.zoo.loading import ASSETS, DICTIONARIES
from circuit_lens.zoo.markdown import table
from circuit_lens.zoo.report_sets import MeasuredSets, sets_sections

if TYPE_CHECKING:
    from circuit_lens.training.transcoder import TranscoderSettings
    from circuit_lens.zoo.train import TrainingSettings

REPORT = Path(__file__).parent / "REPORT.md"
BUDGET_BYTES = 15_000_000
CAPITALS, SHORTCUT = "capitals", "capitals-shortcut"

Record = Mapping[str, Any]


def share(accuracy: Record) -> float:
    """Share of right answers of an accuracy record."""
    return accuracy["right"] / accuracy["asked"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One model and one set of transcoders with their figures, as JSON data."""

    name: str
    seed: int
    dictionary_seed: int
    behaviour: Record
    figures: Record

    @property
    def added_loss(self) -> float:
        """Nats that replacing every MLP costs."""
        return self.figures["loss_replaced"] - self.figures["loss"]

    def layer_values(self, figure: str) -> list[float]:
        """One figure of every layer."""
        return [layer[figure] for layer in self.figures["layers"]]

    @property
    def best_patch(self) -> float:
        """People described rightly by the best patch after a block that is neither the first depth nor the last."""
        return max(share(accuracy) for accuracy in self.behaviour["people_patch_by_depth"][1:-1])

    def targets(self) -> dict[str, tuple[float, bool]]:
        """Every target: (the figure, whether it is met)."""
        antonyms, mediation = self.behaviour["antonyms"], self.figures["mediation"]
        probe = self.behaviour["state_probe_by_depth"]
        rows: list[tuple[str, float, Callable[[float], bool]]] = [
            ("Austin first, probability", _probability(self.behaviour["dallas"], "Austin"), lambda x: x >= 0.5),
            ("two-hop, held-out cities ≥ .95", share(self.behaviour["two_hop"]["held-out cities"]), _at_least(0.95)),
            ("state probe at the embedding ≤ .05 (chance .02)", probe[0], _at_most(0.05)),
            ("state probe after a block ≥ .9", max(probe[1:]), _at_least(0.9)),
            ("held-out antonyms, French ≥ .8", share(antonyms["French, held-out"]), _at_least(0.8)),
            ("held-out antonyms, Spanish ≥ .8", share(antonyms["Spanish, held-out"]), _at_least(0.8)),
            ("names: patch after a middle block ≥ .7", self.best_patch, _at_least(0.7)),
            ("names: embedding patch ≤ .2", share(self.behaviour["people_patch_by_depth"][0]), _at_most(0.2)),
            ("loss added, every MLP replaced ≤ .05 nats", self.added_loss, _at_most(0.05)),
            ("active features per token, largest layer ≤ 12", max(self.layer_values("l0")), _at_most(12)),
            ("explained variance, worst layer ≥ .94", min(self.layer_values("explained_variance")), _at_least(0.94)),
            ("dead features, mean ≤ .25", fmean(self.layer_values("dead")), _at_most(0.25)),
            ("Dallas → Austin through Texas ≥ .6", mediation["share"], _at_least(0.6)),
            ("through the control state ≤ .15", mediation["control"], _at_most(0.15)),
        ]
        return {name: (figure, met(figure)) for name, figure, met in rows}

    def summary(self) -> str:
        """One line."""
        found = self.targets()
        missed = [f"{name}: {figure:.3f}" for name, (figure, met) in found.items() if not met]
        met = len(found) - len(missed)
        return f"{self.name} seed {self.seed}/{self.dictionary_seed}: {met}/{len(found)} targets; missed: {missed}"


def _at_least(limit: float) -> Callable[[float], bool]:
    return lambda figure: figure >= limit


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda figure: figure <= limit


def _probability(tokens: Sequence[Sequence[Any]], token: str) -> float:
    """The probability of ``token`` if it stands first, else 0."""
    return tokens[0][1] if tokens[0][0] == token else 0.0


def choose(measured: Iterable[Measured], name: str) -> Measured:
    """The pair to ship: most targets met, then the largest share of the Dallas → Austin effect through Texas."""
    candidates = [pair for pair in measured if pair.name == name]
    return max(
        candidates,
        key=lambda pair: (sum(met for _, met in pair.targets().values()), pair.figures["mediation"]["share"]),
    )


def _column(pair: Measured) -> str:
    return f"{pair.seed}/{pair.dictionary_seed}"


def _targets_table(pairs: Sequence[Measured]) -> list[str]:
    names = list(pairs[0].targets())
    rows = []
    for name in names:
        cells = [pair.targets()[name] for pair in pairs]
        rows.append([name, *(f"{figure:.3f}" + ("" if met else " ✗") for figure, met in cells)])
    return table(["model seed / dictionary seed", *(_column(pair) for pair in pairs)], rows)


def _layers_table(pairs: Sequence[Measured]) -> list[str]:
    def joined(pair: Measured, figure: str, form: str) -> str:
        return " ".join(format(value, form) for value in pair.layer_values(figure))

    rows = [
        [
            _column(pair),
            joined(pair, "explained_variance", ".3f"),
            joined(pair, "l0", ".1f"),
            joined(pair, "dead", ".2f"),
            f"{pair.figures['loss']:.3f}",
            f"{pair.figures['loss_replaced']:.3f}",
            f"{pair.figures['loss_zeroed']:.2f}",
        ]
        for pair in pairs
    ]
    header = ["seeds", "explained variance", "active per token", "dead share", "loss", "MLPs replaced", "MLPs zeroed"]
    return table(header, rows)


def _mediation_table(pairs: Sequence[Measured]) -> list[str]:
    rows = []
    for pair in pairs:
        found = pair.figures["mediation"]
        values = [found[key] for key in ("effect", "share", "control", "others_mean", "others_max")]
        members = ", ".join(f"L{layer} #{index}" for layer, index in found["members"])
        rows.append([_column(pair), *(f"{value:.3f}" for value in values), members or "none"])
    header = ["seeds", "effect (logit)", "through Texas", "California", "other states, mean", "largest", "members"]
    return table(header, rows)


def _behaviour_table(pairs: Sequence[Measured]) -> list[str]:
    by_seed = {pair.seed: pair.behaviour for pair in pairs}
    first = next(iter(by_seed.values()))
    rows: list[list[str]] = []
    for group in ("two_hop", "facts", "antonyms"):
        for name, accuracy in first[group].items():
            cells = [f"{share(behaviour[group][name]):.3f}" for behaviour in by_seed.values()]
            rows.append([f"{group.replace('_', '-')}: {name} ({accuracy['asked']})", *cells])
    depths = ["embedding", *(f"after block {n}" for n in range(len(first["state_probe_by_depth"]) - 1))]
    for number, depth in enumerate(depths):
        cells = [f"{behaviour['state_probe_by_depth'][number]:.3f}" for behaviour in by_seed.values()]
        rows.append([f"state probe, {depth}", *cells])
    for number, depth in enumerate(depths):
        cells = [f"{share(behaviour['people_patch_by_depth'][number]):.3f}" for behaviour in by_seed.values()]
        rows.append([f"names, patched at the {depth}" if number == 0 else f"names, patched {depth}", *cells])
    cells = [f"{share(behaviour['people_unpatched']):.3f}" for behaviour in by_seed.values()]
    rows.append(["names, written out in the description prompt", *cells])
    return table(["share right, by model seed", *(str(seed) for seed in by_seed)], rows)


def budget_table(assets: Path) -> list[str]:
    """The bytes of everything that ships, and what is left of the budget."""
    rows, total = [], 0
    for model in sorted(path for path in assets.iterdir() if path.is_dir()):
        parts = {"model": [p for p in model.iterdir() if p.is_file()]}
        for folder in sorted((model / DICTIONARIES).glob("*")):
            files = [path for path in folder.rglob("*") if path.is_file()]
            parts[f"`{folder.name}`: weights"] = [path for path in files if path.parent != folder]
            described = [path for path in files if path.parent == folder]
            if described:
                parts[f"`{folder.name}`: feature information"] = described
        for name, files in parts.items():
            size = sum(path.stat().st_size for path in files)
            total += size
            rows.append([model.name, name, f"{size:,}"])
    rows.append(["**all**", "", f"**{total:,}**"])
    rows.append(["left of the budget", "", f"{BUDGET_BYTES - total:,} of {BUDGET_BYTES:,}"])
    return table(["model", "part", "bytes on disk"], rows)


_INTRODUCTION = """# The bundled models: how they were made, and what they can do

Made by `python -m circuit_lens.zoo`; every figure below was measured by it, on the files as they ship (weights
rounded to float16, computed in float32). Held-out means never seen in that form in training (`corpus.py`). A cross
marks a target that is missed. Seeds are written model seed / dictionary seed.
"""

_STRETCH = """## Names of several tokens

The people in the tables share last names, seven or more to each, with different descriptions, and many share first
names. The last token of a name comes to carry the whole person because the pieces before it are hidden, in the
attention mask, from everything after the name in {hide:.0%} of the mentions in training (`TrainingSettings.hide`,
`Rows.visible_until`); in every figure nothing is hidden. Patched into the description prompt at the depth where the
prompt reads it, that token's residual stream gives the right description; at the embedding, where only the shared
last name is, it does not. After the depth where the prompt reads, a patch comes too late, so the last depths fail.
Names cut into pieces of words: `capitals-cut`. Not tried: other shares of hiding.

## What was tried for held-out antonyms

One run each (model seed 0, before rounding to float16), held-out opposites right in French / Spanish / Chinese, all
templates, and names described rightly after block 1. The differences between runs are the data's and the number of
steps'.

| data | steps | French | Spanish | Chinese | names |
|---|---|---|---|---|---|
| opposites within a language, and across languages in English sentences | 1500 | .24 | .11 | .11 | .99 |
| also translations in sentences of all languages; half of the operands of any language | 2500 | .74 | .50 | .53 | .98 |
| all operands of any language | 3000 | .95 | .56 | .56 | .70 |
| also translations of a word into its own language, and signs of opposites | 3000 | .43 | .47 | .11 | .96 |
| no such copies, only English antonym words in identity lists (now) | 3000 | .86 | .69 | .92 | .70 |

What goes wrong is copying: the held-out word itself is answered, and only where operand and answer are of one
language. Seeds differ (tables above), so one run each does not rank neighbouring rows.

## What was tried for the transcoders

Model seed 0, dictionary seed 0, 100,008 tokens of held-out text:

| features | BatchTopK | steps | explained variance | dead share | loss added | through Texas | California |
|---|---|---|---|---|---|---|---|
| 640 | 11 | 700 | .966 .988 .984 .988 | .08 .01 .02 .08 | .024 | .604 | .014 |
| 1024 | 9 | 800 | .977 .991 .987 .989 | .07 .02 .10 .10 | .010 | .570 | -.010 |

The larger are better by every score of fidelity and pass less of the effect through the features of the state:
choose dictionaries by mediation, not by fidelity alone. Features are compositional: one of them serves several
states, so a state is a set of features, and the labels list several states.
"""


def write_report(
    measured: Sequence[Measured],
    shipped: Mapping[str, Measured],
    *,
    settings: TrainingSettings,
    transcoders: TranscoderSettings,
    dictionary_tokens: int,
    sets: MeasuredSets | None = None,
    path: Path = REPORT,
    assets: Path = ASSETS,
) -> Path:
    """Write the report as Markdown and return where it was written.

    ``settings`` and ``transcoders`` are those of `capitals`; ``dictionary_tokens`` is the length of the text its
    transcoders were trained on; ``sets``: figures of its other dictionaries.
    """
    capitals = [pair for pair in measured if pair.name == CAPITALS]
    shortcut = [pair for pair in measured if pair.name == SHORTCUT]
    best = shipped[CAPITALS]
    met = sum(met for _, met in best.targets().values())
    tokens = settings.steps * settings.batch * settings.length
    lines = [_INTRODUCTION, "## Shipped", ""]
    lines += [
        f"`{CAPITALS}` is model seed {best.seed} with dictionary seed {best.dictionary_seed}: it meets {met} of "
        f"{len(best.targets())} targets, and of the pairs that meet most, it is the one in which the largest share of "
        "the Dallas → Austin effect runs through Texas features (the rule is `choose` in `report.py`).",
        "",
        f"Model: {settings.steps} steps of {settings.batch} × {settings.length} tokens ({tokens:,} in all), Muon "
        f"{settings.muon_lr} inside the blocks and AdamW {settings.adam_lr} elsewhere. Transcoders: "
        f"{transcoders.d_sae} features, BatchTopK {transcoders.k:g} saved as JumpReLU, {transcoders.steps} steps of "
        f"{transcoders.batch} tokens from {dictionary_tokens:,} tokens of text. Figures of dictionaries are on "
        f"{best.figures['n_tokens']:,} tokens of other text; a dead feature is active on none of them. BOS is left out "
        "of both, and keeps its MLP outputs when every MLP is replaced.",
        "",
        "## Targets: `capitals`, all seeds",
        "",
        *_targets_table(capitals),
        *_behaviour_table(capitals),
        "## Transcoders: `plt` of `capitals`, all seeds",
        "",
        *_layers_table(capitals),
        "The linear effect of the embedding of Dallas on the logit of Austin, with attention patterns, norm scales and "
        "active features frozen, and the shares that run through the features that detect a state at the city's "
        "position (active on at least half of the state's cities and at most 30 % of the others on a neutral prompt):",
        "",
        *_mediation_table(capitals),
    ]
    lines += sets_sections(sets) if sets else []
    if shortcut:
        lines += [
            "## The negative control: `capitals-shortcut`",
            "",
            "The same with a trained embedding: the answers are as good, but the state can be in the city's embedding "
            "already, and then the transcoders have no step from the city to the state to explain.",
            "",
            *_targets_table(shortcut),
            *_behaviour_table(shortcut),
            *_layers_table(shortcut),
            *_mediation_table(shortcut),
        ]
    lines += [_STRETCH.format(hide=settings.hide), "## Bytes", "", *budget_table(assets)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
