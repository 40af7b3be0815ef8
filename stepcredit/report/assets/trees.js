// Trees: every group is one; a node is a segment, with its value and its mean advantage.

const NODE = {height: 40, gap: 46, row: 50};

function treesView(target, chunk, group) {
  const column = state.column && chunk.columns.includes(state.column) ? state.column : chunk.columns[0], nodes = group.nodes;
  const credit = nodes.map((node, number) => (chunk.values.advantages ? chunk.mean("advantages", chunk.tokensOf(group, number)) : NaN));
  const scale = Math.max(...credit.map((value) => Math.abs(value) || 0));
  const depth = [], y = [];
  let row = 0;
  const place = (number, level) => {
    depth[number] = level;
    const children = nodes[number].children;
    if (!children.length) return (y[number] = row++);
    children.forEach((child) => place(child, level + 1));
    return (y[number] = (y[children[0]] + y[children[children.length - 1]]) / 2);
  };
  const roots = nodes.map((_, number) => number).filter((number) => nodes[number].parent < 0);
  roots.forEach((number) => place(number, 1));
  const rootY = (y[roots[0]] + y[roots[roots.length - 1]]) / 2;
  if (state.node === null || !nodes[state.node]) state.node = group.leaves[0];
  const on = new Set(chunk.path(group, state.node));
  const levels = Math.max(...depth), room = target.clientWidth - 120;
  const width = Math.round(Math.max(168, Math.min(400, room / levels - NODE.gap))), letters = Math.floor((width - 20) / 6.7);
  const x = (level) => 10 + (level ? 74 + (level - 1) * (width + NODE.gap) : 0), top = (number) => 8 + y[number] * NODE.row;
  const curve = (x1, y1, x2, y2) => `M${x1},${y1} C${(x1 + x2) / 2},${y1} ${(x1 + x2) / 2},${y2} ${x2},${y2}`;
  const edges = nodes.map((node, number) => {
    const from = node.parent < 0 ? [x(0) + 52, 8 + rootY * NODE.row + NODE.height / 2] : [x(depth[node.parent]) + width, top(node.parent) + NODE.height / 2];
    return svg("path", {class: `edge${on.has(number) ? " on" : ""}`, d: curve(...from, x(depth[number]), top(number) + NODE.height / 2)});
  });
  const select = (number) => ((state.node = number), treesView(target, chunk, group), target.querySelector(`[data-node="${number}"]`)?.focus({preventScroll: true}));
  const boxes = nodes.map((node, number) => {
    const value = node.value ?? node.reward, [mark] = node.children.length ? [""] : verdict(node.reward), share = scale ? Math.abs(credit[number] || 0) / scale : 0;
    const sign = credit[number] > 0 ? "pos" : credit[number] < 0 ? "neg" : "", text = chunk.tokensOf(group, number).map((token) => chunk.text(token)).join("").trim().replace(/\s+/g, " ");
    const label = `${mark ? `${verdict(node.reward)[1]}, ` : ""}value ${short(value)}, advantage ${short(credit[number], true)}${node.pruned ? ", pruned" : ""}: ${text}`;
    return svg("g", {class: `node${node.pruned ? " pruned" : ""}${on.has(number) ? " on" : ""}`, "data-node": number, tabindex: number === state.node ? 0 : -1, role: "treeitem", "aria-label": label, "aria-level": depth[number], "aria-selected": String(number === state.node), transform: `translate(${x(depth[number])},${top(number)})`, onclick: () => select(number)},
      svg("title", {}, label),
      svg("rect", {class: sign, width, height: NODE.height, rx: 7, style: {fill: sign ? `color-mix(in srgb, rgb(var(--${sign})) ${Math.round(8 + 42 * share)}%, var(--panel))` : "var(--panel)"}}),
      svg("text", {x: 9, y: 17}, `${mark ? `${mark} ` : ""}${short(value)}`), svg("text", {x: width - 9, y: 17, "text-anchor": "end"}, node.pruned ? "pruned" : short(credit[number], true)),
      svg("text", {class: "snippet", x: 9, y: 32}, text.length > letters ? `${text.slice(0, letters - 1)}…` : text));
  });
  const prompt = svg("g", {transform: `translate(${x(0)},${8 + rootY * NODE.row})`}, svg("text", {x: 0, y: 25}, "prompt"));
  const picture = svg("svg", {width: x(levels) + width + 12, height: row * NODE.row + 8, role: "tree", "aria-label": "Tree of completions"}, edges, prompt, boxes);
  const box = el("div", {class: "card tree-box"}, picture);
  const old = target.querySelector(".tree-box"), [left, above] = old && target.dataset.group === group.id ? [old.scrollLeft, old.scrollTop] : [0, 0];
  target.dataset.group = group.id;
  picture.addEventListener("keydown", (event) => {
    const now = Number(event.target.closest("[data-node]")?.dataset.node), node = nodes[now];
    if (!node) return;
    const peers = node.parent < 0 ? roots : nodes[node.parent].children, same = nodes.map((_, number) => number).filter((number) => depth[number] === depth[now]), at = same.indexOf(now);
    const next = {ArrowLeft: node.parent >= 0 ? node.parent : undefined, ArrowRight: node.children[0], ArrowUp: same[at - 1], ArrowDown: same[at + 1], Home: peers[0], End: peers[peers.length - 1], Enter: now}[event.key];
    if (next === undefined) return;
    event.preventDefault();
    select(next);
  });
  const chosen = nodes[state.node], [mark, word, kind] = chosen.children.length ? ["", "inner node", ""] : verdict(chosen.reward), pathScale = column ? chunk.scale(column, group) : 0;
  target.replaceChildren(...[
    question(group),
    el("div", {class: "legend"}, el("span", {}, "left: value of the segment, right: its mean advantage"), el("span", {}, "solid blue frame: above its siblings, dotted orange: below, dashed grey: pruned"), el("span", {}, "click or arrow keys: read the path")),
    box,
    el("article", {class: "card completion", style: {"margin-top": ".8rem"}, "aria-live": "polite", id: "path"},
      el("header", {}, el("span", {class: `verdict ${kind}`}, `${mark} ${word}`), el("span", {}, `value ${short(chosen.value ?? chosen.reward)}`), el("span", {}, `advantage ${short(credit[state.node], true)}`), el("span", {}, `${lengthOf(chunk, group, state.node)} tokens`), el("span", {style: {"margin-left": "auto"}}, `shaded by ${title(column)}`)),
      stepRows(chunk, group, state.node, column, pathScale, state.layout === "running")),
  ]);
  box.scrollLeft = left, (box.scrollTop = above);
}
