// What is looked at, kept in the address so that a view can be linked to.

const TABS = [["curves", "Curves"], ["rollouts", "Rollouts"], ["trees", "Trees"], ["credit", "Credit comparison"], ["setup", "Setup"]];
const PICKED = ["rollouts", "trees", "credit"];
const THEMES = {auto: "◐", light: "☀", dark: "☾"};

let report = null;
const state = {tab: "curves", run: 0, iteration: null, problem: 0, column: "advantages", node: null, leaf: null, chunk: null, axis: "iteration", smooth: "1", hidden: new Set(), others: false, order: "mixed", search: "", sort: "sample", layout: "lines", creditLayout: "running", centred: "", all: false, options: "", onlyDifferent: true};

const view = () => PICKED.includes(state.tab) && state.chunk;

function shownAgain() {
  const chunk = state.chunk, group = chunk.groups[state.problem];
  ({rollouts: rolloutsView, trees: treesView, credit: creditView})[state.tab](byId(`view-${state.tab}`), chunk, group);
}

// Change what is looked at.
async function go(change) {
  const before = {run: state.run, iteration: state.iteration};
  Object.assign(state, change);
  if ("problem" in change || "iteration" in change || "run" in change) Object.assign(state, {node: null, leaf: null, all: false});
  const iterations = saved().map((each) => each.iteration);
  if (!iterations.includes(state.iteration)) state.iteration = iterations[iterations.length - 1];
  hideTip();
  remember();
  const number = current().chunk, chunk = await chunkOf(number);
  if (current().chunk !== number) return; // something else was chosen meanwhile
  const changed = chunk !== state.chunk;
  state.chunk = chunk;
  if (changed && !("problem" in change)) state.problem = ordered(chunk)[0];
  state.problem = Math.min(state.problem, chunk.groups.length - 1);
  if (before.run !== state.run || before.iteration !== state.iteration || changed || !byId("picker").childElementCount) picker(chunk);
  else {
    for (const button of byId("picker").querySelectorAll("[data-problem]")) button.setAttribute("aria-current", String(button.dataset.problem === chunk.groups[state.problem].id));
    shownAgain();
  }
  remember();
}

function remember() {
  const group = state.chunk?.groups[state.problem], words = new URLSearchParams({view: state.tab});
  if (PICKED.includes(state.tab) && group) Object.entries({run: report.runs[state.run].name, iteration: state.iteration, problem: group.id, column: state.column, node: state.node ?? ""}).forEach(([name, value]) => words.set(name, value));
  history.replaceState(null, "", `#${words}`);
}

async function show(tab) {
  state.tab = tab;
  const picked = PICKED.includes(tab), possible = report.runs.some((run) => run.rollouts.length);
  for (const [name] of TABS) {
    byId(`tab-${name}`).setAttribute("aria-selected", String(name === tab));
    byId(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
    byId(`view-${name}`).hidden = name !== tab;
    if (name === tab) byId(`tab-${name}`).scrollIntoView({block: "nearest", inline: "center"});
  }
  byId("picked").hidden = !picked;
  byId("picker").hidden = !possible;
  if (tab === "curves") curvesView(byId("view-curves"));
  else if (tab === "setup") setupView(byId("view-setup"));
  else if (!possible) byId(`view-${tab}`).replaceChildren(notes("There is no credit to look at", report.runs.flatMap((run) => run.remarks.map((remark) => `${run.name}: ${remark}`))) ?? "");
  else await go({});
  remember();
}

function theme(name) {
  const dark = name === "dark" || (name === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  state.theme = name;
  byId("theme").textContent = THEMES[name];
  byId("theme").setAttribute("aria-label", `Theme: ${{auto: "automatic", light: "light", dark: "dark"}[name]}`);
  if (report && state.tab === "curves") curvesView(byId("view-curves"));
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old for the page; one of 2023 or later can show it");
  report = JSON.parse(new TextDecoder().decode(await unpack("index")));
  const names = Object.keys(THEMES);
  theme(names.includes(localStorageGet("theme")) ? localStorageGet("theme") : "auto");
  byId("theme").onclick = () => {
    theme(names[(names.indexOf(state.theme) + 1) % names.length]);
    localStorageSet("theme", state.theme);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.theme === "auto" && theme("auto"));
  byId("tabs").append(...TABS.map(([name, text]) => el("button", {role: "tab", id: `tab-${name}`, "aria-controls": `view-${name}`, onclick: () => show(name)}, text)));
  byId("tabs").addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], place = TABS.findIndex(([name]) => name === state.tab);
    if (!step) return;
    const [next] = TABS[(place + step + TABS.length) % TABS.length];
    show(next).then(() => byId(`tab-${next}`).focus());
  });
  byId("picker").open = innerWidth > 860;
  watchTokens(byId("shown"));
  const words = new URLSearchParams(location.hash.slice(1)), run = report.runs.findIndex((each) => each.name === words.get("run"));
  state.run = Math.max(0, run >= 0 ? run : report.runs.findIndex((each) => each.rollouts.length));
  state.iteration = Number(words.get("iteration")) || null;
  if (words.get("column")) state.column = words.get("column");
  byId("loading").remove();
  await show(TABS.some(([name]) => name === words.get("view")) ? words.get("view") : "curves");
  const group = state.chunk?.groups.findIndex((each) => each.id === words.get("problem")) ?? -1;
  if (group >= 0) await go({problem: group});
  if (group >= 0 && words.get("node")) await go({node: Number(words.get("node"))});
  document.documentElement.dataset.ready = "yes";
}

const localStorageGet = (name) => { try { return localStorage.getItem(`stepcredit-${name}`); } catch { return null; } };
const localStorageSet = (name, value) => { try { localStorage.setItem(`stepcredit-${name}`, value); } catch { /* a page from disk may not keep anything */ } };

start().catch((error) => {
  byId("loading")?.remove();
  document.querySelector("main").prepend(el("div", {class: "note", role: "alert"}, `The page could not be drawn: ${error.message}`));
  throw error;
});
