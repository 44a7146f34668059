"use strict";

// The data behind a figure, as a table in the page and as files. Joined with page.js, which declares RUNS and figureOf.

function rowsOf(columns, run) {
  const values = columns.map(({ values, ofModules }) => (ofModules ? values.map((at) => run.names[at]) : values));
  const rows = (values[0] ?? []).map((_, index) => values.map((column) => column[index]));
  return [columns.map(({ title }) => title), ...rows];
}

function dataOf(element) {
  const run = RUNS[element.dataset.run];
  const { columns, map } = figureOf(element);
  if (map?.steps) { // every matrix at every ranking
    const rows = map.steps.map((step, at) => [step, map.budgets[at], ...map.ranks[at]]);
    return [["step", "budget", ...run.names], ...rows];
  }
  if (element.dataset.figure === "loss") {
    const titles = [...new Set(run.log.flatMap(Object.keys))];
    return [titles, ...run.log.map((entry) => titles.map((title) => entry[title]))];
  }
  return rowsOf(columns, run);
}

// A spreadsheet would run a text that begins like a formula; a number is none.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  let text = String(value);
  const isNumber = typeof value === "number" || /^[-+]?\d+(\.\d+)?(e[-+]?\d+)?$/i.test(text);
  if (/^[=+\-@\t\r]/.test(text) && !isNumber) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

function save(name, content, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveCsv(name, rows) {
  save(name, `\ufeff${rows.map((row) => row.map(csvCell).join(",")).join("\r\n")}\r\n`, "text/csv;charset=utf-8");
}

const shown = (value) =>
  typeof value !== "number" ? String(value ?? "–") :
    Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

function gridNow(element) {
  const { map } = figureOf(element);
  const { z } = cellsAt(map, map.at);
  return [["module", ...map.layers], ...map.kinds.map((kind, index) => [kind, ...z[index]])];
}

function table(rows, caption) {
  const made = document.createElement("table");
  made.createCaption().textContent = caption;
  const cell = (row, value, scope) => {
    const one = document.createElement(scope ? "th" : "td");
    if (scope) one.scope = scope;
    if (typeof value === "number") one.className = "number";
    const text = document.createElement("bdi");
    text.textContent = shown(value);
    one.append(text);
    row.append(one);
  };
  const head = made.createTHead().insertRow();
  rows[0].forEach((title) => cell(head, title, "col"));
  const body = made.createTBody();
  for (const values of rows.slice(1)) {
    const row = body.insertRow();
    values.forEach((value, index) => cell(row, value, index ? null : "row"));
  }
  return made;
}

function openTable(element, details) {
  const { map, columns } = figureOf(element);
  const rows = map ? gridNow(element) : rowsOf(columns, RUNS[element.dataset.run]);
  const caption = element.querySelector(".name").textContent;
  const place = document.createElement("div");
  place.className = "scroll";
  place.tabIndex = 0;
  place.append(table(rows, map?.steps ? `${caption}, ${inWords(map, map.at).split(":")[0].toLowerCase()}` : caption));
  details.querySelector(".scroll")?.remove();
  details.append(place);
}

async function saveSvg(element) {
  const { data, layout } = drawing(element, "light"); // for paper
  const box = element.querySelector(".plot").getBoundingClientRect();
  const size = { width: Math.round(box.width), height: Math.round(box.height) };
  const url = await Plotly.toImage({ data, layout: { ...layout, paper_bgcolor: "#ffffff" } }, { format: "svg", ...size });
  save(nameOf(element, "svg"), decodeURIComponent(url.slice(url.indexOf(",") + 1)), "image/svg+xml");
}
