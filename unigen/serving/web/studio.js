// The studio: pictures drawn, edited as told, painted anew where a mask says, or varied, with every option by hand.

import * as api from "./api.js";
import { broken, el, filled, fit, working } from "./dom.js";
import { Mask } from "./mask.js";
import { figure, frame, image, offer, Tray, used } from "./pictures.js";

const MODES = {
  draw: { verb: "Draw", asked: "What to draw", path: "v1/images/generations", hint: "two apples on a blue background" },
  edit: { verb: "Edit", asked: "What to change", path: "v1/images/edits", hint: "replace the apples with roses" },
  inpaint: { verb: "Inpaint", asked: "What the whole picture shall show", path: "v1/images/edits", hint: "a rose" },
  vary: { verb: "Vary", path: "v1/images/variations" },
};
const OPTIONS = ["guidance", "steps", "temperature", "top_p", "seed", "size", "n", "candidates"];
const [LARGER, SMALLER] = [256, 128]; // how wide a picture is shown
const MASKED = 320; // and how wide to paint on
const PREVIEWS = 3; // of each picture while it is made, where the generator has any

/** As of chat.js. */
export function start({ model, able, track, go }) {
  const view = document.getElementById("studio");
  const form = view.querySelector("form");
  const runs = view.querySelector(".runs");
  const [given, easel, brushes] = [".given", ".easel", ".brushes"].map((name) => form.querySelector(name));
  const { prompt, label, generator, brush } = form.elements;
  const tray = new Tray(form, { most: 1, changed: lay });
  let mask = null;
  let replaced; // in the history: a run that was broken off, in whose place the next one comes

  const modes = Object.keys(MODES).filter((name) => able.modes.includes(name));
  for (const radio of form.querySelectorAll("[name=mode]")) {
    radio.parentElement.hidden = !modes.includes(radio.value);
    radio.addEventListener("change", arrange);
  }
  form.querySelector(".modes").hidden = modes.length < 2;
  document.getElementById("classes").append(...able.classes.map((name) => el("option", { value: name })));
  generator.addEventListener("change", fields);
  form.querySelector(".wipe").addEventListener("click", () => mask?.wipe());
  for (const name of modes.filter((name) => name !== "draw")) {
    offer(MODES[name].verb, (picture) => {
      choose(name);
      tray.add(picture);
      go();
      form.scrollIntoView({ block: "start" });
      if (name !== "vary") prompt.focus();
    });
  }

  const mode = () => form.elements.mode.value;

  function choose(name) {
    form.elements.mode.value = name;
    arrange();
  }

  /** What this way of working needs, and no more. */
  function arrange() {
    const { verb, asked, hint } = MODES[mode()];
    const keeps = mode() === "inpaint" || mode() === "vary";
    const named = able.drawsClasses && mode() === "draw";
    given.hidden = mode() === "draw";
    prompt.parentElement.hidden = !asked || named;
    label.parentElement.hidden = !named;
    form.elements.vary.parentElement.hidden = mode() !== "vary";
    form.elements.candidates.parentElement.hidden = mode() === "edit" || !able.compares;
    form.querySelector(".asked").textContent = asked ?? "";
    form.querySelector(".go").textContent = verb;
    prompt.placeholder = hint ?? "";
    const names = keeps ? able.keeping : able.generators;
    const usual = keeps ? "masked" : "next-token";
    generator.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(usual)) generator.value = usual;
    generator.parentElement.hidden = !names.length;
    fields();
    lay();
    fit(prompt);
  }

  /** The options that the chosen generator takes, with what it does where nothing is said. */
  function fields() {
    const takes = able.takes(generator.value);
    for (const name of ["guidance", "steps", "temperature", "top_p"]) {
      form.elements[name].parentElement.hidden = !takes.includes(name);
      form.elements[name].placeholder = [able.usual(generator.value)[name] ?? "model’s"].flat().join(", ");
    }
    form.elements.size.parentElement.hidden = !takes.includes("size");
  }

  /** The given picture, to be painted on where that is wanted. */
  function lay() {
    const picture = tray.pictures[0];
    const paints = mode() === "inpaint" && picture !== undefined;
    tray.thumbs.hidden = paints;
    easel.hidden = brushes.hidden = !paints;
    if (!paints) mask = null;
    else if (mask?.url !== picture.url) {
      mask = new Mask(picture.url, MASKED, () => Number(brush.value));
      mask.url = picture.url;
      mask.shown.addEventListener("load", ({ target }) => {
        brush.max = Math.ceil(target.naturalWidth / 4);
        brush.value = Math.ceil(target.naturalWidth / 12);
      });
    }
    easel.replaceChildren(...(mask ? [mask.element] : []));
  }

  const { stop } = working(form, async (signal, notice) => {
    const { path, verb, asked } = MODES[mode()];
    const fields = { model, stream: true, partial_images: PREVIEWS, ...filled(form, ["generator", ...OPTIONS]) };
    if (!label.parentElement.hidden) fields.label = labelled(label.value.trim());
    else if (asked) fields.prompt = prompt.value.trim();
    let body = fields;
    if (mode() !== "draw") {
      if (!tray.pictures.length) throw new Error("choose a picture: add, drop or paste one, or use one that was made");
      body = new FormData();
      for (const [name, value] of Object.entries({ ...fields, ...filled(form, ["vary"]) })) body.set(name, value);
      body.set("image", fileOf(tray.pictures[0].url), "image.png");
      if (mask) body.set("mask", await mask.file(), "mask.png");
    }
    const title = String(fields.prompt || (fields.label ?? tray.pictures[0]?.title ?? verb));
    const count = Math.min(16, Math.max(1, Number(fields.n) || 1));
    const run = el("section", { class: "run", "aria-busy": "true" });
    const side = sideOf(count);
    const frames = Array.from({ length: count }, () => frame(side));
    lineUp(run, { verb, title }, side, frames);
    runs.prepend(run);
    const pictures = [];
    const given = tray.pictures[0];
    const asked_for = { mode: mode(), fields: { ...fields, ...filled(form, ["vary"]) }, given: given && { ...given } };
    const running = track(replaced, () => {
      return { view: "studio", title, data: { verb, title, pictures: pictures.filter(Boolean), asked: asked_for } };
    });
    replaced = undefined;
    if (runs.offsetTop > form.offsetTop) run.scrollIntoView({ block: "nearest" }); // below the form, on a phone
    try {
      for await (const { index, url, settings } of api.pictures(path, body, { signal, notice })) {
        frames[index]?.replaceChildren(image(url, title, side));
        frames[index]?.classList.toggle("made", Boolean(settings));
        if (!settings) continue;
        pictures[index] = { url, title, settings };
        running.changed(true);
      }
      show(run, { verb, title, pictures });
      running.finish({ view: "studio", title, data: { verb, title, pictures } });
    } catch (error) {
      run.remove();
      running.drop();
      throw error;
    }
  });

  /** Fill in what was asked for, and ask once more; a mask is to be painted first. */
  function again(run, id, { mode, fields: asked, given }) {
    replaced = id;
    choose(mode);
    tray.set(given ? [given] : []);
    for (const [name, value] of Object.entries(asked)) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    fields();
    run.remove();
    if (mode !== "inpaint") form.requestSubmit();
  }

  /** A class as it is asked for: by its name, or else by its number. */
  function labelled(text) {
    return !text || able.classes.includes(text) || !Number.isInteger(Number(text)) ? text : Number(text);
  }

  function show(run, { verb, title, pictures }) {
    const side = sideOf(pictures.length);
    const alone = pictures.length < 2 || side > SMALLER;
    const common = alone ? {} : shared(pictures.map((picture) => picture.settings));
    const own = (settings) => Object.fromEntries(Object.entries(settings).filter(([name]) => !(name in common)));
    const figures = pictures.map((one) => figure({ ...one, shown: own(one.settings) }, side));
    lineUp(run, { verb, title, common }, side, figures);
    run.removeAttribute("aria-busy");
  }

  /** How wide each of so many pictures is shown here. */
  function sideOf(count) {
    return count === 1 || (count <= 4 && runs.clientWidth > 2 * LARGER) ? LARGER : SMALLER;
  }

  choose(modes[0]);
  return {
    open({ id, data, running }) {
      if (!data.pictures.every((one) => typeof one.url === "string" && one.settings)) throw new Error("a picture is damaged");
      stop();
      const run = el("section", { class: "run" });
      show(run, data);
      if (running) run.append(broken("the page was left while this was drawn.", () => again(run, id, data.asked)));
      runs.prepend(run);
    },
    focus: () => prompt.focus(),
  };
}

/** A run of pictures on the page; what they have in common is said once, above them. */
function lineUp(run, { verb, title, common = {} }, side, figures) {
  run.replaceChildren(el("h2", {}, el("span", { class: "quiet" }, `${verb} `), title));
  if (Object.keys(common).length) run.append(el("p", { class: "used quiet" }, used(common)));
  const grid = el("div", { class: "grid" }, ...figures);
  grid.style.setProperty("--side", `${side}px`);
  run.append(grid);
}

/** The settings that are the same in all of these. */
function shared([first, ...others]) {
  const same = ([name, value]) => others.every((one) => String(one[name]) === String(value));
  return Object.fromEntries(Object.entries(first).filter(same));
}

/** The file of a data URI. */
function fileOf(url) {
  const [head, data] = url.split(",");
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: head.slice("data:".length, head.indexOf(";")) });
}
