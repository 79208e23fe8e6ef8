"""A Trace as HTML: the text with one channel's colours, a legend, and every value of a token on hover or focus.

The spans carry class names only ("n4" is the fifth colour for numbers, "c1" the second category), so that the
script switches channels by swapping classes, and a reader without scripts still sees the first channel.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenworks.core.trace import Channel, Trace

# Nine steps of cividis: even in lightness, and the same to readers who cannot tell red from green.
_STEPS = ["00224e", "1a386f", "434e6c", "61656f", "7d7c78", "9b9476", "bcae6c", "dec958", "fee838"]
_LIGHT_FROM = 4  # from this step on, black text reads better than white
# Okabe and Ito's colours. Underlines repeat after five, colours after eight: forty pairs before one recurs.
_CATEGORIES = ["56b4e9", "e69f00", "009e73", "cc79a7", "f0e442", "0072b2", "d55e00", "999999"]
_UNDERLINES = ("solid", "dashed", "dotted", "double", "wavy")
_PAIRS = len(_CATEGORIES) * len(_UNDERLINES)


def _rules() -> Iterable[str]:
    for step, colour in enumerate(_STEPS):
        yield f".tw-trace .n{step}{{background:#{colour};color:{'#000' if step >= _LIGHT_FROM else '#fff'}}}"
    for place in range(_PAIRS):
        colour, line = _CATEGORIES[place % len(_CATEGORIES)], _UNDERLINES[place % len(_UNDERLINES)]
        yield (
            f".tw-trace .c{place}{{background:#{colour}59;text-decoration:underline {line} 2px #{colour};"
            "text-underline-offset:.22em;text-decoration-skip-ink:none}"
        )


# --low underlines tokens with a number on dark grounds, where the darkest step would look like no value at all.
TRACE_CSS = """
.tw-trace{--ink:#1b1f24;--soft:#57606a;--ground:#fff;--raised:#f6f8fa;--line:#d0d7de;--low:#0000;position:relative;
 box-sizing:border-box;max-width:100%;margin:.75rem 0;padding:.75rem;border:1px solid var(--line);
 border-radius:8px;background:var(--ground);color:var(--ink);font:14px/1.5 system-ui,sans-serif}
@media (prefers-color-scheme:dark){.tw-trace{--ink:#e6edf3;--soft:#9da7b3;--ground:#0d1117;--raised:#1c2128;
 --line:#3d444d;--low:#fff6}}
.tw-trace *{box-sizing:border-box}
.tw-trace [hidden]{display:none!important}
.tw-trace .tw-channels{display:flex;flex-wrap:wrap;gap:.35rem;margin-bottom:.5rem}
.tw-trace button{font:inherit;font-size:13px;padding:.15rem .6rem;border:1px solid var(--line);
 border-radius:1rem;background:var(--raised);color:var(--ink);cursor:pointer}
.tw-trace button[aria-pressed=true]{background:var(--ink);color:var(--ground);border-color:var(--ink)}
.tw-trace :focus-visible{outline:2px solid #0072b2;outline-offset:1px}
.tw-trace .tw-legend{display:flex;flex-wrap:wrap;align-items:center;gap:.25rem .6rem;margin-bottom:.6rem;
 font-size:13px}
.tw-trace .tw-legend p{margin:0;color:var(--soft);overflow-wrap:anywhere}
.tw-trace .tw-legend span{overflow-wrap:anywhere}
.tw-trace .tw-bar{display:inline-flex;border:1px solid var(--line)}
.tw-trace .tw-bar span{width:1rem;height:.8rem}
.tw-trace .tw-swatch{padding:0 .35rem .1rem;border-radius:3px}
.tw-trace .tw-strip{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;
 font:14px/1.9 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.tw-trace .tw-strip>span{padding:.1em 0;border-radius:2px;box-shadow:inset 1px 0 var(--ground);cursor:default;
 -webkit-box-decoration-break:clone;box-decoration-break:clone}
.tw-trace .tw-strip>[class^=n]{box-shadow:inset 1px 0 var(--ground),inset 0 -1px var(--low)}
.tw-trace .tw-strip>span:hover{outline:2px solid var(--ink);outline-offset:-1px}
.tw-trace i{font-style:normal;opacity:.55;-webkit-user-select:none;user-select:none}
.tw-trace .tw-tip{position:absolute;z-index:9;max-width:min(22rem,100%);padding:.5rem .7rem;border-radius:6px;
 border:1px solid var(--line);background:var(--raised);color:var(--ink);font-size:13px;pointer-events:none;
 box-shadow:0 4px 14px #0004;overflow-wrap:anywhere}
.tw-trace .tw-tip table{border-collapse:collapse;margin:.2rem 0;font-size:13px;width:auto}
.tw-trace .tw-tip th,.tw-trace .tw-tip td{border:0;padding:0 .8rem 0 0;text-align:left;font-weight:400;
 background:none;color:inherit}
.tw-trace .tw-tip th{color:var(--soft)}
.tw-trace .tw-tip small{color:var(--soft);font-size:12px}
@media print{.tw-trace{-webkit-print-color-adjust:exact;print-color-adjust:exact}
 .tw-trace .tw-channels,.tw-trace .tw-tip{display:none}}
""" + "\n".join(_rules())

# Text from the Trace reaches the document only as textContent, never as markup.
TRACE_JS = """
document.querySelectorAll('.tw-trace:not([data-live])').forEach(root => {
  root.dataset.live = '';
  const find = name => root.querySelector('.tw-' + name);
  const data = JSON.parse(find('data').textContent);
  const strip = find('strip'), tip = find('tip'), choice = find('channels');
  const spans = [...strip.children], buttons = [...choice.children];
  const legends = [...root.querySelectorAll('.tw-legend')];
  let chosen = 0;
  const make = (tag, text, parent) => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text;
    return made;
  };
  const choose = number => {
    chosen = number;
    spans.forEach((span, at) => { span.className = data.channels[number].classes[at]; });
    buttons.forEach((button, at) => button.setAttribute('aria-pressed', at === number));
    legends.forEach((legend, at) => { legend.hidden = at !== number; });
  };
  const hide = () => { tip.hidden = true; };
  const show = event => {
    const span = event.target.closest('.tw-strip > span'), at = spans.indexOf(span);
    if (at < 0) return hide();
    tip.replaceChildren();
    make('strong', span.textContent.replace(/\\n/g, '').replace(/ /g, '\\u2423'), tip);
    make('small', ' token ' + at + (data.ids ? ', id ' + data.ids[at] : ''), tip);
    const table = make('table', '', tip);
    data.channels.forEach(channel => {
      const row = make('tr', '', table);
      make('th', channel.name, row).scope = 'row';
      make('td', channel.shown[at], row);
    });
    if (data.channels.length) make('small', data.channels[chosen].about, tip);
    tip.hidden = false;
    span.setAttribute('aria-describedby', tip.id);
    const box = root.getBoundingClientRect(), on = span.getClientRects()[0] || box;
    const below = on.bottom - box.top + 6, above = on.top - box.top - tip.offsetHeight - 6;
    const fits = on.bottom + tip.offsetHeight + 12 < innerHeight || on.top < tip.offsetHeight + 12;
    tip.style.top = (fits ? below : above) + 'px';
    tip.style.left = Math.max(0, Math.min(on.left - box.left, root.clientWidth - tip.offsetWidth)) + 'px';
  };
  // One stop for the Tab key, arrows within: a page of two thousand stops cannot be left by keyboard.
  const move = event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], at = spans.indexOf(document.activeElement);
    if (event.key === 'Escape') hide();
    if (!step || at < 0 || !spans[at + step]) return;
    event.preventDefault();
    spans[at].tabIndex = -1;
    spans[at + step].tabIndex = 0;
    spans[at + step].focus();
  };
  strip.addEventListener('mouseover', show);
  strip.addEventListener('focusin', show);
  strip.addEventListener('mouseleave', hide);
  strip.addEventListener('focusout', hide);
  strip.addEventListener('keydown', move);
  buttons.forEach((button, at) => button.addEventListener('click', () => choose(at)));
  choice.hidden = buttons.length < 2;
});
"""

POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
"""For the head of a page: whatever slips into it, the browser fetches nothing."""

_ids = itertools.count(1)

# Characters that would hide text or turn it around on the screen, which a record must not allow.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def escape(text: str) -> str:
    """Text as HTML, for content and quoted attributes; lone surrogates, which no file can hold, become "?"."""
    return html.escape(text.encode("utf-8", "replace").decode())


def trace_fragment(trace: Trace, style: bool = True, script: bool = True) -> str:
    """The Trace as an HTML element, for a notebook or a larger page.

    Args:
        style, script: include TRACE_CSS and TRACE_JS; a page with many Traces includes them once itself, the
            script after the last Trace.
    """
    name = f"tw-trace-{next(_ids)}"
    channels = list(trace.channels.items())
    classes = [_classes(channel) for _, channel in channels]
    first = classes[0] if classes else [""] * len(trace)
    spans = "".join(
        f'<span class="{colour}" tabindex="{-1 if place else 0}">{_visible(token)}</span>'
        for place, (token, colour) in enumerate(zip(trace.tokens, first, strict=True))
    )
    buttons = "".join(
        f'<button type="button" aria-pressed="{str(not place).lower()}">{escape(channel_name)}</button>'
        for place, (channel_name, _) in enumerate(channels)
    )
    legends = "".join(
        f'<div class="tw-legend"{" hidden" if place else ""}>{_legend(*named)}</div>'
        for place, named in enumerate(channels)
    )
    data = {
        "ids": trace.token_ids,
        "channels": [
            {
                "name": channel_name,
                "about": channel.description,
                "shown": [_shown(value) for value in channel.values],
                "classes": colours,
            }
            for (channel_name, channel), colours in zip(channels, classes, strict=True)
        ],
    }
    # "<" inside a script element could end it; as an escape it cannot, and JSON reads it the same.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        (f"<style>{TRACE_CSS}</style>" if style else "")
        + f'<div class="tw-trace" id="{name}">'
        + f'<div class="tw-channels" role="group" aria-label="Channel shown" hidden>{buttons}</div>{legends}'
        + f'<div class="tw-strip" dir="auto">{spans}</div>'
        + f'<div class="tw-tip" id="{name}-tip" role="tooltip" hidden></div>'
        + f'<script type="application/json" class="tw-data">{embedded}</script></div>'
        + (f"<script>{TRACE_JS}</script>" if script else "")
    )


def trace_page(trace: Trace, title: str) -> str:
    """The Trace as a self-contained HTML page."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{POLICY}
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title>
<style>
:root{{color-scheme:light dark}}
body{{max-width:60rem;margin:0 auto;padding:1rem;font:16px/1.5 system-ui,sans-serif}}
h1{{font-size:1.4rem;overflow-wrap:anywhere}}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{trace_fragment(trace)}
</body>
</html>
"""


def _visible(token: str) -> str:
    """A token as HTML that shows newlines, control characters and empty tokens, faintly and not to be copied."""
    if not token:
        return "<i>\u25cc</i>"
    return _UNSEEN.sub(_picture, escape(token)).replace("\n", "<i>\u23ce</i>\n")


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"<i>{chr(0x2400 + code)}</i>" if code < 0x20 else f"<i>[U+{code:04X}]</i>"


def _shown(value: Any) -> str:
    return "\u2013" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _classes(channel: Channel) -> list[str]:
    """The class that colours each token; none where there is no value."""
    if channel.kind == "category":
        found = _categories(channel)
        return ["" if value is None else f"c{found[value] % _PAIRS}" for value in channel.values]
    low, high = channel.low or 0.0, channel.high or 0.0
    span = high - low if high > low and math.isfinite(high - low) else 0.0
    places = [None if v is None else int((v - low) / span * len(_STEPS)) if span else 0 for v in channel.values]
    return ["" if place is None else f"n{min(max(place, 0), len(_STEPS) - 1)}" for place in places]


def _categories(channel: Channel) -> dict[str, int]:
    """Number of each category, in order of first appearance."""
    return {name: place for place, name in enumerate(dict.fromkeys(v for v in channel.values if v is not None))}


def _legend(name: str, channel: Channel) -> str:
    if all(value is None for value in channel.values):
        key = "<span>no values</span>"
    elif channel.kind == "category":
        key = "".join(
            f'<span class="tw-swatch c{place % _PAIRS}">{escape(category)}</span>'
            for category, place in _categories(channel).items()
        )
    else:
        bar = "".join(f'<span class="n{step}"></span>' for step in range(len(_STEPS)))
        key = f'<span>{_shown(channel.low)} <span class="tw-bar">{bar}</span> {_shown(channel.high)}</span>'
    about = f"<p>{escape(channel.description)}</p>" if channel.description else ""
    return f"<strong>{escape(name)}</strong>{key}{about}"
