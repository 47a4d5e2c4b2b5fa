// Look again and again at what the server has, and say when it cannot be reached.
"use strict";

const PAUSE_MS = 1000;
const HIDDEN_MS = 10000; // between two looks of a page in the background
const SHARE = 2; // a look that takes long is followed by a pause as many times as long

let wake = () => {};
document.addEventListener("visibilitychange", () => document.hidden || wake());

function say(text) {
  const notice = document.getElementById("notice");
  if (notice.textContent !== text) notice.textContent = text;
  notice.hidden = text === "";
}

// Return the server's answer. Throws an error with what it says if it refuses, or that it is away.
async function ask(address) {
  const answer = await fetch(address).catch(() => { throw new Error("The connection to distill ui is lost"); });
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer;
}

// Call `look` until the page is closed; at once if it returns that there is more to come.
async function follow(look) {
  let seen = new Date();
  for (;;) {
    const began = performance.now();
    let hasMore = false;
    try {
      hasMore = await look();
      seen = new Date();
      say("");
    } catch (error) {
      say(`${error.message}; this page shows ${seen.toLocaleTimeString()}, and tries again.`);
    }
    const pause = hasMore ? 0 : Math.max(document.hidden ? HIDDEN_MS : PAUSE_MS, SHARE * (performance.now() - began));
    await new Promise((done) => { wake = done; setTimeout(done, pause); });
  }
}

// Make one element like another, and keep what is the same: focus, scrolling and open parts stay.
function morph(now, next) {
  if ("scripted" in now.dataset || now.localName === "script") return; // filled by a script
  for (const { name } of [...now.attributes]) if (!next.hasAttribute(name) && name !== "open") now.removeAttribute(name);
  for (const { name, value } of next.attributes) if (now.getAttribute(name) !== value) now.setAttribute(name, value);
  const byId = new Map([...now.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = now.firstChild;
  for (const fresh of [...next.childNodes]) {
    const isSame = at && !at.id && !fresh.id && at.nodeName === fresh.nodeName;
    const old = fresh.id ? byId.get(fresh.id) : isSame ? at : undefined;
    if (old === at && old) at = at.nextSibling;
    else now.insertBefore(old ?? document.importNode(fresh, true), at);
    if (old instanceof Element) morph(old, fresh);
    else if (old && old.data !== fresh.data) old.data = fresh.data;
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}
