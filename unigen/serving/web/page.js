// The page: which views there are for the model that is served, and what was done before.
// Asks the server what its model can; what it cannot is not offered.

import * as api from "./api.js";
import * as chat from "./chat.js";
import { button, el } from "./dom.js";
import * as past from "./history.js";
import { interrupted, tracker } from "./keeping.js";
import * as story from "./story.js";
import * as studio from "./studio.js";

const VIEWS = { chat, story, studio };
const started = {};
const state = document.getElementById("state");
const key = document.getElementById("key");

/** What a model can do, by what /v1/models says of it: an engine, a pipeline, or a pair that reads and draws. */
function abilities(info) {
  const draws = info.draws?.outputs ? info.draws : info;
  const outputs = info.outputs;
  const listed = Array.isArray(draws.takes); // of a pipeline, which has no generators
  const free = draws.sizes === "any" ? ["size"] : [];
  const generators = draws.generators ?? [];
  const keeping = generators.filter((name) => draws.takes[name].includes("fixed"));
  const reads = outputs.includes("text") && info.reads?.sees !== false;
  const drawsClasses = Boolean(draws.classes) || draws.draws === "classes";
  const may = { draw: true, edit: reads, inpaint: keeping.length, vary: keeping.length && reads && draws === info };
  return {
    outputs,
    reads,
    generators,
    keeping,
    compares: Boolean(info.candidates),
    drawsClasses,
    classes: draws.classes ?? [],
    modes: Object.keys(may).filter((name) => may[name]),
    takes: (name) => (listed ? draws.takes : ["guidance", ...draws.takes[name], ...free]),
    usual: (name) => draws.sampling?.[name] ?? {},
    views: {
      chat: outputs.includes("text") || outputs.includes("interleaved"),
      story: outputs.includes("interleaved"),
      studio: outputs.includes("image"),
    },
  };
}

/** Ask for the model until it is there; then show its views. */
async function begin() {
  if (Object.keys(started).length) return;
  try {
    const ready = await fetch("ready", { cache: "no-store" }).catch(() => null);
    if (!ready?.ok) {
      const reason = ready && (await ready.json()).reason;
      state.textContent = ready ? `Not ready yet: ${reason}.` : "The server cannot be reached; trying again.";
      setTimeout(begin, 1000);
      return;
    }
    const [{ id, unigen }] = (await (await api.ask("v1/models")).json()).data;
    const able = abilities(unigen);
    document.getElementById("model").textContent = id;
    for (const [name, view] of Object.entries(VIEWS)) {
      if (!able.views[name]) continue;
      started[name] = view.start({ model: id, able, track: tracker(say), go: () => (location.hash = name) });
      document.querySelector(`nav a[href="#${name}"]`).hidden = false;
    }
    state.hidden = true;
    key.hidden = true;
    show();
    const left = interrupted();
    if (left) await reopen(left);
  } catch (error) {
    state.textContent = error.message;
  }
}

/** The view that the address names, or the first. */
function show() {
  const names = Object.keys(started);
  if (!names.length) return;
  const asked = location.hash.slice(1);
  const now = names.includes(asked) ? asked : names[0];
  for (const name of Object.keys(VIEWS)) {
    document.getElementById(name).hidden = name !== now;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === now) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (matchMedia("(pointer: fine)").matches) started[now].focus();
}

// ---------------------------------------------------------------- the key

document.addEventListener("unigen:key", () => {
  key.hidden = false;
  key.elements.key.focus();
});
key.addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(key.elements.key.value.trim());
  key.elements.key.value = "";
  key.hidden = true;
  begin();
});

// ---------------------------------------------------------------- the history

const panel = document.getElementById("history");
const clear = panel.querySelector(".clear");

function say(text) {
  [state.textContent, state.hidden] = [text, false];
}

/** Show what was kept, in its view. What cannot be shown is put aside; returns why, or null. */
async function reopen(id) {
  try {
    const entry = await past.entry(id);
    if (!entry || !started[entry.view]) return null;
    if (entry.data === undefined) throw new Error("its content is missing");
    started[entry.view].open(entry);
    location.hash = entry.view;
    return null;
  } catch (error) {
    await past.putAside(id, error.message).catch(() => {});
    return error.message;
  }
}

async function fill() {
  const list = panel.querySelector(".entries");
  let [entries, empty] = [[], "Nothing yet."];
  try {
    if (await past.kept()) entries = await past.list();
    else empty = "This browser keeps nothing here.";
  } catch (error) {
    empty = `The history cannot be read: ${error.message}.`;
  }
  list.replaceChildren(...(entries.length ? entries.map(line) : [el("li", { class: "quiet" }, empty)]));
  for (const one of panel.querySelectorAll(".export, .clear")) one.disabled = !entries.length;
  clear.textContent = "Clear";
}

function line(entry) {
  const when = new Date(entry.at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const title = typeof entry.title === "string" && entry.title ? entry.title : "without a title";
  const open = button(title, async () => {
    if (await reopen(entry.id)) await fill(); // which says why
    else panel.close();
  });
  const drop = button("×", () => past.remove(entry.id).then(fill), { "aria-label": `Forget ${title}` });
  open.disabled = Boolean(entry.broken) || !started[entry.view];
  const about = [entry.view, when, entry.running ? "interrupted" : ""].filter(Boolean).join(", ");
  const kept = entry.broken ? `damaged, cannot be opened (${entry.broken}); kept aside, also in the export` : about;
  return el("li", {}, open, el("span", { class: "quiet" }, kept), drop);
}

document.getElementById("open-history").addEventListener("click", async () => {
  await fill();
  panel.showModal();
});
clear.addEventListener("click", async () => {
  if (clear.textContent === "Clear") {
    clear.textContent = "Clear all of it?";
    return;
  }
  await past.clear();
  await fill();
});
panel.querySelector(".export").addEventListener("click", async () => {
  const entries = [];
  for (const line of await past.list()) {
    entries.push(await past.entry(line.id).catch((error) => ({ ...line, broken: error.message })));
  }
  const file = new Blob([JSON.stringify({ entries }, null, 1)], { type: "application/json" });
  const url = URL.createObjectURL(file);
  el("a", { href: url, download: "unigen-history.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
});

// ---------------------------------------------------------------- the page

window.addEventListener("hashchange", show);
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
begin();
