"use strict";
// Charts: from a description (charts.py) to SVG, with a legend that also shows the values at the cursor.

const MARGIN = { left: 48, right: 12, top: 10, bottom: 34 };
const HEIGHT = 220;

/** An HTML element; data is inserted as text, never as markup. */
function html(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function formatNumber(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toFixed(size >= 1e7 ? 1 : 2)}M`;
  if (Number.isInteger(value) || size >= 1e4) return Math.round(value).toLocaleString("en");
  if (size < 1e-3) return value.toExponential(1);
  return value.toFixed(size >= 100 ? 1 : size >= 1 ? 2 : size >= 0.01 ? 3 : 4);
}

/** The window of the moving average in values, from a fraction of their number; 1 does not smooth. */
const smoothingWindow = (values, fraction) => Math.max(1, fraction * values.filter((value) => value != null).length);

/** Exponential moving average with bias correction, as analysis.smoothed; null stays null. */
function smoothed(values, fraction) {
  const weight = 1 - 1 / smoothingWindow(values, fraction);
  let total = 0;
  let mass = 0;
  return values.map((value) => {
    if (value == null) return null;
    total = weight * total + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return total / mass;
  });
}

/** Round numbers between two bounds. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function tickLabel(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toFixed(1)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toFixed(1)}k`;
  return size > 0 && size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(6));
}

function scale(low, high, from, to, log) {
  const place = log ? Math.log10 : (value) => value;
  const width = place(high) - place(low) || 1;
  return (value) => from + ((place(value) - place(low)) / width) * (to - from);
}

const dash = (index) => `d${index % 5}`;
const MARKERS = ["M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0", "M-4 -4H4V4H-4Z", "M0 -5L5 0L0 5L-5 0Z", "M0 -5L5 4H-5Z"];
const marker = (index) => MARKERS[index % MARKERS.length];
const color = (index) => index % 8;

/** The figure of a chart; `redraw` draws it with a window for smoothing at its current width. */
function makeChart(chart, stages) {
  const figure = html("figure", { class: "chart" });
  const legend = html("ul", { class: "legend" });
  const holder = html("div");
  const heading = html("header", {}, html("h4", {}, chart.title));
  const state = { log: false, smoothing: 0, index: null };
  const entries = entriesOf(chart);
  const draw = () => {
    const drawing = new Drawing(chart, entries, state, stages, holder.clientWidth || 340);
    const picture = drawing.make();
    // Points are too close for a cursor; a table has their values.
    if (chart.kind !== "points") listen(picture, drawing, state, () => showValues(legend, chart, entries, state));
    holder.replaceChildren(picture);
    showValues(legend, chart, entries, state);
  };
  if (chart.log) {
    const button = html("button", { type: "button", "aria-pressed": "false", class: "screen" }, "log");
    button.addEventListener("click", () => {
      state.log = !state.log;
      button.setAttribute("aria-pressed", state.log);
      draw();
    });
    heading.append(button);
  }
  figure.append(heading, holder, legend);
  if (chart.note) figure.append(html("p", { class: "note" }, chart.note));
  const redraw = (smoothing) => {
    state.smoothing = chart.smooth ? smoothing : 0;
    draw();
  };
  return { figure, redraw };
}

/** The entries of a chart of any kind, each with a label and with x and y of equal length. */
function entriesOf(chart) {
  if (chart.kind !== "histogram") return chart.lines;
  const x = chart.edges.slice(1).map((edge, i) => (edge + chart.edges[i]) / 2);
  return chart.groups.map((group) => ({ label: group.label, x, y: group.fractions }));
}

/** One picture: scales, axes and content. */
class Drawing {
  constructor(chart, entries, state, stages, width) {
    Object.assign(this, { chart, entries, state, stages, width });
    this.curves = entries.map((entry) => smoothed(entry.y, state.smoothing));
    const xs = entries.flatMap((entry) => [entry.x, entry.xlow ?? [], entry.xhigh ?? []].flat());
    let [left, right] = bounds(xs.concat(chart.edges ?? []).filter((x) => x != null));
    if (chart.kind === "points") {
      const room = ((right - left) || Math.abs(right) || 1) * 0.08;
      [left, right] = [left - room, right + room];
    }
    const [low, high] = this.verticalBounds();
    this.x = scale(left, right, MARGIN.left, width - MARGIN.right);
    this.y = scale(low, high, HEIGHT - MARGIN.bottom, MARGIN.top, state.log);
    this.ranges = { left, right, low, high };
  }

  verticalBounds() {
    const { chart, entries, state } = this;
    if (chart.kind === "stack") {
      const sums = entries[0].x.map((_, i) => this.curves.reduce((sum, values) => sum + (values[i] ?? 0), 0));
      return [0, Math.max(...sums) * 1.05 || 1];
    }
    if (chart.kind === "histogram") return [0, Math.max(...entries.flatMap((entry) => entry.y)) * 1.08 || 1];
    const extent = entries.flatMap(({ y, low, high }) => [y, low ?? [], high ?? []]).flat();
    const known = extent.filter((value) => value != null && (!state.log || value > 0));
    let [low, high] = bounds(known);
    if (state.log) return [low / 1.1, high * 1.1];
    if (low === high) [low, high] = low ? [low - Math.abs(low) / 2, high + Math.abs(high) / 2] : [0, 1];
    const room = (high - low) * 0.06;
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  make() {
    const { chart, width } = this;
    const picture = svg("svg", {
      viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": this.description(),
    });
    picture.append(...this.axes());
    for (const stage of this.stages.filter(() => chart.x === "step" && chart.kind !== "histogram")) {
      const x = this.x(stage.x);
      picture.append(
        svg("line", { class: "stage", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
        svg("text", { x: x + 3, y: MARGIN.top + 9 }, stage.label),
      );
    }
    const kinds = { lines: this.lines, stack: this.stack, histogram: this.bars, points: this.points };
    picture.append(...kinds[chart.kind].call(this));
    this.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    picture.append(this.cursor);
    return picture;
  }

  description() {
    const ends = this.entries.map(({ label, y }) => {
      const known = y.filter((value) => value != null);
      return `${label} from ${formatNumber(known[0])} to ${formatNumber(known.at(-1))}`;
    });
    return `${this.chart.title}, over ${this.chart.x}: ${ends.join("; ")}`;
  }

  axes() {
    const { chart, state, width } = this;
    const { left, right, low, high } = this.ranges;
    const bottom = HEIGHT - MARGIN.bottom;
    const parts = [svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom })];
    let levels = ticks(low, high, 4);
    if (state.log) {
      const powers = [];
      for (let p = Math.ceil(Math.log10(low)); p <= Math.log10(high); p++) powers.push(10 ** p);
      if (powers.length > 1) levels = powers.filter((_, i) => i % Math.ceil(powers.length / 6) === 0);
      else levels = levels.filter((level) => level > 0);
    }
    for (const level of levels) {
      const y = this.y(level);
      parts.push(
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, tickLabel(level)),
      );
    }
    for (const place of ticks(left, right, Math.max(2, Math.floor(width / 70)))) {
      if (place < left || place > right) continue;
      parts.push(svg("text", { x: this.x(place), y: bottom + 15, "text-anchor": "middle" }, tickLabel(place)));
    }
    parts.push(svg("text", { x: width - MARGIN.right, y: HEIGHT - 4, "text-anchor": "end" }, chart.x));
    if (chart.kind === "histogram") parts.push(svg("text", { x: 2, y: HEIGHT - 4 }, "fraction of completions"));
    else if (chart.y) parts.push(svg("text", { x: 2, y: HEIGHT - 4 }, chart.y));
    return parts;
  }

  lines() {
    const parts = [];
    this.entries.forEach((entry, i) => {
      if (entry.low) parts.push(svg("path", { class: `band f${color(i)}`, d: this.band(entry) }));
    });
    this.entries.forEach((entry, i) => {
      if (smoothingWindow(entry.y, this.state.smoothing) > 1) {
        parts.push(svg("path", { class: `line raw c${color(i)}`, d: this.path(entry.x, entry.y) }));
      }
    });
    this.entries.forEach((entry, i) => {
      parts.push(svg("path", { class: `line c${color(i)} ${dash(i)}`, d: this.path(entry.x, this.curves[i]) }));
      // A line with one point would be invisible.
      if (entry.x.length === 1) {
        parts.push(svg("circle", { class: `f${color(i)}`, cx: this.x(entry.x[0]), cy: this.y(entry.y[0]), r: 3 }));
      }
    });
    return parts;
  }

  path(xs, ys) {
    let text = "";
    let pen = "M";
    ys.forEach((value, i) => {
      if (value == null || (this.state.log && value <= 0)) {
        pen = "M";
        return;
      }
      text += `${pen}${this.x(xs[i]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
    });
    return text;
  }

  band(entry) {
    const floor = (value) => (this.state.log ? Math.max(value, this.ranges.low) : value);
    // A step that only one of several seeds has reached has no interval.
    const known = (values) => values.filter((_, i) => entry.low[i] != null);
    const [low, high] = [entry.low, entry.high].map(
      (side) => smoothed(known(side), this.state.smoothing).map(floor),
    );
    const xs = known(entry.x);
    const upper = this.path(xs, high);
    const lower = this.path([...xs].reverse(), [...low].reverse());
    return upper && `${upper}L${lower.slice(1)}Z`;
  }

  stack() {
    const base = this.entries[0].x.map(() => 0);
    return this.entries.map((entry, i) => {
      const below = [...base];
      this.curves[i].forEach((value, at) => { base[at] += value ?? 0; });
      const upper = this.path(entry.x, base);
      const lower = this.path([...entry.x].reverse(), below.reverse());
      return svg("path", { class: `area f${color(i)}`, d: `${upper}L${lower.slice(1)}Z` });
    });
  }

  bars() {
    const { edges } = this.chart;
    return this.entries.map((entry, i) => {
      let text = `M${this.x(edges[0]).toFixed(1)} ${this.y(0).toFixed(1)}`;
      entry.y.forEach((fraction, at) => {
        text += `V${this.y(fraction).toFixed(1)}H${this.x(edges[at + 1]).toFixed(1)}`;
      });
      text += `V${this.y(0).toFixed(1)}`;
      return svg("path", { class: `bars f${color(i)} c${color(i)} ${dash(i)}`, d: text });
    });
  }

  /** Labelled points with intervals in both directions, connected in order. */
  points() {
    return this.entries.flatMap((entry, i) => {
      const parts = [svg("path", { class: `line raw c${color(i)}`, d: this.path(entry.x, entry.y) })];
      entry.x.forEach((x, at) => {
        const [px, py] = [this.x(x), this.y(entry.y[at])];
        const whisker = { class: `whisker c${color(i)}` };
        if (entry.low[at] != null) parts.push(
          svg("line", { ...whisker, x1: this.x(entry.xlow[at]), x2: this.x(entry.xhigh[at]), y1: py, y2: py }),
          svg("line", { ...whisker, x1: px, x2: px, y1: this.y(entry.low[at]), y2: this.y(entry.high[at]) }),
        );
        parts.push(
          svg("path", { class: `f${color(i)}`, d: marker(i), transform: `translate(${px} ${py})` }),
          svg("text", { x: px + 6, y: py - 5 }, entry.names[at]),
        );
      });
      return parts;
    });
  }

  /** The index of the x of the longest entry that is nearest to the pointer. */
  nearest(clientX, picture) {
    const box = picture.getBoundingClientRect();
    const at = ((clientX - box.left) / box.width) * this.width;
    return nearestIndex(longest(this.entries).x.map(this.x), at);
  }

  point(index) {
    const x = index == null ? 0 : this.x(longest(this.entries).x[index]);
    filled(this.cursor, { x1: x, x2: x, visibility: index == null ? "hidden" : "visible" }, []);
  }
}

const bounds = (values) => values.reduce(
  ([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity],
);
const nearestIndex = (values, wanted) => values.reduce(
  (best, value, i) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best), 0,
);
const longest = (entries) => entries.reduce((best, entry) => (entry.x.length > best.x.length ? entry : best));

/** Pointer and arrow keys move the cursor; without a cursor the legend shows the last values. */
function listen(picture, drawing, state, show) {
  const move = (index) => {
    state.index = index;
    drawing.point(index);
    show();
  };
  const last = longest(drawing.entries).x.length - 1;
  const keys = {
    ArrowLeft: (at) => Math.max(0, (at ?? last + 1) - 1), ArrowRight: (at) => Math.min(last, (at ?? -1) + 1),
    Home: () => 0, End: () => last, Escape: () => null,
  };
  picture.addEventListener("pointermove", (event) => move(drawing.nearest(event.clientX, picture)));
  picture.addEventListener("pointerleave", () => move(null));
  picture.addEventListener("blur", () => move(null));
  picture.addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    move(keys[event.key](state.index));
  });
}

function showValues(legend, chart, entries, state) {
  const pointed = state.index != null;
  const place = pointed ? longest(entries).x[state.index] : null;
  const items = entries.map((entry, i) => {
    const at = pointed ? nearestIndex(entry.x, place) : entry.y.findLastIndex((value) => value != null);
    const quiet = !pointed && chart.kind !== "lines" && chart.kind !== "stack";
    const value = at < 0 || quiet ? null : entry.y[at];
    const samples = {
      stack: () => svg("rect", { class: `f${color(i)}`, x: 6, width: 12, height: 8 }),
      points: () => svg("path", { class: `f${color(i)}`, d: marker(i), transform: "translate(12 5)" }),
    };
    const line = () => svg("line", { class: `line c${color(i)} ${dash(i)}`, x1: 0, x2: 24, y1: 4, y2: 4 });
    const sample = (samples[chart.kind] ?? line)();
    const key = svg("svg", { viewBox: "0 0 24 10", "aria-hidden": "true" }, sample);
    return html("li", {}, key, entry.label, value == null ? null : html("b", {}, formatNumber(value)));
  });
  if (pointed) items.push(html("li", { class: "where", "aria-live": "polite" }, `${chart.x} ${formatNumber(place)}`));
  legend.replaceChildren(...items);
}
