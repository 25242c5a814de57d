"""All studies of bundled models as tables, and the report made of them, part by part."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from circuit_lens import zoo
from circuit_lens.graph.files import atomic_path
from circuit_lens.studies import (
    mediation,
    multilingual,
    operations,
    patch_attributes,
    patch_contexts,
    patch_cuts,
    patch_entities,
    patch_hops,
    patch_lenses,
    patch_through,
    two_hop,
    two_hop_patterns,
)
from circuit_lens.studies.multilingual import Words
from circuit_lens.studies.places import Places
from circuit_lens.studies.tables import StudyTable
from circuit_lens.zoo.cut_names import CUT

REPORT = Path(__file__).parent / "REPORT.md"
DEFAULT_MODELS = ("capitals", "capitals-shortcut")
Say = Callable[[str], None]
Maker = Callable[[], StudyTable | Sequence[StudyTable]]
Part = Literal["circuits", "patchscopes"]
MODELS: dict[Part, tuple[str, ...]] = {"circuits": DEFAULT_MODELS, "patchscopes": (*DEFAULT_MODELS, CUT)}
"""What the report is of: `capitals-cut` has no dictionaries, and a study of its own."""

_CIRCUITS = """# Case studies on the bundled models

The case studies of "On the Biology of a Large Language Model" (Lindsey et al. 2025) on models that were trained on
known facts, written by `python -m circuit_lens.studies`; nothing here is edited by hand. Swaps use the public
interface (`Supernode.scale`, `Supernode.inject`, `rm.intervene_batch`) with everything live: attention, norms, later
features and errors react. Supernodes are chosen on cities and words other than those tested, and each table names its
rule. Rules were settled on trained items, with these exceptions, which make figures slightly optimistic: that
operands sit in layers 0 and 1 and take factors 0/2 was first seen on held-out words, and trained ones then chose the
same; at which position an operation sits was located with all pairs; the shares for English synonyms were chosen on
the pairs of the table; some held-out questions were looked at before the pattern's shares and factor were chosen.
Figures are shares with 95 % Wilson intervals and counts, or means with 95 % bootstrap intervals.

`capitals-shortcut` is the contrast: its embedding is trained, so that much of a city's state is there before any MLP
computes it, and features explain less of the answer. Neuron-basis swaps are not in these tables. On Gemma-2-2b the same
functions run by name (`circuit_lens.studies.hub.gemma_tables()`), which fetches the model and its transcoders; no
figure of it is printed here.
"""

_PATCHSCOPES = """# Patchscopes on the bundled models

The studies of Patchscopes (Ghandeharioun et al. 2024, arXiv 2401.06102) on models that were trained on known facts,
written by `python -m circuit_lens.studies --only patchscopes`; nothing here is edited by hand. All items are scored,
nothing is drawn by hand, and each table names its prompts. Controls: descriptions, attributes and two steps by their
best fixed cells stand beside the unpatched prompt and the patch of the embedding; tables by target layer hold the
re-embedded token at the same layer; tables by layer and of lenses a row of the embedding; states moved across models or
written below stand beside the embedding moved likewise, two contexts beside two neutral ones. Shares have 95 % Wilson
intervals and counts, means 95 % bootstrap intervals. The paper's figures are maxima over layers; the best fixed cell is
chosen on one half of the items and scored on the other.

What these figures do not show:

- The target run recomputes its own blocks above the target layer. A right answer from an early target layer says that
  the state leads there, not that the answer stood in it. Target layers at which the re-embedded token fails say more.
- What is gained over the re-embedded token depends on the target layer: into the embedding it is the token written in
  the prompt, which answers whatever the model knows of it; into later layers it mostly cannot. Many cells are right
  about all entities of one token, so which of them is best is a matter of ties. Hence gains are given for each target
  layer, and over the embedding at the target layer that is best for it.
- The models are small, word-level and trained on sentences of these very prompts' kind: rates near 1 say that the
  method reads what is there, not that it would read as well in a language model.
- Embedding and unembedding are separate and share no directions. What a last layer is about to say is no input that a
  prompt can read, so token identity of next tokens and moved answers of a first step fail by the identity map.
  Embedding the answer again repairs the second and hardly the first.
- Only in `capitals-cut` does an entity have several tokenisations. There pieces are cut by rule, each form is as
  frequent as the others, and the pieces before the last are hidden in training, none of which is so in a language
  model. Elsewhere entities of more tokens are other entities.
- The adverse wording of the two-step study was chosen on its items. The source sentence of the entities is that of the
  zoo's own figures; two others were looked at on the same items and did about as well. All other prompts were set
  before anything was scored.
"""
_HEADS: dict[str, str] = {"circuits": _CIRCUITS, "patchscopes": _PATCHSCOPES}


def study(name: str, *, n: int | None = None, say: Say = lambda line: None) -> list[StudyTable]:
    """Run all studies of a bundled model.

    Args:
        name: Name of the model.
        n: Items per table, drawn with a seed; None: all that are held out (operands: 120 swaps per language).
        say: Told every table when it is done.
    """
    rm = zoo.load(name)
    places = Places(rm)
    every = Places(rm, places.corpus, kinds=two_hop_patterns.KINDS, lab=places.lab)
    words = Words(rm, places.corpus, lab=places.lab)
    some = 60 if n is None else n
    makers: list[Maker] = [
        lambda: two_hop.choice_table(rm, n=some, name=name, places=places),
        lambda: two_hop.swap_table(rm, n=n, name=name, places=places),
        lambda: two_hop_patterns.pattern_choice_table(rm, n=min(some, 40), name=name, places=every),
        lambda: two_hop_patterns.ablation_table(rm, n=n, name=name, places=every),
        lambda: two_hop_patterns.injection_table(rm, n=some, name=name, places=every),
        lambda: mediation.mediation_table(rm, n=42 if n is None else n, name=name, places=places),
        lambda: multilingual.language_table(rm, name=name, words=words),
        lambda: multilingual.language_off_table(rm, name=name, words=words),
        lambda: multilingual.operand_table(rm, n=some, name=name, words=words, held=False),
        lambda: multilingual.operand_table(rm, n=120 if n is None else n, name=name, words=words),
        lambda: operations.operation_table(rm, name=name, words=words),
        lambda: operations.overlap_table(rm, name=name, words=words),
    ]
    return _made(makers, say)


def patchscope_study(name: str, *, n: int | None = None, say: Say = lambda line: None) -> list[StudyTable]:
    """Run the patchscope studies of a bundled model.

    Args:
        name: Name of the model; across models, the next one of `DEFAULT_MODELS` reads it. `capitals-cut` has the study
            of cut names alone.
        n: Items per table, drawn with a seed; None: all (500 positions of text, 100 across models).
        say: Told every table when it is done.
    """
    model = zoo.load_model(name)
    if name == CUT:
        return _made([lambda: patch_cuts.cut_tables(model, n=n, name=name)], say)
    others = [other for other in DEFAULT_MODELS if other != name]
    reading = cache(lambda: patch_entities.description_reading(model, n=n))
    attributes = cache(lambda: patch_attributes.read_attributes(model, n=n))
    positions, crossed = (500, 100) if n is None else (n, n)
    makers: list[Maker] = [
        lambda: patch_entities.description_table(reading(), name=name),
        lambda: patch_entities.by_target_table(reading(), name=name),
        lambda: patch_entities.by_layer_table(reading(), name=name),
        lambda: patch_entities.said_table(model, name=name),
        lambda: patch_entities.forms_table(model, name=name),
        lambda: patch_contexts.contexts_table(model, n=n, name=name),
        lambda: patch_attributes.attributes_table(attributes(), name=name),
        lambda: patch_attributes.attribute_targets_table(attributes(), name=name),
        lambda: patch_attributes.probe_table(attributes(), name=name),
        lambda: patch_attributes.attribute_layers_table(attributes(), name=name),
        lambda: patch_hops.hop_table(model, n=n, name=name, notes=patch_hops.BUNDLED),
        lambda: patch_lenses.lens_table(model, n=positions, name=name),
        lambda: patch_lenses.cross_model_tables(
            model, zoo.load_model(others[0]), n=crossed, n_described=n, names=(name, others[0])
        ),
        lambda: patch_through.through_table(model, n=n, name=name),
    ]
    return _made(makers, say)


def _made(makers: Iterable[Maker], say: Say) -> list[StudyTable]:
    tables: list[StudyTable] = []
    for make in makers:
        start = time.process_time()
        made = make()
        for table in [made] if isinstance(made, StudyTable) else made:
            tables.append(table)
            say(f"{table}\n  ({time.process_time() - start:.0f} s)\n")
    return tables


def write_report(
    studies: Mapping[str, Iterable[StudyTable]], path: Path = REPORT, *, part: Part = "circuits", keep: bool = False
) -> None:
    """Write the tables of models as Markdown, in place of the same part of the report; its other part stays.

    Args:
        studies: Tables by model.
        path: The report.
        part: Which of the two it is: a report is one level-one heading with tables for each.
        keep: Leave the tables of models that are not given as they are in this part.
    """
    parts = _parts(path)
    sections = _sections(parts.get(part, "")) if keep else {}
    for name, tables in studies.items():
        sections[name] = "\n".join([f"## {name}\n", *(table.markdown() for table in tables)])
    parts |= {part: "\n".join([_HEADS[part], *sections.values()])}
    whole = "\n".join(parts[name].rstrip("\n") + "\n" for name in _HEADS if name in parts)
    with atomic_path(path) as temporary:
        temporary.write_text(whole, encoding="utf-8")


def _sections(part: str) -> dict[str, str]:
    """Return what a part says of each model, by its name."""
    _, *found = re.split(r"^(?=## )", part, flags=re.MULTILINE)
    return {text.splitlines()[0].removeprefix("## "): text.rstrip("\n") + "\n" for text in found}


def _parts(path: Path) -> dict[str, str]:
    """Return the parts of a report that is there already, by name."""
    if not path.exists():
        return {}
    found: dict[str, list[str]] = {}
    current: list[str] = []
    titles = {head.splitlines()[0]: name for name, head in _HEADS.items()}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line in titles:
            current = found.setdefault(titles[line], [])
        current.append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}
