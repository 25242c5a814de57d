"""An evaluation as text and as HTML."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from circuit_lens.graph.card_html import part
from circuit_lens.graph.card_tables import Cell, Table

if TYPE_CHECKING:
    from circuit_lens.evaluation.figures import Evaluation, OutputFigures, Quality, RunFigures
    from circuit_lens.evaluation.sums import Estimate

WIDTH = 100


def text_form(evaluation: Evaluation) -> str:
    """Return the evaluation for a terminal."""
    lines = [*textwrap.wrap(_title(evaluation), WIDTH), *textwrap.wrap(_subtitle(evaluation), WIDTH)]
    for table in _tables(evaluation):
        rows = [table.columns, *([cell.text for cell in row] for row in table.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
        lines += ["", *textwrap.wrap(table.title, WIDTH)]
        for row in rows:
            rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join(["", row[0].ljust(widths[0]), *rest]).rstrip())
        lines += textwrap.wrap(table.note, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def html_form(evaluation: Evaluation) -> str:
    """Return the evaluation for a notebook."""
    return part(_title(evaluation), _subtitle(evaluation), [_sentence(evaluation)], _tables(evaluation))


def _title(e: Evaluation) -> str:
    n = len(e.outputs)
    return f"Evaluation of {e.model} with dictionaries for {n} output{'' if n == 1 else 's'}"


def _subtitle(e: Evaluation) -> str:
    rows = "1 row" if e.n_rows == 1 else f"{e.n_rows:,} rows"
    parts = [f"{e.n_tokens:,} tokens in {rows}, {e.n_predictions:,} predictions"]
    parts += [str(e.settings["counted"])] if "counted" in e.settings else []
    return "; ".join([*parts, "losses in nats ± standard errors over rows"])


def _sentence(e: Evaluation) -> str:
    said = f"The model's loss is {e.loss}; replacing every output adds {e.replaced.added:.4f}"
    shares = [_recovered(e.replaced.recovered_zero, e.zero), _recovered(e.replaced.recovered_mean, e.mean)]
    if "–" not in shares:
        said += f", which recovers {shares[0]} of what zero ablation costs, and {shares[1]} of mean ablation"
    return f"{said}."


def _tables(e: Evaluation) -> list[Table]:
    found = [_reconstruction(e), _losses(e)]
    return [*found, _beside(e)] if e.baselines else found


def _reconstruction(e: Evaluation) -> Table:
    columns = ("writes", "reads", "features", "L0", "dead", "explained", "MSE", "cosine")
    rows = []
    for o in e.outputs:
        sizes = (str(o.n_features or "–"), _number(o.l0, 1), _percent(o.dead))
        figures = (_explained(o.own), Cell(_short(o.mse)), Cell(_number(o.cosine)))
        rows.append((Cell(o.hook), Cell(_reads(o)), *map(Cell, sizes), *figures))
    title = "Reconstruction of the model's own activations"
    note = f"explained: share of variance; MSE: summed over the width; dead: on none of {e.n_tokens:,} tokens"
    return Table(title, columns, tuple(rows), ("",) * len(rows), note)


def _losses(e: Evaluation) -> Table:
    columns = ("replaced", "loss", "added", "KL", "recovered (zero)", "(mean)")
    alone = e.outputs if len(e.outputs) > 1 else ()
    rows = [_loss_row(o.hook, o.alone, o.zero, o.mean) for o in alone if o.alone is not None]
    rows.append(_loss_row("all", e.replaced, e.zero, e.mean))
    title = f"Loss with dictionaries in place of outputs; {e.loss} without"
    costs = f"all: {e.zero.added:+.3f} and {e.mean.added:+.3f}"
    note = f"recovered: of what ablating the same by zeros, or by means, costs ({costs}); – where that costs nothing"
    return Table(title, columns, tuple(rows), ("",) * (len(rows) - 1) + ("all",), note)


def _loss_row(name: str, run: RunFigures, zero: RunFigures | None, mean: RunFigures | None) -> tuple[Cell, ...]:
    shares = [_recovered(run.recovered_zero, zero), _recovered(run.recovered_mean, mean)]
    return Cell(name), Cell(f"{run.loss:.3f}"), Cell(f"{run.added:+.4f}"), Cell(f"{run.kl:.4f}"), *map(Cell, shares)


def _beside(e: Evaluation) -> Table:
    kinds = list(e.baselines)
    columns = ("", "explained", *kinds, "added loss", *kinds)
    several = len(e.outputs) > 1
    whole = [_added(run) for run in (e.replaced, *(e.baselines[kind] for kind in kinds))]
    rows = []
    for o in e.outputs:
        of = [o.own, *(o.baselines[kind] for kind in kinds)]
        rows.append((Cell(o.hook), *map(_explained, of), *([_added(q.alone) for q in of] if several else whole)))
    if several:
        rows.append((Cell("all"), *(Cell("") for _ in whole), *whole))
    title = "Beside dictionaries of the same size and L0 that nobody trained"
    note = "random: encoder and decoder; untrained: a random encoder, and its transpose as decoder"
    return Table(title, columns, tuple(rows), ("",) * len(e.outputs) + ("all",) * several, note)


def _explained(quality: Quality) -> Cell:
    value = quality.explained_variance
    return Cell(_number(value), min(max(value, 0.0), 1.0) if math.isfinite(value) else None)


def _added(run: RunFigures | None) -> Cell:
    return Cell("–" if run is None else f"{run.added.value:+.3f}")


def _reads(o: OutputFigures) -> str:
    if len(o.reads) != 1:
        return f"{len(o.reads)} layers"
    read = "".join(o.reads)
    return "itself" if read == o.hook else read.removeprefix(f"blocks.{o.layer}.")


def _recovered(share: Estimate, ablation: RunFigures | None) -> str:
    if ablation is None or not ablation.added.value > 0 or not math.isfinite(share.value):
        return "–"
    return f"{share.value:.1%}"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "–"
