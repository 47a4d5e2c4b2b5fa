// Draw the figures and the disagreement view. Texts of models and data become text nodes, never markup.
"use strict";

const SMALL = 1e-3; // nats: below this a token is not coloured
const LOOKS = {
  light: {
    paper: "#ffffff", ink: "#1b1f24", muted: "#667080", grid: "#e9ecf0", rule: "#c9d0d8",
    hues: ["#2a6fdb", "#d9722a", "#1a8f5a", "#8a4fd0", "#c2417c", "#2b98a8", "#8c6d1f", "#6b7280", "#b3261e", "#4b5ab5"],
  },
  dark: {
    paper: "#14171b", ink: "#e4e7eb", muted: "#98a2b0", grid: "#262b32", rule: "#3a424c",
    hues: ["#7fb0ff", "#ff9d57", "#5fd39a", "#c39bff", "#ff85b8", "#6fd3e3", "#dcbf64", "#a3adba", "#ff8a80", "#9fb0ff"],
  },
};
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children); // strings become text nodes
  return made;
}

async function readData() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function look() {
  const now = dark.matches ? LOOKS.dark : LOOKS.light;
  const label = { labelColor: now.muted, titleColor: now.muted, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400 };
  return {
    background: null,
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    view: { stroke: null },
    params: [{ name: "muted", value: now.muted }, { name: "paper", value: now.paper }],
    axis: { ...label, gridColor: now.grid, domainColor: now.rule, tickColor: now.rule, labelLimit: 200, titlePadding: 10 },
    axisX: { grid: false },
    legend: { ...label, orient: "top", symbolType: "stroke", symbolStrokeWidth: 3, offset: 6, labelLimit: 420, columns: 5, labelColor: now.ink },
    range: { category: now.hues },
    line: { strokeWidth: 1.8 },
    mark: { color: now.hues[0] },
    text: { color: now.ink, fontSize: 12 },
  };
}

let views = []; // the Vega views of the figures now on the page

function drawCharts(data) {
  const options = { actions: false, renderer: "svg", ast: false, tooltip: { theme: dark.matches ? "dark" : "light" } };
  return Promise.all(data.charts.map((chart) => {
    const spec = { width: "container", ...chart.spec, autosize: { type: "fit-x", contains: "padding" }, datasets: data.datasets };
    spec.params = [{ name: "chosen", value: "" }];
    const place = document.getElementById("chart-" + chart.id);
    return vegaEmbed(place, spec, { ...options, config: look() });
  })).then((drawn) => { views = drawn.map((each) => each.view); });
}

// One legend for all figures: a click highlights a run in each of them, a second click shows all again.
function drawLegend(runs) {
  const { hues } = dark.matches ? LOOKS.dark : LOOKS.light;
  const buttons = runs.map((run, at) => element("button", { "aria-pressed": false }, element("i", { style: `background: ${hues[at % hues.length]}` }), run));
  buttons.forEach((button, at) => button.addEventListener("click", () => {
    const chosen = button.getAttribute("aria-pressed") === "true" ? "" : runs[at];
    buttons.forEach((other, place) => other.setAttribute("aria-pressed", runs[place] === chosen));
    views.forEach((view) => view.signal("chosen", chosen).run());
  }));
  document.getElementById("legend").replaceChildren(...buttons);
}

// ---- the disagreement view

const shown = { run: 0, measure: "kl_forward", prompt: 0, steps: new Set(), aim: null };

function visible(text) {
  if (text === "") return element("span", { class: "ws" }, "∅");
  if (!/^\s+$/.test(text)) return document.createTextNode(text);
  return element("span", { class: "ws" }, text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥"));
}

function oneLine(text) {
  return text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

function percent(logp) {
  const p = Math.exp(logp);
  return p >= 0.9995 ? "100%" : p >= 0.001 ? (100 * p).toFixed(1) + "%" : p.toExponential(0);
}

function colour(value, scale) {
  if (!(value > SMALL)) return "transparent";
  return `rgba(var(--heat), ${Math.min(Math.sqrt(value / scale), 1) * 0.78})`;
}

function answersOf(samples) {
  return samples.answers.filter((answer) => answer.run === shown.run);
}

function stepsOf(samples) {
  return [...new Set(answersOf(samples).map((answer) => answer.step))].sort((a, b) => a - b);
}

function drawSamples(samples) {
  const steps = stepsOf(samples);
  if (![...shown.steps].some((step) => steps.includes(step))) shown.steps = new Set([steps[0], steps.at(-1)]);
  const last = steps.at(-1);
  const byPrompt = samples.prompts.map((prompt, number) => ({ ...prompt, number, answers: answersOf(samples).filter((a) => a.prompt === number) }));
  const mean = (prompt, step) => prompt.answers.find((answer) => answer.step === step)?.mean ?? 0;
  const ordered = byPrompt.filter((prompt) => prompt.answers.length).sort((a, b) => mean(b, last) - mean(a, last));
  if (!ordered.some((prompt) => prompt.number === shown.prompt) || shown.aim === "worst") shown.prompt = ordered[0].number;

  const list = document.getElementById("prompts");
  list.replaceChildren(...ordered.map((prompt) => element(
    "li",
    { role: "option", "aria-selected": prompt.number === shown.prompt, onclick: () => { shown.prompt = prompt.number; shown.aim = null; drawSamples(samples); } },
    element("span", { class: "text" }, prompt.name),
    element("span", { class: "kls" }, `KL ${[...new Set([steps[0], last])].map((step) => mean(prompt, step).toPrecision(2)).join(" → ")}`, ...rewards(prompt.answers, steps[0], last)),
  )));

  const chosen = byPrompt[shown.prompt];
  const answers = chosen.answers.filter((answer) => shown.steps.has(answer.step)).sort((a, b) => a.step - b.step);
  document.getElementById("answers").replaceChildren(
    element("div", { class: "prompt-text" }, chosen.text.trim()),
    ...answers.map((answer) => drawAnswer(samples, answer)),
  );
  document.getElementById("steps").replaceChildren("steps ", ...steps.map((step) => element(
    "button",
    { "aria-pressed": shown.steps.has(step), onclick: () => { shown.steps.has(step) && shown.steps.size > 1 ? shown.steps.delete(step) : shown.steps.add(step); drawSamples(samples); } },
    step === 0 ? "0, before" : String(step),
  )));
  const stops = [0.05, 0.25, 0.5, 1].map((share) => colour(share * samples.scale, samples.scale)).join(", ");
  document.getElementById("scale").replaceChildren("0 ", element("i", { style: `background: linear-gradient(90deg, transparent, ${stops})` }), ` ${samples.scale.toPrecision(2)} nats and more`);
}

function reward(answer) {
  if (answer?.reward == null) return [];
  return ["  ", element("span", { class: answer.reward > 0 ? "right" : "wrong" }, answer.reward === 1 ? "right" : answer.reward === 0 ? "wrong" : `reward ${answer.reward}`)];
}

function rewards(answers, first, last) {
  const [before, after] = [first, last].map((step) => answers.find((answer) => answer.step === step));
  const changed = first !== last && before?.reward != null && before.reward !== after?.reward;
  return changed ? [...reward(before), " →", ...reward(after)] : reward(after);
}

function drawAnswer(samples, answer) {
  const tokens = answer.tokens.map((number, at) => {
    const made = element("span", { class: "t", style: `background: ${colour(answer[shown.measure][at], samples.scale)}` }, visible(samples.tokens[number]));
    if (shown.aim && shown.aim.step === answer.step && shown.aim.position === at) made.classList.add("aim");
    if (!answer.student_top[at].length) made.classList.add("read");
    made.addEventListener("pointerenter", (event) => showTip(samples, answer, at, event.currentTarget));
    made.addEventListener("pointerleave", hideTip);
    return made;
  });
  const cut = answer.tokens.length < answer.length ? `, the first ${answer.tokens.length} shown` : "";
  const ended = answer.finish === "length" ? ", cut off at its length limit" : "";
  return element(
    "div", { class: "answer" },
    element("header", {}, element("b", {}, answer.step === 0 ? "before training" : `after step ${answer.step}`), `  ${answer.length} tokens${cut}${ended}, mean KL forward ${answer.mean.toPrecision(3)}`, ...reward(answer)),
    element("div", { class: "tokens" }, ...tokens),
  );
}

function topFive(samples, title, numbers, logps, own) {
  const bars = numbers.map((number, at) => element(
    "div", { class: number === own ? "bar own" : "bar" },
    element("i", { style: `width: ${100 * Math.exp(logps[at])}%` }),
    element("span", {}, oneLine(samples.tokens[number])),
    element("span", { class: "p" }, percent(logps[at])),
  ));
  return element("div", {}, element("h4", {}, title), ...bars);
}

function number(value, write) {
  return value == null ? "not a number" : write(value);
}

function showTip(samples, answer, at, target) {
  const tip = document.getElementById("tip");
  const own = answer.tokens[at];
  if (!answer.student_top[at].length) {
    placeTip(tip, target, "not sampled by the student (an observation): no loss here");
    return;
  }
  const measures = ["kl_forward", "kl_reverse", "loss", "entropy"].map((name) => `${name.replace("_", " ")} ${number(answer[name][at], (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toPrecision(3)))}`).join(", ");
  placeTip(
    tip, target,
    element("div", { class: "head" }, element("code", {}, oneLine(samples.tokens[own])), `  student ${number(answer.student_logp[at], percent)}, teacher ${number(answer.teacher_logp[at], percent)}`, element("br"), measures),
    element("div", { class: "both" },
      topFive(samples, "the student's likeliest", answer.student_top[at], answer.student_p[at], own),
      topFive(samples, "the teacher's likeliest", answer.teacher_top[at], answer.teacher_p[at], own)),
  );
}

function placeTip(tip, target, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = target.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 12))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

function drawWorst(samples) {
  const choose = document.getElementById("worst-step");
  const steps = [...new Set(samples.worst.filter((token) => token.run === shown.run).map((token) => token.step))];
  choose.replaceChildren(...steps.reverse().map((step) => element("option", { value: step }, step === 0 ? "before training" : `after step ${step}`)));
  const fill = () => {
    const step = Number(choose.value);
    const rows = samples.worst.filter((token) => token.run === shown.run && token.step === step);
    document.querySelector("#worst tbody").replaceChildren(...rows.map((token) => element(
      "tr",
      { onclick: () => { shown.prompt = token.prompt; shown.aim = token; shown.steps.add(token.step); drawSamples(samples); document.querySelector(".aim")?.scrollIntoView({ block: "center" }); } },
      element("td", {}, token.kl.toPrecision(3)),
      element("td", {}, samples.prompts[token.prompt].name.slice(0, 60)),
      element("td", { class: "code" }, "…" + token.before.slice(-40).replaceAll("\n", "↵")),
      element("td", { class: "code" }, oneLine(token.token)),
      element("td", { class: "code" }, `${oneLine(token.student[0])} ${percent(token.student[1])}`),
      element("td", { class: "code" }, `${oneLine(token.teacher[0])} ${percent(token.teacher[1])}`),
    )));
  };
  choose.onchange = fill;
  fill();
}

function startSamples(data) {
  const samples = data.samples;
  const runs = document.getElementById("run");
  const present = [...new Set(samples.answers.map((answer) => answer.run))];
  runs.append(...present.map((run) => element("option", { value: run }, data.runs[run])));
  runs.parentElement.hidden = present.length < 2;
  shown.run = present[0];
  const redraw = () => { shown.aim = "worst"; drawSamples(samples); shown.aim = null; drawWorst(samples); };
  runs.onchange = () => { shown.run = Number(runs.value); shown.steps.clear(); redraw(); };
  document.getElementById("measure").onchange = (event) => { shown.measure = event.target.value; drawSamples(samples); };
  if (samples.cut) {
    const note = document.getElementById("cut");
    note.hidden = false;
    note.textContent = `Long answers are cut: ${samples.cut.toLocaleString()} tokens are left out of this page and of the worst tokens; rollouts/*.parquet in the run's folder has all.`;
  }
  redraw();
}

readData().then(async (data) => {
  await drawCharts(data);
  const legend = () => data.runs.length > 1 && drawLegend(data.runs);
  legend();
  dark.addEventListener("change", () => { drawCharts(data); legend(); });
  if (data.samples) startSamples(data);
  document.documentElement.dataset.drawn = data.charts.length;
}).catch((error) => {
  console.error(error);
  document.querySelector("header").append(element("p", { class: "wrong" }, `This page could not be drawn: ${error.message}`));
});
