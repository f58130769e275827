"use strict";
// Whatever a model wrote reaches the page as text nodes only.
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f"];
const PER_PAGE = 25;
const byId = id => document.getElementById(id);
const DASHES = ["none", "6 3", "2 2.5", "8 2.5 2 2.5"];
const colour = i => COLOURS[i % COLOURS.length], dash = i => DASHES[i % DASHES.length];

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  node.append(...children.map(c => c instanceof Node ? c : document.createTextNode(String(c))));
  return node;
}

// counts in full, anything else to a few digits
const number = (x, digits = 3) => x === null || x === undefined ? "–" : String(Number.isInteger(x) ? x : Number(x.toPrecision(digits)));

function table(columns, rows) {
  const cell = x => typeof x === "number" ? make("td", {class: "number"}, number(x)) : make("td", {}, x ?? "–");
  return make("div", {class: "wide"}, make("table", {},
    make("thead", {}, make("tr", {}, ...columns.map(c => make("th", {scope: "col"}, c)))),
    make("tbody", {}, ...rows.map(r => make("tr", {}, ...r.map(cell))))));
}

// ---- curves: one small chart for each quantity, one line for each run

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(low, high, n = 4) {
  const raw = (high - low)/n, unit = 10**Math.floor(Math.log10(raw));
  const step = unit*[1, 2, 5, 10].find(m => m*unit >= raw);
  const found = [];
  for (let x = Math.ceil(low/step)*step; x <= high + step*1e-9; x += step) found.push(Number(x.toPrecision(12)));
  return found;
}

function chart(title, caption, lines, xLabel = "superbatch") {
  const W = 360, H = 200, left = 46, right = 8, top = 8, bottom = 34;
  const points = lines.flatMap(l => l.points.concat(l.band ?? [])).filter(p => p[1] !== null);
  if (!points.length) return null;
  const range = k => { let a = Infinity, b = -Infinity; for (const p of points) { a = Math.min(a, p[k]); b = Math.max(b, p[k]); } return b - a > 1e-9*Math.max(Math.abs(a), Math.abs(b)) ? [a, b] : [a - 0.5, b + 0.5]; };     // rounding is no range
  const [x0, x1] = range(0), [y0, y1] = range(1);
  const X = x => left + (x - x0)/(x1 - x0)*(W - left - right), Y = y => H - bottom - (y - y0)/(y1 - y0)*(H - top - bottom);
  const box = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title} over ${xLabel}`});
  for (const y of ticks(y0, y1)) {
    box.append(svg("line", {x1: left, x2: W - right, y1: Y(y), y2: Y(y), stroke: "currentColor", "stroke-opacity": 0.12}));
    box.append(svg("text", {x: left - 6, y: Y(y) + 4, "text-anchor": "end"}, number(y, 6)));
  }
  for (const x of ticks(x0, x1)) box.append(svg("text", {x: X(x), y: H - bottom + 15, "text-anchor": "middle"}, number(x, 6)));
  box.append(svg("text", {x: (left + W - right)/2, y: H - 4, "text-anchor": "middle"}, xLabel));
  for (const l of lines) {
    const shown = l.points.filter(p => p[1] !== null);
    if (l.band) box.append(svg("path", {d: "M" + l.band.map(p => `${X(p[0])} ${Y(p[1])}`).join("L") + "Z", fill: l.colour, "fill-opacity": 0.18}));
    if (l.dots) for (const p of shown) box.append(svg("circle", {cx: X(p[0]), cy: Y(p[1]), r: 1.8, fill: l.colour, "fill-opacity": 0.5}));
    else if (shown.length) box.append(svg("path", {d: "M" + shown.map(p => `${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("L"), fill: "none", stroke: l.colour, "stroke-width": 1.8, "stroke-dasharray": l.dash ?? "none"}));
  }
  return make("figure", {}, make("figcaption", {}, title, make("span", {}, caption)), box);
}

const CURVES = [["Reward", "mean score of a superbatch, by the reward model that selects; should rise", "reward/mean"], ["Reward by the second model", "which only watches; should rise with the first", "reward_val/mean"],
  ["Reward on held-out prompts", "by the reward model that selects", "held_out/reward"], ["Second reward on held-out prompts", "where it turns down, the first is being gamed", "held_out/validation"],
  ["KL from the starting policy", "nats per token", "kl"], ["Loss", "of the selected completions, nats per token", "loss"], ["Entropy", "nats per token; near 0 the policy says one thing only", "entropy"],
  ["Length", "tokens", "length/mean"], ["Completions that end", "share; the others were cut off", "ended/share"], ["Different word pairs", "share in a superbatch; falls when all answers begin to look alike", "diversity/distinct"], ["Time", "seconds per superbatch", "time/total"]];

const smooth = (points, weight = 0.9) => points.reduce((done, [x, y]) => { const last = done.length ? done[done.length - 1][1] : y; done.push([x, weight*last + (1 - weight)*y]); return done; }, []);

// Every superbatch is a dot and the line a moving average, for the reward the one that the run recorded; the few evaluations on held-out prompts are joined as they are.
function linesOf(r, key, i) {
  const points = (r.curves[key] ?? []).filter(p => p[1] !== null), style = {colour: colour(i), dash: dash(i)};
  if (key.startsWith("held_out/")) return [{points, ...style}];
  return [{points, ...style, dots: true}, {points: key === "reward/mean" && r.curves["reward/ema"] || smooth(points), ...style}];
}

// Reward on held-out prompts over the root of the KL divergence: what a distance from the start has bought. One reward for all runs: the second where any run has it.
function overKL(r) {
  const watched = data.runs.some(run => run.curves["held_out/validation"]);
  const kl = new Map(r.curves["held_out/kl"] ?? []), reward = r.curves[watched ? "held_out/validation" : "held_out/reward"] ?? [];
  return reward.filter(([step]) => kl.has(step)).map(([step, value]) => [Math.sqrt(Math.max(0, kl.get(step))), value]).sort((a, b) => a[0] - b[0]);
}

function keyLine(i) {
  const box = svg("svg", {viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": "true"});
  box.append(svg("line", {x1: 0, x2: 30, y1: 4, y2: 4, stroke: colour(i), "stroke-width": 2.5, "stroke-dasharray": dash(i)}));
  return box;
}

function drawCurves() {
  if (data.runs.length > 1) byId("key").append(...data.runs.map((r, i) => { return make("span", {}, keyLine(i), r.name); }));
  const add = (title, caption, lines, xLabel) => { const figure = chart(title, caption, lines, xLabel); if (figure) byId("curves").append(figure); };
  for (const [title, caption, key] of CURVES) add(title, caption, data.runs.flatMap((r, i) => linesOf(r, key, i)));
  add("Held-out reward over KL", "by the second reward model where there is one", data.runs.map((r, i) => ({points: overKL(r), colour: colour(i), dash: dash(i)})), "√KL");
}

// ---- tables

function drawRuns() {
  byId("about").textContent = data.about;
  for (const w of data.warnings) byId("warnings").append(make("p", {class: "warning", role: "note"}, w));
  byId("runs").append(table(["run", "method", "policy", "reward model", "superbatches", "state", "reward, moving average", "KL", "seed"],
    data.runs.map(r => [r.name, r.method, r.model, r.reward_model, `${r.done} of ${r.asked}`, r.state, r.reward, r.kl, String(r.seed)])));
  const keys = [...new Set(data.runs.flatMap(r => Object.keys(r.options)))], text = x => x === undefined ? "–" : typeof x === "string" ? x : JSON.stringify(x);
  const differ = keys.filter(k => k !== "output_dir" && new Set(data.runs.map(r => text(r.options[k]))).size > 1);
  if (differ.length) byId("options").append(make("p", {}, "Options in which the runs differ:"), table(["option", ...data.runs.map(r => r.name)], differ.map(k => [k, ...data.runs.map(r => text(r.options[k]))])));
  for (const r of data.runs) byId("options").append(make("p", {class: "quiet"}, `${r.name}: ${r.machine}`), make("details", {}, make("summary", {}, `all options of ${r.name}`), make("pre", {}, r.config)));
}

function drawHeldOut() {
  const some = data.runs.filter(r => r.changes.length || r.pairs.length);
  if (!some.length) byId("changes").append(make("p", {class: "quiet"}, "No run has answers to held-out prompts from before and after training."));
  for (const r of some) {
    byId("changes").append(make("h3", {}, r.name), table(["reward", "source", "prompts", "before", "after", "change", "95 % from", "to"],
      r.changes.map(c => [c.reward, c.source, c.prompts, c.before, c.after, c.change, c.low, c.high])));
    const box = make("details", {}, make("summary", {}, `${r.name}: ${r.pairs.length} prompts, side by side`));
    for (const p of r.pairs) box.append(make("div", {class: "sample"}, make("p", {class: "prompt said"}, `${p.source}: ${p.prompt}`), make("div", {class: "two"},
      make("div", {}, make("p", {class: "quiet"}, `before, ${number(p.reward_before)}`), make("p", {class: "said"}, p.before || "(empty)")),
      make("div", {}, make("p", {class: "quiet"}, `after, ${number(p.reward_after)}`), make("p", {class: "said"}, p.after || "(empty)")))));
    byId("pairs").append(box);
  }
}

function drawGaming() {
  const percent = x => x === null ? "–" : `${number(100*x)} %`;
  data.runs.forEach((r, i) => {
    const at = byId("gaming"), g = r.gaming;
    at.append(make("h3", {}, r.name));
    for (const line of g.lines) at.append(make("p", {}, line));
    const b = g.best_of_k;
    if (b.length) {
      const band = b.map(k => [Math.log2(k.k), k.high]).concat(b.map(k => [Math.log2(k.k), k.low]).reverse());
      at.append(make("div", {class: "charts"}, chart("Best of k", "what it earns above one sample, with its 95 % interval", [{points: b.map(k => [Math.log2(k.k), k.gain]), band: b[0].low === null ? undefined : band, colour: colour(i)}], "log2 k")));
    }
    if (g.phrases.length) at.append(table(["phrase", "of winners", "of the others", "early in the run", "late", "adjusted p of winners against others"], g.phrases.map(p => [p.phrase, percent(p.winners), percent(p.losers), percent(p.early), percent(p.late), p.q])));
  });
}

// ---- samples: all in memory, one page of them in the document

const S = data.samples;
let shown = [], page = 0;

function filtered() {
  const run = byId("run").value, source = byId("source").value, step = byId("step").value.trim(), only = byId("selected").checked, text = byId("text").value.trim().toLowerCase();
  const fits = text ? S.prompts.map(p => p.toLowerCase().includes(text)) : null, found = [];
  for (let i = 0; i < S.completion.length; i++) {
    if (run !== "" && S.run[i] !== Number(run) || source !== "" && S.source[i] !== Number(source) || step !== "" && S.step[i] !== Number(step) || only && !S.selected[i]) continue;
    if (text && !fits[S.prompt[i]] && !S.completion[i].toLowerCase().includes(text)) continue;
    found.push(i);
  }
  const order = byId("order").value, sign = order === "best" ? -1 : 1, score = i => S.score[i] === null ? Infinity : sign*S.score[i];
  return order === "written" ? found : found.sort((a, b) => score(a) - score(b) || a - b);
}

function sample(i) {
  const notes = [S.sources[S.source[i]], `superbatch ${S.step[i]}`, `score ${number(S.score[i])}`, S.selected[i] ? "selected" : "", S.ended[i] ? "" : "cut off"].filter(Boolean);
  if (data.runs.length > 1) notes.unshift(data.runs[S.run[i]].name);
  return make("article", {class: S.selected[i] ? "sample chosen" : "sample"}, make("p", {class: "quiet"}, notes.join(" · ")),
    make("p", {class: "prompt said"}, S.prompts[S.prompt[i]]), make("p", {class: "said"}, S.completion[i] || "(empty)"));
}

function turn(to) {
  const last = Math.max(0, Math.ceil(shown.length/PER_PAGE) - 1);
  page = Math.min(Math.max(0, to), last);
  byId("samples").replaceChildren(...shown.slice(page*PER_PAGE, (page + 1)*PER_PAGE).map(sample));
  byId("page").textContent = `page ${page + 1} of ${last + 1}`;
  byId("back").disabled = page === 0; byId("next").disabled = page === last;
}

function refresh() {
  shown = filtered();
  byId("count").textContent = `${shown.length} of ${S.completion.length} samples`;
  turn(0);
}

function drawSamples() {
  const options = (id, all, names) => byId(id).append(make("option", {value: ""}, all), ...names.map((n, i) => make("option", {value: i}, n)));
  options("run", "all", data.runs.map(r => r.name));
  options("source", "all", S.sources);
  let waiting;
  byId("filters").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); });
  byId("filters").addEventListener("submit", e => e.preventDefault());
  byId("back").addEventListener("click", () => turn(page - 1));
  byId("next").addEventListener("click", () => turn(page + 1));
  refresh();
}

drawRuns(); drawCurves(); drawHeldOut(); drawGaming(); drawSamples();
document.documentElement.dataset.ready = Math.round(performance.now());
document.documentElement.dataset.overflow = Math.max(0, document.documentElement.scrollWidth - document.documentElement.clientWidth);
