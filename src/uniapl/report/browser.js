// The browser of sampled answers: filters, an order, and one page of entries at a time.

const PAGE_SIZE = 20;
const FILTERS = { step: "step", reward: "reward", win: "win" };

/** Wires the form to the answers (columns, as src/uniapl/report/completions.py packs them). */
function startBrowser(answers) {
  const form = document.getElementById("filters");
  const lowered = answers.prompts.map((prompt) => prompt.toLowerCase());
  const state = { page: 0, chosen: [], group: null };
  for (const reason of new Set(answers.finish)) {
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
    byId("answers").replaceChildren(...visible.map((i) => makeEntry(answers, i, state.group == null ? siblings : null)));
    const many = answers.step.length.toLocaleString("en");
    byId("count").textContent = `${state.chosen.length.toLocaleString("en")} of ${many} answers`;
    byId("page-number").textContent = `page ${(state.page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
    byId("siblings-off").hidden = state.group == null;
  };
  const choose = () => {
    state.chosen = chosenAnswers(answers, lowered, form.elements, state.group);
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

/** The indices of the answers that the form asks for, in its order. */
function chosenAnswers(answers, lowered, fields, group) {
  const text = fields.text.value.toLowerCase();
  const ranges = Object.entries(FILTERS)
    .map(([name, column]) => [answers[column], bound(fields[`${name}-from`]), bound(fields[`${name}-to`])])
    .filter(([, from, to]) => from != null || to != null);
  const chosen = [];
  for (let i = 0; i < answers.step.length; i++) {
    if (group != null && answers.group[i] !== group) continue;
    if (text && !lowered[answers.prompt[i]].includes(text)) continue;
    if (fields.finish.value && answers.finish[i] !== fields.finish.value) continue;
    if (ranges.every(([column, from, to]) => within(column[i], from, to))) chosen.push(i);
  }
  const column = answers[fields.sort.value];
  const sign = fields.order.value === "up" ? 1 : -1;
  // What is not known comes last, whichever the order.
  return chosen.sort((a, b) => {
    if (column[a] == null || column[b] == null) return (column[a] == null) - (column[b] == null) || a - b;
    return sign * (column[a] - column[b]) || a - b;
  });
}

const bound = (field) => (field.value === "" ? null : Number(field.value));
const within = (value, from, to) => value != null && (from == null || value >= from) && (to == null || value <= to);

function makeEntry(answers, i, siblings) {
  const prompt = answers.prompt[i];
  const expert = answers.experts[prompt];
  const facts = [
    ["step", answers.step[i]], ["reward", answers.reward[i]], ["advantage", answers.advantage[i]],
    ["win rate", answers.win[i]], ["tokens", answers.tokens[i]],
  ].filter(([name, value]) => value != null || name === "reward");
  const header = html("header", {},
    ...facts.map(([name, value]) => html("span", {}, `${name} `, html("b", {}, formatNumber(value)))),
    html("span", {}, `ended by ${answers.finish[i]}`),
    ...answers.functions.map((name, f) => makeScore(name, answers.parts[f][i])));
  if (siblings) {
    const button = html("button", { type: "button" }, "All answers to this prompt, this step");
    button.addEventListener("click", () => siblings(answers.group[i]));
    header.append(button);
  }
  const pair = html("div", { class: "pair" }, makeText("Policy", "policy", answers.text[i]));
  if (expert != null) pair.append(makeText("Expert", "expert", expert));
  return html("article", { class: "answer" }, header, html("p", { class: "prompt text" }, answers.prompts[prompt]), pair);
}

function makeText(title, kind, text) {
  return html("div", { class: kind }, html("h4", {}, title), html("div", { class: "text" }, text || "(empty)"));
}

/** A function's own reward, with a tick or a cross where it is 1 or 0. */
function makeScore(name, value) {
  const short = name.split(":").at(-1);
  const marks = { 1: ["tick", "✓ "], 0: ["cross", "✕ "] };
  const [kind, mark] = marks[value] ?? ["", ""];
  return html("span", { class: kind, title: name }, `${mark}${short} ${value == null ? "does not apply" : formatNumber(value)}`);
}
