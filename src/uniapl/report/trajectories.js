// Completions with tools: the turns that were written and the results that were given (trajectories.py).

const FOLDED_CHARACTERS = 600;
const STATES = {
  answered: ["tick", "✓ answered"],
  failed: ["cross", "✕ failed"],
  unanswered: ["cross", "✕ unanswered: after the last iteration"],
  unread: ["cross", "✕ result not read: the completion had no room for it"],
};

/** The turns of the policy or of a demonstration, those that are trained marked by a label, a color and a line. */
function makeTurns(title, turns, trained) {
  const label = `✎ ${title} wrote: ${trained}`;
  const items = turns.map((turn) => (turn.given == null ? makeWritten(label, turn) : makeGiven(title, turn)));
  return html("ol", { class: "turns" }, ...items);
}

function makeWritten(label, turn) {
  const calls = turn.calls.map(([name, values, state]) => {
    const [mark, words] = STATES[state];
    return html("li", {}, "call ", html("code", {}, visible(name)), " ", html("code", {}, visible(values)), " ", html("span", { class: mark }, words));
  });
  return html("li", { class: "wrote" }, html("p", { class: "who" }, label),
    turn.thought ? makeFolded("thought", turn.thought) : null,
    turn.text || !turn.thought ? html("div", { class: "text" }, visible(turn.text) || "(empty)") : null,
    calls.length ? html("ul", { class: "calls" }, ...calls) : null,
    turn.malformed ? html("p", { class: "cross" }, "✕ malformed: begins a call that cannot be read") : null);
}

function makeGiven(title, turn) {
  const label = `⊘ ${title} read: not trained`;
  const what = turn.title ? `result of ${visible(turn.title)}` : "given text";
  return html("li", { class: "read" }, html("p", { class: "who" }, label), makeFolded(what, turn.given));
}

/** A text after its name; a long one is folded. A text that scrolls can be focused, so that keys scroll it. */
function makeFolded(name, text) {
  const shown = visible(text);
  if (text.length <= FOLDED_CHARACTERS) return html("div", {}, html("p", { class: "name" }, name), html("div", { class: "text" }, shown));
  const summary = html("summary", {}, `${name}, ${text.length.toLocaleString("en")} characters`);
  return html("details", {}, summary, html("div", { class: "text", tabindex: "0", role: "region", "aria-label": name }, shown));
}

/** Control characters as their numbers: a browser shows them as nothing, or turns the text after them around. */
function visible(text) {
  const number = (control) => control.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
  return text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (control) => `⟨U+${number(control)}⟩`);
}

/** The counts of tool calls for the header of an entry; nothing for a completion without tools. */
function makeToolCounts(counts) {
  if (counts == null) return [];
  const [calls, ...wrong] = counts;
  const names = ["failed", "malformed", "unanswered"];
  return [html("span", {}, "tool calls ", html("b", {}, String(calls))),
    ...wrong.flatMap((count, n) => (count ? [html("span", { class: "cross" }, `✕ ${names[n]} ${count}`)] : []))];
}
