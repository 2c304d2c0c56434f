// Pictures: read from files, shown at whole multiples of their size, saved, and handed from one view to another.
// A picture is { url, title, settings }: a data URI, what was asked for, and how it was made. Knows no view; views say
// by `offer` what they can do with a picture.

import { button, el, mark } from "./dom.js";

const LARGEST = 1024; // pixels of a side that is sent; models read less
const SMALL = 128; // sides up to which every pixel is shown as a square

const offers = [];

/** Let every picture that is made be used so from here on. */
export function offer(text, use) {
  offers.push([text, use]);
}

/** A data URI of what a file shows: PNG, of at most LARGEST pixels a side, and without what a camera noted in it. */
export async function read(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name || "this"} is no picture that this browser can read`);
  });
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = el("canvas", { width, height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  return canvas.toDataURL("image/png");
}

/** An image about `side` wide: a small one at a whole multiple of its size, so that its pixels stay squares. */
export function image(url, title, side) {
  const shown = el("img", { alt: title });
  shown.addEventListener("load", () => {
    const { naturalWidth: width, naturalHeight: height } = shown;
    const small = Math.max(width, height) <= SMALL;
    shown.classList.toggle("small", small);
    shown.width = small ? width * Math.max(1, Math.floor(side / width)) : Math.min(width, side);
  });
  shown.src = url;
  return shown;
}

/** A picture with how it was made (or what of that is to be `shown`), a link that saves it, and what it can be used
 * for. */
export function figure(picture, side) {
  const { url, title, shown = picture.settings } = picture;
  const caption = el("figcaption", { class: "quiet" });
  if (shown) caption.append(el("span", { class: "used" }, used(shown)));
  const acts = el("span", { class: "acts" });
  acts.append(el("a", { href: url, download: fileName(picture) }, "Download"));
  if (offers.length) {
    const menu = el("details", { class: "menu" }, el("summary", {}, "Use"));
    const close = () => menu.removeAttribute("open");
    const uses = offers.map(([text, use]) => button(text, () => (close(), use(picture))));
    const list = el("span", { class: "uses" }, ...uses);
    menu.append(list);
    menu.addEventListener("toggle", () => {
      list.classList.remove("back"); // towards the side where there is room
      list.classList.toggle("back", list.getBoundingClientRect().right > document.documentElement.clientWidth);
    });
    menu.addEventListener("focusout", (event) => menu.contains(event.relatedTarget) || close());
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      close();
      menu.firstChild.focus();
    });
    acts.append(menu);
  }
  caption.append(acts);
  return el("figure", { class: "picture" }, image(url, title, side), caption);
}

/** A frame where a picture is to come, or stands while it is made. */
export function frame(side) {
  const made = el("figure", { class: "frame", "aria-hidden": "true" });
  made.style.width = `${side}px`;
  return made;
}

/** An answer's settings as people read them: "seed 3 · next-token · guidance 2.5". drawn: are pictures in it? */
export function used({ seed, text, max_tokens, generator, ...rest }, drawn = true) {
  const said = seed === undefined ? [] : [`seed ${seed}`];
  if (text) said.push(`text ${listed(text).join(", ")}`);
  if (drawn && generator) said.push(generator);
  if (drawn) said.push(...listed(rest));
  return said.join(" · ");
}

function listed(settings) {
  const told = Object.entries(settings).filter(([name, value]) => name !== "top_k" || value); // 0: all of them
  return told.map(([name, value]) => `${name.replaceAll("_", "-")} ${[value].flat().map(shortened).join(", ")}`);
}

function shortened(value) {
  return typeof value === "number" ? Number(value.toFixed(3)) : value;
}

function fileName({ title, settings }) {
  const words = title.toLowerCase().match(/[a-z0-9]+/g) ?? ["picture"];
  return `${words.join("-").slice(0, 60)}${settings?.seed === undefined ? "" : `-${settings.seed}`}.png`;
}

/**
 * The pictures that go with a form: chosen, dropped on its view, or pasted into it; at most so many, a newer one in the
 * place of an older. changed() is called when they are others.
 */
export class Tray {
  constructor(form, { most = 8, changed = () => {} } = {}) {
    this.pictures = [];
    this.form = form;
    this.most = most;
    this.changed = changed;
    this.thumbs = form.querySelector(".thumbs");
    const view = form.closest(".view");
    const chosen = form.querySelector(".file");
    chosen.addEventListener("change", async () => {
      await this.read(chosen.files);
      chosen.value = "";
    });
    view.addEventListener("dragover", () => view.classList.add("over"));
    for (const name of ["dragleave", "drop"]) view.addEventListener(name, () => view.classList.remove("over"));
    view.addEventListener("drop", (event) => this.read(event.dataTransfer.files));
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length || !form.checkVisibility()) return;
      event.preventDefault();
      this.read(files);
    });
    this.show();
  }

  async read(files) {
    for (const file of files) {
      try {
        this.add({ url: await read(file), title: file.name || "a picture" });
      } catch (error) {
        mark(this.form, error);
      }
    }
  }

  add(picture) {
    this.set([...this.pictures, picture].slice(-this.most));
  }

  set(pictures) {
    this.pictures = pictures;
    this.show();
    this.changed();
  }

  /** The pictures, which are gone from here. */
  take() {
    const taken = this.pictures;
    this.set([]);
    return taken;
  }

  show() {
    const shown = this.pictures.map((picture) => {
      const drop = () => this.set(this.pictures.filter((one) => one !== picture));
      const cross = button("×", drop, { "aria-label": `Take ${picture.title} away` });
      return el("span", { class: "thumb" }, image(picture.url, picture.title, 64), cross);
    });
    const empty = this.thumbs.dataset.empty;
    this.thumbs.replaceChildren(...(shown.length || !empty ? shown : [el("span", { class: "quiet" }, empty)]));
  }
}
