// Setup: what went wrong, with which versions, and every option.

function setupView(view) {
  const marks = report.runs.flatMap((run) => [notes(`${run.name}: remarks`, run.remarks), notes(`${run.name}: health warnings`, run.health)]).filter(Boolean);
  const names = [...new Set(report.runs.flatMap((run) => run.config.map(([name]) => name)))], configs = report.runs.map((run) => new Map(run.config));
  const differs = new Set(report.differences), many = report.runs.length > 1;
  const body = el("tbody");
  const fill = () => {
    const wanted = state.options.toLowerCase();
    body.replaceChildren(...names.filter((name) => name.toLowerCase().includes(wanted) && (!many || !state.onlyDifferent || differs.has(name))).map((name) => el("tr", {class: differs.has(name) ? "differs" : null}, el("th", {scope: "row"}, name), differs.has(name) || !many ? configs.map((config) => el("td", {}, config.get(name) ?? "–")) : el("td", {class: "soft", colspan: configs.length}, configs[0].get(name) ?? "–"))));
  };
  fill();
  const versions = [...new Set(report.runs.flatMap((run) => Object.keys(run.versions)))];
  view.replaceChildren(...[
    el("h2", {}, "Health"),
    ...(marks.length ? marks : [el("p", {class: "soft"}, "✓ nothing to remark")]),
    el("h2", {}, "Options"),
    el("div", {class: "row", style: {"margin-bottom": ".7rem"}}, el("input", {type: "search", placeholder: "find an option", "aria-label": "Find an option", value: state.options, oninput: (event) => ((state.options = event.target.value), fill())}), many ? el("label", {class: "small"}, el("input", {type: "checkbox", checked: state.onlyDifferent, onchange: (event) => ((state.onlyDifferent = event.target.checked), fill())}), " only what differs between the runs") : null),
    el("div", {class: "card scroll"}, el("table", {class: "config"}, el("thead", {}, el("tr", {}, el("th", {}, "option"), report.runs.map((run) => el("th", {scope: "col"}, run.name)))), body)),
    versions.length ? el("h2", {}, "Versions") : null,
    versions.length ? el("div", {class: "card scroll"}, el("table", {class: "config"}, el("tbody", {}, versions.map((name) => el("tr", {}, el("th", {scope: "row"}, name), report.runs.map((run) => el("td", {}, run.versions[name] ?? "–"))))))) : null,
  ].filter(Boolean));
}
