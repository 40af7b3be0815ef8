// Credit comparison: the same tokens under every credit function, each on its own scale.

function creditView(target, chunk, group) {
  const names = chunk.credits, own = chunk.own;
  if (!group.leaves.includes(state.leaf)) state.leaf = group.leaves.find((leaf) => group.nodes[leaf].wrong) ?? group.leaves[0];
  const choices = group.leaves.slice(0, 16).map((leaf) => [leaf, `${verdict(group.nodes[leaf].reward)[0]} ${group.leaves.indexOf(leaf) + 1}`]);
  const rows = names.map((name) => {
    const column = `credit:${name}`, path = chunk.path(group, state.leaf).flatMap((number) => chunk.tokensOf(group, number));
    const less = state.centred ? chunk.mean(column, path) : 0, largest = Math.max(...path.map((token) => Math.abs(chunk.values[column][token] - less)));
    const scale = state.centred ? (largest > 1e-5 * chunk.spread[name] ? largest : 0) : chunk.scale(column, group);
    return el("tr", {}, el("th", {scope: "row"}, name === own ? `${name}, this run's` : name, el("div", {class: "small soft"}, `± ${num(chunk.spread[name])}`)), el("td", {}, stepRows(chunk, group, state.leaf, column, scale, state.creditLayout === "running", less)));
  });
  target.replaceChildren(...[
    question(group),
    el("div", {class: "row small soft", style: {"margin-bottom": ".7rem"}}, "completion ", pills("Completion", choices, state.leaf, (value) => go({leaf: value})), pills("Shown", [["", "advantage"], ["yes", "less the completion's mean"]], state.centred, (value) => go({centred: value})), pills("Layout", [["lines", "a line a step"], ["running", "running text"]], state.creditLayout, (value) => go({creditLayout: value}))),
    el("div", {class: "legend"}, el("span", {}, `each function on the scale of its largest ${state.centred ? "difference in this completion; without shade: every token gets the same" : "advantage in this group"}; ±: standard deviation over the saved tokens`), el("span", {}, "underlined: above 0, dotted: below 0")),
    el("div", {class: "card"}, el("table", {class: "shades"}, el("tbody", {}, rows))),
    el("h2", {}, "How alike they are"),
    el("p", {class: "soft small"}, "Pearson's correlation of the advantages of all tokens that were trained on, in all saved groups of this iteration."),
    el("div", {class: "card scroll"}, matrix(names, chunk.correlation)),
    ...firstErrorDetection(chunk),
    notes("Not among them", Object.entries(chunk.missing).map(([name, why]) => `${name}: ${why}`)),
  ].filter(Boolean));
}

function matrix(names, values) {
  const cell = (value) => {
    if (value === null) return el("td", {class: "number", title: "one of them is constant"}, "–");
    const sign = value < 0 ? "neg" : "pos";
    return el("td", {class: "number", style: {background: `rgb(var(--${sign}) / ${(0.6 * Math.abs(value)).toFixed(2)})`}}, short(value, true));
  };
  return el("table", {class: "matrix"}, el("thead", {}, el("tr", {}, el("th"), names.map((name) => el("th", {scope: "col"}, name)))), el("tbody", {}, values.map((row, number) => el("tr", {}, el("th", {scope: "row"}, names[number]), row.map(cell)))));
}

function firstErrorDetection(chunk) {
  const rows = Object.entries(chunk.first_error).filter(([, each]) => each.count);
  if (!rows.length) return [];
  return [
    el("h2", {}, "Does the credit find the first wrong line?"),
    el("p", {class: "soft small"}, `Over the ${rows[0][1].count} wrong completions of this iteration whose lines can be checked: how often the line with the lowest mean advantage is the first wrong one. A function that gives all lines the same says nothing.`),
    el("div", {class: "card scroll"}, el("table", {}, el("thead", {}, el("tr", {}, ["credit", "says nothing", "finds it", "a line at random would"].map((text, number) => el("th", {class: number ? "number" : null, scope: "col"}, text)))),
      el("tbody", {}, rows.map(([name, each]) => el("tr", {}, el("td", {}, name), el("td", {class: "number"}, percent(each.uniform)), el("td", {class: "number"}, each.accuracy === null ? "–" : percent(each.accuracy)), el("td", {class: "number"}, each.chance === null ? "–" : percent(each.chance))))))),
  ];
}
