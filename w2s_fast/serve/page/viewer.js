"use strict";
// A search as a tree: what its events say, drawn as a map of all rounds and a list of each.
// Events are those of /live, which also stand in a page that shows saved traces.

const NS = "http://www.w3.org/2000/svg";
const COLUMNS = [44, 88], HEIGHT = 240, MARGIN = 22, RADIUS = 5;
const LETTERS = "abcdefghijklmnopqrstuvwxyz";

const at = (id) => document.getElementById(id);
const letter = (rank) => rank < 26 ? LETTERS[rank] : LETTERS[Math.floor(rank / 26) - 1] + LETTERS[rank % 26];
const signed = (score) => score === null ? "" : (score < 0 ? "−" : "+") + Math.abs(score).toFixed(2);

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

class Tree {
  constructor() { this.begin({ prompt: "" }); }

  begin(event) {
    this.prompt = event.prompt;
    this.rounds = [];
    this.certain = "";
    this.result = null;
    this.chosen = null;  // [round, candidate]
    at("rounds").replaceChildren();
    at("error").hidden = true;
    at("steered-facts").textContent = "";
    this.draw();
  }

  take(event) {
    if (event.type === "search") this.begin(event);
    else if (event.type === "round") this.addRound(event);
    else if (event.type === "text") this.certain += event.text;
    else if (event.type === "done") this.finish(event);
    else if (event.type === "error") fail(event.message);
    this.draw();
  }

  addRound(event) {
    const before = this.rounds.at(-1);
    const rank = new Map(event.kept.map((candidate, k) => [candidate, k]));
    const candidates = event.candidates.map((one, i) => ({
      ...one, i,
      rank: rank.has(i) ? rank.get(i) : null,
      above: before && one.parent !== null ? before.candidates[before.kept[one.parent]] : null,
    }));
    this.rounds.push({ number: event.number, candidates, kept: event.kept });
    this.listRound(this.rounds.length - 1);
  }

  finish(event) {
    this.result = event;
    const { usage, seconds } = event;
    const facts = [];
    if (event.score !== null) facts.push(`score ${signed(event.score)}`);
    if (event.finish_reason) facts.push(`ended by ${event.finish_reason}`);
    if (usage) facts.push(`${usage.completion_tokens} tokens of ${usage.sampled_tokens} sampled`);
    if (seconds) facts.push(`${seconds.toFixed(2)} s`);
    at("steered-facts").textContent = facts.join(" · ");
  }

  // From the best candidate of the last round back to the prompt.
  line() {
    const last = this.rounds.at(-1);
    const found = new Set();
    for (let one = last && last.candidates[last.kept[0]]; one; one = one.above) found.add(one);
    return found;
  }

  textOf(candidate) {
    let text = "";
    for (let one = candidate; one; one = one.above) text = one.text + text;
    return text;
  }

  draw() {
    const best = this.rounds.at(-1);
    const whole = this.result ? this.result.text ?? "" : best ? this.textOf(best.candidates[best.kept[0]]) : "";
    const open = whole.startsWith(this.certain) ? whole.slice(this.certain.length) : "";
    const certain = this.result ? whole : this.certain;
    at("steered").replaceChildren(
      element("span", { className: "prompt", textContent: this.prompt }),
      element("span", { textContent: certain }),
      element("span", { className: "open", textContent: this.result ? "" : open }),
    );
    this.drawMap();
    this.mark();
  }

  drawMap() {
    const rounds = this.rounds;
    if (!rounds.length) { at("map").replaceChildren(); return; }
    const scores = rounds.flatMap((round) => round.candidates.map((one) => one.score ?? 0));
    const low = Math.min(...scores, 0), high = Math.max(...scores, 0);
    const y = (score) => MARGIN + (HEIGHT - 2 * MARGIN) * (high === low ? .5 : (high - score) / (high - low));
    const column = Math.min(COLUMNS[1], Math.max(COLUMNS[0], (at("map").clientWidth - 2 * MARGIN) / rounds.length));
    const x = (round) => MARGIN + column * (round + 1);
    const width = x(rounds.length - 1) + MARGIN;
    const map = shape("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
      "aria-label": `${rounds.length} rounds; the list below says the same` });
    const line = this.line();
    const kind = (one) => line.has(one) ? "line" : one.rank !== null ? "kept" : "lost";
    const edges = shape("g", {}), nodes = shape("g", {});
    const root = [MARGIN, y(0)];
    rounds.forEach((round, r) => {
      for (const one of round.candidates) {
        one.place = [x(r), y(one.score ?? 0)];
        const [fromX, fromY] = one.above ? one.above.place : root;
        const middle = (fromX + one.place[0]) / 2;
        const edge = shape("path", { class: `edge ${kind(one)}`,
          d: `M${fromX},${fromY} C${middle},${fromY} ${middle},${one.place[1]} ${one.place[0]},${one.place[1]}` });
        if (line.has(one)) edges.append(edge); else edges.prepend(edge);
        one.node = shape("circle", { class: `node ${kind(one)}`, cx: one.place[0], cy: one.place[1],
          r: one.rank === null ? RADIUS - 2 : RADIUS });
        one.node.append(shape("title", {}));
        one.node.firstChild.textContent = `${signed(one.score)} ${one.text}`;
        one.node.addEventListener("click", () => this.choose(r, one.i, true));
        nodes.append(one.node);
      }
      if (r % 5 === 4 || r === 0) {
        const label = shape("text", { x: x(r), y: HEIGHT - 4, "text-anchor": "middle" });
        label.textContent = String(round.number);
        nodes.append(label);
      }
    });
    nodes.append(shape("circle", { class: "node line", cx: root[0], cy: root[1], r: RADIUS }));
    map.append(edges, nodes);
    const box = at("map"), atEnd = box.scrollLeft + box.clientWidth >= box.scrollWidth - column;
    box.replaceChildren(map);
    if (atEnd) box.scrollLeft = box.scrollWidth;
  }

  listRound(r) {
    const round = this.rounds[r];
    const order = [...round.candidates].sort((a, b) =>
      (a.rank ?? Infinity) - (b.rank ?? Infinity) || (b.score ?? 0) - (a.score ?? 0) || a.i - b.i);
    const rows = order.map((one) => {
      const from = one.above ? `${one.rank === null ? "" : letter(one.rank)} ← ${letter(one.above.rank)}`
        : one.rank === null ? "" : letter(one.rank);
      one.row = element("button", { type: "button", tabIndex: -1 },
        element("span", { className: "mark" }),
        element("span", { className: "from", textContent: from.trim() }),
        element("span", { className: "text" }, one.text,
          element("span", { className: "end", textContent: one.finish ? ` (${one.finish})` : "" })),
        element("span", { className: "score", textContent: signed(one.score) }));
      one.row.addEventListener("click", () => this.choose(r, one.i));
      one.row.addEventListener("keydown", (event) => this.walk(event, r, order, one));
      return element("li", {}, one.row);
    });
    round.order = order;
    const parents = new Set(round.candidates.map((one) => one.above)).size;
    const source = round.candidates[0]?.above ? `${parents} ${parents === 1 ? "hypothesis" : "hypotheses"}` : "the prompt";
    const heading = `Round ${round.number}: ${round.candidates.length} candidates from ${source}, ${round.kept.length} kept`;
    const details = element("details", { open: true },
      element("summary", { textContent: heading }), element("ul", {}, ...rows));
    round.details = details;
    if (r > 0) this.rounds[r - 1].details.open = false;
    at("rounds").prepend(element("li", {}, details));
  }

  mark() {
    const line = this.line();
    this.rounds.forEach((round, r) => {
      for (const one of round.candidates) {
        const kind = line.has(one) ? "line" : one.rank !== null ? "kept" : "lost";
        const chosen = this.chosen && this.chosen[0] === r && this.chosen[1] === one.i;
        one.row.className = chosen ? `${kind} chosen` : kind;
        one.row.firstChild.textContent = { line: "★", kept: "●", lost: "·" }[kind];
        one.row.firstChild.setAttribute("aria-label", { line: "the best one's line", kept: "kept", lost: "pruned" }[kind]);
        one.row.ariaCurrent = chosen ? "true" : null;
        one.node.classList.toggle("chosen", Boolean(chosen));
        one.row.tabIndex = chosen || (!this.chosen && r === this.rounds.length - 1 && one === round.order[0]) ? 0 : -1;
      }
    });
  }

  choose(r, i, focus = false) {
    this.chosen = [r, i];
    const one = this.rounds[r].candidates[i];
    at("chosen").replaceChildren(
      element("span", { className: "prompt", textContent: this.prompt }),
      element("span", { textContent: this.textOf(one) }),
      element("span", { className: "open", textContent: `  ${signed(one.score)}${one.finish ? `, ended by ${one.finish}` : ""}` }),
    );
    this.mark();
    if (focus) {
      this.rounds[r].details.open = true;
      one.row.focus();
    }
  }

  walk(event, r, order, one) {
    const place = order.indexOf(one);
    let next = null;
    if (event.key === "ArrowDown") next = [r, order[place + 1]];
    else if (event.key === "ArrowUp") next = [r, order[place - 1]];
    else if (event.key === "ArrowLeft") next = [r - 1, one.above];
    else if (event.key === "ArrowRight" && this.rounds[r + 1])
      next = [r + 1, this.rounds[r + 1].order.find((child) => child.above === one)];
    else return;
    event.preventDefault();
    if (next[1]) this.choose(next[0], next[1].i, true);
  }
}

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = false;
}

at("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.style.colorScheme
    ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
});
