// Curves: each method a colour, a dash and a mark of its own; seeds become a mean and a band of one standard deviation.

const COLOURS = ["#2f74c0", "#d2601a", "#2a9d74", "#9a57b8", "#b0871a", "#39a0c4", "#c2416b", "#7a8290"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const MARKS = ["circle", "square", "diamond", "triangle-up", "x", "star"];
const AXES = [["iteration", "iterations"], ["tokens/total", "sampled tokens"], ["seconds", "seconds of training"]];
const SMOOTH = [["1", "none"], ["5", "5"], ["15", "15"]];
const look = (method) => ({colour: COLOURS[method % 8], dash: DASHES[method % 6], mark: MARKS[method % 6]});

// Places and values of a metric where it has any; a running mean over `smooth` iterations.
function series(run, metric, axis, smooth) {
  const xs = [], ys = [], places = run.metrics[axis] || [], values = run.metrics[metric] || [];
  values.forEach((value, row) => {
    if (value !== null && places[row] !== null && places[row] !== undefined) xs.push(places[row]), ys.push(value);
  });
  if (smooth < 2 || metric.startsWith("eval/")) return {xs, ys};
  const half = Math.floor(smooth / 2);
  return {xs, ys: ys.map((_, at) => {
    const near = ys.slice(Math.max(0, at - half), at + half + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  })};
}

function at(line, x) {
  const {xs, ys} = line;
  let high = xs.findIndex((place) => place >= x);
  if (high < 0 || !xs.length || x < xs[0]) return null;
  if (xs[high] === x || high === 0) return ys[high];
  const share = (x - xs[high - 1]) / (xs[high] - xs[high - 1]);
  return ys[high - 1] + share * (ys[high] - ys[high - 1]);
}

// The mean over seeds and its spread, on the places of one seed or on a grid that all seeds reach.
function band(lines, axis) {
  const full = lines.filter((line) => line.xs.length);
  if (!full.length) return null;
  let grid = [...new Set(full.flatMap((line) => line.xs))].sort((a, b) => a - b);
  if (full.length > 1 && axis !== "iteration") {
    const low = Math.max(...full.map((line) => line.xs[0])), high = Math.min(...full.map((line) => line.xs[line.xs.length - 1]));
    const count = Math.max(2, Math.min(160, Math.max(...full.map((line) => line.xs.length))));
    grid = Array.from({length: count}, (_, number) => low + ((high - low) * number) / (count - 1));
  }
  const made = {x: [], mean: [], spread: [], seeds: []};
  for (const x of grid) {
    const values = full.map((line) => at(line, x)).filter((value) => value !== null);
    if (!values.length) continue;
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    made.x.push(x), made.mean.push(mean), made.seeds.push(values.length);
    made.spread.push(values.length > 1 ? Math.sqrt(squares / (values.length - 1)) : 0);
  }
  return made;
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const tint = (colour, alpha) => `rgba(${[1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16)).join(",")},${alpha})`;

function traces(panel) {
  const made = [], factor = panel.unit === "%" ? 100 : 1;
  report.methods.forEach((label, method) => {
    if (state.hidden.has(method)) return;
    const runs = report.runs.filter((run) => run.method === method), {colour, dash, mark} = look(method);
    const found = band(runs.map((run) => series(run, panel.metric, state.axis, Number(state.smooth))), state.axis);
    if (!found) return;
    const mean = found.mean.map((value) => value * factor), spread = found.spread.map((value) => value * factor);
    if (runs.length > 1) {
      const edge = {x: found.x, mode: "lines", line: {width: 0}, hoverinfo: "skip", showlegend: false};
      made.push({...edge, y: mean.map((value, row) => value - spread[row])});
      made.push({...edge, y: mean.map((value, row) => value + spread[row]), fill: "tonexty", fillcolor: tint(colour, 0.16)});
    }
    const text = mean.map((value, row) => `${num(value)}${runs.length > 1 ? ` ± ${num(spread[row])} (${found.seeds[row]} seeds)` : ""}`);
    made.push({
      x: found.x, y: mean, text, name: escaped(label), mode: found.x.length < 40 ? "lines+markers" : "lines",
      line: {color: colour, width: 2, dash}, marker: {symbol: mark, size: 6, color: colour}, hovertemplate: "%{text}",
    });
  });
  return made;
}

function layout(extra) {
  const style = getComputedStyle(document.documentElement), get = (name) => style.getPropertyValue(name).trim();
  const axis = {gridcolor: get("--line"), zerolinecolor: get("--line"), linecolor: get("--line"), tickfont: {color: get("--soft"), size: 11}, automargin: true};
  return {
    margin: {l: 44, r: 10, t: 8, b: 34}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: {family: "system-ui, sans-serif", color: get("--ink"), size: 12}, hovermode: "x unified",
    hoverlabel: {bgcolor: get("--panel"), bordercolor: get("--line"), font: {color: get("--ink"), size: 12}},
    xaxis: {...axis, title: {text: AXES.find(([name]) => name === state.axis)[1], font: {color: get("--soft"), size: 11}, standoff: 4}, ...extra?.xaxis},
    yaxis: {...axis, ...extra?.yaxis}, ...extra?.all,
  };
}
const CONFIG = {displayModeBar: false, responsive: true, doubleClick: "reset"};

let plotly = null;
function plotlyReady() {
  plotly ||= unpack("plotly").then((bytes) => {
    const script = el("script", {}, new TextDecoder().decode(bytes));
    document.head.append(script);
  });
  return plotly;
}

// Draws when it comes into view.
const watcher = new IntersectionObserver((seen) => {
  for (const {isIntersecting, target} of seen) if (isIntersecting) watcher.unobserve(target), plotlyReady().then(() => target.draw());
}, {rootMargin: "200px"});

function plot(title, unit, draw) {
  const box = el("div", {class: "plot", role: "img", "aria-label": title});
  box.draw = () => draw(box);
  watcher.observe(box);
  return el("div", {class: "card panel"}, el("h3", {}, title, el("span", {}, unit)), box);
}

function curvesView(view) {
  const known = new Set(report.panels.map((panel) => panel.metric)), has = (metric) => report.runs.some((run) => run.metrics[metric]?.some((value) => value !== null));
  const redraw = () => curvesView(view);
  const chips = el("div", {class: "chips", "aria-label": "Methods"}, report.methods.map((label, method) => {
    const {colour, dash} = look(method), pattern = {solid: "none", dash: "8 4", dot: "2 4", dashdot: "8 4 2 4", longdash: "13 4", longdashdot: "13 4 2 4"}[dash];
    const line = svg("svg", {width: 34, height: 8, "aria-hidden": "true"}, svg("line", {x1: 0, y1: 4, x2: 34, y2: 4, stroke: colour, "stroke-width": 3, "stroke-dasharray": pattern}));
    const count = report.runs.filter((run) => run.method === method).length;
    return el("button", {"aria-pressed": String(!state.hidden.has(method)), onclick: () => (state.hidden.delete(method) || state.hidden.add(method), redraw())}, line, label, el("span", {class: "soft"}, count > 1 ? `${count} seeds` : ""));
  }));
  const sections = new Map();
  const others = [...new Set(report.runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => !known.has(name) && has(name) && !["iteration", "seconds", "tokens/total", "time/elapsed"].includes(name)).sort();
  const panels = [...report.panels.filter((panel) => has(panel.metric)), ...(state.others ? others.map((metric) => ({section: "Others", metric, title: metric, unit: ""})) : [])];
  for (const panel of panels) {
    if (!sections.has(panel.section)) sections.set(panel.section, el("div", {class: "grid"}));
    sections.get(panel.section).append(plot(panel.title, panel.unit, (box) => Plotly.react(box, traces(panel), layout({yaxis: {rangemode: panel.unit === "%" ? "tozero" : "normal"}}), CONFIG)));
  }
  if (sections.has("Time and work")) sections.get("Time and work").prepend(plot("Where the time goes", "% of an iteration", drawPhases));
  view.replaceChildren(...[
    summary(),
    el("div", {class: "row", style: {margin: "1.2rem 0 .3rem"}}, chips),
    el("div", {class: "row small soft"}, "against ", pills("Axis", AXES, state.axis, (value) => ((state.axis = value), redraw())), " running mean ", pills("Smoothing", SMOOTH, state.smooth, (value) => ((state.smooth = value), redraw())), report.runs.length > report.methods.length ? "band: one standard deviation over seeds" : ""),
    ...[...sections].flatMap(([name, grid]) => [el("h2", {}, name), grid]),
    others.length ? el("p", {}, el("button", {class: "quiet", onclick: () => ((state.others = !state.others), redraw())}, state.others ? "Fewer metrics" : `${others.length} more metrics`)) : null,
  ].filter(Boolean));
}

function drawPhases(box) {
  const names = {"time/sample": "sample", "time/judge": "judge", "time/gather": "gather", "time/observe": "observe", "time/learn": "update"}, shapes = ["", "/", "x", "\\", "."];
  const shown = report.methods.map((label, method) => [label, method]).filter(([, method]) => !state.hidden.has(method)).reverse();
  const labels = shown.map(([label]) => escaped(label.length > 18 ? `…${label.slice(-17)}` : label));
  const total = (runs, metric) => runs.reduce((sum, run) => sum + (run.metrics[metric] || []).reduce((inner, value) => inner + (value || 0), 0), 0);
  const bars = report.phases.map((phase, number) => {
    const share = shown.map(([, method]) => {
      const runs = report.runs.filter((run) => run.method === method), all = report.phases.reduce((sum, each) => sum + total(runs, each), 0);
      return all ? (100 * total(runs, phase)) / all : 0;
    });
    return {type: "bar", orientation: "h", name: names[phase], x: share, y: shown.map((_, place) => place), marker: {color: COLOURS[(number + 1) % 8], pattern: {shape: shapes[number], size: 6, solidity: 0.25}}, hovertemplate: "%{x:.1f}%"};
  }).filter((bar) => bar.x.some((value) => value > 0.05));
  Plotly.react(box, bars, layout({xaxis: {title: {text: ""}, range: [0, 100]}, yaxis: {tickvals: labels.map((_, place) => place), ticktext: labels}, all: {barmode: "stack", showlegend: true, legend: {orientation: "h", y: -0.15, font: {size: 11}}, hovermode: "y unified"}}), CONFIG);
}

const last = (run, metric) => (run.metrics[metric] || []).filter((value) => value !== null).at(-1) ?? null;
const first = (run, metric) => (run.metrics[metric] || []).find((value) => value !== null) ?? null;

function summary() {
  const spread = (runs, get, show) => {
    const values = runs.map(get).filter((value) => value !== null);
    if (!values.length) return "–";
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / Math.max(1, values.length - 1));
    return show(mean) + (values.length > 1 ? ` ± ${show(deviation)}` : "");
  };
  const rows = report.methods.map((label, method) => {
    const runs = report.runs.filter((run) => run.method === method), marks = runs.reduce((sum, run) => sum + run.health.length, 0), remarks = runs.reduce((sum, run) => sum + run.remarks.length, 0);
    const start = (metric, show) => spread(runs, (run) => first(run, metric), show).split(" ±")[0];
    const change = (metric, show) => `${start(metric, show)} → ${spread(runs, (run) => last(run, metric), show)}`;
    return el("tr", {}, el("td", {}, label), el("td", {class: "number"}, String(runs.length)),
      el("td", {class: "number"}, change("eval/accuracy", percent)), el("td", {class: "number"}, change("eval/accuracy_greedy", percent)),
      el("td", {class: "number"}, change("completion/length", short)), el("td", {class: "number"}, change("policy/entropy", short)),
      el("td", {class: "number"}, spread(runs, (run) => last(run, "tokens/total"), (value) => Math.round(value).toLocaleString("en"))),
      el("td", {class: "number"}, spread(runs, (run) => last(run, "seconds"), (value) => `${value.toFixed(0)} s`)),
      el("td", {}, marks + remarks ? el("button", {class: "quiet small", onclick: () => show("setup")}, `⚠ ${marks ? `${marks} warning${marks > 1 ? "s" : ""}` : ""}${marks && remarks ? ", " : ""}${remarks ? `${remarks} remark${remarks > 1 ? "s" : ""}` : ""}`) : el("span", {class: "soft"}, "✓ fine")));
  });
  const heads = [["method"], ["runs", 1], ["accuracy, sampled", 1], ["accuracy, greedy", 1], ["length", 1], ["entropy", 1], ["sampled tokens", 1], ["training", 1], ["health"]];
  return el("div", {class: "card scroll"}, el("table", {class: "summary"}, el("thead", {}, el("tr", {}, heads.map(([text, number]) => el("th", {class: number ? "number" : null, scope: "col"}, text)))), el("tbody", {}, rows)));
}
