"""A page that shows which tokens of a text share an entry of the cache, per layer and key/value head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Merged segments</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
label { margin-right: 1rem; }
#text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
        border: 1px solid #ddd; border-radius: 4px; padding: 1rem; }
#text span { border-radius: 3px; padding: 2px 1px; border-left: 2px solid #0005; }
#text span:hover { outline: 2px solid #222; }
#text i { font-style: normal; color: #0006; }
</style>
</head>
<body>
<h1>Merged segments</h1>
<p>One colour is one entry of the cache: the tokens of a coloured span were merged into it.</p>
<p>
<label>Layer <select id="layer"></select></label>
<label>Key/value head <select id="head"></select></label>
<strong id="ratio"></strong>
</p>
<div id="text"></div>
<script type="application/json" id="data">@DATA@</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const layer = document.getElementById("layer"), head = document.getElementById("head");
const colours = ["#ffd6d6", "#ffe9c7", "#fbf7c0", "#d9f2d0", "#cdeef2", "#d8def9", "#eed8f5"];
const marks = { " ": "\\u00b7", "\\t": "\\u2192\\t", "\\n": "\\u21b5\\n", "\\r": "\\u240d" };

function fill(select, count) {
  for (let i = 0; i < count; i++) select.add(new Option(i, i));
  select.onchange = show;
}

function write(span, token) {
  for (const character of token) {
    const mark = character in marks ? document.createElement("i") : null;
    if (mark) { mark.textContent = marks[character]; span.append(mark); } else span.append(character);
  }
}

function count(number, one, many) {
  return `${number} ${number === 1 ? one : many}`;
}

function show() {
  const merges = data.merges[layer.value][head.value], text = document.getElementById("text");
  const entries = [];
  data.tokens.forEach((token, t) => {
    if (t === 0 || merges[t] === "0") entries.push([]);
    entries[entries.length - 1].push(token);
  });
  text.replaceChildren(...entries.map((tokens, i) => {
    const span = document.createElement("span");
    span.style.background = colours[i % colours.length];
    span.title = `entry ${i}: ${count(tokens.length, "token", "tokens")}`;
    tokens.forEach(token => write(span, token));
    return span;
  }));
  const ratio = (data.tokens.length / entries.length).toFixed(2);
  document.getElementById("ratio").textContent =
    `compression ratio ${ratio}: ${count(data.tokens.length, "token", "tokens")} in ` +
    count(entries.length, "entry", "entries");
}

fill(layer, data.merges.length);
fill(head, data.merges[0].length);
show();
</script>
</body>
</html>
"""


def segments_html(tokens: Sequence[str], alpha: Tensor, out_html: str | Path) -> None:
    """Write a self-contained page (no network): the text with its entries coloured, layer and head to choose.

    Spaces, tabs and line ends are marked; an entry's tooltip gives its index and number of tokens.

    Args:
        tokens: the text's tokens as they read (decoded), T of them.
        alpha: hard decisions `[L, H, T]`, 1 where the token merges into the entry before it; the first token's is
            taken as 0.
        out_html: file to write.

    Raises:
        ValueError: if there is no token, or alpha has another shape or a value that is neither 0 nor 1.
    """
    if not tokens or alpha.dim() != 3 or alpha.shape[-1] != len(tokens) or not alpha.numel():
        raise ValueError(f"alpha must be [L, H, {len(tokens)}] for {len(tokens)} tokens, got {tuple(alpha.shape)}")
    if not ((alpha == 0) | (alpha == 1)).all():
        raise ValueError("alpha must be 0 or 1: round the decisions first")
    merges = ["".join(map(str, row)) for row in alpha.long().flatten(0, 1).tolist()]
    heads = alpha.shape[1]
    data = {"tokens": list(tokens), "merges": [merges[i : i + heads] for i in range(0, len(merges), heads)]}
    # The page writes tokens as text nodes, so only what could end the script element early has to be escaped.
    safe = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    Path(out_html).write_text(_PAGE.replace("@DATA@", safe), encoding="utf-8")
