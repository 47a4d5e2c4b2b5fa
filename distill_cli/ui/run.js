// Keep a report as new as its runs: when the server has another version, the page takes over what has changed.
"use strict";

let version = document.documentElement.dataset.version;
let logVersion = null; // of the lines that are shown
const details = document.querySelector("#log details");

async function lookAtRun() {
  const now = await (await ask("now" + location.search)).json();
  document.getElementById("now").textContent = now.line;
  document.title = `${now.title} - distill`;
  if (now.version !== version) await renew();
  document.getElementById("log").hidden = !now.log;
  if (details.open && now.log !== logVersion) await showLog(now.log);
}

async function renew() {
  const text = await (await ask(location.href)).text();
  const fresh = new DOMParser().parseFromString(text, "text/html");
  morph(document.body, fresh.body);
  await showPage(fresh);
  version = fresh.documentElement.dataset.version;
}

async function showLog(newest) {
  const lines = document.getElementById("lines");
  const isAtEnd = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 4;
  lines.textContent = await (await ask("log" + location.search)).text();
  if (isAtEnd) lines.scrollTop = lines.scrollHeight;
  logVersion = newest;
}

details.addEventListener("toggle", () => wake());
started.then(() => follow(lookAtRun));
