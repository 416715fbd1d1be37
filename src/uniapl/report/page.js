// The page: unpacks its data, draws the charts, starts the completion browser, switches the theme.

/** The value in a script element that holds compressed JSON (completions.pack). */
async function unpack(id) {
  const letters = atob(byId(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function startTheme() {
  const button = byId("theme");
  const names = { auto: "system", light: "light", dark: "dark" };
  // A page opened from a file may not be allowed to use localStorage.
  const stored = { get: () => localStorage.getItem("theme"), set: (name) => localStorage.setItem("theme", name) };
  const tried = (action, ...values) => { try { return action(...values); } catch { return null; } };
  let current = tried(stored.get) ?? "auto";
  const apply = () => {
    document.documentElement.dataset.theme = current;
    button.querySelector("span").textContent = current;
    button.setAttribute("aria-label", `Theme: ${names[current]}`);
  };
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    current = order[(order.indexOf(current) + 1) % order.length];
    tried(stored.set, current);
    apply();
  });
  apply();
}

function startCharts({ themes, analyses, stages }) {
  const charts = [];
  const add = (holder, chart) => {
    const made = makeChart(chart, stages);
    charts.push(made);
    holder.append(made.figure);
  };
  for (const theme of themes) {
    const holder = html("div", { class: "charts" });
    byId("themes").append(html("h3", {}, theme.title), holder);
    theme.charts.forEach((chart) => add(holder, chart));
  }
  analyses.forEach((chart) => add(byId("analysis-charts"), chart));
  const slider = byId("smoothing");
  const redraw = () => {
    const fraction = Number(slider?.value ?? 0);
    if (slider) byId("smoothing-value").textContent = `${Math.round(100 * fraction)} %`;
    charts.forEach((chart) => chart.redraw(fraction));
  };
  slider?.addEventListener("input", redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) redraw();
    width = innerWidth;
  });
  redraw();
}

async function start() {
  startTheme();
  // The completions are unpacked while the charts are drawn.
  const completions = byId("entries") && unpack("completions-data");
  startCharts(await unpack("data"));
  if (completions) startBrowser(await completions);
}

start();
