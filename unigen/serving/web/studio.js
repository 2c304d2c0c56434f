// The studio view: images are generated, edited, inpainted under a mask or varied, with every option as a field.

import { streamImages } from "./api.js";
import { autosize, bindForm, el, formValues, interruptedNote } from "./dom.js";
import { addImageAction, figureElement, imageElement, ImageTray, placeholder, settingsText } from "./images.js";
import { MaskCanvas } from "./mask.js";

const MODES = {
  draw: { verb: "Draw", promptLabel: "What to draw", path: "v1/images/generations", hint: "two apples on a table" },
  edit: { verb: "Edit", promptLabel: "What to change", path: "v1/images/edits", hint: "replace the apples with roses" },
  inpaint: { verb: "Inpaint", promptLabel: "What the whole image shows", path: "v1/images/edits", hint: "a rose" },
  vary: { verb: "Vary", path: "v1/images/variations" }, // takes no prompt
};
const GENERATOR_OPTIONS = ["guidance", "steps", "temperature", "top_p"]; // fields that are hidden where they do not apply
const OPTIONS = [...GENERATOR_OPTIONS, "seed", "size", "n", "candidates"];
const [LARGE_SIZE, SMALL_SIZE] = [256, 128]; // CSS pixels of a generated image
const MASK_SIZE = 320; // CSS pixels of the image that is painted on
const NUM_PREVIEWS = 3; // of each image, where the generator has any
const MAX_IMAGES = 16;

/** Start the view; parameters and result as in chat.js. */
export function start({ model, capabilities, track, activate }) {
  const view = document.getElementById("studio");
  const form = view.querySelector("form");
  const runList = view.querySelector(".runs");
  const [inputImage, maskEditor, brushTools] = [".input-image", ".mask-editor", ".brush-tools"].map((selector) =>
    form.querySelector(selector),
  );
  const { prompt, label, generator, brush } = form.elements;
  const tray = new ImageTray(form, { max: 1, onChange: updateMaskEditor });
  let mask = null;
  let replacedId; // in the history: the interrupted run that the next one replaces

  const modes = Object.keys(MODES).filter((name) => capabilities.modes.includes(name));
  setUpForm();
  setMode(modes[0]);

  const { stop } = bindForm(form, async (signal, notify) => {
    const { path, verb } = MODES[currentMode()];
    const fields = requestFields();
    const body = currentMode() === "draw" ? fields : await toFormData({ ...fields, ...formValues(form, ["variation"]) });
    const image = tray.images[0];
    const title = String(fields.prompt || (fields.label ?? image?.title ?? verb));
    const count = Math.min(MAX_IMAGES, Math.max(1, Number(fields.n) || 1));
    const size = imageSize(count);
    const placeholders = Array.from({ length: count }, () => placeholder(size));
    const run = el("section", { class: "run", "aria-busy": "true" });
    renderRun(run, { verb, title }, size, placeholders);
    runList.prepend(run);
    const images = [];
    const retryRequest = {
      mode: currentMode(),
      fields: { ...fields, ...formValues(form, ["variation"]) },
      given: image && { ...image },
    };
    // `pictures`, `asked` and `given` are names in stored histories
    const tracked = track(replacedId, () => {
      return { view: "studio", title, data: { verb, title, pictures: images.filter(Boolean), asked: retryRequest } };
    });
    replacedId = undefined;
    if (runList.offsetTop > form.offsetTop) run.scrollIntoView({ block: "nearest" }); // below the form, on a phone
    try {
      for await (const { index, url, settings } of streamImages(path, body, { signal, notify })) {
        placeholders[index]?.replaceChildren(imageElement(url, title, size));
        placeholders[index]?.classList.toggle("finished", Boolean(settings));
        if (!settings) continue;
        images[index] = { url, title, settings };
        tracked.changed(true);
      }
      renderFinishedRun(run, { verb, title, pictures: images });
      tracked.finish({ view: "studio", title, data: { verb, title, pictures: images } });
    } catch (error) {
      run.remove();
      tracked.discard();
      throw error;
    }
  });

  /** Offer what the model can do. */
  function setUpForm() {
    for (const radio of form.querySelectorAll("[name=mode]")) {
      radio.parentElement.hidden = !modes.includes(radio.value);
      radio.addEventListener("change", updateForm);
    }
    form.querySelector(".modes").hidden = modes.length < 2;
    document.getElementById("classes").append(...capabilities.classes.map((name) => el("option", { value: name })));
    generator.addEventListener("change", updateOptions);
    form.querySelector(".clear-mask").addEventListener("click", () => mask?.clear());
    for (const name of modes.filter((mode) => mode !== "draw")) {
      addImageAction(MODES[name].verb, (image) => {
        setMode(name);
        tray.add(image);
        activate();
        form.scrollIntoView({ block: "start" });
        if (name !== "vary") prompt.focus();
      });
    }
  }

  function currentMode() {
    return form.elements.mode.value;
  }

  function setMode(name) {
    form.elements.mode.value = name;
    updateForm();
  }

  /** Show the fields of the current mode. */
  function updateForm() {
    const mode = currentMode();
    const { verb, promptLabel, hint } = MODES[mode];
    const keepsPixels = mode === "inpaint" || mode === "vary"; // all but those under the mask
    const takesClass = capabilities.drawsClasses && mode === "draw";
    inputImage.hidden = mode === "draw";
    prompt.parentElement.hidden = !promptLabel || takesClass;
    label.parentElement.hidden = !takesClass;
    form.elements.variation.parentElement.hidden = mode !== "vary";
    form.elements.candidates.parentElement.hidden = mode === "edit" || !capabilities.canRerank;
    form.querySelector(".prompt-label").textContent = promptLabel ?? "";
    form.querySelector(".submit").textContent = verb;
    prompt.placeholder = hint ?? "";
    const names = keepsPixels ? capabilities.inpaintGenerators : capabilities.generators;
    const defaultName = keepsPixels ? "masked" : "next-token";
    generator.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(defaultName)) generator.value = defaultName;
    generator.parentElement.hidden = !names.length;
    updateOptions();
    updateMaskEditor();
    autosize(prompt);
  }

  /** Show the options of the chosen generator, with its defaults as placeholders. */
  function updateOptions() {
    const names = capabilities.optionsOf(generator.value);
    const defaults = capabilities.defaultsOf(generator.value);
    for (const name of GENERATOR_OPTIONS) {
      form.elements[name].parentElement.hidden = !names.includes(name);
      form.elements[name].placeholder = [defaults[name] ?? "model’s"].flat().join(", ");
    }
    form.elements.size.parentElement.hidden = !names.includes("size");
  }

  /** Show the input image to paint on where a mask is needed. */
  function updateMaskEditor() {
    const image = tray.images[0];
    const needsMask = currentMode() === "inpaint" && image !== undefined;
    tray.thumbnails.hidden = needsMask;
    maskEditor.hidden = brushTools.hidden = !needsMask;
    if (!needsMask) mask = null;
    else if (mask?.url !== image.url) {
      mask = new MaskCanvas(image.url, MASK_SIZE, () => Number(brush.value));
      mask.image.addEventListener("load", ({ target }) => {
        brush.max = Math.ceil(target.naturalWidth / 4);
        brush.value = Math.ceil(target.naturalWidth / 12);
      });
    }
    maskEditor.replaceChildren(...(mask ? [mask.element] : []));
  }

  /** The fields of the request, without its files. */
  function requestFields() {
    const options = formValues(form, ["generator", ...OPTIONS]);
    const fields = { model, stream: true, partial_images: NUM_PREVIEWS, ...options };
    if (!label.parentElement.hidden) fields.label = parseLabel(label.value.trim());
    else if (MODES[currentMode()].promptLabel) fields.prompt = prompt.value.trim();
    return fields;
  }

  /** The fields and the input image as a form, with the mask where one is painted. */
  async function toFormData(fields) {
    if (!tray.images.length) throw new Error("choose a picture: add, drop or paste one, or use one that was made");
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.set(name, value);
    body.set("image", toBlob(tray.images[0].url), "image.png");
    if (mask) body.set("mask", await mask.toFile(), "mask.png");
    return body;
  }

  /** Fill in an interrupted request and send it again; where it had a mask, the user paints that first. */
  function retry(run, id, { mode, fields, given: image }) {
    replacedId = id;
    setMode(mode);
    tray.set(image ? [image] : []);
    for (const [name, value] of Object.entries(fields)) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    updateOptions();
    run.remove();
    if (mode !== "inpaint") form.requestSubmit();
  }

  /** A class as the server takes it: by its name, or else by its number. */
  function parseLabel(text) {
    const isName = !text || capabilities.classes.includes(text) || !Number.isInteger(Number(text));
    return isName ? text : Number(text);
  }

  function renderFinishedRun(run, { verb, title, pictures: images }) {
    const size = imageSize(images.length);
    const isGrouped = images.length > 1 && size === SMALL_SIZE; // settings that all have in common are shown once
    const common = isGrouped ? commonSettings(images.map((image) => image.settings)) : {};
    const specificSettings = (settings) =>
      Object.fromEntries(Object.entries(settings).filter(([name]) => !(name in common)));
    const figures = images.map((image) => figureElement(image, size, specificSettings(image.settings)));
    renderRun(run, { verb, title, common }, size, figures);
    run.removeAttribute("aria-busy");
  }

  /** The width at which each of so many images is shown, in CSS pixels. */
  function imageSize(count) {
    return count === 1 || (count <= 4 && runList.clientWidth > 2 * LARGE_SIZE) ? LARGE_SIZE : SMALL_SIZE;
  }

  return {
    open({ id, data, running }) {
      const isImage = ({ url, settings }) => typeof url === "string" && settings;
      if (!data.pictures.every(isImage)) throw new Error("a picture is damaged");
      stop();
      const run = el("section", { class: "run" });
      renderFinishedRun(run, data);
      const retryRun = () => retry(run, id, data.asked);
      if (running) run.append(interruptedNote("the page was left while this was drawn.", retryRun));
      runList.prepend(run);
    },
    focus: () => prompt.focus(),
  };
}

/** Show a run: its title, the settings that its images have in common, and the images in a grid. */
function renderRun(run, { verb, title, common = {} }, size, figures) {
  run.replaceChildren(el("h2", {}, el("span", { class: "muted" }, `${verb} `), title));
  if (Object.keys(common).length) run.append(el("p", { class: "settings muted" }, settingsText(common)));
  const grid = el("div", { class: "grid" }, ...figures);
  grid.style.setProperty("--image-size", `${size}px`);
  run.append(grid);
}

/** The settings that are the same in all of these. */
function commonSettings([first, ...others]) {
  const isCommon = ([name, value]) => others.every((settings) => String(settings[name]) === String(value));
  return Object.fromEntries(Object.entries(first).filter(isCommon));
}

/** The file in a data URI. */
function toBlob(url) {
  const [head, data] = url.split(",");
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: head.slice("data:".length, head.indexOf(";")) });
}
