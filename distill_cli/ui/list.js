// The list of runs: sorted, filtered, chosen for a comparison, and kept up to date.
"use strict";

const COLUMNS = [ // title, what it is sorted by, and its cell: one line, or two
  { name: "run", of: (line) => line.title, show: showName },
  { name: "state", of: (line) => line.state, show: showState },
  { name: "model", of: (line) => line.student, show: (line) => [line.student, line.teacher && `from ${line.teacher}`] },
  { name: "loss", of: (line) => line.loss, show: (line) => [line.loss] },
  { name: "accuracy", of: (line) => line.after, show: showAccuracy },
  { name: "KL forward", of: (line) => line.kl, show: (line) => [line.kl === null ? "" : line.kl.toPrecision(3), line.is_sweep && line.kl !== null && "lowest"] },
  { name: "began", of: (line) => line.began, show: (line) => [line.began === null ? "" : moment(line.began)] },
  { name: "time", of: (line) => line.lasted, show: (line) => [line.lasted === null ? "" : clock(line.lasted), line.is_sweep && line.lasted !== null && "in all"] },
];
const HIGH_FIRST = ["accuracy", "began", "time"]; // how a first click sorts
const READING = "being read"; // the state of a run whose line comes later
const MANY = 20; // runs of a sweep that is closed at first
const LIMIT = 100; // runs of a comparison: more make too long an address
const body = document.querySelector("#runs tbody");
const search = document.getElementById("filter");
const kept = { sort: "began", down: true, filter: "", folds: {}, ...JSON.parse(sessionStorage.getItem("list") ?? "{}") };
const chosen = new Set(); // names of runs
const rows = new Map(); // by name: the row on the page, and what it was made of
let groups = []; // a single run, or a sweep with its runs
let text = "";

function clock(seconds) {
  const [whole, two] = [Math.round(seconds), (number) => String(number).padStart(2, "0")];
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
}

const percent = (share) => (share === null ? "?" : `${(100 * share).toFixed(1)}%`);

function showAccuracy(line) {
  if (line.is_sweep) return line.after === null ? [""] : [percent(line.after), "best"];
  if (line.before === null && line.after === null) return [""];
  const now = line.after === null ? percent(line.before) : line.before === null ? percent(line.after) : `${percent(line.before)} → ${percent(line.after)}`;
  return [now, line.goal === null ? "" : `teacher ${percent(line.goal)}`];
}

function showState(line) {
  if (line.problem) return [element("span", { class: "wrong" }, "unreadable"), line.problem];
  if (line.state !== "running") return [line.state, line.step && line.state !== "finished" ? `step ${line.step}` : ""];
  const left = line.left === null ? "" : `, ${clock(line.left)} left`;
  const bar = line.num_steps ? [element("progress", { max: line.num_steps, value: line.step, "aria-label": "steps" })] : [];
  return [element("span", { class: "going" }, "running ", ...bar), `step ${line.step}${line.num_steps ? `/${line.num_steps}` : ""}${left}`];
}

function showName(line) {
  const name = line.has_page ? element("a", { href: `report?${line.query}` }, line.title) : line.title;
  if (!line.is_sweep) return [name];
  const isOpen = line.isOpen;
  const fold = element("button", { class: "fold", "aria-expanded": isOpen, "aria-label": `runs of ${line.title}` }, isOpen ? "▾" : "▸");
  return [element("span", {}, fold, name), line.keys.length ? `sweep over ${line.keys.join(", ")}` : "sweep"];
}

// Return the line of a sweep with what is known of its runs: the best accuracy, the lowest KL, the first beginning.
function summary(sweep, runs) {
  const of = (key) => runs.map((run) => run[key]).filter((value) => value !== null);
  const states = [...new Set(runs.map((run) => run.state || "unreadable"))];
  const most = (values, pick) => (values.length ? pick(...values) : null);
  return {
    ...sweep,
    state: states.map((state) => `${runs.filter((run) => (run.state || "unreadable") === state).length} ${state}`).join(", "),
    student: [...new Set(runs.map((run) => run.student).filter(Boolean))].join(", "),
    teacher: [...new Set(runs.map((run) => run.teacher).filter(Boolean))].join(", "),
    loss: [...new Set(runs.map((run) => run.loss).filter(Boolean))].join(", "),
    before: null, after: most(of("after"), Math.max), kl: most(of("kl"), Math.min), began: most(of("began"), Math.min),
    step: 0, lasted: most(of("lasted"), (...times) => times.reduce((sum, time) => sum + time, 0)),
  };
}

function grouped(lines) {
  const runsOf = Map.groupBy(lines.filter((line) => line.sweep), (line) => line.sweep);
  return lines.filter((line) => !line.sweep).map((line) => {
    const runs = line.is_sweep ? runsOf.get(line.name) ?? [] : [];
    return { line: line.is_sweep ? summary(line, runs) : line, runs };
  });
}

function inOrder(lines) {
  const { of } = COLUMNS.find((column) => column.name === kept.sort);
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
  const isMissing = (value) => value === null || value === "";
  return [...lines].sort((a, b) => {
    const [x, y] = [of(a.line), of(b.line)];
    if (isMissing(x) || isMissing(y)) return isMissing(x) - isMissing(y);
    return kept.down ? compare(y, x) : compare(x, y);
  });
}

function isShown(line, sweep) {
  const has = [line, sweep ?? {}].flatMap((one) => [one.name, one.title, one.state, one.student, one.teacher, one.loss, one.problem]).join(" ").toLowerCase();
  return kept.filter.toLowerCase().split(/\s+/).every((word) => has.includes(word));
}

// Return the rows to show, in order: a sweep before its runs.
function wanted() {
  return inOrder(groups).flatMap(({ line, runs }) => {
    if (!line.is_sweep) return isShown(line) ? [line] : [];
    const shown = runs.filter((run) => isShown(run, line));
    if (!shown.length && !isShown(line)) return [];
    const isOpen = kept.folds[line.name] ?? (runs.length <= MANY || kept.filter !== "");
    return [{ ...line, isOpen }, ...(isOpen ? inOrder(shown.map((run) => ({ line: run }))).map((one) => one.line) : [])];
  });
}

function makeRow(line) {
  const pick = element("input", { type: "checkbox", "aria-label": `compare ${line.title}` });
  const cells = COLUMNS.map(({ name, show }) => {
    const [first, second] = show(line);
    return element("td", { "data-column": name }, first ?? "", ...(second ? [element("small", {}, second)] : []));
  });
  return element("tr", { class: line.is_sweep ? "sweep" : line.sweep ? "part" : "", "data-name": line.name, title: line.name }, element("td", { class: "pick" }, pick), ...cells);
}

function draw() {
  const lines = wanted();
  let at = body.firstChild;
  for (const line of lines) {
    const made = JSON.stringify(line);
    let row = rows.get(line.name);
    if (!row) rows.set(line.name, (row = { made, tr: makeRow(line) }));
    else if (row.made !== made) {
      morph(row.tr, makeRow(line));
      row.made = made;
    }
    if (row.tr === at) at = at.nextSibling;
    else body.insertBefore(row.tr, at);
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
  drawChoice();
  drawHead();
  const number = groups.reduce((sum, { line, runs }) => sum + (line.is_sweep ? runs.length : 1), 0);
  const shown = lines.filter((line) => !line.is_sweep).length;
  document.getElementById("count").textContent = shown === number ? `${number} runs` : `${shown} of ${number} runs shown`;
  const none = document.getElementById("none");
  none.hidden = lines.length > 0;
  none.textContent = groups.length ? "No run matches the filter." : "No runs yet: they appear here when they start.";
}

function drawHead() {
  const cells = [...document.querySelectorAll("#runs thead th")].slice(1);
  COLUMNS.forEach(({ name }, place) => {
    const isSorted = kept.sort === name;
    cells[place].setAttribute("aria-sort", !isSorted ? "none" : kept.down ? "descending" : "ascending");
    cells[place].firstChild.textContent = name + (!isSorted ? "" : kept.down ? " ↓" : " ↑");
  });
}

function membersOf(name) {
  const group = groups.find(({ line }) => line.name === name);
  return (group?.line.is_sweep ? group.runs : [{ name, has_page: true }]).filter((run) => run.has_page).map((run) => run.name);
}

// Mark what is chosen. A sweep is chosen if all of its runs are.
function drawChoice() {
  const known = new Set(groups.flatMap(({ line, runs }) => [line, ...runs]).filter((line) => line.has_page).map((line) => line.name));
  chosen.forEach((name) => known.has(name) || chosen.delete(name));
  for (const tr of body.children) {
    const [pick, members] = [tr.querySelector("input"), membersOf(tr.dataset.name)];
    const number = members.filter((name) => chosen.has(name)).length;
    pick.disabled = !members.some((name) => known.has(name));
    pick.checked = number > 0 && number === members.length;
    pick.indeterminate = number > 0 && number < members.length;
  }
  const compare = document.getElementById("compare");
  const tooMany = comparison().length > LIMIT;
  compare.disabled = chosen.size < 2 || tooMany;
  compare.textContent = tooMany ? `Choose at most ${LIMIT} to compare` : chosen.size < 2 ? "Choose runs to compare" : `Compare ${chosen.size} runs`;
  document.getElementById("clear").hidden = !chosen.size;
}

// Return what the address of the comparison names: a sweep by itself if all of its runs are chosen.
function comparison() {
  return groups.flatMap(({ line, runs }) => {
    const parts = line.is_sweep ? runs.filter((run) => chosen.has(run.name)) : chosen.has(line.name) ? [line] : [];
    return line.is_sweep && parts.length && parts.length === membersOf(line.name).length ? [line.query] : parts.map((run) => run.query);
  });
}

function keep() {
  sessionStorage.setItem("list", JSON.stringify(kept));
  draw();
}

function sortBy(name) {
  kept.down = kept.sort === name ? !kept.down : HIGH_FIRST.includes(name);
  kept.sort = name;
  keep();
}

body.addEventListener("change", (event) => {
  const members = membersOf(event.target.closest("tr").dataset.name);
  members.forEach((name) => (event.target.checked ? chosen.add(name) : chosen.delete(name)));
  drawChoice();
});
body.addEventListener("click", (event) => {
  const fold = event.target.closest(".fold");
  if (!fold) return;
  kept.folds[fold.closest("tr").dataset.name] = fold.getAttribute("aria-expanded") !== "true";
  keep();
});
search.value = kept.filter;
search.addEventListener("input", () => { kept.filter = search.value.trim(); keep(); });
document.getElementById("compare").addEventListener("click", () => { location.href = `report?${comparison().join("&")}`; });
document.getElementById("clear").addEventListener("click", () => { chosen.clear(); drawChoice(); });
document.querySelector("#runs thead tr").append(...COLUMNS.map(({ name }) => element("th", { scope: "col" }, element("button", { class: "sort", onclick: () => sortBy(name) }, name))));

follow(async () => {
  const newest = await (await ask("lines")).text();
  if (newest === text) return false;
  text = newest;
  const { root, lines } = JSON.parse(text);
  document.getElementById("root").textContent = root;
  groups = grouped(lines);
  const names = new Set(lines.map((line) => line.name));
  rows.forEach((_, name) => names.has(name) || rows.delete(name));
  draw();
  const going = lines.filter((line) => line.state === "running").length;
  document.title = `${going ? `${going} running - ` : ""}runs - distill`;
  document.documentElement.dataset.drawn = lines.length;
  return lines.some((line) => line.state === READING);
});
