"use strict";
// What the page carries: gzip in base64, unpacked when it is looked at.

async function unpack(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place++) bytes[place] = text.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The groups that a run saved in one iteration; see `chunk_of` in page.py for the bytes.
class Chunk {
  constructor(bytes) {
    const size = new DataView(bytes.buffer).getUint32(0, true);
    Object.assign(this, JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size))));
    let at = 4 + size;
    const next = (kind) => {
      const planes = bytes.subarray(at, (at += 4 * this.tokens)), whole = new Uint8Array(4 * this.tokens);
      for (let byte = 0; byte < 4; byte++)
        for (let token = 0; token < this.tokens; token++) whole[4 * token + byte] = planes[byte * this.tokens + token];
      return new kind(whole.buffer);
    };
    this.textNumber = next(Uint32Array);
    this.values = {};
    for (const name of this.columns) this.values[name] = next(Float32Array);
    let start = 0;
    for (const group of this.groups) {
      group.nodes.forEach((node, number) => {
        node.start = start;
        start += node.length;
        node.children = [];
        if (node.parent >= 0) group.nodes[node.parent].children.push(number);
      });
      group.leaves = group.nodes.map((_, number) => number).filter((number) => !group.nodes[number].children.length);
      group.first = group.nodes[0].start;
      group.end = start;
    }
  }

  text(token) { return this.texts[this.textNumber[token]]; }

  // Nodes from the prompt down to this one.
  path(group, number) {
    const found = [];
    for (; number >= 0; number = group.nodes[number].parent) found.unshift(number);
    return found;
  }

  // The steps of a path: tokens, and whether the first wrong line or a pruned segment is in them.
  steps(group, number) {
    const steps = [];
    let wrong = false;
    for (const place of this.path(group, number)) {
      const node = group.nodes[place];
      for (let offset = 0; offset < node.length; offset++) {
        if (!steps.length || node.steps.includes(offset)) steps.push({tokens: [], wrong: false, pruned: false, node: place});
        const step = steps[steps.length - 1];
        step.tokens.push(node.start + offset);
        if (node.pruned) step.pruned = true;
        if (node.wrong && offset === node.wrong[0] && !wrong) wrong = step.wrong = true;
      }
    }
    return steps;
  }

  mean(column, tokens) {
    const values = tokens.map((token) => this.values[column][token]).filter((value) => !Number.isNaN(value));
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : NaN;
  }

  // The largest absolute value of a column in a group.
  scale(column, group) {
    let most = 0;
    for (let token = group.first; token < group.end; token++) {
      const value = Math.abs(this.values[column][token]);
      if (value > most) most = value;
    }
    return most;
  }

  tokensOf(group, number) {
    const node = group.nodes[number];
    return Array.from({length: node.length}, (_, offset) => node.start + offset);
  }
}

const chunks = new Map();
async function chunkOf(number) {
  if (!chunks.has(number)) chunks.set(number, unpack(`chunk-${number}`).then((bytes) => new Chunk(bytes)));
  return chunks.get(number);
}
