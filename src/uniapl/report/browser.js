// The completion browser: filters, sorting, and pages of entries.

const PAGE_SIZE = 20;
const FILTERS = { step: "step", reward: "reward", win: "win" };

/** Connects the form with the completions, which are columns (completions.as_columns). */
function startBrowser(completions) {
  const form = document.getElementById("filters");
  const lowered = completions.prompts.map((prompt) => prompt.toLowerCase());
  const sizes = countOf(completions.group);
  const state = { page: 0, pages: [[]], prompt: null };
  for (const reason of new Set(completions.finish)) {
    form.elements.finish.append(html("option", { value: reason }, reason));
  }

  const show = () => {
    const onlyPrompt = (prompt) => {
      state.prompt = prompt;
      choose();
    };
    const entries = state.pages[state.page].map(([group, members]) =>
      makeEntry(completions, members, sizes.get(group), state.prompt == null ? onlyPrompt : null));
    byId("entries").replaceChildren(...entries);
    byId("page-number").textContent = `page ${formatNumber(state.page + 1)} of ${formatNumber(state.pages.length)}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === state.pages.length - 1;
    byId("all-prompts").hidden = state.prompt == null;
  };
  const choose = () => {
    const chosen = chosenCompletions(completions, lowered, form.elements, state.prompt);
    const many = [chosen.length, completions.step.length].map((count) => count.toLocaleString("en"));
    byId("count").textContent = `${many[0]} of ${many[1]} completions`;
    state.pages = pagesOf(grouped(chosen, completions.group));
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
  byId("all-prompts").addEventListener("click", () => {
    state.prompt = null;
    choose();
  });
  choose();
}

/** How often each value occurs. */
function countOf(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return counts;
}

/** The chosen completions by their prompt and step; the group of the first one comes first. */
function grouped(chosen, groups) {
  const found = new Map();
  for (const i of chosen) {
    if (!found.has(groups[i])) found.set(groups[i], []);
    found.get(groups[i]).push(i);
  }
  return [...found];
}

/** Pages of whole groups with at least PAGE_SIZE completions each, except for the last one. */
function pagesOf(groups) {
  const pages = [[]];
  let size = 0;
  for (const group of groups) {
    if (size >= PAGE_SIZE) {
      pages.push([]);
      size = 0;
    }
    pages.at(-1).push(group);
    size += group[1].length;
  }
  return pages;
}

const byId = (id) => document.getElementById(id);

/** The sorted indices of the completions that match the form. */
function chosenCompletions(completions, lowered, fields, prompt) {
  const text = fields.text.value.toLowerCase();
  const ranges = Object.entries(FILTERS)
    .map(([name, column]) => [completions[column], bound(fields[`${name}-from`]), bound(fields[`${name}-to`])])
    .filter(([, from, to]) => from != null || to != null);
  const chosen = [];
  for (let i = 0; i < completions.step.length; i++) {
    if (prompt != null && completions.prompt[i] !== prompt) continue;
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

/** A prompt in a step: the demonstration and the completions that match the form. */
function makeEntry(completions, members, size, onlyPrompt) {
  const first = members[0];
  const prompt = completions.prompt[first];
  const expert = completions.experts[prompt];
  const count = members.length === size ? `${size}` : `${members.length} of ${size}`;
  const header = html("header", {},
    html("span", {}, "step ", html("b", {}, formatNumber(completions.step[first]))),
    html("span", {}, `${count} completion${size === 1 ? "" : "s"}`),
    completions.replaced[first] ? html("span", {}, "replaced, not trained") : null);
  if (onlyPrompt && completions.prompt.some((other, i) => other === prompt && completions.group[i] !== completions.group[first])) {
    const button = html("button", { type: "button" }, "This prompt in all steps");
    button.addEventListener("click", () => onlyPrompt(prompt));
    header.append(button);
  }
  const answers = html("div", { class: "answers" },
    expert == null ? null : html("div", { class: "expert" }, html("h4", {}, "Expert"),
      makeContent("Expert", completions.expert_turns?.[prompt], "trained where mu > 0", expert)),
    ...members.map((i) => makeAnswer(completions, i)));
  return html("article", { class: "entry" }, header, html("p", { class: "prompt text" }, completions.prompts[prompt]), answers);
}

/** A completion below its values. */
function makeAnswer(completions, i) {
  const reward = completions.reward[i];
  const scores = completions.functions.map((name, f) => [name, completions.parts[f][i]]);
  // The value of the only function usually is the reward.
  const single = scores.length === 1 && scores[0][1] === reward;
  const facts = [
    ["advantage", completions.advantage[i]], ["win rate", completions.win[i]], ["tokens", completions.tokens[i]],
  ].filter(([, value]) => value != null);
  const header = html("header", {},
    single ? makeScore(scores[0][0], reward, "reward") : html("span", {}, "reward ", html("b", {}, formatNumber(reward))),
    ...facts.map(([name, value]) => html("span", {}, `${name} `, html("b", {}, formatNumber(value)))),
    html("span", {}, `finish reason ${completions.finish[i]}`),
    ...makeToolCounts(completions.tools?.[i]),
    ...(single ? [] : scores.map(([name, value]) => makeScore(name, value))));
  const trained = completions.replaced[i] ? "not trained, replaced" : "trained";
  return html("div", { class: "policy" }, header, makeContent("Policy", completions.turns?.[i], trained, completions.text[i]));
}

/** Turns, if there are any, or the text. */
function makeContent(title, turns, trained, text) {
  return turns ? makeTurns(title, turns, trained) : html("div", { class: "text" }, text || "(empty)");
}

/** The value of a reward function, with a tick for 1 and a cross for 0. */
function makeScore(name, value, shown = name.split(":").at(-1)) {
  const [kind, mark] = { 1: ["tick", "✓ "], 0: ["cross", "✕ "] }[value] ?? ["", ""];
  return html("span", { class: kind, title: name }, `${mark}${shown} `, html("b", {}, value == null ? "none" : formatNumber(value)));
}
