// The completion browser: filters, sorting, and pages of entries.

const PAGE_SIZE = 20;
const FILTERS = { step: "step", reward: "reward", win: "win" };

/** Connects the form with the completions, which are columns (completions.as_columns). */
function startBrowser(completions) {
  const form = document.getElementById("filters");
  const lowered = completions.prompts.map((prompt) => prompt.toLowerCase());
  const state = { page: 0, chosen: [], group: null };
  for (const reason of new Set(completions.finish)) {
    form.elements.finish.append(html("option", { value: reason }, reason));
  }

  const show = () => {
    const pages = Math.max(1, Math.ceil(state.chosen.length / PAGE_SIZE));
    state.page = Math.min(state.page, pages - 1);
    const from = state.page * PAGE_SIZE;
    const visible = state.chosen.slice(from, from + PAGE_SIZE);
    const siblings = (group) => {
      state.group = group;
      choose();
    };
    byId("entries").replaceChildren(...visible.map((i) => makeEntry(completions, i, state.group == null ? siblings : null)));
    const many = completions.step.length.toLocaleString("en");
    byId("count").textContent = `${state.chosen.length.toLocaleString("en")} of ${many} completions`;
    byId("page-number").textContent = `page ${(state.page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
    byId("siblings-off").hidden = state.group == null;
  };
  const choose = () => {
    state.chosen = chosenCompletions(completions, lowered, form.elements, state.group);
    state.page = 0;
    show();
  };
  const turn = (by) => {
    state.page += by;
    show();
    byId("completions").scrollIntoView();
  };

  form.addEventListener("input", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  // The fields are empty only after the event.
  form.addEventListener("reset", () => setTimeout(choose));
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("siblings-off").addEventListener("click", () => {
    state.group = null;
    choose();
  });
  choose();
}

const byId = (id) => document.getElementById(id);

/** The sorted indices of the completions that match the form. */
function chosenCompletions(completions, lowered, fields, group) {
  const text = fields.text.value.toLowerCase();
  const ranges = Object.entries(FILTERS)
    .map(([name, column]) => [completions[column], bound(fields[`${name}-from`]), bound(fields[`${name}-to`])])
    .filter(([, from, to]) => from != null || to != null);
  const chosen = [];
  for (let i = 0; i < completions.step.length; i++) {
    if (group != null && completions.group[i] !== group) continue;
    if (text && !lowered[completions.prompt[i]].includes(text)) continue;
    if (fields.finish.value && completions.finish[i] !== fields.finish.value) continue;
    if (ranges.every(([column, from, to]) => within(column[i], from, to))) chosen.push(i);
  }
  const column = completions[fields.sort.value];
  const sign = fields.order.value === "up" ? 1 : -1;
  // Missing values come last in both orders.
  return chosen.sort((a, b) => {
    if (column[a] == null || column[b] == null) return (column[a] == null) - (column[b] == null) || a - b;
    return sign * (column[a] - column[b]) || a - b;
  });
}

const bound = (field) => (field.value === "" ? null : Number(field.value));
const within = (value, from, to) => value != null && (from == null || value >= from) && (to == null || value <= to);

function makeEntry(completions, i, siblings) {
  const prompt = completions.prompt[i];
  const expert = completions.experts[prompt];
  const facts = [
    ["step", completions.step[i]], ["reward", completions.reward[i]], ["advantage", completions.advantage[i]],
    ["win rate", completions.win[i]], ["tokens", completions.tokens[i]],
  ].filter(([name, value]) => value != null || name === "reward");
  const header = html("header", {},
    ...facts.map(([name, value]) => html("span", {}, `${name} `, html("b", {}, formatNumber(value)))),
    html("span", {}, `finish reason ${completions.finish[i]}`),
    ...makeToolCounts(completions.tools?.[i]),
    ...(completions.replaced[i] ? [html("span", {}, "replaced, not trained")] : []),
    ...completions.functions.map((name, f) => makeScore(name, completions.parts[f][i])));
  if (siblings) {
    const button = html("button", { type: "button" }, "All completions of this prompt in this step");
    button.addEventListener("click", () => siblings(completions.group[i]));
    header.append(button);
  }
  const trained = completions.replaced[i] ? "not trained, replaced" : "trained";
  const pair = html("div", { class: "pair" },
    makeSide("Policy", completions.turns?.[i], trained, completions.text[i]),
    expert == null ? null : makeSide("Expert", completions.expert_turns?.[prompt], "trained where mu > 0", expert));
  return html("article", { class: "entry" }, header, html("p", { class: "prompt text" }, completions.prompts[prompt]), pair);
}

/** Turns, if there are any, or the text. */
function makeSide(title, turns, trained, text) {
  const kind = title.toLowerCase();
  return turns ? makeTurns(title, kind, turns, trained) : makeText(title, kind, text);
}

function makeText(title, kind, text) {
  return html("div", { class: kind }, html("h4", {}, title), html("div", { class: "text" }, text || "(empty)"));
}

/** The reward of one function, with a tick for 1 and a cross for 0. */
function makeScore(name, value) {
  const short = name.split(":").at(-1);
  const marks = { 1: ["tick", "✓ "], 0: ["cross", "✕ "] };
  const [kind, mark] = marks[value] ?? ["", ""];
  return html("span", { class: kind, title: name }, `${mark}${short} ${value == null ? "none" : formatNumber(value)}`);
}
