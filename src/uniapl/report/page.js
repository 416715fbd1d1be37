// The page: unpacks its data, draws the charts, starts the browser of answers, switches the theme.

/** The value in a script element that holds compressed JSON (completions.pack). */
async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function startTheme() {
  const button = byId("theme");
  const names = { auto: "as the system", light: "light", dark: "dark" };
  // A page that lies in a file may not be allowed to store anything.
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
    byId("smoothing-value").textContent = Number(slider.value).toFixed(2);
    charts.forEach((chart) => chart.redraw(Number(slider.value)));
  };
  slider.addEventListener("input", redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) redraw();
    width = innerWidth;
  });
  redraw();
}

async function start() {
  startTheme();
  startCharts(await unpack("data"));
  if (byId("answers")) startBrowser(await unpack("completions-data"));
}

start();
