"""A heat map as HTML: a table without script or anything to load, readable on light and on dark ground.

Each cell holds a radio button, so that one key press reaches the map and arrow keys walk through it; what the cell is
about is told below the map.
"""

from __future__ import annotations

import hashlib
import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuit_lens.graph.card_html import page as page
from circuit_lens.viewer.heatmap_parts import shade
from circuit_lens.viewer.layout import clean_token

if TYPE_CHECKING:
    from circuit_lens.viewer.heatmap import HeatMap, Spot

_STYLE = """
.cl-heat{font:14px/1.4 system-ui,-apple-system,"Segoe UI",sans-serif;text-align:left;position:relative;
 margin:0 0 1.5em;padding-bottom:11.5em;container-type:inline-size}
.cl-heat h3{font-size:1.1em;margin:0 0 .1em;overflow-wrap:anywhere}
.cl-heat .cl-sub{opacity:.7;font-size:.9em;margin:0 0 .8em;overflow-wrap:anywhere}
.cl-heat table{border-collapse:separate;border-spacing:1px;table-layout:fixed;width:100%;margin:0;border:0;
 font-size:.86em}
.cl-heat th,.cl-heat td{padding:0;border:0;background:none;font-weight:400;color:inherit;text-align:center;
 vertical-align:middle}
.cl-heat thead th{height:1.5em;white-space:nowrap;overflow:hidden;text-overflow:clip}
.cl-heat .cl-axis{opacity:.7}
.cl-heat tr{background:none}
.cl-heat tbody th{text-align:right;padding:0 .5em 0 0;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.cl-heat tr.cl-apart th,.cl-heat tr.cl-apart td{border-top:.55em solid transparent;background-clip:padding-box}
.cl-heat td.cl-apart,.cl-heat th.cl-apart{border-left:.55em solid transparent;background-clip:padding-box}
.cl-heat label{display:block;cursor:pointer;height:1.9em;line-height:1.9em;padding:0 .25em;overflow:hidden;
 white-space:nowrap;text-overflow:ellipsis}
.cl-heat .cl-many label{height:1.4em;line-height:1.4em;padding:0}
.cl-heat .cl-none label{background:#8882;color:inherit}
.cl-heat input{position:absolute;opacity:0;width:1px;height:1px;margin:0;pointer-events:none}
.cl-heat td:hover label{box-shadow:inset 0 0 0 1.5px #fff,0 0 0 2px #4a86c8}
.cl-heat input:checked~label{position:relative;z-index:1;box-shadow:inset 0 0 0 1.5px #fff,0 0 0 2px #d55e00}
.cl-heat input:focus-visible~label{box-shadow:inset 0 0 0 2px #fff,0 0 0 4px #d55e00}
.cl-heat .cl-tip{position:absolute;left:0;right:0;bottom:0;height:10.5em;overflow:auto;box-sizing:border-box;
 padding:.5em .8em;border-left:3px solid #4a86c8;font-size:1.1em;text-align:left;opacity:0;pointer-events:none;
 white-space:normal;overflow-wrap:anywhere}
.cl-heat .cl-tip p{margin:.2em 0}
.cl-heat .cl-tip b{font-weight:600}
.cl-heat .cl-tip .cl-of{opacity:.7}
.cl-heat .cl-tip .cl-say{font-size:1.08em}
.cl-heat .cl-tip span.cl-token{display:inline-block;margin:0 1em .1em 0;white-space:pre-wrap}
.cl-heat input:checked~.cl-tip{opacity:1;pointer-events:auto}
.cl-heat tbody:hover input:checked~.cl-tip{opacity:0;pointer-events:none}
.cl-heat tbody td:hover .cl-tip{opacity:1!important}
.cl-heat .cl-scale{display:flex;align-items:center;gap:.6em;font-size:.86em;margin:.7em 0 0;flex-wrap:wrap}
.cl-heat .cl-scale i{display:inline-block;width:11em;height:.8em;border-radius:2px}
.cl-heat .cl-hint{opacity:.7;margin-left:auto}
@container (max-width:42em){.cl-heat .cl-many label span,.cl-heat .cl-few label span{visibility:hidden}
 .cl-heat .cl-two label span{visibility:visible}}
"""
_TOKENS = 6


def fragment(heats: Sequence[HeatMap]) -> str:
    """Return heat maps for a notebook or a page that exists, the style once."""
    return f"<style>{_STYLE}</style>" + "".join(map(_map, heats))


def _map(heat: HeatMap) -> str:
    name = "cl" + hashlib.sha1(f"{heat!r}{heat.title}{heat.rows}".encode(), usedforsecurity=False).hexdigest()[:8]
    n_columns = len(heat.columns)
    kind = "cl-two" if n_columns <= 6 else "cl-few" if n_columns <= 14 else "cl-many"
    title = f"<h3>{_escape(heat.title)}</h3>" if heat.title else ""
    note = f"<p class='cl-sub'>{_escape(heat.note)}</p>" if heat.note else ""
    rows = "".join(_row(heat, i, name) for i in range(len(heat.rows)))
    longest = max(len(label) for label in heat.rows)
    first = f"<col style='width:{min(max(longest, len(heat.row_axis)), 24) * 0.58 + 1:.1f}em'>"
    return (
        f"<div class='cl-heat'>{title}{note}<table class='{kind}'><colgroup>{first}</colgroup>"
        f"<thead>{_head(heat)}</thead><tbody>{rows}</tbody></table>{_scale(heat)}</div>"
    )


def _head(heat: HeatMap) -> str:
    main = len(heat.columns) - heat.apart_columns
    corner = f"<th scope='col'><span class='cl-axis'>{_escape(heat.row_axis)}</span></th>"
    axis = f"<tr><th></th><th class='cl-axis' colspan='{main}'>{_escape(heat.column_axis)}</th></tr>"
    # Labels that many narrow columns have no room for are thinned out; the tip says them all.
    longest = max((len(label) for label in heat.columns[:main]), default=1)
    step = 1 if main <= 14 else max(1, math.ceil(longest * main / 60))
    cells = [
        f"<th scope='col'{_class(['cl-apart'] if j == main else [])} title='{_escape(label)}'>"
        f"{_escape(label) if j >= main or j % step == 0 else ''}</th>"
        for j, label in enumerate(heat.columns)
    ]
    return f"{axis if heat.column_axis else ''}<tr>{corner}{''.join(cells)}</tr>"


def _row(heat: HeatMap, i: int, name: str) -> str:
    main = len(heat.columns) - heat.apart_columns
    new = i == len(heat.rows) - heat.apart_rows
    cells = []
    for j, span in heat.spans(i):
        value, spot = float(heat.values[i, j]), heat.spot(i, j)
        blank = math.isnan(value)
        fill, ink = ("", "") if blank else heat.colour(value)
        style = "" if blank else f" style='background:{fill};color:{ink}'"
        many = f" colspan='{span}'" if span > 1 else ""
        at = f"{name}-{i}-{j}"
        short = "–" if blank else spot.short
        checked = " checked" if (i, j) == (0, 0) else ""
        cells.append(
            f"<td{_class([*(['cl-none'] if blank else []), *(['cl-apart'] if j == main else [])])}{many}>"
            f"<input type='radio' name='{name}' id='{at}'{checked}><label for='{at}'{style}>"
            f"<span>{_escape(short) or '&nbsp;'}</span></label>{_tip(heat, spot, i, j)}</td>"
        )
    label = _escape(heat.rows[i])
    kind = _class(["cl-apart"] if new else [])
    return f"<tr{kind}><th scope='row' title='{label}'>{label}</th>{''.join(cells)}</tr>"


def _tip(heat: HeatMap, spot: Spot, i: int, j: int) -> str:
    title = spot.title or f"{heat.rows[i]}, {heat.columns[j]}"
    parts = [
        f"<p><b>{_escape(title)}</b> &nbsp;<span class='cl-of'>{_escape(heat.value)} "
        f"{_escape(heat.shown(float(heat.values[i, j])))}</span></p>"
    ]
    if spot.text:
        parts.append(f"<p class='cl-say'>“{_escape(spot.text)}”</p>")
    if spot.tokens:
        tokens = "".join(
            f"<span class='cl-token'>{_escape(token)} <span class='cl-of'>{share:.3f}</span></span>"
            for token, share in spot.tokens[:_TOKENS]
        )
        parts.append(f"<p><span class='cl-of'>next token &nbsp;</span>{tokens}</p>")
    parts += [f"<p>{_escape(line)}</p>" for line in spot.lines]
    return f"<div class='cl-tip'>{''.join(parts)}</div>"


def _scale(heat: HeatMap) -> str:
    low, high = heat.range
    stops = ",".join(shade(k / 8, heat.bright)[0] for k in range(9))
    return (
        f"<div class='cl-scale'><span>{_escape(heat.value)}</span><span>{_escape(heat.shown(low))}</span>"
        f"<i style='background:linear-gradient(to right,{stops})'></i><span>{_escape(heat.shown(high))}</span>"
        "<span class='cl-hint'>point at a cell, or walk with the arrow keys</span></div>"
    )


def _class(names: Sequence[str]) -> str:
    return f" class='{' '.join(names)}'" if names else ""


def _escape(text: str) -> str:
    return html.escape(clean_token(text) if text.strip() else repr(text) if text else "", quote=True)
