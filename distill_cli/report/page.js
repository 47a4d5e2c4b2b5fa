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
// Whether Vega interprets its expressions instead of compiling them: where the page's policy forbids that.
const AST = document.documentElement.hasAttribute("data-no-eval");
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// Return the data of a <script> block: its own, or what its address has.
async function unpack(block) {
  if (block.dataset.url) {
    const answer = await fetch(block.dataset.url);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }
  const bytes = Uint8Array.from(atob(block.textContent), (c) => c.charCodeAt(0));
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

const figures = new Map(); // what is drawn, by the figure's id
let highlighted = ""; // the run that the legend highlights

function datasetsOf(spec) {
  return [...(spec.data ? [spec.data.name] : []), ...(spec.layer ?? []).flatMap(datasetsOf)];
}

// Draw a figure, or give new data to the one that is there; one that is out of sight is drawn when it comes into sight.
async function drawChart(chart, datasets) {
  const place = document.getElementById("chart-" + chart.id);
  if (!place) return; // it came after this page
  const text = JSON.stringify([chart.spec, dark.matches]);
  const old = figures.get(chart.id);
  if (old?.place === place && old.text === text) {
    old.datasets = datasets;
    return redraw(old);
  }
  old?.view.finalize();
  const spec = { width: "container", ...chart.spec, autosize: { type: "fit-x", contains: "padding" }, datasets };
  spec.params = [{ name: "chosen", value: highlighted }];
  const options = { actions: false, renderer: "svg", ast: AST, tooltip: { theme: dark.matches ? "dark" : "light" }, config: look() };
  const { view } = await vegaEmbed(place, spec, options);
  figures.set(chart.id, { place, text, view, names: new Set(datasetsOf(chart.spec)), datasets, drawn: datasets, isInSight: false });
  sight.unobserve(place); // else a place that was observed before is not reported again
  sight.observe(place);
}

async function redraw(figure) {
  if (!figure.isInSight || figure.drawn === figure.datasets) return;
  figure.drawn = figure.datasets;
  for (const name of figure.names) figure.view.data(name, figure.drawn[name].map((row) => ({ ...row })));
  await figure.view.runAsync();
}

const sight = new IntersectionObserver((changes) => changes.forEach(({ target, isIntersecting }) => {
  const figure = figures.get(target.id.replace("chart-", ""));
  if (figure?.place !== target) return;
  figure.isInSight = isIntersecting;
  redraw(figure);
}), { rootMargin: "100px" });

function drawCharts(data) {
  return Promise.all(data.charts.map((chart) => drawChart(chart, data.datasets)));
}

// One legend for all figures: a click highlights a run in each of them, a second click shows all again.
function drawLegend(runs) {
  const { hues } = dark.matches ? LOOKS.dark : LOOKS.light;
  const buttons = runs.map((run, at) => element("button", { "aria-pressed": run === highlighted }, element("i", { style: `background: ${hues[at % hues.length]}` }), run));
  buttons.forEach((button, at) => button.addEventListener("click", () => {
    highlighted = highlighted === runs[at] ? "" : runs[at];
    buttons.forEach((other, place) => other.setAttribute("aria-pressed", runs[place] === highlighted));
    figures.forEach(({ view }) => view.signal("chosen", highlighted).run());
  }));
  document.getElementById("legend").replaceChildren(...buttons);
}

// ---- the disagreement view

const shown = { run: null, measure: "kl_forward", prompt: 0, steps: new Set(), follows: true, worst: null, aim: null };

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
    { id: `prompt-${prompt.number}`, role: "option", "aria-selected": prompt.number === shown.prompt, onclick: () => showPrompt(samples, prompt.number) },
    element("span", { class: "text" }, prompt.name),
    element("span", { class: "kls" }, `KL ${[...new Set([steps[0], last])].map((step) => mean(prompt, step).toPrecision(2)).join(" → ")}`, ...rewards(prompt.answers, steps[0], last)),
  )));

  list.setAttribute("aria-activedescendant", `prompt-${shown.prompt}`);

  const chosen = byPrompt[shown.prompt];
  const answers = chosen.answers.filter((answer) => shown.steps.has(answer.step)).sort((a, b) => a.step - b.step);
  document.getElementById("answers").replaceChildren(
    element("div", { class: "prompt-text" }, chosen.text.trim()),
    ...answers.map((answer) => drawAnswer(samples, answer)),
  );
  const focused = document.activeElement?.id;
  document.getElementById("steps").replaceChildren("steps ", ...steps.map((step) => element(
    "button",
    { id: `step-${step}`, "aria-pressed": shown.steps.has(step), onclick: () => toggleStep(samples, step) },
    step === 0 ? "0, before" : String(step),
  )));
  if (focused?.startsWith("step-")) document.getElementById(focused)?.focus();
  const stops = [0.05, 0.25, 0.5, 1].map((share) => colour(share * samples.scale, samples.scale)).join(", ");
  document.getElementById("scale").replaceChildren("0 ", element("i", { style: `background: linear-gradient(90deg, transparent, ${stops})` }), ` ${samples.scale.toPrecision(2)} nats and more`);
}

function showPrompt(samples, number) {
  shown.prompt = number;
  shown.aim = null;
  drawSamples(samples);
}

function choosePrompt(samples, event) {
  const move = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  const next = move && document.getElementById(`prompt-${shown.prompt}`)[move];
  if (move) event.preventDefault();
  if (!next) return;
  showPrompt(samples, Number(next.id.replace("prompt-", "")));
  document.getElementById(next.id).scrollIntoView({ block: "nearest" });
}

function toggleStep(samples, step) {
  shown.follows = false;
  if (shown.steps.has(step) && shown.steps.size > 1) shown.steps.delete(step);
  else shown.steps.add(step);
  drawSamples(samples);
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
    element("div", { class: "tokens", ...byKeys(samples, answer, tokens) }, ...tokens),
  );
}

// Attributes of an answer's box by which arrow keys move from token to token, as the pointer does.
function byKeys(samples, answer, tokens) {
  let at = -1;
  const leave = () => { tokens[at]?.classList.remove("here"); hideTip(); };
  const onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (!move || !tokens.length) return;
    event.preventDefault();
    leave();
    at = Math.max(0, Math.min(at + move, tokens.length - 1));
    tokens[at].classList.add("here");
    tokens[at].scrollIntoView({ block: "nearest" });
    showTip(samples, answer, at, tokens[at]);
  };
  return { tabindex: 0, role: "group", "aria-label": "tokens; arrow keys move through them", "aria-describedby": "tip", onkeydown, onblur: leave };
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
  if (steps.includes(shown.worst)) choose.value = shown.worst;
  const fill = () => {
    const step = Number(choose.value);
    const rows = samples.worst.filter((token) => token.run === shown.run && token.step === step);
    document.querySelector("#worst tbody").replaceChildren(...rows.map((token) => element(
      "tr",
      { tabindex: 0, onkeydown: (event) => event.key === "Enter" && event.currentTarget.click(), onclick: () => { shown.prompt = token.prompt; shown.aim = token; shown.steps.add(token.step); drawSamples(samples); document.querySelector(".aim")?.scrollIntoView({ block: "center" }); } },
      element("td", {}, token.kl.toPrecision(3)),
      element("td", {}, samples.prompts[token.prompt].name.slice(0, 60)),
      element("td", { class: "code" }, "…" + token.before.slice(-40).replaceAll("\n", "↵")),
      element("td", { class: "code" }, oneLine(token.token)),
      element("td", { class: "code" }, `${oneLine(token.student[0])} ${percent(token.student[1])}`),
      element("td", { class: "code" }, `${oneLine(token.teacher[0])} ${percent(token.teacher[1])}`),
    )));
  };
  choose.onchange = () => { shown.worst = Number(choose.value); fill(); };
  fill();
}

// Show the recorded answers. Of answers that were shown before, keep the chosen run, prompt and steps.
function startSamples(samples, names) {
  const runs = document.getElementById("run");
  const present = [...new Set(samples.answers.map((answer) => answer.run))];
  const isFirst = !present.includes(shown.run);
  if (isFirst) shown.run = present[0];
  if (shown.follows) shown.steps.clear();
  runs.replaceChildren(...present.map((run) => element("option", { value: run }, names[run])));
  runs.value = shown.run;
  runs.parentElement.hidden = present.length < 2;
  const draw = (aim) => { shown.aim = aim; drawSamples(samples); shown.aim = null; drawWorst(samples); };
  runs.onchange = () => { shown.run = Number(runs.value); shown.steps.clear(); shown.worst = null; draw("worst"); };
  document.getElementById("prompts").onkeydown = (event) => choosePrompt(samples, event);
  document.getElementById("measure").onchange = (event) => { shown.measure = event.target.value; drawSamples(samples); };
  const notes = [];
  if (samples.cut) notes.push(`Long answers are cut: ${samples.cut.toLocaleString()} tokens are left out of this page and of the worst tokens; rollouts/*.parquet in the run's folder has all.`);
  if (samples.unreadable.length) notes.push(`Left out, since they cannot be read: ${samples.unreadable.join(", ")}.`);
  document.getElementById("cut").hidden = !notes.length;
  document.getElementById("cut").textContent = notes.join(" ");
  draw(isFirst ? "worst" : null);
}

let page = { data: null, samples: null, from: null }; // what is shown, and the address that the samples came from

// Show what the blocks of a document hold: this one's, or those of the same page as it is now.
async function showPage(source) {
  const block = source.getElementById("samples");
  const from = block ? block.dataset.url ?? "here" : null;
  const isNew = from !== page.from;
  const before = page.data;
  const data = await unpack(source.getElementById("data"));
  page = { data, from, samples: isNew && block ? await unpack(block) : page.samples };
  await drawCharts(data);
  if (data.runs.length > 1 && String(data.runs) !== String(before?.runs)) drawLegend(data.runs);
  if (isNew && block) startSamples(page.samples, data.runs);
  document.documentElement.dataset.drawn = data.charts.length;
}

const started = showPage(document).then(() => {
  dark.addEventListener("change", () => { drawCharts(page.data); if (page.data.runs.length > 1) drawLegend(page.data.runs); });
}).catch((error) => {
  console.error(error);
  document.querySelector("header").append(element("p", { class: "wrong" }, `This page could not be drawn: ${error.message}`));
});
