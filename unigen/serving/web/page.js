// The page: starts the views that the served model supports, and shows the history.

import { request, setApiKey } from "./api.js";
import * as chat from "./chat.js";
import { button, el } from "./dom.js";
import * as history from "./history.js";
import { createTracker, takeInterruptedId } from "./storage.js";
import * as story from "./story.js";
import * as studio from "./studio.js";

const RETRY_INTERVAL = 1000; // milliseconds between two checks whether the model is loaded
const VIEWS = { chat, story, studio };
const startedViews = {};
const stateLine = document.getElementById("state");
const keyForm = document.getElementById("key");

/**
 * What the served model can do, from its description in /v1/models. The description of a composed model has those of
 * its two parts: `reads` and `draws`.
 * @param {object} info
 */
function capabilitiesOf(info) {
  const imageInfo = info.draws?.outputs ? info.draws : info;
  const { outputs } = info;
  const isPipeline = Array.isArray(imageInfo.takes); // a diffusers pipeline has no generators
  const sizeOption = imageInfo.sizes === "any" ? ["size"] : [];
  const generators = imageInfo.generators ?? [];
  const inpaintGenerators = generators.filter((name) => imageInfo.takes[name].includes("fixed_codes"));
  const readsImages = outputs.includes("text") && info.reads?.sees !== false;
  const modes = {
    draw: true,
    edit: readsImages,
    inpaint: inpaintGenerators.length > 0,
    vary: inpaintGenerators.length > 0 && readsImages && imageInfo === info,
  };
  return {
    outputs,
    readsImages,
    generators,
    inpaintGenerators,
    canRerank: Boolean(info.candidates),
    drawsClasses: Boolean(imageInfo.classes) || imageInfo.draws === "classes",
    classes: imageInfo.classes ?? [],
    modes: Object.keys(modes).filter((name) => modes[name]),
    optionsOf: (name) => (isPipeline ? imageInfo.takes : [...imageInfo.takes[name], ...sizeOption]),
    defaultsOf: (name) => imageInfo.sampling?.[name] ?? {},
    views: {
      chat: outputs.includes("text") || outputs.includes("interleaved"),
      story: outputs.includes("interleaved"),
      studio: outputs.includes("image"),
    },
  };
}

/** Wait until the model is loaded, then start its views. */
async function startViews() {
  if (Object.keys(startedViews).length) return;
  try {
    const ready = await fetch("ready", { cache: "no-store" }).catch(() => null);
    if (!ready?.ok) {
      const reason = ready && (await ready.json()).reason;
      stateLine.textContent = ready ? `Not ready yet: ${reason}.` : "The server cannot be reached; trying again.";
      setTimeout(startViews, RETRY_INTERVAL);
      return;
    }
    const [{ id: model, unigen: info }] = (await (await request("v1/models")).json()).data;
    const capabilities = capabilitiesOf(info);
    document.getElementById("model").textContent = model;
    for (const [name, view] of Object.entries(VIEWS)) {
      if (!capabilities.views[name]) continue;
      const activate = () => (location.hash = name);
      startedViews[name] = view.start({ model, capabilities, track: createTracker(showState), activate });
      navLink(name).hidden = false;
    }
    stateLine.hidden = true;
    keyForm.hidden = true;
    showView();
    const interruptedId = takeInterruptedId();
    if (interruptedId) await openEntry(interruptedId);
  } catch (error) {
    stateLine.textContent = error.message;
  }
}

/** Show the view that the address names, or the first one. */
function showView() {
  const names = Object.keys(startedViews);
  if (!names.length) return;
  const requested = location.hash.slice(1);
  const active = names.includes(requested) ? requested : names[0];
  for (const name of Object.keys(VIEWS)) {
    document.getElementById(name).hidden = name !== active;
    if (name === active) navLink(name).setAttribute("aria-current", "page");
    else navLink(name).removeAttribute("aria-current");
  }
  if (matchMedia("(pointer: fine)").matches) startedViews[active].focus();
}

function navLink(view) {
  return document.querySelector(`nav a[href="#${view}"]`);
}

function showState(text) {
  [stateLine.textContent, stateLine.hidden] = [text, false];
}

// ---------------------------------------------------------------- the API key

document.addEventListener("unigen:key", () => {
  keyForm.hidden = false;
  keyForm.elements.key.focus();
});
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(keyForm.elements.key.value.trim());
  keyForm.elements.key.value = "";
  keyForm.hidden = true;
  startViews();
});

// ---------------------------------------------------------------- the history

const historyDialog = document.getElementById("history");
const clearButton = historyDialog.querySelector(".clear");

/**
 * Show an entry in its view; one that cannot be shown is marked as broken.
 * @param {string} id
 * @returns {Promise<string | null>} why it cannot be shown
 */
async function openEntry(id) {
  try {
    const entry = await history.get(id);
    if (!entry || !startedViews[entry.view]) return null;
    if (entry.data === undefined) throw new Error("its content is missing");
    startedViews[entry.view].open(entry);
    location.hash = entry.view;
    return null;
  } catch (error) {
    await history.markBroken(id, error.message).catch(() => {});
    return error.message;
  }
}

async function renderHistory() {
  const list = historyDialog.querySelector(".entries");
  let [entries, emptyText] = [[], "Nothing yet."];
  try {
    if (await history.isAvailable()) entries = await history.list();
    else emptyText = "This browser keeps nothing here.";
  } catch (error) {
    emptyText = `The history cannot be read: ${error.message}.`;
  }
  const items = entries.length ? entries.map(historyItem) : [el("li", { class: "muted" }, emptyText)];
  list.replaceChildren(...items);
  for (const control of historyDialog.querySelectorAll(".export, .clear")) control.disabled = !entries.length;
  clearButton.textContent = "Clear";
}

function historyItem(entry) {
  const date = new Date(entry.at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const title = typeof entry.title === "string" && entry.title ? entry.title : "without a title";
  const openButton = button(title, async () => {
    if (await openEntry(entry.id)) await renderHistory(); // which shows why it is broken
    else historyDialog.close();
  });
  openButton.disabled = Boolean(entry.broken) || !startedViews[entry.view];
  const remove = () => history.remove(entry.id).then(renderHistory);
  const removeButton = button("×", remove, { "aria-label": `Delete ${title}` });
  const details = [entry.view, date, entry.running ? "interrupted" : ""].filter(Boolean).join(", ");
  const damage = `damaged, cannot be opened (${entry.broken}); kept until you delete it, and part of the export`;
  return el("li", {}, openButton, el("span", { class: "muted" }, entry.broken ? damage : details), removeButton);
}

document.getElementById("open-history").addEventListener("click", async () => {
  await renderHistory();
  historyDialog.showModal();
});
clearButton.addEventListener("click", async () => {
  if (clearButton.textContent === "Clear") {
    clearButton.textContent = "Clear everything?";
    return;
  }
  await history.clear();
  await renderHistory();
});
historyDialog.querySelector(".export").addEventListener("click", async () => {
  const entries = [];
  for (const header of await history.list()) {
    entries.push(await history.get(header.id).catch((error) => ({ ...header, broken: error.message })));
  }
  const file = new Blob([JSON.stringify({ entries }, null, 1)], { type: "application/json" });
  const url = URL.createObjectURL(file);
  el("a", { href: url, download: "unigen-history.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
});

// ---------------------------------------------------------------- start

window.addEventListener("hashchange", showView);
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
startViews();
