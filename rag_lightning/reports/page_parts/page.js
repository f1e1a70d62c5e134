"use strict";
// Everything shown is made of text nodes: no text of the data is ever read as HTML.
const PER_PAGE = 25;
const FILTERS = ["right", "retrieved", "verdict"];
const VERDICTS = {
  right: "right", annotation_mismatch: "annotation mismatch", not_retrieved: "wrong: not retrieved",
  not_read: "wrong: retrieved, not read",
};
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);

function make(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  for (const child of children) if (child !== null) node.append(child);
  return node;
}

const percent = (value) => (value === null ? "–" : (100 * value).toFixed(1) + " %");

// ---------------------------------------------------------------- state: in the address, so that a view is a link

function read() {
  const told = new URLSearchParams(location.hash.slice(1));
  const state = { q: told.get("q") || "", page: Math.max(1, parseInt(told.get("page"), 10) || 1) };
  for (const name of FILTERS) {
    const known = [...by(name).options].map((option) => option.value);
    state[name] = known.includes(told.get(name)) ? told.get(name) : "";
  }
  return state;
}

function write(state) {
  const told = new URLSearchParams();
  for (const name of FILTERS) if (state[name]) told.set(name, state[name]);
  if (state.q) told.set("q", state.q);
  if (state.page > 1) told.set("page", state.page);
  history.replaceState(null, "", "#" + told.toString());
  show(state);
}

function fits(item, state) {
  if (state.right && (item.verdict === "right") !== (state.right === "right")) return false;
  if (state.retrieved && item.retrieved !== (state.retrieved === "yes")) return false;
  if (state.verdict && item.verdict !== state.verdict) return false;
  if (!state.q) return true;
  const text = [item.id, item.question, item.answer, ...item.accepted].join("\n").toLowerCase();
  return text.includes(state.q.toLowerCase());
}

// ---------------------------------------------------------------- what is shown

function bar(label, value, kind) {
  const filled = make("div", { class: "bar " + kind });
  filled.style.width = 100 * (value || 0) + "%";
  const track = make("div", { class: "track", role: "img", "aria-label": label + " " + percent(value) }, filled);
  return [make("span", {}, label), track, make("span", { class: "number" }, percent(value))];
}

function passageNode(row, rank) {
  const [id, prior, posterior, holds, gold] = row;
  const [title, text] = id ? data.passages[id] : ["(no passage)", ""];
  const head = make("div", {}, make("h3", {}, rank + ". " + (title || id)));
  if (holds) head.append(make("span", { class: "tag" }, "holds an answer"));
  if (gold) head.append(make("span", { class: "tag" }, "gold"));
  const bars = make("div", { class: "bars" }, ...bar("prior p(z|x)", prior, "prior"), ...bar("posterior", posterior, "posterior"));
  return make("div", { class: "passage", "data-passage": id }, head, bars, make("p", {}, text));
}

function heatNode(item) {
  const heads = item.tokens.map((token) => make("th", { scope: "col" }, token.trim() || JSON.stringify(token)));
  const table = make("table", {}, make("caption", {}, "which passage each token comes from, p(z | x, y≤t), %"),
    make("tr", {}, make("th", { scope: "col" }, "passage"), ...heads));
  item.heat.forEach((row, place) => {
    const id = item.passages[place][0];
    const line = make("tr", {}, make("th", { scope: "row" }, (place + 1) + ". " + (id ? data.passages[id][0] || id : "(no passage)")));
    for (const value of row) {
      const cell = make("td", {}, value === null ? "–" : (100 * value).toFixed(0));
      cell.style.backgroundColor = "rgba(var(--heat), " + (value || 0) + ")";
      if (value > 0.65) cell.className = value > 0.85 ? "strong strongest" : "strong";
      line.append(cell);
    }
    table.append(line);
  });
  return make("div", { class: "heat" }, table);
}

function detailsNode(item) {
  const more = item.found > item.passages.length ? " of " + item.found : "";
  const details = make("details", {}, make("summary", {}, item.passages.length + more + " passages" + (item.tokens ? ", token by token" : "")));
  const fill = () => {
    if (details.childElementCount > 1) return;
    if (item.tokens) details.append(heatNode(item));
    item.passages.forEach((row, place) => details.append(passageNode(row, place + 1)));
  };
  details.addEventListener("toggle", fill);
  return { details, fill };
}

function itemNode(item, open) {
  const right = item.verdict === "right";
  const accepted = item.pattern !== null ? "/" + item.pattern + "/" : item.accepted.join(" | ");
  const node = make("article", { class: right ? "right" : "wrong", "data-id": item.id, "data-verdict": item.verdict, tabindex: "-1" },
    make("h2", {}, item.question + " ", make("span", { class: "id" }, item.id)),
    make("dl", {},
      make("dt", {}, "answer"), make("dd", {}, item.answer || "(empty)"),
      make("dt", {}, "accepted"), make("dd", {}, accepted),
      make("dt", {}, "verdict"), make("dd", {}, make("span", { class: "verdict" }, VERDICTS[item.verdict]),
        " · p(y|x) " + percent(item.probability) + " · " + (item.retrieved ? "a passage holds an answer" : "no passage holds an answer"))));
  if (item.passages.length) {
    const { details, fill } = detailsNode(item);
    if (open) { fill(); details.open = true; }
    node.append(details);
  }
  return node;
}

function show(state) {
  const chosen = data.questions.filter((item) => fits(item, state));
  const pages = Math.max(1, Math.ceil(chosen.length / PER_PAGE));
  const page = Math.min(state.page, pages);
  const start = (page - 1) * PER_PAGE;
  const shown = chosen.slice(start, start + PER_PAGE);
  by("list").replaceChildren(...shown.map((item) => itemNode(item, chosen.length === 1)));
  if (!shown.length) by("list").append(make("p", {}, "No question fits these filters."));
  by("place").textContent = chosen.length + " of " + data.questions.length + " questions · page " + page + " of " + pages;
  by("previous").disabled = page <= 1;
  by("next").disabled = page >= pages;
  for (const name of FILTERS) by(name).value = state[name];
  if (by("search").value !== state.q) by("search").value = state.q;
  return page;
}

function summarise() {
  const total = data.questions.length;
  const parts = Object.entries(VERDICTS).map(([key, text]) => text + " " + data.counts[key] + " (" + percent(data.counts[key] / total) + ")");
  const [lucky, without] = data.without;
  if (without) parts.push("right though no passage holds the answer " + lucky + " of " + without + " (" + percent(lucky / without) + ")");
  by("summary").replaceChildren(...parts.map((text) => make("li", {}, text)));
}

// ---------------------------------------------------------------- controls

function turn(step) {
  const state = read();
  if (by(step < 0 ? "previous" : "next").disabled) return;
  write({ ...state, page: show(state) + step });
  scrollTo(0, 0);
}

function walk(step) {
  const items = [...document.querySelectorAll("article")];
  const now = items.indexOf(document.activeElement.closest("article"));
  const next = items[Math.min(items.length - 1, Math.max(0, now + step))];
  if (next) next.focus();
}

const KEYS = {
  j: () => walk(1), k: () => walk(-1), n: () => turn(1), p: () => turn(-1), "/": () => by("search").focus(),
  o: () => {
    const article = document.activeElement.closest("article");
    const details = article && article.querySelector("details");
    if (details) details.open = !details.open;
  },
};

addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.activeElement.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const act = KEYS[event.key];
  if (act) { event.preventDefault(); act(); }
});
for (const name of FILTERS) by(name).addEventListener("change", () => write({ ...read(), [name]: by(name).value, page: 1 }));
let waiting = 0;
by("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => write({ ...read(), q: by("search").value, page: 1 }), 150);
});
by("filters").addEventListener("submit", (event) => event.preventDefault());
by("previous").addEventListener("click", () => turn(-1));
by("next").addEventListener("click", () => turn(1));
addEventListener("hashchange", () => show(read()));
summarise();
show(read());
