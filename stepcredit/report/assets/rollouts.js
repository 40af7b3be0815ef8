// Rollouts: which group is looked at, and its completions token by token.

const SIGNED = (column) => !["logprobs", "entropy", "weights"].includes(column);
const title = (column) => (column.startsWith("credit:") ? column.slice(7) : column.startsWith("term/") ? `term ${column.slice(5)}` : report.columns[column] || column);
const isRight = (reward) => reward !== null && reward >= 1;
const verdict = (reward) => (reward === null ? ["?", "unjudged", ""] : isRight(reward) ? ["✓", "right", "right"] : ["✗", "wrong", "wrong"]);

const saved = () => report.runs[state.run].rollouts;
const current = () => saved().find((each) => each.iteration === state.iteration);

// ---------------------------------------------------------------------- the picker at the side

const ORDERS = [["saved", "as saved"], ["mixed", "most mixed outcomes"], ["hard", "hardest first"], ["easy", "easiest first"], ["spread", "largest advantage"], ["long", "longest"]];

function picker(chunk) {
  const runs = report.runs.map((run, number) => [run, number]).filter(([run]) => run.rollouts.length), iterations = saved().map((each) => each.iteration);
  const place = iterations.indexOf(state.iteration), entry = current();
  const slider = el("input", {type: "range", min: 0, max: iterations.length - 1, value: place, disabled: iterations.length < 2, "aria-label": "Iteration", "aria-valuetext": `iteration ${state.iteration}`, oninput: (event) => go({iteration: iterations[event.target.value]})});
  const search = el("input", {type: "search", value: state.search, placeholder: "in questions and completions", "aria-label": "Search", oninput: (event) => ((state.search = event.target.value), list())});
  const box = el("ul", {class: "problems", "aria-label": "Problems"});
  const list = () => {
    const found = ordered(chunk).filter((number) => matches(chunk, chunk.groups[number]));
    const common = commonStart(chunk.groups.map((group) => group.question));
    box.replaceChildren(...found.map((number) => {
      const group = chunk.groups[number], rewards = group.leaves.map((leaf) => group.nodes[leaf].reward);
      const marks = el("span", {class: "outcomes", "aria-hidden": "true"}, rewards.slice(0, 24).map((reward) => el("i", {class: verdict(reward)[2] || "none"})));
      const right = rewards.filter(isRight).length;
      return el("li", {}, el("button", {"aria-current": String(number === state.problem), "data-problem": group.id, onclick: () => go({problem: number})}, el("span", {class: "question", title: group.question}, shortened(group.question, common) || group.id), el("span", {class: "small soft"}, marks, ` ${right} of ${rewards.length} right`)));
    }));
    if (!found.length) box.append(el("li", {class: "small soft", style: {padding: ".5rem"}}, "nothing matches"));
    if (view()) shownAgain();
  };
  const summary = el("summary", {}, el("b", {}, report.runs[state.run].name), ` · iteration ${state.iteration}`);
  byId("picker").replaceChildren(...[
    summary,
    el("label", {}, "Run", el("select", {onchange: (event) => go({run: Number(event.target.value)})}, runs.map(([run, number]) => el("option", {value: number, selected: number === state.run}, run.name)))),
    el("label", {}, `Iteration ${state.iteration} (${place + 1} of ${iterations.length} saved)`, slider),
    el("label", {}, "Order of problems", el("select", {onchange: (event) => ((state.order = event.target.value), list())}, ORDERS.map(([value, text]) => el("option", {value, selected: value === state.order}, text)))),
    el("label", {}, "Search", search),
    entry.groups < entry.of ? el("p", {class: "small soft", style: {margin: 0}}, `${entry.groups} of ${entry.of} saved problems fit`) : null,
    box,
  ].filter(Boolean));
  list();
}

function whole(chunk, group, leaf) {
  return chunk.path(group, leaf).flatMap((number) => chunk.tokensOf(group, number)).map((token) => chunk.text(token)).join("");
}

function matches(chunk, group) {
  const wanted = state.search.trim().toLowerCase();
  return !wanted || `${group.id}\n${group.question}`.toLowerCase().includes(wanted) || group.leaves.some((leaf) => whole(chunk, group, leaf).toLowerCase().includes(wanted));
}

function ordered(chunk) {
  const mean = (group) => {
    const rewards = group.leaves.map((leaf) => group.nodes[leaf].reward).filter((reward) => reward !== null);
    return rewards.reduce((sum, reward) => sum + reward, 0) / Math.max(1, rewards.length);
  };
  const key = {
    saved: () => 0, mixed: (group) => Math.abs(mean(group) - 0.5), hard: mean, easy: (group) => -mean(group),
    spread: (group) => (chunk.values.advantages ? -chunk.scale("advantages", group) : 0), long: (group) => -(group.end - group.first) / group.leaves.length,
  }[state.order];
  return chunk.groups.map((_, number) => number).sort((one, other) => key(chunk.groups[one]) - key(chunk.groups[other]) || one - other);
}

// ---------------------------------------------------------------------- tokens

function paint(span, value, scale, signed) {
  span.classList.remove("pos", "neg", "seq");
  if (Number.isNaN(value) || !scale || !value) return;
  const share = Math.min(1, Math.abs(value) / scale);
  span.classList.add(signed ? (value > 0 ? "pos" : "neg") : "seq");
  span.style.setProperty("--a", (0.06 + 0.54 * share).toFixed(3));
  span.style.setProperty("--b", (0.25 + 0.75 * share).toFixed(3));
}

function tokenSpan(chunk, token, column, scale, signed, position, begins, less) {
  const text = chunk.text(token), shown = (begins ? text.replace(/^ +(?=.)/, "") : text).replace(/\n/g, "↵\n");
  const span = el("span", {class: "token", tabindex: -1, "data-token": token, "data-position": position, "data-column": column}, shown || "·");
  paint(span, (chunk.values[column]?.[token] ?? NaN) - less, scale, signed);
  const wanted = state.search.trim().toLowerCase();
  if (wanted && text.toLowerCase().includes(wanted)) span.classList.add("hit");
  return span;
}

// Of a long completion the middle is folded, and made when it is opened.
const FOLDED_FROM = 400, SHOWN_FIRST = 240, SHOWN_LAST = 80;

function foldOf(count, make) {
  const button = el("button", {class: "fold", onclick: () => {
    const opened = make();
    button.replaceWith(...opened);
    opened[0].closest(".steps").querySelector(`[data-position="${SHOWN_FIRST}"]`)?.focus();
  }}, `… ${count} tokens …`);
  return button;
}

// The steps of a path as rows: tokens, and the mean of the column at the end; `less` is taken off every value.
function stepRows(chunk, group, number, column, scale, running, less = 0) {
  const signed = SIGNED(column), steps = chunk.steps(group, number), wanted = state.search.trim().toLowerCase();
  const total = steps.reduce((sum, step) => sum + step.tokens.length, 0);
  const folds = total > FOLDED_FROM && !(wanted && whole(chunk, group, number).toLowerCase().includes(wanted));
  const isFolded = (position) => folds && position >= SHOWN_FIRST && position < total - SHOWN_LAST;
  const spansOf = (step, from, to) => step.tokens.slice(from, to).map((token, place) => tokenSpan(chunk, token, column, scale, signed, step.first + from + place, !(from + place) && (!running || !step.first), less));
  const rowOf = (step, content) => el("div", {class: `step${step.wrong ? " first-wrong" : ""}${step.pruned ? " pruned" : ""}`}, el("div", {}, content), el("span", {}, short(chunk.mean(column, step.tokens) - less, signed)));
  const rows = [];
  let position = 0, hidden = [];
  const close = () => {
    const steps = hidden;
    if (steps.length) rows.push(foldOf(steps.reduce((sum, step) => sum + step.tokens.length, 0), () => steps.map((step) => rowOf(step, spansOf(step, 0)))));
    hidden = [];
  };
  for (const step of steps) {
    const size = step.tokens.length;
    step.first = position;
    position += size;
    const from = step.tokens.findIndex((_, place) => isFolded(step.first + place));
    const to = step.tokens.findLastIndex((_, place) => isFolded(step.first + place)) + 1;
    if (from === 0 && to === size && !step.wrong) { hidden.push(step); continue; }
    close();
    const content = from < 0 || step.wrong ? spansOf(step, 0) : [...spansOf(step, 0, from), foldOf(to - from, () => spansOf(step, from, to)), ...spansOf(step, to)];
    rows.push(rowOf(step, content));
  }
  close();
  const box = el("div", {class: `steps${running ? " running" : ""}`}, rows);
  box.querySelector(".token")?.setAttribute("tabindex", "0");
  return box;
}

function legend(column, scale) {
  const signed = SIGNED(column), low = signed ? num(-scale) : "0", most = signed ? num(scale, true) : ["logprobs"].includes(column) ? num(-scale) : num(scale);
  return el("div", {class: "legend"},
    el("span", {class: "ramp"}, low, el("i", {class: signed ? "signed" : "sequential"}), most), el("span", {}, `${title(column)}, scaled to this group`),
    signed ? el("span", {}, "underlined: above 0, dotted: below 0") : null, el("span", {}, "hover, tap or arrow keys: values of a token"));
}

function rolloutsView(target, chunk, group) {
  const columns = chunk.columns.filter((column) => !column.startsWith("credit:"));
  if (!columns.includes(state.column)) state.column = columns[0] || "";
  const column = state.column, scale = column ? chunk.scale(column, group) : 0;
  const order = {sample: () => 0, reward: (leaf) => -(group.nodes[leaf].reward ?? -Infinity), length: (leaf) => -lengthOf(chunk, group, leaf), credit: (leaf) => -chunk.mean(column, chunk.tokensOf(group, leaf)) || 0}[state.sort];
  const leaves = [...group.leaves].sort((one, other) => order(one) - order(other) || one - other), limit = state.all ? leaves.length : 24;
  target.replaceChildren(...[
    question(group),
    el("div", {class: "row"}, pills("Shaded by", columns.map((name) => [name, title(name)]), column, (value) => go({column: value}))),
    legend(column, scale),
    el("div", {class: "row small soft", style: {"margin-bottom": ".8rem"}}, "completions by ", pills("Order of completions", [["sample", "sample"], ["reward", "reward"], ["length", "length"], ["credit", "last step"]], state.sort, (value) => go({sort: value})), pills("Layout", [["lines", "a line a step"], ["running", "running text"]], state.layout, (value) => go({layout: value}))),
    el("div", {class: "completions"}, leaves.slice(0, limit).map((leaf) => completionCard(chunk, group, leaf, column, scale))),
    leaves.length > limit ? el("p", {}, el("button", {class: "quiet", onclick: () => go({all: true})}, `all ${leaves.length} completions`)) : null,
  ].filter(Boolean));
}

const lengthOf = (chunk, group, leaf) => chunk.path(group, leaf).reduce((sum, number) => sum + group.nodes[number].length, 0);

// Characters that all questions begin with, up to a space; 0 where there are too few to be in the way.
function commonStart(questions) {
  const least = questions.length > 1 ? Math.min(...questions.map((text) => text.length)) : 0;
  let length = 0;
  while (length < least && questions.every((text) => text[length] === questions[0][length])) length += 1;
  const words = questions[0].lastIndexOf(" ", length - 1) + 1;
  return words > 12 ? words : 0;
}

const shortened = (text, start) => (start && text.length > start ? `… ${text.slice(start)}` : text);

function question(group) {
  return el("div", {class: "card question-card"}, el("b", {}, "Question  "), group.question || group.id, group.answer === null ? null : [el("br"), el("b", {}, "Answer  "), group.answer]);
}

function completionCard(chunk, group, leaf, column, scale) {
  const node = group.nodes[leaf], [mark, word, kind] = verdict(node.reward), number = group.leaves.indexOf(leaf) + 1;
  const head = el("header", {}, el("span", {class: `verdict ${kind}`}, `${mark} ${word}`), el("span", {}, `reward ${short(node.reward)}`), el("span", {}, `${lengthOf(chunk, group, leaf)} tokens`), node.finish === 1 ? el("b", {}, "truncated") : node.finish === 3 ? el("b", {}, "goes on") : null, node.masked ? el("b", {}, "masked") : null, el("span", {style: {"margin-left": "auto"}}, `#${number}`));
  return el("article", {class: "card completion", "aria-label": `completion ${number}, ${word}`}, head, stepRows(chunk, group, leaf, column, scale, state.layout === "running"));
}

// ---------------------------------------------------------------------- values of a token

function tipFor(span) {
  const chunk = state.chunk, token = Number(span.dataset.token), rows = [];
  for (const column of chunk.columns) {
    const value = chunk.values[column][token], chosen = column === span.dataset.column;
    if (!chosen && column.startsWith("credit:")) continue;
    if (!Number.isNaN(value) || chosen) rows.push(el("tr", {class: chosen ? "chosen" : null, "data-column": column}, el("td", {}, title(column)), el("td", {class: "number"}, num(value, SIGNED(column)))));
  }
  const tip = byId("tip");
  tip.replaceChildren(el("code", {}, chunk.text(token).replace(/\n/g, "↵") || "(part of a character)"), el("span", {class: "soft"}, `  token ${Number(span.dataset.position) + 1}`), el("table", {}, rows));
  tip.hidden = false;
  const box = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  tip.style.top = box.bottom + size.height + 12 < innerHeight ? `${box.bottom + 8}px` : `${Math.max(8, box.top - size.height - 8)}px`;
}

const hideTip = () => (byId("tip").hidden = true);

function watchTokens(root) {
  const span = (event) => event.target.closest?.("[data-token]");
  root.addEventListener("mouseover", (event) => (span(event) ? tipFor(span(event)) : hideTip()));
  root.addEventListener("mouseleave", hideTip);
  root.addEventListener("focusin", (event) => span(event) && tipFor(span(event)));
  root.addEventListener("focusout", hideTip);
  root.addEventListener("click", (event) => span(event)?.focus());
  root.addEventListener("keydown", (event) => {
    const now = span(event);
    if (!now) return;
    if (event.key === "Escape") return hideTip();
    const all = [...now.closest(".steps").querySelectorAll("[data-token]")], place = all.indexOf(now);
    const next = {ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1}[event.key];
    if (next === undefined || !all[next]) return;
    event.preventDefault();
    now.tabIndex = -1, (all[next].tabIndex = 0), all[next].focus();
  });
  addEventListener("scroll", hideTip, {passive: true});
}
