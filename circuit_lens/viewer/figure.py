"""A graph as a matplotlib figure: tokens from left to right, layers from bottom to top, logits on top."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke
from torch import Tensor

from circuit_lens.graph import AttributionGraph, Node, NodeKind, Path
from circuit_lens.graph.positions import join_tokens
from circuit_lens.viewer.layout import LINE, MARK, Layout, Measure, Placed, lay_out

POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
"""Colours of edges that raise and that lower their target; safe for colour-blind readers (Okabe and Ito 2008)."""
_INK, _GREY, _BAND, _FEATURE = "#1b1b1b", "#6f6f6f", "#f4f5f7", "#4a5568"
_TEXT, _TOKEN, _SMALL = 8.5, 10.0, 7.5
_DPI = 100
_FAMILIES = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
             "Source Han Sans SC", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
             "Hiragino Sans GB", "Arial Unicode MS")  # fmt: skip


class GraphFigure(Figure):
    """A matplotlib figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()


def figure(
    graph: AttributionGraph,
    *,
    paths: int | Sequence[Path] = 1,
    title: str | None = None,
    max_nodes: int = 60,
    max_edges: int = 250,
    width: float = 12.0,
) -> Figure:
    """Draw a graph, best a pruned one; save it with ``figure.savefig("graph.png")`` or ``"graph.svg"``.

    A mark's area grows with the node's influence. A line's colour is the sign of the edge, its width the influence
    that runs along it: its share of the target's inputs times the target's influence. Paths are drawn on top.

    Args:
        graph: the graph.
        paths: paths to emphasise; a number means so many of the strongest from any token to the strongest logit.
        title: text above; the prompt by default.
        max_nodes: of features, errors and other inner nodes only the most influential so many are drawn (nodes of
            emphasised paths always).
        max_edges: only so many edges are drawn, those that carry most.
        width: inches; grows if the texts do not fit.

    Returns:
        A figure of its own: no state of pyplot is read or changed.
    """
    chosen = _strongest(graph, paths) if isinstance(paths, int) else list(paths)
    convention = "paper" if graph.pruning is None else graph.pruning.convention
    weight = graph.influence(convention=convention)
    weight[graph.nodes.n_sources :] += graph.logit_weight.double()
    nodes = _shown(graph, weight, chosen, max_nodes)
    picture = GraphFigure(figsize=(width, 4.0), dpi=_DPI)
    layout = lay_out(graph, nodes, width=width, measure=_measure(_TEXT), measure_token=_measure(_TOKEN))
    picture.set_size_inches(layout.width, layout.height)
    FigureCanvasAgg(picture)
    axes = picture.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, layout.width), ylim=(0, layout.height))
    axes.axis("off")
    _draw_rows(axes, graph, layout)
    on_path = {node.id for path in _ids(graph, chosen) for node in path}
    _draw_edges(axes, graph, layout, weight, _ids(graph, chosen), max_edges)
    _draw_nodes(axes, graph, layout, weight, on_path)
    prompt = join_tokens(graph.token_strings) if graph.prompt is None else graph.prompt
    heading = _printable((prompt if title is None else title).replace("\n", "⏎"))
    limit = int(layout.width * 9.5)
    heading = heading if len(heading) <= limit else heading[: limit - 1] + "…"
    axes.text(0.2, layout.height - 0.27, heading, size=11.5, weight="bold", color=_INK, va="center",
              family=_families(), parse_math=False)  # fmt: skip
    _draw_legend(axes, layout, bool(chosen), any(node.kind is NodeKind.ERROR for node in nodes))
    return picture


def _strongest(graph: AttributionGraph, k: int) -> list[Path]:
    """Return the k strongest paths from any token to the strongest logit."""
    tokens = graph.nodes.slice_of(NodeKind.TOKEN)
    if k < 1 or tokens.stop == tokens.start:
        return []
    return list(graph.paths(range(tokens.start, tokens.stop), graph.best_logit, k=k))


def _ids(graph: AttributionGraph, paths: list[Path]) -> list[list[Node]]:
    """Return the nodes of paths as nodes of this graph (they may come from the graph it was pruned from)."""
    return [[graph.node(node) for node in path.nodes] for path in paths]


def _shown(graph: AttributionGraph, weight: Float[Tensor, "n"], paths: list[Path], max_nodes: int) -> list[Node]:
    """Return the nodes to draw: tokens, logits, the most influential others, and all on the paths."""
    kind = graph.nodes.kind
    always = (kind == int(NodeKind.TOKEN)) | (kind == int(NodeKind.LOGIT))
    others = (~always & (weight > 0)).nonzero().flatten()
    others = others[torch.sort(weight[others], descending=True, stable=True).indices][:max_nodes]
    keep = set(others.tolist()) | set(always.nonzero().flatten().tolist())
    keep |= {node.id for path in _ids(graph, paths) for node in path}
    order = sorted(keep, key=lambda i: -float(weight[i]))
    return [graph.node(i) for i in order]


@functools.cache
def _families() -> list[str]:
    """Return the fonts that this machine has, for Latin and for Chinese, Japanese and Korean letters."""
    here = {entry.name for entry in font_manager.fontManager.ttflist}
    return [name for name in _FAMILIES if name in here] or ["sans-serif"]


@functools.cache
def _letters() -> frozenset[int]:
    """Return all characters that the fonts can draw."""
    found: set[int] = set()
    for name in _families():
        path = font_manager.findfont(font_manager.FontProperties(family=name))
        found |= set(font_manager.get_font(path).get_charmap())
    return frozenset(found)


def _printable(text: str) -> str:
    """Return the text with a box in the place of every character that no font here can draw."""
    return "".join(c if c == "\n" or ord(c) in _letters() else "□" for c in text)


def _measure(size: float) -> Measure:
    """Return a function that measures a line of text of a size in points, in inches."""
    renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()
    font = font_manager.FontProperties(family=_families(), size=size)
    return lambda text: renderer.get_text_width_height_descent(_printable(text), font, False)[0] / _DPI


def _draw_rows(axes: Axes, graph: AttributionGraph, layout: Layout) -> None:
    """Draw a band per layer with its name, and the tokens with their positions."""
    for layer, (bottom, top) in layout.bands.items():
        if layer >= 0:
            axes.add_patch(Rectangle((0.12, bottom), layout.width - 0.24, top - bottom, color=_BAND, lw=0, zorder=0))
        name = {-1: "", graph.n_layers: "logits"}.get(layer, f"L{layer}")
        axes.text(0.17, (bottom + top) / 2, name, size=_TEXT, color=_GREY, va="center", zorder=5)
    for item in layout.placed.values():
        if item.node.kind is not NodeKind.TOKEN:
            continue
        column = layout.columns[item.node.pos]
        high, wide = LINE * len(item.lines) + 0.16, column.width - 0.08
        axes.add_patch(FancyBboxPatch((item.x - wide / 2, item.y - high / 2), wide, high, fc="white", ec="#b9bec7",
                                      boxstyle="round,pad=0,rounding_size=0.05", lw=0.8, zorder=4))  # fmt: skip
        axes.text(item.x, item.y, _printable("\n".join(item.lines)), size=_TOKEN, color=_INK, ha="center",
                  va="center", zorder=6, family=_families(), parse_math=False, linespacing=1.0)  # fmt: skip
        axes.text(item.x, item.y - high / 2 - 0.08, str(item.node.pos), size=_SMALL, color=_GREY, ha="center",
                  va="center", zorder=6)  # fmt: skip


def _draw_nodes(
    axes: Axes, graph: AttributionGraph, layout: Layout, weight: Float[Tensor, "n"], on_path: set[int]
) -> None:
    """Draw the mark and the text of every node that is no token."""
    inner = weight[: graph.nodes.n_sources].clone()
    inner[graph.nodes.slice_of(NodeKind.TOKEN)] = 0.0
    largest = max(float(inner.max()) if len(inner) else 0.0, 1e-300)
    for item in layout.placed.values():
        node, bold = item.node, item.node.id in on_path
        if node.kind is NodeKind.TOKEN:
            continue
        share = min(float(weight[node.id]) / largest, 1.0)
        mark = {NodeKind.FEATURE: "o", NodeKind.LOGIT: "s", NodeKind.ERROR: "D"}.get(node.kind, "v")
        fill = {NodeKind.FEATURE: _FEATURE, NodeKind.LOGIT: _INK, NodeKind.ERROR: "white"}.get(node.kind, "#b9bec7")
        size = 7.0**2 if node.kind is NodeKind.LOGIT else 3.0**2 + (10.5**2 - 3.0**2) * share
        if node.kind is NodeKind.ERROR:
            size *= 0.6
        axes.scatter([item.x], [item.y], s=size, marker=mark, c=fill, edgecolors=_INK if bold else _GREY,
                     linewidths=1.9 if bold else 0.8, zorder=8)  # fmt: skip
        colour = _GREY if node.kind in (NodeKind.ERROR, NodeKind.BIAS, NodeKind.REST) else _INK
        text = axes.text(item.x + 0.7 * MARK, item.y, _printable("\n".join(item.lines)), size=_TEXT, color=colour,
                         va="center", zorder=9, family=_families(), parse_math=False, linespacing=1.15,
                         weight="bold" if bold else "normal")  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2.2, foreground="#fbfbfc")])


def _draw_edges(
    axes: Axes,
    graph: AttributionGraph,
    layout: Layout,
    weight: Float[Tensor, "n"],
    paths: list[list[Node]],
    max_edges: int,
) -> None:
    """Draw the edges that carry most influence, and those of the paths on top of them."""
    nodes = graph.nodes
    here = sorted(layout.placed)
    targets = [i for i in here if nodes.row_of(i) is not None]
    sources = torch.tensor([i for i in here if i < nodes.n_sources], dtype=torch.long)
    rows = torch.tensor([nodes.row_of(i) for i in targets], dtype=torch.long)
    block = graph.adjacency[rows][:, sources].double()
    totals = graph.row_totals(convention="conserving")[rows]
    carried = block.abs() / torch.where(totals > 0, totals, 1.0)[:, None] * weight[targets][:, None]
    largest = max(float(carried.max()) if carried.numel() else 0.0, 1e-300)
    emphasised = {(one.id, two.id) for path in paths for one, two in pairwise(path)}
    order = torch.sort(carried.flatten(), descending=True, stable=True).indices
    drawn = [i for i in order.tolist()[:max_edges] if float(block.flatten()[i]) != 0.0]
    for i in reversed(drawn):
        target, source = targets[i // len(sources)], int(sources[i % len(sources)])
        share = (float(carried.flatten()[i]) / largest) ** 0.5
        if (source, target) not in emphasised:
            colour = POSITIVE if float(block.flatten()[i]) > 0 else NEGATIVE
            _curve(axes, layout.placed[source], layout.placed[target], colour, 0.35 + 3.0 * share,
                   0.16 + 0.42 * share, 1.0 + share)  # fmt: skip
    for source, target in emphasised:
        value = float(graph.adjacency[nodes.row_of(target), source])
        ends = layout.placed[source], layout.placed[target]
        _curve(axes, *ends, "white", 6.0, 1.0, 6.0)
        _curve(axes, *ends, POSITIVE if value > 0 else NEGATIVE, 3.6, 1.0, 6.5)


def _curve(axes: Axes, source: Placed, target: Placed, colour: str, line: float, alpha: float, order: float) -> None:
    """Draw one edge as a curve that leaves its source upwards and reaches its target from below."""
    start = source.y + (LINE * len(source.lines) / 2 + 0.08 if source.node.kind is NodeKind.TOKEN else 0.0)
    bend = max(0.45 * (target.y - start), 0.3)
    points = [(source.x, start), (source.x, start + bend), (target.x, target.y - bend), (target.x, target.y)]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(PathPatch(curve, fc="none", ec=colour, lw=line, alpha=alpha, zorder=order, capstyle="butt"))


def _draw_legend(axes: Axes, layout: Layout, with_path: bool, with_error: bool) -> None:
    """Draw the line at the bottom that says what colours, widths and marks mean."""
    entries = [
        Line2D([], [], color=POSITIVE, lw=2.2, label="raises its target"),
        Line2D([], [], color=NEGATIVE, lw=2.2, label="lowers it (width: influence carried)"),
        Line2D([], [], color=_FEATURE, marker="o", lw=0, ms=7, label="feature (area: influence)"),
    ]
    if with_error:
        entries.append(Line2D([], [], mfc="white", mec=_GREY, marker="D", lw=0, ms=5, label="error"))
    if with_path:
        entries.append(Line2D([], [], color=_INK, mfc=_FEATURE, mec=_INK, mew=1.9, marker="o", ms=7, lw=3.6,
                              label="emphasised path"))  # fmt: skip
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0.15 / layout.width, 0.04 / layout.height),
                ncols=len(entries), frameon=False, fontsize=_TEXT, labelcolor=_GREY, handlelength=1.6,
                columnspacing=1.6, borderpad=0.2)  # fmt: skip
