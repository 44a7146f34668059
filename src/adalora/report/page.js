// The page's data: runs, each with slug, names of modules, log, and figures by key (data and layout as plotly reads
// them, columns of the table behind them; `map` where ranks move with training).
const RUNS = JSON.parse(document.getElementById("data").textContent).runs;
const root = document.documentElement;
const figures = [...document.querySelectorAll("figure[data-figure]")];
const CONFIG = { responsive: true, displayModeBar: false, scrollZoom: false };

const figureOf = (element) => RUNS[element.dataset.run].figures[element.dataset.figure];
const nameOf = (element, ending) => `${RUNS[element.dataset.run].slug}-${element.dataset.figure}.${ending}`;

// --- paper, light or dark --------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = document.getElementById("theme");
let chosen = null; // by the reader, for as long as the page is open

function colours(theme) {
  const before = root.dataset.theme;
  root.dataset.theme = theme;
  const style = getComputedStyle(root);
  const found = (text) => text.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  const palette = Object.fromEntries(
    ["--paper", "--panel", "--ink", "--faint", "--rule", "--absent"].map((name) => [name, found(`var(${name})`)]),
  );
  const resolve = (value) => {
    if (typeof value === "string") return value.includes("var(--") ? found(value) : value;
    if (Array.isArray(value)) return value.some((item) => typeof item === "object" && item) ? value.map(resolve) : value;
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item)]));
    }
    return value;
  };
  const answer = { palette, resolve: (value) => {
    const now = root.dataset.theme;
    root.dataset.theme = theme;
    const resolved = resolve(value);
    root.dataset.theme = now;
    return resolved;
  } };
  root.dataset.theme = before;
  return answer;
}

function template(palette) {
  const axis = {
    gridcolor: palette["--rule"],
    linecolor: palette["--rule"],
    zerolinecolor: palette["--rule"],
    title: { font: { size: 12, color: palette["--faint"] } },
    tickfont: { size: 11.5 },
  };
  return {
    layout: {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: palette["--ink"] },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: axis,
      yaxis: axis,
      hoverlabel: { bgcolor: palette["--panel"], bordercolor: palette["--rule"], font: { color: palette["--ink"] } },
    },
  };
}

// Names are put into labels here, so that the page holds each of them once. Plotly reads tags and entities in them.
const forPlot = (name) =>
  `\u2068${name.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd")}\u2069`
    .replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function drawing(element, theme) {
  const { data, layout, map } = figureOf(element);
  const { palette, resolve } = colours(theme);
  const names = RUNS[element.dataset.run].names;
  const traces = resolve(data).map(({ modules, labels, ...trace }) => {
    if (modules) return { ...trace, text: modules.map((module) => forPlot(names[module])) };
    return labels ? { ...trace, text: labels.map(forPlot) } : trace;
  });
  if (map) Object.assign(traces[0], cellsAt(map, map.at));
  if (traces[0].numbered) {
    traces[0].showscale = !matchMedia("(max-width: 30rem)").matches; // the numbers say it, and a phone is narrow
    traces.push({ ...NUMBERS, ...numbersOf(traces[0].z, traces[0].zmax) });
  }
  const absent = traces[0].type === "heatmap" ? { plot_bgcolor: palette["--absent"] } : {};
  const named = traces.filter(({ showlegend }) => showlegend !== false).length > 1 || absent.plot_bgcolor;
  const margin = named ? layout.margin : { ...layout.margin, t: 12 };
  const touch = matchMedia("(pointer: coarse)").matches ? { dragmode: false } : {};
  return { data: traces, layout: { ...resolve(layout), margin, template: template(palette), ...absent, ...touch } };
}

function draw(element) {
  const { data, layout } = drawing(element, root.dataset.theme);
  const plot = element.querySelector(".plot");
  if ("paper" in root.dataset) layout.width = plot.clientWidth; // nothing will resize it there
  element.dataset.drawn = root.dataset.theme;
  return Plotly.react(plot, data, layout, CONFIG);
}

function setTheme() {
  root.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
  themeButton.setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
  figures.filter((element) => element.dataset.drawn).forEach(draw);
}

themeButton.addEventListener("click", () => {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  setTheme();
});
dark.addEventListener("change", setTheme);

// --- heat maps -------------------------------------------------------------------------------------

const NUMBERS = { type: "scatter", mode: "text", hoverinfo: "skip", showlegend: false };

// The number in each cell, dark where cividis is light.
function numbersOf(z, highest) {
  const cells = z.flatMap((row, y) => row.map((value, x) => ({ x, y, value }))).filter(({ value }) => value !== null);
  return {
    x: cells.map(({ x }) => x),
    y: cells.map(({ y }) => y),
    text: cells.map(({ value }) => String(value)),
    textfont: { size: 11, color: cells.map(({ value }) => (value / highest > 0.45 ? "#111111" : "#ffffff")) },
  };
}

// --- ranks over training ---------------------------------------------------------------------------

const rounded = (value) => Math.round(value * 10) / 10;

function cellsAt(map, at) {
  const start = map.ranks[0];
  const ranks = map.ranks[at];
  const z = [];
  const said = [];
  for (const row of map.cells) {
    const values = row.map((cell) => cell.map((module) => ranks[module]));
    z.push(values.map((cell) => (cell.length ? rounded(cell.reduce((a, b) => a + b, 0) / cell.length) : null)));
    said.push(values.map((cell, column) => {
      if (cell.length > 1) return `mean of ${cell.length}, from ${Math.min(...cell)} to ${Math.max(...cell)}`;
      return map.steps && cell.length ? `of ${start[row[column][0]]} at the start` : "";
    }));
  }
  return { z, customdata: said, hovertemplate: "layer %{x}, %{y}<br>rank %{z} %{customdata}<extra></extra>" };
}

function inWords(map, at) {
  const live = map.live[at];
  const budget = map.budgets[at].toLocaleString("en");
  const step = map.steps[at].toLocaleString("en");
  return `Step ${step}: budget ${budget} ${map.unit}, ${live.toLocaleString("en")} live`;
}

function player(element) {
  const { map } = figureOf(element);
  map.at = map.ranks.length - 1;
  const [button, slider, output] = ["button", "input", "output"].map((tag) => element.querySelector(`.player ${tag}`));
  if (!slider) return;
  let timer = null;

  const show = (at) => {
    map.at = at;
    slider.value = at;
    output.textContent = inWords(map, at);
    slider.setAttribute("aria-valuetext", output.textContent);
    if (!element.dataset.drawn) return;
    const plot = element.querySelector(".plot");
    const { z, customdata } = cellsAt(map, at);
    Plotly.restyle(plot, { z: [z], customdata: [customdata] }, [0]);
    if (plot.data.length > 1) {
      const { x, y, text, textfont } = numbersOf(z, plot.data[0].zmax);
      Plotly.restyle(plot, { x: [x], y: [y], text: [text], "textfont.color": [textfont.color] }, [1]);
    }
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
    output.setAttribute("aria-live", "polite");
  };
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    const last = map.ranks.length - 1;
    if (map.at === last) show(0);
    button.textContent = "Pause";
    output.setAttribute("aria-live", "off"); // a step every moment is too much to be read out
    timer = setInterval(() => {
      if (map.at + 1 === last) stop();
      show(map.at + 1);
    }, Math.max(60, Math.min(500, 9000 / last)));
  });
  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  show(map.at);
}

// --- buttons ---------------------------------------------------------------------------------------

for (const element of figures) {
  element.querySelector(".csv").addEventListener("click", () => saveCsv(nameOf(element, "csv"), dataOf(element)));
  element.querySelector(".svg").addEventListener("click", () => saveSvg(element));
  const details = element.querySelector("details");
  details.addEventListener("toggle", () => details.open && openTable(element, details));
  if (figureOf(element).map) player(element);
}

for (const sheet of document.querySelectorAll(".sheet")) {
  sheet.querySelector(".csv").addEventListener("click", () => {
    const rows = [...sheet.querySelectorAll("tr")].map((row) =>
      [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent));
    const panel = sheet.closest("[data-slug]");
    saveCsv(`${panel.dataset.slug}-${sheet.querySelector("table").dataset.csv}.csv`, rows);
  });
}

// --- several runs ----------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll('[role="tab"]')];

function choose(index) {
  tabs.forEach((tab, place) => {
    tab.setAttribute("aria-selected", String(place === index));
    tab.tabIndex = place === index ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = place !== index;
  });
  tabs[index].focus();
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => choose(index));
  tab.addEventListener("keydown", (event) => {
    const last = tabs.length - 1;
    const goal = { ArrowRight: index < last ? index + 1 : 0, ArrowLeft: index || last + 1, Home: 0, End: last }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    choose(event.key === "ArrowLeft" ? goal - 1 : goal);
  });
});

// --- drawing: what comes into view, and all of it for paper ----------------------------------------

setTheme();
const seen = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
    seen.unobserve(target);
    draw(target);
  }),
  { rootMargin: "300px" },
);
figures.forEach((element) => seen.observe(element));

addEventListener("beforeprint", () => {
  root.dataset.theme = "light";
  root.dataset.paper = "";
  figures.filter((element) => element.offsetParent).forEach(draw);
});
addEventListener("afterprint", () => {
  delete root.dataset.paper;
  setTheme();
  figures.filter((element) => element.offsetParent).forEach((element) => Plotly.Plots.resize(element.querySelector(".plot")));
});
