"""What a value model thinks of each token: one HTML page from the samples.jsonl of a ppo_rlvr.py run, with nothing else needed.

    python demo/show_tokens.py --run runs/demo/ppo --out runs/demo/ppo_tokens.html

Tokens are coloured by value, advantage, reward or KL, from orange (low) to blue (high); the line below them is the value.
"""

import argparse
import json
import string
from pathlib import Path

PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
  p { margin: .2rem 0 .8rem; color: #555; }
  nav { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ddd; z-index: 1; }
  nav label { margin-right: 1rem; white-space: nowrap; }
  nav input[type=range] { width: 16rem; vertical-align: middle; }
  #scale { display: inline-block; width: 9rem; height: .8rem; vertical-align: middle; border: 1px solid #ccc;
           background: linear-gradient(to right, rgb(230, 97, 1), #fff, rgb(33, 102, 172)); }
  article { margin: 1.2rem 0; padding-bottom: .8rem; border-bottom: 1px solid #eee; }
  .head { color: #555; font-size: .85rem; }
  .head b { color: #222; }
  .prompt { white-space: pre-wrap; color: #777; font-family: ui-monospace, monospace; font-size: .85rem; }
  .tokens { font-family: ui-monospace, monospace; white-space: pre-wrap; line-height: 2; word-break: break-word; }
  .tokens span { padding: .2rem 0; border-left: 1px solid #fff; cursor: default; }
  .tokens span:hover, .tokens span.on { outline: 2px solid #222; }
  .graph { display: flex; align-items: stretch; max-width: 100%; height: 70px; font-size: .7rem; color: #777; }
  .graph div { display: flex; flex-direction: column; justify-content: space-between; padding-right: .4rem; }
  svg { flex: 1; min-width: 0; overflow: visible; }
  #tip { position: fixed; display: none; background: #222; color: #fff; padding: .4rem .6rem; font-size: .8rem;
         border-radius: .3rem; pointer-events: none; white-space: pre; font-family: ui-monospace, monospace; z-index: 2; }
</style>
<h1>$title</h1>
<p>Each token of a few sampled completions, with what the value model expected before it (value), how much better than
expected it turned out (advantage, whitened over the batch), its reward (the KL penalty, and at the end the score) and how
much likelier it has become than under the reference (KL, one sample). Point at a token for its numbers.</p>
<nav>
  <span id="kinds"></span> <small id="low"></small> <span id="scale"></span> <small id="high"></small><br>
  <label>step <input type="range" id="step" min="0" value="0"> <b id="number"></b></label>
</nav>
<main></main>
<div id="tip"></div>
<script>
const samples = $samples;
const kinds = {values: "value", advantages: "advantage", rewards: "reward", kls: "KL"};
const steps = [...new Set(samples.map(s => s.step))];
const byId = id => document.getElementById(id), make = (tag, name, text) => {
  const e = document.createElement(tag); e.className = name || ""; if (text !== undefined) e.textContent = text; return e; };
let kind = "values";
const range = {};
for (const k in kinds) {
  const all = samples.flatMap(s => s[k]).sort((a, b) => a - b), at = q => all[Math.floor(q * (all.length - 1))];
  let low = at(.01), high = at(.99);  // a few extremes would make all others pale
  if (k != "values") { high = Math.max(Math.abs(low), Math.abs(high)) || 1; low = -high; }
  range[k] = [low, high == low ? low + 1 : high];
}
function colour(k, x) {
  const [low, high] = range[k], t = Math.max(-1, Math.min(1, 2 * (x - low) / (high - low) - 1));
  return t < 0 ? `rgba(230,97,1,$${-.75 * t})` : `rgba(33,102,172,$${.65 * t})`;
}
function line(s) {
  const [low, high] = range.values, n = s.values.length, svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const x = i => 600 * (i + .5) / n, y = v => 60 - 50 * (Math.max(low, Math.min(high, v)) - low) / (high - low);
  svg.setAttribute("viewBox", "0 0 600 70"); svg.setAttribute("preserveAspectRatio", "none");
  const put = (tag, attributes) => { const e = document.createElementNS(svg.namespaceURI, tag);
    for (const a in attributes) e.setAttribute(a, attributes[a]); svg.append(e); };
  for (const v of [low, high])
    put("line", {x1: 0, x2: 600, y1: y(v), y2: y(v), stroke: "#ddd", "vector-effect": "non-scaling-stroke"});
  put("polyline", {points: s.values.map((v, i) => x(i) + "," + y(v)).join(" "), fill: "none", stroke: "#222",
                   "stroke-width": 1.5, "vector-effect": "non-scaling-stroke"});
  const graph = make("div", "graph"), marks = make("div");
  marks.append(make("span", "", high.toFixed(1)), make("span", "", low.toFixed(1)));
  graph.style.width = 2 * n + 3 + "ch"; graph.append(marks, svg);
  return graph;
}
function draw() {
  const step = steps[byId("step").value], main = document.querySelector("main");
  byId("number").textContent = step; byId("low").textContent = range[kind][0].toFixed(2);
  byId("high").textContent = range[kind][1].toFixed(2); main.replaceChildren();
  for (const s of samples.filter(s => s.step == step)) {
    const article = make("article"), head = make("div", "head"), tokens = make("div", "tokens");
    head.append(make("b", "", s.reason), ` · reward $${+s.reward.toFixed(3)}` + (s.ended ? "" : " · cut off") + ` · $${s.row}`);
    s.tokens.forEach((text, i) => {
      const span = make("span", "", text.replace(/\\n/g, "⏎\\n") || "·");
      span.style.background = colour(kind, s[kind][i]);
      span.onmousemove = event => { const tip = byId("tip");
        tip.textContent = Object.keys(kinds).map(k => kinds[k].padEnd(10) + s[k][i].toFixed(3).padStart(9)).join("\\n") +
          "\\n" + "return".padEnd(10) + s.returns[i].toFixed(3).padStart(9);
        tip.style.display = "block"; tip.style.left = Math.min(event.clientX + 12, innerWidth - 190) + "px";
        tip.style.top = event.clientY + 18 + "px"; };
      span.onmouseleave = () => byId("tip").style.display = "none";
      tokens.append(span);
    });
    article.append(head, make("div", "prompt", s.prompt.trim()), tokens, line(s)); main.append(article);
  }
}
for (const k in kinds) {
  const label = make("label"), input = make("input"); input.type = "radio"; input.name = "kind"; input.checked = k == kind;
  input.onchange = () => { kind = k; draw(); }; label.append(input, " " + kinds[k]); byId("kinds").append(label);
}
byId("step").max = steps.length - 1; byId("step").value = steps.length - 1; byId("step").oninput = draw; draw();
</script>
</html>
""")


def show(run, out, steps=12):
    """Writes the page for at most `steps` steps of a run, evenly spaced, the last among them. Returns their numbers."""
    lines = [json.loads(line) for line in Path(run, "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "values" in line]  # held-out completions are not valued
    every = sorted({line["step"] for line in lines})
    if not every:
        raise SystemExit(f"error: {run}/samples.jsonl holds no values: not of ppo_rlvr.py, or --log_samples 0")
    chosen = sorted({every[round(i * (len(every) - 1) / max(1, steps - 1))] for i in range(steps)} | {every[-1]})
    data = json.dumps([line for line in lines if line["step"] in chosen]).replace("</", "<\\/")
    Path(out).write_text(PAGE.substitute(title="What the value model thinks of each token", samples=data), encoding="utf-8")
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a ppo_rlvr.py run")
    parser.add_argument("--out", required=True, help="HTML file to write")
    parser.add_argument("--steps", type=int, default=12, help="steps shown, evenly spaced")
    args = parser.parse_args()
    print(f"{args.out}: steps {', '.join(map(str, show(args.run, args.out, args.steps)))}")
