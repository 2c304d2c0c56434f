// Images: read from files, shown, saved, and passed from one view to another.
//
// An image is { url, title, settings }: a data URI, the prompt or file name, and how it was generated.
// Does not depend on: views. A view calls `addImageAction` for what it can do with an image.

import { button, el, showError } from "./dom.js";

const MAX_SIDE = 1024; // pixels of an image that is sent; models read fewer
const MAX_PIXELATED_SIDE = 128; // images up to this size are shown at a whole multiple of it

const imageActions = [];

/**
 * Offer an action in the menu of every image that is shown from now on.
 * @param {string} label
 * @param {(image: object) => void} run
 */
export function addImageAction(label, run) {
  imageActions.push([label, run]);
}

/**
 * Read an image file: PNG of at most MAX_SIDE pixels a side, without the metadata of a camera.
 * @param {File} file
 * @returns {Promise<string>} a data URI
 */
export async function readImageFile(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name || "this"} is no picture that this browser can read`);
  });
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = el("canvas", { width, height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  return canvas.toDataURL("image/png");
}

/**
 * An <img> of about this width. A small image is shown at a whole multiple of its size, so that its pixels are squares.
 * @param {string} url
 * @param {string} alt
 * @param {number} size in CSS pixels
 */
export function imageElement(url, alt, size) {
  const element = el("img", { alt });
  element.addEventListener("load", () => {
    const { naturalWidth: width, naturalHeight: height } = element;
    const isPixelated = Math.max(width, height) <= MAX_PIXELATED_SIDE;
    element.classList.toggle("pixelated", isPixelated);
    element.width = isPixelated ? width * Math.max(1, Math.floor(size / width)) : Math.min(width, size);
  });
  element.src = url;
  return element;
}

/**
 * A <figure> of an image with its settings, a download link and the menu of image actions.
 * @param {{ url: string, title: string, settings?: object }} image
 * @param {number} size width in CSS pixels
 * @param {object | null} [shownSettings] null shows none
 */
export function figureElement(image, size, shownSettings = image.settings) {
  const { url, title } = image;
  const caption = el("figcaption", { class: "muted" });
  if (shownSettings) caption.append(el("span", { class: "settings" }, settingsText(shownSettings)));
  const actions = el("span", { class: "image-actions" });
  actions.append(el("a", { href: url, download: fileName(image) }, "Download"));
  if (imageActions.length) actions.append(actionMenu(image));
  caption.append(actions);
  return el("figure", { class: "picture" }, imageElement(url, title, size), caption);
}

function actionMenu(image) {
  const menu = el("details", { class: "menu" }, el("summary", {}, "Use"));
  const close = () => menu.removeAttribute("open");
  const buttons = imageActions.map(([label, run]) => button(label, () => (close(), run(image))));
  const list = el("span", { class: "menu-list" }, ...buttons);
  menu.append(list);
  menu.addEventListener("toggle", () => {
    list.classList.remove("align-right"); // opens to the side that has space
    list.classList.toggle("align-right", list.getBoundingClientRect().right > document.documentElement.clientWidth);
  });
  menu.addEventListener("focusout", (event) => menu.contains(event.relatedTarget) || close());
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    event.stopPropagation();
    close();
    menu.firstChild.focus();
  });
  return menu;
}

/**
 * An empty figure in the place of an image that is being generated; previews are put into it.
 * @param {number} size width in CSS pixels
 */
export function placeholder(size) {
  const element = el("figure", { class: "placeholder", "aria-hidden": "true" });
  element.style.width = `${size}px`;
  return element;
}

/**
 * The settings of an answer as text: "seed 3 · next-token · guidance 2.5".
 * @param {object} settings
 * @param {boolean} [hasImages] whether the settings of images apply
 */
export function settingsText({ seed, text, max_tokens, generator, ...imageSettings }, hasImages = true) {
  const items = seed === undefined ? [] : [`seed ${seed}`];
  if (text) items.push(`text ${listSettings(text).join(", ")}`);
  if (hasImages && generator) items.push(generator);
  if (hasImages) items.push(...listSettings(imageSettings));
  return items.join(" · ");
}

function listSettings(settings) {
  const entries = Object.entries(settings).filter(([name, value]) => name !== "top_k" || value); // 0 is off
  return entries.map(([name, value]) => `${name.replaceAll("_", "-")} ${[value].flat().map(formatValue).join(", ")}`);
}

function formatValue(value) {
  return typeof value === "number" ? Number(value.toFixed(3)) : value;
}

function fileName({ title, settings }) {
  const words = title.toLowerCase().match(/[a-z0-9]+/g) ?? ["picture"];
  return `${words.join("-").slice(0, 60)}${settings?.seed === undefined ? "" : `-${settings.seed}`}.png`;
}

/** The input images of a form: chosen as files, dropped on its view, or pasted into it; shown as thumbnails. */
export class ImageTray {
  /**
   * @param {HTMLFormElement} form
   * @param {{ max?: number, onChange?: () => void }} options max: a further image takes the place of the oldest
   */
  constructor(form, { max = 8, onChange = () => {} } = {}) {
    this.images = [];
    this.form = form;
    this.max = max;
    this.onChange = onChange;
    this.thumbnails = form.querySelector(".thumbnails");
    this.addListeners();
    this.render();
  }

  addListeners() {
    const view = this.form.closest(".view");
    const fileInput = this.form.querySelector(".file");
    fileInput.addEventListener("change", async () => {
      await this.addFiles(fileInput.files);
      fileInput.value = "";
    });
    view.addEventListener("dragover", () => view.classList.add("dragging"));
    for (const name of ["dragleave", "drop"]) view.addEventListener(name, () => view.classList.remove("dragging"));
    view.addEventListener("drop", (event) => this.addFiles(event.dataTransfer.files));
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length || !this.form.checkVisibility()) return;
      event.preventDefault();
      this.addFiles(files);
    });
  }

  /** @param {Iterable<File>} files */
  async addFiles(files) {
    for (const file of files) {
      try {
        this.add({ url: await readImageFile(file), title: file.name || "a picture" });
      } catch (error) {
        showError(this.form, error);
      }
    }
  }

  add(image) {
    this.set([...this.images, image].slice(-this.max));
  }

  set(images) {
    this.images = images;
    this.render();
    this.onChange();
  }

  /** Remove all images, and return them. */
  takeAll() {
    const { images } = this;
    this.set([]);
    return images;
  }

  render() {
    const thumbnails = this.images.map((image) => {
      const remove = () => this.set(this.images.filter((other) => other !== image));
      const removeButton = button("×", remove, { "aria-label": `Remove ${image.title}` });
      return el("span", { class: "thumbnail" }, imageElement(image.url, image.title, 64), removeButton);
    });
    const hint = this.thumbnails.dataset.empty;
    if (!thumbnails.length && hint) thumbnails.push(el("span", { class: "muted" }, hint));
    this.thumbnails.replaceChildren(...thumbnails);
  }
}
